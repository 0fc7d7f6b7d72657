"""What a built site must be: whole, and without need of a network.

Zensical checks links between pages. This looks at the result, as a browser gets it: pictures, anchors of generated
pages and files, and that no page loads a font, a style or a script from elsewhere.
"""

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["problems_of"]

#: tag -> attribute with what a browser loads by itself
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.nameless = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img" and not values.get("alt", "").strip():
            self.nameless += 1
        where = values.get(LOADED.get(tag, "href"), "")
        is_loaded = tag in LOADED and values.get("rel") not in ("canonical", "next", "prev")
        if where:
            (self.loaded if is_loaded else self.links).append(where)


def problems_of(site: Path) -> list[str]:
    """Return what is wrong with a built site, one line each; nothing where it is whole."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        doubled = [key for key, times in Counter(page.ids).items() if times > 1 and not key.startswith("__")]
        problems += [f"{name}: the id {key!r} is given twice" for key in doubled]
        problems += [f"{name}: {page.nameless} picture(s) without a text for those who do not see them"] * bool(
            page.nameless
        )
        problems += [f"{name}: loads {url} from elsewhere" for url in page.loaded if urlsplit(url).netloc]
        if name.name == "404.html":  # served at any depth, so its links begin at the root of a server
            continue
        for url in (*page.loaded, *page.links):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                problems.append(f"{name}: the link to {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                problems.append(f"{name}: {url}: the page has no such anchor")
    return problems
