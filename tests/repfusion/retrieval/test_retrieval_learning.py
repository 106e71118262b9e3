"""GILL trained for a minute on scenes: held-out captions find their images, a text calls for its image."""

from typing import Any

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


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], GillReader]:
    """Recall before any step, and the checkpoint after 60."""
    folder = tmp_path_factory.mktemp("gill")
    pairs = draw_pairs(RecallConfig(num=240, split="train", world=WORLD), 64)
    features = features_of(pairs)
    model = make_gill(WEIGHTS, LatentStatistics.of(features), 96, width=32, retrieval_width=64)
    first = GillReader(save_gill(folder / "first", model), torch.device("cpu"))
    before = measure_recall(first, RecallConfig(num=60, world=WORLD))
    train(model, pairs, model.normalise(features), num_steps=60)
    return before, GillReader(save_gill(folder / "last", model), torch.device("cpu"))


@pytest.mark.slow
def test_held_out_captions_find_their_images(learned):
    """Recall is far above chance, and above what it was."""
    before, reader = learned
    last = measure_recall(reader, RecallConfig(num=60, world=WORLD))
    for way in ("text_to_image", "image_to_text"):
        assert last[way]["recall@5"] > 4 * last["chance"]["recall@5"]
        assert last[way]["recall@5"] > 2 * before[way]["recall@5"]
    assert last["right"]["first"] > 4 * last["right"]["chance"]


@pytest.mark.slow
def test_a_whole_caption_calls_for_an_image_and_half_of_it_does_not(learned):
    _, reader = learned
    whole = [pair.caption for pair in draw_pairs(RecallConfig(num=16, world=WORLD), 64)]
    halves = [text[: len(text) // 2].rpartition(" ")[0] for text in whole]
    shares = called(reader, whole), called(reader, halves)
    assert shares[0] >= 0.4 and shares[1] <= 0.1, shares
