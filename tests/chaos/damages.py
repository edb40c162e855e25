"""R7: damaged checkpoints: found, named, and the run goes on from the one before."""

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo_kit.runs.checkpoint import load_latest
from grpo_kit.runs.folder import decisive_settings
from tests.chaos import Outcome, fault
from tests.chaos.experiment import experiment, quick_config, reference, run_through, scratch
from tests.chaos.kills import through

NEWEST, OLDER = "iter_000002", "iter_000001"
_ACTED_OUT = 30  # every so many damages, the run is continued and compared


@fault("R7", "damaged checkpoints")
def damages(short: bool) -> Outcome:
    """300 of them, most of them one bit that is another; in the short form one of every kind."""
    rng, outcome = random.Random(0), Outcome(0)
    with scratch() as place:
        run, other, expected = runs(place)
        kinds = list(dict.fromkeys(KINDS)) if short else KINDS * (300 // len(KINDS))
        for number, damage in enumerate(kinds):
            acted_out = number == 0 if short else number % _ACTED_OUT == 0
            outcome += one_damage(run, other, place / f"damaged_{number}", damage, rng, expected if acted_out else None)
    return outcome


def runs(place: Path) -> tuple[Path, Path, dict[str, str]]:
    """A run that keeps three checkpoints, one from another seed, and what the first one left."""
    kit = experiment(num_iterations=2, keep_checkpoints=3)
    expected = reference(kit, place / "run")
    reference(experiment(num_iterations=2, keep_checkpoints=3, seed=1), place / "other")
    return place / "run", place / "other", expected


def one_damage(
    run: Path, other: Path, folder: Path, damage: "Damage", rng: random.Random, expected: dict[str, str] | None
) -> Outcome:
    """Damage the newest checkpoint of a copy, load, and, where `expected` is given, let the run go on and compare."""
    shutil.copytree(run, folder, copy_function=os.link if expected is None else shutil.copy2)
    place = folder / "checkpoints" / NEWEST
    file = rng.choice(sorted(file for file in place.rglob("*") if file.is_file())).relative_to(place)
    damage(place, file, other / "checkpoints" / NEWEST, rng)
    with warnings_of("grpo_kit.runs.checkpoint") as told:
        found = load_latest(folder / "checkpoints", decisive_settings(quick_config().to_dict()))
    what = f"{damage.__name__}, {file}"
    outcome = Outcome(1)
    if found is None or found.iteration != 1 or not any(NEWEST in line for line in told):
        outcome += Outcome(
            0, lost=1, remarks=(f"{what}: {'nothing' if found is None else found.iteration} was loaded",)
        )
    if expected is not None:
        ended = run_through(experiment(num_iterations=2, keep_checkpoints=3), folder)
        outcome += through(folder, ended.code, ended.text, expected)
    shutil.rmtree(folder)
    return outcome


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """The messages that a logger gives."""
    told: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


# --- damages to a checkpoint at `place`, mostly to its `file`; `other` is the same checkpoint of another run ----------

Damage = Callable[[Path, Path, Path, random.Random], None]


def _put(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)  # the copy's files are links to the run's own
    file.write_bytes(data)


def flipped(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """One bit is another."""
    data = bytearray((place / file).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _put(place / file, bytes(data))


def truncated(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The file ends too early."""
    data = (place / file).read_bytes()
    _put(place / file, data[: rng.randrange(len(data))])


def emptied(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The file has nothing in it."""
    _put(place / file, b"")


def missing(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The file is not there."""
    (place / file).unlink()


def foreign(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """Another file has its name, of its size."""
    _put(place / file, rng.randbytes((place / file).stat().st_size))


def of_another_iteration(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The file is the one of the iteration before; where that is no damage, the folder is."""
    data = (place.with_name(OLDER) / file).read_bytes()
    if data == (place / file).read_bytes():
        whole_other_iteration(place, file, other, rng)
    else:
        _put(place / file, data)


def of_another_run(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The file is another run's; where that is no damage, the folder is."""
    data = (other / file).read_bytes()
    if data == (place / file).read_bytes():
        whole_other_run(place, file, other, rng)
    else:
        _put(place / file, data)


def whole_other_iteration(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The whole checkpoint is the one of the iteration before."""
    shutil.rmtree(place)
    shutil.copytree(place.with_name(OLDER), place)


def whole_other_run(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The whole checkpoint is another run's."""
    shutil.rmtree(place)
    shutil.copytree(other, place)


def without_anything(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """The folder is there, and nothing in it."""
    shutil.rmtree(place)
    place.mkdir()


def no_folder(place: Path, file: Path, other: Path, rng: random.Random) -> None:
    """A file has the folder's name."""
    shutil.rmtree(place)
    place.write_bytes(b"checkpoint")


KINDS: tuple[Damage, ...] = (
    flipped, of_another_iteration, flipped, truncated, flipped, missing, flipped, emptied, flipped, foreign, flipped,
    of_another_run, flipped, whole_other_iteration, flipped, whole_other_run, flipped, without_anything, flipped,
    no_folder,
)  # fmt: skip


# --- why hashes -------------------------------------------------------------------------------------------------------


def noticed_by_loaders(file: Path, flips: int, seed: int = 0) -> dict[str, int]:
    """How many of so many flipped bits in a safetensors file's tensors safetensors and `torch.load` refuse to load."""
    rng, noticed = random.Random(seed), {"safetensors": 0, "torch": 0}
    with scratch() as place:
        torch.save(load_file(file), place / "torch")
        for name, source in (("safetensors", file), ("torch", place / "torch")):
            whole = source.read_bytes()
            for _ in range(flips):
                data = bytearray(whole)
                data[rng.randrange(len(data) // 2, len(data) * 3 // 4)] ^= 1 << rng.randrange(8)  # no table is there
                (place / "flipped").write_bytes(data)
                noticed[name] += not _loads(name, place / "flipped")
    return noticed


def _loads(name: str, file: Path) -> bool:
    try:
        load_file(file) if name == "safetensors" else torch.load(file, weights_only=True)
    except (SafetensorError, RuntimeError):
        return False
    return True
