"""Pages in a headless Chromium, where there is one: what a script finds on them."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
IN_A_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def in_browser(page: Path, acts: str, width: int | None = None) -> list[Any]:
    """What a script pushes into `said` on the page; with a width, in a window of so many pixels, whose
    document is `document` all the same.
    """
    if width is None:
        text = page.read_text().replace("</body>", f"<script>{_saying(acts)}</script></body>")
    else:  # a window of its own cannot be that narrow
        text = (
            f'<body><iframe width="{width}" height="900" srcdoc="{escape(page.read_text())}"></iframe>'
            "<script>const frame = window.frames[0]; onload = () => { const outer = window.document;"
            f"((window, document) => {{ {_saying(acts, 'outer')} }})(frame, frame.document); }}"
            "</script></body>"
        )
    tried = page.with_name(f"tried-{page.name}")
    tried.write_text(text)
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", tried.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.findall(r"<pre>(.*)</pre>", done.stdout)
    assert len(found) == 1, f"the script did not come to its end: {done.stderr[-2000:]}"
    return json.loads(found[0])


def _saying(acts: str, document: str = "document") -> str:
    said = f"{document}.body.innerHTML = `<pre>${{JSON.stringify(said)}}</pre>`"
    return f"const said = []; {acts}; {said}"
