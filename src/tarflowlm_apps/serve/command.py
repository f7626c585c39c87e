"""`tarflowlm serve MODEL`: other programs write, fill in and score by the OpenAI interface."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.cli.signals import handled, of_hang_up
from tarflowlm.errors import UserError, check_package
from tarflowlm.options import Flag, arg
from tarflowlm.runs.hub import PREFIX, shown_name
from tarflowlm.schema import Count
from tarflowlm.terminal.bars import print_json
from tarflowlm_apps.address import Serving, is_local, listen, names_of


@dataclass(frozen=True, kw_only=True)
class Args(Serving, OfModel):
    """Let other programs call a model: the completions of the OpenAI interface, on this machine."""

    EXCLUSIVE: ClassVar = {"no_key": ("api_key",)}

    samples: Count = 8
    """Posterior samples averaged in the log-probabilities of a flow; the baseline is exact."""
    api_key: Annotated[str | None, arg("KEY")] = None
    """Key that every request has to name, as Authorization: Bearer KEY; by default that of the
    environment variable TARFLOWLM_API_KEY, which other users of this machine do not see. Any host
    but this machine alone needs one.
    """
    no_key: Flag = False
    """Let everybody who reaches the host use the model."""
    most_texts: Count = 1024
    """Most texts of a request: its prompts, times n."""
    at_once: Count = 8
    """Requests that the model works on at once, in turn; further ones wait."""
    seconds: Count = 30
    """Seconds that a client has to send its request, or to take a part of its answer."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        key = self.key
        if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
            raise UserError("--api-key: give letters, digits and signs of ASCII, without spaces")
        if not (is_local(self.host) or key or self.no_key):
            yield "host", "others can reach it, add --api-key, or --no-key for everybody"

    @property
    def key(self) -> str | None:
        if self.no_key:
            return None
        if self.api_key is not None:
            return self.api_key
        return os.environ.get("TARFLOWLM_API_KEY") or None


def run(args: Args) -> None:
    from contextlib import suppress

    check_package("starlette", "serve", "serve")
    check_package("uvicorn", "serve", "serve")
    import uvicorn

    from tarflowlm_apps.serve.connection import settings
    from tarflowlm_apps.serve.server import application

    at = listen(args.host, args.port or 8000)
    lm = load_checkpoint(args.directory, args.device)
    args.compile_steps()
    name = shown_name(args.directory, lm.directory).removeprefix(PREFIX)
    if args.key is None:
        args.warn("model")
    app = application(
        lm,
        name,
        args.samples,
        names_of(args.host),
        key=args.key,
        texts=args.most_texts,
        at_once=args.at_once,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{at.getsockname()[1]}/v1"
    end = handled(of_hang_up(lambda *_: signal.raise_signal(signal.SIGTERM)))
    with suppress(KeyboardInterrupt), end:
        if args.json:
            print_json({"url": url, "model": name})
        else:
            print(f"{url} serves {name}; Ctrl-C ends it", flush=True)
        uvicorn.Server(settings(app, args.seconds)).run(sockets=[at])
