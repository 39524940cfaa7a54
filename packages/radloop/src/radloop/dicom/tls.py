"""TLS for what listens: one context for C-STORE and STOW-RS (PS3.15 section B.9, BCP 195: TLS 1.2 or newer)."""

from __future__ import annotations

import ssl
from pathlib import Path

from radloop.errors import SettingsError


def server_context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's TLS context.

    Args:
        certificate: PEM, the server's certificate and what leads to its authority.
        key: PEM, its private key, without a password, readable by its owner only.
        client_ca: PEM, the authorities of clients: a client must then show a certificate of one of them (mutual TLS).

    Raises:
        SettingsError: a file is missing, is no PEM, or does not fit the others. Names the file, never what is in it.
    """
    for path in (certificate, key, *([client_ca] if client_ca else [])):
        if not path.is_file():
            raise SettingsError("a TLS file is missing", expected=f"a PEM file at {path}", got="no such file")
    if (mode := key.stat().st_mode & 0o777) & 0o077:
        raise SettingsError(
            "the TLS key can be read by others",
            expected="mode 600",
            got=f"mode {mode:o}",
            next_step=f"chmod 600 {key}",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise SettingsError(
            "the TLS certificate and key cannot be used",
            expected=f"a PEM certificate in {certificate}, and in {key} its key, without a password",
            got=_why(error),
            next_step="openssl x509 -noout -text -in the certificate; openssl pkey -noout -in the key",
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise SettingsError(
                "the authorities of clients cannot be used",
                expected=f"PEM certificates in {client_ca}",
                got=_why(error),
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    """Called for a key that needs one; without this OpenSSL would ask on the terminal."""
    raise ValueError


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError):
        return "the key needs a password"
    return str(reason).lower().replace("_", " ") if reason else "no PEM"
