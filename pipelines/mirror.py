"""A remote column -> a checked copy on local disk for training, which reads samples at random."""

import fcntl
from pathlib import Path

from pipelines.manifest import MANIFEST, SHARDS, StageOutput, read_output
from pipelines.storage import Folder
from pipelines.store import ShardError, Sidecar, file_sha256


def mirror(source: Folder, target: Path) -> None:
    """Copies the shards of a complete stage, its manifest last; what is there already in the right version
    stays. Of several processes of one machine, one copies and the others wait.

    Raises:
        ShardError: where the stage is not complete, or a file is not what its sidecar says.
    """
    output = read_output(source)
    if output is None:
        raise ShardError(f"{source}: not complete; run the stage '{source.name}'")
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _copy(output, Folder(str(target)))


def _copy(output: StageOutput, copy: Folder) -> None:
    there = read_output(copy)
    if there is not None and there.manifest == output.manifest:
        return
    known = {} if there is None else {shard.name: shard.sha256 for shard in there.shards}
    copy.remove(MANIFEST)
    sizes = copy.sizes()
    wanted: set[str] = set()
    with copy.staging("mirror") as staging:
        for shard in output.shards:
            wanted.add(shard.file)
            if known.get(shard.name) != shard.sha256 or sizes.get(shard.file) != shard.bytes:
                _fetch(output.folder, shard, staging / shard.file)
                copy.put(shard.file, staging / shard.file)
    copy.remove(*(sizes.keys() - wanted - {SHARDS, ".lock"}))
    for name in (*output.manifest.files, SHARDS, MANIFEST):
        copy.write(name, output.folder.read(name))


def _fetch(source: Folder, shard: Sidecar, path: Path) -> None:
    with source.open(shard.file) as stream, path.open("wb") as file:
        while block := stream.read(1 << 22):
            file.write(block)
    if file_sha256(path) != shard.sha256:
        raise ShardError(
            f"shard {source / shard.file}: its bytes are not those that were written; run 'verify'"
        )
