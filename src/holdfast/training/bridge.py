"""What is mixed into the Trainers of transformers and TRL: our loss, and a stop where it is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from holdfast import world
from holdfast.errors import ConfigError, TrainingDivergedError
from holdfast.hold.drift import MOVED, Drift
from holdfast.models import accepts, is_encoder_decoder, unwrapped
from holdfast.storage import atomic_write, save_tensors, write_tensors
from holdfast.training.checkpoints import ours
from holdfast.training.losses import TokenLoss
from holdfast.training.prompt_loss import PromptLoss
from holdfast.training.soft_targets import SoftTargets
from holdfast.training.steps import OBSERVED, UNLOGGED
from holdfast.training.verbs import ROWS, Verbs, has, model_inputs


def completion_loss(logits_BTV: Tensor, labels_BT: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy over completion tokens (A, eq. 3, averaged over tokens, as transformers does).

    Parameters
    ----------
    logits_BTV : Tensor
        Logits of the last T positions.
    labels_BT : Tensor
        Labels of the same positions, -100 where nothing is predicted.
    count : Tensor or int, optional
        Label tokens over all micro-batches of the step; the batch's own count when omitted.
    """
    logits, targets = logits_BTV[:, :-1], labels_BT[:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return total / (count if count is not None else (targets != -100).sum().clamp(min=1))


class Bridge:
    """Mixed in front of a Trainer class: the method's verbs, and a stop where the loss is not finite.

    Attributes
    ----------
    own_loss : bool
        Whether the loss is ours (`completion_loss` of the last logits only) or the trainer's own.
    without_logits : bool
        Whether the trainer's loss makes no logits, or none with a gradient (TRL's): a method that looks at
        them gets a forward pass of its own.
    token_loss : TokenLoss, optional
        What takes the place of each token's cross-entropy where the loss is ours.
    soft_targets : SoftTargets, optional
        What takes its place on replayed rows, where the loss is ours.
    prompt_loss : PromptLoss, optional
        Added to either.
    drift : callable, optional
        How far old outputs have moved, for the log; it is asked when the loss is logged.
    whole_batches : bool
        Whether a batch is that of all processes together, and each takes its part of it (`Collator`); else
        each process has batches of its own.
    bad_batch : Path
        Where the batch goes that made the loss infinite.

    Notes
    -----
    Of several processes each averages its gradient with the others': a loss that is a sum over tokens by the
    number of all processes' tokens is multiplied by their number before. The verbs get the bare model.
    """

    verbs: Verbs
    own_loss: bool = True
    without_logits: bool = False
    token_loss: TokenLoss | None = None
    soft_targets: SoftTargets | None = None
    prompt_loss: PromptLoss | None = None
    drift: Callable[[], Drift | None] | None = None
    whole_batches: bool = False
    bad_batch: Path
    _tr_loss: Tensor | None = None  # transformers' own sum of losses since the last that was logged
    _globalstep_last_logged: int = 0
    _unlogged: tuple[Tensor, int] | None = None  # the same, of the checkpoint that training goes on from

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()  # type: ignore[misc]
        return world.whole_batches(loader) if self.whole_batches else loader

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        verbs, batch, bare = self.verbs, dict(inputs), unwrapped(model)
        learns = torch.is_grad_enabled()  # an evaluation is of the task's own loss
        own, prompt_loss = learns and has(verbs, "loss"), self.prompt_loss if learns else None
        self._require_read(batch, prompt_loss)
        verbs.watch(bare, batch)
        if self.own_loss:
            loss, outputs = self._completion_loss(model, batch, num_items_in_batch)
            of_all = num_items_in_batch is not None and self.args.average_tokens_across_devices  # type: ignore[attr-defined]
            if of_all and world.size() > 1:
                loss = loss * world.size()
        else:
            looks = (own and verbs.looks) or prompt_loss is not None
            wanted = return_outputs or (looks and not self.without_logits)
            result = super().compute_loss(  # type: ignore[misc]
                model, model_inputs(batch), return_outputs=wanted, num_items_in_batch=num_items_in_batch
            )
            loss, outputs = result if wanted else (result, None)
            if looks and self.without_logits:
                inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
                outputs = model(**inputs, use_cache=False)
        # the trainer's loss may be this micro-batch's part of the step's; others are of a whole one
        part = _is_part(self, num_items_in_batch)
        parts = self.current_gradient_accumulation_steps if part else 1  # type: ignore[attr-defined]
        if prompt_loss is not None:
            loss = loss + prompt_loss(model, batch, outputs) / parts
        if own:
            loss = verbs.loss(bare, batch, outputs, loss * parts) / parts
        if learns and not torch.isfinite(loss):
            self._stop_diverged(float(loss.detach()), batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Without the rows' numbers, which generate() refuses; a batch of GRPO's is a list of rows."""
        known = model_inputs(inputs) if isinstance(inputs, Mapping) and ROWS in inputs else inputs
        return super().prediction_step(model, known, *args, **kwargs)  # type: ignore[misc]

    def _require_read(self, batch: dict[str, Any], prompt_loss: PromptLoss | None) -> None:
        """See that a batch has what the method and the loss on prompts read of it."""
        method = getattr(self.verbs, "name", type(self.verbs).__name__)
        wanted = {f"strategy '{method}'": self.verbs.reads}
        if prompt_loss is not None:
            wanted["training.lm_weight"] = ("input_ids", "labels")
        for who, keys in wanted.items():
            if missing := [key for key in keys if key not in batch]:
                raise ConfigError(
                    f"stage.trainer: {who} reads {', '.join(missing)} of each batch, and a batch of this "
                    f"trainer has {', '.join(batch)}. Use a trainer of prompts and completions (Trainer, or "
                    "SFTTrainer without packing), or a strategy that acts on weights alone, such as "
                    "attribution, ewc or o-lora."
                )

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self._unlogged is not None:  # transformers drops what a checkpoint had not logged yet
            (self._tr_loss, self._globalstep_last_logged), self._unlogged = self._unlogged, None
        with world.named_losses():
            loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.sync_gradients and has(self.verbs, "observe"):
            scaler = getattr(accelerator, "scaler", None)
            scale = 1.0 if scaler is None else 1.0 / scaler.get_scale()
            self.verbs.observe(unwrapped(model), self.state.global_step + 1, scale)  # type: ignore[attr-defined]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Old outputs' movement beside the loss, for whatever reads the log."""
        drift = self.drift() if self.drift is not None and "loss" in logs else None
        if drift is not None:
            logs[MOVED] = drift.percent
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        if self._tr_loss is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            since = torch.tensor(self._globalstep_last_logged)
            write_tensors(
                ours(folder, UNLOGGED), {"loss": world.stacked(self._tr_loss).mean(0), "since": since}
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        self.take_gathered(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if best is not None:  # routers, prompts and counts of that step go with its weights
            self._take_observed(best)

    def take_gathered(self, checkpoint: str | Path) -> None:
        """What is ours in a checkpoint; DeepSpeed, which loads its own, leaves it out."""
        self._take_observed(checkpoint)
        unlogged = ours(Path(checkpoint), UNLOGGED)
        if unlogged.exists():
            read = load_file(unlogged)
            self._unlogged = read["loss"].to(self.args.device), int(read["since"])  # type: ignore[attr-defined]

    def _take_observed(self, checkpoint: str | Path) -> None:
        gathered = ours(Path(checkpoint), OBSERVED)
        if gathered.exists():
            self.verbs.load_stage_state_dict(load_file(gathered))

    def _completion_loss(self, model: nn.Module, batch: dict[str, Any], count: Any) -> tuple[Tensor, Any]:
        # rows of an evaluation are numbered by themselves, and their logits may be wanted as they are
        learns = torch.is_grad_enabled()
        rows_S, batch = batch.get(ROWS) if learns else None, model_inputs(batch)
        labels, by_token = batch["labels"], self.token_loss or self.soft_targets
        if is_encoder_decoder(model):
            outputs = model(**batch)
            logits = outputs.logits
            if by_token is not None:
                return self._weighed(model, batch, logits, labels, rows_S, count), outputs
            total = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum"
            )
            return total / (count if count is not None else (labels != -100).sum().clamp(min=1)), outputs
        keep = labels.shape[1]
        if self.prompt_loss is None and learns:
            # rows are padded on the left, so completions end the row: logits before them are never needed
            keep -= max(int((labels != -100).any(0).float().argmax()) - 1, 0)
        extra = {"logits_to_keep": keep} if accepts(unwrapped(model), "logits_to_keep") else {}
        inputs = {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False, **extra}
        outputs = model(**inputs)
        if by_token is not None:  # position i predicts token i + 1; the last one predicts nothing here
            following = F.pad(labels[:, 1:], (0, 1), value=-100)[:, -keep:]
            return self._weighed(model, inputs, outputs.logits[:, -keep:], following, rows_S, count), outputs
        return completion_loss(outputs.logits[:, -keep:], labels[:, -keep:], count), outputs

    def _weighed(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        logits_SLV: Tensor,
        targets_SL: Tensor,
        rows_S: Tensor | None,
        count: Any,
    ) -> Tensor:
        """As `completion_loss`, with the loss of each token that the options ask for."""
        place_SL = targets_SL != -100
        logits_NV, targets_N = logits_SLV[place_SL], targets_SL[place_SL]
        if self.token_loss is not None:
            losses_N = self.token_loss(model, inputs, logits_NV, targets_N, place_SL)
        else:
            losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        if self.soft_targets is not None and rows_S is not None:
            losses_N = self.soft_targets.put_into(losses_N, model, inputs, logits_NV, place_SL, rows_S)
        total: Tensor = losses_N.sum()
        return total / (count if count is not None else place_SL.sum().clamp(min=1))

    def _stop_diverged(self, loss: float, batch: dict[str, Any]) -> None:
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
        with atomic_write(self.bad_batch) as temporary:  # whichever process had it
            save_tensors(temporary, tensors, {"step": str(step), "loss": str(loss)})
        raise TrainingDivergedError(
            f"The loss became {loss} at step {step}. The batch is saved in {self.bad_batch}. "
            "Lower training.learning_rate, set training.max_grad_norm, or use precision bf16 instead of fp16."
        )


def _is_part(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether a loss is this micro-batch's part of the step's, as the installed `Trainer` decides it."""
    said = trainer.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
    if said is not None:
        return bool(said)
    by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return bool(by_items or trainer.compute_loss_func is not None)


def bridged(trainer_class: type[Trainer], own_loss: bool = False) -> Any:
    """A Trainer class with the bridge in front of it."""
    values = {"own_loss": own_loss, "without_logits": is_trl(trainer_class)}
    return type(f"Bridge{trainer_class.__name__}", (Bridge, trainer_class), values)


def is_trl(trainer_class: type[Trainer]) -> bool:
    """Whether it is TRL's, or made from one of TRL's."""
    return any(base.__module__.startswith("trl.") for base in trainer_class.__mro__)
