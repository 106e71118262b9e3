"""Small folders of the models that see, of the real classes with random weights, and transformers' own
processor of each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.format import Chat
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import draw_scene

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURN = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' %}{{ 'IMAGE' }}
{%- elif content['type'] == 'text' %}{{ content['text'] }}{% endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""
"""ChatML, as the models' own templates write it."""
DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}"""
"""Qwen2.5-VL's template has a system prompt of its own."""
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}
{{ '<image>\\n' }}
{%- endfor -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"""
"""LLaVA-1.5's, which knows contents as lists alone."""
CONTEXT = 400


def byte_tokenizer(special: Sequence[str], **named: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on captions, in the style of Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    captions = [caption_scene(draw_scene(seed), rng) for seed in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    if begin := named.get("bos_token"):
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(special), **named)


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save(model: Any, tokenizer: PreTrainedTokenizerFast, processor: Any, template: str, to: Path) -> None:
    """What belongs into a folder. Random weights are spread, so that states differ from token to token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(to)
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(to)
    processor.save_pretrained(to)


def save_qwen2_5_vl(to: Path) -> None:
    torch.manual_seed(2)
    special = [*CHATML_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_sizes(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=32 * 32)
    template = DEFAULT_SYSTEM + TURN.replace("IMAGE", QWEN_IMAGE)
    save(transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor, template, to)


def save_qwen3_vl(to: Path) -> None:
    torch.manual_seed(3)
    special = [*CHATML_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen3VLConfig(
        text_config=text_sizes(tokenizer)
        | {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        size={"shortest_edge": 64, "longest_edge": 32 * 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = TURN.replace("IMAGE", QWEN_IMAGE)
    save(transformers.Qwen3VLForConditionalGeneration(config), tokenizer, processor, template, to)


def save_internvl(to: Path) -> None:
    torch.manual_seed(4)
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = [*CHATML_TOKENS, *marks.values()]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=marks,
    )
    config = transformers.InternVLConfig(
        text_config=text_sizes(tokenizer) | {"model_type": "qwen2"},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=5,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4)
    template = TURN.replace("'IMAGE'", "'<IMG_CONTEXT>\\n'")
    save(transformers.InternVLForConditionalGeneration(config), tokenizer, processor, template, to)


def save_llava(to: Path, template: str = LLAVA_TEMPLATE) -> None:
    torch.manual_seed(5)
    tokenizer = byte_tokenizer(
        ["<pad>", "<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text_sizes(tokenizer) | {"bos_token_id": 1}),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=8,
        ),
        image_token_index=3,
        vision_feature_layer=-2,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]
    )
    save(transformers.LlavaForConditionalGeneration(config), tokenizer, processor, template, to)


SAVES: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "internvl": save_internvl,
    "llava": save_llava,
}


def without_videos(processor_class: Any) -> Any:
    """A processor of transformers that does without a video processor, which needs torchvision."""
    free = {"check_argument_for_proper_class": lambda self, name, argument: None}
    return type(processor_class.__name__, (processor_class,), free)


def processor_of(family: str, folder: Path) -> Any:
    """transformers' own processor of a family, around what lies in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    named = {"chat_template": tokenizer.chat_template}
    match family:
        case "qwen2_5_vl" | "qwen3_vl":
            kind = transformers.Qwen3VLProcessor if family == "qwen3_vl" else transformers.Qwen2_5_VLProcessor
            images = Qwen2VLImageProcessorPil.from_dict(fields)
        case "internvl":
            kind, images = transformers.InternVLProcessor, GotOcr2ImageProcessorPil.from_dict(fields)
            named["image_seq_length"] = 4
        case _:
            kind, images = transformers.LlavaProcessor, CLIPImageProcessorPil.from_dict(fields)
            named |= {"patch_size": 8, "vision_feature_select_strategy": "default"}
            named["num_additional_image_tokens"] = 1
    return without_videos(kind)(images, tokenizer, **named)


def class_of(family: str) -> Any:
    """transformers' class of a family."""
    return {
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
        "internvl": transformers.InternVLForConditionalGeneration,
        "llava": transformers.LlavaForConditionalGeneration,
    }[family]


@dataclass(frozen=True)
class Seeing:
    """A folder, as the project and as transformers read it."""

    family: str
    folder: Path
    llm: LanguageModel
    whole: Any
    processor: Any

    def inputs(self, chats: list[Chat]) -> Any:
        """What transformers' own processor makes of chats."""
        texts = [
            self.processor.apply_chat_template(messages(chat), tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        images = [image for chat in chats for image in chat.images]
        return self.processor(images=images or None, text=texts, padding=True, return_tensors="pt")


def messages(chat: Chat) -> list[dict[str, Any]]:
    """A chat as transformers has it."""
    found = []
    if chat.system is not None:
        found.append({"role": "system", "content": [{"type": "text", "text": chat.system}]})
    asked = [{"type": "image"}] * len(chat.images) + [{"type": "text", "text": chat.instruction}]
    return [*found, {"role": "user", "content": asked}]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


CHATS = {
    "text": Chat("a red circle left of two squares"),
    "nothing": Chat(""),
    "system": Chat("a red circle", system="rewrite in full"),
    "image": Chat("make the circle blue", (picture(20, 33),)),
    "images": Chat("the circle of the first above", (picture(16, 16, 1), picture(40, 12, 2)), "be terse"),
}
"""With no, one and several images of several sizes, with and without a system prompt."""
