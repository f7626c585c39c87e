"""Serves the page: to this machine alone by default; nothing leaves the machine."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tarflowlm.errors import UserError
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import HEAD

PORTS = range(7860, 7960)  # tried in turn
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def free_port(host: str, port: int | None) -> int:
    """The given port, or the first free one of PORTS. UserError where there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in PORTS if port is None else (port,):
        try:
            socket.create_server((host, candidate), family=family).close()
            return candidate
        except OSError as error:
            problem = f"cannot serve at {host}, port {candidate} ({error.strerror})"
            if error.errno != errno.EADDRINUSE:
                break
    raise UserError(f"{problem}: choose another")


@contextmanager
def serving(catalogue: Catalogue, *, host: str, port: int) -> Iterator[str]:
    """Serve the page about `catalogue`; gives its address."""
    # read when gradio is imported: no telemetry, no look for a newer version, nothing kept
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # gradio requests its own page to see whether it is up: never through a proxy
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK)))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from tarflowlm.studio.page import build

    # a page elsewhere could let its own name point at this machine (DNS rebinding); gradio itself
    # answers no other origin on localhost
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    blocks = build(catalogue)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        blocked_paths=["/"],
        max_file_size=1,
        head=HEAD,
        theme=gr.themes.Default(primary_hue="sky", font=["system-ui"], font_mono=["ui-monospace"]),
        app_kwargs={"middleware": [trusted], "docs_url": None, "openapi_url": None},
    )
    try:
        yield url
    finally:
        blocks.close(verbose=False)
