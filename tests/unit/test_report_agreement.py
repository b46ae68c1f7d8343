from __future__ import annotations

import itertools

import pytest
import torch
from report_runs import TASKS, write_prior, write_run
from safetensors.torch import save_file

from holdfast.config import write_recorded
from holdfast.errors import RunDirectoryError
from holdfast.importance.agreement import agreement
from holdfast.importance.prior import ImportancePrior
from holdfast.report.agreement_figures import agreement_block
from holdfast.report.read import AttributionRecord, RunRecord, read
from holdfast.report.summary import distinct, grouped
from holdfast.report.task_agreement import task_agreements


def found_in(*paths):
    records = [read(path) for path in paths]
    runs = distinct([record for record in records if isinstance(record, RunRecord)])
    return task_agreements(grouped(runs), [r for r in records if isinstance(r, AttributionRecord)])


def prior_of(path, stage):
    from safetensors.torch import load_file

    return ImportancePrior(load_file(path / "tasks" / stage / "prior" / "prior.safetensors"))


def test_a_run_s_tasks_are_compared_pair_by_pair_as_the_priors_themselves_are(tmp_path):
    path = write_run(tmp_path / "r", "gate", "attribution", protected=True, shared=0.5)
    (found,) = found_in(path)
    assert list(found.tables) == list(itertools.combinations(TASKS, 2))
    expected = agreement(prior_of(path, "02-reverse"), prior_of(path, "04-lookup"))
    table = found.tables["reverse", "lookup"]
    assert list(table) == list(expected)
    for block, (overlap, spearman) in table.items():
        assert overlap == pytest.approx(expected[block].overlap)
        assert spearman == pytest.approx(expected[block].correlation)


def test_single_task_and_sequential_priors_are_drawn_together_and_told_apart(tmp_path):
    found = found_in(
        write_run(tmp_path / "1", "gate", "attribution", protected=True, shared=0.7),
        write_run(tmp_path / "2", "gate", "attribution", protected=True, prior_from="single_task", seed=1),
    )
    figures: dict = {}
    block = agreement_block(figures, found)
    assert block is not None
    assert [look["name"] for look in block.curves] == [
        "gate · prior_from=sequential, sequential",
        "gate · prior_from=single_task, single-task",
    ]
    assert len({look["dash"] for look in block.curves}) == 2
    assert [meaning.split(":")[0] for meaning in block.meanings] == ["single-task", "sequential"]
    sequential, single = (trace["y"] for trace in figures["correlation-all"]["data"])
    assert len(single) == 4
    assert max(single) < min(sequential)


def test_the_selector_offers_the_mean_and_each_pair(tmp_path):
    found = found_in(write_run(tmp_path / "r", "gate", "attribution", protected=True))
    figures: dict = {}
    block = agreement_block(figures, found)
    assert block is not None
    assert [name for _, name in block.choices[:3]] == [
        "mean of all 6 pairs",
        "copy and reverse",
        "copy and count",
    ]
    assert set(figures) == {f"{m}-{key}" for m in ("overlap", "correlation") for key, _ in block.choices}
    mean = figures["overlap-all"]["data"][0]
    pairs = [figures[f"overlap-{key}"]["data"][0]["y"][0] for key, _ in block.choices[1:]]
    assert mean["y"][0] == pytest.approx(sum(pairs) / 6, abs=1e-3)
    assert mean["customdata"][0].endswith(f", {min(pairs):.2f} to {max(pairs):.2f} by pair")


def test_of_a_long_stream_each_task_is_offered_with_the_one_before_it(tmp_path):
    tasks = list("abcdefg")
    found = found_in(write_run(tmp_path / "r", "gate", tasks=tasks, protected=True))
    block = agreement_block({}, found)
    assert block is not None
    assert [name for _, name in block.choices] == [
        "mean of all 21 pairs", *(f"{a} and {b}" for a, b in itertools.pairwise(tasks))
    ]  # fmt: skip


def test_two_orders_of_a_pair_are_one_pair(tmp_path):
    found = found_in(
        write_run(tmp_path / "1", "gate", tasks=["a", "b"], protected=True),
        write_run(tmp_path / "2", "gate", tasks=["b", "a"], protected=True, seed=1),
    )
    assert list(found[0].tables) == [("a", "b")]
    block = agreement_block({}, found)
    assert block is not None
    assert [name for _, name in block.choices] == ["a and b"]


def test_attributions_of_one_model_are_compared_as_in_a_s_sequential_case(tmp_path):
    for task, model in (("x", "m"), ("y", "m"), ("z", "other")):
        write_prior(tmp_path / task, seed=ord(task), shared=0.5, tasks=[task], model_digest=model)
    (found,) = found_in(*(tmp_path / task for task in "xyz"))
    assert list(found.tables) == [("x", "y")]
    assert (found.group, found.kind, found.label) == (None, "one_model", "lrp of 2 tasks")


def test_only_weights_that_all_the_priors_cover_are_compared(tmp_path):
    path = write_run(tmp_path / "r", "grows", tasks=["a", "b"], protected=True)
    name, other = "model.layers.0.q.weight", "model.layers.1.q.weight"
    values = torch.arange(12.0)
    for folder, tensors in (
        ("01-a", {name: values, other: values.clone()}),
        ("02-b", {name: values, other: values[:6].clone()}),
    ):
        save_file(tensors, path / "tasks" / folder / "prior" / "prior.safetensors")
    (found,) = found_in(path)
    assert found.tables["a", "b"] == {("", 0): pytest.approx((1, 1))}


def test_a_run_with_one_prior_or_none_is_not_compared(tmp_path):
    assert found_in(write_run(tmp_path / "r", "plain"), write_run(tmp_path / "s", "x", artefacts=False)) == []
    assert agreement_block({}, []) is None


def test_a_config_that_is_no_yaml_is_named(tmp_path):
    path = write_run(tmp_path / "r", "gate", protected=True)
    (path / "config.yaml").write_text("strategy: {name: [")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: damaged"):
        found_in(path)


def test_a_config_that_is_cut_off_is_named(tmp_path):
    """Of YAML that ends early the beginning is YAML too: a page would show fewer settings than there were."""
    path = write_run(tmp_path / "r", "gate", protected=True)
    write_recorded(path / "config.yaml", {"strategy": {"name": "gate"}, "training": {"epochs": 3}})
    found_in(path)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text[: text.index("training")])
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: damaged \(its end is missing\)"):
        found_in(path)


def test_a_run_without_a_config_is_compared_without_saying_on_which_model(tmp_path):
    path = write_run(tmp_path / "r", "gate", protected=True)
    (path / "config.yaml").unlink()
    (found,) = found_in(path)
    assert found.kind == ""
