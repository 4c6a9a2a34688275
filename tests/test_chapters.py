"""Every chapter has what a reader was promised."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import contents  # noqa: E402

CHAPTERS = contents.chapters()
STANDING = ("In short", "Where it breaks", "Wrong in the wild", "Exercises")
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
CLAIM = "application/vnd.minicompress.claim+json"
SLIDERS = ("SliderModel", "ToggleButtonsModel", "DropdownModel", "PlayModel")
MAX_BYTES = 1_500_000
MAX_WORDS = 6_000


class Notebook:
    def __init__(self, path):
        self.path = path
        self.raw = path.read_text(encoding="utf8")
        data = json.loads(self.raw)
        self.cells = [Cell(c) for c in data["cells"]]
        self.code = [c for c in self.cells if c.kind == "code"]
        self.prose = [c for c in self.cells if c.kind == "markdown"]
        widgets = data["metadata"].get("widgets", {})
        self.state = widgets.get(WIDGETS, {}).get("state", {})

    @property
    def headings(self):
        return [line for cell in self.prose for line in cell.headings]


class Cell:
    def __init__(self, data):
        self.kind = data["cell_type"]
        self.source = "".join(data["source"])
        self.metadata = data["metadata"]
        self.tags = set(self.metadata.get("tags", []))
        self.outputs = data.get("outputs", [])
        self.count = data.get("execution_count")

    @property
    def headings(self):
        text = re.sub(r"^(`{3,}).*?^\1", "", self.source, flags=re.M | re.S)
        return re.findall(r"^#{1,6} .*$", text, re.M)

    @property
    def bundles(self):
        return [o.get("data", {}) for o in self.outputs]

    @property
    def printed(self):
        """All text among the outputs."""
        texts = ["".join(o.get("text", "")) for o in self.outputs]
        for bundle in self.bundles:
            for mime, value in bundle.items():
                if mime == CLAIM:
                    value = json.dumps(value, ensure_ascii=False)
                if mime.startswith("text/") or mime == CLAIM:
                    texts.append("".join(value))
        return "\n".join(texts)

    @property
    def claims(self):
        return [b[CLAIM] for b in self.bundles if CLAIM in b]


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return Notebook(request.param)


def test_the_book_has_chapters():
    assert CHAPTERS


@pytest.mark.parametrize(
    "path", contents.unfinished(), ids=lambda path: path.stem
)
def test_unfinished(path):
    pytest.skip(f"{path.stem} is not in the table of contents yet")


def test_every_page_of_the_contents_exists():
    for name in contents.pages():
        files = [ROOT / f"{name}{ending}" for ending in (".md", ".ipynb")]
        assert any(f.exists() for f in files), name


def test_every_page_is_in_the_contents():
    listed = {ROOT / f"{name}.md" for name in contents.pages()}
    pages = set((ROOT / "book").glob("*.md"))
    pages |= set((ROOT / "book/api").glob("*.md"))
    assert pages <= listed


# Outputs


def test_is_executed_in_order(chapter):
    counts = [c.count for c in chapter.code if c.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


def test_stores_no_error(chapter):
    for cell in chapter.code:
        for output in cell.outputs:
            expected = "raises-exception" in cell.tags
            assert output["output_type"] != "error" or expected, cell.source
            assert output.get("name") != "stderr", cell.source


def test_outputs_name_no_place_in_memory_or_folder(chapter):
    for cell in chapter.code:
        assert not re.search(r"\b0x[0-9a-f]{8,}", cell.printed), cell.source
        assert "site-packages" not in cell.printed, cell.source


def test_file_is_small(chapter):
    assert len(chapter.raw.encode()) < MAX_BYTES


def test_metadata_is_minimal(chapter):
    data = json.loads(chapter.raw)["metadata"]
    assert set(data) <= {"kernelspec", "language_info", "widgets"}
    assert set(data["language_info"]) == {"name"}, "use `make execute`"
    assert data["kernelspec"]["name"] == "python3"


# Structure


def test_has_one_title(chapter):
    assert chapter.cells[0].kind == "markdown"
    assert chapter.cells[0].headings[0].startswith("# ")
    assert sum(line.startswith("# ") for line in chapter.headings) == 1


def test_has_the_standing_headings_in_order(chapter):
    names = [line.lstrip("# ").strip() for line in chapter.headings]
    places = [names.index(name) for name in STANDING if name in names]
    assert len(places) == len(STANDING), f"has only {names}"
    assert places == sorted(places)


def test_has_a_cost_card(chapter):
    assert any("mc-card" in c.printed + c.source for c in chapter.cells)


def test_is_no_longer_than_one_can_read(chapter):
    words = sum(len(cell.source.split()) for cell in chapter.prose)
    assert words <= MAX_WORDS


def test_has_a_slider_whose_views_are_saved(chapter):
    views = [b[VIEW]["model_id"] for c in chapter.code for b in c.bundles
             if VIEW in b]  # fmt: skip
    assert views
    assert set(views) <= set(chapter.state)
    kinds = {m["model_name"] for m in chapter.state.values()}
    assert any(kind.endswith(SLIDERS) for kind in kinds), kinds


def test_widgets_refer_only_to_saved_widgets(chapter):
    named = set(re.findall(r"IPY_MODEL_([0-9a-f]+)", chapter.raw))
    assert named <= set(chapter.state)


def test_pictures_are_described(chapter):
    for cell in chapter.code:
        for bundle in cell.bundles:
            alone = VIEW not in bundle  # a slider's frames describe themselves
            if alone and {"image/png", "image/svg+xml"} & set(bundle):
                image = cell.metadata.get("mystnb", {}).get("image", {})
                assert image.get("alt"), cell.source
        for tag in re.findall(r"<img\b[^>]*>", cell.printed):
            assert re.search(r'alt="[^"]+', tag), tag[:80]
    for cell in chapter.prose:
        assert not re.search(r"!\[\s*\]\(", cell.source)
    for model in chapter.state.values():
        value = model["state"].get("value")
        for tag in re.findall(r"<img\b[^>]*>", value if isinstance(value, str)
                              else ""):  # fmt: skip
            assert re.search(r'alt="[^"]+', tag), tag[:80]


# Claims


def test_has_claims(chapter):
    assert sum(len(cell.claims) for cell in chapter.code) >= 4


def test_claims_are_whole(chapter):
    for cell in chapter.code:
        for claim in cell.claims:
            assert claim["holds"] is True
            assert claim["claim"].strip()


def test_trained_numbers_are_followed_by_a_claim(chapter):
    waiting = None
    for cell in chapter.cells:
        if any(line.startswith("## ") for line in cell.headings):
            assert waiting is None, f"no claim after:\n{waiting}"
        if cell.kind != "code":
            continue
        ignored = "nbval-ignore-output" in cell.tags
        if cell.claims:
            waiting = None
            assert not ignored, "a claim's outcome must be compared"
        elif ignored and re.search(r"\d", cell.printed):
            waiting = cell.source
    assert waiting is None, f"no claim after:\n{waiting}"


# Exercises


def test_exercises_check_themselves_and_are_solved(chapter):
    cells = section(chapter, "Exercises")
    tasks = [
        i
        for i, cell in enumerate(cells)
        if any(re.match(r"#+ Exercise\b", line) for line in cell.headings)
    ]
    assert len(tasks) >= 4, "headings: ### Exercise 1: ..."
    for i in tasks:
        own = itertools.takewhile(lambda c: not c.headings, cells[i + 1 :])
        assert any("check(" in c.source for c in own), cells[i].source
    assert sum("hide-cell" in c.tags for c in cells) >= len(tasks)


def section(chapter, name):
    """Return the cells from a heading to the end of the notebook."""
    for i, cell in enumerate(chapter.cells):
        if any(h.lstrip("# ").strip() == name for h in cell.headings):
            return chapter.cells[i:]
    return []


# Numbers

# A number of three significant digits, or one with a unit, that is not part
# of a name (LeNet-300-100, int8) or of a date.
NUMBER = re.compile(
    r"(?<![\w.,/–-])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?"
    r"(?:[\s\u00a0\u202f\u2009]?(%|[kMG]i?B\b|B\b|×(?!\s?\d)))?(?![\w/-]|\.\d|,\d)"
)
UNITS = {"%": 100, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9,
         "kiB": 2**-10, "MiB": 2**-20, "GiB": 2**-30}  # fmt: skip


def stripped(markdown):
    """Return prose without code, formulas, links, roles, HTML and headings."""
    for pattern in (
        r"^(`{3,}|:{3,})[^\n]*\{(?:bibliography|cite).*?^\1",
        r"^(`{3,}).*?^\1",
        r"\$\$.*?\$\$",
        r"(?<!\\)\$[^$\n]+\$",
        r"\{[\w:-]+\}`[^`]*`",
        r"`[^`\n]*`",
        r"\]\([^)]*\)",
        r"<[^>]+>",
        r"https?://\S+",
        r"^\s*#{1,6} .*$",
    ):
        markdown = re.sub(pattern, " ", markdown, flags=re.M | re.S)
    return markdown


def quoted_numbers(text):
    """Yield (as written, value, decimals, unit) of the numbers to check."""
    for match in NUMBER.finditer(text):
        whole, fraction, unit = match.groups()
        digits = (whole.replace(",", "") + (fraction or "").lstrip(".")).lstrip(
            "0"
        )
        year = fraction is None and re.fullmatch(r"(19|20)\d\d", whole)
        if year or not (len(digits) >= 3 or unit):
            continue
        value = float(whole.replace(",", "") + (fraction or ""))
        decimals = len(fraction) - 1 if fraction else 0
        yield match[0].strip(), value, decimals, unit


def known_numbers(chapter):
    """Return all numbers in the code and the outputs of a chapter."""
    text = "\n".join(c.source + "\n" + c.printed for c in chapter.code)
    text = re.sub(r"(?<=\d)[,_\u202f](?=\d{3}\b)", "", text)
    found = re.findall(r"\d+\.?\d*(?:e[+-]?\d+)?", text)
    return {float(number) for number in found}


def occurs(value, decimals, unit, known):
    """Tell whether some known number rounds to the one that is written."""
    scales = {1, UNITS.get(unit, 1)}
    half = 0.5000001 * 10**-decimals
    return any(
        abs(x * scale - value) <= half for x in known for scale in scales
    )


def test_numbers_in_the_prose_are_those_of_the_cells(chapter):
    known = known_numbers(chapter)
    unknown = []
    for cell in chapter.prose:
        if "prose-cited" in cell.tags:
            assert re.search(r"\{cite|\]\(http", cell.source), cell.source
            continue
        for written, *number in quoted_numbers(stripped(cell.source)):
            if not occurs(*number, known):
                unknown.append(written)
    assert not unknown, (
        f"{unknown} are printed by no cell (paragraphs that quote a paper "
        "are cells with the tag prose-cited)"
    )


class TestNumbers:
    def found(self, text):
        return [n[0] for n in quoted_numbers(stripped(text))]

    def test_finds_numbers_that_need_a_witness(self):
        text = "It takes 203,008 B, or 97.6 %, and 1.57 bits; 4 times 30 %."
        assert self.found(text) == ["203,008 B", "97.6 %", "1.57", "30 %"]

    def test_leaves_out_names_years_code_and_formulas(self):
        text = (
            "In 2015 LeNet-300-100 of $784 \\cdot 300$ and `x = 1234` by "
            "{cite}`han2016` at [a](https://b.org/12345), 28×28, int16."
        )
        assert self.found(text) == []

    def test_rounding_and_units(self):
        assert occurs(97.6, 1, "%", {0.9758})
        assert occurs(203, 0, "kB", {203_008.0})
        assert not occurs(97.6, 1, "%", {0.9752})
        assert not occurs(204, 0, "kB", {203_008.0})
