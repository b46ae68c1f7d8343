"""Masks over the output units of linear maps, and the methods that make them."""

from holdfast.strategies.masks.fisher_mask import FisherMask
from holdfast.strategies.masks.migu import Migu

__all__ = ["FisherMask", "Migu"]
