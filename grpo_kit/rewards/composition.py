"""Several rewards as one: each part kept raw, their weighted sum, and what training makes of them."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image

from grpo_kit.config.display import Shown
from grpo_kit.config.own_code import origin
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.rewards.media import require_medium
from grpo_kit.rewards.protocol import (
    ABSTAINED,
    COLUMNS,
    CONTEXT,
    Reward,
    RewardContractError,
    RewardError,
    as_column,
    call,
    context_of,
    failed_reward,
    require_callable,
    some_rows,
)
from grpo_kit.rewards.shaping import RunningMoments, Shaping, within_groups

logger = logging.getLogger(__name__)
COMBINATIONS = ("sum_then_normalize", "normalize_then_sum")


@dataclass(frozen=True, repr=False)
class Rewards(Shown):
    """Named rewards with weights, and monitors, which are scored and logged but never rewarded.

    Where a part raises, `on_error` says whether a `RewardError` is raised, or all samples of that call are NaN; the
    first such call of each part is logged. A part that returns something else than N numbers raises in either case,
    unless it has returned them before.

    Raises:
        RewardError: a part without a weight, a name that is used twice, a shaping without a part, a signature that
            cannot take what a reward is given.
    """

    parts: Mapping[str, Reward]  # name → a callable `(images, prompts, enhanced_prompts) -> (N,)`; see `protocol`
    weights: Mapping[str, float]
    monitors: Mapping[str, Reward] = field(default_factory=dict)
    shaping: Mapping[str, Shaping] = field(default_factory=dict)  # of parts, before training weighs them
    combine: str = "sum_then_normalize"  # or "normalize_then_sum": parts within their groups (GDPO, arXiv 2601.05242)
    on_error: str = "raise"  # or "nan"
    failures: Counter[str] = field(default_factory=Counter, compare=False)  # calls in which a part raised
    running: dict[str, RunningMoments] = field(default_factory=dict, compare=False)
    # name → what `load_rewards` made of a config, and how it is recorded
    made_from: Mapping[str, tuple[Reward, dict[str, Any]]] = field(default_factory=dict, compare=False)
    sound: set[str] = field(default_factory=set, compare=False)  # parts that returned what they must

    def __post_init__(self) -> None:
        if self.combine not in COMBINATIONS:
            raise RewardError(f"combine: found {self.combine!r}, allowed: {', '.join(COMBINATIONS)}")
        if self.on_error not in ("raise", "nan"):
            raise RewardError(f"on_error: found {self.on_error!r}, allowed: raise, nan")
        for name, reward in {**self.parts, **self.monitors}.items():
            require_callable(name, reward)
        for name in self.parts:
            if name not in self.weights:
                raise RewardError(f"weights: found {', '.join(self.weights) or 'none'}; the part {name!r} has none")
            if name in self.monitors:
                raise RewardError(f"monitors: found {name!r}, which is a part too; give one of them another name")
        for name, shaping in self.shaping.items():
            if name not in self.parts:
                raise RewardError(f"shaping: found {name!r}, allowed: {', '.join(self.parts)}")
            if shaping.normalize == "running":
                self.running.setdefault(name, RunningMoments())

    def _shown(self) -> dict[str, object]:
        weights = {name: f"{self.weights[name]:+g}" for name in self.parts}
        rest = {"monitors": ", ".join(self.monitors), "combine": self.combine if self.is_shaped else ""}
        rest["failed calls"] = dict(self.failures)
        return weights | {name: value for name, value in rest.items() if value}

    @property
    def is_shaped(self) -> bool:
        """Whether training uses something else than the weighted sum of the raw parts."""
        return self.combine != "sum_then_normalize" or any(kind != Shaping() for kind in self.shaping.values())

    def require_medium(self, kind: str) -> None:
        """Refuse, before anything is drawn, parts and monitors that do not take a generator's media: `MediumError`."""
        for name, reward in {**self.parts, **self.monitors}.items():
            require_medium(name, reward, kind)

    @quiet_libraries()
    def score(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str],
        *,
        group_ids: torch.Tensor | None = None,
        image_seeds: torch.Tensor | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        references: Sequence[Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Each part and monitor, raw: {name: (N,) float64}.

        NaN where there is no image or the part could not score, infinity (`ABSTAINED`) where it answered None. What is
        given by keyword, N values each, is for rewards that ask for it; see `protocol`.
        """
        drawn = [i for i, image in enumerate(images) if image is not None]
        numbers = (None if values is None else torch.as_tensor(values).cpu() for values in (group_ids, image_seeds))
        context = (*numbers, metadata or [{}] * len(images), references or [None] * len(images))
        columns = zip((*COLUMNS, *CONTEXT), (images, prompts, enhanced_prompts, *context), strict=True)
        batch = {name: some_rows(values, drawn) for name, values in columns}
        scores = {}
        for name, reward in {**self.parts, **self.monitors}.items():
            scores[name] = torch.full((len(images),), torch.nan, dtype=torch.float64)
            if drawn:
                scores[name][drawn] = self._column(name, reward, batch)
        return scores

    def _column(self, name: str, reward: Reward, batch: Mapping[str, Any]) -> torch.Tensor:
        count = len(batch["images"])
        try:
            column = as_column(call(reward, batch), count)
            self.sound.add(name)
            return column
        except Exception as error:  # whatever a user's function raises; an interrupt passes through
            problem = failed_reward(name, error)
            breaks_contract = isinstance(error, RewardContractError) and name not in self.sound
            if self.on_error == "raise" or breaks_contract:
                raise problem from error
            self.failures[name] += 1
            if self.failures[name] == 1:
                logger.warning("%s. Its %d samples have no reward; later failures are counted", problem, count)
            return torch.full((count,), torch.nan, dtype=torch.float64)

    def total(self, scores: Mapping[str, torch.Tensor], *, in_groups: bool = True) -> torch.Tensor:
        """(N,) weighted sum of the raw parts, for people and evaluation; NaN where any part is NaN, or all abstained.

        A part that abstained adds nothing to a row, as in TRL.

        Args:
            in_groups: whether the rows are groups of rewrites. Where they are not, as in an evaluation, the parts that
                compare a group (they ask for `group_ids`) are left out.

        Raises:
            RewardError: no part is left.
        """
        kept = [name for name, reward in self.parts.items() if in_groups or "group_ids" not in context_of(reward)]
        if not kept:
            raise RewardError(
                f"reward_settings.weights: found {', '.join(self.parts)} alone, which compares the rewrites of a "
                "group; evaluation has one rewrite a prompt. Weigh a reward beside it that scores an image by itself"
            )
        total = sum(self.weights[name] * scores[name].where(scores[name] != ABSTAINED, 0.0) for name in kept)
        return total.masked_fill(_where_all_abstained(scores, kept), torch.nan)

    def combined(self, scores: Mapping[str, torch.Tensor], group_ids: torch.Tensor) -> torch.Tensor:
        """(N,) what training uses: the parts shaped, then weighted and summed; NaN where any part is NaN.

        A sample with a NaN is left out of the statistics of all parts. Without shaping this is `total`, bit for bit.
        Where a part abstained from some rows of a group, its mean over the others stands in for it, so that it neither
        lifts nor lowers them: their advantage is that of the parts that answered.
        Running statistics are updated with these scores first, so call it once for each rollout.
        """
        abstained = {name: scores[name] == ABSTAINED for name in self.parts}
        if not self.is_shaped and not any(rows.any() for rows in abstained.values()):
            return self.total(scores)
        unscored = torch.stack([scores[name].isnan() for name in self.parts]).any(dim=0)
        kept = {name: scores[name].masked_fill(unscored | abstained[name], torch.nan) for name in self.parts}
        if self.is_shaped:
            kept = {name: self._shaped(name, values, group_ids) for name, values in kept.items()}
        for name, rows in abstained.items():
            for group in group_ids[rows].unique():
                own = group_ids == group
                kept[name][own & rows] = kept[name][own].nanmean().nan_to_num(0.0)
        nothing = unscored | _where_all_abstained(scores, self.parts)
        return self.total(kept).masked_fill(nothing, torch.nan)

    def _shaped(self, name: str, values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        shaping = self.shaping.get(name, Shaping())
        values = shaping.bounded(values)
        if shaping.normalize == "running":
            self.running[name].update(values)
            values = self.running[name].normalized(values)
        if shaping.normalize == "group" or self.combine == "normalize_then_sum":
            values = within_groups(values, group_ids)
        return values

    def record(self) -> dict[str, dict[str, Any]]:
        """What decides these rewards, as a run writes it down: name → weight (None of a monitor), where it comes from.

        One of a config has its name there as `reward`; a function of the user's own its name, its file and sha256.
        """
        found = {}
        for name, reward in {**self.parts, **self.monitors}.items():
            made, entry = self.made_from.get(name, (None, {}))
            passed = origin(reward) if made is not reward else {}
            if passed and self.is_shaped:  # of what a config names, these are settings
                passed |= {"combine": self.combine, "shaping": asdict(self.shaping.get(name, Shaping()))}
            found[name] = {"weight": self.weights.get(name) if name in self.parts else None, **(passed or entry)}
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running statistics: name of a part → (3,) float64, for the parts that are normalised so."""
        return {name: self.running[name].state() for name in self._normalized_by_running()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `state_dict` gave; a part that it does not name starts afresh, so `{}` resets all.

        Raises:
            RewardError: it names a part that has no running statistics.
        """
        known = self._normalized_by_running()
        if unknown := [name for name in state if name not in known]:
            allowed = ", ".join(known) or "none"
            raise RewardError(f"running statistics: found {unknown[0]!r}, allowed: {allowed}. Load these rewards' own")
        for name in known:
            self.running[name].load(state.get(name, RunningMoments().state()))

    def _normalized_by_running(self) -> list[str]:
        return [name for name, shaping in self.shaping.items() if shaping.normalize == "running"]

    def __call__(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str] | None = None,
        **context: torch.Tensor | None,
    ) -> torch.Tensor:
        """(N,) totals of images drawn for users' prompts; `context` is what `score` takes by keyword."""
        rewrites = prompts if enhanced_prompts is None else enhanced_prompts
        return self.total(self.score(images, prompts, rewrites, **context))

    def calculate_reward(self, image: Image.Image, prompt: str, enhanced_prompt: str | None = None) -> float:
        """The total of one image for one user's prompt."""
        return float(self([image], [prompt], None if enhanced_prompt is None else [enhanced_prompt])[0])


def _where_all_abstained(scores: Mapping[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    return torch.stack([scores[name] == ABSTAINED for name in names]).all(dim=0)
