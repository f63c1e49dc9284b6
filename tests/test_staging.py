"""Staging directories: whatever others have put beside a target, under whatever name, stays as it was."""

import os
import threading
from pathlib import Path

import pytest

from litmini import staging
from litmini.checkpoints.hf import check_checkpoint_dir
from litmini.errors import UserError
from litmini.files import check_new_file, discard, write_atomically, write_text
from litmini.staging import delete_leftovers, restore


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


NAMES = [".x.partial", ".x.old", ".x.litmini-abcdefgh.partial", ".x.y.litmini-abcdefgh.partial", ".film.partial"]


def plant(parent: Path, kind: str, home: Path) -> None:
    for name in NAMES:
        if kind == "link":
            (parent / name).symlink_to(home)
        elif kind == "file":
            (parent / name).write_text("mine") if "litmini" not in name else None
        else:
            (parent / name / "sub").mkdir(parents=True)
            (parent / name / "sub" / "mine").write_text("mine")


@pytest.mark.parametrize("kind", ["link", "directory", "file"])
def test_what_others_put_there_stays(tmp_path, kind, tiny_dir):
    home, parent = tmp_path / "home", tmp_path / "shared"
    (home / "sub").mkdir(parents=True)
    (home / "thesis").write_text("years")
    (home / staging.MARKER).touch()  # even if it looks like ours, behind a link
    parent.mkdir()
    plant(parent, kind, home)
    before = tree(tmp_path), os.listdir(parent)
    for content in "one", "two":
        with write_atomically(parent / "x") as aside:
            (aside / "a").write_text(content)
    with pytest.raises(UserError, match="incomplete"):
        check_checkpoint_dir(parent / "x")
    restore(parent / "y")
    discard(parent / "x")
    delete_leftovers(parent)
    assert (tree(tmp_path), os.listdir(parent)) == before


def test_a_staging_directory_of_another_user_stays(tmp_path, monkeypatch):
    """Planted with all that ours have, in a directory that everybody may write to."""
    planted = tmp_path / ".x.litmini-abcdefgh.partial"
    (planted / staging.OLD).mkdir(parents=True)
    (planted / staging.MARKER).touch()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    restore(tmp_path / "x")
    delete_leftovers(tmp_path)
    assert (planted / staging.OLD).is_dir() and os.listdir(tmp_path) == [planted.name]
    monkeypatch.undo()
    restore(tmp_path / "x")
    assert (tmp_path / "x").is_dir() and planted.is_dir()
    delete_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_directory_replaces_nothing(tmp_path):
    for there in (lambda path: path.mkdir(), lambda path: path.write_text("a"), lambda path: path.symlink_to("none")):
        target = tmp_path / f"x{len(os.listdir(tmp_path))}"
        with pytest.raises(UserError, match="exists already"), write_atomically(target, new=True) as aside:
            (aside / "a").touch()
            there(target)  # another process, meanwhile
        assert os.path.lexists(target) and not (target / "a").exists()
        with pytest.raises(UserError, match="exists already"):
            write_atomically(target, new=True).__enter__()
    assert len(os.listdir(tmp_path)) == 3


def test_a_failure_at_the_end_brings_the_old_one_back(tmp_path, monkeypatch):
    with write_atomically(tmp_path / "x") as aside:
        (aside / "a").write_text("old")
    rename = Path.rename

    def fails(path, target):
        if path.name == staging.CONTENT:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), write_atomically(tmp_path / "x") as aside:
        (aside / "a").write_text("new")
    assert tree(tmp_path) == {"x/a": b"old"}


def test_of_two_that_begin_at_once_one_is_first(tmp_path):
    for round_ in range(20):
        barrier, ends = threading.Barrier(2), []

        def write(name, target=tmp_path / str(round_), barrier=barrier, ends=ends):
            barrier.wait()
            try:
                with write_atomically(target) as aside:
                    (aside / name).touch()
                    barrier.wait(5)
                ends.append(name)
            except UserError:
                barrier.wait(5)

        both = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        [thread.start() for thread in both]
        [thread.join() for thread in both]
        assert os.listdir(tmp_path / str(round_)) == ends and len(ends) == 1
        assert len(os.listdir(tmp_path)) == round_ + 1


def test_a_text_is_not_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in (f".a.{os.getpid()}.partial", ".a.partial", "a"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "a").read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "new" and len(os.listdir(tmp_path)) == 4


def test_a_new_file_is_checked_before_the_work(tmp_path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for path, reason in {"there": "as a file", "link": "as a file", ".": "as a directory", "no/a": "mkdir -p"}.items():
        with pytest.raises(UserError, match=f"--out .*{reason}"):
            check_new_file(str(tmp_path / path), "--out")
    assert check_new_file(str(tmp_path / "new"), "--out") == tmp_path / "new"
