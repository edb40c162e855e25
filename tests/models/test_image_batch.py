"""How many images fit into memory is predicted from one and two of them, and measured for real on the CPU."""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from hypothesis import given
from hypothesis import strategies as st
from support.forked import Forked

from grpo_kit.config import ConfigError, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models import generator as generator_file
from grpo_kit.models import image_batch
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.models.image_batch import MOST, _container_headroom, free_memory, largest_batch, memory_of

CPU = torch.device("cpu")
MB = 2**20


def _linear(fixed: int, each: int) -> Callable[[int], int]:
    return lambda count: fixed + each * count


# --- the prediction ---------------------------------------------------------------------------------------------------

_bytes = st.integers(0, 10**11)


@given(fixed=_bytes, each=st.integers(1, 10**11), free=_bytes)
def test_prediction_fits_and_one_more_would_not(fixed: int, each: int, free: int):
    need = _linear(fixed, each)
    if need(1) > free:
        with pytest.raises(ModelError, match="image_batch_size: found 'auto', but one image takes"):
            largest_batch(need, free)
        return
    found = largest_batch(need, free)
    assert 1 <= found <= MOST
    assert found == 1 or need(found) <= 0.9 * free
    assert found == MOST or need(found + 1) > int(0.9 * free) - 1


@given(fixed=_bytes, each=st.integers(1, 10**11), free=_bytes, more=_bytes)
def test_more_memory_never_means_fewer_images(fixed: int, each: int, free: int, more: int):
    need = _linear(fixed, each)
    if need(1) <= free:
        assert largest_batch(need, free + more) >= largest_batch(need, free)


def test_prediction_that_forgets_what_every_call_takes_would_be_noticed():
    need, free = _linear(600, 100), 1000
    forgetful = int(0.9 * free) // (need(2) - need(1))
    assert need(largest_batch(need, free)) <= free < need(forgetful)


def test_images_that_take_nothing_more_are_limited_all_the_same():
    assert largest_batch(lambda count: 100, 1000) == MOST
    assert largest_batch(lambda count: 100 - count, 1000) == MOST  # the second happened to find freed memory


def test_only_one_and_two_images_are_drawn_to_find_it():
    drawn: list[int] = []
    largest_batch(lambda count: drawn.append(count) or count * MB, 100 * MB)
    assert drawn == [1, 2]


# --- measuring --------------------------------------------------------------------------------------------------------


def _touch(size: int) -> None:
    """Hold so many bytes for a moment, from the system itself: a heap may keep them, and take as many again."""
    with mmap.mmap(-1, size) as memory:
        memory[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)


@pytest.mark.parametrize("size", [64 * MB, 256 * MB])
def test_memory_of_work_is_what_it_held_at_its_peak(size: int):
    _touch(8 * MB)
    found = memory_of(lambda: (_touch(size), _touch(size)), CPU)  # one after the other, not both
    assert size <= found + 4 * MB and found < 1.5 * size


def test_free_memory_of_a_container_is_what_its_limit_leaves(tmp_path: Path):
    unlimited = _container_headroom(tmp_path)
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert _container_headroom(tmp_path) == 700
    (tmp_path / "memory.max").write_text("200\n")
    assert _container_headroom(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_headroom(tmp_path) == unlimited and unlimited > 2**60
    assert 0 < free_memory(CPU) < 2**50


@pytest.mark.parametrize("ask", [free_memory, lambda device: memory_of(lambda: None, device)])
def test_device_that_does_not_tell_is_one_line(ask: Callable[[torch.device], int]):
    with pytest.raises(ModelError, match="found 'auto', but mps does not say what a call took; set a number"):
        ask(torch.device("mps"))


def test_system_that_does_not_tell_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(image_batch, "_RESET", tmp_path / "no such folder" / "clear_refs")
    with pytest.raises(ModelError, match=r"found 'auto', but the CPU of this system \(linux\) does not say"):
        memory_of(lambda: None, CPU)


# --- a generator ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(kit: Experiment) -> StableDiffusion3Pipeline:
    return with_wide_decoder(kit.generator.pipeline)


def with_wide_decoder(shipped: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """The embedded generator with a decoder whose memory can be seen, at random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=shipped.vae.config.latent_channels, block_out_channels=(64, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0,
    )  # fmt: skip
    return StableDiffusion3Pipeline(**shipped.components | {"vae": vae.eval()})


def _auto(pipeline: StableDiffusion3Pipeline, memory: int | None) -> Generator:
    size = {"height": 64, "width": 64, "batch_size": "auto"}
    return Generator(pipeline, num_inference_steps=1, guidance_scale=1.0, memory=memory, **size)


def _print_memory_of_a_measured_batch(wide: StableDiffusion3Pipeline, stated: int) -> None:
    """How many images are found to fit, and the bytes that drawing them took."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: blocks come from the system, with no gaps between them
    generator = _auto(wide, stated)
    found = generator.images_at_once
    pairs = [("a red circle", seed) for seed in range(found)]
    print(found, memory_of(lambda: generator.generate_images(*zip(*pairs, strict=True)), CPU))


@pytest.mark.slow
def test_measured_batch_keeps_to_the_memory_that_was_stated(wide: StableDiffusion3Pipeline, tmp_path: Path):
    stated = 96 * MB
    process = Forked(lambda: _print_memory_of_a_measured_batch(wide, stated), tmp_path / "said")
    assert process.wait() == 0, process.said
    found, took = map(int, process.said.splitlines()[-1].split())
    assert 1 < found < MOST and 0.5 * stated < took < stated


@pytest.mark.slow
def test_more_memory_draws_more_at_once(wide: StableDiffusion3Pipeline):
    assert _auto(wide, 32 * MB).images_at_once < _auto(wide, 512 * MB).images_at_once


def test_batch_is_measured_once_and_only_when_several_images_are_drawn(
    wide: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch
):
    generator = _auto(wide, 64 * MB)
    measured = []
    monkeypatch.setattr(generator_file, "largest_batch", lambda *given: measured.append(1) or largest_batch(*given))
    alone = generator.generate_image("a red circle", 0)
    assert not measured
    images = generator.generate_images(["a red circle"] * 3, [0, 1, 2])
    generator.generate_images(["a red circle"] * 3, [0, 1, 2])
    assert len(measured) == 1 and images[0].size == alone.size
    generator.batch_size = 2
    assert generator.images_at_once == 2


def test_too_little_memory_for_one_image_is_one_line(wide: StableDiffusion3Pipeline):
    with pytest.raises(ModelError, match=r"one image takes 0\.\d+ GB and 0.00 GB are free; lower height") as error:
        _auto(wide, MB).generate_images(["a", "b"], [0, 0])
    assert "\n" not in str(error.value)


def test_setting_reaches_the_generator(kit: Experiment):
    settings = {"generation_settings.image_batch_size": "auto", "generation_settings.image_memory_gb": "1.5"}
    generator = load_generator(load_config(kit.config, settings))
    assert generator.memory == 1.5e9 and generator.images_at_once == MOST  # pictures of 32 x 32


@pytest.mark.parametrize("value", ["many", 0, -1, 2.5, True])
def test_setting_that_is_no_number_is_one_line(value: object):
    with pytest.raises(ConfigError, match=r"image_batch_size: found .*, allowed: integer >= 1 or auto") as error:
        load_config("tiny", {"generation_settings.image_batch_size": value})
    assert "\n" not in str(error.value)
    assert load_config("tiny", {"generation_settings.image_batch_size": "8"}).generation_settings.image_batch_size == 8
