"""Rewards that fail in every way of RELIABILITY.md R11, through a real step; threads, time limits, interrupts."""

import dataclasses
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from PIL import Image

from grpo_kit.config import PROJECT_ROOT, KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy
from grpo_kit.rewards import Reward, RewardError, Rewards, in_threads, with_time_limit
from grpo_kit.rollout import Rollout, collect_rollout
from grpo_kit.training.step import StepStats, grpo_step

POLICIES = ["raise", "drop_sample", "drop_group"]


def words(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in enhanced_prompts]


def _raises(images, prompts, enhanced_prompts):
    raise KeyError("no such thing\nsecond line")


def _row(value: float) -> Reward:
    """Good numbers, but for one in row 5."""
    return lambda images, *texts: [value if row == 5 else row / 12 for row in range(len(images))]


@pytest.fixture
def hanging() -> Iterator[Reward]:
    """A reward that gives no answer until the test is over."""
    over = threading.Event()
    yield with_time_limit(lambda images, *texts: [float(over.wait())] * len(images), 0.05)
    over.set()


WHOLE_CALL = {
    "raises": (_raises, r"KeyError: 'no such thing"),
    "raises TypeError": (lambda *columns: columns + 1, "TypeError: can only concatenate tuple"),
    "no server": (lambda *columns: open("/no/such/socket"), "FileNotFoundError"),
}
CONTRACT = {
    "a tuple": (lambda *columns: ([1.0] * 12, {}), "found tuple, 12 numbers are needed"),
    "a string": (lambda *columns: "0.5", "found str, 12 numbers are needed"),
    "too few": (lambda *columns: [1.0] * 11, r"found shape \(11,\), needed \(12,\)"),
    "too many": (lambda *columns: torch.ones(13), r"found shape \(13,\), needed \(12,\)"),
    "a table": (lambda *columns: torch.ones(12, 2), r"found shape \(12, 2\)"),
    "complex": (lambda *columns: torch.ones(12, dtype=torch.complex64), "found complex numbers"),
    "huge integers": (lambda *columns: [10**400] * 12, "found list, 12 numbers are needed"),
}
ONE_SAMPLE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "infinite in float32": 1e39}


def _step(
    kit: Experiment, policy: Policy, rollout: Rollout, bad: Reward, on_bad_reward: str, **settings: object
) -> StepStats:
    """What collecting and training do with a reward: score the rollout's pictures, combine, step."""
    on_error = "raise" if on_bad_reward == "raise" else "nan"
    rewards = Rewards({"good": words, "bad": bad}, {"good": 0.01, "bad": 1.0}, on_error=on_error)
    asked = [rollout.prompts[group].user_prompt for group in rollout.group_ids]
    parts = rewards.score([row[0] for row in rollout.images], asked, rollout.enhanced_prompts)
    scored = dataclasses.replace(rollout, reward_parts=parts, rewards=rewards.combined(parts, rollout.group_ids))
    changes = {"on_bad_reward": on_bad_reward, "beta": 0.0, "updates_per_rollout": 1} | settings
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in changes.items()})
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    return grpo_step(policy, optimizer, scored, config)


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.trainable_parameters()])


# --- R11: every fault, every policy, a real step ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", WHOLE_CALL)
@pytest.mark.parametrize("on_bad_reward", POLICIES)
def test_call_that_fails_raises_one_line_or_leaves_all_samples_out(
    kit: Experiment, own_policy: Policy, rollout: Rollout, fault: str, on_bad_reward: str
):
    bad, reason = WHOLE_CALL[fault]
    before = _weights(own_policy)
    if on_bad_reward == "raise":
        with pytest.raises(RewardError, match=f"reward 'bad': {reason}") as error:
            _step(kit, own_policy, rollout, bad, on_bad_reward)
        assert "\n" not in str(error.value)
    else:
        stats = _step(kit, own_policy, rollout, bad, on_bad_reward)
        assert stats.metrics["unscored"] == 12 and stats.updates == 0 and not stats.advantages.any()
    assert torch.equal(_weights(own_policy), before)  # nothing was learned from made-up numbers


@pytest.mark.parametrize("fault", CONTRACT)
@pytest.mark.parametrize("on_bad_reward", POLICIES)
def test_first_call_that_returns_no_column_of_numbers_raises_whatever_the_settings_say(
    kit: Experiment, own_policy: Policy, rollout: Rollout, fault: str, on_bad_reward: str
):
    bad, reason = CONTRACT[fault]
    with pytest.raises(RewardError, match=rf"'bad': {reason}.* A reward is a function \(images") as error:
        _step(kit, own_policy, rollout, bad, on_bad_reward)
    assert "\n" not in str(error.value)


def test_later_call_that_returns_another_number_of_values_is_a_call_that_fails(rollout: Rollout):
    answers = iter([[0.5] * 12, [0.5] * 11, [0.5] * 12])
    rewards = Rewards({"bad": lambda *columns: next(answers)}, {"bad": 1.0}, on_error="nan")
    found = [rewards([row[0] for row in rollout.images], [""] * 12).isnan().all() for _ in range(3)]
    assert found == [False, True, False] and rewards.failures == {"bad": 1}


@pytest.mark.parametrize("on_bad_reward", POLICIES)
def test_call_that_hangs_is_a_call_that_fails(
    kit: Experiment, own_policy: Policy, rollout: Rollout, hanging: Reward, on_bad_reward: str
):
    before = _weights(own_policy)
    if on_bad_reward == "raise":
        with pytest.raises(RewardError, match=r"reward 'bad': no answer within 0.05 s; its thread goes on"):
            _step(kit, own_policy, rollout, hanging, on_bad_reward)
    else:
        assert _step(kit, own_policy, rollout, hanging, on_bad_reward).metrics["unscored"] == 12
    assert torch.equal(_weights(own_policy), before)


@pytest.mark.parametrize("value", ONE_SAMPLE)
@pytest.mark.parametrize(("on_bad_reward", "unscored"), [("raise", None), ("drop_sample", 1), ("drop_group", 4)])
def test_number_that_is_not_finite_leaves_out_its_sample_or_group(
    kit: Experiment, own_policy: Policy, rollout: Rollout, value: str, on_bad_reward: str, unscored: int | None
):
    before, bad = _weights(own_policy), _row(ONE_SAMPLE[value])
    if unscored is None:
        with pytest.raises(KitError, match=r"rewards: found nan in row 5 \(1 of 12 rows"):
            _step(kit, own_policy, rollout, bad, on_bad_reward)
        assert torch.equal(_weights(own_policy), before)
        return
    stats = _step(kit, own_policy, rollout, bad, on_bad_reward)
    assert stats.metrics["unscored"] == unscored == int((stats.advantages == 0).sum())
    assert stats.updates == 1 and not torch.equal(_weights(own_policy), before)
    assert _weights(own_policy).isfinite().all()


@pytest.mark.parametrize(
    ("value", "scale_rewards", "on_bad_reward"),
    [
        *((1e38, "group", on_bad_reward) for on_bad_reward in POLICIES),
        *((-1e38, scale, "drop_sample") for scale in ("batch", "none")),
        (3.4e38, "none", "drop_sample"),
    ],
)
def test_huge_number_is_a_number_and_weights_stay_finite(
    kit: Experiment, own_policy: Policy, rollout: Rollout, value: float, scale_rewards: str, on_bad_reward: str
):
    stats = _step(kit, own_policy, rollout, _row(value), on_bad_reward, scale_rewards=scale_rewards)
    assert stats.metrics["unscored"] == 0 and _weights(own_policy).isfinite().all()
    if scale_rewards != "none":  # the deviation brings it back to the size of an advantage
        assert stats.updates == 1 and stats.advantages.abs().max() < 4


@pytest.mark.parametrize("on_bad_reward", POLICIES)
def test_weight_that_makes_a_total_infinite_is_a_bad_reward(
    kit: Experiment, own_policy: Policy, rollout: Rollout, on_bad_reward: str
):
    rewards = Rewards({"huge": _row(3e38)}, {"huge": 1e300})
    parts = rewards.score([row[0] for row in rollout.images], [""] * 12, rollout.enhanced_prompts)
    scored = dataclasses.replace(rollout, reward_parts=parts, rewards=rewards.combined(parts, rollout.group_ids))
    config = load_config(kit.config, {"training_settings.on_bad_reward": on_bad_reward})
    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    if on_bad_reward == "raise":
        with pytest.raises(KitError, match="found inf in row"):
            grpo_step(own_policy, optimizer, scored, config)
    else:
        grpo_step(own_policy, optimizer, scored, config)
    assert _weights(own_policy).isfinite().all()


class FailureAsZero(Rewards):
    """What must not happen: a call that failed becomes a number."""

    def _column(self, *arguments: object) -> torch.Tensor:
        return super()._column(*arguments).nan_to_num(0.0)


@pytest.mark.parametrize(("kind", "excluded"), [(Rewards, True), (FailureAsZero, False)])
def test_failure_is_never_a_number(kind: type[Rewards], excluded: bool, rollout: Rollout):
    rewards = kind({"bad": _raises}, {"bad": 1.0}, on_error="nan")
    found = rewards([row[0] for row in rollout.images], [""] * 12)
    assert bool(found.isnan().all()) == excluded


def test_run_goes_on_where_a_call_now_and_then_fails(own_kit: Experiment, caplog: pytest.LogCaptureFixture):
    calls = []

    def flaky(images, prompts, enhanced_prompts):
        calls.append(len(images))
        if len(calls) % 2:
            raise ConnectionError(f"try {len(calls)}")
        return words(images, prompts, enhanced_prompts)

    rewards = Rewards({"flaky": flaky}, {"flaky": 1.0}, on_error="nan")
    optimizer = torch.optim.AdamW(own_kit.policy.trainable_parameters(), lr=1e-3)
    config = load_config(own_kit.config, {"training_settings.beta": 0.0})
    updates = []
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        for seed in range(4):
            found = collect_rollout(own_kit.policy, own_kit.generator, rewards, own_kit.train_prompts[:1], 3, seed)
            updates.append(grpo_step(own_kit.policy, optimizer, found, config).updates)
    assert updates == [0, 2, 0, 2] and _weights(own_kit.policy).isfinite().all()
    assert rewards.failures == {"flaky": 2}
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 1 and "reward 'flaky': ConnectionError: try 1 (test_rewards_failures.py:" in reports[0]


def test_monitor_that_fails_costs_no_sample(rollout: Rollout, caplog: pytest.LogCaptureFixture):
    rewards = Rewards({"good": words}, {"good": 1.0}, {"bad": _raises}, on_error="nan")
    scores = rewards.score([row[0] for row in rollout.images], [""] * 12, rollout.enhanced_prompts)
    assert scores["bad"].isnan().all() and rewards.combined(scores, rollout.group_ids).isfinite().all()
    assert rewards.failures == {"bad": 1} and "reward 'bad': KeyError" in caplog.text


# --- an interrupt passes through --------------------------------------------------------------------------------------


def _interrupted(images, prompts, enhanced_prompts):
    raise KeyboardInterrupt


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: in_threads(r, 2), lambda r: with_time_limit(r, 30)])
@pytest.mark.parametrize("on_error", ["raise", "nan"])
def test_interrupt_passes_through(rollout: Rollout, wrap: Callable[[Reward], Reward], on_error: str):
    rewards = Rewards({"it": wrap(_interrupted)}, {"it": 1.0}, on_error=on_error)
    with pytest.raises(KeyboardInterrupt):
        rewards([row[0] for row in rollout.images], [""] * 12)
    assert not rewards.failures


# --- threads ----------------------------------------------------------------------------------------------------------


def by_row(images: Sequence[int], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    return [image * 10 + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def _reversed_parts(reward: Reward, workers: int) -> Reward:
    """What threads may do to a result: parts in the order in which they end."""

    def call(images, prompts, enhanced_prompts):
        size = math.ceil(len(images) / workers)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return [v for p in reversed(parts) for v in reward(images[p], prompts[p], enhanced_prompts[p])]

    return call


def _same_as_alone(wrap: Callable[[Reward, int], Reward], workers: int, rows: int) -> bool:
    columns = (list(range(rows)), ["x" * row for row in range(rows)], [""] * rows)
    return torch.equal(
        torch.as_tensor(wrap(by_row, workers)(*columns)).double(), torch.tensor(by_row(*columns)).double()
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("rows", [1, 7, 12])
def test_threads_give_the_same_numbers_in_the_same_order(workers: int, rows: int):
    assert _same_as_alone(in_threads, workers, rows)


def test_parts_in_another_order_are_noticed():
    assert not _same_as_alone(_reversed_parts, 3, 12)


def test_real_rewards_score_in_threads_as_alone(kit: Experiment, rollout: Rollout):
    columns = ([row[0] for row in rollout.images], ["a red circle"] * 12, rollout.enhanced_prompts)
    for name in ("gold", "keeps_objects"):
        alone = torch.as_tensor(kit.rewards.monitors[name](*columns), dtype=torch.float64)
        assert torch.equal(in_threads(kit.rewards.monitors[name], 4)(*columns), alone)
    clip = kit.rewards.parts["clip_similarity"]
    torch.testing.assert_close(in_threads(clip, 4)(*columns), clip(*columns).double(), rtol=0, atol=1e-5)


def test_threads_run_at_the_same_time():
    meeting = threading.Barrier(4)

    def meets(images, prompts, enhanced_prompts):
        meeting.wait(timeout=600)  # breaks where the four are not there together
        return [1.0] * len(images)

    assert in_threads(meets, 4)([0] * 8, [""] * 8, [""] * 8).tolist() == [1.0] * 8


def test_groups_stay_whole_and_each_row_keeps_its_seed():
    seen = []

    def by_group(images, prompts, enhanced_prompts, group_ids, image_seeds):
        seen.append(group_ids.tolist())
        return image_seeds - group_ids * 100

    ids, seeds = torch.tensor([2, 0, 1, 0, 2, 1]), torch.arange(6)
    found = in_threads(by_group, 2)([0] * 6, [""] * 6, [""] * 6, group_ids=ids, image_seeds=seeds)
    assert found.tolist() == (seeds - ids * 100).tolist()
    assert sorted(map(sorted, seen)) == [[0, 0, 1, 1], [2, 2]]


def test_reward_of_groups_that_gets_none_is_called_once_with_all():
    seen = []

    def by_group(images, prompts, enhanced_prompts, group_ids):
        seen.append((len(images), group_ids))
        return [0.0] * len(images)

    in_threads(by_group, 2)([0] * 6, [""] * 6, [""] * 6, group_ids=None)
    assert seen == [(6, None)]


def test_threads_and_limits_ask_for_what_the_reward_asks_for(rollout: Rollout):
    given = {}

    def asks(images, prompts, enhanced_prompts, image_seeds):
        given["seeds"] = image_seeds
        return [0.0] * len(images)

    rewards = Rewards({"it": with_time_limit(in_threads(asks, 1), 30)}, {"it": 1.0})
    rewards([row[0] for row in rollout.images], [""] * 12, image_seeds=rollout.image_seeds[:, 0])
    assert torch.equal(given["seeds"], rollout.image_seeds[:, 0])


@pytest.mark.parametrize("bad", [_raises, lambda images, *texts: ([], {}), lambda images, *texts: [1.0]])
def test_error_in_one_thread_is_the_rewards_error(rollout: Rollout, bad: Reward):
    rewards = Rewards({"bad": in_threads(bad, 3)}, {"bad": 1.0})
    with pytest.raises(RewardError, match=r"reward 'bad': (KeyError|found)") as error:
        rewards([row[0] for row in rollout.images], [""] * 12)
    assert "\n" not in str(error.value)


# --- time limits ------------------------------------------------------------------------------------------------------


def test_answer_in_time_is_the_answer_and_a_timeout_of_its_own_is_its_own():
    columns = ([1, 2], ["", ""], ["", ""])
    assert with_time_limit(by_row, 30)(*columns) == by_row(*columns)

    def times_out(images, prompts, enhanced_prompts):
        raise TimeoutError("the server")

    with pytest.raises(TimeoutError, match="the server"):
        with_time_limit(times_out, 30)(*columns)


def test_program_ends_while_a_reward_hangs():
    code = (
        "import threading\n"
        "from grpo_kit.rewards import RewardError, Rewards, in_threads, with_time_limit\n"
        "hang = lambda images, *texts: threading.Event().wait()\n"
        "rewards = Rewards({'it': with_time_limit(in_threads(hang, 2), 0.05)}, {'it': 1.0})\n"
        "try: rewards([1, 2], ['', ''])\n"
        "except RewardError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0 and "no answer within 0.05 s" in done.stdout, done.stderr


@pytest.mark.parametrize("build", [lambda: in_threads(by_row, 0), lambda: with_time_limit(by_row, 0.0)])
def test_impossible_limit_is_one_line(build: Callable[[], object]):
    with pytest.raises(RewardError, match=r"(workers|seconds): found 0.*, allowed: "):
        build()
