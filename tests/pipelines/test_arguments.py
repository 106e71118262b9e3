"""The command line of `pipelines`: each command has its own options and help; options stand anywhere."""

from pathlib import Path

import pytest

from pipelines.arguments import COMMANDS, parse_arguments

OWN = {
    "plan": "--rate",
    "verify": "--report-only",
    "retry": "--reason",
    "evaluate": "--step",
    "gc": "--trainings",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"usage: python -m pipelines {command}" in said
    assert {name for name, option in OWN.items() if option in said} == {command} & OWN.keys()


def test_help_lists_the_commands_and_none_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"\n{name} " in said for name in COMMANDS)
    for words in ([], ["rnu", "w.yaml"]):
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(words)
        assert stopped.value.code == 2


def test_options_stand_between_and_after_overrides():
    args = parse_arguments(["plan", "w.yaml", "a=1", "--probe", "8", "b=2", "--dry-run"])
    assert (args.command, args.config, args.overrides) == ("plan", Path("w.yaml"), ["a=1", "b=2"])
    assert args.probe == 8 and args.dry_run


def test_an_option_of_another_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["run", "w.yaml", "--delete"])
    assert "--delete" in capsys.readouterr().err


def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["plan", "--help"])
    assert "(default: 128)" in capsys.readouterr().out
