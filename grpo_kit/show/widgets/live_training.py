"""The live training view: curves and the newest group of a run while `train` goes on in the same notebook."""

import time
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
from IPython.display import DisplayHandle

from grpo_kit.evaluation.table import format_metric
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.curves import training_curves
from grpo_kit.show.style import GREY, Drawing, new_figure, signed, styled
from grpo_kit.show.widgets.cards import Card, card_sheet
from grpo_kit.show.widgets.kept_groups import open_image, range_text
from grpo_kit.show.widgets.picture_box import DPI, PAGE, PictureBox, paragraphs

PANELS = ("reward", "rewards/gold/mean", "kl")
PAUSE = 2.0  # seconds between two pictures, at least
SHARE = 0.05  # of the time may go into pictures: on a slow machine the pause grows
COLUMNS, LINES = 8, 4


class LiveTraining(PictureBox):
    """A run's progress, curves and newest group; pass its `update` to `train` as `on_iteration`.

        watch = show.LiveTraining(run)
        display(watch)
        gk.train(kit, run, on_iteration=watch.update)

    What it shows is read from the run folder, which need not exist yet: an interrupted training keeps its curves, and
    they go on when the cell is run again; a damaged file is a `RecordError`. `update` sets values of widgets and
    nothing else. The line on top follows every iteration; curves and group are drawn every few seconds, and never for
    more than a twentieth of the time.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self._path = Path(run_dir)
        self._handle: DisplayHandle | None = None
        self._group_of: int | None = None  # the iteration whose group is shown
        self.progress = ipywidgets.IntProgress(layout=PAGE)
        super().__init__(pictures=2)
        self.pictures[0].layout.height, self.pictures[0].layout.object_fit = "280px", "contain"
        self.children = [self.words, self.progress, *self.pictures, self.folded]

    @property
    def planned(self) -> int:
        """The iterations that the run's config asks for; 0 while there is none."""
        return int(self._settings.get("num_iterations", 0))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Follow one finished iteration by what it logged, as `train` hands it over."""
        self._follow(metrics)
        stops = self._settings.get("stop_on_divergence")  # the check for reward hacking ends the run
        stopped = stops and read_run(self._path).sentinel.get("divergence")
        last = bool(metrics["iteration"] == self.planned or stopped)
        if last or time.monotonic() >= self._due:
            self.redraw()
            self._follow(metrics)
        if last and self._handle is not None:  # the picture of the finished run stays
            forms, metadata = self._repr_mimebundle_()
            self._handle.update(forms, metadata=metadata, raw=True)

    def _follow(self, metrics: Mapping[str, float]) -> None:
        """Say how far the run is."""
        self.progress.max, self.progress.value = max(self.planned, 1), int(metrics.get("iteration", 0))
        self.words.value = paragraphs([_progress(metrics, self.planned)])

    def draw(self) -> None:
        """Read the run folder and draw what it holds now; the group only when a newer one was kept."""
        started = time.monotonic()
        self._record = read_run(self._path) if self._path.is_dir() else RunRecord(self._path, {}, [], [], {})
        self._settings: Mapping[str, object] = self._record.config.get("training_settings", {})
        self._newest = self._record.lines[-1] if self._record.lines else {}
        curves, group = self.pictures
        curves.value = self._draw_curves().to_png(DPI)
        kept = max(self._record.rollout_iterations, default=None)
        if kept != self._group_of or not group.value:
            self._group_of = kept
            group.value = self._draw_group().to_png(DPI)
        self.write(self.reading())
        self._follow(self._newest)
        self._due = ended = time.monotonic()
        if self._record.iterations > 1:  # the first come at once
            self._due += max(PAUSE, (ended - started) / SHARE)

    @styled
    def _draw_curves(self) -> Drawing:
        rows = self._record.metrics
        if len(rows) < 2 or not set(PANELS) & set(rows):  # a line needs two points
            figure = new_figure(11.1, 2.6)
            figure.text(0.5, 0.5, "the curves begin with the second iteration", ha="center", color=GREY, fontsize=12)
            return figure
        return training_curves(rows, self._record.validations, PANELS, self._record.sentinel)

    def _draw_group(self) -> Drawing:
        """Return the newest group's pictures with their advantages, best first; an empty sheet while there is none."""
        title, note, rows = self._group()
        cards = []
        for row in rows:
            image, advantage = open_image(self._record, row["thumbnail"]), row["advantage"]
            cards.append(Card(image, signed(advantage), text=row["enhanced_prompt"], advantage=advantage))
        size = max(len(cards), int(self._settings.get("group_size", 1)))
        return card_sheet(cards, COLUMNS, [LINES] * -(-size // COLUMNS), title, note)

    def _group(self) -> tuple[str, str, list[Mapping[str, object]]]:
        """Return the title, the note and the rows of the newest kept rollout's group whose rewards differ most."""
        if self._group_of is None:
            return "no group has been kept yet", "the newest one appears here, best first", []
        rows = self._record.widest_group(self._group_of)
        note = f"iteration {self._group_of}, the group whose rewards differ most: {range_text(rows['reward'])}"
        return f"“{rows['user_prompt'].iloc[0]}”", f"{note}; above each picture its advantage", rows.to_dict("records")

    def _ipython_display_(self) -> None:
        """Show the widget, and remember where, so that its picture can be brought up to date at the end."""
        self.redraw()
        forms, metadata = self._repr_mimebundle_()
        self._handle = DisplayHandle()
        self._handle.display(forms, metadata=metadata, raw=True)

    def figures(self) -> list[Drawing]:
        """Return the curves and the newest group of what is on disk."""
        return [self._draw_curves(), self._draw_group()]

    def reading(self) -> list[str]:
        """Return how far the run is, and the newest group."""
        title, note, rows = self._group()
        samples = [f"{signed(row['advantage'])}: {row['enhanced_prompt']}" for row in rows]
        return [_progress(self._newest, self.planned), f"{title}, {note}", *samples]


def _progress(metrics: Mapping[str, float], planned: int) -> str:
    """Return the newest iteration in a line, with the time that is left."""
    if not metrics:
        return "no iteration yet: the first one appears here when it is finished"
    iteration = int(metrics["iteration"])
    parts = [f"iteration {iteration}" + (f" of {planned}" if planned else "")]
    for column, name in {"reward": "reward", "rewards/gold/mean": "gold", "kl": "KL"}.items():
        if metrics.get(column) is not None:
            parts.append(f"{name} {format_metric(name, metrics[column])}")
    seconds = metrics.get("step_time")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s an iteration")
        left = (planned - iteration) * seconds
        if left > 0:
            parts.append(f"about {left / 60:.0f} min to go" if left >= 90 else f"about {left:.0f} s to go")
    return " · ".join(parts)
