"""What correct group advantages do (T3 to T5, T16), asked of an advantage function or of a loss that takes rewards."""

import itertools
import math

import torch

from grpo_kit.config import one_line
from grpo_kit.preflight.loss_checks.cases import ROUNDING, exactly, off, percent, unlike_groups, within
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject


def groups_do_not_leak(subject: Subject) -> str:
    """T3: another prompt's rewards leave a prompt's advantages as they are; a deviation shared by all is a choice."""
    rewards, ids = unlike_groups(0)
    changed = rewards.where(ids != 1, rewards * 7 - 3)
    most = 0.0
    for settings in _scalings(subject):
        before, after = (subject.weigh(given, ids, **settings)[ids != 1] for given in (rewards, changed))
        moved, factor = off(after, before), float((before * after).sum() / before.square().sum())
        if moved > ROUNDING and not settings and factor > 0 and off(after, factor * before) <= ROUNDING:
            return f"only the scale that all groups share moves ({factor:.2g} ×: a batch's deviation, a choice)"
        why = "" if subject.knows_groups else " (takes no group_ids: right only for one prompt a call)"
        assert moved <= ROUNDING, f"another prompt's rewards move advantages by {percent(moved)}{within(settings)}{why}"
        most = max(most, moved)
    return f"another prompt's rewards change nothing{exactly(most)}"


def order_does_not_matter(subject: Subject) -> str:
    """T4: permuted rows have permuted advantages."""
    rewards, ids = _groups(subject, 1)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    plain, permuted = subject.weigh(rewards, ids), subject.weigh(rewards[order], ids[order])
    moved = off(permuted, plain[order])
    assert moved <= ROUNDING, f"another order of the rows changes advantages by {percent(moved)}"
    return "another order of the rows permutes the advantages"


def equal_rewards_give_exactly_zero(subject: Subject) -> str:
    """T4: where all answers are as good there is nothing to learn, and no rounding error to blow up either."""
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype, size in itertools.product((torch.float32, torch.float64), (2, 3, 7, 11)):
        same, ids = values.to(dtype).repeat_interleave(size), torch.arange(len(values)).repeat_interleave(size)
        calls = [(same, ids)] if subject.knows_groups else zip(same.split(size), ids.split(size), strict=True)
        for rewards, groups in calls:
            found.append((float(subject.weigh(rewards, groups).abs().max()), str(dtype).removeprefix("torch.")))
            assert math.isfinite(found[-1][0]), f"equal rewards give {found[-1][0]}"
    largest, dtype = max(found)
    assert largest == 0, f"equal rewards give up to {largest:.1e} ({dtype} rounding), not 0"
    return "equal rewards give exactly 0"


def scaling_is_the_stated_one(subject: Subject) -> str:
    """T5: a shift of the rewards changes nothing; a factor either nothing (scaled by deviation) or just that factor."""
    rewards, ids = _groups(subject, 2)
    settings = _scalings(subject)
    scaled = [_is_scaled(subject, 100 * rewards, ids, given) for given in settings]  # far above any eps
    if settings[0]:
        kinds = ["scaled" if each else "plain" for each in scaled]
        assert scaled == [True, False], f"scale_rewards 'group' is {kinds[0]}, 'none' is {kinds[1]}"
    if not scaled[0]:
        return "not scaled: a factor on the rewards is one on the advantages (a choice)"
    one_group = torch.zeros(2, dtype=torch.int64)
    pair = [subject.weigh(torch.tensor([0.0, gap]).double(), one_group, **settings[0]) for gap in (100.0, 4000.0)]
    moved = off(pair[0], pair[1])
    assert moved <= 2e-3, f"a pair's advantages change by {percent(moved)} with its gap"
    floor = ", or set noise_floor" if "noise_floor" in subject.advantages_take else ""
    size = " the same" if subject.advantages is None else f" ±{float(pair[1][1]):.3f}"
    return f"scaled by deviation: a pair gets{size} for any gap; show the raw spread beside it{floor}"


def unscored_rows_change_nothing(subject: Subject) -> str:
    """T16: a NaN reward gets no weight and leaves the statistics; so does a group of nothing else."""
    rewards, ids = _groups(subject, 3)
    rewards[[0, 7, 8, 14]] = torch.nan
    if subject.knows_groups:
        rewards[ids == 3] = torch.nan
    scored = ~rewards.isnan()
    try:
        expected = subject.weigh(rewards[scored], ids[scored])
    except Exception as error:
        raise NotAsked("takes groups of one size only: a failed sample cannot be left out to compare") from error
    try:
        found = subject.weigh(rewards, ids)
    except (ValueError, RuntimeError) as error:
        return f"refuses NaN rewards: {one_line(error, 60)}"
    lost, failed = int(found[scored].isnan().sum()), int((~scored).sum())
    assert not lost, f"{failed} failed samples make {lost} of {int(scored.sum())} scored ones NaN"
    assert not found[~scored].any(), f"failed samples get advantages up to {float(found[~scored].abs().max()):.2g}"
    factor = float((found[scored] / expected)[expected != 0].median()) if subject.advantages is None else 1.0
    moved = off(found[scored], factor * expected)
    assert moved <= ROUNDING, f"failed samples move the others' advantages by {percent(moved)}"
    return "failed samples get 0 and leave the statistics"


def _is_scaled(subject: Subject, rewards: torch.Tensor, ids: torch.Tensor, settings: dict[str, object]) -> bool:
    """A factor on the rewards is none on the advantages."""
    plain, changed = (subject.weigh(given, ids, **settings) for given in (rewards, 3 * rewards - 5))
    if off(changed, 3 * plain) <= ROUNDING:
        return False
    moved = off(changed, plain)
    assert moved <= 1e-2, f"rewards 3 r - 5 change advantages by {percent(moved)}{within(settings)}"
    return True


def _scalings(subject: Subject) -> list[dict[str, object]]:
    """The scalings that keep groups apart; "batch" shares one deviation by design."""
    offered = "scale_rewards" in subject.advantages_take
    return [{"scale_rewards": name} for name in ("group", "none")] if offered else [{}]


def _groups(subject: Subject, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Several groups, or one where the subject takes no groups."""
    subject.need_rewards()
    return unlike_groups(seed) if subject.knows_groups else unlike_groups(seed, groups=1, size=20)
