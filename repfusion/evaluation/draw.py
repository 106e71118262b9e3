"""A checkpoint and items of suites -> images, a batch at a time. The checkpoint is loaded at the first."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repfusion.conditioning.lap import drop_taps
from repfusion.evaluation.columns import asked
from repfusion.evaluation.parts import Run
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.base import Item
from repfusion.files import digest_of
from repfusion.generate import AnyDecoder, Drawer, flow_alone, generate, to_uint8
from repfusion.model.config import refuse_clips
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.completion import check_complete, read_complete
from repfusion.runs.folder import AVERAGES, CONFIG, STATISTICS, WEIGHTS_FILE


class Drawing:
    """Draws what suites ask for, from one checkpoint."""

    def __init__(self, checkpoint: Path, config: EvaluationConfig, run: Run):
        self.checkpoint, self.config, self.run = checkpoint, config, run
        self._loaded: tuple[Drawer, AnyDecoder] | None = None
        self._weights: dict[str, str] | None = None

    @property
    def device(self) -> str:
        return self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def identity(self, items: Sequence[Item], first: int = 0) -> dict[str, Any]:
        """What decides the images of items, the first of which is image `first` of all; neither batch size
        nor device nor speed do.
        """
        if self._weights is None:
            self._weights = self.run(self._digests)
        config = self.config
        return {
            "weights": self._weights,
            "seed": config.seed + first,
            "sampler": config.sampler.model_dump(mode="json"),
            "items": digest_of(asked(items)),
            **({"dropped_taps": list(config.dropped_taps)} if config.dropped_taps else {}),
        }

    def _digests(self) -> dict[str, str]:
        """sha256 of the files that decide the images, each compared with what is there."""
        trained = AVERAGES if self.config.use_ema else WEIGHTS_FILE
        there = read_complete(self.checkpoint)["files"]
        names = [CONFIG, trained, *([STATISTICS] if STATISTICS in there else [])]
        files = check_complete(self.checkpoint, names)["files"]
        return {name: files[name].sha256 for name in names}

    def check(self, items: Sequence[Item]) -> None:
        """Raises ValueError where a prompt of the items does not fit."""
        model, _ = self._model()
        model.captions.check_lengths([item.request.prompt for item in items])

    def __call__(self, items: Sequence[Item], first: int = 0) -> UInt8[np.ndarray, "n h w 3"]:
        """Images of items, each item's outputs beside each other. The noise of image i of them is that of
        seed + first + i.
        """
        requests = [item.request for item in items for _ in range(item.num_outputs)]
        return np.concatenate([to_uint8(batch) for batch in self._batches(requests, first)])

    def _batches(self, requests: Sequence[Request], first: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        config, size, model = self.config, self.config.batch_size, self._model()
        for start in range(0, len(requests), size):
            part, seed = requests[start : start + size], config.seed + first + start
            yield self.run(partial(generate, *model, part, seed, config.sampler, size))

    def _model(self) -> tuple[Drawer, AnyDecoder]:
        if self._loaded is None:
            self._loaded = self.run(self._load)
        assert self._loaded is not None
        return self._loaded

    def _load(self) -> tuple[Drawer, AnyDecoder]:
        is_checked = self._weights is not None
        model = load_drawer(self.checkpoint, self.config.use_ema, is_checked).to(self.device)
        refuse_clips(model.config, "an evaluation")
        if self.config.dropped_taps:
            drop_taps(flow_alone(model, "dropped_taps").conditioner, self.config.dropped_taps)
        if self.config.fast:
            flow_alone(model, "fast").speed_up_sampling(self.config.sampler.precision)
        return model, model.load_decoder()
