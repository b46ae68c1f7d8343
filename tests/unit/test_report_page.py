from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from report_runs import figures_of, stream_matrix, write_attribution, write_json, write_run

from holdfast.errors import DataError, StorageError
from holdfast.evaluation.predictions import predictions_file
from holdfast.report import write_report
from holdfast.report.packed import plotly, unpack

JOINT = [[4.0] * 4, [None] * 4, [None] * 4, [None] * 4, [97.0] * 4]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        # plotly's own code is no part of what is checked, and slow to parse
        self.feed(re.sub(r"<script[^>]*>.*?</script>", "", html, flags=re.DOTALL))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())

    @property
    def sections(self) -> list[str | None]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]

    @property
    def plots(self) -> list[str | None]:
        return [attrs["data-figure"] for _, attrs in self.tags if attrs.get("class") == "plot"]


@pytest.fixture
def page(tmp_path):
    def make(*runs, title=None) -> tuple[Page, dict, str]:
        html = write_report(runs, tmp_path / "out" / "report.html", title).read_text(encoding="utf-8")
        return Page(html), figures_of(html), html

    return make


def test_of_tasks_that_were_only_learned_at_once_no_order_is_told(tmp_path, page):
    joint, plain = (
        write_run(tmp_path / name, name, name, matrix=matrix)
        for name, matrix in (("multitask", JOINT), ("sequential", stream_matrix(90.0, 20.0)))
    )
    alone, both = (page(*runs)[0].text for runs in ((joint,), (joint, plain)))
    assert "4 tasks, learned at once: " in alone
    assert " → " not in alone.split("learned at once: ")[1].split(".")[0]
    assert "4 tasks, learned one after another: " in both


def test_a_full_comparison_has_every_section_and_figure(tmp_path, page):
    shown, figures, _ = page(
        write_run(tmp_path / "s", "sequential"),
        write_run(tmp_path / "g", "gate", "attribution", matrix=stream_matrix(97, 0.9), protected=True),
        write_run(tmp_path / "j", "joint", "multitask", matrix=JOINT),
        write_attribution(tmp_path / "prior"),
    )
    assert shown.sections == [
        "results", "tasks", "matrix", "weights", "units", "agreement", "faithfulness", "forgotten",
        "training", "setup",
    ]  # fmt: skip
    assert set(shown.plots) <= set(figures)
    assert "gate keeps 74 % of what sequential forgets" in shown.text
    assert "upper bound" in shown.text


def test_methods_that_are_told_the_task_or_keep_examples_are_marked(tmp_path, page):
    shown, _, html = page(
        write_run(tmp_path / "s", "sequential"),
        write_run(tmp_path / "p", "prompts", "prog-prompt", knows_task=True),
        write_run(tmp_path / "r", "replayed", "replay", rehearses=True),
    )
    tags = re.findall(r'<small class="tag">([^<]*)</small>', html)
    assert tags == ["told the task", "keeps examples"]
    assert "gets the name of the task with each test question" in shown.text


def test_sections_without_data_are_left_out(tmp_path, page):
    shown, figures, _ = page(write_run(tmp_path / "s", "sequential", artefacts=False))
    assert shown.sections == ["results", "tasks", "matrix", "training", "setup"]
    assert not [key for key in figures if key.startswith(("loss", "gate", "importance", "overview"))]


def test_an_attribution_alone_makes_a_page(tmp_path, page):
    shown, figures, _ = page(write_attribution(tmp_path / "prior"))
    assert shown.sections == ["weights", "faithfulness", "setup"]
    assert sorted(figures) == ["faithfulness-0", "importance-a0-s0"]


def test_names_and_predictions_are_text_and_never_markup(tmp_path, page):
    evil = "<b>x</b>"
    path = write_run(tmp_path / "r", '<img src=x onerror="alert(1)">', tasks=[evil, "{{ 7*7 }}", "%{x}"])
    first, last = sorted((path / "tasks").iterdir())[::2]
    for folder, answer, score in (
        (first, "</script><script>alert(2)</script>", 100.0),
        (last, "<u>no</u>", 0.0),
    ):
        row = {"prompt": "<i>p</i>", "expected": ["a"], "generated": answer, "score": score}
        predictions_file(folder, evil).write_text(json.dumps(row))
    shown, figures, html = page(path, title="<s>t</s>")
    assert not {"b>x", "img", "u", "i>p", "s"} & {tag for tag, _ in shown.tags}
    assert html.count("alert(2)</script>") == 0
    assert "<img src=x" not in html
    assert evil in shown.text
    assert "{{ 7*7 }}" in shown.text
    assert "<u>no</u>" in shown.text
    assert html.count("<script") == 3
    ticks = figures["matrix-0-0"]["layout"]["xaxis"]["ticktext"]
    assert ticks[0] == "&lt;b&gt;x&lt;/b&gt;"  # plotly would read the tag


def test_the_page_asks_for_nothing_from_outside(tmp_path, page):
    shown, _, html = page(write_run(tmp_path / "s", "sequential"))
    loads = [
        attrs[key]
        for _, attrs in shown.tags
        for key in ("src", "href")
        if attrs.get(key) and not str(attrs[key]).startswith(("#", "data:"))
    ]
    assert loads == []
    assert "plotly.js v" in unpack(*plotly())
    assert html.count(plotly().text) == 1
    assert "default-src 'none'" in html


def test_seeds_are_one_line_of_a_figure_and_one_entry_of_a_list(tmp_path, page):
    runs = [
        write_run(tmp_path / str(s), "plain", "ewc", matrix=stream_matrix(90, kept), seed=s, protected=True)
        for s, kept in enumerate((0.5, 0.7))
    ]
    shown, figures, html = page(*runs)
    (curve,) = figures["curve-0-1"]["data"]
    matrices = [json.loads((run / "metrics.json").read_text())["matrix"] for run in runs]
    assert curve["y"] == pytest.approx([(a[1] + b[1]) / 2 for a, b in zip(*matrices, strict=True)])
    assert len(figures["loss-0"]["data"]) == 1
    assert html.count("configuration and versions") == html.count("right answers lost") == 1
    assert "0, 1" in shown.text  # the seeds
    assert re.search(r'id="block-w0".*?lookup · seed 0<.*?lookup · seed 1<', html, re.DOTALL)
    assert 'id="block-w1"' not in html
    body = html.partition('<table class="costs">')[2].partition("</table>")[0]
    assert body.count('<th scope="row">') == 1


def test_labels_are_whole_and_in_lines(tmp_path, page):
    name = "a_task_with_a_long_name and more words than fit"
    runs = [write_run(tmp_path / str(i), f"{name} {i}", tasks=[name, "b"], artefacts=False) for i in range(2)]
    _, figures, _ = page(*runs)
    for key, axis in (("overview", "yaxis"), ("matrix-0-0", "xaxis"), ("first-0", "xaxis")):
        labels = figures[key]["layout"][axis]["ticktext"]
        assert any(name in label.replace("<br>", " ").replace("_ ", "_") for label in labels), key
        assert max(len(line) for label in labels for line in label.split("<br>")) <= 28
        assert not any("…" in label for label in labels)


def test_every_figure_has_role_title_and_description(tmp_path, page):
    shown, figures, _ = page(
        write_run(tmp_path / "s", "sequential"),
        write_run(tmp_path / "g", "gate", "attribution", matrix=stream_matrix(97, 0.9), protected=True),
        write_attribution(tmp_path / "prior"),
    )
    plots = [attrs for _, attrs in shown.tags if attrs.get("class") == "plot"]
    assert plots
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(figure["layout"]["meta"] for figure in figures.values())
    assert figures["loss-0"]["layout"]["meta"].startswith("sequential: 3.2 at first, ")
    assert figures["matrix-1-0"]["layout"]["meta"].endswith(
        "Last row, + lookup: copy 71.8, reverse 79.3, count 87.7, lookup 97.0."
    )


def test_a_page_is_less_than_2_mb_and_has_one_title(tmp_path, page):
    runs = [
        write_run(tmp_path / f"{method}-{seed}", f"method {method}", "attribution", protected=True, seed=seed)
        for method in range(3)
        for seed in range(2)
    ]
    shown, _, html = page(*runs)
    assert len(html.encode()) < 2_000_000
    assert [tag for tag, _ in shown.tags if tag in ("title", "h1")] == ["title", "h1"]


def test_an_unfinished_run_is_shown_and_marked(tmp_path, page):
    matrix = [*stream_matrix(90, 0.5)[:3], [None] * 4, [None] * 4]
    shown, figures, _ = page(write_run(tmp_path / "r", "gate", matrix=matrix, finished=False))
    assert "unfinished: 2 of 4 tasks" in shown.text
    assert len(figures["matrix-0-0"]["data"][0]["z"]) == 3  # rows that it reached


def test_a_stage_that_was_not_measured_makes_no_empty_first_row(tmp_path, page):
    matrix = [[None] * 4, *stream_matrix(90, 0.5)[1:]]
    _, figures, _ = page(write_run(tmp_path / "r", "x", matrix=matrix))
    figure = figures["matrix-0-0"]
    assert figure["layout"]["yaxis"]["ticktext"][0] == "+ copy"
    assert [(s["x0"] + s["x1"], s["y0"] + s["y1"]) for s in figure["layout"]["shapes"]][:2] == [
        (0, 0),
        (2, 2),
    ]


def test_the_upper_bound_is_a_level_not_a_curve(tmp_path, page):
    _, figures, _ = page(write_run(tmp_path / "j", "joint", "multitask", matrix=JOINT))
    assert figures["first-0"]["data"][0]["y"] == [97.0, 97.0]
    assert figures["curve-0-1"]["data"][0]["y"] == [97.0, 97.0]
    assert len(figures["matrix-0-0"]["data"][0]["z"]) == 2
    assert "shapes" not in figures["matrix-0-0"]["layout"]


def test_the_diagonal_is_outlined_where_it_was_measured(tmp_path, page):
    matrix = stream_matrix(97, 0.5)
    matrix[2][1] = None
    _, figures, _ = page(write_run(tmp_path / "r", "x", matrix=matrix))
    shapes = figures["matrix-0-0"]["layout"]["shapes"]
    assert [(s["x0"] + s["x1"], s["y0"] + s["y1"]) for s in shapes] == [(0, 2), (4, 6), (6, 8)]


def test_one_method_has_one_colour_in_every_figure(tmp_path, page):
    runs = [write_run(tmp_path / str(s), "sequential", seed=s) for s in range(2)]
    runs.append(write_run(tmp_path / "g", "gate", "attribution", protected=True))
    _, figures, _ = page(*runs)
    for key in ("curve-0-1", "loss-0"):
        colours = [trace["line"]["color"] for trace in figures[key]["data"]]
        assert colours == ["var(--run-0)", "var(--run-1)"]
    colours = [trace["line"]["color"] for trace in figures["first-0"]["data"]]
    assert colours == ["var(--run-0)"] * 3 + ["var(--run-1)"]  # two seeds and their mean; one seed
    assert figures["gate-w1-s1"]["data"][0]["marker"]["color"] == "var(--run-1)"


def test_the_first_task_is_drawn_once_with_the_mean_of_the_seeds(tmp_path, page):
    runs = [
        write_run(tmp_path / str(s), "plain", matrix=stream_matrix(90, kept), seed=s)
        for s, kept in enumerate((0.5, 0.7))
    ]
    shown, figures, _ = page(*runs)
    *seeds, mean = figures["first-0"]["data"]
    ends = [trace["y"][-1] for trace in seeds]
    assert mean["y"][-1] == pytest.approx(sum(ends) / 2)
    assert mean["customdata"][-1] == ["after lookup", f" ({min(ends):.1f} to {max(ends):.1f})"]
    assert "curve-0-0" not in figures
    assert "The first task, copy" in shown.text
    assert f"plain 90 → {sum(ends) / 2:.0f} %." in shown.text


def test_a_stream_of_one_task_has_no_trajectory(tmp_path, page):
    shown, figures, _ = page(write_run(tmp_path / "r", "x", tasks=["a"], artefacts=False))
    assert [key for key in figures if key.startswith(("first", "curve"))] == ["curve-0-0"]
    assert "first task" not in shown.text


def test_runs_of_different_streams_get_their_own_panels(tmp_path, page):
    first = write_run(tmp_path / "1", "one", tasks=["a", "b"])
    second = write_run(tmp_path / "2", "two", tasks=["b", "a", "c"])
    shown, figures, _ = page(first, second)
    assert [k for k in figures if k.startswith("curve")] == ["curve-0-1", "curve-1-1", "curve-1-2"]
    assert {"first-0", "first-1"} <= set(figures)
    assert "order 2, task 2" in shown.text


def test_a_penalty_histogram_over_decades_has_a_log_axis(tmp_path, page):
    path = write_run(tmp_path / "r", "ewc", "ewc", protected=True)
    edges = [10 ** (-8 + 8 * i / 20) for i in range(21)]
    summary = {"quantity": "penalty weight", "histogram": {"edges": edges, "counts": [1] * 20}, "held": 0.0}
    write_json(path / "tasks" / "02-reverse" / "protection.json", summary)
    _, figures, _ = page(path)
    figure = figures["gate-w0-s1"]
    assert figure["data"][0]["x"][0] == pytest.approx(-7.8)
    assert figure["layout"]["xaxis"]["title"]["text"] == "penalty weight"


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No run was given"):
        write_report([], tmp_path / "x.html")


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report([write_run(tmp_path / "r", "x", artefacts=False)], out)
    assert out.read_text() == "old"


def test_what_is_no_page_is_not_written_over(tmp_path):
    run = write_run(tmp_path / "r", "x", artefacts=False)
    config = run / "metrics.json"
    before = config.read_bytes()
    with pytest.raises(StorageError, match=r"metrics\.json: is there, and is no page"):
        write_report([run], config)
    assert config.read_bytes() == before
    (tmp_path / "page").touch()
    for _ in range(2):
        assert write_report([run], tmp_path / "page").read_text().startswith("<!")
