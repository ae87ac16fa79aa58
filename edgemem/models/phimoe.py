"""Phi-3.5-MoE (arXiv 2404.14219): in every layer two of its experts, which are chosen one after the
other."""

from .mixtral import Model as Model
