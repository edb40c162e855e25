"""Interruptions: a command unwinds, says how it goes on and leaves nothing behind; a notebook's objects stay usable."""

import copy
import dataclasses
import gc
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from jupyter_client.manager import KernelManager
from support.broken_twins import broken_versions
from support.config_files import save_config
from support.forked import Forked
from support.wandb_files import parts, records

from grpo_kit import cli
from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.runs import interrupts, places
from grpo_kit.runs.folder import RunError, RunFolder
from grpo_kit.runs.tracking import Tracker
from grpo_kit.training import accumulation
from grpo_kit.training import launch as launch_file
from grpo_kit.training import loop as loop_file
from grpo_kit.training.loop import train
from tests.chaos import signals as r4
from tests.chaos.nonfinite import LORA
from tests.chaos.phases import content, differences

TENSORBOARD = {"tracking_settings.tensorboard": True}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    return save_config(load_config("tiny", r4.SETTINGS | TENSORBOARD), folder / "quick.json")


# --- a command --------------------------------------------------------------------------------------------------------


def test_terminated_training_closes_its_mirror_and_goes_on_with_what_it_says(profile: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ended = r4.interrupted_train(profile, tmp_path / "run", "step", 0.5, signal.SIGTERM)
    assert not r4.problems(ended, signal.SIGTERM, tmp_path / "run")
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in seen.Scalars("train/reward")] == [1]
    said = r4.said_command(ended)
    assert said == ["train", "--profile", str(profile), "--run-dir", str(tmp_path / "run")]
    assert r4.command(said, tmp_path / "again.err").code == 0  # R4 compares the files with an uninterrupted run's
    assert (tmp_path / "run" / "checkpoints" / "iter_000003").is_dir()


def test_a_terminal_that_hangs_up_is_answered_too(profile: Path, tmp_path: Path):
    ended = r4.interrupted_train(profile, tmp_path / "run", "images", 0.2, signal.SIGHUP)
    assert not r4.problems(ended, signal.SIGHUP, tmp_path / "run")


@pytest.mark.slow
def test_wandb_is_told_that_its_run_was_terminated(tmp_path: Path):
    offline = {"tracking_settings.wandb": "offline"}
    profile = save_config(load_config("tiny", r4.SETTINGS | offline), tmp_path / "quick.json")
    ended = r4.interrupted_train(profile, tmp_path / "run", "rewards", 0.5, signal.SIGTERM)
    assert not r4.problems(ended, signal.SIGTERM, tmp_path / "run")
    (part,) = parts(tmp_path / "run")
    assert [record.exit.exit_code for record in records(part) if record.HasField("exit")] == [143]


class Swallowing:
    """An object whose end takes a while: an exception that a signal raises there is lost, as Python documents."""

    def __del__(self) -> None:
        time.sleep(30)


def _interrupt_that_is_lost(*_: object, **options: object) -> None:
    threading_timer(0.2)
    Swallowing()
    time.sleep(30)


def _unwinding_that_hangs(*_: object, **options: object) -> None:
    try:
        threading_timer(0.2)
        time.sleep(30)
    finally:
        time.sleep(30)


def threading_timer(seconds: float) -> None:
    """This process gets SIGTERM in so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("hang", [_interrupt_that_is_lost, _unwinding_that_hangs])
def test_command_ends_though_it_does_not_unwind(hang: Callable, profile: Path, tmp_path: Path):
    def work() -> None:
        vars(loop_file).update(load_experiment=lambda config: None, train=hang)
        interrupts.UNWINDING_SECONDS = 0.5
        cli.main(["train", "--profile", str(profile), "--run-dir", str(tmp_path / "run")])

    started = time.monotonic()
    ended = r4.wait(r4.in_fork(work, tmp_path / "err"), tmp_path / "err", lambda: started)
    assert ended.code == 143 and ended.seconds < 10
    assert r4.said_command(ended) == ["train", "--profile", str(profile), "--run-dir", str(tmp_path / "run")]


OPTIONS = ["train", "-o", "training_settings.seed=3", "--profile", "workshop"]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (OPTIONS, ["--run-dir", str(PROJECT_ROOT / "reports" / "workshop-now")]),
        ([*OPTIONS, "--name", "mine"], []),
        ([*OPTIONS, "--run-dir", "my run", "--launch", "2"], []),
    ],
)
def test_what_is_said_after_an_interrupt_has_all_options_and_a_folder(
    given: list[str], added: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_file, "start", interrupt)
    monkeypatch.setattr(launch_file, "launch", interrupt)
    monkeypatch.setattr(places.time, "strftime", lambda form: "now")
    with pytest.raises(SystemExit) as stop:
        cli.main(given)
    assert stop.value.code == 130
    said = capsys.readouterr().err.strip().split("with: grpo-kit ", 1)[1]
    assert shlex.split(said) == [*given, *added]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_is_the_signals_where_a_library_raises_another(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture
):
    """As ray.wait does, which raises SystemExit(1) in place of a handler's exception."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    try:
        with pytest.raises(SystemExit) as stop, interrupts.resumable(["train"]):
            try:
                signal.raise_signal(number)
            finally:
                raise SystemExit(1)
    finally:
        signal.signal(number, before)
    assert stop.value.code == code and "with: grpo-kit train" in capsys.readouterr().err


def test_a_command_that_ends_with_a_code_of_its_own_keeps_it(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop, interrupts.resumable(["train"]):
        raise SystemExit(3)
    assert stop.value.code == 3 and capsys.readouterr().err == ""


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyError), interrupts.resumable([]):
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN, *before)
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# --- a notebook's objects ---------------------------------------------------------------------------------------------


def _own(kit: Experiment, policy: Policy | None = None, **training: object) -> Experiment:
    changes = {f"training_settings.{name}": value for name, value in training.items()}
    config = load_config(kit.config, r4.SETTINGS | changes)
    return dataclasses.replace(kit, config=config, policy=copy.deepcopy(policy or kit.policy))


@pytest.fixture(scope="module")
def adapted(kit: Experiment) -> Policy:
    return load_policy(load_config(kit.config, {"model_settings.lora": LORA}))


@pytest.fixture(scope="module")
def expected(kit: Experiment, adapted: Policy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train(_own(kit, adapted, num_iterations=2), folder, progress=False)
    return content(folder)


@pytest.mark.parametrize(("phase", "share"), [("step", 0.02), ("step", 0.6)])
def test_interrupted_objects_of_an_adapter_stay_usable_and_go_on(
    kit: Experiment, adapted: Policy, expected: dict[str, str], tmp_path: Path, phase: str, share: float
):
    own = _own(kit, adapted, num_iterations=2)
    assert r4.interrupted_objects(own, tmp_path / "run", phase, share) == []
    assert not differences(tmp_path / "run", expected)


KERNEL = """import sys, dataclasses, time
sys.path.insert(0, {root!r})
import grpo_kit as gk
from pathlib import Path
from tests.chaos.phases import interrupting
kit = gk.load_experiment(gk.load_config({profile!r}))
with interrupting("step", 0.3, Path({fired!r}).touch):
    gk.train(kit, {folder!r}, progress=False)"""
AFTER = "print(len(str(kit.policy.enhance_prompt('a red ball'))), gk.train(kit, {folder!r}, progress=False).iterations)"


@pytest.mark.slow
def test_kernel_that_is_interrupted_goes_on_with_the_same_objects(profile: Path, tmp_path: Path):
    whole = r4.command(["train", "--profile", str(profile), "--run-dir", str(tmp_path / "whole")], tmp_path / "w.err")
    assert whole.code == 0
    places = {"folder": str(tmp_path / "run"), "fired": str(tmp_path / "fired")}
    manager = KernelManager(kernel_name="python3")
    manager.kernel_spec.metadata["kernel_provisioner"] = {"provisioner_name": "grpo-kit-forked"}
    manager.start_kernel(env=os.environ | {"OMP_NUM_THREADS": "1"})
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=600)
    try:
        code = KERNEL.format(root=str(PROJECT_ROOT), profile=str(profile), **places)
        # without stop_on_error=False the kernel may still be refusing requests when the next one comes
        asked = client.execute(code, stop_on_error=False)
        _wait_for(tmp_path / "fired")
        manager.interrupt_kernel()
        assert _reply(client, asked)["ename"] == "KeyboardInterrupt"
        said = []
        reply = client.execute_interactive(AFTER.format(**places), timeout=600, output_hook=said.append)["content"]
        assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    printed = "".join(message["content"].get("text", "") for message in said)
    assert printed.split()[-1] == "3" and int(printed.split()[-2]) > 0
    assert not differences(tmp_path / "run", content(tmp_path / "whole"))


def _wait_for(place: Path) -> None:
    until = time.monotonic() + 600
    while not place.exists():
        assert time.monotonic() < until, f"{place.name} did not come"
        time.sleep(0.01)


def _reply(client: object, asked: str) -> dict:
    while (message := client.get_shell_msg(timeout=600))["parent_header"].get("msg_id") != asked:
        pass
    return message["content"]


def _half_off(policy: Policy) -> None:
    """As an interrupt leaves an adapter that was about to be switched on again: off in one layer, which is frozen."""
    layer = next(module for name, module in policy.model.named_modules() if name.endswith("layers.1.self_attn.q_proj"))
    layer.enable_adapters(False)


def test_adapter_that_an_interrupt_left_half_off_is_whole_again(
    kit: Experiment, adapted: Policy, expected: dict[str, str], tmp_path: Path
):
    own = _own(kit, adapted, num_iterations=2)
    _half_off(own.policy)
    assert len(own.policy.trainable_parameters()) < len(adapted.trainable_parameters())
    train(own, tmp_path / "run", progress=False)
    assert not differences(tmp_path / "run", expected)


def nothing_is_put_right(patch: pytest.MonkeyPatch) -> None:
    """The run trains what the interrupt left to train."""
    patch.setattr(Policy, "recover", lambda self: None)


@pytest.mark.parametrize("break_it", broken_versions({nothing_is_put_right: "T24"}))
def test_adapter_that_stays_half_off_would_be_noticed(
    kit: Experiment, adapted: Policy, expected: dict[str, str], tmp_path: Path, monkeypatch, break_it: Callable
):
    own = _own(kit, adapted, num_iterations=2)
    _half_off(own.policy)
    break_it(monkeypatch)
    train(own, tmp_path / "run", progress=False)
    assert differences(tmp_path / "run", expected)


@pytest.mark.parametrize("clean", [True, False])
def test_gradient_left_by_an_interrupt_would_be_added_if_a_step_did_not_start_clean(
    kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: bool
):
    """Between backward and the optimizer, where everything has a gradient."""

    def step_stopped(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    whole, own = _own(kit, num_iterations=1), _own(kit, num_iterations=1)
    train(whole, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        if not clean:
            patch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)
            patch.setattr(Policy, "recover", lambda self: None)
        with patch.context() as interrupted, pytest.raises(KeyboardInterrupt):
            interrupted.setattr(accumulation, "step_or_restore", step_stopped)
            train(own, tmp_path / "run", progress=False)
        assert any(p.grad is not None for p in own.policy.trainable_parameters()) != clean
        train(own, tmp_path / "run", progress=False)
    assert bool(differences(tmp_path / "run", content(tmp_path / "whole"))) != clean


# --- what is opened is closed -----------------------------------------------------------------------------------------


def _interrupted_at(call: int, work: Callable[[], object]) -> tuple[bool, KeyboardInterrupt | None]:
    """Do the work, with an interrupt at the n-th function call.

    Whether it came that far, and what it raised, which keeps all its frames alive: nothing where the collector, at work
    just then, kept the interrupt to itself.
    """
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        work()
        came, call = calls >= call, 0  # what else is called is not the work
    except KeyboardInterrupt as error:
        return True, error
    finally:
        sys.setprofile(None)
    return came, None


def generator_holds(folder: RunFolder, stack: ExitStack) -> None:
    """Broken: between the generator's `yield` and the stack's note of it, nothing closes it but the collector."""

    @contextmanager
    def held() -> Iterator[None]:
        with ExitStack() as inner:
            folder.hold(inner)
            yield

    stack.enter_context(held())


@pytest.mark.slow
@pytest.mark.parametrize(("hold", "broken"), [(RunFolder.hold, False), (generator_holds, True)])
def test_folder_is_free_wherever_taking_it_is_interrupted(hold: Callable, broken: bool, tmp_path: Path):
    # a process of its own: an interrupt inside the logging library leaves that library's lock held
    process = Forked(lambda: print(*held_after_interrupts(hold, tmp_path / "run")), tmp_path / "said")
    assert process.wait() == 0, process.said
    held = process.said.splitlines()[-1].split()
    assert len(held) > 500 and ("True" in held) == broken


def held_after_interrupts(hold: Callable[[RunFolder, ExitStack], None], place: Path) -> list[bool]:
    """Whether a folder is still held after its taking was interrupted, for each function call of that."""
    folder, came, held = RunFolder(place), True, []
    with ExitStack() as stack:
        hold(folder, stack)  # the libraries keep what they work out the first time
    while came:
        with ExitStack() as stack:
            came, error = _interrupted_at(len(held) + 1, lambda stack=stack: hold(folder, stack))
        held.append(_is_held(folder))  # the frames of the error still hold what they opened
        del error
        if held[-1]:
            gc.collect()
    return held


def _is_held(folder: RunFolder) -> bool:
    """Whether somebody holds the folder, or writes the kit's log into it."""
    try:
        folder.require_free()
    except RunError:
        return True
    log = logging.getLogger("grpo_kit")
    return not log.propagate or any(isinstance(handler, logging.FileHandler) for handler in log.handlers)


def test_mirror_that_is_interrupted_while_it_opens_is_closed(kit: Experiment, tmp_path: Path):
    finished = []

    class Slow:
        name = "slow"

        def start(self) -> None:
            raise KeyboardInterrupt

        def finish(self, exit_code: int) -> None:
            finished.append(exit_code)

    tracker = Tracker(kit.config, tmp_path)
    tracker._mirrors = [Slow()]
    with pytest.raises(KeyboardInterrupt), tracker:
        pass
    assert finished == [130]
