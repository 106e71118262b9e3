"""A checkpoint of GILL -> captions and images as retrieval compares them, and the name of what made them."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repfusion.conditioning.related.gill import GillConditioner
from repfusion.config import Strict
from repfusion.files import weights_digest
from repfusion.inputs import to_device
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import is_vae, latent_geometry
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.exported import load_any
from repfusion.runs.named import named_model


class EmbeddingSpace(Strict):
    """What made embeddings. Those of two spaces are not comparable."""

    checkpoint: str
    """Where the checkpoint or export lay; for people, and not compared."""
    weights: str
    """sha256 of the weights that retrieval reads with, and of the statistics of the latents."""
    encoder: str
    """sha256 of the encoder's weights."""
    layer: int | None
    """Hidden state of the encoder's tower that is read; a VAE has none."""
    image_size: int
    """Side in px of the images that the encoder takes."""

    def check(self, other: "EmbeddingSpace", what: str, remedy: str) -> None:
        """Raises ValueError where another space than this one made `what`; `remedy` says what to do."""
        for name in ("weights", "encoder", "layer", "image_size"):
            own, its = getattr(self, name), getattr(other, name)
            if own != its:
                part = "retrieval weights" if name == "weights" else f"encoder ({name})"
                raise ValueError(
                    f"{what} is of another {part}: it has {str(its)[:12]} of {other.checkpoint}, the "
                    f"checkpoint {self.checkpoint} has {str(own)[:12]}; {remedy}"
                )


class GillReader:
    """A checkpoint or an export of GILL, in eval mode, as retrieval and dialogues use it.

    Args:
        named: what `named_model` takes.
        device: where it lies.

    Raises:
        ValueError: it is damaged, or of another method.
    """

    def __init__(self, named: str | Path, device: torch.device):
        self.folder, self.device = named_model(named), device
        self.model: TextToImage = load_any(self.folder).to(device)
        conditioner = self.model.conditioner
        if not isinstance(conditioner, GillConditioner):
            raise ValueError(
                f"checkpoint {self.folder} is of the method {self.model.config.conditioning.method!r}, which "
                "learns neither retrieval nor [IMG] tokens; take one of 'gill'"
            )
        self.conditioner = conditioner

    @cached_property
    def encoder(self) -> PixelEncoder:
        """The encoder of the checkpoint's configuration. Raises ValueError where its folder has none."""
        return self.model.config.encoder.load().to(self.device)

    @cached_property
    def space(self) -> EmbeddingSpace:
        """What its embeddings are made by."""
        encoder = self.model.config.encoder
        return EmbeddingSpace(
            checkpoint=str(self.folder),
            weights=self._weights(),
            encoder=weights_digest(encoder.path),
            layer=None if is_vae(encoder.path) else encoder.layer,
            image_size=latent_geometry(encoder.path, encoder.image_size).image_size,
        )

    def _weights(self) -> str:
        statistics, conditioner = self.model.statistics, self.conditioner
        tensors = {"rows": conditioner.rows, "mean": statistics.mean, "var": statistics.var}
        for name in ("of_text", "of_image"):
            tensors |= {f"{name}.{key}": one for key, one in getattr(conditioner, name).state_dict().items()}
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "b r"]:
        """Embeddings of prompts, of unit length, on the CPU. Raises PromptTooLong."""
        prefix = to_device(self.conditioner.llm.tokenise(prompts), self.device)
        return self.of_states(self.conditioner.read_image_tokens(prefix))

    @torch.no_grad()
    def of_states(self, states: Float[Tensor, "b k c"]) -> Float[Tensor, "b r"]:
        """Embeddings of states at the [IMG] tokens, of unit length, on the CPU."""
        return self.conditioner.text_embeddings(states.float()).cpu()

    @torch.no_grad()
    def latents_of(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "b n d"]:
        """Clean latents of images of the encoder's size. Raises ValueError for those of another."""
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float().div(255)
        return self.model.normalise(self.encoder(pixels))

    @torch.no_grad()
    def of_features(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b r"]:
        """Embeddings of the encoder's features, of unit length, on the CPU."""
        latents = self.model.normalise(features.to(self.device))
        return self.conditioner.image_embeddings(latents).cpu()

    @torch.no_grad()
    def of_images(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "b r"]:
        """Embeddings of images of the encoder's size, of unit length, on the CPU."""
        return self.conditioner.image_embeddings(self.latents_of(images)).cpu()
