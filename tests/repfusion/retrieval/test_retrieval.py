"""Indices, search, recall and the decision against slow references; foreign ones are refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gill import make_gill, noise_images, save_gill, write_noise
from tiny_shards import write_shards
from tiny_training import npy, tiny_model, write_tar

from repfusion.files import weights_digest
from repfusion.model.build import build_model
from repfusion.retrieval import __main__ as command
from repfusion.retrieval import search
from repfusion.retrieval.decision import (
    DecisionConfig,
    fit_decision,
    learn_decision,
    load_decision,
    save_decision,
)
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.index import Hit, ImageIndex, build_index
from repfusion.retrieval.recall import RecallConfig, draw_pairs, measure_recall, recalls

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader(foundation: Path, statistics, tmp_path_factory) -> GillReader:
    return GillReader(save_gill(tmp_path_factory.mktemp("gill"), make_gill(foundation, statistics)), CPU)


@pytest.fixture(scope="module")
def index(reader: GillReader, tmp_path_factory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("index")
    return build_index(reader, write_noise(folder / "curate"), folder / "index", batch_size=2)


def test_search_in_parts_equals_a_sort_of_all(monkeypatch):
    monkeypatch.setattr(search, "ROWS_AT_ONCE", 3)
    torch.manual_seed(0)
    queries, parts = torch.randn(3, 4), [torch.randn(n, 4) for n in (5, 0, 7)]
    parts[2][1] = parts[0][2]
    rows = torch.cat(parts)
    scores, places = search.nearest(queries, iter(parts), 6)
    for query, found, where in zip(queries, scores, places, strict=True):
        ranked = sorted(range(12), key=lambda row: (-(query @ rows[row]).item(), row))[:6]
        assert where.tolist() == ranked
        torch.testing.assert_close(found, torch.stack([query @ rows[row] for row in ranked]))
    assert search.nearest(queries, parts, 20)[1].shape == (3, 12)


def test_what_ties_with_its_own_counts_against_it():
    own = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = search.rivals(queries, own, at_once=3)
    slow = [sum(bool(q @ o >= q @ own[i]) for o in own) - 1 for i, q in enumerate(queries)]
    assert found.tolist() == slow == [1, 1, 1, 1]
    shares = recalls(found)
    assert (shares["recall@1"], shares["recall@5"]) == (0.0, 1.0)
    assert shares["intervals"]["recall@1"]["high"] < 0.7


def test_an_index_finds_the_images_that_a_slow_search_finds(reader: GillReader, index: ImageIndex):
    images = noise_images(7)
    keys = [(f"{row % 2:05d}.tar", f"{row % 2:05d}{row // 2:04d}") for row in range(7)]
    query = reader.of_prompts(["a red circle"])
    with torch.no_grad():
        each = torch.cat([reader.of_images([image]) for image in images]) @ query[0]
    ranked = sorted(range(7), key=lambda row: -each[row].item())
    found = ImageIndex(index.folder).find(query, 3)[0]
    assert [(hit.shard, hit.key) for hit in found] == [keys[row] for row in ranked[:3]]
    assert [hit.score for hit in found] == pytest.approx([each[row].item() for row in ranked[:3]], abs=1e-5)
    assert np.array_equal(index.image(found[1]), images[ranked[1]])
    assert len(index) == 7 and sum(1 for _ in index.embeddings()) == 2


def test_an_index_of_another_checkpoint_or_encoder_is_refused(reader, index, tmp_path):
    index.check(reader.space)
    others = {"weights": r"is of another retrieval weights", "encoder": r"another encoder \(encoder\)"}
    for name, said in others.items():
        record = index.record.model_dump(mode="json")
        record["space"][name] = "0" * 64
        (tmp_path / "index.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=rf"{said}: it has 000000000000 of .*; make the index again by"):
            ImageIndex(tmp_path).check(reader.space)
    with pytest.raises(ValueError, match=r"no index\.json here; 'python -m repfusion.* index' writes"):
        ImageIndex(tmp_path / "nowhere")


@pytest.mark.slow
def test_checkpoints_differ_in_what_retrieval_reads_with(reader, foundation, statistics, tmp_path):
    model = make_gill(foundation, statistics)
    same = GillReader(save_gill(tmp_path / "same", model), CPU)
    assert same.space.weights == reader.space.weights
    with torch.no_grad():
        model.conditioner.of_image.bias[0] += 1e-3
    other = GillReader(save_gill(tmp_path / "other", model), CPU)
    assert other.space.weights != reader.space.weights and other.space.encoder == reader.space.encoder


def test_a_column_of_features_spares_encoding_where_it_is_the_encoders(reader, index, tmp_path):
    images, column = Path(index.record.images), tmp_path / "image_features"
    rows = noise_images(7)
    for shard in range(2):
        features = [
            reader.encoder.encode_images(torch.from_numpy(one)[None]).features[0] for one in rows[shard::2]
        ]
        samples = [
            (f"{shard:05d}{row:04d}", {"image_features.npy": npy(one.numpy())})
            for row, one in enumerate(features)
        ]
        write_tar(column / f"{shard:05d}.tar", samples)
    with pytest.raises(ValueError, match=r"column .* has no manifest\.json"):
        build_index(reader, images, tmp_path / "index", column)
    own = weights_digest(reader.model.config.encoder.path)
    fields = {"path": own, "layer": -2, "image_size": 32}
    for changed, said in (
        ({"path": "1" * 64}, "path 111111111111, expected"),
        ({"layer": -1}, "layer -1, expected -2"),
    ):
        written = {f"columns.main.encoder.{name}": value for name, value in {**fields, **changed}.items()}
        (column / "manifest.json").write_text(json.dumps({"fields": written}))
        with pytest.raises(ValueError, match=rf"another encoder than the checkpoint.*{said}"):
            build_index(reader, images, tmp_path / "index", column)
    written = {f"columns.main.encoder.{name}": value for name, value in fields.items()}
    (column / "manifest.json").write_text(json.dumps({"fields": written}))
    found = build_index(reader, images, tmp_path / "index", column)
    torch.testing.assert_close([*found.embeddings()], [*index.embeddings()], atol=1e-5, rtol=1e-4)


def test_images_that_cannot_be_indexed_are_named(reader, tmp_path):
    write_shards(tmp_path / "large", noise_images(2, side=40), 1)
    with pytest.raises(ValueError, match=r"key 000000000: the image is 40 x 40 px, the encoder takes 32"):
        build_index(reader, tmp_path / "large", tmp_path / "index")
    assert not (tmp_path / "index").exists()
    write_tar(tmp_path / "texts" / "00000.tar", [("a", {"txt": b"a red circle"})])
    with pytest.raises(ValueError, match=r"key a: no image \(jpg, jpeg, png, webp\)"):
        build_index(reader, tmp_path / "texts", tmp_path / "index")
    with pytest.raises(ValueError, match=r"--out .* holds other files than an index"):
        build_index(reader, tmp_path / "texts", tmp_path / "large")


def test_an_image_whose_shard_has_gone_is_named(index: ImageIndex):
    with pytest.raises(ValueError, match=r"where 00009\.tar is missing; put the shards back"):
        index.image(Hit("00009.tar", "a", 0.0))
    with pytest.raises(ValueError, match=r"has no image none, which the index"):
        index.image(Hit("00000.tar", "none", 0.0))


def test_a_damaged_index_is_named(index: ImageIndex, tmp_path):
    shutil.copytree(index.folder, tmp_path / "index")
    path = tmp_path / "index" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001\.safetensors is not readable \(its sha256 is another\)"):
        ImageIndex(tmp_path / "index").find(torch.ones(1, 8), 1)
    path.unlink()
    with pytest.raises(ValueError, match=r"00001\.safetensors is not readable \(.*No such file"):
        ImageIndex(tmp_path / "index").find(torch.ones(1, 8), 1)


def test_recall_is_of_different_held_out_scenes(reader: GillReader):
    config = RecallConfig(num=6)
    pairs = draw_pairs(config, 64)
    assert len({pair.caption for pair in pairs}) == 6 and all(pair.prompt is not None for pair in pairs)
    measured = measure_recall(reader, config)
    assert measured["chance"]["recall@1"] == pytest.approx(1 / 6) and measured["chance"]["recall@10"] == 1
    assert measured["text_to_image"]["recall@10"] == measured["image_to_text"]["recall@10"] == 1
    assert 0 <= measured["right"]["chance"] < 1


def test_the_decision_is_the_minimum_of_its_loss():
    torch.manual_seed(0)
    states = torch.randn(40, 5) * torch.tensor([1.0, 2, 3, 1, 1]) + 3
    wanted = states[:, 0] + 0.5 * torch.randn(40) > 3
    found = fit_decision(states, wanted, penalty=0.02)
    deviation = states.std(0, correction=0)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        total = 0.0
        for state, is_drawn in zip(states, wanted, strict=True):
            share = (state @ weight + bias).sigmoid()
            total -= (share if is_drawn else 1 - share).log().item() / 40
        return total + 0.02 * (weight * deviation).square().sum().item()

    least = loss(found.weight, found.bias)
    for row in range(5):
        for step in (-0.05, 0.05):
            moved = found.weight.clone()
            moved[row] += step
            assert loss(moved, found.bias) > least
    assert loss(found.weight, found.bias + 0.05) > least < loss(found.weight, found.bias - 0.05)


def test_a_decision_is_learned_and_belongs_to_its_index(reader, index, tmp_path):
    def judge(reader, index, prompts, config):
        drawn = ["two" in one.text or row % 5 == 0 for row, one in enumerate(prompts)]
        return drawn, [not one or row % 7 == 0 for row, one in enumerate(drawn)]

    config = DecisionConfig(num_prompts=60)
    found, record = learn_decision(reader, index, config, judge)
    counts = (record.drawn_alone, record.retrieved_alone, record.both, record.neither)
    assert sum(counts) == 60 and record.both > 0 and record.test.total == round(0.3 * (60 - record.both))
    save_decision(tmp_path / "decision", found, record)
    states = torch.randn(4, 3, 32)
    again = load_decision(tmp_path / "decision", reader.space, index)
    assert torch.equal(again.draws(states), found.draws(states)) and found.draws(states).shape == (4,)
    other = build_index(reader, write_noise(tmp_path / "curate", num=3), tmp_path / "index")
    with pytest.raises(ValueError, match=r"decision .* was learned of the index .*decide' of this one"):
        load_decision(tmp_path / "decision", reader.space, other)
    with pytest.raises(ValueError, match=r"of 60 prompts the drawn image alone is right for 0"):
        learn_decision(reader, index, config, lambda *given: ([False] * 60, [True] * 60))


@pytest.mark.slow
def test_the_commands_say_what_they_find(reader, index, monkeypatch, capsys, tmp_path):
    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        command.main()
        return json.loads(capsys.readouterr().out)

    given = ["--checkpoint", reader.folder, "--device", "cpu"]
    found = run(
        "query", *given, "--index", index.folder, "--say", "a red circle", "--num", 2, "--out", tmp_path
    )
    assert [hit["key"] for hit in found] == [
        hit.key for hit in index.find(reader.of_prompts(["a red circle"]), 2)[0]
    ]
    assert (tmp_path / "2.png").is_file()
    measured = run("recall", *given, "num=4", "--out", tmp_path / "recall.json")
    assert measured == json.loads((tmp_path / "recall.json").read_text()) and measured["num"] == 4
    with pytest.raises(SystemExit, match="error: expected --say TEXT or --image FILE"):
        run("query", *given, "--index", index.folder)


@pytest.mark.slow
def test_a_decision_is_learned_of_images_that_are_drawn_and_retrieved(reader, index):
    """A tiny model draws nothing right, and no noise is right: that is said, with the counts."""
    config = DecisionConfig.model_validate({"num_prompts": 8, "sampler": {"num_steps": 2}})
    with pytest.raises(ValueError, match=r"of 8 prompts the drawn image alone is right for 0 and"):
        learn_decision(reader, index, config)


@pytest.mark.slow
def test_another_method_is_refused(foundation, statistics, tmp_path):
    checkpoint = save_gill(tmp_path, build_model(tiny_model(foundation, "text_embed"), statistics))
    with pytest.raises(ValueError, match=r"is of the method 'text_embed', which learns neither retrieval"):
        GillReader(checkpoint, CPU)
