"""BLIP3-o against a slow reference: queries after the prompt and a projector, and nothing else."""

import torch
from prompting import prepare

from repfusion.conditioning.related.blip3o import Blip3oConditioner, Blip3oConfig
from repfusion.llm.load import load_language_model

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]


def test_projected_states_are_those_of_transformers_own_forward(make_generator):
    conditioner = make_generator("blip3o").conditioner
    llm, (first, _, second) = conditioner.llm, conditioner.connector
    with torch.no_grad():
        found = prepare(conditioner, PROMPTS).static[0]
        assert found.mask is None and found.tokens.shape[1:] == (3, 24)
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([llm.framed(llm.token_ids([prompt])[0])])
            whole = torch.cat([llm.embed(ids), conditioner.queries[None]], dim=1)
            states = llm.language_model(inputs_embeds=whole).last_hidden_state[0, -3:]
            inner = states @ first.weight.T + first.bias
            inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            expected = inner @ second.weight.T + second.bias
            torch.testing.assert_close(found.tokens[row], expected, rtol=1e-4, atol=1e-4)


def test_queries_begin_as_unit_noise_and_width_is_the_language_models_unless_named(foundation):
    torch.manual_seed(0)
    conditioner = Blip3oConditioner(load_language_model(foundation / "llava"), Blip3oConfig(num_queries=64))
    assert 0.95 < conditioner.queries.std().item() < 1.05
    assert conditioner.context_widths == (conditioner.llm.width,)
