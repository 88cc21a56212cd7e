"""A report of a comparison, a run or a profile: a page, Markdown, pictures and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft import __version__
from esft.comparison.records import FILE as COMPARISON
from esft.comparison.records import read_comparison
from esft.errors import EsftError
from esft.files import write_text
from esft.report.comparison_page import comparison_page
from esft.report.html import page_html
from esft.report.markdown import page_markdown
from esft.report.page import Page
from esft.report.profile_page import profile_page
from esft.report.run_folder import RunFolder
from esft.report.run_page import run_page
from esft.run.folder import RECIPE, SCORES, SELECTION
from esft.scores import Scores
from esft.selection import Selection

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


@dataclass(frozen=True)
class Report:
    """The files of a report.

    Attributes:
        kind: `comparison`, `run` or `profile`.
        html: the page; it needs no file beside it.
        markdown: the same as Markdown; it links the pictures.
        figures: the folder of the pictures, each as `.svg` and `.csv`.
        pictures: how many there are.
    """

    kind: str
    html: Path
    markdown: Path
    figures: Path
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        files = {name: str(getattr(self, name)) for name in ("html", "markdown", "figures")}
        return {"kind": self.kind, **files, "pictures": self.pictures}


def write_report(
    path: str | Path, out: str | Path | None = None, *, selection: str | Path | None = None
) -> Report:
    """Write `report.html`, `report.md` and `figures/` of what was measured.

    Args:
        path: a comparison's folder, a run's, or a scores file or a folder with one.
        out: folder of the report; made if missing, and an earlier report in it is replaced. None:
            the comparison's, run's or profile's own folder; beside a scores file, a folder called
            after it.
        selection: a file whose experts are outlined in a profile's report; in a folder with
            scores, None takes its `selection.json`.

    Raises:
        EsftError: there is nothing to report on at `path`, or a file there is damaged.
        SelectionError: the selection is not one of the profile's model.
        OutputError: the report cannot be written.
    """
    path = Path(path)
    folder = Path(out) if out is not None else _beside(path)
    page = _page(path, folder, None if selection is None else Path(selection))
    # All of it before the first file: a picture that cannot be drawn leaves no half of a report.
    html, markdown = page_html(page), page_markdown(page)
    charts = list(page.charts)
    for chart in charts:
        chart.write(folder / FIGURES)
    write_text(folder / MARKDOWN, markdown)
    write_text(folder / HTML, html)
    return Report(page.kind, folder / HTML, folder / MARKDOWN, folder / FIGURES, len(charts))


def _page(path: Path, out: Path, selection: Path | None) -> Page:
    made_by = f"esft {__version__}"
    folder = path if path.is_dir() else path.parent
    compared = path.name == COMPARISON or (path / COMPARISON).is_file()
    if selection is not None and (compared or (path / RECIPE).is_file()):
        raise EsftError(f"--selection {selection}: it goes with scores; a run has its own")
    if compared:
        return comparison_page(read_comparison(path), folder, out, made_by)
    if (path / RECIPE).is_file():
        return run_page(RunFolder.read(path), made_by)
    scores = path / SCORES if path.is_dir() else path
    if not scores.is_file():
        raise EsftError(
            f"{path}: nothing to report on; expected a comparison's folder (comparison.json), a "
            f"run's (recipe.yaml), or scores (scores.json, from esft profile)"
        )
    if selection is None and path.is_dir() and (path / SELECTION).is_file():
        selection = path / SELECTION
    chosen = None if selection is None else Selection.read(selection)
    return profile_page(Scores.read(scores), chosen, made_by)


def _beside(path: Path) -> Path:
    if path.is_dir():
        return path
    return path.parent if path.name == COMPARISON else path.with_name(f"{path.stem}-report")
