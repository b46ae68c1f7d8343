"""A held training of transformers' Trainer under the real DeepSpeed ZeRO, on CPUs over gloo.

There its processes don't share out rows (accelerate doesn't know of several): all see the same ones, so what
they end with is what one process ends with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import training_args

from holdfast import ProtectCallback, world
from ranks import HOLDS, rows
from tiny_models import tiny_model


def config(stage: int, **of_zero: Any) -> dict[str, Any]:
    """Of DeepSpeed; of stage 3 pieces of all weights, and several sub-groups."""
    third = {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
    return {
        "zero_optimization": {"stage": stage, **(third if stage == 3 else {}), **of_zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def trained(folder: Path, hold: str, deepspeed: dict[str, Any] | None, **more: Any) -> dict[str, Tensor]:
    """The weights after two epochs, and how far old outputs moved."""
    from transformers import Trainer, TrainingArguments

    from holdfast.importance import compute_prior
    from holdfast.tasks import Encoder, toy_tokenizer
    from holdfast.tasks.encode import Template
    from holdfast.training.loop import Collator, Rows

    resume, in_pieces = more.pop("resume", None), more.pop("loaded_in_pieces", False)
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    encoded = Encoder(tokenizer, Template(), encoder_decoder=False).many(rows(12, "june"))
    importance, options = HOLDS[hold]
    prior = compute_prior(model, encoded, {"name": importance}, pad_id=tokenizer.pad_token_id)
    collate = Collator(model, tokenizer)
    arguments = TrainingArguments(
        str(folder),
        deepspeed=deepspeed,
        use_cpu=deepspeed is None and not more.pop("told_of_gpus", False),
        **{
            "per_device_train_batch_size": 3,
            "num_train_epochs": 2,
            "learning_rate": 0.1,
            "optim": "sgd",
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "remove_unused_columns": False,
            **more,
        },
    )
    if in_pieces:  # as from_pretrained does once there are arguments with ZeRO-3
        if world.leads():
            model.save_pretrained(folder / "model")
        world.barrier()
        model = type(model).from_pretrained(folder / "model")
        assert all(map(world.in_pieces, model.parameters()))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Rows(encoded),
        data_collator=lambda items: {k: v for k, v in collate(items).items() if k != "row_ids"},
        callbacks=[ProtectCallback(prior, **options)],
    )
    trainer.train(resume_from_checkpoint=resume)
    found = {name: world.whole(p).detach().clone() for name, p in model.named_parameters()}
    logs = [entry["old_outputs_moved"] for entry in trainer.state.log_history if "old_outputs_moved" in entry]
    return {**found, **({"moved": torch.tensor(logs)} if importance == "inputs" else {})}


def each_rank(folder: str, hold: str, stage: int, more: dict[str, Any], of_zero: dict[str, Any]) -> None:
    """In one of several processes; rank 0 saves what it found."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    training_args.is_torch_bf16_gpu_available = lambda: True  # it asks for a GPU, DeepSpeed doesn't
    world.start()
    found = trained(Path(folder), hold, config(stage, **of_zero), **more)
    if world.leads():
        torch.save(found, f"{folder}/found.pt")
