"""What proves membership of a job, as one value that every server and every client takes whole."""

from __future__ import annotations

import secrets
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lazarus.basics.careful import read_bytes
from lazarus.config.sections import SecurityConfig
from lazarus.errors import ConfigError, Problem

_LEAST_SECRET = 16  # letters; a random one has 64
_MOST_BYTES = 1 << 20  # of a secret, a key or certificates
_ROUNDS = 8  # of a handshake between two ends in memory; TLS 1.3 takes two


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Credentials:
    """The job's secret, and with TLS its certificate: PEM texts, all three or none.

    ``tls_name`` is the name that the certificate carries, if it does not carry every address.
    Whoever prints this sees no secret.
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
    """The credentials of a run: what the configuration names, and a random secret otherwise.

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
    """A job's secret from a file that nobody else may read.

    Raises:
        ConfigError: It cannot be read or used, or others may read it.
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
    """Shake hands with ourselves, as clients will with the server at ``host``.

    Raises:
        ConfigError: The certificate is not what clients of that address accept.
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
    """The server's side and the client's."""
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
