"""Small models on a CPU: one thread computes each operator, several draw; the numbers do not depend on how many."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch

from grpo_kit.config import threads
from grpo_kit.config.threads import computes_best_alone, fitting_threads
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

TEXTS = [f"a red circle {number}" for number in range(7)]


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def of_a_new_thread() -> int:
    """What a thread that is started now computes with."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def in_small_calls(kit: Experiment) -> Generator:
    generator = copy.copy(kit.generator)
    generator.batch_size, generator.num_inference_steps = 2, 2
    return generator


def pictures(generator: Generator, count: int) -> list[bytes]:
    torch.set_num_threads(count)
    return [image.tobytes() for image in generator.generate_images(TEXTS, range(len(TEXTS)))]


@pytest.mark.field("F19")
@pytest.mark.parametrize("count", [2, 3, 16])
def test_pictures_do_not_depend_on_how_many_threads_draw_them(kit: Experiment, count: int):
    generator = in_small_calls(kit)
    alone, several = pictures(generator, 1), pictures(generator, count)
    assert several == alone
    assert torch.get_num_threads() == count == of_a_new_thread()


def test_threads_that_share_a_scheduler_are_noticed(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    generator = in_small_calls(kit)
    alone = pictures(generator, 1)
    monkeypatch.setattr(Generator, "_twin", lambda self: copy.copy(self))
    differs = False
    for _ in range(20):
        try:
            differs = differs or pictures(generator, 3) != alone
        except Exception:  # an index beyond the schedule
            differs = True
    assert differs


def test_an_error_in_one_thread_is_raised_and_the_next_call_draws(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    generator = in_small_calls(kit)
    alone = pictures(generator, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_draw", lambda self, pairs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pictures(generator, 2)
    assert pictures(generator, 2) == alone and of_a_new_thread() == 2


@pytest.mark.field("F19")
def test_an_iteration_gives_the_same_weights_with_any_number_of_threads(kit: Experiment):
    weights = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        own = copy.deepcopy(kit.policy)
        experiment = Experiment(**vars(kit) | {"policy": own})
        run_iteration(experiment, make_optimizer(experiment, kit.config), 1)
        weights.append([parameter.detach().clone() for parameter in own.trainable_parameters()])
        assert torch.get_num_threads() == count
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_a_large_model_keeps_all_threads(monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(3)
    layer = torch.nn.Linear(10, 10)
    with fitting_threads(layer):
        assert torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "SMALL", 110)
    assert not computes_best_alone([layer]) and computes_best_alone([torch.nn.Linear(9, 10)])
    with fitting_threads(layer):
        assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), fitting_threads(torch.nn.Linear(2, 2)):
        raise KeyError
    assert torch.get_num_threads() == 3
