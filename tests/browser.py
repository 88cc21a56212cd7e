"""A headless Chromium for tests of pages, driven over its DevTools pipe: nothing to install but it.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("google-chrome-stable", "google-chrome", "chromium", "chromium-browser", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # root in a container cannot have one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0  # seconds


def find() -> str | None:
    """Return the path of a browser on this machine; `ESFT_BROWSER` names one."""
    named = os.environ.get("ESFT_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser; close it, or use it in a `with` statement."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="esft-browser-")
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()

        def wire() -> None:  # the protocol's descriptors are 3 and 4
            low, high = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [program, *_OPTIONS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=wire,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers = itertools.count(1)
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and forget its profile."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events meanwhile are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._read()
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            return answer["result"]

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """Return the next event of a name, or one that came already."""
        while True:
            for event in self.events:
                if (event.get("method"), event.get("sessionId")) == (method, session):
                    return event
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._from, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError("the browser has ended" if ready else "the browser is silent")
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    @contextlib.contextmanager
    def open(self, file: Path, *, width: int = 1280, dark: bool = False) -> Iterator[Tab]:
        """Open a file in a tab of its own; see `Tab`."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            yield Tab(self, session, file, width, dark)
        finally:
            self.send("Target.closeTarget", targetId=target)
            self.events = [e for e in self.events if e.get("sessionId") != session]


class Tab:
    """A file as a browser shows it.

    Args:
        browser: the one.
        session: of the tab.
        file: that it opens.
        width: of the window, in CSS pixels; below 600 it is a phone's.
        dark: the colour scheme that the reader prefers.
    """

    def __init__(self, browser: Browser, session: str, file: Path, width: int, dark: bool) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self._window(width, 800)
        self._scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[self._scheme])
        self._send("Page.navigate", url=file.resolve().as_uri())
        browser.wait_for("Page.loadEventFired", session)
        # The whole page in one window: nothing is out of sight, and a picture shows all of it.
        self.height = int(self.value("document.documentElement.scrollHeight"))
        self._window(width, self.height)

    def value(self, script: str) -> Any:
        """Return what a script comes to, as JSON."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._send("Runtime.evaluate", **given)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Return every message on the console, exception, and entry of the browser's log."""
        self.value("0")  # what was said before is here now
        found = []
        for event in self._events("Runtime.consoleAPICalled"):
            found.append(" ".join(str(a.get("value", a)) for a in event["args"]))
        for event in self._events("Runtime.exceptionThrown"):
            found.append(event["exceptionDetails"]["text"])
        found += [event["entry"]["text"] for event in self._events("Log.entryAdded")]
        return found

    def requests(self) -> list[str]:
        """Return the address of everything that the page asked for."""
        events = self._events("Network.requestWillBeSent")
        return [event["request"]["url"] for event in events]

    def images(self) -> list[str]:
        """Return the name of every image, as a screen reader is told it."""
        self._send("Accessibility.enable")
        nodes = self._send("Accessibility.getFullAXTree")["nodes"]
        found = [n for n in nodes if not n["ignored"] and n["role"]["value"] in ("image", "img")]
        return [node.get("name", {}).get("value", "") for node in found]

    def screenshot(self) -> bytes:
        """Return the whole page as a PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def pdf(self) -> bytes:
        """Return the page as it prints."""
        given = {"preferCSSPageSize": True, "printBackground": False}
        return base64.b64decode(self._send("Page.printToPDF", **given)["data"])

    def as_printed(self) -> None:
        """Show the page as paper would, from here on."""
        self._send("Emulation.setEmulatedMedia", media="print", features=[self._scheme])

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self._browser.events
            if (event.get("method"), event.get("sessionId")) == (method, self._session)
        ]

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def _window(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", **size)
