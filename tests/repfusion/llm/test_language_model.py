"""Folders as save_pretrained writes them -> a frozen language model, a projector, left-padded prompts."""

import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from repfusion.latents.statistics import LatentStatistics, TokenScale
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.llm.projector import Projector


@pytest.fixture
def llm(foundation) -> LanguageModel:
    return load_language_model(foundation / "llava")


def test_prompts_are_padded_on_the_left_and_begin_with_the_begin_token(llm):
    prefix = llm.tokenise(["a red circle", "", "blue"])
    word = llm.tokenizer.convert_tokens_to_ids
    begin, pad = word("<s>"), word("<pad>")
    assert prefix.ids.tolist() == [
        [begin, word("a"), word("red"), word("circle")],
        [pad, pad, pad, begin],
        [pad, pad, begin, word("blue")],
    ]
    assert prefix.mask.tolist() == [[True] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2]


def test_a_prompt_longer_than_the_context_is_refused(llm):
    fits = " ".join(["red"] * 47)
    assert llm.tokenise([fits]).ids.shape == (1, 48)
    with pytest.raises(ValueError, match=r"prompt 'red red .*'\.\.\. has 49 tokens; the context takes 48"):
        llm.tokenise(["a", fits + " red"])


def test_everything_is_frozen_in_eval_mode_and_the_vision_tower_is_left_out(llm, foundation):
    assert not any(p.requires_grad for p in llm.language_model.parameters())
    assert not llm.language_model.training
    assert not any(isinstance(module, CLIPVisionModel) for module in llm.modules())
    whole = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    assert sum(p.numel() for p in llm.parameters()) < sum(p.numel() for p in whole.parameters())


def test_weights_are_those_of_the_folder(llm, foundation):
    whole = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    for name, value in whole.model.language_model.state_dict().items():
        assert torch.equal(llm.language_model.state_dict()[name], value)
    features = torch.randn(2, 4, 16)
    torch.testing.assert_close(llm.projector(features), whole.model.multi_modal_projector(features))


def test_a_llava_made_elsewhere_loads_with_its_own_tokenizer(elsewhere):
    llm = load_language_model(elsewhere.mllm)
    whole = LlavaForConditionalGeneration.from_pretrained(elsewhere.mllm)
    width = whole.config.vision_config.hidden_size
    features = torch.randn(2, 3, width)
    torch.testing.assert_close(llm.projector(features), whole.model.multi_modal_projector(features))
    assert llm.width == 64
    assert llm.max_text_tokens == 96  # the tokenizer names no limit, the language model does

    prefix = llm.tokenise(["a red circle", "", "a photo of a blue square and a green cross"])
    tokenizer = AutoTokenizer.from_pretrained(elsewhere.mllm)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    firsts = [row[keep][0].item() for row, keep in zip(prefix.ids, prefix.mask, strict=True)]
    assert firsts == [begin] * 3
    assert prefix.mask[1].tolist() == [False] * (prefix.ids.shape[1] - 1) + [True]
    assert bool(prefix.mask[:, -1].all())  # on the left, though the tokenizer itself pads on the right
    said = tokenizer.decode(prefix.ids[2][prefix.mask[2]][1:]).strip()
    assert said == "a photo of a blue square and a green cross"


def test_a_tokenizer_without_begin_and_end_token_is_refused(foundation, tmp_path):
    folder = shutil.copytree(foundation / "llava", tmp_path / "llava")
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("bos_token", "eos_token")}))
    with pytest.raises(ValueError, match="begin"):
        load_language_model(folder)


def test_the_language_only_twin_loads_without_a_projector(foundation, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    LlamaForCausalLM(llava.config.text_config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(foundation / "llava").save_pretrained(tmp_path)
    twin = load_language_model(tmp_path)
    assert twin.projector is None
    assert twin.width == 32
    assert twin.digest != load_language_model(foundation / "llava").digest


def test_another_causal_language_model_loads(foundation, tmp_path):
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=30,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(foundation / "llava").save_pretrained(tmp_path)
    llm = load_language_model(tmp_path)
    assert (llm.width, llm.max_text_tokens) == (24, 30)


def test_weights_can_be_held_in_bfloat16(foundation):
    llm = load_language_model(foundation / "llava", torch.bfloat16)
    assert {p.dtype for p in llm.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in llm.projector.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config.json; expected a folder written by save_pretrained"),
        ({"model_type": "bert"}, r"model_type 'bert'; expected 'llava' or a causal language model"),
    ],
)
def test_other_folders_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_language_model(tmp_path)


def test_a_llava_that_reads_several_layers_is_refused(foundation, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    config = llava.config
    config.vision_feature_layer = [-2, -1]
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads layers \[-2, -1\] of its tower; expected a single layer"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_projector_takes_latents_for_what_they_are_of(bias, has_tokens):
    """Statistics that differ at each place; the scales of tokens are alike in all images, so that nothing of
    them is lost.
    """
    torch.manual_seed(0)
    places, width = 7, 32
    features = torch.randn(places, width) + (0.2 + torch.rand(places, width)) * torch.randn(50, places, width)
    tokens = TokenScale(*(3 * torch.rand(2, places)).expand(50, 2, -1).unbind(1)) if has_tokens else None
    statistics = LatentStatistics.empty(places, width)
    statistics.update(features, tokens)
    seen = tokens.std[..., None] * features + tokens.mean[..., None] if has_tokens else features
    projector = Projector(width, 48, bias=bias)
    with torch.no_grad():
        before = projector(seen)
        assert projector.scale is None
        projector.take_latents(statistics)
        after = projector(statistics.normalise(features))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    read = torch.addcmul(projector.shift, statistics.normalise(features), projector.scale)
    if bias:
        torch.testing.assert_close(read.mean((0, 1)), torch.zeros(width), atol=1e-4, rtol=0)
        torch.testing.assert_close(read.square().mean((0, 1)), torch.ones(width), atol=1e-3, rtol=0)


def test_a_projector_reads_latents_in_bfloat16_and_without_memory(foundation):
    statistics = LatentStatistics.empty(4, 16)
    statistics.update(torch.randn(4, 16) + torch.randn(30, 4, 16))
    latents = torch.randn(2, 4, 16)
    real, bare = load_language_model(foundation / "llava").projector, Projector(16, 32).to("meta")
    for projector in (real, bare):
        projector.take_latents(statistics)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = real(latents)
    assert (real(latents) - low).norm() < 0.02 * low.float().norm()
    assert bare(latents.to("meta")).shape == low.shape == (2, 4, 32)
    assert {name: one.shape for name, one in bare.state_dict().items()} == {
        name: one.shape for name, one in real.state_dict().items()
    }


@pytest.mark.parametrize("max_kept", [100_000, 20])
def test_two_threads_tokenise_at_once_and_get_the_same_ids(foundation, monkeypatch, max_kept):
    """As the thread that reads ahead and the evaluation of a training do; the kept prompts overflow too."""
    monkeypatch.setattr("repfusion.llm.base.MAX_CACHED_PROMPTS", max_kept)
    words = ["a", "red", "green", "blue", "circle", "square", "left", "of"]
    prompts = [" ".join(one) for one in itertools.product(words, repeat=3)]
    batches = [prompts[start : start + 8] for start in range(0, len(prompts), 8)]
    alone = load_language_model(foundation / "llava")
    expected = [alone.tokenise(batch).ids for batch in batches]
    together = load_language_model(foundation / "llava")
    both = threading.Barrier(2)

    def tokenise(order: list[int]) -> dict[int, torch.Tensor]:
        both.wait()
        return {i: together.tokenise(batches[i]).ids for _ in range(3) for i in order}

    forwards, backwards = list(range(len(batches))), list(range(len(batches)))[::-1]
    with ThreadPoolExecutor(1) as executor:
        ahead = executor.submit(tokenise, backwards)
        found = tokenise(forwards), ahead.result()
    for ids in found:
        assert all(torch.equal(ids[i], one) for i, one in enumerate(expected))


def test_of_a_prefix_the_first_prompts_are_read_on_from_alone(llm):
    """And the whole stays: taking them copies no more than it must."""
    prefix = llm.tokenise(["a red circle", "blue", ""])
    tokens = torch.randn(3, 2, llm.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one in (prefix, llm.remember(prefix)):
            whole = llm.read_on(one, tokens)
            torch.testing.assert_close(llm.read_on(one.first(2), tokens[:2]), whole[:2], atol=1e-5, rtol=1e-5)
            assert torch.equal(llm.read_on(one, tokens), whole)
