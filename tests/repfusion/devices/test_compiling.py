"""What cannot be compiled runs as it is, with a warning; what is compiled is counted."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repfusion.devices.compiling import Compilation, RecompilationWatch, missing_for

CODE = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from repfusion.devices.compiling import compilation_for
made = compilation_for("cpu", "the layers", "It is slower so")
function = made(lambda x: (x.sin() + 1).sum())
x = torch.linspace(0, 1, 7, requires_grad=True)
y = function(x)
y.backward()
print(torch.allclose(y, (x.sin() + 1).sum()), torch.allclose(x.grad, x.cos()), made.num_graphs, made.failure)
"""


def said_by(code: str, **environment: str) -> tuple[str, str]:
    """Standard output and error of a fresh interpreter, which has searched for no compiler yet."""
    path = os.pathsep.join(filter(None, sys.path))
    everything = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=True, timeout=400
    )
    return done.stdout, done.stderr


@pytest.mark.slow
def test_without_a_compiler_it_runs_as_it_is_and_says_what_that_costs(tmp_path: Path):
    said, warned = said_by(CODE, PATH=str(tmp_path), CXX="g++")
    assert said.split() == ["True", "True", "0", *"no C++ compiler (Debian: g++)".split()]
    assert "the layers cannot be compiled and runs as it is: no C++ compiler" in warned
    assert "It is slower so" in warned


@pytest.mark.slow
def test_with_one_it_is_compiled(tmp_path: Path):
    said, warned = said_by(CODE, TORCHINDUCTOR_COMPILE_THREADS="1")
    assert said.split() == ["True", "True", "1", "None"] and "cannot be compiled" not in warned


def test_a_header_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert missing_for("cpu") == missing_for("cuda") == f"no {tmp_path}/Python.h (Debian: python3-dev)"


def test_a_failure_to_compile_is_said_once_and_ends_compiling(caplog: pytest.LogCaptureFixture):
    made = Compilation("the layers", "It is slower so", options={"no such option": 1})
    first, second = made(lambda x: x + 1), made(lambda x: x * 2)
    with caplog.at_level(logging.WARNING, "repfusion.devices.compiling"):
        x = torch.ones(3)
        assert first(x).tolist() == second(x).tolist() == [2.0] * 3
        assert first(x).tolist() == [2.0] * 3
    assert made.failure is not None
    (record,) = (one for one in caplog.records if one.name == "repfusion.devices.compiling")
    assert "no such option" in record.getMessage() and "It is slower so" in record.getMessage()


def test_errors_of_the_function_itself_are_its_own():
    made = Compilation("the layers", "")

    def wrong(x):
        raise ValueError("of the function")

    with pytest.raises(ValueError, match="of the function"):
        made(wrong)(torch.ones(2))


def test_what_is_compiled_after_the_warm_up_is_counted_and_warned_of(caplog: pytest.LogCaptureFixture):
    compilation = Compilation("the layers", "")
    watch, told = RecompilationWatch(compilation, warmup=3), []
    for new in (2, 1, 0, 0, 1, 0, 2):
        compilation.num_graphs += new
        watch.step()
        with caplog.at_level(logging.WARNING, "repfusion.devices.compiling"):
            watch.report()
        told.append(watch.num_recompilations)
    assert told == [0, 0, 0, 0, 1, 1, 3]
    assert [record.args[0] for record in caplog.records] == [1, 2]
    assert RecompilationWatch(None).num_recompilations == 0
