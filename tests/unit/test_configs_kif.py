"""K's published settings: each config is right for a random model of the architecture that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.models import tiny_llama
from holdfast.runner.config import load_config
from holdfast.tasks import toy_tokenizer
from holdfast.tasks.orders import list_orders
from tiny_t5 import write_tiny_t5

FOLDER = Path(__file__).parents[2] / "configs" / "kif"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny T5 and a tiny Llama, as folders with a tokenizer."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("t5", "llama")}
    write_tiny_t5(folders["t5"], d_model=16, d_kv=4, d_ff=32, num_layers=1)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tiny_llama(tokenizer, hidden=16, layers=1, heads=4).save_pretrained(folders["llama"])
    tokenizer.save_pretrained(folders["llama"])
    return folders


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two rows of every task of both benchmarks."""
    folders = {}
    for name, order in (("long_sequence", "L1"), ("superni", "S1")):
        folders[name] = tmp_path_factory.mktemp(name)
        for task in list_orders()[order]:
            part = folders[name] / task
            part.mkdir()
            for split in ("train", "test"):
                rows = [json.dumps({"prompt": f"{task} {i}", "completion": "yes"}) for i in range(2)]
                (part / f"{split}.jsonl").write_text("\n".join(rows))
    return folders


def test_every_model_of_the_paper_and_as_has_a_config_for_both_benchmarks() -> None:
    assert {path.stem for path in CONFIGS} == {
        f"{model}_{benchmark}"
        for model in ("t5_base", "t5_large", "t5_xl", "llama2_7b", "llama32_3b")
        for benchmark in ("long_sequence", "superni")
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_has_the_papers_numbers(path: Path) -> None:
    config = load_config(path)
    training, strategy, lora = config.training, config.strategy, config.model.lora
    assert training.learning_rate == 3e-4
    assert training.epochs == 10
    assert training.batch_size * training.gradient_accumulation == (8 if path.stem[:2] == "t5" else 128)
    assert lora.r == 8
    assert lora.target_modules == (("q", "v") if path.stem[:2] == "t5" else ("q_proj", "v_proj"))
    assert (config.template.max_prompt_tokens, config.template.max_completion_tokens) == (512, 128)
    assert (strategy.sensitivity.alpha1, strategy.sensitivity.alpha2) == (0.85, 0.85)
    assert (strategy.beta, strategy.fusion.tau) == (0.7, 0.15)


ONE_OF_EACH = [FOLDER / "t5_large_superni.yaml", FOLDER / "llama2_7b_long_sequence.yaml"]
OTHERS = ["strategy=kif", "strategy=kif-m", "strategy=kif-lora-m"]


@pytest.mark.parametrize(
    ("path", "strategy"),
    [(path, "") for path in CONFIGS] + [(path, strategy) for path in ONE_OF_EACH for strategy in OTHERS],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_check_finds_nothing_wrong(
    path: Path, strategy: str, models: dict[str, Path], benchmark: dict[str, Path]
) -> None:
    model = models["t5" if path.stem.startswith("t5") else "llama"]
    data = benchmark["superni" if path.stem.endswith("superni") else "long_sequence"]
    overrides = [f"model.path={model}", f"tasks.path={data}", *([strategy] if strategy else [])]
    result = CliRunner().invoke(app, ["check", str(path), *overrides])
    assert result.exit_code == 0, result.output
    assert "Ready to run." in result.output
    assert "sensitivity (float32)" in result.output
