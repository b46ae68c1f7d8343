"""The command line: the app and its commands, in the order of ``--help``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from holdfast.cli.asking import ask_command, explain_command
from holdfast.cli.experiments import check_command, compare_command, demo_command, report_command, run_command
from holdfast.cli.importance import attribute_command, prior_compare, prior_merge, prior_show
from holdfast.cli.learning import harness_command, learn_command, skills_command
from holdfast.cli.listing import list_command
from holdfast.cli.options import Command

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
prior_app = typer.Typer(no_args_is_help=True, help="Look at priors on file, compare and merge them.")


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


_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "learn": learn_command,
    "skills": skills_command,
    "ask": ask_command,
    "explain": explain_command,
    "harness": harness_command,
    "run": run_command,
    "compare": compare_command,
    "check": check_command,
    "attribute": attribute_command,
    "report": report_command,
    "list": list_command,
}
_OF_PRIORS: dict[str, Callable[..., None]] = {
    "show": prior_show,
    "merge": prior_merge,
    "compare": prior_compare,
}
for _app, _commands in ((app, _COMMANDS), (prior_app, _OF_PRIORS)):
    for _name, _command in _commands.items():
        _app.command(_name, cls=Command)(_command)
app.add_typer(prior_app, name="prior")
