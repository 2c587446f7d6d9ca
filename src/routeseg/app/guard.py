"""Who may ask a server on this machine, and what: a page elsewhere in the same browser may not, and nothing comes in
without bounds.

A browser lets any page send requests to 127.0.0.1, and a name that is bound to this address a moment later (DNS
rebinding) lets it read the answers. Both give themselves away: by the header Host, or by Origin.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from routeseg.files import parse_json

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+?))\.?(?::\d+)?")
BODY_SECONDS = 30.0  # for a request to come in
STRANGE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)  # what hostile values lead to


def stranger(headers: Iterable[tuple[bytes, bytes]], host: str, names: Sequence[str] = ()) -> str | None:
    """Why a request is not answered; None: it may ask.

    headers  of the request, as ASGI gives them
    host     the address that the server was bound to
    names    others that it is reached under, such as that of a proxy in front of it
    """
    given: dict[bytes, list[str]] = {b"host": [], b"origin": []}
    for name, value in headers:
        if name.lower() in given:
            given[name.lower()].append(value.decode("latin-1").strip().lower())
    hosts, origins, known = given[b"host"], given[b"origin"], {name.lower() for name in names}
    if len(hosts) != 1 or len(origins) > 1 or not (match := HOST.fullmatch(hosts[0])):
        return "a request names one host, and one origin at most"
    asked = match[1] or match[2]
    if asked not in known and not _bound_to(asked, host.lower()):
        return f"this server is not {asked[:100]!r}: start it with this name, if it is one of its own"
    for origin in origins:
        scheme, _, place = origin.partition("://")
        found = HOST.fullmatch(place)
        own = scheme in ("http", "https") and _no_port(place) == _no_port(hosts[0])
        if not own and (found is None or (found[1] or found[2]) not in known):
            return f"pages of {origin[:100]!r} may not ask this server"
    return None


def _bound_to(asked: str, host: str) -> bool:
    """Whether this is the server's own name: bound to all addresses, any number is, for no number can be rebound."""
    if host in LOOPBACK:
        return asked in LOOPBACK
    machine = socket.gethostname().lower()
    own = {host, machine, machine.partition(".")[0], machine.partition(".")[0] + ".local"}
    if host not in EVERYWHERE:
        return asked in own
    try:
        ipaddress.ip_address(asked)
        return True
    except ValueError:
        return asked in own or asked in LOOPBACK


def _no_port(place: str) -> str:
    """Without the port that need not be said."""
    return re.sub(r":(80|443)$", "", place)


class Guard:
    """In front of the explorer (ASGI): no stranger asks; what comes is JSON, at most `body_bytes` of it, within
    BODY_SECONDS; and no file is uploaded to a disk. Values that nobody can use are the asker's mistake (400)."""

    def __init__(self, app: Any, body_bytes: int, host: str = "127.0.0.1", names: Sequence[str] = ()) -> None:
        self.app, self.body_bytes, self.host, self.names = app, body_bytes, host, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if why := stranger(scope["headers"], self.host, self.names):
            await _refuse(scope, send, 403, why)
        elif scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
        elif scope["path"].rstrip("/").endswith("/upload"):
            await _refuse(scope, send, 403, "this server keeps no files")
        elif headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            await _refuse(scope, send, 415, "a question is JSON: say so in Content-Type")
        else:
            await self._ask(scope, headers.get(b"content-length", b"0"), receive, send)

    async def _ask(self, scope: Any, length: bytes, receive: Any, send: Any) -> None:
        body, more, given, started = bytearray(), True, False, False
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and length.isdigit() and max(int(length), len(body)) <= self.body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await _refuse(scope, send, 408, f"the question did not come within {BODY_SECONDS:g} s")
            return
        if more or len(body) > self.body_bytes:
            await _refuse(scope, send, 413, "the file is too large")
            return

        async def replayed() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body)}

        async def noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            parse_json(bytes(body), self.body_bytes)
            await self.app(scope, replayed, noted)
        except STRANGE as error:
            if started:
                raise
            logging.getLogger("routeseg").debug("a question that is none", exc_info=True)
            await _refuse(scope, send, 400, f"this question is none: {str(error)[:200]}")


async def _refuse(scope: Any, send: Any, status: int, words: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": words[:100]})
        return
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})
