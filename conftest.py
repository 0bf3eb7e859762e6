"""What pytest does before it reads test_smolrouter.py, which has every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """Read the tests without looking for garbage.

    To compile them makes a million objects that stay, and Python's collector would look at
    all of them again and again: half of the time, in each worker of pytest-xdist.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test: at the end, the other workers would wait for it alone."""
    items.sort(key=lambda item: item.name != "test_measurements_have_every_figure")
