"""The routes: one request after the other is worked on, and whoever leaves costs nothing more."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tarflowlm.errors import UserError, first_line
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.schema import from_dict
from tarflowlm_apps.serve.answers import MOST, Answer, Completion, Part

BYTES = 2 << 20  # the longest body
LOOK = 0.5  # seconds between two looks whether a client still waits for a long step


def application(
    lm: Checkpoint,
    name: str,
    draws: int,
    hosts: list[str],
    *,
    key: str | None,
    texts: int,
    at_once: int,
) -> Starlette:
    """The routes for a model called `name`, under these `hosts`, for those who know the `key`.

    `draws` and `texts` as in `Answer`; the model works on `at_once` requests, the others wait.
    """
    places = asyncio.Semaphore(at_once)
    # one thread works, in turn: several would slow each other down, and each keep memory
    worker = ThreadPoolExecutor(1)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tarflowlm"}

    async def completions(request: Request) -> Response:
        ask = await read_body(request)
        if ask.model != name:
            return unknown_model(request, ask.model)
        answer = Answer(ask, lm, draws, texts)
        parts = worked(request, answer)
        await anext(parts, None)  # what the model cannot do is an error, also for a stream
        head: dict[str, Any] = {"id": f"cmpl-{time.time_ns():x}", "created": int(time.time())}
        head |= {"object": "text_completion", "model": name}
        if ask.stream:
            sent = events(request, answer, parts, head)
            return StreamingResponse(sent, media_type="text/event-stream")
        whole: dict[int, Part] = {}
        async with aclosing(parts):
            async for some in parts:
                for part in some:
                    before = whole.get(part["index"], {"text": ""})
                    whole[part["index"]] = part | {"text": before["text"] + part["text"]}
        head["choices"] = [whole[index] for index in sorted(whole)]
        return JSONResponse(head | {"usage": answer.usage} | answer.notices)

    async def worked(request: Request, answer: Answer) -> AsyncGenerator[list[Part], None]:
        """The parts of an answer, as long as its client is there.

        The model does not wait for a client: one that takes no part for LOOK seconds loses its
        place to others.
        """
        steps, loop = answer.parts(), asyncio.get_running_loop()
        place = Place(places)
        step: asyncio.Future[list[Part] | None] | None = None
        try:
            while True:
                await place.take()
                if await request.is_disconnected():
                    return
                step = loop.run_in_executor(worker, next, steps, None)
                while not (await asyncio.wait([step], timeout=LOOK))[0]:
                    if await request.is_disconnected():
                        return
                if (parts := step.result()) is None:
                    return
                late = loop.call_later(LOOK, place.leave)
                yield parts
                late.cancel()
        finally:
            place.leave()
            if step is not None:
                step.cancel()  # if it has not begun
            answer.progress.is_over = True
            worker.submit(steps.close)  # after the step that may still be at work

    async def events(
        request: Request,
        answer: Answer,
        parts: AsyncGenerator[list[Part], None],
        head: dict[str, Any],
    ) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(parts):
                async for some in parts:
                    for part in some:
                        yield f"data: {json.dumps(head | {'choices': [part]})}\n\n"
        except Exception as error:
            if not isinstance(error, UserError):
                logging.getLogger("uvicorn.error").error("a stream ended early", exc_info=error)
            yield f"data: {failed(request, error).body.decode()}\n\n"
        if answer.ask.wants_usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': answer.usage})}\n\n"
        yield "data: [DONE]\n\n"

    async def models(request: Request) -> Response:
        asked = request.path_params.get("model")
        if asked not in (None, name):
            return unknown_model(request, asked)
        return JSONResponse(card if asked else {"object": "list", "data": [card]})

    def unknown_model(request: Request, asked: str) -> Response:
        said = f"model {asked!r:.80}: this server has {name!r} alone, name that"
        return failed(request, HTTPException(404, said), "model_not_found")

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
    ]
    kinds: tuple[type[Exception], ...] = (UserError, HTTPException, ClientDisconnect, Exception)
    middleware = [Middleware(Ending), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    if key is not None:
        middleware.append(Middleware(Locked, key=key))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=dict.fromkeys(kinds, failed),
    )


class Place:
    """A place among those on whose requests the model works."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self.places = places
        self.is_taken = False

    async def take(self) -> None:
        if not self.is_taken:
            await self.places.acquire()
            self.is_taken = True

    def leave(self) -> None:
        if self.is_taken:
            self.places.release()
            self.is_taken = False


class Ending:
    """A request that the end of the server cancels ends without a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await self.app(scope, receive, send)


class Locked:
    """An application for those who name the key, as Authorization: Bearer KEY."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # the time that this takes does not tell how much of a key is right
        is_key = hmac.compare_digest(given.strip().encode(), self.key)
        if scheme.lower() == "bearer" and is_key:
            await self.app(scope, receive, send)
            return
        said = "no request without the key: send Authorization: Bearer KEY"
        error = HTTPException(401, said, {"WWW-Authenticate": "Bearer"})
        await failed(request, error, "invalid_api_key")(scope, receive, send)


async def read_body(request: Request) -> Completion:
    """The request in a body of JSON, in which null stands for a default."""
    kind, *_ = request.headers.get("content-type", "").split(";")
    if kind.strip().lower() != "application/json":
        # pages of other origins may send other types without asking, with any parameters
        raise HTTPException(415, "the body is no JSON: send Content-Type: application/json")
    kept, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        kept += chunk if size <= BYTES else b""  # a longer one is read, so that its end is answered
    if size > BYTES:
        raise HTTPException(413, f"a body of {size:,} bytes: send at most {BYTES:,}")
    try:
        body = json.loads(kept)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise UserError('the body is no JSON object: send {"model": ..., "prompt": ...}')
    if (count := sum(map(num_items, body.values()))) > 2 * MOST:
        raise UserError(f"lists of {count:,} items in all: send at most {MOST:,} tokens")
    given = {name: value for name, value in body.items() if value is not None}
    return from_dict(Completion, given, "")


def num_items(value: object) -> int:
    """The items of a list and of the lists in it."""
    return len(value) + sum(map(num_items, value)) if isinstance(value, list) else 0


def failed(_request: Request, error: Exception, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form. One that is nobody's fault also goes to the log."""
    status = 400 if isinstance(error, UserError) else getattr(error, "status_code", 500)
    said = str(getattr(error, "detail", "")) or first_line(error)
    if said == "Not Found":
        said = "there are /v1/completions and /v1/models here: ask for one of them"
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = said[:500].encode("utf-8", "backslashreplace").decode()
    found = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": found}, status, getattr(error, "headers", None))
