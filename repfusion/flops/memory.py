"""A model -> its parameters, and the bytes that a rank holds of a training under ZeRO; bytes of a
sample's columns.

Without activations, what a pass needs for a moment, DeepSpeed's staging buffers where the optimizer is
offloaded, the framework, and the fragments between allocations.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from repfusion.data.readers import PROMPT_FEATURES
from repfusion.flops.count import CONDITIONER, DECODER, DENOISER, EYES, LLM
from repfusion.flops.counter import Number
from repfusion.latents.load import Decoder
from repfusion.model.text_to_image import TextToImage
from repfusion.training.engine import EngineConfig, deepspeed_config, stage_to_run

FLOAT32, FLOAT16 = 4, 2
"""Bytes."""
LIVE_ELEMENTS = 10**9
"""DeepSpeed's `stage3_max_live_parameters`, which the engine leaves as it is."""


@dataclass(frozen=True)
class Size:
    num_parameters: int
    num_trainable: int
    num_bytes: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> "Size":
        found = list(parameters)
        trainable = sum(p.numel() for p in found if p.requires_grad)
        return cls(sum(p.numel() for p in found), trainable, sum(p.numel() * p.element_size() for p in found))


def sizes(model: TextToImage, decoder: Decoder | None = None) -> dict[str, Size]:
    """Parameters and bytes as held, by part."""
    conditioner = model.conditioner
    eyes = conditioner.llm.eyes
    seeing = set() if eyes is None else set(map(id, eyes.parameters()))
    mllm = {id(p): p for llm in conditioner.language_models for p in llm.parameters()}
    own = [p for p in conditioner.parameters() if id(p) not in mllm]
    found = {} if eyes is None else {EYES: Size.of(eyes.parameters())}
    found |= {
        LLM: Size.of(p for key, p in mllm.items() if key not in seeing),
        CONDITIONER: Size.of(own),
        DENOISER: Size.of(model.denoiser.parameters()),
    }
    return found if decoder is None else {**found, DECODER: Size.of(decoder.parameters())}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the end of a backward pass, when most is held."""

    weights: Number
    """Trained weights, float32."""
    masters: Number
    """The optimizer's own share of them; without ZeRO it updates the weights themselves."""
    gradients: Number
    """float32; whole until they are averaged, or this rank's share."""
    moments: Number
    """AdamW's two, float32."""
    averages: Number
    """The exponential moving average, float32, of what the optimizer updates here."""
    buckets: Number
    """Buckets in which gradients travel; on a GPU under stages 1 and 2 there are two, so that one fills
    meanwhile.
    """
    frozen: Number
    """Frozen weights."""
    gathered: Number
    """Whole weights, under stage 3, of the layers at work: DeepSpeed lets go of them only where they are
    more than LIVE_ELEMENTS.
    """
    on_host: bool = False
    """Whether masters, gradients, moments and averages lie in the host's memory (`offload_optimizer`)."""

    @property
    def offloaded(self) -> Number:
        kept_there = self.masters + self.gradients + self.moments + self.averages
        return kept_there if self.on_host else 0

    @property
    def device(self) -> Number:
        """All but what is offloaded."""
        state = self.masters + self.gradients + self.moments + self.averages
        return self.weights + state + self.buckets + self.frozen + self.gathered - self.offloaded


@dataclass(frozen=True)
class Frozen:
    num_elements: int
    itemsize: int

    @classmethod
    def of(cls, model: TextToImage, config: EngineConfig, on_gpu: bool = True) -> "Frozen":
        """Frozen weights as held: on a GPU under bf16, which `auto` is there, the engine holds them as
        bfloat16 whatever `mllm_dtype` is.
        """
        num = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        is_cast = on_gpu and config.precision != "fp32"
        held = torch.bfloat16 if is_cast else getattr(torch, model.config.mllm_dtype)
        return cls(num, held.itemsize)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.itemsize


def rank_memory(
    num_trained: int, frozen: Frozen, config: EngineConfig, world_size: int, on_gpu: bool = True
) -> RankMemory:
    """What one of `world_size` ranks holds; ZeRO pads its shares by a few elements, which are not counted."""
    stage = stage_to_run(config, world_size)
    whole, share = FLOAT32 * num_trained, FLOAT32 * num_trained / world_size
    global_batch_size = config.micro_batch_size * world_size
    settings = deepspeed_config(config, stage, global_batch_size, world_size, num_trained)
    num_buckets = (2 if on_gpu and stage < 3 else 1) if stage else 0
    sharded, is_sharded = (share if stage else whole), config.frozen == "sharded"
    gathered = 0.0
    if stage == 3:
        elements = num_trained + is_sharded * frozen.num_elements
        live = min(1.0, LIVE_ELEMENTS / elements)
        gathered = live * (whole + is_sharded * frozen.num_bytes)
    return RankMemory(
        weights=share if stage == 3 else whole,
        masters=share if stage else 0,
        gradients=share if stage >= 2 else whole,
        moments=2 * sharded,
        averages=sharded,
        buckets=num_buckets * FLOAT32 * settings["zero_optimization"]["reduce_bucket_size"],
        frozen=frozen.num_bytes / (world_size if is_sharded else 1),
        gathered=gathered,
        on_host=config.offload_optimizer,
    )


def column_bytes(model: TextToImage, num_text_tokens: Number) -> dict[str, Number]:
    """Bytes of one sample as the stages write it: float16 latents, and float16 text features where the method
    can feed on them.
    """
    tokens, dim = model.latent_shape
    found: dict[str, Number] = {"latents": FLOAT16 * tokens * dim}
    if PROMPT_FEATURES in model.columns:
        found["text features"] = FLOAT16 * num_text_tokens * model.conditioner.llm.width
    return found
