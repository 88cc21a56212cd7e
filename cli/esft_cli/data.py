"""`esft data`: look at task sets before training on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output, recipe_options

if TYPE_CHECKING:
    from rich.text import Text

    from esft.data.preview import ShownRow
    from esft.data.statistics import SetStatistics
    from esft.previewing import Preview

app = typer.Typer(no_args_is_help=True)

_LEARNT, _SPECIAL, _WEIGHT = "black on green", "cyan", "magenta"


@app.callback()
def data() -> None:
    """Look at task sets before training on them."""


@app.command("preview")
def preview(
    recipe: recipe_options.RecipeOrModel,
    data: recipe_options.Data = None,
    eval_: recipe_options.Eval = None,
    rows: Annotated[int, typer.Option(help="Show so many rows.", metavar="N")] = 3,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw them by chance; without it the first ones.", metavar="N"),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Also count: tokens, what is learnt, lengths, what is there twice."
        ),
    ] = False,
    set_: recipe_options.Set = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Show rows as the model will see them, and which of their tokens it learns.

    What is learnt is coloured; without colours it stands in {+ +}, and special tokens in {= =}.
    """
    from esft.previewing import preview_data
    from esft.recipe_text import Override

    chosen: list[str | Override] = list(set_ or [])
    if eval_ is not None:
        chosen.append(Override("--eval", ("data", "eval"), eval_))
    resolved = recipe_options.resolved(recipe, data, chosen)
    found = preview_data(
        resolved, rows=rows, seed=seed, statistics=stats, reporter=output.reporter()
    )
    if json:
        output.print_json(found.to_dict())
        return
    _print(found)


def _print(found: Preview) -> None:
    console = output.console()
    coloured = console.color_system is not None and not console.no_color
    if found.rows and not coloured:
        console.print("{+learnt+} {=special token=}", markup=False, soft_wrap=True)
    for row in found.rows:
        tokens = f"{len(row.input_ids):,} tokens, {row.learnt:,} learnt"
        console.print(f"\n{row.where}: {tokens}", markup=False, soft_wrap=True)
        shown = _coloured(row) if coloured else row.marked()
        console.print(shown, markup=False, soft_wrap=not coloured)
    if found.statistics is not None:
        console.print()
        _print_statistics(found, found.statistics)


def _coloured(row: ShownRow) -> Text:
    from rich.text import Text

    text = Text()
    weight = 1.0
    for segment in row.segments:
        if segment.learnt and segment.weight != weight:
            weight = segment.weight
            text.append(f"x{weight:g}:", _WEIGHT)
        style = _LEARNT if segment.learnt else _SPECIAL if segment.special else ""
        # A line break has no colour of its own.
        shown = segment.text.replace("\n", "\\n\n") if segment.learnt else segment.text
        text.append(shown, f"bold {style}" if segment.special else style)
    return text


def _print_statistics(found: Preview, figures: SetStatistics) -> None:
    console = output.console()
    table = output.table("statistics", "", "")
    for name, text in _facts(found, figures):
        table.add_row(name, text)
    console.print(table)
    console.print()
    bins = figures.lengths.bins
    most = max(bin.rows for bin in bins)
    histogram = output.table("rows by length in tokens", ">", ">", "")
    for bin in bins:
        name = f"{bin.shortest:,}-{bin.longest:,}" if bin.longest > bin.shortest else "1"
        bar = "#" * -(-bin.rows * min(40, console.width // 3) // most)
        long = " > max_length" if bin.shortest > figures.max_length else ""
        histogram.add_row(name, output.count(bin.rows), bar + long)
    console.print(histogram)


def _facts(found: Preview, figures: SetStatistics) -> Iterator[tuple[str, str]]:
    for kind, sources in (("train", found.sources), ("eval", found.eval_sources)):
        for read in sources:
            rows = f"{output.count(len(read.rows))} rows"
            yield kind, f"{read.source.path}: {read.format}, {rows}"
    yield "rows trained on", output.count(figures.rows)
    yield "tokens", output.count(figures.tokens)
    weighted = ", with weights" if figures.weighted else ""
    learnt = f"{output.count(figures.supervised)} tokens"
    yield "learnt", f"{learnt} ({output.share(figures.supervised / figures.tokens)}){weighted}"
    lengths = figures.lengths
    yield "lengths", f"{lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}"
    yield "percentiles", ", ".join(f"{name} {at:,}" for name, at in lengths.percentiles.items())
    yield "above max_length", f"{output.count(figures.too_long)} rows (of {figures.max_length:,})"
    done = {name.replace("_", " "): n for name, n in figures.truncation.items() if name != "rows"}
    yield "truncation", ", ".join(f"{name} {count:,}" for name, count in done.items())
    yield "bad rows skipped", output.count(len(found.skipped))
    yield "duplicates", f"{output.count(figures.duplicates)} rows repeat an earlier one"
    if figures.blocks is not None:
        blocks = f"{output.count(figures.blocks)} of {figures.max_length:,} tokens"
        yield "blocks", f"{blocks}, {output.share(figures.fill)} filled"
    if found.eval_sources:
        yield "test rows", output.count(figures.eval_rows)
        yield "also trained on", f"{output.count(figures.overlap)} of the test rows"
