"""A remote column -> a checked copy on local disk for training, which reads samples at random."""

import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.shards.manifest import MANIFEST, SHARDS, StageOutput, read_output
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, SideFile
from repfusion.files import file_sha256
from repfusion.pretrained.cache import hold, make_room
from repfusion.weights import url_of

BLOCK_BYTES = 4 << 20
"""Read from the source at once."""
FETCHES = 8
"""Files on their way at the same time: a single one does not fill a network."""


def mirror(source: Folder, target: Path) -> None:
    """Copies the shards and files of a complete stage, its manifest last; what is there already in the right
    version stays, also after a copy that was cut short. Of several processes of one machine, one copies and
    the others wait. In a node's cache the copy stays while this process runs.

    Raises:
        ValueError: there is no room in the node's cache.
        ShardError: where the stage is not complete, or a file is not what its sidecar says.
    """
    output = read_output(source)
    if output is None:
        raise ShardError(f"{source}: not complete; run the stage '{source.name}'")
    if url_of(target) is not None:
        hold(target)
        make_room(_missing_bytes(output, target), str(source))
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _copy(output, Folder(str(target)))


def _missing_bytes(output: StageOutput, target: Path) -> int:
    sizes = Folder(str(target)).sizes()
    return sum(file.bytes - min(sizes.get(name, 0), file.bytes) for name, file in _files(output))


def _copy(output: StageOutput, copy: Folder) -> None:
    there, sizes = read_output(copy), copy.sizes()
    wanted = dict(_files(output))
    if there is not None and there.manifest == output.manifest:
        if all(sizes.get(name) == file.bytes for name, file in wanted.items()):
            return
    known = {} if there is None else dict(_files(there))
    copy.remove(MANIFEST)
    copy.remove_temporaries()

    def bring(name: str, file: SideFile) -> None:
        if sizes.get(name) == file.bytes:
            if known.get(name) == file or file_sha256(copy.path / name) == file.sha256:
                return
        _fetch(output.folder, name, file, staging / name)
        copy.put(name, staging / name)

    with copy.staging("mirror") as staging, ThreadPoolExecutor(FETCHES, "mirror") as executor:
        try:
            for _ in executor.map(bring, wanted.keys(), wanted.values()):
                pass
        finally:
            executor.shutdown(cancel_futures=True)
    copy.remove(*(sizes.keys() - wanted.keys() - {SHARDS, ".lock"}))
    for name in (SHARDS, MANIFEST):
        copy.write(name, output.folder.read(name))


def _files(output: StageOutput) -> Iterator[tuple[str, SideFile]]:
    """What training reads of a stage: the shards' data and the files of the stage as a whole."""
    columns = (output.shards.column(name) for name in ("file", "bytes", "sha256"))
    for name, size, sha256 in zip(*columns, strict=True):
        yield name, SideFile(bytes=size, sha256=sha256)
    yield from output.manifest.files.items()


def _fetch(source: Folder, name: str, expected: SideFile, path: Path) -> None:
    with source.open(name) as stream, path.open("wb") as file:
        while block := stream.read(BLOCK_BYTES):
            file.write(block)
    if file_sha256(path) != expected.sha256:
        raise ShardError(f"{source / name}: its bytes are not those that were written; run 'verify'")
