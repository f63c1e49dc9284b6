"""Templates are programs of others: each ends, within its limits, and no process outlives the one that asks."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from multiprocessing import get_context

import pytest

from litmini.errors import UserError
from litmini.templates import render as chat_template
from litmini.templates.render import BadTemplate, render

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
PLAIN = "{% for m in messages %}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}>{% endif %}"
NOW = datetime(2026, 11, 29)


def texts(template: str, parts: chat_template.Parts | None = None) -> list[str | UserError]:
    return list(render(template, [(MESSAGES, None, parts or [(2, False, None)])], {}, NOW))


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)


@pytest.mark.usefixtures("one_second")
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 40 }}{% endfor %}",
        "{% set x = 10 ** (10 ** 8) %}",  # one operation, while the module is compiled
        "{% set n = messages|length * 5 %}{% set x = n ** (n ** 9) %}",  # and one that needs the messages
        "{% for i in range(99999) %}{% set x = ('a ' * 99999)|sort %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(template: str) -> None:
    with pytest.raises(BadTemplate, match="takes more than 1 s on these messages, the limit"):
        texts(template)
    assert texts(PLAIN) == ["hello.hi."]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ messages[0].content * 10**10 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%999999999999d' % 1 }}",
        "{{ '{:999999999999}'.format(1) }}",
        "{% set x = [0] * 10**9 %}",
        "{{ messages|tojson(indent=10**10) }}",
    ],
)
def test_a_template_that_needs_much_memory_is_ended(template: str) -> None:
    with pytest.raises(BadTemplate, match=r"needs more than 1,024 MiB of memory, the limit"):
        texts(template)
    assert texts(PLAIN) == ["hello.hi."]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
        "{{ 'a' * 10**7 }}",
        "{{ messages[0].content|center(10**7) }}",
    ],
)
def test_a_text_has_a_largest_size(template: str) -> None:
    with pytest.raises(BadTemplate, match=r"writes more than 1,0\d\d,\d\d\d characters"):
        texts(template)


def test_long_messages_are_no_fault_of_the_template() -> None:
    long = [{"role": "user", "content": "é" * 3_000_000}]
    (text,) = render(PLAIN * 3, [(long, None, [(1, False, None)])], {}, NOW)
    assert isinstance(text, str) and len(text) == 9_000_003


def test_parts_in_their_order_and_errors_in_place() -> None:
    assert texts(PLAIN, [(2, False, None), (1, True, None), (0, True, None), (1, False, None)]) == [
        "hello.hi.",
        "hello.>",
        ">",
        "hello.",
    ]
    picky = "{% if messages|length == 1 %}{{ raise_exception('two, please') }}{% endif %}" + PLAIN
    whole, error, again = texts(picky, [(2, False, None), (1, False, None), (2, True, None)])
    assert (whole, again) == ("hello.hi.", "hello.hi.>")
    assert isinstance(error, UserError) and "fails on these messages: two, please" in str(error)
    assert list(render(PLAIN, [], {}, NOW)) == []


def test_half_a_character_is_an_error() -> None:
    (text,) = render(PLAIN, [([{"content": "\ud83d"}], None, [(1, False, None)])], {}, NOW)
    assert isinstance(text, UserError) and "half a character" in str(text)
    (text,) = texts(r"{{ '\ud83d' }}")
    assert isinstance(text, UserError)


def test_values_that_json_does_not_have_are_passed_as_their_text() -> None:
    (text,) = render(
        "{{ messages[0].at }} {{ strftime_now('%d.%m.%Y') }}", [([{"at": NOW}], None, [(1, False, None)])], {}, NOW
    )
    assert text == "2026-11-29 00:00:00 29.11.2026"


def test_messages_that_are_no_json_are_errors_in_place() -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    bad = [[{"content": "x", "more": deep}], [{"content": "x", (1, 2): 3}]]
    both = [(MESSAGES, None, [(1, False, None)]), *[(one, None, [(1, False, None), (1, True, None)]) for one in bad]]
    first, *errors, last = render(PLAIN, [*both, (MESSAGES, None, [(2, False, None)])], {}, NOW)
    assert (first, last) == ("hello.", "hello.hi.") and len(errors) == 4
    assert all(isinstance(error, UserError) and "cannot render" in str(error) for error in errors)


@pytest.mark.parametrize("depth", [300, 900, 960, 980, 990])
def test_deep_messages_are_rendered_or_refused(depth: int) -> None:
    deep: object = []
    for _ in range(depth):
        deep = [deep]
    (text,) = render(PLAIN, [([{"content": "x", "more": deep}], None, [(1, False, None)])], {}, NOW)
    assert text == "x." or "cannot render" in str(text) or "recursion" in str(text)


def test_what_a_template_says_is_bounded() -> None:
    (error,) = texts("{{ raise_exception('a' * 10**6 + '\\ud83d') }}")
    assert isinstance(error, UserError) and len(str(error)) < 1100


def test_texts_that_nobody_takes_are_not_those_of_the_next_request() -> None:
    answers = render(PLAIN, [(MESSAGES, None, [(1, False, None), (2, False, None)])], {}, NOW)
    assert next(answers) == "hello."
    answers.close()  # type: ignore[attr-defined]
    assert texts(PLAIN) == ["hello.hi."]


def test_the_process_survives_signals_to_the_group_and_is_replaced_when_it_dies() -> None:
    texts(PLAIN)
    process = chat_template._child.process
    assert process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert texts(PLAIN) == ["hello.hi."] and chat_template._child.process is process
    process.kill()
    process.wait()
    assert texts(PLAIN) == ["hello.hi."] and chat_template._child.process is not process


def _length(n: int) -> int:
    (text,) = render("{{ messages[0].content * %d }}" % n, [(MESSAGES, None, [(1, False, None)])], {}, NOW)  # noqa: UP031
    return len(str(text))


def test_threads_and_forks_do_not_mix_their_texts() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_length, range(1, 100))) == [5 * n for n in range(1, 100)]
    with get_context("fork").Pool(2) as processes:
        assert processes.map(_length, range(1, 100)) == [5 * n for n in range(1, 100)]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the time of a process")
def test_a_process_that_renders_does_not_outlive_the_one_that_was_killed() -> None:
    code = (
        "from litmini.templates import render as c\nfrom datetime import datetime\nc.SECONDS = 2\n"
        "list(c.render('x', [([], None, [(0, False, None)])], {}, datetime.now()))\nprint(c._child.process.pid, flush=True)\n"
        "list(c.render('{% for i in range(9999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}', "
        "[([], None, [(0, False, None)])], {}, datetime.now()))"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ})
    assert asking.stdout
    child = int(asking.stdout.readline())
    time.sleep(0.3)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{child}/stat") as state:
            if state.read().split()[2] == "Z":  # ended; nobody in this container has asked for its status
                return
        time.sleep(0.1)
    raise AssertionError("it is still running")
