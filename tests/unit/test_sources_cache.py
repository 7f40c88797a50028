"""The cache of models: shared, checked, bounded, and never half there."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mizzen.runtime.sources import integrity
from mizzen.runtime.sources.cache import Cache
from mizzen.runtime.sources.errors import (
    CacheTooSmallError,
    StorageFullError,
    StorageNotWritableError,
)
from mizzen.runtime.sources.progress import LoadProgress
from mizzen.runtime.sources.remote import Listing, RemoteFile

MIB = 2**20


class Shelf:
    """A remote with models of one file, which writes down what it gave."""

    def __init__(self, log: Path | None = None, *, size: int = MIB) -> None:
        self.content = os.urandom(16) * (size // 16) if log is None else b"\7" * size
        self.log = log
        self.fetched: list[str] = []
        self.fault: Exception | None = None
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def listing(self, name: str = "model", *, digest: bool = True) -> Listing:
        sha256 = hashlib.sha256(self.content).hexdigest()
        file = RemoteFile("m.gguf", len(self.content), f"sha256:{sha256}" if digest else "")
        return Listing(f"hf://org/{name}", "c0ffee", (file,))

    def list_files(self) -> Listing:
        return self.listing()

    def fetch(self, file: RemoteFile, listing: Listing, to: Path) -> None:
        self.fetched.append(listing.address)
        if self.log:
            with self.log.open("a") as log:
                log.write("fetched\n")
            time.sleep(0.5)  # long enough for the others to come
        half = len(self.content) // 2
        with to.open("ab") as stream:
            stream.write(self.content[:half])
            stream.flush()
            self.halfway.set()
            self.go_on.wait()
            if self.fault:
                raise self.fault
            stream.write(self.content[half:])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def provide(root: Path, shelf: Shelf, name: str = "model", **settings: Any) -> Path:
    """Ask as a process of its own would, which ends at once."""
    return Cache(root, **settings).provide(shelf.listing(name), shelf, LoadProgress())


def provide_in_process(root: Path, log: Path) -> None:
    assert (provide(root, Shelf(log)) / "m.gguf").stat().st_size == MIB


def test_replicas_on_one_node_fetch_once(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    replicas = [spawn.Process(target=provide_in_process, args=(root, log)) for _ in range(3)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert [replica.exitcode for replica in replicas] == [0, 0, 0]
    assert log.read_text() == "fetched\n"


def flip(path: Path, *, keep_time: bool) -> None:
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def after_a_reboot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(integrity, "_BOOT_ID", boot)


@pytest.mark.parametrize("digest", [True, False], ids=["announced hash", "hash of our own"])
def test_a_byte_that_was_changed_is_refused_and_fetched_again(root: Path, digest: bool) -> None:
    shelf = Shelf()
    cache, listing = Cache(root), shelf.listing(digest=digest)
    folder = cache.provide(listing, shelf, LoadProgress())
    flip(folder / "m.gguf", keep_time=False)
    again = Cache(root).provide(listing, shelf, LoadProgress())
    assert (again / "m.gguf").read_bytes() == shelf.content
    assert len(shelf.fetched) == 2


def test_a_disk_that_rots_is_found_by_the_first_start_after_a_boot(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    flip(provide(root, shelf) / "m.gguf", keep_time=True)
    after_a_reboot(monkeypatch, tmp_path)
    assert (provide(root, shelf) / "m.gguf").read_bytes() == shelf.content
    assert len(shelf.fetched) == 2


def test_hashes_are_computed_once_for_each_boot(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, hashed = Shelf(), []
    real = integrity.sha256_of
    provide(root, shelf)
    monkeypatch.setattr(integrity, "sha256_of", lambda *a: hashed.append(a[0].name) or real(*a))
    provide(root, shelf)
    assert hashed == []
    after_a_reboot(monkeypatch, tmp_path)
    provide(root, shelf)
    provide(root, shelf)
    assert hashed == ["m.gguf"]
    assert len(shelf.fetched) == 1


def test_only_the_damaged_file_of_many_is_fetched_again(root: Path) -> None:
    shelf = Shelf()
    file = shelf.listing().files[0]
    two = Listing("hf://org/two", "1", (RemoteFile("a.json", file.size, file.digest), file))
    folder = Cache(root).provide(two, shelf, LoadProgress())
    kept = (folder / "a.json").stat().st_ino
    (folder / "m.gguf").unlink()
    folder = Cache(root).provide(two, shelf, LoadProgress())
    assert (folder / "a.json").stat().st_ino == kept
    assert (folder / "m.gguf").read_bytes() == shelf.content


def test_replicas_of_one_node_note_a_revision_at_the_same_moment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, rename = Shelf().listing(), Path.rename
    cache, other = Cache(root), Cache(root)

    def between(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        other.remember(listing)  # with the same process id, as the first process of its container
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", between)
    cache.remember(listing)
    assert cache.recall(listing.address) == listing
    assert len(list((root / "revisions").iterdir())) == 1


def test_a_model_that_is_there_is_served_from_a_volume_that_is_full(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    folder = Cache(root).provide(shelf.listing(), shelf, LoadProgress())

    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    cache = Cache(root)
    cache.remember(shelf.listing())
    assert cache.provide(shelf.listing(), shelf, LoadProgress()) == folder
    assert "No space left on device" in caplog.text


def test_an_interrupted_fetch_leaves_no_model_but_its_bytes(root: Path) -> None:
    shelf = Shelf()
    shelf.fault = ConnectionError("cut")
    with pytest.raises(ConnectionError):
        provide(root, shelf)
    assert list((root / "models").iterdir()) == []
    (part,) = root.glob("partial/*/m.gguf.part")
    assert part.stat().st_size == len(shelf.content) // 2


def test_a_file_that_was_whole_when_the_process_died_is_not_fetched_again(root: Path) -> None:
    shelf = Shelf()
    partial = root / "partial" / shelf.listing().entry
    partial.mkdir(parents=True)
    (partial / "m.gguf.part").write_bytes(shelf.content)
    assert (provide(root, shelf) / "m.gguf").read_bytes() == shelf.content
    assert shelf.fetched == []


def ages(root: Path, *names: str) -> None:
    """Make the models' last uses lie apart, the first of `names` longest ago."""
    for age, name in enumerate(reversed(names)):
        (manifest,) = root.glob(f"models/hf--org--{name}-*/manifest.json")
        os.utime(manifest, (time.time() - 100 * (age + 1),) * 2)


def kept(root: Path) -> set[str]:
    return {path.name.split("--")[2].rpartition("-")[0] for path in (root / "models").iterdir()}


def test_the_model_unused_for_longest_makes_room(root: Path) -> None:
    shelf, limit = Shelf(), {"limit_bytes": 5 * MIB // 2}
    provide(root, shelf, "old", **limit)
    provide(root, shelf, "young", **limit)
    ages(root, "old", "young")
    provide(root, shelf, "old", **limit)  # used again
    provide(root, shelf, "new", **limit)
    assert kept(root) == {"old", "new"}


def test_a_model_in_use_makes_no_room(root: Path) -> None:
    shelf, limit = Shelf(), 3 * MIB // 2
    user = Cache(root, limit_bytes=limit)
    user.provide(shelf.listing("used"), shelf, LoadProgress())
    with pytest.raises(CacheTooSmallError, match=r"models that are in use.*maxGiB"):
        provide(root, shelf, "new", limit_bytes=limit)
    assert kept(root) == {"used"}
    del user
    provide(root, shelf, "new", limit_bytes=limit)
    assert kept(root) == {"new"}


def test_a_rest_of_another_models_fetch_makes_room(root: Path) -> None:
    broken, shelf = Shelf(), Shelf()
    broken.fault = ConnectionError("cut")
    with pytest.raises(ConnectionError):
        provide(root, broken, "broken")
    provide(root, shelf, limit_bytes=3 * MIB // 2)
    assert list((root / "partial").iterdir()) == []


def test_a_model_larger_than_the_cache_is_refused_before_a_byte_is_fetched(root: Path) -> None:
    shelf = Shelf()
    with pytest.raises(CacheTooSmallError, match=r"spec\.model\.cache\.maxGiB"):
        provide(root, shelf, limit_bytes=MIB // 2)
    assert shelf.fetched == []


def disk_with(free: int) -> Callable[[Path], Any]:
    return lambda _: SimpleNamespace(free=free)


def test_a_volume_without_room_is_told_before_a_byte_is_fetched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    monkeypatch.setattr("shutil.disk_usage", disk_with(MIB // 2))
    with pytest.raises(StorageFullError, match=r"lacks 0\.06.*spec\.model\.cache\.claim"):
        provide(root, shelf)
    assert shelf.fetched == []


def test_a_volume_that_fills_up_meanwhile_is_told_as_such(root: Path) -> None:
    shelf = Shelf()
    shelf.fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageFullError, match="is full"):
        provide(root, shelf)


def test_files_that_belong_to_somebody_else_are_told_as_such(root: Path) -> None:
    shelf = Shelf()
    shelf.fault = PermissionError(errno.EACCES, "Permission denied", "m.gguf.part")
    with pytest.raises(StorageNotWritableError, match=r"m\.gguf\.part"):
        provide(root, shelf)


def test_a_folder_that_cannot_be_written_to_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageNotWritableError, match="--cache-dir"):
        Cache(tmp_path / "file")


def test_progress_tells_bytes_rate_and_the_rest_to_the_one_who_fetches_and_to_those_who_wait(
    root: Path,
) -> None:
    shelf, now = Shelf(), [0.0]
    shelf.go_on.clear()
    mine, theirs = LoadProgress(lambda: now[0]), LoadProgress(lambda: now[0])
    threads = [
        threading.Thread(target=Cache(root).provide, args=(shelf.listing(), shelf, progress))
        for progress in (mine, theirs)
    ]
    threads[0].start()
    assert shelf.halfway.wait(300)
    threads[1].start()
    while theirs.to_api() is None:
        time.sleep(0.01)
    now[0] = 10.0
    half = MIB // 2
    assert mine.to_api() == {
        "stage": "Downloading",
        "bytes": half,
        "totalBytes": MIB,
        "bytesPerSecond": round(half / 10),
        "remainingSeconds": 10,
    }
    assert theirs.to_api() == {"stage": "Waiting", "bytes": half, "totalBytes": MIB}
    shelf.go_on.set()
    for thread in threads:
        thread.join()
    assert mine.to_api() is None and theirs.to_api() is None
