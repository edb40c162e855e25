"""The reward `http` against real servers: the protocol, every way in which servers fail, and a run through them."""

import asyncio
import base64
import copy
import dataclasses
import io
import itertools
import json
import logging
import math
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.json_server import FAULTS, Raw, serving

from grpo_kit.config import PROJECT_ROOT, ConfigError, KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import RewardError, Rewards, load_rewards
from grpo_kit.rewards.http import HttpScorer, _asked_pause
from grpo_kit.rewards.loading import check_reward_settings
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes
from grpo_kit.training.loop import train

IMAGES = [render(scene) for scene in random_scenes(5, seed=3)]
TEXTS = ["a red circle", "two blue squares", "a pink ring", "a crimson ball", "an ‘azure’ 원"]
REWRITES = [f"{text}, sharp" for text in TEXTS]
QUICK = {"backoff": 0.01, "timeout": 30.0}
pytestmark = pytest.mark.field("remote and judge rewards")


def _pictures(asked: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in asked["images"]]


def _counting(asked: dict) -> dict:
    """Scores that say which row they are for."""
    return {"scores": [TEXTS.index(prompt) / 8 for prompt in asked["prompts"]]}


def _failure(scorer: HttpScorer) -> str:
    with pytest.raises(RewardError) as error:
        scorer(IMAGES, TEXTS, REWRITES)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


def _settings_error(**options: object) -> str:
    settings = {"weights": {"http": 1.0}, "options": {"http": options}}
    with pytest.raises(KitError) as error:
        check_reward_settings(load_config("tiny", {"reward_settings": settings}))
    return str(error.value)


# --- the protocol -----------------------------------------------------------------------------------------------------


def test_what_is_sent_is_what_the_document_says():
    with serving(_counting) as server:
        scorer = HttpScorer(url=f"{server.url}/score?model=x", batch_size=2, metadata=True)
        rows = [{"place": row} for row in range(5)]
        assert scorer(IMAGES, TEXTS, REWRITES, metadata=rows) == [0, 0.125, 0.25, 0.375, 0.5]
    assert [path for path, _, _ in server.calls] == ["/score?model=x"] * 3
    bodies = [body for *_, body in server.calls]
    assert sorted(bodies[0]) == ["enhanced_prompts", "images", "metadata", "prompts"]
    for name, column in (("prompts", TEXTS), ("enhanced_prompts", REWRITES), ("metadata", rows)):
        assert [one for body in bodies for one in body[name]] == column
    pictures = [picture for body in bodies for picture in _pictures(body)]
    assert all(
        got.format == "PNG" and got.tobytes() == one.tobytes() for got, one in zip(pictures, IMAGES, strict=True)
    )


def test_rows_own_pictures_are_sent_where_a_call_has_any():
    own = [[IMAGES[3], IMAGES[4]], None, None, None, [IMAGES[0]]]
    with serving(_counting) as server:
        HttpScorer(url=server.url, batch_size=2)(IMAGES, TEXTS, REWRITES, references=own)
    bodies = [body for *_, body in server.calls]
    assert ["references" in body for body in bodies] == [True, False, True]
    assert bodies[0]["references"][1] == []
    for body, place, pictures in ((bodies[0], 0, own[0]), (bodies[2], 0, own[4])):
        sent = [Image.open(io.BytesIO(base64.b64decode(text))) for text in body["references"][place]]
        assert [one.tobytes() for one in sent] == [one.tobytes() for one in pictures]


def test_jpeg_and_no_metadata():
    with serving(_counting) as server:
        HttpScorer(url=server.url, image_format="jpeg")(IMAGES, TEXTS, REWRITES)
    (call,) = server.calls
    assert "metadata" not in call[2] and {picture.format for picture in _pictures(call[2])} == {"JPEG"}


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ({"scores": [1, 0.5, None, -2.5, 1e-3]}, [1, 0.5, None, -2.5, 1e-3]),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ({"scores": [[0.5], [1.0], [None], [2], [3]], "model": "x"}, [0.5, 1.0, None, 2, 3]),
    ],
)
def test_answers_that_are_understood(answer: object, scores: list):
    with serving(lambda asked: answer) as server:
        assert HttpScorer(url=server.url)(IMAGES, TEXTS, REWRITES) == scores


def test_calls_at_the_same_time_keep_their_order():
    def slower_first(asked: dict) -> dict:
        time.sleep(0.02 * (4 - TEXTS.index(asked["prompts"][0])))
        return _counting(asked)

    with serving(slower_first) as server:
        scorer = HttpScorer(url=server.url, batch_size=1, concurrency=5)
        assert scorer(IMAGES, TEXTS, REWRITES) == [0, 0.125, 0.25, 0.375, 0.5]


def test_works_where_a_loop_runs_as_in_a_notebook_and_leaves_the_global_random_numbers():
    async def cell() -> list:
        return HttpScorer(url=server.url, **QUICK)(IMAGES, TEXTS, REWRITES)

    faults = iter(["500", "500", None])
    with serving(lambda asked: next(faults) or _counting(asked)) as server:
        before = random.getstate()
        assert len(asyncio.run(cell())) == 5 and random.getstate() == before


# --- failures ---------------------------------------------------------------------------------------------------------

WRONG = {
    "too few": ({"scores": [0.5] * 4}, r"status 200, application/json, '\{\"scores\": .*expected .*\[5 numbers"),
    "texts": ({"scores": ["a"] * 5}, "one for each picture"),
    "true": ({"scores": [True] * 5}, "5 numbers"),
    "another object": ({"detail": "ok"}, r"\{\"detail\": \"ok\"\}'; expected \{\"scores\""),
    "null": (None, "'null'; expected"),
    "a table": ({"scores": [[1, 2]] * 5}, "5 numbers"),
    "garbage": ("garbage", "expected JSON"),
    "a page": (Raw(200, b"<html>\n\x1b[31mlog in</html>", {"Content-Type": "text/html"}), "200, text/html, '<html>"),
    "not UTF-8": (Raw(200, b"\xff\xfe\x00"), "expected JSON"),
    "500": ("500", "found status 500, text/html, '<html>Internal Server Error</html>'; expected status 200"),
    "reset": ("reset", "ReadError|RemoteProtocolError|WriteError"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_answer_that_stays_wrong_is_one_line(wrong: str):
    answer, expected = WRONG[wrong]
    with serving(lambda asked: answer) as server:
        text = _failure(HttpScorer(url=f"{server.url}/score?user=me", retries=1, **QUICK))
    assert re.search(expected, text) and f"{server.url}/score: " in text and "user=me" not in text
    assert len(server.calls) == 2 and "try 2 of 2" in text


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_refusal_is_not_repeated(status: int):
    with serving(lambda asked: Raw(status, b'{"detail": "no"}')) as server:
        text = _failure(HttpScorer(url=server.url, **QUICK))
    assert f"found status {status}" in text and len(server.calls) == 1


@pytest.mark.parametrize("fault", [*FAULTS, "drip", Raw(429), Raw(503)])
def test_passing_fault_is_repeated_counted_and_logged_once(fault: object, caplog: pytest.LogCaptureFixture):
    faults = itertools.chain([fault, None, fault], itertools.repeat(None))
    with (
        serving(lambda asked: next(faults) or _counting(asked)) as server,
        caplog.at_level(logging.WARNING, "grpo_kit"),
    ):
        scorer = HttpScorer(url=server.url, backoff=0.01, timeout=0.5 if fault in ("hang", "drip") else 30)
        for _ in range(2):
            assert scorer(IMAGES, TEXTS, REWRITES) == [0, 0.125, 0.25, 0.375, 0.5]
    assert scorer.failed_tries >= 2 and len(server.calls) >= 4 and len(caplog.records) == 1


def test_server_that_asks_for_time_is_given_it():
    answers = iter([Raw(429, headers={"Retry-After": "1"}), None])
    with serving(lambda asked: next(answers) or _counting(asked)) as server:
        before = time.monotonic()
        HttpScorer(url=server.url, backoff=0.001)(IMAGES, TEXTS, REWRITES)
    assert time.monotonic() - before >= 1


def test_time_that_a_server_asks_for_is_a_number_or_a_date():
    assert [_asked_pause(value) for value in ("7", "0", "soon", "", "100000")] == [7, 0, 0, 0, 300]
    assert 50 < _asked_pause(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _asked_pause(formatdate(time.time() - 60, usegmt=True)) == 0


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch):
    pauses, sleep = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *a: pauses.append(seconds) or sleep(0, *a))
    with serving(lambda asked: "500") as server:
        _failure(HttpScorer(url=server.url, retries=8))
    pauses = [pause for pause in pauses if pause]
    assert len(pauses) == 8
    assert all(low / 2 <= pause <= low for pause, low in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True))


def test_call_that_fails_leaves_out_its_own_pictures(caplog: pytest.LogCaptureFixture):
    def answer(asked: dict) -> object:
        return Raw(400, b"this picture is not allowed") if TEXTS[2] in asked["prompts"] else _counting(asked)

    with serving(answer) as server:
        scores = HttpScorer(url=server.url, batch_size=2)(IMAGES, TEXTS, REWRITES)
    assert torch.tensor(scores).isnan().tolist() == [False, False, True, True, False]
    assert "status 400" in caplog.text and "1 of 3 calls gave no scores" in caplog.text


def test_server_that_is_not_there_is_refused_before_anything_is_drawn(kit: Experiment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
        settings = {"weights": {"http": 1.0}, "options": {"http": {"url": url}}}
        config = load_config(kit.config, {"reward_settings": settings})
        with pytest.raises(ConfigError, match=r"options.http: url: found http://127.*nobody answers .Conn") as error:
            load_rewards(config)
        assert "\n" not in str(error.value)
        load_rewards(load_config(config, {"reward_settings.weights": {"gold": 1.0}}))  # a run without its server


def test_server_that_goes_away_is_one_line_after_the_tries_of_one_call():
    with serving(_counting) as server:
        scorer = HttpScorer(url=f"{server.url}/score", batch_size=1, retries=2, backoff=0.01)
        assert len(scorer(IMAGES, TEXTS, REWRITES)) == 5
    text = _failure(scorer)
    assert text.startswith(f"{server.url}/score: ConnectError") and "try 3 of 3" in text and scorer.failed_tries == 3


def test_outage_is_treated_as_on_bad_reward_says():
    with serving(lambda asked: Raw(503)) as server:
        scorer = HttpScorer(url=server.url, retries=0)
        with pytest.raises(RewardError, match=r"reward 'http': http://127.*found status 503"):
            Rewards({"http": scorer}, {"http": 1.0}).score(IMAGES, TEXTS, REWRITES)
        rewards = Rewards({"http": scorer}, {"http": 1.0}, on_error="nan")
        assert rewards.score(IMAGES, TEXTS, REWRITES)["http"].isnan().all() and rewards.failures["http"] == 1


@pytest.mark.parametrize("wrong", [Raw(404), Raw(200, b"<html>"), {"scores": [1]}])
def test_server_that_cannot_score_ends_the_run_at_once_and_one_that_could_does_not(wrong: object):
    answers = itertools.chain([wrong, [1] * 5], itertools.repeat(wrong))
    with serving(lambda asked: next(answers)) as server:
        scorer = HttpScorer(url=server.url, retries=0)
        rewards = Rewards({"http": scorer}, {"http": 1.0}, on_error="nan")
        with pytest.raises(RewardError, match=r"reward 'http': http://127.*expected") as error:
            rewards.score(IMAGES, TEXTS, REWRITES)
        assert "a function" not in str(error.value)
        assert rewards.score(IMAGES, TEXTS, REWRITES)["http"].eq(1).all()
        assert rewards.score(IMAGES, TEXTS, REWRITES)["http"].isnan().all() and rewards.failures["http"] == 1


def test_name_of_ones_own_gets_its_rows_fields_and_may_abstain(kit: Experiment):
    fields = [{"place": row} for row in range(5)]

    def answer(asked: dict) -> list:
        return [None if row["place"] == 1 else row["place"] for row in asked["metadata"]]

    with serving(answer) as server:
        settings = {"weights": {"gold": 1.0, "places": 1.0}, "monitors": [], "threads": {"places": 2}}
        settings |= {"options": {"places": {"url": server.url, "metadata": True}}, "timeout": {"places": 60}}
        rewards = load_rewards(load_config(kit.config, {"reward_settings": settings}))
        scores = rewards.score(IMAGES, TEXTS, REWRITES, metadata=fields)
    assert scores["places"].tolist() == [0, float("inf"), 2, 3, 4]  # infinity: it abstained
    assert rewards.total(scores)[1] == scores["gold"][1] and len(server.calls) == 2


@pytest.mark.parametrize("place", [0, 3])
def test_a_picture_that_a_server_refuses_leaves_the_others_their_scores(place: int):
    asked = itertools.count()
    with serving(lambda _: Raw(400, b"too dark") if next(asked) == place else [0.5]) as server:
        scores = HttpScorer(url=server.url, batch_size=1)(IMAGES, TEXTS, REWRITES)
    assert [math.isnan(score) for score in scores] == [row == place for row in range(5)]


def test_rows_fields_that_json_cannot_hold_are_one_line_and_nothing_is_sent():
    with serving(_counting) as server:
        rewards = Rewards({"http": HttpScorer(url=server.url, metadata=True)}, {"http": 1.0})
        for value in (object(), float("nan")):
            with pytest.raises(RewardError, match=r"http': http://127.*: not asked, since JSON") as error:
                rewards.score(IMAGES, TEXTS, REWRITES, metadata=[{"scene": value}] * 5)
            assert "\n" not in str(error.value)
    assert server.calls == []


def test_local_server_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(_counting) as server:
        assert len(HttpScorer(url=server.url, retries=0)(IMAGES, TEXTS, REWRITES)) == 5


# --- settings and secrets ---------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused_before_a_model_is_loaded():
    assert "reward_settings.options.http.url: missing" in _settings_error()
    for url in ("localhost:8000", "ftp://host/score", "http://", "http://host /score", 8000):
        assert "allowed: http(s)://host/path" in _settings_error(url=url)
    assert "image_format: found 'gif', allowed: png, jpeg" in _settings_error(url="http://h", image_format="gif")
    assert "timeout: found 0" in _settings_error(url="http://h", timeout=0)
    assert "token_env: found 'sk-1234', allowed: an environment variable" in _settings_error(
        url="http://h", token_env="sk-1234"
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@h/score",
        "https://hunter2@h",
        "http://h/score?api_key=hunter2",
        "http://h?a=b&access_token=hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str):
    text = _settings_error(url=url)
    assert "hunter2" not in text and "token_env" in text


@pytest.mark.parametrize("url", ["http://[::1", "http://localhost:99999/x", "http://localhost:1/x?monkey=1"])
def test_address_that_cannot_be_is_one_line(url: str):
    with pytest.raises(RewardError, match=r"url: found .*nobody answers") as error:
        HttpScorer(url=url)
    assert "\n" not in str(error.value)


def test_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    with serving(lambda asked: Raw(401, b"who are you?")) as server:
        monkeypatch.delenv("MY_TOKEN", raising=False)
        with pytest.raises(RewardError, match="token_env: found MY_TOKEN, which is not set"):
            HttpScorer(url=server.url, token_env="MY_TOKEN")
        monkeypatch.setenv("MY_TOKEN", "hunter2\x1b")
        with pytest.raises(RewardError, match="which holds no plain text"):
            HttpScorer(url=server.url, token_env="MY_TOKEN")
        monkeypatch.setenv("MY_TOKEN", "hunter2\n")
        scorer = HttpScorer(url=server.url, token_env="MY_TOKEN")
        assert "hunter2" not in _failure(scorer) and "hunter2" not in repr(scorer)
    assert server.calls[0][1]["Authorization"] == "Bearer hunter2"


# --- a run ------------------------------------------------------------------------------------------------------------

RUN = {
    "training_settings.num_iterations": 3,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 3,
    "training_settings.save_every": 3,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
    "reward_settings.monitors": [],
    "reward_settings.options": {},
}


def _trained(kit: Experiment, folder: Path, name: str, **options: object) -> tuple[list[str], bytes]:
    """A run of three iterations on one reward: its metrics without times and names, and its weights."""
    settings = {"reward_settings.weights": {name: 1.0}}
    if options:
        settings[f"reward_settings.options.{name}"] = options
    config = load_config(kit.config, RUN | settings)
    rewards = load_rewards(config, kit.generator)
    if name == "clip_similarity":
        clip = rewards.parts[name]  # one by one, as the server is asked: a batch's last bits differ
        rewards = Rewards({name: lambda *columns: [float(clip(*row)) for row in _rows(*columns)]}, {name: 1.0})
    own = dataclasses.replace(kit, config=config, policy=copy.deepcopy(kit.policy), rewards=rewards)
    train(own, folder, progress=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [repr({key.replace(name, "x"): v for key, v in row.items() if "time" not in key}) for row in rows]
    return kept, (folder / "best" / "model.safetensors").read_bytes()


def _rows(*columns: Sequence) -> Iterator[list[list]]:
    for row in zip(*columns, strict=True):
        yield [[value] for value in row]


def test_run_through_a_server_that_fails_is_the_run_on_the_same_reward_here(
    kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clip, lock = kit.rewards.parts["clip_similarity"], threading.Lock()

    def answer(asked: dict) -> dict:
        with lock:
            return {"scores": clip(_pictures(asked), asked["prompts"], asked["enhanced_prompts"]).tolist()}

    local = _trained(kit, tmp_path / "local", "clip_similarity")
    monkeypatch.setenv("SCORER_TOKEN", "hunter2")
    with serving(answer, fault_rate=0.2, seed=14) as server:
        options = {"url": f"{server.url}/score", "token_env": "SCORER_TOKEN", "retries": 12, "backoff": 0.01}
        options |= {"timeout": 1, "batch_size": 1, "concurrency": 4}  # many calls, so that many fail
        remote = _trained(kit, tmp_path / "remote", "http", **options)
    assert set(server.faults) == set(FAULTS) and 0.1 < len(server.faults) / len(server.calls) < 0.3
    assert remote == local
    counts = re.findall(r"(\d+) tries failed so far", (tmp_path / "remote" / "training.log").read_text())
    assert int(counts[-1]) >= len(server.faults)
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    assert config["reward_settings"]["options"]["http"]["url"] == f"{server.url}/score"
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert not any(b"hunter2" in path.read_bytes() for path in files)


def test_server_of_the_document_works(tmp_path: Path):
    document = (PROJECT_ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "HTTPServer" in block]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert code.count("8000") == 1
    (tmp_path / "scorer.py").write_text(code.replace("8000", str(port)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "scorer.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                scorer = HttpScorer(url=f"http://127.0.0.1:{port}/score")
                break
            except RewardError:
                time.sleep(0.05)
        red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
        scores = scorer([red, blue], ["a red ball", "a red ball"], ["", ""])
    finally:
        process.terminate()
        process.wait()
    assert scores[0] > scores[1]
