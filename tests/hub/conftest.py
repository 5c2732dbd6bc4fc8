"""The Hub of these tests, and programs that ask it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..hub_server import Hub, Runner, playing


@pytest.fixture(scope="session")
def _runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with playing() as server:
        runner = Runner(server, tmp_path_factory.mktemp("hub"))
        yield runner
        runner.close()


@pytest.fixture
def runner(_runner: Runner) -> Runner:
    """Runs programs against `hub`, which is empty at first."""
    _runner.hub.clear()
    return _runner


@pytest.fixture
def hub(runner: Runner) -> Hub:
    """A Hub on the loopback interface; see `tests/hub_server.py`."""
    return runner.hub
