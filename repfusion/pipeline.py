"""An export (or a checkpoint) -> a pipeline that is called as diffusers' are; diffusers is not needed.

RepFusionPipeline.from_pretrained(path)("a red circle", generator=torch.Generator().manual_seed(0)).images
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.devices.placing import Autocast
from repfusion.diffusion.sampler import OnStep, SamplerConfig, Solver, sample
from repfusion.diffusion.scheduler import FlowScheduler
from repfusion.export import export, export_again
from repfusion.generate import (
    AnyDecoder,
    Drawer,
    decode,
    decode_codes,
    flow_alone,
    noise_shape,
    to_uint8,
)
from repfusion.generation.device import usable_device
from repfusion.generation.pictures import Picture, all_pixels
from repfusion.llm.words import unread
from repfusion.model.config import refuse_clips
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.exported import is_export, load_export
from repfusion.runs.named import named_model

log = logging.getLogger(__name__)
Noise = torch.Generator | list[torch.Generator] | None
StepEnd = Callable[["RepFusionPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""(pipeline, step from 0, noise level it began at, {"latents": [b, n, d]}) -> the same, changed, or None."""
Embeddings = Sequence[Float[Tensor, "_ c"]] | Float[Tensor, "b m c"]
"""Precomputed features of prompts, a row of tokens each."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class RepFusionPipelineOutput:
    """`images`: PIL images, or an array or tensor of them, by `output_type`."""

    images: list[Image.Image] | np.ndarray | Tensor


class RepFusionPipeline:
    """Prompts -> images, bit for bit those of `repfusion.generate` for the same seeds, batch and device.

    docs/diffusers.md lists what of diffusers' pipelines is taken, and what raises.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        model: Drawer,
        decoder: AnyDecoder,
        scheduler: Any = None,
        precision: Literal["auto"] | Autocast = "auto",
        source: Path | None = None,
    ):
        """A pipeline of its `components`.

        Args:
            model: text to latents, or to codes.
            decoder: those to pixels.
            scheduler: as of the attribute; None is Euler's.
            precision: of the computation; bf16 is autocast, auto that where the device multiplies in it.
            source: the folder that the parts were read from, for `save_pretrained`.

        Raises:
            ValueError: the model draws clips.
        """
        refuse_clips(model.config, "RepFusionPipeline")
        self.model = model.eval()
        self.decoder = decoder
        self.precision: Literal["auto"] | Autocast = precision
        self.source = source
        self._scheduler = FlowScheduler("euler", model.shift if isinstance(model, TextToImage) else 1.0)
        self.scheduler = scheduler or self._scheduler
        self._interrupt = False
        self._bar: dict[str, Any] = {"disable": None}  # None shows it on terminals alone
        self._home: torch.device | None = None
        self._sampler = SamplerConfig()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> "RepFusionPipeline":
        """A pipeline on the CPU; every file of an export is compared with its digest first.

        Args:
            path: folder of an export, or of a checkpoint whose frozen parts are at hand (averaged weights); a
                training or a workflow's root stands for its best checkpoint.
            torch_dtype: None is what `repfusion.generate` does: weights as trained, computing in bfloat16
                autocast where the device multiplies in it. bfloat16 also holds the weights of language model
                and denoiser in it; float32 holds and computes everything in float32.
            dtype: the same by its newer name.

        Raises:
            ValueError: no such folder, one that is damaged, or another dtype.
        """
        wanted = one_of("dtype", torch_dtype, dtype)
        check_dtype(wanted)
        path = named_model(path)
        name = None if wanted is None else str(wanted).removeprefix("torch.")
        model = load_export(path, name) if is_export(path) else load_drawer(path)
        pipe = cls(model, model.load_decoder(), source=path)
        return pipe if wanted is None else pipe.to(dtype=wanted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes an export of what the pipeline was loaded from, in the precision that it was stored in.

        Raises:
            ValueError: the pipeline was built of parts, or the folder holds something else.
        """
        if self.source is None:
            raise ValueError("a pipeline that was built of parts has nothing to save; use from_pretrained")
        if is_export(self.source):
            export_again(self.source, Path(folder))
        else:
            export(self.source, Path(folder))

    def to(
        self,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "RepFusionPipeline":
        """Moves the pipeline: to(device), to(dtype), to(device, dtype), or by name.

        Raises:
            ValueError: no such device here, another dtype than float32 and bfloat16, or an offloaded
                pipeline; nothing is moved then.
        """
        for one in args:
            if isinstance(one, torch.dtype):
                dtype = one_of("dtype", dtype, one)
            else:
                device = one_of("device", device, one)
        check_dtype(dtype)
        if device is not None:
            if self._home is not None:
                raise ValueError("the pipeline is offloaded, which decides where its parts lie; load it anew")
            target = usable_device(device)
            self.model.to(target)
            self.decoder.to(target)
        if dtype is not None:
            for parameter in self.model.parameters():  # not the buffers: rotary frequencies need float32
                parameter.data = parameter.data.to(dtype)
            self.precision = "fp32" if dtype == torch.float32 else "bf16"
        return self

    def speed_up(self) -> "RepFusionPipeline":
        """Compiles, and draws each step as one CUDA graph, from now on; call it after `to`. Images change by
        rounding; the first ones of a size take a minute or more. See `TextToImage.speed_up_sampling`.
        """
        flow_alone(self.model, "speed_up").speed_up_sampling(self.precision)
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keeps the parts on the CPU; a call takes to the device the model to sample, then the decoder.

        Raises:
            ValueError: there is no such device here.
        """
        home = usable_device(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")
        self.to("cpu")
        self._home = home

    @contextmanager
    def _at_home(self, part: nn.Module) -> Iterator[None]:
        """The part on the device that an offloaded pipeline computes on, and back."""
        if self._home is None:
            yield
            return
        part.to(self._home)
        try:
            yield
        finally:
            part.to("cpu")

    @property
    def scheduler(self) -> FlowScheduler:
        """The solver and the shift of its noise levels. Another one may take its place, of diffusers too:
        `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`; ValueError where it
        asks for what is not followed.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = self._scheduler.follow(scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """What `RepFusionPipeline(**pipe.components)` makes the same pipeline of, without copying weights."""
        return {
            "model": self.model,
            "decoder": self.decoder,
            "scheduler": self.scheduler,
            "precision": self.precision,
            "source": self.source,
        }

    @property
    def device(self) -> torch.device:
        """Where the parts lie; where they compute, if they are offloaded."""
        return self._home or self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the trained weights are held: a denoiser's, or those of a model of codes."""
        held = self.model.denoiser if isinstance(self.model, TextToImage) else self.model
        return next(held.parameters()).dtype

    @property
    def interrupt(self) -> bool:
        """Whether the call at work ends after the present step: a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Guidance of the last call."""
        return self._sampler.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the last call was guided."""
        return self._sampler.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._sampler.num_steps

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments of tqdm's bar over the steps, such as `disable=True`."""
        self._bar = config

    def progress_bar(self, total: int) -> tqdm:
        """The bar of a call."""
        return tqdm(total=total, **self._bar)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | int = 4.0,
        generator: Noise = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Float[Tensor, "b n d"] | None = None,
        callback_on_step_end: StepEnd | None = None,
        solver: Solver | None = None,
        guidance_interval: tuple[float | int, float | int] = (0.0, 1.0),
        image: Picture | Sequence[Picture] | None = None,
        image_guidance_scale: float | None = None,
        rewrite: str | Literal[False] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        height: int | None = None,
        width: int | None = None,
        return_dict: bool = True,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> RepFusionPipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """All images in one batch; those of a prompt lie beside each other. A warning in the log names words
        that the language model never read, where its folder knows.

        Args:
            prompt: one or several.
            num_inference_steps: of the solver.
            guidance_scale: 1 or less turns guidance off.
            generator: of the noise, on any device. One draws the images' noise one after the other, so that
                the first image is that of the call for it alone; a list has one for each image; None takes
                torch's own.
            num_images_per_prompt: images of each prompt.
            output_type: `pil` images; `np` [b, h, w, 3] and `pt` [b, 3, h, w] in [0, 1], float32 on the CPU;
                `latent` [b, n, d], the normalised latents.
            latents: the initial noise itself, in place of a draw.
            callback_on_step_end: called after every step; the latents it returns take their place. Where it
                sets `pipeline._interrupt`, the call ends with them.
            solver: `euler`, `heun` or `dpm`, as of SamplerConfig; None is the scheduler's.
            guidance_interval: guide where low < noise level <= high.
            image: what is to be edited or referred to, PIL images or uint8 [h, w, 3], in the order in which
                the prompts count them; all prompts have them. Of a checkpoint that reads images.
            image_guidance_scale: of the images alone; `guidance_scale` is then the prompt's.
            rewrite: system prompt under which the language model rewrites the prompts; False takes them as
                they are; None leaves it to the checkpoint's habit.
            negative_prompt: what guidance leads away from, one for all or one for each prompt, in the place
                of the empty prompt; it has no images and is not rewritten.
            prompt_embeds: features of the prompts in their place, as the `prompt_features` stage computes
                them; of a checkpoint whose method reads such a column.
            negative_prompt_embeds: the same of negative prompts.
            height, width: of the images in px; the model has one size.
            return_dict: False returns a tuple, `(images,)`.
            callback_on_step_end_tensor_inputs: what the callback is given; there are only `latents`.

        Raises:
            ValueError: no prompt, as many generators or latents as there are no images, or a bad number.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        self._check_size(height, width)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)}: expected of "
                f"{list(self._callback_tensor_inputs)}"
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale {guidance_scale}: expected a finite number")
        images = all_pixels(image)
        asked = self._asked("prompt", prompt, prompt_embeds, images, rewrite)
        if not asked or num_images_per_prompt < 1:
            raise ValueError(
                f"{len(asked)} prompts, {num_images_per_prompt} images of each; expected at least 1"
            )
        requests = repeated(asked, num_images_per_prompt)
        against = self._against(len(asked), negative_prompt, negative_prompt_embeds)
        self._sampler = SamplerConfig(
            num_steps=num_inference_steps,
            solver=solver or self.scheduler.solver,
            guidance_scale=max(guidance_scale, 1),
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
            precision=self.precision,
        )
        noise = self._noise(len(requests), generator) if latents is None else latents
        self._interrupt = False
        negatives = None if against is None else repeated(against, num_images_per_prompt)
        with self._at_home(self.model), self.progress_bar(num_inference_steps) as bar:
            on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs, bar)
            made = self._made(requests, noise, on_step, negatives)
        found = made if output_type == "latent" else self._decoded(made, noise, output_type)
        return RepFusionPipelineOutput(found) if return_dict else (found,)

    def _made(
        self,
        requests: Sequence[Request],
        noise: Tensor,
        on_step: OnStep,
        negatives: Sequence[Request] | None,
    ) -> Tensor:
        """Latents, or codes, of requests."""
        if isinstance(self.model, TextToImage):
            return sample(self.model, requests, noise, self._sampler, on_step, negatives)

        def on_codes(step: int, codes: Tensor) -> bool:
            changed, is_last = on_step(step, 1 - (step + 1) / self._sampler.num_steps, codes)
            if changed is not codes:
                raise ValueError("callback_on_step_end returned latents; those of a model of codes stay")
            return is_last

        return self.model.draw(requests, noise, self._sampler, negatives, on_codes)

    def _decoded(
        self, made: Tensor, noise: Tensor, output_type: str
    ) -> list[Image.Image] | np.ndarray | Tensor:
        with self._at_home(self.decoder):
            if isinstance(self.model, TextToImage):
                assert not isinstance(self.decoder, ImageTokenizer)
                pixels = decode(self.model, self.decoder, made, noise)
            else:
                pixels = decode_codes(self.decoder, made)
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return pixels.movedim(1, -1).numpy()
        return [Image.fromarray(array) for array in to_uint8(pixels)]

    def _check_size(self, height: int | None, width: int | None) -> None:
        side = self.decoder.image_size
        for name, value in (("height", height), ("width", width)):
            if value not in (None, side):
                raise ValueError(f"{name} {value}: this model draws {side} x {side} px alone")

    def _asked(
        self,
        name: str,
        prompts: str | Sequence[str] | None,
        embeds: Embeddings | None,
        images: tuple[Any, ...] = (),
        rewrite: str | Literal[False] | None = False,
    ) -> list[Request]:
        """One request for each prompt, or for each row of embeddings."""
        if prompts is not None and embeds is not None:
            raise ValueError(f"both {name} and {name}_embeds; expected one of them")
        if embeds is None:
            texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
            if said := unread(self.model.captions.folder, texts):
                log.warning("%s", said)
            return [Request(text, images, rewrite) for text in texts]
        config = self.model.config
        if PROMPT_FEATURES not in config.columns:
            raise ValueError(
                f"{name}_embeds: {config.label} reads a prompt anew at every step, with what is drawn so "
                f"far; pass {name}"
            )
        return [Request("", images, rewrite, {PROMPT_FEATURES: row}) for row in embeds]

    def _against(
        self, num_prompts: int, negative: str | list[str] | None, embeds: Embeddings | None
    ) -> list[Request] | None:
        """What guidance leads away from, for each prompt; None is the empty prompt."""
        if negative is None and embeds is None:
            return None
        found = self._asked("negative_prompt", negative, embeds)
        if isinstance(negative, str):
            return found * num_prompts
        if len(found) != num_prompts:
            raise ValueError(
                f"{len(found)} negative prompts for {num_prompts} prompts; expected one for each"
            )
        return found

    def _noise(self, num_images: int, generator: Noise) -> Float[Tensor, "b n d"]:
        if not isinstance(generator, list):
            generators: list[torch.Generator | None] = [generator] * num_images
        elif len(generator) == num_images:
            generators = [*generator]
        else:
            raise ValueError(f"{len(generator)} generators for {num_images} images; expected one for each")
        shape = noise_shape(self.model, self._sampler)
        rows = (
            torch.randn(shape, generator=one, device="cpu" if one is None else one.device)
            for one in generators
        )
        return torch.stack([row.to(self.device) for row in rows])

    def _on_step(self, callback: StepEnd | None, names: Sequence[str], bar: tqdm) -> OnStep:
        def on_step(step: int, level: float, z: Tensor) -> tuple[Tensor, bool]:
            given = {"latents": z} if "latents" in names else {}
            changed = None if callback is None else callback(self, step, level, given)
            bar.update()
            return z if changed is None else changed.get("latents", z), self._interrupt

        return on_step


def repeated(requests: Sequence[Request], number: int) -> list[Request]:
    """Each request so many times, one after the other."""
    return [one for one in requests for _ in range(number)]


def one_of(name: str, first: Any, second: Any) -> Any:
    """The one that is given, or None. ValueError where both are, and differ."""
    if first is not None and second is not None and first != second:
        raise ValueError(f"two values of {name}, {first} and {second}; expected one")
    return second if first is None else first


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError where weights cannot be held in a dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected torch.float32 or torch.bfloat16")
