"""Data sets of more shards than a process may open files; shards that are replaced under a training."""

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_training import make_columns, tiny_data

from repfusion.data.descriptors import OpenFiles
from repfusion.data.mixture import Mixture
from repfusion.data.readers import CaptionArray, SampleArray

READERS = {"image_features": SampleArray(), "prompt_features": CaptionArray()}

READ_ALL = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[2])
from tiny_training import tiny_data
from repfusion.data.descriptors import OpenFiles
from repfusion.data.mixture import Mixture
from repfusion.data.readers import CaptionArray, SampleArray
import repfusion.data.columns
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
repfusion.data.columns.SHARDS_OPEN = OpenFiles()
readers = {"image_features": SampleArray(), "prompt_features": CaptionArray()}
dataset = Mixture.open(tiny_data(Path(sys.argv[1]), cache_bytes=0), readers).datasets["main"]
def read(index):
    sample = dataset[index]
    assert sample.read("image_features") is not None
    return sample.key

with ThreadPoolExecutor(4) as threads:
    assert list(threads.map(read, range(120))) == [f"{i:06d}" for i in range(120)]
print(len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.slow
def test_120_shards_in_three_columns_and_64_files(tmp_path: Path):
    make_columns(tmp_path, num_samples=120, shard_samples=1)
    support = str(Path(__file__).parents[2] / "support")
    command = [sys.executable, "-c", READ_ALL, str(tmp_path), support]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40


def test_threads_read_what_they_ask_for_within_the_bound(tmp_path: Path):
    paths = [str(tmp_path / f"{i}") for i in range(50)]
    for path in paths:
        Path(path).write_text(path)
    files = OpenFiles(most=4)
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            path = rng.choice(paths)
            with files.open(path) as descriptor:
                assert os.pread(descriptor, 1000, 0).decode() == path

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, range(8)))
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    files.close(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_fails_keeps_nothing_open(tmp_path: Path):
    files, before = OpenFiles(most=2), len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError), files.open(str(tmp_path / "none")):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_is_written_again_is_noticed(tmp_path: Path):
    """Its members may lie elsewhere now, or be another model's."""
    make_columns(tmp_path / "one")
    make_columns(tmp_path / "other", seed=1)
    mixture = Mixture.open(tiny_data(tmp_path / "one", cache_bytes=0), READERS)
    dataset = mixture.datasets["main"]
    assert dataset[9].read("image_features") is not None
    name = "image_features/00001.tar"
    shutil.copyfile(tmp_path / "other" / name, tmp_path / "one" / "new.tar")
    os.replace(tmp_path / "one" / "new.tar", tmp_path / "one" / name)
    assert dataset[1].read("image_features") is not None
    mixture.close()
    with pytest.raises(ValueError, match=r"00001\.tar, key 000009: it was written again since it was opened"):
        dataset[9].read("image_features")
    mixture.close()


def test_the_index_takes_little_of_each_sample(tmp_path: Path):
    """A key in its bytes and eight for each member, in arrays: no Python object for a sample."""
    make_columns(tmp_path, num_samples=600, shard_samples=300)
    mixture = Mixture.open(tiny_data(tmp_path), READERS)
    dataset = mixture.datasets["main"]
    columns = [dataset.images, *dataset.columns.values()]
    spans = [array for column in columns for shards in column.spans.values() for array in shards]
    assert sum(array.nbytes for array in spans) == 600 * 8 * 4
    assert sum(keys.nbytes for keys in dataset.keys) == 600 * 6
    assert all(column.keys[0] is dataset.keys[0] for column in columns)
    mixture.close()
