"""Reference pages for mkdocs: one a part of the package, and one that lists the public names.

Nothing is listed by hand: a new module is on the page of its folder, a new folder has a page of its own. The
package is read, not imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "src" / "holdfast"
# the way data flows; what isn't named here follows by name
FIRST = ("cli", "learner", "tasks", "training", "attribution", "importance", "hold", "evaluation")
FIRST += ("strategies", "runner", "sweep", "report")
DEFINES = (ast.FunctionDef, ast.ClassDef)
NAME = re.compile(r"`(holdfast(?:\.\w+)+)`")  # the full name of something, in a page's prose
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(file: Path) -> str:
    """The dotted name of a module's file."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path:
    """The file of a dotted module name."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parts() -> list[tuple[str, list[Path]]]:
    """Each part of the package (a folder, or a file beside the folders) and its modules, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py"), key=lambda f: (f.parent, f.name != "__init__.py", f.name)):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not part.startswith("_"):
            found.setdefault(part, []).append(file)
    order = [part for part in FIRST if part in found]
    return [(part, found[part]) for part in [*order, *sorted(found.keys() - set(order))]]


def summary(file: Path, name: str = "") -> str:
    """The first line of the docstring of a module, or of a function or class in it."""
    tree: Any = ast.parse(file.read_text(encoding="utf-8"))
    if name:
        tree = next(node for node in tree.body if isinstance(node, DEFINES) and node.name == name)
    first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return first.replace("|", "\\|")  # it stands in a table


def imports(module: str) -> Iterator[tuple[str, str]]:
    """What a module takes from other modules of the package: the name, and the module it is taken from."""
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("holdfast"):
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def public_names() -> dict[str, str]:
    """Each name of ``holdfast.__all__`` and the module that defines it."""
    tree = ast.parse(file_of("holdfast").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    homes = {}
    for name in names:
        module = "holdfast"
        while (source := dict(imports(module)).get(name)) is not None:
            module = source
        homes[name] = module
    return homes


def directive(file: Path) -> str:
    """What makes mkdocstrings document a module; of a package only what its ``__init__`` defines itself."""
    line = f"::: {name_of(file)}"
    if file.name != "__init__.py":
        return line
    own = [
        node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, DEFINES)
    ]
    public = [name for name in own if not name.startswith("_")]
    return f"{line}\n    options:\n      members: {public or 'false'}"


def pages() -> dict[str, str]:
    """Every page of the reference: its path below ``docs/`` and its Markdown."""
    result = {}
    rows = ["# Public names", "", "| `holdfast.` | |", "|---|---|"]
    for name, module in public_names().items():
        rows.append(f"| [`{name}`][{module}.{name}] | {summary(file_of(module), name)} |")
    rows += ["", "## All parts", "", "| | |", "|---|---|"]
    for part, files in parts():
        rows.append(f"| [`{part}`]({part}.md) | {summary(files[0])} |")
        sections = [directive(file) for file in files if file.read_text(encoding="utf-8").strip()]
        result[f"reference/{part}.md"] = "\n\n".join([f"# {part}", *sections, ""])
    return {"reference/index.md": "\n".join(rows) + "\n", **result}


def linked(markdown: str) -> str:
    """The full names in a page's prose, as links to the reference; what doesn't exist fails the build."""
    code = FENCE.findall(markdown)
    prose = [NAME.sub(r"[`\1`][\1]", text) for text in FENCE.split(markdown)]
    return "".join(piece for pair in zip(prose, [*code, ""], strict=True) for piece in pair)


def on_config(config: Any) -> None:
    """Put the pages at the end of the navigation."""
    config.nav.append({"Reference": [{Path(p).stem.replace("index", "Public names"): p} for p in pages()]})


def on_files(files: Any, config: Any) -> None:
    """Add the pages to those in the folder."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link names to the reference."""
    return linked(markdown)
