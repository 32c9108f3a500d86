"""Studies as one HTML file: pictures inside, no script, nothing fetched; readable offline and from the last row."""

import base64
from collections.abc import Sequence
from html import escape

from abyssal.study.result import Grid, Picture, Result

_STYLE = """
:root { color-scheme: light dark; --faint: #8884; }
body { font: 1.15rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 2.2rem; line-height: 1.2; } h2 { font-size: 1.7rem; margin-top: 4rem; }
blockquote { margin: 1rem 0; padding: .2rem 1.2rem; border-left: .3rem solid #36c; font-style: italic; }
figure { margin: 2rem 0; } figure img { width: 100%; background: #fff; border-radius: .3rem; }
figcaption, .note, .cost { font-size: .95rem; opacity: .75; }
.scroll { overflow-x: auto; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 1rem; }
caption { text-align: left; font-weight: 600; font-size: 1.15rem; padding-bottom: .4rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top; }
td:not(.word) { white-space: nowrap; }
th.word, td.word { text-align: left; }
.missing { border-left: .3rem solid #d80; padding-left: 1.2rem; }
code { font-size: .95rem; overflow-wrap: anywhere; }
@media print { h2 { break-before: page; } }
"""


def page(results: Sequence[Result], title: str) -> str:
    """The whole document, one section a study, in their order; a study whose title is the document's says it once."""
    links = "".join(f'<li><a href="#{escape(r.name)}">{escape(r.title)}</a></li>' for r in results)
    contents = f"<nav><ol>{links}</ol></nav>" if len(results) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{contents}\n{''.join(_study(r, r.title != title) for r in results)}</body>\n</html>\n"
    )


def _study(r: Result, titled: bool) -> str:
    shown = "".join(f"<li>{escape(line)}</li>" for line in r.shown)
    missing = "".join(f"<li>{escape(line)}</li>" for line in r.not_shown)
    parts = [
        f'<section id="{escape(r.name)}">',
        f"<h2>{escape(r.title)}</h2>" if titled else "",
        f"<blockquote><p>{escape(r.claim)}</p></blockquote>",
        f"<p>What this run shows:</p><ul>{shown}</ul>" if shown else "",
        f'<div class="missing"><p>What it does not show:</p><ul>{missing}</ul></div>' if missing else "",
        *map(_picture, r.pictures),
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
