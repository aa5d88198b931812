"""For what the workers do in their own time, and neither Dask nor a file system tells of."""

from __future__ import annotations

from collections.abc import Callable

from distributed import Client, Worker


def wait_on_workers(client: Client, true: Callable[[Worker], bool]) -> None:
    """Wait until it is true on all workers; TimeoutError after 20 s."""

    async def there(dask_worker: Worker) -> None:
        import asyncio

        async with asyncio.timeout(20):
            while not true(dask_worker):
                await asyncio.sleep(0.01)

    client.run(there)
