"""What replay is asked for beyond a draw of rows: surprise, old rows beside each batch, and general text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.surprise import most_surprising, surprises
from holdfast.learner.learner import Learner
from holdfast.models import ModelOptions, load_model, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.tasks import Encoded, Encoder, Example, Template, toy_suite, toy_tokenizer
from holdfast.tasks.general import read_texts, with_texts
from holdfast.tasks.memory import Memory, MemoryOptions, Rehearsal, RehearsalOptions
from holdfast.tasks.sources import build_stream
from holdfast.training.beside import Beside
from holdfast.training.bridge import Bridge
from holdfast.training.loop import Collator
from kills import Killed, dying
from tiny_runs import tiny_run
from tiny_t5 import tiny_t5

TOKENIZER = toy_tokenizer()


def config_of(output: Path, **replay: Any) -> RunConfig:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 3}
    values = tiny_run(output, strategy={"name": "replay", **replay}, training=training)
    values["tasks"]["order"] = ["copy", "flip"]
    return validate(RunConfig, values, source="test")


# surprise


def test_surprise_is_the_answers_mean_negative_log_probability() -> None:
    model = tiny_llama(TOKENIZER, hidden=16, layers=1)
    (task,) = toy_suite(["copy"], 5, 1)
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=False)
    for row, found in zip(task.train, surprises(model, encoder, task.train, batch_size=2), strict=True):
        encoded = encoder(row)
        ids = torch.tensor([encoded.prompt_ids + encoded.completion_ids])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, len(encoded.prompt_ids) - 1 : -1].log_softmax(-1)
        picked = [float(log_p[t, token]) for t, token in enumerate(encoded.completion_ids)]
        assert found == pytest.approx(-sum(picked) / len(picked), abs=1e-4)


def test_a_memory_by_surprise_keeps_the_rows_that_surprise_most(tmp_path: Path) -> None:
    rows = [Example(str(i), "x") for i in range(4)]
    assert most_surprising(rows, [0.1, 3.0, 0.2, 3.0], 2) == [rows[1], rows[3]]
    config = config_of(tmp_path / "run", memory={"sampling": "surprise", "count": 5})
    run(config)
    folder = tmp_path / "run" / "tasks" / "01-copy"
    kept = [row["prompt"] for row in json.loads((folder / "strategy.json").read_text())["memory"]["rows"]]
    model, _ = load_model(ModelOptions(path=str(folder / "model")))
    task = build_stream(config.tasks, 0).tasks[0]
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=False)
    found = surprises(model, encoder, task.train)
    order = sorted(range(32), key=lambda i: -found[i])
    assert {task.train[i].prompt for i in order[:5]} == set(kept)


def test_a_memory_by_surprise_has_to_ask() -> None:
    (task,) = toy_suite(["copy"], 5, 1)
    with pytest.raises(ValueError, match="`sampling: surprise` needs `write`"):
        Memory(MemoryOptions(sampling="surprise")).add(task, 0)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"name": "replay", "memory": "none"}, "without `general` leaves nothing to replay"),
        ({"name": "replay", "memory": {"sampling": "none", "count": 5}}, "`count` doesn't apply to"),
        ({"name": "replay", "memory": "none", "ratio": 0.5}, "`ratio: 0.5` is for replayed rows"),
        ({"name": "replay", "memory": "none", "mixing": "batches"}, "`mixing: batches` is for replayed rows"),
        ({"name": "kpig", "memory": "none"}, "leaves nothing to replay"),
        ({"name": "sapt-lora", "memory": "none"}, "leaves nothing to replay"),
        ({"name": "kif-m", "memory": "none"}, "leaves nothing to replay"),
    ],
)
def test_a_memory_of_nothing_is_refused_where_rows_are_wanted(
    strategy: dict[str, Any], message: str, tmp_path: Path
) -> None:
    general = {"file": str(tmp_path / "a.txt")}
    given = {**strategy, "general": general} if len(strategy) > 2 else strategy
    values = tiny_run(tmp_path / "run", strategy=given)
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, values, source="test")


# beside each batch


def test_each_batch_gets_its_share_of_old_rows_and_the_same_batch_the_same() -> None:
    old = [Encoded([1, 5], [i]) for i in range(10)]
    beside = Beside(old, 0.25, 0)
    found = beside.of_batch([3, 1, 2, 8, 4, 7])
    assert len(found) == 2
    assert found == beside.of_batch([3, 1, 2, 8, 4, 7])
    assert [beside.of_batch([i, i + 1, i + 2]) for i in range(5)] != [beside.of_batch([0, 1, 2])] * 5
    assert all(old[-1 - number] == row for number, row in found)
    assert len(Beside(old[:2], 0.9, 0).of_batch([1])) == 9, "few rows come again"
    model = tiny_llama(TOKENIZER, hidden=16, layers=1)
    batch = Collator(model, TOKENIZER, beside=beside)([(i, Encoded([1, 6], [7])) for i in range(6)])
    assert batch["input_ids"].shape[0] == 8
    assert (batch["row_ids"] < 0).tolist() == [False] * 6 + [True] * 2


def test_mixing_by_batches_makes_no_more_steps_and_a_killed_run_ends_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = {"memory": {"count": 6}, "ratio": 0.4, "mixing": "batches"}
    run(config_of(tmp_path / "whole", **replay))
    log = json.loads((tmp_path / "whole/tasks/02-flip/training.json").read_text())
    assert log["steps"] == 8
    assert dict(check(config_of(tmp_path / "new", **replay)).estimate)["optimizer steps"].startswith("16 ")
    with monkeypatch.context() as patch:
        patch.setattr(Bridge, "training_step", dying(Bridge.training_step, 13))
        with pytest.raises(Killed):
            run(config_of(tmp_path / "broken", **replay))
    run(config_of(tmp_path / "broken", **replay))
    one, two = (
        load_file(tmp_path / n / "tasks/02-flip/model/model.safetensors") for n in ("whole", "broken")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trl_makes_its_own_batches() -> None:
    (first, second) = toy_suite(["copy", "flip"], 8, 2)
    model = tiny_llama(TOKENIZER, hidden=16, layers=1)
    with Learner(
        model, TOKENIZER, {"name": "replay", "mixing": "batches"}, training={"max_steps": 1, "batch_size": 4}
    ) as learner:
        with learner.task("copy", train=first.train) as stage:
            stage.train()
        trl = pytest.importorskip("trl")
        with (
            pytest.raises(ConfigError, match=r"SFTTrainer makes its own batches.*Use `mixing: rows`"),
            learner.task("flip", train=second.train) as stage,
        ):
            stage.trainer(trl.SFTTrainer)


# general text


def test_general_text_is_its_share_of_all_rows_from_the_first_task_on(tmp_path: Path) -> None:
    rows, texts = [Example(str(i), "x") for i in range(90)], [Example.text(c) for c in "abc"]
    mixed = with_texts(rows, texts, 0.1, "s")
    assert (len(mixed), sum(row.raw for row in mixed)) == (100, 10)
    assert mixed == with_texts(rows, texts, 0.1, "s")
    file = tmp_path / "general.txt"
    file.write_text("abc def\n\nhead over\n")
    config = config_of(tmp_path / "run", memory="none", general={"file": str(file), "share": 0.2})
    assert config.memory == "none"
    assert dict(check(config).estimate)["optimizer steps"] == "20 (10, 10 by stage)", (
        "40 rows, 8 of them text"
    )
    run(config)
    assert json.loads((tmp_path / "run/tasks/01-copy/training.json").read_text())["steps"] == 10


def test_a_text_is_learned_whole_and_without_a_frame() -> None:
    template = Template(prompt="{bos}{prompt}=", max_prompt_tokens=4, max_completion_tokens=3)
    ids = TOKENIZER.encode("abcdefgh", add_special_tokens=False)
    row = Encoder(TOKENIZER, template, encoder_decoder=False)(Example.text("abcdefgh"))
    assert (row.prompt_ids, row.completion_ids) == ([TOKENIZER.bos_token_id], ids[:7])
    assert row.completion_cut == len(ids) - 7
    both = Encoder(TOKENIZER, template, encoder_decoder=True)(Example.text("abcdefgh"))
    assert both.completion_ids == ids[:7]
    assert tiny_t5(TOKENIZER).config.is_encoder_decoder
    again = Example.of_record(Example.text("a").record())
    assert again.raw
    assert "text" not in Example("a", "b").record()


def test_a_general_text_keeps_what_only_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    texts = ["abc\u2028def", "g\x85h"]
    begun = "\ufeff"  # as some editors begin a file
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes((begun + "\r\n".join(lines)).encode())
    (tmp_path / "a.txt").write_bytes((begun + "\r\n".join(texts)).encode())
    for name in ("a.jsonl", "a.txt"):
        assert [row.completion for row in read_texts(str(tmp_path / name))] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "fine"}\n{"words": 1}\n',
            r"a.jsonl:2: no column 'text'; columns of this row: wo",
        ),
        ("a.txt", "\n \n", r"a\.txt: the data set is empty"),
        ("missing.txt", None, r"no '.*missing\.txt'; give a file"),
    ],
)
def test_a_file_without_texts_is_named(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    file = str(tmp_path / name)
    rehearsal = Rehearsal(validate(RehearsalOptions, {"memory": "none", "general": {"file": file}}, "test"))
    rehearsal.learned([], 0)  # what is never trained on needs no file
    for asks in (rehearsal.check, lambda: rehearsal.mixed([Example("a", "b")], 0)):
        with pytest.raises(DataError, match=rf"^replay\.general\.file: .*{message}"):
            asks()


def test_general_text_is_read_from_every_kind_of_file(tmp_path: Path) -> None:
    texts = [Example.text("abc"), Example.text("def")]
    rows = [{"text": row.completion, "score": i, "meta": {"a": 1}} for i, row in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("text,score\nabc,0\ndef,1\n")
    (tmp_path / "E.TXT").write_text("abc\n \ndef\n")
    (tmp_path / "F.JSONL").write_text((tmp_path / "a.jsonl").read_text())
    for file in sorted(tmp_path.iterdir()):
        assert read_texts(str(file)) == texts, file.name
    (tmp_path / "g.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert read_texts(str(tmp_path / "g.jsonl")) == [Example("a", "b")]
