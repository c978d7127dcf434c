"""Style and the few lines of JavaScript of the page. Nothing is fetched from elsewhere: system fonts only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm.apps.web.texts import BUTTONS

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "PingFang SC",
         "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")  # fmt: skip
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# Not by gradio's `css`, which reaches only what is inside its innermost frame.
_CSS = """
.gradio-container .main.app.app { max-width: 1000px !important; margin: 0 auto !important; height: 100dvh;
  padding: 16px 24px !important; box-sizing: border-box; }
.main.app > .wrap, main.contain, main.contain > .column { height: 100%; min-height: 0 !important; }
main.contain > .column { flex-wrap: nowrap; gap: 12px; }
footer { display: none !important; }

#top { align-items: center; gap: 8px; flex-wrap: nowrap; padding-right: 28px; flex: 0 0 auto; }
#top > * { min-width: 0 !important; }
#top button { flex: 0 0 auto; padding: 6px 12px; font-weight: 500; white-space: nowrap; }
#top #theme { font-size: 1.1rem; line-height: 1; padding: 6px 10px; }
#heading { flex: 1 1 auto; }
#heading h2 { margin: 0; font-size: 1.15rem; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }

#chat#chat { flex: 1 1 0 !important; height: auto !important; min-height: 160px !important;
  border: 1px solid var(--border-color-primary); border-radius: 12px; }
#chat .placeholder { text-align: center; }
#chat .placeholder-content { height: 100%; justify-content: center; }
#chat .examples { justify-content: center; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px;
  background: var(--background-fill-secondary); }
#chat .example:hover { border-color: var(--color-accent); }
#chat .message-buttons { margin-top: 2px !important; margin-bottom: 6px !important; }
#chat .message-buttons:has(button[data-name="Share"]) { display: none !important; }
#chat small.stats { color: var(--body-text-color-subdued); font-size: .75rem; line-height: 1.3; display: block; }
#chat .message:has(small.stats) { background: none; border: 0; box-shadow: none; padding: 0 4px; }
#chat .message-row:has(small.stats) { margin-top: 0; margin-bottom: 4px; }
#chat .message-row:has(small.stats) + .message-buttons button[data-name="Copy message"],
#chat .message-row:has(small.stats) + .message-buttons:not(:has(button[data-name="Retry"])) {
  display: none !important; }
#chat progress { appearance: none; width: 240px; max-width: 55vw; height: 8px; border: 0; border-radius: 4px;
  overflow: hidden; background: var(--border-color-primary); display: block; margin: 4px 0; }
#chat progress::-webkit-progress-bar { background: var(--border-color-primary); }
#chat progress::-webkit-progress-value { background: var(--color-accent); transition: width .3s; }
#chat progress::-moz-progress-bar { background: var(--color-accent); }

#notice { flex: 0 0 auto; }
#notice:not(:has([role=alert])) { display: none !important; }
#notice [role=alert] { border: 1px solid var(--color-accent); border-radius: 10px; padding: 8px 14px;
  background: var(--background-fill-secondary); }
.form:has(#box) { flex: 0 0 auto !important; background: none !important; border: 0 !important;
  box-shadow: none !important; overflow: visible !important; }
#box { border: 1px solid var(--border-color-primary) !important; border-radius: 12px !important; }
#panel .form, #panel .block { box-shadow: none; }

@media (max-width: 640px) {
  .gradio-container .main.app.app { padding: 8px !important; }
  #top { gap: 4px; padding-right: 24px; }
  #top button { padding: 6px 8px; font-size: .8rem; }
  #heading h2 { font-size: 1rem; }
}
"""

# Gradio names its own buttons in the browser's language. Here they start in English and follow the page's switch, as
# does the language that a screen reader is told. Language and theme are remembered in this browser.
_SCRIPT = """
Object.defineProperty(navigator, 'language', {get: () => 'en'});
Object.defineProperty(navigator, 'languages', {get: () => ['en']});
const vlmNames = NAMES;
function vlmLanguage() {
  const button = document.querySelector('#language');
  return button && button.textContent.trim() === 'English' ? 'zh' : 'en';
}
function vlmTranslate() {
  const language = vlmLanguage();
  if (document.documentElement.lang !== language) document.documentElement.lang = language;
  for (const button of document.querySelectorAll('button')) {
    const name = button.dataset.name || button.title || button.getAttribute('aria-label')
      || (button.id === 'theme' ? 'Light or dark' : '');
    if (!(name in vlmNames)) continue;
    const told = language === 'zh' ? vlmNames[name] : name;
    if (button.dataset.name !== name) button.dataset.name = name;
    if (button.title !== told) button.title = told;
    if (button.getAttribute('aria-label') !== told) button.setAttribute('aria-label', told);
  }
}
function vlmStart() {
  if (localStorage.getItem('vlm_theme')) {
    document.body.classList.toggle('dark', localStorage.getItem('vlm_theme') === 'dark');
  }
  const toggle = document.querySelector('#panel .toggle-button');
  if (innerWidth >= 1200 && toggle && !document.querySelector('#panel.open')) toggle.click();
  new MutationObserver(vlmTranslate).observe(document.body, {childList: true, subtree: true, characterData: true});
  vlmTranslate();
  document.documentElement.dataset.started = 'yes';
}
"""


def head(css: str, names: Mapping[str, str], script: str = "") -> str:
    """What a page of ours has in its head.

    Args:
        names: gradio's own buttons, English -> Chinese.
    """
    shared = _SCRIPT.replace("NAMES", json.dumps(names, ensure_ascii=False))
    return f"<style>{css}</style><script>{shared}{script}</script>"


HEAD = head(_CSS, BUTTONS)

START = "() => { vlmStart(); }"

THEME_SWITCH = """() => {
  document.body.classList.toggle('dark');
  localStorage.setItem('vlm_theme', document.body.classList.contains('dark') ? 'dark' : 'light');
}"""

LANGUAGE_COOKIE = "vlm_language"

REMEMBER_LANGUAGE = f"""() => {{
  setTimeout(() => {{
    vlmTranslate();
    document.cookie = `{LANGUAGE_COOKIE}=${{vlmLanguage()}}; path=/; max-age=31536000; SameSite=Lax`;
  }}, 300);
}}"""

DOWNLOAD = """(line) => {
  if (!line) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([line], {type: 'application/x-ndjson'}));
  link.download = 'conversation.jsonl';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""


def theme() -> Any:
    """Gradio's Soft in our colours, with fonts that are on the reader's machine."""
    import gradio as gr

    soft = gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=list(FONTS), font_mono=list(MONO)
    )
    plain = {
        "block_title_background_fill": "transparent",
        "block_title_text_color": "*body_text_color",
        "block_title_padding": "0",
        "block_title_text_weight": "500",
        "block_info_text_color": "*body_text_color_subdued",
        "body_text_color_subdued": "*neutral_500",
        "body_text_color_subdued_dark": "*neutral_400",
        "input_border_width": "1px",
        "input_border_color": "*neutral_300",
        "input_shadow": "none",
        "checkbox_border_color": "*neutral_400",
    }
    coloured = ("block_title_background_fill", "block_title_text_color", "block_info_text_color")
    dark = {f"{name}_dark": plain[name] for name in coloured}
    return soft.set(**plain, **dark)
