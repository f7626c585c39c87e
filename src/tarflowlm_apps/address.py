"""Where an application serves: by default, at an address that this machine alone reaches."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from tarflowlm import compiled
from tarflowlm.cli.options import OnDevice
from tarflowlm.errors import UserError
from tarflowlm.options import Integer, arg
from tarflowlm.terminal.bars import print_notice

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Serving(OnDevice):
    """A command that serves."""

    port: Integer = None
    """Port to serve at: by default 8000 for `serve`, the first free one from 7860 on for `studio`.
    """
    host: Annotated[str, arg("ADDRESS")] = "127.0.0.1"
    """Address to serve at. The default is reached from this machine alone; 0.0.0.0 is reached from
    everywhere.
    """

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.port is not None and self.port > 65535:
            yield "port", "must be from 1 to 65535"
        if not self.host.strip():
            yield "host", "give an address, as 127.0.0.1"

    def compile_steps(self) -> None:
        """Let steps be compiled beside the start, or say what is missing."""
        if compiled.is_installed():
            threading.Thread(target=compiled.prepare, daemon=True).start()
        else:
            print_notice(compiled.MISSING)

    def warn(self, what: str) -> None:
        """Say who can use `what` is served, if it is not this machine alone."""
        if not is_local(self.host):
            print_notice(
                f"anyone who can reach {self.host} can use this {what}, without a password"
            )


def is_local(host: str) -> bool:
    """Whether a host is this machine alone."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"


def names_of(host: str) -> list[str]:
    """The names under which an application at `host` answers.

    If it serves this machine alone, no others: a page elsewhere could let its own name point here
    (DNS rebinding).
    """
    return [*LOOPBACK, "[::1]", host] if is_local(host) else ["*"]


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at a host, and at its port if one is given. UserError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port or 0), family=family)
    except (OSError, TypeError, UnicodeError) as error:
        where = host if port is None else f"{host}, port {port}"
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise UserError(f"cannot serve at {where} ({reason}): choose another") from None


def in_network(host: str, port: int) -> str | None:
    """The address of a page at a host for other machines; None where only this one reaches it."""
    if host in LOOPBACK:
        return None
    name = host
    if host in ("0.0.0.0", "::"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # no packet is sent: this asks by which of its addresses the machine would go out
        beyond = "2001:db8::1" if ":" in host else "192.0.2.1"
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((beyond, 9))
            name = probe.getsockname()[0]
    if name in ("0.0.0.0", "::"):
        return None
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
