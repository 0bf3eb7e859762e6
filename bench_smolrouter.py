#!/usr/bin/env python3
"""Measure smolrouter.py beside a bare asyncio relay, on this machine, in one run.

    python bench_smolrouter.py [--rounds 3] [--rows 100000] [--json]
    python bench_smolrouter.py --curves [--json]
    python bench_smolrouter.py --make-rows 1000000 FILE; python bench_smolrouter.py --log FILE
    python bench_smolrouter.py --soak MINUTES

Four ways to the same upstream are asked in turn, round by round: directly, through the
floor (a relay on asyncio streams that looks at nothing, part of this file), and through
SmolRouter with rules, a model map and think stripping on, without and with its log. Then
a log of many rows is asked what the page asks, and routers that find models by lists, let
requests wait for slots and send spans are asked, too. `--curves` tells instead how the cost of a
request grows. Load, upstream and relays are processes of their own on 127.0.0.1. Standard
library only, on Linux, below four minutes. Quote ratios: absolute figures are the machine's.

The soak sends good traffic and every kind of bad one at the same time, while a server is
drained and opened again, others have few slots, are slow or list no models, and agents and
models that think are among those that answer well. It fails unless every good answer is exact,
every good request has its row in the log, and memory and descriptors end where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import copy
import functools
import itertools
import json
import logging
import os
import pathlib
import random
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
PACE = 0.05  # seconds between two events of a paced stream
CONNECTIONS, STREAMS, BURST = 32, 8, 500  # that ask; at full speed; events of such a stream
AGENTS, SLOTS, QUEUE = 50, 8, 200  # agents that ask; of a server; that wait for these
SETTLE = 0.25  # s after a load, for what it left to do: the log is written in batches
Figures = dict[str, dict[str, float]]  # by column and row
EACH = "events of an answer, each"  # a curve per event, not per request
EACH_TAGGED = "events with tags, each"
ROUTES = {
    "aliases": {"coding-assistant": {"instances": ["UPSTREAM/bench"]},
                "agent": {"instances": ["UPSTREAM/bench"], "think": "off"}},
    "routes": [
        {"match": {"model": "/.*-1.5b/"}, "route": {"model": "other"}},
        {"match": {"source_host": "10.0.1.100"}, "route": {"model": "other"}},
        {"match": {"model": "gpt-4"}, "route": {"model": "other"}},
    ],
}  # fmt: skip
END = b"0\r\n\r\n"
USAGE = {"prompt_tokens": 12, "completion_tokens": 24, "total_tokens": 36}
ANSWER = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "bench",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "The first sentence of a real answer. " * 3}}],
    "usage": USAGE,
}).encode()  # fmt: skip
MESSAGE = json.dumps({
    "id": "msg_1", "type": "message", "role": "assistant", "model": "bench",
    "content": [{"type": "text", "text": "The first sentence of a real answer. " * 3}],
    "stop_reason": "end_turn", "usage": {"input_tokens": 12, "output_tokens": 24, **USAGE},
}).encode()  # fmt: skip
WORDS = ("The", "quick", "naïve", "狐", "jumps", "<b>", "\\", '"', "\n", "over", "🦊", "</p>")
# What opens and closes a block of thinking, in each way that models have; harmony's goes on with
# the message that is the answer.
TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
        ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"),
        ("<mm:think>", "</mm:think>"), ("[THINK]", "[/THINK]"),
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"), ("<|channel>thought\n", "<channel|>"),
        ("<|channel|>analysis<|message|>",
         "<|end|><|start|>assistant<|channel|>final<|message|>"))  # fmt: skip
GOOD = ("good", "tight", "pair", "listed", "slow", "tagged", "agent")  # models that answer well
PING = b": ping\n\n"
SOAK_ROUTES = {
    "servers": {
        "tight": {"url": "/tight", "slots": 2, "models": ["tight"]},
        "spare": {"url": "/spare", "discover": False},
        "moody": {"url": "/moody"},
    },
    "aliases": {
        "pair": {"instances": ["spare/good", "UPSTREAM/good"], "strategy": "round_robin"},
        "agent": {"instances": ["UPSTREAM/good"], "think": "off"},
    },
}
FINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED = FINE + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_ANSWERS = {
    "closes": b"",
    "noise": bytes(range(256)),
    "half-head": FINE + b"Content-",
    "two-lengths": FINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "cut": FINE + b"Content-Length: 99\r\n\r\n{}",
    "hints": b"HTTP/1.1 103 A\r\n\r\n" * 99,
    "cut-stream": CHUNKED + b"9\r\ndata: {}\n\r\n",
    "bad-chunk": CHUNKED + b"zz\r\n",
    "endless-head": FINE + b"A: b\r\n" * 20_000,
    "junk": FINE + b"Content-Length: 2\r\n\r\n{}" + FINE + b"\r\n",
    "bomb": FINE
    + b"Content-Type: application/json\r\nContent-Encoding: deflate\r\n\r\n"
    + zlib.compress(bytes(64 << 20), 1),
    "busy": b"HTTP/1.1 429 Busy\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\n{}",
}
JSON = FINE + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
LISTED = b'{"object":"list","data":[{"id":"listed"}]}'
FAILED = b"HTTP/1.1 500 Failed\r\nContent-Length: 0\r\n\r\n"
LISTS = (JSON % len(LISTED) + LISTED, JSON % 2 + b"{}", JSON % 99 + b"{}", FAILED, b"")
WHOLE, WHOLE_MESSAGE = (JSON % len(content) + content for content in (ANSWER, MESSAGE))

# ======================================================================================
# The ends and the floor, each run as a process: `bench_smolrouter.py --run NAME`
# ======================================================================================


def encode_event(*texts: str, **more: Any) -> bytes:
    """Return one event as a chunk, with a choice for each text."""
    choices = [{"index": n, "delta": {"content": text}, "finish_reason": None}
               for n, text in enumerate(texts)]  # fmt: skip
    doc = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
           "model": "bench", "choices": choices, **more}  # fmt: skip
    data = b"data: %b\n\n" % json.dumps(doc, separators=(",", ":")).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_END = encode_event(usage=USAGE) + b"e\r\ndata: [DONE]\n\n\r\n" + END
STAMPED = encode_event(" @@000000000000000000").replace(b"0" * 18, b"%018d")  # takes ns
STAMP = re.compile(rb"@@([0-9]{18})")
TARGET = re.compile(rb"POST [^ ?]*\?events=([0-9]+)(&paced|&tags)? ")


@functools.lru_cache
def encode_burst(count: int, tags: bool = False) -> bytes:
    """Return a stream of events that comes all at once; they are of many lengths."""
    words = re.findall(r" ?\w+|[,.]", "Each event says a token, and hardly two are equally long.")
    if tags:
        words = [*words[:4], "\u25c1think\u25b7", *words[4:8], "\u25c1/think\u25b7", *words[8:]]
    said = map(encode_event, itertools.islice(itertools.cycle(words), count))
    return CHUNKED + b"".join(said) + STREAM_END


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return a request's head and content."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    return head, await reader.readexactly(int(length[1]) if length else 0)


async def serve_upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a chat: whole, or with the events that its target asks for, at once or paced."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head, _ = await read_request(reader)
            asked = TARGET.match(head)
            if not asked:
                is_message = head.split(b" ", 2)[1].endswith(b"/messages")
                writer.write(WHOLE_MESSAGE if is_message else WHOLE)
            elif asked[2] != b"&paced":
                writer.write(encode_burst(int(asked[1]), asked[2] == b"&tags"))
            if not asked or asked[2] != b"&paced":
                await writer.drain()
                continue
            writer.write(CHUNKED)
            due = time.monotonic() + random.random() * PACE  # streams are not in step
            for number in range(int(asked[1])):
                await asyncio.sleep(due + number * PACE - time.monotonic())
                writer.write(STAMPED % time.monotonic_ns())
            writer.write(STREAM_END)
    writer.close()


def said_to(content: bytes) -> list[str]:
    """Return what the soak's model says to a request: words that depend on all of it."""
    seed = random.Random(zlib.crc32(content))
    return [f"{seed.choice(WORDS)}{seed.randrange(1000)} " for _ in range(seed.randrange(1, 60))]


def tagged_words(content: bytes, visible: bool = False) -> list[str]:
    """Return plain words, some of which are thought: what the soak's thinking model says."""
    words = [f"word{zlib.crc32(word.encode())} " for word in said_to(content)]
    pieces: list[str] = []
    for number, word in enumerate(words):
        opening, closing = TAGS[number % len(TAGS)]
        if number % 5 != 2:
            pieces.append(word)
        elif not visible:
            pieces += [opening, word, closing]
    return pieces


def encode_message(asked: dict[str, Any]) -> bytes:
    """Return the soak's answer to an agent; it says so when the request was not mended."""
    words = said_to(json.dumps(asked["messages"][-1]).encode())
    if asked.get("thinking") != {"type": "disabled"} or "billing-header" in str(asked["system"]):
        words.append("BAD")
    usage = {"input_tokens": 1, "output_tokens": len(words)}
    return json.dumps({"type": "message", "role": "assistant", "usage": usage,
                       "content": [{"type": "text", "text": "".join(words)}]}).encode()  # fmt: skip


def encode_said(words: list[str], stream: bool) -> bytes:
    """Return the exact content of the soak's answer with these words."""
    if not stream:
        message = {"role": "assistant", "content": "".join(words)}
        usage = {"prompt_tokens": 1, "completion_tokens": len(words)}
        return json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode()
    docs = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
    events = [*map(json.dumps, docs), "[DONE]"]
    return "".join(f"data: {data}\n\n" for data in events).encode()


async def serve_soak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer well, or as badly as the model's name says."""
    try:
        while True:
            head, content = await read_request(reader)
            if head.startswith(b"GET "):
                writer.write(random.choice(LISTS))
                break
            asked = json.loads(content or b"{}")
            # Of what was changed at random anything may be left, such as a head that ends early.
            if not isinstance(asked, dict):
                asked = {}
            model = asked.get("model", "")
            bad = BAD_ANSWERS.get(model)
            if bad is not None:
                writer.write(bad)
                await writer.drain()
                await asyncio.sleep(0.05)
                break
            if model == "slow":
                await asyncio.sleep(0.3)
            words = tagged_words(content) if model == "tagged" else said_to(content)
            said = encode_said(words, asked.get("stream", False))
            if b"/messages " in head:
                said = encode_message(asked)
            kind = b"text/event-stream" if asked.get("stream") else b"application/json"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind)
            if not asked.get("stream"):
                writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(said), said))
                continue
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(said), 300):  # events are cut anywhere
                piece = said[at : at + 300]
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0.002)
            writer.write(END)
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        pass
    writer.close()


class SleepingMachine(asyncio.DatagramProtocol):
    """A model server whose machine sleeps until its magic packet comes, or `sleep` is called."""

    mac = bytes(range(6))

    def __init__(self) -> None:
        # Nobody listens there, but the port is taken.
        self.place = socket.socket()
        self.place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.place.bind(("127.0.0.1", 0))
        self.waking: asyncio.Task[None] | None = None
        self.server: asyncio.Server | None = None
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self) -> dict[str, Any]:
        """Begin to listen for packets; return what the routing file says of the server."""
        loop = asyncio.get_running_loop()
        self.packets, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
        packets_at = self.packets.get_extra_info("sockname")[1]
        wake = {"mac": self.mac.hex(":"), "address": "127.0.0.1", "port": packets_at}
        url = f"http://127.0.0.1:{self.place.getsockname()[1]}"
        return {"url": url, "models": ["sleepy"], "wake": wake}

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Wake, if the packet is the machine's own and it sleeps."""
        if data == b"\xff" * 6 + self.mac * 16 and self.waking is None:
            self.waking = asyncio.create_task(self.wake())

    async def wake(self) -> None:
        """Listen for requests."""
        place = self.place.getsockname()
        self.server = await asyncio.start_server(self.serve, *place, reuse_address=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer as a server that is awake does."""
        self.writers.append(writer)
        await serve_soak(reader, writer)

    def sleep(self) -> None:
        """Listen no more, and end what is connected."""
        if self.server:
            self.server.close()
        for writer in self.writers:
            writer.close()
        self.writers.clear()
        self.server = None
        self.waking = None

    def end(self) -> None:
        """Let go of both ports."""
        self.sleep()
        self.packets.close()
        self.place.close()


async def serve_floor(
    upstream: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Relay bytes both ways, on one upstream connection for each client's."""
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    tasks = [copy(reader, up_writer), copy(up_reader, writer)]
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_end(name: str, upstream: int) -> None:
    """Serve until killed; print the port."""
    ends = {"upstream": serve_upstream, "soak": serve_soak,
            "floor": functools.partial(serve_floor, upstream)}  # fmt: skip
    server = await asyncio.start_server(ends[name], "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ======================================================================================
# The load
# ======================================================================================


class Way(NamedTuple):
    """A process that one asks."""

    process: subprocess.Popen[Any]
    port: int


def family(pid: int) -> list[int]:
    """Return a process and its children, such as the one that writes a busy router's log."""
    lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")  # of each thread; none elsewhere
    return [pid, *(int(child) for of_thread in lists for child in of_thread.read_text().split())]


def cpu_seconds(way: Way) -> float:
    """Return the processor time of a process and its children so far, as its clocks tell it."""
    clocks = ((~pid << 3) | 2 for pid in family(way.process.pid))  # as clock_getcpuclockid does
    return sum(map(time.clock_gettime, clocks))


def encode_post(path: str, content: bytes, more: str = "") -> bytes:
    """Return a POST of JSON."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def encode_chat(events: int = 0, size: int = 80, model: str = "bench", more: str = "") -> bytes:
    """Return a chat with a message of `size` characters, for a whole answer or events."""
    text = ("Say hello, please. " * (size // 19 + 1))[:size]
    doc = {"model": model, "stream": bool(events), "temperature": 0.7,
           "messages": [{"role": "user", "content": text}]}  # fmt: skip
    path = "/v1/chat/completions" + (f"?events={events}{more}" if events else "")
    return encode_post(path, json.dumps(doc).encode(), "Authorization: Bearer sk-bench\r\n")


def encode_fields(model: str = "bench", **fields: str) -> bytes:
    """Return a chat with some more fields."""
    lines = "".join(f"X-{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return encode_chat(model=model).replace(b"Authorization:", lines.encode() + b"Authorization:")


@functools.lru_cache
def encode_agent(size: int = 200 << 10) -> bytes:
    """Return what an agent sends: a line that always changes, tools and a long history."""
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string", "description":
              "What it is for, as its author has said it." * 2} for n in range(12)}}  # fmt: skip
    tools = [{"name": f"tool_{n}", "description": "What it does. " * 30, "input_schema": schema}
             for n in range(40)]  # fmt: skip
    billing = "x-anthropic-billing-header: cc_version=2.1.197; cc_entrypoint=cli; cch=0badc;"
    system = [{"type": "text", "text": text} for text in (billing, "You help. " * 500)]
    messages = [{"role": "user", "content": "Please mend the test."}]
    doc = {"model": "agent", "max_tokens": 1024, "system": system, "tools": tools,
           "messages": messages}  # fmt: skip
    left = size - len(json.dumps(doc))
    for number in range(left // 4000):
        use = {"type": "tool_use", "id": f"t{number}", "name": "tool_1", "input": {"p1": "a.py"}}
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "def f():\n" * 350}
        messages += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return encode_post(
        "/v1/messages", json.dumps(doc).encode(), "anthropic-version: 2023-06-01\r\n"
    )


class Client(asyncio.Protocol):
    """A connection that asks one request at a time."""

    def __init__(self, delays: list[int] | None) -> None:
        self.delays, self.tail = delays, b""  # in ns, of the events that say their time

    def data_received(self, data: bytes) -> None:
        """Look for the end of the answer, and at the times in it."""
        if not self.tail and not data.startswith(FINE[:12]):
            raise ConnectionError(data[:300])
        if self.delays is not None:
            now = time.monotonic_ns()
            self.delays.extend(now - int(stamp) for stamp in STAMP.findall(data))
        self.tail = (self.tail + data[-32:])[-32:]
        if self.tail.endswith((END, ANSWER[-32:])):
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail a request that runs."""
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the answer was cut"))

    async def ask(self, data: bytes) -> float:
        """Send a request; return the seconds until its answer's end."""
        begun, self.tail = time.perf_counter(), b""
        self.ended = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        await self.ended
        return time.perf_counter() - begun


@contextlib.asynccontextmanager
async def connect(port: int, count: int, delays: list[int] | None = None) -> Any:
    """Open some connections, close them in the end."""
    loop, clients = asyncio.get_running_loop(), [Client(delays) for _ in range(count)]
    for client in clients:
        client.transport, _ = await loop.create_connection(lambda: client, "127.0.0.1", port)
    yield clients
    for client in clients:
        client.transport.close()


async def load(
    way: Way, requests: Iterable[bytes], width: int, seconds: float
) -> tuple[float, float]:
    """Ask on `width` connections for a while: answers a second, CPU of one in us."""
    source = itertools.cycle(requests)

    async def repeat(client: Client) -> int:
        for count in itertools.count(1):
            await client.ask(next(source))
            if time.monotonic() - begun >= seconds:
                return count

    async with connect(way.port, width) as clients:
        await asyncio.gather(*(client.ask(next(source)) for client in clients))  # warm up
        await asyncio.sleep(min(SETTLE, seconds))
        spent, begun = cpu_seconds(way), time.monotonic()
        count = sum(await asyncio.gather(*map(repeat, clients)))
        took = time.monotonic() - begun
        await asyncio.sleep(min(SETTLE, seconds))
        return count / took, (cpu_seconds(way) - spent) * 1e6 / count


async def load_paced(way: Way, streams: int, seconds: float) -> tuple[list[int], float]:
    """Read many paced streams for a while: delays in ns, CPU of one event in us."""
    delays: list[int] = []
    seconds = max(seconds, 4 * PACE)
    data = encode_chat(events=int(2 * seconds / PACE), more="&paced")
    async with connect(way.port, streams, delays) as clients:
        asked = asyncio.gather(*(client.ask(data) for client in clients))
        while not asked.done() and not all(client.tail for client in clients):
            await asyncio.sleep(0.01)
        first, spent = len(delays), cpu_seconds(way)
        await asyncio.sleep(seconds)
        spent, seen = cpu_seconds(way) - spent, delays[first:]
        await asked
    return seen, spent * 1e6 / len(seen)


# ======================================================================================
# The processes
# ======================================================================================


def memory(pid: int, key: str) -> float:
    """Return resident memory in MB, with that of children: VmRSS now, VmHWM at its peak."""
    states = [pathlib.Path(f"/proc/{one}/status").read_text() for one in family(pid)]
    return sum(int(kB) for state in states for kB in re.findall(rf"{key}:\s+(\d+)", state)) / 1024


def start(*arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start a Python process, which ends with this one at the latest."""
    process = subprocess.Popen([sys.executable, *arguments], **options)
    atexit.register(process.wait, 20)
    atexit.register(process.terminate)  # the last one registered is the first to run
    return process


def start_end(name: str, upstream: int = 0) -> Way:
    """Start an upstream or a floor."""
    options = ("--run", name, "--upstream", str(upstream))
    process = start(__file__, *options, stdout=subprocess.PIPE)
    with process.stdout as said:
        return Way(process, int(said.readline()))


async def see_start(way: Way, begun: float) -> dict[str, float]:
    """Ask a relay for its first answer; return what its start took."""
    async with connect(way.port, 1) as (client,):
        await client.ask(encode_chat(events=1))
    took, rest = time.monotonic() - begun, memory(way.process.pid, "VmRSS")
    return {"start to first answer, s": took, "memory at rest, MB": rest}


def get(port: int, path: str) -> Any:
    """Ask a router itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        return json.load(answer)


async def start_router(
    folder: pathlib.Path, upstream: int, settings: dict[str, str] | None = None,
    routes: dict[str, Any] = ROUTES,
) -> tuple[subprocess.Popen[Any], int, dict[str, float]]:  # fmt: skip
    """Start SmolRouter with everything on; return it, its port and what that took."""
    own = pathlib.Path(tempfile.mkdtemp(dir=folder))
    url = f"http://127.0.0.1:{upstream}"
    servers = {"UPSTREAM": {"url": url}}
    for name, server in routes.get("servers", {}).items():
        # One that stands elsewhere has a whole URL.
        servers[name] = {**server, "url": urllib.parse.urljoin(url, server["url"])}
    (own / "routes.json").write_text(json.dumps({**routes, "servers": servers}))
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    named = {"DEFAULT_UPSTREAM": url, "LISTEN_PORT": "0", "ROUTES_CONFIG": "routes.json",
             "MODEL_MAP": '{"gpt-3.5-turbo": "bench", "/gpt-4-(.*)/": "bench-\\\\1"}'}  # fmt: skip
    begun = time.monotonic()
    with open(own / "said", "wb") as said:
        process = start(str(HERE / "smolrouter.py"), cwd=own, stderr=said,
                        env=kept | named | (settings or {}))  # fmt: skip
    while not (line := re.search(r"listens on \S+:(\d+)", (own / "said").read_text())):
        if process.poll() is not None:
            sys.exit("smolrouter.py did not start: " + (own / "said").read_text()[-2000:])
        await asyncio.sleep(0.002)
    way = Way(process, int(line[1]))
    return *way, await see_start(way, begun)


# ======================================================================================
# The table
# ======================================================================================


def percentiles(name: str, values: Iterable[float], unit: float) -> dict[str, float]:
    """Return the median and what 99 of 100 stay below, in us."""
    ordered = sorted(values)
    return {f"{name} p{share}, us": ordered[share * (len(ordered) - 1) // 100] * unit
            for share in (50, 99)}  # fmt: skip


async def measure_latency(way: Way, direct: Way, seconds: float) -> dict[str, float]:
    """Ask directly and this way by turns, so that both see the same machine."""
    pairs, data, end = [], encode_chat(), time.monotonic() + seconds
    async with connect(direct.port, 1) as (one,), connect(way.port, 1) as (other,):
        while not pairs or time.monotonic() < end:
            pairs.append((await one.ask(data), await other.ask(data)))
    figures = percentiles("latency", [this for _, this in pairs], 1e6)
    if way is not direct:
        figures |= percentiles("added latency", [this - that for that, this in pairs], 1e6)
    return figures


async def measure(way: Way, direct: Way, asked: argparse.Namespace) -> dict[str, float]:
    """Measure one way to the upstream."""
    figures = await measure_latency(way, direct, asked.seconds)
    rate, spent = await load(way, [encode_chat()], CONNECTIONS, asked.seconds)
    figures |= {f"requests/s, {CONNECTIONS} connections": rate, "CPU per request, us": spent}
    burst = BURST // 10 if asked.small else BURST
    rate, spent = await load(way, [encode_chat(burst)], STREAMS, asked.seconds)
    figures[f"events/s, {STREAMS} streams at full speed"] = rate * burst
    figures["CPU per event at full speed, us"] = spent / burst
    rate, spent = await load(way, [encode_chat(burst, more="&tags")], STREAMS, asked.seconds)
    figures[f"events/s with tags, {STREAMS} streams"] = rate * burst
    figures["CPU per event with tags, us"] = spent / burst
    rate, spent = await load(way, [encode_agent()], AGENTS, asked.seconds)
    figures |= {f"requests/s, {AGENTS} agents, 200 KB": rate, "CPU of such a request, us": spent}
    delays, spent = await load_paced(way, asked.streams, asked.seconds)
    figures |= percentiles(f"event delay, {asked.streams} paced streams,", delays, 1e-3)
    return figures | {"CPU per paced event, us": spent}


def medians(seen: Iterable[tuple[str, Any, float]]) -> Figures:
    """Return the median of all values of each column and row."""
    figures: dict[str, dict[str, list[float]]] = {}
    for column, row, value in seen:
        figures.setdefault(column, {}).setdefault(str(row), []).append(value)
    return {column: {row: statistics.median(values) for row, values in rows.items()}
            for column, rows in figures.items()}  # fmt: skip


def many_models(count: int) -> dict[str, Any]:
    """Return a table of ten servers with `count` models in all, and of one with slots."""
    names = [[f"model-{server}-{n}" for n in range(count // 10)] for server in range(10)]
    servers = {f"list-{n}": {"url": f"/{n}", "models": names[n]} for n in range(10)}
    servers["tight"] = {"url": "/tight", "slots": SLOTS, "discover": False}  # takes any name
    sticky = {"strategy": "sticky", "instances": ["list-0/bench", "list-1/bench"]}
    rule = {"match": {"model": "/^tight/"}, "route": {"upstream": "tight"}}
    return {"servers": servers, "aliases": {"sticky": sticky}, "routes": [rule]}


def listed_chats(count: int) -> list[bytes]:
    """Return chats with models of `many_models(count)`, more than the router remembers."""
    return [encode_chat(model=f"model-{n % 10}-{n // 10}") for n in range(0, count, count // 500)]


async def measure_abilities(
    folder: pathlib.Path, upstream: int, asked: argparse.Namespace
) -> dict[str, float]:
    """Measure routers that do more than to relay."""
    collector = f"http://127.0.0.1:{start_end('upstream').port}"
    able = Way(*(await start_router(folder, upstream, {}, many_models(5000)))[:2])
    spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    spanned = Way(*(await start_router(folder, upstream, spans))[:2])
    cases = {
        "found by list": (able, listed_chats(5000), CONNECTIONS),
        f"{QUEUE} in a queue": (able, [encode_chat(model="tight")], SLOTS + QUEUE),
        "with spans": (spanned, [encode_chat()], CONNECTIONS),
    }
    seen = []
    for _ in range(asked.rounds):
        for name, case in cases.items():
            rate, spent = await load(*case, asked.seconds)
            seen += [("", f"requests/s, {name}", rate), ("", f"CPU per request, {name}, us", spent)]
    return medians(seen)[""]


async def compare(folder: pathlib.Path, log: str, asked: argparse.Namespace) -> Figures:
    """Measure the ways in turn; return medians by way and figure."""
    direct, begun = start_end("upstream"), time.monotonic()
    floor = start_end("floor", direct.port)
    ways, once = {"direct": direct, "floor": floor}, {"floor": await see_start(floor, begun)}
    for name, settings in {"log off": {"ENABLE_LOGGING": "false"}, "smolrouter": {}}.items():
        *way, once[name] = await start_router(folder, direct.port, settings)
        ways[name] = Way(*way)
    figures = medians([
        (name, figure, value) for _ in range(asked.rounds) for name, way in ways.items()
        for figure, value in (await measure(way, direct, asked)).items()
    ])  # fmt: skip
    for name, column in once.items():
        peak = {"memory at its peak, MB": memory(ways[name].process.pid, "VmHWM")}
        figures[name] |= column | peak
    figures["smolrouter"] |= await measure_abilities(folder, direct.port, asked)
    figures["smolrouter"] |= await ask_log(folder, direct.port, log)
    return figures


def show(figures: Figures) -> None:
    """Print a table; the last column is SmolRouter against the floor."""
    print(f"{'figure':44}" + "".join(f"{way:>12}" for way in figures) + f"{'ratio':>8}")
    for name, value in figures["smolrouter"].items():
        cells = [column.get(name) for column in figures.values()]
        texts = [f"{cell:12.2f}" if cell is not None else f"{'':12}" for cell in cells]
        print(f"{name:44}" + "".join(texts) + (f"{value / cells[1]:8.2f}" if cells[1] else ""))


# ======================================================================================
# The soak
# ======================================================================================


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    """Read one answer: status, request id and content."""
    head = await reader.readuntil(b"\r\n\r\n")
    number = re.search(rb"\r\nx-smolrouter-request-id: *(\S+)", head, re.IGNORECASE)
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    content = b""
    if length:
        content = await reader.readexactly(int(length[1]))
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            content += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    return int(head.split()[1]), number[1].decode() if number else "", content


def chat_content(text: str, stream: bool, model: str = "good") -> bytes:
    """Return the content of a chat request that needs no change on its way."""
    doc: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if stream:
        doc |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(doc).encode()


def agent_content(text: str) -> bytes:
    """Return the content of an agent's request that ends with a text."""
    doc = json.loads(encode_agent(20 << 10).partition(b"\r\n\r\n")[2])
    doc["messages"].append({"role": "user", "content": text})
    return json.dumps(doc).encode()


def read_text(said: bytes) -> str:
    """Return the text of a chat's answer, whole or as events."""
    lines = re.findall(rb"^data: (\{.*)", said, re.M) or [said]
    choices = [json.loads(line)["choices"][0] for line in lines]
    return "".join((choice.get("delta") or choice["message"])["content"] for choice in choices)


def is_exact(model: str, content: bytes, stream: bool, said: bytes) -> bool:
    """Tell whether an answer is what the model had to say."""
    if model == "agent":
        # An agent's request is mended on its way, and answered by its last words.
        mended = {**json.loads(content), "thinking": {"type": "disabled"}, "system": ""}
        return said == encode_message(mended)
    if model == "tagged":
        with contextlib.suppress(ValueError, LookupError):
            return read_text(said) == "".join(tagged_words(content, visible=True))
        return False
    sent = content.replace(b'"pair"', b'"good"', 1)
    return said.replace(PING, b"") == encode_said(said_to(sent), stream)


class Soak:
    """Good and bad clients of one router, and what they have seen."""

    def __init__(self, port: int, end: float, machine: SleepingMachine) -> None:
        self.port, self.end = port, end
        self.machine = machine
        self.good: set[str] = set()  # ids of the good requests
        self.faults: list[str] = []
        self.counts: dict[str, int] = {}

    async def repeat(self, act: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
        """Do something again and again until the end; what a bad client meets is its own."""
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                await asyncio.wait_for(act(chance), 60)
            except (OSError, asyncio.IncompleteReadError) as error:
                if act in (self.ask_well, self.wake):
                    self.faults.append(f"a good client met {error!r}")
            except asyncio.TimeoutError:
                self.faults.append(f"{act.__name__} took longer than 60 s")
            self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1

    async def ask_well(self, chance: random.Random) -> None:
        """Send some good requests on one connection and check every byte."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for _ in range(chance.randrange(1, 20)):
            stream = chance.random() < 0.5
            size = 3_000_000 if chance.random() < 0.005 else chance.randrange(2000)
            text, model = chance.choice(WORDS) * size, chance.choice(GOOD)
            path, content = "/v1/chat/completions", chat_content(text, stream, model)
            if model == "agent":
                path, content = "/v1/messages", agent_content(text)
            writer.write(encode_post(path, content))
            status, number, said = await read_answer(reader)
            if status != 200 or not is_exact(model, content, stream, said):
                self.faults.append(f"{model}: {status} {said[:200]!r} is not its answer")
            self.good.add(number)
            self.counts[f"answers of {model}"] = self.counts.get(f"answers of {model}", 0) + 1
            await asyncio.sleep(0.01)
        writer.close()

    async def ask_badly(self, chance: random.Random) -> None:
        """Ask for a server's bad answer, in either dialect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = chat_content("x", chance.random() < 0.5, chance.choice([*BAD_ANSWERS]))
        path = chance.choice(("/v1/chat/completions", "/api/chat"))
        writer.write(encode_post(path, content, "Connection: close\r\n"))
        while await reader.read(65536) and chance.random() < 0.9:
            await asyncio.sleep(0.01)
            if chance.random() < 0.3:
                break
        writer.transport.abort()

    async def speak_badly(self, chance: random.Random) -> None:
        """Send a request with some octets changed, cut or doubled, whole or drop by drop."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = bytearray(encode_post("/v1/chat/completions", chat_content("x", True)))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            odd = (b"\r\n", b"\n", b"\0", b" ", b"\r\n\r\n", b"Content-Length: 1\r\n", b"[" * 300)
            data[at : at + chance.randrange(3)] = chance.choice(odd)
        for at in range(0, len(data), size := chance.choice((7, 50, 10_000))):
            writer.write(data[at : at + size])
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(65536), 0.2)
        writer.transport.abort()

    async def leave_early(self, chance: random.Random) -> None:
        """Go away: before the head's end, in the content, while waiting or in the stream."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = encode_post("/v1/chat/completions", chat_content("x" * 5000, True))
        cut = chance.choice((0, 30, len(data) - 99, len(data)))
        writer.write(data[:cut])
        await asyncio.sleep(chance.choice((0, 0.01, 0.05)))
        if cut == len(data):
            await reader.read(chance.choice((1, 500)))
        writer.transport.abort()

    async def weigh_heavily(self, chance: random.Random) -> None:
        """Send what is too deep, has too many parts, or is announced as too long."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = chance.choice(
            (
                b'{"model":"x","x":%b' % (b"[" * 100_000),
                b'{"model":"x","x":[%b0]}' % (b"{}," * 300_000),
                b'{"model":"x","x":"%b"}' % (b"a" * 5_000_000),
            )
        )
        data = encode_post("/v1/embeddings", content)
        if chance.random() < 0.3:
            data = data.replace(b"Length: ", b"Length: 999", 1)
        writer.write(data)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(65536), 5)
        writer.transport.abort()
        await asyncio.sleep(0.5)

    async def drain(self, chance: random.Random) -> None:
        """Close a server or open it again; another one of its alias serves meanwhile."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        state = json.dumps({"state": chance.choice(("on", "drain"))}).encode()
        data = encode_post("/api/upstreams/spare", state)
        writer.write(data.replace(b"Host: bench", b"Host: localhost"))
        status, _, said = await read_answer(reader)
        if status != 200:
            self.faults.append(f"{status} {said[:200]!r} when a server was to change its state")
        writer.close()
        await asyncio.sleep(0.3)

    async def wake(self, chance: random.Random) -> None:
        """Ask for a model whose machine sleeps, and let it go to sleep again."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        stream = chance.random() < 0.5
        content = chat_content(chance.choice(WORDS) * chance.randrange(2000), stream, "sleepy")
        writer.write(encode_post("/v1/chat/completions", content))
        status, number, said = await read_answer(reader)
        if status != 200 or not is_exact("sleepy", content, stream, said):
            self.faults.append(f"sleepy: {status} {said[:200]!r} is not its answer")
        self.good.add(number)
        writer.close()
        self.machine.sleep()
        await asyncio.sleep(1)

    async def idle(self, chance: random.Random) -> None:
        """Hold a connection and say little."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for octet in b"GET /v1/mod":
            writer.write(bytes([octet]))
            await asyncio.sleep(min(0.3, max(0.0, self.end - time.monotonic())))
        writer.transport.abort()

    async def get_json(self, path: str) -> Any:
        """Ask the router itself."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        status, _, content = await read_answer(reader)
        writer.close()
        return json.loads(content) if status == 200 else []

    async def check_rows(self) -> None:
        """See that nothing runs any more and that every good request has its row."""
        for _ in range(100):
            if not await self.get_json("/api/inflight"):
                break
            await asyncio.sleep(0.1)
        else:
            self.faults.append("requests run on after their clients have gone")
        begun, missing = time.monotonic(), set(self.good)
        while missing and time.monotonic() - begun < 60:
            await asyncio.sleep(0.5)
            before = ""
            while rows := await self.get_json(f"/api/logs?limit=1000{before}"):
                good = [row for row in rows if row["request_id"] in missing]
                missing -= {row["request_id"] for row in good}
                before = f"&before={rows[-1]['id']}"
                if bad := [row["status_code"] for row in good if row["status_code"] != 200]:
                    self.faults.append(f"good answers in the log as {bad}")
        print(f"all rows were there after {time.monotonic() - begun:.1f} s")
        if missing:
            self.faults.append(f"{len(missing)} good requests without a row")


def footprint(pid: int) -> tuple[float, int, int]:
    """Return memory in MB, descriptors and threads of a process."""
    threads = pathlib.Path(f"/proc/{pid}/task")
    return memory(pid, "VmRSS"), len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(threads))


async def watch(pid: int, seconds: float) -> list[tuple[float, int, int]]:
    """Look at the process, print what it takes; return it."""
    seen, begun = [], time.monotonic()
    while (passed := time.monotonic() - begun) < seconds:
        seen.append(footprint(pid))
        words = "{:6.0f} s {:8.1f} MB {:5} descriptors {:4} threads"
        print(words.format(passed, *seen[-1]), flush=True)
        await asyncio.sleep(min(10.0, seconds / 12))
    return seen


async def soak(minutes: float) -> int:
    """Mix good and bad traffic; return 0 when the router stood it."""
    upstream, upstream_port = start_end("soak")
    machine = SleepingMachine()
    servers = {**SOAK_ROUTES["servers"], "sleepy": await machine.start()}
    with tempfile.TemporaryDirectory() as folder:
        pings = {"PING_INTERVAL": "0.1"}
        router, port, _ = await start_router(
            pathlib.Path(folder), upstream_port, pings, {**SOAK_ROUTES, "servers": servers}
        )
        try:
            seconds = minutes * 60
            run = Soak(port, time.monotonic() + seconds, machine)
            crew = [
                (run.ask_well, 6),
                (run.ask_badly, 2),
                (run.speak_badly, 3),
                (run.leave_early, 3),
                (run.weigh_heavily, 1),
                (run.idle, 20),
                (run.drain, 1),
                (run.wake, 1),
            ]
            acts = [act for act, number in crew for _ in range(number)]
            seen, *_ = await asyncio.gather(
                watch(router.pid, seconds), *(run.repeat(act, n) for n, act in enumerate(acts))
            )
            await run.check_rows()
            last = footprint(router.pid)
            early = seen[len(seen) // 4 : len(seen) // 2] or seen
            if last[0] > max(s[0] for s in early) * 1.15 + 8:
                run.faults.append(f"memory grew to {last[0]:.1f} MB")
            if last[1] > min(s[1] for s in seen) + 16 or last[2] > max(s[2] for s in early) + 4:
                run.faults.append(f"{last[1]} descriptors and {last[2]} threads are left")
            if router.poll() is not None:
                run.faults.append(f"the router ended with {router.returncode}")
        finally:
            for process in (router, upstream):
                process.terminate()
                process.wait(20)
            upstream.stdout.close()
            machine.end()
    print(f"{len(run.good)} good answers, exact; times: {run.counts}")
    print("at the end {:.1f} MB, {} descriptors, {} threads".format(*last))
    print(*(f"FAULT: {fault}" for fault in run.faults[:20]), sep="\n")
    return 1 if run.faults or not run.good else 0


# ======================================================================================
# The log
# ======================================================================================

MODELS = ("llama3-8b", "qwen2.5-coder", "mistral-nemo", "phi-4", "gemma3-27b", "tiny")
FIRST_PAGE = ("/", "/api/logs", "/api/stats")
QUESTIONS = ("/api/logs", "/api/logs?model=phi-4&status=error", "/api/logs?q=phi-4",
             "/api/logs?model=*phi*",
             "/api/logs?client=client-7", "/api/logs?session=00000000002a", "/api/logs?q=nobody",
             "/api/clients", "/api/clients?hours=168", "/api/stats", "/api/stats?hours=168",
             "/api/performance",
             "/api/performance?hours=168", "/api/performance?hours=168&model=phi-4",
             "/api/upstreams")  # fmt: skip


def made_row(number: int, moment: float, chance: random.Random) -> dict[str, Any]:
    """Return a row as a week of mixed traffic would leave it."""
    model, stream = chance.choices(MODELS, (40, 25, 15, 10, 9, 1))[0], chance.random() < 0.6
    failed, ollama = chance.random() < 0.03, chance.random() < 0.3
    status = chance.choice((404, 429, 500, 502)) if failed else 200
    taken = round(chance.lognormvariate(8, 1), 1)
    url, attempt = f"http://192.168.1.{100 + MODELS.index(model) % 3}:8000", [f"box/{model}"]
    return {
        "id": number, "request_id": f"{number:020x}", "router": 0, "queued_ms": 0.0,
        "client": f"client-{number % 40}", "session": f"{number // 8:012x}",
        "asked": "Why is the sky blue, and what does it look like from the Moon? " * 2,
        "answered": "The first sentence of a real answer. " * 3,
        "timestamp": int(moment * 1000), "completed_at": int(moment * 1000 + taken),
        "source_ip": f"10.0.0.{chance.randrange(1, 30)}", "method": "POST",
        "path": "/api/chat" if ollama else "/v1/chat/completions",
        "service_type": "ollama" if ollama else "openai", "stream": int(stream),
        "upstream_url": url, "route": "default", "request_size": chance.randrange(200, 9000),
        "response_size": chance.randrange(200, 90_000), "status_code": status,
        "failed": int(failed), "error_message": "made up" if failed else None,
        "attempts": json.dumps([[*attempt, url, status, None, taken]]), "tokens_estimated": 0,
        "prompt_tokens": None if failed else chance.randrange(10, 4000),
        "completion_tokens": None if failed else int(taken / 20) + 1, "duration_ms": taken,
        "ttft_ms": round(taken / 9, 1) if stream and not failed else None,
        "user_agent": "OpenAI/Python 1.50.0", "client_key": "0badcafe",
        "level": (number & -number).bit_length() - 1,
        **dict.fromkeys(("original_model", "mapped_model", "sent_model"), model),
    }  # fmt: skip


def make_rows(count: int, file: str) -> None:
    """Write a log of `count` rows, evenly over the last week, to a new database."""
    import smolrouter  # not where it would weigh on the floor

    store = smolrouter.Store(smolrouter.Settings.from_mapping({"DB_PATH": file}))
    chance, now, week = random.Random(1), time.time(), 7 * 86_400
    detail = smolrouter.Detail("{}", b'{"model":"made-up"}', ANSWER)
    head = smolrouter.parse_request_head(b"POST / HTTP/1.1\r\nHost: a")
    request = smolrouter.Request(head, None, None, "::1")
    decision = smolrouter.Decision("m", "m", "default", "failover", (), ())
    template = smolrouter.RequestRecord.of("", request, False, decision)
    template.packed_detail, template.bodies = smolrouter.pack_detail(detail, 16_384)
    template.body_bytes = len(template.packed_detail)
    for start_at in range(0, count, 10_000):
        records = []
        for number in range(start_at, min(start_at + 10_000, count)):
            moment = now - 60 - (count - number) * (week - 3600) / count
            values = made_row(number + 1, moment, chance)
            record = copy.copy(template)
            record.row = smolrouter.Row(*map(values.get, smolrouter.Row._fields))
            record.id = record.row.id
            records.append(record)
        tallies = smolrouter.sum_rows(record.row for record in records)
        store.write([], records, tallies)
    store.close()


async def ask_log(folder: pathlib.Path, upstream: int, log: str) -> dict[str, float]:
    """Ask a router with this log what the page asks; return the median times in ms."""
    _, port, started = await start_router(folder, upstream, {"DB_PATH": log})
    begun = time.perf_counter()
    for path in FIRST_PAGE:
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").read()
    figures = {
        "first page with the log, ms": (time.perf_counter() - begun) * 1000,
        "start to first answer with the log, s": started["start to first answer, s"],
        "rows in the log": get(port, "/api/stats")["total_requests"],
    }
    for path in QUESTIONS:
        times = []
        for _ in range(21):
            begun = time.perf_counter()
            get(port, path)
            times.append((time.perf_counter() - begun) * 1000)
        figures[f"{path}, ms"] = statistics.median(times)
    return figures


# ======================================================================================
# The curves
# ======================================================================================


def many_rules(count: int) -> dict[str, Any]:
    """Return a routing table whose last rule claims every request."""
    kinds = ({"model": "/^other-%d-/"}, {"model": "gpt-%d"}, {"source_host": "10.1.%d.0/24"})
    matches = [json.loads(json.dumps(kinds[n % 3]) % (n % 256)) for n in range(count - 1)]
    return {"routes": [{"match": match, "route": {"upstream": "UPSTREAM"}}
                       for match in [*matches, {"model": "/^bench/"}]]}  # fmt: skip


async def measure_curves(folder: pathlib.Path, log: str, asked: argparse.Namespace) -> Figures:
    """Return the CPU in us that a router spends on a request, by curve and size.

    Where the size is `new`, each request has another name.
    """
    upstream = start_end("upstream").port

    async def router(routes: dict[str, Any] = ROUTES, **settings: str) -> Way:
        process, port, _ = await start_router(folder, upstream, settings, routes)
        return Way(process, port)

    def sizes(small: int, middle: int, large: int) -> tuple[int, int, int]:
        return small, middle, 2 * middle if asked.small else large

    plain, full = await router(), await router(DB_PATH=log)
    rules = [(count, await router(many_rules(count))) for count in sizes(10, 100, 1000)]
    lists = [(count, await router(many_models(count))) for count in sizes(500, 5000, 50_000)]
    able = lists[0][1]
    total = get(full.port, "/api/stats")["total_requests"]
    chat = [encode_chat()]
    news = [encode_chat(model=f"bench-{n}") for n in range(5000)]  # more than it remembers
    numbers = itertools.count()
    sessions = {
        **{n: [encode_fields("sticky", Session_Id=f"s{m}") for m in range(n)] for n in (1, 100)},
        "new": (encode_fields("sticky", Session_Id=f"s{n}") for n in numbers),
    }
    clients = {
        **{n: [encode_fields(Client_Name=f"c{m}") for m in range(n)] for n in (1, 100)},
        "new": (encode_fields(Client_Name=f"c{n}") for n in numbers),
    }
    tight = {1: [encode_chat(model="tight")],
             "new": (encode_chat(model=f"tight-{n}") for n in numbers)}  # fmt: skip
    points = [
        *(("rules, known models", count, way, chat, 8) for count, way in rules),
        *(("rules, new models", count, way, news, 8) for count, way in rules),
        *(("connections", count, plain, chat, count) for count in sizes(1, 30, 1000)),
        ("rows in the log", 0, plain, chat, 8),
        ("rows in the log", total, full, chat, 8),
        *(
            ("KB of a request", n, plain, [encode_chat(size=n << 10)], 8)
            for n in sizes(1, 32, 1024)
        ),
        *((EACH, n, plain, [encode_chat(n)], 8) for n in sizes(10, 300, 10_000)),
        *(
            (EACH_TAGGED, n, plain, [encode_chat(n, more="&tags")], 8)
            for n in sizes(10, 300, 10_000)
        ),
        *(("models of ten servers, by list", n, way, listed_chats(n), 8) for n, way in lists),
        *(("sessions that stay", size, able, asks, 8) for size, asks in sessions.items()),
        *(("clients", size, full, asks, 8) for size, asks in clients.items()),
        *(("models of a server with slots", n, able, asks, SLOTS) for n, asks in tight.items()),
        *(("requests that wait", n, able, tight[1], SLOTS + n) for n in sizes(1, 30, 500)),
    ]
    seen = []
    for _ in range(asked.rounds):
        for name, size, *given in points:
            _, spent = await load(*given, asked.seconds / 2)
            seen.append((name, size, spent / size if name in (EACH, EACH_TAGGED) else spent))
    return medians(seen)


def show_curves(figures: Figures) -> None:
    """Print each size with the cost there, and that against the first one's."""
    print("CPU of the router per request, us, and its ratio to the first")
    for name, curve in figures.items():
        first = next(iter(curve.values()))
        texts = [f"{n:>9}{cost:10.1f}{cost / first:8.2f}" for n, cost in curve.items()]
        print(f"{name:32}" + "".join(texts))


# ======================================================================================
# The command line
# ======================================================================================


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds (default 3)")
    add("--seconds", type=float, default=1.5, help="of one measurement (default 1.5)")
    add("--streams", type=int, default=500, help="paced ones (default 500)")
    add("--rows", type=int, default=100_000, help="in the log that is asked (default 100000)")
    add("--log", metavar="FILE", help="take this database for it, which gets a few rows more")
    add("--make-rows", nargs=2, metavar=("N", "FILE"),
        help="write a log of N made-up rows to a new database, then end")  # fmt: skip
    add("--small", action="store_true", help="shorter streams, curves without their largest sizes")
    add("--curves", action="store_true", help="tell how the cost of a request grows")
    add("--json", action="store_true", help="print JSON for machines")
    add("--soak", type=float, metavar="MINUTES", help="good and bad traffic")
    add("--run", choices=("upstream", "floor", "soak"), help=argparse.SUPPRESS)
    add("--upstream", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # not that a peer has gone
    asked = read_arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a thousand connections
    if asked.run:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_end(asked.run, asked.upstream))
        return 0
    if asked.soak:
        return asyncio.run(soak(asked.soak))
    if asked.make_rows:
        make_rows(int(asked.make_rows[0]), asked.make_rows[1])
        return 0
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    log = str(pathlib.Path(asked.log or folder / "made.db").resolve())
    if not asked.log:
        make_rows(asked.rows, log)
    run, tell = (measure_curves, show_curves) if asked.curves else (compare, show)
    figures = asyncio.run(run(folder, log, asked))
    print(json.dumps(figures)) if asked.json else tell(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
