"""TLS as a coat around bytes: sealing and opening, without a socket and without waiting.

So the engine's fan-out can push to a client over TLS as it does in clear.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

from hypercorn.config import Config

from kttrio.config import ConfigError, ServerConfig


def server_context(config: ServerConfig, alpn: list[str]) -> ssl.SSLContext | None:
    """hypercorn's TLS settings with our certificate; None where the flags name none.

    `alpn`: the protocols of the port. With --ssl-ca-certs a client must show a certificate of one
    of them. Blocking. Raises ConfigError that names the flag.
    """
    if config.ssl_certfile is None:
        _refuse_others(config)
        return None
    settings = Config()
    settings.certfile = str(config.ssl_certfile)
    settings.keyfile = str(config.ssl_keyfile or config.ssl_certfile)
    # An empty one and not None, for which OpenSSL would ask on the terminal.
    settings.keyfile_password = config.ssl_keyfile_password or ""
    settings.alpn_protocols = alpn
    if config.ssl_ca_certs is not None:
        settings.ca_certs = str(config.ssl_ca_certs)
        settings.verify_mode = ssl.CERT_REQUIRED
    try:
        context = settings.create_ssl_context()
    except OSError as error:
        raise ConfigError(_complaint(config, error)) from error
    assert context is not None
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _refuse_others(config: ServerConfig) -> None:
    others = ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs")
    for name in others:
        if getattr(config, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: means nothing without --ssl-certfile; give both")


def _complaint(config: ServerConfig, error: OSError) -> str:
    files = f"--ssl-certfile {config.ssl_certfile}"
    if config.ssl_keyfile is not None:
        files += f" --ssl-keyfile {config.ssl_keyfile}"
    if config.ssl_ca_certs is not None:
        files += f" --ssl-ca-certs {config.ssl_ca_certs}"
    return (
        f"{files}: cannot be used ({error.strerror or error}); they must be PEM files, the key "
        "that of the certificate and unlocked by --ssl-keyfile-password"
    )


class Seal:
    """The server's end of one TLS connection. Errors are `ssl.SSLError`, an OSError."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=True)
        self.ended = False
        """The client has said that nothing follows."""

    def shake_hands(self, data: bytes) -> bool:
        """Go on with the greeting; True when it is over. The answer is in `pending`."""
        self._arrived.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def close_in(self, data: bytes) -> bytes:
        """`data` as it goes over the wire."""
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]
        return self._leaving.read()

    def take_out(self, data: bytes) -> bytes:
        """What the wire's `data` says, as far as it is complete."""
        self._arrived.write(data)
        opened = bytearray()
        with suppress(ssl.SSLWantReadError):
            while piece := self._read():
                opened += piece
        return bytes(opened)

    def _read(self) -> bytes:
        try:
            data = self._tls.read(1 << 16)
        except ssl.SSLZeroReturnError:
            data = b""
        self.ended = not data
        return data

    def pending(self) -> bytes:
        """What TLS itself has to say to the client."""
        return self._leaving.read()

    def last_words(self) -> bytes:
        """That nothing follows."""
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        return self._leaving.read()
