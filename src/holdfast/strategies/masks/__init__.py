"""Masks over output units of linear maps or single weights, and the methods that make them."""

from holdfast.strategies.masks.fisher_mask import FisherMask
from holdfast.strategies.masks.migu import Migu
from holdfast.strategies.masks.mofo import Mofo

__all__ = ["FisherMask", "Migu", "Mofo"]
