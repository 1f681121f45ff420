"""The secret and the TLS certificate that servers and clients of a job authenticate with."""

from __future__ import annotations

import secrets
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lazarus.basics.careful import read_bytes
from lazarus.config.sections import SecurityConfig
from lazarus.errors import ConfigError, Problem

_LEAST_SECRET = 16  # characters; a generated secret has 64
_MOST_BYTES = 1 << 20  # most bytes of a file with a secret, a key or certificates
_ROUNDS = 8  # most rounds of the handshake in ``check_certificate``; TLS 1.3 takes two


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Credentials:
    """The job's secret, and its TLS certificate if the job uses TLS. ``repr`` hides the secrets.

    Attributes:
        secret: Sent with every call.
        key: Private key of the servers, as PEM text. ``key``, ``cert`` and ``ca`` are all set, or
            all empty for a job without TLS.
        cert: Certificate of the servers, as PEM text.
        ca: Certificate authority that clients trust, as PEM text.
        tls_name: Name in the certificate that clients expect instead of a server's address;
            empty: the address.

    Raises:
        ValueError: Only some of ``key``, ``cert`` and ``ca`` are set.
    """

    secret: str
    key: str = ""
    cert: str = ""
    ca: str = ""
    tls_name: str = ""

    def __post_init__(self) -> None:
        if len({bool(self.key), bool(self.cert), bool(self.ca)}) != 1:
            raise ValueError("TLS needs a key, a certificate and a certificate authority")

    def __repr__(self) -> str:
        return f"Credentials(has_tls={self.has_tls})"

    @property
    def has_tls(self) -> bool:
        return bool(self.key)


def credentials_from(security: SecurityConfig) -> Credentials:
    """Load the credentials that the configuration names; without a secret file, make a secret.

    Raises:
        ConfigError: A file cannot be read, others may read the secret, or key and certificate do
            not belong together.
    """
    path = security.secret_file
    secret = secrets.token_hex(32) if path is None else read_secret(Path(path).expanduser())
    if not security.tls:
        return Credentials(secret=secret)
    key, cert, ca = (_pem(security, name) for name in ("key", "cert", "ca"))
    found = Credentials(secret=secret, key=key, cert=cert, ca=ca, tls_name=security.tls_name or "")
    _contexts(found)
    return found


def read_secret(path: Path) -> str:
    """Read a job's secret from a file that only its owner may read.

    Raises:
        ConfigError: The file cannot be read, other users may read it, or its text is no secret.
    """
    key = "security.secret_file"
    try:
        mode = path.stat().st_mode
        text = read_bytes(path, most=_MOST_BYTES).decode("ascii").strip() if path.is_file() else ""
    except OSError as problem:
        text = f'{key} = "{path}" cannot be read: {problem.strerror}'
        raise ConfigError(Problem(text, key=key)) from problem
    except UnicodeDecodeError:
        text = ""
    if mode & 0o077:
        text = f'{key} = "{path}" can be read by others (mode {mode & 0o777:o}): chmod 600 {path}'
        raise ConfigError(Problem(text, key=key))
    if len(text) < _LEAST_SECRET or not text.isprintable() or " " in text:
        need = f"one word of at least {_LEAST_SECRET} printable ASCII letters"
        text = f'{key} = "{path}" does not hold {need}: openssl rand -hex 32 > {path}'
        raise ConfigError(Problem(text, key=key))
    return text


def check_certificate(credentials: Credentials, *, host: str) -> None:
    """Check the certificate by a TLS handshake in memory, as clients of ``host`` will make it.

    Raises:
        ConfigError: Clients would not accept the certificate for ``host``.
    """
    if not credentials.has_tls:
        return
    server, client = _contexts(credentials)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    name = credentials.tls_name or host
    ends = (
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    )
    try:
        for _ in range(_ROUNDS):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as problem:
        reason = getattr(problem, "verify_message", "") or problem.reason or str(problem)
        text = (
            f"security.cert is not good for {name}, where clients of this run will look for it: "
            f"{reason}; see docs/security.md for a pair that is"
        )
        raise ConfigError(Problem(text, key="security.cert")) from problem


def _contexts(credentials: Credentials) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The TLS contexts of a server and of a client.

    Raises:
        ConfigError: The key and certificate are no pair, or the authority is not in PEM.
    """
    server, client = (
        ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    )
    with tempfile.NamedTemporaryFile("w", prefix="lazarus-", suffix=".pem") as pair:  # mode 0600
        pair.write(f"{credentials.cert}\n{credentials.key}\n")
        pair.flush()
        try:
            server.load_cert_chain(pair.name, password=_no_password)
        except (ssl.SSLError, ValueError) as problem:
            text = f"security.cert and security.key are no PEM pair: {problem}"
            raise ConfigError(Problem(text, key="security.cert")) from problem
    try:
        client.load_verify_locations(cadata=credentials.ca)
    except (ssl.SSLError, ValueError) as problem:
        text = f"security.ca is no certificate authority in PEM: {problem}"
        raise ConfigError(Problem(text, key="security.ca")) from problem
    return server, client


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase")


def _pem(security: SecurityConfig, name: str) -> str:
    path = Path(str(getattr(security, name))).expanduser()
    try:
        return read_bytes(path, most=_MOST_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        text = f'security.{name} = "{path}" cannot be read: {reason}'
        raise ConfigError(Problem(text, key=f"security.{name}")) from problem
