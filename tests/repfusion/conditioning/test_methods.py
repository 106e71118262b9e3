"""What each conditioning method reads, when, and what it refuses."""

from pathlib import Path

import pytest
import torch
from prompting import asked, condition_tokens, prepare, read_prompts, seeds_where
from pydantic import ValidationError
from tiny_training import METHODS, make_foundation, sparing, tiny_model, tiny_train
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from repfusion.conditioning.captioning import CaptionBatch, CaptioningConfig, caption_batch, caption_losses
from repfusion.conditioning.noisy_latents import NoisyLatentsConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig
from repfusion.diffusion.flow import CAPTIONED
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel, see_each_other
from repfusion.llm.load import load_language_model
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.runs.folder import checkpoint_folder
from repfusion.train import train

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]
T = torch.tensor([0.9, 0.3, 0.6])


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))


def tokens(
    generator: TextToImage, z_t: torch.Tensor, t: torch.Tensor = T, reuse: bool = False
) -> torch.Tensor:
    with torch.no_grad():
        prepared = prepare(generator.conditioner, PROMPTS, reuse)
        return condition_tokens(generator.conditioner, prepared, z_t, t).tokens


def changes(generator: TextToImage, latents: torch.Tensor) -> tuple[bool, bool]:
    """Whether the condition moves with the noisy latents, and with the noise level."""
    before = tokens(generator, latents)
    moved = tokens(generator, latents + 0.5), tokens(generator, latents, T / 2)
    return tuple(bool((after - before).abs().max() > 1e-3) for after in moved)


def count_reads(generator: TextToImage) -> list[int]:
    """Filled with the number of tokens of each pass through the language model from now on."""
    reads: list[int] = []
    generator.conditioner.llm.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: reads.append((args or (kwargs["hidden_states"],))[0].shape[1]),
        with_kwargs=True,
    )
    return reads


@pytest.mark.parametrize(
    ("method", "expected"),
    {
        "noisy_latents": (True, True),
        "noisy_latents_cross": (True, True),
        "noisy_latents_trained": (True, True),
        "text_embed": (False, False),
        "text_embed_in_context": (False, False),
        "lap": (False, False),
        "noisy_latents_lap": (True, True),
        "queries": (False, False),
        "queries_timestep": (False, True),
        "queries_connector": (False, False),
        "transfusion": (True, True),
        "one_layer": (False, False),
        "channel_concat": (False, False),
        "all_layers": (False, False),
        "hidden_injection": (False, False),
        "layer_per_block": (False, False),
        "key_values": (False, False),
        "metaquery": (False, False),
        "blip3o": (False, False),
        "li_dit": (False, True),
    }.items(),
)
def test_what_a_condition_depends_on(make_generator, latents, method, expected):
    assert changes(make_generator(method), latents) == expected


@pytest.mark.parametrize("method", sparing(METHODS))
def test_what_is_computed_once_changes_nothing(make_generator, latents, method):
    generator = make_generator(method)
    with torch.no_grad():
        kept = read_prompts(generator, PROMPTS, reuse=True)
        for z_t, t in ((latents, T), (2 * latents, T / 3)):
            plain = generator.velocity(z_t, t, read_prompts(generator, PROMPTS))
            torch.testing.assert_close(generator.velocity(z_t, t, kept), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", sparing(METHODS))
@pytest.mark.parametrize("reuse", [False, True])
def test_the_first_prompts_of_a_batch(make_generator, latents, method, reuse):
    """They give what reading fewer prompts gives, and taking them leaves the batch as it was."""
    generator = make_generator(method)
    with torch.no_grad():
        prompts = read_prompts(generator, PROMPTS, reuse)
        whole = generator.velocity(latents, T, prompts)
        part = generator.velocity(latents[:2], T[:2], prompts.first(2))
        fewer = generator.velocity(latents[:2], T[:2], read_prompts(generator, PROMPTS[:2], reuse))
        torch.testing.assert_close(part, fewer, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part, whole[:2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(generator.velocity(latents, T, prompts), whole)


def test_static_queries_are_read_once_and_timestep_queries_at_every_step(make_generator, latents):
    for method, expected in (("queries", [9, 4]), ("queries_timestep", [9, 4, 4, 4])):
        generator = make_generator(method)
        reads = count_reads(generator)
        with torch.no_grad():
            prompts = read_prompts(generator, PROMPTS, reuse=True)
            for t in (T, T / 2, T / 4):
                generator.velocity(latents, t, prompts)
        # the longest prompt has 8 words and the begin token; there are 4 latent tokens, so 4 queries
        assert reads[: len(expected)] == expected and len(reads) == len(expected)


def test_at_the_start_the_noise_level_does_not_move_queries(make_generator, latents):
    generator = make_generator("queries_timestep", awake=False)
    assert torch.equal(tokens(generator, latents), tokens(generator, latents, T / 2))


def test_connector_reads_all_queries_in_both_directions(make_generator, latents):
    """The first output moves with the last query, which the causal language model hides from it."""
    plain = make_generator("queries")
    both = {}
    for name, generator in (("plain", plain), ("connector", make_generator("queries_connector"))):
        with torch.no_grad():
            before = tokens(generator, latents, reuse=True)
            generator.conditioner.queries[-1] += 1.0
            after = tokens(generator, latents, reuse=True)
        both[name] = (after - before).abs().amax(dim=(0, 2)) > 1e-4
    assert both["plain"].tolist() == [False, False, False, True]
    assert both["connector"].tolist() == [True, True, True]


def test_adaln_pairs_queries_with_latents(foundation):
    llm = load_language_model(foundation / "llava")
    with pytest.raises(ValueError, match="num_queries is 3, the latents are 4 tokens: interface adaln"):
        QueriesConditioner(llm, 4, QueriesConfig(num_queries=3))


def test_queries_leave_room_in_the_context(foundation):
    llm = load_language_model(foundation / "llava")
    with pytest.raises(ValueError, match="context of 128 leaves no room for a prompt beside 128"):
        QueriesConditioner(llm, 4, QueriesConfig(num_queries=128, interface="cross_attention"))


@pytest.mark.parametrize("method", ["noisy_latents", "noisy_latents_trained", "transfusion"])
def test_visual_tokens_see_each_other_where_the_method_says_so(make_generator, latents, method):
    generator = make_generator(method)
    before = tokens(generator, latents)
    changed = latents.clone()
    changed[:, -1] += 1.0
    moved = (tokens(generator, changed) - before).abs().amax(dim=2) > 1e-4
    is_causal = method == "noisy_latents"
    assert moved.tolist() == [[not is_causal, not is_causal, not is_causal, True]] * 3


def test_the_prompt_stays_causal_and_padding_unseen():
    seen = see_each_other(torch.tensor([[2], [1]]), num=2, length=5)[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_transfusion_has_no_dit_and_its_velocity_is_a_projection_of_the_llms_outputs(make_generator, latents):
    generator = make_generator("transfusion")
    assert {name.split(".")[1] for name in generator.trainable_state() if name.startswith("denoiser.")} == {
        "norm",
        "out",
    }
    states = tokens(generator, latents)
    rms = states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    head = generator.denoiser
    expected = states * rms * head.norm.weight @ head.out.weight.T + head.out.bias
    with torch.no_grad():
        got = generator.velocity(latents, T, read_prompts(generator, PROMPTS))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def all_captioned(llm: LanguageModel) -> CaptionBatch:
    return caption_batch(llm, PROMPTS, [0, 1, 2], CaptioningConfig(share=1.0))


def said(generator: TextToImage, latents: torch.Tensor, captions: CaptionBatch) -> torch.Tensor:
    """The loss of each caption after its clean latents."""
    conditioner = generator.conditioner
    visual = conditioner.project(latents, torch.zeros(len(latents)))
    return caption_losses(conditioner.llm, visual, captions, conditioner.bidirectional)


def test_caption_loss_is_the_language_models_own(make_generator, latents, foundation):
    """Against transformers' loss on the same tokens, one caption at a time, causal as LLaVA is."""
    generator = make_generator("noisy_latents_trained", awake=False)
    generator.conditioner.bidirectional = False
    llm = generator.conditioner.llm
    with torch.no_grad():
        got = said(generator, latents, all_captioned(llm))
        llava = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
        embed = llava.get_input_embeddings()
        tokenizer = AutoTokenizer.from_pretrained(foundation / "llava")
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([[*tokenizer(prompt, add_special_tokens=False).input_ids, 2]])
            visual = generator.conditioner.projector(latents[row : row + 1])
            rows = torch.cat([embed(torch.tensor([[1]])), visual, embed(ids)], dim=1)
            labels = torch.cat([torch.full((1, 5), -100), ids], dim=1)
            language = LlamaForCausalLM(llava.config.text_config).eval()
            language.model, language.lm_head = llava.model.language_model, llava.lm_head
            torch.testing.assert_close(got[row], language(inputs_embeds=rows, labels=labels).loss)
    assert llm.end_id == 2 and llm.begin_id == 1


def test_captioned_samples_are_drawn_by_chance_and_weighted_to_the_whole(foundation):
    llm = load_language_model(foundation / "llava")
    config = CaptioningConfig(weight=0.2, share=0.5)
    seeds = seeds_where(CAPTIONED, 0.5, [True, False, True])
    batch = caption_batch(llm, ["a", "red", "a red circle"], seeds, config)
    assert batch.rows.tolist() == [0, 2] and batch.weights.tolist() == pytest.approx([0.4, 0.4])
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    none = caption_batch(llm, ["a", "red"], seeds_where(CAPTIONED, 0.5, [False, False]), config)
    assert none.rows.tolist() == [0] and none.weights.tolist() == [0.0]


def test_captions_do_not_depend_on_what_conditions(make_generator, latents):
    """A sample whose prompt was dropped is captioned with that prompt all the same."""
    conditioner = make_generator("noisy_latents_trained").conditioner
    requests, seeds = (
        [Request(prompt) for prompt in PROMPTS],
        seeds_where(CAPTIONED, 0.5, [True, False, True]),
    )
    full, none = (conditioner.collate(requests, [branch] * 3, seeds) for branch in ("full", "none"))
    assert none["prefix"].ids.tolist() == [[conditioner.llm.begin_id]] * 3
    assert none["captions"].ids.shape == (2, 4)
    assert all(torch.equal(*pair) for pair in zip(*map(tensors_of, (full, none)), strict=True))
    losses = [conditioner.losses(inputs, latents)["caption"] for inputs in (full, none)]
    assert torch.equal(*losses)
    assert losses[0][0] > 0.1 and losses[0][1] == 0 and losses[0][2] > 0.1


def tensors_of(inputs: Inputs) -> list[torch.Tensor]:
    captions = inputs["captions"]
    return [captions.rows, captions.weights, captions.ids, captions.mask]


def test_in_sampling_nothing_is_captioned(make_generator):
    conditioner = make_generator("noisy_latents_trained").conditioner
    assert conditioner.collate(*asked(PROMPTS)).keys() == {"prefix"}


def test_a_caption_is_told_apart_from_another_once_learned(make_generator, latents):
    generator = make_generator("noisy_latents_trained", awake=False)
    optimizer = torch.optim.AdamW(generator.trainable_state().values(), lr=3e-3)
    captions = all_captioned(generator.conditioner.llm)
    for _ in range(60):
        loss = said(generator, latents, captions).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = said(generator, latents, captions)
        wrong = said(generator, latents.roll(1, 0), captions)
    assert right.max() < 0.3 and (wrong > right + 0.5).all()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("method", ["noisy_latents_trained", "transfusion"])
def test_a_trained_llm_under_the_engine(foundation, columns, tmp_path, method, stage):
    """It changes, its checkpoint holds it, and the caption loss is reported apart."""
    model, reports = tiny_model(foundation, method), []
    engine = {"zero_stage": stage}
    config = tiny_train(foundation, columns, tmp_path / "run", engine, model=model, ema_decay=0.0)
    train(config, on_report=reports.append)
    assert all(report.other_losses["caption"] > 0.1 and report.loss > 0.5 for report in reports)
    folder = checkpoint_folder(tmp_path / "run" / "checkpoints", 4)
    trained = load_checkpoint(folder).conditioner.llm
    first = load_language_model(model.mllm, with_head=True)
    assert not trained.is_frozen
    for part in ("language_model", "head"):
        before, after = getattr(first, part).state_dict(), getattr(trained, part).state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in before if "inv_freq" not in name)


@pytest.mark.slow
def test_tied_embeddings_are_trained_once(tmp_path: Path, columns):
    """As in Llama-3.2-1B: the head is the embedding table."""
    foundation = make_foundation(tmp_path / "foundation")
    tokenizer = AutoTokenizer.from_pretrained(foundation / "llava")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(text).save_pretrained(foundation / "language")
    tokenizer.save_pretrained(foundation / "language")
    conditioning = METHODS["noisy_latents_trained"]
    model = tiny_model(foundation).model_dump() | {
        "mllm": foundation / "language",
        "conditioning": conditioning,
    }
    config = tiny_train(foundation, columns, tmp_path / "run", model=model, num_steps=2)
    train(config)
    llm = load_checkpoint(checkpoint_folder(tmp_path / "run" / "checkpoints", 2)).conditioner.llm
    assert llm.head is not None and llm.head.weight is llm.language_model.embed_tokens.weight


def test_a_method_is_named_or_described():
    short, long = (ModelConfig(conditioning=one) for one in ("queries", {"method": "queries"}))
    assert short == long and isinstance(short.conditioning, QueriesConfig)
    assert ModelConfig.model_validate(long.model_dump(mode="json")) == long
    assert ModelConfig(conditioning={"method": "queries", "reads_time": True}).describe() == (
        "queries (reads_time True), DiT 6 x 192"
    )
    assert ModelConfig(conditioning="transfusion").describe() == "transfusion, no DiT"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": "query"}, "noisy_latents.*text_embed.*queries.*transfusion"),
        ({"conditioning": {"method": "text_embed", "reads_time": True}}, "reads_time"),
        ({"conditioning": {"method": "noisy_latents", "captioning": {}}}, "it needs train_llm: true"),
        ({"conditioning": "transfusion", "mllm_dtype": "bfloat16"}, "set mllm_dtype: float32"),
    ],
)
def test_a_mistake_in_a_method_is_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


def test_repfusion_is_the_default():
    assert ModelConfig().conditioning == NoisyLatentsConfig()
    assert not ModelConfig().conditioning.trains_llm and ModelConfig().captioning is None
