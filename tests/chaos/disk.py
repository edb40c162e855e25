"""What a process asks of the disk, operation by operation, and what would be left had it ended in between.

Operations are seen by an audit hook (open for writing, rename, remove, mkdir, rmdir), around `os.fsync`, and around
safetensors' own writing, which Python does not see. Only for a child: an audit hook cannot be taken off.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

_EVENTS = {"os.mkdir": 2, "os.rmdir": 1, "os.remove": 1, "os.truncate": None}  # where an argument names a folder's fd
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Disk:
    """The operations below `folder`; `before(number, operation, path)` is called before each, counted from 0."""

    folder: Path
    before: Callable[["Disk", int, str, Path], None]
    number: int = 0
    last: tuple[str, Path] | None = None  # the operation before
    flushed: dict[int, tuple[int, int]] = field(default_factory=dict)  # inode → size and time at its last fsync
    entries: dict[int, set[str]] = field(default_factory=dict)  # folder's inode → its names at its last fsync
    inside: bool = False

    def watch(self) -> None:
        """Take what is there as flushed, and see every operation from now on."""
        import safetensors.torch

        for place in (self.folder, *self.folder.rglob("*")):
            self._now_flushed(place)
        fsync, write = os.fsync, safetensors.torch.serialize_file

        def seen_fsync(descriptor: int) -> None:
            place = _path(descriptor)
            self._see("fsync", place)
            fsync(descriptor)
            if place.exists():
                self._now_flushed(place)

        def seen_write(tensors: object, name: object, *rest: object, **options: object) -> None:
            self._see("write", Path(name))
            write(tensors, name, *rest, **options)

        patch("os.fsync", seen_fsync).start()
        patch("safetensors.torch.serialize_file", seen_write).start()
        sys.addaudithook(self._audited)

    def _audited(self, event: str, arguments: tuple) -> None:
        if self.inside:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._see("open", _place(arguments[0]))
        elif event == "os.rename":
            self._see("rename", _place(arguments[1], arguments[3]))
        elif event in _EVENTS:
            at = _EVENTS[event]
            self._see(event.removeprefix("os."), _place(arguments[0], None if at is None else arguments[at]))

    def _see(self, operation: str, place: Path) -> None:
        if self.inside or self.folder not in place.parents or place.name == ".lock":
            return
        self.inside = True
        try:
            self.before(self, self.number, operation, place)
            if operation in ("open", "write", "remove") and place.exists() and not self._appends(place):
                self.flushed.pop(place.stat().st_ino, None)
        finally:
            self.inside = False
        self.number, self.last = self.number + 1, (operation, place)

    def _appends(self, place: Path) -> bool:
        return place.name in ("metrics.jsonl", "training.log")

    def _now_flushed(self, place: Path) -> None:
        state = place.stat()
        self.flushed[state.st_ino] = (state.st_size, state.st_mtime_ns)
        if place.is_dir():
            self.entries[state.st_ino] = set(os.listdir(place))

    def copy(self, target: Path) -> None:
        """What is on the disk now, elsewhere; big files that nothing changes in place are linked."""
        shutil.copytree(self.folder, target, copy_function=_link_or_copy)

    def tear(self, target: Path) -> bool:
        """Leave the file that the last operation wrote half written in a copy; False where it wrote none."""
        if self.last is None or self.last[0] not in ("open", "write") or not self.last[1].is_file():
            return False
        place = self.last[1]
        kept = self.flushed.get(place.stat().st_ino, (0, 0))[0] if self._appends(place) else 0
        _shorten(target / place.relative_to(self.folder), kept + max(0, place.stat().st_size - kept) // 2)
        return True

    def cut_power(self, target: Path, kept: float, entries: bool) -> None:
        """Lose in a copy what was written since the last fsync: of each file all but the share `kept`.

        Args:
            entries: whether a folder that was not flushed still has the names that came since.
        """
        for folder, folders, files in os.walk(self.folder):
            copied, known = target / Path(folder).relative_to(self.folder), self.entries.get(os.stat(folder).st_ino, ())
            for name in [*folders, *files]:
                if not entries and name not in known:
                    shutil.rmtree(copied / name) if name in folders else (copied / name).unlink()
                elif name in files:
                    self._cut(Path(folder, name), copied / name, kept)
            folders[:] = [name for name in folders if (copied / name).is_dir()]

    def _cut(self, place: Path, copied: Path, kept: float) -> None:
        state = place.stat()
        if self.flushed.get(state.st_ino) != (state.st_size, state.st_mtime_ns):
            safe = min(self.flushed.get(state.st_ino, (0, 0))[0], state.st_size)
            _shorten(copied, safe + int((state.st_size - safe) * kept))


def _link_or_copy(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def _shorten(file: Path, size: int) -> None:
    content = file.read_bytes()[:size]
    file.unlink()  # it may be a link
    file.write_bytes(content)


def _place(name: object, descriptor: object = None) -> Path:
    """An operation's path; one that is relative may be so to an open folder."""
    if isinstance(name, int):
        return _path(name)
    path = Path(os.fsdecode(name))
    if path.is_absolute():
        return path
    return (_path(descriptor) if isinstance(descriptor, int) and descriptor >= 0 else Path.cwd()) / path


def _path(descriptor: int) -> Path:
    """The file or folder behind an open descriptor."""
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
