"""Configurations as files."""

import json
from pathlib import Path

from grpo_kit.config import Config


def save_config(config: Config, path: Path) -> Path:
    """Write a configuration as `load_config` reads it, and return its path."""
    path.write_text(json.dumps(config.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8")
    return path
