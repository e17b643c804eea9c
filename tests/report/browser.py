"""A page opened in headless Chromium, with a script of the test's own at its end."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The frame and the page around it have no common origin (files have none), so the answer travels as a message.
_FRAME = """<!doctype html><body><script>
  addEventListener("message", (event) => {
    const textContent = JSON.stringify(event.data);
    document.body.append(Object.assign(document.createElement("pre"), { id: "answer", textContent }));
  });
</script><iframe width="WIDTH" height="900" srcdoc="PAGE"></iframe>"""
_EARLY = """<script>const failures = []; addEventListener("error", (event) => failures.push(event.message));</script></head>"""
_LATE = """<script>addEventListener("load", async () => {
  let answer = null;
  try { answer = await (async () => { SCRIPT })(); } catch (error) { failures.push(`${error}`); }
  parent.postMessage({ failures, answer }, "*");
});</script></body>"""


def dumped(page: str, width: int = 1280, height: int = 900) -> str:
    """The document as HTML once its scripts have run."""
    binary = next(filter(None, map(shutil.which, _NAMES)), None)
    if binary is None:
        pytest.skip(f"needs a Chromium browser; none of {', '.join(_NAMES)} is on the path")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}/profile"]
        flags += [f"--window-size={width},{height}", "--virtual-time-budget=4000", "--dump-dom", file.as_uri()]
        done = subprocess.run([binary, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(page: str, script: str, width: int = 1280) -> Any:
    """What `script` (the body of an async function) returns inside the drawn page, `width` CSS pixels wide.

    The page sits in a frame, because a window of a desktop browser is never narrower than 500 pixels; and its policy,
    which admits no script but its own, is taken out.
    """
    page, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert found == 1
    page = page.replace("</head>", _EARLY).replace("</body>", _LATE.replace("SCRIPT", script))
    frame = _FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(page, quote=True))
    answers = re.findall(r'<pre id="answer">(.*?)</pre>', dumped(frame, 1600, 1000), re.DOTALL)
    assert len(answers) == 1, "the script did not answer"
    message = json.loads(html.unescape(answers[0]))
    assert message["failures"] == []
    return message.get("answer")
