"""Offline conversion of checkpoints into stores; imported as `edgemem.converters`."""

from edgemem.dtypes import CONVERSIONS as DTYPES

from .checkpoint import is_checkpoint
from .conversion import ConversionReport, convert
from .inspection import Inspection, inspect

__all__ = ["DTYPES", "ConversionReport", "Inspection", "convert", "inspect", "is_checkpoint"]
