"""What each fusion makes of the language model's layers, against loops over tokens in float64; and what it
refuses.
"""

import pytest
import torch
from prompting import prepare
from slow_layers import attend, rms
from tiny_training import make_foundation
from torch import Tensor
from transformers import MistralConfig

from repfusion.conditioning.base import Conditioner, Context
from repfusion.conditioning.fusions.all_layers import AllLayersConditioner, AllLayersConfig
from repfusion.conditioning.fusions.channel_concat import ChannelConcatConditioner, ChannelConcatConfig
from repfusion.conditioning.fusions.hidden_injection import HiddenInjectionConfig
from repfusion.conditioning.fusions.key_values import KeyValuesConditioner, KeyValuesConfig
from repfusion.conditioning.fusions.one_layer import OneLayerConditioner, OneLayerConfig
from repfusion.conditioning.fusions.per_block import PerBlockConditioner
from repfusion.conditioning.fusions.taps import spread
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.meta import meta_model

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return make_foundation(tmp_path_factory.mktemp("four"), text_layers=4) / "llava"


@pytest.fixture
def llm(folder) -> LanguageModel:
    """Four layers of width 32, in float64."""
    return load_language_model(folder).double()


def awake(conditioner: Conditioner) -> Conditioner:
    conditioner.double()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in conditioner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen, dtype=parameter.dtype))
    return conditioner


def own_states(llm: LanguageModel, prompt: str) -> list[Tensor]:
    """transformers' hidden states of one prompt without padding."""
    ids = torch.tensor([[llm.begin_id, *llm.token_ids([prompt])[0]]])
    with torch.no_grad():
        return [one[0] for one in llm.language_model(input_ids=ids, output_hidden_states=True).hidden_states]


def same(context: Context, row: int, expected: list[Tensor]) -> None:
    """The real tokens of a row, which come first, are the expected ones, and the mask says how many."""
    assert context.mask is not None
    assert context.mask[row].tolist() == [place < len(expected) for place in range(context.mask.shape[1])]
    found = context.tokens[row][: len(expected)].detach()
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, 3])
def test_one_layer_and_its_adaptor(llm, layer):
    conditioner = awake(OneLayerConditioner(llm, OneLayerConfig(layer=layer, refiner_depth=2)))
    (context,) = prepare(conditioner, PROMPTS).static
    for row, prompt in enumerate(PROMPTS):
        tokens = [rms(x, conditioner.tap_norm.weight) for x in own_states(llm, prompt)[layer]]
        for block in conditioner.refiner.blocks:
            tokens = attend(block, tokens)
        same(context, row, [rms(x, conditioner.refiner.norm.weight) for x in tokens])


def test_channels_of_a_few_layers_behind_one_linear(llm):
    conditioner = awake(ChannelConcatConditioner(llm, 24))
    assert conditioner.taps == (1, 2, 3) and conditioner.join.bias is None
    (context,) = prepare(conditioner, PROMPTS).static
    for row, prompt in enumerate(PROMPTS):
        states = own_states(llm, prompt)
        tokens = [torch.cat([states[tap][place] for tap in (1, 2, 3)]) for place in range(len(states[0]))]
        same(context, row, [conditioner.join.weight @ token for token in tokens])


def test_all_layers_each_of_zero_mean_and_unit_deviation(llm):
    conditioner = awake(AllLayersConditioner(llm, AllLayersConfig(width=24)))
    (context,) = prepare(conditioner, PROMPTS).static
    for row, prompt in enumerate(PROMPTS):
        tokens = []
        for token in zip(*own_states(llm, prompt)[1:], strict=True):
            centred = [state - sum(state) / len(state) for state in token]
            unit = [one / (sum(one**2) / (len(one) - 1)).sqrt() for one in centred]
            joined = conditioner.join.weight @ torch.cat(unit) + conditioner.join.bias
            tokens.append(0.5 * joined * (1 + torch.erf(joined / 2**0.5)))
        same(context, row, tokens)


def test_a_layer_for_each_block(llm):
    conditioner = awake(PerBlockConditioner(llm, 2, HiddenInjectionConfig()))
    contexts = prepare(conditioner, PROMPTS).static
    assert len(contexts) == 2 and conditioner.taps == (2, 4)
    for row, prompt in enumerate(PROMPTS):
        states = own_states(llm, prompt)
        for context, norm, tap in zip(contexts, conditioner.tap_norms, (2, 4), strict=True):
            same(context, row, [rms(x, norm.weight) for x in states[tap]])


def rotated(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    """LLaMA's rotation of one head at a place."""
    half = len(x) // 2
    angles = place * base ** -(torch.arange(half, dtype=x.dtype) / half)
    first, second = x.chunk(2)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()]
    )


def test_keys_and_values_are_those_of_the_language_models_own_attention(llm):
    conditioner = awake(KeyValuesConditioner(llm, 2))
    contexts = prepare(conditioner, PROMPTS).static
    assert conditioner.taps == (2, 4) and conditioner.context_widths == (64, 64)
    for row, prompt in enumerate(PROMPTS):
        states = own_states(llm, prompt)
        for number, tap in enumerate((2, 4)):
            layer, tokens = llm.layers[tap - 1], []
            for place, state in enumerate(states[tap - 1]):
                x = rms(state, layer.input_layernorm.weight)
                heads = (layer.self_attn.k_proj.weight @ x).reshape(2, -1)
                key = torch.cat([rotated(head, place) for head in heads])
                value = layer.self_attn.v_proj.weight @ x
                norms = conditioner.key_norms[number].weight, conditioner.value_norms[number].weight
                tokens.append(torch.cat([rms(key, norms[0]), rms(value, norms[1])]))
            same(contexts[number], row, tokens)


@pytest.mark.parametrize(
    "build",
    [
        lambda llm: OneLayerConditioner(llm),
        lambda llm: ChannelConcatConditioner(llm, 24),
        lambda llm: AllLayersConditioner(llm),
        lambda llm: PerBlockConditioner(llm, 3, HiddenInjectionConfig()),
        lambda llm: KeyValuesConditioner(llm, 3),
    ],
)
def test_what_is_frozen_is_read_in_its_own_precision(folder, build):
    """A bfloat16 language model, under autocast or not, reads the same, and what trains is float32."""
    conditioner = build(load_language_model(folder, torch.bfloat16))
    seen: list[Tensor] = []
    conditioner.llm.language_model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    tokens = prepare(conditioner, PROMPTS).static[0].tokens
    with torch.autocast("cpu", torch.bfloat16):
        prepare(conditioner, PROMPTS)
    assert tokens.dtype == torch.float32 and torch.equal(*seen)
    assert not any(parameter.requires_grad for parameter in conditioner.llm.parameters())


def test_layers_are_spread_evenly_up_to_the_last():
    assert spread(4, 4) == (1, 2, 3, 4) and spread(2, 4) == (2, 4) and spread(6, 4) == (1, 2, 2, 3, 4, 4)
    assert spread(24, 32)[-1] == 32 and len(spread(24, 32)) == 24


def test_flux2s_layers_are_quarters_of_the_depth():
    assert ChannelConcatConfig().taps_of(40) == (10, 20, 30)  # dev, of Mistral-Small
    assert ChannelConcatConfig().taps_of(36) == (9, 18, 27)  # klein, of Qwen3
    assert ChannelConcatConfig().taps_of(2) == (1, 2)


PUBLISHED = {
    "FLUX.2 dev": ("channel_concat", {"hidden_size": 5120, "num_hidden_layers": 40}, 15360 * 6144),
    "Cosmos Predict 2.5": (
        {"method": "all_layers", "width": 1024},
        {"hidden_size": 3584, "num_hidden_layers": 28},
        100352 * 1024 + 1024,
    ),
}
"""The method, the language model, and how many weights join its layers: three without bias in a DiT 6144
wide, or all, with bias.
"""


@pytest.mark.parametrize("system", PUBLISHED)
def test_layers_are_joined_by_as_many_weights_as_published(system):
    conditioning, sizes, published = PUBLISHED[system]
    config = ModelConfig(conditioning=conditioning, dit=DiTConfig(hidden_size=6144, num_heads=48, depth=1))
    model = meta_model(config, MistralConfig(**sizes, num_attention_heads=32, head_dim=128), (4, 4), 128)
    found = sum(parameter.numel() for parameter in model.conditioner.join.parameters())
    print(f"{system}: {found:,} weights join the layers, published are {published:,}")
    assert found == published


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (
            lambda llm: OneLayerConditioner(llm, OneLayerConfig(layer=5)),
            "hidden state 5, .* has 4 layers; expected 0",
        ),
        (lambda llm: ChannelConcatConditioner(llm, 8, ChannelConcatConfig(taps=(1, 9))), "hidden state 9"),
        (
            lambda llm: KeyValuesConditioner(llm, 2, KeyValuesConfig(taps=(1,))),
            "taps are 1, the DiT has 2 blocks: each block sees one; name 2",
        ),
        (
            lambda llm: PerBlockConditioner(llm, 2, HiddenInjectionConfig(taps=(0, 1))),
            r"taps are \(0, 1\), the language model has 4 layers; expected 1 to 4",
        ),
    ],
)
def test_layers_that_do_not_fit_are_named(llm, build, problem):
    with pytest.raises(ValueError, match=problem):
        build(llm)
