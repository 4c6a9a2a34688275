"""What the book needs beyond YAML: local scripts, source links, claims."""

import inspect
import json
import re
import sys
from pathlib import Path

import board
from docutils import nodes

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/minicompress/minicompress"
VENDOR = ROOT / "book" / "_vendor"
CLAIM = "application/vnd.minicompress.claim+json"
CLAIMS_PAGE = "book/claims"
NO_CLAIMS = "No chapter of this build states a claim yet."


def serve_locally(app, config):
    """Load formulas, widgets and fonts from book/_vendor if it is there."""
    setup = {"priority": 100}
    if (VENDOR / "ready").exists():
        config.html_static_path.append(str(VENDOR))
        config.html_css_files.append("fonts.css")
        config.mathjax_path = "mathjax/tex-chtml.js"
        config.nb_ipywidgets_js = {
            "requirejs/require.js": {"defer": "defer"},
            "npm/@jupyter-widgets/html-manager/dist/embed-amd.js": {
                "defer": "defer",
                "data-jupyter-widgets-cdn": "../_static/npm/",
            },
        }
        setup["data-npm"] = "npm/"
    config.html_js_files.append(["widgets-setup.js", setup])
    config.linkcode_resolve = source_link


def source_link(domain, info):
    """Return the address of the lines that define a documented object."""
    obj = sys.modules.get(info["module"])
    try:
        for part in info["fullname"].split("."):
            obj = getattr(obj, part)
        obj = inspect.unwrap(obj)
        path = Path(inspect.getsourcefile(obj)).resolve().relative_to(ROOT)
        lines, first = inspect.getsourcelines(obj)
    except (AttributeError, OSError, TypeError, ValueError):
        return None  # a constant or a field: it has no source of its own
    span = f"#L{first}-L{first + len(lines) - 1}"
    return f"{REPOSITORY}/blob/main/{path.as_posix()}{span}"


def claims_of(notebook):
    """Return the title of a notebook and the claims among its outputs."""
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells[:1])
    title = next(
        (s[2:].strip() for s in text.splitlines() if s.startswith("# ")),
        notebook.stem,
    )
    found = [
        output["data"][CLAIM]
        for cell in cells
        for output in cell.get("outputs", [])
        if CLAIM in output.get("data", {})
    ]
    return title, found


def claims_table(claims):
    """Return a Markdown table of claims."""

    def cell(value):
        if value is None or value == "":
            return "–"
        return " ".join(str(value).split()).replace("|", "\\|")

    rows = [
        "| Statement | In the paper | Measured here | Verdict |",
        "|:--|:--|:--|:--|",
    ]
    for claim in claims:
        paper = cell(claim.get("paper"))
        if claim.get("source"):
            paper += f" {{cite:p}}`{claim['source']}`"
        verdict = claim.get("verdict") or "measured"
        kind = verdict.split(",")[0].split(":")[0].strip().replace(" ", "-")
        rows.append(
            f"| {cell(claim['claim'])} | {paper} | "
            f"{cell(claim.get('measured'))} | "
            f"[{cell(verdict)}]{{.mc-verdict .mc-{kind}}} |"
        )
    return "\n".join(rows)


def claims_markdown(notebooks):
    """Return all claims as Markdown, one section and table per notebook."""
    parts = []
    for docname, path in notebooks:
        title, claims = claims_of(path)
        if not claims:
            continue
        count = f"{len(claims)} claim{'s' * (len(claims) > 1)}"
        parts.append(
            f"## {title}\n\n{count}, measured in {{doc}}`/{docname}`.\n\n"
            f"{claims_table(claims)}\n"
        )
    return "\n".join(parts) or NO_CLAIMS


def insert_claims(app, docname, source):
    """Write the claims of all chapters where the page says {claims}."""
    if docname != CLAIMS_PAGE:
        return
    notebooks = [
        (name, path)
        for name in (
            str(n).removesuffix(".ipynb") for n in app.config.external_site_map
        )
        if (path := ROOT / f"{name}.ipynb").exists()
    ]
    source[0] = source[0].replace(
        "```{claims}\n```", claims_markdown(notebooks)
    )


def number_as_named(app, env):
    """Give chapters/04_name.ipynb the number 4, also where one is missing."""
    changed = []
    for doc, numbers in env.toc_secnumbers.items():
        found = re.match(r"chapters/(\d+)_", doc)
        if not found:
            continue
        chapter = int(found[1])
        for anchor, number in numbers.items():
            if number[0] != chapter:
                numbers[anchor] = (chapter, *number[1:])
                changed.append(doc)
        entries = [*env.tocs[doc].findall(nodes.reference), env.titles[doc]]
        for node in entries:
            if node.get("secnumber"):
                node["secnumber"] = (chapter, *node["secnumber"][1:])
    return sorted(set(changed))


def drop_icon_script(app, error):
    """Empty the theme's 1.5 MB icon script: its style sheet has the icons."""
    script = Path(app.outdir) / "_static" / "scripts" / "fontawesome.js"
    if error is None and script.exists():
        script.write_text("")


def search_on_its_page(app, error):
    """Load the index of the search on the search page only.

    The theme names it on every page, for a search while one types, which is
    off.  It grows with the book.
    """
    scripts = r' *<script src="[^"]*(searchtools|language_data|searchindex)'
    scripts += r'\.js[^"]*"></script>\n'
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        if page.name != "search.html" and "_static" not in page.parts:
            text = page.read_text(encoding="utf8")
            less = re.sub(scripts, "", text)
            if less != text:
                page.write_text(less, encoding="utf8")


def always_read_claims(app, env, added, changed, removed):
    """Collect the claims at each build: the notebooks may have changed."""
    return [CLAIMS_PAGE] if CLAIMS_PAGE in env.found_docs else []


def setup(app):
    app.connect("config-inited", serve_locally, priority=100)
    app.connect("source-read", insert_claims)
    board.connect(app)
    app.connect("build-finished", drop_icon_script)
    app.connect("build-finished", search_on_its_page)
    app.connect("env-get-outdated", always_read_claims)
    # after Sphinx and sphinx_multitoc_numbering have counted
    app.connect("env-get-updated", number_as_named, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
