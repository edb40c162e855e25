"""Reward models in the forms in which people publish them give the scores of their own weights, or say why not.

OpenAI's and LAION's files for open_clip, by name and tag or by path, and folders of transformers: tiny models of the
same forms.
"""

import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from support import hub_cache
from transformers import CLIPModel, SiglipConfig, SiglipModel

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.rewards import load_pickscore
from grpo_kit.rewards.clip import load_clip_similarity
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

CPU = torch.device("cpu")
IMAGES = [render(scene).resize((48, 40)) for scene in random_scenes(3, seed=0)]
TEXTS = ["a red circle", "two cats", ""]
ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures known by name, with and without OpenAI's activation, and one model's weights in many files."""
    place = tmp_path_factory.mktemp("clip")
    for name, activation in (("tiny-form", {}), ("tiny-form-quickgelu", {"quick_gelu": True})):
        (place / f"{name}.json").write_text(json.dumps(ARCHITECTURE | activation))
        open_clip.add_model_config(place / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-form-quickgelu", load_weights=False).eval()
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            torch.nn.init.normal_(block.mlp.c_fc.weight)  # far from 0, where the activations differ
    state = model.state_dict()
    save_file(state, place / "open_clip_model.safetensors")
    torch.save(state, place / "open_clip_pytorch_model.bin")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 32}, place / "e.pt")
    mask = model._buffers.pop("attn_mask")  # OpenAI's archives hold the mask as a constant, and three sizes
    model.attn_mask = mask
    for size in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(size, None)
        model.register_buffer(size, torch.tensor(1))
    with warnings.catch_warnings(action="ignore"):
        shapes = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.long)
        torch.jit.save(torch.jit.trace(model, shapes, check_trace=False), place / "archive.pt")
    return place


def _scores(name: str, pretrained: str | Path | None) -> torch.Tensor:
    return load_clip_similarity(name, None if pretrained is None else str(pretrained), CPU)(IMAGES, TEXTS, TEXTS)


@pytest.fixture(scope="module")
def expected(weights: Path) -> torch.Tensor:
    """By open_clip's own calls."""
    model, preprocess = open_clip.create_model_from_pretrained(
        "tiny-form-quickgelu", pretrained=str(weights / "open_clip_pytorch_model.bin")
    )
    with torch.no_grad():
        pictures = model.eval().encode_image(torch.stack([preprocess(image) for image in IMAGES]))
        return torch.cosine_similarity(pictures, model.encode_text(open_clip.get_tokenizer("tiny-form")(TEXTS)))


@pytest.mark.parametrize(
    "file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "e.pt", "archive.pt"]
)  # fmt: skip
def test_weights_by_path_give_their_scores(weights: Path, expected: torch.Tensor, file: str):
    torch.testing.assert_close(_scores("tiny-form-quickgelu", weights / file), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01


def test_openais_weights_get_openais_activation_whatever_the_name(
    weights: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    file = str(weights / "open_clip_pytorch_model.bin")
    tags = {"openai": {"file": file, "quick_gelu": True}, "laion": {"file": file}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-form", tags)
    torch.testing.assert_close(_scores("tiny-form", "openai"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(_scores("tiny-form", weights / "archive.pt"), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(_scores("tiny-form", "laion"), expected, atol=1e-3)  # as open_clip loads them by itself


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_folder_as_the_hub_has_it_loads_beside_a_transformers_config(
    weights: Path, expected: torch.Tensor, tmp_path: Path, file: str
):
    (tmp_path / file).symlink_to(weights / file)
    config = {"model_cfg": ARCHITECTURE | {"quick_gelu": True}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # LAION's repositories hold both forms
    torch.testing.assert_close(_scores(str(tmp_path), None), expected, atol=1e-5, rtol=0)


def test_path_of_weights_counts_from_the_file_that_names_it(weights: Path, tmp_path: Path):
    (tmp_path / "w.bin").symlink_to(weights / "open_clip_pytorch_model.bin")
    models = {"clip_model": "tiny-form-quickgelu", "clip_pretrained": "w.bin"}
    (tmp_path / "c.json").write_text(json.dumps({"profile": "tiny", "model_settings": models}))
    assert load_config(tmp_path / "c.json").model_settings.clip_pretrained == str(tmp_path / "w.bin")
    assert load_config("full").model_settings.clip_pretrained == "openai"


@pytest.mark.parametrize(
    ("name", "pretrained", "told"),
    [
        ("ViT-B-32", "opneai", "clip_pretrained: could not load 'ViT-B-32': found 'opneai', allowed: openai, laion"),
        ("ViT-L-14-quickgelu", None, "clip_pretrained: could not load 'ViT-L-14-quickgelu': found None, allowed: op"),
        ("ViT-L-14-quickgelu", "openai", "`hf download timm/vit_large_patch14_clip_224.openai`"),
        ("ViT-H-14", "laion2b_s32b_b79k", "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K`"),
        ("hf-hub:laion/CLIP-nothing", None, "`hf download laion/CLIP-nothing`"),
    ],
)  # fmt: skip
def test_weights_that_are_not_here_are_one_line_that_says_which_and_how_to_get_them(
    name: str, pretrained: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        load_clip_similarity(name, pretrained, CPU)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_weights_without_all_tensors_are_refused(weights: Path, tmp_path: Path):
    state = torch.load(weights / "open_clip_pytorch_model.bin", weights_only=True)
    del state["text_projection"]
    torch.save(state, tmp_path / "less.bin")
    with pytest.raises(ModelError, match=r"Missing key\(s\) in state_dict: .*text_projection"):
        _scores("tiny-form-quickgelu", tmp_path / "less.bin")


# --- transformers' form -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `CLIPModel` with its processor."""
    place = tmp_path_factory.mktemp("transformers")
    hub_cache.clip(place)
    return place


def _with_weights(folder: Path, place: Path, left_out: tuple[str, ...]) -> Path:
    """The folder with its weights in torch's own format, some of them left out."""
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (place / file.name).symlink_to(file)
    state = CLIPModel.from_pretrained(folder).state_dict()
    torch.save({name: value for name, value in state.items() if name not in left_out}, place / "pytorch_model.bin")
    return place


def test_weights_in_torchs_own_format_give_the_same_scores(folder: Path, tmp_path: Path):
    ours, usual = (_scores(str(place), None) for place in (_with_weights(folder, tmp_path, ()), folder))
    torch.testing.assert_close(ours, usual, rtol=0, atol=1e-6)  # where weights lie in memory decides on rounding


@pytest.mark.parametrize("left_out", ["text_projection.weight", "vision_model.post_layernorm.weight", "logit_scale"])
def test_checkpoint_that_lacks_weights_is_refused_not_filled_at_random(folder: Path, tmp_path: Path, left_out: str):
    place = _with_weights(folder, tmp_path, (left_out,))
    with pytest.raises(ModelError, match=rf"clip_model: found .* without 1 weights of its model \({left_out}") as error:
        _scores(str(place), None)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=r"options.pickscore.model: found .* without 1 weights"):
        load_pickscore(str(place), str(folder), CPU)


def test_model_of_another_kind_is_refused(tmp_path: Path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=small | {"vocab_size": 100}, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"clip_model: found .* of type 'siglip', allowed here: clip"):
        _scores(str(tmp_path), None)
