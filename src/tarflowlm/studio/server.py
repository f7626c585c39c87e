"""Serves the page: on this machine alone by default, and without anything that leaves the machine."""

import errno
import importlib.util
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from tarflowlm.errors import UserError

PORT, PORTS = 7860, 100
"""The first port that is tried, and how many."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_gradio() -> None:
    """Raises UserError if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the studio needs the package gradio: pip install 'tarflowlm[studio]'")


def free_port(host: str, port: int | None) -> int:
    """The given port, or the first free one from PORT on. UserError for a bad address and a taken port."""
    for candidate in range(PORT, PORT + PORTS) if port is None else (port,):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if os.name == "posix":
                    # a port that was left a moment ago is free
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
            return candidate
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"cannot serve at {host}, port {candidate} ({error.strerror}): choose another"
                ) from None
    taken = f"ports {PORT} to {PORT + PORTS - 1} are" if port is None else f"port {port} is"
    raise UserError(f"{taken} taken: choose another with --port")


class Server:
    """The page, being served until `close`."""

    def __init__(self, build: Callable[[], Any], *, host: str, port: int) -> None:
        """`build` makes the page once gradio may be imported."""
        # read when gradio is imported: no telemetry, no look for a newer version, nothing kept in the browser
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", HF_HUB_DISABLE_TELEMETRY="1")
        # gradio requests its own page to see whether it is up: never through a proxy
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK)))
        logging.getLogger("httpx").setLevel(logging.WARNING)
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from tarflowlm.studio.pieces import HEAD

        # a page elsewhere could let its own name point at this machine (DNS rebinding); gradio itself answers no
        # other origin on localhost
        hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
        self.blocks = build()
        _, self.url, _ = self.blocks.launch(
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
            app_kwargs={
                "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
                "docs_url": None,
                "openapi_url": None,
            },
        )

    def close(self) -> None:
        """Stop serving."""
        self.blocks.close(verbose=False)
