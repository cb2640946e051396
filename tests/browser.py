"""A headless Chromium for tests. It is told what to do over WebDriver's protocol, as JSON."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from harness import PATIENCE

NAMES = ("google-chrome", "chromium", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
# It finds no host but this one, so a page that needs another one reports an error.
FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage".split(),
    *"--no-first-run --no-proxy-server --disable-background-networking".split(),
    *"--disable-component-update --disable-sync".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
CALL = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Browser:
    """One window.

    Args:
        profile: an empty folder.
    """

    def __init__(self, profile: Path) -> None:
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        self._session = None
        try:
            said = iter(self._driver.stdout.readline, "")
            ports = (re.search(r"successfully on port (\d+)", line) for line in said)
            sessions = f"http://127.0.0.1:{next(filter(None, ports))[1]}/session"
            made = call(sessions, {"capabilities": {"alwaysMatch": capabilities(profile)}})
            self._session = f"{sessions}/{made['sessionId']}"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the browser, and the driver with it."""
        try:
            if self._session:
                call(self._session, None, "DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._driver.stdout.close()

    def resize(self, width: int, height: int = 900) -> None:
        """Gives the window another size; a narrow one is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Says, as the reader's system would, that pages should be "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._devtools("Emulation.setEmulatedMedia", {"features": [feature]})

    def visit(self, address: str) -> None:
        """Loads a page with all that it shows."""
        call(f"{self._session}/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs the body of a function in JavaScript, and gives what it returns."""
        return call(f"{self._session}/execute/sync", {"script": script, "args": arguments})

    def complaints(self) -> list[str]:
        """The errors and warnings on the console since the last call of this method."""
        said = call(f"{self._session}/se/log", {"type": "browser"})
        return [line["message"] for line in said if line["level"] in ("WARNING", "SEVERE")]

    def _devtools(self, name: str, parameters: dict) -> Any:
        return call(f"{self._session}/goog/cdp/execute", {"cmd": name, "params": parameters})


def capabilities(profile: Path) -> dict:
    """The browser that the driver is to start."""
    return {
        "goog:chromeOptions": {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]},
        "goog:loggingPrefs": {"browser": "ALL"},
    }


def call(address: str, body: dict | None, method: str = "POST") -> Any:
    """Sends a command to the driver."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers, method=method)
    with CALL(request, timeout=PATIENCE) as answer:
        return json.load(answer)["value"]
