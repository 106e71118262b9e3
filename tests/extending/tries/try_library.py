"""Run within a copy of the code that the patches were applied to: the additions of the library do what
they say.
"""

from pathlib import Path

import pytest
import torch
from tiny_training import GRID, WIDTH, make_columns, make_foundation, tiny_data, tiny_model, tiny_train
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from repfusion.conditioning.base import Condition, Context
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.generate import generate
from repfusion.llm.load import load_language_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiT, DiTConfig
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("world")
    return make_foundation(root / "weights"), make_columns(root / "data")


def try_method(world, tmp_path: Path):
    foundation, columns = world
    model = tiny_model(foundation).model_dump() | {"conditioning": "mean_embed"}
    config = tiny_train(
        foundation, columns, tmp_path, model=ModelConfig.model_validate(model), data=tiny_data(columns)
    )
    train(config)
    drawn = load_checkpoint(tmp_path / "checkpoints" / "step_00000004")
    assert "conditioner.norm.weight" in drawn.trainable_state()
    requests = [Request("a red circle"), Request("two blue")]
    images = generate(drawn, drawn.load_decoder(), requests, config=SamplerConfig(num_steps=2))
    assert images.shape == (2, 3, 32, 32) and not torch.equal(images[0], images[1])


def try_denoiser_block():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(hidden_size=24, depth=2, num_heads=2), WIDTH, (GRID, GRID), None, (32, 8))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z_t, t = torch.randn(2, GRID**2, WIDTH), torch.rand(2)
    text, other = Context(torch.randn(2, 5, 32)), Context(torch.randn(2, 3, 8))
    static = dit.prefill((text,))
    velocity = dit(z_t, t, Condition(contexts=(other,)), static)
    assert torch.equal(velocity, dit(z_t, t, Condition(), dit.prefill((text, other))))
    changed = dit(z_t, t, Condition(contexts=(Context(torch.randn(2, 3, 8)),)), static)
    assert not torch.allclose(velocity, changed)


def try_model_family(world, tmp_path: Path):
    foundation, columns = world
    tokenizer = AutoTokenizer.from_pretrained(foundation / "llava")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    causal = GPT2LMHeadModel(config).eval()
    causal.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    llm = load_language_model(tmp_path / "gpt2")
    prefix = llm.tokenise(["a red circle", "two"])
    states = llm.read(prefix)
    for row, keep, prompt in zip(states, prefix.mask, ("a red circle", "two"), strict=True):
        ids = torch.tensor([[llm.begin_id, *llm.token_ids([prompt])[0]]])
        torch.testing.assert_close(
            row[keep], causal.transformer(ids).last_hidden_state[0], rtol=1e-4, atol=1e-5
        )
    tokens = torch.randn(2, 4, 32)
    after = llm.read_on(prefix, tokens), llm.read_on(llm.remember(prefix), tokens)
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)
    model = tiny_model(foundation).model_copy(update={"mllm": tmp_path / "gpt2"})
    train(tiny_train(foundation, columns, tmp_path / "run", model=model, num_steps=2))
