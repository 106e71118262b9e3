"""`python -m pipelines`: see commands.py."""

import gc
import signal
import sys

# What torch's modules hold lives as long as the process: to look through it for garbage, while it is made and
# at the end, takes a quarter of the time of a short command.
gc.disable()

from pipelines.commands import main, terminate  # noqa: E402
from repfusion.display.redaction import redact_tracebacks  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    redact_tracebacks()
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
