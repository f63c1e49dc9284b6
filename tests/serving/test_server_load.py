"""serve.py as a process of its own, under clients that behave badly: it refuses cleanly, goes on, and does not grow."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/serve.py"
IDLE_SECONDS = 2.0
ASKED = {"prompt": "Two large mugs", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


class Running:
    """A server, seen from outside."""

    def __init__(self, process: subprocess.Popen, address: tuple[str, int]) -> None:
        self.process, self.address = process, address

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def send(self, body: bytes, more: str = "") -> socket.socket:
        """A connection on which a request has been sent."""
        connection = self.connect()
        connection.sendall(self.head(f"Content-Length: {len(body)}\r\n{more}") + body)
        return connection

    @staticmethod
    def head(more: str) -> bytes:
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}\r\n".encode()
        )

    def ask(self, **change) -> tuple[int, dict]:
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        connection.request(
            "POST", "/v1/completions", json.dumps({**ASKED, **change}), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def answers(self) -> bool:
        try:
            return self.ask()[0] == 200
        except OSError:  # closed before the request was sent
            return False

    def text(self) -> str:
        status, answer = self.ask()
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def memory(self, key: str = "VmRSS") -> float:
        """MiB; VmHWM is the highest so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024

    def held(self) -> tuple[int, int]:
        """Threads and open files."""
        return tuple(len(os.listdir(f"/proc/{self.process.pid}/{kind}")) for kind in ("task", "fd"))

    def wait_for(self, held: tuple[int, int]) -> None:
        """Until nothing more is held than that."""
        until = time.monotonic() + 10
        while any(now > before for now, before in zip(self.held(), held, strict=True)):
            assert time.monotonic() < until, f"{self.held()} threads and files, expected {held}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tiny_dir):
    words = ["--checkpoint_dir", str(tiny_dir), "--dtype=fp32", "--port=0", "--max_connections=100", "--max_queue=16"]
    words += [f"--idle_seconds={IDLE_SECONDS}", "--max_new_tokens=250", "--write_seconds=1", "--max_output_mib=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            port = int(re.search(r"127\.0\.0\.1:(\d+)/v1", process.stderr.readline())[1])
            logged: list[str] = []  # somebody reads the log, as a terminal or a service manager does
            reader = threading.Thread(target=lambda: logged.extend(process.stderr))
            reader.start()
            running = Running(process, ("127.0.0.1", port))
            with ThreadPoolExecutor(16) as pool:  # what is made once only: threads, buffers
                list(pool.map(lambda _: running.ask(), range(32)))
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            reader.join(20)
    errors = "".join(logged)
    assert errors.count(" POST /v1/completions 200 tiny") > 32
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in errors, errors


@pytest.fixture(autouse=True)
def _goes_on(server):
    """After each of these tests the server answers as before, and holds no more than before."""
    expected, held, memory = server.text(), server.held(), server.memory()
    yield
    server.wait_for(held)
    until = time.monotonic() + 10
    while not server.answers():  # a queue of requests whose clients have just gone, which is seen every half second
        assert time.monotonic() < until
        time.sleep(0.1)
    assert server.text() == expected
    assert server.memory() < memory + 80


def test_a_thousand_connections(server):
    """Those beyond the limit are told so at once; those that ask nothing do not shut out others for long."""
    open_ones = [server.connect() for _ in range(1000)]
    refused = 0
    for number, connection in enumerate(open_ones):
        if number >= 100:
            answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"100 connections are open" in answer
            refused += 1
        elif number % 2:
            connection.sendall(b"POST /v1/completions HT")  # begun, and left so
    assert refused == 900
    server.wait_for((server.held()[0], 200))
    until = time.monotonic() + IDLE_SECONDS + 5
    while not server.answers():  # while all the first hundred stay at their end of the line
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not open_ones[0].recv(10)
    for connection in open_ones:
        connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb(server, chunked):
    """Refused as soon as it is known to be too large, and never held."""
    part = b"x" * 100_000
    with server.connect() as connection:
        connection.sendall(
            server.head("Transfer-Encoding: chunked\r\n" if chunked else "Content-Length: 100000000\r\n")
        )
        sent = 0
        try:
            for _ in range(1000):
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                sent += len(part)
        except OSError:  # closed in our face, which is fine as long as we were told why
            pass
        assert b" 413 " in connection.recv(1000)
    assert sent > 1_000_000


def test_clients_that_hang_up(server):
    """In mid-stream, while they wait in the queue, in mid-body and at once."""
    stream = json.dumps({**ASKED, "max_tokens": 240, "stream": True}).encode()
    whole = json.dumps({**ASKED, "max_tokens": 240}).encode()
    for number in range(120):
        connection = server.send([stream, whole][number % 2])
        if number % 4 == 0:
            assert connection.recv(20)
        if number % 3 == 0:  # a reset instead of a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
        with server.connect() as connection:
            connection.sendall(server.head("Content-Length: 1000\r\n") + b"{")


def test_a_flood_of_bad_requests(server):
    bodies = [b"{", b"[" * 100_000, b"\xff\xfe", b'{"prompt": 3}', b'{"prompt": "a", "max_tokens": -1}']
    bodies += [b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": [' + b"7," * 30_000 + b"7]}", b'{"prompt": ""}']
    bodies += [json.dumps({**ASKED, "stop": "x" * 500_000}).encode(), b'{"prompt": "' + b"a " * 40_000 + b'"}']

    def flood(first: int) -> set[int]:
        statuses = set()
        for number in range(first, 96, 8):
            connection = server.send(bodies[number % len(bodies)])
            statuses.add(int(connection.recv(1000).split()[1]))
            connection.close()
        return statuses

    used = []
    for _ in range(9):
        with ThreadPoolExecutor(8) as pool:
            found = set().union(*pool.map(flood, range(8)))
        assert 400 in found and found <= {200, 400, 429}
        used.append(server.memory())
    grown = [after - before for before, after in pairwise(used)]
    assert median(grown) < 2, grown  # MiB; a leak is in each round, buffers are made in some
    for garbage in (b"\0" * 1000, b"GET / HTTP/9\r\n\r\n", b"POST " + b"x" * 100_000):
        with server.connect() as connection:
            connection.sendall(garbage)
            assert b" 400 " in connection.recv(1000)


def test_more_requests_than_the_queue_holds(server):
    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(lambda _: server.ask(max_tokens=100), range(60)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 16
    assert len({answer["choices"][0]["text"] for status, answer in found if status == 200}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_never_read(server, stream):
    """Their connections are closed and their slots freed; what is kept for each of them is bounded."""
    asked = {"messages": [{"role": "user", "content": "Two large mugs"}], "n": 8, "max_tokens": 230, "ignore_eos": True}
    body = json.dumps({**asked, "stream": stream, "logprobs": True, "top_logprobs": 20}).encode()
    before, held, open_ones = server.memory(), server.held(), []
    for _ in range(2):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        head = server.head(f"Content-Length: {len(body)}\r\n").replace(b"/completions", b"/chat/completions")
        connection.sendall(head + body)
        open_ones.append(connection)
    for connection in open_ones:
        assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
    server.wait_for(held)
    assert server.memory() < before + 60
    for connection in open_ones:
        connection.close()


def test_a_client_that_reads_slowly_gets_everything(server):
    """Slower than the server writes, faster than it has patience for."""
    body = json.dumps({**ASKED, "max_tokens": 200, "logprobs": 20}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.address)
    connection.sendall(server.head(f"Content-Length: {len(body)}\r\nConnection: close\r\n") + body)
    received = b""
    while part := connection.recv(20_000):
        received += part
        time.sleep(0.02)
    connection.close()
    answer = json.loads(received.partition(b"\r\n\r\n")[2])
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 200


def test_garbage_in_the_middle_of_a_request(server):
    """A body that is refused for its size, and goes on with what is no chunk; a second request that is none."""
    for more in (b"zz\r\n", b"1000\r\n" + b"x" * 5_000):
        with server.connect() as connection:
            connection.sendall(server.head("Transfer-Encoding: chunked\r\n"))
            connection.sendall(b"200000\r\n" + b"x" * 0x200000 + b"\r\n")
            assert b" 413 " in connection.recv(1000)
            with suppress(OSError):
                connection.sendall(more)
                connection.recv(1000)
    with server.send(json.dumps(ASKED).encode()) as connection:
        connection.sendall(b"\0\0\0 garbage\r\n\r\n" * 100)
        assert b" 200 " in connection.recv(1000)
