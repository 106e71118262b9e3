"""RepFusion's condition reads prompt, noisy latents and noise level, causally; TextEmbed's the prompt."""

import pytest
import torch
from prompting import condition_tokens, prepare

from repfusion.conditioning.base import Condition, Prepared
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.conditioning.text_embed import encode_text
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.llm.base import Prefix
from repfusion.llm.load import load_language_model
from repfusion.request import Request

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]


@pytest.fixture
def latents(statistics) -> torch.Tensor:
    shape = (3, *statistics.mean.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


T = torch.tensor([0.2, 0.5, 0.9])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_repfusions_condition_follows_latents_noise_level_and_prompt(make_generator, latents):
    conditioner = make_generator().conditioner
    prepared = prepare(conditioner, PROMPTS)
    before = condition_tokens(conditioner, prepared, latents, T)
    assert before.mask is None
    assert before.tokens.shape == (3, 4, 32)
    assert difference(condition_tokens(conditioner, prepared, latents + 0.5, T).tokens, before.tokens) > 1e-2
    assert difference(condition_tokens(conditioner, prepared, latents, T / 2).tokens, before.tokens) > 1e-2
    other = prepare(conditioner, ["a green circle", *PROMPTS[1:]])
    rows = (condition_tokens(conditioner, other, latents, T).tokens - before.tokens).abs().amax(dim=(1, 2))
    assert rows[0] > 1e-4 and rows[1:].max() < 1e-5


def test_the_noise_level_has_no_effect_before_training(make_generator, latents):
    """e_t starts at zero, so that the projector first sees what it was pretrained on, but for noise."""
    conditioner = make_generator(awake=False).conditioner
    prepared = prepare(conditioner, PROMPTS)
    assert torch.equal(
        condition_tokens(conditioner, prepared, latents, T).tokens,
        condition_tokens(conditioner, prepared, latents, T / 2).tokens,
    )


def test_text_embeds_condition_is_static(make_generator, latents):
    conditioner = make_generator("text_embed").conditioner
    prepared = prepare(conditioner, PROMPTS)
    assert conditioner.condition(prepared, latents, T) == Condition()
    before = condition_tokens(conditioner, prepared, latents, T)
    after = condition_tokens(conditioner, prepared, latents + 1, T / 2)
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.mask, after.mask)
    assert before.mask.sum(1).tolist() == [4, 9, 1]
    other = condition_tokens(conditioner, prepare(conditioner, ["a green circle", *PROMPTS[1:]]), latents, T)
    assert difference(before.tokens[0, :4], other.tokens[0, :4]) > 1e-3


def test_the_cached_prefix_gives_the_uncached_condition_at_every_step(make_generator, latents):
    conditioner = make_generator().conditioner
    cached, plain = prepare(conditioner, PROMPTS, reuse=True), prepare(conditioner, PROMPTS)
    with torch.no_grad():
        for step in range(3):
            z_t, t = latents * (1 + step), T / (1 + step)
            expected = condition_tokens(conditioner, plain, z_t, t).tokens
            torch.testing.assert_close(
                condition_tokens(conditioner, cached, z_t, t).tokens, expected, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("conditioning", ["noisy_latents", "text_embed"])
@pytest.mark.parametrize("reuse", [False, True])
def test_padding_does_not_change_a_prompts_condition(make_generator, latents, conditioning, reuse):
    conditioner = make_generator(conditioning).conditioner
    with torch.no_grad():
        batch = condition_tokens(conditioner, prepare(conditioner, PROMPTS, reuse), latents, T)
        for row, prompt in enumerate(PROMPTS):
            prepared = prepare(conditioner, [prompt], reuse)
            alone = condition_tokens(conditioner, prepared, latents[row : row + 1], T[row : row + 1]).tokens[
                0
            ]
            together = batch.tokens[row] if batch.mask is None else batch.tokens[row][batch.mask[row]]
            torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_training_gives_the_llm_no_mask_and_never_looks_at_padding(make_generator, latents):
    """Flash attention takes no mask; that padding has no effect is then up to its place."""
    conditioner = make_generator().conditioner
    masks = []
    conditioner.llm.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    prefix = prepare(conditioner, PROMPTS).prefix
    assert not prefix.mask.all()
    other = Prefix(torch.where(prefix.mask, prefix.ids, 7), prefix.mask)
    assert not torch.equal(other.ids, prefix.ids)
    before, after = (
        condition_tokens(conditioner, Prepared(one), latents, T).tokens for one in (prefix, other)
    )
    assert masks == [None, None]
    assert torch.equal(before, after)


def test_gradients_do_not_depend_on_padding(make_generator, latents):
    conditioner = make_generator().conditioner
    weight = conditioner.projector.linear_1.weight

    def gradient(prompts: list[str], rows: slice) -> torch.Tensor:
        tokens = condition_tokens(conditioner, prepare(conditioner, prompts), latents[rows], T[rows]).tokens
        return torch.autograd.grad(tokens.square().sum(), weight)[0]

    together = gradient(PROMPTS, slice(3))
    alone = sum(gradient([prompt], slice(i, i + 1)) for i, prompt in enumerate(PROMPTS))
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("token", range(4))
def test_visual_tokens_are_read_causally(make_generator, latents, token):
    conditioner = make_generator().conditioner
    prepared = prepare(conditioner, PROMPTS)
    changed = latents.clone()
    changed[:, token] += 1
    before, after = (condition_tokens(conditioner, prepared, z_t, T).tokens for z_t in (latents, changed))
    per_token = (before - after).abs().amax(dim=(0, 2))
    assert per_token[:token].sum() == 0
    assert (per_token[token:] > 1e-5).all()
    assert per_token[token] > 1e-2


def test_the_condition_is_the_language_models_last_state_after_text_and_projected_latents(
    make_generator, latents
):
    """Written out for one prompt: LLM([y, P(z_t + e_t)]), the last n positions."""
    conditioner = make_generator().conditioner
    llm = conditioner.llm
    ids = llm.tokenise(PROMPTS[:1]).ids
    z_t, t = latents[:1], T[:1]
    visual = conditioner.projector(z_t + conditioner.time(t)[:, None])
    embedded = torch.cat([llm.language_model.embed_tokens(ids), visual], dim=1)
    expected = llm.language_model(inputs_embeds=embedded).last_hidden_state[:, -4:]
    got = condition_tokens(conditioner, prepare(conditioner, PROMPTS[:1]), z_t, t).tokens
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_pass_the_frozen_model_to_projector_and_time_embedding(make_generator, latents):
    conditioner = make_generator().conditioner
    condition_tokens(conditioner, prepare(conditioner, PROMPTS), latents, T).tokens.square().sum().backward()
    for module in (conditioner.projector, conditioner.time):
        assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert all(p.grad is None for p in conditioner.llm.parameters())


def with_features(prompt: str, features: torch.Tensor) -> Request:
    return Request(prompt, computed={PROMPT_FEATURES: features})


def test_precomputed_text_features_stand_for_their_prompts(make_generator):
    conditioner = make_generator("text_embed").conditioner
    features = encode_text(conditioner.llm, conditioner.llm.tokenise(PROMPTS))
    assert [len(row) for row in features] == [4, 9, 1]
    (from_text,) = prepare(conditioner, PROMPTS).static
    requests = [
        with_features("", features[0].half().float()),
        Request(PROMPTS[1]),
        with_features("", features[2]),
    ]
    (mixed,) = conditioner.prepare(conditioner.collate(requests, ["full"] * 3)).static
    assert torch.equal(mixed.mask, from_text.mask)
    torch.testing.assert_close(mixed.tokens, from_text.tokens, atol=1e-2, rtol=1e-2)
    assert torch.equal(mixed.tokens[1], from_text.tokens[1])


def test_nothing_is_the_empty_prompt_whatever_was_precomputed(make_generator):
    """A dropped condition reads neither the prompt nor its features."""
    conditioner = make_generator("text_embed").conditioner
    request = with_features("a red circle", torch.ones(3, 32))
    (dropped,) = conditioner.prepare(conditioner.collate([request], ["none"])).static
    (empty,) = prepare(conditioner, [""]).static
    assert torch.equal(dropped.tokens, empty.tokens) and torch.equal(dropped.mask, empty.mask)


def test_the_llm_runs_even_where_all_features_are_precomputed(make_generator):
    """All ranks have to run the same modules."""
    conditioner, passes = make_generator("text_embed").conditioner, []
    conditioner.llm.language_model.register_forward_hook(lambda *_: passes.append(1))
    requests = [with_features(prompt, torch.ones(3, 32)) for prompt in PROMPTS]
    (context,) = conditioner.prepare(conditioner.collate(requests, ["full"] * 3)).static
    assert passes == [1] and context.mask.sum(1).tolist() == [3, 3, 3]


@pytest.mark.parametrize("reuse", [False, True])
def test_text_is_read_in_the_precision_of_the_llms_weights(make_generator, reuse):
    """Never under autocast: features computed ahead and features read in training or sampling are the
    same.
    """
    conditioner = make_generator("text_embed").conditioner
    expected = encode_text(conditioner.llm, conditioner.llm.tokenise(PROMPTS))
    seen = []
    conditioner.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        prepare(conditioner, PROMPTS, reuse)
    assert seen[0].dtype == torch.float32
    for row, states in zip(seen[0], expected, strict=True):
        assert torch.equal(row[: len(states)], states)


def test_text_features_of_another_model_are_refused(make_generator):
    conditioner = make_generator("text_embed").conditioner
    requests = [with_features("a red circle", torch.zeros(3, 20))]
    with pytest.raises(ValueError, match=r"width 20, the LLM has 32; re-run the 'prompt_features' stage"):
        conditioner.collate(requests, ["full"])


def test_a_projector_of_another_width_is_refused(foundation):
    with pytest.raises(ValueError, match=r"takes width 16, the latents have 24"):
        NoisyLatentConditioner(load_language_model(foundation / "llava"), latent_dim=24, num_tokens=4)


def test_prompts_leave_room_for_the_latents_in_the_context(foundation):
    llm = load_language_model(foundation / "llava")
    assert llm.max_text_tokens == 48
    conditioner = NoisyLatentConditioner(llm, latent_dim=16, num_tokens=123)
    assert prepare(conditioner, ["a red circle and"]).prefix.ids.shape == (1, 5)
    with pytest.raises(ValueError, match="has 6 tokens; the context takes 5"):
        prepare(conditioner, ["a red circle and a"])
    with pytest.raises(ValueError, match="no room for a prompt beside 128 latent tokens"):
        NoisyLatentConditioner(load_language_model(foundation / "llava"), latent_dim=16, num_tokens=128)
