"""Preference models and the aesthetic head: tiny ones of the same architecture, saved as on the hub and loaded back."""

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import Aesthetic, ClipSimilarity, load_aesthetic, load_hps, load_pickscore, load_rewards
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

CPU = torch.device("cpu")
IMAGES = [render(scene) for scene in random_scenes(4, seed=3)]
TEXTS = ["a red circle", "two blue squares", "a red circle", "a pink ring, at night"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- the PickScore form -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel and its processor as `save_pretrained` leaves them."""
    place = tmp_path_factory.mktemp("pickscore")
    tokenizer = CLIPTokenizer.from_pretrained(PROJECT_ROOT / "data/shapeworld/generator/tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=layers | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=layers | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(place)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(place)
    return place


def _by_the_model_card(folder: Path, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """The recipe of PickScore's card, one image and text at a time."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    scores = []
    for image, text in zip(images, texts, strict=True):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs)
        scores.append(model.logit_scale.exp() * torch.cosine_similarity(found.image_embeds, found.text_embeds)[0])
    return torch.stack(scores).detach()


def test_pickscore_is_the_scaled_cosine_of_its_card(pickscore_folder: Path):
    reward = load_pickscore(str(pickscore_folder), None, CPU)
    found = reward(IMAGES, TEXTS, ["whatever"] * 4)
    torch.testing.assert_close(found, _by_the_model_card(pickscore_folder, IMAGES, TEXTS), rtol=1e-4, atol=1e-5)
    assert found.std() > 0 and not found.requires_grad
    torch.testing.assert_close(reward(IMAGES[1:2], TEXTS[1:2], [""]), found[1:2], rtol=1e-4, atol=1e-5)


def test_pickscore_counts_texts_that_are_cut(pickscore_folder: Path, caplog: pytest.LogCaptureFixture):
    reward = load_pickscore(str(pickscore_folder), str(pickscore_folder), CPU)
    long = ", ".join(TEXTS * 3)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        assert reward(IMAGES, [long, *TEXTS[:3]], TEXTS).isfinite().all()
        reward(IMAGES, [f"{long}, sharp"] * 4, TEXTS)
    assert reward.truncated == 2 and len(caplog.records) == 1 and "pickscore: a text longer than 16" in caplog.text


def test_pickscore_comes_from_a_config_and_counts_its_path_from_the_file(pickscore_folder: Path):
    data = {
        "profile": "tiny",
        "model_settings": {"device": "cpu"},
        "reward_settings": {
            "weights": {"pickscore": 1.0},
            "options": {"pickscore": {"model": pickscore_folder.name}},
        },
    }
    file = pickscore_folder.parent / "config.json"
    file.write_text(json.dumps(data))
    rewards = load_rewards(load_config(file))
    expected = _by_the_model_card(pickscore_folder, IMAGES, TEXTS).double()
    torch.testing.assert_close(rewards(IMAGES, TEXTS), expected, rtol=1e-4, atol=1e-5)


# --- the HPS form -----------------------------------------------------------------------------------------------------

ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An open_clip architecture known by name, and a checkpoint for it in the form that HPS has."""
    place = tmp_path_factory.mktemp("hps")
    (place / "tiny-hps.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(place / "tiny-hps.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.create_model("tiny-hps")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, place / "HPS_tiny.pt")
    return "tiny-hps", place / "HPS_tiny.pt"


def test_hps_is_the_cosine_of_the_loaded_weights(architecture: tuple[str, Path]):
    name, weights = architecture
    reward = load_hps(name, str(weights), CPU)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    with torch.no_grad():
        pictures = model.eval().encode_image(torch.stack([preprocess(image) for image in IMAGES]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    found = reward(IMAGES, TEXTS, ["whatever"] * 4)
    torch.testing.assert_close(found, torch.cosine_similarity(pictures, texts), rtol=0, atol=1e-5)
    assert found.std() > 0


def test_hps_looks_at_the_whole_of_a_wide_picture(architecture: tuple[str, Path]):
    name, weights = architecture
    wide = Image.new("RGB", (96, 32), (240, 240, 240))
    changed = wide.copy()
    changed.paste((200, 0, 0), (0, 0, 20, 32))  # outside of the middle, which CLIP's own preprocessing cuts out
    texts = ["a red circle"] * 2
    hps = load_hps(name, str(weights), CPU)
    similarity = ClipSimilarity(*_cropping(name, weights), CPU)
    assert hps([wide, changed], texts, texts).diff().abs() > 1e-4
    torch.testing.assert_close(similarity([wide, wide], texts, texts), similarity([wide, changed], texts, texts))


def _cropping(name: str, weights: Path) -> tuple:
    model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=str(weights))
    return model, preprocess, open_clip.get_tokenizer(name)


def test_hps_takes_a_folder_with_its_own_weights_too(kit: Experiment):
    folder = kit.config.model_settings.clip_model
    config = load_config(
        kit.config, {"reward_settings.weights": {"hps": 1.0}, "reward_settings.options.hps.model": folder}
    )
    expected = kit.rewards.parts["clip_similarity"](IMAGES, TEXTS, TEXTS).double()
    torch.testing.assert_close(load_rewards(config)(IMAGES, TEXTS), expected, rtol=0, atol=1e-6)


# --- models that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "options", "named"),
    [
        ("pickscore", {}, "pickscore.model: could not load 'yuvalkirstain/PickScore_v1'"),
        ("pickscore", {"model": "nobody/nothing"}, "pickscore.model: could not load 'nobody/nothing'"),
        ("hps", {}, "hps.weights: could not load 'xswu/HPSv2/HPS_v2.1_compressed.pt'"),
        ("hps", {"model": "hf-hub:nobody/nothing"}, "hps.model: could not load 'hf-hub:nobody/nothing'"),
        ("hps", {"model": "ViT-nothing", "weights": "/no/such.pt"}, "hps.weights: could not load 'ViT-nothing'"),
    ],
)
def test_missing_model_is_one_line_that_names_the_option(weights: str, options: dict, named: str):
    settings = {"reward_settings.weights": {weights: 1.0}, f"reward_settings.options.{weights}": options}
    with pytest.raises(ModelError) as error:
        load_rewards(load_config("tiny", settings | {"model_settings.device": "cpu"}))
    assert str(error.value).startswith(f"reward_settings.options.{named}") and "\n" not in str(error.value)


def test_model_without_a_processor_names_the_processor(pickscore_folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"options.pickscore.processor: could not load") as error:
        load_pickscore(str(pickscore_folder), str(tmp_path), CPU)
    assert "\n" not in str(error.value)


def test_checkpoint_that_would_run_code_is_refused(architecture: tuple[str, Path], tmp_path: Path):
    torch.save({"state_dict": {}, "run": _Payload(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"hps.weights: could not load"):
        load_hps(architecture[0], str(tmp_path / "bad.pt"), CPU)
    assert not (tmp_path / "ran").exists()


class _Payload:
    """Unpickled, it would write a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.write_text, (self.place, "ran")


# --- the aesthetic head -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(kit: Experiment) -> ClipSimilarity:
    return kit.rewards.parts["clip_similarity"]


def _improved_head(seed: int = 0) -> torch.nn.Sequential:
    """LAION's improved predictor, at the embedded CLIP's 64 numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 16), torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1),
        ).eval()  # fmt: skip


def _saved(head: torch.nn.Module, place: Path, prefix: str = "layers.") -> Path:
    tensors = {f"{prefix}{name}": value.detach() for name, value in head.state_dict().items()}
    save_file(tensors, place) if place.suffix == ".safetensors" else torch.save(tensors, place)
    return place


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_head_of_five_layers_scores_unit_embeddings(clip: ClipSimilarity, tmp_path: Path, name: str):
    head = _improved_head()
    found = load_aesthetic(_saved(head, tmp_path / name), clip)(IMAGES, TEXTS, TEXTS)
    with torch.no_grad():
        expected = head(clip.encode_images(IMAGES))[:, 0]
    torch.testing.assert_close(found, expected)
    assert found.std() > 0


def test_single_linear_layer_is_a_head_too_and_layers_go_in_the_order_of_their_numbers(
    clip: ClipSimilarity, tmp_path: Path
):
    single = torch.nn.Linear(64, 1)
    found = load_aesthetic(_saved(single, tmp_path / "one.pth", prefix=""), clip)(IMAGES, TEXTS, TEXTS)
    torch.testing.assert_close(found, single(clip.encode_images(IMAGES))[:, 0].detach())
    deep = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(11)], torch.nn.Linear(64, 1)).eval()
    found = load_aesthetic(_saved(deep, tmp_path / "deep.pth"), clip)(IMAGES, TEXTS, TEXTS)  # 10 comes after 9
    torch.testing.assert_close(found, deep(clip.encode_images(IMAGES))[:, 0].detach())


def test_head_comes_from_a_config(kit: Experiment, clip: ClipSimilarity, tmp_path: Path):
    place = _saved(_improved_head(1), tmp_path / "head.pth")
    settings = {"reward_settings.weights": {"aesthetic": 0.1}, "reward_settings.options.aesthetic.weights": str(place)}
    expected = 0.1 * load_aesthetic(place, clip)(IMAGES, TEXTS, TEXTS).double()
    torch.testing.assert_close(load_rewards(load_config(kit.config, settings))(IMAGES, TEXTS), expected)


def _layers(*weights: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {f"layers.{number}.weight": weight for number, weight in enumerate(weights)}
    return found | {f"layers.{number}.bias": torch.ones(len(weight)) for number, weight in enumerate(weights)}


def _state(**tensors: object) -> dict:
    return {name.replace("_", "."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        (b"<html>not found</html>", "no file of plain tensors"),
        ([torch.ones(2)], "found list, allowed: a state dict"),
        ({"weight": 3}, "found dict, allowed: a state dict"),
        ({}, "found nothing alone, allowed: a weight and a bias"),
        (_state(layers_0_weight=torch.ones(1, 64)), "found layers.0.bias alone"),
        (_state(weight=torch.ones(1, 64), bias=torch.ones(1), scale=torch.ones(1)), "found scale alone"),
        (_state(weight=torch.ones(1, 768), bias=torch.ones(1)), "layer 0: found .*768.* after clip_model: .n, 64"),
        (_state(weight=torch.ones(2, 64), bias=torch.ones(2)), "the last layer gives 2 numbers, allowed: 1"),
        (_state(weight=torch.ones(64), bias=torch.ones(1)), "layer 0: found shapes .* after clip_model: .n, 64"),
        (_layers(torch.ones(8, 64), torch.ones(1, 9)), "layer 1: found .* after the layer before it: .n, 8"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_line(clip: ClipSimilarity, tmp_path: Path, content: object, part: str):
    place = tmp_path / "head.pth"
    if isinstance(content, bytes):
        place.write_bytes(content)
    elif content is not None:
        torch.save(content, place)
    with pytest.raises(ModelError, match=f"aesthetic: weights .*head.pth': {part}") as error:
        load_aesthetic(place, clip)
    assert "\n" not in str(error.value)


def test_weights_that_would_run_code_are_refused(clip: ClipSimilarity, tmp_path: Path):
    torch.save({"weight": _Payload(tmp_path / "ran")}, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="no file of plain tensors"):
        load_aesthetic(tmp_path / "head.pth", clip)
    assert not (tmp_path / "ran").exists()


def test_layers_may_be_given_directly(clip: ClipSimilarity):
    mean = Aesthetic(clip, [(torch.full((1, 64), 1 / 64), torch.tensor([5.0]))])(IMAGES, TEXTS, TEXTS)
    torch.testing.assert_close(mean, clip.encode_images(IMAGES).mean(dim=1) + 5)
