"""OSF: only the lesser singular directions of each linear map are trained."""

from holdfast.strategies.osf.osf import Osf

__all__ = ["Osf"]
