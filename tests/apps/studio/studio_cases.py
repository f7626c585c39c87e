"""What a view of the studio shows, as texts."""

import re
from html import unescape

from tarflowlm_apps.studio.pieces import guarded


def shown(view, catalogue, values) -> str:
    """The last state of a view, without its style and its hidden heading."""
    *_, last = guarded(view)(catalogue, *values)
    return re.sub(r"<style.*?</style>|<h2.*?</h2>", "", last, flags=re.DOTALL)


def words(html: str) -> str:
    """The text of HTML."""
    return unescape(re.sub(r"<[^>]+>", "", html))


def stages(html: str, kind: str = "st-stage") -> list[str]:
    """The texts of the elements of a kind: of a stage, or of a row of passes."""
    return [
        words(found) for found in re.findall(rf'class="{kind}"[^>]*>(.*?)</div>', html, re.DOTALL)
    ]
