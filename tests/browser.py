"""A real browser for tests: headless Chromium, spoken to through a pipe in its own protocol.

Needs no package: a Chromium on PATH (Debian: apt-get install chromium-headless-shell) or named by
the environment variable CHROMIUM. The picture in README.md:

    python sample.py --html out/page.html && python tests/browser.py out/page.html results/page.png
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *NAMES))), None)


class Browser:
    """One tab. `events` collects what the page reports: requests, console messages, exceptions."""

    def __init__(self, command: str, profile):
        ends = [os.pipe(), os.pipe()]  # the browser reads file 3 and writes file 4
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ends[0][0], ends[1][1]))
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "browser", command, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read, write), stderr=subprocess.DEVNULL)
        for fd in (ends[0][0], ends[1][1], read, write):
            os.close(fd)
        self.to, self.answers = os.fdopen(ends[0][1], "wb"), ends[1][0]
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], 120)[0], "the browser is silent"
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has gone"
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.to.write(json.dumps(
            message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.to.flush()
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, path, scheme="light", width=1200, height=800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.receive())

    def run(self, script: str):
        """The value of a JavaScript expression in the page; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                         returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str, seconds=10) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"

    def click(self, element: str) -> None:
        """With the mouse, where the element that the expression names can be seen."""
        x, y = self.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = "
                        f"e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2] "
                        f"}})({element})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def reported(self, *methods: str) -> list:
        return [e["params"] for e in self.events if e.get("method") in methods]

    def picture(self, path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.to.close()
        self.process.terminate()
        self.process.wait(10)
        os.close(self.answers)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(find(), profile)
        browser.open(Path(sys.argv[1]), width=1180, height=600)
        browser.wait("document.getElementById('now').textContent")
        browser.picture(Path(sys.argv[2]))
        browser.close()
