"""A task while it is learned: its rows, a trainer for them, and the strategy's verbs for any other loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.folder import CHECKPOINTS
from holdfast.hold import Handle, tell_total_rate
from holdfast.hold.cost import trained_numbers
from holdfast.hold.drift import Drift
from holdfast.learner.config import LearnerConfig
from holdfast.learner.state import LearnerState
from holdfast.models import is_encoder_decoder, unprepare, unwrapped
from holdfast.strategies import STRATEGIES, Context, Stage
from holdfast.tasks.encode import Encoded, first_token
from holdfast.tasks.task import Example
from holdfast.training.beginning import warn_of_other_beginning
from holdfast.training.beside import Beside
from holdfast.training.bridge import bridged, is_trl
from holdfast.training.loop import Collator, Rows, train
from holdfast.training.losses import TokenLoss
from holdfast.training.options import TrainingOptions
from holdfast.training.prompt_loss import PromptLoss
from holdfast.training.reports import Reports
from holdfast.training.soft_targets import SoftTargets
from holdfast.training.steps import Steps, TrainingRecord
from holdfast.training.verbs import Batch, attach_verbs


class Learning:
    """What `Learner.task` gives: one task, from the beginning of its training to the end.

    Train with one of three: `train`, the loop of ``holdfast run``; `trainer`, any Trainer class; or a loop of
    your own, which calls `attach` once, `watch` before and `loss` after each forward pass, and `before_step`
    when the gradient of a step is complete and not yet clipped. A task may have several trainings, one after
    the other (SFT, then DPO): each is held to the weights that the task began with.

    Attributes
    ----------
    stage : Stage
        ``stage.name``, ``stage.index``, ``stage.first``.
    examples : list of Example
        What is trained on: the task's rows, and what the strategy adds to them.
    folder : Path
        Where the task's artefacts go.
    options : TrainingOptions
        The learner's, with the weight of the loss on prompts that is right for this task's rows.
    """

    def __init__(
        self,
        state: LearnerState,
        stage: Stage,
        examples: Sequence[Example],
        description: str,
        beside: Beside | None = None,
        soft_targets: SoftTargets | None = None,
        *,
        reports: Reports,
    ) -> None:
        self.context, self.strategy = state.context, state.strategy
        self.config, self.base = state.config, state.base
        self.stage, self.examples, self.folder = stage, list(examples), state.context.folder
        self.record = TrainingRecord(trained=trained_numbers(state.model))
        self.seed = state.config.seed * 1000 + stage.index + 1  # its own, so a resumed one draws the same
        self.trained = False
        self.options = _with_lm_weight(state.context, state.config, stage)
        self.record.lm_weight = self.options.lm_weight or 0.0
        self.prompt_loss = PromptLoss.of(self.options, state.context.tokenizer)
        self._description, self._beside, self._soft_targets = description, beside, soft_targets
        self._reports = reports
        self._handles: list[Handle] = []
        self._steps: list[Steps] = []

    @cached_property
    def rows(self) -> list[Encoded]:
        """`examples` as token ids."""
        with self.context.progress.bar(f"read {self.stage.name}", total=len(self.examples)) as bar:
            return self.context.encoder.many(self.examples, bar)

    @property
    def numbered(self) -> Rows:
        """`rows` as a map-style data set, for a DataLoader with `collate`."""
        return Rows(self.rows)

    @cached_property
    def collate(self) -> Collator:
        """Makes a batch of items of `numbered`; the loss sees completions only."""
        return Collator(self.context.model, self.context.tokenizer, beside=self._beside)

    @cached_property
    def dataset(self) -> Any:
        """`rows` as a `datasets.Dataset` that TRL takes as tokenised: ``input_ids``, ``labels``."""
        from datasets import Dataset

        if is_encoder_decoder(self.context.model):
            raise ConfigError(
                "dataset: TRL trains causal models only; use stage.trainer(Seq2SeqTrainer, ...)."
            )
        columns = [  # TRL would train on the prompts too where it is only given a completion_mask
            {
                "input_ids": row.prompt_ids + row.completion_ids,
                "labels": [-100] * len(row.prompt_ids) + row.completion_ids,
            }
            for row in self.rows
        ]
        return Dataset.from_list(columns)

    def train(self) -> TrainingRecord:
        """Train with the learner's own loop and options; continues where a killed one was."""
        context = self.context
        self.record = train(
            context.model,
            self.rows,
            self.options,
            tokenizer=context.tokenizer,
            folder=self.folder / CHECKPOINTS,
            seed=self.seed,
            verbs=self.strategy,
            base=self.base,
            progress=context.progress,
            description=self._description,
            beside=self._beside,
            soft_targets=self._soft_targets,
            reports=self._reports,
        )
        self.trained = True
        return self.record

    def trainer(self, trainer_class: Any = None, **arguments: Any) -> Any:
        """A trainer of any class, with the strategy mixed in; call its ``train``.

        Parameters
        ----------
        trainer_class : type, optional
            ``transformers.Trainer`` (default), ``Seq2SeqTrainer``, TRL's ``SFTTrainer``, one of your own.
        **arguments
            For it, such as ``args`` and ``train_dataset``. Without a ``train_dataset`` it trains on `rows`;
            without ``processing_class`` it gets the learner's tokenizer. The model is the learner's.

        Raises
        ------
        ConfigError
            ``model`` or ``peft_config`` is given, a ``data_collator`` without a ``train_dataset``, a
            ``train_dataset`` where the strategy replays rows of earlier tasks, which that data set lacks, or
            `training.loss` or `targets: logits` of a memory is set and the trainer has its own loss.
        """
        from transformers import Seq2SeqTrainer, Trainer

        _refuse_parts("stage.trainer")
        context = self.context
        cls = trainer_class or (Seq2SeqTrainer if is_encoder_decoder(context.model) else Trainer)
        if arguments.pop("model", context.model) is not context.model:
            raise ConfigError(
                "stage.trainer: leave out `model`: what is trained is the learner's (learner.model)."
            )
        if arguments.get("peft_config") is not None:
            raise ConfigError(
                "stage.trainer: `peft_config` would wrap the model behind the learner's back. Wrap it first: "
                "holdfast.Learner(get_peft_model(model, peft_config), ...)."
            )
        if arguments.get("train_dataset") is None:
            if arguments.get("data_collator") is not None:
                raise ConfigError(
                    "stage.trainer: a data_collator belongs to a train_dataset. Give both, or leave out both."
                )
            arguments = {**arguments, **self._data(cls)}
        elif self.config.memory != "none" and arguments["train_dataset"] is not self.__dict__.get("dataset"):
            raise ConfigError(
                f"stage.trainer: strategy '{self.config.strategy.name}' replays rows of earlier tasks, "
                "which this train_dataset lacks. Leave train_dataset out, or give stage.dataset."
            )
        ours = cls.compute_loss is Trainer.compute_loss and isinstance(arguments["train_dataset"], Rows)
        ours = ours and not _asks_for_another_loss(arguments)
        loss, special = self.config.training.loss, self._special_loss()
        if not ours and special:
            raise ConfigError(
                f"stage.trainer: {special}, and {cls.__name__} computes a loss of its own (so does any "
                "Trainer on a train_dataset of yours, with label smoothing, or with a compute_loss_func). "
                "Use stage.train() or a plain Trainer on the stage's rows, or leave it out."
            )
        steps = Steps(self.strategy, self.record, before=self._detach)
        arguments.setdefault("processing_class", context.tokenizer)
        callbacks = [*(arguments.pop("callbacks", None) or ()), steps]
        trainer = bridged(cls, own_loss=ours)(model=context.model, callbacks=callbacks, **arguments)
        trainer.verbs, trainer.drift = self.strategy, steps.drift
        if self.strategy.loss_trains:
            world.expect_every_gradient(trainer.accelerator)
        trainer.prompt_loss = self.prompt_loss
        trainer.token_loss, trainer.soft_targets = TokenLoss.of(loss, self.base), self._soft_targets
        trainer.bad_batch = Path(trainer.args.output_dir) / "bad_batch.safetensors"
        if ours:
            trainer.model_accepts_loss_kwargs = True
        self._steps.append(steps)
        self._reports.keep_open(trainer)
        ours_begin = first_token(self.rows)
        warn_of_other_beginning(trainer.train_dataset, context.tokenizer, ours_begin, "the learner's rows")
        return trainer

    def _special_loss(self) -> str:
        """What only our own loss of a token does; empty where it is plain cross-entropy."""
        loss = self.config.training.loss.name
        if loss != "cross_entropy":
            return f"training.loss is '{loss}'"
        return "" if self._soft_targets is None else "replayed rows are answered by logits (targets: logits)"

    def _data(self, cls: Any) -> dict[str, Any]:
        """What a trainer needs to train on `rows`."""
        if is_trl(cls):
            if self._beside is not None:
                raise ConfigError(
                    f"stage.trainer: {cls.__name__} makes its own batches, and `mixing: batches` puts old "
                    "rows beside each. Use `mixing: rows`, stage.train(), or a plain Trainer."
                )
            return {"train_dataset": self.dataset}
        return {"train_dataset": self.numbered, "data_collator": self.collate}

    def attach(self, optimizer: Optimizer, scheduler: Any = None, steps: int | None = None) -> None:
        """Put the strategy's holds on the optimizer of a loop of your own, once, before its first step.

        Parameters
        ----------
        scheduler : LRScheduler, optional
            Of its learning rate; none where that stays as it is.
        steps : int, optional
            How many the optimizer will make in this task: a hold that is given as its whole pull over a task
            (the default of `attribution`) must know.

        Raises
        ------
        ConfigError
            `training.loss` or `targets: logits` of a memory is set: a loop of your own has its own loss; or
            the model makes activations anew in a way that loses the strategy's gradients.
        """
        _refuse_parts("stage.attach")
        if special := self._special_loss():
            raise ConfigError(
                f"stage.attach: {special}, and a loop of your own computes its own loss. Use stage.train(), "
                "or leave it out."
            )
        for before in self._steps:
            before.release()
        if steps is not None:
            tell_total_rate(optimizer, scheduler, steps)
        self._handles += attach_verbs(self.strategy, self.context.model, optimizer)
        self.trained = True

    def watch(self, batch: Batch) -> None:
        """Show the strategy a micro-batch before its forward pass."""
        self.strategy.watch(self.context.model, batch)

    def loss(self, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """The loss to go backward from: the one given, or what the strategy makes of it.

        Where prompts are learned too (``training.lm_weight``), their loss is added.
        """
        if self.prompt_loss is not None:
            loss = loss + self.prompt_loss(self.context.model, batch, outputs)
        return self.strategy.loss(self.context.model, batch, outputs, loss)

    def before_step(self, scale: float = 1.0) -> None:
        """Show the strategy the gradient of a step, complete and not yet clipped.

        Parameters
        ----------
        scale : float
            ``scale`` times ``.grad`` is the gradient of the loss: with a GradScaler 1 / its scale.
        """
        self.record.steps += 1
        self.strategy.observe(self.context.model, self.record.steps, scale)

    def drift(self) -> Drift | None:
        """How far old outputs have moved since this task began, by map and in all.

        None where nothing is held, or by a hold that doesn't know it (only `importance: inputs` does).
        """
        handles = [*self._handles, *(handle for steps in self._steps for handle in steps.handles)]
        return next((handle.drift() for handle in handles if handle.meter is not None), None)

    def _detach(self) -> None:
        """Take off what the strategy has put on the model and on optimizers: two of it would act twice."""
        while self._handles:
            self._handles.pop().remove()
        for steps in self._steps:
            steps.release()
            self.trained |= steps.attached

    def release(self) -> None:
        """Take all holds off, and what trainers have left on the model."""
        self._detach()
        if self._steps:  # each trainer prepares the model for itself; a loop of one's own may once for all
            unprepare(unwrapped(self.context.model))


def _asks_for_another_loss(arguments: Mapping[str, Any]) -> bool:
    """Whether a plain Trainer is told to compute another loss than the cross-entropy of the answers."""
    smooths = getattr(arguments.get("args"), "label_smoothing_factor", 0)
    return bool(smooths) or arguments.get("compute_loss_func") is not None


def _refuse_parts(where: str) -> None:
    """What an engine does to a model can't be undone, and the next task needs a whole one."""
    if (engine := world.engine()) is not None:
        raise ConfigError(
            f"{where}: the launcher chose {engine}, which would cut up the learner's own model for good. Use "
            "stage.train(), which trains a copy, or DDP (configs/accelerate/ddp.yaml)."
        )


def _with_lm_weight(context: Context, config: LearnerConfig, stage: Stage) -> TrainingOptions:
    """LAMOL's weight for text that the model is to write later; a chat model writes user turns unlearned."""
    options = config.training
    if options.lm_weight is not None:
        return options
    rows = [row for task in stage.tasks for row in task.train if not row.raw]
    text = any(not context.encoder.asks_in_turns(row.prompt) for row in rows)
    learned = config.memory == "generated" and not STRATEGIES[config.strategy.name].writes
    weight = 0.25 if text and learned else 0.0
    return options.model_copy(update={"lm_weight": weight})
