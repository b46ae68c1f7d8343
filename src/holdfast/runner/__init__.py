"""Runs: the whole configuration, the run directory, the loop over stages, and the checks before it."""

from holdfast.runner.config import RunConfig, load_config
from holdfast.runner.loop import run

__all__ = ["RunConfig", "load_config", "run"]
