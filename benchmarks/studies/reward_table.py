"""Every reward that the embedded world can score, audited on 200 of its pictures, which a program checks.

25 held-out prompts, each in 4 texts (as it is, a sample of the initial policy, the demo run's policy, the oracle), each
drawn from the same 2 latent seeds. `python -m benchmarks.studies.reward_table` writes `reports/reward_table/`:
table.json, table.md and plot.png. Left out are `pickscore`, `hps` and `aesthetic`: the kit does not have their weights.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.config.prompts import balanced_batch
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.audit import audit
from grpo_kit.evaluation.evaluate import rewrites
from grpo_kit.experiment import Experiment
from grpo_kit.show import audit_figure

REWARDS = (
    "clip_similarity gain consistency image_quality sharpness contrast meaning_kept safety style diversity length "
    "repetition jpeg_size"
).split()
OPTIONS = {  # for a world of coloured shapes; the rest as in the profile
    "safety": {"avoid": ["glitch"], "threshold": 0.2},
    "style": {"phrase": "sharp"},
    "length": {"max_words": 8},
}
PROMPTS, SEEDS = 25, 2
INTERVALS = ("rank within", "pairs within", "rank over all", "seed share")
SHARES = ("at ceiling", "at floor", "top decile", "idle words, rewrite", "idle words, user")


def main(
    run_dir: Annotated[Path, typer.Option(help="the run whose policy takes part")] = PROJECT_ROOT / "data" / "demo_run",
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    seed: Annotated[int, typer.Option(help="of prompts, rewrites and latents")] = 0,
    out: Annotated[Path, typer.Option(help="where the table goes")] = PROJECT_ROOT / "reports" / "reward_table",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Draw, audit, write and print."""
    if threads:
        torch.set_num_threads(threads)
    options = {f"reward_settings.options.{name}": given for name, given in OPTIONS.items()}
    weights = {"reward_settings.weights": dict.fromkeys(REWARDS, 1.0)}
    kit = gk.load_experiment(gk.load_config(profile, options | weights))
    rows = drawn(kit, run_dir, seed)
    columns = {name: rows[name].tolist() for name in ("enhanced_prompts", "group_ids", "image_seeds")}
    gold = kit.rewards.monitors["gold"]
    found = audit(kit.rewards.parts, rows["image"].tolist(), rows["prompt"].tolist(), gold=gold, **columns)
    table = found.table()
    out.mkdir(parents=True, exist_ok=True)
    table.reset_index().to_json(out / "table.json", orient="records", indent=2)
    (out / "table.md").write_text(markdown(table) + "\n", encoding="utf-8")
    audit_figure(found).save(out / "plot.png")
    typer.echo(markdown(table))


def drawn(kit: Experiment, run_dir: Path, seed: int) -> pd.DataFrame:
    """A row a picture: the prompt, the text that it was drawn from, its group and its latent seed."""
    prompts = balanced_batch(kit.val_prompts, PROMPTS, seed=seed, iteration=0)
    asked = [prompt.user_prompt for prompt in prompts]
    texts = {
        "raw": asked,
        "initial": kit.policy.sample(asked, 1, seed=seed).texts,
        "trained": rewrites(kit, prompts, run_dir),
        "oracle": rewrites(kit, prompts, "oracle"),
    }
    rows = pd.DataFrame(
        [
            {"prompt": user, "enhanced_prompts": written[group], "group_ids": group, "image_seeds": latent}
            for group, user in enumerate(asked)
            for written in texts.values()
            for latent in (derive_seed(seed, "table", group, i) for i in range(SEEDS))
        ]
    )
    rows["image"] = kit.generator.generate_images(rows["enhanced_prompts"].tolist(), rows["image_seeds"].tolist())
    return rows[rows["image"].notna()]


def markdown(table: pd.DataFrame) -> str:
    """The table for people, the best agreement first."""
    table = table.sort_values("rank within", ascending=False)
    lines = ["| reward | " + " | ".join([*INTERVALS, *SHARES, "ms per image"]) + " |"]
    lines.append("|---" * (len(INTERVALS) + len(SHARES) + 2) + "|")
    for name, row in table.iterrows():
        cells = [f"{row[kind]:.2f} [{row[f'{kind}, low']:.2f}, {row[f'{kind}, high']:.2f}]" for kind in INTERVALS]
        cells += [f"{row[kind]:.2f}" for kind in SHARES] + [f"{row['ms per image']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("nan", "–").replace("-0.", "−0.")


if __name__ == "__main__":
    typer.run(main)
