"""GILL against slow references: what the mapper reads and learns, what retrieval compares, what trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prompting import asked, training_inputs
from slow_layers import attend, attended, fed, keys_values, rms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlavaForConditionalGeneration

from repfusion.conditioning.related.gill import GillConfig, GillMapper, QueryDecoderBlock, contrasted
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.flops.count import sample_flops, train_flops
from repfusion.model.build import build_model
from repfusion.model.check import check_model
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint
from repfusion.weights import WEIGHTS

PROMPTS = ["a red circle", "two blue square left of a green circle", "green", ""]
ENCODER = WEIGHTS / "language"


@pytest.fixture(scope="module")
def model(foundation: Path, statistics) -> TextToImage:
    """A small language model before the shipped text reader as text encoder."""
    torch.manual_seed(0)
    method = GillConfig(
        second=ENCODER, num_queries=12, num_image_tokens=3, width=16, depth=1, retrieval_width=8
    )
    config = ModelConfig.model_validate(
        {
            "conditioning": method,
            "mllm": foundation / "llava",
            "encoder": {"path": foundation / "vision_tower"},
            "decoder": foundation / "decoder",
            "dit": {"hidden_size": 24, "depth": 1, "num_heads": 2},
        }
    )
    return build_model(config, statistics).eval()


def decoded(block: QueryDecoderBlock, tokens: list[Tensor], memory: list[Tensor]) -> list[Tensor]:
    """A decoder block over tokens one by one."""
    among, attention = block.among, block.memory_attention
    found = attended(among.attention, [rms(x, among.attention_norm.weight) for x in tokens])
    tokens = [x + y for x, y in zip(tokens, found, strict=True)]
    heads = attention.num_heads
    known = [
        keys_values(attention.key_value.weight @ one, attention.key_norm.weight, heads, None)
        for one in memory
    ]
    after = []
    for token in tokens:
        mixed = []
        asked_for = attention.query.weight @ rms(token, block.memory_norm.weight)
        for head, query in enumerate(asked_for.reshape(heads, -1)):
            query = rms(query, attention.query_norm.weight)
            scores = torch.stack([query @ one[head][0] for one in known]) / len(query) ** 0.5
            mixed.append(sum(w * one[head][1] for w, one in zip(scores.softmax(0), known, strict=True)))
        token = token + attention.out.weight @ torch.cat(mixed) + attention.out.bias
        after.append(token + fed(among.mlp, rms(token, among.mlp_norm.weight)))
    return after


def test_the_mapper_equals_a_slow_reference():
    torch.manual_seed(0)
    config = GillConfig(second=ENCODER, num_queries=5, width=16, depth=2)
    mapper = GillMapper(24, 20, config).double()
    with torch.no_grad():
        for parameter in mapper.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        given = torch.randn(2, 3, 24, dtype=torch.float64)
        for row, found in zip(given, mapper(given), strict=True):
            memory = [mapper.enter.weight @ one + mapper.enter.bias for one in row]
            for block in mapper.encoder:
                memory = attend(block, memory)
            memory = [rms(one, mapper.encoder_norm.weight) for one in memory]
            tokens = list(mapper.queries)
            for block in mapper.decoder:
                tokens = decoded(block, tokens, memory)
            normed = [rms(one, mapper.decoder_norm.weight) for one in tokens]
            expected = torch.stack([mapper.leave.weight @ one + mapper.leave.bias for one in normed])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_mapper_has_the_size_of_torchs_own_transformer():
    """Four and four layers of width 512 between OPT-6.7B's 4096 channels and CLIP's 768."""
    with torch.device("meta"):
        mapper = GillMapper(4096, 768, GillConfig(second=ENCODER))
        ends = torch.nn.Linear(4096, 512), torch.nn.Linear(512, 768)
        parts = torch.nn.ModuleList([torch.nn.Transformer(512, 4, 4, 4, 2048), *ends])
    expected = 77 * 512 + sum(p.numel() for p in parts.parameters())
    assert sum(p.numel() for p in mapper.parameters()) == pytest.approx(expected, rel=0.02)


def states_of_encoder(model: TextToImage, prompt: str) -> Tensor:
    """The shipped reader's own states of a prompt, its end tokens included, by transformers."""
    encoder = model.conditioner.encoder
    reader = AutoModelForCausalLM.from_pretrained(ENCODER, dtype=torch.float32).model.eval()
    row = [encoder.begin_id, *encoder.token_ids([prompt])[0]]
    ids = torch.tensor([row + [encoder.end_id] * (12 - len(row))])
    with torch.no_grad():
        return reader(input_ids=ids).last_hidden_state[0]


def test_the_generator_sees_the_text_encoder_in_training_and_the_mapper_in_sampling(model):
    conditioner = model.conditioner
    requests, branches = asked(PROMPTS)
    with torch.no_grad():
        shown = conditioner.prepare(conditioner.collate(requests, branches, [1, 2, 3, 4])).static[0].tokens
        drawn = conditioner.prepare(conditioner.collate(requests, branches)).static[0].tokens
        for row, prompt in enumerate(PROMPTS):
            expected = states_of_encoder(model, prompt)
            torch.testing.assert_close(shown[row], expected, rtol=1e-3, atol=1e-3)
            if not prompt:
                torch.testing.assert_close(drawn[row], expected, rtol=1e-3, atol=1e-3)
                continue
            llm = conditioner.llm
            ids = torch.tensor([llm.framed(llm.token_ids([prompt])[0])])
            image_tokens = conditioner.image_tokens
            whole = torch.cat([llm.embed(ids), image_tokens[None]], dim=1)
            states = llm.language_model(inputs_embeds=whole).last_hidden_state[:, -3:]
            mapped = conditioner.mapper(states + image_tokens)[0]
            torch.testing.assert_close(drawn[row], mapped, rtol=1e-4, atol=1e-4)


def test_image_tokens_have_the_mean_norm_of_all_embeddings(model):
    table = model.conditioner.llm.language_model.get_input_embeddings().weight
    norms = model.conditioner.image_tokens.norm(dim=1)
    torch.testing.assert_close(norms, table.norm(dim=1).mean().expand(3))
    head = model.conditioner.llm.head.weight
    norms = model.conditioner.scored_tokens.norm(dim=1)
    torch.testing.assert_close(norms, head.norm(dim=1).mean().expand(3))


def test_the_losses_are_what_the_paper_says(model, foundation):
    """Un-squared distances, none of a dropped prompt; captions and [IMG] tokens by transformers' model."""
    conditioner = model.conditioner
    inputs = training_inputs(model, PROMPTS, range(4), model.shift)
    latents = model.normalise(inputs["features"])
    request = inputs["request"]
    with torch.no_grad():
        losses = conditioner.losses(request, latents)
        states = conditioner.read_image_tokens(conditioner.llm.tokenise(PROMPTS))
        mapped = conditioner.mapper(states + conditioner.image_tokens)
    llava = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    language = LlamaForCausalLM(llava.config.text_config).eval()
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    llm = conditioner.llm
    for row, prompt in enumerate(PROMPTS):
        gaps = mapped[row] - states_of_encoder(model, prompt)
        distance = torch.stack([gap.square().sum().sqrt() for gap in gaps]).mean()
        expected = distance if prompt else torch.tensor(0.0)
        torch.testing.assert_close(losses["embedding"][row], expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            ids = torch.tensor([[*llm.token_ids([prompt])[0], llm.end_id]])
            visual = conditioner.see(latents[row].mean(0)).reshape(1, 4, -1)
            whole = torch.cat([llm.embed(torch.tensor([[llm.begin_id]])), visual, llm.embed(ids)], dim=1)
            vocabulary = torch.cat([language.lm_head.weight, conditioner.scored_tokens])
            found = language.model(inputs_embeds=whole).last_hidden_state[0, 4:-1] @ vocabulary.T
            said = torch.nn.functional.cross_entropy(found, ids[0])
            torch.testing.assert_close(losses["caption"][row], said, rtol=1e-4, atol=1e-4)
            called = called_tokens(conditioner, language, prompt)
            torch.testing.assert_close(losses["image_tokens"][row], 0.5 * called, rtol=1e-4, atol=1e-4)


def called_tokens(conditioner, language: LlamaForCausalLM, prompt: str) -> Tensor:
    """How well a caption calls for its image, token by token: all [IMG] tokens after it, none before."""
    llm, image_tokens = conditioner.llm, conditioner.image_tokens
    text = [llm.begin_id, *llm.token_ids([prompt])[0]]
    rows = torch.cat([llm.embed(torch.tensor([text]))[0], image_tokens])
    states = language.model(inputs_embeds=rows[None]).last_hidden_state[0]
    due, undue = [], [torch.zeros(())]
    for place, state in enumerate(states[:-1]):
        known, own = language.lm_head.weight @ state, conditioner.scored_tokens @ state
        every = torch.cat([known, own]).softmax(0)
        if place < len(text) - 1:
            undue.append(-every[: len(known)].sum().log())
        else:
            due.append(-every[len(known) + place - len(text) + 1].log())
    assert len(due) == len(image_tokens)
    return torch.stack(due).mean() + torch.stack(undue).sum() / max(len(undue) - 1, 1)


def test_retrieval_is_infonce_both_ways():
    torch.manual_seed(0)
    texts, images = (torch.nn.functional.normalize(torch.randn(3, 8), dim=1) for _ in range(2))
    found = contrasted(texts, images, torch.tensor([7.0]))
    for row in range(3):
        there = torch.stack([7 * texts[row] @ image for image in images])
        back = torch.stack([7 * text @ images[row] for text in texts])
        expected = (there.logsumexp(0) - there[row] + back.logsumexp(0) - back[row]) / 2
        torch.testing.assert_close(found[row], expected)


def test_nothing_of_either_language_model_trains(model):
    model.zero_grad()
    inputs = training_inputs(model, PROMPTS, range(4), model.shift)
    torch.stack([one.mean() for one in model(inputs).values()]).sum().backward()
    conditioner = model.conditioner
    for llm in conditioner.language_models:
        assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(model.trainable_state())
    assert bool((conditioner.rows.grad.norm(dim=1) > 0).all())


def test_a_prompt_that_the_text_encoder_cannot_hold_is_named(model):
    with pytest.raises(ValueError, match="has 14 tokens; the context takes 12"):
        model.conditioner.collate(*asked(["red " * 13]))


@pytest.mark.slow
def test_images_are_retrieved_by_their_captions_once_learned(model):
    """Recall at one over four pairs, and the mapper nearer to the text encoder than at first."""
    prompts = ["a red circle", "two blue square", "a green circle left of a blue square", "green"]
    inputs = training_inputs(model, prompts, range(4), model.shift)
    latents = model.normalise(inputs["features"])
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3)
    first = None
    for _ in range(60):
        losses = {name: one.mean() for name, one in model(inputs).items()}
        first = losses["embedding"].item() if first is None else first
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
    conditioner = model.conditioner
    with torch.no_grad():
        texts = conditioner.text_embeddings(conditioner.read_image_tokens(conditioner.llm.tokenise(prompts)))
        scores = texts @ conditioner.image_embeddings(latents).T
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == [0, 1, 2, 3]
    assert losses["embedding"] < 0.7 * first


def flops_of(work: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.slow
def test_flops_of_training_and_of_an_image_are_counted_exactly(model):
    prompts = ["a red circle", "a green square"]
    inputs = training_inputs(model, prompts, [1, 2], model.shift)

    def step() -> None:
        torch.stack([one.mean() for one in model(inputs).values()]).sum().backward()

    assert flops_of(step) == 2 * train_flops(model, 4)
    model.requires_grad_(False)
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, precision="fp32")
    noise = torch.randn(2, *model.latent_shape)
    got = flops_of(lambda: sample(model, asked(prompts)[0], noise, config))
    assert got == 2 * sample_flops(model, 4, config)
    for parameter in (*model.denoiser.parameters(), *trained_of(model.conditioner)):
        parameter.requires_grad_(True)


def trained_of(conditioner: torch.nn.Module) -> list[torch.nn.Parameter]:
    frozen = {id(p) for llm in conditioner.language_models for p in llm.parameters()}
    return [p for p in conditioner.parameters() if id(p) not in frozen]


def test_a_checkpoint_draws_what_its_model_draws(model, tmp_path):
    """It names the text encoder's folder and digest, and holds what trains alone."""
    save_checkpoint(tmp_path / "step_00000001", model, model.trainable_state(), step=1)
    again = load_checkpoint(tmp_path / "step_00000001")
    assert again.config.parts()["conditioning.second"] == ENCODER
    requests, config = asked(PROMPTS)[0], SamplerConfig(num_steps=2)
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(model, requests, noise, config), sample(again, requests, noise, config))


def test_what_is_checked_is_the_model_that_is_built(model):
    bare = check_model(model.config)
    assert {name: p.shape for name, p in bare.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
