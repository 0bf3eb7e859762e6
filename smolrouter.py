#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyyaml"]
# ///
"""SmolRouter: one address for all your local language models.

Clients speak OpenAI or Ollama to this program; it picks the server and the model,
survives a server that is switched off, cleans up what the model says and relays it
as it is spoken. One file, the standard library, and PyYAML for a YAML routing file.

The file reads top to bottom; every section uses only what stands above it:

    Words        1  Errors             every failure a client can see
                 2  Settings           every environment variable, every limit, once
                 3  HTTP messages      RFC 9112 on bytes, requests and responses
                 4  JSON               reading it, its limits, edits that keep every other byte
    Decisions    5  Event streams      SSE and NDJSON, incremental
                 6  Text filters       <think> blocks and JSON fences
                 7  Protocols          for each endpoint: where its documents hold what
                 8  Dialects           OpenAI inside, Ollama at the edge
                 9  Routing            model and source host to instances, and why
                10  Access             tokens, policies, Host and Origin
    Actions     11  HTTP on streams    the connections that messages come and go by
                12  Upstreams          connection pool, one request, health, slots
                13  Request log        what happened to every request
    The router  14  Relay              one exchange, from a request to the end of its answer
                15  Dashboard and API  what the owner looks at
                16  Application        which path means what
                17  HTTP server        the connection loop, drain
                18  Command line       serve, check, explain, demo, ...
                 A  The page           dashboard.html, verbatim

The life of one request, say a streamed POST /api/chat, is the way through these sections:

     1. `HTTPServer.serve_connection` waits for the next request on a client's connection, and
        `Connection.read_head` reads its head. What could be read in two ways is refused.
     2. `find_endpoint` looks up in one table who serves its method and path.
     3. `Application.serve` lets it in or answers with the reason: `check_browser` looks at
        Host and Origin, `TokenGuard.check` at the token, if one is needed.
     4. `Request.read_content` reads the content as the head frames it, within the limits.
     5. The endpoint's `Dialect` reads it into a `ParsedRequest`: the model, whether the answer
        is to be streamed, and how to write it again, here as OpenAI's chat request.
     6. `resolve` makes of the model and the source host a `Decision`: the instances in the
        order to try, and the trail that says why.
     7. An `Exchange` begins, and `RequestLog.begin` with it: from now on the page shows it.
     8. `Exchange.relay` asks one instance after the other (`Upstreams.send_request`), each
        when its server has a free slot (`Candidates`). When one refuses, is late or answers
        with an error, the next one is asked. The first response that says something is the
        one that the client gets.
     9. `UpstreamResponse.pump` takes the response as it comes. `Exchange.forward` puts each
        piece through its rewriter: it is split into events, thinking is taken out, and they
        are written in the client's dialect. `ResponseWriter` sends them.
    10. Whatever has happened: at the end of `Exchange.run` the upstream's connection is kept
        for the next request or closed, and `RequestLog.finish` gets what is known.

Vocabulary: the parts of HTTP have their names from RFC 9110 and 9112. An upstream or server
is a machine that runs models; an instance is a server with the model that it is asked for; an
alias is one model name for several instances; a route sends the requests that its match
describes, by model and source host (the client's address), to one of these
(routes.yaml.example).

A section whose banner says `(pure)` makes values of values: it waits for nothing, looks at no
clock and touches no socket or file. `parse_`, `encode_` and `resolve` are pure, and so is
`read_` in a pure section; elsewhere `read_` reads sockets, files or the database. `send_`,
`write_` and `serve_` do I/O.
"""

from __future__ import annotations

import marshal
import os
import sys
from types import CodeType

if sys.version_info < (3, 10):  # noqa: UP036 - the file may be run by any Python
    sys.exit("SmolRouter needs Python 3.10 or newer; this is " + sys.version.split()[0])


def share_code(code: CodeType) -> int | None:
    """Return the descriptor of a file without a name that has `code` in it, None for no such file.

    The file lies in memory, and the program that this process becomes by exec still has it open.
    """
    try:
        with open(os.memfd_create("smolrouter"), "wb") as file:
            marshal.dump(code, file)
            file.seek(0)
            descriptor = os.dup(file.fileno())
            os.set_inheritable(descriptor, True)
            return descriptor
    except (OSError, AttributeError):
        # Only Linux has such files, and the limit for the size of files is in force for them, too.
        return None


def restart_without_syntax_tree() -> None:
    """Replace this process by one that runs the code of this file, and has not got its script.

    Python keeps the syntax tree of the script that it was given until the program ends: 15 MB for
    nothing. So the same process begins again as `python -c "run the code" FILE ARGUMENTS`, which is
    also what `ps` shows. It gets the code that has been compiled already, or compiles it again,
    which takes 0.08 s, and then Python frees the tree. The file is not imported: no `__pycache__`
    appears beside it, and none is believed that is stale or somebody else's.

    Where anything is unusual, such as a debugger, a file that is a pipe, or a system where exec
    makes a second process (Windows), the program goes on as it is, and is larger.
    """
    script_at = len(sys.orig_argv) - len(sys.argv)
    flags = sys.orig_argv[1:script_at]
    by_script = sys.orig_argv[script_at] == sys.argv[0] and os.path.isfile(__file__)
    if not (by_script and os.name == "posix" and sys.executable):
        return
    # Only flags such as -I or -Wignore are passed on. A word without a dash is a flag's value, or
    # the file of a program that runs this one. An `m` or `c`, as in -m, -c or -Ic, says that it
    # runs in another way: the second start has -c, and so it does not start a third time.
    for flag in flags:
        if not flag.startswith("-") or "m" in flag or "c" in flag:
            return
    # This function is called at the top level of the file, so the frame above it has all its code.
    descriptor = share_code(sys._getframe(1).f_code)
    code = "compile(open(__file__, 'rb').read(), __file__, 'exec')"
    if descriptor is not None:
        code = f"marshal.load(open({descriptor}, 'rb'))"
    # `-c` would look for modules in the working folder, where anything may lie. They are looked
    # for where they are now: with the script, or with -I in Python's own places alone.
    command = (
        f"import marshal, sys; sys.path[0] = {sys.path[0]!r}; del sys.argv[0]; "
        f"__file__ = sys.argv[0]; exec({code})"
    )
    try:
        os.execv(sys.executable, [sys.executable, *flags, "-c", command, __file__, *sys.argv[1:]])
    except (OSError, AttributeError):
        # It may be refused, or be missing, as in a Python for WebAssembly.
        return


# Commands that end at once are not worth a second start. Without a command, or with flags
# alone, `serve` is meant.
if __name__ == "__main__":
    first_word = sys.argv[1] if len(sys.argv) > 1 else "serve"
    if first_word in ("serve", "demo") or first_word.startswith("--"):
        restart_without_syntax_tree()

# ruff: noqa: E402 - what is above needs no other modules
import argparse
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import datetime
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http
import importlib
import io
import ipaddress
import itertools
import json
import math
import operator
import pathlib
import posixpath
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import struct
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import (
    Awaitable,
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from typing import Any, NamedTuple, NoReturn, TypeVar

__version__ = "1.0.0"

KiB, MiB = 1024, 1024 * 1024

# ======================================================================================
# 1  Errors (pure)
# ======================================================================================
# Every failure that a client can see is a subclass of RouterError with a status. It is raised
# anywhere and rendered in one place, in the dialect of the request (section 8): a client of
# OpenAI's gets {"error": {"message": ..., "type": kind, "code": code, "param": null}}.
# To add one, write a subclass. Its `class` line states its `status`, `code` and `kind`, as far
# as they differ from those of its base.


class ConfigError(Exception):
    """Settings or the routing file are wrong; the program does not start with them.

    Each of its arguments says one mistake.
    """

    def __str__(self) -> str:
        # Where there is room for one of them, it is the first.
        first, *others = self.args
        return f"{first} (and {len(others)} more; see `check`)" if others else first


class RouterError(Exception):
    """A failure with a status; its answer has the header fields `fields`. Base of all below."""

    status = 500
    code = "internal_error"
    kind = "server_error"

    def __init__(self, message: str, *fields: tuple[str, str]) -> None:
        super().__init__(message)
        self.fields = fields

    def __init_subclass__(
        cls, status: int | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        """Take what the `class` line states; the rest is inherited from the base."""
        if status is not None:
            cls.status = status
        if code is not None:
            cls.code = code
        if kind is not None:
            cls.kind = kind


class BadRequest(RouterError, status=400, code="bad_request", kind="invalid_request_error"):
    """The request is HTTP, but cannot be served as it is."""


class MalformedMessage(BadRequest, code="malformed_message"):
    """The bytes are no HTTP message that may be forwarded; the connection ends."""


class MalformedContent(BadRequest, code="malformed_content"):
    """The content is not what its endpoint takes (JSON object, multipart form)."""


class Unauthorized(RouterError, status=401, code="invalid_token", kind="authentication_error"):
    """A token is needed and none that is valid was given."""


class Forbidden(RouterError, status=403, code="forbidden", kind="permission_error"):
    """The policy refuses this request, whatever it carries."""


class NotFound(BadRequest, status=404, code="not_found"):
    """No such path, model or request."""


class MethodNotAllowed(BadRequest, status=405, code="method_not_allowed"):
    """The path exists, but not for this method; `fields` holds Allow."""


class RequestTimeout(BadRequest, status=408, code="request_timeout"):
    """The client was too slow with its head or its content."""


class ContentTooLarge(BadRequest, status=413, code="content_too_large"):
    """The content is longer than MAX_REQUEST_SIZE."""


class TargetTooLong(BadRequest, status=414, code="target_too_long"):
    """The request line is longer than LIMITS.request_line."""


class UnsupportedContent(BadRequest, status=415, code="unsupported_content"):
    """The content has a coding that the router cannot read."""


class MisdirectedRequest(Forbidden, status=421, code="misdirected_request"):
    """The Host is not one that the Web UI answers to (DNS rebinding)."""


class TooManyRequests(RouterError, status=429, code="too_many_failures", kind="rate_limit_error"):
    """Too many failed tokens from one address."""


class RateExceeded(TooManyRequests, code="rate_limit_exceeded"):
    """A token has had all the requests that its rate allows for now."""


class UpgradeRequired(BadRequest, status=426, code="upgrade_required"):
    """The client asks for another protocol, and is served over HTTP alone."""


class FieldsTooLarge(BadRequest, status=431, code="fields_too_large"):
    """One field, all of them or their number is over the limit."""


class ClientClosed(RouterError, status=499, code="client_closed", kind="client_error"):
    """The client went away before its answer was complete; only the log sees it."""


class Cancelled(RouterError, status=499, code="cancelled", kind="client_error"):
    """Somebody stopped the request from the page."""


class NotSupported(BadRequest, status=501, code="not_supported"):
    """No configured server can do what was asked."""


class BadGateway(RouterError, status=502, code="bad_gateway", kind="upstream_error"):
    """No upstream gave an answer that could be passed on: none at all, or a broken one."""

    # Whether there was no connection to the server: its machine may be switched off.
    unreached = False


class ErrorAnswer(BadGateway):
    """The upstream's answer is an error, whatever its status says; the message has its words.

    `told_status` is the status that the words came with, None without one.
    """

    def __init__(self, message: str, told_status: int | None = None) -> None:
        super().__init__(message)
        self.told_status = told_status


class Unavailable(RouterError, status=503, code="shutting_down"):
    """The router is shutting down."""


class LogUnavailable(RouterError, status=503, code="log_unavailable"):
    """The request log cannot be read now."""


class Overloaded(RouterError, status=503, code="overloaded"):
    """The router holds as much as it may; the same request can succeed later."""


class QueueFull(RouterError, status=503, code="queue_full"):
    """All servers are full, and too many requests wait for them already (QUEUE_SIZE)."""


class QueueTimeout(RouterError, status=503, code="queue_timeout"):
    """All servers were full for as long as a request may wait (QUEUE_TIMEOUT)."""


class ServerClosed(RouterError, status=503, code="server_closed"):
    """The server that could serve the request takes none, because its owner said so."""


class GatewayTimeout(BadGateway, status=504, code="upstream_timeout"):
    """An upstream did not answer in time; the message names the setting."""


class VersionNotSupported(MalformedMessage, status=505, code="http_version_not_supported"):
    """A version of HTTP other than 1.0 and 1.1."""


class LoopDetected(BadRequest, status=508, code="loop_detected"):
    """The request has been through this router before (RFC 9110 7.6.3)."""


# ======================================================================================
# 2  Settings (pure)
# ======================================================================================
# Every setting stands here once, on one line: name, type, default, reader, help. A value
# comes from the environment or from the flag of the same name, which wins. A bad value
# stops the start with a line that names the variable, the value and what is allowed.
# To add a setting: a line in `Settings`; its flag, its help and its check follow from it.
# What no owner has to choose is a field of `Limits`, with its reason.

MIN_SECRET_LENGTH = 32
MIN_SECRET_VARIETY = 10
WELL_KNOWN_SECRETS = (
    "changeme",
    "change-me",
    "your-secret",
    "your_secret",
    "secret-key",
    "supersecret",
    "jwt-secret",
    "jwt_secret",
    "example",
    "password",
)
POLICIES = ("NONE", "AUTH_WHEN_PROXIED", "ALWAYS_AUTH")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
DECIMAL_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,9})?")
ABSOLUTE_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PATTERN_WITH_FLAGS = re.compile(r"/(.+)/([gimsuxy]{1,3})", re.DOTALL)
HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")
# The octets that stand in a path as they are (RFC 3986 section 3.3), with the `%` of the others.
# Among those left out are blanks, quotes, `?`, `#` and all that is not ASCII.
URL_PATH = re.compile(r"[!$-;=@-Z_a-z~%]*")
# What a server's URL must not end in: the router adds the endpoint itself.
ENDPOINT_AT_END = re.compile(
    r"(?:/chat/completions|/v1/(?:completions|embeddings|models|responses)|"
    r"/api/(?:chat|generate|tags))/*$"
)
# One of SERVERS: a name may stand before the URL.
NAMED_URL = re.compile(r"(?:([^=:/]+)=)?(.+)")
# An origin, or a scheme alone: `app:` is every origin of that scheme. A scheme of web pages is
# none of these, because it would be anybody's.
ORIGIN = re.compile(r"\*|loopback|null|[a-z][a-z0-9+.-]*://[^/?#\s]+|(?!https?:)[a-z][a-z0-9+.-]*:")
DEFAULT_PORTS = {"http": 80, "https": 443}

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
# What the names of models are compared with: one name, or a pattern that is searched in them.
NamePattern = str | re.Pattern[str]
# What SERVERS says: the name and the URL of each, the URL as it stands there.
NamedURLs = tuple[tuple[str, str], ...]
# What MODEL_MAP says: pairs of what a name must match and what it becomes, in the order to try.
ModelMap = tuple[tuple[NamePattern, str], ...]


class UpstreamURL(NamedTuple):
    """Where a server listens; `prefix` is the path that stands before /v1."""

    scheme: str
    host: str
    port: int
    prefix: str

    @property
    def authority(self) -> str:
        """What goes into Host: the port only when it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == DEFAULT_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    @property
    def without_scheme(self) -> str:
        """What a server is called that has no name, such as `gpu:8000`."""
        return f"{self.authority}{self.prefix}"

    def is_under(self, *domains: str) -> bool:
        """Tell whether the host is one of some domains, or lies under it."""
        host = f".{self.host.lower().removesuffix('.')}"
        return any(host.endswith(f".{domain}") for domain in domains)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.without_scheme}"


def require(condition: object, message: str) -> None:
    """Raise ValueError with the message unless a condition holds."""
    if not condition:
        raise ValueError(message)


def is_address(name: str) -> bool:
    """Tell whether a name is an IP address: `10.0.0.7` and `::1` are, `gpu-box` is not."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_host_name(name: str) -> bool:
    """Tell whether a name can be one in the DNS: `gpu-box.lan` is, `a..b` is not (RFC 1035)."""
    labels = name.removesuffix(".").split(".")
    return HOST_NAME.fullmatch(name) is not None and all(0 < len(label) < 64 for label in labels)


# --- readers of values ------------------------------------------------------------------
# A reader gets the text of a variable and returns its value. It raises ValueError with
# what is wrong and what is allowed; who calls it adds the variable's name and the text.


def parse_upstream_url(text: str) -> UpstreamURL:
    """Read a server's URL. Raises ValueError.

    `gpu:8000`, `http://gpu:8000/` and `http://gpu:8000/v1` all mean
    UpstreamURL("http", "gpu", 8000, ""); `https://box/llm/v1` has the prefix `/llm`.
    """
    has_scheme = ABSOLUTE_SCHEME.match(text)
    parts = urllib.parse.urlsplit(text if has_scheme else f"http://{text}")
    host = parts.hostname or ""
    has_more = parts.username is not None or parts.query or parts.fragment
    endpoint = ENDPOINT_AT_END.search(parts.path)
    require(parts.scheme in DEFAULT_PORTS, f"scheme {parts.scheme!r} instead of http or https")
    require(not has_more, "a user, query or fragment is not allowed in it")
    if endpoint:
        raise ValueError(f"it ends in {endpoint[0]}, which the router adds itself; leave that out")
    require(is_host_name(host) or is_address(host), f"no valid host in it: {host!r}")
    require(parts.port != 0, "port 0 instead of 1 to 65535")
    require(URL_PATH.fullmatch(parts.path), "its path has a character that must be percent-encoded")
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return UpstreamURL(parts.scheme, host, port, prefix)


def url_warning(name: str, text: str) -> str | None:
    """Return what to say about a URL without a scheme, None when it has one."""
    if ABSOLUTE_SCHEME.match(text):
        return None
    return f"{name}: {text!r} has no scheme; http:// is assumed"


def parse_bool(text: str) -> bool:
    """Read a truth value: 1 true yes on, or 0 false no off, in any case."""
    word = text.strip().lower()
    allowed = f"{' '.join(TRUE_WORDS)}, {' '.join(FALSE_WORDS)}"
    require(word in TRUE_WORDS or word in FALSE_WORDS, f"allowed are {allowed}")
    return word in TRUE_WORDS


def parse_thinking(text: str) -> str:
    """Read what becomes of thinking: 'true' -> 'strip', 'false' -> 'keep', 'move' -> 'move'."""
    if text.strip().lower() == "move":
        return "move"
    try:
        return "strip" if parse_bool(text) else "keep"
    except ValueError as error:
        raise ValueError(f"{error}, or move") from None


def number_between(low: float, high: float, whole: bool = True) -> Callable[[str], float]:
    """Return a reader of whole or decimal numbers from `low` to `high`: '8080' -> 8080.

    `int` and `float` alone accept much that nobody means, such as `1_0`, `1e3` or `nan`.
    """
    grammar = WHOLE_NUMBER if whole else DECIMAL_NUMBER
    kind = "a whole number" if whole else "a number"
    # Unlike `g` alone, which writes 1e+12, this shows no number in a way that is not read.
    allowed = f"allowed is {kind} from {low:.16g} to {high:.16g}"

    def parse_number(text: str) -> float:
        require(grammar.fullmatch(text.strip()), allowed)
        number = int(text) if whole else float(text)
        require(low <= number <= high, allowed)
        return number

    return parse_number


def choice_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of `choices` in any case: ' none' -> 'NONE'."""

    def parse_choice(text: str) -> str:
        for choice in choices:
            if choice.lower() == text.strip().lower():
                return choice
        raise ValueError(f"allowed are {', '.join(choices)}")

    return parse_choice


def parse_text(text: str) -> str:
    """Read a name that may not be empty, and return it as it is."""
    # No file and no host can have a NUL in its name: opening it would fail later.
    require(text.strip() and "\0" not in text, "allowed is a name that is not empty")
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Read names between commas or blanks: 'Box.lan, nas' -> ('box.lan', 'nas')."""
    return tuple(text.replace(",", " ").lower().split())


def parse_default_upstream(text: str) -> str:
    """Read a URL, the name of a server, or `none`: ' gpu' -> 'gpu'.

    What is no URL is looked up among the servers when the routing file is read.
    """
    word = parse_text(text).strip()
    if ABSOLUTE_SCHEME.match(word):
        parse_upstream_url(word)
    return word


def parse_servers(text: str) -> NamedURLs:
    """Read servers between commas or blanks, each a URL or `name=URL`.

    'http://mac:1234/v1, gpu=10.0.0.2:8000'
    ->  (('mac:1234', 'http://mac:1234/v1'), ('gpu', '10.0.0.2:8000'));  'none'  ->  ()
    """
    words = text.replace(",", " ").split()
    servers: dict[str, str] = {}
    for word in words if words != ["none"] else ():
        name, url_text = NAMED_URL.fullmatch(word).groups()
        try:
            url = parse_upstream_url(url_text)
        except ValueError as error:
            raise ValueError(f"{word!r}: {error}; allowed are URL and name=URL") from None
        name = name or url.without_scheme
        require(name not in servers, f"{name!r} stands there twice")
        servers[name] = url_text
    return tuple(servers.items())


def parse_listen_host(text: str) -> str:
    """Read what to listen on: 'localhost', '::1', '[::1]' and '0.0.0.0' are good."""
    host = text.strip()
    allowed = "allowed are an address or a name of this machine; 0.0.0.0 or :: for all of them"
    require(is_host_name(host) or is_address(host.strip("[]")), allowed)
    return host


def parse_hosts(text: str) -> tuple[str, ...]:
    """Read names as Host has them: 'Box.example, nas:8080' -> ('box.example', 'nas:8080')."""
    hosts = parse_names(text)
    for host in hosts:
        name, _, port = host.partition(":")
        is_host = is_host_name(name) and (not port or WHOLE_NUMBER.fullmatch(port))
        allowed = "allowed are names such as router.example or router.example:8080"
        require(is_host or is_address(host.strip("[]")), f"{host!r} is no host; {allowed}")
    # Host loses a dot at its end before it is compared.
    return tuple(host.removesuffix(".") for host in hosts)


def parse_origins(text: str) -> tuple[str, ...]:
    """Read browser origins: 'https://chat.lan loopback' -> ('https://chat.lan', 'loopback')."""
    origins = parse_names(text)
    for origin in origins:
        allowed = "allowed are https://host:port, schemes such as app:, loopback, null and *"
        require(ORIGIN.fullmatch(origin), f"{origin!r} is no origin; {allowed}")
    return origins


def parse_networks(text: str) -> tuple[IPNetwork, ...]:
    """Read addresses and CIDRs: '10.0.0.0/24, ::1' -> two networks; 'none' -> ()."""
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(ipaddress.ip_network(name, strict=False) for name in parse_names(text))
    except ValueError as error:
        raise ValueError(f"{error}; allowed are addresses and CIDRs") from None


def add_flags(pattern: str, flags: str) -> str:
    """Write a pattern with those of its flags that mean something: '^GPT', 'gi' -> '/(?i)^GPT/'."""
    known_flags = "".join(flag for flag in "imsx" if flag in flags)
    return f"/(?{known_flags}){pattern}/" if known_flags else f"/{pattern}/"


def parse_pattern(text: str) -> NamePattern:
    """Read what a model is compared with: 'gpt-4' -> 'gpt-4', '/^gpt/' -> re.compile('^gpt')."""
    flagged = PATTERN_WITH_FLAGS.fullmatch(text)
    if flagged:
        # JavaScript writes patterns so. Taken as an exact name, it would match no model.
        remedy = add_flags(*flagged.groups())
        raise ValueError(f"{text!r} has flags behind the pattern; write {remedy!r}")
    if len(text) < 3 or not (text.startswith("/") and text.endswith("/")):
        return text
    try:
        return re.compile(text[1:-1])
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None


def pattern_text(pattern: NamePattern) -> str:
    """Write what `parse_pattern` has read: re.compile('^gpt') -> '/^gpt/'."""
    return pattern if isinstance(pattern, str) else f"/{pattern.pattern}/"


def check_template(template: str, pattern: NamePattern | None) -> None:
    r"""Refuse a name such as `llama-\2` that a pattern with one group cannot fill."""
    if not isinstance(pattern, re.Pattern):
        return
    try:
        # This reads the template whether or not the pattern is found in the empty text.
        pattern.sub(template, "")
    except (re.error, IndexError) as error:
        groups = f"the pattern has {pattern.groups} groups"
        raise ValueError(f"{template!r} does not fit: {error}; {groups}") from None


def parse_model_map(text: str) -> ModelMap:
    """Read a JSON object: '{"/^gpt/": "qwen3", "gpt-4": "llama3"}' -> pairs, exact names first."""
    try:
        # With this hook an object is a tuple of its pairs, in their order; nothing else is one.
        pairs = json.loads(text or "{}", object_pairs_hook=tuple)
        require(isinstance(pairs, tuple), "no object")
    except (ValueError, RecursionError) as error:
        example = '{"gpt-4": "llama3"}'
        raise ValueError(f"no JSON ({error}); allowed is an object such as {example}") from None
    exact: list[tuple[NamePattern, str]] = []
    patterns: list[tuple[NamePattern, str]] = []
    for key, target in pairs:
        both_named = isinstance(target, str) and target != "" and key != ""
        require(both_named, f"{key!r} must map to a name, not to {target!r}")
        pattern = parse_pattern(key)
        check_template(target, pattern)
        group = exact if isinstance(pattern, str) else patterns
        group.append((pattern, target))
    return (*exact, *patterns)


def parse_secret(text: str) -> str:
    """Read a JWT secret; a weak one is refused. The value never enters the message."""
    secret = text.strip()
    remedy = "try: openssl rand -hex 32"
    strong = len(secret) >= MIN_SECRET_LENGTH and len(set(secret)) >= MIN_SECRET_VARIETY
    allowed = f"at least {MIN_SECRET_LENGTH} characters, at least {MIN_SECRET_VARIETY} different"
    require(strong, f"too weak: allowed are {allowed}; {remedy}")
    for well_known in WELL_KNOWN_SECRETS:
        require(well_known not in secret.lower(), f"a well-known default; {remedy}")
    return secret


# --- the settings -----------------------------------------------------------------------


def setting(default: str | None, parse: Callable[[str], Any], help_line: str) -> Any:
    """Declare a setting, a field of `Settings`.

    Its default is the text that one would write in the environment; None leaves it unset.
    """
    value = None if default is None else parse(default)
    metadata = {"parse": parse, "help": help_line, "default": default}
    return dataclasses.field(default=value, metadata=metadata)


class GivenSetting(NamedTuple):
    """A setting that somebody has set: where (`LISTEN_PORT`, `--listen-port`), and its text."""

    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment and the flags say; valid once it exists."""

    # Each setting stands on one line: its default, its reader and its help are read together.
    # fmt: off
    # ruff: disable[E501]
    default_upstream: str = setting("http://localhost:8000", parse_default_upstream, "where a request goes that no rule claims: a URL, a server's name or none; with SERVERS the first of them")
    servers: NamedURLs = setting("none", parse_servers, "model servers without a routing file: URL or name=URL, between commas or blanks")
    route_by_model: bool = setting("true", parse_bool, "send a model that no alias or rule claims to the server that lists it")
    default_model: str | None = setting(None, parse_text, "the model of a request that names none")
    listen_host: str = setting("127.0.0.1", parse_listen_host, "address to listen on")
    listen_port: int = setting("1234", number_between(0, 65535), "port to listen on; 0 takes a free one")
    routes_config: str = setting("routes.yaml", parse_text, "routing file, YAML or JSON; the default one may be missing")
    model_map: ModelMap = setting("{}", parse_model_map, "JSON object: exact names and /regex/ keys to names")
    strip_thinking: str = setting("true", parse_thinking, "take <think> blocks out of answers; move: put them where clients look for thinking")
    strip_json_markdown: bool = setting("false", parse_bool, "take the fence lines of ```json blocks out of answers")
    disable_thinking: bool = setting("false", parse_bool, "ask every model not to think, and append /no_think to the last user message")
    strip_attribution: bool = setting("true", parse_bool, "take Claude Code's line that changes with every request out of its system prompt")
    enable_logging: bool = setting("true", parse_bool, "keep every request; false writes nothing to disk")
    request_timeout: float = setting("3000.0", number_between(0.01, 1e6, whole=False), "longest silence from an upstream, s")
    connect_timeout: float = setting("5.0", number_between(0.01, 600, whole=False), "longest wait for a connection to an upstream, s")
    ping_interval: float = setting("15", number_between(0, 3600, whole=False), "s of silence after which a streaming client gets a sign of life; 0: never")
    queue_timeout: float = setting("300", number_between(0.01, 86400, whole=False), "longest wait for a slot of a server, s")
    queue_size: int = setting("1000", number_between(0, 10**6), "requests that may wait for a slot at once; 0: none waits")
    db_path: str = setting("requests.db", parse_text, "the request log's database")
    max_log_age_days: float = setting("7", number_between(0.01, 36500, whole=False), "days that a request is kept")
    blob_storage_type: str = setting("filesystem", choice_of("filesystem", "memory"), "where long bodies are kept: filesystem or memory")
    blob_storage_path: str = setting("blob_storage", parse_text, "folder of the long bodies")
    max_blob_size: int = setting("10485760", number_between(0, 10**12), "bytes kept of one body; a longer one is cut and marked")
    max_total_storage_size: int = setting("1073741824", number_between(0, 10**15), "bytes kept of all bodies; the oldest go first")
    max_request_size: int = setting("67108864", number_between(1, 10**12), "longest content of a request, bytes; blobs have no limit")
    max_connections: int = setting("2048", number_between(1, 10**6), "connections served at once; more wait in the listen queue")
    jwt_secret: str | None = setting(None, parse_secret, "at least 32 characters, 10 different ones; signs the tokens")
    webui_security: str = setting("AUTH_WHEN_PROXIED", choice_of(*POLICIES), "who may see the Web UI: NONE, AUTH_WHEN_PROXIED, ALWAYS_AUTH")
    api_security: str = setting("NONE", choice_of(*POLICIES), "who may use the model API: the same three")
    tls_cert: str | None = setting(None, parse_text, "PEM file with a certificate and its chain: clients speak https with the router")
    tls_key: str | None = setting(None, parse_text, "PEM file with its key; both are read again on SIGHUP")
    trusted_proxies: tuple[IPNetwork, ...] = setting("none", parse_networks, "addresses or CIDRs whose X-Forwarded-For is believed")
    allowed_hosts: tuple[str, ...] = setting("", parse_hosts, "extra Host names for the Web UI")
    allowed_origins: tuple[str, ...] = setting("loopback", parse_origins, "browser origins that may call the API; app: for all of a scheme, * for all")
    shutdown_grace: float = setting("8", number_between(0, 3600, whole=False), "s that running requests get after SIGTERM")
    log_level: str = setting("INFO", choice_of(*LOG_LEVELS), "DEBUG, INFO (a line a request on stderr), WARNING, ERROR")
    # ruff: enable[E501]
    # fmt: on

    @classmethod
    def find_given(
        cls, environ: Mapping[str, str], flags: Mapping[str, Any]
    ) -> dict[str, GivenSetting]:
        """Return what is set, by field name; a flag wins over its variable."""
        given: dict[str, GivenSetting] = {}
        # DEFAULT_ROUTE is the older name of DEFAULT_UPSTREAM. The new one is read later and wins.
        if "DEFAULT_ROUTE" in environ:
            given["default_upstream"] = GivenSetting("DEFAULT_ROUTE", environ["DEFAULT_ROUTE"])
        for field in dataclasses.fields(cls):
            name = field.name
            variable = name.upper()
            if name in flags:
                given[name] = GivenSetting(f"--{name.replace('_', '-')}", flags[name])
            elif variable in environ:
                given[name] = GivenSetting(variable, environ[variable])
        return given

    @classmethod
    def read_given(cls, given: Mapping[str, GivenSetting]) -> tuple[Settings, dict[str, str]]:
        """Read the texts of what is set; return what is wrong with some, by field name, too.

        A wrong one has its default.
        """
        values: dict[str, Any] = {}
        mistakes: dict[str, str] = {}
        for field in dataclasses.fields(cls):
            if field.name not in given:
                continue
            source, text = given[field.name]
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                seen = "<hidden>" if field.name == "jwt_secret" else repr(text)
                mistakes[field.name] = f"{source}={seen}: {error}"
        if values.get("servers") and "default_upstream" not in given:
            _, values["default_upstream"] = values["servers"][0]
        settings = cls(**values)
        # With a good secret the policies may be right.
        if "jwt_secret" not in mistakes:
            mistakes.update(settings.find_bad_policies())
        if not mistakes.keys() & {"tls_cert", "tls_key"}:
            mistakes.update(settings.find_bad_tls())
        return settings, mistakes

    @classmethod
    def from_given(cls, given: Mapping[str, GivenSetting]) -> Settings:
        """Read the texts of what is set. Raises ConfigError."""
        settings, mistakes = cls.read_given(given)
        if mistakes:
            raise ConfigError(*mistakes.values())
        return settings

    @classmethod
    def from_mapping(
        cls, environ: Mapping[str, str], flags: Mapping[str, str] | None = None
    ) -> Settings:
        """Build from variables by their names, flags by the names of fields. Raises ConfigError."""
        return cls.from_given(cls.find_given(environ, flags or {}))

    def find_bad_policies(self) -> Iterator[tuple[str, str]]:
        """Yield the policies that nobody could satisfy, and what is wrong with them."""
        for name in ("webui_security", "api_security"):
            if getattr(self, name) == "ALWAYS_AUTH" and self.jwt_secret is None:
                remedy = f"at least {MIN_SECRET_LENGTH} random characters (openssl rand -hex 32)"
                yield (
                    name,
                    f"{name.upper()}='ALWAYS_AUTH': JWT_SECRET is not set; set it to {remedy}",
                )

    def find_bad_tls(self) -> Iterator[tuple[str, str]]:
        """Yield a certificate without a key, or a key without one, and what is wrong with it."""
        files = {"TLS_CERT": self.tls_cert, "TLS_KEY": self.tls_key}
        given = [name for name, file in files.items() if file]
        if len(given) == 1:
            (name,) = given
            other = "TLS_KEY" if name == "TLS_CERT" else "TLS_CERT"
            remedy = f"https needs both; set {other}, to the same file if that has both"
            yield name.lower(), f"{name}={files[name]!r}: {other} is not set; {remedy}"


# --- the limits -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much, how many and how long; bytes and seconds where nothing else is said.

    These are no settings, because the same values are good on every machine. They are one
    record, and whoever needs some of them is given it, so that a test can pass small ones.
    """

    # --- heads of messages (RFC 9112) ---
    # Long enough for what real clients send (cookies, tracing, signed URLs), short enough that
    # a connection costs little before it proves useful. RFC 9112 section 3 asks for request
    # lines of at least 8,000 octets. A longer line is answered with 414, the others with 431.
    request_line: int = 16 * KiB
    field_line: int = 16 * KiB
    all_field_lines: int = 64 * KiB
    field_count: int = 128
    # The head of an upstream's response; a longer one is no valid answer (502).
    response_head: int = 64 * KiB
    # A server may send a few 1xx responses before the real one. One that never stops (502)
    # would keep its client waiting for ever.
    interim_responses: int = 50

    # --- chunked content (RFC 9112 section 7.1) ---
    # What is longer is malformed (400, or 502 from an upstream). The extensions of one content
    # have a limit together: a server that counted each line alone was CVE-2023-39326.
    chunk_line: int = 1 * KiB
    chunk_extensions: int = 16 * KiB
    trailers: int = 8 * KiB

    # --- connections of clients ---
    # A head that takes longer gets 408: slow senders (slowloris) would use up MAX_CONNECTIONS.
    head_timeout: float = 10.0
    # With https, a client that has not agreed on keys within this time is dropped.
    handshake_timeout: float = 10.0
    # A connection that has been idle for so long is closed. That is more than the 60 s after
    # which most clients and proxies close theirs, so that they seldom write into a closing one.
    keep_alive_timeout: float = 75.0
    # After so many requests, or while MAX_CONNECTIONS are open, a connection may be idle only
    # for `short_keep_alive_timeout`, so that others get their turn.
    requests_per_connection: int = 10_000
    short_keep_alive_timeout: float = 1.0
    # The content of a request may be slow for so long. Then it has to keep a rate, in octets a
    # second (as Apache's mod_reqtimeout asks for); a slower one gets 408.
    content_grace: float = 20.0
    content_rate: int = 500
    # An answer of which the client takes nothing for so long is given up.
    write_timeout: float = 300.0
    # After an error the router reads on for so long: octets that come after the close would
    # reset the connection and destroy the answer on its way (RFC 9112 section 9.6).
    linger_timeout: float = 2.0
    # Content that nobody wanted is read past up to this length, so that the connection can be
    # used again; above it the connection ends.
    discarded_content: int = 64 * KiB
    # What has come and is not used yet; above it the sender waits.
    read_ahead: int = 128 * KiB
    # What a slow client has not taken yet; above it its upstream waits.
    write_buffer: int = 256 * KiB
    # Answers of the router's own, such as a page with a long conversation, are written as a whole.
    # While those that no client has taken yet are so long together, a further long one gets 503.
    unread_answers: int = 64 * MiB
    # What is written in one turn of the event loop is sent together at its end; above this
    # size at once, because a larger piece gains nothing.
    unsent: int = 64 * KiB
    # All running requests together may hold so much content; while they do, another long one
    # gets 503. While it is read and edited, JSON takes about four times its length.
    held_content: int = 256 * MiB
    # So many requests begin in one turn of the event loop, which takes some 5 ms then.
    requests_per_turn: int = 32
    # Python's default of 100 makes the 101st client of a burst wait for one to three seconds.
    listen_backlog: int = 4096
    # Connections accepted in one turn of the event loop: while hundreds begin at once, the
    # events of running streams still get through in between.
    accepted_per_turn: int = 4
    # File descriptors that clients and upstreams do not get: the database, bodies, look-ups.
    spare_files: int = 64
    # How often the deadlines of all connections are looked at: that costs less than a timer each.
    deadline_interval: float = 0.25

    # --- JSON ---
    # Levels of nesting; values, counted by their commas; nodes, which are objects and arrays.
    # Each costs memory and time in which nothing else runs, and a document of 64 MiB can hold
    # millions of them. A deeper document gets 400, one with more values or nodes 413. Real
    # requests have fewer than ten levels, and one value for some dozen octets of text.
    json_depth: int = 200
    json_values: int = 1_000_000
    json_nodes: int = 250_000
    # Content from this length on is read in a thread, so that nobody waits for it.
    long_content: int = MiB

    # --- answers on their way through a rewriter ---
    # A whole answer up to `buffered_answer`, and one with a content coding up to
    # `decoded_answer` when it is decoded, is kept back to be rewritten. A longer one is relayed
    # as it is, or is 502 where its client could not read it.
    buffered_answer: int = 64 * MiB
    decoded_answer: int = 32 * MiB
    # An event is kept back until it is complete. A longer one is relayed as it is, or ends the
    # stream where its client could not read it. An image in base64 fits.
    buffered_event: int = 4 * MiB
    # A stream may have so many texts, such as those of its choices, each with a filter of its
    # own; one more ends it with an error. A client can ask vLLM for that many choices.
    texts_per_stream: int = 16_384
    # Where a text may have begun inside of a block of thinking, so many characters are held back
    # until the tag comes that closes it. Behind a backtick, a tag waits for the other one so long.
    held_thinking: int = 64 * KiB
    code_span: int = 4 * KiB
    # Tool calls of one answer that fragments may still continue; older ones are complete.
    open_tool_calls: int = 64
    # An answer that has said nothing up to this length, but begins and pings, counts as one all the
    # same where another instance could be asked: what it has sent is kept back until then.
    silent_beginning: int = 64 * KiB
    # An error answer kept while the next instance is tried; a longer one counts as none.
    buffered_error: int = MiB

    # --- names that clients choose, in characters ---
    # A longer name of a model is refused: it goes into rows, fields and pages.
    model_name: int = 16_384
    # Longer names are not tried on patterns, because a harmless one such as `/.*-1.5b/` takes
    # quadratic time: on a name of 200 kB everybody would wait for minutes.
    pattern_name: int = 256
    # In rows, lists and metrics a longer text is cut, and ends with a hash: there are many of them,
    # and they stay for long.
    shown_name: int = 256
    # So many decisions of the routing are remembered, by model and source host; the one that was
    # used least recently goes. A home has a few dozen of them. Each has a trail with a step for
    # every rule: with a thousand rules, that makes up to 50 MB. The JSON of a trail is remembered
    # as well, up to so many steps.
    decisions: int = 256
    remembered_steps: int = 64
    # Of an error's text, so much goes into rows and printed lines; of the answer that holds it,
    # so much is looked at. Some servers put a traceback beside it, or all of the request.
    error_text: int = 400
    # A change of a request by its parameters is told in so many characters at most.
    shown_change: int = 200
    error_content: int = 64 * KiB

    # --- tokens ---
    # A longer token is refused (401) before anything is computed from it.
    token: int = 8 * KiB
    # An address with so many failures within the window gets 429 for its next one. When there
    # are more addresses with failures, the one whose last failure is the oldest is forgotten.
    token_failures: int = 10
    token_failure_window: float = 60.0
    token_failure_addresses: int = 10_000
    # So many tokens have their requests counted; the one that was used least recently is forgotten.
    # Only the owner makes tokens, and a home has a few dozen.
    counted_tokens: int = 10_000

    # --- upstreams ---
    # Idle connections to a server are kept for so long, and so many of them: as many as there
    # can be clients. Servers close idle ones themselves, uvicorn after 5 s, Go never.
    idle_connection_timeout: float = 30.0
    idle_connections: int = 2048
    # A stream is over with its last event. When the end of its framing, which most servers send
    # a moment later, has not come within this time, its connection is closed.
    content_end: float = 1.0
    # When it takes longer to look a name up, the addresses that it had last are tried.
    lookup_timeout: float = 2.0
    # They may be used for so long after the first failure to look it up: the name server of a
    # home is often its Internet router, which may be starting again.
    addresses_kept: float = 300.0
    # The next address of a name is tried so much later than the one before it (RFC 8305).
    address_delay: float = 0.25
    # A machine that is switched off, or out of the network, says nothing at all. Each connection
    # asks for a sign every `probe_interval`, in whole seconds. Without one for `idle_ack_timeout`
    # an idle connection is dropped. A request waits longer, for `busy_ack_timeout`, before it has
    # failed: a network may be away for half a minute.
    probe_interval: int = 5
    idle_ack_timeout: float = 15.0
    busy_ack_timeout: float = 60.0
    # Instances whose health is remembered; clients choose the names of models. When there are
    # more, the oldest tenth that is not busy is forgotten.
    known_instances: int = 1000
    # A failed instance is tried last for `cool_down`. That doubles with each failure, up to
    # `longest_cool_down`. A Retry-After is obeyed up to `longest_retry_after`.
    cool_down: float = 5.0
    longest_cool_down: float = 60.0
    longest_retry_after: float = 300.0
    # A request that waits for a slot lets newer ones of a higher priority go before it for so long.
    longest_overtaking: float = 30.0
    # What a client is told, in whole seconds, to wait before it asks full servers again.
    full_retry_after: int = 10
    # So many conversations have a home with `strategy: sticky`, each for `home_kept` after its last
    # request, and so many answers of /v1/responses are known by their ids. A conversation whose
    # home is full waits there for `home_wait` before another instance serves it once.
    homes: int = 10_000
    home_kept: float = 3600.0
    response_home_kept: float = 86_400.0
    home_wait: float = 2.0
    # A machine that is to wake up gets a magic packet, and is tried, so often.
    magic_packet_interval: float = 5.0
    waking_interval: float = 2.0
    # A server has `model_list_timeout` to list its models. For `model_list_fresh` it is not asked
    # again, so that a page is quick. When it is gone, its last list counts for `model_list_kept`,
    # so that a reboot loses no model.
    model_list_timeout: float = 2.0
    model_list_fresh: float = 60.0
    model_list_kept: float = 600.0
    # A model that no server lists may be new. Then lists that are older than `model_list_stale` are
    # asked for again before the request goes to DEFAULT_UPSTREAM, at most once in
    # `model_search_interval`, because clients choose the names.
    model_list_stale: float = 2.0
    model_search_interval: float = 10.0
    # What a server says at its root tells which API it speaks; so much of it is looked at.
    greeting: int = 64
    # A longer list counts as a failure. Cloud providers list a few hundred kB.
    model_list_size: int = 4 * MiB
    # So many servers are asked at once, each in a thread. So many lists are remembered: there is
    # one for each server and each client's credentials there, and clients choose these.
    model_list_fetches: int = 32
    model_lists: int = 200
    # An error in place of a list is kept for its client up to this length.
    refused_list: int = 16 * KiB

    # --- a look at servers from the command line ---
    # A server has `probe_timeout` to say something of itself, a model `probed_model_timeout` to say
    # a few tokens: before its first one it may have to be loaded from a disk.
    probe_timeout: float = 5.0
    probed_model_timeout: float = 60.0
    # A start without any server looks for the usual ones at these ports, on this machine alone, in
    # the order of LOCAL_SERVERS, and waits so long for each.
    local_ports: Sequence[int] = (11434, 1234, 8080)
    local_server_timeout: float = 0.5

    # --- the log ---
    # Bodies up to this length stand in the database, where the page finds them at once; longer
    # ones in files, because SQLite is slow with them.
    inline_body: int = 16 * KiB
    # Bodies of running requests and of rows that wait; above it, new ones are cut and marked.
    body_memory: int = 32 * MiB
    # While a full batch of rows waits, packing bodies may take `body_time_share` of a processor's
    # time. What is not used of it is saved for a burst, up to `body_time_savings`. When none is
    # left, only the first `short_body` octets of each body are kept, which cost next to nothing.
    body_time_share: float = 0.05
    body_time_savings: float = 0.5
    short_body: int = 1 * KiB
    # Rows that wait for a database in trouble, and their octets with what belongs to them, such as
    # the fields of both heads; the oldest go first, and are counted as lost.
    backlog_rows: int = 10_000
    backlog_octets: int = 64 * MiB
    # Rows are gathered for so long, or until there are so many, and written in one transaction,
    # because each transaction waits for the disk.
    batch_interval: float = 0.1
    batch_rows: int = 256
    # When a full batch of rows waits, the oldest for more than `row_delay`, the log is behind:
    # then new requests wait for it, for `log_wait` at most.
    row_delay: float = 0.2
    log_wait: float = 1.0
    # While nothing is written, the files of the database are looked at so often: what stands in
    # one that somebody has removed is lost when the program is killed.
    log_check_interval: float = 5.0
    # So often it is looked whether another router has died and left rows of running requests.
    interrupted_interval: float = 10.0
    # After trouble with the database it is tried again `retry_interval` later. While another
    # program holds its lock, SQLite waits for `database_lock_timeout`.
    retry_interval: float = 1.0
    database_lock_timeout: float = 1.0
    # Rows that are too old, and files above MAX_TOTAL_STORAGE_SIZE, are looked for so often.
    prune_interval: float = 3600.0
    # Different models and servers that /metrics counts apart; clients choose the names of
    # models, and each is a few dozen lines that a collector keeps. More count as one, "other".
    metric_series: int = 500
    # A secret of at least so many octets is looked for in the answers that are kept, and hidden
    # there. To look for a shorter one, such as `test`, would hide plain words.
    echoed_secret: int = 16

    # --- the page ---
    # A search for text looks at so many of the newest rows, which takes about 50 ms.
    searched_rows: int = 20_000
    # It looks for so many words; each takes as long where all those before it are found.
    searched_words: int = 8
    # News of requests are sent to a page at most so often, at most so many of a kind at once;
    # a comment is sent after so long a silence, or a proxy in between would close the stream.
    news_interval: float = 0.25
    news_rows: int = 100
    news_keep_alive: float = 15.0
    # An export reads so many rows at a time, or so many octets of them, so that others can read and
    # write in between. While `unread_answers` are too many it looks for room so often.
    export_page: int = 200
    export_octets: int = MiB
    export_retry: float = 0.25

    # --- the routing file ---
    # It is looked at so often: for a person, a saved file counts at once.
    reload_interval: float = 2.0


LIMITS = Limits()


# ======================================================================================
# 3  HTTP messages (pure)
# ======================================================================================
# RFC 9112 on bytes, for requests and for responses: heads, field lines, targets, framing,
# chunks. Nothing here waits or looks at a clock: bytes go in, values come out.
#
# The router forwards what it reads. If it and a server behind it found two different ends
# of one message, a client could hide a second request inside the first (request smuggling,
# RFC 9112 section 11.2). So reading is strict: what can be understood in two ways is refused,
# never repaired. To add a rule: change the pattern of that part of the grammar (it is used with
# `fullmatch`), or add a branch to the function that reads that part, and say what it prevents.

# --- grammar --------------------------------------------------------------------------
# Python's own `int()`, `strip()` and `\d` take more than the grammar allows (`+10`, `1_0`,
# no-break spaces), so all classes of characters are spelled out. `$` would let a line feed pass
# at the end, so `fullmatch` is used. FIELD_LINES alone looks for many lines at once; no class in
# it has a CR or an LF, so that no line of it can reach into the next.

# The name of a method, of a field and of much else (RFC 9110 section 5.6.2).
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
FIELD_VALUE = r"[\t\x20-\x7e\x80-\xff]*"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rf"HTTP/1\.([0-9]) ([1-9][0-9]{{2}})(?: ({FIELD_VALUE}))?")
FIELD_LINE = re.compile(rf"({TOKEN}):({FIELD_VALUE})")
FIELD_LINES = re.compile(rf"^{FIELD_LINE.pattern}\r$", re.MULTILINE)
# A line feed without its carriage return, or a carriage return without its line feed. A CR at
# the very end of what has come is not yet a bare one: its LF may be on its way.
BARE_CR_OR_LF = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
# A character of a token, or the CR of an empty line before the head.
HEAD_START = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z\r]")
CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
PLAIN_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
ABSOLUTE_FORM = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
# Also a `%` without its two digits, which is then refused.
PERCENT_OCTET = re.compile(r"%([0-9A-Fa-f]{2})?")
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
LAST_CHUNK = b"0\r\n\r\n"
# Fields that concern one connection alone and so are never forwarded (RFC 9110 section 7.6.1).
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)

# --- fields ---------------------------------------------------------------------------


class Fields:
    """The field lines of a head in their order, names spelled as they came.

    All lines are kept, as two of one name may mean different things to this program and to a
    server behind it. Whoever decides by a field that must stand once, such as Content-Length,
    looks at `get_all`. `lines` holds (lower-case name, name, value); every look-up takes a name
    in lower case. `size` is the number of octets that they came in. Lines that did not come from
    a connection count as long, so that nothing is remembered of them (`remember_short`).
    """

    def __init__(self, lines: list[tuple[str, str, str]], size: float = math.inf) -> None:
        self.lines = lines
        self.size = size
        # The value of the first line of each name: in a dict made backwards the first one stays.
        self.first = {lower: value for lower, _, value in reversed(lines)}
        # `get(name)` is the value of the first line with that name, or None. It is called often,
        # and the dict's own method is faster than one that would call it.
        self.get = self.first.get

    def get_all(self, name: str) -> list[str]:
        """Return the values of all lines with that name, in their order."""
        if name not in self.first:
            return []
        # No name stands twice in most heads; then there is nothing to search for.
        if len(self.first) == len(self.lines):
            return [self.first[name]]
        return [value for lower, _, value in self.lines if lower == name]

    def elements(self, name: str) -> list[str]:
        """Return the elements of a field that is a list, over all its lines, in lower case.

        `Connection: close, ` and `Connection: X-A`  ->  ['close', 'x-a']
        Empty elements count for nothing (RFC 9110 section 5.6.1).
        """
        if name not in self.first:
            return []
        # Several lines mean the same as one with a comma between them (RFC 9110 section 5.3).
        elements = ",".join(self.get_all(name)).lower().split(",")
        stripped = [element.strip(" \t") for element in elements]
        return [element for element in stripped if element]


def parse_fields(text: str) -> Fields:
    r"""Read field lines, each with its CRLF (RFC 9112 section 5).

    'Host: a\r\nX:  b \r\n'  ->  lines [('host', 'Host', 'a'), ('x', 'X', 'b')]

    A line that is not `name: value` raises MalformedMessage: one that begins with a blank (the
    obsolete folding of section 5.2), one with a blank before its colon, with a control character
    or with a bare CR or LF is read differently by different servers. Too many lines or a too
    long one raise FieldsTooLarge.
    """
    # One search finds all lines that are right. If there are fewer of them than line ends,
    # one is wrong, and only then is it worth the time to find out which.
    matches = FIELD_LINES.findall(text)
    if len(matches) != text.count("\n"):
        for line in text.split("\r\n"):
            if not FIELD_LINE.fullmatch(line):
                raise MalformedMessage(f"field line {line[:80]!r} is not `name: value`")
    if len(matches) > LIMITS.field_count:
        raise FieldsTooLarge(f"{len(matches)} field lines; {LIMITS.field_count} are allowed")
    # In most heads all lines together are shorter than one may be.
    if len(text) > LIMITS.field_line:
        longest = max(text.split("\r\n"), key=len)
        if len(longest) > LIMITS.field_line:
            name = longest.partition(":")[0][:80]
            raise FieldsTooLarge(
                f"field {name!r} has {len(longest)} octets, over {LIMITS.field_line}"
            )
    lines = [(name.lower(), name, value.strip(" \t")) for name, value in matches]
    return Fields(lines, len(text))


def encode_field_lines(pairs: Iterable[tuple[str, str]]) -> str:
    r"""Return names and values as field lines.

    [('A', 'b'), ('C', 'd')]  ->  'A: b\r\nC: d\r\n'
    """
    return "".join([f"{name}: {value}\r\n" for name, value in pairs])


# The same few names of models and routes go into nearly every answer.
@functools.lru_cache(maxsize=1024)
def encode_field_value(text: str) -> str:
    """Return a text as a field value of visible ASCII, at most 256 characters.

    Models and routes have names that clients choose. A line end in one of them would begin a
    field of the client's own in the router's answer.
    """
    ascii_text = text.encode("ascii", "backslashreplace").decode("ascii")
    return re.sub(r"[^\x20-\x7e]", "?", ascii_text)[:256]


# All answers of one second have the same; the last second's may still be asked for.
@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """Return a moment as Date has it (RFC 9110 section 5.6.7).

    0  ->  'Thu, 01 Jan 1970 00:00:00 GMT'
    """
    moment = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
    return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")


def parse_retry_after(text: str, now: float) -> float | None:
    """Read a Retry-After (RFC 9110 section 10.2.3): '120' -> 120.0 seconds; None for nonsense.

    A date, 'Fri, 31 Dec 1999 23:59:59 GMT', gives the seconds from `now` until then.
    """
    if re.fullmatch(r"[0-9]{1,6}", text):
        return float(text)
    # Hardly any server sends a date, and the import takes time at the start.
    import email.utils

    try:
        moment = email.utils.parsedate_tz(text)
        if moment is None:
            return None
        return max(email.utils.mktime_tz(moment) - now, 0.0)
    except (ValueError, OverflowError, IndexError):
        return None


# --- framing --------------------------------------------------------------------------


class Framing(NamedTuple):
    """Where a content ends: after `length` octets, where its chunks say, or with the connection.

    `kind` is "length", "chunked" or "until-close". Of the last two there is one object each, the
    constant below, so that `framing is CHUNKED` tells.
    """

    kind: str
    length: int = 0


NO_CONTENT = Framing("length")
CHUNKED = Framing("chunked")
UNTIL_CLOSE = Framing("until-close")


def read_framing(fields: Fields, minor: int) -> Framing | None:
    """Return the framing that fields declare, None when they say nothing (RFC 9112 section 6.3).

    `Content-Length: 5`           ->  Framing('length', 5)
    `Transfer-Encoding: chunked`  ->  CHUNKED

    All that servers are known to disagree about raises MalformedMessage. `minor` is the minor
    version of HTTP of the message.
    """
    lengths = fields.get_all("content-length")
    codings = fields.get_all("transfer-encoding")
    if codings:
        # The classic way to smuggle: one side believes the length, the other one the chunks.
        if lengths:
            raise MalformedMessage("Transfer-Encoding with Content-Length")
        # HTTP/1.0 has no chunks. A proxy of that time on the way would have forwarded this field
        # without reading it, and have taken another end for the message's.
        if minor == 0:
            raise MalformedMessage("Transfer-Encoding with HTTP/1.0")
        # `gzip, chunked`, `chunked, chunked` and spellings such as `xchunked` each have been taken
        # for chunked by one server and for something else by the next.
        if len(codings) > 1 or codings[0].lower() != "chunked":
            seen = ", ".join(codings)[:80]
            raise MalformedMessage(f"Transfer-Encoding {seen!r} instead of 'chunked'")
        return CHUNKED
    if lengths:
        # `5, 5`, `+5`, `0x5` and two lines are lengths to some readers and errors to others.
        if len(lengths) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0]):
            seen = ", ".join(lengths)[:80]
            raise MalformedMessage(f"Content-Length {seen!r} instead of one decimal number")
        return Framing("length", int(lengths[0]))
    return None


def keeps_alive(fields: Fields, minor: int) -> bool:
    """Tell whether the sender wants to go on using the connection (RFC 9112 section 9.3)."""
    options = fields.elements("connection")
    if "close" in options:
        return False
    # It is the default since HTTP/1.1; a sender of 1.0 has to ask for it.
    return minor == 1 or "keep-alive" in options


# --- targets --------------------------------------------------------------------------


def decode_unreserved(match: re.Match[str]) -> str:
    """Return a percent-encoded octet in its one spelling (RFC 3986 section 6.2.2).

    '%61' -> 'a', because `a` needs no encoding; '%2f' -> '%2F', because a slash has a meaning.
    """
    # `%4` at the end could be completed by what a server appends, and read otherwise there.
    if match[1] is None:
        raise MalformedMessage(f"% without two hexadecimal digits in {match.string[:80]!r}")
    character = chr(int(match[1], 16))
    return character if character in UNRESERVED else match[0].upper()


def normalise_path(path: str) -> str:
    """Return the one spelling of a path, without empty and dot segments and a final slash.

    '//api/./x/../logs/' -> '/api/logs'; '/%61pi/logs' -> '/api/logs'

    The same spelling is looked up in the endpoint table, checked against the access policy and
    sent upstream. With two spellings, the check could see another path than the server does.
    """
    if "%" in path:
        path = PERCENT_OCTET.sub(decode_unreserved, path)
    # Nearly every path is right as it is. Only these can hold a segment that has to go.
    if "//" not in path and "/." not in path and not path.endswith("/"):
        return path
    # `normpath` would leave two slashes at the beginning, which POSIX gives a meaning.
    return "/" + posixpath.normpath(path).lstrip("/")


def parse_target(method: str, target: str) -> tuple[str | None, str, str]:
    """Return the authority, the path and the query of a request-target (RFC 9112 section 3.2).

    '/v1/models?a=b'         ->  (None, '/v1/models', '?a=b')
    'http://box:1234/api/ps' ->  ('box:1234', '/api/ps', '')
    '*' (of OPTIONS alone)   ->  (None, '*', '')
    """
    if method == "OPTIONS" and target == "*":
        return None, "*", ""
    authority = None
    if not target.startswith("/"):
        # The absolute-form, as a client sends it that takes the router for its proxy. Its
        # authority counts instead of Host, but it never chooses where the request goes.
        absolute = ABSOLUTE_FORM.fullmatch(target)
        if absolute is None:
            raise MalformedMessage(f"target {target[:80]!r} is not a path")
        authority, target = absolute.groups()
        if not authority or not HOST.fullmatch(authority):
            raise MalformedMessage(f"authority {authority[:80]!r} in the target")
        if not target.startswith("/"):
            target = f"/{target}"
    # A fragment is the browser's own matter. Servers cut it off or take it for the path.
    if "#" in target:
        raise MalformedMessage(f"target {target[:80]!r} is not a path")
    path, question_mark, query = target.partition("?")
    return authority, normalise_path(path), question_mark + query


# --- heads ----------------------------------------------------------------------------
# A head is parsed once and does not change. Clients repeat theirs to the letter, and so do
# servers: the parsers remember short heads and return the same object for the same bytes. What
# is worked out from a head is remembered by the function that does it, under that object
# (`remember_short`). A long head is never remembered: a client that sends many different ones
# would fill the memory.

LONGEST_REMEMBERED_HEAD = 2 * KiB
REMEMBERED_HEAD_COUNT = 512


class RequestHead:
    """A request line and its fields, and what follows from them.

    `minor` is the minor version of HTTP, 0 or 1; `size` the octets that it came in. What is wrong
    with the head raises MalformedMessage when it is made, so that nobody has to look again.
    """

    def __init__(self, method: str, target: str, minor: int, fields: Fields, size: int) -> None:
        self.method = method
        self.minor = minor
        self.fields = fields
        self.size = size
        # Two Hosts let the router and the server behind it each believe another one. Since
        # HTTP/1.1 there has to be one, even if it is empty (RFC 9112 section 3.2).
        hosts = fields.get_all("host")
        if len(hosts) > 1 or (minor == 1 and not hosts):
            raise MalformedMessage(f"{len(hosts)} Host fields instead of one")
        # With two of these, the router could let in by one what its server serves by the other.
        if len(fields.get_all("authorization")) > 1:
            raise MalformedMessage("two Authorization fields instead of one")
        host = hosts[0] if hosts else ""
        if not HOST.fullmatch(host):
            raise MalformedMessage(f"Host {host[:80]!r} is not a host and port")
        authority, self.path, self.query = parse_target(method, target)
        self.host = authority or host
        # A request whose fields say nothing about a content has none (section 6.3, item 7).
        self.framing = read_framing(fields, minor) or NO_CONTENT
        self.keeps_alive = keeps_alive(fields, minor)
        # A client of HTTP/1.0 would take the interim response for the answer.
        self.expects_continue = minor == 1 and "100-continue" in fields.elements("expect")

    def without(self, name: str) -> RequestHead:
        """Return the head without the fields of some name, in lower case."""
        head = copy.copy(self)
        head.fields = Fields([line for line in self.fields.lines if line[0] != name])
        return head


class ResponseHead:
    """A status line and its fields, and what follows from them; `size` as in RequestHead."""

    def __init__(self, status: int, reason: str, minor: int, fields: Fields, size: int) -> None:
        self.status = status
        self.reason = reason
        self.minor = minor
        self.fields = fields
        self.size = size
        self.keeps_alive = keeps_alive(fields, minor)
        content_type = fields.get("content-type") or ""
        # `Text/HTML; charset=utf-8` -> `text/html`
        self.media_type = content_type.partition(";")[0].strip(" \t").lower()

    @functools.cached_property
    def declared_framing(self) -> Framing:
        """The framing that its fields say; without any, the content lasts until the close.

        It is cached because one head is shared by all responses that repeat it.
        """
        return read_framing(self.fields, self.minor) or UNTIL_CLOSE

    def framing(self, method: str) -> Framing:
        """Return the framing of the answer to a request. Raises MalformedMessage.

        The answer to a HEAD has the fields of the one to a GET and no content; 204 and 304 have
        none either, whatever they say (RFC 9112 section 6.3, item 1).
        """
        # Fields that contradict each other are refused even where there is no content: the server
        # may take it for one, and what it sends then would be read as the next response.
        declared = self.declared_framing
        if method == "HEAD" or self.status in (204, 304):
            return NO_CONTENT
        return declared


Result = TypeVar("Result")


def remember_short(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function of a head, or of its fields, remember its results.

    Its first argument is a RequestHead, a ResponseHead or the Fields of one; all others are
    hashable. The parsers return the same object for the same short head, so that the object itself
    can be the key. What a long one gives is worked out each time: its key would keep it in memory.
    """
    # One head may come with different arguments, such as each server that it is forwarded to.
    remembered = functools.lru_cache(maxsize=2 * REMEMBERED_HEAD_COUNT)(function)

    @functools.wraps(function)
    def remembering(head: RequestHead | ResponseHead | Fields, *arguments: Any) -> Result:
        if head.size > LONGEST_REMEMBERED_HEAD:
            return function(head, *arguments)
        return remembered(head, *arguments)

    return remembering


def read_request_head(data: bytes) -> RequestHead:
    """Read a request head: `parse_request_head`, which remembers, is the function to call."""
    # Every octet is one character of Latin-1, so that decoding cannot fail and a length in
    # characters is one in octets. With one more CRLF, each field line has its own.
    start_line, _, lines = f"{data.decode('latin-1')}\r\n".partition("\r\n")
    if len(start_line) > LIMITS.request_line:
        raise TargetTooLong(
            f"the request line has {len(start_line)} octets, over {LIMITS.request_line}"
        )
    match = REQUEST_LINE.fullmatch(start_line)
    if match is None:
        raise MalformedMessage(f"request line {start_line[:80]!r} is not `METHOD target HTTP/1.1`")
    method, target, major, minor = match.groups()
    if major != "1":
        raise VersionNotSupported(f"HTTP/{major}.{minor} instead of HTTP/1.1")
    if len(lines) > LIMITS.all_field_lines:
        raise FieldsTooLarge(f"all fields have more than {LIMITS.all_field_lines} octets")
    # A later minor version is to be read as the latest that one knows (RFC 9110 section 2.5).
    known_minor = min(int(minor), 1)
    return RequestHead(method, target, known_minor, parse_fields(lines), len(data))


def read_response_head(data: bytes) -> ResponseHead:
    """Read a response head: `parse_response_head`, which remembers, is the function to call."""
    start_line, _, lines = f"{data.decode('latin-1')}\r\n".partition("\r\n")
    match = STATUS_LINE.fullmatch(start_line)
    if match is None:
        raise MalformedMessage(f"status line {start_line[:80]!r} is not `HTTP/1.1 200 OK`")
    minor, status, reason = match.groups()
    # As in a request, a later minor version is to be read as the latest that one knows.
    known_minor = min(int(minor), 1)
    return ResponseHead(int(status), reason or "", known_minor, parse_fields(lines), len(data))


remembered_request_head = functools.lru_cache(maxsize=REMEMBERED_HEAD_COUNT)(read_request_head)
remembered_response_head = functools.lru_cache(maxsize=REMEMBERED_HEAD_COUNT)(read_response_head)


def parse_request_head(data: bytes) -> RequestHead:
    r"""Read a request head without its final empty line (RFC 9112 sections 2.1, 3 and 5).

    b'GET /v1/models HTTP/1.1\r\nHost: a'  ->  method 'GET', path '/v1/models', host 'a'

    The same short bytes give the same object again. Raises MalformedMessage (no head, or one that
    can be read in two ways), TargetTooLong, FieldsTooLarge or VersionNotSupported.
    """
    if len(data) > LONGEST_REMEMBERED_HEAD:
        return read_request_head(data)
    return remembered_request_head(data)


def parse_response_head(data: bytes) -> ResponseHead:
    r"""Read a response head without its final empty line (RFC 9112 sections 2.1, 4 and 5).

    b'HTTP/1.1 200 OK\r\nContent-Length: 2'  ->  status 200, reason 'OK'

    The same short bytes give the same object again. Raises MalformedMessage or FieldsTooLarge.
    """
    if len(data) > LONGEST_REMEMBERED_HEAD:
        return read_response_head(data)
    return remembered_response_head(data)


def check_partial_head(head: bytes, unseen_at: int, longest: int, limits: Limits) -> None:
    """Refuse the beginning of a head that is already wrong, or over `longest` octets.

    What stands before `unseen_at` has been looked at before. Without this, a client that never
    sends CRLF CRLF (a TLS client on this port, a script that ends its lines with LF alone) would
    wait for an answer until the deadline, and never learn what is wrong. Raises MalformedMessage,
    TargetTooLong or FieldsTooLarge.
    """
    if head and not HEAD_START.match(head):
        # A TLS handshake begins with the octet 0x16. It always has a bare LF further on, so this
        # is looked for first.
        hint = "; this port speaks http, not https" if head[:1] == b"\x16" else ""
        raise MalformedMessage(f"{head[:8]!r} begins no HTTP message{hint}")
    if BARE_CR_OR_LF.search(head, unseen_at):
        raise MalformedMessage("a bare CR or LF in the head instead of CRLF")
    line, line_end, _ = head.partition(b"\r\n")
    if line_end and b"HTTP/" not in line:
        # HTTP/0.9 has nothing but this line. Its client waits for an answer from here on.
        raise MalformedMessage(f"{line[:80]!r} names no version of HTTP")
    if len(head) > limits.request_line and b"\r\n" not in head[: limits.request_line + 2]:
        raise TargetTooLong(f"the first line is over {limits.request_line} octets")
    if len(head) > longest:
        raise FieldsTooLarge(f"the head is over {longest} octets")


# --- contents -------------------------------------------------------------------------
# Three decoders, one for each framing, all used in the same way. `feed(data)` takes what the
# connection has brought, however it is cut, and returns the octets of content in it. `done`
# tells that the content has ended; then `buffered` holds what follows it, which is the beginning
# of the next message. `remaining` is how many octets are announced and have not come, so that
# a limit can refuse a content before it is there.


class LengthDecoder:
    """Decodes a content of a declared length (RFC 9112 section 6.2)."""

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.done = length == 0
        self.buffered = b""

    def feed(self, data: bytes) -> bytes:
        """Return the octets in `data` that belong to the content."""
        content = data[: self.remaining]
        self.buffered = data[self.remaining :]
        self.remaining -= len(content)
        self.done = self.remaining == 0
        return content


class CloseDecoder:
    """Decodes a content that lasts until its connection closes (RFC 9112 section 6.3, item 8)."""

    remaining = 0
    buffered = b""

    def __init__(self) -> None:
        # Whoever reads the connection sets this at its end.
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Return `data`: all of it belongs to the content."""
        return data


# Data of more than so many octets is searched for many chunks at once. For less it is not worth it.
MANY_CHUNKS_LENGTH = 1024


def event_chunk_sizes(line_feeds: int) -> dict[int, bytes]:
    r"""Return the size lines of chunks with one event, by the length of the event's text.

    With two line feeds behind the text, one of 56 octets makes a chunk of 58: `{56: b"3a\r", ...}`
    A chunk with a longer text than these is left to `ChunkDecoder`.
    """
    return {length: b"%x\r" % (length + line_feeds) for length in range(1024)}


# By the number of columns in the table that `read_event_chunks` draws: 3 for NDJSON, 4 for SSE.
EVENT_CHUNK_SIZES = {3: event_chunk_sizes(line_feeds=1), 4: event_chunk_sizes(line_feeds=2)}


def count_right(column: Sequence[bytes], expected: Sequence[bytes | None]) -> int:
    """Return how many elements at the beginning of a column are as expected.

    `[b"", b"", b"x", b""]`, `[b"", b"", b"", b""]`  ->  2
    """
    # Nearly always all of them are, and to compare the whole costs next to nothing.
    if column == expected:
        return len(expected)
    for index, (element, expected_element) in enumerate(zip(column, expected, strict=True)):
        if element != expected_element:
            return index
    return len(expected)


def read_event_chunks(data: bytes) -> tuple[bytes, int]:
    r"""Return the content of the many chunks that `data` begins with, and the octets they take.

    b'8\r\ndata: 1\n\r\n' * 99 + b'8\r\nda'  ->  (b'data: 1\n' * 99, 1287)

    This is the fast way for event streams, where each chunk holds one event: its data line, and
    an empty line if it is a server-sent event. While a client is slow, or a model very fast, one
    read brings hundreds of them. Read one by one, a chunk takes 0.6 us, and in here a third of
    that. This is what splitting at line feeds makes of a chunk with the event `data: {...}`:

        as they come     3a CR LF   data: {"id": ... LF   LF      CR LF
        lines            b"3a\r"    b'data: {"id": ...'   b""     b"\r"
        columns          size       text                 blank   end

    So the lines are a table of four columns, or of three for NDJSON, which has no blank. In the
    right table every blank is empty, every end is a CR and every size fits its text; each is
    checked for a whole column at once, in C. The first row that is not right ends the table:
    whatever is special (extensions, capital digits, more lines, an error, the last chunk) is left
    to `ChunkDecoder`, which reads chunk by chunk and would return the same for the rows before.
    """
    lines = data.split(b"\n")
    if b"\r" not in lines:
        return b"", 0
    # The first line that is only a CR ends the first row.
    width = lines.index(b"\r") + 1
    if width not in EVENT_CHUNK_SIZES:
        return b"", 0
    # What follows the last line feed is no line yet.
    rows = (len(lines) - 1) // width
    table_end = rows * width
    sizes = lines[0:table_end:width]
    texts = lines[1:table_end:width]
    ends = lines[width - 1 : table_end : width]
    # A text that is longer than the table of sizes has None here, which no size is.
    expected_sizes = list(map(EVENT_CHUNK_SIZES[width].get, map(len, texts)))
    count = min(count_right(sizes, expected_sizes), count_right(ends, [b"\r"] * rows))
    if width == 4:
        blanks = lines[2:table_end:width]
        count = min(count, count_right(blanks, [b""] * rows))
    if not count:
        return b"", 0
    # The empty text at the end gives the last event its line feeds.
    line_feeds = b"\n" * (width - 2)
    content = line_feeds.join([*texts[:count], b""])
    unread = b"\n".join(lines[count * width :])
    return content, len(data) - len(unread)


# What a ChunkDecoder reads next; the words stand in error messages, too.
AT_SIZE = "chunk-size"
IN_DATA = "chunk-data"
AT_DATA_END = "chunk-end"
IN_TRAILERS = "trailer"


class ChunkDecoder:
    r"""Decodes chunked content (RFC 9112 section 7.1).

    b'5\r\nhello\r\n0\r\n\r\n'  ->  b'hello', and `done`

    A chunk is a line with its size in hexadecimal digits, so many octets, and a CRLF. A chunk of
    size 0 is the last; after it come trailer lines, seldom any, and an empty line. So the decoder
    is in one of four states, which say what the next octet belongs to:

        AT_SIZE ------ size > 0 -----> IN_DATA ---- all came ----> AT_DATA_END
           |  ^                                                         |
           |  +--------------------------- CRLF ------------------------+
           |
           +---------- size 0 -------> IN_TRAILERS -- empty line --> done

    Octets of data are passed on as they come. All else are lines, and a line is read when it is
    there whole; until then it waits in `buffered`, whose length is limited by `limits`.

    Two short cuts leave the states alone: many chunks of events at once (`read_event_chunks`), and
    one chunk that has come whole, as it does when a model speaks slowly.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.state = AT_SIZE
        self.done = False
        self.remaining = 0
        self.buffered = b""
        self.extension_octets = 0
        self.trailer_octets = 0

    def feed(self, data: bytes) -> bytes:
        """Return the content in `data`. Raises MalformedMessage or FieldsTooLarge."""
        if self.buffered:
            data = self.buffered + data
        contents: list[bytes] = []
        position = 0
        look_for_many = len(data) > MANY_CHUNKS_LENGTH
        while position < len(data) and not self.done:
            if self.state is IN_DATA:
                content = data[position : position + self.remaining]
                contents.append(content)
                position += len(content)
                self.remaining -= len(content)
                if not self.remaining:
                    self.state = AT_DATA_END
                continue
            if self.state is AT_SIZE:
                # This is tried once for each piece of data. It ends before a chunk that it cannot
                # read; that one and those after it are read one by one.
                if look_for_many:
                    look_for_many = False
                    content, octets_read = read_event_chunks(data[position:])
                    if octets_read:
                        contents.append(content)
                        position += octets_read
                    continue
                # A chunk that has come whole. The last one, of size 0, is left to `read_line`: in
                # place of its data there may be trailers.
                size_line = PLAIN_CHUNK_SIZE.match(data, position)
                if size_line:
                    start = size_line.end()
                    end = start + int(size_line[1], 16)
                    if start < end and data[end : end + 2] == b"\r\n":
                        contents.append(data[start:end])
                        position = end + 2
                        continue
            line = self.find_line(data, position)
            if line is None:
                break
            self.read_line(line)
            position += len(line) + 2
        self.buffered = data[position:]
        return contents[0] if len(contents) == 1 else b"".join(contents)

    def find_line(self, data: bytes, start: int) -> bytes | None:
        """Return the line that begins at `start` without its CRLF, None while it is incomplete.

        Raises MalformedMessage as soon as it is too long or can be no line any more: who waits
        for a CRLF that never comes would gather all that a client cares to send.
        """
        longest = self.limits.chunk_line
        if self.state is AT_DATA_END:
            longest = 0
        elif self.state is IN_TRAILERS:
            longest = self.limits.trailers
        end = data.find(b"\r\n", start, start + longest + 2)
        if end >= 0:
            return data[start:end]
        line = data[start : start + longest + 2]
        # One octet more than the longest may be the CR of a line that is just as long.
        if len(line) > longest + 1 or BARE_CR_OR_LF.search(line):
            raise MalformedMessage(
                f"{line[:80]!r} is no {self.state} line of at most {longest} octets before its CRLF"
            )
        return None

    def read_line(self, line: bytes) -> None:
        """Read a line of the framing and enter the state that follows from it."""
        if self.state is AT_DATA_END:
            # It is empty, because none longer than 0 octets is found here.
            self.state = AT_SIZE
        elif self.state is AT_SIZE:
            self.read_size(line)
        else:
            self.read_trailer(line)

    def read_size(self, line: bytes) -> None:
        """Read the line that begins a chunk: `5` or `5;name=value` (RFC 9112 section 7.1.1)."""
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise MalformedMessage(f"chunk-size {line[:80]!r} is not hexadecimal")
        # Extensions mean nothing here. But a client could send one octet of content and a
        # thousand of extension with each chunk, and no limit of the content would end that.
        self.extension_octets += len(line) - len(match[1])
        if self.extension_octets > self.limits.chunk_extensions:
            raise MalformedMessage(f"chunk extensions over {self.limits.chunk_extensions} octets")
        self.remaining = int(match[1], 16)
        self.state = IN_DATA if self.remaining else IN_TRAILERS

    def read_trailer(self, line: bytes) -> None:
        """Read a line after the last chunk: a trailer field, which is dropped, or the end."""
        self.trailer_octets += len(line) + 2
        if self.trailer_octets > self.limits.trailers:
            raise FieldsTooLarge(f"trailers over {self.limits.trailers} octets")
        if not line:
            self.done = True
        elif not FIELD_LINE.fullmatch(line.decode("latin-1")):
            raise MalformedMessage(f"trailer line {line[:80]!r} is not `name: value`")


ContentDecoder = LengthDecoder | CloseDecoder | ChunkDecoder


def make_decoder(framing: Framing, limits: Limits = LIMITS) -> ContentDecoder:
    """Return the decoder for a content with this framing."""
    if framing is CHUNKED:
        return ChunkDecoder(limits)
    if framing is UNTIL_CLOSE:
        return CloseDecoder()
    return LengthDecoder(framing.length)


def encode_chunk(content: bytes) -> bytes:
    r"""Return `content` as one chunk; an empty one would be the last chunk (RFC 9112 section 7.1).

    b'hello'  ->  b'5\r\nhello\r\n'
    """
    return b"%x\r\n%b\r\n" % (len(content), content)


# --- content codings (RFC 9110 section 8.4) -------------------------------------------

# What can be taken off; anything else is relayed as it is, or refused.
CODINGS = ("gzip", "x-gzip", "deflate")
GZIP_START = b"\x1f\x8b"
# zlib finds out by itself whether data is gzip or zlib, when it is asked for this window size.
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
BARE_DEFLATE = -zlib.MAX_WBITS
# Octets that are decoded at once. Where a gzip member ends is known only after the call that has
# reached it, and zlib copies what follows; with small pieces that is never much.
CODED_PIECE = 4 * KiB


def read_coding(fields: Fields) -> str:
    """Return the content codings over all lines but `identity`, "" for none.

    `Content-Encoding: identity, GZIP`  ->  'gzip'
    """
    # Hardly any content has one.
    if "content-encoding" not in fields.first:
        return ""
    codings = fields.elements("content-encoding")
    return ", ".join(coding for coding in codings if coding != "identity")


class Inflater:
    """Takes gzip or deflate off a content, piece by piece.

    `gzip` is one member after another, each a whole compressed file (RFC 1952); what follows the
    last one and begins no other is ignored, as gzip(1) and browsers do. `deflate` is zlib's
    format (RFC 1950), but some servers send the data without its head and check sum (RFC 1951);
    its first octet tells which it is.
    """

    def __init__(self, coding: str, limit: float) -> None:
        self.coding = coding
        # Octets that may come out, over all calls; without a limit an infinity.
        self.limit = limit
        self.remaining = limit
        # The decoder of the current member; None before the first.
        self.decoder: Any = None
        # The first octet of what may be another member.
        self.pending = b""
        # Whether what follows the last member begins no other, so that nothing more is read.
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Return the decoded octets. Raises BadGateway, also above the limit."""
        data = self.pending + data
        self.pending = b""
        # One call may not return more than that either, or a small piece could fill the memory.
        room = min(self.remaining, LIMITS.decoded_answer)
        decoded = []
        at = 0
        while at < len(data):
            if self.decoder is None or self.decoder.eof:
                self.begin_member(data[at : at + 2])
            if self.pending or self.ended:
                break
            piece = data[at : at + CODED_PIECE]
            try:
                # One octet more than there is room for shows that there would be too much.
                decoded.append(self.decoder.decompress(piece, int(room) + 1))
            except zlib.error as error:
                raise BadGateway(f"the answer's content coding is broken: {error}") from None
            size = len(decoded[-1])
            room -= size
            self.remaining -= size
            if room < 0:
                longest = min(self.limit, LIMITS.decoded_answer)
                raise BadGateway(f"the answer decodes to more than {longest} bytes")
            at += len(piece) - len(self.decoder.unused_data)
        return b"".join(decoded)

    def begin_member(self, start: bytes) -> None:
        """Begin the member that starts with these two octets, of which one may be missing."""
        if self.decoder is None:
            # The low four bits of zlib's first octet are 8, its compression method (RFC 1950). In
            # deflate without a head they would begin a stored block, whose fourth bit is padding
            # that compressors leave 0 (RFC 1951 section 3.2.4).
            bare = self.coding == "deflate" and start[0] & 15 != 8
            self.decoder = zlib.decompressobj(BARE_DEFLATE if bare else GZIP_OR_ZLIB)
        elif self.coding == "deflate":
            self.ended = True
        elif start == GZIP_START:
            self.decoder = zlib.decompressobj(GZIP_OR_ZLIB)
        elif start == GZIP_START[:1]:
            # Nothing more has come: the next octet tells.
            self.pending = start
        else:
            self.ended = True


def decode_pieces(data: bytes, coding: str, limit: int) -> Iterator[bytes]:
    """Yield a content without its coding, as far as it can be read; it may be cut anywhere."""
    inflater = Inflater(coding, limit)
    # Piece by piece, so that a fault costs what follows it and not what was decoded before.
    with contextlib.suppress(BadGateway):
        for at in range(0, len(data), CODED_PIECE):
            yield inflater.feed(data[at : at + CODED_PIECE])


def decode_content(data: bytes, coding: str, limit: int) -> bytes:
    """Return a content without its coding, as far as it can be read.

    What cannot be read at all stays as it is.
    """
    if coding not in CODINGS:
        return data
    return b"".join(decode_pieces(data, coding, limit)) or data


# --- content codings of requests ------------------------------------------------------
# What a client sends is read by stricter rules than what a server says: it is one member or frame,
# whole, and nothing follows it. What may be too long is never in memory: the octets that would
# come out are counted before they are kept.

REQUEST_CODINGS = ("gzip", "deflate", "zstd")
# No client may make the router keep more of what came out to look back at (RFC 9659).
ZSTD_WINDOW = {"window_log_max": 23}


def make_request_decoder(coding: str, start: int) -> tuple[Any, type[Exception]]:
    """Return what takes a coding off a content whose first octet is `start`, and its error.

    Raises UnsupportedContent for an unknown coding; Python knows zstd since 3.14.
    """
    remedy = "send gzip, deflate or plain content"
    if coding == "deflate":
        # As in `Inflater.begin_member`.
        return zlib.decompressobj(BARE_DEFLATE if start & 15 != 8 else zlib.MAX_WBITS), zlib.error
    if coding in ("gzip", "x-gzip"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS), zlib.error
    if coding == "zstd":
        remedy = f"zstd needs Python 3.14 here; {remedy}"
        with contextlib.suppress(ImportError):
            zstd = importlib.import_module("compression.zstd")
            longest = {zstd.DecompressionParameter[name]: n for name, n in ZSTD_WINDOW.items()}
            return zstd.ZstdDecompressor(options=longest), zstd.ZstdError
    raise UnsupportedContent(
        f"Content-Encoding {coding[:80]!r} of a request; {remedy}",
        ("Accept-Encoding", "gzip, deflate"),
    )


def decode_request_pieces(data: bytes, coding: str) -> Iterator[bytes]:
    """Yield a request's content without its coding, in pieces of at most 1 MiB.

    Raises UnsupportedContent, or MalformedContent for one that is broken, that lacks its end, or
    that more follows.
    """
    decoder, error_type = make_request_decoder(coding, data[0])
    at = 0
    try:
        while at < len(data) and not decoder.eof:
            piece = data[at : at + CODED_PIECE]
            at += len(piece)
            decoded = decoder.decompress(piece, MiB)
            while decoded:
                yield decoded
                # zlib gives back what it has not looked at yet, zstd keeps it.
                rest = getattr(decoder, "unconsumed_tail", b"")
                decoded = b"" if decoder.eof else decoder.decompress(rest, MiB)
    except error_type as error:
        raise MalformedContent(f"the content is no {coding}: {error}") from None
    if not decoder.eof:
        raise MalformedContent(f"the content ends before its {coding} does")
    if at < len(data) or decoder.unused_data:
        raise MalformedContent(f"something follows the {coding} in the content")


def decode_request_content(data: bytes, coding: str, limit: int) -> bytes:
    """Return a request's content without its coding.

    Raises what `decode_request_pieces` raises, and ContentTooLarge for more than `limit` octets.
    """
    size = 0
    for piece in decode_request_pieces(data, coding):
        size += len(piece)
        if size > limit:
            raise ContentTooLarge(f"decoded more than {limit} bytes, which MAX_REQUEST_SIZE allows")
    return b"".join(decode_request_pieces(data, coding))


# ======================================================================================
# 4  JSON (pure)
# ======================================================================================
# Reading documents of clients and servers, and editing them. `check_json_size` looks at a text
# before it is parsed: one that is too deep or has too many parts is refused, whoever sent it.
# `parse_json` reads what a client sent and says what is wrong with it; `parse_object` reads what
# a server sent and returns None for anything that is no object. `edit_json` replaces values
# where they stand and keeps every other byte: the order of members, the spaces, the spelling of
# numbers.

Path = tuple[str | int, ...]  # the way to a value: ("messages", 0, "content")

JSON_SPACE = " \t\r\n"
JSON_OPEN = re.compile(r"[ \t\n\r]*([{\[])[ \t\n\r]*")
# What stands between a value and the next name or value, or between a name and its value.
JSON_SEPARATOR = re.compile(r"[ \t\n\r]*[:,]?[ \t\n\r]*")
# A character that JSON spells, or may spell, by a backslash and one other character.
HAS_SHORT_ESCAPE = re.compile(r'["\\/\b\f\n\r\t]')
OTHER_THAN_BACKSLASH = re.compile(r"[^\\]")
BRACKET = re.compile(r"[\[{\]}]")
# By how much each bracket changes the depth.
BRACKET_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def refuse_constant(name: str) -> None:
    """Refuse NaN and the infinities, which Python reads and RFC 8259 does not know."""
    raise ValueError(f"{name} is not JSON")


# Some editors and Windows programs put it before a text.
BYTE_ORDER_MARK = "\ufeff"
CLIENT_JSON = json.JSONDecoder(parse_constant=refuse_constant)
SERVER_JSON = json.JSONDecoder()  # some log-probabilities are -Infinity
dump_compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

# --- size -----------------------------------------------------------------------------


def outside_strings(text: str, slice_size: int = LIMITS.long_content) -> Iterator[str]:
    """Yield what stands between the strings of JSON, slice by slice.

    `{"a,b": [1, "}"]}`  ->  `{: [1, ]}`

    Without escapes, quotes part a text into what is outside of strings and inside, by turns.
    Slices keep the copies small.
    """
    start = 0
    inside = False
    while start < len(text):
        # No slice ends with a backslash, which would part an escape.
        cut = OTHER_THAN_BACKSLASH.search(text, start + slice_size)
        end = cut.end() if cut else len(text)
        unescaped = text[start:end].replace("\\\\", "").replace('\\"', "")
        parts = unescaped.split('"')
        first_outside = 1 if inside else 0
        yield "".join(parts[first_outside::2])
        quotes = len(parts) - 1
        if quotes % 2 == 1:
            inside = not inside
        start = end


def check_json_size(text: str, max_values: float, limits: Limits = LIMITS) -> None:
    """Refuse JSON that is too deep or has too many parts, before it is parsed.

    Its parts are nodes (objects and arrays) and values, which are counted by their commas; an
    infinite `max_values` allows any number of them. Each part costs memory and time: 8 MB of
    `[],[],` would take a second and a gigabyte. Raises MalformedContent for the depth,
    ContentTooLarge for the number of parts.
    """
    # Nearly always it is enough to count all brackets and commas, also those in strings: a text
    # with few opening brackets cannot be deep, wherever they stand.
    brackets = text.count("[") + text.count("{")
    if brackets <= limits.json_depth and text.count(",") <= max_values:
        return
    depth = 0
    nodes = 0
    values = 0
    for piece in outside_strings(text, limits.long_content):
        values += piece.count(",")
        nodes += piece.count("[") + piece.count("{")
        steps = map(BRACKET_STEPS.get, BRACKET.findall(piece))
        depths = list(itertools.accumulate(steps, initial=depth))
        depth = depths[-1]
        if max(depths) > limits.json_depth:
            raise MalformedContent(f"JSON deeper than {limits.json_depth} levels")
        if nodes > limits.json_nodes or values > max_values:
            allowed = f"{limits.json_nodes} objects and arrays, {limits.json_values} values"
            raise ContentTooLarge(f"the JSON has too many parts; allowed are {allowed}")


# --- reading --------------------------------------------------------------------------

JSON_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
JSON_COMMA_OR_CLOSE = re.compile(r"[ \t\n\r]*([,}\]])[ \t\n\r]*")


def decode_in_steps(
    decoder: json.JSONDecoder, text: str, at: int = 0, levels: int = 2
) -> tuple[Any, int]:
    """Return the value at a place of a JSON text, and where it ends, as `raw_decode` does.

    `[1, {"a": 2}]`  ->  `([1, {"a": 2}], 13)`;  raises ValueError

    The decoder lets no other thread run before it has done all of its work, which are 200 ms for
    10 MB of vectors. So each value on the first levels is decoded for itself: in a long document
    these are the messages, the texts or the vectors.
    """
    if levels == 0 or not text.startswith(("{", "["), at):
        return decoder.raw_decode(text, at)
    closing = "}" if text[at] == "{" else "]"
    members: dict[Any, Any] = {}
    at = JSON_OPEN.match(text, at).end()
    closed = text[at : at + 1] in ("}", "]")
    while not closed:
        # The elements of an array are gathered in the same way, by their number.
        key = len(members)
        if closing == "}":
            key, at = decoder.raw_decode(text, at)
            colon = JSON_COLON.match(text, at)
            if colon is None or not isinstance(key, str):
                raise json.JSONDecodeError("Expecting a name and ':'", text, at)
            at = colon.end()
        members[key], at = decode_in_steps(decoder, text, at, levels - 1)
        after = JSON_COMMA_OR_CLOSE.match(text, at)
        if after is None:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        closed = after[1] != ","
        at = after.end() if not closed else after.start(1)
    if text[at] != closing:
        raise json.JSONDecodeError(f"Expecting {closing!r}", text, at)
    return (members if closing == "}" else list(members.values())), at + 1


def parse_json(content: bytes, limits: Limits = LIMITS) -> tuple[str, Any]:
    """Return the text and the value of a JSON document that a client sent.

    `b'{"n": 1.0}'`  ->  `('{"n": 1.0}', {"n": 1.0})`

    The text is needed to edit it later; a byte order mark is no part of it (RFC 8259 section 8.1).
    Raises MalformedContent or ContentTooLarge.
    """
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
        check_json_size(text, limits.json_values, limits)
        # `raw_decode` wants no white space before the document and does not look behind it; so
        # both are done here. `decode` does the same with two more calls for each document.
        stripped = text.strip(JSON_SPACE)
        if len(stripped) > limits.long_content:
            value, end = decode_in_steps(CLIENT_JSON, stripped)
        else:
            value, end = CLIENT_JSON.raw_decode(stripped)
        if end != len(stripped):
            raise json.JSONDecodeError("Extra data", stripped, end)
        return text, value
    except RecursionError:
        raise MalformedContent(f"JSON deeper than {limits.json_depth} levels") from None
    except ValueError as error:
        raise MalformedContent(f"the content is not JSON: {error}") from None


def parse_value(data: bytes | str, limits: Limits = LIMITS) -> Any:
    """Return the value that a server's data holds, None when it is no JSON.

    `b' {"n": -Infinity}'`  ->  `{"n": -inf}`;  `b"{"`  ->  `None`
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        text = text.removeprefix(BYTE_ORDER_MARK)
        is_long = len(text) > limits.long_content
        if is_long:
            # Vectors are long lists of numbers: their values are not counted.
            check_json_size(text, math.inf, limits)
        text = text.strip(JSON_SPACE)
        if is_long:
            value, end = decode_in_steps(SERVER_JSON, text)
        else:
            value, end = SERVER_JSON.raw_decode(text)
    except (ValueError, RecursionError, RouterError):
        return None
    return value if end == len(text) else None


def parse_object(data: bytes | str, limits: Limits = LIMITS) -> dict[str, Any] | None:
    """Return the object that a server's data holds, None when it holds none.

    `b' {"n": 1}'`  ->  `{"n": 1}`;  `b"[1]"`, `b"{"`  ->  `None`
    """
    value = parse_value(data, limits)
    return value if isinstance(value, dict) else None


# --- writing --------------------------------------------------------------------------


def encode_json_exactly(value: Any) -> bytes:
    """Return compact JSON of something that a client sent; a lone surrogate stays an escape.

    Raises MalformedContent for a number that no double holds: Python reads 1e999 as an
    infinity, so that what the client meant is lost.
    """
    try:
        return dump_compact(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()
    except ValueError:
        raise MalformedContent("a number is beyond 1.8e308, the most that a double holds") from None


def encode_json(value: Any) -> bytes:
    """Return compact JSON of anything: NaN and a number that no double holds become null.

    `{"logprob": -inf}`  ->  `b'{"logprob":null}'`
    """
    try:
        return dump_compact(value).encode()
    except ValueError:
        # An infinity, or a lone surrogate, which is a ValueError of `encode`. Python writes an
        # infinity as `Infinity`, and a reader can be told to take that for None.
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return encode_json_exactly(finite)


# --- editing --------------------------------------------------------------------------


def find_members(text: str, at: int) -> Iterator[tuple[str | int, int, int]]:
    """Yield name or index, start and end of each value in the container at `at`.

    `{"a": 1, "b": []}`, 0  ->  `("a", 6, 7)`, `("b", 14, 16)`
    """
    opening = JSON_OPEN.match(text, at)
    if opening is None:
        return
    at = opening.end()
    index = 0
    while text[at] not in "}]":
        key: str | int = index
        if opening[1] == "{":
            key, at = SERVER_JSON.raw_decode(text, at)
            at = JSON_SEPARATOR.match(text, at).end()
        _, end = SERVER_JSON.raw_decode(text, at)
        yield key, at, end
        at = JSON_SEPARATOR.match(text, end).end()
        index += 1


def find_values(
    text: str, at: int, paths: Iterable[Path], prefix: Path = ()
) -> Iterator[tuple[int, int, Path]]:
    """Yield start, end and path of the values at some paths, in order of their places.

    A member that stands twice in an object is yielded twice, because readers differ on which
    of the two counts.
    """
    # What is left of the paths behind their first element, by that element.
    tails: dict[str | int, list[Path]] = {}
    for path in paths:
        tails.setdefault(path[0], []).append(path[1:])
    for key, start, end in find_members(text, at):
        if key not in tails:
            continue
        # A path with nothing left is that of this value, which is then yielded whole. Otherwise
        # the paths go on inside of it.
        if () in tails[key]:
            yield start, end, (*prefix, key)
        else:
            yield from find_values(text, start, tails[key], (*prefix, key))


def has_twice(text: str, name: str) -> bool:
    r"""Tell whether a JSON object has two members of some name; `name` has letters a to o alone.

    `{"model": "a", "model": "b"}`, `model`  ->  True;  so it is when one is spelled `"mode\u006c"`
    """
    # Nearly always it is enough to count the name, wherever it stands. Only an escape that begins
    # like this is one of these letters.
    if text.count(f'"{name}"') < 2 and "\\u006" not in text:
        return False
    return [key for key, _, _ in find_members(text, 0)].count(name) > 1


def append_members(text: str, members: str) -> str:
    """Return a JSON object with new members at its end, which it must not have yet.

    `{"a": 1 }`, `"b":2`  ->  `{"a": 1 ,"b":2}`
    """
    before, _, after = text.rpartition("}")
    # Only an object without members has no quote in it.
    comma = "," if '"' in before else ""
    return f"{before}{comma}{members}}}{after}"


def remove_member(text: str, name: str) -> str:
    """Return a JSON object without the member of some name, and no other character changed.

    `{"a": 1, "b": 2}`, `"b"`  ->  `{"a": 1}`;  `{"a": 1, "b": 2}`, `"a"`  ->  `{"b": 2}`
    """
    pieces = []
    kept_to = 0
    opening = JSON_OPEN.match(text)
    # A comma goes with the member: that before it, or that behind the first one.
    cut_at = opening.end() if opening else 0
    is_first = True
    for key, _, end in find_members(text, 0):
        if key == name:
            pieces.append(text[kept_to:cut_at])
            kept_to = JSON_SEPARATOR.match(text, end).end() if is_first else end
        else:
            is_first = False
            cut_at = end
    return "".join([*pieces, text[kept_to:]])


def remove_value(text: str, path: Path) -> str:
    """Return a JSON object without the member at some path, and no other character changed.

    `{"a": {"b": 1, "c": 2}}`, `("a", "b")`  ->  `{"a": {"c": 2}}`
    """
    *holder_path, name = path
    if not holder_path:
        return remove_member(text, name)
    # From the last to the first, so that the places before it stay where they are.
    for start, end, _ in reversed(list(find_values(text, 0, [tuple(holder_path)]))):
        text = text[:start] + remove_member(text[start:end], name) + text[end:]
    return text


def add_members(text: str, path: Path, members: str) -> str:
    """Return a JSON object with new members in the object at some path, if there is one.

    `{"a": {"b": 1}}`, `("a",)`, `"c":2`  ->  `{"a": {"b": 1,"c":2}}`
    """
    if not path:
        return append_members(text, members)
    for start, end, _ in find_values(text, 0, [path]):
        if text[start] == "{":
            return text[:start] + append_members(text[start:end], members) + text[end:]
    return text


def remove_element(text: str, path: Path) -> str:
    """Return a JSON object without the element at some path of an array, and a comma beside it.

    `{"a": [1, 2]}`, `("a", 0)`  ->  `{"a": [2]}`;  `{"a": [1, 2]}`, `("a", 1)`  ->  `{"a": [1]}`
    """
    *_, (at, _, _) = find_values(text, 0, [path[:-1]])
    cut_from = JSON_OPEN.match(text, at).end()
    for index, start, end in find_members(text, at):
        if index == path[-1] and index == 0:
            return text[:start] + text[JSON_SEPARATOR.match(text, end).end() :]
        if index == path[-1]:
            return text[:cut_from] + text[end:]
        cut_from = end
    return text


def edit_json(text: str, edits: Mapping[Path, Any]) -> str:
    """Return a JSON object with some values replaced, and no other character changed.

    `{"model": "a", "n": 1.0}`, `{("model",): "b"}`  ->  `{"model": "b", "n": 1.0}`

    A member that is not there yet is added at the end of its object.
    """
    # A name that does not occur in the text needs no search, unless an escape spells it.
    escaped = "\\u" in text
    likely = [
        path
        for path in edits
        if escaped or f'"{path[0]}"' in text or HAS_SHORT_ESCAPE.search(str(path[0]))
    ]
    pieces = []
    kept_to = 0
    replaced = set()
    if likely:
        for start, end, path in find_values(text, 0, likely):
            pieces.append(text[kept_to:start])
            pieces.append(encode_json_exactly(edits[path]).decode())
            kept_to = end
            replaced.add(path)
    pieces.append(text[kept_to:])
    edited = "".join(pieces)
    # What is new, by the object that it belongs to.
    new: dict[Path, dict[str, Any]] = {}
    for path in edits:
        if path not in replaced and isinstance(path[-1], str):
            new.setdefault(path[:-1], {})[path[-1]] = edits[path]
    for path, members in new.items():
        edited = add_members(edited, path, encode_json_exactly(members).decode()[1:-1])
    return edited


# ======================================================================================
# 5  Event streams (pure)
# ======================================================================================
# A streamed answer is a sequence of events: server-sent events, or lines of JSON. Network and
# servers cut it anywhere, the router only between events; these leave as the bytes they came in,
# unless one has to be changed. A block is the bytes of some whole events, one after the other.
# `EventFormat` knows where an event ends and where its data stands, `EventReader` gathers what
# comes into whole events. What an event means is said in section 7.

BOM = BYTE_ORDER_MARK.encode()
DONE_MARK = b"[DONE]"
CRLF_MARK = b"\r\n\r\n"  # ends an event of a server that writes CRLF, whatever the format

# `(?<![^\r\n])` in these patterns means the beginning of a line: a line end stands before it, or
# nothing.
#
# A line that is not empty, and no comment, which would begin with a colon.
NO_COMMENT = re.compile(rb"(?<![^\r\n])[^:\r\n]")
# A line of data behind the first one.
MORE_DATA = re.compile(rb"(?<=[\r\n])data:[^\r\n]*(?:\r\n|\n|\r)")
# A field that calls the event an error: `event: error`, or llama.cpp's `error: {...}`.
ERROR_EVENT = re.compile(rb"(?<![^\r\n])(?:event: ?error\b|error: ?([^\r\n]*))")


class EventFormat(NamedTuple):
    """How a stream's events are told apart, and where in one its data stands."""

    mark: bytes  # ends an event in the plain case
    end: re.Pattern[bytes]  # ends one in every case
    data: re.Pattern[bytes]  # one line of data
    media_type: str
    prefix: bytes = b""

    def find_end(self, block: bytes, at: int, has_cr: bool) -> int:
        """Return where the event that begins at `at` ends: at the latest where the block does.

        The mark is found faster than the pattern, but is sure only in a block without CR. `has_cr`
        says whether the block has one. The caller looks for it once: if it were looked for here,
        for each event up to the end of the block, that would take quadratic time.
        """
        if has_cr:
            match = self.end.search(block, at)
            return match.end() if match else len(block)
        mark_at = block.find(self.mark, at)
        return mark_at + len(self.mark) if mark_at >= 0 else len(block)

    def find_last_end(self, block: bytes | bytearray, start: int, stop: int) -> int:
        r"""Return the last place from `start` to `stop` where an event ends, `start` for none.

        `b"data: a\n\ndata: b"`, 0, 16  ->  9
        """
        end = start
        mark_at = block.rfind(self.mark, start, stop)
        if mark_at >= 0:
            end = mark_at + len(self.mark)
        # Events may end with CRs further on. The usual mark of those takes the search near to the
        # last end, and the pattern goes on from there.
        if block.find(b"\r", end, stop) >= 0:
            mark_at = block.rfind(CRLF_MARK, end, stop)
            if mark_at >= 0:
                end = mark_at + len(CRLF_MARK)
            for match in self.end.finditer(block, end, stop):
                end = match.end()
        return end

    def split(self, block: bytes) -> list[bytes]:
        r"""Return the events of a block without their ends, and what follows the last end.

        `b"data: a\n\ndata: b\n\n"`  ->  `[b"data: a", b"data: b", b""]`
        """
        return self.end.split(block) if b"\r" in block else block.split(self.mark)

    def read_data(self, event: bytes) -> bytes:
        r"""Return the data of one event, with or without its end.

        `b"event: x\ndata: a\ndata: b\n\n"`  ->  `b"a\nb"`;  `b": comment\n\n"`  ->  `b""`
        """
        if event.startswith(self.prefix):
            # As nearly always, the event is one line of data.
            line = event.removesuffix(self.mark).removesuffix(CRLF_MARK)
            if b"\n" not in line and b"\r" not in line:
                return line[len(self.prefix) :]
        lines = self.data.findall(event)
        return lines[0] if len(lines) == 1 else b"\n".join(lines)

    def read_document(self, event: bytes) -> dict[str, Any] | None:
        r"""Return the object that one event holds, None when it holds none.

        An event whose fields call it an error is returned as an object with an `error`:

        `b"event: error\ndata: {"code": 5}\n\n"`  ->  `{"error": {"code": 5}}`
        `b"error: no memory\n\n"`                 ->  `{"error": "no memory"}`
        """
        data = self.read_data(event)
        error = ERROR_EVENT.search(event) if b"error" in event else None
        if error is None:
            return parse_object(data)
        data = data or error[1] or b""
        document = parse_object(data)
        if document and "error" in document:
            return document
        words = data.decode("utf-8", "replace") or "the upstream gave no reason"
        return {"error": document or words}

    def read_documents(self, block: bytes) -> list[dict[str, Any]]:
        r"""Return the objects that the events of a block hold.

        `b'data: {"n": 1}\n\ndata: [DONE]\n\n'`  ->  `[{"n": 1}]`
        """
        documents = []
        for event in filter(None, self.split(block)):
            document = None
            if event.startswith(self.prefix) and b"\n" not in event and b"error" not in event:
                # As nearly always, the event is one line of data.
                document = parse_object(event[len(self.prefix) :])
            if document is None:
                document = self.read_document(event)
            if document:
                documents.append(document)
        return documents

    def encode(self, data: bytes) -> bytes:
        """Return an event that says `data`."""
        return self.prefix + data + self.mark

    def replace(self, event: bytes, data: bytes) -> bytes:
        r"""Return the event with other data on one line; all else in it stays.

        `b"id: 1\ndata: a\ndata: b\n\n"`, `b"c"`  ->  `b"id: 1\ndata: c\n\n"`
        """
        match = self.data.search(event)
        if match is None:
            return self.encode(data)
        start, end = match.span(1)
        after = event[end:]
        # Only server-sent events can have more than one line. A line end in the data, which JSON
        # allows between its tokens, would begin another line or event.
        if self.prefix:
            after = MORE_DATA.sub(b"", after)
        return event[:start] + data.replace(b"\n", b" ") + after


# An event ends with an empty line: a line's end and then another one, each of which is LF, CRLF
# or CR. The match begins with the last octet of the first.
SSE_END = re.compile(
    rb"""
    [\r\n]              # The first line's end, or the LF of its CRLF.
    (?:
        (?<=\n) \n      # LF, if it is not the second half of a CRLF that began before.
      | \r \n           # CRLF.
      | \r (?!\Z)       # CR; at the end of what has come it may yet become a CRLF.
    )
    """,
    re.VERBOSE,
)
SSE_DATA = re.compile(rb"(?<![^\r\n])data: ?([^\r\n]*)")
SSE = EventFormat(b"\n\n", SSE_END, SSE_DATA, "text/event-stream", b"data: ")
LINES = EventFormat(b"\n", re.compile(rb"\n"), re.compile(rb"([^\n]+)"), "application/x-ndjson")
EVENT_FORMATS = {format.media_type: format for format in (SSE, LINES)}

# What servers call a stream of events that they do not call one.
MISCALLED_STREAMS = frozenset(("", "text/plain", "application/json", "application/octet-stream"))
SSE_STARTS = (b"data:", b"event:", b"id:", b"retry:", b":")


def begins_like_events(start: bytes) -> bool | None:
    """Tell whether content that begins so is server-sent events; None when it is too short.

    `b"data: x"`  ->  True;  `b'{"a"'`  ->  False;  `b"da"`  ->  None
    """
    if len(start) < len(BOM) and BOM.startswith(start):
        return None
    line = start.removeprefix(BOM).lstrip(b"\r\n")
    if line.startswith(SSE_STARTS):
        return True
    # It may still become one of them, also when nothing has come yet.
    return None if any(name.startswith(line) for name in SSE_STARTS) else False


class EventReader:
    """Gathers what comes of a stream into blocks of whole events.

    A server and the network cut a stream anywhere. What has come of an event whose end has not
    is `pending`; everything before it is given out as one block, which is cheaper than event by
    event. An event that grows beyond `limits.buffered_event` is not waited for: it is given out
    as it comes, apart from the blocks, because nobody can look inside of it.

    The last blocks are remembered: only they tell whether an answer was complete when its stream
    ended, and what went wrong. Servers say the end, the usage and `[DONE]` in up to three events,
    which may come in as many blocks, and comments may follow.
    """

    __slots__ = ("begun", "format", "last_blocks", "limits", "long_tail", "marks", "pending")

    LAST_BLOCKS = 4
    LAST_EVENTS = 8

    def __init__(self, format: EventFormat, limits: Limits = LIMITS) -> None:
        self.format = format
        self.limits = limits
        self.marks = (format.mark, CRLF_MARK)
        self.begun = False
        self.pending = bytearray()
        # The last two octets that were given out of an event that is too long: all that the
        # pattern of an end may need of what came before.
        self.long_tail = b""
        self.last_blocks: collections.deque[bytes] = collections.deque(maxlen=self.LAST_BLOCKS)

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        r"""Return what there is of an event that is too long, and then a block of whole events.

        `b"data: a\n\ndata:"`, `b" b\n\n"`  ->  `b"", b"data: a\n\n"`, then `b"", b"data: b\n\n"`
        """
        long = b""
        if self.long_tail:
            long, data = self.read_long(data)
        # Nearly always what came is some whole events, which are a block as they are.
        block = data
        if self.pending or not data.endswith(self.marks):
            block = self.gather(data)
        if not block and len(self.pending) > self.limits.buffered_event:
            long += self.take(len(self.pending))
            self.long_tail = long[-2:]
        if not self.begun and (block or long):
            # A byte order mark at the start says nothing.
            self.begun = True
            long, block = long.removeprefix(BOM), block.removeprefix(BOM)
        if block:
            self.last_blocks.append(block)
        return long, block

    def read_long(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what of `data` belongs to the event that is too long, and what follows it."""
        match = self.format.end.search(self.long_tail + data)
        if match is None:
            self.long_tail = (self.long_tail + data[-2:])[-2:]
            return data, b""
        end = match.end() - len(self.long_tail)
        self.long_tail = b""
        return data[:end], data[end:]

    def gather(self, data: bytes) -> bytes:
        """Add to what is pending; return the events that are whole now."""
        # CRLF CRLF, the longest end of an event, has four octets, of which three may have come
        # before.
        start = max(0, len(self.pending) - 3)
        self.pending += data
        end = self.format.find_last_end(self.pending, start, len(self.pending))
        return self.take(end) if end > start else b""

    def take(self, size: int) -> bytes:
        """Return and forget the first octets that are pending."""
        # A slice would copy what may be 64 MiB of a decompressed event once more.
        with memoryview(self.pending) as view:
            taken = bytes(view[:size])
        del self.pending[:size]
        return taken

    def finish(self) -> bytes:
        """Return the last event, if the stream ended without its end."""
        event = self.take(len(self.pending))
        if not self.begun:
            event = event.removeprefix(BOM)
        if event:
            self.last_blocks.append(event)
        return event

    def last_events(self) -> list[bytes]:
        """Return the last events of the stream, comments left out."""
        events: list[bytes] = []
        # What is pending is the last event if the stream has ended without that event's end.
        for block in reversed([*self.last_blocks, bytes(self.pending)]):
            events = self.read_last_events(block) + events
            if len(events) >= self.LAST_EVENTS:
                break
        return events[-self.LAST_EVENTS :]

    def read_last_events(self, block: bytes) -> list[bytes]:
        """Return the last events of a block, or all of them."""
        # A block may have thousands of events: this goes back over the marks of the last ones.
        mark = CRLF_MARK if block.endswith(CRLF_MARK) else self.format.mark
        # Each of these events ends with a mark; that of the event before them is one more.
        start = len(block)
        for _ in range(self.LAST_EVENTS + 1):
            start = block.rfind(mark, 0, start)
            if start < 0:
                return self.split_without_comments(block)
        events = self.split_without_comments(block[start:])
        # If some of them are comments, there may be more before them.
        return events if len(events) >= self.LAST_EVENTS else self.split_without_comments(block)

    def split_without_comments(self, block: bytes) -> list[bytes]:
        """Return the events of a block that are more than comments."""
        return [event for event in self.format.split(block) if NO_COMMENT.search(event)]


# ======================================================================================
# 6  Text filters (pure)
# ======================================================================================
# What a model says, without its thinking and without the fences around JSON; every other
# character stays. A text comes in pieces that are cut anywhere. A filter gets one piece after
# another and returns what is certain; it keeps back only what could still become the tag or the
# line that it looks for, at most a few characters, and it runs in linear time.
# To add a family of thinking tags: a line in THINK_TAGS. If there is neither a `<` in its tags nor
# another one of section 8's TAG_MARKS, that has to get one, and MARK its first character.

WHITE_SPACE = " \t\r\n"

# --- thinking: the tags ---------------------------------------------------------------

# The tag that opens a block of thinking, and the one that closes it. Those with angle brackets
# count in any case. Each must have one of section 8's TAG_MARKS in it.
THINK_TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    # Gemma's, whose header may come twice.
    "<|channel>thought": "<channel|>",
}
# Harmony, the format of gpt-oss, makes messages of all that a model says. Each has a header with
# its channel, where `to=` names the tool that it calls, and an end:
#
#   <|channel|>analysis<|message|>The user says hi.<|end|>
#   <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
#   <|start|>assistant<|channel|>final<|message|>Hi!<|return|>
#
# An ANY of a header is what stands between its markers.
ANY = ""
HARMONY_HEADERS = [
    (*start, *channel, *form, ("<|message|>",))
    for start in ((), (("<|start|>assistant",), (ANY,)))
    for channel in ((), (("<|channel|>",), ("analysis", "commentary", "final"), (ANY,)))
    for form in ((), (("<|constrain|>",), (ANY,)))
    if (start or channel) and (channel or not form)
]
# They end the answer, and go with the headers.
HARMONY_ENDS = ("<|end|>", "<|return|>")


def spell_tag(tag: str) -> str:
    """Return the pattern of a tag: `<think>` -> `<(?i:think>)`, `[THINK]` -> `\\[THINK\\]`."""
    if tag == ANY:
        return r"[^<[\n`~\u25c1]{0,80}"
    rest = re.escape(tag[1:])
    # The first character stands outside of the group: by it `re` searches much faster.
    return f"{re.escape(tag[0])}(?i:{rest})" if tag[0] == "<" else re.escape(tag)


def spell_sequence(sequence: Iterable[Sequence[str]]) -> str:
    """Return the pattern of some tags one after the other, of which each may be one of several.

    `[("<",), ("a", "b")]`  ->  `<(?:a|b)`
    """
    spelled = []
    for tags in sequence:
        words = [spell_tag(tag) for tag in tags]
        spelled.append(words[0] if len(words) == 1 else f"(?:{'|'.join(words)})")
    return "".join(spelled)


def compile_tags(*sequences: Sequence[Sequence[str]]) -> re.Pattern[str]:
    """Return a pattern that finds any one of some sequences of tags; the first one counts."""
    return re.compile("|".join(map(spell_sequence, sequences)))


def spell_start(sequence: Sequence[Sequence[str]]) -> str:
    """Return the pattern of any first part of a sequence of tags: `[("<b>",)]` -> `<(?:b(?:>)?)?`.

    It may be all of the sequence, too.
    """
    rest = spell_start(sequence[1:]) if len(sequence) > 1 else ""
    words = []
    for tag in sequence[0]:
        word = rest
        for character in reversed(tag):
            word = re.escape(character) + (f"(?:{word})?" if word else "")
        if tag == ANY:
            word = spell_tag(ANY) + (f"(?:{rest})?" if rest else "")
        words.append(word)
    return f"(?:{'|'.join(words)})"


def compile_cut_tag(*sequences: Sequence[Sequence[str]]) -> re.Pattern[str]:
    r"""Return a pattern for the end of a text that may be the first part of one of some sequences.

    `[("<b>",)]`  ->  `(?:(?i:<(?:b(?:>)?)?))\Z`, which finds the `<b` in `a <b`
    """
    starts = []
    for sequence in sequences:
        start = spell_start(sequence)
        starts.append(f"(?i:{start})" if sequence[0][0][0] == "<" else start)
    return re.compile(f"(?:{'|'.join(starts)})\\Z")


def one_of(tags: Iterable[str]) -> list[Sequence[Sequence[str]]]:
    """Return tags as sequences of one tag each."""
    return [((tag,),) for tag in tags]


OUTSIDE_TAGS = [
    *HARMONY_HEADERS, *one_of(HARMONY_ENDS), *one_of(THINK_TAGS), *one_of(THINK_TAGS.values())
]  # fmt: skip
TAG = compile_tags(*OUTSIDE_TAGS)
CUT_TAG = compile_cut_tag(*OUTSIDE_TAGS)
# Where visible text is looked at: tags, and what begins and ends code.
TOKEN = re.compile(rf"\n|``*|~~*|{TAG.pattern}")
CLOSING = compile_tags(*one_of(THINK_TAGS.values()))
CUT_CLOSING = compile_cut_tag(*one_of(THINK_TAGS.values()))
# So much of a text is looked at in one go.
LONGEST_PIECE = 64 * KiB
# No sequence of tags is longer.
LONGEST_TAG = 400


class Block(NamedTuple):
    """What is looked for inside of a block."""

    token: re.Pattern[str]  # tags that close it, and headers that are repeated
    cut: re.Pattern[str]
    header: str = ""  # the header, which goes
    begins: tuple[str, ...] = ()  # tags that close it and begin what follows
    shown: bool = False  # the block is a tool call, which stays


def make_block(*closings: str, **more: Any) -> Block:
    """Return what is looked for in a block that one of some tags closes."""
    return Block(compile_tags(*one_of(closings)), compile_cut_tag(*one_of(closings)), **more)


NEXT_MESSAGE = ("<|start|>", "<|channel|>")
ENDS_OF_MESSAGE = (*HARMONY_ENDS, "<|call|>", *NEXT_MESSAGE)
BLOCKS = {opening: make_block(closing) for opening, closing in THINK_TAGS.items()}
BLOCKS["<|channel>thought"] = make_block(
    "<channel|>", "<|channel>thought", header="<|channel>thought"
)
BLOCKS["analysis"] = make_block(*ENDS_OF_MESSAGE, begins=NEXT_MESSAGE)
BLOCKS["call"] = BLOCKS["analysis"]._replace(shown=True)
# Tags are looked up as they are written here, whatever their case.
KNOWN_TAGS = {tag.lower(): tag for tag in (*THINK_TAGS, *THINK_TAGS.values(), *HARMONY_ENDS)}

# --- thinking: code -------------------------------------------------------------------

# What may stand before a fence in its line.
INDENT = " \t>"
# How an answer begins that is JSON.
JSON_STARTS = frozenset(('{"', "{}", '["', "[{", "[[", "[]"))
# A tag between two of these is mentioned.
QUOTES = {'"': '"', "'": "'", "(": ")", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}
# Without one of these a text has neither tags nor code.
MARK = re.compile(r"[`~<\[\u25c1]")
MARK_OF_TAG = re.compile(r"[<\[\u25c1]")
NOT_SPACE = re.compile(r"\S")
SPAN_TOKEN = re.compile(r"\n|`+")


class CodeState:
    r"""Tells where code stands in a text, which it gets in pieces, runs of ` or ~, and line ends.

    A line that begins with a run of three or more opens a fenced block, and a line with nothing
    but such a run, at least as long, closes it. Between equal runs of backticks in one line
    stands a span of code; whether a run opens one is certain only when the other has come.

    "a `b", "\n~~~\nc"  ->  `span` is 1 at `b`, `fence` is `~~~` at `c`
    """

    __slots__ = ("at_line_start", "bare", "fence", "line_fence", "span", "ticked")

    def __init__(self) -> None:
        # The run that opened the fenced block, "" outside of one.
        self.fence = ""
        # The run that begins the line, if it may be a fence.
        self.line_fence = ""
        # Whether nothing follows that in its line, and whether a backtick does.
        self.bare = True
        self.ticked = False
        # The length of the run that may have opened a span, 0 outside of one.
        self.span = 0
        self.at_line_start = True

    @property
    def inside(self) -> bool:
        """Whether what follows is code in any case."""
        return bool(self.fence or self.line_fence)

    @property
    def changes_by_line_end(self) -> bool:
        """Whether a line end, which is no more than plain text, makes a difference."""
        return bool(self.span or self.line_fence)

    def add_text(self, text: str) -> None:
        """Go on behind some text without any run or line end."""
        if text.strip(INDENT):
            self.at_line_start = False
        if text.strip(WHITE_SPACE):
            self.bare = False

    def add_run(self, run: str) -> None:
        """Go on behind a run, which is whole."""
        if self.line_fence:
            self.bare = False
            self.ticked = self.ticked or run[0] == "`"
        elif self.at_line_start and len(run) >= 3:
            self.line_fence = run
            self.bare = True
            self.ticked = False
        elif not self.fence and run[0] == "`":
            if not self.span:
                self.span = len(run)
            elif self.span == len(run):
                self.span = 0
        self.at_line_start = False

    def end_line(self) -> None:
        """Go on behind a line end."""
        run = self.line_fence
        if self.fence and self.bare and run.startswith(self.fence):
            self.fence = ""
        elif run and not self.fence and not (self.ticked and run[0] == "`"):
            # What follows three backticks is no code span, or there would be more of them.
            self.fence = run
        self.line_fence = ""
        self.span = 0
        self.at_line_start = True


# --- thinking: the filter -------------------------------------------------------------


class ThinkFilter:
    r"""Parts a text into what is visible and what was thought.

    Outside of a block any tag of OUTSIDE_TAGS is looked for. One that stands in code, in an answer
    that is JSON or between quotes is what the answer is about, and stays. Inside of a block only
    its end is looked for: what precedes it was thought, other tags and code too.

    `Yes <think>no</think> a < b`  ->  visible `Yes  a < b`, thought `no`
    ``The tag "<think>" is `<think>` ``  ->  visible as it is

    A piece may end inside of a tag. What could be its start is `pending` until the next piece. So
    is a tag behind a backtick, until the other backtick comes or the line ends:

    `Yes <th`, `ink>no`  ->  visible `Yes `, then thought `no`
    `a `<think>`, `` ` ``  ->  visible `` a ` ``, then visible `` <think>` ``

    White space that follows a block goes with it when nothing but white space stands before the
    block, because models put empty lines between their thinking and the answer:

    `<think>hm</think>\n\nYes`  ->  visible `Yes`

    Some templates open a block unseen, and the text begins inside of it. Then a tag closes what
    none has opened. In a `whole` text, fed at once, such a tag at a line's end counts: what
    precedes it was thought. In a piece it is too late for that, and `opened` tells of it. The next
    text can be fed with `opened` true: then it is held back until the tag comes.

    `hm\n</think>\nYes`  ->  whole: visible `Yes`, thought `hm\n`
    """

    __slots__ = (
        "after_close", "alone", "block", "blocks", "close_at", "code", "emitted", "harmony", "head",
        "held", "held_size", "last_character", "opened", "pending", "run", "skips_space",
        "thought", "visible", "whole",
    )  # fmt: skip

    def __init__(self, opened: bool = False, begun: bool = False, whole: bool = False) -> None:
        """Filter a text that may begin inside of a block, or of which some was visible."""
        self.whole = whole
        # What may have been thought, in pieces, until that is known; then None.
        self.held: list[str] | None = [] if opened else None
        self.held_size = 0
        # Whether the text began inside of a block; None while nothing speaks for or against it.
        self.opened: bool | None = None
        # The block that is open, and whether there was one.
        self.block: Block | None = None
        self.blocks = False
        # Whether the answer has harmony's markers.
        self.harmony = False
        self.pending = ""
        # A run of backticks or tildes that has been shown and may go on in the next piece, and
        # how much at the beginning of a text has been shown for such a reason.
        self.run = ""
        self.emitted = 0
        self.code = CodeState()
        # The first two visible characters that are no white space, and the last of all.
        self.head = "??" if begun else ""
        self.last_character = ""
        # Whether the next visible text follows a block that opened the answer.
        self.skips_space = False
        # Whether the line has a tag that closes what none has opened, and nothing behind it;
        # whether nothing stands before it either, and where it begins in what is visible.
        self.after_close = False
        self.alone = False
        self.close_at = 0
        # What the piece adds.
        self.visible: list[str] = []
        self.thought: list[str] = []

    @property
    def passes_plain_text(self) -> bool:
        """Whether a text without tag, backtick and tilde would be visible as it is."""
        waits = self.pending or self.run or self.block or self.after_close or self.held is not None
        return not waits and len(self.head) > 1 and not self.code.changes_by_line_end

    @property
    def shows_all_but_tags(self) -> bool:
        """Whether a text without the start of a tag would be visible as it is."""
        return not (self.pending or self.block or self.skips_space) and self.held is None

    @property
    def keeps_back(self) -> bool:
        """Whether something is kept back."""
        return bool(self.pending or self.held)

    def skip(self, text: str) -> None:
        """Go on behind plain text that has not been fed; `text` is the end of it."""
        line_ended = "\n" in text
        begun = text.rpartition("\n")[2].strip(INDENT) != ""
        if line_ended or begun:
            self.code.at_line_start = not begun
        if text:
            self.last_character = text[-1]

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """Return what a piece adds to the visible and to the thought text.

        With the `last` one nothing is kept back.
        """
        if self.passes_plain_text and not MARK.search(text):
            self.skip(text)
            return text, ""
        self.visible = []
        self.thought = []
        # No other thread runs while `re` searches, so that it gets a long text bit by bit.
        for at in range(0, len(text) or 1, LONGEST_PIECE):
            end = at + LONGEST_PIECE
            self.feed_piece(text[at:end], last and end >= len(text))
        return "".join(self.visible), "".join(self.thought)

    def feed_piece(self, text: str, last: bool) -> None:
        """Add what a piece says to the visible and to the thought text."""
        text = self.run + self.pending + text
        self.emitted = len(self.run)
        self.pending = ""
        self.run = ""
        if self.held is not None:
            text = self.hold(text, last)
        at = 0
        while at < len(text):
            feed = self.feed_visible if self.block is None else self.feed_block
            at = feed(text, at, last)
        if last and self.after_close and self.alone:
            self.note_opened()

    def hold(self, text: str, last: bool) -> str:
        """Hold back what may have been thought; return what is to be looked at like any other."""
        closing = CLOSING.search(text)
        stripped = text.lstrip(WHITE_SPACE)
        if not self.held and not CLOSING.match(stripped):
            if TAG.match(stripped):
                # The model opens its blocks itself.
                self.held = None
                return text
            if not last and (not stripped or CUT_TAG.fullmatch(stripped)):
                self.pending = text
                return ""
        longest = math.inf if self.whole else LIMITS.held_thinking
        if closing and self.held_size + closing.start() <= longest:
            self.thought += [*self.held, text[: closing.start()]]
            self.held = None
            self.blocks = True
            self.opened = True
            self.skips_space = True
            return text[closing.end() :]
        if last or self.held_size + len(text) > longest + LONGEST_TAG:
            # There is no such block this time.
            self.opened = False
            text = "".join([*self.held, text])
            self.held = None
            return text
        cut = CUT_CLOSING.search(text, max(0, len(text) - LONGEST_TAG))
        end = cut.start() if cut else len(text)
        self.pending = text[end:]
        self.held.append(text[:end])
        self.held_size += end
        return ""

    def feed_block(self, text: str, at: int, last: bool) -> int:
        """Look at a text from some place inside of a block; return where to go on."""
        block = self.block
        found = block.token.search(text, at)
        end = found.start() if found else len(text)
        if found is None and not last:
            cut = block.cut.search(text, max(at, len(text) - LONGEST_TAG))
            if cut:
                end = cut.start()
                self.pending = text[end:]
        (self.visible if block.shown else self.thought).append(text[at:end])
        if found is None:
            return len(text)
        tag = found[0].lower()
        if tag == block.header:
            return found.end()
        self.block = None
        self.last_character = ""
        self.skips_space = not self.head
        if tag in block.begins:
            return found.start()
        if block.shown:
            self.visible.append(found[0])
        return found.end()

    def feed_visible(self, text: str, at: int, last: bool) -> int:
        """Look at a text from some place outside of blocks; return where to go on."""
        while self.block is None:
            token = TOKEN.search(text, at)
            if token is None:
                self.show_rest(text, at, last)
                return len(text)
            self.show(text[at : token.start()])
            at = token.end()
            if token[0] == "\n":
                self.end_line()
            elif token[0][0] in "`~":
                self.show_run(token[0], whole=last or at < len(text))
            else:
                at = self.feed_tag(text, token, last)
        return at

    def show_rest(self, text: str, at: int, last: bool) -> None:
        """Show what is left of a piece, but not what may be the start of a tag."""
        end = len(text)
        # In code no tag counts.
        if not (last or self.code.inside):
            cut = CUT_TAG.search(text, max(at, end - LONGEST_TAG))
            if cut:
                end = cut.start()
                self.pending = text[end:]
        self.show(text[at:end])

    def show(self, text: str) -> None:
        """Show some text without line ends, less the white space that an opening block left."""
        if self.skips_space:
            text = text.lstrip(WHITE_SPACE)
        if not text:
            return
        self.skips_space = False
        self.visible.append(text)
        self.last_character = text[-1]
        self.code.add_text(text)
        if self.after_close and text.strip(WHITE_SPACE):
            self.after_close = False
        at = 0
        while len(self.head) < 2:
            found = NOT_SPACE.search(text, at)
            if found is None:
                break
            self.head += found[0]
            at = found.end()

    def show_run(self, run: str, whole: bool) -> None:
        """Show a run of backticks or tildes, which is `whole` or may go on in the next piece."""
        self.skips_space = False
        self.after_close = False
        self.visible.append(run[self.emitted :])
        self.emitted = 0
        self.last_character = run[-1]
        self.head = (self.head + run)[:2]
        if whole:
            self.code.add_run(run)
        else:
            self.run = run

    def end_line(self) -> None:
        """Show a line end."""
        if not self.skips_space:
            self.visible.append("\n")
            self.last_character = "\n"
        self.code.end_line()
        if self.after_close:
            self.note_opened()

    def note_opened(self) -> None:
        """Note that the text began inside of a block; a whole one loses the block."""
        self.after_close = False
        self.opened = True
        self.blocks = True
        if self.whole:
            self.thought = self.visible[: self.close_at]
            self.visible = []
            self.head = ""
            self.skips_space = True

    def feed_tag(self, text: str, found: re.Match[str], last: bool) -> int:
        """Look at a tag outside of blocks; return where to go on."""
        at = found.end()
        if self.code.inside or self.head in JSON_STARTS:
            self.show(found[0])
            return at
        quote = QUOTES.get(text[found.start() - 1] if found.start() else self.last_character)
        if quote and at == len(text) and not last:
            # It depends on the next character.
            self.pending = found[0]
            return at
        if self.code.span:
            end = self.find_span_end(text, at, last)
            if end is None:
                self.pending = text[found.start() :]
                return len(text)
            if end > 0:
                self.show(text[found.start() : end])
                return end
            self.code.span = 0
        if quote and text.startswith(quote, at):
            self.show(found[0])
        else:
            self.take_tag(found[0])
        return at

    def find_span_end(self, text: str, at: int, last: bool) -> int | None:
        """Return where the run stands that closes the span around `at`.

        0 means that there is no span, None that it is too early to tell.
        """
        for token in SPAN_TOKEN.finditer(text, at, at + LIMITS.code_span):
            if token[0] == "\n":
                return 0
            if len(token[0]) == self.code.span:
                goes_on = token.end() == len(text) and not last
                return None if goes_on else token.start()
        return 0 if last or len(text) - at >= LIMITS.code_span else None

    def take_tag(self, tag: str) -> None:
        """Open a block, or do what else a tag says that counts."""
        known = KNOWN_TAGS.get(tag.lower(), "")
        if known in THINK_TAGS:
            self.block = BLOCKS[known]
        elif known in HARMONY_ENDS:
            if not self.harmony:
                self.show(tag)
            return
        elif known:
            self.alone = self.code.at_line_start
            self.close_at = len(self.visible)
            self.show(tag)
            self.after_close = not self.blocks
            return
        elif "to=" in tag:
            self.show(tag)
            self.block = BLOCKS["call"]
        elif "<|channel|>final" in tag or "<|channel|>" not in tag:
            self.harmony = True
            self.skips_space = not self.head
        else:
            self.block = BLOCKS["analysis"]
        self.blocks = True


# --- fences ---------------------------------------------------------------------------

# A fence is three backticks or more, and may be indented. Backticks and blanks are limited, so that
# what could become one is short.
LINE = re.compile(r"[^\n]*\n|[^\n]+")
JSON_FENCE = re.compile(r"[ \t]{0,8}(`{3,8})json[ \t]{0,8}\r?\n?", re.IGNORECASE)
PLAIN_FENCE = re.compile(r"[ \t]{0,8}(`{3,8})[ \t]{0,8}\r?\n?")
ANY_FENCE = re.compile(r"[ \t]{0,8}(`{3,8})")
CUT_FENCE = re.compile(r"[ \t]{0,8}(?:`{0,2}|`{3,8}[A-Za-z]{0,4}[ \t]{0,8}\r?)")


class FenceFilter:
    r"""Takes the fence lines of JSON blocks out; what stands between them stays.

    It goes line by line, and is in one of three states: outside of a fenced block (`fenced` is
    ""), inside of a "json" block, whose closing fence goes too, or inside of any "other" block,
    where nothing is a fence but the line that closes it.

    "Here:\n```json\n[1]\n```\n"    ->  "Here:\n[1]\n"
    "```python\n```json\n```\n"     ->  the same, as the second line is Python

    Only a line that begins like a fence and has not ended yet is `pending`: any other one is
    certain as soon as it has begun.
    """

    __slots__ = ("at_line_start", "fenced", "opening", "pending")

    def __init__(self) -> None:
        self.fenced = ""
        # The backticks that opened the block. Fewer of them do not close it, because it may show
        # a text that has such blocks of its own.
        self.opening = ""
        self.pending = ""
        self.at_line_start = True

    def feed(self, text: str, last: bool = False) -> str:
        """Return what a piece adds to the text; with the `last` one nothing is kept back."""
        lines = LINE.findall(self.pending + text)
        self.pending = ""
        shown = []
        for line in lines:
            ended = line.endswith("\n")
            if not self.at_line_start:
                shown.append(line)
            elif ended or last or not CUT_FENCE.fullmatch(line):
                shown.append(self.show(line))
            else:
                self.pending = line
                break
            self.at_line_start = ended
        return "".join(shown)

    def show(self, line: str) -> str:
        """Return a line, or the start of one, unless it is the fence of a JSON block."""
        if self.fenced:
            closing = PLAIN_FENCE.fullmatch(line)
            if closing is None or len(closing[1]) < len(self.opening):
                return line
            closed = self.fenced
            self.fenced = ""
            return "" if closed == "json" else line
        fence = ANY_FENCE.match(line)
        if fence is None:
            return line
        self.opening = fence[1]
        if JSON_FENCE.fullmatch(line):
            self.fenced = "json"
            return ""
        self.fenced = "other"
        return line


# --- both -----------------------------------------------------------------------------


class Thinking(NamedTuple):
    """What the routing file says of thinking, on one of its levels or on some together."""

    action: str = ""  # strip, move or keep; "" leaves that to the next level
    opened: bool = False  # the model's template opens the block


NOTHING_SAID = Thinking()


def merge_thinking(*levels: Thinking) -> Thinking:
    """Return what some levels say together, of which the first one wins.

    `("", True)`, `("move", False)`, `("keep", False)`  ->  `("move", True)`
    """
    actions = [level.action for level in levels if level.action]
    return Thinking(actions[0] if actions else "", any(level.opened for level in levels))


class FilterRules(NamedTuple):
    """Which filters are on, and what becomes of thinking."""

    think: bool = False
    fences: bool = False
    move: bool = False  # what was thought goes where the protocol has thinking
    opened: bool = False  # texts may begin inside of a block that the model's template opened

    @property
    def any(self) -> bool:
        """Whether any filter is on."""
        return self.think or self.fences


# There are few combinations of what a server, a route and an alias say, and this is asked for
# every answer.
@functools.lru_cache(maxsize=64)
def choose_rules(levels: tuple[Thinking, ...], fences: bool) -> FilterRules:
    """Return the rules of some levels together, of which the first one wins.

    `(("", True), ("move", False))` without fences  ->  `(think=True, move=True, opened=True)`
    """
    thinking = merge_thinking(*levels)
    think = thinking.action != "keep"
    return FilterRules(think, fences, thinking.action == "move", think and thinking.opened)


class TextFilter:
    """Both filters, one after the other, for one text of one answer; see ThinkFilter."""

    __slots__ = ("fences", "think")

    def __init__(self, rules: FilterRules, begun: bool = False, whole: bool = False) -> None:
        self.think = ThinkFilter(rules.opened, begun, whole) if rules.think else None
        self.fences = FenceFilter() if rules.fences else None

    @property
    def passes_plain_text(self) -> bool:
        """Whether a text without tag, backtick and tilde would be visible as it is."""
        if self.fences:
            return False
        return self.think is None or self.think.passes_plain_text

    @property
    def shows_all_but_tags(self) -> bool:
        """Whether a text without the start of a tag would be visible as it is."""
        return self.fences is None and self.think is not None and self.think.shows_all_but_tags

    @property
    def keeps_back(self) -> bool:
        """Whether something is kept back that may yet be visible."""
        thinking_kept = self.think is not None and self.think.keeps_back
        fence_kept = self.fences is not None and self.fences.pending != ""
        return thinking_kept or fence_kept

    @property
    def opened(self) -> bool | None:
        """Whether the text began inside of a block; None while nothing speaks for or against it."""
        return self.think.opened if self.think else None

    def skip(self, text: str) -> None:
        """Go on behind plain text that has not been fed; `text` is the end of it."""
        if self.think:
            self.think.skip(text)

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """Return what a piece adds to the visible and to the thought text."""
        thought = ""
        if self.think:
            text, thought = self.think.feed(text, last)
        if self.fences:
            text = self.fences.feed(text, last)
        return text, thought


def filter_text(text: str, rules: FilterRules) -> tuple[str, str]:
    r"""Return the visible and the thought part of a whole text.

    `hm\n</think>\nyes`  ->  `("yes", "hm\n")`
    """
    return TextFilter(rules, whole=True).feed(text, last=True)


# ======================================================================================
# 7  Protocols (pure)
# ======================================================================================
# What the documents of each endpoint look like, as one table: PROTOCOLS has a row for each path.
# A shape is drawn like the JSON that it describes, with a kind where a value stands that matters;
# `read_parts` is the only code that walks over documents by these shapes. Filters, translations,
# transcripts, token estimates and the test for a stream's end all use what it finds, so that
# they know every protocol as soon as its row stands here.
# To add a protocol: its shapes and its row; a new form of tool call: a case in `read_call`.

# --- shapes ---------------------------------------------------------------------------

# What a part of a document can be.
ROLE = "role"  # who speaks
NAME = "name"  # of the tool whose result a message is
SYSTEM = "system"  # words that the client puts before the conversation
TEXT = "text"  # words, or in an event some more of them
AGAIN = "again"  # in an event, a whole text that other events have said
THINKING = "thinking"  # thoughts that the server tells apart from the text
REFUSAL = "refusal"  # words that say why there is no answer
CALL = "call"  # a tool call, or in an event a fragment of one
RESULT = "result"  # the id of the call whose result a message is
IMAGE = "image"  # a URL, or an object that has one
IMAGE_DATA = "image data"  # base64
FINISH = "finish"  # why an answer is at its end: no text follows, and its stream may end
END = "end"  # the end of the stream itself: nothing follows
TEXT_END = "text end"  # no more of this text follows
USAGE = "usage"
ERROR = "error"  # what went wrong
BEGIN = "begin"  # in an event, that an answer or a part of one begins: it says nothing yet
OTHER = "other"  # something that is not looked into
ODD = "odd"  # not of the shape that was expected


class TextOr(NamedTuple):
    """A string, which is of some kind, or something of another shape."""

    kind: str
    other: Any


class ByType(NamedTuple):
    """An object whose shape depends on its member `type`."""

    shapes: Mapping[str, Any]
    other: Any


class IfNotNull(NamedTuple):
    """An object whose shape depends on whether it has a member that is not null."""

    member: str
    shape: Any
    other: Any


class Each(NamedTuple):
    """A list of messages or choices, numbered by their `index` or their place."""

    shape: Any


# A kind; or the members of an object; or [shape], a list of such parts; or one of the above.
Shape = str | dict[str, Any] | list[Any] | TextOr | ByType | IfNotNull | Each
ANY_OTHER = "*"  # in an object: all other members


class Part(NamedTuple):
    """Something that a document says."""

    kind: str
    choice: int  # which message or choice it belongs to, by number
    item: Any  # which text or call inside of that, None where it has one alone
    path: Path  # where the value stands, so that it can be edited
    value: Any


def read_parts(shape: Shape, document: Any, item: Any = None) -> list[Part]:
    """Return what a document says, in order, according to its shape.

    `{"choices": [{"index": 1, "delta": {"content": "Hi"}, "finish_reason": None}]}`, CHAT_ANSWER
    ->  `[Part(TEXT, 1, None, ("choices", 0, "delta", "content"), "Hi")]`

    Members that are missing, null, false or empty say nothing, such as `"done": false`, but an
    empty text is one. What has not the shape that was expected is a part of the kind ODD.
    """
    parts: list[Part] = []
    # What is still to be looked at. The last one is the next, so that all of a document comes
    # in order, and no nesting is too deep.
    stack: list[tuple[Shape, Any, Path, int, Any]] = [(shape, document, (), 0, item)]
    while stack:
        shape, value, path, choice, item = stack.pop()
        if type(shape) is TextOr:
            shape = shape.kind if isinstance(value, str) else shape.other
        if type(shape) is ByType and isinstance(value, dict):
            shape = shape.shapes.get(str(value.get("type")), shape.other)
        elif type(shape) is IfNotNull and isinstance(value, dict):
            shape = shape.other if value.get(shape.member) is None else shape.shape
        inner = []
        if type(shape) is dict and isinstance(value, dict):
            for name, member in value.items():
                member_shape = shape.get(name) or shape.get(ANY_OTHER)
                if member_shape and (member or member == ""):
                    inner.append((member_shape, member, (*path, name), choice, item))
        elif type(shape) is str:
            if value != "" or shape == TEXT:
                parts.append(Part(shape, choice, item, path, value))
        elif type(shape) is list and isinstance(value, list):
            for number, element in enumerate(value):
                inner.append((shape[0], element, (*path, number), choice, number))
        elif type(shape) is Each and isinstance(value, list):
            for number, element in enumerate(value):
                index = element.get("index") if isinstance(element, dict) else None
                which = index if isinstance(index, int) else number
                inner.append((shape.shape, element, (*path, number), which, item))
        elif value != "":
            parts.append(Part(ODD, choice, item, path, value))
        inner.reverse()
        stack += inner
    return parts


# Contents of messages, in every protocol: a text, or a list of parts.
PLAIN_PART = {
    "text": TEXT,
    "thinking": TextOr(THINKING, [{"text": THINKING}]),
    "refusal": REFUSAL,
    "image_url": IMAGE,
    "source": IMAGE,
}
# A document is a text, or a file that nobody here can read.
DOCUMENT = {"source": ByType({"text": {"data": TEXT}}, other={})}
INNER_PART = ByType({"document": DOCUMENT}, other=PLAIN_PART)
TOOL_RESULT = {"tool_use_id": RESULT, "content": TextOr(TEXT, [TextOr(TEXT, INNER_PART)])}
TOOL_USES = ("tool_use", "server_tool_use", "mcp_tool_use", "input_json_delta")
PART = ByType(
    {**dict.fromkeys(TOOL_USES, CALL), "tool_result": TOOL_RESULT, "document": DOCUMENT},
    other=PLAIN_PART,
)
CONTENT = TextOr(TEXT, [TextOr(TEXT, PART)])

# /v1/chat/completions, /v1/completions; a message is the same in /api/chat. Thinking has three
# names, and some servers use two of them at once.
SPEECH = {
    "thinking": THINKING,
    "reasoning_content": THINKING,
    "reasoning": THINKING,
    "refusal": REFUSAL,
    "content": CONTENT,
    "images": [TextOr(IMAGE_DATA, PLAIN_PART)],
    "tool_calls": [CALL],
}
MESSAGE = {"role": ROLE, "name": NAME, "tool_name": NAME, "tool_call_id": RESULT, **SPEECH}
CHAT_REQUEST = {"messages": Each(MESSAGE)}
# Some servers say beside a delta all of the message once more.
DELTA_CHOICE = {
    # An event whose text is held back must not go with it if it says anything else.
    "delta": {**MESSAGE, ANY_OTHER: OTHER},
    "message": {"content": TextOr(AGAIN, [{"text": AGAIN}])},
    "text": TEXT,
    "finish_reason": FINISH,
}
WHOLE_CHOICE = {"message": MESSAGE, "text": TEXT, "finish_reason": FINISH}
CHAT_ANSWER = {
    "choices": Each(IfNotNull("delta", DELTA_CHOICE, other=WHOLE_CHOICE)),
    "usage": USAGE,
    "error": ERROR,
}

# A prompt may be a list of texts, or of the numbers of tokens.
PROMPT_REQUEST = {"prompt": TextOr(TEXT, Each(TextOr(TEXT, OTHER)))}

# In the events below, `type` says what has happened. Where that alone is a part, such as an end,
# its kind stands at this member, which every event has. The kind BEGIN there says that the event
# must reach the client even if all of its text is kept back.

# /v1/messages, which tells texts apart by the `index` of their block.
SYSTEM_WORDS = TextOr(SYSTEM, [{"text": SYSTEM}])
MESSAGES_REQUEST = {"system": SYSTEM_WORDS, "messages": Each(MESSAGE)}
MESSAGES_EVENTS = {
    "message_start": {"type": BEGIN},
    "message": {"role": ROLE, "content": [PART], "stop_reason": FINISH},
    "content_block_start": {"type": BEGIN, "content_block": PART},
    "content_block_delta": {"delta": PART},
    "content_block_stop": {"type": TEXT_END},
    "message_delta": {"usage": USAGE},
    "message_stop": {"type": END},
}

# /v1/responses, which says every text again when it is at its end, and then once more with all
# of the answer.
CALL_ITEMS = (
    "function_call",
    "custom_tool_call",
    "local_shell_call",
    "shell_call",
    "apply_patch_call",
    "computer_call",
    "web_search_call",
    "file_search_call",
    "tool_search_call",
    "code_interpreter_call",
    "mcp_call",
)
CALL_RESULT = {"call_id": RESULT, "output": CONTENT}
ITEM = ByType(
    {
        **dict.fromkeys(CALL_ITEMS, CALL),
        **{f"{kind}_output": CALL_RESULT for kind in CALL_ITEMS},
        "image_generation_call": {"result": IMAGE_DATA},
        "reasoning": {"summary": [{"text": THINKING}], "content": [{"text": THINKING}]},
    },
    other=MESSAGE,
)
TEXT_AGAIN = ByType({"output_text": {"text": AGAIN}}, other={})
ITEM_AGAIN = ByType({"message": {"content": [TEXT_AGAIN]}}, other={})
ITEM_DONE = ByType(
    {"message": {"content": [TEXT_AGAIN]}, **dict.fromkeys(CALL_ITEMS, CALL)}, other={}
)
RESPONSE_AGAIN = {"output": [ITEM_AGAIN], "output_text": AGAIN, "error": ERROR}
RESPONSES_REQUEST = {
    "instructions": SYSTEM_WORDS,
    "input": TextOr(TEXT, Each(TextOr(TEXT, ITEM))),
}
# An item that begins: a message or thinking is still empty, anything else says what it is.
NEW_ITEM = ByType({"message": {}, "reasoning": {}}, other=OTHER)
RESPONSES_EVENTS = {
    "response.created": {"type": BEGIN, "response": RESPONSE_AGAIN},
    "response.queued": {"type": BEGIN, "response": RESPONSE_AGAIN},
    "response.in_progress": {"type": BEGIN, "response": RESPONSE_AGAIN},
    "response.output_item.added": {"type": BEGIN, "item": NEW_ITEM},
    "response.content_part.added": {"type": BEGIN},
    "response.reasoning_summary_part.added": {"type": BEGIN},
    "response.reasoning_text.delta": {"delta": THINKING},
    "response.reasoning_summary_text.delta": {"delta": THINKING},
    "response.output_text.delta": {"delta": TEXT},
    "response.refusal.delta": {"delta": REFUSAL},
    "response.output_text.done": {"text": AGAIN, "type": TEXT_END},
    "response.content_part.done": {"part": TEXT_AGAIN, "type": TEXT_END},
    "response.output_item.done": {"item": ITEM_DONE, "type": TEXT_END},
    "response.completed": {"response": RESPONSE_AGAIN, "type": END},
    "response.incomplete": {"response": RESPONSE_AGAIN, "type": END},
    "response.failed": {"response": RESPONSE_AGAIN, "type": END},
}
RESPONSE = {
    "response": RESPONSE_AGAIN,
    "output": [ITEM],
    "output_text": AGAIN,
    "usage": USAGE,
    "error": ERROR,
}

# /api/chat and /api/generate, whose events are lines.
GENERATE_REQUEST = {
    "system": SYSTEM_WORDS,
    "prompt": TEXT,
    "images": [TextOr(IMAGE_DATA, PLAIN_PART)],
}
CHAT_LINE = {"message": SPEECH, "done": END, "error": ERROR}
GENERATE_LINE = {"response": TEXT, "thinking": THINKING, "done": END, "error": ERROR}

# llama.cpp's own /completion and /infill.
OWN_ANSWER = {"content": TEXT, "stop": FINISH, "error": ERROR}
# What tells of no conversation: nothing in it is a text that anybody may change.
NO_TEXTS = {"error": ERROR}

# An answer of a protocol that is not known: whatever any of them would say.
ANY_ANSWER = ByType(
    {**MESSAGES_EVENTS, **RESPONSES_EVENTS},
    other={
        **RESPONSE,
        **CHAT_LINE,
        **GENERATE_LINE,
        **CHAT_ANSWER,
        "response": TextOr(TEXT, RESPONSE_AGAIN),
        "delta": {"text": TEXT},
        "content": CONTENT,
    },
)

# --- the table ------------------------------------------------------------------------

# When a request is answered by a stream: if its `stream` is true, if it is not false, or never.
IF_ASKED = "if asked"
UNLESS_REFUSED = "unless refused"
NEVER_STREAMS = "never"
# The text of a chat has begun in an event, without a tag and with more than white space, as in
# `"delta": {"role": "assistant", "content": "Hi`. It begins neither like JSON nor like code. No
# bracket may stand before `content`, so that it is a member of the choice itself, not of something
# that the server says beside it.
PLAIN_CHAT_TEXT = re.compile(
    rb'"(?:delta|message)"[ \t]*:[ \t]*\{[^][{}]*"content"[ \t]*:[ \t]*" *[^] \\"[{`~<\xe2]'
)

# An event of a chat says no more than a text, with one choice whose delta has no other member.
CHAT_TEXT_ALONE = re.compile(
    rb'"choices" ?: ?\[\{[^][{}]*"delta" ?: ?\{(?:"role" ?: ?"assistant", ?)?'
    rb'"content" ?: ?("(?:[^"\\]|\\.)*")\}[^][{}]*\}\]'
)

# A choice is at its end.
FINISHED = re.compile(rb'"finish_reason" ?: ?"')


def encode_openai_error(error: RouterError) -> bytes:
    """Return an error as OpenAI's clients read it."""
    details = {"message": str(error), "type": error.kind, "param": None, "code": error.code}
    return encode_json({"error": details})


def encode_ollama_error(error: RouterError) -> bytes:
    """Return an error as Ollama's clients read it."""
    return encode_json({"error": str(error)})


# The types of errors that clients of /v1/messages know, by status; all other faults of the client
# are of one type, and all other faults of the router of another one.
MESSAGES_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def encode_messages_error(error: RouterError) -> bytes:
    """Return an error as the clients of /v1/messages read it."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    kind = MESSAGES_ERRORS.get(error.status, other)
    return encode_json({"type": "error", "error": {"type": kind, "message": str(error)}})


# How much a model is to think: not at all, as it likes, or with this effort.
THINK_OFF = "off"
THINK_ON = "on"
THINK_LEVELS = (THINK_OFF, THINK_ON, "low", "medium", "high")
# OpenAI's word for each.
EFFORTS = {THINK_OFF: "none", THINK_ON: "medium", "low": "low", "medium": "medium", "high": "high"}
# How many tokens of thinking each is worth; fewer than this, servers of /v1/messages refuse.
THINKING_TOKENS = {THINK_ON: 8192, "low": 2048, "medium": 8192, "high": 16384}
FEWEST_THINKING_TOKENS = 1024
# By one of these, a client of a chat says itself how much is to be thought.
CHAT_THINK_MEMBERS = ("reasoning_effort", "reasoning", "thinking", "think", "enable_thinking")
TEMPLATE_THINK_MEMBERS = ("enable_thinking", "thinking")
# What adds members to a request, by their places: none where its client has said it itself.
Additions = dict[Path, Any]


def think_in_chat(think: str, document: Mapping[str, Any]) -> Additions:
    """Return what says to a server of OpenAI's chats how much to think.

    `off`  ->  both names that templates have for it as false, and the effort `none`
    `on`, `low`  ->  `chat_template_kwargs.enable_thinking` as true; the effort `low`
    """
    template = document.get("chat_template_kwargs")
    in_template = isinstance(template, dict) and any(
        name in template for name in TEMPLATE_THINK_MEMBERS
    )
    if in_template or any(document.get(name) is not None for name in CHAT_THINK_MEMBERS):
        return {}
    if think == THINK_ON:
        return {("chat_template_kwargs", "enable_thinking"): True}
    additions: Additions = {("reasoning_effort",): EFFORTS[think]}
    if think == THINK_OFF:
        for name in TEMPLATE_THINK_MEMBERS:
            additions["chat_template_kwargs", name] = False
    return additions


def think_in_responses(think: str, document: Mapping[str, Any]) -> Additions:
    """Return what says to a server of /v1/responses how much to think."""
    reasoning = document.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.get("effort") is not None:
        return {}
    return {("reasoning", "effort"): EFFORTS[think]}


def think_in_messages(think: str, document: Mapping[str, Any]) -> Additions:
    """Return what says to a server of /v1/messages how much to think.

    At most half of `max_tokens` may be thoughts, so that there is room for the answer.
    """
    if document.get("thinking") is not None:
        return {}
    if think == THINK_OFF:
        return {("thinking",): {"type": "disabled"}}
    tokens = THINKING_TOKENS[think]
    most = document.get("max_tokens")
    if isinstance(most, int):
        tokens = min(tokens, most // 2)
    if tokens < FEWEST_THINKING_TOKENS:
        return {}
    return {("thinking",): {"type": "enabled", "budget_tokens": tokens}}


def think_in_ollama(think: str, document: Mapping[str, Any]) -> Additions:
    """Return what says to a server of Ollama's how much to think."""
    if document.get("think") is not None:
        return {}
    wishes = {THINK_OFF: False, THINK_ON: True}
    return {("think",): wishes.get(think, think)}


# Where an answer has what was thought: a member of what speaks, or an item of its own in a list.
BESIDE_TEXT = "reasoning_content"
BESIDE_OLLAMA_TEXT = "thinking"
IN_CONTENT = "content"
IN_OUTPUT = "output"


class Protocol(NamedTuple):
    """One endpoint: where its requests, answers and events hold what."""

    # The shape of requests.
    request: Shape = OTHER
    # The member of a request with the user's words; "" where it is no conversation.
    user_words: str = ""
    # The member with words of the client that stand before these, "" where there is none.
    system_words: str = ""
    # One of these members names the model.
    model_members: tuple[str, ...] = ("model",)
    needs_model: bool = False
    streams: str = IF_ASKED
    # Whether `stream_options.include_usage` is understood.
    usage_option: bool = False
    # Which path of an OpenAI server does the same, for servers that do not know this one.
    openai_path: str = ""
    # Which one does it for a prompt that goes to the model as it is.
    raw_openai_path: str = ""
    # Whether prompts go to the model as they are, without a template around them.
    raw_prompts: bool = False
    # Adds to a request how much is to be thought, unless the request says so itself.
    add_think: Callable[[str, Mapping[str, Any]], Additions] | None = None

    # The shape of answers and of their events.
    answer: Shape = ANY_ANSWER
    # The members of an event that say which of several texts it is about: the `item` of its parts.
    item_members: tuple[str, ...] = ()
    # What shows in an event that the text has begun without a tag.
    plain_text: re.Pattern[bytes] | None = None
    # Where thinking stands that is moved out of a text.
    thoughts: str = BESIDE_TEXT
    # What finds the text, in its quotes, in an event that says no more.
    text_alone: re.Pattern[bytes] | None = None
    # The event that ends a stream has one of these words in it, and another event hardly ever has:
    # one that has none need not be parsed to know that it is not the last.
    end_words: tuple[bytes, ...] = (DONE_MARK,)
    # Where the text stands in an answer that the router makes itself.
    text_path: Path = ()
    # Whether an answer has to name the model as its client knows it.
    names_model: bool = False
    # Whether tools may stand in namespaces.
    has_namespaces: bool = False
    # Whether a server keeps its answers, for a request that names one as `previous_response_id`.
    keeps_answers: bool = False
    # The member without which it is no answer: its server does not know the endpoint. "" where any
    # answer will do.
    answer_member: str = ""
    encode_error: Callable[[RouterError], bytes] = encode_openai_error
    # What stands before the data of an error in a stream, and an event that says nothing: a comment
    # that clients of server-sent events skip.
    error_prefix: bytes = b""
    ping: bytes = b": ping\n\n"


# Every other path: what its answers look like is not known.
OTHER_PROTOCOL = Protocol(
    item_members=("index", "item_id", "content_index"), plain_text=PLAIN_CHAT_TEXT
)
OTHER_OLLAMA = Protocol(
    model_members=("model", "name"),
    needs_model=True,
    streams=UNLESS_REFUSED,
    thoughts=BESIDE_OLLAMA_TEXT,
    end_words=(b'"done":true', b'"done": true'),
    names_model=True,
    encode_error=encode_ollama_error,
)
# What lies under /v1/messages.
OTHER_MESSAGES = OTHER_PROTOCOL._replace(
    encode_error=encode_messages_error,
    error_prefix=b"event: error\n",
    ping=b'event: ping\ndata: {"type": "ping"}\n\n',
)
PROTOCOLS = {
    "/v1/chat/completions": Protocol(
        request=CHAT_REQUEST,
        user_words="messages",
        needs_model=True,
        usage_option=True,
        add_think=think_in_chat,
        answer=CHAT_ANSWER,
        plain_text=PLAIN_CHAT_TEXT,
        text_alone=CHAT_TEXT_ALONE,
    ),
    "/v1/completions": Protocol(
        request=PROMPT_REQUEST,
        user_words="prompt",
        needs_model=True,
        usage_option=True,
        raw_prompts=True,
        answer=CHAT_ANSWER,
    ),
    "/v1/embeddings": Protocol(needs_model=True),
    "/v1/messages": OTHER_MESSAGES._replace(
        request=MESSAGES_REQUEST,
        system_words="system",
        user_words="messages",
        needs_model=True,
        add_think=think_in_messages,
        answer=ByType(MESSAGES_EVENTS, other={"error": ERROR}),
        plain_text=None,
        thoughts=IN_CONTENT,
        item_members=("index",),
        end_words=(b'"message_stop"',),
    ),
    # Servers without it say so in many ways. Its clients go on with an estimate after a 404 alone.
    "/v1/messages/count_tokens": OTHER_MESSAGES._replace(
        request=MESSAGES_REQUEST,
        system_words="system",
        needs_model=True,
        streams=NEVER_STREAMS,
        answer=NO_TEXTS,
        answer_member="input_tokens",
    ),
    "/v1/responses": Protocol(
        request=RESPONSES_REQUEST,
        user_words="input",
        system_words="instructions",
        has_namespaces=True,
        add_think=think_in_responses,
        answer=ByType(RESPONSES_EVENTS, other=RESPONSE),
        thoughts=IN_OUTPUT,
        item_members=("item_id", "content_index"),
        end_words=(b'"response.completed"', b'"response.incomplete"', b'"response.failed"'),
        keeps_answers=True,
    ),
    # llama.cpp's own, each of which takes requests without a model, too.
    "/completion": Protocol(
        request=PROMPT_REQUEST,
        user_words="prompt",
        raw_prompts=True,
        answer=OWN_ANSWER,
        item_members=("index",),
    ),
    "/infill": Protocol(answer=OWN_ANSWER, item_members=("index",)),
    "/tokenize": Protocol(answer=NO_TEXTS),
    "/detokenize": Protocol(answer=NO_TEXTS),
    "/apply-template": Protocol(answer=NO_TEXTS),
    "/props": Protocol(answer=NO_TEXTS),
    "/slots": Protocol(answer=NO_TEXTS),
    "/api/chat": OTHER_OLLAMA._replace(
        request=CHAT_REQUEST,
        user_words="messages",
        openai_path="/v1/chat/completions",
        add_think=think_in_ollama,
        answer=CHAT_LINE,
        plain_text=PLAIN_CHAT_TEXT,
        text_path=("message", "content"),
    ),
    "/api/generate": OTHER_OLLAMA._replace(
        request=GENERATE_REQUEST,
        user_words="prompt",
        openai_path="/v1/chat/completions",
        raw_openai_path="/v1/completions",
        add_think=think_in_ollama,
        answer=GENERATE_LINE,
        text_path=("response",),
    ),
    "/api/embed": OTHER_OLLAMA._replace(streams=NEVER_STREAMS, openai_path="/v1/embeddings"),
    "/api/embeddings": OTHER_OLLAMA._replace(streams=NEVER_STREAMS, openai_path="/v1/embeddings"),
}


# What all paths share that lie under one of these and have no row of their own.
FAMILIES = {"/v1/messages/": OTHER_MESSAGES}


def find_row(path: str, other: Protocol) -> Protocol:
    """Return the row of a path, or that of its family; `other` for a path without any."""
    protocol = PROTOCOLS.get(path)
    if protocol is None:
        families = [row for start, row in FAMILIES.items() if path.startswith(start)]
        protocol = families[0] if families else other
    return protocol


def find_protocol(path: str) -> Protocol:
    """Return what the documents of a path look like."""
    return find_row(path, OTHER_OLLAMA if path.startswith("/api/") else OTHER_PROTOCOL)


# --- what an answer says --------------------------------------------------------------


def read_answer(protocol: Protocol, document: Mapping[str, Any]) -> list[Part]:
    """Return what an answer or an event of a protocol says.

    `{"type": "content_block_delta", "index": 1, "delta": {"text": "Hi"}}` of /v1/messages
    ->  `[Part(TEXT, 0, 1, ("delta", "text"), "Hi")]`
    """
    if "error" in (document.get("type"), document.get("object")):
        # It calls itself an error, and its words may stand anywhere in it.
        return [Part(ERROR, 0, None, (), document.get("error") or document)]
    item: Any = None
    for name in protocol.item_members:
        value = document.get(name)
        if isinstance(value, int | str):
            item = value if item is None else (item, value)
    return read_parts(protocol.answer, document, item)


def error_words(document: Mapping[str, Any]) -> str:
    """Return the sentence in a server's error document, or else the document.

    `{"error": {"message": "no memory", "code": 5}}`  ->  `no memory`
    """
    words: Any = document
    for name in ("error", "detail", "message"):
        # `true` only says that another member is about an error.
        if document.get(name) not in (None, "", True, False):
            words = document[name]
            break
    if isinstance(words, dict):
        words = words.get("message") or words.get("error") or words
    return words if isinstance(words, str) else json.dumps(words)


def find_error(protocol: Protocol, document: Mapping[str, Any]) -> str:
    """Return what an answer or event says went wrong, "" when it says nothing of the kind.

    `{"response": {"error": {"message": "no memory"}}}` of /v1/responses  ->  `no memory`
    """
    for part in read_answer(protocol, document):
        if part.kind == ERROR:
            return error_words({"error": part.value})
    return ""


# Parts that say nothing to a client which waits for an answer.
SAYS_NOTHING = frozenset((BEGIN, ROLE, NAME, RESULT, TEXT_END, USAGE))
PING_TYPES = ("ping", "keepalive")


def says_something(document: Mapping[str, Any], parts: Sequence[Part]) -> bool:
    """Tell whether a document, which has these parts, says something or only that it begins.

    `{"choices": [{"delta": {"role": "assistant", "content": ""}}]}`  ->  False
    `{"choices": [{"delta": {"content": "Hi"}}]}`, `{"type": "image", "data": ...}`  ->  True
    """
    is_known = False
    for part in parts:
        if part.value and part.kind not in SAYS_NOTHING:
            return True
        # Counts stand beside anything.
        is_known = is_known or part.kind != USAGE
    # A document that has no known part holds data of another kind, such as vectors, unless it is a
    # ping or an empty event of a chat: those of OpenAI's have `choices`, those of Ollama's `done`.
    is_empty = not document or "choices" in document or "done" in document
    return not (is_known or is_empty or document.get("type") in PING_TYPES)


# What members of an error say of its status, other than by a number.
ERROR_STATUSES = {
    "429": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "503": 503,
    "overloaded_error": 503,
    "unavailable_error": 503,
}


def read_error_status(error: Any) -> int | None:
    """Return the status that an error inside of an answer has, None without one.

    `{"message": "Loading model", "code": 503}`  ->  503
    `{"message": "Too many", "type": "rate_limit_error"}`  ->  429
    """
    members = error if isinstance(error, dict) else {}
    for name in ("status", "status_code", "code", "type"):
        value = members.get(name)
        status = ERROR_STATUSES.get(value) if isinstance(value, str) else value
        if isinstance(status, int) and 400 <= status <= 599:
            return status
    return None


def is_done_mark(data: bytes) -> bool:
    """Tell whether the data of an event is OpenAI's mark for the end: `[DONE]`."""
    return any(line.strip() == DONE_MARK for line in data.splitlines())


def is_last_event(protocol: Protocol, format: EventFormat, event: bytes) -> bool:
    """Tell whether an event is the last one of its stream: clients wait for no other."""
    if is_done_mark(format.read_data(event)):
        return True
    document = format.read_document(event) or {}
    return any(part.kind == END for part in read_answer(protocol, document))


def are_complete(protocol: Protocol, format: EventFormat, events: Iterable[bytes]) -> bool:
    """Tell whether the last events of a stream say that it is at its end, a good or a bad one.

    Without an end of the protocol's own, or an error, all choices that say something in these
    events have to finish in them: one of two may have nothing more to say long before the other.
    """
    speaking = set()
    finished = set()
    for event in events:
        if is_done_mark(format.read_data(event)):
            return True
        for part in read_answer(protocol, format.read_document(event) or {}):
            if part.kind in (END, ERROR):
                return True
            if part.kind == FINISH:
                finished.add(part.choice)
            elif part.kind in (TEXT, THINKING, CALL) and part.value:
                speaking.add(part.choice)
    return bool(finished) and speaking <= finished


def may_be_whole(protocol: Protocol, format: EventFormat, data: bytes, closed: bool) -> bool:
    """Tell whether a stream may be whole that ended inside of its first event, which is `data`.

    It is when the event itself says that it is the last. It may be, too, when the event holds an
    object and the framing told where the content ends, so that nothing is missing. When that was
    told by the close of the connection alone (`closed`), the rest may be lost.
    """
    if are_complete(protocol, format, [data]):
        return True
    return not closed and parse_object(format.read_data(data)) is not None


# The id of an answer that its server keeps, as all of them write it.
RESPONSE_ID = re.compile(rb'"id" ?: ?"(resp_[^"\\\\]{1,200})"')


class Opening:
    """Looks for the first thing that an answer says, in what comes of it.

    Many servers begin a stream long before there is anything to say: with pings, with the role,
    with `message_start`. An instance that dies then, or tells an error, has given no answer yet.

    `feed` takes the octets of an answer, one piece after another; `finish` follows the last one.
    Both, and the methods below them, tell whether it is clear by now what the answer begins with:
    an error, which is in `error` then, or anything else. What cannot be looked into counts as
    anything else, and so does a beginning of more than `limits.silent_beginning` octets.

    An answer that is no stream of events is looked at as a whole if it begins like an object of
    JSON. It is clear before its end when its first line is an object that says something.
    """

    def __init__(
        self, protocol: Protocol, media_type: str, coding: str = "", limits: Limits = LIMITS
    ) -> None:
        self.protocol = protocol
        format = EVENT_FORMATS.get(media_type)
        # None for an answer that is no stream of events.
        self.reader = EventReader(format, limits) if format else None
        self.coding = coding
        self.inflater = Inflater(coding, math.inf) if coding in CODINGS else None
        self.limit = limits.silent_beginning
        self.error: ErrorAnswer | None = None
        # By which id a server keeps the answer; "" while none was seen.
        self.response_id = ""
        # How many octets have come, after decoding where that is possible.
        self.size = 0
        # What has come of an answer that is no stream of events.
        self.content = b""

    @property
    def start(self) -> bytes:
        """What has come of `content`, less the mark and the white space in front of it."""
        return self.content.removeprefix(BOM).lstrip()

    @property
    def is_document(self) -> bool:
        """Whether the answer is no stream of events and begins like an object of JSON."""
        return self.start.startswith(b"{")

    def feed(self, data: bytes) -> bool:
        """Look at a piece."""
        if self.inflater:
            try:
                data = self.inflater.feed(data)
            except BadGateway:
                # It is raised again when the piece is decoded for the client.
                return True
        self.size += len(data)
        if self.protocol.keeps_answers and not self.response_id:
            found = RESPONSE_ID.search(data)
            self.response_id = found[1].decode("latin-1") if found else ""
        if self.size > self.limit:
            return True
        if self.coding and not self.inflater:
            # Nobody here can decode it.
            return self.size > 0
        if self.reader is None:
            self.content += data
            return self.look_at_start()
        _, block = self.reader.feed(data)
        # As nearly always, a text begins, and no event has to be parsed to see that. An error in
        # front of it would be what the answer begins with.
        plain_text = self.protocol.plain_text
        if plain_text and b"error" not in block and plain_text.search(block):
            return True
        # The first event that says something or tells an error decides.
        return any(self.look_at_event(event) for event in self.reader.format.split(block))

    def finish(self, closed: bool) -> bool:
        """Look at what is left at the end; `closed` as in `may_be_whole`."""
        if self.reader:
            event = self.reader.finish()
            is_whole = may_be_whole(self.protocol, self.reader.format, event, closed)
            return is_whole and self.look_at_event(event)
        document = parse_object(self.content)
        if document is None:
            # It begins like an object and is none: it was cut, or its server sends it so.
            return self.start != b"" and not closed
        return self.look_at_document(document)

    def look_at_event(self, event: bytes) -> bool:
        """Look at an event; one that holds anything but an object says something."""
        document = self.reader.format.read_document(event)
        if document is not None:
            return self.look_at_document(document)
        data = self.reader.format.read_data(event)
        return data.strip() != b"" and not is_done_mark(data)

    def look_at_start(self) -> bool:
        """Look at what has come of an answer that is no stream of events."""
        start = self.start
        if not start.startswith(b"{"):
            return start != b""
        # Some servers give a stream of JSON lines the media type of a single document.
        line, line_end, _ = start.partition(b"\n")
        document = parse_object(line) if line_end else None
        return document is not None and self.look_at_document(document)

    def look_at_document(self, document: dict[str, Any]) -> bool:
        """Look at the object of an event or of a line, or at one that is the whole answer."""
        parts = read_answer(self.protocol, document)
        for part in parts:
            if part.kind == ERROR:
                words = error_words({"error": part.value})
                self.error = ErrorAnswer(words, read_error_status(part.value))
                return True
        return says_something(document, parts)


# --- token counts ---------------------------------------------------------------------
# Servers count under many names, and not always under those of the protocol of their path. So the
# names of all protocols are tried, the best one first. Some servers split a count in parts, which
# have to be added: their names stand together.
# Where a server says the total alone, as for embeddings, there is nothing but the prompt to count.

PROMPT_COUNTS = (
    ("prompt_tokens",),
    ("prompt_eval_count",),
    ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
    ("prompt_n", "cache_n"),
    ("total_tokens",),
)
COMPLETION_COUNTS = (("completion_tokens",), ("output_tokens",), ("eval_count",), ("predicted_n",))
CACHED_COUNTS = (("cached_tokens",), ("cache_read_input_tokens",), ("cache_n",))
# Some servers write `12.0`.
TOKEN_COUNT = re.compile(
    rb'"([a-z_]+_(?:tokens|count|n))"\s*:\s*([0-9]{1,15})(?:\.0{1,15})?(?![0-9.eE])'
)
# The counts are looked for in twice so many octets from the last `usage` on, or without one in the
# last so many; those of /v1/messages in the first so many, too.
USAGE_WINDOW = 8 * KiB


class Usage(NamedTuple):
    """What an answer cost in tokens; None is unknown."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None


def add_counts(counts: Mapping[str, int], choices: Iterable[Sequence[str]]) -> int | None:
    """Return the sum of the counts of the first choice whose first count is known.

    `{"a": 1, "b": 2}`, `[("x",), ("a", "b", "c")]`  ->  3
    """
    for names in choices:
        if names[0] in counts:
            return sum(counts.get(name, 0) for name in names)
    return None


def read_usage(answer: bytes) -> Usage:
    """Return the counts of an answer, whole or streamed, however its server spells them.

    `b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}'`  ->  `(9, 1, None)`
    """
    # Most servers say the counts in a `usage` member near the end of the answer, where a search
    # from the end finds it at once. A server without it (Ollama, llama.cpp's timings) says them in
    # its last octets.
    start = answer.rfind(b'"usage"')
    if start < 0:
        start = max(0, len(answer) - USAGE_WINDOW)
    window = answer[start : start + 2 * USAGE_WINDOW]
    # A stream of /v1/messages says what the prompt cost at its beginning.
    if answer.find(b'"input_tokens"', 0, USAGE_WINDOW) >= 0:
        window = answer[:USAGE_WINDOW] + window
    counts = {name.decode(): int(count) for name, count in TOKEN_COUNT.findall(window)}
    return Usage(
        add_counts(counts, PROMPT_COUNTS),
        add_counts(counts, COMPLETION_COUNTS),
        add_counts(counts, CACHED_COUNTS),
    )


# --- conversations --------------------------------------------------------------------
# Messages of every protocol become one kind of record: for the log, and to be translated.

BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
IMAGE_STARTS = {"iVBOR": "png", "/9": "jpeg", "R0lGO": "gif", "UklGR": "webp", "Qk": "bmp"}


def require_content(condition: object, message: str) -> None:
    """Raise MalformedContent, for what a client sent, unless a condition holds."""
    if not condition:
        raise MalformedContent(message)


@dataclasses.dataclass
class ToolCall:
    """A call of a tool, whose arguments may come in pieces of their JSON text."""

    index: Any
    id: Any = None
    name: Any = None
    arguments: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Message:
    """What one side said at once, in any protocol; texts may come in pieces."""

    role: Any
    texts: list[str] = dataclasses.field(default_factory=list)
    thoughts: list[str] = dataclasses.field(default_factory=list)
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    images: list[Any] = dataclasses.field(default_factory=list)
    # Behind how many characters of the text each picture stands.
    image_places: list[int] = dataclasses.field(default_factory=list)
    call_id: Any = None
    name: Any = None
    # The member that thoughts are read from.
    thoughts_member: str | int = ""

    def as_document(self) -> dict[str, Any]:
        """Return the message as the log's readers get it."""
        calls = [
            {"id": call.id, "name": call.name, "arguments": "".join(call.arguments)}
            for call in self.calls
        ]
        return {
            "role": self.role,
            "content": "".join(self.texts),
            "thinking": "".join(self.thoughts),
            "tool_calls": calls,
            "tool_call_id": self.call_id,
            "name": self.name,
            "images": self.images,
            "image_at": self.image_places,
        }

    def add_image(self, url: Any) -> None:
        """Add a picture behind the text that is there already."""
        self.images.append(url)
        self.image_places.append(sum(map(len, self.texts)))


def odd_part(part: Part) -> MalformedContent:
    """Return the error for a part that has not the shape of its protocol."""
    place = ".".join(map(str, part.path))
    return MalformedContent(f"`{place}` has no known shape: {json.dumps(part.value)[:80]}")


def read_image(part: Part) -> Any:
    """Return the URL of a picture, which may be a string or stand in an object.

    `{"url": "http://a/b.png"}`                      ->  `http://a/b.png`
    `{"media_type": "image/png", "data": "iVBOR="}`  ->  `data:image/png;base64,iVBOR=`

    Raises MalformedContent for an object that has none of these.
    """
    value = part.value
    if not isinstance(value, dict):
        return value
    if value.get("url"):
        return value["url"]
    if not (value.get("data") and value.get("media_type")):
        raise odd_part(part)
    return f"data:{value['media_type']};base64,{value['data']}"


def read_image_data(value: Any) -> str:
    """Return a URL for a picture in base64, whose kind its first octets tell.

    `iVBORw0K\\nGgo=`  ->  `data:image/png;base64,iVBORw0KGgo=`;  raises MalformedContent
    """
    data = "".join(str(value).split())
    if data.startswith(("data:", "http://", "https://")):
        return data
    require_content(BASE64.fullmatch(data), "an image is not base64")
    kind = "png"
    for start, known_kind in IMAGE_STARTS.items():
        if data.startswith(start):
            kind = known_kind
    return f"data:image/{kind};base64,{data}"


# Where the items of calls in /v1/responses have what the tool is given.
CALL_ARGUMENTS = ("arguments", "input", "action", "operation", "queries", "code")


def read_call(part: Part) -> tuple[Any, Any, Any, Any]:
    """Return index, id, name and arguments of a tool call, or of a fragment of one.

    OpenAI and Ollama: `{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}`
    /v1/messages: `{"type": "tool_use", "id": "c", "name": "f", "input": {}}`, then fragments
    `{"type": "input_json_delta", "partial_json": "{"}` in the same block
    /v1/responses: `{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}`
    """
    call = part.value
    if not isinstance(call, dict):
        raise odd_part(part)
    kind = call.get("type")
    if kind in TOOL_USES:
        arguments = call.get("partial_json") or call.get("input")
        return part.item, call.get("id"), call.get("name"), arguments
    if kind in CALL_ITEMS:
        # Tools that are the server's own have no name but their kind.
        name = call.get("name") or kind.removesuffix("_call")
        if call.get("namespace"):
            name = f"{call['namespace']}__{name}"
        given = (call[member] for member in CALL_ARGUMENTS if call.get(member))
        return None, call.get("call_id") or call.get("id"), name, next(given, None)
    function = call.get("function") or {}
    if not isinstance(function, dict):
        raise odd_part(part)
    return call.get("index"), call.get("id"), function.get("name"), function.get("arguments")


def find_call(calls: list[ToolCall], fragment: ToolCall) -> ToolCall | None:
    """Return the call that a fragment goes on with, None when it begins another one.

    The first fragment of a call says its index, id and name, the others the index alone: so does
    OpenAI. Some servers repeat name and id each time, some make a new id for each fragment, and
    some have one index for all calls, so that only another name tells where the next one begins:

    `{"index": 0, "id": "a", "name": "f"}` goes on with `{"index": 0}`, `{"index": 0, "id": "b"}`
    and `{"index": 0, "id": "a", "name": "f"}`, but neither with `{"index": 0, "name": "g"}` nor
    with `{"index": 0, "id": "b", "name": "f"}`, nor with anything that has a name and no index.

    Only the last few calls can go on, or many fragments would take quadratic time.
    """
    open_calls = [c for c in calls[-LIMITS.open_tool_calls :] if c.index == fragment.index]
    if not open_calls or (fragment.name and fragment.index is None):
        return None
    call = open_calls[-1]
    for earlier in open_calls:
        if fragment.id and earlier.id == fragment.id:
            call = earlier
    if not fragment.name or not call.name:
        return call
    same_id = not fragment.id or call.id in (None, fragment.id)
    return call if call.name == fragment.name and same_id else None


def add_call(calls: list[ToolCall], part: Part) -> None:
    """Add a tool call, or in an event a fragment to the call that it belongs to."""
    index, call_id, name, arguments = read_call(part)
    if not isinstance(arguments, str):
        arguments = encode_json_exactly(arguments).decode() if arguments else ""
    fragment = ToolCall(index, call_id or None, name or None)
    # What stands in a message is whole.
    call = find_call(calls, fragment) if "delta" in part.path else None
    if call is None:
        call = fragment
        calls.append(call)
    call.id = call.id or fragment.id
    call.name = call.name or fragment.name
    call.arguments.append(arguments)


def add_part(message: Message, part: Part) -> None:
    """Add what a document says to the message that it belongs to.

    What is no part of a message is ignored. Raises MalformedContent for what has an odd shape.
    """
    kind, value = part.kind, part.value
    if kind in (TEXT, SYSTEM, REFUSAL):
        if not isinstance(value, str):
            raise odd_part(part)
        message.texts.append(value)
    elif kind == THINKING and isinstance(value, str):
        # Some servers say each thought twice, as `reasoning` and as `reasoning_content`.
        member = part.path[-1]
        if message.thoughts_member in ("", member):
            message.thoughts_member = member
            message.thoughts.append(value)
    elif kind == CALL:
        add_call(message.calls, part)
    elif kind == ROLE:
        # The result of a call has the role `tool` by what it is, whatever its message says.
        if message.call_id is None:
            message.role = value
    elif kind == NAME:
        message.name = value
    elif kind == RESULT:
        message.role = "tool"
        message.call_id = value
    elif kind == IMAGE:
        message.add_image(read_image(part))
    elif kind == IMAGE_DATA:
        message.add_image(read_image_data(value))
    elif kind == ODD:
        raise odd_part(part)


def read_messages(
    protocol: Protocol, document: Mapping[str, Any], tolerant: bool = False
) -> list[Message]:
    """Return the messages of a request: the system's words, then the others or the prompts.

    `{"system": "Be brief.", "prompt": "Hi"}` of /api/generate  ->
    `[Message("system", ["Be brief."]), Message("user", ["Hi"])]`

    Raises MalformedContent for an odd shape, unless `tolerant`, which leaves it out.
    """
    system = Message("system")
    messages: dict[int, Message] = {}
    for part in read_parts(protocol.request, document):
        if part.kind == OTHER:
            continue
        message = system
        if part.kind != SYSTEM:
            if part.choice not in messages:
                messages[part.choice] = Message("")
            message = messages[part.choice]
        try:
            add_part(message, part)
        except MalformedContent:
            if not tolerant:
                raise
    for message in messages.values():
        # Only /v1/responses and careless clients leave the role out.
        if not message.role:
            # Only a model thinks and calls tools.
            is_models = message.calls or message.thoughts
            message.role = "assistant" if is_models else "user"
    return [system, *messages.values()] if system.texts else list(messages.values())


# What begins a message of an answer; an error or the counts alone do not.
SPOKEN = frozenset((ROLE, TEXT, THINKING, REFUSAL, CALL, IMAGE, IMAGE_DATA, FINISH, END))


def answer_documents(answer: bytes) -> Iterator[dict[str, Any]]:
    """Yield the objects of an answer: the one that it is, or those of its events."""
    whole = parse_object(answer)
    if whole is not None:
        yield whole
        return
    for line in answer.splitlines():
        document = parse_object(line.removeprefix(b"data:").strip())
        if document is not None:
            yield document


HTML_TITLE = re.compile(r"<title>([^<]*)</title>", re.IGNORECASE)


def read_error(content: bytes) -> str:
    """Return the sentence in the content of an error answer, "" when it says nothing.

    `{"detail": "no memory"}`, `[{"error": {"message": "no memory"}}]`, `no memory`, and
    `<html><title>no memory</title>`  ->  `no memory`
    """
    text = content.decode("utf-8", "replace").strip()
    # Gemini's servers put the object into an array.
    document = parse_object(text.removeprefix("[").removesuffix("]"))
    if document is None:
        # A server that was about to stream may have made an event of it.
        document = next(answer_documents(content), None)
    if document is not None:
        return error_words(document)
    title = HTML_TITLE.search(text)
    return title[1].strip() if title else text


def read_choices(answer: bytes) -> list[Message]:
    """Return the choices of an answer, whole or streamed, whatever its protocol is."""
    choices: dict[int, Message] = {}
    for document in answer_documents(answer):
        response = document.get("response")
        if isinstance(response, dict) and response.get("output"):
            # The last event of /v1/responses says all of it again.
            choices.clear()
            document = response
        for part in read_answer(OTHER_PROTOCOL, document):
            if part.kind in SPOKEN:
                if part.choice not in choices:
                    choices[part.choice] = Message("assistant")
                try:
                    add_part(choices[part.choice], part)
                except MalformedContent:
                    continue
    for message in choices.values():
        # Where the server has told thinking apart, what is left is the answer.
        if not "".join(message.thoughts).strip():
            text, thought = filter_text("".join(message.texts), FilterRules(think=True))
            message.texts = [text]
            message.thoughts.append(thought)
    return list(choices.values())


def split_results(messages: list[Any]) -> list[Any]:
    """Return messages of which each has one result of a tool at most, and nothing beside it.

    In /v1/messages one message has the results of all calls, and what the user says to them:
    `[{"role": "user", "content": [{"type": "tool_result"}, {"type": "tool_result"}]}]`
    ->  `[{"role": "user", "content": [{"type": "tool_result"}]}, {...}]`
    """
    split = []
    for message in messages:
        blocks = message.get("content") if isinstance(message, dict) else None
        groups: list[list[Any]] = [[]]
        for block in blocks if isinstance(blocks, list) else ():
            is_result = isinstance(block, dict) and block.get("type") == "tool_result"
            if is_result or not groups[-1]:
                groups += [[block], []] if is_result else [[block]]
            else:
                groups[-1].append(block)
        filled = [group for group in groups if group]
        split += [{**message, "content": group} for group in filled] or [message]
    return split


def name_results(messages: list[Message]) -> list[Message]:
    """Give each result of a tool the name of that tool, as the call with its id says it."""
    names: dict[Any, Any] = {}
    for message in messages:
        names.update((call.id, call.name) for call in message.calls if isinstance(call.id, str))
        if message.name is None and isinstance(message.call_id, str):
            message.name = names.get(message.call_id)
    return messages


def read_transcript(path: str, content: bytes, answer: bytes) -> list[dict[str, Any]]:
    """Return a conversation: the request's messages, then each choice of the answer.

    What is odd in one of them is left out. The request has no messages where the protocol of the
    path is not known; its answer may have some all the same.
    """
    protocol = find_protocol(path)
    request = parse_object(content) or {}
    if isinstance(request.get("messages"), list):
        request["messages"] = split_results(request["messages"])
    messages = name_results(read_messages(protocol, request, tolerant=True))
    return [message.as_document() for message in (*messages, *read_choices(answer))]


# --- estimates ------------------------------------------------------------------------
# For servers that tell no usage.

CHARACTERS_PER_TOKEN = 4


def tokens_of(characters: int) -> int:
    """Return about how many tokens a text of so many characters has: 9  ->  3."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def estimate_tokens(messages: Iterable[Mapping[str, Any]]) -> int:
    """Return about how many tokens the messages of a transcript have."""
    characters = 0
    for message in messages:
        characters += len(message["content"]) + len(message["thinking"])
        characters += sum(len(call["arguments"]) for call in message["tool_calls"])
    return tokens_of(characters)


# ======================================================================================
# 8  Dialects (pure)
# ======================================================================================
# A server that speaks the client's own dialect gets the request as it came, and its answer goes
# back as it comes; any other server is spoken to as OpenAI's clients do. A `Dialect` is a record
# of functions, one constant for each kind of endpoint: it turns what a client says into a
# `ParsedRequest`, that into what a server reads, and the answer into what the client reads. What
# differs between endpoints of one dialect stands in PROTOCOLS, never here. JSON that needs no
# change keeps its bytes. On its way an answer goes through a rewriter, if anything has to change
# in it: `BufferedRewrite` for documents, `StreamRewrite` for events.
# To add a dialect: its functions, its `Dialect` constants, its lines in section 16.


# --- requests -------------------------------------------------------------------------

# How deep `append_text` looks for a text: `messages`, its last element, `content`, its last
# element and `text` are five steps.
MAX_TEXT_PATH = 5


# What stands in a prompt that is a template already filled in, or that shows a model where to
# fill in: `<|im_start|>`, DeepSeek's with bars of full width, `[INST]`, `<fim_prefix>`, `<PRE>`.
SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|\[/?(?:INST|PREFIX|SUFFIX|MIDDLE)\]"
    r"|<\[?fim[-_][a-z]{1,10}\]?>|<(?:PRE|SUF|MID|bos|s|(?:start|end)_of_turn)>"
)


def is_raw(document: Mapping[str, Any]) -> bool:
    """Tell whether a request says that its prompt goes to the model as it is.

    With a `suffix`, the model fills in what stands between the two.
    """
    return bool(document.get("raw") or document.get("suffix"))


# --- tools in namespaces ---------------------------------------------------------------
# Clients of /v1/responses group tools: `{"type": "namespace", "name": "web", "tools": [...]}`, and
# a call of one has `"namespace": "web"` beside its name. Only OpenAI's own servers know that. For
# others the tools become functions with names such as `web__search`: in the tools, in the calls of
# the history and in the choice of a tool. The calls in the answer get both names back.

NAMESPACE = "namespace"
CALL_TYPES = ("function_call", "custom_tool_call")
# One of these words is in every event that names the tool of a call.
CALL_WORDS = (b'"function_call"', b'"custom_tool_call"', b'_call_arguments.done"')
NO_TOOL_NAME = re.compile(r"[^A-Za-z0-9_-]")
MAX_TOOL_NAME = 64
# Above so many levels of namespaces inside of each other nothing is flattened.
MAX_NAMESPACE_PATH = 20


class Tool(NamedTuple):
    """A tool as its client knows it; a namespace inside of others has all their names."""

    namespace: str
    name: str


class FoundTool(NamedTuple):
    """A tool in the tools of a request, and where it stands."""

    tool: Tool | None
    path: Path


class ToolNames(NamedTuple):
    """What the tools in the namespaces of a request are called for a server that knows none."""

    # The names of the tools; where a client has two of one name, that of the first.
    functions: dict[Tool, str]
    # The tools that these names mean.
    tools: dict[str, Tool]
    # The name of each tool that stands in a namespace of `tools`, by its place.
    by_place: dict[Path, str]
    # For each namespace of `tools` the choices of its tools, as they stand in `tool_choice`.
    choices: dict[str, list[dict[str, str]]]


def name_of(value: Any, member: str = "name") -> str | None:
    """Return the name that a tool, a call or a choice says, None when it says none."""
    name = value.get(member) if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def is_namespace(value: Any) -> bool:
    """Tell whether a tool is a namespace that can be flattened: it has a name and a list."""
    named = name_of(value) is not None and value.get("type") == NAMESPACE
    return named and isinstance(value.get("tools"), list)


def find_tools(namespace: Any, path: Path, outer: str = "") -> Iterator[FoundTool]:
    """Yield the tools of a namespace, and of those inside of it; None for what has no name.

    `{"type": "namespace", "name": "web", "tools": [{"name": "find"}]}` at `("tools", 0)`
    ->  `FoundTool(Tool("web", "find"), ("tools", 0, "tools", 0))`
    """
    whole_name = outer + namespace["name"]
    for number, value in enumerate(namespace["tools"]):
        inner_path = (*path, "tools", number)
        if is_namespace(value) and len(path) < MAX_NAMESPACE_PATH:
            yield from find_tools(value, inner_path, f"{whole_name}__")
        else:
            name = name_of(value)
            yield FoundTool(None if name is None else Tool(whole_name, name), inner_path)


def function_name(tool: Tool, taken: Container[str]) -> str:
    """Return a name for a tool as functions have them, which is none of those that are taken.

    `Tool("mcp__lab", "add")`  ->  `mcp__lab__add`
    A name that is too long, taken or has other characters ends with a hash of what it means.
    """
    wanted = f"{tool.namespace}__{tool.name}"
    name = NO_TOOL_NAME.sub("_", wanted)
    if name == wanted and len(name) <= MAX_TOOL_NAME and name not in taken:
        return name
    number = 0
    while name in taken or number == 0:
        number += 1
        meant = f"{tool.namespace}\0{tool.name}\0{number}".encode("utf-8", "surrogatepass")
        mark = "_" + hashlib.sha256(meant).hexdigest()[:8]
        name = NO_TOOL_NAME.sub("_", wanted)[: MAX_TOOL_NAME - len(mark)] + mark
    return name


def list_of(document: Mapping[str, Any], member: str) -> list[Any]:
    """Return a list in a document, an empty one where there is none."""
    value = document.get(member)
    return value if isinstance(value, list) else []


def value_at(document: Any, path: Path) -> Any:
    """Return the value at a path: `{"a": [1, 2]}`, `("a", 1)`  ->  2."""
    for key in path:
        document = document[key]
    return document


def read_tool_names(document: Mapping[str, Any]) -> ToolNames:
    """Return what the tools of a request in /v1/responses are called that stand in namespaces.

    `{"tools": [{"type": "namespace", "name": "web", "tools": [{"name": "find"}]}]}`
    ->  `functions == {Tool("web", "find"): "web__find"}`
    """
    found: list[FoundTool] = []
    taken: set[str | None] = set()
    for number, tool in enumerate(list_of(document, "tools")):
        if is_namespace(tool):
            found += find_tools(tool, ("tools", number))
        else:
            taken.add(name_of(tool))
    # Calls of the history may be of tools that are not there any more.
    calls = [i for i in list_of(document, "input") if name_of(i, "type") in CALL_TYPES]
    for call in calls:
        namespace, name = name_of(call, NAMESPACE), name_of(call)
        if namespace is None:
            taken.add(name)
        elif name is not None:
            found.append(FoundTool(Tool(namespace, name), ()))
    names = ToolNames({}, {}, {}, {})
    for tool, path in found:
        if tool is None or (not path and tool in names.functions):
            continue
        function = function_name(tool, taken)
        taken.add(function)
        names.functions.setdefault(tool, function)
        names.tools[function] = tool
        if path:
            names.by_place[path] = function
            outermost = document["tools"][path[1]]
            kind = name_of(value_at(document, path), "type") or "function"
            choice = {"type": kind, "name": function}
            names.choices.setdefault(outermost["name"], []).append(choice)
    return names


def rename_tool(text: str, name: str) -> str:
    """Return a tool, call or choice in JSON with a function's name and without a namespace."""
    return edit_json(remove_member(text, NAMESPACE), {("name",): name})


def flatten_tools(text: str, names: ToolNames, tools: list[Any]) -> str:
    """Return the JSON array of the tools with those of its namespaces in their place."""
    paths: list[Path] = []
    for index, tool in enumerate(tools):
        if is_namespace(tool):
            paths += [found.path[1:] for found in find_tools(tool, ("tools", index))]
        else:
            paths.append((index,))
    # Of members that stand twice the last one counts, as it does where the tools were read.
    values = {path: text[start:end] for start, end, path in find_values(text, 0, paths)}
    pieces = []
    for path in paths:
        function = names.by_place.get(("tools", *path))
        pieces.append(rename_tool(values[path], function) if function else values[path])
    return f"[{','.join(pieces)}]"


def flatten_choice(choice: Any, names: ToolNames) -> Any:
    """Return what a request says of the tool to be called as a server without namespaces reads it.

    A namespace becomes its only function, or means that one of its functions has to be called.
    """
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    namespace, name = name_of(choice, NAMESPACE), name_of(choice)
    function = names.functions.get(Tool(namespace or "", name or ""))
    if kind == "allowed_tools":
        allowed: list[Any] = []
        for tool in list_of(choice, "tools"):
            flat = flatten_choice(tool, names)
            is_several = isinstance(flat, dict) and flat.get("type") == "allowed_tools"
            allowed += list_of(flat, "tools") if is_several else [flat]
        return {**choice, "tools": allowed}
    if namespace is not None and function:
        rest = {member: value for member, value in choice.items() if member != NAMESPACE}
        return {**rest, "name": function}
    choices = names.choices.get(name or "") if kind == NAMESPACE else None
    if not choices:
        return choice
    if len(choices) == 1:
        return choices[0]
    return {"type": "allowed_tools", "mode": "required", "tools": choices}


def flatten_namespaces(text: str, document: Mapping[str, Any], names: ToolNames) -> str:
    """Return a request of /v1/responses for a server that knows no namespaces."""
    tools = list_of(document, "tools")
    functions: dict[Path, str] = {}
    for number, item in enumerate(list_of(document, "input")):
        tool = Tool(name_of(item, NAMESPACE) or "", name_of(item) or "")
        is_call = name_of(item, "type") in CALL_TYPES and name_of(item, NAMESPACE) is not None
        if is_call and tool in names.functions:
            functions[("input", number)] = names.functions[tool]
    paths = list(functions)
    if any(map(is_namespace, tools)):
        paths.append(("tools",))
    # Of members that stand twice the last one counts.
    spans = {path: (start, end) for start, end, path in find_values(text, 0, paths)}
    # From the last to the first, so that the places of the others stay.
    for path, (start, end) in sorted(spans.items(), key=lambda item: item[1], reverse=True):
        value = text[start:end]
        if path in functions:
            value = rename_tool(value, functions[path])
        else:
            value = flatten_tools(value, names, tools)
        text = text[:start] + value + text[end:]
    choice = flatten_choice(document.get("tool_choice"), names)
    if choice == document.get("tool_choice"):
        return text
    return edit_json(text, {("tool_choice",): choice})


def restore_namespaces(names: ToolNames, document: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the edits that name the tools of an answer or event as its client knows them.

    `{"item": {"type": "function_call", "name": "web__find"}}`
    ->  `{("item", "name"): "find", ("item", "namespace"): "web"}`
    """
    edits: dict[Path, Any] = {}
    response = document.get("response")
    holders = [((), document), (("response",), response if isinstance(response, dict) else {})]
    items = [(("item",), document.get("item"))]
    for path, holder in holders:
        items += [((*path, "output", at), i) for at, i in enumerate(list_of(holder, "output"))]
    for path, item in items:
        tool = names.tools.get(name_of(item) or "")
        if tool and item.get("type") in CALL_TYPES and item.get(NAMESPACE) is None:
            edits[(*path, "name")] = tool.name
            edits[(*path, NAMESPACE)] = tool.namespace
    tool = names.tools.get(name_of(document) or "")
    if tool and (name_of(document, "type") or "").endswith("_call_arguments.done"):
        edits[("name",)] = tool.name
    return edits


# --- requests: parameters -------------------------------------------------------------
# What the routing file says of the members of requests: which are taken out (`strip`), which are
# added where they are absent (`default`), and which are always as it says (`set`). And how much is
# to be thought (`think`), for which each protocol has members of its own.


class RequestParameters(NamedTuple):
    """What the routing file says of the members of requests, on one of its levels or on some.

    Each part is done in the order in which it stands. A value is kept as its JSON, so that 1 and
    true are different.
    """

    strips: tuple[Path, ...] = ()
    defaults: tuple[tuple[Path, str], ...] = ()
    sets: tuple[tuple[Path, str], ...] = ()
    # One of THINK_LEVELS, "" where nothing is said.
    think: str = ""


NO_PARAMETERS = RequestParameters()


@functools.lru_cache(maxsize=256)
def merge_parameters(near: RequestParameters, far: RequestParameters) -> RequestParameters:
    """Return what two levels say together, of which `near` counts for more.

    The first default of a member is the one that is added. The last value that is set stays.
    """
    return RequestParameters(
        strips=near.strips + far.strips,
        defaults=near.defaults + far.defaults,
        sets=far.sets + near.sets,
        think=near.think or far.think,
    )


# What `member_at` finds instead of a value: nothing at all, or what is no object and would have to
# be one.
ABSENT = object()
IN_THE_WAY = object()


def member_at(document: Any, path: Path) -> Any:
    """Return the value at a path, ABSENT without one, IN_THE_WAY if no object leads there.

    `{"a": {"b": 1}}`, `("a", "b")`  ->  1;  `("a", "b", "c")`  ->  IN_THE_WAY
    """
    for name in path:
        if document is ABSENT or not isinstance(document, dict):
            return document if document is ABSENT else IN_THE_WAY
        document = document.get(name, ABSENT)
    return document


def put_value(document: dict[str, Any], path: Path, value: Any) -> None:
    """Put a value into a document, with objects around it instead of anything else there."""
    *holder_path, name = path
    for key in holder_path:
        if not isinstance(document.get(key), dict):
            document[key] = {}
        document = document[key]
    document[name] = value


def copy_around(document: Mapping[str, Any], paths: Iterable[Path]) -> dict[str, Any]:
    """Return a document in which the objects around some places are copies, to be changed."""
    copied = dict(document)
    for path in paths:
        holder = copied
        for key in path[:-1]:
            if not isinstance(holder.get(key), dict):
                break
            holder[key] = dict(holder[key])
            holder = holder[key]
    return copied


def find_edits(
    text: str, before: Mapping[str, Any], after: Mapping[str, Any], paths: Iterable[Path]
) -> dict[Path, Any]:
    """Return the edits that make one document of another, which differ at some paths at most.

    `{"a": {}}`, `{"a": {"b": {"c": 1}}}`, `[("a", "b", "c")]`  ->  `{("a", "b"): {"c": 1}}`

    Where an object of the text has two members of a name, all of them become the same.
    """
    edits: dict[Path, Any] = {}
    for path in paths:
        size = 1
        while size < len(path) and isinstance(member_at(before, path[:size]), dict):
            size += 1
        place = path[:size]
        if size > 1 and len(list(find_values(text, 0, [place[:-1]]))) > 1:
            place = path[:1]
        edits[place] = member_at(after, place)
    # What is written as a whole has the edits inside of it, and what is not there needs none.
    return {
        place: value
        for place, value in edits.items()
        if value not in (ABSENT, IN_THE_WAY)
        and not any(place[:n] in edits for n in range(1, len(place)))
    }


def tell_value(path: Path, value: str) -> str:
    """Return in words what a member has become: `("a", "b")`, `0.5`  ->  `a.b = 0.5`."""
    return f"{'.'.join(map(str, path))} = {value}"[: LIMITS.shown_change]


def strip_members(
    text: str, document: dict[str, Any], paths: Iterable[Path], note_change: Callable[[str], None]
) -> str:
    """Take members out of a document and of its text; return the text, and note what was there."""
    for path in paths:
        if path[0] not in document:
            continue
        shorter = remove_value(text, path)
        if shorter != text:
            text = shorter
            note_change(f"strip {'.'.join(map(str, path))}"[: LIMITS.shown_change])
        if member_at(document, path) not in (ABSENT, IN_THE_WAY):
            del member_at(document, path[:-1])[path[-1]]
    return text


def is_set(old: Any, value: str) -> bool:
    """Tell whether a member is as it shall be; an empty object is merged with any other."""
    if value == "{}":
        return isinstance(old, dict)
    return old is not ABSENT and old is not IN_THE_WAY and json.dumps(old) == value


def change_parameters(
    text: str,
    document: Mapping[str, Any],
    parameters: RequestParameters,
    additions: Additions,
    note_change: Callable[[str], None],
) -> tuple[str, Mapping[str, Any]]:
    """Return a request's text and document with its parameters changed; each change is noted.

    `{"top_k": 3, "n": 1.0}`, strip `top_k`, default `n = 2`, set `seed = 7`
    ->  `{"n": 1.0,"seed":7}`;  noted are `strip top_k` and `set seed = 7`

    The `additions` are what `think` needs. They come before the defaults.
    """
    thinks = [("think", path, json.dumps(value)) for path, value in additions.items()]
    defaults = [("default", path, value) for path, value in parameters.defaults]
    paths = [path for _, path, _ in (*thinks, *defaults)]
    paths += [path for path, _ in parameters.sets]
    stripped = copy_around(document, [*parameters.strips, *paths])
    text = strip_members(text, stripped, parameters.strips, note_change)
    changed = copy_around(stripped, paths)
    touched = []
    for kind, path, value in (*thinks, *defaults):
        # Null says nothing of how much to think.
        if kind == "think" or member_at(changed, path) is ABSENT:
            put_value(changed, path, json.loads(value))
            touched.append(path)
            note_change(f"{kind} {tell_value(path, value)}")
    for path, value in parameters.sets:
        if not is_set(member_at(changed, path), value):
            put_value(changed, path, json.loads(value))
            touched.append(path)
            note_change(f"set {tell_value(path, value)}")
    edits = find_edits(text, stripped, changed, touched)
    return edit_json(text, edits) if edits else text, changed


# A member that the router adds, and what for: `("reasoning_effort", "off")`. Some servers refuse
# one, or one for some models alone, or one of its values.
AddedMember = tuple[str, str]
USAGE_MEMBER: AddedMember = ("stream_options", "")
# Errors about these do not always call the member by its name: `"m" does not support thinking`.
THINK_ERROR_WORDS = (b"thinking", b"reasoning")


def find_refused(added: Iterable[AddedMember], error: bytes) -> frozenset[AddedMember]:
    """Return which of the members that were added an error is about.

    `[("reasoning_effort", "off")]`, `b'{"error": "unknown field reasoning_effort"}'`  ->  that one
    """
    named = {member for member in added if member[0].encode() in error}
    thinks = {member for member in added if member != USAGE_MEMBER}
    if not named & thinks and any(word in error for word in THINK_ERROR_WORDS):
        named |= thinks
    return frozenset(named)


def ignore(noted: Any) -> None:
    """Do nothing with what is noted."""


class RequestChanges(NamedTuple):
    """What a request needs on its way to one server."""

    model: str
    no_think: bool = False
    include_usage: bool = False
    strip_attribution: bool = False
    flatten_namespaces: bool = False
    parameters: RequestParameters = NO_PARAMETERS
    # Is told in words what the parameters have changed.
    note_change: Callable[[str], None] = ignore
    # What the server has refused, and is told which members are added.
    refused: frozenset[AddedMember] = frozenset()
    note_added: Callable[[AddedMember], None] = ignore

    def additions(self, protocol: Protocol, document: Mapping[str, Any], think: str) -> Additions:
        """Return what tells the server how much to think: what it takes, and is not stripped."""
        if not think or protocol.add_think is None:
            return {}
        additions: Additions = {}
        for path, value in protocol.add_think(think, document).items():
            member = (str(path[0]), think)
            is_stripped = any(path[: len(strip)] == strip for strip in self.parameters.strips)
            # What is no object cannot be completed.
            fits = len(path) == 1 or isinstance(document.get(path[0]), dict | None)
            if fits and member not in self.refused and not is_stripped:
                additions[path] = value
                self.note_added(member)
        return additions

    def apply(
        self, protocol: Protocol, text: str, document: Mapping[str, Any], think: str
    ) -> tuple[str, Mapping[str, Any]]:
        """Return a request's text and document as the parameters make them."""
        parameters = self.parameters
        additions = self.additions(protocol, document, think)
        if not (additions or parameters.strips or parameters.defaults or parameters.sets):
            return text, document
        return change_parameters(text, document, parameters, additions, self.note_change)


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A request as its dialect reads it."""

    path: str
    query: str
    content: bytes
    text: str = ""  # of a JSON document
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    stream: bool = False
    model_span: tuple[int, int] = (0, 0)  # where a form's model stands in its content
    query_span: tuple[int, int] = (0, 0)  # where the model stands in the query

    def __post_init__(self) -> None:
        # The name is kept, shown and counted by in many places.
        if len(self.model) > LIMITS.model_name:
            seen = f"the model's name has {len(self.model)} characters"
            raise MalformedContent(f"{seen}; {LIMITS.model_name} are allowed")

    @property
    def protocol(self) -> Protocol:
        """What its document and its answer look like."""
        return find_protocol(self.path)

    @property
    def lacks_model(self) -> bool:
        """Whether it names no model where one is needed."""
        return not self.model and self.protocol.needs_model

    @property
    def takes_parameters(self) -> bool:
        """Whether the routing file may change its members: it is JSON that names a model."""
        return bool(self.text and self.model) and self.query_span == (0, 0)

    @property
    def openai_path(self) -> str:
        """The path of an OpenAI server that does the same."""
        protocol = self.protocol
        if protocol.raw_openai_path and is_raw(self.document):
            return protocol.raw_openai_path
        return protocol.openai_path

    @functools.cached_property
    def tool_names(self) -> ToolNames | None:
        """What its tools in namespaces are called for servers that know none; None without any."""
        # Both the type of such tools and the member of their calls are this word.
        if not self.protocol.has_namespaces or f'"{NAMESPACE}"' not in self.text:
            return None
        names = read_tool_names(self.document)
        has_empty = any(is_namespace(tool) for tool in list_of(self.document, "tools"))
        return names if names.tools or has_empty else None

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the usage event of a stream itself."""
        options = self.document.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def choices(self) -> int:
        """How many answers at once are asked for."""
        number = self.document.get("n")
        prompt = self.document.get("prompt")
        prompts = 1
        # A list of numbers is one prompt: its tokens.
        if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
            prompts = len(prompt)
        return prompts * (number if isinstance(number, int) else 1)


class Dialect(NamedTuple):
    """How one kind of endpoint's clients speak; each function is pure."""

    service: str
    events: EventFormat  # of its streamed answers
    other: Protocol  # of paths that have no row of their own
    # Reads what the client sent: path, query and content.
    read: Callable[[str, str, bytes], ParsedRequest]
    # Makes the content for a server: one that speaks the same, or one that speaks OpenAI.
    encode: Callable[[ParsedRequest, RequestChanges], bytes]
    encode_openai: Callable[[ParsedRequest, RequestChanges], bytes] | None = None
    # Makes of a whole OpenAI answer the client's: plan, document and content.
    answer: Callable[..., bytes] | None = None
    # Answers a request that asks for nothing, such as an empty prompt, without any server. The
    # second argument is the moment, as RFC 3339 writes it.
    empty: Callable[[ParsedRequest, str], dict[str, Any] | None] | None = None
    # How the dialect tells of models: the list, one in detail, those that run; and its version.
    # The second argument is the moment: s UTC for those that run, else as RFC 3339 writes it.
    encode_models: Callable[[list[dict[str, Any]], str], dict[str, Any]] | None = None
    encode_details: Callable[[str, str], dict[str, Any]] | None = None
    encode_running: Callable[[list[str], float], dict[str, Any]] | None = None
    version: str = ""
    # Makes an event that says nothing, where those of the Protocols table are no events of the
    # dialect's. The second argument is the moment, as RFC 3339 writes it.
    empty_event: Callable[[ParsedRequest, str], dict[str, Any]] | None = None
    # What a server that speaks it says at its root, if it says anything of its own.
    greeting: str = ""

    def encode_error(self, error: RouterError, path: str) -> bytes:
        """Return an error as the clients of a path read it."""
        return find_row(path, self.other).encode_error(error)

    def encode_event_error(self, error: RouterError, path: str) -> bytes:
        """Return an error as the last event of a running stream."""
        prefix = find_row(path, self.other).error_prefix
        return prefix + self.events.encode(self.encode_error(error, path))

    def encode_ping(self, parsed: ParsedRequest, created_at: str) -> bytes:
        """Return an event that says nothing, for a client that has heard nothing for long."""
        if self.empty_event is None:
            return parsed.protocol.ping
        return self.events.encode(encode_json(self.empty_event(parsed, created_at)))

    def encode_whole_event(self, content: bytes, status: int, path: str) -> bytes:
        """Return a whole answer, which has this status, as the only event of a stream.

        Raises BadGateway for a good one that is no object of JSON.
        """
        document = parse_object(content)
        prefix = b""
        if status >= 400:
            if document is None or "error" not in document:
                error = BadGateway(read_error(content) or f"the upstream answered {status}")
                # Some clients are told of it by its type.
                error.status = status
                return self.encode_event_error(error, path)
            prefix = find_row(path, self.other).error_prefix
        elif document is None:
            raise BadGateway(f"the upstream's answer is not a JSON object: {content[:80]!r}")
        # JSON has line ends between its tokens alone.
        return prefix + self.events.encode(b" ".join(content.splitlines()))


def read_stream_wish(protocol: Protocol, document: Mapping[str, Any]) -> bool:
    """Tell whether a request asks for a stream."""
    wish = document.get("stream")
    if protocol.streams == UNLESS_REFUSED:
        return wish is not False
    return protocol.streams == IF_ASKED and wish is True


def refuse_second_model(condition: bool, what: str) -> None:
    """Raise MalformedContent for a request with two members that name its model.

    Readers differ on which of the two counts: the rules would look at one, the server at the other.
    """
    require_content(not condition, f"there are two {what}; readers differ on which one counts")


NO_MODEL = 'no model was named; add `"model": "name"`'


def read_object(path: str, query: str, content: bytes) -> ParsedRequest:
    """Read a JSON object and its model. Raises MalformedContent.

    `/api/chat`, ``, `b'{"model": "m:latest"}'`  ->  a request for `m:latest` that wants a stream
    """
    text, document = parse_json(content)
    if not isinstance(document, dict):
        raise MalformedContent(f"a JSON {type(document).__name__} instead of an object")
    protocol = find_protocol(path)
    model = ""
    for name in protocol.model_members:
        if name in document:
            refuse_second_model(has_twice(text, name), f"`{name}` members")
        found = document.get(name)
        if found is not None and not isinstance(found, str):
            raise MalformedContent(f"`{name}` is {json.dumps(found)[:80]} instead of a string")
        model = model or found or ""
    stream = read_stream_wish(protocol, document)
    return ParsedRequest(path, query, content, text, document, model, stream)


def require_model(parsed: ParsedRequest) -> ParsedRequest:
    """Return a request. Raises MalformedContent when it lacks a model."""
    require_content(not parsed.lacks_model, NO_MODEL)
    return parsed


def append_text(path: Path, value: Any, suffix: str) -> dict[Path, str]:
    """Return the edit that appends to a text, or to the user's last one inside of a list.

    `("prompt",)`, `"Hi"`, `"!"`  ->  `{("prompt",): "Hi!"}`
    """
    if isinstance(value, str):
        return {path: value + suffix}
    if len(path) >= MAX_TEXT_PATH:
        return {}
    if isinstance(value, dict):
        # A message of the user has the text in `content`, a part of that in `text`. A message of
        # somebody else has no `text` and is passed over.
        member = "content" if value.get("role") == "user" else "text"
        return append_text((*path, member), value.get(member), suffix)
    if isinstance(value, list):
        for number in reversed(range(len(value))):
            edit = append_text((*path, number), value[number], suffix)
            if edit:
                return edit
    return {}


def no_think_edit(protocol: Protocol, document: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the edit that appends /no_think to the last user message or the prompt.

    A raw prompt is nobody's words: the model would go on with what was appended.
    """
    words = document.get(protocol.user_words) if protocol.user_words else None
    if protocol.user_words == "prompt":
        prompts = words if isinstance(words, list) else [words]
        texts = " ".join(prompt for prompt in prompts if isinstance(prompt, str))
        if is_raw(document) or (protocol.raw_prompts and SPECIAL_TOKEN.search(texts)):
            return {}
    return append_text((protocol.user_words,), words, " /no_think")


# The first line of Claude Code's system prompt begins so. It has another value in every request,
# and so no server finds what follows it in its cache of prompts.
ATTRIBUTION = "x-anthropic-billing-header:"
# That line in JSON, with its end. No escape but that of a line end stands for one.
ATTRIBUTION_LINE = re.compile(
    rf'(?<="){ATTRIBUTION}(?:[^"\\]|\\[^nu]|\\u(?!000a)[0-9a-f]{{4}})*(?:\\n|\\u000a)?',
    re.IGNORECASE,
)
SYSTEM_ROLES = ("system", "developer")


def find_attribution(protocol: Protocol, document: Mapping[str, Any]) -> Path:
    """Return where the text stands that begins with the line of ATTRIBUTION; () for nowhere.

    `{"system": [{"type": "text", "text": "x-anthropic-billing-header: a"}]}` of /v1/messages
    ->  `("system", 0, "text")`

    It stands in the first text of the system prompt. Translators copy it into the first message.
    """
    for member in (protocol.system_words, protocol.user_words):
        value = document.get(member)
        path: Path = (member,)
        # What is no message there is the user's.
        is_users = member == protocol.user_words
        if is_users and not (isinstance(value, list) and value and isinstance(value[0], dict)):
            continue
        while isinstance(value, list | dict) and value:
            key: str | int = 0
            if isinstance(value, dict):
                is_message = "content" in value
                if is_message and value.get("role") not in SYSTEM_ROLES:
                    break
                key = "content" if is_message else "text"
            value = value.get(key) if isinstance(value, dict) else value[0]
            path = (*path, key)
        if isinstance(value, str) and value.startswith(ATTRIBUTION):
            return path
    return ()


def remove_attribution(text: str, document: Any, path: Path) -> str:
    """Return a request without the line that `find_attribution` found, no other character changed.

    A block that is left empty goes, too, and so does a message that has no other.
    """
    # What the path leads through, and the text at its end.
    values = [document]
    for key in path:
        values.append(values[-1][key])
    _, _, rest = values[-1].partition("\n")
    if rest:
        *_, (start, end, _) = find_values(text, 0, [path])
        line = ATTRIBUTION_LINE.match(text, start + 1, end)
        if line is None:
            # It is spelled with escapes.
            return text[:start] + encode_json_exactly(rest).decode() + text[end:]
        return text[: line.start()] + text[line.end() :]
    # The places in arrays that the path goes through, the innermost first.
    places = [at for at in range(len(path)) if isinstance(path[at], int)]
    places.reverse()
    for at in places:
        if len(values[at]) > 1 or at == places[-1]:
            return remove_element(text, path[: at + 1])
    return edit_json(text, {path: ""})


USAGE_WISH = '"stream_options":{"include_usage":true}'


def encode_object(parsed: ParsedRequest, changes: RequestChanges) -> bytes:
    """Return the client's own bytes with what must change changed."""
    text = parsed.text
    document = parsed.document
    if changes.parameters != NO_PARAMETERS and parsed.takes_parameters:
        think = changes.parameters.think
        text, document = changes.apply(parsed.protocol, text, document, think)
    edits: dict[Path, Any] = {}
    # A client of Ollama's that wishes for thinking gets it.
    if changes.no_think and not parsed.document.get("think"):
        edits |= no_think_edit(parsed.protocol, document)
    # A request that names no model may have been given one.
    members = parsed.protocol.model_members
    named_by = next((name for name in members if document.get(name)), members[0])
    in_query = parsed.query_span != (0, 0)
    if parsed.model and not in_query and changes.model != document.get(named_by):
        edits[(named_by,)] = changes.model
    # Appending a member needs no search for its place: the usual request is changed by that alone.
    if changes.include_usage:
        changes.note_added(USAGE_MEMBER)
    adds_options = changes.include_usage and "stream_options" not in document
    if changes.include_usage and not adds_options:
        options = document["stream_options"]
        own_options = options if isinstance(options, dict) else {}
        edits[("stream_options",)] = {**own_options, "include_usage": True}
    attribution: Path = ()
    if changes.strip_attribution:
        attribution = find_attribution(parsed.protocol, document)
    tool_names = parsed.tool_names if changes.flatten_namespaces else None
    if text is parsed.text and not (edits or adds_options or attribution or tool_names):
        return parsed.content
    if edits:
        text = edit_json(text, edits)
    if tool_names:
        text = flatten_namespaces(text, document, tool_names)
    if attribution:
        text = remove_attribution(text, document, attribution)
    if adds_options:
        text = append_members(text, USAGE_WISH)
    return text.encode()


def encode_renamed(parsed: ParsedRequest, changes: RequestChanges) -> bytes:
    """Return the client's own bytes with the model's name changed, and nothing else."""
    return encode_object(parsed, RequestChanges(changes.model))


def encode_translated(
    protocol: Protocol, document: dict[str, Any], changes: RequestChanges, think: str = ""
) -> str:
    """Return a request as text that was translated into a protocol of OpenAI's."""
    text = encode_json_exactly(document).decode()
    return changes.apply(protocol, text, document, think)[0]


# --- requests that are no JSON --------------------------------------------------------

BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"]+)"|([^;\s"]+))', re.IGNORECASE)
MAX_PART_HEAD = 16 * KiB
DISPOSITION = re.compile(rb"\r\ncontent-disposition:([^\r\n]*)", re.IGNORECASE)
PARAMETER = re.compile(rb';[ \t]*([^=;"\s]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;\s"]*))')


def is_model_part(head: bytes) -> bool:
    r"""Tell whether the head of a form's part names it `model` (RFC 7578 section 4.2).

    `b'\r\nContent-Disposition: form-data; name="model"'`  ->  True
    """
    line = DISPOSITION.search(head)
    if line is None:
        return False
    for name, quoted, token in PARAMETER.findall(line[1]):
        if name.lower() == b"name" and b"model" in (quoted, token):
            return True
    return False


def read_form(media_type: str, path: str, query: str, content: bytes) -> ParsedRequest:
    """Read the `model` part of a multipart form (RFC 7578); without one it is "".

    Raises MalformedContent for a form with two of them, or without the boundary that its media
    type tells.
    """
    wrong_boundary = "the form has no boundary, or its Content-Type another one"
    boundary = BOUNDARY.search(media_type)
    require_content(boundary, wrong_boundary)
    mark = f"\r\n--{boundary[1] or boundary[2]}".encode()
    at = content.find(mark)
    if content.startswith(mark[2:]):
        # The first mark of a form may lack the line end before it, and so begin before the form.
        at = -len(b"\r\n")
    else:
        require_content(at >= 0, wrong_boundary)
    parsed = ParsedRequest(path, query, content)
    while True:
        end = content.find(mark, at + 2)
        if end < 0:
            return parsed
        head_start = at + len(mark)
        head_end = content.find(b"\r\n\r\n", head_start, min(at + MAX_PART_HEAD, end))
        if head_end >= 0 and is_model_part(content[head_start:head_end]):
            refuse_second_model(parsed.model_span != (0, 0), "`model` members")
            model = content[head_end + 4 : end].decode("utf-8", "replace")
            span = (head_end + 4, end)
            parsed = dataclasses.replace(parsed, model=model, model_span=span)
        at = end


def encode_form(parsed: ParsedRequest, changes: RequestChanges) -> bytes:
    """Return content that is no JSON with the model's name changed where it stands."""
    if not parsed.model or changes.model == parsed.model:
        return parsed.content
    start, end = parsed.model_span
    name = changes.model.encode("utf-8", "replace")
    return parsed.content[:start] + name + parsed.content[end:]


# --- requests whose model stands in their query ---------------------------------------

QUERY_PARAMETER = re.compile(r"[?&]([^&=]*)=([^&]+)")


def is_object(content: bytes) -> bool:
    """Tell whether content looks like a JSON object."""
    return content[:64].removeprefix(BOM).lstrip()[:1] == b"{"


def read_with_query(path: str, query: str, content: bytes) -> ParsedRequest:
    """Read a request whose content or query names its model, or neither.

    `/props`, `?model=org%2Fm`, `b""`  ->  a request for the model `org/m`

    Raises MalformedContent when both do.
    """
    parsed = ParsedRequest(path, query, content)
    if is_object(content):
        parsed = read_object(path, query, content)
    for parameter in QUERY_PARAMETER.finditer(query):
        name, value = map(urllib.parse.unquote_plus, parameter.groups())
        if name == "model":
            refuse_second_model(parsed.model != "", "names of a model, in content or query")
            parsed = dataclasses.replace(parsed, model=value, query_span=parameter.span(2))
    return parsed


def encode_query(parsed: ParsedRequest, model: str) -> str:
    """Return the query with the model's name changed where it stands: `?model=org%2Fm`."""
    start, end = parsed.query_span
    if end == 0 or model == parsed.model:
        return parsed.query
    return parsed.query[:start] + urllib.parse.quote(model, safe="") + parsed.query[end:]


# --- answers: what is known -----------------------------------------------------------


class Timing(NamedTuple):
    """How long an answer took, in ns: all of it, and until it began."""

    total: int
    first: int


class AnswerPlan(NamedTuple):
    """What is known of an answer when its head has come, and what is to be done."""

    parsed: ParsedRequest
    dialect: Dialect
    native: bool  # the server speaks the client's dialect
    rules: FilterRules
    hide_usage: bool  # the usage event was not the client's wish
    renamed: bool  # the server knows the model by another name
    now: Callable[[], float]  # s UTC
    timing: Callable[[], Timing]
    limits: Limits = LIMITS
    # The client has had the head of a stream, because it had to wait.
    begun: bool = False
    # Is told whether a text began inside of a block that the model's template opened.
    note_opened: Callable[[bool], None] = lambda opened: None
    # What the server calls the tools that stand in namespaces for the client; None for none.
    tool_names: ToolNames | None = None

    @property
    def protocol(self) -> Protocol:
        """What the answer looks like."""
        return self.parsed.protocol if self.native else find_protocol(self.parsed.openai_path)

    @property
    def restores_name(self) -> bool:
        """Whether the answer has to name the model that was asked for."""
        return self.renamed and self.parsed.protocol.names_model

    def model_edit(self, document: Mapping[str, Any]) -> dict[Path, Any]:
        """Return the edit that gives a native answer the name that its client knows."""
        requested = self.parsed.model
        if not self.restores_name or document.get("model") in (None, requested):
            return {}
        return {("model",): requested}


# Every tag has one of these in it as it stands in JSON, and code begins with one of those. They
# are looked for in every piece of an answer, and so they hardly occur elsewhere: there is a bracket
# in each event, but no `THINK]`.
TAG_MARKS = (b"<", b"THINK]", "\u25c1".encode())
CODE_MARKS = (b"`", b"~")
# Some servers write `<`, a backtick, `~` and what Kimi's tags begin with as escapes.
TAG_ESCAPES = (b"\\u003", b"\\u25")
ESCAPED_MARKS = (*TAG_ESCAPES, b"\\u006", b"\\u007")
POSSIBLE_TAG_MARKS = (*TAG_MARKS, *TAG_ESCAPES)
MARKS = (*TAG_MARKS, *CODE_MARKS)
# Each of the marks and the escapes has one of these octets in it, which hardly occur elsewhere, and
# by far the fastest search is that for one octet.
MARK_OCTETS = (b"<", b"`", b"~", b"\\", b"K", b"\xe2")


def may_hold_tag(data: bytes) -> bool:
    """Tell whether a text in JSON could hold a tag."""
    return any(mark in data for mark in POSSIBLE_TAG_MARKS)


def fold_edits(document: Any, path: Path, edits: dict[Path, Any]) -> Any:
    """Return the value at a path, with the edits inside of it done there instead."""
    for inner in [inner for inner in edits if inner[: len(path)] == path != inner]:
        holder = document
        for key in inner[:-1]:
            holder = holder[key]
        holder[inner[-1]] = edits.pop(inner)
    for key in path:
        document = document[key]
    return document


class Thought(NamedTuple):
    """What was thought in a text of an answer, and where that text stands."""

    path: Path
    text: str


def reasoning_item(protocol: Protocol, thought: str) -> dict[str, Any]:
    """Return the element of a list that says what was thought."""
    if protocol.thoughts == IN_CONTENT:
        return {"type": "thinking", "thinking": thought, "signature": ""}
    parts = [{"type": "reasoning_text", "text": thought}]
    return {"type": "reasoning", "id": "rs_thought", "summary": [], "content": parts}


def move_thoughts(
    protocol: Protocol, document: Any, thoughts: Sequence[Thought], edits: dict[Path, Any]
) -> None:
    """Add the edits that put what was thought where a protocol has it.

    `{"message": {"content": "hm"}}` of /api/chat, what was thought in `("message", "content")`
    ->  an edit at `("message", "thinking")`; in /v1/messages: a new list with one block more
    """
    in_list = protocol.thoughts in (IN_CONTENT, IN_OUTPUT)
    # From the last to the first, so that what is put into a list moves no place that comes later.
    for path, thought in reversed(thoughts):
        if in_list:
            # A summary such as `output_text` stands in no list.
            if protocol.thoughts in path:
                at = path.index(protocol.thoughts)
                items = fold_edits(document, path[: at + 1], edits)
                items.insert(path[at + 1], reasoning_item(protocol, thought))
                edits[path[: at + 1]] = items
            continue
        at = path.index("content") if "content" in path else -1
        member = (*path[:at], protocol.thoughts)
        edits[member] = thought + edits.get(member, "")


def name_reasoning(
    protocol: Protocol, document: Any, parts: Sequence[Part], edits: dict[Path, Any]
) -> None:
    """Add the edits that call a `reasoning` of OpenAI's servers `reasoning_content`."""
    for part in parts:
        *path, name = part.path or ("",)
        if part.kind != THINKING or name != "reasoning" or protocol.thoughts != BESIDE_TEXT:
            continue
        if any(other.path == (*path, BESIDE_TEXT) for other in parts):
            # It says both.
            continue
        holder = fold_edits(document, tuple(path), edits)
        names = {"reasoning": BESIDE_TEXT}
        edits[tuple(path)] = {
            names.get(key, key): holder[key] for key in holder if key != BESIDE_TEXT
        }


def separated_choices(parts: Iterable[Part]) -> set[int]:
    """Return the choices whose thinking the server itself has told apart from the text."""
    return {
        part.choice
        for part in parts
        if part.kind == THINKING and isinstance(part.value, str) and part.value.strip()
    }


def filter_parts(
    plan: AnswerPlan, document: dict[str, Any], parts: list[Part], edits: dict[Path, Any]
) -> None:
    """Add the edits that filter the texts of a whole answer."""
    separated = separated_choices(parts)
    thoughts = []
    for part in parts:
        if part.kind not in (TEXT, AGAIN) or not isinstance(part.value, str):
            continue
        rules = plan.rules
        if part.choice in separated:
            rules = rules._replace(think=False)
        text_filter = TextFilter(rules, whole=True)
        visible, thought = text_filter.feed(part.value, last=True)
        if text_filter.opened is not None:
            plan.note_opened(text_filter.opened)
        if visible != part.value:
            edits[part.path] = visible
        if thought:
            thoughts.append(Thought(part.path, thought))
    if plan.rules.move:
        move_thoughts(plan.protocol, document, thoughts, edits)
        name_reasoning(plan.protocol, document, parts, edits)


def filter_document(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a whole JSON answer filtered, its model named as the client knows it."""
    rules = plan.rules
    filtering = rules.fences or (rules.think and may_hold_tag(content))
    filtering = filtering or (rules.move and b'"reasoning"' in content)
    is_read = filtering or plan.restores_name or plan.tool_names
    document = parse_object(content) if is_read else None
    if document is None:
        return content
    edits = plan.model_edit(document)
    if plan.tool_names:
        edits |= restore_namespaces(plan.tool_names, document)
    if filtering:
        filter_parts(plan, document, read_answer(plan.protocol, document), edits)
    return edit_json(content.decode(), edits).encode() if edits else content


# --- answers: rewriters ---------------------------------------------------------------
# What section 14 sees of a rewriter:
#
#     feed           takes a piece of the answer, returns what may leave now
#     finish         returns the rest
#     size           about how long that rest is
#     buffers        nothing leaves before `finish`
#     takes_event    an event could stand behind what has left so far
#     over           the last event has come, so that nothing else is waited for
#     complete       the answer has said that it is at its end
#     trouble        what the answer said went wrong, or ""
#     lost_timings   llama.cpp's timings stood in the usage event, which the client must not see
#     tells_timings  they stand in one of the last events; also true where nobody can say


class BufferedRewrite:
    """Keeps an answer until all of it can be changed.

    One that is too long goes as it is, unless the client could not read it.
    """

    over = False
    trouble = ""
    lost_timings = False
    tells_timings = True

    @property
    def takes_event(self) -> bool:
        """Whether nothing has left yet."""
        return self.buffers

    def __init__(
        self,
        plan: AnswerPlan,
        change: Callable[[AnswerPlan, bytes], bytes],
        required: bool = False,
    ) -> None:
        self.plan = plan
        self.change = change
        self.required = required
        self.buffers = True
        self.complete = False
        self.content = bytearray()

    @property
    def size(self) -> int:
        """How much is kept back."""
        return len(self.content)

    def feed(self, data: bytes) -> bytes:
        """Keep a piece; return all of them once they are too many to be kept."""
        if not self.buffers:
            return data
        self.content += data
        longest = self.plan.limits.buffered_answer
        if len(self.content) <= longest:
            return b""
        if self.required:
            raise BadGateway(f"the answer is longer than {longest} bytes")
        self.buffers = False
        content = bytes(self.content)
        # It has left, and may be large.
        self.content.clear()
        return content

    def finish(self, closed: bool = False) -> bytes:
        """Return the changed answer.

        If nothing but the close of the connection has told where the answer ends (`closed`), it
        may have been cut: raises BadGateway when it is no whole JSON then.
        """
        self.complete = True
        if not self.buffers:
            return b""
        content = bytes(self.content)
        if closed:
            try:
                json.loads(content)
            except (ValueError, RecursionError):
                self.complete = False
                raise BadGateway("the connection was closed inside the answer") from None
        return self.change(self.plan, content)


class StreamRewrite:
    """Takes a stream apart into events, which `changes` gets, and looks after its end.

    `changes` is an `EventFilter` or an `OllamaTranslation`. Both have these members:

        protocol      what the events are like
        change_block  returns what becomes of some whole events
        close         returns what follows the last one, given the last blocks of the stream
        buffers       nothing leaves before `close`
        required      the client could not read the events as they are
        failed        the client has been told of an error
        lost_timings  as above
    """

    def __init__(self, plan: AnswerPlan, format: EventFormat, changes: Any) -> None:
        self.plan = plan
        self.protocol: Protocol = changes.protocol
        self.changes = changes
        self.reader = EventReader(format, plan.limits)
        self.buffers: bool = changes.buffers
        self.over = False
        # The last events, as soon as the answer is over: no others belong to it.
        self.final_events: list[bytes] = []
        # Only in a conversation: what else may be streamed by these rules, nobody knows.
        self.end_words = self.protocol.end_words if self.protocol.user_words else ()

    @property
    def size(self) -> int:
        """How much is kept back: at most one event."""
        return len(self.reader.pending)

    @property
    def takes_event(self) -> bool:
        """Whether what has left ends where an event does."""
        return not self.reader.long_tail

    @property
    def lost_timings(self) -> bool:
        """Whether llama.cpp's timings went with the usage event."""
        return bool(self.changes.lost_timings)

    @property
    def tells_timings(self) -> bool:
        """Whether llama.cpp's timings stand in one of the last events."""
        return any(b'"timings"' in event for event in self.last_events())

    @property
    def complete(self) -> bool:
        """Whether the answer has said that it is at its end."""
        return self.over or are_complete(self.protocol, self.reader.format, self.last_events())

    @property
    def trouble(self) -> str:
        """What the last events say went wrong; "" for nothing."""
        troubles = []
        for event in self.last_events():
            # As nearly always, the word is not there, and nothing has to be parsed.
            if b"error" in event:
                document = self.reader.format.read_document(event) or {}
                troubles.append(find_error(self.protocol, document))
        return "; ".join(filter(None, troubles))

    def feed(self, data: bytes) -> bytes:
        """Return what the events that are whole now become."""
        long, block = self.reader.feed(data)
        if long and self.changes.required:
            longest = self.plan.limits.buffered_event
            raise BadGateway(f"an event is longer than {longest} bytes")
        if not block:
            return long
        changed = self.changes.change_block(block)
        may_end = self.changes.failed
        for word in self.end_words:
            # `in` would take four times as long.
            may_end = may_end or block.rfind(word) >= 0
        if may_end:
            self.look_for_end()
        return long + changed if long else changed

    def look_for_end(self) -> None:
        """Note that the answer is over if its last event has come, or an error in its place."""
        events = self.reader.last_events()
        ends = self.changes.failed or any(
            is_last_event(self.protocol, self.reader.format, event) for event in reversed(events)
        )
        if ends:
            self.over = True
            self.final_events = events

    def last_events(self) -> list[bytes]:
        """Return the last events of the answer, comments left out."""
        return self.final_events if self.over else self.reader.last_events()

    def finish(self, closed: bool = False) -> bytes:
        """Return what the last event becomes, if it lacks its end, and what follows it.

        Raises BadGateway when the stream ends inside of an event. It also does so when the answer
        has not said that it is at its end, and either nothing but the close of the connection has
        told where it ends (`closed`), or it is translated: the translation writes an end of its
        own, which would make a cut answer look like a whole one.
        """
        # What has come behind the last event belongs to no answer.
        event = b"" if self.over else self.reader.finish()
        data = self.reader.format.read_data(event)
        if data.startswith(b"{") and parse_object(data) is None:
            raise BadGateway("the stream ended inside an event")
        needs_end = closed or (self.changes.required and not self.changes.failed)
        if needs_end and self.protocol.user_words and not self.complete:
            raise BadGateway("the stream ended before the answer was complete")
        changed = self.changes.change_block(event) if event else b""
        return changed + self.changes.close(b"".join(self.reader.last_blocks))


# --- answers: events that stay in their protocol --------------------------------------

# As servers write it; with other spaces it stays, and hurts nobody.
NULL_USAGE = re.compile(rb',[ ]?"usage":[ ]?null')


def find_all(block: bytes, word: bytes) -> list[int]:
    """Return the places of a word in a block, the last one first: `b"a-a"`, `b"a"` -> `[2, 0]`."""
    places: list[int] = []
    # Looking for one octet is by far the fastest, and one of them is nearly always missing.
    if word in RARE_WORDS:
        for octet in word:
            if block.rfind(octet) < 0:
                return places
    # Looking for a word from the end takes a third of the time that `find` takes.
    at = block.rfind(word)
    while at >= 0:
        places.append(at)
        at = block.rfind(word, 0, at)
    return places


LETTER_U = ord("u")
RARE_WORDS = frozenset(mark for mark in TAG_MARKS if len(mark) > 1)


def find_escapes(block: bytes) -> list[int]:
    """Return the places of ESCAPED_MARKS in a block, the last one first."""
    places = []
    # Most backslashes are those of `\n`. Looking for an escape as a word takes longer than going
    # over all of them.
    at = block.rfind(b"\\", 0, len(block) - 1)
    while at >= 0:
        if block[at + 1] == LETTER_U and block.startswith(ESCAPED_MARKS, at):
            places.append(at)
        at = block.rfind(b"\\", 0, at)
    return places


def tail_document(
    document: dict[str, Any], part: Part, text: str, member: str = ""
) -> dict[str, Any]:
    """Turn an event into one that says nothing but `text`, where one of its texts stands.

    `{"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a <"}}]}`, ..., `<`
    ->  `{"choices": [{"index": 0, "delta": {"content": "<"}, "finish_reason": None}]}`

    With a `member` it says it there, beside an empty text.
    """
    document.pop("usage", None)
    if part.path[0] == "choices":
        choice = document["choices"][part.path[1]]
        if "delta" in choice:
            says: dict[str, Any] = {"delta": {member or "content": text}}
        else:
            says = {"text": "", member or "text": text}
        document["choices"] = [{**choice, "finish_reason": None, **says}]
        return document
    holder: Any = document
    for key in part.path[:-1]:
        holder = holder[key]
    holder[part.path[-1]] = ""
    holder[member or part.path[-1]] = text
    return document


class ThinkingBlocks:
    """Puts blocks of thinking between the content blocks of a stream of /v1/messages.

    A block of text that begins with thinking becomes two: the event that starts it waits until
    something of it is visible, and a block of thinking comes first. All blocks behind that are
    numbered anew. In all of this one block is open at a time.
    """

    def __init__(self, format: EventFormat) -> None:
        self.format = format
        # How many blocks there are more than the server has.
        self.added = 0
        # The number of the block of text at the server, and the event that starts it.
        self.index = 0
        self.start: dict[str, Any] | None = None
        # What the open block has; "" while the start of a text waits.
        self.open = ""

    def encode(self, document: Mapping[str, Any]) -> bytes:
        """Return an event about the open block."""
        data = encode_json({**document, "index": self.index + self.added})
        return b"event: " + str(document["type"]).encode() + b"\n" + self.format.encode(data)

    def note_start(self, document: dict[str, Any]) -> bool:
        """Let the event wait that starts a block of text; tell whether this is one."""
        block = document.get("content_block")
        is_text = isinstance(block, dict) and block.get("type") == "text"
        if not is_text or not isinstance(document.get("index"), int):
            return False
        self.index = document["index"]
        self.start = {**document, "content_block": {**block, "text": ""}}
        self.open = ""
        return True

    def switch(self, kind: str) -> bytes:
        """Return the events that open a block of some kind, unless it is open already."""
        if self.start is None or self.open == kind:
            return b""
        ended = b""
        if self.open:
            ended = self.encode({"type": "content_block_stop"})
            self.added += 1
        self.open = kind
        if kind == "text":
            return ended + self.encode(self.start)
        block = {"type": "thinking", "thinking": "", "signature": ""}
        return ended + self.encode({"type": "content_block_start", "content_block": block})

    def think(self, thought: str) -> bytes:
        """Return the events that say what was thought."""
        delta = {"type": "thinking_delta", "thinking": thought}
        opening = self.switch("thinking")
        return opening + self.encode({"type": "content_block_delta", "delta": delta})

    def say(self, text: str) -> bytes:
        """Return the events that say what the start of a block of text said."""
        delta = {"type": "text_delta", "text": text}
        return self.switch("text") + self.encode({"type": "content_block_delta", "delta": delta})

    def prepare(self, document: Mapping[str, Any], visible: str) -> bytes:
        """Return the events that have to come before one of the server's."""
        kind = document.get("type")
        if kind == "content_block_delta" and visible:
            return self.switch("text")
        if kind == "content_block_stop" and self.start is not None:
            # A block of text that says nothing is left as it is, unless it was all thinking.
            before = b"" if self.open else self.switch("text")
            self.start = None
            return before
        return b""


class EventFilter:
    """Changes events that stay in their protocol: texts, usage, the model's name.

    Most events need no change, and to parse one costs more than all else. So while
    `skips_plain_events` holds, only the events with one of MARKS, such as a tag's `<`, or of the
    `watched_words` are parsed, and the bytes between them leave as they came. It holds as soon as
    every text of the answer has begun outside of its thinking and no filter keeps anything back:
    then only a tag can change something, or a backtick, because a tag in code does not count. It
    does not hold at first, and never when texts may begin unseen (`n` choices), when fences are
    looked for or when each event names a model.
    """

    buffers = False
    required = False
    failed = False
    # Of the events that were skipped, so many octets of so many blocks are kept: what stands before
    # a fence in its line is in the last of them.
    LAST_SKIPPED = 2 * KiB
    LAST_BLOCKS = 8

    def __init__(self, plan: AnswerPlan, format: EventFormat) -> None:
        self.plan = plan
        self.protocol = plan.protocol
        self.format = format
        self.filtering = plan.rules.any
        self.has_one_choice = plan.parsed.choices == 1
        self.renames_reasoning = plan.rules.move and plan.protocol.thoughts == BESIDE_TEXT
        self.moves_beside_text = plan.protocol.thoughts in (BESIDE_TEXT, BESIDE_OLLAMA_TEXT)
        self.watched_words = self.find_watched_words()
        self.skips_plain_events = not (self.filtering or plan.restores_name)
        # By choice and item: the filters of the texts, and the texts whose filter has to see every
        # event, because what it does depends on more than a tag.
        self.filters: dict[tuple[int, Any], TextFilter] = {}
        self.needs_all_events: set[tuple[int, Any]] = set()
        # By choice, then item: the last text whose filter keeps something back, and its event.
        self.pending: dict[int, dict[Any, tuple[Part, bytes]]] = {}
        # The choices whose thinking the server itself tells apart from the text.
        self.separated: set[int] = set()
        # Whether the only text of the answer has begun without a tag, and needs no filter yet.
        self.begun_plainly = False
        # The last events that were skipped.
        self.skipped: collections.deque[bytes] = collections.deque(maxlen=self.LAST_BLOCKS)
        moves_blocks = plan.rules.move and plan.protocol.thoughts == IN_CONTENT
        self.blocks = ThinkingBlocks(format) if moves_blocks else None
        self.lost_timings = False

    def find_watched_words(self) -> tuple[bytes, ...]:
        """Return the words, beside the marks, without one of which an event need not be parsed."""
        words: tuple[bytes, ...] = ()
        if self.renames_reasoning:
            words += (b'"reasoning"',)
        self.text_words = (*words, *MARKS, *ESCAPED_MARKS)
        if self.plan.hide_usage:
            words += (b'"usage"',)
        if self.plan.tool_names:
            words += CALL_WORDS
        return words

    def change_block(self, block: bytes) -> bytes:
        """Return some whole events changed; only those that could need it are parsed."""
        places = self.find_places(block)
        if self.skips_plain_events and not places:
            self.skipped.append(block[-self.LAST_SKIPPED :])
            return block
        places.sort()
        next_place = 0
        has_cr = b"\r" in block
        pieces = []
        kept_to = 0
        at = 0
        while at < len(block):
            if self.skips_plain_events:
                # Go on to the event with the next word; what is before it stays as it is.
                while next_place < len(places) and places[next_place] < at:
                    next_place += 1
                start = at
                at = len(block)
                if next_place < len(places):
                    at = self.format.find_last_end(block, start, places[next_place])
                if at > start:
                    self.skipped.append(block[max(start, at - self.LAST_SKIPPED) : at])
                if at == len(block):
                    break
            end = self.format.find_end(block, at, has_cr)
            event = block[at:end]
            changed = self.change_event(event)
            if changed is not event:
                pieces += [block[kept_to:at], changed]
                kept_to = end
            self.skips_plain_events = self.may_skip_plain_events()
            at = end
        return b"".join([*pieces, block[kept_to:]]) if pieces else block

    def find_places(self, block: bytes) -> list[int]:
        """Return where in a block the watched words stand."""
        places = []
        if self.plan.rules.think:
            for octet in MARK_OCTETS:
                if block.rfind(octet) >= 0:
                    places = find_escapes(block)
                    for word in MARKS:
                        places += find_all(block, word)
                    break
        for word in self.watched_words:
            places += find_all(block, word)
        return places

    def may_skip_plain_events(self) -> bool:
        """Tell whether the next event can leave unseen if it has none of the watched words."""
        if self.plan.restores_name or (self.blocks and self.blocks.added):
            return False
        if not self.filtering or (self.filters and self.has_one_choice):
            return not self.needs_all_events
        return self.begun_plainly

    def change_event(self, event: bytes) -> bytes:
        """Return one event changed; b"" when nothing is left of it."""
        data = self.format.read_data(event)
        if data == DONE_MARK:
            return self.close() + event
        if self.plan.hide_usage and NULL_USAGE.search(data):
            # A server that was asked for usage says `"usage": null` in every other event.
            data = NULL_USAGE.sub(b"", data)
            event = self.format.replace(event, data)
        looks_at_usage = self.plan.hide_usage and b'"usage"' in data
        looks_at_text = self.filtering and self.may_change_text(event, data)
        if looks_at_text and not looks_at_usage and self.follow(data):
            return event
        names = self.plan.tool_names
        looks_at_calls = names is not None and any(word in data for word in CALL_WORDS)
        if not (looks_at_usage or looks_at_text or looks_at_calls or self.plan.restores_name):
            return event
        document = parse_object(data)
        if document is None:
            return event
        if looks_at_usage and document.pop("usage", None):
            if not document.get("choices"):
                self.lost_timings = "timings" in document
                return b""
            # llama.cpp says it in every event of /v1/completions.
            data = remove_member(data.decode(), "usage").encode()
            event = self.format.replace(event, data)
        edits = self.plan.model_edit(document)
        if looks_at_calls:
            edits |= restore_namespaces(names, document)
        if looks_at_text:
            return self.filter_event(event, data, document, edits)
        return self.edit_event(event, data, edits)

    def may_change_text(self, event: bytes, data: bytes) -> bool:
        """Tell whether a text in an event may have to be changed."""
        if may_hold_tag(event):
            return True
        if self.skips_plain_events:
            # It may have been found for its usage alone.
            return any(word in event for word in self.text_words)
        begun = self.note_plain_beginning(data)
        if begun:
            self.skipped.append(event)
        return not begun

    def read_text_alone(self, data: bytes) -> str | None:
        """Return the text of an event that says no more, None when it may say something else."""
        pattern = self.protocol.text_alone
        found = pattern.search(data) if pattern and self.has_one_choice else None
        if found is None or FINISHED.search(data):
            return None
        text = parse_value(found[1])
        return text if isinstance(text, str) else None

    def follow(self, data: bytes) -> bool:
        """Tell whether an event leaves as it came because it has code and nothing to take out.

        The filter goes on behind its text, for which the event need not be parsed.
        """
        text = None if self.plan.restores_name else self.read_text_alone(data)
        if text is None or MARK_OF_TAG.search(text):
            return False
        self.read_skipped()
        if len(self.filters) != 1:
            return False
        ((text_key, text_filter),) = self.filters.items()
        if not text_filter.shows_all_but_tags:
            return False
        text_filter.feed(text)
        self.note_need(text_key, text_filter.passes_plain_text)
        return True

    def note_need(self, text_key: tuple[int, Any], passes_plain_text: bool) -> None:
        """Note whether the filter of a text has to see every event."""
        if passes_plain_text:
            self.needs_all_events.discard(text_key)
        else:
            self.needs_all_events.add(text_key)

    def edit_event(self, event: bytes, data: bytes, edits: Mapping[Path, Any]) -> bytes:
        """Return an event with some values of its document replaced."""
        if not edits:
            return event
        return self.format.replace(event, edit_json(data.decode(), edits).encode())

    def note_plain_beginning(self, data: bytes) -> bool:
        """Tell whether the answer's only text begins in this event or did before, without a tag.

        That is noted, so that the next events need not be parsed.
        """
        plain_text = self.protocol.plain_text
        rules = self.plan.rules
        is_special = self.plan.restores_name or rules.fences or rules.move or rules.opened
        if self.filters or is_special or plain_text is None:
            return False
        if not self.begun_plainly and self.has_one_choice:
            self.begun_plainly = plain_text.search(data) is not None
        return self.begun_plainly

    def read_skipped(self) -> None:
        """Tell the filter of the last text what stands in its line in events that were skipped."""
        events = self.format.split(b"".join(self.skipped))
        self.skipped.clear()
        line = ""
        text_key = None
        for event in reversed(events):
            for part in reversed(self.read_texts(event)):
                if text_key in (None, (part.choice, part.item)):
                    text_key = (part.choice, part.item)
                    line = part.value + line
            if line.strip(INDENT):
                break
        if self.begun_plainly and text_key and text_key not in self.filters:
            self.filters[text_key] = TextFilter(self.plan.rules, begun=True)
        if text_key in self.filters:
            self.filters[text_key].skip(line)

    def read_texts(self, event: bytes) -> list[Part]:
        """Return the texts that an event says more of."""
        text = self.read_text_alone(self.format.read_data(event))
        if text is not None and len(self.filters) == 1:
            ((choice, item),) = self.filters
            return [Part(TEXT, choice, item, (), text)]
        parts = read_answer(self.protocol, self.format.read_document(event) or {})
        return [part for part in parts if part.kind == TEXT and isinstance(part.value, str)]

    def filter_event(
        self, event: bytes, data: bytes, document: dict[str, Any], edits: dict[Path, Any]
    ) -> bytes:
        """Return an event with its texts filtered, after what older events still have to say."""
        self.read_skipped()
        parts = read_answer(self.protocol, document)
        texts = [part for part in parts if part.kind == TEXT and isinstance(part.value, str)]
        endings = [part for part in parts if part.kind in (FINISH, END, TEXT_END)]
        # A set that keeps its order: what the filters kept back leaves in the order of the texts.
        ended = dict.fromkeys((part.choice, part.item) for part in endings)
        before = self.note_separated(parts)
        starts_text = self.blocks is not None and self.blocks.note_start(document)
        visible = ""
        thoughts = []
        for part in parts:
            if part.kind not in (TEXT, AGAIN) or not isinstance(part.value, str):
                continue
            last = (part.choice, part.item) in ended or (part.choice, None) in ended
            if part.kind == TEXT:
                shown, thought = self.feed_text(part, event, last)
                visible += shown
            else:
                # A filter shows the same of a whole text as of its pieces, so that what is said
                # again is what has been said. To look for a block that the model's template
                # has opened, as in a whole text, would take away what has been shown.
                shown, thought = TextFilter(self.rules_of(part.choice)).feed(part.value, last=True)
            if shown != part.value:
                edits[part.path] = shown
            if thought and self.plan.rules.move:
                thoughts.append((part, Thought(part.path, thought)))
        # Texts that end without being in this event.
        before += b"".join([self.release(choice, item) for choice, item in ended])
        before += self.move_thoughts(document, thoughts, edits)
        if self.renames_reasoning:
            name_reasoning(self.protocol, document, parts, edits)
        # An event that said nothing but texts of which nothing is left is left out. One whose texts
        # were empty when it came, such as the first of OpenAI's, is not.
        says_more = len(parts) > len(texts) or (thoughts and self.moves_beside_text)
        has_changed_text = any(part.path in edits for part in texts)
        if has_changed_text and not says_more and not visible:
            return before
        if self.blocks:
            if starts_text or (texts and not visible):
                return before + (self.blocks.say(visible) if visible else b"")
            before += self.blocks.prepare(document, visible)
            if self.blocks.added and isinstance(document.get("index"), int):
                edits[("index",)] = document["index"] + self.blocks.added
        return before + self.edit_event(event, data, edits)

    def move_thoughts(
        self, document: dict[str, Any], found: list[tuple[Part, Thought]], edits: dict[Path, Any]
    ) -> bytes:
        """Put what was thought into an event, or return events that say it before that one."""
        in_event = []
        events = b""
        for part, thought in found:
            if part.kind == AGAIN or self.moves_beside_text:
                in_event.append(thought)
            else:
                events += self.encode_thought(document, thought.text)
        move_thoughts(self.protocol, document, in_event, edits)
        for thought in in_event:
            # Clients take a text, even an empty one, for the end of the thinking.
            if thought.path[-2:] == ("delta", "content") and not edits.get(thought.path):
                edits[thought.path] = None
        return events

    def encode_thought(self, document: Mapping[str, Any], thought: str) -> bytes:
        """Return the events that say what was thought in a text that `document` goes on with."""
        if self.blocks:
            return self.blocks.think(thought)
        kind = "response.reasoning_text.delta"
        places = ("item_id", "output_index", "content_index")
        told = {name: document[name] for name in places if name in document}
        data = encode_json({"type": kind, **told, "delta": thought})
        return b"event: " + kind.encode() + b"\n" + self.format.encode(data)

    def rules_of(self, choice: int) -> FilterRules:
        """Return which filters the texts of a choice need."""
        rules = self.plan.rules
        return rules._replace(think=False) if choice in self.separated else rules

    def note_separated(self, parts: list[Part]) -> bytes:
        """Note whose thinking the server itself tells apart; return what its filters kept back."""
        choices = separated_choices(parts) - self.separated
        if not choices or not self.plan.rules.think:
            return b""
        released = b"".join([self.release(choice, None) for choice in choices])
        self.separated |= choices
        for text_key in self.filters:
            if text_key[0] in choices:
                self.filters[text_key] = TextFilter(self.rules_of(text_key[0]))
                self.needs_all_events.discard(text_key)
        is_renumbering = self.blocks and (self.blocks.added or self.blocks.start)
        if self.has_one_choice and not self.plan.rules.fences and not is_renumbering:
            # Nothing in the texts is looked for any more.
            self.filtering = self.renames_reasoning
            self.plan = self.plan._replace(rules=self.plan.rules._replace(think=False))
            self.watched_words = self.find_watched_words()
            self.begun_plainly = True
            self.blocks = None
        return released

    def feed_text(self, part: Part, event: bytes, last: bool) -> tuple[str, str]:
        """Return what a text adds to the visible and to the thought one.

        What its filter keeps back is remembered.
        """
        text_key = (part.choice, part.item)
        if text_key not in self.filters:
            if not part.value:
                # An empty text begins nothing.
                return "", ""
            most = self.plan.limits.texts_per_stream
            if len(self.filters) >= most:
                raise BadGateway(f"the answer has more than {most} texts")
            rules = self.rules_of(part.choice)
            self.filters[text_key] = TextFilter(rules, begun=self.begun_plainly)
        text_filter = self.filters[text_key]
        visible, thought = text_filter.feed(part.value, last)
        self.note_need(text_key, last or text_filter.passes_plain_text)
        if text_filter.keeps_back:
            self.pending.setdefault(part.choice, {})[part.item] = (part, event)
        elif part.choice in self.pending:
            self.pending[part.choice].pop(part.item, None)
            if not self.pending[part.choice]:
                del self.pending[part.choice]
        return visible, thought

    def release(self, choice: int, item: Any) -> bytes:
        """Return what the filter of a text keeps back, as events of its own.

        The item None means all texts of the choice.
        """
        pending = self.pending.get(choice, {})
        items = [item] if item in pending else []
        if item is None:
            items = list(pending)
        events = []
        for pending_item in items:
            part, event = pending[pending_item]
            visible, thought = self.feed_text(part._replace(value=""), event, last=True)
            if thought and self.plan.rules.move:
                events.append(self.encode_tail(event, part, thought, self.protocol.thoughts))
            if visible:
                events.append(self.encode_tail(event, part, visible))
        return b"".join(events)

    def encode_tail(self, event: bytes, part: Part, text: str, member: str = "") -> bytes:
        """Return an event that says nothing but `text`, like the one that `part` is of."""
        document = json.loads(self.format.read_data(event))
        if member in (IN_CONTENT, IN_OUTPUT):
            return self.encode_thought(document, text)
        tail = tail_document(document, part, text, member)
        opening = b""
        if self.blocks:
            opening = self.blocks.switch("text")
            tail["index"] += self.blocks.added
        return opening + self.format.replace(event, encode_json(tail))

    def close(self, ending: bytes = b"") -> bytes:
        """Return what all filters keep back, as events of their own; `ending` is not needed."""
        released = b"".join([self.release(choice, None) for choice in list(self.pending)])
        for text_filter in self.filters.values():
            if text_filter.opened is not None:
                self.plan.note_opened(text_filter.opened)
        return released


# --- Ollama: requests -----------------------------------------------------------------

# The options that Ollama and OpenAI's servers call the same.
SAME_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
)


def openai_message(message: Message, index: int) -> dict[str, Any]:
    """Return a message as OpenAI's; calls without an id get one."""
    content: Any = "".join(message.texts)
    if message.images:
        text_parts = [{"type": "text", "text": content}] if content else []
        image_parts = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
        content = text_parts + image_parts
    document = {"role": message.role, "content": content}
    calls = []
    for number, call in enumerate(message.calls):
        named = isinstance(call.name, str) and call.name
        require_content(named, f"messages[{index}] has a tool call without a function's name")
        function = {"name": call.name, "arguments": "".join(call.arguments) or "{}"}
        call_id = call.id or f"call_{index}_{number}"
        require_content(
            isinstance(call_id, str), f"messages[{index}] has a tool call whose id is no string"
        )
        # Results are matched to calls by it.
        usable = isinstance(call_id, str | int)
        require_content(usable, f"messages[{index}] has a tool call whose id is no string")
        calls.append({"id": call_id, "type": "function", "function": function})
    if calls:
        document["tool_calls"] = calls
    thinking = "".join(message.thoughts)
    if thinking:
        document["reasoning_content"] = thinking
    return document


class UnansweredCalls:
    """The calls of a conversation that have no result yet.

    Ollama's results name the tool, or nothing; OpenAI's name the id of the call. A result takes
    the oldest call of its tool, or of any. Each call waits in two queues, and one that has been
    taken from either is passed over in the other.
    """

    def __init__(self) -> None:
        self.queues: dict[str | None, collections.deque[str]] = {}
        self.taken: set[str] = set()

    def add(self, call_id: str, name: str) -> None:
        """Note a call."""
        for queue_name in (name, None):
            self.queues.setdefault(queue_name, collections.deque()).append(call_id)

    def note_answer(self, call_id: str) -> None:
        """Note that a call has its result, which named it by its id."""
        self.taken.add(call_id)

    def take(self, name: str | None) -> str | None:
        """Return the id of the oldest call of a tool, or of any for None; None without one."""
        queue = self.queues.get(name, ())
        while queue:
            call_id = queue.popleft()
            if call_id not in self.taken:
                self.taken.add(call_id)
                return call_id
        return None


def openai_messages(messages: Iterable[Message]) -> Iterator[dict[str, Any]]:
    """Yield messages as OpenAI's; a tool's result gets its call's id."""
    unanswered = UnansweredCalls()
    for index, message in enumerate(messages):
        document = openai_message(message, index)
        for call in document.get("tool_calls", ()):
            unanswered.add(call["id"], call["function"]["name"])
        if message.role == "tool":
            name = message.name
            require_content(
                isinstance(name, str | None), f"messages[{index}]: its tool's name is no string"
            )
            call_id = message.call_id
            require_content(
                isinstance(call_id, str | None), f"messages[{index}]: its call's id is no string"
            )
            if call_id:
                unanswered.note_answer(call_id)
            else:
                call_id = unanswered.take(name) or f"call_{index}"
            document["tool_call_id"] = call_id
        yield document


def openai_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ollama's options, format and tools in OpenAI's names.

    `{"options": {"top_k": 3, "num_predict": 9}, "format": "json"}`  ->
    `{"top_k": 3, "max_tokens": 9, "response_format": {"type": "json_object"}}`
    """
    options = document.get("options") or {}
    require_content(isinstance(options, dict), "`options` is not an object")
    translated = {name: options[name] for name in SAME_OPTIONS if options.get(name) is not None}
    # Ollama's -1 and -2 mean as many as there is room for, which is OpenAI's default.
    limit = options.get("num_predict")
    if isinstance(limit, int | float) and limit is not True and limit >= 1:
        require_content(
            limit < math.inf, "`num_predict` is beyond 1.8e308 instead of a number of tokens"
        )
        translated["max_tokens"] = int(limit)
    format = document.get("format")
    if format == "json":
        translated["response_format"] = {"type": "json_object"}
    elif isinstance(format, dict):
        schema = {"name": "response", "strict": True, "schema": format}
        translated["response_format"] = {"type": "json_schema", "json_schema": schema}
    else:
        require_content(
            not format, f'`format` is {repr(format)[:80]} instead of "json" or a schema'
        )
    for name in ("tools", "suffix"):
        if document.get(name):
            translated[name] = document[name]
    return translated


def read_think(document: Mapping[str, Any]) -> str:
    """Return how much a client of Ollama's wishes to be thought, "" when it says nothing.

    `{"think": false}`  ->  `off`;  `{"think": "max"}`  ->  `high`;  raises MalformedContent
    """
    wish = document.get("think")
    if wish is None:
        return ""
    if isinstance(wish, bool):
        return THINK_ON if wish else THINK_OFF
    levels = {"low": "low", "medium": "medium", "high": "high", "max": "high"}
    level = levels.get(wish) if isinstance(wish, str) else None
    require_content(
        level, f"`think` is {json.dumps(wish)[:80]} instead of true, false, {', '.join(levels)}"
    )
    return level or ""


def encode_ollama_chat(parsed: ParsedRequest, changes: RequestChanges) -> bytes:
    """Return an Ollama chat or generate request as OpenAI's chat or completion."""
    document = parsed.document
    openai = find_protocol(parsed.openai_path)
    translated: dict[str, Any] = {"model": changes.model}
    if openai.user_words == "prompt":
        translated["prompt"] = document.get("prompt") or ""
    else:
        messages = read_messages(parsed.protocol, document)
        translated["messages"] = list(openai_messages(messages))
    translated["stream"] = parsed.stream
    translated |= openai_options(document)
    if changes.include_usage:
        translated["stream_options"] = {"include_usage": True}
        changes.note_added(USAGE_MEMBER)
    think = read_think(document) or changes.parameters.think
    text = encode_translated(openai, translated, changes, think)
    if changes.no_think and think == THINK_OFF and not openai.raw_prompts:
        text = edit_json(text, no_think_edit(openai, translated))
    return text.encode()


def encode_ollama_embed(parsed: ParsedRequest, changes: RequestChanges) -> bytes:
    """Return an Ollama embedding request as OpenAI's."""
    text = parsed.document.get("input")
    if text is None:
        text = parsed.document.get("prompt") or ""
    translated = {"model": changes.model, "input": text, "encoding_format": "float"}
    if parsed.document.get("dimensions"):
        translated["dimensions"] = parsed.document["dimensions"]
    return encode_translated(find_protocol(parsed.openai_path), translated, changes).encode()


# --- Ollama: answers ------------------------------------------------------------------


def rfc3339(seconds: float) -> str:
    """Return a moment in UTC as RFC 3339 writes it: 0.5  ->  `1970-01-01T00:00:00.500Z`."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def ollama_document(
    model: Any, text_path: Path, created_at: str, says: Mapping[str, Any], end: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an answer; what it says stands beside the text, where its clients look for that.

    With the text at `("message", "content")`: `{"content": "Hi"}`, `{"done": False}`  ->
    `{"model": ..., "message": {"role": "assistant", "content": "Hi"}, "done": False}`
    """
    if len(text_path) == 1:
        return {"model": model, "created_at": created_at, **says, **end}
    message = {"role": "assistant", **says}
    return {"model": model, "created_at": created_at, text_path[0]: message, **end}


def ollama_empty_line(parsed: ParsedRequest, created_at: str) -> dict[str, Any]:
    """Return a line of a stream in which the model says nothing."""
    text_path = parsed.protocol.text_path
    return ollama_document(
        parsed.model, text_path, created_at, {text_path[-1]: ""}, {"done": False}
    )


def ollama_end(reason: Any, usage: Usage, timing: Timing) -> dict[str, Any]:
    """Return what ends an answer: why, the counts, and durations in ns."""
    total = max(timing.total, 1)
    first = min(timing.first, total)
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": usage.prompt or 0,
        "prompt_eval_duration": first,
        "eval_count": usage.completion or 0,
        # A whole answer comes at once, so that nothing is left after its beginning.
        "eval_duration": (total - first) or total,
    }


def estimate_prompt(parsed: ParsedRequest) -> int:
    """Return about how many tokens a request has: its conversation, or the texts to embed."""
    if parsed.protocol.user_words:
        messages = read_messages(parsed.protocol, parsed.document, tolerant=True)
        return estimate_tokens(message.as_document() for message in messages)
    texts = parsed.document.get("input")
    if not isinstance(texts, list):
        texts = [texts]
    return tokens_of(sum(len(text) for text in texts if isinstance(text, str)))


def ollama_call(call: ToolCall) -> dict[str, Any]:
    """Return a gathered tool call, whose arguments are an object."""
    text = "".join(call.arguments) or "{}"
    arguments = parse_object(text)
    if arguments is None:
        # A model may write broken JSON. Ollama's clients expect an object all the same.
        arguments = {"_raw": text}
    return {"function": {"name": call.name or "", "arguments": arguments}}


class OllamaTranslation:
    """Turns what an OpenAI server says, in events or whole, into Ollama's lines or one document.

    `translate` gets one document after another. What it says becomes a line at once, or waits for
    the end when the client wants one document. Tool calls wait until they are whole.
    """

    required = True
    lost_timings = False

    def __init__(self, plan: AnswerPlan) -> None:
        self.plan = plan
        self.protocol = plan.protocol
        self.buffers = not plan.parsed.stream
        self.failed = False
        # A client that wishes for thinking gets it apart from the text, also if the server says
        # it in the text, between tags. One that refuses it gets none. One that says nothing gets
        # what the server itself tells apart, or all of it if thinking is to be moved.
        wish = plan.parsed.document.get("think")
        self.shows_thinking = wish is not False
        self.shows_tagged_thinking = bool(wish) or (plan.rules.move and self.shows_thinking)
        think = plan.rules.think or self.shows_tagged_thinking
        self.rules = plan.rules._replace(think=think)
        self.text_filter = TextFilter(self.rules)
        self.message = Message("assistant")
        self.finish_reason: Any = None
        self.model = plan.parsed.model
        self.text_path = plan.parsed.protocol.text_path
        # How much was said in all, for a server that does not count.
        self.characters = 0
        # What the next line says.
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def change_block(self, block: bytes) -> bytes:
        """Return the lines that some events make."""
        lines = []
        for document in SSE.read_documents(block):
            if not self.failed:
                lines.append(self.translate(document))
        return b"".join(lines)

    def translate(self, document: dict[str, Any], whole: bool = False) -> bytes:
        """Return the line for an event or a whole answer; b"" when it has to wait."""
        message = self.message
        finished = False
        parts = read_answer(self.protocol, document)
        for part in parts:
            if part.kind == ERROR:
                return self.fail(error_words({"error": part.value}))
            # Ollama's answers have one choice.
            if part.choice != parts[0].choice:
                continue
            if part.kind == FINISH:
                finished = True
                self.finish_reason = part.value
                continue
            try:
                add_part(message, part)
            except MalformedContent as error:
                raise BadGateway(f"the answer has a shape that cannot be read: {error}") from None
        text = "".join(message.texts)
        if message.thoughts:
            self.take_thoughts(message.thoughts)
        self.characters += len(text)
        message.texts = []
        message.thoughts = []
        if whole:
            self.text_filter = TextFilter(self.rules, whole=True)
        self.feed_text(text, finished or whole)
        if self.buffers or not (self.texts or self.thoughts or self.calls):
            return b""
        return self.encode_line({"done": False})

    def take_thoughts(self, thoughts: list[str]) -> None:
        """Put into the next line what the server has told apart from the text."""
        self.characters += sum(map(len, thoughts))
        if self.shows_thinking:
            self.thoughts += thoughts
        if self.rules.think and "".join(thoughts).strip():
            # What it says beside that is the answer, whatever stands in it.
            self.feed_text("", last=True)
            self.rules = self.rules._replace(think=False)
            self.text_filter = TextFilter(self.rules)

    def feed_text(self, text: str, last: bool) -> None:
        """Put into the next line what is visible of some more text; with the last, all calls."""
        visible, thought = self.text_filter.feed(text, last)
        if visible:
            self.texts.append(visible)
        if thought and self.shows_tagged_thinking:
            self.thoughts.append(thought)
        if last:
            for call in self.message.calls:
                self.characters += sum(map(len, call.arguments))
            self.calls += [ollama_call(call) for call in self.message.calls]
            self.message.calls = []

    def encode_line(self, end: Mapping[str, Any]) -> bytes:
        """Return the next line."""
        says: dict[str, Any] = {self.text_path[-1]: "".join(self.texts)}
        if self.thoughts:
            says["thinking"] = "".join(self.thoughts)
        if self.calls:
            says["tool_calls"] = self.calls
        self.texts = []
        self.thoughts = []
        self.calls = []
        created_at = rfc3339(self.plan.now())
        document = ollama_document(self.model, self.text_path, created_at, says, end)
        return encode_json(document) + LINES.mark

    def fail(self, words: str) -> bytes:
        """Return the line for an error that the server told. Raises it when there are no lines."""
        error = ErrorAnswer(words)
        if self.buffers:
            raise error
        self.failed = True
        return LINES.encode(self.plan.parsed.protocol.encode_error(error))

    def close(self, ending: bytes) -> bytes:
        """Return the last lines, with the counts that the end of the answer tells."""
        if self.failed:
            return b""
        self.feed_text("", last=True)
        if self.text_filter.opened is not None:
            self.plan.note_opened(self.text_filter.opened)
        lines = b""
        if not self.buffers and (self.texts or self.thoughts or self.calls):
            lines = self.encode_line({"done": False})
        end = ollama_end(self.finish_reason, self.count_tokens(ending), self.plan.timing())
        return lines + self.encode_line(end)

    def count_tokens(self, ending: bytes) -> Usage:
        """Return the counts that the end of the answer tells, or else about as many."""
        usage = read_usage(ending)
        prompt = usage.prompt or estimate_prompt(self.plan.parsed)
        completion = usage.completion
        if completion is None:
            completion = tokens_of(self.characters)
        return Usage(prompt, completion)


def answer_ollama_chat(plan: AnswerPlan, document: dict[str, Any], content: bytes) -> bytes:
    """Return a whole OpenAI answer as Ollama's."""
    translation = OllamaTranslation(plan)
    # One line is enough, also for a client that asked for a stream.
    translation.buffers = True
    return translation.translate(document, whole=True) + translation.close(content)


def read_vectors(document: Mapping[str, Any]) -> list[Any]:
    """Return the vectors of OpenAI's embeddings in the order of the inputs. Raises BadGateway.

    `{"data": [{"index": 1, "embedding": [2]}, {"index": 0, "embedding": [1]}]}`  ->  `[[1], [2]]`
    """
    data = document.get("data") or []
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise BadGateway("the answer has a shape that cannot be read: `data` has no objects")
    if all(isinstance(item.get("index"), int) for item in data):
        # Servers that work on several inputs at once may be done with the second one first.
        data = sorted(data, key=lambda item: item["index"])
    return [item.get("embedding") for item in data]


def answer_ollama_embed(plan: AnswerPlan, document: dict[str, Any], content: bytes) -> bytes:
    """Return OpenAI's embeddings as those of /api/embed."""
    usage = read_usage(content)
    if not usage.prompt:
        usage = Usage(estimate_prompt(plan.parsed))
    counts = ollama_end("", usage, plan.timing())
    answer = {"model": plan.parsed.model}
    for name in ("total_duration", "load_duration", "prompt_eval_count"):
        answer[name] = counts[name]
    # Vector by vector, because no other thread runs while one call of the encoder lasts.
    vectors = b",".join([encode_json(vector) for vector in read_vectors(document)])
    return encode_json(answer)[:-1] + b',"embeddings":[' + vectors + b"]}"


def answer_ollama_embedding(plan: AnswerPlan, document: dict[str, Any], content: bytes) -> bytes:
    """Return the first of OpenAI's embeddings as that of /api/embeddings, an older endpoint."""
    vectors = read_vectors(document)
    return encode_json({"embedding": vectors[0] if vectors else []})


def ollama_loaded(parsed: ParsedRequest, created_at: str) -> dict[str, Any] | None:
    """Return the answer to an empty prompt or message list, None when there is work."""
    document = parsed.document
    if document.get(parsed.protocol.user_words) or document.get("images"):
        return None
    reason = "unload" if document.get("keep_alive") in (0, "0", "0s") else "load"
    text_path = parsed.protocol.text_path
    end = {"done": True, "done_reason": reason}
    return ollama_document(parsed.model, text_path, created_at, {text_path[-1]: ""}, end)


def no_vectors(parsed: ParsedRequest) -> bool:
    """Tell whether an embedding request has no text: `""`, `[]` or nothing."""
    text = parsed.document.get("input")
    if text is None:
        text = parsed.document.get("prompt")
    return text in (None, "", [])


def ollama_embed_loaded(parsed: ParsedRequest, created_at: str) -> dict[str, Any] | None:
    """Return the answer of /api/embed to no text, which servers of OpenAI's refuse."""
    if not no_vectors(parsed):
        return None
    return {"model": parsed.model, "embeddings": []}


def ollama_embedding_loaded(parsed: ParsedRequest, created_at: str) -> dict[str, Any] | None:
    """Return the answer of /api/embeddings to no text."""
    return {"embedding": []} if no_vectors(parsed) else None


# --- Ollama: models -------------------------------------------------------------------

# The version of Ollama's API that is spoken here.
OLLAMA_VERSION = "0.12.0"
# /api/ps says for how many seconds a model stays in memory; nobody knows, so five minutes.
RUNNING_FOR = 300.0
MODEL_DETAILS = {
    "parent_model": "",
    "format": "",
    "family": "",
    "families": [],
    "parameter_size": "",
    "quantization_level": "",
}


def ollama_model(name: str, created_at: str) -> dict[str, Any]:
    """Return one entry of /api/tags."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    return {
        "name": name,
        "model": name,
        "modified_at": created_at,
        "size": 0,
        "digest": digest,
        "details": MODEL_DETAILS,
    }


def ollama_show(name: str, created_at: str) -> dict[str, Any]:
    """Return what is known of a model of a server that does not speak Ollama."""
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "details": MODEL_DETAILS,
        "model_info": {"general.basename": name},
        "capabilities": ["completion", "tools"],
        "modified_at": created_at,
    }


def encode_ollama_models(models: list[dict[str, Any]], created_at: str) -> dict[str, Any]:
    """Return a list of models as /api/tags has it."""
    return {"models": [ollama_model(model["id"], created_at) for model in models]}


def encode_ollama_running(names: list[str], now: float) -> dict[str, Any]:
    """Return the models that run as /api/ps has them; `now` is s UTC."""
    more = {"expires_at": rfc3339(now + RUNNING_FOR), "size_vram": 0}
    return {"models": [{**ollama_model(name, rfc3339(now)), **more} for name in names]}


# --- LM Studio: models ----------------------------------------------------------------

# Under which names servers tell how long a context may be, the one in use first.
CONTEXT_MEMBERS = (
    "loaded_context_length",
    "n_ctx",
    "max_model_len",
    "context_length",
    "context_window",
    "max_context_length",
    "n_ctx_train",
)
# The largest context of a model, whatever it was loaded with.
LARGEST_CONTEXT_MEMBERS = ("max_context_length", "n_ctx_train", "context_length", "max_model_len")
# What LM Studio calls the kinds of models, in its older list and in its newer one.
MODEL_TYPES = {"llm": "llm", "vlm": "llm", "embeddings": "embedding"}
# Whether a model is loaded, in llama.cpp's words and in LM Studio's.
MODEL_STATES = {
    "loaded": "loaded",
    "unloaded": "not-loaded",
    "not-loaded": "not-loaded",
}


def read_context_length(
    entry: Mapping[str, Any], members: Iterable[str] = CONTEXT_MEMBERS
) -> int | None:
    """Return how many tokens a model takes by its entry in a list, None if that is not said.

    What the first of `members` says counts.

    `{"id": "m", "meta": {"n_ctx_train": 4096}}`  ->  4096
    """
    said: dict[str, Any] = {}
    for place in (entry, entry.get("meta"), entry.get("model_info")):
        # Ollama puts the family before it: `qwen3.context_length`.
        for name, value in place.items() if isinstance(place, dict) else ():
            said.setdefault(name.rpartition(".")[2], value)
    lengths = (said.get(name) for name in members)
    return next((length for length in lengths if isinstance(length, int) and length), None)


def read_model_facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a model by its entry in a list, as LM Studio tells it.

    `{"id": "m", "max_model_len": 4096, "status": {"value": "loaded"}}`
    ->  `{"max_context_length": 4096, "state": "loaded"}`
    """
    status = entry.get("status")
    state = status.get("value") if isinstance(status, dict) else entry.get("state")
    facts = {
        "type": entry.get("type") if entry.get("type") in [*MODEL_TYPES] else None,
        "max_context_length": read_context_length(entry, LARGEST_CONTEXT_MEMBERS),
        "state": MODEL_STATES.get(str(state)),
    }
    return {name: value for name, value in facts.items() if value is not None}


def encode_lm_studio_models(models: list[dict[str, Any]], created_at: str) -> dict[str, Any]:
    """Return a list of models as /api/v0/models has it; what is not known is absent."""
    return {"data": [{"id": model["id"], **read_model_facts(model)} for model in models]}


def encode_lm_studio_keys(models: list[dict[str, Any]], created_at: str) -> dict[str, Any]:
    """Return a list of models as /api/v1/models has it; what is not known is absent."""
    entries = []
    for model in models:
        facts = read_model_facts(model)
        facts.pop("state", None)
        if "type" in facts:
            facts["type"] = MODEL_TYPES[facts["type"]]
        entries.append({"key": model["id"], **facts})
    return {"models": entries}


# --- the constants, and which rewriter ------------------------------------------------


def encode_openai_models(models: list[dict[str, Any]], created_at: str) -> dict[str, Any]:
    """Return a list of models as OpenAI's clients read it."""
    return {"object": "list", "data": models}


def as_opaque(dialect: Dialect) -> Dialect:
    """Return the dialect for content that nobody looks into."""
    # A ParsedRequest is made of path, query and content as they are: nothing is read from them.
    return dialect._replace(read=ParsedRequest, encode=encode_form)


def as_native(dialect: Dialect) -> Dialect:
    """Return the dialect for requests that only a server which speaks it can serve."""
    return dialect._replace(encode=encode_renamed, encode_openai=None, empty=None)


OPENAI = Dialect(
    "openai",
    SSE,
    OTHER_PROTOCOL,
    read_object,
    encode_object,
    encode_models=encode_openai_models,
)
OPENAI_OPAQUE = as_opaque(OPENAI)
# llama.cpp's own endpoints.
LLAMA_CPP = OPENAI._replace(read=read_with_query)
# LM Studio's own lists, the older one and the newer one.
LM_STUDIO = OPENAI._replace(encode_models=encode_lm_studio_models)
LM_STUDIO_KEYS = OPENAI._replace(encode_models=encode_lm_studio_keys)
OLLAMA = Dialect(
    "ollama",
    LINES,
    OTHER_OLLAMA,
    read_object,
    encode_object,
    encode_openai=encode_ollama_chat,
    answer=answer_ollama_chat,
    empty=ollama_loaded,
    encode_models=encode_ollama_models,
    encode_details=ollama_show,
    encode_running=encode_ollama_running,
    version=OLLAMA_VERSION,
    empty_event=ollama_empty_line,
    greeting="Ollama is running",
)
OLLAMA_EMBED = OLLAMA._replace(
    encode_openai=encode_ollama_embed, answer=answer_ollama_embed, empty=ollama_embed_loaded
)
OLLAMA_EMBEDDING = OLLAMA_EMBED._replace(
    answer=answer_ollama_embedding, empty=ollama_embedding_loaded
)
SERVICES = (OPENAI.service, OLLAMA.service)


def service_of(greeting: str) -> str:
    """Return what a server speaks by what it says at its root; OpenAI's servers say anything.

    'Ollama is running'  ->  'ollama';  '<!doctype html>'  ->  'openai'
    """
    return OLLAMA.service if greeting.strip() == OLLAMA.greeting else OPENAI.service


Rewriter = BufferedRewrite | StreamRewrite


def translate_error(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a server's error as the client's protocol has it."""
    error = BadGateway(read_error(content) or "the upstream gave no reason")
    return plan.parsed.protocol.encode_error(error)


def translate_document(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a whole answer in the client's dialect. Raises BadGateway."""
    document = parse_object(content)
    if document is None or plan.dialect.answer is None:
        raise BadGateway(f"the upstream's answer is not a JSON object: {content[:80]!r}")
    words = find_error(plan.protocol, document)
    if words:
        raise ErrorAnswer(words)
    return plan.dialect.answer(plan, document, content)


def keep_document(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a whole answer as it is."""
    return content


# What a server says of a path that it does not know, if it does not say 200.
UNKNOWN_PATH_STATUSES = (404, 405, 501)


def require_answer(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a whole answer as it is. Raises NotFound for one of a server without the endpoint."""
    if plan.protocol.answer_member in (parse_object(content) or {}):
        return content
    words = read_error(content)[: plan.limits.error_text]
    raise NotFound(f"the server does not know {plan.parsed.path}" + (words and f": {words}"))


def choose_rewriter(plan: AnswerPlan, status: int, media_type: str) -> Rewriter | None:
    """Return what an answer must go through; None when its bytes go as they are."""
    format = EVENT_FORMATS.get(media_type)
    if plan.protocol.answer_member and (status < 400 or status in UNKNOWN_PATH_STATUSES):
        return BufferedRewrite(plan, require_answer, required=True)
    if not plan.native:
        if status >= 400:
            return BufferedRewrite(plan, translate_error, required=True)
        if format is SSE and plan.parsed.protocol.text_path:
            return StreamRewrite(plan, SSE, OllamaTranslation(plan))
        return BufferedRewrite(plan, translate_document, required=True)
    if plan.begun and status >= 400:
        # It becomes an event, and so does what is no stream.
        return BufferedRewrite(plan, keep_document, required=True)
    if plan.begun and format is not plan.dialect.events:
        return BufferedRewrite(plan, filter_document, required=True)
    # What is no JSON, such as a form, has no text: nothing is known of its answer either.
    if status >= 400 or not plan.parsed.text:
        return None
    if format:
        return StreamRewrite(plan, format, EventFilter(plan, format))
    may_change = plan.rules.any or plan.restores_name or plan.tool_names
    if media_type == "application/json" and may_change:
        # Its client may get the head of a stream meanwhile, and then it cannot go as it is.
        return BufferedRewrite(plan, filter_document, required=plan.parsed.stream)
    return None


# ======================================================================================
# 9  Routing (pure)
# ======================================================================================
# A model's name and a source host become instances, in the order to try, and a trail that
# says why. The live path, the page and `explain` all ask `resolve`, so that they cannot
# disagree. The functions in ROUTE_ORDER look at a request one after the other, and the first
# one that claims it says where it goes. For another way to claim requests, write such a
# function and give it its place in that list.

# The first one is what an alias has that names none.
STICKY = "sticky"
STRATEGIES = ("failover", "round_robin", "least_busy", STICKY)
# How soon a request gets a slot that becomes free. Those before it in this list go first.
PRIORITIES = ("high", "normal", "low")
NORMAL = "normal"
# What a server calls the number of its slots: our word, and those of other programs.
SLOTS_KEYS = ("slots", "concurrencyLimit", "max_concurrent")
MOST_SLOTS = 100_000
# What a magic packet is sent to, and how long it may take a machine to wake up, s.
BROADCAST = "255.255.255.255"
DISCARD_PORT = 9
WAKE_TIMEOUT = 120
# The address of a network card: `b4:2e:99:01:02:03`, `B4-2E-99-01-02-03` or `b42e99010203`.
MAC = re.compile(r"[0-9A-Fa-f]{2}([:-]?)(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}")
# What may become of thinking; and that the model's template opens it, so that the answer does not.
OPENED = "opened"
THINKING_WORDS = ("strip", "move", "keep", OPENED)
# What may become of tools in namespaces; where nothing is said, OpenAI's own servers get them.
FLATTEN = "flatten"
KEEP = "keep"
BY_HOST = "by host"
# `${NAME}` in the routing file stands for an environment variable.
ENV_REFERENCE = re.compile(r"\$\{([^}]*)\}")
# A name that ends so means the name without as well.
LATEST_TAG = ":latest"
YAML_REMEDY = "needs PyYAML: pip install pyyaml, on Debian apt install python3-yaml; or write JSON"
# So many names of models or servers does an error say, of those that there are.
NAMES_IN_ERROR = 5
# Fields that the router sets itself in each request: a server's `headers` cannot name them.
ROUTER_FIELDS = (*HOP_BY_HOP, "content-length", "expect", "via")
# Members of requests that no parameter can change: what a request is about, and how it is answered.
FIXED_MEMBERS = ("model", "messages", "prompt", "input", "stream")

# The version of IP, and the address as a number: 10.0.0.1 is (4, 167772161).
Address = tuple[int, int]
# The first and the last address of a range; both belong to it.
AddressRange = tuple[Address, Address]


# --- names ------------------------------------------------------------------------------


def replace_surrogates(text: str) -> str:
    """Return text that SQLite takes: a lone surrogate, as JSON's `\\ud800` makes, becomes `?`."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode()


def cut_name(text: str) -> str:
    """Return a text as rows, lists and metrics have it; a hash tells long ones apart.

    300 times `x`  ->  247 times `x`, `#` and the first eight digits of the SHA-256
    """
    if len(text) > LIMITS.shown_name:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
        text = f"{text[: LIMITS.shown_name - 9]}#{digest}"
    return replace_surrogates(text)


class ListedNames(NamedTuple):
    """The names of the models on a list; `folded` has the spelling by the case-folded name."""

    names: frozenset[str]
    folded: Mapping[str, str]


def index_names(names: Iterable[str]) -> ListedNames:
    """Return the names of a list in a form in which one is found at once; the first one counts.

    ('Qwen3', 'qwen3')  ->  ListedNames({'Qwen3', 'qwen3'}, {'qwen3': 'Qwen3'})
    """
    names = list(names)
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.casefold(), name)
    return ListedNames(frozenset(names), folded)


# --- conversations ----------------------------------------------------------------------
# The turns of a conversation belong together: in the log, and at the server that has its prompt
# in memory. Some clients say which conversation a request is of; else its beginning tells.

# The fields in which clients name the conversation, the first one that is there counts. They are
# those of many clients, of Claude Code, of Codex and of Open WebUI.
SESSION_FIELDS = ("x-session-id", "x-claude-code-session-id", "session_id", "x-openwebui-chat-id")
# So many characters of each text go into the hash, and so many messages are looked at. What
# follows, such as the time at the end of a system prompt, changes from turn to turn.
HASHED_TEXT = 2 * KiB
HASHED_MESSAGES = 32


def read_beginning(protocol: Protocol, document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return role and text of each message up to the first one of the user.

    `{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"}]}`  ->  `[("system", "Be brief."), ("user", "Hi")]`
    """
    words = document.get(protocol.user_words)
    if isinstance(words, list):
        # The rest may be long, and it says nothing of how the conversation began.
        words = words[:HASHED_MESSAGES]
    beginning = []
    for message in read_messages(protocol, {**document, protocol.user_words: words}, tolerant=True):
        beginning.append((str(message.role), "".join(message.texts)[:HASHED_TEXT]))
        if message.role == "user":
            break
    return beginning


def read_session_key(fields: Fields, path: str, document: Mapping[str, Any]) -> str:
    """Return what names the conversation that a request is of, "" where there is none.

    It is what the client calls it, in a field or in `prompt_cache_key`. Else it is a hash of the
    model, the tools, the system prompt and the first message of the user:

    `X-Session-Id: abc`  ->  `abc`;  `{"model": "m", "messages": [...]}`  ->  `3f2a77b0c1d4`
    """
    given = [fields.get(name) for name in SESSION_FIELDS]
    for value in (*given, document.get("prompt_cache_key")):
        if isinstance(value, str) and value.strip():
            return cut_name(value.strip())
    protocol = find_protocol(path)
    if not protocol.user_words or not document.get(protocol.user_words):
        return ""
    tools = encode_json(document.get("tools"))[:HASHED_TEXT]
    beginning = encode_json([document.get("model"), *read_beginning(protocol, document)])
    return hashlib.sha256(tools + beginning).hexdigest()[:12]


# --- the routing table ------------------------------------------------------------------


# The `api` of a server of which the routing file does not say what it speaks.
AUTO = "auto"


class Wake(NamedTuple):
    """How the machine of a server is woken: the address of its card, and where to send that."""

    mac: bytes
    address: str = BROADCAST
    port: int = DISCARD_PORT
    # How long it may take, s.
    timeout: float = WAKE_TIMEOUT


def parse_mac(text: str) -> bytes:
    """Read the address of a network card: 'b4:2e:99:01:02:03' -> six octets. Raises ValueError."""
    require(MAC.fullmatch(text), f"{text!r} is no MAC address; write it as b4:2e:99:01:02:03")
    return bytes.fromhex(re.sub("[:-]", "", text))


def parse_wake_address(text: str) -> str:
    """Read where a magic packet is sent: '192.168.1.255', or a card's own address."""
    require(is_address(text), f"{text!r} is no address; write the network's broadcast address")
    return text


@dataclasses.dataclass(frozen=True)
class Server:
    """A server of models; `api` names what it speaks beside OpenAI's, AUTO if that is not known."""

    name: str
    url: UpstreamURL
    api: str = AUTO
    api_key: str | None = dataclasses.field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    verify: bool = True
    # The models that the routing file says it has; then it is not asked. None: it is asked.
    models: tuple[str, ...] | None = None
    thinking: Thinking = NOTHING_SAID
    # How many requests it runs at once; None: any number.
    slots: int | None = None
    # What becomes of tools in namespaces: FLATTEN or KEEP; BY_HOST: only OpenAI's get them.
    namespace_tools: str = BY_HOST
    # None: it is not woken.
    wake: Wake | None = None
    parameters: RequestParameters = NO_PARAMETERS
    # What to say about its URL when the table is read.
    warning: str | None = dataclasses.field(default=None, compare=False)

    @functools.cached_property
    def fixed_names(self) -> ListedNames | None:
        """The names in `models`, None for a server that is asked."""
        return None if self.models is None else index_names(self.models)

    @functools.cached_property
    def knows_namespaces(self) -> bool:
        """Whether it gets tools in namespaces as they are."""
        if self.namespace_tools == BY_HOST:
            return self.url.is_under("openai.com", "openai.azure.com", "chatgpt.com")
        return self.namespace_tools == KEEP

    @functools.cached_property
    def is_anthropic(self) -> bool:
        """Whether it is one of Anthropic's own."""
        return self.url.is_under("anthropic.com")

    def __hash__(self) -> int:
        # All fields still count for equality. To hash them all takes time with each look-up.
        return hash(self.name)


class Instance(NamedTuple):
    """A server and the model it is asked for; None keeps the request's name."""

    server: Server
    model: str | None = None

    def __str__(self) -> str:
        # A request that names no model has an empty one.
        if not self.model:
            return self.server.name
        return f"{self.server.name}/{self.model}"


class Target(NamedTuple):
    """Where a request may go: to one of an alias's instances, or to the only one there is.

    A target without instances says a `model` alone, and its server has yet to be found.
    """

    instances: tuple[Instance, ...]
    alias: str = ""
    strategy: str = "failover"
    model: str = ""
    thinking: Thinking = NOTHING_SAID
    # One of PRIORITIES, "" where nothing is said.
    priority: str = ""
    parameters: RequestParameters = NO_PARAMETERS

    def __str__(self) -> str:
        if self.alias:
            return f"alias {self.alias}"
        if self.model:
            return f"model {self.model}"
        return str(self.instances[0])


class Step(NamedTuple):
    """One line of the trail: what was tried, whether it claimed the request, and why."""

    rule: str
    matched: bool
    why: str


class Rule(NamedTuple):
    """One entry of `routes`: what must match, and where it leads."""

    name: str
    model: NamePattern | None
    source_hosts: tuple[AddressRange, ...] | None
    target: Target
    # Its match in words, such as `model gpt-4, source_host 10.0.1.7`.
    match_text: str
    # What the trail says when the model does not match. That is so for most rules and most
    # requests: all trails share this one step, or a long table would fill the memory.
    model_mismatch: Step


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingTable:
    """Everything that decides where a request goes; `source` is the file it was read from.

    A table never changes, and a file that is read again makes another one. So the table itself
    can be the key of what is remembered about it: it is equal to no other.
    """

    # None refuses what nothing claims.
    default: Server | None
    servers: Mapping[str, Server]
    aliases: Mapping[str, Target]
    rules: tuple[Rule, ...]
    model_map: ModelMap
    route_by_model: bool
    source: str
    # The `jti` of tokens that are not valid any more.
    revoked: frozenset[str] = frozenset()

    def all_servers(self) -> list[Server]:
        """Return every server that can be asked, each once; those outside `servers` come first."""
        targets = [rule.target for rule in self.rules]
        targets += self.aliases.values()
        used_servers = [self.default] if self.default else []
        for target in targets:
            used_servers.extend(instance.server for instance in target.instances)
        # A route or an alias may have a URL instead of a name, and several may have the same.
        listed_urls = {server.url for server in self.servers.values()}
        unlisted_servers: dict[UpstreamURL, Server] = {}
        for server in used_servers:
            if server.url not in listed_urls:
                unlisted_servers[server.url] = server
        # Those of `servers` are all returned, even two with one URL: their keys may differ.
        return [*unlisted_servers.values(), *self.servers.values()]

    @functools.cached_property
    def search_order(self) -> tuple[Server, ...]:
        """All servers, in the order in which those that list a model are asked for it."""
        first = [self.default] if self.default else []
        return tuple(dict.fromkeys([*first, *self.servers.values(), *self.all_servers()]))

    @functools.cached_property
    def asked_servers(self) -> tuple[Server, ...]:
        """The servers that are asked what they are: by what they list, and speak, requests go."""
        return tuple(
            server
            for server in self.search_order
            if server.models is None and (self.route_by_model or server.api == AUTO)
        )

    @functools.cached_property
    def has_choice(self) -> bool:
        """Whether a list can lead a request elsewhere than it would go without."""
        others = [server for server in self.asked_servers if server != self.default]
        return self.route_by_model and bool(others)


class Decision(NamedTuple):
    """Where a request goes, in order, and why; every instance has the model it is asked for.

    There are no instances when nothing claims the model and DEFAULT_UPSTREAM is none.
    """

    requested_model: str
    mapped_model: str
    # Who claimed it, such as `routes[2]` or `alias fast`.
    route: str
    strategy: str
    instances: tuple[Instance, ...]
    trail: tuple[Step, ...]
    # Who named the server: the route, or who was asked when that is a rule for the model alone.
    found_by: str = ""
    # What the alias and the route say of thinking, and of the members of requests.
    thinking: Thinking = NOTHING_SAID
    priority: str = NORMAL
    parameters: RequestParameters = NO_PARAMETERS


# --- the routing file -------------------------------------------------------------------
# The file is strict: a word that it does not know is an error, because a misspelt key that
# is passed over sends requests to the wrong machine. JSON or YAML becomes a document, plain
# dicts and lists. A `Node` is a value in it together with the path that leads to it; it hands
# out the nodes inside it, and makes the errors, which so know their place. `TableReader`
# walks the nodes once and makes a RoutingTable. An error looks like this:
#
#   routes.yaml:14: routes[2].match.model: '/(/' is no regular expression: missing ), ...


def parse_address(text: str) -> Address:
    """Read one address: '10.0.0.1' and '::ffff:10.0.0.1' -> (4, 167772161). Raises ValueError."""
    # An address of IPv6 may have a zone, as in `fe80::1%eth0`: this machine's own name for a link.
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return address.version, int(address)


def parse_address_range(text: str) -> AddressRange:
    """Read an address, a CIDR or a range as its two ends. Raises ValueError.

    '10.0.0.0/30'  ->  ((4, 167772160), (4, 167772163)), as does '10.0.0.0-10.0.0.3'
    """
    first, dash, last = text.partition("-")
    try:
        if dash:
            low, high = parse_address(first), parse_address(last)
        else:
            network = ipaddress.ip_network(text.strip(), strict=False)
            low, high = parse_address(str(network[0])), parse_address(str(network[-1]))
    except ValueError as error:
        raise ValueError(f"{error}; write 10.0.0.1, 10.0.0.0/24 or 10.0.0.1-10.0.0.9") from None
    # The order goes by the version first, but there is no range from one to the other.
    same_version = low[0] == high[0]
    require(same_version and low <= high, f"{text!r} is not a range from low to high")
    return low, high


class RoutesDocument(NamedTuple):
    """What a routing file holds, and where: `line_of` gives the line of a path, if it has one."""

    value: Any
    name: str
    line_of: Callable[[Path], int | None]

    def place(self, path: Path) -> str:
        """Return file and line of a value: ('routes', 2) -> 'routes.yaml:14'."""
        # A value that should be there and is not has no line; what it should stand in has one.
        for size in range(len(path), 0, -1):
            line = self.line_of(path[:size])
            if line:
                return f"{self.name}:{line}"
        return self.name


class Node(NamedTuple):
    """A value in the routing file and the path to it; null is the same as nothing at all."""

    value: Any
    path: Path
    document: RoutesDocument

    def error(self, message: str) -> ConfigError:
        """Return the error about this value: 'routes.yaml:14: routes[2].match.model: MESSAGE'."""
        words = ""
        for key in self.path:
            words += f"[{key}]" if isinstance(key, int) else f".{key}"
        where = words.removeprefix(".") or "the file"
        return ConfigError(f"{self.document.place(self.path)}: {where}: {message}")

    def require(self, condition: object, message: str) -> None:
        """Refuse this value unless a condition holds. Raises ConfigError."""
        if not condition:
            raise self.error(message)

    def replace(self, value: Any) -> Node:
        """Return a node with another value in the same place."""
        return self._replace(value=value)

    def child(self, key: Any) -> Node:
        """Return what stands inside at a key or an index; its value may be None."""
        # A key may be missing; an index is always one that the list has.
        value = self.value.get(key) if isinstance(self.value, dict) else self.value[key]
        return Node(value, (*self.path, key), self.document)

    def expand_variables(self, environ: Mapping[str, str]) -> Any:
        """Return the value with `${NAME}` replaced in every string inside."""
        if isinstance(self.value, dict):
            return {key: self.child(key).expand_variables(environ) for key in self.value}
        if isinstance(self.value, list):
            indexes = range(len(self.value))
            return [self.child(index).expand_variables(environ) for index in indexes]
        if not isinstance(self.value, str):
            return self.value
        for name in ENV_REFERENCE.findall(self.value):
            self.require(name in environ, f"${{{name}}} is not set; set it or write the value")
        return ENV_REFERENCE.sub(lambda match: environ[match[1]], self.value)

    def entries(self) -> list[Node]:
        """Return the values of a mapping whose keys are names of the user's own choice."""
        if self.value is None:
            return []
        self.require(isinstance(self.value, dict), f"{self.value!r} instead of a mapping of names")
        # YAML reads a key such as `on` or `1` as no text. The error names the key's place, which
        # is the one of its value.
        for key in self.value:
            self.child(key).replace(key).read()
        return [self.child(key) for key in self.value]

    def members(self, *keys: str) -> list[Node]:
        """Return the members of a mapping in the order of `keys`; it may have no others."""
        words = ", ".join(keys)
        value = {} if self.value is None else self.value
        self.require(isinstance(value, dict), f"{self.value!r} instead of a mapping of {words}")
        node = self.replace(value)
        for key in value:
            node.child(key).require(key in keys, f"unknown key; known are {words}")
        return [node.child(key) for key in keys]

    def elements(self, wanted: str) -> list[Node]:
        """Return the elements of a list; the error for an empty one or no list is `wanted`."""
        self.require(isinstance(self.value, list) and self.value, wanted)
        return [self.child(index) for index in range(len(self.value))]

    def read(self, parse: Callable[[str], Any] = str) -> Any:
        """Return what `parse` makes of a text, which may not be empty."""
        is_text = isinstance(self.value, str) and self.value
        self.require(is_text, f"{self.value!r} instead of a text; put it in quotes")
        try:
            return parse(self.value)
        except ValueError as error:
            raise self.error(str(error)) from None

    def read_optional(self, parse: Callable[[str], Any] = str) -> Any:
        """Return what `read` does, None when nothing stands here."""
        if self.value is None:
            return None
        return self.read(parse)

    def read_number(self, low: float, high: float, whole: bool = True) -> Any:
        """Return a number from `low` to `high`, None when nothing stands here."""
        if self.value is None:
            return None
        # True is a number to Python, and to nobody else.
        kinds = int if whole else (int, float)
        is_number = isinstance(self.value, kinds) and not isinstance(self.value, bool)
        allowed = f"a {'whole ' if whole else ''}number from {low} to {high}"
        is_allowed = is_number and low <= self.value <= high
        self.require(is_allowed, f"{self.value!r} instead of {allowed}")
        return self.value

    def choose(self, *choices: Any) -> Any:
        """Return which of `choices` stands here; the first one when nothing does."""
        if self.value is None:
            return choices[0]
        # Lower case, because YAML and JSON spell True and False so.
        words = " or ".join(map(str, choices)).lower()
        self.require(self.value in choices, f"{self.value!r} instead of {words}")
        return self.value

    def read_field(self) -> str:
        """Return a value that is sent in a field: one of `headers`, or `api_key`.

        In `headers` the last key of the path is the field's name. Most values are secrets, so that
        no message shows what is wrong with one.
        """
        name = self.path[-1]
        # Read as the line that it will be in a request. A colon inside the name would end it there,
        # and the name that is read would be shorter than the key.
        line = FIELD_LINE.fullmatch(f"{name}:{self.value}")
        is_field = isinstance(self.value, str) and line and line[1] == name
        self.require(is_field, "no field name or value; put one line in quotes")
        self.require(name.lower() not in ROUTER_FIELDS, "the router sets this field itself")
        return self.value


def parse_member_path(text: str) -> Path:
    """Read the name of a member, with dots to one inside of it. Raises ValueError.

    'chat_template_kwargs.enable_thinking'  ->  ('chat_template_kwargs', 'enable_thinking')
    """
    path = tuple(text.split("."))
    require(all(path), f"{text!r} has nothing before or behind a dot; write names, as in a.b")
    fixed = f"`{path[0]}` is the client's own and stays; nor can {', '.join(FIXED_MEMBERS)} change"
    require(path[0] not in FIXED_MEMBERS, fixed)
    return path


def check_json_value(node: Node) -> None:
    """Refuse what YAML reads and JSON does not know, such as dates and infinities."""
    if isinstance(node.value, dict):
        for item in node.entries():
            check_json_value(item)
    elif isinstance(node.value, list):
        for index in range(len(node.value)):
            check_json_value(node.child(index))
    else:
        is_json = isinstance(node.value, str | int | float | None)
        is_finite = not isinstance(node.value, float) or math.isfinite(node.value)
        node.require(is_json and is_finite, f"{node.value!r} is not JSON; put it in quotes")


def read_leaves(node: Node, path: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and JSON of each value inside of a node that is no object, or an empty one.

    `{"b": [1], "c": {}}` at `("a",)`  ->  `(("a", "b"), "[1]")`, `(("a", "c"), "{}")`
    """
    if isinstance(node.value, dict) and node.value:
        for item in node.entries():
            yield from read_leaves(item, (*path, item.path[-1]))
        return
    check_json_value(node)
    yield path, json.dumps(node.value)


# What a server, an alias or a route may say of the members of requests.
PARAMETER_KEYS = ("strip", "default", "set", "think")
# The sections of a routing file.
TABLE_KEYS = ("servers", "aliases", "routes", "revoked")
# What a server has instead whose entry is wrong. No text is read as this.
NO_URL = UpstreamURL("http", "", 0, "")


class TableReader:
    """Reads a routing file's document into the parts of a table; every error names its place."""

    def __init__(self, root: Node, environ: Mapping[str, str], settings: Settings) -> None:
        self.root = root
        self.environ = environ
        self.settings = settings
        # All that is wrong, in words. What an entry refers to is there even if it is wrong itself,
        # so that no mistake looks like two.
        self.mistakes: list[str] = []
        self.servers: dict[str, Server] = {}
        # The URL behind each name: no name may stand for two.
        self.url_of_name: dict[str, UpstreamURL] = {}
        self.default: Server | None = None
        self.aliases: dict[str, Target] = {}
        self.rules: tuple[Rule, ...] = ()
        self.revoked: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is wrong in here, and go on with what follows."""
        try:
            yield
        except ConfigError as error:
            self.mistakes += error.args

    def expand(self, node: Node) -> Node:
        """Return an entry with the values of its variables."""
        return node.replace(node.expand_variables(self.environ))

    def read(self) -> None:
        """Read all of the document. Raises ConfigError."""
        with self.noting():
            self.read_sections()
        if self.mistakes:
            raise ConfigError(*self.mistakes)

    def read_sections(self) -> None:
        """Read the document section by section; a mistake that hides others is raised."""
        with self.noting():
            self.root.members(*TABLE_KEYS)
        document = self.root.value if isinstance(self.root.value, dict) else {}
        nodes = [self.root.replace(document).child(key) for key in TABLE_KEYS]
        servers, aliases, routes, revoked = nodes
        for node in servers.entries():
            self.servers[node.path[-1]] = Server(node.path[-1], NO_URL)
            with self.noting():
                self.servers[node.path[-1]] = self.read_server(self.expand(node))
        for name, url_text in self.settings.servers:
            with self.noting():
                self.add_server(name, url_text)
        self.url_of_name = {name: server.url for name, server in self.servers.items()}
        with self.noting():
            self.default = self.find_default(self.settings.default_upstream)
        for node in aliases.entries():
            self.aliases[node.path[-1]] = Target((), node.path[-1])
            with self.noting():
                self.aliases[node.path[-1]] = self.read_alias(self.expand(node))
        with self.noting():
            self.rules = self.read_rules(routes)
        with self.noting():
            self.revoked = self.read_revoked(revoked)

    def read_rules(self, node: Node) -> tuple[Rule, ...]:
        """Read the routes."""
        rules: list[Rule] = []
        if not node.value:
            return ()
        for item in node.elements("not a list; begin each route with `- match:`"):
            with self.noting():
                rules.append(self.read_rule(self.expand(item)))
        return tuple(rules)

    def read_revoked(self, node: Node) -> frozenset[str]:
        """Read the names of tokens that are not valid any more."""
        if node.value in (None, []):
            return frozenset()
        wanted = "not a list; write the `jti` of each token, as in [3f2a, 77b0]"
        return frozenset(self.expand(item).read() for item in node.elements(wanted))

    def server_at(self, url: UpstreamURL) -> Server | None:
        """Return the named server with this URL, with its key and fields; None if there is none."""
        return next((server for server in self.servers.values() if server.url == url), None)

    def add_server(self, name: str, url_text: str) -> None:
        """Add a server of SERVERS, unless it stands in the routing file, too."""
        url = parse_upstream_url(url_text)
        if name == url.without_scheme and self.server_at(url):
            return
        server = Server(name, url, warning=url_warning("SERVERS", url_text))
        if self.servers.setdefault(name, server).url not in (url, NO_URL):
            words = f"{name!r} is {url}, in the routing file {self.servers[name].url}"
            raise ConfigError(f"SERVERS: {words}; rename one of them")

    def find_default(self, text: str) -> Server | None:
        """Return the server that DEFAULT_UPSTREAM means by its name or its URL; None for `none`."""
        if text.lower() == "none":
            return None
        if text in self.servers:
            return self.servers[text]
        try:
            url = parse_upstream_url(text)
        except ValueError as error:
            names = ", ".join([*self.servers, "none"])
            allowed = f"allowed are a URL and {names}"
            raise ConfigError(f"DEFAULT_UPSTREAM={text!r}: {error}; {allowed}") from None
        named_server = self.server_at(url)
        if named_server:
            return named_server
        server = self.name_server(url, "default")
        return dataclasses.replace(server, warning=url_warning("DEFAULT_UPSTREAM", text))

    def name_server(self, url: UpstreamURL, *preferred_names: str) -> Server:
        """Return a server that the file gives no name, with one that no other URL has."""
        for name in (*preferred_names, url.without_scheme):
            # A free name is this URL's from now on.
            if self.url_of_name.setdefault(name, url) == url:
                return Server(name, url)
        return Server(str(url), url)

    def read_server(self, node: Node) -> Server:
        """Read a server: a URL, or a record with one."""
        if isinstance(node.value, str):
            node = node.replace({"url": node.value})
        name = node.path[-1]
        url, api, key, headers, verify, models, discover, thinking, *others = node.members(
            *("url", "api", "api_key", "headers", "verify", "models", "discover", "thinking"),
            *("namespace_tools", "wake", *PARAMETER_KEYS, *SLOTS_KEYS),
        )
        spaces, wake, *others = others
        parameters = others[: len(PARAMETER_KEYS)]
        slots = others[len(PARAMETER_KEYS) :]
        return Server(
            name=name,
            url=url.read(parse_upstream_url),
            api=api.choose(AUTO, *SERVICES),
            api_key=None if key.value is None else key.read_field(),
            headers=tuple((field.path[-1], field.read_field()) for field in headers.entries()),
            verify=verify.choose(True, False),
            models=self.read_models(models, discover.choose(True, False)),
            thinking=self.read_thinking(thinking),
            slots=self.read_slots(slots),
            namespace_tools=self.read_namespace_tools(spaces),
            wake=self.read_wake(wake),
            parameters=self.read_parameters(*parameters),
            warning=url_warning(f"servers.{name}", url.value),
        )

    def read_namespace_tools(self, node: Node) -> str:
        """Read what becomes of tools in namespaces."""
        return BY_HOST if node.value is None else node.choose(FLATTEN, KEEP)

    def read_models(self, node: Node, discover: bool) -> tuple[str, ...] | None:
        """Read the models of a server that is not asked for them; None for one that is."""
        if node.value is None:
            # Not to be asked, and not to be chosen by a list: that is a list with nothing in it.
            return None if discover else ()
        node.require(
            discover, "`discover: false` says that there is no list; leave one of them out"
        )
        items = node.elements("not a list of names; without one the server is asked")
        return tuple(dict.fromkeys(item.read() for item in items))

    def read_slots(self, nodes: Sequence[Node]) -> int | None:
        """Read how many requests a server runs at once; one of SLOTS_KEYS says it."""
        given = [node for node in nodes if node.value is not None]
        if not given:
            return None
        node, *others = given
        for other in others:
            other.require(False, f"`{node.path[-1]}` says it already; leave one of them out")
        return node.read_number(1, MOST_SLOTS)

    def read_wake(self, node: Node) -> Wake | None:
        """Read how a server's machine is woken: a record, or the address of its card alone."""
        if node.value is None:
            return None
        if isinstance(node.value, str):
            node = node.replace({"mac": node.value})
        mac, address, port, timeout = node.members("mac", "address", "port", "timeout")
        return Wake(
            mac=mac.read(parse_mac),
            address=address.read_optional(parse_wake_address) or BROADCAST,
            port=port.read_number(1, 65535) or DISCARD_PORT,
            timeout=timeout.read_number(1, 3600, whole=False) or WAKE_TIMEOUT,
        )

    def read_priority(self, node: Node) -> str:
        """Read one of PRIORITIES; "" where nothing is said."""
        return node.choose("", *PRIORITIES) if node.value is None else node.choose(*PRIORITIES)

    def read_thinking(self, node: Node) -> Thinking:
        """Read what becomes of thinking: one of THINKING_WORDS, or a list of them."""
        if node.value is None:
            return NOTHING_SAID
        wanted = f"{node.value!r} instead of {', '.join(THINKING_WORDS)}, or a list of them"
        items = node.elements(wanted) if isinstance(node.value, list) else [node]
        for item in items:
            item.require(item.value in THINKING_WORDS, wanted)
        words = [item.value for item in items]
        actions = [word for word in words if word != OPENED]
        node.require(len(actions) <= 1, f"{' and '.join(actions)} at once; keep one of them")
        return Thinking(actions[0] if actions else "", OPENED in words)

    def read_parameters(
        self, strip: Node, default: Node, set_always: Node, think: Node
    ) -> RequestParameters:
        """Read what requests lose, get where it is absent, and get always; how much is thought."""
        strips = []
        if strip.value is not None:
            items = [strip]
            if isinstance(strip.value, list):
                items = strip.elements("an empty list strips nothing; leave it out")
            strips = [item.read(parse_member_path) for item in items]
        defaults = tuple(self.read_values(default))
        sets = tuple(self.read_values(set_always))
        level = ""
        if think.value is not None:
            # YAML reads the words `on` and `off` as true and false.
            words = {True: THINK_ON, False: THINK_OFF}
            is_switch = isinstance(think.value, bool)
            level = think.replace(words[think.value]).value if is_switch else think.value
            think.require(level in THINK_LEVELS, f"{level!r} instead of {', '.join(THINK_LEVELS)}")
        return RequestParameters(tuple(strips), defaults, sets, level)

    def read_values(self, node: Node) -> Iterator[tuple[Path, str]]:
        """Yield the path and the JSON of each value of `default` or `set`."""
        places: dict[Path, None] = {}
        for item in node.entries():
            path = item.replace(item.path[-1]).read(parse_member_path)
            for place, value in read_leaves(item, path):
                clash = any(
                    place[: len(other)] == other or other[: len(place)] == place for other in places
                )
                item.require(not clash, f"{'.'.join(place)} stands here twice; keep one of them")
                places[place] = None
                yield place, value

    def read_upstream(self, node: Node) -> Server:
        """Read a server's name or a URL."""
        name = node.read()
        if name in self.servers:
            return self.servers[name]
        known = ", ".join(self.servers) or "none"
        words = f"unknown server {name!r}; known are {known}, or a URL"
        node.require(ABSOLUTE_SCHEME.match(name), words)
        url = node.read(parse_upstream_url)
        return self.server_at(url) or self.name_server(url)

    def read_instance(self, node: Node) -> Instance:
        """Read `server/model`, split at the first slash, or a record with these members."""
        if isinstance(node.value, str):
            name, _, model_name = node.value.partition("/")
            return Instance(self.read_upstream(node.replace(name)), model_name or None)
        server, url, model = node.members("server", "url", "model")
        places = [place for place in (server, url) if place.value is not None]
        node.require(len(places) == 1, "name one of `server` and `url`")
        return Instance(self.read_upstream(places[0]), model.read_optional())

    def read_alias(self, node: Node) -> Target:
        """Read an alias: its instances, its strategy and what becomes of thinking."""
        strategy, listed, thinking, priority, *parameters = node.members(
            "strategy", "instances", "thinking", "priority", *PARAMETER_KEYS
        )
        chosen_strategy = strategy.choose(*STRATEGIES)
        instances: list[Instance] = []
        for item in listed.elements("an alias needs a list of at least one `server/model`"):
            with self.noting():
                instance = self.read_instance(item)
                item.require(instance not in instances, f"{instance} stands here twice")
                instances.append(instance)
        return Target(
            instances=tuple(instances),
            alias=node.path[-1],
            strategy=chosen_strategy,
            thinking=self.read_thinking(thinking),
            priority=self.read_priority(priority),
            parameters=self.read_parameters(*parameters),
        )

    def read_rule(self, node: Node) -> Rule:
        """Read a route: its match and its target."""
        match, route = node.members("match", "route")
        model, source_host = match.members("model", "source_host")
        name = f"routes[{node.path[-1]}]"
        pattern = None
        source_hosts = None
        target = Target(())
        with self.noting():
            pattern = model.read_optional(parse_pattern)
        with self.noting():
            source_hosts = self.read_source_hosts(source_host)
        with self.noting():
            target = self.read_target(route, pattern)
        stated = [f"{key} {value}" for key, value in (match.value or {}).items()]
        match_text = ", ".join(stated) or "everything"
        return Rule(
            name=name,
            model=pattern,
            source_hosts=source_hosts,
            target=target,
            match_text=match_text,
            model_mismatch=Step(name, False, f"{match_text}: the model does not match"),
        )

    def read_source_hosts(self, node: Node) -> tuple[AddressRange, ...] | None:
        """Read an address, CIDR or range, or a list of them; None stands for anybody."""
        if node.value is None:
            return None
        if not isinstance(node.value, list):
            return (node.read(parse_address_range),)
        items = node.elements("an empty list matches nobody; leave it out")
        return tuple(item.read(parse_address_range) for item in items)

    def read_target(self, node: Node, pattern: NamePattern | None) -> Target:
        """Read where a route leads: an alias, or an upstream and a model; what else it says."""
        upstream, model, alias, thinking, priority, *parameters = node.members(
            "upstream", "model", "alias", "thinking", "priority", *PARAMETER_KEYS
        )
        own = Target(
            (),
            thinking=self.read_thinking(thinking),
            priority=self.read_priority(priority),
            parameters=self.read_parameters(*parameters),
        )
        given = [member for member in (upstream, model, alias) if member.value is not None]
        node.require(given, "name an `upstream`, a `model` or an `alias`")
        if alias in given:
            node.require(len(given) == 1, "`alias` stands alone; leave the rest out")
            name = alias.read()
            known = ", ".join(self.aliases) or "none"
            alias.require(name in self.aliases, f"unknown {name!r}; known are {known}")
            target = self.aliases[name]
            # The alias is nearer to the model than the route, and the route to who asks.
            return target._replace(
                thinking=merge_thinking(target.thinking, own.thinking),
                priority=own.priority or target.priority,
                parameters=merge_parameters(target.parameters, own.parameters),
            )
        if model in given:
            # This only checks it: the template is kept as it stands there.
            model.read(lambda template: check_template(template, pattern))
        if upstream not in given:
            return own._replace(model=model.value)
        return own._replace(instances=(Instance(self.read_upstream(upstream), model.value),))


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; a repeated name is an error."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in members, f"{name!r} stands there twice; keep one of them")
        members[name] = value
    return members


def parse_json_routes(text: str, name: str) -> RoutesDocument:
    """Read a JSON routing file. Raises ConfigError."""
    try:
        value = json.loads(text, object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{name}{line}: no valid JSON: {error}") from None

    def line_of(path: Path) -> int | None:
        # Nothing is found for a value that is missing. Two would be found for a name that is
        # repeated in its object, but `unique_object` has refused that.
        place = next(find_values(text, 0, [path]), None)
        if place is None:
            return None
        start, _, _ = place
        return text.count("\n", 0, start) + 1

    return RoutesDocument(value, name, line_of)


def find_yaml_lines(node: Any, path: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Yield the path and the line of a node of PyYAML's and of all that is in it.

    The document `a: [x]`  ->  ((), 1), (('a',), 1), (('a', 0), 1)

    PyYAML lets the later of two equal keys win. Raises ConfigError instead.
    """
    yield path, node.start_mark.line + 1
    # A mapping's value is a list of pairs of nodes, a sequence's a list of nodes.
    inner_nodes = node.value if isinstance(node.value, list) else []
    seen_keys: set[str] = set()
    for index, item in enumerate(inner_nodes):
        if not isinstance(item, tuple):
            yield from find_yaml_lines(item, (*path, index), name)
            continue
        key_node, value_node = item
        key = str(key_node.value)
        if key in seen_keys:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"{name}:{line}: {key_node.value!r} stands there twice")
        seen_keys.add(key)
        yield from find_yaml_lines(value_node, (*path, key), name)


def parse_yaml_routes(text: str, name: str) -> RoutesDocument:
    """Read a YAML routing file. Raises ConfigError."""
    try:
        # Imported here alone: without a YAML file nothing needs to be installed.
        import yaml
    except ImportError:
        raise ConfigError(f"{name} is not JSON, and YAML {YAML_REMEDY}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Path, int] = {}
        # An empty file has no root.
        if root is not None:
            lines.update(find_yaml_lines(root, (), name))
        return RoutesDocument(yaml.safe_load(text), name, lines.get)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{name}{line}: no valid YAML: {problem}") from None


def parse_document(text: str, name: str) -> RoutesDocument:
    """Read a routing file, JSON or YAML by its content. Raises ConfigError."""
    if not text.lstrip().startswith(("{", "[")):
        return parse_yaml_routes(text, name)
    try:
        return parse_json_routes(text, name)
    except ConfigError:
        # YAML in flow style begins like JSON. When it is no YAML either, JSON was meant.
        with contextlib.suppress(ConfigError):
            return parse_yaml_routes(text, name)
        raise


def parse_routes(
    text: str, name: str, environ: Mapping[str, str], settings: Settings
) -> RoutingTable:
    """Return the table of a routing file. Raises ConfigError."""
    text = text.removeprefix("\ufeff")
    document = parse_document(text if text.strip() else "{}", name)
    reader = TableReader(Node(document.value, (), document), environ, settings)
    reader.read()
    table = RoutingTable(
        default=reader.default,
        servers=reader.servers,
        aliases=reader.aliases,
        rules=reader.rules,
        model_map=settings.model_map,
        route_by_model=settings.route_by_model,
        source=name,
        revoked=reader.revoked,
    )
    if not table.all_servers():
        raise ConfigError("DEFAULT_UPSTREAM='none': there is no other server; set SERVERS")
    return table


# --- what the servers list --------------------------------------------------------------
# A model that no alias and no rule claims goes to the servers that list it. Their lists come in
# from section 12 as one value, a Catalogue, so that decisions stay pure and can be remembered.

# A list belongs to a server's URL and to a hash of the credentials it was asked with.
ModelListKey = tuple[str, str]


def list_key(server: Server, authorization: str | None) -> ModelListKey:
    """Return under which key a server's list for these credentials is kept."""
    credentials = server.api_key or authorization or ""
    return str(server.url), hashlib.sha256(credentials.encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def own_list_key(server: Server) -> ModelListKey:
    """Return under which key the list is kept that a server gives the router itself.

    Where a request goes depends on these lists alone, never on what a client may see.
    """
    return list_key(server, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """What the servers list, and what they speak. A change makes another one, equal to no other.

    So it can be the key of what is remembered, as a RoutingTable can.
    """

    lists: Mapping[ModelListKey, ListedNames]
    # What those have shown to speak that were asked for it.
    services: Mapping[ModelListKey, str]

    def names_of(self, server: Server) -> ListedNames | None:
        """Return what a server lists, or the routing file says it has; None if nothing is known."""
        return server.fixed_names or self.lists.get(own_list_key(server))

    def with_api(self, server: Server) -> Server:
        """Return a server whose `api` is known; it is OpenAI's until it has shown another one."""
        if server.api != AUTO:
            return server
        service = self.services.get(own_list_key(server), OPENAI.service)
        return dataclasses.replace(server, api=service)


EMPTY_CATALOGUE = Catalogue({}, {})


# --- decisions --------------------------------------------------------------------------


class RouteQuery(NamedTuple):
    """What is asked: a model and a source host, and the names by which it may be claimed.

    `names` are the requested name and, when MODEL_MAP renames it, the mapped one, and then both
    without `:latest`; a request that names no model has none.
    """

    table: RoutingTable
    requested_model: str
    mapped_model: str
    names: tuple[str, ...]
    source_host: str
    # None when the source host is no address; it is in no range then.
    source_address: Address | None
    catalogue: Catalogue


class Claim(NamedTuple):
    """Where a request goes, and who says so: `route` as the log and the page have it."""

    route: str
    target: Target


# The routes of requests that no rule claims: to the servers that list the model, to
# DEFAULT_UPSTREAM, or nowhere when that is none.
BY_LIST = "model list"
BY_DEFAULT = "default"
UNCLAIMED = "none"
NOWHERE = Target(())


def match_name(pattern: NamePattern, names: Sequence[str]) -> re.Match[str] | bool:
    r"""Tell whether one of `names` is the exact name, or matches the pattern.

    The match of a pattern is returned itself, because it fills a `\1` in the target's model:

    'gpt-4', ('gpt-4',)  ->  True;  /^gpt-(.*)/, ('gpt-4',)  ->  the match;  else False
    """
    if isinstance(pattern, str):
        return pattern in names
    for name in names:
        # A harmless pattern can take minutes on a name that is long enough.
        if len(name) > LIMITS.pattern_name:
            continue
        match = pattern.search(name)
        if match:
            return match
    return False


def without_tag(model: str) -> str:
    """Return a name without `:latest`: 'llama3:latest' -> 'llama3', 'llama3' -> 'llama3'."""
    return model.removesuffix(LATEST_TAG) or model


def names_to_try(*models: str) -> tuple[str, ...]:
    """Return the names by which a model may be known, those that were said first.

    'coder:latest'  ->  ('coder:latest', 'coder');  ''  ->  ()
    """
    names = [*models, *map(without_tag, models)]
    return tuple(dict.fromkeys(name for name in names if name))


def find_listed(model: str, listed: Container[str]) -> str | None:
    """Return how a list spells a model: as it is, or with `:latest` more or less; else None.

    'llama3', {'llama3:latest'}  ->  'llama3:latest'
    """
    for name in (model, without_tag(model), f"{model}{LATEST_TAG}"):
        if name in listed:
            return name
    return None


def map_model(model_map: ModelMap, requested_model: str, trail: list[Step]) -> str:
    """Return the name that MODEL_MAP makes of a model; the result is not mapped again."""
    names = names_to_try(requested_model)
    # An exact key for the very name goes before one for the name without its tag.
    exact = [item for name in names for item in model_map if item[0] == name]
    for pattern, template in (*exact, *model_map):
        match = match_name(pattern, names)
        if not match:
            continue
        if isinstance(pattern, re.Pattern):
            mapped_model = match.expand(template)
            words = pattern_text(pattern)
        else:
            mapped_model = template
            words = repr(pattern)
        trail.append(Step("MODEL_MAP", True, f"{words} makes it {mapped_model!r}"))
        return mapped_model
    return requested_model


def parse_source_host(host: str) -> Address | None:
    """Return the address that a source host is: '10.0.0.1' -> (4, 167772161); None for a name."""
    try:
        return parse_address(host)
    except ValueError:
        return None


def match_source(ranges: Sequence[AddressRange] | None, address: Address | None) -> bool:
    """Tell whether an address is in one of the ranges; None as ranges has everybody in it."""
    if ranges is None:
        return True
    if address is None:
        return False
    return any(low <= address <= high for low, high in ranges)


def match_rule(rule: Rule, query: RouteQuery) -> tuple[re.Match[str] | bool, Step]:
    """Tell whether all that a rule states matches, and what the trail says of it."""
    match: re.Match[str] | bool = True
    if rule.model is not None:
        match = match_name(rule.model, query.names)
    if not match:
        step = rule.model_mismatch
        # `match_name` tries no pattern on such a name, although the pattern may look right. An
        # exact name is compared, however long it is.
        is_long = query.names and all(len(name) > LIMITS.pattern_name for name in query.names)
        if is_long and isinstance(rule.model, re.Pattern):
            why = f"{step.why}: longer than {LIMITS.pattern_name} characters"
            step = Step(rule.name, False, why)
        return False, step
    if not match_source(rule.source_hosts, query.source_address):
        why = f"{rule.match_text}: source host {query.source_host} does not match"
        return False, Step(rule.name, False, why)
    return match, Step(rule.name, True, f"{rule.match_text}: matches")


def fill_template(target: Target, match: re.Match[str] | bool) -> Target:
    r"""Return a rule's target with `\1` in its model replaced by the match of its pattern."""
    # An alias names the models of its instances in full.
    if target.alias:
        return target
    if target.model and isinstance(match, re.Match):
        return target._replace(model=match.expand(target.model))
    if not target.instances:
        return target
    server, model = target.instances[0]
    # A rule may leave the name as it is, and an exact name has no groups to put in.
    if model is None or not isinstance(match, re.Match):
        return target
    return target._replace(instances=(Instance(server, match.expand(model)),))


def find_pin(table: RoutingTable, requested_model: str) -> Instance | None:
    """Return what a name that ends in a server's stands for. An alias of that name goes first.

    `llama3 [gpu]`  ->  the server `gpu` with its model `llama3`;  `llama3`  ->  None
    """
    for name in names_to_try(requested_model):
        if not name.endswith("]") or name in table.aliases:
            continue
        # With two servers of one name, the one of the routing file is last, and counts.
        for server in reversed(table.all_servers()):
            # A server's name may have brackets itself, as `[::1]:8000` does.
            model = name.removesuffix(f" [{server.name}]")
            if model and model != name:
                return Instance(server, model)
    return None


def claim_by_pin(query: RouteQuery, trail: list[Step]) -> Claim | None:
    """Claim a name that ends in a server's: `llama3 [gpu]`."""
    instance = find_pin(query.table, query.requested_model)
    if instance is None:
        return None
    name = instance.server.name
    trail.append(Step("pin", True, f"the name pins server {name!r}"))
    return Claim(f"pin {name}", Target((instance,)))


def claim_by_alias(query: RouteQuery, trail: list[Step]) -> Claim | None:
    """Claim a request one of whose names is an alias."""
    for name in query.names:
        if name in query.table.aliases:
            trail.append(Step(f"aliases.{name}", True, f"{name!r} is an alias"))
            return Claim(f"alias {name}", query.table.aliases[name])
    return None


def claim_by_rule(query: RouteQuery, trail: list[Step]) -> Claim | None:
    """Claim a request for the first of the rules that matches."""
    for rule in query.table.rules:
        match, step = match_rule(rule, query)
        trail.append(step)
        if match:
            return Claim(rule.name, fill_template(rule.target, match))
    return None


def spell_exactly(model: str, listed: ListedNames) -> str | None:
    """Return a name that is on a list as it is, else None."""
    return model if model in listed.names else None


def change_tag(model: str) -> str:
    """Return a name with `:latest` taken away, or added: 'llama3' -> 'llama3:latest'."""
    return without_tag(model) if model.endswith(LATEST_TAG) else f"{model}{LATEST_TAG}"


def spell_with_tag(model: str, listed: ListedNames) -> str | None:
    """Return the name on a list that is this one with `:latest` more or less, else None."""
    return spell_exactly(change_tag(model), listed)


def spell_in_any_case(model: str, listed: ListedNames) -> str | None:
    """Return the name on a list that has the same letters, with or without `:latest`, else None."""
    for name in (model, change_tag(model)):
        spelling = listed.folded.get(name.casefold())
        if spelling is not None:
            return spelling
    return None


# How a name is looked up in all lists, the nearest way first.
SPELLINGS = (spell_exactly, spell_with_tag, spell_in_any_case)


def find_holders(query: RouteQuery) -> tuple[Instance, ...]:
    """Return the servers that list a model, each with its spelling; none when nobody does."""
    names = [name for name in (query.mapped_model, query.requested_model) if name]
    listings = [(server, query.catalogue.names_of(server)) for server in query.table.search_order]
    for name, spell in itertools.product(dict.fromkeys(names), SPELLINGS):
        holders = []
        for server, listed in listings:
            spelling = spell(name, listed) if listed else None
            if spelling is not None:
                holders.append(Instance(server, spelling))
        if holders:
            return tuple(holders)
    return ()


def listing_words(holders: Sequence[Instance], ages: Sequence[float | None] = ()) -> str:
    """Return who lists a model, and how many seconds ago: "gpu lists 'llama3' (12 s ago)"."""
    listings = []
    for holder, age in itertools.zip_longest(holders, ages):
        words = f"{holder.server.name} lists {cut_name(holder.model)!r}"
        listings.append(words if age is None else f"{words} ({age:.0f} s ago)")
    return "; ".join(listings)


# All trails of models that nobody lists share this step.
NOT_LISTED = Step(BY_LIST, False, "no server lists it")


def claim_by_list(query: RouteQuery, trail: list[Step]) -> Claim | None:
    """Claim a model for the servers that list it; when one fails, the next one is tried."""
    if not (query.table.route_by_model and query.names):
        return None
    holders = find_holders(query)
    if not holders:
        trail.append(NOT_LISTED)
        return None
    trail.append(Step(BY_LIST, True, listing_words(holders)))
    return Claim(BY_LIST, Target(holders))


def claim_by_default(query: RouteQuery, trail: list[Step]) -> Claim:
    """Claim whatever is left for DEFAULT_UPSTREAM, which may refuse it."""
    default = query.table.default
    if default is None:
        trail.append(Step("DEFAULT_UPSTREAM", False, "no rule claims it, and this is none"))
        return Claim(UNCLAIMED, NOWHERE)
    trail.append(Step("DEFAULT_UPSTREAM", True, f"no rule claims it: {default.url}"))
    return Claim(BY_DEFAULT, Target((Instance(default),)))


FindClaim = Callable[[RouteQuery, list[Step]], Claim | None]
ROUTE_ORDER: tuple[FindClaim, ...] = (
    claim_by_pin,
    claim_by_alias,
    claim_by_rule,
    claim_by_list,
    claim_by_default,
)
# Who finds the server when a rule says the model alone.
SERVER_ORDER = tuple(find_claim for find_claim in ROUTE_ORDER if find_claim is not claim_by_rule)


def first_claim(order: Iterable[FindClaim], query: RouteQuery, trail: list[Step]) -> Claim:
    """Return what the first of these says that claims a request; the last one always does."""
    claims = (find_claim(query, trail) for find_claim in order)
    return next(claim for claim in claims if claim is not None)


def tell_tags(requested_model: str, sent_models: Iterable[str | None]) -> Iterator[Step]:
    """Yield what the trail says of models that are sent with a tag which a client has added.

    The tag is not dropped here: for that the server has to be asked whether it lists the name, and
    only a request that is translated asks (section 14). The trail says what comes of it.
    """
    for model in dict.fromkeys(sent_models):
        if model and requested_model.endswith(LATEST_TAG) and model.endswith(LATEST_TAG):
            untagged = cut_name(without_tag(model))
            why = f"translated for a server that does not list it, it is {untagged!r}"
            yield Step(LATEST_TAG, True, why)


def resolve(
    table: RoutingTable,
    requested_model: str,
    source_host: str,
    catalogue: Catalogue = EMPTY_CATALOGUE,
) -> Decision:
    """Return where a request for a model from a host goes, and everything that was tried."""
    trail: list[Step] = []
    mapped_model = map_model(table.model_map, requested_model, trail)
    names = names_to_try(requested_model, mapped_model) if requested_model else ()
    query = RouteQuery(
        table=table,
        requested_model=requested_model,
        mapped_model=mapped_model,
        names=names,
        source_host=source_host,
        source_address=parse_source_host(source_host),
        catalogue=catalogue,
    )
    claim = first_claim(ROUTE_ORDER, query, trail)
    ruling = claim
    if not claim.target.instances and claim.route != UNCLAIMED:
        # The rule says the model alone. Its template may have become nothing.
        model = claim.target.model or mapped_model
        query = query._replace(requested_model=model, mapped_model=model, names=names_to_try(model))
        claim = first_claim(SERVER_ORDER, query, trail)
    # An instance that names no model is asked for the mapped one, or for that of the rule.
    instances = tuple(
        Instance(catalogue.with_api(instance.server), instance.model or query.mapped_model)
        for instance in claim.target.instances
    )
    # A name that was found on a list is one that its server knows.
    if claim.route != BY_LIST:
        trail += tell_tags(requested_model, [instance.model for instance in instances])
    return Decision(
        requested_model=requested_model,
        mapped_model=mapped_model,
        route=ruling.route,
        strategy=claim.target.strategy,
        instances=instances,
        trail=tuple(trail),
        found_by=claim.route,
        thinking=ruling.target.thinking,
        priority=ruling.target.priority or claim.target.priority or NORMAL,
        parameters=ruling.target.parameters,
    )


# Within a second, the requests for a model have the same ages. Few are worth remembering: they are
# others a second later.
@functools.lru_cache(maxsize=64)
def tell_ages(decision: Decision, ages: tuple[int | None, ...]) -> Decision:
    """Return a decision by lists whose last step says how old they are, in s; None: fixed ones.

    The ages are no part of what `decide` remembers, because they change with each second.
    """
    step = Step(BY_LIST, True, listing_words(decision.instances, ages))
    return decision._replace(trail=(*decision.trail[:-1], step))


def resolve_default(table: RoutingTable, source_host: str) -> Decision:
    """Return where a request goes that names no model: to the default server.

    There is nothing that a rule could look at; one for a source host alone does not count either.
    """
    return resolve(dataclasses.replace(table, rules=(), model_map=()), "", source_host)


def find_server(table: RoutingTable, name: str) -> Server:
    """Return the server of a name. Raises NotFound."""
    # With two servers of one name, the one of the routing file is last, and counts.
    servers = {server.name: server for server in table.all_servers()}
    if name not in servers:
        names = ", ".join(list(servers)[:NAMES_IN_ERROR]) or "none"
        raise NotFound(f"no such server {name[:80]!r}; there are {names}")
    return servers[name]


def resolve_server(table: RoutingTable, name: str, model: str) -> Decision:
    """Return where a request goes that names its server itself. Raises NotFound."""
    return Decision(
        requested_model=model,
        mapped_model=model,
        route=f"upstream {name}",
        strategy="failover",
        instances=(Instance(find_server(table, name), model),),
        trail=(Step("upstream", True, f"the path names server {name!r}"),),
    )


# The same few clients ask for the same few models, and need not be decided about each time. Only
# so many decisions are kept, because the trail of each has a step for every rule of the table.
remembered_decision = functools.lru_cache(maxsize=LIMITS.decisions)(resolve)


def decide(
    table: RoutingTable,
    requested_model: str,
    source_host: str,
    catalogue: Catalogue = EMPTY_CATALOGUE,
) -> Decision:
    """Return what `resolve` does, from memory where that can be; long names are not kept."""
    if len(requested_model) > LIMITS.pattern_name:
        return resolve(table, requested_model, source_host, catalogue)
    return remembered_decision(table, requested_model, source_host, catalogue)


# ======================================================================================
# 10  Access (pure)
# ======================================================================================
# Who may do what. A request passes three questions: does it come from a page of somebody else
# (`check_browser`), does the policy of its endpoint want a token (`needs_token`), and has it got
# a valid one (`TokenGuard`), whose scopes limit what it is good for (`check_models`)? Each rule
# here stands against one attack, which it names.
#
# Nothing fails open: what cannot be checked is refused. The time is always an argument. A new
# rule for browsers goes into `check_browser`, a new proxy field into PROXY_FIELDS, and a test
# with the attack's name beside it.

# --- tokens ---------------------------------------------------------------------------
# JSON Web Tokens (RFC 7519), with one signature algorithm and no choice of it.

TOKEN_COOKIE = "smolrouter_token"
TOKEN_FIELDS = ("x-smolrouter-token", "authorization", "x-api-key", "cookie")
BASE64URL = re.compile(r"[A-Za-z0-9_-]+")
SECONDS_A_DAY = 86400
# The end of the year 9999, in s UTC.
LATEST_MOMENT = 253_402_300_799
# No browser keeps a cookie for longer.
LONGEST_COOKIE = 400 * SECONDS_A_DAY
RATE = re.compile(r"([1-9][0-9]{0,8})/([smhd])")
RATE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": SECONDS_A_DAY}
# The claims that limit what a token is good for, and those that say whose it is.
CLAIM_TYPES = {"sub": str, "jti": str, "models": list, "rate": str, "api_only": bool}


class Rate(NamedTuple):
    """How many requests a token may make within a second, minute, hour or day: `60/m`."""

    requests: int
    unit: str

    @property
    def seconds(self) -> int:
        """How long its unit is, in s."""
        return RATE_UNITS[self.unit]

    def __str__(self) -> str:
        return f"{self.requests}/{self.unit}"


class Token(NamedTuple):
    """What a token that this router has signed says. It is valid between its two moments."""

    # The `jti`, by which it is revoked and its requests are counted. A token that was made without
    # one is known by itself.
    identity: str
    subject: str
    begins_at: float
    expires_at: float
    # Globs over the names of models that it may ask for; None: it may ask for all.
    models: tuple[str, ...] | None
    rate: Rate | None
    api_only: bool


def parse_rate(text: str) -> Rate:
    """Read a rate: '60/m' -> Rate(60, "m"). Raises ValueError."""
    match = RATE.fullmatch(text)
    if match is None:
        raise ValueError("allowed is a number for each second, minute, hour or day, such as 60/m")
    return Rate(int(match[1]), match[2])


def parse_globs(text: str) -> tuple[str, ...]:
    """Read globs: 'llama*, coding-assistant' -> ('llama*', 'coding-assistant'). ValueError."""
    globs = tuple(glob.strip() for glob in text.split(","))
    allowed = "allowed are names of models with commas between, such as 'llama*,coding-assistant'"
    require(all(globs), allowed)
    for glob in globs:
        name, mark, _ = glob.partition(" [")
        remedy = f"write {name!r}, which counts for {glob!r}, too"
        require(not (mark and glob.endswith("]")), f"{glob!r} names a server; {remedy}")
        is_pattern = len(glob) > 2 and glob.startswith("/") and glob.endswith("/")
        require(not is_pattern, f"{glob!r} is a regular expression; {allowed}")
    return globs


def encode_base64url(data: bytes) -> bytes:
    """Return unpadded base64url (RFC 7515 section 2): b'\\xfb\\xff' -> b'-_8'."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def decode_base64url(text: str) -> bytes:
    """Return what unpadded base64url says, b"" when it is none: '-_8' -> b'\\xfb\\xff'."""
    # Python's decoder skips characters that do not belong there. Many spellings of one token
    # would be valid.
    if not BASE64URL.fullmatch(text):
        return b""
    padding = "=" * (-len(text) % 4)
    try:
        return base64.urlsafe_b64decode(text + padding)
    except ValueError:
        return b""


def sign(signed: bytes, secret: str) -> bytes:
    """Return the signature HS256 of the first two parts of a token (RFC 7518 section 3.2)."""
    return hmac.digest(secret.encode(), signed, "sha256")


def encode_token(secret: str, subject: str, now: float, days: float, **more: Any) -> str:
    """Return a token for `subject` that expires after `days`; `now` is UTC, s.

    `more` are further claims, such as `jti` and `models`. The token is
    'header.claims.signature', each part in base64url.
    """
    header = {"alg": "HS256", "typ": "JWT"}
    claims = {"sub": subject, "iat": int(now), "exp": int(now + days * SECONDS_A_DAY), **more}
    signed = encode_base64url(encode_json(header)) + b"." + encode_base64url(encode_json(claims))
    signature = encode_base64url(sign(signed, secret))
    return f"{signed.decode()}.{signature.decode()}"


def is_moment(value: Any) -> bool:
    """Tell whether a claim is a number of seconds; JSON's true and false are none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # 1e999 is JSON and infinite: that token would never expire. With an integer of 400 digits
    # nothing can be calculated.
    return is_number and abs(value) <= LATEST_MOMENT


def parse_token_part(part: str) -> dict[str, Any] | None:
    """Return the JSON object in a part of a token, None for anything else; NaN is no JSON."""
    try:
        _, document = parse_json(decode_base64url(part))
    except RouterError:
        return None
    return document if isinstance(document, dict) else None


def read_claims(token: str, secret: str) -> dict[str, Any]:
    """Return the claims of a token that this router has signed (RFC 8725). Raises ValueError.

    `header.claims.signature`  ->  {"sub": "alice", "exp": 2000}
    """
    parts = token.split(".")
    is_jwt = len(token) <= LIMITS.token and len(parts) == 3 and token.isascii()
    require(is_jwt, "the token is not a JWT")
    header = parse_token_part(parts[0])
    claims = parse_token_part(parts[1])
    # The token itself says how it is signed. Who believes that accepts `none`, or a public key
    # as the secret of an HMAC (RFC 8725 section 3.1). `crit` names extensions that must be
    # understood, and none is.
    if header is None or claims is None or header.get("alg") != "HS256" or "crit" in header:
        raise ValueError("the token is not a JWT signed with HS256")
    signed = token.rpartition(".")[0].encode()
    # In constant time: how long a comparison takes would tell how many octets are right.
    is_ours = hmac.compare_digest(sign(signed, secret), decode_base64url(parts[2]))
    require(is_ours, "the token's signature is wrong")
    return claims


def is_own_token(token: str, secret: str) -> bool:
    """Tell whether this router has signed a token, valid or not."""
    try:
        read_claims(token, secret)
    except ValueError:
        return False
    return True


def refuse_token(reason: str) -> Unauthorized:
    """Return the error for a request without a token that is valid."""
    return Unauthorized(
        f"{reason}; send it as Authorization: Bearer or X-SmolRouter-Token",
        ("WWW-Authenticate", "Bearer"),
    )


def parse_claims(claims: Mapping[str, Any], token: str) -> Token:
    """Read the claims of a token (RFC 7519 section 4.1). Raises ValueError with a claim's name.

    `{"exp": 2000, "jti": "3f2a", "rate": "60/m"}`  ->
    Token("3f2a", "", 0, 2000, None, Rate(60, "m"), False)
    """
    # A token without an end could never be taken back.
    require(is_moment(claims.get("exp")), "exp")
    require(is_moment(claims.get("nbf", 0)), "nbf")
    for name, kind in CLAIM_TYPES.items():
        # An empty value of its kind stands for a claim that is missing; null does not.
        require(isinstance(claims.get(name, kind()), kind), name)
    models = None
    if "models" in claims:
        models = tuple(claims["models"])
        require(all(isinstance(glob, str) for glob in models), "models")
    rate = None
    if "rate" in claims:
        require(RATE.fullmatch(claims["rate"]), "rate")
        rate = parse_rate(claims["rate"])
    return Token(
        identity=claims.get("jti") or token,
        subject=claims.get("sub", ""),
        begins_at=claims.get("nbf", 0),
        expires_at=claims["exp"],
        models=models,
        rate=rate,
        api_only=claims.get("api_only", False),
    )


@functools.lru_cache(maxsize=256)
def read_token(token: str, secret: str) -> Token:
    """Return what a token says, whenever that is valid; clients send theirs with each request.

    Raises ValueError when it is not this router's, and Unauthorized when it is, but has a claim
    that cannot be read, which may have been meant as a limit.
    """
    claims = read_claims(token, secret)
    try:
        return parse_claims(claims, token)
    except ValueError as error:
        raise refuse_token(f"the token has no valid `{error}`") from None


def find_valid(
    tokens: Iterable[str], secret: str, revoked: Container[str], now: float
) -> tuple[Token | None, str]:
    """Return the first token that is valid now, or None and why the last one is not.

    One that is valid is enough: Authorization may be the server's own. Raises Unauthorized for one
    that was revoked, or has a claim that cannot be read, also where none is needed: otherwise to
    revoke a token could open what its scopes had closed.
    """
    reason = "a token is needed"
    for token in tokens:
        try:
            found = read_token(token, secret)
        except ValueError as error:
            reason = str(error)
            continue
        if found.identity in revoked:
            raise refuse_token("the token was revoked")
        if found.begins_at <= now < found.expires_at:
            return found, ""
        reason = "the token is not valid yet"
        if now >= found.expires_at:
            reason = "the token has expired"
    return None, reason


def find_tokens(fields: Fields, cookie_counts: bool) -> list[str]:
    """Return the tokens that a request carries.

    `X-SmolRouter-Token: a`, `Authorization: Bearer b`, `x-api-key: c` and
    `Cookie: smolrouter_token=d`  ->  ['a', 'b', 'c', 'd']

    A browser sends the cookie by itself, whoever made it send the request. So the cookie counts
    only where the request is known to come from the router's own page.
    """
    tokens = list(fields.get_all("x-smolrouter-token"))
    for value in fields.get_all("authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            tokens.append(token.strip(" \t"))
    # Anthropic's clients have no other place for a key.
    tokens += fields.get_all("x-api-key")
    if cookie_counts:
        for pair in ";".join(fields.get_all("cookie")).split(";"):
            name, _, value = pair.strip(" \t").partition("=")
            if name == TOKEN_COOKIE:
                tokens.append(value)
    return tokens


def without_token_cookie(cookies: str) -> str:
    """Return the value of Cookie without ours: 'a=b; smolrouter_token=x'  ->  'a=b'."""
    pairs = [pair.strip(" \t") for pair in cookies.split(";")]
    return "; ".join(pair for pair in pairs if pair.partition("=")[0].rstrip() != TOKEN_COOKIE)


def without_tokens(fields: Fields, secret: str | None) -> Fields:
    """Return the fields without what was meant for the router alone.

    A server that got the token could use the router, and everything behind it, in its owner's name.
    """
    if not any(fields.get(name) for name in TOKEN_FIELDS):
        return fields
    kept = []
    for lower, name, value in fields.lines:
        if lower == "x-smolrouter-token":
            continue
        # Both are the server's own, unless they hold a token of this router. One that is not valid
        # any more was meant for it, too.
        if lower in ("authorization", "x-api-key") and secret:
            token = value.partition(" ")[2].strip(" \t") if lower == "authorization" else value
            if is_own_token(token, secret):
                continue
        if lower == "cookie" and TOKEN_COOKIE in value:
            value = without_token_cookie(value)
            if not value:
                continue
        kept.append((lower, name, value))
    return Fields(kept)


def encode_cookie(token: str, now: float, secure: bool) -> tuple[str, str]:
    """Return the field that lets a browser keep a valid token until it expires.

    An empty token has no time left: the browser drops the one that it has. HttpOnly keeps the
    cookie from scripts, SameSite=Strict from requests that other sites cause, and Secure (for
    those who came by https) from the open network.
    """
    # The claims stand between the two dots.
    claims = parse_object(decode_base64url(token.partition(".")[2].partition(".")[0])) or {}
    max_age = int(min(claims.get("exp", now) - now, LONGEST_COOKIE))
    attributes = f"Max-Age={max_age}; Path=/; HttpOnly; SameSite=Strict"
    if secure:
        attributes += "; Secure"
    return "Set-Cookie", f"{TOKEN_COOKIE}={token}; {attributes}"


class TokenGuard:
    """Checks tokens, and counts: failures by address, requests by token.

    After ten failures a minute an address gets 429 for the next one. A valid token passes all the
    same: otherwise one client could lock out all others that share its address, and nobody finds a
    signature of 256 bits by trying. All that the 429 hides from who tries is what was wrong with
    his token.

    A token with a rate of 60/m gets 60 requests within the minute that its first one begins, and
    then 429 until that minute is over.
    """

    def __init__(self, secret: str | None, limits: Limits = LIMITS) -> None:
        self.secret = secret
        self.limits = limits
        # For each address the moments of its failures in the window, the first ten at most. The
        # address that has not failed for the longest time stands first.
        self.failures: dict[str, list[float]] = {}
        # For each token when its window began, and its requests since. The one that was used least
        # recently stands first.
        self.requests: dict[str, tuple[float, int]] = {}

    def find(self, tokens: Iterable[str], revoked: Container[str], now: float) -> Token | None:
        """Return the valid token of a request that needs none; `now` is UTC, s.

        Raises Unauthorized for one that was revoked or cannot be read.
        """
        if self.secret is None:
            return None
        found, _ = find_valid(tokens, self.secret, revoked, now)
        return found

    def check(
        self, tokens: Sequence[str], source_host: str, revoked: Container[str], now: float
    ) -> Token:
        """Return the valid token of a request that needs one; `now` is UTC, s.

        Raises Forbidden, Unauthorized or TooManyRequests.
        """
        if self.secret is None:
            raise Forbidden(
                "a token is needed here, and without JWT_SECRET there is none: only "
                "direct connections are served; set JWT_SECRET"
            )
        try:
            found, reason = find_valid(tokens, self.secret, revoked, now)
            if found is None:
                raise refuse_token(reason)
        except Unauthorized:
            # A request without any token is no attempt to guess one.
            if not tokens or not self.count_failure(source_host, now):
                raise
            wait = int(self.limits.token_failure_window - (now - self.failures[source_host][0])) + 1
            raise TooManyRequests(
                "too many failed tokens from this address", ("Retry-After", str(wait))
            ) from None
        return found

    def count_request(self, token: Token, now: float) -> None:
        """Count a request of a token that has a rate; `now` is monotonic, s.

        Raises RateExceeded above the rate. Such a request does not count.
        """
        if token.rate is None:
            return
        begins_at, count = self.requests.pop(token.identity, (now, 0))
        if now - begins_at >= token.rate.seconds:
            begins_at = now
            count = 0
        if len(self.requests) >= self.limits.counted_tokens:
            oldest = next(iter(self.requests))
            del self.requests[oldest]
        has_room = count < token.rate.requests
        self.requests[token.identity] = (begins_at, count + has_room)
        if not has_room:
            wait = math.ceil(begins_at + token.rate.seconds - now)
            raise RateExceeded(
                f"the token's rate is {token.rate}; try again in {wait} s",
                ("Retry-After", str(wait)),
            )

    def count_failure(self, source_host: str, now: float) -> bool:
        """Count a failure; tell whether the address had all that it may have before this one."""
        window = self.limits.token_failure_window
        earlier = self.failures.pop(source_host, ())
        # A clock that was put back leaves moments of the future; they count as recent.
        recent = [moment for moment in earlier if now - moment < window]
        if len(self.failures) >= self.limits.token_failure_addresses:
            oldest = next(iter(self.failures))
            del self.failures[oldest]
        # The first ones are kept: an address may fail again when the oldest leaves the window.
        self.failures[source_host] = [*recent, now][: self.limits.token_failures]
        return len(recent) >= self.limits.token_failures


# --- scopes ---------------------------------------------------------------------------


def check_webui(token: Token | None) -> None:
    """Refuse a token that does not open the Web UI. Raises Forbidden."""
    if token and token.api_only:
        raise Forbidden("the token is for the model API alone; it opens no Web UI")


def may_use(token: Token | None, model: str, table: RoutingTable) -> bool:
    """Tell whether a token is good for a model, as its client names it; without one all are.

    A token for `llama*` is good for `llama3`, `llama3:latest` and `llama3 [gpu]`, where `gpu` is a
    server.
    """
    if token is None or token.models is None:
        return True
    pin = find_pin(table, model)
    names = names_to_try(pin.model if pin else model)
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in token.models)


def check_models(token: Token | None, models: Iterable[str], table: RoutingTable) -> None:
    """Refuse a request for models of which its token is not good for all. Raises Forbidden."""
    if token is None or token.models is None:
        return
    for model in models:
        if may_use(token, model, table):
            continue
        wanted = f"not for {model[:80]!r}" if model else "and the request names no model"
        raise Forbidden(f"the token is for the models {', '.join(token.models)}; {wanted}")


def check_unlimited(token: Token | None) -> None:
    """Refuse a token for some models alone where any could be made or asked. Raises Forbidden.

    Otherwise a token for `llama*` could make a `llama-2` that is another model.
    """
    if token and token.models is not None:
        listed = ", ".join(token.models)
        raise Forbidden(f"the token is for the models {listed}; this needs one without that limit")


def requested_models(parsed: ParsedRequest) -> Iterator[str]:
    """Yield every name by which a request may choose its model; "" stands for none.

    Servers in Go read `Model` like `model`, and the later one wins. Some providers take the names
    of others from `models` when they are short of the first.

    `{"model": "a", "MODEL": "b", "models": ["c"]}`  ->  'a', 'a', 'b', 'c'
    """
    yield parsed.model
    members = (*parsed.protocol.model_members, "models")
    for name, value in parsed.document.items():
        if value and name.lower() in members:
            yield from map(str, value if isinstance(value, list) else [value])


# --- policies -------------------------------------------------------------------------

# A request with one of these, or with an X-Forwarded- field, was forwarded by somebody.
PROXY_FIELDS = (
    "forwarded",
    "via",
    "x-real-ip",
    "x-original-forwarded-for",
    "cf-connecting-ip",
    "cf-ray",
    "true-client-ip",
)


def is_proxied(fields: Fields) -> bool:
    """Tell whether a proxy field says that somebody else forwarded the request.

    The value does not matter, an empty one counts. A name in `Connection` counts like the field
    itself: `Connection: X-Forwarded-For` makes a proxy on the way drop that field, so that the
    request would look like one from the house.
    """
    names = [lower for lower, _, _ in fields.lines]
    names += fields.elements("connection")
    return any(name in PROXY_FIELDS or name.startswith("x-forwarded-") for name in names)


def needs_token(policy: str, fields: Fields) -> bool:
    """Tell whether a policy wants a token from a request with these fields."""
    if policy == "AUTH_WHEN_PROXIED":
        return is_proxied(fields)
    return policy == "ALWAYS_AUTH"


# --- browsers -------------------------------------------------------------------------
# A browser inside the house carries pages from everywhere, and they can make it send requests.
# What they may not is to use the router or to read an answer of it.

# The public DNS knows no names under these, so that nobody outside can own one.
LOCAL_SUFFIXES = (
    ".local",
    ".lan",
    ".home",
    ".internal",
    ".home.arpa",
    ".localhost",
    ".localdomain",
)
# Of every answer of the Web UI: no cache keeps it, no frame shows it, no other site embeds it.
GUARDED_FIELDS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
# Of a server's answer that a browser shows as a page: a script that a model wrote into it must
# not run as if it were the router's.
INERT_FIELDS = [
    ("Content-Security-Policy", "sandbox allow-downloads"),
    ("X-Content-Type-Options", "nosniff"),
]


class BrowserRules(NamedTuple):
    """The Hosts and Origins that a browser may use, beside those that are always allowed."""

    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    machine_name: str


def host_name(host: str) -> str:
    """Return the name or address in a Host: without port and brackets, in lower case.

    'Box.Lan:1234' -> 'box.lan'; '[::1]:1234' -> '::1'; 'box.lan.' -> 'box.lan'
    """
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def is_web_host(host: str, allowed: Sequence[str], machine: str) -> bool:
    """Tell whether a browser may use the router by this Host: no stranger can own such a name.

    DNS rebinding: evil.example answers with the stranger's address at first and with this machine's
    a moment later. The page that came from there then asks the router as its own origin, and no
    browser stops it. But its requests still say `Host: evil.example`.
    """
    name = host_name(host)
    if not name:
        return False
    # No public name is without a dot, and an address was looked up nowhere.
    if "." not in name or is_address(name):
        return True
    if name.endswith(LOCAL_SUFFIXES) or name == machine.lower():
        return True
    return name in allowed or host.lower() in allowed


def is_own_page(fields: Fields, host: str) -> bool:
    """Tell whether a browser says that the router's own page asks."""
    origin = (fields.get("origin") or "").lower()
    # Without an Origin, as in a GET of the page itself, newer browsers say it in another field.
    if not origin:
        return fields.get("sec-fetch-site") == "same-origin"
    host = host.lower()
    over_http = f"http://{host.removesuffix(':80')}"
    over_https = f"https://{host.removesuffix(':443')}"
    return origin in (over_http, over_https)


def origin_allowed(origin: str, allowed: Sequence[str], webui: bool) -> bool:
    """Tell whether a page from `origin` may call; the Web UI wants it named in full."""
    origin = origin.lower()
    if origin in allowed:
        return True
    # `*` and `loopback` open the model API alone: the Web UI shows what everybody asked.
    if webui:
        return False
    if "*" in allowed:
        return True
    scheme, _, authority = origin.partition("://")
    # `app://obsidian.md` is an app on its owner's machine, and such hosts are often random.
    if f"{scheme}:" in allowed:
        return True
    if "loopback" not in allowed or scheme not in ("http", "https"):
        return False
    name = host_name(authority)
    return name in ("localhost", "::1") or (is_address(name) and name.startswith("127."))


def origin_remedy(origin: str, webui: bool) -> str:
    """Return what to add to ALLOWED_ORIGINS: 'app://obsidian.md' -> 'app:', others in full."""
    scheme, mark, _ = origin.lower().partition("://")
    if mark and not webui and scheme not in ("http", "https"):
        return f"{scheme}:"
    return origin.lower()


def is_browser(fields: Fields) -> bool:
    """Tell whether a request comes from a browser and not from a program, as far as can be seen.

    A browser sends Sec-Fetch-Site, but only to https and loopback. Elsewhere two other fields give
    it away, which all browsers send and hardly a program does.
    """
    if fields.get("sec-fetch-site") not in (None, "none"):
        return True
    user_agent = fields.get("user-agent") or ""
    return "Mozilla/" in user_agent and bool(fields.get("accept-language"))


def check_browser(
    fields: Fields, host: str, webui: bool, rules: BrowserRules
) -> list[tuple[str, str]]:
    """Refuse a page from elsewhere; return the fields that the answer must have.

    `webui` tells whether the request is for the Web UI, which is stricter than the model API.
    Raises MisdirectedRequest or Forbidden.
    """
    origin = fields.get("origin")
    # DNS rebinding. Programs may use the model API by any name: there a wrong Host alone is refused
    # only to what looks like a browser. A request with an Origin is judged below, where a page of
    # that Host does not count as the router's own.
    host_is_good = is_web_host(host, rules.allowed_hosts, rules.machine_name)
    if not host_is_good and (webui or (origin is None and is_browser(fields))):
        raise MisdirectedRequest(
            f"a browser may not use the router as {host[:80]!r}; add it to ALLOWED_HOSTS"
        )
    # Cross-site request forgery, and scripts that read answers: the page says where it is from.
    if origin is not None:
        own_page = host_is_good and is_own_page(fields, host)
        if not own_page and not origin_allowed(origin, rules.allowed_origins, webui):
            remedy = f"add {origin_remedy(origin[:80], webui)} to ALLOWED_ORIGINS"
            raise Forbidden(f"origin {origin[:80]!r} is not allowed; {remedy}")
    # An image or a script element of another site sends no Origin. A link is harmless: its answer
    # is shown to the person, and not to the site.
    from_elsewhere = fields.get("sec-fetch-site") in ("cross-site", "same-site")
    is_link = fields.get("sec-fetch-dest") == "document"
    if origin is None and from_elsewhere and not is_link:
        raise Forbidden("a page from elsewhere may link to the router, but not embed its answers")
    added: list[tuple[str, str]] = []
    if not webui and "text/html" in (fields.get("accept") or ""):
        added += INERT_FIELDS
    if origin:
        added += [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
    return added


@remember_short
def check_browser_head(
    head: RequestHead, webui: bool, rules: BrowserRules
) -> list[tuple[str, str]]:
    """Do what `check_browser` does, and remember it for this head; the list must stay as it is."""
    return check_browser(head.fields, head.host, webui, rules)


# --- proxies --------------------------------------------------------------------------


def is_trusted(address: str, trusted: Sequence[IPNetwork]) -> bool:
    """Tell whether an address belongs to a trusted proxy."""
    if not is_address(address):
        return False
    number = ipaddress.ip_address(address)
    return any(number in network for network in trusted)


def client_address(peer: str, fields: Fields, trusted: Sequence[IPNetwork]) -> str:
    """Return the address of the client; `peer` is who has connected.

    A peer of 10.0.0.1, which is trusted, and `X-Forwarded-For: 1.1.1.1, 192.168.0.7`  ->
    '192.168.0.7'

    Each proxy appends whom it got the request from. So the field is read from the right, as long as
    the one who wrote an element is trusted: what stands further to the left is the client's own
    invention, to pass for another source host.
    """
    if not trusted:
        return peer
    hops = ",".join(fields.get_all("x-forwarded-for")).split(",")
    address = peer
    while hops and is_trusted(address, trusted):
        # A zone, as in `fe80::1%eth0`, is a machine's own name for a link, of any length. It means
        # nothing to another machine.
        hop = hops.pop().strip(" \t").partition("%")[0]
        if not is_address(hop):
            break
        address = hop
    return address


# --- secrets --------------------------------------------------------------------------
# What is hidden before anything of a request is kept, printed or shown, so that the log gives
# nobody access. A fingerprint takes the place of a secret: the owner still sees which of his keys
# was used. A secret is known by its name, in the fields of both heads and in a query. Wherever it
# stands besides (servers repeat keys in their errors) it is found by its value: `find_secrets`
# gathers what must not be kept of a request, and `hide_secrets` looks for that.

# How the names of secret fields and parameters end.
SECRET_NAME = re.compile(
    r"(?:authorization|cookie2?|key|token|secret|password|passwd|passphrase|credentials?|sig"
    r"|signature|assertion|session-?id|oidc-data|oidc-identity|dpop)$"
    # These are the ends of harmless words, too: `bypass`, `status-code`.
    r"|(?:^|-)(?:jwt|auth|pass|pwd)$|^code$"
)
# A parameter, in a target or in a URL that is a field's value.
QUERY_VALUE = re.compile(r"""([?&#])([^=&#\s"<>]*)=([^&#\s"<>]*)""")
SCHEME_AND_SECRET = re.compile(r"((?:bearer|basic|dpop) )?(.*)", re.IGNORECASE | re.DOTALL)
NO_FIELDS = Fields([])
# Secrets as they may stand in a text, each with what takes its place.
Secrets = tuple[tuple[bytes, bytes], ...]


def is_secret_name(name: str) -> bool:
    """Tell whether a field or a parameter of this name carries a secret.

    `X-Api-Key`, `access_token`, `Set-Cookie`, `api%5Fkey`  ->  True
    """
    plain = urllib.parse.unquote(name).lower().replace("_", "-")
    return SECRET_NAME.search(plain) is not None


def hide_secret(secret: str) -> str:
    """Return a fingerprint in a secret's place; a scheme before it stays.

    `Bearer sk-abc`  ->  `Bearer ***` and the first eight digits of the SHA-256 of `sk-abc`
    """
    scheme, value = SCHEME_AND_SECRET.fullmatch(secret).groups("")
    if not value:
        return secret
    digest = hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()
    return f"{scheme}***{digest[:8]}"


def hide_query_value(match: re.Match[str]) -> str:
    """Return a match of QUERY_VALUE, its value hidden when it is a secret."""
    mark, name, value = match.groups()
    if is_secret_name(name):
        value = hide_secret(value)
    return f"{mark}{name}={value}"


def hide_parameters(text: str) -> str:
    """Return a request-target, or the value of a field, with the secrets in its query hidden.

    `/v1/models?key=abc&a=b`  ->  `/v1/models?key=***ba7816bf&a=b`
    """
    if "=" not in text:
        return text
    return QUERY_VALUE.sub(hide_query_value, text)


def spell_secret(secret: str) -> Secrets:
    """Return how a secret may be spelled in a text, each time with its fingerprint.

    A secret that is so short that a text may hold the same letters by chance is not looked for.

    `a/b...`  ->  as it is, and in JSON or in a URL: `a\\/b...`, `a\\u002fb...`, `a%2Fb...`
    """
    if len(secret) < LIMITS.echoed_secret:
        return ()
    fingerprint = hide_secret(secret).encode()
    spellings = [secret]
    # Nobody escapes what most keys consist of.
    if not secret.replace("-", "").replace("_", "").isalnum():
        quoted = json.dumps(secret)[1:-1]
        signs = re.compile(r"[^\w.~-]", re.ASCII)
        spellings += [
            quoted,
            quoted.replace("/", "\\/"),
            signs.sub(lambda sign: f"\\u{ord(sign[0]):04x}", secret),
            signs.sub(lambda sign: f"\\u{ord(sign[0]):04X}", secret),
            urllib.parse.quote(secret, ""),
        ]
    encoded = [spelling.encode("utf-8", "replace") for spelling in spellings]
    return tuple((spelling, fingerprint) for spelling in dict.fromkeys(encoded))


def secrets_in_field(name: str, value: str) -> list[str]:
    """Return the secrets in the value of a field, without schemes and the names of cookies.

    `Authorization`, `Bearer sk-abc`  ->  `sk-abc`;  `Cookie`, `a=1; b=2`  ->  `1`, `2`
    """
    if name == "cookie":
        return [cookie.partition("=")[2].strip() for cookie in value.split(";")]
    return [value.rpartition(" ")[2]]


class ShownFields(NamedTuple):
    """What may be kept and shown of a head's field lines."""

    # JSON: a list of names and values, secrets hidden.
    lines: str
    user_agent: str
    # The fingerprint of the client's key.
    client_key: str
    # The secrets among the values.
    secrets: Secrets


@remember_short
def show_fields(fields: Fields) -> ShownFields:
    """Return what may be kept and shown of field lines; clients and servers repeat theirs."""
    shown: list[tuple[str, str]] = []
    secrets: list[tuple[bytes, bytes]] = []
    for lower, name, value in fields.lines:
        if is_secret_name(lower):
            for secret in secrets_in_field(lower, value):
                secrets += spell_secret(secret)
            value = hide_secret(value)
        # A Location or a Referer may have them in its query.
        shown.append((name, hide_parameters(value)))
    key = fields.get("authorization") or fields.get("x-api-key") or fields.get("api-key") or ""
    return ShownFields(
        lines=dump_compact(shown),
        user_agent=fields.get("user-agent") or "",
        # `Bearer ***1a2b3c4d` -> `1a2b3c4d`
        client_key=hide_secret(key).rpartition("***")[2],
        secrets=tuple(secrets),
    )


@functools.lru_cache(maxsize=4)
def server_secrets(table: RoutingTable) -> Secrets:
    """Return the secrets that the routing file gives to servers: their keys, and fields of them."""
    secrets: list[tuple[bytes, bytes]] = []
    for server in table.all_servers():
        if server.api_key:
            secrets += spell_secret(server.api_key)
        for name, value in server.headers:
            if is_secret_name(name):
                for secret in secrets_in_field(name.lower(), value):
                    secrets += spell_secret(secret)
    return tuple(dict.fromkeys(secrets))


def query_secrets(target: str) -> Secrets:
    """Return the secrets in the query of a target."""
    if "?" not in target:
        return ()
    secrets: list[tuple[bytes, bytes]] = []
    for _, name, value in QUERY_VALUE.findall(target):
        if is_secret_name(name):
            secrets += spell_secret(value)
            secrets += spell_secret(urllib.parse.unquote_plus(value))
    return tuple(secrets)


def find_secrets(fields: Fields, target: str, table: RoutingTable | None) -> Secrets:
    """Return what must not be kept of a request: secrets of its client, and of its servers."""
    own = show_fields(fields).secrets + query_secrets(target)
    return own + server_secrets(table) if table else own


def hide_secrets(content: bytes, secrets: Secrets) -> bytes:
    """Return a decoded content without the secrets that it repeats.

    `Incorrect API key provided: sk-abc...`  ->  `Incorrect API key provided: ***1a2b3c4d`
    """
    for secret, fingerprint in secrets:
        content = content.replace(secret, fingerprint)
    return content


def hide_in_text(text: str, secrets: Secrets) -> str:
    """Do what `hide_secrets` does, for a text; lone surrogates become `?`."""
    if not secrets and text.isascii():
        return text
    return hide_secrets(text.encode("utf-8", "replace"), secrets).decode()


def hide_cut_secret(content: bytes, secrets: Secrets) -> bytes:
    """Return a content that was cut without the beginning of a secret at its end."""
    for secret, _ in secrets:
        for size in range(len(secret) - 1, LIMITS.echoed_secret // 2, -1):
            if content.endswith(secret[:size]):
                return content[:-size]
    return content


# ======================================================================================
# 11  HTTP on streams
# ======================================================================================
# The only code that awaits octets. A `Connection` is one TCP connection, to a client or to an
# upstream; a `ContentReader` reads one content from it, a `ResponseWriter` writes one response
# to it, and a `Request` puts together what a handler needs. What the octets mean is decided in
# section 3. One rule holds it together: whoever reads a content to its end leaves its
# connection at the first octet of the next message, and whoever does not closes it.

REASONS = {status.value: status.phrase for status in http.HTTPStatus}
NEVER = float("inf")


class Timeout(NamedTuple):
    """What is raised when a deadline passes: an error, and its message.

    The connection puts its limits into the message, as in `slower than {limits.content_rate}`.
    """

    error: type[RouterError]
    message: str


# For connections on which no request runs: they just end, and nobody gets to see the message.
IDLE_TOO_LONG = Timeout(RequestTimeout, "nothing came for too long")
READS_NOTHING = Timeout(ClientClosed, "nothing read for {limits.write_timeout:.0f} s")
CONTENT_TOO_SLOW = Timeout(
    RequestTimeout, "the content came slower than {limits.content_rate} bytes/s"
)


class LoopBatch:
    """What all connections do together: send at the end of a turn, look at deadlines, hold memory.

    In one turn the event loop handles all that has come on any connection. What is written
    meanwhile leaves when the turn is over, in one piece for each connection. So a head and the
    content behind it are one packet, and a client process that sleeps is woken once: to wake it
    costs as much as all that the router does for an event.

    A timer for each deadline would be set and cancelled with each request. Instead one timer
    looks at all connections, four times a second; while there are none, nothing runs. It also
    looks for clients that have heard nothing for long (`ResponseWriter.set_on_silence`).

    What a relay writes waits for its client up to `limits.write_buffer`, and is then written no
    further. An answer of the router's own is written as a whole. What is above the buffer counts
    here, for all connections together, until the client has taken it.

    `Any` stands for `Connection` here, which is defined below.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.connections: set[Any] = set()
        self.unflushed: list[Any] = []
        self.unread_octets = 0
        self.timer: asyncio.TimerHandle | None = None

    def schedule_flush(self, connection: Any) -> None:
        """Let a `Connection` send what it has got at the end of this turn."""
        if not self.unflushed:
            connection.loop.call_soon(self.flush)
        self.unflushed.append(connection)

    def flush(self) -> None:
        """Let all connections send that have got something."""
        connections = self.unflushed
        self.unflushed = []
        for connection in connections:
            connection.flush()

    def add(self, connection: Any) -> None:
        """Look at the deadline of a `Connection` from now on."""
        self.connections.add(connection)
        if self.timer is None:
            self.start_timer(connection.loop)

    @property
    def is_full(self) -> bool:
        """Whether so much waits for clients that no long answer may be added."""
        return self.unread_octets > self.limits.unread_answers

    def check_room(self, content: bytes) -> None:
        """Raise Overloaded for an answer that is long while too much waits for clients."""
        if self.is_full and len(content) > self.limits.write_buffer:
            raise Overloaded(
                f"answers that no client has taken yet hold {self.unread_octets} bytes; "
                "try again later",
                ("Retry-After", "5"),
            )

    def discard(self, connection: Any) -> None:
        """Forget a `Connection` that has ended."""
        self.connections.discard(connection)

    def start_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the deadlines a moment from now."""
        self.timer = loop.call_later(self.limits.deadline_interval, self.check_deadlines, loop)

    def check_deadlines(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the deadline of every connection once."""
        self.timer = None
        now = loop.time()
        # What happens at a deadline may end other connections.
        for connection in list(self.connections):
            connection.check_deadline(now)
        if self.connections:
            self.start_timer(loop)


# Linux tells in TCP_INFO how a connection is. That record only ever grows at its end; these are
# the places of three of its members, and the least length that has them all.
UNACKNOWLEDGED_AT, LAST_ACK_AT, UNSENT_AT, TCP_INFO_SIZE = 24, 56, 144, 148
# A receiver without room for more is asked less and less often whether it has some again. This is
# the longest that Linux waits before it asks, in seconds.
LONGEST_WINDOW_PROBE = 120.0


def ask_for_signs(sock: Any, interval: int) -> None:
    """Let the kernel ask the other side's kernel every `interval` s whether it is still there.

    After twelve questions without an answer it takes the connection for lost. Systems call these
    options by different names, and have not got all of them.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": interval,
        # The same on macOS.
        "TCP_KEEPALIVE": interval,
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": 12,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_silence(sock: Any) -> float:
    """Return for how long the other side's kernel has acknowledged nothing, in s; 0 if unknown.

    TCP_USER_TIMEOUT would take less code. But it also ends the connection to a server that is well
    and reads nothing for a while, because it lets a long request wait until others are done.
    """
    if sys.platform != "linux":
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    if len(info) < TCP_INFO_SIZE:
        return 0.0
    (last_ack_ms,) = struct.unpack_from("=I", info, LAST_ACK_AT)
    (unacknowledged,) = struct.unpack_from("=I", info, UNACKNOWLEDGED_AT)
    (unsent,) = struct.unpack_from("=I", info, UNSENT_AT)
    silence = last_ack_ms / 1000
    if unsent and not unacknowledged:
        # The other side has no room for more, and is asked ever more seldom whether it has.
        silence = max(0.0, silence - LONGEST_WINDOW_PROBE)
    return silence


class Connection(asyncio.Protocol):
    """One TCP connection, to a client or to an upstream: octets in, octets out, one deadline.

    **Reading.** asyncio calls `data_received`. The octets wait in `received` until the task that
    the connection belongs to asks for them, with `read` or `read_head`. A connection belongs to one
    task at a time: a client's to the one that serves it, an upstream's to the one whose request it
    carries, and to nobody while it is idle. Above `limits.read_ahead` the socket is not read any
    more, and the other side has to wait.

    **The sink.** A model speaks in pieces as small as a word, and hundreds of answers may be on
    their way at once. To wake a task takes another turn of the event loop, which is dear beside the
    little that is done with a word. So the task that relays an answer sets `sink` and sleeps:
    `data_received` gives each piece to that function at once, and it decodes, rewrites and writes
    to the client. The task is woken for what it has to decide: the end of the content, a failure,
    a client that reads too slowly.

    **Writing.** `write` appends to `unsent`, the only buffer of the router for what goes out, and
    the LoopBatch calls `flush` at the end of the turn. What is long, or much, does not wait so
    long. What the kernel has no room for, asyncio keeps until it has. From `limits.write_buffer`
    octets on it calls `pause_writing`, which sets `write_paused`, and `resume_writing` later.
    Whoever can write much waits in `drain` meanwhile. What is above that counts in the LoopBatch.

    **Waking.** The task sleeps in `wait`, which returns at any news: octets (without a sink), the
    end, a failure, room to write again. So every wait stands in a loop that looks at what it needs.

    **States.** At first it is open. When the other side says that it sends no more it is `ended`:
    what has come can be read, and what is written may still arrive. When the connection breaks or
    a deadline passes, `failure` is set, and the next read raises it. After `close` nothing comes
    any more; what is unsent still leaves, and asyncio says `connection_lost` in the end.

    **Leaving.** A client that leaves wants no answer any more. While `cancel_on_disconnect` is in
    force, the task that serves its request is cancelled at once, so that the upstream stops, too.
    All that TCP shows of a client that leaves is that it sends no more. So a client that ends its
    sending alone, and still reads, is taken for one that has left.
    """

    def __init__(self, batch: LoopBatch) -> None:
        self.batch = batch
        self.limits = batch.limits
        self.loop = asyncio.get_running_loop()
        # asyncio hands it over in `connection_made`. After its end an encrypted one can say nothing
        # of itself any more.
        self.transport: asyncio.Transport
        self.is_tls = False
        # Reading: octets that have come and are not used yet, and how many ever came.
        self.received = b""
        self.received_octets = 0
        # What has come of a head, until all of it is there.
        self.partial_head = b""
        self.read_paused = False
        self.sink: Callable[[bytes], None] | None = None
        # Writing: what was written in this turn.
        self.unsent: list[bytes] = []
        self.unsent_octets = 0
        self.write_paused = False
        # What counts in the batch, of an answer that the other side has not taken yet.
        self.unread_octets = 0
        # The end.
        self.ended = False
        self.failure: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None
        # The deadline, in the loop's time. With an idle timeout it moves on while octets come.
        self.deadline = NEVER
        self.idle_timeout = 0.0
        self.octets_at_check = 0
        self.on_timeout = IDLE_TOO_LONG
        # How long the other side's machine may give no sign, and when that is to be looked at.
        self.ack_timeout = NEVER
        self.ack_check_at = NEVER
        # What to call when the other side goes away. For a client: the task that serves its
        # request, and why that was cancelled, here or from the page.
        self.on_disconnect: Callable[[], None] | None = None
        self.request_task: asyncio.Task[Any] | None = None
        self.cancel_reason: RouterError | None = None
        # A request has begun to come or is being served.
        self.has_request = False
        # What else to look at when the deadline is looked at; it gets the loop's time.
        self.on_check: Callable[[float], None] | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the connection is open."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=self.limits.write_buffer)
        self.batch.add(self)

    def data_received(self, data: bytes) -> None:
        """Give what has come to the sink, or keep it for the next read."""
        self.received_octets += len(data)
        if self.sink:
            self.sink(data)
            return
        self.received = self.received + data if self.received else data
        if len(self.received) > self.limits.read_ahead:
            self.pause_reading()
        self.wake()

    def eof_received(self) -> bool:
        """Note that the other side sends no more; return whether to keep the connection."""
        self.ended = True
        self.announce_disconnect()
        # The other side may still read. With TLS it cannot: there, asyncio ends both directions.
        return not self.is_tls

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is gone."""
        self.batch.discard(self)
        self.count_unread(0)
        self.ended = True
        if self.failure is None:
            self.failure = exc
        self.announce_disconnect()

    def pause_writing(self) -> None:
        """Note that the other side reads too slowly."""
        self.write_paused = True
        self.count_unread(self.transport.get_write_buffer_size() - self.limits.write_buffer)

    def resume_writing(self) -> None:
        """Note that there is room again."""
        self.write_paused = False
        self.count_unread(0)
        self.wake()

    def count_unread(self, octets: int) -> None:
        """Let so many octets count as waiting for the other side, in place of those before."""
        self.batch.unread_octets += octets - self.unread_octets
        self.unread_octets = octets

    # Waiting and waking.

    async def wait(self) -> None:
        """Sleep until there is any news."""
        self.waiter = self.loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    def wake(self) -> None:
        """Wake the task that sleeps in `wait`, if one does."""
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    def set_failure(self, error: Exception) -> None:
        """Let the next read raise `error`; the first failure counts."""
        if self.failure is None:
            self.failure = error
        self.announce_disconnect()

    def announce_disconnect(self) -> None:
        """Tell whoever has to know that nothing more is to be had from the other side."""
        if self.on_disconnect:
            self.on_disconnect()
        self.wake()

    def cancel_on_disconnect(self) -> None:
        """Cancel the current task as soon as the other side goes away."""
        self.request_task = asyncio.current_task()
        self.on_disconnect = self.cancel_for_client
        # It may have gone while its request was read.
        if self.ended:
            self.cancel_for_client()

    def cancel_for_client(self) -> None:
        """Cancel the request of a client that has left."""
        self.cancel_request(ClientClosed("client_closed"))

    def cancel_request(self, reason: RouterError) -> None:
        """Cancel the task that serves a request; `cancel_reason` tells it why."""
        if self.request_task is None:
            return
        # Two reasons may come in one turn. The first one is why the task ends.
        if self.cancel_reason is None:
            self.cancel_reason = reason
        self.request_task.cancel()

    def ignore_disconnect(self) -> None:
        """Undo `cancel_on_disconnect`: the other side may go."""
        self.on_disconnect = None
        self.request_task = None

    # The deadline.

    def set_deadline(self, timeout: float, on_timeout: Timeout) -> None:
        """Let the next read fail after `timeout` seconds, whatever comes until then."""
        self.deadline = self.loop.time() + timeout
        self.idle_timeout = 0.0
        self.on_timeout = on_timeout

    def set_idle_timeout(self, timeout: float, on_timeout: Timeout) -> None:
        """Let the next read fail after `timeout` seconds in which no octet comes."""
        self.set_deadline(timeout, on_timeout)
        self.idle_timeout = timeout
        self.octets_at_check = self.received_octets

    def clear_deadline(self) -> None:
        """Let the connection take all the time that it wants."""
        self.deadline = NEVER
        self.idle_timeout = 0.0

    def set_ack_timeout(self, timeout: float) -> None:
        """Let the next read fail when the other side's machine gives no sign for `timeout` s."""
        self.ack_timeout = timeout
        self.ack_check_at = self.loop.time() + timeout

    def check_acks(self, now: float) -> None:
        """Fail when the other side's machine is gone, or look again when it could be."""
        self.ack_check_at = NEVER
        if self.transport.is_closing():
            return
        silence = read_silence(self.transport.get_extra_info("socket"))
        if silence < self.ack_timeout:
            self.ack_check_at = now + self.ack_timeout - silence
            return
        words = "switched off, or out of the network"
        self.set_failure(BadGateway(f"no sign of its machine for {silence:.0f} s: {words}"))

    def check_deadline(self, now: float) -> None:
        """Fail when the deadline has passed, or the other side's machine is gone."""
        if self.on_check:
            self.on_check(now)
        if now >= self.ack_check_at:
            self.check_acks(now)
        if self.idle_timeout:
            # While this side does not read, because its client is slow, the other side cannot be
            # blamed for its silence.
            octets_came = self.received_octets != self.octets_at_check
            if octets_came or self.read_paused:
                self.octets_at_check = self.received_octets
                self.deadline = now + self.idle_timeout
        if now < self.deadline:
            return
        self.deadline = NEVER
        if self.transport.is_closing():
            # `close` was called, and the other side has not read what was left for it.
            self.transport.abort()
        message = self.on_timeout.message.format(limits=self.limits)
        self.set_failure(self.on_timeout.error(message))

    # Reading.

    def pause_reading(self) -> None:
        """Leave further octets in the socket, so that the other side has to wait."""
        if not (self.read_paused or self.ended):
            self.read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def take_received(self) -> bytes:
        """Return what has come, which may be nothing, without waiting."""
        data = self.received
        self.received = b""
        self.resume_reading()
        return data

    async def read(self) -> bytes:
        """Return the next octets, b"" at the end. Raises what ended the connection."""
        while not self.received:
            if self.failure:
                raise self.failure
            if self.ended:
                return b""
            await self.wait()
        return self.take_received()

    async def read_head(self, limit: int) -> bytes | None:
        r"""Return a head without its final empty line, None when the connection ended before it.

        b'GET / HTTP/1.1\r\nHost: a\r\n\r\nmore'  ->  b'GET / HTTP/1.1\r\nHost: a', and `more`
        is what comes next. Raises MalformedMessage, TargetTooLong or FieldsTooLarge as soon as the
        octets can become no head of at most `limit` octets.
        """
        head = b""
        while data := await self.read():
            # Empty lines before a request are the rest of an old client's content
            # (RFC 9112 section 2.2).
            head = (head + data).removeprefix(b"\r\n")
            # What came before `data` has been looked at. Only its last three octets can still
            # be the beginning of an end, which is four octets long.
            unseen_at = max(0, len(head) - len(data) - 3)
            end = head.find(b"\r\n\r\n", unseen_at)
            if 0 <= end <= limit:
                self.partial_head = b""
                self.received = head[end + 4 :]
                return head[:end]
            self.partial_head = head
            check_partial_head(head, unseen_at, limit, self.limits)
        if head:
            raise MalformedMessage("the connection ended inside a head")
        return None

    # Writing.

    def write(self, data: bytes) -> None:
        """Send octets at the end of this turn of the event loop."""
        # A long piece goes by itself. To join it to what stands before it would copy it.
        if len(data) > self.limits.unsent:
            self.flush()
            self.transport.write(data)
            return
        if not self.unsent:
            self.batch.schedule_flush(self)
        self.unsent.append(data)
        self.unsent_octets += len(data)
        # Many pieces in one turn leave before its end: only what asyncio has got counts for
        # `write_paused`, by which the writer learns that it has to wait.
        if self.unsent_octets > self.limits.unsent:
            self.flush()

    def flush(self) -> None:
        """Send what was written, now."""
        if not self.unsent:
            return
        data = self.unsent[0] if len(self.unsent) == 1 else b"".join(self.unsent)
        self.unsent = []
        self.unsent_octets = 0
        self.transport.write(data)

    def is_flushed(self) -> bool:
        """Tell whether all that was written is with the kernel."""
        return not self.unsent and self.transport.get_write_buffer_size() == 0

    @property
    def is_broken(self) -> bool:
        """Whether nothing more can be written."""
        return self.failure is not None or self.transport.is_closing()

    async def drain(self) -> None:
        """Wait while a client reads too slowly. Raises ClientClosed when it has left."""
        if self.write_paused and not self.is_broken:
            self.set_deadline(self.limits.write_timeout, READS_NOTHING)
            while self.write_paused and not self.is_broken:
                await self.wait()
            self.clear_deadline()
        if self.is_broken:
            raise ClientClosed("client_closed")

    # Closing.

    def close(self) -> None:
        """End the connection; what was written still goes out."""
        self.detach_request()
        self.flush()
        self.transport.close()
        self.set_deadline(self.limits.write_timeout, IDLE_TOO_LONG)

    def abort(self) -> None:
        """End the connection at once and throw away what was not sent."""
        self.detach_request()
        self.unsent = []
        self.unsent_octets = 0
        self.transport.abort()

    def detach_request(self) -> None:
        """Keep nothing of the request that used the connection, and tell its task nothing more."""
        self.ignore_disconnect()
        self.on_check = None
        # An error keeps the frames that it came through, and with them whole contents.
        self.failure = None

    def end_by_reset(self) -> None:
        """Let the coming close be seen as a failure, where it would look like a clean end.

        The client of HTTP/1.0 takes the end of the connection for the end of the content. A reset
        is the only way to tell it that the content was cut.
        """
        self.flush()
        # Linger: on, 0 seconds. Windows has two short numbers there, all others two ints.
        linger_option = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        sock = self.transport.get_extra_info("socket")
        if sock is None:
            # With TLS there is none any more when the connection is gone.
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_option)
        if self.is_tls:
            # To close it would first say that this is a clean end.
            self.transport.abort()

    async def wait_lost(self) -> None:
        """Wait until the connection is gone, which `close` or `abort` has begun."""
        while self in self.batch.connections:
            await self.wait()

    async def linger(self) -> None:
        """Say that nothing more is sent, read on for a moment, close (RFC 9112 section 9.6).

        To close while the client still sends is answered by its kernel with a reset, which may
        throw away the answer before the client has read it.
        """
        with contextlib.suppress(OSError, RouterError):
            self.flush()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.set_deadline(self.limits.linger_timeout, IDLE_TOO_LONG)
            while await self.read():
                pass
        self.close()


class ContentReader:
    """Reads one content of a connection: piece by piece with `read`, or as it comes with `pump`.

    `read` raises ContentTooLarge for more than `limit` octets, as soon as that is known. What is
    pumped is not kept here, and has no limit.
    """

    def __init__(self, connection: Connection, framing: Framing, limit: float = math.inf) -> None:
        self.connection = connection
        self.framing = framing
        self.limit = limit
        # Octets that `read` has returned.
        self.size = 0
        self.decoder = make_decoder(framing, connection.limits)
        # The content itself has said that it is at its end, as `data: [DONE]` does. Its framing
        # (`done`) may go on: the last chunk often comes later.
        self.over = False
        # What was wrong with the content, or what `consume` refused, while `pump` ran.
        self.error: RouterError | None = None
        # While `pump` runs: the function that gets the content, and the client that it writes to.
        self.consume: Callable[[bytes], None] | None = None
        self.client: Connection | None = None

    @property
    def done(self) -> bool:
        """Whether the content has been read to the end of its framing."""
        return self.decoder.done

    def decode(self, data: bytes) -> bytes:
        """Return the content in `data`; leave what follows it to the connection."""
        content = self.decoder.feed(data)
        if self.decoder.done:
            self.connection.received = self.decoder.buffered
        self.size += len(content)
        # What a chunk announces counts before it is there.
        if self.size + self.decoder.remaining > self.limit:
            raise ContentTooLarge(f"over {self.limit} bytes, which is MAX_REQUEST_SIZE")
        return content

    def note_connection_end(self) -> None:
        """Note that nothing more comes. Raises MalformedMessage when content is missing."""
        if self.framing is UNTIL_CLOSE:
            self.decoder.done = True
        if not self.decoder.done:
            raise MalformedMessage("the connection ended inside the content")

    async def read(self) -> bytes:
        """Return the next piece, b"" at the end. Raises MalformedMessage when it is cut."""
        while not self.decoder.done:
            data = await self.connection.read()
            if not data:
                self.note_connection_end()
                continue
            content = self.decode(data)
            if content:
                return content
        return b""

    async def pump(self, consume: Callable[[bytes], None], client: Connection) -> None:
        """Give the content to `consume` as it comes, in the same turn of the event loop.

        `consume` writes to the client. While the client reads too slowly, the sender of the content
        has to wait. Raises what `consume` raises, and MalformedMessage when the content is cut.
        """
        connection = self.connection
        self.consume = consume
        self.client = client
        connection.sink = self.receive
        try:
            # What came together with the head.
            if connection.received:
                self.receive(connection.take_received())
            while not (self.decoder.done or self.over or self.error or connection.failure):
                if client.write_paused:
                    connection.pause_reading()
                    await client.drain()
                    connection.resume_reading()
                elif connection.ended:
                    self.note_connection_end()
                else:
                    await connection.wait()
            if self.error:
                raise self.error
            # A server may end its connection by a reset right after an answer that is whole.
            if connection.failure and not (self.decoder.done or self.over):
                raise connection.failure
        finally:
            connection.sink = None
            # An error holds the frames that it came through, and those the reader.
            self.error = None
            self.consume = None
            self.client = None

    def receive(self, data: bytes) -> None:
        """Decode what has come and hand it on: the connection's sink while `pump` runs."""
        decoder = self.decoder
        try:
            content = decoder.feed(data)
            if content and not self.over:
                self.consume(content)
        except RouterError as error:
            # Here it would reach asyncio, which knows nothing to do with it. `pump` raises it.
            self.error = error
            self.connection.wake()
            return
        # `pump` sleeps until it is over, or until the sender has to be stopped.
        if decoder.done:
            self.connection.received = decoder.buffered
            self.connection.wake()
        elif self.over or self.client.write_paused:
            self.connection.wake()


class ResponseWriter:
    """Writes one response to a client, in a framing that the client understands.

    `write_head` comes first, then `write_content` any number of times, then `finish`, or `cut` when
    the rest is lost. `send_response` is all of it, for an answer of the router's own.
    """

    def __init__(self, connection: Connection, head: RequestHead | None) -> None:
        self.connection = connection
        # A request whose head could not be read gets an answer and the end of its connection.
        self.minor = head.minor if head else 1
        self.method = head.method if head else "GET"
        self.keep_alive = head is not None and head.keeps_alive
        # Fields of every answer to this request, such as those of CORS.
        self.extra_fields: list[tuple[str, str]] = []
        self.status = 0
        self.size = 0
        self.started = False
        self.finished = False
        # How the content is framed, once the head is written: in chunks, up to the end of the
        # connection, or not at all because there is none. Otherwise the head has its length.
        self.chunked = False
        self.ends_by_close = False
        self.omits_content = False
        # What to call when the client has got nothing for so long, in s; until when that is, in the
        # loop's time; and how much had been written when that was looked at last.
        self.on_silence: Callable[[], None] | None = None
        self.longest_silence = NEVER
        self.silent_until = NEVER
        self.size_at_check = 0

    def set_on_silence(self, seconds: float, on_silence: Callable[[], None]) -> None:
        """Call `on_silence` whenever the client has got no content for so many seconds."""
        self.on_silence = on_silence
        self.longest_silence = seconds
        self.silent_until = self.connection.loop.time() + seconds
        self.connection.on_check = self.check_silence

    def clear_on_silence(self) -> None:
        """Let the client wait as long as it takes."""
        self.on_silence = None
        self.connection.on_check = None

    def check_silence(self, now: float) -> None:
        """Call `on_silence` if it is time; the connection's LoopBatch calls this at intervals.

        A client that has not taken all that there is for it does not wait for more.
        """
        if self.size != self.size_at_check or not self.connection.is_flushed():
            self.size_at_check = self.size
            self.silent_until = now + self.longest_silence
        elif self.on_silence and now >= self.silent_until:
            self.on_silence()

    def write_head(self, status: int, lines: str, length: int | None, reason: str = "") -> None:
        """Write the head, with these field lines; a `length` of None is not known yet.

        A content whose length is not known is sent in chunks. HTTP/1.0 does not know these: there
        the end of the connection is the end of the content (RFC 9112 section 6).
        """
        self.started = True
        self.status = status
        # The answer to a HEAD says how long the content would be. A 204 or 304 never has any, and
        # says no length.
        has_length = length is not None and status not in (204, 304)
        self.omits_content = self.method == "HEAD" or status in (204, 304)
        if self.extra_fields:
            lines += encode_field_lines(self.extra_fields)
        if has_length:
            lines += f"Content-Length: {length}\r\n"
        elif self.omits_content:
            # It ends with its head, whatever its fields say.
            pass
        elif self.minor == 1:
            self.chunked = True
            lines += "Transfer-Encoding: chunked\r\n"
        else:
            self.ends_by_close = True
            self.keep_alive = False
        if not self.keep_alive:
            lines += "Connection: close\r\n"
        elif self.minor == 0:
            lines += "Connection: keep-alive\r\n"
        reason = reason or REASONS.get(status, "")
        head = f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n"
        self.connection.write(head.encode("latin-1", "replace"))

    def write_content(self, content: bytes) -> None:
        """Write a piece of the content; it leaves at the end of the turn, the head before it."""
        self.size += len(content)
        if not content or self.omits_content:
            return
        self.connection.write(encode_chunk(content) if self.chunked else content)

    def finish(self, content: bytes = b"") -> None:
        """Write the last piece and the clean end."""
        self.finished = True
        # The task has more to do when the client has its answer: to write the log, to give the
        # upstream's connection back. A client that leaves now must not cancel that.
        self.connection.ignore_disconnect()
        self.write_content(content)
        if self.chunked:
            self.connection.write(LAST_CHUNK)

    def cut(self, content: bytes) -> None:
        """Write a last piece and no clean end, so that the answer does not look complete."""
        self.keep_alive = False
        self.write_content(content)
        # A last piece tells of the failure itself. A reset could destroy it on its way.
        if self.ends_by_close and not content:
            self.connection.end_by_reset()

    def send_response(self, status: int, fields: Iterable[tuple[str, str]], content: bytes) -> None:
        """Send a whole answer of the router's own. Raises Overloaded for a long one among many."""
        self.connection.batch.check_room(content)
        date = ("Date", http_date(int(time.time())))
        self.write_head(status, encode_field_lines([date, *fields]), len(content))
        self.finish(content)

    def send_json(self, document: Any, status: int = 200) -> None:
        """Send a JSON document of the router's own; one that is encoded already comes as bytes."""
        content = document if isinstance(document, bytes) else encode_json(document)
        self.send_response(status, [("Content-Type", "application/json")], content)


@dataclasses.dataclass
class Request:
    """A request whose head has been read, and the connection it came on."""

    head: RequestHead
    connection: Connection
    writer: ResponseWriter
    source_host: str
    # The path in its one spelling, and as soon as its endpoint is known, by its usual name.
    path: str = ""
    # The dialect of its endpoint, as soon as that is known.
    dialect: Dialect = OPENAI
    content: bytes = b""
    # What its valid token says; None without one.
    token: Token | None = None
    # Who reads the content, once somebody has begun.
    reader: ContentReader | None = None
    # Whether an exchange keeps a record of it, and prints its line.
    recorded: bool = False
    # Octets of its content that count against `Limits.held_content`.
    counted_octets: int = 0

    def __post_init__(self) -> None:
        self.path = self.path or self.head.path

    @property
    def host(self) -> str:
        """The authority of the target, or Host."""
        return self.head.host

    @property
    def query(self) -> str:
        """The query with its question mark, or nothing."""
        return self.head.query

    def begin_content(self, limit: float = NEVER) -> None:
        """Make the reader of the content; tell a client that waits for our word to send it."""
        self.reader = ContentReader(self.connection, self.head.framing, limit)
        # A client that has sent some of it already does not wait for the interim response
        # (RFC 9110 section 10.1.1).
        waits = self.head.expects_continue and not self.connection.received
        if waits and not self.reader.done:
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def read_content(
        self, limit: int, count: Callable[[Request, int], None] | None = None
    ) -> None:
        """Read all of the content; `count` is told how many octets came, and may raise an error.

        Raises ContentTooLarge above `limit` octets, and RequestTimeout: from `content_grace` on
        a client has to send at `content_rate`. Otherwise a few thousand clients could occupy all
        connections by sending an octet now and then.
        """
        framing = self.head.framing
        connection = self.connection
        limits = connection.limits
        if framing.length > limit:
            self.reader = ContentReader(connection, framing, limit)
            raise ContentTooLarge(f"{framing.length} bytes; MAX_REQUEST_SIZE is {limit}")
        self.begin_content(limit)
        if self.reader.done:
            return
        pieces: list[bytes] = []
        connection.set_deadline(limits.content_grace, CONTENT_TOO_SLOW)
        grace_ends_at = connection.deadline
        while not self.reader.done:
            piece = await self.reader.read()
            pieces.append(piece)
            if count:
                count(self, len(piece))
            connection.deadline = grace_ends_at + self.reader.size / limits.content_rate
        connection.clear_deadline()
        self.content = pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Upload:
    """A content that goes on to a server as it comes from its client, whatever its length.

    It is read piece by piece, and the next piece is read when there is room for it on the server's
    connection. So a server that reads slowly slows its client, and nothing gathers in between.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.framing = request.head.framing
        # How long the client was waited for, in s; it has the time that `read_content` gives.
        self.waited = 0.0

    @property
    def complete(self) -> bool:
        """Whether all of it has gone on; then the server's connection can be used again."""
        return self.request.reader is not None and self.request.reader.done

    @property
    def size(self) -> int:
        """How many octets of it have come."""
        return self.request.reader.size if self.request.reader else 0

    def framing_line(self) -> str:
        """Return the field line that tells the server how the content ends, as the client did."""
        if self.framing is CHUNKED:
            return "Transfer-Encoding: chunked\r\n"
        return f"Content-Length: {self.framing.length}\r\n"

    async def read(self) -> bytes:
        """Return the client's next piece, b"" at the end. Raises what is wrong with it."""
        client = self.request.connection
        limits = client.limits
        asked_at = client.loop.time()
        allowed = limits.content_grace + self.size / limits.content_rate
        client.set_deadline(allowed - self.waited, CONTENT_TOO_SLOW)
        # The reader notices by itself when the client leaves, and the deadline is no leaving.
        client.on_disconnect = None
        try:
            piece = await self.request.reader.read()
        except (OSError, MalformedMessage):
            if client.ended:
                raise ClientClosed("client_closed") from None
            raise
        client.cancel_on_disconnect()
        client.clear_deadline()
        self.waited += client.loop.time() - asked_at
        return piece

    async def send_to(self, server: Connection, timeout: float, on_timeout: Timeout) -> None:
        """Send all of it to a server that may wait for `timeout` between two pieces.

        Returns early when the server answers before the end, as it does when it refuses, or goes
        away: what it has said is read next. Raises what is wrong with the client.
        """
        self.request.begin_content()
        while not (server.received or server.ended or server.failure):
            # While the client is waited for, the server need not say anything.
            server.clear_deadline()
            piece = await self.read()
            server.set_deadline(timeout, on_timeout)
            chunked = self.framing is CHUNKED
            if piece:
                server.write(encode_chunk(piece) if chunked else piece)
            if self.complete:
                if chunked:
                    server.write(LAST_CHUNK)
                break
            while server.write_paused and not (server.received or server.ended or server.failure):
                await server.wait()


# ======================================================================================
# 12  Upstreams
# ======================================================================================
# One request to one instance, over connections that are kept for the next; how instances
# have fared; who may run there, and who waits; which models they have. Whatever ends a
# request early becomes BadGateway, or GatewayTimeout, and its message says what happened:
# failover (section 14) knows no other failure. An instance that failed goes to the end of
# the order for a while. It is never left out: when all have failed, each of them is still
# tried.

# With these an instance says that it cannot serve more now. It cools down as after a failure.
COOLING_STATUSES = (429, 503)
# When a server refuses to list its models, its client gets these fields of the refusal.
LIST_FIELDS = ("content-type", "www-authenticate", "retry-after")


def describe(error: BaseException) -> str:
    """Return what went wrong, in words: 'connection refused', 'timed out'."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        # Its number is none of the system's. `WRONG_VERSION_NUMBER` is what `reason` looks like.
        return error.reason.replace("_", " ").lower()
    if isinstance(error, socket.gaierror):
        return f"its name is not known: {error.strerror}"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "timed out"
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


# --- connections to upstreams -----------------------------------------------------------
# The life of a connection: `connect` opens it for a request. It then serves one request at a
# time. When an answer has been read to its end, and both sides mean to go on, `keep_idle` puts it
# into the pool; the next request to the same server takes the one that was used last, so that
# those which are too many grow old. It is thrown away after 30 s, when the server closes it, when
# the server's machine is gone, or when octets have come that nobody asked for: they would be taken
# for the next answer.
#
# A server may close an idle connection in the moment in which a request is written to it. Such
# a request fails before the first octet of an answer, through no fault of its own; it is sent
# once more on a new connection, and nobody is told.


def run_in_daemon(
    failures: tuple[type[Exception], ...], task: Callable[..., Any], *arguments: Any
) -> asyncio.Future[Any]:
    """Run what blocks in a thread of its own; the future may fail with one of `failures`.

    The loop's own threads are few, and the end of the program waits for them. It does not wait
    for a daemon, whatever that waits for itself.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def set_outcome(result: Any, failure: Exception | None) -> None:
        # Whoever waited may have given up.
        if future.done():
            return
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(result)

    def run() -> None:
        result = failure = None
        try:
            result = task(*arguments)
        except failures as error:
            failure = error
        # RuntimeError: the loop is closed, the router has ended.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(set_outcome, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future


def list_addresses(infos: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return the addresses that `getaddrinfo` found, each once, IPv6 and IPv4 in turn.

    ::1, ::2, 10.0.0.1  ->  ::1, 10.0.0.1, ::2
    """
    addresses = list(dict.fromkeys(info[4][0] for info in infos))
    ipv6 = [address for address in addresses if ":" in address]
    ipv4 = [address for address in addresses if ":" not in address]
    # The family of the best address has the first turn.
    families = (ipv6, ipv4) if ipv6[:1] == addresses[:1] else (ipv4, ipv6)
    turns = itertools.zip_longest(*families)
    return [address for turn in turns for address in turn if address]


class HostNames:
    """Looks up the addresses of hosts, in a thread, one at a time for each name.

    A name whose server does not answer occupies its thread for half a minute. With a thread for
    each request, a few dozen requests for a dead name would leave none for the living.
    """

    def __init__(
        self, limits: Limits, look_up: Callable[..., list[Any]] = socket.getaddrinfo
    ) -> None:
        self.limits = limits
        self.look_up = look_up
        self.running: dict[str, asyncio.Task[str]] = {}
        # The last addresses of each name; and of a name that was not found since then, when they
        # do not count any more.
        self.addresses: dict[str, list[str]] = {}
        self.expires_at: dict[str, float] = {}

    async def find(self, host: str) -> list[str]:
        """Return the addresses of a host, the best one first. Raises OSError."""
        if is_address(host):
            return [host]
        if host not in self.running:
            self.running[host] = asyncio.create_task(self.refresh(host))
        running = self.running[host]
        timeout = self.limits.lookup_timeout if host in self.addresses else None
        await asyncio.wait([running], timeout=timeout)
        reason = running.result() if running.done() else "it takes too long to look up its name"
        if reason:
            now = time.monotonic()
            expires_at = self.expires_at.setdefault(host, now + self.limits.addresses_kept)
            if host not in self.addresses or now >= expires_at:
                raise OSError(reason)
        return self.addresses[host]

    async def refresh(self, host: str) -> str:
        """Look up a name and keep its addresses; return why it was not found, or ""."""
        look_up = functools.partial(self.look_up, host, None, type=socket.SOCK_STREAM)
        try:
            # A name with too long a part is a UnicodeError, which is a ValueError.
            infos = await run_in_daemon((OSError, ValueError), look_up)
        except (OSError, ValueError) as error:
            return describe(error)
        finally:
            del self.running[host]
        self.addresses[host] = list_addresses(infos)
        self.expires_at.pop(host, None)
        return ""


def abort_connection(opening: asyncio.Future[Connection]) -> None:
    """Close a connection that was made when nobody waited for it any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


def abandon(opening: asyncio.Future[Connection]) -> None:
    """Give up an attempt to connect, whether it has succeeded by now or not."""
    opening.cancel()
    opening.add_done_callback(abort_connection)


def make_tls_context(verify: bool) -> ssl.SSLContext:
    """Return how to speak TLS with servers whose certificates are valid, or with any."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class ConnectionPool:
    """Opens connections to servers and keeps those that can be used again."""

    def __init__(
        self, settings: Settings, batch: LoopBatch, names: HostNames | None = None
    ) -> None:
        self.settings = settings
        self.batch = batch
        self.limits = batch.limits
        self.names = names or HostNames(batch.limits)
        # By URL and `verify`: a connection on which no certificate was verified is not for a
        # server that wants it verified.
        self.idle: dict[tuple[UpstreamURL, bool], list[Connection]] = {}
        # How to speak TLS, with and without verifying.
        self.tls_contexts: dict[bool, ssl.SSLContext] = {}

    def tls_context(self, server: Server) -> ssl.SSLContext | None:
        """Return how to speak TLS with a server, None for plain http."""
        if server.url.scheme != "https":
            return None
        if server.verify not in self.tls_contexts:
            self.tls_contexts[server.verify] = make_tls_context(server.verify)
        return self.tls_contexts[server.verify]

    async def connect(self, server: Server) -> Connection:
        """Open a connection. Raises BadGateway or GatewayTimeout."""
        opening = asyncio.create_task(self.open(server))
        timeout = self.settings.connect_timeout
        try:
            # Not wait_for: up to Python 3.11 it may lose a cancellation, or the connection.
            await asyncio.wait([opening], timeout=timeout)
        except asyncio.CancelledError:
            # It may have been made in this very turn of the event loop, or come later.
            abandon(opening)
            raise
        if not opening.done():
            abandon(opening)
            what = "address of its name" if server.url.host in self.names.running else "connection"
            late = GatewayTimeout(f"no {what} within {timeout:g} s (CONNECT_TIMEOUT)")
            late.unreached = True
            raise late
        try:
            connection = opening.result()
        except (OSError, ValueError) as error:
            failure = BadGateway(describe(error))
            # A machine that speaks TLS in a wrong way is there.
            failure.unreached = not isinstance(error, ssl.SSLError)
            raise failure from None
        sock = connection.transport.get_extra_info("socket")
        ask_for_signs(sock, self.limits.probe_interval)
        return connection

    async def open(self, server: Server) -> Connection:
        """Connect to the address of a server that answers first. Raises OSError or ValueError.

        A name may have an address that does not answer, often one of IPv6: without waiting for its
        failure the next one is tried as well (RFC 8305).
        """
        addresses = await self.names.find(server.url.host)
        if len(addresses) == 1:
            return await self.open_at(server, addresses[0])
        waiting = collections.deque(addresses)
        attempts: set[asyncio.Task[Connection]] = set()
        reason = ""
        try:
            while waiting or attempts:
                if waiting:
                    attempts.add(asyncio.create_task(self.open_at(server, waiting.popleft())))
                done, _ = await asyncio.wait(
                    attempts,
                    timeout=self.limits.address_delay if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in done:
                    attempts.remove(attempt)
                    failure = attempt.exception()
                    if failure is None:
                        return attempt.result()
                    reason = describe(failure)
        finally:
            # One of them may have succeeded, too.
            for attempt in attempts:
                abandon(attempt)
        raise OSError(reason)

    async def open_at(self, server: Server, address: str) -> Connection:
        """Connect to one address of a server. Raises OSError or ValueError."""
        url = server.url
        tls_context = self.tls_context(server)
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self.batch),
            address,
            url.port,
            ssl=tls_context,
            server_hostname=url.host if tls_context else None,
        )
        return connection

    def take_idle(self, server: Server) -> Connection | None:
        """Return an idle connection that is still good, None without one."""
        connections = self.idle.get((server.url, server.verify), [])
        while connections:
            connection = connections.pop()
            connection.ignore_disconnect()
            if not (connection.received or connection.ended or connection.failure):
                return connection
            connection.abort()
        return None

    def keep_idle(self, server: Server, connection: Connection) -> None:
        """Keep a connection for the next request to a server."""
        connections = self.idle.setdefault((server.url, server.verify), [])
        # A server that answers before it has read the whole request may never read the rest.
        if len(connections) >= self.limits.idle_connections or not connection.is_flushed():
            connection.close()
            return

        # Called when the server closes it, and when its time is up.
        def drop() -> None:
            if connection in connections:
                connections.remove(connection)
            connection.abort()

        connection.set_deadline(self.limits.idle_connection_timeout, IDLE_TOO_LONG)
        connection.set_ack_timeout(self.limits.idle_ack_timeout)
        connection.on_disconnect = drop
        connections.append(connection)

    def close(self) -> None:
        """Close every idle connection."""
        for connections in self.idle.values():
            while connections:
                connections.pop().close()


def as_bad_gateway(error: OSError | RouterError) -> RouterError:
    """Return what to raise when an error ends an answer in its middle.

    A GatewayTimeout is a BadGateway already, and its message says enough. That the client has left
    is no fault of the server.
    """
    if isinstance(error, (BadGateway, ClientClosed)):
        return error
    return BadGateway(f"the answer broke off: {describe(error)}")


class UpstreamResponse:
    """A response whose head has come; its content is read to the end, or it is closed.

    What `buffer_next` has read is in `buffered`, and `pump` begins with it.
    """

    def __init__(
        self,
        head: ResponseHead,
        framing: Framing,
        connection: Connection,
        server: Server,
        pool: ConnectionPool,
    ) -> None:
        self.head = head
        # What it is, which is not always what its head calls it.
        self.media_type = head.media_type
        self.connection = connection
        self.server = server
        self.pool = pool
        self.reader = ContentReader(connection, framing)
        self.buffered: list[bytes] = []
        # Until the connection is closed or given back to the pool.
        self.open = True
        # Whether another request may follow on the connection, as far as this one is concerned.
        self.reusable = True

    @property
    def ends_by_close(self) -> bool:
        """Whether its connection ends with the content, so that a cut looks like the end."""
        return self.reader.framing is UNTIL_CLOSE

    def end(self) -> None:
        """Wait for no more of the content: it has said itself that it is at its end."""
        self.reader.over = True

    def finish(self) -> None:
        """Let the connection be used again, or close it, after all of the content was read."""
        self.open = False
        connection = self.connection
        persists = self.reusable and self.head.keeps_alive and not self.ends_by_close
        if persists and not self.reader.done:
            self.finish_later()
        elif persists and not (connection.received or connection.ended):
            self.pool.keep_idle(self.server, connection)
        else:
            connection.close()

    def finish_later(self) -> None:
        """Let the connection be used again as soon as the content's framing has ended, too.

        The content has said that it is at its end, and nobody waits for what follows. Most servers
        send their last chunk a moment after the last event: to close at once would cost a new
        connection for each stream. Some never send it; they are given up after a moment.
        """
        connection = self.connection
        connection.on_disconnect = connection.abort
        connection.set_deadline(connection.limits.content_end, IDLE_TOO_LONG)
        connection.sink = self.skip_to_end
        self.skip_to_end(connection.take_received())
        if connection.ended:
            connection.abort()

    def skip_to_end(self, data: bytes) -> None:
        """Throw away what still comes of the content: the sink while `finish_later` is in force."""
        try:
            self.reader.decode(data)
        except RouterError:
            self.connection.sink = None
            self.connection.abort()
            return
        if self.reader.done:
            self.connection.sink = None
            self.connection.ignore_disconnect()
            self.finish()

    async def buffer_next(self) -> bytes:
        """Read the next piece and keep it for `pump`; b"" at the end. Raises BadGateway."""
        if not self.open:
            return b""
        try:
            piece = await self.reader.read()
        except (OSError, RouterError) as error:
            raise as_bad_gateway(error) from None
        if piece:
            self.buffered.append(piece)
        else:
            self.finish()
        return piece

    async def buffer_error(self) -> bytes:
        """Read an error answer and keep it, so that it can be sent later; stop when it is long."""
        size = sum(len(piece) for piece in self.buffered)
        while size <= self.connection.limits.buffered_error:
            piece = await self.buffer_next()
            if not piece:
                break
            size += len(piece)
        return b"".join(self.buffered)

    async def pump(self, consume: Callable[[bytes], None], client: Connection) -> None:
        """Give the content to `consume` as it comes; what it writes leaves at once.

        While the client is slow the upstream waits. Raises BadGateway when the answer is cut, and
        what `consume` raises.
        """
        for piece in self.buffered:
            consume(piece)
            if self.reader.over:
                break
        if not self.open:
            return
        try:
            await self.reader.pump(consume, client)
        except (OSError, RouterError) as error:
            raise as_bad_gateway(error) from None
        self.finish()

    def close(self) -> None:
        """End the connection unless all of the content was read."""
        if self.open:
            self.open = False
            self.connection.abort()


# --- machines that sleep ----------------------------------------------------------------
# A machine that is switched off can be woken by a packet to its network card (Wake-on-LAN). That is
# done for requests alone, and for one that no other instance can serve: it costs power. While it
# starts it is tried every two seconds. All requests that wait for it share one such attempt, which
# ends when the last of them has left.


def encode_magic_packet(mac: bytes) -> bytes:
    """Return what wakes the machine with this card: six times 0xFF, and 16 times its address."""
    return b"\xff" * 6 + mac * 16


def send_magic_packet(wake: Wake) -> None:
    """Wake a machine. Raises OSError."""
    family = socket.AF_INET6 if ":" in wake.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(encode_magic_packet(wake.mac), (wake.address, wake.port))


class Waker:
    """Wakes the machines of servers, and waits until they can be reached."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.limits = pool.limits
        self.running: dict[UpstreamURL, asyncio.Task[str]] = {}
        # How many requests wait for each of them.
        self.waiting: collections.Counter[UpstreamURL] = collections.Counter()

    async def wake(self, server: Server) -> str:
        """Wake a server's machine; return why it cannot be reached, "" when it can."""
        url = server.url
        if url not in self.running:
            self.running[url] = asyncio.create_task(self.run(server, server.wake))
        running = self.running[url]
        self.waiting[url] += 1
        try:
            await asyncio.wait([running])
        finally:
            self.waiting[url] -= 1
            if not self.waiting[url]:
                running.cancel()
                del self.waiting[url]
                del self.running[url]
        return running.result()

    async def run(self, server: Server, wake: Wake) -> str:
        """Send packets and try to connect until the time is up; return as `wake` does."""
        now = time.monotonic()
        give_up_at = now + wake.timeout
        send_at = now
        reason = ""
        while now < give_up_at:
            if now >= send_at:
                send_at = now + self.limits.magic_packet_interval
                try:
                    send_magic_packet(wake)
                except OSError as error:
                    # The network may come back, too.
                    reason = f"; the packet to {wake.address}: {describe(error)}"
            if await self.can_reach(server):
                return ""
            await asyncio.sleep(now + self.limits.waking_interval - time.monotonic())
            now = time.monotonic()
        return f"it did not wake up within {wake.timeout:g} s (wake.timeout){reason}"

    async def can_reach(self, server: Server) -> bool:
        """Try to connect to a server; the connection is kept for the request that is to come."""
        connecting = asyncio.create_task(self.pool.connect(server))
        try:
            await asyncio.wait([connecting], timeout=self.limits.waking_interval)
        finally:
            # It closes a connection that nobody waits for any more.
            if not connecting.done():
                connecting.cancel()
        if not connecting.done() or connecting.cancelled() or connecting.exception():
            return False
        self.pool.keep_idle(server, connecting.result())
        return True


# --- requests and health ----------------------------------------------------------------


@dataclasses.dataclass
class Health:
    """How one instance has fared.

    A failure begins a cool-down, in which other instances are asked first. With each failure in a
    row it gets twice as long. A good answer that has begun ends the cool-down (`answer`); when all
    of it has come, the row ends, too (`succeed`).
    """

    limits: Limits
    # How many requests run there now, and how many of them have a slot of its server.
    running: int = 0
    in_slots: int = 0
    # Failures since the last success.
    failures: int = 0
    # Until then other instances are asked first; on the monotonic clock.
    cool_until: float = 0.0
    # What went wrong last, "" after a success.
    error: str = ""
    # The server answered, even if it said no.
    reached: bool = True
    # In which of the last 24 hours, counted from 1970, it could not be reached.
    unreached_hours: set[int] = dataclasses.field(default_factory=set)

    def fail(self, error: str, retry_after: str | None = None, reached: bool = False) -> None:
        """Begin a cool-down: 5 s, doubling up to 60 s, or what a Retry-After asks for."""
        limits = self.limits
        doublings = min(self.failures, 10)
        cool_down = min(limits.cool_down * 2**doublings, limits.longest_cool_down)
        if retry_after:
            asked_for = parse_retry_after(retry_after, time.time())
            if asked_for is not None:
                cool_down = min(asked_for, limits.longest_retry_after)
        self.failures += 1
        self.error = error
        self.reached = reached
        self.cool_until = time.monotonic() + cool_down
        if not reached:
            hour = int(time.time() // 3600)
            self.unreached_hours = {one for one in self.unreached_hours if one > hour - 24}
            self.unreached_hours.add(hour)

    def answer(self) -> None:
        """End the cool-down, because a good answer has begun.

        The failures stay until it is whole: an instance that breaks off each of its answers
        would otherwise be back after the shortest cool-down, for ever.
        """
        self.cool_until = 0.0
        self.error = ""
        self.reached = True

    def succeed(self) -> None:
        """End the cool-down, and forget the failures before it."""
        self.answer()
        self.failures = 0


# What is known of an instance is kept under its server and the name of its model.
InstanceKey = tuple[UpstreamURL, str]


def instance_key(instance: Instance) -> InstanceKey:
    """Return under which key an instance is known; clients choose the names of models.

    They are cut, because the keys stay in memory: a name may be as long as `Limits.model_name`.
    """
    return instance.server.url, cut_name(instance.model or "")


def keep_newest(table: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put a value into a table of at most `most` values; the oldest one makes room."""
    if key not in table and len(table) >= most:
        del table[next(iter(table))]
    table[key] = value


class Homes:
    """Where conversations are at home: the instance that has their prompt in its memory.

    Keys are hashes, because clients choose what they are made of and how long that is.
    """

    def __init__(self, most: int, kept: float) -> None:
        self.most = most
        self.kept = kept
        # The instance, and until when it counts; those that were used last are at the end.
        self.homes: dict[bytes, tuple[InstanceKey, float]] = {}

    def find(self, key: bytes) -> InstanceKey | None:
        """Return the home of a conversation, None when it has none."""
        home, expires_at = self.homes.get(key, (None, 0.0))
        return home if time.monotonic() < expires_at else None

    def keep(self, key: bytes, home: InstanceKey) -> None:
        """Let a conversation be at home at an instance from now on."""
        self.homes.pop(key, None)
        keep_newest(self.homes, key, (home, time.monotonic() + self.kept), self.most)


def hash_key(*words: str) -> bytes:
    """Return the key in Homes of what these words say, 16 octets."""
    text = "\0".join(words).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=16).digest()


class Upstreams:
    """Sends requests to servers and remembers how they fared."""

    def __init__(self, settings: Settings, batch: LoopBatch) -> None:
        self.settings = settings
        self.batch = batch
        self.limits = batch.limits
        self.pool = ConnectionPool(settings, batch)
        seconds = settings.request_timeout
        self.on_timeout = Timeout(
            GatewayTimeout, f"no answer within {seconds:g} s (REQUEST_TIMEOUT)"
        )
        self.health: dict[InstanceKey, Health] = {}
        # For each route, when it last asked each of its instances, as a number that grows.
        self.turns: dict[tuple[str, Instance], int] = {}
        self.turn_numbers = itertools.count(1)
        # Of conversations, with `strategy: sticky`, and of single answers by their ids.
        self.homes = Homes(self.limits.homes, self.limits.home_kept)
        self.response_homes = Homes(self.limits.homes, self.limits.response_home_kept)
        self.waker = Waker(self.pool)
        # What was learned from answers. These members these models refuse when they are added.
        self.refused_members: dict[InstanceKey, frozenset[AddedMember]] = {}
        # These models put timings into the last event of a stream unasked (llama.cpp). A request
        # for the usage would move them into the usage event, which the router takes out, and the
        # client would lose them. So the router does not ask these models for the usage.
        self.models_with_timings: set[InstanceKey] = set()
        # The templates of these models open the block of thinking, so that an answer begins inside.
        self.models_opening_thinking: set[InstanceKey] = set()

    # How instances fare.

    def health_of(self, instance: Instance) -> Health:
        """Return the health record of an instance; the table is bounded."""
        key = instance_key(instance)
        if key not in self.health and len(self.health) >= self.limits.known_instances:
            self.forget_oldest()
        return self.health.setdefault(key, Health(self.limits))

    def forget_oldest(self) -> None:
        """Forget the oldest tenth of the instances, but for those that are busy."""
        for key in list(itertools.islice(self.health, self.limits.known_instances // 10)):
            if not self.health[key].running:
                del self.health[key]

    def health_of_server(self, server: Server) -> list[Health]:
        """Return what is known of all instances of a server."""
        return [health for (url, _), health in self.health.items() if url == server.url]

    def is_cooling(self, server: Server) -> bool:
        """Tell whether the server could not be reached a moment ago."""
        now = time.monotonic()
        for health in self.health_of_server(server):
            if health.cool_until > now and not health.reached:
                return True
        return False

    def load(self, instance: Instance) -> float:
        """Return how busy the server of an instance is, with requests for whatever model.

        It is the number of requests that run there for each of its slots.
        """
        running = sum(health.running for health in self.health_of_server(instance.server))
        return running / (instance.server.slots or 1)

    def order(self, decision: Decision) -> list[Instance]:
        """Return the instances in the order to try.

        The strategy has its say first. Then those that cool down go to the end, and of these the
        one that has the least time left is the first.
        """
        instances = list(decision.instances)
        if len(instances) < 2:
            return instances
        if decision.strategy == "round_robin":
            # The one that was asked the longest ago is first. If a counter went round the list
            # instead, the instance behind a cooling one would get that one's turns and its own.
            instances.sort(key=lambda i: self.turns.get((decision.route, i), 0))
        elif decision.strategy == "least_busy":
            instances.sort(key=self.load)
        elif decision.strategy == STICKY:
            # As long as all are idle, conversations that begin go to each in turn.
            turns = self.turns
            instances.sort(key=lambda i: (self.load(i), turns.get((decision.route, i), 0)))
        now = time.monotonic()
        # The sort is stable: those that are well stay in their order.
        return sorted(instances, key=lambda i: max(self.health_of(i).cool_until - now, 0.0))

    def note_turn(self, decision: Decision, instance: Instance) -> None:
        """Note that an instance is asked now, in its turn or because others have failed."""
        if decision.strategy in ("round_robin", STICKY):
            self.turns[decision.route, instance] = next(self.turn_numbers)

    def is_well(self, instance: Instance) -> bool:
        """Tell whether an instance does not cool down."""
        return self.health_of(instance).cool_until <= time.monotonic()

    # Requests.

    async def send_request(
        self, server: Server, method: str, message: bytes, upload: Upload | None = None
    ) -> UpstreamResponse:
        """Send a request, head and content, and return the response once its head is there.

        Of an upload, `message` is the head alone. Raises BadGateway or GatewayTimeout, and what is
        wrong with the client of an upload.
        """
        connection = None
        if upload is None:
            # An upload cannot be sent twice, which an idle connection may need.
            connection = self.pool.take_idle(server)
        if connection is not None:
            octets_before = connection.received_octets
            try:
                return await self.send_on(connection, server, method, message)
            except GatewayTimeout:
                # It is a BadGateway, too. But this server may still be at work on the request.
                raise
            except BadGateway:
                # When not one octet of an answer has come, the server is taken to have closed the
                # idle connection before it read the request.
                if connection.received_octets > octets_before:
                    raise
        connection = await self.pool.connect(server)
        if upload is None:
            return await self.send_on(connection, server, method, message)
        response = None
        try:
            connection.write(message)
            await upload.send_to(connection, self.settings.request_timeout, self.on_timeout)
            response = await self.send_on(connection, server, method, b"")
        finally:
            if response is None:
                connection.abort()
        response.reusable = upload.complete
        return response

    async def send_on(
        self, connection: Connection, server: Server, method: str, message: bytes
    ) -> UpstreamResponse:
        """Write a request to a connection and read the head of its response.

        The connection is closed unless a response is returned, also when the task is cancelled.
        """
        connection.set_idle_timeout(self.settings.request_timeout, self.on_timeout)
        connection.set_ack_timeout(self.limits.busy_ack_timeout)
        connection.write(message)
        response = None
        try:
            head = await self.receive_head(connection)
            framing = head.framing(method)
            response = UpstreamResponse(head, framing, connection, server, self.pool)
            return response
        except BadGateway:
            raise
        except (OSError, RouterError) as error:
            raise BadGateway(f"no valid answer: {describe(error)}") from None
        finally:
            if response is None:
                connection.abort()

    async def receive_head(self, connection: Connection) -> ResponseHead:
        """Return the head of the final response; interim ones (1xx) are passed over."""
        for _ in range(self.limits.interim_responses + 1):
            data = await connection.read_head(self.limits.response_head)
            if data is None:
                raise BadGateway("it closed the connection without an answer")
            head = parse_response_head(data)
            if head.status >= 200:
                return head
            if head.status == 101:
                raise MalformedMessage("101 Switching Protocols, which nobody asked for")
        raise MalformedMessage(f"more than {self.limits.interim_responses} interim responses")


# --- slots ------------------------------------------------------------------------------
# A local server works on a few requests at once; with more of them, all get slower, or it refuses
# some. So the routing file may say how many slots a server has, and a request that finds all of
# them taken waits here until one is free: in the order in which the requests came, those of a
# higher priority first. Nobody waits for a server with a free slot: whenever one becomes free, it
# is given to somebody who waits, in the same turn of the event loop.
#
# The owner may close a server by hand: it takes no new requests then (DRAIN), and those that run
# there are stopped (OFF), until it is ON again or the router has restarted.

ON = "on"
DRAIN = "drain"
OFF = "off"
CLOSED_WORDS = {DRAIN: "is drained and takes no requests", OFF: "is switched off"}


@dataclasses.dataclass(eq=False)
class Waiting:
    """A request that waits for a slot of one of several servers."""

    # Its place in PRIORITIES, and when it came: a number that grows.
    rank: int
    number: int
    instances: Sequence[Instance]
    # From then on no newer request goes before it; on the monotonic clock.
    overtaken_until: float = NEVER
    # Its result is the instance at which it may run now; None: there is nothing to wait for.
    granted: asyncio.Future[Instance | None] = dataclasses.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


def name_servers(instances: Iterable[Instance]) -> str:
    """Return the names of the servers of some instances, each once: `gpu, mac`."""
    return ", ".join(dict.fromkeys(instance.server.name for instance in instances))


class Slots:
    """Who may run at each server now, and who waits for that."""

    def __init__(self, upstreams: Upstreams) -> None:
        self.upstreams = upstreams
        self.settings = upstreams.settings
        self.limits = upstreams.limits
        # How many slots servers have; one that is not in here runs any number of requests.
        self.of_server: dict[UpstreamURL, int] = {}
        # Those that their owner has closed: DRAIN or OFF.
        self.closed: dict[UpstreamURL, str] = {}
        # Those who wait, in the order of rank and number.
        self.waiting: list[Waiting] = []
        self.numbers = itertools.count()
        # What a client is told who finds no slot.
        self.retry_after = ("Retry-After", str(self.limits.full_retry_after))

    def set_table(self, table: RoutingTable) -> None:
        """Take the numbers of slots from a table; requests that run stay where they are."""
        self.of_server = {}
        for server in table.all_servers():
            if server.slots is not None:
                # Two names may stand for one server. The smaller number is the one that is safe.
                slots = self.of_server.get(server.url, server.slots)
                self.of_server[server.url] = min(slots, server.slots)
        self.admit()

    def set_state(self, server: Server, state: str) -> None:
        """Close a server, or open it again; who has nothing else to wait for waits no longer."""
        self.closed.pop(server.url, None)
        if state != ON:
            self.closed[server.url] = state
        self.admit()
        for waiting in list(self.waiting):
            if not self.open_ones(waiting.instances):
                self.waiting.remove(waiting)
                waiting.granted.set_result(None)

    def open_ones(self, instances: Iterable[Instance]) -> list[Instance]:
        """Return the instances whose servers are not closed."""
        if not self.closed:
            return list(instances)
        return [instance for instance in instances if instance.server.url not in self.closed]

    def refusal_of(self, instances: Iterable[Instance]) -> ServerClosed:
        """Return the error for a request that only these servers could serve: all are closed."""
        words = []
        for server in dict.fromkeys(instance.server for instance in instances):
            words.append(f"{server.name} {CLOSED_WORDS.get(self.closed.get(server.url), '')}")
        remedy = 'POST /api/upstreams/NAME {"state": "on"} opens it again'
        return ServerClosed(f"{', '.join(words)}; {remedy}")

    def free_slots(self, url: UpstreamURL) -> float:
        """Return how many more requests a server may run now."""
        if url in self.closed:
            return 0
        slots = self.of_server.get(url)
        if slots is None:
            return math.inf
        health = self.upstreams.health
        return slots - sum(known.in_slots for (of, _), known in health.items() if of == url)

    def may_run(self, server: Server, takes_slot: bool) -> bool:
        """Tell whether one more request may run at a server now."""
        if not (self.of_server or self.closed):
            return True
        if not takes_slot:
            return server.url not in self.closed
        return self.free_slots(server.url) > 0

    def enter(self, instance: Instance, takes_slot: bool) -> Health:
        """Count a request that runs at an instance from now on; `leave` is to follow."""
        health = self.upstreams.health_of(instance)
        health.running += 1
        if takes_slot:
            health.in_slots += 1
        return health

    def leave(self, health: Health, takes_slot: bool) -> None:
        """Count a request that does not run there any more, and let another one run."""
        health.running -= 1
        if takes_slot:
            health.in_slots -= 1
        if self.waiting:
            self.admit()

    # The queue.

    def queued_for(self, server: Server) -> int:
        """Return how many requests wait that this server could run, or another one."""
        return sum(
            any(instance.server.url == server.url for instance in waiting.instances)
            for waiting in self.waiting
        )

    async def wait(
        self, instances: Sequence[Instance], rank: int, seconds: float
    ) -> Instance | None:
        """Wait for a slot of one of these instances' servers; return the instance, entered.

        Returns None when the time is up. Raises QueueFull.
        """
        if len(self.waiting) >= self.settings.queue_size:
            raise QueueFull(
                f"no slot is free at {name_servers(instances)}, and {len(self.waiting)} requests "
                f"wait for one already (QUEUE_SIZE={self.settings.queue_size})",
                self.retry_after,
            )
        waiting = Waiting(rank, next(self.numbers), instances)
        self.add(waiting)
        granted = waiting.granted
        try:
            # Not wait_for: up to Python 3.11 it may lose a cancellation.
            await asyncio.wait([granted], timeout=seconds)
        except asyncio.CancelledError:
            # It may have been granted in this very turn of the event loop.
            if granted.done() and granted.result():
                self.leave(self.upstreams.health_of(granted.result()), takes_slot=True)
            raise
        finally:
            if waiting in self.waiting:
                self.waiting.remove(waiting)
        return granted.result() if granted.done() else None

    def add(self, waiting: Waiting) -> None:
        """Put a request into the queue, behind all that came before it with its priority."""
        overtaken_until = time.monotonic() + self.limits.longest_overtaking
        place = len(self.waiting)
        while place and self.waiting[place - 1].rank > waiting.rank:
            place -= 1
            overtaken = self.waiting[place]
            overtaken.overtaken_until = min(overtaken.overtaken_until, overtaken_until)
        self.waiting.insert(place, waiting)

    def in_order(self) -> list[Waiting]:
        """Return those who wait in the order in which they get slots.

        Those who have been overtaken for long enough are first, in the order in which they came.
        """
        now = time.monotonic()
        overtaken = [waiting for waiting in self.waiting if waiting.overtaken_until <= now]
        if not overtaken:
            return list(self.waiting)
        others = [waiting for waiting in self.waiting if waiting.overtaken_until > now]
        return [*sorted(overtaken, key=lambda waiting: waiting.number), *others]

    def admit(self) -> None:
        """Let those run who wait and for whom there is a free slot now."""
        if not self.waiting:
            return
        free = {url: self.free_slots(url) for url in (*self.of_server, *self.closed)}
        for waiting in self.in_order():
            for instance in waiting.instances:
                url = instance.server.url
                if free.get(url, math.inf) > 0:
                    free[url] = free.get(url, math.inf) - 1
                    self.waiting.remove(waiting)
                    self.enter(instance, takes_slot=True)
                    waiting.granted.set_result(instance)
                    break


# --- lists of models --------------------------------------------------------------------
# Clients ask for the list of models whenever they show a menu; servers are asked at most once
# a minute. These calls are few, and http.client is enough for them: what stands above is made
# for answers that are handed on while they come. As http.client blocks until a server has
# answered, each call has a thread. The last list of a server that is gone counts for ten minutes.
#
# The lists that the servers give the router itself, with its own keys, also decide where requests
# go (section 9). They are asked for at the start, and once a minute while requests come: an idle
# router wakes nobody. When a request names a model that is on none of them, they are asked for
# again before it goes on, but seldom. With its list, each server is asked which API it speaks.


class Refusal(NamedTuple):
    """What a server answered in place of its models."""

    status: int
    fields: tuple[tuple[str, str], ...]
    content: bytes


class ListRefused(BadGateway):
    """A server answered with an error in place of its models, and the client gets that error."""

    def __init__(self, refusal: Refusal) -> None:
        document = parse_object(refusal.content)
        words = error_words(document) if document else ""
        # A client of another dialect gets the error written anew: the server's type would be wrong.
        fields = [field for field in refusal.fields if field[0].lower() != "content-type"]
        super().__init__(words or f"/v1/models answered {refusal.status}", *fields)
        self.status = refusal.status
        self.refusal = refusal


def read_model_list(content: bytes, limits: Limits) -> list[dict[str, Any]]:
    """Return the models in a server's list, each once. Raises ValueError.

    `{"data": [{"id": "m"}, {"id": "m"}]}`, `[{"id": "m"}]`  ->  [{"id": "m"}]
    """
    document = parse_value(content, limits)
    try:
        # A list that is deeper could not be written again for the client.
        check_json_size(content.decode("utf-8", "replace"), math.inf, limits)
    except RouterError:
        document = None
    if not isinstance(document, (dict, list)):
        raise ValueError(
            f"/v1/models answered no JSON list of at most {limits.model_list_size} "
            f"bytes and {limits.json_depth} levels"
        )
    # Most servers wrap their list into an object; some do not.
    listed = document.get("data") if isinstance(document, dict) else document
    models: dict[str, dict[str, Any]] = {}
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            models.setdefault(entry["id"], entry)
    return list(models.values())


def connect_to_any(addresses: Sequence[str], port: int, timeout: float) -> socket.socket:
    """Connect to the first of these addresses that answers (blocking). Raises OSError."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout)
    return socket.create_connection((addresses[-1], port), timeout)


def make_http_connection(server: Server, tls_context: ssl.SSLContext | None, timeout: float) -> Any:
    """Return a connection of http.client's to a server, which has no socket yet."""
    # Importing it takes 12 ms and 2 MB, which the start can do without.
    import http.client

    host, port = server.url.host, server.url.port
    if tls_context is None:
        return http.client.HTTPConnection(host, port, timeout=timeout)
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=tls_context)


def own_fields(server: Server, authorization: str | None = None) -> dict[str, str]:
    """Return the fields of a request of the router's own; the server's key is tried first."""
    fields = {"Accept": "application/json", **dict(server.headers)}
    credentials = f"Bearer {server.api_key}" if server.api_key else authorization
    if credentials:
        fields["Authorization"] = credentials
    return fields


def take_fields(response: Any) -> Fields:
    """Return the fields of a response of http.client's."""
    return Fields([(name.lower(), name, value) for name, value in response.getheaders()])


def fetch(
    http_connection: Any, server: Server, path: str, authorization: str | None, most: int
) -> tuple[Any, bytes]:
    """Ask a server for a path, and return its response and `most` octets of the content (blocking).

    Raises OSError.
    """
    import http.client

    fields = own_fields(server, authorization)
    try:
        http_connection.request("GET", f"{server.url.prefix}{path}", headers=fields)
        response = http_connection.getresponse()
        return response, response.read(most)
    except (http.client.HTTPException, AttributeError) as error:
        # AttributeError: the call took too long, `ask` has ended the connection meanwhile,
        # and http.client finds no socket.
        raise OSError(describe(error)) from None
    finally:
        http_connection.close()


def fetch_service(http_connection: Any, server: Server, limits: Limits) -> str:
    """Ask a server what it speaks, by its greeting (blocking). Raises OSError."""
    response, content = fetch(http_connection, server, "/", None, limits.greeting)
    if response.status >= 500:
        # That is said in its place, by a proxy for example.
        raise OSError(f"/ answered {response.status}")
    return service_of(content.decode("utf-8", "replace"))


def fetch_models(
    http_connection: Any, server: Server, authorization: str | None, limits: Limits
) -> list[dict[str, Any]]:
    """Ask a server for its models (blocking). Raises OSError, ValueError or ListRefused."""
    response, content = fetch(
        http_connection, server, "/v1/models", authorization, limits.model_list_size
    )
    answer_fields = take_fields(response)
    coding = read_coding(answer_fields)
    if coding in CODINGS:
        # It was not asked for; some servers send it all the same.
        try:
            content = Inflater(coding, limits.decoded_answer).feed(content)
        except BadGateway as error:
            raise ValueError(f"/v1/models: {error}") from None
    if response.status >= 400:
        kept = [(name, value) for lower, name, value in answer_fields.lines if lower in LIST_FIELDS]
        if len(content) > limits.refused_list:
            content = b""
        raise ListRefused(Refusal(response.status, tuple(kept), content))
    return read_model_list(content, limits)


class ModelList(NamedTuple):
    """The models that a server listed, and when it was asked, on the monotonic clock."""

    asked_at: float
    models: list[dict[str, Any]]


def model_entry(name: str) -> dict[str, Any]:
    """Return a name of the router's own as an entry of the model list."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "smolrouter"}


class ModelLists:
    """The models of every server, asked for at most once a minute."""

    def __init__(self, upstreams: Upstreams) -> None:
        self.upstreams = upstreams
        self.limits = upstreams.limits
        self.lists: dict[ModelListKey, ModelList] = {}
        # The errors of servers that refused theirs when they were asked last.
        self.refusals: dict[ModelListKey, Refusal] = {}
        # When a server's models were changed through the router, on the monotonic clock. What it
        # has listed before is not true any more.
        self.changed_at: dict[UpstreamURL, float] = {}
        self.refreshing: dict[ModelListKey, asyncio.Task[None]] = {}
        self.fetch_permits = asyncio.Semaphore(self.limits.model_list_fetches)
        # What the routing knows of the lists. It is replaced when one of them changes.
        self.catalogue = EMPTY_CATALOGUE
        # When each of the router's own lists was asked for last, whatever came of it; on the
        # monotonic clock.
        self.tried_at: dict[ModelListKey, float] = {}
        # The lists that are asked for and have never been answered or failed yet.
        self.first_tries: set[ModelListKey] = set()
        # For which table the lists were asked for, when that is due again, and when it was done
        # for a model that was on none of them.
        self.table: RoutingTable | None = None
        self.due_at = 0.0
        self.searched_at = -math.inf

    def note_change(self, server: Server) -> None:
        """Note that a server may have other models now than it has listed."""
        self.changed_at[server.url] = time.monotonic()
        self.due_at = 0.0
        self.searched_at = -math.inf
        # Nobody new waits for a list that was asked for before.
        for key in [key for key in self.refreshing if key[0] == str(server.url)]:
            del self.refreshing[key]

    def find(self, key: ModelListKey, server: Server) -> tuple[ModelList | None, bool]:
        """Return the last list unless it is too old, and whether no change has made it wrong."""
        known = self.lists.get(key)
        if known is None or time.monotonic() - known.asked_at > self.limits.model_list_kept:
            return None, False
        return known, known.asked_at > self.changed_at.get(server.url, 0.0)

    async def get(self, server: Server, authorization: str | None) -> list[dict[str, Any]] | None:
        """Return a server's models; None when nothing is known and it does not answer."""
        if server.models is not None:
            return [model_entry(name) for name in server.models]
        key = list_key(server, authorization)
        known, is_current = self.find(key, server)
        is_fresh = (
            known is not None and time.monotonic() - known.asked_at <= self.limits.model_list_fresh
        )
        if (is_current and is_fresh) or self.upstreams.is_cooling(server):
            return known.models if known else None
        self.start_refresh(key, server, authorization)
        # An old list will do for now; without one, or with a wrong one, the client has to wait.
        if not is_current:
            await asyncio.wait([self.refreshing[key]], timeout=self.limits.model_list_timeout)
            known, _ = self.find(key, server)
        return known.models if known else None

    def start_refresh(self, key: ModelListKey, server: Server, authorization: str | None) -> None:
        """Ask a server for its list, unless that is being done."""
        if key in self.refreshing:
            return
        if key == own_list_key(server) and key not in self.tried_at:
            self.first_tries.add(key)
        self.refreshing[key] = asyncio.create_task(self.refresh(key, server, authorization))

    async def refresh(self, key: ModelListKey, server: Server, authorization: str | None) -> None:
        """Ask a server for its list, and for what it speaks when it is to be found out."""
        is_own = key == own_list_key(server)
        asked_at = time.monotonic()
        try:
            reached = await self.renew(key, server, authorization)
            if reached and is_own and server.api == AUTO:
                await self.learn_service(key, server)
        finally:
            self.first_tries.discard(key)
            if is_own:
                self.tried_at[key] = asked_at
            if self.refreshing.get(key) is asyncio.current_task():
                del self.refreshing[key]

    async def renew(self, key: ModelListKey, server: Server, authorization: str | None) -> bool:
        """Ask a server and keep its list; a failure leaves the last one. Tell if it was reached."""
        health = self.upstreams.health_of(Instance(server))
        read = functools.partial(
            fetch_models, server=server, authorization=authorization, limits=self.limits
        )
        self.refusals.pop(key, None)
        asked_at = time.monotonic()
        try:
            models = await self.ask(server, read)
        except (OSError, asyncio.TimeoutError) as error:
            health.fail(describe(error))
            return False
        except ListRefused as error:
            # The server is well, but it has no list for us.
            health.succeed()
            health.error = f"/v1/models answered {error.status}"
            keep_newest(self.refusals, key, error.refusal, self.limits.model_lists)
        except ValueError as error:
            # What it sent is none.
            health.succeed()
            health.error = str(error)
        else:
            health.succeed()
            # Another refresh may have begun later and be here already.
            if key not in self.lists or self.lists[key].asked_at < asked_at:
                self.keep(key, server, ModelList(asked_at, models))
        return True

    async def learn_service(self, key: ModelListKey, server: Server) -> None:
        """Ask a server what it speaks; when it does not say, what it was found to speak stays."""
        read = functools.partial(fetch_service, server=server, limits=self.limits)
        try:
            service = await self.ask(server, read)
        except (OSError, ValueError, asyncio.TimeoutError):
            return
        services = self.catalogue.services
        if services.get(key) != service:
            services = {**services, key: service}
            self.catalogue = dataclasses.replace(self.catalogue, services=services)

    def keep(self, key: ModelListKey, server: Server, models: ModelList) -> None:
        """Keep a list, and tell the routing when it is one of the router's own and has changed."""
        if key == own_list_key(server):
            names = index_names(entry["id"] for entry in models.models)
            if self.catalogue.lists.get(key) != names:
                lists = {**self.catalogue.lists, key: names}
                self.catalogue = dataclasses.replace(self.catalogue, lists=lists)
        if key not in self.lists and len(self.lists) >= self.limits.model_lists:
            # Clients choose credentials as they like. Their lists make room, not the router's own.
            of_clients = (kept for kept in self.lists if kept not in self.catalogue.lists)
            self.lists.pop(next(of_clients, key), None)
        self.lists[key] = models

    # The lists by which requests are routed.

    def refresh_due(self, table: RoutingTable) -> None:
        """Ask the servers of a table for their lists, if the last time was a minute ago.

        This is called with each request. A new table is asked for at once.
        """
        now = time.monotonic()
        if now < self.due_at and table is self.table:
            return
        self.table = table
        self.due_at = now + self.limits.model_list_fresh
        self.forget_outdated(table, now)
        for server in table.asked_servers:
            if not self.upstreams.is_cooling(server):
                self.start_refresh(own_list_key(server), server, None)

    def forget_outdated(self, table: RoutingTable, now: float) -> None:
        """Take lists out of the catalogue that do not count any more.

        The last list of a server that cannot be asked counts for a while, so that its models fail
        with its error. After an idle hour a list is as old, but nobody has tried yet to renew it.
        """
        current = {}
        for server in table.asked_servers:
            key = own_list_key(server)
            names = self.catalogue.lists.get(key)
            if names is None:
                continue
            asked_at = self.lists[key].asked_at
            is_old = now - asked_at > self.limits.model_list_kept
            tried_at = self.tried_at.get(key, asked_at)
            has_failed = tried_at > asked_at or self.upstreams.is_cooling(server)
            if not (is_old and has_failed):
                current[key] = names
        if len(current) < len(self.catalogue.lists):
            self.catalogue = dataclasses.replace(self.catalogue, lists=current)

    async def search(self, table: RoutingTable) -> None:
        """Ask for lists again because a model is on none of them; wait for those that are coming.

        However many names clients make up, each list is asked for once in ten seconds.
        """
        now = time.monotonic()
        if now - self.searched_at >= self.limits.model_search_interval:
            for server in table.asked_servers:
                key = own_list_key(server)
                is_stale = now - self.tried_at.get(key, -math.inf) > self.limits.model_list_stale
                is_wrong = self.changed_at.get(server.url, -math.inf) > self.tried_at.get(key, 0.0)
                if (is_stale or is_wrong) and not self.upstreams.is_cooling(server):
                    self.searched_at = now
                    self.start_refresh(key, server, None)
        await self.wait(table)

    async def wait(self, table: RoutingTable) -> None:
        """Wait a moment for the lists of a table that are being asked for."""
        if not self.refreshing:
            return
        keys = [own_list_key(server) for server in table.asked_servers]
        running = [self.refreshing[key] for key in keys if key in self.refreshing]
        if running:
            await asyncio.wait(running, timeout=self.limits.model_list_timeout)

    def age(self, server: Server) -> int | None:
        """Return for how many seconds a server's list is known; None if there is none to age."""
        known = self.lists.get(own_list_key(server))
        if known is None or server.models is not None:
            return None
        return int(time.monotonic() - known.asked_at)

    async def ask(self, server: Server, read: Callable[[Any], Any]) -> Any:
        """Return what `read` gets from a connection of http.client's to a server, in a short time.

        Raises OSError, TimeoutError, ValueError or ListRefused.
        """
        timeout = self.limits.model_list_timeout
        tls_context = self.upstreams.pool.tls_context(server)
        http_connection = make_http_connection(server, tls_context, timeout)
        try:
            async with self.fetch_permits:
                reading = self.read_in_thread(http_connection, server, read)
                return await asyncio.wait_for(reading, timeout)
        finally:
            # A thread that still reads has to end.
            with contextlib.suppress(OSError):
                if http_connection.sock:
                    http_connection.sock.shutdown(socket.SHUT_RDWR)

    async def read_in_thread(
        self, http_connection: Any, server: Server, read: Callable[[Any], Any]
    ) -> Any:
        """Connect to a server and call `read`, in a thread. Raises what it raises."""
        addresses = await self.upstreams.pool.names.find(server.url.host)
        tls_context = self.upstreams.pool.tls_context(server)

        def connect_and_read() -> Any:
            # http.client would look the name up again.
            sock = connect_to_any(addresses, server.url.port, self.limits.model_list_timeout)
            http_connection.sock = sock
            if tls_context:
                http_connection.sock = tls_context.wrap_socket(
                    sock, server_hostname=server.url.host
                )
            return read(http_connection)

        return await run_in_daemon((OSError, ValueError, ListRefused), connect_and_read)


def unknown_model(model: str, names: Sequence[str]) -> str:
    """Return the words for a model that nobody has, with the names that come nearest.

    'llama', ('llama3', 'qwen')  ->  "no such model 'llama'; the nearest is llama3"
    """
    # Python takes 4 ms to import it.
    import difflib

    words = f"no such model {model[:80]!r}"
    # The comparison takes quadratic time; a menu is not that long.
    listed = [name[:80] for name in names[:1000]]
    nearest = difflib.get_close_matches(without_tag(model)[:80], listed, NAMES_IN_ERROR, 0.5)
    if len(nearest) == 1:
        return f"{words}; the nearest is {nearest[0]}"
    if nearest:
        return f"{words}; the nearest are {', '.join(nearest)}"
    if listed:
        return f"{words}; there are {', '.join(listed[:NAMES_IN_ERROR])}"
    return words


def merge_models(
    own_names: Iterable[str], lists: Iterable[tuple[Server, list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Return all models, own names first.

    A model of several servers is there once more for each, under a name that pins its server:

    ('fast',), (a, [m]), (b, [m])  ->  fast, m, 'm [a]', 'm [b]'; `m` is the first server's entry.
    """
    models = {name: model_entry(name) for name in own_names}
    listings: dict[str, list[tuple[Server, dict[str, Any]]]] = {}
    for server, entries in lists:
        for entry in entries:
            listings.setdefault(entry["id"], []).append((server, entry))
    for name, holders in listings.items():
        _, first_entry = holders[0]
        models.setdefault(name, first_entry)
        if len(holders) == 1:
            continue
        for server, entry in holders:
            pinned_name = f"{name} [{server.name}]"
            models[pinned_name] = {**entry, "id": pinned_name}
    return list(models.values())


async def list_models(
    model_lists: ModelLists, table: RoutingTable, authorization: str | None
) -> list[dict[str, Any]]:
    """Return the models of all servers. Raises BadGateway when there is not a single name.

    When there is only one server and it refuses, its error is raised as ListRefused.
    """
    # In this order a model's first entry is that of the server which is asked for it first.
    servers = table.search_order
    answers = await asyncio.gather(*(model_lists.get(s, authorization) for s in servers))
    map_keys = [pattern for pattern, _ in table.model_map if isinstance(pattern, str)]
    own_names = [*table.aliases, *map_keys]
    if not own_names and all(answer is None for answer in answers):
        refusal = model_lists.refusals.get(list_key(servers[0], authorization))
        if len(servers) == 1 and refusal:
            raise ListRefused(refusal)
        reasons = []
        for server in servers:
            reason = model_lists.upstreams.health_of(Instance(server)).error or "no answer yet"
            reasons.append(f"{server.name} ({server.url}): {reason}")
        raise BadGateway(f"no server could be asked for its models: {', '.join(reasons)}")
    listed = zip(servers, answers, strict=True)
    return merge_models(own_names, [(server, answer or []) for server, answer in listed])


# ======================================================================================
# 13  Request log
# ======================================================================================
# What happened to every request: a row, both heads and both bodies, in SQLite and in files.
# A request has one object, a `RequestRecord`, until its row is in the database. One thread
# makes rows and writes them, so that the event loop never waits for a disk. Whatever is wrong
# with the database, requests go on, and their rows wait. Questions to it are in section 15.
# To add a column: its name at the end of `COLUMNS`, its value at the end of `make_row`, and a
# script with its ALTER TABLE at the end of `MIGRATIONS`. Lists show it, unless section 15's
# `UNLISTED` has its name.

# --- theory of operation ---
#
# At any moment a request is in one of three places:
#
#   running   Its record is in `RequestLog.running`, by id, and is the event loop's: its exchange
#             fills it in, and `append_body` keeps what the upstream says. When it has run for
#             a moment, the thread reads it and writes a row whose `failed` is NULL, which says
#             that the request still runs. After a crash that row tells what was interrupted.
#   finished  Its record is in `RequestLog.finished`, a queue, the oldest first, and is the
#             thread's, which makes its row, packs its bodies and lets the raw ones go
#             (`prepare_row`). It leaves the queue after the transaction with its row is
#             committed, never before.
#   written   Its row and its bodies are in the database, and its record is gone.
#
# To find a request, look in the three places in this order: it can move on meanwhile, but only
# to a place that is still to be looked at.
#
# Threads: the event loop calls `begin`, `append_body`, `finish` and `wait_to_begin`. The thread
# "log" runs `run`, and only it writes. Two more run the queries of the page (`ask`), each time
# with a connection of its own that can only read; SQLite's write-ahead log lets them read while
# others write.
#
# Time: each transaction waits for the disk, so the thread collects what happens in
# `LIMITS.batch_interval` and writes it in one. A row that is not written yet is lost when the
# program is killed; so when rows are late by more than `LIMITS.row_delay`, new requests wait a
# little before they begin (`wait_to_begin`). Bodies matter less. They have so much memory
# (`LIMITS.body_memory`) and, while many rows wait, a share of a processor (`BodyBudget`). Bodies
# that need more are cut and marked as cut; their rows are complete.
#
# Trouble: an error of the database or of a file leaves all records of its transaction in the
# queue. It is printed once, and after `LIMITS.retry_interval` the thread tries again. No request
# waits for a database in trouble. When too many wait (`LIMITS.backlog_rows`), the oldest records
# are dropped, which is counted and printed. In particular:
#
#   locked, full,   The next try may do better. A lock of another program is waited for, for
#   not writable    up to `LIMITS.database_lock_timeout`, before it is an error.
#   deleted         Before each transaction, and now and then, its files are compared with those
#                   that are open: others, or none, are opened, and get their tables.
#   emptied         It is closed and checked. What the write-ahead log has is saved, if it is whole.
#   corrupt         It is renamed, never deleted, and a new one begins. A reader may find it
#                   first; then the thread checks the file itself.
#   another's       A database of another program or of a newer version is never touched.
#   our own fault   A request whose row cannot be made loses its bodies and not its row.

COLUMNS = """id, request_id, timestamp, source_ip, method, path, service_type, original_model,
    mapped_model, upstream_url, route, duration_ms, ttft_ms, request_size, response_size,
    status_code, error_message, prompt_tokens, completion_tokens, tokens_estimated, attempts,
    stream, completed_at, sent_model, cached_tokens, user_agent, client_key, failed, level,
    queued_ms"""
# A row as the database has it. `original_model` is the model that the client asked for,
# `mapped_model` what MODEL_MAP makes of it, and `sent_model` what the server was asked for.
# `timestamp` and `completed_at` are in ms since 1970; `failed` is None while the request runs.
# `level` lets the performance page draw an even sample of a long log: half of all rows have 0, a
# quarter has 1, and so on. It is None when no model was asked for an answer: without a model, or
# to load one alone. Such a request is counted, and is in no figure of a model.
Row = collections.namedtuple("Row", COLUMNS)

# For each hour, service, model and server a tally is kept: these sums, and two histograms. The
# speed of a model is `spoken_tokens` per `spoken_ms`: the tokens of its answers, and the time from
# the first token of an answer to the last. Both sums leave out the requests that lack one of them.
SUMS = (
    "requests",
    "errors",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "spoken_tokens",
    "spoken_ms",
    "duration_ms",
    "ttft_ms",
)
# What of a row goes into these sums and histograms.
COUNTED = (
    "failed",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "duration_ms",
    "ttft_ms",
)
# The longest time in ms that each bucket of a histogram counts: 1 ms to 50 min, each 1.4 times
# the one before. The last bucket counts what is longer, too.
BUCKET_ENDS = [2 ** (step / 2) for step in range(44)]
# The columns of a tally: its sums, the buckets of the durations, and those of the times to the
# first token (TTFT).
DURATION_COLUMNS = [f"d{number}" for number in range(len(BUCKET_ENDS))]
TTFT_COLUMNS = [f"t{number}" for number in range(len(BUCKET_ENDS))]
TALLY_COLUMNS = (*SUMS, *DURATION_COLUMNS, *TTFT_COLUMNS)
# Where the buckets of both histograms stand in a tally.
DURATIONS = slice(len(SUMS), len(SUMS) + len(BUCKET_ENDS))
TTFTS = slice(len(SUMS) + len(BUCKET_ENDS), len(TALLY_COLUMNS))

# So many routers can share a database: the lowest six bits of an id are its router's number.
MAX_ROUTERS = 64
# SQLite keeps this number in the head of the file: `Smol`, the mark of a database of ours.
APPLICATION_ID = 0x536D6F6C
# What the log says of a request whose router has died.
INTERRUPTED = "interrupted"
HOUR_MS = 3_600_000
# The model that a row counts for, in SQL; see `rollup_key`.
MODEL = "ifnull(nullif(sent_model, ''), mapped_model)"
# How SQLite says that a file is damaged.
CORRUPT_MESSAGE = re.compile(r"malformed|not a database")
# Shorter details are kept as they are. To pack them saves little, and each call of zlib gives up
# Python's interpreter lock, for which this thread then has to wait again.
MIN_PACKED = 2 * KiB
# Pieces of an answer up to the first length are gathered in one up to the second. Python keeps
# small objects by the megabyte, which it gives back to the system only when all of it is free:
# the events of hundreds of streams would leave a few objects in each of many.
SMALL_PIECE = 512
LONGEST_GATHERED = 16 * KiB
# Of an answer that is not kept whole, so much of its end is looked at for its usage.
ANSWER_END = 8 * KiB
# Each step of pruning deletes so many rows, and gives so many pages back to the file system.
PRUNED_ROWS = 500
VACUUMED_PAGES = 256
# The files of a database: itself, its write-ahead log and the index of that.
DATABASE_SUFFIXES = ("", "-shm", "-wal")
# SQLite's files begin with a head of so many octets; a shorter file holds no database.
DATABASE_HEAD = 100
# Rows inserted by one statement; see `insert_rows`.
ROWS_AT_ONCE = 32

# Each script brings the database from the version before it to its own. What was released is
# never changed: a database out there has been through it. The index `sample` has the rows from
# section 15's SAMPLE_LEVEL on.
MIGRATIONS = (
    f"""
CREATE TABLE requests (id INTEGER PRIMARY KEY, request_id, timestamp, source_ip, method, path,
    service_type, original_model, mapped_model, upstream_url, route, duration_ms, ttft_ms,
    request_size, response_size, status_code, error_message, prompt_tokens, completion_tokens,
    tokens_estimated, attempts, stream, completed_at, sent_model, cached_tokens, user_agent,
    client_key, failed, level);
CREATE INDEX by_sent ON requests (sent_model, id, level);
CREATE INDEX by_asked ON requests (original_model, id) WHERE original_model <> sent_model;
CREATE INDEX by_service ON requests (service_type, id, level);
CREATE INDEX by_upstream ON requests (upstream_url, id, failed, duration_ms);
CREATE INDEX by_source ON requests (source_ip, id);
CREATE INDEX by_outcome ON requests (failed, id, status_code);
CREATE INDEX sample ON requests (level, id, timestamp, sent_model, mapped_model, service_type,
    upstream_url, prompt_tokens, completion_tokens, duration_ms, ttft_ms, status_code, failed)
    WHERE level >= 3;
CREATE TABLE rollups (hour, service_type, model, upstream_url, {", ".join(TALLY_COLUMNS)},
    PRIMARY KEY (hour, service_type, model, upstream_url)) WITHOUT ROWID;
CREATE TABLE details (id INTEGER PRIMARY KEY, size, request_blob, response_blob, data);
CREATE TABLE blobs (digest TEXT PRIMARY KEY, size, uses DEFAULT 0) WITHOUT ROWID;
CREATE INDEX unused ON blobs (digest) WHERE uses < 1;
CREATE TABLE storage (bytes);
INSERT INTO storage VALUES (0);
CREATE TRIGGER kept AFTER INSERT ON details BEGIN
    UPDATE storage SET bytes = bytes + length(NEW.data);
    UPDATE blobs SET uses = uses + 1 WHERE digest = NEW.request_blob;
    UPDATE blobs SET uses = uses + 1 WHERE digest = NEW.response_blob; END;
CREATE TRIGGER forgotten AFTER DELETE ON details BEGIN
    UPDATE storage SET bytes = bytes - length(OLD.data);
    UPDATE blobs SET uses = uses - 1 WHERE digest = OLD.request_blob;
    UPDATE blobs SET uses = uses - 1 WHERE digest = OLD.response_blob; END;
CREATE TRIGGER filed AFTER INSERT ON blobs BEGIN
    UPDATE storage SET bytes = bytes + NEW.size; END;
CREATE TRIGGER dropped AFTER DELETE ON blobs BEGIN
    UPDATE storage SET bytes = bytes - OLD.size; END""",
    # Requests that a crash has interrupted were in no sum until now.
    f"""
INSERT INTO rollups
    SELECT timestamp / {HOUR_MS} AS hour_, service_type AS service_, {MODEL} AS model_,
        upstream_url AS url_, count(*), count(*), {", ".join(["0"] * (len(TALLY_COLUMNS) - 2))}
    FROM requests WHERE failed = 1 AND status_code IS NULL AND error_message = '{INTERRUPTED}'
    GROUP BY hour_, service_, model_, url_
    ON CONFLICT (hour, service_type, model, upstream_url)
    DO UPDATE SET requests = requests + excluded.requests, errors = errors + excluded.errors""",
    # What is of a time is found by it. Ids tell it only as long as no clock has been ahead.
    "CREATE INDEX by_time ON requests (timestamp)",
    # What asked no model has no point.
    "UPDATE requests SET level = NULL WHERE sent_model = '' AND mapped_model = ''",
    # For how long a request has waited for slots.
    "ALTER TABLE requests ADD COLUMN queued_ms",
)


def time_id(moment: float) -> int:
    """Return the lowest id of a moment in s UTC.

    Ids grow with time: the moment in 1/16 ms, and below it six bits for the router's number. So an
    id is about ms * 1024. It stays below 2**53, where JavaScript's numbers end, until 2248.
    """
    return int(moment * 16_000) * MAX_ROUTERS


# --- the record of a request ---


class Attempt(NamedTuple):
    """One instance that was asked, and how it answered."""

    instance: str
    upstream_url: str
    status: int | None
    error: str | None
    duration_ms: float


class PackedBody(NamedTuple):
    """A long body, packed; its digest names the file in which it is kept."""

    digest: str
    data: bytes


@dataclasses.dataclass(slots=True, eq=False)
class RequestRecord:
    """One request, from its beginning until its row is written.

    `timestamp` is in s UTC. What ends in `_at` is a moment of the monotonic clock.
    """

    # What is known at the beginning.
    request_id: str
    service: str
    source_ip: str
    method: str
    target: str
    request_fields: Fields
    content: bytes
    request_size: int
    stream: bool
    requested_model: str
    mapped_model: str
    route: str
    trail: tuple[Step, ...]
    # What must not be kept of it.
    secrets: Secrets = ()
    timestamp: float = dataclasses.field(default_factory=time.time)
    started_at: float = dataclasses.field(default_factory=time.monotonic)
    # `RequestLog.begin` numbers it.
    id: int = 0

    # It has no prompt, and so asks for nothing but to load a model, or to unload it.
    only_loads: bool = False

    # What its exchange finds out. The phase is "queued", for a slot, "waking", for a machine that
    # slept, "waiting", for the first octet of an answer, or "streaming".
    phase: str = "waiting"
    # While it is queued: since when, and the names of the servers that could run it. And for how
    # long, in s, it was queued before.
    queued_at: float | None = None
    waits_for: str = ""
    queued_s: float = 0.0
    sent_model: str = ""
    upstream_url: str = ""
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    # What the parameters of the routing file have changed in what was sent, in words.
    changes: Sequence[str] = ()
    # The fields and the status of the upstream's answer that is relayed.
    response_fields: Fields | None = None
    answer_status: int = 0
    # How the request ended: the status of the client's answer, or of the error that broke it off.
    status: int = 0
    error: str = ""
    # Octets of content that the client was sent.
    response_size: int = 0
    first_token_at: float | None = None
    finished_at: float | None = None
    # While the request runs: what the owner calls, from the page, to end it; with the reason.
    stop: Callable[[RouterError], None] | None = None

    # The answer as the upstream has sent it, as far as it is kept, and its size.
    pieces: list[bytes | bytearray] = dataclasses.field(default_factory=list)
    pieces_size: int = 0
    # When not all of an answer is kept: its last octets, where most servers tell the usage.
    answer_end: bytes = b""
    request_cut: bool = False
    response_cut: bool = False
    # Octets of both bodies that the record keeps in memory now, raw or packed.
    body_bytes: int = 0

    # What the log's thread makes of it. Whether the database has the row which says that the
    # request runs:
    has_unfinished_row: bool = False
    # The row of the finished request.
    row: Row | None = None
    # Its detail, as `pack_detail` returns it: heads, trail and short bodies; and the long bodies
    # of request and answer, each None when it is short.
    data: bytes = b""
    blobs: tuple[PackedBody | None, ...] = (None, None)

    @classmethod
    def of(
        cls, request_id: str, request: Request, stream: bool, decision: Decision
    ) -> RequestRecord:
        """Return the record of a request that begins; `decision` says which way it will go."""
        return cls(
            request_id=request_id,
            service=request.dialect.service,
            source_ip=request.source_host,
            method=request.head.method,
            target=request.path + request.query,
            request_fields=request.head.fields,
            content=request.content,
            request_size=len(request.content),
            stream=stream,
            requested_model=decision.requested_model,
            mapped_model=decision.mapped_model,
            route=decision.route,
            trail=decision.trail,
        )

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error, which may have come after the head of a good answer.

        This decides what is a failure in rows, and by them in lists, figures and metrics.
        """
        return self.status >= 400 or bool(self.error)

    def queued_ms(self, now: float) -> float:
        """Return for how long it has waited for slots by now, which is monotonic."""
        waiting_s = now - self.queued_at if self.queued_at is not None else 0.0
        return round((self.queued_s + waiting_s) * 1000, 1)

    @property
    def shown_target(self) -> str:
        """The target as it may be kept and shown."""
        return hide_in_text(hide_parameters(self.target), self.secrets)

    @property
    def event_count(self) -> int:
        """About how many events of a stream have come: what the page shows as its tokens."""
        if not self.stream:
            return 0
        # Each event of SSE has a line of data, and each line of NDJSON is an event. The first piece
        # may hold just a comment or half a line.
        is_sse = any(b"data:" in piece for piece in self.pieces[:2])
        mark = b"data:" if is_sse else b"\n"
        return sum(piece.count(mark) for piece in self.pieces)


class Detail(NamedTuple):
    """What is kept of a request beside its row: JSON of heads and trail, and both bodies."""

    meta: str = "{}"
    request: bytes = b""
    response: bytes = b""


# The JSON of trails and of marks for cut bodies, which are the same for nearly all requests.
encode_repeated = functools.lru_cache(maxsize=256)(dump_compact)


def encode_trail(trail: tuple[Step, ...]) -> str:
    """Return a trail as JSON. Long ones are not kept: clients choose what they are about."""
    if len(trail) > LIMITS.remembered_steps:
        return dump_compact(trail)
    return encode_repeated(trail)


def is_quiet(settings: Settings) -> bool:
    """Tell whether LOG_LEVEL is so high that no line is printed for a request."""
    return settings.log_level not in ("DEBUG", "INFO")


def make_detail(record: RequestRecord) -> Detail:
    """Return what is kept of a request beside its row, secrets hidden.

    Its bodies have no content coding any more; `decoded` says so, because older versions kept them
    as they came.
    """
    secrets = record.secrets
    request_lines = show_fields(record.request_fields).lines
    response_lines = show_fields(record.response_fields or NO_FIELDS).lines
    cut = encode_repeated((record.request_cut, record.response_cut))
    meta = (
        f'{{"trail":{encode_trail(record.trail)},"request_headers":{request_lines},'
        f'"response_headers":{response_lines},"cut":{cut},"decoded":true}}'
    )
    if record.changes:
        meta = f'{meta[:-1]},"changes":{dump_compact(record.changes)}}}'
    # A server may repeat secrets in its answer, in a field of it, too.
    request = hide_secrets(record.content, secrets)
    response = hide_secrets(b"".join(record.pieces), secrets)
    if record.request_cut:
        request = hide_cut_secret(request, secrets)
    if record.response_cut:
        response = hide_cut_secret(response, secrets)
    return Detail(hide_in_text(meta, secrets), request, response)


def count_tokens(record: RequestRecord, detail: Detail) -> tuple[Usage, bool]:
    """Return what a request cost in tokens, and whether that is an estimate.

    Where the server tells no usage it is estimated from the texts of request and answer. That
    needs all of a text: of one that was cut the number of tokens is None, never 0.
    """
    if record.response_fields is None:
        return Usage(), False
    # An error answer has cost nothing. An answer that began well and broke off, or whose client
    # left, has cost what was said until then.
    began_well = record.answer_status < 400
    failed = record.status >= 400 and record.status != ClientClosed.status
    if failed and not began_well:
        return Usage(), False
    answer = detail.response + record.answer_end
    usage = read_usage(answer)
    path = record.path
    if usage.completion is not None or not answer:
        return usage, False
    # Without words of a user there is no transcript to count in.
    if not find_protocol(path).user_words:
        return usage, False
    is_estimated = False
    # A prompt of 0 tokens is one that the server has not counted.
    usage = usage._replace(prompt=usage.prompt or None)
    if usage.prompt is None and not record.request_cut:
        prompt = estimate_tokens(read_transcript(path, record.content, b""))
        usage = usage._replace(prompt=prompt)
        is_estimated = True
    if not record.response_cut:
        completion = estimate_tokens(read_transcript(path, b"", answer))
        usage = usage._replace(completion=completion)
        is_estimated = True
    return usage, is_estimated


def encode_attempts(record: RequestRecord) -> str:
    """Return the attempts of a request as JSON, long names cut and secrets hidden."""
    attempts = []
    for attempt in record.attempts:
        attempts.append(attempt._replace(instance=cut_name(attempt.instance)))
    return hide_in_text(dump_compact(attempts), record.secrets)


def make_level(record: RequestRecord) -> int | None:
    """Return the level of a request: 0 for half of all, 1 for a quarter, and so on.

    It is the lowest bit that is set in a hash, not in a random number, so that the finished row of
    a request has the level of the row that it replaces. What no model was to answer has none.
    """
    has_loaded = record.only_loads and not record.has_failed
    if has_loaded or not (record.sent_model or record.mapped_model):
        return None
    chance = hash(record.request_id)
    return (chance & -chance).bit_length() - 1


def make_row(record: RequestRecord, detail: Detail, finished: bool = True) -> Row:
    """Return the row of a request; without `finished`, the row that says that it runs."""
    usage, is_estimated = count_tokens(record, detail)
    shown = show_fields(record.request_fields)
    timestamp = int(record.timestamp * 1000)
    duration = None
    completed_at = None
    failed = None
    ttft = None
    if finished and record.finished_at is not None:
        duration = round((record.finished_at - record.started_at) * 1000, 1)
        completed_at = timestamp + int(duration)
        failed = int(record.has_failed)
    if record.stream and record.first_token_at is not None:
        ttft = round((record.first_token_at - record.started_at) * 1000, 1)
    return Row(
        record.id,
        record.request_id,
        timestamp,
        record.source_ip,
        record.method,
        cut_name(record.shown_target),
        record.service,
        cut_name(record.requested_model),
        cut_name(record.mapped_model),
        record.upstream_url,
        cut_name(record.route),
        duration,
        ttft,
        record.request_size,
        record.response_size,
        record.status or None,
        hide_in_text(record.error, record.secrets) or None,
        usage.prompt,
        usage.completion,
        int(is_estimated),
        encode_attempts(record),
        int(record.stream),
        completed_at,
        cut_name(record.sent_model),
        usage.cached,
        hide_in_text(cut_name(shown.user_agent), record.secrets),
        shown.client_key,
        failed,
        make_level(record),
        round(record.queued_s * 1000, 1),
    )


def pack_blob(body: bytes) -> PackedBody:
    """Pack a long body."""
    return PackedBody(hashlib.sha256(body).hexdigest(), zlib.compress(body, 1))


def pack_detail(detail: Detail, inline_body: int) -> tuple[bytes, tuple[PackedBody | None, ...]]:
    """Pack a detail: its data for the database, and apart from it bodies over `inline_body`.

    The data is the length of the request's body and LF, the meta and LF, both bodies; deflated all
    together where that is worth it.

    `Detail('{"cut":[false,false]}', b"Hi", b"Yo")`  ->  `2 LF {"cut":[false,false]} LF HiYo`
    """
    inline = []
    blobs = []
    for body in (detail.request, detail.response):
        is_long = len(body) > inline_body
        inline.append(b"" if is_long else body)
        blobs.append(pack_blob(body) if is_long else None)
    head = f"{len(inline[0])}\n{detail.meta}\n".encode("utf-8", "replace")
    data = b"".join((head, *inline))
    if len(data) >= MIN_PACKED:
        data = zlib.compress(data, 1)
    return data, tuple(blobs)


def unpack_detail(data: bytes, blobs: Sequence[bytes | None]) -> Detail:
    """Unpack a detail; `blobs` are the packed long bodies, None for one that is not there."""
    # zlib's first octet is an `x`; a length begins with a digit.
    if not data[:1].isdigit():
        data = zlib.decompress(data)
    size, meta, inline = data.split(b"\n", 2)
    bodies = [inline[: int(size)], inline[int(size) :]]
    for index, blob in enumerate(blobs):
        if blob:
            bodies[index] = zlib.decompress(blob)
    return Detail(meta.decode(), bodies[0], bodies[1])


def decode_answer(record: RequestRecord, limit: int) -> None:
    """Take the content coding off the answer, of which at most `limit` octets are kept.

    Secrets are looked for in the text itself: in a coded one they would not be found.
    """
    coding = read_coding(record.response_fields or NO_FIELDS)
    if coding not in CODINGS:
        return
    coded = b"".join(record.pieces)
    pieces = []
    room = limit
    # The end that was kept of a coded answer says nothing.
    answer_end = b""
    for piece in decode_pieces(coded, coding, LIMITS.decoded_answer):
        pieces.append(piece[:room])
        answer_end = (answer_end + piece[room:])[-ANSWER_END:]
        room -= len(pieces[-1])
    if not any(pieces) and not answer_end:
        # It cannot be read, and stays as it is.
        return
    record.pieces = pieces
    record.answer_end = answer_end
    record.response_cut = record.response_cut or bool(answer_end)


def cut_bodies(record: RequestRecord, limit: int) -> None:
    """Keep the first `limit` octets of each body, and the answer's end, which tells its usage."""
    if len(record.content) > limit:
        record.content = record.content[:limit]
        record.request_cut = True
    answer = b"".join(record.pieces)
    if len(answer) > limit:
        record.pieces = [answer[:limit]]
        record.answer_end = record.answer_end or answer[-ANSWER_END:]
        record.response_cut = True


def describe_request(record: RequestRecord, row: Row) -> str:
    """Return the line that is printed of a request that has ended."""
    words = [row.source_ip, row.method, record.path, row.original_model]
    if row.sent_model not in ("", row.original_model):
        words += ["->", row.sent_model]
    words.append(row.route)
    for attempt in record.attempts[:-1]:
        words.append(f"({attempt.instance}: {attempt.error or attempt.status})")
    words += [row.upstream_url, str(record.status), row.error_message or ""]
    words.append(f"{row.duration_ms / 1000:.3f} s")
    if row.queued_ms:
        words.append(f"({row.queued_ms / 1000:.3f} s queued)")
    if row.completion_tokens is not None:
        words.append(f"{row.completion_tokens} tokens")
    return " ".join(filter(None, words))


# --- sums ---

# The numbers of some requests, in the order of TALLY_COLUMNS.
Tally = list[float]
# By hour, service, model and server.
Tallies = dict[tuple[int, str, str, str], Tally]


counted_values = operator.attrgetter(*COUNTED)


def rollup_key(row: Row) -> tuple[int, str, str, str]:
    """Return under what a request is counted: hour, service, model and server."""
    model = ""
    if row.level is not None:
        model = row.sent_model or row.mapped_model
    return row.timestamp // HOUR_MS, row.service_type, model, row.upstream_url


def add_request(
    tally: Tally,
    failed: int,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    cached_tokens: int | None,
    duration_ms: float | None,
    ttft_ms: float | None,
) -> None:
    """Add a request to a tally; its numbers are those of COUNTED."""
    duration = duration_ms or 0
    ttft = ttft_ms or 0
    completion = completion_tokens or 0
    # A speed needs tokens, counted or estimated, and a time that they took.
    spoken_ms = max(duration - ttft, 0) if completion else 0
    spoken_tokens = completion if spoken_ms else 0
    # Each line is one of SUMS, in their order.
    tally[0] += 1
    tally[1] += failed
    tally[2] += prompt_tokens or 0
    tally[3] += completion
    tally[4] += cached_tokens or 0
    tally[5] += spoken_tokens
    tally[6] += spoken_ms
    tally[7] += duration
    tally[8] += ttft
    for value, buckets in ((duration_ms, DURATIONS), (ttft_ms, TTFTS)):
        if value is not None:
            bucket = min(bisect.bisect_left(BUCKET_ENDS, value), len(BUCKET_ENDS) - 1)
            tally[buckets.start + bucket] += 1


def add_row(tallies: Tallies, row: Row) -> None:
    """Add a request to the tally of its hour, service, model and server."""
    key = rollup_key(row)
    tally = tallies.get(key)
    if tally is None:
        tally = tallies[key] = [0] * len(TALLY_COLUMNS)
    add_request(tally, *counted_values(row))


def sum_rows(rows: Iterable[Row]) -> Tallies:
    """Return the tallies of some requests."""
    tallies: Tallies = {}
    for row in rows:
        add_row(tallies, row)
    return tallies


# --- the database and the files ---


def make_insert(table: str, columns: int, rows: int) -> str:
    """Return the statement that inserts `rows` rows; each replaces the one that has its id."""
    marks = f"({', '.join('?' * columns)})"
    return f"INSERT OR REPLACE INTO {table} VALUES {', '.join([marks] * rows)}"


INSERT_REQUEST = make_insert("requests", len(Row._fields), 1)
INSERT_REQUESTS = make_insert("requests", len(Row._fields), ROWS_AT_ONCE)
INSERT_DETAIL = make_insert("details", 5, 1)
INSERT_DETAILS = make_insert("details", 5, ROWS_AT_ONCE)
INSERT_BLOB = "INSERT OR IGNORE INTO blobs VALUES (?, ?, 0)"
ADD_ROLLUP = f"""INSERT INTO rollups VALUES (?, ?, ?, ?, {", ".join("?" * len(TALLY_COLUMNS))})
    ON CONFLICT (hour, service_type, model, upstream_url)
    DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in TALLY_COLUMNS)}"""
SELECT_RUNNING = f"SELECT {COLUMNS} FROM requests WHERE id = ? AND failed IS NULL"
OLDEST_IDS = "SELECT id FROM requests WHERE timestamp < ? ORDER BY timestamp LIMIT ?"
FINISH_INTERRUPTED = "UPDATE requests SET failed = 1, error_message = ? WHERE id = ?"


def insert_rows(db: sqlite3.Connection, one: str, many: str, rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows, by the statement for `ROWS_AT_ONCE` of them and by that for one.

    SQLite gives up Python's interpreter lock while a statement runs, and the thread then waits
    until the event loop gives it back. Fewer statements with more rows wait less.
    """
    whole = len(rows) - len(rows) % ROWS_AT_ONCE
    for at in range(0, whole, ROWS_AT_ONCE):
        db.execute(many, list(itertools.chain.from_iterable(rows[at : at + ROWS_AT_ONCE])))
    db.executemany(one, rows[whole:])


@contextlib.contextmanager
def open_for_reading(path: str) -> Iterator[sqlite3.Connection]:
    """Open the log's database for queries, which cannot write. Raises sqlite3.Error."""
    # A name of a file is octets, and need not be a text.
    name = urllib.parse.quote(os.fsencode(os.path.abspath(path)))
    with contextlib.closing(sqlite3.connect(f"file:{name}?mode=ro", uri=True)) as db:
        # All statements see the same rows and sums.
        db.execute("BEGIN")
        yield db


class BodyFiles:
    """Long bodies as files, packed and named by their digest."""

    def __init__(self, folder: str) -> None:
        self.folder = pathlib.Path(folder)

    def path(self, digest: str) -> pathlib.Path:
        """Return where the file of a body is."""
        return pathlib.Path(f"{self.folder}/{digest[:2]}/{digest}.z")

    def keep(self, digest: str, data: bytes) -> None:
        """Keep a packed body, unless it is there: requests share what is the same.

        Raises OSError. A file of another length is what a crash or a full disk has left.
        """
        path = self.path(digest)
        try:
            if path.stat().st_size == len(data):
                return
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def get(self, digest: str) -> bytes | None:
        """Return a packed body, None when it is not there."""
        with contextlib.suppress(OSError):
            return self.path(digest).read_bytes()
        return None

    def forget(self, digest: str) -> None:
        """Delete a body."""
        with contextlib.suppress(OSError):
            self.path(digest).unlink()

    def older_than(self, moment: float) -> Iterator[str]:
        """Yield the digests of files from before a moment, s since the epoch."""
        for path in self.folder.glob("??/*.z"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < moment:
                    yield path.stem


class BodyMemory:
    """Long bodies in memory, packed, by their digest: they end with the program."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}

    def keep(self, digest: str, data: bytes) -> None:
        """Keep a packed body."""
        self.bodies[digest] = data

    def get(self, digest: str) -> bytes | None:
        """Return a packed body, None when it is not there."""
        return self.bodies.get(digest)

    def forget(self, digest: str) -> None:
        """Let go of a body."""
        self.bodies.pop(digest, None)

    def older_than(self, moment: float) -> Iterator[str]:
        """Yield nothing: a crash leaves files that no row knows of, but nothing in memory."""
        yield from ()


def find_lock_module() -> Any:
    """Return the module that locks parts of files, None where there is none, as on Windows."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


class Store:
    """The database and the long bodies, as the log's thread uses them."""

    def __init__(self, settings: Settings, limits: Limits = LIMITS) -> None:
        self.path, self.limits = settings.db_path, limits
        self.bytes_limit = settings.max_total_storage_size
        self.max_age = settings.max_log_age_days * 86_400
        self.prune_at = 0.0
        # From this monotonic moment on, interrupted requests are looked for again.
        self.next_look_at = 0.0
        self.bodies: BodyFiles | BodyMemory = BodyMemory()
        if settings.blob_storage_type == "filesystem":
            self.bodies = BodyFiles(settings.blob_storage_path)
        # The number of this router among those that share the database. Until `claim_number` has
        # found a free one, the process's id makes it likely that two routers differ.
        self.router_number = os.getpid() % MAX_ROUTERS
        self.lock_file: int | None = None
        # The highest id of a row. Where a clock was ahead, it is above all ids that the time gives.
        self.newest_id = 0
        self.db: sqlite3.Connection | None = None
        # The files that are open, to see when others are in their place.
        self.files: dict[str, os.stat_result] = {}

    def open(self) -> sqlite3.Connection:
        """Return the database, opened again when another file, or none, is in its place.

        Raises sqlite3.Error or OSError; then `close` is to be called.
        """
        # When only the write-ahead log was removed, nothing is lost: SQLite still has it open, and
        # puts what stands in it into the database as that is closed.
        if self.db and not self.is_in_place():
            self.close()
        if self.db and os.path.getsize(self.path) < DATABASE_HEAD:
            # Somebody has emptied it. Nobody could read what would be written now, although SQLite
            # sees no error. What stands in the write-ahead log is saved, if it is whole.
            self.check()
        if self.db is None:
            # Without an isolation level sqlite3 begins no transaction on its own: the methods
            # below say BEGIN themselves, and `with` commits, or rolls back when it is left by an
            # exception.
            self.db = sqlite3.connect(
                self.path,
                timeout=self.limits.database_lock_timeout,
                isolation_level=None,
            )
            # First, because it needs no database: while that is locked, requests get ids already.
            self.claim_number()
            self.migrate(self.db)
            self.files = self.find_files()
        ((newest,),) = self.db.execute("SELECT max(id) FROM requests")
        self.newest_id = newest or 0
        return self.db

    def find_files(self) -> dict[str, os.stat_result]:
        """Return the files of the database that are there, by their names."""
        files = {}
        for suffix in DATABASE_SUFFIXES:
            name = self.path + suffix
            with contextlib.suppress(FileNotFoundError):
                files[name] = os.stat(name)
        return files

    def is_in_place(self) -> bool:
        """Tell whether the database's names still belong to the files that are open."""
        found = self.find_files()
        return bool(self.files) and all(
            name in found and os.path.samestat(found[name], file)
            for name, file in self.files.items()
        )

    def migrate(self, db: sqlite3.Connection) -> None:
        """Make the tables, or bring them up to date; another's database is left alone."""
        # Counts for a new file alone, and has to come before its first table.
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        ((version, mark, tables),) = db.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_user_version, pragma_application_id"
        )
        if tables and mark != APPLICATION_ID:
            raise OSError(f"{self.path} is another program's database; set another DB_PATH")
        if version > len(MIGRATIONS):
            raise OSError(f"{self.path} was made by a newer SmolRouter (version {version})")
        db.execute("PRAGMA journal_mode = WAL")
        # A crash of the program loses nothing, one of the machine the last transactions at most.
        db.execute("PRAGMA synchronous = NORMAL")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(
                f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {number}; COMMIT"
            )

    def close(self) -> None:
        """Close the database; the last program to do so puts all of it into the one file."""
        if self.db:
            self.db.close()
        self.db = None

    def claim_number(self) -> None:
        """Take the first number that no other router has. Raises OSError.

        Each number is an octet of a file, which its router locks for as long as it lives, however
        it ends. When somebody has removed the file, the next router locks a new one; so does this.
        When no number is free, the one from the process's id stays.
        """
        name = f"{self.path}-lock"
        if self.lock_file is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(name), os.fstat(self.lock_file)):
                    return
            os.close(self.lock_file)
            self.lock_file = None
        if find_lock_module() is None:
            return
        self.lock_file = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)
        for number in range(MAX_ROUTERS):
            if self.lock_number(number):
                self.router_number = number
                return

    def lock_number(self, number: int) -> bool:
        """Lock the octet of a number; tell whether no other router has locked it."""
        fcntl = find_lock_module()
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    def is_free(self, number: int) -> bool:
        """Tell whether no other router has a number."""
        fcntl = find_lock_module()
        if fcntl is None:
            # There a database is for one router, and other numbers were those of earlier ones.
            return True
        is_free = self.lock_number(number)
        if is_free and number != self.router_number:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN, 1, number)
        return is_free

    def find_interrupted(self, living: Container[int]) -> list[int]:
        """Return the ids of rows that say that their request runs, which it does not.

        Whether it runs knows its router: this one by `living`, the ids of its requests, and of
        another one it is enough that it lives.
        """
        db = self.open()
        free_numbers: dict[int, bool] = {}
        found = []
        for (row_id,) in db.execute("SELECT id FROM requests WHERE failed IS NULL").fetchall():
            number = row_id % MAX_ROUTERS
            if number not in free_numbers:
                free_numbers[number] = self.is_free(number)
            if free_numbers[number] and row_id not in living:
                found.append(row_id)
        return found

    def finish_interrupted(self, living: Container[int]) -> list[Row]:
        """Finish the rows of requests that were interrupted, count them and return them.

        Raises sqlite3.Error or OSError.
        """
        interrupted = self.find_interrupted(living)
        if not interrupted:
            return []
        rows = []
        with self.open() as db:
            db.execute("BEGIN IMMEDIATE")
            for row_id in interrupted:
                # Its router may have finished it before it ended, or another one just now.
                found = db.execute(SELECT_RUNNING, (row_id,)).fetchone()
                if found:
                    rows.append(Row._make(found)._replace(failed=1, error_message=INTERRUPTED))
            db.executemany(FINISH_INTERRUPTED, [(INTERRUPTED, row.id) for row in rows])
            self.add_tallies(db, sum_rows(rows))
        return rows

    def add_tallies(self, db: sqlite3.Connection, tallies: Tallies) -> None:
        """Add the numbers of some requests to the sums."""
        db.executemany(ADD_ROLLUP, [(*key, *tally) for key, tally in tallies.items()])

    def write(
        self, running: Sequence[Row], records: Sequence[RequestRecord], tallies: Tallies
    ) -> None:
        """Write all or nothing: rows of requests that run, finished records, their sums.

        Raises sqlite3.Error or OSError.
        """
        kept = self.newest_that_fit(records)
        with self.open() as db:
            db.execute("BEGIN IMMEDIATE")
            self.make_room(db, sum(record.body_bytes for record in kept))
            for record in kept:
                for digest, data in filter(None, record.blobs):
                    db.execute(INSERT_BLOB, (digest, len(data)))
                    # Also where the table has it already: somebody may have deleted the file.
                    self.bodies.keep(digest, data)
            rows = [*running, *(record.row for record in records)]
            details = []
            for record in kept:
                digests = [blob.digest if blob else None for blob in record.blobs]
                details.append((record.id, record.body_bytes, *digests, record.data))
            insert_rows(db, INSERT_REQUEST, INSERT_REQUESTS, rows)
            insert_rows(db, INSERT_DETAIL, INSERT_DETAILS, details)
            self.add_tallies(db, tallies)

    def write_files(self, blobs: Sequence[PackedBody | None]) -> None:
        """Write the files of long bodies before the transaction, in which others would wait.

        A file system may take a millisecond for each. An error is left to the transaction, which
        tries again.
        """
        if not isinstance(self.bodies, BodyFiles):
            return
        with contextlib.suppress(OSError):
            for digest, data in filter(None, blobs):
                self.bodies.keep(digest, data)

    def newest_that_fit(self, records: Sequence[RequestRecord]) -> Sequence[RequestRecord]:
        """Return the newest records whose details fit together into MAX_TOTAL_STORAGE_SIZE."""
        total = 0
        for index in range(len(records) - 1, -1, -1):
            total += records[index].body_bytes
            if total > self.bytes_limit:
                return records[index + 1 :]
        return records

    def make_room(self, db: sqlite3.Connection, size: int) -> None:
        """Forget the oldest details until `size` more octets fit, or none is left.

        A detail may free less than its size, because others can use its long bodies too. So after
        each step the sum that the database keeps is looked at again.
        """
        while True:
            ((stored,),) = db.execute("SELECT bytes FROM storage")
            needed = stored + size - self.bytes_limit
            if needed <= 0:
                return
            last_id = None
            oldest = db.execute("SELECT id, size FROM details ORDER BY id LIMIT 100")
            for detail_id, most_freed in oldest:
                last_id = detail_id
                needed -= most_freed
                if needed <= 0:
                    break
            if last_id is None:
                return
            db.execute("DELETE FROM details WHERE id <= ?", (last_id,))
            self.drop_unused_bodies(db)

    def drop_unused_bodies(self, db: sqlite3.Connection) -> None:
        """Delete the long bodies that no detail uses any more."""
        for (digest,) in db.execute("SELECT digest FROM blobs WHERE uses < 1").fetchall():
            self.bodies.forget(digest)
        db.execute("DELETE FROM blobs WHERE uses < 1")

    def prune(self, now: float) -> bool:
        """Delete a little of what is too old and give its space back; tell whether some is left.

        `now` is in s UTC. A little at a time, because the rows of requests wait meanwhile. Whole
        hours are deleted, so that the sums of an hour are those of its rows.
        """
        if now < self.prune_at:
            return False
        first_hour = int((now - self.max_age) // 3600)
        values = (first_hour * HOUR_MS, PRUNED_ROWS)
        with self.open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"DELETE FROM details WHERE id IN ({OLDEST_IDS})", values)
            self.drop_unused_bodies(db)
            pruned = db.execute(f"DELETE FROM requests WHERE id IN ({OLDEST_IDS})", values).rowcount
            db.execute("DELETE FROM rollups WHERE hour < ?", (first_hour,))
        if self.vacuum(db) or pruned:
            return True
        self.prune_files(db, now - self.max_age)
        self.prune_at = now + self.limits.prune_interval
        return False

    def vacuum(self, db: sqlite3.Connection) -> bool:
        """Give some free pages back to the file system; tell whether there were any."""
        ((before,),) = db.execute("PRAGMA freelist_count")
        # SQLite frees a page with each step of the statement. `execute` takes a single step of it
        # in Python 3.11, `executescript` takes all of them in every version.
        db.executescript(f"PRAGMA incremental_vacuum({VACUUMED_PAGES})")
        ((after,),) = db.execute("PRAGMA freelist_count")
        return after < before

    def prune_files(self, db: sqlite3.Connection, moment: float) -> None:
        """Delete old files that no row speaks of; a crash may have left them."""
        for digest in self.bodies.older_than(moment):
            if not db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchall():
                self.bodies.forget(digest)

    def check(self) -> None:
        """Check the file itself. Raises sqlite3.Error when it is damaged."""
        # An open connection would check the pages that it has in memory.
        self.close()
        ((found,),) = self.open().execute("PRAGMA quick_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(f"malformed: {found}")

    def read_detail(self, db: sqlite3.Connection, row_id: int) -> Detail:
        """Return the detail of a request, an empty one when it is forgotten or damaged."""
        found = db.execute(
            "SELECT data, request_blob, response_blob FROM details WHERE id = ?", (row_id,)
        ).fetchone()
        if found is None:
            return Detail()
        data, *digests = found
        blobs = [self.bodies.get(digest) if digest else None for digest in digests]
        try:
            return unpack_detail(data, blobs)
        except (ValueError, zlib.error):
            return Detail()

    def move_aside(self) -> str:
        """Give a damaged database another name and return that; return "" when there is no file."""
        if not os.path.isfile(self.path):
            return ""
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in reversed(DATABASE_SUFFIXES):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path + suffix, aside + suffix)
        return aside


# --- the log and its thread ---


class BodyBudget:
    """Processor time that bodies may take: a share of all time, saved up for bursts."""

    def __init__(self, share: float, most_saved: float) -> None:
        self.share = share
        self.most_saved = most_saved
        self.seconds_left = most_saved
        self.counted_at = time.monotonic()

    def has_time(self) -> bool:
        """Tell whether some time is left for bodies."""
        now = time.monotonic()
        earned = (now - self.counted_at) * self.share
        self.seconds_left = min(self.seconds_left + earned, self.most_saved)
        self.counted_at = now
        return self.seconds_left > 0

    def spend(self, seconds: float) -> None:
        """Count the time that bodies have taken."""
        self.seconds_left -= seconds


def keep_files_private() -> None:
    """Let nobody but their owner read the files of this process: prompts are in them.

    SQLite cannot be told a mode for its files, so that this has to hold for the whole process.
    """
    if hasattr(os, "umask"):
        os.umask(0o077)


class RequestLog:
    """Knows the running requests; its thread prints, counts and writes those that ended."""

    def __init__(
        self, settings: Settings, limits: Limits, print_line: Callable[[str], None]
    ) -> None:
        keep_files_private()
        self.settings = settings
        self.limits = limits
        self.print_line = print_line
        self.store = Store(settings, limits) if settings.enable_logging else None
        self.body_limit = settings.max_blob_size if self.store else 0
        self.body_budget = BodyBudget(limits.body_time_share, limits.body_time_savings)
        # Where records are: see the theory of operation.
        self.running: dict[int, RequestRecord] = {}
        self.finished: collections.deque[RequestRecord] = collections.deque()
        # How many records of `finished`, the oldest ones, have their row.
        self.ready_rows = 0
        self.last_id = 0
        # Octets of bodies that the event loop has put into memory, and that the thread has freed.
        self.bytes_received = 0
        self.bytes_released = 0
        # Rows that the database never took: since the start, and since its trouble has begun.
        self.lost = 0
        self.lost_in_trouble = 0
        # The tallies since the start, by service, model and server, for /metrics.
        self.series: dict[tuple[str, str, str], Tally] = {}
        # Each gets the row of every finished request, for a page that is open.
        self.row_queues: list[collections.deque[Row]] = []
        # What is wrong with the database now, and what was wrong with one that was moved aside.
        self.error = ""
        self.notice = ""
        # What the thread waits for: something to do, or a batch that fills a transaction.
        self.has_work = threading.Event()
        self.batch_is_full = threading.Event()
        # The log is to end; after `give_up_at` also with rows that are not written.
        self.closing = threading.Event()
        self.give_up_at = NEVER
        # The thread has tried to open the database, which makes its tables for the readers.
        self.opened = threading.Event()
        # After trouble nothing is written before this moment.
        self.retry_at = 0.0
        # A reader had an error that says that the file is damaged.
        self.is_suspect = False
        # There is more to delete.
        self.is_pruning = False
        # While it is not set, requests wait before they begin, in the event loop `loop`.
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.readers = concurrent.futures.ThreadPoolExecutor(2, "log-reader")
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    # What the event loop calls.

    def begin(self, record: RequestRecord) -> None:
        """Note that a request was accepted."""
        record.id = self.next_id(record.timestamp)
        self.running[record.id] = record
        memory_left = self.limits.body_memory - self.body_bytes
        most = max(0, min(self.body_limit, memory_left))
        if len(record.content) > most:
            record.content = record.content[:most]
            record.request_cut = True
        record.body_bytes = len(record.content)
        self.bytes_received += record.body_bytes
        self.wake_thread()

    def next_id(self, timestamp: float) -> int:
        """Return the id of a request that begins: it is above all others that are known."""
        number = 0
        newest = self.last_id
        if self.store:
            number = self.store.router_number
            newest = max(newest, self.store.newest_id)
        # After a clock that was ahead, ids grow by as little as they can, until it is that late.
        next_free = newest - newest % MAX_ROUTERS + MAX_ROUTERS
        self.last_id = max(next_free, time_id(timestamp)) + number
        return self.last_id

    def append_body(self, record: RequestRecord, data: bytes) -> None:
        """Keep a piece of an answer, up to the limits; from then on the answer's end alone."""
        # `body_bytes`, worked out here: this is done for every word that a model says.
        memory_left = self.limits.body_memory - self.bytes_received + self.bytes_released
        most = min(self.body_limit - record.pieces_size, memory_left)
        if record.response_cut or len(data) > most:
            answer_end = record.answer_end + data[-ANSWER_END:]
            record.answer_end = answer_end[-ANSWER_END:]
            # Behind a gap nothing more is kept, also when there is memory again.
            data = b"" if record.response_cut else data[: max(0, most)]
            record.response_cut = True
        if data:
            size = len(data)
            pieces = record.pieces
            if size > SMALL_PIECE:
                pieces.append(data)
            elif pieces and len(pieces[-1]) < LONGEST_GATHERED and type(pieces[-1]) is bytearray:
                pieces[-1] += data
            else:
                pieces.append(bytearray(data))
            record.pieces_size += size
            record.body_bytes += size
            self.bytes_received += size

    def drop_answer(self, record: RequestRecord) -> None:
        """Forget what an upstream said that does not count, because another one is asked."""
        # The counter of what is gone belongs to the thread, so the event loop's own goes down.
        self.bytes_received -= record.pieces_size
        record.body_bytes -= record.pieces_size
        record.pieces = []
        record.pieces_size = 0
        record.answer_end = b""
        record.response_cut = False

    def finish(self, record: RequestRecord) -> None:
        """Note how a request ended; from now on its record is the thread's."""
        record.finished_at = time.monotonic()
        # In this order: whoever looks for it, here and then there, finds it.
        self.finished.append(record)
        self.running.pop(record.id, None)
        self.wake_thread()
        if len(self.finished) - self.ready_rows >= self.limits.batch_rows:
            if not self.batch_is_full.is_set():
                self.batch_is_full.set()
            if self.may_begin.is_set() and self.is_behind(self.limits.row_delay):
                self.hold_requests()

    def wake_thread(self) -> None:
        """Tell the thread that there is something to do."""
        # To set an event takes a lock, to look at it none: most often it is set already.
        if not self.has_work.is_set():
            self.has_work.set()

    def is_behind(self, delay: float) -> bool:
        """Tell whether rows come faster than they are written.

        A full batch of them waits, the oldest for more than `delay` s. A database in trouble does
        not count, because it gets no faster when requests wait for it.
        """
        if self.error or len(self.finished) < self.limits.batch_rows:
            return False
        try:
            oldest = self.finished[0]
        except IndexError:
            # The thread has just written all.
            return False
        return time.monotonic() - oldest.finished_at > delay

    def hold_requests(self) -> None:
        """Let new requests wait until the thread has caught up, for `log_wait` s at most."""
        self.loop = asyncio.get_running_loop()
        self.may_begin.clear()
        self.loop.call_later(self.limits.log_wait, self.may_begin.set)

    async def wait_to_begin(self) -> None:
        """Wait, before a request begins, while the thread is behind with the rows of others."""
        if not self.opened.is_set():
            # The first id has to be above those that the database has.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.readers, self.opened.wait, self.limits.log_wait)
        if not self.may_begin.is_set():
            await self.may_begin.wait()

    @property
    def body_bytes(self) -> int:
        """Octets of bodies that are in memory now, raw or packed."""
        return self.bytes_received - self.bytes_released

    @property
    def backlog(self) -> int:
        """How many finished requests wait for the database; 0 without one."""
        return len(self.finished) if self.store else 0

    def state(self) -> dict[str, Any]:
        """Return how the log is, for /healthz and the page."""
        return {
            "enabled": self.store is not None,
            "error": self.error or None,
            "notice": self.notice or None,
            "backlog": self.backlog,
            "lost": self.lost,
        }

    def print_request(self, *words: str) -> None:
        """Print a line about a request that has no record."""
        if not is_quiet(self.settings):
            self.print_line(" ".join(filter(None, words)))

    async def ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """Answer a question in a reader's thread.

        It is a function of this log, a connection to the database and `args`. Raises
        LogUnavailable.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.readers, self.run_question, question, args)

    def run_question(self, question: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Answer a question; this runs in a reader's thread. Raises LogUnavailable."""
        # The tables of a new database have to be made first. While another program locks the file,
        # that takes a few of its timeouts.
        self.opened.wait(5 * self.limits.database_lock_timeout)
        try:
            with open_for_reading(self.store.path) as db:
                return question(self, db, *args)
        except sqlite3.Error as error:
            if CORRUPT_MESSAGE.search(str(error)):
                self.is_suspect = True
            self.has_work.set()
            raise LogUnavailable(f"the log cannot be read: {error}") from None

    def close(self, seconds: float = 0.0) -> None:
        """Write what is left and end the thread; a database in trouble gets so many seconds."""
        self.give_up_at = time.monotonic() + seconds
        self.closing.set()
        self.has_work.set()
        self.batch_is_full.set()
        # The last try may wait for a lock more than once.
        self.thread.join(seconds + 3 * self.limits.database_lock_timeout)
        if self.backlog:
            self.print_line(f"log: {self.backlog} rows are lost: the database did not take them")

    # What the thread does.

    def run(self) -> None:
        """Write what has happened, batch by batch; at the end, the rest."""
        while True:
            is_last = self.closing.is_set()
            self.has_work.clear()
            self.batch_is_full.clear()
            if not self.try_step(self.prepare_batch):
                self.drop_unprepared()
            if not self.try_step(self.write_rows) and self.ready_rows:
                # With the rows on which it failed it would fail again.
                self.print_line(f"log: {self.ready_rows} rows are lost by this fault")
                self.drop_oldest(self.ready_rows)
            self.opened.set()
            self.try_step(self.finish_interrupted)
            self.try_step(self.prune)
            self.admit_requests()
            # A whole batch has come meanwhile: there is nothing to wait for.
            if len(self.finished) - self.ready_rows >= self.limits.batch_rows:
                continue
            if is_last and (not self.finished or time.monotonic() >= self.give_up_at):
                break
            self.wait_for_work()
        if self.store:
            self.store.close()

    def try_step(self, step: Callable[[], None]) -> bool:
        """Do a step; when it has a fault, print that and return False, so that the log goes on."""
        try:
            step()
        except Exception:  # noqa: BLE001 - whatever it is, the next requests want their rows
            self.print_line(traceback.format_exc())
            return False
        return True

    def wait_for_work(self) -> None:
        """Sleep until there is something to do, and then until it is worth a transaction."""
        interval = self.limits.batch_interval
        if self.error and self.closing.is_set():
            # Another program may be done with the database any moment, and time is short.
            time.sleep(interval)
            return
        if self.error:
            self.closing.wait(self.limits.retry_interval)
            return
        # Records that came while the last ones were written, or that wait for a new database, are
        # something to do already.
        if not self.finished:
            self.has_work.wait(self.longest_sleep())
        self.batch_is_full.wait(interval)

    def longest_sleep(self) -> float | None:
        """Return after how many seconds there is something to do without news; None for never."""
        # More is to be deleted, or a running request is to get its row.
        if self.is_pruning or self.records_without_row(time.monotonic()):
            return self.limits.batch_interval
        if self.store is None:
            return None
        seconds = min(self.store.prune_at - time.time(), self.limits.log_check_interval)
        return max(0.0, seconds)

    def prepare_batch(self) -> None:
        """Make the rows of the next batch, print, count and publish them."""
        deadline = time.monotonic() + self.limits.batch_interval
        rows = []
        for record in self.next_batch():
            self.prepare_row(record)
            self.ready_rows += 1
            rows.append(record.row)
            # Bodies take their time, and the rows that are ready shall not wait for more of them.
            if time.monotonic() > deadline:
                break
        self.publish(rows)

    def next_batch(self) -> list[RequestRecord]:
        """Return the oldest records without a row, as many as one transaction takes."""
        end = self.ready_rows + self.limits.batch_rows
        return list(itertools.islice(self.finished, self.ready_rows, end))

    def prepare_row(self, record: RequestRecord) -> None:
        """Make the row of a finished record, pack its bodies and let the raw ones go."""
        thread_seconds = 0.0
        takes_time = record.body_bytes > self.limits.short_body
        if takes_time:
            thread_seconds = time.thread_time()
            if self.is_hurried():
                cut_bodies(record, self.limits.short_body)
        try:
            decode_answer(record, self.body_limit)
            detail = make_detail(record)
            row = make_row(record, detail)
        except Exception:  # noqa: BLE001 - a fault of ours must cost one request its bodies alone
            self.print_line(traceback.format_exc())
            cut_bodies(record, 0)
            detail = make_detail(record)
            row = make_row(record, detail)
        if self.store:
            record.data, record.blobs = pack_detail(detail, self.limits.inline_body)
            self.store.write_files(record.blobs)
        if takes_time:
            self.body_budget.spend(time.thread_time() - thread_seconds)
        # In this order: a reader copies the raw bodies, and then looks whether there is a row. If
        # there is none, it has all of them.
        record.row = row
        record.content = b""
        record.pieces = []
        record.answer_end = b""
        size = len(record.data) + sum(len(blob.data) for blob in record.blobs if blob)
        self.bytes_released += record.body_bytes - size
        record.body_bytes = size
        if not is_quiet(self.settings):
            self.print_line(describe_request(record, row))
        # Rows may wait for long, and clients choose how long heads and names are.
        record.request_fields, record.response_fields = NO_FIELDS, None
        record.trail, record.secrets, record.attempts = (), (), []
        record.changes = ()
        record.target = record.requested_model = record.mapped_model = record.sent_model = ""

    def is_hurried(self) -> bool:
        """Tell whether so many rows wait that bodies have to be cut short."""
        if len(self.finished) < self.limits.batch_rows:
            return False
        return self.is_behind(self.limits.row_delay / 2) or not self.body_budget.has_time()

    def publish(self, rows: Sequence[Row]) -> None:
        """Count rows for /metrics, and pass them to the pages that are open."""
        for queue in list(self.row_queues):
            queue.extend(rows)
        for (_, service, model, server), tally in sum_rows(rows).items():
            key = (service, model, server)
            # Clients choose the names of models, and each key costs memory as long as we live.
            if key not in self.series and len(self.series) >= self.limits.metric_series:
                key = (service, "other", "other")
            # A new list each time: the event loop may be writing the old one out for /metrics.
            sums = self.series.get(key)
            self.series[key] = list(map(operator.add, sums, tally)) if sums else tally

    def records_without_row(self, begun_before: float) -> list[RequestRecord]:
        """Return the running records from before a monotonic moment that have no row yet."""
        records = []
        for record in list(self.running.values()):
            # One that has just finished may still be among them; its row must not be undone.
            is_running = record.finished_at is None
            is_new = not record.has_unfinished_row
            if is_running and is_new and record.started_at < begun_before:
                records.append(record)
        return records

    def write_rows(self) -> None:
        """Write the rows that are ready, and those of requests that have run for a moment."""
        if self.store is None:
            self.release_oldest(self.ready_rows)
            return
        if time.monotonic() < self.retry_at and not self.closing.is_set():
            return
        # Most requests end so soon that a row which says that they run would be work for nothing.
        running = self.records_without_row(time.monotonic() - self.limits.batch_interval / 2)
        try:
            if self.is_suspect:
                self.is_suspect = False
                self.store.check()
            self.store.open()
            while running or self.ready_rows:
                self.write_transaction(running)
                running = []
        except (sqlite3.Error, OSError) as error:
            self.report_trouble(error)
            self.bound_backlog()
            return
        if self.error:
            lost = f"; {self.lost_in_trouble} rows are lost" if self.lost_in_trouble else ""
            self.print_line(f"log: works again{lost}")
        self.error = ""
        self.lost_in_trouble = 0

    def write_transaction(self, running: Sequence[RequestRecord]) -> None:
        """Write a batch of rows that are ready, and unfinished ones. Raises what `write` does."""
        count = min(self.ready_rows, self.limits.batch_rows)
        batch = list(itertools.islice(self.finished, count))
        unfinished = [make_row(record, Detail(), finished=False) for record in running]
        self.store.write(unfinished, batch, sum_rows(record.row for record in batch))
        for record in running:
            record.has_unfinished_row = True
        self.release_oldest(count)

    def release_oldest(self, count: int) -> None:
        """Let the oldest records go: their rows are written, or lost."""
        for _ in range(count):
            record = self.finished.popleft()
            self.bytes_released += record.body_bytes
        self.ready_rows = max(0, self.ready_rows - count)

    def drop_unprepared(self) -> None:
        """Let go of the first record without a row: none can be made of it."""
        if len(self.finished) > self.ready_rows:
            self.bytes_released += self.finished[self.ready_rows].body_bytes
            del self.finished[self.ready_rows]
            self.lost += 1

    def bound_backlog(self) -> None:
        """Drop the oldest records above the limits; say so once in each trouble."""
        count = len(self.finished) - self.count_backlog()
        if count <= 0:
            return
        if not self.lost_in_trouble:
            self.print_line("log: too many rows wait; the oldest are lost")
        self.lost_in_trouble += count
        self.drop_oldest(count)

    def count_backlog(self) -> int:
        """Return how many of the newest records may wait, by their number and their length."""
        octets = 0
        newest = reversed(list(self.finished))
        for number, record in enumerate(itertools.islice(newest, self.limits.backlog_rows)):
            octets += record.body_bytes + sum(map(sys.getsizeof, record.row or ()))
            if octets > self.limits.backlog_octets:
                return number
        return self.limits.backlog_rows

    def drop_oldest(self, count: int) -> None:
        """Let so many records go whose rows are not written, the oldest first."""
        self.release_oldest(count)
        self.lost += count

    def admit_requests(self) -> None:
        """Let new requests begin when the thread has caught up."""
        if not self.may_begin.is_set() and not self.is_behind(self.limits.row_delay / 2):
            # The loop may be closed by now.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.may_begin.set)

    def finish_interrupted(self) -> None:
        """Now and then, finish the rows of requests that nobody else is going to finish."""
        now = time.monotonic()
        if self.store is None or self.error or now < self.store.next_look_at:
            return
        self.store.next_look_at = now + self.limits.interrupted_interval
        # In this order, in which records move on.
        living = {record.id for record in [*list(self.running.values()), *list(self.finished)]}
        try:
            rows = self.store.finish_interrupted(living)
        except (sqlite3.Error, OSError) as error:
            self.report_trouble(error)
            return
        for queue in list(self.row_queues):
            queue.extend(rows)

    def prune(self) -> None:
        """Delete a little of what is too old, and note whether there is more."""
        self.is_pruning = False
        if self.store is None or self.error:
            return
        try:
            self.is_pruning = self.store.prune(time.time())
        except (sqlite3.Error, OSError) as error:
            self.report_trouble(error)

    def report_trouble(self, error: Exception) -> None:
        """Say what is wrong, once; a corrupt file is moved out of the way, not deleted."""
        self.store.close()
        text = describe(error)
        file = pathlib.Path(getattr(error, "filename", None) or self.store.path)
        bodies = pathlib.Path(self.settings.blob_storage_path)
        if isinstance(error, OSError) and bodies in file.parents:
            # One text for all files of the folder, or a line would be printed for each.
            file = bodies
        if str(file) not in text:
            text = f"{file}: {text}"
        aside = ""
        if isinstance(error, sqlite3.Error) and CORRUPT_MESSAGE.search(text):
            with contextlib.suppress(OSError):
                aside = self.store.move_aside()
        if aside:
            text = f"{text}; the file is now {aside}, and a new one begins"
            self.notice = text
        if text != self.error:
            self.print_line(f"log: {text}; requests go on, rows wait")
        self.error = "" if aside else text
        if self.error:
            self.retry_at = time.monotonic() + self.limits.retry_interval


# ======================================================================================
# 14  Relay
# ======================================================================================
# One exchange, from a request that was let in to the last octet of its answer. The
# instances of a decision are asked in order until one says something (`Opening`, section
# 7), and that answer goes out as it comes in. After its first octet has left there is no
# second answer: a failure then ends the stream with an error. A client that waits for a
# stream gets pings meanwhile, signs of life after which any instance can still give the
# answer. Whatever happens, the record of the request is finished exactly once. `Context`
# stands first: every exchange and every handler of the sections below works with it.

# Fields of a request that stop here, besides those that its Connection names.
NOT_FORWARDED = HOP_BY_HOP.union(("host", "content-length", "expect", "via"))
# Fields of an upstream's response that stop here.
NOT_RETURNED = HOP_BY_HOP.union(("content-length",))
# When its content was changed, those that are not true any more stop here, too; Content-Type is
# written anew.
NOT_RETURNED_IF_REWRITTEN = NOT_RETURNED.union(
    ("content-encoding", "etag", "content-md5", "content-type")
)
# What the router tells of itself in its own answers and in those that it relays: the id under which
# the request is in the log, and which way it went.
REQUEST_ID_FIELD = "X-SmolRouter-Request-Id"
ROUTE_FIELDS = (
    "X-SmolRouter-Upstream",
    "X-SmolRouter-Model",
    "X-SmolRouter-Route",
    "X-SmolRouter-Attempts",
)
# An upstream's fields of these names stop here, too: it may be a SmolRouter itself.
OWN_FIELDS = frozenset(name.lower() for name in (REQUEST_ID_FIELD, *ROUTE_FIELDS))
# A stream must reach its client event by event: nothing in between may cache or gather it.
STREAM_FIELDS = [("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no")]
# After these errors nobody knows where the next request on the connection begins.
FATAL_TO_CONNECTION = (
    MalformedMessage,
    RequestTimeout,
    ContentTooLarge,
    FieldsTooLarge,
    TargetTooLong,
    Overloaded,
)
FieldPairs = list[tuple[str, str]]
# Besides those of its own faults, these statuses say that an instance cannot serve a request which
# may be good: it has not got the model, or has too much to do.
CANNOT_SERVE = (404, 429)
# What a client has been sent of the response to its request: nothing; the head of a stream and
# pings, which say nothing of what the answer will be; or some of an answer.
NOTHING = "nothing"
PINGS = "pings"
ANSWER = "answer"


@dataclasses.dataclass
class Context:
    """What every exchange and every handler works with; there is one in a running router."""

    settings: Settings
    limits: Limits
    # It is replaced when the routing file changes.
    table: RoutingTable
    upstreams: Upstreams
    slots: Slots
    model_lists: ModelLists
    log: RequestLog
    token_guard: TokenGuard
    # This router's entry in Via, by which it knows a request that comes round again.
    via: str
    # A file that is served instead of DASHBOARD_HTML, "" for none.
    dashboard_file: str = ""
    # Why the changed routing file is not in force; None when it is.
    routes_error: str | None = None
    draining: bool = False
    # The thread that reads and writes long JSON; see `work`.
    worker: concurrent.futures.Executor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1)
    )
    request_numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    request_prefix: str = dataclasses.field(default_factory=lambda: secrets.token_hex(6))

    def next_request_id(self) -> str:
        """Return an id that no other request has, in this router or another."""
        return f"{self.request_prefix}{next(self.request_numbers):08x}"

    async def decide(self, model: str, source_host: str, dialect: Dialect = OPENAI) -> Decision:
        """Return where a request goes by the table that is in force and the lists of its servers.

        For a model that is on no list these are asked for again, if one of them could have it.
        """
        is_translated = dialect.service != OPENAI.service
        lists = self.model_lists
        lists.refresh_due(self.table)
        decision = decide(self.table, model, source_host, lists.catalogue)
        if model and decision.found_by in (BY_DEFAULT, UNCLAIMED) and self.table.has_choice:
            await lists.search(self.table)
            decision = decide(self.table, model, source_host, lists.catalogue)
        elif lists.first_tries and (decision.found_by == BY_LIST or is_translated):
            # Just after the start, a server that goes before this one may not have answered yet, or
            # this one has not said yet whether it speaks the client's dialect itself.
            await lists.wait(self.table)
            decision = decide(self.table, model, source_host, lists.catalogue)
        if decision.found_by == BY_LIST:
            ages = tuple(lists.age(instance.server) for instance in decision.instances)
            decision = tell_ages(decision, ages)
        return decision

    def servers_speaking(self, service: str) -> list[Server]:
        """Return the servers that speak an API themselves, by what is known now."""
        with_api = self.model_lists.catalogue.with_api
        servers = [with_api(server) for server in self.table.all_servers()]
        return [server for server in servers if server.api == service]

    async def work(self, size: int, task: Callable[..., Any], *arguments: Any) -> Any:
        """Do pure work on a content of `size` octets; on a long one in a thread.

        Reading megabytes of JSON takes long enough to stall every other request.
        """
        if size < self.limits.long_content:
            return task(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.worker, task, *arguments)

    async def list_models(self, request: Request) -> list[dict[str, Any]]:
        """Return the models that the client of a request may see, the router's own names first."""
        authorization = self.authorization_of(request)
        models = await list_models(self.model_lists, self.table, authorization)
        return [model for model in models if may_use(request.token, model["id"], self.table)]

    def authorization_of(self, request: Request) -> str | None:
        """Return what the client of a request shows to servers; the router's tokens stop here."""
        fields = without_tokens(request.head.fields, self.settings.jwt_secret)
        return fields.get("authorization")

    def check_tokens(self, tokens: Sequence[str], source_host: str) -> Token:
        """Return the first of these tokens that is valid. Raises what TokenGuard.check raises."""
        return self.token_guard.check(tokens, source_host, self.table.revoked, time.time())

    def secrets_of(self, request: Request) -> Secrets:
        """Return what must not be kept, printed or shown of a request."""
        target = request.path + request.query
        return find_secrets(request.head.fields, target, self.table)

    async def drop_unknown_tags(self, decision: Decision, request: Request) -> Decision:
        """Return a decision without the tags that mean nothing to the servers that are asked.

        Clients of a dialect that is translated add `:latest` to any name. To a server that speaks
        OpenAI alone the tag means nothing, unless it lists a model of that very name.
        """
        dialect = request.dialect
        if dialect.encode_openai is None or not decision.requested_model.endswith(LATEST_TAG):
            return decision
        if decision.found_by == BY_LIST:
            return decision
        instances = []
        for instance in decision.instances:
            model = instance.model or ""
            if model.endswith(LATEST_TAG) and instance.server.api != dialect.service:
                authorization = self.authorization_of(request)
                listed = await self.model_lists.get(instance.server, authorization) or []
                if all(entry["id"] != model for entry in listed):
                    instance = instance._replace(model=without_tag(model))
            instances.append(instance)
        return decision._replace(instances=tuple(instances))


def send_error(
    writer: ResponseWriter,
    error: RouterError,
    dialect: Dialect,
    path: str,
    fields: Iterable[tuple[str, str]] = (),
) -> None:
    """Answer with an error of the router's own, as the clients of a path read it.

    After an answer has begun there is no second head: it would be taken for content of the first.
    Then the answer is cut, so that it does not look complete.
    """
    if writer.finished:
        return
    if writer.started:
        writer.cut(b"")
        return
    if isinstance(error, FATAL_TO_CONNECTION):
        writer.keep_alive = False
    all_fields = [("Content-Type", "application/json"), *fields, *error.fields]
    writer.send_response(error.status, all_fields, dialect.encode_error(error, path))


def passed_fields(fields: Fields, *dropped: Iterable[str]) -> FieldPairs:
    """Return the fields that go on: not those `dropped`, and not what Connection names."""
    stopped = set(fields.elements("connection")).union(*dropped)
    return [(name, value) for lower, name, value in fields.lines if lower not in stopped]


@functools.lru_cache(maxsize=1024)
def encode_route_fields(upstream_url: str, model: str, route: str, attempts: int) -> FieldPairs:
    """Return the fields that tell which way a request went; one without a value is left out."""
    values = (upstream_url, encode_field_value(model), encode_field_value(route), str(attempts))
    named = zip(ROUTE_FIELDS, values, strict=True)
    return [(name, value) for name, value in named if value]


class Forwarding(NamedTuple):
    """What the fields of a forwarded request depend on, besides its head."""

    server: Server
    # The server speaks the client's dialect, so that nothing is translated.
    native: bool
    # The answer may have to be changed.
    may_rewrite: bool
    # This router's entry in Via.
    via: str
    jwt_secret: str | None


@remember_short
def encode_forwarded_lines(head: RequestHead, forwarding: Forwarding) -> str:
    """Return the field lines for a server: its own, and the client's less what stops here."""
    server = forwarding.server
    added = list(server.headers)
    if not any(name.lower() == "host" for name, _ in server.headers):
        added.append(("Host", server.url.authority))
    if server.api_key:
        added.append(("Authorization", f"Bearer {server.api_key}"))
    if forwarding.may_rewrite:
        # A content coding makes changing harder.
        added.append(("Accept-Encoding", "identity"))
    if not forwarding.native:
        # A translated request is JSON, whatever its client called it (`curl -d` says form).
        added.append(("Content-Type", "application/json"))
    added.append(("Via", ", ".join([*head.fields.get_all("via"), forwarding.via])))
    fields = without_tokens(head.fields, forwarding.jwt_secret)
    replaced = [name.lower() for name, _ in added]
    return encode_field_lines(added + passed_fields(fields, NOT_FORWARDED, replaced))


class AnswerShape(NamedTuple):
    """What the fields of a relayed answer depend on, besides its head."""

    # The server speaks the client's dialect, so that nothing is translated.
    native: bool
    # The content is changed on its way, or may be.
    rewritten: bool
    # The client asked for a stream.
    streamed: bool
    # The answer has fields of the router's own that say which origins may read it.
    guarded: bool
    # What it is, which is not always what its head calls it.
    media_type: str


def encode_content_type(head: ResponseHead, shape: AnswerShape) -> str:
    """Return the Content-Type of an answer whose content was changed, or may be."""
    if not shape.native and shape.streamed and head.status < 400:
        return LINES.media_type
    if not shape.native:
        return "application/json; charset=utf-8"
    if shape.media_type != head.media_type:
        return shape.media_type
    return head.fields.get("content-type") or "application/octet-stream"


@remember_short
def encode_answer_lines(head: ResponseHead, shape: AnswerShape) -> str:
    """Return the field lines of an answer as its client gets them."""
    own: FieldPairs = []
    dropped = NOT_RETURNED
    media_type = shape.media_type
    if shape.rewritten:
        dropped = NOT_RETURNED_IF_REWRITTEN
        content_type = encode_content_type(head, shape)
        own.append(("Content-Type", content_type))
        media_type = content_type.partition(";")[0].strip(" \t").lower()
    if media_type in EVENT_FORMATS:
        own += STREAM_FIELDS
        dropped = dropped.union(name.lower() for name, _ in STREAM_FIELDS)
    if shape.guarded:
        # The router decides which origins may read an answer, not its servers.
        names = [lower for lower, _, _ in head.fields.lines]
        dropped = dropped.union(name for name in names if name.startswith("access-control-"))
    return encode_field_lines(passed_fields(head.fields, dropped, OWN_FIELDS) + own)


class Candidate:
    """One instance that is asked, and what came of it.

    All that belongs to one attempt is in here, so that the exchange can go back to an earlier
    attempt as a whole: the head of one response and the content of another must never meet.
    """

    def __init__(self, instance: Instance, dialect: Dialect, health: Health) -> None:
        self.instance = instance
        self.key = instance_key(instance)
        self.health = health
        # Whether the server speaks the client's dialect itself, so that nothing is translated. A
        # dialect without `encode_openai` is OpenAI's own, or takes content as it is.
        self.native = dialect.encode_openai is None or instance.server.api == dialect.service
        # Whether the router asks for the usage event of the stream, for its log. The client has not
        # asked for it and does not get it.
        self.hide_usage = False
        # What its parameters have changed in the request, in words; which members were added, and
        # which of those that could be are refused.
        self.changes: list[str] = []
        self.added: list[AddedMember] = []
        self.refused: frozenset[AddedMember] = frozenset()
        self.response: UpstreamResponse | None = None
        # Whether its answer began inside of a block of thinking that the model's template opened;
        # None while nothing speaks for or against it.
        self.opened_thinking: bool | None = None
        # Whether another instance could be asked instead; whether there is no other at all.
        self.has_next = False
        self.is_only = False
        # Whether the attempt stands in the record already, because its response counted as an
        # answer.
        self.noted = False
        self.started_at = time.monotonic()

    @property
    def status(self) -> int | None:
        """The status of its response, None without one."""
        return self.response.head.status if self.response else None

    @property
    def model(self) -> str:
        """The name of the model that this instance is asked for."""
        return self.instance.model or ""

    def note_opened(self, opened: bool) -> None:
        """Note whether a text of the answer began inside of a block of thinking."""
        self.opened_thinking = opened

    def close(self) -> None:
        """End the response's connection, unless all of it was read."""
        if self.response:
            self.response.close()


class Candidates:
    """The instances that a request may be sent to, one after another, in the order to try.

    Each is counted at its server, and has a slot there, until the next one is asked for: `take`
    returns the first one that may run now, and `wait` the first one that may run after a while.
    """

    def __init__(self, context: Context, decision: Decision, dialect: Dialect) -> None:
        self.upstreams = context.upstreams
        self.slots = context.slots
        self.decision = decision
        self.dialect = dialect
        # Those that were not asked yet, in order.
        self.left = context.slots.open_ones(context.upstreams.order(decision))
        self.count = len(self.left)
        # Whether the request needs a slot.
        self.takes_slot = True
        # Where it is counted now; whether it was anywhere.
        self.health: Health | None = None
        self.was_asked = False
        # Why there is no instance any more, apart from what happened at those that were asked.
        self.refusal: RouterError | None = None
        # Those whose machines may sleep; whether one of these may be woken for the request.
        self.asleep: list[Instance] = []
        self.may_wake = True
        # What else there is to say when nobody has answered.
        self.remark = ""
        # The key of the conversation that is to stay where it is, None where that is all the same;
        # its home, and for how long it waits for a slot there before others are looked at.
        self.conversation: bytes | None = None
        self.home: Instance | None = None
        self.home_wait = 0.0

    def keep_together(self, session: str, record: RequestRecord) -> None:
        """Ask the instance first at which a conversation is at home.

        A new one has none yet, and one whose home has failed a moment ago is to have another.
        """
        self.conversation = hash_key(self.decision.route, session)
        home = self.upstreams.homes.find(self.conversation)
        for instance in self.left:
            if instance_key(instance) == home and self.upstreams.is_well(instance):
                self.home = instance
        if self.home is None:
            return
        self.left.remove(self.home)
        self.left.insert(0, self.home)
        self.home_wait = self.slots.limits.home_wait
        step = Step(STICKY, True, f"the conversation is at home at {self.home}")
        record.trail = (*record.trail, step)

    def keep_home(self, candidate: Candidate) -> None:
        """Note that an instance has answered well: it is the home of the conversation.

        But a home that was only full stays the home, and this one has helped out.
        """
        if self.conversation is None:
            return
        home = candidate.instance
        if self.home in self.left:
            home = self.home
        self.upstreams.homes.keep(self.conversation, instance_key(home))

    def take(self) -> Candidate | None:
        """Return the next instance that may run now, None without one."""
        self.give_back()
        left = self.left[:1] if self.home_wait else self.left
        for index, instance in enumerate(left):
            if self.slots.may_run(instance.server, self.takes_slot):
                del self.left[index]
                return self.begin(instance, self.slots.enter(instance, self.takes_slot))
        return None

    def begin(self, instance: Instance, health: Health) -> Candidate:
        """Return an instance, at which the request is counted already, as the candidate."""
        self.health = health
        self.was_asked = True
        self.home_wait = 0.0
        self.refusal = None
        if self.conversation and self.home is None:
            # Requests of a conversation that begin at once stay together, too.
            self.home = instance
            self.upstreams.homes.keep(self.conversation, instance_key(instance))
        self.upstreams.note_turn(self.decision, instance)
        candidate = Candidate(instance, self.dialect, health)
        candidate.has_next = bool(self.left) or self.can_wake
        candidate.is_only = self.count == 1
        return candidate

    def give_back(self) -> None:
        """Let another request run in place of this one."""
        if self.health:
            self.slots.leave(self.health, self.takes_slot)
            self.health = None

    async def wait(self, record: RequestRecord) -> Candidate | None:
        """Return the next instance that may run after a while, None when there is none to come."""
        instance = None
        if self.home_wait:
            instance = await self.wait_at_home(record)
            candidate = None if instance else self.take()
            if candidate:
                return candidate
        # One that is open to it is full: what needs no slot has been there.
        if instance is None and self.find_open() and self.takes_slot:
            instance = await self.wait_anywhere(record)
        if instance is None:
            return await self.wake(record)
        self.left.remove(instance)
        return self.begin(instance, self.upstreams.health_of(instance))

    @property
    def can_wake(self) -> bool:
        """Whether there is a machine that may be woken for the request."""
        return bool(self.asleep) and self.takes_slot and self.may_wake

    async def wake(self, record: RequestRecord) -> Candidate | None:
        """Wake a machine when nobody else is left; return its instance when it can be reached."""
        self.asleep = self.slots.open_ones(self.asleep)
        while self.can_wake and not self.left:
            instance = self.asleep.pop(0)
            server = instance.server
            record.phase = "waking"
            record.upstream_url = str(server.url)
            record.waits_for = server.name
            began_at = time.monotonic()
            failure = await self.upstreams.waker.wake(server)
            why = failure or f"{server.name} woke up in {time.monotonic() - began_at:.1f} s"
            record.trail = (*record.trail, Step("wake", not failure, why))
            if not failure:
                self.left.append(instance)
                return self.take() or await self.wait(record)
            self.remark += f"; {server.name}: {failure}"
        return None

    async def wait_at_home(self, record: RequestRecord) -> Instance | None:
        """Wait a moment for a slot where the conversation is at home."""
        seconds = self.home_wait
        self.home_wait = 0.0
        if self.home in self.find_open() and self.takes_slot:
            return await self.wait_for_slot(record, [self.home], seconds)
        return None

    async def wait_anywhere(self, record: RequestRecord) -> Instance | None:
        """Wait for a slot at any instance that is left, for QUEUE_TIMEOUT in all."""
        timeout = self.slots.settings.queue_timeout
        instance = await self.wait_for_slot(record, self.left, timeout - record.queued_s)
        if instance is None and self.find_open() and self.refusal is None:
            seen = f"no slot was free at {record.waits_for} within {timeout:g} s"
            self.refusal = QueueTimeout(f"{seen} (QUEUE_TIMEOUT)", self.slots.retry_after)
        return instance

    def find_open(self) -> list[Instance]:
        """Forget instances whose servers were closed, and return those that are left.

        When there is none, and none was asked, the request is refused for that.
        """
        self.left = self.slots.open_ones(self.left)
        if not self.left and not self.was_asked:
            self.refusal = self.slots.refusal_of(self.decision.instances)
        return self.left

    async def wait_for_slot(
        self, record: RequestRecord, instances: Sequence[Instance], seconds: float
    ) -> Instance | None:
        """Wait until one of these instances has a slot; return it, entered, None without one."""
        record.phase = "queued"
        record.upstream_url = ""
        record.queued_at = time.monotonic()
        record.waits_for = name_servers(instances)
        rank = PRIORITIES.index(self.decision.priority)
        try:
            return await self.slots.wait(tuple(instances), rank, seconds)
        except QueueFull as error:
            self.refusal = error
            return None
        finally:
            record.queued_s += time.monotonic() - record.queued_at
            record.queued_at = None


class Exchange:
    """One request on its way through the router.

    `relay` asks one candidate after the other, `relay_response` sends what a good one says. Both
    raise RouterError; `run` turns that into an answer, or into the end of one.
    """

    def __init__(
        self, context: Context, request: Request, parsed: ParsedRequest, decision: Decision
    ) -> None:
        self.context = context
        self.request = request
        self.dialect = request.dialect
        self.writer = request.writer
        self.parsed = parsed
        self.decision = decision
        # What the client has got so far.
        self.sent = NOTHING
        # Those that may be asked; None before the first one is.
        self.candidates: Candidates | None = None
        # The attempt that counts: the one that is running, or whose response is relayed.
        self.candidate: Candidate | None = None
        # Whether its response is being relayed.
        self.relaying = False
        # Looks for the first thing that its answer says; None where nothing depends on that.
        self.opening: Opening | None = None
        self.rewriter: Rewriter | None = None
        self.inflater: Inflater | None = None
        # The request's content, where that goes on as it comes.
        self.upload: Upload | None = None
        # Whether the answer may still be an error, so that its content is kept for its words.
        self.seeks_error = False
        # The beginning of that content.
        self.error_content = b""
        self.record = RequestRecord.of(context.next_request_id(), request, parsed.stream, decision)
        self.record.secrets = context.secrets_of(request)

    async def run(self) -> None:
        """Serve the request, whatever happens; its record is finished once."""
        await self.context.log.wait_to_begin()
        self.context.log.begin(self.record)
        self.request.recorded = True
        self.record.stop = self.request.connection.cancel_request
        try:
            models = requested_models(self.parsed)
            check_models(self.request.token, models, self.context.table)
            await self.check_claim()
            if self.send_load_answer():
                return
            # From now on the request ends when its client leaves: no model works for nobody.
            self.request.connection.cancel_on_disconnect()
            self.begin_pings()
            await self.relay()
        except asyncio.CancelledError:
            # The client has left, the router stops, or somebody ended the request from the page.
            self.fail(self.request.connection.cancel_reason or ClientClosed("client_closed"))
            raise
        except RouterError as error:
            self.fail(error)
        finally:
            self.finish()

    def finish(self) -> None:
        """Let go of everything, and finish the record."""
        record = self.record
        self.writer.clear_on_silence()
        if self.candidate:
            self.candidate.close()
        if self.candidates:
            self.candidates.give_back()
        # An error that came too late for the head, or whose client has left, has set the status.
        if not record.status:
            record.status = self.writer.status or 500
        record.response_size = self.writer.size
        if self.upload:
            record.request_size = self.upload.size
        # The rewriter and the record refer back to this exchange, by `timing` and `stop`. Only
        # Python's collector would free such a circle, some time later, and megabytes must not
        # wait for it.
        self.rewriter = None
        self.request.content = b""
        record.stop = None
        self.context.log.finish(record)

    async def check_claim(self) -> None:
        """Raise NotFound for a model that nothing claims, with the names that come nearest."""
        if self.decision.instances:
            return
        if not self.decision.requested_model:
            raise NotFound("no model is named, and there is no default (DEFAULT_UPSTREAM is none)")
        names: list[str] = []
        with contextlib.suppress(BadGateway):
            names += [entry["id"] for entry in await self.context.list_models(self.request)]
        raise NotFound(unknown_model(self.decision.requested_model, names))

    def send_load_answer(self) -> bool:
        """Answer a request that asks for nothing but to load a model; tell whether that was done.

        Clients send one without a prompt so that the model is in memory when the first prompt
        comes. OpenAI's dialect has no such request, so the router says yes itself. A server that
        speaks the client's dialect is asked.
        """
        if self.dialect.empty is None:
            return False
        document = self.dialect.empty(self.parsed, rfc3339(self.record.timestamp))
        self.record.only_loads = document is not None
        first = self.decision.instances[0]
        if document is None or first.server.api == self.dialect.service:
            return False
        self.writer.send_json(document)
        return True

    def fail(self, error: RouterError) -> None:
        """Send an error in the client's dialect: as the answer, or as the end of one.

        A stream that has begun ends with an event that tells the error. Other content that has
        begun, or an event that was too long to be kept until it was whole, just breaks off without
        the end that its framing needs, and so its client sees it.
        """
        record = self.record
        if isinstance(error, ClientClosed):
            # Nobody listens any more. An answer that was complete by then stays a good one.
            complete = self.rewriter is not None and self.rewriter.complete
            if not complete:
                record.status = error.status
                record.error = str(error)
            return
        record.error = self.loggable(str(error))
        if self.sent == NOTHING:
            send_error(self.writer, error, self.dialect, self.parsed.path, self.own_fields())
            return
        record.status = error.status
        event = self.dialect.encode_event_error(error, self.parsed.path)
        if self.sent == PINGS:
            # The error is all of the answer.
            self.writer.finish(event)
        elif self.rewriter is not None and self.rewriter.takes_event:
            self.writer.cut(event)
        else:
            self.writer.cut(b"")

    def own_fields(self) -> FieldPairs:
        """Return the fields that tell what the router did with the request."""
        record = self.record
        # Clients choose the names of models, and `encode_route_fields` keeps them in memory.
        longest = self.context.limits.shown_name
        model = record.sent_model[:longest]
        route = record.route[:longest]
        route_fields = encode_route_fields(record.upstream_url, model, route, len(record.attempts))
        return [(REQUEST_ID_FIELD, record.request_id), *route_fields]

    # Pings

    def begin_pings(self) -> None:
        """Ping a client that waits for a stream whenever it has got nothing for a while.

        Clients and proxies give up a connection on which nothing comes, while a server still loads
        a model, reads a long prompt or thinks.
        """
        interval = self.context.settings.ping_interval
        # Only of a conversation, which has words of a user, is it known what a ping looks like.
        streams = self.parsed.stream and self.parsed.protocol.user_words
        if interval and streams and self.request.head.method != "HEAD":
            self.writer.set_on_silence(interval, self.ping)

    def ping(self) -> None:
        """Send the client an event that says nothing, if one can stand where its answer is now.

        Before an answer has begun it can: then the ping begins a stream, in which any answer can
        follow, also an error. An answer without a rewriter has no place for it: nobody knows where
        its events end.
        """
        record = self.record
        if self.relaying:
            if self.rewriter is None or not self.rewriter.takes_event:
                return
            # A stream that is relayed has a head of its own. What is kept back until its end may
            # still become an event of the stream that a ping begins.
            if not self.rewriter.buffers:
                self.begin_answer(None)
        now = time.time()
        if self.sent == NOTHING:
            self.sent = PINGS
            fields = [("Content-Type", self.dialect.events.media_type), *STREAM_FIELDS]
            fields.append((REQUEST_ID_FIELD, record.request_id))
            fields.append(("Date", http_date(int(now))))
            self.writer.write_head(200, encode_field_lines(fields), None)
        self.writer.write_content(self.dialect.encode_ping(self.parsed, rfc3339(now)))
        record.response_size = self.writer.size

    # Asking one candidate after the other

    async def relay(self) -> None:
        """Ask the instances in order until one answers well, and send what it says.

        An answer that breaks off before any of it was sent is a failure like any other: the next
        instance is asked. When all fail, the client gets the last answer that was HTTP at all: an
        error in its server's words. When there was none, raises BadGateway or GatewayTimeout, or
        what says that all servers are full.
        """
        candidates = self.candidates = self.find_candidates()
        fallback: Candidate | None = None
        # Its class alone is kept: an error object holds on to all the frames it came through.
        last_failure = BadGateway
        while candidate := candidates.take() or await candidates.wait(self.record):
            self.make_current(candidate)
            try:
                await self.find_response(candidate)
                if candidate.status < 400 or not candidate.has_next:
                    await self.relay_response()
                    return
                fallback = candidate
                # Another status says that the request is wrong, and not that nobody can serve it.
                candidates.may_wake = candidate.status in CANNOT_SERVE or candidate.status >= 500
            except BadGateway as error:
                self.note_failure(candidate, error)
                # What was sent cannot be taken back. And an answer of the only server that turned
                # out to be bad is told in its own words, not as one of several attempts.
                if self.sent == ANSWER or (candidate.noted and candidate.is_only):
                    raise
                last_failure = type(error)
        if fallback is None and candidates.refusal:
            raise candidates.refusal
        if fallback is None:
            words = f"{self.describe_attempts()}{candidates.remark}"
            raise last_failure(f"no upstream answered: {words}")
        self.make_current(fallback)
        await self.relay_response()

    def find_candidates(self) -> Candidates:
        """Return the instances to try; what belongs together stays together."""
        parsed = self.parsed
        decision = self.decision
        upstreams = self.context.upstreams
        has_choice = len(decision.instances) > 1
        if has_choice and parsed.protocol.keeps_answers:
            previous = parsed.document.get("previous_response_id")
            made_by = upstreams.response_homes.find(hash_key(str(previous)))
            # Nobody else has it.
            makers = [i for i in decision.instances if made_by and i.server.url == made_by[0]]
            if makers:
                decision = decision._replace(instances=tuple(makers))
                step = Step("previous_response_id", True, f"{makers[0].server.name} made it")
                self.record.trail = (*self.record.trail, step)
        candidates = Candidates(self.context, decision, self.dialect)
        # Models work for neither of these, and an upload takes as long as its client likes.
        candidates.takes_slot = not (self.request.head.method in ("GET", "HEAD") or self.upload)
        if decision.strategy == STICKY and has_choice:
            session = read_session_key(self.request.head.fields, parsed.path, parsed.document)
            if session:
                candidates.keep_together(session, self.record)
        return candidates

    async def find_response(self, candidate: Candidate) -> None:
        """Ask an instance, and wait until its response counts as an answer. Raises BadGateway.

        Where there are no other instances its head is enough. Otherwise the response has to say
        something first. What is read of it until then is kept, and goes out with the rest.
        """
        response = await self.attempt(candidate)
        await self.find_media_type(response)
        # The only instance is not left for another one, and when an answer began that comes as a
        # whole, nobody is told. So there is nothing to look for.
        protocol = find_protocol(self.upstream_path(candidate))
        if self.parsed.stream or not candidate.is_only or protocol.keeps_answers:
            self.opening = Opening(
                protocol,
                response.media_type,
                read_coding(response.head.fields),
                self.context.limits,
            )
        if not candidate.is_only:
            await self.find_opening(candidate)
        self.note_response(candidate)

    async def find_media_type(self, response: UpstreamResponse) -> None:
        """See by its first octets whether an answer is the stream that was asked for.

        Some servers do not call it one, or send no Content-Type at all.
        """
        head = response.head
        asked_for = self.parsed.stream and self.parsed.text and head.status < 400
        if not asked_for or head.media_type not in MISCALLED_STREAMS or read_coding(head.fields):
            return
        start = b""
        while begins_like_events(start) is None:
            piece = await response.buffer_next()
            if not piece:
                return
            start += piece
        if begins_like_events(start):
            response.media_type = "text/event-stream"

    def make_current(self, candidate: Candidate) -> None:
        """Make a candidate the one that counts, in the record, too."""
        self.candidate = candidate
        self.relaying = False
        self.opening = None
        self.rewriter = None
        self.inflater = None
        self.record.first_token_at = None
        self.record.phase = "waiting"
        self.record.upstream_url = str(candidate.instance.server.url)
        self.record.sent_model = candidate.model
        self.record.changes = candidate.changes

    def describe_attempts(self) -> str:
        """Return each attempt with its reason, for the error when all have failed."""
        attempts = self.record.attempts
        return "; ".join(f"{a.instance} ({a.upstream_url}): {a.error}" for a in attempts)

    def note_failure(self, candidate: Candidate, error: BadGateway) -> None:
        """Put an attempt without a good answer into the record, and note it for its instance."""
        text = self.loggable(str(error))
        candidate.close()
        if error.unreached and candidate.instance.server.wake:
            self.candidates.asleep.append(candidate.instance)
        if isinstance(error, ErrorAnswer):
            self.note_error_answer(candidate, error)
        else:
            candidate.health.fail(text, reached=candidate.response is not None)
        # When it comes back it may be another server, which takes what this one has refused.
        self.context.upstreams.refused_members.pop(candidate.key, None)
        # If the client got some of the answer, its attempt stands in the record as answered.
        if self.sent != ANSWER:
            self.note_attempt(candidate, text)

    def note_error_answer(self, candidate: Candidate, error: ErrorAnswer) -> None:
        """Note for the health of an instance that its answer was an error, under a good status."""
        if error.told_status in COOLING_STATUSES:
            reason = self.loggable(f"status {error.told_status}: {error}")
            retry_after = candidate.response.head.fields.get("retry-after")
            candidate.health.fail(reason, retry_after, reached=True)
        else:
            # As with most error statuses, it may be the request that is wrong.
            candidate.health.succeed()

    def note_response(self, candidate: Candidate) -> None:
        """Put an attempt that was answered into the record; begin or end a cool-down."""
        head = candidate.response.head
        words = ""
        if head.status >= 400:
            # Its content has come already where another instance could be asked instead. Of the
            # only one's there may be nothing yet; `relay_response` finds the words then.
            words = self.loggable_error(head, b"".join(candidate.response.buffered))
        if head.status in COOLING_STATUSES:
            reason = f"status {head.status}: {words}".removesuffix(": ")
            candidate.health.fail(reason, head.fields.get("retry-after"), reached=True)
        elif head.status >= 400:
            candidate.health.succeed()
        else:
            candidate.health.answer()
            self.candidates.keep_home(candidate)
        self.note_attempt(candidate, words or None)
        candidate.noted = True

    def note_attempt(self, candidate: Candidate, error: str | None) -> None:
        """Put an attempt into the record, in place of what stands there of the same attempt."""
        elapsed_ms = round((time.monotonic() - candidate.started_at) * 1000, 1)
        instance = str(candidate.instance)
        url = self.record.upstream_url
        attempt = Attempt(instance, url, candidate.status, error, elapsed_ms)
        if candidate.noted:
            self.record.attempts.pop()
        self.record.attempts.append(attempt)

    def loggable_error(self, head: ResponseHead, content: bytes) -> str:
        """Return what an answer says went wrong, as it may be kept; "" when it says nothing."""
        limit = self.context.limits.error_content
        decoded = decode_content(content, read_coding(head.fields), limit)
        if head.status >= 400:
            return self.loggable(read_error(decoded))
        # Every protocol's errors have the word in them, and nearly no good answer has.
        if b"error" not in decoded:
            return ""
        protocol = find_protocol(self.upstream_path(self.candidate))
        return self.loggable(find_error(protocol, parse_object(decoded) or {}))

    def loggable(self, text: str) -> str:
        """Return as much of an error's text as is kept and shown, secrets hidden.

        Servers tell which key was wrong: the client's, or the one in the routing file.
        """
        hidden = hide_in_text(text, self.record.secrets)
        return hidden[: self.context.limits.error_text]

    async def find_opening(self, candidate: Candidate) -> None:
        """Read a response until it says something, an error answer to its end. Raises BadGateway.

        The error may be sent later, when all other instances have failed.
        """
        response = candidate.response
        head = response.head
        longest = self.context.limits.buffered_error
        if head.status >= 400 and len(await response.buffer_error()) > longest:
            raise BadGateway(f"an error answer over {longest} bytes")
        # An error answer says something, whatever is in it. Others, but a 200, may have no content.
        if head.status != 200 or self.request.head.method == "HEAD":
            return
        opening = self.opening
        # Some of it may have been read to see what it is.
        is_clear = opening.feed(b"".join(response.buffered))
        while not is_clear:
            piece = await response.buffer_next()
            if piece:
                is_clear = opening.feed(piece)
            elif opening.finish(response.ends_by_close):
                break
            else:
                raise BadGateway("it ended before it said anything")
        if opening.error and candidate.has_next:
            raise opening.error
        self.note_opening()

    def note_opening(self) -> None:
        """Note that the answer has said something: from now on its tokens come."""
        self.record.first_token_at = time.monotonic()
        self.record.phase = "streaming"

    async def attempt(self, candidate: Candidate) -> UpstreamResponse:
        """Ask the instance; one that refuses what the router has added is asked again without."""
        refused_members = self.context.upstreams.refused_members
        key = candidate.key
        known = refused_members.get(key, frozenset())
        candidate.refused = known
        while True:
            response = await self.send(candidate)
            if response.head.status not in (400, 422) or not candidate.added:
                break
            refused = find_refused(candidate.added, await response.buffer_error())
            if not refused:
                break
            response.close()
            candidate.refused |= refused
        # When it refuses again, the first refusal may just have quoted what it was sent.
        if candidate.refused != known and response.head.status < 400:
            if len(refused_members) >= self.context.limits.known_instances:
                # Clients choose the names of models.
                refused_members.clear()
            refused_members[key] = candidate.refused
        return response

    def asks_for_usage(self, candidate: Candidate) -> bool:
        """Tell whether the router asks for the usage event of a stream, for its log.

        Models with timings tell their counts without being asked. If they were asked, they would
        put their timings into the usage event, which is hidden.
        """
        return (
            self.parsed.stream
            and find_protocol(self.upstream_path(candidate)).usage_option
            and not self.parsed.wants_usage
            and USAGE_MEMBER not in candidate.refused
            and ("stream_options",) not in self.parameters_of(candidate).strips
            and candidate.key not in self.context.upstreams.models_with_timings
        )

    def parameters_of(self, candidate: Candidate) -> RequestParameters:
        """Return what becomes of the members of the request on its way to this instance."""
        own = candidate.instance.server.parameters
        parameters = self.decision.parameters
        if own != NO_PARAMETERS:
            parameters = merge_parameters(parameters, own)
        if self.context.settings.disable_thinking:
            parameters = merge_parameters(parameters, RequestParameters(think=THINK_OFF))
        return parameters

    def upstream_path(self, candidate: Candidate) -> str:
        """Return the path that serves the request at this instance."""
        return self.parsed.path if candidate.native else self.parsed.openai_path

    async def send(self, candidate: Candidate) -> UpstreamResponse:
        """Send the request to the instance, in the dialect that its server speaks."""
        parsed = self.parsed
        path = self.upstream_path(candidate)
        method = self.request.head.method
        server = candidate.instance.server
        encode = self.dialect.encode
        if not candidate.native and self.dialect.encode_openai:
            encode = self.dialect.encode_openai
        # A request may be sent again, in another way.
        candidate.changes.clear()
        candidate.added.clear()
        candidate.hide_usage = self.asks_for_usage(candidate)
        settings = self.context.settings
        changes = RequestChanges(
            model=candidate.model or parsed.model,
            no_think=settings.disable_thinking,
            include_usage=candidate.hide_usage,
            strip_attribution=settings.strip_attribution and not server.is_anthropic,
            flatten_namespaces=not server.knows_namespaces,
            parameters=self.parameters_of(candidate),
            note_change=candidate.changes.append,
            refused=candidate.refused,
            note_added=candidate.added.append,
        )
        content = await self.context.work(len(parsed.content), encode, parsed, changes)
        lines = encode_forwarded_lines(self.request.head, self.forwarding(candidate))
        upload = self.upload
        if upload:
            lines += upload.framing_line()
        elif content or method in ("POST", "PUT", "PATCH"):
            lines += f"Content-Length: {len(content)}\r\n"
        target = f"{server.url.prefix}{path}{encode_query(parsed, changes.model)}"
        head = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace")
        candidate.response = await self.context.upstreams.send_request(
            server, method, head + content, upload
        )
        if upload and not upload.complete:
            # The rest of the content stands where the next request would.
            self.writer.keep_alive = False
        return candidate.response

    def forwarding(self, candidate: Candidate) -> Forwarding:
        """Return what the fields of the request depend on when it goes to this candidate."""
        return Forwarding(
            candidate.instance.server,
            candidate.native,
            bool(self.parsed.text),
            self.context.via,
            self.context.settings.jwt_secret,
        )

    # Relaying an answer

    def choose_rewriter(self) -> tuple[Rewriter | None, Inflater | None]:
        """Return what the answer must go through, None when it goes as it is.

        One with an unknown content coding goes as it is, if nothing is to be translated and the
        client has no head yet that says something else. Where it cannot, raises BadGateway.
        """
        candidate = self.candidate
        server = candidate.instance.server
        head = candidate.response.head
        coding = read_coding(head.fields)
        begun = self.sent != NOTHING
        if coding and coding not in CODINGS and candidate.native and not begun:
            return None, None
        plan = AnswerPlan(
            parsed=self.parsed,
            dialect=self.dialect,
            native=candidate.native,
            rules=self.filter_rules(candidate),
            hide_usage=candidate.hide_usage,
            renamed=candidate.instance.model != self.parsed.model,
            now=time.time,
            timing=self.timing,
            limits=self.context.limits,
            begun=begun,
            note_opened=candidate.note_opened,
            tool_names=None if server.knows_namespaces else self.parsed.tool_names,
        )
        rewriter = choose_rewriter(plan, head.status, candidate.response.media_type)
        if not rewriter or not coding:
            return rewriter, None
        if coding not in CODINGS:
            raise BadGateway(
                f"the answer (status {head.status}) has the content coding "
                f"{coding[:80]!r}; it can be read as {', '.join(CODINGS)} alone"
            )
        # A stream may decode to any length, because no more than an event of it is in memory.
        longest = self.context.limits.decoded_answer if rewriter.buffers else math.inf
        return rewriter, Inflater(coding, longest)

    def filter_rules(self, candidate: Candidate) -> FilterRules:
        """Return what is taken out of the answers of a candidate."""
        settings = self.context.settings
        learned = candidate.key in self.context.upstreams.models_opening_thinking
        own = Thinking(settings.strip_thinking, opened=learned)
        levels = (self.decision.thinking, candidate.instance.server.thinking, own)
        return choose_rules(levels, settings.strip_json_markdown)

    def timing(self) -> Timing:
        """Return how long an answer took, and how long its first token, in ns."""
        now = time.monotonic()
        started_at = self.record.started_at
        # An answer that comes as a whole has its first token with the last one.
        first_token_at = now
        if self.parsed.stream and self.record.first_token_at:
            first_token_at = self.record.first_token_at
        total_ns = int((now - started_at) * 1e9)
        first_ns = int((first_token_at - started_at) * 1e9)
        return Timing(total_ns, first_ns)

    async def relay_response(self) -> None:
        """Send the candidate's answer as it comes in, through its rewriter."""
        response = self.candidate.response
        head = response.head
        self.note_answer(head)
        self.rewriter, self.inflater = self.choose_rewriter()
        self.relaying = True
        rewriter = self.rewriter
        closed = response.ends_by_close
        try:
            await response.pump(self.forward, self.writer.connection)
            self.check_coding()
        except BadGateway:
            # After a good end of its stream a server may end the connection as it likes.
            if rewriter is None or rewriter.trouble or not rewriter.complete:
                raise
            closed = True
        self.finish_opening(closed)
        tail = b""
        if rewriter:
            tail = await self.context.work(rewriter.size, rewriter.finish, closed)
            self.conclude(rewriter)
        if self.error_content and not self.record.error:
            self.record.error = self.loggable_error(head, self.error_content)
        self.finish_answer(tail)

    def finish_opening(self, closed: bool) -> None:
        """Note when an answer that is over began to say something, if that can be told.

        `closed` is as in `may_be_whole`.
        """
        opening = self.opening
        if opening and self.record.first_token_at is None and opening.finish(closed):
            self.note_opening()
        if opening and opening.is_document:
            # Its first token came with the last one, which says nothing of how fast they were.
            self.record.first_token_at = None

    def finish_answer(self, tail: bytes) -> None:
        """Send the rest of an answer, which may be all of it, and note how its instance fared."""
        candidate = self.candidate
        status = candidate.response.head.status
        is_whole = self.rewriter is not None and self.rewriter.buffers
        if is_whole and self.sent == PINGS:
            tail = self.dialect.encode_whole_event(tail, status, self.parsed.path)
            # The head that the pings began with said 200.
            self.record.status = status
        # Of an answer that was kept back until now the length is known.
        self.begin_answer(len(tail) if is_whole else None)
        self.writer.finish(tail)
        if self.opening and self.opening.error:
            self.note_error_answer(candidate, self.opening.error)
        elif status < 400:
            candidate.health.succeed()
            if self.opening and self.opening.response_id:
                key = hash_key(self.opening.response_id)
                self.context.upstreams.response_homes.keep(key, instance_key(candidate.instance))

    def note_answer(self, head: ResponseHead) -> None:
        """Note in the record that this answer is relayed, in place of one that has broken off."""
        record = self.record
        record.response_fields = head.fields
        record.answer_status = head.status
        self.context.log.drop_answer(record)
        # A stream's events are looked at by its rewriter.
        media_type = self.candidate.response.media_type
        self.seeks_error = head.status >= 400 or media_type == "application/json"
        self.error_content = b""

    def keep_error(self, data: bytes) -> None:
        """Keep the content of what may be an error.

        When it is too long for one, no more is kept, and of an answer with a good status nothing.
        """
        self.error_content += data
        if len(self.error_content) > self.context.limits.error_content:
            self.seeks_error = False
            if self.record.answer_status < 400:
                self.error_content = b""

    def check_coding(self) -> None:
        """Refuse an answer whose content coding broke off."""
        inflater = self.inflater
        # Without a first octet there is no decoder: an empty content is complete, in any coding.
        if inflater and inflater.decoder and not inflater.decoder.eof:
            raise BadGateway("the answer's content coding broke off")

    def conclude(self, rewriter: Rewriter) -> None:
        """Note what an answer has told by its end: an error, and what its server is like."""
        self.record.error = self.loggable(rewriter.trouble)
        with_timings = self.context.upstreams.models_with_timings
        key = self.candidate.key
        if rewriter.lost_timings:
            # llama.cpp tells its timings unasked, with the finish, and clients show them. When the
            # router asks for the usage they move into the usage event, which is hidden. So this
            # instance is not asked for it again.
            with_timings.add(key)
        elif key in with_timings and not rewriter.tells_timings:
            # Another server stands there now.
            with_timings.discard(key)
        opening = self.context.upstreams.models_opening_thinking
        if self.candidate.opened_thinking:
            opening.add(key)
        elif self.candidate.opened_thinking is False:
            # This time its stream was held back for nothing.
            opening.discard(key)
        for models in (with_timings, opening):
            if len(models) > self.context.limits.known_instances:
                # Clients choose the names of models.
                models.clear()

    def forward(self, data: bytes) -> None:
        """Pass a piece of the answer on, or keep it back, as its rewriter says."""
        record = self.record
        if record.first_token_at is None and (self.opening is None or self.opening.feed(data)):
            self.note_opening()
        self.context.log.append_body(record, data)
        if self.seeks_error:
            self.keep_error(data)
        if self.inflater is None:
            self.forward_decoded(data)
            return
        # A few octets may be many megabytes when they are decoded, and each step on the way to the
        # client makes a copy of what it gets. An empty piece lets the answer begin, too.
        decoded = self.inflater.feed(data)
        for at in range(0, max(1, len(decoded)), MiB):
            self.forward_decoded(decoded[at : at + MiB])

    def forward_decoded(self, data: bytes) -> None:
        """Give the rewriter a piece without its content coding, and the client what may leave."""
        writer = self.writer
        if self.rewriter:
            data = self.rewriter.feed(data)
            if self.rewriter.over:
                self.candidate.response.end()
            if self.rewriter.buffers:
                return
        if self.sent != ANSWER:
            self.begin_answer(None)
        writer.write_content(data)
        self.record.response_size = writer.size

    def begin_answer(self, length: int | None) -> None:
        """Write the head of the client's answer, unless it has one; `length` as in `write_head`."""
        if self.sent == NOTHING:
            self.write_head(self.candidate.response.head, length)
        self.sent = ANSWER

    def write_head(self, head: ResponseHead, length: int | None) -> None:
        """Write the head of the client's answer; its content is `length` octets, if known."""
        declared_length = head.fields.get("content-length")
        if declared_length and not self.rewriter:
            # It is valid, or there would be no answer.
            length = int(declared_length)
        shape = AnswerShape(
            native=self.candidate.native,
            rewritten=self.rewriter is not None,
            streamed=self.parsed.stream,
            guarded=bool(self.writer.extra_fields),
            media_type=self.candidate.response.media_type,
        )
        lines = encode_answer_lines(head, shape) + encode_field_lines(self.own_fields())
        if head.fields.get("date") is None:
            # RFC 9110 section 6.6.1: who relays a response without a date adds one.
            lines += f"Date: {http_date(int(time.time()))}\r\n"
        self.writer.write_head(head.status, lines, length, head.reason)


# --- handlers that relay ---------------------------------------------------------------


async def decode_request(context: Context, request: Request) -> None:
    """Take the content coding off a request's content, if it has one.

    Raises what `decode_request_content` raises, unless nothing is known of what the content may be:
    then it goes on as it is.
    """
    coding = read_coding(request.head.fields)
    if not coding or not request.content:
        return
    content_type = (request.head.fields.get("content-type") or "").lower()
    may_have_model = find_protocol(request.path).needs_model or "json" in content_type
    is_known = coding in (*REQUEST_CODINGS, "x-gzip")
    if not (is_known or may_have_model or content_type.startswith("multipart/form-data")):
        return
    limit = context.settings.max_request_size
    # However short it is, it may take long.
    long = context.limits.long_content
    content = request.content
    request.content = await context.work(long, decode_request_content, content, coding, limit)
    # It is true no more: servers get what was decoded, and so does the log.
    request.head = request.head.without("content-encoding")


async def refuse_upgrade(context: Context, request: Request) -> None:
    """Tell a client that would rather use a WebSocket to go on over HTTP (RFC 9110 15.5.22)."""
    fields = (("Upgrade", "HTTP/1.1"), ("Connection", "Upgrade"))
    raise UpgradeRequired(f"{request.path} is served over HTTP/1.1; send a POST", *fields)


async def find_model(context: Context, request: Request) -> tuple[str, Step]:
    """Return the model of a request that names none, and what the trail says of it.

    It is DEFAULT_MODEL, or the only one that the default server lists. Raises MalformedContent,
    which names some of those that there are.
    """
    default_model = context.settings.default_model
    if default_model:
        return default_model, Step("DEFAULT_MODEL", True, "the request names no model")
    default = context.table.default
    listed = None
    if default:
        listed = await context.model_lists.get(default, context.authorization_of(request))
    if listed and len(listed) == 1:
        why = f"the request names no model, and {default.name} has this one alone"
        return listed[0]["id"], Step("the only model", True, why)
    names = []
    with contextlib.suppress(BadGateway):
        names = [entry["id"][:80] for entry in await context.list_models(request)]
    examples = f", such as {', '.join(names[:NAMES_IN_ERROR])}" if names else ""
    raise MalformedContent(NO_MODEL + examples)


async def relay_model(context: Context, request: Request) -> None:
    """Relay a request to where its model leads; one without a model to the default server."""
    content = request.content
    read = request.dialect.read
    parsed = await context.work(len(content), read, request.path, request.query, content)
    step = None
    if parsed.lacks_model:
        model, step = await find_model(context, request)
        parsed = dataclasses.replace(parsed, model=model)
    if parsed.text or parsed.model:
        decision = await context.decide(parsed.model, request.source_host, request.dialect)
        decision = await context.drop_unknown_tags(decision, request)
    else:
        # Neither a JSON document nor a model: there is nothing that a rule could look at.
        decision = resolve_default(context.table, request.source_host)
    if step:
        decision = decision._replace(trail=(step, *decision.trail))
    await Exchange(context, request, parsed, decision).run()


async def relay_post(context: Context, request: Request) -> None:
    """Relay a POST under /v1/: a JSON object, a form, or something else as it is."""
    content_type = request.head.fields.get("content-type") or ""
    is_form = content_type.lower().startswith("multipart/form-data")
    # An endpoint that needs a model takes JSON, whatever its client calls it: `curl -d` says form.
    needs_model = find_protocol(request.path).needs_model
    if is_form:
        # The boundary of its parts stands in its Content-Type.
        read_this_form = functools.partial(read_form, content_type)
        request.dialect = OPENAI_OPAQUE._replace(read=read_this_form)
    elif not (needs_model or is_object(request.content)):
        # The Content-Type does not tell: clients give JSON's to an empty content, too, such as that
        # of `POST /v1/responses/{id}/cancel`.
        request.dialect = OPENAI_OPAQUE
    await relay_model(context, request)


async def decide_native(context: Context, request: Request, model: str) -> Decision:
    """Return where a request goes that can only be served in its own dialect, untranslated.

    Raises NotSupported when there is no such server.
    """
    service = request.dialect.service
    decision = await context.decide(model, request.source_host, request.dialect)
    servers = context.servers_speaking(service)
    if not servers:
        raise NotSupported(
            f"{request.path} needs a server that speaks {service} itself, and none has said so; "
            f"`api: {service}` in the routing file says it of one that is switched off"
        )
    instances = tuple(instance for instance in decision.instances if instance.server.api == service)
    if not instances:
        instances = (Instance(servers[0], model or None),)
    return decision._replace(instances=instances)


async def relay_to_native(context: Context, request: Request) -> None:
    """Relay a request as it is to a server that speaks the client's dialect itself."""
    native = as_native(request.dialect)
    if not is_object(request.content):
        native = as_opaque(native)
    parsed = ParsedRequest(request.path, request.query, request.content)
    with contextlib.suppress(MalformedContent):
        parsed = require_model(native.read(request.path, request.query, request.content))
    decision = await decide_native(context, request, parsed.model)
    request.dialect = native
    await Exchange(context, request, parsed, decision).run()


async def relay_native(context: Context, request: Request) -> None:
    """Do what `relay_to_native` does, with a request that must have content."""
    if not request.content and request.head.method != "HEAD":
        raise MalformedContent("the request has no content")
    await relay_to_native(context, request)


async def relay_optional(context: Context, request: Request) -> None:
    """Relay a path that only newer servers of a dialect have; without any such server it is a 404.

    Clients take that for an older server, and go on without what the path tells.
    """
    try:
        await relay_to_native(context, request)
    except NotSupported as error:
        raise NotFound(str(error)) from None


async def relay_changes(context: Context, request: Request) -> None:
    """Relay what gives a server other models, or takes some away: its list is asked for anew."""
    check_unlimited(request.token)
    try:
        await relay_native(context, request)
    finally:
        # Whatever became of the request, and wherever it went: asking once too often is cheap.
        for server in context.servers_speaking(request.dialect.service):
            context.model_lists.note_change(server)


async def relay_pull(context: Context, request: Request) -> None:
    """Relay a request to fetch a model; when no server can, say which models there are.

    Clients pull what /api/show does not know, and show their user only how that ended.
    """
    try:
        await relay_changes(context, request)
    except NotSupported as error:
        read = request.dialect.read
        model = require_model(read(request.path, request.query, request.content)).model
        try:
            names = [entry["id"] for entry in await context.list_models(request)]
        except BadGateway:
            names = []
        words = "it is there already" if find_listed(model, names) else unknown_model(model, names)
        raise NotSupported(f"{words}; {error}") from None


async def relay_upload(context: Context, request: Request) -> None:
    """Relay content of any length, such as the file of a model, while it comes in."""
    check_unlimited(request.token)
    decision = await decide_native(context, request, "")
    # It comes once, and so can be sent to one server alone.
    decision = decision._replace(instances=decision.instances[:1])
    request.dialect = as_opaque(as_native(request.dialect))
    parsed = ParsedRequest(request.path, request.query, b"")
    exchange = Exchange(context, request, parsed, decision)
    if request.head.method != "HEAD":
        exchange.upload = Upload(request)
    await exchange.run()


async def relay_as_it_is(context: Context, request: Request) -> None:
    """Relay anything as it is to the server that the path names: /upstream/{server}/..."""
    # What is asked for there may name its model in any way.
    check_unlimited(request.token)
    _, _, name, *rest = request.path.split("/", 3)
    path = f"/{''.join(rest)}"
    content = request.content
    model = ""
    stream = False
    # What can be read of it is for its row alone, and need not be right.
    with contextlib.suppress(RouterError):
        read = await context.work(len(content), read_object, path, request.query, content)
        model = read.model
        stream = read.stream
    decision = resolve_server(context.table, urllib.parse.unquote(name), model)
    parsed = ParsedRequest(path, request.query, content, model=model)
    exchange = Exchange(context, request, parsed, decision)
    exchange.record.stream = stream
    await exchange.run()


# ======================================================================================
# 15  Dashboard and API
# ======================================================================================
# What the router itself answers. For the owner: the page, one document whose script is allowed
# by its hash, and the JSON that it fetches. For clients: which models there are. A question
# to the log is a function that a reader thread runs on the database. To add an endpoint: a
# handler `serve_...(context, request)` here, and a line in section 16.


# How much of what a running request has said is looked at for its last words, and how many
# characters of them are shown.
LOOKED_AT_TAIL = 4 * KiB
SHOWN_TAIL = 120


def read_last_text(pieces: Sequence[bytes | bytearray]) -> str:
    """Return the last characters that a running answer has said, or thought; "" for nothing yet.

    `[b'data: {"choices":[{"delta":{"content":"Hi"}}]}\\n\\n']`  ->  `Hi`
    """
    tail = b""
    for piece in reversed(pieces):
        tail = bytes(piece[-LOOKED_AT_TAIL:]) + tail
        if len(tail) >= LOOKED_AT_TAIL:
            # It begins within an event.
            tail = tail[-LOOKED_AT_TAIL:].partition(b"\n")[2]
            break
    for message in reversed(read_choices(tail)):
        text = "".join(message.texts) or "".join(message.thoughts)
        if text:
            return text[-SHOWN_TAIL:]
    return ""


def running_document(record: RequestRecord, now: float) -> dict[str, Any]:
    """Return a running request as /api/events tells it; `now` is monotonic."""
    ttft = None
    if record.first_token_at is not None:
        ttft = round((record.first_token_at - record.started_at) * 1000)
    return {
        "id": record.id,
        "request_id": record.request_id,
        "source_ip": record.source_ip,
        "path": cut_name(record.shown_target),
        "original_model": cut_name(record.requested_model),
        "mapped_model": cut_name(record.mapped_model),
        "sent_model": cut_name(record.sent_model),
        "upstream_url": record.upstream_url,
        "phase": record.phase,
        "waits_for": record.waits_for if record.phase in ("queued", "waking") else "",
        "queued_ms": record.queued_ms(now),
        "service_type": record.service,
        "timestamp": rfc3339(record.timestamp),
        "bytes": record.response_size,
        "tokens": record.event_count,
        "elapsed_ms": round((now - record.started_at) * 1000),
        "ttft_ms": ttft,
    }


def lane_document(record: RequestRecord, now: float) -> dict[str, Any]:
    """Return a running request as /api/inflight shows it, with its last words."""
    text = read_last_text(list(record.pieces)) if record.stream else ""
    return {**running_document(record, now), "text": hide_in_text(text, record.secrets)}


# --- questions to the log -------------------------------------------------------------
# Each is a function that a reader's thread runs: it gets the log, the database and the
# parameters of its query. No question walks through the log, however long it is: lists are
# paged by id, sums come from those of whole hours and at most half an hour of rows, and an even
# sample stands for many points. What `hours` and `since` mean, `Window` says.

# Percentiles of at most so many rows are taken from the rows; those of more from a histogram.
FEW_ROWS = 2000
# From this level on the index `sample`, which section 13 makes, has all that a point shows.
SAMPLE_LEVEL = 3
HOURS = number_between(1, 24 * 366)
# A moment in ms UTC.
MOMENT = number_between(0, 2**50)
# The columns of a tally, summed over rows of `rollups`.
SUMMED_COLUMNS = ", ".join(f"TOTAL({name})" for name in TALLY_COLUMNS)

# The filters of a list of rows, those first that few rows pass as a rule.
MODEL_FILTER = "? IN (sent_model, original_model)"
ROW_FILTERS = {
    "source": "source_ip = ?",
    "model": MODEL_FILTER,
    "upstream": "upstream_url = ?",
    "service_type": "service_type = ?",
}
# The name of a model stands in one of two columns, and each has an index of its own; a row
# that has it in both is found by the first.
MODEL_LOOK_UPS = ("sent_model = ?", "original_model = ? AND original_model <> sent_model")
# What a search for text looks at. Each of its words may stand in another column.
SEARCHED = """original_model || ' ' || mapped_model || ' ' || sent_model || ' ' || path || ' ' ||
    upstream_url || ' ' || route || ' ' || ifnull(error_message, '') || ' ' || source_ip || ' ' ||
    request_id"""
HAS_WORD = f"{SEARCHED} LIKE ? ESCAPE '\\'"
# Members of a row's document that no answer has, and those that lists leave out, too.
NEVER_SHOWN = ("level",)
UNLISTED = (
    "sent_model",
    "cached_tokens",
    "user_agent",
    "client_key",
    "tokens_per_second",
    *NEVER_SHOWN,
)
# The columns of a table: what a list shows of a row, in its order.
TABLE_COLUMNS = [
    name for name in (*Row._fields, "total_tokens", "is_inflight") if name not in UNLISTED
]

# A point of the performance page: what it is called, and how the database makes it.
POINT = {
    "id": "id",
    "timestamp": "strftime('%Y-%m-%dT%H:%M:%fZ', timestamp / 1000.0, 'unixepoch')",
    "model": MODEL,
    "service_type": "service_type",
    "upstream_url": "upstream_url",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "cached_tokens": "cached_tokens",
    "total_tokens": "ifnull(prompt_tokens + completion_tokens, prompt_tokens)",
    "duration_ms": "duration_ms",
    "ttft_ms": "ttft_ms",
    "tokens_per_second": """round(completion_tokens * 1000 /
        nullif(duration_ms - ifnull(ttft_ms, 0), 0), 2)""",
    "status_code": "status_code",
    "failed": "failed",
}
# Without the underscore `ORDER BY id`, `timestamp >= ?` and the like would mean these expressions
# and not the columns, and SQLite would not use its index.
POINT_COLUMNS = ", ".join(f"{value} AS {name}_" for name, value in POINT.items())
# The filters of figures: on points, each with the index that finds them, and on sums.
POINT_FILTERS = {
    "model": f"sent_model IN (:model, '') AND {MODEL} = :model",
    "upstream": "upstream_url = :upstream",
    "service_type": "service_type = :service_type",
}
POINT_INDEXES = {"model": "by_sent", "upstream": "by_upstream", "service_type": "by_service"}
SUM_FILTERS = {
    "model": "model = :model",
    "upstream": "upstream_url = :upstream",
    "service_type": "service_type = :service_type",
}
# A model on one server: no URL has a blank in it.
ON_SERVER = "model || ' ' || upstream_url"
# What a column of the sums is called in a row.
SUM_KEYS = {
    "model": f"CASE WHEN level NOTNULL THEN {MODEL} ELSE '' END",
    "service_type": "service_type",
    ON_SERVER: f"CASE WHEN level NOTNULL THEN {MODEL} ELSE '' END || ' ' || upstream_url",
}


class Condition(NamedTuple):
    """A test on rows or a statement with tests, in SQL, and the values of its question marks."""

    text: str
    values: tuple[Any, ...]


class Window(NamedTuple):
    """The time that figures are of: from `begin` up to before `end`, both in ms UTC.

    It begins to the ms where it was asked for. It ends with the hour that runs, whose sums are
    those until now.
    """

    begin: int
    end: int

    @classmethod
    def of(cls, seconds: float, now: float) -> Window:
        """Return the window of the last seconds before `now`, which is in s UTC."""
        return cls(int((now - seconds) * 1000), (int(now // 3600) + 1) * HOUR_MS)

    @property
    def first_hour(self) -> int:
        """The first hour of which the window has all."""
        return self.begin // HOUR_MS + 1

    @property
    def nearest_hour(self) -> int:
        """The hour whose begin is nearest to that of the window, before or after it."""
        return (self.begin + HOUR_MS // 2) // HOUR_MS

    @property
    def first_id(self) -> int:
        """An id that no row of the window is below: ids are those of their time, or higher."""
        return time_id((self.begin - 1) / 1000)

    def values(self) -> dict[str, int]:
        """Return what statements call its parts."""
        return {
            "begin": self.begin,
            "end": self.end,
            "first_id": self.first_id,
            "first_hour": self.first_hour,
            "nearest_hour": self.nearest_hour,
            "end_hour": self.end // HOUR_MS,
        }


class StatusCondition(NamedTuple):
    """A condition on how requests ended; failures are few as a rule."""

    condition: Condition
    is_failure: bool


def parse_status(text: str) -> StatusCondition:
    """Read a status, a class of them or `error`. Raises ValueError.

    `4xx`  ->  failed, and a status from 400 to 499;  `error`  ->  failed, whatever the status;
    `running`  ->  not finished yet
    """
    if text == "error":
        return StatusCondition(Condition("failed = ?", (1,)), True)
    if text == "running":
        return StatusCondition(Condition("failed IS NULL", ()), True)
    if not re.fullmatch(r"[1-5](?:[0-9]{2}|xx)", text):
        raise ValueError(
            "allowed are a status such as 404, a class such as 4xx, error, and running"
        )
    lowest, highest = int(text.replace("x", "0")), int(text.replace("x", "9"))
    is_failure = lowest >= 400
    sql = "failed = ? AND status_code BETWEEN ? AND ?"
    return StatusCondition(Condition(sql, (int(is_failure), lowest, highest)), is_failure)


def parse_age(text: str) -> float:
    """Read how long ago something was; return s. `24h`  ->  86400. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,6}[mhd]", text):
        raise ValueError("allowed is an age such as 30m, 24h or 7d")
    unit = {"m": 60, "h": 3600, "d": 86_400}[text[-1]]
    return int(text[:-1]) * unit


def parse_model(text: str) -> str:
    """Read the name of a model, and return it as rows have it. Raises ValueError."""
    return cut_name(parse_text(text))


def parse_words(text: str) -> list[str]:
    """Read what a search looks for: words, and behind many of them the rest as it stands.

    `alice  coder`  ->  ["alice", "coder"]. Raises ValueError.
    """
    return parse_text(text).strip().split(None, LIMITS.searched_words - 1)


Parameters = Mapping[str, Callable[[str], Any]]
LOG_PARAMETERS: Parameters = {
    "limit": number_between(1, 1000),
    "before": number_between(0, 2**63 - 1),
    "q": parse_words,
    "service_type": choice_of(*SERVICES),
    "model": parse_model,
    "upstream": parse_text,
    "status": parse_status,
    "begin": MOMENT,
    "end": MOMENT,
    "source": parse_text,
}
POINT_PARAMETERS: Parameters = {
    "hours": HOURS,
    "limit": number_between(1, 20_000),
    "model": parse_model,
    "upstream": parse_text,
    "service_type": choice_of(*SERVICES),
}
TREND_PARAMETERS: Parameters = {
    name: parse for name, parse in POINT_PARAMETERS.items() if name != "limit"
}
ROUTE_PARAMETERS: Parameters = {
    "model": str,
    "source_host": lambda text: str(ipaddress.ip_address(text)),
}
EXPORT_PARAMETERS: Parameters = {
    "since": parse_age,
    "model": parse_model,
    "format": choice_of("jsonl", "csv", "openai"),
}


def read_parameters(query: str, known: Parameters) -> dict[str, Any]:
    """Return the parameters of a query; one without a value is left out. Raises BadRequest.

    `?limit=5&model=`  ->  {'limit': 5}
    """
    parameters = {}
    for name, text in urllib.parse.parse_qsl(query.removeprefix("?")):
        if name not in known:
            raise BadRequest(f"unknown parameter {name[:80]!r}; known are {', '.join(known)}")
        try:
            parameters[name] = known[name](text)
        except ValueError as error:
            raise BadRequest(f"{name}={text[:80]!r}: {error}") from None
    return parameters


# --- lists of rows ---


def read_conditions(parameters: Mapping[str, Any]) -> list[Condition]:
    """Return what the rows of a list must fulfil, the condition first that fewest rows do."""
    conditions = []
    for name, text in ROW_FILTERS.items():
        if name in parameters:
            conditions.append(Condition(text, (parameters[name],)))
    status = parameters.get("status")
    if status and status.is_failure:
        conditions.insert(0, status.condition)
    elif status:
        conditions.append(status.condition)
    return conditions


def select_ids(parameters: Mapping[str, Any]) -> Condition:
    """Return the statement for the ids of the rows that fulfil all conditions, and its values.

    SQLite looks one condition up in its index, and looks at what it has found for the others.
    Which one that is must not be left to its guess, because with the wrong one it walks through
    the log: it is the first, and a `+` before the others keeps SQLite from looking them up.

    {'source': '::1', 'service_type': 'openai'}  ->  SELECT id FROM requests WHERE
        id < ? AND +service_type = ? AND source_ip = ?
    """
    conditions = read_conditions(parameters) or [Condition("1", ())]
    first = conditions[0]
    tests = ["id < ?"]
    values = [parameters.get("before", 2**62)]
    if "window" in parameters:
        window = parameters["window"]
        tests += ["id >= ?", "+timestamp >= ?", "+timestamp < ?"]
        values += [window.first_id, window.begin, window.end]
    for condition in conditions[1:]:
        tests.append(f"+{condition.text}")
        values += condition.values
    look_ups = MODEL_LOOK_UPS if first.text == MODEL_FILTER else (first.text,)
    selects = []
    all_values = []
    for look_up in look_ups:
        selects.append(f"SELECT id FROM requests WHERE {' AND '.join([*tests, look_up])}")
        all_values += [*values, *first.values]
    return Condition(" UNION ".join(selects), tuple(all_values))


def select_rows(parameters: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the statement for a page of rows, newest first, and its values.

    A search for text looks at the newest rows that fulfil the other conditions.
    """
    ids = select_ids(parameters)
    limit = parameters.get("limit", 100)
    looked_at = limit
    text_test = "1"
    text_values = []
    if "q" in parameters:
        looked_at = LIMITS.searched_rows
        words = parameters["q"]
        text_test = " AND ".join([HAS_WORD] * len(words))
        # `%` and `_` are LIKE's own signs; somebody who searches for `50%` means the sign.
        text_values = ["%" + re.sub(r"([\\%_])", r"\\\1", word) + "%" for word in words]
    sql = f"""SELECT {COLUMNS} FROM requests
        WHERE id IN ({ids.text} ORDER BY id DESC LIMIT ?) AND {text_test}
        ORDER BY id DESC LIMIT ?"""
    return sql, [*ids.values, looked_at, *text_values, limit]


def token_rate(tokens: float | None, duration: float | None, ttft: float | None) -> float | None:
    """Return tokens per second from the first one on; both times are in ms."""
    spoken_ms = (duration or 0) - (ttft or 0)
    if not tokens or spoken_ms <= 0:
        return None
    return round(tokens * 1000 / spoken_ms, 2)


def row_document(row: Row, left_out: Sequence[str] = UNLISTED) -> dict[str, Any]:
    """Return a row as JSON shows it."""
    counts = [count for count in (row.prompt_tokens, row.completion_tokens) if count is not None]
    document = {
        **row._asdict(),
        "timestamp": rfc3339(row.timestamp / 1000),
        "completed_at": rfc3339(row.completed_at / 1000) if row.completed_at else None,
        "total_tokens": sum(counts) if counts else None,
        "failed": bool(row.failed),
        "is_inflight": row.failed is None,
        "tokens_estimated": bool(row.tokens_estimated),
        "stream": bool(row.stream),
        "attempts": [Attempt(*attempt)._asdict() for attempt in json.loads(row.attempts)],
        "tokens_per_second": token_rate(row.completion_tokens, row.duration_ms, row.ttft_ms),
    }
    for name in left_out:
        del document[name]
    return document


def read_logs(log: RequestLog, db: sqlite3.Connection, parameters: Mapping[str, Any]) -> Any:
    """Answer /api/logs; what runs is shown as it stands now."""
    running = dict(log.running)
    documents = []
    if "begin" in parameters or "end" in parameters:
        window = Window(parameters.get("begin", 0), parameters.get("end", 2**50))
        parameters = {**parameters, "window": window}
    for found in db.execute(*select_rows(parameters)):
        row = Row._make(found)
        record = running.get(row.id)
        if record:
            row = make_row(record, Detail(), finished=False)
        documents.append(row_document(row))
    return documents


# --- figures ---


def percentile(counts: Sequence[float], values: Sequence[float], share: int) -> float | None:
    """Return the smallest value in ms that `share` percent do not exceed, None without any.

    `counts` are the buckets of their histogram. When `values` has all of them, the result is exact;
    otherwise it comes from the histogram, as if the values of a bucket were spread evenly in it.
    """
    if len(values) >= sum(counts):
        if not values:
            return None
        # Rounded up: of 3 values the second is the first that half of them do not exceed.
        rank = -(-len(values) * share // 100)
        return sorted(values)[rank - 1]
    remaining = share * sum(counts) / 100
    low = 0.0
    for count, high in zip(counts, BUCKET_ENDS, strict=True):
        if count and remaining <= count:
            return round(low + (high - low) * remaining / count, 1)
        remaining -= count
        low = high
    return None


def percentiles(counts: Sequence[float], values: Sequence[float]) -> dict[str, float | None]:
    """Return the three percentiles that the page shows."""
    return {f"p{share}": percentile(counts, values, share) for share in (50, 95, 99)}


def read_sums(tally: Sequence[float], *names: str) -> dict[str, int]:
    """Return some sums of a tally as whole numbers."""
    return {name: int(tally[SUMS.index(name)]) for name in names}


def read_times(db: sqlite3.Connection, window: Window) -> tuple[list[float], list[float]]:
    """Return durations and times to the first token of the finished rows of a window, ms."""
    durations = []
    ttfts = []
    rows = db.execute(
        "SELECT duration_ms, ttft_ms FROM requests INDEXED BY by_time "
        "WHERE timestamp >= :begin AND timestamp < :end AND failed NOTNULL",
        window.values(),
    )
    for duration, ttft in rows:
        if duration is not None:
            durations.append(duration)
        if ttft is not None:
            ttfts.append(ttft)
    return durations, ttfts


def read_rollups(
    db: sqlite3.Connection, window: Window, group: str, filters: Mapping[str, Any]
) -> dict[str, Tally]:
    """Return the sums of the hours from the nearest one on, by service or model."""
    tests = ["hour >= :nearest_hour", "hour < :end_hour", *(SUM_FILTERS[name] for name in filters)]
    rows = db.execute(
        f"SELECT {group}, {SUMMED_COLUMNS} FROM rollups WHERE {' AND '.join(tests)} GROUP BY 1",
        {**window.values(), **filters},
    )
    return {key: tally for key, *tally in rows}


def sum_span(
    db: sqlite3.Connection, span: tuple[int, int], group: str, filters: Mapping[str, Any]
) -> dict[str, Tally]:
    """Return the sums of the rows between two moments in ms, by service or model."""
    tests = ["timestamp >= :begin", "timestamp < :end", "failed NOTNULL"]
    tests += [POINT_FILTERS[name] for name in filters]
    rows = db.execute(
        f"SELECT {SUM_KEYS[group]}, {', '.join(COUNTED)} FROM requests INDEXED BY by_time "
        f"WHERE {' AND '.join(tests)}",
        {"begin": span[0], "end": span[1], **filters},
    )
    tallies: dict[str, Tally] = {}
    for key, *numbers in rows:
        if key not in tallies:
            tallies[key] = [0] * len(TALLY_COLUMNS)
        add_request(tallies[key], *numbers)
    return tallies


def read_tallies(
    db: sqlite3.Connection, window: Window, group: str, filters: Mapping[str, Any]
) -> dict[str, Tally]:
    """Return the sums of a window by service or model.

    They are the sums of the hours from the one on whose begin is nearest. The rows of the half an
    hour or less between both begins are added, or, where the hour began earlier, taken away.
    """
    tallies = read_rollups(db, window, group, filters)
    hour_begin = window.nearest_hour * HOUR_MS
    is_missing = window.begin < hour_begin
    span = (window.begin, hour_begin) if is_missing else (hour_begin, window.begin)
    change = operator.add if is_missing else operator.sub
    for key, difference in sum_span(db, span, group, filters).items():
        tally = tallies.get(key) or [0] * len(TALLY_COLUMNS)
        tallies[key] = list(map(change, tally, difference))
    return {key: tally for key, tally in tallies.items() if tally[SUMS.index("requests")] > 0}


def read_hours(db: sqlite3.Connection, window: Window, total: int) -> list[int]:
    """Return how many of all requests of a window came in each hour.

    The first number has those before the first whole hour, too.
    """
    rows = db.execute(
        "SELECT hour, SUM(requests) FROM rollups "
        "WHERE hour >= :first_hour AND hour < :end_hour GROUP BY hour",
        window.values(),
    )
    by_hour = dict(rows)
    numbers = [by_hour.get(hour, 0) for hour in range(window.first_hour, window.end // HOUR_MS)]
    numbers[0] += total - sum(numbers)
    return numbers


def read_points(
    db: sqlite3.Connection, window: Window, level: int, filters: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the finished rows of a window that have a level, or a higher one, oldest first.

    Each level has half as many rows as the one before: those from a level on are an even sample.
    """
    indexes = [POINT_INDEXES[name] for name in filters]
    index = indexes[0] if indexes else "by_time"
    tests = ["id >= :first_id", "timestamp >= :begin", "timestamp < :end", "failed NOTNULL"]
    tests += [POINT_FILTERS[name] for name in filters]
    tests.append(f"level >= {level}")
    if level >= SAMPLE_LEVEL:
        # The condition of the index itself has to be there, or SQLite does not see that it fits.
        tests.append(f"level >= {SAMPLE_LEVEL}")
        index = "sample"
    rows = db.execute(
        f"SELECT {POINT_COLUMNS} FROM requests INDEXED BY {index} WHERE {' AND '.join(tests)} "
        "ORDER BY timestamp, id",
        {**window.values(), **filters},
    )
    points = [dict(zip(POINT, row, strict=True)) for row in rows]
    for point in points:
        point["failed"] = bool(point["failed"])
    return points


def read_speeds(db: sqlite3.Connection, window: Window, total: int) -> list[float]:
    """Return how fast answers of a window came, in tokens/s: of all, or of an even sample."""
    level = 0
    if total > FEW_ROWS:
        level = max((total // FEW_ROWS).bit_length() - 1, SAMPLE_LEVEL)
    speeds = []
    for point in read_points(db, window, level, {}):
        if point["tokens_per_second"] and not point["failed"]:
            speeds.append(point["tokens_per_second"])
    return speeds


def read_stats(log: RequestLog, db: sqlite3.Connection, parameters: Mapping[str, Any]) -> Any:
    """Answer /api/stats: how many requests the log has, and figures of the last hours."""
    window = Window.of(parameters.get("hours", 24) * 3600, time.time())
    by_service = dict(
        db.execute("SELECT service_type, SUM(requests) FROM rollups GROUP BY service_type")
    )
    tallies = read_tallies(db, window, "service_type", {}).values()
    tally = [sum(numbers) for numbers in zip([0] * len(TALLY_COLUMNS), *tallies, strict=True)]
    requests = int(tally[SUMS.index("requests")])
    errors = tally[SUMS.index("errors")]
    durations, ttfts = [], []
    if requests <= FEW_ROWS:
        durations, ttfts = read_times(db, window)
    return {
        "total_requests": sum(by_service.values()),
        "recent_requests": requests,
        **{f"{name}_requests": by_service.get(name, 0) for name in SERVICES},
        "inflight_requests": len(log.running),
        "error_rate": errors / max(requests, 1),
        "latency_ms": percentiles(tally[DURATIONS], durations),
        "ttft_ms": percentiles(tally[TTFTS], ttfts),
        **read_sums(tally, "prompt_tokens", "completion_tokens"),
        "tokens_per_second": percentile((), read_speeds(db, window, requests), 50),
        "requests_per_hour": read_hours(db, window, requests),
        "log": log.state(),
    }


def gather_times(rows: Iterable[Mapping[str, Any]]) -> Mapping[tuple[str, str], list[float]]:
    """Return the times of some points by model and name of the time."""
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in rows:
        for name in ("duration_ms", "ttft_ms"):
            if row[name] is not None:
                times[row["model"], name].append(row[name])
    return times


def model_document(
    model: str, tally: Tally, times: Mapping[tuple[str, str], list[float]]
) -> dict[str, Any]:
    """Return the figures of a model as /api/performance shows them."""
    durations = times[model, "duration_ms"]
    ttfts = times[model, "ttft_ms"]
    spoken_tokens = tally[SUMS.index("spoken_tokens")]
    spoken_ms = tally[SUMS.index("spoken_ms")]
    return {
        "model": model,
        **read_sums(tally, "requests", "errors", "prompt_tokens", "completion_tokens"),
        "p50_ms": percentile(tally[DURATIONS], durations, 50),
        "p95_ms": percentile(tally[DURATIONS], durations, 95),
        "ttft_p50_ms": percentile(tally[TTFTS], ttfts, 50),
        "tokens_per_second": token_rate(spoken_tokens, spoken_ms, 0),
    }


def read_performance(log: RequestLog, db: sqlite3.Connection, parameters: Mapping[str, Any]) -> Any:
    """Answer /api/performance: an even sample of the rows, and sums by model."""
    hours = parameters.get("hours", 24)
    limit = parameters.get("limit", 2000)
    filters = {name: parameters[name] for name in POINT_FILTERS if name in parameters}
    window = Window.of(hours * 3600, time.time())
    tallies = read_tallies(db, window, "model", filters)
    # What asked no model for an answer has no point either.
    tallies.pop("", None)
    total = int(sum(tally[SUMS.index("requests")] for tally in tallies.values()))
    # Each level halves the number of rows. This one leaves `limit` rows, or up to twice as many.
    level = 0
    if total > FEW_ROWS:
        level = max((total // limit).bit_length() - 1, 0)
    points = read_points(db, window, level, filters)
    times = gather_times(points)
    step = max(len(points) / limit, 1)
    points = [points[int(number * step)] for number in range(min(limit, len(points)))]
    return {
        "data_points": points,
        "models": [model_document(model, tally, times) for model, tally in tallies.items()],
        "meta": {
            "total_points": total,
            "hours_back": hours,
            "sampled": len(points) < total,
            "filters": filters,
        },
    }


# --- figures over time ---

# Spans of a histogram: how long a bar is in ms, and how many there are.
SPANS = {"1h": (60_000, 60), "24h": (HOUR_MS, 24), "7d": (3 * HOUR_MS, 56)}


def read_histogram(log: RequestLog, db: sqlite3.Connection, parameters: Mapping[str, Any]) -> Any:
    """Answer /api/histogram: how many requests of each bar were answered, and how many failed.

    Minutes are counted from the rows of the last hour, hours come from their sums.
    """
    step, number = SPANS[parameters.get("span", "24h")]
    last = int(time.time() * 1000) // step
    first = last - number + 1
    if step < HOUR_MS:
        rows = db.execute(
            "SELECT timestamp / ?, count(*), sum(failed) FROM requests INDEXED BY by_time "
            "WHERE timestamp >= ? AND failed NOTNULL GROUP BY 1",
            (step, first * step),
        )
    else:
        rows = db.execute(
            "SELECT hour / ?, TOTAL(requests), TOTAL(errors) FROM rollups WHERE hour >= ? "
            "GROUP BY 1",
            (step // HOUR_MS, first * step // HOUR_MS),
        )
    counts = {bar: (int(requests), int(errors)) for bar, requests, errors in rows}
    bars = []
    for bar in range(first, last + 1):
        requests, errors = counts.get(bar, (0, 0))
        moments = {"begin": bar * step, "end": (bar + 1) * step}
        bars.append({**moments, "answered": requests - errors, "failed": errors})
    return {"bars": bars}


def read_week_before(
    db: sqlite3.Connection, window: Window, filters: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return how fast each model on each server was in the seven days before a window."""
    tests = ["hour >= :from_hour", "hour < :nearest_hour"]
    tests += [SUM_FILTERS[name] for name in filters]
    rows = db.execute(
        f"SELECT {ON_SERVER}, TOTAL(spoken_tokens), TOTAL(spoken_ms) FROM rollups "
        f"WHERE {' AND '.join(tests)} GROUP BY 1",
        {**window.values(), **filters, "from_hour": window.nearest_hour - 24 * 7},
    )
    return {key: token_rate(tokens, ms, 0) for key, tokens, ms in rows}


def read_leaders(
    db: sqlite3.Connection, window: Window, filters: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return how each model did on each server, and how fast it was there the week before."""
    before = read_week_before(db, window, filters)
    leaders = []
    for key, tally in read_tallies(db, window, ON_SERVER, filters).items():
        model, _, url = key.rpartition(" ")
        if not model:
            continue
        spoken_tokens, spoken_ms = read_sums(tally, "spoken_tokens", "spoken_ms").values()
        leaders.append(
            {
                "model": model,
                "upstream_url": url,
                **read_sums(tally, "requests", "errors", "prompt_tokens", "completion_tokens"),
                "tokens_per_second": token_rate(spoken_tokens, spoken_ms, 0),
                "ttft_p50_ms": percentile(tally[TTFTS], (), 50),
                "ttft_p95_ms": percentile(tally[TTFTS], (), 95),
                "before": {"tokens_per_second": before.get(key)},
            }
        )
    return leaders


def read_trend(
    db: sqlite3.Connection, first_hour: int, end_hour: int, filters: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return how fast the answers of each hour were, and how long their first tokens took."""
    tests = ["hour >= :first", "hour < :end", "model <> ''"]
    tests += [SUM_FILTERS[name] for name in filters]
    sums = ", ".join(
        f"TOTAL({name})" for name in ("requests", "spoken_tokens", "spoken_ms", *TTFT_COLUMNS)
    )
    rows = db.execute(
        f"SELECT hour, {sums} FROM rollups WHERE {' AND '.join(tests)} GROUP BY hour",
        {"first": first_hour, "end": end_hour, **filters},
    )
    found = {hour: numbers for hour, *numbers in rows}
    hours = []
    for hour in range(first_hour, end_hour):
        requests, tokens, ms, *ttfts = found.get(hour, (0, 0, 0))
        hours.append(
            {
                "begin": hour * HOUR_MS,
                "requests": int(requests),
                "tokens_per_second": token_rate(tokens, ms, 0),
                "ttft_p50_ms": percentile(ttfts, (), 50),
            }
        )
    return hours


def read_trends(log: RequestLog, db: sqlite3.Connection, parameters: Mapping[str, Any]) -> Any:
    """Answer /api/trends: models on servers, and figures by the hour.

    The hours are those of the window, a day at least, behind as many before them.
    """
    hours = parameters.get("hours", 24)
    filters = {name: parameters[name] for name in POINT_FILTERS if name in parameters}
    window = Window.of(hours * 3600, time.time())
    end_hour = window.end // HOUR_MS
    first_hour = end_hour - 2 * max(hours, 24)
    return {
        "leaders": read_leaders(db, window, filters),
        "hours": read_trend(db, first_hour, end_hour, filters),
    }


def read_days(log: RequestLog, db: sqlite3.Connection) -> dict[str, list[list[int]]]:
    """Return for each server requests, errors and ms of work in each of the last 24 hours."""
    last = int(time.time() // 3600)
    days: dict[str, list[list[int]]] = collections.defaultdict(lambda: [[0, 0, 0]] * 24)
    rows = db.execute(
        "SELECT upstream_url, hour, TOTAL(requests), TOTAL(errors), TOTAL(duration_ms) "
        "FROM rollups WHERE hour > ? AND hour <= ? GROUP BY 1, 2",
        (last - 24, last),
    )
    for url, hour, *sums in rows:
        days[url][hour - last + 23] = [int(number) for number in sums]
    return days


# What is said of a server's last hour.
LAST_HOUR = ("p50_ms", "requests", "errors")


def read_last_hour(log: RequestLog, db: sqlite3.Connection, url: str) -> dict[str, Any]:
    """Return how a server did in the last hour."""
    window = Window.of(3600, time.time())
    rows = db.execute(
        "SELECT failed, duration_ms FROM requests INDEXED BY by_upstream WHERE upstream_url = :url "
        "AND id >= :first_id AND timestamp >= :begin AND timestamp < :end AND failed NOTNULL",
        {"url": url, **window.values()},
    ).fetchall()
    durations = [duration for failed, duration in rows if not failed]
    figures = (percentile((), durations, 50), len(rows), sum(failed for failed, _ in rows))
    return dict(zip(LAST_HOUR, figures, strict=True))


# --- one request ---


def body_text(body: bytes) -> tuple[str | None, str]:
    """Return a kept body as text, and in which encoding; None when none is kept.

    b"Hi"  ->  ("Hi", "utf-8");  b"\\xff"  ->  ("/w==", "base64")
    """
    if not body:
        return None, "utf-8"
    try:
        return body.decode(), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(body).decode(), "base64"


def detail_document(row: Row, detail: Detail, phase: str = "done") -> dict[str, Any]:
    """Return everything about one request."""
    meta = json.loads(detail.meta)
    path = row.path.partition("?")[0]
    response_lines = meta.get("response_headers", [])
    fields = Fields([(name.lower(), name, value) for name, value in response_lines])
    response = detail.response
    if not meta.get("decoded"):
        # An older version kept it as it came.
        response = decode_content(response, read_coding(fields), LIMITS.decoded_answer)
    transcript = []
    if find_protocol(path).user_words:
        transcript = read_transcript(path, detail.request, response)
    request_body, request_encoding = body_text(detail.request)
    response_body, response_encoding = body_text(response)
    request_cut, response_cut = meta.get("cut", (False, False))
    document = {
        **row_document(row, NEVER_SHOWN),
        "phase": phase,
        "transcript": transcript,
        "trail": [Step(*step)._asdict() for step in meta.get("trail", ())],
        "changes": meta.get("changes", []),
        "response_text": None,
        "response_thinking": None,
        "request_headers": meta.get("request_headers", []),
        "request_body_cut": request_cut,
        "request_body": request_body,
        "request_body_encoding": request_encoding,
        "response_headers": response_lines,
        "response_body_cut": response_cut,
        "response_body": response_body,
        "response_body_encoding": response_encoding,
    }
    # The request of a conversation has answers of the assistant too, but earlier ones: the last of
    # all is what this answer says.
    answers = [message for message in transcript if message["role"] == "assistant"]
    if answers and response:
        document["response_text"] = answers[-1]["content"]
        document["response_thinking"] = answers[-1]["thinking"]
    return document


# How the document of a request is written: as JSON, or as JSON that may stand in a page.
Encoder = Callable[[Any], bytes]


def encode_for_page(document: Any) -> bytes:
    """Encode as JSON in which nothing can end the element that holds it: `<` is an escape."""
    return encode_json(document).replace(b"<", b"\\u003c")


def read_record(record: RequestRecord, encode: Encoder) -> bytes:
    """Return everything about a request that runs, or that waits to be written."""
    # The thread may let the raw bodies go at any moment, once the record has its row: so they are
    # taken first, and then the row is looked at.
    raw = copy.copy(record)
    if record.row is None:
        decode_answer(raw, LIMITS.decoded_answer)
        detail = make_detail(raw)
        phase = raw.phase if raw.finished_at is None else "done"
        return encode(detail_document(make_row(raw, detail), detail, phase))
    blobs = [blob.data if blob else None for blob in record.blobs]
    return encode(detail_document(record.row, unpack_detail(record.data, blobs)))


def read_request(
    log: RequestLog, db: sqlite3.Connection, row_id: int, encode: Encoder
) -> bytes | None:
    """Return everything about a request that is written, None when there is none of that id."""
    found = db.execute(f"SELECT {COLUMNS} FROM requests WHERE id = ?", (row_id,)).fetchone()
    if found is None:
        return None
    return encode(detail_document(Row._make(found), log.store.read_detail(db, row_id)))


async def find_request_by_id(log: RequestLog, row_id: int, encode: Encoder) -> bytes | None:
    """Return everything about a request, None when there is none of that id.

    One that runs, or waits to be written, is there whatever the database is like. It is encoded by
    the thread that has read it: what is long would stall every other request here, and documents
    would gather while one of them is encoded.
    """
    # In this order, in which records move on.
    for record in [*list(log.running.values()), *list(log.finished)]:
        if record.id == row_id:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(log.readers, read_record, record, encode)
    return await log.ask(read_request, row_id, encode)


async def find_request(log: RequestLog, path: str, encode: Encoder) -> bytes:
    """Return the request that a path names. Raises NotFound."""
    found = re.search(r"/([0-9]{1,18})$", path)
    encoded = None
    if found:
        encoded = await find_request_by_id(log, int(found[1]), encode)
    if encoded is None:
        raise NotFound("no such request; it may be older than MAX_LOG_AGE_DAYS")
    return encoded


# --- export ---------------------------------------------------------------------------


def chat_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of a transcript as fine-tuning takes it."""
    content: Any = message["content"]
    if message["images"]:
        content = [{"type": "text", "text": content}]
        for url in message["images"]:
            content.append({"type": "image_url", "image_url": {"url": url}})
    document = {"role": message["role"], "content": content}
    calls = []
    for call in message["tool_calls"]:
        function = {name: value for name, value in call.items() if name != "id"}
        calls.append({"id": call["id"], "type": "function", "function": function})
    if calls:
        document["tool_calls"] = calls
    if message["tool_call_id"]:
        document["tool_call_id"] = message["tool_call_id"]
    return document


def csv_line(values: Iterable[Any]) -> str:
    """Return a line of a table."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerow(values)
    return table.getvalue()


def table_line(row: Row) -> str:
    """Return a row as a line of a table."""
    document = {**row_document(row), "attempts": row.attempts}
    return csv_line(document[name] for name in TABLE_COLUMNS)


def json_line(row: Row, detail: Detail) -> str:
    """Return everything about a request as a line of JSON."""
    return encode_json(detail_document(row, detail)).decode() + "\n"


def chat_line(row: Row, detail: Detail) -> str:
    """Return an answered conversation as a line of JSON, as fine-tuning takes it; "" for none."""
    document = detail_document(row, detail)
    if not (document["response_text"] or document["response_thinking"]):
        return ""
    messages = [chat_message(message) for message in document["transcript"]]
    return encode_json({"messages": messages}).decode() + "\n"


def export_line(store: Store, db: sqlite3.Connection, row: Row, form: str) -> str:
    """Return what an export in this form has of a row: a line, or nothing."""
    if form == "csv":
        return table_line(row)
    if form == "openai":
        return chat_line(row, store.read_detail(db, row.id)) if row.failed == 0 else ""
    # One that runs still changes.
    return json_line(row, store.read_detail(db, row.id)) if row.failed is not None else ""


def export_page(
    store: Store, db: sqlite3.Connection, parameters: Mapping[str, Any]
) -> tuple[bytes, int]:
    """Return a page of the export, newest first, and the id before which the next one begins.

    That is 0 when there is no other page.
    """
    limits = store.limits
    filters = {**parameters, "limit": limits.export_page}
    if "since" in parameters:
        filters["window"] = Window.of(parameters["since"], time.time())
    form = parameters.get("format", "jsonl")
    head = ""
    if form == "csv" and "before" not in parameters:
        head = csv_line(TABLE_COLUMNS)
    rows = [Row._make(found) for found in db.execute(*select_rows(filters))]
    pieces: list[bytes] = []
    size = 0
    for row in rows:
        pieces.append(export_line(store, db, row, form).encode())
        size += len(pieces[-1])
        if size > limits.export_octets:
            break
    has_more = len(rows) == limits.export_page or len(pieces) < len(rows)
    return head.encode() + b"".join(pieces), row.id if has_more else 0


# --- metrics --------------------------------------------------------------------------

# The indices of the buckets that Prometheus gets: every fourth, four times as long as the one
# before.
METRIC_BUCKETS = range(0, len(BUCKET_ENDS), 4)
COUNTERS = {
    "requests": "Requests that ended",
    "errors": "Requests that failed",
    "prompt_tokens": "Tokens of prompts",
    "completion_tokens": "Tokens of answers",
    "cached_tokens": "Tokens of prompts that a server had in its cache",
}
HISTOGRAMS = {
    "duration": ("Time from a request to the end of its answer", DURATIONS),
    "ttft": ("Time to the first token of a stream", TTFTS),
}


def metric_head(name: str, kind: str, words: str) -> str:
    """Return the two lines that go before a metric."""
    return f"# HELP smolrouter_{name} {words}.\n# TYPE smolrouter_{name} {kind}"


def metric_labels(key: tuple[str, str, str]) -> str:
    """Return what a series is of, as labels.

    ('openai', 'a"b', 'http://box')  ->  'service="openai",model="a\\"b",upstream="http://box"'
    """
    labels = []
    for name, text in zip(("service", "model", "upstream"), key, strict=True):
        escaped = re.sub(r'(["\\])', r"\\\1", text).replace("\n", "\\n")
        labels.append(f'{name}="{escaped}"')
    return ",".join(labels)


def histogram_lines(name: str, labels: str, tally: Tally) -> Iterator[str]:
    """Yield the lines of a series of a histogram; `le` counts all that took no longer."""
    _, buckets = HISTOGRAMS[name]
    counts = list(itertools.accumulate(tally[buckets]))
    metric = f"smolrouter_{name}_seconds"
    for index in METRIC_BUCKETS:
        seconds = BUCKET_ENDS[index] / 1000
        yield f'{metric}_bucket{{{labels},le="{seconds:g}"}} {counts[index]}'
    yield f'{metric}_bucket{{{labels},le="+Inf"}} {counts[-1]}'
    yield f"{metric}_sum{{{labels}}} {tally[SUMS.index(f'{name}_ms')] / 1000:.6f}"
    yield f"{metric}_count{{{labels}}} {counts[-1]}"


def metric_lines(
    series: Mapping[tuple[str, str, str], Tally], gauges: Mapping[str, tuple[str, float]]
) -> Iterator[str]:
    """Yield the lines of /metrics: gauges, counters and histograms."""
    labelled = [(metric_labels(key), tally) for key, tally in series.items()]
    for name, (words, value) in gauges.items():
        yield metric_head(name, "gauge", words)
        yield f"smolrouter_{name} {value}"
    for name, words in COUNTERS.items():
        yield metric_head(f"{name}_total", "counter", words)
        for labels, tally in labelled:
            yield f"smolrouter_{name}_total{{{labels}}} {tally[SUMS.index(name)]}"
    for name, (words, _) in HISTOGRAMS.items():
        yield metric_head(f"{name}_seconds", "histogram", words)
        for labels, tally in labelled:
            yield from histogram_lines(name, labels, tally)


# --- endpoints ------------------------------------------------------------------------

QUESTIONS = {
    "/api/logs": (read_logs, LOG_PARAMETERS),
    "/api/stats": (read_stats, {"hours": HOURS}),
    "/api/performance": (read_performance, POINT_PARAMETERS),
    "/api/trends": (read_trends, TREND_PARAMETERS),
    "/api/histogram": (read_histogram, {"span": choice_of(*SPANS)}),
}


def find_url(table: RoutingTable, text: str) -> str:
    """Return the URL of the server that a text means.

    It may be the server's name, its URL, or the URL without `http://`, as the page shows it.
    """
    for server in table.all_servers():
        if text in (server.name, server.url.without_scheme):
            return str(server.url)
    with contextlib.suppress(ValueError):  # it may have been in an earlier table
        return str(parse_upstream_url(text))
    return text


async def serve_question(context: Context, request: Request) -> None:
    """Answer one of QUESTIONS."""
    question, known = QUESTIONS[request.path]
    parameters = read_parameters(request.query, known)
    if "upstream" in parameters:
        parameters["upstream"] = find_url(context.table, parameters["upstream"])
    document = await context.log.ask(question, parameters)
    # /api/logs answers a list.
    if isinstance(document, dict):
        document["routes_error"] = context.routes_error
    request.writer.send_json(document)


async def serve_request_details(context: Context, request: Request) -> None:
    """Answer /api/request/{id}."""
    request.writer.send_json(await find_request(context.log, request.path, encode_json))


async def serve_inflight(context: Context, request: Request) -> None:
    """Answer /api/inflight: the requests that run now."""
    now = time.monotonic()
    records = context.log.running.values()
    request.writer.send_json([lane_document(record, now) for record in records])


async def serve_cancel(context: Context, request: Request) -> None:
    """Answer /api/inflight/{id}/cancel: stop that request."""
    row_id = request.path.split("/")[3]
    for record in context.log.running.values():
        if str(record.id) == row_id and record.stop:
            record.stop(Cancelled("cancelled"))
            request.writer.send_json({"cancelled": True})
            return
    raise NotFound("no such request is running")


def read_state(content: bytes) -> str:
    """Return how a server is to be: `{"state": "drain"}`  ->  `drain`. Raises MalformedContent."""
    document = parse_json(content)[1]
    state = document.get("state") if isinstance(document, dict) else None
    if state not in (ON, DRAIN, OFF):
        seen = content[:80].decode("utf-8", "replace")
        allowed = '{"state": "on"}, {"state": "drain"} and {"state": "off"}'
        raise MalformedContent(f"allowed are {allowed}, not {seen!r}")
    return state


async def serve_upstream_state(context: Context, request: Request) -> None:
    """Answer POST /api/upstreams/{name}: drain a server, switch it off, or open it again."""
    name = urllib.parse.unquote(request.path.split("/", 3)[3])
    server = find_server(context.table, name)
    state = read_state(request.content)
    context.slots.set_state(server, state)
    context.log.print_line(f"server {server.name}: {state}, says {request.source_host}")
    if state == OFF:
        for record in list(context.log.running.values()):
            if record.stop and record.upstream_url == str(server.url):
                record.stop(ServerClosed(f"{server.name} was switched off by its owner"))
    request.writer.send_json({"name": server.name, "state": state})


def server_state(instances: Sequence[Health], now: float) -> str:
    """Return how a server is, by what is known of its instances: up, cooling, down or unknown."""
    if not instances:
        return "unknown"
    failing = [health for health in instances if health.failures]
    if not all(health.reached for health in failing):
        return "down"
    if any(health.cool_until > now for health in failing):
        return "cooling"
    return "up"


def last_error(instances: Sequence[Health]) -> str | None:
    """Return the error of an instance that fails now, the newest if several do, None if none."""
    return next((health.error for health in reversed(instances) if health.error), None)


def hours_document(
    sums: Sequence[Sequence[int]], instances: Sequence[Health], now: float
) -> list[dict[str, Any]]:
    """Return the last 24 hours of a server, the oldest first.

    `busy` is how many requests ran on average; `down` says that it could not be reached once.
    """
    last = int(now // 3600)
    hours = []
    for hour, (requests, errors, worked_ms) in zip(range(last - 23, last + 1), sums, strict=True):
        is_down = any(hour in health.unreached_hours for health in instances)
        busy = round(worked_ms / HOUR_MS, 3)
        hours.append({"requests": requests, "errors": errors, "busy": busy, "down": is_down})
    return hours


async def serve_upstreams(context: Context, request: Request) -> None:
    """Answer /api/upstreams: each server, how it is, and how the last hour was."""
    servers = context.table.all_servers()
    fetching = [context.model_lists.get(server, None) for server in servers]
    model_lists = await asyncio.gather(*fetching)
    days: Mapping[str, list[list[int]]] = {}
    with contextlib.suppress(LogUnavailable):
        days = await context.log.ask(read_days)
    documents = []
    for server, models in zip(servers, model_lists, strict=True):
        instances = context.upstreams.health_of_server(server)
        url = str(server.url)
        health = server_state(instances, time.monotonic())
        # How the servers are is known without the log, and shown without it.
        last_hour = dict.fromkeys(LAST_HOUR)
        with contextlib.suppress(LogUnavailable):
            last_hour = await context.log.ask(read_last_hour, url)
        document = {
            "name": server.name,
            "url": url,
            "api": context.model_lists.catalogue.with_api(server).api,
            "state": context.slots.closed.get(server.url, health),
            "health": health,
            "last_error": last_error(instances),
            # Those since the last good answer of each instance.
            "failures": sum(health.failures for health in instances),
            "inflight": sum(health.running for health in instances),
            "slots": context.slots.of_server.get(server.url),
            "running": sum(health.in_slots for health in instances),
            "queued": context.slots.queued_for(server),
            "models": [model["id"] for model in models or ()],
            "models_age_s": context.model_lists.age(server),
            "hours": hours_document(days.get(url, [[0, 0, 0]] * 24), instances, time.time()),
        }
        documents.append({**document, **last_hour})
    request.writer.send_json(documents)


def table_document(table: RoutingTable) -> dict[str, Any]:
    """Return the routing table as /api/routes shows it."""
    servers = [
        {
            "name": server.name,
            "url": str(server.url),
            "api": server.api,
            "slots": server.slots,
        }
        for server in table.servers.values()
    ]
    aliases = [
        {
            "name": alias.alias,
            "strategy": alias.strategy,
            "priority": alias.priority or NORMAL,
            "instances": [str(instance) for instance in alias.instances],
        }
        for alias in table.aliases.values()
    ]
    routes = [
        {"rule": rule.name, "match": rule.match_text, "route": str(rule.target)}
        for rule in table.rules
    ]
    model_map = [{"model": pattern_text(key), "to": target} for key, target in table.model_map]
    return {
        "source": table.source,
        "default": str(table.default.url) if table.default else None,
        "servers": servers,
        "aliases": aliases,
        "routes": routes,
        "model_map": model_map,
    }


def decision_document(decision: Decision, source_host: str) -> dict[str, Any]:
    """Return a decision as /api/routes shows it: where a request would go, and why."""
    instances = [
        {
            "server": instance.server.name,
            "url": str(instance.server.url),
            "model": instance.model,
        }
        for instance in decision.instances
    ]
    return {
        "model": decision.requested_model,
        "source_host": source_host,
        "mapped_model": decision.mapped_model,
        "route": decision.route,
        "strategy": decision.strategy,
        "priority": decision.priority,
        "instances": instances,
        "trail": [step._asdict() for step in decision.trail],
    }


async def serve_routes(context: Context, request: Request) -> None:
    """Answer /api/routes: the table, and with a model what it makes of that model."""
    parameters = read_parameters(request.query, ROUTE_PARAMETERS)
    document = {**table_document(context.table), "error": context.routes_error}
    if "model" in parameters:
        source_host = parameters.get("source_host", request.source_host)
        decision = await context.decide(parameters["model"], source_host)
        document["decision"] = decision_document(decision, source_host)
    request.writer.send_json(document)


async def serve_metrics(context: Context, request: Request) -> None:
    """Answer /metrics."""
    log = context.log
    lines = metric_lines(
        dict(log.series),
        {
            "inflight_requests": ("Requests that run now", len(log.running)),
            "queued_requests": ("Requests that wait for a slot", len(context.slots.waiting)),
            "log_backlog_rows": ("Rows that wait for the database", log.backlog),
            "log_lost_rows": ("Rows that the database never took", log.lost),
            "log_up": ("Whether the log can be written", int(not log.error)),
        },
    )
    kind = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
    request.writer.send_response(200, kind, ("\n".join(lines) + "\n").encode())


async def send_piece(request: Request, data: bytes) -> None:
    """Send a piece of a long answer; wait while its reader is slow."""
    request.writer.write_content(data)
    await request.connection.drain()


def begin_stream(request: Request, kind: str, *fields: tuple[str, str]) -> None:
    """Begin an answer of unknown length."""
    fields = (("Content-Type", kind), *STREAM_FIELDS, *fields)
    request.writer.write_head(200, encode_field_lines(fields), None)


def read_news(
    log: RequestLog,
    ended: collections.deque[Row],
    has_token: dict[int, bool],
) -> dict[str, Any]:
    """Return what has happened to requests since this was asked last.

    `has_token` has the ids of the requests that ran then, and whether they had their first token;
    it is brought up to date. `ended` has the rows of those that have ended since.
    """
    now = time.monotonic()
    started = []
    first_tokens = []
    had_token = dict(has_token)
    has_token.clear()
    for row_id, record in log.running.items():
        has_token[row_id] = record.first_token_at is not None
        if row_id not in had_token:
            started.append(running_document(record, now))
        if has_token[row_id] and not had_token.get(row_id):
            first_tokens.append(row_id)
    return {
        "started": started[: LIMITS.news_rows],
        "first_token": first_tokens[: LIMITS.news_rows],
        "finished": [row_document(ended.popleft()) for _ in range(len(ended))],
    }


async def serve_events(context: Context, request: Request) -> None:
    """Answer /api/events: which requests began, had a token and ended, four times a second."""
    log = context.log
    ended: collections.deque[Row] = collections.deque(maxlen=LIMITS.news_rows)
    has_token: dict[int, bool] = {}
    quiet_for = 0.0
    log.row_queues.append(ended)
    try:
        begin_stream(request, "text/event-stream")
        request.connection.cancel_on_disconnect()
        await send_piece(request, b": hello\n\n")
        while not (context.draining or request.writer.omits_content):
            news = read_news(log, ended, has_token)
            quiet_for += LIMITS.news_interval
            if any(news.values()):
                await send_piece(request, b"event: requests\ndata: %b\n\n" % encode_json(news))
                quiet_for = 0.0
            elif quiet_for > LIMITS.news_keep_alive:
                await send_piece(request, b": quiet\n\n")
                quiet_for = 0.0
            await asyncio.sleep(LIMITS.news_interval)
    finally:
        log.row_queues.remove(ended)
    request.writer.finish()


async def read_export(context: Context, parameters: Mapping[str, Any]) -> tuple[bytes, int]:
    """Return a page of the export, and where the next one begins; 0 at the end."""

    def read_rows(log: RequestLog, db: sqlite3.Connection) -> tuple[bytes, int]:
        return export_page(log.store, db, parameters)

    return await context.log.ask(read_rows)


async def read_more(
    context: Context, request: Request, parameters: Mapping[str, Any]
) -> tuple[bytes, int]:
    """Return a further page of an export, as soon as there is room for it."""
    batch = request.connection.batch
    while True:
        if not batch.is_full:
            page, next_before = await read_export(context, parameters)
            # Other answers may have filled the room meanwhile. Then this page is read again later:
            # kept until then, it would take memory that does not count.
            with contextlib.suppress(Overloaded):
                batch.check_room(page)
                return page, next_before
            del page
        await asyncio.sleep(context.limits.export_retry)


async def serve_export(context: Context, request: Request) -> None:
    """Answer /api/export: all of it, as slowly as its reader reads."""
    parameters = read_parameters(request.query, EXPORT_PARAMETERS)
    media_type = "application/x-ndjson"
    file_name = "smolrouter.jsonl"
    if parameters.get("format") == "csv":
        media_type = "text/csv; charset=utf-8"
        file_name = "smolrouter.csv"
    # The first page is read before the answer begins: an error can still be its status.
    page, parameters["before"] = await read_export(context, parameters)
    request.connection.batch.check_room(page)
    disposition = f"attachment; filename={file_name}"
    begin_stream(request, media_type, ("Content-Disposition", disposition))
    while True:
        request.writer.write_content(page)
        # The connection has it now, and it need not be in memory twice.
        page = b""
        await request.connection.drain()
        if not parameters["before"]:
            break
        page, parameters["before"] = await read_more(context, request, parameters)
    request.writer.finish()


# --- models ---------------------------------------------------------------------------
# The clients of every dialect ask which models there are, and each dialect lists them in its own
# form.


def send_refusal(request: Request, error: ListRefused) -> None:
    """Answer with the refusal of the only server, which is the client's to read.

    It goes as it is where the server speaks the client's dialect; elsewhere `error` is raised, and
    becomes an answer in that dialect.
    """
    if request.dialect.encode_openai is not None:
        raise error
    refusal = error.refusal
    request.writer.send_response(refusal.status, refusal.fields, refusal.content)


async def serve_models(context: Context, request: Request) -> None:
    """Answer the list of models, in the client's dialect."""
    try:
        models = await context.list_models(request)
    except ListRefused as error:
        send_refusal(request, error)
        return
    request.writer.send_json(request.dialect.encode_models(models, rfc3339(time.time())))


async def serve_model(context: Context, request: Request) -> None:
    """Answer GET /v1/models/{id}."""
    name = urllib.parse.unquote(request.path.removeprefix("/v1/models/"))
    check_models(request.token, [name], context.table)
    try:
        listed = {model["id"]: model for model in await context.list_models(request)}
    except ListRefused as error:
        send_refusal(request, error)
        return
    decision = await context.decide(name, request.source_host)
    # A name that a rule, an alias or the model map knows is as good as a listed one.
    unclaimed = decision.route in (BY_DEFAULT, UNCLAIMED)
    nobody_knows_it = unclaimed and decision.mapped_model == name
    found = find_listed(name, listed)
    if found is None and decision.found_by == BY_LIST:
        # It is listed in another case.
        found = find_listed(decision.instances[0].model, listed)
    if found is None and nobody_knows_it:
        words = unknown_model(name, list(listed))
        raise NotFound(f"{words}; GET /v1/models lists them all")
    request.writer.send_json(listed[found] if found else model_entry(name))


async def serve_model_details(context: Context, request: Request) -> None:
    """Answer what a model is like: from its server when that speaks the dialect, else in short."""
    parsed = require_model(request.dialect.read(request.path, request.query, request.content))
    check_models(request.token, requested_models(parsed), context.table)
    decision = await context.decide(parsed.model, request.source_host, request.dialect)
    service = request.dialect.service
    if any(instance.server.api == service for instance in decision.instances):
        await relay_native(context, request)
        return
    names = {parsed.model, decision.mapped_model}
    names.update(instance.model for instance in decision.instances)
    listed = [model["id"] for model in await context.list_models(request)]
    if not any(find_listed(name, listed) for name in names):
        raise NotFound(unknown_model(parsed.model, listed))
    details = request.dialect.encode_details(parsed.model, rfc3339(time.time()))
    request.writer.send_json(details)


async def serve_running_models(context: Context, request: Request) -> None:
    """Answer which models are in use now."""
    running = [record.requested_model for record in context.log.running.values()]
    names = list(dict.fromkeys(name for name in running if name))
    names = [name for name in names if may_use(request.token, name, context.table)]
    request.writer.send_json(request.dialect.encode_running(names, time.time()))


async def serve_version(context: Context, request: Request) -> None:
    """Answer which version of its API the dialect speaks."""
    request.writer.send_json({"version": request.dialect.version})


async def serve_greeting(context: Context, request: Request) -> None:
    """Answer at the root what the dialect's clients look for to see that somebody is there."""
    fields = [("Content-Type", "text/plain; charset=utf-8"), ("Vary", "Accept")]
    request.writer.send_response(200, fields, request.dialect.greeting.encode())


# --- the page and its session ------------------------------------------------------------

# The element of the page that takes the data of one request, as it stands in the file: empty.
EMPTY_DATA = b'<script type="application/json" id="request-data"></script>'


@functools.lru_cache(maxsize=2)
def page_fields(page: str) -> list[tuple[str, str]]:
    """Return the fields of the page; its CSP allows its own style and script, by hash."""

    def hash_of(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
        f"style-src 'sha256-{hash_of('style')}'; script-src 'sha256-{hash_of('script')}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy)]


def read_page(context: Context) -> str:
    """Return the page: the router's own copy, or the file that `--dashboard` names."""
    file = context.dashboard_file
    if not file:
        return DASHBOARD_HTML
    try:
        return pathlib.Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise NotFound(f"--dashboard {file}: {describe(error)}") from None


def send_page(
    context: Context,
    request: Request,
    status: int = 200,
    fields: Sequence[tuple[str, str]] = (),
    data: bytes = b"",
) -> None:
    """Send the page, with `data` in it; its script asks /api/session whether to sign in."""
    page = read_page(context)
    # The policy allows the script and the style as they are in the file; data is neither.
    all_fields = [*page_fields(page), *fields]
    content = page.encode()
    if data:
        begin, end = EMPTY_DATA.split(b"><")
        content = content.replace(EMPTY_DATA, b"%b>%b<%b" % (begin, data, end), 1)
    request.writer.send_response(status, all_fields, content)


async def serve_page(context: Context, request: Request) -> None:
    """Answer the page at any of its paths; /request/{id} carries its request's data."""
    status = 200
    data = b""
    if request.path.startswith("/request/"):
        try:
            data = await find_request(context.log, request.path, encode_for_page)
        except RouterError as error:
            status = error.status
    send_page(context, request, status, data=data)


async def serve_session(context: Context, request: Request) -> None:
    """Answer /api/session: whether the Web UI wants a token, and has a valid one."""
    fields = request.head.fields
    policy = context.settings.webui_security
    valid = False
    with contextlib.suppress(RouterError):
        tokens = find_tokens(fields, True)
        check_webui(context.check_tokens(tokens, request.source_host))
        valid = True
    session = {
        "version": __version__,
        "webui_security": policy,
        "authenticated": valid,
        "needs_token": needs_token(policy, fields),
    }
    request.writer.send_json(session)


def read_signin(content: bytes, limits: Limits) -> str:
    """Return the token of a sign-in: `{"token": "eyJ..."}`  ->  `eyJ...`."""
    document = None
    # Anybody may send it, so that a long one is not even parsed.
    if len(content) <= 2 * limits.token:
        document = parse_json(content)[1]
    token = document.get("token") if isinstance(document, dict) else None
    if not isinstance(token, str):
        raise MalformedContent('the content is not {"token": "..."}')
    return token


def is_https(context: Context, request: Request) -> bool:
    """Tell whether the browser came by https: to us, or a trusted proxy or it itself says so."""
    fields = request.head.fields
    if request.connection.is_tls:
        return True
    if (fields.get("origin") or "").startswith("https:"):
        return True
    peer = request.connection.transport.get_extra_info("peername") or [""]
    peer_host = str(peer[0]).removeprefix("::ffff:")
    if not is_trusted(peer_host, context.settings.trusted_proxies):
        return False
    return fields.elements("x-forwarded-proto")[-1:] == ["https"]


async def serve_signin(context: Context, request: Request) -> None:
    """Answer /api/signin and /api/signout: keep a valid token in a cookie, or delete the cookie."""
    token = ""
    if request.path == "/api/signin":
        token = read_signin(request.content, context.limits)
        check_webui(context.check_tokens([token], request.source_host))
    cookie = encode_cookie(token, time.time(), is_https(context, request))
    request.writer.send_response(204, [cookie], b"")


async def serve_healthz(context: Context, request: Request) -> None:
    """Answer /healthz: 503 while draining."""
    status = 200
    word = "ok"
    if context.draining:
        status = 503
        word = "draining"
    request.writer.send_json({"status": word, "log": context.log.state()}, status)


# ======================================================================================
# 16  Application
# ======================================================================================
# Which path means what: one table, ENDPOINTS. It dispatches and it guards, on the same
# normalised path, so that no other spelling of a path gets round its guard. What a
# handler raises becomes an answer here, and nowhere else. To add an endpoint: a handler
# `serve_...(context, request)` in section 14 or 15, and a line in ENDPOINTS.


class Endpoint(NamedTuple):
    """Which requests a handler serves.

    `methods` and `paths` are words with blanks between them. A path is a pattern: `*` stands for
    one segment, `**` for one or more. `guard` names the policy that decides on the requests: API,
    WEBUI, SIGNIN, or "" (open to all).
    """

    methods: str
    paths: str
    guard: str
    serve: Callable[[Context, Request], Awaitable[None]]
    dialect: Dialect = OPENAI
    # Whether the content is read before the handler is called; otherwise the handler reads it.
    reads_content: bool = True
    # Whether its content coding is taken off.
    decodes_content: bool = True
    # What the Accept of its requests names; with others the next endpoint of the path serves them.
    accept: str = ""
    # What their Upgrade names, likewise. The path does not allow the method otherwise.
    upgrade: str = ""

    def matches(self, path: str) -> bool:
        """Tell whether the path is one of this endpoint's patterns."""
        pattern = re.escape(self.paths).replace(r"\*\*", ".+").replace(r"\*", "[^/]+")
        return re.fullmatch(pattern.replace(r"\ ", "|"), path) is not None


# The first two are the names of the settings that hold the policy.
API = "api_security"
WEBUI = "webui_security"
# Nobody needs a token to sign in. But a browser's page that may not use the Web UI may not do this
# either; see `check_browser_head`.
SIGNIN = "signin"

MODEL_ENDPOINTS = (
    *(path for path in PROTOCOLS if path.startswith("/v1/")),
    "/v1/rerank",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
)
ENDPOINTS = (
    Endpoint("GET HEAD", "/v1/models", API, serve_models),
    Endpoint("GET HEAD", "/v1/models/**", API, serve_model),
    Endpoint("POST", " ".join(MODEL_ENDPOINTS), API, relay_post),
    # Nobody needs a token to be told how to go on.
    Endpoint("GET", "/v1/responses", "", refuse_upgrade, upgrade="websocket"),
    Endpoint("POST", "/v1/**", API, relay_post),
    Endpoint("GET HEAD PUT PATCH DELETE", "/v1/**", API, relay_model, OPENAI_OPAQUE),
    Endpoint("POST", "/api/chat /api/generate", API, relay_model, OLLAMA),
    Endpoint("POST", "/api/embed", API, relay_model, OLLAMA_EMBED),
    Endpoint("POST", "/api/embeddings", API, relay_model, OLLAMA_EMBEDDING),
    Endpoint("GET HEAD", "/api/tags", API, serve_models, OLLAMA),
    Endpoint("GET HEAD", "/api/v0/models", API, serve_models, LM_STUDIO),
    Endpoint("GET HEAD", "/api/v1/models", API, serve_models, LM_STUDIO_KEYS),
    Endpoint("POST", "/api/show", API, serve_model_details, OLLAMA),
    Endpoint("GET HEAD", "/api/ps", API, serve_running_models, OLLAMA),
    Endpoint("GET HEAD", "/api/version", API, serve_version, OLLAMA),
    Endpoint("POST", "/api/push", API, relay_native, OLLAMA),
    Endpoint("POST", "/api/pull", API, relay_pull, OLLAMA),
    Endpoint("POST", "/api/create /api/copy", API, relay_changes, OLLAMA),
    Endpoint("DELETE", "/api/delete", API, relay_changes, OLLAMA),
    Endpoint("GET HEAD", "/api/status", API, relay_optional, OLLAMA),
    Endpoint("POST", "/api/me", API, relay_optional, OLLAMA),
    Endpoint("GET HEAD POST DELETE", "/api/experimental/**", API, relay_optional, OLLAMA),
    Endpoint("POST HEAD", "/api/blobs/*", API, relay_upload, OLLAMA, reads_content=False),
    Endpoint(
        "POST",
        "/completion /infill /tokenize /detokenize /apply-template",
        API,
        relay_model,
        LLAMA_CPP,
    ),
    Endpoint("GET HEAD POST", "/props /slots /slots/*", API, relay_model, LLAMA_CPP),
    Endpoint(
        "GET HEAD POST PUT PATCH DELETE",
        "/upstream/* /upstream/*/**",
        API,
        relay_as_it_is,
        OPENAI_OPAQUE,
        decodes_content=False,
    ),
    Endpoint("GET HEAD", "/healthz", "", serve_healthz),
    Endpoint("POST", "/api/signin /api/signout", SIGNIN, serve_signin),
    Endpoint("GET HEAD", "/api/session", SIGNIN, serve_session),
    Endpoint("GET HEAD", " ".join(QUESTIONS), WEBUI, serve_question),
    Endpoint("GET HEAD", "/api/request/*", WEBUI, serve_request_details),
    Endpoint("GET HEAD", "/api/inflight", WEBUI, serve_inflight),
    Endpoint("POST", "/api/inflight/*/cancel", WEBUI, serve_cancel),
    Endpoint("GET HEAD", "/api/upstreams", WEBUI, serve_upstreams),
    Endpoint("POST", "/api/upstreams/**", WEBUI, serve_upstream_state),
    Endpoint("GET HEAD", "/api/routes", WEBUI, serve_routes),
    Endpoint("GET HEAD", "/api/events", WEBUI, serve_events),
    Endpoint("GET HEAD", "/api/export", WEBUI, serve_export),
    Endpoint("GET HEAD", "/metrics", WEBUI, serve_metrics),
    # Browsers get the page. Programs ask here whether somebody is there.
    Endpoint("GET", "/", WEBUI, serve_page, accept="text/html"),
    Endpoint("GET HEAD", "/", "", serve_greeting, OLLAMA),
    Endpoint("GET HEAD", "/performance /request/*", WEBUI, serve_page),
)


# Clients whose base URL lacks the /v1, or has it twice, cannot be changed, and others look for a
# server's health where llama.cpp has it. Each pattern stands for other names of a path, beside
# what is meant by them. Whatever lies under a path is renamed with it.
UNVERSIONED = "|".join(path.removeprefix("/v1/") for path in (*MODEL_ENDPOINTS, "/v1/models"))
OTHER_NAMES = (
    (re.compile(r"(?:/v1)+(/v1/.*)"), r"\1"),
    (re.compile(rf"(/(?:{UNVERSIONED})(?:/.*)?)"), r"/v1\1"),
    (re.compile("/health"), "/healthz"),
)


def usual_name(path: str) -> str:
    """Return the name by which ENDPOINTS knows a path.

    `/chat/completions`, `/v1/v1/chat/completions`  ->  `/v1/chat/completions`
    """
    for pattern, name in OTHER_NAMES:
        match = pattern.fullmatch(path)
        if match:
            return match.expand(name)
    return path


class Found(NamedTuple):
    """What ENDPOINTS says of a method and a path."""

    # The usual name of the path.
    path: str
    # All endpoints of the path.
    of_path: tuple[Endpoint, ...]
    # Those of the method.
    of_method: tuple[Endpoint, ...]

    def choose_endpoint(self, fields: Fields) -> Endpoint | None:
        """Return who serves a request with these fields; None for nobody."""
        for endpoint in self.of_method:
            accepted = endpoint.accept in (fields.get("accept") or "").lower()
            if accepted and endpoint.upgrade in (fields.get("upgrade") or "").lower():
                return endpoint
        return None


def look_up_endpoint(method: str, path: str) -> Found:
    """Return who serves a request.

    ("POST", "/health")  ->  ("/healthz", (the endpoint of GET and HEAD,), ())
    """
    path = usual_name(path)
    # A path that stands in the table word for word comes before the patterns that match it, too.
    of_path = tuple(item for item in ENDPOINTS if path in item.paths.split())
    if not of_path:
        of_path = tuple(item for item in ENDPOINTS if item.matches(path))
    of_method = tuple(item for item in of_path if method in item.methods.split())
    return Found(path, of_path, of_method)


remembered_endpoint = functools.lru_cache(maxsize=256)(look_up_endpoint)


def find_endpoint(method: str, path: str) -> Found:
    """Do what `look_up_endpoint` does, from memory where that can be; long paths are not kept."""
    if len(method) + len(path) > LIMITS.shown_name:
        return look_up_endpoint(method, path)
    return remembered_endpoint(method, path)


def allowed_methods(endpoints: Sequence[Endpoint]) -> str:
    """Return the methods of a path, as Allow lists them: "GET, HEAD, OPTIONS"."""
    methods = []
    for endpoint in endpoints:
        methods += endpoint.methods.split() if not endpoint.upgrade else []
    return ", ".join(dict.fromkeys([*methods, "OPTIONS"]))


def missing_endpoint(request: Request, of_path: Sequence[Endpoint]) -> RouterError:
    """Return the error for a path, or a method of a path, that nobody serves."""
    path = request.path[:200]
    if of_path:
        allowed = allowed_methods(of_path)
        what = f"{request.head.method[:80]} is not allowed for {path}; {allowed} are"
        return MethodNotAllowed(what, ("Allow", allowed))
    return NotFound(f"unknown path {path}")


class Application:
    """Lets requests in, finds who serves them, and renders what goes wrong."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = context.settings
        self.browser_rules = BrowserRules(
            self.settings.allowed_hosts, self.settings.allowed_origins, socket.gethostname()
        )
        # Octets of content that all running requests hold together.
        self.content_size = 0

    async def serve(self, request: Request) -> None:
        """Answer one request; every RouterError becomes an answer here."""
        found = find_endpoint(request.head.method, request.path)
        request.path = found.path
        of_path = found.of_path
        endpoint = found.choose_endpoint(request.head.fields)
        if of_path:
            request.dialect = (endpoint or of_path[0]).dialect
        elif request.path.startswith("/api/"):
            request.dialect = OLLAMA
        reason = ""
        try:
            await self.dispatch(request, endpoint, of_path)
        except ClientClosed:
            # There is nobody to answer.
            raise
        except RouterError as error:
            hidden = hide_in_text(str(error), self.context.secrets_of(request))
            reason = hidden[: self.context.limits.error_text]
            if error.status in (401, 429) and endpoint and endpoint.serve is serve_page:
                # A browser gets the page all the same: it shows the sign-in.
                send_page(self.context, request, error.status, error.fields)
            else:
                send_error(request.writer, error, request.dialect, request.path)
        except Exception:  # a fault of ours must cost one request alone
            if request.connection.failure:
                # It is no fault of ours: the client has gone while it was being answered.
                raise
            self.context.log.print_line(traceback.format_exc())
            internal = RouterError("internal error; see the log")
            send_error(request.writer, internal, request.dialect, request.path)
        finally:
            self.content_size -= request.counted_octets
        # An exchange has printed its own line; the page's polling is not worth one.
        of_api = endpoint is not None and endpoint.guard == API
        if not request.recorded and (reason or of_api):
            status = str(request.writer.status)
            self.context.log.print_request(
                request.source_host, request.head.method, request.path, status, reason
            )

    async def dispatch(
        self, request: Request, endpoint: Endpoint | None, of_path: Sequence[Endpoint]
    ) -> None:
        """Check what a request may do and let its endpoint serve it. Raises RouterError."""
        settings = self.settings
        # What does not exist is guarded, too, so that nobody without a token can try what does: an
        # unknown path as the API is, an unknown method of a path as that path is.
        guard = API
        if of_path:
            guard = (endpoint or of_path[0]).guard
        webui = guard in (WEBUI, SIGNIN)
        if webui:
            request.writer.extra_fields += GUARDED_FIELDS
        request.writer.extra_fields += self.check_head(request.head, webui)
        if request.head.method == "OPTIONS" and (of_path or request.path == "*"):
            self.answer_options(request, of_path)
            return
        # At SIGNIN and "" nobody needs a token, and none is looked at here.
        if guard in (API, WEBUI):
            request.token = self.check_token(request, guard)
        if endpoint is None:
            raise missing_endpoint(request, of_path)
        if webui and not settings.enable_logging and endpoint.serve is not serve_metrics:
            raise NotFound("there is no Web UI: ENABLE_LOGGING is false, nothing is kept")
        if endpoint.reads_content:
            await request.read_content(settings.max_request_size, self.count_content)
            if endpoint.decodes_content and "content-encoding" in request.head.fields.first:
                coded_size = len(request.content)
                await decode_request(self.context, request)
                self.count_content(request, len(request.content) - coded_size)
        await endpoint.serve(self.context, request)

    def check_head(self, head: RequestHead, webui: bool) -> FieldPairs:
        """Return the fields that the answer must have for a browser.

        Raises LoopDetected for a request that this router has sent to itself, and what
        `check_browser_head` raises for one of a page from elsewhere.
        """
        if self.context.via in ", ".join(head.fields.get_all("via")):
            raise LoopDetected("this request has been through this router before")
        return check_browser_head(head, webui, self.browser_rules)

    def check_token(self, request: Request, guard: str) -> Token | None:
        """Return the valid token of a request, None for one that needs none and has none.

        Raises what refuses it: Unauthorized, Forbidden or TooManyRequests.
        """
        context = self.context
        fields = request.head.fields
        is_needed = needs_token(getattr(self.settings, guard), fields)
        if not is_needed and self.settings.jwt_secret is None:
            return None
        # The cookie counts for the model API too, but only when the router's own page asks.
        cookie_counts = guard == WEBUI or is_own_page(fields, request.host)
        tokens = find_tokens(fields, cookie_counts)
        if is_needed:
            token = context.check_tokens(tokens, request.source_host)
        else:
            token = context.token_guard.find(tokens, context.table.revoked, time.time())
        if token is None:
            return None
        if guard == WEBUI:
            check_webui(token)
        context.token_guard.count_request(token, time.monotonic())
        return token

    def count_content(self, request: Request, size: int) -> None:
        """Count content that was read.

        Raises Overloaded for more than 1 MiB of it in one request, while all hold too much.
        """
        request.counted_octets += size
        self.content_size += size
        most = max(self.context.limits.held_content, self.settings.max_request_size)
        # Short requests are served all the same: they are not what fills the memory.
        if self.content_size > most and request.counted_octets > MiB:
            raise Overloaded(
                f"running requests hold {self.content_size} bytes; try again later",
                ("Retry-After", "5"),
            )

    def answer_options(self, request: Request, of_path: Sequence[Endpoint]) -> None:
        """Answer what a path allows, and a browser's preflight."""
        allowed = allowed_methods(of_path)
        fields = [("Allow", allowed)]
        if request.head.fields.get("origin") is not None:
            wanted = request.head.fields.get("access-control-request-headers") or "*"
            fields += [
                ("Access-Control-Allow-Methods", allowed),
                ("Access-Control-Allow-Headers", wanted),
                ("Access-Control-Max-Age", "600"),
            ]
        request.writer.send_response(204, fields, b"")


# ======================================================================================
# 17  HTTP server
# ======================================================================================
# The connection loop. Each client's connection has a task of its own, which serves one request
# after another until the client leaves, an error ends the connection or the router shuts down.
# So a client that sends several requests at once gets its answers in their order, and its
# further requests wait in the socket.
#
# There are never more connections than `capacity`: the next ones wait in the listen queue of
# the kernel, which costs them time and the router nothing.

NO_HEAD = Timeout(RequestTimeout, "no head within {limits.head_timeout:.0f} s")
SHORT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ADDRESS_IS_OFF = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def find_capacity(wanted: int, spare_files: int) -> int:
    """Raise the limit of open files for so many clients, and return how many it is enough for.

    A client needs two files, its own connection and the upstream's; `spare_files` are kept back.
    """
    try:
        import resource
    except ImportError:
        # Windows has no such limit.
        return wanted
    needed = 2 * wanted + spare_files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A negative limit is none.
    if 0 <= soft < needed:
        allowed = needed if hard < 0 else min(needed, hard)
        # Some systems refuse what they say is allowed. Then it stays as it is.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 0:
        return wanted
    enough_for = (soft - spare_files) // 2
    return max(1, min(wanted, enough_for))


def open_listener(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    """Return a socket bound to an address, as getaddrinfo describes it. Raises OSError."""
    listener = socket.socket(family, kind, protocol)
    try:
        # After a restart the port is free again at once, although old connections still end. On
        # Windows the option means something else: that another program may take the port.
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` takes IPv4, too; any other address is one of IPv6 alone.
            is_specific = address[0] != "::"
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_specific)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def open_listeners(settings: Settings, limits: Limits) -> list[socket.socket]:
    """Open the sockets that LISTEN_HOST and LISTEN_PORT say. Raises OSError."""
    host = settings.listen_host.strip("[]")
    port = settings.listen_port
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    # Some systems list an address twice.
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            listener = open_listener(family, kind, protocol, (address[0], port, *address[2:]))
            listeners.append(listener)
            listener.listen(limits.listen_backlog)
        except OSError as error:
            # `localhost` has an address of IPv6, which may be switched off on this machine.
            # One address of a name will do.
            if error.errno not in ADDRESS_IS_OFF:
                raise
            failure = error
            continue
        # Port 0 asks for any free one; the further addresses take the same.
        port = listener.getsockname()[1]
    if failure and not listeners:
        raise failure
    return listeners


class RequestTurns:
    """Lets a few requests begin in each turn of the event loop, and the others wait.

    When hundreds of requests come at once, one turn would begin all of them, and the words of
    answers that are on their way would wait for its end.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # How many requests have begun in this turn, and those that wait for a later one.
        self.begun = 0
        self.waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def wait(self) -> None:
        """Wait, before a request begins, for a turn in which few have begun."""
        loop = asyncio.get_running_loop()
        if self.begun == 0:
            loop.call_soon(self.begin_turn, loop)
        if self.begun < self.limits.requests_per_turn:
            self.begun += 1
            return
        turn = loop.create_future()
        self.waiting.append(turn)
        await turn

    def begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the requests begin that have waited longest."""
        self.begun = 0
        while self.waiting and self.begun < self.limits.requests_per_turn:
            turn = self.waiting.popleft()
            # The client of a request that waited may have left.
            if not turn.done():
                turn.set_result(None)
                self.begun += 1
        if self.begun:
            loop.call_soon(self.begin_turn, loop)


def refuse_password() -> NoReturn:
    """Refuse a key that needs a password: OpenSSL would ask for it on the terminal."""
    raise ValueError("the key needs a password; take it off: openssl pkey -in KEY -out PLAIN_KEY")


def read_tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Read TLS_CERT and TLS_KEY: how clients speak TLS with the router; None: they do not.

    Raises ConfigError.
    """
    cert = settings.tls_cert
    key = settings.tls_key
    if cert is None or key is None:
        return None
    for name, file in (("TLS_CERT", cert), ("TLS_KEY", key)):
        try:
            # OpenSSL would not say which of the two it cannot read.
            pathlib.Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}={file!r}: {describe(error)}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Clients that would rather speak HTTP/2 learn that they cannot.
    context.set_alpn_protocols(["http/1.1"])
    # A client could ask for new keys again and again, which costs the server far more than it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(cert, key, refuse_password)
    except (OSError, ValueError) as error:
        wanted = "needed are a certificate and its own key, in PEM"
        raise ConfigError(
            f"TLS_CERT={cert!r}, TLS_KEY={key!r}: {describe(error)}; {wanted}"
        ) from None
    return context


class HTTPServer:
    """Accepts connections and serves their requests."""

    def __init__(
        self,
        application: Application,
        listeners: list[socket.socket],
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.application = application
        # How clients speak TLS; None: they speak plain http. It may be replaced at any time.
        self.tls_context = tls_context
        self.context = application.context
        self.settings = application.settings
        self.limits = application.context.limits
        self.capacity = find_capacity(self.settings.max_connections, self.limits.spare_files)
        self.turns = RequestTurns(self.limits)
        # The connection that each task serves.
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self.listeners = listeners
        self.accepting: list[asyncio.Task[None]] = []
        self.has_room = asyncio.Event()
        self.has_room.set()
        # Requests that have ended, on all connections.
        self.served = 0

    # Accepting

    def start(self) -> None:
        """Begin to accept."""
        for listener in self.listeners:
            self.accepting.append(asyncio.create_task(self.accept(listener)))

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections while there is room."""
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            # While hundreds of clients come at once, running streams get their turn in between.
            if number % self.limits.accepted_per_turn == 0:
                await asyncio.sleep(0)
            await self.has_room.wait()
            try:
                client, address = await loop.sock_accept(listener)
            except OSError as error:
                # Without a pause a lack of files would make this loop spin: the client that
                # could not be accepted is still there to be accepted. Files come back as clients
                # leave. Any other error is of one client that has left already.
                await asyncio.sleep(0.2 if error.errno in SHORT_OF_FILES else 0.01)
                continue
            # An address of IPv4 in the form of IPv6 is one of IPv4.
            peer = str(address[0]).removeprefix("::ffff:")
            self.start_connection(client, peer)

    def start_connection(self, client: socket.socket, peer: str) -> None:
        """Begin to serve an accepted socket; at full capacity accept no more."""
        connection = Connection(self.context.upstreams.batch)
        task = asyncio.create_task(self.serve_connection(connection, client, peer))
        self.connections[task] = connection
        task.add_done_callback(self.forget_connection)
        if len(self.connections) >= self.capacity:
            self.has_room.clear()
            self.hurry_idle_connections()

    def forget_connection(self, task: asyncio.Task[None]) -> None:
        """Make room for another connection."""
        del self.connections[task]
        self.has_room.set()

    def hurry_idle_connections(self) -> None:
        """Give idle clients little time to begin a request, because others wait for their place."""
        deadline = asyncio.get_running_loop().time() + self.limits.short_keep_alive_timeout
        for connection in self.connections.values():
            if not connection.has_request:
                connection.deadline = min(connection.deadline, deadline)

    # One connection

    async def serve_connection(
        self, connection: Connection, client: socket.socket, peer: str
    ) -> None:
        """Serve one request after another on an accepted socket."""
        try:
            await self.open_connection(connection, client)
        except OSError as error:
            client.close()
            # Somebody has to know why `http://` does not work any more.
            if isinstance(error, ssl.SSLError):
                self.context.log.print_request(peer, f"no TLS: {describe(error)}")
            return
        served = 0
        try:
            while await self.serve_next_request(connection, peer, served):
                served += 1
                self.served += 1
        except ClientClosed:
            # Nobody is going to take what is left for it.
            connection.abort()
        except (OSError, RouterError):
            # The client went away between two messages, or was idle for too long. There is nobody
            # to tell it to.
            pass
        except asyncio.CancelledError:
            # With a reason it was the request that was cancelled, which has answered and logged
            # why. Without one the whole program ends.
            if connection.cancel_reason is None:
                raise
        finally:
            # A client that has left reads nothing: what is still to be sent would wait for it.
            if isinstance(connection.cancel_reason, ClientClosed):
                connection.abort()
            else:
                connection.close()
            # Also the last one, which may have been cut.
            self.served += 1
        # TLS is closed when both sides have said so. A client that never does may not leave its
        # place to the next one before that: it still has the socket.
        if connection.is_tls and not self.context.draining:
            await connection.wait_lost()

    async def open_connection(self, connection: Connection, client: socket.socket) -> None:
        """Make an accepted socket a connection, encrypted if the router speaks https.

        Raises OSError, such as ssl.SSLError for a client that does not speak TLS.
        """
        options: dict[str, Any] = {}
        if self.tls_context:
            options["ssl"] = self.tls_context
            options["ssl_handshake_timeout"] = self.limits.handshake_timeout
            # The last octets of an answer may be on their way for so long; `close` sees to it.
            # Python 3.10 has no such option, and no such limit.
            if sys.version_info >= (3, 11):
                options["ssl_shutdown_timeout"] = 2 * self.limits.write_timeout
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: connection, client, **options)

    async def serve_next_request(self, connection: Connection, peer: str, served: int) -> bool:
        """Serve one request; return whether another may follow. `served` have gone before it."""
        connection.has_request = False
        if not await self.wait_for_request(connection, served):
            return False
        connection.has_request = True
        head = await self.read_head(connection, peer)
        if head is None:
            return False
        request = self.make_request(connection, peer, head)
        await self.turns.wait()
        await self.application.serve(request)
        connection.ignore_disconnect()
        # A client that sends requests and reads no answers must not fill the memory with them.
        if connection.write_paused:
            await connection.drain()
        if not request.writer.finished:
            return False
        return await self.skip_content(request)

    async def wait_for_request(self, connection: Connection, served: int) -> bool:
        """Wait for the first octets of a request; return False when none come."""
        if connection.received:
            return True
        timeout = self.limits.keep_alive_timeout
        # After very many requests a connection ends as soon as it is idle, which frees what it
        # holds here and in proxies on the way. It does so too while others wait for its place.
        if served >= self.limits.requests_per_connection or not self.has_room.is_set():
            timeout = self.limits.short_keep_alive_timeout
        connection.set_deadline(timeout, IDLE_TOO_LONG)
        # They stay there for the reader of the head.
        connection.received = await connection.read()
        return connection.received != b""

    async def read_head(self, connection: Connection, peer: str) -> RequestHead | None:
        """Return the head of a request; None for a bad one, which it answers, and for none."""
        connection.set_deadline(self.limits.head_timeout, NO_HEAD)
        longest = self.limits.request_line + self.limits.all_field_lines
        data = None
        try:
            data = await connection.read_head(longest)
            if data is None:
                return None
            head = parse_request_head(data)
        except RouterError as error:
            # Nobody knows where the next message would begin, so this is the last answer. There
            # is no path either that would tell a dialect.
            writer = ResponseWriter(connection, None)
            if (data or connection.partial_head).startswith(b"HEAD "):
                # Content would be taken for the next answer (RFC 9110 section 9.3.2).
                writer.method = "HEAD"
            send_error(writer, error, OPENAI, "")
            self.context.log.print_request(peer, str(error.status), str(error))
            await connection.linger()
            return None
        connection.clear_deadline()
        return head

    def make_request(self, connection: Connection, peer: str, head: RequestHead) -> Request:
        """Put together what a head says and whom it came from."""
        writer = ResponseWriter(connection, head)
        if self.context.draining:
            writer.keep_alive = False
        source_host = client_address(peer, head.fields, self.settings.trusted_proxies)
        return Request(head, connection, writer, source_host)

    async def skip_content(self, request: Request) -> bool:
        """Get past a content that nobody wanted; return whether another request may follow.

        An early answer (401, 404) leaves the content of its request behind, and what stands there
        must not be taken for the next request. A short one is read; otherwise the connection ends.
        """
        connection = request.connection
        reader = request.reader or ContentReader(connection, request.head.framing)
        if not reader.done and self.may_discard(request):
            connection.set_deadline(self.limits.linger_timeout, IDLE_TOO_LONG)
            while reader.size <= self.limits.discarded_content and await reader.read():
                pass
        if not reader.done:
            await connection.linger()
            return False
        return request.writer.keep_alive and not self.context.draining

    def may_discard(self, request: Request) -> bool:
        """Tell whether the unread content of a request is worth reading for the next one."""
        # Reading that was begun and not finished was stopped for a reason, such as an error in it.
        if request.reader is not None or not request.writer.keep_alive:
            return False
        # A client that expected a 100 and got another answer may send the content, or may not.
        if request.head.fields.get("expect") is not None:
            return False
        return request.head.framing.length <= self.limits.discarded_content

    # The end

    async def shut_down(self, grace: float, hurry: asyncio.Event) -> None:
        """Accept no more, let running answers end until `grace` s have passed or `hurry` is set."""
        self.context.draining = True
        for task in self.accepting:
            task.cancel()
        for listener in self.listeners:
            listener.close()
        self.cancel_connections(only_idle=True)
        hurried = asyncio.create_task(hurry.wait())
        end_at = time.monotonic() + grace
        while self.connections and not hurry.is_set():
            remaining = end_at - time.monotonic()
            if remaining <= 0:
                break
            running = [*self.connections, hurried]
            await asyncio.wait(running, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        self.cancel_connections(only_idle=False)
        if self.connections:
            # Their requests still have to say why they end, and to enter the log.
            await asyncio.wait(list(self.connections), timeout=1.0)

    def cancel_connections(self, only_idle: bool) -> None:
        """End the tasks of connections, for a reason that their requests will tell."""
        for task, connection in list(self.connections.items()):
            if connection.has_request and only_idle:
                continue
            connection.cancel_reason = Unavailable("the router is shutting down")
            task.cancel()


# ======================================================================================
# 18  Command line
# ======================================================================================
# `serve` is the router; the other commands look at a configuration, ask a running router or
# show one off. The environment is read in `main`, and nowhere else. What a command works with
# is one record, an Invocation. To add a command: a function `run_...(invocation)` whose
# docstring is its help, its name in COMMANDS, and its own flags in `build_parsers`.

EPILOG = """examples:
  smolrouter.py                                  serve with the settings of the environment
  smolrouter.py --default-upstream http://gpu:8000 --listen-port 8080
  smolrouter.py check                            validate settings and routing file
  smolrouter.py doctor http://gpu:8000           ask a server what it is and what it can
  smolrouter.py explain gpt-4 --source-host 10.0.1.7
  smolrouter.py export --since 7d --format csv   print what was logged
  smolrouter.py demo                             see it work; needs nothing else
"""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Python runs one thread at a time. After so many seconds the log's thread has to let the event
# loop run, when that has something to relay.
SWITCH_INTERVAL = 0.001


def complain(words: str) -> None:
    """Print a line to stderr; where that fails, as on a full disk, there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(f"smolrouter: {words}", file=sys.stderr, flush=True)


class Console:
    """Writes lines to stderr from a thread; drops them when nobody reads.

    A terminal that is stopped, or a pipe that is full, must not hold up the router.
    """

    MAX_LINES = 10_000
    INTERVAL = 0.05

    def __init__(self) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=self.MAX_LINES)
        self.has_lines = threading.Event()
        self.open = True
        self.thread = threading.Thread(target=self.run, name="console", daemon=True)
        self.thread.start()

    def print_line(self, text: str) -> None:
        """Queue a line; control characters become `?`, or a model's name could clear the screen."""
        self.lines.append(CONTROL.sub("?", text))
        if not self.has_lines.is_set():
            self.has_lines.set()

    def run(self) -> None:
        """Write what is queued, a few times a second."""
        while self.open or self.lines:
            self.has_lines.wait()
            if self.open:
                time.sleep(self.INTERVAL)
            self.has_lines.clear()
            lines = [self.lines.popleft() for _ in range(len(self.lines))]
            if not lines:
                continue
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("\n".join(lines) + "\n")
                sys.stderr.flush()

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.open = False
        self.has_lines.set()
        self.thread.join(1.0)


# --- the routing file on disk -----------------------------------------------------------


class RoutesFile:
    """The routing file: reads it, and knows when it has changed."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], named: bool) -> None:
        self.settings = settings
        self.environ = environ
        # Somebody has set its name: then it has to be there.
        self.named = named
        self.fingerprint = self.read_fingerprint()

    @property
    def path(self) -> pathlib.Path:
        """Where it is: in the working folder, or else beside the program if it has no name set."""
        path = pathlib.Path(self.settings.routes_config)
        beside = pathlib.Path(__file__).with_name(path.name)
        if not self.named and not path.exists() and beside.exists():
            return beside
        return path

    def read_fingerprint(self) -> tuple[int, ...] | None:
        """Return what tells one state of the file from another, None when there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def has_changed(self) -> bool:
        """Tell whether the file is another one than at the last `note_state`."""
        return self.fingerprint != self.read_fingerprint()

    def note_state(self) -> None:
        """Remember the file as it is now."""
        self.fingerprint = self.read_fingerprint()

    def load(self) -> RoutingTable:
        """Read the table. Raises ConfigError."""
        path = self.path
        name = str(path)
        if not self.named and not path.exists():
            return parse_routes("", "", self.environ, self.settings)
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            remedy = "mend it, or unset the variable"
            raise ConfigError(f"ROUTES_CONFIG={name!r}: {describe(error)}; {remedy}") from None
        return parse_routes(text, name, self.environ, self.settings)


def table_warnings(table: RoutingTable) -> Iterator[str]:
    """Yield a warning for what is allowed in a table, but probably a mistake."""
    for server in table.all_servers():
        if server.warning:
            yield server.warning
    named_patterns = [(rule.name, rule.model) for rule in table.rules]
    named_patterns += [("MODEL_MAP", pattern) for pattern, _ in table.model_map]
    for name, pattern in named_patterns:
        if isinstance(pattern, str) and "*" in pattern:
            yield f"{name}: {pattern!r} is an exact name; a pattern is written /^gpt-/"
    for rule in table.rules[:-1]:
        if rule.model is None and rule.source_hosts is None:
            yield f"{rule.name} matches everything: what stands behind it is never reached"


def count_things(things: Sized, singular: str, plural: str) -> str:
    """Return how many there are: '1 server', '2 servers'."""
    return f"{len(things)} {singular if len(things) == 1 else plural}"


def describe_table(table: RoutingTable) -> list[str]:
    """Return what a routing table holds, where the rest goes, and its warnings."""
    counts = (
        count_things(table.servers, "server", "servers"),
        count_things(table.aliases, "alias", "aliases"),
        count_things(table.rules, "route", "routes"),
        count_things(table.model_map, "mapped name", "mapped names"),
    )
    rest = "the rest is refused (DEFAULT_UPSTREAM is none)"
    if table.default:
        rest = f"the rest goes to {table.default.url}"
    return [
        f"routes: {table.source or 'no routing file'}: {', '.join(counts)}",
        rest,
        *(f"warning: {words}" for words in table_warnings(table)),
    ]


POLICY_WORDS = {
    "NONE": "is open to whoever reaches the port",
    "AUTH_WHEN_PROXIED": "wants a token from requests that come through a proxy",
    "ALWAYS_AUTH": "wants a token from everybody",
}


def describe_policies(settings: Settings) -> Iterator[str]:
    """Yield who may use what, in words, where that is not the default."""
    for name, what in (("webui_security", "the Web UI"), ("api_security", "the model API")):
        policy = getattr(settings, name)
        if policy != getattr(Settings, name):
            yield f"{what} {POLICY_WORDS[policy]} ({name.upper()}={policy})"


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command works with."""

    settings: Settings
    # Which settings somebody has set, where and to what.
    given: Mapping[str, GivenSetting]
    routes: RoutesFile
    limits: Limits
    # The flags of the command itself, such as `model` and `source_host` of `explain`.
    options: argparse.Namespace


# --- serve ------------------------------------------------------------------------------


def return_memory() -> None:
    """Give freed memory back to the system, which glibc does not do unasked."""
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes

        library = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD: what is longer gets a mapping of its own, which goes back when it is
        # freed, whatever is in memory beside it.
        library.mallopt(-3, MiB)
        # M_TRIM_THRESHOLD: so much free memory is kept for the next answers.
        library.mallopt(-1, 4 * MiB)
        library.malloc_trim(0)


def tune_collector() -> None:
    """Let Python look for garbage in cycles less often, and not at all in what stays."""
    gc.collect()
    gc.freeze()
    # Rows that wait for the log are many and young, and hardly anything here makes a cycle.
    gc.set_threshold(20_000, 20, 20)


def handle_signal(name: str, handler: Callable[[], None]) -> None:
    """Call a handler in the event loop whenever a signal comes, if this system has it."""
    number = getattr(signal, name, None)
    if number is None:
        return
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, handler)
    except NotImplementedError:
        # On Windows the loop has no signals of its own.
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(handler))


class Router:
    """The whole program, running: started and stopped by the command line."""

    def __init__(self, invocation: Invocation, listeners: list[socket.socket]) -> None:
        settings = invocation.settings
        limits = invocation.limits
        self.settings = settings
        self.limits = limits
        self.routes = invocation.routes
        self.console = Console()
        # The first signal says that the router is to stop, the second one that it is to hurry.
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()
        upstreams = Upstreams(settings, LoopBatch(limits))
        slots = Slots(upstreams)
        # What can be wrong is read before the log is opened.
        tls_context = read_tls_context(settings)
        self.context = Context(
            settings=settings,
            limits=limits,
            table=self.routes.load(),
            upstreams=upstreams,
            slots=slots,
            model_lists=ModelLists(upstreams),
            log=RequestLog(settings, limits, self.console.print_line),
            token_guard=TokenGuard(settings.jwt_secret, limits),
            via=f"1.1 smolrouter-{secrets.token_hex(6)}",
            dashboard_file=invocation.options.dashboard,
        )
        slots.set_table(self.context.table)
        self.server = HTTPServer(Application(self.context), listeners, tls_context)

    def reload(self) -> None:
        """Take a changed routing file; a bad one leaves the old table in force."""
        # Good or bad, this state of the file is loaded once.
        self.routes.note_state()
        try:
            if self.routes.fingerprint is None and self.context.table.source:
                raise ConfigError(f"{self.routes.path} is gone")
            self.context.table = self.routes.load()
        except ConfigError as error:
            self.context.routes_error = str(error)
            self.console.print_line(f"routes: {error} (the old table stays in force)")
            return
        self.context.routes_error = None
        self.context.slots.set_table(self.context.table)
        self.context.model_lists.refresh_due(self.context.table)
        for line in describe_table(self.context.table):
            self.console.print_line(line)

    def reload_certificate(self) -> None:
        """Take a new certificate for new connections; a bad one leaves the old one in force."""
        try:
            self.server.tls_context = read_tls_context(self.settings)
        except ConfigError as error:
            self.console.print_line(f"{error} (the old certificate stays in force)")
            return
        if self.server.tls_context:
            self.console.print_line(f"TLS_CERT: {self.settings.tls_cert} was read again")

    def hang_up(self) -> None:
        """Read the routing file and the certificate again, as SIGHUP asks."""
        self.reload()
        self.reload_certificate()

    async def watch(self) -> None:
        """Look at the routing file every two seconds; give memory back after requests."""
        log = self.context.log
        # What has been freed since then is given back: the memory of requests that have ended, and
        # of rows that were written later.
        seen = (0, 0)
        while True:
            await asyncio.sleep(self.limits.reload_interval)
            if self.routes.has_changed():
                self.reload()
            if seen != (self.server.served, log.backlog):
                seen = (self.server.served, log.backlog)
                if not log.running:
                    # Connections that asyncio has closed are cycles. Python finds these by itself
                    # when they are thousands; nobody waits for it now.
                    gc.collect()
                await asyncio.get_running_loop().run_in_executor(None, return_memory)

    def interrupt(self) -> None:
        """End at a signal: the first one drains, the second one hurries."""
        if self.stopping.is_set():
            self.hurry.set()
        self.stopping.set()

    def announce(self, port: int) -> None:
        """Print where the router listens and what it does."""
        settings = self.settings
        host = settings.listen_host.strip("[]")
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        scheme = "https" if settings.tls_cert else "http"
        printed = "not printed" if is_quiet(settings) else "printed to stderr"
        kept = "not stored"
        if settings.enable_logging:
            kept = f"kept in {settings.db_path} for {settings.max_log_age_days:g} days"
        routes, rest, *warnings = describe_table(self.context.table)
        for line in (
            f"SmolRouter {__version__} listens on {scheme}://{place}",
            routes,
            rest,
            f"log: requests are {printed} and {kept}",
            *describe_policies(settings),
            *warnings,
        ):
            self.console.print_line(line)

    async def tell_server(self, server: Server) -> None:
        """Print how a server is as soon as it has listed its models or has failed to."""
        if server.models is not None:
            words = f"not asked; it has {count_things(server.models, 'model', 'models')}"
        else:
            models = await self.context.model_lists.get(server, None)
            error = self.context.upstreams.health_of(Instance(server)).error
            words = error or "no answer yet"
            if models is not None:
                words = f"up, {count_things(models, 'model', 'models')}"
        self.console.print_line(f"server {server.name}: {words}")

    async def tell_servers(self) -> None:
        """Print how the servers are that the start has asked for their models."""
        table = self.context.table
        if is_quiet(self.settings) or not table.route_by_model:
            return
        await asyncio.gather(*(self.tell_server(server) for server in table.search_order))

    async def run(self, on_ready: Callable[[int], None] | None = None) -> int:
        """Serve until a signal; return the exit status. `on_ready` gets the port."""
        grace = self.settings.shutdown_grace
        handle_signal("SIGTERM", self.interrupt)
        handle_signal("SIGINT", self.interrupt)
        handle_signal("SIGHUP", self.hang_up)
        port = self.server.listeners[0].getsockname()[1]
        self.server.start()
        self.context.model_lists.refresh_due(self.context.table)
        tune_collector()
        return_memory()
        self.announce(port)
        if on_ready:
            on_ready(port)
        watcher = asyncio.create_task(self.watch())
        # Their answers come while the router serves, and nobody waits for them.
        teller = asyncio.create_task(self.tell_servers())
        await self.stopping.wait()
        self.console.print_line(f"draining for at most {grace:g} s")
        watcher.cancel()
        teller.cancel()
        grace_ends_at = time.monotonic() + grace
        await self.server.shut_down(grace, self.hurry)
        self.context.upstreams.pool.close()
        # Whoever asked for an end is not to wait for twice the time.
        seconds_left = 0.0 if self.hurry.is_set() else grace_ends_at - time.monotonic()
        self.context.log.close(max(0.0, seconds_left))
        self.console.close()
        return 0


def open_port(settings: Settings, limits: Limits) -> list[socket.socket]:
    """Open the port, or say why that cannot be and return nothing.

    That comes before the log is opened: a start that fails leaves no half-made database.
    """
    try:
        return open_listeners(settings, limits)
    except OSError as error:
        hint = ""
        if error.errno == errno.EADDRINUSE:
            hint = "; choose another LISTEN_PORT (LM Studio uses 1234 too)"
        place = f"{settings.listen_host}:{settings.listen_port}"
        complain(f"cannot listen on {place}: {describe(error)}{hint}")
        return []


# What a server is called that is found at one of `Limits.local_ports`.
LOCAL_SERVERS = ("ollama", "lmstudio", "llamacpp")


def answers_locally(port: int, limits: Limits) -> bool:
    """Tell whether a server of models answers on a port of this machine."""
    try:
        # Nobody is there, most often, and then http.client need not be imported.
        socket.create_connection(("127.0.0.1", port), limits.local_server_timeout).close()
        server = Server("", parse_upstream_url(f"http://127.0.0.1:{port}"))
        connection = make_http_connection(server, None, limits.local_server_timeout)
        fetch_models(connection, server, None, limits)
    except ListRefused as error:
        # Such as one that wants a key.
        return error.refusal.status in (401, 403)
    except (OSError, ValueError):
        return False
    return True


def look_for_servers(invocation: Invocation) -> Invocation:
    """Return an invocation with the servers of this machine, if nobody has named any.

    A newcomer has one of the usual servers on the machine, and starts the router to see what it
    does. What is found counts until the router ends: whoever has read how to name it, will.
    """
    settings, limits = invocation.settings, invocation.limits
    table = invocation.routes.load()
    is_named = "default_upstream" in invocation.given or table.servers
    if is_named or table.aliases or table.rules:
        return invocation
    if table.default is None or answers_locally(table.default.url.port, limits):
        return invocation
    found = []
    for name, port in zip(LOCAL_SERVERS, limits.local_ports, strict=False):
        # The router is about to listen on its own port. LM Studio has the same one by default: if
        # it is there, the router says so and ends.
        if port != settings.listen_port and answers_locally(port, limits):
            found.append(f"{name}=http://127.0.0.1:{port}")
    if not found:
        return invocation
    words = " ".join(found)
    complain(f"no server is named; found on this machine, and used: SERVERS='{words}'")
    given = {**invocation.given, "servers": GivenSetting("SERVERS", words)}
    settings = Settings.from_given(given)
    routes = RoutesFile(settings, invocation.routes.environ, invocation.routes.named)
    return dataclasses.replace(invocation, settings=settings, given=given, routes=routes)


def run_serve(invocation: Invocation) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    invocation = look_for_servers(invocation)
    listeners = open_port(invocation.settings, invocation.limits)
    if not listeners:
        return 1
    # Until the loop has handlers of its own, SIGTERM does what Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.setswitchinterval(SWITCH_INTERVAL)
    loop = asyncio.new_event_loop()
    status = loop.run_until_complete(Router(invocation, listeners).run())
    # A usual exit would wait for the threads: for a full stderr, for example.
    os._exit(status)


# --- how the servers are ----------------------------------------------------------------
# `doctor` and `check --ask` send servers a few small requests, each of which has its time, and
# read the answers as the router reads those for its clients. A ProbeAnswer is what came back for
# one request, an Examination all that is known of a server. `find_problem` says what is wrong
# with an answer and what would help. For another endpoint to ask for, add it to PROBES; for a
# server to be known by its name, what it says of itself to SERVER_MARKS.

GREETING = [{"role": "user", "content": "Say hello."}]
ANY_TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "Tell the time.", "parameters": {"type": "object"}},
}
STREAMED_CHAT = {
    "messages": GREETING,
    "max_tokens": 16,
    "stream": True,
    "stream_options": {"include_usage": True},
}
# What is asked for, its path, and its document without the model.
PROBES = {
    "chat": ("/v1/chat/completions", STREAMED_CHAT),
    "tools": (
        "/v1/chat/completions",
        {"messages": GREETING, "max_tokens": 1, "tools": [ANY_TOOL]},
    ),
    "completions": ("/v1/completions", {"prompt": "Hello", "max_tokens": 1}),
    "embeddings": ("/v1/embeddings", {"input": "Hello"}),
    "responses": ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
    "messages": ("/v1/messages", {"messages": GREETING, "max_tokens": 1}),
    "ollama": (
        "/api/chat",
        {"messages": GREETING, "stream": False, "options": {"num_predict": 1}},
    ),
}
ENDPOINT_PROBES = ("chat", "completions", "embeddings", "responses", "messages", "ollama")
# What servers say of themselves, in lower case: at `/`, in the names and values of fields, or as
# the owners of their models. The first one that is found counts.
SERVER_MARKS = {
    "smolrouter": "SmolRouter",
    "llama-swap": "llama-swap",
    "ollama is running": "Ollama",
    "llama.cpp": "llama.cpp",
    "llamacpp": "llama.cpp",
    "koboldcpp": "KoboldCpp",
    "tabbyapi": "TabbyAPI",
    "sglang": "SGLang",
    "vllm": "vLLM",
    "organization_owner": "LM Studio",
    "lm studio": "LM Studio",
    "open webui": "Open WebUI",
}
REDIRECTIONS = (301, 302, 303, 307, 308)
# An answer with such a status says that there is no such endpoint. 200 is LM Studio's.
NO_ENDPOINT = (200, 404, 405, 501)
# Where an API may stand when it is not where the URL says.
OTHER_PREFIXES = ("", "/api", "/openai")
CELL_WIDTH = 22
LINE_WIDTH = 100
MODELS_SHOWN = 12
SIGNS_OF_HTML = (b"<!doctype html", b"<html")


class ProbeAnswer(NamedTuple):
    """What came back for a small request."""

    path: str
    # 0 when there was no answer; `failure` is the reason.
    status: int = 0
    fields: Fields = Fields([])
    content: bytes = b""
    # Until all of it was there, and until it said something, None for never.
    seconds: float = 0.0
    first_seconds: float | None = None
    failure: Exception | None = None
    # Whether there was a connection.
    connected: bool = False

    @property
    def media_type(self) -> str:
        """What the content calls itself, without parameters."""
        return (self.fields.get("content-type") or "").partition(";")[0].strip().lower()

    @property
    def event_format(self) -> EventFormat | None:
        """How the events of a stream are told apart, None for a whole answer."""
        if self.media_type in MISCALLED_STREAMS and begins_like_events(self.content):
            return SSE
        return EVENT_FORMATS.get(self.media_type)

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The objects of its events, or the one that it is."""
        if self.event_format:
            return self.event_format.read_documents(self.content)
        document = parse_object(self.content)
        return [document] if document else []

    @property
    def is_page(self) -> bool:
        """Whether a browser was meant to read it."""
        start = self.content[:100].lstrip().lower()
        return self.media_type == "text/html" or start.startswith(SIGNS_OF_HTML)


def find_failure(answer: ProbeAnswer) -> str:
    """Return what is wrong with an answer, in words, "" when it is a good one."""
    if answer.failure is not None:
        return describe(answer.failure)
    protocol = find_protocol(answer.path)
    documents = answer.documents
    words = next(filter(None, (find_error(protocol, one) for one in documents)), "")
    if answer.status >= 300:
        if not words and documents:
            words = error_words(documents[0])
        words = f"answered {answer.status} ({words or 'no reason given'})"
    elif answer.is_page:
        words = "answers HTML"
    elif not words and parse_value(answer.content) is None and not documents:
        words = f"answers {answer.media_type or 'something'} that is no JSON"
    return words[: LIMITS.error_text]


def failure_remedy(server: Server, failure: Exception, connected: bool) -> str:
    """Return what helps when a server could not be reached, or does not speak HTTP."""
    url = server.url
    if isinstance(failure, socket.gaierror):
        return f"correct {url.host}, or write its address"
    if isinstance(failure, ssl.SSLCertVerificationError):
        return "`verify: false` in the routing file takes it all the same"
    if isinstance(failure, ssl.SSLError):
        return f"it may speak no TLS: try http://{url.without_scheme}"
    if isinstance(failure, ConnectionRefusedError):
        return (
            f"it is off, or not at port {url.port}, or listens on 127.0.0.1 alone: start it there "
            "with 0.0.0.0 as its host"
        )
    if isinstance(failure, TimeoutError) and connected:
        return "it took the connection and was not done in time: it is busy, or loads a model"
    if isinstance(failure, OSError) and not connected:
        return "it is switched off, in another network or behind a firewall: look at the machine"
    return f"that is no HTTP: try https://{url.without_scheme}, or look at the port"


def answer_remedy(server: Server, answer: ProbeAnswer) -> str:
    """Return what helps when a server answers, but not as it should."""
    url = server.url
    location = answer.fields.get("location")
    words = answer.content.lower()
    if answer.status in REDIRECTIONS and location:
        return f"it is at {location} now: write that URL"
    if answer.status in (401, 403):
        if server.api_key:
            return "it takes another key than this `api_key`"
        return "it wants a key: give it an `api_key` in the routing file"
    if answer.status == 400 and b"https" in words:
        return f"it speaks TLS: write https://{url.without_scheme}"
    if b"no models loaded" in words or b"no model loaded" in words:
        return "load a model there"
    if answer.status < 300 and answer.is_page:
        return "that is a page for browsers: look at the port, and at the path of the API"
    if answer.status in NO_ENDPOINT:
        return f"the path is wrong: there is no {answer.path} below {url}"
    if answer.status == 503:
        return "it may still be loading its model: wait a moment"
    return "its own log may say more"


def find_problem(server: Server, answer: ProbeAnswer) -> str:
    """Return what is wrong with an answer and what would help, "" when nothing is."""
    failure = find_failure(answer)
    if not failure:
        return ""
    if answer.failure is not None:
        return f"{failure}; {failure_remedy(server, answer.failure, answer.connected)}"
    return f"{failure}; {answer_remedy(server, answer)}"


def judge_probe(answer: ProbeAnswer | None) -> str:
    """Return what a cell of the table says of an answer."""
    if answer is None:
        return "-"
    if answer.failure is not None:
        return "late" if isinstance(answer.failure, TimeoutError) else "broken"
    if not find_failure(answer):
        return "yes"
    return "no" if answer.status in NO_ENDPOINT else "error"


def read_abilities(entry: Mapping[str, Any]) -> list[str]:
    """Return what a model can do by its entry in a list.

    `{"id": "m", "type": "vlm", "capabilities": ["tool_use"]}`  ->  `["tool_use", "vision"]`
    """
    said = entry.get("capabilities")
    if isinstance(said, dict):
        said = [name for name, value in said.items() if value is True]
    abilities = [ability for ability in said or () if isinstance(ability, str)]
    for kind, ability in (("vlm", "vision"), ("embeddings", "embeddings")):
        if entry.get("type") == kind and ability not in abilities:
            abilities.append(ability)
    return abilities


def is_loaded(entry: Mapping[str, Any]) -> bool:
    """Tell whether a server says that it has loaded a model."""
    status = entry.get("status")
    value = status.get("value") if isinstance(status, dict) else status
    return "loaded" in (entry.get("state"), value)


def choose_model(models: Sequence[Mapping[str, Any]]) -> str:
    """Return the model to ask: one that is loaded, and none that only makes embeddings."""

    def rank(entry: Mapping[str, Any]) -> tuple[bool, bool]:
        only_embeds = "embed" in entry["id"].lower() or entry.get("type") == "embeddings"
        return only_embeds, not is_loaded(entry)

    return min(models, key=rank)["id"]


def end_socket(sock: socket.socket) -> None:
    """End a connection on which another thread still waits."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Examination:
    """Asks one server what it is, and keeps what it has answered."""

    def __init__(self, server: Server, settings: Settings, limits: Limits) -> None:
        self.server = server
        self.settings = settings
        self.limits = limits
        self.answers: dict[str, ProbeAnswer] = {}
        self.models: list[dict[str, Any]] = []
        # The model that was asked.
        self.model = ""
        # What is wrong with the server; "" when it is well.
        self.problem = ""
        # Where it answers when it does not at the URL of the server.
        self.right_url: UpstreamURL | None = None

    @property
    def listing(self) -> ProbeAnswer:
        """The answer that came first: the list of models, or why there is none."""
        return self.answers["/v1/models"]

    def ask(self, path: str, document: Any = None) -> ProbeAnswer:
        """Send a request and return the answer when all of it is there, or too late (blocking)."""
        import http.client

        seconds = self.limits.probe_timeout
        request = ("GET", None, own_fields(self.server))
        if document is not None:
            seconds = self.limits.probed_model_timeout
            fields = {"Content-Type": "application/json", **own_fields(self.server)}
            request = ("POST", encode_json(document), fields)
        started_at = time.monotonic()
        deadline = math.inf
        ending = None
        try:
            with contextlib.closing(self.make_connection()) as connection:
                connection.connect()
                connection.sock.settimeout(seconds)
                deadline = time.monotonic() + seconds
                # A server that sends a little now and then would never be late for a socket.
                ending = threading.Timer(seconds, end_socket, (connection.sock,))
                ending.start()
                method, content, fields = request
                connection.request(method, f"{self.server.url.prefix}{path}", content, fields)
                answer = self.receive(path, connection.getresponse(), started_at)
        except (OSError, http.client.HTTPException) as error:
            answer = ProbeAnswer(path, failure=error)
        finally:
            if ending:
                ending.cancel()
        if time.monotonic() >= deadline:
            answer = answer._replace(failure=TimeoutError())
        return answer._replace(connected=ending is not None)

    def make_connection(self) -> Any:
        """Return a connection of http.client's to the server."""
        tls_context = None
        if self.server.url.scheme == "https":
            tls_context = make_tls_context(self.server.verify)
        return make_http_connection(self.server, tls_context, self.settings.connect_timeout)

    def receive(self, path: str, response: Any, started_at: float) -> ProbeAnswer:
        """Read an answer and note when it begins to say something."""
        fields = take_fields(response)
        coding = read_coding(fields)
        answer = ProbeAnswer(path, response.status, fields)
        opening = Opening(find_protocol(path), answer.media_type, coding, self.limits)
        content = b""
        first_seconds = None
        while len(content) < self.limits.model_list_size:
            piece = response.read1(64 * KiB)
            if not piece:
                break
            content += piece
            if first_seconds is None and opening.feed(piece):
                first_seconds = time.monotonic() - started_at
        return answer._replace(
            content=decode_content(content, coding, self.limits.decoded_answer),
            seconds=time.monotonic() - started_at,
            first_seconds=first_seconds,
        )

    def read_list(self) -> bool:
        """Ask for the list of models; tell whether there is one."""
        answer = self.answers["/v1/models"] = self.ask("/v1/models")
        self.problem = find_problem(self.server, answer)
        if self.server.models:
            # It may be a provider that has no list, or one of hundreds.
            self.models = [model_entry(name) for name in self.server.models]
            if answer.status in NO_ENDPOINT:
                self.problem = ""
            return not self.problem
        if self.problem:
            if answer.status in NO_ENDPOINT:
                self.find_other_path()
            return False
        try:
            self.models = read_model_list(answer.content, self.limits)
        except ValueError as error:
            self.problem = f"{error}; it is no server of models, or its path is wrong"
            return False
        if not self.models:
            self.problem = "it has no model loaded; load one there"
        return bool(self.models)

    def find_other_path(self) -> None:
        """Look for the API where it may stand when it is not where the URL says."""
        for prefix in OTHER_PREFIXES:
            url = self.server.url._replace(prefix=prefix)
            if url == self.server.url:
                continue
            server = dataclasses.replace(self.server, url=url)
            answer = Examination(server, self.settings, self.limits).ask("/v1/models")
            if answer.status == 200 and not find_failure(answer):
                self.right_url = url
                self.problem += f". It answers at {url}: write that URL"
                return

    def read_details(self) -> None:
        """Ask for what else some servers tell of themselves and of their models."""
        for path in ("/", "/api/v0/models", "/api/ps"):
            self.answers[path] = self.ask(path)
        details: dict[str, dict[str, Any]] = {}
        if not find_failure(self.answers["/api/v0/models"]):
            with contextlib.suppress(ValueError):
                listed = read_model_list(self.answers["/api/v0/models"].content, self.limits)
                details = {entry["id"]: entry for entry in listed}
        for document in self.answers["/api/ps"].documents:
            running = document.get("models")
            for entry in running if isinstance(running, list) else ():
                if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                    details[entry["name"]] = {**entry, "state": "loaded"}
        self.models = [{**entry, **details.get(entry["id"], {})} for entry in self.models]
        self.model = choose_model(self.models)
        if self.kind == "Ollama":
            self.answers["/api/show"] = self.ask("/api/show", {"model": self.model})
            for document in self.answers["/api/show"].documents:
                self.add_details(document)

    def add_details(self, document: Mapping[str, Any]) -> None:
        """Add what the server says of the model that is asked."""
        for entry in self.models:
            if entry["id"] == self.model:
                entry.update({k: document[k] for k in document if k not in entry and k != "id"})

    def ask_model(self) -> None:
        """Ask the model a little at every endpoint, and say what is wrong if none answers."""
        for name, (path, document) in PROBES.items():
            document = {"model": self.model, **document}
            answer = self.ask(path, document)
            if "stream_options" in document and "stream_options" in find_failure(answer):
                # As for its clients, the router does without.
                del document["stream_options"]
                answer = self.ask(path, document)
            self.answers[name] = answer
            if answer.failure is not None or answer.status in (401, 403):
                # It would be the same for the others.
                break
        if not any(judge_probe(self.answers.get(name)) == "yes" for name in ENDPOINT_PROBES):
            self.problem = f"{self.model}: {find_problem(self.server, self.answers['chat'])}"

    def run(self) -> None:
        """Find out all about the server."""
        if self.read_list():
            self.read_details()
            self.ask_model()

    @property
    def kind(self) -> str:
        """What the server calls itself, "" when it does not tell."""
        texts = [str(entry.get("owned_by", "")) for entry in self.models]
        for answer in self.answers.values():
            texts += [f"{lower}: {value}" for lower, _, value in answer.fields.lines]
        if "/" in self.answers:
            texts.append(self.answers["/"].content[: 2 * KiB].decode("utf-8", "replace"))
        said = "\n".join(texts).lower()
        return next((kind for mark, kind in SERVER_MARKS.items() if mark in said), "")

    @property
    def notes(self) -> list[str]:
        """What single endpoints have refused, and why."""
        notes = []
        for name in PROBES:
            answer = self.answers.get(name)
            failure = find_failure(answer) if answer else ""
            if failure and answer.status not in (200, 404, 405):
                notes.append(f"{name}: {failure}")
        return notes


def describe_stream(answer: ProbeAnswer) -> list[str]:
    """Return whether a chat streams, tells its usage, sends pings and keeps thinking apart."""
    protocol = find_protocol(answer.path)
    documents = answer.documents
    parts = [part for document in documents for part in read_answer(protocol, document)]
    text = "".join(part.value for part in parts if part.kind == TEXT)
    visible, _ = ThinkFilter().feed(text, last=True)
    thinking = "none seen"
    if any(part.kind == THINKING and part.value for part in parts):
        thinking = "apart"
    elif visible != text:
        thinking = "in text"
    format = answer.event_format
    events = format.split(answer.content) if format else ()
    has_comment = any(event.strip() and not NO_COMMENT.search(event) for event in events)
    has_ping = has_comment or any(document.get("type") in PING_TYPES for document in documents)
    usage = read_usage(answer.content)
    return [
        "yes" if format and len(documents) > 1 else "no",
        "no" if usage.prompt is None and usage.completion is None else "yes",
        "yes" if has_ping else "none seen",
        thinking,
    ]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines; the first row is their heading."""
    rows = [[CONTROL.sub("?", cell)[:CELL_WIDTH] for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def format_time(seconds: float | None) -> str:
    """Return a time in words: 0.012 -> '12 ms', 3.21 -> '3.2 s', None -> '-'."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def wrap_words(name: str, words: str) -> str:
    """Return words about something as an indented paragraph that fits into a line's width."""
    import textwrap

    text = CONTROL.sub("?", f"{name}: {words}")
    return textwrap.fill(text, LINE_WIDTH, initial_indent="  ", subsequent_indent="    ")


def describe_health(examination: Examination) -> str:
    """Return in a line how a server is that was asked for its list alone."""
    if examination.problem:
        return examination.problem
    models = count_things(examination.models, "model", "models")
    return f"up, {models}, {format_time(examination.listing.seconds)}"


def describe_models(examination: Examination) -> Iterator[str]:
    """Yield a line for each model of a server."""
    models = examination.models
    for entry in models[:MODELS_SHOWN]:
        length = read_context_length(entry)
        facts = [f"{length} tokens of context"] if length else []
        facts += read_abilities(entry)
        if is_loaded(entry):
            facts.append("loaded")
        yield wrap_words(entry["id"], ", ".join(facts) or "nothing told")
    if len(models) > MODELS_SHOWN:
        yield f"  and {len(models) - MODELS_SHOWN} more"


def describe_examinations(examinations: Sequence[Examination]) -> list[str]:
    """Return the tables of a look at some servers, their models, and what is wrong."""
    servers = [["server", "is", "reached in", "models"]]
    chats = [["chat", "model", "first token", "streams", "usage", "pings", "thinking", "tools"]]
    endpoints = [["answers", *ENDPOINT_PROBES]]
    lines = []
    remedies = []
    for one in examinations:
        name = one.server.name
        is_reached = one.listing.status > 0
        reached = format_time(one.listing.seconds if is_reached else None)
        servers.append([name, one.kind or "-", reached, str(len(one.models) or "-")])
        remedies += [wrap_words(name, words) for words in (one.problem, *one.notes) if words]
        if not one.model:
            continue
        endpoints.append([name, *(judge_probe(one.answers.get(p)) for p in ENDPOINT_PROBES)])
        lines += ["", f"models of {name}", *describe_models(one)]
        if judge_probe(one.answers["chat"]) == "yes":
            chat = one.answers["chat"]
            tools = judge_probe(one.answers.get("tools"))
            first = format_time(chat.first_seconds)
            chats.append([name, one.model, first, *describe_stream(chat), tools])
    tables = [format_table(rows) for rows in (servers, endpoints, chats) if len(rows) > 1]
    lines = [line for table in tables for line in (*table, "")][:-1] + lines
    if remedies:
        lines += ["", "remedies", *remedies]
    return lines


def choose_name(one: Examination, named: Container[Server], taken: Container[str]) -> str:
    """Return what a server is to be called in a routing file."""
    server = one.server
    if server in named:
        return server.name
    host = server.url.host
    name = one.kind.lower() if is_address(host) else host.partition(".")[0]
    name = re.sub(r"[^a-z0-9.-]+", "-", name.lower()) or "server"
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


def write_servers(examinations: Sequence[Examination], table: RoutingTable) -> list[str]:
    """Return the lines of a `servers:` block; a secret is the name of a variable there."""
    named = list(table.servers.values())
    taken = set(table.servers)
    lines = ["servers:"]
    for one in examinations:
        server = one.server
        name = choose_name(one, named, taken)
        taken.add(name)
        variable = re.sub(r"[^A-Z0-9]+", "_", name.upper())
        record: dict[str, Any] = {"url": str(one.right_url or server.url)}
        if one.kind == "Ollama":
            record["api"] = "ollama"
        elif server.api != AUTO:
            record["api"] = server.api
        if server.api_key or any(a.status in (401, 403) for a in one.answers.values()):
            record["api_key"] = f"${{{variable}_KEY}}"
        if server.models is not None:
            record.update({"models": server.models} if server.models else {"discover": False})
        if server.headers:
            record["headers"] = {field: f"${{{variable}_FIELD}}" for field, _ in server.headers}
        if not server.verify:
            record["verify"] = False
        # This is YAML, too, and needs no thought about what has to be quoted.
        mark = "# " if one.problem and one.right_url is None else ""
        lines.append(f"  {mark}{json.dumps(name)}: {json.dumps(record)}")
    return lines


def examine(examinations: Sequence[Examination], look: Callable[[Examination], Any]) -> None:
    """Look at all servers at the same time, and wait until that is done."""
    # The end of the program does not wait for a daemon when Ctrl-C comes.
    threads = [threading.Thread(target=look, args=(e,), daemon=True) for e in examinations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_doctor(invocation: Invocation) -> int:
    """Ask servers what they are and what they can, and say what is wrong with them."""
    table = invocation.routes.load()
    known = {server.url: server for server in table.all_servers()}
    servers = list(known.values())
    if invocation.options.urls:
        servers = []
        for word in dict.fromkeys(invocation.options.urls):
            try:
                url = parse_upstream_url(word)
            except ValueError as error:
                raise ConfigError(f"doctor {word!r}: {error}") from None
            servers.append(known.get(url) or Server(url.without_scheme, url))
    settings, limits = invocation.settings, invocation.limits
    examinations = [Examination(server, settings, limits) for server in servers]
    count = count_things(servers, "server", "servers")
    print(f"asking {count}; a model may take {limits.probed_model_timeout:g} s", file=sys.stderr)
    examine(examinations, Examination.run)
    lines = describe_examinations(examinations)
    print(*lines, "", *write_servers(examinations, table), sep="\n")
    return 1 if any(one.problem for one in examinations) else 0


# --- looking at a configuration, and at a running router --------------------------------


# Without these settings nobody can tell what is wrong in the routing file, or in the certificate.
SETTINGS_OF_ROUTES = frozenset(("routes_config", "servers", "default_upstream"))
SETTINGS_OF_TLS = frozenset(("tls_cert", "tls_key"))


def find_mistakes_in_files(
    settings: Settings, routes: RoutesFile, wrong_settings: Container[str] = ()
) -> list[str]:
    """Return what is wrong in the files that the settings name, where these are right."""
    checks: list[Callable[[], Any]] = []
    if not any(name in wrong_settings for name in SETTINGS_OF_ROUTES):
        checks.append(routes.load)
    if not any(name in wrong_settings for name in SETTINGS_OF_TLS):
        checks.append(functools.partial(read_tls_context, settings))
    mistakes: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            mistakes += error.args
    return mistakes


def run_check(invocation: Invocation) -> int:
    """Validate settings and routing file, print the table."""
    mistakes = find_mistakes_in_files(invocation.settings, invocation.routes)
    if mistakes:
        raise ConfigError(*mistakes)
    table = invocation.routes.load()
    lines = describe_table(table)
    settings, limits = invocation.settings, invocation.limits
    examinations = [Examination(server, settings, limits) for server in table.all_servers()]
    if invocation.options.ask:
        examine(examinations, Examination.read_list)
    for one in examinations:
        server = one.server
        health = f": {describe_health(one)}" if invocation.options.ask else ""
        lines.append(f"  server {server.name}: {server.url} ({server.api}){health}")
    for alias in table.aliases.values():
        instances = ", ".join(str(instance) for instance in alias.instances)
        lines.append(f"  {alias} ({alias.strategy}): {instances}")
    for rule in table.rules:
        lines.append(f"  {rule.name}: {rule.match_text} -> {rule.target}")
    for pattern, target in table.model_map:
        lines.append(f"  map {pattern_text(pattern)} -> {target}")
    print(*lines, "ok", sep="\n")
    return 0


async def ask_lists(invocation: Invocation, table: RoutingTable) -> ModelLists:
    """Ask the servers of a table for their models, as a router does when it starts."""
    model_lists = ModelLists(Upstreams(invocation.settings, LoopBatch(invocation.limits)))
    model_lists.refresh_due(table)
    await model_lists.wait(table)
    return model_lists


def explain_by_lists(
    invocation: Invocation, table: RoutingTable, model: str, source_host: str
) -> tuple[Decision, list[str]]:
    """Return a decision by what the servers list now, and who has given no list, and why."""
    lists = asyncio.run(ask_lists(invocation, table))
    decision = resolve(table, model, source_host, lists.catalogue)
    if decision.found_by == BY_LIST:
        ages = tuple(lists.age(instance.server) for instance in decision.instances)
        decision = tell_ages(decision, ages)
    silent = []
    for server in table.asked_servers:
        if lists.catalogue.names_of(server) is None:
            reason = lists.upstreams.health_of(Instance(server)).error or "no answer"
            silent.append(f"  ! {server.name} has given no list of models: {reason}")
    return decision, silent


def run_explain(invocation: Invocation) -> int:
    """Print every rule tried for a model, and where the request would go."""
    model = invocation.options.model
    source_host = invocation.options.source_host
    if not is_address(source_host):
        raise ConfigError(f"--source-host {source_host!r}: no IP address")
    table = invocation.routes.load()
    decision = resolve(table, model, source_host)
    silent: list[str] = []
    if table.has_choice and decision.found_by in (BY_DEFAULT, UNCLAIMED):
        decision, silent = explain_by_lists(invocation, table, model, source_host)
    lines = [f"{model!r} from {source_host}"]
    for step in decision.trail:
        mark = "+" if step.matched else "-"
        lines.append(f"  {mark} {step.rule}: {step.why}")
    lines += silent
    lines.append(f"route: {decision.route} ({decision.strategy})")
    for instance in decision.instances:
        server = instance.server
        lines.append(f"  send {instance.model!r} to {server.name} ({server.url})")
    print(*lines, sep="\n")
    return 0


def run_token(invocation: Invocation) -> int:
    """Print a token; on stderr, how to end it before its time."""
    secret = invocation.settings.jwt_secret
    options = invocation.options
    if secret is None:
        raise ConfigError("JWT_SECRET is not set; set it to what the router has")
    claims: dict[str, Any] = {"jti": secrets.token_hex(8)}
    if options.models is not None:
        claims["models"] = options.models
    if options.rate is not None:
        claims["rate"] = str(options.rate)
    if options.api_only:
        claims["api_only"] = True
    print(encode_token(secret, options.subject, time.time(), options.days, **claims))
    complain(f'to end this token early, add `revoked: ["{claims["jti"]}"]` to the routing file')
    return 0


def run_export(invocation: Invocation) -> int:
    """Print logged requests, newest first: JSON lines, CSV or chats for fine-tuning."""
    options = invocation.options
    settings = invocation.settings
    # The flags are read by the rules of /api/export's query, where no value is like no parameter.
    given = {name: getattr(options, name) or "" for name in EXPORT_PARAMETERS}
    try:
        parameters = read_parameters(urllib.parse.urlencode(given), EXPORT_PARAMETERS)
        store = Store(settings, invocation.limits)
        if not os.path.exists(store.path):
            raise ConfigError(f"export: nothing has been logged (DB_PATH={settings.db_path!r})")
        # Each page comes with the row before which the next one begins; 0 is the end.
        while parameters.get("before", 1):
            with open_for_reading(store.path) as db:
                page, parameters["before"] = export_page(store, db, parameters)
            sys.stdout.buffer.write(page)
    except BadRequest as error:
        raise ConfigError(f"export: {error}") from None
    except sqlite3.Error as error:
        raise ConfigError(f"export: {error} (DB_PATH={settings.db_path!r})") from None
    return 0


def run_health(invocation: Invocation) -> int:
    """Ask a running router whether it is well."""
    import http.client

    settings = invocation.settings
    # A router that listens on all addresses answers on the loopback address, too.
    own_addresses = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = own_addresses.get(settings.listen_host, settings.listen_host)
    connection = http.client.HTTPConnection(host.strip("[]"), settings.listen_port, timeout=3)
    if settings.tls_cert:
        # Any certificate will do. It is for the name that clients use, and not for this address;
        # the question goes to this machine, holds no secret, and its answer opens nothing.
        tls_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls_context.check_hostname = False
        tls_context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            connection.host, connection.port, timeout=3, context=tls_context
        )
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            print(response.read(1000).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException) as error:
            print(f"{host}:{settings.listen_port}: {describe(error)}", file=sys.stderr)
            return 1
    return 0 if response.status == 200 else 1


# --- a systemd unit ---------------------------------------------------------------------

UNIT = """[Unit]
Description=SmolRouter, one address for local language models
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
{environment}
# Secrets (JWT_SECRET=...) belong into this file, mode 0600:
EnvironmentFile=-/etc/smolrouter.env
Restart=on-failure
TimeoutStopSec={stop}
StateDirectory=smolrouter
StateDirectoryMode=0700
WorkingDirectory=%S/smolrouter
UMask=0077
{sandbox}

[Install]
WantedBy=multi-user.target
"""
# What the unit may not do, should somebody take the router over: each on a line of its own.
SANDBOX = """DynamicUser=yes LockPersonality=yes MemoryDenyWriteExecute=yes NoNewPrivileges=yes
PrivateDevices=yes PrivateTmp=yes PrivateUsers=yes ProtectClock=yes ProtectControlGroups=yes
ProtectHome=read-only ProtectHostname=yes ProtectKernelLogs=yes ProtectKernelModules=yes
ProtectKernelTunables=yes ProtectProc=invisible ProtectSystem=strict ProcSubset=pid
RemoveIPC=yes RestrictNamespaces=yes RestrictRealtime=yes RestrictSUIDSGID=yes
CapabilityBoundingSet= AmbientCapabilities= RestrictAddressFamilies=AF_INET
RestrictAddressFamilies=AF_INET6 SystemCallArchitectures=native
SystemCallFilter=@system-service SystemCallFilter=~@privileged SystemCallFilter=~@resources"""
# Folders that a unit's own user cannot see: homes, and those that PrivateTmp replaces.
HIDDEN_FOLDERS = ("/root/", "/home/", "/tmp/")
# systemd waits so many seconds longer than SHUTDOWN_GRACE before it kills.
STOP_MARGIN = 4


def quote_for_systemd(text: object) -> str:
    """Quote a word of a unit: systemd reads the escapes of JSON, and `%` as its own."""
    return json.dumps(str(text), ensure_ascii=False).replace("%", "%%")


def unit_warnings(settings: Settings, program: Iterable[str]) -> Iterator[str]:
    """Yield why a unit could not start."""
    for path in program:
        if path.startswith(HIDDEN_FOLDERS):
            yield f"the unit cannot reach {path}; use a copy and a Python under /usr or /opt"
    port = settings.listen_port
    if 0 < port < 1024:
        yield f"the unit may not open port {port}; use one above 1023"
    if settings.tls_key:
        yield f"the unit runs as a user of its own, who has to be able to read {settings.tls_key}"


def run_unit(invocation: Invocation) -> int:
    """Print a systemd unit for this file and these settings."""
    settings = invocation.settings
    program = (sys.executable, str(pathlib.Path(__file__).resolve()))
    for words in unit_warnings(settings, program):
        print(f"warning: {words}", file=sys.stderr)
    environment = []
    for name, given in sorted(invocation.given.items()):
        # Anybody may read a unit.
        if name == "jwt_secret":
            continue
        text = given.text
        # The unit runs in another folder.
        if name in ("routes_config", "tls_cert", "tls_key"):
            text = str(pathlib.Path(getattr(settings, name)).absolute())
        environment.append(f"Environment={quote_for_systemd(f'{name.upper()}={text}')}")
    command = [quote_for_systemd(path).replace("$", "$$") for path in program]
    unit = UNIT.format(
        command=" ".join([*command, "serve"]),
        environment="\n".join(environment),
        stop=int(settings.shutdown_grace) + STOP_MARGIN,
        sandbox="\n".join(SANDBOX.split()),
    )
    print(unit, end="")
    return 0


# --- the demo ---------------------------------------------------------------------------
# Three simulated model servers on loopback, a router in front of them, and half a minute of
# requests of all kinds: what a newcomer runs first. It writes to a temporary folder alone.

DEMO_WORDS = "The quick brown fox jumps over the lazy dog and is home before dinner."
DEMO_THOUGHT = "<think>The user wants a sentence. I will say one about a fox.</think>\n\n"


class DemoRequest(NamedTuple):
    """A request of the demo, and what it shows in words."""

    path: str
    model: str
    stream: bool
    words: str


DEMO_ROUTES = {
    "aliases": {"coding-assistant": {"instances": ["broken-box/llama3-8b", "thinker/qwen3-8b"]}},
    "routes": [
        {"match": {"model": "/70b$/"}, "route": {"upstream": "slow-box"}},
        {"match": {"model": "/^gpt-/"}, "route": {"upstream": "thinker", "model": "qwen3-8b"}},
    ],
}
# fmt: off
DEMO_REQUESTS = (
    DemoRequest("/v1/chat/completions", "gpt-4", True, "a renamed model; its <think> block is taken out"),  # noqa: E501
    DemoRequest("/v1/chat/completions", "coding-assistant", False, "an alias; the first server fails"),  # noqa: E501
    DemoRequest("/api/chat", "llama3-70b", True, "an Ollama client on an OpenAI server, slow"),
    DemoRequest("/api/chat", "coding-assistant", False, "an Ollama client and failover"),
    DemoRequest("/v1/chat/completions", "llama3-8b", True, "the default upstream"),
)
# fmt: on


def demo_head(model: str) -> dict[str, Any]:
    """Return what each document of a simulated answer begins with."""
    return {"id": "chatcmpl-demo", "created": int(time.time()), "model": model}


def demo_usage(texts: Sequence[str]) -> dict[str, int]:
    """Return the usage of a simulated answer: a token for each text."""
    return {
        "prompt_tokens": 12,
        "completion_tokens": len(texts),
        "total_tokens": 12 + len(texts),
    }


def demo_completion(model: str, texts: Sequence[str]) -> bytes:
    """Return a whole chat answer."""
    message = {"role": "assistant", "content": "".join(texts)}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return encode_json({**demo_head(model), "choices": [choice], "usage": demo_usage(texts)})


def demo_events(model: str, texts: Sequence[str]) -> list[bytes]:
    """Return the events of a streamed chat answer."""
    head = demo_head(model)
    choices: list[dict[str, Any]] = []
    for text in texts:
        choices.append({"index": 0, "finish_reason": None, "delta": {"content": text}})
    choices.append({"index": 0, "finish_reason": "stop", "delta": {}})
    documents = [{**head, "choices": [choice]} for choice in choices]
    documents.append({**head, "choices": [], "usage": demo_usage(texts)})
    return [SSE.encode(data) for data in (*map(encode_json, documents), DONE_MARK)]


@dataclasses.dataclass(frozen=True)
class DemoServer:
    """A simulated model server: how it behaves, and the model that it lists."""

    name: str
    model: str
    # Seconds between two words.
    delay: float = 0.05
    thinks: bool = False
    fails: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request as a model server does, and end the connection."""
        # The demo ends while answers run; Python 3.11 would print a traceback for each.
        ended = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ended):
            data = await reader.readuntil(b"\r\n\r\n")
            head = parse_request_head(data.removesuffix(b"\r\n\r\n"))
            content = await reader.readexactly(head.framing.length)
            status, media_type, pieces = self.answer(head.method, json.loads(content or "{}"))
            start = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nConnection: close\r\n\r\n"
            writer.write(start.encode())
            for piece in pieces:
                await asyncio.sleep(self.delay)
                writer.write(piece)

    def answer(self, method: str, document: dict[str, Any]) -> tuple[str, str, list[bytes]]:
        """Return status, media type and the pieces of the content."""
        if method == "GET":
            return "200 OK", "application/json", [encode_json({"data": [{"id": self.model}]})]
        if self.fails:
            error = encode_openai_error(Unavailable("the model is being loaded"))
            return "503 Service Unavailable", "application/json", [error]
        words = DEMO_WORDS.split()
        count = 4 + secrets.randbelow(len(words) - 3)
        texts = [f"{word} " for word in words[:count]]
        if self.thinks:
            texts.insert(0, DEMO_THOUGHT)
        if document.get("stream"):
            return "200 OK", "text/event-stream", demo_events(document["model"], texts)
        return "200 OK", "application/json", [demo_completion(document["model"], texts)]


DEMO_SERVERS = (
    DemoServer("slow-box", "llama3-70b", delay=0.3),
    DemoServer("thinker", "qwen3-8b", thinks=True),
    DemoServer("broken-box", "llama3-8b", fails=True),
)


def send_demo_request(port: int, request: DemoRequest) -> None:
    """Send a request through the router and print what came back. Raises OSError."""
    import http.client

    message = {"role": "user", "content": "Tell me about the fox."}
    document = {"model": request.model, "messages": [message], "stream": request.stream}
    fields = {"Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as router:
        router.request("POST", request.path, encode_json(document), fields)
        response = router.getresponse()
        served = response.getheader("X-SmolRouter-Model")
        size = len(response.read())
    outcome = f"{served}: {response.status}, {size} bytes ({request.words})"
    print(f"{request.path} {request.model} -> {outcome}", flush=True)


def send_demo_requests(port: int, seconds: float) -> None:
    """Send requests of all kinds through the router for a while."""
    import http.client

    end = time.monotonic() + seconds
    # Ctrl-C has ended the router when a request fails, and the demo is over.
    with contextlib.suppress(OSError, http.client.HTTPException):
        for request in itertools.cycle(DEMO_REQUESTS):
            if time.monotonic() > end:
                break
            send_demo_request(port, request)
            time.sleep(0.5)
        print(
            f"That was the demo. The router stays at http://127.0.0.1:{port}/ ; Ctrl-C ends it.",
            flush=True,
        )


def demo_settings(settings: Settings, urls: Mapping[str, str], folder: pathlib.Path) -> Settings:
    """Return the settings of the demo: its own servers, files and, if need be, port."""
    with socket.socket() as probe:
        port = settings.listen_port
        is_taken = port and probe.connect_ex(("127.0.0.1", port)) == 0
    return dataclasses.replace(
        settings,
        default_upstream=urls["thinker"],
        servers=(),
        model_map=(),
        listen_host="127.0.0.1",
        listen_port=0 if is_taken else port,
        tls_cert=None,
        tls_key=None,
        routes_config=str(folder / "routes.json"),
        db_path=str(folder / "requests.db"),
        blob_storage_path=str(folder / "blobs"),
    )


async def serve_demo(invocation: Invocation, folder: pathlib.Path) -> int:
    """Run the router in front of three upstreams of its own."""
    urls = {}
    for server in DEMO_SERVERS:
        started = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        urls[server.name] = f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}"
    (folder / "routes.json").write_bytes(encode_json({"servers": urls, **DEMO_ROUTES}))
    settings = demo_settings(invocation.settings, urls, folder)
    routes = RoutesFile(settings, {}, named=True)
    listeners = open_port(settings, invocation.limits)
    if not listeners:
        return 1
    of_demo = dataclasses.replace(invocation, settings=settings, given={}, routes=routes)
    router = Router(of_demo, listeners)

    def begin(port: int) -> None:
        print(
            f"Open http://127.0.0.1:{port}/ and watch; Ctrl-C ends the demo. Three simulated "
            "servers answer: one is slow, one thinks aloud, one fails.",
            flush=True,
        )
        seconds = invocation.options.seconds
        asyncio.get_running_loop().run_in_executor(None, send_demo_requests, port, seconds)

    return await router.run(begin)


def run_demo(invocation: Invocation) -> int:
    """Show the router at work with three upstreams of its own."""
    import tempfile

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="smolrouter-demo-") as folder:
        return asyncio.run(serve_demo(invocation, pathlib.Path(folder)))


# --- commands and flags -----------------------------------------------------------------

COMMANDS = (
    run_serve,
    run_check,
    run_explain,
    run_export,
    run_token,
    run_health,
    run_doctor,
    run_unit,
    run_demo,
)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line, as argparse calls it. Raises ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def flag_of(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader whose errors argparse shows; of another's it would only say "invalid"."""

    def parse_flag(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return parse_flag


def settings_parser() -> argparse.ArgumentParser:
    """Return a parser with a flag for every setting; a flag that is not given sets nothing."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("settings (each is an environment variable too)")
    for field in dataclasses.fields(Settings):
        words = f"{field.metadata['help']} ({field.metadata['default'] or 'unset'})"
        # argparse reads % as its own.
        words = words.replace("%", "%%")
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            # The flag alone says yes.
            group.add_argument(flag, metavar="VALUE", help=words, nargs="?", const="true")
        else:
            group.add_argument(flag, metavar="VALUE", help=words)
    return parser


def build_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name, and that of the whole command line as ""."""
    flags = settings_parser()
    parser = Parser(
        prog="smolrouter",
        parents=[flags],
        epilog=EPILOG,
        allow_abbrev=False,
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"SmolRouter {__version__}")
    parser.set_defaults(run=run_serve, dashboard="")
    subparsers = parser.add_subparsers(metavar="command")
    commands = {}
    for run in COMMANDS:
        name = run.__name__.removeprefix("run_")
        commands[name] = subparsers.add_parser(
            name, parents=[flags], help=run.__doc__, description=run.__doc__, allow_abbrev=False
        )
        commands[name].set_defaults(run=run)
    explain, export = commands["explain"], commands["export"]
    explain.add_argument("model", help="the name that a client would ask for")
    explain.add_argument("--source-host", default="127.0.0.1", help="the client's address")
    export.add_argument("--since", help="no older than 30m, 24h, 7d")
    export.add_argument("--model", help="of this model alone")
    export.add_argument("--format", help="jsonl (default), csv or openai")
    days = flag_of(number_between(0.001, 36500, whole=False))
    token = commands["token"]
    token.add_argument("--subject", required=True, help="whose token it is")
    token.add_argument("--days", type=days, default=30.0, help="how long it is valid (30)")
    token.add_argument(
        "--models", type=flag_of(parse_globs), help="for these alone: 'llama*,gpt-4'"
    )
    token.add_argument("--rate", type=flag_of(parse_rate), help="at most so many requests: 60/m")
    token.add_argument("--api-only", action="store_true", help="it opens no Web UI")
    seconds = flag_of(number_between(0, 3600, whole=False))
    commands["demo"].add_argument("--seconds", type=seconds, default=30.0)
    commands["check"].add_argument("--ask", action="store_true", help="tell how the servers are")
    commands["doctor"].add_argument("urls", nargs="*", metavar="URL", help="ask these instead")
    for command in (parser, commands["serve"], commands["demo"]):
        command.add_argument(
            "--dashboard", metavar="FILE", help="serve this page instead", default=argparse.SUPPRESS
        )
    return {"": parser, **commands}


def check_flags(parsers: Mapping[str, argparse.ArgumentParser], words: Sequence[str]) -> None:
    """Refuse a flag that does not exist, with the nearest one. Raises ConfigError.

    Of `--prot 8080` argparse would only say that there is no command 8080.
    """
    # Python takes 4 ms to import it.
    import difflib

    command = next((word for word in words if word in parsers), "")
    known_flags = re.findall(r"--?[a-z][a-z-]*", parsers[command].format_usage())
    previous = ""
    for word in words:
        if word == "--":
            break
        flag = word.partition("=")[0]
        is_value = previous in known_flags
        previous = word
        if is_value or not re.match("--?[A-Za-z]", word) or flag in known_flags:
            continue
        nearest = difflib.get_close_matches(flag.lower().replace("_", "-"), known_flags, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see smolrouter --help"
        raise ConfigError(f"unknown flag {flag}; {hint}")


def run_command(
    argv: Sequence[str] | None, environ: Mapping[str, str], limits: Limits = LIMITS
) -> int:
    """Parse the command line and run its command. Raises ConfigError."""
    parsers = build_parsers()
    try:
        options = parsers[""].parse_args(argv)
    except ConfigError:
        check_flags(parsers, sys.argv[1:] if argv is None else argv)
        raise
    given = Settings.find_given(environ, vars(options))
    settings, mistakes = Settings.read_given(given)
    routes = RoutesFile(settings, environ, named="routes_config" in given)
    if mistakes:
        in_files: Iterable[str] = ()
        if options.run is run_check:
            in_files = find_mistakes_in_files(settings, routes, mistakes)
        raise ConfigError(*mistakes.values(), *in_files)
    return options.run(Invocation(settings, given, routes, limits, options))


def ignore_hangup() -> None:
    """Let SIGHUP do nothing until the router can reload: it would end a program that starts."""
    # Windows has no such signal, and a thread may set none.
    with contextlib.suppress(AttributeError, ValueError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def open_standard_streams() -> int:
    """Give 0, 1 and 2 to /dev/null where they are closed; return one more descriptor of it.

    Otherwise a socket would get such a number, and a stray line of text would go to its client.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    # Python has no object for a stream that was closed when it began: print would do without,
    # and a flush would fail.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    return descriptor


def main(argv: Sequence[str] | None = None, limits: Limits = LIMITS) -> int:
    """Run the command line; return the exit status: 0, 1 (failed) or 2 (bad settings)."""
    ignore_hangup()
    spare = open_standard_streams()
    try:
        try:
            return run_command(argv, dict(os.environ), limits)
        finally:
            # Here and not at the interpreter's end, where nobody can say what went wrong.
            sys.stdout.flush()
    except ConfigError as error:
        for mistake in error.args:
            complain(mistake)
        return 2
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Nobody reads on, and the interpreter's own last flush must not fail.
        os.dup2(spare, 1)
        return 0
    except OSError as error:
        # The disk is full, say, on which stdout is a file.
        os.dup2(spare, 1)
        complain(describe(error))
        return 1
    finally:
        os.close(spare)


# ======================================================================================
# A  The page
# ======================================================================================
# A verbatim copy of dashboard.html; `python test_smolrouter.py --embed` writes it.

DASHBOARD_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>SmolRouter</title>
<!--
The page of SmolRouter: one file that fetches nothing from elsewhere. Its style and its script are
allowed by their hashes, so neither has attributes in the markup. The file reads top to bottom:
    Style      Colours, Ground, Frame, Controls, Small things, Overview, The table, Performance,
               Request, Compare, Narrow
    Document   the frame of each view; what changes is filled in by the script
    Script      1  Nodes              elements from data; hostile text stays text
                2  Figures            numbers, times and sizes as people read them
                3  Marks              a colour and a shape for each model
                4  The router         asking it, and saying what is wrong
                5  The address        it holds the state of a view
                6  Words              how a request ended, who served it
                7  Strip and servers  figures of the last day; a chip for each server
                8  Lanes              what runs and waits now
                9  Histogram          requests over time, and a span of it
               10  The table          rows, filters, and the way back to a row
               11  Chats              streams of answers, Try it, Explain
               12  Charts             scales, axes, points, lines
               13  Performance        leaderboard, scatter, figures over time
               15  Markdown           text of a model as nodes
               16  Request            one request as an X-ray
               18  Live               events, keys, which view the path means
-->
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 24 24' fill='none' stroke='%235b6ae0' stroke-width='2.5'%3E%3Cpath
 d='M3 12h6M9 12c5 0 4-7 11-7M9 12h11M9 12c5 0 4 7 11 7'/%3E%3C/svg%3E">
<style>
/* -- Colours: two schemes, one accent; text has a contrast of 4.5:1 wherever it stands ------- */
:root {
  --page: #f5f6fa; --card: #fff; --sunken: #f1f2f7; --hover: #f6f7fc; --line: #e4e6ef;
  --text: #1b1e28; --quiet: #5a6072; --edge: #8b91a5; --accent: #4150c0; --on-accent: #fff;
  --tint: #e6e9fb; --on-tint: #2a3690; --soft: #b9c0ee; --good: #146c3f; --good-tint: #dcf3e5;
  --warn: #7a4b00; --warn-tint: #fbeccb; --bad: #b3261e; --bad-tint: #fce4e1; --shade: #1019331f;
  --m0: #2563c9; --m1: #c2570c; --m2: #17824a; --m3: #8b3fc4; --m4: #0a7c8c;
  --m5: #c42a78; --m6: #80591c; --m7: #56657a; --m8: #6f7010; --m9: #c4312f;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1116; --card: #16191f; --sunken: #1c2028; --hover: #1b1f27; --line: #272c37;
  --text: #e7e9f1; --quiet: #a0a7b8; --edge: #70788c; --accent: #a8b4ff; --on-accent: #141a4a;
  --tint: #272e5c; --on-tint: #d8ddff; --soft: #4a5494; --good: #7fd8a4; --good-tint: #163222;
  --warn: #f2c46d; --warn-tint: #382b10; --bad: #ff9d94; --bad-tint: #401f1c; --shade: #0009;
  --m0: #7aa7ff; --m1: #ff9d5c; --m2: #5fd08e; --m3: #c99bff; --m4: #4fc9d8;
  --m5: #ff86bd; --m6: #d8a870; --m7: #a3b3c7; --m8: #cfcf55; --m9: #ff8b85;
} }
/* -- Ground ---------------------------------------------------------------------------------- */
* { box-sizing: border-box; } [hidden] { display: none !important; }
html { scrollbar-gutter: stable; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2, h3, h4, p, ul, ol, dl, dd, pre, figure, blockquote {
  margin: 0; padding: 0; list-style: none; }
h1, h2, h3, h4 { font-weight: 600; font-size: .9375rem; }
h1 > * { min-width: 0; } h1 { font-size: 1.25rem; line-height: 1.3; letter-spacing: -.01em; }
h3, .small { font-size: .8125rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
code, pre, .mono { font: .8125rem/1.5 ui-monospace, "Cascadia Mono", Menlo, monospace; }
pre, p.plain, div.plain { white-space: pre-wrap; }
bdi, td, dd, pre, p, .said, .isolate { unicode-bidi: isolate; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
.quiet, .small, dt { color: var(--quiet); } .number { text-align: right; white-space: nowrap; }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
.unseen, .skip:not(:focus) { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
  overflow: hidden; white-space: nowrap; }
/* -- Frame: bar, views, cards, drawers ------------------------------------------------------- */
.bar, main { max-width: 90rem; margin: 0 auto; padding: 0 1.25rem; }
main { padding-bottom: 3rem; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem; min-height: 3rem; }
.brand { display: flex; align-items: center; gap: .4rem; font-size: 1rem; font-weight: 650; }
.bar .brand { color: var(--text); } .brand svg { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .125rem; margin-right: auto; }
nav a { padding: .2rem .7rem; border-radius: 99px; color: var(--quiet); font-weight: 550; }
nav a:hover { background: var(--line); text-decoration: none; }
nav a[aria-current] { background: var(--tint); color: var(--on-tint); }
#live::before { content: "○ "; } #live.on::before { content: "● "; color: var(--good); }
.view { display: grid; gap: .5rem; grid-template-columns: minmax(0, 1fr); }
.wide-gap { gap: 1rem; } .stack { display: grid; gap: .75rem; align-content: start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .875rem 1rem; min-width: 0; }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; }
.line { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem .75rem; min-width: 0; }
.push { margin-left: auto; } .grow { flex: 1 1 10rem; min-width: 0; }
.trouble { padding: .6rem 1rem; margin-bottom: .5rem; border-radius: 10px; }
.empty { padding: 1rem 0 .5rem; color: var(--quiet); }
.empty strong { display: block; color: var(--text); }
.code { background: var(--sunken); color: var(--text); border-radius: 8px; margin: .4rem 0;
  padding: .6rem .8rem; max-height: 34rem; overflow: auto; }
.sign-in { max-width: 26rem; margin: 12vh auto 0; }
dialog { border: 1px solid var(--line); background: var(--card); color: var(--text); padding: 1rem;
  width: min(34rem, 100vw); max-width: 100vw; height: 100dvh; max-height: 100dvh;
  margin: 0 0 0 auto; box-shadow: 0 0 40px var(--shade); border-width: 0 0 0 1px; }
dialog::backdrop { background: var(--shade); }
/* -- Controls -------------------------------------------------------------------------------- */
button, .button, input, select, textarea { font: inherit; font-size: .8125rem; color: inherit; }
button, .button { background: none; border: 1px solid var(--edge); border-radius: 99px;
  padding: .15rem .75rem; color: var(--accent); font-weight: 550; white-space: nowrap; }
button:hover, .button:hover { background: var(--hover); text-decoration: none; }
button:not(:disabled) { cursor: pointer; } button:disabled { color: var(--quiet); }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.stop { color: var(--bad); } button.bare, .bare { border-color: transparent; }
.small-button { padding: 0 .55rem; font-size: .75rem; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem; align-items: end; }
label { display: grid; gap: .15rem; flex: 1 1 7rem; min-width: 0; font-size: .75rem;
  color: var(--quiet); } .wide { flex: 2.5 1 12rem; }
input, select, textarea { width: 100%; height: 2rem; padding: .2rem .55rem; color: var(--text);
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
textarea { resize: vertical; height: 6rem; } ::placeholder { color: var(--quiet); opacity: 1; }
summary { cursor: pointer; } select { padding-right: 0; }
.choice { display: inline-flex; border: 1px solid var(--line); border-radius: 99px; }
.choice button { border: 0; padding: .05rem .6rem; color: var(--quiet); }
.choice [aria-pressed=true] { background: var(--tint); color: var(--on-tint); }
/* -- Small things: badges, marks, strips of time --------------------------------------------- */
.badge { display: inline-block; padding: .05rem .55rem; border-radius: 99px; font-weight: 600;
  font-size: .8125rem; white-space: nowrap; }
.idle { background: var(--sunken); color: var(--quiet); }
.busy { background: var(--tint); color: var(--on-tint); }
.good, .badge.plain { background: var(--good-tint); color: var(--good); }
.warn { background: var(--warn-tint); color: var(--warn); }
.bad, .trouble { background: var(--bad-tint); color: var(--bad); }
.is-plain { color: var(--quiet); } .is-good { color: var(--good); } .is-warn { color: var(--warn);
  } .is-bad { color: var(--bad); }
.is-busy { color: var(--accent); }
.mark { width: .75em; height: .75em; margin-right: .4em; overflow: visible; flex: none; }
/* -- Overview: figures, servers, lanes, histogram -------------------------------------------- */
.strip { display: grid; grid-template-columns: auto repeat(9, minmax(0, 1fr)); padding: 0;
  overflow: hidden; }
.strip > * { padding: .4rem .8rem; border-left: 1px solid var(--line); color: inherit;
  min-width: 0; }
.strip > :first-child { border: 0; align-self: center; font-size: .75rem; color: var(--quiet); }
.strip a:hover { background: var(--hover); text-decoration: none; }
.strip span { display: block; font-size: .75rem; color: var(--quiet); }
.strip b { font-size: 1.125rem; font-weight: 600; letter-spacing: -.01em; white-space: nowrap; }
.strip small { font-size: .75rem; color: var(--quiet); margin-left: .3rem; }
.chips { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.chip { position: relative; } .chip > summary { display: flex; gap: .5rem; align-items: center;
  padding: .25rem .7rem; min-height: 2.1rem; background: var(--card); list-style: none;
  border: 1px solid var(--line); border-radius: 10px; }
.chip > summary::-webkit-details-marker { display: none; }
.chip > summary:hover { background: var(--hover); } .chip.loud >
  summary { border-color: var(--warn);
  background: var(--warn-tint); }
.chip b { flex: 0 2 auto; min-width: 4.5rem; } .chip .why { flex: 1 1 3rem; }
.chip[open] { z-index: 5; } .chip .panel { position: absolute; top: calc(100% + 4px); left: 0;
  width: max(100%, 20rem); max-width: calc(100vw - 2.5rem); background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: .75rem .9rem;
  box-shadow: 0 8px 30px var(--shade); }
.panel .models { max-height: 11rem; overflow: auto; }
.day { flex: none; width: 96px; height: 14px; margin-left: auto; }
.day rect { fill: var(--line); } .day .up { fill: var(--soft); } .day .run { fill: var(--accent); }
.day .down { fill: var(--bad); }
.lanes { padding: .35rem 1rem; max-height: 21rem; overflow: auto; }
.lane { display: grid; grid-template-columns: minmax(0, 1.3fr) minmax(0, .8fr) 6.5rem 4.5rem 9rem
  auto;
  gap: 0 .75rem; align-items: center; padding: .3rem 0; font-size: .8125rem; }
.lane + .lane { border-top: 1px solid var(--line); }
.lane .tail { grid-column: 1 / -1; display: flex; justify-content: flex-end; overflow: hidden;
  white-space: pre; font-size: .8125rem; color: var(--quiet); height: 1.3rem; }
.lane .tail bdi { overflow-wrap: normal; margin-right: auto; }
.histogram { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 .75rem;
  align-items: end; margin-top: .5rem; }
.histogram svg { display: block; width: 100%; height: 56px; cursor: crosshair; touch-action: pan-y;
  }
.histogram text { fill: var(--quiet); font-size: 11px; }
.answered { fill: var(--soft); } .failed { fill: var(--bad); }
.histogram .base { stroke: var(--line); } .chosen { fill: var(--accent); fill-opacity: .14; }
/* -- The table: rows of 34 px; on a narrow screen two lines of at most 64 px ----------------- */
table { width: 100%; border-collapse: collapse; font-size: .8125rem; }
th, td { padding: .4rem .5rem; border-top: 1px solid var(--line); text-align: left;
  vertical-align: middle; }
tr > :first-child { padding-left: 0; } tr > :last-child { padding-right: 0; }
th, th button { color: var(--quiet); font-size: .75rem; font-weight: 550; white-space: nowrap; }
th button { padding: 0; border: 0; width: 100%; text-align: inherit; }
td.number, th.number { text-align: right; }
[aria-sort=ascending] button::after { content: " ↑"; }
[aria-sort=descending] button::after { content: " ↓"; }
.scroll { overflow-x: auto; }
.rows { table-layout: fixed; margin-top: .25rem; } .rows th { padding: .15rem .5rem; border: 0; }
.rows td { height: 34px; padding: 0 .5rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.rows tr > :first-child { padding-left: 0; } .rows .c-time a { color: var(--quiet); }
.rows tbody tr { cursor: pointer; }
.rows tbody tr:hover, .rows tr:focus-within { background: var(--hover); }
.c-time { width: 4.4rem; } .c-client { width: 8%; } .c-model { width: 18%; } .c-server { width: 9%;
  }
.c-tokens { width: 7.4rem; } .c-speed { width: 3.8rem; } .c-first { width: 4.6rem; }
.c-duration { width: 8.5rem; } .c-status { width: 10.5rem; }
.fresh { animation: fresh 2.5s ease-out; } @keyframes fresh { from { background: var(--tint); } }
.took { display: flex; align-items: center; gap: .5rem; }
.took b { font-weight: 400; min-width: 3.3rem; text-align: right; }
.meter { display: flex; flex: 1; height: 8px; } .meter i { background: var(--accent); }
.meter i:first-child { border-radius: 2px 0 0 2px; } .meter i:last-child { border-radius: 0 2px
  2px 0; }
.meter .soft { background: var(--soft); }
/* -- Performance ----------------------------------------------------------------------------- */
.chart { position: relative; height: 25rem; } .chart.short-chart { height: 11rem; }
#leaders td, #leaders th { white-space: nowrap; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.chart > svg { position: absolute; width: 100%; height: 100%; }
.chart > svg[tabindex] { cursor: crosshair; }
.chart text { fill: var(--quiet); font-size: 12px; } .grid { stroke: var(--line); }
.guide { fill: none; stroke: var(--edge); stroke-dasharray: 2 5; }
.dots { fill: currentColor; fill-opacity: .55; stroke: currentColor; stroke-opacity: .8; }
.dots.hollow { fill: none; } .fit { stroke: currentColor; stroke-width: 1.5; fill: none; }
.ring { fill: none; stroke: var(--text); stroke-width: 2; }
.trace { fill: none; stroke: var(--accent); stroke-width: 1.75; } .knot { fill: var(--accent); }
.hint { position: absolute; left: 0; top: 0; pointer-events: none; max-width: 17rem; z-index: 2;
  padding: .5rem .75rem; background: var(--text); color: var(--page); border-radius: 10px; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .5rem;
  margin-top: .5rem; }
.legend button { color: var(--text); border-color: var(--line); white-space: normal; }
.legend [aria-pressed=false] { text-decoration: line-through; color: var(--quiet); }
.spread { display: inline-block; width: 7rem; height: 14px; vertical-align: middle; }
.spread line { stroke: var(--line); } .spread .point { stroke: var(--accent); stroke-opacity: .45; }
.spread .middle { stroke: var(--text); stroke-width: 2; }
/* -- Request --------------------------------------------------------------------------------- */
.xray { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: minmax(0, 5fr) minmax(0, 3fr); }
.reason { padding: .75rem 1rem; border-radius: 10px; font-weight: 550; white-space: pre-wrap; }
.trail { display: grid; gap: .35rem; font-size: .8125rem; }
.trail li { display: grid; grid-template-columns: 1.2rem minmax(0, 1fr); }
.phases { display: flex; gap: 2px; height: 1rem; border-radius: 6px; overflow: hidden; }
.phases i { min-width: 3px; } .key { margin-top: .4rem; font-size: .8125rem; gap: .15rem 1rem; }
.key i { display: inline-block; width: .65rem; height: .65rem; border-radius: 3px; }
.p-fail { background: repeating-linear-gradient(45deg, var(--bad) 0 4px, var(--bad-tint) 4px 7px); }
.p-queue { background: repeating-linear-gradient(45deg, var(--warn) 0 3px, var(--warn-tint) 3px
  6px); }
.p-wait { background: repeating-linear-gradient(90deg, var(--edge) 0 2px, var(--line) 2px 6px); }
.p-think { background: var(--soft); } .p-flow { background: var(--accent); }
.facts { display: grid; gap: .5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(8rem,
  1fr)); }
.facts dt { font-size: .75rem; } .facts .whole { grid-column: 1 / -1; } .notice { display: grid;
  gap: .25rem; }
.notice li::before { content: "⚠ "; }
.turn { padding: .5rem 0; } .turn + .turn { border-top: 1px solid var(--line); }
.turn > summary { display: flex; gap: .75rem; list-style: none; align-items: baseline; }
.turn > summary::before { content: "▸"; color: var(--quiet); width: .6rem; }
.turn[open] > summary::before { content: "▾"; } .turn[open] > summary .first { display: none; }
.turn h3 { flex: 0 1 auto; min-width: 5.5rem; color: var(--quiet); overflow-wrap: anywhere; }
.turn.assistant h3 { color: var(--accent); } .turn > .body { padding: .35rem 0 .25rem 1.35rem; }
.body { display: grid; gap: .5rem; grid-template-columns: minmax(0, 1fr); }
.said { unicode-bidi: plaintext; max-width: 52rem; max-height: 44rem; overflow: auto;
  font-size: .9375rem; line-height: 1.55; }
.said > * + * { margin-top: .6rem; } .said ul, .said ol { padding-left: 1.5rem; }
.said ul > li { list-style: disc; } .said ol > li { list-style: decimal; }
.said h4 { font-size: 1rem; } .said code:not(pre code) { background: var(--sunken);
  border-radius: 4px; padding: .05rem .3rem; } .said hr { border: 0; border-top: 1px solid
    var(--line); }
.said blockquote { border-left: 3px solid var(--line); padding-left: .8rem; color: var(--quiet); }
.said table { width: auto; font-size: .875rem; } .said td, .said th { border: 1px solid var(--line);
  padding: .25rem .6rem; }
.body img, .said img { display: block; max-width: min(100%, 24rem); max-height: 20rem;
  border-radius: 8px; image-rendering: auto; }
.body a:not([href]), .said a:not([href]) { color: inherit; text-decoration: none; }
.thought { padding-left: .8rem; color: var(--quiet); font-size: .8125rem;
  border-left: 3px solid var(--line); }
.fields { display: grid; grid-template-columns: fit-content(35%) minmax(0, 1fr); gap: .15rem 1rem; }
/* -- Compare --------------------------------------------------------------------------------- */
.lineup { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.difference ins { background: var(--good-tint); color: var(--good); text-decoration: none; }
.difference del { background: var(--bad-tint); color: var(--bad); }
/* -- Narrow, and calm ------------------------------------------------------------------------ */
#filter-button { display: none; }
@media (max-width: 75rem) {
  .c-client, .c-speed { display: none; }
  .strip { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .strip > :first-child { display: none; } .strip > :nth-child(-n+6) { border-bottom: 1px solid
    var(--line); }
  .xray, .pair { grid-template-columns: minmax(0, 1fr); }
  .xray > .parts { display: contents; } #story { order: 1; } #talk, #others, #raw { order: 2; }
}
@media (max-width: 56rem) {
  .bar, main { padding: .25rem .75rem; } .card { padding: .75rem; } .chart { height: 19rem; }
  .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); padding: 0; }
  .strip > * { padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
  .strip b { font-size: 1rem; } .lanes { padding: .35rem .75rem; }
  .lane { grid-template-columns: minmax(0, 1fr) auto auto; }
  .lane > .from { display: none; } .lane > .rate { display: none; }
  #filter-button { display: block; } #filters:not(.open) > label:not(.wide) { display: none; }
  #filters:not(.open) > button[type=reset] { display: none; }
  .rows, .rows tbody { display: block; } .rows thead { display: none; }
  .rows tr { display: grid; grid-template-columns: auto minmax(0, 1fr) auto; gap: 0 .6rem;
    border-top: 1px solid var(--line); padding: .45rem 0; }
  .rows td { display: none; height: auto; padding: 0; border: 0; width: auto; line-height: 1.35; }
  .rows .c-time, .rows .c-model, .rows .c-status, .rows .c-words, .rows .c-duration {
    display: block; } .rows .c-time, .rows .c-model { grid-row: 1; }
  .rows .c-status { grid-area: 1 / 3; max-width: 10rem; text-align: right; }
  .rows .c-words { grid-area: 2 / 1 / 3 / 3; color: var(--quiet); }
  .rows .c-duration { grid-area: 2 / 3; text-align: right; }
  nav { order: 9; width: 100%; } .bar { gap: .25rem .5rem; padding-top: .5rem; }
  #live { margin-left: auto; } .bar button { padding: .1rem .5rem; } .took { display: block; }
    .meter { display: none; }
  .trail li { font-size: .875rem; } .chip .panel { max-width: calc(100vw - 1.5rem); }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
</style>
</head><body>
<a class="skip" href="#main">Skip to the content</a>
<header class="bar">
  <a class="brand" href="/"><svg width="22" height="22" viewBox="0 0 24 24" fill="none"
    stroke="currentColor" stroke-width="2.25" stroke-linecap="round" aria-hidden="true"><path
    d="M3 12h6M9 12c5 0 4-7 11-7M9 12h11M9 12c5 0 4 7 11 7"/></svg>SmolRouter</a>
  <nav aria-label="Views"><a href="/">Overview</a><a href="/performance">Performance</a></nav>
  <span class="small" id="live" role="status">Asking</span>
  <button id="explain-button">Explain</button>
  <button id="try-button">Try it</button>
  <button id="sign-out" class="bare" hidden>Sign out</button>
</header>
<main id="main">
<noscript><p class="trouble">This page needs JavaScript; curl /api/logs does not.</p></noscript>
<div id="troubles" role="alert"></div>
<form class="card stack sign-in" id="sign-in" hidden><h1>Sign in</h1>
  <p class="quiet">This router asks for a token. On its machine,
    <code>smolrouter.py token --subject you</code> prints one.</p>
  <label>Token<input name="token" type="password" autocomplete="off" required></label>
  <p class="is-bad" id="sign-in-error" role="alert"></p>
  <button class="main">Sign in</button></form>
<div class="view" id="overview" hidden><h1 class="unseen">Overview</h1>
  <div class="card strip" id="strip" role="group" aria-label="Figures of the last 24 hours"></div>
  <div class="chips" id="servers" role="group" aria-label="Servers"></div>
  <section class="card lanes" aria-labelledby="lanes-title" tabindex="0">
    <h2 class="unseen" id="lanes-title">Running and waiting requests</h2>
    <div id="lanes"></div></section>
  <section class="card" aria-labelledby="rows-title">
    <h2 class="unseen" id="rows-title">Requests</h2>
    <form class="controls" id="filters" role="search" aria-label="Filter the requests">
      <label class="wide"><span class="unseen">Search</span><input name="q" type="search"
        placeholder="Search words, models, errors   /"></label>
      <button type="button" id="filter-button" aria-expanded="false">Filters</button>
      <label><span class="unseen">Model</span><input name="model" list="models"
        placeholder="Model"></label>
      <label><span class="unseen">Server</span><input name="upstream" list="upstreams"
        placeholder="Server"></label>
      <label><span class="unseen">Source</span><input name="source" list="sources"
        placeholder="Source"></label>
      <label><span class="unseen">Status</span><select name="status"><option value="">Any status
        <option value="error">Failed<option value="2xx">Answered (2xx)<option value="4xx">Refused
          (4xx)
        <option value="5xx">Server errors (5xx)<option value="429">Too many (429)<option
        value="499">Client left (499)</select></label>
      <label><span class="unseen">Service</span><select name="service_type"><option value="">Any
        service<option value="openai">OpenAI<option value="ollama">Ollama</select></label>
      <button type="reset">Clear</button></form>
    <p class="line" id="extra-filters" hidden></p>
    <div class="histogram"><div id="histogram"></div>
      <span class="choice" id="span" role="group" aria-label="Span of the histogram"><button
        type="button" value="1h">1 h</button><button type="button" value="24h">24 h</button><button
        type="button" value="7d">7 d</button></span></div>
    <table class="rows" id="rows" aria-label="Requests, newest first"><thead></thead>
      <tbody></tbody></table>
    <div id="rows-empty"></div>
    <p class="line"><a class="button" id="newest" hidden>Newest</a>
      <a class="button push" id="older" hidden>Older</a></p></section></div>
<div class="view wide-gap" id="performance" hidden><h1 class="unseen">Performance</h1>
  <form class="controls" id="lens" aria-label="What the figures are of">
    <label>Time<select name="hours"><option value="1">1 hour<option value="6">6 hours<option
      value="24" selected>24 hours<option value="168">7 days</select></label>
    <label>Model<input name="model" list="models" placeholder="Any"></label>
    <label>Server<input name="upstream" list="upstreams" placeholder="Any"></label>
    <label>Service<select name="service_type"><option value="">Any<option
      value="openai">OpenAI<option value="ollama">Ollama</select></label>
    <label>Across<select name="x"></select></label>
    <label>Up<select name="y"></select></label>
    <label>Scale<select name="scale"><option value="xy">Logarithmic<option value="none">Linear
      <option value="x">Log across<option value="y">Log up</select></label>
    <button type="button" id="export" disabled>Export CSV</button></form>
  <section class="card" aria-labelledby="leaders-title">
    <div class="heading"><h2 id="leaders-title">Models and the servers they ran on</h2>
      <span class="small">prefill and decode as fitted from the requests below</span></div>
    <div class="scroll" tabindex="0" role="region" aria-label="Leaderboard"><table id="leaders"
      ><thead></thead><tbody></tbody></table></div></section>
  <section class="card" aria-labelledby="chart-title">
    <div class="heading"><h2 id="chart-title"></h2><span class="small" id="chart-note"></span></div>
    <figure class="chart" id="chart"></figure>
    <p class="unseen" id="chart-says" role="status"></p>
    <div class="legend" id="legend" role="group" aria-label="Models shown"></div>
    <div id="chart-empty"></div></section>
  <div class="pair">
    <section class="card"><div class="heading"><h2>Tokens per second, by the hour</h2>
      <span class="small">dotted: the same hours before</span></div>
      <figure class="chart short-chart" id="speed-chart"></figure></section>
    <section class="card"><div class="heading"><h2>First token, median by the hour</h2>
      <span class="small">dotted: the same hours before</span></div>
      <figure class="chart short-chart" id="first-chart"></figure></section></div></div>
<div class="view wide-gap" id="request" hidden>
  <header class="heading" id="head"></header>
  <div class="xray"><div class="stack parts">
    <div id="reason" hidden></div>
    <section class="card" id="answer" aria-label="Answer" hidden></section>
    <section class="card" id="talk" hidden><h2>Conversation</h2><div id="turns"></div></section>
    <section class="card" id="others" hidden></section>
    <div class="stack" id="raw"></div></div>
  <section class="card stack" id="story" aria-label="What happened"></section></div></div>
</main>
<dialog id="try" aria-labelledby="try-title"><form class="stack" id="try-form">
  <h2 id="try-title">Try it</h2>
  <p class="small">A chat through the router, with a row of its own. Ctrl+Enter sends.</p>
  <label>Model or alias<input name="model" list="models" required></label>
  <p class="small" id="try-earlier"></p>
  <label>Message<textarea name="message">Say hello in one sentence.</textarea></label>
  <p class="line"><button class="main" id="try-send">Send</button>
    <button type="button" class="stop" id="try-stop" hidden>Stop</button>
    <button type="button" class="close push">Close</button></p>
  <p class="small" id="try-note" role="status"></p><p class="is-bad" id="try-error"
    role="alert"></p>
  <div class="said" id="try-answer" tabindex="0" aria-label="Answer"></div></form></dialog>
<dialog id="explain" aria-labelledby="explain-title"><div class="stack">
  <h2 id="explain-title">Explain</h2>
  <p class="small">Where would a request go, and why?</p>
  <form class="controls" id="explain-form">
    <label>Model<input name="explain" list="models"></label>
    <label>Source host<input name="from" placeholder="127.0.0.1"></label></form>
  <div id="explained" aria-live="polite"></div>
  <p class="line"><button type="button" class="close push">Close</button></p></div></dialog>
<datalist id="models"></datalist><datalist id="upstreams"></datalist>
<datalist id="sources"></datalist><datalist id="clients"></datalist>
<script type="application/json" id="request-data"></script>
<script>
"use strict";
// == 1  Nodes =================================================================================
// A view is a function from data to nodes. What comes from outside becomes a text node or the
// value of an attribute, never markup.
const byId = id => document.getElementById(id);
/** Make an element from `name.class`, maybe a record of attributes, and children. */
function build(space, tag, children) {
  const [name, ...kinds] = tag.split("."), element = document.createElementNS(space, name);
  if (kinds.length) element.setAttribute("class", kinds.join(" "));
  const more = children[0]?.constructor === Object ? children.shift() : {};
  for (const [key, value] of Object.entries(more)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(element.style, value);  // what the CSP allows
    else if (value || value === 0) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter(child => child || child === 0));
  return element;
}
const node = (tag, ...children) => build("http://www.w3.org/1999/xhtml", tag, children);
const drawn = (tag, ...children) => build("http://www.w3.org/2000/svg", tag, children);
/** A text from outside, cut; it is isolated, so that what turns text round ends with it. */
const named = (text, length = 60) => node("bdi", {title: clip(text, 500)}, clip(text, length));
const empty = (title, ...more) => node("div.empty", node("strong", title), more);
/** Give a parent these children; what is there already stays in place and keeps its focus. */
function arrange(parent, children) {
  for (const old of [...parent.childNodes]) if (!children.includes(old)) old.remove();
  children.forEach((child, at) => parent.childNodes[at] === child ||
    parent.insertBefore(child, parent.childNodes[at] ?? null));
}
/** Give a parent new children; what is false is none. */
const fill = (parent, ...children) =>
  parent.replaceChildren(...children.flat(9).filter(child => child || child === 0));
/** Set a text only when it changes, so that a screen reader hears it once. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
/** A button that copies by a selection: navigator.clipboard is missing on plain http. */
const copyNode = (label, text, impossible) => node("button", {disabled: impossible,
  onclick({target: button}) {
    const area = node("textarea.unseen", text());
    button.after(area);
    area.select();
    say(button, document.execCommand("copy") ? "Copied" : "Not allowed");
    area.remove();
    setTimeout(() => say(button, label), 1500);
  }}, label);
// == 2  Figures ===============================================================================
const known = value => value !== null && value !== undefined;
const given = format => value => known(value) ? format(value) : "–";
const count = given(value => Math.round(value).toLocaleString("en-US"));
const plain = given(value => String(+value.toPrecision(3)));
const clip = (text, most) => text?.length > most ? `${text.slice(0, most)}…` : String(text ?? "");
const short = url => clip(url, 60).replace(/^https?:\/\//, "");
const scaled = (units, from) => given(value => {
  const power = value < from ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  return (power ? (value / 1000 ** power).toPrecision(3) : count(value)) + units[power];
});
const brief = scaled(["", " k", " M", " G"], 1e4), bytes = scaled([" B", " kB", " MB", " GB"], 1e3);
const span = given(ms => {
  const minutes = Math.floor(ms / 60e3), rest = Math.floor(ms / 1000) % 60;
  if (ms < 999.5) return `${count(ms)} ms`;
  if (ms < 59950) return `${(ms / 1000).toFixed(ms < 9995 ? 2 : 1)} s`;
  if (minutes < 60) return `${minutes} min ${rest} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
});
const percent = share => `${plain(share * 100)} %`;
const local = given(time => new Date(time).toLocaleString("sv"));  // to the second
const clock = time => local(time).slice(11, 16);
/** Local time; the day too when it is not today. */
function moment(timestamp) {
  const [then, now] = [timestamp, Date.now()].map(local);
  return then.slice(0, 10) === now.slice(0, 10) ? then.slice(11) : then.slice(5, 16);
}
/** How long ago something was, in one unit: `3 min ago`. */
function ago(timestamp) {
  const seconds = (Date.now() - Date.parse(timestamp)) / 1000;
  const [unit, size] = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]
    .find(([, size]) => seconds >= size) ?? ["s", 1];
  return `${Math.max(0, Math.floor(seconds / size))} ${unit} ago`;
}
/** The value below which a share of the known ones lies. */
function quantile(values, share) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)];
}
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
// == 3  Marks =================================================================================
// A model's colour and shape follow from its name alone, so they are the same in every browser.
// The shape tells models apart without the colour. A shape is a path from its middle.
const SHAPES = [
  "m0-5a5 5 0 1 0 .01 0z", "m-4.5-4.5h9v9h-9z", "m0-6.2 6 10.8h-12z", "m0 6.2-6-10.8h12z",
  "m-3-5.5h6l3.2 5.5-3.2 5.5h-6l-3.2-5.5z", "m0-6.5 6.5 6.5-6.5 6.5-6.5-6.5z",
  "m-1.8-6h3.6v4.2h4.2v3.6h-4.2v4.2h-3.6v-4.2h-4.2v-3.6h4.2z",
  "m0-6.8 2 4.8h4.6l-3.6 3 1.2 4.8-4.2-2.8-4.2 2.8 1.2-4.8-3.6-3h4.6z"];
const COLOURS = 10;
/** The number of a name, from its characters alone (FNV-1a). */
function hashOf(name) {
  let hash = 2166136261;
  for (const one of clip(name, 256)) hash = Math.imul(hash ^ one.codePointAt(0), 16777619);
  return (hash ^ hash >>> 15) >>> 0;
}
const shapeOf = model => SHAPES[Math.floor(hashOf(model) / COLOURS) % SHAPES.length];
const colourOf = model => `var(--m${hashOf(model) % COLOURS})`;
const markNode = model => drawn("svg.mark", {viewBox: "-7 -7 14 14", "aria-hidden": "true"},
  drawn("path", {d: `M0 0${shapeOf(model)}`, style: {color: colourOf(model)},
    fill: "currentColor"}));
// == 4  The router ============================================================================
const app = {view: null, source: null, troubles: new Map(), turns: {}, lanes: new Map(),
  rows: new Map(), chips: new Map(), stats: null, running: [], bars: [], points: [], shown: [],
  leaders: [], meta: {}, request: null};
const isSignedIn = () => byId("sign-in").hidden;
const present = values => Object.entries(values ?? {}).filter(([, value]) => value);
const NO_ANSWER = "The router does not answer.";
/** Say that no answer came, and ask again soon. Throws an Error with the status 0. */
function miss() {
  app.source?.close();  // a box without power ends no connection
  showLive(false);
  clearTimeout(app.again);
  app.again = setTimeout(refresh, 2000);
  throw Object.assign(new Error(NO_ANSWER), {status: 0});
}
/** Show whether the router answers. */
function showLive(answers) {
  trouble("router", answers ? null : NO_ANSWER);
  byId("live").classList.toggle("on", answers);
  say(byId("live"), answers ? "Live" : "Not live");
}
/** Ask the router. Throws an Error that says why not; a 401 shows the sign-in form. */
async function ask(path, options = {signal: AbortSignal.timeout(15_000)}) {
  const answer = await fetch(path, {cache: "no-store", ...options})
    .catch(error => options.signal?.reason === "stopped" ? Promise.reject(error) : miss());
  showLive(true);
  if (answer.ok) return answer;
  let why = clip(await answer.text(), 500);
  try { const {error} = JSON.parse(why); why = error.message ?? error; } catch { /* no JSON */ }
  if (answer.status === 401 && path.startsWith("/api/") && isSignedIn()) showSignIn();
  throw Object.assign(new Error(why || `HTTP ${answer.status}`),
    {status: answer.status, headers: answer.headers});
}
const queryOf = values => new URLSearchParams(present(values));
const askJson = async (path, query) =>
  (await ask(`${path}?${queryOf(query)}`)).json().catch(miss);
const post = (path, value, more) => ask(path, {method: "POST", body: JSON.stringify(value ?? {}),
  headers: {"Content-Type": "application/json"}, ...more});
/** Show what is wrong until it is right again (no text), each text once. */
function trouble(name, text) {
  app.troubles.delete(name);
  if (text) app.troubles.set(name, `⚠ ${clip(text, 500)}`);
  const texts = [...new Set(app.troubles.values())], there = byId("troubles");
  if (there.textContent !== texts.join(""))
    there.replaceChildren(...texts.map(one => node("p.trouble", one)));
}
/** Load something and show it; the newest call wins, a failure is shown as trouble. */
async function load(name, query, show) {
  const turn = app.turns[name] = (app.turns[name] ?? 0) + 1;
  const isNewest = () => turn === app.turns[name];
  try {
    const value = await askJson(`/api/${name}`, query);
    if (isNewest()) { trouble(name, null); show(value); }
  } catch (error) {
    if (isNewest() && ![0, 401].includes(error.status)) trouble(name, error.message);
    if (!known(error.status)) throw error;
  }
}
/** Do work at once, and then at most once in `pause` ms, however often it is asked for. */
function paced(work, pause) {
  let busy = false, again = false;
  return async function run() {
    again = busy;
    if (busy || document.hidden || !isSignedIn()) return;
    busy = true;
    try { await work(); }
    finally { setTimeout(() => { busy = false; if (again) run(); }, pause); }
  };
}
// == 5  The address ===========================================================================
// It holds the state: a link reproduces the view. What is at its default is not in it.
const params = () => new URLSearchParams(location.search);
const valuesOf = form => Object.fromEntries(new FormData(form));
const amend = changes => history.replaceState(history.state, "", address(changes));
function address(changes) {
  const query = params();
  for (const [name, value] of Object.entries(changes)) {
    query.delete(name);
    for (const one of [value].flat()) if (one) query.append(name, one);
  }
  return location.pathname + (String(query) && `?${query}`);
}
const isOurs = /^(x|y|scale)$/;  // what the router is not asked; it says what it does not know
/** Let a form and the address say the same. */
function bindForm(form, changed) {
  const initial = valuesOf(form), soon = paced(changed, 200);
  for (const name in initial) fillField(form.elements[name], name, initial[name]);
  const update = () => {
    const values = valuesOf(form);
    for (const name in values) if (values[name] === initial[name]) values[name] = null;
    amend({...values, before: null});
    soon();
  };
  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", event => event.preventDefault());
}
/** Give a field what the address says; a value that a list does not have is added to it. */
function fillField(field, name, initial) {
  const value = params().get(name) ?? initial;
  field.value = value;
  if (!field.options || field.value === value) return;
  if (!isOurs.test(name)) field.append(node("option", {value}, clip(value, 40)));
  field.value = isOurs.test(name) ? initial : value;
}
/** Offer values for the fields of a kind, together with those offered before. */
function suggest(id, values) {
  const old = [...byId(id).children].map(option => option.value);
  const fresh = [...new Set(values)].filter(value => value && !old.includes(value));
  byId(id).append(...fresh.slice(0, 300 - old.length).map(value => node("option", {value})));
}
// == 6  Words =================================================================================
const hasFailed = attempt => attempt.error || attempt.status >= 400;
/** The name of an instance's model: an instance is `server/model`. */
const instanceModel = ({instance, upstream_url: url}) =>
  /\/(.+)/s.exec(instance.replace(url, "server"))?.[1];
/** The name of the server that was asked last, or its address. */
function serverOf({attempts, upstream_url: url}) {
  const last = attempts?.at(-1), name = last?.instance.split("/")[0];
  if (last && !last.instance.startsWith("http")) return name;
  return app.serverNames?.get(url) ?? short(url);
}
/** A model as it was asked for, and what it became. An alias that went nowhere has no mark. */
function modelNode(row) {
  const {original_model: asked, mapped_model: mapped, sent_model: sent, attempts} = row;
  const reached = sent || (attempts?.length ? instanceModel(attempts.at(-1)) : "");
  const name = reached || mapped || asked;
  return node("span", name ? [reached && markNode(reached), named(asked || name)] : "no model",
    asked && asked !== name && node("span.quiet", " → ", named(name)));
}
const REASONS = {client_closed: "client left", cancelled: "stopped", interrupted: "interrupted"};
const PHASES = {queued: "queued", waking: "waking", waiting: "waiting", streaming: "streaming"};
/** How a request ended: a kind, a sign and words, the reason before the code. */
function outcomeOf(row) {
  const {status_code: status, failed, is_inflight: runs, error_message: error} = row;
  const lost = (row.attempts ?? []).slice(0, -1).filter(hasFailed).length;
  if (runs) return ["busy", "…", PHASES[row.phase] ?? "running"];
  if (status === 499) return ["warn", "⚠", REASONS[error] ?? error ?? "client left"];
  if (failed) return [status === 429 ? "warn" : "bad", status === 429 ? "⚠" : "✕",
    REASONS[error] ?? error ?? `status ${status ?? "unknown"}`];
  if (row.warnings?.length) return ["warn", "⚠", wordsOfWarning(row.warnings[0])];
  return lost ? ["good", "✓", `answered at try ${lost + 1}`] : ["plain", "✓", "answered"];
}
/** A warning is a text, or a record with one. */
const wordsOfWarning = one => typeof one === "string" ? one : one.message ?? one.code ?? "warning";
function outcomeNode(row) {
  const [kind, sign, words] = outcomeOf(row);
  const more = words.startsWith("status") ? "" : row.status_code;
  return node(`span.is-${kind}`, {title: clip([words, more && `(${more})`].join(" "), 500)},
    `${sign} `, node("bdi", clip(words, 80)));
}
function tokensNode(row) {
  const both = [row.prompt_tokens, row.completion_tokens], guess = row.tokens_estimated;
  return node("span", {title: guess && "estimated: the server sent no usage"}, guess && "≈ ",
    both.some(known) ? both.map(brief).join(" → ") : "–");
}
function speedOf({completion_tokens: tokens, duration_ms: whole, ttft_ms: first}) {
  const ms = (whole ?? 0) - (first ?? 0);
  return tokens && ms > 0 ? tokens * 1000 / ms : null;
}
const exampleNode = () => {
  const model = byId("models").firstElementChild?.value ?? "NAME";
  return node("pre.code", `curl ${location.origin}/v1/chat/completions ` +
    `-H 'Content-Type: application/json' \\\n` +
    `  -d '${JSON.stringify({model, messages: [{role: "user", content: "Hello"}]})
      .replaceAll("'", "'\\''")}'\n\n` +
    `OPENAI_BASE_URL=${location.origin}/v1\nOLLAMA_HOST=${location.origin}`);
};
// == 7  Strip and servers =====================================================================
function showStats(stats) {
  app.stats = stats;
  showStrip();
  trouble("log", stats.log.error &&
    `The request log is in trouble, requests are relayed all the same: ${stats.log.error}`);
}
/** One strip of figures; a click on one filters the table, or opens what it is about. */
function showStrip() {
  const stats = app.stats ?? {latency_ms: {}, ttft_ms: {}}, errors = stats.error_rate;
  const queued = app.running.filter(({phase}) => phase === "queued").length;
  const speed = "/performance?y=tokens_per_second", first = "/performance?y=ttft_ms";
  const cells = [
    ["Requests", count(stats.recent_requests), "", address(CLEARED)],
    ["Tokens in", brief(stats.prompt_tokens), "", "/performance?x=prompt_tokens"],
    ["Tokens out", brief(stats.completion_tokens), "", "/performance"],
    ["Tokens/s", plain(stats.tokens_per_second), "median", speed],
    ["First token", span(stats.ttft_ms.p50), "p50", first],
    ["First token", span(stats.ttft_ms.p95), "p95", first],
    ["Errors", count(known(errors) ? errors * stats.recent_requests : null),
      known(errors) ? percent(errors) : "", address({...CLEARED, status: "error"})],
    ["Running", count(app.running.length - queued), "", address({...CLEARED, status: "running"})],
    ["Queued", count(queued), "", address({...CLEARED, status: "running"})],
  ];
  byId("strip").replaceChildren(node("span", "Last 24 h"), ...cells.map(
    ([label, value, more, href]) => node("a", {href, onclick: followHere},
      node("span", label), node("b", value), more && node("small", more))));
}
const STATES = {up: ["good", "✓", "up"], cooling: ["warn", "◔", "cooling"],
  down: ["bad", "✕", "down"], drain: ["warn", "⏸", "drained"],
  off: ["warn", "⏻", "off"], unknown: ["idle", "?", "not asked yet"]};
const stateOf = server => STATES[server.mode && server.mode !== "on" ? server.mode : server.state]
  ?? STATES.unknown;
const showTable = ({error}) => trouble("table", error && `The old routes stay in force: ${error}`);
/** Show a chip for each server; one that is open stays open. */
function showServers(servers) {
  app.serverNames = new Map(servers.map(({name, url}) => [url, name || short(url)]));
  suggest("upstreams", servers.map(server => server.name));
  suggest("models", servers.flatMap(server => server.models).slice(0, 100));
  const old = app.chips;
  app.chips = new Map(servers.map(server => [server.url, old.get(server.url) ?? chipNode()]));
  for (const server of servers) updateChip(app.chips.get(server.url), server);
  arrange(byId("servers"), [...app.chips.values()]);
}
const chipNode = () => node("details.chip", {onfocusout(event) {
  if (event.relatedTarget && !this.contains(event.relatedTarget)) this.open = false;
}}, node("summary"), node("div.panel.stack"));
function updateChip(chip, server) {
  const [kind, sign, word] = stateOf(server), name = server.name || short(server.url);
  const text = JSON.stringify(server);
  if (chip.text === text) return;
  const slots = server.slots ? `${server.inflight}/${server.slots}` : server.inflight || "";
  chip.text = text;
  chip.className = `chip${kind === "warn" || kind === "bad" ? " loud" : ""}`;
  fill(chip.firstChild, node(`span.is-${kind}`, {"aria-hidden": "true"}, sign),
    node("b.cut", named(name, 40)),
    node("span.small.why.cut", kind === "good" ? "" : word, node("span.unseen", word),
      server.last_error && kind !== "good" && [": ", named(server.last_error, 80)]),
    slots !== "" && node("span.small", {title: "running of slots"}, `▸ ${slots}`),
    server.queued > 0 && node("span.small.is-warn", `${server.queued} wait`), dayNode(server));
  if (!chip.lastChild.contains(document.activeElement))
    fill(chip.lastChild, panelNodes(server, kind, word));
}
/** What a server did in each of the last 24 hours: it was down, busy, up, or nobody asked it. */
function dayNode({hours}) {
  if (!hours) return node("span.push");
  const words = ({requests, errors, busy, down}) => down ? "down" : requests
    ? `${plural(requests, "request")}, ${errors} failed, busy ${percent(busy)}` : "not asked";
  return drawn("svg.day", {viewBox: "0 0 96 14", role: "img", "aria-label":
    `The last 24 hours: ${hours.filter(one => one.down).length} with failures to reach it`},
  hours.map((one, at) => {
    const high = Math.max(one.busy > 0 ? 2 : 0, Math.min(1, one.busy) * 14);
    const kind = one.down ? "rect.down" : one.requests ? "rect.up" : "rect";
    return drawn("g", drawn("title", `${23 - at} h ago: ${words(one)}`),
      drawn(kind, {x: at * 4, y: 0, width: 3, height: 14}),
      !one.down && high > 0 && drawn("rect.run", {x: at * 4, y: 14 - high, width: 3,
        height: high}));
  }));
}
function panelNodes(server, kind, word) {
  const facts = present({"Address": short(server.url), "API": server.api,
    "Last hour": known(server.requests) &&
      `${plural(server.requests, "request")}, ${server.errors} failed`,
    "Median": server.p50_ms && span(server.p50_ms), "Failures in a row": server.failures,
    "Models asked for": known(server.models_age_s) &&
      (server.models_age_s ? `${span(server.models_age_s * 1000)} ago` : "just now")});
  return [node("p.line", node(`span.badge.${kind}`, word),
    server.last_error && named(server.last_error, 300)),
  node("dl.fields.small", facts.map(([name, value]) => [node("dt", name), node("dd", value)])),
  node("p.small", plural(server.models.length, "model")),
  node("ul.models", {tabindex: server.models.length > 8 && 0}, server.models.map(model =>
    node("li", node("a", {href: address({...CLEARED, model}), onclick: followHere},
      markNode(model), named(model))))),
  server.mode && node("p.line", Object.entries({on: "On", drain: "Drain", off: "Off"}).map(
    ([state, label]) => node("button", {disabled: server.mode === state, value: state,
      onclick: () => setServer(server, state)}, label)),
  node("span.small", "Drained it ends what runs, off it is stopped."))];
}
async function setServer({name, url}, state) {
  await post(`/api/upstreams/${encodeURIComponent(name || short(url))}`, {state})
    .catch(error => trouble("server", error.message));
  document.activeElement?.blur();
  serversSoon();
}
// == 8  Lanes =================================================================================
/** Show what runs; the nodes of what still runs stay. */
function showLanes(rows) {
  const old = app.lanes, now = performance.now();
  app.running = rows;
  app.lanes = new Map(rows.map(row => {
    const key = `${row.id} ${row.sent_model}`, lane = old.get(key) ?? laneNode(row);
    rateOf(lane, row, now);
    return [key, Object.assign(lane, {row, since: now - row.elapsed_ms})];
  }));
  arrange(byId("lanes"), rows.length ? [...app.lanes.values()].map(lane => lane.element)
    : [node("p.quiet", "Nothing is running now.")]);
  showStrip();
  tick();
}
/** Remember how fast a lane's tokens come: over the last three seconds or so. */
function rateOf(lane, row, now) {
  const seen = lane.seen ??= [];
  seen.push([now, row.tokens]);
  while (seen.length > 4) seen.shift();
  const [[from, before]] = seen, ms = now - from;
  if (ms > 500) lane.rate = Math.max(0, row.tokens - before) * 1000 / ms;
}
function laneNode(row) {
  const phase = node("span"), time = node("span.number"), speed = node("span.number.small.rate");
  const text = node("bdi"), tail = node("div.tail", text), where = node("span.small.from.cut");
  return {phase, time, speed, text, tail, where, element: node("div.lane", {"data-id": row.id},
    node("a.cut", {href: `/request/${row.id}`}, modelNode(row)), where, phase, time, speed,
    stopNode(row.id), tail)};
}
const stopNode = id => node("button.stop.small-button", {async onclick({target: button}) {
  button.disabled = true;
  say(button, "Stopping");
  await post(`/api/inflight/${id}/cancel`).catch(() => lanesSoon());  // it has just ended
}}, "Stop");
const KINDS_OF_PHASES = {queued: "warn", waking: "warn", waiting: "busy", streaming: "good"};
const SIGNS_OF_PHASES = {queued: "◷", waking: "☾", waiting: "◌", streaming: "▸"};
/** Bring the texts of all lanes up to date. */
function tick() {
  for (const {row, since, phase, time, speed, text, tail, where, rate} of app.lanes.values()) {
    const passed = performance.now() - since;
    phase.className = `is-${KINDS_OF_PHASES[row.phase] ?? "busy"}`;
    say(phase, `${SIGNS_OF_PHASES[row.phase] ?? "◌"} ${PHASES[row.phase] ?? row.phase}`);
    say(time, passed < 59950 ? `${(passed / 1000).toFixed(1)} s` : span(passed));
    say(speed, row.tokens ? `${count(row.tokens)} tok` + (rate ? ` · ${plain(rate)}/s` : "") : "");
    say(where, [serverOf(row) || "no server yet", row.client ?? row.source_ip]
      .map(one => clip(one, 40)).join(" · "));
    tail.hidden = !row.text;
    say(text, clip(row.text ?? "", 200).replace(/\s+/g, " "));
  }
}
// == 9  Histogram =============================================================================
const SPANS = {"1h": 60, "24h": 24, "7d": 56};
const spanShown = () => SPANS[params().get("span")] ? params().get("span") : "24h";
const showBars = ({bars}) => { app.bars = bars; drawBars(); };
/** Bars of requests, failures at their foot; a drag over some of them filters the table. */
function drawBars() {
  const bars = app.bars, wide = byId("histogram").clientWidth;
  if (!bars.length || !wide) return;
  const most = Math.max(1, ...bars.map(bar => bar.answered + bar.failed));
  const step = wide / bars.length, width = Math.max(1, step - (step > 6 ? 2 : 1));
  const high = number => number ? Math.max(1.5, number / most * 38) : 0;
  const begin = +params().get("begin"), end = +params().get("end");
  const at = time => Math.max(0, Math.min(wide, (time - bars[0].begin) /
    (bars.at(-1).end - bars[0].begin) * wide));
  const svg = drawn("svg", {viewBox: `0 0 ${wide} 56`, tabindex: 0, role: "application",
    "aria-label": `Requests over time, at most ${count(most)} in a bar. ` +
      "Arrow keys choose a bar, Enter filters by it."},
  end > 0 && drawn("rect.chosen", {x: at(begin), y: 0, height: 42,
    width: Math.max(2, at(end) - at(begin))}),
  bars.map((bar, n) => drawn("g", drawn("title", barWords(bar)),
    drawn("rect", {x: n * step, y: 0, width: step, height: 42, fill: "transparent"}),
    drawn("rect.answered", {x: n * step, width, y: 42 - high(bar.answered) - high(bar.failed),
      height: high(bar.answered)}),
    drawn("rect.failed", {x: n * step, width, y: 42 - high(bar.failed),
      height: high(bar.failed)}))),
  drawn("line.base", {x1: 0, x2: wide, y1: 42.5, y2: 42.5}), barTicks(bars, step),
  drawn("rect.chosen", {y: 0, height: 42, width: 0}));
  followBars(svg, bars, step);
  byId("histogram").replaceChildren(svg);
}
const barWords = ({begin, end, answered, failed}) =>
  `${local(begin).slice(0, 16)} to ${clock(end)}: ` +
    `${count(answered)} answered, ${count(failed)} failed`;
const timeWords = (time, isDay) => isDay ? local(time).slice(5, 10) : clock(time);
/** Three or five times below the bars, the first and the last within the picture. */
function barTicks(bars, step) {
  const week = spanShown() === "7d", last = bars.length * step > 400 ? 4 : 2;
  return Array.from({length: last + 1}, (_, n) => drawn("text", {
    x: n / last * bars.length * step, y: 54,
    "text-anchor": n === 0 ? "start" : n === last ? "end" : "middle"},
  n === last ? "now" : timeWords(bars[Math.round(n / last * bars.length)].begin, week)));
}
function followBars(svg, bars, step) {
  const chosen = svg.lastChild, last = bars.length - 1;
  let from = null, to = null;
  const under = event => Math.max(0, Math.min(last,
    Math.floor((event.clientX - svg.getBoundingClientRect().left) / step)));
  const mark = () => {
    const [low, high] = [Math.min(from, to), Math.max(from, to)];
    chosen.setAttribute("x", low * step);
    chosen.setAttribute("width", (high - low + 1) * step);
    return {begin: String(bars[low].begin), end: String(bars[high].end)};
  };
  svg.addEventListener("pointerdown", event => {
    from = to = under(event);
    svg.setPointerCapture(event.pointerId);
    mark();
  });
  svg.addEventListener("pointermove", event => {
    if (from !== null && event.buttons) { to = under(event); mark(); }
  });
  svg.addEventListener("pointerup", () => { if (from !== null) filterBy(mark()); });
  svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move) { event.preventDefault(); from = to = Math.max(0, Math.min(last,
      (to ?? last) + move));
      mark(); chosen.append(drawn("title", barWords(bars[to]))); }
    if (event.key === "Enter" && to !== null) filterBy(mark());
  });
}
function chooseSpan({target}) {
  if (!target.value) return;
  amend({span: target.value === "24h" ? null : target.value});
  markSpan();
  loadBars();
}
function markSpan() {
  for (const button of byId("span").children)
    button.setAttribute("aria-pressed", String(button.value === spanShown()));
}
const loadBars = () => load("histogram", {span: spanShown()}, showBars);
// == 10  The table ============================================================================
const PAGE_LENGTH = 100;
const FILTERS = ["q", "model", "upstream", "client", "session", "source", "status", "service_type",
  "begin", "end"];
const CLEARED = Object.fromEntries([...FILTERS, "before"].map(name => [name, null]));
const COLUMNS = [
  ["time", "Time", row => node("a", {href: `/request/${row.id}`, onclick: remember},
    moment(row.timestamp))],
  ["client", "Client", row => named(row.client ?? row.source_ip, 45)],
  ["model", "Model", modelNode], ["server", "Server", row => named(serverOf(row), 40)],
  ["words", "Words", wordsNode], ["tokens", "Tokens in → out", tokensNode, "number"],
  ["speed", "Tok/s", row => plain(speedOf(row)), "number"],
  ["first", "First", row => span(row.ttft_ms), "number"],
  ["duration", "Duration", durationNode], ["status", "Status", outcomeNode],
];
/** What was asked and answered; path and service only where they are not a chat of OpenAI's. */
function wordsNode({preview, path, service_type: service, session}) {
  const usual = /\/(chat\/completions|messages|responses)$/.test(path) && service === "openai";
  const asked = preview?.asked, answered = preview?.answered;
  return node("span", {title: clip([asked, answered].filter(Boolean).join("\n→ "), 300) || null},
    !usual && node("span.quiet", clip(path, 40), asked && " · "), asked && named(asked, 120),
    answered && node("span.quiet", asked && " → ", named(answered, 120)),
    !asked && !answered && usual && node("span.quiet", "–"));
}
/** The duration and a bar of it on the row's own line; waiting is its light part. */
function durationNode({duration_ms: whole, ttft_ms: first}) {
  const bar = (kind, ms) => node(`i.${kind}`, {"data-ms": ms});
  return node("div.took", {title: known(first) ? `first token after ${span(first)}` : null},
    node("b", span(whole)), known(whole) && node("div.meter", {"aria-hidden": "true"},
      known(first) && bar("soft", first), bar("hard", whole - (first ?? 0))));
}
/** Give all bars of the table one scale: the longest of them is full. */
function scaleMeters(rows) {
  const longest = Math.max(1, ...rows.map(row => row.duration_ms ?? 0));
  for (const part of byId("rows").querySelectorAll(".meter i"))
    part.style.width = `${part.dataset.ms / longest * 100}%`;
}
const rowNode = (row, fresh) => node("tr", {class: fresh && "fresh", "data-id": row.id,
  onclick(event) {
    if (!event.target.closest("a") && !String(getSelection())) this.querySelector("a").click();
  }}, COLUMNS.map(([name, , view, kind]) =>
  node("td", {class: [`c-${name}`, kind].filter(Boolean).join(" ")}, view(row))));
function showRows(rows) {
  const old = app.rows, keyOf = row => `${row.id} ${row.completed_at}`;
  app.rows = new Map(rows.map(row =>
    [keyOf(row), old.get(keyOf(row)) ?? rowNode(row, old.size > 0)]));
  arrange(byId("rows").tBodies[0], [...app.rows.values()]);
  scaleMeters(rows);
  suggest("models", rows.flatMap(row => [row.original_model, row.mapped_model]));
  suggest("sources", rows.map(row => row.source_ip));
  suggest("clients", rows.map(row => row.client));
  byId("rows").hidden = !rows.length;
  byId("newest").hidden = !params().has("before");
  byId("newest").href = address({before: null});
  byId("older").hidden = rows.length < PAGE_LENGTH;
  byId("older").href = address({before: rows.at(-1)?.id});
  byId("rows-empty").replaceChildren(rows.length ? "" : nothingNode());
  sessionStorage.list = JSON.stringify(rows.map(row => row.id));
  returnToRow();
}
/** No rows: what was looked for and how to clear it, or what to do first. */
function nothingNode() {
  const sought = FILTERS.concat("before").map(name => [name, params().get(name)])
    .filter(([, value]) => value);
  if (!sought.length) return empty("No request yet.", "Point a client at this router, for example:",
    exampleNode(), "or send a first chat with “Try it” above; it appears here by itself.");
  return empty("No request matches.", node("p", "Looked for ", sought.map(([name, value], at) =>
    [at > 0 && ", ", `${LABELS[name] ?? name}: `, node("b", named(filterWords(name, value)))])),
  node("p", node("button", {onclick: () => filterBy({})}, "Clear the filters")));
}
const LABELS = {q: "words", upstream: "server", service_type: "service", begin: "from",
  end: "until",
  before: "before request"};
const filterWords = (name, value) => /^(begin|end)$/.test(name) ? local(+value).slice(0, 16)
  : value;
/** Filters that have no field of their own, each with a button that takes it away. */
function showExtraFilters() {
  const fields = byId("filters").elements, shown = [];
  for (const name of FILTERS) {
    const value = params().get(name);
    if (value && !fields[name] && name !== "end") shown.push([name, value]);
  }
  const words = ([name, value]) => name === "begin"
    ? `${local(+value).slice(0, 16)} to ${local(+params().get("end")).slice(5, 16)}`
    : `${LABELS[name] ?? name}: ${clip(value, 60)}`;
  byId("extra-filters").hidden = !shown.length;
  byId("extra-filters").replaceChildren(...shown.map(one => node("button", {onclick: () =>
    filterBy({...Object.fromEntries(params()), [one[0]]: null, ...one[0] === "begin" &&
      {end: null}})},
  node("bdi", words(one)), " ✕")));
}
/** Filter by these values alone, in the fields and in the address. */
function filterBy(values) {
  const form = byId("filters");
  amend({...CLEARED, ...values});
  for (const field of form.elements) if (field.name) fillField(field, field.name, "");
  showFilters();
  loadRows();
  drawBars();
}
function showFilters() {
  const number = FILTERS.filter(name => name !== "q" && name !== "end" &&
    params().has(name)).length;
  say(byId("filter-button"), number ? `Filters · ${number}` : "Filters");
  showExtraFilters();
}
/** Follow a link that leads to other filters of this view without loading the page again. */
function followHere(event) {
  const url = new URL(event.currentTarget.href);
  if (url.pathname !== location.pathname || event.ctrlKey || event.metaKey ||
    event.shiftKey) return;
  event.preventDefault();
  filterBy(Object.fromEntries(url.searchParams));
}
/** What the router is asked: plain words and `text:` search words, a part of a name is enough. */
function filterValues() {
  const values = {};
  for (const name of FILTERS) values[name] = params().get(name);
  if (values.q) values.q = values.q.replace(/(^|\s)text:/g, "$1");
  return values;
}
const loadRows = () => load("logs", {...filterValues(), limit: PAGE_LENGTH,
  before: params().get("before")}, showRows);
/** Keep which row is left, and where it stands, for the way back. */
function remember({currentTarget: link}) {
  const row = link.closest("tr");
  history.replaceState({row: row.dataset.id, top: row.getBoundingClientRect().top}, "");
}
/** Focus the row that was left, where it stood; once, and only on the way back. */
function returnToRow() {
  const {row, top} = history.state ?? {};
  if (!row) return;
  history.replaceState(null, "");
  const place = byId("rows").querySelector(`tr[data-id="${Number(row)}"]`);
  if (!place) return;
  place.querySelector("a").focus({preventScroll: true});
  scrollBy(0, place.getBoundingClientRect().top - top);
}
const rowsSoon = paced(loadRows, 1000);
const statsSoon = paced(() => load("stats", {hours: 24}, showStats), 3000);
const lanesSoon = paced(() => load("inflight", null, showLanes), 500);
const serversSoon = paced(() => load("upstreams", null, showServers), 3000);
const tableSoon = paced(() => load("routes", null, showTable), 5000);
const barsSoon = paced(loadBars, 10_000);
function openOverview() {
  bindForm(byId("filters"), () => { showFilters(); return loadRows(); });
  byId("rows").tHead.append(node("tr", COLUMNS.map(([name, label, , kind]) =>
    node("th", {class: [`c-${name}`, kind].filter(Boolean).join(" "), scope: "col"}, label))));
  byId("filter-button").onclick = ({currentTarget: button}) => button.setAttribute("aria-expanded",
    String(byId("filters").classList.toggle("open")));
  byId("span").onclick = chooseSpan;
  markSpan();
  showFilters();
  new ResizeObserver(drawBars).observe(byId("histogram"));
  setInterval(() => document.hidden || tick(), 200);
  setInterval(() => app.lanes.size && lanesSoon(), 1000);
}
function refreshOverview() {
  for (const soon of [rowsSoon, statsSoon, lanesSoon, serversSoon, tableSoon, barsSoon]) soon();
}
// == 11  Chats ================================================================================
/** Yield the JSON documents of an event stream. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part = {}; !part.done;) {
    part = await reader.read();
    const lines = (text + (part.value ?? "")).split("\n");
    text = lines.pop();
    for (const line of lines) if (/^data: *\{/.test(line)) yield JSON.parse(line.slice(5));
  }
}
/** Send a conversation through the router; `show` gets the run whenever something has come. */
async function chat(model, messages, signal, show) {
  const run = {model, text: "", thinking: "", began: performance.now(), pieces: 0};
  const since = () => performance.now() - run.began;
  try {
    const answer = await post("/v1/chat/completions", {model, messages, stream: true,
      stream_options: {include_usage: true}}, {signal});
    readWay(run, answer.headers);
    for await (const {error, choices, usage} of eventsOf(answer.body)) {
      if (error) throw Object.assign(new Error(error.message), {status: 1});
      const delta = choices?.[0]?.delta ?? {}, thought = delta.reasoning_content ?? delta.reasoning;
      if (delta.content || thought) { run.first ??= since(); run.pieces += 1; }
      run.text += delta.content ?? "";
      run.thinking += thought ?? "";
      run.tokens = usage?.completion_tokens ?? run.tokens;
      run.whole = since();
      show(run);
    }
    run.done = true;
  } catch (error) {
    readWay(run, error.headers);
    run.error = signal.aborted ? "stopped" : known(error.status) ? error.message
      : "The answer broke off";  // the browser's own words help nobody
  }
  run.whole = since();
  show(run);
  return run;
}
/** Take from the head of an answer which way its request went. */
function readWay(run, headers) {
  run.id ??= headers?.get("X-SmolRouter-Request-Id");
  run.server ??= headers?.get("X-SmolRouter-Upstream");
  run.served ??= headers?.get("X-SmolRouter-Model");
}
/** What is known of a run, in words: server, first token, tokens per second, its request. */
function runWords(run) {
  const ms = run.whole - run.first, tokens = run.tokens ?? run.pieces;
  const server = run.server && (app.serverNames?.get(run.server) ?? short(run.server));
  return [run.served && [markNode(run.served), named(run.served, 40)],
    server && [" on ", named(server, 40)],
    known(run.first) && ` · first token ${span(run.first)}`,
    tokens > 0 && ` · ${plural(tokens, "token")}`,
    tokens > 1 && ms > 0 && ` · ${plain(tokens * 1000 / ms)} tok/s`,
    run.done || run.error ? ` · ${span(run.whole)}` : known(run.first) ? "" : " · waiting",
    run.id && [" · ", node("a", {href: `/request/${run.id}`}, "its request")]];
}
async function tryIt(event) {
  event.preventDefault();
  const form = byId("try-form"), {model, message} = valuesOf(form);
  if (app.trying || !form.reportValidity()) return;
  app.trying = new AbortController();
  byId("try-stop").hidden = false;
  byId("try-send").disabled = true;
  byId("try-answer").replaceChildren();
  const show = run => {
    fill(byId("try-note"), runWords(run));
    say(byId("try-error"), run.error ?? "");
    byId("try-answer").replaceChildren(...run.thinking
      ? [node("p.thought.plain", run.thinking)] : [], node("div.plain", run.text));
  };
  show({model, text: "", thinking: "", served: null});
  const messages = [...app.earlier ?? [], {role: "user", content: message}];
  const run = await chat(model, messages, app.trying.signal, show);
  if (run.text) byId("try-answer").replaceChildren(...run.thinking
    ? [node("p.thought.plain", run.thinking)] : [], ...markdownNodes(run.text));
  app.trying = null;
  byId("try-stop").hidden = true;
  byId("try-send").disabled = false;
  refresh();
}
const suggestModels = () => askJson("/v1/models").then(
  ({data}) => suggest("models", data.map(model => model.id)),
  error => say(byId("try-error"), error.message));
/** Open Try it, maybe with the conversation of a request. */
function openTry(model, messages) {
  const form = byId("try-form"), last = messages?.at(-1);
  const isText = last?.role === "user" && typeof last.content === "string";
  if (model) form.elements.model.value = model;
  if (messages) {
    app.earlier = isText ? messages.slice(0, -1) : messages;
    form.elements.message.value = isText ? last.content : "";
  }
  say(byId("try-earlier"), app.earlier?.length
    ? `After ${plural(app.earlier.length, "earlier message")} of that request.` : "");
  byId("try").showModal();
  suggestModels();
}
function openExplain() {
  byId("explain").showModal();
  suggestModels();
}
async function explain() {
  const {explain: model, from} = valuesOf(byId("explain-form"));
  if (!model) return byId("explained").replaceChildren();
  const query = {model, source_host: from || "127.0.0.1"};
  const {decision: goes, message} = await askJson("/api/routes", query).catch(error => error);
  byId("explained").replaceChildren(goes ? node("div.stack",
    node("p", goes.instances.length ? [named(goes.model), " goes by ", named(goes.route), " to"]
      : [named(goes.model), " is refused: nothing claims it"],
    goes.instances.map((one, at) => [at > 0 && ", else", " ", node("b", markNode(one.model),
      named(one.model)), " on ", named(one.server || short(one.url))])),
    stepsNode(goes.trail)) : node("p.is-bad", message ?? ""));
}
const stepsNode = steps => node("ol.trail", steps.map(({rule, matched, why}) =>
  node("li", node(matched ? "span.is-good" : "span.quiet", matched ? "✓" : "·"),
    node(matched ? "span" : "span.quiet", named(rule, 80), " ",
      node("span.quiet", named(why, 300))))));
// == 12  Charts ===============================================================================
const seconds = ms => ms < 1000 ? `${plain(ms)} ms` : `${plain(ms / 1000)} s`;
const AXES = {
  completion_tokens: ["Tokens generated", brief], prompt_tokens: ["Prompt tokens", brief],
  total_tokens: ["Total tokens", brief], duration_ms: ["Response time", seconds],
  ttft_ms: ["Time to first token", seconds], tokens_per_second: ["Tokens per second", plain],
};
const isTokens = axis => axis.endsWith("tokens"), isTime = axis => axis.endsWith("_ms");
/** Map values to pixels; on a logarithmic axis zero lies on the edge. Ticks: 1, 2, 5, tens. */
function scaleOf(values, log, from, to) {
  const most = Math.max(...values), least = Math.min(...values.filter(value => value > 0), most);
  const [low, high] = !log ? [0, most * 1.04 || 1] : most > 0 ? [least / 1.2, most * 1.2] : [1, 10];
  const bend = log ? Math.log : value => value, room = Math.max(3, Math.abs(to - from) / 90);
  const at = value => from + (to - from) *
    (bend(Math.max(value, low)) - bend(low)) / (bend(high) - bend(low));
  const share = part => log ? low * (high / low) ** part : high * part;
  const ticks = log ? logTicks(low, high, room) : linearTicks(high, room);
  return {at, low, high, share, ticks};
}
function linearTicks(high, room) {
  const ten = 10 ** Math.floor(Math.log10(high / room));
  const step = ten * [1, 2, 5, 10].find(digit => ten * digit >= high / room);
  return Array.from({length: Math.floor(high / step) + 1}, (_, n) => n * step);
}
/** Ticks at tens; at 1, 2 and 5 where there is room; even ones where a decade is not spanned. */
function logTicks(low, high, room) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const make = digits => Array.from({length: last - first + 1}, (_, n) =>
    digits.map(digit => digit * 10 ** (first + n))).flat().filter(at => at >= low && at <= high);
  const tens = make([1]), fine = make([1, 2, 5]);
  const sparse = tens.filter((_, at) => at % Math.ceil(tens.length / room) === 0);
  const ticks = fine.length <= room ? fine : tens.length > room ? sparse : tens;
  if (ticks.length >= 3) return ticks;
  if (fine.length >= 3) return fine;
  return [0.1, 0.5, 0.9].map(part => +(low * (high / low) ** part).toPrecision(2));
}
/** Axes and grid; where tokens meet time, also lines of equal speed. */
function frameNodes(x, y, [across, formatX], [up, formatY], speeds, {left, right, top, bottom}) {
  const text = (x, y, anchor, words) => drawn("text", {x, y, "text-anchor": anchor}, words);
  const line = (x1, y1, x2, y2) => drawn("line.grid", {x1, y1, x2, y2});
  // A label whose middle is near the edge would be cut there.
  const anchor = at => at > right - 24 ? "end" : "middle";
  return [text(0, 12, "start", `↑ ${up}`), text(right, bottom + 36, "end", `${across} →`),
    y.ticks.map(tick => [line(left, y.at(tick), right, y.at(tick)),
      text(left - 8, y.at(tick) + 4, "end", formatY(tick))]),
    x.ticks.map(tick => [line(x.at(tick), top, x.at(tick), bottom),
      text(anchor(x.at(tick)) === "end" ? right : x.at(tick), bottom + 18, anchor(x.at(tick)),
        formatX(tick))]),
    speeds.map(speed => speedLine(x, y, speed, top))];
}
function speedLine(x, y, speed, top) {
  const places = Array.from({length: 41}, (_, n) => x.share(n / 40))
    .map(tokens => [x.at(tokens), tokens / speed * 1000])
    .filter(([, ms]) => ms >= y.low && ms <= y.high).map(([at, ms]) => [at, y.at(ms)]);
  const [endX, endY] = places.at(-1) ?? [];
  return places.length > 8 && [drawn("polyline.guide", {points: places.join(" ")}),
    drawn("text", {x: endX - 4, y: Math.max(endY - 5, top + 10), "text-anchor": "end"},
      `${speed} tok/s`)];
}
const middleOf = sorted => sorted[Math.floor(sorted.length / 2)];
/** A straight line through most of the points (Theil and Sen): odd ones do not bend it. */
function fitOf(pairs) {
  const step = Math.max(1, pairs.length / 80), some = [];
  for (let at = 0; at < pairs.length; at += step) some.push(pairs[Math.floor(at)]);
  if (some.length < 5) return null;
  const slopes = [];
  for (const [at, [x1, y1]] of some.entries())
    for (const [x2, y2] of some.slice(at + 1)) if (x1 !== x2) slopes.push((y2 - y1) / (x2 - x1));
  const slope = middleOf(slopes.sort((a, b) => a - b));
  const base = middleOf(some.map(([x, y]) => y - slope * x).sort((a, b) => a - b));
  const across = some.map(([x]) => x);
  const isWide = Math.max(...across) > 1.5 * Math.min(...across) + 8;
  return slope > 0 && isWide ? {slope, base} : null;
}
/** Let the mouse and the arrow keys walk over the points; Enter or a click opens one. */
function followPoints(svg, ring, hint, places) {
  const sorted = [...places].sort((a, b) => a[0] - b[0] || a[1] - b[1]), last = sorted.length - 1;
  let now = null;
  const point = place => {
    now = place;
    hint.hidden = !place;
    ring.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    const [x, y, one] = place, {width, height} = svg.getBoundingClientRect();
    const shift = (at, far) => at > far / 2 ? `calc(${at - 14}px - 100%)` : `${at + 14}px`;
    ring.setAttribute("transform", `translate(${x} ${y})`);
    hint.replaceChildren(...hintNodes(one));
    hint.style.transform = `translate(${shift(x, width)}, ${shift(y, height)})`;
    say(byId("chart-says"), hint.innerText);
  };
  const near = event => {
    const {left, top} = svg.getBoundingClientRect();
    const away = ([x, y]) => Math.hypot(x - event.clientX + left, y - event.clientY + top);
    const best = places.reduce((a, b) => away(b) < away(a) ? b : a);
    return away(best) < 24 ? best : null;
  };
  const open = () => now && location.assign(`/request/${now[2].id}`);
  svg.addEventListener("pointermove", event => point(near(event)));
  svg.addEventListener("click", event => { point(near(event)); open(); });
  for (const name of ["pointerleave", "blur"]) svg.addEventListener(name, () => point(null));
  svg.addEventListener("keydown", event => {
    const at = sorted.indexOf(now);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last}[event.key];
    if (event.key === "Enter") open();
    if (to === undefined) return;
    event.preventDefault();
    point(sorted[Math.max(0, Math.min(to, last))]);
  });
}
const hintNodes = one => [[markNode(one.model), named(one.model)],
  `${app.serverNames?.get(one.upstream_url) ?? short(one.upstream_url)}, ${moment(one.timestamp)}` +
    (one.failed ? ", failed" : ""),
  `${count(one.prompt_tokens)} → ${count(one.completion_tokens)} tokens`,
  `${span(one.duration_ms)}, first ${span(one.ttft_ms)}, ${plain(one.tokens_per_second)} tok/s`,
].map(line => node("div", line));
// == 13  Performance ==========================================================================
function showPerformance({data_points: points, models, meta}) {
  Object.assign(app, {points, meta});
  suggest("models", models.map(one => one.model));
  if (!byId("chart").querySelector(".hint:not([hidden])")) showChart();  // somebody reads it
  showLeaders();
}
function showTrends({leaders, hours}) {
  Object.assign(app, {leaders, hours});
  showLeaders();
  showTimes();
}
function showChart() {
  const figure = byId("chart"), {x: xAxis, y: yAxis, scale, model} = valuesOf(byId("lens"));
  const hidden = new Set(params().getAll("hide")), all = app.points;
  const points = app.shown = all.filter(one =>
    !hidden.has(one.model) && known(one[xAxis]) && known(one[yAxis]));
  const left = all.length - points.length;
  const isUsual = xAxis === "completion_tokens" && yAxis === "duration_ms";
  say(byId("chart-title"), isUsual ? "Response time by tokens generated"
    : `${AXES[yAxis][0]} by ${AXES[xAxis][0].toLowerCase()}`);
  say(byId("chart-note"), plural(points.length, "request") +
    (app.meta.sampled ? `, an even sample of ${count(app.meta.total_points)}` : "") +
    (left ? `, ${count(left)} hidden or without these figures` : ""));
  showLegend(hidden);
  byId("chart-empty").replaceChildren(all.length ? "" : model
    ? empty("No request of this model is there.", "Choose another model, or a longer time.")
    : empty("No request in this range.", "Choose a longer one, or send one:", exampleNode()));
  figure.hidden = byId("export").disabled = !points.length;
  const {width, height} = figure.getBoundingClientRect();
  if (width > 0) figure.replaceChildren(...chartNodes(points, xAxis, yAxis, scale, width, height));
}
function chartNodes(points, xAxis, yAxis, scale, width, height) {
  const box = {left: 64, right: width - 8, top: 24, bottom: height - 42};
  const x = scaleOf(points.map(one => one[xAxis]), /x/.test(scale), box.left, box.right);
  const y = scaleOf(points.map(one => one[yAxis]), /y/.test(scale), box.bottom, box.top);
  const places = app.places = points.map(one => [x.at(one[xAxis]), y.at(one[yAxis]), one]);
  const ring = drawn("circle.ring", {r: 9, visibility: "hidden"});
  const hint = node("div.hint", {hidden: true});
  const label = `${plural(points.length, "request")}. ` +
    "Arrow keys go from one to the next, Enter opens one.";
  const speeds = isTokens(xAxis) && yAxis === "duration_ms" ? [1, 10, 100, 1000] : [];
  const fits = isTokens(xAxis) && isTime(yAxis) ? fitLines(points, xAxis, yAxis, x, y) : [];
  const svg = drawn("svg", {role: "application", tabindex: 0, "aria-label": label},
    frameNodes(x, y, AXES[xAxis], AXES[yAxis], speeds, box), dotNodes(places), fits, ring);
  followPoints(svg, ring, hint, places);
  return [svg, hint];
}
const groupsOf = (list, keyOf) => {
  const groups = new Map();
  for (const one of list) {
    const key = keyOf(one);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(one);
  }
  return groups;
};
/** All marks of a model are one path: thousands of elements would stall the browser. */
function dotNodes(places) {
  const groups = groupsOf(places, ([, , {model, failed}]) => `${failed ? 1 : 0} ${model}`);
  return [...groups.values()].map(group => {
    const {model, failed} = group[0][2], shape = shapeOf(model);
    const d = group.map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}${shape}`).join("");
    return drawn(failed ? "path.dots.hollow" : "path.dots", {d, style: {color: colourOf(model)}});
  });
}
/** For each model the line that its points lie round, as far as they reach. */
function fitLines(points, xAxis, yAxis, x, y) {
  const groups = groupsOf(points.filter(one => !one.failed), one => one.model);
  return [...groups].map(([model, group]) => {
    const fit = fitOf(group.map(one => [one[xAxis], one[yAxis]]));
    if (!fit) return null;
    const across = group.map(one => one[xAxis]), least = Math.max(Math.min(...across), x.low);
    const most = Math.max(...across);
    const places = Array.from({length: 33}, (_, n) => least + (most - least) * (n / 32) ** 2)
      .map(at => [x.at(at).toFixed(1), fit.base + fit.slope * at])
      .filter(([, ms]) => ms >= y.low && ms <= y.high).map(([at, ms]) => [at, y.at(ms).toFixed(1)]);
    return drawn("polyline.fit", {points: places.join(" "), style: {color: colourOf(model)},
      "data-model": clip(model, 100)});
  });
}
/** A button for each model; what is there stays, so that it keeps its focus. */
function showLegend(hidden) {
  const counts = new Map(), old = [...byId("legend").children];
  for (const {model} of app.points) counts.set(model, (counts.get(model) ?? 0) + 1);
  const buttons = [...counts].sort((a, b) => b[1] - a[1]).map(([model, number]) => {
    const button = old.find(one => one.model === model) ?? Object.assign(node("button",
      {onclick: () => toggleModel(model)}, markNode(model), named(model), node("span")), {model});
    button.setAttribute("aria-pressed", String(!hidden.has(model)));
    say(button.lastChild, ` ${count(number)}`);
    return button;
  });
  const note = old.find(one => one.matches(".small")) ?? node("span.small",
    "Filled: answered. Hollow: failed. Solid line: what most points of a model lie on; ",
    "dotted: equal speed.");
  arrange(byId("legend"), counts.size ? [...buttons, note] : []);
}
function toggleModel(model) {
  const hidden = new Set(params().getAll("hide"));
  if (!hidden.delete(model)) hidden.add(model);
  amend({hide: [...hidden]});
  showChart();
}
/** Rows as a table of CSV, below the names of their columns. */
function csvOf(rows) {
  const quoted = value => /[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  const lines = [Object.keys(rows[0] ?? {}), ...rows.map(row => Object.values(row))];
  return lines.map(line => line.map(value => quoted(String(value ?? ""))).join(",") + "\n");
}
/** Save the points that the chart shows now. */
function exportShown() {
  const href = URL.createObjectURL(new Blob(csvOf(app.shown), {type: "text/csv"}));
  node("a", {href, download: "smolrouter.csv"}).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);  // it is read after the click
}
const LEADERS = [
  ["Model", "model"], ["Server", "server"], ["Requests", "requests", count],
  ["Errors", "error_share", given(percent)], ["Tokens/s", "tokens_per_second", plain],
  ["Spread", "spread", null], ["First p50", "ttft_p50_ms", span], ["First p95", "ttft_p95_ms",
    span],
  ["Prefill tok/s", "prefill", plain], ["Decode tok/s", "decode", plain],
  ["Week before", "change", null],
];
/** What the points add to a row of sums: the spread of speeds, and what their lines say. */
function withFits(row, points) {
  const clean = points.filter(one => !one.failed && known(one.ttft_ms));
  const prefill = fitOf(clean.filter(one => known(one.prompt_tokens)).map(one =>
    [one.prompt_tokens - (one.cached_tokens ?? 0), one.ttft_ms]));
  const decode = fitOf(clean.filter(one => one.completion_tokens).map(one =>
    [one.completion_tokens, one.duration_ms - one.ttft_ms]));
  const speed = row.tokens_per_second, before = row.before?.tokens_per_second;
  return {...row, server: app.serverNames?.get(row.upstream_url) ?? short(row.upstream_url),
    error_share: row.requests ? row.errors / row.requests : null,
    speeds: points.filter(one => !one.failed).map(one => one.tokens_per_second).filter(known),
    prefill: prefill && 1000 / prefill.slope, decode: decode && 1000 / decode.slope,
    change: speed && before ? speed / before - 1 : null};
}
const sorting = () => params().get("sort") ?? "-requests";  // a minus is for descending
function showLeaders() {
  const table = byId("leaders"), by = sorting().replace("-", ""), down = sorting() !== by;
  const groups = groupsOf(app.points, one => JSON.stringify([one.model, one.upstream_url]));
  const rows = app.leaders.map(row =>
    withFits(row, groups.get(JSON.stringify([row.model, row.upstream_url])) ?? []));
  const compare = (a, b) => ((a[by] ?? -1) > (b[by] ?? -1)) - ((a[by] ?? -1) < (b[by] ?? -1));
  rows.sort((a, b) => down ? compare(b, a) : compare(a, b));
  for (const [at, [, key]] of LEADERS.entries()) table.tHead.rows[0].cells[at]
    .setAttribute("aria-sort", key !== by ? "none" : down ? "descending" : "ascending");
  const fastest = Math.max(1, ...rows.flatMap(row => quantile(row.speeds, .98) ?? 0));
  table.tBodies[0].replaceChildren(...rows.map(row => node("tr", LEADERS.map(([, key, format]) =>
    node("td", {class: format && "number"}, leaderCell(row, key, format, fastest))))));
  table.hidden = !rows.length;
}
function leaderCell(row, key, format, fastest) {
  if (key === "model") return node("span", markNode(row.model), named(row.model));
  if (key === "spread") return spreadNode(row.speeds, fastest);
  if (key === "change") return changeNode(row);
  if (key === "error_share" && row.errors) return node("span.is-bad", percent(row.error_share));
  return format ? format(row[key]) : named(row[key], 40);
}
/** A line for each speed, and a strong one in their middle. */
function spreadNode(speeds, fastest) {
  if (!speeds.length) return "–";
  const at = speed => 1 + Math.min(1, speed / fastest) * 110, some = speeds.slice(-120);
  const line = (kind, speed) => drawn(`line.${kind}`, {x1: at(speed), x2: at(speed), y1: 1,
    y2: 13});
  return drawn("svg.spread", {viewBox: "0 0 112 14", role: "img", "aria-label":
    `${plain(quantile(speeds, .1))} to ${plain(quantile(speeds, .9))} tokens per second for most`},
  drawn("line", {x1: 0, x2: 112, y1: 7, y2: 7}), some.map(speed => line("point", speed)),
  line("middle", quantile(speeds, .5)));
}
/** Faster or slower than in the week before, in words, a sign and a colour. */
function changeNode({change}) {
  if (!known(change)) return node("span.quiet", "–");
  if (Math.abs(change) < .03) return node("span.quiet", "as before");
  return change > 0 ? node("span.is-good", `▲ ${percent(change)} faster`)
    : node("span.is-bad", `▼ ${percent(-change)} slower`);
}
function sortBy(key) {
  const first = LEADERS.find(([, name]) => name === key)[2] ? `-${key}` : key;  // names from A
  amend({sort: sorting() === first ? first.startsWith("-") ? key : `-${key}` : first});
  showLeaders();
}
/** Two lines over time, each with the same hours of the day or week before. */
function showTimes() {
  for (const [id, key, format] of [["speed-chart", "tokens_per_second", plain],
    ["first-chart", "ttft_p50_ms", seconds]]) {
    const {width, height} = byId(id).getBoundingClientRect();
    if (width > 0) byId(id).replaceChildren(timeChart(app.hours ?? [], key, format, width, height));
  }
}
function timeChart(hours, key, format, width, height) {
  const half = hours.length / 2, before = hours.slice(0, half), now = hours.slice(half);
  const values = hours.map(one => one[key]).filter(known);
  if (!values.length) return node("p.quiet", "No figures in this time.");
  const box = {left: 56, right: width - 8, top: 8, bottom: height - 22};
  const x = at => box.left + (box.right - box.left) * at / Math.max(1, half - 1);
  const y = scaleOf(values, false, box.bottom, box.top);
  const path = list => list.map((one, at) => known(one[key]) && [at, y.at(one[key])]);
  return drawn("svg", {role: "img", "aria-label": `By the hour, now ${format(now.at(-1)?.[key])}`},
    y.ticks.map(tick => [drawn("line.grid", {x1: box.left, x2: box.right, y1: y.at(tick),
      y2: y.at(tick)}),
      drawn("text", {x: box.left - 8, y: y.at(tick) + 4, "text-anchor": "end"}, format(tick))]),
    [0, .25, .5, .75, 1].map(part => Math.round(part * (half - 1))).map(at => drawn("text",
      {x: x(at),
      y: height - 4, "text-anchor": at === 0 ? "start" : at === half - 1 ? "end" : "middle"},
    half > 24 ? local(now[at].begin).slice(5, 10) : clock(now[at].begin))),
    lineOf(path(before), x, "guide"), lineOf(path(now), x, "trace"),
    now.map((one, at) => known(one[key]) && drawn("circle.knot", {cx: x(at), cy: y.at(one[key]),
      r: half > 24 ? 1.5 : 2.5},
      drawn("title", `${local(one.begin).slice(0, 16)}: ${format(one[key])}, ` +
        `before ${format(before[at]?.[key])}`))));
}
/** A line through the places that are there; hours without a figure are gaps. */
function lineOf(places, x, kind) {
  let d = "", isOpen = false;
  for (const place of places) {
    if (place) d += `${isOpen ? "L" : "M"}${x(place[0]).toFixed(1)} ${place[1].toFixed(1)}`;
    isOpen = Boolean(place);
  }
  return drawn(`path.${kind}`, {d});
}
function lensValues() {
  const {hours, model, upstream, service_type} = valuesOf(byId("lens"));
  return {hours, model, upstream, service_type};
}
async function loadPerformance() {
  if (!app.serverNames) await load("upstreams", null, nameServers);
  await Promise.all([load("performance", {...lensValues(), limit: 2000}, showPerformance),
    load("trends", lensValues(), showTrends)]);
}
function nameServers(servers) {
  app.serverNames = new Map(servers.map(({name, url}) => [url, name || short(url)]));
  suggest("upstreams", servers.map(server => server.name));
}
const performanceSoon = paced(loadPerformance, 5000);
function openPerformance() {
  for (const [name, chosen] of [["x", "completion_tokens"], ["y", "duration_ms"]])
    byId("lens").elements[name].append(...Object.entries(AXES).map(([value, [label]]) =>
      node("option", {value, selected: value === chosen}, label)));
  byId("leaders").tHead.append(node("tr", LEADERS.map(([label, key, format]) => node("th",
    {class: format && "number", scope: "col"}, key === "spread" ? label
      : node("button", {onclick: () => sortBy(key)}, label)))));
  bindForm(byId("lens"), loadPerformance);
  byId("export").onclick = exportShown;
  new ResizeObserver(() => { showChart(); showTimes(); }).observe(byId("chart").parentNode);
}
// == 15  Markdown =============================================================================
// What models write, as nodes: no markup of theirs is ever read as such. Links lead to http and
// https alone; pictures from elsewhere are links, as everything that would be fetched.
const INLINE = new RegExp([
  "`([^`\\n]{1,2000})`", "\\*\\*([^*\\n]{1,2000})\\*\\*", "\\*([^*\\s][^*\\n]{0,2000})\\*",
  "~~([^~\\n]{1,2000})~~", "!?\\[([^\\]\\n]{0,500})\\]\\(([^()\\s]{1,2000})\\)",
  "(https?://[^\\s<>()\"'`]{1,2000})"].join("|"), "g");
const safeLink = (url, words) => node("a", {href: /^https?:\/\//i.test(url) && url,
  rel: "noreferrer", target: "_blank", title: clip(url, 300)}, words);
/** Read what stands in a line: code, bold, italic, struck, links. */
function inlineNodes(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, bold, italic, struck, words, target, url] = found;
    nodes.push(text.slice(at, found.index));
    at = found.index + whole.length;
    nodes.push(code ? node("code", code) : bold ? node("strong", inlineNodes(bold))
      : italic ? node("em", inlineNodes(italic)) : struck ? node("s", inlineNodes(struck))
        : target ? pictureOrLink(whole, words, target) : safeLink(url, url));
  }
  return [...nodes, text.slice(at)];
}
const pictureOrLink = (whole, words, url) => whole[0] === "!" && isPicture(url)
  ? node("img", {src: url, alt: words || "Image"}) : safeLink(url, words || url);
/** Each kind of block: how its first line looks, and a reader that eats lines. */
const BLOCKS = [
  [/^ {0,3}(`{3,}|~{3,})/, readFence], [/^#{1,6}\s/, readHeading],
  [/^ {0,3}([-*_])( *\1){2,} *$/, lines => { lines.shift(); return node("hr"); }],
  [/^>/, readQuote], [/^\s*([-*+]|\d{1,9}[.)])\s+\S/, readList], [/^\s*\|.*\|\s*$/, readTable]];
function markdownNodes(text) {
  const lines = String(text).split("\n"), nodes = [];
  while (lines.length) {
    if (!lines[0].trim()) { lines.shift(); continue; }
    const [, read] = BLOCKS.find(([begin]) => begin.test(lines[0])) ?? [null, readParagraph];
    nodes.push(read(lines));
  }
  return nodes;
}
function readFence(lines) {
  const mark = /^ {0,3}(`{3,}|~{3,})/.exec(lines.shift())[1], code = [];
  while (lines.length && !lines[0].trim().startsWith(mark)) code.push(lines.shift());
  lines.shift();
  return node("pre.code", {tabindex: 0}, node("code", code.join("\n")));
}
function readHeading(lines) {
  return node("h4", inlineNodes(lines.shift().replace(/^#+\s+|\s+#+\s*$/g, "")));
}
function readQuote(lines) {
  const quoted = [];
  while (/^>/.test(lines[0] ?? "")) quoted.push(lines.shift().replace(/^> ?/, ""));
  return node("blockquote", quoted.length > 500 ? quoted.join("\n")
    : markdownNodes(quoted.join("\n")));
}
/** A list; what is indented deeper belongs to the item above it. */
function readList(lines) {
  const indent = /^\s*/.exec(lines[0])[0].length, ordered = /^\s*\d/.test(lines[0]), items = [];
  while (lines.length) {
    const found = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/.exec(lines[0]);
    const deep = /^\s*/.exec(lines[0])[0].length;
    if (found && deep <= indent + 1 && /^\d/.test(found[2]) === ordered && deep >= indent - 1)
      items.push([found[3]]);
    else if (items.length && lines[0].trim() &&
      deep > indent) items.at(-1).push(lines[0].slice(indent + 2));
    else break;
    lines.shift();
  }
  return node(ordered ? "ol" : "ul", items.map(([first, ...rest]) =>
    node("li", inlineNodes(first), rest.length && rest.length < 500 &&
      markdownNodes(rest.join("\n")))));
}
function readTable(lines) {
  const rows = [];
  while (/^\s*\|.*\|\s*$/.test(lines[0] ?? "")) rows.push(lines.shift().trim().slice(1,
    -1).split("|"));
  const hasHead = rows[1]?.every(cell => /^\s*:?-+:?\s*$/.test(cell));
  const body = hasHead ? rows.slice(2) : rows;
  const row = (cells, tag) => node("tr", cells.map(cell => node(tag, inlineNodes(cell.trim()))));
  return node("div.scroll", node("table", hasHead && node("thead", row(rows[0], "th")),
    node("tbody", body.map(cells => row(cells, "td")))));
}
function readParagraph(lines) {
  const words = [lines.shift()];
  while (lines.length && lines[0].trim() && !BLOCKS.some(([begin]) => begin.test(lines[0])))
    words.push(lines.shift());
  return node("p.plain", inlineNodes(words.join("\n")));
}
// == 16  Request ==============================================================================
function openRequest() {
  const inline = byId("request-data").textContent;
  if (inline) showRequest(JSON.parse(inline));
}
async function loadRequest() {
  try {
    showRequest(await askJson(`/api/request/${location.pathname.split("/")[2]}`));
    trouble("request", null);
  } catch (error) {
    if (!known(error.status)) throw error;
    if (error.status !== 404) return error.status && trouble("request", error.message);
    byId("request").replaceChildren(node("section.card", empty("There is no such request.",
      "It may be older than MAX_LOG_AGE_DAYS. ", node("a", {href: "/"}, "Look at the newest."))));
  }
}
const requestSoon = paced(loadRequest, 1000);
const pingSoon = paced(() => askJson("/api/session").catch(() => {}), 10_000);
/** Show a request; while it runs, only what changes is made anew, once a second. */
function showRequest(doc) {
  const isNews = app.request?.is_inflight !== doc.is_inflight;
  document.title = `${clip(doc.original_model || doc.path, 40)} · SmolRouter`;
  app.request = doc;
  if (isNews) byId("raw").replaceChildren(
    rawNode("Request", doc, "request"), rawNode("Response", doc, "response"));
  byId("head").replaceChildren(...headNodes(doc));
  const reason = reasonNode(doc);
  byId("reason").hidden = !reason;
  byId("reason").replaceChildren(reason ?? "");
  showAnswer(doc);
  showStory(doc);
  showTurns(doc);
  if (doc.is_inflight) requestSoon();
  else if (isNews && doc.session) showOthers(doc);
}
function headNodes(doc) {
  const [kind, sign, words] = outcomeOf(doc), isFailed = kind === "bad";
  const more = doc.is_inflight ? doc.phase : known(doc.duration_ms) &&
    `in ${span(doc.duration_ms)}`;
  const server = serverOf(doc);
  return [node("h1.line", node(`span.badge.${kind}`,
    `${sign} ${isFailed ? "failed" : clip(words, 60)}`), " ",
    modelNode(doc)),
  node("span.quiet", server && ["on ", named(server), " "], more, doc.status_code &&
    ` · ${doc.status_code}`),
  node("span.push.line", neighbourNodes(doc), doc.is_inflight && stopNode(doc.id),
    doc.response_text && copyNode("Copy answer", () => doc.response_text),
    copyNode("Copy as curl", () => curlOf(doc), doc.request_body_cut ||
      doc.request_body_encoding === "base64" || doc.request_body?.includes("\0")),
    doc.transcript.length > 0 && [node("button",
      {onclick: () => openTry(doc.original_model, messagesOf(doc))}, "Open in Try it"),
    node("a.button", {href: `/compare?request=${doc.id}`}, "Compare")])];
}
/** The requests above and below this one in the list that it was opened from. */
function neighbours(doc) {
  let list = [];
  try { list = JSON.parse(sessionStorage.list); } catch { /* it was opened from elsewhere */ }
  const at = list.indexOf(doc.id);
  return at < 0 ? [] : [list[at - 1], list[at + 1]];
}
const neighbourNodes = doc => neighbours(doc).map((id, at) => id && node("button.bare",
  {onclick: () => neighbour(at ? 1 : -1), title: at ? "key j" : "key k"}, at ? "Older ↓"
    : "Newer ↑"));
function neighbour(by) {
  const id = app.request && neighbours(app.request)[by > 0 ? 1 : 0];
  if (id) location.replace(`/request/${id}`);  // so that Back still leads to the list
}
function leaveRequest() {
  const isOfList = app.request && neighbours(app.request).length > 0;
  if (isOfList && history.length > 1) history.back();
  else location.assign("/");
}
/** Why it failed, in red: the words of the router, or those of the server that said no. */
function reasonNode({error_message: error, failed, status_code: status, attempts}) {
  const last = attempts.at(-1)?.error;
  if (!failed && !error) return null;
  const words = REASONS[error] ?? error ?? last ?? `The server answered with the status ${status}.`;
  return node(`p.reason.${status === 499 ? "warn" : "bad"}`, {role: "alert"}, named(words, 2000));
}
/** The answer stands first; the conversation below has it as its last turn, too. */
function showAnswer(doc) {
  const {response_text: text, response_thinking: thinking} = doc, place = byId("answer");
  const last = doc.transcript.at(-1);
  place.hidden = !(text || thinking);
  if (place.hidden || place.text === `${text} ${thinking}`) return;
  place.text = `${text} ${thinking}`;
  place.replaceChildren(node("h2", "Answer"), thinking && thoughtNode(thinking, doc.is_inflight &&
    !text),
    saidNode(text ?? "", last?.role === "assistant" ? last : {}));
}
function showTurns(doc) {
  const old = [...byId("turns").children], turns = doc.transcript;
  // The last words of the user are open; older turns, and the answer above, are one line each.
  const lastAsked = turns.map(turn => turn.role).lastIndexOf("user");
  const isNews = (turn, at) => at >= lastAsked && !(turn.content && at === turns.length - 1 &&
    turn.content === doc.response_text);
  byId("talk").hidden = !turns.length;
  arrange(byId("turns"), turns.map((turn, at) => {
    const key = JSON.stringify(turn);
    return old[at]?.key === key ? old[at]
      : Object.assign(turnNode(turn, old[at]?.open ?? isNews(turn, at)), {key});
  }));
}
const ROLES = {system: "System", user: "User", assistant: "Answer", tool: "Tool result"};
/** A turn of the conversation; an older one is folded to one line. */
function turnNode(turn, open) {
  const {role, name, content, thinking, tool_calls: calls} = turn;
  const first = content.trim() || (calls ?? []).map(call => `calls ${call.name}`).join(", ") ||
    thinking;
  return node(`details.turn.${ROLES[role] ? role : "other"}`, {open},
    node("summary", node("h3", ROLES[role] ?? named(role, 30), name && [" ", named(name)]),
      node("span.first.quiet.cut", named(first, 160))),
    node("div.body", thinking && thoughtNode(thinking),
      (content || turn.images?.length) && saidNode(content, turn), (calls ?? []).map(call =>
        node("div", node("div.small", "calls ", node("b", named(call.name))),
          jsonNode(call.arguments)))));
}
const thoughtNode = (text, open) => node("details.thought", {open},
  node("summary", `Thinking, ${plural(text.length, "character")}`), node("p.plain", text));
const LONG_TEXT = 200_000;
/** A text with its pictures where they stand: JSON is indented, the rest is Markdown. */
function saidNode(text, {role, images = [], image_at: places = []}) {
  const read = part => role === "system" || part.length > LONG_TEXT ? node("p.plain", part)
    : markdownNodes(part);
  if (/^\s*[[{]/.test(text) && isJson(text)) return jsonNode(text);
  const parts = [], cuts = images.map((_, at) => places[at] ?? text.length);
  let begin = 0;
  for (const [at, url] of images.entries()) {
    parts.push(read(text.slice(begin, cuts[at])), imageNode(url));
    begin = Math.max(begin, cuts[at]);
  }
  return node("div.said", {tabindex: 0, role: "group", "aria-label": "Text"}, parts,
    read(text.slice(begin)));
}
const isPicture = url => /^data:image\/[\w.+-]+[;,]/i.test(url);
/** Only data: images are loaded; an address elsewhere is a link, anything else not even that. */
const imageNode = url => isPicture(url) ? node("img", {src: url, alt: "Image"})
  : node("p", "Image: ", safeLink(url, named(url, 120)));
function isJson(text) {
  try { return Boolean(JSON.parse(text)); } catch { return false; }
}
/** JSON indented; what is none is shown as it is. */
function jsonNode(text) {
  let pretty = String(text);
  try { pretty = JSON.stringify(JSON.parse(text), null, 2); } catch { /* no JSON */ }
  return node("pre.code", {tabindex: 0}, pretty);
}
/** How it was routed, where the time went, and the figures; what is unusual stands first. */
function showStory(doc) {
  const isOpen = byId("rules")?.open;
  byId("story").replaceChildren(noticeNode(doc) || "", node("h2", "How it went"), trailNode(doc),
    phasesNode(doc), factsNode(doc), node("details", {open: isOpen, id: "rules"},
      node("summary.small", `Rules tried: ${doc.trail.length}`), stepsNode(doc.trail)));
}
function noticesOf(doc) {
  const lost = doc.attempts.slice(0, -1).filter(hasFailed).length, changes = changesOf(doc);
  return [...(doc.warnings ?? []).map(wordsOfWarning),
    doc.tokens_estimated && "tokens are estimated: the server sent no usage",
    lost > 0 && `answered at try ${doc.attempts.length}`,
    doc.queued_ms > 1000 && `waited ${span(doc.queued_ms)} for a slot`,
    changes.length > 0 && `parameters changed: ${changes.join(", ")}`,
    doc.request_body_cut && "the request was too long to be kept whole",
    doc.response_body_cut && "the answer was too long to be kept whole"].filter(Boolean);
}
/** What the router changed in a request's parameters, as words. */
function changesOf({changed}) {
  if (!changed) return [];
  if (Array.isArray(changed)) return changed.map(one => typeof one === "string" ? one
    : JSON.stringify(one));
  return Object.entries(changed).map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
}
function noticeNode(doc) {
  const notices = noticesOf(doc);
  return notices.length && node("ul.notice.is-warn", notices.map(one => node("li", named(one,
    300))));
}
/** A rule by its words: `routes[2]` is rule 3, and why it matched. */
function ruleWords({route, trail}) {
  const why = trail.filter(step => step.matched).map(step => step.why).filter(Boolean).at(-1);
  const words = route.replace(/^routes\[(\d+)\]/, (_, at) => `rule ${+at + 1}`);
  return why ? `${words} · ${why}` : words;
}
/** Asked for -> mapped to -> by rule -> one instance refused, another one answered. */
function trailNode(doc) {
  const step = (sign, kind, ...words) => node("li", node(`span.${kind}`, {"aria-hidden": "true"},
    sign),
    node("span", words));
  const {original_model: asked, mapped_model: mapped} = doc;
  return node("ol.trail", {"aria-label": "How it was routed"},
    step("→", "quiet", "asked for ", node("b", named(asked || "no model", 120))),
    mapped && mapped !== asked && step("→", "quiet", "mapped to ", node("b", named(mapped, 120))),
    doc.route && step("→", "quiet", "by ", named(ruleWords(doc), 300)),
    known(doc.queued_ms) && doc.queued_ms > 0 && step("◷", "is-warn",
      `waited ${span(doc.queued_ms)} for a slot`),
    doc.attempts.map(one => {
      const [kind, sign, word] = hasFailed(one) ? ["is-bad", "✕", "failed"]
        : one.status ? ["is-good", "✓", "answered"] : ["is-busy", "…", "runs"];
      const said = one.error ?? one.status ?? doc.phase;
      return step(sign, kind, node("b", named(one.instance.replace(one.upstream_url,
        short(one.upstream_url)), 120)), ` ${word}: `, named(said, 300),
          ` in ${span(one.duration_ms)}`);
    }), doc.failed && doc.error_message && step("✕",
      doc.status_code === 499 ? "is-warn" : "is-bad",
      "ended: ", named(REASONS[doc.error_message] ?? doc.error_message, 300)));
}
/** Where the time went: the queue, failed attempts, waiting, thinking, the answer. */
function phasesNode(doc) {
  const age = doc.is_inflight ? Date.now() - Date.parse(doc.timestamp) : 0;
  const whole = doc.duration_ms ?? Math.max(age, doc.ttft_ms), first = doc.ttft_ms ?? whole;
  const queued = Math.min(doc.queued_ms ?? 0, first), spoken = whole - first;
  const lost = Math.min(doc.attempts.filter(hasFailed).reduce((sum, one) => sum + one.duration_ms,
    0),
    first - queued);
  // When thinking ended is not known; its share of the text tells about when.
  const thought = doc.response_thinking?.length ?? 0, said = doc.response_text?.length ?? 0;
  const thinking = thought ? spoken * thought / (thought + said) : 0;
  const bars = [["p-queue", "queued", queued], ["p-fail", "failed attempts", lost],
    ["p-wait", "waiting", first - queued - lost], ["p-think", "thinking ≈", thinking],
    ["p-flow", "answer", spoken - thinking]].filter(([, , ms]) => ms > 0);
  return node("div", node("div.phases", {"aria-hidden": "true"},
    bars.map(([kind, , ms]) => node(`i.${kind}`, {style: {flex: `${1e3 * ms} 1 0`}}))),
  node("p.line.key", bars.map(([kind, name, ms]) =>
    node("span", node(`i.${kind}`), ` ${name} `, node("b", span(ms)))),
  node("span.push", "in all ", node("b", span(whole)))));
}
const sizesOf = row => `${bytes(row.request_size)} → ${bytes(row.response_size)}`;
function factsNode(doc) {
  const facts = {
    "Tokens in → out": tokensNode(doc), "Cached prompt": doc.cached_tokens &&
      count(doc.cached_tokens),
    "Tokens per second": doc.tokens_per_second && plain(doc.tokens_per_second),
    "First token": known(doc.ttft_ms) && span(doc.ttft_ms), "Size": sizesOf(doc),
    "Stream": doc.stream ? "yes" : "no", "Client": doc.client ?? doc.source_ip,
    "From": doc.client && doc.client !== doc.source_ip && doc.source_ip,
    "Session": doc.session && node("a", {href: `/?session=${encodeURIComponent(doc.session)}`},
      named(doc.session, 24)),
    "Path": `${doc.method} ${doc.path}`, "Service": doc.service_type,
    "Server": doc.upstream_url && short(doc.upstream_url), "Program": doc.user_agent,
    "Key's fingerprint": doc.client_key, "Request id": doc.request_id,
    "Started": local(doc.timestamp), "Ended": doc.completed_at && local(doc.completed_at)};
  return node("dl.facts", present(facts).map(([name, value]) => node(
    /^(Path|Program|Request id)$/.test(name) ? "div.whole" : "div", node("dt", name), node("dd",
      value.nodeType ? value : named(value, 200)))));
}
/** The other turns of the same conversation, and how much of the prompt they share with this. */
async function showOthers(doc) {
  const rows = await askJson("/api/logs", {session: doc.session, limit: 12}).catch(() => []);
  const others = rows.filter(row => row.id !== doc.id), earlier = others.filter(row =>
    row.id < doc.id);
  if (!others.length) return;
  const shares = new Map();
  byId("others").hidden = false;
  const draw = () => byId("others").replaceChildren(node("h2", "The same conversation"),
    node("table", node("tbody", others.map(row => node("tr",
      node("td", node("a", {href: `/request/${row.id}`}, moment(row.timestamp))),
      node("td", named(row.preview?.asked ?? "", 60)), node("td.number", tokensNode(row)),
      node("td", shares.get(row.id) ?? (row.id > doc.id ? node("span.quiet", "later") : "")))))));
  draw();
  for (const row of earlier.slice(0, 5)) {
    const other = await askJson(`/api/request/${row.id}`).catch(() => null);
    if (other) shares.set(row.id, sharedNode(doc, other));
    draw();
  }
}
/** What a server reads before it answers, as pieces with a name. */
function promptOf(doc) {
  const turns = [...doc.transcript];
  while (turns.at(-1)?.role === "assistant") turns.pop();  // the answer
  let tools = "";
  try { tools = JSON.stringify(JSON.parse(doc.request_body).tools ?? ""); } catch { /* no JSON */ }
  return [["tools", tools], ...turns.map(({role, content, tool_calls: calls}) =>
    [role, content + (calls?.length ? JSON.stringify(calls) : "")])];
}
/** How much of a prompt an earlier one shares, and where they first differ. */
function sharedOf(doc, other) {
  const mine = promptOf(doc), theirs = promptOf(other);
  const whole = mine.reduce((sum, [, text]) => sum + text.length, 0);
  let shared = 0;
  for (const [at, [role, text]] of mine.entries()) {
    const before = theirs[at];
    if (!before) return {share: shared / whole};
    if (before[0] === role && before[1] === text) { shared += text.length; continue; }
    let same = 0;
    while (same < text.length && before[0] === role && text[same] === before[1][same]) same += 1;
    return {share: (shared + same) / whole, role, character: same + 1};
  }
  return {share: 1};
}
function sharedNode(doc, other) {
  const {share, role, character} = sharedOf(doc, other);
  const place = `${clip(role, 20)}, character ${count(character)}`;
  return role ? node("span.is-warn", `⚠ prompt cache lost at ${place}`,
    node("span.quiet", `, ${percent(share)} the same`))
    : node("span.is-good", `continues it, ${percent(share)} the same`);
}
/** The conversation as a chat's request has it, without this answer. */
function messagesOf(doc) {
  const turns = [...doc.transcript];
  if (turns.length > 1 && turns.at(-1).role === "assistant") turns.pop();
  return turns.map(({role, content, images, tool_calls: calls, tool_call_id: of}) => ({role,
    content: images?.length ? [{type: "text", text: content}, ...images.map(url =>
      ({type: "image_url", image_url: {url}}))] : content,
    ...calls?.length && {tool_calls: calls.map(({id, name, arguments: words}) =>
      ({id, type: "function", function: {name, arguments: words}}))},
    ...of && {tool_call_id: of}}));
}
/** One direction of the exchange as it went over the wire; made when it is opened. */
function rawNode(title, doc, side) {
  const [body, fields, size, cut, coding] = ["body", "headers", "size", "body_cut", "body_encoding"]
    .map(name => doc[`${side}_${name}`]);
  const note = (coding === "base64" ? "no text, in base64 " : "") + (cut ? "cut, as too long" : "");
  const content = () => node("div.stack", node("h3", "Fields"),
    node("dl.fields.mono", fields.map(([name, value]) => [node("dt", name), node("dd", value)])),
    node("div.line", node("h3", "Content"), node("span.small.grow", note),
      body && copyNode("Copy", () => body)), jsonNode(body || "None is here."));
  return node("details.card", {"data-side": side, ontoggle() {
    if (this.children.length < 2) this.append(content());
  }}, node("summary", node("b", title), node("span.small", ` raw, ${bytes(size)}`)));
}
/** The UTF-8 of a text, or of a field its octets as they are, as a shell's octal escapes. */
function octalOf(text, isField) {
  const octets = isField ? [...text].map(one => one.charCodeAt()) : new TextEncoder().encode(text);
  return [...octets].map(octet => `\\${octet.toString(8).padStart(3, "0")}`).join("");
}
/** A word of a command. A terminal obeys control characters of what is pasted into it, and shows
 * none of those that turn text round: they are written as escapes, in a `$'word'` of the shell. */
function quoted(text, isField = false) {
  const unsafe = isField ? /[^ -~]/ : /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u;
  if (!unsafe.test(text)) return `'${text.replaceAll("'", "'\\''")}'`;
  const special = new RegExp(`${unsafe.source}|['\\\\!]`, "gu"), named = {"\n": "\\n", "\t": "\\t"};
  return `$'${text.replace(special, one => named[one] ?? octalOf(one, isField))}'`;
}
/** The request as a command for a shell; no secrets, but a place for the key. */
function curlOf(doc) {
  const fields = doc.request_headers.filter(([name]) => /^(accept|content-type)$/i.test(name));
  return [`curl -X ${quoted(doc.method)} ${quoted(location.origin + doc.path)}`,
    ...fields.map(field => `-H ${quoted(field.join(": "), true)}`),
    doc.client_key && '-H "Authorization: Bearer $API_KEY"',
    doc.request_body && `--data-raw ${quoted(doc.request_body)}`].filter(Boolean).join(" \\\n  ");
}
// == 18  Live =================================================================================
// Events say when to ask again; every 30 s the page asks anyway, where they do not get through.
// A hidden tab asks nothing. A browser that only prints the page waits until all is loaded, and a
// stream of events never is: there they begin late.
const SETTLE_MS = /Headless/.test(navigator.userAgent) ? 4500 : 0;
function listen() {
  if (app.source?.readyState < EventSource.CLOSED) return;
  app.source = new EventSource("/api/events");
  app.source.addEventListener("requests", () => app.view.refresh());
  app.source.onopen = () => app.view.refresh();
  app.source.onerror = () => app.view.refresh();
}
function refresh() {
  if (document.hidden || !isSignedIn()) return;
  app.view.refresh();
  if (performance.now() >= SETTLE_MS) listen();
}
const VIEWS = [
  {name: "performance", path: /^\/performance/, open: openPerformance, refresh: performanceSoon},
  {name: "request", path: /^\/request\//, open: openRequest,
    refresh: () => (app.request?.is_inflight === false ? pingSoon : requestSoon)()},
  {name: "overview", path: /^/, open: openOverview, refresh: refreshOverview},
];
function showSignIn() {
  app.source?.close();
  for (const one of document.querySelectorAll("dialog")) one.close();
  byId(app.view.name).hidden = true;
  byId("sign-in").hidden = false;
  byId("sign-in").elements.token.focus();
}
function signIn(event) {
  event.preventDefault();
  post("/api/signin", {token: event.target.elements.token.value.trim()}).then(
    () => location.reload(),
    // What a program would have to send helps nobody who fills in a form.
    error => say(byId("sign-in-error"), error.message.replace(/; send it as .*/, "")));
}
const KEYS = {
  overview: {"/": () => byId("filters").elements.q.focus(), j: () => step(1), k: () => step(-1),
    Escape: () => filterBy({})},
  request: {j: () => neighbour(1), k: () => neighbour(-1), Escape: leaveRequest}};
function step(by) {
  const links = [...byId("rows").querySelectorAll(".c-time a")];
  const at = links.indexOf(document.activeElement) + by;
  links[Math.max(0, Math.min(at, links.length - 1))]?.focus();
}
function keys(event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches?.("input, select, textarea");
  const other = typing || event.ctrlKey || event.metaKey || event.altKey;
  const chip = event.target.closest?.(".chip[open]");
  if (event.key === "Escape" && chip) {
    chip.open = false;
    return chip.firstChild.focus();
  }
  if (typing && event.key === "Escape") event.target.blur();
  if (other || !KEYS[app.view.name]?.[event.key]) return;
  event.preventDefault();  // an Escape would stop the way back
  KEYS[app.view.name][event.key]();
}
function closeChips({target}) {
  for (const chip of document.querySelectorAll(".chip[open]"))
    if (!chip.contains(target)) chip.open = false;
}
async function start() {
  app.view = VIEWS.find(view => view.path.test(location.pathname));
  const link = document.querySelector(`nav a[href="${location.pathname}"]`);
  link?.setAttribute("aria-current", "page");
  if (link) document.title = `${link.textContent} · SmolRouter`;
  const session = await askJson("/api/session").catch(() => ({}));  // what loads next says why
  byId("sign-out").hidden = !session.authenticated;
  if (session.needs_token && !session.authenticated) return showSignIn();
  byId(app.view.name).hidden = false;
  app.view.open();
  if (params().has("explain")) { openExplain(); explain(); }
  for (const ms of [0, 1500, 3000, SETTLE_MS + 500]) setTimeout(refresh, ms);
}
document.addEventListener("keydown", keys);
document.addEventListener("pointerdown", closeChips);
document.addEventListener("visibilitychange", () =>
  document.hidden ? app.source?.close() : refresh());
bindForm(byId("explain-form"), explain);
byId("explain-button").onclick = openExplain;
byId("explain").addEventListener("close", () => amend({explain: null, from: null}));
byId("try-button").onclick = () => openTry();
byId("try-form").addEventListener("submit", tryIt);
byId("try-form").addEventListener("keydown", event =>
  event.key === "Enter" && (event.ctrlKey || event.metaKey) && tryIt(event));
byId("try-stop").onclick = () => app.trying?.abort("stopped");
for (const button of document.querySelectorAll("dialog .close"))
  button.onclick = () => button.closest("dialog").close();
byId("sign-in").addEventListener("submit", signIn);
const tabs = new BroadcastChannel("sign-out");  // all of this browser leave at once
tabs.onmessage = () => location.reload();
byId("sign-out").onclick = () => post("/api/signout")
  .finally(() => { tabs.postMessage("out"); location.assign("/"); });
setInterval(refresh, 30_000);  // ms
start();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
