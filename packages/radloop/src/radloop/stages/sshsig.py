"""Signatures in OpenSSH's own form (PROTOCOL.sshsig), Ed25519.

Made by `ssh-keygen -Y sign`, so a key may have a passphrase or live in an agent; checked here without it, and by anybody with
`ssh-keygen -Y verify`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import subprocess
from pathlib import Path

from radloop.errors import DataError, SettingsError

KIND = b"ssh-ed25519"
_MAGIC = b"SSHSIG"
_HASHES = {b"sha512": hashlib.sha512, b"sha256": hashlib.sha256}


def public_key(line: str) -> bytes:
    """The key in an OpenSSH one-line public key, as its wire form.

    Raises:
        ValueError: it is no Ed25519 key in this form.
    """
    kind, _, rest = line.strip().partition(" ")
    if kind.encode() != KIND:
        raise ValueError(f"a key of the kind {kind[:20]!r}")
    blob = base64.b64decode((rest.split() or [""])[0], validate=True)
    named, raw = _strings(blob)
    if named != KIND or len(raw) != 32:
        raise ValueError("a damaged key")
    return blob


def sign(message: bytes, key: Path, namespace: str) -> str:
    """Sign with a private key (or, of a key in the agent, its public half); base64.

    Raises:
        SettingsError: there is no such key, or no ssh-keygen.
        DataError: ssh-keygen cannot sign with it; says what it said.
    """
    if not key.is_file():
        raise SettingsError(
            "there is no key to sign with",
            expected=f"an OpenSSH Ed25519 key at {key}",
            got="no such file",
            next_step="--key FILE, or make one: ssh-keygen -t ed25519; its .pub line goes into [approvers] in radloop.toml",
        )
    command = ["ssh-keygen", "-Y", "sign", "-n", namespace, "-f", str(key)]
    try:
        done = subprocess.run(command, input=message, capture_output=True, check=False)
    except FileNotFoundError:
        raise SettingsError(
            "ssh-keygen is not installed", expected="OpenSSH 8.1 or newer", next_step="apt-get install openssh-client"
        ) from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise DataError(
            "the key cannot sign",
            expected=f"an Ed25519 key that ssh-keygen opens: {key}",
            got=said[-1] if said else f"ssh-keygen exited {done.returncode}",
            next_step="its passphrase, or an agent that holds it (ssh-add); mode 600",
        )
    return "".join(line for line in done.stdout.decode().splitlines() if not line.startswith("-----"))


def signer(message: bytes, signature: str, namespace: str) -> bytes | None:
    """The public key (wire form) by which this signature of this message was made; None if it was not."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        blob = base64.b64decode(signature, validate=True)
        if blob[:6] != _MAGIC or blob[6:10] != b"\0\0\0\1":
            return None
        key, space, reserved, algorithm, signed = _strings(blob[10:])
        (key_kind, raw), (kind, inner) = _strings(key), _strings(signed)
        if space != namespace.encode() or (key_kind, kind) != (KIND, KIND):
            return None
        digest = _HASHES[algorithm](message).digest()
        told = _MAGIC + b"".join(map(_string, (space, reserved, algorithm, digest)))
        Ed25519PublicKey.from_public_bytes(raw).verify(inner, told)
    except (InvalidSignature, KeyError, ValueError, binascii.Error):
        return None
    return key


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _strings(blob: bytes) -> list[bytes]:
    """The strings that follow each other in a blob (RFC 4251, section 5). Raises ValueError where it is cut short."""
    found = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            raise ValueError("cut short")
        found.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return found
