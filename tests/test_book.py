"""The built site: first its files, then what a browser makes of them.

Needs `make book` (or the build of `make test`); the browser tests also need
node, the packages of book/tools and chromium ($CHROMIUM, or on the path).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import contents  # noqa: E402

SITE = ROOT / "book" / "_build" / "html"
TOOLS = ROOT / "book" / "tools"
NAMES = [f"{name}.html" for name in contents.pages()]
CHAPTERS = [n for n in NAMES if n.startswith("chapters/")]
LOCAL = (ROOT / "book" / "_vendor" / "ready").exists()
MAX_PAGE = 3_000_000

pytestmark = pytest.mark.skipif(
    not SITE.exists(), reason="the site is not built: make book"
)
each_page = pytest.mark.parametrize("name", NAMES)
needs_local = pytest.mark.skipif(
    not LOCAL, reason="built without npm: formulas and sliders from a CDN"
)


class Page(HTMLParser):
    """The ids and addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.assets = {""}, [], []
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon"):
            self.assets.append(attrs["href"])
        if tag in ("script", "img", "iframe", "video", "source"):
            self.assets += [attrs["src"]] if attrs.get("src") else []


@pytest.fixture(scope="module")
def parsed():
    return {
        path.resolve(): Page(path)
        for path in SITE.rglob("*.html")
        if "_static" not in path.parts
    }


def target(path, address):
    """Return the file and fragment that a relative address leads to."""
    parts = urlsplit(address)
    file = (path.parent / unquote(parts.path)) if parts.path else path
    return file.resolve(), parts.fragment


@each_page
def test_page_is_built(name):
    assert (SITE / name).stat().st_size > 2000


def test_front_page_leads_to_the_book():
    assert contents.pages()[0] in (SITE / "index.html").read_text()


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_the_number_of_its_file(name):
    number = int(re.match(r"chapters/(\d+)_", name)[1])
    text = (SITE / name).read_text(encoding="utf8")
    title = re.search(r'<h1><span class="section-number">(\d+)\. ', text)
    assert int(title[1]) == number
    front = (SITE / NAMES[0]).read_text(encoding="utf8")
    assert re.search(rf'{name}">\s*{number}\. ', front)


def test_links_inside_the_book_lead_somewhere(parsed):
    broken = []
    for path, page in parsed.items():
        for address in page.links:
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            file, fragment = target(path, address)
            ids = parsed[file].ids if file in parsed else {fragment}
            if not file.exists() or unquote(fragment) not in ids:
                broken.append((path.name, address))
    assert not broken


def test_assets_are_there(parsed):
    missing = [
        (path.name, address)
        for path, page in parsed.items()
        for address in page.assets
        if not urlsplit(address).scheme
        and not target(path, address)[0].exists()
    ]
    assert not missing


@needs_local
def test_nothing_is_fetched_from_elsewhere(parsed):
    outside = [
        (path.name, address)
        for path, page in parsed.items()
        for address in page.assets
        if urlsplit(address).scheme not in ("", "data")
    ]
    assert not outside
    for sheet in SITE.rglob("*.css"):
        text = sheet.read_text(encoding="utf8", errors="ignore")
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", text), sheet.name


@each_page
def test_page_is_light(name, parsed):
    """The page and what it names, without the bundle of the sliders."""
    path = (SITE / name).resolve()
    total = path.stat().st_size
    for address in set(parsed[path].assets):
        if urlsplit(address).scheme or re.search(
            "html-manager|requirejs", address
        ):
            continue
        total += target(path, address)[0].stat().st_size
    assert total <= MAX_PAGE


def test_claims_are_collected():
    text = (SITE / "book" / "claims.html").read_text(encoding="utf8")
    mime = "application/vnd.minicompress.claim+json"
    stated = 0
    for path in contents.chapters():
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            for output in cell.get("outputs", []):
                stated += mime in output.get("data", {})
    assert text.count('class="mc-verdict ') == stated
    assert "{claims}" not in text


def test_reference_links_to_the_source():
    pages = list((SITE / "book" / "api").glob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf8")
        if page.stem != "index" and 'class="py function"' in text:
            assert "/blob/main/minicompress/" in text, page.stem


def missing_for_browsing():
    """Return what keeps the browser tests from running, or None."""
    if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
        return "chromium is not installed (set $CHROMIUM to its path)"
    if not shutil.which("node"):
        return "node is not installed"
    if not (TOOLS / "node_modules" / "playwright-core").exists():
        return "playwright-core is not installed: make book, with a network"
    return None


@pytest.fixture(scope="module")
def seen():
    """What a browser reports of every page."""
    if problem := missing_for_browsing():
        pytest.skip(problem)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    done = subprocess.run(
        ["node", TOOLS / "browse.mjs", SITE, chromium, *NAMES],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@each_page
class TestInTheBrowser:
    def test_no_errors(self, seen, name):
        assert not seen["pages"][name]["errors"]

    @needs_local
    def test_no_request_leaves_the_machine(self, seen, name):
        assert not seen["pages"][name]["outside"]

    def test_formulas_are_set(self, seen, name):
        page = seen["pages"][name]
        assert page["math"] >= page["formulas"]
        assert page["badMath"] == 0

    def test_code_can_be_copied(self, seen, name):
        page = seen["pages"][name]
        assert page["copy"] >= min(page["code"], 1)

    def test_pictures_have_alt_text(self, seen, name):
        assert seen["pages"][name]["noAlt"] == 0

    def test_sliders_move_their_figures(self, seen, name):
        page = seen["pages"][name]
        assert page["stuck"] == []
        assert page["unnamed"] == 0

    def test_fits_a_phone(self, seen, name):
        assert seen["pages"][name]["phone"]["overflow"] <= 0

    def test_is_dark_at_night(self, seen, name):
        page = seen["pages"][name]
        assert page["brightness"] > 0.9
        assert page["dark"]["theme"] == "dark"
        assert page["dark"]["brightness"] < 0.2

    def test_loads_little(self, seen, name):
        assert seen["pages"][name]["bytes"] <= MAX_PAGE


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_a_slider(seen, name):
    assert seen["pages"][name]["sliders"] >= 1


def test_theme_switch_goes_round(seen):
    assert sorted(seen["themes"]) == ["auto", "dark", "light"]


def test_search_finds_the_subject(seen):
    assert seen["search"]["hits"] >= 1
    assert not seen["search"]["errors"]


def test_works_from_the_disk(seen):
    page = seen["disk"]
    assert not page["errors"]
    assert page["stuck"] == []
    assert page["math"] >= page["formulas"]
    assert not (LOCAL and page["outside"])
