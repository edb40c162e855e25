"""The command line: `grpo-kit run | train | evaluate | report | check | doctor`.

Exit codes: 0 done, 1 something failed on the way, 2 a mistake in what was asked (one line says which), 130 interrupted.
"""

import contextlib
import json
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grpo_kit.runs.headless import Executed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a vision-language model to write better text-to-image prompts, with GRPO.",
)

Profile = Annotated[
    str, typer.Option("--profile", "--config", help="A profile (tiny, workshop, full, classic) or a JSON file.")
]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder; an existing run is continued.")]
Name = Annotated[str, typer.Option(help="The run's name, a folder in reports/.")]
Run = Annotated[str, typer.Argument(help="A run: its folder, or its name in reports/.")]


@app.command()
def run(
    profile: Profile = "tiny",
    notebooks: Annotated[str, typer.Option(help="Which of the series, such as 00,07; all when left out.")] = "",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="name=value, for the notebooks that have it.")
    ] = None,
    run_dir: RunDir = None,
    name: Name = "",
    minutes_per_cell: Annotated[float, typer.Option(min=0.01, help="The longest that a cell may take.")] = 60.0,
) -> None:
    """Execute the notebooks, and write the report of the run."""
    from grpo_kit.config import load_config
    from grpo_kit.runs.headless import execute, plan, select_notebooks

    config = load_config(profile)
    chosen = select_notebooks([part for part in notebooks.split(",") if part.strip()])
    folder = new_run_folder(config.profile, run_dir, name)
    planned = plan(chosen, profile, folder, _pairs(parameter or [], "-p"))
    print(f"run folder: {folder}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the notebook's kernel ends too
    ran: list[Executed] = []
    try:
        for number, notebook in enumerate(planned, start=1):
            print(f"[{number}/{len(planned)}] {notebook.name}", flush=True)
            with _progress_told(folder):
                ran.append(execute(notebook, folder / "notebooks", minutes_per_cell))
            if ran[-1].error:
                break
    except KeyboardInterrupt:
        given = [part for text in parameter or [] for part in ("-p", text)]
        raise _interrupted("run", "--profile", profile, "--run-dir", str(folder), *given) from None
    _finish(folder, ran)
    if ran[-1].error:
        print(f"{ran[-1].name} failed: {ran[-1].error} (as far as it came: {ran[-1].path})", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def train(
    profile: Annotated[str, typer.Option("--profile", "--config", help="As for run; tiny when left out.")] = "",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value; may be repeated.")] = None,
    run_dir: RunDir = None,
    name: Name = "",
) -> None:
    """Train a policy into a run folder; a run that is there goes on, with its own settings unless others are given."""
    from grpo_kit.config import load_config

    changes = _overrides(override or [])
    config = load_config(profile or "tiny", changes)
    folder = new_run_folder(config.profile, run_dir, name)
    if not profile and (folder / "config.json").is_file():
        config = load_config(folder, changes)
    print(f"run folder: {folder}", flush=True)
    from grpo_kit import load_experiment
    from grpo_kit import train as train_policy

    try:
        train_policy(load_experiment(config), folder)
    except KeyboardInterrupt:
        raise _interrupted("train", "--run-dir", str(folder)) from None
    print(f"done. Next: grpo-kit evaluate {folder}")


@app.command()
def evaluate(run: Run) -> None:
    """Compare raw prompt, initial policy and trained policy on the held-out prompts."""
    from grpo_kit.config import KitError, load_config

    folder = existing_run(run)
    config = load_config(folder)
    from grpo_kit import evaluate as evaluate_policy
    from grpo_kit import load_experiment

    if not (folder / "best").is_dir():
        raise KitError(f"run {folder}: no trained policy in it (best/). Train it: grpo-kit train --run-dir {folder}")
    compare = ("raw", "initial", "trained") + (("oracle",) if config.evaluation_settings.gold else ())
    try:
        evaluate_policy(load_experiment(config, trained=folder / "best"), compare=compare, run_dir=folder)
    except KeyboardInterrupt:
        raise _interrupted("evaluate", str(folder)) from None
    _print_results(folder)
    print(f"Next: grpo-kit report {folder}")


@app.command()
def report(run: Run) -> None:
    """Write index.html from what a run left on disk."""
    folder = existing_run(run)
    from grpo_kit.show.report import write_report

    _print_results(folder)
    print(f"report: {write_report(folder)}")


@app.command()
def check(profile: Profile = "tiny") -> None:
    """Say what runs on this machine, and what to do where something does not."""
    from grpo_kit.check import check_machine
    from grpo_kit.config import load_config

    problems = 0
    for finding in check_machine(load_config(profile)):
        problems += not finding.ok
        print(finding, flush=True)
    if problems:
        print(f"{problems} problem{'s' if problems > 1 else ''} found", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def doctor(
    loss: Annotated[str, typer.Argument(help="A loss function, as module:function.")],
    advantages: Annotated[str, typer.Option(help="The advantage function that goes with it, as module:function.")] = "",
) -> None:
    """Say which known traps of GRPO a loss function falls into; for example, of the file my_code.py in this folder:

    grpo-kit doctor my_code:my_loss --advantages my_code:my_advantages

    The loss may take any of: logprobs, old_logprobs, ref_logprobs, mask (each one value a token), advantages or rewards
    with group_ids (one value a row), beta, epsilon, epsilon_high, delta, loss_type, importance_sampling_level,
    kl_estimator, use_bias_correction_kl, weights, num_items_in_batch, max_completion_length. It returns a scalar
    tensor, or an object with one in .loss. An advantage function takes rewards and group_ids: one value a row in, one
    out. Exit code 1 where a trap is fallen into.
    """
    from grpo_kit.doctor import FALLS_IN, examine, load_subject, table

    findings = examine(load_subject(loss, advantages))
    print(table(findings))
    if any(finding.outcome == FALLS_IN for finding in findings):
        raise typer.Exit(1)


def new_run_folder(profile: str, run_dir: Path | None, name: str) -> Path:
    """Where a run goes: the folder asked for, or one in reports/, named as asked or after profile and time."""
    from grpo_kit.config import PROJECT_ROOT, KitError

    if run_dir is not None and name:
        raise KitError("--run-dir and --name: both given. Give one of them")
    if run_dir is not None:
        return run_dir.expanduser().resolve()
    name = name or f"{profile}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise KitError(f"run name {name!r:.60}: allowed: up to 100 letters, digits, '.', '_', '-', the first no sign")
    return PROJECT_ROOT / "reports" / name


def existing_run(text: str) -> Path:
    """The folder of a run given by path, or by its name in reports/."""
    from grpo_kit.config import PROJECT_ROOT, KitError

    reports = PROJECT_ROOT / "reports"
    if "\0" not in text and len(text) < 4096:
        folders = [Path(text).expanduser().resolve()] + ([reports / text] if Path(text).name == text else [])
        for folder in folders:
            if (folder / "config.json").is_file() or (folder / "final_results.json").is_file():
                return folder
    runs = sorted(path.parent for path in reports.glob("*/config.json"))
    known = ", ".join(path.name for path in runs[-5:]) or "none yet. Make one: grpo-kit run"
    raise KitError(f"run {text!r:.100}: no run folder (one with a config.json); runs in reports/: {known}")


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    from grpo_kit.config import KitError

    pairs: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise KitError(f"{option} {text!r:.80}: allowed: name=value")
        if key in pairs:
            raise KitError(f"{option} {key!r:.80}: given twice. Give it once")
        pairs[key] = value
    return pairs


def _overrides(given: Sequence[str]) -> dict[str, object]:
    """Settings by dotted key; a path that exists where the command was called counts from there."""
    from grpo_kit.config import MODEL_PATHS, PROMPT_PATHS

    paths = {".".join(place) for place in MODEL_PATHS + PROMPT_PATHS}
    pairs: dict[str, object] = {}
    for key, value in _pairs(given, "-o").items():
        here = key in paths and value and "\0" not in value and Path(value).exists()
        pairs[key] = str(Path(value).resolve()) if here else value
    return pairs


@contextlib.contextmanager
def _progress_told(folder: Path, every: float = 20.0) -> Iterator[None]:
    """Say while a notebook trains how far it is, from the last line of the run's metrics.jsonl."""
    done = threading.Event()

    def watch() -> None:
        told = ""
        while not done.wait(every):
            line = _last_metrics(folder / "metrics.jsonl")
            if line and line != told:
                print(f"      {line}", flush=True)
            told = line

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _last_metrics(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        row = json.loads(lines[-1])
        return f"iteration {row['iteration']}: reward {row['reward']:.3f}, {row['step_time']:.1f} s an iteration"
    except (IndexError, ValueError, KeyError, TypeError):  # nothing there yet, or half a line
        return ""


def _interrupted(*again: str) -> typer.Exit:
    print(f"\ninterrupted; it goes on where it stopped with: grpo-kit {shlex.join(again)}", file=sys.stderr)
    return typer.Exit(130)


def _finish(folder: Path, ran: "Sequence[Executed]") -> None:
    """Print what a run brought and what it took, and write its page."""
    from grpo_kit.show.report import write_report

    _print_results(folder)
    width = max(len(notebook.name) for notebook in ran)
    print("\nminutes per notebook")
    for notebook in ran:
        print(f"  {notebook.name:<{width}}  {notebook.minutes:6.1f}{'  failed' if notebook.error else ''}")
    print(f"  {'together':<{width}}  {sum(notebook.minutes for notebook in ran):6.1f}")
    if (folder / "config.json").is_file():
        print(f"\nreport: {write_report(folder)}")


def _print_results(folder: Path) -> None:
    results = folder / "final_results.json"
    if not results.is_file():
        return
    from grpo_kit.show.report import comparison_table

    data = json.loads(results.read_text(encoding="utf-8"))
    print(f"\n{comparison_table(data)}")
    if data.get("minutes"):
        print("\nminutes per stage")
        for stage, minutes in data["minutes"].items():
            print(f"  {stage:<12} {minutes:6.1f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake that the user can mend is one line on stderr and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="grpo-kit")
    except Exception as error:
        from grpo_kit.config import KitError  # here, since it takes longer than --help may

        if not isinstance(error, KitError):
            raise
        print(f"grpo-kit: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
