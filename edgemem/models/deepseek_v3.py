"""DeepSeek-V3 and R1, Moonlight, Kimi K2 (arXiv 2412.19437): DeepSeek-V2 with experts chosen by
biased sigmoids."""

from .deepseek_v2 import Model as Model
