"""Shared by the tests of the engine."""

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture
def event_loop() -> Iterator[None]:
    """Where no loop runs: replies hold a future, and that a loop."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    asyncio._set_running_loop(loop)
    yield
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)
    loop.close()
