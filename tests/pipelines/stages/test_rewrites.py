"""Rewritten captions: what the model wrote, once a caption; what it did not write is counted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from captioned_shards import FIRST, SECOND, fields_of, write_captions

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.stages.rewrites import RewritesConfig, RewritesWorker, rewrites_stage
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat
from repfusion.llm.chats.read import Writing, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_captions(tmp_path, {"00000": FIRST, "00001": SECOND})
    return tmp_path


def worker_of(root: Path, llava: Path, to: str = "rewrites", **fields) -> RewritesWorker:
    config = RewritesConfig(**{"batch_size": 3, "max_new_tokens": 4, "system": "red", **fields})
    folders = Folder.at(root / to), Folder.at(root / "curate")
    return RewritesWorker(*folders, config, mllm=llava, mllm_dtype="float32")


def arrays(root: Path, to: str = "rewrites") -> dict[str, np.ndarray]:
    import io

    found = {}
    for key, members in read_samples(Folder.at(root / to), "00000.tar"):
        for name, data in members.items():
            home = data.decode() if name.endswith(".ref") else None
            found[f"{key}.rewrites.npy"] = found[home] if home else np.load(io.BytesIO(data))
    return found


def test_rewritings_are_what_the_model_writes_one_at_a_time(root, models, monkeypatch):
    """Short of an end, what was written serves here: a model that was not trained writes none."""
    real = write
    monkeypatch.setattr(
        "repfusion.llm.chats.rewriting.write",
        lambda *args: [Writing(one.ids, True) for one in real(*args)],
    )
    worker = worker_of(root, models["llava"])
    sidecar = worker(ShardJob("00000", "f", {"curate": "a"}))
    found = arrays(root)
    assert len(found) == sidecar.samples == len(FIRST) and sidecar.drops == {}
    for key, own in FIRST.items():
        chat = tokenise_chats(worker.mllm, [Chat(own["txt"], system="red")])
        (alone,) = real(worker.mllm, chat, 4)
        array = found[f"{key}.rewrites.npy"]
        assert array.dtype == np.int32 and array.tolist() == alone.ids


def test_what_has_no_end_is_counted_and_the_caption_serves(root, models):
    worker = worker_of(root, models["llava"])
    worker.mllm.head.weight.data.zero_()  # always the first token, which ends nothing
    sidecar = worker(ShardJob("00000", "f", {"curate": "a"}))
    assert sidecar.drops == {"endless_rewriting": len(FIRST)}
    assert sidecar.entries == sidecar.samples == len(FIRST)  # nothing is lost by it
    assert all(len(array) == 0 for array in arrays(root).values())


def test_a_caption_without_room_for_its_rewriting_is_an_error(root, models):
    with pytest.raises(ShardError, match=r"00000\.tar, key \S+: a caption does not fit the MLLM"):
        worker_of(root, models["llava"], max_new_tokens=126)(ShardJob("00000", "f", {"curate": "a"}))


def test_the_fingerprint_follows_how_captions_are_rewritten(root, models):
    def fields(mllm=models["llava"], dtype="float32", names=(), **changes):
        return fields_of(rewrites_stage, RewritesConfig(**changes), mllm, root, dtype, names)

    template = shutil.copytree(models["llava"], root / "templated")
    (template / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    base = fields()
    for changed in (
        fields(mllm=template),
        fields(dtype="bfloat16"),
        fields(system="say it better"),
        fields(max_new_tokens=9),
        fields(names=("long",)),
    ):
        assert sum(base[key] != changed[key] for key in base) == 1
    assert fields(batch_size=1) == base


def test_an_instruction_is_not_rewritten_without_its_source_images(root, models):
    with ShardCommit(Folder.at(root / "curate"), "00002", "f", {}) as commit:
        with tar_shard(commit) as samples:
            samples.write("000000009", {"txt": b"make it blue", "source.png": b"a picture"})
        commit.commit("00002.tar")
    with pytest.raises(ShardError, match=r"00002\.tar, key 000000009: an editing sample, whose instruction"):
        worker_of(root, models["llava"])(ShardJob("00002", "f", {"curate": "a"}))
