"""What is published: the wheel, the source distribution, the citation and the release."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from docs_cases import ROOT, module_at
from tarflowlm.runs.hub import released

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(target: str, project: Path, out: Path) -> Path:
    """The path of a wheel or sdist of the project, built without fetching anything."""
    code = (
        "import sys, hatchling.build as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    )
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, target, str(out)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_models_and_texts_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "tarflowlm/py.typed" in names
    reports = ("grid.css", "hub/card.md", "report/page.css", "report/figures.mplstyle")
    looks = (*reports, "studio/studio.css", "studio/studio.js")
    assert {f"tarflowlm_apps/{file}" for file in looks} <= set(names)
    for model in released():
        folder = f"tarflowlm/runs/released/{model}"
        assert {
            f"{folder}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")
        } <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "tarflowlm",
        "tarflowlm_apps",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    texts = ("tales/tales.txt.xz", "stories/README.md", "stories/LICENSE")
    texts += tuple(f"stories/stories_{split}.txt.xz" for split in ("train", "valid", "test"))
    assert {f"tarflowlm/data/{text}" for text in texts} <= set(names)
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "src/tarflowlm/data/stories/LICENSE"}
    assert wheel.stat().st_size < 44e6


@pytest.mark.slow
@pytest.mark.nightly
def test_the_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    source = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / source.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(wheel, tmp_path):
    place = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(place),
    ]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    code = "import tarflowlm, runpy; print(tarflowlm.__file__); "
    code += "runpy.run_module('tarflowlm', run_name='__main__')"
    argv = ["sample", "english-mini", "--num", "1", "--length", "16", "--seed", "3", "--json"]
    how = {
        "env": os.environ | {"PYTHONPATH": str(place)},
        "capture_output": True,
        "text": True,
        "timeout": 300,
    }
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, **how)
    assert done.returncode == 0, done.stderr
    where, result = done.stdout.splitlines()
    assert Path(where).is_relative_to(place)
    assert '"text": ' in result


def test_the_citation_names_the_software_and_the_paper():
    citation = pytest.importorskip("yaml").safe_load(
        (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    )
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == PROJECT["authors"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"].split(" AND ")[0]  # that of the software
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2507.00425")
    assert len(paper["authors"]) == 9


def test_the_page_on_the_index_has_no_relative_links():
    pytest.importorskip("hatchling")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = module_at("hatch_build.py").with_absolute_links(readme, "https://x.org/a/b", "v1.2.3")
    assert "](https://x.org/a/b/raw/v1.2.3/docs/stories.png)" in page
    assert "](https://x.org/a/b/blob/v1.2.3/docs/math.md)" in page
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert all(target.startswith(("https://", "#")) for target in targets)


@pytest.fixture
def release(tmp_path):
    """The script of a release, and a project of version 1.2.3 that agrees with itself."""
    texts = {
        "pyproject.toml": '[project]\nversion = "1.2.3"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\ndate-released: 2030-01-02\n",
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n- later\n\n"
        "## [1.2.3] - 2030-01-02\n\n- a change\n\n## [1.2.2] - 2029-01-02\n\n- earlier\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return module_at(".ci/release.py"), tmp_path


def test_a_release_has_the_notes_of_its_version(release):
    module, root = release
    assert module.notes("v1.2.3", root) == "- a change\n"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2"),
        ("CITATION.cff", "2030-01-02", "2030-01-03"),
        ("CHANGELOG.md", "## [1.2.3]", "## [1.2.4]"),
    ],
)
def test_a_release_that_disagrees_with_itself_is_refused(release, file, old, new):
    module, root = release
    text = (root / file).read_text(encoding="utf-8")
    (root / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=r"v1\.2\.3|1\.2\.3|2030"):
        module.notes("v1.2.3", root)


def test_the_environment_of_the_figures_is_one_that_the_package_allows():
    lines = (ROOT / "constraints" / "figures.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for needed in [*PROJECT["dependencies"], *extras["plots"], *extras["quality"]]:
        requirement = Requirement(needed)
        name = requirement.name.replace("_", "-")
        assert Version(pins[name]) in requirement.specifier, needed


def test_workflows_and_forms_are_read():
    """They are YAML, call scripts that exist, and a new push ends the runs of the one before."""
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name != "workflows":
            continue
        assert "group" in content["concurrency"], path
        assert content["permissions"] == {"contents": "read"}, path
        steps = [step for job in content["jobs"].values() for step in job["steps"]]
        commands = "\n".join(step.get("run", "") for step in steps)
        for called in re.findall(r"\.ci/[\w.]+", commands):
            assert (ROOT / called).is_file(), called
