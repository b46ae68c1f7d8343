"""The learner: the lifecycle of a strategy, and the folder that holds what was learned."""

from typing import TYPE_CHECKING

from holdfast.lazy import later

if TYPE_CHECKING:
    from holdfast.learner.config import LearnerConfig
    from holdfast.learner.learner import Learner
    from holdfast.learner.learning import Learning

__all__ = ["Learner", "LearnerConfig", "Learning"]
__getattr__ = later(  # a folder is read without what trains
    __name__,
    {
        "Learner": "holdfast.learner.learner",
        "LearnerConfig": "holdfast.learner.config",
        "Learning": "holdfast.learner.learning",
    },
)
