"""How a page looks: in light and dark, on a telephone, on paper."""

SERIES = 8
"""Colours for lines of a chart, the CSS variables ``--s0`` .. ``--s7``."""

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024; --soft: #5b6570; --rule: #d5dae0; --card: #f5f7f9;
  --tint: 24, 104, 190; --good: #15713a; --bad: #b3261e; --warn: #fff4d6; --warnrule: #c98a00;
  --s0: #1868be; --s1: #c2410c; --s2: #15803d; --s3: #8b2fc9; --s4: #8a6100; --s5: #0e7490; --s6: #be185d; --s7: #4b5563; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e8ec; --soft: #a0aab4; --rule: #3a424a;
  --card: #1d2226; --tint: 92, 160, 235; --good: #6cce8d; --bad: #ff9187; --warn: #3a2f10; --warnrule: #d9a52e;
  --s0: #6fb1ff; --s1: #ff9a5c; --s2: #67d18a; --s3: #cf9bff; --s4: #e2bd4e; --s5: #57cfe4; --s6: #ff8fbf; --s7: #b6bec8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .5rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: rgb(var(--tint)); }
nav { font-size: .92rem; margin: 1rem 0; }
nav a { display: inline-block; margin-right: 1rem; padding: .15rem 0; }
.lead, .note, figcaption, caption { color: var(--soft); }
.note, figcaption, caption { font-size: .875rem; }
.box { border-left: 4px solid var(--rule); background: var(--card); padding: .6rem .9rem; margin: .8rem 0; }
.box p { margin: 0; max-width: none; }
.box.warn { border-color: var(--warnrule); background: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 .4rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .7rem .8rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .875rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 400; }
.words { text-align: left; overflow-wrap: break-word; max-width: 22rem; }
.number { white-space: nowrap; }
.ci { color: var(--soft); white-space: nowrap; font-size: .86em; display: block; }
.undefined { color: var(--soft); font-style: italic; }
.matrix td { text-align: center; min-width: 4.6rem; border: 1px solid var(--page); }
.matrix td small { display: block; color: inherit; opacity: .85; }
.matrix .hit { outline: 2px solid rgb(var(--tint)); outline-offset: -2px; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; align-items: flex-start; }
.charts h3 { margin-top: .6rem; }
.charts figure { flex: 1 1 20rem; max-width: 30rem; }
figure { margin: .4rem 0 1rem; min-width: 0; break-inside: avoid; }
figure > svg { display: block; width: 100%; height: auto; }
figure.wide img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); }
.legend { list-style: none; margin: .3rem 0; padding: 0; font-size: .9rem; }
.legend li { display: flex; gap: .5rem; align-items: center; }
.legend svg { flex: none; width: 34px; height: 10px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: .9rem; margin: .6rem 0 1rem; }
.examples figure { margin: 0; }
.examples img, .examples .missing { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #000;
  border-radius: 4px; }
.examples .missing { color: #ccc; font-size: .85rem; padding: 1rem; }
.examples figcaption { line-height: 1.35; margin-top: .3rem; font-size: .84rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; overflow-wrap: normal; }
code { font-size: .9em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; font-size: .875rem; color: var(--soft); }
@media (max-width: 34rem) { body { padding: .9rem .8rem 2rem; } h1 { font-size: 1.35rem; } th, td { padding: .3rem .45rem; }
  dl { display: block; } dt { margin-top: .4rem; } .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 1.35rem; }
  .matrix td { min-width: 3.6rem; } .examples { grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); } }
@page { margin: 14mm; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; } h2, h3 { break-after: avoid; }
  .tile, tr, .box, .charts figure, .examples figure { break-inside: avoid; } .scroll { overflow: visible; }
  .examples { grid-template-columns: repeat(6, 1fr); } .tiles { grid-template-columns: repeat(4, 1fr); }
  .charts figure { flex: 0 1 8.4cm; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
