"""From a model in memory to a Hugging Face folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from holdfast import world
from holdfast.models.adapters import ADAPTER, NAME, is_adapted
from holdfast.models.parts import text_part
from holdfast.progress import no_library_bars
from holdfast.storage import give_usual_mode

_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


_ABSENT = ("missing_entries", "gated_repo", "connection_errors")


@no_library_bars()
def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model (with PEFT: its adapter) and its tokenizer as a Hugging Face folder."""
    if not world.leads():
        return
    model.save_pretrained(folder)
    give_usual_mode(folder)
    _keep_processor(model, folder)
    for name, config in getattr(model, "peft_config", {}).items():
        _order_sets(config, folder / ADAPTER if name == NAME else folder / name / ADAPTER)
    tokenizer.save_pretrained(folder)


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an adapted model with its adapter merged into the weights; the model stays as it is."""
    save_model(copy.deepcopy(model).merge_and_unload(), tokenizer, folder)


def _keep_processor(model: Any, folder: Path) -> None:
    """Copy what a model's images go through first, which is no part of it: its weights are whole without."""
    from transformers.utils import cached_file

    if is_adapted(model) or text_part(model) is model:
        return
    for name in _PROCESSOR:
        missing: dict[str, Any] = {f"_raise_exceptions_for_{w}": False for w in _ABSENT}
        found = cached_file(str(model.config.name_or_path), name, local_files_only=True, **missing)
        if found is not None and not (folder / name).exists():
            (folder / name).write_bytes(Path(found).read_bytes())


def _order_sets(config: Any, file: Path) -> None:
    """Sort what PEFT keeps as sets: it writes them in an order that each process draws (PYTHONHASHSEED)."""
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    for key, value in values.items():
        if isinstance(getattr(config, key, None), set):
            values[key] = sorted(value)
    file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
