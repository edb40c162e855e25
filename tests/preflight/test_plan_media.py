"""Films, sounds and objects are planned as pictures are: operations and bytes are those of the real pipelines."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.generators import FAMILIES, Family, stable_diffusion
from support.media_generators import MEDIA_FAMILIES, MediaFamily, stable_audio
from support.plan_cases import phase_cost, small_config
from torch.utils.flop_counter import FlopCounterMode

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.media import Medium, Sound, Video, Views
from grpo_kit.models.generator import load_generator
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.parts import Part, count_parameters, tensors_of
from grpo_kit.preflight.plan.reward import plan_reward
from grpo_kit.preflight.plan.tracing import Trace
from grpo_kit.rewards.loading import load_rewards

UNPADDED = {"AudioLDM 2"}  # its T5 reads no more tokens than a text has, which without a vocabulary is supposed
INSTRUCTED = {"Sana"}  # Gemma reads an instruction before each text, as long as its vocabulary makes it


def _flops(work: object) -> int:
    with FlopCounterMode(display=False) as counted:
        work()
    return counted.get_total_flops()


def _config(folder: Path, family: Family | MediaFamily, **changes: object) -> Config:
    size = getattr(family, "size", {"height": 32, "width": 32})
    generation = {"height": None, "width": None, "max_sequence_length": None, "num_inference_steps": 4}
    generation |= {"rollout_steps": None, "guidance_scale": family.guidance, "image_batch_size": 2} | size | changes
    named = {f"generation_settings__{name}": value for name, value in generation.items()}
    return small_config(model_settings__sd_model=str(folder), **named)


def _planned(part: Part) -> float:
    return sum(phase.cost.flops for phase in part.phases)


# --- drawing ----------------------------------------------------------------------------------------------------------


SLOW = ("AudioLDM 2", "SDXL")  # those that take longest


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[pytest.mark.slow] * (family.name in SLOW), id=family.name)
        for family in (*MEDIA_FAMILIES, *FAMILIES)
    ],
)
def test_a_generator_of_each_family_is_planned_with_its_operations_parameters_and_memory(
    family: Family | MediaFamily, tmp_path: Path
):
    family.write(tmp_path)
    config = _config(tmp_path, family)
    part, generator = plan_generator(config, torch.float32), load_generator(config)
    models = [model for model in generator.pipeline.components.values() if isinstance(model, torch.nn.Module)]
    assert part.parameters == sum(map(count_parameters, models))
    generator.generate_image("something else")  # what guidance goes away from is read once in a run
    texts, seeds = [f"a {row} circle" for row in range(4)], [0] * 4
    real = _flops(lambda: generator.generate_images(texts, seeds))
    if family.name not in INSTRUCTED:
        assert _planned(part) == pytest.approx(real, rel=0.01 if family.name in UNPADDED else 0)
    assert phase_cost(part, "denoising").flops / 4 > 0.01 * real  # a step more or less would be seen
    with Trace(tensors_of(*models)) as traced:
        generator.generate_images(texts[: generator.images_at_once], seeds[: generator.images_at_once])
    planned = max(phase_cost(part, name).peak for name in ("denoising", "decoding"))
    assert planned == pytest.approx(traced.cost.peak, rel=0.02)


def test_a_film_lies_on_the_device_in_its_size_and_a_sound_in_its_length(tmp_path: Path):
    family = next(one for one in MEDIA_FAMILIES if one.name == "Stable Audio")
    family.write(tmp_path)
    config = _config(tmp_path, family)
    sounds = load_generator(config).generate_images(["a", "b", "c", "d"], range(4))
    assert plan_generator(config, torch.float32).pictures == sum(sound.samples.nbytes for sound in sounds)


def test_text_encoders_on_the_cpu_take_nothing_of_the_device(tmp_path: Path):
    family = next(one for one in MEDIA_FAMILIES if one.name == "Wan")
    family.write(tmp_path)
    config = _config(tmp_path, family)
    usual = plan_generator(config, torch.float32)
    found = plan_generator(load_config(config, {"model_settings.text_encoders_on_cpu": True}), torch.float32)
    encoder = next(piece.weights for piece in usual.pieces if piece.name == "text_encoder")
    assert encoder and usual.parameters == found.parameters
    assert sum(piece.weights for piece in usual.pieces) - sum(piece.weights for piece in found.pieces) == encoder
    assert phase_cost(found, "texts").flops == 0 and "for the texts on the CPU" in found.notes[0]


# --- rewards ----------------------------------------------------------------------------------------------------------


def _media(kind: str) -> list[Medium]:
    rng = np.random.default_rng(0)
    if kind == "sound":
        return [Sound(rng.normal(size=(1, 8000)).astype(np.float32).clip(-1, 1), 8000) for _ in range(4)]
    films = [Video(rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), 8.0) for _ in range(4)]
    return films if kind == "video" else [Views(tuple(film.pictures)) for film in films]


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("xclip_similarity", {"model": "data/moving/xclip"}, "video"),
        ("clap_similarity", {"model": "data/tones/clap", "resample": True}, "sound"),
        ("clip_frames", {}, "video"),
        ("clip_views", {}, "views"),
    ],
)
def test_a_reward_of_another_medium_is_planned_with_its_operations(name: str, options: dict, kind: str):
    settings = {"weights": {name: 1.0}, "monitors": ["meaning_kept"], "options": {name: options} if options else {}}
    changes = {f"reward_settings__{key}": value for key, value in settings.items()}
    config = small_config(generation_settings__frames=9, **changes)
    rewards, media = load_rewards(config), _media(kind)
    texts = [" ".join([word] * 600) for word in ("circle", "circle", "square", "square")]  # longer than all that reads
    part, rewritten = plan_reward(config), [f"{row} {text}" for row, text in enumerate(texts)]
    real = _flops(lambda: rewards.score(media, texts, rewritten))
    cut = 0.02 if name == "clap_similarity" else 0  # its tokenizer cuts texts before the model would
    assert _planned(part) == pytest.approx(real, rel=cut)
    models = [rewards.monitors["meaning_kept"].clip.model, getattr(rewards.parts[name], "model", None)]
    assert part.parameters == sum(count_parameters(model) for model in models if model is not None)
    larger = small_config(generation_settings__frames=9, training_settings__group_size=3, **changes)
    assert _planned(plan_reward(larger)) > real


# --- what cannot be planned -------------------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_one_line(tmp_path: Path):
    stable_diffusion(tmp_path)
    index = tmp_path / "model_index.json"
    told = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(told | {"_class_name": "StableDiffusionLatentUpscalePipeline"}), encoding="utf-8")
    with pytest.raises(KitError) as error:
        plan_generator(small_config(model_settings__sd_model=str(tmp_path)), torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="torchsde is there")
def test_a_scheduler_that_needs_a_library_names_it(tmp_path: Path):
    stable_audio(tmp_path)
    index = tmp_path / "model_index.json"
    told = json.loads(index.read_text(encoding="utf-8"))
    told["scheduler"] = ["diffusers", "CosineDPMSolverMultistepScheduler"]
    index.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(KitError, match="torchsde") as error:
        plan_generator(small_config(model_settings__sd_model=str(tmp_path)), torch.float32)
    assert "\n" not in str(error.value)
