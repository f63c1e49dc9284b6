"""Files of every form and format give the same examples; what is wrong with one is told by file and line."""

import csv
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from litmini.data import json_list
from litmini.data.formats import find_locations, pick_examples, read_examples
from litmini.data.json_list import read_items
from litmini.errors import UserError

CHAT = [{"role": "user", "content": "Hi “you” 🙂\n"}, {"role": "assistant", "content": "Hello, you"}]
SHARE = [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
SHARED = [("system", "Be"), ("user", "Hi"), ("assistant", "Yes")]
PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
PLAIN += "### Instruction:\nAdd\n\n### Response:\n"
PAIRED = PLAIN.replace("a task.", "a task, paired with an input that provides further context.")
PAIRED = PAIRED.replace("Add\n\n", "Add\n\n### Input:\n1, 2\n\n")

# form: (record, its turns, what it is without a template)
FORMS = {
    "messages": ({"messages": CHAT, "id": "7"}, [(t["role"], t["content"]) for t in CHAT], None),
    "ShareGPT": ({"conversations": SHARE}, SHARED, None),
    "Alpaca": ({"instruction": "Add", "output": "3"}, [("user", "Add"), ("assistant", "3")], (PLAIN, PLAIN + "3")),
    "Alpaca, no input": (
        {"instruction": "Add", "input": "", "output": "3", "text": "not this"},
        [("user", "Add"), ("assistant", "3")],
        (PLAIN, PLAIN + "3"),
    ),
    "Alpaca, input": (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        [("user", "Add\n\n1, 2"), ("assistant", "3")],
        (PAIRED, PAIRED + "3"),
    ),
    "prompt": ({"prompt": "1 + 2 =", "completion": " 3"}, [("user", "1 + 2 ="), ("assistant", " 3")], None),
    "text": ({"text": "Once upon,\na time"}, None, ("", "Once upon,\na time")),
}


def write(directory: Path, kind: str, records: list) -> str:
    file = directory / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("\n\n".join(json.dumps(record) for record in records))
    elif kind == "json":
        file.write_text(json.dumps(records, indent=1))
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:  # as Excel writes it
            writer = csv.DictWriter(stream, records[0])
            writer.writeheader()
            for record in records:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), file)
    return str(file)


def error_of(file: Path | str, has_template: bool = True) -> str:
    with pytest.raises(UserError) as error:
        read_examples(str(file), has_template)
    return str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_format(tmp_path: Path, form: str, kind: str) -> None:
    record, turns, plain = FORMS[form]
    file = write(tmp_path, kind, [record, record])
    for has_template in (True, False):
        examples = read_examples(file, has_template)
        assert len(examples) == 2
        for example in examples:
            if turns and (has_template or "messages" in record or "conversations" in record):
                assert example.messages == [{"role": r, "content": c} for r, c in turns]
                assert (example.prompt, example.text) == ("", "")
            else:
                assert example.messages is None
                assert (example.prompt, example.text) == (plain or ("1 + 2 =", "1 + 2 = 3"))
    locations = {"jsonl": "1 3", "json": "record 1,record 2", "csv": "2 3", "parquet": "row 1,row 2"}[kind]
    if (form, kind) != ("text", "csv"):  # a cell of two lines
        assert [e.where for e in examples] == [f"{file}:{p}" for p in locations.split("," if "," in locations else " ")]
    assert find_locations(file, {1}) == {1: examples[1].where}


def test_what_a_turn_carries_beside_its_content_is_kept(tmp_path: Path) -> None:
    """For templates which show names or tool calls. Parquet's None means that a turn has no such key."""
    turns = [{"role": "user", "content": "Hi", "name": "Ada"}, {"role": "assistant", "content": "Yes"}]
    for kind in ("jsonl", "parquet"):
        assert read_examples(write(tmp_path, kind, [{"messages": turns}]), True)[0].messages == turns


def test_a_key_that_is_null_is_absent(tmp_path: Path) -> None:
    """Templates ask whether a turn has a key; JSON has null where a library writes all of its fields."""
    null = {"name": None, "tool_calls": None, "tool_call_id": None, "reasoning_content": None}
    (example,) = read_examples(write(tmp_path, "jsonl", [{"messages": [{**turn, **null} for turn in CHAT]}]), True)
    assert example.messages == CHAT


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_records_beyond_those_that_are_in_memory_at_once(tmp_path: Path, kind: str) -> None:
    """Each has its own location."""
    records = [{"prompt": f"p{i}", "completion": f"c{i}", "text": f"t{i}"} for i in range(2001)]
    file = write(tmp_path, kind, records)
    examples = read_examples(file, False)
    assert [example.prompt for example in examples] == [record["prompt"] for record in records]
    wanted = {2000, 999, 1000}
    assert pick_examples(file, False, wanted) == [examples[n] for n in sorted(wanted)]
    assert find_locations(file, wanted) == {n: examples[n].where for n in wanted}
    last = {"jsonl": "4001", "json": "record 2001", "csv": "2002", "parquet": "row 2001"}[kind]
    assert examples[2000].where == f"{file}:{last}"


def test_the_first_record_decides_the_form_of_all(tmp_path: Path) -> None:
    more = [{"prompt": f"p{i}", "completion": f"c{i}", "text": f"t{i}"} for i in range(1, 1002)]
    file = write(tmp_path, "jsonl", [{"text": "t0"}, *more])
    assert pick_examples(file, False, {1000}) == read_examples(file, False)[1000:1001]
    assert pick_examples(file, False, {1000})[0].text == "t1000"


def test_a_file_whose_name_is_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "a"}')
    assert read_examples(str(tmp_path / "A.JSONL"), True)[0].text == "a"


def test_a_long_csv_cell(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert read_examples(write(tmp_path, "csv", [{"text": text}]), True)[0].text == text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_csv(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.csv").write_bytes(f'text{end}a{end}"b{end}c"{end}'.encode())
    assert [e.text for e in read_examples(str(tmp_path / "a.csv"), True)] == ["a", f"b{end}c"]


def test_line_separators_within_json_are_no_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\r\n'.encode())
    assert [e.text for e in read_examples(str(file), True)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": '{"text": "a"}\n', "a.json": '[{"text": "a"}]', "a.csv": "text\na\n"}[name]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [e.text for e in read_examples(str(tmp_path / name), True)] == ["a"]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    message = error_of(tmp_path / "trian.jsonl")
    assert "data file not found" in message and "train.jsonl" in message and "held_out" not in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "a.jsonl holds no examples"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no examples"),
        ("a.csv", b"", "a.csv holds no examples"),
        ("a.csv", b"prompt,completion\n", "a.csv holds no examples"),
        ("a.json", b"[]", "a.json holds no examples"),
        ("a.json", b"", "a.json: not valid JSON"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json: not valid JSON: .*line 2 column 9"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "a.json: not valid JSON: .*belongs in a .jsonl file"),
        ("a.json", b'{"data": [{"text": "a"}]}', "a.json: expected a JSON list of records"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "a.jsonl:2: not valid JSON: .*delimiter"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl:2 is not UTF-8 text"),
        ("a.csv", b"text\na\nb\ncaf\xe9\n", "a.csv:4 is not UTF-8 text"),
        ("a.json", b'[{"text":\n "caf\xe9"}]', "a.json:2 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b", "completion": "c"}', "a.jsonl:2: is prompt/completion.*are text"),
        (
            "a.jsonl",
            b'{"question": "a", "answer": "b"}',
            r"a.jsonl:1: found question, answer; expected.*prompt \+ compl",
        ),
        ("a.jsonl", b'"just text"', "a.jsonl:1: found str; expected one of"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: found list; expected one of"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text is int, expected text"),
        ("a.jsonl", rb'{"text": "half \ud83d"}', "a.jsonl:1: text holds half a character"),
        ("a.jsonl", b'{"prompt": "a", "completion": null}', "a.jsonl:1: completion is NoneType, expected text"),
        ("a.jsonl", b'{"instruction": "a", "input": ["b"], "output": "c"}', "a.jsonl:1: input is list, expected text"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1: expected a list of turns, with at least one"),
        ("a.jsonl", b'{"messages": {"role": "user"}}', "a.jsonl:1: expected a list of turns"),
        ("a.jsonl", b'{"messages": ["Hi"]}', "a.jsonl:1: a turn is str, expected role and content"),
        ("a.jsonl", b'{"messages": [{"role": "asistant", "content": "a"}]}', "a.jsonl:1: role 'asistant'; .*assistant"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', "a.jsonl:1: role None; expected one of"),
        ("a.jsonl", b'{"messages": [{"role": ["user"], "content": "a"}]}', r"a.jsonl:1: role \['user'\]"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{}]}]}',
            "a.jsonl:1: content of a user turn is a list, in w",
        ),
        ("a.jsonl", b'{"messages": [{"role": "assistant"}]}', "a.jsonl:1: content of a assistant turn is NoneType"),
        ("a.csv", b"prompt,completion\na,b\nc\nd,e\n", "a.csv:3: has more or fewer fields than the header"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", "a.csv:3: has more or fewer fields than the header"),
        ("a.csv", b'messages\n"[{"\n', "a.csv:2: not valid JSON"),
        ("a.txt", b"text", "a.txt: expected .jsonl, .json, .csv or .parquet"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not valid Parquet"),
    ],
)
def test_errors(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(expected, error_of(tmp_path / name))


def test_truncated_parquet(tmp_path: Path) -> None:
    whole = Path(write(tmp_path, "parquet", [{"text": f"text {i}"} for i in range(100)])).read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        assert "cut.parquet is not valid Parquet" in error_of(tmp_path / "cut.parquet")


def test_problems_come_in_one_error(tmp_path: Path) -> None:
    lines = ['{"text": "good"}'] * 30
    lines[3], lines[8] = '{"text": 1}', "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    message = error_of(tmp_path / "a.jsonl")
    assert "a.jsonl:4: text is int" in message and "a.jsonl:9: not valid JSON" in message and "more" not in message
    lines[10:] = ['{"tekst": "a"}'] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    message = error_of(tmp_path / "a.jsonl")
    assert (
        re.search(r"\n  20 records: found tekst; .*; first \S+a.jsonl:11$", message) and message.count("a.jsonl:") == 3
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines[10:]))
    assert re.search(r"all 20 records: found tekst; .*; first \S+a.jsonl:1$", error_of(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({str(n): 1}) for n in range(12)))
    message = error_of(tmp_path / "a.jsonl")
    assert message.count("a.jsonl:") == 10 and message.endswith("... and 2 more")


def test_a_list_in_pieces_is_what_json_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and the place of what is wrong, whatever is read at once."""
    values = [{"a": [1, 2.5, -3e-7, None]}, {}, [], 'a"]}\u00e9,\n', 12345, 1.5, True, {"b": {"c": "d" * 50}}]
    values += ["half \ud83d", "\ud83d\ude42", 2**80, float("inf"), 5e-324, -0.0, [[[[]]]]]
    whole = json.dumps(values, indent=1) + "\n "
    broken = [whole[:i] + mark + whole[i + 1 :] for i in range(0, len(whole), 3) for mark in ("", ",", '"', "]", "x")]
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(json_list, "PIECE", size)
        for text in (whole, " []", *broken):
            try:
                expected, where = json.loads(text), ""
            except json.JSONDecodeError as error:
                expected, where = None, f"line {error.lineno} column {error.colno}"
            if expected is None:
                with pytest.raises(ValueError, match=f"not valid JSON: .*{where}$"):
                    list(read_items(io.StringIO(text)))
            elif isinstance(expected, list):
                assert list(read_items(io.StringIO(text))) == expected
