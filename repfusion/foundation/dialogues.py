"""Scenes -> token ids for perception pretraining: descriptions, questions, claims and edits of an image;
captions and rewritings of prompts alone.

There are two courses: first an image is mostly described and asked about, then mostly judged by. What a thing
is has to be seen before the colours of two things can be told from each other's.

The image stands before or after the question, as in LLaVA's first stage; after a claim it follows at once,
without a space, which is the order in which RepFusion lets the language model read: prompt first, visual
tokens after.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from repfusion.llm.words import WORDS, words_of
from repfusion.scenes.captions import canonical_caption, caption_scene
from repfusion.scenes.claims import KINDS, Kind, claim
from repfusion.scenes.edits import draw_edit
from repfusion.scenes.questions import ask, ask_what, ask_where
from repfusion.scenes.rewriting import draw_rewriting
from repfusion.scenes.world import Scene, WorldConfig, draw_scene

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
IGNORED = -100
DESCRIBE = "describe the image"
REWRITE = "rewrite"
ANSWER = "answer:"
"""Stands before what the language model is to say."""
EDIT_SHARE = 0.12
REWRITING_SHARE = 0.25
"""Share of the texts without an image that are rewritings; the others are captions."""
CLAIM_SHARE, DESCRIPTION_SHARE = 0.45, 0.25
RELATION_SHARE = 0.7
"""Share of the dialogues about a scene with a relation that are about the relation."""
RELATION_KINDS: tuple[Kind, ...] = ("direction", "axis", "swap")

LATER_SHARES = {"edit": 0.08, "description": 0.1, "question": 0.1, "relation": 0.1}
"""Shares of what is not a claim in the second course; a scene without a relation has claims in its place."""
LATER_KINDS: tuple[Kind, ...] = (*KINDS, "colour", "shape", "swap", "swap", "swap", "swap", "swap")
"""Kinds of claims in the second course, as often as they stand here; more than half of the pairs have no
swap, as training does not show what it would give.
"""


def write_dialogue(
    scene: Scene, rng: np.random.Generator, other: Scene, world: WorldConfig
) -> tuple[str, str]:
    """A question that contains `<image>`, and its answer; `other` is another scene, for claims of absence."""
    if rng.random() < EDIT_SHARE:
        edit = draw_edit(scene, rng, world)
        return _ask(edit.instruction, edit.described, rng)
    if scene.relation and rng.random() < RELATION_SHARE:
        return _about_the_relation(scene, rng, other)
    kind = rng.random()
    if kind < CLAIM_SHARE:
        return _claim(scene, rng, other, KINDS)
    if kind < CLAIM_SHARE + DESCRIPTION_SHARE:
        return _ask(DESCRIBE, canonical_caption(scene), rng)
    return _ask(*ask(scene, rng), rng)


def write_judgement(
    scene: Scene, rng: np.random.Generator, other: Scene, world: WorldConfig
) -> tuple[str, str]:
    """A dialogue of the second course, in which six of ten are claims; arguments as of `write_dialogue`."""
    shares = LATER_SHARES.values()
    chosen = rng.choice([*LATER_SHARES, "claim"], p=[*shares, 1 - sum(shares)])
    match chosen:
        case "edit":
            edit = draw_edit(scene, rng, world)
            return _ask(edit.instruction, edit.described, rng)
        case "description":
            return _ask(DESCRIBE, canonical_caption(scene), rng)
        case "question":
            return _ask(*ask(scene, rng), rng)
        case "relation" if scene.relation:
            return _ask(*(ask_where if rng.random() < 0.6 else ask_what)(scene, rng), rng)
    return _claim(scene, rng, other, LATER_KINDS)


def _about_the_relation(scene: Scene, rng: np.random.Generator, other: Scene) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.65:
        return _claim(scene, rng, other, RELATION_KINDS)
    return _ask(*(ask_where if kind < 0.85 else ask_what)(scene, rng), rng)


def _claim(scene: Scene, rng: np.random.Generator, other: Scene, kinds: tuple[Kind, ...]) -> tuple[str, str]:
    said = claim(scene, rng, other, kinds)
    return f"{said.text}<image>", "yes" if said.is_true else "no"


def _ask(question: str, answer: str, rng: np.random.Generator) -> tuple[str, str]:
    placed = f"<image> {question}" if rng.random() < 0.5 else f"{question}<image>"
    return f"{placed} {ANSWER}", answer


def write_text(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A text without an image in two halves, the second learned: nothing and a caption, or a terse prompt and
    its rewriting.
    """
    if rng.random() >= REWRITING_SHARE:
        return "", caption_scene(scene, rng)
    rewriting = draw_rewriting(scene, rng)
    return f"{REWRITE} {rewriting.terse} {ANSWER}", rewriting.plain


def train_tokenizer(folder: Path, num_scenes: int = 5_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over captions and dialogues: any text has tokens, words of the world have one each.

    Case and the punctuation at a word's end are left out, so that "A red circle." is "a red circle". Beside
    the tokenizer stands `words.txt`, the words of the texts.
    """
    corpus = list(_corpus(num_scenes))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[.,;:!?]+(?=\s|$)"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=5,
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
    words = sorted({word for text in corpus for word in words_of(text)})
    (folder / WORDS).write_text("\n".join(words) + "\n")
    return fast


def _corpus(num_scenes: int) -> Iterator[str]:
    """Captions and dialogues of the first scenes, each a text."""
    rng, world = np.random.default_rng(0), WorldConfig()
    scenes = [draw_scene(seed, world) for seed in range(num_scenes)]
    for scene in scenes:
        dialogue = write_dialogue(scene, rng, scenes[rng.integers(num_scenes)], world)
        for text in (*write_text(scene, rng), *dialogue):
            if '"' not in text:  # quoted words are no words of this world
                yield " ".join(text.replace("<image>", " ").split())


Tokens = tuple[list[int], int]
"""Ids of a text, the end token last, and the place from which on they are learned."""


def text_ids(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[tuple[str, str]], num_image_tokens: int = 0
) -> list[Tokens]:
    """Tokens of questions, or of nothing, with their answers, which alone are learned. `<image>` becomes
    `num_image_tokens` tokens.
    """
    image, end = "<image>" * num_image_tokens, cast(int, tokenizer.eos_token_id)
    asked = _ids(tokenizer, [question.replace("<image>", image) for question, _ in dialogues], True)
    said = _ids(tokenizer, [answer for _, answer in dialogues], False)
    return [([*a, *b, end], len(a)) for a, b in zip(asked, said, strict=True)]


def _ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=add_special_tokens).input_ids


def pad(rows: Sequence[Tokens], pad_id: int) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Right-padded ids, and labels that are `IGNORED` before each row's place and in the padding."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor(
        [[IGNORED] * start + ids[start:] + [IGNORED] * (width - len(ids)) for ids, start in rows]
    )
    return ids, labels
