"""`holdfast` in processes of its own: each is cheap, forked from a server that has imported it."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = float(os.environ.get("HOLDFAST_TEST_PATIENCE", "200"))  # seconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["holdfast.runner.learn", "transformers.trainer", "peft", "accelerate"])


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    `code` is its exit status, or minus the signal that killed it; `most` is the most memory that it had, in
    bytes (0 where it was killed).
    """

    code: int
    out: str
    err: str
    most: int = 0


def holdfast(
    *arguments: Any, cwd: Path, die: tuple[str, int] | None = None, after: float | None = None
) -> Ended:
    """Run the command line in a process of its own.

    Parameters
    ----------
    die : (str, int), optional
        A function of a module and the number of a call to it: there the process gets SIGKILL, before the
        function does anything.
    after : float, optional
        Seconds after which it gets SIGKILL from outside, wherever it is.
    """
    out, err, most = cwd / ".stdout", cwd / ".stderr", cwd / ".most"
    arguments = tuple(str(argument) for argument in arguments)
    process = SERVER.Process(
        target=_main, args=(arguments, str(cwd), str(out), str(err), die, None, None, most)
    )
    process.start()
    process.join(timeout=200 if after is None else after)
    if after is not None and process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None, "it hangs"
    told, told_err, peak = (file.read_text() if file.exists() else "" for file in (out, err, most))
    for file in (out, err, most):
        file.unlink(missing_ok=True)
    return Ended(process.exitcode, told, told_err, int(peak or 0))


def started(*arguments: Any, cwd: Path, out: Path, err: Path) -> Any:
    """Start the command line in a process of its own, which writes what it says to two files."""
    arguments = tuple(str(argument) for argument in arguments)
    process = SERVER.Process(target=_main, args=(arguments, str(cwd), str(out), str(err), None))
    process.start()
    return process


def launched(
    ranks: int,
    target: Any,
    arguments: Sequence[Any],
    cwd: Path,
    die: dict[int, tuple[str, int]] | None = None,
) -> Callable[[], list[Ended]]:
    """Call a function in several processes that find each other as a launcher's do.

    Parameters
    ----------
    target : callable
        A function of a module; it gets `arguments` in each process. None: the command line.
    die : dict of int to (str, int)
        Of a rank: as in `holdfast`.

    Returns
    -------
    callable
        Waits for them, and tells how each ended, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        out, err = cwd / f".stdout{rank}", cwd / f".stderr{rank}"
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in values.items()}
        call = (tuple(arguments), str(cwd), str(out), str(err), (die or {}).get(rank), environment, target)
        process = SERVER.Process(target=_main, args=call)
        process.start()
        processes.append((process, out, err))

    def ended() -> list[Ended]:
        found = []
        for process, out, err in processes:
            process.join(timeout=PATIENCE)
            assert process.exitcode is not None, "it hangs"
            found.append(Ended(process.exitcode, out.read_text(), err.read_text()))
        return found

    return ended


def _main(
    arguments: tuple[Any, ...],
    cwd: str,
    out: str,
    err: str,
    die: tuple[str, int] | None,
    environment: dict[str, str] | None = None,
    target: Any = None,
    most: Path | None = None,
) -> None:
    gc.freeze()  # each training collects garbage, and would look at every object of torch
    os.fsync = os.fstat  # these processes are killed, not the power
    os.chdir(cwd)
    os.environ.update(environment or {})
    for file, number in ((out, 1), (err, 2)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["holdfast", *map(str, arguments)]
    os.environ["COLUMNS"] = "80"
    import torch

    torch.set_num_threads(1)
    if die is not None:
        _kill_in(*die)
    if target is not None:
        target(*arguments)
        return
    from holdfast.cli import app

    try:
        app()
    finally:
        if most is not None:
            most.write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _kill_in(target: str, call: int) -> None:
    module, name = target.rsplit(".", 1)
    owner, calls = importlib.import_module(module), [0]
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)
