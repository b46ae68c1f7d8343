"""Learner: a model that learns one task after another under a strategy, in anybody's script."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from holdfast import world
from holdfast.attribution import AttributionOptions
from holdfast.config import section, validate
from holdfast.errors import ConfigError, DataError, ModelError, RunDirectoryError
from holdfast.evaluation.asking import ask
from holdfast.evaluation.explaining import explain
from holdfast.evaluation.general import Divergence
from holdfast.evaluation.predictions import file_safe
from holdfast.folder import PARTIAL, Folder
from holdfast.importance.explanation import Explanation
from holdfast.importance.prior import some
from holdfast.learner.aside import fit_aside
from holdfast.learner.base_task import BASE, BaseTask
from holdfast.learner.config import STAGES, LearnerConfig, recorded_config, require_learner
from holdfast.learner.engine import check_engine
from holdfast.learner.export import export, push
from holdfast.learner.figures import figures_after
from holdfast.learner.general import General
from holdfast.learner.given import given_task
from holdfast.learner.harness import Harness
from holdfast.learner.keep import thin
from holdfast.learner.known import digest_of, read_about, write_task
from holdfast.learner.learning import Learning
from holdfast.learner.look import Look
from holdfast.learner.ownership import FIXED, began_new, claim, rebuilt, write_identity
from holdfast.learner.remember import rows_to_keep
from holdfast.learner.restore import restore
from holdfast.learner.skills import Skills, read_skills, same_as
from holdfast.learner.state import LearnerState
from holdfast.learner.testing import Testing
from holdfast.models import (
    is_encoder_decoder,
    load_model,
    save_model,
    unwrapped,
)
from holdfast.models.adapters import check_saved_whole, is_adapted, stay_differentiable
from holdfast.models.base import Base, adapter_is_new, identity_of
from holdfast.progress import Progress
from holdfast.records import StageMetrics
from holdfast.storage import why_no_folder
from holdfast.strategies import Context, Stage, Strategy, build_strategy
from holdfast.tasks import Encoder, as_examples, as_questions, toy_tokenizer
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.options import met_in_training
from holdfast.tasks.task import Example, MetricName, Task
from holdfast.training.beside import Beside
from holdfast.training.loop import save_record
from holdfast.training.reports import Reports
from holdfast.training.soft_targets import SoftTargets


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
        if whole and sections:
            raise ConfigError(
                f"Learner: got {', '.join(sections)} beside a LearnerConfig, which has all sections itself; "
                "put them into that one, such as by validate(LearnerConfig, {...})."
            )
        self.config: LearnerConfig = (
            strategy if whole else validate(LearnerConfig, {"strategy": strategy, **sections}, "Learner")
        )
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.config.model is None:
            self.config = self.config.for_adapted(is_adapted(unwrapped(model)))
        world.start()
        if tokenizer.pad_token_id is None:
            raise ModelError(
                "Learner: the tokenizer has no padding token. Give it one first, such as "
                "tokenizer.pad_token = tokenizer.eos_token; padding is masked everywhere."
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "Learner: the tokenizer has no end token, so no answer would end. Give it one first, such as "
                'tokenizer.eos_token = "</s>", one of its own.'
            )
        self.tokenizer, self.progress = tokenizer, progress or Progress(quiet=True)
        self.encoder = Encoder(tokenizer, self.config.template, encoder_decoder=is_encoder_decoder(model))
        strategy = build_strategy(self.config.strategy)
        replay = None if self.config.replay is None else Rehearsal(self.config.replay)
        self._broken = ""
        self._temporary: Any = None
        self._homeless = folder is None
        stay_differentiable(model)
        strategy.check(model)  # before anything is written
        check_saved_whole(unwrapped(model))
        check_engine(model, strategy, replay)
        self._owns = not isinstance(folder, Folder)
        new = adapter_is_new(model)
        needed = self.config.model is not None or is_adapted(unwrapped(model))  # else the folder has it all
        self._identity = identity_of(model) if needed else None
        self.folder = self._open(folder, model, new)
        self._trained: set[str] | None = None  # names of what was trained when the task before had ended
        try:
            self.state = self._state(model, strategy, replay, base_model, new)
            strategy.prepare(self.state.context)
            self.look, self.testing = Look(self.state), Testing(self.state)
            self.general = General(self.state)
            self.base_task = BaseTask(self.state, self.look)
            self._past = restore(self.state, self.testing, self._identity, after)
            self.base_task.restore()
            self.base_task.check()
        except BaseException:
            self.close()  # or the next attempt in this process finds the folder in use
            raise

    def _state(
        self,
        model: Any,
        strategy: Strategy,
        replay: Rehearsal | None,
        base_model: Callable[[], Any] | None,
        new_adapter: bool,
    ) -> LearnerState:
        context = Context(
            model=model,
            tokenizer=self.tokenizer,
            encoder=self.encoder,
            seed=self.config.seed,
            progress=self.progress,
            folder=self.folder.path,
            base_model=base_model or self._base_model,
            fit=lambda *args, **kwargs: fit_aside(self.state, *args, **kwargs),
            write=lambda task, options: rows_to_keep(self.state, task, options),
        )
        by_adapter = (new_adapter or began_new(self.folder.path)) and not strategy.changes_base
        base = Base(context.base_model, by_adapter)
        return LearnerState(self.config, self.folder, context, strategy, replay, base)

    @property
    def model(self) -> Any:
        """The model as it stands now."""
        return self.state.model

    @property
    def learned(self) -> list[str]:
        """The names of the tasks learned so far."""
        return self.state.learned

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
        require_learner(path)
        if (model is None) != (tokenizer is None):
            given = "tokenizer" if model is None else "model"
            raise ConfigError(
                f"Learner.load: got the {given} alone. Give model and tokenizer, or neither where the folder "
                "can tell how to make them."
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
                f"{opened.path}: can't be used as a learner's folder ({why_no_folder(opened.path, error)})."
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

    @contextmanager
    def task(
        self,
        name: str,
        train: Iterable[Example | Mapping[str, Any]],
        test: Iterable[Example | Mapping[str, Any]] = (),
        *,
        metric: MetricName | None = None,
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
            How answers are scored, see `holdfast.tasks.task.Task`; by default by ``exact_match``, and running
            text by ``perplexity``. Options are those of the metric ``options``.
        total : int, optional
            How many tasks there will be in all, where somebody knows: few strategies ask it.
        about : mapping, optional
            JSON-able remarks to keep with the task.

        Raises
        ------
        ConfigError
            The name is taken or none, nothing was trained in the block, the strategy must know `total`,
            there is no such metric, there are options for another, or `about` isn't JSON-able.
        DataError
            A row is malformed, doesn't fit the model, or can't be answered (`look`).
        """
        task = given_task(name, train, test, metric, options)
        try:
            json.dumps(about)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task '{name}': `about` can't be kept as JSON ({error}).") from error
        stage = Stage(name, (task,), len(self.learned), total)
        self._check_can_begin(stage)
        self.look([task])
        self._forget_another(stage, task)
        asked = [known for known in (*self.state.tests, task) if known.test]
        with self.stage(stage, asked, about=about) as learning:
            yield learning

    def _attempt(self, task: Task) -> dict[str, Any]:
        """What a killed attempt must have been at, to be gone on with."""
        return {"digest": digest_of(task), "training": self.config.training.model_dump(mode="json")}

    def _forget_another(self, stage: Stage, task: Task) -> None:
        """Begin anew where a killed attempt was at other rows, or had other options of training."""
        part = self.part(stage)
        begun = self.folder.path / (part + PARTIAL)
        about = world.first(lambda: read_about(begun))
        if about and any(about.get(key) != value for key, value in self._attempt(task).items()):
            self.progress.say(f"{begun}: begun with other rows or training options; starting over.")
            self.folder.remove(part)

    @contextmanager
    def stage(
        self,
        stage: Stage,
        tested: Sequence[Task],
        description: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Iterator[Learning]:
        """Like `task`, of a stage that is given whole, and with the tasks to be asked after it.

        A later process asks a stage of one task again; several that are learned at once are nobody's task.
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
        state, seconds = self.state, dict[str, float]()
        before = [self.folder.path / part for part in self.folder.parts(STAGES)]
        with (
            self._given_up_if_broken(),
            self.folder.part(known_as) as folder,
            Reports(self.model, self.tokenizer) as reports,
        ):
            self._broken = stage.name
            state.context.folder = folder
            general = self.general if self.config.evaluation.general else None
            if general is not None:
                with _timed(seconds, "general"):
                    general.begin(stage, folder)
            harness = Harness(state, folder)
            seconds |= harness.begin()
            with _timed(seconds, "train"):
                learning = self._learning(stage, description, reports)
                if len(stage.tasks) == 1:
                    self._write_task(folder, stage.tasks[0], about)
                try:
                    yield learning
                finally:
                    learning.release()
                    state.base.free()
                if state.strategy.trains and not learning.trained:
                    raise ConfigError(
                        f"task '{stage.name}': nothing was trained in its block. Call stage.train(), or the "
                        "train() of stage.trainer(...), or in a loop of your own stage.attach(optimizer) "
                        "first."
                    )
                self.model.eval()
                self.model.zero_grad(set_to_none=True)
                save_record(learning.record, folder / "training.json")
            seconds["train"] += learning.record.earlier
            with _timed(seconds, "prior"):
                torch.manual_seed(learning.seed)  # a resumed training leaves the generator elsewhere
                state.strategy.end(state.context, stage)
                if state.replay is not None:
                    state.replay.learned(stage.tasks, self.config.seed, state.context.write)
            with _timed(seconds, "evaluate"):
                scores = self.testing.ask(tested, folder, f"after {stage.name}")
            ability: dict[str, Any] = {}
            if general is not None:
                with _timed(seconds, "general"):
                    ability = general.measured(stage.tasks[-1].name)
            ability |= harness.measured(seconds)
            metrics = StageMetrics(stage=stage.name, scores=scores, seconds=seconds, **ability)
            metrics.write(folder / "metrics.json")
            if reports.waiting:
                again = {task.name: task.same_as for task in stage.tasks if task.same_as}
                reports.log(figures_after(before, metrics, {**same_as(self.folder.path), **again}))
            self._save_state(folder)
        self._broken = ""
        self._trained = self._trained_now()
        self.look.learned(stage.tasks)
        self.learned.append(stage.name)
        if len(stage.tasks) == 1:
            task = stage.tasks[0]
            self.state.tests.append(replace(task, train=()))
            self.state.digests[task.name] = digest_of(task)
        thin(self.folder, STAGES, self.config.keep)

    def _write_task(self, folder: Path, task: Task, about: Mapping[str, Any] | None) -> None:
        kept = {
            "learned": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._attempt(task),
            "answer_tokens": self.testing.begin(task),
            "settings": self.config.model_dump(mode="json", include=set(FIXED)),
            "met_in_training": met_in_training((*self.state.tests, task), task),
        }
        write_task(folder, task, kept, about)

    def _learning(self, stage: Stage, description: str | None, reports: Reports) -> Learning:
        """The stage as it is trained: its rows, and what the strategy and the memory add to them."""
        state, seed = self.state, self.config.seed
        state.strategy.begin(state.context, stage)
        examples = state.strategy.examples(state.context, stage)
        if state.replay is not None:
            examples = state.replay.mixed(examples, seed)
        rehearsal = state.rehearsal
        beside = None if rehearsal is None else Beside.of(rehearsal, self.encoder, seed)
        soft = SoftTargets.of(rehearsal, self.model, examples)
        said = description or f"learn {stage.name}"
        return Learning(state, stage, examples, said, beside, soft, reports=reports)

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
                "it, with what the strategy put into it. Make the learner anew, on a model that is loaded "
                "anew (with a folder holdfast.Learner.load does both), and begin the task again."
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
        if stage.total is None and not self.state.strategy.open_ended:
            raise ConfigError(
                f"strategy: '{self.config.strategy.name}' with these options must know how many tasks there "
                "will be. Give learner.task(..., total=n), or use `holdfast run` on a whole stream."
            )
        self._check_trained()
        unfinished = [part for part in self.folder.partial(STAGES) if part != self.part(stage)]
        if unfinished:
            name = unfinished[0].rpartition("/")[2]
            raise RunDirectoryError(
                f"{self.folder.path}: '{name}' was begun and is not finished. Learn that one to its end, or "
                f"take it back with `holdfast skills {shlex.quote(str(self.folder.path))} --undo`."
            )

    def _trained_now(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    def _check_trained(self) -> None:
        """See that what a method has kept of earlier tasks is of the weights that are trained now."""
        if self._trained is None or (now := self._trained_now()) == self._trained:
            return
        if not self.state.strategy.state_dict()[0]:
            return
        said = [
            f"{len(names)} {how}: {some(sorted(names))}"
            for names, how in (
                (self._trained - now, "are frozen now"),
                (now - self._trained, "were frozen"),
            )
            if names
        ]
        raise ConfigError(
            f"Learner: other weights are trained than in '{self.learned[-1]}' ({'; '.join(said)}), and what "
            f"'{self.config.strategy.name}' keeps of earlier tasks is of those. Set requires_grad as it was, "
            "or begin another learner."
        )

    def route(self, task: str | None = None) -> Any:
        """The model that answers.

        Parameters
        ----------
        task : str, optional
            Which task an input is of; only strategies that must be told (`needs_task_identity`) look at it.
        """
        return self.state.route(task)

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
        known, told = list(self.learned), self.state.strategy.needs_task_identity and not base
        if (task is None and told and known) or (task is not None and task not in known):
            given = "no task" if task is None else f"the task '{task}'"
            raise ConfigError(
                f"answer: got {given}; learned here: {', '.join(known) or 'nothing yet'}."
                + (f" '{self.config.strategy.name}' must be told which one a question is of." if told else "")
            )
        asked = as_questions(questions)
        whose = self.state.base.answering(self.model) if base else nullcontext(self.route(task))
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

    def explain(
        self,
        question: str | Sequence[Mapping[str, Any]],
        answer: str | None = None,
        *,
        instead_of: str | None = None,
        options: AttributionOptions | Mapping[str, Any] | None = None,
    ) -> Explanation:
        """Why the model gives an answer, framed as the rows that it learned, see `holdfast.explain`.

        Parameters
        ----------
        answer : str, optional
            By default what the model answers.

        Raises
        ------
        HoldfastError
            As of `answer` and `holdfast.explain`; the model answers nothing; or it takes more than a plain
            model to answer.
        """
        chosen = section(AttributionOptions, options, "explain: options")
        if type(self.state.strategy).route is not Strategy.route:
            raise ConfigError(
                f"explain: under strategy '{self.config.strategy.name}' answers come from more than a plain "
                "model (prompts, routers), through which relevance isn't followed."
            )
        said = self.answer([question])[0] if answer is None else answer
        if not said.strip():
            why = "the model answers nothing" if answer is None else f"the answer is empty (got {answer!r})"
            raise ConfigError(f"explain: {why}; give the answer that is to be explained.")
        return explain(
            self.model,
            self.encoder,
            question,
            said,
            chosen,
            instead_of=instead_of,
            tell=self.progress.remark,
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

        Raises
        ------
        DataError
            A task has no test rows.
        """
        if bare := [task.name for task in tasks if not task.test]:
            raise DataError(f"learner.evaluate: no test rows to ask in {', '.join(bare)}.")
        return self.testing.ask(tasks, folder, description)

    def _save_state(self, folder: Path) -> None:
        if world.leads():  # a killed attempt may have left a part of it
            shutil.rmtree(folder / "model", ignore_errors=True)
        save_model(self.model, self.tokenizer, folder / "model")
        self.state.write_strategy(folder)
        self.state.write_memory(folder)
        write_identity(folder, self._identity)

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
        return world.first(lambda: export(self.state, Path(folder).expanduser(), rank))

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
            exported = world.first(lambda: export(self.state, Path(folder) / "model", None, title))
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


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add what the block takes to a part's seconds."""
    started = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started
