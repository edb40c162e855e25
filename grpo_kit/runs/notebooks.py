"""Run notebooks without a browser: papermill, with every parameter checked before the first notebook starts."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_kit.config import PROFILES, PROJECT_ROOT, Config, load_config, nearest, one_line, printable, working_folder
from grpo_kit.runs.durable import json_bytes, replace_file
from grpo_kit.runs.parameters import NotebookError, Parameter, declared_parameters

NOTEBOOK_FOLDER = PROJECT_ROOT / "notebooks"
NUMBERED = re.compile(r"[0-9]{2}[a-z]?_")  # how the name of a notebook of the series begins
OWN_PROFILE = "profile.json"  # in the run's folder: the profile with the settings that this run changes
OWN_PARAMETERS = {"profile": "--profile", "run_dir": "--run-dir or --name"}  # these come from the command's own options


@dataclass(frozen=True)
class Planned:
    """A notebook with the parameters that it will get, checked."""

    path: Path
    parameters: Mapping[str, object]

    @property
    def name(self) -> str:
        """The notebook's name, such as `07_train`."""
        return self.path.stem


@dataclass(frozen=True)
class Executed:
    """A notebook that was run: where it lies, how long it took, and what stopped it, if anything did."""

    name: str
    path: Path
    minutes: float
    error: str | None = None
    died: bool = False  # its kernel did, so that the same notebook may well succeed when it is run again


def select_notebooks(wanted: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The numbered notebooks of a folder in their order: all, or those named by number (`07`, `02b`) or name."""
    folder = NOTEBOOK_FOLDER if folder is None else Path(folder)
    series = {path.stem: path for path in sorted(folder.glob("*_*.ipynb")) if NUMBERED.match(path.name)}
    if not series:
        raise NotebookError(f"{folder}: no numbered notebooks. Install the kit again: they come with it")
    chosen = set()
    for name in wanted or series:
        stem = name.strip().removesuffix(".ipynb")
        found = [path for key, path in series.items() if stem in (key, key.partition("_")[0])]
        if len(found) != 1:
            raise NotebookError(f"notebook {name!r:.60}: allowed: {', '.join(series)}, or their numbers")
        chosen.update(found)
    return sorted(chosen)


def series_files() -> dict[str, bytes]:
    """The series, its map and its pictures: path below the notebooks' folder → content."""
    files = [file for file in sorted(NOTEBOOK_FOLDER.rglob("*.*")) if file.is_file() and ".ipynb_" not in str(file)]
    return {file.relative_to(NOTEBOOK_FOLDER).as_posix(): file.read_bytes() for file in files}


def lay_out(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, and return their places; a `NotebookError` where one is there already and differs.

    Nothing is written then.
    """
    places = {Path(folder) / name: content for name, content in files.items()}
    for place, content in places.items():
        if place.exists() and place.read_bytes() != content:
            raise NotebookError(f"{place}: there already, and differs. Name another folder, or move it away")
    for place, content in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return list(places)


def plan(
    notebooks: Sequence[Path],
    profile: str,
    run_dir: Path,
    parameters: Mapping[str, object],
    settings: Mapping[str, object] | None = None,
) -> list[Planned]:
    """Check the parameters against the notebooks that will run, or raise a `KitError`; say which notebook gets which.

    Args:
        profile: a profile's name or the path of a JSON file.
        run_dir: the run's folder, which every notebook reads and writes.
        parameters: values by name, as text or of the declared type; each goes to the notebooks that have it.
        settings: of the profile, by dotted key; the notebooks get a profile that `write_profile` writes.
    """
    settings, run_dir = settings or {}, Path(run_dir).resolve()
    declared = {path: declared_parameters(path) for path in notebooks}
    for name in parameters:
        _check_name(name, declared)
    if settings and not any("profile" in known for known in declared.values()):
        raise NotebookError(f"settings {', '.join(settings):.80}: no notebook takes a profile. Leave them out")
    used = profile if profile in PROFILES else str(Path(profile).expanduser().resolve())
    used = str(run_dir / OWN_PROFILE) if settings else used
    planned, keys = [], _setting_keys()
    for path, known in declared.items():
        values: dict[str, object] = {"profile": used, "run_dir": str(run_dir)}
        values |= {name: known[name].read(name, value) for name, value in parameters.items() if name in known}
        given = {name: value for name, value in values.items() if name in known}
        planned.append(Planned(path, given))
        # a parameter that is named like a setting must be a value which that setting allows
        changes = {keys[name]: value for name, value in given.items() if name in keys and value != known[name].default}
        if twice := sorted(settings.keys() & changes.keys()):
            text = f"given as a setting and as the parameter {twice[0].split('.')[-1]}. Give one of them"
            raise NotebookError(f"{twice[0]}: {text}")
        load_config(profile, {**settings, **changes})
    return planned


def write_profile(run_dir: Path, profile: str, settings: Mapping[str, object]) -> None:
    """Write the profile that `plan` gave the notebooks, where settings are changed at all."""
    if settings:
        replace_file(Path(run_dir) / OWN_PROFILE, json_bytes(load_config(profile, settings).to_dict()))


def _check_name(name: str, declared: Mapping[Path, Mapping[str, Parameter]]) -> None:
    """Refuse a parameter that none of the notebooks has, and say where such a value is given, if anywhere."""
    if name in OWN_PARAMETERS:
        raise NotebookError(f"parameter {name}: set it with {OWN_PARAMETERS[name]}")
    known = sorted({key for parameters in declared.values() for key in parameters} - OWN_PARAMETERS.keys())
    if name in known:
        return
    beside = [path for folder in {path.parent for path in declared} for path in select_notebooks(folder=folder)]
    having = ", ".join(path.stem for path in beside if path not in declared and name in declared_parameters(path))
    if having:
        chosen = ", ".join(path.stem for path in declared)
        raise NotebookError(f"parameter {name}: not in {chosen}, but in {having}. Add that to --notebooks")
    key = _setting_keys().get(name)
    hint = nearest(name, known) or (f"; as a setting of the profile: -o {key}=…, in a grid {key}" if key else "")
    raise NotebookError(f"parameter {name!r:.60}: unknown{hint}; allowed: {', '.join(known) or 'none'}")


def _setting_keys() -> dict[str, str]:
    """Name → dotted key of every setting; each name stands in one section only."""
    sections = {name: field for name, field in Config.model_fields.items() if name.endswith("_settings")}
    return {name: f"{section}.{name}" for section, field in sections.items() for name in field.annotation.model_fields}


def execute(notebook: Planned, folder: Path, minutes_per_cell: float = 60.0) -> Executed:
    """Run one notebook into `folder`; one that fails keeps what it did, with the error in its cell."""
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from grpo_kit.runs.kernels import OwnKernel, WarmKernel  # imports Jupyter

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / notebook.path.name
    error, stopped, died = None, None, False
    try:
        papermill.execute_notebook(
            *(re.sub(r"([{}])", r"\1\1", str(path)) for path in (notebook.path, output)),  # papermill formats paths
            parameters=dict(notebook.parameters),
            kernel_name="python3",
            progress_bar=False,
            kernel_manager_class=WarmKernel if b"grpo_kit" in notebook.path.read_bytes() else OwnKernel,
            # the kernel's own log would stand between the progress lines, and be a traceback where it is interrupted;
            # PYTHONSTARTUP is for a person's own sessions
            extra_arguments=["--log-level=CRITICAL", "--IPKernelApp.exec_PYTHONSTARTUP=False"],
            execution_timeout=max(1, round(minutes_per_cell * 60)),
            cwd=str(working_folder()),
        )
    except papermill.PapermillExecutionError as failure:
        error = printable(one_line(f"cell [{failure.exec_count}]: {failure.ename}: {failure.evalue}", 300))
    except CellTimeoutError:
        stopped = f"a cell ran longer than {minutes_per_cell:g} minutes. Raise --minutes-per-cell"
    except DeadKernelError:
        died = True
        stopped = "its kernel died, most likely for want of memory. Close other programs, or take a smaller profile"
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM: what was done is kept, and says that it is not all
        stopped = "interrupted"
        raise
    finally:
        if stopped and output.exists():  # no cell's output says it
            executed = nbformat.read(output, as_version=4)
            executed.metadata["grpo_kit"] = {"stopped": stopped}
            nbformat.write(executed, output)
    metadata = json.loads(output.read_text(encoding="utf-8"))["metadata"] if output.exists() else {}
    seconds = metadata.get("papermill", {}).get("duration") or 0.0
    return Executed(notebook.name, output, seconds / 60, error or stopped, died)


def execute_in_turn(
    notebooks: Sequence[Planned], run_dir: Path, minutes_per_cell: float, starting: Callable[[Planned], object]
) -> list[Executed]:
    """Run notebooks into a run's folder until one fails; `starting` is called before each."""
    ran: list[Executed] = []
    for notebook in notebooks:
        starting(notebook)
        ran.append(execute(notebook, run_dir / "notebooks", minutes_per_cell))
        if ran[-1].error:
            break
    return ran
