"""The style sheet of the HTML page: light and dark, from 320 pixels to paper. No fonts or images from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191f; --soft: #5a6372; --line: #dfe3ea; --track: #e9ecf2;
  --accent: #2f5fd0; --good: #14743f; --good-soft: #e3f4ea; --bad: #b3261e; --bad-soft: #fbe7e5;
  --unknown: #7a5600; --unknown-soft: #fbf1d8; --bar: #c9502f; --heat: #f2875b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1217; --card: #181c23; --ink: #e8ebf0; --soft: #9aa4b5; --line: #2b323d; --track: #262c36;
    --accent: #8fb0ff; --good: #6fd79c; --good-soft: #14301f; --bad: #ff9d94; --bad-soft: #3b1a18;
    --unknown: #f0c668; --unknown-soft: #362a0e; --bar: #f08561; --heat: #ab4422;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 56px; }
h1, h2, p, dl, dd, ul, figure { margin: 0; padding: 0; }
h1 { font-size: 1.65rem; line-height: 1.25; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 1.1rem; margin-bottom: 4px; }
section { margin-top: 36px; scroll-margin-top: 12px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 16px; font-size: 0.87rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover, nav a:focus-visible { text-decoration: underline; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin-top: 12px; }
.soft, .note, figcaption { color: var(--soft); }
.note { font-size: 0.9rem; max-width: 100ch; }
.note + .note { margin-top: 6px; }
.mark { font-weight: 600; }
.checks .mark, figcaption .mark { white-space: nowrap; }
.mark.good, .headline.good .tag { color: var(--good); }
.mark.bad, .headline.bad .tag { color: var(--bad); }
.mark.unknown, .headline.unknown .tag { color: var(--unknown); }
.headline { border-radius: 12px; padding: 22px 24px; border: 1px solid var(--line); border-left-width: 6px; }
.headline.good { background: var(--good-soft); border-color: var(--good); }
.headline.bad { background: var(--bad-soft); border-color: var(--bad); }
.headline.unknown { background: var(--unknown-soft); border-color: var(--unknown); }
.headline .tag { font-size: 0.8rem; font-weight: 700; letter-spacing: 0.08em; text-transform: uppercase; }
.headline p { margin-top: 6px; }
.brand { font-size: 0.9rem; color: var(--soft); margin-bottom: 14px; overflow-wrap: anywhere; }
.brand b { color: var(--ink); }
.numbers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin-top: 12px; }
.numbers .card { margin: 0; }
.numbers .value { font-size: 2.3rem; font-weight: 650; line-height: 1.15; letter-spacing: -0.02em; }
.numbers .label { font-size: 0.9rem; font-weight: 600; }
.numbers .detail { font-size: 0.85rem; color: var(--soft); margin-top: 2px; }
.value, td.n, .meter { font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 9px 12px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
thead th { color: var(--soft); font-size: 0.8rem; font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td small { display: block; color: var(--soft); font-size: 0.82rem; white-space: normal; }
td.title { font-weight: 600; min-width: 8em; }
thead th { min-width: 7.4em; }
td.title small { font-weight: 400; }
td > span { display: block; }
.phrase { white-space: nowrap; }
figcaption code { color: var(--soft); }
.meter { min-width: 150px; }
.track {
  position: relative; display: block; height: 8px; border-radius: 4px; background: var(--track);
  margin: 7px 0 3px;
}
.track i { position: absolute; top: 0; bottom: 0; left: 0; border-radius: 4px; background: var(--bar); }
.track b { position: absolute; top: -3px; bottom: -3px; border: solid var(--ink); border-width: 0 1.5px; }
.track b::after { content: ""; position: absolute; left: 0; right: 0; top: 50%; border-top: 1.5px solid var(--ink); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
.pictures img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px; border: 1px solid var(--line);
  image-rendering: pixelated; background: var(--track);
}
.pictures.patches { grid-template-columns: repeat(auto-fill, minmax(112px, 132px)); }
figcaption { font-size: 0.85rem; margin-top: 8px; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
figcaption span { display: block; }
.flips { width: auto; }
.flips td, .flips th { padding: 10px 22px 10px 0; }
.flips td { font-size: 1.25rem; font-weight: 600; }
.flips td.apart { color: var(--bar); }
.split { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; margin-top: 12px; }
.split .card { margin: 0; }
ul.checks { list-style: none; }
ul.checks li {
  display: grid; grid-template-columns: 5.5em minmax(0, 1fr); gap: 8px; padding: 9px 0;
  border-bottom: 1px solid var(--line);
}
ul.checks li:last-child { border-bottom: 0; }
ul.checks small { display: block; color: var(--soft); font-size: 0.87rem; overflow-wrap: anywhere; }
ul.points { padding-left: 1.2em; font-size: 0.92rem; }
ul.points li { padding: 3px 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 0.92rem; color: var(--accent); }
details { overflow-x: auto; }
details > table { margin-top: 8px; }
.chart { display: block; width: 100%; max-width: 460px; height: auto; font-family: inherit; }
dl.facts { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: 6px 20px; font-size: 0.9rem; }
.split dl.facts { grid-template-columns: minmax(7em, 38%) minmax(0, 1fr); }
dl.facts dt { color: var(--soft); }
dl.facts dd { overflow-wrap: anywhere; min-width: 0; }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--track); border-radius: 8px;
  padding: 12px 14px; margin: 12px 0 0;
}
@media screen and (max-width: 880px) {
  main { padding: 20px 14px 40px; }
  .numbers, .split { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 1.3rem; }
  .headline { padding: 16px 18px; }
  .headline p { font-size: 0.92rem; }
  .numbers { gap: 8px; }
  .numbers .card { display: grid; grid-template-columns: minmax(0, 1fr) auto; align-items: baseline; padding: 12px 16px; }
  .numbers .value { font-size: 1.6rem; }
  .numbers .detail { grid-column: 1 / 3; }
  .card { padding: 16px; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .pictures.patches { grid-template-columns: repeat(auto-fill, minmax(96px, 112px)); }
  table.wide, table.wide tbody, table.wide tr, table.wide td { display: block; }
  table.wide thead { display: none; }
  table.wide tr { padding: 12px 0; border-bottom: 1px solid var(--line); }
  table.wide tr:first-child { padding-top: 0; }
  table.wide tr:last-child { border-bottom: 0; padding-bottom: 0; }
  table.wide td {
    display: flex; justify-content: space-between; gap: 16px; border: 0; padding: 3px 0; text-align: right;
  }
  table.wide td::before { content: attr(data-label); color: var(--soft); text-align: left; white-space: nowrap; }
  table.wide td.title { display: block; text-align: left; font-weight: 600; padding-bottom: 4px; }
  table.wide td.title::before { content: none; }
  table.wide td > span { min-width: 0; overflow-wrap: anywhere; }
  table.wide td.meter > span { flex: 1; max-width: 190px; }
  dl.facts, .split dl.facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.facts dd { margin-bottom: 8px; }
  ul.checks li { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .flips td, .flips th { padding-right: 12px; }
}
@media screen and (max-width: 360px) { .phrase { white-space: normal; } }
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --track: #e6e6e6; --bar: #a33f22; --heat: #f2875b;
    --good: #0c5c30; --bad: #9a1c15; --unknown: #624500; --good-soft: #fff; --bad-soft: #fff; --unknown-soft: #fff;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10pt; }
  table { font-size: 8.5pt; }
  th, td { padding: 5px 8px 5px 0; }
  td small { font-size: 7.5pt; }
  td.title { min-width: 10em; }
  td.n, .phrase { white-space: normal; }
  .meter { min-width: 80px; }
  .card { padding: 12px; }
  .numbers .value { font-size: 1.7rem; }
  main { max-width: none; padding: 0; }
  section { margin-top: 20px; }
  .card, figure, tr, li, .headline { break-inside: avoid; }
  h2 { break-after: avoid; }
  .pictures { grid-template-columns: repeat(6, 1fr); }
  nav { display: none; }
  details::details-content { content-visibility: visible; }
}
"""
