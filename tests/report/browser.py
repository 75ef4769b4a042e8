"""A page in headless Chromium, over the pipe of its developer tools: no driver, nothing but the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Puts two pipes where `--remote-debugging-pipe` expects them, and becomes the program.
PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
# What a page is: text of every visible element that has its own, with the colors it is drawn in.
LOOK = """
(() => {
  const number = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const paper = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = number(getComputedStyle(e).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > 0)) return c;
    }
    return [255, 255, 255];
  };
  const texts = [...document.body.querySelectorAll('*')].filter(
    e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  const contrasts = texts.map(e => {
    const [a, b] = [light(number(getComputedStyle(e).color)), light(paper(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.tagName + ': ' + e.textContent.slice(0, 40)];
  }).sort((x, y) => x[0] - y[0]);
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    without_alt: [...document.images].filter(i => !i.alt.trim()).length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    pictures: document.images.length,
    paper: paper(document.body),
    num_texts: texts.length,
    least_contrast: contrasts[0],
  };
})()
"""


def chromium() -> str | None:
    """Returns the path of Chromium, or None where there is none."""
    return next(filter(None, map(which, NAMES)), None)


class Browser:
    """A headless Chromium with one tab; a context that ends it."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.number, self.problems = 0, []
        to_browser, from_browser = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", PIPES, str(to_browser[0]), str(from_browser[1]), program),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
                *("--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
                *(f"--user-data-dir={self.folder.name}", "about:blank"),
            ],
            pass_fds=(to_browser[0], from_browser[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.out, self.back = os.fdopen(to_browser[1], "wb"), os.fdopen(from_browser[0], "rb")
        self.left, self.session = b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.back.close()
        self.folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to one command; what the page complains of meanwhile is kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while (answer := self.read()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        """Returns the next message."""
        while b"\0" not in self.left:
            part = self.back.read1(1 << 16)
            if not part:
                raise RuntimeError("Chromium has ended.")
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        return json.loads(text)

    def note(self, event: dict[str, Any]) -> None:
        """Keeps an event that is an error or a warning of the page."""
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown" or (
            event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error"
        ):
            self.problems.append(params)
        if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.problems.append(params)

    def look(self, page: Path, width: int, scheme: str) -> dict[str, Any]:
        """Returns what `LOOK` finds of a page at a width in pixels and a color scheme, and its problems."""
        self.problems = []
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme_feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=scheme_feature)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while (event := self.read()).get("method") != "Page.loadEventFired":
            self.note(event)
        answer = self.call("Runtime.evaluate", expression=LOOK, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return {**answer["result"]["value"], "problems": self.problems}
