"""Learner: a model that learns one task after another under a strategy, in anybody's script."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from holdfast import world
from holdfast.config import validate
from holdfast.errors import ConfigError, DataError, ModelError, RunDirectoryError
from holdfast.evaluation.asking import ask
from holdfast.evaluation.evaluate import EncodedTask, EvaluationOptions, encode_task, evaluate_encoded
from holdfast.evaluation.general import Divergence
from holdfast.evaluation.predictions import file_safe, write_predictions
from holdfast.evaluation.surprise import most_surprising, surprises
from holdfast.evaluation.writing import write_rows
from holdfast.folder import CONFIG, PARTIAL, Folder
from holdfast.learner.base_task import BASE, BaseTask
from holdfast.learner.card import model_card, push, write_card
from holdfast.learner.config import STAGES, LearnerConfig, recorded_config
from holdfast.learner.general import General
from holdfast.learner.harness import Harness, check_askable
from holdfast.learner.keep import thin
from holdfast.learner.known import ABOUT, TEST, read_about, read_task, write_task
from holdfast.learner.learning import Learning
from holdfast.learner.look import Look
from holdfast.learner.ownership import (
    FIXED,
    began_new,
    check_base,
    check_learned_under,
    claim,
    rebuilt,
    write_identity,
)
from holdfast.learner.skills import Skills, read_skills
from holdfast.models import (
    is_encoder_decoder,
    load_model,
    load_weights,
    quantisation_of,
    save_model,
    unwrapped,
)
from holdfast.models.adapters import check_saved_whole, is_adapted, recompress, stay_differentiable
from holdfast.models.base import Base, adapter_is_new, identity_of
from holdfast.progress import Progress
from holdfast.records import StageMetrics
from holdfast.storage import write_json, write_tensors
from holdfast.strategies import STRATEGIES, Context, Stage, build_strategy
from holdfast.tasks import Encoder, as_examples, as_questions, toy_tokenizer
from holdfast.tasks.memory import MemoryOptions, Rehearsal, WritingOptions
from holdfast.tasks.opening import opening_of
from holdfast.tasks.options import subsample
from holdfast.tasks.task import Example, MetricName, Task
from holdfast.training.beside import Beside
from holdfast.training.loop import save_record, train
from holdfast.training.soft_targets import SoftTargets
from holdfast.training.verbs import Verbs


class Learner:
    """A model, a strategy, and a folder that grows with every task; the stream need not be known.

    Parameters
    ----------
    model : nn.Module
        A transformers model, with or without PEFT, trained in place. What has ``requires_grad`` is trained;
        with PEFT it must be what is saved with the adapter ``default`` (`modules_to_save` included).
    tokenizer : PreTrainedTokenizerBase
    strategy : str, mapping or LearnerConfig
        A name (``"ewc"``), a name with options (``{"name": "ewc", "strength": 1e4}``), or everything at once.
    folder : path or Folder, optional
        Where what is learned is kept. If tasks were learned there, the learner goes on from them: their
        weights are put into `model`. Without it everything is gone with the process, unless it is saved.
    base_model : callable, optional
        ``() -> model``: a fresh copy of the model before the first task, for strategies that train others
        beside it.
    progress : Progress, optional
        Bars; silent by default.
    after : int, optional
        Only to ask the model as it was after so many tasks; such a learner can't learn more.
    **sections
        As in a run's configuration: ``template``, ``training``, ``evaluation``, ``replay``, ``protect_base``,
        ``seed``.

    Attributes
    ----------
    model : nn.Module
        As it stands now; a strategy may have wrapped it.
    learned : list of str
        The names of the tasks learned so far, in order.

    Raises
    ------
    HoldfastError
        The options are wrong, the strategy isn't defined for this model, the folder is in use, belongs to
        another strategy, or is damaged.

    Examples
    --------
    >>> learner = Learner(model, tokenizer, "ewc", folder="skills")
    >>> with learner.task("june", train=rows) as stage:
    ...     stage.trainer(SFTTrainer, args=args).train()
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        strategy: Any = "attribution",
        *,
        folder: str | Path | Folder | None = None,
        base_model: Callable[[], Any] | None = None,
        progress: Progress | None = None,
        after: int | None = None,
        **sections: Any,
    ) -> None:
        whole = isinstance(strategy, LearnerConfig)
        self.config: LearnerConfig = (
            strategy if whole else validate(LearnerConfig, {"strategy": strategy, **sections}, "Learner")
        )
        if self.config.model is None:
            self.config = self.config.for_adapted(is_adapted(unwrapped(model)))
        world.start()
        check_askable(self.config)
        if tokenizer.pad_token_id is None:
            raise ModelError(
                "Learner: the tokenizer has no padding token. Give it one first, such as "
                "tokenizer.pad_token = tokenizer.eos_token; padding is masked everywhere."
            )
        self.tokenizer, self.progress = tokenizer, progress or Progress(quiet=True)
        self.encoder = Encoder(tokenizer, self.config.template, encoder_decoder=is_encoder_decoder(model))
        self.strategy = build_strategy(self.config.strategy)
        self.replay = None if self.config.replay is None else Rehearsal(self.config.replay)
        self.tests: list[Task] = []  # the tasks learned by `task`, with the rows kept aside for testing them
        self.digests: dict[str, str] = {}  # of the rows that these were learned from
        self._encoded: dict[str, EncodedTask] = {}
        self._longest: dict[str, int] = {}  # how long an answer to each may be, in tokens
        self.look = Look(self)
        self._broken, self._past = "", False
        self._temporary: Any = None
        self._homeless = folder is None
        stay_differentiable(model)
        self.strategy.check(model)  # before anything is written
        check_saved_whole(unwrapped(model))
        self._check_engine(model)
        self._owns = not isinstance(folder, Folder)
        new = adapter_is_new(model)
        needed = self.config.model is not None or is_adapted(unwrapped(model))  # else the folder has it all
        self._identity = identity_of(model) if needed else None
        self.folder = self._open(folder, model, new)
        try:
            self._begin(model, base_model, after, new)
        except BaseException:
            self.close()  # or the next attempt in this process finds the folder in use
            raise

    def _check_engine(self, model: Any) -> None:
        engine = world.engine()
        if engine is None:
            return
        if quantisation_of(model) is not None:
            raise ConfigError(
                f"Learner: the launcher chose {engine}, which cuts weights up, and this model's are "
                "quantised. Use DDP (configs/accelerate/ddp.yaml), or the model's full weights."
            )
        rehearsal = self.replay or self.strategy.rehearsal
        if rehearsal is not None and rehearsal.targets == "logits":
            raise ConfigError(
                f"Learner: the launcher chose {engine}, and `targets: logits` puts the weights from before a "
                "task, which are whole ones, into a model in parts. Use `targets: text`, or DDP."
            )
        if not self.strategy.sharded:
            works = ", ".join(name for name, method in STRATEGIES.items() if method.strategy.sharded)
            raise ConfigError(
                f"Learner: the launcher chose {engine}, under which a process has a part of each weight "
                f"alone, and '{self.config.strategy.name}' needs whole ones. Allowed there: {works}; or DDP "
                "(configs/accelerate/ddp.yaml)."
            )

    def _begin(
        self, model: Any, base_model: Callable[[], Any] | None, after: int | None, new_adapter: bool
    ) -> None:
        self.context = Context(
            model=model,
            tokenizer=self.tokenizer,
            encoder=self.encoder,
            seed=self.config.seed,
            progress=self.progress,
            folder=self.folder.path,
            base_model=base_model or self._base_model,
            fit=self._fit_aside,
            write=self._write,
        )
        by_adapter = (new_adapter or began_new(self.folder.path)) and not self.strategy.changes_base
        self.base = Base(self.context.base_model, by_adapter)
        self.strategy.prepare(self.context)
        self.general = General(self)
        self.learned: list[str] = []
        self.base_task = BaseTask(self)
        self._restore(after)
        self.base_task.restore()
        self.base_task.check()

    @property
    def model(self) -> Any:
        """The model as it stands now."""
        return self.context.model

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        progress: Progress | None = None,
        after: int | None = None,
        **sections: Any,
    ) -> Learner:
        """The learner that a folder holds: of ``holdfast learn``, of a script, or of ``holdfast run``.

        Parameters
        ----------
        model, tokenizer : optional
            Those that the learner was made with, as they were then; needed only where the folder can't tell
            how to make them (an adapter on a base model that has no folder or hub id).
        after : int, optional
            Only to ask the model as it was after so many tasks.
        **sections
            What shall be otherwise from now on: ``training``, ``evaluation``.

        Raises
        ------
        HoldfastError
            There is no learner in the folder, or it can't be loaded.
        """
        path = Path(folder).expanduser()
        if not (path / CONFIG).is_file():
            raise RunDirectoryError(
                f"{path}: there is no learner here (no {CONFIG}). `holdfast learn DATA --skills {path} "
                "--model MODEL` makes one, or holdfast.Learner(model, tokenizer, folder=...)."
            )
        config = recorded_config(path, sections)
        if model is None:
            model, tokenizer = rebuilt(path, config)
        return cls(model, tokenizer, config, folder=path, progress=progress, after=after)

    def _open(self, folder: str | Path | Folder | None, model: Any, new_adapter: bool) -> Folder:
        if isinstance(folder, Folder):
            return folder  # its owner has locked it and wrote the configuration
        opened = Folder(Path(folder or world.first(self._make_temporary)).expanduser())
        try:
            world.first(lambda: opened.path.mkdir(parents=True, exist_ok=True))
            opened.lock("learner")
        except OSError as error:
            raise RunDirectoryError(
                f"{opened.path}: can't be used as a learner's folder ({error.strerror})."
            ) from error
        try:
            world.first(lambda: claim(opened, self.config, model, new_adapter))
        except BaseException:
            opened.release()
            raise
        return opened

    def _make_temporary(self) -> str:
        self._temporary = tempfile.TemporaryDirectory(prefix="holdfast-")
        return str(self._temporary.name)

    def _restore(self, after: int | None) -> None:
        parts = self.folder.parts(STAGES)
        if after is not None:
            if not 0 <= after <= len(parts):
                raise ConfigError(
                    f"Learner: after={after}, but in {self.folder.path} {len(parts)} tasks were learned; "
                    f"allowed: 0 to {len(parts)}."
                )
            self._past = after < len(parts)
            parts = parts[:after]
        if not parts:
            return
        problem = self.folder.problem(parts[-1])
        if problem is not None:
            raise RunDirectoryError(
                f"{self.folder.path / parts[-1]}: {problem}. Bring the folder back from a backup, or take "
                f"this task back (`holdfast skills {self.folder.path} --undo`) and learn it again."
            )
        last = self.folder.path / parts[-1]
        if self.folder.thinned(parts[-1]):
            raise RunDirectoryError(
                f"{last}: its weights are not kept (`keep: last` keeps those of the last two tasks), so the "
                "learner can't be had as it was then."
            )
        if settings := read_about(last).get("settings"):
            check_learned_under(self.config, self.folder.path, last, settings)
        adapted = is_adapted(unwrapped(self.model)) and not self.strategy.changes_base
        if remark := check_base(last, self._identity, self.config, adapted=adapted):
            self.progress.say(remark)
        try:
            load_weights(self.model, last / "model")
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"{last / 'model'}: these weights don't fit this model ({error!s:.300}). Give "
                "the model that the learner began with, or leave it to holdfast.Learner.load."
            ) from error
        file = last / "strategy.safetensors"
        tensors = load_file(file) if file.exists() else {}
        self.strategy.load_state_dict(tensors, json.loads((last / "strategy.json").read_text()))
        if self.replay is not None:
            self.replay.memory.load_state_dict(json.loads((last / "replay.json").read_text()))
        for part in parts:
            self._recall(part)
        if not self._past:  # a kill may have come between a task's commit and this
            thin(self.folder, STAGES, self.config.keep)

    def _recall(self, name: str) -> None:
        part = self.folder.path / name
        known = [ABOUT, TEST] if any((part / file).exists() for file in (ABOUT, TEST)) else []
        problem = self.folder.problem(name, ["metrics.json", *known])
        if problem is not None:
            raise RunDirectoryError(f"{part}: {problem}. Bring the folder back from a backup.")
        try:
            self.learned.append(StageMetrics.read(part / "metrics.json").stage)
            kept = read_task(part)
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise RunDirectoryError(
                f"{part}: its files can't be read ({error}). Bring the folder back from a backup."
            ) from error
        if kept is not None:
            about = read_about(part)
            self.tests.append(kept)
            self.digests[kept.name] = str(about.get("digest"))
            self._longest[kept.name] = int(about.get("answer_tokens") or 0)

    @contextmanager
    def task(
        self,
        name: str,
        train: Iterable[Example | Mapping[str, Any]],
        test: Iterable[Example | Mapping[str, Any]] = (),
        *,
        metric: MetricName = "exact_match",
        options: Sequence[str] = (),
        total: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Iterator[Learning]:
        """Learn one more task: what is trained in the block is held, measured and kept when the block ends.

        Parameters
        ----------
        name : str
            One that no earlier task has.
        train : iterable
            Rows with ``prompt`` and ``completion``, or chat ``messages``, or `Example` objects.
        test : iterable, optional
            Rows kept aside, of the same form: after this task and each later one the model is asked them.
        metric, options
            How answers are scored, see `holdfast.tasks.task.Task`. Running text is scored by ``perplexity``,
            whatever is said.
        total : int, optional
            How many tasks there will be in all, where somebody knows: few strategies ask it.
        about : mapping, optional
            JSON-able remarks to keep with the task.

        Raises
        ------
        ConfigError
            The name is taken, nothing was trained in the block, or the strategy must know `total`.
        DataError
            A row is malformed, doesn't fit the model, or can't be answered (`look`).
        """
        rows = as_examples(train)
        tests = list(test)
        asked_rows = as_examples(tests) if tests else []
        if any(row.raw for row in asked_rows):
            metric = "perplexity"
        task = Task(name, rows, asked_rows, metric, tuple(options))
        stage = Stage(name, (task,), len(self.learned), total)
        self._check_can_begin(stage)
        self.look([task])
        asked = [known for known in (*self.tests, task) if known.test]
        digest = self.digest(task)
        known = {"digest": digest, "training": self.config.training.model_dump(mode="json")}
        self._forget_another(stage, known)
        if task.test:
            self._encoded[name] = encode_task(task, self.encoder, self.config.evaluation)
            self._longest[name] = self._encoded[name].max_new_tokens
        answers = {"answer_tokens": self._longest.get(name, 0)}
        with self.stage(stage, asked) as learning:
            settings = {"settings": self.config.model_dump(mode="json", include=set(FIXED))}
            write_task(learning.folder, task, {**(about or {}), **known, **answers, **settings})
            yield learning
        self.tests.append(Task(name, (), task.test, metric, task.options))
        self.digests[name] = digest

    @staticmethod
    def digest(task: Task) -> str:
        """SHA-256 of a task's rows: whether an earlier attempt was at the same ones."""
        return hashlib.sha256(repr((task.metric, task.options, task.train, task.test)).encode()).hexdigest()

    def _forget_another(self, stage: Stage, known: Mapping[str, Any]) -> None:
        """Begin anew where a killed attempt was at other rows, or had other options of training."""
        part = self.part(stage)
        begun = self.folder.path / (part + PARTIAL)
        about = world.first(lambda: read_about(begun))
        if about and any(about.get(key) != value for key, value in known.items()):
            self.progress.say(f"{begun}: begun with other rows or training options; starting over.")
            self.folder.remove(part)

    @contextmanager
    def stage(
        self, stage: Stage, tested: Sequence[Task], description: str | None = None
    ) -> Iterator[Learning]:
        """Like `task`, of a stage that is given whole, and with the tasks to be asked after it.

        A block that ends in an error leaves the model in the middle of things: make the learner anew.
        """
        self._check_can_begin(stage)
        self.look(stage.tasks)
        if self.base_task.due:
            self._broken = BASE
            with self._given_up_if_broken():
                self.base_task.end(stage.total)
            self._broken = ""
        stage, known_as = self.base_task.seen(stage), self.part(stage)
        seconds: dict[str, float] = {}
        with self._given_up_if_broken(), self.folder.part(known_as) as folder:
            self._broken = stage.name
            self.context.folder = folder
            started = time.perf_counter()
            measured = self.config.evaluation.general
            if measured:
                self.general.begin(stage, folder)
                seconds["general"] = time.perf_counter() - started
            harness = Harness(self, folder)
            seconds |= harness.begin()
            started = time.perf_counter()
            self.strategy.begin(self.context, stage)
            for task in stage.tasks if self.config.memory == "generated" else ():
                opening_of(task.train, self.encoder, task.name)  # what can't be written isn't trained
            examples = self.strategy.examples(self.context, stage)
            if self.replay is not None:
                examples = self.replay.mixed(examples, self.config.seed)
            rehearsal = self.replay or self.strategy.rehearsal
            beside = None if rehearsal is None else Beside.of(rehearsal, self.encoder, self.config.seed)
            soft = SoftTargets.of(rehearsal, self.model, examples)
            said = description or f"learn {stage.name}"
            learning = Learning(
                self.context, self.strategy, self.config, self.base, stage, examples, said, beside, soft
            )
            try:
                yield learning
            finally:
                learning.release()
                self.base.free()
            if self.strategy.trains and not learning.trained:
                raise ConfigError(
                    f"task '{stage.name}': nothing was trained in its block. Call stage.train(), or the "
                    "train() of stage.trainer(...), or in a loop of your own stage.attach(optimizer) first."
                )
            self.model.eval()
            self.model.zero_grad(set_to_none=True)
            save_record(learning.record, folder / "training.json")
            seconds["train"] = learning.record.earlier + time.perf_counter() - started
            started = time.perf_counter()
            torch.manual_seed(learning.seed)  # a resumed training leaves the generator elsewhere
            self.strategy.end(self.context, stage)
            if self.replay is not None:
                self.replay.learned(stage.tasks, self.config.seed, self._write)
            seconds["prior"] = time.perf_counter() - started
            started = time.perf_counter()
            scores = self.evaluate(tested, folder, f"after {stage.name}")
            seconds["evaluate"] = time.perf_counter() - started
            general: dict[str, Any] = {}
            if measured:
                started = time.perf_counter()
                general = self.general.measured(stage.tasks[-1].name)
                seconds["general"] += time.perf_counter() - started
            general |= harness.measured(seconds)
            metrics = StageMetrics(stage=stage.name, scores=scores, seconds=seconds, **general)
            metrics.write(folder / "metrics.json")
            self._save_state(folder)
        self._broken = ""
        self.look.learned(stage.tasks)
        self.learned.append(stage.name)
        thin(self.folder, STAGES, self.config.keep)

    @contextmanager
    def _given_up_if_broken(self) -> Iterator[None]:
        """After an error the folder is free for the learner that is made anew."""
        try:
            yield
        except BaseException:
            if self._owns:
                self.folder.release()
            raise

    @staticmethod
    def part(stage: Stage) -> str:
        """Where a stage stands in the folder."""
        return f"{STAGES}/{stage.index + 1:02d}-{file_safe(stage.name)}"

    def _check_can_begin(self, stage: Stage) -> None:
        if self._broken:
            raise ConfigError(
                f"Learner: task '{self._broken}' ended in an error, and the model stands somewhere inside "
                "it. Make the learner anew (with a folder: holdfast.Learner.load) and begin the task again."
            )
        if self._past:
            raise ConfigError(
                f"Learner: this is the learner as it was after {len(self.learned)} tasks, and its folder "
                "holds more: it can be asked, and can't learn. Leave out `after`."
            )
        if stage.name in self.learned:
            raise ConfigError(
                f"task '{stage.name}' is learned already (learner.learned: {', '.join(self.learned)}). To "
                "learn it once more give it another name."
            )
        if stage.name == BASE and self.config.protect_base is not None:
            raise ConfigError(f"task '{BASE}': that is the base itself (protect_base). Give it another name.")
        if stage.name.endswith(PARTIAL):
            raise ConfigError(f"task '{stage.name}': a name can't end with {PARTIAL}. Give it another name.")
        if stage.total is None and not self.strategy.open_ended:
            raise ConfigError(
                f"strategy: '{self.config.strategy.name}' with these options must know how many tasks there "
                "will be. Give learner.task(..., total=n), or use `holdfast run` on a whole stream."
            )
        unfinished = [part for part in self.folder.partial(STAGES) if part != self.part(stage)]
        if unfinished:
            name = unfinished[0].rpartition("/")[2]
            raise RunDirectoryError(
                f"{self.folder.path}: '{name}' was begun and is not finished. Learn that one to its end, or "
                f"take it back with `holdfast skills {self.folder.path} --undo`."
            )

    def route(self, task: str | None = None) -> Any:
        """The model that answers.

        Parameters
        ----------
        task : str, optional
            Which task an input is of; only strategies that must be told (`needs_task_identity`) look at it.
        """
        return self.strategy.route(self.model, task if self.strategy.needs_task_identity else None)

    def answer(
        self,
        questions: Iterable[object],
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
        base: bool = False,
    ) -> list[str]:
        """What the model answers as it stands: framed as the rows that it learned, nothing sampled.

        Parameters
        ----------
        questions : iterable
            Texts, lists of chat messages, or rows of a task's form, with or without an answer.
        task : str, optional
            Which task they are of; needed where the strategy must be told.
        max_new_tokens : int, optional
            At most; by default ``template.max_completion_tokens``.
        base : bool
            Ask the model as it was before the first task.

        Raises
        ------
        DataError
            A question is empty or malformed, or there is none.
        ConfigError
            The strategy must be told the task; there is no such task; or the base can't be had.
        """
        if isinstance(questions, str | Mapping):
            raise ConfigError("learner.answer: give a list of questions, of one too.")
        known, told = list(self.learned), self.strategy.needs_task_identity and not base
        if (task is None and told and known) or (task is not None and task not in known):
            given = "no task" if task is None else f"the task '{task}'"
            raise ConfigError(
                f"answer: got {given}; learned here: {', '.join(known) or 'nothing yet'}."
                + (f" '{self.config.strategy.name}' must be told which one a question is of." if told else "")
            )
        asked = as_questions(questions)
        whose = self.base.answering(self.model) if base else nullcontext(self.route(task))
        with self.progress.bar("answer", total=len(asked)) as bar, whose as model:
            return ask(
                model,
                self.tokenizer,
                self.encoder,
                asked,
                batch_size=self.config.evaluation.batch_size,
                max_new_tokens=max_new_tokens,
                progress=bar,
            )

    def kl_to_base(self, rows: Iterable[Example | Mapping[str, Any]] | None = None) -> Divergence:
        """How far the model has moved from what it was before the first task: KL(base || now) per token.

        Parameters
        ----------
        rows : iterable, optional
            Of the same form as a task's; by default those that the base wrote itself
            (``evaluation.general: true``).

        Raises
        ------
        ConfigError
            No rows of the base were kept; or rows are given and the base can't be had (see `base_model`).
        """
        return self.general.of(None if rows is None else as_examples(rows))

    def skills(self) -> Skills:
        """Each task then and now, and what it costs on disk: what ``holdfast skills`` shows."""
        return read_skills(self.folder.path)

    def evaluate(self, tasks: Sequence[Task], folder: Path, description: str = "") -> dict[str, float]:
        """Ask the model the tasks' test rows; predictions go into a folder.

        Returns
        -------
        dict
            Task to score, 0 to 100.
        """
        scores: dict[str, float] = {}
        options = self.config.evaluation
        with self.progress.bar(f"test {description}", total=sum(len(t.test) for t in tasks)) as bar:
            done = 0
            for task in tasks:
                if task.name not in self._encoded:
                    self._encoded[task.name] = encode_task(task, self.encoder, self._asking(task.name))
                result = evaluate_encoded(
                    self.route(task.name),
                    self.tokenizer,
                    self._encoded[task.name],
                    batch_size=options.batch_size,
                    progress=partial(_ahead, bar, done),
                )
                write_predictions(folder, task.name, result.predictions)
                scores[task.name] = result.score
                done += len(task.test)
        return scores

    def _asking(self, task: str) -> EvaluationOptions:
        """How a task is asked: its answers may be as long now as they might be when it was learned."""
        options = self.config.evaluation
        if options.max_new_tokens is None and self._longest.get(task):
            return options.model_copy(update={"max_new_tokens": self._longest[task]})
        return options

    def _save_state(self, folder: Path) -> None:
        if world.leads():  # a killed attempt may have left a part of it
            shutil.rmtree(folder / "model", ignore_errors=True)
        save_model(self.model, self.tokenizer, folder / "model")
        tensors, values = self.strategy.state_dict()
        if tensors:
            write_tensors(folder / "strategy.safetensors", tensors)
        write_json(folder / "strategy.json", values)
        write_identity(folder, self._identity)
        if self.replay is not None:
            write_json(folder / "replay.json", self.replay.memory.state_dict())

    def save(self, folder: str | Path | None = None) -> Path:
        """Make sure that all that was learned is in a folder, and return it.

        Parameters
        ----------
        folder : path, optional
            Needed by a learner without a folder of its own; one that has its own gets a copy there. Every
            task is written when its block ends: in the learner's own folder there is nothing left to do.
        """
        if folder is None:
            if self._homeless:
                raise ConfigError(
                    "learner.save: this learner has no folder of its own; give save(folder=...)."
                )
            return self.folder.path
        return world.first(lambda: self._copy(Path(folder).expanduser()))

    def _copy(self, target: Path) -> Path:
        if target.resolve() == self.folder.path.resolve():
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunDirectoryError(f"{target}: not empty. Choose a new or empty folder.")
        shutil.copytree(
            self.folder.path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run.lock")
        )
        return target

    def export(self, folder: str | Path, *, rank: int | None = None) -> Path:
        """Write the model that answers as a plain Hugging Face folder, with a card: weights, or an adapter.

        Parameters
        ----------
        rank : int, optional
            Of an adapter that has grown with the tasks: recompress it to so many ranks, the closest by SVD.
            Its answers may change with it.

        Raises
        ------
        ConfigError
            The strategy's answers can't be had from a plain folder; or a rank is given, and what answers is
            no LoRA of more ranks.
        RunDirectoryError
            The folder is not empty.
        """
        return world.first(lambda: self._export(Path(folder).expanduser(), rank))

    def _export(self, target: Path, rank: int | None, title: str | None = None) -> Path:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunDirectoryError(f"{target}: not an empty folder. Choose a new or empty one.")
        if rank is not None and (self.strategy.changes_base or not is_adapted(self.model)):
            raise ConfigError(
                f"export: got rank {rank}, but what answers here is a whole model and no adapter. Leave the "
                "rank out."
            )
        target.mkdir(parents=True, exist_ok=True)
        self.strategy.export(self.context, target)
        if rank is not None:
            try:
                left = recompress(target, rank)
            except ConfigError:
                shutil.rmtree(target)
                raise
            self.progress.say(
                f"{target}: rank {rank} holds {100 * left:.1f} % of the adapter's squared size."
            )
        if self.learned:
            path = None if self.config.model is None else self.config.model.path
            known = path if path is not None and not Path(path).expanduser().exists() else None
            adapter = (target / "adapter_config.json").exists()
            write_card(
                target,
                model_card(self.skills(), base_model=known, adapter=adapter, title=title or target.name),
            )
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Learned with holdfast",
    ) -> str:
        """Upload the model that answers, with a card: what was learned and kept, and how it was measured.

        Parameters
        ----------
        repo_id : str
            ``name`` or ``owner/name``; made if it isn't there.
        private : bool, optional
            Of a new repository; by default as the owner's settings are.
        token : str, optional
            By default that of ``hf auth login``.

        Returns
        -------
        str
            The address.

        Raises
        ------
        ConfigError
            Nothing was learned yet, the strategy's answers can't be had from a plain folder, or the hub
            refuses.
        """
        if not self.learned:
            raise ConfigError("push_to_hub: nothing was learned yet, so there is nothing to upload.")
        with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
            title = repo_id.rpartition("/")[2]
            exported = world.first(lambda: self._export(Path(folder) / "model", None, title))
            return push(exported, repo_id, private=private, token=token, message=message)

    def close(self) -> None:
        """Give the folder up, so that another process may go on with it."""
        if self._owns:
            self.folder.release()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _base_model(self) -> Any:
        if self.config.model is None:
            raise ConfigError(
                "Learner: the model as it was before the first task is needed (by the strategy, by "
                "training.loss: kl_to_base, or for KL to it); give base_model=, a function that makes a "
                "fresh copy of it."
            )
        model = load_model(self.config.model, self.config.seed, toy_tokenizer)[0]
        return model if model.device == self.model.device else model.to(self.model.device)

    def _write(self, task: Task, options: MemoryOptions) -> list[Example]:
        """Rows that the model writes of a task it has just learned, kept as text in the stage's folder.

        Those of the base it has written already, or were given. By surprise: those of the task's own that it
        finds least likely now.
        """
        if task.name == BASE and self.config.protect_base is not None:
            return list(subsample(task.train, options.written, self.config.seed, BASE, "memory"))
        if options.sampling == "surprise":
            with self.progress.bar(f"surprise of {task.name}", total=len(task.train)) as bar:
                size = self.config.evaluation.batch_size
                found = surprises(
                    self.route(task.name), self.encoder, task.train, batch_size=size, progress=bar
                )
            return most_surprising(task.train, found, options.size(len(task.train)))
        with self.progress.bar(f"write rows of {task.name}", total=options.written) as bar:
            written = write_rows(
                self.route(task.name),
                self.encoder,
                opening_of(task.train, self.encoder, task.name),
                options.writing or WritingOptions(),
                count=options.written,
                seed=f"{self.config.seed} {task.name}",
                known=task.train,
                batch_size=self.config.evaluation.batch_size,
                progress=bar,
            )
        written.save(self.context.folder)
        self.progress.say(f"  memory of {task.name}: {written.said()}")
        return written.rows

    def _fit_aside(
        self,
        model: Any,
        examples: Sequence[Example],
        description: str,
        verbs: Verbs | None = None,
        epochs: float | None = None,
    ) -> None:
        options = self.config.training
        if epochs is not None:
            options = options.model_copy(update={"epochs": epochs, "max_steps": None})
        folder = self.folder.path / "aside"  # not resumable by itself: its stage is redone as a whole
        world.first(lambda: shutil.rmtree(folder, ignore_errors=True))
        train(
            model,
            self.encoder.many(examples),
            options,
            tokenizer=self.tokenizer,
            folder=folder / "checkpoints",
            seed=self.config.seed,
            verbs=verbs,
            base=self.base,
            progress=self.progress,
            description=description,
        )
        world.first(lambda: shutil.rmtree(folder, ignore_errors=True))


def _ahead(bar: Callable[[int], None], before: int, done: int, total: int) -> None:
    """Rows asked of one task, on the bar of them all."""
    bar(before + done)
