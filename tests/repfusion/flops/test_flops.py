"""Analytic FLOPs against torch's own counter, on real models, forward and backward."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_training import METHODS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from repfusion.conditioning.text_embed import encode_text
from repfusion.diffusion.flow import FlowConfig
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.flops.__main__ import main
from repfusion.flops.count import (
    CONDITIONER,
    DENOISER,
    LLM,
    Cost,
    attention,
    captioning_costs,
    decoder_cost,
    language_cost,
    row_costs,
    sample_costs,
    sample_flops,
    train_costs,
    train_flops,
)
from repfusion.flops.memory import sizes
from repfusion.flops.peaks import peak_flops, peak_of
from repfusion.model.build import build_model
from repfusion.model.meta import meta_from_config, meta_model
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_checkpoint, load_model_config
from repfusion.weights import WEIGHTS

PROMPTS = ["a red circle", "a green square"]
"""As many tokens each."""


@pytest.fixture(scope="module")
def base() -> TextToImage:
    return load_checkpoint(WEIGHTS / "base")


def counted(work) -> int:
    # Only as plain matrix products are the CPU's attention and its gradient counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training(generator: TextToImage, prompts: list, backward: bool = True) -> int:
    n, d = generator.latent_shape
    b = len(prompts)
    batch = generator.prompt_batch(prompts)
    latents, noise, t = torch.randn(b, n, d), torch.randn(b, n, d), torch.rand(b)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            loss = generator(latents, batch, t, noise).mean()
        if backward:
            loss.backward()

    return counted(work)


def num_tokens(generator: TextToImage) -> int:
    return generator.conditioner.llm.tokenize(PROMPTS)[0].shape[1]


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


def with_statistics(config) -> TextToImage:
    from repfusion.latents.statistics import LatentStatistics

    encoder = config.encoder.load()
    features = torch.randn(8, encoder.num_tokens, encoder.feature_dim)
    statistics = LatentStatistics.empty(*features.shape[1:])
    statistics.update(features)
    return build_model(config, statistics)


def test_text_features_computed_ahead_cost_nothing(make_generator):
    generator = make_generator("text_embed")
    text = num_tokens(generator)
    features = encode_text(generator.conditioner.llm, PROMPTS)
    assert training(generator, features) == len(PROMPTS) * train_flops(generator, text)
    reading = counted(lambda: encode_text(generator.conditioner.llm, PROMPTS))
    extra = train_flops(generator, text, has_text_features=False) - train_flops(generator, text)
    assert reading == len(PROMPTS) * extra


def without_captions(generator: TextToImage, text: int) -> dict[str, Cost]:
    """What a sample that is not captioned costs."""
    costs = train_costs(generator, text, has_text_features=False)
    if generator.captioning is not None:
        extra = captioning_costs(generator.conditioner, generator.latent_shape[0], text)
        for part, cost in extra.items():
            costs[part] += -generator.captioning.share * cost
    return costs


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_sample_of_every_method_is_counted_exactly(make_generator, method, backward):
    generator = make_generator(method)
    text = num_tokens(generator)
    costs = without_captions(generator, text).values()
    expected = sum(cost.total if backward else cost.forward for cost in costs)
    if method == "text_embed":  # read when the batch is made
        expected -= without_captions(generator, text)[LLM].total
    assert training(generator, PROMPTS, backward) == pytest.approx(len(PROMPTS) * expected, rel=1e-12)


@pytest.mark.parametrize("method", ["noisy_latents_trained", "transfusion"])
def test_captioned_samples_are_counted_exactly(make_generator, method):
    """Both samples of the batch are drawn, one of them is captioned: as many as the share says."""
    generator = make_generator(method)
    assert generator.captioning is not None and generator.captioning.share == 0.5
    b, (n, d) = len(PROMPTS), generator.latent_shape
    batch = generator.prompt_batch(PROMPTS)
    captions = generator.caption_batch(PROMPTS, torch.tensor([0.9, 0.1]))
    inputs = torch.randn(b, n, d), batch, torch.rand(b), torch.randn(b, n, d)

    def work() -> None:
        losses, said = generator(*inputs, captions)
        (losses.mean() + said.mean()).backward()

    assert counted(work) == pytest.approx(b * train_flops(generator, num_tokens(generator)), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sampler",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "solver": "heun", "guidance_interval": (0.2, 0.9)},
    ],
    ids=["plain", "guided", "heun"],
)
def test_sampling_is_counted_exactly(make_generator, method, sampler):
    generator = make_generator(method).requires_grad_(
        False
    )  # torch's counter stumbles over a view of queries
    config = SamplerConfig(num_steps=3, precision="fp32", **sampler)
    text, num = num_tokens(generator), len(PROMPTS)
    noise = torch.randn(num, *generator.latent_shape)
    got = counted(lambda: sample(generator, PROMPTS, noise, config))
    if method == "text_embed" and config.guidance_scale != 1:
        # The empty prompt is read once for all.
        got += (num - 1) * sample_costs(generator, text, config)[LLM] / 2
    assert got == num * sample_flops(generator, text, config)


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
    assert row_costs(generator, 8).each[DENOISER] == 2 * n * d * width


def test_half_of_causal_attention_is_what_the_mask_leaves(base):
    """By counting the pairs of a query and a key that it may see."""
    model = base.conditioner.llm.language_model
    for queries, keys in ((5, 5), (4, 7)):
        pairs = sum(keys - queries + 1 + i for i in range(queries))
        full, half = (language_cost(model, queries, keys, halve).forward for halve in (False, True))
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        assert full - half == layers * attention(width, 1, queries * keys - pairs).forward


def test_the_decoder_is_counted_exactly(make_generator):
    generator = make_generator()
    decoder = generator.load_decoder()
    got = counted(lambda: decoder(torch.randn(1, *generator.latent_shape)))
    assert got == decoder_cost(decoder).forward
    with_decoder = sample_flops(generator, 4, decoder=decoder)
    assert with_decoder - sample_flops(generator, 4) == got


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
    path.write_text("model: {mllm: models/nowhere-7b}\n")
    with pytest.raises(SystemExit, match=r"nowhere-7b.*llava-1\.5-7b"):
        run_main(monkeypatch, capsys, "--config", path)
