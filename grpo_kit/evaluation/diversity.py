"""Do a policy's rewrites differ, or do they all end in the same words?"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import pdist

from grpo_kit.rewards.words import phrase, words

COMMON = 0.5  # an ending that this share of the rewrites has is what they converge to


def rewrite_diversity(prompts: Sequence[str], rewrites: Sequence[str]) -> dict[str, float | str]:
    """How much the rewrites of different prompts differ, judged by the words that they add.

    Args:
        prompts: the users' prompts, N.
        rewrites: the rewrite of each, N.

    Returns:
        distinct: share of the rewrites that differ from one another, in (0, 1].
        added_words: words in a rewrite that its prompt does not have, on average.
        added_distance: mean Jaccard distance between two rewrites' sets of added words; 0 where all add the same.
        suffix, suffix_share: what `common_ending` finds of the words that stand after the prompt's own.

    Raises:
        ValueError: no rewrites, or not one for each prompt.
    """
    if not rewrites or len(prompts) != len(rewrites):
        raise ValueError(f"rewrites: found {len(rewrites)} of {len(prompts)} prompts, allowed: one each, at least one")
    added, endings = [], []
    for prompt, rewrite in zip(prompts, rewrites, strict=True):
        known, written = set(words(prompt, compounds=True)), words(rewrite, compounds=True)
        added.append(set(written) - known)
        last_known = max((place for place, word in enumerate(written) if word in known), default=-1)
        endings.append(written[last_known + 1 :])
    suffix, share = common_ending(endings)
    return {
        "distinct": len(set(rewrites)) / len(rewrites),
        "added_words": float(np.mean([len(one) for one in added])),
        "added_distance": mean_jaccard_distance(added),
        "suffix": phrase(suffix),
        "suffix_share": share,
    }


def mean_jaccard_distance(sets: Sequence[set[str]]) -> float:
    """Mean of 1 − |A ∩ B| / |A ∪ B| over all pairs; two empty sets are alike. NaN for fewer than two sets."""
    if len(sets) < 2:
        return float("nan")
    vocabulary = sorted(set().union(*sets)) or [""]
    return float(pdist([[word in one for word in vocabulary] for one in sets], "jaccard").mean())


def common_ending(endings: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], float]:
    """The longest run of last words that at least half of the texts share, else the commonest last word, and its share.

    Where all texts are empty, the ending is, and its share 0.
    """
    best, share = (), 0.0
    for length in range(1, max(map(len, endings), default=0) + 1):
        (ending, count), *_ = Counter(tuple(e[-length:]) for e in endings if len(e) >= length).most_common(1)
        if length > 1 and count / len(endings) < COMMON:
            break
        best, share = ending, count / len(endings)
    return best, share
