"""The configurations at the published scale: they parse, build without memory, and have the paper's sizes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repfusion.conditioning.fusions.channel_concat import ChannelConcatConditioner
from repfusion.conditioning.related.metaquery import MetaQueryConditioner
from repfusion.conditioning.unifusion import UniFusionConditioner
from repfusion.config import load_config
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.flops.__main__ import main
from repfusion.flops.count import DENOISER, LLM, Counter, decoder_cost, sample_flops
from repfusion.flops.paper import (
    COMPARED,
    FITTED,
    Settings,
    best_settings,
    difference,
    generator_of,
    image_flops,
    paper_markdown,
)
from repfusion.model.config import ModelConfig
from repfusion.model.meta import CONFIGS, GEOMETRY, absent_folders, geometry_folder, published, seeing_model
from repfusion.train import TrainConfig
from repfusion.training.engine import learning_rate

ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PUBLISHED = {
    "repfusion_7b_1.3b": (1.3e9, 1.3e9),
    "repfusion_7b_1.3b_sft": (1.3e9, 1.3e9),
    "queries_static_7b_1.3b": (1.3e9, 1.3e9),
    "queries_timestep_7b_1.3b": (1.3e9, 1.3e9),
    "repfusion_7b_3.2b": (3.2e9, 3.2e9),
    "repfusion_7b_3.2b_sft": (3.2e9, 3.2e9),
    "repfusion_3b_5.5b": (5.5e9, 5.5e9),
    "repfusion_1b_7.3b": (7.3e9, 7.3e9),
    "text_embed_7b_8b": (8.0e9, 8.0e9),
    "transfusion_7b": (None, 6.8e9),
    "repfusion_7b_1.3b_trained_llm": (1.3e9, None),
    "unifusion_8b_8b": (8.0e9, None),
    "unifusion_8b_8b_edit": (8.0e9, None),
    "metaquery_0.5b_0.6b": (0.59e9, None),
    "blip3o_7b_1.4b": (1.4e9, None),
    "li_dit_8b_10b": (10e9, None),
}
"""The papers' parameters, as the denoiser's and as all that is trained; None where they do not say."""
OURS = {"unifusion_4b_1.3b", "channel_concat_4b_1.3b"}
"""Configurations of no paper."""
UNSIZED = {"query_kontext_7b_1.3b", "query_kontext_7b_8b", "llm_controller_8b_8b", "maven_7b_1.3b"}
"""Configurations of papers of which no generator's size is known: of what they read it is."""
REPFUSION = [
    name for name in PUBLISHED if not name.startswith(("unifusion", "metaquery", "blip3o", "li_dit"))
]
SEEING = {
    "qwen2.5-vl-7b": (8_292_166_656, None),
    "internvl-2.5-8b": (8.08e9, None),
    "qwen3-vl-4b": (4.438e9, 415.3e6),
    "internvl-3-8b": (None, None),
}
"""Parameters as the models' pages give them, of all and of the vision tower."""


def config_of(name: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIGS / f"{name}.yaml", [])


def test_every_configuration_has_its_published_size():
    assert set(NAMES) == PUBLISHED.keys() | OURS | UNSIZED


@pytest.mark.parametrize("folder", SEEING)
def test_models_that_see_have_their_published_sizes(folder):
    llm = seeing_model(GEOMETRY / folder, torch.bfloat16)
    every, tower = SEEING[folder]
    assert llm.eyes is not None and {p.device.type for p in llm.parameters()} == {"meta"}
    if every is not None:
        assert sum(p.numel() for p in llm.parameters()) == pytest.approx(every, rel=1e-3)
    if tower is not None:
        assert sum(p.numel() for p in llm.eyes.parameters()) == pytest.approx(tower, rel=1e-3)
    if folder == "internvl-3-8b":  # Qwen2.5-7B with fewer rows of embedding and head
        parts = llm.language_model, llm.head
        found = sum(p.numel() for part in parts if part is not None for p in part.parameters())
        assert found == 7_615_616_512 - 2 * (152_064 - 151_674) * 3584


def test_an_image_of_1024_px_is_ten_tiles_of_internvl_and_one_grid_of_the_others():
    image = np.zeros((1024, 1024, 3), np.uint8)
    views = {}
    for folder in SEEING:
        eyes = seeing_model(GEOMETRY / folder, torch.bfloat16).eyes
        assert eyes is not None
        views[folder] = [tuple((view.max(0).values + 1).tolist()) for view in eyes.look(image).views]
    assert views["internvl-2.5-8b"] == views["internvl-3-8b"] == [(48, 48), (16, 16)]
    assert views["qwen3-vl-4b"] == [(32, 32)]
    assert views["qwen2.5-vl-7b"] == [(37, 37)]


def test_unifusions_recipe_is_the_papers():
    base, edit = config_of("unifusion_8b_8b"), config_of("unifusion_8b_8b_edit")
    conditioner = generator_of("unifusion_8b_8b").conditioner
    assert isinstance(conditioner, UniFusionConditioner)
    assert conditioner.taps == (4, 7, 10, 13, 16, 19, 22, 25, 28, 31)
    assert base.reconstruction_share == 0.03 and edit.num_steps == 11_000
    assert edit.model == base.model
    assert edit.init_from == base.output_dir / f"checkpoints/step_{base.num_steps:08d}"


def test_the_configurations_of_no_paper_are_what_their_names_say():
    for name in OURS:
        generator = generator_of(name)
        assert round(sum(p.numel() for p in generator.denoiser.parameters()) / 1e9, 1) == 1.3
        llm = sum(p.numel() for p in generator.conditioner.llm.language_model.parameters())
        assert llm == pytest.approx(4.022e9, rel=1e-3)
    concat = generator_of("channel_concat_4b_1.3b").conditioner
    assert isinstance(concat, ChannelConcatConditioner)
    assert concat.taps == (9, 18, 27) and concat.join.in_features == 7680  # FLUX.2 klein's


def test_metaquerys_recipe_is_the_papers():
    """A connector of 316M before 2304 channels, eight epochs of 25M pairs."""
    config, conditioner = config_of("metaquery_0.5b_0.6b"), generator_of("metaquery_0.5b_0.6b").conditioner
    assert isinstance(conditioner, MetaQueryConditioner)
    assert sum(p.numel() for p in conditioner.connector.parameters()) == pytest.approx(316e6, rel=0.02)
    assert conditioner.context_widths == (2304,)
    assert sum(p.numel() for p in conditioner.llm.parameters()) == 494_032_768  # Qwen2-0.5B, head tied
    assert config.num_steps * config.global_batch_size == pytest.approx(8 * 25e6, rel=1e-3)
    rates = [learning_rate(config.engine, step, config.num_steps) for step in (3_999, config.num_steps)]
    assert rates == pytest.approx([1e-4, 1e-5])


def test_the_related_systems_read_the_language_models_that_they_name():
    """Sizes of the published checkpoints, without heads; LLaVA adds 64 tokens to LLaMA-7B's."""
    for name, expected in {
        "blip3o_7b_1.4b": [7_615_616_512 - 152_064 * 3584],  # Qwen2.5-7B
        "llm_controller_8b_8b": [8_030_261_248 - 128_256 * 4096, 6_738_415_616 - 32_000 * 4096 + 64 * 4096],
        "li_dit_8b_10b": [8_030_261_248 - 128_256 * 4096, 7_721_324_544 - 151_936 * 4096],
    }.items():
        read = generator_of(name).conditioner.language_models
        assert [sum(p.numel() for p in llm.parameters()) for llm in read] == expected


@pytest.mark.slow
def test_query_kontexts_second_training_goes_on_from_its_first():
    """The paper's 128 queries and Qwen2.5-VL-7B, in which the LoRA alone trains, and is frozen then."""
    first, second = config_of("query_kontext_7b_1.3b"), config_of("query_kontext_7b_8b")
    light, large = generator_of("query_kontext_7b_1.3b"), generator_of("query_kontext_7b_8b")
    rank, layers, width, key_width = 64, 28, 3584, 512
    num_lora = rank * layers * (2 * (width + width) + 2 * (width + key_width))
    for model in (light, large):
        llm = model.conditioner.llm
        assert sum(p.numel() for p in llm.parameters()) == 8_292_166_656 + num_lora
        assert model.conditioner.get_parameter("queries").shape == (128, width)
    trained = sum(p.numel() for p in light.conditioner.llm.parameters() if p.requires_grad)
    assert trained == num_lora == sum(p.numel() for p in large.kept.values())
    assert second.init_from == first.output_dir / f"checkpoints/step_{first.num_steps:08d}"
    handover = second.model.conditioning.handover(first.model.conditioning)
    assert handover is not None
    before, after = ({**one.trainable_state(), **one.kept} for one in (light, large))
    taken = {name for name in before if name.startswith(handover.weights)}
    assert taken == {name for name in after if name.startswith("conditioner.")}
    assert all(before[name].shape == after[name].shape for name in taken)
    assert sum(p.numel() for p in large.denoiser.parameters()) == pytest.approx(8e9, rel=0.02)


def test_the_llm_controllers_frozen_generator_is_text_embeds():
    base, config = config_of("text_embed_7b_8b"), config_of("llm_controller_8b_8b")
    assert config.init_from == base.output_dir / f"checkpoints/step_{base.num_steps:08d}"
    assert (config.model.encoder, config.model.dit) == (base.model.encoder, base.model.dit)
    assert config.model.conditioning.second_llm == base.model.mllm
    generator = generator_of("text_embed_7b_8b")
    shapes = {name: p.shape for name, p in generator.trainable_state().items()}
    controlled = generator_of("llm_controller_8b_8b")
    assert {name: p.shape for name, p in controlled.kept.items()} == shapes
    assert sum(p.numel() for p in controlled.kept.values()) == pytest.approx(8e9, rel=0.02)


def test_mavens_references_have_the_discrete_tokens_of_seed():
    selection = config_of("maven_7b_1.3b").model.conditioning.model_dump()["selection"]
    assert (selection["num_discrete"], selection["num_codes"]) == (32, 8192)
    generator = generator_of("maven_7b_1.3b")
    assert sum(p.numel() for p in generator.conditioner.llm.parameters()) == 7_063_427_072
    assert sum(p.numel() for p in generator.denoiser.parameters()) == pytest.approx(1.3e9, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_within_two_percent_of_the_papers(name):
    generator = generator_of(name)
    denoiser, trained = PUBLISHED[name]
    assert {p.device.type for p in generator.parameters()} == {"meta"}
    if denoiser is not None:
        assert sum(p.numel() for p in generator.denoiser.parameters()) == pytest.approx(denoiser, rel=0.02)
    if trained is not None:
        assert sum(p.numel() for p in generator.trainable_state().values()) == pytest.approx(
            trained, rel=0.02
        )


@pytest.mark.parametrize("name", REPFUSION)
def test_the_recipes_are_the_papers(name):
    config = config_of(name)
    engine = config.engine
    assert (config.global_batch_size, engine.betas, engine.weight_decay) == (2048, (0.9, 0.95), 0.1)
    assert config.model.mllm_dtype == ("float32" if config.model.conditioning.trains_llm else "bfloat16")
    if name.endswith("_sft"):
        assert config.num_steps == 64 * 200_000 // 2048 and engine.lr == 1e-4
        base = config_of(name.removesuffix("_sft"))
        assert config.model == base.model
        assert config.init_from == base.output_dir / f"checkpoints/step_{base.num_steps:08d}"
    else:
        assert config.num_steps == 160_000
        rates = [learning_rate(engine, step, config.num_steps) for step in (9_999, 85_000, 160_000)]
        assert rates == pytest.approx([3e-4, 1.5e-4, 0])
        shares = {name: one.weight for name, one in config.data.datasets.items()}
        assert shares == {"main": 27, "short": 4}


def test_the_published_scale_is_what_it_says():
    generator, decoder = published()
    assert generator.latent_shape == (576, 1024) and generator.shift == 12
    assert (decoder.grid, decoder.feature_dim) == (generator.grid, 1024)
    assert decoder.config.patch_size * 24 == 576
    language_model = sum(p.numel() for p in generator.conditioner.llm.language_model.parameters())
    # of the 6,738,415,616 parameters of LLaMA-7B, without its head; LLaVA adds 64 tokens
    assert language_model == 6_738_415_616 - 32_000 * 4096 + 64 * 4096


def test_language_models_have_their_published_sizes():
    """Parameters of the published checkpoints, whose head is the embedding."""
    for name, num in (("repfusion_1b_7.3b", 1_235_814_400), ("repfusion_3b_5.5b", 3_212_749_824)):
        assert sum(p.numel() for p in generator_of(name).conditioner.llm.parameters()) == num


def test_a_folder_that_is_there_gives_its_own_geometry(tmp_path: Path):
    absent = Path("models/llava-1.5-7b")
    assert geometry_folder(absent) == GEOMETRY / absent.name
    there = tmp_path / absent.name
    there.mkdir()
    assert geometry_folder(there) == GEOMETRY / absent.name
    (there / "config.json").write_text("{}")
    assert geometry_folder(there) == there
    assert absent_folders(ModelConfig()) == []
    with pytest.raises(ValueError, match=r"models/mine: no config.json.*clip-vit-large-patch14-336"):
        geometry_folder(Path("models/mine"))


@pytest.mark.slow
def test_the_command_says_where_the_geometry_comes_from(monkeypatch, capsys):
    path = CONFIGS / "transfusion_7b.yaml"
    monkeypatch.setattr(sys, "argv", ["flops", "--config", str(path), "--ranks", "128"])
    main()
    said = capsys.readouterr().out
    assert f"geometry from {GEOMETRY}, in place of models/llava-1.5-7b," in said
    assert "training: 327,680,000 samples" in said and "transfusion, no DiT" in said
    assert "bytes a sample: latents 1,179,648" in said


@pytest.mark.slow
def test_docs_hold_the_table_of_the_papers_figures():
    assert paper_markdown() in (ROOT / "docs" / "flops.md").read_text()


def largest(rows, settings) -> float:
    return max(abs(difference(row, settings)) for row in rows)


@pytest.mark.slow
def test_the_fits_are_as_good_as_docs_say():
    """And A is the best of those that were looked at."""
    a, b, c = best_settings(FITTED), best_settings(FITTED[:3]), best_settings(FITTED[:2])
    assert largest(FITTED, a) < 0.035
    for other in (b, c, best_settings(FITTED, [30]), replace(a, with_decoder=True)):
        assert largest(FITTED, other) >= largest(FITTED, a)
    dense, transfusion, *smaller = COMPARED
    assert largest([*FITTED[:3], dense], b) < 0.01
    assert largest(FITTED[:2], c) < 0.001 and difference(FITTED[2], c) < -0.04
    for settings in (a, b, c):
        assert difference(transfusion, settings) < -0.15
        assert all(difference(row, settings) > 0.05 for row in smaller)


@pytest.mark.slow
def test_the_settings_count_what_they_say():
    plain = Settings(30, 64, halve_causal=False, with_decoder=False, rereads_prompt=False)
    repfusion, timestep, static, text_embed = FITTED
    config = SamplerConfig(num_steps=30)
    for row in FITTED:
        generator = generator_of(row.config)
        # sampling keeps the keys and values of a context that no step changes, counts of a denoiser do not
        kept = Counter(generator).row(64)[0][DENOISER].forward
        assert (kept > 0) == (row is text_embed)
        assert image_flops(row, plain) == pytest.approx(sample_flops(generator, 64, config) + 2 * 29 * kept)
    decoder = decoder_cost(published()[1]).forward
    assert image_flops(static, replace(plain, with_decoder=True)) - image_flops(
        static, plain
    ) == pytest.approx(decoder)
    again = replace(plain, rereads_prompt=True)
    prompt = Counter(generator_of(timestep.config)).row(64)[0][LLM].forward
    assert image_flops(timestep, again) - image_flops(timestep, plain) == pytest.approx(2 * 29 * prompt)
    assert image_flops(repfusion, again) == image_flops(repfusion, plain)
    assert image_flops(COMPARED[0], plain) > image_flops(text_embed, plain)
