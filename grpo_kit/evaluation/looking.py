"""What is looking worth? The second turn of a policy that sees its own picture, beside the same without that picture.

Every arm starts from the same first pictures, and draws at most one more from the same latents: the same prompts,
painters and numbers of pictures.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from grpo_kit.config import EvaluationSettings, KitError
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.cells import Cell, Images, cells_of, drawn_again, next_turn, scores_of
from grpo_kit.evaluation.intervals import interval
from grpo_kit.evaluation.table import BEST_OF, BLIND, FIRST, LOOKS, ORACLE
from grpo_kit.evaluation.writers import Writer, requests_of, writer
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import is_kept
from grpo_kit.models.painters import as_read, painter_of


def compare_looks(
    kit: Experiment, prompts: Sequence[Prompt], variant: str = "trained", seeds_per_prompt: int | None = None
) -> pd.DataFrame:
    """A row (arm, prompt, seed) for the first picture, the second of each arm, and what the world allows.

    Columns: arm, prompt_id, seed, user_prompt, text, kept, first_right, painter, reward and parts, and where the check
    is among these `right`: all that it looks at holds. "oracle" is the best prompt for the painter who draws, "best
    blind" the best of those that do not know which one does.

    Raises:
        KitError: fewer than two prompts, or a policy that writes once (`generation_settings.turns`).
    """
    write = writer(kit, variant)
    if write.turns < 2 or len(prompts) < 2:
        found = f"{len(prompts)} prompts" if write.turns > 1 else f"turns {write.turns}"
        raise KitError(f"looks: found {found}, allowed: at least 2 prompts and generation_settings.turns of 2 or more")
    count = seeds_per_prompt or kit.config.evaluation_settings.seeds_per_prompt
    cells = cells_of(kit, write(requests_of(prompts)), count)
    texts = [cell.request.text for cell in cells]
    images = kit.generator.generate_images(texts, [cell.latent for cell in cells])
    first = _rows(kit, cells, FIRST, texts, images)
    parts = [first]
    pictures = getattr(kit.generator, "medium", "image") == "image"  # the check has words for these alone
    for look in (one for one in LOOKS if pictures or one != "words"):
        asked = next_turn(cells, [cell.request.asked for cell in cells], texts, images, look)
        answers = write.answers(asked, look, count)
        second, drawn = drawn_again(kit, cells, answers, texts, images)
        parts.append(_rows(kit, cells, look, second, drawn).assign(kept=[is_kept(answer) for answer in answers]))
    parts.append(_best_of_two(kit, cells, write, first))
    if kit.config.evaluation_settings.gold is not None:
        parts += _limits(kit, prompts, count)
    rows = pd.concat(parts, ignore_index=True)
    if "gold" in rows:
        rows["right"] = (rows["gold"] == 1).where(rows["gold"].notna()).astype(float)
        right = first.assign(first_right=first["gold"] == 1)[["prompt_id", "seed", "first_right"]]
        rows = rows.merge(right, on=["prompt_id", "seed"], validate="many_to_one")
    return rows


def _rows(kit: Experiment, cells: Sequence[Cell], arm: str, texts: Sequence[str], images: Images) -> pd.DataFrame:
    painters = kit.generator.painters
    scores = scores_of(kit, cells, texts, images)
    return pd.DataFrame(
        {
            "arm": arm,
            "prompt_id": cell.request.prompt_id,
            "seed": cell.seed,
            "user_prompt": cell.request.prompt.user_prompt,
            "text": str(text),
            "kept": False,
            "painter": painter_of(cell.latent, painters) if painters else 0,
            **found,
        }
        for cell, text, found in zip(cells, texts, scores, strict=True)
    )


def _best_of_two(kit: Experiment, cells: Sequence[Cell], write: Writer, first: pd.DataFrame) -> pd.DataFrame:
    """Of the first picture and that of a second rewrite, sampled as in training, the one with the higher reward."""
    seed = derive_seed(kit.config.training_settings.seed, "evaluation", BEST_OF)
    asked = [cell.request.asked for cell in cells]
    sampled = write.policy.sample(asked, 1, seed=seed, reference=write.variant == "initial").texts
    images = kit.generator.generate_images(sampled, [cell.latent for cell in cells])
    second = _rows(kit, cells, BEST_OF, sampled, images)
    better = second["reward"] > first["reward"].fillna(-np.inf)
    return second.where(better, first.assign(arm=BEST_OF))


def _limits(kit: Experiment, prompts: Sequence[Prompt], count: int) -> list[pd.DataFrame]:
    """The best prompt for the painter who draws each picture, and the best that one painter's would do for all."""
    painters = kit.generator.painters or [{}]
    cells = cells_of(kit, writer(kit, "oracle")(requests_of(prompts)), count)
    found = []
    for swaps in painters:
        texts = [as_read(cell.request.text, swaps) for cell in cells]
        images = kit.generator.generate_images(texts, [cell.latent for cell in cells])
        found.append(_rows(kit, cells, BLIND, texts, images))
    table = pd.concat(found, keys=range(len(painters)), names=["meant", "cell"]).reset_index()
    knowing = table[table["meant"] == table["painter"]].sort_values("cell")
    blind = max(found, key=lambda rows: rows["gold" if "gold" in rows else "reward"].mean())
    return [knowing.drop(columns=["meant", "cell"]).assign(arm=ORACLE), blind]


def summarize_looks(rows: pd.DataFrame, settings: EvaluationSettings) -> dict[str, dict]:
    """Each arm's means with intervals over prompts, its difference from a grey picture, and how often it keeps.

    `kept_when_right` and `kept_when_wrong` are shares of the cells whose first picture was right or not.
    """
    metrics = [name for name in ("reward", "gold", "right") if name in rows]
    tables = {arm: part.groupby("prompt_id")[metrics].mean() for arm, part in rows.groupby("arm", sort=False)}
    found: dict[str, dict] = {}
    for arm, table in tables.items():
        own = rows[rows["arm"] == arm]
        found[arm] = {metric: interval(table[metric].to_numpy(), settings).to_dict() for metric in metrics}
        found[arm]["less_grey"] = {
            metric: interval((table - tables["grey"])[metric].to_numpy(), settings).to_dict() for metric in metrics
        }
        if arm in LOOKS and "first_right" in rows:
            for name, which in (("kept_when_right", own["first_right"]), ("kept_when_wrong", ~own["first_right"])):
                found[arm][name] = float(own["kept"][which].mean()) if which.any() else None
    return found
