"""The command line: demo, learn, skills, ask, harness, run, compare, check, attribute, report, list."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from holdfast import world
from holdfast.errors import ConfigError, HoldfastError
from holdfast.progress import Interrupted, Progress, tell

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Continual fine-tuning of Hugging Face language models that keeps what they already know.

[bold]See it work[/bold] (offline, a few minutes on two cores):

  holdfast demo

[bold]Teach your model, month after month[/bold]:

  holdfast learn may.jsonl  --skills skills --model MODEL
  holdfast learn june.jsonl --skills skills
  holdfast skills skills
  holdfast ask skills "What is due on June 1?"
  holdfast explain skills "What is due on June 1?"

[bold]Check, run, compare[/bold]:

  holdfast check configs/toy.yaml
  holdfast run   configs/toy.yaml
  holdfast run   configs/toy.yaml strategy=sequential output=runs/plain
  holdfast report runs/toy runs/plain --out report.html
  holdfast compare configs/compare/toy.yaml

[bold]Only the importance of a model's weights[/bold]:

  holdfast attribute --model my-model --data my-task --out prior
""",
)
console = Console(stderr=True)
prior_app = typer.Typer(no_args_is_help=True, help="Look at priors on file, compare and merge them.")
app.add_typer(prior_app, name="prior")
Csv = Annotated[Path | None, typer.Option("--csv", help="write the table as CSV to this file")]
Latex = Annotated[Path | None, typer.Option("--latex", help="write the table as LaTeX to this file")]
Learned = Annotated[Path, typer.Argument(metavar="SKILLS|RUN", help="folder of skills, or of a run")]


def _version(asked: bool) -> None:
    if asked:
        import holdfast

        print(f"holdfast {holdfast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """What holds for every command."""


def _write_tables(csv: Path | None, latex: Path | None, as_csv: str, as_latex: str) -> None:
    from holdfast.storage import write_text

    for file, text in ((csv, as_csv), (latex, as_latex)):
        if file is not None:
            write_text(file, text)
            console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as training.epochs=5 strategy=ewc")
]


@contextmanager
def _told(again: str = "", processes: bool = False) -> Iterator[None]:
    """Errors made on purpose are told in a few lines; ctrl-C says how to continue.

    Parameters
    ----------
    processes : bool
        Whether a launcher may start the command in several processes.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    try:
        if world.launched() and not processes:
            raise ConfigError(
                "this command runs in one process, and a launcher started several; `holdfast run` and "
                "`holdfast learn` can be launched so. Start it without `accelerate launch`."
            )
        world.start()
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        detail = f"{stop} " if str(stop) else "Stopped. "
        if world.leads():
            tell(console, f"\n{detail}{again}", "yellow")
        raise typer.Exit(130) from stop
    except HoldfastError as error:
        tell(console, world.named_error(f"error: {error}"), "red")
        raise typer.Exit(2) from error
    except OSError as error:  # a file that may not be read, a disk that fails
        if error.errno == errno.EPIPE:  # of `| head`: not an error of ours
            raise
        where = f"{error.filename}: " if error.filename else ""
        tell(console, world.named_error(f"error: {where}{error.strerror or error}"), "red")
        raise typer.Exit(2) from error


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, by each process
    import warnings

    warnings.filterwarnings("ignore", module="(transformers|torch|trl|peft).*")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what would answer faster on a CPU
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="where runs and the report go")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Forget, and not forget: the whole job on a built-in toy suite, offline, in minutes.

    Trains a tiny Llama, then teaches it the same tasks one after another three times: plainly, with
    attribution-guided protection, and all tasks at once. Ends with a table and an HTML report.

    Example: holdfast demo --out demo --seed 0
    """
    with _told(f"Continue with: holdfast demo --out {out} --seed {seed}"), Progress() as progress:
        from holdfast.demo import run_demo

        run_demo(out, seed, progress)


class Metric(StrEnum):
    """How an answer is scored."""

    exact_match = "exact_match"
    rouge_l = "rouge_l"
    options = "options"
    choice = "choice"
    edit_similarity = "edit_similarity"
    sari = "sari"
    perplexity = "perplexity"


Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KEY=COLUMN",
        help="which column is which, where the data have other names: prompt=question, completion=answer; "
        "a text with {column} in it combines several; also references, messages, text, and turns=all: each "
        "answer of a chat",
    ),
]


@app.command("learn")
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
    with _told("The same command again continues.", processes=True), Progress() as progress:
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


@app.command("skills")
def skills_command(
    folder: Annotated[Path, typer.Argument(metavar="SKILLS", help="the folder that `holdfast learn` made")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for a program")] = False,
    report: Annotated[Path | None, typer.Option(help="write an HTML report to this file")] = None,
    export: Annotated[
        Path | None, typer.Option(help="write the model as a plain Hugging Face folder (weights, or adapter)")
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
    with _told():
        import json

        from holdfast.learner import Learner
        from holdfast.learner.ownership import move_base
        from holdfast.learner.skills import read_skills
        from holdfast.learner.skills import undo as take_back
        from holdfast.runner.table import harness_table, skills_table

        if rank is not None and export is None:
            raise HoldfastError("--rank: it is the rank of what --export writes; give --export FOLDER too.")
        if model is not None:
            move_base(folder, model)
        if undo:
            console.print(f"Taken back: {take_back(folder)}", highlight=False, markup=False)
        known = read_skills(folder)
        if export is not None:
            with Progress() as progress, Learner.load(folder, progress=progress) as learner:
                learner.export(export, rank=rank)
            console.print(f"Exported: {export}", highlight=False, markup=False, soft_wrap=True)
        if push is not None:
            with Learner.load(folder) as learner:
                url = learner.push_to_hub(push, private=private or None)
            console.print(f"Uploaded: {url}", highlight=False, markup=False, soft_wrap=True)
        if report is not None and not known.skills:
            raise HoldfastError(f"{folder}: nothing was learned here yet, so there is nothing to report.")
        if report is not None:
            from holdfast.report import write_report

            write_report([folder], report, title=folder.resolve().name)
            console.print(f"Report: {report}", highlight=False, markup=False, soft_wrap=True)
        shown = skills_table(known)
        _write_tables(csv, latex, shown.csv(), shown.latex())
        if as_json:
            print(json.dumps(known.record(), ensure_ascii=False, indent=2))
        else:
            Console().print(shown)
            if known.harness:
                Console().print(harness_table(known.harness))


@app.command("ask")
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
        Path | None, typer.Option(help="with --data: JSONL file for its rows with answers")
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
    with _told("The same command continues."):
        from holdfast.progress import stoppable
        from holdfast.runner.ask import ask_file, load_to_ask
        from holdfast.tasks import Columns

        if (data is None) != (out is None) or (data is not None and questions) or (column and not data):
            raise HoldfastError("ask: give questions, or --data FILE with --out FILE.jsonl (and --column).")
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
                console.print(f"{count} answers: {out}", highlight=False, markup=False, soft_wrap=True)
                return
            for question in questions or _lines():
                if base:
                    before = learner.answer([question], max_new_tokens=max_new_tokens, base=True)[0]
                    print(f"base: {before}")
                answer = learner.answer([question], **options)[0]
                print(f"now:  {answer}" if base else answer, flush=True)


@app.command("explain")
def explain_command(
    folder: Learned,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="what the model is asked")],
    answer: Annotated[
        str | None, typer.Option(help="the answer to be explained; default: what the model answers")
    ] = None,
    instead_of: Annotated[
        str | None, typer.Option(help="another answer: what speaks for the one and not for the other")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write the heat map as an HTML file")] = None,
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
    with _told():
        from holdfast.config import override
        from holdfast.runner.ask import load_to_ask

        chosen = override({}, options or [])
        with Progress() as progress, load_to_ask(folder, after, progress) as learner:
            why = learner.explain(question, answer, instead_of=instead_of, options=chosen)
        shown = Console(highlight=False, markup=False)
        shown.print(why, soft_wrap=True)
        shown.print(f"\nfor {why.what}, logits {why.target:.4g}; the strongest tokens:")
        for token, value in why.strongest():
            shown.print(f"{value:+10.3g}  {token!r}")
        shown.print(f"conservation error {why.conservation_error:.1e}")
        if out is not None:
            console.print(f"Written: {why.save(out)}", highlight=False, markup=False, soft_wrap=True)


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


@app.command("harness")
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

    Needs lm-eval (pip install 'holdfast\[harness]'). The results are kept in harness.json of the folder,
    where `holdfast report` finds them. With evaluation.harness=\[arc_easy] a run asks after each task itself.

    Examples:

      holdfast harness skills --tasks arc_easy,hellaswag --limit 200

      holdfast harness runs/toy --tasks my_task --include-path my-tasks
    """
    with _told("The same command again starts over."), Progress() as progress:
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
        _write_tables(csv, latex, shown.csv(), shown.latex())
        if as_json:
            print(json.dumps(found.model_dump(mode="json"), ensure_ascii=False, indent=2))
        else:
            Console().print(shown)


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to run")],
    overrides: Overrides = None,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """Learn a task stream under a strategy. Killed and started again, it continues.

    Examples:

      holdfast run configs/toy.yaml

      holdfast run configs/toy.yaml strategy=ewc strategy.strength=1e4 seed=1 output=runs/ewc-1

      holdfast run configs/toy.yaml strategy.importance=fisher strategy.control=permuted
    """
    again = " ".join(["holdfast run", str(config), *(overrides or [])])
    with _told(f"Continue with: {again}", processes=True), Progress() as progress:
        from holdfast.records import RunMetrics
        from holdfast.runner.config import load_config
        from holdfast.runner.loop import run
        from holdfast.runner.table import harness_table, metrics_table

        loaded = load_config(config, overrides or [])
        metrics = RunMetrics.model_validate(run(loaded, progress))
        if not world.leads():
            return
        shown = metrics_table([metrics])
        _write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)
        if metrics.harness:
            Console().print(harness_table(metrics.harness))
        progress.say(f"Run directory: {loaded.output}   Report: holdfast report {loaded.output}")


@app.command("compare")
def compare_command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="strategies, options, orders and seeds")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="such as seeds=[0,1] base.training.epochs=5"),
    ] = None,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """Compare strategies over options, orders and seeds in one sweep. Killed and started again, it continues.

    Writes compare.json, compare.md and report.html. Exit status 1: a cell failed; the others are finished.

    Examples:

      holdfast compare configs/compare/toy.yaml

      holdfast compare configs/compare/toy.yaml seeds=[0,1] jobs=2 base.training.epochs=2 output=runs/short
    """
    again = " ".join(["holdfast compare", str(grid), *(overrides or [])])
    with _told(f"Continue with: {again}"), Progress() as progress:
        from holdfast.report import write_report
        from holdfast.sweep.grid import load_grid
        from holdfast.sweep.loop import compare
        from holdfast.sweep.results import table as comparison
        from holdfast.sweep.table import live_table
        from holdfast.tables import csv_text, latex_text

        plan = load_grid(grid, overrides or [])
        output = Path(plan.grid.output)
        results = compare(plan, progress)
        Console().print(live_table(results))
        failed = [f"{item.cell}: {item.reason}" for item in results.failed]
        failed += [f"{row}: none of its grid points could be chosen" for row in results.without_point]
        for line in failed:
            tell(console, f"failed: {line}", "red")
        _write_tables(
            csv, latex, csv_text(*comparison(results, plain=True)), latex_text(*comparison(results))
        )
        written = [output / "compare.md"]
        if any(run.status == "finished" for row in results.rows for run in row.runs):
            written.append(write_report([output], output / "report.html", title=grid.stem))
        progress.say(f"Written: {', '.join(map(str, written))}")
        if failed:
            raise typer.Exit(1)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to check")],
    overrides: Overrides = None,
) -> None:
    """Find everything that can go wrong before training starts, and estimate memory and steps.

    Exit status 0: ready to run; 2: problems, all listed.

    Example: holdfast check configs/toy.yaml training.batch_size=64
    """
    with _told():
        from holdfast.runner.config import load_config
        from holdfast.runner.findings import check as check_run

        findings = check_run(load_config(config, overrides or []))
        findings.print(Console())
        if findings.problems:
            raise typer.Exit(2)


@app.command()
def attribute(
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
    out: Annotated[Path, typer.Option(help="folder for prior.safetensors and prior.json")],
    importance: Annotated[
        str,
        typer.Option(
            help="inputs: what the default hold keeps; lrp, fisher, ...: every weight (see: list importances)"
        ),
    ] = "inputs",
    column: Column = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="RUN_OR_CONFIG.yaml", help="take template and evaluation of this run"
        ),
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

      holdfast attribute --model runs/toy/tasks/01-reverse/model --config runs/toy --data my-task --out prior

      holdfast attribute --model m --data d --out p --importance lrp --set rules=paper --set aggregate=topk

      holdfast attribute --model m --data d --out p --importance fisher --test-faithfulness

    Prompts must look as in training: --config takes the run's template, and
    --set template.max_prompt_tokens=128 changes one option of it.

    Killed and started again, it continues: its state is saved every minute.
    """
    with _told("The same command again continues."), Progress() as progress:
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run or attribution directories")],
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="heading of the page")] = None,
) -> None:
    """One HTML file, readable offline, that shows and compares runs.

    Example: holdfast report runs/toy runs/plain --out report.html
    """
    with _told():
        from holdfast.report import write_report

        path = write_report(runs, out, title)
        tell(console, f"Report: {path}")


class Listing(StrEnum):
    """What can be listed."""

    strategies = "strategies"
    tasks = "tasks"
    orders = "orders"
    importances = "importances"
    metrics = "metrics"
    mechanisms = "mechanisms"
    controls = "controls"
    operators = "operators"


@app.command("list")
def list_command(
    what: Annotated[Listing, typer.Argument(help="what to list")], csv: Csv = None, latex: Latex = None
) -> None:
    """Show what can be named in a config.

    Example: holdfast list strategies
    """
    with _told():
        from holdfast.runner.table import listing

        shown = listing(what.value)
        _write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)


Prior = Annotated[Path, typer.Argument(metavar="PRIOR", help="folder of a prior, or a .safetensors file")]


@prior_app.command("show")
def prior_show(
    prior: Prior,
    top: Annotated[int, typer.Option(min=1, help="how many of the most important weights")] = 10,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="write a row a tensor as CSV to this file")
    ] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", help="write a row a tensor as LaTeX to this file")
    ] = None,
) -> None:
    """What a prior is, its mean by transformer block, and its most important weights.

    Example: holdfast prior show prior --top 20
    """
    with _told():
        from holdfast.importance import ImportancePrior
        from holdfast.runner.table import prior_table
        from holdfast.tables import csv_text, latex_text

        loaded = ImportancePrior.load(prior)
        rows = loaded.table()
        table = list(rows[0]), [list(row.values()) for row in rows]
        _write_tables(csv, latex, csv_text(*table), latex_text(*table))
        Console().print(prior_table(loaded, top))


class How(StrEnum):
    """How priors are merged."""

    max = "max"
    sum = "sum"
    mean = "mean"


@prior_app.command("merge")
def prior_merge(
    priors: Annotated[list[Path], typer.Argument(metavar="PRIOR...", help="two or more")],
    out: Annotated[Path, typer.Option(help="folder for the merged prior")],
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
    with _told():
        from holdfast.importance import ImportancePrior

        if len(priors) < 2:
            raise HoldfastError(f"holdfast prior merge: got {len(priors)} prior; give at least two.")
        loaded = [ImportancePrior.load(prior) for prior in priors]
        parts = [prior.mean_normalised() for prior in loaded] if balance else loaded
        merged = parts[0].merge(parts[1:], how=how.value if how else parts[0].usual_merge)
        merged.save(out)
        console.print(f"Written: {out}: {merged!r}", highlight=False, markup=False, soft_wrap=True)


@prior_app.command("compare")
def prior_compare(first: Prior, second: Prior, csv: Csv = None, latex: Latex = None) -> None:
    """How alike two priors are, block by block: overlap of the most important tenth, and rank correlation.

    Example: holdfast prior compare may june
    """
    with _told():
        from holdfast.importance import ImportancePrior
        from holdfast.importance.agreement import agreement
        from holdfast.runner.table import agreement_table

        shown = agreement_table(agreement(ImportancePrior.load(first), ImportancePrior.load(second)))
        _write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)


def main() -> Any:
    """Entry point for ``python -m holdfast``."""
    return app()
