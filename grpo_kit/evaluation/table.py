"""An evaluation as a table: names that people know, numbers as they read them, means with their intervals."""

from collections.abc import Mapping

from grpo_kit.evaluation.pairs import VARIANTS

Interval = Mapping[str, float]  # mean, low, high
MAIN = ("reward", "gold")
VARIANT_NAMES = dict(zip(VARIANTS, ("raw prompt", "initial policy", "trained policy", "oracle rewrite"), strict=True))

METRIC_NAMES = {
    "gold": "gold check",
    "kl": "KL from the initial policy",
    "keeps_objects": "keeps the objects",
    "clip_similarity": "CLIP similarity",
    "gain": "gain over the raw prompt",
    "consistency": "agrees with its rewrite",
    "meaning_kept": "keeps the meaning",
    "jpeg_size": "JPEG size",
}
SHARES = frozenset({"gold", "keeps_objects", "grammatical"})  # metrics in 0..1 that people read as per cent


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
    """Return the comparison as a table: the metrics' names, then rows of (label, cells, kind).

    The kind is `variant`, `difference` or `share`.
    """
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
