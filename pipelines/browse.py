"""`python -m pipelines.browse CONFIG.yaml`: pictures of a workflow's stages, in a browser of this machine."""

import argparse
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipelines.build import data_stages
from pipelines.config import WorkflowConfig
from pipelines.reporting.browse import Library, Shelf
from pipelines.shards.store import ShardError
from pipelines.stages.captions import CaptionsConfig
from repfusion.config import load_config
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines

PICTURED = {"ingest": None, "curate": "ingest"}
"""Stages whose shards hold pictures, and where those lie that they dropped."""
LOCAL = ("127.0.0.1", "localhost")


def library_of(config: WorkflowConfig) -> Library:
    """The pages of a workflow."""
    folders = {stage.name: stage.folder for stage in data_stages(config)}
    captions = [
        name for name, one in config.columns.items() if isinstance(one, CaptionsConfig) and name in folders
    ]
    stages = {
        name: Shelf(
            folders[name],
            None if above is None else folders[above],
            tuple(folders[column] for column in captions) if name == "curate" else (),
        )
        for name, above in PICTURED.items()
        if name in folders
    }
    return Library(config.root.resolve().name, stages)


def server_of(library: Library, port: int) -> ThreadingHTTPServer:
    """A server of loopback; it answers to no other name, so that no page of elsewhere reads through it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in LOCAL:
                self.send_error(403)
                return
            try:
                answer = library.answer(self.path)
            except (ShardError, OSError, ValueError) as error:
                self.send_error(500, printable_lines(redact_text(str(error)))[:200])
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Cache-Control", "max-age=60")
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.browse", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--port", type=int, default=8090)
    args = parser.parse_intermixed_args()
    try:
        server = server_of(library_of(load_config(WorkflowConfig, args.config, args.overrides)), args.port)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    print(f"http://127.0.0.1:{server.server_port} (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
