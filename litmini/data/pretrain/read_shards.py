"""A corpus that `prepare_data.py` wrote, opened: its index and its shards, on this disk or behind a URL.

Every page that is read is compared with its checksum. A corpus behind a URL is in any file system of `fsspec` (`s3://`,
`gs://`, `hf://`): its small files are copied once, and of its shards the pages that the next steps need are fetched.
"""

import hashlib
import mmap
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import fsspec
import numpy as np

from litmini.data.pretrain.tokenize import SPLITS, tokenizer_hash
from litmini.data.pretrain.write_shards import FORMAT, PAGE
from litmini.data.token_cache import cache_directory
from litmini.errors import UserError
from litmini.files import existing_file, read_json, write_bytes

THREADS = 32  # requests at once
MAX_PENDING = 4096  # sequences that are fetched and not read yet


class Shard:
    """One file of token ids, mapped into memory when it is first read."""

    file: Path | str

    def __init__(self, file: Path, tokens: int, dtype: np.dtype) -> None:
        self.file, self.tokens, self.dtype = file, tokens, dtype
        self.check_size(file.stat().st_size if file.is_file() else -1)

    def check_size(self, size: int) -> None:
        """Refuse a file whose size in bytes, -1 where it is missing, is not the index's."""
        expected = self.tokens * self.dtype.itemsize
        if size != expected:
            what = "is missing" if size < 0 else f"has {size:,} bytes, index.json says {expected:,}"
            raise UserError(f"{self.file} {what}. Copy it again, or prepare the corpus again.")

    @cached_property
    def mapped(self) -> mmap.mmap:
        with open(self.file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def checksum_file(self) -> Path:
        return Path(self.file).with_suffix(".crc")

    @cached_property
    def checksums(self) -> np.ndarray:
        """CRC-32 of each page, (pages,) uint32."""
        file, pages = self.checksum_file(), -(-self.tokens * self.dtype.itemsize // PAGE)
        checksums = np.fromfile(file, np.uint32) if file.is_file() else np.empty(0, np.uint32)
        if len(checksums) != pages:
            raise UserError(f"{file} has {len(checksums):,} checksums, expected {pages:,}. Prepare the corpus again.")
        return checksums

    def content(self, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop)."""
        return memoryview(self.mapped)[start:stop]

    def pages(self, start: int, count: int) -> tuple[int, int]:
        """Return the bytes at which the pages of tokens [start, start + count) begin and end."""
        size = self.dtype.itemsize
        end = -(-(start + count) * size // PAGE) * PAGE
        return start * size // PAGE * PAGE, min(end, self.tokens * size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count), not copied.

        Raises:
            UserError: a page of them is not what was written.
        """
        begin, end = self.pages(start, count)
        content, checksums = self.content(begin, end), self.checksums
        for at in range(begin, end, PAGE):
            page = content[at - begin : at - begin + PAGE]
            if zlib.crc32(page) != checksums[at // PAGE]:
                raise UserError(
                    f"{self.file} is damaged: bytes {at:,} to {at + len(page):,} fail their checksum. Copy the file "
                    f"again, or prepare the corpus again."
                )
        return np.frombuffer(content, self.dtype)[start - begin // self.dtype.itemsize :][:count]

    def prefetch(self, start: int, count: int) -> None:
        """Begin to read these tokens, while the model computes."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin, end = self.pages(start, count)
            self.mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)


class Corpus:
    """What `prepare_data.py` wrote.

    Args:
        path: of the directory, or its URL.

    Raises:
        UserError: a file is missing, truncated, or of another tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        store = Store(self.name) if "://" in self.name else None
        self.directory = store.directory if store else Path(path)
        file = self.directory / "index.json"
        if not file.is_file():
            unfinished = (self.directory / "progress.json").is_file()
            raise UserError(
                f"{path} is an unfinished corpus: type its prepare_data.py command again to resume."
                if unfinished
                else f"{file} not found: {path} is no corpus. Make one: python scripts/prepare_data.py --help"
            )
        self.index = read_json(file)
        if self.index.get("format") != FORMAT:
            raise UserError(f"{file} has format {self.index.get('format')!r}, expected '{FORMAT}'.")
        tokenizer = existing_file(str(self.directory / "tokenizer.json"), "the tokenizer of a corpus")
        try:
            same_tokenizer = tokenizer_hash(tokenizer.read_text(encoding="utf-8")) == self.index["tokenizer_sha256"]
            dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.index["dtype"]])
            self.vocab_size, self.end = int(self.index["vocab_size"]), int(self.index["end"])
            listed = {
                k: [(str(s["file"]), int(s["tokens"])) for s in self.index["splits"][k]["shards"]] for k in SPLITS
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error!r}). Copy it again, or prepare the corpus again.") from None
        if not same_tokenizer:
            raise UserError(f"{tokenizer} is not the tokenizer that made these shards. Prepare the corpus again.")
        self.splits: dict[str, list[Shard]] = {
            split: [
                RemoteShard(store, name, tokens, dtype) if store else Shard(self.directory / name, tokens, dtype)
                for name, tokens in shards
            ]
            for split, shards in listed.items()
        }


class Store:
    """The files of a corpus behind a URL.

    Args:
        url: of its directory.

    Raises:
        UserError: it cannot be read, or is no corpus.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
            entries = self.system.ls(self.root, detail=True)
        except Exception as error:  # each file system raises its own
            raise UserError(f"{self.url} cannot be listed: {type(error).__name__}: {error}") from None
        self.sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}
        if "index.json" not in self.sizes:
            raise UserError(f"{self.url} is no corpus: it has no index.json. Copy what prepare_data.py wrote there.")
        index = self.fetch("index.json")
        key = hashlib.sha256(self.url.encode() + index).hexdigest()[:32]  # another index, another directory
        self.directory = cache_directory() / "corpora" / key
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in self.sizes:
            if not name.endswith((".bin", ".crc")):
                self.copy(name)
        self._threads = ThreadPoolExecutor(THREADS)
        self._pending: dict[tuple[str, int, int], Future[bytes]] = {}

    def fetch(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, or all of it."""
        try:
            return self.system.cat_file(f"{self.root}/{name}", start=start, end=stop)
        except Exception as error:
            raise UserError(f"{self.url}/{name} cannot be read: {type(error).__name__}: {error}") from None

    def copy(self, name: str) -> Path:
        """Copy a small file to this disk, once; return where it is."""
        if name not in self.sizes:
            raise UserError(f"{self.url}/{name} is missing. Copy the corpus again.")
        file = self.directory / name
        if not file.exists():
            write_bytes(file, self.fetch(name))
        return file

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Begin to fetch these bytes; the oldest that nobody read are dropped."""
        key = (name, start, stop)
        if key not in self._pending:
            if len(self._pending) == MAX_PENDING:
                self._pending.pop(next(iter(self._pending))).cancel()
            self._pending[key] = self._threads.submit(self.fetch, *key)

    def take(self, name: str, start: int, stop: int) -> bytes:
        """Return these bytes, and keep them no longer."""
        pending = self._pending.pop((name, start, stop), None)
        return pending.result() if pending else self.fetch(name, start, stop)


class RemoteShard(Shard):
    """One file of token ids in a `Store`."""

    def __init__(self, store: Store, name: str, tokens: int, dtype: np.dtype) -> None:
        self.store, self.name, self.file = store, name, f"{store.url}/{name}"
        self.tokens, self.dtype = tokens, dtype
        size = store.sizes.get(name, -1)
        if size is not None:  # a web server does not always say
            self.check_size(size)

    def checksum_file(self) -> Path:
        return self.store.copy(self.name.removesuffix(".bin") + ".crc")

    def content(self, start: int, stop: int) -> memoryview:
        return memoryview(self.store.take(self.name, start, stop))

    def prefetch(self, start: int, count: int) -> None:
        self.store.prefetch(self.name, *self.pages(start, count))
