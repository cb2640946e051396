"""The built site, looked at in a browser: pages load and fit, no link is dead, search finds."""

import functools
import json
import re
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urldefrag

import pytest
from browser import CHROMIUM, DRIVER, Browser
from harness import PATIENCE, ROOT, environment

import jaxbptt

pytestmark = pytest.mark.slow
DESK, PHONE = 1280, 390  # pixels
REPOSITORY = "https://github.com/jaxbptt/jaxbptt"


class Site(NamedTuple):
    """A built site and where it is served.

    Attributes:
        folder: the files.
        address: what the address of each of them begins with.
    """

    folder: object
    address: str

    def pages(self):
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*.html"))


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that doesn't print what it is asked for."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("the site is looked at in Chromium, and no chromium or chromedriver is here")
    for package in ("material", "mkdocstrings", "math_core"):
        pytest.importorskip(package)
    # Under the name that it has where it is published, for the page of what is not found.
    folder = tmp_path_factory.mktemp("served") / "jaxbptt"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(NO_MKDOCS_2_WARNING="1"),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    handler = functools.partial(Quiet, directory=folder.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/jaxbptt/")
        server.shutdown()


@pytest.fixture(scope="module")
def browser(site, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def until(look):
    """What `look` gives, once it is not empty."""
    for _ in range(600):
        if found := look():
            return found
        time.sleep(0.1)
    raise TimeoutError("the page did not come to that in a minute")


# ---------------------------------------------------------------- each page

LOOK = """
document.querySelectorAll('details').forEach(part => part.open = true);
const all = (what, of) => [...document.querySelectorAll(what)].map(of);
const cut = [...document.querySelectorAll('pre > code')].filter(e => e.scrollWidth > e.clientWidth);
return {
  width: document.documentElement.scrollWidth,
  cut: cut.map(e => e.innerText.split('\\n').reduce((a, b) => a.length < b.length ? b : a)),
  links: all('a[href]', e => e.href),
  names: all('[id]', e => e.id),
  blank: [...document.images].filter(e => !e.naturalWidth).map(e => e.src),
};
"""


@pytest.fixture(scope="module")
def seen(site, browser):
    """What a desk and a phone see of each page, by (page, width), with the console's complaints."""
    found = {}
    for width in (DESK, PHONE):
        browser.resize(width)
        for page in site.pages():
            browser.visit(site.address + page)
            found[page, width] = browser.run(LOOK) | {"complaints": browser.complaints()}
    return found


def test_no_page_has_an_error_on_its_console(seen):
    assert len(seen) > 50
    assert not {where: of["complaints"] for where, of in seen.items() if of["complaints"]}


def test_each_picture_is_there(seen):
    assert not {where: of["blank"] for where, of in seen.items() if of["blank"]}


def test_no_page_is_wider_than_the_window(seen):
    assert not {where: of["width"] for where, of in seen.items() if of["width"] > where[1]}


def test_no_line_of_code_is_cut_on_a_desk(seen):
    of_desk = {page: of["cut"] for (page, width), of in seen.items() if width == DESK}
    assert not {page: lines for page, lines in of_desk.items() if lines}


def test_no_link_is_dead(site, seen):
    names = {page: set(of["names"]) for (page, width), of in seen.items() if width == DESK}
    dead = set()
    for (page, _), of in seen.items():
        for link in of["links"]:
            address, name = urldefrag(link)
            if address.startswith(site.address):
                path = unquote(address.removeprefix(site.address))
                path += "index.html" if path in ("",) or path.endswith("/") else ""
                if not (site.folder / path).is_file() or (
                    name and unquote(name) not in names[path]
                ):
                    dead.add((page, link))
            elif (
                ours := re.match(rf"{REPOSITORY}/(?:blob|edit|tree)/main/(.*)", address)
            ) and not (ROOT / ours[1]).exists():
                dead.add((page, link))
    assert not dead


# ------------------------------------------------------------ what there is

FIRST = {  # what somebody types, and the page that should come first
    "TBPTT": "",
    "jaxbptt.record": "api/record/",
    "jaxbptt.scan": "api/scan/",
    "jaxbptt.learner": "api/learner/",
    "jaxbptt.gradient_by_lag": "api/inspection/",
    "StepFn": "api/types/",
}


@pytest.mark.parametrize("typed", FIRST)
def test_the_search_finds(site, browser, typed):
    browser.resize(DESK)
    browser.visit(site.address)
    browser.run(
        """
        const field = document.querySelector('.md-search__input');
        field.focus();
        field.value = arguments[0];
        field.dispatchEvent(new Event('input', {bubbles: true}));
        field.dispatchEvent(new Event('keyup', {bubbles: true}));
        """,
        typed,
    )
    links = "return [...document.querySelectorAll('a.md-search-result__link')].map(a => a.href)"
    first = until(lambda: browser.run(links))[0]
    assert re.sub(r"[?#].*", "", first) == site.address + FIRST[typed]
    assert not browser.complaints()


def test_a_page_has_what_a_reader_looks_for(site, browser):
    browser.resize(DESK)
    browser.visit(site.address + "choosing/")
    of = browser.run(
        """
        const link = what => document.querySelector(what).href;
        return {
          edit: link('.md-content__button'), repository: link('.md-header .md-source'),
          canonical: link('link[rel=canonical]'),
          previous: link('.md-footer__link--prev'), next: link('.md-footer__link--next'),
          version: document.querySelector('.md-copyright').innerText,
          sections: [...document.querySelectorAll('.md-nav__item--section > .md-nav__link')]
            .map(e => e.innerText.trim()),
          blocks: document.querySelectorAll('pre > code').length,
        };
        """
    )
    assert of["edit"] == f"{REPOSITORY}/edit/main/docs/choosing.md"
    assert of["repository"].rstrip("/") == REPOSITORY
    assert of["canonical"] == "https://jaxbptt.github.io/jaxbptt/choosing/"
    assert of["previous"] == site.address + "semantics/"
    assert of["next"] == site.address + "performance/"
    assert f"jaxbptt {jaxbptt.__version__}" in of["version"]
    assert {"Start", "How to", "Notebooks", "API"} <= set(of["sections"])
    buttons = "return document.querySelectorAll('pre .md-code__button').length"
    assert until(lambda: browser.run(buttons)) == of["blocks"]


def test_the_site_is_dark_where_the_reader_wants_it(site, browser):
    def is_light():
        red = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]"
        return int(browser.run(red)) > 128

    for scheme in ("dark", "light"):
        # What an earlier page keeps is forgotten where no page of the site can keep it again.
        browser.visit(site.address + "extra.css")
        browser.run("localStorage.clear()")
        browser.prefer(scheme)
        browser.visit(site.address)
        until(lambda wanted=scheme: is_light() == (wanted == "light"))
    browser.run("document.querySelector('[data-md-component=palette] label:not([hidden])').click()")
    until(lambda: not is_light())
    browser.visit(site.address + "extra.css")
    browser.run("localStorage.clear()")


def test_each_public_name_has_an_entry_and_the_main_ones_come_first(site, browser):
    browser.visit(site.address + "api/")
    pages = browser.run(
        """
        return [...document.querySelectorAll('.md-nav--primary a.md-nav__link')]
          .map(a => a.href).filter(link => link.includes('/api/') && !link.includes('#'))
        """
    )
    assert [link.removeprefix(site.address) for link in pages[:4]] == [
        "api/",
        "api/record/",
        "api/scan/",
        "api/learner/",
    ]
    named = set()
    for page in dict.fromkeys(pages):
        browser.visit(page)
        of = browser.run(
            """
            const lists = [...document.querySelectorAll('.doc-section-title')]
              .filter(e => e.innerText.startsWith('Returns'))
              .map(e => e.parentElement.nextElementSibling);
            return {
              names: [...document.querySelectorAll('.doc-heading')].map(e => e.id),
              returns: lists.map(e => e.children.length),
              text: document.querySelector('article').innerText,
            };
            """
        )
        named |= set(of["names"])
        assert set(of["returns"]) <= {1}, page
        assert not re.search(r"^Example:", of["text"], re.MULTILINE), page
    assert {f"jaxbptt.{name}" for name in jaxbptt.__all__} <= named


def test_each_notebook_is_a_page_with_its_pictures_and_a_card(site, browser):
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    browser.visit(site.address + "notebooks/")
    cards = browser.run(
        """
        return [...document.querySelectorAll('.gallery .card')]
          .map(e => [e.querySelector('a').href, e.querySelector('img').naturalWidth, e.innerText])
        """
    )
    assert [link for link, *_ in cards] == [f"{site.address}notebooks/{n.stem}/" for n in notebooks]
    assert all(width > 100 and len(text) > 60 for _, width, text in cards)
    for notebook, (link, *_) in zip(notebooks, cards, strict=True):
        browser.visit(link)
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        shown = "return document.querySelectorAll('article img').length"
        assert browser.run(shown) == len(pictures) > 0
