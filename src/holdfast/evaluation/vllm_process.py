"""The process in which vLLM answers: run as a file, by an interpreter that has vLLM, maybe without holdfast.

It reads JSON lines from stdin and writes JSON lines to what was stdout; everything that vLLM prints goes to
stderr. First line in: the arguments of ``vllm.LLM``; each further one: prompts, how long the answer to
each may be, and what ends one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

AT_ONCE = 512  # prompts: enough to keep vLLM busy, few enough to show how far it is


def answered(llm: Any, asked: dict[str, Any]) -> Iterator[list[list[int]]]:
    """Greedy answers as token ids, some prompts at a time."""
    from vllm import SamplingParams

    ways = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            stop_token_ids=asked["stop_ids"],
            ignore_eos=True,  # these alone end an answer, whatever the model's own configuration says
            detokenize=False,
        )
        for tokens in asked["max_tokens"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    for start in range(0, len(prompts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found = llm.generate(prompts[part], ways[part], use_tqdm=False)
        yield [list(one.outputs[0].token_ids) for one in found]


def serve(lines: TextIO, told: TextIO) -> None:
    """Start vLLM and answer until there is nothing more to read."""

    def tell(**what: Any) -> None:
        told.write(json.dumps(what) + "\n")
        told.flush()

    try:
        import vllm

        llm = vllm.LLM(**json.loads(next(lines)))
        tell(ready=True)
        for line in lines:
            answers: list[list[int]] = []
            for some in answered(llm, json.loads(line)):
                answers += some
                tell(done=len(answers))
            tell(answers=answers)
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":  # vLLM starts processes that import this file again
    sys.path = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, told)
