"""`python -m pipelines`: what each command prints, and its exit status."""

import sys

import pytest

from pipelines.commands import main
from pipelines.config import WorkflowConfig
from pipelines.shards.storage import Folder
from repfusion.config import load_config, to_yaml

pytestmark = pytest.mark.ray


@pytest.fixture
def command(run_copy, tmp_path, monkeypatch, capsys):
    """Runs a command on a copy of a complete workflow; returns its exit status, stdout and stderr."""
    (tmp_path / "w.yaml").write_text(to_yaml(run_copy))

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", name, str(tmp_path / "w.yaml"), *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call


def test_status_is_a_line_per_stage(command):
    code, out, _ = command("status")
    assert code == 0 and out.splitlines() == [
        "source          fresh    4 shards, 40 samples",
        "ingest          fresh    4 shards, 36 samples, dropped: http_404 2, undecodable_image 2",
        "judge           fresh    4 shards, 36 samples",
        "curate          fresh    4 shards, 34 samples, dropped: empty_caption 2",
        "image_features  fresh    4 shards, 34 samples",
        "prompt_features fresh    4 shards, 34 samples",
    ]
    code, out, _ = command("status", "trainings.train.model.encoder.layer=-1")
    assert (
        code == 0
        and out.splitlines()[4] == "image_features  stale    columns.image_features.encoder.layer -2 -> -1"
    )


def test_a_run_with_nothing_to_do_starts_no_ray(command, run_copy):
    Folder.at(run_copy.root).write("summary.json", b"{}")
    code, out, _ = command("run")
    assert code == 0 and "nothing to do: all 6 stages are fresh" in out


def test_a_plan_is_a_table_and_options_stand_anywhere(command):
    for arguments in (
        ("--rate", "image_features=5", "columns.image_features.batch_size=2"),
        ("columns.image_features.batch_size=2", "--probe", "8"),
    ):
        code, out, _ = command("plan", *arguments)
        assert code == 0 and [line.split()[0] for line in out.splitlines()][-1] == "total"
    code, _, err = command("plan", "--rate", "image_features=x")
    assert code == 1 and err.startswith("error: --rate image_features=x: expected STAGE=SAMPLES_PER_SEC")


def test_garbage_is_of_all_workflows_given(command, run_copy, tmp_path):
    short = tmp_path / "short.yaml"
    short.write_text(to_yaml(run_copy.model_copy(update={"last_stage": "curate"})))
    code, out, _ = command("gc", "--and", str(short))
    assert (code, out) == (0, "nothing to collect\n")
    code, out, _ = command("gc", "last_stage=image_features")
    assert code == 0 and f"{run_copy.root}/prompt_features" in out and "run again with --delete" in out
    assert (run_copy.root / "prompt_features" / "manifest.json").is_file()
    code, out, _ = command("gc", "last_stage=image_features", "--delete")
    assert code == 0 and out.splitlines()[-1].startswith("removed 1 of 1 items")
    assert not (run_copy.root / "prompt_features").exists()


def test_retry_says_when_there_is_nothing_to_retry(command):
    code, out, _ = command("retry")
    assert (code, out) == (0, "nothing to retry; ingest dropped: http_404 2, undecodable_image 2\n")


def test_a_dry_run_prints_what_loads_again(command, run_copy, tmp_path):
    code, out, _ = command("run", "--dry-run", "columns.image_features.batch_size=3")
    (tmp_path / "again.yaml").write_text(out)
    assert (
        code == 0
        and load_config(WorkflowConfig, tmp_path / "again.yaml").columns["image_features"].batch_size == 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["columns.image_features.batch=3"], "did you mean 'columns.image_features.batch_size'?"),
        (["trainings.train.model.mllm=/no/such"], "trainings.train.model.mllm: /no/such is no folder"),
        (["data_url=s3://bucket/*"], "a URL of a folder may not hold *"),
        (["data_url=nothing://bucket/x"], "nothing"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(command, arguments, message):
    code, _, err = command("status", *arguments)
    assert code == 1 and err.startswith("error: ") and message in err and "Traceback" not in err


def test_an_unknown_command_is_refused(command):
    with pytest.raises(SystemExit) as stop:
        command("rnu")
    assert stop.value.code == 2
