"""Stage folders -> pages with pictures, captions of all columns and drops, made when they are asked for."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pipelines.reporting.charts import STYLE
from pipelines.shards.manifest import read_output
from pipelines.shards.parquet import read_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.tars import read_samples
from repfusion.data.source_images import CLIP_EXTENSION, PICTURE_EXTENSIONS
from repfusion.display.tables import html

SHARDS_KEPT = 6
"""Shards in memory: one is read as a whole, also from a store."""
SHARDS_SEARCHED = 50
MATCHES = 200
"""A search ends at so many shards or samples, with a link that goes on."""
DUPLICATE = re.compile(r"duplicate of (\S+)")
SHEET_COLUMNS = 6
"""Frames in a row of a clip's sheet."""
TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}
LOOK = """
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
figure { margin: 0; font-size: 13px; overflow-wrap: anywhere; }
figure img { width: 100%; min-height: 40px; image-rendering: pixelated; }
figure b { font-weight: 500; color: var(--muted); }
form { margin: 12px 0; } input[type=search] { width: min(420px, 70%); font: inherit; padding: 4px 8px; }
"""

Members = Mapping[str, bytes]


@dataclass(frozen=True)
class Shelf:
    """What is shown of a stage."""

    folder: Folder
    above: Folder | None
    """Where pictures of what it dropped lie."""
    captions: tuple[Folder, ...] = ()
    """Columns of captions of the same keys."""


@dataclass(frozen=True)
class Answer:
    """What a browser gets."""

    kind: str
    body: bytes
    status: int = 200


class Library:
    """The stages of a workflow that hold pictures, by name."""

    def __init__(self, title: str, stages: Mapping[str, Shelf]):
        self.title, self.stages = title, dict(stages)
        self._samples = lru_cache(SHARDS_KEPT)(self._read)

    def _read(self, folder: Folder, file: str) -> dict[str, dict[str, bytes]]:
        return dict(read_samples(folder, file))

    def answer(self, address: str) -> Answer:
        """The page or picture of an address, such as `/curate/00000?q=dog`; 404 where there is none."""
        parts = urlsplit(address)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            match [unquote(word) for word in parts.path.split("/") if word]:
                case []:
                    return self._page(self.overview())
                case [stage, shard]:
                    return self._page(self.shard(stage, shard, query.get("q", "")))
                case [stage, shard, key]:
                    return self.picture(stage, shard, key)
                case [stage, shard, key, "sheet"]:
                    return self.sheet(stage, shard, key)
        except (LookupError, FileNotFoundError):
            pass
        return self._page("<p>There is nothing at this address.</p>", 404)

    def _page(self, body: str, status: int = 200) -> Answer:
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<style>{STYLE}{LOOK}</style></head><body><main><h1><a href="/">{escape(self.title)}</a></h1>'
            f"{body}</main></body></html>\n"
        )
        return Answer("text/html; charset=utf-8", page.encode(), status)

    def overview(self) -> str:
        """A row for each stage: shards, samples and drops."""
        rows = []
        for name, shown in self.stages.items():
            output, shards = read_output(shown.folder), self.shards(name)
            link = (
                f'<a href="/{quote(name)}/{quote(shards[0])}">{escape(name)}</a>' if shards else escape(name)
            )
            samples = "not complete" if output is None else f"{output.manifest.samples:,}"
            drops = {} if output is None else output.manifest.drops
            listed = ", ".join(f"{escape(reason)} {count:,}" for reason, count in drops.items())
            rows.append((link, f"{len(shards):,}", samples, f'<span class="left">{listed}</span>'))
        return html(("stage", "shards", "samples", "dropped"), rows)

    @lru_cache(SHARDS_KEPT)  # noqa: B019  a library lives as long as its process
    def shards(self, stage: str) -> list[str]:
        """Names of a stage's shards that are complete."""
        files = self.stages[stage].folder.names()
        return sorted(name.removesuffix(".tar") for name in files if name.endswith(".tar"))

    def shard(self, stage: str, name: str, wanted: str) -> str:
        """Samples and drops of a shard; of a search, those that match, from it on."""
        names = self.shards(stage)
        place = names.index(name) if name in names else -1
        if place < 0:
            raise LookupError(name)
        field = f'<input type="search" name="q" value="{escape(wanted)}" placeholder="words of a caption"/>'
        form = f"<form>{field}</form>"
        head = f"<h2>{escape(stage)} / {escape(name)}</h2>{form}{self._around(stage, place, wanted)}"
        if not wanted:
            return head + _grid(list(self._figures(stage, name, ""))) + self._dropped(stage, name)
        found: list[str] = []
        for other in names[place : place + SHARDS_SEARCHED]:
            found += self._figures(stage, other, wanted.casefold())
            if len(found) >= MATCHES:
                break
        after = names.index(other) + 1
        said = f"<p>{len(found):,} of {after - place:,} shards hold these words."
        more = f' <a href="{self._link(stage, names[after], wanted)}">Go on</a>' if after < len(names) else ""
        return head + said + more + "</p>" + _grid(found)

    def _around(self, stage: str, place: int, wanted: str) -> str:
        names = self.shards(stage)
        sides = {"before": place - 1, "after": place + 1}
        links = [
            f'<a href="{self._link(stage, names[index], wanted)}">shard {side}</a>'
            for side, index in sides.items()
            if 0 <= index < len(names)
        ]
        return f"<p>{place + 1:,} of {len(names):,} shards. {' '.join(links)}</p>"

    def _link(self, stage: str, shard: str, wanted: str) -> str:
        query = f"?q={quote(wanted)}" if wanted else ""
        return f"/{quote(stage)}/{quote(shard)}{query}"

    def _figures(self, stage: str, name: str, wanted: str) -> Iterator[str]:
        shown = self.stages[stage]
        columns = [self._captions(folder, name) for folder in shown.captions]
        for key, members in self._samples(shown.folder, f"{name}.tar").items():
            texts = _texts(members)
            for column in columns:
                texts |= _texts(column.get(key, {}))
            if wanted in " ".join([key, *texts.values()]).casefold():
                yield _figure(self._source(stage, name, key, members), key, texts, CLIP_EXTENSION in members)

    def _captions(self, folder: Folder, name: str) -> Mapping[str, Members]:
        file = f"{name}.tar"
        return self._samples(folder, file) if folder.has(file) else {}

    def _source(self, stage: str, name: str, key: str, members: Members) -> str | None:
        """The address of a sample's picture."""
        if not any(extension in members for extension in PICTURE_EXTENSIONS):
            return None
        return f"/{quote(stage)}/{quote(name)}/{quote(key, safe='')}"

    def _dropped(self, stage: str, name: str) -> str:
        """What the stage left out of a shard: reason, picture, and beside a duplicate what it repeats."""
        shown, file = self.stages[stage], f"{name}.drops.parquet"
        if not shown.folder.has(file):
            return ""
        rows = read_parquet(shown.folder, file).to_pylist()
        above = next((one for one, other in self.stages.items() if other.folder == shown.above), None)
        pictures = {} if above is None else self._samples(self.stages[above].folder, f"{name}.tar")
        figures = []
        for row in rows:
            texts = {row["reason"]: row.get("detail") or ""}
            original = DUPLICATE.search(texts[row["reason"]])
            for key in (row["key"], *([original[1]] if original else [])):
                members = pictures.get(key, {})
                source = None if above is None else self._source(above, name, key, members)
                figures.append(_figure(source, key, {**texts, **_texts(members)}))
                texts = {"kept": ""}
        return f"<h2>{len(rows):,} dropped</h2>{_grid(figures)}"

    def picture(self, stage: str, name: str, key: str) -> Answer:
        """A sample's picture, as it is stored; a clip as an animation. Raises LookupError where there is
        none.
        """
        members = self._samples(self.stages[stage].folder, f"{name}.tar")[key]
        found = [one for one in PICTURE_EXTENSIONS if one in members]
        if not found:
            raise LookupError(key)
        if found[0] != CLIP_EXTENSION:
            return Answer(TYPES[found[0]], members[found[0]])
        from repfusion.video.fitting import read_clip
        from repfusion.video.sheets import animation

        clip = read_clip(members[CLIP_EXTENSION])
        return Answer(TYPES["webp"], animation(clip.frames, clip.rate))

    def sheet(self, stage: str, name: str, key: str) -> Answer:
        """The frames of a sample's clip beside each other. Raises LookupError where it has none."""
        from PIL import Image

        from repfusion.video.fitting import read_clip
        from repfusion.video.sheets import contact_sheet

        data = self._samples(self.stages[stage].folder, f"{name}.tar")[key][CLIP_EXTENSION]
        stream = io.BytesIO()
        Image.fromarray(contact_sheet(read_clip(data).frames, SHEET_COLUMNS)).save(stream, "PNG")
        return Answer(TYPES["png"], stream.getvalue())


def _texts(members: Members) -> dict[str, str]:
    """The captions of a sample by their names, the main one first."""
    found = {
        name: data.decode(errors="replace").strip() for name, data in members.items() if name.endswith("txt")
    }
    return dict(sorted(found.items(), key=lambda item: item[0] != "txt"))


def _figure(source: str | None, key: str, texts: Mapping[str, str], is_clip: bool = False) -> str:
    """A picture with its texts; that of a clip leads to its frames."""
    picture = (
        f'<img loading="lazy" alt="{escape(key)}" src="{escape(source)}"/>' if source else "<p>no picture</p>"
    )
    if source and is_clip:
        picture = f'<a href="{escape(source)}/sheet">{picture}</a>'
    lines = "".join(
        f"<br/>{'' if name == 'txt' else f'<b>{escape(name)}</b> '}{escape(text)}"
        for name, text in texts.items()
    )
    return f"<figure>{picture}<figcaption><b>{escape(key)}</b>{lines}</figcaption></figure>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="samples">{"".join(figures)}</div>'
