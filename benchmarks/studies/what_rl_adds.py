"""How much does the RL add? Held-out scores of ways to use as many pictures as GRPO does, or none, over training seeds.

*raw* draws the user's words, *initial* the likeliest rewrite of the policy before training. *best of 8* needs no
training: the initial policy writes 8 rewrites of each held-out prompt, the reward chooses one by its picture from one
latent, and that text is judged on others. *supervised* is rejection sampling (RAFT, arXiv 2304.06767): the same prompts
and groups as GRPO, and cross-entropy on the rewrite of each group with the best reward, drawn by the policy as it is by
then; *supervised once* draws all of it with the initial policy. *GRPO* is the kit's. What is trained draws equally many
pictures, with equally many optimizer steps at the same rates; `results` refuses anything else.
`python -m benchmarks.studies.what_rl_adds` writes `reports/what_rl_adds/`: scores of each run, table.json and plot.png.
A stopped measurement goes on with the first run that is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

import grpo_kit as gk
from benchmarks.speed.measure import Seconds, timed
from benchmarks.studies.budget import keep, per_run
from grpo_kit.config import PROJECT_ROOT, Config
from grpo_kit.config.schedule import scheduled_rates
from grpo_kit.config.seeds import derive_seed
from grpo_kit.config.threads import fitting_threads
from grpo_kit.evaluation.evaluate import draw_and_score, test_prompts
from grpo_kit.evaluation.intervals import t_interval
from grpo_kit.evaluation.writers import Request
from grpo_kit.experiment import Experiment
from grpo_kit.rollout import Rollout, score_rows, with_encoded
from grpo_kit.show.style import BLUE, GREEN, GREY, ORANGE, VERMILION, Drawing, new_figure, panel_grid, styled
from grpo_kit.training.accumulation import set_rate
from grpo_kit.training.iteration import collect
from grpo_kit.training.loop import make_optimizer
from grpo_kit.training.processes import ALONE
from grpo_kit.training.step import grpo_step

CHOICES = 8  # rewrites that best of n chooses from: as many as a group has
BEST = f"best of {CHOICES}"
TRAINED = ("supervised once", "supervised", "GRPO")
ARMS = ("raw", "initial", BEST, *TRAINED)
METRICS = {
    "reward/gold": "final check",
    "reward": "reward",
    "reward/keeps_objects": "keeps objects",
    "reward/grammatical": "in the grammar",
}
COLOURS = dict(zip(ARMS, (GREY, ORANGE, GREEN, VERMILION, VERMILION, BLUE), strict=True))
SETTINGS = {"generation_settings.rollout_steps": 4}  # in training; held-out prompts are drawn with all steps


def main(
    seeds: Annotated[int, typer.Option(min=1, help="training seeds of each arm")] = 5,
    arms: Annotated[str, typer.Option(help="which, with commas between them")] = ",".join(ARMS),
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where all of it goes")] = PROJECT_ROOT / "reports" / "what_rl_adds",
) -> None:
    """Train and evaluate what is missing, seed by seed so that a stopped measurement is balanced; print the table."""
    for seed in range(seeds):
        for arm in arms.split(","):
            measure(out / f"{arm}_{seed}.parquet", arm, configured(profile, seed))
        table = results(out)
        table.to_json(out / "table.json", orient="records", indent=2)
        figure(table).save(out / "plot.png", dpi=110)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def configured(profile: str, seed: int) -> Config:
    """The settings of one run, the same for every arm."""
    return gk.load_config(profile, SETTINGS | {"training_settings.seed": seed})


def measure(place: Path, arm: str, config: Config) -> None:
    """Train one arm and keep its scores on held-out prompts and what they cost, unless that was done."""
    if place.is_file():
        return
    kit = gk.load_experiment(config)
    pictures, seconds = trained(kit, arm) if arm in TRAINED else (0, Seconds(0.0, 0.0))
    if arm == BEST:
        rows, seconds = best_of(kit)
    else:
        rows = gk.evaluate(kit, None, ("trained" if arm in TRAINED else arm,), paraphrases=False).rows
    cost = {"pictures": pictures, "cpu_seconds": seconds.cpu}
    keep(rows[["prompt_id", "user_prompt", "text", "seed", *METRICS]].assign(**cost), place)
    scores = ", ".join(f"{name} {rows[metric].mean():.3f}" for metric, name in METRICS.items())
    typer.echo(f"{place.stem}: {pictures} pictures, {seconds.cpu:.0f} CPU-seconds, {scores}")
    gk.release(kit)


# --- the arms ---------------------------------------------------------------------------------------------------------


def trained(kit: Experiment, arm: str) -> tuple[int, Seconds]:
    """Train the experiment's policy without any files; how many pictures it took, and which time."""
    config, optimizer, drawn = kit.config, make_optimizer(kit, kit.config), []

    def rollout(iteration: int) -> Rollout:
        with kit.generator.steps(config.generation_settings.rollout_steps):
            found = collect(kit, iteration, ALONE)
        drawn.append(found.image_seeds.numel())
        return found

    def train() -> None:
        iterations = range(1, config.training_settings.num_iterations + 1)
        rollouts = map(rollout, iterations)  # each when it is asked for: of the policy as it is by then
        if arm == "supervised once":
            rollouts = list(rollouts)
        for iteration, found in zip(iterations, rollouts, strict=True):
            rates = scheduled_rates(config.training_settings, iteration)
            if arm == "GRPO":
                grpo_step(kit.policy, optimizer, found, config, ALONE, rates)
            else:
                supervised_step(kit, optimizer, found, rates)
            set_rate(optimizer, rates[-1])

    seconds = timed(train)
    return sum(drawn), seconds


def best_rows(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(P,) the row of each group with the highest reward: the first of equal ones, none of a group without a score."""
    rewards = rewards.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    groups = [(group_ids == group).nonzero().flatten() for group in group_ids.unique()]
    rows = [rows[rewards[rows].argmax()] for rows in groups if rewards[rows].isfinite().any()]
    return torch.stack(rows) if rows else group_ids.new_zeros(0)


def cross_entropy(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of these completions of minus their log-probability; both (N, T)."""
    return -(logprobs * mask).sum() / mask.sum()


@torch.enable_grad()
def supervised_step(
    kit: Experiment, optimizer: torch.optim.Optimizer, rollout: Rollout, rates: Sequence[float | None]
) -> None:
    """One optimizer step a rate on the best rewrite of each group; the norm of the gradient is bounded as GRPO's is."""
    rollout, rows = with_encoded(rollout, kit.policy), best_rows(rollout.rewards, rollout.group_ids)
    if len(rows) == 0:
        return
    mask, trainable = rollout.completion_mask[rows].to(kit.policy.device), kit.policy.trainable_parameters()
    with fitting_threads(kit.policy.model):
        for rate in rates:
            set_rate(optimizer, rate)
            optimizer.zero_grad()
            cross_entropy(score_rows(kit.policy, rollout, rows).logprobs, mask).backward()
            torch.nn.utils.clip_grad_norm_(trainable, kit.config.training_settings.max_grad_norm)
            optimizer.step()
    optimizer.zero_grad()


def best_of(kit: Experiment) -> tuple[pd.DataFrame, Seconds]:
    """Scores of the rewrites that the reward chose, on latents that it has not seen; and the time of the choice."""
    prompts, seed = test_prompts(kit), derive_seed(kit.config.training_settings.seed, BEST)
    chosen: list[str] = []

    def choose() -> None:
        texts = kit.policy.sample([prompt.user_prompt for prompt in prompts], CHOICES, seed=seed).texts
        groups = torch.arange(len(prompts)).repeat_interleave(CHOICES)
        latents = [derive_seed(seed, "latent", group) for group in groups.tolist()]  # one for the whole group
        asked = [prompts[group] for group in groups.tolist()]
        users, fields = [prompt.user_prompt for prompt in asked], [prompt.metadata for prompt in asked]
        images = kit.generator.generate_images(texts, latents)
        where = {"group_ids": groups, "image_seeds": torch.tensor(latents), "metadata": fields}
        parts = kit.rewards.score(images, users, texts, **where)
        rows = best_rows(kit.rewards.total(parts, in_groups=False), groups)
        chosen.extend(texts[row] for row in rows.tolist())

    seconds = timed(choose)
    requests = list(map(Request, range(len(prompts)), prompts, chosen))
    rows, _ = draw_and_score(kit, requests, BEST, kit.config.evaluation_settings.seeds_per_prompt)
    return pd.DataFrame(rows), seconds


# --- the table and the figure -----------------------------------------------------------------------------------------


def results(out: Path) -> pd.DataFrame:
    """A row an arm: means over seeds with t-intervals, costs, and the final check less that of GRPO, seed by seed.

    Raises:
        ValueError: an arm that is trained drew another number of pictures than the others, so nothing is compared.
    """
    each = per_run(out, [*METRICS, "pictures", "cpu_seconds"])
    if len(drawn := each.loc[each["pictures"] > 0, "pictures"].round().astype(int).drop_duplicates()) > 1:
        found = ", ".join(f"{arm} {count:,}" for (arm, _), count in drawn.items())
        raise ValueError(f"pictures: found {found}, allowed: as many for every trained arm, else none is comparable")
    scores = {arm: each.loc[arm] for arm in ARMS if arm in each.index.get_level_values("arm")}
    table = []
    for arm, found in scores.items():
        row: dict[str, object] = {"arm": arm, "seeds": len(found), "pictures": int(found["pictures"].iloc[0])}
        row["pictures a prompt in use"] = 1 + CHOICES * (arm == BEST)
        row["CPU-seconds"] = float(found["cpu_seconds"].mean())
        for metric, name in METRICS.items():
            row |= _columns(name, found[metric])
        if arm != "GRPO" and "GRPO" in scores:
            for metric in list(METRICS)[:2]:
                row |= _columns(f"GRPO's {METRICS[metric]} less this", (scores["GRPO"] - found)[metric].dropna())
        table.append(row)
    return pd.DataFrame(table)


def _columns(name: str, values: pd.Series) -> dict[str, float]:
    found = t_interval(values) if len(values) else None
    return {} if found is None else {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


@styled
def figure(table: pd.DataFrame) -> Drawing:
    """Each arm's scores on held-out prompts with their intervals over training seeds; readable from afar."""
    drawing = new_figure(13, 5.2)
    for number, (axes, name) in enumerate(zip(panel_grid(drawing, len(METRICS)), METRICS.values(), strict=True)):
        for place, row in enumerate(table.to_dict("records")):
            ends = [[row[name] - row[f"{name}, low"]], [row[f"{name}, high"] - row[name]]]
            look = {"color": COLOURS[row["arm"]], "marker": "D" if row["arm"] == "GRPO" else "o"}
            axes.errorbar(row[name], place, xerr=np.nan_to_num(ends), ms=10, lw=3, capsize=5, **look)
            right = row[name] < table[name].agg(["min", "max"]).mean()
            beside = {"ha": "left" if right else "right", "va": "bottom", "fontsize": 14}
            axes.annotate(f"{row[name]:.3f}", (row[name], place), (0, 9), textcoords="offset points", **beside)
        axes.set_title(name, fontsize=16)
        axes.set_yticks(range(len(table)), table["arm"] if number == 0 else [""] * len(table), fontsize=16)
        axes.set_ylim(len(table) - 0.5, -0.7)
        axes.margins(x=0.22)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize=13)
    means = ", ".join(f"{row['arm']} {row['final check']:.3f}" for row in table.to_dict("records"))
    drawing.alt = f"Held-out scores of each way, with 95 % intervals over training seeds. Final check: {means}."
    return drawing


if __name__ == "__main__":
    typer.run(main)
