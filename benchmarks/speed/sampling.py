"""Sampling in its three ways (plain, static, compiled) and in calls of several sizes: tokens a second, and ratios.

    python -m benchmarks.speed.sampling                       # the embedded policy, and one of 100 M parameters
    python -m benchmarks.speed.sampling --device cuda:0 --dtype bfloat16

Compiling is no part of a ratio: it happens before the first round, and its seconds are told beside the ratios.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

from benchmarks.speed import measure, text_policy
from benchmarks.speed.results import Figure, Gate, Result, Settings, require, write
from benchmarks.speed.text_policy import Shape
from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.models.policy import Completions, Policy, load_policy
from grpo_kit.models.shared_prefix import Decoding

WAYS = get_args(Decoding)
CLOSE = 1e-3  # of a log-probability, in float32
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
LARGE_VOCABULARY = 32768
BATCHES = (8, 16, 32, 64)  # rows of one call


@dataclass(frozen=True)
class Case:
    """A policy and what it is asked."""

    name: str
    policy: Policy
    prompts: list[str]
    group: int

    def sample(self, way: Decoding, seed: int) -> Completions:
        """One batch, with all of the device's work done."""
        self.policy.decoding = way
        found = self.policy.sample(self.prompts, self.group, seed=seed)
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        return found


def agree(case: Case) -> list[Gate]:
    """Each way samples what the plain one does."""
    plain = case.sample("plain", seed=0)
    gates = []
    for way in WAYS[1:]:
        found = case.sample(way, seed=0)
        same = torch.equal(found.ids, plain.ids)
        far = float((found.logprobs - plain.logprobs).abs().max()) if same else float("inf")
        gates += [Gate(f"{case.name}, {way}: log-probabilities", far, CLOSE)]
    return require(gates)


def compare(case: Case, rounds: int) -> tuple[list[Figure], dict]:
    """How many times as long the plain way takes as the others, and what compiling costs once."""
    case.sample("plain", seed=-1)
    clock = time.perf_counter()
    case.sample("compiled", seed=-1)
    compiling = time.perf_counter() - clock
    sides = {way: lambda number, way=way: case.sample(way, seed=number + 2) for way in WAYS}
    timings = measure.alternate(sides, rounds, label=case.name)
    figures = [measure.ratio_figure(f"plain / {way}, {case.name}", timings["plain"], timings[way]) for way in WAYS[1:]]
    figures.append(Figure(f"first compiled batch, {case.name}", compiling, more_is_better=False, unit=" s"))
    return figures, {"case": case.name, "raw": measure.raw(timings)}


def in_calls(case: Case, sizes: Sequence[int], rounds: int) -> tuple[list[Figure], dict]:
    """Sampled tokens a second by the wall's clock, for several `sampling_batch_size`s."""
    counts: dict[str, list[int]] = {str(size): [] for size in sizes}

    def sample(number: int, size: int) -> None:
        case.policy.sampling_batch_size = size
        found = case.sample("plain", seed=number + 2)
        if number >= 0:
            counts[str(size)].append(int(found.mask.sum()))

    sides = {str(size): lambda number, size=size: sample(number, size) for size in sizes}
    timings = measure.alternate(sides, rounds, label=case.name, shuffled=True)
    case.policy.sampling_batch_size = None
    figures = []
    for size, tokens in counts.items():
        speeds = [count / seconds.wall for count, seconds in zip(tokens, timings[size], strict=True)]
        found = measure.median(speeds)
        figures.append(Figure(f"{size} rows a call, {case.name}", *vars(found).values(), unit=" tokens/s"))
    return figures, {"case": f"{case.name}: rows a call", "raw": measure.raw(timings)}


def embedded(device: str, dtype: str) -> Case:
    """The policy of profile tiny, on its own prompts."""
    config = load_config("tiny", {"model_settings.device": device, "model_settings.dtype": dtype})
    prompts = load_prompts(config.training_settings.train_prompts)[: BATCHES[-1] // 8]
    return Case("embedded policy", load_policy(config), [prompt.user_prompt for prompt in prompts], 8)


def large(folder: Path, device: str, dtype: str) -> Case:
    """A text policy of 100 M parameters, whose prompts and completions have exact lengths."""
    shape = Shape()
    policy = text_policy.load_policy(text_policy.build(folder, LARGE_VOCABULARY, **LARGE), shape, reference=False)
    policy.model.to(device, getattr(torch, dtype))
    millions = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
    return Case(f"{millions:.0f} M parameters, {shape}", policy, text_policy.prompts(shape), shape.group)


def sampling(settings: Settings, device: str = "cpu", dtype: str = "float32") -> Result:
    """Both policies in all ways, and in calls of all sizes."""
    figures, cases, gates = [], [], []
    with tempfile.TemporaryDirectory() as place:
        policies = (
            [embedded(device, dtype)]
            if settings.quick
            else [embedded(device, dtype), large(Path(place), device, dtype)]
        )
    for case in policies:
        rows = len(case.prompts) * case.group
        measured = [
            compare(case, settings.pairs),
            in_calls(case, [size for size in BATCHES if case.group <= size <= rows], settings.pairs),
        ]
        gates += agree(case) if dtype == "float32" else []
        for found, raw in measured:
            figures += found
            cases.append(raw)
    notes = [] if gates else [f"in {dtype} rounding decides some samples: the ways are compared in float32 alone"]
    return Result("sampling", f"sampling on {device} in {dtype}", figures, cases, gates, notes)


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda:0, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    pairs: Annotated[int, typer.Option(min=2, help="rounds in which the ways take turns")] = 7,
    quick: Annotated[bool, typer.Option(help="the embedded policy alone")] = False,
    threads: Annotated[int, typer.Option(min=1, help="threads of the processor")] = 1,
    out: Annotated[Path, typer.Option(help="where the record goes")] = PROJECT_ROOT / "reports" / "bench",
) -> None:
    """Measure, print, and write sampling.json."""
    torch.set_num_threads(threads)
    settings = Settings(pairs, quick, threads)
    result = sampling(settings, device, dtype)
    for figure in result.figures:
        interval = "" if figure.low is None else f" [{figure.low:.3g}, {figure.high:.3g}]"
        typer.echo(f"{figure.name}: {figure.value:.3g}{figure.unit}{interval}")
    typer.echo(write(result, out / "sampling.json", asdict(settings)))


if __name__ == "__main__":
    typer.run(main)
