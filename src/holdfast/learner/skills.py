"""What a learner's folder holds: each skill then and now, read from the folder alone; and taking one back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import DataError, RunDirectoryError
from holdfast.evaluation.metrics import summarise
from holdfast.evaluation.predictions import read_predictions
from holdfast.folder import PARTIAL, Folder
from holdfast.learner.asked import along_the_way, forget_others, with_asked
from holdfast.learner.base_task import BASE
from holdfast.learner.config import STAGES, recorded_config, require_learner
from holdfast.learner.figures import matrix_of
from holdfast.learner.known import ABOUT, read_about
from holdfast.records import RunMetrics, StageMetrics

RUN = "metrics.json"  # in the folder of a run


@dataclass(frozen=True)
class Skill:
    """One task that was learned.

    Attributes
    ----------
    then, now : float or None
        Score on the rows kept aside for it, in percent: right after it was learned, and after the last task.
        None where no row was kept.
    drift : float or None
        Percent of these rows that are answered otherwise now than then, right or wrong.
    learned : str
        When, ISO 8601; empty where it is unknown.
    disk : int
        Bytes of its part of the folder.
    kl_base, kl_new : float or None
        KL(base || now) right after it was learned, in nats a token, on rows of the base's own and on its own
        training rows; None where it was not measured (``evaluation.general``).
    met : int or None
        How many of its test rows, at least, ask what is asked in rows that were trained on, its own or
        a later task's; None where that is not recorded.
    """

    name: str
    then: float | None
    now: float | None
    drift: float | None
    learned: str
    train_rows: int | None
    test_rows: int
    metric: str
    disk: int
    kl_base: float | None = None
    kl_new: float | None = None
    met: int | None = None


@dataclass(frozen=True)
class Skills:
    """A learner's folder, as it stands.

    Attributes
    ----------
    method : str
        The strategy, in a few words.
    strategy : str
        Its name.
    matrix : list of list of float or None
        ``matrix[j][i]``: score of skill i after j tasks; row 0, before any, is empty.
    harness : dict
        lm-eval's scores (``arc_easy acc``) before the first task and after each, and of the base and now
        where ``holdfast harness`` asked; empty where nobody did.
    base : Skill or None
        The base itself, where it is held (``protect_base``): its rows, and how far the model is from it now.
    same_as : mapping
        In a run: name of a task that came into the stream before to the name that it had the first time.
    unfinished : list of str
        Tasks that were begun and not finished.
    disk : int
        Bytes of the whole folder.
    """

    path: Path
    method: str
    strategy: str
    skills: list[Skill]
    matrix: list[list[float | None]]
    unfinished: list[str]
    disk: int
    harness: dict[str, list[float | None]]
    base: Skill | None = None
    same_as: Mapping[str, str] = field(default_factory=dict)

    def metrics(self) -> dict[str, float | None]:
        """AP, BWT and the others, of the skills that rows were kept aside for."""
        names = [self.same_as.get(s.name, s.name) if s.test_rows else None for s in self.skills]
        return summarise(self.matrix, names)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "method": self.method,
            "strategy": self.strategy,
            **({} if self.base is None else {"base": asdict(self.base)}),
            "skills": [asdict(skill) for skill in self.skills],
            "matrix": self.matrix,
            **self.metrics(),
            "harness": self.harness,
            "unfinished": self.unfinished,
            "disk": self.disk,
        }


def read_skills(path: str | Path) -> Skills:
    """Read a learner's folder: of ``holdfast learn``, of a script, or of a run. It neither locks nor writes.

    Raises
    ------
    RunDirectoryError
        There is no learner in the folder.
    DataError
        One of its files is torn.
    """
    root = Path(path).expanduser()
    require_learner(root)
    folder = Folder(root)
    parts = [root / part for part in folder.parts(STAGES)]
    metrics = [StageMetrics.read(part / "metrics.json") for part in parts]
    about = [read_about(part) for part in parts]
    met: list[Any] = [one.get("met_in_training") for one in about]
    names = [record.stage for record in metrics]
    scores = [record.scores for record in metrics]
    skills = [
        Skill(
            name=name,
            then=scores[i].get(name),
            now=scores[-1].get(name),
            drift=None if about[i].get("metric") == "perplexity" else _drift(parts[i], parts[-1], name),
            learned=str(about[i].get("learned", "")),
            train_rows=about[i].get("train_rows"),
            test_rows=len(_answers(parts[i], name)),
            metric=str(about[i].get("metric", "")),
            disk=_size(parts[i]),
            kl_base=metrics[i].kl_base,
            kl_new=metrics[i].kl_new,
            met=None if None in met[i:] else max(counts.get(name, 0) for counts in met[i:]),
        )
        for i, name in enumerate(names)
    ]
    unfinished = [_name_of(root / (part + PARTIAL)) for part in folder.partial(STAGES)]
    config = recorded_config(root, {})
    harness = with_asked(along_the_way(metrics), root, names)
    return Skills(
        root,
        config.method,
        config.strategy.name,
        skills,
        matrix_of(names, scores),
        unfinished,
        _size(root),
        harness,
        _base(root / BASE, metrics[-1].kl_base if metrics else None),
        same_as(root),
    )


def same_as(root: Path) -> Mapping[str, str]:
    """In the folder of a run: name of a task that came before to the name that it had the first time."""
    return RunMetrics.read(root / RUN).same_as if (root / RUN).is_file() else {}


def _base(folder: Path, kl: float | None) -> Skill | None:
    if not (folder / ABOUT).is_file():
        return None
    about = read_about(folder)
    return Skill(
        name=BASE,
        then=None,
        now=None,
        drift=None,
        learned=str(about.get("learned", "")),
        train_rows=about.get("train_rows"),
        test_rows=0,
        metric="",
        disk=_size(folder),
        kl_base=kl,
    )


def undo(path: str | Path) -> str:
    """Take the last task back: one that was begun and not finished, or else the last one learned.

    The folder is then as it was before that task, bit for bit; without the first task there is only its
    configuration in it, which another may take the place of.

    Returns
    -------
    str
        Which one it was.

    Raises
    ------
    RunDirectoryError
        There is no learner in the folder, another process works in it, nothing was learned, the weights
        before the last task are not kept, or it is one of a run, whose configuration says what is in it.
    """
    root = Path(path).expanduser()
    require_learner(root)
    folder = Folder(root)
    folder.lock("learner")
    try:
        unfinished = folder.partial(STAGES)
        begun = unfinished or folder.parts(STAGES)[-1:]
        if not begun:
            raise RunDirectoryError(f"{root}: nothing was learned here, so there is nothing to take back.")
        last = root / (begun[-1] + (PARTIAL if unfinished else ""))
        name = _name_of(last)
        of_run = RunMetrics.read(root / RUN).tasks if (root / RUN).exists() else None
        if of_run is not None and (name in of_run or not (last / ABOUT).exists()):
            raise RunDirectoryError(
                f"{root}: the last task is one of a run, which is what its configuration says. Take tasks "
                "out of tasks.order and run that in a directory of its own."
            )
        before = [part for part in folder.parts(STAGES) if part != begun[-1]][-1:]
        if before and folder.thinned(before[0]):
            raise RunDirectoryError(
                f"{root}: the weights before task '{name}' are not kept (`keep: last` keeps those of the "
                "last two tasks), so it can't be taken back. Nothing was changed."
            )
        folder.remove(begun[-1])
        forget_others(root, [_name_of(root / part) for part in folder.parts(STAGES)])
        if not any((root / STAGES).iterdir()):
            (root / STAGES).rmdir()
            if (root / BASE / ABOUT).exists():  # it was made for the first task
                folder.remove(BASE)
        return name
    finally:
        folder.release()


def _name_of(part: Path) -> str:
    """A task's name as it was given; where nothing tells, as its folder says it."""
    with suppress(DataError):
        if name := read_about(part).get("name"):
            return str(name)
    return part.name.removesuffix(PARTIAL).partition("-")[2]


def _drift(then: Path, now: Path, task: str) -> float | None:
    pairs = list(zip(_answers(then, task), _answers(now, task), strict=False))
    return 100.0 * sum(a != b for a, b in pairs) / len(pairs) if pairs else None


def _answers(part: Path, task: str) -> list[str]:
    return [prediction.generated for prediction in read_predictions(part, task)]


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
