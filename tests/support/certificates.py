"""Certificates for tests, as docs/security.md says to make them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazarus.runtime.rpc.credentials import Credentials

_EC = "ec -pkeyopt ec_paramgen_curve:P-256 -nodes"


@dataclass(frozen=True)
class Pair:
    """PEM files: an authority, and a key with the certificate that it signed."""

    ca: Path
    key: Path
    cert: Path

    def credentials(self, secret: str, *, tls_name: str = "") -> Credentials:
        return Credentials(
            secret=secret,
            key=self.key.read_text(),
            cert=self.cert.read_text(),
            ca=self.ca.read_text(),
            tls_name=tls_name,
        )

    def settings(self) -> tuple[str, ...]:
        files = (f"security.{name}={getattr(self, name)}" for name in ("ca", "key", "cert"))
        return ("security.tls=true", *files)


def make_pair(folder: Path, *names: str) -> Pair:
    """A certificate for ``DNS:...`` and ``IP:...``, signed by an authority of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names").write_text(f"subjectAltName={','.join(names)}\n")
    for line in (
        f"req -x509 -newkey {_EC} -days 2 -subj /CN=ca -keyout ca.key -out ca.pem",
        f"req -newkey {_EC} -subj /CN=job -keyout job.key -out job.csr",
        "x509 -req -in job.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names "
        "-out job.pem",
    ):
        try:
            subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("no openssl to make a certificate with")
    return Pair(ca=folder / "ca.pem", key=folder / "job.key", cert=folder / "job.pem")
