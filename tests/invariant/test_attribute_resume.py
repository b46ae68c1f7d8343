"""`holdfast attribute`, killed and started again, ends with the prior of one that never was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import resume
from holdfast.attribution import passes
from holdfast.errors import StorageError
from holdfast.evaluation import faithfulness
from holdfast.models import save_model, tiny_llama
from holdfast.progress import Progress
from holdfast.runner.attribute import attribute_to_folder
from holdfast.storage import write_tensors
from holdfast.tasks import toy_suite, toy_tokenizer
from kills import Killed, dying

TOP_K = ("lrp", ["aggregate=topk", "top_k=3", "correct_only=false"])
ABSOLUTE = ("lrp", ["aggregate=absolute", "correct_only=false"])
FISHER = ("fisher", [])
SKETCHES = ("inputs", ["rank=3", "correct_only=false"])
DUE = resume.Partial.due


class Bench:
    """A tiny model and 11 rows: six batches of two."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.said, self.batches, self.dies_at = folder, list[str](), 0, 0
        tokenizer = toy_tokenizer()
        save_model(tiny_llama(tokenizer, hidden=16, layers=1), tokenizer, folder / "model")
        (task,) = toy_suite(["head"], train_rows=11, test_rows=1)
        rows = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in task.train]
        (folder / "data.jsonl").write_text("\n".join(rows))
        original = passes.Pass._batch

        def counted(inside: Any, *arguments: Any) -> Any:
            self.batches += 1
            if self.batches == self.dies_at:
                raise Killed
            return original(inside, *arguments)

        monkeypatch.setattr(passes.Pass, "_batch", counted)
        monkeypatch.setattr(resume.Partial, "due", True)  # after every batch

    def attribute(self, out: str, importance: str, options: list[str], dies_at: int = 0) -> tuple[bytes, Any]:
        """The prior's tensors and its record, without the time it took."""
        progress = Progress(quiet=True)
        progress.say = self.said.append  # type: ignore[method-assign]
        self.batches, self.dies_at = 0, dies_at
        attribute_to_folder(
            model=str(self.folder / "model"),
            data=self.folder / "data.jsonl",
            out=self.folder / out,
            importance=importance,
            assignments=["batch_size=2", *options],
            faithfulness=False,
            dtype="float32",
            seed=0,
            progress=progress,
        )
        record = json.loads((self.folder / out / "prior.json").read_text())
        assert record.pop("seconds") > 0
        return (self.folder / out / "prior.safetensors").read_bytes(), record

    def kill(self, out: str, importance: str, options: list[str], at: int = 5) -> Path:
        """Die in a batch; returns the file that is left."""
        with pytest.raises(Killed):
            self.attribute(out, importance, options, at)
        return self.folder / out / "partial" / "state.safetensors"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def batches(what: Any) -> int:
    """Of 11 samples. Embeddings and norms have no map to take many samples' gradients from: one at a time."""
    return 11 if what is FISHER else 6


@pytest.mark.parametrize("at", [2, 6])  # with slots still free in the top K, and with all of them taken
@pytest.mark.parametrize("what", [TOP_K, ABSOLUTE, FISHER], ids=["topk", "absolute", "fisher"])
def test_killed_attribution_ends_bit_identical(what: Any, at: int, bench: Bench) -> None:
    whole = bench.attribute("whole", *what)
    assert bench.batches == batches(what)
    assert bench.kill("broken", *what, at=at).is_file()
    assert bench.attribute("broken", *what) == whole
    assert bench.batches == batches(what) - (at - 1), "what was done is not done again"
    done = (1 if what is FISHER else 2) * (at - 1)
    assert any(f"continuing after {done} sample" in line for line in bench.said), bench.said
    assert sorted(p.name for p in (bench.folder / "broken").iterdir()) == ["prior.json", "prior.safetensors"]


@pytest.mark.parametrize("importance", ["lrp", "inputs"])
def test_attribution_killed_where_none_is_right_and_all_are_rated_ends_bit_identical(
    importance: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.importance.inputs.FULL_PASS", 1)
    whole = bench.attribute("whole", importance, [])
    assert whole[1]["none_right"]
    assert bench.batches == 12
    assert bench.kill("broken", importance, [], at=9).is_file()  # six batches look for right rows
    assert bench.attribute("broken", importance, []) == whole
    assert whole[1]["samples_used"] == 11


def test_killed_sketches_end_bit_identical(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.importance.inputs.FULL_PASS", 1)
    whole = bench.attribute("whole", *SKETCHES)
    assert bench.kill("broken", *SKETCHES, at=5).is_file()
    assert bench.attribute("broken", *SKETCHES) == whole
    assert bench.batches == 2, "what was done is not done again"


@pytest.mark.parametrize("what", [TOP_K, ABSOLUTE], ids=["topk", "absolute"])
def test_attribution_in_several_passes_killed_in_any_ends_bit_identical(what: Any, bench: Bench) -> None:
    importance, options = what
    one = bench.attribute("one", *what)[0]
    options = [*options, "memory_budget=4000"]
    whole = bench.attribute("whole", importance, options)
    assert whole[0] == one
    passes, rest = divmod(bench.batches, 6)
    assert (passes > 2, rest) == (True, 0)
    for at in (3, 6, 2):  # in the first pass; one that is resumed in its second; one in a later one
        bench.kill("broken", importance, options, at=at)
    assert bench.attribute("broken", importance, options) == whole
    assert any(f"continuing after 2 samples of pass 2 of {passes}" in line for line in bench.said), bench.said


def test_other_options_in_the_same_folder_start_over_and_say_so(bench: Bench) -> None:
    whole = bench.attribute("whole", *ABSOLUTE)
    bench.kill("broken", *TOP_K)
    assert bench.attribute("broken", *ABSOLUTE) == whole
    assert bench.batches == batches(ABSOLUTE)
    assert any("begun with another options; starting over" in line for line in bench.said)


def test_other_data_start_over_and_say_so(bench: Bench) -> None:
    bench.kill("broken", *FISHER)
    lines = (bench.folder / "data.jsonl").read_text().splitlines()
    (bench.folder / "data.jsonl").write_text("\n".join(lines[::-1]))
    bench.attribute("broken", *FISHER)
    assert bench.batches == batches(FISHER)
    assert any("begun with another data; starting over" in line for line in bench.said)


def test_a_torn_state_starts_over_and_says_so(bench: Bench) -> None:
    whole = bench.attribute("whole", *FISHER)
    file = bench.kill("broken", *FISHER)
    file.write_bytes(file.read_bytes()[:-100])
    assert bench.attribute("broken", *FISHER) == whole
    assert any("torn" in line and "starting over" in line for line in bench.said)


@pytest.mark.parametrize("values", ["[]", "{}", '"x"', "null", '{"identity": [1], "seconds": 0}', "{"])
def test_a_state_of_another_shape_starts_over_and_says_so(values: str, tmp_path: Path) -> None:
    said: list[str] = []
    state = resume.Partial(tmp_path, said.append)
    write_tensors(state.file, {}, {"values": values})
    assert state.load() is None
    assert len(said) == 1
    assert re.search(r"state\.safetensors: torn .*starting over", said[0])


def test_a_state_is_continued_only_by_the_same_work(tmp_path: Path) -> None:
    said: list[str] = []

    def work(**identity: Any) -> resume.Partial:
        partial = resume.Partial(tmp_path, said.append, "work")
        partial.identity = identity
        return partial

    assert work(seed=1).load() is None
    work(seed=1, data="a").save({"w": torch.arange(3.0)}, {"done": 3})
    assert not said
    tensors, values = work(seed=1, data="a").load() or ({}, {})
    assert (tensors["w"].tolist(), values) == ([0.0, 1.0, 2.0], {"done": 3})
    assert work(seed=2, data="b").load() is None
    assert said == [f"{tmp_path}/work.safetensors: begun with another seed, data; starting over."]
    assert work(seed=1, data="a", more=True).load() is None  # a part that the state doesn't know
    work().clear()
    assert not tmp_path.exists()


def test_a_full_disk_stops_no_attribution(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.attribute("whole", *FISHER)

    def full(*arguments: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(resume, "write_tensors", full)
    monkeypatch.setattr(resume.Partial, "due", DUE)
    monkeypatch.setattr(resume.Partial, "every", 0.0)
    assert bench.attribute("other", *FISHER) == whole
    assert sum("no space left" in line for line in bench.said) == 1


def test_saving_takes_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resume, "write_tensors", lambda *arguments: now.__setitem__(0, now[0] + 30.0))
    state, due = resume.Partial(tmp_path, print), []
    for _ in range(100):
        now[0] += 10.0
        due.append(state.due)
        if state.due:
            state.save({}, {})
    assert due.index(True) == 5, "a minute without a save"
    assert sum(due) == 4, "1000 s of work, and four saves of 30 s"


@pytest.fixture
def measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Attributes with the test of faithfulness into a folder; returns how many points it measured."""
    data = bench.folder / "data"
    data.mkdir()
    (bench.folder / "data.jsonl").rename(data / "train.jsonl")
    (data / "test.jsonl").write_text("".join((data / "train.jsonl").read_text().splitlines(True)[:3]))
    original = faithfulness.evaluate_encoded

    def run(out: str, *options: str, dies_at: int = 0) -> int:
        calls = [0]
        monkeypatch.setattr(faithfulness, "evaluate_encoded", dying(original, dies_at, calls))
        progress = Progress(quiet=True)
        progress.say = bench.said.append  # type: ignore[method-assign]
        attribute_to_folder(
            model=str(bench.folder / "model"),
            data=data,
            out=bench.folder / out,
            importance="magnitude",
            assignments=options,
            faithfulness=True,
            dtype="float32",
            seed=0,
            progress=progress,
        )
        return calls[0]

    return run


def test_a_killed_test_of_faithfulness_goes_on_where_it_was(bench: Bench, measured: Any) -> None:
    assert measured("whole") == 21
    with pytest.raises(Killed):
        measured("broken", dies_at=10)
    assert measured("broken") == 21 - 9
    assert any("continuing after 9 points" in line for line in bench.said)
    whole, broken = ((bench.folder / out / "faithfulness.json").read_text() for out in ("whole", "broken"))
    assert broken == whole
    assert not (bench.folder / "broken" / "partial").exists()


def test_points_of_another_evaluation_are_not_used(bench: Bench, measured: Any) -> None:
    with pytest.raises(Killed):
        measured("broken", dies_at=10)
    assert measured("broken", "evaluation.max_new_tokens=1") == 21
    assert any("begun with another evaluation; starting over" in line for line in bench.said)


def test_points_that_are_torn_are_not_used(bench: Bench, measured: Any) -> None:
    with pytest.raises(Killed):
        measured("broken", dies_at=10)
    (bench.folder / "broken" / "partial" / "faithfulness.safetensors").write_text('{"identity": {')
    assert measured("broken") == 21
    assert any("torn" in line and "starting over" in line for line in bench.said)
