"""Run notebooks without a browser: papermill, with every parameter checked before the first notebook starts.

papermill only warns of a parameter that a notebook does not have, and writes a parameter's name into the notebook's
code as it stands; so names and types are checked here against the notebook's own parameters cell.
"""

import ast
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_kit.config import PROFILES, PROJECT_ROOT, Config, KitError, Section, load_config

NOTEBOOK_FOLDER = PROJECT_ROOT / "notebooks"
OWN_PROFILE = "profile.json"  # in the run's folder: the profile with the settings that this run changes
# These come from the command's own options.
OWN_PARAMETERS = {"profile": "--profile", "run_dir": "--run-dir or --name"}


class NotebookError(KitError):
    """A notebook or a parameter that does not exist, or a value that the notebook does not take."""


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
    """The numbered notebooks of a folder in their order: all, or those named by number (`07`) or name (`07_train`)."""
    folder = NOTEBOOK_FOLDER if folder is None else Path(folder)
    series = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not series:
        raise NotebookError(f"{folder}: no numbered notebooks. Run from a checkout of the whole repository")
    if not wanted:
        return list(series.values())
    chosen = []
    for name in wanted:
        stem = name.strip().removesuffix(".ipynb")
        found = [path for key, path in series.items() if stem and stem in (key, key[:2])]
        if len(found) != 1:
            raise NotebookError(f"notebook {name!r:.60}: allowed: {', '.join(series)}, or their numbers")
        chosen.extend(found)
    return sorted(set(chosen))


def plan(
    notebooks: Sequence[Path],
    profile: str,
    run_dir: Path,
    parameters: Mapping[str, object],
    settings: Mapping[str, object] | None = None,
) -> list[Planned]:
    """Check the parameters against the notebooks that will run, and say which notebook gets which.

    Args:
        notebooks: what `select_notebooks` chose.
        profile: a profile's name or the path of a JSON file.
        run_dir: the run's folder, which every notebook reads and writes.
        parameters: values by name, as text or of the declared type; each goes to the notebooks that have it.
        settings: of the profile, by dotted key, which no notebook has as a parameter; the notebooks get a profile
            that `write_profile` writes into the run's folder.
    Raises:
        NotebookError: no notebook has the parameter, or the value is not of its type.
        ConfigError: the value is of the right type, but the setting of that name does not allow it.
    """
    settings = settings or {}
    declared = {path: _declared(path) for path in notebooks}
    for name in parameters:
        _check_name(name, declared)
    if settings and not any("profile" in known for known in declared.values()):
        raise NotebookError(
            f"settings {', '.join(settings):.80}: none of the notebooks takes a profile. Leave them out"
        )
    used = str(Path(run_dir).resolve() / OWN_PROFILE) if settings else _absolute(profile)
    planned = []
    for path, known in declared.items():
        values: dict[str, object] = {"profile": used, "run_dir": str(Path(run_dir).resolve())}
        values |= {name: _typed(name, value, known[name]) for name, value in parameters.items() if name in known}
        planned.append(Planned(path, {name: value for name, value in values.items() if name in known}))
    _check_settings(profile, settings, planned, declared)
    return planned


def write_profile(run_dir: Path, profile: str, settings: Mapping[str, object]) -> None:
    """Write the profile that `plan` told the notebooks to read, where settings are changed at all."""
    if settings:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        load_config(profile, settings).save(Path(run_dir) / OWN_PROFILE)


@dataclass(frozen=True)
class _Parameter:
    kind: str  # as annotated, or as its default shows: int, float, str, bool, list, dict
    default: object


def _declared(path: Path) -> Mapping[str, _Parameter]:
    return _inspected(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=100)  # a grid asks for the same notebooks again for each of its trials
def _inspected(path: Path, _changed: int) -> Mapping[str, _Parameter]:
    import papermill

    try:
        found = papermill.inspect_notebook(_verbatim(path))
    except ValueError as error:  # not JSON, or not a notebook
        raise NotebookError(f"{path}: not a notebook: {str(error).splitlines()[0]:.100}") from None
    return {name: _parameter(entry["inferred_type_name"], entry["default"]) for name, entry in found.items()}


def _parameter(kind: str, source: str) -> _Parameter:
    try:
        default = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        default = None
    if kind in ("None", "", None):
        kind = type(default).__name__
    return _Parameter(kind.split("[")[0].strip(), default)


def _check_name(name: str, declared: Mapping[Path, Mapping[str, _Parameter]]) -> None:
    known = sorted({key for parameters in declared.values() for key in parameters} - OWN_PARAMETERS.keys())
    if name in OWN_PARAMETERS:
        raise NotebookError(f"parameter {name}: set it with {OWN_PARAMETERS[name]}")
    if name not in known:
        elsewhere = _elsewhere(name, declared)
        if elsewhere:
            chosen = ", ".join(path.stem for path in declared)
            raise NotebookError(f"parameter {name}: not in {chosen}, but in {elsewhere}. Add that to --notebooks")
        close = difflib.get_close_matches(name[:100], known, n=1)
        hint = f", did you mean {close[0]}?" if close else _as_setting(name)
        raise NotebookError(f"parameter {name!r:.60}: unknown{hint}; allowed: {', '.join(known) or 'none'}")


def _elsewhere(name: str, chosen: Mapping[Path, object]) -> str:
    """The notebooks beside the chosen ones that have such a parameter."""
    folders = {path.parent for path in chosen}
    others = [path for folder in folders for path in select_notebooks(folder=folder) if path not in chosen]
    return ", ".join(path.stem for path in others if name in _declared(path))


def _as_setting(name: str) -> str:
    """Where a setting of that name is given, as a part of an error."""
    key = _setting_keys().get(name)
    return f"; as a setting of the profile: -o {key}=…, in a grid {key}" if key else ""


def _setting_keys() -> dict[str, str]:
    """The dotted key of every setting whose name stands in one section only."""
    sections = {key: field.annotation for key, field in Config.model_fields.items()}
    keys = [
        (name, f"{section}.{name}")
        for section, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, Section)
        for name in kind.model_fields
    ]
    names = [name for name, _ in keys]
    return {name: key for name, key in keys if names.count(name) == 1}


def _typed(name: str, given: object, parameter: _Parameter) -> object:
    """Read a value, given as text or as it is, as the type that the notebook declares."""
    kind = parameter.kind
    if kind == "str" and isinstance(given, str):
        return given
    readers = {"int": int, "float": float, "bool": _boolean, "list": _literal, "dict": _literal, "tuple": _literal}
    if kind not in (*readers, "str"):
        raise NotebookError(f"parameter {name}: its type {kind!r:.40} cannot be given on the command line")
    value = given
    if isinstance(given, str):
        try:
            value = readers[kind](given)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as literal_eval is documented
            value = None
    elif kind == "float" and type(given) is int:
        value = float(given)
    if type(value).__name__ != kind or (isinstance(value, float) and not math.isfinite(value)):
        example = f"{kind}, such as {parameter.default!r:.60}"
        raise NotebookError(f"parameter {name}: found {given!r:.60}, allowed: {example}")
    return value


def _boolean(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _literal(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _check_settings(
    profile: str,
    settings: Mapping[str, object],
    planned: Sequence[Planned],
    declared: Mapping[Path, Mapping[str, _Parameter]],
) -> None:
    """A parameter that is named like a setting must be a value which that setting allows."""
    keys = _setting_keys()
    for notebook in planned:
        changes = {
            keys[name]: value
            for name, value in notebook.parameters.items()
            if name in keys and value != declared[notebook.path][name].default
        }
        twice = settings.keys() & changes.keys()
        if twice:
            key = min(twice)
            raise NotebookError(
                f"{key}: given as a setting and as the parameter {key.split('.')[-1]}. Give one of them"
            )
        load_config(profile, {**settings, **changes})


def execute(notebook: Planned, folder: Path, minutes_per_cell: float = 60.0) -> Executed:
    """Run one notebook into `folder`; one that fails keeps what it did, with the error in its cell."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / notebook.path.name
    error, died = None, False
    try:
        papermill.execute_notebook(
            _verbatim(notebook.path),
            _verbatim(output),
            parameters=dict(notebook.parameters),
            kernel_name="python3",
            progress_bar=False,
            # the kernel's own log would stand between the progress lines, and be a traceback where it is interrupted
            extra_arguments=["--log-level=CRITICAL"],
            execution_timeout=max(1, round(minutes_per_cell * 60)),
            cwd=str(PROJECT_ROOT),
        )
    except papermill.PapermillExecutionError as failure:
        error = f"cell [{failure.exec_count}]: {failure.ename}: {_first_line(failure.evalue)}"
    except CellTimeoutError:
        error = f"a cell ran longer than {minutes_per_cell:g} minutes. Raise --minutes-per-cell"
        _mark_stopped(output, error)
    except DeadKernelError:
        died = True
        error = "its kernel died, most likely for want of memory. Close other programs, or take a smaller profile"
        _mark_stopped(output, error)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM: what was done is kept, and says that it is not all
        _mark_stopped(output, "interrupted")
        raise
    return Executed(notebook.name, output, _minutes(output), error, died)


def _mark_stopped(output: Path, error: str) -> None:
    """Note in an executed notebook what stopped it, where no cell's output says it."""
    import nbformat

    if output.exists():
        notebook = nbformat.read(output, as_version=4)
        notebook.metadata["grpo_kit"] = {"stopped": error}
        nbformat.write(notebook, output)


def _minutes(output: Path) -> float:
    metadata = json.loads(output.read_text(encoding="utf-8"))["metadata"] if output.exists() else {}
    return (metadata.get("papermill", {}).get("duration") or 0.0) / 60


def _verbatim(path: Path) -> str:
    """papermill formats paths with the parameters: braces in a folder's name are doubled, so that they stay."""
    return re.sub(r"([{}])", r"\1\1", str(path))


def _absolute(profile: str) -> str:
    return profile if profile in PROFILES else str(Path(profile).expanduser().resolve())


def _first_line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return "".join(character for character in lines[0][:300] if character.isprintable()) if lines else ""
