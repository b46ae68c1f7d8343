"""The tables of A and K at their own scale: every row is right for a random model of the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tasks_trace import write_trace

from holdfast.models import tiny_llama
from holdfast.runner.findings import check
from holdfast.sweep.grid import Cell, load_grid
from holdfast.tasks import toy_tokenizer
from holdfast.tasks.orders import list_orders
from tiny_t5 import write_tiny_t5

CONFIGS = Path(__file__).parents[2] / "configs"


def llama(folder: Path, layers: int = 1) -> Path:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tiny_llama(tokenizer, hidden=16, layers=layers, heads=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def benchmark(folder: Path, order: str) -> Path:
    for task in list_orders()[order]:
        part = folder / task
        part.mkdir(parents=True)
        for split in ("train", "test"):
            rows = [json.dumps({"prompt": f"{task} {i}=", "completion": "yes"}) for i in range(2)]
            (part / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def cells(table: str, *overrides: str) -> list[Cell]:
    """One of each row."""
    plan = load_grid(CONFIGS / "compare" / f"{table}.yaml", overrides)
    return list({cell.line.row: cell for cell in plan.cells}.values())


def test_every_row_of_as_table_passes_check(tmp_path: Path) -> None:
    model, data = llama(tmp_path / "model", layers=7), write_trace(tmp_path / "trace")  # six are frozen
    found = cells("summary_to_code", f"base.model.path={model}", f"base.tasks.path={data}")
    problems = {c.name: check(c.config).problems for c in found}
    assert {name for name, problem in problems.items() if problem} == set(), problems
    assert {c.config.model.lora is None for c in found} == {True, False}


@pytest.mark.parametrize(
    ("table", "kind"),
    [("kif_superni", "t5_large"), ("kif_long_sequence", "t5_large"), ("kif_superni", "llama2_7b")],
)
def test_every_row_of_ks_table_passes_check_with_both_of_its_models(
    table: str, kind: str, tmp_path: Path
) -> None:
    model, order = tmp_path / "model", "S1" if table == "kif_superni" else "L1"
    llama(model) if kind == "llama2_7b" else write_tiny_t5(model, d_model=16, d_kv=4, d_ff=32, num_layers=1)
    base = json.dumps(str(CONFIGS / "kif" / f"{kind}_{table.removeprefix('kif_')}.yaml"))
    data = benchmark(tmp_path / "data", order)
    found = cells(table, f"base={base}", f"base.model.path={model}", f"base.tasks.path={data}")
    problems = {cell.name: check(cell.config).problems for cell in found}
    assert {name for name, problem in problems.items() if problem} == set(), problems
