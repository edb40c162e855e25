"""A small experiment on the embedded models, as a new process would load it, and what its runs leave."""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator

QUICK = {
    "training_settings.num_iterations": 4,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 3,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 120,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
}


def fresh(kit: Experiment, other: dict[str, object] | None = None, **training: object) -> Experiment:
    """The experiment with an untrained policy and few prompts; `training` and `other` change its settings."""
    changes = {f"training_settings.{name}": value for name, value in training.items()}
    return dataclasses.replace(
        kit,
        config=load_config(kit.config, QUICK | changes | (other or {})),
        policy=copy.deepcopy(kit.policy),
        generator=Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0, batch_size=24),
        train_prompts=kit.train_prompts[:9],
    )


def left(folder: Path) -> dict[str, str]:
    """What a run left, but for the checkpoints before its last one: file → digest; of metrics all but the seconds."""
    last = max(folder.glob("checkpoints/iter_*"))
    patterns = (f"checkpoints/{last.name}/**/*", "best/**/*", "validation_*.json", "rollouts/*", "thumbnails/*")
    files = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{name: value for name, value in row.items() if "time" not in name} for row in rows]
    digests = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return digests | {"metrics.jsonl": json.dumps(untimed)}


def committed(folder: Path) -> list[int]:
    """The iterations that have a checkpoint."""
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/iter_*"))
