import os
import subprocess
import sys

from browser.process import ROOT


def test_without_chromium_the_suite_fails_and_says_how_to_get_it() -> None:
    one_test = "tests/browser/test_threads.py::test_a_reload_shows_the_same_thread"
    environ = {**os.environ, "PATH": "", "CHROMIUM": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", one_test],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Chromium is needed: `apt-get install -y chromium`" in run.stdout
