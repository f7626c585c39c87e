"""`tarflowlm studio`: a local page on models and runs."""

import sys
import threading

from tarflowlm.cli.arguments import StudioArgs
from tarflowlm.device import pick_device
from tarflowlm.studio.catalogue import collect
from tarflowlm.studio.server import LOOPBACK, Server, check_gradio, free_port


def run_studio(args: StudioArgs) -> None:
    check_gradio()
    port = free_port(args.host, args.port)
    catalogue = collect(args.models, str(pick_device(args.device)))
    if args.host not in LOOPBACK:
        _say(f"anyone who can reach {args.host} can use this page, without a password")
    _say("starting, which takes some seconds ...")

    def build() -> object:
        from tarflowlm.studio.page import build

        return build(catalogue)

    server = Server(build, host=args.host, port=port)
    try:
        print(server.url, flush=True)
        _say("Ctrl-C ends it")
        if not args.no_browser:
            import webbrowser

            # it may wait for the browser
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()


def _say(line: str) -> None:
    print(f"tarflowlm: {line}", file=sys.stderr, flush=True)
