"""Polar-coded KV cache for vLLM: one radius and packed angle codes a vector."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vllm_polarquant.codec import PolarQuant

__all__ = ["PolarQuant", "__version__"]


def __getattr__(name: str) -> Any:
    # torch is imported only when the codec is asked for: `polarquant --help` stays quick.
    if name == "PolarQuant":
        from vllm_polarquant.codec import PolarQuant

        return PolarQuant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
