"""Omni-Video against slow references: head, patches, order of contexts, alignment; and a training."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from slow_layers import rms
from tiny_clips import CHANNELS, GRID, TOKENS, clip_model, clip_training, make_clip_columns
from tiny_video import tiny_video_vae

from repfusion.conditioning.related.omni_video import (
    REFERENCE,
    SOURCE,
    TARGET,
    LatentPatches,
    OmniVideoConditioner,
    OmniVideoConfig,
    VisionHead,
)
from repfusion.llm.load import load_language_model
from repfusion.request import Request
from repfusion.train import train

SIZES: dict[str, Any] = {
    "num_visual": 2,
    "vision_width": 6,
    "num_adapted": 3,
    "depth": 1,
    "width": 8,
    "patch": 2,
    "source": True,
    "reference": True,
}
CONFIG = OmniVideoConfig(**SIZES)


def softmaxed(query: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([query @ key / len(query) ** 0.5 for key in keys]).softmax(0)


def attended(attention: Any, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Of tokens [q c] to a memory [m c], head by head."""
    heads, rows = attention.num_heads, []
    keys, values = attention.key_value(memory).chunk(2, dim=1)
    for token in attention.query(x):
        parts = []
        for query, key, value in zip(
            token.chunk(heads), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True
        ):
            query = rms(query, attention.query_norm.weight)
            weights = softmaxed(query, [rms(one, attention.key_norm.weight) for one in key])
            parts.append(weights @ value)
        rows.append(attention.out(torch.cat(parts)))
    return torch.stack(rows)


def test_the_head_reads_real_states_alone_by_queries():
    torch.manual_seed(0)
    head = VisionHead(10, CONFIG).double()
    states, mask = torch.randn(2, 5, 10, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    with torch.no_grad():
        found = head(states, mask)
        for row, real, visual in zip(states, mask, found, strict=True):
            block, x, memory = head.blocks[0], head.queries, head.enter(row[real])
            seen = rms(x, block.among.attention_norm.weight)
            x = x + attended(block.among.attention, seen, seen)
            x = x + attended(block.memory_attention, rms(x, block.memory_norm.weight), memory)
            x = x + block.among.mlp(rms(x, block.among.mlp_norm.weight)[None])[0]
            torch.testing.assert_close(visual, head.leave(rms(x, head.norm.weight)), rtol=1e-5, atol=1e-5)


def test_a_patch_is_of_one_frame_and_stands_left_of_the_latents():
    torch.manual_seed(0)
    patches = LatentPatches(CHANNELS, GRID, CONFIG)
    features = torch.randn(1, TOKENS, CHANNELS)
    with torch.no_grad():
        found = patches(features)[0]
        latent = features[0].unflatten(0, GRID)
        kernel = patches.embed.weight[:, :, 0]
        for number, (frame, row, column) in enumerate(patches.places(1).tolist()):
            column += 8  # the second image, each four columns wide
            window = latent[frame, row : row + 2, column : column + 2]
            expected = torch.einsum("wdrc,rcd->w", kernel, window) + patches.embed.bias
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    assert len(found) == 12
    with pytest.raises(ValueError, match="4 x 4 rows and columns of latents are no multiple"):
        LatentPatches(CHANNELS, GRID, CONFIG.model_copy(update={"patch": 3}))


def test_contexts_are_source_reference_adapter_and_text_and_what_is_missing_is_not_seen(foundation):
    torch.manual_seed(0)
    conditioner = OmniVideoConditioner(load_language_model(foundation / "llava"), CHANNELS, GRID, CONFIG)
    source, reference = torch.randn(TOKENS, CHANNELS), torch.randn(16, CHANNELS)
    target = torch.randn(2, 6)
    computed = {SOURCE: source, REFERENCE: reference, TARGET: target}
    requests = [
        Request("a red circle", computed=computed),
        Request("two blue"),
        Request("a", computed=computed),
    ]
    inputs = conditioner.collate(requests, ["full", "full", "none"], range(3))
    with torch.no_grad():
        (context,) = conditioner.prepare(inputs).static
        states = conditioner.llm.read(inputs["prefix"])
        visual = conditioner.head(states, inputs["prefix"].mask)
        parts = [
            conditioner.patches[SOURCE](source[None])[0],
            conditioner.patches[REFERENCE](reference[None])[0],
        ]
        parts += [conditioner.adapter(visual)[0], conditioner.text(states)[0]]
        losses = conditioner.losses(inputs, torch.empty(3, TOKENS, CHANNELS))["align"]
    torch.testing.assert_close(context.tokens[0], torch.cat(parts))
    assert [len(part) for part in parts[:3]] == [12, 4, 6]
    assert context.mask is not None and context.positions is not None
    assert (
        context.mask[:, :12].all(1).tolist() == context.mask[:, 12:16].all(1).tolist() == [True, False, False]
    )
    assert not context.mask[1:, :16].any() and context.mask[:, 16:22].all()
    torch.testing.assert_close(context.mask[:, 22:], inputs["prefix"].mask)
    text = context.positions[0, 22:][inputs["prefix"].mask[0]]
    assert text.tolist() == [[6 + k] * 3 for k in range(len(text))]
    cosines = [visual[0, k] @ target[k] / (visual[0, k].norm() * target[k].norm()) for k in range(2)]
    assert losses[0].item() == pytest.approx(1 - sum(map(float, cosines)) / 2, abs=1e-5)
    assert losses[1:].tolist() == [0, 0]
    wrong = replace(requests[0], computed={SOURCE: reference})
    with pytest.raises(ValueError, match=r"source_features of \(16, 4\), the model takes \(48, 4\)"):
        conditioner.collate([wrong], ["full"])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"interface": "in_context"}, {"has_head": False}])
def test_a_training_learns_clips_and_aligns_visual_tokens(foundation, tmp_path, changes):
    shapes = {SOURCE: (TOKENS, CHANNELS), REFERENCE: (16, CHANNELS), TARGET: (2, 6)}
    columns = make_clip_columns(tmp_path / "columns", others=shapes)
    config = clip_model(
        tiny_video_vae(tmp_path / "vae"), foundation / "llava", {"method": "omni_video", **SIZES, **changes}
    )
    reports = []
    train(clip_training(tmp_path / "run", config, columns, num_steps=60), on_report=reports.append)
    names = ["loss"] if "has_head" in changes else ["loss", "align_loss"]
    for name in names:
        values = [report.metrics()[f"train/{name}"] for report in reports]
        assert np.mean(values[-10:]) < 0.8 * np.mean(values[:5])
