"""Processes with a mark are found whatever they are just doing."""

from pathlib import Path

from cluster.kinds import processes


def test_a_process_that_becomes_another_program_is_alive_all_the_while(tmp_path: Path):
    """A script that runs itself anew 300 times in its own place, each time without variables for a moment."""
    script = tmp_path / "again"
    script.write_text('#!/bin/sh\n[ "$1" = 300 ] && exec sleep 600\nexec "$0" $(($1 + 1))\n')
    script.chmod(0o755)
    mark = f"test-{tmp_path.name}"
    pid = processes.start(
        [str(script), "0"], {processes.MARK: mark, "PATH": "/usr/bin:/bin"}, tmp_path / "log"
    )
    try:
        seen = [processes.marked(mark)]
        while "sleep" not in seen[-1].get(pid, ""):
            seen.append(processes.marked(mark))
            assert pid in seen[-1], f"not seen after {len(seen)} looks"
        assert len(seen) > 10
    finally:
        assert list(processes.end_rest(mark)) == [pid]
    assert processes.marked(mark) == {}
