"""The repository agrees with itself."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "minicompress"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(LIBRARY.rglob("*.py"))
TEXTS = {".py", ".md", ".cff", ".toml", ".txt", ".yml", ".yaml", ".cfg"}
TEXTS |= {".css", ".js", ".mjs", ".json", ".ipynb", ".svg", ".bib", ""}
MODULES = sorted(
    {p.relative_to(LIBRARY).parts[0].removesuffix(".py") for p in SOURCES}
    - {"__init__", "__main__"}
)

# Which floor a module stands on; imports go downwards only.
FLOORS = {
    1: "bits codes data train calibrate obs",
    2: "entropy through models",
    3: "storage export",
    4: "measure zoo",
    5: "distill prune quantize share lowrank nas",
    6: "pipeline commands __main__",
}
FLOOR = {name: n for n, names in FLOORS.items() for name in names.split()}
BESIDE = {"plot", "widgets", "show", "claims"}
# A module may be built on another of its own floor in this order.
SAME_FLOOR = {
    ("calibrate", "train"),
    ("export", "storage"),
    ("commands", "pipeline"),
    ("__main__", "pipeline"),
    ("__main__", "commands"),
}


def tracked():
    """Return the files that belong to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def pins():
    """Return {package: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"constraints.txt does not pin {line!r}"
            found[canonicalize_name(name)] = version
    return found


def requirements():
    """Return the requirements of the test environment and all below it."""
    extras = PROJECT["optional-dependencies"]
    listed = PROJECT["dependencies"] + [
        line for name in ("chapters", "book", "test") for line in extras[name]
    ]
    parsed = [Requirement(line) for line in listed]
    return [r for r in parsed if r.name != PROJECT["name"]]


class TestEnvironment:
    @pytest.mark.parametrize("required", requirements(), ids=str)
    def test_requirement_is_pinned_within_its_bounds(self, required):
        pinned = pins()
        assert canonicalize_name(required.name) in pinned
        assert required.specifier.contains(
            pinned[canonicalize_name(required.name)], prereleases=True
        )

    def test_peers_of_the_benchmarks_are_pinned(self):
        extra = PROJECT["optional-dependencies"]["bench"]
        names = [canonicalize_name(Requirement(line).name) for line in extra]
        assert {*names} - {PROJECT["name"]} <= pins().keys()

    def test_installed_versions_are_the_pinned_ones(self):
        from importlib.metadata import version

        pinned = pins()
        for required in requirements():
            name = canonicalize_name(required.name)
            public = Version(version(name)).public
            assert public == pinned[name], name

    def test_conda_environment_installs_the_pinned_project(self):
        conda = yaml.safe_load((ROOT / "environment.yml").read_text())
        *plain, pip = conda["dependencies"]
        (python,) = (d for d in plain if d.startswith("python"))
        name, _, version = python.partition("=")
        assert name == "python"
        bound = Requirement("python" + PROJECT["requires-python"])
        assert bound.specifier.contains(version)
        constraint, project = pip["pip"]
        assert constraint == "-c constraints.txt"
        (extra,) = re.fullmatch(r"-e \.\[(\w+)\]", project).groups()
        assert extra in PROJECT["optional-dependencies"]

    def test_workflow_uses_a_supported_python(self):
        text = (ROOT / ".github/workflows/book.yml").read_text()
        (version,) = re.findall(r'python-version: "(.+)"', text)
        bound = Requirement("python" + PROJECT["requires-python"])
        assert bound.specifier.contains(version)

    def test_import_needs_only_torch_numpy_tqdm(self):
        code = (
            "import sys, pkgutil, importlib, minicompress\n"
            "for m in pkgutil.iter_modules(minicompress.__path__):\n"
            f"    if m.name not in {BESIDE | {'__main__'}!r}:\n"
            "        importlib.import_module('minicompress.' + m.name)\n"
            "extra = {'matplotlib', 'sklearn', 'scipy', 'IPython',\n"
            "         'ipywidgets', 'onnx', 'safetensors'}\n"
            "print(sorted(extra & set(sys.modules)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == "[]", done.stderr


class TestLibrary:
    @pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
    def test_imports_go_downwards(self, path):
        inside = path.relative_to(LIBRARY).with_suffix("").parts
        own = inside[0]
        if own == "__init__":
            return
        allowed = {own}
        if own in BESIDE:
            allowed |= FLOOR.keys() | BESIDE
        else:
            assert own in FLOOR, f"{own} stands on no floor: add it to FLOORS"
            allowed |= {n for n, f in FLOOR.items() if f < FLOOR[own]}
            allowed |= {b for a, b in SAME_FLOOR if a == own}
        for name in library_imports(path):
            assert name in allowed, f"{own} must not import {name}"

    @pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
    def test_files_stay_readable(self, path):
        text = path.read_text(encoding="utf8")
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 80, f"line {number}"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
        assert "torch.ao" not in text

    def test_code_is_formatted_and_clean(self):
        ruff = [sys.executable, "-m", "ruff"]
        for command in (["check"], ["format", "--check"]):
            done = subprocess.run(
                [*ruff, *command, "minicompress", "tests", "book", "chapters"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("name", MODULES)
    def test_public_names_have_docstrings(self, name):
        module = importlib.import_module(f"minicompress.{name}")
        assert module.__doc__
        for public in public_names(module):
            thing = getattr(module, public)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), public


def public_names(module):
    """Return what a module exports."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and getattr(thing, "__module__", None) == module.__name__
    ]


def library_imports(path):
    """Yield the top-level modules of the library that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) + 1 - node.level] + base
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "minicompress" and len(name) > 1:
                yield name[1]


class TestRepository:
    def test_names_no_machine_and_no_package_registry(self):
        hosts = r"https?://[^/\s]*(registry|pypi|pythonhosted)"
        flags = r"(index-url|find-links)[ =]+\S*//"
        bad = re.compile(f"{hosts}|{flags}")
        here = str(ROOT.parent) + "/"
        for path in tracked():
            if path.suffix not in TEXTS or path == Path(__file__):
                continue
            text = path.read_text(encoding="utf8")
            assert not bad.search(text), path
            # too short a path would be found in honest texts
            assert len(here) < 6 or here not in text, path

    def test_npm_lock_has_hashes_and_no_addresses(self):
        lock = json.loads((ROOT / "book/tools/package-lock.json").read_text())
        packages = {k: v for k, v in lock["packages"].items() if k}
        assert packages
        for name, entry in packages.items():
            assert "resolved" not in entry, name
            assert entry["integrity"].startswith("sha512-"), name

    def test_npm_lock_agrees_with_its_manifest(self):
        folder = ROOT / "book/tools"
        manifest = json.loads((folder / "package.json").read_text())
        lock = json.loads((folder / "package-lock.json").read_text())
        for key in ("dependencies", "devDependencies"):
            assert lock["packages"][""][key] == manifest[key]

    def test_nothing_large_and_no_third_party_code(self):
        for path in tracked():
            assert path.stat().st_size < 3_000_000, path
            assert "node_modules" not in path.parts, path
            assert "_vendor" not in path.parts, path

    def test_every_make_target_explains_itself(self):
        text = (ROOT / "Makefile").read_text()
        phony = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
        for target in phony:
            assert re.search(rf"^{target}:.*## \w", text, re.M), target


class TestReadme:
    def test_the_example_prints_what_stands_below_it(self, tmp_path):
        text = (ROOT / "README.md").read_text()
        code, output = re.search(
            r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL
        ).groups()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout == output, done.stderr

    def test_names_every_module(self):
        text = (ROOT / "README.md").read_text()
        assert [m for m in MODULES if f"`{m}`" not in text] == []

    def test_names_only_files_that_exist(self):
        text = (ROOT / "README.md").read_text()
        for path in re.findall(r"(?:book|chapters|tests)/[\w./]*", text):
            assert (ROOT / path).exists(), path


class TestReference:
    def test_every_module_has_a_page(self):
        pages = {p.stem for p in (ROOT / "book/api").glob("*.md")} - {"index"}
        assert pages == set(MODULES)

    def test_every_module_is_in_the_index(self):
        index = (ROOT / "book/api/index.md").read_text(encoding="utf8")
        for page in (ROOT / "book/api").glob("*.md"):
            if page.stem != "index":
                assert f"]({page.name})" in index, page.stem

    def test_page_documents_its_module(self):
        for page in (ROOT / "book/api").glob("*.md"):
            if page.stem != "index":
                text = page.read_text(encoding="utf8")
                directive = f".. automodule:: minicompress.{page.stem}\n"
                assert directive in text

    @pytest.mark.parametrize("name", MODULES)
    def test_page_documents_every_public_name_once(self, name):
        text = (ROOT / f"book/api/{name}.md").read_text(encoding="utf8")
        found = Counter(documented(text))
        public = public_names(importlib.import_module(f"minicompress.{name}"))
        assert {n: found[n] for n in public if found[n] != 1} == {}
        assert max(found.values()) == 1


def documented(page):
    """Yield the names that the directives of a page document."""
    directive = r"^\.\. auto(\w+):: ([\w.]+)\n((?: +:.*\n)*)"
    for kind, name, options in re.findall(directive, page, re.M):
        if kind != "module":
            yield name
        elif ":members:" in options:
            yield from public_names(importlib.import_module(name))


SCRIPTS = [
    path
    for path in sorted((ROOT / "chapters/experiments").glob("[!_]*.py"))
    if "_stamp" in path.read_text(encoding="utf8")
]


class TestExperiments:
    @pytest.fixture
    def stamp(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "chapters/experiments"))
        import _stamp

        return _stamp

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
    def test_results_are_of_this_code(self, stamp, script):
        assert not stamp.stale(script), "run `make experiments`"

    def test_every_result_has_its_script(self):
        results = {p.stem for p in (ROOT / "chapters/results").glob("*.json")}
        assert results <= {p.stem for p in SCRIPTS}

    def test_hash_ignores_comments_and_docstrings(self, stamp):
        long = 'def f(x):\n    """Say."""\n\n    # why\n    return x  # here\n'
        short = "def f(x):\n    return x\n"
        assert stamp.bare(long) == stamp.bare(short)

    def test_hash_sees_code(self, stamp):
        assert stamp.bare("x = 1\n") != stamp.bare("x = 2\n")
        assert stamp.bare('x = "# a"\n') != stamp.bare('x = "# b"\n')

    def uses(self, stamp, tmp_path, code):
        script = tmp_path / "script.py"
        script.write_text(code)
        used = {p for p in stamp.dependencies(script) if p != script.resolve()}
        return {p.relative_to(LIBRARY).as_posix() for p in used}

    def test_dependencies_are_transitive(self, stamp, tmp_path):
        code = "from minicompress import storage\nstorage.load('x')\n"
        names = self.uses(stamp, tmp_path, code)
        assert {"storage/reading.py", "codes/tree.py", "bits.py"} <= names
        assert "plot.py" not in names

    @pytest.mark.parametrize(
        ("code", "used", "not_used"),
        [
            (
                "from minicompress import train\ntrain.fit()\n",
                {"train/loop.py", "train/checkpoints.py", "train/quality.py"},
                {"train/memory.py", "train/many.py", "train/__init__.py"},
            ),
            (
                "from minicompress.train import recompute as again\n",
                {"train/memory.py"},
                {"train/loop.py"},
            ),
            (
                "import minicompress.prune.scores\n",
                {"prune/scores.py"},
                {"prune/learned.py"},
            ),
            (
                "from minicompress import train\ngetattr(train, 'fit')()\n",
                {"train/memory.py", "train/loop.py", "train/__init__.py"},
                {"plot.py"},
            ),
            (
                "from minicompress import zoo as z\nz.load('digits-mlp')\n",
                {"zoo/__init__.py", "storage/reading.py"},
                {"plot.py", "prune/scores.py"},
            ),
        ],
    )
    def test_only_what_is_used_counts(
        self, stamp, tmp_path, code, used, not_used
    ):
        names = self.uses(stamp, tmp_path, code)
        assert used <= names
        assert not names & not_used
