"""`repfusion COMMAND`: each command runs its module, which calls itself by that name."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from pipelines import console
from pipelines.arguments import COMMANDS, parse_arguments


def run(monkeypatch, *words: str) -> list[tuple[str, list[str]]]:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: started.append((name, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/repfusion", *words])
    console.main()
    return started


def test_a_workflows_commands_go_to_it(monkeypatch):
    assert run(monkeypatch, "status", "w.yaml", "a=1") == [
        ("pipelines", ["/somewhere/bin/repfusion", "status", "w.yaml", "a=1"])
    ]


@pytest.mark.parametrize("command", console.OWN)
def test_the_other_commands_go_to_their_modules(monkeypatch, command):
    ((module, argv),) = run(monkeypatch, command, "--out", "x.png")
    assert argv == ["/somewhere/bin/repfusion", "--out", "x.png"]
    found = importlib.util.find_spec(module)
    assert found is not None
    main = Path(str(found.origin))
    main = main.with_name("__main__.py") if main.name == "__init__.py" else main
    assert 'if __name__ == "__main__":' in main.read_text()


def test_help_lists_every_command_and_none_is_an_error(monkeypatch, capsys):
    for words, code in (((), 0), (("--help",), 0), (("rnu",), 2)):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *words)
        said = capsys.readouterr().err
        assert stopped.value.code == code
        assert all(f"  {name} " in said for name in [*COMMANDS, *console.OWN])
    assert "error: no command 'rnu'" in said


def test_help_of_a_command_names_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/repfusion"])
    with pytest.raises(SystemExit):
        parse_arguments(["plan", "--help"])
    assert "usage: repfusion plan" in capsys.readouterr().out
