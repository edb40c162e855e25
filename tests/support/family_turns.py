"""Conversations for the policies of every family, and what transformers itself makes of them.

The reference is the family's own processor on the whole list of messages, and one forward pass of its model over the
conversation and the completion. Versions that are broken on purpose are functions of the conversations, or of the
prefix that completions stand behind.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from PIL import Image

from grpo_kit.config import Config, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import Conversation, Turn, shown
from grpo_kit.models.policy import Completions, Policy
from grpo_kit.models.prompt_format import EncodedPrompts
from grpo_kit.models.rows import evaluating
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes
from support.families import FAMILIES, Family

SIZES = [(32, 32), (64, 32), (64, 64), (40, 72)]  # cut into different numbers of parts where a family cuts pictures
PICTURES = [render(scene).resize(size) for scene, size in zip(random_scenes(4, 0), SIZES, strict=True)]
WRONG = "Wrong: colour."
ASKED = [  # rows with 0, 1, 2 and 3 pictures, and with 0, 1 and 2 earlier turns
    Conversation("a red circle"),
    Conversation("three tiny golden pyramids, at night", (), (Turn("golden pyramids, sharp", PICTURES[1], WRONG),)),
    Conversation("the same, but rosy", (PICTURES[0],), (Turn("a rosy box above", PICTURES[2], WRONG),)),
    Conversation("the same", (PICTURES[3],), (Turn("circle", PICTURES[1]), Turn("two circles", PICTURES[0], WRONG))),
    Conversation("a plus", (), (Turn("a", PICTURES[2], WRONG), Turn("a plus at night", PICTURES[3], WRONG))),
    Conversation("a box", (), (Turn("box", None),)),  # it came out unusable
]
GROUPS = torch.arange(len(ASKED)).repeat_interleave(2)
EXACT = 1e-6  # in double precision, in which models still normalise in float32
NOTICED = 1e-4
TEMPERATURE = 0.8
SYSTEM = "You write prompts for pictures."
INSTRUCTION, LOOK = "Rewrite this request: ", "Look. Rewrite: "
LORA = {"r": 2, "alpha": 4, "dropout": 0.1}
NAMES = {family.name: family for family in FAMILIES}
SEEING = [family.name for family in FAMILIES if family.sees]


@dataclasses.dataclass(frozen=True)
class Case:
    """A family's policy in double precision and training mode, with dropout, and two answers to each conversation."""

    family: Family
    policy: Policy
    asked: list[Conversation]
    seed: int  # of the answers: one where no token of pictures was written, which transformers would look for
    found: Completions

    def own(self) -> "Case":
        """With a policy that may be changed."""
        return dataclasses.replace(self, policy=copy.deepcopy(self.policy))

    def score(self, asked: list[Conversation] | EncodedPrompts | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self.policy.score(asked or self.asked, GROUPS, self.found.ids, self.found.mask).logprobs


def settings(kit: Experiment, folder: Path, family: Family, **changed: object) -> Config:
    asked = {"instruction": f"{INSTRUCTION}{{prompt}}", "look_instruction": f"{LOOK}{{prompt}}", "lora": LORA}
    asked |= {"vlm_model": str(folder), "system_prompt": SYSTEM if family.system else "", "dtype": "float32"}
    overrides = {f"model_settings.{key}": value for key, value in (asked | changed).items()}
    return load_config(kit.config, overrides | {"generation_settings.max_new_tokens": 10})


def picture_tokens(policy: Policy) -> set[int]:
    """The ids that stand for pictures and videos, by whichever name a config has them."""
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    found = (getattr(policy.model.config, name, None) for name in names)
    return {token for token in found if token is not None}


def messages(one: Conversation, family: Family) -> list[dict]:
    def message(role: str, text: str, *pictures: Image.Image | None) -> dict:
        parts = [{"type": "image", "image": picture} for picture in pictures if picture is not None]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}] if family.sees else text}

    found = [message("system", SYSTEM)] if family.system else []
    found.append(message("user", f"{INSTRUCTION}{one.prompt}", *one.images))
    for turn in one.turns:
        found.append(message("assistant", turn.rewrite))
        found.append(message("user", f"{turn.words} {LOOK}{one.prompt}".strip(), turn.image))
    return found


def what_is_read(case: Case, one: Conversation) -> dict[str, torch.Tensor]:
    """The model's inputs of one conversation, by its processor alone."""
    processor = case.policy.processor
    if not case.policy.chats:
        text = "\n".join(message["content"] for message in messages(one, case.family))
        return dict(processor(text, return_tensors="pt"))
    options = {"enable_thinking": False} if case.family.name == "Qwen3" else {}
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages(one, case.family), **asked, **options))


def plain_logprobs(case: Case, row: int, *, whole: bool = False) -> torch.Tensor:
    """A row's log-probabilities by one pass of transformers over it alone: unpadded, no positions given.

    Args:
        whole: those of what stands before the completion, too, words and pictures.
    """
    inputs, ids = what_is_read(case, case.asked[GROUPS[row]]), case.found.ids[row][case.found.mask[row]]
    inputs.pop("token_type_ids", None)
    start = inputs["input_ids"].shape[1]
    for name, added in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", 0 * ids)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], added[None]], dim=1)
    with evaluating(case.policy.model):
        logits = case.policy.model(**inputs, use_cache=False).logits[0, :-1]
    logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
    return logprobs if whole else logprobs[start - 1 :]


# --- broken versions ----------------------------------------------------------------------------------------------


def without_its_pictures(asked: list[Conversation]) -> list[Conversation]:
    return shown(asked, "nothing")


def grey_ones(asked: list[Conversation]) -> list[Conversation]:
    return shown(asked, "grey")


def without_what_it_wrote(asked: list[Conversation]) -> list[Conversation]:
    return [dataclasses.replace(one, turns=()) for one in asked]


def pictures_in_reverse_order(asked: list[Conversation]) -> list[Conversation]:
    return [_with_pictures(one, one.pictures[::-1]) for one in asked]


def pictures_of_other_rows(asked: list[Conversation]) -> list[Conversation]:
    """All pictures of the batch, moved on by one."""
    flat = [picture for one in asked for picture in one.pictures]
    left = iter([*flat[1:], flat[0]])
    return [_with_pictures(one, [next(left) for _ in one.pictures]) for one in asked]


def _with_pictures(one: Conversation, pictures: list[Image.Image]) -> Conversation:
    left = iter(pictures)
    images = tuple(next(left) for _ in one.images)
    turns = (dataclasses.replace(turn, image=None if turn.image is None else next(left)) for turn in one.turns)
    return Conversation(one.prompt, images, tuple(turns))


def attending_to_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, mask=torch.ones_like(prefix.mask))


def counting_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, next_position=torch.full_like(prefix.next_position, prefix.mask.shape[1]))


def counting_picture_tokens(prefix: object) -> object:
    """As if pictures had moved no positions."""
    return dataclasses.replace(prefix, next_position=prefix.mask.sum(dim=1))


def moved_as_the_first_row(prefix: object) -> object:
    """As if every row's pictures had moved its positions as far as the first row's."""
    moved = prefix.next_position - prefix.mask.sum(dim=1)
    return dataclasses.replace(prefix, next_position=prefix.mask.sum(dim=1) + moved[0])
