"""`tarflowlm serve MODEL`: other programs write, fill in and score by the OpenAI interface."""

import signal
from dataclasses import dataclass

from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.cli.signals import handled, of_hang_up
from tarflowlm.errors import check_package
from tarflowlm.runs.hub import PREFIX, shown_name
from tarflowlm.schema import Count
from tarflowlm.terminal.bars import print_json
from tarflowlm_apps.address import Serving, listen, names_of


@dataclass(frozen=True, kw_only=True)
class Args(Serving, OfModel):
    """Let other programs call a model: the completions of the OpenAI interface, on this machine."""

    samples: Count = 8
    """Posterior samples averaged in the log-probabilities of a flow; the baseline is exact."""
    most_texts: Count = 1024
    """Most texts of a request: its prompts, times n."""
    at_once: Count = 8
    """Requests that the model works on at once, in turn; further ones wait."""
    seconds: Count = 30
    """Seconds that a client has to send its request, or to take a part of its answer."""


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
    args.warn("model")
    app = application(
        lm,
        name,
        args.samples,
        names_of(args.host),
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
