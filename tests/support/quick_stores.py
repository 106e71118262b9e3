"""SQLite databases of MLflow that begin as copies of the first one of a process: making the tables takes two
seconds of a core, and every training that is tracked has a database of its own.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

UTILS = "mlflow.store.db.utils"


def make_stores_quick() -> None:
    """From now on; nothing where MLflow's database code was not imported yet, or is so already."""
    utils: Any = sys.modules.get(UTILS)
    if utils is None or hasattr(utils._initialize_tables, "folder"):
        return
    make, folder = utils._initialize_tables, tempfile.TemporaryDirectory()
    made = Path(folder.name) / "made.db"

    def initialise(engine: Any) -> None:
        path = engine.url.database
        if engine.dialect.name != "sqlite" or not path or path == ":memory:":
            make(engine)
            return
        if not made.exists():
            make(engine)
        engine.dispose()  # a database is one file where nobody is connected
        shutil.copyfile(*((made, path) if made.exists() else (path, made)))

    initialise.folder = folder  # goes with the process
    utils._initialize_tables = initialise
