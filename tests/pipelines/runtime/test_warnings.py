"""What rank 0 has to say reaches whoever started the ranks, whose own output is not shown."""

from pathlib import Path

from pipelines.runtime.ranks import Warnings
from repfusion.runs.folder import RunFolder


def test_each_warning_is_shown_once(tmp_path: Path, capsys):
    path = RunFolder(tmp_path).warnings
    path.write_text("of a run before\n")
    warnings = Warnings(tmp_path)
    warnings.show()
    path.write_text("step_00000004: model.safetensors is missing\n")
    warnings.show()
    with path.open("a") as file:
        file.write("another\n")
    warnings.show()
    warnings.show()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "train: warning: step_00000004: model.safetensors is missing",
        "train: warning: another",
    ]
