"""Small folders of the models that judge images, of transformers' real classes with random weights, and a
LLaVA that always says one word.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tiny_vlms import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

LABELS = ("bench", "dog", "sofa", "mouse")
"""Classes of the tiny Mask2Former, some by other names than GenEval's."""


def tiny_swin(**changes) -> transformers.SwinConfig:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "window_size": 4}
    heads = {"num_heads": [1, 1, 2, 2], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    return transformers.SwinConfig(**{**sizes, **heads, **changes})


def save_mask2former(to: Path, labels: Sequence[str] = LABELS) -> Path:
    torch.manual_seed(1)
    config = transformers.Mask2FormerConfig(
        backbone_config=tiny_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)  # random weights alone find everything alike
    model.save_pretrained(to)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(to)
    return to


def clip_tokenizer() -> PreTrainedTokenizerFast:
    special = [
        "<pad>",
        "<s>",
        "<unused>",
        "</s>",
    ]  # with an end of number 2, CLIP looks for the largest number
    return byte_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_clip(to: Path) -> Path:
    torch.manual_seed(2)
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    named = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**sizes, **named, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(to)
    return to


def save_owlv2(to: Path) -> Path:
    torch.manual_seed(3)
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    named = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**sizes, **named, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(to)
    return to


def save_grounding_dino(to: Path) -> Path:
    torch.manual_seed(4)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", ".", "?", "bench", "dog", "hot", "wooden"]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    text = transformers.BertConfig(
        vocab_size=2000,  # delimiters have the numbers that BERT gives them
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=tiny_swin(out_features=["stage2", "stage3", "stage4"]),
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        max_text_len=32,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(to)
    return to


def save_always(to: Path, says: str) -> Path:
    """A LLaVA whose layers pass on what they read, whose words all look alike but for `says`, after which it
    ends: whatever it is asked, it says that.
    """
    torch.manual_seed(5)
    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "answer", ":", "yes", "no", "Yes", "No", "maybe"]
    words += [] if says in words else [says]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    text = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=600,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-2
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        (layer,) = model.model.language_model.layers
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
        embeddings.zero_()
        head.zero_()
        embeddings[:, 0] = 1.0
        embeddings[words.index(says), :2] = torch.tensor([0.0, 1.0])
        head[words.index(says), 0] = head[tokenizer.eos_token_id, 1] = 50.0
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(to)
    return to
