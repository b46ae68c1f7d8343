"""What the JSON files of a run must look like."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, model_validator


def _finite(value: Any) -> Any:
    """Not measured is null in JSON; a NaN or infinite score means the same."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[float | None, BeforeValidator(_finite)]


class Metrics(BaseModel):
    """``metrics.json`` of a run: scores in percent, ``matrix`` (T + 1) × T with row 0 zero-shot."""

    label: str
    strategy: str
    tasks: list[str]
    matrix: list[list[Score]]
    ap: Score = None
    fwt: Score = None
    bwt: Score = None
    forgetting: Score = None
    learning_accuracy: Score = None
    seconds: dict[str, float] = {}
    parameters: int | None = None
    trainable: int | None = None
    seed: int | None = None
    kl_base: list[Score] = []  # KL(base || now), nats a token, after each stage
    kl_new: list[Score] = []
    harness: dict[str, list[Score]] = {}  # lm-eval's scores before the first stage and after each
    knows_task: bool = False
    rehearses: bool = False
    finished: bool = True


class Training(BaseModel):
    """``training.json`` of one stage: the logged (step, loss) pairs."""

    loss: list[tuple[float, Score]] = []
    steps: int | None = None
    seconds: float | None = None


class Histogram(BaseModel):
    """Counts of values between consecutive edges."""

    edges: list[float]
    counts: list[float]


class GateSummary(BaseModel):
    """``protection.json`` of one stage: how strongly its weights were held."""

    histogram: Histogram | None = None
    quantity: str = "held fraction"
    held: float | None = None
    mechanism: dict[str, Any] = {}
    control: str = "none"


class Faithfulness(BaseModel):
    """``faithfulness.json``: accuracy after zeroing the top `percent` of weights, by who chose them."""

    task: str = ""
    percent: list[float]
    curves: dict[str, list[Score]]


class Units(BaseModel):
    """``units.json`` of one stage: its skill units, their importance, and what has been accumulated (K)."""

    kind: Literal["matrix", "lora"]
    names: list[str]
    scores: list[Score]
    accumulated: list[Score] | None = None

    @model_validator(mode="after")
    def _one_score_each(self) -> Units:
        lengths = {len(self.names), len(self.scores), len(self.accumulated or self.names)}
        if len(lengths) > 1:
            raise ValueError(f"names, scores and accumulated differ in length: {sorted(lengths)}")
        return self


class Spread(BaseModel):
    """Mean and standard deviation of a metric over a row's runs."""

    mean: Score = None
    sd: Score = None
    n: int = 0


class Difference(BaseModel):
    """Mean paired difference from the reference, with its interval."""

    mean: Score = None
    low: Score = None
    high: Score = None
    pairs: int = 0


class ComparedRun(BaseModel):
    """One run of a sweep; `path` is relative to the sweep's folder."""

    seed: int
    order: str = ""
    path: str
    status: str


class ComparisonRow(BaseModel):
    """One line of a sweep: a row of its grid, at one point."""

    row: str
    label: str
    strategy: str
    command: str
    scores: dict[str, Spread]
    differences: dict[str, Difference] | None = None
    runs: list[ComparedRun]


class CurvePoint(BaseModel):
    """What one strength gave."""

    value: float
    learning_accuracy: float
    ap: float


class ComparisonCurve(BaseModel):
    """AP against learning accuracy over a row's strength; `split` says on which rows."""

    row: str
    split: Literal["test", "validation"]
    key: str
    fixed: dict[str, Any] = {}
    points: list[CurvePoint]


class Candidate(BaseModel):
    """A grid point and its score on validation rows."""

    label: str
    value: Score = None


class ChosenRow(BaseModel):
    """What a row was chosen from."""

    row: str
    chosen: str | None = None
    candidates: list[Candidate]


class Choices(BaseModel):
    """How grid points were chosen."""

    on: str
    by: str
    seeds: list[int]
    rows: list[ChosenRow]


class FailedCell(BaseModel):
    """A cell without a result, and why."""

    cell: str
    reason: str


class Comparison(BaseModel):
    """``compare.json`` of a sweep."""

    grid: str
    seeds: list[int]
    orders: dict[str, Any] = {}
    reference: str | None = None
    finished: bool
    rows: list[ComparisonRow]
    choice: Choices | None = None
    curves: list[ComparisonCurve] = []
    failed: list[FailedCell] = []
