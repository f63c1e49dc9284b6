"""The client of OpenAI-compatible servers: what it sends, what it tries again, and what it says where that is in vain."""

import threading

import pytest
from openai_server import said, serving

from litmini import openai_client
from litmini.errors import UserError
from litmini.openai_client import Client, ServerError, ask_all

KEY = "sk-secret-1"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds between tries, which tests don't wait for."""
    found: list[float] = []
    monkeypatch.setattr(openai_client.time, "sleep", found.append)
    return found


def test_several_at_once_and_an_error_that_waits_for_none():
    assert dict(ask_all(lambda i: i * i, range(20), 3)) == {i: i * i for i in range(20)} and not list(
        ask_all(str, [], 3)
    )
    replies = threading.Event()

    def ask(i: int) -> int:
        if i == 2:
            raise ServerError("no")
        replies.wait(30)
        return i

    before = threading.active_count()
    with pytest.raises(ServerError, match="no"):
        list(ask_all(ask, range(9), 3))
    assert all(thread.daemon for thread in threading.enumerate()[before:]) and not replies.is_set()
    replies.set()


def test_a_chat_completion_with_the_key_of_the_variable():
    with serving(lambda *_: said("hi")) as asked:
        reply = Client(asked.url, "m", "JUDGE_KEY").chat(HELLO, max_tokens=3, temperature=None)
        Client(asked.url, "m", "NO_KEY").chat(HELLO)
    (path, body, headers), (_, _, without) = asked.requests
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("hi", "stop", 7, 2)
    assert path == "/v1/chat/completions" and body == {"model": "m", "messages": HELLO, "max_tokens": 3}
    assert headers["Authorization"] == f"Bearer {KEY}" and "Authorization" not in without


def test_busy_servers_are_asked_again_later(waits):
    answers = [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "3"}),
        (503, b"busy", {}),
        (0, b"", {}),
        said("hi"),
    ]
    with serving(lambda _, number: answers[number]) as asked:
        assert Client(asked.url, "m").chat(HELLO).text == "hi"
    assert waits == [3.0, 2.0, 4.0] and len(asked.requests) == 4


@pytest.mark.parametrize(
    ("answer", "times", "says"),
    [
        ((429, {"error": {"message": "quota used up"}}, {}), 3, "tried 3 times: .* answers 429: quota used up"),
        ((429, {}, {"Retry-After": "86400"}), 1, "asks to come back in 86,400 seconds"),
        ((401, {"error": {"message": f"wrong key {KEY}"}}, {}), 1, r"401: wrong key \*\*\*\. .*JUDGE_KEY"),
        ((404, b"<html>nothing</html>", {}), 1, "404: <html>nothing</html>. Does base_url end"),
        ((302, b"", {"Location": "http://elsewhere/v1"}), 1, "redirects to http://elsewhere/v1"),
        ((200, b"<html>hello</html>", {}), 1, "is this the address of an OpenAI-compatible server"),
        ((200, {"choices": []}, {}), 1, "no chat completion in the reply"),
        ((200, {"choices": [{"message": "x"}]}, {}), 1, "no chat completion in the reply"),
        ((200, b"{}", {"Content-Length": "90"}), 3, "tried 3 times"),
    ],
)
def test_what_fails_is_said_without_the_key(waits, answer, times, says):
    with serving(lambda *_: answer) as asked, pytest.raises(ServerError, match=says) as error:
        Client(asked.url, "m", "JUDGE_KEY", tries=3, timeout=0.5 if times == 3 else 10).chat(HELLO)
    assert len(asked.requests) == times and KEY not in str(error.value)


def test_a_late_server(waits):
    never = threading.Event()
    with serving(lambda *_: (never.wait(5) or 200, {}, {})) as asked:
        with pytest.raises(ServerError, match="tried 2 times: no reply within 0.1 seconds"):
            Client(asked.url, "m", timeout=0.1, tries=2).chat(HELLO)
        never.set()
    assert waits == [1.0] and len(asked.requests) == 2


def test_a_server_that_is_not_there(waits):
    with serving(lambda *_: said("")) as asked:
        pass
    with pytest.raises(ServerError, match="refused"):
        Client(asked.url, "m", tries=2).models()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("127.0.0.1:8000/v1", "expected such as"),
        ("http://me:word@127.0.0.1/v1", "environment variable"),
        ("http://example.com/v1", "not encrypted"),
        ("https://example.com/v1?key=1", "expected such as"),
    ],
)
def test_addresses_that_are_refused(url, says):
    with pytest.raises(UserError, match=says):
        Client(url, "m", "JUDGE_KEY")


def test_a_key_that_is_none_is_not_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-1\nX: y")
    with pytest.raises(UserError) as error:
        Client("http://127.0.0.1/v1", "m", "JUDGE_KEY")
    assert "sk-1" not in str(error.value)


def test_models():
    with serving(lambda *_: (200, {"data": [{"id": "a"}, {"id": "b"}]}, {})) as asked:
        assert Client(asked.url, "").models() == ["a", "b"]
