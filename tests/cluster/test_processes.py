"""Processes with a mark are found whatever they are just doing."""

from pathlib import Path

from cluster.kinds import processes


def test_a_process_that_becomes_another_program_is_alive_all_the_while(tmp_path: Path):
    """A script that runs itself anew in its own place, each time without variables for a moment, until it has
    been looked at often enough.
    """
    script, enough = tmp_path / "again", tmp_path / "enough"
    script.write_text(f'#!/bin/sh\n[ -e "{enough}" ] && exec sleep 600\nexec "$0"\n')
    script.chmod(0o755)
    mark = f"test-{tmp_path.name}"
    pid = processes.start([str(script)], {processes.MARK: mark, "PATH": "/usr/bin:/bin"}, tmp_path / "log")
    try:
        for look in range(40):
            assert pid in processes.marked(mark), f"not seen at look {look}"
        enough.touch()
        while "sleep" not in processes.marked(mark)[pid]:
            pass
    finally:
        assert list(processes.end_rest(mark)) == [pid]
    assert processes.marked(mark) == {}
