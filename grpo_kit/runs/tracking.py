"""Mirrors of a run, on wandb and in TensorBoard; the files in its folder stay the truth."""

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import pandas as pd
from PIL import Image

from grpo_kit.config import Config, KitError
from grpo_kit.runs.folder import RunFolder

logger = logging.getLogger(__name__)

PICTURES = 4  # samples of the newest group that are shown at a validation
_FAILED, _INTERRUPTED = 1, 130  # what a shell reports for an error, and for Ctrl-C
_RECORD = "tracking.json"
_START_SECONDS, _FINISH_SECONDS = 30, 60  # how long a network that does not answer may hold up a run

Picture = tuple[Path, str]  # its file and its caption


class Mirror(Protocol):
    """A place that shows a run. Whatever it raises is one warning, and it is not called again."""

    name: str

    def start(self) -> None:
        """Open it, or go on where an earlier part of the run left it."""

    def whole_until(self, committed: int) -> int:
        """The iteration up to which it has everything of a run that goes on after the committed one; -1 is nothing."""

    def log(self, metrics: Mapping[str, float], prefix: str) -> None:
        """Show one line of numbers, with its own "iteration", under `prefix/`."""

    def images(self, name: str, pictures: Sequence[Picture], iteration: int) -> None:
        """Show pictures with their captions."""

    def table(self, name: str, table: pd.DataFrame, iteration: int) -> None:
        """Show a table of texts and numbers."""

    def finish(self, exit_code: int) -> None:
        """Close it, also where it was never opened; 0 is a run that ended well."""


class WandbMirror:
    """A wandb run, on its server or (offline) in the run folder for `wandb sync`; its id is kept in `tracking.json`.

    An iteration is one step: a continued run goes on counting, and wandb ignores a step that it has seen. Offline each
    process writes a part of its own; wandb loses what a killed one wrote last. So `tracking.json` also says which part
    is open and since when: one that is found open is replaced.
    Neither the command line, nor the machine, nor the git remote is sent: each has been seen to hold a secret.
    """

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._run = config, run_dir, None
        self._record: dict = {}

    def start(self) -> None:
        import wandb

        self._record = self._recorded()

        settings, online = self._config.tracking_settings, self._config.tracking_settings.wandb == "online"
        wandb.setup(wandb.Settings(silent=True))
        if online and not wandb.login(prompt=False):
            raise KitError("no key on this machine. Log in (wandb login), or set tracking_settings.wandb=offline")
        self._run = wandb.init(
            project=settings.project,
            name=self._run_dir.name,
            id=self._record["wandb_id"],
            resume="allow" if online else None,  # offline parts of one id are joined by `wandb sync`
            dir=str(self._run_dir),
            mode=settings.wandb,
            config=self._config.to_dict(),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=_START_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        for prefix in ("train", "eval"):
            self._run.define_metric(f"{prefix}/iteration")
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/iteration")

    def _recorded(self) -> dict:
        place = self._run_dir / _RECORD
        if not place.is_file():
            self._write({"wandb_id": uuid.uuid4().hex[:8], "open": {"since": -1, "part": None}})
        return json.loads(place.read_text(encoding="utf-8"))

    def _write(self, record: dict) -> None:
        RunFolder(self._run_dir).write_json(_RECORD, record)
        self._record = record

    def whole_until(self, committed: int) -> int:
        """Where the part that was not closed began, if there is one; unless it is on the server, it goes."""
        left_open = self._record.get("open")
        since = committed if left_open is None else left_open["since"]
        self._write({**self._record, "open": {"since": since, "part": Path(self._run.dir).parent.name}})
        if left_open is not None and left_open["part"] is not None:
            part = self._run_dir / "wandb" / left_open["part"]
            if part.name.startswith("offline-run-") and not any(part.glob("*.synced")):
                shutil.rmtree(part, ignore_errors=True)
        return max(since, self._run.step - 1)  # online the server says what it has

    def log(self, metrics: Mapping[str, float], prefix: str) -> None:
        line = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._run.log(line, step=int(metrics["iteration"]))

    def images(self, name: str, pictures: Sequence[Picture], iteration: int) -> None:
        import wandb

        self._show(name, [wandb.Image(str(place), caption=caption) for place, caption in pictures], iteration)

    def table(self, name: str, table: pd.DataFrame, iteration: int) -> None:
        import wandb

        self._show(name, wandb.Table(dataframe=table), iteration)  # a new one each time: they are written once

    def _show(self, name: str, value: object, iteration: int) -> None:
        self._run.log({f"{name.split('/')[0]}/iteration": iteration, name: value}, step=iteration)

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            if exit_code != _FAILED:  # by which a mirror that lost something is closed, too
                self._write({**self._record, "open": None})


class TensorBoardMirror:
    """Event files in the run's `tensorboard/`; a continued run adds a file to those that are there."""

    name = "tensorboard"

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._writer = config, run_dir, None

    def start(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise KitError("it is not installed. Run: pip install tensorboard") from error
        self._writer = SummaryWriter(str(self._run_dir / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(self._config.to_dict(), indent=1)}\n```")

    def whole_until(self, committed: int) -> int:
        """All: what was written to its file outlives the process."""
        return committed

    def log(self, metrics: Mapping[str, float], prefix: str) -> None:
        for name, value in metrics.items():
            if name != "iteration" and value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", value, int(metrics["iteration"]))

    def images(self, name: str, pictures: Sequence[Picture], iteration: int) -> None:
        import numpy as np

        for number, (place, caption) in enumerate(pictures):
            with Image.open(place) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"{name}/{number}", pixels, iteration, dataformats="HWC")
            self._writer.add_text(f"{name}/{number}", caption, iteration)

    def table(self, name: str, table: pd.DataFrame, iteration: int) -> None:
        self._writer.add_text(name, _markdown(table), iteration)

    def finish(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()


class Tracker:
    """Mirrors a run while it lasts, where the config says so. A mirror that fails is one warning; the run goes on."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        settings = config.tracking_settings
        wanted = {WandbMirror: settings.wandb != "disabled", TensorBoardMirror: settings.tensorboard}
        self._mirrors: list[Mirror] = [mirror(config, run_dir) for mirror, on in wanted.items() if on]
        self._run_dir = run_dir

    def __enter__(self) -> "Tracker":
        try:
            self._each(lambda mirror: mirror.start())
        except BaseException as error:  # an interrupt: what was opened is closed
            self.__exit__(type(error), error, None)
            raise
        return self

    def go_on(self, committed: int) -> None:
        """Go on after a committed iteration, 0 for a new run: what a mirror lacks up to it is shown from the folder."""
        self._each(lambda mirror: show_again(mirror, self._run_dir, mirror.whole_until(committed), committed))

    def log(self, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """Mirror one line, with its own "iteration", under `train/` or `eval/`."""
        self._each(lambda mirror: mirror.log(metrics, prefix))

    def log_samples(self, iteration: int) -> None:
        """Mirror what the folder keeps of an iteration: its validation, its completions, pictures of a group."""
        self._each(lambda mirror: show_samples(mirror, self._run_dir, iteration))

    def _each(self, call: Callable[[Mirror], None]) -> None:
        for mirror in tuple(self._mirrors):
            try:
                call(mirror)
            except Exception as error:  # whatever a service raises, the run is worth more than its mirror
                self._mirrors.remove(mirror)
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                text = "%s: not mirrored (%.200s); the run goes on, its folder has everything"
                logger.warning(text, mirror.name, said)
                with contextlib.suppress(Exception):
                    mirror.finish(_FAILED)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each(lambda mirror: mirror.finish(exit_code(error)))


def exit_code(error: BaseException | None) -> int:
    """What a process that ends with `error` reports: 0 where there is none, 130 for Ctrl-C."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(error is not None)


def show_again(mirror: Mirror, run_dir: Path, after: int, until: int) -> None:
    """Show what a run's folder keeps of the iterations after one, up to another; of a run that begins, nothing."""
    folder = RunFolder(run_dir)
    lines = {row["iteration"]: row for row in folder.metrics()}
    validations = {validation["iteration"]: validation for validation in folder.validations()}
    for iteration in range(after + 1, until + 1) if until else ():
        if iteration in lines:
            mirror.log(lines[iteration], "train")
        if iteration in validations:
            mirror.log(validation_line(validations[iteration]), "eval")
            show_samples(mirror, run_dir, iteration)


def validation_line(validation: Mapping) -> dict[str, float]:
    """The numbers of a validation that are watched."""
    watched = ("iteration", "reward", "paraphrase", "diversity")
    return {name: validation[name] for name in watched if name in validation} | validation["rewards"]


def show_samples(mirror: Mirror, run_dir: Path, iteration: int) -> None:
    """Show what a run's folder keeps of an iteration; not every iteration has a validation and a rollout."""
    validation = run_dir / f"validation_iter_{iteration:06d}.json"
    if validation.is_file():
        rows = pd.json_normalize(json.loads(validation.read_text(encoding="utf-8"))["samples"], sep="/")
        mirror.table("eval/samples", sample_table(rows, iteration), iteration)
    kept = run_dir / "rollouts" / f"iter_{iteration:06d}.parquet"
    if kept.is_file():
        rollout = pd.read_parquet(kept)
        mirror.table("train/completions", sample_table(rollout, iteration), iteration)
        mirror.images("train/samples", group_pictures(rollout, run_dir), iteration)


def sample_table(rows: pd.DataFrame, iteration: int) -> pd.DataFrame:
    """Of a rollout or a validation: the user's prompt, the rewrite, the reward with its parts, the advantage."""
    named = ["iteration", "user_prompt", "enhanced_prompt", "reward", "advantage"]
    parts = [name for name in rows.columns if name.startswith(("reward/", "rewards/"))]
    table = rows.assign(iteration=iteration)
    return table[[name for name in named + parts if name in table]]


def group_pictures(rollout: pd.DataFrame, run_dir: Path, count: int = PICTURES) -> list[Picture]:
    """The first pictures of a rollout's last group; each caption says what was asked, written and earned."""
    group = rollout[(rollout["group_id"] == rollout["group_id"].iloc[-1]) & rollout["thumbnail"].notna()]
    return [
        (
            run_dir / row["thumbnail"],
            f"{row['user_prompt']} → {row['enhanced_prompt']} | reward {row['reward']:.3f}, "
            f"advantage {row['advantage']:+.2f}",
        )
        for row in group.head(count).to_dict("records")
    ]


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
