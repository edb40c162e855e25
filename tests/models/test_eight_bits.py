"""Weights in 8 bits (torchao): a policy's below its adapter, a generator's T5.

Below an adapter everything holds that holds without (test_families.py takes each family the whole way); a T5's
embeddings are nearly those that it had. Both take the bytes that are planned, and without the library the settings are
one line.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, Family, gpt2, llama
from support.generators import SIZE, flux_dev, pixart_sigma, stable_diffusion_3, stable_diffusion_xl

from grpo_kit.config import Config, ConfigError, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import save_with_card
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.models.text_embeddings import TextEmbeddings
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.policy import plan_policy

LINEAR = [family for family in FAMILIES if family.name not in ("GPT-2", "DialoGPT")]  # theirs are Conv1D
TEXTS = ["a large red circle, sharp", "Two tiny golden pyramids", ""]
WITH_T5 = [stable_diffusion_3, flux_dev, pixart_sigma]


def _config(folder: Path, **settings: object) -> Config:
    common = {
        "model_settings.sd_model": str(folder),
        "model_settings.device": "cpu",
        "model_settings.drop_t5": False,
        "model_settings.t5_8bit": True,
        "generation_settings.num_inference_steps": 2,
        "generation_settings.max_sequence_length": None,
        "generation_settings.height": SIZE,
        "generation_settings.width": SIZE,
    }
    return load_config("tiny", common | {name.replace("__", "."): value for name, value in settings.items()})


@pytest.fixture
def torchao() -> None:
    """The library, without which these tests are left out."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'torchao>=0.18'")


def _bytes(model: torch.nn.Module) -> int:
    """What a model's weights take, in 8 bits or not; tied ones are there once."""
    return sum(
        weight.qdata.nbytes + weight.scale.nbytes if hasattr(weight, "qdata") else weight.nbytes
        for weight in model.parameters()
    )


# --- a policy's weights below its adapter -----------------------------------------------------------------------------


def _policy_config(kit: Experiment, folder: Path, **settings: object) -> Config:
    own = {"vlm_model": str(folder), "dtype": "float32", "lora": {"r": 2, "alpha": 4}, "base_8bit": True} | settings
    own |= {"system_prompt": "", "instruction": "Rewrite this request: {prompt}"}
    overrides = {f"model_settings.{name}": value for name, value in own.items()}
    return load_config(kit.config, overrides | {"generation_settings.max_new_tokens": 10})


@pytest.mark.parametrize("family", LINEAR, ids=lambda family: family.name)
@pytest.mark.usefixtures("torchao")
def test_planned_bytes_are_those_of_the_loaded_policy(family: Family, kit: Experiment, tmp_path: Path):
    if family.needs is not None:
        pytest.importorskip(family.needs)
    family.write(tmp_path)
    config = _policy_config(kit, tmp_path)
    model, (piece,) = load_policy(config).model, plan_policy(config, torch.float32).pieces
    buffers = piece.weights - _bytes(model)  # some families save theirs
    assert 0 <= buffers <= sum(buffer.nbytes for buffer in model.buffers())
    (whole,) = plan_policy(load_config(config, {"model_settings.base_8bit": False}), torch.float32).pieces
    assert piece.weights < whole.weights and piece.parameters == whole.parameters


@pytest.mark.usefixtures("torchao")
def test_the_cards_code_loads_the_weights_in_8_bits_too(kit: Experiment, tmp_path: Path):
    llama(tmp_path / "base")
    config = _policy_config(kit, tmp_path / "base")
    policy = load_policy(config)
    save_with_card(policy, config, tmp_path, iteration=1)
    (code,) = re.findall(r"```python\n(.*?)\n```", (tmp_path / "README.md").read_text(), re.DOTALL)
    code = code.replace('folder = "."', f"folder = {str(tmp_path)!r}").replace("print(", "print('rewrite:', ")
    command = [sys.executable, "-c", f"import sys\nsys.modules['grpo_kit'] = None\n{code}"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (prompt,) = re.findall(r'^prompt = "(.*)"$', code, re.MULTILINE)
    (expected,) = policy.sample([prompt], 1, seed=0, greedy=True).texts
    assert found.split("rewrite: ", 1)[1].strip() == expected.strip()


@pytest.mark.usefixtures("torchao")
def test_layers_that_cannot_be_kept_in_8_bits_are_one_line(kit: Experiment, tmp_path: Path):
    gpt2(tmp_path)
    with pytest.raises(
        ConfigError, match="base_8bit: found true, but GPT2LMHeadModel has no layer that can be kept so"
    ):
        load_policy(_policy_config(kit, tmp_path))


def test_weights_in_8_bits_are_not_trained(kit: Experiment, tmp_path: Path):
    with pytest.raises(ConfigError, match="base_8bit: found true, allowed with lora: weights in 8 bits cannot be"):
        _policy_config(kit, tmp_path, lora=None)


# --- a generator's T5 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WITH_T5)
@pytest.mark.usefixtures("torchao")
def test_texts_mean_nearly_the_same_and_each_has_one_picture(write: Callable, tmp_path: Path):
    write(tmp_path)
    plain, sparing = (load_generator(_config(tmp_path, model_settings__t5_8bit=bits)) for bits in (False, True))
    usual, ours = (TextEmbeddings(g.pipeline).inputs(TEXTS, guided=False)["prompt_embeds"] for g in (plain, sparing))
    assert 0 < (usual - ours).norm() < 0.05 * usual.norm()
    together = sparing.generate_images(TEXTS, [0, 1, 2])
    alone = load_generator(_config(tmp_path)).generate_image(TEXTS[1], 1)
    assert torch.tensor(list(together[1].tobytes())).sub(torch.tensor(list(alone.tobytes()))).abs().max() <= 1


@pytest.mark.usefixtures("torchao")
def test_planned_bytes_are_those_of_the_loaded_t5(tmp_path: Path):
    stable_diffusion_3(tmp_path)
    t5 = load_generator(_config(tmp_path)).pipeline.text_encoder_3
    assert sum(hasattr(weight, "qdata") for weight in t5.parameters()) > 1
    whole, planned = (
        {piece.name: piece.weights for piece in plan_generator(config, torch.float32).pieces}
        for config in (_config(tmp_path, model_settings__t5_8bit=False), _config(tmp_path))
    )
    assert planned["text_encoder_3"] == _bytes(t5) < whole["text_encoder_3"]
    assert planned | {"text_encoder_3": whole["text_encoder_3"]} == whole


@pytest.mark.usefixtures("torchao")
def test_weight_that_is_missing_is_refused_in_8_bits_too(tmp_path: Path):
    stable_diffusion_3(tmp_path)
    (file,) = (tmp_path / "text_encoder_3").glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("wo.weight"))
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match="without 1 weights of its text_encoder_3"):
        load_generator(_config(tmp_path))


@pytest.mark.usefixtures("torchao")
def test_pipeline_without_a_t5_is_one_line(tmp_path: Path):
    stable_diffusion_xl(tmp_path / "xl")
    stable_diffusion_3(tmp_path / "3")
    for folder, drop in (("xl", False), ("3", True)):
        with pytest.raises(ConfigError, match=r"t5_8bit: found true, but .* has no T5 here. Set false"):
            load_generator(_config(tmp_path / folder, model_settings__drop_t5=drop))


# --- without the library ----------------------------------------------------------------------------------------------


def test_missing_library_is_one_line(kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for setting, load in (
        ("t5_8bit", lambda: load_generator(_config(tmp_path))),
        ("base_8bit", lambda: load_policy(_policy_config(kit, tmp_path))),
    ):
        expected = rf"model_settings.{setting}: found true, but torchao is not installed\. Install it: pip install"
        with pytest.raises(ConfigError, match=expected) as error:
            load()
        assert "\n" not in str(error.value)
