"""A decoder and scenes that no training showed -> Frechet distance, sharpness, detector agreement, PSNR, SSIM
and, where there is its network, LPIPS.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pipelines.ladder.decoders.plan import DecoderPlan
from repfusion.decoding.measure import HeldOut
from repfusion.decoding.perceptual import LPIPS
from repfusion.evaluation.suites.likeness import frechet_distance
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.load import Decoder
from repfusion.scenes.detector import detect
from repfusion.scenes.world import Scene, draw_scene, render, to_uint8

FIRST_SEED = 60_000_000
"""Scenes to measure on are drawn from these seeds, which no workflow's source reaches."""
AT_ONCE = 64


@dataclass(frozen=True)
class DecoderBench:
    """The scenes of a plan, and what measures on them. Raises ValueError where the scenes are not of the
    encoder's size.
    """

    plan: DecoderPlan
    device: torch.device

    def __post_init__(self) -> None:
        size, expected = self.plan.world.image_size, self.encoder.image_size
        if size != expected:
            raise ValueError(f"world.image_size is {size}, the encoder takes {expected} px; set it to that")

    @cached_property
    def scenes(self) -> list[Scene]:
        """What is measured on, alike for every row."""
        return [draw_scene(FIRST_SEED + i, self.plan.world) for i in range(self.plan.num_scenes)]

    @cached_property
    def images(self) -> UInt8[Tensor, "b h w 3"]:
        """What they look like, in 8 bits as images to train on are."""
        return torch.from_numpy(np.stack([to_uint8(render(one, self.plan.world)) for one in self.scenes]))

    @cached_property
    def encoder(self) -> PixelEncoder:
        """The encoder whose features are decoded."""
        return self.plan.encoder.load().to(self.device)

    @cached_property
    def judge(self) -> PixelEncoder:
        """The encoder in whose features distances are taken."""
        return self.plan.judge.load().to(self.device)

    @cached_property
    def lpips(self) -> LPIPS | None:
        """The network of LPIPS; None where the plan names none."""
        return None if self.plan.lpips is None else LPIPS.from_pretrained(self.plan.lpips).to(self.device)

    @cached_property
    def held_out(self) -> HeldOut:
        """Pixels and features of the scenes."""
        pixels = self.images.movedim(-1, 1).float().to(self.device) / 255
        parts = [self.encoder(part) for part in pixels.split(AT_ONCE)]
        return HeldOut(pixels, torch.cat(parts))

    def measures(self, decoder: Decoder) -> dict[str, float]:
        """What people see of a decoder, by name; the seed of an image is its number."""
        rebuilt = self.held_out.rebuilt(decoder.to(self.device).eval())
        shown = [looks_of(image) for image in rebuilt.cpu().numpy()]
        expected = [looks_of_scene(scene) for scene in self.scenes]
        agreed = [one == other for one, other in zip(shown, expected, strict=True)]
        return {
            "frechet_distance": frechet_distance(self._seen(rebuilt), self._seen(self.held_out.pixels)),
            "sharpness": sharpness(rebuilt) / sharpness(self.held_out.pixels),
            "detector_agreement": float(np.mean(agreed)),
            **self.held_out.measures(rebuilt, self.lpips),
        }

    def _seen(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b d"]:
        """The judge's features, averaged over its tokens; pixels are resized to its size."""
        side = self.judge.image_size
        found = []
        for part in pixels.split(AT_ONCE):
            if part.shape[-1] != side:
                part = F.interpolate(part, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            found.append(self.judge(part).double().mean(1).cpu())
        return torch.cat(found).numpy()


def sharpness(pixels: Float[Tensor, "b 3 h w"]) -> float:
    """Mean absolute Laplacian (four neighbours) of images in [0, 1]: the stronger their edges, the more."""
    kernel = pixels.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return float(F.conv2d(pixels.flatten(0, 1)[:, None], kernel).abs().mean())


def looks_of(pixels: Float[np.ndarray, "3 h w"]) -> list[tuple[str, str]]:
    """Colours and shapes of all that the detector finds."""
    return sorted((thing.colour, thing.shape) for thing in detect(pixels))


def looks_of_scene(scene: Scene) -> list[tuple[str, str]]:
    """Colours and shapes of all that a scene shows."""
    return sorted((thing.colour, thing.shape) for thing in scene.things)
