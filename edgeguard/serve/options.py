"""How a server is set up, and what it refuses to do."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import InputError
from edgeguard.secrets import check_token

BODIES = 4
"""Bodies of the largest size that are held at the same time, at most."""


@dataclass(frozen=True)
class ServeOptions:
    """A server's address, limits and secrets.

    host, port: where it listens; port 0 takes a free one. token: what a client must show; None asks for nothing.
    certificate, key: PEM files for TLS. max_batch: images of one request, and of several that are answered together.
    max_waiting: requests that wait for the engine. max_body: bytes of one request. max_connections: clients at a time.
    timeout: seconds for a body to arrive, and again for its answer. idle: seconds that a connection may rest, or take
    for the head of a request. quiet: log errors alone.

    Raises:
        InputError: out of range, half of a certificate, or an address beyond this machine without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    max_batch: int = 64
    max_waiting: int = 256
    max_body: int = 64 << 20
    max_connections: int = 512
    timeout: float = 30.0
    idle: float = 60.0
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"the port must be from 0 to 65535, got {self.port}")
        for name in ("max_batch", "max_waiting", "max_body", "max_connections"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.timeout <= 86400 or not 0 < self.idle <= 86400:
            raise InputError(f"timeouts are seconds above 0 and at most a day, got {self.timeout:g} and {self.idle:g}")
        if (self.certificate is None) != (self.key is None):
            raise InputError("TLS needs a certificate and its key; give both --tls-cert and --tls-key, or neither")
        if self.token is not None:
            check_token(self.token, "the token")
        elif not self.local:
            raise InputError(
                f"{self.host} can be reached from other machines, and no token protects it; name a file that holds one with "
                "--token-file, or listen on 127.0.0.1"
            )

    @property
    def local(self) -> bool:
        """Whether only programs of this machine can connect; a name other than localhost could be anything."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def tls(self) -> ssl.SSLContext | None:
        """Raises InputError where the files are not a certificate and its key."""
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # at least TLS 1.2
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # never asks at the terminal
        except (OSError, ValueError) as exc:
            raise InputError(f"{self.certificate} and {self.key} are not a certificate and its key in PEM: {exc}") from exc
        return context
