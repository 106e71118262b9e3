"""Chats read and answered: the hidden states and the tokens of transformers' own forward and generate."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_causal
from tiny_vlms import CHATS, CONTEXT, Seeing, class_of, picture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repfusion.conditioning.lap import LapConditioner, LapConfig, LapSettings
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.conditioning.queries import QueriesConditioner
from repfusion.conditioning.text_embed import TextEmbedConditioner
from repfusion.flops.count import eyes_cost
from repfusion.flops.counter import Cost
from repfusion.inputs import map_tensors
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import Writing, end_ids, read_chats, write
from repfusion.llm.load import load_language_model
from repfusion.request import Request
from repfusion.weights import WEIGHTS

ALL = tuple(range(4))
"""The embeddings and three layers."""
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@torch.no_grad()
def expected_states(seeing: Seeing, chats: list[Chat]) -> tuple[Tensor, ...]:
    """What transformers' own forward gives of what its own processor makes of chats."""
    return seeing.whole(**seeing.inputs(chats), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("chat", CHATS)
def test_hidden_states_are_those_of_transformers_own_forward(chat, seeing: Seeing):
    chats = [CHATS[chat]]
    found = read_chats(seeing.llm, tokenise_chats(seeing.llm, chats), ALL)
    for state, expected in zip(found, expected_states(seeing, chats), strict=True):
        torch.testing.assert_close(state, expected, **CLOSE)
    assert torch.equal(read_chats(seeing.llm, tokenise_chats(seeing.llm, chats))[0], found[-1])


def test_padded_states_are_those_of_transformers_padded_and_of_each_chat_alone(seeing: Seeing):
    chats = list(CHATS.values())
    batch = tokenise_chats(seeing.llm, chats)
    found, expected = read_chats(seeing.llm, batch, ALL), expected_states(seeing, chats)
    for row, chat in enumerate(chats):
        real, alone = batch.mask[row], read_chats(seeing.llm, tokenise_chats(seeing.llm, [chat]), ALL)
        for state, one, theirs in zip(found, alone, expected, strict=True):
            torch.testing.assert_close(state[row][real], one[0], **CLOSE)
            torch.testing.assert_close(state[row][real], theirs[row][real], **CLOSE)


def test_an_image_changes_what_is_read_after_it_and_nothing_before(seeing: Seeing):
    chat = CHATS["images"]
    batches = [
        tokenise_chats(seeing.llm, [Chat(chat.instruction, images, chat.system)])
        for images in (chat.images, (chat.images[0], chat.images[1][::-1].copy()))
    ]
    (first,), (second,) = (read_chats(seeing.llm, batch) for batch in batches)
    start = int((batches[0].image_of[0] == 1).nonzero()[0])
    torch.testing.assert_close(first[:, :start], second[:, :start], **CLOSE)
    assert (first[:, start:] - second[:, start:]).abs().amax(-1).min() > 1e-3


def test_the_batch_moves_as_a_whole(seeing: Seeing):
    batch = tokenise_chats(seeing.llm, [CHATS["images"]])
    moved = map_tensors(batch, lambda tensor: tensor.clone())
    assert moved.images.keys() == batch.images.keys()
    assert torch.equal(read_chats(seeing.llm, moved)[0], read_chats(seeing.llm, batch)[0])


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_beyond_the_models_is_refused(layer, seeing: Seeing):
    batch = tokenise_chats(seeing.llm, [CHATS["text"]])
    with pytest.raises(ValueError, match=rf"hidden state {layer} .* 3 layers; expected 0 to 3, or -1 to -4"):
        read_chats(seeing.llm, batch, (0, layer))


def test_eyes_are_frozen_and_the_language_model_has_one_owner(seeing: Seeing):
    llm = seeing.llm
    assert llm.eyes is not None
    assert not any(p.requires_grad for p in (*llm.eyes.parameters(), *llm.language_model.parameters()))
    assert not any(module.training for module in llm.eyes.modules())
    assert llm.eyes.model.language_model is None
    names = [name for name, _ in llm.named_parameters(remove_duplicate=False)]
    assert sum(name.endswith("embed_tokens.weight") for name in names) == 1
    assert sum("layers.2.mlp.up_proj" in name for name in names if "vision" not in name) == 1


def test_images_are_prepared_in_float32_whatever_the_weights_are(seeing: Seeing):
    llm = load_language_model(seeing.folder, torch.bfloat16, with_head=True, with_eyes=True)
    batch = tokenise_chats(llm, [CHATS["images"]])
    assert batch.images["pixel_values"].dtype == torch.float32
    (state,) = read_chats(llm, batch)
    (expected,) = read_chats(seeing.llm, tokenise_chats(seeing.llm, [CHATS["images"]]))
    assert state.dtype == torch.bfloat16
    assert (state.float() - expected).norm() < 0.1 * expected.norm()
    assert len(write(llm, batch, 3)[0].ids) == 3


@contextmanager
def watched(llm: LanguageModel) -> Iterator[list[list[Tensor]]]:
    """The outputs of each layer, call by call."""
    seen: list[list[Tensor]] = [[] for _ in llm.layers]
    handles = [
        layer.register_forward_hook(lambda module, inputs, out, into=into: into.append(out.clone()))
        for layer, into in zip(llm.layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


HIDDEN = {"output_hidden_states": True}
NEW = 12


def generated(seeing: Seeing, chats: list[Chat], ends: list[int]) -> list[list[int]]:
    """What transformers' own generate writes greedily; padding and end tokens left out."""
    inputs = seeing.inputs(chats)
    pad = seeing.llm.pad_id
    rows = seeing.whole.generate(
        **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=pad
    )
    rows = rows[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, id in enumerate(row) if id in ends), NEW)] for row in rows]


@pytest.fixture
def ending(seeing: Seeing, tmp_path: Path) -> Seeing:
    """The folder with a further end token, which one of the chats writes soon."""
    batch = tokenise_chats(seeing.llm, list(CHATS.values()))
    writings = write(seeing.llm, batch, NEW)
    counts = [writing.ids for writing in writings]
    soon = next(id for id in counts[0][2:8] if id not in counts[0][:2])
    shutil.copytree(seeing.folder, tmp_path / "ending")
    path = tmp_path / "ending" / "generation_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"eos_token_id": [seeing.llm.end_id, soon]}))
    llm = load_language_model(tmp_path / "ending", with_head=True, with_eyes=True)
    return replace(seeing, llm=llm, folder=tmp_path / "ending")


def test_writing_is_transformers_own_generate_batched_and_alone(ending: Seeing):
    llm, chats = ending.llm, list(CHATS.values())
    ends = end_ids(llm)
    assert len(ends) == 2
    writings = write(llm, tokenise_chats(llm, chats), NEW)
    assert [writing.ids for writing in writings] == generated(ending, chats, ends)
    for chat, writing in zip(chats, writings, strict=True):
        assert write(llm, tokenise_chats(llm, [chat]), NEW) == [writing]
        assert [writing.ids] == generated(ending, [chat], ends)
    assert [writing.ended for writing in writings] == [len(writing.ids) < NEW for writing in writings]
    assert writings[0].ended and len({len(writing.ids) for writing in writings}) > 1


def test_without_a_generation_config_the_tokenizers_end_token_ends(ending: Seeing):
    (ending.folder / "generation_config.json").unlink()
    assert end_ids(ending.llm) == [ending.llm.end_id]


def test_nothing_written_is_told_from_what_would_go_on(seeing: Seeing, tmp_path):
    batch = tokenise_chats(seeing.llm, [CHATS["text"]])
    first = write(seeing.llm, batch, 1)
    assert first[0].ended is False and len(first[0].ids) == 1
    assert write(seeing.llm, batch, 0) == [Writing([], False)]
    shutil.copytree(seeing.folder, tmp_path / "mute")
    ends = {"eos_token_id": first[0].ids[0]}
    (tmp_path / "mute" / "generation_config.json").write_text(json.dumps(ends))
    mute = load_language_model(tmp_path / "mute", with_head=True)
    with watched(mute) as seen:
        assert write(mute, batch, NEW) == [Writing([], True)]
    assert len(seen[0]) == 1, "nothing is read once all have ended"


def test_teacher_forcing_gives_the_states_that_were_there_while_decoding(seeing: Seeing):
    llm, chats = seeing.llm, list(CHATS.values())
    batch = tokenise_chats(llm, chats, room=NEW)
    with watched(llm) as decoding:
        written = [writing.ids for writing in write(llm, batch, NEW)]
    forced = tokenise_chats(llm, chats, written)
    with watched(llm) as at_once:
        read_chats(llm, forced, ALL)
    assert forced.is_any(ChatPart.WRITTEN).sum() == sum(map(len, written)) > NEW
    for steps, (whole,) in zip(decoding, at_once, strict=True):
        assert len(steps) == NEW  # the last token is written and not read
        for row, ids in enumerate(written):
            prompt, read = steps[0][row][batch.mask[row]], min(len(ids), NEW - 1)
            expected = torch.cat([prompt, *(step[row] for step in steps[1 : read + 1])])
            torch.testing.assert_close(whole[row][forced.mask[row]][: len(expected)], expected, **CLOSE)


def test_more_than_the_context_holds_is_not_written(seeing: Seeing):
    batch = tokenise_chats(seeing.llm, [CHATS["text"]])
    left = CONTEXT - batch.ids.shape[1]
    with pytest.raises(ValueError, match=rf"so {left} can be written, not {left + 1}: shorten the chat"):
        write(seeing.llm, batch, left + 1)


@pytest.mark.parametrize("with_images", [False, True])
def test_the_vision_tower_is_asked_for_and_loads_on_meta(with_images, seeing: Seeing):
    llm = load_language_model(seeing.folder, with_eyes=with_images, on_meta=True)
    assert (llm.eyes is not None) == with_images
    assert all(p.is_meta for p in llm.parameters())


def test_a_model_without_eyes_has_none_to_open_and_chats_all_the_same(tmp_path):
    torch.manual_seed(0)
    save_causal("Llama", tmp_path)
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM, which sees no images; use a folder of a"):
        load_language_model(tmp_path, with_eyes=True)
    llm = load_language_model(tmp_path, with_head=True)
    chats = [Chat("a red circle", system="a"), Chat("a")]
    alone = [write(llm, tokenise_chats(llm, [chat]), 3)[0] for chat in chats]
    assert write(llm, tokenise_chats(llm, chats), 3) == alone
    with pytest.raises(ValueError, match="images need eyes, and it has none"):
        tokenise_chats(llm, [CHATS["image"]])


@pytest.mark.parametrize("name", ["llava", "llava_noise_taught", "llava_large"])
def test_the_shipped_llava_sees_as_transformers_own_does(name):
    llm = load_language_model(WEIGHTS / name, with_head=True, with_eyes=True)
    whole = class_of("llava").from_pretrained(WEIGHTS / name, dtype=torch.float32).eval()
    image = picture(64, 64)
    batch = tokenise_chats(llm, [Chat("describe the image", (image,)), Chat("two circles")])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(batch.images["pixel_values"], pixels * 2 - 1)
    assert batch.is_any(ChatPart.IMAGE).sum(1).tolist() == [16, 0]
    ids, mask = batch.ids[:1], batch.mask[:1].long()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, pixel_values=pixels * 2 - 1, **HIDDEN)
    for state, one in zip(read_chats(llm, batch, (0, 2, -1)), (0, 2, -1), strict=True):
        torch.testing.assert_close(state[:1], expected.hidden_states[one], **CLOSE)


def test_methods_that_need_only_text_read_every_family(seeing: Seeing):
    """Prompts of several lengths: the states of each are those of transformers' own text model alone."""
    requests, branches = [Request("a red circle"), Request("two"), Request("")], ["full"] * 3
    llm = load_language_model(seeing.folder)
    (state,) = llm.read_layers(prefix := llm.tokenise([one.prompt for one in requests]), [2])
    for row, request in enumerate(requests):
        ids = torch.tensor([[llm.begin_id, *llm.token_ids([request.prompt])[0]]])
        with torch.no_grad():
            alone = seeing.whole(input_ids=ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(state[row][prefix.mask[row]], alone[0], **CLOSE)
    lap = LapConditioner(load_language_model(seeing.folder), LapConfig(lap=LapSettings(taps=(0, 2, -1))))
    queries = QueriesConditioner(load_language_model(seeing.folder), 4)
    text = TextEmbedConditioner(load_language_model(seeing.folder))
    noise, t = torch.randn(3, 4, 16), torch.rand(3)
    for conditioner in (lap, queries, text):
        prepared = conditioner.prepare(conditioner.collate(requests, branches))
        condition = conditioner.condition(prepared, noise, t)
        found = [condition.aligned, *(c.tokens for c in (*condition.contexts, *prepared.static))]
        assert any(one is not None and one.isfinite().all() for one in found)


def test_noisy_latents_are_read_by_a_llava_alone(seeing: Seeing):
    llm = load_language_model(seeing.folder)
    if seeing.family == "llava":
        assert NoisyLatentConditioner(llm, latent_dim=16, num_tokens=4).llm is llm
        return
    with pytest.raises(ValueError, match=r"takes no latents; for noisy latents use a LLaVA .* 'lap'"):
        NoisyLatentConditioner(llm, latent_dim=16, num_tokens=4)


def test_the_classes_are_transformers_own(seeing: Seeing):
    config = seeing.whole.config
    assert type(seeing.llm).model_class(config) is class_of(seeing.family)


def test_what_eyes_cost_is_what_torch_counts(seeing: Seeing):
    """Two images of several sizes, on transformers' own tower; by a formula where that cannot be run without
    memory.
    """
    eyes = seeing.llm.eyes
    assert eyes is not None
    for image in (picture(30, 50), picture(20, 20)):
        look = eyes.look(image)
        is_image = torch.ones(1, look.num_tokens, dtype=torch.bool)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            eyes.see(look.inputs, is_image)
        assert eyes_cost(eyes, look.inputs) == Cost(counter.get_total_flops()) != Cost()
