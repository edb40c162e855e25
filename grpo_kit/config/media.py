"""What a generator gives: a picture of PIL's, or one of three other media. All that differs between them is here.

A medium has raw values, which decide whether two are the same; a thumbnail, a picture that stands for it where only
pictures are shown; and a small file, which a page plays without a script. The name `images` in rollouts and rewards
means media of the generator's kind.
"""

import base64
import hashlib
import html
import io
import wave
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageSequence

from grpo_kit.config.display import Html, Shown
from grpo_kit.config.errors import KitError

Kind = Literal["image", "video", "sound", "views"]
_STRIP = 6  # pictures of a thumbnail, at most
_SOUND = (192, 96)  # pixels of a sound's thumbnail: its waveform above, its spectrogram below
_WINDOW = 256  # samples of one column of the spectrogram
_KEPT_SIDE, _KEPT_SECONDS, _KEPT_RATE = 192, 10, 16_000  # of what a run and a page keep, at most
_SHOWN = 128  # pixels across at which a smaller one is shown
_EXACT = 64  # pixels of the longer side up to which a film's file is without loss
_FLOOR_DB = 60.0  # what is so much softer than the loudest is black
_SMALLEST_CONTRAST = 2 / 255  # values of 0 to 1 that differ by less show nothing


class _Playable(Shown):
    """What the three media share: HTML that plays."""

    def _repr_html_(self) -> str:
        return as_html(self, repr(self))


@dataclass(frozen=True, eq=False, repr=False)
class Video(_Playable):
    """Frames of one size, one after the other."""

    frames: np.ndarray  # (T, height, width, 3) uint8
    rate: float  # frames a second

    def _shown(self) -> dict[str, object]:
        count, height, width, _ = self.frames.shape
        return {"frames": count, "size": f"{width} x {height}", "rate": self.rate}

    @property
    def pictures(self) -> list[Image.Image]:
        """Its frames."""
        return list(map(Image.fromarray, self.frames))


@dataclass(frozen=True, eq=False, repr=False)
class Sound(_Playable):
    """A waveform."""

    samples: np.ndarray  # (channels, samples) float32, within -1 to 1
    rate: int  # samples a second

    def _shown(self) -> dict[str, object]:
        channels, count = self.samples.shape
        return {"seconds": count / self.rate, "rate": self.rate, "channels": channels}

    @property
    def mono(self) -> np.ndarray:
        """The mean of its channels, (samples,)."""
        return self.samples.mean(axis=0)


@dataclass(frozen=True, eq=False, repr=False)
class Views(_Playable):
    """One object, seen from several sides."""

    pictures: tuple[Image.Image, ...]

    def _shown(self) -> dict[str, object]:
        return {"views": len(self.pictures), "size": "{} x {}".format(*self.pictures[0].size)}


Medium = Image.Image | Video | Sound | Views
KINDS: dict[str, type] = {"image": Image.Image, "video": Video, "sound": Sound, "views": Views}
SUFFIXES = {"image": ".png", "video": ".webp", "sound": ".wav", "views": ".webp"}
_VIEWS_A_SECOND = 4.0  # at which a turning object is shown
_DESCRIPTION = 0x010E  # of EXIF: kind, pictures, rate


def kind_of(medium: object) -> Kind:
    """Which of the media it is; `KitError` for what is none."""
    for kind, one in KINDS.items():
        if isinstance(medium, one):
            return kind
    raise KitError(f"medium: found {type(medium).__name__}, allowed: a PIL picture, Video, Sound or Views")


def shows_something(values: np.ndarray) -> bool:
    """Whether values in [0, 1] (or [-1, 1]) are finite, some, and not all the same."""
    return bool(values.size and np.isfinite(values).all() and np.ptp(values) >= _SMALLEST_CONTRAST)


def digest(medium: Medium) -> str:
    """sha256 of its raw values, their shape, and its rate."""
    values = {"video": "frames", "sound": "samples"}.get(kind_of(medium))
    arrays = [getattr(medium, values)] if values else [np.asarray(one) for one in _pictures(medium)]
    found = hashlib.sha256(str(float(getattr(medium, "rate", 0))).encode())
    for array in arrays:
        found.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def thumbnail(medium: Medium, columns: int = _STRIP) -> Image.Image:
    """A picture that stands for it: itself; some frames or views, so many in a row; waveform and spectrogram."""
    if isinstance(medium, Image.Image):
        return medium
    if isinstance(medium, Sound):
        return _sound_picture(medium)
    pictures = _pictures(medium)
    places = np.linspace(0, len(pictures) - 1, min(_STRIP, len(pictures))).round().astype(int)
    some = [pictures[place] for place in places]
    width, height = some[0].size
    columns = min(columns, len(some))
    rows = -(-len(some) // columns)
    strip = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")  # a pixel between them
    for place, one in enumerate(some):
        strip.paste(one, (place % columns * (width + 1), place // columns * (height + 1)))
    return strip


def small(medium: Medium) -> Medium:
    """What a run and a page keep of it: 192 pixels at most; of a sound 10 seconds, above 16 kHz in mono at 16 kHz."""
    if isinstance(medium, Sound):
        samples = medium.samples[:, : _KEPT_SECONDS * medium.rate]
        if medium.rate <= _KEPT_RATE:
            return replace(medium, samples=samples)
        from scipy.signal import resample_poly

        mono = resample_poly(samples.mean(axis=0, keepdims=True), _KEPT_RATE, medium.rate, axis=1)
        return Sound(mono.astype(np.float32), _KEPT_RATE)
    pictures = [one.copy() for one in _pictures(medium)]
    for one in pictures:
        one.thumbnail((_KEPT_SIDE, _KEPT_SIDE))
    if isinstance(medium, Video):
        return replace(medium, frames=np.stack(list(map(np.asarray, pictures))))
    return Views(tuple(pictures)) if isinstance(medium, Views) else pictures[0]


def _pictures(medium: Medium) -> list[Image.Image]:
    return [medium] if isinstance(medium, Image.Image) else list(medium.pictures)


def _sound_picture(sound: Sound) -> Image.Image:
    """The waveform at its true height, and the strength of its frequencies, low ones at the bottom."""
    width, height = _SOUND
    samples = np.clip(sound.mono, -1, 1)
    part = np.array_split(samples, width)
    middle, rows = height // 2, np.arange(height)[:, None]
    low, high = (np.array([pick(one) if one.size else 0.0 for one in part]) for pick in (np.min, np.max))
    wave_rows = (rows >= middle * (1 - high)) & (rows <= np.maximum(middle * (1 - low), middle * (1 - high) + 1))
    window = np.hanning(_WINDOW)
    starts = np.linspace(0, max(len(samples) - _WINDOW, 0), width).astype(int)
    padded = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    powers = np.abs(np.fft.rfft(np.stack([padded[start : start + _WINDOW] * window for start in starts]))) ** 2
    decibels = 10 * np.log10(powers.T[::-1] / max(float(powers.max()), 1e-12) + 1e-12)
    levels = (np.clip(decibels / _FLOOR_DB + 1, 0, 1) * 255).astype(np.uint8)
    both = [Image.fromarray((~wave_rows * 255).astype(np.uint8)), Image.fromarray(levels).resize(_SOUND)]
    picture = Image.new("RGB", (width, 2 * height))
    for place, one in enumerate(both):
        picture.paste(one, (0, place * height))
    return picture


def file_bytes(medium: Medium) -> bytes:
    """The content of its file: PNG, animated WebP (without loss where it is small), WAV of 16 bits."""
    content = io.BytesIO()
    if isinstance(medium, Sound):
        with wave.open(content, "wb") as file:
            file.setnchannels(len(medium.samples))
            file.setsampwidth(2)
            file.setframerate(medium.rate)
            file.writeframes((np.clip(medium.samples, -1, 1).T * 32767).round().astype("<i2").tobytes())
    elif isinstance(medium, Image.Image):
        medium.save(content, "PNG")
    else:
        pictures, rate, note = medium.pictures, getattr(medium, "rate", _VIEWS_A_SECOND), Image.Exif()
        note[_DESCRIPTION] = f"{kind_of(medium)} {len(pictures)} {rate}"
        times = {"duration": round(1000 / rate), "loop": 0, "exif": note}
        quality = {"lossless": True} if max(pictures[0].size) <= _EXACT else {"quality": 80}
        pictures[0].save(content, "WEBP", save_all=True, append_images=pictures[1:], **quality, **times)
    return content.getvalue()


def save_medium(medium: Medium, place: Path) -> Path:
    """Write its file at a place without a suffix; returns the path with the one that is its kind's."""
    path = place.with_name(place.name + SUFFIXES[kind_of(medium)])
    path.write_bytes(file_bytes(medium))
    return path


def open_medium(path: Path) -> Medium:
    """Read what `save_medium` wrote."""
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            return Sound((values.T / 32767).astype(np.float32), file.getframerate())
    with Image.open(path) as image:
        kind, count, rate = (image.getexif().get(_DESCRIPTION) or "image 1 1").split()
        frames = []
        for frame in ImageSequence.Iterator(image):  # the format keeps equal ones that follow each other as one
            shown = frame.convert("RGB")
            frames += [shown] * max(1, round(frame.info.get("duration", 0) * float(rate) / 1000))
    frames = [*frames, *[frames[-1]] * (int(count) - len(frames))][: int(count)]
    if kind == "image":
        return frames[0]
    return Views(tuple(frames)) if kind == "views" else Video(np.stack(list(map(np.asarray, frames))), float(rate))


def as_html(medium: Medium, alt: str = "", width: str = "") -> Html:
    """The medium, small, inside a page: pictures and films as images, a sound as its picture above what plays it.

    `width` is one of CSS; without it a small one is shown 128 pixels wide.
    """
    alt, medium = html.escape(alt, quote=True), small(medium)
    shown = thumbnail(medium) if isinstance(medium, Sound) else medium
    kind = "png" if kind_of(shown) == "image" else "webp"
    pixels = _pictures(shown)[0].width
    look = "width:100%" + ";image-rendering:pixelated" * (pixels <= _EXACT)
    inner = f'<img alt="{alt}" style="{look}" src="data:image/{kind};base64,{_base64(shown)}">'
    if isinstance(medium, Sound):
        address = f"data:audio/wav;base64,{_base64(medium)}"
        inner += f'<audio controls preload="none" style="width:100%" aria-label="{alt}" src="{address}"></audio>'
    return Html(f'<div style="width:{width or f"{max(pixels, _SHOWN)}px"};max-width:100%">{inner}</div>')


def _base64(medium: Medium) -> str:
    return base64.b64encode(file_bytes(medium)).decode("ascii")
