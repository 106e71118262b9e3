"""A model -> its velocity loss by noise level with the right prompt, and what a prompt that is wrong in one
fact adds to it, or none: paired by scene and noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.ladder.science.plan import SciencePlan
from pipelines.ladder.science.training import autocast
from repfusion.diffusion.flow import initial_noise, interpolate, shift_noise_level, velocity
from repfusion.foundation import measure
from repfusion.latents.encoder import PixelEncoder
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.scenes.contrasts import DESCRIBED_KINDS, Descriptions, draw_descriptions
from repfusion.scenes.world import render

FIRST_SEED = 70_000_000
"""Scenes of no training."""
UNSHIFTED_LEVELS = (*measure.UNSHIFTED_LEVELS, 0.95)
"""Noise levels before the shift: those at which perception is measured, and one near pure noise."""


@dataclass(frozen=True)
class Described:
    """Descriptions of one kind, and the features of their scenes on the device."""

    kind: str
    told: Sequence[Descriptions]
    features: Float[Tensor, "b n d"]


@torch.no_grad()
def describe(plan: SciencePlan, encoder: PixelEncoder, device: torch.device) -> list[Described]:
    """The scenes of every kind, as an encoder that lies on the device sees them."""
    found = []
    for kind in DESCRIBED_KINDS:
        told = [draw_descriptions(FIRST_SEED + i, kind, plan.world) for i in range(plan.num_paired)]
        pixels = torch.from_numpy(np.stack([render(one.scene, plan.world) for one in told]))
        found.append(Described(kind, told, encoder(pixels.to(device))))
    return found


@torch.no_grad()
def paired_losses(model: TextToImage, described: Sequence[Described]) -> dict[str, Any]:
    """Losses by noise level: `right`, the mean with right prompts over all kinds; by kind, the mean and its
    standard error of what a `wrong` prompt adds, and `none`.
    """
    by_kind = {one.kind: _losses(model, one) for one in described}
    found = {}
    for number, level in enumerate(levels_of(model)):
        parts = {kind: {text: rows[number] for text, rows in one.items()} for kind, one in by_kind.items()}
        found[f"{level:.3f}"] = {
            "right": round(float(torch.cat([one["right"] for one in parts.values()]).mean()), 5),
            **{
                text: {kind: _added(one[text] - one["right"]) for kind, one in parts.items()}
                for text in ("wrong", "none")
            },
        }
    return found


def levels_of(model: TextToImage) -> list[float]:
    """The noise levels of a model's own schedule."""
    return [float(shift_noise_level(torch.tensor(u), model.shift)) for u in UNSHIFTED_LEVELS]


def _losses(model: TextToImage, described: Described) -> dict[str, list[Float[Tensor, " b"]]]:
    """Losses of every scene by prompt, then by level."""
    latents, num = model.normalise(described.features), len(described.told)
    noise = initial_noise(range(num), model.latent_shape).to(model.device)
    requests = {
        "right": [Request(one.right) for one in described.told],
        "wrong": [Request(one.wrong) for one in described.told],
        "none": [Request("")] * num,
    }
    found: dict[str, list[Tensor]] = {}
    with autocast(model.device):
        for text, asked in requests.items():
            prompted = model.read(asked, ["none" if text == "none" else "full"] * num)
            found[text] = []
            for level in levels_of(model):
                t = torch.full((num,), level, device=model.device)
                predicted = model.velocity(interpolate(latents, noise, t), t, prompted).float()
                losses = (predicted - velocity(latents, noise)).square().mean(dim=(1, 2))
                found[text].append(losses)
    return {text: [losses.cpu() for losses in rows] for text, rows in found.items()}


def _added(differences: Float[Tensor, " b"]) -> list[float]:
    """Mean and standard error."""
    error = differences.std() / math.sqrt(len(differences))
    return [round(float(differences.mean()), 5), round(float(error), 5)]
