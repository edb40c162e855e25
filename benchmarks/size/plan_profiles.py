"""`python -m benchmarks.size.plan_profiles`: plan every profile that names a kind of machine, for docs/plans.json.

The record keeps the profile's settings beside the figures, so that a test sees when a profile has changed since.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from grpo_kit.config import PROFILE_FOLDER, PROJECT_ROOT, load_config

MACHINES = {"gpu_16gb": "t4", "gpu_24gb": "rtx3090", "gpu_80gb": "a100", "apple": "m1"}
MACHINES |= {"wan_24gb": "rtx3090", "stable_audio_24gb": "rtx3090"}
RECORD = PROJECT_ROOT / "docs" / "plans.json"


def fingerprint(profile: str) -> str:
    """What a profile, and those that it builds on, hash to."""
    texts: list[bytes] = []
    while profile:
        texts.insert(0, (PROFILE_FOLDER / f"{profile}.json").read_bytes())
        profile = json.loads(texts[0]).get("profile")
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def row(profile: str, record: dict) -> str:
    """A profile's line of the table in docs/scaling.md."""
    config, parts = load_config(profile), record["parts"]
    training, generation = config.training_settings, config.generation_settings
    named = [config.model_settings.vlm_model, config.model_settings.sd_model, config.model_settings.clip_model]
    named += [options["model"] for options in config.reward_settings.options.values()]
    models = " + ".join(name.rsplit("/", 1)[-1] for name in named)
    resident = " + ".join(f"{parts[name]['resident'] / 1e9:.1f}" for name in ("policy", "generator", "reward"))
    size = f"{generation.height} px" if generation.height else f"{generation.seconds:g} s"
    size += f", {generation.frames} frames" if generation.frames else ""
    work = f"{training.prompts_per_iteration} × {training.group_size}, {size}"
    memory = f"{record['peak'] / 1e9:.1f} of {record['memory'] / 1e9:.0f} GB"
    seconds = f"{record['seconds_per_iteration']:.0f} s"
    name = f"`{profile}` ({record['device']}, {record['dtype']})"
    return f"| {name} | {models} | {work} | {resident} GB | {memory} | {seconds} |"


def main(
    only: Annotated[list[str] | None, typer.Argument(help="profiles; all of them")] = None,
    out: Annotated[Path, typer.Option(help="the record, whose other profiles are kept")] = RECORD,
) -> None:
    """Write the record and print the table's lines."""
    from grpo_kit.preflight.plan import plan
    from grpo_kit.preflight.plan.table import as_json

    records = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for profile in only or MACHINES:
        found = as_json(plan(load_config(profile), MACHINES[profile]), [])
        records[profile] = {"settings": fingerprint(profile), **found}
        out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        typer.echo(row(profile, records[profile]))


if __name__ == "__main__":
    typer.run(main)
