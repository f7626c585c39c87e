"""The names of corpora, and what a user's source stands for."""

import os
from collections.abc import Callable
from pathlib import Path

from tarflowlm.data.documents import Documents
from tarflowlm.data.sources import English, Source, TextFile
from tarflowlm.data.text8 import Text8
from tarflowlm.errors import UserError

_REGISTRY: dict[str, Callable[[], Source]] = {"english": English, "text8": Text8, "openwebtext": Documents}
SOURCE_NAMES = tuple(_REGISTRY)


def resolve_source(source: str) -> Source:
    """The registered source of that name, or the text file at that path (`./english` for a file so named).

    Nothing is fetched yet. UserError for a name that is neither.
    """
    if source in _REGISTRY:
        return _REGISTRY[source]()
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        raise UserError(f"{source!r} is a directory and no prepared corpus (no meta.json): give a text file")
    if not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        raise UserError(
            f"{source!r} is no file and no corpus name: give a text file or one of {', '.join(_REGISTRY)}"
        )
    return TextFile(Path(path))
