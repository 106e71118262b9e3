"""The folder of an export: which one is, and whether every file is what was written."""

import json
from pathlib import Path
from typing import Any

from repfusion.files import file_sha256

SCHEMA = 2
MARK = "export.json"
"""Digests of an export's files; written last, it marks the export complete."""


def is_export(folder: Path) -> bool:
    return (folder / MARK).is_file()


def check_export(folder: Path) -> dict[str, Any]:
    """What export.json says. ValueError where the folder is no export, or a file is missing or not what was
    written.
    """
    if not is_export(folder):
        what = f"has no {MARK}: it is no export" if folder.is_dir() else "does not exist"
        raise ValueError(f"export {folder} {what}; 'python -m repfusion.export' writes one")
    info = json.loads((folder / MARK).read_text())
    if info["schema"] != SCHEMA:
        raise ValueError(f"export {folder} has schema {info['schema']}, this code reads {SCHEMA}")
    for name, expected in info["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"export {folder}: {name} is missing; copy it again")
        if (got := path.stat().st_size) != expected["bytes"]:
            raise ValueError(
                f"export {folder}: {name} is {got} bytes long (truncated?), expected {expected['bytes']}; "
                "copy it again"
            )
        if (digest := file_sha256(path)) != expected["sha256"]:
            raise ValueError(
                f"export {folder}: {name} has sha256 {digest[:12]}, expected {expected['sha256'][:12]}: its "
                "content was changed or damaged; copy it again"
            )
    return info
