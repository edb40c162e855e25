"""Prompts that bring pictures: the forms in which rows name them, broken ones, and what is kept of them."""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from grpo_kit.config import ConfigError, pictures
from grpo_kit.config.contents import prompts_digest
from grpo_kit.config.prompts import Prompt, Prompts, load_prompts

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def square(size: int = 8, colour: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def rows_of(folder: Path, *rows: dict) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(f"{json.dumps({'user_prompt': 'the same', **row})}\n" for row in rows), "utf-8")
    return path


def error_of(path: Path) -> str:
    with warnings.catch_warnings(), pytest.raises(ConfigError) as caught:
        warnings.simplefilter("error")  # PIL's are no business of the user
        load_prompts(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable()
    return text.replace(f"{path.parent}/", "")


# --- the forms --------------------------------------------------------------------------------------------------------


def test_a_path_counts_from_the_files_folder_and_null_means_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    square().save(tmp_path / "own" / "a.png")
    square(colour=WHITE).save(tmp_path / "b.jpg")
    path = rows_of(
        tmp_path,
        {"image": "own/a.png", "target": "a red circle"},
        {"images": ["own/a.png", str(tmp_path / "b.jpg")]},
        {"image": {"bytes": None, "path": "b.jpg"}},
        {"image": None, "images": None},
        {"images": []},
        {},
    )
    monkeypatch.chdir(tmp_path)
    found = load_prompts("p.jsonl")
    assert found == load_prompts(path)
    monkeypatch.chdir("/")
    assert [len(prompt.images) for prompt in found] == [1, 2, 1, 0, 0, 0]
    assert found[0] == Prompt("the same", metadata={"target": "a red circle"}, images=(tmp_path / "own" / "a.png",))
    assert [(one.mode, one.getpixel((3, 3))) for one in found[1].pictures()] == [("RGB", RED), ("RGB", WHITE)]
    assert found[1].images[0] is found[0].images[0]  # one object for all rows that name it
    assert found[4].pictures() == [] and len(set(found)) == 4


def test_tables_hold_pictures_as_bytes_as_structs_and_as_paths(tmp_path: Path) -> None:
    red = encoded(square())
    square().save(tmp_path / "a.png")
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "bytes": pa.array([red, None], pa.binary()),
        "structs": pa.array([{"bytes": red, "path": "not/here.png"}, {"bytes": None, "path": "a.png"}], struct),
        "paths": pa.array([None, "a.png"], pa.string()),
    }
    expected = {"bytes": [red, None], "structs": [red, tmp_path / "a.png"], "paths": [None, tmp_path / "a.png"]}
    for name, column in columns.items():
        parquet.write_table(pa.table({"user_prompt": ["a", "b"], "image": column}), tmp_path / "p.parquet")
        assert [one.images for one in load_prompts(tmp_path / "p.parquet")] == [
            (picture,) if picture else () for picture in expected[name]
        ], name
    lists = pa.array([[{"bytes": red, "path": None}] * 2, []], pa.list_(struct))
    parquet.write_table(pa.table({"user_prompt": ["a", "b"], "images": lists}), tmp_path / "p.parquet")
    assert [one.images for one in load_prompts(tmp_path / "p.parquet")] == [(red, red), ()]
    (tmp_path / "p.csv").write_text('user_prompt,image\na,a.png\nb,\n"c",a.png\n')
    assert [len(one.images) for one in load_prompts(tmp_path / "p.csv")] == [1, 0, 1]


def test_pictures_of_datasets_are_read_as_it_saves_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"user_prompt": datasets.Value("string"), "image": datasets.Image()})
    made = datasets.Dataset.from_dict({"user_prompt": ["a", "b"], "image": [square(), None]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "p.parquet")
    for path in ("saved", "p.parquet"):
        first, second = load_prompts(tmp_path / path)
        assert [one.getpixel((0, 0)) for one in first.pictures()] == [RED] and second.images == (), path


# --- what is refused --------------------------------------------------------------------------------------------------

PNG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"))
JPEG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
HUGE = encoded(Image.new("1", (8001, 8000)))
BOMB = encoded(Image.new("1", (20_000, 20_000)))
KINDS = "allowed: a file in one of JPEG, PNG, WEBP, GIF, BMP, TIFF"
BROKEN: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, f"found 'a.png', where there is no file, {KINDS}. Correct the path"),
    "empty": (b"", f"found 'a.png', which is empty, {KINDS}. Correct the path, or copy or convert"),
    "text": (b"a cat", f"found 'a.png', which is no picture, {KINDS}. Correct"),
    "a PNG cut off": (PNG[: len(PNG) // 2], f"found 'a.png', which cannot be read (image file is truncated), {KINDS}"),
    "a JPEG cut off": (JPEG[: len(JPEG) // 2], "found 'a.png', which cannot be read (image file is truncated ("),
    "a header alone": (PNG[:40], "found 'a.png', which is no picture"),
    "a broken block": (PNG[:200] + bytes(50) + PNG[250:], "found 'a.png', which cannot be read ("),
    "no pixels": (PNG[:16] + bytes(4) + PNG[20:], "found 'a.png', which "),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", f"found 'a.png', which is no picture, {KINDS}"),
    "numbers": (
        encoded(Image.new("F", (2, 2)), "TIFF"),
        "found 'a.png', which cannot be read (its numbers of 32 bits have no known range)",
    ),
    "far too large": (HUGE, "found 'a.png' of 8,001 x 8,000 pixels, allowed: 64,000,000. Make the picture smaller"),
    "a bomb": (BOMB, "found 'a.png' of very many pixels, allowed: 64,000,000. Make the picture smaller"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_one_line_with_file_and_line(kind: str, tmp_path: Path) -> None:
    content, expected = BROKEN[kind]
    square().save(tmp_path / "good.png")
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    text = error_of(rows_of(tmp_path, {"image": "good.png"}, {"images": ["good.png", "a.png"]}))
    assert text.startswith(f"p.jsonl:2: images: {expected}"), text
    if content is not None:
        parquet.write_table(pa.table({"user_prompt": ["a"], "image": [content]}), tmp_path / "p.parquet")
        expected = re.sub(r"'a.png'", f"{len(content):,} bytes", expected)
        assert error_of(tmp_path / "p.parquet").startswith(f"p.parquet: row 1: image: {expected}")


WRONG = {
    "both": ({"image": "a.png", "images": ["a.png"]}, "p.jsonl:1: found both image and images, allowed: one of them."),
    "a number": ({"image": 3}, 'p.jsonl:1: image: found 3, allowed: a path such as "cat.png"'),
    "empty text": ({"image": " "}, "p.jsonl:1: image: found ' ', allowed: a path"),
    "NUL": ({"image": "a\0.png"}, "p.jsonl:1: image: found 'a\\x00.png', allowed: a path"),
    "a list for one": ({"image": ["a.png"]}, "p.jsonl:1: image: found ['a.png'], allowed: a path"),
    "one for a list": ({"images": "a.png"}, "p.jsonl:1: images: found 'a.png', allowed: a list of pictures."),
    "null in a list": ({"images": ["a.png", None]}, "p.jsonl:1: images: found null, allowed: a path"),
    "an empty struct": ({"image": {"bytes": None, "path": None}}, "p.jsonl:1: image: found null, allowed: a path"),
    "bytes as text": ({"image": {"bytes": "a.png2"}}, "p.jsonl:1: image: found 'a.png2', where there is no file"),
    "another struct": ({"image": {"url": "a.png"}}, "p.jsonl:1: image: found {'url': 'a.png'}, allowed: a path"),
    "a folder": ({"image": "sub"}, "p.jsonl:1: image: found 'sub', where there is no file, allowed: a file"),
    "an address": ({"image": "https://x.org/a.png"}, "p.jsonl:1: image: found 'https:/x.org/a.png', where there is no"),
    "a long name": ({"image": "x" * 5000}, "p.jsonl:1: image: found 'xxxxx"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_names_no_picture_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    square().save(tmp_path / "a.png")
    row, expected = WRONG[kind]
    assert error_of(rows_of(tmp_path, row)).startswith(expected)


def test_bytes_elsewhere_in_a_table_are_still_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"user_prompt": ["a"], "thumbnail": [b"\xff\xd8"]}), tmp_path / "p.parquet")
    assert "row 1: found a value that JSON cannot hold" in error_of(tmp_path / "p.parquet")


def test_a_picture_that_is_gone_later_is_said_too(tmp_path: Path) -> None:
    square().save(tmp_path / "a.png")
    (prompt,) = load_prompts(rows_of(tmp_path, {"image": "a.png"}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"^prompt 'the same': image: found '.*a.png', where there is no file"):
        prompt.pictures()
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read: No such file"):
        prompts_digest([prompt])
    assert "no picture" in Prompts([prompt])._repr_html_()


# --- what they become -------------------------------------------------------------------------------------------------


def half_clear(mode: str) -> Image.Image:
    """Left half opaque and dark, right half transparent."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (0, 0, 4, 8))
    if mode == "P":
        return image.convert("RGBA").quantize(4)
    return image.convert(mode)


SIXTEEN = Image.fromarray(np.full((8, 8), 40 * 257, np.uint16))
MODES: dict[str, tuple[Callable[[], bytes], tuple[int, int, int], tuple[int, int, int]]] = {
    "RGBA": (lambda: encoded(half_clear("RGBA")), (40, 40, 40), WHITE),
    "LA": (lambda: encoded(half_clear("LA")), (40, 40, 40), WHITE),
    "P": (lambda: encoded(half_clear("P")), (40, 40, 40), WHITE),
    "P without": (lambda: encoded(square(colour=(40, 40, 40)).quantize(2)), (40, 40, 40), (40, 40, 40)),
    "L": (lambda: encoded(Image.new("L", (8, 8), 40)), (40, 40, 40), (40, 40, 40)),
    "1": (lambda: encoded(Image.new("1", (8, 8), 1)), WHITE, WHITE),
    "16 bits": (lambda: encoded(SIXTEEN), (40, 40, 40), (40, 40, 40)),
    "16 bits TIFF": (lambda: encoded(SIXTEEN, "TIFF"), (40, 40, 40), (40, 40, 40)),
    "CMYK": (lambda: encoded(square(colour=(40, 40, 40)).convert("CMYK"), "JPEG"), (40, 40, 40), (40, 40, 40)),
    "WebP": (lambda: encoded(half_clear("RGBA"), "WEBP", lossless=True), (40, 40, 40), WHITE),
    "GIF": (lambda: encoded(half_clear("RGBA"), "GIF"), (40, 40, 40), WHITE),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_over_white(mode: str, tmp_path: Path) -> None:
    made, left, right = MODES[mode]
    (tmp_path / "a").write_bytes(made())
    (picture,) = load_prompts(rows_of(tmp_path, {"image": "a"}))[0].pictures()
    assert (picture.mode, picture.size) == ("RGB", (8, 8))
    assert np.abs(np.array([picture.getpixel((1, 3)), picture.getpixel((6, 3))]) - [left, right]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_that_a_camera_wrote_is_honoured(kind: str) -> None:
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter to the right
    (picture,) = Prompt("the same", images=(encoded(image, kind, exif=exif),)).pictures()
    assert picture.size == (16, 32)
    assert picture.getpixel((8, 4))[1] < 60 and picture.getpixel((8, 28))[1] > 200  # the left half is on top


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [square(), square(colour=WHITE)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        (picture,) = Prompt("the same", images=(content,)).pictures()
        assert picture.size == (8, 8) and picture.getpixel((4, 4))[1] < 30, kind


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_picture_is_decoded_once_however_many_rows_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = pictures.open_picture
    monkeypatch.setattr(pictures, "open_picture", lambda *args, **kw: opened.append(args[0]) or real(*args, **kw))
    square().save(tmp_path / "a.png")
    square().save(tmp_path / "b.png")
    found = load_prompts(rows_of(tmp_path, *[{"image": name} for name in ("a.png", "b.png") * 50]))
    assert opened == [tmp_path / "a.png", tmp_path / "b.png"]
    assert len({id(prompt.images[0]) for prompt in found}) == 2


def test_the_digest_counts_the_pictures_content_and_not_its_place(tmp_path: Path) -> None:
    square().save(tmp_path / "a.png")
    square().save(tmp_path / "moved.png")
    here, there = (load_prompts(rows_of(tmp_path, {"image": name})) for name in ("a.png", "moved.png"))
    inside = [Prompt("the same", images=((tmp_path / "a.png").read_bytes(),))]
    before = prompts_digest(here)
    assert before == prompts_digest(there) == prompts_digest(inside) != prompts_digest([Prompt("the same")])
    square(colour=WHITE).save(tmp_path / "a.png")
    assert prompts_digest(here) != before
    two = [Prompt("the same", images=inside[0].images * 2)]
    assert prompts_digest(two) != before
    # prompts without pictures count as they did before there were any
    row = repr(("a cat", "basic", "medium", []))
    assert prompts_digest([Prompt("a cat")]) == f"1 prompts, {hashlib.sha256(row.encode()).hexdigest()}"


def test_a_prompt_with_pictures_is_shown_in_a_line_and_as_thumbnails(tmp_path: Path) -> None:
    content = encoded(Image.effect_noise((300, 300), 90))
    square().save(tmp_path / "a.png")
    one = Prompt("the same, but blue", metadata={"target": "x" * 300}, images=(content, tmp_path / "a.png"))
    for prompt in (one, Prompt("y" * 300, images=(content,) * 40), Prompt("a", images=(content,))):
        assert len(repr(prompt)) <= 200
    assert f"images=({len(content):,} bytes, a.png)" in repr(Prompt("a", images=(content, tmp_path / "a.png")))
    assert one._repr_html_().count("<img") == 2
    assert "images" not in Prompt("a cat")._repr_html_()
    assert Prompts([one, Prompt("a cat")])._repr_html_().count("<img") == 2
    assert "images" not in Prompts([Prompt("a cat")])._repr_html_()


def test_a_prompt_made_by_hand_takes_a_list_of_names(tmp_path: Path) -> None:
    square().save(tmp_path / "a.png")
    prompt = Prompt("the same", images=[str(tmp_path / "a.png"), encoded(square())])
    assert prompt.images == (tmp_path / "a.png", encoded(square())) and len({prompt}) == 1
    assert [one.getpixel((0, 0)) for one in prompt.pictures()] == [RED, RED]


def test_a_prompt_with_pictures_goes_to_another_process(tmp_path: Path) -> None:
    square().save(tmp_path / "a.png")
    prompt = Prompt("the same", images=(encoded(square()), tmp_path / "a.png"))
    again = pickle.loads(pickle.dumps(prompt))
    assert again == prompt and hash(again) == hash(prompt)
    assert [one.tobytes() for one in again.pictures()] == [one.tobytes() for one in prompt.pictures()]
