"""The folders form layers: a folder imports only folders below it."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast

ROOT = Path(holdfast.__file__).parent
LAYERS = [  # from the top down; those in one line may import each other
    {"__main__"},
    {"cli"},
    {"demo", "__init__", "api"},
    {"report"},
    {"sweep"},
    {"runner"},
    {"learner"},
    {"strategies"},
    {"training"},
    {"evaluation"},
    {"hold"},
    {"importance"},
    {"attribution"},
    {"tasks"},
    {"models"},
    {"names", "config", "records", "resume", "progress", "folder", "environment", "places"},
    {"manifest"},
    {"tables"},
    {"storage", "quantities", "precision"},
    {"world"},
    {"errors", "lazy", "pieces"},
]
LEVEL = {name: depth for depth, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(file: Path) -> str:
    top = file.relative_to(ROOT).parts[0]
    return top.removesuffix(".py")


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """The parts of holdfast that a file imports, wherever in the file, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names = [
                f"{node.module}.{a.name}" if node.module == "holdfast" else str(node.module)
                for a in node.names
            ]
        for name in names:
            parts = name.split(".")
            if parts[0] == "holdfast":
                yield (parts[1] if len(parts) > 1 else "__init__"), node.lineno


def test_every_part_has_its_layer() -> None:
    assert {part_of(file) for file in FILES} == set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_imports_only_downwards(file: Path) -> None:
    mine = part_of(file)
    upwards = [
        f"line {line}: {mine} imports {part}"
        for part, line in imported(file)
        if part != mine and LEVEL[part] < LEVEL[mine]
    ]
    assert not upwards, upwards


def test_walker_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from holdfast.report import write_report\n    import holdfast.models\n")
    assert list(imported(file)) == [("report", 2), ("models", 3)]


def test_no_package_hides_a_module_behind_a_function_of_its_name() -> None:
    for file in (f for f in FILES if not f.name.startswith("__")):
        name = ".".join(["holdfast", *file.relative_to(ROOT).with_suffix("").parts])
        module = importlib.import_module(name)
        assert getattr(sys.modules[name.rpartition(".")[0]], file.stem) is module


def imports_of(files: dict[str, Path]) -> dict[str, set[str]]:
    """Each module and those that it imports, for its types alone too."""
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        taken = {(str(node.module), alias.name) for node in froms for alias in node.names}
        named = {f"{module}.{one}" if f"{module}.{one}" in files else module for module, one in taken}
        found[name] = (named & files.keys()) - {name}
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {file: ".".join(["holdfast", *file.relative_to(ROOT).with_suffix("").parts]) for file in FILES}
    files = {name.removesuffix(".__init__"): file for file, name in modules.items()}
    graph = imports_of(files)
    assert "holdfast.learner.state" in graph["holdfast.learner.learner"]
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_no_strategy_inherits_from_another() -> None:
    from holdfast.strategies import STRATEGIES, Strategy

    assert {method.strategy.__bases__ for method in STRATEGIES.values()} == {(Strategy,)}
