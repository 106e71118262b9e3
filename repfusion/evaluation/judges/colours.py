"""Things in an image -> how alike each is to ten colours by CLIP, zero-shot (GenEval, arXiv 2310.11513): the
thing alone on grey, cut to its box.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from repfusion.evaluation.judges.detections import Detection
from repfusion.evaluation.judges.folders import processor_of
from repfusion.evaluation.suites.base import Image
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.pretrained.weights import load_transformers

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GREY = 0x99
"""What stands in the place of all that is not the thing."""
WHAT = "CLIP"
DIGITS = 6


class ColourJudge:
    """A CLIP (text and vision) that tells colours of things whose class is known."""

    def __init__(self, folder: Path, device: str):
        from transformers import CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.model = load_transformers(CLIPModel, folder, WHAT).to(device)
        self.processor = processor_of(CLIPImageProcessorPil, folder, WHAT)
        self.tokenizer, self.device = load_tokenizer(folder), device
        self.most = self.model.config.text_config.max_position_embeddings
        self.prototypes = cache(self._prototypes)

    @torch.no_grad()
    def __call__(self, image: Image, things: Sequence[Detection], name: str) -> list[list[float]]:
        """Cosines of each thing to the ten colours of the class `name`, in the order of COLOURS."""
        if not things:
            return []
        pictures = [cut_out(image, thing) for thing in things]
        inputs = self.processor(pictures, input_data_format="channels_last", return_tensors="pt")
        seen = self.model.get_image_features(inputs["pixel_values"].to(self.device)).pooler_output
        cosines = normalize(seen, dim=-1) @ self.prototypes(name).T
        return [[round(value, DIGITS) for value in row] for row in cosines.tolist()]

    @torch.no_grad()
    def _prototypes(self, name: str) -> Float[Tensor, "10 d"]:
        """The mean of the templates' texts for each colour, normalised before and after."""
        means = [self._read([one.format(colour, name) for one in TEMPLATES]).mean(0) for colour in COLOURS]
        return normalize(torch.stack(means), dim=-1)

    def _read(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[begin, *ids[: self.most - 2], end] for ids in plain_ids(self.tokenizer, texts)]
        # one at a time: texts of several lengths need no padding, and a class is read once
        read = [self.model.get_text_features(torch.tensor([row], device=self.device)) for row in rows]
        return normalize(torch.cat([one.pooler_output for one in read]), dim=-1)


def cut_out(image: Image, thing: Detection) -> Image:
    """The thing on grey where its mask is known, cut to its box, rounded, of at least a pixel a side."""
    if thing.mask is not None:
        image = np.where(thing.mask[..., None], image, np.uint8(GREY))
    height, width = image.shape[:2]
    left, top, right, bottom = (round(edge) for edge in thing.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]
