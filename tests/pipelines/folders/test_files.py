"""Files and folders are written whole or not at all, and what was there is never lost."""

import os
import subprocess
import sys

import pytest

from pipelines.folders.files import read_json, write_file, write_json, written_aside


def filled(folder, text):
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with written_aside(target) as partial:
        partial.write_text("half")
        assert not target.exists() and partial.parent == target.parent
    assert target.read_text() == "half" and os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    target = tmp_path / "target"
    write_file(target, "old") if kind == "file" else filled(target, "old")
    with pytest.raises(KeyError), written_aside(target) as partial:
        write_file(partial, "new") if kind == "file" else filled(partial, "new")
        raise KeyError
    assert (target if kind == "file" else target / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_takes_the_place_of_one_that_is_full(tmp_path):
    target = filled(tmp_path / "target", "old")
    (target / "more").write_text("goes")
    with written_aside(target) as partial:
        filled(partial, "new")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(target) == ["file"]
    assert (target / "file").read_text() == "new"


def test_a_folder_is_not_lost_where_a_process_was_killed_between_the_renames(tmp_path):
    filled(tmp_path / "target.replaced", "old")
    filled(tmp_path / "target.partial", "half")
    with pytest.raises(KeyError), written_aside(tmp_path / "target"):
        raise KeyError
    assert (tmp_path / "target" / "file").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_two_processes_may_write_one_file_at_a_time(tmp_path, monkeypatch):
    """Each beside it under a name of its own; the one that ends last stays."""
    target = tmp_path / "picture.png"
    with written_aside(target, many_writers=True) as first:
        first.write_text("first")
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: 1)
            with written_aside(target, many_writers=True) as second:
                second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    code = (
        "import os, sys\nfrom pipelines.folders.files import written_aside\n"
        f"with written_aside({str(target)!r}) as partial:\n    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert target.read_text() == "old"
    write_file(target, "new")
    assert os.listdir(tmp_path) == ["file"] and target.read_text() == "new"


def test_json_comes_back_and_what_is_none_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "ü"], "a": None}, sort_keys=True)
    assert (tmp_path / "a.json").read_text().startswith('{\n  "a": null')
    assert read_json(tmp_path / "a.json") == {"b": [1, "ü"], "a": None}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not JSON"):
        read_json(tmp_path / "b.json")
