"""Pieces of the page for people. Everything that goes in as words comes out as words, whatever they are."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

#: The page may run its own scripts and load nothing at all.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
EMPTY_PAGE = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="UTF-8"></head>\n<body></body></html>\n'
STYLE = """
:root{color-scheme:light}body{margin:0;background:#fff}
.regraft{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:64rem;margin:0 auto}
.regraft{padding:1.5rem 1.25rem;overflow-wrap:anywhere;box-sizing:border-box}
.regraft h1{font-size:1.8rem;line-height:1.25;margin:0 0 .6rem;padding-left:.8rem}
.regraft h1{border-left:.5rem solid #6b7280}
.regraft h1.drift{border-color:#b91c1c}.regraft h1.stable{border-color:#15803d}
.regraft h1.suspected{border-color:#d97706}
.regraft h2{font-size:1.2rem;margin:2rem 0 .5rem}.regraft h3{font-size:1rem;margin:1.2rem 0 .3rem}
.regraft p{margin:.4rem 0}.regraft .soft{color:#4b5563;font-size:.9rem;font-weight:400}
.regraft .wide{overflow-x:auto}
.regraft table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.regraft th,.regraft td{text-align:left;vertical-align:top;padding:.35rem .6rem .35rem 0}
.regraft th,.regraft td{border-bottom:1px solid #d4d4d4}
.regraft td{white-space:pre-wrap;min-width:4.5rem}.regraft th,.regraft td{overflow-wrap:normal}
.regraft table.texts td{min-width:8rem;overflow-wrap:anywhere}
.regraft .plan{background:#f3f4f6;padding:.8rem 1rem;margin:.8rem 0}
.regraft dl{margin:0;display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1rem}
.regraft dt{font-weight:600}.regraft dd{margin:0}
@media(max-width:40rem){.regraft dl{display:block}.regraft dd{margin-bottom:.5rem}}
.regraft .page{background:#b91c1c;color:#fff;padding:.5rem 1rem;font-weight:600}
.regraft .charts{display:flex;flex-wrap:wrap;gap:1rem}
.regraft figure{margin:0;flex:1 1 19rem;max-width:36rem}.regraft svg{width:100%;height:auto;display:block}
.regraft svg text{font-size:12px;font-family:system-ui,sans-serif;fill:#1c1c1c}
.regraft .bar{display:grid;grid-template-columns:4rem 1fr 4rem;gap:.5rem;align-items:center;font-size:.9rem}
.regraft .bar b{background:#e5e7eb;height:.8rem}.regraft .bar i{display:block;height:100%;background:#6b7280}
.regraft .bar.now i{background:#0072b2}
.regraft blockquote{margin:.4rem 0;padding:.2rem .8rem;border-left:3px solid #d4d4d4;font-size:.95rem}
.regraft blockquote p{white-space:pre-wrap;unicode-bidi:isolate}
.regraft summary{cursor:pointer;margin:.6rem 0}
"""
#: Longer texts are cut: one answer of a megabyte must not be all that a page shows.
_LONGEST = 600
#: What has no shape of its own, or turns the order of the letters after it: shown by its number.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(words: str, longest: int = _LONGEST) -> str:
    """Words as HTML, cut to so many characters, with unseen control characters made visible."""
    cut = words if len(words) <= longest else f"{words[:longest]} … ({len(words):,} characters)"
    return html.escape(_UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", cut.replace("\r\n", "\n")))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        columns: Its heads; none if empty.
        rows: Words of the cells.
        kind: `texts` where cells are prose.
    """
    head = "".join(f"<th>{safe(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heads = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f'<div class="wide"><table class="{kind}">{heads}<tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what is said of each."""
    return "<dl>" + "".join(f"<dt>{safe(name)}</dt><dd>{safe(words)}</dd>" for name, words in rows) + "</dl>"


def items(lines: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{safe(line)}</li>" for line in lines) + "</ul>"


def share_bar(name: str, share: float, most: float, kind: str = "") -> str:
    """A share as a bar, whose full length is `most`."""
    wide = 0.0 if most <= 0 else min(max(share / most, 0.0), 1.0) * 100
    return (
        f'<div class="bar {kind}"><span>{safe(name)}</span><b><i style="width:{wide:.1f}%"></i></b>'
        f"<span>{share:.1%}</span></div>"
    )
