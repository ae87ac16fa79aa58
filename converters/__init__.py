"""Offline conversion of checkpoints into stores; imported as `edgemem.converters`."""

from .bundler import DTYPES
from .conversion import ConversionReport, convert

__all__ = ["DTYPES", "ConversionReport", "convert"]
