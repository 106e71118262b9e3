"""Scenes -> token ids for perception pretraining: descriptions, questions and claims about an image, and
captions alone.

The image stands before or after the question, as in LLaVA's first stage; in a claim it always follows, which
is the order in which RepFusion lets the language model read: prompt first, visual tokens after.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from repfusion.scenes.captions import ask, canonical_caption, caption_scene, claim
from repfusion.scenes.world import Scene, draw_scene

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
IGNORED = -100
DESCRIBE = "describe the image"


def write_dialogue(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question that contains `<image>`, and its answer."""
    kind = rng.random()
    if kind < 0.4:
        text, is_true = claim(scene, rng)
        return f"{text} <image>", "yes" if is_true else "no"
    question, answer = (DESCRIBE, canonical_caption(scene)) if kind < 0.7 else ask(scene, rng)
    question = f"<image> {question}" if rng.random() < 0.5 else f"{question} <image>"
    return f"{question} answer:", answer


def train_tokenizer(folder: Path, num_scenes: int = 5_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over captions and dialogues: any text has tokens, words of the world have one each."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(seed) for seed in range(num_scenes)]
    corpus = [
        " ".join([caption_scene(s, rng), *write_dialogue(s, rng)]).replace("<image>", "") for s in scenes
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=20,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    fast.model_max_length = 64
    fast.save_pretrained(folder)
    return fast


def encode_dialogues(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[tuple[str, str]], num_image_tokens: int
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Right-padded ids and labels; only answers and the end token are learned. `<image>` becomes
    `num_image_tokens` tokens.
    """
    rows = []
    for question, answer in dialogues:
        prompt = tokenizer(question.replace("<image>", "<image>" * num_image_tokens)).input_ids
        reply = [*tokenizer(" " + answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((prompt + reply, [IGNORED] * len(prompt) + reply))
    return _pad(rows, tokenizer.pad_token_id)


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Right-padded ids and labels of texts without an image; every token is learned."""
    rows = []
    for caption in captions:
        ids = [*tokenizer(caption).input_ids, tokenizer.eos_token_id]
        rows.append((ids, [IGNORED, *ids[1:]]))
    return _pad(rows, tokenizer.pad_token_id)


def _pad(
    rows: list[tuple[list[int], list[int]]], pad_id: int
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in rows])
    return ids, labels
