"""What the playgrounds of the site show of recorded runs."""

from pathlib import Path


def write_playgrounds(pages: Path, source: Path, extra: Path) -> None:
    """Write them."""
    for p in pages.glob("*.html"):
        (source).mkdir(parents=True, exist_ok=True)
        (source / p.name).write_bytes(p.read_bytes())
