"""What is published: the wheel, the source distribution and the citation."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from docs_cases import ROOT
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
def test_the_wheel_holds_the_models_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "tarflowlm/py.typed" in names
    looks = ("studio/studio.css", "studio/studio.js", "views/grid.css", "views/page.css")
    assert {f"tarflowlm/{file}" for file in (*looks, "views/figures.mplstyle")} <= set(names)
    for model in released():
        folder = f"tarflowlm/runs/released/{model}"
        assert {
            f"{folder}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")
        } <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "tarflowlm",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    assert wheel.stat().st_size < 25e6


@pytest.mark.slow
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
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2507.00425")
    assert len(paper["authors"]) == 9
