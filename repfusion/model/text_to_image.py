"""Everything of one text-to-image model in one module: MLLM, conditioner, DiT, and the statistics that define
its latents.
"""

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repfusion.conditioning.captioning import CaptionBatch, CaptioningConfig, caption_batch
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner, NoisyLatentsConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig, QueryPrompts
from repfusion.conditioning.text_embed import TextEmbedConditioner, TextEmbedConfig, TextFeatures
from repfusion.conditioning.transfusion import TransfusionConfig, VelocityHead
from repfusion.config import Config, WeightsFolder
from repfusion.data.readers import IMAGE_FEATURES, PROMPT_FEATURES, CaptionArray, Reader, SampleArray
from repfusion.diffusion.flow import FlowConfig, interpolate, shift_factor, velocity
from repfusion.latents.load import Decoder, EncoderConfig, load_decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.mllm import MLLM
from repfusion.llm.prefix import Prefix
from repfusion.model.dit import DiT, DiTConfig
from repfusion.weights import WEIGHTS

PromptBatch = Prefix | TextFeatures | QueryPrompts
ConditioningConfig = NoisyLatentsConfig | TextEmbedConfig | QueriesConfig | TransfusionConfig


class ModelConfig(Config):
    mllm: WeightsFolder = WEIGHTS / "llava"
    """Folder of the MLLM (a LLaVA, or a causal language model), which is frozen unless `conditioning` trains
    it.
    """
    mllm_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which its frozen weights are held."""
    encoder: EncoderConfig = EncoderConfig()
    """What makes the features that are denoised."""
    decoder: WeightsFolder = WEIGHTS / "decoder"
    """Folder of the decoder: a RAE decoder's, or the VAE's that makes the features."""
    conditioning: ConditioningConfig = Field(default=NoisyLatentsConfig(), discriminator="method")
    """RepFusion (noisy_latents), or a baseline. A method's name alone stands for its defaults."""
    dit: DiTConfig = DiTConfig()
    """The denoiser; its `interface` follows from `conditioning`. Transfusion has none."""
    flow: FlowConfig = FlowConfig()
    """Noise levels."""

    @field_validator("conditioning", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _masters_are_float32(self) -> "ModelConfig":
        if self.trains_llm and self.mllm_dtype != "float32":
            raise ValueError(
                f"mllm_dtype {self.mllm_dtype} with an LLM that is trained: its weights are the masters; set "
                "mllm_dtype: float32 (engine.precision decides what the passes compute in)"
            )
        return self

    @property
    def trains_llm(self) -> bool:
        match self.conditioning:
            case TransfusionConfig():
                return True
            case NoisyLatentsConfig():
                return self.conditioning.train_llm
            case _:
                return False

    @property
    def captioning(self) -> CaptioningConfig | None:
        """The caption loss of a trained LLM; None where there is none."""
        match self.conditioning:
            case TransfusionConfig() | NoisyLatentsConfig():
                return self.conditioning.captioning
            case _:
                return None

    def describe(self) -> str:
        """The method and the size of its denoiser, in a few words."""
        fields = self.conditioning.model_dump(exclude_defaults=True, exclude={"method", "captioning"})
        chosen = ", ".join(f"{name} {value}" for name, value in fields.items())
        method = self.conditioning.method + (f" ({chosen})" if chosen else "")
        if isinstance(self.conditioning, TransfusionConfig):
            return f"{method}, no DiT"
        return f"{method}, DiT {self.dit.depth} x {self.dit.hidden_size}"


def columns_of(config: ModelConfig) -> dict[str, Reader]:
    """How a model of this configuration reads the columns that it can use beside captions, by name."""
    readers: dict[str, Reader] = {IMAGE_FEATURES: SampleArray()}
    if isinstance(config.conditioning, TextEmbedConfig):
        readers[PROMPT_FEATURES] = CaptionArray()
    return readers


class Generator(nn.Module):
    """Trains with `forward`, samples through `sampler.sample`.

    Args:
        config: what it is made of.
        mllm: its language model; with its head where the config has a caption loss.
        statistics: of the features; they define the latent space and travel with the checkpoint.
        grid: rows and columns of latent tokens.
    """

    def __init__(self, config: ModelConfig, mllm: MLLM, statistics: LatentStatistics, grid: tuple[int, int]):
        super().__init__()
        num_tokens, latent_dim = statistics.mean.shape
        if num_tokens != grid[0] * grid[1]:
            raise ValueError(
                f"latent statistics have {num_tokens} tokens, the encoder's grid is {grid[0]} x "
                f"{grid[1]}; re-run 'latents'"
            )
        self.config = config
        self.statistics = statistics
        self.grid = grid
        self.latent_shape = (num_tokens, latent_dim)
        self.shift = shift_factor(num_tokens, latent_dim, config.flow.base_dim)
        self.captioning = config.captioning
        match method := config.conditioning:
            case NoisyLatentsConfig():
                self.conditioner = NoisyLatentConditioner(mllm, latent_dim, num_tokens, method)
            case TransfusionConfig():
                self.conditioner = NoisyLatentConditioner(mllm, latent_dim, num_tokens, method.reading())
            case QueriesConfig():
                self.conditioner = QueriesConditioner(mllm, num_tokens, method)
            case TextEmbedConfig():
                self.conditioner = TextEmbedConditioner(mllm)
        if isinstance(method, TransfusionConfig):
            self.dit = VelocityHead(mllm.width, latent_dim)
        else:
            dit_config = config.dit.model_copy(update={"interface": self.conditioner.interface})
            self.dit = DiT(dit_config, latent_dim, grid, mllm.width)

    @classmethod
    def build(cls, config: ModelConfig, statistics: LatentStatistics) -> "Generator":
        """Loads the frozen parts named by the config; the trainable ones are fresh, but for the MLLM's
        projector, which from now on takes latents for features.

        Raises:
            ValueError: where a folder is missing or parts do not fit each other.
        """
        encoder = config.encoder.load()
        dtype, with_head = getattr(torch, config.mllm_dtype), config.captioning is not None
        mllm = MLLM.from_pretrained(config.mllm, dtype, with_head)
        if statistics.mean.shape != (encoder.num_tokens, encoder.feature_dim):
            got, expected = tuple(statistics.mean.shape), (encoder.num_tokens, encoder.feature_dim)
            raise ValueError(
                f"latent statistics are of features {got}, the encoder {config.encoder.path} gives "
                f"{expected} at {encoder.image_size} px; re-run 'latents'"
            )
        has_own = mllm.projector is not None
        generator = cls(config, mllm, statistics, encoder.grid)
        if has_own and isinstance(generator.conditioner, NoisyLatentConditioner):
            generator.conditioner.projector.take_latents(statistics)
        return generator

    @property
    def prompt_column(self) -> Literal["ids", "features"]:
        """What training feeds: captions to tokenise, or precomputed text features."""
        return self.conditioner.prompt_column

    @property
    def device(self) -> torch.device:
        return self.dit.out.weight.device

    def prompt_batch(
        self, prompts: list[str] | list[str | Float[Tensor, "_ c"]], reuse: bool = False
    ) -> PromptBatch:
        """Prompts (an empty one is the unconditional prompt) on the model's device; `reuse` for many steps
        without gradients.
        """
        return self.conditioner.prepare(prompts, self.device, reuse)

    def velocity(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], prompts: PromptBatch
    ) -> Float[Tensor, "b n d"]:
        condition = self.conditioner.condition(prompts, z_t, t)
        return self.dit(z_t, t, condition.tokens, condition.mask)

    def forward(
        self,
        latents: Float[Tensor, "b n d"],
        prompts: PromptBatch,
        t: Float[Tensor, " b"],
        noise: Float[Tensor, "b n d"],
        captions: CaptionBatch | None = None,
    ) -> Float[Tensor, " b"] | tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Mean squared error of the velocity, per sample, float32; with captions, also their weighted loss
        (0 for samples that are not captioned).
        """
        predicted = self.velocity(interpolate(latents, noise, t), t, prompts)
        losses = (predicted.float() - velocity(latents, noise)).square().mean(dim=(1, 2))
        if captions is None:
            return losses
        assert isinstance(self.conditioner, NoisyLatentConditioner)
        said = self.conditioner.caption_losses(latents[captions.rows], captions)
        return losses, torch.zeros_like(losses).index_add(0, captions.rows, captions.weights * said)

    def caption_batch(self, captions: list[str], chances: Float[Tensor, " b"]) -> CaptionBatch:
        """Which samples of a batch are captioned, and what is to be said of them, on the model's device."""
        assert self.captioning is not None
        return caption_batch(self.conditioner.mllm, captions, chances, self.captioning).to(self.device)

    def normalise(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.statistics.normalise(features)

    def denormalise(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.statistics.denormalise(latents)

    def frozen_parts(self) -> list[nn.Module]:
        """Modules without a trained parameter that hold most of the weights."""
        mllm = self.conditioner.mllm
        return [mllm.language_model] if mllm.is_frozen else []

    def checkpoint_activations(self) -> None:
        """From now on, compute the activations of each block of the DiT and layer of the MLLM again in the
        backward pass.
        """
        for block in self.layers():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def compile_blocks(self) -> None:
        """torch.compile the blocks of the DiT and the layers of the MLLM, in place."""
        for block in self.layers():
            block.compile()

    def layers(self) -> list[nn.Module]:
        """The DiT's blocks and the MLLM's layers, the repeated parts that do nearly all of the work."""
        layers = self.conditioner.mllm.language_model.layers
        assert isinstance(layers, nn.ModuleList)
        return [*(self.dit.blocks if isinstance(self.dit, DiT) else []), *layers]

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters that training changes: projector, embedders and DiT; the LLM where it is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Strict. Raises ValueError naming what is missing, unknown or of another shape."""
        own = self.trainable_state()
        problems = [f"{name}: missing" for name in own.keys() - state.keys()]
        problems += [f"{name}: unknown" for name in state.keys() - own.keys()]
        for name in own.keys() & state.keys():
            if own[name].shape != state[name].shape:
                problems.append(f"{name}: {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
        if problems:
            raise ValueError(
                "weights of another geometry: "
                + "; ".join(sorted(problems)[:6])
                + f" ({len(problems)} in all)"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def load_decoder(self) -> Decoder:
        """On the model's device. Raises ValueError where the decoder reads other features than this model
        makes.
        """
        decoder = load_decoder(self.config.decoder, self.grid).to(self.device)
        got, expected = (decoder.grid, decoder.feature_dim), (self.grid, self.latent_shape[1])
        if got != expected:
            raise ValueError(
                f"decoder {self.config.decoder} reads (grid, width) {got}, the model makes {expected}: "
                "use a decoder trained on this encoder's features at this encoder.image_size"
            )
        return decoder
