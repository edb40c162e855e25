"""What docs/training.md says of a picture's time is its record, and how the record comes about."""

import json

import pytest

from benchmarks.studies import generator_time
from grpo_kit.config import PROJECT_ROOT

RECORD = json.loads((PROJECT_ROOT / "docs" / "generator_time.json").read_text(encoding="utf-8"))
TEXT = (PROJECT_ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_document_says_what_was_recorded():
    for part in generator_time.PARTS:
        columns = ("ms a picture", "at the best speed", "an iteration would be faster by")
        values = [f"{RECORD[name][part]:.{digits}f}" for name, digits in zip(columns, (1, 1, 2), strict=True)]
        assert f"| {part} | {' | '.join(values)} |" in TEXT
    for kind, value in RECORD["by kind"].items():
        assert kind == "else" or f"{kind} {value:.1f} ms" in TEXT
    shares = {name: f"{share:.0%}" for name, share in RECORD["iteration"].items()}
    text = " ".join(TEXT.split())
    assert f"Pictures are {shares['images']} of an iteration, rewards {shares['rewards']}" in text
    assert f"the step {shares['step']}. So neither" in text
    gains = RECORD["an iteration would be faster by"]
    assert max(gains["all text tokens"], gains["decoder"]) < 1.3  # "even if they cost nothing"
    assert f"without any text token, {gains['all text tokens']:.2f} times" in text
    assert f"it would be {gains['all at the best speed']:.2f} times as fast" in text
    assert f"steps would give, {gains['half the steps']:.2f} times" in text


def test_gains_follow_from_the_shares():
    spent = {"text encoders": 1.0, "transformer": 6.0, "decoder": 1.0}
    record = {"ms a picture": spent, "at the best speed": dict.fromkeys(spent, 1.0), "iteration": {"images": 0.5}}
    record["text's share of the transformer's tokens"] = 0.25
    found = generator_time.gains(record)
    assert found["transformer"] == pytest.approx(1 / (1 - 0.5 * 6 / 8))
    assert found["all text tokens"] == pytest.approx(1 / (1 - 0.5 * 2.5 / 8))
    assert found["half the steps"] == pytest.approx(1 / (1 - 0.5 * 3 / 8))
    assert found["all at the best speed"] == pytest.approx(1 / (1 - 0.5 * 5 / 8))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("addmm", "matrix products"),
        ("mkldnn_convolution", "convolutions"),
        ("gelu", "activations"),
        ("addcmul", "sums and products"),
        ("unheard_of", "else"),
    ],
)
def test_operations_have_a_kind(name: str, kind: str):
    assert generator_time._kind(name) == kind
