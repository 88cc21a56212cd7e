"""The pictures of one run: its experts and its routing, from the files in its folder."""

from __future__ import annotations

from pathlib import Path

from esft.report.chart import Chart
from esft.report.charts.experts import expert_map
from esft.report.charts.routing import routing_change, selected_share
from esft.report.charts.text import file_name
from esft.report.profile_page import MEANINGS
from esft.run.folder import ROUTING_AFTER, ROUTING_BEFORE, SCORES, SELECTION
from esft.scores import Scores
from esft.selection import Selection


def chosen_experts(run: Path, of: str = "") -> Chart | None:
    """Draw the scores that a run selected its experts by; None if it took none.

    Args:
        run: its folder.
        of: what is added to the picture's title and name, where a report has several runs.

    Raises:
        SelectionError: a file is damaged.
    """
    if not (run / SCORES).is_file() or not (run / SELECTION).is_file():
        return None
    selection = Selection.read(run / SELECTION)
    metric = str(selection.rule.get("metric", "token"))
    return expert_map(
        Scores.read(run / SCORES),
        name=_name("experts", of),
        title=_title(f"Each expert's share of its layer by {MEANINGS[metric]}", of),
        selection=selection,
        metric=metric,
    )


def changed_routing(run: Path, of: str = "") -> list[Chart]:
    """Draw the routing before training and after it; nothing if the run did not profile it.

    Args:
        run: its folder.
        of: as for `chosen_experts`.

    Raises:
        SelectionError: a file is damaged.
    """
    if not all((run / name).is_file() for name in (ROUTING_BEFORE, ROUTING_AFTER, SELECTION)):
        return []
    before, after = Scores.read(run / ROUTING_BEFORE), Scores.read(run / ROUTING_AFTER)
    selection = Selection.read(run / SELECTION)
    return [
        selected_share(
            before,
            after,
            selection,
            name=_name("selected-share", of),
            title=_title("The selected experts' share of the gate values", of),
        ),
        routing_change(
            before,
            after,
            name=_name("routing-change", of),
            title=_title("How each expert's share of the gate values changed", of),
            selection=selection,
        ),
    ]


def _name(name: str, of: str) -> str:
    return file_name(name, of) if of else name


def _title(title: str, of: str) -> str:
    return f"{of}: {title[:1].lower()}{title[1:]}" if of else title
