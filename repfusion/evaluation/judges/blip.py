"""An image and noun phrases -> how likely a BLIP answers yes to each, of yes and no (T2I-CompBench, arXiv
2307.06350, section 4.1; BLIP, arXiv 2201.12086).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from repfusion.evaluation.judges.folders import processor_of
from repfusion.evaluation.suites.base import Image
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.pretrained.weights import load_transformers

WHAT = "BLIP"
MOST_TOKENS = 35
"""Tokens of a question, its first and last included."""
MOST_WORDS = 50
LEFT_OUT = re.compile(r'[.!"()*#:;~]')
"""Signs that a question is read without."""
DIGITS = 8
"""Decimals of a probability that are kept."""


class BlipJudge:
    """A BLIP that answers questions, in float32.

    Args:
        folder: of a BlipForQuestionAnswering, with its tokenizer and image processor.
        device: where it computes.
        image_size: side in px of the images that it sees, its positions interpolated; None is the folder's.

    Raises:
        ValueError: the folder is none, or its vocabulary lacks the token that begins a question.
    """

    def __init__(self, folder: Path, device: str, image_size: int | None = None):
        from transformers import BlipForQuestionAnswering
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        self.model = load_transformers(BlipForQuestionAnswering, folder, WHAT).to(device)
        self.processor = processor_of(BlipImageProcessorPil, folder, WHAT)
        if image_size is not None:
            self.processor.size = {"height": image_size, "width": image_size}
        self.tokenizer, self.device = load_tokenizer(folder), torch.device(device)
        text = self.model.config.text_config
        self.begin = text.bos_token_id
        # the two tokens that BLIP adds to BERT's: one begins an answer, the next a question
        self.ask = self.begin + 1
        if self.ask >= text.vocab_size:
            raise ValueError(
                f"{WHAT} folder {folder}: {text.vocab_size} words and an answer begins with number "
                f"{self.begin}; expected one more, with which a question begins"
            )
        (self.yes,), (self.no,) = plain_ids(self.tokenizer, ["yes", "no"])

    @torch.no_grad()
    def __call__(self, image: Image, phrases: Sequence[str]) -> list[float]:
        """The probability of yes, over that of yes and no, of each phrase as a question."""
        if not phrases:
            return []
        inputs = self.processor(image, input_data_format="channels_last", return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        seen = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)
        return [self._yes(seen.last_hidden_state, phrase) for phrase in phrases]

    def _yes(self, seen: Tensor, phrase: str) -> float:
        asked = self.model.text_encoder(
            input_ids=torch.tensor([self.ids_of(phrase)], device=self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        )
        states = asked.last_hidden_state
        said = self.model.text_decoder(
            input_ids=torch.tensor([[self.begin]], device=self.device),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=self.device),
        )
        likely = said.logits[0, 0].float().softmax(-1)
        yes, no = float(likely[self.yes]), float(likely[self.no])
        return round(yes / (yes + no), DIGITS)

    def ids_of(self, phrase: str) -> list[int]:
        """Tokens of a phrase as a question."""
        words = LEFT_OUT.sub("", f"{phrase}?".lower()).rstrip(" ").split(" ")[:MOST_WORDS]
        (ids,) = plain_ids(self.tokenizer, [" ".join(words)])
        return [self.ask, *ids[: MOST_TOKENS - 2], self.tokenizer.sep_token_id]
