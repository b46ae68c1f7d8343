"""Commands that put questions to a model: ask, explain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from holdfast.cli.messages import console, told
from holdfast.cli.options import Column, new_file
from holdfast.errors import HoldfastError
from holdfast.progress import Progress, tell

_SHOWN = 40  # characters of a question that something is told of
Learned = Annotated[Path, typer.Argument(metavar="SKILLS|RUN", help="folder of skills, or of a run")]


def ask_command(
    folder: Learned,
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUESTION", help="without any they are read line by line"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="a file of questions, in any form that `holdfast learn` takes")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=new_file, help="with --data: JSONL file for its rows with answers")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="which task they are of; only strategies that must be told need it")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="TASK", help="ask the model as it was after this task")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="also ask the model as it was before the first task")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="length of an answer; default: template.max_completion_tokens")
    ] = None,
    column: Column = None,
) -> None:
    """Ask what a folder holds: questions are framed as its rows were, and nothing is sampled.

    Each question stands alone. A file's rows come back with "generated" in them; killed, the same command
    goes on.

    Examples:

      holdfast ask skills "What is the capital of France?"

      holdfast ask skills --base "What is the capital of France?"

      holdfast ask skills --data questions.jsonl --out answers.jsonl

      cat questions.txt | holdfast ask skills
    """
    with told("The same command continues."):
        from holdfast.progress import stoppable
        from holdfast.runner.ask import ask_file, load_to_ask, lost_of
        from holdfast.tasks import Columns, as_questions

        wrong = [
            "--data without --out" * (data is not None and out is None),
            "--out without --data" * (data is None and out is not None),
            "--column without --data" * (data is None and bool(column)),
            "questions and --data" * (data is not None and bool(questions)),
        ]
        if got := ", ".join(filter(None, wrong)):
            raise HoldfastError(
                f"ask: got {got}. Give questions, or --data FILE with --out FILE.jsonl (and --column)."
            )
        options: dict[str, Any] = {"task": task, "max_new_tokens": max_new_tokens}
        with Progress(quiet=data is None) as progress, load_to_ask(folder, after, progress) as learner:
            if data is not None and out is not None:
                with stoppable():
                    count = ask_file(
                        learner,
                        data,
                        out,
                        columns=Columns.of(column or []),
                        base=base,
                        progress=progress,
                        **options,
                    )
                tell(console, f"{count} answers: {out}")
                return
            for question in questions or _lines():
                asked = as_questions([question])
                for lost in lost_of(learner, asked, max_new_tokens=max_new_tokens):
                    tell(console, f"{question[:_SHOWN]}: {lost}")
                if base:
                    before = learner.answer(asked, max_new_tokens=max_new_tokens, base=True)[0]
                    print(f"base: {before}")
                answer = learner.answer(asked, **options)[0]
                print(f"now:  {answer}" if base else answer, flush=True)


def explain_command(
    folder: Learned,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="what the model is asked")],
    answer: Annotated[
        str | None, typer.Option(help="the answer to be explained; default: what the model answers")
    ] = None,
    instead_of: Annotated[
        str | None, typer.Option(help="another answer: what speaks for the one and not for the other")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=new_file, help="write the heat map as an HTML file")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="TASK", help="explain the model as it was after this task")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="rules=paper, target=first, ...")
    ] = None,
) -> None:
    """Why a model gives an answer: the relevance of each token that it read, green for it, red against.

    The question is framed as the rows that were learned. Of a model without a folder: holdfast.explain(...).

    Examples:

      holdfast explain skills "What is due on June 1?"

      holdfast explain skills "What is due on June 1?" --answer rent --instead-of nothing --out why.html
    """
    with told():
        from holdfast.config import override
        from holdfast.runner.ask import load_to_ask

        chosen = override({}, options or [])
        with Progress() as progress, load_to_ask(folder, after, progress) as learner:
            why = learner.explain(question, answer, instead_of=instead_of, options=chosen)
        shown = Console(highlight=False, markup=False)
        shown.print(why, soft_wrap=True)
        shown.print(f"\nfor {why.what}, {why.adds_up}; the strongest tokens:", soft_wrap=True)
        for token, value in why.strongest():
            shown.print(f"{value:+10.3g}  {token!r}")
        shown.print(f"conservation error {why.conservation_error:.1e}")
        if out is not None:
            tell(console, f"Written: {why.save(out)}")


def _lines() -> Iterator[str]:
    """Questions from a terminal, until an empty line or its end; or from a pipe, a line each."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    console.print("A question a line; an empty line ends it.", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
