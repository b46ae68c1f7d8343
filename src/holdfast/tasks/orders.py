"""The task orders of the published benchmarks, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ORDERS = {
    "L1": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    "L2": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    "L3": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
    "S1": "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
    "S2": "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
}


def list_orders() -> dict[str, tuple[str, ...]]:
    """Every named order, with task names as the papers write them.

    L1, L2 and L3 belong to Long Sequence, S1 and S2 to SuperNI.
    """
    return {name: tuple(tasks.split()) for name, tasks in _ORDERS.items()}


def match_task(name: str, available: Iterable[str]) -> str | None:
    """The available task that a name in an order means, or None.

    Exact names come first, then names that differ in case, '-' or '_' only (``sst-2`` is ``SST2``) and
    ``boolqa`` for ``boolq``, then bare numbers of Super-NaturalInstructions tasks (``002`` is ``task002`` or
    ``task002_quoref_answer_generation``). A name that could mean two tasks means none.
    """
    names = list(dict.fromkeys(available))
    if name in names:
        return name
    wanted = {_plain(name), _plain(name).replace("boolqa", "boolq")}
    # one with words behind its number means these words: 2024_01 is not 2024_02
    bare = re.fullmatch(r"(?:task)?(\d+)", name)
    for matches in (
        [n for n in names if _plain(n) in wanted],
        [n for n in names if bare is not None and _number(n) == int(bare[1])],
    ):
        if len(matches) == 1:
            return matches[0]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _number(name: str) -> int | None:
    match = re.fullmatch(r"(?:task)?(\d+)(?:_.*)?", name)
    return int(match.group(1)) if match else None
