"""What Query-Kontext's trainings refuse by name: another language model before the connector that was
trained, and more images than the context holds. What was there before stays as it was.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import make_foundation, tiny_model, tiny_train, write_tar

from repfusion.conditioning.related.query_kontext import QueryKontextConfig
from repfusion.data.source_images import source_member
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.request import Request
from repfusion.runs.checkpoint import check_continues, load_checkpoint, save_checkpoint
from repfusion.runs.folder import complete_checkpoints, step_of
from repfusion.train import train


def model_config(foundation: Path, **fields) -> ModelConfig:
    method = QueryKontextConfig(**{"num_queries": 3, "lora": {"rank": 2}, **fields})
    return tiny_model(foundation, "unifusion").model_copy(update={"conditioning": method})


@pytest.fixture
def first(foundation, statistics, tmp_path) -> Path:
    """A checkpoint of the first training."""
    torch.manual_seed(1)
    model = build_model(model_config(foundation), statistics)
    save_checkpoint(tmp_path / "first" / "step_00000001", model, model.trainable_state(), step=1)
    return tmp_path / "first" / "step_00000001"


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_foundation(tmp_path_factory.mktemp("wider"), text_width=48)


def test_a_second_training_over_another_language_model_is_refused_before_weights_are_read(
    foundation, wider, columns, first, tmp_path
):
    """Its weights would not even fit, but which model was meant is what has to be said."""
    other = model_config(foundation, replaces_dit=True).model_copy(update={"mllm": wider / "llava"})
    config = tiny_train(foundation, columns, tmp_path / "second", init_from=first, model=other.model_dump())
    expected = (
        r"checkpoint .*step_00000001 was trained with mllm weights [0-9a-f]{12}, what is taken of it reads"
    )
    with pytest.raises(ValueError, match=expected):
        train(config)
    assert complete_checkpoints(tmp_path / "second" / "checkpoints") == []
    load_checkpoint(first)  # whole, as it was


def test_the_same_language_model_elsewhere_is_taken(foundation, first, statistics, tmp_path):
    moved = make_foundation(tmp_path / "moved")
    after = model_config(foundation, replaces_dit=True).model_copy(update={"mllm": moved / "llava"})
    check_continues(build_model(after, statistics), first)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def test_a_request_of_more_images_than_the_context_holds_beside_the_queries(foundation, statistics):
    """The queries take their room: so many images that fit without them are refused."""
    image = np.zeros((32, 32, 3), np.uint8)
    few, many = (
        build_model(model_config(foundation, num_queries=n), statistics).conditioner for n in (3, 40)
    )
    request = [Request("a circle", (image,) * 24)]
    assert few.collate(request, ["full"])["chats"].ids.shape[1] <= 128 - 3
    with pytest.raises(
        ValueError, match=r"24 images and the prompt 'a circle' .* leaves 88, where the first 20 images fit"
    ):
        many.collate(request, ["full"])


@pytest.mark.slow
def test_a_sample_of_more_images_than_the_context_holds_is_named(foundation, columns, first, tmp_path):
    samples = [(f"{number:06d}", {"txt": b"a red circle", "png": png(number)}) for number in range(8)]
    samples[3][1].update({source_member(k, "png"): png(k) for k in range(1, 41)})
    write_tar(columns / "curate" / "00000.tar", samples)
    model = model_config(foundation).model_dump()
    config = tiny_train(foundation, columns, tmp_path / "run", init_from=first, model=model)
    with pytest.raises(
        ValueError, match=r"00000\.tar, key 000003: 40 images and the prompt .* images fit: leave"
    ):
        train(config)
    newest = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert step_of(newest) == 2
    load_checkpoint(newest)
