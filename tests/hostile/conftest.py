"""The mark of the tests here, for as long as pyproject.toml does not list it."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hostile: reads hundreds of hostile files (make test-all runs it)")
