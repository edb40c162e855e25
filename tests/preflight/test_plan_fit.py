"""What a plan tells: more never needs less, what to turn down, how long it takes, and what it cannot know."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from support.plan_cases import SMALL, phase_cost, policy_part, small_config
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.size.plan_profiles import MACHINES, RECORD, fingerprint
from grpo_kit.cli import main
from grpo_kit.config import KitError, load_config
from grpo_kit.preflight.plan import plan, planned_again
from grpo_kit.preflight.plan.advice import DIALS, advice
from grpo_kit.preflight.plan.architectures import PlanError
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.parts import Part, Plan
from grpo_kit.preflight.plan.policy import longest_rollout
from grpo_kit.preflight.plan.speed import ACCELERATORS, Speed, at, speed_of
from grpo_kit.preflight.plan.table import in_words
from grpo_kit.preflight.plan.tracing import Cost, Operation

LORA = {"model_settings__lora": {"r": 4, "alpha": 8}}


@functools.cache
def _adapted() -> Part:
    return policy_part(**LORA)


@functools.cache
def _plan() -> Plan:
    return plan(small_config(), "t4")


def _flops(work: object) -> int:
    with FlopCounterMode(display=False) as counted:
        work()
    return counted.get_total_flops()


# --- more never needs less --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "other", "least"),
    [
        ("training_settings__group_size", 4, "usual"),
        ("generation_settings__max_new_tokens", 8, "usual"),
        ("model_settings__gradient_checkpointing", True, "other"),
    ],
)
def test_more_of_a_setting_never_needs_less_memory_of_the_policy(setting: str, other: object, least: str):
    usual, changed = _adapted(), policy_part(**LORA, **{setting: other})
    small, large = (usual, changed) if least == "usual" else (changed, usual)
    for before, after in zip(small.phases, large.phases, strict=True):
        assert before.cost.peak <= after.cost.peak, before.name
    assert small.working < large.working


@pytest.mark.parametrize(
    ("setting", "less", "more"),
    [("generation_settings__height", 32, 64), ("generation_settings__image_batch_size", 1, 4)],
)
def test_more_of_a_setting_never_needs_less_memory_of_the_generator(setting: str, less: object, more: object):
    small, large = (plan_generator(small_config(**{setting: value}), torch.float32) for value in (less, more))
    assert small.resident == large.resident
    for before, after in zip(small.phases[1:], large.phases[1:], strict=True):
        assert before.cost.peak < after.cost.peak, before.name


def test_an_adapter_needs_neither_a_copy_for_reference_nor_the_moments_of_all_weights():
    whole, adapted = _plan().parts[0], _adapted()
    assert "reference" in whole.held and "reference" not in adapted.held
    assert adapted.held["optimizer"] < whole.held["optimizer"] / 10
    assert adapted.parameters > whole.parameters


def test_third_text_encoder_counts_where_it_is_kept():
    kept, dropped = (
        plan_generator(
            small_config(model_settings__drop_t5=drop, generation_settings__max_sequence_length=8), torch.float32
        )
        for drop in (False, True)
    )
    assert kept.parameters - dropped.parameters == 364160
    assert phase_cost(kept, "texts").flops > phase_cost(dropped, "texts").flops


def test_parts_add_up():
    found = _plan()
    assert found.resident == sum(part.resident for part in found.parts)
    assert found.peak == found.resident + max(phase.cost.peak for part in found.parts for phase in part.phases)
    assert found.largest[1].cost.peak == max(part.working for part in found.parts)
    together, *others = found.placements
    assert together.peak == found.peak
    assert all(way.peak <= together.peak for way in others)
    assert all(way.peak >= max(part.resident + part.working for part in found.parts) for way in others)
    assert found.seconds == pytest.approx(sum(map(found.part_seconds, found.parts)))


def test_pictures_lie_on_the_device_where_its_memory_is_the_hosts():
    found = _plan()
    shared = replace(found, speed=replace(found.speed, shares_host=True))
    assert shared.peak - found.peak == 4 * 32 * 32 * 3


# --- what does not fit ------------------------------------------------------------------------------------------------


def _with_memory(found: Plan, memory: float) -> Plan:
    return replace(found, speed=replace(found.speed, memory=memory, taken=0.0))


@pytest.mark.slow
def test_advice_saves_step_by_step_until_the_plan_fits():
    size = {"generation_settings__height": 64, "generation_settings__width": 64}
    config = small_config(training_settings__group_size=16, **size)
    found = plan(config, "t4")
    assert advice(found, config) == []
    tight = _with_memory(found, 0.8 * found.peak / 0.9)
    assert not tight.fits
    steps = advice(tight, config)
    assert steps[-1].fits and not any(step.fits for step in steps[:-1])
    assert all(step.saved >= 0 for step in steps)
    changed = load_config(config, {step.setting: step.value for step in steps})
    again = plan(changed, speed=tight.speed)
    assert again.peak == steps[-1].peak  # what was taken over from part to part is what a new plan finds
    assert found.peak - again.peak == sum(step.saved for step in steps)


@pytest.mark.slow
def test_advice_says_when_nothing_helps(monkeypatch: pytest.MonkeyPatch):
    tight = _with_memory(_plan(), 1e6)
    part = tight.largest[0].name
    monkeypatch.setattr("grpo_kit.preflight.plan.advice.DIALS", [dial for dial in DIALS if dial.part == part])
    steps = advice(tight, small_config())
    assert steps and not steps[-1].fits
    assert "even then it does not fit" in in_words(tight, steps)
    assert "no setting would help" in in_words(tight, [])


def test_planning_one_part_again_leaves_the_others():
    found = _plan()
    again = planned_again(found, small_config(generation_settings__image_batch_size=1), "generator")
    assert again.parts[0] is found.parts[0] and again.parts[2] is found.parts[2]
    assert again.parts[1].working < found.parts[1].working


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_is_the_longer_of_computing_and_waiting():
    speed = Speed("test", "", torch.float32, {("matmul", torch.float32): ((1, 100.0),)}, ((1, 10.0),), 0.5, memory=1.0)

    def seconds(flops: int, moved: int) -> float:
        return speed.seconds(Cost(0, {Operation("matmul", torch.float32, flops, moved): 1}))

    assert seconds(1000, 10) == pytest.approx(0.5 + 10)
    assert seconds(10, 1000) == pytest.approx(0.5 + 100)


def test_speeds_between_two_measured_sizes_lie_between_them():
    curve = ((1, 10.0), (100, 1000.0))
    assert at(curve, 10) == pytest.approx(100)
    assert at(curve, 0.1) == pytest.approx(10) and at(curve, 1e6) == pytest.approx(1000)


def test_faster_accelerators_take_less_time():
    slow, fast = (_plan().seconds, replace(_plan(), speed=speed_of("h100", "float32")).seconds)
    assert fast < slow


def test_auto_is_bfloat16_only_where_the_accelerator_has_it():
    assert {name: speed_of(name, "auto").dtype for name in ("t4", "l4", "m1")} == {
        "t4": torch.float32,
        "l4": torch.bfloat16,
        "m1": torch.float32,
    }


# --- the profiles, the command, the errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", MACHINES)
def test_recorded_plan_of_a_profile_is_of_this_profile_and_fits_with_room_to_spare(profile: str):
    record = json.loads(RECORD.read_text(encoding="utf-8"))[profile]
    assert record["settings"] == fingerprint(profile), "run python -m benchmarks.size.plan_profiles"
    assert record["fits"] and record["peak"] < record["room"]
    assert record["device"] == MACHINES[profile]
    assert f"{ACCELERATORS[MACHINES[profile]].memory:.0f}" in profile or profile == "apple"


def test_command_prints_a_table_and_json(capsys: pytest.CaptureFixture):
    options = [part for key, value in SMALL.items() for part in ("-o", f"{key}={json.dumps(value).strip(chr(34))}")]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--profile", "tiny", "--device", "l4", "--memory", "24GB", *options, *extra])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if extra:
            assert json.loads(text)["peak"] == _plan().peak
        else:
            assert "fits" in text and "40% is supposed" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "tpu"], "allowed: auto, cpu, mps, cuda:N, t4"),
        (["--memory", "lots"], "allowed: a size such as 24GB"),
        (["-o", "model_settings.vlm_model=nobody/nothing", "--device", "t4"], "hf download nobody/nothing"),
        (["-o", "model_settings.sd_model=nobody/nothing", "--device", "t4"], "hf download nobody/nothing"),
        (["-o", "model_settings.clip_model=nobody/nothing", "--device", "t4"], "hf download nobody/nothing"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--profile", "tiny", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


@pytest.mark.slow
def test_what_a_policy_looks_at_is_planned_in_the_size_in_which_it_is_drawn():
    usual, larger = small_config(model_settings__use_image=True), {"generation_settings__height": 64}
    for config, size in ((usual, (32, 32)), (small_config(model_settings__use_image=True, **larger), (32, 64))):
        assert [one.images[0].size for one in longest_rollout(config).contexts] == [size] * 2
    words, drawing, _ = _plan().parts  # of a policy that looks at nothing
    looking, more = policy_part(model_settings__use_image=True), plan_generator(usual, torch.float32)
    assert phase_cost(words, "sampling").flops < phase_cost(looking, "sampling").flops
    assert [part.pictures for part in (drawing, more)] == [4 * 3 * 32 * 32, 6 * 3 * 32 * 32]
    assert phase_cost(more, "denoising").flops == 1.5 * phase_cost(drawing, "denoising").flops


def test_a_policy_that_looks_needs_its_processor_to_be_planned():
    known = {"model_settings__vlm_model": "Qwen/Qwen2.5-VL-3B-Instruct"}
    with pytest.raises(PlanError, match=r"use_image: found true, but no processor .* hf download Qwen/") as error:
        policy_part(model_settings__use_image=True, **known)
    assert "\n" not in str(error.value)
    assert issubclass(PlanError, KitError)
