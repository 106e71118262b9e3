"""Detectors that are asked in words: OWLv2 (arXiv 2306.09683) and Grounding DINO (arXiv 2303.05499). Each box
counts for the likeliest of the classes that an image is asked for, without a mask.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repfusion.evaluation.judges.detections import Box, Detection
from repfusion.evaluation.judges.folders import processor_of
from repfusion.evaluation.judges.vocabulary import WHAT
from repfusion.evaluation.suites.base import Image
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.pretrained.weights import load_transformers

QUERY_TOKENS = 16
"""Tokens of a query to OWLv2, which is padded to so many."""
FLOOR = 0.05
"""Boxes that are less sure are left out: these detectors give one for every patch or query."""


class Owlv2Detector:
    """Asked `a photo of a CLASS`, one query a class."""

    def __init__(self, folder: Path, device: str):
        from transformers import Owlv2ForObjectDetection
        from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

        self.model = load_transformers(Owlv2ForObjectDetection, folder, WHAT).to(device)
        self.processor = processor_of(Owlv2ImageProcessorPil, folder, WHAT)
        self.tokenizer, self.device = load_tokenizer(folder), device

    @torch.no_grad()
    def __call__(self, image: Image, classes: Sequence[str]) -> dict[str, list[Detection]]:
        ids, mask = self._queries(classes)
        pixels = self.processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        found = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(self.device))
        side = max(image.shape[:2])  # the processor pads to a square, of which boxes are fractions
        return _by_class(found.logits[0].sigmoid(), found.pred_boxes[0], (side, side), image, classes)

    def _queries(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        plain = plain_ids(self.tokenizer, [f"a photo of a {name}" for name in classes])
        rows = [[begin, *row[: QUERY_TOKENS - 2], end] for row in plain]
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (QUERY_TOKENS - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, (torch.arange(QUERY_TOKENS, device=self.device) < lengths[:, None]).long()


class GroundingDinoDetector:
    """Asked with all classes at once, `CLASS. CLASS.`; a class is as likely as its likeliest token."""

    def __init__(self, folder: Path, device: str):
        from transformers import GroundingDinoForObjectDetection
        from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
            GroundingDinoImageProcessorPil,
        )

        self.model = load_transformers(GroundingDinoForObjectDetection, folder, WHAT).to(device)
        self.processor = processor_of(GroundingDinoImageProcessorPil, folder, WHAT)
        self.tokenizer, self.device = load_tokenizer(folder), device

    @torch.no_grad()
    def __call__(self, image: Image, classes: Sequence[str]) -> dict[str, list[Detection]]:
        ids, spans = self._asked(classes)
        pixels: Any = self.processor(image, input_data_format="channels_last", return_tensors="pt")
        found = self.model(input_ids=ids, **pixels.to(self.device))
        tokens = found.logits[0].sigmoid()
        likely = torch.stack([tokens[:, start:end].amax(1) for start, end in spans], dim=1)
        return _by_class(likely, found.pred_boxes[0], tuple(image.shape[:2]), image, classes)

    def _asked(self, classes: Sequence[str]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Token ids of the question, and where in it each class stands.

        Raises:
            ValueError: the question is longer than the detector reads.
        """
        words = plain_ids(self.tokenizer, [name.lower() for name in classes])
        (stop,) = plain_ids(self.tokenizer, ["."])
        ids, spans = [self.tokenizer.cls_token_id], []
        for word in words:
            spans.append((len(ids), len(ids) + len(word)))
            ids += [*word, *stop]
        ids.append(self.tokenizer.sep_token_id)
        if len(ids) > (most := self.model.config.max_text_len):
            raise ValueError(f"{len(classes)} classes take {len(ids)} tokens; the detector reads {most}")
        return torch.tensor([ids], device=self.device), spans


def _by_class(
    scores: Float[Tensor, "q c"],
    boxes: Float[Tensor, "q 4"],
    scale: tuple[int, ...],
    image: Image,
    classes: Sequence[str],
) -> dict[str, list[Detection]]:
    """Boxes, given by centre, width and height in fractions of `scale` (height, width), each with its
    likeliest class, the surest first.
    """
    best, labels = scores.max(1)
    by_class: dict[str, list[Detection]] = {name: [] for name in classes}
    for place in best.argsort(descending=True, stable=True).tolist():
        if float(best[place]) >= FLOOR:
            box = _corners(boxes[place].tolist(), scale, image.shape[:2])
            by_class[classes[int(labels[place])]].append(Detection(box, float(best[place])))
    return by_class


def _corners(box: Sequence[float], scale: tuple[int, ...], size: tuple[int, ...]) -> Box:
    x, y, width, height = box
    (rows, columns), (bottom, right) = scale, size
    return (
        min(max((x - width / 2) * columns, 0.0), right),
        min(max((y - height / 2) * rows, 0.0), bottom),
        min(max((x + width / 2) * columns, 0.0), right),
        min(max((y + height / 2) * rows, 0.0), bottom),
    )
