"""Mirrors of a run, on wandb and in TensorBoard; what counts are the files in its folder."""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from grpo_kit.config import Config, KitError, one_line
from grpo_kit.config.media import open_medium
from grpo_kit.runs.durable import json_bytes, replace_file
from grpo_kit.runs.iterations import iteration_name, validations_of
from grpo_kit.runs.record import file_beside, read_json, read_metrics

logger = logging.getLogger(__name__)

PICTURES = 4  # samples of the newest group that are shown at a validation
_CAPTION = "{user_prompt} → {enhanced_prompt} | reward {reward:.3f}, advantage {advantage:+.2f}"
_FAILED, _INTERRUPTED = 1, 130  # what a shell reports for an error, and for Ctrl-C
_RECORD = "tracking.json"
_START_SECONDS, _FINISH_SECONDS = 30, 60  # how long a network that does not answer may hold up a run

Picture = tuple[Path, str]  # its file and its caption
Values = Mapping[str, float | list[Picture] | pd.DataFrame | None]  # of one iteration, which "iteration" says


class WandbMirror:
    """A wandb run, on its server or (offline) in the run folder for `wandb sync`; `tracking.json` keeps its id.

    An iteration is one step: wandb ignores a step that it has seen. Offline each process writes a part of its own, and
    a killed one loses what it wrote last; so `tracking.json` also says which part is open and since when: one that is
    found open is replaced. Command line, machine and git remote are not sent: each was seen to hold a secret.
    """

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._run = config, run_dir, None
        self._record: dict = {}
        self._undo = contextlib.ExitStack()  # what wandb changed in this process

    def start(self) -> None:
        """Begin the wandb run, or go on where an earlier part of this run left it."""
        import wandb

        for name in ("excepthook", "exit"):  # wandb replaces them, and never puts them back
            self._undo.callback(setattr, sys, name, getattr(sys, name))
        if "WANDB_SERVICE" not in os.environ:  # where wandb's own process listens
            self._undo.callback(os.environ.pop, "WANDB_SERVICE", None)
        self._record = read_json(self._run_dir / _RECORD)
        if not self._record:
            self._write({"wandb_id": uuid.uuid4().hex[:8], "open": {"since": -1, "part": None}})
        settings, online = self._config.tracking_settings, self._config.tracking_settings.wandb == "online"
        shared = wandb.setup().settings
        self._undo.callback(setattr, shared, "silent", shared.silent)
        shared.silent = True
        if online and not wandb.login(prompt=False):
            raise KitError("no key on this machine. Log in (wandb login), or set tracking_settings.wandb=offline")
        self._run = wandb.init(
            project=settings.project,
            name=self._run_dir.name,
            id=self._record["wandb_id"],
            resume="allow" if online else None,  # offline parts of one id are joined by `wandb sync`
            dir=str(self._run_dir),
            mode=settings.wandb,
            reinit="create_new",  # a run that the user has open stays theirs
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

    def _write(self, record: dict) -> None:
        replace_file(self._run_dir / _RECORD, json_bytes(record))
        self._record = record

    def whole_until(self, committed: int) -> int:
        """The iteration up to which it has everything of a run that goes on after the committed one; -1 is nothing.

        A part that was not closed is replaced, unless it is on the server.
        """
        left_open = self._record.get("open")
        since = committed if left_open is None else left_open["since"]
        self._write({**self._record, "open": {"since": since, "part": Path(self._run.dir).parent.name}})
        if left_open is not None and left_open["part"] is not None:
            part = self._run_dir / "wandb" / left_open["part"]
            if part.name.startswith("offline-run-") and not any(part.glob("*.synced")):
                shutil.rmtree(part, ignore_errors=True)
        return max(since, self._run.step - 1)  # online this is what the server has

    def log(self, prefix: str, values: Values) -> None:
        """Show numbers, pictures and tables of an iteration under `prefix/`."""
        import wandb

        shown = {}
        for name, value in values.items():
            key = f"{prefix}/{name}"
            if isinstance(value, list):
                media = [_for_wandb(*picture) for picture in value]
                alone = any(isinstance(one, wandb.Audio) for one in media)  # a list of sounds needs another library
                shown |= {f"{key}/{number}": one for number, one in enumerate(media)} if alone else {key: media}
            else:
                shown[key] = wandb.Table(dataframe=value) if isinstance(value, pd.DataFrame) else value
        self._run.log(shown, step=int(values["iteration"]))

    def finish(self, exit_code: int) -> None:
        """Close it, also where it was never opened; 0 is a run that ended well."""
        with self._undo:
            if self._run is not None:
                self._run.finish(exit_code=exit_code)
                if exit_code != _FAILED:  # a mirror that lost something is closed with this code, too
                    self._write({**self._record, "open": None})


class TensorBoardMirror:
    """Event files in the run's `tensorboard/`; a continued run adds a file to those that are there."""

    name = "tensorboard"

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._writer = config, run_dir, None

    def start(self) -> None:
        """Open a new file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise KitError("it is not installed. Run: pip install tensorboard") from error
        self._writer = SummaryWriter(str(self._run_dir / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(self._config.to_dict(), indent=1)}\n```")

    def whole_until(self, committed: int) -> int:
        """The committed iteration: what was written to a file outlives the process."""
        return committed

    def log(self, prefix: str, values: Values) -> None:
        """Show numbers, pictures and tables of an iteration under `prefix/`."""
        iteration = int(values["iteration"])
        for name, value in values.items():
            if isinstance(value, pd.DataFrame):
                self._writer.add_text(f"{prefix}/{name}", _markdown(value), iteration)
            elif isinstance(value, list):
                for number, (place, caption) in enumerate(value):
                    self._show_medium(f"{prefix}/{name}/{number}", place, iteration)
                    self._writer.add_text(f"{prefix}/{name}/{number}", caption, iteration)
            elif name != "iteration" and value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", value, iteration)

    def _show_medium(self, name: str, place: Path, iteration: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        beside = file_beside(place)
        if beside is not None and beside.suffix == ".wav":
            sound = open_medium(beside)
            self._writer.add_audio(name, sound.mono, iteration, sound.rate)
        elif beside is not None:  # as `add_video` does, which needs another library
            height, width = np.asarray(open_medium(beside).pictures[0]).shape[:2]
            film = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_gif(beside))
            summary = Summary(value=[Summary.Value(tag=name, image=film)])
            self._writer._get_file_writer().add_summary(summary, iteration)
        else:
            with Image.open(place) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, iteration, dataformats="HWC")

    def finish(self, exit_code: int) -> None:
        """Close the file, also where none was opened."""
        if self._writer is not None:
            self._writer.close()


def _for_wandb(place: Path, caption: str) -> object:
    """A kept thumbnail, or the film or sound beside it, as wandb shows it."""
    import wandb

    beside = file_beside(place)
    if beside is None:
        return wandb.Image(str(place), caption=caption)
    if beside.suffix == ".wav":
        return wandb.Audio(str(beside), caption=caption)
    return wandb.Video(io.BytesIO(_gif(beside)), caption=caption, format="gif")


def _gif(file: Path) -> bytes:
    """A kept film as both services play it."""
    content = io.BytesIO()
    with Image.open(file) as film:
        film.save(content, "GIF", save_all=True, loop=0)
    return content.getvalue()


def _markdown(table: pd.DataFrame) -> str:
    texts = table.map(lambda value: f"{value:.4f}" if isinstance(value, float) else str(value))
    lines = [list(table.columns), ["---"] * table.shape[1], *texts.to_numpy().tolist()]
    escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


Mirror = WandbMirror | TensorBoardMirror


class Tracker:
    """Mirrors a run while it lasts, where the config says so. A mirror that fails is one warning; the run goes on."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        settings = config.tracking_settings
        wanted = {WandbMirror: settings.wandb != "disabled", TensorBoardMirror: settings.tensorboard}
        self._mirrors = [mirror(config, run_dir) for mirror, on in wanted.items() if on]
        self._run_dir = run_dir

    def __enter__(self) -> "Tracker":
        try:
            self._each(lambda mirror: mirror.start())
        except BaseException as error:  # an interrupt: what was opened is closed
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._each(lambda mirror: mirror.finish(exit_code(error)))

    def go_on(self, committed: int) -> None:
        """Go on after a committed iteration, 0 for a new run: what a mirror lacks up to it is shown from the folder."""
        self._each(lambda mirror: show_again(mirror, self._run_dir, mirror.whole_until(committed), committed))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Mirror an iteration's line."""
        self._each(lambda mirror: mirror.log("train", metrics))

    def log_samples(self, iteration: int) -> None:
        """Mirror what the folder keeps of a validation: its numbers and samples, completions, pictures of a group."""
        self._each(lambda mirror: show_samples(mirror, self._run_dir, iteration))

    def _each(self, call: Callable[[Mirror], None]) -> None:
        for mirror in tuple(self._mirrors):
            try:
                call(mirror)
            except Exception as error:  # whatever a service raises: a mirror's failure must not end the run
                self._mirrors.remove(mirror)
                text = "%s: not mirrored (%s); the run goes on, its folder has everything"
                logger.warning(text, mirror.name, one_line(error))
                with contextlib.suppress(Exception):
                    mirror.finish(_FAILED)


def exit_code(error: BaseException | None) -> int:
    """What a process that ends with `error` reports: 0 where there is none, 130 for Ctrl-C."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(error is not None)


def show_again(mirror: Mirror, run_dir: Path, after: int, until: int) -> None:
    """Show what a run's folder keeps of the iterations after one, up to another; of a run that begins, nothing."""
    lines, validated = {row["iteration"]: row for row in read_metrics(run_dir)}, validations_of(run_dir)
    for iteration in range(after + 1, until + 1) if until else ():
        if iteration in lines:
            mirror.log("train", lines[iteration])
        if iteration in validated:
            show_samples(mirror, run_dir, iteration)


def show_samples(mirror: Mirror, run_dir: Path, iteration: int) -> None:
    """Show what a run's folder keeps of an iteration beside its line: a validation, a rollout, or neither."""
    name = iteration_name(iteration)
    validation, kept = read_json(run_dir / f"validation_{name}.json"), run_dir / f"rollouts/{name}.parquet"
    if validation:
        numbers = {key: validation[key] for key in ("reward", "paraphrase", "diversity") if key in validation}
        samples = sample_table(pd.json_normalize(validation["samples"], sep="/"), iteration)
        mirror.log("eval", {"iteration": iteration, **numbers, **validation["rewards"], "samples": samples})
    if kept.is_file():
        rollout = pd.read_parquet(kept)
        completions, pictures = sample_table(rollout, iteration), group_pictures(rollout, run_dir)
        mirror.log("train", {"iteration": iteration, "completions": completions, "samples": pictures})


def sample_table(rows: pd.DataFrame, iteration: int) -> pd.DataFrame:
    """Of a rollout or a validation: the user's prompt, the rewrite, the reward with its parts, the advantage."""
    named = ["iteration", "user_prompt", "enhanced_prompt", "reward", "advantage"]
    parts = [name for name in rows.columns if name.startswith(("reward/", "rewards/"))]
    table = rows.assign(iteration=iteration)
    return table[[name for name in named + parts if name in table]]


def group_pictures(rollout: pd.DataFrame, run_dir: Path, count: int = PICTURES) -> list[Picture]:
    """The first pictures of a rollout's last group; each caption has prompt, rewrite, reward and advantage."""
    group = rollout[(rollout["group_id"] == rollout["group_id"].iloc[-1]) & rollout["thumbnail"].notna()]
    rows = group.head(count).to_dict("records")
    return [(run_dir / row["thumbnail"], _CAPTION.format_map(row)) for row in rows]
