"""gRPC channels and servers of a run, with the job's secret, limits and keepalive settings."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc

from lazarus.runtime.rpc.credentials import Credentials

_MAX_MESSAGE_BYTES = 1 << 28  # the largest are plans with their moves: some MiB at 1,024 ranks
_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    # A restarted controller is back within seconds. With gRPC's default backoff a worker would
    # reconnect too late and be taken for lost.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A broken network link closes no socket: without pings a process would wait for ever.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]
HEADER = "authorization"
CONTROL = "lazarus.Control"
KEEPER = "lazarus.Keeper"
PID_HEADER = "lazarus-pid"  # a trainer tells its keeper which process it is
Streams = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def metadata_of(credentials: Credentials) -> tuple[tuple[str, str], ...]:
    """Call metadata with the job's secret, which every server of the run requires."""
    return ((HEADER, f"Bearer {credentials.secret}"),)


class BearerCheck(grpc.ServerInterceptor):  # type: ignore[misc]
    """Server interceptor that refuses every call without the job's secret."""

    def __init__(self, credentials: Credentials) -> None:
        self._wanted = f"Bearer {credentials.secret}".encode()

        def refuse(request: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing job secret")

        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(
        self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        given = dict(details.invocation_metadata).get(HEADER, "")
        if hmac.compare_digest(str(given).encode(), self._wanted):
            return continuation(details)
        return self._refusal


def open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    """Open a channel to ``host:port``, over TLS if the job has a certificate."""
    if not credentials.has_tls:
        return grpc.insecure_channel(address, options=_OPTIONS)
    name = credentials.tls_name
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", name)] if name else _OPTIONS
    trusted = grpc.ssl_channel_credentials(credentials.ca.encode())
    return grpc.secure_channel(address, trusted, options=options)


def make_server(credentials: Credentials, *, max_streams: int) -> grpc.Server:
    """Create a server that requires the job's secret.

    Args:
        credentials: The job's credentials.
        max_streams: Most calls at the same time; each open stream is one.
    """
    return grpc.server(
        futures.ThreadPoolExecutor(max_workers=max_streams, thread_name_prefix="stream"),
        interceptors=[BearerCheck(credentials)],
        options=_OPTIONS,
        maximum_concurrent_rpcs=max_streams,
    )


def add_service(
    server: grpc.Server, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
) -> None:
    """Add a service with its methods to a server.

    Handlers take and return bytes and call ``rpc/codec.py`` themselves, so that they, not gRPC,
    handle a message that cannot be decoded.
    """
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def add_control(server: grpc.Server, *, attach: Streams, drive: Streams) -> None:
    """Add the controller's service.

    Args:
        server: The controller's server.
        attach: Serves the stream of a worker.
        drive: Serves the stream of the driver.
    """
    handlers = {
        "Attach": grpc.stream_stream_rpc_method_handler(attach),
        "Drive": grpc.stream_stream_rpc_method_handler(drive),
    }
    add_service(server, CONTROL, handlers)


def method(service: str, name: str) -> str:
    """The path of a method, as gRPC channels take it."""
    return f"/{service}/{name}"


def endpoint(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.Server, address: str, credentials: Credentials) -> int:
    """Bind a server to ``host:port`` (port 0: any free port), with TLS if the job uses TLS.

    Returns:
        The port.

    Raises:
        OSError: The address is not available.
    """
    try:
        if credentials.has_tls:
            pair = (credentials.key.encode(), credentials.cert.encode())
            port: int = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as problem:
        raise OSError(f"cannot listen on {address}: {problem}") from problem
    if port == 0:
        raise OSError(f"cannot listen on {address}")
    return port
