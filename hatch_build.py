"""The page on PyPI: README.md with links to the files of its version on GitHub."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata["urls"]["Homepage"]
        text = with_absolute_links(readme, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(markdown: str, repository: str, tag: str) -> str:
    """The text with relative links and pictures led to a tag of the repository."""

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found["picture"] else "blob"
        target = f"{repository}/{kind}/{tag}/{found['path']}"
        return f"{found['picture']}[{found['text']}]({target})"

    return LINK.sub(absolute, markdown)
