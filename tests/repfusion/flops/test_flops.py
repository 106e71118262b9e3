"""FLOPs counted without memory against torch's own counter on real models, and against formulas."""

import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import flop_formulas as formulas
import numpy as np
import pytest
import torch
from prompting import asked, seeds_where, training_inputs
from slowly import all_but_one_slow
from tiny_training import CONTRARY, METHODS, sparing, tiny_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from repfusion.conditioning.base import Losses
from repfusion.conditioning.captioning import CaptioningConfig
from repfusion.conditioning.text_embed import encode_text
from repfusion.conditioning.transfusion import TransfusionConfig
from repfusion.conditioning.unifusion import RewritingConfig
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.devices.compiling import Compilation
from repfusion.diffusion.flow import CAPTIONED, FlowConfig
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.flops.__main__ import main
from repfusion.flops.count import (
    CONDITIONER,
    DENOISER,
    EYES,
    LLM,
    Costs,
    Counter,
    batch_flops,
    decoder_cost,
    eyes_cost,
    sample_costs,
    sample_flops,
    train_costs,
    train_flops,
)
from repfusion.flops.counter import Cost, Twin
from repfusion.flops.memory import sizes
from repfusion.flops.paper import hidden_scores
from repfusion.flops.peaks import peak_flops, peak_of
from repfusion.inputs import Inputs
from repfusion.latents.load import load_decoder
from repfusion.layers import SwiGLU
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.meta import CONFIGS, meta_from_config, meta_model
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import Trainable
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint, load_model_config
from repfusion.weights import WEIGHTS

PROMPTS = ["a red circle", "a green square"]
"""As many tokens each."""
PUBLISHED = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if not path.stem.startswith(("unifusion", "channel_concat", "metaquery", "blip3o", "li_dit"))
)
"""Configurations whose methods' FLOPs are also written down as formulas."""
BY_TORCH = (
    "unifusion",
    "unifusion_references",
    "lap",
    "noisy_latents_lap",
    "text_embed_in_context",
    "one_layer",
    "channel_concat",
    "all_layers",
)
BY_TORCH += ("hidden_injection", "layer_per_block", "key_values", "metaquery", "blip3o", "li_dit")
BY_HAND = [name for name in METHODS if name not in BY_TORCH]
"""Methods whose FLOPs are also written down as formulas; those of all are compared with torch's counter."""


def with_sampler(methods: Iterable[Any], sampler: str) -> list[Any]:
    """A parameter's pair of each method and the sampler, as slow as the method."""
    return [
        (one, sampler) if isinstance(one, str) else pytest.param(*one.values, sampler, marks=one.marks)
        for one in methods
    ]


@pytest.fixture(scope="module")
def base() -> TextToImage:
    return load_checkpoint(WEIGHTS / "base")


def counted(work) -> int:
    # Only as plain matrix products are the CPU's attention and its gradient counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training(generator: TextToImage, inputs: Inputs, backward: bool = True) -> int:
    def work() -> None:
        with torch.set_grad_enabled(backward):
            loss = sum(losses.mean() for losses in generator(inputs).values())
        if backward:
            loss.backward()

    return counted(work)


def drawn(generator: TextToImage) -> Inputs:
    """A batch of `PROMPTS` of which no sample is captioned."""
    inputs = training_inputs(generator, PROMPTS, [1, 2], generator.shift)
    inputs["request"].pop("captions", None)
    return inputs


def num_tokens(generator: TextToImage) -> int:
    return generator.conditioner.llm.tokenise(PROMPTS).ids.shape[1]


def assert_exact(generator: TextToImage, costs: Costs) -> None:
    """Both directions together, and the forward one alone."""
    for backward in (False, True):
        expected = sum(cost.total if backward else cost.forward for cost in costs.values())
        assert training(generator, drawn(generator), backward) == len(PROMPTS) * expected


def test_a_training_sample_of_the_shipped_base_is_counted_exactly(base):
    text = num_tokens(base)
    costs = train_costs(base, text)
    assert_exact(base, costs)
    assert sum(cost.total for cost in costs.values()) == train_flops(base, text)


@pytest.mark.slow
def test_a_training_sample_of_another_geometry_is_counted_exactly(elsewhere):
    """Grouped queries, biases, several patch sizes."""
    generator = with_statistics(elsewhere)
    assert_exact(generator, train_costs(generator, num_tokens(generator)))


def with_statistics(config) -> TextToImage:
    from repfusion.latents.statistics import LatentStatistics

    encoder = config.encoder.load()
    features = torch.randn(8, encoder.num_tokens, encoder.feature_dim)
    statistics = LatentStatistics.empty(*features.shape[1:])
    statistics.update(features)
    return build_model(config, statistics)


def test_text_features_computed_ahead_cost_nothing(make_generator):
    generator = make_generator("text_embed")
    llm, text = generator.conditioner.llm, num_tokens(generator)
    features = encode_text(llm, llm.tokenise(PROMPTS))
    requests = [
        Request(prompt, computed={PROMPT_FEATURES: one})
        for prompt, one in zip(PROMPTS, features, strict=True)
    ]
    inputs = drawn(generator)
    inputs["request"] = generator.conditioner.collate(requests, ["full"] * 2, [1, 2])
    # once a batch, the empty prompt is read
    once = counted(lambda: encode_text(llm, llm.tokenise([""])))
    assert training(generator, inputs) == len(PROMPTS) * train_flops(generator, text) + once
    reading = counted(lambda: encode_text(llm, llm.tokenise(PROMPTS)))
    extra = train_flops(generator, text, has_text_features=False) - train_flops(generator, text)
    assert reading == len(PROMPTS) * extra


def without_captions(generator: TextToImage, text: int) -> Costs:
    """What a sample that is not captioned costs."""
    costs = train_costs(generator, text, has_text_features=False)
    captioning = generator.config.captioning
    if captioning is not None:
        extra = formulas.captioning_costs(generator.conditioner, generator.latent_shape[0], text)
        for part, cost in extra.items():
            costs[part] += -captioning.share * cost
    return costs


@pytest.mark.parametrize("method", sparing(METHODS, CONTRARY))
def test_a_training_sample_of_every_method_is_counted_exactly(make_generator, method):
    generator = make_generator(method)
    assert_exact(generator, without_captions(generator, num_tokens(generator)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["noisy_latents_trained", "transfusion"])
def test_captioned_samples_are_counted_exactly(make_generator, method):
    """Both samples of the batch are drawn, one of them is captioned: as many as the share says."""
    generator = make_generator(method)
    captioning = generator.config.captioning
    assert captioning is not None and captioning.share == 0.5
    seeds = seeds_where(CAPTIONED, 0.5, [False, True])
    inputs = training_inputs(generator, PROMPTS, seeds, generator.shift)
    assert len(inputs["request"]["captions"].rows) == 1
    assert training(generator, inputs) == len(PROMPTS) * train_flops(generator, num_tokens(generator))


SAMPLERS = {
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 3.0},
    "heun": {"guidance_scale": 3.0, "solver": "heun", "guidance_interval": (0.2, 0.9)},
}


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        *with_sampler(sparing(METHODS, CONTRARY), "guided"),
        *with_sampler(all_but_one_slow(METHODS, "noisy_latents"), "plain"),
        *with_sampler(all_but_one_slow(METHODS, "noisy_latents"), "heun"),
    ],
)
def test_sampling_is_counted_exactly(make_generator, method, sampler):
    generator = make_generator(method).requires_grad_(
        False
    )  # torch's counter stumbles over a view of queries
    config = SamplerConfig(num_steps=3, precision="fp32", **SAMPLERS[sampler])
    text, num = num_tokens(generator), len(PROMPTS)
    noise = torch.randn(num, *generator.latent_shape)
    got = counted(lambda: sample(generator, asked(PROMPTS)[0], noise, config))
    if method.startswith("text_embed") and config.guidance_scale != 1:
        # The empty prompt is read once for all.
        got += (num - 1) * sample_costs(generator, text, config)[LLM] / 2
    assert got == num * sample_flops(generator, text, config)


def same(got: Costs, expected: Costs) -> None:
    assert got.keys() == expected.keys()
    for part, cost in expected.items():
        assert got[part].forward == pytest.approx(cost.forward, rel=1e-12), part
        assert got[part].backward == pytest.approx(cost.backward, rel=1e-12), part


def check_formulas(model: TextToImage, text: int) -> None:
    """To the last FLOP at whole numbers of tokens, in training and in sampling."""
    for has_text_features in (False, True) if PROMPT_FEATURES in model.columns else (False,):
        got = train_costs(model, text, has_text_features)
        assert got == formulas.train_costs(model, text, has_text_features)
    once, each = Counter(model).row(text)
    row = formulas.row_costs(model, text)
    for part in (LLM, CONDITIONER, DENOISER):
        assert once[part] == Cost(row.once.get(part, 0)) and each[part] == Cost(row.each.get(part, 0))


@pytest.mark.parametrize("method", sparing(BY_HAND, CONTRARY))
def test_counts_are_those_of_the_formulas(make_generator, method):
    check_formulas(make_generator(method), 7)


@pytest.mark.slow
@pytest.mark.parametrize("method", all_but_one_slow(BY_HAND, "text_embed"))
def test_between_whole_numbers_of_tokens_counts_are_those_of_the_formulas(make_generator, method):
    """Of means, of a begin token alone, and of captions that are longer than the prompts."""
    model = make_generator(method)
    for text, caption in ((6.3, None), (1, 3.25)):
        same(
            train_costs(model, text, num_caption_tokens=caption),
            formulas.train_costs(model, text, num_caption_tokens=caption),
        )
    config, decoder = SamplerConfig(num_steps=5), model.load_decoder()
    got = sample_costs(model, 3.7, config, decoder)
    assert got == pytest.approx(formulas.sample_costs(model, 3.7, config, decoder), rel=1e-12)


@pytest.mark.slow
def test_every_sample_may_be_captioned(foundation, statistics):
    config = tiny_model(foundation, "transfusion")
    method = TransfusionConfig(captioning=CaptioningConfig(share=1))
    model = build_model(config.model_copy(update={"conditioning": method}), statistics)
    for text, caption in ((5, None), (4.5, 7.0)):
        same(
            train_costs(model, text, num_caption_tokens=caption),
            formulas.train_costs(model, text, num_caption_tokens=caption),
        )


@cache
def published_model(name: str) -> TextToImage:
    return meta_from_config(load_model_config(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize("name", all_but_one_slow(PUBLISHED, "repfusion_7b_1.3b"))
def test_counts_at_the_published_scale_are_those_of_the_formulas(name):
    check_formulas(published_model(name), 32)


def costs_of_all(model: TextToImage, inputs: Inputs) -> int:
    """Every layer is run, none stands for another."""
    twin = Twin(model)
    bare = twin.inputs(inputs)

    def work(one: TextToImage) -> None:
        losses = torch.stack([part.mean() for part in one(bare).values()]).sum()
        torch.autograd.grad(losses, [p for p in one.parameters() if p.requires_grad], allow_unused=True)

    return twin.costs(work, {}, "all")[1]["all"].total


@pytest.mark.parametrize("method", all_but_one_slow(METHODS, "noisy_latents"))
def test_a_layer_stands_for_those_that_are_alike(make_generator, method):
    model = make_generator(method)
    assert all(len(layers) > 1 for layers in (model.conditioner.llm.layers, model.layers()))
    inputs = training_inputs(model, PROMPTS, [1, 2], model.shift)
    assert batch_flops(model, inputs) == costs_of_all(model, inputs) == training(model, inputs)


def test_layers_that_differ_are_all_run(make_generator):
    model = make_generator("noisy_latents")
    model.conditioner.llm.layers[1].requires_grad_(True)
    model.denoiser.blocks[1].mlp = SwiGLU(24, mlp_ratio=2.0)
    inputs = drawn(model)
    assert batch_flops(model, inputs) == training(model, inputs)


@pytest.mark.slow
def test_activations_that_are_computed_again_do_not_count(make_generator):
    expected = train_costs(make_generator(), 5)
    model = make_generator()
    model.checkpoint_activations("selective")
    model.compile_blocks(Compilation("the layers", ""))
    assert train_costs(model, 5) == expected


def test_a_model_is_not_touched(make_generator):
    model = make_generator("noisy_latents_trained")
    model.checkpoint_activations()
    weights = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    forwards = [layer.forward for layer in model.layers()]
    tokenizer, statistics = model.conditioner.llm.tokenizer, model.statistics
    train_flops(model, 5.5)
    sample_flops(model, 5)
    assert [layer.forward for layer in model.layers()] == forwards
    assert model.conditioner.llm.tokenizer is tokenizer and model.statistics is statistics
    for name, p in model.named_parameters():
        assert p.grad is None and p.data_ptr() == weights[name][0] and torch.equal(p, weights[name][1])


class Pairs(Trainable):
    """A model that is no text-to-image model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.blocks[0].requires_grad_(False)

    def forward(self, inputs: Inputs) -> Losses:
        x = inputs["x"]
        for block in self.blocks:
            x = block(x)
        return {"square": x.square().mean(1)}

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)


def test_another_trainable_is_counted_over_a_batch():
    """Frozen, then trained with and without a gradient of its input."""
    flops = batch_flops(Pairs(), {"x": torch.randn(5, 8)})
    assert flops == 2 * 5 * 8 * 8 * (1 + 2 + 3)


@pytest.mark.slow
def test_counting_takes_moments(base):
    train_flops(base, 9.5)
    started = time.process_time()
    train_flops(base, 10.5)
    assert time.process_time() - started < 4


@pytest.mark.parametrize("method", all_but_one_slow(("unifusion", "unifusion_references"), "unifusion"))
def test_requests_with_images_are_counted_exactly(make_generator, method):
    """In training, and in sampling, where the empty prompt has none of them."""
    generator = make_generator(method).requires_grad_(False)
    generator.denoiser.requires_grad_(True)
    images = (np.zeros((32, 32, 3), np.uint8), np.ones((40, 20, 3), np.uint8))
    inputs = drawn(generator)
    requests = [Request(prompt, images) for prompt in PROMPTS]
    inputs["request"] = generator.conditioner.collate(requests, ["full"] * 2, [1, 2])
    text, num = num_tokens(generator), len(PROMPTS)
    costs = train_costs(generator, text, images=images)
    assert training(generator, inputs) == num * sum(cost.total for cost in costs.values())
    assert costs[EYES].forward > train_costs(generator, text)[EYES].forward == 0 == costs[EYES].backward

    generator.requires_grad_(False)
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, precision="fp32")
    noise = torch.randn(num, *generator.latent_shape)
    got = counted(lambda: sample(generator, requests, noise, config))
    drawing = sample_costs(generator, text, config, images=images)
    assert drawing[EYES] == costs[EYES].forward
    assert got == num * sum(drawing.values())


def test_a_prompt_that_is_rewritten_is_read_and_written(foundation):
    """As many tokens are written as the prompt has, and all are read with it once more."""
    plain = tiny_model(foundation, "unifusion")
    habit = plain.conditioning.model_copy(update={"rewriting": RewritingConfig()})
    rewriting = meta_from_config(plain.model_copy(update={"conditioning": habit}))
    both = sample_costs(meta_from_config(plain), 11)  # begin token and ten words
    assert sample_costs(rewriting, 6)[LLM] == 2 * both[LLM] > 0


def test_the_sizes_tell_eyes_from_the_language_model(make_generator):
    generator = make_generator("unifusion")
    found = sizes(generator)
    llm = generator.conditioner.llm
    assert llm.eyes is not None
    assert found[EYES].num_parameters == sum(p.numel() for p in llm.eyes.parameters()) > 0
    both = found[EYES].num_parameters + found[LLM].num_parameters
    assert both == sum(p.numel() for p in llm.parameters())
    assert EYES not in sizes(make_generator("lap"))


@pytest.mark.slow
def test_static_queries_cost_the_language_model_once_and_timestep_queries_at_every_step(make_generator):
    config = {steps: SamplerConfig(num_steps=steps) for steps in (1, 9)}
    static, timestep, repfusion = (
        {steps: sample_costs(make_generator(method), 8, one) for steps, one in config.items()}
        for method in ("queries", "queries_timestep", "noisy_latents")
    )
    assert static[9][LLM] == static[1][LLM] < timestep[9][LLM]
    assert timestep[1][LLM] == static[1][LLM]
    assert timestep[9][LLM] == repfusion[9][LLM]
    assert static[9][DENOISER] == timestep[9][DENOISER] == repfusion[9][DENOISER] == 9 * static[1][DENOISER]


def test_transfusion_has_a_head_in_the_place_of_a_dit(make_generator):
    generator = make_generator("transfusion")
    width = generator.conditioner.llm.width
    n, d = generator.latent_shape
    assert Counter(generator).row(8)[1][DENOISER] == Cost(2 * n * d * width)


def test_half_of_causal_attention_is_what_the_mask_leaves(base):
    """By counting the pairs of a query and a key that it may see."""
    config = base.conditioner.llm.language_model.config
    for queries, keys in ((5, 5), (4, 7)):
        pairs = sum(keys - queries + 1 + i for i in range(queries))
        hidden = formulas.attention(config.hidden_size, 1, queries * keys - pairs).forward
        assert hidden_scores(base, queries) == config.num_hidden_layers * hidden


def test_the_decoder_is_counted_exactly(make_generator):
    generator = make_generator()
    decoder = generator.load_decoder()
    got = counted(lambda: decoder(torch.randn(1, *generator.latent_shape)))
    assert got == decoder_cost(decoder).forward == formulas.decoder_cost(decoder).forward
    with_decoder = sample_flops(generator, 4, decoder=decoder)
    assert with_decoder - sample_flops(generator, 4) == got


def test_the_decoder_of_a_vae_is_counted_exactly():
    decoder = load_decoder(WEIGHTS / "vae", (4, 4))
    rows, cols = decoder.grid
    got = counted(lambda: decoder(torch.randn(1, rows * cols, decoder.feature_dim)))
    assert got == decoder_cost(decoder).forward > 0


def test_frozen_weights_count_forward_and_activation_gradient_only(base):
    cost = train_costs(base, 8)[LLM]
    weights = sum(
        layer.weight.numel()
        for layer in base.conditioner.llm.language_model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    tokens = 8 + base.latent_shape[0]
    config = base.conditioner.llm.language_model.config
    square = 4 * config.hidden_size * tokens**2 * config.num_hidden_layers
    assert cost == Cost(2 * weights * tokens + square, 2 * weights * tokens + 2 * square)


def test_the_sizes_are_those_of_the_modules(base):
    found = sizes(base, base.load_decoder())
    assert sum(one.num_parameters for one in found.values()) == sum(
        p.numel() for module in (base, base.load_decoder()) for p in module.parameters()
    )
    trained = sum(p.numel() for p in base.trainable_state().values())
    assert found[CONDITIONER].num_trainable + found[DENOISER].num_trainable == trained
    assert found[LLM].num_trainable == found["decoder"].num_trainable == 0
    assert found[DENOISER].num_bytes == 4 * found[DENOISER].num_parameters


def test_a_generator_without_memory_counts_the_same(base):
    bare = meta_from_config(base.config)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert train_costs(bare, 9) == train_costs(base, 9)
    assert sample_costs(bare, 9) == sample_costs(base, 9)
    assert sizes(bare) == sizes(base)


def test_bytes_follow_the_precision_of_the_frozen_weights(base):
    half = base.config.model_copy(update={"mllm_dtype": "bfloat16"})
    text = AutoConfig.from_pretrained(base.config.mllm).get_text_config()
    bare = meta_model(half, text, base.grid, base.latent_shape[1])
    assert 2 * sizes(bare)[LLM].num_bytes == sizes(base)[LLM].num_bytes
    assert sizes(bare)[DENOISER] == sizes(base)[DENOISER]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_go_by_the_name_of_the_gpu(name, peak):
    assert peak_of(name) == peak


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu") is None


def run_main(monkeypatch: pytest.MonkeyPatch, capsys, *arguments) -> tuple[dict[str, list[str]], str]:
    """The table of parts, and all that was said."""
    monkeypatch.setattr(sys, "argv", ["flops", *map(str, arguments)])
    main()
    said = capsys.readouterr().out
    lines = said.split("\n\n")[1].splitlines()[1:]
    return {line[:16].strip(): line[16:].split() for line in lines}, said


def test_the_command_prints_parts_that_add_up(base, monkeypatch, capsys):
    rows, _ = run_main(monkeypatch, capsys, "--text-tokens", 8, "--num-steps", 2)
    parts = [rows[part] for part in ("language model", "conditioner", "denoiser", "decoder")]
    totals = [sum(float(row[i].replace(",", "")) for row in parts) for i in (0, 1)]
    assert [float(one.replace(",", "")) for one in rows["all"][:2]] == totals
    assert float(rows["all"][3]) == pytest.approx(train_flops(base, 8) / 1e9, abs=2e-3)


@pytest.mark.slow
def test_the_command_reads_a_config(monkeypatch, capsys, tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text("model:\n  dit: {hidden_size: 96, depth: 2}\n")
    assert load_model_config(path).dit.depth == 2
    small, _ = run_main(monkeypatch, capsys, "--config", path)
    assert int(small["denoiser"][0].replace(",", "")) < 1e6
    path.write_text("model:\n  dit: {depht: 2}\n")
    with pytest.raises(SystemExit, match="depht"):
        run_main(monkeypatch, capsys, "--config", path)
    path.write_text(f"init_from: {WEIGHTS / 'base'}\nmodel: {{dit: {{depth: 2}}}}\n")
    started, base = load_model_config(path), load_checkpoint(WEIGHTS / "base").config
    assert (
        started.dit == base.dit.model_copy(update={"depth": 2}) and started.flow == base.flow != FlowConfig()
    )
    path.write_text("init_from: runs/nowhere\nnum_steps: 5\n")
    with pytest.raises(SystemExit, match="runs/nowhere is not there"):
        run_main(monkeypatch, capsys, "--config", path)
    with pytest.raises(SystemExit, match=r"--images 1: the method 'noisy_latents' reads no images"):
        run_main(monkeypatch, capsys, "--images", 1)
    path.write_text("model: {mllm: models/nowhere-7b}\n")
    with pytest.raises(SystemExit, match=r"nowhere-7b.*llava-1\.5-7b"):
        run_main(monkeypatch, capsys, "--config", path)


@pytest.mark.slow
def test_the_command_counts_images(monkeypatch, capsys, tmp_path: Path):
    """Of the shipped LLaVA, whose tower is 5 x 64: 16 patches of 8 px and a class token."""
    path = tmp_path / "train.yaml"
    path.write_text("model: {conditioning: unifusion, dit: {hidden_size: 96, depth: 2}}\n")
    rows, said = run_main(monkeypatch, capsys, "--config", path, "--images", 2, "--image-px", 40)
    _, _, _, train, image = rows["vision tower"]
    once = eyes_cost_of_shipped_llava() / 1e9
    assert float(train) == pytest.approx(2 * once, abs=1e-3) and float(image) == pytest.approx(
        2 * once, abs=1e-2
    )
    assert f"requests of 2 images; one of 40 px a side is 16 tokens and takes {once:.2f} GFLOP" in said


def eyes_cost_of_shipped_llava() -> float:
    llm = load_language_model(WEIGHTS / "llava", with_eyes=True)
    assert llm.eyes is not None
    return float(eyes_cost(llm.eyes, llm.eyes.look(np.zeros((40, 40, 3), np.uint8)).inputs).total)
