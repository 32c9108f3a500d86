"""Who may ask: API keys, and by which name a server without keys may be called."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "ABYSSAL_API_KEY"


class Keys:
    """The API keys of the tenants; none means that everybody may ask, and all are one tenant."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Raises ValueError for a key that is empty or that a header can't carry."""
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("API key: expected printable ASCII without spaces")
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def find(cls, file: Path | None) -> "Keys":
        """Of a file, one a line, or else of the environment's ABYSSAL_API_KEY. Raises ValueError for an empty file."""
        if file is None:
            key = os.environ.get(VARIABLE, "")
            return cls([key] if key else [])
        keys = [line.strip() for line in file.read_text("utf-8").splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ValueError(f"{file}: expected API keys, one a line, found none")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def salt(self, authorization: str | None) -> str | None:
        """The tenant's salt, by which its prompts' pages are kept apart; None if the header has no key of ours.

        Every key is compared, in a time that tells nothing of any.
        """
        if not self._digests:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        if not found or scheme.lower() != "bearer":
            return None
        return hashlib.sha256(b"salt of " + digest).hexdigest()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def may_be_called(header: str | None, host: str) -> bool:
    """Whether a request's Host names this machine by an address, as localhost, or as what it was bound to.

    Any other name may be one that a page in the user's browser had resolved to this address, to read what it may not.
    """
    name = (header or "").strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in ("localhost", host.lower()) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
