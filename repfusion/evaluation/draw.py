"""A checkpoint and items of suites -> images, a batch at a time. The checkpoint is loaded at the first."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repfusion.conditioning.lap import drop_taps
from repfusion.evaluation.columns import asked
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.base import Item
from repfusion.files import digest_of
from repfusion.generate import AnyDecoder, Drawer, flow_alone, generate, to_uint8
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.completion import check_complete, read_complete
from repfusion.runs.folder import AVERAGES, CONFIG, STATISTICS, WEIGHTS_FILE

Run = Callable[[Callable[[], Any]], Any]
"""Calls a piece of work, here or in a thread of its choice."""


class Drawing:
    """Draws what suites ask for, from one checkpoint."""

    def __init__(self, checkpoint: Path, config: EvaluationConfig, run: Run):
        self.checkpoint, self.config, self.run = checkpoint, config, run
        self._loaded: tuple[Drawer, AnyDecoder] | None = None
        self._weights: dict[str, str] | None = None

    @property
    def device(self) -> str:
        return self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def identity(self, items: Sequence[Item]) -> dict[str, Any]:
        """What decides the images of items; neither batch size nor device nor speed do."""
        if self._weights is None:
            self._weights = self.run(self._digests)
        config = self.config
        return {
            "weights": self._weights,
            "seed": config.seed,
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

    def __call__(self, items: Sequence[Item]) -> UInt8[np.ndarray, "n h w 3"]:
        """Images of all items, each item's outputs beside each other. The noise of image i is that of
        seed + i.
        """
        if self._loaded is None:
            self._loaded = self.run(self._load)
        requests = [item.request for item in items for _ in range(item.num_outputs)]
        # before hours of others: a prompt that does not fit
        assert self._loaded is not None
        self._loaded[0].captions.check_lengths([request.prompt for request in requests])
        return np.concatenate([to_uint8(batch) for batch in self._batches(requests)])

    def _batches(self, requests: Sequence[Request]) -> Iterator[Float[Tensor, "b 3 h w"]]:
        assert self._loaded is not None
        config, size = self.config, self.config.batch_size
        for start in range(0, len(requests), size):
            part, seed = requests[start : start + size], config.seed + start
            yield self.run(partial(generate, *self._loaded, part, seed, config.sampler, size))

    def _load(self) -> tuple[Drawer, AnyDecoder]:
        is_checked = self._weights is not None
        model = load_drawer(self.checkpoint, self.config.use_ema, is_checked).to(self.device)
        if self.config.dropped_taps:
            drop_taps(flow_alone(model, "dropped_taps").conditioner, self.config.dropped_taps)
        if self.config.fast:
            flow_alone(model, "fast").speed_up_sampling(self.config.sampler.precision)
        return model, model.load_decoder()


def per_item(images: UInt8[np.ndarray, "n h w 3"], items: Sequence[Item]) -> list[list[np.ndarray]]:
    """The images of each item.

    Raises:
        ValueError: where there are not as many as the items ask for.
    """
    ends = np.cumsum([item.num_outputs for item in items])
    if not len(ends) or ends[-1] != len(images):
        raise ValueError(f"{len(images)} images; {len(items)} items ask for {ends[-1] if len(ends) else 0}")
    return [list(part) for part in np.split(images, ends[:-1])]
