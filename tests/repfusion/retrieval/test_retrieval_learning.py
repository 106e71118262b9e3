"""GILL trained for a minute on scenes: held-out captions find their images, a text calls for its image."""

from pathlib import Path

import pytest
import torch
from tiny_gill import make_gill, save_gill

from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.retrieval.conversation import Conversation, SpeakingConfig
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.recall import Pair, RecallConfig, draw_pairs, measure_recall
from repfusion.scenes.world import BASE_COLOURS, BASE_SHAPES, WorldConfig
from repfusion.weights import WEIGHTS

WORLD = WorldConfig(shapes=BASE_SHAPES, colours=BASE_COLOURS, jitter=0)


def features_of(pairs: list[Pair]) -> torch.Tensor:
    encoder = EncoderConfig(path=WEIGHTS / "vision_tower").load()
    images = torch.stack([torch.from_numpy(pair.image) for pair in pairs])
    return torch.cat([encoder.encode_images(part).features for part in images.split(64)])


def train(model: TextToImage, pairs: list[Pair], latents: torch.Tensor, num_steps: int) -> None:
    """The conditioner alone: the DiT takes no part in retrieval."""
    conditioner = model.conditioner
    weights = [one for one in conditioner.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        rows = torch.randperm(len(pairs), generator=generator)[:32]
        requests = [Request(pairs[row].caption) for row in rows.tolist()]
        inputs = conditioner.collate(requests, ["full"] * len(rows), rows.tolist())
        losses = conditioner.losses(inputs, latents[rows])
        optimizer.zero_grad()
        torch.stack([one.mean() for one in losses.values()]).sum().backward()
        optimizer.step()


@pytest.mark.slow
def test_held_out_captions_find_their_images_and_texts_call_for_one(tmp_path: Path):
    """After 60 steps. At first recall is near chance and the text is not followed by an image."""
    pairs = draw_pairs(RecallConfig(num=240, split="train", world=WORLD), 64)
    features = features_of(pairs)
    model = make_gill(WEIGHTS, LatentStatistics.of(features), 96, width=32, retrieval_width=64)
    config = RecallConfig(num=60, world=WORLD)
    text, short = "a red circle", SpeakingConfig(max_tokens=3)

    def measured(name: str) -> tuple[float, float, str]:
        reader = GillReader(save_gill(tmp_path / name, model), torch.device("cpu"))
        conversation = Conversation(reader)
        conversation.say(text, "text")
        found = measure_recall(reader, config)
        ending = conversation.speak(short, torch.Generator()).ending
        print(found["num"], found["text_to_image"], found["image_to_text"], found["right"], ending)
        return found["text_to_image"]["recall@5"], found["chance"]["recall@5"], ending

    first, _, ending = measured("first")
    train(model, pairs, model.normalise(features), num_steps=60)
    last, chance, called = measured("last")
    assert last > 4 * chance and last > 2 * first
    assert (ending, called) != ("image", "image") and called == "image"
