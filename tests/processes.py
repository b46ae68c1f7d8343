"""`holdfast` in processes of its own: each is cheap, forked from a server that has imported it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["holdfast.runner.learn", "transformers.trainer", "peft", "accelerate"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: `code` is its exit status, or minus the signal that killed it."""

    code: int
    out: str
    err: str


def holdfast(*arguments: Any, cwd: Path, die: tuple[str, int] | None = None) -> Ended:
    """Run the command line in a process of its own.

    Parameters
    ----------
    die : (str, int), optional
        A function of a module and the number of a call to it: there the process gets SIGKILL, before the
        function does anything.
    """
    out, err = cwd / ".stdout", cwd / ".stderr"
    arguments = tuple(str(argument) for argument in arguments)
    process = SERVER.Process(target=_main, args=(arguments, str(cwd), str(out), str(err), die))
    process.start()
    process.join(timeout=200)
    assert process.exitcode is not None, "it hangs"
    told = Ended(process.exitcode, out.read_text(), err.read_text())
    out.unlink()
    err.unlink()
    return told


def _main(arguments: tuple[str, ...], cwd: str, out: str, err: str, die: tuple[str, int] | None) -> None:
    os.chdir(cwd)
    for file, number in ((out, 1), (err, 2)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["holdfast", *arguments]
    os.environ["COLUMNS"] = "80"
    import torch

    torch.set_num_threads(1)
    if die is not None:
        _kill_in(*die)
    from holdfast.cli import app

    app()


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
