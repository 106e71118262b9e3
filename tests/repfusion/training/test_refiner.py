"""A conditioner that trains a refiner behind the frozen language model, under every ZeRO stage: micro-batches
in which nothing conditions run it too, so that all ranks run the same modules.

As a script, this file is one rank of such a training: `test_refiner.py FOUNDATION OUT JSON`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from programs import torchrun
from safetensors.torch import load_file, save_file
from tiny_training import GRID, WIDTH, tiny_model
from torch import nn

from repfusion.conditioning.base import Conditioner, Context, Prepared
from repfusion.diffusion.flow import draw
from repfusion.inputs import Inputs
from repfusion.latents.statistics import LatentStatistics
from repfusion.layers import EncoderBlock
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.model.dit import DiT
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Branch, Request
from repfusion.training.distributed import shut_down
from repfusion.training.engine import Engine, EngineConfig

NUM_STEPS, GLOBAL_BATCH, MICRO_BATCH = 16, 8, 2
PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", "red"] * 2
DROPPED = {0: {2, 3}, 1: {4, 5, 6, 7}, 2: set(range(8)), 3: {1}}
"""By step modulo 4, the places whose condition is dropped: one micro-batch whole, all of the second rank,
everything, one sample.
"""


class RefinedConditioner(Conditioner):
    """The mean of the refined states of a prompt; a learned token where nothing conditions."""

    def __init__(self, llm: LanguageModel):
        super().__init__()
        self.llm = llm
        llm.projector = None
        self.context_widths = (llm.width,)
        self.refiner = nn.ModuleList(EncoderBlock(llm.width, 2) for _ in range(2))
        self.nothing = nn.Parameter(torch.randn(1, 1, llm.width))

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompts of the rows that condition; the empty prompt's where there is none."""
        rows = [row for row, branch in enumerate(branches) if branch == "full"]
        texts = [requests[row].prompt for row in rows] or [""]
        return {
            "prefix": self.llm.tokenise(texts),
            "rows": torch.tensor(rows, dtype=torch.long),
            "num": len(requests),
        }

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """The one context, of one token a row; the refiner runs at weight 0 where nothing conditions."""
        prefix, rows = inputs["prefix"], inputs["rows"]
        states = self.llm.read(prefix)
        for layer in self.refiner:
            states = layer(states)
        means = (states * prefix.mask[..., None]).sum(1, keepdim=True) / prefix.mask.sum(1)[:, None, None]
        tokens = self.nothing.expand(inputs["num"], -1, -1)
        tokens = tokens.index_copy(0, rows, means) if len(rows) else tokens + 0 * means.sum()
        return Prepared(static=(Context(tokens),))


class Refined(TextToImage):
    def layers(self) -> list[nn.Module]:
        """The refiner's layers too are computed again in the backward pass."""
        return [*super().layers(), *self.conditioner.refiner]


def build(foundation: Path) -> Refined:
    torch.manual_seed(0)
    config, grid = tiny_model(foundation, "text_embed"), (GRID, GRID)
    conditioner = RefinedConditioner(load_language_model(foundation / "llava"))
    denoiser = DiT(config.dit, WIDTH, grid, conditioner.aligned_width, conditioner.context_widths)
    with torch.no_grad():  # a fresh DiT lets nothing through
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shape = (GRID**2, WIDTH)
    statistics = LatentStatistics(1, torch.zeros(shape).double(), torch.ones(shape).double())
    return Refined(config, conditioner, denoiser, statistics, grid)


def inputs_at(model: Refined, step: int, places: list[int]) -> Inputs:
    """A micro-batch: the same latents in every step; noise and what is dropped come again after four."""
    branches: list[Branch] = ["none" if one in DROPPED[step % 4] else "full" for one in places]
    t, noise = draw([100 * (1 + step % 4) + one for one in places], model.latent_shape, model.shift)
    latents = torch.randn(GLOBAL_BATCH, *model.latent_shape, generator=torch.Generator().manual_seed(7))
    requests = [Request(PROMPTS[one]) for one in places]
    return {
        "request": model.conditioner.collate(requests, branches),
        "features": latents[places].half(),
        "t": t,
        "noise": noise,
    }


def run_rank(foundation: Path, out: Path, zero_stage: int, checkpointing: bool) -> None:
    """Trains, and writes losses and weights as rank 0 has them."""
    model = build(foundation)
    if checkpointing:
        model.checkpoint_activations()
    config = EngineConfig(
        precision="fp32", zero_stage=zero_stage, micro_batch_size=MICRO_BATCH, lr=5e-3, warmup_steps=1,
        schedule="constant", num_threads=1,
    )  # fmt: skip
    engine = Engine(model, config, GLOBAL_BATCH, NUM_STEPS, model.frozen_parts())
    per_rank, losses = GLOBAL_BATCH // engine.world_size, []
    for step in range(NUM_STEPS):
        for start in range(engine.rank * per_rank, (engine.rank + 1) * per_rank, MICRO_BATCH):
            places = list(range(start, start + MICRO_BATCH))
            engine.accumulate([str(one) for one in places], inputs=inputs_at(model, step, places))
        losses.append(engine.update(step).loss)
    if (weights := engine.weights()) is not None:
        save_file({name: value.contiguous() for name, value in weights.items()}, out / "weights.safetensors")
        (out / "losses.json").write_text(json.dumps(losses))
    shut_down()


def trained(
    foundation: Path, out: Path, world_size: int, **settings: int | bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights after a training on so many ranks."""
    out.mkdir()
    torchrun(world_size, __file__, foundation, out, json.dumps(settings))
    return json.loads((out / "losses.json").read_text()), load_file(out / "weights.safetensors")


@pytest.fixture(scope="module")
def alone(foundation: Path, tmp_path_factory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One rank, which keeps its activations."""
    out = tmp_path_factory.mktemp("refiner") / "alone"
    return trained(foundation, out, 1, zero_stage=0, checkpointing=False)


@pytest.mark.slow
def test_the_refiner_trains(foundation, alone):
    losses, weights = alone
    before = build(foundation).trainable_state()
    assert weights.keys() == before.keys()
    names = [name for name in before if name.startswith("conditioner.")]
    assert len(names) > 10 and not any(torch.equal(weights[name], before[name]) for name in names)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_that_compute_activations_again_equal_one(foundation, alone, tmp_path, zero_stage):
    losses, weights = trained(foundation, tmp_path / "two", 2, zero_stage=zero_stage, checkpointing=True)
    assert losses == pytest.approx(alone[0], rel=1e-3)
    assert weights.keys() == alone[1].keys()
    for name, expected in alone[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=5e-4, msg=name)


@pytest.mark.parametrize("step", range(4))
def test_every_trained_module_has_a_gradient_in_every_micro_batch(foundation, step):
    model = build(foundation)
    for start in range(0, GLOBAL_BATCH, MICRO_BATCH):
        model.zero_grad()
        model(inputs_at(model, step, [start, start + 1]))["velocity"].mean().backward()
        assert [name for name, p in model.trainable_state().items() if p.grad is None] == []


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
