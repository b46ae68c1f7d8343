"""Runs: the whole configuration, the run directory, the loop over stages, and the checks before it."""

from typing import TYPE_CHECKING

from holdfast.lazy import later

if TYPE_CHECKING:
    from holdfast.runner.config import RunConfig, load_config
    from holdfast.runner.loop import run

__all__ = ["RunConfig", "load_config", "run"]
__getattr__ = later(  # a configuration is read without what trains
    __name__,
    {
        "RunConfig": "holdfast.runner.config",
        "load_config": "holdfast.runner.config",
        "run": "holdfast.runner.loop",
    },
)
