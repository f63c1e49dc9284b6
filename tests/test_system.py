"""What other systems lack is hidden, and commands run as before."""

import builtins
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from litmini import system
from litmini.errors import UserError
from litmini.files import write_atomically

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(monkeypatch):
    """A system without fcntl, sched_getaffinity, /proc and sysconf."""
    real_open = builtins.open

    def no_proc(file, *args, **options):
        if str(file).startswith("/proc"):
            raise FileNotFoundError(file)
        return real_open(file, *args, **options)

    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(builtins, "open", no_proc)


def test_fallbacks(elsewhere, monkeypatch):
    assert system.cpu_count() == os.cpu_count()
    assert system.resident_bytes() == system.peak_resident_bytes() > 2**20
    assert system.physical_bytes() == sys.maxsize
    on_linux = system.peak_resident_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts in bytes
    assert system.peak_resident_bytes() < on_linux / 500
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_resident_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux says")
def test_linux():
    assert 1 <= system.cpu_count() <= (os.cpu_count() or 1)
    assert 2**20 < system.resident_bytes() < 1.1 * system.peak_resident_bytes()  # which the kernel counts less often
    assert system.peak_resident_bytes() < system.physical_bytes()


def check_locks(directory: Path) -> None:
    """Locks exclude each other and another process's, and end with it."""
    unlock = system.try_lock(directory)
    assert unlock is not None and system.try_lock(directory) is None
    unlock()
    with system.locked(directory), pytest.raises(UserError, match="another process is writing"):
        system.lock(directory)
    system.lock(directory)
    system.lock(directory)
    assert system.try_lock(directory) is None
    system.unlock_all()
    with write_atomically(directory / "new") as partial:
        (partial / "a").touch()
        with pytest.raises(UserError, match="another process is writing"):
            write_atomically(directory / "new").__enter__()
    assert [file.name for file in (directory / "new").iterdir()] == ["a"]


def test_locks(tmp_path):
    check_locks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    code = "import sys, litmini.system as s; s.lock(s.Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
    child = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"1\n" and system.try_lock(tmp_path) is None
        process.kill()
        process.wait()
        system.lock(tmp_path)
        system.unlock_all()


def test_locks_without_fcntl(elsewhere, tmp_path):
    check_locks(tmp_path)


def test_finetuning_elsewhere(elsewhere, tiny_dir, tmp_path, monkeypatch, capfd):
    words = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / "run", "--train.max_steps", 2, "--eval.samples", 0]
    words += ["--data.path", ROOT / "config_hub/quickstart/train.jsonl", "--train.global_batch_size", 2]
    words += ["--train.micro_batch_size", 1, "--data.max_seq_len", 128, "--precision", "32-true"]
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["finetune_lora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/finetune_lora.py"), run_name="__main__")
    assert end.value.code == 0, capfd.readouterr().err
    assert (tmp_path / "run/final").is_dir()
