"""The logging integrations of a Trainer (`report_to`): they are told what a task measured, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Reports:
    """TensorBoard, W&B, MLflow and the like, kept open until a task is measured; then they are closed.

    A Trainer tells them of its end before the task is rated and tested, and some (MLflow) would take what
    comes later for another run. So that word waits until `close`.

    Parameters
    ----------
    model, tokenizer
        What they may ask for at the end.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._kept: list[Any] = []
        self._ended: dict[int, tuple[Any, ...]] = {}

    def keep_open(self, trainer: Any) -> None:
        """Let the integrations of a trainer wait."""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        callbacks: list[Any] = trainer.callback_handler.callbacks
        for callback in callbacks:
            if isinstance(callback, kinds):
                waiting: Any = callback
                waiting.on_train_end = self._wait_of(len(self._kept))
                self._kept.append(waiting)

    def _wait_of(self, place: int) -> Any:
        def ended(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._ended[place] = (args, state, control)  # and no optimizer, whose memory the rating needs

        return ended

    @property
    def waiting(self) -> bool:
        """Whether any integration has seen a training end, and would log more."""
        return bool(self._ended)

    def log(self, figures: Mapping[str, float]) -> None:
        """Log figures at the last step of each training; those that begin with ``eval_`` become a group."""
        for place, at in self._ended.items():
            self._kept[place].on_log(*at, logs=dict(figures))

    def close(self) -> None:
        """Tell each of the end of its training, where it was told of none."""
        for place, callback in enumerate(self._kept):
            del callback.on_train_end
            if place in self._ended:
                callback.on_train_end(*self._ended[place], model=self.model, processing_class=self.tokenizer)
        self._kept, self._ended = [], {}

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
