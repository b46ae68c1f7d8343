"""vLLM as the engine of tests: what it is given, what comes back, and what is told where it can't be.

A stand-in has vLLM's place here (`stand_ins/vllm`). With HOLDFAST_VLLM_PYTHON, the Python of an environment
that has vLLM, the slow test asks the real one.
"""

from __future__ import annotations

import importlib.util
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import holdfast_cli
from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import ConfigError, HoldfastError, ModelError
from holdfast.evaluation.vllm_engine import EngineOptions, Vllm
from holdfast.learner.config import LearnerEvaluationOptions
from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from holdfast.tasks.task import Example, Task
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
missing = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
# answers of different lengths, and one that is rated without being written
TASKS = [
    Task("short", [], [Example("ab" * i, "b") for i in range(1, 7)]),
    Task("long", [], [Example("cd" * i, "cd" * 9) for i in range(1, 4)]),
    Task("ranked", [], [Example("ab", "b")], metric="options", options=("a", "b")),
]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "stand_ins"))


def model_of(kind: str) -> Any:
    """A model whose answers differ from prompt to prompt, and an adapter that changes them."""
    torch.manual_seed(1)
    model: Any = tiny_llama(TOKENIZER, hidden=64, layers=2, heads=2)  # vLLM knows heads of 32
    if kind == "adapter":
        model = add_lora(model, LoraOptions(r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def asked(model: Any, folder: Path, engine: Any) -> tuple[dict[str, float], dict[str, str]]:
    """The scores and the predictions' files."""
    with Learner(
        model, TOKENIZER, "sequential", folder=folder / "skills", evaluation={"engine": engine}
    ) as learner:
        scores = learner.evaluate(TASKS, folder)
    files = {path.name: path.read_text() for path in (folder / "predictions").iterdir()}
    return scores, files


@pytest.mark.parametrize("kind", ["weights", "adapter"])
@pytest.mark.usefixtures("stand_in")
def test_answers_are_those_of_this_process_and_the_model_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    here, there = asked(model, tmp_path / "a", "transformers"), asked(model, tmp_path / "b", "vllm")
    assert here == there
    assert len(set(here[1]["short.jsonl"].splitlines())) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    left = {path.name for path in (tmp_path / "b/skills").iterdir()}
    assert "vllm.log" in left
    assert not [name for name in left if name.startswith(".asked-")]  # the model's copy is gone


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "start",
            r"vLLM can't answer: ValueError: No available memory for the cache blocks. Try less. "
            r"\(all that it said is in .*vllm.log\). Mend it with evaluation.engine.arguments",
        ),
        ("answers", r"vLLM can't answer: it ended with 7 \(all that it said is in .*vllm.log\)"),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_where_it_breaks_the_error_says_why_and_where_to_look(
    where: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "skills/.asked-by-a-killed-process").mkdir(parents=True)
    engine = {"name": "vllm", "arguments": {"break_at": where}}
    with pytest.raises(ConfigError, match=message):
        asked(model_of("weights"), tmp_path, engine)
    assert not list((tmp_path / "skills").glob(".asked-*"))


@pytest.mark.usefixtures("stand_in")
def test_ctrl_c_while_it_answers_ends_it_at_once(tmp_path: Path) -> None:
    options = EngineOptions(name="vllm", arguments={"break_at": "never"})
    log = tmp_path / "log"
    with (
        suppress(KeyboardInterrupt),
        Vllm(tmp_path, options, dtype=torch.float32, longest=8, log=log) as vllm,
    ):
        process = vllm._process
        vllm._send({"prompts": [[1]], "max_tokens": [2], "stop_ids": []})
        started = time.monotonic()
        raise KeyboardInterrupt
    assert process.poll() is not None
    assert time.monotonic() - started < 20


def begin(model: Any, strategy: Any, engine: Any) -> None:
    """Begin a task, which must be refused before its block."""
    rows = [Example("a", "b")]
    with (
        Learner(model, TOKENIZER, strategy, evaluation={"engine": engine}) as learner,
        learner.task("t", train=rows, test=[Example("b", "a")]),
    ):
        raise AssertionError("the task began")


@missing
def test_without_vllm_nothing_is_begun(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", evaluation={"engine": "vllm"})
    with pytest.raises(ConfigError, match=r"vLLM isn't installed for .*python.* an environment of its own"):
        run(validate(RunConfig, values, "test"))
    assert not (tmp_path / "run/tasks").exists()
    with pytest.raises(
        ConfigError, match=r"evaluation.engine.python: /no/python can't be run \(.*No such file"
    ):
        begin(tiny_model("llama"), "sequential", {"name": "vllm", "python": "/no/python"})


@pytest.mark.usefixtures("stand_in")
def test_what_it_can_not_run_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, strategy: Any, error: type[HoldfastError], message: str) -> None:
        with pytest.raises(error, match=message):
            begin(model, strategy, "vllm")

    refused(tiny_model("t5"), "sequential", ModelError, "is an encoder-decoder model, which vLLM doesn't run")
    refused(
        tiny_model("llama"), "l2p", ConfigError, "under strategy 'l2p' answers come from more than a plain"
    )
    from peft import PromptTuningConfig, get_peft_model

    prompted = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    refused(prompted, "sequential", ModelError, "prompts in front of it")
    packed = tiny_model("llama")
    packed.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(
        packed, "sequential", ModelError, "is quantised, so a folder of its weights isn't what answers here"
    )
    monkeypatch.setattr("holdfast.world.size", lambda: 2)
    refused(tiny_model("llama"), "sequential", ConfigError, "2 processes share the test rows")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"python": "x"}, "`python` does nothing with `transformers`"),
        ({"name": "vllm", "arguments": {"model": "x", "dtype": "y"}}, "say model, dtype; leave it out"),
        ("vlm", "'transformers' or 'vllm'"),
    ],
)
def test_options_that_do_nothing_are_refused(engine: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(LearnerEvaluationOptions, {"engine": engine}, "test")


@missing
def test_a_folder_recorded_with_it_can_be_asked_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skills = tmp_path / "skills"
    with monkeypatch.context() as there:
        there.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "stand_ins"))
        with (
            Learner(
                model_of("weights"), TOKENIZER, "sequential", folder=skills, evaluation={"engine": "vllm"}
            ) as learner,
            learner.task("t", train=[Example("a", "b")], test=[Example("b", "a")]) as learning,
        ):
            learning.train()
    with Learner.load(skills, model_of("weights"), TOKENIZER) as learner:
        assert len(learner.answer(["a", "b"])) == 2
        with (
            pytest.raises(ConfigError, match="vLLM isn't installed for"),
            learner.task("u", train=[Example("b", "b")]),
        ):
            raise AssertionError("the task began")


@missing
def test_check_tells_that_it_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{model: {toy: true}, tasks: {source: toy}, strategy: sequential}")
    done = holdfast_cli("check", config, f"output={tmp_path / 'run'}", "evaluation.engine=vllm")
    assert done.exit_code == 2
    assert "vLLM isn't installed for" in " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.skipif("HOLDFAST_VLLM_PYTHON" not in os.environ, reason="HOLDFAST_VLLM_PYTHON names no Python")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_the_real_one_answers_as_this_process_does(kind: str, tmp_path: Path) -> None:
    engine = {"name": "vllm", "python": os.environ["HOLDFAST_VLLM_PYTHON"]}
    model = model_of(kind)
    assert asked(model, tmp_path / "a", "transformers") == asked(model, tmp_path / "b", engine)
