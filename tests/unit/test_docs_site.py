"""The documentation as a site: its navigation, its reference pages, its pictures, and that it builds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import holdfast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PICTURES = sorted(path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
BROWSER_ASKS = re.compile(r"<(?:script|img|iframe)[^>]+src=\"https?:[^\"]*|<link[^>]+href=\"https?:[^\"]*")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook that makes the reference pages."""
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for item in nav.values() if isinstance(nav, dict) else nav:
        yield from leaves(item)


def test_navigation_has_every_page_once_and_nothing_else() -> None:
    named = Counter(leaves(SITE["nav"]))
    assert named == Counter(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_navigation_of_the_site_names_files_that_exist() -> None:
    files = [*SITE["hooks"], *(f"docs/{name}" for name in SITE["extra_css"])]
    assert [name for name in files if not (ROOT / name).exists()] == []


def directives(reference: ModuleType) -> Counter[str]:
    return Counter(re.findall(r"^::: (\S+)", "\n".join(reference.pages().values()), re.MULTILINE))


def test_every_public_name_is_on_the_first_reference_page_and_documented_on_another(reference: Any) -> None:
    homes = reference.public_names()
    assert list(homes) == holdfast.__all__
    documented, first = directives(reference), reference.pages()["reference/index.md"]
    for name, module in homes.items():
        value = getattr(importlib.import_module(module), name)
        assert value is getattr(holdfast, name)
        assert value.__module__ == module
        assert documented[module] == 1, name
        assert f"[`{name}`][{module}.{name}]" in first


def test_every_module_with_content_is_documented_once(reference: Any) -> None:
    package = Path(holdfast.__file__).parent
    files = [
        file
        for file in package.rglob("*.py")
        if file.read_text().strip() and not file.relative_to(package).parts[0].startswith("_")
    ]
    names = (file.relative_to(package.parent).with_suffix("").as_posix() for file in files)
    wanted = Counter(name.removesuffix("/__init__").replace("/", ".") for name in names)
    assert len(wanted) > 100
    assert directives(reference) == wanted


def test_every_module_says_what_it_is(reference: Any) -> None:
    silent = [
        str(file)
        for _, files in reference.parts()
        for file in files
        if file.read_text().strip() and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert silent == []


def test_a_package_shows_what_it_defines_and_not_what_it_passes_on(
    reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "holdfast" / "part"
    part.mkdir(parents=True)
    (part / "__init__.py").write_text(
        '"""A part."""\nfrom holdfast.part.a import A\ndef b(): ...\ndef _c(): ...\n'
    )
    (part / "a.py").write_text('"""A."""\nclass A: ...\n')
    monkeypatch.setattr(reference, "PACKAGE", tmp_path / "holdfast")
    assert (
        reference.directive(part / "__init__.py") == "::: holdfast.part\n    options:\n      members: ['b']"
    )
    assert reference.directive(part / "a.py") == "::: holdfast.part.a"


def test_full_names_in_prose_become_links_and_code_blocks_stay(reference: Any) -> None:
    page = "see `holdfast.run`\n\n```python\nx = `holdfast.run`\n```\n\nand `holdfast list`"
    linked = "see [`holdfast.run`][holdfast.run]\n\n```python\nx = `holdfast.run`\n```\n\nand `holdfast list`"
    assert reference.linked(page) == linked


def pictures_of(page: Path) -> list[tuple[str, Path]]:
    found = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text())
    return [(words, (page.parent / target).resolve()) for words, target in found]


def test_every_picture_is_small_shown_and_told_in_words() -> None:
    shown = [item for page in PAGES for item in pictures_of(page)]
    assert {path for _, path in shown} == set(PICTURES)
    assert [path.name for words, path in shown if len(words) < 40] == []
    assert [path.name for path in PICTURES if path.stat().st_size >= 150_000] == []


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What the site is built from, elsewhere."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs isn't installed: `make docs` does that")
    for folder in ("docs", "src/holdfast"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(ROOT / "mkdocs.yml", tmp_path))


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(
    copied: Path, tmp_path: Path, reference: Any
) -> None:
    done = build(copied, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert BROWSER_ASKS.findall(page.read_text()) == [], page
    parts = "".join(page.read_text() for page in (tmp_path / "site" / "reference").glob("*.html"))
    for name, module in reference.public_names().items():
        assert f'id="{module}.{name}"' in parts


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["[there](nowhere.md)", "[there](results.md#nowhere)", "`holdfast.hold.Nothing`"], ids=str
)
def test_a_broken_link_or_name_fails_the_build(line: str, copied: Path, tmp_path: Path) -> None:
    page = copied.parent / "docs" / "tour.md"
    page.write_text(f"{page.read_text()}\n{line}\n")
    done = build(copied, tmp_path / "site")
    assert done.returncode == 1
    (warning,) = re.findall("^WARNING.*", done.stderr, re.MULTILINE)
    assert re.search("nowhere|Nothing", warning)
