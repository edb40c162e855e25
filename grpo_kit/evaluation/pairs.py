"""Which variants an evaluation compares, and its scores as tables in which pairs stay pairs."""

from collections.abc import Sequence

import pandas as pd

VARIANTS = ("raw", "initial", "trained", "oracle")
_PAIRS = (("trained", "raw"), ("trained", "initial"), ("initial", "raw"), ("oracle", "raw"), ("oracle", "trained"))


def compared_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs to compare: those of the kit's own variants; each saved policy against raw and against the first one.

    The first policy is `trained` where it takes part, else the first saved one.
    """
    saved = [variant for variant in variants if variant not in VARIANTS]
    first = ["trained"] if "trained" in variants else saved[:1]
    pairs = [(a, b) for a, b in _PAIRS if a in variants and b in variants]
    return pairs + [(name, other) for name in saved for other in ["raw", *first] if other in variants and other != name]


def complete_cells(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Leave out (and count) the (prompt, seed) cells in which a variant could not be scored: pairs must stay pairs."""
    failed = rows.loc[rows["reward"].isna(), ["prompt_id", "seed"]].drop_duplicates()
    if failed.empty:
        return rows, 0
    kept = rows.merge(failed, on=["prompt_id", "seed"], how="left", indicator=True)["_merge"] == "left_only"
    return rows[kept.to_numpy()], len(failed)


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
