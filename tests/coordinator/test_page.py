"""The page's files as they are served: complete, closed against everything foreign, open to whoever has no token yet."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx

from coordinator import page
from coordinator.page import POLICY, load_assets

Served = Any
"""The fixture's type; it lives in tests/conftest.py."""

ASSETS = {name: asset.body.decode() for name, asset in load_assets().items()}
SCRIPTS = sorted(name for name in ASSETS if name.endswith(".js"))


class Markup(HTMLParser):
    """Collects what a page asks for and what it would run of itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        given = dict(attrs)
        self.links += [str(given[name]) for name in ("src", "href") if given.get(name)]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        if self._within in {"script", "style"} and data.strip():
            self.inline.append(data)


def test_the_page_and_all_that_it_asks_for_is_served(served: Served) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as http:
        home = http.get("/")
        assert (home.status_code, home.headers["content-type"]) == (200, "text/html; charset=utf-8")
        for link in Markup(home.text).links:
            assert link.startswith("#") or http.get(f"/{link}").status_code == 200, link
        for name in SCRIPTS:
            answer = http.get(f"/page/{name}")
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
            assert answer.headers["content-security-policy"] == POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"
            for wanted in re.findall(r' from "\./([^"]+)";$', answer.text, re.MULTILINE):
                assert http.get(f"/page/{wanted}").status_code == 200, f"{name} imports {wanted}"
        for path in (
            "/page/",
            "/page/none.js",
            "/page/..%2fweb.py",
            "/page/__init__.py",
            "/page/%2e%2e/%2e%2e/config.py",
        ):
            assert http.get(path).status_code == 404, path


def test_a_file_that_did_not_change_is_not_sent_again(served: Served) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as http:
        first = http.get("/page/main.js")
        again = http.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert http.get("/page/main.js", headers={"if-none-match": '"older"'}).content == first.content


def test_the_page_is_open_and_what_it_shows_is_not(serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    served = serve(token_file=str(tmp_path / "token"))
    with httpx.Client(base_url=served.url, trust_env=False) as http:
        assert {http.get(path).status_code for path in ("/", "/page/main.js")} == {200}
        for path in ("/v1/fleet", "/v1/openapi.json", "/page/../v1/fleet", "//v1/fleet", "/v1/jobs"):
            assert http.get(path).status_code in {401, 404}, path
        assert http.get("/v1/fleet").status_code == 401


def test_nothing_in_the_page_comes_from_elsewhere_or_stands_between_the_lines() -> None:
    markup = Markup(ASSETS["index.html"])
    assert markup.inline == []
    for name, text in ASSETS.items():
        foreign = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not foreign, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


def test_every_script_is_used() -> None:
    named = set(re.findall(r'"(?:\./|page/)([\w.]+)"', "".join(ASSETS.values())))
    assert set(ASSETS) - {"index.html"} <= named
    assert {path.name for path in Path(page.__file__).parent.iterdir() if path.is_file()} - set(ASSETS) == {
        "__init__.py"
    }
