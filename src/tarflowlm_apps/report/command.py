"""`tarflowlm report`: runs and models as one HTML page and PNG figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.options import Json, OnDevice
from tarflowlm.errors import UserError
from tarflowlm.options import Out, arg
from tarflowlm.terminal.bars import Bars, print_result


@dataclass(frozen=True, kw_only=True)
class Args(Json, OnDevice):
    """Draw runs and models: samples, curves, blocks and codebook, as one HTML page and PNG figures.

    Needs the extra plots (matplotlib).
    """

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg("MODEL ...")]
    """Run directories, shipped models or hf:OWNER/NAME; several share their figures."""
    out: Out = None
    """Directory to write; by default DIR/report for one run directory. An earlier report is
    replaced.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.directories:
            raise UserError("name a run or model to draw, say `tarflowlm report runs/mine`")


def run(args: Args) -> None:
    from tarflowlm.device import pick_device
    from tarflowlm_apps.report.report import write_report

    with Bars() as bars:
        result = write_report(
            args.directories, args.out, device=pick_device(args.device), progress=bars
        )
    rows = [("page", result["page"]), ("figures", f"{len(result['figures'])} as PNG next to it")]
    for found in result["runs"]:
        rows.append((found["name"], found["status"]))
        rows += [("", note) for note in found["notes"]]
    print_result(args.json, result, "report", rows)
