"""Trained weights -> what each model perceives, reads and rebuilds, by the loading code that users run.

Perception is whether a claim is told right from wrong, by kind of fact: over facts that training shows, over
held-out ones, and over noisy latents by noise level as RepFusion's language model reads them. Chance is 0.5;
the language-only twin, which reads the claims without their images, says what the texts alone give away.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from repfusion.diffusion.flow import interpolate, shift_factor, shift_noise_level
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.dialogues import ANSWER, DESCRIBE, REWRITE, pad, text_ids
from repfusion.foundation.perception import PIXEL_MEAN, PIXEL_STD, read_dialogues, token_loss
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.pretrained.weights import load_transformers
from repfusion.scenes.captions import canonical_caption, caption_scene
from repfusion.scenes.claims import KINDS, Kind, claim
from repfusion.scenes.contrasts import Contrast, draw_contrast
from repfusion.scenes.detector import detect
from repfusion.scenes.edits import draw_edit
from repfusion.scenes.questions import ask
from repfusion.scenes.rewriting import draw_rewriting
from repfusion.scenes.world import Scene, WorldConfig, draw_scene, render

FIRST_SEED = 50_000_000
LLAVAS = ("llava", "llava_noise_taught", "llava_large")
UNSHIFTED_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.85)
"""Noise levels before the shift, at which perception is measured."""
BATCH = 200

Found = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """A text about an image, and whether it is right."""

    text: str
    scene: Scene
    is_true: bool
    kind: Kind


def measure(folder: Path, config: FoundationConfig, num: int = 200) -> Found:
    """Quality of the models in `folder`: `num` texts of each kind, and three times as many images."""
    bench = Bench(folder, config, num)
    found: Found = {name: bench.llava(name) for name in LLAVAS if (folder / name).is_dir()}
    found["language"] = bench.language()
    for name, encoder in (("decoder", "vision_tower"), ("vae", "vae")):
        if (folder / name).is_dir():
            found[name] = bench.images(folder / encoder, folder / name)
    return found


class Examples:
    """Texts about images, with what the encoder makes of the images; batches of them."""

    def __init__(self, told: Sequence[Told], pixels: Float[Tensor, "b 3 h w"], encoder: PixelEncoder):
        self.told, self.pixels = told, pixels
        self.features = encoded(encoder, pixels)

    def batches(self) -> Iterator["Examples"]:
        for start in range(0, len(self.told), BATCH):
            part = copy.copy(self)
            rows = slice(start, start + BATCH)
            part.told, part.pixels, part.features = self.told[rows], self.pixels[rows], self.features[rows]
            yield part


def encoded(encoder: PixelEncoder, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
    """Features, where the encoder's weights lie."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(part.to(device)) for part in pixels.split(BATCH)])


Judge = Callable[[Examples], Float[Tensor, " b"]]
"""How much a model prefers "yes" to "no" about each example."""


class Bench:
    """Held-out images, questions and claims, the same for every model."""

    def __init__(self, folder: Path, config: FoundationConfig, num: int):
        self.folder, self.config, self.device = folder, config, torch.device(config.device)
        self.world = WorldConfig(image_size=config.image_size)
        self.tokenizer = load_tokenizer(folder / "llava")
        self.scenes = [draw_scene(FIRST_SEED + i, self.world, "held_out") for i in range(3 * num)]
        rng = np.random.default_rng(0)
        self.captions = [caption_scene(scene, rng) for scene in self.scenes]
        self.questions = [ask(scene, rng) for scene in self.scenes]
        self.rewritings = [draw_rewriting(scene, rng) for scene in self.scenes]
        self.edits = [draw_edit(scene, rng, self.world, split="held_out") for scene in self.scenes]
        self.encoder = EncoderConfig(path=folder / "vision_tower", image_size=config.image_size).load()
        self.encoder.to(self.device)
        self.claims = self.examples(fresh_claims(self.world, num))
        self.contrasts = {
            "train": self.examples(contrasts(self.world, num, "train")),
            "held_out": self.examples(contrasts(self.world, num, "held_out")),
        }
        self.statistics = LatentStatistics.empty(config.num_tokens, config.vision_width)
        own = self.pixels([draw_scene(i, self.world) for i in range(5 * num)])
        self.statistics.update(encoded(self.encoder, own))

    def examples(self, told: Sequence[Told]) -> Examples:
        return Examples(told, self.pixels([one.scene for one in told]), self.encoder)

    def pixels(self, scenes: Sequence[Scene]) -> Float[Tensor, "b 3 h w"]:
        return torch.from_numpy(np.stack([render(scene, self.world) for scene in scenes]))

    @torch.no_grad()
    def llava(self, name: str) -> Found:
        """What a LLaVA tells right from wrong, answers and reads."""
        llava = load_transformers(LlavaForConditionalGeneration, self.folder / name, "LLaVA").eval()
        llava.to(self.device)
        found: Found = {"fresh": self.accuracy(self.claims, self._through_features(llava))}
        for split, told in self.contrasts.items():
            found[split] = self.accuracy(told, self._through_features(llava))
        found["own_tower"] = self.accuracy(self.contrasts["train"], self._through_own_tower(llava))
        found["by_noise_level"] = {
            f"{level:.3f}": self.accuracy(self.contrasts["train"], self._through_latents(llava, level))
            for level in self.levels()
        }
        asked = {
            "description": [(DESCRIBE, canonical_caption(scene)) for scene in self.scenes],
            "answer": self.questions,
            "edit": [(edit.instruction, edit.described) for edit in self.edits],
        }
        for name, pairs in asked.items():
            said = self.said(llava, [f"<image> {question}" for question, _ in pairs])
            found[f"{name}_exact_match"] = share(said, [answer for _, answer in pairs])
        rewritten = self.said(llava, [f"{REWRITE} {one.terse}" for one in self.rewritings])
        found["rewriting_exact_match"] = share(rewritten, [one.plain for one in self.rewritings])
        quoting = [(text, one) for text, one in zip(rewritten, self.rewritings, strict=True) if one.quoted]
        found["quotes_kept"] = share(
            [f'"{one.quoted}"' in text for text, one in quoting], [True] * len(quoting)
        )
        found["caption_loss"] = self.caption_loss(llava.model.language_model, llava.lm_head)
        return found

    @torch.no_grad()
    def language(self) -> Found:
        """What the twin makes of the claims without their images, and how well it reads."""
        twin = load_transformers(LlamaForCausalLM, self.folder / "language", "language model").eval()
        twin.to(self.device)

        def judge(part: Examples) -> Float[Tensor, " b"]:
            ids, places = self._claim_ids(part.told, 0)
            hidden = twin.model(input_ids=ids, use_cache=False).last_hidden_state
            return self._preference(twin.lm_head(hidden[torch.arange(len(ids)), places]))

        return {
            "fresh": self.accuracy(self.claims, judge),
            "caption_loss": self.caption_loss(twin.model, twin.lm_head),
        }

    @torch.no_grad()
    def images(self, encoder: Path, decoder: Path) -> Found:
        """PSNR (dB) of reconstructions, and the share of them in which the detector finds what is there."""
        space = EncoderConfig(path=encoder, image_size=self.config.image_size).load()
        decode, pixels = load_decoder(decoder, space.grid).to(self.device), self.pixels(self.scenes)
        parts = encoded(space.to(self.device), pixels).split(BATCH)
        rebuilt = torch.cat([decode(part).float().clamp(0, 1).cpu() for part in parts])
        mse = (rebuilt - pixels).square().mean(dim=(1, 2, 3))
        shown = [looks(detect(image.numpy())) for image in rebuilt]
        return {
            "psnr": round(float((-10 * mse.log10()).mean()), 2),
            "detector_agreement": share(shown, [looks(scene.things) for scene in self.scenes]),
        }

    def levels(self) -> list[float]:
        """Noise levels of the base's schedule at evenly spread places."""
        factor = shift_factor(self.config.num_tokens, self.config.vision_width, self.config.base_dim)
        return [float(shift_noise_level(torch.tensor(u), factor)) for u in UNSHIFTED_LEVELS]

    def accuracy(self, examples: Examples, judge: Judge) -> dict[str, float]:
        """Share of texts judged right, by kind: the mean over right and wrong ones."""
        told = examples.told
        prefers = torch.cat([judge(part) for part in examples.batches()]).cpu() > 0
        is_right = [bool(yes) == one.is_true for yes, one in zip(prefers, told, strict=True)]
        found = {}
        for kind in KINDS:
            by_truth = [
                [
                    right
                    for right, one in zip(is_right, told, strict=True)
                    if (one.kind, one.is_true) == (kind, x)
                ]
                for x in (True, False)
            ]
            if all(by_truth):
                found[kind] = round(float(np.mean([np.mean(half) for half in by_truth])), 3)
        return found

    def _claim_ids(self, told: Sequence[Told], num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Padded ids of claims with their image after them, and the places from which the answer is read."""
        asked = [(f"{one.text}<image>", "yes") for one in told]
        rows = text_ids(self.tokenizer, asked, num_image_tokens)
        ids, _ = pad(rows, self.tokenizer.pad_token_id)
        return ids.to(self.device), torch.tensor([start - 1 for _, start in rows], device=self.device)

    def _preference(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
        yes, no = (self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
        return (logits[:, yes] - logits[:, no]).float()

    def _judge(self, llava: Any, told: Sequence[Told], features: Tensor) -> Tensor:
        ids, places = self._claim_ids(told, self.config.num_tokens)
        hidden = read_dialogues(llava, features, ids)
        return self._preference(llava.lm_head(hidden[torch.arange(len(ids)), places]))

    def _through_features(self, llava: Any) -> Judge:
        return lambda part: self._judge(llava, part.told, part.features)

    def _through_latents(self, llava: Any, level: float) -> Judge:
        """A judge of noisy latents, as RepFusion reads them; P is exact on clean ones."""
        generator = torch.Generator().manual_seed(0)

        def judge(part: Examples) -> Tensor:
            latents = self.statistics.normalise(part.features)
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            z_t = interpolate(latents, noise, torch.full((len(latents),), level, device=self.device))
            return self._judge(llava, part.told, self.statistics.denormalise(z_t))

        return judge

    def _through_own_tower(self, llava: Any) -> Judge:
        """A judge from pixels, by transformers' own forward pass."""

        def judge(part: Examples) -> Tensor:
            ids, places = self._claim_ids(part.told, self.config.num_tokens)
            pixels = (part.pixels.to(self.device) - PIXEL_MEAN) / PIXEL_STD
            logits = llava(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            return self._preference(logits[torch.arange(len(ids)), places])

        return judge

    def said(self, llava: Any, questions: Sequence[str]) -> list[str]:
        """What a LLaVA answers, word for word; where `<image>` stands in a question, about the held-out image
        of its place.
        """
        image = "<image>" * self.config.num_tokens
        texts = [f"{question} {ANSWER}".replace("<image>", image) for question in questions]
        answers = []
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            batch = self.tokenizer(texts[part], return_tensors="pt", padding=True, padding_side="left")
            batch.pop("token_type_ids", None)
            batch = batch.to(self.device)
            if "<image>" in questions[start]:
                pixels = self.pixels(self.scenes[part]).to(self.device)
                batch["pixel_values"] = (pixels - PIXEL_MEAN) / PIXEL_STD
            out = llava.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=0)
            new = out[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return answers

    def caption_loss(self, language_model: Any, head: Any) -> float:
        """Cross-entropy a token of captions of the held-out scenes."""
        rows = text_ids(self.tokenizer, [("", caption) for caption in self.captions])
        ids, labels = (one.to(self.device) for one in pad(rows, self.tokenizer.pad_token_id))
        hidden = language_model(input_ids=ids, use_cache=False).last_hidden_state
        return round(float(token_loss(head, hidden, ids, labels >= 0)), 4)


def fresh_claims(world: WorldConfig, num: int) -> list[Told]:
    """Claims as training draws them, `num` of each kind, about scenes that it did not draw."""
    rng = np.random.default_rng(1)
    told: list[Told] = []
    for kind in KINDS:
        scenes: list[Scene] = []
        while len(scenes) < num:
            scene = draw_scene(int(rng.integers(2**40)), world)
            try:
                said = claim(scene, rng, draw_scene(int(rng.integers(2**40)), world), (kind,))
            except ValueError:
                continue  # the scene has no such fact
            scenes.append(scene)
            told.append(Told(said.text, scene, said.is_true, kind))
    return told


def contrasts(world: WorldConfig, num: int, split: Any) -> list[Told]:
    """Each text once with an image that bears it out and once with one that does not."""
    told: list[Told] = []
    for kind in KINDS:
        for i in range(num):
            one: Contrast = draw_contrast(FIRST_SEED + i, kind, world, split)
            told += [Told(one.text, one.right, True, kind), Told(one.text, one.wrong, False, kind)]
    return told


def looks(things: Sequence[Any]) -> list[tuple[str, str]]:
    return sorted((thing.colour, thing.shape) for thing in things)


def share(found: Sequence[object], expected: Sequence[object]) -> float:
    """Share of those found that are as expected."""
    return round(float(np.mean([one == other for one, other in zip(found, expected, strict=True)])), 3)
