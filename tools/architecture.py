"""`python -m tools.architecture`: draw docs/images/architecture.svg from the package's imports.

Rooms stand on their floors, an arrow is an import that the files hold, and the numbered way is that of one prompt: a
function that is named there but does not exist is an error. A test compares the picture with the files.
"""

import ast
import hashlib
import json
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.size.house import FLOORS, PROJECT_ROOT, imports, modules, room_of

PICTURE = PROJECT_ROOT / "docs" / "images" / "architecture.svg"
WHAT = {  # what a room holds, in a line
    "config": "settings, prompts, devices,\nseeds, errors",
    "shapeworld": "the embedded world: scenes,\ncaptions, renderer, check",
    "grpo": "advantages, log-probabilities,\nloss: tensors in, tensors out",
    "runs": "what a run leaves on disk,\nnotebooks run headlessly, grids",
    "models": "policy and generator:\ntransformers and diffusers",
    "rewards": "a reward is a function;\ncomposition, CLIP and others",
    "experiment": "load_experiment",
    "rollout": "collect_rollout",
    "evaluation": "paired comparison, intervals,\nreward hacking, audits",
    "training": "the loop, the step, processes,\nresume, replay, branch",
    "show": "figures, report, widgets,\nlessons",
    "preflight": "before a run: machine, plan,\nmistakes in a loss",
    "course": "exercises, their checks,\neditions of the notebooks",
    "cli": "the commands",
}
WAY = (  # module and name: what one user prompt meets, in order
    ("config.prompts", "load_prompts"),
    ("rollout", "collect_rollout"),
    ("models.policy", "Policy.sample"),
    ("models.generator", "Generator.generate_images"),
    ("rewards.composition", "Rewards.score"),
    ("training.step", "grpo_step"),
    ("grpo.advantages", "group_advantages"),
    ("models.policy", "Policy.forward"),
    ("grpo.loss", "grpo_loss"),
    ("runs.checkpoint", "save_checkpoint"),
    ("evaluation.evaluate", "evaluate"),
    ("show.report", "write_report"),
)
BLUE, GREY, INK, PAPER = "#0072b2", "#b8b8b8", "#222222", "#f4f1ea"


def arrows(root: Path = PROJECT_ROOT) -> Counter[tuple[str, str]]:
    """(room, room it imports) → how many imports there are."""
    pairs = ((room_of(one.source), room_of(one.target)) for one in imports(root))
    return Counter((a, b) for a, b in pairs if a != b and "__init__" not in (a, b))


def sizes(root: Path = PROJECT_ROOT) -> Counter[str]:
    """Room → its files."""
    return Counter(room_of(name) for name in modules(root))


def digest(root: Path = PROJECT_ROOT) -> str:
    """What the picture is drawn from, as a short hash: rooms, files, which imports which, and the way of a prompt."""
    facts = [sorted(arrows(root)), sorted(sizes(root).items()), [sorted(floor) for floor in FLOORS], WAY]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def missing_on_the_way(root: Path = PROJECT_ROOT) -> list[str]:
    """Names of the way that the modules do not define."""
    files, missing = modules(root), []
    for module, name in WAY:
        body = ast.parse(files[module].read_text(encoding="utf-8")).body if module in files else []
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            body = getattr(found[0], "body", []) if found else []
            if not found:
                missing.append(f"{module}: {name}")
                break
    return missing


def _places() -> dict[str, tuple[float, float]]:
    """Room → the middle of its box."""
    places = {}
    for height, floor in enumerate(FLOORS):
        order = [room for room in WHAT if room in floor]
        for column, room in enumerate(order):
            places[room] = (2.6 + 5.2 * column if len(order) == 2 else 5.2, 1.45 * height)
    return places


def draw(root: Path = PROJECT_ROOT) -> Figure:
    """The picture."""
    if missing := missing_on_the_way(root):
        raise ValueError(
            f"the way of a prompt: not in the package: {', '.join(missing)}. Mend WAY in tools/architecture.py"
        )
    figure = Figure(figsize=(11, 11.5), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.4, 14.6), ylim=(-0.9, 10.9))
    axes.set_axis_off()
    places, files = _places(), sizes(root)
    for (a, b), count in sorted(arrows(root).items()):
        (x, y), (u, v) = places[a], places[b]
        bend = 0.12 if abs(x - u) < 0.1 and y - v > 2 else 0.0
        style = {"color": GREY, "lw": 0.5 + 0.12 * min(count, 12), "zorder": 1, "mutation_scale": 8}
        axes.add_patch(
            FancyArrowPatch((x, y - 0.45), (u, v + 0.45), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", **style)
        )
    for room, (x, y) in places.items():
        box = FancyBboxPatch((x - 2.05, y - 0.45), 4.1, 0.9, boxstyle="round,pad=0.02,rounding_size=0.08")
        box.set(facecolor=PAPER, edgecolor=INK, linewidth=1.0, zorder=2)
        axes.add_patch(box)
        count = f"{files[room]} files" if files[room] > 1 else "1 file"
        axes.text(x - 1.95, y + 0.27, room, weight="bold", size=11, color=INK, va="center", zorder=3)
        axes.text(x + 1.95, y + 0.27, count, size=8, color="#555555", va="center", ha="right", zorder=3)
        stations = [str(number) for number, (module, _) in enumerate(WAY, start=1) if room_of(module) == room]
        axes.text(x + 1.95, y - 0.25, " ".join(stations), weight="bold", size=10, color=BLUE, ha="right", zorder=3)
        axes.text(x - 1.95, y - 0.13, WHAT[room], size=8, color=INK, va="center", zorder=3, linespacing=1.15)
    axes.text(10.5, 10.6, "The way of one prompt", weight="bold", size=12, color=BLUE, va="center")
    for number, (module, name) in enumerate(WAY, start=1):
        y = 10.6 - 0.78 * number
        axes.text(10.5, y, f"{number}", weight="bold", size=11, color=BLUE, va="center")
        axes.text(10.95, y + 0.13, name, size=10, color=INK, va="center", family="monospace")
        axes.text(10.95, y - 0.15, f"{module.replace('.', '/')}.py", size=8, color="#555555", va="center")
    axes.text(
        -0.3, -0.75, "Imports run down only. An arrow is an import in the files, thicker where there are more.", size=9
    )
    return figure


def main() -> None:
    """Draw the picture into docs/images."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "grpo_kit"  # the same file for the same picture
    draw().savefig(PICTURE, format="svg", metadata={"Date": None, "Description": digest()})
    print(f"drawn: {PICTURE.relative_to(PROJECT_ROOT)}")


if __name__ == "__main__":
    main()
