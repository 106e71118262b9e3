"""A list of image files and their captions, such as the `metadata.csv` or `metadata.jsonl` of a Hugging Face
image folder -> captions in the order of the paths.
"""

import json
import os
import posixpath
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lists.blocks import Block
from pipelines.lists.captions import SeveralCaptions, lists_remedy, one_text, read_caption
from pipelines.lists.columns import caption_column, json_column, text_column
from pipelines.lists.tables import CsvFormat, open_table
from pipelines.lists.values import BadEntry, json_value
from repfusion.files import bytes_sha256, canonical_json

CAPTION_COLUMNS = ("caption", "text")
"""What a column of captions is called, where the configuration does not say it: the first that there is."""
_ODD = re.compile(r"\\|//|://|^/|(^|/)\.")
"""Occurs in every path that is not yet spelled as a walk through the folder spells it, and in few others."""


@dataclass(frozen=True, slots=True)
class ListedCaption:
    """A line of the list."""

    path: str
    """Path of the image within the folder."""
    version: str
    """Another one means another text."""
    text: str | None
    """None where the list has none."""
    fields: Mapping[str, Any]
    """What goes into the sample's JSON."""
    problem: tuple[str, str] | None = None
    """Reason and detail where the line becomes no sample."""


class PathList:
    """The list, in memory as Arrow columns, in the order of its paths.

    Args:
        url: where it lies.
        options: of its fsspec file system.
        place: where the configuration asks for it, and the list, as messages begin.
        roots: the folder of images, as an absolute path or URL that the list's own paths may begin with.
        file: column of the image files.
        caption: column of captions; None is the first of CAPTION_COLUMNS that there is.
        extra: columns that go into the samples' JSON.
        several: what a caption of several lines, or a list of them, means.
        csv: how it is written, where it is a csv.

    Raises:
        ValueError: where it is missing, not readable or lacks a column.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        place: str,
        roots: Sequence[str],
        file: str,
        caption: str | None,
        extra: Sequence[str],
        several: SeveralCaptions,
        csv: CsvFormat,
    ):
        import pyarrow as pa
        import pyarrow.compute as pc

        self._file, self._extra, self._several = file, extra, several
        self._roots = tuple(f"{root.rstrip('/')}/" for root in roots)
        pieces = [pa.table([pa.array([], pa.large_string())] * 2, names=["path", "line"])]
        needed = [text_column(file, "source.file_column")]
        needed += [json_column(name, "source.extra_columns") for name in extra]
        try:
            with open_table(url, options, needed, place, csv) as table:
                names = CAPTION_COLUMNS if caption is None else (caption,)
                self._caption = next((name for name in names if name in table.columns), names[0])
            needed.append(caption_column(self._caption, "source.caption_column", lists_remedy(several)))
            with open_table(url, options, needed, place, csv) as table:
                for section in range(table.num_sections):
                    pieces += (self._lines(block) for block in table.blocks(section))
        except FileNotFoundError as error:
            raise ValueError(f"{place}: no such file") from error
        whole = pa.concat_tables(pieces)
        ascending = pc.sort_indices(pc.replace_substring(whole["path"], "/", "\0"))
        self._table = whole.take(ascending).combine_chunks()

    def _lines(self, block: Block) -> Any:
        """Paths, and of each line what becomes of it, as JSON."""
        import pyarrow as pa

        paths, lines = [], []
        columns = [block.cells(name) for name in (self._file, self._caption, *self._extra)]
        for path, caption, *extra in zip(*columns, strict=True):
            try:
                named = {
                    name: json_value(name, value) for name, value in zip(self._extra, extra, strict=True)
                }
                text, fields = read_caption(caption, self._several)
                line: Any = [text, named, fields] if fields else [text, named]
            except BadEntry as error:
                line = {"reason": error.reason, "detail": error.detail}
            try:
                paths.append(self._relative(one_text(path) or ""))
            except BadEntry as error:
                paths.append("")
                line = {"reason": "no_image", "detail": f"the path is no text: {error.detail}"}
            lines.append(canonical_json(line))
        kind = pa.large_string()
        return pa.table([pa.array(paths, kind), pa.array(lines, kind)], names=["path", "line"])

    def _relative(self, path: str) -> str:
        """A path as the walk through the folder spells it: within the folder, with slashes."""
        if not _ODD.search(path):
            return path
        path = path.replace("\\", "/")
        for root in self._roots:
            path = path.removeprefix(root)
        return path if "://" in path else posixpath.normpath(path)

    def walk(self, first: str) -> Iterator[ListedCaption]:
        """Lines from a path on."""
        paths = self._table["path"]
        start = bisect_left(range(len(paths)), order(first), key=lambda index: order(paths[index].as_py()))
        for batch in self._table.slice(start).to_batches(max_chunksize=1000):
            for path, line in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                version = bytes_sha256(line.encode())
                match json.loads(line):
                    case {"reason": reason, "detail": detail}:
                        yield ListedCaption(path, version, None, {}, (reason, detail))
                    case [text, named, *fields]:
                        yield ListedCaption(path, version, text, {**named, **(fields[0] if fields else {})})


def order(path: str) -> str:
    """Sorts paths folder by folder, as a walk meets them."""
    return path.replace("/", "\0")


def spellings(folder: str) -> list[str]:
    """How a list may write the path or URL of a folder before those of its files."""
    if "://" in folder:
        return [folder]
    return list(dict.fromkeys([os.path.abspath(folder), os.path.realpath(folder)]))
