"""What surrounds every command: errors in a few lines, ctrl-C, and quiet libraries."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from holdfast import world
from holdfast.errors import ConfigError, HoldfastError
from holdfast.progress import Interrupted, tell

console = Console(stderr=True)


@contextmanager
def told(again: str = "", processes: bool = False) -> Iterator[None]:
    """Errors made on purpose are told in a few lines; ctrl-C says how to continue.

    Parameters
    ----------
    processes : bool
        Whether a launcher may start the command in several processes.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _quiet_libraries()
        if world.launched() and not processes:
            raise ConfigError(
                "this command runs in one process, and a launcher started several; `holdfast run` and "
                "`holdfast learn` can be launched so. Start it without `accelerate launch`."
            )
        world.start()
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        detail = f"{stop} " if str(stop) else "Stopped. "
        if world.leads():
            tell(console, f"\n{detail}{again}", "yellow")
        raise typer.Exit(130) from stop
    except HoldfastError as error:
        tell(console, world.named_error(f"error: {error}"), "red")
        raise typer.Exit(2) from error
    except OSError as error:  # a file that may not be read, a disk that fails
        if error.errno == errno.EPIPE:  # of `| head`: not an error of ours
            raise
        where = f"{error.filename}: " if error.filename else ""
        tell(console, world.named_error(f"error: {where}{error.strerror or error}"), "red")
        raise typer.Exit(2) from error


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, by each process
    import warnings

    warnings.filterwarnings("ignore", module="(transformers|torch|trl|peft).*")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what would answer faster on a CPU
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
