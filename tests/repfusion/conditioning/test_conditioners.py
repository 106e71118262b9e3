"""RepFusion's condition reads prompt, noisy latents and noise level, causally; TextEmbed's the prompt."""

import pytest
import torch

from repfusion.conditioning.noisy_latents import NoisyLatentConditioner, Prefix
from repfusion.conditioning.text_embed import encode_text
from repfusion.llm.load import load_language_model

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]
CPU = torch.device("cpu")


@pytest.fixture
def latents(statistics) -> torch.Tensor:
    shape = (3, *statistics.mean.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


T = torch.tensor([0.2, 0.5, 0.9])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_repfusions_condition_follows_latents_noise_level_and_prompt(make_generator, latents):
    conditioner = make_generator().conditioner
    prefix = conditioner.prepare(PROMPTS, CPU)
    before = conditioner.condition(prefix, latents, T)
    assert before.mask is None
    assert before.tokens.shape == (3, 4, 32)
    assert difference(conditioner.condition(prefix, latents + 0.5, T).tokens, before.tokens) > 1e-2
    assert difference(conditioner.condition(prefix, latents, T / 2).tokens, before.tokens) > 1e-2
    other = conditioner.prepare(["a green circle", *PROMPTS[1:]], CPU)
    rows = (conditioner.condition(other, latents, T).tokens - before.tokens).abs().amax(dim=(1, 2))
    assert rows[0] > 1e-4 and rows[1:].max() < 1e-5


def test_the_noise_level_has_no_effect_before_training(make_generator, latents):
    """e_t starts at zero, so that the projector first sees what it was pretrained on, but for noise."""
    conditioner = make_generator(awake=False).conditioner
    prefix = conditioner.prepare(PROMPTS, CPU)
    assert torch.equal(
        conditioner.condition(prefix, latents, T).tokens, conditioner.condition(prefix, latents, T / 2).tokens
    )


def test_text_embeds_condition_is_static(make_generator, latents):
    conditioner = make_generator("text_embed").conditioner
    prefix = conditioner.prepare(PROMPTS, CPU)
    before = conditioner.condition(prefix, latents, T)
    after = conditioner.condition(prefix, latents + 1, T / 2)
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.mask, after.mask)
    assert before.mask.sum(1).tolist() == [4, 9, 1]
    other = conditioner.condition(conditioner.prepare(["a green circle", *PROMPTS[1:]], CPU), latents, T)
    assert difference(before.tokens[0, :4], other.tokens[0, :4]) > 1e-3


def test_the_cached_prefix_gives_the_uncached_condition_at_every_step(make_generator, latents):
    conditioner = make_generator().conditioner
    cached, plain = conditioner.prepare(PROMPTS, CPU, reuse=True), conditioner.prepare(PROMPTS, CPU)
    with torch.no_grad():
        for step in range(3):
            z_t, t = latents * (1 + step), T / (1 + step)
            expected = conditioner.condition(plain, z_t, t).tokens
            torch.testing.assert_close(
                conditioner.condition(cached, z_t, t).tokens, expected, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("conditioning", ["noisy_latents", "text_embed"])
@pytest.mark.parametrize("reuse", [False, True])
def test_padding_does_not_change_a_prompts_condition(make_generator, latents, conditioning, reuse):
    conditioner = make_generator(conditioning).conditioner
    with torch.no_grad():
        batch = conditioner.condition(conditioner.prepare(PROMPTS, CPU, reuse), latents, T)
        for row, prompt in enumerate(PROMPTS):
            prefix = conditioner.prepare([prompt], CPU, reuse)
            alone = conditioner.condition(prefix, latents[row : row + 1], T[row : row + 1]).tokens[0]
            together = batch.tokens[row] if batch.mask is None else batch.tokens[row][batch.mask[row]]
            torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_training_gives_the_llm_no_mask_and_never_looks_at_padding(make_generator, latents):
    """Flash attention takes no mask; that padding has no effect is then up to its place."""
    conditioner = make_generator().conditioner
    masks = []
    conditioner.llm.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    prefix = conditioner.prepare(PROMPTS, CPU)
    assert not prefix.mask.all()
    other = Prefix(torch.where(prefix.mask, prefix.ids, 7), prefix.mask)
    assert not torch.equal(other.ids, prefix.ids)
    before, after = (conditioner.condition(one, latents, T).tokens for one in (prefix, other))
    assert masks == [None, None]
    assert torch.equal(before, after)


def test_gradients_do_not_depend_on_padding(make_generator, latents):
    conditioner = make_generator().conditioner
    weight = conditioner.projector.linear_1.weight

    def gradient(prompts: list[str], rows: slice) -> torch.Tensor:
        tokens = conditioner.condition(conditioner.prepare(prompts, CPU), latents[rows], T[rows]).tokens
        return torch.autograd.grad(tokens.square().sum(), weight)[0]

    together = gradient(PROMPTS, slice(3))
    alone = sum(gradient([prompt], slice(i, i + 1)) for i, prompt in enumerate(PROMPTS))
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("token", range(4))
def test_visual_tokens_are_read_causally(make_generator, latents, token):
    conditioner = make_generator().conditioner
    prefix = conditioner.prepare(PROMPTS, CPU)
    changed = latents.clone()
    changed[:, token] += 1
    before, after = (conditioner.condition(prefix, z_t, T).tokens for z_t in (latents, changed))
    per_token = (before - after).abs().amax(dim=(0, 2))
    assert per_token[:token].sum() == 0
    assert (per_token[token:] > 1e-5).all()
    assert per_token[token] > 1e-2


def test_the_condition_is_the_language_models_last_state_after_text_and_projected_latents(
    make_generator, latents
):
    """Written out for one prompt: LLM([y, P(z_t + e_t)]), the last n positions."""
    conditioner = make_generator().conditioner
    mllm = conditioner.llm
    ids, _ = mllm.tokenize(PROMPTS[:1])
    z_t, t = latents[:1], T[:1]
    visual = conditioner.projector(z_t + conditioner.time(t)[:, None])
    embedded = torch.cat([mllm.language_model.embed_tokens(ids), visual], dim=1)
    expected = mllm.language_model(inputs_embeds=embedded).last_hidden_state[:, -4:]
    got = conditioner.condition(conditioner.prepare(PROMPTS[:1], CPU), z_t, t).tokens
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_pass_the_frozen_model_to_projector_and_time_embedding(make_generator, latents):
    conditioner = make_generator().conditioner
    conditioner.condition(conditioner.prepare(PROMPTS, CPU), latents, T).tokens.square().sum().backward()
    for module in (conditioner.projector, conditioner.time):
        assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert all(p.grad is None for p in conditioner.llm.parameters())


def test_precomputed_text_features_stand_for_their_prompts(make_generator, latents):
    conditioner = make_generator("text_embed").conditioner
    features = encode_text(conditioner.llm, PROMPTS)
    assert [len(row) for row in features] == [4, 9, 1]
    from_text = conditioner.prepare(PROMPTS, CPU)
    mixed = conditioner.prepare([features[0].half().float(), PROMPTS[1], features[2]], CPU)
    assert torch.equal(mixed.mask, from_text.mask)
    torch.testing.assert_close(mixed.features, from_text.features, atol=1e-2, rtol=1e-2)
    assert torch.equal(mixed.features[1], from_text.features[1])


def test_text_features_of_another_model_are_refused(make_generator):
    conditioner = make_generator("text_embed").conditioner
    with pytest.raises(ValueError, match=r"width 20, the LLM has 32; re-run 'features'"):
        conditioner.prepare([torch.zeros(3, 20)], CPU)


def test_a_projector_of_another_width_is_refused(foundation):
    with pytest.raises(ValueError, match=r"takes width 16, the latents have 24"):
        NoisyLatentConditioner(load_language_model(foundation / "llava"), latent_dim=24, num_tokens=4)


def test_prompts_leave_room_for_the_latents_in_the_context(foundation):
    mllm = load_language_model(foundation / "llava")
    assert mllm.max_text_tokens == 48
    conditioner = NoisyLatentConditioner(mllm, latent_dim=16, num_tokens=123)
    assert conditioner.prepare(["a red circle and"], CPU).ids.shape == (1, 5)
    with pytest.raises(ValueError, match="has 6 tokens; the context takes 5"):
        conditioner.prepare(["a red circle and a"], CPU)
    with pytest.raises(ValueError, match="no room for a prompt beside 128 latent tokens"):
        NoisyLatentConditioner(load_language_model(foundation / "llava"), latent_dim=16, num_tokens=128)
