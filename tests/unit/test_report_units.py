from __future__ import annotations

import pytest
from report_runs import lora_names, stream_matrix, write_json, write_run, write_units

from holdfast.errors import DataError
from holdfast.report.importance_map import importance_map
from holdfast.report.read import RunRecord, read
from holdfast.report.summary import distinct, grouped
from holdfast.report.unit_figures import order_note, unit_labels, unit_map, unit_panels
from holdfast.report.units import Unit, unit_of, unit_table


def record(path) -> RunRecord:
    run = read(path)
    assert isinstance(run, RunRecord)
    return run


def table_of(path):
    table = unit_table(record(path), importance_map)
    assert table is not None
    return table


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.layers.3.self_attn.q_proj[7]", Unit(("", 3), "self_attn.q_proj", 7)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", Unit(("", 0), "self_attn.q_proj.lora_A")),
        ("model.layers.1.mlp.up_proj.weight", Unit(("", 1), "mlp.up_proj")),
        ("model.layers.1.mlp.up_proj.bias", Unit(("", 1), "mlp.up_proj.bias")),
        (
            "decoder.block.2.layer.1.EncDecAttention.v[0]",
            Unit(("decoder", 2), "layer.1.EncDecAttention.v", 0),
        ),
        ("model.embed_tokens[1]", Unit(None, "model.embed_tokens", 1)),
    ],
)
def test_a_unit_is_read_from_its_name(name, unit):
    assert unit_of(name) == unit


def test_units_stand_by_layer_then_in_flow_then_by_rank_whatever_order_the_run_wrote(tmp_path):
    names = [
        "lm_head.weight",
        "model.layers.10.self_attn.q_proj[0]",
        "model.layers.2.self_attn.v_proj[0]",
        "model.layers.2.self_attn.q_proj[10]",
        "model.layers.2.self_attn.q_proj[9]",
    ]
    table = table_of(write_units(write_run(tmp_path / "r", "kif"), names))
    assert unit_labels(table.units) == [
        "layer 2, self_attn.q_proj, rank 9",
        "layer 2, self_attn.q_proj, rank 10",
        "layer 2, self_attn.v_proj, rank 0",
        "layer 10, self_attn.q_proj, rank 0",
        "lm_head",
    ]
    written = record(tmp_path / "r").stages[2].units
    assert written is not None
    assert table.scores[2] == [written.scores[i] for i in (4, 3, 2, 1, 0)]


def test_accumulated_scores_start_with_the_first_task_s_own(tmp_path):
    table = table_of(write_units(write_run(tmp_path / "r", "kif"), lora_names()))
    assert table.accumulated is not None
    assert table.accumulated[0] == table.scores[0]
    assert table.accumulated[1] != table.scores[1]


def test_a_row_is_scaled_to_0_and_1_and_keeps_its_raw_scores_for_the_hover(tmp_path):
    path = write_run(tmp_path / "r", "kif", tasks=["a", "b"])
    for folder, scores in zip(
        sorted((path / "tasks").iterdir()), ([2e-7, 4e-7, 3e-7], [5.0, 5.0, 5.0]), strict=True
    ):
        names = [f"model.layers.{i}.q.weight" for i in range(3)]
        write_json(folder / "units.json", {"kind": "matrix", "names": names, "scores": scores})
    table = table_of(path)
    heat = unit_map(table, table.scores)["data"][0]
    assert heat["z"] == [[0, 1, 0.5], [0, 0, 0]]  # no unit stands out where all are the same
    assert heat["customdata"] == [[2e-7, 4e-7, 3e-7], [5, 5, 5]]
    assert table.accumulated is None


def test_runs_without_units_show_the_mean_importance_of_their_matrices(tmp_path):
    path = write_run(tmp_path / "r", "gate", protected=True)
    table = table_of(path)
    heat = importance_map(path / "tasks" / "03-count" / "prior" / "prior.safetensors")
    assert not table.measured
    assert table.scores[2] == [mean for row in heat.means for mean in row]
    assert len(table.units) == 4 * 7
    assert order_note(table).startswith(
        "28 units. Within a layer, from left to right: q_proj, k_proj, v_proj"
    )


def test_one_prior_alone_makes_no_figure_across_tasks(tmp_path):
    matrix = [*stream_matrix(90, 0.5)[:2], [None] * 4, [None] * 4, [None] * 4]
    path = write_run(tmp_path / "r", "gate", matrix=matrix, protected=True, finished=False)
    assert unit_table(record(path), importance_map) is None


def test_an_encoder_and_a_decoder_have_axes_of_their_own(tmp_path):
    names = lora_names(("decoder.block", "encoder.block"), layers=12, ranks=8)
    table = table_of(write_units(write_run(tmp_path / "r", "kif"), names))
    figure = unit_map(table, table.scores)
    assert [trace["x"][0] for trace in figure["data"]] == [
        "encoder 0, self_attn.q_proj, rank 0",
        "decoder 0, self_attn.q_proj, rank 0",
    ]
    assert [len(trace["x"]) for trace in figure["data"]] == [12 * 16] * 2
    upper, lower = (figure["layout"][axis]["domain"] for axis in ("yaxis", "yaxis2"))
    assert upper[1] == 1
    assert lower[0] == pytest.approx(0, abs=1e-9)
    assert lower[1] < upper[0]
    assert len(figure["layout"]["shapes"]) == 2 * 11  # a line between any two layers
    told = [note["text"] for note in figure["layout"]["annotations"]]
    assert told == ["encoder", *map(str, range(12)), "decoder", *map(str, range(12))]


def test_hundreds_of_units_widen_the_figure_until_each_has_three_pixels(tmp_path):
    few = write_units(write_run(tmp_path / "few", "few"), lora_names())
    many = write_units(write_run(tmp_path / "many", "many"), lora_names(layers=24, ranks=8))
    panels, measured = unit_panels({}, grouped([record(few), record(many)]), importance_map)
    assert panels[0].min_width < 320
    assert panels[1].min_width >= 3 * 24 * 16
    assert measured


def test_the_selector_offers_each_seed_and_what_was_accumulated(tmp_path):
    runs = distinct(
        [
            record(write_units(write_run(tmp_path / str(s), "kif", seed=s), lora_names(), seed=s))
            for s in range(2)
        ]
    )
    figures: dict = {}
    (panel,), _ = unit_panels(figures, grouped(runs), importance_map)
    assert [name for _, name in panel.choices] == [
        "seed 0, for each task alone", "seed 0, accumulated up to each task",
        "seed 1, for each task alone", "seed 1, accumulated up to each task",
    ]  # fmt: skip
    assert set(figures) == {panel.prefix + value for value, _ in panel.choices}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": [1.0]}, "names, scores and accumulated differ in length"),
        ({"accumulated": [1.0]}, "names, scores and accumulated differ in length"),
        ({"kind": "neuron"}, "kind: Input should be 'matrix' or 'lora'"),
    ],
)
def test_a_wrong_units_file_is_named(tmp_path, change, told):
    path = write_run(tmp_path / "r", "kif")
    right = {"kind": "lora", "names": ["a[0]", "a[1]"], "scores": [1.0, 2.0], "accumulated": None}
    write_json(path / "tasks" / "02-reverse" / "units.json", {**right, **change})
    with pytest.raises(DataError, match=rf"02-reverse/units\.json: .*{told}"):
        read(path)
