"""MetaQuery against a slow reference: queries after a begin token, a connector with places, a preset gain."""

import pytest
import torch
from prompting import asked, prepare
from slow_layers import attend, rms
from torch import Tensor
from torch.nn.functional import gelu

from repfusion.conditioning.related.metaquery import MetaQueryConditioner, MetaQueryConfig, QueryConnector
from repfusion.llm.load import load_language_model

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]


def connected(connector: QueryConnector, states: Tensor) -> Tensor:
    """States [q c] of one prompt's queries -> [q w], token by token."""
    tokens = list(states)
    for block in connector.blocks:
        tokens = attend(block, tokens, places=range(len(tokens)))
    first, _, second = connector.project
    found = []
    for token in tokens:
        inner = gelu(first.weight @ rms(token, connector.norm.weight) + first.bias, approximate="tanh")
        outer = second.weight @ inner + second.bias
        found.append(outer / (outer.square().mean() + 1e-5).sqrt() * connector.out_norm.weight)
    return torch.stack(found)


def test_the_connector_equals_a_slow_reference():
    torch.manual_seed(0)
    connector = QueryConnector(128, num_queries=5, depth=2, width=24, gain=2.0).double()
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    states = torch.randn(2, 5, 128, dtype=torch.float64)
    with torch.no_grad():
        for row, found in zip(states, connector(states), strict=True):
            torch.testing.assert_close(found, connected(connector, row), rtol=1e-6, atol=1e-6)


def test_queries_are_read_by_transformers_own_forward_after_prompt_and_begin_of_image(make_generator):
    conditioner = make_generator("metaquery").conditioner
    llm = conditioner.llm
    with torch.no_grad():
        found = prepare(conditioner, PROMPTS).static[0]
        assert found.mask is None
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([llm.framed(llm.token_ids([prompt])[0])])
            asked_for = torch.cat([conditioner.begin, conditioner.queries])[None]
            whole = torch.cat([llm.embed(ids), asked_for], dim=1)
            states = llm.language_model(inputs_embeds=whole).last_hidden_state[0, -3:]
            expected = connected(conditioner.connector, states)
            torch.testing.assert_close(found.tokens[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gain", [1.0, 5.5**0.5])
def test_tokens_have_the_gain_of_the_generators_text_encoder_at_first(foundation, gain):
    torch.manual_seed(0)
    config = MetaQueryConfig(num_queries=4, connector_depth=1, width=48, gain=gain)
    conditioner = MetaQueryConditioner(load_language_model(foundation / "llava"), config)
    assert conditioner.context_widths == (48,)
    with torch.no_grad():
        tokens = prepare(conditioner, PROMPTS).static[0].tokens
    rooted = tokens.square().mean(-1).sqrt()
    torch.testing.assert_close(rooted, torch.full_like(rooted, gain), rtol=1e-3, atol=0)


def test_gradients_reach_queries_through_the_frozen_language_model(make_generator):
    conditioner = make_generator("metaquery").conditioner
    conditioner.prepare(conditioner.collate(*asked(PROMPTS))).static[0].tokens.square().sum().backward()
    for parameter in (conditioner.begin, conditioner.queries):
        assert parameter.grad is not None and bool((parameter.grad.abs().amax(dim=1) > 0).all())
    assert all(parameter.grad is None for parameter in conditioner.llm.parameters())


def test_queries_and_begin_token_leave_room_in_the_context(foundation):
    llm = load_language_model(foundation / "llava")
    with pytest.raises(ValueError, match="context of 128 leaves no room for a prompt beside 128"):
        MetaQueryConditioner(llm, MetaQueryConfig(num_queries=127))


def test_the_connectors_have_the_papers_sizes():
    """Enc-Proj of the paper's table: 84M with 6 layers, 316M with 24, of width 896 before SANA's 2304."""
    for depth, expected in ((6, 84e6), (24, 316e6)):
        with torch.device("meta"):
            connector = QueryConnector(896, 64, depth, 2304, 5.5**0.5)
        assert sum(p.numel() for p in connector.parameters()) == pytest.approx(expected, rel=0.02)
