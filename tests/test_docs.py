"""What is generated is up to date."""

import subprocess
import sys
from pathlib import Path

from trioserver import config_report

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def test_settings_page() -> None:
    """The page of settings describes exactly the settings that exist."""
    expected = config_report.page()

    # If this fails: python -m trioserver.config_report > docs/settings.md
    assert expected == PAGE.read_text(encoding="utf-8")


def test_settings_page_command() -> None:
    """The command that the page names writes that page."""
    command = [sys.executable, "-m", "trioserver.config_report"]

    printed = subprocess.run(command, check=True, capture_output=True, timeout=30)

    assert config_report.page() == printed.stdout.decode()
