"""How often is the check (`gold`) wrong? On rendered scenes, and on 100 pictures of the generator labelled by eye.

Rendered scenes are known, since a program drew them: crisp ones as the world's renderer draws them, ones whose things
touch, and ones with soft edges. The labels are in data/shapeworld/labels, whose README says how they were made.
`python -m benchmarks.studies.check_errors` writes errors.json there and prints the tables of docs/rewards.md; the same
code and labels give the same numbers.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageFilter
from scipy import ndimage

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.evaluation.intervals import Interval, share_interval
from grpo_kit.shapeworld.captions import parse
from grpo_kit.shapeworld.render import SIZE, Mark, draw_marks, layout, render
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, random_scenes
from grpo_kit.shapeworld.verify import check

LABELS = PROJECT_ROOT / "data" / "shapeworld" / "labels"
PROPERTIES = ("count", "shape", "colour", "size", "place", "relation", "background", "clean", "everything")
LABEL_COLUMNS = (
    "number count colour1 shape1 colour2 shape2 colour3 shape3 size place relation background light touch".split()
)
COLUMNS = ("count", "colours", "shapes", "size", "place", "relation", "background", "light")
KINDS = {  # of pictures → what the table calls them
    "crisp": "rendered, crisp",
    "touching": "things of one colour that touch",
    "blur 1.0": "blurred by 1 px",
    "blur 1.5": "blurred by 1.5 px",
    "labelled": "the generator's, labelled",
}
BLURS = (0.5, 1.0, 1.5)  # standard deviations in pixels; a style of the world, dreamy, has 2.2

Verdict = dict[str, bool | None]  # property → whether it holds; None: the label says that it cannot be told
Label = dict[str, str]


def main(
    scenes: Annotated[int, typer.Option(min=1, help="rendered scenes of each kind")] = 1000,
    out: Annotated[Path, typer.Option(help="where the table goes")] = LABELS / "errors.json",
) -> None:
    """Count the errors and write them; print the tables of docs/rewards.md."""
    found = measure(scenes)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{errors_table(found)}\n\n{agreement_table(found)}")


def errors_table(found: dict[str, dict]) -> str:
    """Errors in per cent of answers with Wilson's interval: a row a property, a column a kind of picture."""
    lines = ["| | " + " | ".join(KINDS.values()) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in PROPERTIES:
        cells = [_percent(found[kind][name]) if name in found[kind] else "–" for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(row: dict[str, float]) -> str:
    rate, low, high = (100 * row[key] for key in ("rate", "low", "high"))
    return f"{rate:.1f} [{low:.1f}, {high:.1f}] of {row['answers']}"


def agreement_table(found: dict[str, dict]) -> str:
    """How many of the 100 pictures both passes label alike, by column."""
    lines = ["| column | same label, % | Cohen's kappa |", "|---|---|---|"]
    for name, row in found["agreement"].items():
        lines.append(f"| {name} | {_percent(row)} | {row['kappa']:.2f} |")
    return "\n".join(lines)


def measure(scenes: int = 1000) -> dict[str, dict]:
    """Each kind of picture → property → errors, answers, rate and Wilson's interval; how far the passes agree."""
    asked = [parse(row["user_prompt"]) for row in read_prompts()]
    by_eye = [verdict(label, scene) for label, scene in zip(agreed_labels(), asked, strict=True)]
    found = {"labelled": error_rates(map(check, read_pictures(), asked), by_eye)}
    crisp = random_scenes(scenes, seed=20, style="clean")
    rng = random.Random(21)
    found["crisp"] = known_errors([render(scene, rng) for scene in crisp], crisp)
    close = [one_colour(scene, rng) for scene in crisp if scene.kind != "single"]
    found["touching"] = known_errors([render_touching(scene) for scene in close], close)
    for sigma in BLURS:
        soft = [render(scene, rng).filter(ImageFilter.GaussianBlur(sigma)) for scene in crisp]
        found[f"blur {sigma}"] = known_errors(soft, crisp, soft=True)
    return found | {"agreement": agreement(read_labels("pass_a"), read_labels("pass_b"))}


# --- rendered scenes --------------------------------------------------------------------------------------------------


def one_colour(scene: Scene, rng: random.Random) -> Scene:
    """A pair whose things have one colour and two shapes; counted things as they are."""
    if scene.kind == "counted":
        return scene
    other = rng.choice([shape for shape in SHAPES if shape != scene.shape])
    return replace(scene, second_colour=scene.colour, second_shape=other)


def render_touching(scene: Scene) -> Image.Image:
    """The scene with its things moved to its middle until they are one region of pixels, and no further."""
    marks, ground = layout(scene), BACKGROUNDS[scene.background]
    for step in range(100):
        share = 1 - step / 100
        close = [Mark(m.shape, 0.5 + share * (m.x - 0.5), 0.5 + share * (m.y - 0.5), m.radius, m.rgb) for m in marks]
        image = draw_marks(close, ground)
        if regions(image, ground) == 1:
            return image
    raise ValueError(f"scene: found {scene}, its things never touch")


def regions(image: Image.Image, ground: tuple[int, int, int]) -> int:
    """How many connected regions are at least half covered by a thing."""
    distance = np.linalg.norm(np.asarray(image, float) - ground, axis=-1)
    return ndimage.label(distance > distance.max() / 2)[1]


def known_errors(
    images: Sequence[Image.Image], scenes: Sequence[Scene], soft: bool = False
) -> dict[str, dict[str, float]]:
    """Errors where all that a scene states is shown; whether a soft picture is clean is a matter of taste: left out."""
    verdicts = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    for found in verdicts if soft else ():
        del found["clean"]
    return error_rates(verdicts, [dict.fromkeys(found, True) for found in verdicts])


# --- labels -----------------------------------------------------------------------------------------------------------


def read_pictures() -> list[Image.Image]:
    """The pictures, in the order of their numbers, cut out of the one file."""
    sheet = Image.open(LABELS / "pictures.png").convert("RGB")
    corners = [(x, y) for y in range(0, sheet.height, SIZE) for x in range(0, sheet.width, SIZE)]
    return [sheet.crop((x, y, x + SIZE, y + SIZE)) for x, y in corners]


def read_prompts() -> list[dict]:
    """Of each picture: what the user asked, what the generator was given, where that comes from, and the seed."""
    return _rows("prompts.jsonl")


def read_labels(name: str) -> list[Label]:
    """The labels of pass_a or pass_b, in the order of the pictures; a column that does not apply is empty."""
    rows = _rows(f"{name}.jsonl")
    return [{column: str(row.get(column, "")) for column in LABEL_COLUMNS} for row in rows]


def agreed_labels() -> list[Label]:
    """Where the passes agree, their label; elsewhere what disagreements.jsonl decides, "?" where that is undecided."""
    labels, second = read_labels("pass_a"), read_labels("pass_b")
    settled = {(row["number"], row["column"]): row for row in _rows("disagreements.jsonl")}
    for number, (label, other) in enumerate(zip(labels, second, strict=True)):
        for column in LABEL_COLUMNS:
            if label[column] != other[column]:
                label[column] = settled.pop((number, column))["agreed"]
    if settled:
        raise ValueError(f"disagreements.jsonl: found {sorted(settled)}, on which the passes agree")
    return labels


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (LABELS / name).read_text(encoding="utf-8").splitlines()]


def verdict(label: Label, scene: Scene) -> Verdict:
    """What the check should answer, by the label; where a picture shows no scene nothing holds, as in the check."""
    colours, shapes = named(label, "colour"), named(label, "shape")
    count = int(label["count"]) if label["count"].isdigit() else None
    result: Verdict = {
        "colour": _if_told(colours, set(colours) == {colour for colour, _ in scene.things}),
        "shape": _if_told(shapes, set(shapes) == {shape for _, shape in scene.things}),
        "count": None if count is None else count == (2 if scene.kind == "pair" else scene.count),
    }
    for name in ("size", "place"):
        if wanted := getattr(scene, name):
            one = _if_told([label[name]], label[name] == wanted)  # of several things neither is asked
            result[name] = None if count is None else one if count == 1 else False
    if scene.relation:
        holds = list(zip(colours, shapes, strict=True)) == list(scene.things) and label["relation"] == scene.relation
        told = None if "?" in (*colours, *shapes, label["relation"]) else holds
        result["relation"] = None if count is None else told if count == 2 else False
    if scene.background:
        result["background"] = _if_told([label["background"]], label["background"] == scene.background)
    result["clean"] = _if_told([label["light"]], label["light"] == "clean")
    return dict.fromkeys(result, False) if label["light"] == "spoiled" else result


def _if_told(values: Iterable[str], holds: bool) -> bool | None:
    return None if "?" in values else holds


def named(label: Label, what: str) -> list[str]:
    """A label's colours, or its shapes, object by object; a word outside the world is refused."""
    values = [value for value in (label[f"{what}{number}"] for number in (1, 2, 3)) if value]
    if wrong := set(values) - set(COLOURS if what == "colour" else SHAPES) - {"?"}:
        raise ValueError(f"picture {label['number']}, {what}: found {', '.join(wrong)}")
    return values


def error_rates(found: Iterable[dict[str, bool]], known: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """Each property → how often the check's answer is not the known one; answers that nobody knows are left out."""
    wrong: dict[str, list[bool]] = {name: [] for name in PROPERTIES}
    for answers, truth in zip(found, known, strict=True):
        if None not in truth.values():
            wrong["everything"].append(all(answers.values()) != all(truth.values()))
        for name, holds in truth.items():
            if holds is not None:
                wrong[name].append(answers[name] != holds)
    table = {name: (sum(values), len(values)) for name, values in wrong.items() if values}
    return {
        name: {"errors": errors, "answers": total, **_rounded(share_interval(errors, total))}
        for name, (errors, total) in table.items()
    }


def _rounded(share: Interval) -> dict[str, float]:
    return {{"mean": "rate"}.get(name, name): round(value, 4) for name, value in share.to_dict().items()}


def agreement(first: Sequence[Label], second: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Of two passes, for each column: the share of equal labels with its interval, and Cohen's kappa (1960)."""
    table = {}
    for name in COLUMNS:
        mine, other = _values(first, name), _values(second, name)
        same = sum(a == b for a, b in zip(mine, other, strict=True))
        share = {"answers": len(mine), **_rounded(share_interval(same, len(mine)))}
        table[name] = share | {"kappa": round(kappa(mine, other), 3)}
    return table


def _values(labels: Sequence[Label], column: str) -> list[str]:
    whole = {"colours": "colour", "shapes": "shape"}
    return [" ".join(named(label, whole[column])) if column in whole else label[column] for label in labels]


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Agreement beyond chance: (observed − expected) / (1 − expected); 1 where both always say the same one thing."""
    values = sorted(set(first) | set(second))
    pairs = Counter(zip(first, second, strict=True))
    shares = np.array([[pairs[a, b] for b in values] for a in values]) / len(first)
    expected = float(shares.sum(axis=0) @ shares.sum(axis=1))
    return 1.0 if expected == 1 else (float(np.trace(shares)) - expected) / (1 - expected)


if __name__ == "__main__":
    typer.run(main)
