"""A cluster of one head without a CPU and three nodes with one each, on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

OBJECTS = 80 << 20


class Nodes:
    """Three nodes, of which one may be killed; another takes its place."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": OBJECTS,
                "include_dashboard": False,
                # A dead node is found out in seconds, not in half a minute.
                "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 4},
            },
        )
        self.nodes = [self._add() for _ in range(3)]
        self.cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=OBJECTS)

    def replace_one(self, which: int = 0) -> None:
        """Kill a node as a power cut does, and add another."""
        self.cluster.remove_node(self.nodes.pop(which), allow_graceful=False)
        self.nodes.append(self._add())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """This process stays connected, so that runs find the workers of those before."""
    import ray

    found = Nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.cluster.shutdown()
