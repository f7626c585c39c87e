"""The model hub, where it is out of reach: fail at once and in one line."""

import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def check_reachable() -> None:
    """ConnectionError where the hub's name cannot be resolved; the hub's client would retry for half a minute."""
    import huggingface_hub

    if urllib.request.getproxies():
        return  # the proxy resolves names
    endpoint = huggingface_hub.constants.ENDPOINT
    parts = urllib.parse.urlsplit(endpoint)
    host = parts.hostname or endpoint
    try:
        socket.getaddrinfo(host, parts.port or 443)
    except OSError:
        raise ConnectionError(f"offline: {host} cannot be resolved") from None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the retry warnings of the hub's client, which would bury the one line that matters."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
