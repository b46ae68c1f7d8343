"""Tasks: where examples come from, in which order they are learned, and how they become token ids."""

from holdfast.tasks.cl_benchmark import ClBenchmarkSource
from holdfast.tasks.encode import Encoded, Encoder, Template, collate, collate_prompts
from holdfast.tasks.hub import HubSource, HubTask
from holdfast.tasks.jsonl import JsonlSource
from holdfast.tasks.load import load_task
from holdfast.tasks.orders import list_orders, match_task
from holdfast.tasks.rows import Columns, as_examples, as_questions
from holdfast.tasks.sources import TasksOptions, build_stream, inspect_stream, ordered_names, read_otherwise
from holdfast.tasks.task import Example, Task, TaskStream
from holdfast.tasks.toy import BASE_TASKS, STREAM_TASKS, TOY_TASKS, ToySource, toy_suite, toy_tokenizer

__all__ = [
    "BASE_TASKS",
    "STREAM_TASKS",
    "TOY_TASKS",
    "ClBenchmarkSource",
    "Columns",
    "Encoded",
    "Encoder",
    "Example",
    "HubSource",
    "HubTask",
    "JsonlSource",
    "Task",
    "TaskStream",
    "TasksOptions",
    "Template",
    "ToySource",
    "as_examples",
    "as_questions",
    "build_stream",
    "collate",
    "collate_prompts",
    "inspect_stream",
    "list_orders",
    "load_task",
    "match_task",
    "ordered_names",
    "read_otherwise",
    "toy_suite",
    "toy_tokenizer",
]
