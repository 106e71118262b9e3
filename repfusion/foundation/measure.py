"""The shipped weights -> their quality on held-out scenes, by the loading code that users run."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from repfusion.foundation.dialogues import DESCRIBE
from repfusion.foundation.perception import PIXEL_MEAN, PIXEL_STD, FoundationConfig
from repfusion.rae.decoder import RAEDecoder
from repfusion.rae.encoder import RepresentationEncoder
from repfusion.scenes.captions import ask, describe, possible_tasks, write_prompt
from repfusion.scenes.detector import score_image
from repfusion.scenes.world import WorldConfig, draw_scene, render

FIRST_SEED = 50_000_000


def measure(folder: Path, config: FoundationConfig, num_scenes: int = 600) -> dict[str, float]:
    """Caption exact match, answer accuracy, reconstruction PSNR (dB) and detector agreement over held-out
    scenes.
    """
    world = WorldConfig(image_size=config.image_size)
    scenes = [draw_scene(FIRST_SEED + i, world, "held_out") for i in range(num_scenes)]
    pixels = torch.from_numpy(np.stack([render(scene, world) for scene in scenes]))
    rng = np.random.default_rng(0)
    questions, answers = zip(*(ask(scene, rng) for scene in scenes), strict=True)

    tokenizer = AutoTokenizer.from_pretrained(folder / "llava")
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32).eval()

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
        return [
            text.strip()
            for text in tokenizer.batch_decode(
                out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
        ]

    with torch.no_grad():
        captions = said([DESCRIBE] * num_scenes)
        replies = said(list(questions))
        features = RepresentationEncoder.from_pretrained(folder / "vision_tower")(pixels)
        rebuilt = RAEDecoder.from_pretrained(folder / "decoder")(features).clamp(0, 1)
    mse = (rebuilt - pixels).square().mean(dim=(1, 2, 3))
    prompts = [write_prompt(scene, possible_tasks(scene)[-1]) for scene in scenes]
    agreement = [score_image(image.numpy(), prompt) for image, prompt in zip(rebuilt, prompts, strict=True)]
    return {
        "held_out_scenes": num_scenes,
        "caption_exact_match": float(
            np.mean([a == describe(b) for a, b in zip(captions, scenes, strict=True)])
        ),
        "answer_accuracy": float(np.mean([a == b for a, b in zip(replies, answers, strict=True)])),
        "reconstruction_psnr": float((-10 * mse.log10()).mean()),
        "detector_agreement": float(np.mean(agreement)),
    }
