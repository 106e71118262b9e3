"""A tokenizer trained on image shards: it learns, goes on where it was cut off, says how codes are used."""

import json

import pytest
import torch
from tiny_codes import BRANCHES

from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.decoding.codes.config import TokenizerTrainingConfig
from repfusion.decoding.codes.train import TokenizerTraining, codebook_use, train_tokenizer
from repfusion.decoding.ranks import Ranks
from repfusion.decoding.train import MEASURED, state_of
from repfusion.foundation.config import LengthConfig


@pytest.fixture
def tokens(full) -> TokenizerTrainingConfig:
    """Both branches and all losses over four steps, as the decoder's of the same folders."""
    fields = TokenizerTrainingConfig.model_fields
    shared = {name: getattr(full, name) for name in type(full).model_fields if name in fields}
    return TokenizerTrainingConfig(**shared, branches=BRANCHES)


def test_one_that_was_cut_off_goes_on_to_the_same_weights(tokens, tmp_path, monkeypatch):
    tokens = tokens.model_copy(update={"perceptual": None, "adversarial": None})
    found = train_tokenizer(tokens)
    whole = (tokens.out / "model.safetensors").read_bytes()
    assert json.loads((tokens.out / MEASURED).read_text()) == found
    assert {
        "psnr_db",
        "ssim",
        "semantic_used",
        "pixel_perplexity",
        "semantic_cosine",
    } <= found.keys()
    again = tokens.model_copy(update={"out": tmp_path / "again", "save_every_sec": 1e-9})
    own, steps = TokenizerTraining.take_step, []

    def take_step(self, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TokenizerTraining, "take_step", take_step)
        train_tokenizer(again)
    assert not again.out.exists() and state_of(again.out).is_file()
    train_tokenizer(again)
    assert (again.out / "model.safetensors").read_bytes() == whole
    tokenizer = ImageTokenizer.from_pretrained(again.out, with_tower=True)
    assert tokenizer.num_tokens == 20


@pytest.mark.slow
def test_two_micro_batches_have_the_gradients_of_one(tokens):
    adversarial = tokens.adversarial.model_copy(update={"discriminator_from_step": 0, "gan_from_step": 0})
    config = tokens.model_copy(update={"adversarial": adversarial})
    found = []
    for size in (None, 2):
        training = TokenizerTraining(config.model_copy(update={"micro_batch_size": size}), Ranks())
        losses = training.gradients.adversarial(training.draw(0), is_on=True)
        found.append((losses, {name: p.grad for name, p in training.state.named.items()}))
    (losses, whole), (others, parts) = found
    assert {"semantic", "semantic_codebook", "pixel_codebook", "adaptive_weight"} <= losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, grad in whole.items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_pixel_branch_is_dropped_for_its_share(tokens):
    config = tokens.model_copy(update={"length": LengthConfig(num_steps=1, batch_size=400, lr=1e-3)})
    training = TokenizerTraining(config.model_copy(update={"perceptual": None, "adversarial": None}), Ranks())
    kept = training._kept(0)
    assert 0.4 < kept.mean() < 0.6 and (kept != training._kept(1)).any()
    alone = config.branches.model_copy(update={"semantic": None})
    training.config = config.model_copy(update={"branches": alone})
    assert training._kept(0).all()


def test_the_use_of_a_codebook():
    ids = torch.tensor([[0, 0, 3, 3], [0, 3, 0, 3]])
    assert codebook_use(ids, 8) == {"used": 0.25, "perplexity": pytest.approx(2.0)}


def test_another_start_is_refused(tokens, tmp_path):
    plain = {"perceptual": None, "adversarial": None, "num_measured": 2}
    length = LengthConfig(num_steps=1, batch_size=4, lr=1e-3)
    short = tokens.model_copy(update={"length": length, **plain})
    train_tokenizer(short)
    further = short.model_copy(update={"init_from": short.out, "out": tmp_path / "further"})
    smaller = tokens.branches.model_copy(update={"pixel": None})
    with pytest.raises(ValueError, match="is a tokenizer of"):
        train_tokenizer(further.model_copy(update={"branches": smaller, "out": tmp_path / "other"}))


@pytest.mark.slow
def test_it_learns_to_rebuild_what_it_never_saw(tokens):
    plain = {"perceptual": None, "adversarial": None, "ema_decay": None, "final_lr_ratio": 0.0}
    config = tokens.model_copy(update=plain)
    lengths = [LengthConfig(num_steps=num, batch_size=8, lr=1e-2) for num in (1, 150)]
    untrained, trained = (
        train_tokenizer(config.model_copy(update={"length": one, "out": config.out.with_name(str(i))}))
        for i, one in enumerate(lengths)
    )
    assert trained["psnr_db"] > untrained["psnr_db"] + 3
    assert trained["semantic_cosine"] > untrained["semantic_cosine"]
