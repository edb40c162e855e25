"""The playgrounds of the site in a real browser without a network: each number on a page is the kit's.

A page here is its HTML with the scripts and the data of the site, without Sphinx's frame around it.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT, TrainingSettings
from grpo_kit.runs.record import read_run
from grpo_kit.show.pushes import recompute
from tools.site_numbers import RUN, write_playgrounds
from tools.site_words import speaker

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]

SITE = PROJECT_ROOT / "docs" / "site"
SECOND_GROUP = [0.9, 0.7, 0.3, 0.1]
DEFINITIONS = [
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"scale_rewards": "none", "baseline": "leave_one_out"},
]
PRESETS = {"PPO, GRPO: 0.2, 0.2": (0.2, "token"), "DAPO: 0.2, 0.28": (0.28, "token")}
PRESETS["GSPO: one ratio a rewrite"] = (0.2, "sequence")
PLAYGROUNDS = ["advantages", "loss", "groups", "methods"]
NAMES = {"PPO", "GRPO", "DAPO", "GSPO", "Dr. GRPO", "REINFORCE"}  # which are the same in Korean
SET = """([id, value]) => { const control = document.getElementById(id); control.value = value;
    control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input')); }"""
NUMBERS = "cells => cells.map(cell => [Number(cell.dataset.value), cell.textContent])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("playgrounds")
    shutil.copytree(SITE / "static", root / "_static")
    write_playgrounds(SITE / "playgrounds", root, root)
    for language, up, pages in (("en", "..", "playgrounds/*.html"), ("ko", "../..", "ko/playgrounds/*.html")):
        head = f'<!doctype html><html lang="{language}"><meta charset="utf-8"><title>x</title>'
        head += f'<link rel="stylesheet" href="{up}/_static/site.css">'
        for path in root.glob(pages):
            path.write_text(f"{head}<main>{path.read_text(encoding='utf-8')}</main>", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(folder: Path, browser: sync_api.Browser) -> Iterator[Callable[..., sync_api.Page]]:
    """Open a playground offline; errors of its scripts fail the test. `replaced` is a pair of texts in grpo.js.

    A name may start with `ko/`, for the Korean page.
    """
    context = browser.new_context(viewport={"width": 360, "height": 800})
    context.set_offline(True)
    complaints: list[str] = []

    def show(name: str, replaced: tuple[str, str] | None = None) -> sync_api.Page:
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        if replaced is not None:
            script = (SITE / "static" / "grpo.js").read_text(encoding="utf-8")
            assert replaced[0] in script
            body = script.replace(*replaced)
            page.route("**/grpo.js", lambda route: route.fulfill(body=body, content_type="text/javascript"))
        language, _, name = name.rpartition("/")
        page.goto((folder / language / "playgrounds" / f"{name}.html").as_uri())
        return page

    yield show
    context.close()
    assert complaints == []


def move(page: sync_api.Page, **values: object) -> None:
    """Set sliders and choices by their ids, as a hand would."""
    for name, value in values.items():
        page.evaluate(SET, [name, str(value)])


def numbers(page: sync_api.Page, selector: str, digits: int) -> np.ndarray:
    """The exact numbers behind the elements; what is shown must be these, rounded."""
    found = page.locator(selector).evaluate_all(NUMBERS)
    assert found
    for value, text in found:
        shown = float(text.split()[0].replace("−", "-").replace("+", ""))
        assert abs(shown - value) <= 0.5001 * 10**-digits, (value, text)
    return np.array([value for value, _ in found])


# --- advantages and loss: computed in the browser ---------------------------------------------------------------------


def check_advantages(page: sync_api.Page) -> None:
    """Compare the table with `group_advantages` for groups of every size."""
    draw = random.Random(0)
    for size in (8, 2, 3, 5, 7, 8):
        rewards = [round(draw.random(), 3) for _ in range(size)]
        move(page, size=size, **{f"r{number}": reward for number, reward in enumerate(rewards, 1)})
        found = numbers(page, "#advantages td", 2).reshape(size + 4, 4)
        both = torch.tensor([*rewards, *SECOND_GROUP], dtype=torch.float64)
        groups = torch.tensor([0] * size + [1] * 4)
        expected = [gk.group_advantages(both, groups, **how).numpy() for how in DEFINITIONS]
        np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-9)


def kit_loss(ratios: list[float], advantage: float, high: float, level: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Each token's loss and push, and the rewrite's loss, by `grpo_loss` and autograd."""
    old = torch.full((1, 4), 0.2, dtype=torch.float64).log()
    logprobs = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    weights, mask = torch.full_like(old, 0.25).requires_grad_(), torch.ones_like(old, dtype=torch.bool)
    settings = dict(epsilon=0.2, epsilon_high=high, importance_sampling_level=level)
    row = torch.tensor([advantage], dtype=torch.float64)
    output = gk.grpo_loss(logprobs, row, mask, old_logprobs=old, weights=weights, **settings)
    gradient, losses = torch.autograd.grad(output.loss, [logprobs, weights])
    return losses.numpy()[0], -gradient.numpy()[0], output.loss.item()


def check_loss(page: sync_api.Page) -> None:
    """Compare the tokens' losses and pushes with the kit's for each method."""
    draw = random.Random(1)
    say = speaker(page.evaluate("document.documentElement.lang"))
    for name, (high, level) in PRESETS.items():
        page.get_by_role("button", name=say(name)).click()
        for advantage in (1.0, -0.7, 1.6, -2.0):
            ratios = [round(draw.uniform(0.3, 2.0) // 0.01 * 0.01, 2) for _ in range(4)]
            ratios[0] = 1.24  # between the two upper bounds
            ratios = [ratio + 0.01 if ratio in (0.8, 1.2, 1.28) else ratio for ratio in ratios]  # not on an edge
            move(page, advantage=advantage, **{f"ratio{n}": ratio for n, ratio in enumerate(ratios, 1)})
            losses, pushes, loss = kit_loss(ratios, advantage, high, level)
            np.testing.assert_allclose(numbers(page, "#tokens td:nth-child(4)[data-value]", 3)[:4], losses, atol=1e-9)
            np.testing.assert_allclose(numbers(page, "#tokens td:nth-child(5)[data-value]", 3), pushes, atol=1e-9)
            np.testing.assert_allclose(numbers(page, "#loss", 3), loss, atol=1e-9)
            stops = page.locator("#tokens td:nth-child(6)").all_inner_texts()[:4]
            assert [text == say("stops it") for text in stops] == [push == 0 for push in pushes]


CHECKS = {"advantages": check_advantages, "loss": check_loss}


@pytest.mark.parametrize("name", ["advantages", "loss", "ko/advantages", "ko/loss"])
def test_what_a_page_computes_is_what_the_kit_computes(name: str, opened: Callable[..., sync_api.Page]):
    CHECKS[name.removeprefix("ko/")](opened(name))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("advantages", "(values.length - 1)", "values.length"),
        ("advantages", "own.length / (own.length - 1)", "1"),
        ("advantages", '(scale === "group" ? grpo.deviation(own) : everyone)', "grpo.deviation(own)"),
        ("advantages", "eps = 1e-4", "eps = 1e-8"),
        ("loss", "ratio <= 1 + high", "ratio <= 1 + low"),
        ("loss", "-Math.min(free, held)", "-Math.max(free, held)"),
        ("loss", "free < held ? freePush", "true ? heldPush"),
        ("loss", "Math.exp(grpo.mean(ratios.map(Math.log)))", "grpo.mean(ratios)"),
        ("loss", "push: push / count", "push"),
    ],
)
def test_a_wrong_formula_is_noticed(name: str, right: str, wrong: str, opened: Callable[..., sync_api.Page]):
    with pytest.raises(AssertionError, match=r"Not equal to tolerance"):
        CHECKS[name](opened(name, replaced=(right, wrong)))


def test_a_reward_that_is_missing_is_left_out_as_the_kit_does(opened: Callable[..., sync_api.Page]):
    page = opened("advantages")
    rewards, groups = [0.3, float("nan"), 0.9, 0.4, float("nan"), 0.7], [0, 0, 0, 1, 1, 2]
    both = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    given = [None if reward != reward else reward for reward in rewards]
    for how in DEFINITIONS:
        names = {"scale": how["scale_rewards"], "baseline": how.get("baseline", "mean")}
        script = "([r, g, how]) => grpo.groupAdvantages(r.map(x => x ?? NaN), g, how)"
        found = page.evaluate(script, [given, groups, names])
        np.testing.assert_allclose(found, gk.group_advantages(*both, **how).numpy(), atol=1e-9)


# --- groups and methods: recorded, and computed when the site is built ------------------------------------------------


def test_the_groups_are_those_of_the_run(opened: Callable[..., sync_api.Page]):
    page, record = opened("groups"), read_run(RUN)
    move(page, order="sample")
    options = page.locator("#group option").all_inner_texts()
    assert len(options) == 16
    for number, option in enumerate(options):
        move(page, group=number)
        rows = record.rollout(int(option.split()[1].rstrip(":")))
        rows = rows[rows["user_prompt"] == option.partition(": ")[2]]
        assert page.locator("#cards li > p:last-child").all_inner_texts() == rows["enhanced_prompt"].tolist()
        rewards = torch.tensor(rows["reward"].to_numpy(float))
        for scale, how in zip(("group", "none", "leave_one_out"), [DEFINITIONS[n] for n in (0, 2, 3)], strict=True):
            move(page, scale=scale)
            expected = gk.group_advantages(rewards, torch.zeros(len(rows), dtype=torch.long), **how)
            np.testing.assert_allclose(numbers(page, "#cards strong", 2), expected.numpy(), atol=1e-9)
        move(page, scale="recorded")
        np.testing.assert_allclose(numbers(page, "#cards strong", 2), rows["advantage"], atol=1e-9)
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 32)")


def expected_of(rows: pd.DataFrame, longest: int) -> dict[str, list[SimpleNamespace]]:
    """What each method makes of the step at both moments, by other functions of the kit and by hand."""
    rewards, lengths = rows["reward"].to_numpy(), rows["completion_ids"].map(len).to_numpy()
    settings = {
        "GRPO": TrainingSettings.model_construct(beta=0.0),
        "DAPO": TrainingSettings.model_construct(beta=0.0, loss_type="dapo", epsilon_high=0.28),
        "Dr. GRPO": TrainingSettings.model_construct(beta=0.0, loss_type="dr_grpo", scale_rewards="none"),
        "PPO": TrainingSettings.model_construct(beta=0.0, loss_type="bnpo"),
    }
    found = {}
    for name, one in settings.items():
        table = rows.assign(group_id=0) if name == "PPO" else rows
        found[name] = [recompute(table, one, longest, after) for after in (False, True)]
    push = rewards * lengths
    whole = np.full(len(rows), 1 / len(rows))
    found["REINFORCE"] = [SimpleNamespace(advantages=rewards, weights=whole, shares=push / np.abs(push).sum())] * 2
    return found


def test_the_five_methods_are_the_kits(opened: Callable[..., sync_api.Page]):
    page, record = opened("methods"), read_run(RUN)
    rows = record.rollout(record.rollout_iterations[1])
    expected = expected_of(rows, record.config["generation_settings"]["max_new_tokens"])
    names = page.locator("#numbers thead th").all_inner_texts()[1:]
    assert sorted(names) == sorted(expected)
    for number, (_, group) in enumerate(rows.groupby("group_id")):
        ranked = group.sort_values("reward", ascending=False, kind="stable").index.to_numpy()
        for moment in (0, 1):
            for measure, factor, digits in (("advantages", 1, 2), ("weights", 1000, 2), ("shares", 100, 1)):
                move(page, group=number, moment=moment, measure=measure)
                found = numbers(page, "#numbers td[data-value]", digits).reshape(len(group), len(names))
                kits = [factor * getattr(expected[name][moment], measure)[ranked] for name in names]
                np.testing.assert_allclose(found, np.stack(kits, axis=1), atol=2e-5)
        move(page, measure="held")
        assert numbers(page, "#numbers td[data-value]", 0).min() >= 0


# --- words ------------------------------------------------------------------------------------------------------------


SEEN = """() => [...document.querySelectorAll('main *')].filter(one => one.tagName !== 'SCRIPT').flatMap(one => [
    ...[...one.childNodes].filter(node => node.nodeType === 3).map(node => node.data),
    one.getAttribute('aria-label'), one.getAttribute('alt')]).map(text => text?.trim()).filter(text => text)"""


def english(page: sync_api.Page, data: set[str]) -> list[str]:
    """What a Korean page says without a Korean letter, though it has a word: not a prompt of the run, not a name."""
    seen = page.evaluate(SEEN)
    return [text for text in seen if re.search("[A-Za-z]{2}|[{}]", text) and text not in data and not is_korean(text)]


def is_korean(text: str) -> bool:
    """Whether it has a Korean letter and nothing of a hole that was not filled."""
    return re.search("[가-힣]", text) is not None and re.search("undefined|[{}]", text) is None


def told_after_each_control(page: sync_api.Page) -> Iterator[None]:
    """Put every choice to each of its options and every slider to its ends, and press every button."""
    for select in page.locator("select").all():
        for number in range(select.locator("option").count()):
            if select.is_enabled():
                select.select_option(index=number)
                yield
    for name in page.locator("input[type=range]").evaluate_all("all => all.map(one => one.id)"):
        for end in ("min", "max"):
            move(page, **{name: page.locator(f"#{name}").get_attribute(end)})
            yield
    for control in page.locator("button, input[type=radio]").all():
        control.click()
        yield


@pytest.mark.parametrize("name", PLAYGROUNDS)
def test_a_korean_page_is_korean_whatever_is_moved(name: str, opened: Callable[..., sync_api.Page]):
    page, record = opened(f"ko/{name}"), read_run(RUN)
    tables = [record.rollout(iteration) for iteration in record.rollout_iterations]
    data = NAMES | {text for rows in tables for text in [*rows["user_prompt"], *rows["enhanced_prompt"]]}
    data |= {"PPO, GRPO: 0.2, 0.2", "DAPO: 0.2, 0.28"}
    told = {page.inner_text("#told")}
    for _ in told_after_each_control(page):
        told.add(page.inner_text("#told"))
        assert english(page, data) == []
    assert len(told) > 3 and all(is_korean(text) for text in told)


@pytest.mark.parametrize("wrong", ["values[9]", "`{${place}}`"])
def test_a_hole_that_is_not_filled_is_noticed(wrong: str, opened: Callable[..., sync_api.Page]):
    right = 'values[place === "" ? next++ : place]'
    assert english(opened("ko/advantages", replaced=(right, wrong)), set()) != []


def test_english_words_on_a_korean_page_are_noticed(opened: Callable[..., sync_api.Page]):
    page = opened("ko/advantages")
    page.evaluate("document.querySelector('caption').textContent = 'Advantages of your group'")
    assert english(page, set()) == ["Advantages of your group"]


def test_a_korean_page_shows_the_pictures(opened: Callable[..., sync_api.Page]):
    for name in ("ko/groups", "ko/methods"):
        opened(name).wait_for_function("document.images.length && [...document.images].every(one => one.naturalWidth)")


# --- hands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAYGROUNDS, "ko/advantages", "ko/loss", "ko/groups", "ko/methods"])
def test_it_is_used_by_keys_alone_on_a_phone_and_tells_what_changed(name: str, opened: Callable[..., sync_api.Page]):
    page = opened(name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#told[aria-live=polite]").count() == 1
    controls = page.locator("button, select, input").count()
    reached: set[str] = set()
    for _ in range(controls + 5):
        page.keyboard.press("Tab")
        active = "document.activeElement"
        reached.add(page.evaluate(f"{active}.id || {active}.textContent"))
        told = page.inner_text("#told")
        if page.evaluate(f"{active}.matches('input[type=range], select')"):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowLeft")
    radios = page.locator("input[type=radio]").count()  # one stop for all of them
    disabled = page.locator(":disabled").count()
    assert len(reached - {""}) >= controls - max(0, radios - 1) - disabled
    control = {"advantages": "#r1", "loss": "#advantage", "groups": "#group", "methods": "#group"}
    control = control[name.removeprefix("ko/")]
    page.focus(control)
    told = page.inner_text("#told")
    page.keyboard.press("Home" if control in ("#r1", "#advantage") else "ArrowDown")
    sync_api.expect(page.locator("#told")).not_to_have_text(told)
