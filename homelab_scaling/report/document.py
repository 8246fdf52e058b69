"""A report as blocks that write themselves as Markdown or as parts of one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ"}
LONG_CELL = 56
"""Text cells longer than this may wrap."""


class Block(Protocol):
    """A part of a report."""

    def markdown(self) -> str:
        """The block as Markdown."""

    def html(self) -> str:
        """The block as HTML."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A section title."""

    text: str

    def markdown(self) -> str:
        return f"## {self.text}"

    def html(self) -> str:
        return f"<h2>{inline(self.text)}</h2>"


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text; `backticks` make code."""

    text: str
    lead: bool = False

    def markdown(self) -> str:
        return self.text

    def html(self) -> str:
        return f'<p class="lead">{inline(self.text)}</p>' if self.lead else f"<p>{inline(self.text)}</p>"


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in self.items) + "</ul>"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The few numbers at the top: (value, what it is)."""

    items: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        return "\n".join(f"- **{value}** {what}" for value, what in self.items)

    def html(self) -> str:
        cells = (f"<div><b>{inline(value)}</b><span>{inline(what)}</span></div>" for value, what in self.items)
        return f'<div class="facts">{"".join(cells)}</div>'


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; columns named in `left` are text, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str]
    caption: str
    wraps: bool = False
    """Whether every cell may break, for tables of words that would be wider than a page."""

    def markdown(self) -> str:
        rule = tuple(":--" if name in self.left else "--:" for name in self.head)
        lines = [self.head, rule, *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{table}\n\n*{self.caption}*"

    def html(self) -> str:
        head, body = self._line(self.head, "th"), "".join(self._line(row, "td") for row in self.rows)
        words = ' class="words"' if self.wraps else ""
        return (
            f'<div class="wide"><table{words}><thead>{head}</thead><tbody>{body}</tbody></table></div>'
            f'<p class="caption">{inline(self.caption)}</p>'
        )

    def _line(self, cells: Sequence[str], tag: str) -> str:
        out = []
        for name, cell in zip(self.head, cells, strict=True):
            long = " long" if tag == "td" and len(cell) > LONG_CELL and not self.wraps else ""
            kind = f' class="l{long}"' if name in self.left else ""
            out.append(f"<{tag}{kind}>{inline(cell)}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A figure and how to read it."""

    file: str
    title: str
    caption: str
    light_png: bytes
    dark_png: bytes

    def markdown(self) -> str:
        return f"![{self.title}]({self.file})\n\n*{self.caption}*"

    def html(self) -> str:
        light, dark = (base64.b64encode(png).decode() for png in (self.light_png, self.dark_png))
        return (
            '<figure><div class="wide"><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="data:image/png;base64,{dark}">'
            f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{light}"></picture></div>'
            f"<figcaption>{inline(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Lines to type."""

    text: str

    def markdown(self) -> str:
        return f"```\n{self.text}\n```"

    def html(self) -> str:
        return f"<pre><code>{html.escape(self.text, quote=False)}</code></pre>"


def inline(text: str) -> str:
    """Escaped text with `code` marked and, outside it, formulas set: N^-alpha with a raised Greek letter."""
    parts = re.split(r"`([^`]+)`", html.escape(text, quote=False))
    return "".join(f"<code>{part}</code>" if i % 2 else _formula(part) for i, part in enumerate(parts))


def _formula(text: str) -> str:
    text = re.sub(r"\b([A-Z]|alpha|beta|gamma)_(\w{1,3}|crit|simple)\b", r"\1<sub>\2</sub>", text)
    text = re.sub(r"\b(alpha|beta|gamma)\b", lambda m: GREEK[m[1]], text)
    # One level deep: ^alpha, ^-0.05, ^alpha<sub>D</sub>, ^(alpha/beta).
    power = r"\^(-?)(\(([^()]*)\)|[\w.]*\w(?:<sub>\w+</sub>)?)"
    return re.sub(power, lambda m: f"<sup>{'−' if m[1] else ''}{m[3] or m[2]}</sup>", text)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as Markdown, pictures as files beside it."""
    return "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one page that needs no other file: style inline, pictures as data, nothing fetched."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    )
    body = "\n".join(block.html() for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--text:#1c2330;--faint:#5b6575;--line:#e3e7ee;--panel:#f6f8fb;--accent:#26727d}
@media (prefers-color-scheme:dark){:root{--bg:#161b23;--text:#e6eaf0;--faint:#9aa5b5;--line:#2b333f;--panel:#1d242e;
--accent:#63c5b8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:63rem;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.75rem;line-height:1.25;margin:0 0 1rem;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.22rem;margin:2.8rem 0 .8rem;padding-top:1.1rem;border-top:1px solid var(--line)}
p,ul{margin:.75rem 0;max-width:50rem}ul{padding-left:1.25rem}li{margin:.3rem 0;overflow-wrap:anywhere}
p.lead{font-size:1.08rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.6rem,1fr));gap:.7rem;margin:1.3rem 0}
.facts div{background:var(--panel);border-radius:.6rem;padding:.75rem .9rem}
.facts b{display:block;font-size:1.3rem;line-height:1.3;color:var(--accent);font-variant-numeric:tabular-nums}
.facts span{font-size:.83rem;line-height:1.35;color:var(--faint);display:block}
.wide{overflow-x:auto;margin:1rem 0 .3rem;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.34rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--faint);font-weight:600;border-bottom-width:2px}
.l{text-align:left}sup,sub{line-height:0;font-size:.78em}td.l.long{white-space:normal;min-width:17rem;width:50%}
.words th,.words td{white-space:normal;vertical-align:top;min-width:5.2rem}
.caption,figcaption{font-size:.86rem;color:var(--faint);margin:.35rem 0 1.4rem;max-width:50rem}
figure{margin:1.6rem 0;max-width:54rem}figure .wide{margin:0}
figure img{width:100%;height:auto;display:block;border-radius:.4rem}
pre{background:var(--panel);border-radius:.6rem;padding:.9rem 1rem;overflow-x:auto;font-size:.85rem;line-height:1.5}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em;overflow-wrap:anywhere}
pre code{overflow-wrap:normal}
@media(max-width:40rem){td.l.long{min-width:13rem;width:auto}th,td{vertical-align:top}
figure img{width:33rem;max-width:none}}
@media print{main{max-width:none}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
