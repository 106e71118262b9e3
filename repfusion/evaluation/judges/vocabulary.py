"""Which classes a detector's folder knows, from its config alone, before weights are read."""

from collections.abc import Collection
from pathlib import Path

from repfusion.evaluation.judges.folders import model_type_of
from repfusion.pretrained.config import read_config

WHAT = "detector"
OPEN = ("owlv2", "grounding-dino")
"""Detectors that are asked in words, by transformers' `model_type`: they know any class."""
SYNONYMS = (
    {"motorcycle", "motorbike"},
    {"airplane", "aeroplane"},
    {"couch", "sofa"},
    {"potted plant", "pottedplant"},
    {"dining table", "diningtable"},
    {"tv", "tvmonitor", "tv monitor"},
    {"computer mouse", "mouse"},
    {"tv remote", "remote"},
    {"computer keyboard", "keyboard"},
    {"hair drier", "hair dryer"},
)
"""Names of one class of COCO: of its own list, of prompt files, and of published folders."""


def class_ids(folder: Path) -> dict[str, int]:
    """A closed detector's classes by every name that they have, from its config.json.

    Raises:
        ValueError: there is no config.json, or it names no classes.
    """
    labels = read_config(folder, WHAT).get("id2label")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{WHAT} folder {folder}: config.json names no classes (id2label); copy it again")
    named = {str(name).lower(): int(id) for id, name in labels.items()}
    for names in SYNONYMS:
        known = [named[name] for name in sorted(names) if name in named]
        named |= {name: known[0] for name in names - named.keys() if known}
    return named


def check_classes(folder: Path, classes: Collection[str], asked_by: str) -> None:
    """Raises ValueError where a detector lacks classes that a prompt file asks for, before anything is
    drawn.
    """
    if model_type_of(folder, WHAT) in OPEN:
        return
    if missing := sorted(set(classes) - class_ids(folder).keys()):
        raise ValueError(
            f"{WHAT} folder {folder}: lacks {len(missing)} of the {len(set(classes))} classes that "
            f"{asked_by} asks for: {', '.join(missing[:8])}; use a detector trained on COCO, or one that is "
            f"asked in words ({', '.join(OPEN)})"
        )
