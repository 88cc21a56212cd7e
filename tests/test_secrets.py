"""What is taken for a secret, and what is not."""

from __future__ import annotations

import pytest

from esft.errors import RecipeError
from esft.progress import ConsoleReporter
from esft.recipe import make_recipe
from esft.secrets import HIDDEN, has_secret, redact

HF = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12345678"  # of the form; never given to anyone


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HF, HIDDEN),
        (f"token={HF}, twice {HF}.", f"token={HIDDEN}, twice {HIDDEN}."),
        ("https://me:swordfish@host/a and x@y", f"https://{HIDDEN}@host/a and x@y"),
        ("ftp://swordfish@host", f"ftp://{HIDDEN}@host"),
        ("api_org_AbCdEfGhIjKlMnOpQrStUv", HIDDEN),
        ("the key is 0123456789abcdef0123", f"the key is {HIDDEN}"),
        ("0123456789abcdef0123456789", HIDDEN),
    ],
)
def test_secrets(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("LONGER_TOKEN", "0123456789abcdef0123456789")  # the other's is within it
    assert redact(text) == shown
    assert has_secret(text)


def test_notes_show_none(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter().note(f"the token {HF}")
    assert capsys.readouterr().err == f"the token {HIDDEN}\n"


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_TOKEN", "1024")
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/someone/token/of/the/hub")
    for text in (
        "someone/hf_model, hf_hub, 1024 tokens, postgres",
        "https://huggingface.co/someone/model@main",
        "/home/someone/token/of/the/hub",
        "mail someone@example.org about http://example.org",
    ):
        assert redact(text) == text
    recipe = make_recipe({"model": "someone/hf_model", "data": {"train": "postgres@1024.jsonl"}})
    assert recipe.model == "someone/hf_model"
    with pytest.raises(RecipeError, match=r"^model: holds an access token or a password"):
        make_recipe({"model": f"a/{HF}", "data": {"train": "x.jsonl"}})
