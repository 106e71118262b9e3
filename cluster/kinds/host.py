"""`python -m cluster.kinds.host VERB ...`: what kind `ssh` does on a host, in the project's folder there.

start MARK LOG -- WORDS...   starts a process that outlives this one; prints its pid
marked MARK                  prints the processes of the mark as JSON, pid -> command
end MARK                     ends them, and prints those that had to be killed
token FILE                   writes standard input to a file that nobody else reads
"""

import json
import os
import sys
from pathlib import Path

from cluster.kinds import processes
from repfusion.files import write_text

DRAIN_SEC = 45.0


def main(words: list[str]) -> None:
    match words:
        case ["start", mark, log, "--", *command]:
            environment = {**os.environ, processes.MARK: mark}
            print(processes.start(command, environment, Path(log)))
        case ["marked", mark]:
            print(json.dumps(processes.marked(mark)))
        case ["end", mark]:
            # its parts end with `ray start`, which gives the work on the node its time
            starters = [pid for pid, command in processes.marked(mark).items() if "--block" in command]
            processes.ask_to_end(starters, mark, DRAIN_SEC)
            print(json.dumps(processes.end_rest(mark, processes.HELPERS_SEC)))
        case ["token", file]:
            write_text(Path(file), sys.stdin.read().strip(), mode=0o600)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
