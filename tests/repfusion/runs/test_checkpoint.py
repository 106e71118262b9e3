"""A generator <-> a folder: what is read back, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import GRID, WIDTH, make_foundation, tiny_model

from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.check import check_model
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import (
    continued_model,
    load_checkpoint,
    load_weights,
    portable,
    read_config,
    save_checkpoint,
)
from repfusion.runs.completion import begin_checkpoint, check_complete
from repfusion.runs.folder import complete_checkpoints, latest_checkpoint, step_of
from repfusion.weights import WEIGHTS


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_foundation(tmp_path_factory.mktemp("weights"))


def build(foundation: Path, **dit) -> TextToImage:
    statistics = LatentStatistics.empty(GRID**2, WIDTH)
    statistics.update(torch.randn(50, GRID**2, WIDTH, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    config = tiny_model(foundation)
    return build_model(config.model_copy(update={"dit": config.dit.model_copy(update=dit)}), statistics)


@pytest.fixture
def saved(foundation: Path, tmp_path: Path) -> tuple[TextToImage, Path]:
    generator = build(foundation)
    ema = {name: p.detach() + 1 for name, p in generator.trainable_state().items()}
    folder = tmp_path / "step_00000500"
    save_checkpoint(folder, generator, ema, step=500)
    return generator, folder


def test_what_is_saved_is_read_back(saved):
    generator, folder = saved
    plain, averaged = load_checkpoint(folder, use_ema=False), load_checkpoint(folder)
    assert plain.config == generator.config and not plain.training
    for name, p in generator.trainable_state().items():
        assert torch.equal(plain.trainable_state()[name], p)
        assert torch.equal(averaged.trainable_state()[name], p + 1)
    assert torch.equal(plain.statistics.mean, generator.statistics.mean)
    assert check_complete(folder)["step"] == 500
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000500"]


def test_a_checkpoint_that_was_cut_short_does_not_exist(saved):
    _, folder = saved
    root = folder.parent
    begin_checkpoint(root / "step_00000600")
    (root / "step_00000700").mkdir()
    shutil.copytree(folder, root / "step_00001000")
    shutil.copytree(folder, root / "step_100000000")
    (root / "step_100000000" / "complete.json").unlink()
    assert [step_of(path) for path in complete_checkpoints(root)] == [500, 1000]
    assert latest_checkpoint(root) == root / "step_00001000"
    assert latest_checkpoint(root, resumable=True) is None
    with pytest.raises(ValueError, match=r"step_00000700 has no complete\.json: it was cut short"):
        load_checkpoint(root / "step_00000700")
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(root / "step_00000800")


def test_steps_are_compared_as_numbers(saved):
    _, folder = saved
    for name in ("step_99999999", "step_100000000"):
        shutil.copytree(folder, folder.parent / name)
    latest = latest_checkpoint(folder.parent)
    assert latest is not None and step_of(latest) == 100_000_000


def test_a_truncated_file_is_named(saved):
    _, folder = saved
    path = folder / "ema.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match=rf"ema\.safetensors is {size // 2} bytes long.*expected {size}"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"ema\.safetensors is missing"):
        load_checkpoint(folder)


def test_damage_of_the_same_size_is_noticed(saved):
    _, folder = saved
    path = folder / "ema.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"ema\.safetensors has sha256 .*: its content was changed"):
        load_checkpoint(folder)


def test_another_geometry_names_tensor_and_field(saved, foundation: Path):
    _, folder = saved
    with pytest.raises(
        ValueError,
        match=r"denoiser\.\S+: \(24,.*expected \(32,.*fields that differ: dit\.hidden_size 24, expected 32",
    ):
        load_weights(build(foundation, hidden_size=32), folder)
    with pytest.raises(ValueError, match=r"denoiser\.blocks\.2\S*: missing.*dit\.depth 2, expected 3"):
        load_weights(build(foundation, depth=3), folder)


def test_other_frozen_weights_are_refused(foundation: Path, tmp_path: Path):
    own = tmp_path / "weights"
    shutil.copytree(foundation, own)
    generator = build(own)
    save_checkpoint(tmp_path / "step_00000001", generator, generator.trainable_state(), step=1)
    path = own / "vision_tower" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was trained with encoder weights"):
        load_checkpoint(tmp_path / "step_00000001")


def test_shipped_weights_are_named_without_this_machine_s_path(saved):
    _, folder = saved
    text = (folder / "config.json").read_text()
    shipped = ModelConfig(encoder=EncoderConfig(path=WEIGHTS / "vision_tower"))
    config = json.loads(text)
    config["model"] = portable(shipped.model_dump(mode="json"))
    assert str(WEIGHTS) not in json.dumps(config)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder)[0] == shipped


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"method": "queries", "num_queries": None, "reads_time": True}),
        ({"conditioning": "queries"}, {"method": "queries", "reads_time": True}),
        ({"conditioning": {"connector_depth": 2}}, {"reads_time": True, "connector_depth": 2}),
        ({"conditioning": {"method": "queries", "reads_time": False}}, {"reads_time": False}),
        ({"conditioning": "text_embed"}, {"method": "text_embed"}),
        ({"conditioning": {"method": "transfusion", "captioning": None}}, {"method": "transfusion"}),
    ],
)
def test_a_model_that_goes_on_takes_the_checkpoints_fields(make_generator, tmp_path, given, expected):
    generator = make_generator("queries_timestep")
    save_checkpoint(tmp_path / "step_00000001", generator, generator.trainable_state())
    model = ModelConfig.model_validate(continued_model(tmp_path / "step_00000001", given))
    assert model.mllm == generator.config.mllm and model.dit == generator.config.dit
    got = model.conditioning.model_dump()
    assert {name: got[name] for name in expected} == expected


BUFFERS = {f"conditioner.projector.{name}" for name in ("scale", "shift")}
"""By which a projector reads latents for hidden states."""


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def test_how_the_projector_reads_latents_is_saved_with_its_weights(saved):
    generator, folder = saved
    assert generator.fixed_state().keys() == BUFFERS
    for file in ("model.safetensors", "ema.safetensors"):
        assert load_file(folder / file).keys() == {*generator.trainable_state(), *BUFFERS}
    loaded = load_checkpoint(folder, use_ema=False)
    z_t, t = torch.randn(2, GRID**2, WIDTH), torch.tensor([0.0, 0.5])
    assert torch.equal(loaded.conditioner.project(z_t, t), generator.conditioner.project(z_t, t))


def test_weights_without_it_were_trained_on_latents_as_they_are(saved):
    generator, folder = saved
    rewrite(folder / "model.safetensors", lambda all: {k: v for k, v in all.items() if k not in BUFFERS})
    loaded = build(generator.config.mllm.parent)
    load_weights(loaded, folder, use_ema=False)
    assert loaded.fixed_state() == {}
    latents, projector = torch.randn(2, GRID**2, WIDTH), generator.conditioner.projector
    plain = projector.linear_2(projector.act(projector.linear_1(latents)))
    assert torch.equal(loaded.conditioner.projector(latents), plain)


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_part_of_it_or_another_shape_is_refused(saved, on_meta):
    generator, folder = saved
    path = folder / "model.safetensors"
    name = min(BUFFERS)
    rewrite(path, lambda all: all | {name: all[name][:3].contiguous()})
    with pytest.raises(ValueError, match=rf"{name}: \(3, 16\), expected \(4, 16\)"):
        load_weights(generator, folder, use_ema=False, on_meta=on_meta)
    rewrite(path, lambda all: {k: v for k, v in all.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name}: missing \(1 in all\)"):
        load_weights(generator, folder, use_ema=False, on_meta=on_meta)
    assert generator.fixed_state().keys() == BUFFERS


def test_a_model_without_memory_takes_it_by_the_header(saved):
    generator, folder = saved
    bare = check_model(generator.config)
    assert bare.fixed_state() == {}
    load_weights(bare, folder, on_meta=True)
    assert {one.device.type for one in bare.fixed_state().values()} == {"meta"}
