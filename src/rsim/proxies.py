"""Whether a proxy lies between this machine and a server."""

from __future__ import annotations

import ipaddress
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from rsim.errors import UserError

T = TypeVar("T", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


def proxy_of(url: str) -> str:
    """The proxy that the environment names for ``url``; "" for this machine itself and for what ``NO_PROXY`` holds."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = getproxies_environment()
    if is_here(host) or proxy_bypass(host) or proxy_bypass(parts.netloc) or _in_network(host, proxies.get("no", "")):
        return ""
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    return proxy if "://" in proxy or not proxy else f"http://{proxy}"


def _in_network(host: str, without: str) -> bool:
    """Whether ``host`` is an address in one of the networks (10.0.0.0/8) among the entries of ``NO_PROXY``."""
    for entry in (entry.strip() for entry in without.split(",")):
        try:
            if "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:  # a name, on either side
            continue
    return False


def is_here(host: str) -> bool:
    """Whether a host name is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def transport(kind: type[T], url: str, limits: httpx.Limits | None = None) -> T:
    """Straight to ``url`` or through its proxy.

    Raises:
        UserError: a proxy that cannot be used.
    """
    proxy = proxy_of(url)
    try:
        return kind(proxy=proxy or None, limits=limits or httpx.Limits(), trust_env=True)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        needs = "pip install 'httpx[socks]'" if isinstance(error, ImportError) else str(error)
        raise UserError(
            f"the proxy {proxy.rpartition('@')[2]} for {urlsplit(url).hostname}", f"{needs}; or name the host in NO_PROXY"
        ) from error
