"""Rewards of the user's own: found by name, given what they ask for, refused where they cannot work."""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.config_files import save_config

from grpo_kit.config import KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import Gain, RewardError, Rewards, in_threads, load_rewards, with_time_limit
from grpo_kit.rewards.loading import check_reward_settings
from grpo_kit.rollout import collect_rollout

IMAGES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", (51, 0, 0))]
TEXTS = ["a", "b", "c"]
RED = [1.0, 0.0, 0.2]
CODE = """
from shades import share

def redness(images, prompts, enhanced_prompts):
    return [share(image, 0) for image in images]

def channel(images, prompts, enhanced_prompts, *, number, scale=1.0):
    return [share(image, number) * scale for image in images]

class Channel:
    def __init__(self, number=0):
        self.number = number

    def __call__(self, images, prompts, enhanced_prompts):
        return [share(image, self.number) for image in images]

def make(number):
    return Channel(number)

def with_clip(clip, factor=2):
    return lambda images, prompts, enhanced_prompts: factor * clip(images, prompts, enhanced_prompts)

def length(images, prompts, enhanced_prompts):
    return [float(len(text)) for text in enhanced_prompts]

def for_trl(prompts, completions, images, **kwargs):
    return [share(image, 0) for image in images]

async def awaited(images, prompts, enhanced_prompts):
    return redness(images, prompts, enhanced_prompts)

def of_one(image, prompt):
    return 1.0

class Silent:
    pass

red = Channel(0)
number = 3
"""
SHADES = "def share(image, number):\n    return image.getpixel((0, 0))[number] / 255\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rewards in it."""
    for name, text in {"my_rewards.py": CODE, "shades.py": SHADES, "parts/mine.py": CODE}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/colours.py").write_text(CODE.replace("from shades", "from packed.shades"))
    (tmp_path / "packed/shades.py").write_text(SHADES)
    for name in ("shades", "packed", "packed.colours", "packed.shades"):  # as in a new process
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _config(kit: Experiment, **settings: object) -> object:
    given = {"weights": {"clip_similarity": 1.0}, "options": {}, "monitors": [], **settings}
    return load_config(kit.config, {f"reward_settings.{key}": value for key, value in given.items()})


def _scores(kit: Experiment, name: str, options: Mapping | None = None) -> dict[str, list[float]]:
    config = _config(kit, weights={name: 1.0}, options={} if options is None else {name: options})
    found = load_rewards(config).score(IMAGES, TEXTS, TEXTS)
    return {key: [round(value, 6) for value in values.tolist()] for key, values in found.items()}


# --- F1: by name ------------------------------------------------------------------------------------------------------


@pytest.mark.field("F1")
@pytest.mark.parametrize(
    ("name", "options", "called"),
    [
        ("my_rewards.py:redness", None, "redness"),  # the row's own
        ("packed.colours:redness", None, "redness"),  # a module of the working folder
        ("my_rewards.py:channel", {"number": 0}, "channel"),
        ("my_rewards.py:Channel", {}, "Channel"),
        ("my_rewards.py:make", {"number": 0}, "make"),
        ("my_rewards.py:red", None, "red"),
        ("my_rewards.py:for_trl", None, "for_trl"),
        ("my_rewards.py:awaited", None, "awaited"),
        ("./parts/../my_rewards.py:redness", None, "redness"),
        ("warm", {"reward": "my_rewards.py:channel", "number": 0}, "warm"),
        ("scaled", {"reward": "packed.colours:channel", "number": 0, "scale": 1.0}, "scaled"),
    ],
)
def test_reward_of_the_users_own_scores_under_its_functions_name(
    kit: Experiment, folder: Path, name: str, options: dict | None, called: str
):
    assert _scores(kit, name, options) == {called: RED}


@pytest.mark.field("F1")
def test_name_of_ones_own_for_a_reward_of_the_kit_takes_its_options(kit: Experiment, folder: Path):
    assert _scores(kit, "short", {"reward": "length", "max_words": 8}) == {"short": _scores(kit, "length")["length"]}
    twice = _scores(kit, "my_rewards.py:with_clip", {})["with_clip"]  # it asks for the CLIP that rewards share
    assert twice == pytest.approx([2 * value for value in _scores(kit, "clip_similarity")["clip_similarity"]], abs=1e-5)
    config = _config(kit, weights={"mine": 1.0}, options={"mine": {"url": "http://127.0.0.1:1/score"}})
    with pytest.raises(KitError, match=r"options\.mine: url: found http://127\.0\.0\.1:1/score, where nobody answers"):
        load_rewards(config)


@pytest.mark.field("F1")
def test_two_that_are_called_alike_have_their_files_name_before_them(kit: Experiment, folder: Path):
    names = ["my_rewards.py:redness", "packed.colours:redness", "my_rewards.py:length"]
    rewards = load_rewards(_config(kit, weights=dict.fromkeys(names, 1.0), monitors=["my_rewards.py:channel"],
                                   options={"my_rewards.py:channel": {"number": 2}}))  # fmt: skip
    assert list(rewards.parts) == ["my_rewards:redness", "colours:redness", "my_rewards:length"]
    assert list(rewards.monitors) == ["channel"]
    (folder / "other").mkdir()
    (folder / "other/my_rewards.py").write_text(CODE)
    with pytest.raises(KitError, match=r"two rewards are called 'my_rewards:redness'\. Give one a name of its own"):
        load_rewards(_config(kit, weights=dict.fromkeys([*names, "other/my_rewards.py:redness"], 1.0)))


@pytest.mark.field("F1")
def test_file_counts_from_the_configs_folder_then_from_the_working_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    home = tmp_path_factory.mktemp("config")
    settings = {
        "weights": {"my_rewards.py:redness": 1},
        "monitors": ["my_rewards.py:length"],
        "timeout": {"my_rewards.py:redness": 60},
        "options": {"look": {"reward": "parts/mine.py:redness"}, "my_rewards.py:redness": {}},
    }
    held_out = {"held_out": "my_rewards.py:length"}
    (home / "c.json").write_text(json.dumps({"reward_settings": settings, "evaluation_settings": held_out}))

    def places() -> list[str]:
        config = load_config(home / "c.json")
        found = config.reward_settings
        alias = found.options["look"]["reward"]
        return [*found.weights, *found.monitors, *found.timeout, alias, config.evaluation_settings.held_out]

    names = ["my_rewards.py:redness", "my_rewards.py:length", "my_rewards.py:redness", "parts/mine.py:redness"]
    names.append("my_rewards.py:length")
    assert places() == [str(folder / name) for name in names]
    (home / "my_rewards.py").write_text(CODE)
    assert places() == [str((folder if "parts" in name else home) / name) for name in names]
    config = load_config(home / "c.json")
    assert load_config(save_config(config, home / "again.json")) == config


@pytest.mark.field("F1")
def test_dots_in_a_files_name_divide_no_key(folder: Path):
    texts = {"reward_settings.weights.my_rewards.py:channel": "2"}
    texts["reward_settings.options.my_rewards.py:channel.number"] = "1"
    settings = load_config("tiny", texts).reward_settings
    assert settings.weights[f"{folder}/my_rewards.py:channel"] == 2
    assert settings.options[f"{folder}/my_rewards.py:channel"] == {"number": 1}


def test_file_is_read_again_and_never_taken_from_bytecode(kit: Experiment, folder: Path):
    for value in ("1.0", "2.0"):  # of the same size, within the same second
        (folder / "now.py").write_text(
            f"def now(images, prompts, enhanced_prompts):\n    return [{value}] * len(images)\n"
        )
        assert _scores(kit, "now.py:now") == {"now": [float(value)] * 3}
    assert not list(folder.rglob("now*.pyc"))


@pytest.mark.field("F1")
def test_record_has_the_sha256_of_all_that_a_reward_imports_from_its_folder(kit: Experiment, folder: Path):
    entries = [
        load_rewards(_config(kit, weights={name: 1.0})).record()[short]["files"]
        for name, short in {"my_rewards.py:redness": "redness", "packed.colours:redness": "redness"}.items()
    ]
    assert [sorted(entry) for entry in entries] == [["my_rewards.py", "shades.py"], ["colours.py", "shades.py"]]
    assert all(len(digest) == 64 for entry in entries for digest in entry.values())


@pytest.mark.field("F1")
@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("no_such.py:redness", None, "no_such.py: cannot be read: No such file or directory. Put it back"),
        ("my_rewards.py:rednes", None, "found no function 'rednes' in {folder}/my_rewards.py, did you mean redness?"),
        ("no.such.module:f", None, "module 'no.such.module': cannot be imported: ModuleNotFoundError"),
        ("broken.py:f", None, "cannot be imported: SyntaxError"),
        ("my_rewards.py:", None, "allowed: module:function, such as grpo_kit.grpo:grpo_loss, or path/to/file"),
        ("redness", None, "or one of your own: path/to/file.py:function, package.module:function"),
        ("mine", {"reward": "beauty"}, "found 'beauty', allowed: aesthetic, "),
        ("my_rewards.py:channel", {"nmber": 0}, "channel.nmber: unknown, did you mean number?; allowed: number, scale"),
        ("my_rewards.py:redness", {"number": 0}, "redness.number: unknown; allowed: none, it has no options"),
        (
            "my_rewards.py:channel",
            None,
            "signature (images, prompts, enhanced_prompts, *, number, scale=1.0)",
        ),
        ("my_rewards.py:Channel", {"numbr": 1}, "Channel.numbr: unknown, did you mean number?; allowed: number"),
        ("my_rewards.py:of_one", None, "found the signature (image, prompt) (too many positional arguments), needed"),
        ("my_rewards.py:Silent", None, "found NoneType, needed: a function (images, prompts, enhanced_prompts)"),
        ("my_rewards.py:number", None, "found int, needed: a function (images, prompts, enhanced_prompts)"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_model_is_loaded(
    kit: Experiment, folder: Path, name: str, options: dict | None, part: str
):
    (folder / "broken.py").write_text("def f(:\n")
    config = _config(kit, weights={name: 1.0}, options={} if options is None else {name: options})
    with pytest.raises(KitError) as error:
        check_reward_settings(config)
    assert part.format(folder=folder) in str(error.value) and "\n" not in str(error.value)


# --- F2: what a prompt's row says, and abstaining ---------------------------------------------------------------------


WRAPS = [lambda one: one, lambda one: in_threads(one, 2), lambda one: with_time_limit(one, 30)]


def _prompts(kit: Experiment) -> list[Prompt]:
    texts = [prompt.user_prompt for prompt in kit.train_prompts[:2]]
    return [Prompt(texts[0], metadata={"object": "ball", "count": 2}), Prompt(texts[1], metadata={"object": "cube"})]


def _collected(kit: Experiment, monkeypatch: pytest.MonkeyPatch, reward: Callable, **options: object) -> object:
    weights = {"clip": 1.0, "mine": 0.5}
    rewards = Rewards({"clip": kit.rewards.parts["clip_similarity"], "mine": reward}, weights)
    return collect_rollout(kit.policy, kit.generator, rewards, _prompts(kit), 2, seed=0, **options)


@pytest.mark.field("F2")
@pytest.mark.parametrize("options", [{}, {"images_per_prompt": 2}, {"overlap": True}])
def test_reward_that_names_metadata_gets_each_rows(kit: Experiment, monkeypatch: pytest.MonkeyPatch, options: dict):
    def counts(images, prompts, enhanced_prompts, metadata, references):
        assert len(metadata) == len(images) == len(references) and set(references) == {None}
        return [float(row.get("count", 0)) for row in metadata]

    found = _collected(kit, monkeypatch, counts, **options)
    assert found.reward_parts["mine"].tolist() == [2, 2, 0, 0]


@pytest.mark.field("F2")
@pytest.mark.parametrize(
    "wrap", [lambda one: one, lambda one: in_threads(one, 2), lambda one: with_time_limit(one, 30)]
)
def test_trls_signature_gets_fields_as_columns(kit: Experiment, monkeypatch: pytest.MonkeyPatch, wrap: Callable):
    def answers(completions, object, prompts, count=None, **kwargs):
        assert kwargs["metadata"][0]["object"] == object[0] and len(prompts) == len(completions) == len(count)
        return [float(name == "ball") + len(text) * 0 for name, text in zip(object, completions, strict=True)]

    assert _collected(kit, monkeypatch, wrap(answers)).reward_parts["mine"].tolist() == [1, 1, 0, 0]


def _only_balls(images, prompts, enhanced_prompts, metadata):
    return [0.5 if row.get("object") == "ball" else None for row in metadata]


@pytest.mark.field("F2")
@pytest.mark.parametrize(
    "wrap", [lambda one: one, lambda one: in_threads(one, 2), lambda one: with_time_limit(one, 30)]
)
def test_none_abstains_and_the_row_has_the_rewards_that_answered(
    kit: Experiment, monkeypatch: pytest.MonkeyPatch, wrap: Callable
):
    found = _collected(kit, monkeypatch, wrap(_only_balls))
    clip = found.reward_parts["clip"]
    assert torch.equal(found.rewards, clip + torch.tensor([0.25, 0.25, 0, 0], dtype=torch.float64))
    metrics = found.metrics()
    assert metrics["rewards/mine/abstained"] == 2 and metrics["rewards/mine/mean"] == 0.5
    assert "rewards/clip/abstained" not in metrics


@pytest.mark.field("F2")
def test_row_on_which_all_abstain_is_unscored_and_nan_is_no_abstention():
    rewards = Rewards({"a": lambda *columns: [None, 1.0, None], "b": lambda *columns: [None, None, float("nan")]},
                      {"a": 1.0, "b": 1.0})  # fmt: skip
    assert rewards(IMAGES, TEXTS).isnan().tolist() == [True, False, True]
    scores = rewards.score(IMAGES, TEXTS, TEXTS)
    assert rewards.combined(scores, torch.zeros(3, dtype=torch.int64)).isnan().tolist() == [True, False, True]
    assert Rewards({"none": lambda *columns: None}, {"none": 1.0})(IMAGES, TEXTS).isnan().all()


@pytest.mark.field("F2")
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_abstaining_from_some_of_a_group_neither_lifts_nor_lowers_them(combine: str):
    half = [5.0, None, None, 7.0]
    rewards = Rewards({"a": lambda *columns: [1.0, 1.0, 2.0, 2.0], "b": lambda *columns: half}, {"a": 1.0, "b": 1.0},
                      combine=combine)  # fmt: skip
    scores = rewards.score([*IMAGES, IMAGES[0]], [""] * 4, [""] * 4)
    found = rewards.combined(scores, torch.zeros(4, dtype=torch.int64))
    alone = rewards.combined(scores | {"b": torch.full((4,), torch.inf, dtype=torch.float64)}, torch.zeros(4).long())
    assert torch.allclose((found - found.mean())[1:3], (alone - alone.mean())[1:3])


def test_gain_hands_metadata_on_and_abstains_where_its_reward_does(kit: Experiment):
    found = Gain(kit.generator, _only_balls)(
        IMAGES[:2], TEXTS[:2], TEXTS[:2], torch.tensor([1, 2]), [{"object": "ball"}, {}]
    )
    assert found == [0.0, None]


# --- F3: what a reward may return, and what it may not ----------------------------------------------------------------


async def _soon(images, prompts, enhanced_prompts):
    await asyncio.sleep(0)
    return RED


class Later:
    """An awaitable that is no coroutine."""

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return RED


ANSWERS = {
    "a column": lambda *columns: np.array(RED)[:, None],
    "a tensor's column": lambda *columns: torch.tensor(RED)[:, None],
    "lists of one": lambda *columns: [[value] for value in RED],
    "tensors of no dimension": lambda *columns: [torch.tensor(value, requires_grad=True) for value in RED],
    "numpy's numbers": lambda *columns: [np.float64(value) for value in RED],
    "a view from behind": lambda *columns: np.array(RED[::-1])[::-1],
    "objects": lambda *columns: np.array(RED, dtype=object),
    "a coroutine": _soon,
    "an awaitable": lambda *columns: Later(),
}


@pytest.mark.field("F3")
@pytest.mark.parametrize("form", ANSWERS)
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: with_time_limit(one, 30)])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_form_of_an_answer_does_not_matter(form: str, wrap: Callable):
    found = Rewards({"it": wrap(ANSWERS[form])}, {"it": 1.0})(IMAGES, TEXTS)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(RED, abs=1e-6)


@pytest.mark.field("F3")
def test_coroutine_is_awaited_under_a_notebooks_loop_and_in_the_same_loop_each_time():
    loops = []

    async def reward(images, prompts, enhanced_prompts):
        loops.append(asyncio.get_running_loop())
        return await _soon(images, prompts, enhanced_prompts)

    rewards = Rewards({"it": reward}, {"it": 1.0})

    async def cell() -> list[float]:
        return rewards(IMAGES, TEXTS).tolist()

    assert asyncio.run(cell()) == pytest.approx(RED) and rewards(IMAGES, TEXTS).tolist() == pytest.approx(RED)
    assert loops[0] is loops[1]


@pytest.mark.field("F3")
@pytest.mark.parametrize(
    "reward",
    [
        lambda images, prompts, metadata: [row.get("x", 1.0) for row in metadata],  # as DDPO's and flow_grpo's
        lambda images, prompts: [1.0] * len(images),
        lambda *, enhanced_prompts: [1.0] * len(enhanced_prompts),
        lambda completions, **kwargs: [1.0] * len(kwargs["prompts"]),
        lambda pictures, asked, written: [1.0] * len(pictures),
    ],
)
def test_signature_that_names_what_there_is_works(reward: Callable):
    assert Rewards({"it": reward}, {"it": 1.0})(IMAGES, TEXTS).tolist() == [1, 1, 1]


@pytest.mark.field("F3")
@pytest.mark.parametrize(
    ("reward", "part"),
    [
        (lambda image, prompt: 1.0, r"found the signature \(image, prompt\)"),
        (lambda: 1.0, r"found the signature \(\)"),
        (lambda images, prompts, enhanced_prompts, answer: 1.0, "missing a required argument: 'answer'"),
        ("redness", "found str"),
        (3, "found int"),
    ],
)
def test_signature_that_cannot_work_is_refused_when_the_rewards_are_made(reward: object, part: str):
    with pytest.raises(RewardError, match=part) as error:
        Rewards({"it": reward}, {"it": 1.0}, on_error="nan")
    assert "needed: a function (images, prompts, enhanced_prompts)" in str(error.value) or "needed: (images" in str(
        error.value
    )


@pytest.mark.field("F3")
def test_field_that_no_prompt_has_is_refused_at_the_first_call():
    with pytest.raises(RewardError, match="found no prompt with the field 'answer'"):
        Rewards({"it": lambda completions, answer: [1.0]}, {"it": 1.0}, on_error="nan")(IMAGES, TEXTS)
