"""A card beside each model's weights: how it was made, what it can do, what it is good for, and its files' hashes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from grpo_kit.config.hardware import library_versions
from grpo_kit.models.generator import Generator
from grpo_kit.runs.checkpoint import sha256
from grpo_kit.shapeworld.captions import oracle_caption
from grpo_kit.shapeworld.scene import Scene
from grpo_kit.show.images import image_grid

_SHEET = "contact_sheet.png"
_PURPOSE = {
    "policy": (
        "Qwen2_5_VLForConditionalGeneration, 0.8 M parameters: rewrites prompts of the embedded world, some well, some "
        "idly, some harmfully. It is the start of GRPO training.",
        "Any text outside the world's grammar; it knows about sixty words.",
    ),
    "policy_eyes": (
        "The policy, trained on: it rewrites with a picture beside the words (the same, an edit), and looks at the "
        "picture that its first rewrite gave before it writes again, or keeps it. It is the start of GRPO training.",
        "Any text outside the world's grammar, photographs, more than one picture in a turn.",
    ),
    "generator": (
        "StableDiffusion3Pipeline, 4.6 M parameters: draws 32 x 32 pictures of coloured shapes. Use guidance 1.0 to "
        "1.5 and about 8 steps; it works with its T5 encoder and without it (text_encoder_3=None, "
        "max_sequence_length=0).",
        "Anything but the world's shapes; users' words (crimson, ball …) mean nothing to it, on purpose.",
    ),
    "clip": (
        "open_clip CLIP (ModifiedResNet), 1.6 M parameters: scores a picture against a caption of either dialect.",
        "Photographs; captions over 24 tokens.",
    ),
    "moving_generator": (
        "WanPipeline, 1.3 M parameters: draws films of 9 frames of 32 x 32, one coloured shape that moves. Use "
        "guidance 1.0, about 8 steps and max_sequence_length 24.",
        "Anything else; users' words (crimson, leftwards …) mean nothing to it, on purpose.",
    ),
    "moving_xclip": (
        "XCLIPModel, 0.6 M parameters: scores five frames of a film against a caption of either dialect.",
        "Videos of anything but moving shapes; captions over 24 tokens.",
    ),
    "moving_policy": (
        "Qwen2_5_VLForConditionalGeneration, 0.8 M parameters: rewrites prompts of the world of films, some well, some "
        "idly, some harmfully. It is the start of GRPO training. Its vision tower is untrained.",
        "Any text outside the world's grammar; pictures.",
    ),
    "tones_generator": (
        "StableAudioPipeline, 0.9 M parameters: one second of sound at 8 kHz, one tone. Use guidance 1.0 and 10 steps.",
        "Anything but the world's tones; users' words (hum, piercing …) mean nothing to it, on purpose.",
    ),
    "tones_clap": (
        "ClapModel, 0.4 M parameters: scores a second of sound at 8 kHz against a caption of either dialect.",
        "Speech, music, sounds of another rate; captions over 24 tokens.",
    ),
    "tones_policy": (
        "Qwen2_5_VLForConditionalGeneration, 0.8 M parameters: rewrites prompts of the world of tones, some well, some "
        "idly, some harmfully. It is the start of GRPO training. Its vision tower is untrained.",
        "Any text outside the world's grammar; pictures.",
    ),
}


def emptied(folder: Path) -> Path:
    """The folder, made anew with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_card(folder: Path, name: str, *, command: str, seed: int, minutes: dict[str, float], metrics: dict) -> None:
    """Write `card.json` (read by `grpo-kit check`) and the same as a README for people."""
    good_for, not_for = _PURPOSE[name]
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("card.json", "README.md", _SHEET)
    ]
    card = {
        "name": name,
        "good_for": good_for,
        "not_good_for": not_for,
        "command": command,
        "seed": seed,
        "minutes_on_two_cores": {part: round(value, 1) for part, value in minutes.items()},
        "metrics": metrics,
        "versions": library_versions(),
        "sha256": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card), encoding="utf-8")


def contact_sheet(generator: Generator, scenes: Sequence[Scene], place: Path) -> None:
    """Draw scenes from their best captions, one picture each, and save them with the captions below."""
    captions = [oracle_caption(scene) for scene in scenes]
    images = generator.generate_images(captions, range(len(scenes)))
    image_grid([image or Image.new("RGB", (32, 32)) for image in images], captions, columns=8).save(place, dpi=80)


def _readme(card: dict) -> str:
    minutes = ", ".join(f"{part} {value}" for part, value in card["minutes_on_two_cores"].items())
    lines = [
        f"# The embedded world's {card['name']}",
        "",
        card["good_for"],
        "",
        f"**Not good for.** {card['not_good_for']}",
        "",
        f"Made by `{card['command']}` with seed {card['seed']}; minutes on two cores: {minutes}.",
        "Measured on held-out scenes:",
        "",
        "| what | share |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in _flat(card["metrics"]).items()),
        "",
        *([f"![Held-out scenes, drawn from their best captions]({_SHEET})", ""] if card["name"] == "generator" else []),
        "`card.json` has the same figures, the library versions and the sha256 of every file.",
    ]
    return "\n".join(lines) + "\n"


def _flat(metrics: dict, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
