"""Who may ask: host names and keys; and what a bad request leaves in the log."""

import asyncio
import http.client
import json
import logging
import re
import socket

import pytest
from test_server import LIMITS, MESSAGES, post, serving

from litmini.errors import UserError
from litmini.serving.access import AllowedHosts, has_key
from litmini.serving.log import MAX_LINE, MAX_LINES, BoundedLog, log_error
from litmini.serving.server import Server

ASKED = {"messages": MESSAGES, "max_tokens": 2}
OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[::1]", "127.1.2.3"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "",
    ":8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "x",
    "[",
    "]",
]
OTHERS += [
    "localhost@evil.example",
    "evil.example/localhost",
    "\xff",
    "0x7f.1",
    "[evil.example]",
    "[::1].evil.example:1",
]


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::", ""])
def test_a_server_on_this_machine_has_these_names(address):
    assert [host for host in OWN if host not in AllowedHosts(address)] == []
    assert [host for host in OTHERS if host in AllowedHosts(address)] == []


def test_an_address_is_a_name_where_the_server_listens_at_all_of_them():
    for host in ("192.168.1.7", "192.168.1.7:8000", "[2001:db8::1]:8000", "2001:db8::1"):
        assert host in AllowedHosts("0.0.0.0") and host in AllowedHosts("::") and host not in AllowedHosts("127.0.0.1")
    assert "192.168.1.7:80" in AllowedHosts("192.168.1.7") and "localhost" not in AllowedHosts("192.168.1.7")
    assert "192.168.1.8" not in AllowedHosts("192.168.1.7")


def test_names_of_an_allow_list():
    hosts = AllowedHosts("127.0.0.1", ["LLM.example", "other.example:443"])
    assert "llm.example" in hosts and "llm.example:8000" in hosts and "other.example" in hosts and "localhost" in hosts
    assert "sub.llm.example" not in hosts and "llm.example.evil.example" not in hosts


def test_keys_are_bytes():
    """Non-ASCII ones as any client sends them, and those that no UTF-8 text holds, as the environment has them."""
    for key in ("secret", "säcret 🔑", "\udcff\udcfe", "a b"):
        sent = key.encode("utf-8", "surrogateescape").decode("latin-1")
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert has_key(f"{scheme} {sent}", key) and has_key(f"{scheme}  {sent} ", key)
        for wrong in (
            sent,
            f"Basic {sent}",
            f"Bearer {sent}x",
            f"Bearer {sent[:-1]}",
            "Bearer",
            "",
            f"Bearer{sent}",
            "\xff",
        ):
            assert not has_key(wrong, key), wrong


def test_hosts_and_keys_over_http(base):
    model, tokenizer = base
    with serving(
        Server(model, {"tiny": tokenizer}, LIMITS, "säcret", hosts=AllowedHosts("127.0.0.1", ["llm"]))
    ) as address:

        def ask(method: str, path: str, **headers) -> int:
            connection = http.client.HTTPConnection(*address, timeout=10)
            connection.putrequest(method, path, skip_host=True)
            content = json.dumps(ASKED).encode() if method == "POST" else b""
            more = {"Content-Type": "application/json", "Content-Length": str(len(content))} if content else {}
            for name, value in {**more, **headers}.items():
                connection.putheader(name, value)
            connection.endheaders(content)
            status = connection.getresponse().status
            connection.close()
            return status

        key = "bearer säcret".encode()
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny")):
            for host in ("localhost", "llm:80", f"127.0.0.1:{address[1]}", "[::1]"):
                assert ask(method, path, Host=host, Authorization=key) == 200
                assert ask(method, path, Host=host, Authorization=b"bearer secret") == 401
                assert ask(method, path, Host=host) == 401
            for host in ("evil.example", "", "xn--llm"):
                assert ask(method, path, Host=host, Authorization=key) == 403
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.0\r\nAuthorization: Bearer s\xc3\xa4cret\r\n\r\n")
            assert b" 403 " in connection.recv(1000)


BAD = [
    b'{"messages": [{"role": "user", "content": "a"}], "prompt": "b"}',
    b'{"max_tokens": 2, "messages": [{"role": "\\ud800", "content": "a"}]}',
    b'{"max_tokens": 2, "messages": [{"role": "user", "content": "a", "name": "\\udfff"}]}',
    b'{"max_tokens": 2, "messages": [{"role": "user", "content": "a", "\\ud800": 1}]}',
    b'{"\\ud800": 1}',
    b'{"user": "\\ud83d", "messages": [{"role": "user", "content": "a"}]}',
    b'{"stop": ["\\ud83d"], "messages": [{"role": "user", "content": "a"}]}',
    b'{"metadata": {"a": [{"b": "\\ud83d"}]}, "messages": [{"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "banana", "content": "a"}, {"role": "user", "content": "b"}]}',
    b'{"messages": [{"role": "User", "content": "a"}]}',
    b'{"messages": [{"role": "", "content": "a"}]}',
    b'{"temperature": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
    b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2, "logprobs": false}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1' + b"0" * 400 + b"}",
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_bad_bodies_are_400_and_not_in_the_log(base, body, capfd):
    model, tokenizer = base
    with serving(Server(model, {"tiny": tokenizer}, LIMITS, None)) as address:
        status, answer = post(address, body)
        assert status == 400 and len(answer["error"]["message"]) > 10
        assert post(address, ASKED)[0] == 200
    refused, answered = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"[\d :-]{19} 127\.0\.0\.1 POST /v1/chat/completions 400 invalid_request_error", refused)
    assert " 200 tiny, " in answered


def test_lines_of_the_log_are_bounded(capsys):
    def deep(n: int) -> None:
        deep(n - 1) if n else (_ for _ in ()).throw(ValueError("\x1b[31m" + "x" * 100_000 + "\ny" * 10_000))

    try:
        deep(50)
    except ValueError as error:
        log_error(error)
        record = logging.LogRecord(
            "uvicorn.error", logging.ERROR, "", 1, "%s", ("z" * 10_000,), (ValueError, error, None)
        )
        assert BoundedLog().filter(record) and len(record.getMessage()) == MAX_LINE and record.exc_info is None
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) <= 2 * (MAX_LINES + 1) and max(map(len, lines)) <= 4 * MAX_LINE
    assert not any("\x1b" in line for line in lines)
    log_error(UserError("as it is"))
    assert capsys.readouterr().err == "error: as it is\n"
    cancelled = logging.LogRecord(
        "uvicorn.error", logging.ERROR, "", 1, "x", (), (None, asyncio.CancelledError(), None)
    )
    assert not BoundedLog().filter(cancelled)
