"""What stays on disk of tasks that were learned long ago."""

from __future__ import annotations

from typing import Literal

from holdfast.folder import Folder

_WHOLE = 2  # tasks: the last one, and the one before it, from which a torn last one is learned again
_WHY = (
    "The weights, priors and states of this task were deleted once later ones had been learned "
    "(`keep: last`).\nWhat it scored and answered, and its records, are still here."
)


def is_heavy(file: str) -> bool:
    """Whether a file of a task, by its path there, is as large as a model."""
    return file.startswith("model/") or file.endswith(".safetensors")


def thin(folder: Folder, within: str, keep: Literal["all", "last"]) -> None:
    """Delete what `keep` doesn't keep of the tasks in a sub-folder, and what a kill has left of that."""
    for part in folder.parts(within)[:-_WHOLE] if keep == "last" else ():
        folder.thin(part, is_heavy, _WHY)
