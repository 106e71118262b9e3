"""RepFusion and UniFusion: text-to-image models conditioned by a frozen multimodal LLM that reads the noisy
latents.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repfusion.pipeline import RepFusionPipeline as RepFusionPipeline

__all__ = ["RepFusionPipeline"]


def __getattr__(name: str) -> Any:
    """`from repfusion import RepFusionPipeline`, which alone has to wait for torch."""
    if name != "RepFusionPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from repfusion.pipeline import RepFusionPipeline

    return RepFusionPipeline
