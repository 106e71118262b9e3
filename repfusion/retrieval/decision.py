"""Prompts of scenes, each drawn and retrieved -> a linear classifier of GILL's states that says which of the
two to show (arXiv 2305.17216, section 3.3).

The paper asks people which image fits a prompt better, and leaves out those on which they differ. On scenes
the exact detector says of both whether they are right, and prompts of which both are, or neither, are left
out. As in the paper's code, what is classified is the state at the first [IMG] token; ours is the quadratic
penalty in the place of dropout, so that the classifier is the one optimum of its loss.

DECISION/  decision.safetensors  weight [c] and bias [1]
           decision.json         what it was learned from, and how often it is right; written last
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repfusion.config import Config, Strict, naming, validate
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.suites.base import Count
from repfusion.files import atomic_path, write_json
from repfusion.generate import generate, to_uint8
from repfusion.inputs import to_device
from repfusion.request import Request
from repfusion.retrieval.embedding import EmbeddingSpace, GillReader
from repfusion.retrieval.index import ImageIndex
from repfusion.scenes.captions import Prompt, draw_prompts
from repfusion.scenes.detector import check, detect
from repfusion.scenes.world import Split

RECORD, WEIGHTS = "decision.json", "decision.safetensors"
FEWEST = 2
"""Prompts of either answer that have to be there, for learning and for testing."""


class DecisionConfig(Config):
    """What the decision is learned from."""

    num_prompts: int = Field(default=400, ge=8)
    """Prompts that are drawn and retrieved; those on which both are right or wrong do not count."""
    seed: int = Field(default=0, ge=0)
    """Decides prompts and noise."""
    split: Split = "train"
    """Prompts of combinations that training shows, or held-out ones."""
    test_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the prompts that count which is kept for testing."""
    penalty: float = Field(default=0.01, gt=0)
    """Weight of the squared weights, of standardised states, beside the mean cross-entropy."""
    sampler: SamplerConfig = SamplerConfig()
    """Draws the images."""
    batch_size: int = Field(default=64, ge=1)
    """Images that are drawn at once."""


class DecisionRecord(Strict):
    """What `decision.json` says."""

    space: EmbeddingSpace
    index: str
    """Digest of the index whose images were retrieved."""
    config: DecisionConfig
    drawn_alone: int
    """Prompts of which the drawn image alone is right."""
    retrieved_alone: int
    both: int
    neither: int
    test: Count
    """How many of those kept for testing it decides as the detector does."""
    majority: Count
    """How many the more frequent answer of those it learned from would."""


@dataclass(frozen=True)
class Decision:
    """A classifier of states at the first [IMG] token."""

    weight: Float[Tensor, " c"]
    bias: Float[Tensor, "1"]

    def draws(self, states: Float[Tensor, "b k c"]) -> Float[Tensor, " b"]:
        """The probability that the drawn image is the better one, of states at the [IMG] tokens."""
        return (states[:, 0].float().cpu() @ self.weight + self.bias).sigmoid()


def fit_decision(states: Float[Tensor, "n c"], is_drawn: Bool[Tensor, " n"], penalty: float) -> Decision:
    """Logistic regression: the minimum of the mean cross-entropy plus `penalty` times the squared weights of
    the standardised states; by Newton's method, in float64.
    """
    x = states.double()
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = torch.cat([(x - mean) / deviation, x.new_ones(len(x), 1)], dim=1)
    held = torch.full((x.shape[1],), 2 * penalty, dtype=x.dtype)
    held[-1] = 1e-9  # the bias is free
    w = x.new_zeros(x.shape[1])
    for _ in range(100):
        step = _newton_step(x, is_drawn.double(), held, w)
        w = w - step
        if step.abs().max() < 1e-10:
            break
    weight = w[:-1] / deviation
    return Decision(weight.float(), (w[-1] - weight @ mean)[None].float())


def _newton_step(
    x: Float64[Tensor, "n c"],
    wanted: Float64[Tensor, " n"],
    held: Float64[Tensor, " c"],
    w: Float64[Tensor, " c"],
) -> Float64[Tensor, " c"]:
    """The step, halved until the loss falls."""
    shares = (x @ w).sigmoid()
    gradient = x.T @ (shares - wanted) / len(x) + held * w
    curvature = (x * (shares * (1 - shares))[:, None]).T @ x / len(x) + torch.diag(held)
    step = torch.linalg.solve(curvature, gradient)

    def loss(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, wanted) + (held * w**2).sum() / 2

    while loss(w - step) > loss(w) and step.abs().max() > 1e-10:
        step = step / 2
    return step


Outcome = tuple[list[bool], list[bool]]
"""Whether, for each prompt, the drawn image is right, and whether the retrieved one is."""


def learn_decision(
    reader: GillReader,
    index: ImageIndex,
    config: DecisionConfig,
    judge: Callable[[GillReader, ImageIndex, Sequence[Prompt], DecisionConfig], Outcome] | None = None,
) -> tuple[Decision, DecisionRecord]:
    """The classifier of a checkpoint and an index, and what it is worth. `judge` says which images are right;
    None draws and retrieves them.

    Raises:
        ValueError: the index is of another checkpoint or encoder; too few prompts of one answer.
    """
    index.check(reader.space)
    prompts = draw_prompts(config.num_prompts, config.seed, include_new=False, split=config.split)
    drawn, retrieved = (judge or judge_both)(reader, index, prompts, config)
    counted = [row for row in range(len(prompts)) if drawn[row] != retrieved[row]]
    is_drawn = torch.tensor([drawn[row] for row in counted], dtype=torch.bool)
    num_test = round(config.test_share * len(counted))
    check_enough(is_drawn, num_test, len(prompts))
    states = read_states(reader, [prompts[row].text for row in counted], config.batch_size)
    found = fit_decision(states[num_test:, 0], is_drawn[num_test:], config.penalty)
    right = (found.draws(states[:num_test]) > 0.5) == is_drawn[:num_test]
    usual = bool(is_drawn[num_test:].float().mean() > 0.5)
    both = sum(a and b for a, b in zip(drawn, retrieved, strict=True))
    return found, DecisionRecord(
        space=reader.space,
        index=index.digest,
        config=config,
        drawn_alone=int(is_drawn.sum()),
        retrieved_alone=int((~is_drawn).sum()),
        both=both,
        neither=len(prompts) - len(counted) - both,
        test=Count(correct=int(right.sum()), total=num_test),
        majority=Count(correct=int((is_drawn[:num_test] == usual).sum()), total=num_test),
    )


def check_enough(is_drawn: Bool[Tensor, " n"], num_test: int, num_prompts: int) -> None:
    """Raises ValueError where the prompts to learn from, or to test on, are too few of one answer."""
    for part in (is_drawn[:num_test], is_drawn[num_test:]):
        if min(int(part.sum()), int((~part).sum())) < FEWEST:
            raise ValueError(
                f"of {num_prompts} prompts the drawn image alone is right for {int(is_drawn.sum())} and the "
                f"retrieved one alone for {int((~is_drawn).sum())}: too few of one to learn a decision and "
                "to test it; raise num_prompts, or always show the other"
            )


@torch.no_grad()
def read_states(reader: GillReader, prompts: Sequence[str], size: int) -> Float[Tensor, "n k c"]:
    """States at the [IMG] tokens after prompts, float32, on the CPU."""
    found = []
    for start in range(0, len(prompts), size):
        prefix = to_device(reader.conditioner.llm.tokenise(prompts[start : start + size]), reader.device)
        found.append(reader.conditioner.read_image_tokens(prefix).float().cpu())
    return torch.cat(found)


def judge_both(
    reader: GillReader, index: ImageIndex, prompts: Sequence[Prompt], config: DecisionConfig
) -> Outcome:
    """Draws an image of each prompt, retrieves the nearest, and asks the detector of scenes about both."""
    decoder = reader.model.load_decoder()
    drawn: list[bool] = []
    retrieved: list[bool] = []
    for start in range(0, len(prompts), config.batch_size):
        part = prompts[start : start + config.batch_size]
        requests = [Request(one.text) for one in part]
        sampler = config.sampler.on(reader.device)
        pixels = generate(reader.model, decoder, requests, config.seed + start, sampler, config.batch_size)
        drawn += [is_right(image, one) for image, one in zip(to_uint8(pixels), part, strict=True)]
        hits = index.find(reader.of_prompts([one.text for one in part]), 1)
        images = [index.image(row[0]) for row in hits]
        retrieved += [is_right(image, one) for image, one in zip(images, part, strict=True)]
    return drawn, retrieved


def is_right(image: np.ndarray, prompt: Prompt) -> bool:
    """Whether an image, uint8 [h, w, 3], shows what a prompt of scenes states."""
    return check(detect(np.moveaxis(image, -1, 0).astype(np.float32) / 255), prompt).correct


def save_decision(folder: Path, decision: Decision, record: DecisionRecord) -> None:
    """Writes a classifier and what it was learned from."""
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({"weight": decision.weight, "bias": decision.bias}, str(temporary))
    write_json(folder / RECORD, record.model_dump(mode="json"))


def load_decision(folder: Path, space: EmbeddingSpace, index: ImageIndex) -> Decision:
    """A classifier that `save_decision` wrote. Raises ValueError where there is none, it is damaged, or it
    was learned of another checkpoint, encoder or index.
    """
    remedy = "learn it by 'python -m repfusion.retrieval decide'"
    if not (folder / RECORD).is_file():
        raise ValueError(f"decision {folder}: no {RECORD} here; {remedy}")
    with naming(f"decision {folder}"):
        record = validate(DecisionRecord, json.loads((folder / RECORD).read_text()), RECORD)
    space.check(record.space, f"decision {folder}", remedy)
    if record.index != index.digest:
        raise ValueError(
            f"decision {folder} was learned of the index {record.index[:12]}, {index.folder} is "
            f"{index.digest[:12]}; {remedy} of this one"
        )
    try:
        found = load_file(folder / WEIGHTS)
        return Decision(found["weight"], found["bias"])
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"decision {folder}: {WEIGHTS} is not readable ({error}); {remedy}") from error
