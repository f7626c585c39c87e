"""`tarflowlm studio`: a local page on models and runs."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from tarflowlm.errors import check_package
from tarflowlm.options import Flag, arg
from tarflowlm.terminal.bars import print_notice
from tarflowlm_apps.address import Serving, in_network, listen


@dataclass(frozen=True, kw_only=True)
class Args(Serving):
    """Open a local page that writes, fills in, edits and scores with models, and shows runs as they
    train.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], arg("[MODEL ...]")] = ()
    """Models by name, run directories, folders of runs; by default the shipped models."""
    no_browser: Flag = False
    """Open no browser; the address is printed in any case."""


def run(args: Args) -> None:
    import threading
    from contextlib import suppress
    from urllib.parse import urlsplit

    from tarflowlm.device import pick_device
    from tarflowlm_apps.studio.catalogue import Catalogue
    from tarflowlm_apps.studio.server import serving

    check_package("gradio", "studio", "studio")
    listen(args.host, args.port).close()
    catalogue = Catalogue(args.models, str(pick_device(args.device)))
    args.warn("page")
    args.compile_steps()
    print_notice("starting, which takes some seconds ...")
    with serving(catalogue, host=args.host, port=args.port) as url, suppress(KeyboardInterrupt):
        print(url, flush=True)
        elsewhere = in_network(args.host, urlsplit(url).port or 80)
        if elsewhere is not None:
            print_notice(f"in the network: {elsewhere}")
        print_notice("Ctrl-C ends it")
        if not args.no_browser:
            import webbrowser

            # in a thread, as it may wait for the browser
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        threading.Event().wait()
