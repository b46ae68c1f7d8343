"""Commands that teach a model: learn, skills, harness."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from holdfast import world
from holdfast.cli.messages import console, told
from holdfast.cli.options import Column, Csv, Latex, Overrides, new_file, new_folder, write_tables
from holdfast.errors import HoldfastError
from holdfast.progress import Progress, tell


class Metric(StrEnum):
    """How an answer is scored."""

    exact_match = "exact_match"
    rouge_l = "rouge_l"
    options = "options"
    choice = "choice"
    edit_similarity = "edit_similarity"
    sari = "sari"
    perplexity = "perplexity"


def learn_command(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="rows: .jsonl, .json, .csv, .tsv, .parquet, .txt, or a folder"),
    ],
    skills: Annotated[Path, typer.Option(help="the folder of what is learned; the first task makes it")],
    options: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the model; needed for the first task, or where it has moved"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the skill; by default the name of the data")] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="rows to test the skill with; default: 10 % of the data, at most 200, kept aside"),
    ] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="how answers are scored (holdfast list metrics); by default their length decides; options: "
            "the likeliest of those in the labels.json beside the data"
        ),
    ] = None,
    column: Column = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="how old skills are kept (holdfast list strategies); default: attribution by inputs"
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train low-rank adapters, not the weights")] = False,
    protect_base: Annotated[
        bool | None,
        typer.Option(
            "--protect-base/--no-protect-base",
            help="hold what the base can do, from rows that it writes itself; default: if it is a chat model",
        ),
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="hold what the base can do by this file of text or chats instead")
    ] = None,
) -> None:
    """Teach a model one more thing, on top of what a folder of skills holds; no config is needed.

    The first call makes the folder; later ones go on from it, weeks later.
    What was learned before is held while the new data are learned.
    Killed at any moment, the same command continues.

    Examples:

      holdfast learn may.jsonl --skills skills --model my-model --lora

      holdfast learn june.jsonl --skills skills

      holdfast learn july.jsonl --skills skills --test july-test.jsonl

      holdfast learn august.csv --skills skills --column prompt=question --column completion=answer

    Then `holdfast skills skills` shows what is kept.
    """
    with told("The same command again continues.", processes=True), Progress() as progress:
        from holdfast.runner.learn import learn_data
        from holdfast.runner.table import skills_table

        known = learn_data(
            data,
            skills,
            model=model,
            name=name,
            test=test,
            metric=metric.value if metric is not None else None,
            columns=column or [],
            strategy=strategy,
            lora=lora,
            protect_base=protect_base,
            general=general,
            assignments=options or [],
            progress=progress,
        )
        if world.leads():
            Console().print(skills_table(known))


def skills_command(
    folder: Annotated[Path, typer.Argument(metavar="SKILLS", help="the folder that `holdfast learn` made")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for a program")] = False,
    report: Annotated[
        Path | None, typer.Option(callback=new_file, help="write an HTML report to this file")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            callback=new_folder, help="write the model as a plain Hugging Face folder (weights, or adapter)"
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="with --export: recompress a grown LoRA to this rank, by SVD")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="upload the model to the hub, with a model card")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="where the base is now, if it has moved since; it is remembered")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="--push makes a private repository")] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="take the last task back: the folder as it was before, bit for bit")
    ] = False,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """What a folder of skills holds: learned when, the score then and now, how far answers have moved.

    Scores are on the rows that `holdfast learn` kept aside.

    Examples:

      holdfast skills skills

      holdfast skills skills --export my-model

      holdfast skills skills --export my-adapter --rank 16

      holdfast skills skills --undo
    """
    with told():
        import json

        import holdfast
        from holdfast.learner.ownership import move_base
        from holdfast.learner.skills import read_skills
        from holdfast.learner.skills import undo as take_back
        from holdfast.runner.table import harness_table, skills_table

        if rank is not None and export is None:
            raise HoldfastError("--rank: it is the rank of what --export writes; give --export FOLDER too.")
        if private and push is None:
            raise HoldfastError(
                "--private: it is for the repository that --push makes; give --push REPO too."
            )
        if model is not None:
            move_base(folder, model)
        if undo:
            tell(console, f"Taken back: {take_back(folder)}")
        known = read_skills(folder)
        if export is not None:
            with Progress() as progress, holdfast.Learner.load(folder, progress=progress) as learner:
                learner.export(export, rank=rank)
            tell(console, f"Exported: {export}")
        if push is not None:
            with holdfast.Learner.load(folder) as learner:
                url = learner.push_to_hub(push, private=private or None)
            tell(console, f"Uploaded: {url}")
        if report is not None and not known.skills:
            raise HoldfastError(f"{folder}: nothing was learned here yet, so there is nothing to report.")
        if report is not None:
            from holdfast.report import write_report

            write_report([folder], report, title=folder.resolve().name)
            tell(console, f"Report: {report}")
        shown = skills_table(known)
        write_tables(csv, latex, shown.csv(), shown.latex())
        if as_json:
            print(json.dumps(known.record(), ensure_ascii=False, indent=2))
        else:
            Console().print(shown)
            if known.harness:
                Console().print(harness_table(known.harness))


def harness_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN|SKILLS", help="folder of a run, or of skills")],
    tasks: Annotated[str, typer.Option(help="names of lm-eval's tasks, with commas between them")],
    include_path: Annotated[
        str | None, typer.Option(help="folder with task files (YAML) of your own; works offline")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="at most that many questions a task")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    chat: Annotated[bool, typer.Option("--chat", help="ask through the tokenizer's chat template")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for a program")] = False,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    r"""General ability by EleutherAI's lm-eval: before anything was learned, and now.

    Needs lm-eval (pip install 'holdfast\[harness]'). The results are added to harness.json of the folder,
    where `holdfast report` finds them. With evaluation.harness=\[arc_easy] a run asks after each task itself.

    Examples:

      holdfast harness skills --tasks arc_easy,hellaswag --limit 200

      holdfast harness runs/toy --tasks my_task --include-path my-tasks
    """
    with told("The same command again starts over."), Progress() as progress:
        import json

        from holdfast.config import validate
        from holdfast.evaluation.harness import HarnessOptions, courses
        from holdfast.runner.harness import harness_folder
        from holdfast.runner.table import harness_table

        values: dict[str, Any] = {
            "tasks": [name.strip() for name in tasks.split(",") if name.strip()],
            "limit": limit,
        }
        values |= {"include_path": include_path, "batch_size": batch_size, "chat": chat}
        found = harness_folder(folder, validate(HarnessOptions, values, "holdfast harness"), progress)
        shown = harness_table(courses([found.base, found.now]))
        write_tables(csv, latex, shown.csv(), shown.latex())
        if as_json:
            print(json.dumps(found.model_dump(mode="json"), ensure_ascii=False, indent=2))
        else:
            Console().print(shown)
