"""What README's first page promises, done as it says, by the words that it says it in: its snippet and its
command draw what they are asked for.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repfusion.scenes.detector import detect
from repfusion.scenes.world import Thing

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SIDE_PX = 64
"""Side of what the shipped model draws; a saved grid shows it larger."""
FIRST_PICTURE_CPU_SEC = 60.0


def snippet() -> str:
    found = re.search(r"```python\n(.*?)```", README, re.S)
    assert found is not None
    return found[1]


def shell_line() -> list[str]:
    (line,) = re.findall(r"^    \.venv/bin/repfusion generate (--prompt .*x\.png)$", README, re.M)
    return shlex.split(line)


def things_of(image: Image.Image) -> list[Thing]:
    small = np.asarray(image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX))
    return detect(small.astype(np.float32).transpose(2, 0, 1) / 255)


def run(command: list[str], folder: Path) -> float:
    """Runs where the files are that README names; returns CPU seconds."""
    before = os.times()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repfusion").mkdir()
    (tmp_path / "repfusion/weights").symlink_to(ROOT / "repfusion/weights")
    return tmp_path


@pytest.mark.slow
def test_the_five_lines_of_python_draw_what_they_say_within_a_minute(folder: Path):
    assert "a red circle left of a blue square" in snippet()
    seconds = run([sys.executable, "-c", snippet()], folder)
    assert seconds < FIRST_PICTURE_CPU_SEC
    with Image.open(folder / "x.png") as image:
        first, second = sorted(things_of(image), key=lambda thing: thing.x)
    assert (first.colour, first.shape) == ("red", "circle")
    assert (second.colour, second.shape) == ("blue", "square")
    assert second.x - first.x > abs(second.y - first.y)


@pytest.mark.slow
def test_the_command_draws_a_row_for_each_prompt_and_a_column_for_each_seed(folder: Path):
    words = shell_line()
    prompts = [words[at + 1] for at, word in enumerate(words) if word == "--prompt"]
    assert prompts == ["a red circle", "two green squares"] and words[words.index("--num-images") + 1] == "4"
    run([sys.executable, "-m", "repfusion.generate", *words], folder)
    with Image.open(folder / "x.png") as grid:
        side = grid.width // 4
        assert grid.size == (4 * side, 2 * side)
        corners = [(column * side, row * side) for row in range(2) for column in range(4)]
        tiles = [grid.crop((left, top, left + side, top + side)) for left, top in corners]
    looks = [[(thing.colour, thing.shape) for thing in things_of(tile)] for tile in tiles]
    assert looks[:4] == [[("red", "circle")]] * 4
    assert looks[4:] == [[("green", "square")] * 2] * 4
