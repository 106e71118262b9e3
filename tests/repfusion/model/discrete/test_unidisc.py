"""UniDisc: its loss and its order of filling against slow references, what it learns, what it refuses."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_codes import codes_of, write_tokenizer
from tiny_training import npy, scan_and_replace

from repfusion.codes.column import CODES
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.describe import parser_of_options, say
from repfusion.generate import generate
from repfusion.model.build import build_code_model
from repfusion.model.config import ANY_MODEL
from repfusion.model.discrete.filling import FillingConfig, fill, left_masked, uniforms_of
from repfusion.model.discrete.masking import LEAST_LEVEL
from repfusion.model.discrete.unidisc import UniDisc
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.folder import latest_checkpoint
from repfusion.train import build_trainable, train


@pytest.fixture
def model(world) -> UniDisc:
    torch.manual_seed(0)
    made = build_code_model(ANY_MODEL.validate_python(world.unidisc))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def samples_of(world, num: int):
    config = world.training(world.columns / "unused", world.unidisc)
    dataset = Mixture.open(config.data, config.model.columns)
    return [next(iter(dataset.datasets.values()))[i] for i in range(num)]


def test_the_loss_is_the_masked_diffusion_bound_of_each_sample(world, model):
    samples, seeds = samples_of(world, 8), [3**i for i in range(8)]
    inputs = model.collate(samples, Recipe(condition_dropout=0.3), seeds)
    with torch.no_grad():
        found = model(inputs)
    num_text, kinds = model.num_text, set()
    for row, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
        t = float(inputs["t"][row])
        assert LEAST_LEVEL <= t <= 1
        chances = torch.rand(26, generator=torch.Generator().manual_seed(seed))
        shown, is_dropped = model._shown(seed), not inputs["scored"][row, :num_text].any()
        kinds.add(shown)
        ids = torch.cat([inputs["text"][row], torch.tensor(sample.read(CODES)).long()])
        ids[num_text:] += model.text.num_ids
        masked = chances < t
        if shown == "caption":
            masked[:num_text] = False
        if shown == "image":
            masked[num_text:] = False
        unconditional = inputs["masked"][row, :num_text].all() and is_dropped
        if unconditional:
            masked[:num_text] = True
        assert torch.equal(inputs["masked"][row], masked)
        seen = torch.where(masked, torch.tensor(model.network.mask_id), ids)
        with torch.no_grad():
            states = model.network(seen[None])
        bound = {"text": 0.0, "image": 0.0}
        for section in model.network.sections:
            shares = model.network.scores(states, section)[0].detach().log_softmax(-1)
            for place in range(section.start, section.stop):
                name = "text" if place < num_text else "image"
                if masked[place] and not (name == "text" and unconditional):
                    own = shares[place - section.start, ids[place] - section.first_id]
                    bound[name] -= float(own) / t / 26
        assert float(found["text"][row]) == pytest.approx(bound["text"], rel=1e-4, abs=1e-6)
        assert float(found["image"][row]) == pytest.approx(bound["image"], rel=1e-4, abs=1e-6)
    assert {"caption", "image", None} >= kinds and len(kinds) > 1
    again = model.collate(samples[2:5], Recipe(condition_dropout=0.3), seeds[2:5])
    assert torch.equal(again["masked"], inputs["masked"][2:5])


def slowly_filled(network, ids, unknown, noise, config, scale, hidden) -> torch.Tensor:
    """MaskGIT place by place, one sequence."""
    ids, unknown, num_steps = ids.clone(), unknown.clone(), len(noise)
    ids[unknown], num_unknown = network.mask_id, int(unknown.sum())
    for step in range(num_steps):
        other = ids.clone()
        other[hidden] = network.mask_id
        states, against = network(ids[None]), network(other[None])
        sure = {}
        for section in network.sections:
            ahead, behind = (network.scores(one, section)[0] for one in (states, against))
            shares = ((behind + scale * (ahead - behind)) / config.temperature).softmax(-1)
            for place in range(section.start, section.stop):
                if not unknown[place]:
                    continue
                first, second = uniforms_of(noise[step].view(-1, 2))[place].tolist()
                own, total, chosen = shares[place - section.start], 0.0, 0
                while chosen < section.num_ids - 1 and total + float(own[chosen]) < first:
                    total, chosen = total + float(own[chosen]), chosen + 1
                spread = config.choice_temperature * (1 - (step + 1) / num_steps)
                gumbel = -math.log(-math.log(second))
                sure[place] = math.log(float(own[chosen])) + spread * gumbel, chosen + section.first_id
        num_left = 0
        if step + 1 < num_steps:
            num_left = math.floor(num_unknown * math.cos(math.pi / 2 * (step + 1) / num_steps))
        order = sorted(sure, key=lambda place: sure[place][0])
        for place in order[num_left:]:
            ids[place], unknown[place] = sure[place][1], False
    return ids


def test_places_are_filled_in_maskgits_order(model):
    network, config = model.network, FillingConfig(temperature=0.8, choice_temperature=2.0)
    generator = torch.Generator().manual_seed(4)
    ids = torch.cat([torch.randint(0, 15, (3, 6)), torch.randint(15, 39, (3, 20))], dim=1)
    unknown = torch.rand(3, 26, generator=generator) < torch.tensor([[0.3], [0.7], [1.0]])
    noise = torch.randn(3, 5, 52, generator=generator)
    hidden = torch.arange(26) < 6
    steps = []
    found = fill(
        network,
        ids,
        unknown,
        noise,
        config,
        3.0,
        lambda now: now.masked_fill(hidden, network.mask_id),
        lambda step, now: steps.append((now == network.mask_id).sum(1)) or False,
    )
    with torch.no_grad():
        for row in range(3):
            one = slowly_filled(network, ids[row], unknown[row], noise[row], config, 3.0, hidden)
            assert torch.equal(found[row], one), row
    assert torch.equal(found[~unknown], ids[~unknown]) and not (found == network.mask_id).any()
    expected = [left_masked(unknown.sum(1), step, 5) for step in range(5)]
    assert all(torch.equal(one, other) for one, other in zip(steps, expected, strict=True))


def test_images_depend_on_their_own_seed_alone_and_every_code_is_of_its_stream(model):
    decoder, sampler = model.load_decoder(), SamplerConfig(num_steps=3, guidance_scale=2.0)
    requests = [Request("a red circle"), Request("two green square"), Request("")]
    noise = initial_noise([5, 6, 7], model.noise_shape(sampler))
    codes = model.draw(requests, noise, sampler)
    decoder.check_codes(codes)
    assert torch.equal(model.draw(requests[1:2], noise[1:2], sampler), codes[1:2])
    pixels = generate(model, decoder, requests, 5, sampler, batch_size=2)
    torch.testing.assert_close(pixels, decoder.decode(codes).clamp(0, 1), rtol=0, atol=1e-5)
    against = model.draw(requests, noise, sampler, negatives=[Request("blue")] * 3)
    assert not torch.equal(against, codes)


def test_gaps_in_either_modality_are_filled_and_the_rest_stays(model):
    sampler = SamplerConfig(num_steps=3, guidance_scale=1.5)
    noise = initial_noise([1, 2], model.noise_shape(sampler))
    codes = torch.stack([torch.from_numpy(codes_of(i, model.config.tokenizer)).long() for i in (0, 1)])
    region = torch.zeros(2, 32, 32, dtype=torch.bool)
    region[:, :8, :8] = True  # one place of the pixel codes, one of the semantic ones
    canvas = model.painted(["a red circle", "two"], codes, region)
    assert canvas.unknown.sum(1).tolist() == [2, 2]
    found = model.complete(canvas, noise, sampler)
    changed = (found.codes != codes).nonzero()[:, 1].tolist()
    assert set(changed) <= {0, 4} and torch.equal(found.text, canvas.text)
    begun = model.begun(["a red", "two"], codes)
    written = model.complete(begun, noise, sampler)
    assert torch.equal(written.codes, codes)
    assert model.text.texts(written.text)[0].startswith("a red")
    texts, invented = model.invent(noise, sampler)
    assert len(texts) == 2 and invented.shape == codes.shape
    assert len(model.describe(codes, noise, sampler)) == 2


def test_what_does_not_fit_is_named(world, model, tmp_path):
    with pytest.raises(ValueError, match=r"solver dpm: the model 'unidisc' draws codes"):
        model.draw([Request("a")], torch.zeros(1, 30, 52), SamplerConfig(solver="dpm"))
    with pytest.raises(ValueError, match=r"noise is \(1, 2, 52\), expected \(1, 30, 52\)"):
        model.draw([Request("a")], torch.zeros(1, 2, 52), SamplerConfig())
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="the method 'unidisc' cannot read"):
        model.draw([Request("a", (image,))], torch.zeros(1, 30, 52), SamplerConfig())
    config = world.training(tmp_path / "run", world.unidisc)
    other = write_tokenizer(tmp_path / "other", world.foundation / "vision_tower", seed=1)
    wrong = world.training(tmp_path / "run", {**world.unidisc, "tokenizer": other})
    dataset = Mixture.open(config.data, config.model.columns)
    with pytest.raises(ValueError, match=r"its codes .* are those of the tokenizer of weights .*other"):
        build_trainable(wrong, dataset)
    short = world.training(tmp_path / "run", {**world.unidisc, "text_length": 3})
    with pytest.raises(ValueError, match=r"has 4 tokens, its end included, model.text_length is 3"):
        build_trainable(short, dataset).collate(samples_of(world, 1), Recipe(), [0])


def test_a_code_outside_the_codebook_names_its_sample(world, model):
    shard, codes = world.columns / CODES / "00000.tar", codes_of(0, world.tokenizer)
    wrong = codes.copy()
    wrong[7] = 64
    scan_and_replace(shard, "000000.codes.npy", npy(wrong))
    try:
        with pytest.raises(
            ValueError, match=r"000000.*: code 64 at place 7 is outside the codebook; the pixel"
        ):
            model.collate(samples_of(world, 1), Recipe(), [0])
    finally:
        scan_and_replace(shard, "000000.codes.npy", npy(codes))


@pytest.mark.slow
def test_a_few_samples_are_learned_by_heart(world, tmp_path):
    torch.manual_seed(0)
    model = build_code_model(ANY_MODEL.validate_python(world.unidisc))
    samples = samples_of(world, 8)[::2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(400):
        seeds = [1000 * step + i for i in range(16)]
        losses = model(model.collate(samples * 4, Recipe(condition_dropout=0.1), seeds))
        torch.stack([one.mean() for one in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sampler = SamplerConfig(num_steps=12, guidance_scale=2.0)
    noise = initial_noise(range(4), model.noise_shape(sampler))
    captions = [sample.captions["txt"][0] for sample in samples]
    wanted = model.stacked_codes(samples)
    drawn = model.draw([Request(one) for one in captions], noise, sampler)
    assert (drawn == wanted).float().mean() > 0.95
    assert model.describe(wanted, noise, sampler) == captions
    region = torch.zeros(4, 32, 32, dtype=torch.bool)
    region[:, 16:] = True
    painted = model.complete(model.painted(captions, wanted, region), noise, sampler)
    assert (painted.codes == wanted).float().mean() > 0.95
    begun = model.begun([one.split()[0] for one in captions], wanted)
    unguided = SamplerConfig(num_steps=12, guidance_scale=1.0)
    assert model.text.texts(model.complete(begun, noise, unguided).text) == captions
    texts, codes = model.invent(noise, sampler)
    pairs = dict(zip(captions, wanted, strict=True))
    like = [(codes[i] == pairs[one]).float().mean() for i, one in enumerate(texts) if one in pairs]
    assert max(like) > 0.8


@pytest.mark.slow
def test_a_training_resumes_to_the_same_weights_and_its_checkpoint_draws(world, tmp_path):
    whole = world.training(tmp_path / "whole", world.unidisc)
    train(whole)
    train(world.training(tmp_path / "parts", world.unidisc, num_steps=2))
    parts = world.training(tmp_path / "parts", world.unidisc)
    assert train(parts)["resumed_at_step"] == 2
    folders = [latest_checkpoint(one.output_dir / "checkpoints") for one in (whole, parts)]
    assert all(folder is not None for folder in folders)
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = ((folder / name).read_bytes() for folder in folders if folder is not None)
        assert one == other
    model = load_drawer(folders[0])
    pixels = generate(model, model.load_decoder(), [Request("a red circle")], 0, SamplerConfig(num_steps=2))
    assert pixels.shape == (1, 3, 32, 32)
    path = tmp_path / "shown.png"
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(path)
    command = ["--checkpoint", str(whole.output_dir), "--image", str(path), "--begin", "two green"]
    (said,) = say(parser_of_options().parse_args([*command, "--num-steps", "2"]))
    assert said.startswith("two green")
    pipe = RepFusionPipeline.from_pretrained(whole.output_dir)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red circle", 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(drawn, pixels, rtol=0, atol=0)
