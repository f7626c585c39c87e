"""The directory of a run: which run it holds, who may write to it, and its first files."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus
from tarflowlm.errors import UserError
from tarflowlm.files import TEMPORARY, full_disk_as_user_error, read_json, write_json, writer_lock
from tarflowlm.model import LanguageModel
from tarflowlm.processes import Processes
from tarflowlm.runs import ASKED, BEST, CONFIG, METRICS, PARENT, STATE, TOKENIZER, WEIGHTS
from tarflowlm.runs.checkpoint import resume_command, write_run
from tarflowlm.runs.weights import write_weights
from tarflowlm.schema import flatten, from_dict, to_dict
from tarflowlm.training.configure import settled

FROZEN = "frozen"
"""Entry of the header of the weights that a run begins with: the parameters that do not train."""


def is_begun(out: Path) -> bool:
    """Whether `out` holds a run that has saved something. UserError for any other content."""
    if (out / ASKED).exists():
        # a hidden folder is a state that a kill left incomplete
        return (out / WEIGHTS).exists() or any((out / STATE).glob("[!.]*"))
    # hidden files are locks, or were left by a kill
    if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
        raise UserError(f"{out} exists already and is no run to continue: choose another directory")
    return False


def check_same(asked: RunConfig, out: Path) -> None:
    """UserError, naming the first field that differs, unless the run in `out` was asked for so."""
    ours = flatten(settled(asked))
    theirs = flatten(from_dict(RunConfig, read_json(out / ASKED)))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{name} {ours.get(name)}: the run in {out} has {theirs.get(name)}; "
                f"continue that with `{resume_command(out)}`, or choose another --out"
            )


@contextmanager
def only_writer(out: Path, processes: Processes, *, begun: bool) -> Iterator[None]:
    """A context in which the first process is the only writer of `out`, which was `begun` before.

    A full disk and a folder that vanishes are UserErrors, and an interrupt says how to continue.
    """

    def remedy() -> str:
        if is_begun(out):
            return f"continue with `{resume_command(out)}`"
        return "start it again"

    with full_disk_as_user_error(out, remedy), ExitStack() as stack:
        if processes.first:
            # after the lock is given back
            stack.callback(remove_unbuilt, out, is_new=not out.exists())
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(out))
            # remove files that a kill left incomplete
            for leftover in [*out.glob(f".*{TEMPORARY}"), *(out / BEST).glob(f".*{TEMPORARY}")]:
                leftover.unlink()
            for partial in (out / STATE).glob(".step-*"):
                shutil.rmtree(partial)
            if is_begun(out) != begun:
                raise UserError(
                    f"{out} has just been begun by another process: repeat the command to "
                    "continue it"
                )
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(remedy()) from None
        except FileNotFoundError:
            if (out / CONFIG).exists():
                raise
            what = f"{out} was moved or removed while the run was writing to it"
            raise UserError(f"{what}: continue with `tarflowlm train --resume PLACE`") from None


def remove_unbuilt(out: Path, *, is_new: bool) -> None:
    """Remove what `write_start` wrote for a run that could not be built, which has no log."""
    if is_begun(out) or (out / METRICS).exists():
        return
    for name in (ASKED, CONFIG, TOKENIZER, PARENT):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / STATE, ignore_errors=True)
    if is_new:
        shutil.rmtree(out, ignore_errors=True)


def write_start(
    out: Path,
    asked: RunConfig | None,
    config: RunConfig,
    corpus: Corpus,
    parent: LanguageModel | None,
    info: dict[str, str],
) -> None:
    """Write the files that a run directory has from the beginning: among them the weights of the
    model that it begins with, if any, with `info` and the names of its frozen parameters.
    """
    if asked is not None:
        # the first file: it makes the directory a run
        write_json(out / ASKED, to_dict(settled(asked)))
    (out / STATE).mkdir(exist_ok=True)
    shutil.rmtree(out / BEST, ignore_errors=True)  # a run may have been killed before it saved
    if parent is not None:
        frozen = [name for name, p in parent.named_parameters() if not p.requires_grad]
        write_weights(out / PARENT, parent.state_dict(), info | {FROZEN: " ".join(frozen)})
    write_run(out, config, corpus.tokenizer)
