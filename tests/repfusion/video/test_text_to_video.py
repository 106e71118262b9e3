"""Latents of frames, rows and columns: where their tokens stand, training on them, clips that are drawn."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prompting import asked
from tiny_clips import (
    CHANNELS,
    FRAMES,
    GRID,
    SIZE,
    TOKENS,
    clip_model,
    clip_statistics,
    clip_training,
    make_clip_columns,
)
from tiny_video import tiny_video_vae

from repfusion.conditioning.base import Context
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.generate import generate, main, to_uint8
from repfusion.generation.clips import clip_files
from repfusion.generation.outputs import Output
from repfusion.generation.prompts import PromptRow
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.video_vae import VIDEO_VAE
from repfusion.layers import rotary_grid
from repfusion.model.build import build_model
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import load_drawer
from repfusion.runs.folder import checkpoint_folder
from repfusion.train import train
from repfusion.video.files import EncodedClip
from repfusion.weights import WEIGHTS


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return tiny_video_vae(tmp_path_factory.mktemp("vae"))


def test_each_axis_of_a_clip_turns_a_third_of_the_pairs_and_the_frame_what_is_left():
    rotary = rotary_grid((2, 3, 4), 16)  # 8 pairs: 4, 2, 2
    assert rotary.shape == (24, 8, 2)
    for frame, row, column in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        found = rotary[(frame * 3 + row) * 4 + column]
        wanted = [frame * 100 ** -(i / 4) for i in range(4)]
        wanted += [place * 100 ** -(i / 2) for place in (row, column) for i in range(2)]
        for pair, angle in enumerate(wanted):
            assert found[pair].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_no_two_tokens_of_a_clip_and_its_context_stand_at_one_place():
    dit = InContextDiT(DiTConfig(hidden_size=32, depth=1, num_heads=2), CHANNELS, GRID, None, (24,))
    text = torch.arange(5)[:, None].expand(-1, 2)
    image = torch.tensor([[0, -2], [0, -1], [1, -2], [1, -1]])
    tokens = torch.zeros(1, 9, 24)
    (rotary,) = dit.rotary_of(Context(tokens, positions=torch.cat([text, image])[None]))
    every = torch.cat([dit.rotary, rotary]).flatten(1)
    distances = torch.cdist(every, every) + torch.eye(len(every))
    assert len(every) == TOKENS + 9 and distances.min() > 1e-2
    (in_order,) = dit.rotary_of(Context(tokens))
    torch.testing.assert_close(in_order[:5], rotary[:5])
    frames = torch.cat([text[:, :1], torch.zeros(4, 1, dtype=torch.int64)])
    (told,) = dit.rotary_of(Context(tokens, positions=torch.cat([frames, torch.cat([text, image])], 1)[None]))
    torch.testing.assert_close(told, rotary)
    with pytest.raises(ValueError, match="3 axes need a head width"):
        InContextDiT(DiTConfig(hidden_size=8, depth=1, num_heads=2), CHANNELS, GRID, None, (24,))


def test_where_clips_go_is_checked_before_anything_is_drawn(tmp_path):
    one, two = [PromptRow("a", (0,))], [PromptRow("a", (0, 1))]
    file = Output.parse(str(tmp_path / "x.mp4"))
    assert clip_files(file, one) == [(tmp_path / "x.mp4", one[0])]
    with pytest.raises(ValueError, match="2 clips in one file; write to FOLDER/"):
        clip_files(file, two)
    with pytest.raises(ValueError, match=r"draws clips; expected FILE\.mp4"):
        clip_files(Output.parse(str(tmp_path / "x.png")), one)
    names = [path.name for path, _ in clip_files(Output.parse(f"{tmp_path}/"), two)]
    assert names == ["0_seed0.mp4", "0_seed1.mp4"]


def test_parts_that_do_not_fit_a_clip_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{VIDEO_VAE}"}}')
    clips = EncoderConfig(path=tmp_path, image_size=SIZE, num_frames=FRAMES)
    assert clips.geometry.grid == GRID
    with pytest.raises(ValueError, match="images have none; leave it out"):
        clips.load()
    with pytest.raises(ValueError, match=r"set encoder\.image_size too"):
        _ = EncoderConfig(path=tmp_path, num_frames=FRAMES).geometry
    with pytest.raises(ValueError, match=r"makes clips, the latents have the axes \(4, 4\)"):
        load_decoder(tmp_path, (4, 4))
    with pytest.raises(ValueError, match=r"makes images, the latents have the axes \(3, 4, 4\)"):
        load_decoder(WEIGHTS / "vae", GRID)


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["cross_attention", "in_context"])
def test_a_training_on_clips_learns_and_its_checkpoint_draws_them(
    vae, foundation, tmp_path, interface, monkeypatch
):
    columns = make_clip_columns(tmp_path)
    config = clip_model(vae, foundation / "llava", {"method": "text_embed", "interface": interface})
    losses = []
    training = clip_training(tmp_path / "run", config, columns, num_steps=60)
    train(training, on_report=lambda report: losses.append(report.loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    checkpoint = checkpoint_folder(tmp_path / "run" / "checkpoints", 60)
    drawn = ["--checkpoint", checkpoint, "--prompt", "a red circle", "--out", tmp_path / "x.mp4", "--seed", 4]
    options = ["--num-steps", 3, "--rate", 5, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*drawn, *options])])
    main()
    clip = EncodedClip((tmp_path / "x.mp4").read_bytes())
    frames = np.stack([frame for _, frame in clip.frames()])
    assert clip.header.rate == pytest.approx(5) and frames.shape == (FRAMES, SIZE, SIZE, 3)
    model = load_drawer(checkpoint)
    pixels = generate(model, model.load_decoder(), [Request("a red circle")], 4, SamplerConfig(num_steps=3))
    np.testing.assert_array_equal(frames, to_uint8(pixels)[0])
    sheet = Image.open(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(sheet)[:, :SIZE], frames[0])
    assert sheet.height == SIZE and sheet.text  # its lineage
    with pytest.raises(ValueError, match="draws clips, of which RepFusionPipeline does not know"):
        RepFusionPipeline.from_pretrained(checkpoint)


@pytest.mark.slow
def test_repfusion_reads_the_noisy_tokens_of_all_frames_after_the_prompt(vae):
    """Against transformers' own forward of prompt and projected tokens, in the order of the latents."""
    torch.manual_seed(0)
    model = build_model(clip_model(vae, WEIGHTS / "language", "noisy_latents"), clip_statistics()).eval()
    conditioner, llm = model.conditioner, model.conditioner.llm
    z_t, t = torch.randn(1, TOKENS, CHANNELS), torch.tensor([0.3])
    with torch.no_grad():
        for parameter in conditioner.time.parameters():
            parameter.normal_(std=0.1)
        prepared = conditioner.prepare(conditioner.collate(*asked(["a red circle"])))
        found = conditioner.condition(prepared, z_t, t).aligned
        ids = torch.tensor([llm.framed(llm.token_ids(["a red circle"])[0])])
        read = conditioner.projector(z_t + conditioner.time(t)[:, None])
        whole = torch.cat([llm.embed(ids), read], dim=1)
        expected = llm.language_model(inputs_embeds=whole).last_hidden_state[:, -TOKENS:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        last = z_t.clone()
        last[:, -16:] = 0  # the last latent frame: the frames before it are read as they were
        changed = conditioner.condition(prepared, last, t).aligned
        torch.testing.assert_close(changed[:, :-16], found[:, :-16])
        assert not torch.allclose(changed[:, -16:], found[:, -16:])


@pytest.mark.slow
def test_repfusion_learns_clips(vae, tmp_path):
    columns, losses = make_clip_columns(tmp_path), []
    config = clip_model(vae, WEIGHTS / "language", "noisy_latents")
    training = clip_training(tmp_path / "run", config, columns, num_steps=40)
    train(training, on_report=lambda report: losses.append(report.loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
