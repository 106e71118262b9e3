"""Prompts read apart from what follows them, unmasked, or padded further: the same as read together."""

import pytest
import torch

from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.model.trainable import computed_again

PROMPTS = ["a red circle", "", "two blue square left of a green circle"]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture
def llm(foundation) -> LanguageModel:
    return load_language_model(foundation / "llava", torch.float32)


def following(llm: LanguageModel) -> torch.Tensor:
    rows = torch.randn(len(PROMPTS), 4, llm.width, generator=torch.Generator().manual_seed(0))
    return rows.requires_grad_()


def read(llm: LanguageModel, bidirectional: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States after the prompts, and the gradient of something of them."""
    tokens = following(llm)
    states = llm.read_on(llm.tokenise(PROMPTS), tokens, bidirectional)
    states.sin().sum().backward()
    assert tokens.grad is not None
    return states.detach(), tokens.grad


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_read_apart_states_and_gradients_are_those_of_reading_together(llm, bidirectional, again):
    expected = read(llm, bidirectional)
    llm.reads_apart = True
    if again:  # a layer that runs twice finds the prompts as they were
        for layer in llm.layers:
            layer.forward = computed_again(layer.forward, "full")
    for one, other in zip(read(llm, bidirectional), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_prompts_read_apart_store_no_activations(llm):
    saved: list[int] = []

    def kept(apart: bool) -> int:
        llm.reads_apart = apart
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
            llm.read_on(llm.tokenise(["a red circle " * 12]), following(llm)[:1])
        return sum(saved)

    assert kept(apart=True) < 0.5 * kept(apart=False)


def test_a_model_that_is_trained_reads_together_whatever_is_said(llm):
    llm.unfreeze()
    llm.reads_apart = True
    embeddings = llm.language_model.get_input_embeddings().weight
    llm.read_on(llm.tokenise(PROMPTS), following(llm)).sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


def test_unmasked_is_masked(llm):
    prefix = llm.tokenise(PROMPTS)
    expected = llm._run(prefix, output_hidden_states=True)
    found = llm.run_unmasked(prefix, output_hidden_states=True)
    states = zip(
        (found.last_hidden_state, *found.hidden_states),
        (expected.last_hidden_state, *expected.hidden_states),
        strict=True,
    )
    for one, other in states:
        torch.testing.assert_close(one[prefix.mask], other[prefix.mask], **CLOSE)


def test_prompts_in_buckets_are_read_as_they_are(llm):
    expected = llm.read_on(llm.tokenise(PROMPTS), following(llm))
    llm.bucket = 16
    assert llm.tokenise(PROMPTS).ids.shape[1] == 16 and llm.tokenise([""]).ids.shape[1] == 16
    for apart in (False, True):
        llm.reads_apart = apart
        torch.testing.assert_close(llm.read_on(llm.tokenise(PROMPTS), following(llm)), expected, **CLOSE)
    llm.max_text_tokens = 12
    assert llm.tokenise(PROMPTS).ids.shape[1] == 12, "never beyond the context"
