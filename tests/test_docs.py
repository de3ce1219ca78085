"""The site: every notebook is in it, in order, and no link of a text or notebook leads nowhere."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.ipynb"))
PAGES = [ROOT / name for name in docs.TEXTS] + NOTEBOOKS + EXPERIMENTS


def headings(path):
    "Anchors that a forge gives to the headings of a Markdown text."
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-") for line in path.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in docs.LINK.findall(docs.prose(path)):
        if re.match(r"[a-z]+:", target): continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists() and there.is_relative_to(ROOT), f"{path.name}: {target}"
        if anchor and there.suffix == ".md": assert anchor in headings(there), f"{path.name}: {target}"


def test_the_check_sees_a_broken_link(tmp_path):
    page = tmp_path / "page.ipynb"
    page.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["see [here](gone.ipynb#part) and `[not](this)`, ", "![a](https://b.c) [d](e.md)"]}, {"cell_type": "code", "source": "[x](y)"}]}))
    assert docs.links(page) == ["gone.ipynb", "e.md"]


def test_sidebar_names_every_page_once():
    named = [name for names in docs.pages().values() for name in names]
    texts = [str(Path(name).with_suffix("")) for name in docs.TEXTS if name != "README.md"]
    made = ["claims", "figures", "reliability", "package"]
    assert sorted(named) == sorted(texts + made + [str(p.relative_to(ROOT).with_suffix("")) for p in NOTEBOOKS + EXPERIMENTS])
    assert [name for name in named if name.startswith("nbs/")] == [f"nbs/{p.stem}" for p in NOTEBOOKS]          # by their numbers


def test_experiments_stand_in_the_papers_order():
    order = [path.stem for path in docs.experiments()]
    assert order[:2] == ["quickstart", "headline"] if "headline" in order else order[0] == "quickstart"
    assert order.index("architecture") < order.index("scale_params") < order.index("table1_autoencoders") < order.index("table2_comparison")


def test_executed_copy_of_the_largest_scale_is_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    for scale in ("smoke", "mini"):
        (tmp_path / "data" / "reports" / scale).mkdir(parents=True)
        (tmp_path / "data" / "reports" / scale / "a.ipynb").touch()
    assert [copy.parent.name for copy in docs.executed(tmp_path / "experiments" / "a.ipynb")] == ["mini", "smoke"]
    assert not docs.executed(tmp_path / "experiments" / "b.ipynb")


def test_directives_are_not_shown(tmp_path):
    page = tmp_path / "page.ipynb"
    cells = ["#| default_exp a", "#| export\nx = 1", "#| hide\nimport nbdev", "x"]
    page.write_text(json.dumps({"metadata": {}, "cells": [{"cell_type": "code", "source": source, "outputs": []} for source in cells]}))
    assert [cell["source"] for cell in json.loads(docs.shown(page))["cells"]] == ["x = 1", "x"]


def test_index_of_the_package_names_what_is_public():
    from vtp import flops
    page = docs.api()
    assert "## vtp.flops" in page and "(nbs/13_flops.ipynb)" in page
    assert all(f"`{name}" in page for name in ("count(fn)", "params(", "table1()")) and set(flops.__all__) >= {"count", "params", "table1"}


def formulas(path):
    "LaTeX of a notebook or text: (text, display)."
    return [(block or line, "block" if block else "inline") for block, line in re.findall(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", docs.prose(path), re.S)]


def test_every_formula_becomes_mathml(monkeypatch):
    pytest.importorskip("latex2mathml", reason="the site's builder is not installed: make docs does it")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from conf import mathml
    found = [mathml(*formula) for path in NOTEBOOKS + EXPERIMENTS for formula in formulas(path)]
    assert len(found) > 300 and all(text.startswith("<math") for text in found)
    assert "ℒ" in mathml(r"\mathcal L", "inline") and mathml(r"x\tag{2}", "block").endswith('<span class="tag">(2)</span>')
    with pytest.raises(ValueError, match="unheard"): mathml(r"\unheard x", "inline")


def test_a_page_is_built(tmp_path):
    "A notebook, its link, its formula and its output; the whole site is for `make docs`."
    for name in ("sphinx", "myst_nb", "furo", "latex2mathml"): pytest.importorskip(name, reason="the site's builder is not installed: make docs does it")
    source, cells = tmp_path / "in", [{"cell_type": "markdown", "metadata": {}, "source": "# One\n\nSee [two](two.md), $\\mathcal L$."},
                                      {"cell_type": "code", "metadata": {}, "execution_count": None, "source": "1 + 1", "outputs": [{"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/plain": "kept output"}}]}]
    source.mkdir()
    (source / "one.ipynb").write_text(json.dumps({"metadata": {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}, "nbformat": 4, "nbformat_minor": 4, "cells": cells}))
    (source / "two.md").write_text("# Two\n\n[one](one.ipynb)\n")
    (source / "README.md").write_text("# Home\n" + docs.contents({"All": ["one", "two"]}))
    def build(): return subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "-c", ROOT / "docs", source, tmp_path / "out" / "site"], cwd=tmp_path, capture_output=True, text=True)
    done = build()
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "site" / "one.html").read_text()
    assert 'href="two.html"' in page and "ℒ" in page and "kept output" in page and "jsdelivr" not in page
    (source / "two.md").write_text("# Two\n\n[one](gone.ipynb)\n")
    done = build()
    assert done.returncode and "gone.ipynb" in done.stderr
