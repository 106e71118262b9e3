"""What models of discrete codes have alike: their column, the folders that they name, how they are asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from repfusion.codes.column import CODES
from repfusion.codes.network import CodeStream
from repfusion.codes.tokenizer import ImageTokenizer, read_folder
from repfusion.config import WeightsFolder
from repfusion.data.dataset import Sample
from repfusion.data.readers import Reader, SampleArray
from repfusion.devices.placing import autocast_of
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.model.trainable import Trainable, TrainableConfig
from repfusion.request import Request

OnCodes = Callable[[int, Int[Tensor, "b n"]], bool]
"""(step from 0, what is there of the codes) -> whether it is the last."""
FLOW_ONLY = ("solver", "image_guidance_scale", "guidance_interval")
"""Fields of a sampler that only a flow has a use for."""


class CodeModelConfig(TrainableConfig):
    """A model of a tokenizer's codes."""

    tokenizer: WeightsFolder
    """Folder of the tokenizer whose codes it draws, or, in a workflow, stage:tokenizer."""

    @property
    def columns(self) -> Mapping[str, Reader]:
        return {CODES: SampleArray()}

    @cached_property
    def streams(self) -> list[CodeStream]:
        """The codes of an image. Raises ValueError where the tokenizer's folder is none."""
        return read_folder(self.tokenizer).network.streams


class CodeModel(Trainable):
    """Requests -> rows of codes, which the tokenizer's decoder makes pixels of."""

    config: CodeModelConfig
    streams: list[CodeStream]

    @property
    def num_codes(self) -> int:
        """Codes of an image."""
        return self.streams[-1].stop

    def noise_shape(self, config: SamplerConfig) -> tuple[int, int]:
        """Shape of the normal numbers that decide an image."""
        raise NotImplementedError

    def draw(
        self,
        requests: Sequence[Request],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        negatives: Sequence[Request] | None = None,
        on_step: OnCodes | None = None,
    ) -> Int[Tensor, "b n"]:
        """Codes of images of requests.

        Args:
            requests: one an image.
            noise: of `noise_shape`, one an image.
            config: steps and guidance.
            negatives: what guidance leads away from, one an image; None is no prompt at all.
            on_step: called after each step.

        Raises:
            ValueError: noise of another shape, a setting of flows alone, or a prompt that does not fit.
        """
        raise NotImplementedError

    def describe(
        self,
        codes: Int[Tensor, "b n"],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        beginnings: Sequence[str] | None = None,
    ) -> list[str]:
        """Captions of images, each from its beginning on where that is given.

        Raises:
            ValueError: noise of another shape than `noise_shape`, a setting of flows alone, or a beginning
                that does not fit.
        """
        raise NotImplementedError

    def load_decoder(self) -> ImageTokenizer:
        """The tokenizer, to decode, on the model's device."""
        return ImageTokenizer.from_pretrained(self.config.tokenizer).to(self.device)

    def stacked_codes(self, samples: Sequence[Sample]) -> Int[Tensor, "b n"]:
        """Codes of samples, int64, each within the codebook of its stream.

        Raises:
            ValueError: codes outside it, or of another number; the message names the sample.
        """
        arrays = [sample.read(CODES) for sample in samples]
        for sample, array in zip(samples, arrays, strict=True):
            assert array is not None
            self._check_codes(array, sample.place)
        return torch.from_numpy(np.stack([one for one in arrays if one is not None]).astype(np.int64))

    def _check_codes(self, codes: np.ndarray, place: str) -> None:
        if codes.shape != (self.num_codes,) or codes.dtype.kind != "i":
            raise ValueError(
                f"{place}: codes are {codes.shape} {codes.dtype}, expected integers of shape "
                f"({self.num_codes},): make the column '{CODES}' with the tokenizer {self.config.tokenizer}"
            )
        for stream in self.streams:
            own, last = codes[stream.places], stream.first_code + stream.num_codes - 1
            if own.min() < stream.first_code or own.max() > last:
                wrong = int(np.flatnonzero((own < stream.first_code) | (own > last))[0])
                raise ValueError(
                    f"{place}: code {own[wrong]} at place {stream.start + wrong} is outside the codebook; "
                    f"the {stream.name} codes are {stream.first_code} to {last}: make the column '{CODES}' "
                    f"with the tokenizer {self.config.tokenizer}"
                )


def refuse_flow_settings(config: SamplerConfig, label: str, *further: str) -> None:
    """Raises ValueError where a sampler asks for what only flows know, or for `further` of its fields."""
    plain = SamplerConfig()
    for name in (*FLOW_ONLY, *further):
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(
                f"{name} {getattr(config, name)}: {label} draws codes, which know nothing of it; leave it out"
            )


@contextmanager
def sampling(config: SamplerConfig, device: torch.device) -> Iterator[None]:
    """Attention and precision of sampling on a device, without gradients."""
    # the CPU's flash attention is slow on short sequences; the plain one is faster
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    is_bf16 = autocast_of(config.precision, device) == "bf16"
    with torch.no_grad(), attention, torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        yield
