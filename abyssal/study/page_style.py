"""How a page of studies looks: large enough for a room, light and dark, on a screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --faint: #8884; --yes: #17692f; --open: #6b5a00; --no: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --yes: #6fd58d; --open: #e3c65b; --no: #ff8a80; }
  body { color: #e6e6e6; } a { color: #8ab4f8; } figure img { filter: brightness(.88); }
}
html { scroll-padding-top: 4rem; font-size: clamp(16px, 12px + .45vw, 24px); }
body { font: 1.15rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem;
  background: var(--ground); }
h1 { font-size: 2.2rem; line-height: 1.2; } h2 { font-size: 1.7rem; line-height: 1.25; margin-top: 4rem; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: .6rem 0;
  background: var(--ground); border-bottom: 1px solid var(--faint); }
blockquote { margin: 1rem 0; padding: .2rem 1.2rem; border-left: .3rem solid #36c; font-style: italic; }
figure { margin: 2rem 0; } figure img { width: 100%; background: #fff; border-radius: .3rem; }
figcaption, .note, .cost, .where { font-size: .95rem; opacity: .75; }
.scroll { overflow-x: auto; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 1rem; }
caption { text-align: left; font-weight: 600; font-size: 1.15rem; padding-bottom: .4rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top; }
td:not(.word), .verdict { white-space: nowrap; }
th.word, td.word { text-align: left; }
.first > td { border-top: 2px solid var(--faint); } .total > td { font-weight: 600; border-bottom: 0; }
#studies table, #claims table { font-size: 1.15rem; width: 100%; }
#studies td:not(.word) { font-weight: 600; } nav a { text-decoration: none; }
.yes { color: var(--yes); } .open { color: var(--open); } .no { color: var(--no); }
.missing { border-left: .3rem solid #d80; padding-left: 1.2rem; }
code { font-size: .95rem; overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; --ground: #fff; --yes: #17692f; --open: #6b5a00; --no: #b3261e; }
  html { font-size: 11px; } body { margin: 0; max-width: none; color: #000; } nav { display: none; }
  a { color: inherit; text-decoration: none; } h2 { break-before: page; margin-top: 0; }
  h2, caption { break-after: avoid; }
  figure, tr, blockquote, li { break-inside: avoid; } .scroll { overflow: visible; } figure img { filter: none; }
}
"""
