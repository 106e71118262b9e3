"""Our tars, every sample of them, read by other people's readers in environments of their own: the same
bytes.

The packages do not fit beside ours, so each reader runs in a process of its own with a throw-away folder of
them.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards.arrays import npy_bytes
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit
from pipelines.shards.tars import tar_shard
from repfusion.files import canonical_json

pytestmark = pytest.mark.slow

SHARDS = {"00000": 7, "00001": 1, "00002": 12}
PACKAGES = {
    "webdataset": (),
    "webdataset 1": ("webdataset==1.0.2",),
    "datasets": ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
    "energon": (
        "megatron-energon==7.4.1",
        "multi-storage-client==1.3.1",
        "rapidyaml==0.15.2",
        "mfusepy==3.1.1",
        "filetype==1.2.0",
        "lark==1.3.1",
        "wcmatch==12.0.1",
        "bracex==3.2.2",
        "deprecation==2.1.0",
        "xattr==1.3.0",
    ),
}
"""What each reader needs beyond this environment; installed without dependencies, or torch would come
again.
"""

SHOW = """
import hashlib, io, json, sys
import numpy as np
folder, found = sys.argv[1], {}

def add(key, members):
    assert key not in found, key
    found[key] = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}

def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()

def shards(column):
    return [f"{folder}/{column}/{name}.tar" for name in sys.argv[3:]]

def show():
    print(json.dumps(found))
"""

WEBDATASET = """
import webdataset as wds
for column in sys.argv[2].split(","):
    for sample in wds.WebDataset(shards(column), shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        add(f"{column}/{key}", members)
show()
"""

WEBDATASET_JOINED = """
import webdataset as wds
names = sys.argv[2].split(",")
columns = [wds.WebDataset(shards(name), shardshuffle=False, empty_check=False) for name in names]
for samples in zip(*columns, strict=True):
    assert len({sample["__key__"] for sample in samples}) == 1
    whole = {}
    for sample in samples:
        whole |= {name: data for name, data in sample.items() if not name.startswith("__")}
    add(samples[0]["__key__"], whole)
show()
"""

DATASETS = """
from datasets import Image, load_dataset
for column in sys.argv[2].split(","):
    files = {"train": shards(column)}
    data = load_dataset("webdataset", data_files=files, split="train", cache_dir=f"{folder}/cache")
    for name, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
    for sample in data.with_format(None):
        members = {}
        for name, value in sample.items():
            if name.startswith("__"):
                continue
            if name == "json":
                value = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            elif name.endswith("npy"):
                value = npy(np.array(value, np.float16))
            elif isinstance(value, dict):
                value = value["bytes"]
            members[name] = value.encode() if isinstance(value, str) else value
        add(f"{column}/{sample['__key__']}", members)
show()
"""

ENERGON = """
from megatron.energon import (
    CrudeSample, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
)
from megatron.energon.task_encoder.cooking import Cooker

@stateless
def cook(sample):
    return CrudeSample(sample)

class Plain(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

    @stateless
    def batch(self, samples):
        return samples

    @stateless
    def encode_batch(self, batch):
        return batch

workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
for column in sys.argv[2].split(","):
    data = get_val_dataset(
        f"{folder}/{column}", worker_config=workers, batch_size=1, task_encoder=Plain()
    )
    for batch in get_loader(data):
        for sample in batch:
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            add(f"{column}/{sample['__key__']}", members)
show()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Variables with which this interpreter finds a reader's packages before its own. Skips the test where
    they cannot be installed.
    """

    @cache
    def install(reader: str) -> tuple[Path, str | None]:
        folder = tmp_path_factory.mktemp("reader")
        if not PACKAGES[reader]:
            return folder, None
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, *PACKAGES[reader]], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return folder, None
        return folder, (done.stderr.strip().splitlines() or ["no message"])[-1]

    def of(reader: str) -> dict[str, str]:
        folder, problem = install(reader)
        if problem is not None:
            pytest.skip(f"{', '.join(PACKAGES[reader])}: cannot be installed here ({problem})")
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "PYTHONPATH": str(folder)}

    return of


def read(script: str, variables: dict[str, str], folder: Path, columns: str) -> dict[str, dict[str, str]]:
    """sha256 of every member, by sample, as a reader in its own process sees them."""
    command = [sys.executable, "-c", SHOW + script, str(folder), columns, *SHARDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


Columns = tuple[Path, dict[str, dict[str, bytes]]]


@pytest.fixture(params=["png", "jpg"])
def columns(request: pytest.FixtureRequest, tmp_path: Path) -> Columns:
    """Images with captions and metadata, features and text features, as the stages write them; and their
    members.
    """
    rng, position = np.random.default_rng(0), 0
    written: dict[str, dict[str, bytes]] = {}
    for name, number in SHARDS.items():
        parts: dict[str, dict[str, dict[str, bytes]]] = {column: {} for column in ALL.split(",")}
        for _ in range(number):
            key = f"{position:09d}"
            stream = io.BytesIO()
            pixels = rng.integers(0, 256, (32 + position, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG" if request.param == "png" else "JPEG")
            caption = f"{position}: zwölf blaue Würfel, “quoted” 图\nsecond line" * (1 + position % 5)
            metadata = {"captions": [caption, "short"], "width": 40, "key": key}
            parts["curate"][key] = {
                request.param: stream.getvalue(),
                "txt": caption.encode(),
                "json": canonical_json(metadata).encode(),
            }
            features = rng.standard_normal((16, 64)).astype(np.float16)
            parts["image_features"][key] = {"image_features.npy": npy_bytes(features)}
            text = rng.standard_normal((3 + position % 4, 32)).astype(np.float16)
            parts["prompt_features"][key] = {"prompt_features.npy": npy_bytes(text)}
            position += 1
        for column, samples in parts.items():
            with ShardCommit(Folder.at(tmp_path / column), name, "f", {}) as commit:
                with tar_shard(commit) as writer:
                    for key, members in samples.items():
                        writer.write(key, members)
                        written[f"{column}/{key}"] = members
                commit.commit(f"{name}.tar")
    return tmp_path, written


def digests(written: dict[str, dict[str, bytes]]) -> dict[str, dict[str, str]]:
    return {
        key: {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
        for key, members in written.items()
    }


ALL = "curate,image_features,prompt_features"


@pytest.mark.parametrize("reader", ["webdataset", "webdataset 1"])
def test_webdataset_reads_every_member(columns: Columns, environment, reader):
    folder, written = columns
    variables = environment(reader)
    assert read(WEBDATASET, variables, folder, ALL) == digests(written)


@pytest.mark.parametrize("reader", ["webdataset", "webdataset 1"])
def test_webdataset_reads_the_columns_side_by_side(columns: Columns, environment, reader):
    folder, written = columns
    expected: dict[str, dict[str, str]] = {}
    for place, members in digests(written).items():
        expected.setdefault(place.rpartition("/")[2], {}).update(members)
    variables = environment(reader)
    found = read(WEBDATASET_JOINED, variables, folder, ALL)
    assert found == expected and list(found) == sorted(found)


def test_hugging_face_datasets_reads_every_member(columns: Columns, environment):
    folder, written = columns
    variables = environment("datasets")
    assert read(DATASETS, variables, folder, ALL) == digests(written)


def test_megatron_energon_prepares_and_reads_every_member(columns: Columns, environment):
    folder, written = columns
    variables = environment("energon")
    for column in ALL.split(","):
        command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder / column)]
        options = ["--non-interactive", "--split-ratio", "0,1,0", "--sample-type", "CrudeWebdataset"]
        done = subprocess.run(
            [*command, *options, "--no-progress", "--num-workers", "1"],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert read(ENERGON, variables, folder, ALL) == digests(written)
