"""The generator: one seed, one picture, whatever is drawn beside it; and what is not fit to be seen is None.

CORRECTNESS.md T16, T18 and T19.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.models.text_embeddings import TextEmbeddings

CAPTIONS = ["a large red circle, in the center, white background, sharp", "two blue crosses", "a rosy hoop, at night"]


@pytest.fixture
def generator(kit: Experiment) -> Generator:
    """The embedded generator with settings, and kept embeddings, of its own."""
    return Generator(kit.generator.pipeline, num_inference_steps=4, guidance_scale=1.0, batch_size=64)


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def _differ_by(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> int:
    return int(np.abs(_pixels(a) - _pixels(b)).max())


# --- one seed, one picture --------------------------------------------------------------------------------------------


@pytest.mark.trap("T19")
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_picture_is_the_same_alone_and_in_a_batch(generator: Generator, guidance: float):
    generator.guidance_scale = guidance
    texts, seeds = CAPTIONS * 3, list(range(9))
    together = generator.generate_images(texts, seeds)
    alone = [generator.generate_image(text, seed) for text, seed in zip(texts, seeds, strict=True)]
    assert _differ_by(together, alone) <= 1
    generator.batch_size = 4
    assert _differ_by(generator.generate_images(texts, seeds), together) <= 1


class OneStream(Generator):
    """Draws the noise of a whole batch from its first seed."""

    def _draw(self, pairs: list[tuple[str, int]]) -> list[Image.Image | None]:
        inputs = self._text_inputs([text for text, _ in pairs]) | self._options()
        source = torch.Generator().manual_seed(pairs[0][1])
        return self.pipeline(**inputs, generator=source).images


@pytest.mark.trap("T19", broken="one_stream_of_noise")
def test_one_stream_of_noise_for_a_batch_would_be_noticed(kit: Experiment):
    mutant = OneStream(kit.generator.pipeline, num_inference_steps=4, guidance_scale=1.0)
    together = mutant.generate_images(CAPTIONS, [0, 1, 2])
    alone = [mutant.generate_image(text, seed) for seed, text in enumerate(CAPTIONS)]
    assert _differ_by(together[:1], alone[:1]) <= 1 and _differ_by(together, alone) > 1


def test_same_seed_same_picture_another_seed_another_one(generator: Generator):
    one, two, other = (generator.generate_image(CAPTIONS[1], seed) for seed in (3, 3, 4))
    assert _differ_by([one], [two]) == 0 < _differ_by([one], [other])


def test_global_randomness_is_neither_read_nor_moved(generator: Generator):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generator.generate_image(CAPTIONS[0], 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert _differ_by([first], [generator.generate_image(CAPTIONS[0], 1)]) == 0


def test_equal_pairs_are_drawn_once_and_given_back_in_place(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    drawn, draw = [], generator._draw

    def counting(pairs: list[tuple[str, int]]) -> list[Image.Image | None]:
        drawn.extend(pairs)
        return draw(pairs)

    monkeypatch.setattr(generator, "_draw", counting)
    texts, seeds = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0], CAPTIONS[0]], [5, 5, 5, 6]
    images = generator.generate_images(texts, seeds)
    assert sorted(drawn) == sorted({(CAPTIONS[0], 5), (CAPTIONS[1], 5), (CAPTIONS[0], 6)})
    assert images[0] is images[2] and _differ_by(images[:1], images[1:2]) > 1 and _differ_by(images[:1], images[3:]) > 1


def test_each_text_is_encoded_once(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    asked, encode = [], generator.pipeline.encode_prompt

    def counting(prompt: list[str] | None, *args: object, **options: object) -> object:
        asked.extend(text for text in prompt or [] if text)  # None: the pipeline was given kept embeddings
        return encode(prompt, *args, **options)

    monkeypatch.setattr(generator.pipeline, "encode_prompt", counting)
    for seed in range(3):
        generator.generate_images(CAPTIONS, [seed] * 3)
    assert sorted(asked) == sorted(CAPTIONS)


def test_kept_embeddings_do_not_depend_on_the_texts_beside_them(generator: Generator, kit: Experiment):
    texts = [f"{text}, {word}" for text in CAPTIONS for word in ("beautiful", "crisp", "soft", "vintage")]
    alone = Generator(kit.generator.pipeline, num_inference_steps=4, guidance_scale=1.0)
    together = generator._text_inputs(texts)
    for row, text in enumerate(texts):
        for name, values in alone._text_inputs([text]).items():
            assert torch.equal(values[0], together[name][row])


def test_kept_texts_give_the_pictures_that_the_pipeline_gives(generator: Generator):
    generator.guidance_scale = 1.5
    mine = generator.generate_images(CAPTIONS, [0, 1, 2])
    theirs = generator.pipeline(
        CAPTIONS,
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.5,
        max_sequence_length=0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
    ).images
    assert _differ_by(mine, theirs) <= 1


def _says_what_it_cuts(generator: Generator, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether texts that are too long for its encoders are counted, and the first of them reported."""
    longest = generator.pipeline.tokenizer.model_max_length
    fits = " ".join(["red"] * (longest - 2))  # and a start and an end
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        generator.generate_images([*CAPTIONS, fits], range(4))
        quiet = generator.truncated == 0 and not caplog.records
        generator.generate_images([f"{fits} {word}" for word in ("red", "blue")], [0, 1])
    return quiet and generator.truncated == 2 and len(caplog.records) == 1 and "was cut" in caplog.text


@pytest.mark.trap("T18")
@pytest.mark.trap("T18", broken="rewrite_cut_silently")
def test_rewrite_that_is_too_long_to_be_drawn_is_counted_and_reported(
    generator: Generator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    assert _says_what_it_cuts(generator, caplog)
    caplog.clear()
    monkeypatch.setattr(TextEmbeddings, "_count_truncated", lambda *args: None)
    silent = Generator(generator.pipeline, num_inference_steps=4, guidance_scale=1.0)
    assert not _says_what_it_cuts(silent, caplog)


def test_every_picture_has_a_seed(generator: Generator):
    with pytest.raises(ValueError, match="seeds: found 1 for 2 prompts"):
        generator.generate_images(CAPTIONS[:2], [0])
    assert generator.generate_images([], []) == []


def test_the_picture_shows_the_caption(kit: Experiment):
    from grpo_kit.rewards.gold import gold

    images = kit.generator.generate_images([CAPTIONS[0]] * 8, range(8))
    red, other = (np.mean(gold(images, [text] * 8, [text] * 8)) for text in CAPTIONS[:2])
    assert red > 0.8 > other


# --- what is not fit to be seen ---------------------------------------------------------------------------------------


class Canvas:
    """A pipeline that draws what it is told: noise, one colour, or numbers that are none."""

    scheduler = None

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def set_progress_bar_config(self, **options: object) -> None:
        """A pipeline has this."""

    def __call__(
        self, prompt: list[str], num_inference_steps: int, guidance_scale: float, generator: list, output_type: str
    ) -> SimpleNamespace:
        self.calls.append(prompt)
        return SimpleNamespace(
            images=[self._draw(text, source) for text, source in zip(prompt, generator, strict=True)]
        )

    def _draw(self, text: str, source: torch.Generator) -> np.ndarray:
        pixels = torch.rand(8, 8, 3, generator=source).numpy()
        if text == "blank":
            pixels[:] = 0.4
        if text in ("nan", "inf"):
            pixels[2, 3, 1] = float(text)
        return pixels


@pytest.fixture
def canvas() -> Generator:
    return Generator(Canvas(), num_inference_steps=2, guidance_scale=1.0)


@pytest.mark.trap("T16")
def test_blank_and_unfinite_pictures_are_none_and_the_others_stay(canvas: Generator):
    images = canvas.generate_images(["noise", "blank", "nan", "inf", "noise"], [0, 0, 0, 0, 1])
    assert [image is None for image in images] == [False, True, True, True, False]
    assert images[0].size == (8, 8) and images[0].mode == "RGB"


@pytest.mark.parametrize("text", ["blank", "nan"])
def test_single_picture_that_failed_is_one_line(canvas: Generator, text: str):
    with pytest.raises(ModelError, match=f"image: prompt '{text}' with seed 7 came out blank") as error:
        canvas.generate_image(text, 7)
    assert "\n" not in str(error.value)


def test_pipeline_of_another_kind_gets_its_texts_as_they_are(canvas: Generator):
    canvas.batch_size = 2
    canvas.generate_images(["a", "b", "c"], [0, 0, 0])
    assert canvas.pipeline.calls == [["a", "b"], ["c"]]


# --- loading ----------------------------------------------------------------------------------------------------------


def test_embedded_generator_loads_without_the_kit_and_without_extra_arguments(kit: Experiment):
    pipeline = DiffusionPipeline.from_pretrained(kit.config.model_settings.sd_model)
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(CAPTIONS[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == kit.generator.generate_image(CAPTIONS[0]).size
    assert np.ptp(np.asarray(image)) > 20


def _damaged_copy(source: Path, place: Path, damage: Callable[[Path], None]) -> Path:
    """A pipeline's folder as links to the real one, but for one file."""
    for file in source.rglob("*"):
        if file.is_file():
            (place / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (place / file.relative_to(source)).symlink_to(file)
    damage(place)
    return place


def _missing(place: Path) -> None:
    next(place.glob("transformer/*.safetensors")).unlink()


def _cut_off(place: Path) -> None:
    file = next(place.glob("vae/*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-500])


def _no_index(place: Path) -> None:
    (place / "model_index.json").unlink()


@pytest.mark.parametrize("damage", [_missing, _cut_off, _no_index])
def test_missing_or_damaged_file_is_one_line_that_says_what_to_do(
    kit: Experiment, tmp_path: Path, damage: Callable[[Path], None]
):
    folder = _damaged_copy(Path(kit.config.model_settings.sd_model), tmp_path, damage)
    with pytest.raises(ModelError, match="sd_model: could not load") as error:
        load_generator(load_config(kit.config, {"model_settings.sd_model": str(folder)}))
    assert "\n" not in str(error.value) and "missing or damaged" in str(error.value)
