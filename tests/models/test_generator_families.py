"""Every family of generators draws one picture for each text and seed, through the same two calls.

Each family is a tiny pipeline of its own classes with random weights (generators.py), loaded as users load theirs.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from support.generators import FAMILIES, SIZE, SMALL, Family, flux_dev, stable_diffusion, stable_diffusion_xl
from transformers import CLIPConfig, CLIPImageProcessor

from grpo_kit.config import Config, ConfigError, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.models.pipeline import place
from grpo_kit.models.text_embeddings import TextEmbeddings

TEXTS = ["a large red circle, sharp", "Two tiny golden pyramids", ""]
ONE = {"model_settings.device": "cpu", "generation_settings.num_inference_steps": 2}
SQUARE = {"generation_settings.height": SIZE, "generation_settings.width": SIZE}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of them in turn."""
    return request.param


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's pipeline in hub form."""
    place = tmp_path_factory.mktemp("generator")
    family.write(place)
    return place


def _config(folder: Path, **settings: object) -> Config:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(
        "tiny",
        {"model_settings.sd_model": str(folder), "generation_settings.max_sequence_length": None, **ONE, **SQUARE}
        | named,
    )


def _load(folder: Path, **settings: object) -> Generator:
    return load_generator(_config(folder, **settings))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    """It, as load_generator gives it."""
    return _load(folder)


def _differ_by(a: list[Image.Image | None], b: list[Image.Image | None]) -> int:
    pixels = [np.stack([np.asarray(image) for image in images]).astype(int) for images in (a, b)]
    return int(np.abs(pixels[0] - pixels[1]).max())


# --- one text and seed, one picture -----------------------------------------------------------------------------------


@pytest.mark.trap("T19")
@pytest.mark.parametrize("guided", [False, True])
def test_picture_is_the_same_alone_and_in_a_batch(generator: Generator, family: Family, guided: bool):
    generator.guidance_scale = family.guidance if guided else 1.0
    together = generator.generate_images(TEXTS, [0, 1, 2])
    alone = [generator.generate_image(text, seed) for seed, text in enumerate(TEXTS)]
    assert _differ_by(together, alone) <= 1
    assert _differ_by(together, generator.generate_images(TEXTS, [0, 1, 2])) == 0
    assert _differ_by(together, generator.generate_images(TEXTS, [3, 4, 5])) > 1
    assert _differ_by(together, generator.generate_images([*TEXTS[1:], TEXTS[0]], [0, 1, 2])) > 0
    assert together[0].size == (SIZE, SIZE) and together[0].mode == "RGB"


def test_kept_texts_give_the_pictures_that_the_pipeline_gives(generator: Generator, family: Family):
    generator.guidance_scale = family.guidance
    plain = generator._options()
    plain.pop("negative_prompt")  # theirs by default
    if family.name.startswith("SD3"):
        plain["max_sequence_length"] = 0  # T5 is left out
    sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
    theirs = generator.pipeline(TEXTS, **plain, generator=sources).images
    assert _differ_by(generator.generate_images(TEXTS, [0, 1, 2]), theirs) <= 1


@pytest.mark.parametrize("guided", [False, True])
def test_negative_branch_is_computed_where_guidance_asks_for_it_alone(
    generator: Generator, family: Family, guided: bool
):
    generator.guidance_scale = 4.0 if guided else 1.0
    denoiser = getattr(generator.pipeline, "unet", None) or generator.pipeline.transformer
    rows = []
    hook = denoiser.register_forward_pre_hook(
        lambda module, given, named: rows.append(len(named.get("hidden_states", given[0] if given else None))),
        with_kwargs=True,
    )
    generator.generate_images(TEXTS[:2], [0, 1])
    hook.remove()
    assert set(rows) == {4 if guided and family.negative else 2}


def test_equal_pairs_are_drawn_once_and_each_text_is_encoded_once(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    asked, encode = [], generator.pipeline.encode_prompt

    def counting(prompt: list[str] | None = None, *args: object, **options: object) -> object:
        asked.extend(text for text in prompt or [] if text)  # None: the pipeline was given kept embeddings
        return encode(prompt, *args, **options)

    monkeypatch.setattr(generator.pipeline, "encode_prompt", counting)
    texts = [f"{text}, at night" for text in TEXTS[:2]]
    images = generator.generate_images([texts[0], texts[1], texts[0], texts[0]], [5, 5, 5, 6])
    assert images[0] is images[2] and images[0] is not images[3]
    assert sorted(asked) == sorted(texts)


def test_size_is_the_one_that_is_asked_for(folder: Path, family: Family):
    tall = {"generation_settings__height": SIZE + family.multiple, "generation_settings__width": SIZE}
    assert _load(folder, **tall).generate_image(TEXTS[0]).size == (SIZE, SIZE + family.multiple)
    with pytest.raises(ConfigError, match=f"width: found {SIZE + 1}, allowed for .*: multiples of {family.multiple}"):
        _load(folder, generation_settings__width=SIZE + 1)


def test_picture_that_is_not_finite_is_none_and_the_others_stay(generator: Generator):
    decoder = generator.pipeline.vae.decoder
    hook = decoder.register_forward_hook(lambda module, given, values: values.index_fill(0, torch.tensor(1), torch.inf))
    generator.guidance_scale = 1.0
    images = generator.generate_images(TEXTS, [0, 1, 2])
    hook.remove()
    assert [image is None for image in images] == [False, True, False]


@pytest.mark.trap("T18")
def test_text_that_is_longer_than_its_encoder_reads_is_counted(generator: Generator, family: Family):
    assert generator.truncated == 0
    generator.generate_image("circle " * family.reads)
    assert generator.truncated == 1


class OwnNegative(TextEmbeddings):
    """Takes the empty text for the negative branch, whatever the family does."""

    def inputs(self, texts: list[str], guided: bool) -> dict[str, torch.Tensor]:
        wrong = super().inputs([""] * len(texts), guided=False)
        return super().inputs(texts, guided) | {f"negative_{name}": values for name, values in wrong.items()}


def test_negative_branch_of_another_kind_would_be_noticed(xl: Path):
    generator, mutant = (_load(xl, generation_settings__guidance_scale=4.0) for _ in range(2))
    mutant._texts = OwnNegative(mutant.pipeline)
    assert _differ_by(*(each.generate_images(TEXTS, [0, 1, 2]) for each in (generator, mutant))) > 1


# --- dials ------------------------------------------------------------------------------------------------------------


def test_dials_that_save_memory_change_no_picture(folder: Path, generator: Generator, family: Family):
    generator.guidance_scale = 1.0
    plain = generator.generate_images(TEXTS, [0, 1, 2])
    sparing = _load(
        folder, generation_settings__image_batch_size=3,
        model_settings__vae_slicing=True, model_settings__vae_tiling=True, model_settings__text_encoders_on_cpu=True,
    )  # fmt: skip
    assert sparing.pipeline.vae.use_slicing and sparing.pipeline.vae.use_tiling
    assert _differ_by(plain, sparing.generate_images(TEXTS, [0, 1, 2])) <= 1


def test_text_encoders_stay_on_the_cpu_and_encode_there(folder: Path, generator: Generator):
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    settings = _config(folder, model_settings__text_encoders_on_cpu=True).model_settings
    assert place(pipeline, torch.device("meta"), settings) == torch.device("cpu")
    devices = {name: part.device.type for name, part in pipeline.components.items() if hasattr(part, "parameters")}
    assert devices == {name: "cpu" if name.startswith("text_encoder") else "meta" for name in devices}
    apart = TextEmbeddings(pipeline, device=torch.device("cpu")).inputs(TEXTS[:1], guided=True)
    usual = TextEmbeddings(generator.pipeline).inputs(TEXTS[:1], guided=True)
    torch.testing.assert_close(apart, usual, atol=1e-5, rtol=0)


def test_offloading_needs_an_accelerator(folder: Path):
    with pytest.raises(ConfigError, match="offload_generator: found true, but the generator computes on the CPU"):
        _load(folder, model_settings__offload_generator=True)
    with pytest.raises(ConfigError, match="text_encoders_on_cpu: found true, allowed with offload_generator: false"):
        _config(folder, model_settings__offload_generator=True, model_settings__text_encoders_on_cpu=True)


# --- schedulers -------------------------------------------------------------------------------------------------------

FEW_STEPS = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL in hub form."""
    folder = tmp_path_factory.mktemp("xl")
    stable_diffusion_xl(folder)
    return folder


def test_generator_has_a_dtype_of_its_own(xl: Path):
    generator = _load(xl, model_settings__generator_dtype="bfloat16")
    assert {part.dtype for part in generator.pipeline.components.values() if hasattr(part, "parameters")} == {
        torch.bfloat16
    }
    images = generator.generate_images(TEXTS, [0, 1, 2])
    assert _differ_by(images, [generator.generate_image(text, seed) for seed, text in enumerate(TEXTS)]) < 64


@pytest.mark.parametrize("name", FEW_STEPS)
def test_scheduler_is_chosen_by_name_and_seeds_decide_its_noise_too(xl: Path, name: str):
    generator = _load(xl, generation_settings__scheduler=name)
    assert type(generator.pipeline.scheduler).__name__ == name
    assert generator.pipeline.scheduler.config.beta_end == 0.012  # the pipeline's own settings go over
    together = generator.generate_images(TEXTS, [0, 1, 2])
    alone = [generator.generate_image(text, seed) for seed, text in enumerate(TEXTS)]
    assert _differ_by(together, alone) <= 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert _differ_by(together, generator.generate_images(TEXTS, [0, 1, 2])) == 0


@pytest.mark.parametrize(
    "name", ["Euler", "FlowMatchEulerDiscreteScheduler", "DPMSolverSDEScheduler", "SchedulerMixin"]
)
def test_scheduler_that_does_not_fit_is_one_line(xl: Path, name: str):
    with pytest.raises(
        ConfigError, match=f"scheduler: found '{name}', allowed for .*EulerDiscrete.*, or null"
    ) as error:
        _load(xl, generation_settings__scheduler=name)
    assert "\n" not in str(error.value)


# --- attention slicing ------------------------------------------------------------------------------------------------


def test_sliced_attention_draws_the_same_and_is_refused_where_there_is_none(xl: Path, tmp_path: Path):
    plain, sliced = (_load(xl, model_settings__attention_slicing=on) for on in (False, True))
    kinds = {type(kind).__name__ for kind in sliced.pipeline.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    assert _differ_by(*(each.generate_images(TEXTS, [0, 1, 2]) for each in (plain, sliced))) <= 1
    flux_dev(tmp_path)
    with pytest.raises(ConfigError, match="attention_slicing: found true, but FluxPipeline has no U-Net"):
        _load(tmp_path, model_settings__attention_slicing=True)


# --- the safety checker of SD 1.5 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5 whose checker flags every picture."""
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
    folder = tmp_path_factory.mktemp("checked")
    eyes = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    stable_diffusion(folder, checker, eyes)
    return folder


def test_blackened_pictures_are_none_counted_and_reported_once(checked: Path, caplog: pytest.LogCaptureFixture):
    generator = _load(checked)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        assert generator.generate_images(TEXTS, [0, 1, 2]) == [None] * 3
        generator.generate_images(TEXTS, [3, 4, 5])
    assert generator.flagged == 6 and sum("safety checker" in record.message for record in caplog.records) == 1


def test_generator_without_its_checker_shows_the_pictures(checked: Path):
    generator = _load(checked, model_settings__safety_checker=False)
    assert isinstance(generator.pipeline, StableDiffusionPipeline) and generator.pipeline.safety_checker is None
    assert None not in generator.generate_images(TEXTS, [0, 1, 2]) and generator.flagged == 0


# --- weights that are missing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_file_that_lacks_weights_is_one_line(xl: Path, tmp_path: Path, part: str):
    folder = Path(shutil.copytree(xl, tmp_path / "xl"))
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"sd_model: found .* without 1 weights of its {part} .{lost}") as error:
        _load(folder)
    assert "\n" not in str(error.value)


# --- pipelines of other kinds -----------------------------------------------------------------------------------------


class WithoutGuidance:
    """A pipeline of a kind that takes no guidance."""

    def set_progress_bar_config(self, **options: object) -> None:
        """A pipeline has this."""

    def __call__(self, prompt: list[str], num_inference_steps: int, generator: list, output_type: str) -> object:
        raise NotImplementedError


def test_pipeline_that_cannot_do_what_is_asked_is_one_line():
    assert Generator(WithoutGuidance(), num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ConfigError, match=r"guidance_scale: found 5.0, but WithoutGuidance takes none; set 1"):
        Generator(WithoutGuidance(), num_inference_steps=1, guidance_scale=5.0)
    with pytest.raises(ConfigError, match="sd_model: found DDPMPipeline, which takes no prompt"):
        Generator(DDPMPipeline(unet=None, scheduler=None), num_inference_steps=1, guidance_scale=1.0)
