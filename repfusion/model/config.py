"""What a text-to-image model is made of: folders of frozen weights, a conditioning method, a denoiser."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from repfusion.conditioning.captioning import CaptioningConfig
from repfusion.conditioning.noisy_latents import NoisyLatentsConfig
from repfusion.config import Weights, WeightsFolder
from repfusion.data.readers import IMAGE_FEATURES, VIDEO_FEATURES, Reader, SampleArray
from repfusion.diffusion.flow import FlowConfig
from repfusion.latents.load import EncoderConfig
from repfusion.model.discrete.illume import IllumeConfig
from repfusion.model.discrete.unidisc import UniDiscConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.methods import ConditioningConfig
from repfusion.model.trainable import TrainableConfig
from repfusion.weights import WEIGHTS


class ModelConfig(TrainableConfig):
    """A text-to-image model."""

    kind: Literal["text_to_image"] = Field(default="text_to_image", exclude=True)
    """What names no kind is one, so it is not written."""
    mllm: WeightsFolder = WEIGHTS / "llava"
    """Folder of the MLLM (a LLaVA, or a causal language model), which is frozen unless `conditioning` trains
    it.
    """
    mllm_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which its frozen weights are held."""
    encoder: EncoderConfig = EncoderConfig()
    """What makes the features that are denoised."""
    decoder: Annotated[Path, Weights(to_train=False)] = WEIGHTS / "decoder"
    """Folder of the decoder: a RAE decoder's or one's that draws, or the VAE's that makes the features."""
    conditioning: ConditioningConfig = Field(default=NoisyLatentsConfig(), discriminator="method")
    """RepFusion (noisy_latents), or a baseline. A method's name alone stands for its defaults."""
    dit: DiTConfig = DiTConfig()
    """The denoiser. Transfusion has none."""
    flow: FlowConfig = FlowConfig()
    """Noise levels."""

    @field_validator("conditioning", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _masters_are_float32(self) -> "ModelConfig":
        if self.conditioning.trains_llm and self.mllm_dtype != "float32":
            raise ValueError(
                f"mllm_dtype {self.mllm_dtype} with an LLM that is trained: its weights are the masters; set "
                "mllm_dtype: float32 (engine.precision decides what the passes compute in)"
            )
        return self

    @property
    def captioning(self) -> CaptioningConfig | None:
        """The caption loss of a trained LLM; None where there is none."""
        return getattr(self.conditioning, "captioning", None)

    @property
    def tokens_beside(self) -> int:
        """Tokens that the MLLM reads after a prompt. Raises ValueError where the encoder's folder is
        missing.
        """
        return self.conditioning.tokens_beside(prod(self.encoder.geometry.grid))

    @property
    def draws_clips(self) -> bool:
        """Whether latents are those of clips."""
        return self.encoder.num_frames is not None

    @property
    def features(self) -> str:
        """The column of what is denoised."""
        return VIDEO_FEATURES if self.draws_clips else IMAGE_FEATURES

    @property
    def columns(self) -> Mapping[str, Reader]:
        return {self.features: SampleArray(), **self.conditioning.columns}

    @property
    def label(self) -> str:
        return f"the method {self.conditioning.method!r}"

    @property
    def reads_images(self) -> bool:
        return self.conditioning.reads_images

    @property
    def needs_start(self) -> bool:
        return self.conditioning.needs_start

    def describe(self) -> str:
        fields = self.conditioning.model_dump(exclude_defaults=True, exclude={"method", "captioning"})
        chosen = ", ".join(f"{name} {value}" for name, value in fields.items())
        method = self.conditioning.method + (f" ({chosen})" if chosen else "")
        if not self.conditioning.has_dit:
            return f"{method}, no DiT"
        return f"{method}, DiT {self.dit.depth} x {self.dit.hidden_size}"


def kind_of(value: Any) -> str:
    """The kind that a section says it is; what says none is a text-to-image model."""
    if isinstance(value, dict):
        return value.get("kind", "text_to_image")
    return getattr(value, "kind", "text_to_image")


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("text_to_image")]
    | Annotated[UniDiscConfig, Tag("unidisc")]
    | Annotated[IllumeConfig, Tag("illume")],
    Discriminator(kind_of),
]
"""Settings of every model, told apart by `kind`."""
CodesModelConfig = UniDiscConfig | IllumeConfig
"""Settings of the models of codes."""
ANY_MODEL: TypeAdapter[ModelConfig | CodesModelConfig] = TypeAdapter(AnyModelConfig)


def flow_of(config: TrainableConfig, what: str) -> ModelConfig:
    """A text-to-image model's configuration. Raises ValueError where it is another's, of which `what` does
    not know.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{config.label} is no text-to-image model, and {what} knows of these alone")
    return config


def refuse_clips(config: TrainableConfig, what: str) -> None:
    """Raises ValueError where a model draws clips, of which `what` does not know."""
    if isinstance(config, ModelConfig) and config.draws_clips:
        raise ValueError(
            f"the model draws clips, of which {what} does not know yet; draw them by python -m "
            "repfusion.generate --out FILE.mp4"
        )
