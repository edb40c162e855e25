"""Where the embedded generator's time goes on a CPU, beside what its matrix products need at this machine's best speed.

`python -m benchmarks.studies.generator_time` draws batches with one torch thread, as each worker of a rollout does, and
writes `reports/generator_time.json`: milliseconds a picture by part (text encoders, transformer, decoder) and by kind
of operation, as torch's profiler saw them; the milliseconds that the counted operations would take at the speed of one
large matrix product; and how much faster a whole iteration would be were a part free. docs/generator_time.json is the
record that docs/training.md shows.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

KINDS = {  # what an operation's name begins with → its kind; the others are "else"
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"),
    "convolutions": ("mkldnn_convolution", "convolution", "_convolution", "slow_conv", "thnn_conv"),
    "attention": ("_scaled_dot_product", "scaled_dot_product", "_flash_attention"),
    "norms": ("native_layer_norm", "native_group_norm", "rsqrt", "mean", "pow"),
    "activations": ("gelu", "silu", "sigmoid", "tanh"),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy", "index", "fill_", "upsample"),
    "sums and products": ("add", "mul", "sub", "div"),
}
PARTS = ("text encoders", "transformer", "decoder")


def main(
    steps: Annotated[int, typer.Option(min=1, help="denoising steps, as training draws in `tiny`")] = 4,
    pictures: Annotated[int, typer.Option(min=1, help="in a call")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="calls that are profiled")] = 5,
    out: Annotated[Path, typer.Option(help="the record")] = PROJECT_ROOT / "reports" / "generator_time.json",
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    kit = gk.load_experiment(gk.load_config("tiny"))

    def draw(number: int) -> None:
        words = [prompt.user_prompt for prompt in kit.train_prompts[number * pictures : (number + 1) * pictures]]
        kit.generator.generate_images(words, [number] * pictures)

    with kit.generator.steps(steps):
        drawn = measured(kit, draw, pictures, rounds)
    model = kit.generator.pipeline.transformer.config
    seen, read = (model.sample_size // model.patch_size) ** 2, kit.generator.pipeline.tokenizer.model_max_length
    drawn["text's share of the transformer's tokens"] = read / (read + seen)
    record = {"steps": steps, "pictures": pictures, **drawn, "iteration": iteration_shares(kit)}
    record["an iteration would be faster by"] = gains(record)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(json.dumps(record, indent=1))


def measured(kit: Experiment, draw: Callable[[int], None], pictures: int, rounds: int) -> dict[str, dict | float]:
    """Milliseconds a picture by part and by kind, and what the operations of each part need at the best speed."""
    flops, times = Counter(), Counter()

    @contextmanager
    def counted(part: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        flops[part] += counter.get_total_flops()

    with _watched(kit, counted):
        draw(0)
    with _watched(kit, record_function), profile(activities=[ProfilerActivity.CPU]) as seen:
        for number in range(1, rounds + 1):
            draw(number)
    for event in seen.key_averages():
        if event.key in PARTS:
            times[event.key] += event.cpu_time_total
        elif event.key.startswith("aten::"):
            times[_kind(event.key.removeprefix("aten::"))] += event.self_cpu_time_total
    scale, speed = 1e-3 / (pictures * rounds), best_speed()
    return {
        "ms a picture": {part: times[part] * scale for part in PARTS},
        "at the best speed": {part: 1e3 * flops[part] / speed / pictures for part in PARTS},
        "by kind": {kind: times[kind] * scale for kind in (*KINDS, "else")},
        "GFLOP/s of a large product": speed / 1e9,
    }


@contextmanager
def _watched(kit: Experiment, watch: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Each part's calls happen inside `watch(part)`."""
    pipeline = kit.generator.pipeline
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    calls = [(encoder, "forward", "text encoders") for encoder in encoders if encoder is not None]
    calls += [(pipeline.transformer, "forward", "transformer"), (pipeline.vae, "decode", "decoder")]
    with ExitStack() as stack:
        for owner, name, part in calls:
            stack.enter_context(patch.object(owner, name, _inside(getattr(owner, name), part, watch)))
        yield


def _inside(call: Callable, part: str, watch: Callable[[str], AbstractContextManager]) -> Callable:
    def watched(*given: object, **options: object) -> object:
        with watch(part):
            return call(*given, **options)

    return watched


def _kind(name: str) -> str:
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "else")


def best_speed(size: int = 1024, rounds: int = 20) -> float:
    """Floating-point operations a second of a large matrix product, the best of some."""
    one, seconds = torch.randn(size, size), []
    for _ in range(rounds):
        clock = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - clock)
    return 2 * size**3 / min(seconds)


def iteration_shares(kit: Experiment, rounds: int = 6) -> dict[str, float]:
    """Shares of an iteration's seconds: sampling, pictures, rewards, and the rest, which is the step."""
    optimizer, spent = make_optimizer(kit, kit.config), Counter()
    for iteration in range(1, rounds + 1):
        clock = time.perf_counter()
        rollout, _ = run_iteration(kit, optimizer, iteration)
        if iteration > 1:
            spent["all"] += time.perf_counter() - clock
            spent.update(rollout.seconds)
    shares = {name: spent[name] / spent["all"] for name in ("sampling", "images", "rewards")}
    return shares | {"step": 1 - sum(shares.values())}


def gains(record: dict) -> dict[str, float]:
    """Times as fast that an iteration would be without a part of the drawing, with half the steps, or at best speed."""
    spent, best, share = record["ms a picture"], record["at the best speed"], record["iteration"]["images"]
    whole = sum(spent.values())
    saved = {part: spent[part] for part in PARTS}
    saved["all text tokens"] = spent["text encoders"]
    saved["all text tokens"] += record["text's share of the transformer's tokens"] * spent["transformer"]
    saved["half the steps"] = spent["transformer"] / 2
    saved["all at the best speed"] = whole - sum(best.values())
    return {name: 1 / (1 - share * value / whole) for name, value in saved.items()}


if __name__ == "__main__":
    typer.run(main)
