"""The classic config's models, by their ids: from the hub's cache without network, or one line on what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_cache
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.models.loading import ModelError
from grpo_kit.rewards.clip_similarity import load_clip_similarity
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

CLASSIC = {  # the flat form, as VLM-GRPO users have it
    "model_settings": {"vlm_model": hub_cache.POLICY, "sd_model": hub_cache.GENERATOR, "clip_model": hub_cache.CLIP},
    "training_settings": {"learning_rate": 1e-6, "group_size": 4, "num_iterations": 100},
}
LOAD = f"""
import json
from grpo_kit import load_config
config = load_config({CLASSIC!r}, {{"model_settings.device": "cpu", "generation_settings.max_new_tokens": 8,
    "generation_settings.num_inference_steps": 2, "generation_settings.height": 16, "generation_settings.width": 16}})
"""
TRAIN = """
import torch
from grpo_kit import collect_rollout, grpo_step, load_experiment
from grpo_kit.check import weights_text
kit = load_experiment(config)
rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, kit.train_prompts[:1], 4, seed=0)
optimizer = torch.optim.AdamW(kit.policy.trainable_parameters(), lr=1e-3)
stats = grpo_step(kit.policy, optimizer, rollout, kit.config)
loaded = kit.policy.model, kit.generator.pipeline, kit.rewards.parts["clip_similarity"].model
names = [type(part).__name__ for part in loaded]
places = [weights_text(getattr(config.model_settings, name)) for name in ("vlm_model", "sd_model", "clip_model")]
print(json.dumps({"names": names, "rewards": rollout.rewards.tolist(), "places": places, **stats.metrics}))
"""
MISSING = """
from grpo_kit import KitError
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards import load_rewards
messages = []
for load in (load_policy, load_generator, load_rewards):
    try:
        load(config)
    except KitError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


def _offline(script: str, home: Path) -> dict | list:
    """What a script prints last, in a process of its own that has this cache and no network."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD + script],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_classic_config_loads_by_its_ids_from_the_hub_cache_and_takes_a_step(tmp_path: Path):
    hub_cache.fill(tmp_path)
    found = _offline(TRAIN, tmp_path)
    assert found["names"] == ["GPT2LMHeadModel", "StableDiffusionPipeline", "TransformersClip"]
    assert all(-1 <= reward <= 1 for reward in found["rewards"]) and len(set(found["rewards"])) > 1
    assert found["grad_norm"] > 0 and found["sampling/sampling_logp_difference/max"] < 2e-5
    assert found["places"] == [f"{name}: in the hub cache" for name in CLASSIC["model_settings"].values()]


def test_each_missing_model_is_one_line_that_says_which_and_how_to_get_it(tmp_path: Path):
    messages = _offline(MISSING, tmp_path)
    assert [message.split(":")[0] for message in messages] == [
        "model_settings.vlm_model",
        "model_settings.sd_model",
        "model_settings.clip_model",
    ]
    for message, name in zip(messages, CLASSIC["model_settings"].values(), strict=True):
        assert f"could not load {name!r}" in message and "\n" not in message
    assert all("hf download" in message for message in messages)
    assert "took it off the hub" in messages[1] and "stable-diffusion-v1-5/stable-diffusion-v1-5" in messages[1]


# --- a transformers CLIP as the reward model --------------------------------------------------------------------------


IMAGES = [render(scene).resize((48, 40)) for scene in random_scenes(3, seed=0)]
TEXTS = ["a red circle", "", "two tiny golden pyramids, over on the left, at night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `CLIPModel` in the hub's form."""
    place = tmp_path_factory.mktemp("clip")
    hub_cache.clip(place)
    return place


def test_scores_are_the_cosines_that_transformers_gives(folder: Path):
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(text=TEXTS, images=IMAGES, padding=True, return_tensors="pt"))
    expected = output.logits_per_image.diagonal() / model.logit_scale.exp()
    found = load_clip_similarity(str(folder), None, torch.device("cpu"))(IMAGES, TEXTS, TEXTS)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert float(found.std()) > 1e-3


def test_over_long_texts_are_cut_and_counted(folder: Path):
    clip = load_clip_similarity(str(folder), None, torch.device("cpu"))
    clip.encode_texts(TEXTS)
    assert clip.truncated == 0
    long = "circle " * 100
    assert torch.equal(clip.encode_texts([long]), clip.encode_texts([long + "square"]))
    assert clip.truncated == 2


def test_folder_that_is_damaged_is_one_line(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"model_settings\.clip_model: could not load .*missing or damaged") as error:
        load_clip_similarity(str(tmp_path), None, torch.device("cpu"))
    assert "\n" not in str(error.value)
