"""An export (or a checkpoint) -> a pipeline that is called as diffusers' are; diffusers is not needed.

RepFusionPipeline.from_pretrained(path)("a red circle", generator=torch.Generator().manual_seed(0)).images
"""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from repfusion.config import naming
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.generate import decode, to_uint8
from repfusion.images.decode import read_pixels
from repfusion.latents.load import Decoder
from repfusion.llm.chats.eyes import check_image
from repfusion.llm.words import unread
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.runs.exported import is_export, load_export
from repfusion.runs.named import named_model

log = logging.getLogger(__name__)
Noise = torch.Generator | list[torch.Generator] | None
StepEnd = Callable[["RepFusionPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""(pipeline, step from 0, noise level it began at, {"latents": [b, n, d]}) -> the same, changed, or None."""


Picture = Image.Image | np.ndarray
UNSAVED = ("CMYK", "YCbCr", "HSV", "LAB")
"""Modes of pictures in memory that no PNG holds."""


def to_pixels(picture: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as requests hold it; PIL's of any mode become RGB as files do, arrays are that already.

    Raises:
        ValueError: it is neither, PIL's mode says no colours, or a side has one pixel.
    """
    if isinstance(picture, np.ndarray):
        check_image(picture)
        return picture
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"a {type(picture).__name__}; expected a PIL image or a uint8 array [h, w, 3], such as "
            "repfusion.images.decode.read_pixels makes of a file's bytes"
        )
    exif, stream = picture.getexif(), io.BytesIO()
    try:
        (picture.convert("RGB") if picture.mode in UNSAVED else picture).save(stream, "PNG", exif=exif)
    except OSError as error:
        raise ValueError(f"a PIL image of mode {picture.mode!r}: {error}; convert it to RGB") from error
    pixels = read_pixels(stream.getvalue())
    check_image(pixels)
    return pixels


def all_pixels(image: Any) -> tuple[UInt8[np.ndarray, "_ _ 3"], ...]:
    """Pictures, one or several or none, as requests hold them. Raises ValueError, which says which of them is
    none.
    """
    pictures = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    found = []
    for number, picture in enumerate(pictures, 1):
        with naming(f"image {number} of {len(pictures)}"):
            found.append(to_pixels(picture))
    return tuple(found)


@dataclass
class RepFusionPipelineOutput:
    """`images`: PIL images, or an array or tensor of them, by `output_type`."""

    images: list[Image.Image] | np.ndarray | Tensor


class RepFusionPipeline:
    """Prompts -> images, bit for bit those of `repfusion.generate` for the same seeds, batch and device."""

    def __init__(self, model: TextToImage, decoder: Decoder, precision: Literal["fp32", "bf16"] = "bf16"):
        self.model = model.eval()
        self.decoder = decoder
        self.precision = precision

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype | None = None) -> "RepFusionPipeline":
        """A pipeline on the CPU; every file of an export is compared with its digest first.

        Args:
            path: folder of an export, or of a checkpoint whose frozen parts are at hand (averaged weights); a
                training or a workflow's root stands for its best checkpoint.
            torch_dtype: None is what `repfusion.generate` does: weights as trained, computing in bfloat16
                autocast. bfloat16 also holds the weights of language model and denoiser in it; float32 holds
                and computes everything in float32.

        Raises:
            ValueError: no such folder, one that is damaged, or another dtype.
        """
        if torch_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"torch_dtype {torch_dtype}: expected torch.float32 or torch.bfloat16, or None")
        path = named_model(path)
        name = None if torch_dtype is None else str(torch_dtype).removeprefix("torch.")
        model = load_export(path, name) if is_export(path) else load_checkpoint(path)
        decoder = model.load_decoder()
        if torch_dtype is not None:
            for parameter in model.parameters():  # not the buffers: rotary frequencies need float32
                parameter.data = parameter.data.to(torch_dtype)
        return cls(model, decoder, "fp32" if torch_dtype == torch.float32 else "bf16")

    def to(self, device: torch.device | str) -> "RepFusionPipeline":
        self.model.to(device)
        self.decoder.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 30,
        guidance_scale: float | int = 4.0,
        generator: Noise = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Float[Tensor, "b n d"] | None = None,
        callback_on_step_end: StepEnd | None = None,
        solver: Literal["euler", "heun"] = "euler",
        guidance_interval: tuple[float | int, float | int] = (0.0, 1.0),
        image: Picture | Sequence[Picture] | None = None,
        image_guidance_scale: float | None = None,
        rewrite: str | Literal[False] | None = None,
    ) -> RepFusionPipelineOutput:
        """All images in one batch; those of a prompt lie beside each other. A warning in the log names words
        that the language model never read, where its folder knows.

        Args:
            prompt: one or several.
            num_inference_steps: of the solver.
            guidance_scale: 1 turns guidance off.
            generator: of the noise, on any device. One draws the images' noise one after the other, so that
                the first image is that of the call for it alone; a list has one for each image; None takes
                torch's own.
            num_images_per_prompt: images of each prompt.
            output_type: `pil` images; `np` [b, h, w, 3] and `pt` [b, 3, h, w] in [0, 1], float32 on the CPU;
                `latent` [b, n, d], the normalised latents.
            latents: the initial noise itself, in place of a draw.
            callback_on_step_end: called after every step; the latents it returns take their place.
            solver: `euler` evaluates the model once a step, `heun` twice, but for the last step.
            guidance_interval: guide where low < noise level <= high.
            image: what is to be edited or referred to, PIL images or uint8 [h, w, 3], in the order in which
                the prompts count them; all prompts have them. Of a checkpoint that reads images.
            image_guidance_scale: of the images alone; `guidance_scale` is then the prompt's.
            rewrite: system prompt under which the language model rewrites the prompts; False takes them as
                they are; None leaves it to the checkpoint's habit.

        Raises:
            ValueError: no prompt, as many generators or latents as there are no images, or a bad number.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError(
                f"{len(prompts)} prompts, {num_images_per_prompt} images of each; expected at least 1"
            )
        if said := unread(self.model.conditioner.llm.folder, prompts):
            log.warning("%s", said)
        images = all_pixels(image)
        requests = [Request(one, images, rewrite) for one in prompts for _ in range(num_images_per_prompt)]
        config = SamplerConfig(
            num_steps=num_inference_steps,
            solver=solver,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
            precision=self.precision,
        )
        noise = self._noise(len(requests), generator) if latents is None else latents
        made = sample(self.model, requests, noise, config, self._on_step(callback_on_step_end))
        if output_type == "latent":
            return RepFusionPipelineOutput(made)
        pixels = decode(self.model, self.decoder, made)
        if output_type == "pt":
            return RepFusionPipelineOutput(pixels)
        if output_type == "np":
            return RepFusionPipelineOutput(pixels.movedim(1, -1).numpy())
        return RepFusionPipelineOutput([Image.fromarray(array) for array in to_uint8(pixels)])

    def _noise(self, num_images: int, generator: Noise) -> Float[Tensor, "b n d"]:
        if not isinstance(generator, list):
            generators: list[torch.Generator | None] = [generator] * num_images
        elif len(generator) == num_images:
            generators = [*generator]
        else:
            raise ValueError(f"{len(generator)} generators for {num_images} images; expected one for each")
        shape = self.model.latent_shape
        rows = (
            torch.randn(shape, generator=one, device="cpu" if one is None else one.device)
            for one in generators
        )
        return torch.stack([row.to(self.device) for row in rows])

    def _on_step(self, callback: StepEnd | None) -> Callable[[int, float, Tensor], Tensor] | None:
        if callback is None:
            return None

        def on_step(step: int, level: float, z: Tensor) -> Tensor:
            changed = callback(self, step, level, {"latents": z})
            return z if changed is None else changed.get("latents", z)

        return on_step
