"""Checkpoint places that fail for a while, as real ones do: a full disk, an object store's 503."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest


class Place(Protocol):
    """Where a run keeps its checkpoints."""

    url: str
    environment: Mapping[str, str]  # that the run's processes need to reach it

    def fail(self) -> None:
        """From now on nothing can be written."""

    def heal(self) -> None:
        """Writing works again."""


class SmallDisk:
    """A folder on a disk of its own that can be filled to the last byte."""

    environment: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self.url = str(folder / "checkpoints")
        self._filler = folder / "filler"

    def fail(self) -> None:
        chunk = bytes(1 << 16)
        with self._filler.open("wb", buffering=0) as out:
            try:
                while True:
                    out.write(chunk)
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise

    def heal(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """A tmpfs mounted at ``folder``; only root may mount."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class ObjectStore:
    """An S3 server of this process, over real HTTP, that can answer 503 to everything."""

    def __init__(self, address: str) -> None:
        self.url = "s3://runs/soak"
        self.environment = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._failing = threading.Event()
        self.refused = 0  # requests that were answered 503

    def fail(self) -> None:
        self._failing.set()

    def heal(self) -> None:
        self._failing.clear()

    def wrap(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The server's application behind the switch."""

        def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if not self._failing.is_set():
                return app(environ, start_response)
            self.refused += 1
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]

        return serve


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Serve until the block ends. Skips where moto or s3fs is missing."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")
    app = moto.DomainDispatcherApplication(moto.create_backend_app)
    switch: list[ObjectStore] = []
    server = serving.make_server(
        "127.0.0.1", 0, lambda *call: switch[0].wrap(app)(*call), threaded=True
    )
    switch.append(ObjectStore(f"http://127.0.0.1:{server.server_port}"))
    thread = threading.Thread(target=server.serve_forever, name="object store")
    thread.start()
    try:
        _make_bucket(switch[0])
        yield switch[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _make_bucket(store: ObjectStore) -> None:
    import boto3

    keys = store.environment
    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket="runs")
