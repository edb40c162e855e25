"""`python -m tests.chaos`: try the faults, print the table; exit code 1 where something was lost."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process with more threads cannot be forked

import argparse
import sys
import time
from collections.abc import Sequence

from tests.chaos import Fault, Outcome, every_fault, table
from tests.chaos.twins import escaped


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults that are named, all where none is; returns the exit code."""
    known = {one.name: one for one in every_fault()}
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults, each tried for real.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(known)}; all when left out")
    parser.add_argument("--short", action="store_true", help="a few tries of each")
    parser.add_argument(
        "--broken",
        action="store_true",
        help="show that broken versions of the kit are caught; alone, or before the faults that are named",
    )
    given = parser.parse_args(arguments)
    unknown = [name for name in given.faults if name not in known]
    if unknown:
        parser.error(f"fault {unknown[0]!r:.40}: allowed: {', '.join(known)}")
    missed = escaped() if given.broken else []
    if given.broken and not given.faults:
        return int(bool(missed))
    rows = [_try(known[name], given.short) for name in known if name in (given.faults or known)]
    print(table(rows))
    return int(bool(missed) or not all(outcome.withstood for _, outcome in rows))


def _try(one: Fault, short: bool) -> tuple[Fault, Outcome]:
    started = time.monotonic()
    outcome = one.run(short)
    print(f"{one.name}: {outcome.tried} tried in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return one, outcome


if __name__ == "__main__":
    sys.exit(main())
