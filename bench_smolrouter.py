#!/usr/bin/env python3
"""Measure smolrouter.py beside a bare asyncio relay, on this machine, in one run.

    python bench_smolrouter.py [--rounds 3] [--json]
    python bench_smolrouter.py --make-rows 1000000 FILE; python bench_smolrouter.py --log FILE
    python bench_smolrouter.py --soak MINUTES

Three ways to the same upstream are asked in turn, round by round: directly, through the
floor (a relay on asyncio streams that looks at nothing, part of this file) and through
SmolRouter with routing rules, a model map and think stripping on. The load comes from
this process, upstream and relays are processes of their own, all on 127.0.0.1. Standard
library only; about a minute. Quote the ratios: absolute figures are the machine's.

The soak sends good traffic and every kind of bad one at the same time, and fails unless
every good answer is exact to the byte, every good request has its row in the log, and
memory and descriptors end where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import smolrouter

HERE = pathlib.Path(__file__).resolve().parent
PACE = 0.05  # seconds between two events of a paced stream
STREAMS, PACED_EVENTS, BURST_EVENTS = 200, 60, 256
SECONDS = 2.0  # of one measurement
END = b"0\r\n\r\n"
STAMP = re.compile(rb"@@([0-9]{18})")
ANSWER = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "bench",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "The first sentence of a real answer. " * 3}}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 24, "total_tokens": 36},
}).encode()  # fmt: skip
ROUTES = {
    "aliases": {"coding-assistant": {"instances": ["UPSTREAM/bench"]}},
    "routes": [
        {"match": {"model": "/.*-1.5b/"}, "route": {"model": "other"}},
        {"match": {"source_host": "10.0.1.100"}, "route": {"model": "other"}},
        {"match": {"model": "gpt-4"}, "route": {"model": "other"}},
    ],
}

WORDS = ("The", "quick", "naïve", "狐", "jumps", "<b>", "\\", '"', "\n", "over", "🦊", "</p>")
FINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED = FINE + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_ANSWERS = {
    "closes": b"", "noise": bytes(range(256)), "half-head": FINE + b"Content-",
    "two-lengths": FINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "cut": FINE + b"Content-Length: 99\r\n\r\n{}", "hints": b"HTTP/1.1 103 A\r\n\r\n" * 99,
    "cut-stream": CHUNKED + b"9\r\ndata: {}\n\r\n", "bad-chunk": CHUNKED + b"zz\r\n",
    "endless-head": FINE + b"A: b\r\n" * 20_000,
    "junk": FINE + b"Content-Length: 2\r\n\r\n{}" + FINE + b"\r\n",
    "bomb": FINE + b"Content-Type: application/json\r\nContent-Encoding: deflate\r\n\r\n"
            + zlib.compress(bytes(64 << 20), 1),
    "busy": b"HTTP/1.1 429 Busy\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\n{}",
}

# ======================================================================================
# The two ends and the floor, each run as a process: `bench_smolrouter.py --run NAME`
# ======================================================================================


def event(number: int) -> bytes:
    """Return one event as a chunk; it carries its send time in ns."""
    delta = {"content": f" @@{time.monotonic_ns():018d}"}
    doc = {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }  # fmt: skip
    data = b"data: " + json.dumps(doc, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return a request's head and content."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    return head, await reader.readexactly(int(length[1]) if length else 0)


async def serve_upstream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer a chat: whole, a burst of events, or paced ones."""
    try:
        while True:
            _, content = await read_request(reader)
            asked = json.loads(content or b"{}")
            if not asked.get("stream"):
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                length = b"Content-Length: %d\r\n\r\n" % len(ANSWER)
                writer.write(head + length + ANSWER)
                continue
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            count = asked["max_tokens"]
            if asked.get("user") == "paced":
                for number in range(count):
                    await asyncio.sleep(PACE)
                    writer.write(event(number))
            else:
                writer.write(b"".join(map(event, range(count))))
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n" + END)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def said_to(content: bytes) -> list[str]:
    """Return what the soak's model says to a request: words that depend on all of it."""
    seed = random.Random(zlib.crc32(content))
    return [f"{seed.choice(WORDS)}{seed.randrange(1000)} " for _ in range(seed.randrange(1, 60))]


def encode_said(content: bytes, stream: bool) -> bytes:
    """Return the exact content of the soak's answer to a request."""
    words = said_to(content)
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
            _, content = await read_request(reader)
            asked = json.loads(content or b"{}")
            bad = BAD_ANSWERS.get(asked.get("model", ""))
            if bad is not None:
                writer.write(bad)
                await writer.drain()
                await asyncio.sleep(0.05)
                break
            said = encode_said(content, asked.get("stream", False))
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


async def serve_floor(
    upstream: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Relay bytes both ways, on one upstream connection for each client's."""
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream)

    async def copy(
        source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    tasks = [copy(reader, up_writer), copy(up_reader, writer)]
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_end(name: str, upstream: int) -> None:
    """Serve until killed; print the port."""

    async def serve(reader: Any, writer: Any) -> None:
        if name == "upstream":
            await serve_upstream(reader, writer)
        elif name == "soak":
            await serve_soak(reader, writer)
        else:
            await serve_floor(upstream, reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ======================================================================================
# The load
# ======================================================================================


def request(stream: bool, count: int, paced: bool = False) -> bytes:
    """Return the bytes of one chat request."""
    doc = {
        "model": "bench", "stream": stream, "max_tokens": count,
        "user": "paced" if paced else "burst",
        "messages": [{"role": "user", "content": "Say hello, please. " * 4}],
    }  # fmt: skip
    content = json.dumps(doc).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
        "Authorization: Bearer sk-bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes,
    delays: list[int],
) -> None:  # fmt: skip
    """Send a request and read its answer to the end."""
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head[:80]
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    if length:
        await reader.readexactly(int(length[1]))
        return
    tail = b""
    while not tail.endswith(END):
        piece = await reader.read(65536)
        assert piece, "the stream was cut"
        now, searched = time.monotonic_ns(), tail[-20:] + piece
        delays.extend(now - int(stamp) for stamp in STAMP.findall(searched))
        tail = searched[-20:]
        if match := list(STAMP.finditer(searched)):
            tail = searched[max(match[-1].end(), len(searched) - 20) :]


async def load(
    port: int, connections: int, seconds: float, data: bytes
) -> tuple[list[float], list[int], float]:
    """Ask on some connections for a while: latencies in s, delays in ns, time taken."""
    latencies: list[float] = []
    delays: list[int] = []
    start = time.monotonic()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            begun = time.monotonic()
            await ask(reader, writer, data, delays)
            latencies.append(time.monotonic() - begun)
            if time.monotonic() - start >= seconds:
                break
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return latencies, delays, time.monotonic() - start


# ======================================================================================
# The measurements
# ======================================================================================


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, key: str) -> float:
    """Return resident memory in MB: VmRSS now, VmHWM at its peak."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


def percentile(values: list[Any], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    return sorted(values)[int(share * (len(values) - 1))]


async def measure(port: int, pid: int | None) -> dict[str, float]:
    """Measure one way to the upstream."""
    figures = {}
    latencies, _, _ = await load(port, 1, SECONDS / 2, request(False, 0))
    figures["latency p50, us"] = percentile(latencies, 0.5) * 1e6
    figures["latency p99, us"] = percentile(latencies, 0.99) * 1e6
    latencies, _, took = await load(port, 32, SECONDS, request(False, 0))
    figures["requests/s, 32 connections"] = len(latencies) / took
    _, delays, took = await load(port, 8, SECONDS, request(True, BURST_EVENTS))
    figures["events/s, 8 streams unpaced"] = len(delays) / took
    before = cpu_seconds(pid) if pid else 0.0
    data = request(True, PACED_EVENTS, paced=True)
    _, delays, _ = await load(port, STREAMS, 0, data)
    figures[f"event delay p50, {STREAMS} paced streams, us"] = percentile(delays, 0.5) / 1e3
    figures[f"event delay p99, {STREAMS} paced streams, us"] = percentile(delays, 0.99) / 1e3
    if pid:
        spent = cpu_seconds(pid) - before
        figures["CPU per paced event, us"] = spent * 1e6 / len(delays)
    return figures


async def wait_for_answer(port: int, process: subprocess.Popen[Any]) -> None:
    """Return when the router answers its first request."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if process.poll() is not None:
                sys.exit("smolrouter.py did not start")
            await asyncio.sleep(0.005)
            continue
        await ask(reader, writer, request(False, 0), [])
        writer.close()
        return


def start(*arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start a Python process."""
    return subprocess.Popen([sys.executable, *arguments], **options)


def start_end(name: str, upstream: int = 0) -> tuple[subprocess.Popen[Any], int]:
    """Start an upstream or a floor; return it and its port."""
    process = start(
        __file__, "--run", name, "--upstream", str(upstream), stdout=subprocess.PIPE
    )
    return process, int(process.stdout.readline())


async def start_router(
    folder: pathlib.Path, upstream: int, more: dict[str, str] | None = None
) -> tuple[subprocess.Popen[Any], int, dict[str, float]]:
    """Start SmolRouter with everything on; return it, its port and what that took."""
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    url = f"http://127.0.0.1:{upstream}"
    (folder / "routes.json").write_text(
        json.dumps({"servers": {"UPSTREAM": url}, **ROUTES})
    )
    settings = {
        "DEFAULT_UPSTREAM": url, "LISTEN_PORT": str(port), "ROUTES_CONFIG": "routes.json",
        "MODEL_MAP": '{"gpt-3.5-turbo":"bench","/gpt-4-(.*)/":"bench-\\\\1"}',
    }  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    begun = time.monotonic()
    process = start(
        str(HERE / "smolrouter.py"), cwd=folder,
        env={**environ, **settings, **(more or {})},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    await wait_for_answer(port, process)
    took = time.monotonic() - begun
    return process, port, {"first answer, s": took, "memory, MB": memory(process.pid, "VmRSS")}


async def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Measure the three ways in turn; return medians by way and figure."""
    processes: list[subprocess.Popen[Any]] = []
    seen: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            upstream, upstream_port = start_end("upstream")
            processes.append(upstream)
            floor, floor_port = start_end("floor", upstream_port)
            processes.append(floor)
            router, port, once = await start_router(pathlib.Path(folder), upstream_port)
            processes.append(router)
            ways = {
                "direct": (upstream_port, None), "floor": (floor_port, floor.pid),
                "smolrouter": (port, router.pid),
            }  # fmt: skip
            for _ in range(rounds):
                for way, (at, pid) in ways.items():
                    for name, value in (await measure(at, pid)).items():
                        seen.setdefault(way, {}).setdefault(name, []).append(value)
            once["peak memory, MB"] = memory(router.pid, "VmHWM")
        finally:
            for process in processes:
                process.terminate()
                process.wait(20)
                if process.stdout:
                    process.stdout.close()
    figures = {
        way: {name: statistics.median(values) for name, values in columns.items()}
        for way, columns in seen.items()
    }
    figures["smolrouter"].update(once)
    return figures


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


def encode_post(path: str, content: bytes, more: str = "") -> bytes:
    """Return a POST of JSON."""
    return (f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(content)}\r\n\r\n").encode() + content


def chat_content(text: str, stream: bool, model: str = "good") -> bytes:
    """Return the content of a chat request that needs no change on its way."""
    doc: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if stream:
        doc |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(doc).encode()


class Soak:
    """Good and bad clients of one router, and what they have seen."""

    def __init__(self, port: int, end: float) -> None:
        self.port, self.end = port, end
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
                if act == self.ask_well:
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
            content = chat_content(chance.choice(WORDS) * size, stream)
            writer.write(encode_post("/v1/chat/completions", content))
            status, number, said = await read_answer(reader)
            if status != 200 or said != encode_said(content, stream):
                self.faults.append(f"{status} {said[:200]!r} instead of an exact answer")
            self.good.add(number)
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
        content = chance.choice((
            b'{"model":"x","x":%b' % (b"[" * 100_000),
            b'{"model":"x","x":[%b0]}' % (b"{}," * 300_000),
            b'{"model":"x","x":"%b"}' % (b"a" * 5_000_000)))
        data = encode_post("/v1/embeddings", content)
        if chance.random() < 0.3:
            data = data.replace(b"Length: ", b"Length: 999", 1)
        writer.write(data)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(65536), 5)
        writer.transport.abort()
        await asyncio.sleep(0.5)

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
    with tempfile.TemporaryDirectory() as folder:
        router, port, _ = await start_router(pathlib.Path(folder), upstream_port)
        try:
            seconds = minutes * 60
            run = Soak(port, time.monotonic() + seconds)
            crew = [(run.ask_well, 6), (run.ask_badly, 2), (run.speak_badly, 3),
                    (run.leave_early, 3), (run.weigh_heavily, 1), (run.idle, 20)]
            acts = [act for act, number in crew for _ in range(number)]
            seen, *_ = await asyncio.gather(
                watch(router.pid, seconds), *(run.repeat(act, n) for n, act in enumerate(acts)))
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
    print(f"{len(run.good)} good answers, exact; times: {run.counts}")
    print("at the end {:.1f} MB, {} descriptors, {} threads".format(*last))
    print(*(f"FAULT: {fault}" for fault in run.faults[:20]), sep="\n")
    return 1 if run.faults or not run.good else 0


def show(figures: dict[str, dict[str, float]]) -> None:
    """Print a table; the last column is SmolRouter against the floor."""
    ways = ("direct", "floor", "smolrouter")
    print(f"{'figure':40}" + "".join(f"{way:>12}" for way in ways) + f"{'ratio':>8}")
    for name, value in figures["smolrouter"].items():
        cells = [figures[way].get(name) for way in ways]
        texts = [f"{cell:12.2f}" if cell is not None else f"{'':12}" for cell in cells]
        ratio = f"{value / cells[1]:8.2f}" if cells[1] else ""
        print(f"{name:40}" + "".join(texts) + ratio)


# ======================================================================================
# The log
# ======================================================================================

MODELS = ("llama3-8b", "qwen2.5-coder", "mistral-nemo", "phi-4", "gemma3-27b", "tiny")
QUESTIONS = ("/api/logs", "/api/logs?model=phi-4&status=error", "/api/logs?q=phi-4",
             "/api/stats", "/api/stats?hours=168", "/api/performance",
             "/api/performance?hours=168", "/api/performance?hours=168&model=phi-4",
             "/api/upstreams")  # fmt: skip


def made_row(number: int, moment: float, chance: random.Random) -> smolrouter.Row:
    """Return a row as a week of mixed traffic would leave it."""
    model, stream = chance.choices(MODELS, (40, 25, 15, 10, 9, 1))[0], chance.random() < 0.6
    failed, ollama = chance.random() < 0.03, chance.random() < 0.3
    status = chance.choice((404, 429, 500, 502)) if failed else 200
    taken = round(chance.lognormvariate(8, 1), 1)
    url, attempt = f"http://192.168.1.{100 + MODELS.index(model) % 3}:8000", [f"box/{model}"]
    values = {
        "id": int(moment * 1000) * 1024, "request_id": f"{number:020x}",
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
    return smolrouter.Row(*(values.get(name) for name in smolrouter.Row._fields))


def make_rows(count: int, file: str) -> None:
    """Write a log of `count` rows, evenly over the last week, to a new database."""
    store = smolrouter.Store(smolrouter.Settings.from_mapping({"DB_PATH": file}))
    chance, now, week = random.Random(1), time.time(), 7 * 86_400
    detail = smolrouter.Detail("{}", b'{"model":"made-up"}', ANSWER)
    for start_at in range(0, count, 10_000):
        tallies: smolrouter.Tallies = {}
        entries = []
        for number in range(start_at, min(start_at + 10_000, count)):
            moment = now - 60 - (count - number) * (week - 3600) / count
            row = made_row(number + 1, moment, chance)
            smolrouter.add_row(tallies, row)
            entries.append(smolrouter.make_entry(row, detail))
        store.write([], entries, tallies)
    store.close()


def ask_log(port: int) -> dict[str, float]:
    """Return the median time of each question to the log, in ms."""
    figures = {}
    for path in QUESTIONS:
        times = []
        for _ in range(21):
            begun = time.perf_counter()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                answer.read()
            times.append((time.perf_counter() - begun) * 1000)
        figures[f"{path}, ms"] = statistics.median(times)
    return figures


async def measure_log(file: str) -> dict[str, float]:
    """Start a router on a database and ask it."""
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[Any]] = []
        try:
            upstream, port = start_end("upstream")
            processes.append(upstream)
            settings = {"DB_PATH": str(pathlib.Path(file).resolve())}
            router, at, _ = await start_router(pathlib.Path(folder), port, settings)
            processes.append(router)
            return await asyncio.to_thread(ask_log, at)
        finally:
            for process in processes:
                process.terminate()
                process.wait(20)


def main() -> int:
    """Run the command line."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # not that a peer has gone
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="good and bad traffic")
    parser.add_argument("--run", choices=("upstream", "floor", "soak"), help=argparse.SUPPRESS)
    parser.add_argument("--upstream", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--make-rows", nargs=2, metavar=("N", "FILE"),
                        help="write a log of N made-up rows to a new database, then end")
    parser.add_argument("--log", metavar="FILE",
                        help="time what the page asks of a router with this database")
    arguments = parser.parse_args()
    if arguments.make_rows:
        make_rows(int(arguments.make_rows[0]), arguments.make_rows[1])
        return 0
    if arguments.log:
        for name, value in asyncio.run(measure_log(arguments.log)).items():
            print(f"{name:50}{value:10.2f}")
        return 0
    if arguments.run:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_end(arguments.run, arguments.upstream))
        return 0
    if arguments.soak:
        return asyncio.run(soak(arguments.soak))
    figures = asyncio.run(compare(arguments.rounds))
    if arguments.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
