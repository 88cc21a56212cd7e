"""Sources: files, folders, data sets of the hub; what is said of them, and what identifies them."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esft.data.bad_rows import BadRows
from esft.data.hub import read_hub
from esft.data.rows import read_rows
from esft.data.sources import Source, identity, is_local, read_source, read_sources
from esft.errors import DataError
from esft.locating import TINY_MOE_FOLDER
from tests.command import python_process
from tests.dataset_hub import NAME, served
from tests.notes import Notes


def texts(path: Path, *values: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    data = "".join(json.dumps({"text": value}) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, **options: Any) -> list[str]:
    return [row.text for row in read_rows(Source(str(path), **options))]


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_source(Source(str(path), **options))
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(path))


# Files


def test_the_format_is_said(tmp_path: Path) -> None:
    path, notes = texts(tmp_path / "a.jsonl", *"ab"), Notes()
    assert len(read_rows(path, reporter=notes)) == 2
    path.write_text('{"prompt": "2+2=", "completion": "4"}\n' * 1000 + "x\n" * 2)
    found = read_source(Source(str(path)), bad_rows=BadRows(2), reporter=notes)
    assert found.format == "prompt-completion"
    assert notes.notes == [
        f"{path}: text, 2 rows",
        f"{path}: prompt-completion, 1,000 rows, 2 bad rows skipped",
    ]


def test_a_named_format_decides(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "prompt": "b", "completion": "c"}\n')
    assert "fits the formats prompt-completion (`completion`) and text" in refused(path)
    assert read(path, format="text") == ["a"]
    assert read_rows(Source(str(path), format="prompt-completion"))[0].completion == "c"


def test_an_unknown_format() -> None:
    with pytest.raises(DataError, match=r'^--format "mesages": .*; did you mean "messages"\?'):
        Source("a.jsonl", format="mesages")  # type: ignore[arg-type]


def test_mixed_formats_name_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n{"text": "b"}\n{"prompt": "b", "completion": "c"}\n')
    said = f":4: a row with prompt-completion, but {path}:2 has text; one source has one format"
    assert refused(path) == said


def test_a_row_that_is_skipped_does_not_decide_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n{"text": "b"}\n{"text": "c"}\n')
    rows = read_rows(path, bad_rows=BadRows(1))
    assert [row.text for row in rows] == ["b", "c"]


def test_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": 1}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path, bad_rows=BadRows(2))
    assert str(caught.value) == (
        f"{path}: not one row can be used (the last: {path}:2: `text` is a number; expected a "
        f"string)"
    )


def test_options_that_are_for_others(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a")
    assert refused(path, split="train") == (
        ": split (--split) is for folders and data sets of the hub"
    )
    assert refused(path, config="main") == ": config (--config) is for data sets of the hub"


# Folders


def test_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder, notes = tmp_path / "data", Notes()
    texts(folder / "b-00001.jsonl.gz", "c")
    texts(folder / "a-00000.jsonl", "a", "b")
    for name in ("README.md", "cover.png", ".hidden.jsonl"):
        (folder / name).write_text("x")
    (folder / "more").mkdir()
    rows = read_rows(folder, reporter=notes)
    assert [row.text for row in rows] == ["a", "b", "c"]
    assert rows[2].where == f"{folder}/b-00001.jsonl.gz:1"
    assert notes.notes == [f"{folder}: text, 3 rows, 2 files, ignored README.md, cover.png, more"]


def test_files_of_several_splits_are_not_read_as_one(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        texts(tmp_path / f"{name}.jsonl", name)
    assert refused(tmp_path) == (
        ": has files of the splits test, train; say which with split (--split), or name a file"
    )
    assert len(read(tmp_path, split="train")) == 2
    assert read(tmp_path, split="test") == ["test"]
    assert refused(tmp_path, split="tr") == ": no data file whose name begins with the split 'tr'"


def test_one_split_needs_no_name(tmp_path: Path) -> None:
    texts(tmp_path / "train_1.jsonl", "a")
    texts(tmp_path / "train_2.jsonl", "b")
    texts(tmp_path / "trainer.jsonl", "c")
    assert read(tmp_path) == ["a", "b", "c"]
    assert read(tmp_path, split="train") == ["a", "b"]


def test_folders_that_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(": no data files in this folder")
    texts(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.csv").write_text("text\nb\n")
    assert refused(tmp_path) == (": has files of several kinds (a.jsonl, b.csv); name one of them")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert "save_to_disk" in refused(tmp_path)


def test_one_format_in_all_files_of_a_folder(tmp_path: Path) -> None:
    texts(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_text('{"input_ids": [1]}\n')
    assert refused(tmp_path) == (
        f"/b.jsonl:1: a row with tokenized, but {tmp_path}/a.jsonl:1 has text; one source has one "
        f"format"
    )


# Several sources


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", *"ab"), texts(tmp_path / "b.jsonl", *"cd")
    rows = read_sources([Source(str(b)), Source(str(a)), Source(str(b))])
    assert "".join(row.text for row in rows) == "cdabcd"


def test_sources_may_have_different_formats(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a"), tmp_path / "b.jsonl"
    b.write_text('{"input_ids": [1]}\n')
    assert [row.format for row in read_sources([Source(str(a)), Source(str(b))])] == [
        "text",
        "tokenized",
    ]


def test_a_mixture(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", *"abcdefgh"), texts(tmp_path / "b.jsonl", *"01234")
    sources, notes = [Source(str(a), weight=0.5), Source(str(b))], Notes()
    rows = read_sources(sources, reporter=notes)
    # 5 of b are two thirds.
    drawn = [row.text for row in rows]
    assert sum(text.isalpha() for text in drawn) == 2
    assert sorted(text for text in drawn if text.isdigit()) == list("01234")
    assert notes.notes[2:] == [
        f"{a}: 2 of the mixture's 7 rows, of 8 (weight 0.5 of 1.5)",
        f"{b}: 5 of the mixture's 7 rows, of 5 (weight 1 of 1.5)",
    ]
    assert rows == read_sources(sources)
    assert rows != read_sources(sources, seed=1)
    every = [row.text for row in read_sources(sources, strategy="all_exhausted")]
    assert set(every) == set("abcdefgh01234")
    assert sum(text.isalpha() for text in every) == 8
    assert len(every) == 24


def test_a_weight_that_leaves_a_source_without_a_row(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a"), texts(tmp_path / "b.jsonl", "b")
    with pytest.raises(DataError, match="gives it none of the 1 rows"):
        read_sources([Source(str(a), weight=100), Source(str(b), weight=1)])


# What identifies a source


def test_the_bytes_of_each_file_identify_a_source(tmp_path: Path) -> None:
    folder, other = tmp_path / "a", tmp_path / "b"
    for name in ("1.jsonl", "2.jsonl"):
        texts(folder / name, name)
    shutil.copytree(folder, other)
    same = identity(Source(str(folder)))
    assert identity(Source(str(other))) == same
    file = folder / "1.jsonl"
    assert identity(Source(str(file))) == same["1"]
    assert identity(Source(str(file), weight=2)) != identity(Source(str(file), weight=1))
    assert identity(Source(str(file), format="text")) != same["1"]
    texts(other / "2.jsonl", "changed")
    assert identity(Source(str(other))) != same
    with pytest.raises(DataError, match="no such data file"):
        identity(Source(str(tmp_path / "gone.jsonl")))


# The hub


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("owner/name", False),
        ("owner/name.v2", False),
        ("owner/train.jsonl", True),
        ("owner/name.csv.gz", True),
        ("name", True),
        ("./owner/name", True),
        ("/owner/name", True),
        ("~/name", True),
        ("a/b/c", True),
    ],
)
def test_what_may_be_a_data_set_of_the_hub(path: str, local: bool) -> None:
    assert is_local(path) == local


def test_what_is_there_is_local(tmp_path: Path) -> None:
    assert not is_local("owner/name", tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name", tmp_path)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository as on the hub; `datasets` reads a folder like one."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    texts(folder / "data" / "train-00000-of-00002.jsonl", "a", "b")
    texts(folder / "data" / "train-00001-of-00002.jsonl", "c")
    texts(folder / "data" / "test-00000-of-00001.jsonl", "d")
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
        yield folder


def hub(repository: Path, *choice: str | None) -> list[tuple[str, Any]]:
    config, split = choice
    return [
        (where.removeprefix(str(repository)), value)
        for where, value in read_hub(str(repository), config, split)
    ]


def test_a_split(repository: Path) -> None:
    rows = hub(repository, None, "train")
    assert rows == [(f":train[{i}]", {"text": "abc"[i]}) for i in range(3)]
    assert hub(repository, "default", "test") == [(":default:test[0]", {"text": "d"})]


def test_a_split_is_not_guessed(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has the splits train, test; say which.*\(--split\)"):
        hub(repository, None, None)
    texts(tmp_path / "only" / "train.jsonl", "a")
    assert hub(tmp_path / "only", None, None) == [(":train[0]", {"text": "a"})]


@pytest.mark.parametrize("choice", [(None, "validation"), ("french", "train")])
def test_a_split_or_configuration_that_is_not_there(repository: Path, choice: Any) -> None:
    with pytest.raises(DataError, match="cannot load this data set: ") as caught:
        hub(repository, *choice)
    assert (choice[0] or choice[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


READ = """
import sys
from esft.data.rows import read_rows
from esft.data.sources import Source
from esft.errors import DataError

for name, split in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print([(row.where, row.text) for row in read_rows(Source(name, split=split or None))])
    except DataError as error:
        print(error)
"""


def test_data_sets_of_the_hub(tmp_path: Path) -> None:
    """Downloaded, found in the cache without network, or refused for what the hub says."""
    asked = [NAME, "train", NAME, "", NAME, "dev", "someone/missing", "", "someone/gated", ""]
    with served() as endpoint:
        online = python_process(
            *("-c", READ, *asked), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint
        )
    assert online.returncode == 0, online.stderr
    rows, splits, no_split, missing, gated = online.stdout.splitlines()
    assert rows == "[('owner/name:train[0]', 'a'), ('owner/name:train[1]', 'b')]"
    assert splits.startswith("owner/name: has the splits train, test; say which, as in data.train:")
    assert no_split.startswith('owner/name: cannot load this data set: Unknown split "dev"')
    assert missing.startswith("someone/missing: no such file or folder, and no such data set on")
    assert gated.startswith("someone/gated: the hub gives this data set only to those who accepted")
    assert "hf auth login" in gated
    offline = python_process(
        *("-c", READ, NAME, "train", "someone/missing", ""),
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    cached, missing = offline.stdout.splitlines()
    assert cached == rows
    assert missing.startswith(
        "someone/missing: no such file or folder, and the hub cannot be reached and has no cached"
    )


# What ships


def test_what_ships_with_tiny_moe_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = TINY_MOE_FOLDER / "tasks" / "dates" / "test.jsonl"
    shipped = Source("tiny-moe:tasks/dates/test.jsonl")
    assert [row.prompt for row in read_source(shipped).rows] == [
        json.loads(line)["prompt"] for line in file.read_text().splitlines()
    ]
    assert identity(shipped) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert is_local(shipped.path)
    with pytest.raises(DataError, match=r"tasks/dtes/test\.jsonl: no such data file"):
        read_source(Source("tiny-moe:tasks/dtes/test.jsonl"))
