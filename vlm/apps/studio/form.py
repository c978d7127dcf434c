"""The form as HTML: one row for each key of the config, with what it means. Its script is in `look`."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from vlm.apps.studio.draft import KEYS, Draft, shown_values, split_sections
from vlm.apps.studio.texts import tell
from vlm.apps.web.texts import Language
from vlm.config_keys import ConfigKey

_OPEN = ("", "data", "train")  # sections that are open at first


def form_html(draft: Draft, language: Language) -> str:
    """Every key that can be typed, with what stands there. A value that equals its `data-project` was not typed."""
    project, now = shown_values(Draft(draft.config)), shown_values(draft)
    parts = [f'<input id="filter" type="search" placeholder="{_text(tell(language, "filter"))}" autocomplete="off">']
    for section, keys in split_sections().items():
        rows = "".join(_row(about, project[about.key], now[about.key], language) for about in keys)
        is_open = " open" if section in _OPEN else ""
        name = html.escape(section) or _text(tell(language, "top"))
        parts.append(
            f"<details{is_open} data-section='{html.escape(section)}'><summary>{name}</summary>{rows}</details>"
        )
    return f"<div id='form-rows'>{''.join(parts)}</div>"


def _row(about: ConfigKey, project: str, now: str, language: Language) -> str:
    kinds = f' data-kinds="{" ".join(about.kinds)}"' if about.kinds else ""
    of_kind = f"<em>{_text(tell(language, 'of_kind'))} {', '.join(about.kinds)}</em> " if about.kinds else ""
    meaning = f"<p>{of_kind}{_markdown(about.meaning)}{_entry_keys(about, language)}</p>"
    return (
        f'<div class="row" data-row="{about.key}"{kinds}><label for="key-{about.key}">{html.escape(about.name)}</label>'
        f'<div>{_control(about, project, now, language)}<div class="wrong" role="alert"></div>{meaning}</div></div>'
    )


def _control(about: ConfigKey, project: str, now: str, language: Language) -> str:
    default = about.default.strip("`").strip('"')
    shared = f'id="key-{about.key}" data-key="{about.key}" data-project="{_text(project)}"'
    if about.default == "required":
        hint = tell(language, "required")
    elif about.control == "section":
        hint = f"{tell(language, 'keys_below')}; null"
    else:
        hint = f"{tell(language, 'default')}: {'null' if default == 'none' else default}"
    if about.control == "choice":
        empty = tell(language, "as_project") if project else hint
        default_kind = f' data-default="{_text(default)}"' if about.name == "kind" else ""
        others = [value for value in dict.fromkeys((project, now)) if value not in ("", *about.choices)]
        options = "".join(
            f"<option{' selected' if choice == now else ''}>{html.escape(choice)}</option>"
            for choice in [*about.choices, *others]
        )
        return f'<select {shared}{default_kind}><option value="">{html.escape(empty)}</option>{options}</select>'
    if about.control == "yaml":
        lines = min(4, 1 + len(now) // 60)
        more = f'rows="{lines}" placeholder="{_text(hint)}" spellcheck="false"'
        return f"<textarea {shared} {more}>{html.escape(now)}</textarea>"
    return f'<input {shared} value="{_text(now)}" placeholder="{_text(hint)}" spellcheck="false" autocomplete="off">'


def _entry_keys(about: ConfigKey, language: Language) -> str:
    """Of a list of sections: what an entry may hold."""
    inside = [other for key, other in KEYS.items() if key.startswith(f"{about.key}[].")]
    if not inside:
        return ""
    lines = "".join(
        f"<li><code>{html.escape(other.key.removeprefix(f'{about.key}[].'))}</code> "
        f"<small>{_markdown(other.values)}</small> {_markdown(other.meaning)}</li>"
        for other in inside
    )
    return (
        f"<details class='entry'><summary>{_text(tell(language, 'keys_of_entry'))}</summary><ul>{lines}</ul></details>"
    )


def problems_html(problems: Mapping[str, str], others: Sequence[str], notes: Sequence[str], language: Language) -> str:
    """The line above the command: valid, or how much is to mend; each problem leads to its key."""
    count = len(problems) + len(others)
    head = tell(language, "problems", count=count) if count else tell(language, "valid")
    lines = [
        f'<li><a href="#" data-goto="{html.escape(key)}">{html.escape(key)}</a>: {html.escape(text)}</li>'
        for key, text in problems.items()
    ]
    lines += [f"<li>{html.escape(text)}</li>" for text in others]
    lines += [f'<li class="note">{html.escape(text)}</li>' for text in notes]
    shown = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return f'<div class="verdict {"bad" if count else "good"}" role="status"><b>{html.escape(head)}</b>{shown}</div>'


def _markdown(text: str) -> str:
    """Escaped, with `code` as code.

    >>> _markdown("`auto` < 1")
    '<code>auto</code> &lt; 1'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _text(text: str) -> str:
    return html.escape(text, quote=True)
