"""How quantities are written for people: in tables, on the report's page, in progress lines."""

from __future__ import annotations

import math

MISSING = "–"  # not measured
_MINUS = "−"
_UNITS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number of fixed decimals with a real minus sign, never "−0.0"; a dash where it was not measured.

    Parameters
    ----------
    sign : bool
        Write a plus sign too, except before a zero.
    """
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def percent(value: float | None, digits: int = 0) -> str:
    """A number in percent, such as "90 %", with a blank that doesn't break."""
    return f"{number(value, digits)}\u00a0%"


def spread(mean: float | None, sd: float | None) -> str:
    """A mean with its standard deviation, such as "43.1 ± 2.0"; without the latter where there is none."""
    return number(mean) + ("" if sd is None else f" ± {number(sd)}")


def interval(mean: float | None, low: float | None, high: float | None) -> str:
    """A difference with its interval, such as "+3.2 [+1.0, +5.1]"; without the latter where there is none."""
    shown = number(mean, sign=True)
    if mean is None or low is None or high is None:
        return shown
    return f"{shown} [{number(low, sign=True)}, {number(high, sign=True)}]"


def short(value: float) -> str:
    """As short as it can be without becoming another value: "0.1", "1e-09", "100"."""
    text = f"{value:g}"
    return text if float(text) == value or math.isnan(value) else repr(value)


def rounded(value: float, digits: int = 3) -> str:
    """A few significant digits, such as "0.0123" or "1.2e-05"."""
    return f"{value:.{digits}g}".replace("-", _MINUS)


def count(value: int) -> str:
    """A whole number with its thousands apart: "1,020,000"."""
    return f"{value:,}".replace("-", _MINUS)


def rough(value: int | None) -> str:
    """A large number as people say it: "1.02 million"; nothing where it is unknown."""
    if value is None:
        return ""
    for unit, name in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return str(value)


def mebibytes(size: float) -> str:
    """A size in bytes as "1,234.5 MiB"."""
    return f"{size / 2**20:,.1f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
