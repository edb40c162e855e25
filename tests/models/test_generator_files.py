"""Generators in the forms in which people have them: variants of weights, one file, LoRAs, a negative prompt."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from support.generators import (
    FAMILIES,
    SIZE,
    SMALL,
    Family,
    flux_dev,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from support.single_file import write_single_file
from transformers import CLIPConfig, CLIPImageProcessor

from grpo_kit.config import PROJECT_ROOT, Config, ConfigError, KitError, load_config
from grpo_kit.config.hub import load_failure
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import model_card
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.preflight.machine import weights_text
from grpo_kit.runs.folder import decisive_settings

OWN = PROJECT_ROOT / "data" / "shapeworld" / "generator"

TEXTS = ["a large red circle, sharp", "Two tiny golden pyramids", ""]
ONE = {
    "model_settings.device": "cpu",
    "model_settings.drop_t5": False,
    "generation_settings.num_inference_steps": 2,
    "generation_settings.guidance_scale": 4.0,
    "generation_settings.max_sequence_length": None,
    "generation_settings.height": SIZE,
    "generation_settings.width": SIZE,
}


def _config(folder: Path, **settings: object) -> Config:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config("tiny", {"model_settings.sd_model": str(folder), **ONE} | named)


def _load(folder: Path, **settings: object) -> Generator:
    return load_generator(_config(folder, **settings))


def _differ_by(a: list[Image.Image | None], b: list[Image.Image | None]) -> int:
    pixels = [np.stack([np.asarray(image) for image in images]).astype(int) for images in (a, b)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def _pictures(generator: Generator) -> list[Image.Image | None]:
    return generator.generate_images(TEXTS, [0, 1, 2])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], Path]:
    """A family's pipeline in hub form, written once."""
    folders: dict[Callable[[Path], None], Path] = {}

    def write(family: Callable[[Path], None]) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("generator") / "whole"
            family(folders[family])
        return folders[family]

    return write


# --- variants of weights ----------------------------------------------------------------------------------------------


def _save_as(source: Path, folder: Path, **options: object) -> Path:
    DiffusionPipeline.from_pretrained(source).save_pretrained(folder, **options)
    return folder


def _all_fp16(source: Path, folder: Path) -> Path:
    return _save_as(source, folder, variant="fp16")


def _in_shards(source: Path, folder: Path) -> Path:
    return _save_as(source, folder, variant="fp16", max_shard_size="20KB")


def _with_checker(source: Path, folder: Path) -> Path:
    """SD 1.5 as `hf download --include '*.fp16*'` leaves it: the safety checker is a variant, too."""
    eyes = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    vision = SMALL | {"image_size": SIZE, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    stable_diffusion(folder, checker, eyes)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return folder


def _unet_alone(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    return folder


def _text_encoder_alone(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    file = folder / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.bf16.safetensors"))
    (folder / "unet" / "LICENSE").write_text("a name without a dot")
    return folder


def _bin_alone(source: Path, folder: Path) -> Path:
    return _save_as(source, folder, safe_serialization=False)


def _bin_variant(source: Path, folder: Path) -> Path:
    return _save_as(source, folder, safe_serialization=False, variant="fp16")


FORMS = [_all_fp16, _with_checker, _in_shards, _unet_alone, _text_encoder_alone, _bin_alone, _bin_variant]


@pytest.mark.field("F8")
@pytest.mark.parametrize(
    ("family", "form"),
    [(stable_diffusion, form) for form in FORMS] + [(stable_diffusion_xl, form) for form in (_in_shards, _unet_alone)],
    ids=lambda function: function.__name__.strip("_"),
)
def test_variants_of_weights_load(
    written: Callable[[Callable[[Path], None]], Path], family: Callable[[Path], None], form: Callable, tmp_path: Path
):
    plain = written(family)
    folder = form(plain, tmp_path / "variant")
    generator = _load(folder)
    if getattr(generator.pipeline, "safety_checker", None) is not None:
        generator.pipeline.safety_checker = None  # of random weights
    assert _differ_by(_pictures(generator), _pictures(_load(plain))) == 0


@pytest.mark.field("F8")
def test_variant_of_the_dtype_is_taken_and_named_once(
    written: Callable[[Callable[[Path], None]], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = _unet_alone(written(stable_diffusion), tmp_path / "both")
    (folder / "unet" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.INFO, "grpo_kit"):
        _load(folder, model_settings__generator_dtype="float16")
    assert [record.message for record in caplog.records if "fp16" in record.message] == [
        f"generator: {folder} has variants of weights alone; loading {{'unet': 'fp16'}}"
    ]


def _pointer(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def _shard_gone(folder: Path) -> None:
    next((folder / "unet").glob("*00002-of*")).unlink()


def _only_onnx(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("model.onnx"))


@pytest.mark.field("F8")
@pytest.mark.parametrize(
    ("form", "damage", "said"),
    [
        (_save_as, _pointer, "git-lfs"),
        (_in_shards, _shard_gone, "00002-of"),
        (_save_as, _only_onnx, "no file named diffusion_pytorch_model"),
    ],
    ids=["a pointer in place of weights", "a shard is gone", "another format"],
)
def test_what_does_not_load_says_why_and_what_to_do(
    written: Callable[[Callable[[Path], None]], Path],
    form: Callable[[Path, Path], Path],
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
):
    folder = form(written(stable_diffusion), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(KitError, match=said) as error:
        _load(folder)
    assert "\n" not in str(error.value) and "git checkout" not in str(error.value)
    assert "fetch or copy it again" in str(error.value)


@pytest.mark.field("F8")
def test_git_checkout_is_said_of_the_repositorys_own_folders_alone(tmp_path: Path):
    own, other = (load_failure("model_settings.sd_model", str(path), OSError("x")) for path in (OWN, tmp_path))
    assert "git checkout" in str(own) and "git checkout" not in str(other)
    for place in (OWN, tmp_path):
        with pytest.raises(KitError) as error:
            weights_text(str(place / "empty"))
        assert ("git checkout" in str(error.value)) == (place == OWN)


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.field("F8")
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_one_file_draws_what_its_folder_draws(
    written: Callable[[Callable[[Path], None]], Path], ending: str, tmp_path: Path
):
    plain = written(stable_diffusion)
    file = write_single_file(plain, tmp_path / f"model.{ending}")
    configs = shutil.copytree(plain, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    generator = _load(file, model_settings__generator_config=str(configs))
    assert _differ_by(_pictures(generator), _pictures(_load(plain))) == 0
    assert "MB of weights" in weights_text(str(file))


@pytest.mark.field("F8")
def test_one_file_takes_its_configuration_from_the_hubs_cache_or_says_what_to_fetch(
    written: Callable[[Callable[[Path], None]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = written(stable_diffusion)
    file = write_single_file(plain, tmp_path / "model.safetensors")
    for module in ("huggingface_hub.constants", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    with pytest.raises(KitError, match="hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include") as error:
        _load(file)
    assert "or set generator_config" in str(error.value) and "\n" not in str(error.value)
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(plain, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert _differ_by(_pictures(_load(file)), _pictures(_load(plain))) == 0


@pytest.mark.field("F8")
def test_file_that_is_no_generator_is_one_line(written: Callable[[Callable[[Path], None]], Path], tmp_path: Path):
    plain = written(stable_diffusion)
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    shutil.copy(plain / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    torch.save({"state_dict": {}, "code": Path("x")}, tmp_path / "code.ckpt")  # more than tensors: not unpickled
    for name, said in (
        ("cut.safetensors", "damaged"),
        ("vae.safetensors", "appear to be missing"),
        ("code.ckpt", "damaged"),
    ):
        with pytest.raises(KitError, match=f"could not load the file .*{name}.*{said}") as error:
            _load(tmp_path / name, model_settings__generator_config=str(plain))
        assert "\n" not in str(error.value) and "git checkout" not in str(error.value)
    with pytest.raises(KitError, match=r"generator_config: found .*, allowed where sd_model is one file"):
        _load(plain, model_settings__generator_config=str(plain))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def _lora(plain: Path, folder: Path, seed: int, **names: object) -> Path:
    """A LoRA on the denoiser, and on the text encoder where it is named, as diffusers saves it."""
    pipeline = DiffusionPipeline.from_pretrained(plain)
    parts = {"unet": ["to_q", "to_v"], "transformer": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    layers = {}
    for part in ("unet", "transformer", *(["text_encoder"] if names.pop("text", False) else [])):
        if (model := getattr(pipeline, part, None)) is not None:
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=parts[part], init_lora_weights=False))
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
    pipeline.save_lora_weights(folder, **layers, **names)
    return folder


@pytest.mark.field("F8")
@pytest.mark.parametrize("family", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux_dev])
def test_loras_draw_what_diffusers_draws_with_them_alone_and_in_a_batch(
    written: Callable[[Callable[[Path], None]], Path], family: Callable[[Path], None], tmp_path: Path
):
    plain = written(family)
    one = _lora(plain, tmp_path / "one", 1, text=family is stable_diffusion)
    two = _lora(plain, tmp_path / "two", 2, weight_name="style.safetensors") / "style.safetensors"
    loras = [{"path": str(one), "weight": 0.5}, str(two)]
    generator = _load(plain, model_settings__generator_lora=loras)
    pictures = _pictures(generator)
    assert _differ_by(pictures, _pictures(_load(plain))) > 1
    alone = [generator.generate_image(text, seed) for seed, text in enumerate(TEXTS)]
    assert _differ_by(pictures, alone) <= 1
    stock = _load(plain)
    stock.pipeline.load_lora_weights(one, adapter_name="one")
    stock.pipeline.load_lora_weights(two, adapter_name="two")
    stock.pipeline.set_adapters(["one", "two"], [0.5, 1.0])
    assert _differ_by(pictures, _pictures(stock)) == 0


def test_lora_is_recorded_by_path_and_weight_and_counts_from_the_configs_folder(
    kit: Experiment, written: Callable[[Callable[[Path], None]], Path], tmp_path: Path
):
    plain = written(stable_diffusion)
    _lora(plain, tmp_path / "style", 1)
    (tmp_path / "config.json").write_text(
        json.dumps({"profile": "tiny", "model_settings": {"sd_model": str(plain), "generator_lora": "style"}})
    )
    config = load_config(tmp_path / "config.json")
    (lora,) = config.model_settings.generator_lora
    assert (lora.path, lora.weight) == (str(tmp_path / "style"), 1.0)
    assert load_config(config.to_dict()) == config
    recorded = decisive_settings(config.to_dict())["model_settings.generator_lora"]
    assert recorded == [{"path": str(tmp_path / "style"), "weight": 1.0, "weight_name": None}]
    assert "pictures drawn with LoRA `style` (1)" in model_card(kit.policy, config, 1)
    assert load_config("tiny", {"model_settings.generator_lora": '{"path": "a/b", "weight": 0.5}'}).to_dict()[
        "model_settings"
    ]["generator_lora"] == [{"path": "a/b", "weight": 0.5, "weight_name": None}]


@pytest.mark.field("F8")
def test_lora_that_does_not_fit_is_one_line(written: Callable[[Callable[[Path], None]], Path], tmp_path: Path):
    plain = written(stable_diffusion)
    _lora(written(stable_diffusion_xl), tmp_path / "xl", 1)
    _lora(written(stable_diffusion_3), tmp_path / "sd3", 1)
    _lora(plain, tmp_path / "more", 1)
    file = tmp_path / "more" / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    save_file(weights | {key.replace("blocks.1", "blocks.9"): value + 0 for key, value in weights.items()}, file)
    shutil.copytree(plain / "unet", tmp_path / "no lora")
    for name in ("xl", "sd3", "more", "no lora", "gone"):
        with pytest.raises(KitError, match=f"generator_lora: (could not load|found) '.*{name}'") as error:
            _load(plain, model_settings__generator_lora=str(tmp_path / name))
        assert "\n" not in str(error.value)


# --- negative prompt --------------------------------------------------------------------------------------------------

GUIDED = [family for family in FAMILIES if family.negative]
UNWANTED = "blurry, two golden pyramids"


@pytest.mark.parametrize("family", GUIDED, ids=lambda family: family.name)
def test_negative_prompt_draws_what_the_pipeline_draws_with_it(
    written: Callable[[Callable[[Path], None]], Path], family: Family
):
    generator = _load(written(family.write), generation_settings__negative_prompt=UNWANTED)
    pictures = _pictures(generator)
    sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
    options = generator._options() | {"negative_prompt": [UNWANTED] * 3, "prompt": TEXTS}
    theirs = generator.pipeline(**options, generator=sources, output_type="np").images
    mine = generator.pipeline(
        **(generator._text_inputs(TEXTS) | generator._options()),
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
        output_type="np",
    ).images
    assert np.abs(mine - theirs).max() <= 1e-5
    alone = [generator.generate_image(text, seed) for seed, text in enumerate(TEXTS)]
    assert _differ_by(pictures, alone) <= 1
    without = _load(written(family.write))
    assert _differ_by(pictures, _pictures(without)) > 0
    assert without._options()["negative_prompt"] is None, "as before"


def test_negative_prompt_that_could_change_nothing_is_one_line(written: Callable[[Callable[[Path], None]], Path]):
    with pytest.raises(ConfigError, match="negative_prompt: found one, allowed with guidance_scale above 1"):
        _config(written(flux_dev), generation_settings__negative_prompt="x", generation_settings__guidance_scale=1.0)
    with pytest.raises(ConfigError, match="negative_prompt: found one, but FluxPipeline takes none; set null"):
        _load(written(flux_dev), generation_settings__negative_prompt="x")


def test_negative_prompt_that_is_cut_is_counted(
    written: Callable[[Callable[[Path], None]], Path], caplog: pytest.LogCaptureFixture
):
    generator = _load(written(stable_diffusion), generation_settings__negative_prompt="red " * 100)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        _pictures(generator)
    assert generator.truncated == 1 and "was cut" in caplog.text


@pytest.mark.field("F8")
def test_variants_load_by_id_from_the_hubs_cache(
    written: Callable[[Callable[[Path], None]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = written(stable_diffusion)
    repository = tmp_path / "hub" / "models--somebody--half"
    _all_fp16(plain, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants", "diffusers.configuration_utils", "diffusers.models.modeling_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    config = load_config(_config(plain), {"model_settings.sd_model": "somebody/half"})
    assert _differ_by(_pictures(load_generator(config)), _pictures(_load(plain))) == 0
