"""The start of TEXT8, from a file of the user or by download."""

import hashlib
import zipfile

import pytest

from reproduction import text8_start
from reproduction.recipes import RECIPES
from reproduction.settings import Settings
from tarflowlm.data.text_files import Text8
from tarflowlm.errors import UserError

WHOLE, START = b" anarchism", b" anar"


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    """The path of the start. A file that is not there yet is what would be downloaded."""
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path))
    monkeypatch.setattr(text8_start, "CHARACTERS", len(START))
    monkeypatch.setattr(text8_start, "SHA256", hashlib.sha256(START).hexdigest())
    monkeypatch.setattr(Text8, "url", (tmp_path / "text8.zip").as_uri())
    monkeypatch.setattr(Text8, "md5", hashlib.md5(WHOLE).hexdigest())
    (tmp_path / "sources").mkdir()
    return text8_start.text_path()


def test_it_is_cut_from_text8(text, tmp_path):
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", WHOLE)
    text8_start.obtain(Settings())
    assert text.read_bytes() == START
    sources = {t.run.data.source for t in text8_start.plan_text8_start(Settings())}
    assert sources == {str(text)}


def test_missing_and_wrong_texts_are_named(text):
    with pytest.raises(UserError, match=r"put text8, .*, or its first 5 characters as .*-start"):
        text8_start.obtain(Settings())
    text.write_bytes(b"other")
    with pytest.raises(UserError, match="is not the start of TEXT8: remove it"):
        text8_start.obtain(Settings())
    # another text is not asked for
    text8_start.obtain(Settings(data="mine.txt"))


def test_all_recipes_leave_it_out_without_the_text(run, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("reproduction.running.estimate", lambda settings, plan: [])
    for name in set(RECIPES) - {"lengths", "text8-start"}:
        monkeypatch.delitem(RECIPES, name)
    assert run("all", "--dry-run", "--out", tmp_path / "out").status == 0
    assert "text8-start is left out: cannot fetch" in caplog.text
    assert run("text8-start", "--dry-run", "--out", tmp_path / "out").status == 2
    # with its trainings on record it needs no text
    monkeypatch.setattr("reproduction.records.Records.find", lambda *_: object())
    assert run("text8-start", "--dry-run", "--out", tmp_path / "out").status == 0
