"""Whether what asks a model from outside (lm-eval, vLLM) can ask what learns here: told before training."""

from __future__ import annotations

from typing import Any

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.evaluation.harness import check_harness
from holdfast.evaluation.vllm_engine import check_vllm, require_whole
from holdfast.learner.config import LearnerConfig
from holdfast.strategies import STRATEGIES, Strategy


def check_askable(config: LearnerConfig, model: Any = None, tokenizer: Any = None) -> None:
    """See that lm-eval and vLLM can ask what learns under this configuration, before anything is trained.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel, optional
        See too that vLLM could be given this one.
    tokenizer : PreTrainedTokenizerBase, optional
        See too that lm-eval could ask through this one.

    Raises
    ------
    ConfigError
        One of them is asked for and missing, or lm-eval doesn't know a task, or is to ask through a chat
        template that the tokenizer lacks; or the answers come from more than a plain model, or there are
        several processes.
    ModelError
    """
    asked = config.evaluation
    if asked.harness is not None:
        _require_plain(config, "evaluation.harness", "lm-eval")
        if world.size() > 1:
            raise ConfigError(
                "evaluation.harness: lm-eval shares questions out by itself where it finds several "
                "processes. Leave it out here, and ask with `holdfast harness FOLDER --tasks ...` afterwards."
            )
        check_harness(asked.harness, tokenizer)
    if asked.engine.name == "vllm":
        _require_plain(config, "evaluation.engine", "vLLM")
        if world.size() > 1:
            raise ConfigError(
                f"evaluation.engine: {world.size()} processes share the test rows, and vLLM is "
                "started by one. Leave it out here."
            )
        check_vllm(asked.engine)
        if model is not None:
            require_whole(model)


def _require_plain(config: LearnerConfig, option: str, asker: str) -> None:
    if STRATEGIES[config.strategy.name].strategy.route is not Strategy.route:
        raise ConfigError(
            f"{option}: under strategy '{config.strategy.name}' answers come from more than a plain model "
            f"(prompts, routers), which {asker} can't ask. Leave {option} out, or take another strategy."
        )
