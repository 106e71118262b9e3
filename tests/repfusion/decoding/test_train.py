"""An RAE decoder trained on image shards: it learns, goes on where it was cut off, and fits its encoder."""

import json
import sys

import numpy as np
import pytest
import torch

from repfusion.config import load_config, to_yaml
from repfusion.data.order import is_held_out
from repfusion.decoding import __main__ as command
from repfusion.decoding import train
from repfusion.decoding.config import DecoderTrainingConfig
from repfusion.decoding.pictures import ImageShards
from repfusion.decoding.train import MEASURED, state_of, train_decoder
from repfusion.foundation.config import LengthConfig
from repfusion.images.square import square
from repfusion.latents.load import fitting_decoder


@pytest.mark.slow
def test_it_learns_to_rebuild_what_it_never_saw(config):
    untrained = train_decoder(config.model_copy(update={"length": LengthConfig(num_steps=1, batch_size=8)}))
    state_of(config.out).unlink()
    found = train_decoder(config)
    assert found["psnr_db"] > untrained["psnr_db"] + 3
    assert json.loads((config.out / MEASURED).read_text()) == found
    encoder = config.encoder.load()
    fitting_decoder(config.out, encoder.grid, encoder.feature_dim)  # as a training's model takes it


def test_one_that_was_cut_off_goes_on_to_the_same_weights(config, tmp_path, monkeypatch):
    short = config.model_copy(update={"length": LengthConfig(num_steps=6, batch_size=4)})
    train_decoder(short)
    whole = (short.out / "model.safetensors").read_bytes()
    again = short.model_copy(update={"out": tmp_path / "again", "save_every_sec": 1e-9})
    calls = [0]

    def cut(step, num_steps, final, rate=train.rate):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return rate(step, num_steps, final)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "rate", cut)
        train_decoder(again)
    assert not again.out.exists() and state_of(again.out).is_file()
    train_decoder(again)
    assert (again.out / "model.safetensors").read_bytes() == whole


def test_what_is_held_out_is_never_drawn(images):
    pictures = ImageShards(images, 16, 0.25)
    assert len(pictures.drawn) + len(pictures.held_out) == 40
    assert all(is_held_out(one.key, 0.25) for one in pictures.held_out) and pictures.held_out
    assert not any(is_held_out(one.key, 0.25) for one in pictures.drawn)
    first, second = pictures.batch(3, 0, range(6)), pictures.batch(4, 0, range(6))
    assert first.shape == (6, 16, 16, 3) and torch.equal(first, pictures.batch(3, 0, range(6)))
    assert not torch.equal(first, second)
    assert len(ImageShards(images, 16, 0.0).measured(5)) == 5


def test_a_square_is_the_middle_of_an_image():
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    np.testing.assert_array_equal(square(image, 4), image[:, 2:6])
    assert square(image, 2).shape == (2, 2, 3) and square(image, 9).shape == (9, 9, 3)


def test_the_command_says_what_is_wrong(config, tmp_path, monkeypatch, capsys):
    path = tmp_path / "decoder.yaml"
    path.write_text(to_yaml(config))
    assert load_config(DecoderTrainingConfig, path) == config

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["decoding", str(path), *words])
        command.main()

    with pytest.raises(SystemExit, match="unknown key 'imagez'"):
        run("imagez=x")
    with pytest.raises(SystemExit, match="no shards"):
        run(f"images={tmp_path}")
    run("length.num_steps=2")
    assert "PSNR" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a decoder of"):
        run("length.num_steps=2", f"init_from={config.out}", "depth=2")
