"""LI-DiT against a slow reference: an instruction that is cut off, a refiner gated by noise level and mean
text, two language models that attend to each other.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prompting import asked, condition_tokens, prepare, training_inputs
from slow_layers import attended, fed, keys_values, rms
from tiny_training import make_foundation
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repfusion.conditioning.base import Context
from repfusion.conditioning.related.li_dit import (
    Gate,
    GatedBlock,
    LiDitConditioner,
    LiDitConfig,
    LinguisticRefiner,
)
from repfusion.flops.count import CONDITIONER, LLM, train_costs
from repfusion.flops.memory import sizes
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.check import check_model
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]
T = torch.tensor([0.9, 0.3, 0.6])


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def gate(module: Gate, signal: Tensor) -> Tensor:
    return module.linear.weight @ F.silu(signal) + module.linear.bias


def attended_to(block: GatedBlock, tokens: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """What tokens find in those of the other branch alone."""
    attention = block.other_attention
    assert attention is not None and block.other_norm is not None
    heads = attention.num_heads
    projected = [attention.key_value.weight @ normed(block.other_norm, one) for one in others]
    known = [keys_values(one, attention.key_norm.weight, heads, None) for one in projected]
    found = []
    for token in tokens:
        queries = (attention.query.weight @ normed(block.other_norm, token)).reshape(heads, -1)
        mixed = []
        for head, query in enumerate(queries):
            query = rms(query, attention.query_norm.weight)
            scores = torch.stack([query @ one[head][0] for one in known]) / len(query) ** 0.5
            mixed.append(sum(w * one[head][1] for w, one in zip(scores.softmax(0), known, strict=True)))
        found.append(attention.out.weight @ torch.cat(mixed) + attention.out.bias)
    return found


def refined(refiner: LinguisticRefiner, states: list[Tensor], t: Tensor) -> Tensor:
    """Unpadded states [m c] of one prompt in each language model -> tokens, one by one."""
    branches = []
    for enter, state in zip(refiner.enter, states, strict=True):
        tokens = [rms(one, enter[0].weight) for one in state]
        if isinstance(enter[1], nn.Linear):
            tokens = [enter[1].weight @ one + enter[1].bias for one in tokens]
        branches.append(tokens)
    time = refiner.time(t[None])[0]
    signals = []
    for (first, _, second), tokens in zip(refiner.mean, branches, strict=True):
        inner = F.silu(first.weight @ (sum(tokens) / len(tokens)) + first.bias)
        signals.append(time + second.weight @ inner + second.bias)
    for blocks in refiner.blocks:
        for number, block in enumerate(blocks):
            found = attended(block.attention, [normed(block.attention_norm, x) for x in branches[number]])
            by = gate(block.attention_gate, signals[number])
            branches[number] = [x + by * y for x, y in zip(branches[number], found, strict=True)]
        if len(blocks) == 2:
            before = [list(one) for one in branches]
            for number, block in enumerate(blocks):
                found = attended_to(block, before[number], before[1 - number])
                by = gate(block.other_gate, signals[number])
                branches[number] = [x + by * y for x, y in zip(before[number], found, strict=True)]
        for number, block in enumerate(blocks):
            by = gate(block.mlp_gate, signals[number])
            branches[number] = [x + by * fed(block.mlp, normed(block.mlp_norm, x)) for x in branches[number]]
    return torch.stack([token for tokens in branches for token in tokens])


@pytest.mark.parametrize("widths", [(128,), (64, 48)])
def test_the_refiner_equals_a_slow_reference_and_sees_no_padding(widths):
    torch.manual_seed(0)
    refiner = LinguisticRefiner(widths, depth=2).double()
    with torch.no_grad():
        for parameter in refiner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    refiner.time.float()
    refiner.time.register_forward_hook(lambda *passed: passed[-1].double())
    lengths = [(4, 2), (3, 5)][: len(widths)]
    contexts = []
    for width, own in zip(widths, lengths, strict=True):
        mask = torch.arange(5, 0, -1) <= torch.tensor(own)[:, None]
        contexts.append(Context(torch.randn(2, 5, width, dtype=torch.float64), mask))
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        found = refiner(contexts, t)
        for row in range(2):
            states = [one.tokens[row, one.mask[row]] for one in contexts]
            assert found.mask is not None
            real = found.tokens[row, found.mask[row]]
            torch.testing.assert_close(real, refined(refiner, states, t[row]), rtol=1e-6, atol=1e-5)


def test_at_first_the_refiner_is_not_there(foundation):
    conditioner = LiDitConditioner(load_language_model(foundation / "llava"))
    with torch.no_grad():
        prepared = prepare(conditioner, PROMPTS)
        (states,) = prepared.states
        for t in (T, T / 2):
            found = condition_tokens(conditioner, prepared, torch.zeros(3, 4, 16), t)
            torch.testing.assert_close(found.tokens, conditioner.refiner.enter[0](states.tokens))


@pytest.mark.parametrize("instruction", ["a red of and two", ""])
def test_states_are_those_of_transformers_own_forward_without_the_instructions(foundation, instruction):
    llm = load_language_model(foundation / "llava")
    conditioner = LiDitConditioner(llm, LiDitConfig(instruction=instruction))
    with torch.no_grad():
        (states,) = prepare(conditioner, PROMPTS).states
    before = llm.token_ids([instruction])[0] if instruction else []
    for row, prompt in enumerate(PROMPTS):
        own = llm.token_ids([prompt])[0]
        ids = torch.tensor([[llm.begin_id, *before, *own]])
        with torch.no_grad():
            hidden = llm.language_model(input_ids=ids, output_hidden_states=True).hidden_states[-3][0]
        expected = hidden[-max(1, len(own)) :] if instruction else hidden
        assert states.mask is not None
        torch.testing.assert_close(states.tokens[row, states.mask[row]], expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named(foundation):
    llm, other = (load_language_model(foundation / "llava") for _ in range(2))
    with pytest.raises(ValueError, match="li_dit reads the hidden state -4, the language model has 2 layers"):
        LiDitConditioner(llm, LiDitConfig(layer=-4))
    with pytest.raises(ValueError, match="context of 128 leaves no room for a prompt beside 130"):
        LiDitConditioner(other, LiDitConfig(instruction="a " * 130))
    conditioner = LiDitConditioner(llm, LiDitConfig(instruction="a " * 120))
    with pytest.raises(ValueError, match="has 9 tokens; the context takes 8"):
        conditioner.collate(*asked([PROMPTS[1]]))


@pytest.fixture(scope="module")
def joined(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model of two language models, of widths 32 and 48."""
    other = make_foundation(tmp_path_factory.mktemp("second"), text_width=48)
    method = LiDitConfig(instruction="a red", refiner_depth=1, second=other / "llava")
    return ModelConfig.model_validate(
        {
            "conditioning": method,
            "mllm": foundation / "llava",
            "encoder": {"path": foundation / "vision_tower"},
            "decoder": foundation / "decoder",
            "dit": {"hidden_size": 24, "depth": 2, "num_heads": 2},
        }
    )


@pytest.fixture(scope="module")
def two(joined: ModelConfig, statistics) -> TextToImage:
    torch.manual_seed(0)
    model = build_model(joined, statistics)
    with torch.no_grad():
        for parameter in model.trainable_state().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_tokens_of_two_language_models_stand_behind_each_other_and_both_are_frozen(two, joined):
    conditioner = two.conditioner
    with torch.no_grad():
        prepared = prepare(conditioner, PROMPTS)
        found = condition_tokens(conditioner, prepared, torch.zeros(3, 4, 16), T)
        for row in range(3):
            states = [one.tokens[row, one.mask[row]] for one in prepared.states]
            expected = refined(conditioner.refiner, states, T[row])
            torch.testing.assert_close(found.tokens[row, found.mask[row]], expected, rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("conditioner.second") for name in two.trainable_state())
    assert joined.parts()["conditioning.second"] == joined.conditioning.second
    assert len(two.frozen_parts()) == 2 and len(two.layers()) == 2 + 2 + 2


@pytest.mark.slow
def test_flops_and_sizes_count_both_language_models(two):
    prompts = ["a red circle", "a green square"]
    inputs = training_inputs(two, prompts, [1, 2], two.shift)
    costs = train_costs(two, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            two(inputs)["velocity"].mean().backward()
    two.zero_grad()
    assert counter.get_total_flops() == 2 * sum(cost.total for cost in costs.values())
    assert costs[LLM].backward == 0 < costs[CONDITIONER].backward
    read = sum(p.numel() for llm in two.conditioner.language_models for p in llm.parameters())
    assert sizes(two)[LLM].num_parameters == read


def test_a_folder_that_is_missing_is_named_before_anything_is_computed(joined, tmp_path):
    assert check_model(joined).conditioner.context_widths == (32,)
    method = joined.conditioning.model_copy(update={"second": tmp_path / "absent"})
    with pytest.raises(ValueError, match=r"model\.conditioning: .*absent"):
        check_model(joined.model_copy(update={"conditioning": method}))
