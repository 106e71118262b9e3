"""Omni-Video (arXiv 2507.06119): a vision head makes a few visual tokens of a frozen language model's last
states, an adapter makes a context of them, and a denoiser of clips reads source, reference, adapter and text.

Faithful (paper and public code) are the head's four tokens of the width of a vision encoder, whose features
of the target they are aligned to; the adapter, an MLP and a transformer of 4 + 4 blocks with 256 queries for
each visual token; the source clip by a Conv3d patch embedding (1, 4, 4) of its VAE latents; and the order of
the contexts. Ours are the head's form (queries that attend to the states, in decoder blocks), the loss (1 -
cosine, a token at a time), that the text is the language model's own states through a Linear in the place of
the generator's text encoder, that a reference has a patch embedding of its own, that latents are taken as the
VAE gives them, and that the DiT trains from scratch. `has_head: false` is Omni-Video 2's shorter way, one
Linear of the states, without the caption that its model writes.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    ContextInterface,
    Losses,
    MethodConfig,
    Prepared,
    conditioning_prompts,
    frozen_reading,
)
from repfusion.conditioning.related.gill import NUM_HEADS, QueryDecoderBlock
from repfusion.data.readers import Reader, SampleArray
from repfusion.inputs import Inputs
from repfusion.layers import EncoderBlock, Grid, RMSNorm
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request

SOURCE, REFERENCE = "source_features", "reference_features"
"""Columns of the VAE's features of what is edited and of what is referred to."""
TARGET = "vision_embeddings"
"""The column of a vision encoder's features [q, e] of the target, of training alone."""


class OmniVideoConfig(MethodConfig):
    method: Literal["omni_video"] = "omni_video"
    """A vision head, aligned to a vision encoder, and an adapter."""
    has_head: bool = True
    """Whether there are head and adapter; else the states go through one Linear (Omni-Video 2)."""
    num_visual: int = Field(default=4, ge=1)
    """Visual tokens of the head."""
    vision_width: int = Field(default=1152, ge=1)
    """Channels of the vision encoder's features."""
    align_weight: float = Field(default=1.0, ge=0)
    """Weight of the semantic alignment loss, which reads the column `vision_embeddings`; 0 does without."""
    num_adapted: int = Field(default=256, ge=1)
    """Queries of the adapter for each visual token."""
    depth: int = Field(default=4, ge=1)
    """Blocks of the adapter's encoder, and as many of its decoder."""
    head_depth: int = Field(default=1, ge=1)
    """Blocks of the head."""
    width: int = Field(default=512, ge=NUM_HEADS, multiple_of=NUM_HEADS)
    """Channels of head, adapter and contexts."""
    patch: int = Field(default=4, ge=1)
    """Rows and columns of latent pixels of a patch of source or reference."""
    source: bool = False
    """Whether there may be a source clip, which the column `source_features` holds: of the clips' own
    size.
    """
    reference: bool = False
    """Whether there may be a reference, of one latent frame, which the column `reference_features` holds."""
    interface: ContextInterface = "cross_attention"
    """How the DiT takes the contexts, which are one sequence."""

    @property
    def visual_columns(self) -> tuple[str, ...]:
        """The columns of latents that are read, in the order of their contexts."""
        return (SOURCE,) * self.source + (REFERENCE,) * self.reference

    @property
    def is_aligned(self) -> bool:
        """Whether the alignment loss is there."""
        return self.has_head and self.align_weight > 0

    @property
    def columns(self) -> Mapping[str, Reader]:
        target = {TARGET: SampleArray()} if self.is_aligned else {}
        return {**{name: SampleArray(False, sees_images=True) for name in self.visual_columns}, **target}


class VisionHead(nn.Module):
    """States of the language model -> visual tokens in the space of a vision encoder."""

    def __init__(self, llm_width: int, config: OmniVideoConfig):
        super().__init__()
        self.enter = nn.Linear(llm_width, config.width)
        self.queries = nn.Parameter(torch.randn(config.num_visual, config.width))
        self.blocks = nn.ModuleList(QueryDecoderBlock(config.width) for _ in range(config.head_depth))
        self.norm = RMSNorm(config.width, eps=1e-6)
        self.leave = nn.Linear(config.width, config.vision_width)

    def forward(self, states: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"]) -> Float[Tensor, "b q e"]:
        memory, x = self.enter(states), self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            x = block(x, memory, mask)
        return self.leave(self.norm(x))


class VisionAdapter(nn.Module):
    """Visual tokens -> a context: an MLP, an encoder, and a decoder of many queries for each token."""

    def __init__(self, config: OmniVideoConfig):
        super().__init__()
        width = config.width
        self.enter = nn.Sequential(nn.Linear(config.vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.encoder = nn.ModuleList(EncoderBlock(width, NUM_HEADS) for _ in range(config.depth))
        self.encoder_norm = RMSNorm(width, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(config.num_visual * config.num_adapted, width))
        self.decoder = nn.ModuleList(QueryDecoderBlock(width) for _ in range(config.depth))
        self.norm = RMSNorm(width, eps=1e-6)

    def forward(self, visual: Float[Tensor, "b q e"]) -> Float[Tensor, "b a c"]:
        memory = self.enter(visual)
        for block in self.encoder:
            memory = block(memory)
        memory, x = self.encoder_norm(memory), self.queries.expand(len(visual), -1, -1)
        for block in self.decoder:
            x = block(x, memory)
        return self.norm(x)


class LatentPatches(nn.Module):
    """Features of a clip -> a token a patch, which spans no two latent frames.

    Raises: ValueError: the grid's rows or columns are no multiple of the patch.
    """

    def __init__(self, latent_dim: int, grid: tuple[int, int, int], config: OmniVideoConfig):
        super().__init__()
        self.grid, self.patch = grid, config.patch
        if grid[1] % config.patch or grid[2] % config.patch:
            raise ValueError(
                f"conditioning.patch {config.patch}: {grid[1]} x {grid[2]} rows and columns of latents "
                "are no multiple of it; take a divisor of both"
            )
        kernel = (1, config.patch, config.patch)
        self.embed = nn.Conv3d(latent_dim, config.width, kernel, kernel)

    @property
    def num_features(self) -> int:
        """Latent tokens of a clip."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def forward(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b p c"]:
        frames, rows, columns = self.grid
        clip = rearrange(features, "b (f r c) d -> b d f r c", f=frames, r=rows, c=columns)
        return rearrange(self.embed(clip), "b d f r c -> b (f r c) d")

    def places(self, images_before: int) -> Int[Tensor, "p 3"]:
        """Frame, row and column of each patch, left of the latents and of so many images."""
        sides = (range(self.grid[0]), *(range(0, side, self.patch) for side in self.grid[1:]))
        at = torch.cartesian_prod(*(torch.tensor([*side]) for side in sides))
        return at - torch.tensor([0, 0, (1 + images_before) * self.grid[2]])


class OmniVideoConditioner(Conditioner):
    """Source, reference, adapter and text as the one context of all steps.

    Args:
        llm: the language model; frozen.
        latent_dim: channels of a latent token.
        grid: rows and columns of latents, of clips frames before them.
        config: the method's settings.

    Raises: ValueError: the grid's rows or columns are no multiple of the patch.
    """

    def __init__(
        self, llm: LanguageModel, latent_dim: int, grid: Grid, config: OmniVideoConfig = OmniVideoConfig()
    ):
        super().__init__()
        self.llm, self.config = llm, config
        llm.projector = None  # visual, so of no use here; left in, it would count as trainable
        self.context_widths = (config.width,)
        self.num_axes = len(grid)
        frames, rows, columns = (1, *grid)[-3:]
        grids = {SOURCE: (frames, rows, columns), REFERENCE: (1, rows, columns)}
        self.patches = nn.ModuleDict(
            {name: LatentPatches(latent_dim, grids[name], config) for name in config.visual_columns}
        )
        self.head = VisionHead(llm.width, config) if config.has_head else None
        self.adapter = VisionAdapter(config) if config.has_head else None
        self.text = nn.Linear(llm.width, config.width)
        self.array_shapes = {name: (one.num_features, latent_dim) for name, one in self._patches()}
        if config.is_aligned:
            self.array_shapes[TARGET] = (config.num_visual, config.vision_width)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompt tokens; features of sources and references, zero where a request has none, and which have
        any; in training what the visual tokens are aligned to. Raises ValueError for other shapes.
        """
        inputs: Inputs = {"prefix": self.llm.tokenise(conditioning_prompts(requests, branches))}
        pairs = [*zip(requests, branches, strict=True)]
        for name in self.patches:
            given = [None if branch == "none" else one.computed.get(name) for one, branch in pairs]
            inputs[name], inputs[f"has_{name}"] = _stacked(name, given, self.array_shapes[name])
        if self.config.is_aligned and seeds is not None:
            targets = [None if branch == "none" else one.computed.get(TARGET) for one, branch in pairs]
            inputs[TARGET], inputs[f"has_{TARGET}"] = _stacked(TARGET, targets, self.array_shapes[TARGET])
        return inputs

    def _patches(self) -> list[tuple[str, LatentPatches]]:
        return [(name, one) for name, one in self.patches.items() if isinstance(one, LatentPatches)]

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """The contexts in their order; `reuse` changes nothing: they are static."""
        prefix, tokens, masks, places = inputs["prefix"], [], [], []
        for number, (name, patches) in enumerate(self._patches()):
            tokens.append(patches(inputs[name].to(self.text.weight.dtype)))
            masks.append(inputs[f"has_{name}"][:, None].expand(tokens[-1].shape[:2]))
            places.append(patches.places(number).to(prefix.ids.device).expand(len(prefix.ids), -1, -1))
        states = self.read(prefix)
        adapted = 0
        if self.head is not None and self.adapter is not None:
            tokens.append(self.adapter(self.head(states, prefix.mask)))
            adapted = tokens[-1].shape[1]
            masks.append(prefix.mask.new_ones(tokens[-1].shape[:2]))
            places.append(_diagonal(torch.arange(adapted, device=prefix.ids.device).expand(masks[-1].shape)))
        tokens.append(self.text(states))
        masks.append(prefix.mask)
        places.append(_diagonal(adapted + prefix.positions))
        positions = torch.cat(places, dim=1)[..., -self.num_axes :]
        return Prepared(static=(Context(torch.cat(tokens, dim=1), torch.cat(masks, dim=1), positions),))

    def read(self, prefix: Prefix) -> Float[Tensor, "b m c"]:
        """The language model's last states of the prompts."""
        with frozen_reading(prefix.ids.device):
            states = self.llm.read(prefix)
        return states.to(self.text.weight.dtype)

    def losses(self, inputs: Inputs, latents: Float[Tensor, "b n d"]) -> Losses:
        """1 - cosine of visual tokens and the vision encoder's features, where the sample kept its prompt.
        The prompts are read again.
        """
        if not self.config.is_aligned or self.head is None:
            return {}
        prefix = inputs["prefix"]
        visual = self.head(self.read(prefix), prefix.mask).float()
        distance = 1 - F.cosine_similarity(visual, inputs[TARGET].float(), dim=-1).mean(1)
        return {"align": self.config.align_weight * distance * inputs[f"has_{TARGET}"]}


def _diagonal(numbers: Int[Tensor, "b m"]) -> Int[Tensor, "b m 3"]:
    """Text's places: frame, row and column alike."""
    return numbers[..., None].expand(-1, -1, 3)


def _stacked(
    name: str, rows: Sequence[Tensor | None], shape: tuple[int, int]
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, " b"]]:
    """Arrays of requests, zero where there is none, and where there is one."""
    for row in rows:
        if row is not None and tuple(row.shape) != shape:
            raise ValueError(
                f"{name} of {tuple(row.shape)}, the model takes {shape}; make the column for this model's "
                "encoder and settings"
            )
    found = [torch.zeros(shape) if row is None else row.float() for row in rows]
    return torch.stack(found), torch.tensor([row is not None for row in rows])
