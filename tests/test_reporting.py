"""Reports as files: what is in them, of what they are made, what they refuse."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import statistics
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import esft
from esft.comparison.records import FILE
from esft.errors import DataError, EsftError, SelectionError
from esft.report.run_folder import RunFolder
from esft.reporting import Report
from esft.run.folder import METRICS, RECIPE, RESULT, SCORES, SELECTION
from esft.selection import Selection
from tests import reported
from tests.command import esft as command
from tests.command import esft_json, refusal
from tests.comparisons import comparison


class _Tables(html.parser.HTMLParser):
    """The bodies of a page's tables by caption, as rows of text; and the page's links."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self._rows: list[list[str]] = []
        self._place = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._caption = ""
        elif tag == "tbody":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "a":
            self.links.append(dict(attrs)["href"] or "")
        if tag in ("caption", "td", "th"):
            self._place = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "td", "th"):
            self._place = ""
        elif tag == "table":
            self.tables[self._caption.strip()] = [
                [" ".join(cell.split()) for cell in row] for row in self._rows
            ]

    def handle_data(self, data: str) -> None:
        if self._place == "caption":
            self._caption += data
        elif self._place:
            self._rows[-1][-1] += data


def _markdown(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def _texts(tokens: list[Token]) -> list[str]:
    """Return what a reader sees of each paragraph, heading and cell."""
    return [
        "".join(child.content for child in token.children or [] if child.type == "text")
        for token in tokens
        if token.type == "inline"
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "a b (1)"
    methods = ["esft-token", "lora", "full"]
    comparison(["dates", "sums"], methods, evaluations=0, domains=["code"]).write(folder)
    return folder


@pytest.fixture(scope="module")
def written(compared: Path) -> Report:
    return esft.write_report(compared, compared.parent / "out")


def test_every_number_of_the_summary_can_be_traced(compared: Path, written: Report) -> None:
    assert written.kind == "comparison"
    found = _Tables(written.html)
    records = _records(compared)
    # The mean in the summary is that of the runs that the appendix lists as chosen.
    runs = found.tables["Runs, in the order in which they were planned"]
    listed = [row for row in runs if row[1:3] == ["dates", "esft-token"] and row[-1] == "chosen"]
    scores = [float(row[5].removesuffix(" %")) for row in listed]
    (summary,) = [row for row in found.tables["What methods score and keep"] if "esft-token" in row]
    shown, spread = (float(part.strip("†")) for part in summary[1].split(" ± "))
    assert len(scores) == 3
    assert shown == pytest.approx(statistics.fmean(scores), abs=0.11)
    assert spread == pytest.approx(statistics.stdev(scores), abs=0.11)
    # Each row of the appendix leads to its run.
    links = [link for link in found.links if not link.startswith(("#", "figures/"))]
    assert [(written.html.parent / unquote(link)).resolve() for link in links[-len(records) :]] == [
        (compared / record["folder"]).resolve() for record in records
    ]
    assert len(runs) == len(records)


def _records(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / FILE).read_text())["records"]


def test_the_best_is_bold_and_marks_are_explained(written: Report) -> None:
    page = written.html.read_text()
    assert re.findall(r"<b>([\d.]+)</b>", page)
    assert 'class="mark">†<' in page
    assert "†: differs from it by more than the spread" in page


def test_failed_runs_are_told_with_their_reasons(compared: Path, written: Report) -> None:
    found = _Tables(written.html)
    failed = found.tables["Runs that failed"]
    reasons = {row[-1] for row in failed}
    assert reasons == {
        "out of memory: 3.1 GB needed, 2.0 GB free",
        "the loss is not a number <at step 3>",
    }
    records = _records(compared)
    assert len(failed) == sum(record["error"] is not None for record in records)


def test_the_markdown_says_the_same(written: Report) -> None:
    tokens = _markdown(written.markdown)
    assert not [token for token in tokens if token.type == "html_block"]
    texts = _texts(tokens)
    for caption, rows in _Tables(written.html).tables.items():
        assert caption in texts
        for row in rows:
            for cell in row:
                assert cell in texts, (caption, cell)


def test_the_markdown_of_attacking_names(tmp_path: Path) -> None:
    reported.save_profile(tmp_path, hostile=True)
    written = esft.write_report(tmp_path)
    tokens = _markdown(written.markdown)
    inside = [child for token in tokens for child in token.children or []]
    assert not [token for token in (*tokens, *inside) if token.type.startswith("html")]
    assert f"Experts of {reported.HOSTILE} on" in " ".join(_texts(tokens))
    images = [child for child in inside if child.type == "image"]
    assert len(images) == written.pictures == 3
    for image in images:
        assert (written.markdown.parent / unquote(str(image.attrs["src"]))).is_file()


@pytest.mark.parametrize("ended", [True, False])
def test_a_run(tmp_path: Path, ended: bool) -> None:
    reported.save_run(tmp_path / "run", ended=ended)
    written = esft.write_report(tmp_path / "run")
    assert written.html == tmp_path / "run" / "report.html"
    text, found = written.html.read_text(), _Tables(written.html)
    evaluations = found.tables["Evaluations"]
    assert [row[0] for row in evaluations] == ["0", "20", "40"]
    assert evaluations[2][2:] == ["80.0 %", "86.7 %", "0.4000", "0.9750"]
    assert ("400.0 MB" in text) == ended
    assert ("There is no result.json" in text) != ended
    if ended:
        kept = found.tables["Held-out loss of other domains"]
        assert ["english", "1.0000", "1.1000", "+0.1000"] in kept
        assert ["mean", "0.9000", "0.9750", "+0.0750"] in kept
    with open(written.figures / "training-loss-dates.csv", newline="") as file:
        drawn = {int(row["step"]): float(row["training_loss"]) for row in csv.DictReader(file)}
    assert drawn == {step: 3 / step for step in (5, 10, 20, 25, 30, 40)}


def test_a_run_that_was_just_started(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text("model: tiny-moe\nmethod: full\ndata: {train: a.jsonl}\n")
    written = esft.write_report(tmp_path)
    assert written.pictures == 0
    assert "it has logged 0 steps" in written.html.read_text()


def test_the_last_line_of_a_log_may_be_half_written(tmp_path: Path) -> None:
    reported.save_run(tmp_path)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 45, "lo')
    assert RunFolder.read(tmp_path).losses[-1][0] == 40
    with open(tmp_path / METRICS, "a") as file:
        file.write('\n{"step": 50, "loss": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:10: "):
        RunFolder.read(tmp_path)


def test_a_step_that_a_resumed_run_did_twice_counts_once(tmp_path: Path) -> None:
    reported.save_run(tmp_path)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 30, "loss": 7.5}\n')
    losses = dict(RunFolder.read(tmp_path).losses)
    assert list(losses) == [5, 10, 20, 25, 30, 40]
    assert losses[30] == 7.5


def test_a_profile_and_its_selection(tmp_path: Path) -> None:
    reported.save_profile(tmp_path / "profile")
    selection = reported.selection()
    written = esft.write_report(tmp_path / "profile")
    tables = _Tables(written.html).tables
    rows, layers = tables["Selected experts"], tables["Routing of each layer"]
    scores = reported.scores()
    for row, (layer, ids) in zip(rows, selection.experts.items(), strict=True):
        held = 100 * sum(scores.layers[layer].token[expert] for expert in ids)
        assert row == [str(layer), f"{held:.1f} %", ", ".join(map(str, ids))]
        gate = scores.layers[layer].gate
        best = max(range(len(gate)), key=gate.__getitem__)
        (routing,) = (row for row in layers if row[0] == str(layer))
        assert routing[6] == f"{100 * gate[best] / sum(gate):.1f} % (expert {best})"
    with open(written.figures / "experts-token.csv", newline="") as file:
        outlined = {
            (int(row["layer"]), int(row["expert"]))
            for row in csv.DictReader(file)
            if row["selected"] in ("1", "True", "true")
        }
    assert outlined == {(layer, e) for layer, ids in selection.experts.items() for e in ids}


def test_scores_alone_with_a_selection_by_name(tmp_path: Path) -> None:
    reported.save_profile(tmp_path)
    alone = esft.write_report(tmp_path / SCORES)
    assert alone.html == tmp_path / "scores-report" / "report.html"
    assert "Selected experts" not in alone.html.read_text()
    given = esft.write_report(tmp_path / SCORES, tmp_path / "b", selection=tmp_path / SELECTION)
    assert "Selected experts" in given.html.read_text()


def test_a_report_is_the_same_each_time(tmp_path: Path) -> None:
    reported.save_profile(tmp_path)
    one, two = (esft.write_report(tmp_path, tmp_path / name) for name in "ab")
    for name in ("report.html", "report.md", "figures/experts-token.svg"):
        assert (one.html.parent / name).read_bytes() == (two.html.parent / name).read_bytes()


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(EsftError, match="nothing to report on"):
        esft.write_report(tmp_path)
    with pytest.raises(EsftError, match="nothing to report on"):
        esft.write_report(tmp_path / "nowhere")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE).write_text("{}")
    with pytest.raises(DataError, match="not a comparison"):
        esft.write_report(tmp_path / "c")
    run = reported.save_run(tmp_path / "run")
    with pytest.raises(EsftError, match="a run has its own"):
        esft.write_report(run, selection=run / SELECTION)
    (run / RESULT).write_text("[]")
    with pytest.raises(DataError, match=r"result\.json: not the result of a run"):
        esft.write_report(run)
    profile = reported.save_profile(tmp_path / "profile")
    Selection({99: [0]}).write(tmp_path / "other.json")
    with pytest.raises(SelectionError, match="layer 99"):
        esft.write_report(profile, selection=tmp_path / "other.json")
    # Nothing is left of a report that could not be made.
    assert not [*tmp_path.rglob("report.*"), *tmp_path.rglob("figures")]


def test_the_command(tmp_path: Path) -> None:
    reported.save_profile(tmp_path)
    found = esft_json("report", tmp_path, "--out", tmp_path / "out")
    assert found == {
        "kind": "profile",
        "html": str(tmp_path / "out" / "report.html"),
        "markdown": str(tmp_path / "out" / "report.md"),
        "figures": str(tmp_path / "out" / "figures"),
        "pictures": 3,
    }
    shown = command("report", tmp_path / SCORES, "--selection", tmp_path / SELECTION)
    assert shown.stdout.startswith(f"report on a profile: {tmp_path / 'scores-report'}")
    assert "nothing to report on" in refusal("report", tmp_path / "nowhere")
