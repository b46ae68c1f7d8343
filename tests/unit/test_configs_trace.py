"""A's figure 1 and TRACE: the config is right for a random model of that architecture and TRACE's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tasks_trace import write_trace
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.models import tiny_llama
from holdfast.tasks import toy_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "trace" / "llama32_3b_summary_to_code.yaml"


@pytest.mark.parametrize("more", [[], ["tasks.order=null"], ["strategy=sequential"], ["strategy=sapt-lora"]])
def test_check_finds_nothing_wrong(more: list[str], tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tiny_llama(tokenizer, hidden=16, layers=1, heads=4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_trace(tmp_path / "trace")
    overrides = [f"model.path={tmp_path / 'model'}", f"tasks.path={data}", *more]
    result = CliRunner().invoke(app, ["check", str(CONFIG), *overrides])
    assert result.exit_code == 0, result.output
    assert "Ready to run." in result.output
