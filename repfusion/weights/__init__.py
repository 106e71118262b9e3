"""The small foundation shipped with the library, made by `repfusion.foundation`: ordinary model folders."""

from pathlib import Path

WEIGHTS = Path(__file__).parent
