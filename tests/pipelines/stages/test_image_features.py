"""The worker of image features: what it writes, bit for bit, from images of several sizes, in one thread or
two.
"""

import io
import itertools
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from diffusers import AutoencoderKL
from image_forms import POSTSCRIPT, jpeg_of_scans
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_bytes
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, read_sidecar
from pipelines.shards.tars import tar_shard
from pipelines.stages.image_features import (
    ImageFeaturesConfig,
    ImageFeaturesWorker,
    fingerprint_fields,
    merge_statistics,
)
from repfusion.files import file_sha256
from repfusion.latents.encoder import Encoding
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.scenes.world import WorldConfig, draw_scene, render, to_uint8

SIZE, BATCH = 32, 4
FORMATS = {"png": {}, "jpg": {"format": "JPEG", "quality": 90}, "webp": {"format": "WEBP", "quality": 90}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("tower")
    CLIPVisionModel(config).save_pretrained(folder)
    return EncoderConfig(path=folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    torch.manual_seed(0)
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    model = AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(8, 8, 8),
        latent_channels=3,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return EncoderConfig(path=folder)


def image_bytes(
    seed: int, extension: str = "png", size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB"
) -> bytes:
    """Noise, smooth enough that resizing does not average it away."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **FORMATS[extension]})
    return stream.getvalue()


def write_shard(folder: Folder, name: str, samples: dict[str, dict[str, bytes]]) -> None:
    with ShardCommit(folder, name, "images", {}) as commit:
        with tar_shard(commit) as writer:
            for key, members in samples.items():
                writer.write(key, {"txt": b"a thing", **members})
        commit.commit(f"{name}.tar")


@pytest.fixture
def images(tmp_path: Path) -> Folder:
    """Three shards of 10, 3 and 8 images in three formats."""
    folder, seed = Folder.at(tmp_path / "images"), 0
    for shard, number in enumerate((10, 3, 8)):
        samples = {}
        for _ in range(number):
            extension = list(FORMATS)[seed % 3]
            samples[f"{seed:09d}"] = {extension: image_bytes(seed, extension)}
            seed += 1
        write_shard(folder, f"{shard:05d}", samples)
    return folder


def make_worker(folder: Folder, images: Folder, encoder: EncoderConfig) -> ImageFeaturesWorker:
    config = ImageFeaturesConfig(batch_size=BATCH, actors=ActorsConfig(num_actors=1, num_cpus=1))
    return ImageFeaturesWorker(folder, images, config, encoder)


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        streams = {info.name: archive.extractfile(info) for info in archive}
        return {name: stream.read() for name, stream in streams.items() if stream is not None}


def expected_shard(images: Folder, name: str, encoder: EncoderConfig, target: Path) -> LatentStatistics:
    """The plain way: PIL, the encoder on batches of float pixels, numpy.save, webdataset's writer."""
    tower = encoder.load()
    keys, arrays = [], []
    for file, data in members_of(images.path / f"{name}.tar").items():
        key, _, extension = file.partition(".")
        if extension != "txt":
            keys.append(key)
            arrays.append(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    statistics = LatentStatistics.empty(tower.num_tokens, tower.feature_dim)
    with wds.TarWriter(str(target), encoder=False, mtime=0) as writer:
        for first in range(0, len(keys), BATCH):
            pixels = (
                torch.from_numpy(np.stack(arrays[first : first + BATCH])).permute(0, 3, 1, 2).float() / 255
            )
            encoding = tower.encode(pixels)
            features = encoding.features.half()
            statistics.update(features, encoding.tokens)
            for key, row in zip(keys[first : first + BATCH], features.numpy(), strict=True):
                stream = io.BytesIO()
                np.save(stream, row)
                writer.write({"__key__": key, "image_features.npy": stream.getvalue()})
    return statistics


def same_bits(one: LatentStatistics, other: LatentStatistics) -> bool:
    assert one.tokens is not None and other.tokens is not None
    pairs = zip((one.mean, one.m2, *one.tokens), (other.mean, other.m2, *other.tokens), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_shards_and_statistics_are_those_of_the_plain_way_bit_for_bit(images, encoder, tmp_path):
    folder = Folder.at(tmp_path / "image_features")
    worker = make_worker(folder, images, encoder)
    merged = LatentStatistics.empty(16, 16)
    for name, number in {"00000": 10, "00001": 3, "00002": 8}.items():
        sidecar = worker(ShardJob(name, "f", {"curate": "a"}))
        statistics = expected_shard(images, name, encoder, tmp_path / "expected.tar")
        assert (folder.path / f"{name}.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()
        assert (sidecar.samples, sidecar.inputs) == (number, {"curate": "a"})
        assert sidecar == read_sidecar(folder, name)
        saved = LatentStatistics.load(folder.path / f"{name}.statistics.safetensors")
        assert saved.count == number and same_bits(saved, statistics)
        merged.merge(statistics)
    merge_statistics(folder, ["00000", "00001", "00002"], "statistics.safetensors")
    whole = LatentStatistics.load(folder.path / "statistics.safetensors")
    assert whole.count == 21 and same_bits(whole, merged)


def test_two_shards_at_once_give_the_bytes_of_one_after_the_other(images, encoder, tmp_path):
    names = ["00000", "00001", "00002"]
    one, two = Folder.at(tmp_path / "one"), Folder.at(tmp_path / "two")
    worker = make_worker(one, images, encoder)
    for name in names:
        worker(ShardJob(name, "f"))
    worker = make_worker(two, images, encoder)
    with ThreadPoolExecutor(ImageFeaturesWorker.concurrency) as threads:
        list(threads.map(worker, [ShardJob(name, "f") for name in reversed(names)]))
    for name in names:
        for file in (f"{name}.tar", f"{name}.statistics.safetensors"):
            assert file_sha256(one.path / file) == file_sha256(two.path / file)
    assert one.names() == two.names() and len(one.names()) == 9


def test_stored_and_read_through_a_url(images, encoder, tmp_path):
    remote = Folder.at(f"memory://{tmp_path.name}")
    for name in sorted(images.names()):
        (remote / "images").write(name, images.read(name))
    local = Folder.at(tmp_path / "image_features")
    make_worker(local, images, encoder)(ShardJob("00001", "f"))
    make_worker(remote / "image_features", remote / "images", encoder)(ShardJob("00001", "f"))
    assert (remote / "image_features").read("00001.tar") == local.read("00001.tar")
    merge_statistics(remote / "image_features", ["00001"], "statistics.safetensors")
    assert (remote / "image_features").has("statistics.safetensors")
    remote.clear()


@pytest.mark.parametrize("size", [(64, 64), (48, 33), (33, 48), (32, 80)])
def test_larger_images_are_resized_by_the_shorter_side_and_cropped_in_the_centre(encoder, tmp_path, size):
    images, folder = Folder.at(tmp_path / "images"), Folder.at(tmp_path / "image_features")
    data = image_bytes(0, size=size)
    write_shard(images, "00000", {"000000000": {"png": data}})
    make_worker(folder, images, encoder)(ShardJob("00000", "f"))
    made = np.load(io.BytesIO(members_of(folder.path / "00000.tar")["000000000.image_features.npy"]))
    original, short = Image.open(io.BytesIO(data)), min(size)
    left, top = (size[0] - short) / 2, (size[1] - short) / 2
    box = (left, top, left + short, top + short)
    resized = np.array(original.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
    expected = encoder.load()(torch.from_numpy(resized)[None].permute(0, 3, 1, 2).float() / 255)[0].half()
    np.testing.assert_array_equal(made, expected.numpy())


@pytest.mark.parametrize("size", [(31, 31), (64, 31), (16, 64)])
def test_smaller_images_are_an_error_that_says_what_to_set(encoder, tmp_path, size):
    images, folder = Folder.at(tmp_path / "images"), Folder.at(tmp_path / "image_features")
    good = {"png": image_bytes(0)}
    write_shard(images, "00000", {"000000000": good, "000000001": {"png": image_bytes(1, size=size)}})
    expected = (
        rf"shard .*00000\.tar, key 000000001: image is {size[0]} x {size[1]} px, smaller than the 32 x 32 "
        r"that the encoder takes; set ingest\.image_size=32"
    )
    with pytest.raises(ShardError, match=expected):
        make_worker(folder, images, encoder)(ShardJob("00000", "f"))
    assert folder.names() == set()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"png": image_bytes(1)[:-200]}, r"cannot be decoded, \[undecodable_image\]"),
        (
            {"jpg": POSTSCRIPT},
            r"\[undecodable_image\] no known format",
        ),
        ({"jpeg": jpeg_of_scans(101)}, r"\[too_many_scans\] a JPEG of more than 100"),
        ({}, "no image"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_an_error_that_names_it(encoder, tmp_path, members, message):
    images, folder = Folder.at(tmp_path / "images"), Folder.at(tmp_path / "image_features")
    write_shard(images, "00000", {"000000000": {"png": image_bytes(0)}, "000000001": members})
    with pytest.raises(ShardError, match=rf"shard .*00000\.tar, key 000000001: .*{message}"):
        make_worker(folder, images, encoder)(ShardJob("00000", "f"))
    assert folder.names() == set()


def test_another_image_size_gives_its_own_grid(images, encoder, tmp_path):
    smaller = encoder.model_copy(update={"image_size": 16})
    folder = Folder.at(tmp_path / "image_features")
    make_worker(folder, images, smaller)(ShardJob("00001", "f"))
    for data in members_of(folder.path / "00001.tar").values():
        assert np.load(io.BytesIO(data)).shape == (4, 16)
    assert LatentStatistics.load(folder.path / "00001.statistics.safetensors").mean.shape == (4, 16)


def test_the_fingerprint_names_the_size_in_use(encoder):
    own = fingerprint_fields("image_features", encoder, "digest")
    assert own["columns.image_features.encoder.image_size"] == SIZE
    assert (
        fingerprint_fields("image_features", encoder.model_copy(update={"image_size": SIZE}), "digest") == own
    )
    other = fingerprint_fields("image_features", encoder.model_copy(update={"image_size": 16}), "digest")
    assert {name for name in own if own[name] != other[name]} == {"columns.image_features.encoder.image_size"}
    with pytest.raises(ValueError, match=r"encoder\.image_size 30: not a multiple of 8"):
        fingerprint_fields("image_features", encoder.model_copy(update={"image_size": 30}), "digest")


def test_a_vae_is_an_encoder_by_its_folder_alone(images, vae, tmp_path):
    """The plain way is diffusers' own: the posterior's mean, a token a latent pixel along the rows."""
    worker = make_worker(Folder.at(tmp_path / "out"), images, vae)
    assert (worker.encoder.grid, worker.encoder.feature_dim) == ((8, 8), 3)
    sidecar = worker(ShardJob("00001", "image_features", {}))
    assert set(sidecar.versions) == {"torch", "diffusers", "repfusion"}
    pixels = np.stack(
        [
            np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            for file, data in sorted(members_of(images.path / "00001.tar").items())
            if not file.endswith("txt")
        ]
    )
    with torch.no_grad():
        model = AutoencoderKL.from_pretrained(vae.path)
        latent = model.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    expected = latent.permute(0, 2, 3, 1).reshape(3, 64, 3)
    stored = sorted(members_of(tmp_path / "out" / "00001.tar").items())
    made = np.stack([np.load(io.BytesIO(data)) for _, data in stored])
    assert made.dtype == np.float16
    np.testing.assert_allclose(made, expected.numpy(), atol=2e-3)
    statistics = LatentStatistics.load(tmp_path / "out" / "00001.statistics.safetensors")
    np.testing.assert_allclose(statistics.mean.numpy(), made.astype(np.float64).mean(0), atol=1e-12)
    assert statistics.tokens is None


def test_a_vaes_fingerprint_has_its_size_and_no_layer(vae, encoder):
    own = fingerprint_fields("image_features", vae, "digest")
    assert own["columns.image_features.encoder.image_size"] == SIZE
    assert fingerprint_fields("image_features", vae.model_copy(update={"layer": -1}), "digest") == own
    assert (
        fingerprint_fields("image_features", vae, "other")
        != own
        != fingerprint_fields("image_features", encoder, "digest")
    )
    assert fingerprint_fields("image_features", vae.model_copy(update={"image_size": 16}), "digest") != own
    with pytest.raises(
        ValueError, match=r"not a multiple of 4, the factor of the VAE .*; the nearest one is 32"
    ):
        fingerprint_fields("image_features", vae.model_copy(update={"image_size": 30}), "digest")


def test_features_beyond_half_precision_are_refused_by_key(images, encoder, tmp_path, monkeypatch):
    worker = make_worker(Folder.at(tmp_path / "image_features"), images, encoder)
    encode = worker.encoder.encode_images

    def overflow(batch: torch.Tensor) -> Encoding:
        encoding = encode(batch)
        encoding.features[1, 2, 3] = 1e5
        return encoding

    monkeypatch.setattr(worker.batches, "encode", overflow)
    with pytest.raises(ShardError, match=r"key 000000001: .* not finite in float16"):
        worker(ShardJob("00000", "f"))
    assert worker.folder.names() == set()


def test_a_tower_beyond_its_precision_is_named_with_layer_and_key(images, encoder, tmp_path):
    """The second image alone: its product in the first block leaves float16's range, as attention's would."""
    config = ImageFeaturesConfig(batch_size=BATCH, encoder_dtype="float16")
    worker = ImageFeaturesWorker(Folder.at(tmp_path / "image_features"), images, config, encoder)
    layer = worker.encoder.tower.encoder.layers[0].mlp.fc1
    seen = itertools.count()

    def overflow(module, inputs, output):
        # the batch, then the second image alone, for whom it is looked
        row = 1 if next(seen) == 0 else 0
        return output.index_fill(0, torch.tensor([row]), 1e4).mul(10)

    layer.register_forward_hook(overflow)
    told = (
        r"key 000000001: .* come from tower\.encoder\.layers\.0\.mlp\.\w+, computing in float16: "
        r"set columns\.image_features\.encoder_dtype=float32"
    )
    with pytest.raises(ShardError, match=told):
        worker(ShardJob("00000", "f"))


COSINE, MEAN_ABSOLUTE = 0.9995, 0.02
"""How far bfloat16 may take features, of unit variance, from float32's."""


def test_bfloat16_keeps_the_stated_distance_to_float32():
    """The shipped tower on scenes, whose LayerNorm at the end is float32 in both."""
    config = WorldConfig(image_size=64)
    pictures = np.stack([to_uint8(render(draw_scene(seed, config), config)) for seed in range(8)])
    exact, low = (
        EncoderConfig().load(dtype=dtype).encode_images(torch.from_numpy(pictures)).features
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    assert torch.cosine_similarity(low, exact, dim=-1).min() > COSINE
    assert (low - exact).abs().mean() < MEAN_ABSOLUTE
    torch.testing.assert_close(low.var(-1, correction=0), torch.ones(low.shape[:2]), atol=1e-3, rtol=0)


def test_a_batch_that_does_not_fit_is_encoded_in_halves(images, encoder, tmp_path, monkeypatch, caplog):
    whole = make_worker(Folder.at(tmp_path / "whole"), images, encoder)
    whole(ShardJob("00000", "f"))
    worker = make_worker(Folder.at(tmp_path / "image_features"), images, encoder)
    encode = worker.batches.encode

    def crowded(batch: torch.Tensor) -> Encoding:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(batch)

    monkeypatch.setattr(worker.batches, "encode", crowded)
    assert worker(ShardJob("00000", "f")).samples == 10
    assert "2 are taken from now on; set columns.image_features.batch_size=2" in caplog.text
    made, expected = (members_of(tmp_path / name / "00000.tar") for name in ("image_features", "whole"))
    assert made.keys() == expected.keys()
    for name, data in made.items():
        one, other = (np.load(io.BytesIO(part)) for part in (data, expected[name]))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)
    one, other = (
        LatentStatistics.load(tmp_path / name / "00000.statistics.safetensors")
        for name in ("image_features", "whole")
    )
    assert one.count == other.count == 10
    torch.testing.assert_close(one.var, other.var, rtol=1e-2, atol=1e-3)


def test_batches_of_one_size_change_nothing_but_rounding(images, encoder, tmp_path):
    """The last batch of a shard is filled up where sizes are to be static, as on a GPU."""
    found = []
    for is_static in (False, True):
        worker = make_worker(Folder.at(tmp_path / str(is_static)), images, encoder)
        worker.batches.is_static = is_static
        worker(ShardJob("00000", "f"))
        members = members_of(tmp_path / str(is_static) / "00000.tar")
        found.append({name: np.load(io.BytesIO(data)).astype(np.float32) for name, data in members.items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 10
    for name, features in found[0].items():
        np.testing.assert_allclose(found[1][name], features, atol=2e-3)


def test_what_an_encoder_computes_in_is_in_the_fingerprint_where_it_changes_bytes(encoder):
    def differs(**fields) -> dict:
        own = fingerprint_fields("image_features", encoder, "digest", ImageFeaturesConfig(**fields))
        plain = fingerprint_fields("image_features", encoder, "digest")
        assert plain.items() <= own.items()
        return {name.rpartition(".")[2]: value for name, value in own.items() if name not in plain}

    assert differs() == differs(encoder_dtype="float32", compile=False, batch_size=7) == {}
    assert differs(actors=ActorsConfig(num_gpus=1)) == {"encoder_dtype": "bfloat16", "compile": True}
    assert differs(actors=ActorsConfig(num_gpus=0.5), encoder_dtype="float32", compile=False) == {}
    assert differs(encoder_dtype="float16") == {"encoder_dtype": "float16"}
    assert differs(compile=True) == {"compile": True}


def test_a_shard_that_changed_since_it_was_written_is_not_encoded(images, encoder, tmp_path):
    path = images.path / "00001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    worker = make_worker(Folder.at(tmp_path / "image_features"), images, encoder)
    with pytest.raises((ShardError, OSError, SyntaxError), match=r"00001|image"):
        worker(ShardJob("00001", "f"))
    assert worker.folder.names() == set()


@pytest.mark.parametrize("shape, dtype", [((2, 3), np.float16), ((0, 4), np.float32), ((5,), np.int64)])
def test_npy_members_are_numpys_own_bytes(shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    stream = io.BytesIO()
    np.save(stream, array)
    assert npy_bytes(array) == stream.getvalue()
