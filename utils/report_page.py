"""The report as one HTML page that loads nothing: tables as text, figures as embedded SVG."""

import base64
from argparse import Namespace
from html import escape

from .flags import planned_epochs, reported_levels
from .report_figures import Plot
from .report_runs import Experiment, Found, Section
from .report_tables import (
    IN_SOURCE,
    Table,
    accuracy_of,
    count,
    dense_note,
    duration,
    percent,
    remarks,
    signed,
    silent_note,
    with_n,
)

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #595959; --page: #ffffff; --line: #d4d4d4; --head: #f3f3f3;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --soft: #a8a8a8; --page: #161616; --line: #3d3d3d;
  --head: #242424; --link: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 76rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page); overflow-wrap: break-word; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .6rem; }
h1 { margin-top: .5rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p, li { max-width: 46rem; }
.notes { color: var(--soft); font-size: .875rem; }
.box { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }
thead th { background: var(--head); }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); white-space: normal; min-width: 7rem;
  max-width: 13rem; }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure img { width: 100%; max-width: 27rem; height: auto; display: block; background: #fff; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(.915) hue-rotate(180deg); } }
figcaption { font-size: .875rem; color: var(--soft); max-width: 27rem; margin-top: .4rem; }
figcaption b { color: var(--text); }
details { margin: .4rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
code { font-size: .875em; overflow-wrap: anywhere; }
td code { white-space: pre-wrap; }
"""


def page(
    runs: list[Found],
    damaged: dict[str, str],
    sections: list[Section],
    tables: dict[str, list[Table]],
    plots: dict[str, list[Plot]],
) -> str:
    """The whole page.

    Args:
        runs: all that could be read.
        damaged: what is wrong with the others, by folder.
        sections: the experiments.
        tables: by a section's slug; the last is the list of every ticket.
        plots: by a section's slug, and under ``""`` those over all sections.
    """
    parts = [
        f"<header><h1>Lottery tickets in spiking networks: {len(runs)} runs</h1>",
        _summary(runs, damaged, sections),
    ]
    parts += [_table(_overview(section), heading=section.title) for section in sections]
    parts.append("</header>\n<main>")
    for section in sections:
        parts.append(f'<section id="{escape(section.slug)}"><h2>{escape(section.title)}</h2>')
        parts.append(_list(remarks(section), "notes"))
        *first, last = tables[section.slug] or [None]
        parts += [_table(table) for table in first]
        parts.append(_figures(plots[section.slug]))
        if last:
            parts.append(f"<details><summary>{escape(last.title)}</summary>{_table(last, heading='')}</details>")
        parts.append("</section>")
    if plots[""]:
        parts.append(f"<section><h2>Over all data sets and networks</h2>{_figures(plots[''])}</section>")
    parts.append(_unfinished(runs))
    if damaged:
        lines = [f"<li><code>{escape(folder)}</code>: {escape(line)}</li>" for folder, line in damaged.items()]
        parts.append(f'<section id="damaged"><h2>Left out: damaged</h2><ul>{"".join(lines)}</ul></section>')
    parts.append('<section id="runs"><h2>Every run and its configuration</h2>')
    parts += [_configuration(run) for run in runs]
    parts.append("</section></main>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Lottery tickets in spiking networks: {len(runs)} runs</title>\n<style>{STYLE}</style>\n</head>\n"
        + "<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _summary(runs: list[Found], damaged: dict[str, str], sections: list[Section]) -> str:
    finished = sum(run.finished for run in runs)
    experiments = sum(len(section.experiments) for section in sections)
    text = f"{finished} of {len(runs)} runs are finished; they are {experiments} experiments"
    text += f" on {len(sections)} combinations of data set, network and size." if len(sections) > 1 else "."
    links = "".join(f'<li><a href="#{escape(s.slug)}">{escape(s.title)}</a></li>' for s in sections)
    if finished < len(runs):
        links += f'<li><a href="#unfinished">{len(runs) - finished} not finished</a></li>'
    if damaged:
        links += f'<li><a href="#damaged">{len(damaged)} left out: damaged</a></li>'
    links += '<li><a href="#runs">every run and its configuration</a></li>'
    note = (
        "n is the number of rounds behind a number; ± is their sample standard deviation. Sparsity is of the prunable "
        "weights, T the timesteps of an image."
    )
    return f'<p>{escape(text)}</p><nav><ul>{links}</ul></nav><p class="notes">{escape(note)}</p>'


def _overview(section: Section) -> Table:
    """A line per experiment: its sparsest ticket."""
    rows = []
    for experiment in section.experiments:
        if not experiment.cells:
            rows.append([[experiment.label], ["no ticket yet"], [], [], []])
            continue
        cell = experiment.cells[-1]
        accuracy, seconds = cell.spread("test_accuracy"), cell.spread("search_seconds")
        row = [[experiment.label], [percent(cell.column)], [with_n(accuracy_of(cell), accuracy)]]
        dense = section.dense(experiment.ann)
        there = dense is not None and cell is not dense
        row.append([signed(accuracy.mean - dense.spread("test_accuracy").mean)] if there else [])
        row.append([_cost(experiment, cell.spread("search_timestep_epochs"), seconds)])
        rows.append(row)
    head = ["method", "sparsest ticket", "its accuracy (%)", "against dense", "its search"]
    notes = dense_note(section)
    notes += silent_note([experiment.cells[-1] for experiment in section.experiments if experiment.cells])
    return Table("Sparsest tickets", head, rows, notes)


def _cost(experiment: Experiment, cost, seconds) -> str:
    if not experiment.searches:
        return IN_SOURCE
    return f"{duration(seconds)}, {count(cost)} epochs x T" if cost.mean else "no training"


def _table(table: Table, heading: str | None = None) -> str:
    """A table in a box of its own that scrolls, with a heading and its notes."""
    heading = table.title if heading is None else heading
    over = ""
    if table.groups:
        cells = "".join(f'<th colspan="{span}" scope="colgroup">{escape(name)}</th>' for name, span in table.groups)
        over = f"<tr>{cells}</tr>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    body = []
    for first, *others in table.rows:
        body.append(
            f'<tr><th scope="row">{_lines(first)}</th>' + "".join(f"<td>{_lines(c)}</td>" for c in others) + "</tr>"
        )
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    table_of = f"<table><thead>{over}<tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return (f"<h3>{escape(heading)}</h3>" if heading else "") + _box(heading or table.title, table_of) + notes


def _box(label: str, table: str) -> str:
    """A table that scrolls in a box of its own, with the keyboard too."""
    return f'<div class="box" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def _lines(cell: list[str]) -> str:
    return "".join(escape(line) if i == 0 else f"<small>{escape(line)}</small>" for i, line in enumerate(cell))


def _list(lines: list[str], name: str) -> str:
    return f'<ul class="{name}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _figures(plots: list[Plot]) -> str:
    figures = []
    for plot in plots:
        data = base64.b64encode(plot.svg.encode()).decode()
        figures.append(
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(plot.alt)}">'
            f"<figcaption><b>{escape(plot.title.split(':')[0])}.</b> {escape(plot.caption)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _unfinished(runs: list[Found]) -> str:
    lines = []
    for run in runs:
        if not run.finished:
            lines.append(f"<li><code>{escape(run.folder)}</code>: {escape(_progress(run))}</li>")
    if not lines:
        return ""
    return f'<section id="unfinished"><h2>Not finished</h2><ul>{"".join(lines)}</ul></section>'


def _progress(run: Found) -> str:
    """How far a run has come, as far as its flags say what was planned."""
    text = f"{len(run.rows)} epochs"
    try:
        search, train = planned_epochs(Namespace(**run.args))
        text += f" of {'at most ' if run.args['method'].endswith('earlybird') else ''}{search + train}"
        text += f", {len(run.results)} of {len(reported_levels(Namespace(**run.args)))} tickets"
    except (TypeError, AttributeError):
        text += f", {len(run.results)} tickets"
    return text


def _configuration(run: Found) -> str:
    state = "finished" if run.finished else "not finished"
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td><code>{escape(_text(value))}</code></td></tr>'
        for name, value in sorted(run.noted.items())
    )
    table = _box(f"configuration of {run.folder}", f"<table><tbody>{rows}</tbody></table>")
    return f"<details><summary><code>{escape(run.folder)}</code>, {state}</summary>{table}</details>"


def _text(value) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {inner}" for name, inner in value.items())
    return str(value)
