"""A request drawn from one latent: its picture, what a policy that sees it writes next, and its scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.writers import Request
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import Conversation, LookAt
from grpo_kit.models.drawing import DrawRequest
from grpo_kit.models.turns import rows_to_draw, with_turn
from grpo_kit.rewards.protocol import ABSTAINED
from grpo_kit.rollout import score

Images = list[Image.Image | None]


@dataclass(frozen=True)
class Cell:
    """One picture of a request."""

    request: Request
    seed: int  # its number among the request's pictures
    latent: int  # the seed that it is drawn from

    def words(self, kit: Experiment) -> str:
        """The request's text as it has to be written for the painter of this latent, where there are painters."""
        return kit.generator.as_read(self.request.text, self.latent)


def cells_of(kit: Experiment, requests: Sequence[Request], count: int) -> list[Cell]:
    """Each request from so many latents, which depend on its prompt and place alone."""
    seed = kit.config.training_settings.seed
    return [
        Cell(one, number, derive_seed(seed, "evaluation", one.prompt.user_prompt, one.prompt_id, number))
        for one in requests
        for number in range(count)
    ]


def request_of(cells: Sequence[Cell], texts: Sequence[str]) -> DrawRequest:
    """The cells with what was written for each, as a rollout asks for pictures."""
    prompts = [cell.request.prompt for cell in cells]
    pictures = {cell.request.prompt_id: cell.request.prompt for cell in cells}  # opened once a prompt
    pictures = {place: prompt.pictures() or None for place, prompt in pictures.items()}
    return DrawRequest(
        [prompt.user_prompt for prompt in prompts],
        list(map(str, texts)),
        torch.tensor([cell.request.prompt_id for cell in cells]),
        torch.tensor([[cell.latent] for cell in cells]),
        [prompt.metadata for prompt in prompts],
        [pictures[cell.request.prompt_id] for cell in cells],
    )


def next_turn(
    cells: Sequence[Cell], asked: Sequence[Conversation], texts: Sequence[str], images: Images, look_at: LookAt
) -> list[Conversation]:
    """The conversations with what was written and the picture that it gave."""
    return with_turn(asked, texts, [[one] for one in images], range(len(cells)), request_of(cells, texts), look_at)


def drawn_again(
    kit: Experiment, cells: Sequence[Cell], answers: Sequence[str], texts: Sequence[str], images: Images
) -> tuple[list[str], Images]:
    """Texts and pictures after one more turn; who keeps the picture, or repeats the text, draws nothing."""
    rows = rows_to_draw(answers, texts)
    drawn = kit.generator.generate_images([answers[row] for row in rows], [cells[row].latent for row in rows])
    new, found = list(texts), list(images)
    for row, image in zip(rows, drawn, strict=True):
        new[row], found[row] = answers[row], image
    return new, found


def scores_of(kit: Experiment, cells: Sequence[Cell], texts: Sequence[str], images: Images) -> list[dict[str, float]]:
    """Each picture's reward and parts, raw; NaN where there is none."""
    parts = score(kit.rewards, request_of(cells, texts), [[image] for image in images])
    columns = {"reward": kit.rewards.total(parts, in_groups=False)}
    columns |= {f"reward/{name}": values.masked_fill(values == ABSTAINED, torch.nan) for name, values in parts.items()}
    columns |= {"gold": columns["reward/gold"]} if "gold" in parts else {}
    return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(cells))]
