"""`holdfast learn` and `holdfast skills`, each call in a process of its own, and kills in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.learner import Learner
from holdfast.models import ModelOptions, load_model, save_model
from holdfast.tasks import toy_tokenizer
from learning_data import SHORT, TOY, bytes_in, data_sets, rows_of, same, weights_in, write_rows
from processes import Ended, holdfast, started
from soak import damage

FISHER = ("--strategy", "ewc", "strategy.fisher.samples=8")
MAY = ("learn", "may.jsonl", "--skills", "s", *FISHER, *TOY, *SHORT)
JUNE = ("learn", "june.jsonl", "--skills", "s")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a folder in which `may` and `june` were learned without a kill. To be copied."""
    folder = tmp_path_factory.mktemp("made")
    data_sets(folder, "may", "june", "july")
    for command in (MAY, JUNE):
        ended = holdfast(*command, cwd=folder)
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "there")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Only the data."""
    data_sets(tmp_path, "may", "june", "july")
    return tmp_path


def in_this_process(*arguments: str, cwd: Path) -> Ended:
    """Where nothing is trained a process of its own would show no more."""
    with contextlib.chdir(cwd):
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    return Ended(result.exit_code, result.stdout, result.stderr)


def refused(ended: Ended, *texts: str) -> None:
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    for text in texts:
        assert text in ended.err, ended.err


def assert_as_if_never_killed(folder: Path, made: Path) -> None:
    for part in ("01-may", "02-june"):
        ours, whole = folder / "s" / "tasks" / part, made / "s" / "tasks" / part
        assert same(weights_in(ours), weights_in(whole)), part
        values = [json.loads((f / "strategy.json").read_text()) for f in (ours, whole)]
        assert all(value.pop("seconds") for value in values)
        assert values[0] == values[1]
        for file in ("strategy.safetensors", "test.jsonl", "predictions/may.jsonl"):
            assert (ours / file).read_bytes() == (whole / file).read_bytes(), (part, file)
        scores = [json.loads((f / "metrics.json").read_text())["scores"] for f in (ours, whole)]
        assert scores[0] == scores[1]
    assert {p.name for p in (folder / "s").rglob("*")} == {p.name for p in (made / "s").rglob("*")}


# killed


def test_learning_killed_between_and_inside_ends_bit_identical(made: Path, data: Path) -> None:
    deaths = [
        (MAY, ("holdfast.training.steps.seal_checkpoint", 2)),  # its first checkpoint is sealed
        (MAY, ("holdfast.strategies.context.compute_prior", 1)),  # trained
        (MAY, None),
        (JUNE, ("holdfast.training.bridge.completion_loss", 2)),  # no checkpoint yet
        (JUNE, ("holdfast.learner.testing.evaluate_encoded", 2)),  # asked about may only
        (JUNE, ("os.rename", 1)),  # all written, not committed
        (JUNE, None),
    ]
    for command, die in deaths:
        ended = holdfast(*command, cwd=data, die=die)
        assert ended.code == (0 if die is None else -signal.SIGKILL), ended.err
    assert_as_if_never_killed(data, made)


@pytest.mark.slow
def test_python_m_holdfast_killed_from_outside_ends_bit_identical(made: Path, data: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for command, part in ((MAY, "01-may"), (JUNE, "02-june")):
        line = [sys.executable, "-m", "holdfast", *command]
        process = subprocess.Popen(line, cwd=data, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if list((data / "s" / "tasks").glob(f"{part}.partial/checkpoints/*/seal.json")):
                process.kill()
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
        subprocess.run(line, cwd=data, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert kills == 2, "it was too fast to be killed: this test showed nothing"
    assert_as_if_never_killed(data, made)


def test_ctrl_c_saves_and_says_how_to_continue(made: Path, data: Path) -> None:
    long = ("training.max_steps=100000", "training.checkpoint_steps=100000")
    command = ("learn", "may.jsonl", "--skills", "s", *FISHER, *TOY, *long)
    process = started(*command, cwd=data, out=data / "out", err=data / "err")
    deadline = time.monotonic() + 100
    while "learning" not in ((data / "err").read_text() if (data / "err").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(60)
    told = (data / "err").read_text()
    assert process.exitcode == 130, told
    assert "of 100000; saved. The same command again continues." in told
    assert "Traceback" not in told
    assert list((data / "s" / "tasks").glob("01-may.partial/checkpoints/*/seal.json"))


@pytest.mark.slow
def test_an_attempt_with_other_rows_under_the_same_name_starts_over(made: Path, data: Path) -> None:
    rows = rows_of("may")
    write_rows(data / "may.jsonl", rows[:20])
    holdfast(*MAY, cwd=data, die=("holdfast.strategies.context.compute_prior", 1))
    write_rows(data / "may.jsonl", rows)
    ended = holdfast(*MAY, cwd=data)
    assert "begun with other rows or training options; starting over" in ended.err.replace("\n", " ")
    assert same(weights_in(data / "s/tasks/01-may"), weights_in(made / "s/tasks/01-may"))


def test_after_an_error_inside_training_the_same_command_continues(made: Path, data: Path) -> None:
    ended = holdfast(*MAY, cwd=data, die=("holdfast.training.steps.seal_checkpoint", 3))
    assert ended.code == -signal.SIGKILL
    diverging = [*MAY, "training.learning_rate=1e30", "training.optimizer=sgd", "training.max_grad_norm=0"]
    refused(holdfast(*diverging, cwd=data), "The loss became", "Lower training.learning_rate")
    assert holdfast(*MAY, "training.learning_rate=1e-3", "training.optimizer=adamw", cwd=data).code == 0
    assert same(weights_in(data / "s/tasks/01-may"), weights_in(made / "s/tasks/01-may"))


# taken back


def test_undo_gives_the_folder_as_it_was_bit_for_bit(there: Path) -> None:
    before = bytes_in(there / "s")
    assert holdfast("learn", "july.jsonl", "--skills", "s", cwd=there).code == 0
    assert bytes_in(there / "s") != before
    ended = holdfast("skills", "s", "--undo", cwd=there)
    assert (ended.code, ended.err) == (0, "Taken back: july\n")
    assert "july" not in ended.out
    assert bytes_in(there / "s") == before
    holdfast(
        "learn", "july.jsonl", "--skills", "s", cwd=there, die=("holdfast.training.steps.seal_checkpoint", 2)
    )
    assert list((there / "s").rglob("seal.json"))
    assert holdfast("skills", "s", "--undo", cwd=there).err == "Taken back: july\n"
    assert bytes_in(there / "s") == before


@pytest.mark.slow
def test_undo_that_is_killed_leaves_the_task_or_takes_it_and_no_litter(there: Path) -> None:
    ended = holdfast("skills", "s", "--undo", cwd=there, die=("shutil.rmtree", 1))
    assert ended.code == -signal.SIGKILL
    assert [skill["name"] for skill in skills_of(there)] == ["may"]
    assert holdfast(*JUNE, cwd=there).code == 0
    assert not list((there / "s" / "tasks").glob(".*"))


def test_first_task_taken_back_lets_another_strategy_and_model_begin(there: Path) -> None:
    for task in ("june", "may"):
        assert holdfast("skills", "s", "--undo", cwd=there).err == f"Taken back: {task}\n"
    assert sorted(bytes_in(there / "s")) == ["config.yaml", "environment.json", "run.lock"]
    refused(holdfast("skills", "s", "--undo", cwd=there), "nothing was learned here")
    refused(holdfast(*JUNE, cwd=there), "nothing was learned here yet", "Give --model")
    ended = holdfast(*JUNE, *TOY, *SHORT, "model.hidden=16", "--strategy", "sequential", cwd=there)
    assert ended.code == 0, ended.err
    assert "sequential" in ended.err


def test_torn_last_task_is_named_and_can_be_taken_back(there: Path, made: Path) -> None:
    weights = next((there / "s/tasks/02-june/model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(
        holdfast("learn", "july.jsonl", "--skills", "s", cwd=there),
        "02-june: model/model.safetensors is torn or was changed",
        "holdfast skills s --undo",
    )
    assert holdfast("skills", "s", "--undo", cwd=there).code == 0
    assert holdfast(*JUNE, cwd=there).code == 0
    assert_as_if_never_killed(there, made)


@pytest.mark.parametrize("file", ["metrics.json", "task.json", "test.jsonl", "predictions/may.jsonl"])
def test_torn_file_of_an_earlier_task_is_named(file: str, there: Path) -> None:
    torn = there / "s" / "tasks" / "01-may" / file
    torn.write_bytes(torn.read_bytes()[:-9])
    if file != "test.jsonl":  # which the overview doesn't read
        refused(in_this_process("skills", "s", cwd=there), str(Path("s/tasks/01-may") / file))
    if file != "predictions/may.jsonl":
        refused(
            holdfast("learn", "july.jsonl", "--skills", "s", cwd=there),
            f"01-may: {file} is torn or was changed",
        )


@pytest.mark.parametrize(
    ("file", "how", "named"),
    [
        ("config.yaml", "truncated", "s/config.yaml: damaged"),
        ("config.yaml", "flipped", "s/config.yaml: damaged"),
        ("tasks/02-june/strategy.safetensors", "flipped", "02-june: strategy.safetensors is torn"),
        ("tasks/02-june/model/model.safetensors", "another's", "02-june: model/model.safetensors is torn"),
        ("tasks/02-june/manifest.json", "deleted", "02-june: manifest.json is missing"),
        ("tasks/01-may/test.jsonl", "another's", "01-may: test.jsonl is torn or was changed"),
        ("tasks/01-may/task.json", "deleted", "01-may: task.json is missing"),
    ],
    ids=lambda value: value.rpartition("/")[2].partition(":")[0],
)
def test_damaged_file_of_skills_is_named(file: str, how: str, named: str, there: Path) -> None:
    other = Path(file.replace("02-june", "01-may") if "02" in file else file.replace("01-may", "02-june"))
    assert damage(there / "s" / file, how, there / "s" / other)
    refused(holdfast("learn", "july.jsonl", "--skills", "s", cwd=there), named)


# what is told


def skills_of(folder: Path, skills: str = "s") -> list[dict[str, Any]]:
    ended = holdfast("skills", skills, "--json", cwd=folder)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["skills"]


def test_json_tells_each_skill_then_and_now(made: Path) -> None:
    ended = holdfast("skills", "s", "--json", cwd=made)
    told = json.loads(ended.out)
    assert ended.err == ""
    assert {"method", "strategy", "skills", "matrix", "ap", "bwt", "unfinished", "disk"} <= told.keys()
    assert [skill["name"] for skill in told["skills"]] == ["may", "june"]
    for number, skill in enumerate(told["skills"]):
        part = made / "s" / "tasks" / f"0{number + 1}-{skill['name']}"
        then, now = (
            json.loads((f / "metrics.json").read_text())["scores"][skill["name"]]
            for f in (part, made / "s/tasks/02-june")
        )
        assert (skill["then"], skill["now"]) == (then, now)
        assert (skill["train_rows"], skill["test_rows"], skill["metric"]) == (36, 4, "exact_match")
        assert skill["learned"].startswith("20")
        assert skill["disk"] == sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
    answers = [
        [json.loads(line)["generated"] for line in (made / "s/tasks" / part / "predictions/may.jsonl").open()]
        for part in ("01-may", "02-june")
    ]
    moved = sum(a != b for a, b in zip(*answers, strict=True))
    assert told["skills"][0]["drift"] == 25.0 * moved
    assert told["skills"][1]["drift"] == 0.0


def test_table_names_the_skills_and_what_is_unfinished(there: Path) -> None:
    holdfast(
        "learn", "july.jsonl", "--skills", "s", cwd=there, die=("holdfast.training.steps.seal_checkpoint", 2)
    )
    shown = holdfast("skills", "s", cwd=there).out
    for text in ("may", "june", "july", "then", "now", "ewc", "MiB on disk"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert skills_of(there)[-1]["name"] == "june"


def test_report_is_a_page_that_names_the_skills(there: Path) -> None:
    ended = holdfast("skills", "s", "--report", "page.html", cwd=there)
    assert ended.code == 0, ended.err
    page = (there / "page.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert all(name in page for name in ("may", "june"))


@pytest.mark.parametrize("command", ["learn", "skills"])
def test_help_fits_80_columns_without_ragged_lines(command: str, tmp_path: Path) -> None:
    ended = holdfast(command, "--help", cwd=tmp_path)
    assert ended.code == 0
    text = ended.out.split("Arguments")[0]
    assert all(len(line) <= 80 for line in ended.out.splitlines())
    assert "\n What was learned before is held" in text or command == "skills"


# refused, by message


def test_learned_data_again_has_nothing_to_do(there: Path) -> None:
    before = bytes_in(there / "s")
    for command in (JUNE, MAY):
        ended = holdfast(*command, cwd=there)
        assert ended.code == 0
        assert "is learned already; nothing to do." in ended.err
        assert bytes_in(there / "s") == before


def test_other_rows_under_a_known_name_are_refused(there: Path) -> None:
    write_rows(there / "june.jsonl", rows_of("june", 41))
    before = bytes_in(there / "s")
    refused(holdfast(*JUNE, cwd=there), "a task 'june' was learned already, from other rows", "--name")
    assert bytes_in(there / "s") == before
    assert holdfast(*JUNE, "--name", "june 2", cwd=there).code == 0
    assert [skill["name"] for skill in skills_of(there)] == ["may", "june", "june 2"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model", "elsewhere"], "has --model None, not elsewhere"),
        (["--strategy", "osf"], "has --strategy ewc, not osf"),
        (["--lora"], "has no --lora"),
        (["model.hidden=16"], "model can't be changed once the first task has begun"),
        (["strategy.strength=1", "seed=3"], "seed, strategy can't be changed"),
        (["template.strip=both"], "template can't be changed"),
        (["replay.ratio=0.5"], "replay can't be changed"),
        (["training.epoch=3"], "Did you mean 'epochs'?"),
        (["nonsense"], "expected key=value"),
        (["--test", "nowhere.jsonl"], "no 'nowhere.jsonl'"),
        (["--metric", "bleu"], "'bleu' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_folder_is_refused_and_nothing_written(
    more: list[str], told: str, made: Path
) -> None:
    before = bytes_in(made / "s")
    refused(in_this_process("learn", "july.jsonl", "--skills", "s", *more, cwd=made), told)
    assert bytes_in(made / "s") == before


def test_unfinished_other_task_is_named(there: Path) -> None:
    july = ("learn", "july.jsonl", "--skills", "s")
    holdfast(*july, cwd=there, die=("holdfast.training.steps.seal_checkpoint", 2))
    write_rows(there / "august.jsonl", rows_of("august"))
    refused(
        holdfast("learn", "august.jsonl", "--skills", "s", cwd=there),
        "'03-july' was begun and is not finished",
        "holdfast skills s --undo",
    )


def test_strategy_that_does_not_fit_the_model_leaves_no_folder_behind(data: Path) -> None:
    command = [a if a != "ewc" else "o-lora" for a in MAY if "fisher" not in a]
    refused(holdfast(*command, cwd=data), "model.lora")
    assert not (data / "s").exists()
    assert holdfast(*MAY, cwd=data).code == 0


def test_folder_that_is_something_else_is_refused_and_untouched(data: Path) -> None:
    thesis = data / "s" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    refused(holdfast(*MAY, cwd=data), "not empty and not a learner's folder (found thesis.tex)")
    assert thesis.read_text() == "mine"
    assert {p.name for p in thesis.parent.iterdir()} <= {"thesis.tex", "run.lock"}
    (data / "file").write_text("mine")
    refused(holdfast(*[a if a != "s" else "file" for a in MAY], cwd=data), "file: can't be used as")
    refused(holdfast("skills", "file", cwd=data), "there is no learner here")
    refused(holdfast("skills", "s", "--undo", cwd=data), "there is no learner here")


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "the data set is empty"), ("{\n", "not JSON"), ('{"prompt": "a"}\n', "no column 'completion'")],
)
def test_unusable_data_is_told_before_a_folder_is_made(text: str, told: str, data: Path) -> None:
    (data / "may.jsonl").write_text(text)
    refused(in_this_process(*MAY, cwd=data), told)
    assert not (data / "s").exists()
    refused(in_this_process(*[a if a != "may.jsonl" else "no.jsonl" for a in MAY], cwd=data), "no 'no.jsonl'")
    refused(in_this_process(*JUNE, cwd=data), "Give --model")


@pytest.mark.slow
def test_too_few_rows_to_keep_any_aside_are_learned_all(data: Path) -> None:
    write_rows(data / "may.jsonl", rows_of("may", 3))
    ended = holdfast(*MAY, cwd=data)
    assert ended.code == 0, ended.err
    assert "3 rows, 0 kept aside" in ended.err
    (skill,) = skills_of(data)
    assert (skill["train_rows"], skill["then"], skill["now"], skill["drift"]) == (3, None, None, None)


@pytest.mark.slow
def test_metric_is_by_the_answers_length_or_as_asked(data: Path) -> None:
    long = [{**row, "completion": "a b c d e f g h " + row["completion"]} for row in rows_of("may")]
    write_rows(data / "may.jsonl", long)
    assert holdfast(*MAY, cwd=data).code == 0
    assert holdfast(*JUNE, "--metric", "rouge_l", cwd=data).code == 0
    assert holdfast("learn", "july.jsonl", "--skills", "s", cwd=data).code == 0
    assert [skill["metric"] for skill in skills_of(data)] == ["rouge_l", "rouge_l", "exact_match"]


@pytest.mark.slow
def test_test_file_is_what_is_asked_and_all_rows_are_trained(data: Path) -> None:
    write_rows(data / "other.jsonl", rows_of("other", 7))
    assert holdfast(*MAY, "--test", "other.jsonl", cwd=data).code == 0
    (skill,) = skills_of(data)
    assert (skill["train_rows"], skill["test_rows"]) == (40, 7)


# exported

PLAIN = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "holdfast":
            raise ImportError("no holdfast here")
sys.meta_path.insert(0, Block())
try:
    import holdfast
except ImportError:
    pass
else:
    sys.exit("it is not blocked")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
answers = []
for folder, base in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(base)
    if base != folder:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("may abcd: ", return_tensors="pt").input_ids
    with torch.no_grad():
        answers.append(model(input_ids=ids).logits[0, -1].double().tolist())
print(json.dumps(answers))
"""


def test_export_answers_as_the_learner_does_without_holdfast(there: Path) -> None:
    """Whole weights, and an adapter with its base in a folder."""
    base = there / "base"
    save_model(*load_model(ModelOptions(toy=True, hidden=32, layers=1), 5, toy_tokenizer), base)
    lora = ("learn", "may.jsonl", "--skills", "lora", "--model", "base", "--lora", *SHORT)
    assert holdfast(*lora, "--strategy", "sequential", cwd=there).code == 0
    for skills, out in (("s", "plain"), ("lora", "adapter")):
        ended = holdfast("skills", skills, "--export", out, cwd=there)
        assert ended.code == 0, ended.err
        assert f"Exported: {out}" in ended.err
        assert not (there / skills / "tasks" / "run.lock").exists()
        refused(holdfast("skills", skills, "--export", out, cwd=there), "not an empty folder")
    assert (there / "adapter" / "adapter_config.json").exists()
    assert not (there / "adapter" / "model.safetensors").exists()
    arguments = ["plain", "plain", "adapter", "base"]
    script = [sys.executable, "-c", PLAIN, *arguments]
    answers = json.loads(subprocess.run(script, cwd=there, check=True, capture_output=True).stdout)
    for answer, skills in zip(answers, ("s", "lora"), strict=True):
        with Learner.load(there / skills) as learner:
            ids = learner.tokenizer("may abcd: ", return_tensors="pt").input_ids
            with torch.no_grad():
                ours = learner.route("may")(input_ids=ids).logits[0, -1].double()
        assert torch.equal(ours, torch.tensor(answer, dtype=torch.float64))


@pytest.mark.slow
def test_model_is_found_again_from_another_folder(there: Path) -> None:
    save_model(*load_model(ModelOptions(toy=True, hidden=16, layers=1), 5, toy_tokenizer), there / "base")
    lora = ("learn", "may.jsonl", "--skills", "lora", "--model", "base", "--strategy", "sequential", *SHORT)
    assert holdfast(*lora, cwd=there).code == 0
    (there / "deep").mkdir()
    ended = holdfast("learn", "../june.jsonl", "--skills", "../lora", cwd=there / "deep")
    assert ended.code == 0, ended.err
    assert holdfast(*lora, cwd=there).code == 0, "the same words mean the same model"


@pytest.mark.parametrize("said", [(), ("strategy.importance.rank=null",), ("--strategy", "ewc")])
def test_a_prior_larger_than_the_model_is_cut_where_nobody_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: tuple[str, ...]
) -> None:
    monkeypatch.setattr("holdfast.runner.learn.advised_rank", lambda model: 5)
    arguments = ["learn", "may.jsonl", "--skills", "s", *TOY, *SHORT, *said]
    ended = in_this_process(*arguments, cwd=data)
    assert ended.code == 0, ended.err
    assert ("5 directions of each map are held apart" in " ".join(ended.err.split())) == (not said)
    june = in_this_process("learn", "june.jsonl", "--skills", "s", cwd=data)
    assert june.code == 0, june.err
    assert "directions" not in june.err
    with Learner.load(data / "s") as learner:
        rank = getattr(getattr(learner.config.strategy, "importance", None), "rank", None)
        assert rank == (None if said else 5)


def test_an_odd_name_is_shown_and_taken_back_as_it_was_given(data: Path) -> None:
    name = "glue/mnli [bold]x"
    ended = in_this_process("learn", "may.jsonl", "--skills", "s", *TOY, *SHORT, "--name", name, cwd=data)
    assert ended.code == 0, ended.err
    taken = in_this_process("skills", "s", "--undo", cwd=data)
    assert f"Taken back: {name}" in " ".join(taken.err.split()), taken


def test_what_is_no_utf_8_in_a_name_is_refused(data: Path) -> None:
    command = ("learn", "may.jsonl", *TOY, *SHORT)
    refused(in_this_process(*command, "--skills", "s", "--name", "x\udcff", cwd=data), "is no text in UTF-8")
    shutil.copy(data / "may.jsonl", data / "ma\udcffy.jsonl")
    odd = ("learn", "ma\udcffy.jsonl", "--skills", "s", *TOY, *SHORT)
    refused(in_this_process(*odd, cwd=data), "is no text in UTF-8")
    ended = in_this_process(*odd, "--name", "may", cwd=data)
    assert ended.code == 0, ended.err


def test_an_export_does_not_go_among_what_was_learned(there: Path) -> None:
    before = sorted(str(p) for p in (there / "s").rglob("*"))
    refused(in_this_process("skills", "s", "--export", "s/tasks/x", cwd=there), "lies among what was learned")
    assert sorted(str(p) for p in (there / "s").rglob("*")) == before


def test_an_adapter_s_folder_is_trained_at_a_lora_s_rate(data: Path) -> None:
    save_model(*load_model(ModelOptions(toy=True, hidden=16, layers=1), 0, toy_tokenizer), data / "m")
    first = ("learn", "may.jsonl", "--skills", "s", "--model", "m", "--lora", "training.max_steps=1")
    ended = in_this_process(*first, cwd=data)
    assert "learning rate 0.0002" in ended.err, ended.err
    assert in_this_process("skills", "s", "--export", "e", cwd=data).code == 0
    again = in_this_process("learn", "june.jsonl", "--skills", "t", "--model", "e", first[-1], cwd=data)
    assert "learning rate 0.0002" in again.err, again
