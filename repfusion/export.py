"""A checkpoint -> a folder that holds all that generating needs; `python -m repfusion.export --checkpoint DIR
--out FOLDER`.

FOLDER/  model_index.json  README.md  lineage.json
         export.json       digest of every file; it marks the export complete
         language_model/   the frozen language model and its tokenizer, as transformers saves them, and the
                           words it has read, where they are known
         denoiser/         config.json, model.safetensors (projector, embedders, DiT), statistics.safetensors
         decoder/          config.json, model.safetensors
         second_language_model/   where the method reads with two

The encoder is left out: sampling needs its geometry alone, which the denoiser's config holds.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.display.options import WithDefaults
from repfusion.display.redaction import redact_text
from repfusion.display.tables import markdown
from repfusion.display.terminal import printable_lines
from repfusion.evaluation.record import Evaluation, read_evaluation
from repfusion.evaluation.shown import shown_suites
from repfusion.files import replace_folder, write_json
from repfusion.latents.load import DecoderKind, kind_of_decoder
from repfusion.lineage.describe import checkpoint_record, read_lineage
from repfusion.llm.chats.format import TEMPLATE_FILE
from repfusion.llm.chats.read import GENERATION_CONFIG
from repfusion.llm.load import LANGUAGE_MODELS, family_of
from repfusion.llm.words import WORDS
from repfusion.model.config import ModelConfig, refuse_clips
from repfusion.model.text_to_image import TextToImage
from repfusion.pretrained.config import PROCESSOR_FILES, transformers_config
from repfusion.pretrained.weights import load_transformers
from repfusion.runs.checkpoint import load_checked, read_weights
from repfusion.runs.completion import check_complete
from repfusion.runs.exported import (
    DECODER,
    DENOISER,
    LANGUAGE_MODEL,
    MARK,
    SCHEMA,
    SECOND_LANGUAGE_MODEL,
    check_export,
    is_export,
)
from repfusion.runs.folder import AVERAGES, CONFIG, LINEAGE, STATISTICS, WEIGHTS_FILE
from repfusion.runs.named import named_model
from repfusion.runs.seals import files_below, seal, write_seals
from repfusion.weights import WEIGHTS, portable

INDEX = "model_index.json"
CARD = "README.md"
LANGUAGE_MODELS_OF = (LANGUAGE_MODEL, SECOND_LANGUAGE_MODEL)
"""Folders of the language models, in the order in which a conditioner holds them."""
ASKED_BY = (*PROCESSOR_FILES, TEMPLATE_FILE, "chat_template.jinja", GENERATION_CONFIG)
"""Files of a model that sees which say how it is shown images, asked and answered."""
"""Yours to edit: the one file without a digest."""


def export(checkpoint: Path, out: Path, use_ema: bool = True) -> Path:
    """Writes the export under a temporary name beside `out`, which replaces an earlier export in one move.

    Raises:
        ValueError: an incomplete checkpoint, frozen weights that are not those it was trained with, or an
            `out` that holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(os.path.abspath(out))
    check_target(out)
    name = AVERAGES if use_ema else WEIGHTS_FILE
    if name not in check_complete(checkpoint)["files"]:
        raise ValueError(f"checkpoint {checkpoint} holds no {name}; choose the other weights")
    model = load_checked(checkpoint, use_ema)
    refuse_clips(model.config, "an export")
    model.load_decoder()  # fits, or says why not
    working = out.with_name(f".{out.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        write_denoiser(model, checkpoint, working / DENOISER, use_ema)
        (working / DECODER).mkdir()
        for pattern in (CONFIG, "*.safetensors", "*.safetensors.index.json"):
            for file in model.config.decoder.glob(pattern):
                shutil.copyfile(file, working / DECODER / file.name)
        lineage = describe_export(model, checkpoint, use_ema)
        write_json(working / LINEAGE, lineage)
        config = model.config
        read = [(llm.folder, llm.tokenizer) for llm in model.conditioner.language_models]
        del model  # at full size there is not always room for its language model twice
        kinds = {
            name: write_language_model(config, origin, tokenizer, working / name)
            for name, (origin, tokenizer) in zip(LANGUAGE_MODELS_OF, read, strict=False)
        }
        write_json(working / INDEX, model_index(kinds, kind_of_decoder(config.decoder)))
        card = model_card(lineage, config, find_evaluation(checkpoint))
        (working / CARD).write_text(card)
        mode = (working / CARD).stat().st_mode
        for path in working.rglob("*.safetensors"):
            path.chmod(mode)  # safetensors lets nobody else read what it writes
        seals = seal(working, [name for name in files_below(working) if Path(name).name != CARD])
        write_seals(working / MARK, SCHEMA, {}, seals)
        replace_folder(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return out


def export_again(source: Path, out: Path) -> None:
    """Copies an export, its files compared with their digests first, in one move.

    Raises:
        ValueError: the export is damaged, or `out` holds something else.
    """
    out = Path(os.path.abspath(out))
    check_target(out)
    check_export(source)
    working = out.with_name(f".{out.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    try:
        shutil.copytree(source, working)
        replace_folder(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def check_target(out: Path) -> None:
    """ValueError where writing to `out` would destroy what is no export."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_export(out)):
        raise ValueError(f"{out}: exists and is no export; choose a new or empty folder")


def write_denoiser(model: TextToImage, checkpoint: Path, folder: Path, use_ema: bool) -> None:
    """The trained weights as the checkpoint stores them, the statistics, and what the encoder and the MLLM's
    own projector decided of their shapes.
    """
    folder.mkdir()
    config = model.config
    size = config.encoder.geometry.image_size
    geometry = {"grid": list(model.grid), "image_size_px": size, "projector": projector_fields(model)}
    saved = portable(config.model_dump(mode="json"))
    write_json(folder / CONFIG, {"schema": SCHEMA, "model": saved, **geometry})
    save_file(read_weights(checkpoint, use_ema), str(folder / WEIGHTS_FILE))
    model.statistics.save(folder / STATISTICS)


def projector_fields(model: TextToImage) -> dict[str, Any] | None:
    """What `Projector` takes beside the widths. None where the method has none."""
    if not isinstance(model.conditioner, NoisyLatentConditioner):
        return None
    saved = json.loads((model.config.mllm / CONFIG).read_text())
    bias = model.conditioner.projector.linear_1.bias is not None
    return {"activation": saved.get("projector_hidden_act", "gelu"), "bias": bias}


def write_language_model(config: ModelConfig, origin: Path, tokenizer: Any, folder: Path) -> str:
    """The language model of the folder `origin`, in its precision (or less, where the model holds less),
    alone unless the method reads images; returns its class.

    Raises:
        ValueError: a LLaVA over a language model that `MLLM` does not load by itself.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    dtype = torch.bfloat16 if config.mllm_dtype == "bfloat16" else "auto"
    source = transformers_config(origin, "MLLM")
    sees = config.conditioning.reads_images
    if source.model_type == "llava" and not sees:
        text = source.get_text_config()
        if text.model_type not in LANGUAGE_MODELS:
            raise ValueError(
                f"MLLM folder {origin}: its language model is a {text.model_type!r}; an export takes "
                f"{', '.join(LANGUAGE_MODELS)}"
            )
        llava = load_transformers(LlavaForConditionalGeneration, origin, "MLLM", dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        model.model, model.lm_head = llava.model.language_model, llava.lm_head
    else:
        family = family_of(origin)
        model = load_transformers(family.model_class(source), origin, "MLLM", dtype, family.beside)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in (WORDS, *(ASKED_BY if sees else ())):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    return type(model).__name__


def describe_export(model: TextToImage, checkpoint: Path, use_ema: bool) -> dict[str, Any]:
    """lineage.json: the checkpoint, what it says of its training, and the folders its parts came from."""
    digests = json.loads((checkpoint / CONFIG).read_text())["digests"]
    config = model.config
    return {
        "checkpoint": checkpoint_record(checkpoint),
        "weights": "averaged" if use_ema else "last",
        "digests": digests,
        "sources": portable({part: os.path.abspath(path) for part, path in config.parts().items()}),
        "training": read_lineage(checkpoint),
    }


DECODERS: dict[DecoderKind, tuple[str, str]] = {
    "vae": ("repfusion.latents.vae", "VAEDecoder"),
    "rae": ("repfusion.latents.rae_decoder", "RAEDecoder"),
    "drawing": ("repfusion.latents.drawing_decoder", "DrawingDecoder"),
}
"""Where the class of each kind of decoder lies."""


def model_index(language_models: Mapping[str, str], decoder: DecoderKind) -> dict[str, Any]:
    """model_index.json as diffusers writes it: the pipeline's class, and library and class of each folder."""
    try:
        release = version("repfusion")
    except PackageNotFoundError:  # run from a source tree
        release = None
    return {
        "_class_name": "RepFusionPipeline",
        "_repfusion_version": release,
        **{name: ["transformers", kind] for name, kind in language_models.items()},
        DENOISER: ["repfusion.model.text_to_image", "TextToImage"],
        DECODER: list(DECODERS[decoder]),
    }


def find_evaluation(checkpoint: Path) -> Evaluation | None:
    """The evaluation of a checkpoint beside the training or of the workflow; None where there is none."""
    run = checkpoint.resolve().parent.parent
    for folder in (run / "evaluations", run.parent / "evaluate", run / "evaluate"):
        if (found := read_evaluation(folder / checkpoint.resolve().name)) is not None:
            return found
    return None


def model_card(lineage: dict[str, Any], config: ModelConfig, evaluation: Evaluation | None) -> str:
    saved, training = lineage["checkpoint"], lineage["training"] or {}
    facts = {
        "checkpoint": f"{Path(saved['path']).name}, digest {saved['digest'][:12]}",
        "step": f"{saved['step']}, {lineage['weights']} weights",
        "run": training.get("run_id") or "not recorded",
        "code": training.get("git_commit") or "not recorded",
        "method": config.describe(),
        **{part: f"sha256 {digest[:12]}" for part, digest in lineage["digests"].items()},
    }
    for name, columns in training.get("datasets", {}).items():
        digests = (f"{column} {str(one['manifest_digest'])[:12]}" for column, one in columns.items())
        facts[f"data {name}"] = ", ".join(digests)
    lines = [
        *("---", "library_name: repfusion", "pipeline_tag: text-to-image", "---", ""),
        *("# A RepFusion text-to-image model", "", "```python"),
        "from repfusion import RepFusionPipeline",
        "",
        'pipe = RepFusionPipeline.from_pretrained(".").to("cuda")',
        'pipe("a red circle", num_inference_steps=30, guidance_scale=4.0).images[0].save("x.png")',
        *("```", "", markdown(("lineage", ""), facts.items())),
    ]
    for suite in () if evaluation is None else shown_suites(evaluation):
        measured = [suite.headline, *suite.of("part")]
        rows = [(one.value.short_name, f"{one.share:.3f}") for one in measured]
        lines += ["", markdown(("task" if suite.is_first else suite.name, "score"), rows)]
    lines += [
        "",
        "`python -m repfusion.lineage .` follows all of it back. This card may be edited; the other",
    ]
    lines += ["files are checked against `export.json` when the folder is loaded."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.export",
        description="Write a checkpoint as one self-contained folder for RepFusionPipeline.",
        formatter_class=WithDefaults,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=WEIGHTS / "base",
        help="a checkpoint; a training or a workflow's root stands for its best one",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; an export there is replaced"
    )
    parser.add_argument("--no-ema", action="store_true", help="the last weights, not the averaged ones")
    args = parser.parse_args()
    try:
        checkpoint = named_model(args.checkpoint)
        out = export(checkpoint, args.out, use_ema=not args.no_ema)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{checkpoint} -> {out} ({num_bytes / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
