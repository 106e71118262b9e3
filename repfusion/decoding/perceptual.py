"""Two images -> how far apart they look: LPIPS on a frozen VGG-16 (arXiv 1801.03924, equation 1; VGG, arXiv
1409.1556, configuration D).

FOLDER/model.safetensors holds 31 tensors under the names that they are published with: `features.N.weight`
and `features.N.bias` of the 13 convolutions (N as torchvision counts them), and `linK.model.1.weight` of
LPIPS's five linear heads.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from repfusion.latents.tower import IMAGENET
from repfusion.pretrained.weights import read_headers, refuse_misfits, refuse_not_finite, weight_files

WHAT = "perceptual"
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of VGG-16's stages; each ends with the features that are compared."""
LEAST_SIDE_PX = 16
"""A stage halves the image of the one before it."""
EPSILON = 1e-10
"""What is added to a length that is divided by."""


class LPIPS(nn.Module):
    """The distance of two images in the features of a VGG-16.

    Each location's features are brought to unit length over the channels; the squares of their differences
    are weighted by channel, averaged over locations and summed over five layers.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict()
        place, width = 0, 3
        self.stages: list[list[str]] = []
        for channels, number in STAGES:
            self.stages.append([])
            for _ in range(number):
                self.features[str(place)] = nn.Conv2d(width, channels, 3, padding=1)
                self.stages[-1].append(str(place))
                place, width = place + 2, channels  # a ReLU lies between
            place += 1  # the pooling
        for number, (channels, _) in enumerate(STAGES):
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": head}))
        mean, std = IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        """The distance of each image of `pixels` to that of `others`, both about [0, 1]; it is differentiable
        in both.

        Raises:
            ValueError: the images have a side below 16 px.
        """
        if min(pixels.shape[-2:]) < LEAST_SIDE_PX:
            height, width = pixels.shape[-2:]
            raise ValueError(f"images of {width} x {height} px; LPIPS needs {LEAST_SIDE_PX} px a side")
        distance = pixels.new_zeros(len(pixels))
        both = (torch.cat([pixels, others]) - self.mean) / self.std
        for number, names in enumerate(self.stages):
            if number:
                both = F.max_pool2d(both, 2)
            for name in names:
                both = F.relu(self.features[name](both))
            own, other = unit_length(both.float()).chunk(2)
            weights = self.get_submodule(f"lin{number}.model.1").weight.float()
            distance = distance + F.conv2d((own - other).square(), weights).mean(dim=(1, 2, 3))
        return distance

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LPIPS":
        """The network of a folder of the layout above, in float32, frozen and in eval mode.

        Raises:
            ValueError: the folder has no safetensors, or weights are missing, left over, of another shape or
                not finite.
        """
        folder = Path(folder)
        place, files = f"{WHAT} folder {folder}", weight_files(folder, WHAT)
        headers = read_headers(files, WHAT)
        with torch.device("meta"):
            own = cls().state_dict()
        misshapen = [
            (name, headers[name].shape, own[name].shape)
            for name in own.keys() & headers.keys()
            if headers[name].shape != own[name].shape
        ]
        missing, left_over = own.keys() - headers.keys(), headers.keys() - own.keys()
        refuse_misfits(place, missing, left_over, misshapen, "repfusion/decoding/perceptual.py's layout")
        network = cls()
        for file in files:
            network.load_state_dict(load_file(str(file)), strict=False)
        refuse_not_finite(network, place)
        return network.float().eval().requires_grad_(False)


def unit_length(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Features divided by their length over the channels. Where all are 0 they stay 0, and so does their
    gradient: the root alone would make it NaN.
    """
    length = features.square().sum(dim=1, keepdim=True).clamp(min=EPSILON**2).sqrt()
    return features / (length + EPSILON)
