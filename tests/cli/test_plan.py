"""`esft plan` through the command line."""

from __future__ import annotations

import pytest

from tests.command import esft, esft_json

ARGUMENTS = ("plan", "tiny-moe", "--device", "cpu", "--set", "data.max_length=64")


def test_a_table_for_people() -> None:
    result = esft(*ARGUMENTS, "--memory", "100MB", "--processes", 2, "--load-in", "4bit")
    assert result.returncode == 0, result.stderr
    for words in (
        "5,073,440",
        "routed experts",
        "fewest experts",
        "most experts",
        "peak memory",
        "delta on disk",
        "does not fit",
        "selection=selection.json",
        "sharded (FSDP2), each",
        "expert parallel, each",
        "esft profile --stream",
        "the least",
        "esft profile: with the model in memory",
        "stay in bfloat16",
        "train.jsonl is no file here",
        "several processes: computed, not measured",
    ):
        assert words in result.stdout, words


def test_one_object_for_machines() -> None:
    found = esft_json(*ARGUMENTS, "--method", "full")
    assert found["method"] == "full"
    assert found["many"] == found["few"]
    assert found["many"]["trained"] == found["total"] == 5_073_440
    assert found["peak"] == found["many"]["memory"]["peak"] > 16 * 5_073_440
    assert found["fit"] is None


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (("--memory", "lots"), "--memory lots"),
        (("--processes", "0"), "--processes 0"),
        (("--method", "most"), "method"),
        (("--scores", "absent.json"), "absent.json"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: tuple[str, ...], about: str) -> None:
    result = esft(*ARGUMENTS, *arguments)
    assert result.returncode == 1
    assert about in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
