"""What was promised and what was measured: a table in Markdown and a figure, from the workloads' records."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.speed.results import Figure, figures_of, read
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, new_figure, styled

COLUMNS = ("id", "what", "must", "aim", "measured", "95 % interval", "by the wall's clock", "reached")
GATES = ("id", "gates", "nearest to its limit")
LEGEND = "dot and line: measured, 95 % interval (hollow dot: must missed; grey: no goal)        |  must        ◇  aim"
FARTHEST = 3.0  # multiples of the largest goal that a panel shows
Named = tuple[str, Figure]  # a workload's id and one of its figures


def write_table(folder: Path) -> Path:
    """Write `table.md` and `plot.png` from all records in a folder; returns the table's path."""
    records = [read(path) for path in sorted(folder.glob("W*.json"), key=lambda path: int(path.stem[1:]))]
    named = [(record["id"], figure) for record in records for figure in figures_of(record)]
    promised = [pair for pair in named if pair[1].must is not None]
    beside = [pair for pair in named if pair[1].must is None]
    lines = ["# Benchmarks", "", *_machines(records)]
    lines += ["## Promised", "", *_markdown(COLUMNS, [_row(*pair) for pair in promised])]
    lines += ["## Beside it", "", *_markdown(COLUMNS[:-1], [_row(*pair)[:-1] for pair in beside])]
    lines += [f"* {record['id']}: {note}." for record in records for note in record["notes"]]
    lines += ["", "## Gates", "", "Times are compared only where both sides do the same work.", ""]
    lines += _markdown(GATES, [_gates(record) for record in records if record["gates"]])
    path = folder / "table.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    draw(named).save(folder / "plot.png")
    return path


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _machines(records: Sequence[dict]) -> list[str]:
    """One line for each machine and setting that records were made with."""
    lines = []
    for record in records:
        machine, settings, versions = record["machine"], record["settings"], record["versions"]
        measured = f"{settings['threads']} thread(s), {settings['pairs']} pairs{', quick' if settings['quick'] else ''}"
        libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "diffusers", "trl"))
        line = f"{machine['processor']}, {machine['cores']} cores; {measured}; {libraries}."
        lines += [line, ""] if line not in lines else []
    return lines


def _row(workload: str, figure: Figure) -> list[str]:
    least = "≥" if figure.more_is_better else "≤"
    goals = ["–" if goal is None else f"{least} {goal:g}{figure.unit}" for goal in (figure.must, figure.aim)]
    interval = "" if figure.low is None else f"{figure.low:.3g} to {figure.high:.3g}"
    wall = "" if figure.wall is None else f"{figure.wall:.3g}{figure.unit}"
    return [workload, figure.name, *goals, f"**{figure.value:.3g}{figure.unit}**", interval, wall, _reached(figure)]


def _reached(figure: Figure) -> str:
    if figure.must is None:
        return ""
    if not figure.reaches(figure.must):
        return "**no**"
    return "aim" if figure.aim is not None and figure.reaches(figure.aim) else "must"


def _gates(record: dict) -> list[str]:
    gates = record["gates"]
    shares = [gate["measured"] / gate["limit"] if gate["limit"] else 0.0 for gate in gates]
    nearest = gates[max(range(len(gates)), key=shares.__getitem__)]
    found = f"{nearest['name']}: {nearest['measured']:.2g}, allowed {nearest['limit']:.2g}"
    return [record["id"], f"{len(gates)} passed", found]


@styled
def draw(named: Sequence[Named]) -> Drawing:
    """Three panels: the peer's time and memory as multiples of the kit's, exponents, shares of the most allowed."""
    ratios = [pair for pair in named if pair[1].must is not None and pair[1].more_is_better]
    exponents = [pair for pair in named if pair[1].unit == ""]
    others = [pair for pair in named if pair[1].must is not None and pair not in ratios and pair not in exponents]
    panels = {
        "The peer's time or memory, as a multiple of the kit's (more is better)": ratios,
        "How seconds grow with size, exponent (less is better)": exponents,
        "Measured, as a share of the most allowed (less is better)": [_as_share(*pair) for pair in others],
    }
    panels = {title: panel for title, panel in panels.items() if panel}
    heights = [len(panel) + 1.2 for panel in panels.values()]
    figure = new_figure(10, 0.6 + 0.42 * sum(heights))
    places = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (title, panel) in zip(places, panels.items(), strict=True):
        axes.set_title(title)
        _draw_panel(axes, panel)
    figure.supxlabel(LEGEND, fontsize=8.5)
    return figure


def _as_share(workload: str, figure: Figure) -> Named:
    """A figure as a share of its must, so that megabytes, seconds and points fit one axis; the name keeps the value."""
    value, low, high, aim = (
        None if number is None else number / figure.must
        for number in (figure.value, figure.low, figure.high, figure.aim)
    )
    name = f"{figure.name}: {figure.value:.3g}{figure.unit}"
    return workload, Figure(name, value, low, high, 1.0, aim, more_is_better=False)


def _draw_panel(axes: Axes, panel: Sequence[Named]) -> None:
    """One line a figure: dot and interval for what was measured, bar for must, diamond for aim."""
    goals = [goal for _, figure in panel for goal in (figure.must, figure.aim) if goal is not None]
    farthest = FARTHEST * max(goals, default=float("inf"))
    axes.set_xlim(0, 1.08 * max(*goals, *(min(figure.value, farthest) for _, figure in panel)))
    for row, (_, figure) in enumerate(panel):
        _draw_figure(axes, row, figure)
    axes.set_yticks(range(len(panel)), [f"{workload}  {figure.name}" for workload, figure in panel])
    axes.set_ylim(len(panel) - 0.5, -0.8)
    axes.grid(True, axis="x", color=FAINT)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_figure(axes: Axes, row: int, figure: Figure) -> None:
    reached = figure.must is None or figure.reaches(figure.must)
    colour = GREY if figure.must is None else BLUE if reached else VERMILION
    edge = axes.get_xlim()[1]
    if figure.low is not None:
        axes.plot([figure.low, figure.high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
    if figure.must is not None:
        axes.plot(figure.must, row, "|", color=INK, markersize=15, markeredgewidth=2)
    if figure.aim is not None:
        axes.plot(figure.aim, row, "D", color=INK, markersize=6, markerfacecolor="none")
    beyond = figure.value > edge
    marker = ">" if beyond else "o"  # an arrow at the edge where the value lies far beyond it
    place = 0.985 * edge if beyond else figure.value
    axes.plot(place, row, marker, color=colour, markersize=6, markerfacecolor=colour if reached else "white")
    above = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    axes.annotate(f"{figure.value:.2f}", (place, row), (0, 6), **above)
