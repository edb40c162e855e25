"""How seconds grow with the size of the work: the exponent of a power law, for the kit and for TRL beside it.

Each round measures every size once; a least-squares line through the logarithms gives the round's exponent.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.speed import measure, text_policy
from benchmarks.speed.policy_iteration import configured, make_kit, make_text_peer
from benchmarks.speed.results import Figure, Result, Settings
from benchmarks.speed.text_policy import Shape
from grpo_kit.config import load_config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.models.generator import load_generator

PROMPT_TOKENS = (32, 64, 128, 256, 512)
GROUPS = (4, 8, 16, 32)
IMAGES = (8, 16, 32, 64)
STEPS = (4, 8, 16, 32)
QUICK = 3  # sizes of each kind in a quick run, in which TRL is left out
PEER_ROUNDS = 3  # TRL's growth is shown beside the kit's and has no goal


def growth(settings: Settings) -> Result:
    """Exponents in prompt length and group size (policy's part), and in images and steps (images' part)."""
    few = QUICK if settings.quick else None
    figures, cases = [], []

    def add(name: str, sides: dict[str, Callable[[int], object]], rounds: int, *goals: float) -> None:
        timings = measure.alternate(sides, rounds, label=name, shuffled=True)
        figures.append(_figure(name, timings, *goals))
        cases.append({"case": name, "raw": measure.raw(timings)})

    for name, shapes, goals in (
        ("policy's part by prompt length", [Shape(prompt_tokens=tokens) for tokens in PROMPT_TOKENS], (0.4, 0.3)),
        ("policy's part by group size", [Shape(group=group) for group in GROUPS], (0.8, 0.65)),
    ):
        add(f"kit: {name}", _policy_sides("kit", shapes[:few]), settings.pairs, *goals)
        if not settings.quick:
            add(f"TRL: {name}", _policy_sides("TRL", shapes), PEER_ROUNDS)
    for name, sides in _image_sides(few).items():
        add(f"kit: images' part by {name}", sides, settings.pairs, 1.02, 1.0)
    return Result("W5", "growth of an iteration's seconds, exponents", figures, cases)


def _figure(name: str, timings: measure.Timings, *goals: float) -> Figure:
    """The exponent of sides that are named by their size."""
    rounds = np.array([[seconds.cpu for seconds in found] for found in timings.values()]).T
    found = measure.exponent([float(size) for size in timings], rounds)
    return Figure(name, *vars(found).values(), *goals, more_is_better=False, unit="")


def _policy_sides(side: str, shapes: Sequence[Shape]) -> dict[str, Callable[[int], object]]:
    """One iteration without a KL term at each shape, named by the size that differs."""
    varied = "group" if shapes[0].group != shapes[1].group else "prompt_tokens"
    return {str(getattr(shape, varied)): _policy_iteration(side, shape) for shape in shapes}


def _policy_iteration(side: str, shape: Shape) -> Callable[[int], object]:
    config = configured(shape, beta=0.0)
    with tempfile.TemporaryDirectory() as place:
        folder = text_policy.build(Path(place))
        if side == "kit":
            kit = make_kit(folder, shape, config)
            return lambda number: kit.iterate(text_policy.prompts(shape, number), seed=number + 1)
        peer = make_text_peer(folder, shape, config)
        return lambda number: peer.iterate(text_policy.prompts(shape, number))


def _image_sides(few: int | None) -> dict[str, dict[str, Callable[[int], object]]]:
    """Drawing: more images at the profile's steps, and more steps for 16 images; texts are embedded before."""
    config = load_config("tiny", {"model_settings.device": "cpu"})
    generator = load_generator(config)
    texts = [prompt.user_prompt for prompt in load_prompts(config.training_settings.train_prompts)][: max(IMAGES)]
    usual = generator.num_inference_steps

    def draw(count: int, steps: int, number: int) -> None:
        generator.num_inference_steps = steps
        generator.generate_images(texts[:count], [number + 1] * count)

    draw(len(texts), usual, 0)
    return {
        "images": {str(n): lambda number, n=n: draw(n, usual, number) for n in IMAGES[:few]},
        "steps": {str(n): lambda number, n=n: draw(16, n, number) for n in STEPS[:few]},
    }
