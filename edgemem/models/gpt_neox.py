"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): attention beside an FFN without a gate, a
part of each head rotated."""

from .llama import Model as Model
