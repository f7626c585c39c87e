"""A client's connection, which ends once the client keeps the server waiting for too long."""

import asyncio
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 256
"""Most connections at once, also of clients that ask for nothing."""
OWN_FILES = 32
"""Open files that are no connections."""


def room() -> int:
    """The connections that may be open at once, by the limit of open files.

    Twice as many may come in before one is closed: half as many in each of four turns of the loop.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return CONNECTIONS
    return min(CONNECTIONS, max(2, (files - OWN_FILES) // 3))


def settings(app: ASGIApp, seconds: int) -> uvicorn.Config:
    """How an application is served, to clients who have `seconds`, as in `Connection`."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        backlog=room() // 2,
        # those that were left to make room still count for some turns of the loop
        limit_concurrency=3 * room(),
        timeout_keep_alive=seconds,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=3,
    )


class Connection(H11Protocol):
    """A connection that is awaited for at most `timeout_keep_alive` seconds at a time.

    It is awaited as long as nothing can be done for its client: until there is a whole request, and
    while the client takes nothing of its answer. Once there are as many connections as there is
    `room` for, the one that has been awaited longest makes room for a new one.
    """

    late: asyncio.TimerHandle

    def wait(self) -> None:
        """Begin to await the client."""
        self.late = self.loop.call_later(self.timeout_keep_alive, self.end)

    @property
    def is_awaited(self) -> bool:
        cycle = self.cycle  # of a request and its answer
        has_no_request = cycle is None or cycle.more_body or cycle.response_complete
        return (has_no_request or self.flow.write_paused) and not self.transport.is_closing()

    def end(self) -> None:
        if self.is_awaited:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wait()
        if len(self.connections) >= room():
            known = cast(set[Connection], self.connections)
            others = [one for one in known if one.is_awaited and one is not self]
            if others:
                min(others, key=lambda one: one.late.when()).end()

    def shutdown(self) -> None:
        """Leave the client in a second: the work for it ends as if it had left."""
        super().shutdown()
        self.loop.call_later(1, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.late.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.late.cancel()
        self.wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.late.cancel()
        self.wait()
