"""Which media a reward takes: its attribute `media` says so, and what does not fit is refused before anything is drawn.

    my_reward.media = ("video",)

A reward that says nothing takes pictures. One of words alone takes all of them.
"""

from grpo_kit.config import shown
from grpo_kit.config.media import KINDS
from grpo_kit.rewards.protocol import Reward, RewardContractError, RewardError

ALL = tuple(KINDS)


class MediumError(RewardContractError):
    """A medium that a reward does not take, or not in this form; no setting lets a run go on without its numbers."""


def media_of(reward: Reward) -> tuple[str, ...]:
    """The media that a reward takes: what its attribute `media` says, or that of what it wraps; else pictures.

    Raises:
        RewardError: it says something else than names of media.
    """
    while (said := getattr(reward, "media", None)) is None:
        inside = getattr(reward, "__wrapped__", getattr(reward, "func", None))  # of functools: wraps, partial
        if inside is None:
            return ("image",)
        reward = inside
    kinds = (said,) if isinstance(said, str) else said
    if not isinstance(kinds, tuple | list | set | frozenset) or not kinds or set(map(str, kinds)) - set(ALL):
        raise RewardError(f"media: found {shown(said)}, allowed: a tuple of {', '.join(ALL)}. Correct the attribute")
    return tuple(kinds)


def require_medium(name: str, reward: Reward, kind: str) -> None:
    """Refuse a reward that does not take what the generator gives: `MediumError`."""
    try:
        taken = media_of(reward)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from None
    if kind not in taken:
        raise MediumError(
            f"reward {name!r}: found a generator of {kind}, allowed: {', '.join(taken)}. Name a reward that takes "
            f'{kind} (docs/rewards.md), or set the attribute media = ("{kind}",) of your own where it does'
        )
