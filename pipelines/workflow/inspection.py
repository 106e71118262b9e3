"""Stages and what is on disk -> which are fresh, partial, stale or missing, and why. Reads only."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.dag import ShardStage, Stage, WholeStage
from pipelines.shards.manifest import Manifest, ShardTable, StageOutput, Upstream, read_output
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA, ShardError, Sidecar
from repfusion.files import canonical_json

Status = Literal["fresh", "partial", "stale", "missing"]
MIXED = re.compile(r"(trainings\.[^.]+\.data\.mix\.([^.]+)\.)(.+)")
"""Fields of the data sets that a training mixes into the workflow's own."""
STAGE = "stage.json"
"""What was asked for, written when a stage starts."""
STALE = "stale-"
"""Begins the ending of a folder that was set aside: `train.stale-1234abcd`."""
LISTED_AHEAD = 2
"""Folders whose listings are held while another is compared."""
SIDE_FILE = re.compile(r'"([^"]+)":\{"bytes":(\d+)')
"""Name and size in a sidecar's `files`, as canonical JSON."""


@dataclass(frozen=True)
class State:
    """What is on disk for a stage, and what is left to do."""

    status: Status
    reason: str = ""
    output: StageOutput | None = None
    """Where the stage is fresh."""
    kept: tuple[Sidecar, ...] = field(default=(), repr=False)
    """The complete shards of a stage that is partial, in order."""
    todo: frozenset[str] | None = frozenset()
    """Names of the shards that are to be made; None where that is all of them."""


def inspect(stage: Stage, above: Upstream, sizes: Mapping[str, int] | None = None) -> State:
    """Compares what is on disk with what is asked for. `above` holds the fresh stages so far, `sizes` the
    folder's listing where it is known already.
    """
    asked = read_asked(stage.folder)
    if asked is None:
        return State("missing", "not run yet", todo=None)
    if asked["fingerprint"] != stage.fingerprint:
        return State("stale", explain(asked, stage), todo=None)
    if waits := [one.name for one in stage.upstream if one.name not in above]:
        verb = "is" if len(waits) == 1 else "are"
        return State("stale", f"{' and '.join(waits)} above {verb} not complete", todo=None)
    output = read_output(stage.folder)
    if output is not None and output.manifest.fingerprint != stage.fingerprint:
        output = None
    match stage:
        case ShardStage():
            listing = stage.folder.sizes() if sizes is None else sizes
            listed = output if output is not None and _has_shards(output) else None
            return _inspect_shards(stage, listed, above, listing)
        case WholeStage():
            return _inspect_whole(stage, asked, output, above)
        case _:
            raise AssertionError(f"{type(stage)} is neither")


def _has_shards(output: StageOutput) -> bool:
    """Whether the table of shards is there and readable; without it, the sidecars say what there is."""
    try:
        return len(output.shards) == output.manifest.num_shards
    except ShardError:
        return False


def _inspect_whole(
    stage: WholeStage, asked: Mapping[str, Any], output: StageOutput | None, above: Upstream
) -> State:
    for name, digest in asked.get("upstream_digests", {}).items():
        if name not in above or above[name].manifest.digest != digest:
            return State("stale", f"the data of {name} changed", todo=None)
    if output is None:
        return State("partial", "started, not complete")
    if gone := [path.name for path in stage.outputs if not path.is_file()]:
        return State("partial", f"{', '.join(gone)} missing", output)
    return State("fresh", output=output)


def _inspect_shards(
    stage: ShardStage, output: StageOutput | None, above: Upstream, sizes: Mapping[str, int]
) -> State:
    names, inputs = stage.shard_names(above), stage.shard_inputs(above)
    if output is not None and _is_complete(output.shards, names, inputs, sizes):
        gone = [name for name, file in output.manifest.files.items() if sizes.get(name) != file.bytes]
        if not gone:
            return State("fresh", output=output)
        return State("partial", f"{', '.join(gone)} missing or of another size", kept=tuple(output.shards))
    if output is not None:
        known = {sidecar.name: sidecar for sidecar in output.shards}
    else:
        known = read_sidecars(stage.folder, [name for name in names if f"{name}.json" in sizes])
    kept: list[Sidecar] = []
    problems: dict[str, str] = {}
    for name, wanted in zip(names, inputs, strict=True):
        sidecar = known.get(name)
        if problem := problem_of(sidecar, name, stage.fingerprint, wanted, sizes):
            problems[name] = problem
        elif sidecar is not None:
            kept.append(sidecar)
    reason = "all shards complete, the manifest is not written"
    if problems:
        first = next(iter(problems.values()))
        reason = f"{len(problems)} of {len(names)} shards to do: {first}"
    return State("partial", reason, kept=tuple(kept), todo=frozenset(problems))


def _is_complete(
    shards: ShardTable, names: Sequence[str], inputs: Sequence[str], sizes: Mapping[str, int]
) -> bool:
    """Whether every shard of a manifest is what is asked for, and on disk. Whole columns are compared: this
    is all that happens to a workflow with nothing to do, 100,000 times a stage.
    """
    beside = SIDE_FILE.findall("".join(shards.column("files")))
    return (
        shards.names == names
        and shards.column("inputs") == inputs
        and list(map(sizes.get, shards.column("file"))) == shards.column("bytes")
        # whoever deletes a sidecar asks for its shard to be made again, whatever the manifest says
        and all(f"{name}.json" in sizes for name in names)
        and all(sizes.get(name) == int(size) for name, size in beside)
    )


def problem_of(
    sidecar: Sidecar | None, name: str, fingerprint: str, inputs: str, sizes: Mapping[str, int]
) -> str | None:
    """Why a shard is to be made; None where it is what is asked for. `inputs` is canonical JSON, `sizes` the
    folder's listing.
    """
    if sidecar is None or sidecar.fingerprint != fingerprint or f"{name}.json" not in sizes:
        return f"{name} missing"
    if canonical_json(sidecar.inputs) != inputs:
        return f"{name} made from other data"
    wrong = wrong_files(sidecar, sizes)
    return f"{wrong[0]} missing or of another size" if wrong else None


def wrong_files(sidecar: Sidecar, sizes: Mapping[str, int]) -> list[str]:
    """Which files of a shard are not in a folder's listing, or there with another size."""
    expected = {sidecar.file: sidecar.bytes, **{name: file.bytes for name, file in sidecar.files.items()}}
    return [name for name, size in expected.items() if sizes.get(name) != size]


def read_sidecars(folder: Folder, names: Sequence[str]) -> dict[str, Sidecar]:
    """The sidecars of these shards that can be read, by name."""
    found: dict[str, Sidecar] = {}
    for name, data in folder.read_many([f"{name}.json" for name in names]):
        try:
            found[name.removesuffix(".json")] = Sidecar.model_validate_json(data)
        except ValueError:
            continue
    return found


def read_asked(folder: Folder) -> dict[str, Any] | None:
    """The stage.json of a folder: schema, fingerprint, fields, lineage. None where there is none that says
    so.
    """
    try:
        asked = json.loads(folder.read(STAGE))
    except (FileNotFoundError, ValueError):
        return None
    return asked if isinstance(asked, dict) and asked.keys() >= {"fingerprint", "fields", "lineage"} else None


def is_training(asked: Mapping[str, Any]) -> bool:
    """Whether the stage that wrote a stage.json is a training, of a decoder too."""
    return any(name.startswith(("trainings.", "decoder.")) for name in asked["fields"])


def explain(asked: Mapping[str, Any], stage: Stage) -> str:
    """Which fields, of this stage or one above, changed from what to what."""
    if asked.get("schema") != SCHEMA:
        return f"written by schema {asked.get('schema')}, this is {SCHEMA}"
    changes: list[str] = []
    old_all = {**asked["lineage"], stage.name: asked["fields"]}
    new_all = {**stage.lineage, stage.name: stage.shown}
    for name in dict.fromkeys([*new_all, *old_all]):
        old, new = old_all.get(name, {}), new_all.get(name, {})
        changes += [
            _change(key, old, new) for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)
        ]
    if not changes and (texts := [one for one in _interpolated(new_all) if one in _interpolated(old_all)]):
        return (
            f"what {', '.join(dict.fromkeys(texts))} stands for changed, or the stages above are other ones"
        )
    return ", ".join(dict.fromkeys(changes)) or "the stages above are other ones"


def _interpolated(fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Values that are texts of what the environment says."""
    values = (value for one in fields.values() for value in one.values())
    return [value for value in values if isinstance(value, str) and "${" in value]


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`ingest.quality 6 -> 1`; of a data set of the mix what happened to it, not its digests."""
    if (mixed := MIXED.fullmatch(key)) is not None:
        prefix, name, field = mixed.groups()
        if f"{prefix}weight" not in old:
            return f"data set '{name}' added"
        if f"{prefix}weight" not in new:
            return f"data set '{name}' removed"
        if field not in ("weight", "caption_weights"):
            return f"data set '{name}' changed"
    return f"{key} {_show(old.get(key))} -> {_show(new.get(key))}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def contents(manifest: Manifest) -> str:
    """`8 shards, 3,960 samples`, with the drops where there are any."""
    if not manifest.num_shards:
        return "done"
    plural = "s" if manifest.num_shards > 1 else ""
    text = f"{manifest.num_shards} shard{plural}, {manifest.samples:,} samples"
    drops = ", ".join(f"{reason} {count}" for reason, count in manifest.drops.items())
    return f"{text}, dropped: {drops}" if drops else text


def states(stages: Sequence[Stage]) -> dict[str, State]:
    """The state of every stage."""
    found: dict[str, State] = {}
    above: dict[str, StageOutput] = {}
    with ThreadPoolExecutor(LISTED_AHEAD, "listing") as executor:
        # folders are listed while the ones before them are compared
        ahead = [executor.submit(_listing, stage) for stage in stages[:LISTED_AHEAD]]
        for index, stage in enumerate(stages):
            following = index + LISTED_AHEAD
            ahead += [executor.submit(_listing, one) for one in stages[following : following + 1]]
            found[stage.name] = state = inspect(stage, above, ahead.pop(0).result())
            if state.status == "fresh" and state.output is not None:
                above[stage.name] = state.output
    return found


def _listing(stage: Stage) -> dict[str, int]:
    return stage.folder.sizes() if isinstance(stage, ShardStage) else {}
