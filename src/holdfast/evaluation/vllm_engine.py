"""vLLM as what answers test rows: a process of its own, which gets the model as a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from holdfast.config import Options
from holdfast.errors import ConfigError, ModelError
from holdfast.evaluation import vllm_process
from holdfast.evaluation.answers import Progress
from holdfast.models import is_encoder_decoder, quantisation_of, unwrapped
from holdfast.models.adapters import is_adapted
from holdfast.tasks.encode import Encoded

PATIENCE = 60  # seconds that it gets to end by itself
_OURS = ("model", "dtype", "max_model_len", "skip_tokenizer_init")


class EngineOptions(Options):
    """What generates the answers to test rows."""

    name: Literal["transformers", "vllm"] = "transformers"
    python: str | None = Field(
        None,
        description="vllm: the interpreter of the environment that vLLM is installed in; default: this one. "
        "vLLM asks for its own versions of torch and transformers, so an environment of its own is usual",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="vllm: further arguments of vllm.LLM, such as {tensor_parallel_size: 2}",
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> EngineOptions:
        if self.name != "vllm":
            self.refuse_ignored(("python", "arguments"), f"with `{self.name}`")
        if given := [name for name in _OURS if name in self.arguments]:
            raise ValueError(f"`arguments`: the model and the rows say {', '.join(given)}; leave it out")
        return self

    @property
    def interpreter(self) -> str:
        """The interpreter that vLLM is run by."""
        return sys.executable if self.python is None else str(Path(self.python).expanduser())


def check_vllm(options: EngineOptions) -> None:
    """See that the interpreter is there and finds vLLM; nothing of it is imported.

    Raises
    ------
    ConfigError
    """
    asked = "import importlib.util as u, sys; sys.exit(3 if u.find_spec('vllm') is None else 0)"
    try:
        found = subprocess.run(
            [options.interpreter, "-c", asked], check=False, capture_output=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"evaluation.engine.python: {options.interpreter} can't be run ({error}). Give the Python of an "
            "environment that has vLLM, such as /envs/vllm/bin/python."
        ) from error
    if found.returncode:
        raise ConfigError(
            f"evaluation.engine: vLLM isn't installed for {options.interpreter}. Make it an environment of "
            "its own (python -m venv vllm-env; vllm-env/bin/pip install vllm) and name that one's Python, "
            "evaluation.engine.python: vllm-env/bin/python; or leave evaluation.engine out."
        )


def require_whole(model: Any) -> None:
    """See that vLLM could be given the model as a folder of plain weights.

    Raises
    ------
    ModelError
    """
    model, why = unwrapped(model), ""
    if is_encoder_decoder(model):
        why = "is an encoder-decoder model, which vLLM doesn't run"
    elif quantisation_of(model) is not None:
        why = "is quantised, so a folder of its weights isn't what answers here"
    elif is_adapted(model) and not hasattr(model, "merge_and_unload"):
        why = "has prompts in front of it, which can't be merged into its weights"
    if why:
        raise ModelError(f"evaluation.engine: {type(model).__name__} {why}. Leave evaluation.engine out.")


class Vllm:
    """A process in which vLLM answers as one model does; closed when the ``with`` block ends.

    Parameters
    ----------
    folder : Path
        The model, whole.
    options : EngineOptions
    dtype : torch.dtype
        In which the model computes.
    longest : int
        Tokens of the longest prompt and its answer.
    log : Path
        What vLLM prints, overwritten.

    Raises
    ------
    ConfigError
        vLLM doesn't start, or ends.
    """

    def __init__(
        self, folder: Path, options: EngineOptions, *, dtype: torch.dtype, longest: int, log: Path
    ) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [options.interpreter, vllm_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # so that it can be ended with all that it starts
            )
        arguments = {
            "enforce_eager": True,  # compiling takes longer than a test set
            "generation_config": "vllm",  # not the model's own sampling
            "seed": 0,
            "disable_log_stats": True,
            **_memory(),
            **options.arguments,
            "model": str(folder),
            "skip_tokenizer_init": True,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest,
        }
        try:
            self._send(arguments)
            self._next()  # it is ready
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(PATIENCE if error is None else 0)

    def greedy(
        self,
        rows: Sequence[Encoded],
        max_new_tokens: Sequence[int],
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Greedy answers as token ids, in the order of `rows`; each may be as long as is said of it."""
        prompts = [list(row.prompt_ids) for row in rows]
        self._send({"prompts": prompts, "max_tokens": list(max_new_tokens), "stop_ids": list(stop_ids)})
        while "answers" not in (told := self._next()):
            if progress is not None:
                progress(told["done"], len(rows))
        return told["answers"]

    def close(self, patience: float = 0) -> None:
        """End the process, and what it started; it gets so many seconds to do so by itself."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(OSError, subprocess.TimeoutExpired):
                process.stdin.close()  # nothing more to read: it ends
                process.wait(patience)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def _send(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or a part of a line
            raise self._ended()
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise self._ended(told["error"])
        return told

    def _ended(self, why: str = "") -> ConfigError:
        if not why:
            code = self._process.wait()
            why = f"it ended with {code}"
        return ConfigError(
            f"evaluation.engine: vLLM can't answer: {' '.join(why.split())[:500]} (all that it said is in "
            f"{self.log}). Mend it with evaluation.engine.arguments, or leave evaluation.engine out."
        )


def _memory() -> dict[str, float]:
    """The share of a GPU that vLLM may take: nine tenths of what is free beside the model that is trained."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 3)}
