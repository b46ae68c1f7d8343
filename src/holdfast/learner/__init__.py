"""The learner: the lifecycle of a strategy, and the folder that holds what was learned."""

from holdfast.learner.config import LearnerConfig
from holdfast.learner.learner import Learner
from holdfast.learner.learning import Learning

__all__ = ["Learner", "LearnerConfig", "Learning"]
