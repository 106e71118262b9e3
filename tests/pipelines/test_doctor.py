"""The doctor says what is there, what is wrong and what to do, and ends with 1 where something is wrong."""

import socket
import sys

import pytest

from pipelines import doctor


def looked(checks) -> dict[str, doctor.Check]:
    return {one.name: one for one in checks}


def test_this_machine_is_fit_for_its_tests(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    assert doctor.main() == 0
    said = capsys.readouterr().out
    names = {line.split("  ")[0] for line in said.splitlines()}
    assert names >= {"python", "compiler", "packages", "cores", "memory", "/dev/shm", "tokens", "runs"}
    assert said.endswith("ready\n") and "HF_TOKEN" in said and "hf_planted" not in said


def test_a_version_that_is_not_the_locks_is_named(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==0.1\nno-such-thing==2.0\n")
    (check,) = doctor.check_packages(lock)
    assert check.verdict == "note" and "2 of 2 differ: torch " in check.found
    assert "the lock has 0.1" in check.found and "no-such-thing none" in check.found
    (check,) = doctor.check_packages(tmp_path / "none")
    assert "versions are not compared" in check.found


def test_a_port_that_is_taken_is_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "a test"})
        assert looked(doctor.check_ports())[f"port {port}"].found == "taken; a test"
    assert looked(doctor.check_ports())[f"port {port}"].verdict == "ok"


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None)])
def test_the_control_groups_limit_counts(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor.cpu_quota(tmp_path / "cpu.max") == cores


def test_a_file_system_is_that_of_the_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw 0 0\nb /mnt/shared nfs4 rw 0 0\nc /mnt ext4 rw 0 0\n")
    assert doctor.file_system(doctor.Path("/mnt/shared/runs"), mounts) == "nfs4"
    assert doctor.file_system(doctor.Path("/mnt/sharedelse"), mounts) == "ext4"


def test_a_place_that_cannot_be_written_is_wrong(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    (fine,) = doctor.check_place("root", tmp_path / "new" / "run")
    assert fine.verdict in ("ok", "note") and str(tmp_path) in fine.found
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    (check,) = doctor.check_place("root", tmp_path / "new" / "run")
    assert check.verdict == "wrong" and check.found.startswith(f"{tmp_path}: Permission denied")


def test_the_places_of_a_workflow_are_looked_at(tmp_path, monkeypatch, capsys):
    config = tmp_path / "w.yaml"
    config.write_text(f"root: {tmp_path / 'run'}\ntrainings: {{train: {{model: {{mllm: /no/such}}}}}}\n")
    monkeypatch.setattr(sys, "argv", ["doctor", str(config)])
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "/no/such is no folder" in said and said.splitlines()[-1].startswith(
        "to mend: trainings.train.model.mllm"
    )
    monkeypatch.setattr(sys, "argv", ["doctor", str(tmp_path / "none.yaml")])
    assert doctor.main() == 1 and "no such config file" in capsys.readouterr().err
