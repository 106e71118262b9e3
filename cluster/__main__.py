"""`python -m cluster`: see commands.py."""

import sys

from cluster.commands import main
from repfusion.display.redaction import redact_tracebacks

if __name__ == "__main__":
    redact_tracebacks()
    sys.exit(main())
