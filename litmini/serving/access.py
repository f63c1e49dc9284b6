"""Who may ask: the key that clients send, and the names that they may call this server by."""

import hmac
import ipaddress
import re
from collections.abc import Iterable


class AllowedHosts:
    """The names of a server in `Host` headers.

    A web page can let its own name resolve to this machine (DNS rebinding): its requests then come from the user's browser,
    which takes the server for a part of that page. The header has the page's name.

    Args:
        address: what the server listens at.
        names: further names, such as that of a proxy before it.
    """

    def __init__(self, address: str = "127.0.0.1", names: Iterable[str] = ()) -> None:
        self.names = {_name(name) for name in (address, *names)}
        bound = _address(address or "0.0.0.0")
        self.every = bound is not None and bound.is_unspecified  # it listens at all addresses of the machine
        self.loopback = self.every or _name(address) == "localhost" or (bound is not None and bound.is_loopback)

    def __contains__(self, header: str) -> bool:
        """Whether a `Host` header, with or without a port, names this server."""
        name = _name(header)
        address = _address(name)
        if name in self.names or (name == "localhost" and self.loopback):
            return bool(name)
        return address is not None and (self.every or (self.loopback and address.is_loopback))


def _name(header: str) -> str:
    """Return a host without its port and an IPv6 address's brackets, in lower case; empty if it is none."""
    if _address(header):
        return header.lower()
    parts = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::\d*)?", header)
    return (parts[1] or parts[2]).lower().removesuffix(".") if parts else ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def has_key(authorization: str, key: str) -> bool:
    """Whether an `Authorization` header, decoded as latin-1 as HTTP has it, is `Bearer KEY`."""
    scheme, _, given = authorization.partition(" ")
    expected = key.encode("utf-8", "surrogateescape")  # as the environment had it
    return hmac.compare_digest(given.strip(" ").encode("latin-1"), expected) and scheme.lower() == "bearer"
