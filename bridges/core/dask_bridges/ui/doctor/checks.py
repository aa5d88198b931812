"""What is wrong with what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes
from distributed import Client

from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo, check_version, refuse_plaintext
from dask_bridges.plugins import Checkup
from dask_bridges.ui.doctor.surroundings import Surroundings

__all__ = [
    "Problem",
    "does_not_answer",
    "drivers",
    "frameworks",
    "has_this_package",
    "of_other_pythons",
    "ports",
    "pythons",
    "reach",
    "scheduler_is_silent",
    "scheduler_refuses",
    "spool_memory",
    "states",
    "traffic",
    "versions",
]

#: What the scheduler unpickles with.
ON_SCHEDULER = ("dask", "distributed", "cloudpickle", "msgpack")
#: Bytes below which memory for spools is short; or this share of a worker's memory limit, where that is less.
SHORT, SHARE = 256 * 2**20, 0.1
#: So many of like things are named, and the others counted.
NAMED = 3

Looks = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes
    ----------
    where : str
    what, remedy : str
        Each a sentence, without its full stop.
    """

    where: str
    what: str
    remedy: str

    @property
    def finding(self) -> str:
        """Where, and what, in a sentence."""
        return self.what if self.where in self.what else f"{self.where}: {self.what}"


def _these(workers: Sequence[str]) -> str:
    """Workers, as a sentence names them."""
    if len(workers) == 1:
        return "the scheduler" if workers[0] == "scheduler" else f"worker {workers[0]}"
    more = f" and {len(workers) - NAMED} more" if len(workers) > NAMED else ""
    return f"{len(workers)} workers ({', '.join(workers[:NAMED])}{more})"


def frameworks(here: Mapping[str, Any], checkups: Iterable[Checkup]) -> list[Problem]:
    """That at least one bridge has its framework here."""
    wanted = {checkup.extra: checkup.packages for checkup in checkups if checkup.extra}
    if any(all("version" in here["packages"][name] for name in names) for names in wanted.values()):
        return []
    offered = " or ".join(f'"dask-bridges[{extra}]"' for extra in wanted) or '"dask-bridges[all]"'
    return [Problem("client", "no framework is installed that could be trained", f"pip install {offered}")]


def states(scheduler: str, workers: Sequence[WorkerInfo]) -> list[Problem]:
    """That there are workers, and that they run."""
    if not workers:
        start = f"Start some: dask worker {scheduler}, or cluster.scale(2)"
        return [Problem("the scheduler", "the cluster has no workers", start)]
    problems = []
    for status in sorted({worker.status for worker in workers} - {"running"}):
        those = [worker for worker in workers if worker.status == status]
        used = ", ".join(worker.describe() for worker in those[:NAMED])
        remedy = (
            "Paused workers have used up their memory, and no task starts there: give them more, or free what they hold"
            if status == "paused"
            else "No task starts there: wait until they have left, or start others"
        )
        problems.append(Problem(_these([worker.address for worker in those]), f"{status} ({used})", remedy))
    return problems


def traffic(client: Client) -> list[Problem]:
    """That trainings are not refused for their plain TCP."""
    try:
        refuse_plaintext(client, None, "what the frameworks send")
    except PlacementError as error:
        what, _, remedy = str(error).rstrip(".").partition(". ")
        return [Problem("the scheduler", what, remedy)]
    return []


def scheduler_is_silent(error: Exception) -> Problem:
    """The scheduler runs no function for us."""
    return Problem(
        "the scheduler",
        f"it does not say how it is ({type(error).__name__}: {error}), so its versions are not known",
        "Take run_function out of its Dask configuration distributed.scheduler.blocked-handlers, to have it looked at",
    )


def scheduler_refuses(handlers: Sequence[str]) -> list[Problem]:
    """That the scheduler takes the plugin which every training brings."""
    if "register_scheduler_plugin" not in handlers:
        return []
    what = "it takes no plugins, and will refuse the one that gives trainings their turns"
    remedy = "Take register_scheduler_plugin out of its Dask configuration distributed.scheduler.blocked-handlers"
    return [Problem("the scheduler", what, remedy)]


def does_not_answer(worker: str, error: BaseException) -> Problem:
    """A worker that was asked raised."""
    return Problem(
        f"worker {worker}",
        f"it does not say how it is ({type(error).__name__}: {error})",
        "Its log tells more; install the client's version of dask-bridges there, or start it again",
    )


def has_this_package(looks: Looks, worker: str) -> bool:
    """Whether a worker can be asked by functions of this package."""
    ours = [looks.get(who, {}).get("packages", {}).get("dask_bridges", {}).get("version") for who in ("client", worker)]
    return ours[0] is not None and ours[0] == ours[1]


def versions(
    looks: Looks, needed: Sequence[str], compared: Sequence[str], checkups: Sequence[Checkup]
) -> list[Problem]:
    """That workers have what the client has, and the scheduler what it unpickles with."""
    extras = {name: checkup.extra for checkup in checkups for name in checkup.packages}
    theirs = [name for checkup in checkups for name in checkup.versions]
    workers = {who: look for who, look in looks.items() if who not in ("client", "scheduler")}
    problems = []
    for package in dict.fromkeys((*needed, *extras, *compared, *theirs)):
        required = package in needed or package in extras
        extra = f': pip install "dask-bridges[{extras[package]}]"' if extras.get(package) else ""
        problems += _differing(looks["client"], workers, package, required, extra)
    if "scheduler" in looks:
        for package in ON_SCHEDULER:
            problems += _differing(looks["client"], {"scheduler": looks["scheduler"]}, package, False, "")
    return problems + _variables(looks["client"], workers, [name for checkup in checkups for name in checkup.variables])


def of_other_pythons(here: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The processes whose Python has another minor version, in Dask's own words: no function can be sent to them.

    Parameters
    ----------
    here : mapping
        What is installed on the client.
    told : mapping
        What ``Client.get_versions`` gives.
    """
    found = {}
    for who, versions in {"scheduler": told["scheduler"], **told["workers"]}.items():
        release = ".".join(versions["host"]["python"].split(".")[:3])
        if release.split(".")[:2] != here["release"].split(".")[:2]:
            packages = {name: {"version": version} for name, version in versions["packages"].items() if version}
            found[who] = {"release": release, "packages": packages, "variables": {}}
    return found


def pythons(here: Mapping[str, Any], foreign: Looks) -> list[Problem]:
    """That what one process pickles can be used in the others."""
    return [
        Problem(
            _these(those),
            f"Python is {release} there and {here['release']} on the client, and one cannot use what the other pickles",
            "Use the same minor version in all places",
        )
        for release, those in _grouped({who: look["release"] for who, look in foreign.items()}).items()
    ]


def _differing(client: Mapping[str, Any], others: Looks, package: str, required: bool, remedy: str) -> list[Problem]:
    here = client["packages"].get(package, {}).get("version")
    if here is None:
        return []
    kinds = {who: tuple(sorted(_told(look, package).items())) for who, look in others.items()}
    problems = []
    for kind, those in _grouped(kinds).items():
        found = dict(kind)
        try:
            if required or "version" in found:
                check_version(_these(those), package, here, found, remedy)
        except PlacementError as error:
            problems.append(_as_problem(_these(those), str(error)))
    return problems


def _told(look: Mapping[str, Any], package: str) -> dict[str, str]:
    found = look["packages"][package]
    return dict(found) if "version" in found else {**found, "python": look["python"]}


def _as_problem(where: str, message: str) -> Problem:
    """A problem of a message, which ends with the remedy."""
    for stop in (". ", ": install"):
        what, found, remedy = message.rstrip(".").partition(stop)
        if found:
            return Problem(where, what, remedy if stop == ". " else f"Install{remedy}")
    return Problem(where, message.rstrip("."), "")


def _variables(client: Mapping[str, Any], workers: Looks, names: Sequence[str]) -> list[Problem]:
    problems = []
    for name in names:
        here = client["variables"].get(name)
        for value, those in _grouped({who: look["variables"].get(name) for who, look in workers.items()}).items():
            if value != here:
                what = f"{name} is {value or 'not set'} there and {here or 'not set'} on the client"
                problems.append(Problem(_these(those), what, "Set it to the same before the processes start"))
    return problems


def _grouped(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Who has which value."""
    groups: dict[Any, list[str]] = {}
    for who, value in values.items():
        groups.setdefault(value, []).append(who)
    return groups


def spool_memory(around: Mapping[str, Surroundings], limits: Mapping[str, int]) -> list[Problem]:
    """That what children read finds room in memory."""
    short: dict[str, list[str]] = {}
    for who, seen in around.items():
        limit = limits.get(who, 0)
        if not seen.memory_size:
            short.setdefault("/dev/shm is no tmpfs that can be written to", []).append(who)
        elif seen.memory_free < (min(SHORT, SHARE * limit) if limit else SHORT):
            has = f"/dev/shm has {format_bytes(seen.memory_free)} to spare of {format_bytes(seen.memory_size)}"
            short.setdefault(has, []).append(who)
    remedy = (
        "Remove what fills it, or make it larger (docker run --shm-size=8g; in Kubernetes a volume "
        "emptyDir of medium Memory at /dev/shm)"
    )
    return [
        Problem(_place(those), f"{what}: partitions for child processes go to disk, which is slower to read", remedy)
        for what, those in short.items()
    ]


def drivers(around: Mapping[str, Surroundings]) -> list[Problem]:
    """That GPUs which are there are seen."""
    blind = [who for who, seen in around.items() if seen.driver and not seen.devices]
    if not blind:
        return []
    what = "NVIDIA's driver is there, and no GPU is found"
    remedy = 'If it is to be used: pip install "dask-bridges[gpu]", and see what CUDA_VISIBLE_DEVICES names'
    return [Problem(_place(blind), what, remedy)]


def _place(those: Sequence[str]) -> str:
    return those[0] if list(those) == ["this machine"] else _these(those)


def ports(
    around: Mapping[str, Surroundings], wanted: Mapping[str, range], hosts: Mapping[str, Sequence[str]], collective: str
) -> list[Problem]:
    """That the ports configured are free: one a worker for the collective, one a host for others."""
    problems = []
    for host, seen in around.items():
        for setting, free in seen.free_ports.items():
            span, need = wanted[setting], len(hosts[host]) if setting == collective else 1
            if span[0] and free < need:
                those = f"port {span[0]}" if len(span) == 1 else f"the {len(span)} ports {span[0]} to {span[-1]}"
                what = f"{free} of {those} of dask-bridges.{setting} are free, and {need} wanted"
                remedy = "Configure a larger range, or 0 for any free port; `ss -ltnp` tells who has them"
                problems.append(Problem(host if host == "this machine" else f"host {host}", what, remedy))
    return problems


def reach(heard: Mapping[str, Mapping[str, str]]) -> list[Problem]:
    """That workers can connect to each other."""
    lost = [(caller, called, why) for caller, wrong in heard.items() for called, why in wrong.items()]
    problems = [
        Problem(
            f"worker {caller}",
            f"it does not reach worker {called} ({why})",
            "Members of a training connect to each other: let workers reach each other by TCP, on all ports or on "
            "a range to which dask-bridges.collective-port and the bridges' own settings of ports are set",
        )
        for caller, called, why in lost[:NAMED]
    ]
    if len(lost) > NAMED:
        problems.append(Problem("workers", f"{len(lost) - NAMED} more connections between them failed", ""))
    return problems
