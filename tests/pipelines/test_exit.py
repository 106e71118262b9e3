"""Every command ends with its own status, whatever Arrow's threads are doing meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = {"pipelines/shards/parquet.py", "pipelines/lists/tables.py", "repfusion/data/columns.py"}
"""Where Arrow reads files: its own, or Python's on the calling thread."""
READERS = ("pq.read_table(", "pq.ParquetFile(", "pq.read_schema(", "pq.read_metadata(", "csv.open_csv(",
           "csv.read_csv(", "json.open_json(", "json.read_json(", "dataset.dataset(")  # fmt: skip


def test_arrow_reads_in_few_places():
    """A thread of Arrow's that lets go of a Python file while the interpreter ends aborts the process."""
    found = {
        str(path.relative_to(ROOT))
        for package in ("pipelines", "repfusion")
        for path in (ROOT / package).rglob("*.py")
        if any(reader in path.read_text() for reader in READERS)
    }
    assert found == NATIVE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times", "message"),
    [
        ("list.csv", 10, "has no column 'url'"),
        ("ragged.csv", 10, "is not readable as csv"),
        ("list.parquet", 3, "has no column 'url'"),
    ],
)
def test_a_bad_list_is_status_1(tmp_path: Path, name: str, times: int, message: str):
    """Every time: a third of the runs ended in an abort, status 134."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / name
    if name == "list.parquet":
        pq.write_table(pa.table({"link": ["u"] * 1000, "text": ["c"] * 1000}), path)
    else:
        heading = "link,text\n" if name == "list.csv" else "url,caption\n"
        path.write_text(heading + "u,c\n" * 1000 + "u,c,one too many\n" + "u,c\n" * 500_000)
    (tmp_path / "w.yaml").write_text(
        f"root: {tmp_path}/run\nsource: {{kind: urls, path: {path}}}\nlast_stage: curate\n"
    )
    command = [sys.executable, "-m", "pipelines", "status", str(tmp_path / "w.yaml")]
    for _ in range(times):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
