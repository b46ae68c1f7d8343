"""The YAML as typed models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of every section of a configuration: unknown keys are errors, and values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
