"""A local Ray for the session, small models of the real architectures, workflows of a few dozen scenes."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes, cluster_of_nodes
from running import run_all

from pipelines.config import WorkflowConfig
from pipelines.runtime.pool import ActorPool
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.storage import Folder
from repfusion.config import validate

WORDS = (
    "a photo of picture an image drawing there is are draw one two three four and left right above below "
    "to the on over top under beneath circle square triangle cross diamond circles squares triangles "
    "crosses diamonds red green blue yellow purple cyan"
)
# before Ray starts, so that its workers inherit what the S3 server's clients need
for name, value in {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}.items():
    os.environ[name] = value
BUCKET = "data"


@pytest.fixture(scope="session")
def ray_local():
    with ray_session(RayConfig(num_cpus=2, object_store_mib=80)):
        yield


@pytest.fixture(scope="session")
def pool(ray_local):
    """Actors that stay warm from test to test, so that torch is imported once in each."""
    pool = ActorPool()
    yield pool
    pool.close()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    """A cluster of raylets, so far a head without CPUs."""
    with cluster_of_nodes(monkeypatch, tmp_path.name) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `tower`, `llava` and `decoder`, which fit, as save_pretrained writes them; random weights from
    a fixed seed.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(root / "tower")
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", *dict.fromkeys(WORDS.split())])
    }
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(root / "llava")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=48,
    )
    fast.save_pretrained(root / "llava")
    decoder = RAEDecoderConfig(feature_dim=32, grid=(4, 4), patch_size=8, hidden_size=16, depth=1)
    RAEDecoder(decoder).save_pretrained(root / "decoder")
    return {name: root / name for name in ("tower", "llava", "decoder")}


@pytest.fixture(scope="session")
def configure(models: dict[str, Path]) -> Callable[..., WorkflowConfig]:
    """A workflow of 40 scenes of 32 px in 4 shards, up to the features; keyword arguments replace sections'
    fields.
    """

    def make(root: Path, **sections: Any) -> WorkflowConfig:
        values: dict[str, Any] = {
            "root": root,
            "last_stage": "prompt_features",
            "source": {
                "kind": "scenes",
                "shard_size": 10,
                "num_samples": 40,
                "world": {"image_size": 32},
                "defects": {"missing": 2, "undecodable": 2, "empty_caption": 2},
            },
            "ingest": {"image_size": 32},
            "trainings": {
                "train": {
                    "model": {
                        "encoder": {"path": models["tower"]},
                        "mllm": models["llava"],
                        "decoder": models["decoder"],
                        "conditioning": "text_embed",
                    }
                }
            },
            "ray": {"num_cpus": 2, "object_store_mib": 80},
        }
        for section, fields in sections.items():
            values[section] = _merge(values.get(section), fields)
        return validate(WorkflowConfig, values)

    return make


@pytest.fixture
def make_config(tmp_path: Path, configure: Callable[..., WorkflowConfig]) -> Callable[..., WorkflowConfig]:
    """`configure` with a root under the test's own folder."""
    return lambda root="run", **sections: configure(tmp_path / root, **sections)


@pytest.fixture(scope="session")
def complete_run(
    tmp_path_factory: pytest.TempPathFactory, configure: Callable[..., WorkflowConfig], pool: ActorPool
) -> WorkflowConfig:
    """`configure`'s workflow, run once. Not to be changed."""
    config = configure(tmp_path_factory.mktemp("complete") / "run")
    run_all(config, pool)
    return config


@pytest.fixture
def run_copy(complete_run: WorkflowConfig, tmp_path: Path, configure: Callable[..., WorkflowConfig]):
    """A copy of `complete_run` under the test's own folder, to be changed."""
    shutil.copytree(complete_run.root, tmp_path / "run")
    return configure(tmp_path / "run")


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """Storage options that lead to an S3 server on loopback, with one empty bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **options).mkdir(BUCKET)
    yield options
    server.stop()


@pytest.fixture
def s3_folder(s3_options: dict[str, Any], request: pytest.FixtureRequest) -> Folder:
    """A folder of the bucket that no other test writes to."""
    return Folder(f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}", s3_options)


def _merge(old: Any, new: Any) -> Any:
    """Nested values, those of `new` where both have a key; a section of another kind takes the old one's
    place.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if "kind" in new and new["kind"] != old.get("kind"):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
