"""The style of the page, and its one script: a slider that shows one row of a grid in large type.

Nothing is fetched from elsewhere. Every colour has a light and a dark form, as in `report/grid.py`.
"""

CSS = """
:root { color-scheme: light; } .dark { color-scheme: dark; }
.gradio-container { --st-ink: light-dark(#1b1f24, #e6e8eb); --st-muted: light-dark(#5c646d, #a0a8b1);
  --st-line: light-dark(#e3e6ea, #33393f); --st-ground: light-dark(#f7f8f9, #1c2025);
  --st-blue: light-dark(#0072b2, #56b4e9); --st-warm: light-dark(#d55e00, #ff9a4d); }
.gradio-container .app.fillable { max-width: 1240px; margin: 0 auto; padding: 20px 24px; }
.st { color: var(--st-ink); font: 15px/1.55 system-ui, sans-serif;
  display: flex; flex-direction: column; gap: .9rem; }
.st-head { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; }
.st-head span { font-size: .95rem; font-weight: 400; color: var(--st-muted); margin-left: .6rem; letter-spacing: 0; }
.st-title { font-weight: 600; font-size: 1rem; margin-bottom: .35rem; }
.st-muted, .st p.st-muted { color: var(--st-muted); font-size: 13.5px; margin: .25rem 0; }
.st-card { border: 1px solid var(--st-line); border-radius: 10px; padding: .9rem 1.1rem; margin: 0;
  background: light-dark(#fff, #16191d); }
.st-stage { font: 1.22rem/1.6 ui-serif, Georgia, "Times New Roman", serif; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; min-height: 2em; }
.st-caret { border-left: 2px solid var(--st-blue); margin-left: 1px; }
.st-facts { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; margin-top: .55rem; color: var(--st-muted);
  font-size: 13px; font-variant-numeric: tabular-nums; }
.st-facts b { color: var(--st-ink); font-weight: 600; }
.st-bar { height: 6px; border-radius: 3px; background: var(--st-line); overflow: hidden; margin: .5rem 0 .3rem; }
.st-bar i { display: block; height: 100%; background: var(--st-blue); border-radius: 3px; }
.st-notice { border-left: 4px solid var(--st-warm); background: var(--st-ground); padding: .6rem .9rem;
  border-radius: 4px; overflow-wrap: anywhere; }
.st-slide { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .2rem 1rem; align-items: center;
  margin: .8rem 0 .2rem; padding-top: .6rem; border-top: 1px solid var(--st-line); }
.st-slide input { width: 100%; accent-color: var(--st-blue); height: 1.4rem; }
.st-slide output { color: var(--st-muted); font-size: 13px; font-variant-numeric: tabular-nums; min-width: 13.5rem; }
.st details summary { cursor: pointer; color: var(--st-muted); font-size: 13.5px; padding: .2rem 0; }
.st-rows { max-height: 24rem; overflow-y: auto; padding-right: .4rem; position: relative; }
.st-rows .tl-legend { position: sticky; top: 0; background: light-dark(#fff, #16191d); }
.st-stage i { display: none; }
.st-rows .tl-row.st-at { background: var(--st-ground); box-shadow: -3px 0 0 var(--st-blue); }
.st-choice { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: .1rem 1rem; padding: .55rem 0;
  border-top: 1px solid var(--st-line); align-items: start; }
.st-choice:first-child { border-top: 0; }
.st-choice .st-stage { font-size: 1.08rem; min-height: 0; }
.st-share { font-size: 13px; color: var(--st-muted); font-variant-numeric: tabular-nums; }
.st-share b { color: var(--st-ink); font-size: 15px; }
.st-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .9rem; }
.st-heat { font: 14.5px/1.9 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.st-heat span { border-radius: 2px; padding: .12em 0; }
.st-scale { display: inline-block; width: 9rem; height: .7rem; border-radius: 3px; vertical-align: -1px;
  margin: 0 .45rem; border: 1px solid var(--st-line); }
.st table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
.st th, .st td { text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--st-line);
  white-space: nowrap; }
.st th:first-child, .st td:first-child { text-align: left; white-space: normal; min-width: 6.5rem; }
.st th { font-weight: 600; color: var(--st-muted); white-space: normal; vertical-align: bottom; }
.st-wide { overflow-x: auto; }
.st-figure { --ink: var(--st-ink); --muted: var(--st-muted); --grid: var(--st-line); --paper: transparent;
  --blue: var(--st-blue); max-width: 36rem; }
.st-figure svg { display: block; width: 100%; height: auto; }
@media (max-width: 640px) {
  .gradio-container .app.fillable { padding: 12px 8px; } .st-head span { display: block; margin: 0; }
  .st-card { padding: .7rem .75rem; } .st-stage { font-size: 1.1rem; }
  .st-choice { grid-template-columns: minmax(0, 1fr); } .st-slide { grid-template-columns: minmax(0, 1fr); }
  .st-slide output { min-width: 0; } .st-rows { max-height: none; }
}
"""

SCRIPT = """
document.addEventListener('input', (event) => {
  const slider = event.target;
  if (!slider.matches || !slider.matches('.st-slide input')) return;
  const card = slider.closest('.st-card'), rows = card.querySelectorAll('.tl-row');
  const row = rows[slider.value], box = card.querySelector('.st-rows');
  if (!row) return;
  const shown = row.querySelector('.tl-text').cloneNode(true);
  card.querySelector('.st-stage').replaceChildren(...shown.childNodes);
  card.querySelector('output').textContent = row.querySelector('.tl-label').textContent;
  rows.forEach((other) => other.classList.toggle('st-at', other === row));
  box.scrollTop = row.offsetTop - box.clientHeight / 2;
});
"""

HEAD = f"<style>{CSS}</style><script>{SCRIPT}</script>"
