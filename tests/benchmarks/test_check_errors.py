"""How often the check is wrong: the labels are whole, the published tables are theirs, and known errors are counted."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.studies import check_errors as study
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.shapeworld import verify
from grpo_kit.shapeworld.render import layout
from grpo_kit.shapeworld.scene import BACKGROUNDS, Scene, random_scenes

ERRORS = json.loads((study.LABELS / "errors.json").read_text(encoding="utf-8"))
PAIR = Scene("red", "circle", second_colour="blue", second_shape="ring", relation="above", background="white")


@pytest.fixture
def own_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in study.LABELS.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(study, "LABELS", tmp_path)
    return tmp_path


def test_the_published_tables_are_those_of_the_labels_and_the_check_as_they_are() -> None:
    asked = [study.parse(row["user_prompt"]) for row in study.read_prompts()]
    by_eye = [study.verdict(label, scene) for label, scene in zip(study.agreed_labels(), asked, strict=True)]
    found = study.error_rates(map(study.check, study.read_pictures(), asked), by_eye)
    assert found == ERRORS["labelled"]
    assert study.agreement(study.read_labels("pass_a"), study.read_labels("pass_b")) == ERRORS["agreement"]
    docs = (PROJECT_ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert study.errors_table(ERRORS) in docs and study.agreement_table(ERRORS) in docs
    assert f'all of its {found["clean"]["errors"]} errors on "clean"' in docs
    whole = found["everything"]
    rate, low, high = (f"{100 * whole[key]:.0f}" for key in ("rate", "low", "high"))
    share, numbers = f"{rate} % [{low}, {high}]", f"{whole['errors']} of {whole['answers']} pictures"
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert numbers in readme and share in readme and ERRORS["crisp"]["everything"]["errors"] == 0
    reader = (PROJECT_ROOT / "notebooks" / "04_rewards.ipynb").read_text(encoding="utf-8")
    assert f"Of {whole['answers']} pictures" in reader and f"about {whole['errors']}, {share}" in reader


def test_a_check_that_is_worse_does_not_have_the_published_errors() -> None:
    """The twin of the test above: a check that never finds a colour."""
    asked = [study.parse(row["user_prompt"]) for row in study.read_prompts()]
    by_eye = [study.verdict(label, scene) for label, scene in zip(study.agreed_labels(), asked, strict=True)]
    answers = [study.check(*pair) | {"colour": False} for pair in zip(study.read_pictures(), asked, strict=True)]
    assert study.error_rates(answers, by_eye)["colour"]["errors"] > ERRORS["labelled"]["colour"]["errors"]


def test_every_disagreement_is_named_and_settled_once(own_labels: Path) -> None:
    lines = (own_labels / "disagreements.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(study.agreed_labels()) == 100
    assert all((row["agreed"] == "?") == (row["why"] == "undecided") for row in rows)
    assert all(row["agreed"] in ("?", row["pass_a"], row["pass_b"]) for row in rows)
    readme = (PROJECT_ROOT / "data" / "shapeworld" / "labels" / "README.md").read_text(encoding="utf-8")
    decided = sum(row["agreed"] != "?" for row in rows)
    assert f"{len(rows)} of them. {decided} are decided, with the reason; {len(rows) - decided} stay" in readme

    (own_labels / "disagreements.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(KeyError):
        study.agreed_labels()
    agreed = json.dumps({"number": 99, "column": "count", "agreed": "3"})
    (own_labels / "disagreements.jsonl").write_text("\n".join([*lines, agreed]), encoding="utf-8")
    with pytest.raises(ValueError, match="on which the passes agree"):
        study.agreed_labels()


def test_what_the_check_should_say_follows_from_the_label_and_is_open_where_that_is() -> None:
    label = dict.fromkeys(study.LABEL_COLUMNS, "") | {"count": "2", "background": "white", "light": "clean"}
    label |= {"colour1": "red", "shape1": "circle", "colour2": "blue", "shape2": "ring", "relation": "above"}
    assert all(study.verdict(label, PAIR).values())
    assert study.verdict(label | {"relation": "left of"}, PAIR)["relation"] is False
    unsure = study.verdict(label | {"shape2": "?", "background": "?"}, PAIR)
    assert {name for name, holds in unsure.items() if holds is None} == {"shape", "relation", "background"}
    assert not any(study.verdict(label | {"light": "spoiled"}, PAIR).values())
    with pytest.raises(ValueError, match="picture 7, colour: found mauve"):
        study.named(label | {"number": "7", "colour1": "mauve"}, "colour")


def test_kappa_is_cohens_in_two_small_tables() -> None:
    assert study.kappa(list("aabb"), list("aabb")) == 1
    assert study.kappa(list("aabb"), list("abab")) == pytest.approx(0)
    assert study.kappa(list("aaab"), list("aabb")) == pytest.approx(0.5)


def test_moved_together_the_things_of_a_scene_are_one_region() -> None:
    scene = next(scene for scene in random_scenes(50, seed=3, style="clean") if scene.kind == "counted")
    ground = BACKGROUNDS[scene.background]
    assert study.regions(study.draw_marks(layout(scene), ground), ground) == scene.count
    assert study.regions(study.render_touching(scene), ground) == 1


def test_things_of_one_colour_that_touch_are_told_apart_by_the_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [scene for scene in random_scenes(80, seed=6, style="clean") if scene.kind == "counted"]
    images = [study.render_touching(scene) for scene in scenes]
    assert study.known_errors(images, scenes)["count"]["errors"] <= 0.2 * len(scenes)
    monkeypatch.setattr(verify, "_cut", lambda pixels, distance, regions: regions)
    assert study.known_errors(images, scenes)["count"]["errors"] == len(scenes)


def test_blurred_scenes_are_read_better_with_the_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [scene for scene in random_scenes(150, seed=7, style="clean") if scene.kind != "single"]
    soft = [study.render(scene).filter(study.ImageFilter.GaussianBlur(1.5)) for scene in scenes]
    errors = study.known_errors(soft, scenes, soft=True)["count"]["errors"]
    monkeypatch.setattr(verify, "_cut", lambda pixels, distance, regions: regions)
    assert errors < study.known_errors(soft, scenes, soft=True)["count"]["errors"] / 2


def test_one_thing_is_not_cut_apart() -> None:
    for style in ("clean", "dreamy", "vintage"):
        scenes = [scene for scene in random_scenes(60, seed=8, style=style) if scene.kind == "single"]
        read = [len(verify.read(study.render(scene)).objects) for scene in scenes]
        assert max(read) == 1, style


def test_crisp_scenes_are_read_without_an_error_and_a_grey_picture_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = random_scenes(60, seed=5, style="clean")
    images = [study.render(scene) for scene in scenes]
    assert not study.known_errors(images, scenes)["everything"]["errors"]
    grey = [Image.new("RGB", (32, 32), (135, 135, 135))] * len(scenes)
    assert study.known_errors(grey, scenes)["everything"]["errors"] == len(scenes)
    monkeypatch.setattr(verify, "_LARGE_FROM", 99.0)  # everything is small
    assert study.known_errors(images, scenes)["size"]["errors"] > 10
