"""gpt-oss (arXiv 2508.10925): experts in every layer; attention with sinks, and in every other
layer with a window."""

from .mixtral import Model as Model
