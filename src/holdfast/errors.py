"""The errors a user can meet. Each message says where, what was got, what is allowed, and how to fix it."""

from __future__ import annotations


class HoldfastError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a traceback."""


class ConfigError(HoldfastError):
    """The configuration is wrong; the message lists every problem at once."""


class DataError(HoldfastError):
    """A data set is missing, malformed or empty; the message names the file and the line."""


class ModelError(HoldfastError):
    """A model can't be loaded, or it lacks what the requested operation needs."""


class UnruledOperationError(ModelError):
    """A torch operation on a tracked tensor has no attribution rule and is not known to be linear."""


class ConservationError(HoldfastError):
    """Relevance was not conserved: the attribution of this model can't be trusted."""


class NoCorrectSampleError(HoldfastError):
    """No sample passed the correctness filter, so a prior can't be computed."""


class PriorMismatchError(HoldfastError):
    """An importance prior does not fit the model it is used with."""


class TrainingDivergedError(HoldfastError):
    """The loss became NaN or infinite; the step and its batch were saved."""


class RunDirectoryError(HoldfastError):
    """A run directory is in use, belongs to another configuration, or is damaged beyond resuming."""


class ProcessLostError(HoldfastError):
    """Another process of the same launch has ended; the message names its rank."""


class StorageError(HoldfastError):
    """A file could not be written (disk full, permission); the previous state on disk is untouched."""
