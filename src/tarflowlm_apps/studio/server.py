"""Serves the page, by default to this machine alone. Nothing leaves the machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tarflowlm_apps.address import LOOPBACK, names_of
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.pieces import HEAD


@contextmanager
def serving(catalogue: Catalogue, *, host: str, port: int | None) -> Iterator[str]:
    """Serve the page about `catalogue`, and give its address. Port None takes a free one."""
    # read when gradio is imported: no telemetry, no look for a newer version, nothing kept
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # gradio requests its own page to see whether it is up: never through a proxy
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK, host)))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from tarflowlm_apps.studio.page import WAITING, build
    from tarflowlm_apps.studio.refusals import WithoutUploads, in_a_line

    logging.getLogger("uvicorn.error").addFilter(in_a_line)
    # gradio itself answers no other origin on localhost
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))
    blocks = build(catalogue)
    _, url, _ = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        blocked_paths=["/"],
        # each visitor who waits takes one
        max_threads=2 * WAITING,
        head=HEAD,
        theme=gr.themes.Default(primary_hue="sky", font=["system-ui"], font_mono=["ui-monospace"]),
        app_kwargs={
            "middleware": [trusted, Middleware(WithoutUploads)],
            "docs_url": None,
            "openapi_url": None,
        },
    )
    try:
        yield url
    finally:
        blocks.close(verbose=False)
