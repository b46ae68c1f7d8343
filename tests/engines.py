"""accelerate's FSDP2 and DeepSpeed on CPUs over gloo: what it has for GPUs only, told that there are some."""

from __future__ import annotations

import os
from typing import Any

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
ZERO3 = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
ENGINES = {"FSDP2": FSDP2, "ZeRO-2": {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO-3": ZERO3}


def on_cpus(engine: str) -> None:
    """What `accelerate launch` would set, in one of several processes; it is for the rest of the process."""
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ.update(ENGINES[engine])
    own = state.PartialState.__init__

    def with_gloo(self: Any, cpu: bool = False, **options: Any) -> None:
        own(self, cpu=True, **{k: v for k, v in options.items() if k != "backend"})
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.__dict__["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = with_gloo  # type: ignore[method-assign]


def script(engine: str, folder: str, hold: str) -> None:
    """Somebody's own script with ProtectCallback under it, which starts no world of its own."""
    from pathlib import Path

    import torch

    from under_deepspeed import trained

    on_cpus(engine)
    found = trained(Path(folder), hold, None, told_of_gpus=True)
    if os.environ["RANK"] == "0":
        torch.save(found, f"{folder}/found.pt")


def command(engine: str, *arguments: str) -> None:
    """The command line under it."""
    import sys

    on_cpus(engine)
    from holdfast.cli import app

    sys.argv = ["holdfast", *arguments]
    app()
