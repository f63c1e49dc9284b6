"""A corpus where it lies: in object storage, behind any URL that fsspec opens (`s3://...`, `gs://...`, `hf://...`).

Only index, tokenizer and checksums are copied to this disk. Rows come by themselves, as the order of rows takes them from all
over the corpus: those of the next step while the model computes. They are dropped once they were read, so neither memory nor
disk grows with the corpus.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import fsspec
import numpy as np

from litmini.config import UserError
from litmini.corpus import PAGE
from litmini.open_corpus import Shard, read_checksums
from litmini.token_cache import cache_directory

THREADS = 32  # that wait for an answer
AHEAD = 4096  # rows that may have come and not been read


class Store:
    """The files of a corpus.

    Args:
        url: of its directory.

    Raises:
        UserError: there is no corpus, or no way to read it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
            found = self.system.ls(self.root, detail=True)
        except Exception as error:  # each file system raises its own
            raise UserError(f"{self.url} cannot be listed: {type(error).__name__}: {error}") from None
        self.sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}
        if "index.json" not in self.sizes:
            raise UserError(f"{self.url} is no corpus: it has no index.json. Copy what prepare_data.py wrote there.")
        index = self.fetch("index.json")
        name = hashlib.sha256(self.url.encode() + index).hexdigest()[:32]  # another index, another directory
        self.directory = cache_directory() / "corpora" / name
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in self.sizes:
            if not name.endswith((".bin", ".crc")):
                self.copy(name)
        self._threads = ThreadPoolExecutor(THREADS)
        self._coming: dict[tuple[str, int, int], Future[bytes]] = {}

    def fetch(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, or all of it."""
        try:
            return self.system.cat_file(f"{self.root}/{name}", start=start, end=stop)
        except Exception as error:
            raise UserError(f"{self.url}/{name} cannot be read: {type(error).__name__}: {error}") from None

    def copy(self, name: str) -> Path:
        """A small file, copied to this disk when it is first asked for."""
        file = self.directory / name
        if not file.exists():
            aside = file.with_name(f".{name}.{os.getpid()}.partial")
            aside.write_bytes(self.fetch(name))
            aside.rename(file)
        return file

    def expect(self, name: str, start: int, stop: int) -> None:
        """Begin to fetch these bytes."""
        key = (name, start, stop)
        if key not in self._coming:
            if len(self._coming) == AHEAD:
                self._coming.pop(next(iter(self._coming))).cancel()
            self._coming[key] = self._threads.submit(self.fetch, *key)

    def take(self, name: str, start: int, stop: int) -> bytes:
        """These bytes, which are forgotten then."""
        coming = self._coming.pop((name, start, stop), None)
        return coming.result() if coming else self.fetch(name, start, stop)


class RemoteShard(Shard):
    """One file of token ids in a `Store`."""

    def __init__(self, store: Store, name: str, tokens: int, dtype: np.dtype) -> None:
        self.store, self.name, self.file = store, name, f"{store.url}/{name}"
        self.tokens, self.dtype = tokens, dtype
        size = store.sizes.get(name, -1)
        if size is not None:  # a web server does not always say
            self.check_size(size)

    @cached_property
    def checksums(self) -> np.ndarray:
        name = self.name.removesuffix(".bin") + ".crc"
        if name not in self.store.sizes:
            raise UserError(f"{self.store.url}/{name} is missing. Copy the corpus again.")
        return read_checksums(self.store.copy(name), -(-self.tokens * self.dtype.itemsize // PAGE))

    def content(self, start: int, stop: int) -> memoryview:
        return memoryview(self.store.take(self.name, start, stop))

    def expect(self, start: int, count: int) -> None:
        self.store.expect(self.name, *self.pages(start, count))
