"""One training on parameter servers, from the client: checked before, tried again, scored meanwhile, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask._task_spec import TaskRef
from distributed.protocol.pickle import dumps

from dask_bridges import config
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError, MemberLost, PlacementError
from dask_bridges.events import Metrics
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_tf import chief, hosting, scoring
from dask_tf.chief import Source
from dask_tf.cluster import TensorFlowCluster
from dask_tf.training import ServerLost

if TYPE_CHECKING:
    from dask_tf.feeding import Feed

__all__ = ["Scorer", "Supervised"]

#: How often a training goes on from its last checkpoint.
ATTEMPTS = 3


@dataclass(frozen=True)
class Scorer:
    """Evaluates the parameters of a training while it runs, in the process of the "scorer" task.

    Attributes
    ----------
    data : str
        The feed to evaluate on; fed with ``to="scorer"``.
    every : float
        Seconds between two evaluations, or longer where one takes longer.
    until : callable, optional
        ``until(scores) -> bool``, called on the client; True ends the training.
    batch_size : int
    """

    data: str
    every: float = 5.0
    until: Callable[[dict[str, float]], bool] | None = None
    batch_size: int = 1024


class Supervised:
    """One training, from the client: what is checked before, and what is done when something is lost."""

    def __init__(
        self, cluster: TensorFlowCluster, data: str, checkpoint: str | Path | Checkpoints | None, progress: bool | None
    ) -> None:
        roles = {task.role for task in cluster.tasks}
        if lacking := [role for role in ("ps", "worker") if role not in roles]:
            raise PlacementError(
                f"training on parameter servers needs tasks {' and '.join(map(repr, lacking))}, and the cluster has "
                f"{', '.join(task.name for task in cluster.tasks)}: start_tensorflow(client, ps=1, worker=2)"
            )
        self.cluster = cluster
        self.feed = self._fed(data)
        self.checkpoints = (
            checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
        )
        self.bar = ProgressBar("TensorFlow") if wants_bar(progress) else None
        self.id = uuid.uuid4().hex
        self.servers = cluster._ranks("ps")
        (self.chief,) = cluster._ranks("chief:0")

    def _fed(self, name: str) -> Feed:
        feeds = self.cluster.feeds
        if name not in feeds:
            there = ", ".join(map(repr, feeds)) or "none"
            raise DataError(f"nothing was fed under the name {name!r} (there is {there}): cluster.feed(X, y, name=…)")
        return feeds[name]

    def check_held(self, name: str, role: str, argument: str) -> None:
        """See that a task of that role holds rows of a feed."""
        rows = self._fed(name).rows
        if not any(task.role == role and rows.get(task.name) for task in self.cluster.tasks):
            raise DataError(
                f"{argument}={name!r} was fed to {', '.join(rows)}, and is needed by the {role}: "
                f"cluster.feed(…, name={name!r}, to={role!r})"
            )

    def batches(self, batch_size: int) -> int:
        """Batches of all workers' rows."""
        count = sum(math.ceil(rows / batch_size) for rows in self.feed.rows.values())
        if not count:
            raise DataError(f"the feed {self.feed.name!r} has no rows")
        return count

    @contextlib.asynccontextmanager
    async def prepared(self) -> Any:
        """While there are checkpoints, a server that is lost starts again, empty."""
        if self.checkpoints is not None:
            await asyncio.to_thread(self.checkpoints.check)
        await self._spare_servers(self.checkpoints is not None)
        if self.bar is not None:
            self.cluster.events.listen(self.bar)
        try:
            yield
        finally:
            if self.bar is not None:
                self.cluster.events.unlisten(self.bar)
                self.bar.close()
            if self.cluster._alive:
                await self._spare_servers(False)

    async def _spare_servers(self, spare: bool) -> None:
        for rank in self.servers:
            await self.cluster._call(rank, hosting.spare_task, spare)

    async def attempts(self, function: Any, work: Any) -> bytes:
        """Have the chief do it; again from the last checkpoint where a server was lost."""
        for attempt in range(1, ATTEMPTS + 1):
            await self._fresh_chief()
            try:
                return bytes(await self._in_chief(function, work))
            except ServerLost as lost:
                if self.checkpoints is None or attempt == ATTEMPTS:
                    raise
                if await asyncio.to_thread(self.checkpoints.latest) is None:
                    raise MemberLost(f"{lost} There is no checkpoint yet at {self.checkpoints.url}") from lost
                self.cluster._log(f"training {lost} It goes on from the last checkpoint")
        raise AssertionError

    async def _fresh_chief(self) -> None:
        """TensorFlow connects a process to a cluster once, so a chief that has been used starts anew."""
        cluster = self.cluster
        if self.chief in cluster._used:
            await cluster._restart(self.chief)
        cluster._used.add(self.chief)
        await cluster._until_up()

    async def _in_chief(self, function: Any, *args: Any) -> Any:
        cluster = self.cluster
        future = cluster._call(self.chief, hosting.call_in_task, dumps((function, args, {})))
        answer = asyncio.ensure_future(future.result())
        gone = asyncio.ensure_future(self._server_lost())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():  # TensorFlow may not notice for long, where the server is back at once
                raise gone.result()
            return answer.result()
        except asyncio.CancelledError:
            await asyncio.shield(self.stop())
            raise
        except MemberLost as lost:
            if isinstance(lost, ServerLost):
                raise
            raise await cluster._cause(lost) from lost
        finally:
            for waiting in (answer, gone):
                waiting.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            future.release()

    async def _server_lost(self) -> ServerLost:
        """Wait until a server goes down that is to start again."""
        cluster = self.cluster
        before = {rank: cluster._downs[rank] for rank in self.servers}
        while True:
            names = tuple(cluster.tasks[rank].name for rank in self.servers if cluster._downs[rank] > before[rank])
            if names:
                return ServerLost(f"lost {' and '.join(names)}, and the variables there.", names)
            await cluster._change()

    async def stop(self) -> None:
        """Have the training end after the steps that are under way."""
        with contextlib.suppress(MemberLost):
            await self.cluster._call(self.chief, hosting.call_in_task, dumps((chief.stop, (), {})))

    async def score(self, scorer: Scorer, model: bytes, scores: list[tuple[int, dict[str, float]]]) -> None:
        """Evaluate the newest weights until there are none; they go from worker to worker."""
        cluster, after = self.cluster, -1
        (rank,) = cluster._ranks("scorer:0")
        source, ready = Source(scorer.data, scorer.batch_size), False
        while True:
            try:
                if not ready:
                    await cluster._call(rank, hosting.call_in_task, dumps((scoring.prepare, (model, source), {})))
                    ready = True
                call = dumps((chief.newest, (self.id, after), {}))
                newest = cluster._call(self.chief, hosting.call_in_task, call)
                call = dumps((scoring.score, (), {}))
                scored = await cluster._call(rank, hosting.call_in_task, call, inputs=(TaskRef(newest.key),)).result()
            except (MemberLost, RuntimeError):
                if not cluster._alive:
                    return
                ready = False
                await cluster._until_up()
                continue
            if scored is None:
                return
            if scored[0] == after:
                continue
            after, values = scored
            scores.append((after, values))
            cluster.events.publish(Metrics(gang=cluster.id, rank=rank, step=after, values=values))
            if scorer.until is not None and scorer.until(values):
                await self.stop()

    async def end_scoring(self, scoring_: asyncio.Task[None], answer: bytes) -> None:
        """Wait for the last evaluation; a training that failed has none."""
        if answer:
            await asyncio.wait({scoring_}, timeout=config.seconds("stop-timeout"))
        scoring_.cancel()
        for error in await asyncio.gather(scoring_, return_exceptions=True):
            if isinstance(error, Exception):
                raise error
