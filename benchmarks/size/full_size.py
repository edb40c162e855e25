"""One iteration of the full profile with random weights: seconds, memory, images a second, and what the kit adds.

    python -m benchmarks.size.full_size                          # without a GPU: parameters and FLOPs per part
    python -m benchmarks.size.full_size --device cuda:0
    python -m benchmarks.size.full_size --device cpu --scale tiny   # the real form, small, on any machine

Each part is done by the kit and by the libraries' own calls (`bare`), which take turns. Both score the same completions
to the same log-probabilities; else no time is told. Gradients are computed a group at a time, as the profile does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from PIL import Image

from benchmarks.size import full_size_flops
from benchmarks.size.architectures import SIZES, Size, build_clip, build_generator, build_policy
from benchmarks.speed import bare, measure, text_policy
from benchmarks.speed.results import BenchmarkError, Figure, Gate, Result, Settings, require, write
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Completions, Policy
from grpo_kit.rewards.clip import ClipSimilarity

PARTS = ("sampling", "images", "reward", "scoring pass", "backward")
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of a log-probability
Round = Callable[[int], object]


@dataclass
class Iteration:
    """The models, one iteration's texts, completions and pictures, and an optimizer on the adapter."""

    size: Size
    policy: Policy
    generator: Generator
    clip: ClipSimilarity
    prompts: list[str]
    completions: Completions
    pictures: list[Image.Image]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, size: Size, device: str, dtype: torch.dtype) -> "Iteration":
        """Built on a device, with completions sampled there; the pictures are of noise (an untrained decoder's)."""
        policy, prompts = build_policy(size, device, dtype), text_policy.prompts(size.shape)
        completions = policy.sample(prompts, size.shape.group, seed=0)
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (size.rows, size.pixels, size.pixels, 3), generator=noise, dtype=torch.uint8)
        return cls(
            size,
            policy,
            build_generator(size, device, dtype),
            build_clip(size, device),
            prompts,
            completions,
            [Image.fromarray(picture.numpy()) for picture in pixels],
            torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5),
        )

    def asked(self) -> list[str]:
        """The user's prompt of each row."""
        return [prompt for prompt in self.prompts for _ in range(self.size.shape.group)]

    def texts(self, number: int) -> list[str]:
        """Rewrites that no round before has drawn, so that kept embeddings spare no side anything."""
        return [f"w{abs(number) + 1} {row} {text}" for row, text in enumerate(self.completions.texts)]

    def groups(self) -> list[slice]:
        """The rows of each prompt."""
        G = self.size.shape.group
        return [slice(p * G, (p + 1) * G) for p in range(self.size.shape.prompts)]

    def rows(self, group: int, rows: slice) -> torch.Tensor:
        """(G, L + T) ids of a group's prompt and completions."""
        prompt = self.policy.encode([self.prompts[group]]).inputs["input_ids"]
        ids = self.completions.ids[rows]
        return torch.cat([prompt.expand(len(ids), -1), ids], dim=1)


# --- the two sides ----------------------------------------------------------------------------------------------------


def by_kit(it: Iteration) -> dict[str, Round]:
    """Each part as the kit does it."""

    def reward(number: int) -> object:
        it.clip._batches = ()
        it.clip._texts.clear()  # a new iteration's prompts are not kept yet
        return it.clip(it.pictures, it.asked(), it.asked())

    return {
        "sampling": lambda number: it.policy.sample(it.prompts, it.size.shape.group, seed=number + 1),
        "images": lambda number: it.generator.generate_images(it.texts(number), range(it.size.rows)),
        "reward": reward,
        "scoring pass": lambda number: _scored(it, partial(_kit_logprobs, it)),
        "backward": lambda number: _learnt(it, partial(_kit_logprobs, it)),
    }


def by_hand(it: Iteration) -> dict[str, Round]:
    """Each part by the libraries' own calls."""
    shape, model = it.size.shape, it.policy.model
    return {
        "sampling": lambda number: bare.sample(
            model, it.policy.encode(it.prompts).on(it.policy.device), shape.group, shape.completion_tokens
        ),
        "images": lambda number: bare.draw(it.generator.pipeline, it.texts(number), it.size),
        "reward": lambda number: bare.similarity(it.clip, it.pictures, it.asked()),
        "scoring pass": lambda number: _scored(it, partial(_bare_logprobs, it)),
        "backward": lambda number: _learnt(it, partial(_bare_logprobs, it)),
    }


def _kit_logprobs(it: Iteration, group: int, rows: slice) -> torch.Tensor:
    found, here = it.completions, torch.zeros(it.size.shape.group, dtype=torch.int64)
    return it.policy.score([it.prompts[group]], here, found.ids[rows], found.mask[rows]).logprobs


def _bare_logprobs(it: Iteration, group: int, rows: slice) -> torch.Tensor:
    return bare.logprobs(it.policy.model, it.rows(group, rows), it.size.shape.completion_tokens)


@torch.no_grad()
def _scored(it: Iteration, logprobs: Callable[[int, slice], torch.Tensor]) -> torch.Tensor:
    return torch.cat([logprobs(group, rows) for group, rows in enumerate(it.groups())])


def _learnt(it: Iteration, logprobs: Callable[[int, slice], torch.Tensor]) -> None:
    """Gradients of a mean over all tokens, a group at a time."""
    it.optimizer.zero_grad()
    for group, rows in enumerate(it.groups()):
        (-logprobs(group, rows).sum() / it.completions.ids.numel()).backward()


# --- measuring --------------------------------------------------------------------------------------------------------


def agree(it: Iteration) -> list[Gate]:
    """Both sides give the same log-probabilities, which are those of the sampling too."""
    by_both = [_scored(it, partial(logprobs, it)) for logprobs in (_kit_logprobs, _bare_logprobs)]
    limit = CLOSE[it.policy.model.dtype]
    shape = it.size.shape
    return require(
        [
            Gate("log-probabilities, kit and bare", float((by_both[0] - by_both[1]).abs().max()), limit),
            Gate(
                "log-probabilities, sampled and bare", float((it.completions.logprobs - by_both[1]).abs().max()), limit
            ),
            Gate("completion tokens", abs(it.completions.ids.numel() - it.size.rows * shape.completion_tokens), 0),
        ]
    )


def measured(it: Iteration, rounds: int) -> tuple[list[Figure], list[dict]]:
    """Seconds of every part on both sides, what the kit adds, and the peak of memory."""
    device = it.policy.device
    kit, hand = by_kit(it), by_hand(it)
    timings = {
        part: measure.alternate(
            {"kit": _finished(kit[part], device), "bare": _finished(hand[part], device)}, rounds, label=part
        )
        for part in PARTS
    }
    step = _finished(lambda number: it.optimizer.step(), device)
    steps = measure.alternate({"kit": step}, rounds, label="optimizer step")["kit"]
    figures = [_seconds(part, timings[part]["kit"]) for part in PARTS] + [_seconds("optimizer step", steps)]
    speed = measure.median([it.size.rows / seconds.wall for seconds in timings["images"]["kit"]])
    figures.append(Figure("images a second", *vars(speed).values(), unit="/s"))
    whole = {
        side: [measure.Seconds(sum(s.cpu for s in row), sum(s.wall for s in row)) for row in zip(*found, strict=True)]
        for side in ("kit", "bare")
        for found in [[timings[part][side] for part in PARTS]]
    }
    for name, sides in [*timings.items(), ("all parts", whole)]:
        found = measure.median(measure.paired_ratios(sides["kit"], sides["bare"], "wall"))
        figures.append(Figure(f"kit / bare, {name}", *vars(found).values(), more_is_better=False))
    figures += [_peak(part, kit[part], device) for part in PARTS]
    return figures, [{"case": part, "raw": measure.raw(found)} for part, found in timings.items()]


def _finished(work: Round, device: torch.device) -> Round:
    """The same, with all of the device's work done when it returns."""

    def run(number: int) -> None:
        work(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _seconds(part: str, found: list[measure.Seconds]) -> Figure:
    interval = measure.median([seconds.wall for seconds in found])
    return Figure(f"seconds, {part}", *vars(interval).values(), more_is_better=False, unit=" s")


def _peak(part: str, work: Round, device: torch.device) -> Figure:
    """The most memory held: on a GPU by all tensors together, on a CPU beyond what was held before the part."""
    if device.type != "cuda":
        grown = measure.peak_growth_mb(partial(work, 0))
        return Figure(f"memory beyond the models', {part}", grown, more_is_better=False, unit=" MB")
    torch.cuda.reset_peak_memory_stats(device)
    _finished(work, device)(0)
    peak = torch.cuda.max_memory_allocated(device) / 1e6
    return Figure(f"peak memory, {part}", peak, more_is_better=False, unit=" MB")


def real(size: Size, device: str, settings: Settings) -> Result:
    """Measured on a device."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    it = Iteration.of(size, device, dtype)
    gates = agree(it)
    figures, cases = measured(it, settings.pairs)
    return Result("full_size", f"{size.shape} on {device} in {dtype}", figures, cases, gates)


def dry(size: Size) -> Result:
    """Parameters and operations, without weights."""
    parts = full_size_flops.count(size)
    typer.echo(full_size_flops.as_table(parts))
    flops = [Figure(f"operations, {part.name}", part.flops / 1e12, unit=" TFLOP") for part in parts]
    return Result("full_size", f"{size.shape}, dry", flops, [asdict(part) for part in parts])


def main(
    device: Annotated[str | None, typer.Option(help="cuda:0, cpu; without a GPU the default is the dry form")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="parameters and FLOPs alone, without weights")] = False,
    scale: Annotated[Literal["full", "tiny"], typer.Option(help="full size, or the same architectures small")] = "full",
    pairs: Annotated[int, typer.Option(min=2, help="rounds in which kit and bare take turns")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="threads of the processor")] = 1,
    out: Annotated[Path, typer.Option(help="where the record goes")] = PROJECT_ROOT / "reports" / "bench",
) -> None:
    """Measure (or count), print, and write full_size.json or full_size_dry.json."""
    torch.set_num_threads(threads)
    device = device or ("cuda:0" if torch.cuda.is_available() else None)
    settings = Settings(pairs, scale != "full", threads)
    if dry_run or device is None:
        typer.echo(write(dry(SIZES[scale]), out / "full_size_dry.json", asdict(settings) | {"scale": scale}))
        return
    try:
        result = real(SIZES[scale], device, settings)
    except BenchmarkError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    for figure in result.figures:
        interval = "" if figure.low is None else f" [{figure.low:.3g}, {figure.high:.3g}]"
        typer.echo(f"{figure.name}: {figure.value:.3g}{figure.unit}{interval}")
    typer.echo(write(result, out / "full_size.json", asdict(settings) | {"scale": scale}))


if __name__ == "__main__":
    typer.run(main)
