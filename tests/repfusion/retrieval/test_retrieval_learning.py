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
    """The conditioner alone: the DiT takes no part in retrieval. The few rows learn faster than the rest."""
    conditioner = model.conditioner
    others = [one for one in conditioner.parameters() if one.requires_grad and one is not conditioner.rows]
    groups = [{"params": others}, {"params": [conditioner.rows], "lr": 5e-2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        rows = torch.randperm(len(pairs), generator=generator)[:32]
        requests = [Request(pairs[row].caption) for row in rows.tolist()]
        inputs = conditioner.collate(requests, ["full"] * len(rows), rows.tolist())
        losses = conditioner.losses(inputs, latents[rows])
        optimizer.zero_grad()
        torch.stack([one.mean() for one in losses.values()]).sum().backward()
        optimizer.step()


def called(reader: GillReader, texts: list[str]) -> float:
    """Share of texts after which the model at once calls for an image."""
    found = []
    for text in texts:
        conversation = Conversation(reader)
        conversation.say(text, "text")
        found.append(conversation.speak(SpeakingConfig(max_tokens=0), torch.Generator()).ending == "image")
    return sum(found) / len(found)


@pytest.mark.slow
def test_held_out_captions_find_their_images_and_call_for_one(tmp_path: Path):
    """After 60 steps: recall far above chance and above what it was, an image where a caption is whole, and
    none after its first half.
    """
    pairs = draw_pairs(RecallConfig(num=240, split="train", world=WORLD), 64)
    features = features_of(pairs)
    model = make_gill(WEIGHTS, LatentStatistics.of(features), 96, width=32, retrieval_width=64)
    config = RecallConfig(num=60, world=WORLD)
    first = measure_recall(GillReader(save_gill(tmp_path / "first", model), torch.device("cpu")), config)
    train(model, pairs, model.normalise(features), num_steps=60)
    reader = GillReader(save_gill(tmp_path / "last", model), torch.device("cpu"))
    last = measure_recall(reader, config)
    for way in ("text_to_image", "image_to_text"):
        assert last[way]["recall@5"] > 4 * last["chance"]["recall@5"]
        assert last[way]["recall@5"] > 2 * first[way]["recall@5"]
    assert last["right"]["first"] > 4 * last["right"]["chance"]
    whole = [pair.caption for pair in draw_pairs(RecallConfig(num=16, world=WORLD), 64)]
    halves = [text[: len(text) // 2].rpartition(" ")[0] for text in whole]
    shares = called(reader, whole), called(reader, halves)
    assert shares[0] > 0.6 and shares[1] < 0.3, shares
