"""GraniteMoE: Granite with a mixture of experts in every layer."""

from .mixtral import Model as Model
