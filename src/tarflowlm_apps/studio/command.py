"""`tarflowlm studio`: a local page on models and runs."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from tarflowlm.cli.options import OnDevice
from tarflowlm.errors import UserError, check_package
from tarflowlm.options import Count, Flag, arg
from tarflowlm.terminal.bars import print_notice


@dataclass(frozen=True, kw_only=True)
class Args(OnDevice):
    """Open a local page that writes, fills in, edits and scores with models, and shows runs as they
    train.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], arg("[MODEL ...]")] = ()
    """Models by name, run directories, folders of runs; by default the shipped models."""
    port: Count = None
    """Port to serve at; the default is the first free one from 7860 on."""
    host: Annotated[str, arg("ADDRESS")] = "127.0.0.1"
    """Address to serve at. The default is reached from this machine alone; 0.0.0.0 is reached from
    everywhere.
    """
    no_browser: Flag = False
    """Open no browser; the address is printed in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"port {self.port}: must be from 1 to 65535")
        if not self.host.strip():
            raise UserError(f"host {self.host!r}: give an address, as 127.0.0.1")


def run(args: Args) -> None:
    import threading
    from contextlib import suppress

    from tarflowlm.processes import pick_device
    from tarflowlm_apps.studio.catalogue import Catalogue
    from tarflowlm_apps.studio.server import LOOPBACK, check_address, serving

    check_package("gradio", "studio", "studio")
    check_address(args.host, args.port)
    catalogue = Catalogue(args.models, str(pick_device(args.device)))
    if args.host not in LOOPBACK:
        print_notice(f"anyone who can reach {args.host} can use this page, without a password")
    print_notice("starting, which takes some seconds ...")
    with serving(catalogue, host=args.host, port=args.port) as url, suppress(KeyboardInterrupt):
        print(url, flush=True)
        print_notice("Ctrl-C ends it")
        if not args.no_browser:
            import webbrowser

            # in a thread, as it may wait for the browser
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        threading.Event().wait()
