"""Progress that keeps what is said."""

from __future__ import annotations

from typing import Any

from holdfast.progress import Progress


class Noted(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str, /, *_: Any, **__: Any) -> None:
        self.said.append(text)

    def remark(self, text: str) -> None:
        self.say(text)
