"""The live training view: curves and the newest group of a run while `train` goes on in the same notebook."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
import pandas as pd
from IPython.display import DisplayHandle

from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.curves import training_curves
from grpo_kit.show.frame import frame_of, signed
from grpo_kit.show.style import BLUE, FAINT, GREY, Drawing, format_metric, new_figure, styled
from grpo_kit.show.widgets.groups import open_image, range_text
from grpo_kit.show.widgets.markup import escape, grid, heading, message, picture, sheet
from grpo_kit.show.widgets.twin import TwinBox

PANELS = ("reward", "rewards/gold/mean", "kl")
PAUSE = 2.0  # seconds between two pictures, at least
SHARE = 0.05  # of the time may go into pictures: on a slow machine the pause grows
DPI, SIDE, COLUMNS = 110, 122, 8
CURVES_HEIGHT, GROUP_HEIGHT = "280px", "290px"


class LiveTraining(TwinBox):
    """A run's progress, curves and newest group; pass its `update` to `train` as `on_iteration`.

        watch = show.LiveTraining(run)
        display(watch)
        gk.train(kit, run, on_iteration=watch.update)

    What it shows is read from the run folder, so an interrupted training keeps its curves, and they go on when the cell
    is run again. `update` sets values of widgets and nothing else. The line on top follows every iteration; curves and
    group are drawn every few seconds, and never for more than a twentieth of the time.

    Args:
        run_dir: the run's folder, which need not exist yet.

    Raises:
        RecordError: a file of the run is damaged.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self._path = Path(run_dir)
        self._handle: DisplayHandle | None = None
        self._group_of: int | None = None
        self._line = ipywidgets.HTML(layout=ipywidgets.Layout(height="76px"))
        curves = ipywidgets.Layout(width="100%", max_width="1110px", height=CURVES_HEIGHT, object_fit="contain")
        self._curves = ipywidgets.Image(format="png", layout=curves)
        self._group = ipywidgets.HTML(layout=ipywidgets.Layout(height=GROUP_HEIGHT, overflow="auto"))
        super().__init__([self._line, self._curves, self._group])
        self.refresh()

    @property
    def planned(self) -> int:
        """The iterations that the run's config asks for; 0 while there is none."""
        return int(self._record.config.get("training_settings", {}).get("num_iterations", 0)) if self._record else 0

    def update(self, metrics: Mapping[str, float]) -> None:
        """Follow one finished iteration.

        Args:
            metrics: what the iteration logged, as `train` hands it over.
        """
        self._line.value = _progress(metrics, self.planned)
        last = metrics["iteration"] == self.planned or self._is_stopped()
        if last or time.monotonic() >= self._due:
            self.refresh()
            self._line.value = _progress(metrics, self.planned)
        if last and self._handle is not None:
            self._handle.update(self._repr_mimebundle_(), raw=True)  # the picture of the finished run stays

    def refresh(self) -> None:
        """Read the run folder and draw what it holds now."""
        started = time.monotonic()
        self._record: RunRecord | None = read_run(self._path) if self._path.is_dir() else None
        rows = self._record.metrics if self._record else pd.DataFrame()
        self._line.value = _progress(dict(rows.iloc[-1]) if len(rows) else {}, self.planned)
        self._curves.value = self._draw_curves().to_png(DPI)
        self._show_group()
        ended = time.monotonic()
        self._due = (
            ended + max(PAUSE, (ended - started) / SHARE) if len(rows) > 1 else ended
        )  # the first ones come at once

    def _is_stopped(self) -> bool:
        """Say whether the sentinel has ended the run."""
        stops = self._record is not None and self._record.config.get("training_settings", {}).get("stop_on_divergence")
        return bool(stops and read_run(self._path).sentinel.get("divergence"))

    def _draw_curves(self) -> Drawing:
        if self._record is None or len(self._record.metrics) < 2 or not set(PANELS) & set(self._record.metrics):
            return _waiting()  # a line needs two points
        return training_curves(self._record.metrics, self._record.validations, PANELS, self._record.sentinel)

    def _show_group(self) -> None:
        kept = self._record.rollout_iterations if self._record else []
        newest = kept[-1] if kept else None
        if newest != self._group_of or newest is None:
            self._group.value = _group(self._record, newest) if newest else message("No group has been kept yet.")
            self._group_of = newest

    def _ipython_display_(self) -> None:
        """Show the widget, and remember where, so that its picture can be brought up to date at the end."""
        self.refresh()
        handle = DisplayHandle()
        handle.display(self._repr_mimebundle_(), raw=True)
        self._handle = handle

    def figures(self) -> list[Drawing]:
        """Return the curves of what is on disk."""
        return [self._draw_curves()]

    def summary(self) -> str:
        """Return how far the run is."""
        rows = self._record.metrics if self._record else pd.DataFrame()
        if rows.empty:
            return "Live training: no iteration has been logged yet."
        return f"Live training: {_words(dict(rows.iloc[-1]), self.planned)}"


def _words(metrics: Mapping[str, float], planned: int) -> str:
    """Return the newest iteration in a line."""
    iteration = int(metrics["iteration"])
    parts = [f"iteration {iteration}" + (f" of {planned}" if planned else "")]
    known = {"reward": "reward", "rewards/gold/mean": "gold", "kl": "KL"}
    for column, name in known.items():
        if metrics.get(column) is not None:
            parts.append(f"{name} {format_metric(name, metrics[column])}")
    seconds = metrics.get("step_time")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s an iteration")
        if planned > iteration:
            parts.append(f"about {_duration((planned - iteration) * seconds)} to go")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _progress(metrics: Mapping[str, float], planned: int) -> str:
    """Return the newest iteration as HTML, with a bar of the way to the last one."""
    if not metrics:
        return sheet(heading("no iteration yet", "the first one appears here when it is finished"))
    done = min(1.0, metrics["iteration"] / planned) if planned else 0.0
    bar = f'<div style="width:{100 * done:.1f}%;height:8px;background:{BLUE}"></div>'
    frame = f"max-width:1090px;height:8px;background:{FAINT};margin-top:8px"
    return sheet(f'<b style="font-size:16px">{escape(_words(metrics, planned))}</b><div style="{frame}">{bar}</div>')


def _group(record: RunRecord, iteration: int) -> str:
    """Return the newest kept rollout's widest group as HTML: pictures with advantages, best first."""
    rows = record.widest_group(iteration)
    cells = [_cell(record, row) for row in rows.to_dict("records")]
    title = f"“{rows['user_prompt'].iloc[0]}”"
    note = f"iteration {iteration}, the widest group: {range_text(rows['reward'])}; below each picture its advantage"
    return sheet(heading(title, note) + grid(cells, min(COLUMNS, len(cells)), SIDE + 4))


def _cell(record: RunRecord, row: Mapping[str, object]) -> str:
    frame = frame_of(row["advantage"])
    image = picture(open_image(record, row["thumbnail"]), row["enhanced_prompt"], SIDE, frame)
    text = f'<div style="font-size:12px;line-height:1.3;color:{GREY}">{escape(row["enhanced_prompt"], 80)}</div>'
    return f'<div>{image}<div style="color:{frame.colour};font-weight:700">{signed(row["advantage"])}</div>{text}</div>'


@styled
def _waiting() -> Drawing:
    figure = new_figure(11.1, 2.6)
    figure.text(0.5, 0.5, "the curves begin with the second iteration", ha="center", color=GREY, fontsize=12)
    return figure
