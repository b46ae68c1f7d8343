"""Commands for the importance of weights: attribute, and what is done with priors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from holdfast.cli.messages import console, told
from holdfast.cli.options import Column, Csv, Latex, new_file, new_folder, write_tables
from holdfast.errors import HoldfastError
from holdfast.progress import Progress, tell

Prior = Annotated[Path, typer.Argument(metavar="PRIOR", help="folder of a prior, or a .safetensors file")]


def attribute_command(
    model: Annotated[
        str, typer.Option(help="folder or hub id of the model; a PEFT adapter folder works too")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="jsonl, json, csv, tsv or parquet file; folder with such a file called train (and test); "
            "or hub id of a data set"
        ),
    ],
    out: Annotated[
        Path, typer.Option(callback=new_folder, help="folder for prior.safetensors and prior.json")
    ],
    importance: Annotated[
        str,
        typer.Option(
            help="inputs: what the default hold keeps; lrp, fisher, ...: every weight (see: list importances)"
        ),
    ] = "inputs",
    column: Column = None,
    like: Annotated[
        Path | None,
        typer.Option("--config", metavar="RUN|SKILLS|CONFIG.yaml", help="take template and evaluation of it"),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="options of the importance, or of the template"),
    ] = None,
    test_faithfulness: Annotated[
        bool,
        typer.Option("--test-faithfulness", help="zero the top weights and plot accuracy against how many"),
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    store: Annotated[
        str, typer.Option(help="the prior's numbers on disk: float32, bfloat16 or int8")
    ] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """What of a model matters for a data set, for a hold to keep: one modified backward pass a batch.

    Examples:

      holdfast attribute --model runs/toy/tasks/01-copy/model --config runs/toy --data my-task --out prior

      holdfast attribute --model m --data d --out p --importance lrp --set rules=paper --set aggregate=topk

      holdfast attribute --model m --data d --out p --importance fisher --test-faithfulness

    Prompts must look as in training: --config takes the run's template, and
    --set template.max_prompt_tokens=128 changes one option of it.

    Killed and started again, it continues: its state is saved every minute.
    """
    with told("The same command again continues."), Progress() as progress:
        from holdfast.runner.attribute import attribute_to_folder

        attribute_to_folder(
            model=model,
            data=data,
            out=out,
            importance=importance,
            assignments=options or [],
            faithfulness=test_faithfulness,
            dtype=dtype,
            seed=seed,
            progress=progress,
            like=like,
            store=store,
            columns=column or [],
        )


def prior_show(
    prior: Prior,
    top: Annotated[int, typer.Option(min=1, help="how many of the most important weights")] = 10,
    csv: Annotated[
        Path | None, typer.Option("--csv", callback=new_file, help="write a row a tensor as CSV to this file")
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option("--latex", callback=new_file, help="write a row a tensor as LaTeX to this file"),
    ] = None,
) -> None:
    """What a prior is, its mean by transformer block, and its most important weights.

    Example: holdfast prior show prior --top 20
    """
    with told():
        from holdfast.importance import ImportancePrior
        from holdfast.runner.table import prior_table
        from holdfast.tables import csv_text, latex_text

        loaded = ImportancePrior.load(prior)
        rows = loaded.table()
        table = list(rows[0]), [list(row.values()) for row in rows]
        write_tables(csv, latex, csv_text(*table), latex_text(*table))
        Console().print(prior_table(loaded, top))


class How(StrEnum):
    """How priors are merged."""

    max = "max"
    sum = "sum"
    mean = "mean"


def prior_merge(
    priors: Annotated[list[Path], typer.Argument(metavar="PRIOR...", help="two or more")],
    out: Annotated[Path, typer.Option(callback=new_folder, help="folder for the merged prior")],
    how: Annotated[
        How | None, typer.Option(help="default: max, of each weight; of the kind `inputs` sum")
    ] = None,
    balance: Annotated[
        bool,
        typer.Option("--balance/--as-they-are", help="scale each to mean 1 first, so that none outweighs"),
    ] = True,
) -> None:
    """Join priors of several tasks into one, as the strategies do.

    Example: holdfast prior merge may june --out both
    """
    with told():
        from holdfast.importance import ImportancePrior
        from holdfast.importance.prior import TENSORS

        if len(priors) < 2:
            raise HoldfastError(f"holdfast prior merge: got {len(priors)} prior; give at least two.")
        files = {prior.resolve() for prior in priors}
        if {out.resolve(), (out / TENSORS).resolve()} & files:
            raise HoldfastError(
                f"holdfast prior merge: --out {out} is one of the priors to be merged and would be replaced. "
                "Give a new folder."
            )
        loaded = [ImportancePrior.load(prior) for prior in priors]
        parts = [prior.mean_normalised() for prior in loaded] if balance else loaded
        merged = parts[0].merge(parts[1:], how=how.value if how else parts[0].usual_merge)
        merged.save(out)
        tell(console, f"Written: {out}: {merged!r}")


def prior_compare(first: Prior, second: Prior, csv: Csv = None, latex: Latex = None) -> None:
    """How alike two priors are, block by block: overlap of the most important tenth, and rank correlation.

    Example: holdfast prior compare may june
    """
    with told():
        from holdfast.importance import ImportancePrior
        from holdfast.importance.agreement import agreement
        from holdfast.runner.table import agreement_table

        shown = agreement_table(agreement(ImportancePrior.load(first), ImportancePrior.load(second)))
        write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)
