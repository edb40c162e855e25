"""How the rewards of an episode's turns are shared among what was written in each of them."""

from typing import Literal

import torch

Credit = Literal["final", "difference", "peak"]


def turn_credits(rewards: torch.Tensor, credit: Credit = "final") -> torch.Tensor:
    """(E, T) what each turn is given, of the rewards (E, T) of the pictures that E episodes showed after T turns.

    * "final": every turn gets the reward of the last picture, as outcome-level GRPO does.
    * "difference": each turn gets what it changed; the sum over turns is the last reward. Turn-level credit as in
      MT-GRPO (arXiv 2505.11821).
    * "peak": each turn gets what it adds to the best so far, less what it loses of it (after PRE-GRPO, arXiv
      2605.17969). With two turns this is "difference".

    A turn whose picture could not be scored is NaN; so is what is compared with it.
    """
    if credit == "final":
        return rewards[:, -1:].expand_as(rewards).clone()
    first, before = rewards[:, :1], rewards[:, :-1]
    if credit == "peak":
        before = before.cummax(dim=1).values
    return torch.cat([first, rewards[:, 1:] - before], dim=1)
