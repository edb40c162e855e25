"""The pictures that come with a prompt: looked at when the file is read, opened when they are needed."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_kit.config.errors import ConfigError, KitError, one_line, printable, shown

if TYPE_CHECKING:
    from PIL import Image

Picture = Path | bytes  # a file, or its content
KEYS = ("image", "images")  # of a row: one picture, or a list
MAX_PIXELS = 64_000_000  # PIL warns beyond 89 million
_KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # not EPS, say, which starts another program


def take_pictures(
    record: dict[str, Any], folder: Path, where: str, known: dict[Picture, Picture]
) -> tuple[Picture, ...]:
    """Take `image` or `images` out of a prompt's row: none, or pictures that can be decoded.

    A picture is a path, which counts from `folder`; in a table also bytes, or `{"bytes": …, "path": …}`, the form of
    `datasets`.

    Args:
        where: the row, for errors.
        known: pictures that were decoded before; new ones are added.
    """
    given = {key: value for key in KEYS if (value := record.pop(key, None)) is not None}
    if len(given) > 1:
        raise ConfigError(f"{where}: found both image and images, allowed: one of them. Put all into images")
    if "images" in given and not isinstance(given["images"], list):
        found = shown(given["images"])
        raise ConfigError(f"{where}: images: found {found}, allowed: a list of pictures. Call a single one image")
    pictures = []
    for key, value in given.items():
        for one in value if key == "images" else [value]:
            picture = _named(one, folder, f"{where}: {key}")
            if picture not in known:
                open_picture(picture, f"{where}: {key}", quick=True)
            pictures.append(known.setdefault(picture, picture))
    return tuple(pictures)


def _named(value: object, folder: Path, where: str) -> Picture:
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return folder / value
    allowed = 'a path such as "cat.png", in a parquet file also bytes'
    raise ConfigError(f"{where}: found {shown(value)}, allowed: {allowed}. Write one, or null for no picture")


def open_picture(picture: Picture, where: str, quick: bool = False) -> "Image.Image":
    """A picture in RGB and upright, over white where it is transparent, of an animation the first frame.

    Args:
        where: the place for a `ConfigError`, where it is missing, no picture, broken or too large.
        quick: decode it all, but give a JPEG smaller, since it is only looked at.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = f"{len(picture):,} bytes" if isinstance(picture, bytes) else f"'{printable(str(picture))}'"
    advice = f"allowed: a file in one of {', '.join(_KINDS)}. Correct the path, or copy or convert the picture again"
    large = f"{where}: found {name} of %s pixels, allowed: {MAX_PIXELS:,}. Make the picture smaller"
    try:
        if isinstance(picture, Path) and not picture.is_file():
            raise ConfigError(f"{where}: found {name}, where there is no file, {advice}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of large files and odd metadata
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=_KINDS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ConfigError(large % f"{image.width:,} x {image.height:,}")
                if quick:
                    image.draft(None, (1, 1))
                image.load()
                return _in_rgb(ImageOps.exif_transpose(image))
    except KitError:
        raise
    except Image.DecompressionBombError:  # PIL's own bound comes first
        raise ConfigError(large % "very many") from None
    except UnidentifiedImageError:
        what = "no picture" if picture and (isinstance(picture, bytes) or picture.stat().st_size) else "empty"
        raise ConfigError(f"{where}: found {name}, which is {what}, {advice}") from None
    except Exception as error:  # decoders raise many kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 80)
        raise ConfigError(f"{where}: found {name}, which cannot be read ({reason}), {advice}") from None


def _in_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError("its numbers of 32 bits have no known range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")
