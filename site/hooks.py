"""What the site shows besides docs/: the pages outside of it, the tutorial, the API, one model.

MkDocs calls the functions `on_...` at a build (mkdocs.yml).
"""

import json
import posixpath
import re
import runpy
from html import unescape
from pathlib import Path, PurePosixPath

from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tarflowlm

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "first_hour.md": "examples/first_hour.md",
    "tutorial.md": "docs/tutorial.ipynb",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site that are no Markdown files in docs/, with their sources."""

API = {
    "texts": (
        "Models and texts",
        "load from_pretrained Pretrained Scores score train resume UserError",
    ),
    "models": (
        "PyTorch modules and functions",
        "TarFlowLM TokenLM elbo importance_weighted_bound evaluate generate",
    ),
    "configuration": (
        "Configuration",
        """
        preset RunConfig FlowConfig BaselineConfig coupling layer tokenizer optimizer schedule
        model_config.LanguageModelConfig
        model_config.BlockConfig model_config.Affine model_config.TokenAffine model_config.Mix1
        model_config.MixD model_config.TransformerConfig
        config.DataConfig config.TokenizerConfig config.TrainConfig config.OptimConfig
        """,
    ),
    "flow": (
        "The flow",
        """
        flow.numerics.mixture_cdf flow.numerics.mixture_cdf_inverse
        flow.numerics.mixture_log_density flow.numerics.mixture.rosenblatt
        flow.numerics.rosenblatt_inverse flow.numerics.mixture_log_prob
        flow.numerics.log_standard_normal flow.numerics.standard_normal_log_prob
        flow.vectors.VectorFlow flow.stack.Prior flow.stack.FlowBlock flow.order.Order
        flow.codebook.Codebook
        flow.couplings.Coupling flow.channelwise.ChannelCoupling flow.channelwise.AffineCoupling
        flow.channelwise.Mix1Coupling flow.mixd.MixDCoupling flow.heads.HeadShape
        flow.heads.AutoregressiveHead flow.transformer.Layer
        """,
    ),
}
"""Pages of the API: a title, and the names below `tarflowlm` in their order."""

SHOWN = {".md", ".png", ".csv", ".html"}
"""Files in docs/ that are on the site; others are linked in the repository."""

CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
"""A relative link or picture."""
BADGE = re.compile(r"\[!\[[^]]*\]\(https?:[^)]*\)\]\([^)]*\)\n*")
"""A picture from elsewhere, which the site does not fetch."""
BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
"""A block of code: its language, and its lines."""
FORMULA = re.compile(
    r'(<(?:span|div) class="arithmatex">)\s*\\([(\[])(.*?)\\[)\]]\s*(?=</)', re.DOTALL
)
"""A formula as arithmatex leaves it, \\( in a line \\) or \\[ on lines of its own \\]."""
TAG = re.compile(r"\\tag\{([^}]*)\}")
WIDE = 84  # characters of code that a page shows without scrolling
CUT = 115  # samples are cut at about 140 characters, and at no less than this


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = as_markdown(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    for page, content in api_pages().items():
        files.append(File.generated(config, page, content=content))
    build = runpy.run_path(str(ROOT / "site" / "passes" / "build.py"))["build"]
    demo = build(tarflowlm.load("english-passes"), "english-passes")
    files.append(File.generated(config, "passes.html", content=demo))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Markdown as GitHub reads it, for Python-Markdown."""
    name = page.file.src_uri
    if name == "index.md":
        page.meta["hide"] = ["navigation"]  # it has no neighbours
    source = PurePosixPath(ELSEWHERE.get(name, f"docs/{name}"))
    if name == "samples.md":
        markdown = uncut(markdown)
    markdown = BADGE.sub("", comments_above(markdown))
    return indented_lists(relinked(markdown, source, PurePosixPath(name), config.repo_url))


def on_page_content(html: str, **_: object) -> str:
    """The page with its formulas in MathML, which browsers set by themselves."""
    return FORMULA.sub(lambda found: found[1] + mathml(found[3], found[2] == "["), html)


def mathml(formula: str, is_display: bool) -> str:
    """A formula of TeX, escaped for HTML, in MathML; its number follows it."""
    # the line ends that GitHub reads
    converter = LatexToMathML(macros={"cr": r"\\"}, fancy_error=False)
    tex = unescape(formula)
    number = TAG.search(tex)
    found = converter.convert_with_local_state(TAG.sub("", tex), displaystyle=is_display)
    # a selector of a style that many fonts lack, and show as a box
    found = found.replace("\ufe00", "")
    return found if number is None else f'{found}<span class="tag">({number[1]})</span>'


def uncut(markdown: str) -> str:
    """Samples as their lines were written: the page wraps them by itself."""

    def joined(found: re.Match[str]) -> str:
        return re.sub(rf"(?m)^(.{{{CUT},}})\n(?!```)", r"\1 ", found[0])

    return BLOCK.sub(joined, markdown)


def comments_above(markdown: str) -> str:
    """Commands, in blocks without a language, with comments that are too far right above them."""

    def moved(found: re.Match[str]) -> str:
        if found[1]:
            return found[0]
        lines = []
        for line in found[2].splitlines():
            command, sign, comment = line.partition("  # ")
            is_moved = sign and command.strip() and len(line) > WIDE
            lines += [f"# {comment}", command.rstrip()] if is_moved else [line]
        return "```bash\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(moved, markdown)


def relinked(markdown: str, source: PurePosixPath, page: PurePosixPath, repository: str) -> str:
    """A page with links as on the site: to its pages, else to the repository.

    `source` is the file in which the links were written, `page` where it is on the site.
    """
    places = {path: place for place, path in ELSEWHERE.items()}

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(source.parent / found[2])
        anchor = found[3] or ""
        inside = places.get(path)
        if inside is None and path.startswith("docs/") and PurePosixPath(path).suffix in SHOWN:
            inside = path.removeprefix("docs/")
        if inside is not None:
            up = "../" * (len(page.parts) - 1)
            return f"{found[1]}{up}{inside}{anchor}"
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: {found[2]} does not exist")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{found[1]}{repository}/{kind}/main/{path}{anchor}"

    # every second part is code
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def indented_lists(markdown: str) -> str:
    """Lists in lists are indented by four spaces instead of two."""
    return re.sub(r"(?m)^  (?=[-*] )", "    ", markdown)


def as_markdown(notebook: str) -> str:
    """A notebook as a page: its texts, code, and what that printed."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            else:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def api_pages() -> dict[str, str]:
    """The pages of the API. PluginError if they leave out a public name."""
    named = " ".join(names for _, names in API.values()).split()
    missing = set(dir(tarflowlm)) - set(named)
    if missing:
        raise PluginError(f"site/hooks.py names no page for {', '.join(sorted(missing))}")
    pages = {}
    for page, (title, names) in API.items():
        entries = "\n\n".join(f"::: tarflowlm.{name}" for name in names.split())
        pages[f"api/{page}.md"] = f"# {title}\n\n{entries}\n"
    return pages
