"""The page: one HTML file that holds everything it shows and needs no network.

No scripts: charts are SVG, tooltips and folding are the browser's own. Every text that comes from a
file, a folder's name or a class's name passes `escape`.
"""

import base64
import datetime
import html
from collections.abc import Sequence
from importlib.resources import files

from ffcv_imnet.core.names import shown
from ffcv_imnet.core.units import duration
from ffcv_imnet.report import charts
from ffcv_imnet.report.charts import DARK, LIGHT, Chart, Palette
from ffcv_imnet.report.evaluation import Evaluated
from ffcv_imnet.report.runs import (
    Group,
    Run,
    best,
    differing_settings,
    origin,
    percent,
    reached,
    target,
    time_spent,
)

WORST = 12  # classes of the matrix
BARS = 24  # classes of the bars; all of them if there are no more


def escape(text: str) -> str:
    """One line of HTML text: its own characters, and what could not be shown there, escaped."""
    return html.escape(shown(text))


def write_page(
    groups: Sequence[Group], evaluated: Sequence[Evaluated | str], tables: Sequence[tuple[str, str]]
) -> str:
    """The whole page.

    Args:
        groups: what a colour stands for.
        evaluated: for each group its best run's checkpoint evaluated, or why there is none.
        tables: each run's name, and its epochs as text.
    """
    title = " and ".join(g.name for g in groups) if len(groups) < 3 else f"{len(groups)} recipes"
    parts = [
        _heading(groups, title),
        f'<div class="cards{" one" if len(groups) == 1 else ""}">'
        f"{''.join(map(_card, range(len(groups)), groups))}</div>",
        _section("Accuracy, loss and plan", _curves_note(groups), _two(groups_curves(groups))),
        _norms(groups),
        _section("Time", "", _two(groups_time(groups), _parts_legend(groups))),
        _differences(groups),
        *_evaluated(groups, evaluated),
        _epochs(tables),
        _section("Provenance", "", "".join(_provenance(run) for g in groups for run in g.runs)),
    ]
    style = files("ffcv_imnet.report").joinpath("page.css").read_text(encoding="utf-8")
    style = style.replace("/*light*/", _variables(LIGHT)).replace("/*dark*/", _variables(DARK))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}: training report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(part for part in parts if part)}</main>\n</body>\n</html>\n"
    )


def _variables(palette: Palette) -> str:
    return " ".join(f"{name}: {colour};" for name, colour in palette.variables().items())


# ---- charts -------------------------------------------------------------------------------------


def groups_curves(groups: Sequence[Group]) -> list[Chart]:
    """Against epochs, and against minutes."""
    return [charts.curves(groups, "epochs"), charts.curves(groups, "minutes")]


def groups_time(groups: Sequence[Group]) -> list[Chart]:
    """Throughput, and where the time went."""
    return [charts.throughput(groups), charts.where_time_went(groups)]


def groups_norms(groups: Sequence[Group]) -> list[Chart]:
    """Of gradients and of updates, for each parameter group; none where no log has them."""
    return [charts.norms(groups, part) for part in charts.norm_parts(groups)]


def evaluated_charts(groups: Sequence[Group], evaluated: Sequence[Evaluated | str]) -> list[Chart]:
    """Bars of the classes for all that were evaluated, and a matrix for each."""
    there = [(i, j) for i, j in enumerate(evaluated) if isinstance(j, Evaluated)]
    if not there:
        return []
    first = there[0][1]
    alike = [(i, j) for i, j in there if j.names == first.names]
    colours = [i for i, _ in alike]
    bars = charts.class_bars(first.names, [j.top_1 for _, j in alike], colours, BARS)
    return [bars, *(charts.confusion(j.names, worst(j), j.counts, i) for i, j in there)]


def worst(evaluated: Evaluated) -> list[int]:
    """The classes of the lowest top-1, worst first."""
    top_1 = evaluated.top_1
    return sorted(range(len(top_1)), key=lambda i: (top_1[i], i))[:WORST]


def _parts_legend(groups: Sequence[Group]) -> str:
    """What the colours of the bars of time mean."""
    spent = [time_spent(run.log) for group in groups for run in group.runs]
    items = (
        f'<span><i class="p{i}"></i>{part}</span>'
        for i, part in enumerate(charts.PARTS)
        if any(parts[part] for parts in spent)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _svg(chart: Chart) -> str:
    """Both sizes; the style sheet shows one of them."""
    return "".join(charts.to_svg(chart, size, f"{chart.name}-{size}-") for size in charts.WIDTHS)


def _two(two: Sequence[Chart], under_last: str = "") -> str:
    figures = [f"<figure>{_svg(chart)}" for chart in two]
    figures[-1] += under_last
    return '<div class="grid">' + "".join(f"{figure}</figure>" for figure in figures) + "</div>"


# ---- sections -----------------------------------------------------------------------------------


def _section(title: str, note: str, content: str) -> str:
    small = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{content}</section>\n"


def _heading(groups: Sequence[Group], title: str) -> str:
    runs = [run for group in groups for run in group.runs]
    started = [header.started[:10] for run in runs for header in run.log.headers[:1]]
    days = sorted(set(started))
    when = escape(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}") if days else ""
    count = f"{len(runs)} runs" if len(runs) > 1 else "one run"
    written = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="note">{count}{", " if when else ""}{when} · written {written}</p></header>\n'
    )


def _card(number: int, group: Group) -> str:
    """A group's result in one large number, and what it took."""
    logs = [run.log for run in group.runs]
    hits = [hit for log in logs if (hit := reached(log))]
    goal = target(logs[0])
    facts: list[tuple[str, str]] = []
    if goal:
        times = sorted(hit.elapsed_seconds for hit in hits)
        took = f"{duration(times[0])} to {duration(times[-1])}" if len(times) > 1 else ""
        took = f"after {took or duration(times[0])}" if times else "not reached"
        share = f", {len(hits)} of {len(logs)} runs" if len(logs) > 1 else ""
        facts.append((f"target {100 * goal:g} %", took + share))
    top_5 = [max(max(e.top_5, e.ema_top_5 or 0.0) for e in log.epochs) for log in logs]
    elapsed = [log.epochs[-1].elapsed_seconds for log in logs]
    done = [log for log in logs if log.summary is not None]
    rate = [e.images_per_second for log in logs for e in log.epochs]
    spent = [time_spent(log) for log in logs]
    waited = sum(s["loader"] for s in spent) / sum(elapsed)
    ended = "" if len(done) == len(logs) else f", {len(logs) - len(done)} not finished"
    facts += [
        ("top-5", percent(top_5)),
        ("epochs", f"{max(len(log.epochs) for log in logs)}{ended}"),
        ("time", duration(sum(elapsed) / len(elapsed)) + (" a run" if len(logs) > 1 else "")),
        ("images/s", f"{min(rate):,.0f} to {max(rate):,.0f}"),
        ("waiting for data", f"{waited:.1%}".replace("%", " % of the time")),
    ]
    many = f'<span class="tag">{len(logs)} seeds</span>' if len(logs) > 1 else ""
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    number_text = percent([best(log)[0] for log in logs])
    main, _, rest = number_text.partition(" ±")
    deviation = f"<small>±{escape(rest)}</small>" if rest else ""
    return (
        f'<article><div><h3><i class="s{number % 6}"></i>{escape(group.name)}{many}</h3>'
        f'<p class="big">{escape(main)} {deviation}</p><p class="note">best top-1'
        f"{', mean and standard deviation' if rest else ', one seed'}</p></div><dl>{listed}</dl>"
        f'<p class="note">{escape(origin(logs[0]))}</p></article>'
    )


def _curves_note(groups: Sequence[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    band = (
        "Lines are means over the seeds, bands go from the lowest to the highest. "
        if several
        else ""
    )
    ring = any(reached(run.log) for group in groups for run in group.runs)
    crossing = "A ring marks where a run reached its target. " if ring else ""
    return f"{_legend(groups)}{band}{crossing}Point at a dot to read it."


def _legend(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        return ""
    items = (f'<span><i class="s{i % 6}"></i>{escape(g.name)}</span>' for i, g in enumerate(groups))
    return f'<span class="legend">{"".join(items)}</span>'


def _norms(groups: Sequence[Group]) -> str:
    drawn = groups_norms(groups)
    if not drawn:
        return ""
    several = any(len(group.runs) > 1 for group in groups)
    seed = "Of each recipe the first seed. " if several else ""
    note = (
        f"{_legend(groups)}{seed}muon: the kernels that Muon moves; sgd: other parameters of two and more "
        "dimensions; sgd_1d: those of BatchNorm and biases; soap, soap_1d: the same two where SOAP moves all."
    )
    return _section("Gradients and updates", note, _two(drawn))


def _differences(groups: Sequence[Group]) -> str:
    rows = differing_settings(groups) if len(groups) > 1 else {}
    if not rows:
        return ""
    head = "".join(
        f'<th><i class="s{i % 6}"></i>{escape(g.name)}</th>' for i, g in enumerate(groups)
    )
    body = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for key, values in rows.items()
    )
    table = f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
    return _section("Settings that differ", "", table)


def _evaluated(groups: Sequence[Group], evaluated: Sequence[Evaluated | str]) -> list[str]:
    missing = [
        f"{escape(g.name)}: {escape(j)}" for g, j in zip(groups, evaluated, strict=True)
        if isinstance(j, str)
    ]  # fmt: skip
    drawn = evaluated_charts(groups, evaluated)
    if not drawn:
        return [_section("Classes", "Not evaluated. " + ". ".join(missing), "")]
    there = [(g, j) for g, j in zip(groups, evaluated, strict=True) if isinstance(j, Evaluated)]
    total = len(there[0][1].names)
    which = f"The {BARS} worst of {total:,} classes." if total > BARS else "Worst first."
    note = f"{_legend(groups)}{which} {'. '.join(missing)}"
    titles = ["Confusions"]
    if len(groups) > 1:
        titles = [
            f'<i class="s{groups.index(g) % 6}"></i>Confusions: {escape(g.name)}' for g, _ in there
        ]
    matrices = "".join(
        f"<figure><h3>{title}</h3>{_svg(chart)}</figure>"
        for title, chart in zip(titles, drawn[1:], strict=True)
    )
    bars = f"<figure><h3>Top-1 of each class</h3>{_svg(drawn[0])}</figure>"
    note += " In a matrix a row is the true class, its cells the percentage taken for each column."
    sections = [_section("Classes", note, f'<div class="grid">{bars}{matrices}</div>')]
    for group, result in there:
        sections.append(_sheet(group, result, len(there) > 1))
    return sections


def _sheet(group: Group, evaluated: Evaluated, several: bool) -> str:
    images = "".join(
        f'<figure><img alt="image {m.index} of the validation set" '
        f'src="data:image/jpeg;base64,{base64.b64encode(m.jpeg).decode()}"><figcaption>'
        f"<b>{escape(m.prediction)}</b> {100 * m.confidence:.0f} %<br>is {escape(m.label)}"
        "</figcaption></figure>"
        for m in evaluated.mistakes
    )
    total = int(evaluated.counts.sum() - evaluated.counts.trace())
    title = f"Wrong predictions: {group.name}" if several else "Wrong predictions"
    note = f"The {len(evaluated.mistakes)} most confident of {total:,}, at most three of a class first."
    return _section(title, note, f'<div class="sheet">{images}</div>')


def _epochs(tables: Sequence[tuple[str, str]]) -> str:
    folded = "".join(
        f"<details><summary>{escape(name)}</summary>"
        f'<pre class="scroll">{html.escape(text)}</pre></details>'
        for name, text in tables
    )
    return _section("Every epoch", "", folded)


def _provenance(run: Run) -> str:
    """How a run came about: machine, versions, data."""
    if not run.log.headers:
        return ""
    header = run.log.headers[-1]
    rows = {
        "run": str(run.path), "started": header.started, "device": header.device,
        "precision": header.precision, "processes": str(header.world_size),
        "commit": header.git_commit or "unknown",
        "versions": ", ".join(f"{k} {v}" for k, v in header.versions.items()),
    }  # fmt: skip
    for name, data in header.manifests.items():
        rows[name] = ", ".join(f"{k} {v}" for k, v in data.items())
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return (
        f"<details><summary>{escape(run.name)}</summary>"
        f'<div class="scroll"><table class="facts">{body}</table></div></details>'
    )
