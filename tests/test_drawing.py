"""Pictures scored while the next are drawn: the same rows, whole groups, each pair drawn once; and how it ends."""

import contextlib
import dataclasses
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.threads import started
from grpo_kit.experiment import Experiment
from grpo_kit.models import drawing
from grpo_kit.models import generator as generator_module
from grpo_kit.models.decoding import even_batches
from grpo_kit.models.drawing import DrawRequest, DrawResult
from grpo_kit.models.generator import Generator
from grpo_kit.rewards import RewardError, Rewards
from grpo_kit.rewards.loading import load_rewards
from grpo_kit.rollout import Rollout, collect_rollout, score
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

TEXTS = ["a red circle, sharp", "a blue square", "two green stars, blurry", "a ring", "a cross"]
ALL_KINDS = ["contrast", "jpeg_size", "length", "gold", "clip_similarity", "diversity", "gain"]
# Of these the last bits depend on how large a batch is (a matrix product rounds by its size); gain draws, too
MOST = {"clip_similarity": 1e-6, "diversity": 1e-6, "gain": 1e-2}
SHAPES = [(1, {"groups": 2}), (4, {"size": 3}), (5, {"images": 2}), (24, {}), (3, {"groups": 1, "size": 5})]
NOTHING = Rewards({}, {})


class Counting(Generator):
    """The embedded generator with another batch size, which notes what it draws."""

    def __init__(self, generator: Generator, batch_size: int) -> None:
        vars(self).update(vars(generator))
        self.batch_size, self.num_inference_steps = batch_size, 2
        self.batches: list[list] = []

    def _draw(self, pairs: list) -> list[Image.Image | None]:
        self.batches.append(pairs)
        return super()._draw(pairs)


def _wanted(groups: int = 4, size: int = 4, images: int = 1) -> DrawRequest:
    """Rows of which some are the same picture, within a group and between groups."""
    ids = 5 + torch.arange(groups).repeat_interleave(size)  # the share of a later process does not begin at 0
    rewrites = [TEXTS[(row * row + int(group)) % len(TEXTS)] for row, group in enumerate(ids)]
    seeds = 100 * (ids[:, None] % 2) + torch.arange(images)
    return DrawRequest([TEXTS[int(group) % len(TEXTS)] for group in ids], rewrites, ids, seeds)


def draw_and_score(generator: Generator, rewards: Rewards, wanted: DrawRequest, *, overlap: bool = False) -> DrawResult:
    """What is asked for, drawn and scored as a rollout does it."""
    return drawing.draw_and_score(generator, partial(score, rewards), wanted, overlap)


def _pixels(drawn: DrawResult | Rollout) -> list[list[bytes | None]]:
    return [[image and image.tobytes() for image in row] for row in drawn.images]


@pytest.fixture(scope="module")
def rewards(kit: Experiment) -> Rewards:
    """Rewards of all kinds: of pixels, of text, of CLIP, of a group, and one that draws."""
    changes = {"reward_settings.weights": dict.fromkeys(ALL_KINDS, 1.0), "reward_settings.monitors": []}
    return load_rewards(load_config(kit.config, changes), kit.generator)


# --- the same as one after the other ----------------------------------------------------------------------------------


def gives_the_same(generator: Generator, rewards: Rewards, batch_size: int, shape: dict) -> bool:
    """Pictures, and the rewards that look at one alone, to the last bit."""
    wanted = _wanted(**shape)
    plain, other = (
        draw_and_score(Counting(generator, batch_size), rewards, wanted, overlap=overlap) for overlap in (False, True)
    )
    return (
        _pixels(plain) == _pixels(other)
        and list(plain.parts) == list(other.parts)
        and all(
            torch.allclose(values, other.parts[name], rtol=0, atol=MOST.get(name, 0.0), equal_nan=True)
            for name, values in plain.parts.items()
        )
    )


def draws_the_same_batches(generator: Generator, rewards: Rewards, batch_size: int, shape: dict) -> bool:
    """What is drawn in one call of the pipeline, so that rounding is the same; a pair is drawn once."""
    plain, other = Counting(generator, batch_size), Counting(generator, batch_size)
    draw_and_score(plain, NOTHING, _wanted(**shape))
    draw_and_score(other, NOTHING, _wanted(**shape), overlap=True)
    drawn = [pair for batch in other.batches for pair in batch]
    return other.batches == plain.batches and len(drawn) == len(set(drawn))


def shows_rewards_whole_groups(generator: Generator, rewards: Rewards, batch_size: int, shape: dict) -> bool:
    """Each group in one call, in order."""
    seen: list[list[int]] = []

    def listen(images: Sequence, prompts: Sequence, enhanced_prompts: Sequence, group_ids: torch.Tensor) -> list[float]:
        seen.append(group_ids.tolist())
        return [0.0] * len(images)

    wanted = _wanted(**shape)
    draw_and_score(Counting(generator, batch_size), Rewards({"listen": listen}, {"listen": 1.0}), wanted, overlap=True)
    rows = wanted.group_ids.repeat_interleave(wanted.seeds.shape[1]).tolist()
    return [group for call in seen for group in call] == rows and sum(len(set(call)) for call in seen) == len(set(rows))


PROPERTIES = [gives_the_same, draws_the_same_batches, shows_rewards_whole_groups]


@pytest.mark.parametrize("holds", PROPERTIES)
@pytest.mark.parametrize(("batch_size", "shape"), SHAPES)
def test_overlap_changes_when_and_nothing_else(
    kit: Experiment, rewards: Rewards, holds: Callable, batch_size: int, shape: dict
):
    assert holds(kit.generator, rewards, batch_size, shape)


_right = drawing._whole_groups


def cuts_groups(generator: Generator, wanted: DrawRequest) -> Iterator[tuple[DrawRequest, list]]:
    """As many rows as a batch has pictures, wherever that ends."""
    images = [image for _, part in _right(generator, wanted) for image in part]
    for rows in even_batches(range(len(images)), generator.images_at_once):
        yield wanted[rows[0] : rows[-1] + 1], images[rows[0] : rows[-1] + 1]


def looks_for_equal_pairs_in_parts(generator: Generator, wanted: DrawRequest) -> Iterator[tuple[DrawRequest, list]]:
    """A picture that two groups share is drawn twice, in other batches."""
    for group in wanted.group_ids.unique().tolist():
        rows = (wanted.group_ids == group).nonzero().flatten().tolist()
        yield from _right(generator, wanted[rows[0] : rows[-1] + 1])


def mixes_rows(generator: Generator, wanted: DrawRequest) -> Iterator[tuple[DrawRequest, list]]:
    """Parts in the order in which they happen to end."""
    yield from reversed(list(_right(generator, wanted)))


@pytest.mark.parametrize(
    ("broken", "holds"),
    [
        (cuts_groups, gives_the_same),
        (cuts_groups, shows_rewards_whole_groups),
        (looks_for_equal_pairs_in_parts, draws_the_same_batches),
        (mixes_rows, gives_the_same),
        (mixes_rows, shows_rewards_whole_groups),
    ],
)
def test_a_broken_order_is_caught(
    kit: Experiment, rewards: Rewards, monkeypatch: pytest.MonkeyPatch, broken: Callable, holds: Callable
):
    monkeypatch.setattr(drawing, "_whole_groups", broken)
    assert not holds(kit.generator, rewards, 5, {"size": 3})


def test_a_rollout_is_the_same_and_running_statistics_take_it_in_once(kit: Experiment):
    shaping = {"clip_similarity": {"normalize": "running"}}
    config = load_config(kit.config, {"reward_settings.shaping": shaping})
    found = []
    for overlap in (False, True):
        rewards = load_rewards(config, kit.generator)
        generator = Counting(kit.generator, 4)
        prompts = kit.train_prompts[:3]
        rollouts = [collect_rollout(kit.policy, generator, rewards, prompts, 3, s, overlap=overlap) for s in (1, 2)]
        found.append((rollouts, rewards.state_dict()["clip_similarity"]))
    for plain, other in zip(*(rollouts for rollouts, _ in found), strict=True):
        assert _pixels(plain) == _pixels(other) and plain.enhanced_prompts == other.enhanced_prompts
        torch.testing.assert_close(plain.rewards, other.rewards, rtol=0, atol=1e-5)
        assert plain.rewards.unique().numel() > 3 and plain.seconds.keys() == other.seconds.keys()
    assert found[1][1][0] == 18  # two rollouts of 9 rows, each once
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [True, False, None])
def test_the_settings_reach_an_iteration(own_kit: Experiment, monkeypatch: pytest.MonkeyPatch, overlap: bool | None):
    overlapped = []
    monkeypatch.setattr(drawing, "_whole_groups", lambda *a: overlapped.append(True) or _right(*a))
    changes = {"reward_settings.overlap": overlap, "training_settings.group_size": 2}
    config = load_config(own_kit.config, changes | {"training_settings.prompts_per_iteration": 2})
    kit = dataclasses.replace(own_kit, config=config)
    run_iteration(kit, make_optimizer(kit, config), 1)
    assert bool(overlapped) is bool(overlap)  # left open on one device: no


def test_a_picture_that_failed_is_nan_in_its_own_row(kit: Experiment, rewards: Rewards):
    class Losing(Counting):
        def _draw(self, pairs: list) -> list[Image.Image | None]:
            drawn = super()._draw(pairs)
            return [None if text == TEXTS[0] else image for image, (text, _) in zip(drawn, pairs, strict=True)]

    wanted = _wanted()
    drawn = draw_and_score(Losing(kit.generator, 3), rewards, wanted, overlap=True)
    lost = [text == TEXTS[0] for text in wanted.rewrites]
    assert any(lost) and drawn.parts["clip_similarity"].isnan().tolist() == lost


# --- at the same time -------------------------------------------------------------------------------------------------


def scores_during_the_next_batch(generator: Generator, overlap: bool, patience: float) -> bool:
    """The second batch and the rewards' first call each wait for the other one."""
    both = threading.Barrier(2, timeout=patience)

    class Meeting(Counting):
        def _draw(self, pairs: list) -> list[Image.Image | None]:
            if len(self.batches) == 1:
                both.wait()
            return super()._draw(pairs)

    def reward(images: Sequence, *texts: Sequence) -> list[float]:
        if not met:
            met.append(both.wait() >= 0)
        return [0.0] * len(images)

    met: list[bool] = []
    try:
        wanted = _wanted(groups=2, size=5)
        draw_and_score(Meeting(generator, 4), Rewards({"r": reward}, {"r": 1.0}), wanted, overlap=overlap)
    except threading.BrokenBarrierError:
        return False
    return bool(met)


def test_a_part_is_scored_while_the_next_is_drawn(kit: Experiment):
    assert scores_during_the_next_batch(kit.generator, overlap=True, patience=600)
    assert not scores_during_the_next_batch(kit.generator, overlap=False, patience=0.1)


def test_drawing_leaves_the_global_generators_alone(kit: Experiment):
    """So a reward that draws from them beside it gets the numbers that it would get after it."""

    def states() -> list[bytes]:
        numpy_state = np.random.get_state()[1].tobytes()
        return [repr(random.getstate()).encode(), numpy_state, torch.get_rng_state().numpy().tobytes()]

    before = states()
    kit.generator.generate_images(TEXTS, range(len(TEXTS)))
    assert states() == before


def has_the_callers_modes(start: Callable) -> bool:
    """What a call in a thread finds on or off is what its caller has: gradients, autocast, the number of threads."""

    def modes() -> tuple:
        kinds = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return *kinds, torch.get_num_threads(), torch.get_default_dtype()

    def agrees() -> bool:
        return start(modes).result() == modes()

    with torch.no_grad():
        without = agrees()
    with torch.autocast("cpu", torch.float16):
        return agrees() and without


def test_a_thread_computes_as_its_caller_would():
    assert has_the_callers_modes(started)
    with ThreadPoolExecutor(1) as executor:
        assert not has_the_callers_modes(executor.submit)


def draws_the_same_beside_another(generator: Generator, tries: int) -> bool:
    """Two threads that draw with one pipeline, as a reward that draws does beside the rollout."""
    pairs = [[(text, seed) for text in TEXTS] for seed in (1, 2)]
    alone = [[image.tobytes() for image in generator.generate_images(*zip(*some, strict=True))] for some in pairs]
    for _ in range(tries):
        calls = [started(generator.generate_images, *zip(*some, strict=True)) for some in pairs]
        wait(calls)  # where one fails, the other still draws with the pipeline that later tests use
        with contextlib.suppress(Exception):  # an index beyond the schedule
            if [[image.tobytes() for image in call.result()] for call in calls] == alone:
                continue
        return False
    return True


def test_a_pipeline_draws_for_one_thread_at_a_time(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    assert draws_the_same_beside_another(kit.generator, tries=3)
    monkeypatch.setattr(generator_module, "_DRAWING", contextlib.nullcontext())
    assert not draws_the_same_beside_another(kit.generator, tries=20)


# --- how it ends ------------------------------------------------------------------------------------------------------


def _broken_reward(images: Sequence, prompts: Sequence, enhanced_prompts: Sequence) -> list[float]:
    raise KeyError("no such thing")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rewards_error_is_told_as_it_is(kit: Experiment, overlap: bool):
    broken = Rewards({"broken": _broken_reward}, {"broken": 1.0})
    with pytest.raises(RewardError, match="reward 'broken': KeyError: 'no such thing'"):
        draw_and_score(Counting(kit.generator, 4), broken, _wanted(), overlap=overlap)


class Failing(Counting):
    """Draws one batch; then something happens."""

    def __init__(self, generator: Generator, error: BaseException) -> None:
        super().__init__(generator, batch_size=4)
        self.error = error

    def _draw(self, pairs: list) -> list[Image.Image | None]:
        if self.batches:
            raise self.error
        return super()._draw(pairs)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_an_error_of_the_drawing_waits_for_the_thread(kit: Experiment, error: BaseException):
    ended = threading.Event()

    def slow(images: Sequence, *texts: Sequence) -> list[float]:
        threading.Event().wait(0.2)
        ended.set()
        return [0.0] * len(images)

    with pytest.raises(type(error)) as caught:
        wanted = _wanted(groups=2, size=4)
        draw_and_score(Failing(kit.generator, error), Rewards({"slow": slow}, {"slow": 1.0}), wanted, overlap=True)
    assert caught.value is error and ended.is_set()


INTERRUPTED = """
import sys, threading
import torch
from PIL import Image
from functools import partial
from grpo_kit.models.drawing import DrawRequest, draw_and_score
from grpo_kit.rollout import score
from grpo_kit.rewards import Rewards

class Draws:
    batch_size = 1
    def generate_images(self, texts, seeds):
        return [Image.new("RGB", (8, 8)) for _ in texts]

def hangs(images, prompts, enhanced_prompts):
    print("scoring", flush=True)
    threading.Event().wait()

wanted = DrawRequest(["a", "b"], ["a", "b"], torch.arange(2), torch.zeros(2, 1, dtype=torch.int64))
draw_and_score(Draws(), partial(score, Rewards({"hangs": hangs}, {"hangs": 1.0})), wanted, overlap=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_process_whose_reward_hangs():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "scoring\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt")
