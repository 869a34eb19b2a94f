"""Fixtures of the tests of clusters; a file that has a cluster of another kind has its own."""

from __future__ import annotations

import pytest
from slurm import missing, slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of two nodes, for all tests of a file."""
    if reason := missing():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found
