"""The cluster that other tests stand on: two nodes, closed to who has no token, and mortal."""

from __future__ import annotations

import json
import sys

import pytest
from ray_cluster import RayCluster, cluster  # noqa: F401

pytestmark = pytest.mark.cluster
ASK = """
import json, ray, time
ray.init(address=%r, log_to_driver=False)
for _ in range(%d):
    print(json.dumps({node["NodeManagerHostname"]: node["Alive"] for node in ray.nodes()}))
    time.sleep(1)
"""


def nodes(cluster: RayCluster, looks: int = 1) -> list[dict[str, bool]]:  # noqa: F811
    answer = cluster.one.run([sys.executable, "-c", ASK % (cluster.address, looks)])
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]


def test_a_cluster_has_two_nodes_until_one_is_killed(cluster):  # noqa: F811
    assert nodes(cluster) == [{"one": True, "two": True}]
    assert cluster.two.kill()
    assert nodes(cluster, looks=20)[-1] == {"one": True, "two": False}
    assert not cluster.two.pids()


def test_nobody_without_the_token_gets_in(cluster):  # noqa: F811
    cluster.token.write_text("another")
    refused = cluster.one.run([sys.executable, "-c", ASK % (cluster.address, 1)])
    assert refused.returncode == 1
    assert "Unauthenticated" in refused.stderr
