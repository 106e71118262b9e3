"""Folders of models as save_pretrained writes them: config.json, and what a folder asks for that is never
done.

No code of a folder is run, and no hub is asked.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

ORIGINAL_LLAVA = ("mm_vision_tower", "mm_projector_type")
"""Fields by which the first LLaVA repository's config.json is known."""
OWN_FILES_ALONE = {"local_files_only": True, "trust_remote_code": False}
"""What every from_pretrained of transformers is told: no hub, no code of the folder's."""
CONVERT_LLAVA = (
    "this is the layout of the original LLaVA repository; convert it with convert_llava_weights_to_hf.py of "
    "transformers' sources, or take the converted folder (published as llava-hf/...)"
)

ORIGINAL_INTERNVL = (
    "this is the layout of InternVL's own repository; take the folder made for transformers' own class "
    "(published with a name that ends in -HF)"
)
C = TypeVar("C", bound=BaseModel)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers keeps an image processor, by itself or within a processor of all."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where it holds something else; a missing file is
    FileNotFoundError.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{what} folder {path.parent}: {path.name} is not JSON ({error}); copy it again"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{what} folder {path.parent}: {path.name} holds a {type(fields).__name__}, not fields"
        )
    return fields


def read_config(folder: str | Path, what: str, writer: str = "save_pretrained") -> dict[str, Any]:
    """The fields of a folder's config.json.

    Args:
        folder: a model's.
        what: how messages call it, such as `encoder`.
        writer: what writes such a folder.

    Raises:
        ValueError: there is none, or it asks for what is never done: code of its own, quantised weights, an
            adapter's base, the layout of the original LLaVA repository.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{what} folder {folder}: adapter_config.json: an adapter of another model; merge it into that "
            "(peft's merge_and_unload) and save the whole"
        )
    try:
        config = read_json(folder / "config.json", what)
    except OSError as error:
        raise ValueError(
            f"{what} folder {folder}: no config.json; expected a folder written by {writer}"
        ) from error
    if config.get("model_type") == "internvl_chat":
        raise ValueError(f"{what} folder {folder}: {ORIGINAL_INTERNVL}")
    refuse_remote_code(config, folder / "config.json", what)
    if "quantization_config" in config:
        raise ValueError(
            f"{what} folder {folder}: its weights are quantised (quantization_config); expected plain ones: "
            "load it with transformers, dequantize(), save_pretrained"
        )
    if any(field in config for field in ORIGINAL_LLAVA) or config.get("model_type") == "llava_llama":
        raise ValueError(f"{what} folder {folder}: {CONVERT_LLAVA}")
    return config


def validated_config(kind: type[C], fields: Mapping[str, Any], place: str, writer: str) -> C:
    """The fields of a config.json of ours as their class. Raises ValueError, naming the place and the first
    field, where one does not hold.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            f"{place}: config.json: {problem['loc'][0] if problem['loc'] else 'the whole'}: "
            f"{problem['msg']}; expected a folder written by {writer}"
        ) from error


def processor_fields(folder: Path, what: str) -> tuple[dict[str, Any], str]:
    """What an image processor's file says, and its name; no fields where there is none."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            fields = read_json(folder / name, what)
            own = fields.get("image_processor")
            return (own if isinstance(own, dict) else fields), name
    return {}, PROCESSOR_FILES[0]


def refuse_remote_code(config: Mapping[str, Any], file: Path, what: str) -> None:
    """Raises ValueError where a file of a folder names code of the folder's own."""
    if config.get("auto_map"):
        raise ValueError(
            f"{what} folder {file.parent}: {file.name} asks for code of its own (auto_map), which is never "
            "run; where transformers has the class itself, delete auto_map from that file"
        )


def transformers_config(folder: Path, what: str) -> Any:
    """transformers' config of a folder. Raises ValueError where it refuses what config.json says."""
    from transformers import AutoConfig

    read_config(folder, what)
    with said_of(f"{what} folder {folder}", "by its config.json"):
        return AutoConfig.from_pretrained(folder, **OWN_FILES_ALONE)


@contextmanager
def said_of(place: str, how: str) -> Iterator[None]:
    """Whatever a library raises on what a folder holds becomes a ValueError that names the folder; a disk
    that does not answer and a machine without memory stay what they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{place}: cannot be loaded {how}: {error}") from error
