"""A checkpoint -> images of held-out prompts -> `scores.json` and `gallery.png` in a folder.

step_00000500/  gallery.png  scores.json (written last: it marks the evaluation complete)
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field

from repfusion.config import Config, Strict
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.gallery import gallery
from repfusion.evaluation.scores import ScoredImages, Scores, score_images
from repfusion.files import atomic_path, write_json
from repfusion.generate import generate
from repfusion.latents.load import Decoder
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import check_complete, load_checkpoint
from repfusion.scenes.captions import TASKS, Prompt, Task, draw_prompts
from repfusion.scenes.world import Split

GALLERY_COLUMNS = 6


class EvaluationConfig(Config):
    num_prompts: int = Field(default=240, ge=1)
    """The six tasks in turn."""
    split: Split = "held_out"
    """Prompts that each state a fact that no training image shows, or such as training shows."""
    include_new: bool = True
    """Whether prompts may name the new shape and colour."""
    seed: int = 0
    """Of prompts, noise and shuffling: the same seed gives every checkpoint the same three."""
    batch_size: int = Field(default=60, ge=1)
    """Prompts sampled at once; the images do not depend on it."""
    sampler: SamplerConfig = SamplerConfig()
    """Steps and guidance."""
    use_ema: bool = True
    """Averaged weights rather than the last ones."""
    device: str | None = None
    """Torch device; None takes CUDA where there is one."""


class ScoredPrompt(Strict):
    prompt: str
    task: Task
    is_new: bool
    correct: bool
    reason: str


class Evaluation(Strict):
    """What `scores.json` holds."""

    checkpoint: str
    step: int | None
    """Training step of the checkpoint; None where it does not say."""
    config: EvaluationConfig
    scores: Scores
    seconds: float
    """Loading, sampling and scoring."""
    samples: list[ScoredPrompt]


def _gallery_rows(prompts: list[Prompt]) -> tuple[list[int], list[str]]:
    """Indices of some prompts per task, different ones as far as there are; the titles of their rows."""
    rows: dict[str, list[int]] = {}
    for task in TASKS:
        own = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        first = {prompts[i].text: i for i in reversed(own)}
        rows[task.replace("_", " ")] = sorted(own, key=lambda i: (first[prompts[i].text] != i, i))[
            :GALLERY_COLUMNS
        ]
    full = {title: row for title, row in rows.items() if len(row) == GALLERY_COLUMNS}
    if not full:
        return list(range(len(prompts))), []
    return [i for row in full.values() for i in row], list(full)


def _load(checkpoint: Path, config: EvaluationConfig) -> tuple[TextToImage, Decoder]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(checkpoint, use_ema=config.use_ema).to(device)
    return model, model.load_decoder()


def _picture(
    pixels: Float[np.ndarray, "b 3 h w"], prompts: list[Prompt], scored: ScoredImages
) -> Image.Image:
    shown, titles = _gallery_rows(prompts)
    texts = [prompts[i].text for i in shown]
    marks = [scored.verdicts[i].correct for i in shown]
    return gallery(pixels[shown], texts, marks, GALLERY_COLUMNS, titles or None)


def _run_here(work: Callable[[], Any]) -> Any:
    return work()


def evaluate_checkpoint(
    checkpoint: Path,
    out: Path,
    config: EvaluationConfig = EvaluationConfig(),
    run: Callable[[Callable[[], Any]], Any] = _run_here,
) -> Evaluation:
    """Generates, scores, and writes `gallery.png` and then `scores.json` under `out`, each atomically.

    `run` is given the work in pieces, such as to load the checkpoint or to sample one batch, and may call
    each in a thread of its choice.

    Raises:
        ValueError: an incomplete checkpoint, or one whose frozen weights are not those on this machine.
    """
    started = time.perf_counter()
    info = check_complete(checkpoint)
    model, decoder = run(partial(_load, checkpoint, config))
    prompts = run(partial(draw_prompts, config.num_prompts, config.seed, config.include_new, config.split))
    texts = [prompt.text for prompt in prompts]
    batches = []
    for start in range(0, len(texts), config.batch_size):
        part = texts[start : start + config.batch_size]
        batches.append(
            run(partial(generate, model, decoder, part, config.seed + start, config.sampler, len(part)))
        )
    pixels = torch.cat(batches).numpy()
    scored = run(partial(score_images, pixels, prompts, config.seed))
    picture = run(partial(_picture, pixels, prompts, scored))

    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "gallery.png") as temporary:
        picture.save(temporary, "PNG")
    evaluation = Evaluation(
        checkpoint=str(checkpoint),
        step=info.get("step"),
        config=config,
        scores=scored.scores,
        seconds=round(time.perf_counter() - started, 2),
        samples=[
            ScoredPrompt(prompt=p.text, task=p.task, is_new=p.is_new, correct=v.correct, reason=v.reason)
            for p, v in zip(prompts, scored.verdicts, strict=True)
        ],
    )
    write_json(out / "scores.json", evaluation.model_dump(mode="json"))
    return evaluation


def read_evaluation(folder: Path) -> Evaluation | None:
    """A finished evaluation, or None where there is none.

    Raises:
        ValueError: where `scores.json` is not one (pydantic names the field).
    """
    path = folder / "scores.json"
    return Evaluation.model_validate_json(path.read_text()) if path.is_file() else None
