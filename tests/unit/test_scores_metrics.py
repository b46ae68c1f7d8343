"""Scores of one answer, and the metrics of a matrix against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.evaluation.metrics import (
    average_performance,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    summarise,
)
from holdfast.evaluation.scores import exact_match, normalise, rouge_l

# three tasks; row j is after j tasks, row 0 before any
BY_HAND = [
    [1.0, 2.0, 3.0],
    [90.0, 10.0, 20.0],
    [60.0, 80.0, 40.0],
    [30.0, 50.0, 70.0],
]


def test_average_performance_is_the_mean_of_the_last_row() -> None:
    assert average_performance(BY_HAND) == (30 + 50 + 70) / 3


def test_forward_transfer_is_the_mean_score_just_before_learning() -> None:
    assert forward_transfer(BY_HAND) == (10 + 40) / 2  # task 2 after task 1, task 3 after task 2


def test_backward_transfer_is_the_mean_change_since_learning() -> None:
    assert backward_transfer(BY_HAND) == ((30 - 90) + (50 - 80)) / 2


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert learning_accuracy(BY_HAND) == (90 + 80 + 70) / 3


def test_forgetting_counts_from_the_best_score_since_learning_not_from_the_first() -> None:
    rises = [[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [80.0, 60.0, 0.0], [40.0, 60.0, 9.0]]
    assert forgetting(rises) == ((80 - 40) + (60 - 60)) / 2
    assert backward_transfer(rises) == ((40 - 50) + (60 - 60)) / 2


def test_a_task_that_ends_above_all_it_had_has_negative_forgetting() -> None:
    assert forgetting([[0.0, 0.0], [50.0, 0.0], [70.0, 60.0]]) == -20.0


def test_summary_has_the_names_of_metrics_json() -> None:
    assert summarise(BY_HAND) == {
        "ap": 50.0,
        "fwt": 25.0,
        "bwt": -45.0,
        "forgetting": 45.0,
        "learning_accuracy": 80.0,
    }


def test_joint_training_has_an_average_and_nothing_else() -> None:
    joint = [[1.0, 2.0], [None, None], [90.0, 80.0]]
    assert summarise(joint) == {
        "ap": 85.0,
        "fwt": None,
        "bwt": None,
        "forgetting": None,
        "learning_accuracy": None,
    }


def test_gaps_of_needed_scope_leave_all_but_forgetting_defined() -> None:
    # what `scope: needed` measures: the diagonal, the next task, and the last row
    gaps = [[5.0, 6.0, 7.0], [90.0, 10.0, None], [None, 80.0, 40.0], [30.0, 50.0, 70.0]]
    metrics = summarise(gaps)
    assert metrics["forgetting"] is None
    assert [metrics[k] for k in ("ap", "fwt", "bwt", "learning_accuracy")] == [50.0, 25.0, -45.0, 80.0]


def test_unfinished_stream_has_no_average() -> None:
    metrics = summarise([[1.0, 2.0], [90.0, 10.0], [None, None]])
    assert metrics["ap"] is metrics["bwt"] is metrics["learning_accuracy"] is None
    assert metrics["fwt"] == 10.0


def test_one_task_has_no_transfer() -> None:
    metrics = summarise([[5.0], [75.0]])
    assert (metrics["ap"], metrics["learning_accuracy"]) == (75.0, 75.0)
    assert metrics["fwt"] is metrics["bwt"] is metrics["forgetting"] is None


def test_a_task_that_comes_again_counts_once_and_hides_nothing_that_others_lost() -> None:
    # copy, head, copy once more: copy rises to 90, and head falls from 100 to 48
    matrix = [[0.0, 0.0, 0.0], [2.0, 4.0, 2.0], [0.0, 100.0, 0.0], [90.0, 48.0, 90.0]]
    assert summarise(matrix, ["copy", "head", "copy"]) == {
        "ap": (48 + 90) / 2,
        "fwt": 4.0,
        "bwt": 48.0 - 100.0,
        "forgetting": 100.0 - 48.0,
        "learning_accuracy": (100 + 90) / 2,
    }
    assert summarise(matrix, ["copy", "head", "flip"]) == summarise(matrix)


def test_a_task_that_no_row_tests_counts_nowhere() -> None:
    # june is learned between may and july, and nothing asks for it
    matrix = [[None] * 3, [90.0, None, None], [80.0, None, None], [70.0, None, 60.0]]
    found = summarise(matrix, ["may", None, "july"])
    assert (found["ap"], found["bwt"], found["forgetting"]) == (65.0, -20.0, 20.0)
    assert found["learning_accuracy"] == 75.0
    assert summarise(matrix)["ap"] is None
    last = summarise([row[:2] for row in matrix[:3]], ["may", None])
    assert (last["ap"], last["bwt"]) == (80.0, -10.0), (
        "may is an earlier task, though the only one that is asked"
    )


SCORE = st.floats(0, 100)


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    tasks = draw(st.integers(2, 6))
    return [[draw(SCORE) for _ in range(tasks)] for _ in range(tasks + 1)]


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_metrics_equal_the_papers_sums(a: list[list[float]]) -> None:
    """K, eqs. 18 to 20, with the paper's indices from 1."""
    T = len(a[0])

    def A(j: int, i: int) -> float:
        return a[j][i - 1]

    assert average_performance(a) == pytest.approx(sum(A(T, t) for t in range(1, T + 1)) / T)
    assert forward_transfer(a) == pytest.approx(sum(A(t - 1, t) for t in range(2, T + 1)) / (T - 1))
    assert backward_transfer(a) == pytest.approx(sum(A(T, t) - A(t, t) for t in range(1, T)) / (T - 1))


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_forgetting_is_chaudhrys_and_at_least_minus_backward_transfer(a: list[list[float]]) -> None:
    """f_j = max over l < T of a_lj, minus a_Tj: since it was learned, and without the final row."""
    T = len(a[0])
    drops = [max(a[stage][j - 1] for stage in range(j, T)) - a[T][j - 1] for j in range(1, T)]
    lost, moved = forgetting(a), backward_transfer(a)
    assert lost == pytest.approx(sum(drops) / (T - 1))
    assert moved is not None
    assert lost >= -moved - 1e-9


@pytest.mark.parametrize(
    ("generated", "expected", "score"),
    [
        ("World", ["world"], 100.0),
        ("  very   negative\n", ["Very negative"], 100.0),
        ("negative", ["very negative"], 0.0),
        ("b", ["a", "b"], 100.0),
        ("", ["a"], 0.0),
    ],
)
def test_exact_match_ignores_case_and_white_space_only(
    generated: str, expected: list[str], score: float
) -> None:
    assert exact_match(generated, expected) == score


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_rouge_l_by_hand_takes_the_best_reference() -> None:
    # the longest common subsequence of "the cat sat" and "the dog sat" is "the sat": P = R = 2/3
    assert rouge_l("the cat sat", ["the dog sat"]) == pytest.approx(100 * 2 / 3)
    assert rouge_l("the cat sat", ["nothing alike", "the cat sat"]) == 100.0
    assert rouge_l("", ["the cat sat"]) == 0.0


def test_rouge_l_stems_words() -> None:
    assert rouge_l("cats running", ["cat runs"]) == 100.0
