"""The report as a reader sees it: rendered by Chromium from a file, at two widths and in two themes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_runs import lora_names, stream_matrix, write_attribution, write_run, write_units
from report_sweeps import write_sweep

from holdfast.report import write_report

LONG = "mnli cb wic copa qqp boolqa rte imdb a_task_with_a_long_name"
JOINT = [[4.0] * 4, [None] * 4, [None] * 4, [None] * 4, [97.0] * 4]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Reports with every section of runs, of a long stream with an unfinished run, and of a sweep."""
    folder = tmp_path_factory.mktemp("reports")
    full = [
        write_run(folder / "s", "sequential"),
        write_run(folder / "g", "gate", "attribution", matrix=stream_matrix(97, 0.9), protected=True),
        write_run(folder / "j", "joint", "multitask", matrix=JOINT),
        write_run(folder / "1", "single", "attribution", protected=True, prior_from="single_task"),
        write_units(write_run(folder / "k", "kif-lora", "kif-lora"), lora_names()),
        write_attribution(folder / "prior"),
    ]
    tasks = LONG.split()
    long = [write_run(folder / f"l{s}", "sequential", tasks=tasks, seed=s) for s in range(2)]
    write_units(long[0], lora_names(("encoder.block", "decoder.block"), layers=12, ranks=8))
    unfinished = [*stream_matrix(90, 0.8, 9)[:6], *[[None] * 9] * 4]
    long.append(write_run(folder / "u", "<b>x</b>", tasks=tasks, matrix=unfinished, finished=False))
    return {
        "full": write_report(full, folder / "full.html"),
        "long": write_report(long, folder / "long.html"),
        "sweep": write_report([write_sweep(folder / "sweep", failed=True)], folder / "sweep.html"),
    }


@pytest.fixture(scope="module")
def pages(browser):
    """Pages by file and width, loaded once, with whatever they logged, threw or requested."""
    loaded: dict = {}

    def load(path: Path, width: int):
        if (path, width) not in loaded:
            complaints: list[str] = []

            def watch(request) -> None:
                if not request.url.startswith(("file:", "data:", "blob:")):
                    complaints.append(f"request {request.url}")

            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            page.on("console", lambda message: complaints.append(f"console {message.text}"))
            page.on("pageerror", lambda error: complaints.append(f"error {error}"))
            page.on("request", watch)
            page.goto(path.as_uri(), timeout=90_000)  # seconds alone, a minute on a loaded machine
            page.wait_for_selector("html[data-ready=true]", timeout=90_000)
            loaded[path, width] = (page, complaints)
        return loaded[path, width]

    yield load
    for page, _ in loaded.values():
        page.close()


@pytest.fixture
def opened(pages):
    """Open a page; until the end of the test nothing may be logged, thrown or requested."""
    used = []

    def open_(path: Path, width: int = 1280):
        page, complaints = pages(path, width)
        used.append(complaints)
        return page

    yield open_
    assert [complaint for complaints in used for complaint in complaints] == []


@pytest.mark.parametrize(("name", "width"), [("full", 1280), ("full", 390), ("long", 390), ("sweep", 390)])
def test_every_figure_renders_and_the_page_never_scrolls_sideways(opened, reports, name, width):
    page = opened(reports[name], width)
    state = page.evaluate(
        """() => ({
            overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            empty: [...document.querySelectorAll('.plot')]
                .filter(plot => !plot.querySelector('svg.main-svg') || plot.offsetHeight < 50)
                .map(plot => plot.dataset.figure),
            wide: [...document.querySelectorAll('.plot')]
                .filter(plot => plot.querySelector('svg').clientWidth > plot.offsetWidth + 1)
                .map(plot => plot.dataset.figure),
            kinds: [...new Set([...document.querySelectorAll('.plot')]
                .map(plot => plot.dataset.figure.split('-')[0]))],
        })"""
    )
    assert state["overflow"] <= 0
    assert state["empty"] == []
    assert state["wide"] == []
    expected = {"overview", "first", "curve", "matrix", "loss", "units"}
    if name == "sweep":  # its runs kept neither losses nor units
        expected = expected - {"loss", "units"} | {"tradeoff"}
    elif name == "full":
        expected |= {"importance", "gate", "overlap", "correlation", "faithfulness"}
    else:
        expected -= {"overview"}  # a single finished method has nothing to be compared with
    assert set(state["kinds"]) == expected


def test_figures_are_described_and_the_description_follows_the_selector(opened, reports):
    page = opened(reports["full"])
    described = page.locator(".plot").evaluate_all(
        "plots => plots.filter(p => p.offsetHeight).map(p => p.getAttribute('aria-description'))"
    )
    assert all(described)
    block = page.locator("#block-w0, #block-w1").first
    plot = block.locator(".plot").first
    block.locator("select").select_option(index=1)
    before = plot.get_attribute("aria-description")
    block.locator("select").select_option(index=2)
    assert plot.get_attribute("aria-description") != before


def test_the_first_printed_page_is_full(opened, reports, tmp_path):
    """What can't be broken is lower than a page, and what is longer than one may be."""
    page = opened(reports["long"])
    page.emulate_media(media="print")
    whole = page.evaluate(
        """() => [...document.querySelectorAll('#results *')].filter(e => {
            const style = getComputedStyle(e);
            return e.offsetHeight > 1000 && (style.breakInside === 'avoid' || style.overflowX !== 'visible');
        }).map(e => e.className)"""
    )
    page.emulate_media(media="screen")
    assert whole == []


def test_figures_follow_the_theme(opened, reports):
    page = opened(reports["full"])
    colour = "() => getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => ({colour})() !== light", arg=light)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"light => ({colour})() === light", arg=light)


def test_a_selector_swaps_figures_and_says_when_there_is_none(opened, reports):
    page = opened(reports["full"])
    block = page.locator("#block-w0, #block-w1").first
    before = block.locator(".plot").first.get_attribute("data-figure")
    block.locator("select").select_option(index=0)
    assert block.locator(".plot").first.get_attribute("data-figure") != before
    assert block.get_by_text("Nothing was held during this task").is_visible()
    block.locator("select").select_option(index=1)
    assert block.get_by_text("Nothing was held during this task").is_hidden()
    assert block.locator(".plot svg.main-svg").last.is_visible()


def test_a_unit_s_cell_tells_the_task_the_unit_and_its_raw_score(opened, reports):
    page = opened(reports["full"])
    plot = page.locator("#units .plot", has=page.locator("svg.main-svg")).first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    for step in range(20):  # plotly answers after the pointer has moved
        page.mouse.move(box["x"] + box["width"] / 2 + step, box["y"] + box["height"] / 2)
        if plot.locator(".hovertext").count():
            break
        page.wait_for_timeout(50)
    told = plot.locator(".hovertext").first.text_content()
    assert re.match(r"(copy|reverse|count|lookup) · layer \d, \S+_proj.*\d\.\d\d \(score \S+\)", told or "")


def test_pairs_of_tasks_are_chosen_for_both_measures_at_once(opened, reports):
    page = opened(reports["full"])
    block = page.locator("#block-agreement")
    assert block.locator(".legend li").count() == 2
    assert "single, single-task" in block.locator(".legend").inner_text()
    block.locator("select").select_option(label="copy and count")
    shown = [block.locator(".plot").nth(i).get_attribute("data-figure") or "" for i in range(2)]
    assert [name.split("-")[0] for name in shown] == ["overlap", "correlation"]
    assert shown[0].split("-")[1] == shown[1].split("-")[1] != "all"
    assert block.locator(".plot svg.main-svg").last.is_visible()


def test_many_units_scroll_inside_their_panel(opened, reports):
    page = opened(reports["long"], 390)
    inner, outer = page.locator("#units .scroll").first.evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert inner > 3 * 12 * 16 > outer
    assert page.locator("#units .heatmaplayer image").count() == 2  # the encoder's and the decoder's


def test_an_explained_word_shows_its_meaning_within_the_screen(opened, reports):
    page = opened(reports["full"], 390)
    page.locator(".tip").first.focus()
    bubble = page.locator("#bubble")
    assert "mean accuracy over all tasks" in bubble.inner_text()
    box = bubble.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_forgotten_answers_open_on_a_click(opened, reports):
    page = opened(reports["full"], 390)
    example = page.locator("details.lost").first
    assert example.locator(".prompt").first.is_hidden()
    example.locator("summary").click()
    assert example.locator(".prompt").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_task_or_run_named_like_markup_is_shown_as_text(opened, reports):
    page = opened(reports["long"], 390)
    assert page.locator("#results th", has_text="<b>x</b>").count() == 1


def test_a_sweep_s_curve_tells_row_and_strength(opened, reports):
    page = opened(reports["sweep"])
    plot = page.locator("#comparison .plot").first
    plot.scroll_into_view_if_needed()
    assert plot.locator("text", has_text="ewc").count() == 1
    for _ in range(20):  # plotly answers after the pointer has moved
        for point in plot.locator(".scatterlayer .point").all():
            box = point.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.wait_for_timeout(50)
            told = (
                plot.locator(".hovertext").first.text_content() if plot.locator(".hovertext").count() else ""
            )
            if "at 10" in (told or ""):
                assert re.search(r"ewc at 100?learning accuracy \d+\.\d %, AP \d+\.\d %", told)
                return
    raise AssertionError("no point tells its strength")


def methods(page, table: str) -> list[str]:
    names = page.locator(f"{table} tbody tr:not(.member) > th .who").all_inner_texts()
    return [name.strip() for name in names]


@pytest.mark.parametrize("table", ["#results table", "#comparison table"])
def test_a_heading_sorts_methods_best_first_then_worst_first_and_back(opened, reports, table):
    page = opened(reports["sweep"])
    given = methods(page, table)
    bwt = page.locator(f"{table} button.sort", has_text="BWT")
    bwt.click()
    best = methods(page, table)
    assert sorted(best) == sorted(given)
    assert best != given, "the data must need sorting"
    assert page.locator(f"{table} th[aria-sort=descending]").inner_text().startswith("BWT")
    values = page.locator(f"{table} tbody tr:not(.member)").evaluate_all(
        "rows => rows.map(row => parseFloat(row.querySelectorAll('[data-value]')"
        "[row.closest('table').querySelector('[aria-sort]').cellIndex - 1].dataset.value))"
    )
    assert values == sorted(values, reverse=True)
    bwt.click()
    assert methods(page, table) == best[::-1]
    page.locator(f"{table} button.sort").first.click()
    assert methods(page, table) == given
    assert page.locator(f"{table} th[aria-sort]").count() == 0


def test_runs_stay_below_their_method_and_fold_away(opened, reports):
    page = opened(reports["sweep"])
    method = page.locator("#results tbody").first
    assert method.locator(".member").count() == 2
    button = method.locator("button.fold")
    assert button.inner_text().startswith("mean of 2 runs")
    assert method.locator(".member").first.is_visible()
    button.click()
    assert method.locator(".member").first.is_hidden()
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert method.locator(".member").first.is_visible()


def test_every_table_is_taken_along_as_csv_and_latex(opened, reports) -> None:
    page = opened(reports["full"])
    assert page.locator(".take").count() == page.locator("table").count()
    texts = {}
    for name in ("CSV", "LaTeX"):
        with page.expect_download() as download:
            page.locator("#results .take button", has_text=name).first.click()
        texts[name] = Path(download.value.path()).read_text(encoding="utf-8")
    head, *rows = texts["CSV"].splitlines()
    assert head.startswith("Run,AP")
    assert any(row.startswith("sequential,") for row in rows)
    assert texts["LaTeX"].startswith("\\begin{tabular}{lr")
    assert texts["LaTeX"].count("\\\\\n") == 1 + len(rows)
