"""The sentinel: does the reward rise while a score that training never sees falls? Then the policy games its reward.

It looks at the periodic validations. They draw the same held-out prompts from the same latents each time, so two of
them are compared prompt by prompt, by random signs (Fisher's randomisation test for paired values). A fall of the
held-out score counts where two validations in a row show it since the same earlier one, at a level that all looks of a
run and all earlier validations share: while that score does not fall, at most `ALPHA` of the runs raise an alarm,
however often they are looked at. Beside such a fall, the reward has risen where both validations show it at `RISE`.

Everything here is computed from what a run folder holds: a resumed run sees what an uninterrupted one would see.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import special

from grpo_kit.config import KitError
from grpo_kit.evaluation.statistics import t_interval

ALPHA = 0.05  # of the runs raise a false alarm, at most
RISE = 0.05  # level at which the reward has risen; the fall beside it carries the burden of proof
CONFIDENCE = 0.95  # of the intervals in a report, which decide nothing
ALIKE = 0.2  # a diversity below it: whatever the prompt, nearly the same words are added
FAR = 1.0  # nats per token from the initial policy; the embedded world's runs that learn stay below 0.8
RECENT = 5  # iterations whose median KL counts


@dataclass(frozen=True)
class Change:
    """A mean difference over prompts with its confidence interval."""

    mean: float
    low: float
    high: float

    def __neg__(self) -> "Change":
        return Change(-self.mean, -self.high, -self.low)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Divergence:
    """The reward rose and a held-out score fell, both over noise, between two validations."""

    iteration: int  # of the validation that established it
    since: int  # the iteration that it is measured from
    held_out: str  # which score fell
    reward_change: Change
    held_out_change: Change
    num_prompts: int
    p_value: float  # of the fall: the larger of this validation's and the one before's
    level: float  # what it had to stay below
    reward_p_value: float  # of the rise, likewise

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration}: the reward rose by {self.reward_change} since iteration {self.since}, "
            f"{self.held_out} fell by {-self.held_out_change}: the policy is gaming the reward"
        )


@dataclass(frozen=True)
class Caution:
    """Something that asks for a look and is no divergence."""

    iteration: int
    kind: str  # "decline", "paraphrase", "alike" or "far"
    text: str

    def __str__(self) -> str:
        return f"iteration {self.iteration}: {self.text}"


@dataclass(frozen=True)
class Watch:
    """What the sentinel sees in a run so far."""

    held_out: str | None  # the score that the reward is compared with
    signals: pd.DataFrame  # a row a validation: iteration, reward, held_out, paraphrase, diversity, kl
    divergence: Divergence | None
    cautions: list[Caution]

    def findings(self) -> list[str]:
        """Each divergence and caution in a line."""
        return [str(found) for found in (self.divergence, *self.cautions) if found is not None]

    def to_dict(self) -> dict[str, object]:
        """The content of a run's `sentinel.json`."""
        divergence = self.divergence and {**asdict(self.divergence), "text": str(self.divergence)}
        return {
            "held_out": self.held_out,
            "looks": len(self.signals),
            "divergence": divergence,
            "cautions": [{**asdict(caution), "text": str(caution)} for caution in self.cautions],
            "signals": self.signals.to_dict("records"),
        }


def held_out_score(monitors: Collection[str], named: str | None = None) -> str | None:
    """The monitor that training is judged by: the one named, else "gold" where it is scored, else none.

    Raises:
        KitError: the score named is no monitor: a score that is rewarded, or not measured, holds nothing out.
    """
    if named is not None and named not in monitors:
        raise KitError(
            f"evaluation_settings.held_out: found {named!r}, allowed: {', '.join(sorted(monitors)) or 'none'} "
            "(a monitor, scored and never rewarded). Add it to reward_settings.monitors, or choose one of these"
        )
    return named or ("gold" if "gold" in monitors else None)


def watch(validations: Sequence[Mapping], metrics: Sequence[Mapping], held_out: str | None) -> Watch:
    """Look at all validations of a run, in order, and at what its iterations logged until the last of them."""
    signals = follow(validations, metrics, held_out)
    divergence = None if held_out is None else find_divergence(validations, held_out)
    cautions = find_cautions(validations, signals, held_out)
    if divergence is not None:  # which says more than a decline that shows at the same time
        cautions = [found for found in cautions if (found.kind, found.iteration) != ("decline", divergence.iteration)]
    return Watch(held_out, signals, divergence, cautions)


def find_divergence(validations: Sequence[Mapping], held_out: str = "gold", alpha: float = ALPHA) -> Divergence | None:
    """The first divergence in a run's validations, None where there is none.

    Args:
        validations: contents of validation_iter_N.json in order, with `iteration` and per-prompt `samples`.
        held_out: the score among each sample's `rewards` that training never sees.
        alpha: the share of runs with a false alarm, at most.
    """
    reward, truth = score_table(validations, "reward"), score_table(validations, held_out)
    found = first_fall(truth, reward, alpha)
    if found is None:
        return None
    fall = changes(truth, found.base, found.look)
    return Divergence(
        iteration=validations[found.look]["iteration"],
        since=validations[found.base]["iteration"],
        held_out=held_out,
        reward_change=interval(changes(reward, found.base, found.look)),
        held_out_change=interval(fall),
        num_prompts=len(fall),
        p_value=found.p_value,
        level=level_at(found.look, alpha),
        reward_p_value=rise_p_value_of_both(reward, found.base, found.look),
    )


@dataclass(frozen=True)
class Fall:
    """At which validation a fall is established, since which one, and its p-value; validations are counted from 0."""

    look: int
    base: int
    p_value: float


def first_fall(truth: np.ndarray, reward: np.ndarray | None = None, alpha: float = ALPHA) -> Fall | None:
    """The first validation at which `truth` has fallen over noise, and `reward`, where given, has risen since the same.

    Look k (the k-th validation after the first) compares itself and the one before it with each of the k - 1 before
    these. Both must have fallen, so that one odd validation raises no alarm; both tests must stay below
    alpha / (k (k - 1)) / (k - 1): over comparisons and looks these levels sum to alpha, however many looks there are.
    Of several validations since which this holds, the one with the largest fall is named.

    Args:
        truth, reward: (V, P) from `score_table`.
        alpha: the share of runs with a false alarm, at most.
    """
    for look in range(2, len(truth)):
        p_values = {base: rise_p_value_of_both(-truth, base, look) for base in range(look - 1)}
        bases = [base for base, p_value in p_values.items() if p_value <= level_at(look, alpha)]
        if reward is not None:
            bases = [base for base in bases if rise_p_value_of_both(reward, base, look) <= RISE]
        if bases:
            deepest = min((changes(truth, base, look).mean(), base) for base in bases)[1]
            return Fall(look, deepest, p_values[deepest])
    return None


def rise_p_value_of_both(table: np.ndarray, base: int, look: int) -> float:
    """That scores rose since `base`: the larger p-value of this look's and the one before's."""
    return max(rise_p_value(changes(table, base, later)) for later in (look - 1, look))


def level_at(look: int, alpha: float = ALPHA) -> float:
    """The level of one comparison at a look (2, 3, …); over a look's comparisons and all looks they sum to alpha."""
    return alpha / (look * (look - 1)) / (look - 1)


def rise_p_value(differences: np.ndarray) -> float:
    """One-sided p-value that paired differences lie above 0: the sign-flip test in its normal approximation.

    Were both validations alike, each difference could as well have the other sign; their sum then has the variance
    Σd², and z = Σd / √Σd². Few prompts, many ties or a single outlier give a small z, so nothing is claimed from them.
    """
    size = math.sqrt(float(np.square(differences).sum()))
    return 1.0 if size == 0 else float(special.ndtr(-differences.sum() / size))


def changes(table: np.ndarray, earlier: int, later: int) -> np.ndarray:
    """Per-prompt differences between two validations, without the prompts that either could not score."""
    difference = table[later] - table[earlier]
    return difference[np.isfinite(difference)]


def interval(differences: np.ndarray) -> Change:
    """Mean over prompts and its Student interval."""
    return Change(**t_interval(differences, CONFIDENCE))


def score_table(validations: Sequence[Mapping], score: str) -> np.ndarray:
    """(V, P): each prompt's score in each validation, NaN where it was not scored or not asked."""
    rows = [dict(_prompt_scores(validation["samples"], score)) for validation in validations]
    prompts = dict.fromkeys(prompt for row in rows for prompt in row)
    return np.array([[_number(row.get(prompt)) for prompt in prompts] for row in rows])


def _prompt_scores(samples: Sequence[Mapping], score: str) -> list[tuple[tuple[str, int], float | None]]:
    """Scores by prompt; a prompt that stands twice has two columns."""
    seen: Counter[str] = Counter()
    found = []
    for sample in samples:
        prompt = sample["user_prompt"]
        value = sample["reward"] if score == "reward" else sample["rewards"].get(score)
        found.append(((prompt, seen[prompt]), value))
        seen[prompt] += 1
    return found


# --- what is followed beside it ---------------------------------------------------------------------------------------


def follow(validations: Sequence[Mapping], metrics: Sequence[Mapping], held_out: str | None) -> pd.DataFrame:
    """The five signals side by side: a row a validation, NaN where one is not measured."""
    rows = [
        {
            "iteration": validation["iteration"],
            "reward": _number(validation["reward"]),
            "held_out": _number(validation["rewards"].get(held_out)),
            "paraphrase": _number(validation.get("paraphrase")),
            "diversity": _number(validation.get("diversity")),
            "kl": _recent_kl(metrics, validation["iteration"]),
        }
        for validation in validations
    ]
    names = ["iteration", "reward", "held_out", "paraphrase", "diversity", "kl"]
    return pd.DataFrame(rows, columns=names)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _recent_kl(metrics: Sequence[Mapping], iteration: int) -> float:
    """The median KL of the last few iterations: one spike is the estimate's own noise."""
    recent = [_number(row.get("kl")) for row in metrics if iteration - RECENT < row["iteration"] <= iteration]
    measured = [value for value in recent if math.isfinite(value)]
    return float(np.median(measured)) if measured else math.nan


def find_cautions(validations: Sequence[Mapping], signals: pd.DataFrame, held_out: str | None) -> list[Caution]:
    """Each kind of caution once, where it first appears."""
    declines = [] if held_out is None else [_decline(validations, held_out)]
    cautions = [*declines, _wording(validations), _alike(signals), _far(signals)]
    return [caution for caution in cautions if caution is not None]


def _decline(validations: Sequence[Mapping], held_out: str) -> Caution | None:
    """The held-out score falls over noise, whatever the reward does."""
    truth = score_table(validations, held_out)
    found = first_fall(truth)
    if found is None:
        return None
    fall, since = interval(changes(truth, found.base, found.look)), validations[found.base]["iteration"]
    text = f"{held_out} fell by {-fall} since iteration {since}: training takes away what is not rewarded"
    return Caution(validations[found.look]["iteration"], "decline", text)


def _wording(validations: Sequence[Mapping]) -> Caution | None:
    """The reward rises on the prompts as they are and falls on the same requests in other words."""
    if not all(validation.get("paraphrases") for validation in validations):
        return None
    reworded = score_table([validation["paraphrases"] for validation in validations], "reward")
    found = first_fall(reworded, score_table(validations, "reward"))
    if found is None:
        return None
    fall, since = interval(changes(reworded, found.base, found.look)), validations[found.base]["iteration"]
    text = f"on reworded prompts the reward fell by {-fall} since iteration {since}: the policy learns wordings"
    return Caution(validations[found.look]["iteration"], "paraphrase", text)


def _alike(signals: pd.DataFrame) -> Caution | None:
    """The rewrites converge to one suffix, or to one rewrite."""
    few = signals[signals["diversity"] < ALIKE]
    if few.empty:
        return None
    text = (
        f"the rewrites' diversity is {few['diversity'].iloc[0]:.2f}: whatever the user asks, they nearly say the same"
    )
    return Caution(int(few["iteration"].iloc[0]), "alike", text)


def _far(signals: pd.DataFrame) -> Caution | None:
    """The policy has left the initial one: the KL exploded."""
    far = signals[signals["kl"] > FAR]
    if far.empty:
        return None
    text = (
        f"the KL from the initial policy is {far['kl'].iloc[0]:.2f} nats a token (over {FAR:g}): raise beta, or lower "
        "the learning rate"
    )
    return Caution(int(far["iteration"].iloc[0]), "far", text)
