"""Data sets of the hub: which files are meant, and a small server that speaks as much of the hub's protocol as they need."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from litmini.config.finetune import DataConfig
from litmini.data.dataset import load_data
from litmini.data.hub_datasets import choose_files, find_files
from litmini.data.pretrain.text import find_sources, read_pieces
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(*texts: str) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"prompt": ["Say it: "] * len(texts), "completion": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


class Hub(BaseHTTPRequestHandler):
    """Two data sets: acme/mugs, in two shards and a test split, and acme/gated."""

    files = {  # noqa: RUF012
        "README.md": b"# mugs",
        "data/train-00000-of-00002.parquet": parquet("one", "two"),
        "data/train-00001-of-00002.parquet": parquet("three"),
        "data/test-00000-of-00001.parquet": parquet("four"),
    }

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "acme/gated" in path:
            return self.answer(403, error="GatedRepo")
        if "acme/mugs" not in path:
            return self.answer(404, error="RepoNotFound")
        if path.startswith("/api/datasets/"):
            if "/revision/" in path and not path.endswith(("/main", "/v1", COMMIT)):
                return self.answer(404, error="RevisionNotFound")
            if tree := re.search(r"/tree/\w+/?(.*)", path):
                return self.answer(200, json.dumps(self.listing(tree[1])).encode())
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(200, json.dumps({"id": "acme/mugs", "sha": COMMIT, "siblings": siblings}).encode())
        content = self.files[re.split(r"/datasets/acme/mugs/resolve/\w+/", path)[1]]
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.answer(206, content[int(part[1]) : int(part[2]) + 1]) if part else self.answer(200, content)

    def listing(self, folder: str) -> list[dict]:
        """Everything below a folder, which is more than was asked for, but not wrong."""
        names = [name for name in self.files if name.startswith(folder)]
        files = [{"type": "file", "path": n, "size": len(self.files[n]), "oid": f"{len(n):x}"} for n in names]
        return files + ([] if folder else [{"type": "directory", "path": "data", "oid": "d"}])

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{abs(hash(body))}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    server.shutdown()
    server.server_close()


def test_text_of_a_data_set_is_streamed() -> None:
    """As prepare_data.py and train_tokenizer.py read hf://datasets/ORG/NAME."""
    sources = find_sources(["hf://datasets/acme/mugs/data/train*"])
    assert [s.name.rsplit("/", 1)[-1] for s in sources] == sorted(n[5:] for n in Hub.files if "train" in n)
    texts = [piece.text for source in sources for piece in read_pieces(source, "completion")]
    assert texts == ["one", "two", "three"]
    with pytest.raises(UserError, match="hf://datasets/acme/none cannot be listed: .*repository not found"):
        find_sources(["hf://datasets/acme/none"])


def test_a_data_set_by_id(tokenizer_dir: Path, tmp_path: Path) -> None:
    """All shards of the split, in order; together with a local file; the manifest's names do not depend on the machine."""
    tokenizer = Tokenizer(tokenizer_dir)
    local = tmp_path / "a.jsonl"
    local.write_text('{"prompt": "a", "completion": "five"}\n')
    config = DataConfig(["hub:acme/mugs@v1", str(local)], val_path="hub:acme/mugs:test")
    train, val, val_examples = load_data(config, tokenizer, 0)
    texts = [tokenizer.decode([i for i in train[n][1].tolist() if i >= 0]) for n in range(len(train))]
    assert texts == ["one", "two", "three", "five"] and train.table["set"].tolist() == [0, 0, 0, 1]
    assert val is not None and len(val) == 1 and val_examples[0].messages[-1]["content"] == "four"
    shards = [f"hub:acme/mugs/data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert list(train.files) == [*shards, str(local)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:acme", "expected hub:ORG/NAME"),
        ("hub:acme/mugs:dev", "no split 'dev', found: test, train"),
        ("hub:acme/mugs/other", "found no .parquet, .jsonl, .csv, .json file, but README.md"),
        ("hub:acme/mugs@v9", "datasets/acme/mugs has no revision 'v9'"),
        ("hub:acme/none", "datasets/acme/none is not on the Hugging Face hub"),
        ("hub:acme/gated", "datasets/acme/gated is gated"),
    ],
)
def test_what_cannot_be_had_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_files(path)


@pytest.mark.parametrize(
    ("existing", "folder", "split", "expected"),
    [
        (["a.jsonl", "dataset_infos.json"], "", "train", ["a.jsonl"]),
        (["test.csv", "train.csv"], "", "train", ["train.csv"]),
        (["train-1.parquet", "train-0.parquet", "train.jsonl"], "", "train", ["train-0.parquet", "train-1.parquet"]),
        (["data/train_sft-0.parquet", "data/train_gen-0.parquet"], "", "train_sft", ["data/train_sft-0.parquet"]),
        (["main/train-0.parquet", "soc/train-0.parquet"], "soc", "train", ["soc/train-0.parquet"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "", "test", ["default/test/0000.parquet"]),
        (["a.json", "b.json"], "b.json", "train", ["b.json"]),
    ],
)
def test_files_of_a_split(existing: list[str], folder: str, split: str, expected: list[str]) -> None:
    assert choose_files(existing, folder, split, "hub:x/y") == expected


@pytest.mark.parametrize(
    ("existing", "split", "message"),
    [
        (["data/train_sft-0.parquet", "data/test_sft-0.parquet"], "train", "found: test_sft, train_sft"),
        (["main/train-0.parquet", "soc/train-0.parquet"], "train", r"several data sets: main, soc.* hub:ORG/NAME/main"),
        (["a.jsonl"], "test", "no split 'test', found: no splits"),
        (["script.py"], "train", "but script.py.*refs/convert/parquet"),
        ([], "train", "but nothing"),
    ],
)
def test_files_that_are_not_clear(existing: list[str], split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_files(existing, "", split, "hub:x/y")
