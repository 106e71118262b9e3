"""The fuzzer finds what it is for, and finds nothing in the readers."""

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.drive import attempt, drive
from tests.fuzz.targets import TARGETS, Target

CASES = sorted((Path(__file__).parent / "cases").glob("*.bin"))
HELD = []


def misbehave(data: bytes, scratch: Path) -> None:
    match data:
        case b"silent":
            raise ValueError("")
        case b"foreign":
            raise KeyError("what a user cannot read")
        case b"open":
            HELD.append(open("/dev/null"))
        case b"refused":
            raise ValueError("x.tar: not a tar; replace it")


def test_what_an_input_may_not_do(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "test", Target(lambda random: b"", misbehave))
    found = {
        word: attempt("test", word.encode(), tmp_path)
        for word in ("", "refused", "silent", "foreign", "open")
    }
    assert found[""] is None and found["refused"] is None
    assert "an error without a text: ValueError" in (found["silent"] or "")
    assert "KeyError: 'what a user cannot read'" in (found["foreign"] or "")
    assert found["open"] == "left 1 files open"
    HELD.pop().close()


@pytest.mark.slow
def test_an_input_that_ends_its_process_is_kept(tmp_path):
    found = drive([], 0, 120.0, tmp_path, max_findings=1)
    assert found.findings and "the process ended with status 1" in found.findings[0].text
    assert found.findings[0].path.exists()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_what_was_found_once_is_mended(path: Path, tmp_path):
    assert attempt(path.name.partition("-")[0], path.read_bytes(), tmp_path) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_few_inputs_for_each_reader(name: str, tmp_path):
    for number in range(6):
        data = TARGETS[name].make(Random(f"few/{number}"))
        assert attempt(name, data, tmp_path / "scratch") is None, f"input {number}"


@pytest.mark.slow
def test_two_minutes_of_inputs(tmp_path):
    found = drive(sorted(TARGETS), 0, 120.0, tmp_path)
    assert not found.findings, "\n".join(f"{one.path}: {one.text}" for one in found.findings)
    assert min(found.tried[name] for name in TARGETS) > 20
