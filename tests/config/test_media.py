"""The media that a generator gives: their raw values, thumbnails, files and pages."""

import base64
import io
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.config.media import (
    KINDS,
    Medium,
    Sound,
    Video,
    Views,
    as_html,
    digest,
    kind_of,
    open_medium,
    save_medium,
    shows_something,
    thumbnail,
)

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)).astype(np.float32)


def some_media() -> dict[str, Medium]:
    """One of each kind."""
    video = Video(FRAMES, 8)
    return {
        "image": video.pictures[0],
        "video": video,
        "sound": Sound(np.stack([TONE, 0.1 * TONE]), 8000),
        "views": Views(tuple(video.pictures)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_medium_has_a_kind_a_line_a_page_and_a_thumbnail(kind: str):
    medium = some_media()[kind]
    assert kind_of(medium) == kind
    assert len(repr(medium)) <= 200
    page = as_html(medium, 'a "cat" <b>')
    assert "<script" not in page and "http" not in page and "<b>" not in page
    assert ("<audio controls" in page) == (kind == "sound")
    assert kind == "image" or f'alt="{medium!r}"' in medium._repr_html_()  # in a notebook, too
    shown = thumbnail(medium)
    assert isinstance(shown, Image.Image) and shown.mode == "RGB"
    assert shown.size == {"image": (24, 16), "video": (149, 16), "sound": (192, 192), "views": (149, 16)}[kind]


def test_what_is_no_medium_is_refused():
    with pytest.raises(KitError, match="medium: found ndarray, allowed: a PIL picture, Video, Sound or Views"):
        kind_of(FRAMES)


REPEATED = {
    "all frames differ": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "equal ones follow each other": [0, 0, 0, 1, 1, 2, 2, 2, 2],
    "still": [0] * 9,
    "one frame": [0],
    "ends still": [0, 1, 1],
}


@pytest.mark.parametrize("rate", [1, 8, 24, 29.97, 60])
@pytest.mark.parametrize("order", REPEATED.values(), ids=REPEATED)
def test_a_film_is_read_as_it_was_written(order: list[int], rate: float, tmp_path: Path):
    video = Video(FRAMES[order], rate)
    read = open_medium(save_medium(video, tmp_path / "clip.of.mine"))
    assert np.array_equal(read.frames, video.frames) and read.rate == video.rate
    assert digest(read) == digest(video)


def test_pictures_and_views_are_read_as_they_were_written(tmp_path: Path):
    for kind in ("image", "views"):
        medium = some_media()[kind]
        read = open_medium(save_medium(medium, tmp_path / kind))
        assert kind_of(read) == kind and digest(read) == digest(medium)


def test_a_sound_is_read_as_it_was_written_but_for_16_bits(tmp_path: Path):
    sound = some_media()["sound"]
    path = save_medium(sound, tmp_path / "tone")
    read = open_medium(path)
    assert read.rate == 8000 and read.samples.shape == (2, 8000)
    assert np.abs(read.samples - sound.samples).max() <= 0.5001 / 32767
    assert digest(open_medium(save_medium(read, tmp_path / "again"))) == digest(read)
    content = base64.b64decode(re.search(r"audio/wav;base64,([^\"]+)", as_html(sound))[1])
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 8000)


def test_another_value_order_rate_or_kind_is_another_medium():
    video = Video(FRAMES, 8)
    changed = FRAMES.copy()
    changed[4, 3, 2, 1] ^= 1
    others = [Video(changed, 8), Video(FRAMES[::-1], 8), Video(FRAMES, 9), Video(FRAMES[:8], 8)]
    sounds = [Sound(TONE[None], 8000), Sound(TONE[None], 16000), Sound(-TONE[None], 8000)]
    digests = {digest(one) for one in (video, *others, *sounds)}
    assert len(digests) == 1 + len(others) + len(sounds)
    assert digest(Video(FRAMES.copy(), 8.0)) == digest(video)


@pytest.mark.parametrize(
    ("values", "shows"),
    [
        (FRAMES / 255, True),
        (np.zeros((9, 16, 24, 3)), False),
        (np.full(8000, 0.3), False),
        (np.where(np.arange(8000) == 7, np.nan, TONE), False),
        (np.where(np.arange(8000) == 7, np.inf, TONE), False),
        (np.zeros((0, 16, 24, 3)), False),
    ],
)
def test_what_is_empty_constant_or_not_finite_shows_nothing(values: np.ndarray, shows: bool):
    assert shows_something(values) is shows


def test_a_louder_sound_has_a_higher_waveform_and_a_higher_tone_a_higher_line():
    def rows(sound: Sound) -> tuple[int, int]:
        """How many rows the waveform spans, and the row of the strongest frequency."""
        pixels = np.asarray(thumbnail(sound).convert("L")).astype(int)
        return int((pixels[:96] == 0).any(axis=1).sum()), int(pixels[96:].sum(axis=1).argmax())

    time = np.arange(8000) / 8000
    quiet, loud, high = (a * np.sin(2 * np.pi * f * time) for a, f in ((0.2, 300), (0.8, 300), (0.8, 3000)))
    found = [rows(Sound(one[None].astype(np.float32), 8000)) for one in (quiet, loud, high)]
    assert found[0][0] < found[1][0] and found[0][1] == found[1][1]
    assert found[2][0] == found[1][0] and found[2][1] < found[1][1]


@pytest.mark.parametrize("count", [1, 3, 200])
def test_a_very_short_sound_has_a_thumbnail(count: int):
    assert thumbnail(Sound(TONE[None, :count], 8000)).size == (192, 192)
