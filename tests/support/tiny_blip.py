"""A small folder of a BLIP that answers questions, of transformers' real class with random weights."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no", "?", "a", "red", "dog", "blue", "bench")
BEGIN, ASK = len(WORDS), len(WORDS) + 1
"""Numbers of the tokens that begin an answer and a question, which BLIP adds to BERT's."""


def save_blip(to: Path, vocab_size: int = ASK + 1) -> Path:
    """One whose weights are large enough for its answers to differ."""
    torch.manual_seed(5)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **named).save_pretrained(to)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": vocab_size,
        "encoder_hidden_size": 16,
        "bos_token_id": BEGIN,
        "pad_token_id": 0,
        "sep_token_id": 3,
        "eos_token_id": 3,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = transformers.BlipForQuestionAnswering(
        transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(to)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(to)
    return to
