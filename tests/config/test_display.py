"""Public objects show themselves: one short line, and in a notebook HTML in which nothing runs, bounded in size."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.hostile import active_nodes, hostile_texts, image_count

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT, display
from grpo_kit.config.prompts import Prompts
from grpo_kit.evaluation.evaluate import EvalResult
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import LossOutput
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rollout import Rollout
from grpo_kit.runs.record import read_run
from grpo_kit.training.loop import TrainResult
from grpo_kit.training.step import StepStats

DEMO = PROJECT_ROOT / "data" / "demo_run"
HTML_LIMIT = 300_000  # of any view: a notebook with several stays small
TEXTS = [*hostile_texts(200), "빨간 공과 파란 상자" * 300, "\x00\x01\udc80" * 99, "🔥" * 5000, "x" * 10**6]
TEXTS.append("شیرینی\u200cفروشی")


@pytest.fixture(scope="module")
def evaluation(kit: Experiment) -> EvalResult:
    """Two prompts, in three variants, from one latent."""
    return gk.evaluate(kit, kit.val_prompts[:2], seeds_per_prompt=1, paraphrases=False)


def hostile_rollout(rollout: Rollout, groups: int, size: int) -> Rollout:
    """A rollout of many rows whose texts and reward names are hostile, with pictures missing and rewards NaN."""
    count = groups * size
    texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    noise = np.random.default_rng(0).integers(0, 255, (700, 500, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), None, Image.fromarray(noise[:, :, 0]), Image.new("RGBA", (3, 90))]
    rewards = torch.linspace(-1, 1, count).double()
    rewards[::7], rewards[1::11] = torch.nan, torch.inf
    return dataclasses.replace(
        rollout,
        prompts=[gk.Prompt(text, text, text, {text: text}) for text in texts[:groups]],
        group_ids=torch.arange(groups).repeat_interleave(size),
        enhanced_prompts=texts,
        images=[[pictures[i % 4]] for i in range(count)],
        reward_parts={text: rewards for text in TEXTS[:30]},
        rewards=rewards,
    )


def hostile_evaluation(result: EvalResult) -> EvalResult:
    """An evaluation of many metrics and variants with hostile names."""
    found = {"mean": float("nan"), "low": None, "high": 1.0}
    metrics = {name: found for name in ["reward", *TEXTS[:60]]}
    variants = {name: metrics for name in ["raw", *TEXTS[:50]]}
    return dataclasses.replace(result, results={**result.results, "variants": variants, "differences": variants})


@pytest.fixture(scope="module")
def objects(kit: Experiment, rollout: Rollout, evaluation: EvalResult) -> dict[str, object]:
    """One of each public object, and some of hostile texts, of thousands of rows, of nothing."""
    policy = kit.policy
    encoded = policy.encode(["a red ball", "two boxes"])
    completions = policy.sample(encoded, 2, seed=0)
    groups = torch.tensor([0, 0, 1, 1])
    scores = policy(encoded, groups, completions.ids, completions.mask)
    many = {f"metric {i} {text[:99]}": float(i) for i, text in enumerate(TEXTS)}
    settings = {"training_settings.group_size": 8, "generation_settings.temperature": 0.7}
    long = {"model_settings.instruction": "빨간 <script>alert(1)</script> {prompt}" * 1 + "x" * 5000}
    rewards = {text[:80] + str(i): lambda *columns: [0.0] for i, text in enumerate(TEXTS)}
    samples = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    return {
        "rollout": rollout,
        "hostile rollout": hostile_rollout(rollout, 250, 40),
        "own samples": type(rollout).__mro__[1](**{k: v for k, v in samples.items() if k not in _OF_REWARDS}),
        "evaluation": evaluation,
        "hostile evaluation": hostile_evaluation(evaluation),
        "empty evaluation": EvalResult(pd.DataFrame(), {}, {}),
        "experiment": kit,
        "config": kit.config,
        "changed config": gk.load_config(kit.config, settings),
        "long config": gk.load_config("tiny", long),
        "section": kit.config.training_settings,
        "trained": TrainResult(Path("run"), 7, 0, {"reward": 0.25, "loss": float("nan")}),
        "hostile trained": TrainResult(Path(TEXTS[0] * 9), 7, 0, many, TEXTS[3]),
        "prompts": kit.train_prompts,
        "slice": kit.train_prompts[:3],
        "no prompts": Prompts(),
        "hostile prompts": Prompts(gk.Prompt(text, text, text, {text: text}) for text in TEXTS * 50),
        "prompt": kit.train_prompts[0],
        "policy": policy,
        "generator": kit.generator,
        "rewards": kit.rewards,
        "hostile rewards": Rewards(rewards, dict.fromkeys(rewards, 1.0), {"<b>": rewards[min(rewards)]}),
        "stats": StepStats(many, rollout.rewards, 1, 0),
        "loss": LossOutput(torch.tensor(0.5, requires_grad=True), {f"clip_ratio/{i}": i / 7 for i in range(99)}),
        "encoded": encoded,
        "completions": completions,
        "scores": scores,
        "record": read_run(DEMO),
        "samples of one group": dataclasses.replace(rollout, group_ids=torch.zeros(12, dtype=torch.int64)),
    }


_OF_REWARDS = ("rewards", "totals", "ref_logprobs")


@pytest.mark.field("F18")
def test_every_object_is_one_short_line(objects: dict[str, object]):
    for name, shown in objects.items():
        for text in (repr(shown), str(shown)):
            assert len(text) <= 200 and text.replace("\u200c", "").isprintable(), (name, text)
            text.encode("utf-8")  # no half characters
    long = [gk.Prompt(text, text, text, {text: text}) for text in TEXTS]
    assert all(len(repr(prompt)) <= 200 for prompt in long)
    assert repr(gk.Prompt("a cat")) == "Prompt(user_prompt='a cat', category='basic', difficulty='medium', metadata={})"


@pytest.mark.field("F18")
def test_every_view_is_bounded_and_runs_nothing(objects: dict[str, object]):
    views = {name: shown._repr_html_() for name, shown in objects.items() if hasattr(shown, "_repr_html_")}
    assert set(objects) - set(views) <= {"loss"}
    for name, view in views.items():
        assert active_nodes(view) == [], name
        assert len(view.encode("utf-8")) < HTML_LIMIT, (name, len(view))
    assert image_count(views["rollout"]) == 12 and image_count(views["hostile rollout"]) == 27  # of 32, 5 are None
    assert "250 groups, 4 shown" in views["hostile rollout"] and "4 of 40" in views["hostile rollout"]
    assert "advantage" in views["rollout"] and views["evaluation"].count("</tr>") > 5
    assert "initial policy" in views["evaluation"] and "[" in views["evaluation"]


def test_a_config_shows_what_differs_from_its_profile():
    config = gk.load_config("tiny", {"training_settings.group_size": 12, "training_settings.beta": 0.5})
    assert config.changes() == {"training_settings.beta": (0.5, 0.04), "training_settings.group_size": (12, 8)}
    assert repr(config) == "Config(profile=tiny, group_size=12, beta=0.5)"
    assert "as the profile tiny" in gk.load_config("tiny")._repr_html_()
    assert all(gk.load_config(name).changes() == {} for name in ("tiny", "workshop", "full", "classic", "gpu_16gb"))


def test_a_rollouts_view_says_what_the_advantages_are(rollout: Rollout):
    view = rollout._repr_html_()
    rows = rollout.group_ids == 0
    advantages = gk.group_advantages(rollout.rewards[rows], rollout.group_ids[rows])
    for reward, advantage in zip(rollout.rewards[rows].tolist(), advantages.tolist(), strict=True):
        assert f"{reward:.3f}, advantage {advantage:+.2f}".replace("-", "−") in view


def test_a_view_shows_exactly_its_texts():
    assert display.cell("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert display.cell(display.Html("<i>x</i>")) == "<i>x</i>"
    assert display.cut("빨간 공 👩‍🎨 नमस्ते") == "빨간 공 👩‍🎨 नमस्ते"  # joiners stay: they are inside words
    assert display.cut("a\u202eb\x1b[31m\n") == "a\\u202eb\\x1b[31m "
    assert display.brief({"a": 1.0, "b": torch.zeros(2, 3)}) == "a: 1, b: (2, 3) float32"
    sizes = {"F": (4, 4), "I;16": (4, 4), "1": (900, 1), "P": (1, 1)}
    for odd in (None, "text", np.zeros((3, 3)), *(Image.new(mode, size) for mode, size in sizes.items())):
        assert active_nodes(display.picture(odd)) == []


@pytest.mark.field("F18")
def test_a_notebook_shows_the_views_without_widgets_or_the_shows_import(tmp_path: Path):
    """Executed by a real kernel: each object as a cell's last line, in a fresh process that imports nothing else."""
    from nbclient import NotebookClient

    start = "import grpo_kit as gk\nconfig = gk.load_config('tiny', {'training_settings.group_size': 12})"
    cells = [start, "config", "config.training_settings", "gk.load_prompts(config.training_settings.train_prompts)"]
    cells.append("import sys\n[name for name in sys.modules if name == 'torch' or name.startswith('grpo_kit.show')]")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [cell.outputs[0].data for cell in notebook.cells[1:]]
    for data in shown[:-1]:
        assert set(data) == {"text/plain", "text/html"} and len(data["text/plain"]) <= 200
    assert "group_size" in shown[0]["text/html"] and "categories" in shown[2]["text/plain"]
    assert shown[-1]["text/plain"] == "[]"


def test_a_plain_import_of_the_display_loads_no_library():
    code = "import sys, grpo_kit.config.display; print(*{'torch', 'PIL', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "" and found.returncode == 0, found.stderr
