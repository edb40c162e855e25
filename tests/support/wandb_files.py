"""Reading a .wandb file back."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

# wandb has no reader in Python any more; its own, which `wandb sync` runs, reads these files in test_wandb_sync.py.


def _frames(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log with wandb's header of 7 bytes, each checked against its checksum."""
    assert content[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # a block's end is filled up
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part = content[place + 7 : place + 7 + length]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        parts, place = [*parts, part], place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def records(part: Path) -> list:
    """What a part of a wandb run holds, as wandb's own message type."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = part.glob("*.wandb")
    return [Record.FromString(frame) for frame in _frames(file.read_bytes())]


def parts(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*"))
