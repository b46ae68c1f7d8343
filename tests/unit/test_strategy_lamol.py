"""LAMOL: the loss on whole rows written out, whose token a row stands behind, rows before each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contexts import context_of
from holdfast.config import validate
from holdfast.errors import DataError
from holdfast.evaluation.writing import Written
from holdfast.models import is_encoder_decoder
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.strategies.generation import row_key, whole_rows, writing_loss
from holdfast.strategies.lamol import Lamol
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.task import Example, Task
from kills import Killed, kill_when
from prompt_cases import KINDS, PAD, STREAM, TOKENIZER, batch_of, model_of, rows_of, stage_of, strategy_of
from tiny_runs import tiny_run

END = TOKENIZER.eos_token_id
ZERO = torch.zeros((), dtype=torch.float64)
TRAINING = {"epochs": 7, "batch_size": 8, "learning_rate": 5e-3, "checkpoint_steps": 20}
CUT = {"max_prompt_tokens": 24, "max_completion_tokens": 12}


def by_hand(model: Any, vector: Tensor, row: list[int]) -> list[Tensor]:
    """-log p of each token of a whole row behind a vector: one row, no padding."""
    table = model.get_input_embeddings()
    if is_encoder_decoder(model):
        read = torch.cat([vector[None], table(torch.tensor([END]))])[None]
        start = torch.tensor([[model.config.decoder_start_token_id, *row[:-1]]])
        logits = model(inputs_embeds=read, decoder_input_ids=start).logits[0]
    else:
        logits = model(inputs_embeds=torch.cat([vector[None], table(torch.tensor(row))])[None]).logits[0]
    return [-logits[t].log_softmax(-1)[token] for t, token in enumerate(row)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_on_rows_is_that_of_every_token_behind_its_vector(kind: str) -> None:
    model, rows = model_of(kind).double(), rows_of(kind)[:4]
    batch = batch_of(kind, rows)
    vectors = torch.randn(4, 1, model.config.hidden_size, dtype=torch.float64)
    read, whole = whole_rows(batch, is_encoder_decoder(model))
    assert [tuple(ids.tolist()) for ids in read] == [row_key(r, is_encoder_decoder(model)) for r in rows]
    assert [ids.tolist() for ids in whole] == [r.prompt_ids + r.completion_ids for r in rows]
    losses = [x for v, ids in zip(vectors, whole, strict=True) for x in by_hand(model, v[0], ids.tolist())]
    loss = writing_loss(model, vectors, whole, PAD, END)
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def begun(kind: str, number: int, written: list[tuple[str, Example]] | None = None, **options: Any) -> Any:
    """The strategy in a task, the earlier ones learned without training, and what it trains on."""
    strategy, model = strategy_of("lamol", **options), model_of(kind).double()
    for earlier in range(number):
        strategy.begin(context_of(model), stage_of(earlier))
        strategy.end(context_of(model), stage_of(earlier))
    strategy.tasks.write = lambda *args: written or []  # type: ignore[method-assign]
    strategy.begin(context_of(model), stage_of(number))
    examples = strategy.examples(context_of(model), stage_of(number))
    strategy._tokens.double()
    return strategy, model, examples


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_each_row_is_learned_behind_its_own_tasks_token(kind: str) -> None:
    old = Example("copy abcd=", "abcd")
    strategy, model, examples = begun(kind, 1, [("copy", old)])
    assert examples[-1] == old
    encoder = context_of(model).encoder
    rows = [encoder(examples[0]), encoder(old)]
    batch = batch_of(kind, rows)
    loss = strategy.loss(model, batch, None, ZERO + 1.0)
    whole = whole_rows(batch, is_encoder_decoder(model))[1]
    vectors = strategy._tokens.rows[[1, 0]][:, None]  # the new task's, the old one's
    expected = 1.0 + 0.25 * writing_loss(model, vectors, whole, PAD, END)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    other = 1.0 + 0.25 * writing_loss(model, vectors[[1, 0]], whole, PAD, END)
    assert float(loss.detach()) != pytest.approx(float(other.detach()))
    loss.backward()
    assert bool((strategy._tokens.rows.grad.abs().sum(1) > 0).all())


def test_one_token_for_all_needs_prompts_that_end_alike(tmp_path: Path) -> None:
    strategy, model, _ = begun("llama", 2, token="global")
    assert strategy._tokens.rows.shape == (1, model.config.hidden_size)
    other = Lamol(strategy.options)
    other.begin(context_of(model_of("llama")), stage_of(0))
    other.tasks.end(other._tokens)
    rows = [Example("is it a?", "x"), Example("is it b?", "y")]
    stage = type(stage_of(0))("ask", (Task("ask", rows, rows),), 1, 2)
    with pytest.raises(DataError, match=r"'ask': its prompts begin or end otherwise .* Use `strategy.token"):
        other.begin(context_of(model_of("llama")), stage)


@pytest.mark.parametrize("name", ["lamol", "lfpt5"])
def test_tasks_that_end_otherwise_are_refused_before_the_first_is_trained(tmp_path: Path, name: str) -> None:
    for task, end in (("ask", "?"), ("say", "=")):
        rows = [{"prompt": f"{task} {letter}{end}", "completion": letter} for letter in "abcd"]
        for split in ("train", "test"):
            file = tmp_path / "data" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"source": "jsonl", "path": str(tmp_path / "data")}
    strategy = {"name": name, "token": "global"}
    config = validate(RunConfig, tiny_run(tmp_path / "run", strategy=strategy, tasks=tasks), source="test")
    (problem,) = check(config).problems
    assert problem.startswith("task 'say': its prompts begin or end otherwise than those of 'ask'")
    with pytest.raises(DataError, match="'say': its prompts begin or end otherwise"):
        run(config)
    assert not list((tmp_path / "run").rglob("*ask*"))


def test_leaving_a_task_leaves_no_trace_in_the_model() -> None:
    model = model_of("llama")
    before = (sorted(model.state_dict()), [p.requires_grad for p in model.parameters()])
    strategy = strategy_of("lamol")
    strategy.begin(context_of(model), stage_of(0))
    assert sorted(model.state_dict()) != before[0]
    strategy.end(context_of(model), stage_of(0))
    assert (sorted(model.state_dict()), [p.requires_grad for p in model.parameters()]) == before


def config_of(output: Path, *order: str, **options: Any) -> RunConfig:
    strategy = {"name": "lamol", "ratio": 0.5, "writing": {"tries": 2}, **options}
    values = tiny_run(output, strategy=strategy, training=TRAINING, template=CUT)
    values["tasks"]["order"] = list(order)
    return validate(RunConfig, values, source="test")


def outcome(folder: Path) -> dict[str, str]:
    texts = {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("memory.json*"))}
    return texts | {"matrix": json.dumps(json.loads((folder / "metrics.json").read_text())["matrix"])}


def test_rows_are_written_before_a_task_and_a_killed_run_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run(config_of(tmp_path / "whole", "copy", "flip"))
    assert (metrics["memory"], metrics["rehearses"], metrics["label"]) == ("generated", False, "lamol")
    (path,) = (tmp_path / "whole").rglob("memory.json")
    assert path.parent == tmp_path / "whole/tasks/02-flip/written/01-copy"
    counts = json.loads(path.read_text())
    left_out = sum(counts[key] for key in ("empty", "unfinished", "repeated", "copied", "unsure"))
    assert counts["asked"] == 16, "half as many as the task has"
    assert 0 < counts["kept"] <= 16
    assert counts["written"] - left_out >= counts["kept"]
    broken = config_of(tmp_path / "broken", "copy", "flip")
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", 28 + 25)  # in task 2, with written rows
        with pytest.raises(Killed):
            run(broken)
    run(broken)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_as_many_rows_are_written_of_each_earlier_task_and_bad_ones_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, model = strategy_of("lamol", ratio=1.0), model_of("llama")
    for earlier in range(2):
        strategy.begin(context_of(model), stage_of(earlier))
        strategy.end(context_of(model), stage_of(earlier))
    asked: list[tuple[Any, ...]] = []

    def write_rows(answers: Any, encoder: Any, opening: Any, options: Any, **values: Any) -> Written:
        asked.append((values["count"], opening.shared, values["writer"].source(torch.ones(1, 1), None)))
        return Written(
            values["count"], written=5, unfinished=4, rows=[Example("copy ab=", "ab")], confidence=[0.0]
        )

    monkeypatch.setattr("holdfast.strategies.generation.write_rows", write_rows)
    context = context_of(model, tmp_path)
    strategy.begin(context, stage_of(2))
    rows = strategy.examples(context, stage_of(2))
    assert [(count, shared) for count, shared, _ in asked] == [(4, ()), (4, ())], (
        "the token stands for the task"
    )
    for number, (_, _, vector) in enumerate(asked):
        assert torch.equal(vector[0, 0], strategy.tasks.rows[number])
    assert (len(rows), rows[-1]) == (10, Example("copy ab=", "ab"))
    counts = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("memory.json"))]
    assert [(c["unfinished"], c["kept"]) for c in counts] == [(4, 1), (4, 1)]


def test_check_counts_written_rows(tmp_path: Path) -> None:
    found = dict(check(config_of(tmp_path / "run", "copy", "flip", "head")).estimate)
    assert found["optimizer steps"] == "112 (28, 42, 42 by stage)", "48 rows in the later two"


def test_the_papers_choices_are_the_defaults() -> None:
    options = Lamol.Options()  # type: ignore[call-arg]
    assert (options.weight, options.ratio, options.token) == (0.25, 0.2, "task")  # type: ignore[attr-defined]
    assert options.writing.top_k == 20  # type: ignore[attr-defined]
    assert WritingOptions().top_k is None
    assert len(STREAM) == 3
