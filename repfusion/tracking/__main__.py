"""`python -m repfusion.tracking [--root ROOT]`: MLflow's page of tracked runs, on this machine alone."""

import argparse
import os
import socket
import sys
from pathlib import Path

from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.tracking.store import StoreError, newest_experiment, sqlite_path, sqlite_uri, with_driver

DATABASE = "mlflow.db"
RUNS = "experiments/{}/runs?workflowType=machine_learning"
"""MLflow's page of an experiment's runs with their charts; without the last word it opens one for agents."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
"""Neither the server nor the page that it serves sends anything anywhere."""


def store_of(root: Path | None) -> str:
    """The address of the tracked runs: of a root's database, in it or beside it; else MLFLOW_TRACKING_URI, or
    runs/mlflow.db.

    Raises:
        ValueError: there is no database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if root is None and uri:
        return uri
    root = Path("runs") if root is None else root
    places = [root / DATABASE, root.resolve().parent / DATABASE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"no tracked run yet: neither {places[0]} nor {places[1]} exists; 'make demo' makes one, and "
            "ROOT=... names another workflow's root"
        )
    return sqlite_uri(found)


def link_to(server: str, experiment: str | None) -> str:
    """The page of an experiment's runs on a server."""
    return f"{server.rstrip('/')}/#/" + (RUNS.format(experiment) if experiment else "")


def server_command(uri: str, port: int) -> list[str]:
    """What serves the runs of a database.

    Raises:
        ValueError: the port is taken.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise ValueError(
            f"port {port} is taken ({error.strerror}); choose another: PORT={port + 1}"
        ) from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", with_driver(uri)]
    if (database := sqlite_path(uri)) is not None:
        artifacts = (database.parent / "mlartifacts").resolve()
        command += ["--default-artifact-root", artifacts.as_uri()]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.tracking", description=__doc__)
    parser.add_argument("--root", type=Path, help="a workflow's root, or the folder that holds mlflow.db")
    parser.add_argument("--port", type=int, default=5000)
    args = parser.parse_args()
    try:
        uri = store_of(args.root)
        experiment = newest_experiment(uri)
        if uri.startswith(("http://", "https://")):
            print(printable_lines(redact_text(f"MLflow is at {link_to(uri, experiment)}")))
            return
        command = server_command(uri, args.port)
    except (ValueError, StoreError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    print(f"MLflow on {link_to(f'http://127.0.0.1:{args.port}', experiment)} (stop with Ctrl-C)", flush=True)
    os.execve(sys.executable, command, {**os.environ, **QUIET})


if __name__ == "__main__":
    main()
