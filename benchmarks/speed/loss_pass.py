"""One loss, forward and backward, on the same tokens: the kit's shared prefix, TRL's, and plain full logits.

The plain way runs the model over prompt and completion of every row and keeps all logits, as most tutorials do. Kit and
TRL also compute the entropy that they log; the plain way does not.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed import measure, text_policy
from benchmarks.speed.equality import GRADIENTS, gradient_of
from benchmarks.speed.policy_iteration import configured, make_text_peer
from benchmarks.speed.results import Figure, Gate, Result, Settings, require
from benchmarks.speed.text_policy import Shape
from grpo_kit.grpo import grpo_loss

PROMPT_TOKENS = (64, 256)
SIDES = ("kit", "trl", "full logits")


@dataclass(frozen=True)
class Side:
    """A model and its loss on fixed tokens."""

    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]

    def run(self) -> None:
        """Forward and backward; the gradients stay on the model until the next call."""
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()


def loss_pass(settings: Settings) -> Result:
    """Seconds and growth of memory of the loss pass, two prompt lengths."""
    cases, gates, figures = [], [], []
    for length in PROMPT_TOKENS[:1] if settings.quick else PROMPT_TOKENS:
        shape = Shape(prompt_tokens=length)
        timings, passed = compare(shape, settings.pairs)
        growth = {name: measure.in_fresh_process(memory_growth, name, shape) for name in SIDES}
        cases.append({"case": f"prompt {length}", "raw": measure.raw(timings), "memory_growth_mb": growth})
        gates += passed
        figures += _figures(length, timings, growth)
    return Result("W3", "loss forward + backward, vocabulary 4096", figures, cases, gates)


def _figures(length: int, timings: measure.Timings, growth: Mapping[str, float]) -> list[Figure]:
    figures = []
    for name, time_goals, memory_goals in (("trl", (3.5, 5.0), (3.0, 4.0)), ("full logits", (), ())):
        title = f"{'TRL' if name == 'trl' else name} / kit, prompt {length}"
        figures.append(measure.ratio_figure(f"{title}, time", timings[name], timings["kit"], *time_goals))
        share = growth[name] / growth["kit"]
        figures.append(Figure(f"{title}, growth of memory", share, None, None, *memory_goals))
    return figures


def compare(shape: Shape, rounds: int) -> tuple[measure.Timings, list[Gate]]:
    """All sides' seconds on the same tokens, once their gradients agree."""
    sides = {name: make_side(name, shape) for name in SIDES}
    gradients = {}
    for name, side in sides.items():
        side.run()
        gradients[name] = gradient_of(side.model.parameters())
    gates = [
        Gate(
            f"prompt {shape.prompt_tokens}: gradient of kit and {name}, relative",
            float((gradients["kit"] - gradients[name]).norm() / gradients[name].norm()),
            GRADIENTS,
        )
        for name in SIDES[1:]
    ]
    require(gates)
    return measure.alternate({name: lambda _, side=side: side.run() for name, side in sides.items()}, rounds), gates


def memory_growth(name: str, shape: Shape) -> float:
    """By how much one loss pass raises the memory held, in MB; a small pass before it pays for what is made once."""
    make_side(name, Shape(prompts=1, group=2, prompt_tokens=4, completion_tokens=2)).run()
    side = make_side(name, shape)
    return measure.peak_growth_mb(side.run)


def make_side(name: str, shape: Shape) -> Side:
    """One of the three ways on random completions with random advantages, the same for all."""
    source = torch.Generator().manual_seed(1)
    rows = shape.prompts * shape.group
    ids = torch.randint(1, text_policy.VOCABULARY, (rows, shape.completion_tokens), generator=source)
    advantages = torch.randn(rows, generator=source)
    make = {"kit": _kit, "trl": _trl, "full logits": _full_logits}[name]
    with tempfile.TemporaryDirectory() as place:
        return make(text_policy.build(Path(place)), shape, ids, advantages)


def _kit(folder: Path, shape: Shape, ids: torch.Tensor, advantages: torch.Tensor) -> Side:
    policy = text_policy.load_policy(folder, shape, reference=False)
    prompts, mask = text_policy.prompts(shape), torch.ones_like(ids, dtype=torch.bool)
    groups = torch.arange(shape.prompts).repeat_interleave(shape.group)

    def loss() -> torch.Tensor:
        return grpo_loss(policy.score(prompts, groups, ids, mask).logprobs, advantages, mask).loss

    return Side(policy.model, loss)


def _trl(folder: Path, shape: Shape, ids: torch.Tensor, advantages: torch.Tensor) -> Side:
    trainer = make_text_peer(folder, shape, configured(shape, beta=0.0)).trainer
    prompts = torch.tensor(trainer._tokenize_prompts(text_policy.prompts(shape))[0]).repeat_interleave(shape.group, 0)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": advantages,
    }

    def loss() -> torch.Tensor:
        trainer.model.train()
        return trainer._compute_loss(trainer.model, inputs)

    return Side(trainer.model, loss)


def _full_logits(folder: Path, shape: Shape, ids: torch.Tensor, advantages: torch.Tensor) -> Side:
    policy = text_policy.load_policy(folder, shape, reference=False)
    prompts = policy.tokenizer(text_policy.prompts(shape), return_tensors="pt").input_ids
    rows = torch.cat([prompts.repeat_interleave(shape.group, 0), ids], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def loss() -> torch.Tensor:
        logits = policy.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
        logits = logits[:, -ids.shape[1] - 1 : -1]
        logprobs = logits.log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return grpo_loss(logprobs, advantages, mask).loss

    return Side(policy.model, loss)
