"""The folder of an export -> its model; whether every file of it is what was written."""

import json
from pathlib import Path
from typing import Any

import torch

from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.projector import Projector
from repfusion.model.build import assemble, load_llm, load_second_llm
from repfusion.model.config import ModelConfig
from repfusion.model.discrete.base import CodeModel
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_drawer, read_weights
from repfusion.runs.folder import CONFIG, STATISTICS
from repfusion.runs.seals import damage, read_seals
from repfusion.weights import WEIGHTS, WEIGHTS_MARK, portable

SCHEMA = 3
MARK = "export.json"
"""Digests of an export's files; written last, it marks the export complete."""
LANGUAGE_MODEL, DENOISER, DECODER = "language_model", "denoiser", "decoder"
SECOND_LANGUAGE_MODEL = "second_language_model"
"""Folders of an export's parts; the last one only of a method that reads with two."""


def is_export(folder: Path) -> bool:
    return (folder / MARK).is_file()


def check_export(folder: Path) -> dict[str, Any]:
    """What export.json says. ValueError where the folder is no export, or a file is missing or not what was
    written.
    """
    if not is_export(folder):
        what = f"has no {MARK}: it is no export" if folder.is_dir() else "does not exist"
        raise ValueError(f"export {folder} {what}; 'python -m repfusion.export' writes one")
    info = read_seals(folder / MARK, SCHEMA, f"export {folder}")
    if problem := damage(folder, info["files"]):
        raise ValueError(f"export {folder}: {problem}; copy it again")
    return info


def load_export(folder: str | Path, mllm_dtype: str | None = None) -> TextToImage:
    """The model of an export, on the CPU, in eval mode; its decoder is the export's.

    Args:
        folder: what `export` wrote.
        mllm_dtype: precision of the frozen language model, as in ModelConfig; None is the checkpoint's.

    Raises:
        ValueError: a file is missing or not what was written.
    """
    folder = Path(folder)
    check_export(folder)
    saved = json.loads((folder / DENOISER / CONFIG).read_text())
    own = {"mllm": str(folder / LANGUAGE_MODEL), "decoder": str(folder / DECODER)}
    if mllm_dtype is not None:
        own["mllm_dtype"] = mllm_dtype
    values = portable(saved["model"], WEIGHTS_MARK, str(WEIGHTS)) | own
    if values["conditioning"].get("second") is not None:
        values["conditioning"]["second"] = str(folder / SECOND_LANGUAGE_MODEL)
    config = ModelConfig.model_validate(values)
    llm, second = load_llm(config), load_second_llm(config)
    statistics = LatentStatistics.load(folder / DENOISER / STATISTICS)
    with torch.random.fork_rng(devices=[]):  # the weights below are all overwritten
        if saved["projector"] is not None:
            llm.projector = Projector(statistics.mean.shape[1], llm.width, **saved["projector"])
        model = assemble(config, llm, statistics, tuple(saved["grid"]), second)
    model.load_saved_state(read_weights(folder / DENOISER, use_ema=False))
    return model.eval()


def load_any(folder: str | Path) -> TextToImage | CodeModel:
    """The model of an export, or of a checkpoint (averaged weights)."""
    return load_export(folder) if is_export(Path(folder)) else load_drawer(Path(folder))
