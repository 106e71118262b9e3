"""`python -m repfusion.tracking`: which store is shown, and the page on which its link lands."""

import os
import socket
import sys

import pytest

from repfusion.tracking import Tracker, TrackingConfig, newest_experiment, sqlite_uri
from repfusion.tracking import __main__ as command


@pytest.fixture
def store(tmp_path) -> str:
    """With two experiments; the newest run is of `second`."""
    uri = sqlite_uri(tmp_path / "runs" / "mlflow.db")
    for name in ("first", "second"):
        tracker = Tracker(TrackingConfig(uri=uri, experiment=name))
        tracker.finish()
    return uri


def test_a_root_and_the_environment_say_which_store(store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs" / "my").mkdir()
    for root in (tmp_path / "runs", tmp_path / "runs" / "my"):
        assert command.store_of(root).endswith("runs/mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert command.store_of(None) == "sqlite:///runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert command.store_of(None) == "http://tracking:5000"
    assert command.store_of(tmp_path / "runs").endswith("mlflow.db")  # asked for by name
    with pytest.raises(ValueError, match="no tracked run yet: neither "):
        command.store_of(tmp_path / "runs" / "my" / "deep")


def test_the_link_lands_on_the_newest_runs_with_their_charts(store):
    experiment = newest_experiment(store)
    link = command.link_to("http://127.0.0.1:5000", experiment)
    assert link == f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning"
    from mlflow import MlflowClient

    assert MlflowClient(store).get_experiment(experiment).name == "second"


def test_the_server_is_quiet_and_of_this_machine_alone(store, tmp_path, monkeypatch, capsys):
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, environment: started.append((words, environment)))
    monkeypatch.setattr(sys, "argv", ["tracking", "--root", str(tmp_path / "runs"), "--port", "0"])
    command.main()
    ((words, environment),) = started
    assert words[words.index("--host") + 1] == "127.0.0.1" and "mlflow.db" in " ".join(words)
    assert (environment["MLFLOW_DISABLE_TELEMETRY"], environment["DO_NOT_TRACK"]) == ("true", "1")
    assert "workflowType=machine_learning" in capsys.readouterr().out


def test_a_taken_port_is_an_error_that_names_another(store, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["tracking", "--root", str(tmp_path / "runs"), "--port", str(port)])
        with pytest.raises(SystemExit, match=f"error: port {port} is taken .* PORT={port + 1}"):
            command.main()
