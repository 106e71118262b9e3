"""Rewritten captions: what the model wrote, once a caption; what it did not write is counted."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from captioned_shards import FIRST, SECOND, fields_of, write_captions
from PIL import Image
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.stages.rewrites import RewritesConfig, RewritesWorker, rewrites_stage
from repfusion.images.decode import read_pixels
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import Writing, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_captions(tmp_path, {"00000": FIRST, "00001": SECOND})
    return tmp_path


def worker_of(root: Path, llava: Path, to: str = "rewrites", **fields) -> RewritesWorker:
    config = RewritesConfig(**{"batch_size": 3, "max_new_tokens": 4, "system": "red", **fields})
    folders = Folder.at(root / to), Folder.at(root / "curate")
    return RewritesWorker(*folders, config, mllm=llava, mllm_dtype="float32")


def arrays(root: Path, to: str = "rewrites", shard: str = "00000") -> dict[str, np.ndarray]:
    found = {}
    for key, members in read_samples(Folder.at(root / to), f"{shard}.tar"):
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


def picture(colour: tuple[int, int, int]) -> bytes:
    image = Image.new("RGB", (24, 20), colour)
    image.paste((255, 255, 255), (6, 4, 15, 12))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


TEXT = b"red square"
RED, BLUE = picture((200, 20, 30)), picture((10, 40, 220))
EDITS: dict[str, dict[str, bytes]] = {
    "000000006": {"txt": TEXT, "source.png": RED},
    "000000007": {"txt": TEXT, "source.png": BLUE},
    "000000008": {"txt": TEXT, "source.png": RED},
    "000000009": {"txt": TEXT, "source.png": RED, "source2.png": BLUE},
    "000000010": {"txt": TEXT},
    "000000011": {"txt": b"two green triangles", "source.png": BLUE},
}


def write_edits(root: Path, edits: dict[str, dict[str, bytes]] = EDITS) -> ShardJob:
    with ShardCommit(Folder.at(root / "curate"), "00002", "f", {}) as commit:
        with tar_shard(commit) as samples:
            for key, members in edits.items():
                samples.write(key, members)
        commit.commit("00002.tar")
    return ShardJob("00002", "f", {"curate": "a"})


def test_an_instruction_is_rewritten_in_sight_of_its_source_images(root, models, monkeypatch):
    """Alone as in a batch; kept once for an instruction and its images, not for others of the same words."""
    real = write
    monkeypatch.setattr(
        "repfusion.llm.chats.rewriting.write",
        lambda *args: [Writing(one.ids, True) for one in real(*args)],
    )
    worker = worker_of(root, models["llava"])
    sidecar = worker(write_edits(root))
    assert sidecar.samples == len(EDITS) and sidecar.drops == {}
    found = arrays(root, shard="00002")
    assert len(found) == len(EDITS)
    for key, own in EDITS.items():
        images = [read_pixels(data) for name, data in sorted(own.items()) if name.startswith("source")]
        chat = tokenise_chats(worker.mllm, [Chat(own["txt"].decode(), images, "red")])
        assert chat.is_any(ChatPart.IMAGE).any() == bool(images)
        (alone,) = real(worker.mllm, chat, 4)
        assert found[f"{key}.rewrites.npy"].tolist() == alone.ids
    stored = read_samples(Folder.at(root / "rewrites"), "00002.tar")
    names = [name for _, members in stored for name in members]
    assert names.count("rewrites.ref") == 1  # the third says what the first does


def blind(folder: Path, llava: Path) -> Path:
    """A language model like a LLaVA's, by itself."""
    config = LlavaForConditionalGeneration.from_pretrained(llava).config.text_config
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in llava.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_images_that_cannot_be_read_with_their_instruction_are_named(root, models):
    place = r"00002\.tar, key 000000006: "
    job = write_edits(root, {"000000006": {"txt": TEXT, "source.png": b"a picture"}})
    with pytest.raises(ShardError, match=place + r".*undecodable"):
        worker_of(root, models["llava"])(job)
    write_edits(root, {"000000006": {"txt": TEXT, "source2.png": RED}})
    with pytest.raises(ShardError, match=place + "no source image 1 beside source2.png"):
        worker_of(root, models["llava"])(job)
    many = {f"source{number}.png": RED for number in ("", *range(2, 40))}
    write_edits(root, {"000000006": {"txt": TEXT, **many}})
    with pytest.raises(ShardError, match=place + r"39 images and the prompt 'red square' take .* images fit"):
        worker_of(root, models["llava"])(job)
    write_edits(root)
    with pytest.raises(ShardError, match=place + r".*images need eyes, and it has none"):
        worker_of(root, blind(root / "blind", models["llava"]))(job)
