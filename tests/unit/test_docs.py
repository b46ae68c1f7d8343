"""The documentation is true: what it names exists, commands parse, configs are valid, code runs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import holdfast
from holdfast.config import override, read_yaml, validate
from holdfast.runner.config import RunConfig
from holdfast.sweep.grid import load_grid

ROOT = Path(__file__).parents[2]
PACKAGE = Path(holdfast.__file__).parent
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
GUIDES = [p for p in PAGES if p.parent.name == "how-to" or p.name == "tour.md"]
INDEX = ROOT / "docs" / "paper-index.md"
TOP = "src|configs|examples|docs|tests|benchmarks"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"\bholdfast (?:demo|learn|skills|ask|harness|run|compare|attribute|prior|report|check|list)\b[^\n;|&]*"
)
COMPLETE = {"model", "tasks", "strategy"}  # the sections a whole config must have


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def inline(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", page.read_text()))


def of_each(find: Any) -> list[Any]:
    return [
        pytest.param(page, item, id=f"{page.stem}-{i}") for page in PAGES for i, item in enumerate(find(page))
    ]


def paths(page: Path) -> Iterator[Path]:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            yield page.parent / target
    for code in inline(page):
        for word in code.split():
            word = word.split("::")[0]
            if re.fullmatch(rf"(?:{TOP})/[\w./-]*", word):
                yield ROOT / word
            elif re.fullmatch(r"\w+/\w+\.py", word) and (PACKAGE / word).parent.is_dir():
                yield PACKAGE / word
    for word in re.findall(
        rf"(?<![\w./-])(?:{TOP})/[\w./-]*\w", "".join(code for _, code in FENCE.findall(text))
    ):
        yield ROOT / word


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_path_named_in_the_docs_exists(page: Path) -> None:
    missing = sorted({str(path) for path in paths(page) if not path.exists()})
    assert not missing


def indented(page: Path) -> str:
    return "\n".join(line for line in page.read_text().splitlines() if line.startswith("    "))


def commands(page: Path) -> list[tuple[str, bool]]:
    """Command lines without comments, and whether they stand in a block (inline ones may lack arguments)."""
    shell = [c for lang, c in FENCE.findall(page.read_text()) if lang in ("", "sh", "bash", "console")]
    blocks = "\n".join([*shell, indented(page)]).replace("\\\n", " ")
    found = [(line, True) for line in COMMAND.findall(blocks)]
    found += [(line, False) for line in COMMAND.findall("\n".join(inline(page)))]
    return [(re.sub(r"\$\{?\w+\}?", "0", line), whole) for line, whole in found]


def parse(line: str) -> Any:
    """Let the command line parse the words, and run nothing."""
    from holdfast.cli import app

    name, *words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    with command.make_context("holdfast", [name, *words]) as context:
        sub = command.get_command(context, name)
        return sub.make_context(name, words, parent=context)


@pytest.mark.parametrize(("page", "command"), of_each(commands))
def test_every_command_in_the_docs_parses(page: Path, command: tuple[str, bool]) -> None:
    line, whole = command
    try:
        context = parse(line)
    except Exception as error:  # typer brings its own copy of click or uses click's: know it by its name
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise
        return
    config = context.params.get("config")
    if config is not None and (ROOT / config).exists():
        data = override(read_yaml(ROOT / config), context.params["overrides"] or [])
        validate(RunConfig, {"output": "runs/x", **data}, line)
    grid = context.params.get("grid")
    if grid is not None and (ROOT / grid).exists():
        assert load_grid(ROOT / grid, context.params["overrides"] or []).cells


def test_a_wrong_command_in_the_docs_would_be_noticed() -> None:
    for line in ("holdfast run", "holdfast attribute --modell m --data d --out p", "holdfast list tunes"):
        with pytest.raises(Exception, match=r"Missing|No such option|is not one of"):
            parse(line)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_in_the_docs_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([indented(page), *inline(page), *(c for _, c in FENCE.findall(page.read_text()))])
    named = set(re.findall(r"^make (?:-s )?([a-z-]+)", code, re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize(("page", "text"), of_each(lambda page: fences(page, "yaml")))
def test_every_yaml_block_is_a_valid_config_or_part_of_one(page: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    data = read_yaml(file)
    if "rows" in data:  # a sweep
        assert load_grid(file).cells
        return
    rest = {"output": "runs/x", "model": {"toy": True}, "tasks": {"source": "toy"}, "strategy": "sequential"}
    validate(
        RunConfig, {**(rest if not data.keys() >= COMPLETE else {"output": "runs/x"}), **data}, str(page)
    )


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_config_is_valid_and_named_by_its_own_launch_command(file: Path) -> None:
    validate(RunConfig, {"output": "runs/x", **read_yaml(file)}, str(file))
    assert yaml.safe_load(file.read_text()).keys() >= COMPLETE
    header = re.findall(r"^#\s+(holdfast run .*)$", file.read_text(), re.MULTILINE)
    assert header
    for line in header:
        context = parse(line)
        assert context.params["config"] == Path("configs") / file.name
        data = override(read_yaml(file), context.params["overrides"] or [])
        validate(RunConfig, {"output": "runs/x", **data}, line)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_grid_is_valid_and_named_by_its_own_launch_command(file: Path) -> None:
    header = re.findall(r"^#\s+(holdfast compare .*)$", file.read_text(), re.MULTILINE)
    assert header
    for line in header:
        context = parse(line)
        assert context.params["grid"] == Path("configs") / "compare" / file.name
        assert load_grid(file, context.params["overrides"] or []).cells


@pytest.mark.parametrize(("page", "code"), of_each(lambda page: fences(page, "python")))
def test_every_python_block_compiles(page: Path, code: str) -> None:
    ast.parse(code)


@pytest.fixture
def registries() -> Iterator[None]:
    """What a snippet registers is forgotten again."""
    from holdfast.attribution.rules import RULES
    from holdfast.importance.registry import REGISTRY
    from holdfast.strategies import STRATEGIES

    known = [(registry, dict(registry)) for registry in (RULES, REGISTRY, STRATEGIES)]
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


def run_snippets(page: Path) -> dict[str, Any]:
    """Run a page's blocks that begin with ``# runs``, one after another, as a reader would."""
    names: dict[str, Any] = {}
    for code in fences(page, "python"):
        if code.startswith("# runs"):
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", GUIDES, ids=page_id)
def test_snippets_run_as_written(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_snippets(page)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the config's union is closed by now
def test_the_strategy_of_the_how_to_learns_a_stream(tiny: Any, tmp_path: Path, registries: None) -> None:
    names = run_snippets(ROOT / "docs" / "how-to" / "add-a-strategy.md")
    tasks = {"source": "toy", "order": ["copy", "head"], "train_rows": 8, "test_rows": 2}
    config = validate(RunConfig, tiny(tmp_path / "run", tasks=tasks, training={"max_steps": 1}), "test")
    config = config.model_copy(update={"strategy": names["ReplayOptions"](share=0.5)})
    seen: list[int] = []
    examples = names["Replay"].examples
    names["Replay"].examples = lambda *given: seen.append(len(rows := examples(*given))) or rows
    metrics = holdfast.run(config)
    assert metrics["finished"]
    assert seen == [8, 12]  # the second stage has half of the first one's examples too


def dotted_names(page: Path) -> list[str]:
    return [name for code in inline(page) for name in re.findall(r"^holdfast(?:\.\w+)+", code)]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_name_of_the_package_in_the_docs_exists(page: Path) -> None:
    for name in dotted_names(page):
        parts = name.split(".")
        for split in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:split]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[split:]:
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_what_docs_and_messages_call_by_its_full_name_is_there_after_import_holdfast() -> None:
    """Each where nothing else of the package was imported, as the snippet of a bare loop has not."""
    script = """
import sys
for name in ("hold.tell_total_rate", "hold.drift.drift", "names.canonical_name"):
    import holdfast
    found = holdfast
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found), name
    assert not hasattr(holdfast, "nothing")
    for module in [m for m in sys.modules if m.partition(".")[0] == "holdfast"]:
        del sys.modules[module]
    del holdfast
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_test_named_in_the_docs_exists(page: Path) -> None:
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_index_has_a_function_for_every_equation_that_is_built() -> None:
    a, k = INDEX.read_text().split("## K, section IV: KIF")
    for paper, numbers in ((a, range(3, 14)), (k, [*range(2, 7), *range(8, 21)])):
        rows = [line for line in paper.splitlines() if line.startswith("| eq")]
        for number in numbers:
            (row,) = [line for line in rows if number in equations(line)]
            assert "`holdfast." in row, row
    for claim in ("Lemma 4.1", "Prop. 4.2", "Prop. 4.3"):
        assert claim in a
    for claim in ("Algorithm 1", "Algorithm 2", "section V", "Table V"):
        assert claim in k


def test_the_index_has_the_paper_of_every_strategy() -> None:
    from holdfast.strategies import STRATEGIES

    index = INDEX.read_text()
    papers = {name: re.findall(r"\d{4}\.\d{5}", method.paper) for name, method in STRATEGIES.items()}
    assert sum(map(len, papers.values())) > 25
    assert [name for name, numbers in papers.items() if not all(n in index for n in numbers)] == []


def equations(line: str) -> list[int]:
    """The numbers in a row's first cell: eq. 5; eqs. 16, 17; eqs. 10 to 12."""
    first = line.split("|")[1].split(",")[0] if "eq. " in line.split("|")[1] else line.split("|")[1]
    numbers = [int(n) for n in re.findall(r"\d+", first)]
    return list(range(numbers[0], numbers[-1] + 1))


def test_every_how_to_is_reachable_from_the_tour_or_another_page() -> None:
    linked = {(p.parent / t).resolve() for p in PAGES for t in re.findall(r"\]\(([^)#]+\.md)", p.read_text())}
    assert {p.resolve() for p in GUIDES if p.parent.name == "how-to"} <= linked
