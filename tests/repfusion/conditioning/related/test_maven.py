"""Selection of reference tokens against a slow reference: ids of neighbouring tokens, scores under guidance
of ids and text, a share of each image, discrete tokens beside it; whole models of it that learn.
"""

from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_training import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repfusion.conditioning.base import Context
from repfusion.conditioning.related.maven import SelectionConfig
from repfusion.conditioning.unifusion import UniFusionConditioner, UniFusionConfig, kept
from repfusion.diffusion.flow import draw
from repfusion.flops.count import train_costs
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import read_chats
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint

SELECTION = {"share": 0.6, "num_discrete": 2, "num_codes": 50, "code_width": 4}
LAP = {"taps": (0, -1), "refiner_depth": 1}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


REQUESTS = [
    Request("two blue circle left of a green square", (picture(0), picture(1))),
    Request("a circle"),
    Request("a red circle", (picture(2),)),
    Request(),
]
BRANCHES = ["full", "full", "full", "none"]


def conditioner(foundation: Path, **fields) -> UniFusionConditioner:
    torch.manual_seed(0)
    llm = load_language_model(foundation / "llava", with_head=True, with_eyes=True)
    config = UniFusionConfig.model_validate({"lap": LAP, "selection": SELECTION, **fields})
    made = UniFusionConditioner(llm, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def contexts(made: UniFusionConditioner, requests=REQUESTS, branches=BRANCHES) -> tuple[Context, ...]:
    with torch.no_grad():
        return made.prepare(made.collate(requests, branches)).static


@torch.no_grad()
def slowly_selected(made: UniFusionConditioner, request: Request) -> tuple[list[int], list[float], list[int]]:
    """Places of a request's kept image tokens, their weights, and the ids of its images, one by one."""
    select = made.select
    assert select is not None
    batch = tokenise_chats(made.llm, [Chat(request.prompt, request.images)])
    shown, states = (one[0] for one in read_chats(made.llm, batch, (0, -1)))
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * select.norm.weight
    text = normed[batch.is_any(ChatPart.INSTRUCTION)[0]].mean(0)
    places, weights, ids = [], [], []
    for image in range(len(request.images)):
        own = (batch.image_of[0] == image).nonzero()[:, 0].tolist()
        found = []
        for group in range(2):
            mean = shown[[at for i, at in enumerate(own) if i * 2 // len(own) == group]].mean(0)
            mean = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            found.append(int((select.codes @ (mean @ select.projection)).argmax()))
        guide = select.embedding.weight[found].mean(0)
        scores = {at: float(select.score(torch.cat([normed[at], guide, text]))) for at in own}
        best = sorted(own, key=lambda at: -scores[at])[: ceil(0.6 * len(own))]
        places += sorted(best)
        weights += [2 / (1 + np.exp(-scores[at])) for at in sorted(best)]
        ids += found
    return places, weights, ids


def test_what_is_kept_equals_a_slow_reference(foundation):
    made = conditioner(foundation)
    (context,) = contexts(made)
    assert made.select is not None and context.mask is not None and context.positions is not None
    for row, request in enumerate(REQUESTS):
        batch = tokenise_chats(made.llm, [Chat(request.prompt, request.images)])
        places, weights, ids = slowly_selected(made, request) if request.images else ([], [], [])
        is_image = batch.is_any(ChatPart.IMAGE)[0]
        keep = kept(batch)[0] & ~is_image
        keep[places] = True
        with torch.no_grad():
            states = [one[:, keep] for one in read_chats(made.llm, batch, (0, -1))]
            pooled = made.lap(states, torch.ones(1, int(keep.sum()), dtype=torch.bool))[0]
            gates = torch.ones(len(is_image))
            gates[places] = torch.tensor(weights, dtype=torch.float32)
            expected = torch.cat([pooled * gates[keep][:, None], made.select.embedding.weight[ids]])
        got = context.tokens[row, context.mask[row]]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    first = context.positions[0, context.mask[0]].tolist()
    assert first[-4:] == [[-1, -2], [-1, -1], [-1, -4], [-1, -3]]  # above either image
    assert len(set(map(tuple, first))) == len(first)


def test_a_request_does_not_depend_on_the_others(foundation):
    made = conditioner(foundation, image_lap=True)
    (together,) = contexts(made)
    for row, (request, branch) in enumerate(zip(REQUESTS, BRANCHES, strict=True)):
        (alone,) = contexts(made, [request], [branch])
        for one in ("tokens", "positions"):
            got = getattr(together, one)[row, together.mask[row]]
            torch.testing.assert_close(got, getattr(alone, one)[0, alone.mask[0]], rtol=1e-4, atol=1e-5)


def test_kept_references_are_the_same_tokens_apart(foundation):
    (whole,), (text, images) = (
        contexts(conditioner(foundation)),
        contexts(conditioner(foundation, kept_references=True)),
    )
    assert whole.mask is not None and text.mask is not None and images.mask is not None
    assert images.tokens.shape[1] == 2 * (3 + 2)  # of two images 3 of 4 tokens and two discrete ones each
    for row in range(len(REQUESTS)):
        both = torch.cat([text.tokens[row, text.mask[row]], images.tokens[row, images.mask[row]]])
        expected = whole.tokens[row, whole.mask[row]]
        assert sorted(both[:, 0].tolist()) == sorted(expected[:, 0].tolist())


def test_everything_that_is_trained_learns_with_and_without_images(foundation):
    made = conditioner(foundation).train()
    for requests in (REQUESTS, [Request("a red circle")]):
        made.zero_grad()
        (context,) = made.prepare(
            made.collate(requests, ["full"] * len(requests), range(len(requests)))
        ).static
        assert context.mask is not None
        (context.tokens * context.mask[..., None]).square().sum().backward()
        assert made.select is not None
        for name, parameter in made.select.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if requests is REQUESTS and parameter.grad is not None:
                assert parameter.grad.abs().max() > 0, name


def test_what_does_not_fit_is_named(foundation):
    made = conditioner(foundation, selection={**SELECTION, "num_discrete": 5})
    with pytest.raises(ValueError, match=r"num_discrete is 5, an image has 4 tokens: lower it"):
        contexts(made)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        SelectionConfig(share=1.5)


def whole_model(foundation: Path, statistics, **fields) -> TextToImage:
    torch.manual_seed(1)
    method = UniFusionConfig.model_validate({"lap": LAP, "selection": SELECTION, **fields})
    return build_model(
        tiny_model(foundation, "unifusion").model_copy(update={"conditioning": method}), statistics
    )


def training_batch(model: TextToImage, requests: list[Request], seeds: range) -> dict:
    t, noise = draw(seeds, model.latent_shape, model.shift)
    latents = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    request = model.conditioner.collate(requests, ["full"] * len(requests), seeds)
    return {"request": request, "features": model.denormalise(latents).half(), "t": t, "noise": noise}


@pytest.mark.slow
@pytest.mark.parametrize("kept_references", [False, True])
def test_flops_are_counted_exactly(foundation, statistics, kept_references):
    model = whole_model(foundation, statistics, kept_references=kept_references)
    requests = [
        Request("a red circle", (picture(0), picture(1))),
        Request("a green square", (picture(2),) * 2),
    ]
    inputs = training_batch(model, requests, range(2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)["velocity"].mean().backward()
    num_tokens = 1 + 3
    costs = train_costs(model, num_tokens, images=requests[0].images)
    assert counter.get_total_flops() == 2 * sum(cost.total for cost in costs.values())


@pytest.mark.slow
def test_it_learns_which_reference_belongs_to_which_latents_and_its_checkpoint_is_whole(
    foundation, statistics, tmp_path
):
    """The prompt is the same, so that only a reference tells the latents apart; ids are frozen and saved."""
    model = whole_model(foundation, statistics)
    codes = model.conditioner.select.codes.clone()
    requests = [Request("a circle", (picture(seed),)) for seed in range(4)]
    inputs = training_batch(model, requests, range(4))
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": model.conditioner.collate(requests[::-1], ["full"] * 4)}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3, weight_decay=0)
    first = None
    for _ in range(80):
        loss = model(inputs)["velocity"].mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
    assert right < 0.5 * first and wrong > 2 * right
    assert torch.equal(model.conditioner.select.codes, codes)
    save_checkpoint(tmp_path / "step_00000080", model, model.trainable_state(), step=80)
    again = load_checkpoint(tmp_path / "step_00000080")
    with torch.no_grad():
        torch.testing.assert_close(again(inputs)["velocity"], model(inputs)["velocity"])
