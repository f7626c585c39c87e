"""What the page itself never sends is refused, and costs a line of the terminal at most."""

import logging
from typing import Any

import gradio as gr
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tarflowlm.errors import first_line
from tarflowlm.terminal.bars import print_notice

LONGEST = 200  # letters of an error: it may repeat what was sent


class Blocks(gr.Blocks):  # type: ignore[misc]
    """Blocks for which a wrong value is an error of one line."""

    async def process_api(self, *args: Any, **options: Any) -> dict[str, Any]:
        try:
            return dict(await super().process_api(*args, **options))
        except Exception as error:
            said = line_of(error)
            print_notice(f"a request was refused: {said}")
            raise gr.Error(said, print_exception=False) from None


class WithoutUploads:
    """An application that takes no files: gradio would keep them, and the page has none to send."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        answer = Response("this page takes no files", 404) if is_upload else self.app
        await answer(scope, receive, send)


def in_a_line(record: logging.LogRecord) -> bool:
    """A filter that leaves the first line of an error in the place of its traceback."""
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = f"a request failed: {line_of(record.exc_info[1])}", ()
        record.exc_info = record.exc_text = None
    return True


def line_of(error: BaseException) -> str:
    """The beginning of an error's first line."""
    return f"{first_line(error):.{LONGEST}}"
