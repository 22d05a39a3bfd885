"""A page in headless Chromium, driven over its DevTools pipe with the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
_DOMAINS = ("Page", "Runtime", "Log", "Network")


class Browser:
    """A page in a browser, and all that it complained of or asked for since it was opened."""

    def __init__(self, asks: int, answers: int, patience_seconds: float = 120):
        self._asks, self._answers = os.fdopen(asks, "wb", buffering=0), os.fdopen(answers, "rb", buffering=0)
        self._last, self._session, self._rest = 0, None, b""
        self._patience_seconds = patience_seconds
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def attach(self) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in _DOMAINS:
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self._asks.close()
        self._answers.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and give its result; what happens meanwhile is noted.

        Raises: TimeoutError: the browser does not answer.
        """
        self._last, end = self._last + 1, self._end()
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._asks.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read(method, end)).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _end(self) -> float:
        return time.monotonic() + self._patience_seconds

    def _read(self, awaited: str, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"{awaited}: no answer from the browser within {self._patience_seconds:g} s")
            new = self._answers.read(1 << 20)
            assert new, "the browser has ended"
            self._rest += new
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event["method"], event["params"]
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and told["entry"]["level"] == "error"):
            self.complaints.append(json.dumps(told))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(told["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"][:80])
        self.loaded = self.loaded or method == "Page.loadEventFired"

    def open(self, path: Path, *, width: int = 1280, height: int = 900, **features: str) -> None:
        """Open a file at a size, with media features such as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.ask("Emulation.setEmulatedMedia", features=named)
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.complaints, self.requests, self.loaded = [], [], False
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end = self._end()
        while not self.loaded:
            self._note(self._read("Page.loadEventFired", end))

    def run(self, script: str) -> Any:
        """Give the value of an expression, which may be a promise."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        self.run(f"""new Promise((done, failed) => {{
            const end = Date.now() + {1000 * seconds};
            (function look() {{
                if ({condition}) done(true);
                else if (Date.now() > end) failed(new Error("never came true"));
                else setTimeout(look, 20);
            }})();
        }})""")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path) -> None:
        """Write what is on screen, as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(profile: Path) -> Generator[Browser]:
    """A browser with an empty profile, ended with the block."""
    assert CHROMIUM is not None
    (reads, asks), (answers, writes) = os.pipe(), os.pipe()
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
    # Chromium reads commands from file 3 and answers on file 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(reads)
    os.close(writes)
    opened = Browser(asks, answers)
    try:
        opened.attach()
        yield opened
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        opened.close()
