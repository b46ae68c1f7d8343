"""The run directory: a folder of stages that belongs to one configuration, or to a longer one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast import world
from holdfast.config import differences, read_recorded, write_recorded
from holdfast.environment import environment_recorded
from holdfast.errors import HoldfastError, RunDirectoryError
from holdfast.folder import CONFIG, ENVIRONMENT, LOCK, PARTIAL, Folder
from holdfast.learner.ownership import absolute_model, has_base
from holdfast.runner.config import RunConfig
from holdfast.storage import why_no_folder, write_json
from holdfast.strategies import build_strategy
from holdfast.tasks import list_orders


class RunDirectory(Folder):
    """A folder that one run writes, stage by stage."""

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, environment: dict[str, Any]) -> Iterator[RunDirectory]:
        """Lock the directory for this process, and make sure that it belongs to this configuration.

        A longer ``tasks.order`` that begins with the one there takes the directory over, and so does another
        ``model.path`` where the base is the same: the run goes on.

        Raises
        ------
        RunDirectoryError
            Another process runs there, or the directory holds another configuration or something else.
        """
        directory = cls(Path(config.output))
        try:
            world.first(lambda: directory.path.mkdir(parents=True, exist_ok=True))
            directory.lock("run")
        except OSError as error:
            raise RunDirectoryError(
                f"output: '{config.output}' can't be used as a run directory "
                f"({why_no_folder(directory.path, error)})."
            ) from error
        try:
            world.first(lambda: directory._claim(config, environment))
            yield directory
        finally:
            directory.release()

    def _claim(self, config: RunConfig, environment: dict[str, Any]) -> None:
        path = self.path / CONFIG
        hindering = self.hindrances(config)
        if hindering:
            raise RunDirectoryError(
                f"{self.path}: holds a run with another configuration; different: {', '.join(hindering)}. "
                "Give this run its own directory with output=DIR, or delete the old one. (A longer "
                "tasks.order that begins with the one there would go on, and so would another model.path "
                "with the same weights.)"
            )
        if path.exists() and self._has_begun():
            if not self.conflicts(config) and environment_recorded(self.path / ENVIRONMENT):
                return
        else:
            ours = {LOCK, ENVIRONMENT, CONFIG}  # what a run leaves that never began
            strangers = [p.name for p in self.path.iterdir() if p.name not in ours and p.name[0] != "."]
            if strangers:
                raise RunDirectoryError(
                    f"{self.path}: not empty and not a run directory (found "
                    f"{', '.join(sorted(strangers)[:5])}). Choose a new or empty folder with output=DIR."
                )
        write_json(self.path / ENVIRONMENT, environment)
        write_recorded(path, config.model_dump(mode="json"))

    @classmethod
    def conflicts(cls, config: RunConfig) -> list[str]:
        """What differs from the run that has begun in the configuration's directory; nothing if none has.

        A look from outside: it neither locks nor writes.
        """
        directory = cls(Path(config.output))
        path = directory.path / CONFIG
        if not path.exists() or not directory._has_begun():
            return []
        found = differences(_recorded(path)[0], config.model_dump(mode="json"))
        free = ("output", "keep")
        return sorted(f"{key} ({a!r} there, {b!r} here)" for key, a, b in found if key not in free)

    @classmethod
    def hindrances(cls, config: RunConfig) -> list[str]:
        """As `conflicts`, of what stands against going on.

        A longer order of the same tasks does not, nor does a base that lies elsewhere now.
        """
        different = cls.conflicts(config)
        recorded = _recorded(Path(config.output) / CONFIG)[1] if different else None
        if recorded is None:
            return different
        if _extends(config, recorded):
            different = [line for line in different if not line.startswith("tasks.order")]
        if len(different) != 1 or not different[0].startswith("model.path "):
            return different
        why = _another_base(config, recorded)
        return [f"{different[0][:-1]}; {why})"] if why else []

    def _has_begun(self) -> bool:
        """Whether any stage was begun: before that a corrected configuration may take the folder over."""
        return any(
            (self.path / name).exists()
            for name in ("tasks", "zero_shot", "base", "zero_shot" + PARTIAL, "base" + PARTIAL)
        )


def _extends(longer: RunConfig, shorter: RunConfig) -> bool:
    """Whether the one goes through the other's tasks first, in stages that a longer stream leaves alone."""
    before, now = _order(shorter), _order(longer)
    open_ended = build_strategy(longer.strategy).open_ended
    return open_ended and len(now) > len(before) > 0 and now[: len(before)] == before


def _another_base(config: RunConfig, recorded: RunConfig) -> str:
    """Why a model at another path isn't taken for the one that the run began with; empty where it is."""
    path, there, here = Path(config.output), recorded.model.path, config.model.path
    if there is None or here is None:
        return "another model"
    if absolute_model(there) == absolute_model(here):
        return ""
    try:
        same = has_base(path, config.model, config.seed)
    except HoldfastError:
        return f"here no model can be loaded: where the base has moved, give model.path={there}"
    if same is None:
        return (
            "whether they are the same can't be told: nothing was learned yet, or by an earlier version, or "
            f"the weights are quantised. If you know that they are, write this path into {path / CONFIG}"
        )
    return "" if same else "the weights are others"


def _order(config: RunConfig) -> tuple[str, ...]:
    """The tasks' names as they are given; empty where the source's own order is meant."""
    order = config.tasks.order
    return tuple(list_orders().get(order, ())) if isinstance(order, str) else tuple(order or ())


def _recorded(path: Path) -> tuple[Any, RunConfig | None]:
    """A recorded configuration with the defaults of options that are newer than it; raw where it is none."""
    recorded = read_recorded(path)
    try:
        config = RunConfig.model_validate(recorded)
    except ValidationError:  # then its differences tell why
        return recorded, None
    return config.model_dump(mode="json"), config
