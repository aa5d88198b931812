"""XGBoost's connections to its tracker hold no part of a message back."""

import socket
import time

from dask_xgboost.sockets import CollectiveSockets, send_at_once


def sends_at_once(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_a_tracker_and_its_ranks_hold_nothing_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tracker:
        address = tracker.getsockname()
        send_at_once(address[1])
        with CollectiveSockets([]).sending_at_once(address), socket.create_connection(address) as rank:
            accepted, _ = tracker.accept()
            with accepted:
                assert sends_at_once(accepted)
            late = time.monotonic() + 30
            while not sends_at_once(rank):
                assert time.monotonic() < late


def test_connections_to_others_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tracker, socket.create_server(("127.0.0.1", 0)) as other:
        send_at_once(tracker.getsockname()[1])
        with (
            CollectiveSockets([]).sending_at_once(tracker.getsockname()),
            socket.create_connection(other.getsockname()) as mine,
            socket.create_connection(tracker.getsockname()) as rank,
        ):
            late = time.monotonic() + 30
            while not sends_at_once(rank):
                assert time.monotonic() < late
            accepted, _ = other.accept()
            with accepted:
                assert not sends_at_once(mine)
                assert not sends_at_once(accepted)
