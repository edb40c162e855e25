"""The checks of a loss: how they call foreign functions, what they say of good and bad ones, and `grpo-kit doctor`."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.trl_loss import trl_loss

from grpo_kit import cli
from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.grpo import LOSS_TYPES, group_advantages, grpo_loss
from grpo_kit.preflight.loss_checks import (
    FALLS_IN,
    NOT_ASKED,
    OK,
    NotAsked,
    examine,
    load_subject,
    loss_properties,
    subject_of,
    table,
)
from grpo_kit.preflight.loss_checks.cases import at_ratios, drifted, enumerable, on_policy
from grpo_kit.preflight.loss_checks.examine import QUESTIONS, Finding
from grpo_kit.preflight.loss_checks.examples import classic_loss

HERE = __name__.rpartition(".")[2]  # how the command finds this file


def _titles(findings: list[Finding], outcome: str) -> set[str]:
    return {finding.title for finding in findings if finding.outcome == outcome}


def _shown(loss: Callable, title: str, advantages: Callable | None = None) -> str:
    """What is said under a title, after the outcome."""
    question = next(question for question in QUESTIONS if question.title == title)
    finding = examine(subject_of(loss, advantages=advantages), [question])[0]
    return f"{finding.outcome}: {finding.shown}"


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-20, 20).exp()


# --- correct losses that are unlike this kit's ------------------------------------------------------------------------


def reinforce(logprobs, advantages, mask):
    return -(advantages[:, None] * logprobs * mask).sum() / mask.sum()


def clipped_with_numbers_as_mask(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio, advantages = _bounded(logprobs - old_logprobs), advantages.unsqueeze(1)
    worse = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -(worse * (1 - (1 - mask))).sum() / len(mask)  # a boolean mask cannot be taken from 1


def sequence_ratio_bounded_on_both_sides(logprobs, old_logprobs, advantages, mask):
    ratio = _bounded(((logprobs - old_logprobs) * mask).sum(dim=1) / mask.sum(dim=1))
    worse = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -torch.where(advantages < 0, torch.max(worse, 3 * advantages), worse).mean()


def leave_one_out_with_squared_kl(logprobs, old_logprobs, ref_logprobs, rewards, group_ids, mask, beta=0.04):
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        rows = (group_ids == group) & ~rewards.isnan()
        own = rewards[rows]
        if len(own) > 1 and own.max() > own.min():
            advantages[rows] = own - (own.sum() - own) / (len(own) - 1)
    ratio = _bounded(logprobs - old_logprobs)
    kl = ratio.detach() * (logprobs - ref_logprobs).square() / 2
    per_token = torch.where(mask, -ratio * advantages[:, None] + beta * kl, 0.0)
    return (per_token.sum(dim=1) / mask.sum(dim=1)).mean()


@dataclass
class Output:
    loss: torch.Tensor


def an_object_with_the_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, beta=0.0, **unused):
    ratio = _bounded(logprobs - old_logprobs)
    kl = ratio * (logprobs - ref_logprobs)  # k1, right since its weight carries gradient
    per_token = -ratio * advantages.unsqueeze(1) + beta * kl
    return Output((per_token * mask).sum() / mask.sum())


def fixed_weight_of_the_kl(logprobs, ref_logprobs, advantages, mask):
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    ratio = (logprobs - logprobs.detach()).exp()
    per_token = -ratio * advantages[:, None] + 0.1 * (log_ratio.exp() - 1 - log_ratio)
    return (per_token * mask).sum() / mask.sum()


def single_precision_inside(logprobs, old_logprobs, rewards, group_ids, mask):
    sums = torch.zeros(len(rewards)).index_add_(0, group_ids, rewards)  # fails where the types differ
    counts = torch.zeros(len(rewards)).index_add_(0, group_ids, torch.ones(len(rewards)))
    advantages = (rewards - (sums / counts.clamp(min=1))[group_ids]).masked_fill(_flat(rewards, group_ids), 0.0)
    ratio = _bounded(logprobs.float() - old_logprobs.float())
    return -(ratio * advantages.float()[:, None] * mask.float()).sum() / mask.float().sum()


def _flat(rewards, group_ids):
    return torch.stack([rewards[group_ids == group].std(correction=0) < 1e-6 for group in group_ids])


def picked_by_a_boolean_mask(logprobs, advantages, mask):
    return -(advantages[:, None].expand(mask.shape)[mask] * logprobs[mask]).mean()


CORRECT = [
    reinforce,
    clipped_with_numbers_as_mask,
    sequence_ratio_bounded_on_both_sides,
    leave_one_out_with_squared_kl,
    an_object_with_the_loss,
    fixed_weight_of_the_kl,
    picked_by_a_boolean_mask,
]


@pytest.mark.parametrize("loss", CORRECT, ids=lambda loss: loss.__name__)
def test_correct_loss_of_another_design_falls_into_nothing(loss: Callable):
    findings = examine(subject_of(loss))
    assert not _titles(findings, FALLS_IN), [finding for finding in findings if finding.outcome == FALLS_IN]
    assert len(_titles(findings, OK)) >= 8


def test_single_precision_inside_a_loss_is_not_taken_for_a_mistake():
    findings = examine(subject_of(single_precision_inside))
    assert _titles(findings, FALLS_IN) == {"failed sample as a reward"}  # it does not know of those


def trl_with_the_plain_kl(logprobs, advantages, mask, old_logprobs, ref_logprobs, beta, num_items_in_batch):
    return trl_loss(
        logprobs,
        advantages,
        mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        beta=beta,
        num_items_in_batch=num_items_in_batch,
        use_bias_correction_kl=False,
    )


def test_trls_loss_is_found_sound_but_for_overflow():
    findings = examine(subject_of(trl_loss))
    assert _titles(findings, FALLS_IN) == {"overflow"}
    group_traps = {question.title for question in QUESTIONS if question.trap in ("T3", "T4", "T5", "T16")}
    assert _titles(findings, NOT_ASKED) == group_traps
    assert subject_of(trl_loss).forms().keys() == set(LOSS_TYPES)


def test_trls_plain_kl_is_biased_off_policy_alone():
    assert _shown(trl_with_the_plain_kl, "KL gradient, on-policy") == "ok: ∇KL(ref‖π) in expectation"
    assert _shown(trl_with_the_plain_kl, "KL gradient, off-policy").startswith("falls in: no importance weight")
    assert "∇KL(π‖ref) with use_bias_correction_kl; 32% off" in _shown(trl_loss, "KL gradient, off-policy")


def test_this_kits_loss_and_advantages_are_asked_everything():
    findings = examine(subject_of(grpo_loss, advantages=group_advantages))
    assert not _titles(findings, NOT_ASKED)
    assert _titles(findings, FALLS_IN) <= {"KL gradient, off-policy"}  # GRPO's stated bias, unless it is weighted


def test_classic_formula_falls_into_ten():
    findings = examine(subject_of(classic_loss))
    fallen = [(finding.trap, finding.title) for finding in findings if finding.outcome == FALLS_IN]
    assert [trap for trap, _ in fallen] == ["T1", "T2", "T3", "T4", "T7", "T10", "T14", "T16", "T23", "T25"]
    assert ("T4", "equal rewards") in fallen  # their order does not matter to a mean


# --- the figures that are shown ---------------------------------------------------------------------------------------


def ratio_to_the_reference(logprobs, ref_logprobs, advantages, mask):
    return -((logprobs - ref_logprobs).clamp(-20, 20).exp() * advantages[:, None] * mask).sum() / mask.sum()


def mean_over_padding_too(logprobs, advantages, mask):
    return -(advantages[:, None] * logprobs).mean()


def mean_of_the_log_ratio(logprobs, ref_logprobs, advantages, mask, beta=0.1):
    return reinforce(logprobs, advantages, mask) + beta * ((logprobs - ref_logprobs) * mask).sum() / mask.sum()


def kl_for_the_log_only(logprobs, ref_logprobs, advantages, mask, beta=0.1):
    kl = (logprobs - ref_logprobs).detach().square().mean()
    return reinforce(logprobs, advantages, mask) + beta * kl


def nothing_under_one_percent(logprobs, advantages, mask):
    return reinforce(logprobs.clamp(min=-4.6), advantages, mask)


def advantages_taken_for_costs(logprobs, advantages, mask):
    return -reinforce(logprobs, advantages, mask)


def detached(logprobs, advantages, mask):
    return reinforce(logprobs.detach(), advantages, mask)


def row_means_of_tokens_squared(logprobs, advantages, mask):
    return -(advantages[:, None] * logprobs * mask).sum() / mask.sum() ** 2


def lower_clip_lost(logprobs, old_logprobs, advantages, mask):
    ratio = _bounded(logprobs - old_logprobs).clamp(0.8, 1.2)
    return -(ratio * advantages[:, None] * mask).sum() / mask.sum()


def delta_taken_and_dropped(logprobs, old_logprobs, advantages, mask, delta=None):
    return -(_bounded(logprobs - old_logprobs) * advantages[:, None] * mask).sum() / mask.sum()


def raises_far_away(logprobs, old_logprobs, advantages, mask):
    if float((logprobs.detach() - old_logprobs).abs().max()) > 50:
        raise ArithmeticError("ratio is astronomical\nreally")
    return -(_bounded(logprobs - old_logprobs) * advantages[:, None] * mask).sum() / mask.sum()


NO_DELTA = "not asked: takes no delta; at ratio e^5 a bad sample pushes"


@pytest.mark.parametrize(
    ("loss", "title", "says"),
    [
        (ratio_to_the_reference, "training and rollout disagree", "falls in: ratio 0.28 to 2.75 though"),
        (ratio_to_the_reference, "ratio against the reference", "falls in: another reference changes the gradient by"),
        (mean_over_padding_too, "end of sequence", "falls in: padding gets gradient"),
        (mean_of_the_log_ratio, "KL gradient, on-policy", "falls in: the KL term's mean gradient is 0"),
        (kl_for_the_log_only, "KL gradient, on-policy", "falls in: the KL term carries no gradient (its value is"),
        (ratio_to_the_reference, "KL gradient, on-policy", "not asked: has no KL term"),
        (nothing_under_one_percent, "silent stabilisers", "falls in: a token of p = 0.006 is weighed 0 ×"),
        (advantages_taken_for_costs, "training and rollout disagree", "falls in: gradient / -A lies between -0.033"),
        (detached, "loss 0 read as failure", "falls in: loss 0.21, gradient norm 0"),
        (reinforce, "loss 0 read as failure", "ok: gradient norm 0.1"),
        (row_means_of_tokens_squared, "micro-batches", "falls in: micro-batches miss the whole's gradient by"),
        (reinforce, "micro-batches", "ok: takes no weights; parts add up: by their share of tokens"),
        (reinforce, "length bias", "ok: lengths 10 and 100: 1 : 1 (no length bias)"),
        (leave_one_out_with_squared_kl, "length bias", "ok: lengths 10 and 100: 10 : 1 (a mean of row means"),
        (lower_clip_lost, "clip on its active side", "falls in: 2 of 4 samples"),
        (an_object_with_the_loss, "clip on its active side", "ok: ratios 0.5 and 1.5: not clipped"),
        (delta_taken_and_dropped, "unbounded negative side", "falls in: delta 4: a ratio of e^9 counts 8103"),
        (an_object_with_the_loss, "unbounded negative side", f"{NO_DELTA} 148 ×"),
        (sequence_ratio_bounded_on_both_sides, "unbounded negative side", f"{NO_DELTA} 0 ×"),
        (raises_far_away, "overflow", "falls in: raises ArithmeticError: ratio is astronomical"),
        (reinforce, "leakage between groups", "not asked: takes advantages, not rewards"),
        (reinforce, "KL gradient, off-policy", "not asked: takes no ref_logprobs"),
    ],
)
def test_finding_carries_the_figure_or_the_reason(loss: Callable, title: str, says: str):
    found = _shown(loss, title)
    assert found.startswith(says) and "\n" not in found


def whitened_over_the_batch(rewards, group_ids):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def scaled_by_the_batch(rewards, group_ids):
    return group_advantages(rewards, group_ids, scale_rewards="batch")


def one_group_a_call(rewards):
    return group_advantages(rewards, torch.zeros_like(rewards, dtype=torch.int64), scale_rewards="none")


def groups_of_one_size(rewards, group_ids, scale_rewards=True):
    rows = rewards.reshape(int(group_ids.max()) + 1, -1)  # fails where a row is missing
    centred = rows - rows.mean(dim=1, keepdim=True)
    return (centred / (rows.std(dim=1, keepdim=True) + 1e-4) if scale_rewards else centred).flatten()


@pytest.mark.parametrize(
    ("advantages", "title", "says"),
    [
        (groups_of_one_size, "failed sample as a reward", "not asked: takes groups of one size only"),
        (groups_of_one_size, "scaling by the deviation", "ok: scaled by deviation: a pair gets ±0.707"),
        (groups_of_one_size, "order matters", "falls in: another order of the rows changes advantages by"),
        (groups_of_one_size, "equal rewards", "falls in: equal rewards give up to"),
        (whitened_over_the_batch, "leakage between groups", "falls in: another prompt's rewards move advantages"),
        (scaled_by_the_batch, "leakage between groups", "ok: only the scale that all groups share moves"),
        (one_group_a_call, "leakage between groups", "falls in: another prompt's rewards move advantages"),
        (one_group_a_call, "scaling by the deviation", "ok: not scaled"),
        (one_group_a_call, "equal rewards", "ok: equal rewards give exactly 0"),
        (whitened_over_the_batch, "failed sample as a reward", "falls in: "),
        (group_advantages, "scaling by the deviation", "ok: scaled by deviation: a pair gets ±0.707 for any gap"),
    ],
)
def test_advantage_function_beside_the_loss_is_asked_the_group_traps(advantages: Callable, title: str, says: str):
    assert _shown(reinforce, title, advantages).startswith(says)


def test_refusing_a_failed_sample_is_no_trap():
    def strict(rewards, group_ids):
        if rewards.isnan().any():
            raise ValueError("a reward is NaN")
        return group_advantages(rewards, group_ids)

    assert _shown(reinforce, "failed sample as a reward", strict) == "ok: refuses NaN rewards: a reward is NaN"


# --- how a function is called -----------------------------------------------------------------------------------------


def test_function_gets_what_it_names_and_nothing_else():
    def loss(logprobs, advantages, *, mask, epsilon_high, unknown=7, max_completion_length):
        assert (unknown, epsilon_high, max_completion_length) == (7, 0.2, 7) and mask.dtype == torch.bool
        return -(logprobs * advantages[:, None] * mask).sum()

    assert subject_of(loss).run(drifted()).gradient.shape == (6, 7)


def test_rewards_that_are_only_logged_are_no_advantages():
    def loss(logprobs, advantages, rewards, group_ids, mask):
        return reinforce(logprobs, advantages, mask)

    assert _shown(loss, "leakage between groups").startswith("not asked")


def test_only_arguments_that_are_named_are_given():
    takes = subject_of(an_object_with_the_loss).takes
    assert takes & {"logprobs", "beta", "rewards", "delta", "loss_type", "weights"} == {"logprobs", "beta"}


def any_keyword(**given):
    return grpo_loss(**given)


def needs_more(logprobs, advantages, teacher):
    return logprobs.sum()


def by_position_only(logprobs, advantages, /):
    return logprobs.sum()


def no_advantages(logprobs, mask):
    return logprobs.sum()


def a_number(logprobs, advantages):
    return 3.0


def a_value_a_token(logprobs, advantages):
    return logprobs


def always_raising(logprobs, advantages):
    raise RuntimeError("no luck\nat all")


def one_number(rewards):
    return rewards.mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (needs_more, "needs 'teacher', which is not known; allowed, by name: logprobs, "),
        (by_position_only, "needs 'logprobs', by position only"),
        (no_advantages, "takes logprobs, mask; needs logprobs, and advantages or rewards"),
        (any_keyword, "takes none of the known arguments; needs logprobs, and advantages or rewards, by name"),
        (a_number, "returned float, allowed: a scalar tensor"),
        (a_value_a_token, "returned a tensor of shape (6, 7), allowed: a scalar tensor"),
        (always_raising, "RuntimeError: no luck"),
    ],
)
def test_function_that_cannot_be_examined_is_one_line(loss: Callable, says: str):
    with pytest.raises(KitError) as error:
        subject_of(loss)
    assert says in str(error.value) and loss.__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("advantages", "says"),
    [(one_number, "returned a tensor of shape ()"), (always_raising, "needs 'logprobs'"), (needs_more, "needs")],
)
def test_advantage_function_that_cannot_be_examined_is_one_line(advantages: Callable, says: str):
    with pytest.raises(KitError, match=says) as error:
        subject_of(reinforce, advantages=advantages)
    assert "\n" not in str(error.value)


def test_library_that_a_loss_lacks_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.grpo_trainer", None)
    with pytest.raises(KitError, match=r"trl_loss: .* ModuleNotFoundError: .*trl") as error:
        load_subject(f"{PROJECT_ROOT / 'tests' / 'support' / 'trl_loss.py'}:trl_loss")
    assert "\n" not in str(error.value)


# --- what the cases promise -------------------------------------------------------------------------------------------


def test_cases_are_possible_log_probabilities():
    batches = [drifted(seed, drift=1.0) for seed in range(20)] + [on_policy(), at_ratios([9.0, -9.0], [1, -1])]
    for batch in [*batches, enumerable().batch, enumerable(off_policy=True).batch]:
        assert all(bool((values < 0).all()) for values in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs))
    assert torch.equal(on_policy().logprobs, on_policy().old_logprobs)
    ratios = at_ratios([0.0, 2.0], [1, -1])
    torch.testing.assert_close((ratios.logprobs - ratios.old_logprobs)[:, 0], torch.tensor([0.0, 2.0]).double())


def test_mean_over_the_enumerable_rows_is_an_exact_expectation():
    case = enumerable()
    sampler = case.batch.old_logprobs.squeeze(1).exp()
    shares = torch.stack([(case.actions == action).double().mean() for action in range(5)])
    torch.testing.assert_close(sampler, shares[case.actions])
    torch.testing.assert_close(case.gradient(torch.full((16, 1), 1 / 16).double()), torch.zeros(5).double())


# --- the table and the command ----------------------------------------------------------------------------------------


def test_table_is_aligned_and_no_wider_than_asked():
    findings = examine(subject_of(classic_loss))
    for width in (80, 100):
        lines = table(findings, width).splitlines()
        assert max(map(len, lines)) <= width
        column = lines[0].index("found")
        assert all(line[column - 1] == " " and line[column] != " " for line in lines[1:-1])
    assert lines[-1] == "6 ok, 10 fallen into, 2 not asked"
    assert sum("FALLS IN" in line for line in lines) == 10 and "[seen in: " in table(findings)


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(("doctor", *arguments))
    return stop.value.code or 0


@pytest.mark.parametrize(
    ("place", "code", "says"),
    [
        (f"{HERE}:reinforce", 0, "8 ok, 0 fallen into, 10 not asked"),
        (f"{HERE}:mean_over_padding_too", 1, "FALLS IN   end of sequence"),
        (HERE, 2, f"grpo-kit: function {HERE!r}: allowed: module:function"),
        (f"{HERE}:nobody", 2, f"found no function 'nobody' in {HERE}"),
        ("no_such_module:loss", 2, "cannot be imported: ModuleNotFoundError"),
        (f"{HERE}:needs_more", 2, "needs 'teacher'"),
    ],
)
def test_command_says_by_its_exit_code_whether_there_are_traps(
    place: str, code: int, says: str, capsys: pytest.CaptureFixture
):
    assert _exit_code(place) == code
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
    assert code != 2 or (printed.err.count("\n") == 1 and not printed.out)


def test_command_asks_an_advantage_function_too(capsys: pytest.CaptureFixture):
    assert _exit_code(f"{HERE}:reinforce", "--advantages", f"{HERE}:whitened_over_the_batch") == 1
    assert "move advantages by" in capsys.readouterr().out


def test_command_finds_a_module_in_the_folder_where_it_is_called(tmp_path: Path):
    (tmp_path / "my_code.py").write_text("def my_loss(logprobs, advantages):\n    raise OSError('mine')\n")
    start = f"import sys; sys.path.append({str(PROJECT_ROOT)!r}); from grpo_kit.cli import main"
    command = [sys.executable, "-P", "-c", f"{start}; main(['doctor', 'my_code:my_loss'])"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "OSError: mine" in done.stderr, done.stderr


def test_each_question_has_a_trap_a_title_of_its_own_and_a_source():
    assert len({question.title for question in QUESTIONS}) == len(QUESTIONS) == 18
    assert all(question.source and question.asks.__doc__.startswith(f"{question.trap}") for question in QUESTIONS)


def test_property_can_be_asked_alone():
    assert loss_properties.nothing_after_the_end_counts(subject_of(grpo_loss)).startswith("padding changes nothing")
    with pytest.raises(NotAsked, match="takes no ref_logprobs"):
        loss_properties.kl_term_has_the_gradient_of_a_kl(subject_of(reinforce))
