"""Record `data/recorded_runs`: five short runs of profile tiny, four of which go wrong, for exercise 07.2.

Each is really trained. What is kept of a run are its metrics and what its validations judged, without the settings:
the numbers 1 to 5 say nothing about the cause. `python -m tools.diagnose_runs` takes some minutes on one core.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.rewards.composition import Rewards
from grpo_kit.runs.folder import RunFolder

COMMON = {
    "training_settings.num_iterations": 25,
    "training_settings.learning_rate": 4e-4,  # twice the profile's, so that a short run shows what it comes to
    "training_settings.validate_every": 5,
    "training_settings.save_every": 25,
    "evaluation_settings.paraphrases": False,
}
MONITORS = ["gold", "keeps_objects", "grammatical", "clip_similarity"]
CONSISTENCY = {"reward_settings.weights": {"consistency": 1.0}, "reward_settings.monitors": MONITORS}
CAUSES = {  # number → cause, and the settings that make it
    1: ("beta 0", {"training_settings.beta": 0.0}),
    2: ("random reward", CONSISTENCY),
    3: ("healthy", {}),
    4: ("learning rate too high", {"training_settings.learning_rate": 4e-3}),
    5: ("gamed", CONSISTENCY | {"training_settings.beta": 0.0}),
}
METRICS = {  # as kept → as a run logs it
    "reward": "reward",
    "reward_std": "reward_std",
    "gold": "rewards/gold/mean",
    "keeps_objects": "rewards/keeps_objects/mean",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "clipped": "clip_ratio/region_mean",
    "tokens": "completions/mean_length",
}
KEPT = ("user_prompt", "enhanced_prompt", "reward", "rewards")  # of a validation's sample


def main(
    out: Annotated[Path, typer.Option(help="what is replaced")] = PROJECT_ROOT / "data" / "recorded_runs",
    only: Annotated[int, typer.Option(help="train this run alone, and write nothing; 0 is all")] = 0,
) -> None:
    """Train all of them and write both tables."""
    torch.set_num_threads(1)
    metrics, validations = [], []
    for number in [only] if only else CAUSES:
        with tempfile.TemporaryDirectory() as folder:
            found = train(number, Path(folder) / "run")
        metrics += found[0]
        validations += found[1]
    if only:
        typer.echo("\n".join(json.dumps({k: v for k, v in row.items() if k != "samples"}) for row in validations))
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in {"metrics": metrics, "validations": validations}.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(number: int, place: Path) -> tuple[list[dict], list[dict]]:
    """Train one run; its rows of both tables."""
    cause, changes = CAUSES[number]
    kit = gk.load_experiment(gk.load_config("tiny", COMMON | changes))
    if cause == "random reward":
        kit = kit.with_rewards(Rewards({"noise": Noise()}, {"noise": 1.0}, kit.rewards.monitors))
    gk.train(kit, place, progress=False)
    folder = RunFolder(place)
    every = COMMON["training_settings.validate_every"]
    metrics = [
        {"run": number, "iteration": row["iteration"]}
        | {name: _rounded(row.get(logged)) for name, logged in METRICS.items()}
        for row in folder.metrics()
    ]
    for row in metrics:  # where beta is 0 a KL is measured at these iterations only: no run shall show by that
        if row["iteration"] % every and row["iteration"] > 1:
            row["kl"] = None
    validations = [
        {"run": number, "iteration": found["iteration"], "reward": found["reward"], "rewards": found["rewards"]}
        | {"diversity": found["diversity"]}
        | {"samples": [{name: _rounded(sample[name]) for name in KEPT} for sample in found["samples"]]}
        for found in folder.validations()
    ]
    return metrics, [{name: _rounded(value) for name, value in row.items()} for row in validations]


class Noise:
    """A reward that means nothing: numbers from its own generator, whatever the pictures are."""

    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(0)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) numbers between 0 and 1."""
        return torch.rand(len(images), generator=self.source)


def _rounded(value: object) -> object:
    """The value with four digits, also inside a dict."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
