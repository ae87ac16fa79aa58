"""Phi-3 and Phi-4 mini (arXiv 2404.14219): Llama whose rotary positions may be longrope's, or those
of a part of a head."""

from .llama import Model as Model
