"""A saved policy under the oldest version of transformers that its card names, and under one that is older."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.policy_forms import LORA, new_adapter, with_moved_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import save_with_card
from grpo_kit.models.policy import load_policy

OLDEST = ("transformers==5.0.0", "huggingface_hub==1.3.4", "tokenizers==0.22.2", "peft==0.18.0")
OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
READ = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
for kind, folder, base in [line.split("|") for line in sys.argv[1:]]:
    model, info = globals()[kind].from_pretrained(base or folder, output_loading_info=True)
    assert not info["missing_keys"], info
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(10, 26)[None]).logits
    print("read", logits.double().sum().item(), AutoTokenizer.from_pretrained(folder)("a red circle").input_ids)
"""


def _read(packages: tuple[str, ...], folder: Path, cases: list[str]) -> subprocess.CompletedProcess:
    """What versions that stand in a folder of their own read from saved policies."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    if subprocess.run([*install, *packages], capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached")
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, *cases]
    return subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.field("F9")
def test_saved_policies_open_under_the_oldest_version_that_their_card_names(kit: Experiment, tmp_path: Path):
    cases, expected = [], []
    for family in [one for one in FAMILIES if one.name in ("Qwen2.5-VL", "SmolVLM", "Llama 3")]:
        family.write(tmp_path / "base")
        config = load_config(kit.config, {"model_settings.vlm_model": str(tmp_path / "base")})
        folder = tmp_path / family.name
        policy = load_policy(config)
        save_with_card(policy, config, folder, 1)
        kind = AutoModelForImageTextToText if family.sees else AutoModelForCausalLM
        cases.append(f"{kind.__name__}|{folder}|")
        expected.append((policy.model, policy.tokenizer))
    adapted = with_moved_adapter(new_adapter(kit))
    save_with_card(adapted, load_config(kit.config, {"model_settings.lora": LORA}), tmp_path / "adapter", 1)
    base = kit.config.model_settings.vlm_model
    cases.append(f"AutoModelForImageTextToText|{tmp_path / 'adapter'}|{base}")
    expected.append((adapted.model, adapted.tokenizer))
    done = _read(OLDEST, tmp_path / "oldest", cases)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("read ")]
    for (total, ids), (model, tokenizer) in zip(lines, expected, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.arange(10, 26)[None]).logits
        assert float(total) == pytest.approx(logits.double().sum().item(), abs=1e-2)
        assert ids == str(tokenizer("a red circle").input_ids)
    for case in cases:
        card = (Path(case.split("|")[1]) / "README.md").read_text()
        assert "With transformers 5.0 or newer" in card and ("peft 0.18 or newer" in card) == ("adapter" in case)
    assert _read(OLDER, tmp_path / "older", cases[:1]).returncode, "the card would name a version that is too new"
