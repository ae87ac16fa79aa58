"""GLM-4.5 (arXiv 2508.06471): routed experts beside a shared one, after some layers with one dense
FFN."""

from .qwen2_moe import Model as Model
