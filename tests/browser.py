"""A headless Chromium for tests: what it is told goes over WebDriver's own protocol, as JSON."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
DRIVER = shutil.which("chromedriver")
# Without a screen, and silent: it asks no host but this one, so a page that needs another fails.
FLAGS = """
  --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
  --disable-background-networking --disable-component-update --disable-sync
""".split() + ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]


class Browser:
    """One window.

    Args:
        profile: an empty folder.
    """

    def __init__(self, profile: Path) -> None:
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        said = iter(self._driver.stdout.readline, "")
        port = next(found[1] for line in said if (found := re.search(r"successfully on port (\d+)", line)))
        self._session = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            made = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.close()
            raise
        self._session += f"/{made['sessionId']}"

    def close(self) -> None:
        """Ends the browser, and the driver with it."""
        try:
            if not self._session.endswith("/session"):
                urllib.request.urlopen(urllib.request.Request(self._session, method="DELETE")).close()
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._driver.stdout.close()

    def _post(self, command: str, body: dict) -> Any:
        request = urllib.request.Request(
            self._session + command,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["value"]

    def width(self, pixels: int, height: int = 900) -> None:
        """A window of this size; narrow ones are those of a phone."""
        how = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self._chrome("Emulation.setDeviceMetricsOverride", how)

    def dark(self, wanted: bool) -> None:
        """What the system says to a page that asks for a dark or a light scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self._chrome("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _chrome(self, name: str, parameters: dict) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def visit(self, address: str) -> None:
        """Loads a page and all that it shows."""
        self._post("/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body in JavaScript returns."""
        return self._post("/execute/sync", {"script": script, "args": arguments})

    def errors(self) -> list[str]:
        """What the console has said since it was last asked, if it is more than a remark."""
        said = self._post("/se/log", {"type": "browser"})
        return [line["message"] for line in said if line["level"] in ("WARNING", "SEVERE")]

    def picture(self, whole: bool = False) -> bytes:
        """A PNG of what the window shows, or of the whole page."""
        shot = self._chrome(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole}
        )
        return base64.b64decode(shot["data"])
