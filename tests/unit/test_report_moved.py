"""The report's section on how far old outputs moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import TASKS, stream_matrix, write_run

from holdfast.report.figures import style_of
from holdfast.report.moved_figures import moved_and_lost, moved_panels, rank_correlation
from holdfast.report.page import build
from holdfast.report.read import RunRecord, read

DRIFTS = (0.0009, 0.0016, 0.0144)  # of stages 2 to 4: 3, 4 and 12 %


def held_by_inputs(path: Path, label: str = "inputs") -> RunRecord:
    write_run(path, label, "attribution", matrix=stream_matrix(90, 0.9), protected=True)
    for file, drift in zip(sorted(path.glob("tasks/*/protection.json")), DRIFTS, strict=True):
        maps = {f"model.layers.{i}.mlp.up_proj.weight": drift * factor for i, factor in ((0, 1), (1, 4))}
        file.write_text(json.dumps({**json.loads(file.read_text()), "drift": {"maps": maps, "total": drift}}))
    record = read(path)
    assert isinstance(record, RunRecord)
    return record


def test_each_task_stands_where_the_later_stages_moved_it_and_with_what_it_lost(tmp_path: Path) -> None:
    found = moved_and_lost(held_by_inputs(tmp_path / "run"))
    assert [point.task for point in found] == list(TASKS[:3])
    assert [point.moved for point in found] == pytest.approx([13.0, 160**0.5, 12.0])  # 3, 4, 12; 4, 12; 12
    assert [point.lost for point in found] == pytest.approx([90 - 66.7, 90 - 73.7, 90 - 81.4], abs=0.05)


def test_layers_are_root_mean_squares_over_stages_in_percent(tmp_path: Path) -> None:
    figures: dict[str, dict] = {}  # type: ignore[type-arg]
    panels = moved_panels(figures, [(held_by_inputs(tmp_path / "run"), style_of(0, joint=False))])
    assert [panel.title for panel in panels] == ["By layer", "Against what was forgotten"]
    (curve,) = figures["moved-layers"]["data"]
    mean = 100 * (sum(DRIFTS) / 3) ** 0.5
    assert curve["y"] == pytest.approx([mean, 2 * mean])


def test_page_has_the_section_only_where_something_was_measured(tmp_path: Path) -> None:
    runs = [held_by_inputs(tmp_path / "a"), held_by_inputs(tmp_path / "b")]
    page = build(runs, None)
    assert "How far old outputs moved" in page
    assert "rank correlation 1.00 over 6 points" in page
    plain = read(write_run(tmp_path / "plain", "plain"))
    assert "How far old outputs moved" not in build([plain], None)


def test_rank_correlation_shares_ranks_of_equal_values_and_needs_some_that_differ() -> None:
    assert rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
