"""Image shards and a frozen vision tower -> a tokenizer of images into discrete codes (DualViTok; ILLUME+,
arXiv 2504.01934, section 3.1): pixels by L1, and where they are configured LPIPS and an adversarial loss;
features by their cosine; both codebooks.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from repfusion.codes.network import DualTokenizer, Seen, TokenizerConfig
from repfusion.codes.tokenizer import ImageTokenizer, read_folder, save_tokenizer
from repfusion.data.order import hash64
from repfusion.decoding.codes.config import TokenizerTrainingConfig
from repfusion.decoding.gradients import Hidden, Part
from repfusion.decoding.measure import AT_ONCE
from repfusion.decoding.train import RebuildingTraining, to_pixels, train_to_the_end
from repfusion.files import weights_digest
from repfusion.foundation.optimise import forward_pass
from repfusion.latents.geometry import is_vae, latent_geometry


def network_config(config: TokenizerTrainingConfig) -> TokenizerConfig:
    """The sizes of a tokenizer on the encoder of a training.

    Raises:
        ValueError: the encoder is a VAE, or its images do not fit the convolutions.
    """
    encoder = config.encoder
    if is_vae(encoder.path):
        raise ValueError(
            f"encoder.path {encoder.path} is a VAE, whose latents say no more than the pixels do; give the "
            "tokenizer a vision tower"
        )
    image_size, grid, feature_dim = latent_geometry(encoder.path, encoder.image_size)
    branches = {name: getattr(config.branches, name) for name in type(config.branches).model_fields}
    return TokenizerConfig(**branches, image_size=image_size, feature_dim=feature_dim, feature_grid=grid)


def new_tokenizer(config: TokenizerTrainingConfig) -> DualTokenizer:
    """A tokenizer's network, of fresh weights or of `init_from`.

    Raises:
        ValueError: `init_from` is a tokenizer of other sizes, or on another tower.
    """
    wanted = network_config(config)
    if config.init_from is None:
        torch.manual_seed(config.seed)
        return DualTokenizer(wanted)
    found = read_folder(config.init_from)
    if found.network != wanted or found.encoder_digest != weights_digest(config.encoder.path):
        raise ValueError(
            f"init_from {config.init_from} is a tokenizer of {found.network} on a tower of weights "
            f"{found.encoder_digest[:12]}, expected {wanted} on {weights_digest(config.encoder.path)[:12]}"
        )
    return ImageTokenizer.from_pretrained(config.init_from).network.requires_grad_(True)


class TokenizerTraining(RebuildingTraining[TokenizerTrainingConfig]):
    """A tokenizer learns to rebuild images and a tower's features from codes."""

    kind = "tokenizer"

    def build(self) -> None:
        config = self.config
        self.network = self.tokenizer = new_tokenizer(config)
        self.image_size = self.tokenizer.config.image_size
        self.tower = None if self.tokenizer.semantic is None else config.encoder.load().to(self.device)

    def hidden(self, seen: Seen) -> Hidden:
        hidden, losses = self.tokenizer.hidden(seen)
        weights = {"semantic": self.config.semantic_weight}
        return hidden, {
            name: weights.get(name, self.config.codebook_weight) * one for name, one in losses.items()
        }

    def draw(self, step: int) -> list[Part]:
        """This rank's images of a step, their features, and of which of them the pixel branch is dropped, by
        micro-batch.
        """
        images = self.images(step)
        kept = self._kept(step)
        found: list[Part] = []
        for own, numbers in zip(images, self.parts, strict=True):
            pixels = to_pixels(own)
            with forward_pass(self.device):
                features = self.features(own)
            shown = torch.from_numpy(kept[numbers.start : numbers.stop]).to(self.device)
            found.append((pixels, Seen(pixels, features, shown)))
        return found

    def _kept(self, step: int) -> np.ndarray:
        """Whether the pixel branch is kept, of every image of a step, the same on any number of ranks."""
        size, pixel = self.config.length.batch_size, self.config.branches.pixel
        if pixel is None or self.config.branches.semantic is None:
            return np.ones(size, bool)
        generator = np.random.default_rng(hash64("dropped pixels", self.config.seed, step))
        return generator.random(size) >= pixel.dropped_share

    def features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"] | None:
        return None if self.tower is None else self.tower.encode_images(images).features

    def rebuilt(self) -> Float[Tensor, "b 3 h w"]:
        parts = [self.tokenizer.decoded(codes).float() for codes in self._codes().split(AT_ONCE)]
        return torch.cat(parts).clamp(0, 1)

    @torch.no_grad()
    def _codes(self) -> Int[Tensor, "b n"]:
        """The codes of what is held out, by the weights as they are now."""
        held = self.held_out
        every = range(0, len(held.pixels), AT_ONCE)
        return torch.cat(
            [
                self.tokenizer.codes(
                    held.pixels[start : start + AT_ONCE],
                    None if held.features is None else held.features[start : start + AT_ONCE],
                )
                for start in every
            ]
        )

    @torch.no_grad()
    def further_measures(self) -> dict[str, float]:
        """How much of each codebook the held-out images use, and how like the features are that the semantic
        codes give again.
        """
        codes, found = self._codes(), {}
        for stream in self.tokenizer.config.streams:
            own = codes[:, stream.places] - stream.first_code
            for name, value in codebook_use(own, stream.num_codes).items():
                found[f"{stream.name}_{name}"] = value
            if stream.name == "semantic" and self.tokenizer.semantic is not None:
                branch, features = self.tokenizer.semantic, self.held_out.features
                assert features is not None
                found["semantic_cosine"] = 1 - float(branch.distance(branch.quantiser.look_up(own), features))
        return found

    def save(self, folder: Path) -> None:
        dtype = getattr(torch, self.config.dtype)
        save_tokenizer(folder, self.tokenizer, self.config.encoder, self._encoder_digest, dtype)

    @cached_property
    def _encoder_digest(self) -> str:
        return weights_digest(self.config.encoder.path)


def codebook_use(ids: Int[Tensor, "b n"], num_codes: int) -> dict[str, float]:
    """`used`: what share of a codebook occurs among ids; `perplexity`: how many codes it is as good as, were
    they equally frequent: the exponential of the entropy in nats.
    """
    counts = torch.bincount(ids.flatten(), minlength=num_codes).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return {"used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def train_tokenizer(config: TokenizerTrainingConfig) -> dict[str, Any]:
    """Writes the tokenizer to `out`, and beside its weights how it was measured; returns that. Goes on, is
    shared by ranks and raises as `train_decoder`.
    """
    return train_to_the_end(TokenizerTraining, config)
