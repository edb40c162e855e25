"""The command line: `grpo-kit --help` lists the commands.

Exit codes: 0 done, 1 something failed on the way, 2 a mistake in what was asked (one line says which), 130 interrupted
(Ctrl-C), 143 terminated (SIGTERM), 129 hung up. An interrupted command prints the command that resumes its work.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from grpo_kit.course import commands
from grpo_kit.runs.surroundings import prepare

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a vision-language model to write better text-to-image prompts, with GRPO.",
)
app.command()(commands.draw)
app.add_typer(commands.app, name="course")

Profile = Annotated[str, typer.Option("--profile", "--config", help="A profile (tiny, full, …), a JSON or YAML file.")]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder; an existing run is continued.")]
Name = Annotated[str, typer.Option(help="The run's name, a folder in reports/.")]
Run = Annotated[str, typer.Argument(help="A run: its folder, or its name in reports/.")]
Texts = list[str] | None
Overrides = Annotated[Texts, typer.Option("-o", help="section.key=value; may be repeated.")]
_RAY_HELP = "With --grid: run on a Ray cluster, local, auto or host:port; all machines see this checkout and the grid."


@app.command()
def run(
    context: typer.Context,
    profile: Profile = "tiny",
    notebooks: Annotated[str, typer.Option(help="Which of the series, such as 00,07; all when left out.")] = "",
    parameter: Annotated[Texts, typer.Option("-p", help="name=value, for the notebooks that have it.")] = None,
    override: Annotated[Texts, typer.Option("-o", help="section.key=value of the profile.")] = None,
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
    from grpo_kit.config import load_config, pairs_from_texts, settings_from_texts
    from grpo_kit.runs.interrupts import command_line, resumable
    from grpo_kit.runs.notebooks import plan, select_notebooks
    from grpo_kit.runs.places import new_run_folder
    from grpo_kit.runs.series import plan_grid, requested_cluster, run_grid, run_series

    config = load_config(profile)
    chosen = select_notebooks([part for part in notebooks.split(",") if part.strip()])
    folder = new_run_folder(config.profile, run_dir, name)
    parameters, settings = pairs_from_texts(parameter or [], "-p"), settings_from_texts(override or [])
    cluster = requested_cluster(ray, workers, cpus, gpus, has_grid=grid is not None)
    again = _again(context, folder)
    if grid is not None:
        trials = plan_grid(grid, chosen, profile, folder, parameters, settings, any_size=yes)
        from grpo_kit.show.comparison import print_comparison
        from grpo_kit.show.report import write_report

        with resumable(again):
            failed = run_grid(trials, folder, minutes_per_cell, cluster, lambda result: write_report(result.folder))
        print_comparison([trial.folder for trial in trials], folder / "index.html")
        lines = [f"{one.name} failed: {one.error} (as far as it came: {one.folder})" for one in failed]
        lines += [f"{len(failed)} of {len(trials)} trials failed; {command_line(again)} tries those again"]
    else:
        planned = plan(chosen, profile, folder, parameters, settings)
        with resumable(again):
            ran = run_series(planned, profile, settings, folder, minutes_per_cell)
        from grpo_kit.show.report import print_run

        print_run(folder, ran)
        failed = [one for one in ran if one.error]
        lines = [f"{one.name} failed: {one.error} (as far as it came: {one.path})" for one in failed]
    if failed:
        print(*lines, sep="\n", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def train(
    context: typer.Context,
    profile: Annotated[str, typer.Option("--profile", "--config", help="As for run; tiny when left out.")] = "",
    override: Overrides = None,
    run_dir: RunDir = None,
    name: Name = "",
    processes: Annotated[int, typer.Option("--launch", min=1, metavar="N", help="Share the work among N.")] = 1,
) -> None:
    """Train a policy into a run folder; a run that is there goes on, with its own settings unless others are given."""
    from grpo_kit.config import load_config, settings_from_texts
    from grpo_kit.runs.interrupts import resumable
    from grpo_kit.runs.places import new_run_folder

    changes = settings_from_texts(override or [])
    config = load_config(profile or "tiny", changes)
    folder = new_run_folder(config.profile, run_dir, name)
    if not profile and (folder / "config.json").is_file():
        config = load_config(folder, changes)
    with resumable(_again(context, folder)):
        if processes > 1:
            from grpo_kit.training.launch import launch

            given = ["--profile", profile] if profile else []
            given += [part for text in override or () for part in ("-o", text)]
            raise SystemExit(launch(processes, [*given, "--run-dir", str(folder)], config, folder))
        from grpo_kit.training.loop import start

        if start(config, folder):  # True in the main process
            print(f"done. Next: grpo-kit evaluate {folder}")


@app.command()
def evaluate(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN]...", help="Runs, or a grid: folders, or names.")],
    override: Annotated[Texts, typer.Option("-o", help="evaluation_settings.key=value; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for what several, or another evaluation, gave.")] = None,
) -> None:
    """Compare raw prompt, initial policy and trained policy on the held-out prompts; of several runs, each policy.

    Several runs are judged alike: by the first one's settings, generator and rewards, on the same prompts and latents.
    A folder with a policy alone may stand among them. Runs that differ only in their seed are pooled.
    """
    from grpo_kit.config import load_config, settings_from_texts
    from grpo_kit.runs.interrupts import resumable
    from grpo_kit.runs.places import existing_runs

    folders = existing_runs(runs)
    config = load_config(folders[0], settings_from_texts(override or []))
    with resumable(context.obj, "it starts again"):
        from grpo_kit.evaluation.evaluate import evaluate_runs

        place = evaluate_runs(config, folders, out)
    from grpo_kit.show.report import print_results

    print_results(place)
    print(f"written: {place}" if len(folders) > 1 else f"Next: grpo-kit report {place}")


@app.command()
def report(
    run: Run,
    share: Annotated[Path | None, typer.Option(help="A folder for a small copy of the pages, to send on.")] = None,
) -> None:
    """Write index.html from what a run left on disk."""
    from grpo_kit.runs.places import existing_run
    from grpo_kit.show.pages import share_pages
    from grpo_kit.show.report import print_results, write_report

    folder = existing_run(run)
    print_results(folder)
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
    from grpo_kit.config import KitError
    from grpo_kit.runs.places import dated_report, existing_runs

    folders = existing_runs(runs)
    if len(folders) < 2:
        raise KitError(f"compare: found 1 run ({folders[0].name}), allowed: at least 2, or a grid. Name another run")
    from grpo_kit.show.comparison import print_comparison

    page = html or dated_report("compare").with_suffix(".html")
    print_comparison(folders, page.expanduser().resolve(), tables)


@app.command()
def replay(
    run: Run,
    iteration: Annotated[int, typer.Option(help="Which one; of a branch, its last one that both runs have.")],
    step_only: Annotated[bool, typer.Option("--step-only", help="Only the step, on its recorded rollout.")] = False,
    branch: Annotated[bool, typer.Option("--branch", help="Make a new run that goes on from there.")] = False,
    override: Annotated[Texts, typer.Option("-o", help="section.key=value of the branch.")] = None,
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
    from grpo_kit.config import KitError, settings_from_texts
    from grpo_kit.runs.interrupts import command_line
    from grpo_kit.runs.places import existing_run, new_run_folder

    folder = existing_run(run)
    if not branch:
        for option, value in {"-o": override, "--run-dir": run_dir, "--name": name}.items():
            if value:
                raise KitError(f"{option}: found without --branch, which it belongs to. Add --branch, or leave it out")
        from grpo_kit import replay as replay_iteration

        found = replay_iteration(folder, iteration, step_only=step_only)
        print(found)
        raise typer.Exit(0 if found.equal else 1)
    if step_only:
        raise KitError("--step-only: found with --branch. Give one of them")
    from grpo_kit import branch as branch_off

    place = new_run_folder("", run_dir, name or ("" if run_dir else f"{folder.name}-from-{iteration}"))
    origin = branch_off(folder, iteration, place, settings_from_texts(override or []))
    if origin.differs is not None:
        print(f"its start is not bit for bit what the run had: {origin.differs}", file=sys.stderr)
    print(f"branch: {place}\nNext: {command_line(['train', '--run-dir', str(place)])}")


@app.command()
def plan(
    profile: Profile = "full",
    override: Overrides = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda:N (measured), or t4, a100, m1 … (stated).")] = "",
    memory: Annotated[str, typer.Option(help="What there is of it, such as 24GB; all of the device's.")] = "",
    json_too: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    drafts: Annotated[bool, typer.Option("--drafts", help="Measure how few denoising steps rank rewrites.")] = False,
) -> None:
    """What a config needs, before anything is downloaded: parameters, memory, time, and what to turn down.

    With --drafts the models are loaded: how well do fewer denoising steps, and one to three latents, rank the rewrites
    of a group, and what do they cost?
    """
    from grpo_kit.config import load_config, settings_from_texts

    config = load_config(profile, settings_from_texts(override or []))
    if drafts:
        from grpo_kit.preflight.drafts import drafts_text as text
    else:
        from grpo_kit.preflight.plan.table import plan_text as text
    print(text(config, device, memory, json_too=json_too))


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
def notebooks(folder: Annotated[Path, typer.Argument(help="Where they go; what you changed there stays.")]) -> None:
    """Lay the notebooks out in a folder, to edit and run them in JupyterLab or VS Code."""
    from grpo_kit.runs.notebooks import lay_out, series_files

    laid_out = [place for place in lay_out(folder, series_files()) if place.suffix == ".ipynb"]
    print(f"{len(laid_out)} notebooks in {folder}. Next: jupyter lab {folder / 'index.ipynb'}")


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
    from grpo_kit.runs.places import existing_run

    upload = plan_upload(existing_run(run), repo_id, checkpoint, private=private)
    print(upload, flush=True)
    if not yes:
        typer.confirm("Upload?", abort=True)
    print(f"uploaded: {push_policy(upload)}")


@app.command()
def merge(run: Run, out: Annotated[Path | None, typer.Option(help="A new folder; else merged/ in it.")] = None) -> None:
    """Write a run's LoRA policy as whole weights, for servers that take no adapter."""
    from grpo_kit.models.push import merge_run
    from grpo_kit.runs.places import existing_run

    print(f"written: {merge_run(existing_run(run), out)}")


@app.command()
def doctor(
    loss: Annotated[str, typer.Argument(help="A loss function, as module:function.")],
    advantages: Annotated[str, typer.Option(help="The advantage function that goes with it, as module:function.")] = "",
) -> None:
    """Say which known traps of GRPO a loss function falls into; for example, of the file my_code.py in this folder:

    grpo-kit doctor my_code:my_loss --advantages my_code:my_advantages

    The loss may take any of grpo_kit.grpo_loss's tensors and settings by their names, or rewards with group_ids (one
    value a row) in place of advantages. It returns a scalar tensor, or an object with one in .loss. An advantage
    function takes rewards and group_ids, and returns a value a row. Exit code 1 where a trap is fallen into.
    """
    from grpo_kit.preflight.loss_checks import FALLS_IN, examine, load_subject, table

    findings = examine(load_subject(loss, advantages))
    print(table(findings))
    if any(finding.outcome == FALLS_IN for finding in findings):
        raise typer.Exit(1)


def _again(context: typer.Context, folder: Path) -> list[str]:
    """The arguments of this command, which resume its work; with the run's folder where the command chose it."""
    is_given = context.params["run_dir"] is not None or context.params["name"]
    return [*context.obj, *([] if is_given else ["--run-dir", str(folder)])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake that the user can mend is one line on stderr and exit code 2."""
    prepare()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="grpo-kit", obj=given)
    except Exception as error:
        from grpo_kit.config import KitError, printable  # here, since it takes longer than --help may

        if not isinstance(error, KitError):
            raise
        print(printable(f"grpo-kit: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
