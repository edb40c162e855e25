"""Films, sounds and turned objects in a run's folder, report, widgets and mirrors: they play, and nothing else runs."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hostile import active_nodes

from grpo_kit import show
from grpo_kit.config import load_config
from grpo_kit.config.display import group_table
from grpo_kit.config.media import KINDS, Medium, Sound, Video, Views, as_html, digest, kind_of, thumbnail
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.record import read_run
from grpo_kit.runs.tracking import Tracker
from grpo_kit.show import pages
from grpo_kit.show.pages import clean_html
from grpo_kit.show.report import write_report

OTHERS = ("video", "sound", "views")
RNG = np.random.default_rng(0)


def film(count: int = 9, height: int = 32, width: int = 32, rate: float = 8.0) -> Video:
    """A white square that moves to the right over a colour."""
    frames = np.full((count, height, width, 3), RNG.integers(0, 120, 3), np.uint8)
    for number, frame in enumerate(frames):
        left = number * (width - 8) // max(count - 1, 1)
        frame[height // 3 : 2 * height // 3, left : left + 8] = 255
    return Video(frames, rate)


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = 8000, channels: int = 1) -> Sound:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return Sound(np.stack([wave] * channels).astype(np.float32), rate)


def some(kind: str) -> Medium:
    """One of a kind."""
    made = {"image": lambda: film().pictures[4], "video": film, "sound": tone}
    return made.get(kind, lambda: Views(tuple(film().pictures)))()


@pytest.fixture(params=OTHERS)
def media_run(request: pytest.FixtureRequest, synthetic_run: Path) -> Path:
    """A run whose pictures are another medium; its name says which."""
    folder = RunFolder(synthetic_run)
    for place in sorted(synthetic_run.glob("thumbnails/*.jpg")):
        folder.save_thumbnail(some(request.param), place.stem)
    return synthetic_run


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_the_medium_beside_its_thumbnail(kind: str, tmp_path: Path) -> None:
    medium, folder = some(kind), RunFolder(tmp_path)
    name = folder.save_thumbnail(medium, "evaluation_0_v1.2_0")
    assert name == "thumbnails/evaluation_0_v1.2_0.jpg"
    record = read_run(tmp_path)
    assert record.image(name).size == thumbnail(medium).size
    kept = record.medium(name)
    assert kind_of(kept) == kind
    if kind in ("video", "views"):
        assert digest(kept) == digest(medium)
    if kind == "sound":
        assert np.abs(kept.samples - medium.samples).max() < 1e-4 and kept.rate == medium.rate
    beside = {"image": [], "video": [".webp"], "sound": [".wav"], "views": [".webp"]}[kind]
    assert sorted(file.suffix for file in tmp_path.glob("thumbnails/*")) == [".jpg", *beside]
    sizes = [file.stat().st_size for file in tmp_path.glob("thumbnails/*")]
    assert max(sizes) < 20_000
    assert set(tmp_path.glob("thumbnails/*")) <= folder._unflushed  # a commit flushes all of them


def test_a_picture_is_kept_as_it_always_was(tmp_path: Path) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (300, 500, 3), dtype=np.uint8))
    name = RunFolder(tmp_path).save_thumbnail(picture, "one")
    before, small = io.BytesIO(), picture.copy()
    small.thumbnail((192, 192))
    small.save(before, "JPEG", quality=92, subsampling=0)
    assert (tmp_path / name).read_bytes() == before.getvalue() and picture.size == (500, 300)


def test_large_media_are_kept_small_and_say_the_same(tmp_path: Path) -> None:
    folder, record = RunFolder(tmp_path), read_run(tmp_path)
    clip = record.medium(folder.save_thumbnail(film(25, 480, 832, 24), "clip"))
    assert clip.frames.shape == (25, 111, 192, 3) and clip.rate == 24
    bright = clip.frames.min(axis=3) > 200
    places = [np.nonzero(frame.any(axis=0))[0].mean() for frame in bright]
    assert (np.diff(places) > 0).all()  # it still moves to the right
    long = record.medium(folder.save_thumbnail(tone(440, 20, 44_100, 2), "long"))
    assert long.samples.shape == (1, 160_000) and long.rate == 16_000
    assert abs(np.abs(np.fft.rfft(long.samples[0])).argmax() / 10 - 440) < 0.2  # and sounds as high
    assert (tmp_path / "thumbnails/clip.webp").stat().st_size < 200_000


def test_what_came_after_the_commit_is_forgotten_with_the_media(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        for kind in OTHERS:
            folder.save_thumbnail(some(kind), f"iter_{iteration:06d}_row_{kind}")
    folder.save_thumbnail(film(), "evaluation_0_trained_1")
    folder.forget_after(1)
    left = {file.name for file in tmp_path.glob("thumbnails/*")}
    assert not any("iter_000002" in name for name in left) and len(left) == 2 * 3 + 2


# --- pages ------------------------------------------------------------------------------------------------------------


def playing(page: str) -> tuple[int, int]:
    """How many films and how many sounds a page plays."""
    return page.count("data:image/webp;base64,"), len(re.findall(r"<audio controls[^>]*data:audio/wav;base64,", page))


def test_the_report_plays_what_the_run_keeps(media_run: Path) -> None:
    page = write_report(media_run).read_text()
    films, sounds = playing(page)
    kind = kind_of(read_run(media_run).medium(next(iter(read_run(media_run).evaluation["thumbnail"]))))
    assert (sounds if kind == "sound" else films) >= 6 * 4 and 0 in (films, sounds)
    strips = page.count('<img class="strip" src="data:image/jpeg')
    assert strips == films and (kind != "sound" or page.count("data:image/png") == sounds)
    assert active_nodes(page) == [] and "media-src data:" in page
    assert page.count('alt="trained policy: a sharp picture of') >= 6
    if kind != "views":  # kept as films are
        assert write_report(media_run).read_text() == page


def test_a_report_of_pictures_plays_nothing(synthetic_run: Path) -> None:
    page = write_report(synthetic_run).read_text()
    assert playing(page) == (0, 0) and 'class="played' not in page and 'class="strip"' not in page


def test_hostile_prompts_stay_text_beside_media(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script><audio src=https://evil.example/x.wav onplay=alert(2)>'
    for kind in OTHERS:
        assert active_nodes(as_html(some(kind), hostile)) == []


FROM_ELSEWHERE = "<audio controls autoplay src='https://evil.example/x.wav' onplay='alert(1)'></audio>"


def assert_plays_only_what_it_holds() -> None:
    own = clean_html(as_html(tone(), "a tone"))
    assert playing(own) == (0, 1) and active_nodes(own) == []
    far = clean_html(f"<p>{FROM_ELSEWHERE}<audio src='data:text/html,x'></audio></p>")
    assert active_nodes(far) == [] and "evil" not in far and "autoplay" not in far


def test_a_notebooks_page_plays_only_what_it_holds() -> None:
    assert_plays_only_what_it_holds()


def test_a_cleaner_that_lets_any_sound_through_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SOUND", re.compile(".*"))
    with pytest.raises(AssertionError):
        assert_plays_only_what_it_holds()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_group_in_a_notebook_plays_its_samples(kind: str) -> None:
    samples = [(some(kind), "one <b>"), (None, "two"), (some(kind), "three")]
    shown = group_table("a tone", samples, [0.1, float("nan"), 0.3], [-1.0, 0.0, 1.0])
    assert sum(playing(shown)) == 2 and "no picture" in shown
    assert active_nodes(shown) == [] and "3px dashed" in shown and "3px solid" in shown


# --- widgets and figures ----------------------------------------------------------------------------------------------


def test_widgets_show_the_media_and_the_explorer_plays_them(media_run: Path) -> None:
    explorer = show.GroupExplorer(media_run)
    assert sum(playing(explorer.players.value)) == len(explorer.group) == 4
    assert active_nodes(explorer.players.value) == []
    first = explorer.players.value
    explorer.order.value = "sample"
    assert explorer.players.value != first or explorer.group["reward"].is_monotonic_decreasing
    assert show.ImageCompare(media_run).figures()[0].to_png()


def test_an_explorer_of_pictures_plays_nothing(synthetic_run: Path) -> None:
    assert sum(playing(show.GroupExplorer(synthetic_run).players.value)) == 0


def test_a_film_is_drawn_as_rows_of_its_pictures() -> None:
    sheet = thumbnail(film(), columns=3)
    assert sheet.size == (98, 65)
    first, last = (np.asarray(sheet.crop((left, top, left + 32, top + 32))) for left, top in ((0, 0), (66, 33)))
    assert not np.array_equal(first, last) and np.asarray(sheet)[32].min() == 255
    shown = show.group_figure([film(), tone(), None], ["a", "b", "c"], [0.1, 0.2, np.nan], [-1, 1, 0], "p")
    assert len(shown.to_png()) > 1000
    assert show.image_grid([film(), Views(tuple(film().pictures)), tone()]).to_png()


# --- mirrors ----------------------------------------------------------------------------------------------------------


def mirrored(run: Path, key: str, value: object) -> None:
    settings = {"tracking_settings.wandb": "disabled", key: value}
    with Tracker(load_config("tiny", settings), run) as tracker:
        tracker.log_samples(24)


def test_tensorboard_plays_the_group(media_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirrored(media_run, "tracking_settings.tensorboard", True)
    events = EventAccumulator(str(media_run / "tensorboard")).Reload()
    if any(media_run.glob("thumbnails/*.wav")):
        (heard,) = events.Audio("train/samples/0")
        assert heard.sample_rate == 8000 and heard.encoded_audio_string.startswith(b"RIFF")
    else:
        (seen,) = events.Images("train/samples/0")
        with Image.open(io.BytesIO(seen.encoded_image_string)) as shown:
            assert shown.format == "GIF" and shown.n_frames == 9 and shown.size == (32, 32)


def test_wandb_gets_films_and_sounds(media_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirrored(media_run, "tracking_settings.wandb", "offline")
    assert not [one for one in caplog.records if one.levelname == "WARNING"]  # a mirror that fails is one
    sent = [file for file in (media_run / "wandb").rglob("media/**/*.*") if file.suffix in (".gif", ".wav")]
    assert len(sent) == 4 and len({file.suffix for file in sent}) == 1
