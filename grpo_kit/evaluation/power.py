"""Which differences could an evaluation detect, and what would more prompts or more latents bring?"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import special, stats

from grpo_kit.config import KitError
from grpo_kit.evaluation.intervals import prompt_means

POWER = 0.8


@dataclass(frozen=True)
class VarianceParts:
    """Where the variance of paired differences comes from."""

    prompt: float  # variance of prompts' true differences
    seed: float | None  # of latents within a prompt; None with one latent a prompt, when `prompt` holds both
    num_prompts: int
    seeds_per_prompt: float  # the harmonic mean where prompts have different numbers

    def standard_error(self, num_prompts: int | None = None, seeds_per_prompt: float | None = None) -> float:
        """Of the mean difference, with these numbers of prompts and latents or with others (`inf` is fine).

        Raises:
            KitError: another number of latents where there was one, so that their part is not known.
        """
        if self.seed is None and seeds_per_prompt not in (None, 1):
            why = "since one image a prompt does not tell how much latents matter"
            raise KitError(f"seeds_per_prompt: found {seeds_per_prompt}, allowed: 1, {why}. Evaluate with 2 or more")
        seeds = seeds_per_prompt or self.seeds_per_prompt
        return float(((self.prompt + (self.seed or 0.0) / seeds) / (num_prompts or self.num_prompts)) ** 0.5)


def variance_parts(differences: np.ndarray) -> VarianceParts:
    """Split the variance of paired differences into prompts' and latents' parts, as one-way analysis of variance does.

    Args:
        differences: (P, K), NaN where a cell could not be scored.

    Raises:
        KitError: fewer than two prompts have a score.
    """
    cells = differences[np.isfinite(differences).any(axis=1)]
    if len(cells) < 2:
        raise KitError(f"prompts: found {len(cells)} with scores, allowed: at least 2, to see how they vary")
    means, counts = prompt_means(cells), np.isfinite(cells).sum(axis=1)
    between, rest = float(means.var(ddof=1)), int((counts - 1).sum())
    seeds = float(1 / np.mean(1 / counts))
    if rest == 0:
        return VarianceParts(between, None, len(cells), seeds)
    within = float(np.nansum((cells - means[:, None]) ** 2) / rest)
    return VarianceParts(max(0.0, between - within / seeds), within, len(cells), seeds)


def detectable_difference(
    parts: VarianceParts,
    num_prompts: int | None = None,
    seeds_per_prompt: float | None = None,
    *,
    confidence: float = 0.95,
    power: float = POWER,
) -> float:
    """The smallest true mean difference that a two-sided paired test finds with this power.

    Over the standard error, that is the noncentrality with which t of P − 1 degrees of freedom passes the confidence's
    bound. (Cohen, Statistical Power Analysis, 1988, ch. 2; Card et al., "With Little Power Comes Great Responsibility",
    EMNLP 2020.)
    """
    freedom = (num_prompts or parts.num_prompts) - 1
    factor = special.nctdtrinc(freedom, 1 - power, stats.t.ppf((1 + confidence) / 2, freedom))
    return float(factor * parts.standard_error(num_prompts, seeds_per_prompt))


def detectable(differences: np.ndarray, confidence: float) -> dict[str, float | None] | None:
    """The smallest difference that an evaluation could detect, and with other numbers of prompts or latents.

    Args:
        differences: (P, K) of one pair.

    Returns:
        None where fewer than two prompts have a score; None for other numbers of latents where a prompt has only one.
    """
    if np.isfinite(differences).any(axis=1).sum() < 2:
        return None
    parts = variance_parts(differences)
    with_others = partial(detectable_difference, parts, confidence=confidence)
    seeds = {"one_seed": 1, "twice_the_seeds": 2 * parts.seeds_per_prompt, "endless_seeds": float("inf")}
    is_known = parts.seed is not None
    return {
        "difference": with_others(),
        "standard_error": parts.standard_error(),
        "prompt_variance": parts.prompt,
        "seed_variance": parts.seed,
        **{f"with_{name}": with_others(None, count) if is_known else None for name, count in seeds.items()},
        "with_twice_the_prompts": with_others(2 * parts.num_prompts),
    }
