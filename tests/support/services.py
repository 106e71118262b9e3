"""What a cluster uses beside Ray, as processes on loopback: an S3 store, and MLflow's server with passwords
over PostgreSQL.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg2
from postgres import Postgres

from cluster.kinds.processes import ports_of

START_SEC = 600.0


@contextmanager
def serving(
    words: list[str], health: str, log: Path, environment: Mapping[str, str] = {}, folder: Path | None = None
) -> Iterator[None]:
    """A server in a session of its own, from when it answers at an address until the end of the block."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait_for(process, health, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end = time.monotonic() + START_SEC
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise TimeoutError(log.read_text())


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The address of an S3 server without buckets."""
    (port,) = ports_of({"s3": None})
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(words, f"http://127.0.0.1:{port}/moto-api/", log):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def database(password: str) -> Iterator[str]:
    """The address, with its password, of an empty PostgreSQL database, `tracking`; `auth` lies beside it."""
    server = Postgres()
    server.start()
    try:
        with psycopg2.connect(server.url()) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE ROLE tracker LOGIN SUPERUSER PASSWORD '{password}'")
        connection.close()
        for name in ("tracking", "auth"):
            server.create(name)
        (server.data / "pg_hba.conf").write_text(
            "local all postgres trust\nlocal all tracker scram-sha-256\n"
        )
        with psycopg2.connect(server.url()) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_reload_conf()")
        connection.close()
        yield f"postgresql://tracker:{password}@/tracking?host={server.folder}"
    finally:
        server.close()


@contextmanager
def mlflow_server(
    store: str, artifacts: str, s3: str, user: str, password: str, folder: Path
) -> Iterator[str]:
    """The address of MLflow's server with basic auth, as cluster/kinds/kube/mlflow.py deploys it: secrets in
    its environment and one file.
    """
    (port,) = ports_of({"mlflow": None})
    folder.mkdir(mode=0o700)
    auth = store.replace("/tracking?", "/auth?").replace("postgresql://", "postgresql+psycopg2://")
    (folder / "basic_auth.ini").write_text(
        f"[mlflow]\ndefault_permission = EDIT\ndatabase_uri = {auth}\nadmin_username = {user}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        "MLFLOW_BACKEND_STORE_URI": store.replace("postgresql://", "postgresql+psycopg2://"),
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_S3_ENDPOINT_URL": s3,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for forms alone",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    words = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1"]
    with serving(words, f"http://127.0.0.1:{port}/health", folder / "log", environment, folder):
        yield f"http://127.0.0.1:{port}"
