"""Query-Kontext against a slow reference: queries after the whole chat beside the prompt's own states, a
connector, low-level tokens at shifted places; three trainings of which each goes on from the last.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from repfusion.conditioning.base import Context
from repfusion.conditioning.lora import LoraConfig
from repfusion.conditioning.related.query_kontext import QueryKontextConditioner, QueryKontextConfig
from repfusion.diffusion.flow import draw
from repfusion.flops.count import train_costs
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import check_continues, load_start, save_checkpoint


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


REQUESTS = [
    Request("two blue circle left of a green square", (picture(0), picture(1))),
    Request("a circle"),
    Request(),
]
BRANCHES = ["full", "full", "none"]


def conditioner(foundation: Path, **fields) -> QueryKontextConditioner:
    torch.manual_seed(0)
    llm = load_language_model(foundation / "llava", with_eyes=True)
    return QueryKontextConditioner(llm, QueryKontextConfig(num_queries=3, width=24, **fields))


def prepared(made: QueryKontextConditioner, requests=REQUESTS, branches=BRANCHES) -> Context:
    with torch.no_grad():
        return made.prepare(made.collate(requests, branches)).static[0]


def connected(layers: torch.nn.Sequential, states: torch.Tensor) -> torch.Tensor:
    first, _, second = layers
    inner = states @ first.weight.T + first.bias
    return inner * (1 + torch.erf(inner / 2**0.5)) / 2 @ second.weight.T + second.bias


def test_it_equals_a_slow_reference(foundation):
    made = conditioner(foundation, low_level=True)
    found = prepared(made)
    whole = LlavaForConditionalGeneration.from_pretrained(foundation / "llava").model.eval()
    assert found.mask is not None and found.positions is not None and made.low_level is not None
    for row, request in enumerate(REQUESTS):
        batch = tokenise_chats(made.llm, [Chat(request.prompt, request.images)])
        is_image, text = batch.is_any(ChatPart.IMAGE)[0], batch.is_any(ChatPart.INSTRUCTION)[0]
        text = text if text.any() else batch.mask[0]
        with torch.no_grad():
            embeds = whole.get_input_embeddings()(batch.ids)
            seen = embeds[:, :0]
            if request.images:
                pixels = batch.images["pixel_values"]
                seen = torch.cat(tuple(whole.get_image_features(pixels).pooler_output))[None]
                embeds[0, is_image] = seen[0]
            embeds = torch.cat([embeds, made.queries[None]], dim=1)
            states = whole.language_model(inputs_embeds=embeds).last_hidden_state[0]
            joined = torch.cat([states[:-3][text], states[-3:]])
            expected = torch.cat([connected(made.connector, joined), connected(made.low_level, seen[0])])
        torch.testing.assert_close(found.tokens[row, found.mask[row]], expected, rtol=1e-4, atol=1e-4)
        places = found.positions[row, found.mask[row]].tolist()
        num_text = int(text.sum())
        assert places[: num_text + 3] == [[k, k] for k in range(num_text + 3)]
        assert len(set(map(tuple, places))) == len(places) and all(
            one[1] < 0 for one in places[num_text + 3 :]
        )


def test_a_request_does_not_depend_on_the_others(foundation):
    made = conditioner(foundation, low_level=True)
    together = prepared(made)
    for row, pair in enumerate(zip(REQUESTS, BRANCHES, strict=True)):
        alone = prepared(made, [pair[0]], [pair[1]])
        got, expected = together.tokens[row, together.mask[row]], alone.tokens[0, alone.mask[0]]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_queries_through_the_frozen_language_model(foundation):
    made = conditioner(foundation, low_level=True)
    context = made.prepare(made.collate([Request("a circle")], ["full"], [0])).static[0]
    (context.tokens * context.mask[..., None]).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is None) == name.startswith("llm."), name
    assert bool((made.queries.grad.abs().amax(dim=1) > 0).all())


def test_queries_leave_room_in_the_context(foundation):
    llm = load_language_model(foundation / "llava", with_eyes=True)
    with pytest.raises(ValueError, match="context of 128 leaves no room for a prompt beside 128"):
        QueryKontextConditioner(llm, QueryKontextConfig())


def whole_model(foundation: Path, statistics, dit: DiTConfig | None = None, **fields) -> TextToImage:
    torch.manual_seed(1)
    config = tiny_model(foundation, "unifusion")
    method = QueryKontextConfig(num_queries=3, **fields)
    changes = {"conditioning": method, "dit": dit or config.dit}
    return build_model(config.model_copy(update=changes), statistics)


def batch_of(model: TextToImage, requests: list[Request]) -> dict:
    t, noise = draw(range(len(requests)), model.latent_shape, model.shift)
    latents = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    request = model.conditioner.collate(requests, ["full"] * len(requests), range(len(requests)))
    return {"request": request, "features": model.denormalise(latents).half(), "t": t, "noise": noise}


def save(model: TextToImage, folder: Path) -> Path:
    save_checkpoint(folder, model, model.trainable_state(), step=1)
    return folder


@pytest.mark.slow
def test_three_trainings_go_on_from_each_other(foundation, statistics, tmp_path, make_generator):
    """A larger DiT takes the conditioner alone, low-level tokens then join what is there; a checkpoint of
    another language model is refused by name.
    """
    first = save(whole_model(foundation, statistics), tmp_path / "step_00000001")
    large = DiTConfig(hidden_size=32, depth=3, num_heads=2)
    second = whole_model(foundation, statistics, large, replaces_dit=True)
    fresh = {name: p.clone() for name, p in second.denoiser.state_dict().items()}
    load_start(second, first)
    check_continues(second, first)
    before = whole_model(foundation, statistics).trainable_state()
    own = second.trainable_state()
    for name in own:
        if name.startswith("conditioner."):
            assert torch.equal(own[name], before[name])
    assert all(torch.equal(p, fresh[name]) for name, p in second.denoiser.state_dict().items())
    third = whole_model(foundation, statistics, large, replaces_dit=True, low_level=True)
    with torch.no_grad():
        for parameter in second.trainable_state().values():
            parameter.add_(0.1)
    load_start(third, save(second, tmp_path / "step_00000002"))
    own = second.trainable_state()
    for name, parameter in third.trainable_state().items():
        assert name.startswith("conditioner.low_level.") or torch.equal(parameter, own[name]), name
    other = make_generator("unifusion")
    with pytest.raises(ValueError, match=r"conditioning\.method 'unifusion', expected 'query_kontext'"):
        load_start(third, save(other, tmp_path / "step_00000003"))
    config = tmp_path / "step_00000001" / "config.json"
    digest = second.conditioner.llm.digest
    config.write_text(config.read_text().replace(digest, "0" * len(digest)))
    with pytest.raises(ValueError, match="was trained with mllm weights 000000000000, what is taken of it"):
        check_continues(second, first)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["frozen", "lora"])
def test_flops_are_counted_exactly(foundation, statistics, lora):
    model = whole_model(foundation, statistics, low_level=lora is None, lora=lora)
    pictures = (picture(0), picture(1))
    inputs = batch_of(model, [Request("a red circle", pictures), Request("a green square", pictures)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)["velocity"].mean().backward()
    costs = train_costs(model, 4, images=pictures)
    assert counter.get_total_flops() == 2 * sum(cost.total for cost in costs.values())


@pytest.mark.slow
@pytest.mark.parametrize("low_level", [False, True])
def test_it_learns_which_reference_belongs_to_which_latents(foundation, statistics, low_level):
    """Where low-level tokens join; without them, which prompt does: the language model's weights are random
    and say little of images.
    """
    model = whole_model(foundation, statistics, low_level=low_level)
    prompts = ["a red circle", "two blue square", "green", "a green circle left of a blue square"]
    pictures = [("a circle", (picture(seed),)) for seed in range(4)]
    requests = [Request(*one) for one in (pictures if low_level else zip(prompts))]
    inputs = batch_of(model, requests)
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": model.conditioner.collate(requests[::-1], ["full"] * 4)}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(80):
        loss = model(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
    assert right < 0.5 * losses[0] and wrong > 2 * right
