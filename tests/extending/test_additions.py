"""docs/extending.md is kept true: each of its examples is a patch that is applied to a copy of the code and
tried there; the page's table holds how many files each touches.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATCHES = sorted(HERE.glob("*.patch"))
PAGE = ROOT / "docs" / "extending.md"
EXPECTED = {"method": 2, "denoiser_block": 2, "model_family": 2, "source": 2, "stage": 3, "suite": 2}
"""Files that an addition touches."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with every example applied; the weights are the checkout's own."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("repfusion", "pipelines", "tests/support"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for weights in (ROOT / "repfusion" / "weights").rglob("*.safetensors"):
        (tree / weights.relative_to(ROOT)).symlink_to(weights)
    for patch in PATCHES:
        done = subprocess.run(
            ["git", "apply", str(patch)], cwd=tree, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{patch.name} does not apply any more: {done.stderr}"
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("tries", ["try_library.py", "try_workflow.py"])
def test_the_examples_do_what_they_say(tree: Path, tries: str):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-c", os.devnull, "--rootdir", str(tree)]
    command += ["-o", "python_files=try_*.py", "-o", "python_functions=try_*", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", str(HERE / "tries" / tries)]
    path = os.pathsep.join(map(str, (tree, tree / "tests" / "support")))
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def files_of(patch: Path) -> list[str]:
    """Paths that a patch touches, as git counts them."""
    command = ["git", "apply", "--numstat", str(patch)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line.split("\t")[2] for line in listed.splitlines()]


def test_each_addition_touches_as_many_files_as_the_page_says():
    touched = {patch.stem: files_of(patch) for patch in PATCHES}
    assert {name: len(files) for name, files in touched.items()} == EXPECTED
    rows = re.findall(r"^\| \[(\w+)\]\([^)]*\) \| (\d) \| (.*?) \|$", PAGE.read_text(), re.M)
    assert {name: int(number) for name, number, _ in rows} == EXPECTED
    for name, _, files in rows:
        assert re.findall(r"`([\w/]+\.py)`", files) == touched[name], f"docs/extending.md, {name}"
