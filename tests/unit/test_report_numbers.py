from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from report_runs import stream_matrix, write_attribution, write_run
from safetensors.torch import save_file

from holdfast.errors import DataError
from holdfast.report.facts import costs
from holdfast.report.forgotten import forgotten
from holdfast.report.headline import headline
from holdfast.report.importance_map import importance_map
from holdfast.report.lines import lines_of
from holdfast.report.read import AttributionRecord, RunRecord, read
from holdfast.report.summary import distinct, grouped, table
from holdfast.report.weight_figures import short_modules


@pytest.fixture
def run(tmp_path):
    """Make a run by label and matrix, and read it."""
    count = 0

    def make(label, strategy="sequential", **options) -> RunRecord:
        nonlocal count
        count += 1
        record = read(write_run(tmp_path / str(count), label, strategy, **options))
        assert isinstance(record, RunRecord)
        return record

    return make


def sentence(*runs):
    return headline(grouped(distinct(runs))).replace("\u00a0", " ")


# Two tasks: `a` falls from 100 to `end` when `b` is learned, so BWT is end - 100 and learning accuracy 99.
def two(end):
    return [[0.0, 0.0], [100.0, 0.0], [end, 98.0]]


def test_headline_states_the_share_of_forgetting_that_was_kept(run):
    plain = run("sequential", matrix=two(52.0), tasks="ab")
    held = run("attribution", "attribution", matrix=two(88.0), tasks="ab")
    assert sentence(plain, held) == (
        "attribution keeps 75 % of what sequential forgets (BWT −12 vs −48), learning accuracy 99 vs 99."
    )


def test_headline_takes_the_method_with_the_best_average_not_the_one_that_froze_everything(run):
    plain = run("sequential", matrix=two(52.0), tasks="ab")
    held = run("held", "attribution", matrix=two(80.0), tasks="ab")
    frozen = run("frozen", "attribution", matrix=[[0.0, 0.0], [60.0, 0.0], [60.0, 0.0]], tasks="ab")
    assert sentence(plain, frozen, held).startswith("held keeps 58 %")


@pytest.mark.parametrize(
    ("end", "claim"),
    [
        (100.0, "gate keeps all of what sequential forgets (BWT 0 vs −48)"),
        (52.0, "gate forgets as much as sequential (BWT −48 vs −48)"),
        (12.0, "gate forgets more than sequential (BWT −88 vs −48)"),
    ],
)
def test_headline_is_honest_at_the_ends(run, end, claim):
    plain = run("sequential", matrix=two(52.0), tasks="ab")
    assert sentence(plain, run("gate", "attribution", matrix=two(end), tasks="ab")).startswith(claim)


def test_headline_says_so_when_there_was_nothing_to_keep(run):
    plain = run("sequential", matrix=two(99.5), tasks="ab")
    said = sentence(plain, run("gate", "attribution", matrix=two(100.0), tasks="ab"))
    assert said.startswith("sequential forgets almost nothing here")


def test_headline_of_a_single_run(run):
    assert sentence(run("sequential", matrix=two(52.0), tasks="ab")) == (
        "sequential learns its tasks to 99 %, forgets 48 points of it, and ends at 75 % on average."
    )


def test_headline_uses_means_over_seeds(run):
    runs = [run("sequential", matrix=two(e), tasks="ab", seed=s) for s, e in enumerate((50.0, 54.0))]
    runs += [
        run("gate", "attribution", matrix=two(e), tasks="ab", seed=s) for s, e in enumerate((86.0, 90.0))
    ]
    assert sentence(*runs).startswith("gate keeps 75 % of what sequential forgets (BWT −12 vs −48)")
    assert sentence(*runs).endswith("; means of 2 runs.")


def test_headline_of_an_unfinished_run_tells_how_far_it_got(run):
    matrix = [*stream_matrix(90, 0.5)[:3], [None] * 4, [None] * 4]
    said = sentence(run("gate", "attribution", matrix=matrix, finished=False))
    assert said == "gate has learned 2 of 4 tasks so far, at 68 % on average on those."


def test_headline_of_several_unfinished_runs_takes_the_furthest(run):
    full = stream_matrix(90, 0.5)
    runs = [
        run(name, matrix=[*full[: seen + 1], *[[None] * 4] * (4 - seen)], finished=False)
        for name, seen in (("near", 1), ("far", 3))
    ]
    assert sentence(*runs).startswith("No run has finished yet: far has learned 3 of 4 tasks so far")


def test_headline_of_the_upper_bound_alone(run):
    joint = run("joint", "multitask", matrix=[[0.0, 0.0], [None, None], [96.0, 98.0]], tasks="ab")
    assert sentence(joint) == "joint learns all 2 tasks at once and reaches 97 %."


def test_headline_of_an_attribution_names_the_widest_gap(tmp_path):
    record = read(write_attribution(tmp_path))
    assert isinstance(record, AttributionRecord)
    assert headline([], [record]).replace("\u00a0", " ") == (
        "Zeroing the 5 % of weights called most important leaves 12 % accuracy on copy; "
        "as many random weights leave 90 %."
    )


def test_table_marks_the_best_of_each_column_but_not_the_upper_bound(run):
    rows = table(
        grouped(
            [
                run("sequential", matrix=two(52.0), tasks="ab", seconds=10),
                run("gate", "attribution", matrix=two(88.0), tasks="ab", seconds=20),
                run("joint", "multitask", matrix=[[0.0] * 2, [None] * 2, [99.0] * 2], tasks="ab", seconds=1),
            ]
        )
    )
    best = [[cell.best for cell in row.cells] for row in rows]
    # AP, FWT, BWT, forgetting, learning accuracy, seconds; equal values are no distinction
    assert best[0] == [False, False, False, False, False, True]
    assert best[1] == [True, False, True, True, False, False]
    assert not any(best[2])
    assert rows[2].cells[2].text == "–"


def seeds(run, label, ends, strategy="attribution"):
    return [run(label, strategy, matrix=two(end), tasks="ab", seed=s) for s, end in enumerate(ends)]


def test_headline_claims_nothing_where_the_interval_of_the_difference_holds_zero(run):
    plain = seeds(run, "sequential", (50.0, 60.0, 52.0), "sequential")
    said = sentence(*plain, *seeds(run, "gate", (58.0, 55.0, 55.0)))
    assert said.startswith(
        "What gate keeps is not told apart from what sequential does: the 95 % interval of the difference, "
        "−5 to 8, holds 0 (BWT −44 vs −46)"
    )
    assert sentence(*plain, *seeds(run, "gate", (58.0, 65.0, 55.0))).startswith("gate keeps 12 %")


def test_table_marks_what_can_not_be_told_apart_from_the_best_as_well(run):
    ends = {"sequential": (50.0, 60.0, 52.0), "gate": (88.0, 80.0, 85.0), "anchor": (84.0, 86.0, 86.0)}
    rows = table(grouped(distinct([r for label, e in ends.items() for r in seeds(run, label, e)])))
    assert {r.name: r.cells[0].best for r in rows if not r.member} == {
        "sequential": False,
        "gate": True,
        "anchor": True,
    }
    even = table(grouped(distinct([r for n in ("gate", "anchor") for r in seeds(run, n, ends[n])])))
    assert not any(cell.best for row in even for cell in row.cells[:4])


def test_table_shows_the_mean_over_seeds_and_each_seed(run):
    runs = [run("gate", matrix=two(e), tasks="ab", seed=s) for s, e in enumerate((50.0, 54.0))]
    rows = table(grouped(distinct(runs)))
    assert [row.name for row in rows] == ["gate", "seed 0", "seed 1"]
    assert (rows[0].cells[2].text, rows[0].cells[2].spread) == ("−48.0", "± 2.8")
    assert [row.cells[2].text for row in rows[1:]] == ["−50.0", "−46.0"]


def test_mean_matrix_keeps_what_not_every_run_measured_empty(run):
    other = two(60.0)
    other[1][1] = None
    group = grouped([run("x", matrix=two(50.0), tasks="ab"), run("x", matrix=other, tasks="ab")])[0]
    assert group.mean_matrix() == [[0.0, 0.0], [100.0, None], [55.0, 98.0]]


def test_runs_of_one_label_are_told_apart_by_seed_or_else_by_folder(run):
    first, second = run("x", tasks="ab", matrix=two(1.0)), run("x", tasks="ab", matrix=two(2.0))
    assert [r.name for r in distinct([first, second])] == ["x · 1", "x · 2"]
    reseeded = replace(second, metrics=second.metrics.model_copy(update={"seed": 7}))
    assert [r.name for r in distinct([first, reseeded])] == ["x · seed 0", "x · seed 7"]


def test_costs_scale_to_the_slowest_run_and_drop_phases_that_no_run_had(run):
    rows = costs([run("a", seconds=100.0), run("b", seconds=50.0)])
    assert [phase["key"] for phase in rows[0]["phases"]] == ["train", "evaluate", "rest"]
    assert sum(float(phase["width"]) for phase in rows[0]["phases"]) == pytest.approx(100, abs=0.1)
    assert sum(float(phase["width"]) for phase in rows[1]["phases"]) == pytest.approx(50, abs=0.1)


def test_forgotten_answers_are_those_right_after_learning_and_wrong_at_the_end(run):
    found = forgotten([run("x", matrix=stream_matrix(100, 0.5))])
    # 40 questions: all right when learned; at the end 4 + 96 / 8, / 4, / 2 percent of them are
    assert [(task.task, task.right, task.lost) for task in found] == [
        ("copy", 40, 34), ("reverse", 40, 29), ("count", 40, 19)
    ]  # fmt: skip
    assert all(len(task.examples) == 5 for task in found)
    example = found[0].examples[0]
    assert example.learned == example.expected != example.final


def test_nothing_is_called_forgotten_when_the_test_sets_differ(run):
    record = run("x", matrix=stream_matrix(100, 0.5))
    file = record.path / "tasks/04-lookup/predictions/copy.jsonl"
    file.write_text(file.read_text().replace("copy: ", "other: "))
    assert [task.task for task in forgotten([record])] == ["reverse", "count"]


def test_importance_map_is_the_mean_over_all_weights_of_a_module(tmp_path):
    save_file(
        {
            "model.embed.weight": torch.full((2, 2), 9.0),
            "model.layers.0.self_attn.q_proj.weight": torch.tensor([[1.0, -3.0], [2.0, 2.0]]),
            "model.layers.0.self_attn.q_proj.bias": torch.tensor([7.0]),
            "model.layers.10.self_attn.q_proj.weight": torch.ones(1, 1),
            "model.layers.2.mlp.up_proj.weight": torch.full((1, 2), 5.0),
        },
        tmp_path / "prior.safetensors",
    )
    heat = importance_map(tmp_path / "prior.safetensors")
    assert heat.layers == ["0", "2", "10"]  # by number, not by name
    assert heat.modules == ["self_attn.q_proj", "mlp.up_proj"]
    assert heat.means == [[3.0, None], [None, 5.0], [1.0, None]]


def test_importance_map_tells_encoder_from_decoder(tmp_path):
    names = ("decoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q")
    save_file({f"{n}.weight": torch.full((1,), float(i)) for i, n in enumerate(names)}, tmp_path / "p")
    heat = importance_map(tmp_path / "p")
    assert heat.layers == ["encoder 0", "decoder 0"]
    assert heat.means == [[1.0], [0.0]]


def test_a_torn_prior_is_named(tmp_path):
    (tmp_path / "prior.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match=r"prior\.safetensors: not readable as safetensors"):
        importance_map(tmp_path / "prior.safetensors")


def test_module_names_are_shortened_only_while_they_stay_distinct():
    assert short_modules(["self_attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_modules(["attn.c_proj", "mlp.c_proj"]) == ["attn.c_proj", "mlp.c_proj"]


def test_runs_of_one_label_and_another_setting_are_two_methods_and_say_in_what(run):
    def held(pull, seed):
        made = run("hold", matrix=two(50.0), tasks="ab", seed=seed)
        return replace(
            made, config=f"seed: {seed}\nstrategy: {{mechanism: {{name: anchor, pull: {pull}}}}}\n"
        )

    weak, strong = grouped(distinct([held(5, 0), held(24, 0), held(5, 1)]))
    assert [weak.label, strong.label] == ["hold · pull=5", "hold · pull=24"]
    assert [len(weak.runs), len(strong.runs)] == [2, 1]
    assert [line.record.name for line in lines_of([weak, strong])] == ["hold · pull=5", "hold · pull=24"]
