"""What stands in each JSON file of a result: one class a file, which writes it and reads it back.

Files of an earlier version, which lack newer fields, are read with the defaults of those; a field without a
default has always been there. Not measured is ``null``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from holdfast.config import place_of
from holdfast.errors import DataError
from holdfast.storage import write_json


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; both mean that there is no score."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[float | None, BeforeValidator(_finite)]
HarnessScores = Mapping[str, Mapping[str, Score]]  # lm-eval's tasks to its metrics to their values


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True)
    written_by: ClassVar[str] = "holdfast run"  # the command that makes such a file again

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises
        ------
        DataError
            It can't be read, is no JSON, or of another shape; the message names the file and the field.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: not readable as JSON ({error}). {cls.again()}") from error
        return cls.of(data, str(path), cls.again())

    @classmethod
    def of(cls, data: Any, source: str, advice: str = "") -> Self:
        """Make a record of parsed JSON; its `DataError` begins with `source` and ends with `advice`."""
        try:
            if not isinstance(data, Mapping):
                raise TypeError(f"expected a JSON object, got {type(data).__name__}")
            return cls.model_validate(data)
        except TypeError as error:
            raise DataError(f"{source}: {error}. {advice}".rstrip()) from error
        except ValidationError as error:
            raise DataError(f"{source}: {_problems(error, data)}. {advice}".rstrip()) from error

    @classmethod
    def again(cls) -> str:
        """What to do about a file that can't be read, as a sentence."""
        return f"It may be torn or edited: run the same `{cls.written_by}` command again to redo it."

    def write(self, path: Path) -> None:
        """Write the file, atomically; raises as `holdfast.storage.write_json`."""
        write_json(path, self.model_dump(mode="json"))


def _problems(error: ValidationError, data: Any) -> str:
    said = []
    for item in error.errors(include_url=False)[:5]:
        where = ".".join(map(str, place_of(item, data))) or "top level"
        said.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(said)


class RunMetrics(Record):
    """``metrics.json`` of a run: how it did so far.

    Attributes
    ----------
    label : str
        What the run is called in tables.
    strategy : str
        Name of its strategy.
    tasks : list of str
        In the order in which they are learned.
    same_as : dict
        Of tasks that came into the stream before: name to the name that they had the first time.
    matrix : list of list of float or None
        Scores in percent, (T + 1) × T: ``a[j][i]`` on task i after j tasks; row 0 is before any training.
    ap, fwt, bwt, forgetting, learning_accuracy : float or None
        What `holdfast.evaluation.metrics` makes of the matrix, where a task that comes again counts once;
        None where an entry is missing.
    seconds : dict
        Of ``train``, ``prior`` and ``evaluate``, of ``base`` (task 0: writing its rows, and what the strategy
        makes of them), ``general`` and ``harness`` where they were asked for, and their sum ``total``. Of a
        stage that was stopped or killed and continued, those since then, and in ``train`` also what was
        trained before, up to the checkpoint that was continued.
    parameters, trainable : int or None
        Numbers in the model at the end, and those that the first stage trained.
    seed : int or None
    kl_base, kl_new : list of float or None
        KL(base || now) after each stage, in nats a token, on rows that the base wrote itself and on those
        of the stage's last task; empty where it was not measured.
    harness : dict
        lm-eval's scores (``arc_easy acc``) before the first stage and after each.
    knows_task : bool
        Whether the method is told with each test which task it is.
    rehearses : bool
        Whether it trains on examples of earlier tasks again.
    memory : str
        What is trained on for earlier tasks' sake: nothing, kept examples of theirs, or the model's own.
    finished : bool
        Whether the last stage was tested.
    """

    label: str
    strategy: str
    tasks: list[str]
    same_as: dict[str, str] = {}
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
    kl_base: list[Score] = []
    kl_new: list[Score] = []
    harness: dict[str, list[Score]] = {}
    knows_task: bool = False
    rehearses: bool = False
    memory: Literal["none", "kept", "generated"] = "none"
    finished: bool = True

    @model_validator(mode="after")
    def _shape(self) -> Self:
        count = len(self.tasks)
        rows, columns = len(self.matrix), sorted({len(row) for row in self.matrix})
        if rows != count + 1 or columns != [count]:
            got = f"{rows} rows of {' or '.join(map(str, columns)) or 'no'} values"
            raise ValueError(
                f"the matrix of {count} tasks needs {count + 1} rows (zero-shot first) of {count} values, "
                f"got {got}"
            )
        return self


class StageMetrics(Record):
    """``metrics.json`` of one stage.

    Attributes
    ----------
    stage : str
        Its name; ``zero_shot`` for the test before any training.
    scores : dict
        Task to score in percent, of the tasks that were tested after it.
    seconds : dict
        Of ``train``, ``prior``, ``evaluate``, ``general`` and ``harness``, as far as the stage had them.
    kl_base, kl_new : float or None
        KL(base || now) after it, in nats a token, on rows of the base's own and on those of its last task.
    kl_base_error, kl_new_error : float or None
        Two standard errors of these.
    harness, harness_before : dict or None
        What lm-eval said after it, and before it of what the stage before was not asked: task to metric to
        value.
    harness_options : dict
        What lm-eval was asked after it; empty where it was not asked, or by an earlier version.
    """

    stage: str
    scores: dict[str, Score]
    seconds: dict[str, float] = {}
    kl_base: Score = None
    kl_base_error: Score = None
    kl_new: Score = None
    kl_new_error: Score = None
    harness: HarnessScores | None = None
    harness_before: HarnessScores | None = None
    harness_options: dict[str, Any] = {}


class HarnessAnswers(Record):
    """``harness.json`` of ``holdfast harness``: what lm-eval said when it was asked last, and earlier.

    Attributes
    ----------
    base, now : dict or None
        Before anything was learned, None where the base can't be had, and as the model stands.
    learned : list of str
        The tasks learned so far.
    options : dict
        What was asked.
    earlier : tuple of HarnessAnswers
        What it said before, oldest first, as far as it was not asked the same again.
    """

    written_by: ClassVar[str] = "holdfast harness"

    base: HarnessScores | None = None
    now: HarnessScores
    learned: list[str] = []
    options: dict[str, Any] = {}
    earlier: tuple[HarnessAnswers, ...] = ()

    @classmethod
    def again(cls) -> str:
        """What to do about a file that can't be read, as a sentence."""
        return f"It may be torn or edited: move it away, and run `{cls.written_by}` again."

    @property
    def every(self) -> tuple[HarnessAnswers, ...]:
        """All that was said, oldest first, each without what was said before it."""
        return (*self.earlier, self.model_copy(update={"earlier": ()}))


class TrainingLog(Record):
    """``training.json`` of one stage.

    Attributes
    ----------
    steps : int or None
        Optimizer steps.
    seconds : float or None
        That it took; of attempts that were stopped or killed up to the checkpoint that was continued.
    trained : int or None
        Numbers with a gradient.
    lm_weight : float
        Of the loss on prompts, beside that on completions.
    loss, learning_rate : list of (step, value)
        As the Trainer logged them.
    moved : list of (step, value)
        By how many percent of their own size old outputs had moved since the stage began, in root mean
        square: 100 √drift. Empty where nothing was held, or not by its inputs.
    """

    steps: int | None = None
    seconds: float | None = None
    trained: int | None = None
    lm_weight: float = 0.0
    loss: list[tuple[float, Score]] = []
    learning_rate: list[tuple[float, Score]] = []
    moved: list[tuple[float, Score]] = []


class Histogram(Record):
    """Counts of values between consecutive edges.

    Attributes
    ----------
    edges : list of float
        One more than there are counts, rising.
    counts : list of float
    """

    edges: list[float]
    counts: list[float]


class MovedOutputs(BaseModel):
    """How far old outputs moved in a stage: relative mean squares, see `holdfast.hold.drift.Drift`.

    Attributes
    ----------
    maps : dict
        Canonical name of a linear map's weight to its own.
    total : float
        Of all together.
    """

    model_config = ConfigDict(frozen=True)

    maps: dict[str, float] = {}
    total: float


class ProtectionSummary(Record):
    """``protection.json`` of one stage: how strongly its weights were held.

    Attributes
    ----------
    quantity : str
        What the histogram counts.
    histogram : Histogram or None
        Of all weights that the prior covers.
    held : float or None
        Share of the weights that can't move at all.
    mean : float or None
        Of the quantity, over the weights.
    elements : int or None
        How many weights there are.
    mechanism : dict
        Name and options of the mechanism.
    control : str
        Which control the prior went through; ``none`` for the prior itself.
    drift : MovedOutputs or None
        At the end of the stage; of a prior by inputs only.

    A mechanism's own figures, such as an anchor's ``learning_rate``, stand beside these.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    quantity: str = "held fraction"
    histogram: Histogram | None = None
    held: float | None = None
    mean: float | None = None
    elements: int | None = None
    mechanism: dict[str, Any] = {}
    control: str = "none"
    drift: MovedOutputs | None = None


class UnitScores(Record):
    """``units.json`` of one stage: the importance of its skill units (K).

    Attributes
    ----------
    kind : {"matrix", "lora"}
    names : list of str
        A matrix by its canonical name, or ``<module>[i]`` for rank i of its adapter.
    scores : list of float
        Of the task that was just learned.
    accumulated : list of float or None
        Of all tasks so far (K, eq. 13); None after the first.
    """

    kind: Literal["matrix", "lora"]
    names: list[str]
    scores: list[Score]
    accumulated: list[Score] | None = None

    @model_validator(mode="after")
    def _one_score_each(self) -> Self:
        lengths = {len(self.names), len(self.scores), len(self.accumulated or self.names)}
        if len(lengths) > 1:
            raise ValueError(f"names, scores and accumulated differ in length: {sorted(lengths)}")
        return self


class AdapterRanks(Record):
    """``adapters.json`` of one stage: how far a LoRA has grown, and what its method measured of it.

    Attributes
    ----------
    rank : int
        Of the adapter.
    frozen : int
        How many of its ranks were frozen during the stage.
    overlap : float or None
        How far the new ranks are from orthogonal to the frozen ones (`o-lora`), or how much they change what
        those changed (`ella`).
    held : float or None
        Share of all input directions that later tasks may not read (`inf-lora`).
    router : dict or None
        Task to the share of its probes that find its own ranks (`lora-routed`).
    merged : float or None
        Share of the task's B in the merged one (`slao`).
    inside : float or None
        Share of the factors' energy in the subspaces that they are kept out of (`c-lora`).
    """

    rank: int
    frozen: int
    overlap: float | None = None
    held: float | None = None
    router: dict[str, float] | None = None
    merged: float | None = None
    inside: float | None = None


class Pruning(Record):
    """``pruning.json`` of one stage: what `fapm` took back of its update.

    Attributes
    ----------
    pruned : float
        Share of each tensor's entries.
    energy_left : float
        Share of the update's squared size that stayed.
    """

    pruned: float
    energy_left: float


class Faithfulness(Record):
    """``faithfulness.json``: accuracy after zeroing the top weights, by who chose them.

    Attributes
    ----------
    task : str
    percent : list of float
        Shares of each tensor that were zeroed.
    curves : dict
        ``importance``, ``random`` or ``magnitude`` to the accuracy at each share.
    """

    written_by: ClassVar[str] = "holdfast attribute"

    task: str = ""
    percent: list[float]
    curves: dict[str, list[Score]]

    @model_validator(mode="after")
    def _whole_curves(self) -> Self:
        for who, values in self.curves.items():
            if len(values) != len(self.percent):
                raise ValueError(
                    f"curve '{who}' has {len(values)} values for {len(self.percent)} percentages"
                )
        return self


class PriorMeta(Record):
    """``prior.json``: where a prior came from, and what ties it to its tensors.

    Attributes
    ----------
    importance : str
        Name of the importance, several joined by ``+``.
    options : dict or list of dict
        Its options; a list where merged priors differ in them.
    tasks : list of str
    samples_seen, samples_used : int or None
        Rows that went through the model, and those that count.
    seconds : float or None
    model_digest : str or None
        Of the model's weights when it was computed.
    conservation_max_relative_error : float or None
        Of `lrp`, on the first batch.
    first_token : int or None
        With which all its rows begin, where they share one.
    seed : int or None
        Draws the samples.
    merge : str or None
        How it was joined of others.
    parts : int
        How many priors a mean stands for.
    unit : str or None
        ``mean`` where it was scaled to a mean of 1.
    control : str or None
        Which control it went through.
    dtype : str
        Of the tensors on disk.
    elements : int
        How many weights it covers.
    sha256 : str
        Digest of ``prior.safetensors``.

    What an importance records of itself, such as ``absorbed``, stands beside these.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    written_by: ClassVar[str] = "holdfast attribute"

    importance: str = ""
    options: dict[str, Any] | list[dict[str, Any]] = {}
    tasks: list[str] = []
    samples_seen: int | None = None
    samples_used: int | None = None
    seconds: float | None = None
    model_digest: str | None = None
    conservation_max_relative_error: float | None = None
    first_token: int | None = None
    seed: int | None = None
    merge: str | None = None
    parts: int = 1
    unit: str | None = None
    control: str | None = None
    dtype: str
    elements: int
    sha256: str

    @property
    def meta(self) -> dict[str, Any]:
        """What `ImportancePrior.meta` holds: all that was recorded but what ties it to the file."""
        return self.model_dump(exclude={"sha256", "dtype", "elements"}, exclude_unset=True)


class Environment(Record):
    """``environment.json`` of a run: what is needed to make it again.

    Attributes
    ----------
    packages : dict
        Package to version; None where it isn't installed.
    python, machine, device : str or None
        Python's version, the processor's architecture, and ``cpu`` or the GPU's name.
    threads : int or None
        That torch used.
    git : dict
        Revision of the checkout around the working directory and around holdfast, if there is one.
    seed : int or None
    command : list of str
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    packages: dict[str, str | None] = {}
    python: str | None = None
    machine: str | None = None
    device: str | None = None
    threads: int | None = None
    git: dict[str, str | None] = {}
    seed: int | None = None
    command: list[str] = []


class Prediction(Record):
    """One line of ``predictions/<task>.jsonl``: an answer to a test question.

    Attributes
    ----------
    prompt : str or list of dict
        Text, or chat messages.
    expected : list of str
        All answers that count as right.
    generated : str
        What the model said.
    score : float
        0 to 100.
    """

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    prompt: str | list[dict[str, Any]]
    expected: list[str]
    generated: str
    score: float

    @property
    def question(self) -> str:
        """The prompt as one text: a line a message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in self.prompt)


class Spread(Record):
    """A metric over several runs.

    Attributes
    ----------
    mean : float or None
        None where no run measured it.
    sd : float or None
        Sample standard deviation (n − 1); None with fewer than two runs.
    n : int
        Runs that measured it.
    """

    mean: Score = None
    sd: Score = None
    n: int = 0


class Difference(Record):
    """Mean paired difference from the reference.

    Attributes
    ----------
    mean : float or None
    low, high : float or None
        Its 95 % interval; None with fewer than two pairs.
    pairs : int
    """

    mean: Score = None
    low: Score = None
    high: Score = None
    pairs: int = 0

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds 0: the two are not told apart."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


class ComparedRun(Record):
    """One run of a sweep.

    Attributes
    ----------
    seed : int
    order : str
        Name of its task order; empty where the sweep has one only.
    path : str
        From the sweep's folder.
    status : str
        ``waiting``, ``running``, ``finished`` or ``failed``.
    ap : float or None
    """

    seed: int
    order: str = ""
    path: str
    status: str
    ap: Score = None


class ComparisonRow(Record):
    """One line of a sweep: a row of its grid, at one point.

    Attributes
    ----------
    row, label : str
        Name of the row, and with what distinguishes the point.
    point : dict
        Key of the configuration to its value there.
    strategy : str
    command : str
        What runs one of its runs by hand.
    scores : dict of str to Spread
        By metric.
    differences : dict of str to Difference, or None
        From the reference; None for the reference itself, and where there is none.
    seconds : float or None
        Mean over the finished runs.
    runs : list of ComparedRun
    """

    row: str
    label: str
    point: dict[str, Any] = {}
    strategy: str
    command: str
    scores: dict[str, Spread]
    differences: dict[str, Difference] | None = None
    seconds: Score = None
    runs: list[ComparedRun]


class CurvePoint(Record):
    """What one strength gave: means over its runs."""

    value: float
    learning_accuracy: float
    ap: float


class Curve(Record):
    """AP against learning accuracy over a strength.

    Attributes
    ----------
    key : str
        The strength's.
    fixed : dict
        The grid's other keys, and their values.
    points : list of CurvePoint
        By rising strength.
    """

    key: str
    fixed: dict[str, Any] = {}
    points: list[CurvePoint]


class ComparisonCurve(Curve):
    """A curve of a sweep's row; `split` says on which rows its runs were scored."""

    row: str
    split: Literal["test", "validation"]


class Candidate(Record):
    """A grid point and its mean score on validation rows."""

    label: str
    value: Score = None


class ChosenRow(Record):
    """What a row was chosen from; `chosen` is a label, or None where every point failed."""

    row: str
    chosen: str | None = None
    candidates: list[Candidate]


class Choices(Record):
    """How grid points were chosen.

    Attributes
    ----------
    on : str
        ``validation``.
    by : str
        The metric of which the highest wins.
    seeds : list of int
    rows : list of ChosenRow
    """

    on: str
    by: str
    seeds: list[int]
    rows: list[ChosenRow]


class FailedCell(Record):
    """A cell without a result: its name, its folder from the sweep's, and why."""

    cell: str
    path: str = ""
    reason: str


class Comparison(Record):
    """``compare.json`` of a sweep.

    Attributes
    ----------
    grid : str
        The file that describes it.
    metrics : list of str
        Names of the scores.
    seeds : list of int
    orders : dict
        Name of each task order to that of a built-in one, or to its tasks.
    reference : str or None
        Label of the line that differences are taken from.
    finished : bool
        Whether every cell is.
    rows : list of ComparisonRow
        Those that have been chosen, or need no choice.
    choice : Choices or None
    curves : list of ComparisonCurve
    failed : list of FailedCell
    without_point : list of str
        Rows of which every grid point failed.
    """

    written_by: ClassVar[str] = "holdfast compare"

    grid: str
    metrics: list[str] = []
    seeds: list[int]
    orders: dict[str, str | list[str]] = {}
    reference: str | None = None
    finished: bool
    rows: list[ComparisonRow]
    choice: Choices | None = None
    curves: list[ComparisonCurve] = []
    failed: list[FailedCell] = []
    without_point: list[str] = []
