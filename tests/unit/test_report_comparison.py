"""The report's section about a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_runs import figures_of, write_run
from report_sweeps import write_sweep

from holdfast.errors import DataError
from holdfast.report import write_report


def page_of(out: Path, *folders: Path) -> tuple[str, str]:
    """The page's HTML, and the text of its comparison section without markup."""
    page = write_report(folders, out / "report.html").read_text(encoding="utf-8")
    section = re.search(r'<section id="comparison">.*?</section>', page, re.DOTALL)
    return page, re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section.group() if section else ""))


def test_a_sweep_is_its_runs_and_their_paired_differences(tmp_path):
    folder = write_sweep(tmp_path / "sweep", failed=True)
    page, text = page_of(tmp_path, folder, write_run(tmp_path / "other", "other", artefacts=False))
    for row in json.loads((folder / "compare.json").read_text())["rows"]:
        mean, sd = (f"{row['scores']['ap'][key]:.1f}" for key in ("mean", "sd"))
        assert f"{row['label']}" in text
        assert f"{mean} ± {sd}" in text
        if row["differences"]:
            low, high = (f"{row['differences']['ap'][key]:.1f}" for key in ("low", "high"))
            assert f"[+{low}, +{high}]" in text
    assert "plain reference" in text
    assert "no [room]" in text
    assert "<b>x</b>" not in page.replace("&lt;b&gt;", "")
    figures = figures_of(page)
    curve, point = figures["tradeoff-0-test"]["data"]
    assert len(curve["x"]) == 2
    assert (curve["name"], point["name"]) == ("ewc", "plain")
    assert "matrix-3-0" in figures  # the run that was given beside the sweep is a method of its own


def test_a_page_without_a_sweep_has_no_such_section(tmp_path):
    assert page_of(tmp_path, write_run(tmp_path / "r", "r", artefacts=False))[1] == ""


def test_a_torn_compare_json_is_named(tmp_path):
    (tmp_path / "compare.json").write_text('{"rows": [')
    with pytest.raises(DataError, match=r"compare\.json: not readable as JSON"):
        write_report([tmp_path], tmp_path / "r.html")
