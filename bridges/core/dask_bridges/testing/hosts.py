"""Hosts on one machine: network namespaces on a switch, from which they can be unplugged. Linux, and root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence

__all__ = ["Network", "missing_for_networks", "network"]


def missing_for_networks() -> str:
    """What is missing for `network`; empty where it works."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not shutil.which("ip"):
        return "network namespaces need the program ip (of the package iproute2)"
    name = f"dask-bridges-{uuid.uuid4().hex[:8]}"
    if _ip("netns", "add", name, check=False):
        return "this system gives no network namespaces"
    _ip("netns", "delete", name)
    return ""


def _ip(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL).returncode


class Network:
    """Hosts that reach each other by their second interface only.

    Each has two: ``eth0``, with an address in 10.93.0.0/24 and on no switch, and
    ``eth1``, in 10.93.1.0/24, on one that all hosts share. Host names resolve to
    nothing that helps.
    """

    def __init__(self, prefix: str, hosts: Sequence[str]) -> None:
        self._prefix = prefix
        self._numbers = {host: number for number, host in enumerate(hosts, 1)}

    def address(self, host: str) -> str:
        """By which the others reach a host."""
        return f"10.93.1.{self._numbers[host]}"

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self._name(host), *command]

    def unplug(self, host: str) -> None:
        """Take a host off the switch: its interfaces stay up, and what it sends is lost."""
        self._switch("link", "set", f"port1-{self._numbers[host]}", "nomaster")

    def forbid(self, host: str, ports: str) -> None:
        """Let a host connect to none of the ports "9000-9010" of others, as a firewall does."""
        _ip("-n", self._name(host), "rule", "add", "ipproto", "tcp", "dport", ports, "prohibit")

    def _name(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def _switch(self, *arguments: str) -> None:
        _ip("-n", self._name("switch"), *arguments)

    def _set_up(self) -> None:
        _ip("netns", "add", self._name("switch"))
        self._switch("link", "add", "bridge1", "type", "bridge")
        self._switch("link", "set", "bridge1", "up")
        for host, number in self._numbers.items():
            _ip("netns", "add", self._name(host))
            here = ("-n", self._name(host))
            _ip(*here, "link", "set", "lo", "up")
            for interface in range(2):
                port, name = f"port{interface}-{number}", f"eth{interface}"
                self._switch("link", "add", port, "type", "veth", "peer", name, "netns", self._name(host))
                self._switch("link", "set", port, "up")
                _ip(*here, "address", "add", f"10.93.{interface}.{number}/24", "dev", name)
                _ip(*here, "link", "set", name, "up")
            self._switch("link", "set", f"port1-{number}", "master", "bridge1")

    def _tear_down(self) -> None:
        for host in ("switch", *self._numbers):
            _ip("netns", "delete", self._name(host), check=False)


@contextlib.contextmanager
def network(*hosts: str) -> Iterator[Network]:
    """A network of hosts, gone afterwards.

    Parameters
    ----------
    hosts : str
        Their names.
    """
    made = Network(f"db{uuid.uuid4().hex[:6]}", hosts)
    try:
        made._set_up()
        yield made
    finally:
        made._tear_down()
