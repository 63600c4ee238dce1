"""A real browser, for the study's page."""

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the PATH; `sudo apt-get install chromium` gets one"
)


def dom(url: str, profile: Path, *options: str) -> str:
    """The page as HTML after its scripts have run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
