"""What an evaluation compares, its scores as tables in which pairs stay pairs, and names and numbers for people."""

from collections.abc import Mapping, Sequence

import pandas as pd

VARIANTS = ("raw", "initial", "trained", "oracle")
_PAIRS = (("trained", "raw"), ("trained", "initial"), ("initial", "raw"), ("oracle", "raw"), ("oracle", "trained"))
Interval = Mapping[str, float]  # mean, low, high
MAIN = ("reward", "gold")
VARIANT_NAMES = dict(zip(VARIANTS, ("raw prompt", "initial policy", "trained policy", "oracle rewrite"), strict=True))

LOOKS = ("own", "other", "grey", "words", "nothing")  # what the policy sees before it writes again
BEST_OF = "best of 2"  # by the reward, of the first picture and a second sample's that saw nothing
FIRST, ORACLE, BLIND = "first picture", "oracle", "best blind"
LIMITS = (BLIND, ORACLE)  # what the world allows who does not look, and who does
ARM_NAMES = {  # what people call them, in the order of a figure
    FIRST: FIRST,
    "own": "its own picture",
    "other": "another prompt's picture",
    "grey": "a grey picture",
    "words": "the check's words",
    "nothing": "a second try, blind",
    BEST_OF: "best of 2 by the reward",
    BLIND: "best blind prompt",
    ORACLE: "best prompt for the painter",
}

METRIC_NAMES = {
    "gold": "gold check",
    "right": "everything right",
    "kl": "KL from the initial policy",
    "keeps_objects": "keeps the objects",
    "clip_similarity": "CLIP similarity",
    "gain": "gain over the raw prompt",
    "consistency": "agrees with its rewrite",
    "meaning_kept": "keeps the meaning",
    "jpeg_size": "JPEG size",
}
SHARES = frozenset({"gold", "right", "keeps_objects", "grammatical"})  # metrics in 0..1 that people read as per cent


def metric_name(metric: str) -> str:
    """Return what people call a metric."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def number_text(value: float | None, form: str) -> str:
    """Return a number in a format such as `+.2f`, with a true minus sign; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:{form}}".replace("-", "−")


def percent(value: float | None) -> str:
    """Return a share as whole per cent; a dash where there is none."""
    return "–" if value is None or value != value else f"{number_text(100 * value, '.0f')} %"


def format_metric(metric: str, value: float | None, signed: bool = False) -> str:
    """Return a value as people read it: shares as per cent (differences as points), the rest with 3 digits."""
    sign = "+" if signed else ""
    if metric not in SHARES or value is None or value != value:
        return number_text(value, f"{sign}.3f")
    return number_text(100 * value, f"{sign}.1f") + ("" if signed else " %")


def interval_text(metric: str, value: Interval | None, signed: bool = False) -> str:
    """Return a mean with its interval: `0.673 [0.652, 0.694]`; shares as per cent."""
    if value is None:
        return "–"
    low, high = (format_metric(metric, value[end], signed).removesuffix(" %") for end in ("low", "high"))
    return f"{format_metric(metric, value['mean'], signed)} [{low}, {high}]"


def comparison_rows(results: Mapping) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """The comparison as a table: the metrics' names, and rows (label, cells, "variant", "difference" or "share")."""
    variants, changes = results.get("variants", {}), results.get("differences", {})
    found = {metric for values in variants.values() for metric in values}
    order = ["reward", "gold", "keeps_objects", "grammatical"]
    metrics = [m for m in order if m in found] + sorted(found - set(order))
    rows = []
    for variant in [v for v in VARIANTS if v in variants] + [v for v in variants if v not in VARIANTS]:
        cells = [interval_text(m, variants[variant].get(m)) for m in metrics]
        rows.append((VARIANT_NAMES.get(variant, variant), cells, "variant"))
    for pair, change in changes.items():
        cells = [interval_text(m, change.get(m), signed=True) for m in metrics]
        rows.append((pair.replace("-", " − "), cells, "difference"))
    for key, label in (("gap_closed", "way from raw to oracle"), ("success_rate", "prompts better than raw")):
        values = results.get(key, {})
        if any(values.get(m) is not None for m in metrics):
            rows.append((label, [percent(values.get(m)) for m in metrics], "share"))
    wins = results.get("win_rate", {}).get("trained-raw", {})
    if wins:
        shares = [percent(wins[m]["mean"]) if m in wins and m in MAIN else "–" for m in metrics]
        rows.append(("images better than raw", shares, "share"))
    return [metric_name(m) for m in metrics], rows


def compared_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """The kit's own pairs; each saved policy against raw and against the first one, `trained` where it takes part."""
    saved = [variant for variant in variants if variant not in VARIANTS]
    first = ["trained"] if "trained" in variants else saved[:1]
    pairs = [(a, b) for a, b in _PAIRS if a in variants and b in variants]
    return pairs + [(name, other) for name in saved for other in ["raw", *first] if other in variants and other != name]


def complete_cells(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Leave out (and count) the (prompt, seed) cells in which a variant could not be scored: pairs must stay pairs."""
    kept = rows["reward"].notna().groupby([rows["prompt_id"], rows["seed"]]).transform("all")
    return rows[kept], len(rows.loc[~kept, ["prompt_id", "seed"]].drop_duplicates())


def score_tables(
    rows: pd.DataFrame, metrics: Sequence[str], variants: Sequence[str]
) -> dict[str, dict[str, pd.DataFrame]]:
    """Metric → variant → its (P, K) table: a row a prompt, a column a latent seed.

    Args:
        rows: tidy rows with the columns prompt_id, variant, seed and the metrics.
    """
    if rows.empty:
        return {m: {v: pd.DataFrame(dtype=float) for v in variants} for m in metrics}
    wide = rows.pivot(index="prompt_id", columns=["variant", "seed"], values=list(metrics))
    return {m: {v: wide[m][v] for v in variants} for m in metrics}
