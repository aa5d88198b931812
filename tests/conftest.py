"""What the tests of devices share, whichever framework works on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from tests.core.devices_at_work import client_of, cluster_with_devices
from tests.core.jobs_at_work import Flags


@pytest.fixture(scope="module")
def devices_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two workers with a device each, or as the module's own `CLUSTER` says."""
    options = getattr(request.module, "CLUSTER", {})
    with cluster_with_devices(tmp_path_factory.mktemp("devices"), **options) as cluster:
        yield cluster


@pytest.fixture
def client(devices_cluster: LocalCluster) -> Iterator[Client]:
    """A client of that cluster; where tests need another one they say so themselves."""
    with client_of(devices_cluster) as client:
        yield client


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    """Files by which a test and what it starts tell each other how far they are."""
    return Flags(tmp_path)
