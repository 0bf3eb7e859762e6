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

    Words        1  Errors            every failure a client can see
                 2  Settings          every environment variable, once
                 3  HTTP messages     RFC 9112 on bytes, requests and responses
    Decisions    4  Event streams     SSE and NDJSON, incremental
                 5  Text filters      <think> blocks and JSON fences
                 6  Dialects          OpenAI inside, Ollama at the edge
                 7  Routing           model and source host to instances, and why
                 8  Access            tokens, policies, Host and Origin
    Actions      9  HTTP on streams   the code that awaits bytes
                10  Upstreams         connection pool, one request, health
                11  Request log       what happened to every request
    The router  12  Relay             one exchange, first byte to last
                13  Dashboard and API what the owner looks at
                14  Application       which path means what
                15  HTTP server       the connection loop, drain
                16  Command line      serve, check, explain, demo, ...

Words: RFC 9110 and 9112 for HTTP; upstream, server, alias, instance, route, match,
source host and model map as in routes.yaml. `parse_`, `encode_`, `read_` and `resolve`
are pure; `send_`, `write_` and `serve_` do I/O.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import hmac
import http
import http.client
import http.server
import ipaddress
import itertools
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

__version__ = "1.0.0"

KiB, MiB = 1024, 1024 * 1024

# ======================================================================================
# 1  Errors (pure)
# ======================================================================================
# Every failure a client can see is a class with a status; it is raised anywhere and
# rendered in one place, by the dialect of the path that was asked (section 6).
# To add one: a class with its status, its OpenAI `type` and its `code`.

class ConfigError(Exception):
    """A setting or the routing file is wrong; the program does not start with it."""

class RouterError(Exception):
    """A failure with a status; `fields` are added to the answer. Base of all below."""
    status, kind, code = 500, "server_error", "internal_error"

    def __init__(self, message: str, *fields: tuple[str, str]) -> None:
        super().__init__(message)
        self.fields = fields

class BadRequest(RouterError):
    """The request is HTTP, but cannot be served as it is."""
    status, kind, code = 400, "invalid_request_error", "bad_request"

class MalformedMessage(BadRequest):
    """The bytes are no HTTP message that may be forwarded; the connection ends."""
    code = "malformed_message"

class MalformedContent(BadRequest):
    """The content is not what its endpoint takes (JSON object, multipart form)."""
    code = "malformed_content"

class Unauthorized(RouterError):
    """A token is needed and none that is valid was given."""
    status, kind, code = 401, "authentication_error", "invalid_token"

class Forbidden(RouterError):
    """The policy refuses this request, whatever it carries."""
    status, kind, code = 403, "permission_error", "forbidden"

class NotFound(BadRequest):
    """No such path, model or request."""
    status, code = 404, "not_found"

class MethodNotAllowed(BadRequest):
    """The path exists, but not for this method; `fields` holds Allow."""
    status, code = 405, "method_not_allowed"

class RequestTimeout(BadRequest):
    """The client was too slow with its head or its content."""
    status, code = 408, "request_timeout"

class ContentTooLarge(BadRequest):
    """The content is longer than MAX_REQUEST_SIZE."""
    status, code = 413, "content_too_large"

class TargetTooLong(BadRequest):
    """The request line is longer than MAX_START_LINE."""
    status, code = 414, "target_too_long"

class UnsupportedContent(BadRequest):
    """The content has a coding that the router cannot read."""
    status, code = 415, "unsupported_content"

class MisdirectedRequest(Forbidden):
    """The Host is not one that the Web UI answers to (DNS rebinding)."""
    status, code = 421, "misdirected_request"

class TooManyRequests(RouterError):
    """Too many failed tokens from one address."""
    status, kind, code = 429, "rate_limit_error", "too_many_failures"

class FieldsTooLarge(BadRequest):
    """One field, all of them or their number is over the limit."""
    status, code = 431, "fields_too_large"

class ClientClosed(RouterError):
    """The client went away before its answer was complete; only the log sees it."""
    status, kind, code = 499, "client_error", "client_closed"

class NotSupported(BadRequest):
    """No configured server can do what was asked."""
    status, code = 501, "not_supported"

class BadGateway(RouterError):
    """No upstream gave an HTTP answer."""
    status, kind, code = 502, "upstream_error", "bad_gateway"

class Unavailable(RouterError):
    """The router is shutting down."""
    status, code = 503, "shutting_down"

class GatewayTimeout(BadGateway):
    """An upstream did not answer in time; the message names the setting."""
    status, code = 504, "upstream_timeout"

class VersionNotSupported(MalformedMessage):
    """A version of HTTP other than 1.0 and 1.1."""
    status, code = 505, "http_version_not_supported"

class LoopDetected(BadRequest):
    """The request has been through this router before (RFC 9110 7.6.3)."""
    status, code = 508, "loop_detected"

# ======================================================================================
# 2  Settings (pure)
# ======================================================================================
# Every setting stands here once: name, type, default and its help line. A value comes
# from the environment or from the flag of the same name, which wins. A bad value stops
# the start. To add one: a line in `Settings`; flag, help and check follow from it.

MIN_SECRET_LENGTH, MIN_SECRET_VARIETY = 32, 10
WELL_KNOWN_SECRETS = ("changeme", "change-me", "your-secret", "your_secret", "secret-key",
                      "supersecret", "jwt-secret", "jwt_secret", "example", "password")
POLICIES = ("NONE", "AUTH_WHEN_PROXIED", "ALWAYS_AUTH")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
ABSOLUTE_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")
GROUP_REFERENCE = re.compile(r"\\(?:g<(\w+)>|([0-9]{1,2}))")
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

ModelMap = tuple[tuple["str | re.Pattern[str]", str], ...]

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
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"

def parse_upstream_url(text: str) -> UpstreamURL:
    """Read `http://host:8000`, with or without scheme, a prefix, `/` or `/v1` at the end.

    Raises ValueError with a sentence that says what was seen.
    """
    whole = text if ABSOLUTE_SCHEME.match(text) else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(whole)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"no URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"scheme {parts.scheme!r} instead of http or https")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("a user, query or fragment is not allowed in it")
    host = parts.hostname or ""
    if not HOST_NAME.fullmatch(host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"no valid host in it: {host!r}") from None
    if port == 0:
        raise ValueError("port 0")
    if not re.fullmatch(r"[!$-;=@-Z_a-z~%]*", parts.path):
        raise ValueError("a character in its path that must be percent-encoded")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    default = 443 if parts.scheme == "https" else 80
    return UpstreamURL(parts.scheme, host, port or default, prefix)

def parse_bool(text: str) -> bool:
    """Read 1 true yes on / 0 false no off in any case."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("allowed are 1 true yes on, 0 false no off")

def parse_number(low: float, high: float, whole: bool = True) -> Callable[[str], float]:
    """Make a reader of ASCII numbers from `low` to `high`."""
    kind = "a whole number" if whole else "a number"
    pattern = re.compile(r"[0-9]{1,18}" if whole else r"[0-9]{1,12}(\.[0-9]{0,9})?")

    def parse(text: str) -> float:
        if pattern.fullmatch(text.strip()):
            value = int(text) if whole else float(text)
            if low <= value <= high:
                return value
        raise ValueError(f"allowed is {kind} from {low:g} to {high:g}")

    return parse

def parse_choice(*choices: str) -> Callable[[str], str]:
    """Make a reader of one of `choices`, in any case; returns it as it stands here."""
    table = {choice.lower(): choice for choice in choices}

    def parse(text: str) -> str:
        if text.strip().lower() not in table:
            raise ValueError(f"allowed are {', '.join(choices)}")
        return table[text.strip().lower()]

    return parse

def parse_text(text: str) -> str:
    """Read a name that may not be empty."""
    if not text.strip() or "\0" in text:
        raise ValueError("allowed is a name that is not empty")
    return text

def parse_names(text: str) -> tuple[str, ...]:
    """Read names between commas or blanks, in lower case; an empty text has none."""
    return tuple(text.replace(",", " ").lower().split())

def parse_origins(text: str) -> tuple[str, ...]:
    """Read browser origins, `*` or `loopback`."""
    names = parse_names(text)
    for name in names:
        if name not in ("*", "loopback", "null") and not re.fullmatch(
            r"[a-z][a-z0-9+.-]*://[^/?#\s]+", name
        ):
            raise ValueError(
                f"{name!r} is no origin; allowed are https://host:port, loopback and *"
            )
    return names

def parse_networks(text: str) -> tuple[IPNetwork, ...]:
    """Read addresses and CIDRs between commas or blanks; `none` is an empty list."""
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(ipaddress.ip_network(item, strict=False) for item in parse_names(text))
    except ValueError as error:
        raise ValueError(f"{error}; allowed are addresses and CIDRs") from None

def parse_pattern(text: str) -> str | re.Pattern[str]:
    """Read an exact name or a `/regex/`. Raises ValueError."""
    if len(text) < 3 or not (text.startswith("/") and text.endswith("/")):
        return text
    try:
        return re.compile(text[1:-1])
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None

def check_template(template: str, pattern: str | re.Pattern[str] | None) -> None:
    """Refuse a group that the pattern does not have. Raises ValueError."""
    if not isinstance(pattern, re.Pattern):
        return
    for name, number in GROUP_REFERENCE.findall(template):
        known = name in pattern.groupindex or (
            (number or name).isdigit() and int(number or name) <= pattern.groups
        )
        if not known:
            raise ValueError(
                f"{template!r} names group {number or name}; the pattern has {pattern.groups}"
            )

def parse_model_map(text: str) -> ModelMap:
    """Read a JSON object of names and `/regex/` keys to names; exact keys come first."""
    try:
        pairs = json.loads(text or "{}", object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'no JSON ({error}); allowed is an object such as {{"gpt-4": "llama3"}}'
        ) from None
    if not isinstance(pairs, tuple):
        raise ValueError('allowed is a JSON object such as {"gpt-4": "llama3"}')
    compiled: list[tuple[str | re.Pattern[str], str]] = []
    for key, target in pairs:
        if not (isinstance(target, str) and target and key):
            raise ValueError(f"{key!r} must map to a name, not to {target!r}")
        pattern = parse_pattern(key)
        check_template(target, pattern)
        compiled.append((pattern, target))
    return tuple(sorted(compiled, key=lambda pair: isinstance(pair[0], re.Pattern)))

def parse_secret(text: str) -> str:
    """Read a JWT secret; a weak one is refused. The value never enters the message."""
    secret = text.strip()
    if len(secret) < MIN_SECRET_LENGTH or len(set(secret)) < MIN_SECRET_VARIETY:
        raise ValueError(
            f"too weak: allowed are at least {MIN_SECRET_LENGTH} characters, at least "
            f"{MIN_SECRET_VARIETY} different; try: openssl rand -hex 32"
        )
    if any(known in secret.lower() for known in WELL_KNOWN_SECRETS):
        raise ValueError("a well-known default; try: openssl rand -hex 32")
    return secret

def setting(default: Any, parse: Callable[[str], Any], help_line: str) -> Any:
    """Declare a setting: `default` as it is written in the environment."""
    value = parse(default) if isinstance(default, str) else default
    return dataclasses.field(
        default=value, metadata={"parse": parse, "help": help_line, "default": default}
    )

@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment and the flags say; valid once it exists."""

    # fmt: off
    default_upstream: UpstreamURL = setting("http://localhost:8000", parse_upstream_url, "where a request goes that no rule claims")
    listen_host: str = setting("127.0.0.1", parse_text, "address to listen on")
    listen_port: int = setting("1234", parse_number(0, 65535), "port to listen on; 0 takes a free one")
    routes_config: str = setting("routes.yaml", parse_text, "routing file, YAML or JSON; the default one may be missing")
    model_map: ModelMap = setting("{}", parse_model_map, "JSON object: exact names and /regex/ keys to names")
    strip_thinking: bool = setting("true", parse_bool, "take <think> blocks out of answers")
    strip_json_markdown: bool = setting("false", parse_bool, "take the fence lines of ```json blocks out of answers")
    disable_thinking: bool = setting("false", parse_bool, "append /no_think to the last user message")
    enable_logging: bool = setting("true", parse_bool, "keep every request; false writes nothing to disk")
    request_timeout: float = setting("3000.0", parse_number(0.01, 1e6, False), "longest silence from an upstream, s")
    connect_timeout: float = setting("5.0", parse_number(0.01, 600, False), "longest wait for a connection to an upstream, s")
    db_path: str = setting("requests.db", parse_text, "the request log's database")
    max_log_age_days: float = setting("7", parse_number(0.01, 36500, False), "days that a request is kept")
    blob_storage_type: str = setting("filesystem", parse_choice("filesystem", "memory"), "where long bodies are kept: filesystem or memory")
    blob_storage_path: str = setting("blob_storage", parse_text, "folder of the long bodies")
    max_blob_size: int = setting("10485760", parse_number(0, 10**12), "bytes kept of one body; a longer one is cut and marked")
    max_total_storage_size: int = setting("1073741824", parse_number(0, 10**15), "bytes kept of all bodies; the oldest go first")
    max_request_size: int = setting("67108864", parse_number(1, 10**12), "longest content of a request, bytes")
    max_connections: int = setting("2048", parse_number(1, 10**6), "connections served at once; more wait in the listen queue")
    jwt_secret: str | None = setting(None, parse_secret, "at least 32 characters; signs the tokens")
    webui_security: str = setting("AUTH_WHEN_PROXIED", parse_choice(*POLICIES), "who may see the Web UI: NONE, AUTH_WHEN_PROXIED, ALWAYS_AUTH")
    api_security: str = setting("NONE", parse_choice(*POLICIES), "who may use the model API: the same three")
    trusted_proxies: tuple[IPNetwork, ...] = setting("none", parse_networks, "addresses or CIDRs whose X-Forwarded-For is believed")
    allowed_hosts: tuple[str, ...] = setting("", parse_names, "extra Host names for the Web UI")
    allowed_origins: tuple[str, ...] = setting("loopback", parse_origins, "browser origins that may call the API; * for all")
    shutdown_grace: float = setting("8", parse_number(0, 3600, False), "s that running requests get after SIGTERM")
    log_level: str = setting("INFO", parse_choice(*LOG_LEVELS), "DEBUG, INFO (a line a request on stderr), WARNING, ERROR")
    # fmt: on

    @classmethod
    def from_mapping(
        cls, environ: Mapping[str, str], flags: Mapping[str, str] | None = None
    ) -> Settings:
        """Build from variables and flags (by field name). Raises ConfigError."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            source, text = find_setting(item.name, environ, flags or {})
            if text is None:
                continue
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as error:
                seen = "<hidden>" if item.name == "jwt_secret" else repr(text)
                raise ConfigError(f"{source}={seen}: {error}") from None
        settings = cls(**values)
        settings.check_policies()
        return settings

    def check_policies(self) -> None:
        """Refuse a policy that nobody could satisfy."""
        for name in ("webui_security", "api_security"):
            if getattr(self, name) == "ALWAYS_AUTH" and self.jwt_secret is None:
                raise ConfigError(
                    f"{name.upper()}='ALWAYS_AUTH': JWT_SECRET is not set; set it to at "
                    f"least {MIN_SECRET_LENGTH} random characters (openssl rand -hex 32)"
                )

def find_setting(
    name: str, environ: Mapping[str, str], flags: Mapping[str, str]
) -> tuple[str, str | None]:
    """Return where a setting's text comes from and the text: flag, variable, nothing."""
    variable = name.upper()
    if flags.get(name) is not None:
        return f"--{name.replace('_', '-')}", flags[name]
    if variable == "DEFAULT_UPSTREAM" and variable not in environ:
        return "DEFAULT_ROUTE", environ.get("DEFAULT_ROUTE")
    return variable, environ.get(variable)

# ======================================================================================
# 3  HTTP messages (pure)
# ======================================================================================
# RFC 9112 on bytes: heads, field lines, framing and chunks, for requests and responses.
# What is forwarded must be read the same way by everybody, so that reading is strict and
# a doubtful message is refused. Fields are an ordered list of lines, never a dict.

# Every limit with its reason: long enough for what real clients send (cookies, tracing,
# signed URLs), short enough that a connection costs little before it proves useful.
MAX_START_LINE = 16 * KiB  # octets of a request line; 8,000 must work (RFC 9112 3)
MAX_FIELD_LINE = 16 * KiB  # one field line
MAX_FIELDS_SIZE = 64 * KiB  # all field lines of a head
MAX_FIELD_COUNT = 128
MAX_REQUEST_HEAD = MAX_START_LINE + MAX_FIELDS_SIZE
MAX_RESPONSE_HEAD = 64 * KiB
MAX_CHUNK_LINE = 1 * KiB  # chunk-size with extensions
MAX_CHUNK_EXTENSIONS = 16 * KiB  # all of one content: CVE-2023-39326
MAX_TRAILERS = 8 * KiB
MIN_BULK = 2 * KiB  # from here on splitting chunks in bulk is the faster way

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
FIELD_LINE = re.compile(rf"({TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
BARE_LF = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
CHUNK_SIZES = re.compile(rb"(?:[0-9A-Fa-f]{1,15} )*")
HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-connection proxy-authenticate proxy-authorization "
    "te trailer transfer-encoding upgrade".split()
)

class Fields:
    """Field lines in their order, names as they came; look-ups take lower-case names."""

    __slots__ = ("lines",)

    def __init__(self, lines: Iterable[tuple[str, str, str]] = ()) -> None:
        """Take (lower-case name, name, value) triples."""
        self.lines = list(lines)

    @classmethod
    def of(cls, *pairs: tuple[str, str]) -> Fields:
        """Make fields from (name, value) pairs."""
        return cls((name.lower(), name, value) for name, value in pairs)

    def get(self, name: str) -> str | None:
        """Return the value of the first line of that name."""
        for lower, _, value in self.lines:
            if lower == name:
                return value
        return None

    def get_all(self, name: str) -> list[str]:
        """Return the values of all lines of that name."""
        return [value for lower, _, value in self.lines if lower == name]

    def tokens(self, name: str) -> list[str]:
        """Return the elements of a comma-separated list over all its lines, lower case."""
        values = self.get_all(name)
        if not values:
            return values
        parts = (part.strip(" \t").lower() for part in ",".join(values).split(","))
        return [part for part in parts if part]

    def without(self, names: Iterable[str]) -> Fields:
        """Return the lines whose name is not among `names`."""
        return Fields(line for line in self.lines if line[0] not in names)

    def end_to_end(self) -> Fields:
        """Return what a proxy may pass on (RFC 9110 7.6.1)."""
        named = self.tokens("connection")
        return self.without(HOP_BY_HOP.union(named) if named else HOP_BY_HOP)

    def pairs(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs, names as they came."""
        return [(name, value) for _, name, value in self.lines]

    def encode(self) -> str:
        """Return the lines as they go out."""
        return "".join([f"{name}: {value}\r\n" for _, name, value in self.lines])

class RequestHead(NamedTuple):
    """A request line and its fields."""

    method: str
    target: str
    minor: int  # HTTP/1.minor
    fields: Fields

class ResponseHead(NamedTuple):
    """A status line and its fields."""
    status: int
    reason: str
    minor: int
    fields: Fields

class Framing(NamedTuple):
    """How long a content is: `length` octets, "chunked" or "until-close"."""

    kind: str
    length: int = 0

NO_CONTENT = Framing("length", 0)
CHUNKED = Framing("chunked")
UNTIL_CLOSE = Framing("until-close")

def parse_fields(lines: list[str]) -> Fields:
    """Read field lines (RFC 9112 5). Raises MalformedMessage or FieldsTooLarge."""
    if len(lines) > MAX_FIELD_COUNT:
        raise FieldsTooLarge(f"{len(lines)} field lines; {MAX_FIELD_COUNT} are allowed")
    fields = []
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if match is None:
            raise MalformedMessage(f"field line {line[:80]!r} is not `name: value`")
        if len(line) > MAX_FIELD_LINE:
            raise FieldsTooLarge(
                f"field {match[1][:80]!r} has {len(line)} octets; {MAX_FIELD_LINE} are allowed"
            )
        name, value = match.groups()
        fields.append((name.lower(), name, value.strip(" \t")))
    return Fields(fields)

def parse_request_head(data: bytes) -> RequestHead:
    """Read a request head without its final empty line (RFC 9112 2.1, 3, 5)."""
    start, *lines = data.decode("latin-1").split("\r\n")
    if len(start) > MAX_START_LINE:
        raise TargetTooLong(
            f"the request line has {len(start)} octets; {MAX_START_LINE} are allowed"
        )
    match = REQUEST_LINE.fullmatch(start)
    if match is None:
        raise MalformedMessage(f"request line {start[:80]!r} is not `METHOD target HTTP/1.1`")
    method, target, major, minor = match.groups()
    if major != "1":
        raise VersionNotSupported(f"HTTP/{major}.{minor} instead of HTTP/1.1")
    if len(data) - len(start) > MAX_FIELDS_SIZE:
        raise FieldsTooLarge(f"all fields have more than {MAX_FIELDS_SIZE} octets")
    head = RequestHead(method, target, min(int(minor), 1), parse_fields(lines))
    check_host(head)
    return head

def check_host(head: RequestHead) -> None:
    """Refuse two Hosts, a missing one in HTTP/1.1, an invalid one (RFC 9112 3.2)."""
    hosts = head.fields.get_all("host")
    if len(hosts) > 1 or (not hosts and head.minor):
        raise MalformedMessage(f"{len(hosts)} Host fields instead of one")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise MalformedMessage(f"Host {hosts[0][:80]!r} is not a host and port")

def parse_response_head(data: bytes) -> ResponseHead:
    """Read a response head without its final empty line (RFC 9112 4)."""
    start, *lines = data.decode("latin-1").split("\r\n")
    match = STATUS_LINE.fullmatch(start)
    if match is None:
        raise MalformedMessage(f"status line {start[:80]!r} is not `HTTP/1.1 200 OK`")
    minor, status, reason = match.groups()
    return ResponseHead(int(status), reason or "", int(minor), parse_fields(lines))

def read_framing(fields: Fields, minor: int) -> Framing | None:
    """Return what the fields alone say (RFC 9112 6.3), None when they say nothing.

    Stricter than the RFC where two readers could differ: a repeated length, a length
    beside a coding and any coding but `chunked` are refused.
    """
    lengths = fields.get_all("content-length")
    codings = fields.get_all("transfer-encoding")
    if codings:
        if lengths or minor == 0:
            other = "Content-Length" if lengths else "HTTP/1.0"
            raise MalformedMessage(f"Transfer-Encoding with {other}")
        if len(codings) > 1 or codings[0].lower() != "chunked":
            raise MalformedMessage(
                f"Transfer-Encoding {', '.join(codings)[:80]!r} instead of 'chunked'"
            )
        return CHUNKED
    if not lengths:
        return None
    if len(lengths) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0]):
        raise MalformedMessage(
            f"Content-Length {', '.join(lengths)[:80]!r} instead of one decimal number"
        )
    return Framing("length", int(lengths[0]))

def request_framing(head: RequestHead) -> Framing:
    """Return a request's framing; without fields it has no content."""
    return read_framing(head.fields, head.minor) or NO_CONTENT

def response_framing(head: ResponseHead, method: str) -> Framing:
    """Return a response's framing; without fields it lasts until the close."""
    framing = read_framing(head.fields, head.minor)
    if method == "HEAD" or head.status in (204, 304):
        return NO_CONTENT
    return framing or UNTIL_CLOSE

def keeps_alive(fields: Fields, minor: int) -> bool:
    """Tell whether the sender wants the connection to persist (RFC 9112 9.3)."""
    options = fields.tokens("connection")
    return "close" not in options and (minor == 1 or "keep-alive" in options)

def split_whole_chunks(data: bytes) -> tuple[list[bytes], int]:
    """Return the contents of the whole chunks that `data` begins with, and their size.

    The fast way, in bulk: it serves chunks without extensions whose contents hold no
    CRLF, as in event streams, stops at the last chunk and returns nothing when it meets
    anything else. `ChunkDecoder` then goes step by step.
    """
    parts = data.split(b"\r\n")
    count = (len(parts) - 1) // 2
    sizes, contents = parts[0 : 2 * count : 2], parts[1 : 2 * count : 2]
    lengths = list(map(len, contents))
    if 0 in lengths:
        count = lengths.index(0)
        sizes, contents, lengths = sizes[:count], contents[:count], lengths[:count]
    head = b" ".join(sizes) + b" "
    if not count or not CHUNK_SIZES.fullmatch(head):
        return [], 0
    if list(map(int, sizes, itertools.repeat(16))) != lengths:
        return [], 0
    return contents, len(head) - count + sum(lengths) + 4 * count

class ChunkDecoder:
    """Reads chunked content (RFC 9112 7.1); after `done`, `rest` holds what follows."""

    __slots__ = ("at", "between", "done", "extensions", "in_trailers", "left", "rest", "trailers")

    def __init__(self) -> None:
        self.rest = b""  # not read yet
        self.at = 0  # how far of `rest` is read, inside feed()
        self.left = 0  # octets of the current chunk still to come
        self.between = False  # the CRLF after a chunk is still to come
        self.in_trailers = self.done = False
        self.extensions = self.trailers = 0

    def feed(self, data: bytes) -> bytes:
        """Return the content in `data`. Raises MalformedMessage."""
        self.rest = self.rest + data if self.rest else data
        contents: list[bytes] = []
        self.at = 0
        if not (self.left or self.between or self.in_trailers) and len(data) > MIN_BULK:
            contents, self.at = split_whole_chunks(self.rest)
        while self.step(contents):
            pass
        self.rest = self.rest[self.at :]
        return contents[0] if len(contents) == 1 else b"".join(contents)

    def step(self, contents: list[bytes]) -> bool:
        """Read one more piece; return False when more octets are needed or all is read."""
        if self.left:
            content = self.rest[self.at : self.at + self.left]
            self.at += len(content)
            self.left -= len(content)
            self.between = not self.left
            if content:
                contents.append(content)
            return self.between
        if self.between:
            end = self.rest[self.at : self.at + 2]
            if not b"\r\n".startswith(end):
                raise MalformedMessage(f"{end!r} instead of CRLF after a chunk")
            self.between = len(end) < 2
            self.at += 0 if self.between else 2
            return not self.between
        line = None if self.done else self.read_line()
        if line is None:
            return False
        if self.in_trailers:
            self.read_trailer(line)
        else:
            self.read_size(line)
        return True

    def read_line(self) -> bytes | None:
        """Return the next line without its CRLF, None while it is incomplete."""
        limit = MAX_TRAILERS if self.in_trailers else MAX_CHUNK_LINE
        end = self.rest.find(b"\r\n", self.at, self.at + limit + 2)
        line = self.rest[self.at : end if end >= 0 else self.at + limit + 2]
        if BARE_LF.search(line):
            raise MalformedMessage(f"a bare CR or LF in chunk line {line[:80]!r}")
        if end < 0:
            if len(line) > limit:
                raise MalformedMessage(f"a chunk or trailer line over {limit} octets")
            return None
        self.at = end + 2
        return line

    def read_size(self, line: bytes) -> None:
        """Read a chunk-size line."""
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise MalformedMessage(f"chunk-size {line[:80]!r} is not hexadecimal")
        self.extensions += len(line) - len(match[1])
        if self.extensions > MAX_CHUNK_EXTENSIONS:
            raise MalformedMessage(f"chunk extensions over {MAX_CHUNK_EXTENSIONS} octets")
        self.left = int(match[1], 16)
        self.in_trailers = not self.left

    def read_trailer(self, line: bytes) -> None:
        """Read a trailer field line, which nobody sees, or the end."""
        self.trailers += len(line) + 2
        if self.trailers > MAX_TRAILERS:
            raise FieldsTooLarge(f"trailers over {MAX_TRAILERS} octets")
        if line and not FIELD_LINE.fullmatch(line.decode("latin-1")):
            raise MalformedMessage(f"trailer line {line[:80]!r} is not `name: value`")
        self.done = not line

def encode_chunk(content: bytes) -> bytes:
    """Return `content` as one chunk; it must not be empty."""
    return b"%x\r\n%b\r\n" % (len(content), content)

LAST_CHUNK = b"0\r\n\r\n"
PERCENT_OCTET = re.compile(r"%([0-9A-Fa-f]{2})")
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

def normalise_path(path: str) -> str:
    """Return the one spelling of a path: RFC 3986 6.2.2, no empty or dot segments.

    The same spelling is matched, guarded and sent upstream, so that no second spelling
    can open a door.
    """
    if "%" in path:
        path = PERCENT_OCTET.sub(decode_unreserved, path)
    if "//" not in path and "/." not in path and not path.endswith("/"):
        return path
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            segments[-1:] = []
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)

def decode_unreserved(match: re.Match[str]) -> str:
    """Decode an octet that needs no percent-encoding; others get upper-case digits."""
    character = chr(int(match[1], 16))
    return character if character in UNRESERVED else match[0].upper()

def parse_target(head: RequestHead) -> tuple[str | None, str, str]:
    """Return authority (None unless absolute-form), path and query (RFC 9112 3.2).

    The query keeps its `?`. Raises MalformedMessage.
    """
    target, authority = head.target, None
    if head.method == "OPTIONS" and target == "*":
        return None, "*", ""
    if target.lower().startswith(("http://", "https://")):
        rest = target.split("//", 1)[1]
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if not authority or not HOST.fullmatch(authority):
            raise MalformedMessage(f"authority {authority[:80]!r} in the target")
        target = rest[len(authority) :]
        target = target if target.startswith("/") else "/" + target
    if not target.startswith("/") or "#" in target:
        raise MalformedMessage(f"target {target[:80]!r} is not a path")
    path, mark, query = target.partition("?")
    return authority, normalise_path(path), mark + query

def encode_field_value(text: str) -> str:
    """Return `text` as a field value that cannot end its line: visible ASCII."""
    ascii_text = text.encode("ascii", "backslashreplace").decode("ascii")
    return re.sub(r"[^\x20-\x7e]", "?", ascii_text)[:256]

# ======================================================================================
# 4  Event streams (pure)
# ======================================================================================
# A stream of events, server-sent events or lines of JSON, is cut only between events.
# Whole events leave as the bytes they came in; nobody looks inside here.

MAX_HELD_EVENT = 4 * MiB  # one event held for a filter; above, it is relayed as it is
SSE_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
LINE_END = re.compile(rb"\n")
SSE_DATA = re.compile(rb"(?<![^\r\n])data: ?([^\r\n]*)")
DONE_MARK = b"[DONE]"

class EventSplitter:
    """Gathers octets into whole events; `mark` is what ends one in the plain case."""

    __slots__ = ("end", "held", "mark")

    def __init__(self, end: re.Pattern[bytes], mark: bytes) -> None:
        self.end, self.mark = end, mark
        self.held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Return the whole events so far, as one block; hold the rest."""
        if not self.held and data.endswith(self.mark):
            return data
        start = max(0, len(self.held) - 3)
        self.held += data
        cut = self.held.rfind(self.mark, start)
        cut = cut + len(self.mark) if cut >= 0 else 0
        if b"\r" in data or (start and b"\r" in self.held[start:]):
            ends = [match.end() for match in self.end.finditer(self.held, start)]
            cut = max([cut, *ends])
        return self.take(cut) if cut else b""

    def take(self, size: int | None = None) -> bytes:
        """Return and forget the first `size` octets held, or all of them."""
        taken = bytes(self.held[:size])
        del self.held[:size]
        return taken

    def split(self, block: bytes) -> list[bytes]:
        """Return the single events of a block, each with its end."""
        events, start = [], 0
        for match in self.end.finditer(block):
            events.append(block[start : match.end()])
            start = match.end()
        return [*events, block[start:]] if start < len(block) else events

def sse_splitter() -> EventSplitter:
    """Return a splitter of server-sent events."""
    return EventSplitter(SSE_END, b"\n\n")

def line_splitter() -> EventSplitter:
    """Return a splitter of NDJSON lines."""
    return EventSplitter(LINE_END, b"\n")

def read_sse_data(event: bytes) -> bytes:
    """Return the data of one server-sent event, lines joined; b"" without any."""
    lines = SSE_DATA.findall(event)
    return lines[0] if len(lines) == 1 else b"\n".join(lines)

def replace_sse_data(event: bytes, data: bytes) -> bytes:
    """Return the event with other data on one line; its other fields stay."""
    matches = list(SSE_DATA.finditer(event))
    if len(matches) == 1:
        start, end = matches[0].span(1)
        return event[:start] + data + event[end:]
    return b"data: " + data + b"\n\n"

# ======================================================================================
# 5  Text filters (pure)
# ======================================================================================
# What a model says, with thinking and fence lines taken out and every other character
# kept, wherever the text is split: each filter holds back only what could still become
# the tag or line it looks for, at most a few characters, and runs in linear time.

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
WHITE_SPACE = " \t\r\n"
JSON_FENCE = re.compile(r"[ \t]*```json[ \t]*\r?\n?", re.IGNORECASE)
PLAIN_FENCE = re.compile(r"[ \t]*```[ \t]*\r?\n?")
ANY_FENCE = re.compile(r"[ \t]*```[^`]*")
MAYBE_FENCE = re.compile(r"[ \t]{0,8}(?:`{0,2}|```[A-Za-z]{0,4}[ \t]{0,8}\r?)")

def held_prefix(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` could begin `tag`."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0

class ThinkFilter:
    """Parts a text into what is visible and what was thought."""

    __slots__ = ("held", "inside", "opening", "swallow")

    def __init__(self, inside: bool = False) -> None:
        self.held = ""
        self.inside = inside  # between the tags
        self.opening = True  # nothing but white space was visible so far
        self.swallow = False  # white space after a block that opened the answer

    @property
    def settled(self) -> bool:
        """Whether a text without `<` would pass unchanged from here on."""
        return not (self.held or self.inside or self.opening)

    def feed(self, text: str) -> tuple[str, str]:
        """Return what `text` adds to the visible and to the thought text."""
        text, self.held = self.held + text, ""
        visible, thought, at = [], [], 0
        while True:
            tag = THINK_CLOSE if self.inside else THINK_OPEN
            found = text.find(tag, at)
            end = found if found >= 0 else len(text) - held_prefix(text[at:], tag)
            piece = text[at:end]
            if self.inside:
                thought.append(piece)
            elif piece:
                visible.append(self.show(piece))
            if found < 0:
                self.held = text[end:]
                return "".join(visible), "".join(thought)
            at = found + len(tag)
            self.swallow = self.inside and self.opening
            self.inside = not self.inside

    def show(self, piece: str) -> str:
        """Return a visible piece, without the white space that a block left behind."""
        if self.swallow:
            piece = piece.lstrip(WHITE_SPACE)
            self.swallow = not piece
        self.opening = self.opening and not piece.strip(WHITE_SPACE)
        return piece

    def finish(self) -> tuple[str, str]:
        """Return what was held back; an unclosed block stays thought."""
        held, self.held = self.held, ""
        return ("", held) if self.inside else (self.show(held), "")

class FenceFilter:
    """Takes the fence lines of ```json blocks out."""

    __slots__ = ("fence", "held", "line_start")

    def __init__(self) -> None:
        self.held = ""
        self.line_start = True
        self.fence = ""  # "json", "other" or none

    def feed(self, text: str) -> str:
        """Return what `text` adds to the visible text."""
        *lines, last = (self.held + text).split("\n")
        shown = [self.show(line + "\n") for line in lines]
        self.held = ""
        if self.line_start and MAYBE_FENCE.fullmatch(last):
            self.held = last
        else:
            shown.append(last)
            self.line_start = self.line_start and not last
        return "".join(shown)

    def show(self, line: str) -> str:
        """Return a line, or the end of one, unless it is a fence to be taken out."""
        whole, self.line_start = self.line_start, True
        if not whole:
            return line
        if self.fence:
            if PLAIN_FENCE.fullmatch(line):
                fence, self.fence = self.fence, ""
                return "" if fence == "json" else line
        elif JSON_FENCE.fullmatch(line):
            self.fence = "json"
            return ""
        elif ANY_FENCE.match(line):
            self.fence = "other"
        return line

    def finish(self) -> str:
        """Return what was held back."""
        held, self.held = self.held, ""
        return self.show(held) if held else ""

class FilterRules(NamedTuple):
    """Which filters are on."""

    think: bool = False
    fences: bool = False

class TextFilter:
    """Both filters in a row, for one choice of one answer."""

    __slots__ = ("fences", "think")

    def __init__(self, rules: FilterRules, inside: bool = False) -> None:
        self.think = ThinkFilter(inside) if rules.think else None
        self.fences = FenceFilter() if rules.fences else None

    @property
    def settled(self) -> bool:
        """Whether a text without `<` would pass unchanged from here on."""
        return self.fences is None and (self.think is None or self.think.settled)

    def feed(self, text: str) -> tuple[str, str]:
        """Return what `text` adds to the visible and to the thought text."""
        visible, thought = self.think.feed(text) if self.think else (text, "")
        return self.fences.feed(visible) if self.fences else visible, thought

    def finish(self) -> tuple[str, str]:
        """Return what was held back."""
        visible, thought = self.think.finish() if self.think else ("", "")
        if self.fences:
            visible = self.fences.feed(visible) + self.fences.finish()
        return visible, thought

def filter_text(text: str, rules: FilterRules) -> tuple[str, str]:
    """Return the visible and the thought part of a whole text.

    A `</think>` that nothing opened ends a block that began before the text: chat
    templates put the opening tag into the prompt.
    """
    close, opening = text.find(THINK_CLOSE), text.find(THINK_OPEN)
    text_filter = TextFilter(rules, inside=close >= 0 and not 0 <= opening < close)
    visible, thought = text_filter.feed(text)
    tail, more = text_filter.finish()
    return visible + tail, thought + more

# ======================================================================================
# 6  Dialects (pure)
# ======================================================================================
# Inside, every request and answer is OpenAI-shaped. A `Dialect` is a record of functions
# that turns what a client says into an `Ask` and an answer into what that client reads;
# each endpoint of section 14 names one. JSON that needs no change keeps its bytes, and a
# change replaces the value alone: `splice_json` never writes a whole document again.
# To add a protocol: its functions, its `Dialect` constants, its lines in section 14.

MAX_JSON_DEPTH = 200
MAX_HELD_ANSWER = 64 * MiB  # an answer held to be changed; above, it is relayed as it is
JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
JSON_SPACE = re.compile(r"[ \t\n\r]*")
NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null')
USAGE_PATHS = ("/v1/chat/completions", "/v1/completions")
MODEL_PATHS = (*USAGE_PATHS, "/v1/embeddings", "/v1/messages")  # need a model
Path = tuple[str | int, ...]

def refuse_constant(name: str) -> None:
    """Refuse NaN and the infinities, which Python reads and RFC 8259 does not know."""
    raise ValueError(f"{name} is not JSON")

JSON_DECODER = json.JSONDecoder(parse_constant=refuse_constant)

def parse_json(content: bytes) -> tuple[str, Any]:
    """Return the text and the value of a JSON document. Raises MalformedContent."""
    try:
        text = content.decode("utf-8")
        value = JSON_DECODER.decode(text)
    except RecursionError:
        raise MalformedContent(f"JSON deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise MalformedContent(f"the content is not JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        check_depth(text)
    return text, value

def check_depth(text: str) -> None:
    """Refuse JSON, known to be well-formed, that is nested too deeply."""
    depth = 0
    for bracket in re.findall(r"[\[{\]}]", JSON_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise MalformedContent(f"JSON deeper than {MAX_JSON_DEPTH} levels")

def parse_event_json(data: bytes) -> dict[str, Any] | None:
    """Return the object that an upstream's event holds, None when it holds none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

def encode_json(value: Any) -> bytes:
    """Return compact JSON; a lone surrogate stays an escape."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()

def json_members(text: str, at: int) -> Iterator[tuple[str | int, int, int]]:
    """Yield key or index, start and end of each value of the container at `at`."""
    if text[at] not in "{[":
        return
    is_object, index = text[at] == "{", 0
    at = JSON_SPACE.match(text, at + 1).end()
    while text[at] not in "}]":
        key: str | int = index
        if is_object:
            key, at = JSON_DECODER.raw_decode(text, at)
            at = JSON_SPACE.match(text, at).end() + 1  # the colon
            at = JSON_SPACE.match(text, at).end()
        _, end = JSON_DECODER.raw_decode(text, at)
        yield key, at, end
        at = JSON_SPACE.match(text, end).end()
        if text[at] == ",":
            at = JSON_SPACE.match(text, at + 1).end()
        index += 1

def json_spans(text: str, path: Path, at: int = 0) -> list[tuple[int, int]]:
    """Return where the value at `path` stands; a repeated member has several places."""
    at = JSON_SPACE.match(text, at).end()
    spans = []
    for key, start, end in json_members(text, at):
        if key == path[0]:
            rest = json_spans(text, path[1:], start) if path[1:] else [(start, end)]
            spans.extend(rest)
    return spans

def splice_json(text: str, edits: Mapping[Path, Any]) -> bytes:
    """Return a JSON object with the values at some paths replaced, all else as it is.

    A member that is not there yet is added at the end (top level only).
    """
    places = []
    for path, value in edits.items():
        literal = encode_json(value).decode()
        spans = json_spans(text, path)
        if not spans:
            end = text.rindex("}")
            comma = "" if text[:end].rstrip().endswith("{") else ","
            spans, literal = [(end, end)], f"{comma}{json.dumps(path[0])}:{literal}"
        places.extend((start, end, literal) for start, end in spans)
    for start, end, literal in sorted(places, reverse=True):
        text = text[:start] + literal + text[end:]
    return text.encode()

# --- what is asked --------------------------------------------------------------------

class Rewrite(NamedTuple):
    """What a request needs on its way to one server."""

    model: str
    no_think: bool = False
    include_usage: bool = False

@dataclasses.dataclass(frozen=True)
class Ask:
    """A request as its dialect reads it."""

    path: str
    query: str
    content: bytes
    text: str = ""  # of a JSON document
    doc: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    stream: bool = False
    span: tuple[int, int] = (0, 0)  # where a form's model stands in its content

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the usage event of a stream itself."""
        options = self.doc.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def choices(self) -> int:
        """How many answers at once are asked for."""
        number, prompt = self.doc.get("n"), self.doc.get("prompt")
        many = len(prompt) if isinstance(prompt, list) else 1
        return many * (number if isinstance(number, int) else 1)

class Timing(NamedTuple):
    """When a whole answer was made: wall clock, and durations in ns."""

    now: float
    total: int
    first: int

@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one endpoint's clients speak; each function is pure."""

    service: str
    read: Callable[[str, str, bytes], Ask]  # path, query, content
    encode_error: Callable[[RouterError], bytes]
    encode_event_error: Callable[[RouterError], bytes]
    encode: Callable[[Ask, Rewrite], bytes]  # for a server that speaks it too
    encode_openai: Callable[[Ask, Rewrite], bytes] | None = None  # for one that does not
    openai_path: Callable[[Ask], str] | None = None
    answer: Callable[[Ask, dict[str, Any], Timing, FilterRules], Any] | None = None
    empty: Callable[[Ask, str], dict[str, Any] | None] | None = None  # nothing to do

def read_object(path: str, query: str, content: bytes) -> Ask:
    """Read a JSON object and its model. Raises MalformedContent."""
    text, doc = parse_json(content)
    if not isinstance(doc, dict):
        raise MalformedContent(f"a JSON {type(doc).__name__} instead of an object")
    model = doc.get("model")
    if model is not None and not isinstance(model, str):
        raise MalformedContent(f"`model` is {json.dumps(model)[:80]} instead of a string")
    if not model and path in MODEL_PATHS:
        raise MalformedContent('no model was named; add `"model": "name"`')
    stream = doc.get("stream", False)
    return Ask(path, query, content, text, doc, model or "", stream is True)

def no_think_edit(doc: Mapping[str, Any]) -> dict[Path, str]:
    """Return the edit that appends /no_think to the last user message or the prompt."""
    for member in ("messages", "input"):
        messages = doc.get(member)
        if not isinstance(messages, list):
            continue
        for index in reversed(range(len(messages))):
            message = messages[index]
            if not isinstance(message, dict) or message.get("role") != "user":
                continue
            path: Path = (member, index, "content")
            return append_text(path, message.get("content"), " /no_think")
    member = "input" if isinstance(doc.get("input"), str) else "prompt"
    if member == "input" and "messages" not in doc and "instructions" not in doc:
        return {}  # the input of an embedding
    return append_text((member,), doc.get(member), " /no_think")

def append_text(path: Path, content: Any, suffix: str) -> dict[Path, str]:
    """Return the edit that appends to a string, or to the last text part of a list."""
    if isinstance(content, str):
        return {path: content + suffix}
    for index in reversed(range(len(content) if isinstance(content, list) else 0)):
        part = content[index]
        if isinstance(part, str):
            return {(*path, index): part + suffix}
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return {(*path, index, "text"): part["text"] + suffix}
    return {}

def encode_object(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return the client's own bytes with what must change changed."""
    edits: dict[Path, Any] = {}
    if rewrite.model != ask.model and ask.model:
        edits["model",] = rewrite.model
    if rewrite.no_think:
        edits.update(no_think_edit(ask.doc))
    if rewrite.include_usage:
        options = ask.doc.get("stream_options")
        options = options if isinstance(options, dict) else {}
        edits["stream_options",] = {**options, "include_usage": True}
    return splice_json(ask.text, edits) if edits else ask.content

FORM_MODEL = re.compile(
    rb'content-disposition:[^\r\n]*[; \t]name="?model"?[ \t]*(?:;[^\r\n]*)?\r\n'
    rb"(?:[^\r\n]+\r\n)*\r\n",
    re.IGNORECASE,
)

def read_form(path: str, query: str, content: bytes) -> Ask:
    """Read the `model` part of a multipart form (RFC 7578); without one it is "".

    The form's own first line is its delimiter (RFC 2046 5.1.1).
    """
    start = content.find(b"--")
    delimiter = content[start : content.find(b"\r\n", start)].rstrip(b" \t")
    if start < 0 or len(delimiter) < 3 or len(delimiter) > 200:
        raise MalformedContent("the form does not begin with its boundary")
    at = start
    while 0 <= (at := content.find(delimiter, at)):
        at += len(delimiter)
        match = FORM_MODEL.match(content, content.find(b"\r\n", at) + 2)
        end = content.find(b"\r\n" + delimiter, at)
        if match and end >= match.end():
            model = content[match.end() : end].decode("utf-8", "replace")
            span = (match.end(), end)
            return Ask(path, query, content, model=model, span=span)
    return Ask(path, query, content)

def encode_form(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return the form with the model's name changed inside it."""
    if rewrite.model == ask.model or not ask.model:
        return ask.content
    start, end = ask.span
    name = rewrite.model.encode("utf-8", "replace")
    return ask.content[:start] + name + ask.content[end:]

def read_opaque(path: str, query: str, content: bytes) -> Ask:
    """Take content that nobody looks into."""
    return Ask(path, query, content)

def encode_opaque(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return the content as it came."""
    return ask.content

def encode_openai_error(error: RouterError) -> bytes:
    """Return an error as OpenAI's clients read it."""
    doc = {"message": str(error), "type": error.kind, "param": None, "code": error.code}
    return encode_json({"error": doc})

def encode_openai_event_error(error: RouterError) -> bytes:
    """Return an error as an event of a running stream."""
    return b"data: " + encode_openai_error(error) + b"\n\n"

OPENAI = Dialect(
    "openai", read_object, encode_openai_error, encode_openai_event_error, encode_object
)
OPENAI_FORM = dataclasses.replace(OPENAI, read=read_form, encode=encode_form)
OPENAI_OPAQUE = dataclasses.replace(OPENAI, read=read_opaque, encode=encode_opaque)

# --- what is answered -----------------------------------------------------------------

class Slot(NamedTuple):
    """Where a text stands in an answer or event, and which of several texts it is."""

    path: Path
    index: Any
    text: str

def content_slots(path: Path, content: Any, index: Any) -> Iterator[Slot]:
    """Yield the slots of a content: a string, or the text parts of a list."""
    if isinstance(content, str):
        yield Slot(path, index, content)
    for at, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield Slot((*path, at, "text"), (index, at), part["text"])

def text_slots(doc: Mapping[str, Any]) -> list[Slot]:
    """Return where the visible text of an answer or of one event stands.

    Knows chat and text completions, responses, messages and Ollama's own answers.
    """
    slots: list[Slot] = []
    choices = doc.get("choices")
    for at, choice in enumerate(choices if isinstance(choices, list) else []):
        if not isinstance(choice, dict):
            continue
        index = choice.get("index", at)
        slots += content_slots(("choices", at, "text"), choice.get("text"), index)
        for holder in ("delta", "message"):
            said = choice.get(holder)
            if isinstance(said, dict):
                path = ("choices", at, holder, "content")
                slots += content_slots(path, said.get("content"), index)
    for holder, member in (("message", "content"), ("delta", "text")):
        said = doc.get(holder)
        if isinstance(said, dict):
            index = doc.get("index", 0)
            slots += content_slots((holder, member), said.get(member), index)
    if isinstance(doc.get("response"), str):
        slots += content_slots(("response",), doc["response"], 0)
    slots += content_slots(("content",), doc.get("content"), 0)
    if doc.get("type") == "response.output_text.delta":
        slots += content_slots(("delta",), doc.get("delta"), doc.get("item_id"))
    return slots

def output_slots(value: Any, path: Path = ()) -> Iterator[Slot]:
    """Yield the whole texts inside a response object, however deep it lies."""
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        if key == "text" and value.get("type") in ("output_text", TEXT_DONE):
            yield from content_slots((*path, key), inner, path)
        elif isinstance(inner, (dict, list)) and len(path) < 6:
            yield from output_slots(inner, (*path, key))

TEXT_DONE = "response.output_text.done"
CLOSING_TYPES = ("content_block_stop", "message_stop", TEXT_DONE)

def closed_indexes(doc: Mapping[str, Any]) -> list[Any] | None:
    """Return which texts end with this event; None means all of them."""
    if doc.get("done") is True or doc.get("type") in CLOSING_TYPES:
        return None
    choices = doc.get("choices")
    return [
        choice.get("index", at)
        for at, choice in enumerate(choices if isinstance(choices, list) else [])
        if isinstance(choice, dict) and choice.get("finish_reason")
    ]

def carries_more(doc: Mapping[str, Any]) -> bool:
    """Tell whether an event says anything beside its text."""
    if doc.get("usage") or doc.get("done"):
        return True
    for choice in doc.get("choices") or ():
        said = choice.get("delta") or {}
        if choice.get("finish_reason") or any(said[k] for k in said if k != "content"):
            return True
    message = doc.get("message")
    return isinstance(message, dict) and bool(message.get("tool_calls") or message.get("thinking"))

def tail_document(doc: Mapping[str, Any], slot: Slot, text: str) -> dict[str, Any]:
    """Return an event like `doc` that says nothing but `text` at the slot."""
    copy = json.loads(json.dumps(doc))
    copy.pop("usage", None)
    if slot.path[0] == "choices":
        choice = copy["choices"][slot.path[1]]
        choice["finish_reason"] = None
        copy["choices"] = [choice]
        if "delta" in choice:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        return copy
    holder = copy
    for key in slot.path[:-1]:
        holder = holder[key]
    holder[slot.path[-1]] = text
    return copy

def filter_document(content: bytes, rules: FilterRules, model: str | None) -> bytes:
    """Return a whole JSON answer filtered, and its model renamed unless None."""
    marked = rules.fences or (rules.think and b"<" in content or b"\\u003" in content)
    doc = parse_event_json(content) if marked or model is not None else None
    if doc is None:
        return content
    edits: dict[Path, Any] = {}
    for slot in [*text_slots(doc), *output_slots(doc)] if marked else ():
        visible, _ = filter_text(slot.text, rules)
        if visible != slot.text:
            edits[slot.path] = visible
    if model is not None and doc.get("model") not in (None, model):
        edits["model",] = model
    return splice_json(content.decode(), edits) if edits else content

class Transform(Protocol):
    """What happens to an answer's content on its way to the client."""

    whole: bool  # nothing leaves before finish()
    complete: bool  # the answer said that it is at its end
    events: int
    usage: dict[str, Any]

    def feed(self, data: bytes) -> bytes:
        """Return what may leave now."""

    def finish(self) -> bytes:
        """Return what was held back, at the clean end of the content."""

class WholeAnswer:
    """Holds an answer until all of it can be changed; a huge one goes as it is."""

    whole, complete, events = True, False, 0

    def __init__(self, change: Callable[[bytes], bytes], required: bool = False) -> None:
        self.change, self.required = change, required
        self.held: list[bytes] = []
        self.size = 0
        self.usage: dict[str, Any] = {}

    def feed(self, data: bytes) -> bytes:
        """Hold `data`; give up above MAX_HELD_ANSWER."""
        if not self.whole:
            return data
        self.held.append(data)
        self.size += len(data)
        if self.size <= MAX_HELD_ANSWER:
            return b""
        if self.required:
            raise BadGateway(f"the answer is longer than {MAX_HELD_ANSWER} bytes")
        self.whole = False
        return b"".join(self.held)

    def finish(self) -> bytes:
        """Return the changed answer."""
        self.complete = True
        return self.change(b"".join(self.held)) if self.whole else b""

class EventFilter:
    """Filters the events of a stream that stays in its own format."""

    whole = False

    def __init__(self, ask: Ask, rules: FilterRules, splitter: EventSplitter) -> None:
        self.rules, self.splitter = rules, splitter
        self.lines = splitter.mark == b"\n"
        self.hide_usage = False  # the usage event was not the client's wish
        self.model: str | None = None  # the name that the client knows
        self.single = ask.choices == 1
        suspects = (b"<", b"\\u003") if any(rules) else ()
        self.words = (b'"usage"', b'"timings"', b'"done"', *suspects)
        self.filters: dict[Any, TextFilter] = {}
        self.seen: dict[Any, tuple[dict[str, Any], Slot]] = {}
        self.usage: dict[str, Any] = {}
        self.events = 0
        self.complete = self.raw = False

    def feed(self, data: bytes) -> bytes:
        """Return the events that are whole now, filtered."""
        if self.raw:
            return data
        block = self.splitter.feed(data)
        if not block:
            self.raw = len(self.splitter.held) > MAX_HELD_EVENT
            return self.splitter.take() if self.raw else b""
        return self.change_block(block)

    def finish(self) -> bytes:
        """Return the last event, if it lacks its end, and what was held back."""
        rest = self.splitter.take()
        return (self.change_block(rest) if rest else b"") + self.flush(None)

    def change_block(self, block: bytes) -> bytes:
        """Return whole events; only those that could need a change are parsed."""
        self.events += block.count(b"\n" if self.lines else b"data:")
        if self.hide_usage and b'"usage"' in block:
            block = NULL_USAGE.sub(b"", block)
        self.complete = self.complete or DONE_MARK in block
        parts: list[bytes] = []
        at, found = 0, dict.fromkeys(self.words, -1)
        while at < len(block):
            end = self.plain_until(block, at, found)
            if end > at:
                parts.append(block[at:end])
            else:
                match = self.splitter.end.search(block, at)
                end = match.end() if match else len(block)
                parts.append(self.change(block[at:end]))
            at = end
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def plain_until(self, block: bytes, at: int, found: dict[bytes, int]) -> int:
        """Return how far the events from `at` on may leave as they are.

        `found` keeps where each suspicious word comes next, so that a block is searched once.
        """
        if self.model is not None or not self.settled():
            return at
        nearest = len(block)
        for word, place in found.items():
            if place < at:
                place = block.find(word, at)
                found[word] = place = place if place >= 0 else len(block)
            nearest = min(nearest, place)
        if nearest == len(block):
            return nearest
        mark = self.splitter.mark
        start = block.rfind(mark, at, nearest)
        return start + len(mark) if start >= 0 else at

    def settled(self) -> bool:
        """Tell whether text without `<` would pass every filter unchanged."""
        if not any(self.rules):
            return True
        if not self.single or not self.filters:
            return False
        return all([text_filter.settled for text_filter in self.filters.values()])

    def change(self, event: bytes) -> bytes:
        """Return one event filtered, b"" when nothing is left of it."""
        data = event if self.lines else read_sse_data(event)
        if data == DONE_MARK:
            return self.flush(None) + event
        doc = parse_event_json(data)
        if doc is None:
            return event
        self.note_usage(doc)
        if self.hide_usage and self.usage and doc.get("choices") == []:
            return b""
        tails, edits, empty = self.filter(doc) if any(self.rules) else (b"", {}, False)
        if self.model is not None and doc.get("model") not in (None, self.model):
            edits["model",] = self.model
        if empty and not carries_more(doc):
            return tails
        if not edits:
            return tails + event
        changed = splice_json(data.decode("utf-8", "replace"), edits)
        if self.lines:
            return tails + changed
        return tails + replace_sse_data(event, changed)

    def note_usage(self, doc: dict[str, Any]) -> None:
        """Keep what the answer says of its own cost, and that it is done."""
        if doc.get("done") is True:
            self.complete = True
            self.usage = doc
        if isinstance(doc.get("timings"), dict):
            self.usage = {**self.usage, "timings": doc["timings"]}
        if isinstance(doc.get("usage"), dict):
            self.usage = {**self.usage, **doc["usage"]}

    def filter(self, doc: dict[str, Any]) -> tuple[bytes, dict[Path, Any], bool]:
        """Return events to go before this one, its edits, and whether it lost all text."""
        edits: dict[Path, Any] = {}
        paths: dict[Any, Slot] = {}
        for slot in text_slots(doc):
            text_filter = self.filters.setdefault(slot.index, TextFilter(self.rules))
            edits[slot.path] = text_filter.feed(slot.text)[0]
            self.seen[slot.index] = doc, slot
            paths[slot.index] = slot
        tails = self.flush(closed_indexes(doc), paths, edits)
        for slot in output_slots(doc):
            paths[slot.path] = slot
            edits[slot.path] = filter_text(slot.text, self.rules)[0]
        empty = bool(paths) and not any(edits.values())
        same = [slot for slot in paths.values() if edits[slot.path] == slot.text]
        for slot in same:
            del edits[slot.path]
        return tails, edits, empty and bool(edits)

    def flush(
        self,
        closed: list[Any] | None,
        here: Mapping[Any, Slot] | None = None,
        edits: dict[Path, Any] | None = None,
    ) -> bytes:
        """Let out what the filters of closed texts hold (None: all): in this event, when
        it has a place for it, else as an event of its own."""
        tails = []
        for index in list(self.filters) if closed is None else closed:
            text = self.filters[index].finish()[0] if index in self.filters else ""
            if text and here and edits is not None and index in here:
                edits[here[index].path] += text
            elif text:
                tail = encode_json(tail_document(*self.seen[index], text))
                tails.append(tail + b"\n" if self.lines else b"data: " + tail + b"\n\n")
        return b"".join(tails)

# --- Ollama: what is asked ------------------------------------------------------------

SAME_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "seed", "stop",
                "presence_penalty", "frequency_penalty", "repeat_penalty")
IMAGE_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"),
               (b"RIFF", "webp"), (b"BM", "bmp"))

def read_ollama(path: str, query: str, content: bytes) -> Ask:
    """Read an Ollama request: it streams unless told not to, `:latest` is nothing."""
    ask = read_object(path, query, content)
    model = ask.model or ask.doc.get("name") or ""
    if not isinstance(model, str) or not model:
        raise MalformedContent('no model was named; add `"model": "name"`')
    stream = ask.doc.get("stream", True) is not False
    model = model.removesuffix(":latest") or model
    return dataclasses.replace(ask, model=model, stream=stream)

def encode_ollama(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return the client's own bytes for a server that speaks Ollama itself."""
    member = "model" if "model" in ask.doc else "name"
    edits: dict[Path, Any] = no_think_edit(ask.doc) if rewrite.no_think else {}
    if rewrite.model != ask.model:
        edits[member,] = rewrite.model
    return splice_json(ask.text, edits) if edits else ask.content

def image_part(image: Any) -> dict[str, Any]:
    """Return base64 of an image as a part of a message, its type by magic number."""
    data = str(image)
    if not data.startswith(("data:", "http://", "https://")):
        try:
            start = base64.b64decode(data[:16], validate=True)
        except (ValueError, binascii.Error):
            raise MalformedContent("an image is not base64") from None
        kinds = (kind for magic, kind in IMAGE_MAGIC if start.startswith(magic))
        data = f"data:image/{next(kinds, 'png')};base64,{data}"
    return {"type": "image_url", "image_url": {"url": data}}

def message_content(text: Any, images: Any) -> Any:
    """Return a message's content: a string, or parts when there are images."""
    if not images or not isinstance(images, list):
        return text
    parts = [image_part(image) for image in images]
    return [{"type": "text", "text": text}, *parts] if text else parts

def encode_tool_calls(calls: list[Any], message: int) -> list[dict[str, Any]]:
    """Return tool calls with the ids and the string arguments that OpenAI wants."""
    result = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise MalformedContent(f"tool_calls[{index}] has no function")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = encode_json(arguments).decode()
        name = str(function.get("name", ""))
        call_id = call.get("id") or f"call_{message}_{index}"
        function = {"name": name, "arguments": arguments}
        result.append({"id": call_id, "type": "function", "function": function})
    return result

def openai_messages(messages: Any) -> list[dict[str, Any]]:
    """Return Ollama's messages as OpenAI's; a tool's result gets its call's id."""
    if not isinstance(messages, list):
        raise MalformedContent("`messages` is not a list")
    result: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (name, id) still without a result
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise MalformedContent(f"messages[{index}] is not an object")
        role = message.get("role", "user")
        content = message_content(message.get("content", ""), message.get("images"))
        entry: dict[str, Any] = {"role": role, "content": content}
        if message.get("tool_calls"):
            entry["tool_calls"] = encode_tool_calls(message["tool_calls"], index)
            open_calls += [(c["function"]["name"], c["id"]) for c in entry["tool_calls"]]
        if message.get("thinking"):
            entry["reasoning_content"] = message["thinking"]
        if role == "tool":
            name = message.get("tool_name") or message.get("name")
            call = next((c for c in open_calls if name in (None, c[0])), None)
            if call:
                open_calls.remove(call)
            given = message.get("tool_call_id")
            entry["tool_call_id"] = given or (call[1] if call else f"call_{index}")
        result.append(entry)
    return result

def openai_options(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ollama's options, format and tools in OpenAI's names."""
    options = doc.get("options") or {}
    if not isinstance(options, dict):
        raise MalformedContent("`options` is not an object")
    result = {name: options[name] for name in SAME_OPTIONS if name in options}
    limit = options.get("num_predict")
    if isinstance(limit, int) and limit > 0:
        result["max_tokens"] = limit
    form = doc.get("format")
    if form == "json":
        result["response_format"] = {"type": "json_object"}
    elif isinstance(form, dict):
        schema = {"name": "response", "strict": True, "schema": form}
        result["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form:
        raise MalformedContent(f'`format` is {form!r} instead of "json" or a schema')
    for name in ("tools", "suffix"):
        if doc.get(name):
            result[name] = doc[name]
    return result

def encode_ollama_chat(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return an Ollama chat or generate request as OpenAI's chat or completion."""
    doc = ask.doc
    out: dict[str, Any] = {"model": rewrite.model}
    if "messages" in doc:
        out["messages"] = openai_messages(doc["messages"])
    elif doc.get("raw"):
        out["prompt"] = doc.get("prompt", "")
    else:
        content = message_content(doc.get("prompt", ""), doc.get("images"))
        system = [{"role": "system", "content": doc["system"]}] if doc.get("system") else []
        out["messages"] = [*system, {"role": "user", "content": content}]
    out["stream"] = ask.stream
    out.update(openai_options(doc))
    if ask.stream and rewrite.include_usage:
        out["stream_options"] = {"include_usage": True}
    if rewrite.no_think or doc.get("think") is False:
        return splice_json(encode_json(out).decode(), no_think_edit(out))
    return encode_json(out)

def encode_ollama_embed(ask: Ask, rewrite: Rewrite) -> bytes:
    """Return an Ollama embedding request as OpenAI's."""
    source = ask.doc.get("input", ask.doc.get("prompt", ""))
    out = {"model": rewrite.model, "input": source, "encoding_format": "float"}
    if ask.doc.get("dimensions"):
        out["dimensions"] = ask.doc["dimensions"]
    return encode_json(out)

# --- Ollama: what is answered ---------------------------------------------------------

def encode_ollama_error(error: RouterError) -> bytes:
    """Return an error as Ollama's clients read it."""
    return encode_json({"error": str(error)})

def encode_ollama_event_error(error: RouterError) -> bytes:
    """Return an error as the last line of a running stream."""
    return encode_ollama_error(error) + b"\n"

def rfc3339(seconds: float) -> str:
    """Return a moment in UTC with milliseconds, as RFC 3339 writes it."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"

def ollama_text(ask: Ask, message: dict[str, Any]) -> dict[str, Any]:
    """Put an answer's text where chat and generate clients look for it."""
    if ask.path.endswith("/chat"):
        return {"message": {"role": "assistant", "content": "", **message}}
    text = {"response": message.get("content", "")}
    return {**text, **{k: v for k, v in message.items() if k != "content"}}

def ollama_counts(usage: Mapping[str, Any], timing: Timing) -> dict[str, Any]:
    """Return the counts and durations (ns) that end an answer."""
    prompt, total = usage.get("prompt_tokens"), max(timing.total, 1)
    first = min(timing.first, total)
    return {
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": prompt if isinstance(prompt, int) else 0,
        "prompt_eval_duration": first,
        "eval_count": usage.get("completion_tokens") or 0,
        "eval_duration": max(total - first, 1),
    }

def decode_tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Return OpenAI's tool calls with the object arguments that Ollama gives."""
    result = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") or {}
        text = function.get("arguments") or "{}"
        arguments = parse_event_json(text.encode()) if isinstance(text, str) else text
        if arguments is None:
            arguments = {"_raw": text}
        result.append({"function": {"name": function.get("name"), "arguments": arguments}})
    return result

def reasoning(message: Mapping[str, Any]) -> str:
    """Return the thinking that a server gives apart from its answer."""
    text = message.get("reasoning_content") or message.get("reasoning") or ""
    return text if isinstance(text, str) else ""

def ollama_done(finish_reason: Any) -> str:
    """Return Ollama's word for why an answer ended."""
    return "length" if finish_reason == "length" else "stop"

def think_rules(ask: Ask, rules: FilterRules) -> FilterRules:
    """Return the filters for an answer: a client that asks for thinking gets it apart."""
    return rules._replace(think=rules.think or ask.doc.get("think") not in (None, False))

def ollama_thinking(ask: Ask, thought: str, apart: str) -> dict[str, str]:
    """Return the `thinking` member: tagged thoughts only for clients that asked."""
    wants = ask.doc.get("think")
    text = apart if wants is None else "" if wants is False else apart + thought
    return {"thinking": text} if text else {}

def answer_ollama_chat(
    ask: Ask, doc: dict[str, Any], timing: Timing, rules: FilterRules
) -> dict[str, Any]:
    """Return a whole OpenAI answer as Ollama's."""
    choice = (doc.get("choices") or [{}])[0]
    said = choice.get("message") or {"content": choice.get("text")}
    text = said.get("content") or ""
    visible, thought = filter_text(text, think_rules(ask, rules))
    message: dict[str, Any] = {"content": visible}
    message.update(ollama_thinking(ask, thought, reasoning(said)))
    calls = decode_tool_calls(said.get("tool_calls"))
    if calls:
        message["tool_calls"] = calls
    return {
        "model": ask.doc.get("model", ask.model),
        "created_at": rfc3339(timing.now),
        **ollama_text(ask, message),
        "done": True,
        "done_reason": ollama_done(choice.get("finish_reason")),
        **ollama_counts(doc.get("usage") or {}, timing),
    }

def answer_ollama_embed(
    ask: Ask, doc: dict[str, Any], timing: Timing, rules: FilterRules
) -> dict[str, Any]:
    """Return OpenAI's embeddings as Ollama's."""
    vectors = [item.get("embedding") for item in doc.get("data") or []]
    if ask.path == "/api/embeddings":
        return {"embedding": vectors[0] if vectors else []}
    counts = ollama_counts(doc.get("usage") or {}, timing)
    kept = ("total_duration", "load_duration", "prompt_eval_count")
    model = {"model": ask.doc.get("model", ask.model), "embeddings": vectors}
    return model | {name: counts[name] for name in kept}

def ollama_loaded(ask: Ask, created_at: str) -> dict[str, Any] | None:
    """Return the answer to an empty prompt or message list, None when there is work."""
    work = ask.doc.get("messages" if ask.path.endswith("/chat") else "prompt")
    if work or ask.doc.get("images"):
        return None
    reason = "unload" if ask.doc.get("keep_alive") in (0, "0", "0s") else "load"
    model = {"model": ask.doc.get("model", ask.model), "created_at": created_at}
    return model | ollama_text(ask, {}) | {"done": True, "done_reason": reason}

def ollama_path(ask: Ask) -> str:
    """Return the OpenAI path that serves an Ollama request."""
    if "embed" in ask.path:
        return "/v1/embeddings"
    return "/v1/completions" if ask.doc.get("raw") else "/v1/chat/completions"

OLLAMA = Dialect(
    "ollama",
    read_ollama,
    encode_ollama_error,
    encode_ollama_event_error,
    encode_ollama,
    encode_ollama_chat,
    ollama_path,
    answer_ollama_chat,
    ollama_loaded,
)
OLLAMA_EMBED = dataclasses.replace(
    OLLAMA, encode_openai=encode_ollama_embed, answer=answer_ollama_embed, empty=None
)
OLLAMA_NATIVE = dataclasses.replace(OLLAMA, encode_openai=None, empty=None)
OLLAMA_OPAQUE = dataclasses.replace(OLLAMA_NATIVE, read=read_opaque, encode=encode_opaque)

def model_details() -> dict[str, Any]:
    """Return the details that Ollama's clients expect of every model."""
    return {
        "parent_model": "", "format": "", "family": "", "families": [],
        "parameter_size": "", "quantization_level": "",
    }

def ollama_model(name: str, created_at: str) -> dict[str, Any]:
    """Return one entry of /api/tags."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    entry = {"name": name, "model": name, "modified_at": created_at, "size": 0}
    return {**entry, "digest": digest, "details": model_details()}

def ollama_show(name: str, created_at: str) -> dict[str, Any]:
    """Return what is known of a model of a server that does not speak Ollama."""
    return {
        "modelfile": "", "parameters": "", "template": "", "license": "",
        "details": model_details(), "model_info": {"general.basename": name},
        "capabilities": ["completion", "tools"], "modified_at": created_at,
    }

class OllamaStream:
    """Turns the events of an OpenAI stream into Ollama's lines."""

    whole = False

    def __init__(self, ask: Ask, rules: FilterRules, clock: Callable[[], Timing]) -> None:
        self.ask, self.clock = ask, clock
        self.splitter = sse_splitter()
        self.filter = TextFilter(think_rules(ask, rules))
        self.usage: dict[str, Any] = {}
        self.calls: dict[Any, dict[str, Any]] = {}
        self.reason: Any = None
        self.events = 0
        self.complete = self.failed = False

    def feed(self, data: bytes) -> bytes:
        """Return the lines that the whole events so far make."""
        block = self.splitter.feed(data)
        if len(self.splitter.held) > MAX_HELD_EVENT:
            raise BadGateway(f"an event is longer than {MAX_HELD_EVENT} bytes")
        return b"".join(map(self.change, self.splitter.split(block))) if block else b""

    def finish(self) -> bytes:
        """Return the last lines, with the counts."""
        rest = self.splitter.take()
        lines = [self.change(rest)] if rest else []
        if self.failed:
            return b"".join(lines)
        lines.append(self.close_texts())
        timing = self.clock()
        end = {"done": True, "done_reason": ollama_done(self.reason)}
        self.complete = True
        lines.append(self.line({}, {**end, **ollama_counts(self.usage, timing)}))
        return b"".join(lines)

    def line(self, message: dict[str, Any], more: dict[str, Any]) -> bytes:
        """Return one line."""
        model = self.ask.doc.get("model", self.ask.model)
        start = {"model": model, "created_at": rfc3339(self.clock().now)}
        return encode_json({**start, **ollama_text(self.ask, message), **more}) + b"\n"

    def change(self, event: bytes) -> bytes:
        """Return the lines for one event, often one, sometimes none."""
        doc = parse_event_json(read_sse_data(event))
        if doc is None:
            return b""
        self.events += 1
        if isinstance(doc.get("usage"), dict):
            self.usage = doc["usage"]
        if doc.get("error") and not doc.get("choices"):
            self.failed = True
            return encode_ollama_event_error(BadGateway(error_text(doc)))
        choice = (doc.get("choices") or [{}])[0]
        said = choice.get("delta") or choice.get("message") or {}
        visible, thought = self.filter.feed(said.get("content") or choice.get("text") or "")
        lines = [self.say(visible, thought, reasoning(said))]
        for call in said.get("tool_calls") or ():
            self.gather(call)
        if choice.get("finish_reason"):
            self.reason = choice["finish_reason"]
            lines.append(self.close_texts())
        return b"".join(lines)

    def say(self, visible: str, thought: str, apart: str) -> bytes:
        """Return the line that says something, b"" for nothing."""
        thinking = ollama_thinking(self.ask, thought, apart)
        if not visible and not thinking:
            return b""
        return self.line({"content": visible, **thinking}, {"done": False})

    def gather(self, call: dict[str, Any]) -> None:
        """Add a fragment of a tool call."""
        known = self.calls.setdefault(call.get("index", len(self.calls)), {"arguments": ""})
        function = call.get("function") or {}
        known["name"] = function.get("name") or known.get("name")
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):
            arguments = encode_json(arguments).decode()
        known["arguments"] += arguments

    def close_texts(self) -> bytes:
        """Return what was held back: text, and the gathered tool calls."""
        lines = self.say(*self.filter.finish(), "")
        calls = decode_tool_calls([{"function": call} for call in self.calls.values()])
        self.calls = {}
        if calls:
            lines += self.line({"tool_calls": calls}, {"done": False})
        return lines

def error_text(doc: Mapping[str, Any]) -> str:
    """Return the sentence in an upstream's error document."""
    error = doc.get("error", doc.get("detail", doc.get("message")))
    if isinstance(error, dict):
        error = error.get("message") or error
    return error if isinstance(error, str) else json.dumps(error)

def translate_error(content: bytes) -> bytes:
    """Return an OpenAI server's error as Ollama's clients read it."""
    doc = parse_event_json(content)
    text = content.decode("utf-8", "replace").strip() if doc is None else error_text(doc)
    return encode_json({"error": text or "the upstream gave no reason"})

# --- which transform ------------------------------------------------------------------

class AnswerPlan(NamedTuple):
    """What is known of an answer when its head has come."""

    ask: Ask
    dialect: Dialect
    native: bool  # the server speaks the client's dialect
    rules: FilterRules
    hide_usage: bool
    renamed: bool
    clock: Callable[[], Timing]

def translate_document(plan: AnswerPlan, content: bytes) -> bytes:
    """Return a whole answer in the client's dialect."""
    doc = parse_event_json(content)
    if doc is None or plan.dialect.answer is None:
        raise BadGateway(f"the upstream's answer is not a JSON object: {content[:80]!r}")
    if doc.get("error") and not doc.get("choices"):
        return translate_error(content)
    answer = plan.dialect.answer(plan.ask, doc, plan.clock(), plan.rules)
    return encode_json(answer) + (b"\n" if plan.ask.stream else b"")

def choose_transform(plan: AnswerPlan, status: int, media_type: str) -> Transform | None:
    """Return what an answer must go through; None when its bytes go as they are."""
    ask, rules = plan.ask, plan.rules
    if not plan.native:
        if status >= 400:
            return WholeAnswer(translate_error, required=True)
        if media_type == "text/event-stream":
            return OllamaStream(ask, rules, plan.clock)
        return WholeAnswer(functools.partial(translate_document, plan), required=True)
    if status >= 400 or not ask.text:
        return None
    model = None
    if plan.renamed and plan.dialect.service == "ollama":
        model = ask.doc.get("model") or ask.model
    if media_type in ("text/event-stream", "application/x-ndjson"):
        is_sse = media_type == "text/event-stream"
        stream = EventFilter(ask, rules, sse_splitter() if is_sse else line_splitter())
        stream.hide_usage, stream.model = plan.hide_usage, model
        return stream
    if media_type != "application/json" or not (any(rules) or model):
        return None
    return WholeAnswer(lambda content: filter_document(content, rules, model))

# ======================================================================================
# 7  Routing (pure)
# ======================================================================================
# A model name and a source host become instances in order, and the trail says why. The
# live path, the page and `explain` ask the same `resolve`. The file is strict: what it
# does not know is an error with file, line, path and remedy.

MAX_PATTERN_NAME = 256  # longer names are not tried on patterns: CVE-like `/.*x/` stalls
STRATEGIES = ("failover", "round_robin", "least_busy")
ENV_REFERENCE = re.compile(r"\$\{([^}]*)\}")
PINNED = re.compile(r"(.+) \[([^\[\]]+)\]", re.DOTALL)
NO_YAML = (
    "is not JSON, and YAML needs PyYAML: install it (pip install pyyaml) or write the file as JSON"
)

@dataclasses.dataclass(frozen=True)
class Server:
    """A machine that answers; `api` is what it speaks beside OpenAI."""

    name: str
    url: UpstreamURL
    api: str = "openai"
    api_key: str | None = dataclasses.field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    verify: bool = True

class Instance(NamedTuple):
    """A server and the model it is asked for; None keeps the request's name."""

    server: Server
    model: str | None = None

    def __str__(self) -> str:
        return f"{self.server.name}/{self.model}" if self.model else self.server.name

class Alias(NamedTuple):
    """A friendly name and who serves it."""

    name: str
    strategy: str
    instances: tuple[Instance, ...]

class AddressRange(NamedTuple):
    """Addresses of one family from `low` to `high`, as numbers."""

    version: int
    low: int
    high: int

class Rule(NamedTuple):
    """One entry of `routes`: what must match, and where it leads."""

    name: str
    model: str | re.Pattern[str] | None
    hosts: tuple[AddressRange, ...] | None
    target: Alias | Instance
    match_text: str

@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """Everything that decides where a request goes."""

    default: Server
    servers: Mapping[str, Server] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, Alias] = dataclasses.field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    model_map: ModelMap = ()
    source: str = ""

    def all_servers(self) -> list[Server]:
        """Return every server that can be asked, each once, the default one last."""
        targets = [rule.target for rule in self.rules] + list(self.aliases.values())
        inner = [
            instance.server
            for target in targets
            for instance in (target.instances if isinstance(target, Alias) else [target])
        ]
        servers = {s.url: s for s in [self.default, *inner, *self.servers.values()]}
        return list(servers.values())

class Step(NamedTuple):
    """One line of the trail: a rule that was tried, and what came of it."""

    rule: str
    matched: bool
    why: str

class Decision(NamedTuple):
    """Where a request goes, in order, and why."""

    asked: str
    mapped: str
    route: str
    strategy: str
    instances: tuple[Instance, ...]  # every model is set
    trail: tuple[Step, ...]

def parse_address_range(text: str) -> AddressRange:
    """Read one address, a CIDR or a range `a-b`. Raises ValueError."""
    first, dash, last = text.partition("-")
    try:
        if dash:
            low, high = (ipaddress.ip_address(part.strip()) for part in (first, last))
        else:
            network = ipaddress.ip_network(text.strip(), strict=False)
            low, high = network[0], network[-1]
    except ValueError as error:
        raise ValueError(f"{error}; write 10.0.0.1, 10.0.0.0/24 or 10.0.0.1-10.0.0.9") from None
    if low.version != high.version or int(low) > int(high):
        raise ValueError(f"{text!r} is not a range from low to high")
    return AddressRange(low.version, int(low), int(high))

class RoutingFile:
    """Reads a routing file's document into a table; every error names its place."""

    def __init__(self, name: str, doc: Any, line_of: Callable[[Path], int | None]) -> None:
        self.name, self.doc, self.line_of = name, doc, line_of
        self.servers: dict[str, Server] = {}
        self.aliases: dict[str, Alias] = {}

    def error(self, path: Path, message: str) -> ConfigError:
        """Return the error about the value at `path`."""
        line = self.line_of(path)
        place = f"{self.name}:{line}" if line else self.name
        words = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
        return ConfigError(f"{place}: {words.removeprefix('.') or 'the file'}: {message}")

    def expand(self, value: Any, environ: Mapping[str, str], path: Path = ()) -> Any:
        """Return the document with `${NAME}` replaced in every string."""
        if isinstance(value, dict):
            return {k: self.expand(v, environ, (*path, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self.expand(v, environ, (*path, i)) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in ENV_REFERENCE.findall(value):
            if name not in environ:
                raise self.error(path, f"${{{name}}} is not set; set it or write the value")
        return ENV_REFERENCE.sub(lambda match: environ[match[1]], value)

    def record(self, value: Any, path: Path, *allowed: str) -> dict[str, Any]:
        """Return a mapping that has only allowed keys."""
        if not isinstance(value, dict):
            raise self.error(path, f"{value!r} instead of a mapping of {', '.join(allowed)}")
        for key in value:
            if key not in allowed:
                raise self.error((*path, key), f"unknown key; known are {', '.join(allowed)}")
        return value

    def text(self, value: Any, path: Path) -> str:
        """Return a name that is not empty."""
        if not isinstance(value, str) or not value:
            raise self.error(path, f"{value!r} instead of a text; put it in quotes")
        return value

    def checked(self, parse: Callable[[str], Any], value: Any, path: Path) -> Any:
        """Return what `parse` makes of a text, its ValueError with the place."""
        try:
            return parse(self.text(value, path))
        except ValueError as error:
            raise self.error(path, str(error)) from None

    def read(self, environ: Mapping[str, str], default: Server,
             model_map: ModelMap) -> RoutingTable:
        """Return the table that the document describes."""
        doc = self.expand({} if self.doc is None else self.doc, environ)
        self.record(doc, (), "servers", "aliases", "routes")
        for member in ("servers", "aliases"):
            if not isinstance(doc.get(member) or {}, dict):
                raise self.error((member,), "not a mapping of names")
        for name, value in (doc.get("servers") or {}).items():
            self.servers[name] = self.server(value, ("servers", name))
        for name, value in (doc.get("aliases") or {}).items():
            self.aliases[name] = self.alias(value, ("aliases", name))
        routes = doc.get("routes") or []
        if not isinstance(routes, list):
            raise self.error(("routes",), "not a list; begin each route with `- match:`")
        default = next((s for s in self.servers.values() if s.url == default.url), default)
        rules = tuple(self.rule(v, ("routes", i), default) for i, v in enumerate(routes))
        names = model_map
        return RoutingTable(default, self.servers, self.aliases, rules, names, self.name)

    def server(self, value: Any, path: Path) -> Server:
        """Read a server: a URL, or a record with one."""
        name = self.text(path[1], path)
        value = {"url": value} if isinstance(value, str) else value
        known = ("url", "api", "api_key", "headers", "verify")
        record = self.record(value, path, *known)
        url = self.checked(parse_upstream_url, record.get("url"), (*path, "url"))
        api, verify = record.get("api", "openai"), record.get("verify", True)
        if api not in ("openai", "ollama"):
            raise self.error((*path, "api"), f"{api!r} instead of openai or ollama")
        if not isinstance(verify, bool):
            raise self.error((*path, "verify"), f"{verify!r} instead of true or false")
        key = record.get("api_key")
        headers = record.get("headers") or {}
        if not isinstance(headers, dict):
            raise self.error((*path, "headers"), "not a mapping of names to values")
        for field, text in [*headers.items(), ("api_key", "x" if key is None else key)]:
            if not FIELD_LINE.fullmatch(f"{field}:{text}") or not isinstance(text, str):
                raise self.error((*path, "headers", field), f"{text!r} is no field value")
        return Server(name, url, api, key, tuple(headers.items()), verify)

    def upstream(self, value: Any, path: Path) -> Server:
        """Read a server's name or a URL."""
        name = self.text(value, path)
        if name in self.servers:
            return self.servers[name]
        if not ABSOLUTE_SCHEME.match(name):
            known = ", ".join(self.servers) or "none"
            raise self.error(path, f"unknown server {name!r}; known are {known}, or a URL")
        url = self.checked(parse_upstream_url, name, path)
        return Server(f"{url.authority}{url.prefix}", url)

    def instance(self, value: Any, path: Path) -> Instance:
        """Read `server/model`, or a record of server (or url) and model."""
        if isinstance(value, str):
            name, _, model = value.partition("/")
            return Instance(self.upstream(name, path), model or None)
        record = self.record(value, path, "server", "url", "model")
        if ("server" in record) == ("url" in record):
            raise self.error(path, "name one of `server` and `url`")
        member = "server" if "server" in record else "url"
        server = self.upstream(record[member], (*path, member))
        model = record.get("model")
        return Instance(server, model and self.text(model, (*path, "model")))

    def alias(self, value: Any, path: Path) -> Alias:
        """Read an alias."""
        record = self.record(value, path, "strategy", "instances")
        strategy = record.get("strategy", "failover")
        if strategy not in STRATEGIES:
            message = f"{strategy!r} instead of {', '.join(STRATEGIES)}"
            raise self.error((*path, "strategy"), message)
        items = record.get("instances")
        inner = (*path, "instances")
        if not isinstance(items, list) or not items:
            raise self.error(inner, "an alias needs a list of at least one `server/model`")
        instances = [self.instance(item, (*inner, i)) for i, item in enumerate(items)]
        for at, instance in enumerate(instances):
            if instance in instances[:at]:
                raise self.error((*inner, at), f"{instance} stands here twice")
        return Alias(self.text(path[1], path), strategy, tuple(instances))

    def rule(self, value: Any, path: Path, default: Server) -> Rule:
        """Read a route: its match and its target."""
        record = self.record(value, path, "match", "route")
        match_path, route_path = (*path, "match"), (*path, "route")
        match = self.record(record.get("match") or {}, match_path, "model", "source_host")
        route = self.record(record.get("route"), route_path, "upstream", "model", "alias")
        model, hosts = match.get("model"), match.get("source_host")
        if model is not None:
            model = self.checked(parse_pattern, model, (*match_path, "model"))
        if hosts is not None:
            inner = (*match_path, "source_host")
            listed = hosts if isinstance(hosts, list) else [hosts]
            if not listed:
                raise self.error(inner, "an empty list matches nobody; leave it out")
            hosts = tuple(self.checked(parse_address_range, h, inner) for h in listed)
        target = self.target(route, route_path, default, model)
        words = ", ".join(f"{k} {v}" for k, v in match.items()) or "everything"
        return Rule(f"routes[{path[1]}]", model, hosts, target, words)

    def target(self, route: dict[str, Any], path: Path, default: Server,
               pattern: str | re.Pattern[str] | None) -> Alias | Instance:
        """Read where a route leads: an alias, or an upstream and a model."""
        if "alias" in route:
            if len(route) > 1:
                raise self.error(path, "`alias` stands alone; leave the rest out")
            name = self.text(route["alias"], (*path, "alias"))
            if name not in self.aliases:
                known = ", ".join(self.aliases) or "none"
                raise self.error((*path, "alias"), f"unknown {name!r}; known are {known}")
            return self.aliases[name]
        if not route:
            raise self.error(path, "name an `upstream`, a `model` or an `alias`")
        model = route.get("model")
        if model is not None:
            inner = (*path, "model")
            self.checked(lambda text: check_template(text, pattern), model, inner)
        server = default
        if "upstream" in route:
            server = self.upstream(route["upstream"], (*path, "upstream"))
        return Instance(server, model)

def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; a repeated name is an error."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice!r} stands there twice; keep one of them")
    return result

def parse_json_routes(text: str, name: str) -> RoutingFile:
    """Read the document of a JSON routing file."""
    try:
        doc = json.loads(text, object_pairs_hook=unique_object)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{name}{line}: no valid JSON: {error}") from None

    def line_of(path: Path) -> int | None:
        spans = json_spans(text, path) if path else []
        return text.count("\n", 0, spans[0][0]) + 1 if spans else None

    return RoutingFile(name, doc, line_of)

def parse_yaml_routes(text: str, name: str) -> RoutingFile:
    """Read the document of a YAML routing file; PyYAML is imported here only."""
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{name} {NO_YAML}") from None
    lines: dict[Path, int] = {}

    def note(node: Any, path: Path) -> None:
        lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, key.value)
                if inner in lines:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{name}:{line}: {key.value!r} stands there twice")
                note(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                note(value, (*path, index))

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            note(node, ())
        return RoutingFile(name, yaml.safe_load(text), lines.get)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{name}{line}: no valid YAML: {problem}") from None

def parse_routes(
    text: str, name: str, environ: Mapping[str, str], settings: Settings
) -> RoutingTable:
    """Return the table of a routing file, JSON or YAML by content. Raises ConfigError."""
    looks_json = text.lstrip().startswith(("{", "["))
    file = (parse_json_routes if looks_json else parse_yaml_routes)(text, name)
    default = Server("default", settings.default_upstream)
    return file.read(environ, default, settings.model_map)

def match_model(wanted: str | re.Pattern[str], names: Sequence[str]) -> re.Match[str] | bool:
    """Match one of a request's names, exactly or by search."""
    if isinstance(wanted, str):
        return wanted in names
    tried = (wanted.search(name) for name in names if len(name) <= MAX_PATTERN_NAME)
    return next((match for match in tried if match), False)

def map_model(table: RoutingTable, asked: str) -> tuple[str, Step | None]:
    """Return the name that MODEL_MAP makes of `asked`, and how."""
    for key, target in table.model_map:
        match = match_model(key, [asked])
        if match:
            is_pattern = isinstance(key, re.Pattern)
            mapped = match.expand(target) if isinstance(match, re.Match) else target
            words = f"/{key.pattern}/" if is_pattern else repr(key)
            return mapped, Step("MODEL_MAP", True, f"{words} makes it {mapped!r}")
    return asked, None

def read_source_host(address: str) -> tuple[int, int] | None:
    """Return family and number of an address; IPv4 inside IPv6 is IPv4."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(parsed, "ipv4_mapped", None) or parsed
    return mapped.version, int(mapped)

def match_rule(rule: Rule, names: Sequence[str], source: str) -> tuple[re.Match[str] | bool, str]:
    """Tell whether all that a rule states matches, and why or why not."""
    found: re.Match[str] | bool = True
    if rule.model is not None:
        found = match_model(rule.model, names)
        if not found:
            too_long = all(len(name) > MAX_PATTERN_NAME for name in names)
            reason = ": longer than 256 characters" if too_long else ""
            return False, f"{rule.match_text}: the model does not match{reason}"
    if rule.hosts is not None:
        address = read_source_host(source)
        inside = address and any(
            version == address[0] and low <= address[1] <= high for version, low, high in rule.hosts
        )
        if not inside:
            return False, f"{rule.match_text}: source host {source} does not match"
    return found, f"{rule.match_text}: matches"

def resolve(table: RoutingTable, asked: str, source_host: str) -> Decision:
    """Return where a request for a model from a host goes, and every rule tried."""
    mapped, step = map_model(table, asked)
    trail = [step] if step else []
    names = [asked] if mapped == asked else [asked, mapped]

    def decide(route: str, target: Alias | Instance, model: str | None) -> Decision:
        instances = target.instances if isinstance(target, Alias) else (target,)
        strategy = target.strategy if isinstance(target, Alias) else "failover"
        models = [i._replace(model=model or i.model or mapped) for i in instances]
        return Decision(asked, mapped, route, strategy, tuple(models), tuple(trail))

    pin = PINNED.fullmatch(asked)
    servers = {server.name: server for server in table.all_servers()} if pin else {}
    if pin and pin[2] in servers and asked not in table.aliases:
        trail.append(Step("pin", True, f"the name pins server {pin[2]!r}"))
        return decide(f"pin {pin[2]}", Instance(servers[pin[2]]), pin[1])
    for name in names:
        if name in table.aliases:
            trail.append(Step(f"aliases.{name}", True, f"{name!r} is an alias"))
            return decide(f"alias {name}", table.aliases[name], None)
    for rule in table.rules:
        found, why = match_rule(rule, names, source_host)
        trail.append(Step(rule.name, bool(found), why))
        if found:
            model = rule.target.model if isinstance(rule.target, Instance) else None
            if model and isinstance(found, re.Match):
                model = found.expand(model)
            return decide(rule.name, rule.target, model)
    trail.append(Step("DEFAULT_UPSTREAM", True, f"no rule claims it: {table.default.url}"))
    return decide("default", Instance(table.default), None)

# ======================================================================================
# 8  Access (pure)
# ======================================================================================
# Who may do what: tokens, the two policies, Host and Origin. Nothing here fails open: a
# policy that cannot be checked refuses. The time is an argument.

TOKEN_COOKIE = "smolrouter_token"
MAX_TOKEN_LENGTH = 8 * KiB
MAX_FAILURES, FAILURE_WINDOW = 10, 60.0  # failed tokens of one address, and s
PROXY_FIELDS = ("forwarded", "via", "x-real-ip", "x-original-forwarded-for",
                "cf-connecting-ip", "cf-ray", "true-client-ip")
LOCAL_SUFFIXES = (".local", ".lan", ".home", ".internal", ".home.arpa", ".localhost",
                  ".localdomain")

def encode_token(secret: str, subject: str, now: float, days: float) -> str:
    """Return a JWT (RFC 7519), HS256, that expires after `days`."""
    claims = {"sub": subject, "iat": int(now), "exp": int(now + days * 86400)}
    parts = [encode_json(part) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = b".".join(base64.urlsafe_b64encode(p).rstrip(b"=") for p in parts)
    digest = hmac.digest(secret.encode(), signed, "sha256")
    return f"{signed.decode()}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"

def decode_base64url(text: str) -> bytes:
    """Return what unpadded base64url says, b"" when it is none (RFC 7515 2)."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        return b""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        return b""

def check_token(token: str, secret: str, now: float) -> str | None:
    """Return why a token is not valid, None when it is (RFC 7519 4.1, RFC 8725)."""
    parts = token.split(".")
    if len(token) > MAX_TOKEN_LENGTH or len(parts) != 3 or not token.isascii():
        return "the token is not a JWT"
    head, claims = (parse_event_json(decode_base64url(part)) for part in parts[:2])
    if head is None or claims is None or head.get("alg") != "HS256" or "crit" in head:
        return "the token is not a JWT signed with HS256"
    signed = token.rpartition(".")[0].encode()
    digest = hmac.digest(secret.encode(), signed, "sha256")
    if not hmac.compare_digest(digest, decode_base64url(parts[2])):
        return "the token's signature is wrong"
    expires, begins = claims.get("exp"), claims.get("nbf", 0)
    if any(isinstance(t, bool) or not isinstance(t, (int, float)) for t in (expires, begins)):
        return "the token has no valid `exp`"
    if not begins <= now < expires:
        return "the token has expired" if now >= expires else "the token is not valid yet"
    return None

def find_tokens(fields: Fields, cookie: bool) -> list[str]:
    """Return the tokens a request carries: its own field, bearer, and a cookie."""
    tokens = fields.get_all("x-smolrouter-token")
    for value in fields.get_all("authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            tokens.append(token.strip(" \t"))
    for pair in ";".join(fields.get_all("cookie")).split(";") if cookie else ():
        name, _, value = pair.strip(" \t").partition("=")
        if name == TOKEN_COOKIE:
            tokens.append(value)
    return tokens

def is_proxied(fields: Fields) -> bool:
    """Tell whether a proxy field says that somebody else forwarded the request."""
    named = (line[0] for line in fields.lines)
    hidden = fields.tokens("connection")
    return any(
        name in PROXY_FIELDS or name.startswith("x-forwarded-") for name in (*named, *hidden)
    )

def check_access(policy: str, secret: str | None, fields: Fields, cookie: bool,
                 now: float) -> None:
    """Let a request pass its policy, or raise Unauthorized or Forbidden."""
    if policy == "NONE" or (policy == "AUTH_WHEN_PROXIED" and not is_proxied(fields)):
        return
    if secret is None:
        raise Forbidden("this request came through a proxy, and without JWT_SECRET only "
                        "direct connections are served; set JWT_SECRET")
    reasons = [check_token(token, secret, now) for token in find_tokens(fields, cookie)]
    if not reasons or all(reasons):
        reason = reasons[-1] if reasons else "a token is needed"
        raise Unauthorized(f"{reason}; send it as Authorization: Bearer or "
                           "X-SmolRouter-Token", ("WWW-Authenticate", "Bearer"))

def without_tokens(fields: Fields, secret: str | None, now: float) -> Fields:
    """Return the fields without what was meant for the router alone."""
    kept = []
    for lower, name, value in fields.lines:
        bearer = value.partition(" ")[2].strip(" \t")
        if lower == "x-smolrouter-token":
            continue
        if lower == "authorization" and secret and bearer.count(".") == 2:
            signed_here = check_token(bearer, secret, now) in (None, "the token has expired")
            if signed_here:
                continue
        if lower == "cookie" and TOKEN_COOKIE in value:
            pairs = [pair.strip(" \t") for pair in value.split(";")]
            value = "; ".join(p for p in pairs if not p.startswith(TOKEN_COOKIE + "="))
            if not value:
                continue
        kept.append((lower, name, value))
    return Fields(kept)

def split_host(host: str) -> str:
    """Return a Host without its port and brackets, lower case."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")

def is_address(name: str) -> bool:
    """Tell whether a name is an IP address."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False

def check_web_host(host: str, allowed: Sequence[str], machine: str) -> None:
    """Refuse a Host that a rebound DNS name could carry."""
    name = split_host(host)
    local = "." not in name or name.endswith(LOCAL_SUFFIXES) or name == machine.lower()
    if not (name and (local or is_address(name) or name in allowed or host.lower() in allowed)):
        raise MisdirectedRequest(
            f"the Web UI does not answer to Host {host[:80]!r}; add it to ALLOWED_HOSTS"
        )

def origin_allowed(origin: str, host: str, allowed: Sequence[str]) -> bool:
    """Tell whether a browser page from `origin` may call."""
    origin = origin.lower()
    if "*" in allowed or origin in allowed:
        return True
    name = split_host(origin.partition("://")[2])
    loopback = name in ("localhost", "::1") or (is_address(name) and name.startswith("127."))
    if "loopback" in allowed and loopback and origin.startswith(("http://", "https://")):
        return True
    # The router's own pages; a rebound name is refused by check_web_host.
    return is_address(split_host(host)) and origin == f"http://{host.lower()}"

def client_address(peer: str, fields: Fields, trusted: Sequence[IPNetwork]) -> str:
    """Return who asks: X-Forwarded-For counts from trusted proxies, from the right."""

    def believed(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return any(address in network for network in trusted)

    if not trusted or not is_address(peer) or not believed(peer):
        return peer
    address = peer
    for hop in reversed(",".join(fields.get_all("x-forwarded-for")).split(",")):
        hop = hop.strip(" \t")
        if not is_address(hop):
            return address
        address = hop
        if not believed(hop):
            return address
    return address

# ======================================================================================
# 9  HTTP on streams
# ======================================================================================
# The only code that awaits bytes. A `Stream` is one connection, either way: it finds
# heads and contents and keeps the deadline; a `Responder` writes one answer. Whoever
# reads a content to its end leaves the connection at the next message.

READ_SIZE = 64 * KiB
WRITE_BUFFER = 256 * KiB  # of a client; above, its upstream waits
HEAD_TIMEOUT = 10.0  # s for a request head, from its first octet
IDLE_TIMEOUT = 75.0  # s that a connection may wait for its next request
CONTENT_GRACE, CONTENT_RATE = 20.0, 500  # s, then octets/s a request's content must keep
LINGER = 2.0  # s to read on after an error, so that the answer is not lost

class Reader(asyncio.StreamReader):
    """asyncio's reader, which tells at once that the other side has gone."""

    on_close: Callable[[], None] | None = None

    def feed_eof(self) -> None:
        """Note the end, as asyncio calls it."""
        super().feed_eof()
        if self.on_close:
            self.on_close()

    def set_exception(self, exc: BaseException) -> None:
        """Note a failure, as asyncio calls it, or a deadline."""
        super().set_exception(exc)
        if self.on_close:
            self.on_close()

    @property
    def quiet(self) -> bool:
        """Whether nothing has come and nothing has ended."""
        return not (self._buffer or self.at_eof() or self.exception())

class Stream:
    """One connection: reads heads and contents, keeps the deadline of the next read."""

    def __init__(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.transport = writer.transport
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self.loop = asyncio.get_running_loop()
        self.rest = b""  # read, but not yet used
        self.patience = 0.0  # s for each read; 0 keeps `deadline`
        self.deadline = float("inf")
        self.late: Exception = RequestTimeout("late")
        self.waiting = self.busy = False
        self.touched = False  # something was read since it was set
        self.cause: RouterError | None = None  # why the task was ended from outside
        self.timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float, late: Exception) -> None:
        """Fail the read that still waits after `seconds` with `late`."""
        self.late = late
        self.deadline = self.loop.time() + seconds
        if self.timer is None or self.timer.when() > self.deadline:
            self.relax()
            self.timer = self.loop.call_at(self.deadline, self.check_deadline)

    def relax(self) -> None:
        """Take the timer back."""
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def check_deadline(self) -> None:
        """Fail the reader when the deadline has passed, else look again then."""
        self.timer = None
        now = self.loop.time()
        if self.patience and not self.waiting:  # nobody reads: the other side is slow
            self.deadline = now + self.patience
        if self.deadline <= now:
            self.reader.set_exception(self.late)
        elif self.deadline < float("inf"):
            self.timer = self.loop.call_at(self.deadline, self.check_deadline)

    def watch(self) -> None:
        """Cancel this task as soon as the other side goes away."""
        task = asyncio.current_task()

        def gone() -> None:
            self.cause = ClientClosed("client_closed")
            if task:
                task.cancel()

        self.reader.on_close = gone

    async def read(self) -> bytes:
        """Return the next octets, b"" at the end."""
        if self.rest:
            data, self.rest = self.rest, b""
            return data
        if self.patience:
            self.deadline = self.loop.time() + self.patience
        self.waiting = True
        try:
            data = await self.reader.read(READ_SIZE)
            self.touched = True
            return data
        finally:
            self.waiting = False

    async def read_head(self, limit: int) -> bytes | None:
        """Return a head without its empty line, None when nothing comes any more.

        Raises MalformedMessage, TargetTooLong or FieldsTooLarge as soon as it is clear.
        """
        data = b""
        while True:
            piece = await self.read()
            data += piece
            if data.startswith(b"\r\n"):  # one empty line before a request: RFC 9112 2.2
                data = data[2:]
            end = data.find(b"\r\n\r\n")
            if 0 <= end <= limit:
                self.rest = data[end + 4 :]
                return data[:end]
            if not piece:
                if data:
                    raise MalformedMessage("the connection ended inside a head")
                return None
            self.check_partial_head(data, limit)

    def check_partial_head(self, data: bytes, limit: int) -> None:
        """Refuse what can no longer become a head."""
        if BARE_LF.search(data):
            raise MalformedMessage("a bare CR or LF in the head instead of CRLF")
        if data and not (data[:1].isalnum() or data[:1] in b"!#$%&'*+-.^_`|~\r"):
            hint = "; this port speaks http, not https" if data[:1] == b"\x16" else ""
            raise MalformedMessage(f"{data[:8]!r} begins no HTTP message{hint}")
        if len(data) > MAX_START_LINE and b"\r\n" not in data[: MAX_START_LINE + 2]:
            raise TargetTooLong(f"the first line is over {MAX_START_LINE} octets")
        if len(data) > limit:
            raise FieldsTooLarge(f"the head is over {limit} octets")

    def write(self, data: bytes) -> None:
        """Hand octets to the transport."""
        self.writer.write(data)

    async def drain(self) -> None:
        """Wait while the other side is slow."""
        if self.transport.get_write_buffer_size() > WRITE_BUFFER:
            await self.writer.drain()

    def close(self, abort: bool = False) -> None:
        """End the connection; `abort` throws away what was not sent."""
        self.relax()
        self.reader.on_close = None
        if abort:
            self.transport.abort()
        else:
            self.writer.close()

    async def linger(self) -> None:
        """Say that nothing more comes, read on for a moment, close (RFC 9112 9.6)."""
        with contextlib.suppress(OSError, RouterError):
            if self.writer.can_write_eof():
                self.writer.write_eof()
            self.patience = 0.0
            self.expect(LINGER, RequestTimeout("late"))
            while await self.read():
                pass
        self.close()

class Content:
    """Reads one content of a stream, piece by piece, up to a limit."""

    def __init__(self, stream: Stream, framing: Framing, limit: float = float("inf")) -> None:
        self.stream, self.framing, self.limit = stream, framing, limit
        self.left, self.size = framing.length, 0
        self.decoder = ChunkDecoder() if framing is CHUNKED else None
        self.done = framing == NO_CONTENT

    async def read(self) -> bytes:
        """Return the next piece, b"" at the end. Raises MalformedMessage when cut."""
        while not self.done:
            data = await self.stream.read()
            if self.decoder:
                piece = self.decoder.feed(data)
                self.left, self.done = self.decoder.left, self.decoder.done
                if self.done:
                    self.stream.rest = self.decoder.rest
            elif self.framing is UNTIL_CLOSE:
                piece, self.done = data, not data
            else:
                piece, self.stream.rest = data[: self.left], data[self.left :]
                self.left -= len(piece)
                self.done = not self.left
            self.size += len(piece)
            if self.size + self.left > self.limit:
                raise ContentTooLarge(f"over {self.limit} bytes, which is MAX_REQUEST_SIZE")
            if piece:
                return piece
            if not data and not self.done:
                raise MalformedMessage("the connection ended inside the content")
        return b""

@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """Return a moment as RFC 9110 5.6.7 writes it."""
    moment = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
    return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")

class Responder:
    """Writes one response, in the framing that its client understands."""

    def __init__(self, stream: Stream, head: RequestHead | None) -> None:
        self.stream = stream
        self.minor = head.minor if head else 1
        self.method = head.method if head else "GET"
        self.keep = head is not None and keeps_alive(head.fields, head.minor)
        self.extra: list[tuple[str, str]] = []  # for every answer, such as CORS
        self.started = self.finished = False
        self.status = self.size = 0
        self.pending = b""  # the head, until the first content
        self.chunked = self.silent = False

    def begin(self, status: int, fields: Iterable[tuple[str, str]],
              length: int | None, reason: str = "") -> None:
        """Make the head; it leaves with the first content. None: length unknown."""
        self.started, self.status = True, status
        self.silent = self.method == "HEAD" or status in (204, 304)
        self.chunked = length is None and self.minor == 1 and not self.silent
        self.keep = self.keep and (length is not None or self.chunked or self.silent)
        reason = reason or http.client.responses.get(status, "")
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += [f"{name}: {value}" for name, value in (*fields, *self.extra)]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif length is not None and status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        if not self.keep:
            lines.append("Connection: close")
        elif self.minor == 0:
            lines.append("Connection: keep-alive")
        self.pending = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def write(self, content: bytes) -> None:
        """Send content, with the head when it has not left yet."""
        self.size += len(content)
        if self.silent:
            content = b""
        elif content and self.chunked:
            content = encode_chunk(content)
        if self.pending:
            content, self.pending = self.pending + content, b""
        if content:
            self.stream.write(content)

    def finish(self, content: bytes = b"") -> None:
        """Send the last content and the clean end."""
        end = b""
        if self.chunked:
            end = (encode_chunk(content) if content else b"") + LAST_CHUNK
            self.size += len(content)
            content = b""
        self.finished = True
        self.stream.reader.on_close = None  # all is said; the client may go
        if end:
            content, self.pending = self.pending + end, b""
            self.stream.write(content)
        else:
            self.write(content)

    def cut(self, content: bytes) -> None:
        """Send a last content and no clean end: what follows is lost."""
        self.keep = False
        self.write(content)

    def send(self, status: int, fields: Iterable[tuple[str, str]], content: bytes) -> None:
        """Send a whole answer of the router's own."""
        date = ("Date", http_date(int(time.time())))
        self.begin(status, [date, *fields], len(content))
        self.finish(content)

    def send_json(self, value: Any, status: int = 200) -> None:
        """Send a JSON document of the router's own."""
        content = value if isinstance(value, bytes) else encode_json(value)
        self.send(status, [("Content-Type", "application/json")], content)

@dataclasses.dataclass
class Request:
    """A request whose head has been read, and the connection it came on."""

    head: RequestHead
    stream: Stream
    responder: Responder
    source_host: str
    host: str
    path: str
    query: str
    content: bytes = b""
    unread: Content | None = None

    async def read_content(self, limit: int) -> None:
        """Read all of the content, at most `limit` octets: 20 s, then 500 octets/s."""
        framing = request_framing(self.head)
        self.unread = reader = Content(self.stream, framing, limit)
        if framing.length > limit:
            raise ContentTooLarge(f"{framing.length} bytes; MAX_REQUEST_SIZE is {limit}")
        if reader.done:
            return
        expects = self.head.fields.tokens("expect")
        if "100-continue" in expects and self.head.minor and not self.stream.rest:
            self.stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        start = self.stream.loop.time()
        slow = RequestTimeout(f"the content came slower than {CONTENT_RATE} bytes/s")
        self.stream.expect(CONTENT_GRACE, slow)
        pieces: list[bytes] = []
        while piece := await reader.read():
            pieces.append(piece)
            self.stream.deadline = start + CONTENT_GRACE + reader.size / CONTENT_RATE
        self.stream.deadline = float("inf")
        self.content = b"".join(pieces)

# ======================================================================================
# 10  Upstreams
# ======================================================================================
# A pool of idle connections, one request to one instance, and who is in cool-down. An
# instance that failed goes to the end of the order for a while; it is never excluded.

IDLE_UPSTREAM = 30.0  # s that an idle connection to an upstream is kept
MAX_IDLE = 512  # idle connections a server
MAX_INTERIM = 50  # 1xx answers before the real one
COOL_DOWN, MAX_COOL_DOWN, MAX_RETRY_AFTER = 5.0, 60.0, 300.0  # s
MODELS_TIMEOUT, MODELS_FRESH, MODELS_KEPT = 2.0, 60.0, 600.0  # s
MAX_MODELS_SIZE = 4 * MiB
MAX_HELD_ERROR = MiB  # of an error answer kept while the next instance is tried
COOLING_STATUSES = (429, 503)

class Answer:
    """A response whose head has come; its content is read to the end or it is closed."""

    def __init__(self, head: ResponseHead, stream: Stream, method: str,
                 release: Callable[[Stream], None]) -> None:
        self.head, self.stream, self.release = head, stream, release
        self.content = Content(stream, response_framing(head, method))
        self.held: collections.deque[bytes] = collections.deque()
        self.open = True

    async def read(self) -> bytes:
        """Return the next piece of content, b"" at the end. Raises BadGateway."""
        if self.held:
            return self.held.popleft()
        piece = await self.fetch()
        if not piece and self.open:
            self.leave()
        return piece

    async def fetch(self) -> bytes:
        """Read a piece; foreign exceptions become BadGateway or GatewayTimeout."""
        try:
            return await self.content.read() if self.open else b""
        except BadGateway:
            raise
        except (OSError, RouterError) as error:
            raise BadGateway(f"the answer broke off: {describe(error)}") from None

    async def peek(self) -> bool:
        """Read ahead; return whether there is any content."""
        piece = await self.fetch()
        if piece:
            self.held.append(piece)
        return bool(piece)

    async def hold(self) -> bytes:
        """Read all of an error answer, so that it can be sent later."""
        size = 0
        while piece := await self.fetch():
            self.held.append(piece)
            size += len(piece)
            if size > MAX_HELD_ERROR:
                raise BadGateway(f"an error answer over {MAX_HELD_ERROR} bytes")
        self.leave()
        return b"".join(self.held)

    def leave(self) -> None:
        """Give the connection back to the pool, or close what cannot be used again."""
        self.open = False
        clean = self.content.framing is not UNTIL_CLOSE and not self.stream.rest
        if clean and keeps_alive(self.head.fields, self.head.minor):
            self.release(self.stream)
        else:
            self.stream.close()

    def close(self) -> None:
        """End the connection unless all of it was read."""
        if self.open:
            self.open = False
            self.stream.close(abort=True)

def describe(error: BaseException) -> str:
    """Return what went wrong, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return f"its name is not known: {error.strerror}"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "timed out"
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__

@dataclasses.dataclass
class Health:
    """What is known of one instance."""

    busy: int = 0
    failures: int = 0
    cool_until: float = 0.0
    error: str = ""
    reached: bool = True  # the server answered, even if it said no

class Upstreams:
    """Sends requests to servers and remembers how they fared."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.idle: dict[tuple[UpstreamURL, bool], list[Stream]] = {}
        self.health: dict[tuple[UpstreamURL, str | None], Health] = {}
        self.turns: dict[str, int] = {}  # of round_robin
        self.no_stream_options: set[UpstreamURL] = set()
        self.contexts: dict[bool, ssl.SSLContext] = {}

    def state(self, instance: Instance) -> Health:
        """Return the health record of an instance; the table is bounded."""
        key = instance.server.url, instance.model
        if key not in self.health and len(self.health) > 1000:
            self.health = {k: h for k, h in self.health.items() if h.busy or h.failures}
        return self.health.setdefault(key, Health())

    def order(self, decision: Decision) -> list[Instance]:
        """Return the instances in the order to try: strategy first, cooling ones last."""
        instances = list(decision.instances)
        if len(instances) < 2:
            return instances
        if decision.strategy == "round_robin":
            turn = self.turns.get(decision.route, 0)
            self.turns[decision.route] = turn + 1
            turn %= len(instances)
            instances = instances[turn:] + instances[:turn]
        elif decision.strategy == "least_busy":
            instances.sort(key=lambda i: self.server_busy(i.server))
        now = time.monotonic()
        return sorted(instances, key=lambda i: max(self.state(i).cool_until - now, 0.0))

    def server_busy(self, server: Server) -> int:
        """Return how many requests a server has now."""
        return sum(h.busy for (url, _), h in self.health.items() if url == server.url)

    def is_cooling(self, server: Server) -> bool:
        """Tell whether the server could not be reached a moment ago."""
        now = time.monotonic()
        known = [h for (url, _), h in self.health.items() if url == server.url]
        return any(h.cool_until > now and not h.reached for h in known)

    def failed(self, instance: Instance, error: str, retry_after: str | None = None,
               reached: bool = False) -> None:
        """Put an instance into cool-down: 5 s, doubling, or as it asked for."""
        health = self.state(instance)
        seconds = min(COOL_DOWN * 2 ** min(health.failures, 10), MAX_COOL_DOWN)
        if retry_after and re.fullmatch(r"[0-9]{1,6}", retry_after):
            seconds = min(float(retry_after), MAX_RETRY_AFTER)
        health.failures += 1
        health.error, health.reached = error, reached
        health.cool_until = time.monotonic() + seconds

    def succeeded(self, instance: Instance) -> None:
        """End an instance's cool-down."""
        health = self.state(instance)
        health.failures, health.cool_until, health.error, health.reached = 0, 0.0, "", True

    def context(self, server: Server) -> ssl.SSLContext | None:
        """Return how to speak TLS with a server, None for plain http."""
        if server.url.scheme != "https":
            return None
        if server.verify not in self.contexts:
            context = ssl.create_default_context()
            if not server.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.contexts[server.verify] = context
        return self.contexts[server.verify]

    async def connect(self, server: Server) -> Stream:
        """Open a connection. Raises BadGateway or GatewayTimeout."""
        loop = asyncio.get_running_loop()
        reader = Reader(limit=READ_SIZE)
        context = self.context(server)
        seconds = self.settings.connect_timeout
        opening = loop.create_connection(
            lambda: asyncio.StreamReaderProtocol(reader), server.url.host,
            server.url.port, ssl=context, happy_eyeballs_delay=0.25,
            server_hostname=server.url.host if context else None,
        )
        try:
            transport, protocol = await asyncio.wait_for(opening, seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise GatewayTimeout(f"no connection within {seconds:g} s (CONNECT_TIMEOUT)") from None
        except (OSError, ValueError) as error:
            raise BadGateway(describe(error)) from None
        return Stream(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def take(self, server: Server) -> Stream | None:
        """Return an idle connection that is still good, None without one."""
        streams = self.idle.get((server.url, server.verify), [])
        while streams:
            stream = streams.pop()
            if stream.reader.quiet and not stream.transport.is_closing():
                stream.reader.on_close = None
                return stream
            stream.close(abort=True)
        return None

    def keep(self, server: Server, stream: Stream) -> None:
        """Keep a connection for the next request."""
        streams = self.idle.setdefault((server.url, server.verify), [])
        if len(streams) >= MAX_IDLE or not stream.reader.quiet:
            stream.close()
            return
        stream.patience = 0.0
        stream.expect(IDLE_UPSTREAM, BadGateway("idle"))
        streams.append(stream)

        def gone() -> None:
            if stream in streams:
                streams.remove(stream)
            stream.close(abort=True)

        stream.reader.on_close = gone

    def close(self) -> None:
        """Close every idle connection."""
        for streams in self.idle.values():
            for stream in streams:
                stream.close()
            streams.clear()

    async def send(self, server: Server, method: str, data: bytes) -> Answer:
        """Send one request and return its answer's head. Raises BadGateway.

        A reused connection that ends before its first octet is replaced once, silently.
        """
        stream = self.take(server)
        if stream:
            try:
                return await self.converse(stream, server, method, data, reused=True)
            except ConnectionAbortedError:
                pass
        stream = await self.connect(server)
        return await self.converse(stream, server, method, data, reused=False)

    async def converse(self, stream: Stream, server: Server, method: str, data: bytes,
                       reused: bool) -> Answer:
        """Write a request, read the head of its answer; close the stream on failure."""
        seconds = self.settings.request_timeout
        done = False
        try:
            stream.patience, stream.touched = seconds, False
            stream.expect(seconds, GatewayTimeout(
                f"no answer within {seconds:g} s (REQUEST_TIMEOUT)"))
            stream.write(data)
            head = await self.read_head(stream)
            if head is None:
                raise ConnectionAbortedError("it closed the connection without an answer")
            answer = Answer(head, stream, method, functools.partial(self.keep, server))
            done = True
            return answer
        except BadGateway:
            raise
        except ConnectionAbortedError as error:
            if reused:
                raise
            raise BadGateway(describe(error)) from None
        except (OSError, RouterError) as error:
            if reused and isinstance(error, ConnectionError) and not stream.touched:
                raise ConnectionAbortedError from None
            raise BadGateway(f"no valid answer: {describe(error)}") from None
        finally:
            if not done:
                stream.close(abort=True)

    async def read_head(self, stream: Stream) -> ResponseHead | None:
        """Return the final response's head; interim ones are passed over."""
        for _ in range(MAX_INTERIM + 1):
            data = await stream.read_head(MAX_RESPONSE_HEAD)
            if data is None:
                return None
            head = parse_response_head(data)
            if head.status >= 200:
                return head
            if head.status == 101:
                raise MalformedMessage("101 Switching Protocols, which nobody asked for")
        raise MalformedMessage(f"more than {MAX_INTERIM} interim responses")

def fetch_models(server: Server, authorization: str | None,
                 context: ssl.SSLContext | None) -> list[dict[str, Any]]:
    """Ask a server for its models (blocking). Raises OSError, HTTPException, ValueError."""
    url = server.url
    if url.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            url.host, url.port, timeout=MODELS_TIMEOUT, context=context
        )
    else:
        connection = http.client.HTTPConnection(url.host, url.port, timeout=MODELS_TIMEOUT)
    fields = {"Accept": "application/json", **dict(server.headers)}
    key = f"Bearer {server.api_key}" if server.api_key else authorization
    if key:
        fields["Authorization"] = key
    with contextlib.closing(connection):
        connection.request("GET", f"{url.prefix}/v1/models", headers=fields)
        response = connection.getresponse()
        doc = parse_event_json(response.read(MAX_MODELS_SIZE))
    if response.status >= 400 or doc is None:
        raise ValueError(f"/v1/models answered {response.status}")
    models = doc.get("data")
    return [
        model
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    ]

class ModelLists:
    """The models of every server, asked for at most once a minute."""

    def __init__(self, upstreams: Upstreams) -> None:
        self.upstreams = upstreams
        self.known: dict[tuple[str, str], tuple[float, list[dict[str, Any]]]] = {}
        self.asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def get(self, server: Server, authorization: str | None) -> list[Any] | None:
        """Return a server's models; None when nothing is known and it does not answer."""
        secret = "" if server.api_key else authorization or ""
        key = str(server.url), hashlib.sha256(secret.encode()).hexdigest()
        asked, models = self.known.get(key, (-MODELS_KEPT, None))
        age = time.monotonic() - asked
        if models is not None and age > MODELS_KEPT:
            models = None
        if (models is None or age > MODELS_FRESH) and not self.upstreams.is_cooling(server):
            task = self.asking.get(key)
            if task is None:
                task = asyncio.create_task(self.refresh(key, server, authorization))
                self.asking[key] = task
            if models is None:
                await asyncio.wait([task], timeout=MODELS_TIMEOUT)
                models = self.known.get(key, (0.0, None))[1]
        return models

    async def refresh(
        self, key: tuple[str, str], server: Server, authorization: str | None
    ) -> None:
        """Ask a server and keep its answer; a failure leaves the last one."""
        instance = Instance(server)
        try:
            context = self.upstreams.context(server)
            models = await asyncio.wait_for(
                asyncio.to_thread(fetch_models, server, authorization, context), MODELS_TIMEOUT
            )
        except (OSError, ValueError, asyncio.TimeoutError, http.client.HTTPException) as error:
            if not isinstance(error, ValueError):
                self.upstreams.failed(instance, describe(error))
        else:
            self.upstreams.succeeded(instance)
            if len(self.known) > 200:
                self.known.clear()
            self.known[key] = time.monotonic(), models
        finally:
            del self.asking[key]

async def list_models(lists: ModelLists, table: RoutingTable,
                      authorization: str | None) -> list[dict[str, Any]]:
    """Return the union of all models; aliases and exact MODEL_MAP keys come first.

    A name that several servers have is followed by `name [server]` for each of them.
    Raises BadGateway when nothing is known.
    """
    servers = table.all_servers()
    answers = await asyncio.gather(*(lists.get(s, authorization) for s in servers))
    own = [*table.aliases, *(key for key, _ in table.model_map if isinstance(key, str))]
    models = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "smolrouter"}
        for name in own
    }
    holders: dict[str, list[tuple[Server, dict[str, Any]]]] = {}
    for server, answer in zip(servers, answers):
        for model in answer or ():
            holders.setdefault(model["id"], []).append((server, model))
    for name, places in holders.items():
        models.setdefault(name, places[0][1])
        for server, model in places if len(places) > 1 else ():
            pinned = f"{name} [{server.name}]"
            models[pinned] = {**model, "id": pinned}
    if not models and all(answer is None for answer in answers):
        names = ", ".join(f"{server.name} ({server.url})" for server in servers)
        raise BadGateway(f"no server could be asked for its models: {names}")
    return list(models.values())

# ======================================================================================
# 11  Request log
# ======================================================================================
# What happened to every request. A record begins when its request is accepted and is
# finished exactly once. The console line is written by a thread of its own, so that a
# full pipe never stops a request.

class Attempt(NamedTuple):
    """One instance that was asked, and how it answered."""

    instance: str
    upstream_url: str
    status: int | None
    error: str | None
    duration_ms: float

@dataclasses.dataclass
class Record:
    """The life of one request; moments of `clock` are monotonic, `started` is UTC."""

    id: int
    request_id: str
    started: float
    clock: float
    source_ip: str
    method: str
    path: str
    service: str = "openai"
    original_model: str = ""
    mapped_model: str = ""
    sent_model: str = ""
    upstream_url: str = ""
    route: str = ""
    trail: Sequence[Step] = ()
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    stream: bool = False
    phase: str = "waiting"
    status: int = 0
    error: str = ""
    request_size: int = 0
    response_size: int = 0
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_token: float | None = None
    finished: float | None = None
    events: int = 0

class Console:
    """Writes lines to stderr from a thread; drops them when nobody reads."""

    MAX_LINES = 10_000

    def __init__(self) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=self.MAX_LINES)
        self.wake = threading.Event()
        self.open = True
        self.thread = threading.Thread(target=self.run, name="console", daemon=True)
        self.thread.start()

    def line(self, text: str) -> None:
        """Queue one line; control characters become `?`."""
        self.lines.append(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text))
        if not self.wake.is_set():
            self.wake.set()

    def run(self) -> None:
        """Write what is queued, a few times a second."""
        while self.open or self.lines:
            self.wake.wait()
            if self.open:
                time.sleep(0.05)
            self.wake.clear()
            lines = [self.lines.popleft() for _ in range(len(self.lines))]
            with contextlib.suppress(OSError, ValueError):
                if lines:
                    sys.stderr.write("\n".join(lines) + "\n")
                    sys.stderr.flush()

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.open = False
        self.wake.set()
        self.thread.join(1.0)

class RequestLog:
    """Keeps the running requests and prints a line for each that ended."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.console = console
        self.quiet = settings.log_level not in ("DEBUG", "INFO")
        self.inflight: dict[int, Record] = {}
        self.counts: collections.Counter[tuple[str, int]] = collections.Counter()
        self.last_id = 0

    def begin(self, record: Record) -> None:
        """Note that a request was accepted."""
        self.last_id = record.id = max(self.last_id + 1, int(record.started * 1e6))
        self.inflight[record.id] = record

    def finish(self, record: Record) -> None:
        """Note how it ended."""
        record.finished = time.monotonic()
        self.inflight.pop(record.id, None)
        self.counts[record.service, record.status] += 1
        if self.quiet:
            return
        model = record.original_model
        if record.sent_model not in ("", model):
            model = f"{model} -> {record.sent_model}"
        tokens = record.usage.get("completion_tokens")
        words = [
            record.source_ip, record.method, record.path, model, record.route,
            record.upstream_url, str(record.status), record.error,
            f"{record.finished - record.clock:.3f} s",
            f"{tokens} tokens" if tokens is not None else "",
        ]
        self.console.line(" ".join(word for word in words if word))

# ======================================================================================
# 12  Relay
# ======================================================================================
# One exchange, first byte to last: the instances of a decision are tried in order until
# one gives an answer, and that answer goes out as it comes in. After its first octet has
# left there is no second answer: a failure ends the stream with an error.

CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # zlib's window bits
MAX_DECODED = 32 * MiB
NOT_FORWARDED = frozenset(("host", "content-length", "expect", "via"))
STREAM_TYPES = ("text/event-stream", "application/x-ndjson")
STREAM_FIELDS = [("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no")]

class Inflater:
    """Takes gzip or deflate off an answer, up to MAX_DECODED bytes."""

    def __init__(self, coding: str) -> None:
        self.decoder = zlib.decompressobj(CODINGS[coding])
        self.left = MAX_DECODED

    def feed(self, data: bytes) -> bytes:
        """Return the decoded bytes. Raises BadGateway."""
        try:
            plain = self.decoder.decompress(data, self.left + 1)
        except zlib.error as error:
            raise BadGateway(f"the answer's content coding is broken: {error}") from None
        self.left -= len(plain)
        if self.left < 0:
            raise BadGateway(f"the answer decodes to more than {MAX_DECODED} bytes")
        return plain

@dataclasses.dataclass
class Relay:
    """What every exchange shares."""

    settings: Settings
    upstreams: Upstreams
    log: RequestLog
    via: str  # this instance's entry in Via

    def rules(self) -> FilterRules:
        """Return the filters that are on."""
        return FilterRules(self.settings.strip_thinking, self.settings.strip_json_markdown)

class Exchange:
    """One request on its way through the router."""

    def __init__(self, relay: Relay, request: Request, dialect: Dialect, ask: Ask,
                 decision: Decision) -> None:
        self.relay, self.request, self.dialect, self.ask = relay, request, dialect, ask
        self.decision, self.responder = decision, request.responder
        self.instance: Instance | None = None
        self.answer: Answer | None = None
        self.transform: Transform | None = None
        self.hide_usage = False
        self.record = Record(
            0, secrets.token_hex(8), time.time(), time.monotonic(), request.source_host,
            request.head.method, request.path + request.query, dialect.service,
            decision.asked, decision.mapped, route=decision.route, trail=decision.trail,
            stream=ask.stream, request_size=len(request.content),
        )

    async def run(self) -> None:
        """Serve the request, whatever happens; its record is finished once."""
        record = self.record
        self.relay.log.begin(record)
        self.request.stream.watch()
        try:
            if not self.answer_empty():
                self.answer = await self.first_answer()
                await self.relay_answer(self.answer)
        except asyncio.CancelledError:
            self.leave(self.request.stream.cause or ClientClosed("client_closed"))
            raise
        except RouterError as error:
            self.fail(error)
        finally:
            if self.answer:
                self.answer.close()
            if self.instance:
                self.relay.upstreams.state(self.instance).busy -= 1
            record.status = record.status or self.responder.status
            record.response_size = self.responder.size
            if self.transform:
                record.usage, record.events = self.transform.usage, self.transform.events
            self.relay.log.finish(record)

    def answer_empty(self) -> bool:
        """Answer a request that asks for nothing but to load a model."""
        native = self.decision.instances[0].server.api == self.dialect.service
        if self.dialect.empty is None or native:
            return False
        doc = self.dialect.empty(self.ask, rfc3339(self.record.started))
        if doc is not None:
            self.responder.send_json(doc)
        return doc is not None

    def leave(self, cause: RouterError) -> None:
        """Note why an exchange was ended from outside."""
        if cause.status != 499:
            self.fail(cause)
        elif not (self.transform and self.transform.complete):
            self.record.status, self.record.error = cause.status, cause.code

    def fail(self, error: RouterError) -> None:
        """Send an error in the client's dialect: as the answer, or at its broken end."""
        self.record.error = str(error)
        if not self.responder.started:
            content = self.dialect.encode_error(error)
            kind = ("Content-Type", "application/json")
            self.responder.send(error.status, [kind, *self.own_fields(), *error.fields], content)
            return
        self.record.status = error.status
        streaming = self.transform and not self.transform.whole
        self.responder.cut(self.dialect.encode_event_error(error) if streaming else b"")

    def own_fields(self) -> list[tuple[str, str]]:
        """Return the fields that tell what the router did."""
        record = self.record
        pairs = [
            ("Request-Id", record.request_id), ("Upstream", record.upstream_url),
            ("Model", record.sent_model), ("Route", record.route),
            ("Attempts", str(len(record.attempts))),
        ]
        return [(f"X-SmolRouter-{n}", encode_field_value(v)) for n, v in pairs if v]

    async def first_answer(self) -> Answer:
        """Return the first good answer, or the last one that was HTTP at all."""
        instances = self.relay.upstreams.order(self.decision)
        last: tuple[Answer, Instance] | None = None
        error = BadGateway("no instance")
        for instance in instances:
            begun = time.monotonic()
            self.enter(instance)
            try:
                answer = await self.attempt(instance)
                final = instance is instances[-1] or answer.head.status < 400
                if len(instances) > 1:
                    await self.inspect(answer)
            except BadGateway as failure:
                error = failure
                self.note_attempt(instance, begun, None, str(failure))
                self.relay.upstreams.failed(instance, str(failure))
                continue
            self.note_attempt(instance, begun, answer.head.status, None)
            self.note_status(instance, answer.head)
            if final:
                return answer
            last = answer, instance
        if last:
            self.enter(last[1])
            return last[0]
        tried = "; ".join(
            f"{a.instance} ({a.upstream_url}): {a.error}" for a in self.record.attempts
        )
        raise type(error)(f"no upstream answered: {tried}")

    def enter(self, instance: Instance) -> None:
        """Make `instance` the one that is asked now."""
        if self.instance:
            self.relay.upstreams.state(self.instance).busy -= 1
        self.instance = instance
        self.relay.upstreams.state(instance).busy += 1
        self.record.upstream_url = str(instance.server.url)
        self.record.sent_model = instance.model or ""

    def note_attempt(self, instance: Instance, begun: float, status: int | None,
                     error: str | None) -> None:
        """Put an attempt into the record."""
        milliseconds = (time.monotonic() - begun) * 1000
        url = str(instance.server.url)
        self.record.attempts.append(Attempt(str(instance), url, status, error, milliseconds))

    def note_status(self, instance: Instance, head: ResponseHead) -> None:
        """Begin or end a cool-down."""
        if head.status in COOLING_STATUSES:
            after = head.fields.get("retry-after")
            self.relay.upstreams.failed(instance, f"status {head.status}", after, True)
        else:
            self.relay.upstreams.succeeded(instance)

    async def inspect(self, answer: Answer) -> None:
        """See that a good answer begins, and keep a bad one for later.

        Raises BadGateway when a 200 ends before its first event or byte.
        """
        if answer.head.status >= 400:
            await answer.hold()
        elif answer.head.status == 200 and self.request.head.method != "HEAD":
            if not await answer.peek():
                answer.close()
                raise BadGateway("it ended before its first event or byte")

    async def attempt(self, instance: Instance) -> Answer:
        """Ask one instance; one that refuses `stream_options` is asked again without."""
        server = instance.server
        native = self.speaks(server)
        path = self.ask.path
        if not native and self.dialect.openai_path:
            path = self.dialect.openai_path(self.ask)
        refused = self.relay.upstreams.no_stream_options
        usage = self.ask.stream and path in USAGE_PATHS and not self.ask.wants_usage
        self.hide_usage = usage and server.url not in refused
        answer = await self.send(instance, native, path)
        if self.hide_usage and answer.head.status == 400:
            try:
                named = b"stream_options" in await answer.hold()
            except BadGateway:
                answer.close()
                raise
            if named:
                refused.add(server.url)
                self.hide_usage = False
                answer = await self.send(instance, native, path)
        return answer

    def speaks(self, server: Server) -> bool:
        """Tell whether a server speaks the client's dialect."""
        return self.dialect.encode_openai is None or server.api == self.dialect.service

    async def send(self, instance: Instance, native: bool, path: str) -> Answer:
        """Send the request to one instance, in the dialect it speaks."""
        encode = self.dialect.encode if native else self.dialect.encode_openai
        no_think = self.relay.settings.disable_thinking
        rewrite = Rewrite(instance.model or self.ask.model, no_think, self.hide_usage)
        content = encode(self.ask, rewrite) if encode else self.ask.content
        method = self.request.head.method
        fields = self.upstream_fields(instance.server, len(content))
        target = f"{instance.server.url.prefix}{path}{self.ask.query}"
        head = f"{method} {target} HTTP/1.1\r\n{fields}\r\n".encode("latin-1", "replace")
        return await self.relay.upstreams.send(instance.server, method, head + content)

    def upstream_fields(self, server: Server, length: int) -> str:
        """Return the field lines for a server: the client's, less what stops here."""
        dropped = set(NOT_FORWARDED)
        added = [("Host", server.url.authority), *server.headers]
        if server.api_key:
            added.append(("Authorization", f"Bearer {server.api_key}"))
        if self.ask.text:
            added.append(("Accept-Encoding", "identity"))
        dropped.update(name.lower() for name, _ in added)
        fields = self.request.head.fields
        vias = ", ".join([*fields.get_all("via"), self.relay.via])
        added.append(("Via", vias))
        if length or self.request.head.method in ("POST", "PUT", "PATCH"):
            added.append(("Content-Length", str(length)))
        secret = self.relay.settings.jwt_secret
        kept = without_tokens(fields, secret, time.time()).end_to_end().without(dropped)
        return "".join([f"{name}: {value}\r\n" for name, value in added]) + kept.encode()

    def plan(self, answer: Answer) -> Transform | None:
        """Return what the answer must go through."""
        assert self.instance is not None
        plan = AnswerPlan(
            self.ask, self.dialect, self.speaks(self.instance.server), self.relay.rules(),
            self.hide_usage, self.instance.model != self.ask.model, self.timing,
        )
        kind = (answer.head.fields.get("content-type") or "").partition(";")[0]
        return choose_transform(plan, answer.head.status, kind.strip(" \t").lower())

    def timing(self) -> Timing:
        """Return when an answer is made and how long it took, in ns."""
        record = self.record
        now = time.monotonic()
        first = record.first_token or now
        total, until_first = (int((t - record.clock) * 1e9) for t in (now, first))
        return Timing(time.time(), total, until_first)

    async def relay_answer(self, answer: Answer) -> None:
        """Send an answer as it comes in, through its transform."""
        record, responder = self.record, self.responder
        self.transform = transform = self.plan(answer)
        coding = (answer.head.fields.get("content-encoding") or "identity").lower()
        inflater = None
        if transform and coding != "identity":
            if coding not in CODINGS:
                self.transform = transform = None
            else:
                inflater = Inflater(coding)
        while data := await answer.read():
            if record.first_token is None:
                record.first_token, record.phase = time.monotonic(), "streaming"
            if transform:
                data = transform.feed(inflater.feed(data) if inflater else data)
                if transform.whole:
                    continue
            if not responder.started:
                self.begin(answer, None)
            responder.write(data)
            await responder.stream.drain()
        if inflater and not inflater.decoder.eof:
            raise BadGateway("the answer's content coding broke off")
        tail = transform.finish() if transform else b""
        if not responder.started:
            self.begin(answer, len(tail) if transform and transform.whole else None)
        responder.finish(tail)

    def begin(self, answer: Answer, length: int | None) -> None:
        """Send the head of an answer; its content is `length` octets, if that is known."""
        head, transform = answer.head, self.transform
        dropped = {"content-length"}
        if transform:
            dropped |= {"content-encoding", "content-type", "etag", "content-md5"}
        else:
            framing = read_framing(head.fields, head.minor)
            length = framing.length if framing and framing.kind == "length" else None
        kind = head.fields.get("content-type") or "application/octet-stream"
        if transform and not self.speaks(self.instance.server):
            streams = self.ask.stream and head.status < 400
            kind = "application/x-ndjson" if streams else "application/json; charset=utf-8"
        streaming = kind.partition(";")[0].lower() in STREAM_TYPES
        if streaming:
            dropped |= {"cache-control", "x-accel-buffering"}
        kept = head.fields.end_to_end().without(dropped)
        if self.responder.extra:  # ours decide which origins may read
            kept = Fields(line for line in kept.lines if not line[0].startswith("access-control-"))
        fields = [*kept.pairs(), *self.own_fields()]
        fields += [("Content-Type", kind)] if transform else []
        fields += STREAM_FIELDS if streaming else []
        self.responder.begin(head.status, fields, length, head.reason)

# ======================================================================================
# 13  Dashboard and API
# ======================================================================================
# What the owner looks at: the requests that run now, and how the router is.

def inflight_row(record: Record, now: float) -> dict[str, Any]:
    """Return a running request as /api/inflight shows it."""
    return {
        "id": record.id, "request_id": record.request_id,
        "timestamp": rfc3339(record.started), "source_ip": record.source_ip,
        "path": record.path, "service_type": record.service,
        "original_model": record.original_model, "mapped_model": record.mapped_model,
        "upstream_url": record.upstream_url, "phase": record.phase,
        "elapsed_ms": round((now - record.clock) * 1000), "tokens": record.events,
        "bytes": record.response_size,
    }

# ======================================================================================
# 14  Application
# ======================================================================================
# Which path means what: one table. It dispatches and it guards, on the same normalised
# path. To add an endpoint: a function `serve_...` and a line in ENDPOINTS.

OLLAMA_VERSION = "0.12.0"  # the version of Ollama's API that is spoken here
RUNNING_FOR = 300.0  # s that /api/ps says a model stays

@dataclasses.dataclass
class Services:
    """What the endpoints work with; `table` changes when the routing file does."""

    settings: Settings
    table: RoutingTable
    upstreams: Upstreams
    models: ModelLists
    log: RequestLog
    relay: Relay
    decisions: dict[tuple[str, str], Decision] = dataclasses.field(default_factory=dict)
    draining: bool = False
    routes_error: str | None = None

    MAX_DECISIONS = 4096

    def decide(self, model: str, source_host: str) -> Decision:
        """Return where a request goes, from a bounded table of earlier decisions."""
        key = model, source_host
        decision = self.decisions.get(key)
        if decision is None:
            if len(self.decisions) >= self.MAX_DECISIONS:
                self.decisions.clear()
            decision = resolve(self.table, model, source_host)
            if len(model) <= MAX_PATTERN_NAME:
                self.decisions[key] = decision
        return decision

    def default_decision(self, server: Server | None = None) -> Decision:
        """Return the decision for what has no model: the default server, or that one."""
        server = server or self.table.default
        return Decision("", "", "default", "failover", (Instance(server),), ())

async def relay_model(services: Services, request: Request, dialect: Dialect) -> None:
    """Relay a request that names a model."""
    ask = dialect.read(request.path, request.query, request.content)
    if ask.model:
        decision = services.decide(ask.model, request.source_host)
    else:
        decision = services.default_decision()
    await Exchange(services.relay, request, dialect, ask, decision).run()

async def serve_openai_post(services: Services, request: Request, dialect: Dialect) -> None:
    """Relay a POST under /v1/: a JSON object, a form, or something else as it is."""
    kind = (request.head.fields.get("content-type") or "").lower()
    if kind.startswith("multipart/form-data"):
        dialect = OPENAI_FORM
    elif request.path not in MODEL_PATHS and "json" not in kind:
        if request.content.lstrip()[:1] != b"{":
            dialect = OPENAI_OPAQUE
    if request.head.fields.get("content-encoding") and dialect is not OPENAI_OPAQUE:
        coding = request.head.fields.get("content-encoding")
        raise UnsupportedContent(f"Content-Encoding {coding!r} of a request; send it plain")
    await relay_model(services, request, dialect)

async def serve_opaque(services: Services, request: Request, dialect: Dialect) -> None:
    """Relay what has no model to the default server, as it is."""
    ask = dialect.read(request.path, request.query, request.content)
    decision = services.default_decision()
    await Exchange(services.relay, request, dialect, ask, decision).run()

async def all_models(services: Services, request: Request) -> list[dict[str, Any]]:
    """Return the union of the models that this client may see."""
    secret = services.settings.jwt_secret
    fields = without_tokens(request.head.fields, secret, time.time())
    return await list_models(services.models, services.table, fields.get("authorization"))

async def serve_models(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer GET /v1/models."""
    models = await all_models(services, request)
    request.responder.send_json({"object": "list", "data": models})

async def serve_model(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer GET /v1/models/{id}."""
    name = urllib.parse.unquote(request.path.removeprefix("/v1/models/"))
    for model in await all_models(services, request):
        if model["id"] == name:
            request.responder.send_json(model)
            return
    raise NotFound(f"no server has a model {name!r}; GET /v1/models lists them all")

async def serve_tags(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /api/tags."""
    now = rfc3339(time.time())
    names = [model["id"] for model in await all_models(services, request)]
    request.responder.send_json({"models": [ollama_model(name, now) for name in names]})

async def serve_show(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /api/show: from the server when it speaks Ollama, else what is known."""
    ask = dialect.read(request.path, request.query, request.content)
    decision = services.decide(ask.model, request.source_host)
    if any(instance.server.api == dialect.service for instance in decision.instances):
        await relay_native(services, request, dialect)
        return
    known = {model["id"] for model in await all_models(services, request)}
    names = {ask.model, decision.mapped, *(i.model for i in decision.instances)}
    if not names & known:
        raise NotFound(f"model {ask.model!r} not found")
    request.responder.send_json(ollama_show(ask.model, rfc3339(time.time())))

async def serve_running(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /api/ps: the models that answer now."""
    now = time.time()
    names = {r.original_model: None for r in services.log.inflight.values() if r.original_model}
    more = {"expires_at": rfc3339(now + RUNNING_FOR), "size_vram": 0}
    models = [{**ollama_model(name, rfc3339(now)), **more} for name in names]
    request.responder.send_json({"models": models})

async def serve_version(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /api/version."""
    request.responder.send_json({"version": OLLAMA_VERSION})

async def relay_native(services: Services, request: Request, dialect: Dialect) -> None:
    """Relay what only a server that speaks the dialect itself can do."""
    is_json = request.content.lstrip()[:1] == b"{"
    reader = OLLAMA_NATIVE if is_json else OLLAMA_OPAQUE
    if not request.content and request.head.method != "HEAD":
        raise MalformedContent("the request has no content")
    ask = Ask(request.path, request.query, request.content)
    with contextlib.suppress(MalformedContent):
        ask = reader.read(request.path, request.query, request.content)
    servers = [s for s in services.table.all_servers() if s.api == dialect.service]
    decision = services.default_decision(servers[0] if servers else None)
    if ask.model:
        chosen = services.decide(ask.model, request.source_host)
        native = tuple(i for i in chosen.instances if i.server.api == dialect.service)
        if native:
            decision = chosen._replace(instances=native)
        elif servers:
            decision = chosen._replace(instances=(Instance(servers[0], ask.model),))
    if not servers:
        raise NotSupported(
            f"{request.path} needs a server that speaks {dialect.service} itself; mark one "
            f"with `api: {dialect.service}` in the routing file"
        )
    await Exchange(services.relay, request, reader, ask, decision).run()

async def serve_inflight(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /api/inflight."""
    now = time.monotonic()
    records = services.log.inflight.values()
    request.responder.send_json([inflight_row(record, now) for record in records])

async def serve_healthz(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer /healthz: 503 while draining."""
    status = "draining" if services.draining else "ok"
    request.responder.send_json({"status": status}, 503 if services.draining else 200)

async def serve_page(services: Services, request: Request, dialect: Dialect) -> None:
    """Answer `/`: HEAD tells Ollama's clients that somebody is there."""
    fields = [("Content-Type", "text/plain; charset=utf-8")]
    request.responder.send(200, fields, b"SmolRouter is running\n")

Handler = Callable[[Services, Request, Dialect], Awaitable[None]]

class Endpoint(NamedTuple):
    """Which requests a function serves; `guard` is the policy that decides on them."""

    methods: tuple[str, ...]
    path: re.Pattern[str]
    guard: str  # "api_security", "webui_security" or "" (open)
    serve: Handler
    dialect: Dialect = OPENAI

def endpoint(methods: str, path: str, guard: str, serve: Handler,
             dialect: Dialect = OPENAI) -> Endpoint:
    """Make an endpoint; `*` in the path is one segment, `**` any number."""
    words = {"**": ".+", "*": "[^/]+"}
    parts = (words.get(part) or re.escape(part) for part in re.split(r"(\*\*?)", path))
    return Endpoint(tuple(methods.split()), re.compile("".join(parts)), guard, serve, dialect)

API, WEBUI = "api_security", "webui_security"
POST_PATHS = (*MODEL_PATHS, "/v1/responses", "/v1/rerank", "/v1/images/generations",
              "/v1/images/edits", "/v1/audio/speech", "/v1/audio/transcriptions")
ENDPOINTS = (
    endpoint("GET HEAD", "/v1/models", API, serve_models),
    endpoint("GET HEAD", "/v1/models/**", API, serve_model),
    *(endpoint("POST", path, API, serve_openai_post) for path in POST_PATHS),
    endpoint("POST", "/v1/**", API, serve_openai_post),
    endpoint("GET HEAD PUT PATCH DELETE", "/v1/**", API, serve_opaque, OPENAI_OPAQUE),
    endpoint("POST", "/api/chat", API, relay_model, OLLAMA),
    endpoint("POST", "/api/generate", API, relay_model, OLLAMA),
    endpoint("POST", "/api/embed", API, relay_model, OLLAMA_EMBED),
    endpoint("POST", "/api/embeddings", API, relay_model, OLLAMA_EMBED),
    endpoint("GET HEAD", "/api/tags", API, serve_tags, OLLAMA),
    endpoint("POST", "/api/show", API, serve_show, OLLAMA),
    endpoint("GET HEAD", "/api/ps", API, serve_running, OLLAMA),
    endpoint("GET HEAD", "/api/version", API, serve_version, OLLAMA),
    endpoint("POST", "/api/pull", API, relay_native, OLLAMA),
    endpoint("POST", "/api/push", API, relay_native, OLLAMA),
    endpoint("POST", "/api/create", API, relay_native, OLLAMA),
    endpoint("POST", "/api/copy", API, relay_native, OLLAMA),
    endpoint("DELETE", "/api/delete", API, relay_native, OLLAMA),
    endpoint("POST HEAD", "/api/blobs/*", API, relay_native, OLLAMA),
    endpoint("GET HEAD", "/healthz", "", serve_healthz),
    endpoint("GET HEAD", "/api/inflight", WEBUI, serve_inflight),
    endpoint("HEAD", "/", "", serve_page, OLLAMA),
    endpoint("GET", "/", WEBUI, serve_page),
)

@functools.lru_cache(maxsize=256)
def find_endpoint(method: str, path: str) -> tuple[Endpoint | None, tuple[Endpoint, ...]]:
    """Return the endpoint that serves a request, and all that its path has."""
    found = tuple(item for item in ENDPOINTS if item.path.pattern == re.escape(path))
    found = found or tuple(item for item in ENDPOINTS if item.path.fullmatch(path))
    return next((item for item in found if method in item.methods), None), found

FATAL_TO_CONNECTION = (MalformedMessage, RequestTimeout, ContentTooLarge, FieldsTooLarge, TargetTooLong)

def refuse(responder: Responder, error: RouterError, dialect: Dialect) -> None:
    """Answer with an error of the router's own."""
    if isinstance(error, FATAL_TO_CONNECTION):
        responder.keep = False
    fields = [("Content-Type", "application/json"), *error.fields]
    responder.send(error.status, fields, dialect.encode_error(error))

def allow(known: Sequence[Endpoint]) -> str:
    """Return the methods of a path, as Allow lists them."""
    methods = [method for item in known for method in item.methods]
    return ", ".join(dict.fromkeys([*methods, "OPTIONS"]))

class Application:
    """Lets requests in, finds who serves them, and renders what goes wrong."""

    def __init__(self, services: Services) -> None:
        self.services, self.settings = services, services.settings
        self.machine = socket.gethostname()
        self.failures: dict[str, list[float]] = {}

    async def serve(self, request: Request) -> None:
        """Answer one request; every RouterError becomes an answer here."""
        found, known = find_endpoint(request.head.method, request.path)
        dialect = (found or known[0]).dialect if known else OPENAI
        try:
            self.check_browser(request, found)
            if request.head.method == "OPTIONS" and (known or request.path == "*"):
                self.answer_options(request, known)
                return
            if self.services.relay.via in ", ".join(request.head.fields.get_all("via")):
                raise LoopDetected("this request has been through this router before")
            self.check_policy(request, found.guard if found else API)
            if found is None:
                raise self.missing(request, known)
            await request.read_content(self.settings.max_request_size)
            await found.serve(self.services, request, dialect)
        except RouterError as error:
            refuse(request.responder, error, dialect)

    def missing(self, request: Request, known: Sequence[Endpoint]) -> RouterError:
        """Return the error for a path or method that nobody serves."""
        if known:
            what = f"{request.head.method} is not allowed for {request.path}; {allow(known)} are"
            return MethodNotAllowed(what, ("Allow", allow(known)))
        other = f"/v1{request.path}"
        hint = f"; did you mean {other}?" if find_endpoint(request.head.method, other)[0] else ""
        return NotFound(f"unknown path {request.path[:200]}{hint}")

    def check_browser(self, request: Request, found: Endpoint | None) -> None:
        """Refuse a page from elsewhere: by its Origin, or by a Host that was rebound."""
        fields, settings = request.head.fields, self.settings
        origin = fields.get("origin")
        guarded = found is not None and found.guard == WEBUI
        if guarded or (origin is None and fields.get("sec-fetch-site") not in (None, "none")):
            check_web_host(request.host, settings.allowed_hosts, self.machine)
        if origin is None:
            return
        if not origin_allowed(origin, request.host, settings.allowed_origins):
            raise Forbidden(f"origin {origin[:80]!r} is not allowed; add it to ALLOWED_ORIGINS")
        request.responder.extra = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]

    def answer_options(self, request: Request, known: Sequence[Endpoint]) -> None:
        """Answer what a path allows, and a browser's preflight."""
        fields = request.head.fields
        answer = [("Allow", allow(known))]
        if fields.get("origin") is not None:
            wanted = fields.get("access-control-request-headers") or "*"
            answer += [("Access-Control-Allow-Methods", allow(known)),
                       ("Access-Control-Allow-Headers", wanted), ("Access-Control-Max-Age", "600")]
        request.responder.send(204, answer, b"")

    def check_policy(self, request: Request, guard: str) -> None:
        """Check the token; ten failures a minute from one address, then 429."""
        policy = getattr(self.settings, guard) if guard else "NONE"
        if policy == "NONE":
            return
        clock, source = time.monotonic(), request.source_host
        recent = [t for t in self.failures.get(source, ()) if clock - t < FAILURE_WINDOW]
        if len(recent) >= MAX_FAILURES:
            wait = str(int(FAILURE_WINDOW - (clock - recent[0])) + 1)
            raise TooManyRequests("too many failed tokens from this address", ("Retry-After", wait))
        fields, cookie = request.head.fields, guard == WEBUI
        try:
            check_access(policy, self.settings.jwt_secret, fields, cookie, time.time())
        except Unauthorized:
            if find_tokens(fields, cookie):
                if len(self.failures) > 10_000:
                    self.failures.clear()
                self.failures[source] = [*recent, clock]
            raise

# ======================================================================================
# 15  HTTP server
# ======================================================================================
# The connection loop: one request after another on each connection, until the client
# leaves, an error ends it or the router drains. Connections are accepted only while
# there is room; more wait in the listen queue.

BACKLOG = 4096  # the default of 100 makes the 101st client of a burst wait for 1 to 3 s
MAX_REQUESTS = 10_000  # on one connection
MAX_DISCARDED = 64 * KiB  # unread content that is read past after an early answer
SHORT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

class Connection:
    """A client's connection: its stream, its task and whether it has a request now."""

    def __init__(self, stream: Stream, peer: str) -> None:
        self.stream, self.peer = stream, peer
        self.busy = False

class HTTPServer:
    """Accepts connections and serves their requests."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.settings = application.settings
        self.services = application.services
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self.listeners: list[socket.socket] = []
        self.accepting: list[asyncio.Task[None]] = []
        self.room = asyncio.Event()
        self.room.set()

    def listen(self) -> int:
        """Open the listening sockets; return the port. Raises OSError."""
        host, port = self.settings.listen_host, self.settings.listen_port
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            self.listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                only = address[0] != "::"
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            listener.bind((address[0], port, *address[2:]))
            port = listener.getsockname()[1]
            listener.listen(BACKLOG)
            listener.setblocking(False)
        return port

    def start(self) -> None:
        """Begin to accept."""
        self.accepting = [asyncio.create_task(self.accept(s)) for s in self.listeners]

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections while there is room; never spin when files run short."""
        loop = asyncio.get_running_loop()
        while True:
            await self.room.wait()
            try:
                client, address = await loop.sock_accept(listener)
            except OSError as error:
                await asyncio.sleep(0.2 if error.errno in SHORT_OF_FILES else 0.01)
                continue
            peer = str(address[0])
            task = asyncio.create_task(self.serve_connection(client, peer))
            self.connections[task] = None
            task.add_done_callback(self.forget)
            if len(self.connections) >= self.settings.max_connections:
                self.room.clear()

    def forget(self, task: asyncio.Task[None]) -> None:
        """Make room for another connection."""
        del self.connections[task]
        self.room.set()

    async def serve_connection(self, client: socket.socket, peer: str) -> None:
        """Serve one request after another on an accepted socket."""
        loop = asyncio.get_running_loop()
        reader = Reader(limit=READ_SIZE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, client)
        except OSError:
            client.close()
            return
        stream = Stream(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        self.connections[asyncio.current_task()] = stream
        try:
            for _ in range(MAX_REQUESTS):
                if not await self.serve_request(stream, peer):
                    break
        except (OSError, RouterError):
            pass  # the client went away between two messages, or was idle for too long
        except asyncio.CancelledError:
            if stream.cause is None:
                raise
        finally:
            stream.close(abort=isinstance(stream.cause, ClientClosed))

    async def serve_request(self, stream: Stream, peer: str) -> bool:
        """Serve one request; return whether another may follow."""
        stream.busy = False
        stream.expect(IDLE_TIMEOUT, RequestTimeout("idle"))
        if not stream.rest:
            stream.rest = await stream.read()
            if not stream.rest:
                return False
        stream.busy = True
        stream.expect(HEAD_TIMEOUT, RequestTimeout(f"no head within {HEAD_TIMEOUT:.0f} s"))
        try:
            data = await stream.read_head(MAX_REQUEST_HEAD)
            if data is None:
                return False
            request = self.read_request(stream, peer, parse_request_head(data))
        except RouterError as error:
            refuse(Responder(stream, None), error, OPENAI)
            await stream.linger()
            return False
        stream.deadline = float("inf")
        responder = request.responder
        try:
            await self.application.serve(request)
        except Exception:  # a fault of ours must cost one request, not the connection loop
            self.services.log.console.line(traceback.format_exc())
            if not responder.started:
                responder.keep = False
                refuse(responder, RouterError("internal error; see the log"), OPENAI)
        stream.reader.on_close = None
        if not responder.finished:
            return False
        return await self.settle(request)

    def read_request(self, stream: Stream, peer: str, head: RequestHead) -> Request:
        """Put together what a head says. Raises MalformedMessage."""
        authority, path, query = parse_target(head)
        request_framing(head)
        responder = Responder(stream, head)
        responder.keep = responder.keep and not self.services.draining
        host = authority or head.fields.get("host") or ""
        source = client_address(peer, head.fields, self.settings.trusted_proxies)
        return Request(head, stream, responder, source, host, path, query)

    async def settle(self, request: Request) -> bool:
        """Read past content that nobody wanted, or close; return whether to go on."""
        stream, keep = request.stream, request.responder.keep
        framing = request_framing(request.head)
        unread = request.unread or Content(stream, framing)
        if unread.done:
            return keep and not self.services.draining
        expects = request.head.fields.get("expect") is not None
        if keep and request.unread is None and not expects and framing.length <= MAX_DISCARDED:
            stream.expect(LINGER, RequestTimeout("late"))
            size = 0
            while size <= MAX_DISCARDED and (piece := await unread.read()):
                size += len(piece)
            if unread.done:
                return True
        await stream.linger()
        return False

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Refuse new connections, let running answers end for `grace` s, close all."""
        self.services.draining = True
        for task in self.accepting:
            task.cancel()
        for listener in self.listeners:
            listener.close()
        cause = Unavailable("the router is shutting down")
        for task, stream in list(self.connections.items()):
            if stream is None or not stream.busy:
                self.end(task, stream, cause)
        hurried = asyncio.create_task(hurry.wait())
        end = time.monotonic() + grace
        while self.connections and not hurry.is_set() and time.monotonic() < end:
            left = end - time.monotonic()
            running = [*self.connections, hurried]
            await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for task, stream in list(self.connections.items()):
            self.end(task, stream, cause)
        if self.connections:
            await asyncio.wait(list(self.connections), timeout=1.0)

    def end(self, task: asyncio.Task[None], stream: Stream | None, cause: RouterError) -> None:
        """End a connection's task for a reason that its request will tell."""
        if stream:
            stream.cause = cause
        task.cancel()

# ======================================================================================
# 16  Command line
# ======================================================================================
# `serve` is the router; the other commands look at a configuration, ask a running router
# or show one off. The environment is read in `main`, and nowhere else.

RELOAD_EVERY = 2.0  # s between two looks at the routing file
EPILOG = """examples:
  smolrouter.py                                  serve with the settings of the environment
  smolrouter.py --default-upstream http://gpu:8000 --listen-port 8080
  smolrouter.py check                            validate settings and routing file
  smolrouter.py explain gpt-4 --source-host 10.0.1.7
  smolrouter.py demo                             see it work; needs nothing else
"""

class RoutesFile:
    """The routing file on disk: reads it, and knows when it has changed."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], named: bool) -> None:
        self.settings, self.environ, self.named = settings, environ, named
        self.path = pathlib.Path(settings.routes_config)
        self.seen: tuple[int, ...] | None = self.stamp()

    def stamp(self) -> tuple[int, ...] | None:
        """Return what changes with the file, None without one."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def changed(self) -> bool:
        """Tell whether the file is another one than at the last look."""
        before, self.seen = self.seen, self.stamp()
        return before != self.seen

    def load(self) -> RoutingTable:
        """Read the table. Raises ConfigError."""
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            if self.named:
                raise ConfigError(
                    f"ROUTES_CONFIG={str(self.path)!r}: no such file; create it or unset it"
                ) from None
            names = self.settings.model_map
            return RoutingTable(Server("default", self.settings.default_upstream), model_map=names)
        except (OSError, ValueError) as error:
            raise ConfigError(f"ROUTES_CONFIG={str(self.path)!r}: {describe(error)}") from None
        return parse_routes(text, str(self.path), self.environ, self.settings)

def describe_table(table: RoutingTable) -> str:
    """Return a line about a routing table."""
    source = table.source or "no routing file"
    counts = (
        f"{len(table.servers)} servers, {len(table.aliases)} aliases, "
        f"{len(table.rules)} routes, {len(table.model_map)} mapped names"
    )
    return f"routes: {source}: {counts}; the rest goes to {table.default.url}"

class Router:
    """The whole program, running: started and stopped by the command line."""

    def __init__(self, settings: Settings, routes: RoutesFile) -> None:
        self.settings, self.routes = settings, routes
        self.console = Console()
        self.hurry = asyncio.Event()
        self.ended = asyncio.Event()
        upstreams = Upstreams(settings)
        log = RequestLog(settings, self.console)
        relay = Relay(settings, upstreams, log, f"1.1 smolrouter-{secrets.token_hex(6)}")
        table = routes.load()
        self.services = Services(settings, table, upstreams, ModelLists(upstreams), log, relay)
        self.server = HTTPServer(Application(self.services))

    def reload(self) -> None:
        """Take a changed routing file; a bad one leaves the old table in force."""
        self.routes.changed()
        try:
            if self.routes.seen is None and self.services.table.source:
                raise ConfigError(f"{self.routes.path} is gone; the old table stays in force")
            self.services.table = self.routes.load()
        except ConfigError as error:
            self.services.routes_error = str(error)
            self.console.line(f"routes: {error} (the old table stays in force)")
            return
        self.services.routes_error = None
        self.services.decisions.clear()
        self.console.line(describe_table(self.services.table))

    async def watch(self) -> None:
        """Look at the routing file every two seconds."""
        while True:
            await asyncio.sleep(RELOAD_EVERY)
            if self.routes.changed():
                self.reload()

    def interrupt(self) -> None:
        """End at a signal: the first one drains, the second one hurries."""
        if self.ended.is_set():
            self.hurry.set()
        self.ended.set()

    def announce(self, port: int) -> None:
        """Print where the router listens and what it does."""
        settings = self.settings
        host = settings.listen_host
        host = f"[{host.strip('[]')}]" if ":" in host else host
        for line in (
            f"SmolRouter {__version__} listens on http://{host}:{port}",
            describe_table(self.services.table),
            f"Web UI: {settings.webui_security}; API: {settings.api_security}; "
            f"tokens: {'JWT_SECRET is set' if settings.jwt_secret else 'no JWT_SECRET'}",
        ):
            self.console.line(line)

    async def run(self, ready: Callable[[int], None] = lambda port: None) -> int:
        """Serve until a signal; return the exit status."""
        loop = asyncio.get_running_loop()
        try:
            port = self.server.listen()
        except OSError as error:
            place = f"{self.settings.listen_host}:{self.settings.listen_port}"
            self.console.line(
                f"cannot listen on {place}: {describe(error)}; choose another LISTEN_PORT "
                "(LM Studio uses 1234 too)"
            )
            self.console.close()
            return 1
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.interrupt)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.server.start()
        self.announce(port)
        ready(port)
        watcher = asyncio.create_task(self.watch())
        await self.ended.wait()
        self.console.line(f"draining for at most {self.settings.shutdown_grace:g} s")
        watcher.cancel()
        await self.server.stop(self.settings.shutdown_grace, self.hurry)
        self.services.upstreams.close()
        self.console.close()
        return 0

async def run_router(settings: Settings, routes: RoutesFile,
                     ready: Callable[[int], None] = lambda port: None) -> int:
    """Build and run a router inside a running loop."""
    return await Router(settings, routes).run(ready)

def run_serve(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    return asyncio.run(run_router(settings, routes))

def run_check(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Validate settings and routing file, print the table."""
    table = routes.load()
    print(describe_table(table))
    for server in table.all_servers():
        print(f"  server {server.name}: {server.url} ({server.api})")
    for alias in table.aliases.values():
        print(f"  alias {alias.name} ({alias.strategy}): {', '.join(map(str, alias.instances))}")
    for rule in table.rules:
        target = rule.target
        words = f"alias {target.name}" if isinstance(target, Alias) else str(target)
        print(f"  {rule.name}: {rule.match_text} -> {words}")
    for key, name in table.model_map:
        print(f"  map {f'/{key.pattern}/' if isinstance(key, re.Pattern) else key} -> {name}")
    print("ok")
    return 0

def run_explain(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Print every rule tried for a model, and where the request would go."""
    decision = resolve(routes.load(), args.model, args.source_host)
    print(f"{args.model!r} from {args.source_host}")
    for step in decision.trail:
        print(f"  {'+' if step.matched else '-'} {step.rule}: {step.why}")
    print(f"route: {decision.route} ({decision.strategy})")
    for instance in decision.instances:
        print(f"  send {instance.model!r} to {instance.server.name} ({instance.server.url})")
    return 0

def run_token(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Print a token."""
    if settings.jwt_secret is None:
        raise ConfigError("JWT_SECRET is not set; set it to what the router has")
    print(encode_token(settings.jwt_secret, args.subject, time.time(), args.days))
    return 0

def run_health(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Ask a running router whether it is well."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)
    connection = http.client.HTTPConnection(host.strip("[]"), settings.listen_port, timeout=3)
    try:
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        print(response.read(1000).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"{host}:{settings.listen_port}: {describe(error)}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    return 0 if response.status == 200 else 1

UNIT = """[Unit]
Description=SmolRouter, one address for local language models
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={python} {program} serve
ExecReload=/bin/kill -HUP $MAINPID
{environment}
# Secrets (JWT_SECRET=...) belong into this file, mode 0600:
EnvironmentFile=-/etc/smolrouter.env
Restart=on-failure
TimeoutStopSec={stop}
DynamicUser=yes
StateDirectory=smolrouter
StateDirectoryMode=0700
WorkingDirectory=%S/smolrouter
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources

[Install]
WantedBy=multi-user.target
"""

def run_unit(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Print a systemd unit for this file and these settings."""
    lines = []
    for name, text in sorted(args.given.items()):
        value = str(pathlib.Path(text).absolute()) if name == "routes_config" else text
        value = re.sub(r'(["\\])', r"\\\1", value).replace("%", "%%")
        if name != "jwt_secret":
            lines.append(f'Environment="{name.upper()}={value}"')
    program = pathlib.Path(__file__).resolve()
    stop = int(settings.shutdown_grace) + 4
    environment = "\n".join(lines)
    print(
        UNIT.format(python=sys.executable, program=program, environment=environment, stop=stop),
        end="",
    )
    return 0

class DemoUpstream(http.server.BaseHTTPRequestHandler):
    """A pretended model server; its class attributes say how it behaves."""

    protocol_version = "HTTP/1.1"
    delay, thinks, fails, models = 0.05, False, False, ("llama3-8b",)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; the router does."""

    def answer(self, status: int, doc: Any) -> None:
        """Send a JSON document."""
        content = encode_json(doc)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        """List the models."""
        self.answer(
            200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]}
        )

    def do_POST(self) -> None:
        """Answer a chat, streamed when asked."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.fails:
            self.answer(
                503, {"error": {"message": "the model is being loaded", "type": "server_error"}}
            )
            return
        words = "The quick brown fox jumps over the lazy dog and is home before dinner.".split()
        words = words[: 4 + secrets.randbelow(len(words) - 3)]
        thought = "<think>The user wants a sentence. I will say one about a fox.</think>\n\n"
        pieces = ([thought] if self.thinks else []) + [f"{word} " for word in words]
        usage = {
            "prompt_tokens": 12,
            "completion_tokens": len(pieces),
            "total_tokens": 12 + len(pieces),
        }
        head = {"id": "chatcmpl-demo", "created": int(time.time()), "model": asked["model"]}
        if not asked.get("stream"):
            time.sleep(self.delay * len(pieces))
            message = {"role": "assistant", "content": "".join(pieces).rstrip()}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(
                200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            )
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        deltas = [({"content": piece}, None) for piece in pieces] + [({}, "stop")]
        for delta, reason in deltas:
            time.sleep(self.delay)
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            event = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(b"data: " + encode_json(event) + b"\n\n")
        self.wfile.write(b"data: " + encode_json({**head, "choices": [], "usage": usage}) + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

def start_demo_upstreams() -> dict[str, str]:
    """Start three upstreams in threads; return their URLs by name."""
    kinds = {
        "slow-box": {"delay": 0.3, "models": ("llama3-70b",)},
        "thinker": {"thinks": True, "models": ("qwen3-8b", "llama3-8b")},
        "broken-box": {"fails": True, "models": ("llama3-8b",)},
    }
    urls = {}
    for name, behaviour in kinds.items():
        handler = type(name, (DemoUpstream,), behaviour)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls[name] = f"http://127.0.0.1:{server.server_address[1]}"
    return urls

DEMO_ROUTES = {
    "aliases": {"coding-assistant": {"instances": ["broken-box/llama3-8b", "thinker/qwen3-8b"]}},
    "routes": [
        {"match": {"model": "/70b$/"}, "route": {"upstream": "slow-box"}},
        {"match": {"model": "/^gpt-/"}, "route": {"upstream": "thinker", "model": "qwen3-8b"}},
    ],
}
DEMO_REQUESTS = (
    ("/v1/chat/completions", "gpt-4", True, "a renamed model; its <think> block is taken out"),
    ("/v1/chat/completions", "coding-assistant", False, "an alias; the first server fails"),
    ("/api/chat", "llama3-70b", True, "an Ollama client on an OpenAI server, slow"),
    ("/api/chat", "coding-assistant", False, "an Ollama client and failover"),
    ("/v1/chat/completions", "llama3-8b", True, "the default upstream"),
)

def run_demo_traffic(port: int, seconds: float) -> None:
    """Send requests of all kinds through the router and print what came back."""
    end = time.monotonic() + seconds
    for path, model, stream, words in itertools.cycle(DEMO_REQUESTS):
        if time.monotonic() > end:
            break
        messages = [{"role": "user", "content": "Tell me about the fox."}]
        content = encode_json({"model": model, "messages": messages, "stream": stream})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()
        served = response.headers.get("X-SmolRouter-Model")
        print(
            f"{path} {model} -> {served}: {response.status}, {len(body)} bytes ({words})",
            flush=True,
        )
        time.sleep(0.5)
    print(
        f"That was the demo. The dashboard stays at http://127.0.0.1:{port}/ ; Ctrl-C ends it.",
        flush=True,
    )

def run_demo(args: argparse.Namespace, settings: Settings, routes: RoutesFile) -> int:
    """Show the router at work with three upstreams of its own."""
    urls = start_demo_upstreams()
    with socket.socket() as probe:
        taken = settings.listen_port and not probe.connect_ex(("127.0.0.1", settings.listen_port))
    with tempfile.TemporaryDirectory(prefix="smolrouter-demo-") as folder:
        place = pathlib.Path(folder)
        (place / "routes.json").write_bytes(encode_json({"servers": urls, **DEMO_ROUTES}))
        settings = dataclasses.replace(
            settings, default_upstream=parse_upstream_url(urls["thinker"]),
            listen_host="127.0.0.1", listen_port=0 if taken else settings.listen_port,
            routes_config=str(place / "routes.json"), db_path=str(place / "requests.db"),
            blob_storage_path=str(place / "blobs"), model_map=(),
        )

        def begin(port: int) -> None:
            traffic = threading.Thread(
                target=run_demo_traffic, args=(port, args.seconds), daemon=True
            )
            traffic.start()

        return asyncio.run(run_router(settings, RoutesFile(settings, {}, True), begin))

def build_parser() -> argparse.ArgumentParser:
    """Return the parser: commands, and a flag for every setting."""
    flags = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = flags.add_argument_group("settings (each is an environment variable too)")
    for item in dataclasses.fields(Settings):
        is_bool = isinstance(item.default, bool)
        default = item.metadata["default"] or "unset"
        group.add_argument(
            f"--{item.name.replace('_', '-')}", metavar="VALUE", dest=item.name,
            **({"nargs": "?", "const": "true"} if is_bool else {}),
            help=f"{item.metadata['help']} ({default})".replace("%", "%%"),
        )
    parser = argparse.ArgumentParser(
        prog="smolrouter", parents=[flags], epilog=EPILOG, allow_abbrev=False,
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"SmolRouter {__version__}")
    parser.set_defaults(run=run_serve)
    commands = parser.add_subparsers(metavar="command")

    def command(name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        words = (run.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(
            name, parents=[flags], help=words, description=words, allow_abbrev=False
        )
        sub.set_defaults(run=run)
        return sub

    command("serve", run_serve)
    command("check", run_check)
    explain = command("explain", run_explain)
    explain.add_argument("model", help="the name that a client would ask for")
    explain.add_argument("--source-host", default="127.0.0.1", help="the client's address")
    token = command("token", run_token)
    token.add_argument("--subject", required=True, help="whose token it is")
    token.add_argument("--days", type=parse_number(0.001, 36500, False), default=30.0)
    command("health", run_health)
    command("unit", run_unit)
    demo = command("demo", run_demo)
    demo.add_argument("--seconds", type=parse_number(0, 3600, False), default=30.0)
    return parser

def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (failed) or 2 (bad settings)."""
    environ = dict(os.environ)
    args = build_parser().parse_args(argv)
    names = [item.name for item in dataclasses.fields(Settings)]
    flags = {name: getattr(args, name) for name in names if hasattr(args, name)}
    try:
        settings = Settings.from_mapping(environ, flags)
        given = {name: find_setting(name, environ, flags)[1] for name in names}
        args.given = {name: text for name, text in given.items() if text is not None}
        routes = RoutesFile(settings, environ, "routes_config" in args.given)
        return args.run(args, settings, routes)
    except ConfigError as error:
        print(f"smolrouter: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0

# ======================================================================================
# A  The page
# ======================================================================================
# A verbatim copy of dashboard.html; `python test_smolrouter.py --embed` writes it.

DASHBOARD_HTML = r"""
"""

if __name__ == "__main__":
    sys.exit(main())
