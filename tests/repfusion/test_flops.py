"""Analytic FLOPs against torch's own counter, on real models, forward and backward."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from repfusion.checkpoint import load_checkpoint
from repfusion.conditioning.text_embed import encode_text
from repfusion.flops import (
    Cost,
    decoder_cost,
    main,
    peak_flops,
    peak_of,
    sample_costs,
    sample_flops,
    sizes,
    train_costs,
    train_flops,
)
from repfusion.foundation import WEIGHTS
from repfusion.meta import load_model_config, meta_from_config, meta_generator, published
from repfusion.model import Generator
from repfusion.sampler import SamplerConfig, sample

PROMPTS = ["a red circle", "a green square"]
"""As many tokens each."""


@pytest.fixture(scope="module")
def base() -> Generator:
    return load_checkpoint(WEIGHTS / "base")


def counted(work) -> int:
    # Only as plain matrix products are the CPU's attention and its gradient counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training(generator: Generator, prompts: list, backward: bool = True) -> int:
    n, d = generator.latent_shape
    b = len(prompts)
    batch = generator.prompt_batch(prompts)
    latents, noise, t = torch.randn(b, n, d), torch.randn(b, n, d), torch.rand(b)

    def work() -> None:
        loss = generator(latents, batch, t, noise).mean()
        if backward:
            loss.backward()

    return counted(work)


def num_tokens(generator: Generator) -> int:
    return generator.conditioner.mllm.tokenize(PROMPTS)[0].shape[1]


@pytest.mark.parametrize("backward", [False, True])
def test_a_training_sample_of_the_shipped_base_is_counted_exactly(base, backward):
    text = num_tokens(base)
    costs = train_costs(base, text).values()
    expected = sum(cost.total if backward else cost.forward for cost in costs)
    assert training(base, PROMPTS, backward) == len(PROMPTS) * expected
    assert sum(cost.total for cost in costs) == train_flops(base, text)


@pytest.mark.parametrize("backward", [False, True])
def test_a_training_sample_of_another_geometry_is_counted_exactly(elsewhere, backward):
    """Grouped queries, biases, several patch sizes."""
    generator = with_statistics(elsewhere)
    text = num_tokens(generator)
    costs = train_costs(generator, text).values()
    expected = sum(cost.total if backward else cost.forward for cost in costs)
    assert training(generator, PROMPTS, backward) == len(PROMPTS) * expected


def with_statistics(config) -> Generator:
    from repfusion.rae.statistics import LatentStatistics

    encoder = config.encoder.load()
    features = torch.randn(8, encoder.num_tokens, encoder.feature_dim)
    statistics = LatentStatistics.empty(*features.shape[1:])
    statistics.update(features)
    return Generator.build(config, statistics)


def test_text_features_computed_ahead_cost_nothing(make_generator):
    generator = make_generator("text_embed")
    text = num_tokens(generator)
    features = encode_text(generator.conditioner.mllm, PROMPTS)
    assert training(generator, features) == len(PROMPTS) * train_flops(generator, text)
    reading = counted(lambda: encode_text(generator.conditioner.mllm, PROMPTS))
    extra = train_flops(generator, text, has_text_features=False) - train_flops(generator, text)
    assert reading == len(PROMPTS) * extra


@pytest.mark.parametrize("conditioning", ["noisy_latents", "text_embed"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_is_counted_exactly(make_generator, conditioning, guidance_scale):
    generator = make_generator(conditioning)
    config = SamplerConfig(num_steps=3, guidance_scale=guidance_scale, precision="fp32")
    text = num_tokens(generator)
    noise = torch.randn(len(PROMPTS), *generator.latent_shape)
    got = counted(lambda: sample(generator, PROMPTS, noise, config))
    if conditioning == "text_embed" and guidance_scale != 1:
        # The empty prompt is read once for all.
        read = sample_costs(generator, text, config)["language model, prompt"] / 2
        got += (len(PROMPTS) - 1) * read
    assert got == len(PROMPTS) * sample_flops(generator, text, config)


def test_the_decoder_is_counted_exactly(make_generator):
    generator = make_generator()
    decoder = generator.load_decoder()
    got = counted(lambda: decoder(torch.randn(1, *generator.latent_shape)))
    assert got == decoder_cost(decoder).forward
    with_decoder = sample_flops(generator, 4, decoder=decoder)
    assert with_decoder - sample_flops(generator, 4) == got


def test_frozen_weights_count_forward_and_activation_gradient_only(base):
    cost = train_costs(base, 8)["language model"]
    weights = sum(
        layer.weight.numel()
        for layer in base.conditioner.mllm.language_model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    tokens = 8 + base.latent_shape[0]
    config = base.conditioner.mllm.language_model.config
    square = 4 * config.hidden_size * tokens**2 * config.num_hidden_layers
    assert cost == Cost(2 * weights * tokens + square, 2 * weights * tokens + 2 * square)


def test_the_sizes_are_those_of_the_modules(base):
    found = sizes(base, base.load_decoder())
    assert sum(one.num_parameters for one in found.values()) == sum(
        p.numel() for module in (base, base.load_decoder()) for p in module.parameters()
    )
    trained = sum(p.numel() for p in base.trainable_state().values())
    assert found["projector"].num_trainable + found["DiT"].num_trainable == trained
    assert found["language model"].num_trainable == found["decoder"].num_trainable == 0
    assert found["DiT"].num_bytes == 4 * found["DiT"].num_parameters


def test_a_generator_without_memory_counts_the_same(base):
    bare = meta_from_config(base.config)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert train_costs(bare, 9) == train_costs(base, 9)
    assert sample_costs(bare, 9) == sample_costs(base, 9)
    assert sizes(bare) == sizes(base)


def test_bytes_follow_the_precision_of_the_frozen_weights(base):
    half = base.config.model_copy(update={"mllm_dtype": "bfloat16"})
    text = AutoConfig.from_pretrained(base.config.mllm).get_text_config()
    bare = meta_generator(half, text, base.grid, base.latent_shape[1])
    assert 2 * sizes(bare)["language model"].num_bytes == sizes(base)["language model"].num_bytes
    assert sizes(bare)["DiT"] == sizes(base)["DiT"]


def test_the_published_scale_is_what_it_says():
    generator, decoder = published()
    found = sizes(generator, decoder)
    assert 6.5e9 < found["language model"].num_parameters < 6.8e9
    assert 1.25e9 < found["DiT"].num_parameters < 1.35e9
    assert generator.latent_shape == (576, 1024)
    # 4 per frozen and 6 per trained weight and token, and attention on top.
    tokens, text = 576, 32
    rule = 4 * 6.476e9 * (tokens + text) + 6 * 1.3e9 * tokens
    assert rule < train_flops(generator, text) < 1.1 * rule


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


def run_main(monkeypatch: pytest.MonkeyPatch, capsys, *arguments) -> dict[str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["flops", *map(str, arguments)])
    main()
    lines = capsys.readouterr().out.splitlines()[1:-1]
    return {line[:16].strip(): line[16:].split() for line in lines}


def test_the_command_prints_parts_that_add_up(base, monkeypatch, capsys):
    rows = run_main(monkeypatch, capsys, "--text-tokens", 8, "--num-steps", 2)
    parts = [rows[part] for part in ("language model", "projector", "DiT", "decoder")]
    totals = [sum(float(row[i].replace(",", "")) for row in parts) for i in (0, 1)]
    assert [float(one.replace(",", "")) for one in rows["all"][:2]] == totals
    assert float(rows["all"][3]) == pytest.approx(train_flops(base, 8) / 1e9, abs=2e-3)


def test_the_command_reads_a_config(monkeypatch, capsys, tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text("model:\n  dit: {hidden_size: 96, depth: 2}\n")
    assert load_model_config(path).dit.depth == 2
    small = run_main(monkeypatch, capsys, "--config", path)
    assert int(small["DiT"][0].replace(",", "")) < 1e6
    path.write_text("model:\n  dit: {depht: 2}\n")
    with pytest.raises(SystemExit, match="depht"):
        run_main(monkeypatch, capsys, "--config", path)
