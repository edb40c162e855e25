"""Code of the user's own, found as `path/to/file.py:function` or `package.module:function`, and what is known of it."""

import hashlib
import importlib
import inspect
import linecache
import operator
import sys
import textwrap
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_kit.config.errors import KitError, nearest, one_line
from grpo_kit.config.paths import inside_project

_INSTALLED = {"site-packages", "dist-packages"}


def imported(place: str) -> Any:
    """The function, class or object at a place; modules are looked for in the working folder, too.

    A file is run as it is now, each content of it once in a process; modules beside it can be imported. A `KitError`
    says what of the place names nothing, or what its code raised.
    """
    home, _, name = place.rpartition(":")
    if not home or not name:
        allowed = "module:function, such as grpo_kit.grpo:grpo_loss, or path/to/file.py:function"
        raise KitError(f"function {place!r:.200}: allowed: {allowed}")
    module = _module(home)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(name, there)
        raise KitError(f"function {place!r:.200}: found no function {name!r:.60} in {home:.200}{hint}") from None


def _module(home: str) -> ModuleType:
    is_file = home.endswith(".py")
    try:
        source = Path(home).read_bytes() if is_file else b""
    except OSError as error:
        raise KitError(f"file {home:.200}: cannot be read: {error.strerror}. Put it back, or name its place") from None
    folder = str(Path(home).parent.resolve() if is_file else Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return _executed(Path(home), source) if is_file else importlib.import_module(home)
    except (Exception, SystemExit) as error:  # whatever foreign code does while it is imported
        what, why = f"{'file' if is_file else 'module'} {home!r:.200}", f"{type(error).__name__}: {error}"
        raise KitError(f"{what}: cannot be imported: {one_line(why, 300)}") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for later imports; last, so that no file of the user's hides a library


@lru_cache(maxsize=64)
def _executed(path: Path, source: bytes) -> ModuleType:
    """A file's content as a module; no bytecode, which may be that of an older content."""
    module = ModuleType(f"{path.stem}_{_digest(str(path).encode() + source)[:8]}")
    module.__file__, sys.modules[module.__name__] = str(path), module
    exec(compile(source, path, "exec"), vars(module))
    return module


def origin(thing: object) -> dict[str, Any]:
    """What a function or object is called, its file and the sha256 of its source, as far as these can be found."""
    while isinstance(thing, partial) or hasattr(thing, "__wrapped__"):
        thing = thing.func if isinstance(thing, partial) else thing.__wrapped__
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    if str(thing.__module__).partition(".")[0] == "grpo_kit":  # the version says the rest
        return {"function": f"{thing.__module__}.{thing.__qualname__}"}
    found = {"function": thing.__qualname__}
    linecache.checkcache()
    with suppress(OSError, TypeError):  # what has no source: a built-in, a class of a notebook
        file = Path(inspect.getsourcefile(thing) or "")
        found |= {"file": inside_project("", str(file))} if file.is_file() else {}
        found["sha256"] = _digest(textwrap.dedent(inspect.getsource(thing)).strip().encode())
    return found


def files_behind(place: str) -> dict[str, str]:
    """Name → sha256 of the file at a place and of the modules beside and below it that it imports."""
    home = place.rpartition(":")[0]
    module = _module(home)
    if not getattr(module, "__file__", None):
        return {}
    top = sys.modules.get(home.partition(".")[0], module)
    first = Path(module.__file__).resolve()
    folder = Path(top.__file__).resolve().parent if getattr(top, "__file__", None) else first.parent
    found, open_modules = {first: module}, [module]
    while open_modules:
        for value in list(vars(open_modules.pop()).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            file = Path(getattr(other, "__file__", None) or "/").resolve()
            is_foreign = _INSTALLED & set(file.relative_to(folder).parts) if file.is_relative_to(folder) else True
            if not is_foreign and file not in found and file.is_file() and name.partition(".")[0] != "grpo_kit":
                found[file] = other
                open_modules.append(other)
    return {file.relative_to(folder).as_posix(): _digest(file.read_bytes()) for file in sorted(found)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
