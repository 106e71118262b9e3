"""Prompt features: what the model gives, each caption once, the same bytes in any order, readable by the
loader.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_shards import FIRST, SECOND, fields_of, write_captions

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.stages.prompt_features import PromptFeaturesConfig, PromptFeaturesWorker, prompt_features_stage
from repfusion.data.dataset import ColumnDataset
from repfusion.data.readers import CaptionArray, SampleArray
from repfusion.llm.load import load_language_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_captions(tmp_path, {"00000": FIRST, "00001": SECOND})
    return tmp_path


def make_worker(
    root: Path, llava: Path, to: str = "prompt_features", names: tuple[str, ...] = ("long",), **fields
):
    config = PromptFeaturesConfig(**{"batch_size": 3, **fields})
    captions = Folder.at(root / "captions") if names else None
    folders = Folder.at(root / to), Folder.at(root / "curate")
    return PromptFeaturesWorker(
        *folders, config, mllm=llava, mllm_dtype="float32", captions=captions, names=names
    )


def make(worker: PromptFeaturesWorker, *names: str) -> list[Sidecar]:
    return [worker(ShardJob(name, "f", {"curate": "a"})) for name in names]


def members(root: Path, name: str = "00000", stage: str = "prompt_features") -> dict[str, bytes]:
    samples = read_samples(Folder.at(root / stage), f"{name}.tar")
    return {f"{key}.{extension}": data for key, own in samples for extension, data in own.items()}


def test_each_distinct_caption_is_stored_once(root, models):
    sidecar, _ = make(make_worker(root, models["llava"]), "00000", "00001")
    assert sidecar.samples == 5 and not sidecar.drops
    found = members(root)
    assert {name: data.decode() for name, data in found.items() if name.endswith(".ref")} == {
        "000000002.prompt_features.ref": "000000000.prompt_features.npy",
        "000000003.long.prompt_features.ref": "000000000.long.prompt_features.npy",
        "000000003.prompt_features.ref": "000000000.long.prompt_features.npy",
        "000000004.long.prompt_features.ref": "000000000.prompt_features.npy",
    }
    stored = [name for name in found if name.endswith(".npy")]
    assert stored == [
        "000000000.long.prompt_features.npy",
        "000000000.prompt_features.npy",
        "000000001.prompt_features.npy",
        "000000002.long.prompt_features.npy",
        "000000004.prompt_features.npy",
    ]
    # the second shard stores again what the first one holds: a shard never depends on others
    assert sorted(members(root, "00001")) == [
        "000000005.long.prompt_features.npy",
        "000000005.prompt_features.npy",
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_the_models_and_unpadded(root, models, dtype):
    from repfusion.conditioning.text_embed import encode_text

    make(make_worker(root, models["llava"], dtype=dtype), "00000")
    mllm, found = load_language_model(models["llava"]), members(root)
    for key, own in FIRST.items():
        for member, caption in own.items():
            stem = f"{key}.{member.removesuffix('txt')}prompt_features"
            data = found.get(f"{stem}.npy") or found[found[f"{stem}.ref"].decode()]
            array = np.load(io.BytesIO(data))
            expected = encode_text(mllm, mllm.tokenise([caption.strip()]))[0].numpy()
            assert array.dtype == dtype and array.shape == expected.shape
            assert np.abs(array - expected).max() < (5e-3 if dtype == "float16" else 1e-5)


def test_bytes_depend_on_nothing_but_the_shard(root, models):
    make(make_worker(root, models["llava"], "a"), "00000", "00001")
    make(make_worker(root, models["llava"], "b"), "00001", "00000", "00000")
    alone = make_worker(root, models["llava"], "c")
    make(alone, "00001")
    for name in ("00000.tar", "00001.tar"):
        assert (root / "a" / name).read_bytes() == (root / "b" / name).read_bytes()
    assert (root / "a" / "00001.tar").read_bytes() == (root / "c" / "00001.tar").read_bytes()


def test_two_shards_at_once_have_the_bytes_of_one_after_the_other(root, models):
    from concurrent.futures import ThreadPoolExecutor

    shards = {f"{i:05d}": {f"{i}{key[1:]}": own for key, own in FIRST.items()} for i in range(2, 8)}
    write_captions(root, shards)
    make(make_worker(root, models["llava"], "a"), *shards)
    worker = make_worker(root, models["llava"], "b")
    with ThreadPoolExecutor(worker.concurrency) as threads:
        list(threads.map(lambda name: make(worker, name), shards))
    for name in shards:
        assert (root / "a" / f"{name}.tar").read_bytes() == (root / "b" / f"{name}.tar").read_bytes()


def test_the_loader_follows_the_references(root, models):
    make(make_worker(root, models["llava"]), "00000", "00001")
    for name, captions in {"00000": FIRST, "00001": SECOND}.items():
        with ShardCommit(Folder.at(root / "image_features"), name, "f", {}) as commit:
            with tar_shard(commit) as samples:
                for key in captions:
                    array = io.BytesIO()
                    np.save(array, np.zeros((4, 8), np.float16))
                    samples.write(key, {"image_features.npy": array.getvalue()})
            commit.commit(f"{name}.tar")
    weights = {"txt": 1.0, "long.txt": 1.0}
    columns = {name: root / name for name in ("image_features", "prompt_features", "captions")}
    readers = {"image_features": SampleArray(), "prompt_features": CaptionArray()}
    dataset = ColumnDataset(root / "curate", columns, readers, caption_weights=weights)
    arrays: dict[str, np.ndarray] = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        for member, (caption,) in sample.captions.items():
            array = sample.read("prompt_features", member)
            assert array is not None
            np.testing.assert_allclose(array, arrays.setdefault(caption, array), atol=1e-2)
    assert len(arrays) == 6 and len(dataset) == 6


def test_without_alternatives_only_the_main_caption_is_encoded(root, models):
    make(make_worker(root, models["llava"], names=()), "00000")
    assert {name.split(".", 1)[1] for name in members(root)} == {"prompt_features.npy", "prompt_features.ref"}
    with pytest.raises(ValueError, match="captions long are asked for, but there is no folder"):
        PromptFeaturesWorker(
            Folder.at(root),
            Folder.at(root),
            PromptFeaturesConfig(),
            mllm=models["llava"],
            mllm_dtype="float32",
            names=("long",),
        )


def test_a_caption_that_does_not_fit_is_an_error_with_advice(root, models):
    write_captions(root, {"00002": {"000000009": {"txt": "red " * 80}}})
    with pytest.raises(
        ShardError, match=r"00002\.tar, key \S+: a caption does not fit the MLLM.*curate\.max_caption_tokens"
    ):
        make(make_worker(root, models["llava"]), "00002")
    assert not list((root / "prompt_features").glob("*00002*"))


def test_values_beyond_float16_name_the_caption(root, models):
    worker = make_worker(root, models["llava"])
    with torch.no_grad():
        worker.mllm.language_model.norm.weight.fill_(1e6)
    with pytest.raises(
        ShardError, match=r"prompt features of '.*' are not finite in float16; set its column's dtype="
    ):
        make(worker, "00000")


def test_captions_of_other_keys_are_refused(root, models):
    write_captions(root, {"00003": {"000000030": {"long.txt": "a red circle"}}})
    write_captions(root / "other", {"00003": {"000000031": {"txt": "a red circle"}}})
    (root / "other" / "curate" / "00003.tar").replace(root / "curate" / "00003.tar")
    (root / "curate" / "00003.json").unlink()
    with pytest.raises(
        ShardError, match=r"captions/00003\.tar, key 000000030: not among the keys of .*curate/00003"
    ):
        make(make_worker(root, models["llava"]), "00003")


def test_what_decides_the_bytes(root, models):
    def fields(names, **changes):
        config = PromptFeaturesConfig(**changes)
        return fields_of(prompt_features_stage, config, models["llava"], root, names=names)

    base = fields(["short", "long"])
    assert base["columns.c.captions"] == ["long", "short"]
    assert fields(["long", "short"], batch_size=1) == base
    assert fields(["long", "short"], dtype="float32") != base
