"""What `pip install .` brings: packages, data, console script, license; and no name that another has."""

import glob
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"repfusion", "pipelines"}


def test_both_packages_and_all_that_they_read_are_installed():
    setuptools = PROJECT["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=setuptools["packages"]["find"]["include"])
    assert {name.split(".")[0] for name in found} == OURS
    folders = {path.parent for package in OURS for path in (ROOT / package).rglob("*.py")}
    assert {str(path.relative_to(ROOT)).replace("/", ".") for path in folders} == set(found)
    data = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in map(Path, glob.glob(str(ROOT / package / pattern), recursive=True))  # as setuptools does
    }
    read = [path for package in OURS for path in (ROOT / package).rglob("*.yaml")]
    assert not [path for path in read if path not in data]
    assert ROOT / "repfusion/weights/base/ema.safetensors" in data


def test_the_console_script_and_the_license_are_named():
    module, _, function = PROJECT["project"]["scripts"]["repfusion"].partition(":")
    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


def test_no_other_distribution_has_our_names():
    owners = metadata.packages_distributions()
    for name in OURS:
        assert set(owners.get(name, ["repfusion"])) <= {"repfusion"}, f"{name} is of {owners[name]} too"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_lead_to_files_that_are_there(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_is_short_and_begins_with_two_commands():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 120
    block = re.search(r"((?:^    .+\n)+)", text, re.M)
    assert block is not None
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]
