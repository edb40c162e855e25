"""The classic config's models, by their ids: from the hub's cache without network, or one line on what is missing."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support import hub_cache
from transformers import CLIPModel, CLIPProcessor

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.hub import ModelError, load_failure
from grpo_kit.models.generator import load_generator
from grpo_kit.rewards.clip import load_clip_similarity
from grpo_kit.rewards.embedding_scores import ImageQuality
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
import pathlib
import torch
from support import hub_cache
hub_cache.fill(pathlib.Path(home))
from grpo_kit import collect_rollout, grpo_step, load_experiment
from grpo_kit.preflight.machine import weights_text
kit = load_experiment(config)
rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, kit.train_prompts[:1], 4, seed=0)
optimizer = torch.optim.AdamW(kit.policy.trainable_parameters(), lr=1e-3)
stats = grpo_step(kit.policy, optimizer, rollout, kit.config)
loaded = kit.policy.model, kit.generator.pipeline, kit.rewards.parts["clip_similarity"].model
names = [type(part).__name__ for part in loaded]
places = [weights_text(getattr(config.model_settings, name)) for name in ("vlm_model", "sd_model", "clip_model")]
loaded = {"names": names, "rewards": rollout.rewards.tolist(), "places": places, **stats.metrics}
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
"""


def _offline(script: str, home: Path, **more: str) -> dict | list:
    """What a script prints last, in a process of its own that has this cache and no network."""
    path = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "tests")])
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": path, **more}
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process says while the cache is empty (`missing`), and of the models that are there then (`loaded`)."""
    home = tmp_path_factory.mktemp("home")
    told = "print(json.dumps({'missing': messages, 'loaded': loaded}))"
    return _offline(f"{LOAD}\nhome = {str(home)!r}\n{MISSING}\n{TRAIN}\n{told}", home)


@pytest.mark.slow
def test_classic_config_loads_by_its_ids_from_the_hub_cache_and_takes_a_step(offline: dict):
    found = offline["loaded"]
    assert found["names"] == ["GPT2LMHeadModel", "StableDiffusionPipeline", "TransformersClip"]
    assert all(-1 <= reward <= 1 for reward in found["rewards"]) and len(set(found["rewards"])) > 1
    assert found["grad_norm"] > 0 and found["sampling/sampling_logp_difference/max"] < 2e-5
    assert found["places"] == [f"{name}: in the hub cache" for name in CLASSIC["model_settings"].values()]


@pytest.mark.slow
def test_each_missing_model_is_one_line_that_says_which_and_how_to_get_it(offline: dict):
    messages = offline["missing"]
    assert [message.split(":")[0] for message in messages] == [
        "model_settings.vlm_model",
        "model_settings.sd_model",
        "model_settings.clip_model",
    ]
    for message, name in zip(messages, CLASSIC["model_settings"].values(), strict=True):
        assert f"could not load {name!r}" in message and "\n" not in message
    assert all("hf download" in message for message in messages)
    assert "removed it from the hub" in messages[1] and "stable-diffusion-v1-5/stable-diffusion-v1-5" in messages[1]


# --- a hub that refuses -----------------------------------------------------------------------------------------------

REFUSED = """
import json
from grpo_kit import KitError, load_config
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards import load_rewards
messages = []
for owner in ("keeper", "nobody"):
    models = {"vlm_model": f"{owner}/a", "sd_model": f"{owner}/b", "clip_model": f"{owner}/c", "device": "cpu"}
    hps = {"model": "ViT-H-14", "weights": f"{owner}/d/weights.pt"}
    of_a_file = {"profile": "tiny", "reward_settings": {"weights": {"hps": 1.0}, "options": {"hps": hps}}}
    for load, settings in (
        (load_policy, {"model_settings": models}),
        (load_generator, {"model_settings": models}),
        (load_rewards, {"model_settings": models}),
        (load_rewards, {"model_settings": models | {"clip_model": f"hf-hub:{owner}/c"}}),
        (load_rewards, of_a_file),
    ):
        try:
            load(load_config(settings))
        except KitError as error:
            messages.append(str(error))
print(json.dumps(messages))
"""


class Hub(ThreadingHTTPServer):
    """Answers as the hub does where a licence was not accepted, and where there is no such repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Refusal(BaseHTTPRequestHandler):
    """One request."""

    def _refuse(self) -> None:
        status, code = (403, "GatedRepo") if "keeper" in self.path else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _refuse

    def log_message(self, *arguments: object) -> None:
        """Nothing is written."""


@pytest.mark.slow
def test_refused_model_is_one_line_with_its_page_the_token_and_another_one(tmp_path: Path):
    with Hub() as hub:
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HUB_OFFLINE": "0"}
        messages = _offline(REFUSED, tmp_path, **address)
        hub.shutdown()
    assert len(messages) == 10 and not any("\n" in message for message in messages)
    for message, page in zip(messages[:5], "abccd", strict=True):
        assert f"accept its licence at https://huggingface.co/keeper/{page}, " in message and "HF_TOKEN" in message
    assert "stable-diffusion-xl-base-1.0" in messages[1] and "Qwen/Qwen2.5-VL-3B-Instruct" in messages[0]
    for message, page in zip(messages[5:], "abccd", strict=True):
        assert f"check the name: the hub shows no https://huggingface.co/nobody/{page}; " in message
        assert "licence" not in message


def test_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path):
    with pytest.raises(ModelError, match="there is no such folder on this machine: check the path") as error:
        load_generator(load_config({"model_settings": {"sd_model": str(tmp_path / "moved"), "device": "cpu"}}))
    assert "hf download" not in str(error.value) and "\n" not in str(error.value)


def test_licence_of_the_full_profiles_generator_is_told_of_without_network():
    gated, free = load_config("full").model_settings.sd_model, hub_cache.GENERATOR.replace("runwayml", "x")
    lines = [str(load_failure("model_settings.sd_model", name, OSError("no network"))) for name in (gated, free)]
    assert "it asks for a licence first, at https://huggingface.co/stabilityai/stable-diffusion-3" in lines[0]
    assert "licence" not in lines[1]


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


def test_quality_takes_the_scale_that_transformers_model_has(folder: Path):
    model = CLIPModel.from_pretrained(folder)
    clip = load_clip_similarity(str(folder), None, torch.device("cpu"))
    found = ImageQuality(clip, [("sharp", "soft")])(IMAGES, TEXTS, TEXTS)
    good, bad = (clip(IMAGES, [word] * 3, TEXTS) for word in ("sharp", "soft"))
    torch.testing.assert_close(found, torch.sigmoid(model.logit_scale.detach().exp() * (good - bad)))


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
