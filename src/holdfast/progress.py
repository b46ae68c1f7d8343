"""Progress of long work: bars on a terminal, plain lines elsewhere, and a clean stop on ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from holdfast import world
from holdfast.errors import HoldfastError

_stop = threading.Event()


class Interrupted(HoldfastError):
    """The user asked to stop (ctrl-C); everything finished so far is on disk."""


def stop_requested() -> bool:
    """Whether ctrl-C was pressed inside `stoppable`."""
    return _stop.is_set()


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first ctrl-C into a request that work honours at its next step; the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: Any) -> None:
        if _stop.is_set():
            raise KeyboardInterrupt
        _stop.set()

    _stop.clear()
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        _stop.clear()


def _writable(console: Console, text: str) -> str:
    """What the stream can't write, such as half a character in a file's name, becomes an escape."""
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def tell(console: Console, text: str, style: str | None = None) -> None:
    """Print a text as it stands: no markup, no emoji codes, no line breaks of ours."""
    text = _writable(console, text)
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def no_library_bars() -> Iterator[None]:
    """No bars of transformers' own for the time of a block; what the user has set is untouched afterwards.

    Without it, models that are loaded and saved draw over the bars here, and in a quiet run on nothing.
    """
    from transformers.utils.logging import set_tqdm_hook

    previous = set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


class Bar:
    """One piece of work with a known number of steps."""

    def __init__(self, owner: Progress, description: str, total: int) -> None:
        description = _writable(owner.console, description)
        self._owner, self._description, self._total = owner, description, total
        self._done = 0
        self._started = self._said = time.monotonic()
        self._task = owner._rich.add_task(description, total=total, note="") if owner._rich else None

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set how many steps are done (the callback form that the engines take)."""
        if _stop.is_set():
            raise Interrupted("Stopped on request.")
        self.show(done, total, note)

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set how many steps are done without honouring a stop request (the caller does)."""
        self._done, self._total = done, total if total is not None else self._total
        if self._owner._rich is not None and self._task is not None:
            self._owner._rich.update(
                self._task, completed=done, total=self._total, note=_writable(self._owner.console, note)
            )
        elif time.monotonic() - self._said > self._owner.line_every:
            self._said = time.monotonic()
            self._owner.say(f"  {self._description}: {done}/{self._total} {note}")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._owner.say(text)

    def close(self) -> None:
        """Take the bar down; the time it took stays as a line where there is no terminal."""
        if self._owner._rich is not None and self._task is not None:
            self._owner._rich.remove_task(self._task)


class _Bars(RichProgress):
    """Bars below something else that changes."""

    above: Callable[[], RenderableType] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above()
        yield from super().get_renderables()


class Progress:
    """The bars of one command.

    Parameters
    ----------
    quiet : bool
        Show nothing at all (library use).
    """

    line_every = 20.0  # seconds between lines where there is no terminal

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        quiet = quiet or not world.leads()
        self.console = console or Console(file=sys.stderr, quiet=quiet)
        self._rich: _Bars | None = None
        self._quiet = quiet

    def __enter__(self) -> Progress:
        if not self._quiet and self.console.is_terminal:
            self._rich = _Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=self.console,
                transient=True,
            )
            self._rich.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._rich is not None:
            self._rich.__exit__(*exception)
            self._rich = None

    def say(self, text: str) -> None:
        """Print a line above the bars, as it is: names and paths may hold anything."""
        tell(self.console, text)

    def remark(self, text: str) -> None:
        """Say what nobody should miss: where nothing is shown (library use) it is a warning."""
        if not self._quiet:
            self.say(text)
        elif world.leads():
            warnings.warn(text, stacklevel=2)

    def show_above(self, picture: Callable[[], RenderableType] | None) -> None:
        """Keep what a function draws, such as a table, above the bars; on a terminal only. None ends it."""
        if self._rich is not None:
            self._rich.above = picture

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Bar]:
        """A bar for the time of a block."""
        bar = Bar(self, description, total)
        try:
            yield bar
        finally:
            bar.close()
