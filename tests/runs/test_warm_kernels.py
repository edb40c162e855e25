"""Kernels forked from a warm process behave as kernels that are started anew, and end with who started them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import nbformat
import psutil
import pytest

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.runs import kernels, warm_process
from grpo_kit.runs.notebooks import Planned, execute

pytestmark = pytest.mark.skipif(not kernels.can_fork(), reason="kernels are forked on Linux alone")

WAIT = 600.0  # seconds; a busy machine takes long

FACTS = """
import json, os, signal, subprocess, sys
facts = {
    "child": subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode,
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGCHLD, signal.SIGTERM)],
    "folder": os.getcwd(), "mark": os.environ.get("MARK"), "group": os.getpgid(0) == os.getpid(),
    "notebook": __import__("pandas").get_option("display.max_columns"), "input": os.read(0, 1).decode(),
    "name": __name__, "path": "" in sys.path, "frames": hasattr(sys, "ps1"),
}
print(json.dumps(facts))
"""


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple]:
    """A kernel and its client."""
    manager = kernels.WarmKernel()
    await manager.start_kernel(cwd=str(folder), env={**os.environ, "MARK": "mine"})
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=WAIT)
        yield manager, client
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def printed(client: object, code: str, begun: asyncio.Event | None = None) -> tuple[str, str]:
    """How a cell ended, and what it printed; `begun` is set with the first print."""
    texts: list[str] = []

    def keep(message: dict) -> None:
        if text := message["content"].get("text"):
            texts.append(text)
            if begun is not None:
                begun.set()

    reply = await client.execute_interactive(code, timeout=WAIT, output_hook=keep, stop_on_error=False)
    return reply["content"].get("ename", "ok"), "".join(texts)


async def facts(folder: Path) -> dict:
    async with started(folder) as (_, client):
        status, text = await printed(client, FACTS)
    assert status == "ok"
    return json.loads(text)


def test_a_forked_kernel_is_as_one_that_was_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = asyncio.run(facts(tmp_path))
    monkeypatch.setattr(kernels, "can_fork", lambda: False)
    assert forked == asyncio.run(facts(tmp_path))
    assert forked["child"] == 3 and forked["folder"] == str(tmp_path) and forked["mark"] == "mine"


def test_it_has_imported_what_takes_long_and_nothing_that_asks_where_it_is(tmp_path: Path) -> None:
    async def modules() -> str:
        async with started(tmp_path) as (_, client):
            return (await printed(client, "import sys; print(*sys.modules)"))[1]

    there = asyncio.run(modules()).split()
    assert set(warm_process.IMPORTED) <= set(there)
    assert not {"pandas", "matplotlib", "ipywidgets"} & set(there)


def test_a_cell_is_interrupted_and_the_kernel_goes_on(tmp_path: Path) -> None:
    async def interrupted() -> list[tuple[str, str]]:
        begun = asyncio.Event()
        async with started(tmp_path) as (manager, client):
            cell = asyncio.create_task(printed(client, "import time; print(1, flush=True); time.sleep(3600)", begun))
            await begun.wait()
            await manager.interrupt_kernel()
            return [await cell, await printed(client, "print(6 * 7)")]

    assert asyncio.run(interrupted()) == [("KeyboardInterrupt", "1\n"), ("ok", "42\n")]


@pytest.mark.parametrize("imported", ["", ", grpo_kit"], ids=["plain", "warm"])
def test_a_kernel_that_dies_is_noticed(imported: str, tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(f"import os, signal{imported}; os.kill(os.getpid(), signal.SIGKILL)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_small.ipynb")
    done = execute(Planned(tmp_path / "00_small.ipynb", {}), tmp_path / "out")
    assert done.died and "kernel died" in done.error


@pytest.mark.slow
def test_where_the_warm_process_dies_kernels_are_started_anew_and_later_ones_forked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def parent() -> str:
        async with started(tmp_path) as (manager, client):
            assert await printed(client, "print(6 * 7)") == ("ok", "42\n")
            return " ".join(psutil.Process(manager.provisioner.pid).parent().cmdline())

    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.stdin.readline()")
    monkeypatch.setattr(kernels, "_warm_process", cache(kernels._warm_process.__wrapped__))
    with monkeypatch.context() as patched:
        patched.setattr(kernels.warm_process, "__file__", str(broken))
        assert not {"broken.py", "quick.py"} & {Path(word).name for word in asyncio.run(parent()).split()}
    monkeypatch.setattr(kernels.warm_process, "__file__", str(quick(tmp_path)))
    assert "quick.py" in asyncio.run(parent())
    kernels._warm_process().communicate()  # it ends with its standard input


def quick(folder: Path) -> Path:
    """The warm process, which here has not imported what takes long."""
    script = folder / "quick.py"
    lines = f"import sys; sys.path.insert(0, {str(PROJECT_ROOT)!r})", "from grpo_kit.runs import warm_process as warm"
    script.write_text("\n".join([*lines, "warm.IMPORTED = ()", "warm.serve()"]))
    return script


STARTER = """
import asyncio, sys, time
from grpo_kit.runs import kernels
async def main():
    manager = kernels.WarmKernel()
    await manager.start_kernel()
    print(manager.provisioner.pid, flush=True)
asyncio.run(main())
time.sleep(3600)
"""


@pytest.mark.slow
def test_kernel_and_warm_process_end_with_who_started_them_even_by_a_kill() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    kernel = psutil.Process(int(starter.stdout.readline()))
    warm = kernel.parent()
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    gone, alive = psutil.wait_procs([kernel, warm], timeout=WAIT)
    assert len(gone) == 2 and not alive


def test_a_signal_for_a_kernel_that_has_ended_is_none() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    kernel = object.__new__(kernels.ForkedKernel)
    kernel._descriptor = os.pidfd_open(ended.pid)
    ended.wait()
    kernel.send_signal(signal.SIGTERM)  # jupyter_client sends one to a kernel that takes long to end
    assert kernel.poll() == 0


@pytest.mark.parametrize(("source", "forked"), [("import math", 0), ("import grpo_kit as gk", 1)])
def test_only_a_notebook_that_imports_the_kit_gets_a_warm_kernel(
    source: str, forked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun, kernel = [], kernels.ForkedKernel
    monkeypatch.setattr(kernels, "ForkedKernel", lambda *given: begun.append(given) or kernel(*given))
    path = tmp_path / "00_some.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    assert execute(Planned(path, {}), tmp_path / "out").error is None
    assert len(begun) == forked
