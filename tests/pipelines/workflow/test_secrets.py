"""Secrets of twelve forms in a workflow's configuration, two of them in use: none is found in what a run
writes, says, tracks, draws or starts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import yaml
from killing import run_command, tagged, tagged_process
from postgres import Postgres

from repfusion.runs.folder import complete_checkpoints
from repfusion.tracking import metric_history

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECRETS = [f"Zq7{number:02d}secretXk" for number in range(12)]
ROOT = Path(__file__).resolve().parents[3]
LIMIT_SEC = 400


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Lets the user `tracked` in by the first of the secrets alone."""
    server = Postgres()
    server.start()
    with psycopg2.connect(server.url()) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE tracked LOGIN SUPERUSER PASSWORD '{SECRETS[0]}'")
        (server.data / "pg_hba.conf").write_text(
            "local all postgres trust\nlocal all tracked scram-sha-256\n"
        )
        cursor.execute("SELECT pg_reload_conf()")
    connection.close()
    yield server
    server.close()


def planted(root: Path) -> dict:
    """A workflow of a few scenes, and a secret in every form; the environment has those of
    `environment_of`.
    """
    s = SECRETS
    engine = {"precision": "fp32", "micro_batch_size": 4, "num_threads": 1, "warmup_steps": 1}
    training = {
        "model": {"dit": {"hidden_size": 64, "depth": 1, "num_heads": 2}},
        "engine": engine,
        **{"global_batch_size": 8, "num_steps": 2, "checkpoint_every_steps": 2, "log_every_steps": 1},
        "num_workers": 2,
        "tracking": {"uri": "${oc.env:PLANTED_DSN}", "artifacts": str(root.parent / "artifacts")},
    }
    return {
        "root": str(root),
        "source": {"kind": "scenes", "num_samples": 24, "shard_size": 12},
        "trainings": {"train": training},
        "evaluate": {"suites": {"scenes": {"num_prompts": 6}}, "sampler": {"num_steps": 1}, "batch_size": 6},
        "ray": {"num_cpus": 2, "object_store_mib": 80},
        "storage_options": {
            "token": "${oc.env:PLANTED_TOKEN}",
            "key": s[2],
            "secret": s[3],
            "password": s[4],
            "client_kwargs": {
                "headers": {"Authorization": f"Bearer {s[5]}"},
                "mirrors": [f"postgresql://me:a@/ {s[6]}@host/db"],
                "list": f"https://host/l.csv?password={s[7]}&page=2",
                "other": f"https://host/l.csv?api_key={s[8]}#top",
                "dsn": f"host=h user=me password='a {s[9]}' dbname=d",
                "sas": f"https://account.blob.core.windows.net/c?sv=2024&sig={s[10]}",
                "environment": f"AWS_SECRET_ACCESS_KEY={s[11]}",
            },
        },
    }


def environment_of(postgres: Postgres, database: str, password: str = SECRETS[0]) -> dict[str, str]:
    dsn = f"postgresql://tracked:{password}@/{database}?host={postgres.folder}"
    return {"PLANTED_DSN": dsn, "PLANTED_TOKEN": SECRETS[1]}


def leaks(text: bytes | str) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in SECRETS if secret.encode() in data]


def leaky_files(folder: Path) -> dict[str, list[str]]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): found for path in files if (found := leaks(path.read_bytes()))}


def stored_rows(dsn: str) -> str:
    """Every row of every table of a database."""
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        rows = []
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT "{table}"::text FROM "{table}"')
            rows += [f"{table} {row}" for (row,) in cursor.fetchall()]
    connection.close()
    return "\n".join(rows)


def test_planted_secrets_are_found_nowhere(postgres: Postgres, tmp_path: Path):
    postgres.create("planted")
    root, path, log = tmp_path / "out" / "run", tmp_path / "workflow.yaml", tmp_path / "log"
    path.write_text(yaml.safe_dump(planted(root)))
    secret = environment_of(postgres, "planted")
    commands: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session:
        environment = {**secret, "RAY_TMPDIR": session}
        with tagged_process(run_command(path), f"planted-{tmp_path.name}", log, environment) as process:
            start = time.monotonic()
            while process.poll() is None:
                commands |= {" ".join(words) for words in tagged(f"planted-{tmp_path.name}").values()}
                assert time.monotonic() - start < LIMIT_SEC, log.read_text()
                time.sleep(0.2)
        assert process.returncode == 0, log.read_text()
        assert leaky_files(Path(session)) == {}
    assert len(commands) > 5 and not leaks("\n".join(commands))
    (checkpoint,) = complete_checkpoints(root / "train" / "checkpoints")

    assert "${oc.env:PLANTED_DSN}" in (root / "train" / "config.json").read_text()

    # whoever has to log in did so
    rows = stored_rows(secret["PLANTED_DSN"])
    assert "eval/overall" in rows and "train/loss" in rows and "${oc.env:PLANTED_DSN}" in rows
    assert "The run was not tracked" not in (root / "report.html").read_text()
    run_id = yaml.safe_load((root / "train" / "train.json").read_text())["run_id"]
    assert [step for step, _ in metric_history(secret["PLANTED_DSN"], run_id, "train/loss")] == [1, 2]

    # from the folder alone: an image, its lineage, and what the configuration says
    def said(*arguments: object, **environment: str) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    drawn, wrong = tmp_path / "out" / "x.png", f"trainings.train.num_steps=s3://a:{SECRETS[2]}@b"
    outputs = [
        said(
            "repfusion.generate",
            "--checkpoint",
            checkpoint,
            "--prompt",
            "a",
            "--out",
            drawn,
            "--num-steps",
            1,
        ),
        said("repfusion.lineage", drawn),
        said("pipelines", "run", path, "--dry-run", **secret),
        said("pipelines", "run", path, wrong, "trainings.train.tracking.token=1", **secret),
        said(
            "pipelines", "run", path, "trainings.train.seed=1", **environment_of(postgres, "planted", "wrong")
        ),
    ]
    assert drawn.is_file() and "PLANTED_DSN" in outputs[2] and "num_steps: Input should" in outputs[3]
    assert "error: " in outputs[4] and "authentication failed" in outputs[4] and "wrong@" not in outputs[4]
    assert [leaks(output) for output in outputs] == [[]] * len(outputs)

    assert leaky_files(tmp_path / "out") == {} and not leaks(log.read_text()) and not leaks(rows)
    assert (root / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert "${oc.env:PLANTED_DSN}" in (root / "config.yaml").read_text()
