"""Files of torch.save in whatever archive: the values that were saved, or an error; never other values, never long work."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from litmini.errors import UserError
from litmini.importers.pickles import Pickle

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {f"t{i}": torch.randn(40 + i, 50) for i in range(5)}  # sizes that differ, and one that does not
    tensors |= {
        "same": torch.randn(40, 50),
        "ints": torch.arange(10),
        "empty": torch.zeros(0),
        "half": torch.ones(3).half(),
    }
    tensors |= {"row": tensors["t0"][3], "turned": tensors["t1"].T, "again": tensors["t0"]}
    torch.save(tensors, tmp_path / "saved.bin")
    return tmp_path / "saved.bin", tensors


def zip_again(file: Path, method: int = STORED, order=lambda names: names, edit=lambda name, content: content) -> Path:
    again = file.with_name("again.bin")
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(again, "w", method) as written:
        for name in order(archive.namelist()):
            if (content := edit(name, archive.read(name))) is not None:
                written.writestr(name, content)
    return again


WAYS = {
    "stored": {},
    "deflated": {"method": DEFLATED},
    "another order": {"order": lambda names: names[::-1]},
    "another order, deflated": {"order": lambda names: [*names[7:], *names[:7]], "method": DEFLATED},
    "without what torch adds for its offsets": {"edit": lambda name, c: None if "/." in name else c},
    "without byte order": {"edit": lambda name, c: None if name.endswith("byteorder") else c},
    "larger records": {"edit": lambda name, c: c + b"\0" * 99 if "/data/" in name else c},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_archive_that_was_zipped_again_has_the_same_values(saved, way):
    file, tensors = saved
    read = Pickle(zip_again(file, **WAYS[way]))
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read.get(name), tensor), name
        assert read.get(name, meta=True).shape == tensor.shape


BROKEN = {
    "big-endian": (lambda name, c: b"big" if name.endswith("byteorder") else c, "byte order"),
    "unknown byte order": (lambda name, c: b"\xff" * 99 if name.endswith("byteorder") else c, "byte order"),
    "a record is shorter": (lambda name, c: c[:-4] if name.endswith("data/0") else c, "shorter than t0"),
    "a record is missing": (lambda name, c: None if name.endswith("data/0") else c, "truncated or damaged"),
    "no pickle": (lambda name, c: None if name.endswith("data.pkl") else c, "no data.pkl"),
    "many opcodes": (lambda name, c: b"}" * 10**8 if name.endswith("data.pkl") else c, "holds more than tensors"),
}


@pytest.mark.parametrize("method", [STORED, DEFLATED])
@pytest.mark.parametrize("kind", BROKEN)
def test_an_archive_that_is_no_longer_whole_is_an_error(saved, kind, method):
    """In a process of its own: a wrong byte order was a segmentation fault."""
    edit, reason = BROKEN[kind]
    again = zip_again(saved[0], method, edit=edit)
    if kind in ("big-endian", "many opcodes"):
        code = f"from pathlib import Path; from litmini.importers.pickles import Pickle; Pickle(Path({str(again)!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and "UserError" in done.stderr and reason in done.stderr
        return
    with pytest.raises(UserError, match=reason):
        read = Pickle(again)
        [read.get(name) for name in read.tensors]


def test_flipped_bits_of_a_packed_record_are_an_error(saved):
    again = zip_again(saved[0], DEFLATED)
    content = bytearray(again.read_bytes())
    with zipfile.ZipFile(again) as archive:
        start = next(info for info in archive.infolist() if info.filename.endswith("data/0")).header_offset
    content[start + 200] ^= 0xFF
    again.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Pickle(again).get("t0")


def test_a_name_that_stands_twice_is_an_error(saved):
    again = zip_again(saved[0])
    with zipfile.ZipFile(again, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), b"other")
    with pytest.raises(UserError, match="names twice"):
        Pickle(again)


def test_old_files_are_bounded_too(tmp_path, saved):
    """Of torch before 1.6: three pickles, then that of the tensors."""
    file = tmp_path / "old.bin"
    torch.save(saved[1], file, _use_new_zipfile_serialization=False)
    read = Pickle(file)
    assert all(torch.equal(read.get(name), tensor) for name, tensor in saved[1].items())
    content = file.read_bytes()
    file.write_bytes(content[: content.index(b"\x80\x02}q\x00(X\x02\x00\x00\x00t0")] + b"\x80\x02" + b"}" * 3_000_000)
    with pytest.raises(UserError, match="opcodes"):
        Pickle(file)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch._neg_view(torch.ones(3)), "x is sparse, quantised or a negative view"),
        (torch.ones(3, device="meta"), "x has no values: it was saved from the meta device"),
    ],
)
def test_tensors_that_are_not_their_bytes_are_refused(tmp_path, tensor, reason):
    torch.save({"x": tensor}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=reason):
        Pickle(tmp_path / "x.bin")


def test_a_directory_that_names_the_place_of_another_record_is_damaged(saved):
    file = zip_again(saved[0])
    content = bytearray(file.read_bytes())
    at = {name: content.rindex(name) for name in (b"saved/data/1", b"saved/data/2")}
    first, second = (slice(i - 4, i) for i in at.values())  # offset of the record, before its name in the directory
    content[first], content[second] = content[second], content[first]
    file.write_bytes(content)
    with pytest.raises(UserError, match="its place in the directory is that of another"):
        Pickle(file).get("t1")
