"""`tarflowlm info` and `tarflowlm runs` in process."""

import json
import shutil
from pathlib import Path

import pytest
from command_cases import put_config

from tarflowlm.files import writer_lock, writer_of
from tarflowlm.runs.released import released


def test_shipped_models_are_listed_and_described(run_json, run):
    models = run_json("info")["models"]
    assert [model["name"] for model in models] == released()
    flow = run_json("info", "english-mini")
    assert (flow["family"], len(flow["blocks"]), flow["layers"]) == ("flow", 3, [6, 1, 1])
    assert flow["shipped"]
    assert flow["draft_parameters"] == 271_776
    assert flow["parameters"]["all"] == 1_847_666 == sum(n for p, n in flow["parameters"].items() if p != "all")
    assert "CC BY-SA" in flow["card"]
    shown = run("info", "english-mini").out
    for part in ("1,847,666", "block 1 mixd", "3,200 steps", "model.safetensors", "CC BY-SA", "27 symbols"):
        assert part in shown
    assert "english-mini-ar" in run("info").out


@pytest.mark.parametrize("name", ["mini-ar", "mini-mixd-p2"])
def test_a_run_of_ones_own(run_json, run, models, name):
    found = run_json("info", models[name])
    summary = json.loads((models[name] / "summary.json").read_text(encoding="utf-8"))
    assert (found["bpc"], found["steps"], found["tokens"]) == (summary["test"]["bpc"], 6, summary["tokens"])
    assert found["parameters"]["all"] == summary["parameters"]
    assert found["files"]["config.json"] == (models[name] / "config.json").stat().st_size
    assert found["files"]["state/"] > 0
    shown = run("info", models[name]).out
    assert f"{found['bpc']:.4f} bits per character" in shown
    assert ("2 a position" in shown) == (name == "mini-mixd-p2")


def test_info_of_nothing_is_refused(refused):
    refused("info", "nothing", names=["nothing", "english-mini"])


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """Two finished runs, one of them on another text, a stopped one and a broken one."""
    shutil.copytree(models["mini-ar"], tmp_path / "ar")
    for name in ("stopped", "other", "broken"):
        shutil.copytree(models["mini-mixd"], tmp_path / "deeper" / name)
    (tmp_path / "deeper" / "stopped" / "summary.json").unlink()
    other = tmp_path / "deeper" / "other"
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["data"]["source"] = "english"
    put_config(other, json.dumps(config))
    (tmp_path / "deeper" / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "deeper" / "no-run").mkdir()
    return tmp_path


def test_runs_are_compared(run_json, run, folder):
    rows = {row["name"]: row for row in run_json("runs", folder)["runs"]}
    assert set(rows) == {"ar", *(str(Path("deeper") / name) for name in ("stopped", "other", "broken"))}
    stopped, other, broken = (rows[str(Path("deeper") / name)] for name in ("stopped", "other", "broken"))
    assert (rows["ar"]["state"], rows["ar"]["split"], rows["ar"]["bound"]) == ("finished", "test", "exact")
    assert stopped["state"] == "stopped, step 6 of 6"
    assert (stopped["split"], stopped["tokens"]) == ("valid", 6 * 4 * 32)
    assert stopped["best_step"] in (2, 4, 6)
    assert "config.json" in broken["state"]
    assert broken["bpc"] is None
    # of the two on one text, the one with a test is compared
    assert [row["best"] for row in (rows["ar"], stopped, other, broken)] == [True, False, False, False]
    shown = run("runs", folder)
    assert f"= {rows['ar']['bpc']:.4f} *" in shown.out
    # a table for each text, and one for what cannot be read
    assert shown.out.count("(bpc) and more") == 3


def test_a_model_without_its_log_is_listed_beside_others(run_json, run, models, tmp_path):
    for name in ("copied", "measured"):
        left_out = shutil.ignore_patterns("state", "metrics.jsonl", *(["summary.json"] if name == "copied" else []))
        shutil.copytree(models["mini-mixd"], tmp_path / name, ignore=left_out)
    shutil.copytree(models["mini-ar"], tmp_path / "whole")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    rows = {row["name"]: row for row in run_json("runs", tmp_path)["runs"]}
    copied, measured = rows["copied"], rows["measured"]
    assert (copied["preset"], copied["state"]) == ("mini-mixd", "no log")
    assert copied["bpc"] is copied["tokens"] is copied["seconds"] is None
    assert (measured["state"], measured["tokens"]) == ("finished", 6 * 4 * 32)
    assert (rows["whole"]["state"], rows["whole"]["best"]) == ("finished", True)
    assert "config.json" in rows["broken"]["state"]
    assert "no log" in run("runs", tmp_path / "copied").out


def test_runs_are_sorted_and_best_is_the_lowest(run_json, models):
    rows = run_json("runs", *models.values())["runs"]
    values = [row["bpc"] for row in rows]
    assert values == sorted(values)
    assert [row["best"] for row in rows] == [True] + [False] * (len(rows) - 1)


def test_a_run_in_training_is_seen_by_its_lock(run_json, folder):
    directory = folder / "deeper" / "stopped"
    assert writer_of(directory) is None
    with writer_lock(directory):
        assert writer_of(directory) is not None
        assert run_json("runs", directory)["runs"][0]["state"].startswith("training now")
    # a process that was killed leaves its name, and no lock
    (directory / ".lock.holder").write_text("process 1 on elsewhere\n", encoding="utf-8")
    assert writer_of(directory) is None


def test_folders_without_runs_are_refused(refused, tmp_path):
    refused("runs", names=["tarflowlm runs runs"])
    refused("runs", tmp_path / "none", names=["none", "directory"])
    refused("runs", tmp_path, names=["no run"])
