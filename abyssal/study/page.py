"""Studies as one HTML file: pictures inside, no script, nothing fetched; readable offline and from the last row."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from abyssal.study.page_style import STYLE
from abyssal.study.result import Grid, Picture, Result
from abyssal.study.verdicts import KINDS, OPEN, REFUTED, SHOWN, counted, verdicts

_MARKS = {SHOWN: "✓", OPEN: "?", REFUTED: "✗"}
_CLASSES = {SHOWN: "yes", OPEN: "open", REFUTED: "no"}


def page(results: Sequence[Result], title: str, failed: Mapping[str, str] | None = None) -> str:
    """The whole document, one section a study, in their order; a study whose title is the document's says it once.

    Of several, what came of each and of every claim stands first. `failed`: why studies that are missing are.
    """
    many = len(results) + len(failed or {}) > 1
    first = f"{_navigation(results)}{_overview(results, failed or {})}" if many else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{first}\n{''.join(_study(r, r.title != title) for r in results)}</body>\n</html>\n"
    )


# ---- what stands first where there are several --------------------------------------------------------------------


def _navigation(results: Sequence[Result]) -> str:
    """Stays at the top of the window."""
    links = "".join(f'<a href="#{escape(r.name)}">{escape(r.name)}</a>' for r in results)
    return f'<nav><a href="#studies">studies</a><a href="#claims">claims</a>{links}</nav>\n'


def _overview(results: Sequence[Result], failed: Mapping[str, str]) -> str:
    every_claim = {r.name: verdicts(r) for r in results}
    said = {name: counted(own) for name, own in every_claim.items()}
    rows = "".join(
        f'<tr><td class="word"><a href="#{escape(r.name)}">{escape(r.title)}</a></td>{_counts(said[r.name])}'
        f"<td>{len(r.seeds)}</td><td>{duration(r.seconds)}</td></tr>\n"
        for r in results
    )
    rows += "".join(
        f'<tr><td class="word">{escape(name)}</td><td class="word" colspan="5"><b class="no">failed</b> '
        f"{escape(why)}</td></tr>\n"
        for name, why in failed.items()
    )
    every = {kind: sum(of_study[kind] for of_study in said.values()) for kind in KINDS}
    seconds = sum(r.seconds for r in results)
    machines = sorted(
        {f"{r.machine['device']}, {r.machine['threads']} thread{'s' * (r.machine['threads'] != 1)}" for r in results}
    )
    total = f'<tr class="total"><td class="word">all</td>{_counts(every)}<td></td><td>{duration(seconds)}</td></tr>'
    kinds = "".join(f'<th class="{_CLASSES[kind]}">{_MARKS[kind]} {kind}</th>' for kind in KINDS)
    head = f'<tr><th class="word">study</th>{kinds}<th>seeds</th><th>took</th></tr>'
    note = "Claims. Shown: the runs below bear it out, and chance is an unlikely cause. Not resolved: they are too "
    note += "few, or too small, to tell. Not so: they say otherwise, at this size. "
    note += _by_chance(sum(verdict.by_interval for own in every_claim.values() for verdict in own))
    note += f"Made on {escape('; '.join(machines))}." if machines else ""
    return (
        f'<section id="studies"><div class="scroll"><table><thead>{head}</thead><tbody>{rows}{total}</tbody></table>'
        f'</div><p class="note">{note}</p></section>\n{_claims(results)}'
    )


def _by_chance(intervals: int) -> str:
    """How many claims of those judged by an interval chance alone would resolve."""
    if not intervals:
        return ""
    most = f"about {0.05 * intervals:.0f}" if 0.05 * intervals >= 1 else "fewer than one"
    return (
        f"{intervals} claim{'s are' if intervals > 1 else ' is'} judged by 95% intervals: were there nothing to find, "
        f"chance alone would resolve {most} of them, as shown or as not so. "
    )


def _claims(results: Sequence[Result]) -> str:
    """A row a claim."""
    rows = ""
    for r in results:
        said = verdicts(r)
        for i, verdict in enumerate(said):
            link = f'<a href="#{escape(r.name)}">{escape(r.name)}</a>'
            name = f'<td class="word" rowspan="{len(said)}">{link}</td>' if i == 0 else ""
            where = f'<span class="where"> {escape(verdict.where)}</span>'
            first = ' class="first"' if i == 0 else ""
            rows += f'<tr{first}>{name}<td class="word">{escape(verdict.says)}{where}</td>'
            rows += f'<td class="word verdict">{_mark(verdict.kind, verdict.verdict)}</td></tr>\n'
    head = '<tr><th class="word">study</th><th class="word">claim</th><th class="word">here</th></tr>'
    return (
        '<section id="claims"><h2>Every claim, and what became of it here</h2><div class="scroll"><table>'
        f"<thead>{head}</thead><tbody>{rows}</tbody></table></div></section>\n"
    )


def _mark(kind: str, told: str) -> str:
    """A sign and a word, so that no one needs the colour."""
    return f'<b class="{_CLASSES[kind]}">{_MARKS[kind]} {escape(told.lower())}</b>'


def _counts(of: Mapping[str, int]) -> str:
    """A cell a kind, empty for none."""
    return "".join(f'<td class="{_CLASSES[kind]}">{of[kind] or ""}</td>' for kind in KINDS)


def duration(seconds: float) -> str:
    """`41 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ---- a study ------------------------------------------------------------------------------------------------------


def _study(r: Result, titled: bool) -> str:
    shown = "".join(f"<li>{escape(line)}</li>" for line in r.shown)
    missing = "".join(f"<li>{escape(line)}</li>" for line in r.not_shown)
    parts = [
        f'<section id="{escape(r.name)}">',
        f"<h2>{escape(r.title)}</h2>" if titled else "",
        f"<blockquote><p>{escape(r.claim)}</p></blockquote>",
        *map(_picture, r.pictures[:1]),  # before the words: it is what a room looks at
        f"<p>What this run shows:</p><ul>{shown}</ul>" if shown else "",
        f'<div class="missing"><p>What it does not show:</p><ul>{missing}</ul></div>' if missing else "",
        *map(_picture, r.pictures[1:]),
        *map(_grid, r.grids),
        f'<p class="cost"><code>{escape(r.command)}</code><br>{escape(r.cost())}</p>\n</section>\n',
    ]
    return "\n".join(part for part in parts if part)


def _picture(p: Picture) -> str:
    data, caption = base64.b64encode(p.png).decode(), escape(p.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _grid(g: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="word"' if i < g.labels else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for c, k in zip(cells, kinds)) + "</tr>\n"

    body = "".join(row(cells, "td") for cells in g.rows)
    note = f'<p class="note">{escape(g.note)}</p>' if g.note else ""
    head = f"<caption>{escape(g.title)}</caption><thead>{row(g.head, 'th')}</thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>{note}'
