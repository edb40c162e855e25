"""The small world of sounds: one tone of a second, in words, and read from its waveform by Fourier's sum.

Two dialects share one grammar, as in `captions`:

    generator:  a loud short high rising chirp, clear
    users:      a blaring brief piercing swoop
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

RATE, SAMPLES = 8000, 8000  # samples a second; a sound's length
KINDS = ("sine", "rising chirp", "falling chirp", "noise", "beats")
PITCHES = {"low": 240.0, "middle": 480.0, "high": 960.0}  # Hz, the middle of what sounds
LOUDNESSES = {"soft": 0.08, "loud": 0.25}  # root mean square while it sounds; full scale is 1
LENGTHS = {"short": 0.3, "long": 0.85}  # seconds
STYLE_WORDS = {"clean": ("clear", "pure"), "crackling": ("crackling", "distorted"), "rumbling": ("rumbling", "muffled")}
GOOD_WORDS = STYLE_WORDS["clean"]
HARMFUL_WORDS = (*STYLE_WORDS["crackling"], *STYLE_WORDS["rumbling"])
IDLE_WORDS = ("beautiful", "stereo", "masterpiece")  # in any sound's caption: they say nothing
USER_WORDS = {
    "sine": "hum", "rising chirp": "swoop", "falling chirp": "plunge", "noise": "hiss", "beats": "wobble",
    "low": "deep", "middle": "mellow", "high": "piercing",
    "soft": "faint", "loud": "blaring", "short": "brief", "long": "lasting",
}  # fmt: skip
# in the order in which they are said
VALUES = {"loudness": tuple(LOUDNESSES), "length": tuple(LENGTHS), "pitch": tuple(PITCHES), "kind": KINDS}


@dataclass(frozen=True)
class Tone:
    """What a sound is, or what a text states of it; None where it is left open."""

    kind: str
    pitch: str | None = None
    loudness: str | None = None
    length: str | None = None
    style: str | None = None

    def stated(self) -> dict[str, str]:
        """attribute → value of all that is stated."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


# --- words -----------------------------------------------------------------------------------------------------------


def describe(tone: Tone, dialect: float = 0.0, rng: random.Random | None = None) -> str:
    """The caption of what a tone states, without its style; `dialect` is the share of users' words (`rng` chooses)."""
    said = [getattr(tone, name) for name in VALUES if getattr(tone, name)]
    words = " ".join(USER_WORDS[word] if dialect and rng.random() < dialect else word for word in said)
    return f"a {words}"


def oracle_caption(request: Tone) -> str:
    """The best prompt for a request: all it states in the generator's words, the rest chosen well, clean."""
    loud, long, middle = request.loudness or "loud", request.length or "long", request.pitch or "middle"
    return f"{describe(replace(request, loudness=loud, length=long, pitch=middle))}, clear"


def _either(words: Iterable[str]) -> str:
    return "|".join(sorted((form for word in words for form in (word, USER_WORDS[word])), key=len, reverse=True))


_GENERATORS_WORD = {said: word for word, users in USER_WORDS.items() for said in (word, users)}
_HEAD = re.compile(
    r"(?:an? )?" + "".join(f"(?:(?P<{n}>{_either(v)}) )?" for n, v in VALUES.items() if n != "kind")
    + f"(?P<kind>{_either(KINDS)})"
)  # fmt: skip
_STYLE_OF = {word: style for style, words in STYLE_WORDS.items() for word in words}


def parse(text: str) -> Tone | None:
    """The tone that a caption of either dialect states, or None outside the grammar (contradictions, repetitions)."""
    head, *clauses = [clause.strip() for clause in text.lower().strip(" .").split(",")]
    match = _HEAD.fullmatch(head)
    if match is None or len(set(clauses)) != len(clauses) or set(clauses) - {*_STYLE_OF, *IDLE_WORDS}:
        return None
    styles = {_STYLE_OF[clause] for clause in clauses if clause in _STYLE_OF}
    if "clean" in styles and len(styles) > 1:
        return None
    stated = {name: _GENERATORS_WORD[said] for name, said in match.groupdict().items() if said}
    return Tone(**stated, style=min(styles, default=None))


# --- the check -------------------------------------------------------------------------------------------------------


def read(samples: np.ndarray, rate: int = RATE) -> Tone | None:
    """The tone that a waveform (n,) is, without any learned model; None where there is silence.

    Length and loudness come from the envelope, the pitch is the middle of the power spectrum, "clean" has less than
    15 % of its power elsewhere, and the kind is read from the analytic signal: its frequency's rise, its coherence
    after 20 ms once that rise is taken out, and the depth of its envelope.
    """
    samples = np.asarray(samples, float)
    frame = rate // 100
    levels = np.sqrt((samples[: len(samples) // frame * frame].reshape(-1, frame) ** 2).mean(1))
    sounding = np.flatnonzero(levels > 0.15 * levels.max(initial=0.0))
    if not len(sounding) or levels.max() < 1e-3:
        return None
    body = samples[sounding[0] * frame : (sounding[-1] + 1) * frame]
    spectrum = np.fft.fft(body)
    hertz = np.fft.fftfreq(len(body), 1 / rate)
    power = np.abs(spectrum) ** 2 * (hertz > 0)
    heard = np.where(hertz > 100, power, 0) if power[hertz > 100].sum() > 0.2 * power.sum() else power
    order = np.argsort(hertz)
    pitch = hertz[order][np.searchsorted(np.cumsum(heard[order]), heard.sum() / 2)]
    own = np.abs(np.log2(np.maximum(hertz, 1e-9) / pitch)) < 0.7
    outside = 1 - power[own].sum() / power.sum()
    rumbles = power[(hertz > 0) & (hertz <= 100) & ~own].sum() > 0.5 * outside * power.sum()
    return Tone(
        kind=_kind(np.fft.ifft(np.where(own, spectrum, 0)), rate),
        pitch=_nearest(PITCHES, pitch),
        loudness=_nearest(LOUDNESSES, float(np.sqrt(np.mean(body**2)))),
        length="short" if len(body) / rate < 0.6 else "long",
        style="clean" if outside < 0.15 else "rumbling" if rumbles else "crackling",
    )


def _nearest(values: dict[str, float], found: float) -> str:
    return min(values, key=lambda name: abs(np.log(max(found, 1e-9) / values[name])))


def _kind(wave: np.ndarray, rate: int) -> str:
    """The kind of an analytic signal (complex, (n,)), fades left out."""
    edge = rate // 50
    wave = wave[edge:-edge] if len(wave) > 4 * edge else wave
    pieces = np.array_split(wave[1:] * wave[:-1].conj(), 8)
    turns = np.maximum(np.array([np.angle(piece.sum()) for piece in pieces]), 1e-3)
    weights = np.array([np.abs(piece).sum() for piece in pieces]) + 1e-12
    slope, start = np.polyfit(np.linspace(1 / 16, 15 / 16, 8), np.log2(turns), 1, w=np.sqrt(weights))
    if abs(slope) > 0.45:
        return "rising chirp" if slope > 0 else "falling chirp"
    steady = wave * np.exp(-1j * np.cumsum(2 ** (start + slope * np.linspace(0, 1, len(wave)))))
    lag = rate // 50
    coherence = np.abs((steady[lag:] * steady[:-lag].conj()).sum()) / (np.abs(steady) ** 2).sum()
    if coherence < 0.45:
        return "noise"
    envelope = np.abs(wave)
    return "beats" if envelope.std() > 0.27 * envelope.mean() else "sine"


def check(sound: Any, request: Tone) -> dict[str, bool]:
    """Attribute → whether a sound (`config.media.Sound`) has it as asked: what is stated, and "clean", always asked."""
    found = read(sound.mono, sound.rate)
    asked = {name: value for name, value in request.stated().items() if name != "style"}
    result = {name: found is not None and getattr(found, name) == value for name, value in asked.items()}
    return {**result, "clean": found is not None and found.style == "clean"}
