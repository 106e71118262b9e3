"""A model <-> a folder of safetensors and JSON; what is read is compared with `complete.json` first
(completion.py).

step_00000500/  config.json  model.safetensors  ema.safetensors  statistics.safetensors  resume/
complete.json
"""

import json
import logging
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repfusion.conditioning.base import Handover
from repfusion.config import merge, naming, read_values, validate
from repfusion.files import weights_digest, write_json
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_code_model, build_model
from repfusion.model.config import ANY_MODEL, CodesModelConfig, ModelConfig, flow_of, kind_of
from repfusion.model.discrete.base import CodeModel
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import Trainable, TrainableConfig
from repfusion.pretrained.cache import fetch
from repfusion.pretrained.weights import read_headers
from repfusion.runs.completion import (
    SCHEMA,
    begin_checkpoint,
    check_complete,
    finish_checkpoint,
    read_complete,
)
from repfusion.runs.folder import (
    AVERAGES,
    CONFIG,
    LINEAGE,
    RESUME,
    STATISTICS,
    WEIGHTS_FILE,
    checkpoint_folder,
    complete_checkpoints,
    is_pinned,
    step_of,
    working_folder,
)
from repfusion.weights import WEIGHTS, WEIGHTS_MARK, portable

log = logging.getLogger(__name__)
TRAINING_FIELDS = {"model", "output_dir", "data", "init_from", "engine", "num_steps"}
"""Fields by which a training's YAML is told from a model's."""


def frozen_digests(model: Trainable) -> dict[str, str]:
    """sha256 of the frozen weights that a checkpoint relies on and does not hold."""
    llm = model.conditioner.llm if isinstance(model, TextToImage) else None
    folders = model.config.parts(lambda weights: weights.to_train)
    return {
        part: llm.digest if llm is not None and folder == llm.folder else weights_digest(folder)
        for part, folder in folders.items()
    }


def write_model(
    folder: Path,
    model: Trainable,
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    digests: Mapping[str, str],
) -> None:
    """Weights and averaged weights, each with the buffers that belong to them, config, and the statistics of
    a model that has some; all that generating needs.
    """
    config = portable(model.config.model_dump(mode="json"))
    write_json(folder / CONFIG, {"schema": SCHEMA, "model": config, "digests": dict(digests)})
    fixed = model.fixed_state()
    for name, tensors in (("model", weights), ("ema", ema)):
        values = {key: value.detach().cpu().contiguous() for key, value in {**tensors, **fixed}.items()}
        save_file(values, str(folder / f"{name}.safetensors"))
    if isinstance(model, TextToImage):
        model.statistics.save(folder / STATISTICS)
    mode = (folder / CONFIG).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # safetensors lets nobody else read what it writes


def save_checkpoint(folder: Path, model: Trainable, ema: Mapping[str, Tensor], **info: Any) -> None:
    """A checkpoint to generate or start from, without the state that resuming needs. `info` goes to
    `complete.json`.
    """
    working = begin_checkpoint(folder)
    write_model(working, model, model.trainable_state(), ema, frozen_digests(model))
    finish_checkpoint(working, folder, info)


def read_config(folder: Path) -> tuple[ModelConfig | CodesModelConfig, dict[str, str]]:
    """The model config and the digests of the frozen weights it was trained with."""
    try:
        saved = json.loads((folder / CONFIG).read_text())
        model, digests = saved["model"], saved["digests"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {folder}: {CONFIG} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    return ANY_MODEL.validate_python(portable(model, WEIGHTS_MARK, str(WEIGHTS))), digests


def continued_model(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a model that goes on from a checkpoint: the given ones, else the checkpoint's."""
    return continued_fields(read_config(folder)[0].model_dump(mode="json"), given)


def continued_fields(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a model that goes on from another with the `saved` ones: the given ones, else those. Another
    method of conditioning replaces the section.
    """
    saved, given = dict(saved), dict(given)
    wanted = given.get("conditioning")
    method = wanted.get("method") if isinstance(wanted, Mapping) else wanted
    before = saved.get("conditioning")
    if method not in (None, before["method"] if isinstance(before, Mapping) else before):
        saved.pop("conditioning", None)
    elif isinstance(wanted, str):
        del given["conditioning"]
    return merge(saved, given)


def load_model_config(path: Path) -> ModelConfig:
    """The `model` of a training's YAML (or of a workflow's last), or a YAML of a model alone, which draws by
    a flow. As in training, fields that are not given are those of `init_from`, where it is there.

    Raises:
        ValueError: an unknown or wrong field, or another kind of model; a training that names neither a model
            nor a checkpoint that is there.
    """
    fields = read_values(path)
    if trainings := fields.get("trainings"):
        fields = trainings[list(trainings)[-1]]
    if not fields.keys() & TRAINING_FIELDS:
        return validate(ModelConfig, fields, str(path))
    given, start = fields.get("model") or {}, fields.get("init_from")
    if (kind := kind_of(given)) != "text_to_image":
        raise ValueError(f"{path}: model.kind is {kind!r}; expected a text-to-image model")
    if start is None:
        return validate(ModelConfig, given, str(path))
    if (Path(start) / CONFIG).is_file():
        flow_of(read_config(Path(start))[0], f"a text-to-image model of {path}")
        given = continued_model(Path(start), given)
    elif not given:
        raise ValueError(f"{path}: init_from {start} is not there, and no model is given; train it first")
    return validate(ModelConfig, given, str(path))


def read_weights(folder: Path, use_ema: bool) -> dict[str, Tensor]:
    path = folder / (AVERAGES if use_ema else WEIGHTS_FILE)
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {folder}: {path.name} is not readable ({error}); copy it again"
        ) from error


def differences(got: Any, expected: Any, prefix: str = "") -> list[str]:
    if isinstance(got, dict) and isinstance(expected, dict):
        fields = [*got, *(field for field in expected if field not in got)]
        return [
            line
            for f in fields
            for line in differences(got.get(f), expected.get(f), f"{prefix}.{f}" if prefix else f)
        ]
    return [] if got == expected else [f"{prefix} {got!r}, expected {expected!r}"]


def load_weights(model: Trainable, folder: Path, use_ema: bool = True, on_meta: bool = False) -> None:
    """Weights of a checkpoint, whose files were compared already, into a model that was built already; into
    one without memory (`on_meta`), their headers alone are read.

    Raises:
        ValueError: of another geometry, naming the first tensors, and the config fields in which the two
            models differ.
    """
    with _fitting(model, folder):
        model.load_saved_state(_state_of(folder, use_ema, on_meta))


def load_start(model: Trainable, folder: Path, on_meta: bool = False) -> None:
    """Averaged weights of a checkpoint that a training starts from, as `load_weights` reads them: all of
    them, or what the model's method takes of another's (`MethodConfig.handover`). The log says what is read,
    what is left and what is fresh.

    Raises:
        ValueError: as `load_weights`; what is taken is of another geometry, or lacks frozen weights.
    """
    before, _ = read_config(folder)
    wanted = _handover(model, folder, before)
    if wanted is None:
        load_weights(model, folder, on_meta=on_meta)
        return
    with _fitting(model, folder):
        whole = _state_of(folder, True, on_meta)
        state = {name: weight for name, weight in whole.items() if name.startswith(wanted.weights)}
        fresh = model.load_part(state)
    said = "start from %s (%s): %d weights of it are taken, %d left out, %d of the model are fresh"
    counts = len(state), len(whole) - len(state), len(fresh)
    log.info(said, folder, before.label, *counts)


def _refuse_other_kind(model: Trainable, folder: Path, before: TrainableConfig) -> None:
    if type(before) is not type(model.config):
        raise ValueError(
            f"checkpoint {folder} is of {before.label}, of which {model.config.label} takes nothing; name "
            "another init_from, or none"
        )


def _handover(model: Trainable, folder: Path, before: TrainableConfig) -> Handover | None:
    _refuse_other_kind(model, folder, before)
    if not isinstance(before, ModelConfig) or not isinstance(model, TextToImage):
        return None
    with naming(f"checkpoint {folder}"):
        return model.config.conditioning.handover(before.conditioning)


def _state_of(folder: Path, use_ema: bool, on_meta: bool) -> Mapping[str, Tensor]:
    if on_meta:
        return read_headers([folder / (AVERAGES if use_ema else WEIGHTS_FILE)], "checkpoint")
    return read_weights(folder, use_ema)


@contextmanager
def _fitting(model: Trainable, folder: Path) -> Iterator[None]:
    """Puts before the message of a ValueError which checkpoint does not fit, and after it why."""
    try:
        yield
    except ValueError as error:
        saved, _ = read_config(folder)
        fields = differences(saved.model_dump(mode="json"), model.config.model_dump(mode="json"))
        hint = f"; config fields that differ: {'; '.join(fields)}" if fields else ""
        raise ValueError(f"checkpoint {folder} does not fit the model: {error}{hint}") from error


def load_checkpoint(folder: str | Path, use_ema: bool = True) -> TextToImage:
    """The text-to-image model of a checkpoint, on the CPU, in eval mode.

    Raises:
        ValueError: a checkpoint that is incomplete or damaged, or of another model, or frozen weights on this
            machine that are not those it was trained with.
    """
    folder = Path(folder)
    check_complete(folder, files_to_load(read_complete(folder)["files"], use_ema))
    return load_checked(folder, use_ema)


def files_to_load(files: Container[str], use_ema: bool = True) -> list[str]:
    """Which of a checkpoint's files are read to load the model, and to say where it is from."""
    names = [CONFIG, STATISTICS, AVERAGES if use_ema else WEIGHTS_FILE, LINEAGE]
    return [name for name in names if name in files or name not in (STATISTICS, LINEAGE)]


def load_checked(folder: Path, use_ema: bool = True) -> TextToImage:
    """`load_checkpoint` of one whose files were compared already."""
    flow_of(read_config(folder)[0], f"who loads checkpoint {folder}")
    model = load_drawer(folder, use_ema, is_checked=True)
    assert isinstance(model, TextToImage)
    return model


def load_drawer(folder: Path, use_ema: bool = True, is_checked: bool = False) -> TextToImage | CodeModel:
    """The model of a checkpoint, whatever it draws by; raises as `load_checkpoint`.

    Args:
        folder: the checkpoint.
        use_ema: whether the averaged weights are taken.
        is_checked: whether its files were compared already.
    """
    if not is_checked:
        check_complete(folder, files_to_load(read_complete(folder)["files"], use_ema))
    config, digests = read_config(folder)
    fetch(config.parts().values())
    if isinstance(config, ModelConfig):
        model = build_model(config, LatentStatistics.load(folder / STATISTICS))
    else:
        model = build_code_model(config)
    check_digests(folder, digests, frozen_digests(model))
    load_weights(model, folder, use_ema)
    return model.eval()


def check_digests(folder: Path, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    for part, digest in saved.items():
        if present[part] != digest:
            raise ValueError(
                f"checkpoint {folder} was trained with {part} weights {digest[:12]}, "
                f"the folder its config names holds {present[part][:12]}; put the right {part} there"
            )


def check_continues(model: Trainable, folder: Path) -> None:
    """A run that continues from a checkpoint must keep its encoder and noise levels, which no tensor's
    shape tells apart; one of codes its tokenizers.

    Another MLLM of the same geometry is a legitimate experiment: that is only said. What is taken of another
    method's checkpoint was trained on what its MLLM says, and has to go on so.
    """
    saved, digests = read_config(folder)
    present = frozen_digests(model)
    _refuse_other_kind(model, folder, saved)
    if not isinstance(model, TextToImage) or not isinstance(saved, ModelConfig):
        check_digests(folder, digests, present)
        return
    check_digests(folder, {"encoder": digests["encoder"]}, present)
    wanted = _handover(model, folder, saved)
    if wanted is not None and digests["mllm"] != present[wanted.mllm]:
        raise ValueError(
            f"checkpoint {folder} was trained with mllm weights {digests['mllm'][:12]}, what is taken of it "
            f"reads with {wanted.mllm}, which holds {present[wanted.mllm][:12]}; name the checkpoint's there"
        )
    if wanted is None and digests["mllm"] != present["mllm"]:
        log.warning("continuing from %s with another MLLM than it was trained with", folder)
    before, now = (_encoder_view(one, model) for one in (saved, model.config))
    if before != now:
        raise ValueError(
            f"checkpoint {folder} was trained on the encoder's (layer, image_size, num_frames) {before}, "
            f"the run has {now}; "
            "leave model out of the config to take the checkpoint's"
        )
    if saved.flow != model.config.flow:
        raise ValueError(
            f"checkpoint {folder} was trained with model.flow {saved.flow}, "
            f"the run has {model.config.flow}; "
            "leave model out of the config to take the checkpoint's"
        )


def _encoder_view(config: ModelConfig, model: TextToImage) -> tuple[int, int, int | None]:
    """Layer, image size and frames by which features are taken; the weights are known to be the model's."""
    encoder = config.encoder
    at = model.config.encoder.model_copy(update={"image_size": encoder.image_size})
    return encoder.layer, at.geometry.image_size, encoder.num_frames


def expired(steps: Sequence[int], keep_last: int | None, keep_every_steps: int | None) -> list[int]:
    """The steps of checkpoints that need not stay, of all in order: all but the last `keep_last`, those at
    multiples of `keep_every_steps`, and the base (step 0). `keep_last` None keeps all.
    """
    older = () if keep_last is None else steps[:-keep_last]
    return [step for step in older if step and (keep_every_steps is None or step % keep_every_steps)]


def prune(
    root: Path, keep_resume: int, keep_last: int | None = None, keep_every_steps: int | None = None
) -> list[int]:
    """Drops the optimizer state of all but the last `keep_resume` checkpoints: it is twice the size of the
    weights. Removes whole checkpoints that are `expired` but for pinned ones; returns their steps.
    """
    steps, removed = [step_of(folder) for folder in complete_checkpoints(root)], []
    for step in expired(steps, keep_last, keep_every_steps):
        folder = checkpoint_folder(root, step)
        if not is_pinned(folder):
            # Out of sight first: half a checkpoint is none.
            doomed = working_folder(folder)
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(folder, doomed)
            shutil.rmtree(doomed)
            removed.append(step)
    resumable = [path for path in complete_checkpoints(root) if (path / RESUME).exists()]
    for folder in complete_checkpoints(root):  # of a process that was killed in the next lines
        shutil.rmtree(working_folder(folder / RESUME), ignore_errors=True)
    for folder in resumable[: max(0, len(resumable) - keep_resume)]:
        doomed = working_folder(folder / RESUME)
        os.replace(folder / RESUME, doomed)
        shutil.rmtree(doomed)
    return removed
