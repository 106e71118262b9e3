"""A text-to-image model: conditioner, denoiser, and the statistics that define its latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.conditioning.base import Conditioner, Losses, Prepared
from repfusion.config import naming
from repfusion.data.dataset import Sample
from repfusion.data.recipe import Recipe
from repfusion.devices.compiling import Compilation, compilation_for
from repfusion.devices.placing import Autocast, autocast_of
from repfusion.diffusion.flow import draw, interpolate, shift_factor, velocity
from repfusion.diffusion.graphs import StepGraphs
from repfusion.inputs import Inputs, empty, to_device
from repfusion.latents.load import Decoder, fitting_decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.layers import Grid
from repfusion.llm.base import LanguageModel, PromptTooLong
from repfusion.model.config import ModelConfig
from repfusion.model.denoiser import Denoiser, Prefilled
from repfusion.model.trainable import Trainable
from repfusion.request import Branch, Request, refuse_images

PROMPT_BUCKET = 32
"""Tokens of which prompts have a multiple where sampling is sped up."""
COST_OF_EAGER = "An image takes longer so"


@dataclass(frozen=True)
class Prompted:
    """Requests as the model reads them at every step: what the conditioner prepared, what the denoiser
    kept.
    """

    prepared: Prepared
    static: Prefilled

    def first(self, num: int) -> "Prompted":
        """The first `num` requests."""
        return Prompted(self.prepared.first(num), self.static.first(num))


class TextToImage(Trainable):
    """A rectified flow in a latent space, conditioned on prompts. It trains with `forward` and samples
    through `diffusion.sampler.sample`.

    Args:
        config: what it is made of.
        conditioner: requests -> condition.
        denoiser: built for the conditioner's widths.
        statistics: of the features; they define the latent space and travel with the checkpoint.
        grid: rows and columns of latent tokens, of clips frames before them.

    Raises:
        ValueError: the statistics are of another grid.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        conditioner: Conditioner,
        denoiser: Denoiser,
        statistics: LatentStatistics,
        grid: Grid,
    ):
        super().__init__()
        num_tokens, latent_dim = statistics.mean.shape
        if num_tokens != prod(grid):
            raise ValueError(
                f"latent statistics have {num_tokens} tokens, the encoder's grid is "
                f"{' x '.join(map(str, grid))}; re-run '{config.features}'"
            )
        self.config = config
        self.statistics = statistics
        self.grid = grid
        self.latent_shape = (num_tokens, latent_dim)
        self.shift = shift_factor(num_tokens, latent_dim, config.flow.base_dim)
        self.conditioner = conditioner
        self.denoiser = denoiser
        self.fixed = {f"conditioner.{name}": self.latent_shape for name in conditioner.fixed}
        read = {id(p) for llm in conditioner.language_models for p in llm.parameters()}
        added = {f"conditioner.{name}" for name in conditioner.adapters}
        own = ((name, p) for name, p in self.named_parameters() if id(p) not in read or name in added)
        self.kept = {name: p for name, p in own if not p.requires_grad}
        self.columns = config.columns
        self.graphs: StepGraphs | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's trained weights lie."""
        return self.denoiser.out.weight.device

    def collate(self, samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> Inputs:
        """Requests, features as they lie on disk (mostly float16), noise levels and noise of a micro-batch.

        Raises: ValueError: features of another shape than the model's latents, or a sample whose caption or
            images do not fit into the context; the message names the sample.
        """
        drawn = [
            recipe.draw(one, seed, self.config.conditioning.columns)
            for one, seed in zip(samples, seeds, strict=True)
        ]
        requests, branches = [request for request, _ in drawn], [branch for _, branch in drawn]
        t, noise = draw(seeds, self.latent_shape, self.shift)
        try:
            request = self.conditioner.collate(requests, branches, seeds)
        except PromptTooLong as error:
            texts = [one.prompt for one in requests]
            place = samples[texts.index(error.prompt)].place
            raise ValueError(f"{place}: {self.unfit_caption(error)}") from error
        except ValueError:
            for sample, *one in zip(samples, requests, branches, seeds, strict=True):
                with naming(sample.place):
                    self.conditioner.collate(*([row] for row in one))
            raise
        return {
            "request": request,
            "features": stack([sample.read(self.config.features) for sample in samples]),
            "t": t,
            "noise": noise,
        }

    @property
    def captions(self) -> LanguageModel:
        """The language model, which reads the captions."""
        return self.conditioner.llm

    def unfit_caption(self, error: PromptTooLong) -> str:
        return (
            f"its caption {error.prompt[:60]!r}... has {error.num_tokens} tokens, begin token included; the "
            f"context of model.mllm takes {error.most} beside what else it reads: leave such samples out by "
            "curate.max_caption_tokens (a column's captions by their max_tokens) in the workflow that wrote "
            "the shards, or that caption by data.caption_weights"
        )

    def forward(self, inputs: Inputs) -> Losses:
        """`velocity`: mean squared error of the velocity, float32; then the conditioner's auxiliary
        losses.
        """
        latents, t, noise = self.statistics.normalise(inputs["features"]), inputs["t"], inputs["noise"]
        prepared = self.conditioner.prepare(inputs["request"])
        prompted = Prompted(prepared, self.denoiser.prefill(prepared.static))
        predicted = self.velocity(interpolate(latents, noise, t), t, prompted)
        losses = (predicted.float() - velocity(latents, noise)).square().mean(dim=(1, 2))
        return {"velocity": losses, **self.conditioner.losses(inputs["request"], latents)}

    def read(self, requests: Sequence[Request], branches: Sequence[Branch]) -> Prompted:
        """Requests on the model's device, read once for many steps without gradients. Raises ValueError where
        one has images, which the method cannot read.
        """
        method = self.config.conditioning
        if not method.reads_images:
            refuse_images(requests, method.method)
        return self.prompted(to_device(self.conditioner.collate(requests, branches), self.device))

    def prompted(self, inputs: Inputs) -> Prompted:
        """Collated requests, read once for many steps without gradients."""
        prepared = self.conditioner.prepare(inputs, reuse=True)
        return Prompted(prepared, self.denoiser.prefill(prepared.static))

    def velocity(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], prompted: Prompted
    ) -> Float[Tensor, "b n d"]:
        """Velocity (noise - latents) of noisy latents at noise level t."""
        step = self._step if self.graphs is None or torch.is_grad_enabled() else self.graphs
        return step(z_t, t, prompted)

    def _step(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], prompted: Prompted
    ) -> Float[Tensor, "b n d"]:
        condition = self.conditioner.condition(prompted.prepared, z_t, t)
        return self.denoiser(z_t, t, condition, prompted.static)

    def compile_blocks(self, compilation: Compilation) -> None:
        """Compiles the denoiser's blocks and the language model's layers one by one, in place."""
        for layer in self.denoiser.layers:
            compilation.module(layer)
        self.conditioner.llm.compile_layers(compilation)

    def speed_up_sampling(
        self, precision: Literal["auto"] | Autocast = "auto", compiles: bool = True
    ) -> None:
        """Makes sampling fast from now on, on the device where the model lies: layers compiled, prompts
        padded to lengths that come again, a step one CUDA graph for each size, the weights of trained
        products in bfloat16, to which autocast would cast them in every pass. What is drawn changes by
        rounding; training, counting FLOPs and saving are over for this model.

        Args:
            precision: of the sampler, which has to be the same then; fp32 leaves the weights as they are.
            compiles: whether layers are compiled.
        """
        if compiles:
            what = "the model's layers"
            self.compile_blocks(compilation_for(self.device.type, what, COST_OF_EAGER, dynamic=False))
        is_bf16 = autocast_of(precision, self.device) == "bf16"
        for module in self.modules():
            is_cast = is_bf16 and isinstance(module, nn.Linear)
            if is_cast and module.weight.requires_grad:
                module.to(torch.bfloat16)
        self.conditioner.llm.bucket = PROMPT_BUCKET
        self.graphs = StepGraphs(self._step)

    def normalise(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Features -> latents, float32."""
        return self.statistics.normalise(features)

    def denormalise(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Latents -> features, float32."""
        return self.statistics.denormalise(latents)

    def layers(self) -> list[nn.Module]:
        """The denoiser's blocks and the language models' layers."""
        read = [layer for llm in self.conditioner.language_models for layer in llm.layers]
        return [*self.denoiser.layers, *read]

    def frozen_parts(self) -> list[nn.Module]:
        """The language models that no method trains, with their heads and eyes; of one with trained adapters,
        all that they are put beside.
        """
        read = self.conditioner.language_models
        parts = [part for llm in read for part in (llm.language_model, llm.head, llm.eyes)]
        return [one for part in parts if part is not None for one in untrained(part)]

    def load_decoder(self) -> Decoder:
        """The decoder that the configuration names, on the model's device.

        Raises:
            ValueError: where it reads other features than this model makes.
        """
        return fitting_decoder(self.config.decoder, self.grid, self.latent_shape[1]).to(self.device)


def untrained(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a module, itself included, that have weights of which none is trained."""
    weights = [*module.parameters()]
    if not any(p.requires_grad for p in weights):
        return [module] if weights else []
    return [part for child in module.children() for part in untrained(child)]


def stack(arrays: Sequence[np.ndarray | None]) -> Tensor:
    """Arrays of one shape and dtype as one tensor, in page-locked memory where there is CUDA."""
    first = arrays[0]
    assert first is not None
    stacked = empty(len(arrays), *first.shape, dtype=torch.from_numpy(np.empty(0, first.dtype)).dtype)
    for row, array in zip(stacked.numpy(), arrays, strict=True):
        row[:] = array
    return stacked
