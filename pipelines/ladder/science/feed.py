"""Seed and step -> what a model trains on in that step, drawn on the device.

All rows of a seed see the same scenes, captions, noise levels and dropped conditions, those of one latent
space the same noise. What a step sees follows from its number alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipelines.ladder.science.data import Captions, FeatureSpace
from pipelines.ladder.science.plan import SciencePlan
from repfusion.conditioning.captioning import CaptionBatch, CaptioningConfig
from repfusion.conditioning.text_embed import TextEmbedConditioner, encode_padded
from repfusion.diffusion.flow import shift_noise_level
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.model.text_to_image import TextToImage

BATCH = 512
"""Captions that a language model reads at once ahead of a training."""


class Feed:
    """The inputs of one model's training.

    Args:
        model: on the device, its weights as they train.
        space: the features that it denoises.
        captions: of the scenes.
        plan: batch size and share of dropped conditions.
    """

    def __init__(self, model: TextToImage, space: FeatureSpace, captions: Captions, plan: SciencePlan):
        self.model, self.space, self.plan, self.device = model, space, plan, model.device
        llm = model.conditioner.llm
        longest = max(map(len, captions.ids)) + 1
        assert longest <= llm.max_text_tokens, f"captions of {longest} tokens for {llm.max_text_tokens}"
        self.of_scene = captions.of_scene.to(self.device)
        self.prompts = prompts_of(captions, llm, self.device)
        self.states = None
        if isinstance(model.conditioner, TextEmbedConditioner):
            self.states = read_ahead(llm, self.prompts)
        self.captioning = model.config.captioning
        if self.captioning is not None:
            self.said = endings_of(captions, llm, self.device)

    def inputs(self, seed: int, step: int) -> Inputs:
        """Inputs of a step; nothing here waits for the device."""
        generator = torch.Generator(self.device).manual_seed(seed * 10_000_019 + step)
        size, options = self.plan.batch_size, {"generator": generator, "device": self.device}
        scenes = torch.randint(len(self.of_scene), (size,), **options)
        which = torch.randint(self.of_scene.shape[1], (size,), **options)
        t = shift_noise_level(torch.rand(size, **options), self.model.shift)
        is_dropped = torch.rand(size, **options) < self.plan.condition_dropout
        captions = self.of_scene[scenes, which]
        noise = torch.randn(size, *self.model.latent_shape, **options)
        request = self.request(torch.where(is_dropped, 0, captions))
        if self.captioning is not None:
            request["captions"] = self.caption_batch(captions, self.captioning)
        return {"request": request, "features": self.space.features[scenes], "t": t, "noise": noise}

    def request(self, captions: Int[Tensor, " b"]) -> Inputs:
        """What the model's conditioner makes of these captions, by their numbers."""
        if self.states is not None:
            return {"states": self.states[captions], "mask": self.prompts.mask[captions]}
        return {"prefix": Prefix(self.prompts.ids[captions], self.prompts.mask[captions])}

    def caption_batch(self, captions: Int[Tensor, " b"], config: CaptioningConfig) -> CaptionBatch:
        """The first samples, as many as the share asks for: samples are drawn at random, so which of them are
        captioned need not be.
        """
        num = max(1, round(config.share * len(captions)))
        rows = torch.arange(num, device=self.device)
        weights = torch.full((num,), config.weight * len(captions) / num, device=self.device)
        ids, mask = self.said
        return CaptionBatch(rows, weights, ids[captions[:num]], mask[captions[:num]])


def prompts_of(captions: Captions, llm: LanguageModel, device: torch.device) -> Prefix:
    """All captions as prompts: begin token first, padded on the left."""
    rows = [[llm.begin_id, *ids] for ids in captions.ids]
    width = max(map(len, rows))
    ids = torch.tensor([[llm.pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return Prefix(ids, torch.arange(width, device=device) >= width - lengths[:, None])


def endings_of(
    captions: Captions, llm: LanguageModel, device: torch.device
) -> tuple[Int[Tensor, "u m"], Bool[Tensor, "u m"]]:
    """All captions as they are said: end token last, padded on the right, and what is not padding."""
    rows = [[*ids, llm.end_id] for ids in captions.ids]
    width = max(map(len, rows))
    ids = torch.tensor([row + [llm.pad_id] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def read_ahead(llm: LanguageModel, prompts: Prefix) -> Float[Tensor, "u m c"]:
    """States of all captions, which no step changes."""
    return torch.cat(
        [
            encode_padded(llm, Prefix(ids, mask))
            for ids, mask in zip(prompts.ids.split(BATCH), prompts.mask.split(BATCH), strict=True)
        ]
    )
