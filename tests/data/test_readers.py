"""Files of every kind: what is read from them, and how their faults are named."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from esft.data import readers, streams
from esft.data.bad_rows import BadRows
from esft.data.readers import read_file
from esft.errors import DataError, EsftError

ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": 'a "b",\n\nc', "completion": "é\u2028"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
MARK = b"\xef\xbb\xbf"


def read(path: Path, skip: int = 0) -> tuple[list[Any], list[str]]:
    """Return a file's rows with their places, and the places of those that were skipped."""
    bad_rows = BadRows(skip)
    rows = [(where.removeprefix(str(path)), value) for where, value in read_file(path, bad_rows)]
    return rows, [row["where"].removeprefix(str(path)) for row in bad_rows.skipped]


def refused(path: Path, skip: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        read(path, skip)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def frames(*parts: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


# JSON lines, compressed or not


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:7], mtime=0) + gzip.compress(LINES[7:], mtime=0)),
        ("a.jsonl.zst", frames(LINES)),
        ("a.jsonl.zst", frames(LINES[:7], b"", LINES[7:])),
        ("a.json.gz", gzip.compress(LINES, mtime=0)),
    ],
)
def test_lines(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(written(tmp_path, name, data))[0] == [(":1", ROWS[0]), (":2", ROWS[1])]


def test_much_compressed_data(tmp_path: Path) -> None:
    lines = b"".join(b'{"n": %d}\n' % n for n in range(50_000))
    for name, data in (
        ("a.jsonl.zst", frames(lines)),
        ("a.jsonl.gz", gzip.compress(lines, mtime=0)),
    ):
        rows, _ = read(written(tmp_path, name, data))
        assert [value["n"] for _, value in rows] == list(range(50_000))


@pytest.mark.parametrize("kept", [1, 5, 20, -1])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_data_that_is_cut_off(tmp_path: Path, name: str, kept: int) -> None:
    whole = gzip.compress(LINES, mtime=0) if name.endswith("gz") else frames(LINES)
    said = refused(written(tmp_path, name, whole[:kept]))
    assert said.startswith(": the compressed data is damaged or cut off")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_data_that_is_not(tmp_path: Path, name: str) -> None:
    assert refused(written(tmp_path, name, LINES)).startswith(": the compressed data is damaged")


def test_a_line_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LONGEST_LINE", 1000)
    long = b'{"x": "' + b"a" * 5000 + b'"}\n'
    first = LINES.splitlines(keepends=True)[0]
    path = written(tmp_path, "a.jsonl", first + long + first + b"b" * 3000)
    assert refused(path).startswith(":2: a line of more than")
    rows, skipped = read(path, skip=2)
    assert [where for where, _ in rows] == [":1", ":3"]
    assert skipped == [":2", ":4"]
    path = written(tmp_path, "a.csv", b"x\n" + long)
    assert "line 2 has more than" in refused(path, skip=9)


# A JSON list


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", MARK, b"\n  "])
def test_a_list(tmp_path: Path, indent: Any, mark: bytes) -> None:
    path = written(tmp_path, "a.json", mark + json.dumps(ROWS, indent=indent).encode())
    assert read(path)[0] == [("[0]", ROWS[0]), ("[1]", ROWS[1])]


def test_an_item_that_is_no_object(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps([ROWS[0], 7, ROWS[1], None]).encode())
    assert refused(path).startswith("[1]: a number, not an object")
    rows, skipped = read(path, skip=2)
    assert rows == [("[0]", ROWS[0]), ("[2]", ROWS[1])]
    assert skipped == ["[1]", "[3]"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[{"a": 1},\n {"a": 2]', ":2: not JSON: Expecting ',' delimiter at column 9"),
        (b'[{"a": 1},\n\n', ":3: not JSON: "),
        (b"[] []", ":1: not JSON: Extra data at column 4"),
        (b'[\n"\xe9"]', ":2: not UTF-8: byte 0xe9"),
        (b"[" * 100_000, ": not usable JSON"),
    ],
)
def test_a_list_that_is_broken_has_no_rows_to_skip(tmp_path: Path, data: bytes, said: str) -> None:
    assert refused(written(tmp_path, "a.json", data), skip=9).startswith(said)


# CSV


def test_csv_as_rfc_4180_has_it(tmp_path: Path) -> None:
    text = 'prompt,completion\r\n2+2=,4\r\n"a ""b"",\n\nc","é\u2028"\r\n'
    path = written(tmp_path, "a.csv", text.encode())
    assert read(path)[0] == [(":2", ROWS[0]), (":3", ROWS[1])]
    path = written(tmp_path, "a.csv", MARK + text.replace("\r", "").rstrip().encode())
    assert read(path)[0] == [(":2", ROWS[0]), (":3", ROWS[1])]
    path = written(tmp_path, "a.csv.gz", gzip.compress(text.encode(), mtime=0))
    assert [value for _, value in read(path)[0]] == ROWS


def test_lines_of_csv_count_those_inside_records(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b'\ntext\n"a\nb"\n\nc\n"d\n\n"\ne\n')
    rows, _ = read(path)
    assert rows == [
        (":3", {"text": "a\nb"}),
        (":6", {"text": "c"}),
        (":7", {"text": "d\n\n"}),
        (":10", {"text": "e"}),
    ]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")),
            min_size=2,
            max_size=2,
        ),
        max_size=5,
    )
)
def test_what_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[list[str]]
) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["a", "b"], *records])
    path = written(tmp_path_factory.getbasetemp(), "a.csv", out.getvalue().encode())
    assert [list(value.values()) for _, value in read(path)[0]] == records


def test_cells_with_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'a "b"'}]
    out = io.StringIO()
    csv.writer(out).writerows(
        [["messages", "tools", "text"], [json.dumps(turns), "", ""], ["[", "", "x"]]
    )
    path = written(tmp_path, "a.csv", out.getvalue().encode())
    assert refused(path).startswith(":3: `messages` is text that is not JSON")
    assert read(path, skip=1) == ([(":2", {"messages": turns, "text": ""})], [":3"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a,b\n1,2\n3\n4,5\n", ":3: 1 fields, but the first line names 2 columns"),
        (b"a,b\n1,2\n3,4,5\n6,7\n", ":3: 3 fields, but the first line names 2 columns"),
        (b'a,b\n1,2\n"3"x,4\n5,6\n', ":3: not CSV: "),
        (b"a,b\n1,2\n\xe9,4\n5,6\n", ":3: not UTF-8: byte 0xe9 at column 1"),
        (b"a,b\n1,2\n3,x\0\n5,6\n", ":3: a NUL byte"),
    ],
)
def test_a_bad_record(tmp_path: Path, data: bytes, said: str) -> None:
    path = written(tmp_path, "a.csv", data)
    assert refused(path).startswith(said)
    rows, skipped = read(path, skip=1)
    assert [where for where, _ in rows] == [":2", ":4"]
    assert skipped == [":3"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a,a\n1,2\n", ":1: two columns are called 'a'"),
        (b"\xe9,b\n1,2\n", ":1: not UTF-8"),
        (b'a,b\n1,"2\n3,4\n5,6\n', ": the record of line 2 opens a quote that is never closed"),
    ],
)
def test_csv_that_cannot_be_read_on(tmp_path: Path, data: bytes, said: str) -> None:
    assert refused(written(tmp_path, "a.csv", data), skip=9).startswith(said)


def test_an_index_without_a_name_as_pandas_writes_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b",prompt,completion\n0,2+2=,4\n")
    assert read(path)[0] == [(":2", {"": "0", **ROWS[0]})]


# Parquet


def table(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "é"} for n in range(2500)]
    found, _ = read(table(tmp_path, rows, row_group_size=700))
    assert found == [(f"[{n}]", row) for n, row in enumerate(rows)]


def test_what_a_row_lacks_is_not_null(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "sub", "arguments": {"b": 2}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "tool_calls": [call]},
            ]
        },
        {"text": "x", "messages": [{"role": "assistant", "tool_calls": [call, other]}]},
        {"input_ids": [1, 2]},
    ]
    path = tmp_path / "a.parquet"
    # As `datasets` and pandas write it: every key that any row has.
    keys = ["text", "messages", "input_ids"]
    parquet.write_table(
        pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]), path
    )
    assert [value for _, value in read(path)[0]] == rows


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_damaged_parquet(tmp_path: Path, kept: int) -> None:
    path = table(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:kept])
    assert refused(path).startswith(": not a usable Parquet file: ")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(place=st.integers(0, 1000), byte=st.integers(0, 255))
def test_parquet_with_a_byte_changed_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = table(tmp_path_factory.getbasetemp(), ROWS)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    try:
        said = read(path)[0][0][0]
    except EsftError as error:
        said = str(error).removeprefix(str(path))
    assert said.startswith((":", "["))


# Files


def test_names_that_say_nothing(tmp_path: Path) -> None:
    for name in ("a", "a.txt", "a.gz", "a.jsonl.bz2", "a.tsv"):
        said = refused(written(tmp_path, name, LINES))
        assert said.startswith(": not known as a data file by its name; expected one that ends in")
        assert not readers.is_data_file(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path / name) == ": no such data file"
    (tmp_path / name).mkdir()
    assert refused(tmp_path / name) == ": cannot read this data file: Is a directory"
