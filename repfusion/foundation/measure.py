"""The shipped weights -> their quality on held-out scenes, by the loading code that users run."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from repfusion.foundation.dialogues import DESCRIBE
from repfusion.foundation.perception import PIXEL_MEAN, PIXEL_STD, FoundationConfig
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.pretrained.weights import load_transformers
from repfusion.scenes.captions import ask, canonical_caption, possible_tasks, write_prompt
from repfusion.scenes.detector import score_image
from repfusion.scenes.world import Scene, WorldConfig, draw_scene, render

FIRST_SEED = 50_000_000


@torch.no_grad()
def measure(folder: Path, config: FoundationConfig, num_scenes: int = 600) -> dict[str, int | float]:
    """Over held-out scenes: caption exact match and answer accuracy of each LLaVA (`fluent_`, `large_`),
    reconstruction PSNR (dB) and detector agreement of both latent spaces (`vae_`).
    """
    world = WorldConfig(image_size=config.image_size)
    scenes = [draw_scene(FIRST_SEED + i, world, "held_out") for i in range(num_scenes)]
    pixels = torch.from_numpy(np.stack([render(scene, world) for scene in scenes]))
    found: dict[str, int | float] = {"held_out_scenes": num_scenes}
    for prefix, llava in (("", "llava"), ("fluent_", "llava_fluent"), ("large_", "llava_large")):
        scores = measure_llava(folder / llava, config, scenes, pixels)
        found |= {prefix + name: score for name, score in scores.items()}
    for prefix, encoder, decoder in (("", "vision_tower", "decoder"), ("vae_", "vae", "vae")):
        space = EncoderConfig(path=folder / encoder, image_size=config.image_size).load()
        rebuilt = load_decoder(folder / decoder, space.grid)(space(pixels)).clamp(0, 1)
        found |= {prefix + name: score for name, score in measure_images(rebuilt, scenes, pixels).items()}
    return found


def measure_llava(
    folder: Path, config: FoundationConfig, scenes: list[Scene], pixels: Float[Tensor, "b 3 h w"]
) -> dict[str, float]:
    rng = np.random.default_rng(0)
    questions, answers = zip(*(ask(scene, rng) for scene in scenes), strict=True)
    tokenizer = load_tokenizer(folder)
    llava = load_transformers(LlavaForConditionalGeneration, folder, "LLaVA")

    def said(texts: list[str]) -> list[str]:
        image = "<image>" * config.num_tokens
        batch = tokenizer(
            [f"{image} {text} answer:" for text in texts],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        batch.pop("token_type_ids", None)
        out = llava.generate(
            **batch,
            pixel_values=(pixels - PIXEL_MEAN) / PIXEL_STD,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    captions, replies = said([DESCRIBE] * len(scenes)), said(list(questions))
    return {
        "caption_exact_match": float(
            np.mean([a == canonical_caption(b) for a, b in zip(captions, scenes, strict=True)])
        ),
        "answer_accuracy": float(np.mean([a == b for a, b in zip(replies, answers, strict=True)])),
    }


def measure_images(
    rebuilt: Float[Tensor, "b 3 h w"], scenes: list[Scene], pixels: Float[Tensor, "b 3 h w"]
) -> dict[str, float]:
    mse = (rebuilt - pixels).square().mean(dim=(1, 2, 3))
    prompts = [write_prompt(scene, possible_tasks(scene)[-1]) for scene in scenes]
    agreement = [score_image(image.numpy(), prompt) for image, prompt in zip(rebuilt, prompts, strict=True)]
    return {
        "reconstruction_psnr": float((-10 * mse.log10()).mean()),
        "detector_agreement": float(np.mean(agreement)),
    }
