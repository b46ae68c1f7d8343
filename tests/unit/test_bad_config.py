"""Configurations that can't be meant: each is refused with its place, before anything else happens."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.config import MAX_SEED, _models_in, override, read_yaml, validate
from holdfast.errors import ConfigError
from holdfast.progress import Progress
from holdfast.records import RunMetrics
from holdfast.runner import RunConfig
from holdfast.runner.table import listing, metrics_table
from holdfast.training.options import TrainingOptions

METRICS = "'exact_match', 'rouge_l', 'options', 'choice', 'edit_similarity', 'sari' or 'perplexity'"
BASE: dict[str, Any] = {
    "output": "r",
    "model": {"toy": True},
    "tasks": {"source": "jsonl", "path": "data"},
    "strategy": "ewc",
}


def refusal(assignment: str) -> str:
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, override(BASE, [assignment]), "config")
    return str(error.value)


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


# YAML


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output: \xff", r"c\.yaml: not UTF-8 \(byte 9\)\. Save the file in the encoding UTF-8"),
        (bomb().encode(), r"line 5, column 5: aliases that stand for more than 100,000 values"),
        (b"a: &a [*a]", "line 1, column 4: an alias inside the very part that it stands for"),
        (b"a: &a {b: *a}", "line 1, column 4: an alias inside the very part that it stands for"),
        (b"seed: " + b"9" * 5000, "line 1, column 7: a number of 5000 digits"),
        (b"seed: 0x" + b"f" * 5000, "line 1, column 7: a number of 5002 digits"),
        (b"a: 1\nb: 2\na: 3", r"line 3, column 1: the key 'a' is given twice \(first in line 1\)"),
        (b"m:\n  x: 1\n  x: 1", r"line 3, column 3: the key 'x' is given twice"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"a: !!python/object:os.system x", r"line 1, column 4: the tag !!python/object:os\.system isn't"),
        (b"a: !!timestamp x", "the tag !!timestamp isn't allowed"),
        (b"a: !!bool maybe", "a value doesn't fit its tag"),
        (b"a: !!int x", "a value doesn't fit its tag"),
        (b"a: 1\nb: \x07", "line 2: the character 7 isn't allowed"),
        (b"? [1]\n: 2", "line 1, column 3: while constructing a mapping, found unhashable key"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: expected a single document"),
    ],
)
def test_yaml_that_cannot_be_meant_is_refused_with_its_line_and_at_once(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        read_yaml(file)
    assert time.monotonic() - started < 20


def test_anchors_and_merged_keys_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a")
    assert read_yaml(tmp_path / "c.yaml") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": {"x": 1, "y": 2},
    }


def test_dates_and_equal_signs_are_texts(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 2024-01-01\nb: =\nc: on\nd: 1e-3")
    assert read_yaml(tmp_path / "c.yaml") == {"a": "2024-01-01", "b": "=", "c": "on", "d": 1e-3}
    assert override({}, ["template.strip=="]) == {"template": {"strip": "="}}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *((text, text) for text in ("0100", "073", "-010", "1:30", "1:30.5", "1e", "0o17", "no", "_1")),
        *{"0": 0, "-0": 0, "+3": 3, "1_000": 1000, "0x10": 16, "100": 100}.items(),
        *{
            "1.": 1.0,
            ".5": 0.5,
            "-.5": -0.5,
            "1e3": 1e3,
            "1.5E-3": 1.5e-3,
            "1e-4": 1e-4,
            ".5e2": 50.0,
        }.items(),
        *{".inf": float("inf"), "-.inf": float("-inf"), "'1'": "1", "true": True, "~": None}.items(),
    ],
)
def test_numbers_are_what_people_mean_by_them(written: str, meant: Any) -> None:
    read = override({}, [f"k={written}"])["k"]
    assert read == meant
    assert type(read) is type(meant)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_as_configuration(text: str) -> None:
    with contextlib.suppress(ConfigError):
        override({}, [f"a={text}"])


def test_a_configuration_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: 1")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"c\.yaml: can't be read \(Permission denied\)"):
        read_yaml(file)


# values


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("strategy.strength=.inf", "strategy.strength: Input should be a finite number (got inf)"),
        ("strategy.strength=.nan", "strategy.strength: Input should be a finite number (got nan)"),
        ("training.learning_rate=.inf", "training.learning_rate: Input should be a finite number"),
        ("seed=4294967", "seed: Input should be less than or equal to 4294966 (got 4294967)"),
        ("seed=99999999999999999999", "seed: an integer of about 20 digits; at most 64 bits are allowed"),
        ("training.epochs=1e300", "training.epochs: Input should be less than or equal to 1000000"),
        ("training.max_steps=9999999999", "training.max_steps: Input should be less than or equal to"),
        (r'label="\ud83d"', r"label: half a character (U+D83D) is in '\ud83d'; write real characters"),
        (r'tasks.options={a: ["x\0"]}', "tasks.options.a.0: the character U+0000 is in 'x"),
        ("training.report_to=wandbb", "no logging integration 'wandbb'; allowed: azure_ml, clearml"),
        ("training.report_to=[tensorboard, x]", "no logging integration 'x'; allowed: "),
    ],
)
def test_values_that_fail_later_are_refused_at_once(assignment: str, message: str) -> None:
    assert message in refusal(assignment)


def test_the_largest_seed_gives_every_stage_a_seed_that_numpy_takes() -> None:
    assert validate(RunConfig, {**BASE, "seed": MAX_SEED}, "c").seed * 1000 + 1000 < 2**32


def test_one_logging_integration_may_be_given_by_its_name() -> None:
    assert TrainingOptions(report_to="wandb").report_to == ("wandb",)  # type: ignore[arg-type]


def test_a_logging_integration_that_is_not_installed_is_told() -> None:
    options = TrainingOptions(report_to=("swanlab",))
    with pytest.raises(ConfigError, match=r"training\.report_to: swanlab can't be imported; install it"):
        options.check_machine()
    TrainingOptions().check_machine()


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        (
            "tasks.metric=bleu",
            f"tasks.metric: Input should be {METRICS}. Or: Input should be a "
            "mapping of keys to values (got 'bleu').",
        ),
        (
            "tasks.metric={a: bleu}",
            f"tasks.metric.a: Input should be {METRICS}",
        ),
        ("tasks.order=[73]", "tasks.order.0: YAML read this name as 73"),
        ("tasks.columns.prompt=5", "tasks.columns.prompt: Input should be a text (got 5)"),
        ("strategy.x=1", "strategy.x: unknown key. Allowed here: fisher, gamma"),
        (
            "strategy={name: attribution, mechanism: {name: gate, quantile: x}}",
            "strategy.mechanism.quantile: Input should be a valid number",
        ),
        ("model.lora=8", "model.lora: Input should be a mapping of keys to values (got 8)"),
    ],
)
def test_a_problem_is_named_once_by_the_keys_that_the_user_wrote(assignment: str, line: str) -> None:
    text = refusal(assignment)
    assert text.startswith("config: 1 problem in the configuration:\n  ")
    assert line in text
    assert not re.search(r"\[|literal|dict|tuple|jsonl", text.splitlines()[1].split(": ")[0])


JUNK: list[Any] = [5, "x", [1], {"a": 1}, {"name": "x"}, {"name": 5}, None]


def keys_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        if len(above) < 2:
            for inner in _models_in(field.annotation):
                yield from keys_of(inner, (*above, name))


def is_there(where: str, data: Any) -> bool:
    """Whether a place's last key or the section above it is in the data, and all above that."""
    *above, last = where.split(".")
    for part in above:
        data = data[int(part)] if isinstance(data, list) else data[part]
    return isinstance(data, dict) or int(last) < len(data)


def test_whatever_stands_at_any_key_is_told_by_keys_of_the_configuration_alone() -> None:
    refused = 0
    for key in sorted(set(keys_of(RunConfig))):
        for junk in JUNK:
            data = override(BASE, [f"{'.'.join(key)}={json.dumps(junk)}"])
            try:
                validate(RunConfig, data, "config")
            except ConfigError as error:
                for line in str(error).splitlines()[1:]:
                    where, _, said = line.strip().partition(": ")
                    assert where == "(top level)" or is_there(where, data), line
                    assert not re.search(
                        r"(tagged|literal|dict|tuple|union)\W?\[|Options\b|NoneType", said
                    ), line
                refused += 1
    assert refused > 1000


# what is said


TRICKY = ["[/x]", "[red]", "[bold", ":smile:", "a[1]", "\ud83d", "日本"]


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_said_as_they_are(text: str, terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, color_system=None)
    with Progress(console=console) as progress:
        progress.line_every = -1.0
        progress.say(f"label {text}")
        with progress.bar(f"task {text}", total=2) as bar:
            bar.show(1, note=text)
            if progress._rich is not None:
                progress._rich.refresh()
    shown = text.encode("utf-8", "backslashreplace").decode()
    assert f"label {shown}" in stream.getvalue()
    assert f"task {shown}" in stream.getvalue()


def rendered(table: Any, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue()


@pytest.mark.parametrize("text", TRICKY[:5])
@pytest.mark.parametrize("width", [40, 100])
def test_tables_show_labels_as_they_are(text: str, width: int) -> None:
    run = RunMetrics(label=text, strategy="ewc", tasks=["a"], matrix=[[None], [1.0]], seconds={"total": 4.0})
    assert text in rendered(metrics_table([run]), width)


LISTS = ["strategies", "tasks", "orders", "importances", "metrics", "mechanisms", "controls", "operators"]


@pytest.mark.parametrize("what", LISTS)
def test_lists_fit_forty_columns_and_cut_no_word(what: str) -> None:
    text = rendered(listing(what), 40)
    assert "…" not in text
    assert max(map(cell_len, text.splitlines())) <= 40
    for word in " ".join(str(cell) for row in listing(what).rows for cell in row).split():
        assert word in text


def test_help_of_compare_advises_overrides_that_it_takes(tmp_path: Path) -> None:
    result = CliRunner(env={"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["compare", "-h"])
    found = re.search(r"such as (seeds=\S+) (base\.\S+)", result.output)
    assert found is not None, result.output
    from holdfast.sweep.grid import load_grid

    root = Path(__file__).parents[2]
    assert load_grid(root / "configs/compare/toy.yaml", list(found.groups())).grid.seeds == (0, 1)
