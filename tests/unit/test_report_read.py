from __future__ import annotations

import json

import pytest
from report_runs import TASKS, stream_matrix, write_attribution, write_json, write_prior, write_run

from holdfast.errors import DataError
from holdfast.report.read import AttributionRecord, RunRecord, read


def test_a_run_is_read_with_every_stage_and_artefact(tmp_path):
    run = read(write_run(tmp_path / "r", "gate", "attribution", protected=True))
    assert isinstance(run, RunRecord)
    assert [stage.task for stage in run.stages] == list(TASKS)
    assert [stage.gate is not None for stage in run.stages] == [False, True, True, True]
    assert all(stage.prior and stage.training and stage.training.loss for stage in run.stages)
    assert run.config.startswith("strategy:")
    assert run.environment.python == "3.11.9"
    assert run.seen == 4


def test_a_run_needs_only_its_metrics(tmp_path):
    run = read(write_run(tmp_path / "r", "bare", artefacts=False))
    assert isinstance(run, RunRecord)
    assert run.stages == ()
    assert run.config == ""


def test_a_stage_that_was_not_committed_is_ignored(tmp_path):
    path = write_run(tmp_path / "r", "gate")
    write_json(path / "tasks" / "05-next.partial" / "training.json", {"loss": "torn"})
    run = read(path)
    assert isinstance(run, RunRecord)
    assert len(run.stages) == 4


def test_nan_and_null_scores_both_mean_not_measured(tmp_path):
    matrix = stream_matrix(90, 0.5)
    matrix[2][0], matrix[3][1] = float("nan"), None
    run = read(write_run(tmp_path / "r", "x", matrix=matrix, artefacts=False))
    assert isinstance(run, RunRecord)
    assert run.metrics.matrix[2][0] is None
    assert run.metrics.matrix[3][1] is None


def test_an_attribution_is_read_with_its_prior_and_curves(tmp_path):
    record = read(write_attribution(tmp_path / "a"))
    assert isinstance(record, AttributionRecord)
    assert record.prior is not None
    assert record.meta.samples_used == 97
    assert record.faithfulness is not None
    assert record.faithfulness.percent[-1] == 20


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder.*holdfast run"):
        read(tmp_path / "nowhere")


def test_a_folder_that_is_no_run_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.json.*no prior\.json"):
        read(tmp_path)


def test_a_run_that_measured_nothing_yet_says_how_to_go_on(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(DataError, match=r"no metrics\.json yet.*continues where it stopped"):
        read(tmp_path)


@pytest.mark.parametrize(
    "part", ["metrics.json", "tasks/02-reverse/training.json", "tasks/02-reverse/protection.json"]
)
def test_a_torn_file_is_named_with_what_to_do(tmp_path, part):
    path = write_run(tmp_path / "r", "gate", "attribution", protected=True)
    whole = (path / part).read_text()
    (path / part).write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{part}: not readable as JSON.*run the same"):
        read(path)


def test_a_metrics_file_without_a_field_names_the_field(tmp_path):
    write_json(tmp_path / "metrics.json", {"label": "x", "strategy": "sequential", "tasks": ["a"]})
    with pytest.raises(DataError, match="matrix: Field required"):
        read(tmp_path)


def test_a_matrix_of_the_wrong_shape_is_refused(tmp_path):
    path = write_run(tmp_path / "r", "x", artefacts=False)
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["matrix"].pop()
    write_json(path / "metrics.json", metrics)
    with pytest.raises(DataError, match=r"4 tasks needs 5 rows .* got 4 rows of 4 values"):
        read(path)


def test_a_broken_prediction_is_named_by_file_and_line(tmp_path):
    path = write_run(tmp_path / "r", "x")
    file = path / "tasks" / "01-copy" / "predictions" / "copy.jsonl"
    file.write_text(file.read_text() + '{"prompt": "a", "expec\n')
    run = read(path)
    assert isinstance(run, RunRecord)
    with pytest.raises(DataError, match=r"copy\.jsonl:41: not a prediction"):
        list(run.stages[0].predictions("copy"))


def test_chat_prompts_are_read_as_lines(tmp_path):
    path = write_run(tmp_path / "r", "x")
    row = {"prompt": [{"role": "user", "content": "hi"}], "expected": ["a"], "generated": "b", "score": 0.0}
    (path / "tasks/01-copy/predictions/copy.jsonl").write_text(json.dumps(row))
    run = read(path)
    assert isinstance(run, RunRecord)
    assert next(run.stages[0].predictions("copy")).question == "user: hi"


def test_a_curve_of_the_wrong_length_is_refused(tmp_path):
    write_json(tmp_path / "faithfulness.json", {"percent": [0, 1], "curves": {"random": [1.0]}})
    with pytest.raises(DataError, match="curve 'random' has 1 values for 2 percentages"):
        read(tmp_path)


def test_a_prior_record_without_its_tensors_is_refused(tmp_path):
    write_prior(tmp_path)
    (tmp_path / "prior.safetensors").unlink()
    with pytest.raises(DataError, match=r"prior\.safetensors: missing.*holdfast attribute"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("learned", "told"),
    [
        (list(TASKS), "arc_easy acc"),
        (list(TASKS)[:2], f"arc_easy acc (asked after {TASKS[1]})"),
        ([*TASKS[:3], "taken back"], "arc_easy acc (asked after taken back)"),
        ([], "arc_easy acc"),  # of an earlier version
    ],
)
def test_scores_of_lm_eval_of_an_earlier_state_say_of_which(tmp_path, learned, told):
    path = write_run(tmp_path / "r", "x")
    scores = [{"arc_easy": {"acc,none": value}} for value in (0.25, 0.5)]
    write_json(path / "harness.json", {"base": scores[0], "now": scores[1], "learned": learned})
    run = read(path)
    assert isinstance(run, RunRecord)
    assert run.metrics.harness == {told: [0.25, 0.5]}


def test_scores_of_lm_eval_that_were_asked_along_the_way_and_afterwards_are_all_shown(tmp_path):
    path = write_run(tmp_path / "r", "x")
    metrics = json.loads((path / "metrics.json").read_text())
    along = [0.25, *(0.5 for _ in TASKS)]
    write_json(path / "metrics.json", {**metrics, "harness": {"arc_easy acc": along}})
    scores = {"now": {"boolq": {"acc,none": 0.75}, "arc_easy": {"acc,none": 0.625}}, "learned": list(TASKS)}
    write_json(path / "harness.json", {**scores, "options": {"tasks": ["boolq", "arc_easy"], "limit": 10}})
    run = read(path)
    assert isinstance(run, RunRecord)
    assert run.metrics.harness == {
        "arc_easy acc": along,
        "boolq acc (asked afterwards, limit 10)": [None, 0.75],
        "arc_easy acc (asked afterwards, limit 10)": [None, 0.625],
    }


def test_a_folder_of_skills_whose_first_task_is_unfinished_is_told_to_be_gone_on_with(tmp_path):
    begun = tmp_path / "s/tasks/01-may.partial"
    begun.mkdir(parents=True)
    (begun / "task.json").write_text("{}")
    with pytest.raises(DataError, match=r"Run the same `holdfast run` \(or `holdfast learn`\) command again"):
        read(tmp_path / "s")
