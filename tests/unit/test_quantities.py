"""Quantities as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.quantities import (
    count,
    duration,
    interval,
    mebibytes,
    number,
    percent,
    rough,
    rounded,
    short,
    spread,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (-0.04, "0.0"),
        (-0.0, "0.0"),
        (-12.34, "−12.3"),
        (0.0, "0.0"),
        (99.96, "100.0"),
    ],
)
def test_numbers_have_a_real_minus_and_no_negative_zero(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (3.21, "+3.2"), (0.04, "0.0"), (-0.04, "0.0"), (-3.21, "−3.2")]
)
def test_a_signed_number_has_its_sign_unless_it_is_zero(value, text):
    assert number(value, sign=True) == text


@given(st.floats(-1e6, 1e6), st.integers(0, 4), st.booleans())
def test_a_number_reads_back_within_half_of_its_last_digit(value, digits, sign):
    text = number(value, digits, sign=sign)
    assert "-" not in text
    assert abs(float(text.replace("−", "-")) - value) <= 0.5 * 10.0**-digits * (1 + 1e-9)


def test_percent_never_breaks_before_its_sign():
    assert percent(89.6) == "90\u00a0%"
    assert percent(None) == "–\u00a0%"


def test_spread_and_interval_leave_out_what_there_is_none_of():
    assert spread(43.14, 2.0) == "43.1 ± 2.0"
    assert spread(43.14, None) == "43.1"
    assert spread(None, None) == "–"
    assert interval(3.21, -1.04, 5.0) == "+3.2 [−1.0, +5.0]"
    assert interval(3.21, None, None) == "+3.2"
    assert interval(None, None, None) == "–"


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (100.0, "100"), (1e-9, "1e-09"), (0.12345678, "0.12345678")]
)
def test_short_numbers_lose_nothing(value, text):
    assert short(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_short_numbers_read_back_as_they_were(value):
    assert float(short(value)) == value


def test_counts_sizes_and_rough_numbers():
    assert count(1_020_000) == "1,020,000"
    assert mebibytes(1_234.5 * 2**20) == "1,234.5 MiB"
    assert [rough(n) for n in (None, 999, 1_020_000, 7_240_000_000)] == [
        "",
        "999",
        "1.02 million",
        "7.24 billion",
    ]
    assert [rounded(v) for v in (0.012345, 1.2e-5, -3.0)] == ["0.0123", "1.2e−05", "−3"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, "–")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
