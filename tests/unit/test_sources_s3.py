"""Models from a bucket, against a real S3-compatible server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mizzen.runtime.errors import MizzenError
from mizzen.runtime.sources.address import parse_address
from mizzen.runtime.sources.cache import Cache
from mizzen.runtime.sources.fetch import fetch_model
from mizzen.runtime.sources.progress import LoadProgress
from mizzen.runtime.sources.s3 import Bucket
from tests.fixtures.bucket_server import BucketServer, running_bucket_server

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "training_args.bin": b"pickle",
    "checkpoints/model.safetensors": b"elsewhere",
}


@pytest.fixture(scope="module")
def server() -> Iterator[BucketServer]:
    with running_bucket_server() as running:
        running.add("models", {f"team/tiny/{name}": content for name, content in FILES.items()})
        running.add("models", {"one/q8.gguf": b"8", "one/q4.gguf": b"4", "old/model.bin": b"p"})
        yield running


@pytest.fixture
def fetch(
    server: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    def bring(source: str = "s3://models/team/tiny") -> Path:
        address = parse_address(source)
        assert address is not None
        return fetch_model(address, Cache(tmp_path / "cache"), LoadProgress())

    return bring


def test_a_prefix_is_a_folder_of_which_only_a_loaders_files_are_fetched(
    fetch: Callable[..., Path],
) -> None:
    folder = fetch()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    found = {path.name for path in folder.iterdir() if path.is_file()}
    assert found == {"config.json", "tokenizer.json", "model.safetensors", "manifest.json"}


def test_one_object_can_be_named(fetch: Callable[..., Path]) -> None:
    assert fetch("s3://models/one/q8.gguf").read_bytes() == b"8"


def test_a_replaced_object_is_another_model_and_the_old_one_stays_whole(
    fetch: Callable[..., Path], server: BucketServer
) -> None:
    server.add("models", {"changing/m.gguf": b"old"})
    before = fetch("s3://models/changing/m.gguf")
    server.add("models", {"changing/m.gguf": b"new"})
    assert fetch("s3://models/changing/m.gguf").read_bytes() == b"new"
    assert before.read_bytes() == b"old"


def test_an_object_replaced_while_it_is_fetched_is_refused(
    fetch: Callable[..., Path], server: BucketServer, tmp_path: Path
) -> None:
    server.add("models", {"racing/m.gguf": b"old"})
    bucket = Bucket(parse_address("s3://models/racing/m.gguf"))
    listing = bucket.list_files()
    server.add("models", {"racing/m.gguf": b"new"})
    with pytest.raises(MizzenError, match="replaced while it was fetched"):
        bucket.fetch(listing.files[0], listing, tmp_path / "m.gguf")


def test_what_is_there_already_is_not_fetched_again(
    fetch: Callable[..., Path], tmp_path: Path
) -> None:
    bucket = Bucket(parse_address("s3://models/team/tiny"))
    listing = bucket.list_files()
    weights = next(file for file in listing.files if file.name == "model.safetensors")
    begun = tmp_path / "begun"
    begun.write_bytes(b"?" * 1000)  # wrong on purpose: only the rest may come
    bucket.fetch(weights, listing, begun)
    assert begun.read_bytes() == b"?" * 1000 + WEIGHTS[1000:]


BAD = {
    "an unknown bucket": ("s3://nowhere/tiny", "SourceNotFound", "no bucket nowhere"),
    "a prefix without objects": ("s3://models/team/none", "SourceNotFound", "no files at"),
    "a file that is not there": ("s3://models/one/q5.gguf", "SourceNotFound", "no file q5.gguf"),
    "weights only as pickles": ("s3://models/old", "PickledWeightsRefused", "safetensors"),
    "several GGUF files": ("s3://models/one", "NotAModel", "s3://models/one/q4.gguf"),
    "a bucket alone": ("s3://models", "SourceInvalid", "s3://BUCKET/PREFIX"),
}


@pytest.mark.parametrize(("source", "reason", "says"), BAD.values(), ids=BAD)
def test_the_cause_is_named_of(
    fetch: Callable[..., Path], source: str, reason: str, says: str
) -> None:
    with pytest.raises(MizzenError) as caught:
        fetch(source)
    assert caught.value.reason == reason
    assert says in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """A store that does not know our key; its answer is S3's own."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_keys_that_a_store_refuses_are_told_apart_from_a_store_that_is_away(
    fetch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{store.server_port}")
        with pytest.raises(MizzenError, match="InvalidAccessKeyId") as refused:
            fetch()
        store.shutdown()
    assert (refused.value.reason, refused.value.exit_code) == ("SourceForbidden", 42)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(MizzenError, match="cannot be reached") as caught:
        fetch()
    assert (caught.value.reason, caught.value.exit_code) == ("SourceUnreachable", 1)
