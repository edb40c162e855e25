"""Adapters that others made, or the kit itself: training goes on from them, and `grpo-kit merge` makes them whole."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.config_files import save_config
from support.families import FAMILIES, Family
from support.gpt2 import write_gpt2
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from grpo_kit.cli import main
from grpo_kit.config import PROJECT_ROOT, Config, KitError, load_config
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.adapters import merged
from grpo_kit.models.card import save_with_card
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.models.push import merge_run
from grpo_kit.rollout import collect_rollout
from grpo_kit.training.loop import train
from grpo_kit.training.step import grpo_step

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ONE = {
    "training_settings.num_iterations": 1,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-2,
    "training_settings.beta": 0.1,
    "training_settings.updates_per_rollout": 1,
    "evaluation_settings.validation_prompts": 2,
}
ASKED = ["a red circle", "two golden pyramids, at night"]


def _with_lora(base: object, **settings: object) -> Config:
    return load_config(base, {"model_settings.lora": LORA, **ONE} | settings)


def _moved(policy: Policy, seed: int = 0) -> Policy:
    """As if it had been trained."""
    source = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return policy


def _logprobs(policy: Policy, reference: bool = False) -> torch.Tensor:
    """Of the same ids for every policy of one vocabulary."""
    ids = torch.arange(10, 26).reshape(2, 8)
    with torch.no_grad():
        return policy.score(ASKED, torch.arange(2), ids, torch.ones_like(ids) > 0, reference=reference).logprobs


@pytest.fixture(scope="module")
def whole(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded policy in a folder outside of the project, as users have their models."""
    return Path(shutil.copytree(kit.config.model_settings.vlm_model, tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture(scope="module")
def run(kit: Experiment, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run with a LoRA policy in its `best/`, and that policy's log-probabilities."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = _with_lora(kit.config, **{"model_settings.vlm_model": str(whole)})
    policy = _moved(load_policy(config))
    save_with_card(policy, config, folder / "best", iteration=3)
    save_config(config, folder / "config.json")
    return folder, _logprobs(policy)


def _bare(run: Path, place: Path, **changes: object) -> Path:
    """The two files of a peft adapter alone."""
    place.mkdir(parents=True)
    shutil.copy(run / "best" / "adapter_model.safetensors", place)
    content = json.loads((run / "best" / "adapter_config.json").read_text()) | changes
    (place / "adapter_config.json").write_text(json.dumps(content))
    return place


def _named(form: str, run: Path, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The settings that name the run's adapter, in each of the forms in which people have one."""
    if form == "best":
        return {"vlm_model": str(run / "best")}
    if form == "bare":
        return {"vlm_model": str(_bare(run, place / "bare", base_model_name_or_path=str(whole)))}
    if form == "base elsewhere":
        adapter = _bare(run, place / "bare", base_model_name_or_path="/home/somebody/gone")
        return {"vlm_model": str(whole), "policy_adapter": str(adapter)}
    snapshot = place / "hub" / "models--somebody--adapter" / "snapshots" / ("0" * 40)  # as the hub's cache has it
    _bare(run, snapshot, base_model_name_or_path=str(whole))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(place / "hub"))
    return {"vlm_model": "somebody/adapter"}


@pytest.mark.field("F7")
@pytest.mark.parametrize("form", ["best", "bare", "base elsewhere", "hub id"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["goes on", "merged"])
def test_training_goes_on_from_an_adapter_and_its_reference_is_what_was_loaded(
    kit: Experiment,
    run: tuple[Path, torch.Tensor],
    whole: Path,
    form: str,
    lora: dict | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder, expected = run
    names = _named(form, folder, whole, tmp_path, monkeypatch)
    config = _with_lora(kit.config, **{f"model_settings.{key}": value for key, value in names.items()})
    config = load_config(config, {"model_settings.lora": lora})
    policy = load_policy(config)
    torch.testing.assert_close(_logprobs(policy), expected, atol=1e-5, rtol=0)
    assert torch.equal(_logprobs(policy), _logprobs(policy, reference=True))
    assert not torch.allclose(_logprobs(policy), _logprobs(kit.policy), atol=1e-2)
    rollout = collect_rollout(policy, kit.generator, kit.rewards, kit.train_prompts[:2], 4, 0)
    step = grpo_step(policy, torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2), rollout, config)
    assert step.metrics["kl"] == 0.0
    torch.testing.assert_close(_logprobs(policy, reference=True), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(_logprobs(policy), expected, atol=1e-4)


@pytest.mark.field("F7")
def test_continued_run_is_resumed_saved_and_continued_again(
    kit: Experiment, run: tuple[Path, torch.Tensor], whole: Path, tmp_path: Path
):
    folder, expected = run
    config = _with_lora(kit.config, **{"model_settings.vlm_model": str(folder / "best")})
    second = Experiment(config, load_policy(config), kit.generator, kit.rewards, kit.train_prompts, kit.val_prompts[:2])
    train(second, tmp_path / "second", progress=False)
    trained = _logprobs(second.policy)
    assert not torch.allclose(trained, expected, atol=1e-4)
    committed = tmp_path / "second" / "checkpoints" / "iter_000001" / "policy"
    again = load_policy(config, committed)
    assert torch.equal(_logprobs(again), trained) and torch.equal(
        _logprobs(again, True), _logprobs(second.policy, True)
    )
    # its saved form stands on the model below, not on the adapter that it went on from
    assert json.loads((committed / "adapter_config.json").read_text())["base_model_name_or_path"] == whole.name
    assert sorted(path.name for path in committed.glob("*.safetensors")) == ["adapter_model.safetensors"]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(whole), committed).eval()
    third = load_policy(_with_lora(kit.config, **{"model_settings.vlm_model": str(committed)}))
    assert torch.equal(_logprobs(third), trained) and torch.equal(_logprobs(third, True), trained)
    third.model = model
    torch.testing.assert_close(_logprobs(third), trained, atol=1e-5, rtol=0)
    card = (committed / "README.md").read_text()
    assert f"From `{whole.name}` with the adapter `best`" in card and f"from_pretrained('{whole.name}'" in card


@pytest.mark.field("F7")
def test_whole_weights_of_a_run_open_everywhere_and_answer_alike(
    kit: Experiment, run: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder, expected = run
    place = merge_run(folder, tmp_path / "whole")
    assert not list(place.glob("adapter*")) and "PeftModel" not in (place / "README.md").read_text()
    policy = load_policy(load_config(kit.config, {"model_settings.vlm_model": str(place)}))
    torch.testing.assert_close(_logprobs(policy), expected, atol=1e-5, rtol=0)
    policy.model = AutoModelForImageTextToText.from_pretrained(place).eval()
    torch.testing.assert_close(_logprobs(policy), expected, atol=1e-5, rtol=0)
    with pytest.raises(KitError, match="is there already"):
        merge_run(folder, tmp_path / "whole")
    with pytest.raises(KitError, match="best: holds whole weights: use it as it is"):
        merge_run(PROJECT_ROOT / "data" / "demo_run")


@pytest.mark.field("F7")
@pytest.mark.parametrize(
    "family", [one for one in FAMILIES if one.name in ("SmolVLM", "GPT-2", "Llama 3")], ids=lambda one: one.name
)
def test_adapters_of_peft_itself_are_gone_on_from(kit: Experiment, family: Family, tmp_path: Path):
    """As other trainers leave them: peft's own defaults, names of layers that peft chooses."""
    family.write(tmp_path / "base")
    kind = AutoModelForImageTextToText if family.sees else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    names = {"model_settings.vlm_model": str(tmp_path / "adapter"), "model_settings.lora": {"r": 4, "alpha": 8}}
    found = {}
    for lora in (names["model_settings.lora"], None):
        policy = load_policy(load_config(kit.config, names | {"model_settings.lora": lora}))
        assert torch.equal(_logprobs(policy), _logprobs(policy, reference=True))
        found[lora is None] = _logprobs(policy)
    policy.model = adapted.eval()
    for logprobs in found.values():
        torch.testing.assert_close(logprobs, _logprobs(policy), atol=1e-5, rtol=0)


# --- what is refused --------------------------------------------------------------------------------------------------


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _one_lost(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "adapter_model.safetensors")


def _one_more(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    extra = {key.replace("layers.0", "layers.7"): value + 0 for key, value in weights.items()}
    save_file(weights | extra, folder / "adapter_model.safetensors")


REFUSED = {
    "weight lost": (_one_lost, {}, r"file lacks 1 weights and has 0 .*\(.*lora_A"),
    "weights left over": (_one_more, {}, "lacks 0 weights and has 4 that Qwen2_5_VL"),
    "cut off": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100), {}, "fetch the adapter"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), {}, "could not load the adapter"),
    "configuration cut off": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 4,'),
        {},
        "a file there is missing or damaged: fetch or copy it again",
    ),
    "rank of another file": (_edit(r=8), {"lora.r": 8}, "size mismatch"),
    "rank of other settings": (
        _edit(),
        {"lora.r": 16},
        r"lora: found r 16, but the adapter '.*' has r 4\. Set lora so",
    ),
    "layers of other settings": (_edit(), {"lora.target_modules": ["k_proj"]}, r"found target_modules \['k_proj'\]"),
    "other kind": (_edit(peft_type="IA3"), {}, "of kind 'IA3', allowed: 'LORA'"),
    "base gone": (_edit(base_model_name_or_path="/gone/model"), {}, "trained on '/gone/model', which is not here. Set"),
    "base unknown": (_edit(base_model_name_or_path="policy"), {}, "model below the adapter .*: set vlm_model to where"),
    "base not named": (_edit(base_model_name_or_path=None), {}, "trained on None, which is not here"),
}


@pytest.mark.field("F7")
@pytest.mark.parametrize("case", REFUSED)
def test_adapter_that_does_not_fit_is_one_line(
    kit: Experiment, run: tuple[Path, torch.Tensor], whole: Path, case: str, tmp_path: Path
):
    damage, settings, said = REFUSED[case]
    adapter = _bare(run[0], tmp_path / "adapter", base_model_name_or_path=str(whole))
    damage(adapter)
    changes = {f"model_settings.{key}": value for key, value in settings.items()}
    with pytest.raises(KitError, match=said) as error:
        load_policy(_with_lora(kit.config, **{"model_settings.vlm_model": str(adapter)} | changes))
    assert "\n" not in str(error.value) and "git checkout" not in str(error.value)


@pytest.mark.field("F7")
def test_adapter_of_another_model_is_one_line_and_so_are_two_at_once(
    kit: Experiment, run: tuple[Path, torch.Tensor], tmp_path: Path
):
    adapter = str(run[0] / "best")
    write_gpt2(tmp_path / "gpt2")
    (llama,) = (one for one in FAMILIES if one.name == "Llama 3")
    llama.write(tmp_path / "llama")
    for base, named, said in (
        ("gpt2", adapter, "onto GPT2LMHeadModel .*Target modules .* not found"),
        ("llama", adapter, "whose file lacks 8 weights"),
        ("llama", str(tmp_path / "llama"), "policy_adapter: found .*llama', allowed: the folder or hub id of a peft"),
        (adapter, adapter, "vlm_model: found .*best', allowed: .* of the whole model below policy_adapter"),
    ):
        names = {"model_settings.vlm_model": str(tmp_path / base), "model_settings.policy_adapter": named}
        with pytest.raises(KitError, match=said) as error:
            load_policy(_with_lora(kit.config, **names))
        assert "\n" not in str(error.value)


def test_misfit_is_told_of_before_any_model_is_loaded(kit: Experiment, run: tuple[Path, torch.Tensor]):
    names = {"model_settings.vlm_model": str(run[0] / "best"), "model_settings.sd_model": "/gone"}
    with pytest.raises(KitError, match="but the adapter"):
        load_experiment(load_config(_with_lora(kit.config, **names), {"model_settings.lora.r": 2}))


def test_adapter_on_shared_embeddings_is_not_merged_but_gone_on_from(kit: Experiment, tmp_path: Path):
    write_gpt2(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    names = {"model_settings.vlm_model": str(tmp_path / "adapter")}
    with pytest.raises(KitError, match="embeddings that the language head shares, which cannot be merged"):
        load_policy(load_config(kit.config, names | {"model_settings.lora": None}))
    policy = load_policy(load_config(kit.config, names | {"model_settings.lora": {"r": 4, "alpha": 8}}))
    assert torch.equal(_logprobs(policy), _logprobs(policy, reference=True))


@pytest.mark.parametrize("tied", ["whole", "text"])
def test_shared_embeddings_are_seen_in_whichever_config_says_so(kit: Experiment, tied: str):
    model = copy.deepcopy(kit.policy.model)
    configs = {"text": model.config.get_text_config(), "whole": model.config}
    for name, config in configs.items():
        config.tie_word_embeddings = name == tied
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(KitError, match="cannot be merged"):
        merged(adapted)


def test_merge_is_a_command(run: tuple[Path, torch.Tensor], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as done:
        main(["merge", str(run[0])])
    assert done.value.code == 0 and capsys.readouterr().out == f"written: {run[0] / 'merged'}\n"
    with pytest.raises(SystemExit) as done:
        main(["merge", str(run[0])])
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and "is there already" in said
