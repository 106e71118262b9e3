"""A root of any name and spelling: one run folder, one MLflow database, one lock."""

import json
from pathlib import Path

import pytest
from running import found, run_all

from pipelines.config import WorkflowConfig
from pipelines.workflow.locks import locked_roots
from repfusion.config import load_config, to_yaml, validate
from repfusion.runs.folder import complete_checkpoints
from repfusion.tracking import metric_history, sqlite_path, sqlite_uri, store_identity
from repfusion.train import remembered_run

NAME = "a b?c#d%20e[1]*"


@pytest.mark.parametrize("name", [NAME, "plain", "%", "a%2Fb", "ü ñ", "x?y=1&z#q", "sqlite:", "[a-z]"])
def test_an_address_of_a_file_leads_to_that_file(tmp_path: Path, name: str):
    from sqlalchemy import make_url

    path = tmp_path / name / "mlflow.db"
    uri = sqlite_uri(path)
    assert sqlite_path(uri) == path and make_url(uri).database == str(path) and not make_url(uri).query
    relative = sqlite_uri(Path("runs") / name / "m.db")
    assert sqlite_path(relative) == Path("runs") / name / "m.db"
    assert make_url(relative).database == f"runs/{name}/m.db"


def test_a_root_that_is_spelled_otherwise_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "runs" / "x"
    root.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    spellings = ["runs/x", "./runs/x/", "runs/../runs/x", str(root), "elsewhere/link"]
    configs = [validate(WorkflowConfig, {"root": spelling}) for spelling in spellings]
    monkeypatch.chdir(root)
    configs.append(validate(WorkflowConfig, {"root": "."}))
    here = [Path.cwd() if config is configs[-1] else tmp_path for config in configs]
    names, stores = set(), set()
    for config, folder in zip(configs, here, strict=True):
        monkeypatch.chdir(folder)
        tracking = config.training("train").tracking
        assert tracking.uri is not None
        names.add(tracking.run_name)
        stores.add(store_identity(tracking.uri))
        with locked_roots(config.root), pytest.raises(ValueError, match="another run is at work here"):
            with locked_roots(root):
                pass
    assert names == {"x"} and len(stores) == 1
    assert stores == {store_identity(sqlite_uri(tmp_path / "runs" / "mlflow.db"))}


def test_data_in_a_root_of_any_name(configure, pool, tmp_path: Path):
    """Every stage of the data, then again through a link: nothing is left to do, and nothing lies
    elsewhere.
    """
    root = tmp_path / NAME / NAME
    config = configure(root, last_stage="image_features")
    run_all(config, pool)
    assert {path.name for path in tmp_path.iterdir()} == {NAME}
    (tmp_path / "link").symlink_to(root)
    linked = configure(tmp_path / "link", last_stage="image_features")
    assert {state.status for state in found(linked).values()} == {"fresh"}
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config))
    assert load_config(WorkflowConfig, path) == config


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_in_a_root_of_any_name(configure, models, pool, tmp_path: Path):
    root = tmp_path / NAME / "run"
    model = {
        "encoder": {"path": models["tower"]},
        "mllm": models["llava"],
        "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2},
        "conditioning": "noisy_latents",
    }
    training = {
        "model": model,
        "engine": {"precision": "fp32", "micro_batch_size": 8, "num_threads": 1, "warmup_steps": 1},
        **{"global_batch_size": 8, "num_steps": 2, "checkpoint_every_steps": 2, "log_every_steps": 1},
        "num_workers": 1,
    }
    config = configure(root, last_stage="train", trainings={"train": training})
    run_all(config, pool)
    (checkpoint,) = complete_checkpoints(root / "train" / "checkpoints")
    told = json.loads((root / "train" / "train.json").read_text())
    assert told["checkpoint"] == str(checkpoint)
    assert [step for step, _ in metric_history(told["tracking_uri"], told["run_id"], "train/loss")] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {NAME}
    assert {path.name for path in (tmp_path / NAME).iterdir() if not path.name.startswith(".")} == {
        *("mlflow.db", "mlartifacts", "run")
    }
    # through a link a resumed training goes on in the same run
    (tmp_path / "link").symlink_to(root)
    linked = configure(tmp_path / "link", last_stage="train", trainings={"train": training})
    assert {state.status for state in found(linked).values()} == {"fresh"}
    assert remembered_run(linked.training("train")).run_id == told["run_id"]
