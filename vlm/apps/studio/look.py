"""Style and script of the studio. Nothing is fetched from elsewhere."""

from __future__ import annotations

from vlm.apps.studio.texts import BUTTONS
from vlm.apps.web.look import head

_CSS = """
.gradio-container .main.app.app { max-width: 1500px !important; margin: 0 auto !important;
  padding: 12px 24px !important; }
footer { display: none !important; }
#top { align-items: center; gap: 8px; flex-wrap: nowrap; }
#top > * { min-width: 0 !important; }
#top button { flex: 0 0 auto; padding: 6px 12px; font-weight: 500; white-space: nowrap; }
#top #theme { font-size: 1.1rem; line-height: 1; padding: 6px 10px; }
#heading { flex: 1 1 auto; }
#heading h2 { margin: 0; font-size: 1.15rem; }
#notice:not(:has([role=alert])) { display: none !important; }
#notice [role=alert] { border: 1px solid var(--color-accent); border-radius: 8px; padding: 8px 14px;
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
pre.plain { margin: 0; font: .76rem/1.45 var(--font-mono); white-space: pre; overflow: auto;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 10px 12px; color: var(--body-text-color); }
#plan pre.plain { font-size: .68rem; }
.empty { color: var(--body-text-color-subdued); padding: 6px 2px; font-size: .85rem; }

/* the form */
#form-rows input, #form-rows select, #form-rows textarea { width: 100%; box-sizing: border-box; padding: 5px 8px;
  font: .8rem/1.4 var(--font-mono); color: var(--body-text-color); background: var(--input-background-fill);
  border: 1px solid var(--input-border-color); border-radius: 6px; }
#form-rows :is(input, textarea)::placeholder { color: var(--body-text-color-subdued); opacity: .75;
  font-style: italic; }
#form-rows select:has(option[value=""]:checked) { color: var(--body-text-color-subdued); font-style: italic; }
#form-rows textarea { resize: vertical; }
#form-rows #filter { font-family: var(--font); margin-bottom: 8px; }
#form-rows > details { border: 1px solid var(--border-color-primary); border-radius: 8px; margin-bottom: 8px;
  background: var(--block-background-fill); }
#form-rows > details > summary { padding: 7px 12px; cursor: pointer; font: 600 .88rem var(--font-mono); }
#form-rows .row { display: grid; grid-template-columns: minmax(120px, 200px) minmax(0, 1fr); gap: 4px 12px;
  padding: 6px 12px; border-top: 1px solid var(--border-color-primary); }
#form-rows .row > label { font: 500 .8rem/1.9 var(--font-mono); overflow-wrap: anywhere; }
#form-rows .row p { margin: 3px 0 0; font-size: .76rem; line-height: 1.4; color: var(--body-text-color-subdued); }
#form-rows .row p em { font-style: normal; font-weight: 600; }
#form-rows .row.typed > label::after { content: " ●"; color: var(--color-accent); }
#form-rows .wrong { color: #c62828; font-size: .78rem; overflow-wrap: anywhere; }
.dark #form-rows .wrong { color: #ff8a80; }
#form-rows .wrong:empty { display: none; }
#form-rows .row:has(.wrong:not(:empty)) :is(input, select, textarea) { border-color: #c62828; }
#form-rows .hidden { display: none; }
#form-rows .entry summary { cursor: pointer; }
#form-rows .entry ul { margin: 2px 0 0; padding-left: 16px; }
.verdict { border-radius: 8px; padding: 8px 12px; border: 1px solid var(--border-color-primary) !important;
  font-size: .85rem; }
.verdict.good { border-left: 4px solid #2e7d32 !important; } .verdict.bad { border-left: 4px solid #c62828 !important; }
.verdict.good b { color: #2e7d32 !important; } .dark .verdict.good b { color: #81c784 !important; }
.verdict.bad b { color: #c62828 !important; } .dark .verdict.bad b { color: #ff8a80 !important; }
.verdict ul { margin: 4px 0 0; padding-left: 18px; max-height: 220px; overflow-y: auto; }
.verdict li { overflow-wrap: anywhere; } .verdict li.note { color: var(--body-text-color-subdued); }
.verdict a { font-family: var(--font-mono); color: var(--color-accent); }

/* records */
.records { font-size: .82rem; line-height: 1.5; max-height: 640px; overflow: auto; }
.records h4 { margin: 12px 0 4px; font-size: .82rem; border-bottom: 1px solid var(--border-color-primary); }
.records div { white-space: pre-wrap; overflow-wrap: anywhere; }
.records .reply { color: #1b7a34 !important; font-weight: 600; } .dark .records .reply { color: #7ee094 !important; }
.records .image { color: #00697a !important; } .dark .records .image { color: #6fd3e3 !important; }
.records .read { color: var(--body-text-color-subdued) !important; }
.records .bad { color: #b3261e !important; } .dark .records .bad { color: #ff8a80 !important; }
.records img { max-width: 100%; border-radius: 6px; margin-top: 10px; image-rendering: auto; }

/* runs */
table.runs, table.samples { width: 100%; border-collapse: collapse; font-size: .84rem; border: 0 !important; }
table:is(.runs, .samples) :is(th, td) { border: 0 !important; padding: 5px 10px !important; white-space: nowrap;
  border-bottom: 1px solid var(--border-color-primary) !important; text-align: left; vertical-align: top; }
table:is(.runs, .samples) tr { border: 0 !important; }
table.runs th { font-weight: 600; border-bottom-width: 2px !important; }
table.runs td.name { white-space: normal; overflow-wrap: anywhere; font-family: var(--font-mono); font-size: .8rem; }
table.runs .number { text-align: right !important; font-variant-numeric: tabular-nums; }
table.runs tr.chosen td { background: var(--background-fill-secondary); }
table.runs .bar { width: 90px; height: 6px; border-radius: 3px; background: var(--border-color-primary); }
table.runs .bar i { display: block; height: 100%; border-radius: 3px; background: var(--color-accent); }
.state { border-radius: 10px; padding: 1px 9px; font-size: .76rem; border: 1px solid currentColor !important; }
.state:is(.running, .starting) { color: #00796b !important; }
.dark .state:is(.running, .starting) { color: #4db6ac !important; }
.state:is(.failed, .not_started), .why { color: #c62828 !important; }
.dark :is(.state:is(.failed, .not_started), .why) { color: #ff8a80 !important; }
.state:is(.stopped, .interrupted) { color: #a05a00 !important; }
.dark .state:is(.stopped, .interrupted) { color: #ffb74d !important; }
.why { font-size: .76rem; white-space: normal; }
.tail { display: flex; flex-direction: column-reverse; max-height: 440px; overflow: auto; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.tail pre { margin: 0; padding: 10px 12px; font: .74rem/1.45 var(--font-mono); white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--body-text-color); background: none; border: 0; }
table.samples td { white-space: normal; overflow-wrap: anywhere; }
table.samples td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
table.samples.predictions td:first-child { white-space: normal; width: 50%; }
table.samples.predictions td { word-break: normal; }
.chart { margin: 0 0 12px !important;
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 10px; }
.chart figcaption { font-size: .82rem; font-weight: 600; color: var(--body-text-color); margin: 0 !important; }
.chart svg { width: 100%; height: auto; display: block; margin: 4px 0; }
.chart line { stroke: var(--border-color-primary); stroke-width: 1; }
.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart text { font: 11px var(--font); fill: var(--body-text-color-subdued); }
.chart div { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .76rem; color: var(--body-text-color); }
.chart div i { display: inline-block; width: 18px; margin-right: 5px; vertical-align: middle; }
.gradio-container:not(:has(#form-rows)) #outcome { display: none; }
#figures { overflow-x: auto; }
#figures table { font-size: .8rem; width: 100%; border-color: var(--border-color-primary) !important; }
#figures :is(th, td) { padding: 5px 8px !important; word-break: normal !important; overflow-wrap: normal !important;
  border-color: var(--border-color-primary) !important; }
#figures tr { border-color: var(--border-color-primary) !important; }

/* chat */
.chats button:is([aria-label="Clear"], [data-name="Clear"]) { display: none !important; }
.chats .message-buttons:has(button[data-name="Share"]) { display: none !important; }
.chats small.stats { color: var(--body-text-color-subdued); font-size: .75rem; line-height: 1.3; display: block; }
.chats .message:has(small.stats) { background: none; border: 0; box-shadow: none; padding: 0 4px; }
.chats .message-row:has(small.stats) + .message-buttons { display: none !important; }
#box { border: 1px solid var(--border-color-primary) !important; border-radius: 12px !important; }
@media (max-width: 900px) { #form-rows .row { grid-template-columns: 1fr; } }
"""

# The form tells the server all that differs from the project at once, so that nothing gets lost between two answers.
_SCRIPT = """
let vlmTimer = null;
function vlmSend(id, text) {
  const box = document.querySelector(`#${id} textarea, #${id} input`);
  const proto = box.tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(proto.prototype, 'value').set.call(box, text);
  box.dispatchEvent(new Event('input', {bubbles: true}));
}
function vlmTyped() {
  const typed = {};
  for (const field of document.querySelectorAll('#form-rows [data-key]')) {
    const differs = field.value.trim() !== '' && field.value !== field.dataset.project;
    field.closest('.row').classList.toggle('typed', differs);
    if (differs) typed[field.dataset.key] = field.value;
  }
  return typed;
}
function vlmKinds() {
  for (const row of document.querySelectorAll('#form-rows .row[data-kinds]')) {
    const section = row.dataset.row.replace(/\\.[^.]*$/, '');
    const kind = document.querySelector(`#form-rows [data-key="${section}.kind"]`);
    const chosen = kind && (kind.value || kind.dataset.project || kind.dataset.default);
    row.classList.toggle('hidden', !row.dataset.kinds.split(' ').includes(chosen));
  }
}
function vlmFilter() {
  const box = document.querySelector('#filter');
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const section of document.querySelectorAll('#form-rows > details')) {
    let any = false;
    for (const row of section.querySelectorAll('.row')) {
      const text = `${row.dataset.row} ${row.textContent}`.toLowerCase();
      const fits = words.every(word => text.includes(word));
      row.classList.toggle('hidden', !fits);
      any = any || fits;
    }
    section.classList.toggle('hidden', words.length > 0 && !any);
    if (words.length && any) section.open = true;
  }
  if (!words.length) vlmKinds();
}
document.addEventListener('input', event => {
  if (event.target.id === 'filter') vlmFilter();
  if (!event.target.dataset || !event.target.dataset.key) return;
  vlmKinds();
  clearTimeout(vlmTimer);
  vlmTimer = setTimeout(() => vlmSend('typed', JSON.stringify(vlmTyped())), 250);
});
document.addEventListener('click', event => {
  const goto = event.target.dataset && event.target.dataset.goto;
  if (!goto) return;
  event.preventDefault();
  const field = document.getElementById(`key-${goto}`);
  if (!field) return;
  field.closest('details').open = true;
  field.closest('.row').classList.remove('hidden');
  field.scrollIntoView({block: 'center'});
  field.focus();
});
function vlmMark(problems) {
  const wrong = JSON.parse(problems || '{}');
  for (const row of document.querySelectorAll('#form-rows .row')) {
    row.querySelector('.wrong').textContent = wrong[row.dataset.row] || '';
  }
  vlmTyped();
  vlmKinds();
}
"""

HEAD = head(_CSS, BUTTONS, _SCRIPT)

# with the problems of the keys as JSON; after the new form has been drawn
MARK = "(problems) => { setTimeout(() => vlmMark(problems), 50); }"
