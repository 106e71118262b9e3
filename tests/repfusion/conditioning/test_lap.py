"""Layerwise attention pooling against a slow reference, and what it reads of the language model."""

import pytest
import torch
from prompting import prepare
from pydantic import ValidationError
from slow_layers import attend, rms
from torch import Tensor

from repfusion.conditioning.lap import LapConditioner, LapConfig, LapSettings, LayerwisePooling
from repfusion.llm.load import load_language_model

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]


def pooled(lap: LayerwisePooling, states: list[Tensor]) -> Tensor:
    """One unpadded prompt's states [m c] of each tap -> [m c], token by token."""
    tokens = []
    for place in range(len(states[0])):
        taps = [rms(one[place], norm.weight) for one, norm in zip(states, lap.tap_norms, strict=True)]
        for block in lap.layer_blocks:
            taps = attend(block, taps)
        tokens.append(sum(weight * tap for weight, tap in zip(lap.pool, taps, strict=True)))
    for block in lap.refiner.blocks:
        tokens = attend(block, tokens)
    return torch.stack([rms(token, lap.refiner.norm.weight) for token in tokens])


@pytest.mark.parametrize(("layer_depth", "refiner_depth"), [(2, 2), (0, 1), (1, 0)])
def test_pooling_equals_a_slow_reference_and_sees_no_padding(layer_depth, refiner_depth):
    torch.manual_seed(0)
    lap = LayerwisePooling(128, 3, layer_depth, refiner_depth).double()
    with torch.no_grad():
        for parameter in lap.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lengths = (4, 2)
    states = [torch.randn(2, 5, 128, dtype=torch.float64) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = lap(states, mask)
        for row, length in enumerate(lengths):
            expected = pooled(lap, [state[row, :length] for state in states])
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-9, atol=1e-9)


def test_taps_are_averaged_at_first():
    lap = LayerwisePooling(64, 4, layer_depth=0, refiner_depth=0)
    state = torch.randn(1, 3, 64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    same = [state] * 4
    torch.testing.assert_close(lap(same, mask), lap.refiner.norm(lap.tap_norms[0](state)))


def test_states_are_those_of_transformers_own_forward(foundation):
    llm = load_language_model(foundation / "llava")
    layers = (0, 1, 2, -1)
    prefix = llm.tokenise(PROMPTS)
    states = llm.read_layers(prefix, layers)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[llm.begin_id, *llm.token_ids([prompt])[0]]])
        own = llm.language_model(input_ids=ids, output_hidden_states=True).hidden_states
        for state, layer in zip(states, layers, strict=True):
            torch.testing.assert_close(state[row][prefix.mask[row]], own[layer][0], rtol=1e-4, atol=1e-5)


def test_a_prompt_conditions_alike_alone_and_beside_longer_ones(foundation):
    torch.manual_seed(0)
    conditioner = LapConditioner(
        load_language_model(foundation / "llava"), LapConfig(lap=LapSettings(taps=(0, 1, -1)))
    )
    (together,) = prepare(conditioner, PROMPTS).static
    assert together.mask is not None and together.mask.sum(1).tolist() == [4, 9, 1]
    assert together.mask[:, 0].all()  # real tokens first
    for row, prompt in enumerate(PROMPTS):
        (alone,) = prepare(conditioner, [prompt]).static
        found = together.tokens[row][together.mask[row]]
        torch.testing.assert_close(found, alone.tokens[0], rtol=1e-4, atol=1e-5)


def test_the_language_model_stays_as_it_is(foundation):
    conditioner = LapConditioner(
        load_language_model(foundation / "llava"), LapConfig(lap=LapSettings(taps=(0, 1)))
    )
    (context,) = prepare(conditioner, PROMPTS).static
    context.tokens.sum().backward()
    assert all(p.grad is None for p in conditioner.llm.parameters())
    assert all(p.grad is not None for p in conditioner.lap.parameters())


@pytest.mark.parametrize(
    ("settings", "num_layers", "taps"),
    [
        ({}, 32, tuple(range(4, 33, 3))),  # the paper's 4, 7, ..., 31
        ({"every": 2}, 6, (3, 5)),
        ({"taps": (0, -1)}, 4, (0, -1)),
    ],
)
def test_taps(settings, num_layers, taps):
    assert LapSettings(**settings).taps_of(num_layers) == taps


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"taps": (3,)}, "taps name 3, the language model has 2 layers; expected 0 to 2, or -1 to -3"),
        ({"taps": (-4,)}, "taps name -4"),
        ({"every": 4}, "every is 4, the language model has 2 layers: no tap; lower it"),
    ],
)
def test_taps_beyond_the_layers_are_named(settings, problem):
    with pytest.raises(ValueError, match=problem):
        LapSettings(**settings).taps_of(2)


def test_a_tap_is_named_once():
    with pytest.raises(ValidationError, match="name a layer twice"):
        LapSettings(taps=(1, 1))


@pytest.mark.parametrize("kept", [(0, 2), (1,)])
def test_without_some_taps_pooling_is_that_of_the_others_alone(kept):
    torch.manual_seed(0)
    lap = LayerwisePooling(64, 3, layer_depth=1, refiner_depth=1).double()
    with torch.no_grad():
        for parameter in lap.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    few = LayerwisePooling(64, len(kept), layer_depth=1, refiner_depth=1).double()
    weights = {name: value for name, value in lap.state_dict().items() if not name.startswith("tap_norms")}
    norms = {f"tap_norms.{new}.weight": lap.tap_norms[old].weight for new, old in enumerate(kept)}
    few.load_state_dict({**weights, **norms, "pool": lap.pool[list(kept)]})
    states = [torch.randn(2, 5, 64, dtype=torch.float64) for _ in range(3)]
    lap.kept = kept
    with torch.no_grad():
        torch.testing.assert_close(lap(states), few([states[place] for place in kept]))
