"""Mask2Former (arXiv 2112.01527) for instances: GenEval's detector, post-processed as MMDetection does it:
the 100 likeliest pairs of query and class, each scored by class times mask, each box around its mask.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from repfusion.evaluation.judges.detections import Box, Detection
from repfusion.evaluation.judges.folders import processor_of
from repfusion.evaluation.judges.vocabulary import WHAT, class_ids
from repfusion.evaluation.suites.base import Image
from repfusion.pretrained.weights import load_transformers

MAX_PER_IMAGE = 100
"""Pairs of query and class that are looked at in an image."""
EPSILON = 1e-6


class Mask2FormerDetector:
    """A detector of fixed classes, with masks."""

    def __init__(self, folder: Path, device: str):
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.models.mask2former.image_processing_pil_mask2former import (
            Mask2FormerImageProcessorPil,
        )

        self.model = load_transformers(Mask2FormerForUniversalSegmentation, folder, WHAT).to(device)
        self.processor = processor_of(Mask2FormerImageProcessorPil, folder, WHAT)
        self.ids, self.device = class_ids(folder), device

    @torch.no_grad()
    def __call__(self, image: Image, classes: Sequence[str]) -> dict[str, list[Detection]]:
        inputs = self.processor(image, input_data_format="channels_last", return_tensors="pt").to(self.device)
        found = self.model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        filled = inputs["pixel_mask"][0]
        size = int(filled.any(1).sum()), int(filled.any(0).sum())
        padded, whole = tuple(filled.shape), image.shape[:2]
        scores, labels, queries = _likeliest(found.class_queries_logits[0])
        wanted = {self.ids[name]: name for name in classes}
        by_class: dict[str, list[Detection]] = {name: [] for name in classes}
        for score, label, query in zip(scores.tolist(), labels.tolist(), queries.tolist(), strict=True):
            if label in wanted:
                logits = _at_image_size(found.masks_queries_logits[0, query], padded, size, whole)
                by_class[wanted[label]].append(_detection(score, logits))
        return {name: sorted(ones, key=lambda one: -one.score) for name, ones in by_class.items()}


def _likeliest(logits: Float[Tensor, "q c"]) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, class and query of the likeliest pairs; the last class, which means nothing, is none."""
    probabilities = logits.softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(min(MAX_PER_IMAGE, probabilities.numel()))
    return scores, places % probabilities.shape[1], places // probabilities.shape[1]


def _at_image_size(
    logits: Float[Tensor, "h w"], padded: tuple[int, ...], size: tuple[int, int], whole: tuple[int, ...]
) -> Float[Tensor, "h2 w2"]:
    """A mask's logits at the size of the padded input, its padding cut off, at the image's own size."""
    wide = interpolate(logits[None, None], padded, mode="bilinear", align_corners=False)
    return interpolate(wide[..., : size[0], : size[1]], whole, mode="bilinear", align_corners=False)[0, 0]


def _detection(probability: float, logits: Float[Tensor, "h w"]) -> Detection:
    """Class probability times the mean of the mask's own probability where it is above a half."""
    mask = logits > 0
    certainty = (logits.sigmoid() * mask).sum() / (mask.sum() + EPSILON)
    return Detection(_around(mask), probability * float(certainty), mask.cpu().numpy())


def _around(mask: Bool[Tensor, "h w"]) -> Box:
    """The box of a mask; of an empty one, no pixel."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
