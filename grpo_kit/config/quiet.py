"""Other libraries' progress bars and notes: off while the kit loads, draws or scores, and then as they were found."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_LIBRARIES = r"(torch|torchvision|transformers|diffusers|peft|accelerate|huggingface_hub|open_clip|timm)\b"
_LOCK = threading.Lock()
_INSIDE: list[ExitStack] = []  # one for each call that is in it: drawing and scoring may run at the same time


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, diffusers and the hub but for errors, as far as they are loaded; a decorator too.

    Inside of another one it costs nothing; else about a millisecond, since logging forgets what each logger shows.
    """
    with _LOCK:
        _INSIDE.append(_silenced() if not _INSIDE else _INSIDE[-1])
    try:
        yield
    finally:
        with _LOCK:
            restoring = _INSIDE.pop()
            if not _INSIDE:
                restoring.close()


@contextmanager
def loading_quietly() -> Iterator[None]:
    """`quiet_libraries`, and their own deprecation warnings too, which their users' users cannot act on."""
    with quiet_libraries(), warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)
        yield


def _silenced() -> ExitStack:
    """Switch them off; what switches them on again, in the opposite order."""
    names = ("huggingface_hub.utils", "diffusers.utils.logging", "transformers.utils.logging")
    hub, *libraries = (sys.modules.get(name) for name in names)
    restoring = ExitStack()
    if hub is not None and hub.are_progress_bars_disabled():
        restoring.callback(hub.disable_progress_bars)  # transformers switches the hub's on with its own
    for library in filter(None, libraries):
        restoring.callback(library.set_verbosity, library.get_verbosity())
        if library.is_progress_bar_enabled():
            restoring.callback(library.enable_progress_bar)
        library.set_verbosity_error()
        library.disable_progress_bar()
    return restoring
