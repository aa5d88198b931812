"""What runs on a cluster, for whoever looks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import dask.array as da
import pytest
from distributed import Client

import dask_bridges
from dask_bridges.events import Metrics
from dask_bridges.testing import loopback
from dask_bridges.testing.faults import Hold

pytestmark = pytest.mark.cluster


def test_a_gang_is_seen_by_all_and_says_so_if_it_cannot_end_early(bridges_client: Client) -> None:
    assert dask_bridges.gangs(bridges_client) == []
    hold, X = Hold.new(bridges_client), da.ones((6, 2), chunks=(2, 2))
    with (
        ThreadPoolExecutor() as pool,
        Client(bridges_client.scheduler.address, set_as_default=False) as other,
        hold.released_at_last(bridges_client),
    ):
        work = pool.submit(loopback.train, bridges_client, X, X[:, 0], fault=hold)
        assert hold.reached(bridges_client).wait(60)
        (gang,) = dask_bridges.gangs(other)
        assert (gang.label, gang.state, gang.mine, len(gang.workers)) == ("loopback", "running", False, 3)
        assert [event.values for event in gang.events() if isinstance(event, Metrics)] == [{"total": 12.0}]
        with pytest.raises(dask_bridges.BridgeError, match=r"loopback \(gang \w+\) cannot end early with a result"):
            gang.stop()
        assert dask_bridges.gangs(bridges_client)[0].mine
        hold.released(bridges_client).set()
        assert work.result(60).total == 12.0


def test_what_is_not_there_is_still_missed() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = dask_bridges.nothing_like_it
