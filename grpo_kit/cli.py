"""The command line: `grpo-kit run | train | evaluate | report | compare | replay | push | plan | check | doctor`.

Exit codes: 0 done, 1 something failed on the way, 2 a mistake in what was asked (one line says which), 130 interrupted
(Ctrl-C), 143 terminated (SIGTERM), 129 hung up. Of an interrupted command one line says how it goes on.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grpo_kit.config import Config
    from grpo_kit.evaluation.pools import Pool
    from grpo_kit.runs.cluster import Cluster
    from grpo_kit.runs.grid import PlannedTrial, TrialResult
    from grpo_kit.runs.notebooks import Executed, Planned

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a vision-language model to write better text-to-image prompts, with GRPO.",
)

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # those that end a command
_UNWINDING = 8.0  # seconds that it may take after a signal

Profile = Annotated[
    str, typer.Option("--profile", "--config", help="A profile (tiny, workshop, full, classic) or a JSON file.")
]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder; an existing run is continued.")]
Name = Annotated[str, typer.Option(help="The run's name, a folder in reports/.")]
Run = Annotated[str, typer.Argument(help="A run: its folder, or its name in reports/.")]
_RAY_HELP = (
    "With --grid: run the trials on a Ray cluster: local (several at once on this machine), auto, or host:port. "
    "All its machines must see the grid's folder, and this checkout, at the same path."
)


@app.command()
def run(
    profile: Profile = "tiny",
    notebooks: Annotated[str, typer.Option(help="Which of the series, such as 00,07; all when left out.")] = "",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="name=value, for the notebooks that have it.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value of the profile.")] = None,
    grid: Annotated[Path | None, typer.Option(help="YAML or JSON, name: [values]; a run for each combination.")] = None,
    run_dir: RunDir = None,
    name: Name = "",
    minutes_per_cell: Annotated[float, typer.Option(min=0.01, help="The longest that a cell may take.")] = 60.0,
    yes: Annotated[bool, typer.Option("--yes", help="Run a large grid without asking back.")] = False,
    ray: Annotated[str, typer.Option(metavar="ADDRESS", help=_RAY_HELP)] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: trials at once; as many as fit.")] = None,
    cpus: Annotated[float | None, typer.Option(min=0.01, help="With --ray: CPUs of a trial; 1.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="With --ray: GPUs of a trial; 0: it sees none.")] = None,
) -> None:
    """Execute the notebooks, and write the report of the run; with --grid, of a run for each combination."""
    from grpo_kit.config import load_config
    from grpo_kit.runs.notebooks import plan, select_notebooks

    config = load_config(profile)
    chosen = select_notebooks([part for part in notebooks.split(",") if part.strip()])
    folder = new_run_folder(config.profile, run_dir, name)
    parameters, settings = _pairs(parameter or [], "-p"), _overrides(override or [])
    again = ["run", "--profile", profile, "--run-dir", str(folder)]
    again += ["--notebooks", notebooks] if notebooks else []
    for option, given in (("-p", parameter), ("-o", override)):
        again += [part for text in given or () for part in (option, text)]
    cluster = _cluster(grid, ray, workers, cpus, gpus)
    if grid is not None:
        trials = _planned_grid(grid, chosen, profile, folder, parameters, settings, yes)
        again += ["--grid", str(grid), *(["--yes"] if yes else []), *_ray_options(ray, workers, cpus, gpus)]
        _run_grid(trials, folder, minutes_per_cell, again, cluster)
        return
    planned = plan(chosen, profile, folder, parameters, settings)
    _run_notebooks(planned, profile, settings, folder, minutes_per_cell, again)


@app.command()
def train(
    profile: Annotated[str, typer.Option("--profile", "--config", help="As for run; tiny when left out.")] = "",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value; may be repeated.")] = None,
    run_dir: RunDir = None,
    name: Name = "",
    processes: Annotated[
        int, typer.Option("--launch", min=1, metavar="N", help="Share the work among N processes, by accelerate.")
    ] = 1,
) -> None:
    """Train a policy into a run folder; a run that is there goes on, with its own settings unless others are given."""
    from grpo_kit.config import KitError, load_config

    changes = _overrides(override or [])
    config = load_config(profile or "tiny", changes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and run_dir is None and not name:
        raise KitError("--run-dir: not given, but several processes have to agree on one. Give --run-dir or --name")
    folder = new_run_folder(config.profile, run_dir, name)
    if not profile and (folder / "config.json").is_file():
        config = load_config(folder, changes)
    options = [part for text in override or () for part in ("-o", text)]
    with _goes_on(lambda: _train_again(folder, profile, options, processes)):
        if processes > 1:
            _launch(processes, profile, options, folder, config)
            return
        is_main = _train(config, folder)
    if is_main:
        print(f"done. Next: grpo-kit evaluate {folder}")


def _train(config: "Config", folder: Path) -> bool:
    """Train, with the other processes where this one was launched with some; whether it is the one that speaks."""
    from grpo_kit.training.launch import joined

    with joined(config, folder) as processes:
        from grpo_kit import load_experiment
        from grpo_kit import train as train_policy
        from grpo_kit.runs.folder import RunFolder

        if processes.is_main:
            print(f"run folder: {folder}", flush=True)
            RunFolder(folder).require_free()
        train_policy(load_experiment(config), folder, processes=processes)
    return processes.is_main


def _launch(processes: int, profile: str, options: Sequence[str], folder: Path, config: "Config") -> None:
    """Train in several processes, which are started with the same options."""
    from grpo_kit.training.launch import launch

    given = [*(("--profile", profile) if profile else ()), *options, "--run-dir", str(folder)]
    code = launch(processes, given, config, folder)
    if code > 128:  # a signal, which the launcher has handed on
        raise SystemExit(code)
    if code:
        raise typer.Exit(code)


@app.command()
def evaluate(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN [RUN]...", help="A run, several, or a grid: folders, or names.")
    ],
    override: Annotated[list[str] | None, typer.Option("-o", help="evaluation_settings.key=value; repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for what several runs, or another evaluation, gave.")
    ] = None,
) -> None:
    """Compare raw prompt, initial policy and trained policy on the held-out prompts; of several runs, each policy.

    Several runs are judged alike: by the first one's settings, generator and rewards, on the same prompts and latents.
    A folder with a policy alone may stand among them. Runs that differ only in their seed are pooled.
    """
    from grpo_kit.config import PROJECT_ROOT, KitError, load_config

    folders = [folder for run in runs for folder in _trials(run) or [existing_run(run)]]
    config = load_config(folders[0], _overrides(override or []))
    if not (folders[0] / "best").is_dir():
        advice = f"Train it: grpo-kit train --run-dir {folders[0]}"
        raise KitError(f"run {folders[0]}: no trained policy in it (best/). {advice}")
    several = len(folders) > 1
    place = PROJECT_ROOT / "reports" / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}" if several else folders[0]
    place = place if out is None else out.expanduser().resolve()
    if several and place in folders:
        raise KitError(f"--out {place}: one of the runs, whose own evaluation would be lost. Name another folder")
    with _goes_on(lambda: ["evaluate", *map(str, folders)], "it starts again"):
        (_evaluate_several if several else _evaluate_one)(config, folders, place)
    _print_results(place)
    print(f"written: {place}" if several else f"Next: grpo-kit report {place}")


@app.command()
def report(
    run: Run,
    share: Annotated[Path | None, typer.Option(help="A folder for a small copy of the pages, to send on.")] = None,
) -> None:
    """Write index.html from what a run left on disk."""
    folder = existing_run(run)
    from grpo_kit.show.report import write_report
    from grpo_kit.show.share import share_pages

    _print_results(folder)
    print(f"report: {write_report(folder)}")
    if share is not None:
        pages = share_pages(folder, share)
        print(f"shared: {len(pages)} pages, {sum(page.stat().st_size for page in pages) / 1e6:.1f} MB, {pages[0]}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs, or a grid: folders, or names in reports/.")],
    html: Annotated[Path | None, typer.Option(help="The page; one in reports/ when left out.")] = None,
    tables: Annotated[Path | None, typer.Option(help="A folder for runs.jsonl and curves.parquet.")] = None,
) -> None:
    """Lay runs side by side: settings, final figures with intervals, curves, seconds; seeds of a setting are pooled."""
    from grpo_kit.config import PROJECT_ROOT, KitError

    folders = [folder for run in runs for folder in _trials(run) or [existing_run(run)]]
    if len(folders) < 2:
        raise KitError(f"compare: found 1 run ({folders[0].name}), allowed: at least 2, or a grid. Name another run")
    page = html or PROJECT_ROOT / "reports" / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.html"
    if page.is_dir():
        raise KitError(f"--html {page}: a folder. Name a file in it")
    if tables is not None and tables.is_file():
        raise KitError(f"--tables {tables}: a file. Name a folder")
    pools = _compare(folders, page.expanduser().resolve())
    if tables is not None:
        from grpo_kit.evaluation.pools import write_tables

        print(f"tables: {write_tables(pools, tables)}")


@app.command()
def replay(
    run: Run,
    iteration: Annotated[int, typer.Option(help="Which one; of a branch, its last one that both runs have.")],
    step_only: Annotated[
        bool, typer.Option("--step-only", help="Only the step, on the recorded rollout; nothing is drawn.")
    ] = False,
    branch: Annotated[bool, typer.Option("--branch", help="Make a new run that goes on from there.")] = False,
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value of the branch.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The branch's folder.")] = None,
    name: Annotated[str, typer.Option(help="The branch's name, a folder in reports/.")] = "",
) -> None:
    """Compute an iteration of a run again and compare it bit for bit with its record; or branch off from it.

    It starts from the newest checkpoint before the iteration, or from the config's own models, and runs what lies
    between in memory; the run's folder is only read. Exit code 1 where something differs: the last line says what is
    first different. Bits agree on the same machine with the same versions; where those changed, that line says so.

    With --branch, a new run folder has the run's history up to the iteration and goes on from there with the settings
    given by -o: grpo-kit replay RUN --iteration 12 --branch --run-dir NEW -o training_settings.beta=0.1
    """
    folder = existing_run(run)
    if branch:
        _branch(folder, iteration, _overrides(override or []), run_dir, name, step_only)
        return
    _only_with_branch({"-o": override, "--run-dir": run_dir, "--name": name})
    from grpo_kit import replay as replay_iteration

    found = replay_iteration(folder, iteration, step_only=step_only)
    print(found)
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def plan(
    profile: Profile = "full",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value; may be repeated.")] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, mps, cuda:N: measured here; or a name such as t4, l4, a100, m1: as stated.")
    ] = "",
    memory: Annotated[str, typer.Option(help="What there is of it, such as 24GB; all of the device's.")] = "",
    json_too: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a config needs, before anything is downloaded: parameters, memory, time, and what to turn down."""
    from grpo_kit.config import load_config
    from grpo_kit.preflight.plan.advice import advice
    from grpo_kit.preflight.plan.fit import plan as planned
    from grpo_kit.preflight.plan.table import as_json, in_words

    config = load_config(profile, _overrides(override or []))
    found = planned(config, device or None, _bytes(memory) if memory else None)
    steps = advice(found, config)
    print(json.dumps(as_json(found, steps), indent=2) if json_too else in_words(found, steps))


def _bytes(text: str) -> float:
    """A size such as 24GB or 24GiB in bytes."""
    from grpo_kit.config import KitError

    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B?", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise KitError(f"--memory: found {text!r:.60}, allowed: a size such as 24GB, 15.6GiB or 500MB")
    kilo = 1024 if found[3] else 1000
    return float(found[1]) * kilo ** (3 if found[2].upper() == "G" else 2)


@app.command()
def check(profile: Profile = "tiny") -> None:
    """Say what runs on this machine, and what to do where something does not."""
    from grpo_kit.config import load_config
    from grpo_kit.preflight.machine import check_machine

    problems = 0
    for finding in check_machine(load_config(profile)):
        problems += not finding.ok
        print(finding, flush=True)
    if problems:
        print(f"{problems} problem{'s' if problems > 1 else ''} found", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def push(
    run: Run,
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hugging Face hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    checkpoint: Annotated[int | None, typer.Option(help="An iteration with a checkpoint; best/ when left out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking back.")] = False,
) -> None:
    """Upload a run's policy, with its model card, to the Hugging Face hub; nothing else of the kit uploads anything."""
    from grpo_kit.models.push import plan_upload, push_policy

    upload = plan_upload(existing_run(run), repo_id, checkpoint, private=private)
    print(upload, flush=True)
    if not yes:
        typer.confirm("Upload?", abort=True)
    print(f"uploaded: {push_policy(upload)}")


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
    from grpo_kit.preflight.loss_checks import FALLS_IN, examine, load_subject, table

    findings = examine(load_subject(loss, advantages))
    print(table(findings))
    if any(finding.outcome == FALLS_IN for finding in findings):
        raise typer.Exit(1)


def _branch(
    folder: Path, iteration: int, changes: Mapping[str, object], run_dir: Path | None, name: str, step_only: bool
) -> None:
    """Make the branch, and say how it goes on and whether its start is what the run had."""
    from grpo_kit import branch as branch_off
    from grpo_kit.config import KitError

    if step_only:
        raise KitError("--step-only: found with --branch. Give one of them")
    if run_dir is None and not name:
        name = f"{folder.name}-from-{iteration}"
    place = new_run_folder("", run_dir, name)
    origin = branch_off(folder, iteration, place, changes)
    if origin.differs is not None:
        print(f"its start is not bit for bit what the run had: {origin.differs}", file=sys.stderr)
    print(f"branch: {place}\nNext: {_again_text(['train', '--run-dir', str(place)])}")


def _only_with_branch(given: Mapping[str, object]) -> None:
    from grpo_kit.config import KitError

    for option, value in given.items():
        if value:
            raise KitError(f"{option}: found without --branch, which it belongs to. Add --branch, or leave it out")


def _evaluate_one(config: "Config", folders: Sequence[Path], place: Path) -> None:
    from grpo_kit import evaluate as evaluate_policy
    from grpo_kit import load_experiment

    compare = ("raw", "initial", "trained") + (("oracle",) if config.evaluation_settings.gold else ())
    evaluate_policy(load_experiment(config, trained=folders[0] / "best"), compare=compare, run_dir=place)


def _evaluate_several(config: "Config", folders: Sequence[Path], place: Path) -> None:
    """Let the runs' policies answer the same prompts; add what pools of training seeds gave to the results."""
    from grpo_kit import evaluate as evaluate_policy
    from grpo_kit import load_experiment
    from grpo_kit.evaluation.pools import add_pools

    oracle = ("oracle",) if config.evaluation_settings.gold else ()
    compare = ("raw", "initial", *map(str, folders), *oracle)
    evaluate_policy(load_experiment(config), compare=compare, run_dir=place)
    add_pools(folders, place)


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
    for folder in _places(text):
        if (folder / "config.json").is_file() or (folder / "final_results.json").is_file():
            return folder
    runs = sorted(path.parent for path in reports.glob("*/config.json"))
    known = ", ".join(path.name for path in runs[-5:]) or "none yet. Make one: grpo-kit run"
    raise KitError(f"run {text!r:.100}: no run folder (one with a config.json); runs in reports/: {known}")


def _trials(text: str) -> list[Path]:
    """The trials of a grid given by path, or by its name below reports/; none where it is no grid."""
    from grpo_kit.runs.grid import trial_folders

    return next((found for path in _places(text) if (found := trial_folders(path))), [])


def _places(text: str) -> list[Path]:
    """The folders that a path, or a name below reports/, can mean; none where it cannot be a folder's at all."""
    from grpo_kit.config import PROJECT_ROOT

    reports = (PROJECT_ROOT / "reports").resolve()
    try:
        below = (reports / text).resolve()
        places = [Path(text).expanduser().resolve(), *([below] if below.is_relative_to(reports) else [])]
        return [place for place in places if place.is_dir()]
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, no such user's home
        return []


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


def _run_notebooks(
    planned: "Sequence[Planned]",
    profile: str,
    settings: Mapping[str, object],
    folder: Path,
    minutes_per_cell: float,
    again: Sequence[str],
) -> None:
    """Execute a series until one of it fails, and write the run's page."""
    from grpo_kit.runs.notebooks import execute, write_profile

    print(f"run folder: {folder}", flush=True)
    write_profile(folder, profile, settings)
    ran: list[Executed] = []
    with _goes_on(lambda: again):
        for number, notebook in enumerate(planned, start=1):
            print(f"[{number}/{len(planned)}] {notebook.name}", flush=True)
            with _progress_told(folder):
                ran.append(execute(notebook, folder / "notebooks", minutes_per_cell))
            if ran[-1].error:
                break
    _finish(folder, ran)
    if ran[-1].error:
        print(f"{ran[-1].name} failed: {ran[-1].error} (as far as it came: {ran[-1].path})", file=sys.stderr)
        raise typer.Exit(1)


def _planned_grid(
    grid: Path,
    notebooks: Sequence[Path],
    profile: str,
    folder: Path,
    parameters: Mapping[str, object],
    settings: Mapping[str, object],
    yes: bool,
) -> "list[PlannedTrial]":
    """Read a grid and check every trial of it."""
    from grpo_kit.runs.grid import UNASKED, GridError, plan_trials, read_grid

    trials = read_grid(grid)
    planned = plan_trials(trials, notebooks, profile, folder, parameters, settings)
    if len(trials) > UNASKED and not yes:
        many = f"{len(trials)} trials of {len(notebooks)} notebook{'s' if len(notebooks) > 1 else ''} each"
        raise GridError(f"grid {grid}: {many}, allowed: {UNASKED}. Give --yes to run them all, or --notebooks")
    return planned


def _ray_options(ray: str, workers: int | None, cpus: float | None, gpus: float | None) -> list[str]:
    """The command's options about Ray, as they were given."""
    given = {"--ray": ray or None, "--workers": workers, "--cpus": cpus, "--gpus": gpus}
    return [part for option, value in given.items() if value is not None for part in (option, f"{value}")]


def _cluster(
    grid: Path | None, ray: str, workers: int | None, cpus: float | None, gpus: float | None
) -> "Cluster | None":
    """The Ray cluster that was asked for, None where none was."""
    from grpo_kit.config import KitError

    given = _ray_options(ray, workers, cpus, gpus)
    if given and not ray:
        raise KitError(f"{given[0]}: only with --ray. Add --ray local, or leave it out")
    if given and grid is None:
        raise KitError("--ray: only with --grid. Add one, or leave it out")
    if not given:
        return None
    from grpo_kit.runs.cluster import Cluster

    return Cluster(ray, 1.0 if cpus is None else cpus, gpus or 0.0, workers)


def _run_grid(
    trials: "Sequence[PlannedTrial]",
    folder: Path,
    minutes_per_cell: float,
    again: Sequence[str],
    cluster: "Cluster | None" = None,
) -> None:
    """Run the trials, write a page for each and one that compares them."""
    from grpo_kit.runs.grid import write_order
    from grpo_kit.show.report import write_report

    print(f"grid folder: {folder}", flush=True)
    write_order(folder, trials)
    results: dict[str, TrialResult] = {}
    coming = (
        _in_turn(trials, minutes_per_cell) if cluster is None else _on_ray(trials, folder, minutes_per_cell, cluster)
    )
    with _goes_on(lambda: again), contextlib.closing(coming):
        for result in coming:
            results[result.name] = result
            if result.error:
                print(f"      failed: {result.error}", file=sys.stderr, flush=True)
            write_report(result.folder)
    _compare([trial.folder for trial in trials], folder / "index.html")
    failed = [results[trial.name] for trial in trials if results[trial.name].error]
    for result in failed:
        print(f"{result.name} failed: {result.error} (as far as it came: {result.folder})", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(results)} trials failed; {_again_text(again)} tries those again", file=sys.stderr)
        raise typer.Exit(1)


def _in_turn(trials: "Sequence[PlannedTrial]", minutes_per_cell: float) -> "Iterator[TrialResult]":
    """Run one trial after the other in this process, and say which."""
    from grpo_kit.runs.grid import finished, run_trial

    for number, trial in enumerate(trials, start=1):
        before = finished(trial)
        print(f"[{number}/{len(trials)}] {trial.name}{', finished before' if before else ''}", flush=True)
        with _progress_told(trial.folder):
            result = before or run_trial(trial, minutes_per_cell, _tell_notebook)
        yield result


def _on_ray(
    trials: "Sequence[PlannedTrial]", folder: Path, minutes_per_cell: float, cluster: "Cluster"
) -> "Iterator[TrialResult]":
    """Run the trials on a Ray cluster, several at once, and say which is done."""
    from grpo_kit.runs.cluster import check_machines, connected, probe_file, run_trials_on_ray
    from grpo_kit.runs.grid import finished

    before = [result for trial in trials if (result := finished(trial)) is not None]
    rest = [trial for trial in trials if trial.name not in {result.name for result in before}]
    for number, result in enumerate(before, start=1):
        print(f"[{number}/{len(trials)}] {result.name}, finished before", flush=True)
        yield result
    if not rest:
        return
    with probe_file(folder) as probe, connected(cluster) as told:
        print(told, flush=True)
        check_machines(cluster, probe, [notebook.path for notebook in rest[0].notebooks])
        coming = run_trials_on_ray(rest, probe, cluster, minutes_per_cell, _tell_retry)
        for number, result in enumerate(coming, start=len(before) + 1):
            print(f"[{number}/{len(trials)}] {result.name}, {result.minutes:.1f} min", flush=True)
            yield result


def _tell_retry(trial: "PlannedTrial", died: str) -> None:
    print(f"      {trial.name} is started again: {died}", file=sys.stderr, flush=True)


def _tell_notebook(notebook: "Planned") -> None:
    print(f"      {notebook.name}", flush=True)


def _compare(folders: Sequence[Path], page: Path) -> "list[Pool]":
    """Print the runs side by side, and write the page."""
    from grpo_kit.evaluation.pools import pool_runs, read_runs
    from grpo_kit.show.comparison import runs_text
    from grpo_kit.show.comparison_page import write_comparison

    pools = pool_runs(read_runs(folders))
    print(f"\n{runs_text(pools)}\n\ncomparison: {write_comparison(pools, page)}")
    return pools


@contextlib.contextmanager
def _goes_on(again: Callable[[], Sequence[str]], how: str = "it goes on where it stopped") -> Iterator[None]:
    """Let a signal that ends this process unwind what it does; then say in one line how it goes on, and exit.

    Unwinding closes what mirrors a run, frees its folder and ends a notebook's kernel. Where it does not come to an end
    (a server that does not answer; Python loses an exception that comes while an object is taken down), the process
    ends all the same after `_UNWINDING` seconds: commits are whole or not there at any moment.

    Args:
        again: the command that goes on, asked when it is needed.
    """
    numbers = [number for name in _SIGNALS if (number := getattr(signal, name, None))]  # Windows has no SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    last: list[threading.Timer] = []

    def tell() -> None:
        with contextlib.suppress(OSError):  # whoever hung up reads nothing
            if _speaks():
                print(f"\ninterrupted; {how} with: {_again_text(again())}", file=sys.stderr, flush=True)

    def unwind(number: int, _: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        last.append(threading.Timer(_UNWINDING, lambda: (tell(), os._exit(128 + number))))
        last[0].daemon = True
        last[0].start()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        if before[number] != signal.SIG_IGN:  # nohup ignores it: so does its child
            signal.signal(number, unwind)
    try:
        yield
        for timer in last:  # it came to its end before the interrupt was missed
            timer.cancel()
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in [128 + number for number in numbers]:
            raise
        for timer in last:
            timer.cancel()
        tell()
        raise typer.Exit(code) from None
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)


def _speaks() -> bool:
    """Whether this process tells of an interrupt: not one of several that others have started."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def _train_again(folder: Path, profile: str, options: Sequence[str], processes: int) -> list[str]:
    """The command that goes on with a training run: its folder knows the settings, once it has been written."""
    known = (folder / "config.json").is_file()
    own = [] if known else [*(("--profile", profile) if profile else ()), *options]
    several = ["--launch", str(processes)] if processes > 1 else []
    return ["train", "--run-dir", str(folder), *own, *several]


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


def _again_text(again: Sequence[str]) -> str:
    return f"grpo-kit {shlex.join(again)}"


def _finish(folder: Path, ran: "Sequence[Executed]") -> None:
    """Print what a run brought and what it took, and write its page."""
    from grpo_kit.show.report import write_report

    _print_results(folder)
    width = max(len(notebook.name) for notebook in ran)
    print("\nminutes per notebook")
    for notebook in ran:
        print(f"  {notebook.name:<{width}}  {notebook.minutes:6.1f}{'  failed' if notebook.error else ''}")
    print(f"  {'together':<{width}}  {sum(notebook.minutes for notebook in ran):6.1f}")
    print(f"\nreport: {write_report(folder)}")


def _print_results(folder: Path) -> None:
    results = folder / "final_results.json"
    if not results.is_file():
        return
    from grpo_kit.show.summary import comparison_table, pooled_table

    data = json.loads(results.read_text(encoding="utf-8"))
    print(f"\n{comparison_table(data)}")
    for found in data.get("pooled", {}).values():
        names = ", ".join(found["policies"])
        print(f"\n{found['training_seeds']} training seeds of one setting, pooled ({names}):")
        print(pooled_table(found))
    if data.get("minutes"):
        print("\nminutes per stage")
        for stage, minutes in data["minutes"].items():
            print(f"  {stage:<12} {minutes:6.1f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake that the user can mend is one line on stderr and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="grpo-kit")
    except Exception as error:
        from grpo_kit.config import KitError, printable  # here, since it takes longer than --help may

        if not isinstance(error, KitError):
            raise
        print(printable(f"grpo-kit: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
