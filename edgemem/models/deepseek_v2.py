"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): keys and values of all heads made of one latent;
routed experts beside shared ones, after some layers with one dense FFN."""

from .qwen2_moe import Model as Model
