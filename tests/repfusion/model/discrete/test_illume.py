"""ILLUME+: losses against a slow reference, decoding with kept keys and values, what it learns or refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_codes import codes_of
from torch import Tensor

from repfusion.codes.column import CODES
from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.flops import batch_flops
from repfusion.generate import generate
from repfusion.images.square import square
from repfusion.model.build import build_code_model
from repfusion.model.config import ANY_MODEL
from repfusion.model.discrete.filling import uniforms_of
from repfusion.model.discrete.illume import Illume
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.folder import latest_checkpoint
from repfusion.train import train

TEXT, BEGIN, END = 15, 79, 80
"""How many ids the tiny language model has, and the marks of an image after 64 codes."""


def section(world, **changes: Any) -> dict[str, Any]:
    llava = world.foundation / "llava"
    return {"kind": "illume", "tokenizer": world.tokenizer, "mllm": llava, "max_sources": 1, **changes}


def made(world, **changes: Any) -> Illume:
    torch.manual_seed(0)
    model = build_code_model(ANY_MODEL.validate_python(section(world, **changes)))
    assert isinstance(model, Illume)
    with torch.no_grad():
        for parameter in model.trainable_state().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def samples_of(world, num: int) -> list[Any]:
    config = world.training(world.columns / "unused", section(world))
    dataset = Mixture.open(config.data, config.model.columns)
    return [next(iter(dataset.datasets.values()))[i] for i in range(num)]


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)


def shares(model: Illume, ids: list[int]) -> Tensor:
    """Log-probabilities of what follows each token of one row, over the whole vocabulary, text and codes
    apart.
    """
    embeds = model.embedded(torch.tensor([ids]))
    states = model.llm.language_model(inputs_embeds=embeds).last_hidden_state
    scores = [model.llm.logits(states), *(model.heads[one.name](states).float() for one in model.streams)]
    return torch.cat([one[0].log_softmax(-1) for one in scores], dim=-1)


@torch.no_grad()
def test_the_losses_are_those_of_each_row_by_itself(world):
    model = made(world, caption_share=0.5)
    samples, seeds = samples_of(world, 8), list(range(8))
    inputs = model.collate(samples, Recipe(condition_dropout=0.3), seeds)
    found, kinds = model(inputs), set()
    for row, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
        request, branch = Recipe(condition_dropout=0.3).draw(sample, seed, {})
        codes = [TEXT + int(code) for code in sample.read(CODES)]
        words = model.llm.token_ids([request.prompt])[0]
        if inputs["is_described"][row]:
            ids, first = [1, BEGIN, *codes, END, *words, 2], 23
            name, other = "caption", "codes"
        else:
            ids = [1, *(words if branch == "full" else []), BEGIN, *codes]
            first, name, other = len(ids) - 20, "codes", "caption"
        kinds.add((name, branch))
        own = shares(model, ids)
        expected = -sum(float(own[i - 1, ids[i]]) for i in range(first, len(ids))) / (len(ids) - first)
        assert float(found[name][row]) == pytest.approx(expected, rel=1e-4)
        assert float(found[other][row]) == 0
    assert len(kinds) >= 3
    with torch.enable_grad():
        assert batch_flops(model, inputs) > 0


@torch.no_grad()
def test_codes_are_drawn_with_kept_keys_and_values_as_without(world):
    model, sampler = made(world), SamplerConfig(guidance_scale=2.0)
    requests = [Request("a red circle"), Request("two", (image(3),)), Request("")]
    noise = initial_noise([4, 5, 6], model.noise_shape(sampler))
    drawn = model.draw(requests, noise, sampler)
    tokenizer = ImageTokenizer.from_pretrained(world.tokenizer, with_tower=True)
    tokenizer.check_codes(drawn)
    for row, request in enumerate(requests):
        shown = [torch.from_numpy(square(one, 32))[None] for one in request.images]
        codes = [(TEXT + tokenizer.encode_images(one)[0]).tolist() for one in shown]
        source = [[BEGIN, *one, END] for one in codes]
        ids = [1, *model.llm.token_ids([request.prompt])[0], *(i for part in source for i in part), BEGIN]
        none = [1, BEGIN]
        for place in range(20):
            stream = model.streams[0] if place < 4 else model.streams[1]
            places = slice(TEXT + stream.first_code, TEXT + stream.first_code + stream.num_codes)
            own, other = (shares(model, [*one])[-1, places] for one in (ids, none))
            share = (other + 2.0 * (own - other)).softmax(-1)
            chance = uniforms_of(noise[row, place])
            code = int((share.cumsum(0) < chance).sum()) + stream.first_code
            assert int(drawn[row, place]) == code, (row, place)
            ids, none = [*ids, TEXT + code], [*none, TEXT + code]
    pixels = generate(model, model.load_decoder(), requests, 4, sampler, batch_size=2)
    torch.testing.assert_close(pixels, tokenizer.decode(drawn).clamp(0, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_caption_is_the_likeliest_next_tokens(world):
    model = made(world)
    codes = torch.stack([torch.from_numpy(codes_of(i, world.tokenizer)).long() for i in (0, 1)])
    model.config = model.config.model_copy(update={"max_caption_tokens": 5})
    sampler = SamplerConfig()
    noise = initial_noise([0, 1], model.noise_shape(sampler))
    said = model.describe(codes, noise, sampler)
    for row, text in enumerate(said):
        ids, words = [1, BEGIN, *(TEXT + codes[row]).tolist(), END], []
        while len(words) < 5 and (word := int(shares(model, ids)[-1, :TEXT].argmax())) != 2:
            ids, words = [*ids, word], [*words, word]
        assert text == model.llm.tokenizer.decode(words, skip_special_tokens=True).strip()
    begun = model.describe(codes, noise, sampler, ["two green", "a"])
    assert begun[0].startswith("two green") and begun[1].startswith("a")


def test_what_does_not_fit_is_named(world):
    model = made(world, max_sources=0)
    noise = torch.zeros(1, 20, 1)
    with pytest.raises(ValueError, match=r"num_steps 5: the model 'illume' draws codes"):
        model.draw([Request("a")], noise, SamplerConfig(num_steps=5))
    with pytest.raises(ValueError, match="the method 'illume' cannot read"):
        model.draw([Request("a", (image(1),))], noise, SamplerConfig())
    editing = made(world)
    with pytest.raises(ValueError, match=r"2 source images; model\.max_sources is 1"):
        editing.draw([Request("a", (image(1), image(2)))], noise, SamplerConfig())
    assert editing.llm.max_text_tokens == 48 < model.llm.context - 22
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        made(world, max_sources=9)


def test_a_frozen_language_model_is_neither_trained_nor_saved(world):
    model = made(world, train_llm=False)
    assert {name.split(".")[0] for name in model.trainable_state()} == {"embed", "heads"}
    inputs = model.collate(samples_of(world, 4), Recipe(), range(4))
    torch.stack([one.mean() for one in model(inputs).values()]).sum().backward()
    assert all(p.grad is not None for p in model.trainable_state().values())
    assert not any(p.grad is not None for p in model.llm.parameters())


@pytest.mark.slow
def test_a_few_samples_are_learned_by_heart(world):
    torch.manual_seed(0)
    model = build_code_model(ANY_MODEL.validate_python(section(world, caption_share=0.3)))
    assert isinstance(model, Illume)
    samples = samples_of(world, 8)[::2]
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=3e-3)
    for step in range(200):
        inputs = model.collate(samples * 4, Recipe(condition_dropout=0.1), [99 * step + i for i in range(16)])
        torch.stack([one.mean() for one in model(inputs).values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    captions, wanted = [one.captions["txt"][0] for one in samples], model.stacked_codes(samples)
    sampler = SamplerConfig(guidance_scale=1.5)
    noise = initial_noise(range(4), model.noise_shape(sampler))
    drawn = model.draw([Request(one) for one in captions], noise, sampler)
    assert (drawn == wanted).float().mean() > 0.9
    assert model.describe(wanted, noise, sampler) == captions


@pytest.mark.slow
def test_a_training_resumes_to_the_same_weights_and_its_checkpoint_draws(world, tmp_path):
    whole = world.training(tmp_path / "whole", section(world))
    train(whole)
    train(world.training(tmp_path / "parts", section(world), num_steps=2))
    parts = world.training(tmp_path / "parts", section(world))
    assert train(parts)["resumed_at_step"] == 2
    folders = [latest_checkpoint(one.output_dir / "checkpoints") for one in (whole, parts)]
    assert folders[0] is not None and folders[1] is not None
    for name in ("model.safetensors", "ema.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    model = load_drawer(folders[0])
    pixels = generate(model, model.load_decoder(), [Request("a red circle")], 0)
    assert pixels.shape == (1, 3, 32, 32)
