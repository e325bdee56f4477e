"""The connection to an upstream: its address, its key, its models."""

from __future__ import annotations

import ipaddress
import os
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx

from rsim.errors import UserError, check_url
from rsim.proxies import proxy_of, transport
from rsim.serving.said import UpstreamError, broken, refusal, unreached

_ENDPOINTS = ("/chat/completions", "/completions", "/models", "/responses", "/messages")
KEY = "RSIM_UPSTREAM_API_KEY"


def check_address(url: str, mode: str) -> None:
    """Raises `UserError` if ``url`` (or nothing) is no base URL, or ``mode`` none that an upstream can have."""
    if mode not in ("", "prefill", "turn"):
        raise UserError(f"--mode {mode}", "use prefill or turn, or leave it out")
    if url:
        check_url("--upstream", url)
        transport(httpx.AsyncHTTPTransport, url)


def address(url: str) -> tuple[str, dict[str, str]]:
    """The base URL, which ends in a slash, and what every request's query holds.

    A full endpoint is taken for its base; where a host is all that is given, its API is at ``/v1``.

    >>> address("http://127.0.0.1:8080")
    ('http://127.0.0.1:8080/v1/', {})
    >>> address("https://x.example/openai/deployments/m/chat/completions?api-version=2")
    ('https://x.example/openai/deployments/m/', {'api-version': '2'})
    """
    scheme, host, path, query, _ = urlsplit(url.strip())
    path = path.rstrip("/")
    endpoint = next((e for e in _ENDPOINTS if path.endswith(e)), "")
    base = path.removesuffix(endpoint) if endpoint else path or "/v1"
    return urlunsplit((scheme, host, f"{base}/", "", "")), dict(parse_qsl(query, keep_blank_values=True))


def own_name(netloc: str) -> bool:
    """Whether a server is asked by an address or a name of a network of its own: no site of the web has such a name."""
    host = urlsplit(f"//{netloc}").hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))
    return True


def upstream_client(
    url: str, key: str, timeout: httpx.Timeout, limits: httpx.Limits | None = None, headers: dict[str, str] | None = None
) -> httpx.AsyncClient:
    """``key`` goes as a bearer, or, written ``NAME: KEY``, in the header NAME. To be made in the event loop that uses it."""
    base, query = address(url)
    name, named, value = key.partition(": ")
    own = {name: value} if named else {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(
        base_url=base,
        params=query,
        headers=(headers or {}) | own,
        timeout=timeout,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none is kept: it would go on with others' requests
        transport=transport(httpx.AsyncHTTPTransport, url, limits),
    )


async def list_models(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """
    Raises:
        UpstreamError: the upstream does not list them; the message names the address and the cause.
    """
    at = f"the models at {client.base_url}models cannot be listed"
    try:
        response = await client.get("models")
    except httpx.RequestError as error:
        failed = unanswered(error)
        failed.error["message"] = f"{at}: {failed.error['message']}"
        raise failed from error
    if response.status_code == 200:
        try:
            return [{"id": str(model["id"])} | model for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            failed = broken("that is no list", response.text)
    else:
        failed = await refused(response)
    message = f"{at} ({failed})"
    raise UpstreamError(failed.status, failed.error | {"message": message}, failed.retry_after)


async def first_model(client: httpx.AsyncClient) -> str:
    """The name of the first model that is listed. Raises `UpstreamError` if there is none."""
    listed = await list_models(client)
    if not listed:
        raise broken(f"the upstream at {client.base_url} lists no model")
    return str(listed[0]["id"])


def unanswered(cause: httpx.RequestError) -> UpstreamError:
    """The error of a request that got no response: whether it was late, the cause, and the proxy, if one lies between."""
    late = isinstance(cause, httpx.TimeoutException)
    _, _, proxy = proxy_of(str(cause.request.url)).rpartition("@")  # without its password
    through = f" through the proxy {proxy}" if proxy else ""
    return unreached(f"the upstream {'did not answer in time' if late else 'cannot be reached'}{through}", cause)


async def refused(response: httpx.Response) -> UpstreamError:
    """The error of a response whose status is not 200."""
    response.headers.encoding = "latin-1"  # as they came
    try:
        raw = await response.aread()
        answered = response.json()
    except httpx.RequestError:  # its status was said all the same
        raw, answered = b"", None
    except ValueError:
        answered = None
    await response.aclose()
    failed = refusal(response.status_code, answered, raw.decode(errors="replace"), response.headers.get("retry-after"))
    if response.status_code in (401, 403):
        key, sent = os.environ.get(KEY, "").strip(), response.request.headers
        if key and any(key.rpartition(": ")[2] in value for value in sent.values()):
            failed.error["message"] += f" (${KEY} is the key that was sent)"
        elif not key and "authorization" not in sent:
            failed.error["message"] += f" (${KEY} is not set)"
    if response.has_redirect_location:
        failed.error["message"] = f"the upstream is elsewhere: {response.headers.get('location')}"
    return failed
