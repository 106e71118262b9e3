"""Mixtures -> batches: nothing decides a sample but the seed, its data set, its epoch and its key."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_columns import LONG, READERS, Row, collate, folders, open_captioned, open_columns, read_rows
from tiny_training import GRID, WIDTH, make_columns, write_tar

from repfusion.data.batches import batches, micro_positions
from repfusion.data.columns import scan_tar
from repfusion.data.config import MAIN, DataConfig, DatasetConfig
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe

SIZES = {"main": 20, "photos": 13, "art": 7}
RECIPE = Recipe(condition_dropout=0.1)
SETTINGS = {"seed": 0, "first_step": 0, "num_steps": 6, "global_batch_size": 8, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets of three sizes, whose keys are the same."""
    root = tmp_path_factory.mktemp("mix")
    return {
        name: make_columns(root / name, num_samples, seed=number)
        for number, (name, num_samples) in enumerate(SIZES.items())
    }


def mix(roots: dict[str, Path], **weights: float) -> Mixture:
    parts = {
        name: {"images": roots[name] / "curate", "columns": folders(roots[name]), "weight": weight}
        for name, weight in weights.items()
    }
    main = parts.pop(MAIN)
    return Mixture.open(
        DataConfig(**main, mix={name: DatasetConfig(**part) for name, part in parts.items()}), READERS
    )


def by_sample(rows: list[Row]) -> dict[tuple, tuple]:
    """(data set, epoch, key) -> caption, noise level, noise, whether dropped."""
    found = {(row.dataset, row.epoch, row.key): row.randomness for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 2), (4, 3)])
def test_positions_do_not_depend_on_ranks_or_micro_batches(world_size: int, micro: int):
    for step in (0, 5):
        parts = [p for rank in range(world_size) for p in micro_positions(step, 12, micro, rank, world_size)]
        assert [position for part in parts for position in part] == list(range(step * 12, step * 12 + 12))


def test_a_run_that_changes_its_world_size_sees_every_sample_once_an_epoch(roots: dict[str, Path]):
    mixture = mix(roots, main=1.0, photos=0.6, art=0.3)
    whole = read_rows(mixture, 0, 40)
    pieces = [(0, 9, 1, 8), (9, 20, 2, 2), (20, 33, 4, 1), (33, 40, 1, 2)]
    switched = [
        row
        for first, last, world_size, micro in pieces
        for row in read_rows(mixture, first, last, world_size, micro_batch_size=micro)
    ]
    assert switched == whole and [row.position for row in whole] == list(range(320))

    seen: dict[tuple[str, int], list[str]] = {}
    for row in switched:
        seen.setdefault((row.dataset, row.epoch), []).append(row.key)
    for name, size in SIZES.items():
        prefix = "" if name == MAIN else f"{name}/"
        keys = [f"{prefix}{i:06d}" for i in range(size)]
        *complete, last = [seen[key] for key in sorted(seen) if key[0] == name]
        assert len(complete) >= 5 and all(sorted(epoch) == keys for epoch in complete)
        assert len(set(last)) == len(last) and set(last) <= set(keys)
    # the switches fall into the middle of epochs
    for first, *_ in pieces[1:]:
        before = [sum(row.dataset == name for row in whole[: first * 8]) for name in SIZES]
        assert sum(count % size > 0 for count, size in zip(before, SIZES.values(), strict=True)) >= 2


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"world_size": 4, "micro_batch_size": 1}, {}),
        ({"micro_batch_size": 2}, {}),
        ({"global_batch_size": 24, "micro_batch_size": 6, "world_size": 2}, {}),
        ({}, {"photos": 3.0}),
        ({}, {"art": 0.05, "photos": 0.0}),
    ],
)
def test_a_sample_of_an_epoch_is_the_same_in_every_run(roots: dict[str, Path], changes, weights):
    weights = {"main": 1.0, "photos": 0.6, "art": 0.3, **weights}
    other = mix(roots, **{name: weight for name, weight in weights.items() if weight})
    usual = by_sample(read_rows(mix(roots, main=1.0, photos=0.6, art=0.3), 0, 30))
    found = by_sample(read_rows(other, 0, 30, **changes))
    common = usual.keys() & found.keys()
    assert len(common) > 100 and all(found[key] == usual[key] for key in common)


def test_randomness_differs_by_seed_data_set_epoch_and_key(roots: dict[str, Path]):
    rows = read_rows(mix(roots, main=1.0, photos=1.0), 0, 40)
    assert len({row.t for row in rows}) == len({str(row.noise) for row in rows}) == 320
    assert 0.15 < np.mean([row.dropped for row in rows]) < 0.45
    others = read_rows(mix(roots, main=1.0, photos=1.0), 0, 40, seed=2)
    assert not {row.t for row in rows} & {row.t for row in others}
    assert [row.key for row in rows] != [row.key for row in others]


def test_shares_follow_the_weights(roots: dict[str, Path]):
    rows = read_rows(mix(roots, main=1.0, photos=0.5, art=0.1), 0, 256)  # two blocks
    counts = [sum(row.dataset == name for row in rows) for name in SIZES]
    assert all(abs(count - 2048 * w / 1.6) < 1 for count, w in zip(counts, (1, 0.5, 0.1), strict=True))


def test_batches_across_epochs_and_restarts(columns: Path):
    whole = read_rows(open_columns(columns), 0, 6)
    assert (
        len({row.key for row in whole[:20]}) == 20
        and [row.epoch for row in whole[16:24]] == [0] * 4 + [1] * 4
    )
    restarted = read_rows(open_columns(columns), 2, 6, micro_batch_size=2)
    assert read_rows(open_columns(columns), 0, 2) + restarted == whole


def test_features_are_those_of_the_key(roots: dict[str, Path]):
    mixture = mix(roots, main=1.0, photos=1.0)
    stored = {
        mixture.label(name, dataset[i].key): dataset[i].read("image_features").tolist()
        for name, dataset in mixture.datasets.items()
        for i in range(len(dataset))
    }
    rows = read_rows(mixture, 0, 6)
    assert all(row.features == stored[row.key] for row in rows) and len({row.dataset for row in rows}) == 2


def test_features_reach_torch_as_they_lie_on_disk(columns: Path):
    parts = next(batches(Mixture({MAIN: open_columns(columns)}), RECIPE, collate, **SETTINGS))
    assert [tuple(part.inputs["features"].shape) for part in parts] == [(4, GRID**2, WIDTH)] * 2
    inputs = parts[0].inputs
    assert inputs["features"].dtype == torch.float16 and inputs["text"] == [None] * 4
    assert inputs["noise"].dtype == inputs["t"].dtype == torch.float32


def test_sizes_that_do_not_divide_are_refused(columns: Path):
    mixture = Mixture({MAIN: open_columns(columns)})
    with pytest.raises(ValueError, match="micro_batch_size=3 x world_size=2 must divide global_batch_size=8"):
        next(batches(mixture, RECIPE, collate, **{**SETTINGS, "micro_batch_size": 3, "world_size": 2}))


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_the_thread_reads_ahead_so_far_and_ends_with_the_stream(columns: Path):
    dataset = open_columns(columns, cache_bytes=2**20)
    stream = batches(
        Mixture({MAIN: dataset}), RECIPE, collate, **{**SETTINGS, "global_batch_size": 4, "prefetch_steps": 2}
    )
    next(stream)
    deadline = time.monotonic() + 10
    while len(dataset.cache) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # the step that was handed out, and two
    assert len(dataset.cache) == 12 and reading_threads()
    stream.close()
    assert not reading_threads()


def test_a_damaged_sample_is_raised_at_its_step_with_shard_and_key(roots: dict[str, Path], tmp_path: Path):
    columns = make_columns(tmp_path, 20, seed=5)
    shard = columns / "image_features" / "00001.tar"
    mixture = mix({**roots, "photos": columns}, main=1.0, photos=1.0)
    at = next(row.position for row in read_rows(mixture, 0, 6) if row.key == "photos/000011")
    offset, _ = scan_tar(shard)["000011.image_features.npy"]
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"junk!!")
    mixture = mix({**roots, "photos": columns}, main=1.0, photos=1.0)
    done = []
    with pytest.raises(ValueError, match=rf"{shard}, key 000011: not a readable npy"):
        for parts in batches(mixture, RECIPE, collate, **{**SETTINGS, "seed": 1}):
            done += [position for part in parts for position in part.positions]
    assert done == list(range(at // 8 * 8)) and not reading_threads()


def test_any_error_of_the_thread_reaches_the_loop(columns: Path):
    dataset = open_columns(columns)
    dataset.weights = {}  # a mistake of ours: KeyError, not ValueError
    dataset.cache = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        next(batches(Mixture({MAIN: dataset}), RECIPE, collate, **SETTINGS))
    assert not reading_threads()


def test_variants_of_the_caption_are_drawn(columns: Path):
    rows = read_rows(open_columns(columns), 0, 20)
    drawn = {row.caption for row in rows if row.key == "000001"}
    assert drawn == set(open_columns(columns)[1].captions["txt"])


def test_captions_are_drawn_in_proportion_to_their_weights(captioned: Path):
    rows = read_rows(open_captioned(captioned, {"txt": 1.0, "long.txt": 3.0}), 0, 200)
    having = [row.caption for row in rows if row.key in LONG]
    # 800 draws of probability 3/4: a standard deviation of 0.015
    assert abs(np.mean([caption.startswith("a long") for caption in having]) - 0.75) < 0.05
    long = [row for row in rows if row.caption.startswith("a long")]
    assert all(row.caption == LONG[row.key] for row in long) and {row.key for row in long} == LONG.keys()
    reordered = open_captioned(captioned, {"long.txt": 1.5, "txt": 0.5})
    assert read_rows(reordered, 0, 40, micro_batch_size=2) == rows[:320]


@pytest.mark.parametrize("weights", [{"txt": 1.0}, {"txt": 0.2, "long.txt": 0.0}])
def test_with_one_caption_the_draws_do_not_depend_on_the_column(captioned: Path, weights: dict[str, float]):
    bare = read_rows(open_columns(captioned), 0, 20)
    assert read_rows(open_captioned(captioned, weights), 0, 20) == bare


def test_variants_and_names_are_drawn_independently(columns: Path):
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        keys = {member.split(".")[0]: None for member in scan_tar(columns / "curate" / name)}
        write_tar(columns / "captions" / name, [(key, {"long.txt": b"long"}) for key in keys])
    rows = read_rows(open_captioned(columns, {"txt": 1.0, "long.txt": 1.0}), 0, 300)
    odd = [row for row in rows if int(row.key) % 2 and row.caption != "long"]
    assert abs(len(odd) / 1200 - 0.5) < 0.05
    assert abs(np.mean([len(row.caption.split()) == 4 for row in odd]) - 0.5) < 0.08
    # nor does the caption say anything of the noise level
    assert abs(np.corrcoef([row.caption == "long" for row in rows], [row.t for row in rows])[0, 1]) < 0.06


def test_text_features_follow_the_drawn_caption(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1.0, "long.txt": 1.0}, "prompt_features")
    lengths: dict[bool, set[int]] = {True: set(), False: set()}
    for parts in batches(Mixture({MAIN: dataset}), RECIPE, collate, **{**SETTINGS, "num_steps": 10}):
        for batch in parts:
            drawn = [batch.inputs[name] for name in ("captions", "text", "dropped")]
            for key, caption, text, dropped in zip(batch.keys, *drawn, strict=True):
                assert (text is None) == dropped
                if int(key) % 8 != 3 and not dropped:
                    lengths[caption.startswith("a long")].add(len(text))
    assert lengths == {True: {9}, False: {4}} and dataset.widths == {"prompt_features": 32}


@pytest.mark.gpu
def test_batches_lie_in_page_locked_memory(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1.0}, "prompt_features")
    used = torch.cuda.memory_allocated()
    for parts in batches(Mixture({MAIN: dataset}), RECIPE, collate, **SETTINGS):
        for batch in parts:
            tensors = [batch.inputs[name] for name in ("features", "t", "noise")]
            tensors += [text for text in batch.inputs["text"] if text is not None]
            assert len(tensors) > 3
            assert all(tensor.is_pinned() for tensor in tensors)
            copies = [tensor.to("cuda", non_blocking=True) for tensor in tensors]
            assert all(torch.equal(copy.cpu(), one) for copy, one in zip(copies, tensors, strict=True))
            del copies
    assert torch.cuda.memory_allocated() == used
