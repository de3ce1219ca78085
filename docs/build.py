"""Lay out README, notebooks, ledger and tables in build/docs and let Sphinx make a site of them in _docs: `make docs`. No notebook is run."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES, MADE, SITE = ROOT / "build" / "docs", ROOT / "build" / "site", ROOT / "_docs"
TEXTS = ("README.md", "CONTRIBUTING.md", "LOG.md", "CHANGELOG.md", "benchmarks/README.md")
CHAPTERS = {"0": "Jobs and runs", "1": "Networks", "2": "Data", "3": "The method (§3.1–3.6)", "4": "Other tokenizers", "5": "Training", "6": "Generation", "7": "Evaluation", "8": "Experiments and claims"}
SCALES = ("smoke", "cpu", "mini", "paper")         # the largest at which an experiment was run is its page
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def notebooks(folder:str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.ipynb"))


def chapters() -> dict[str, list[Path]]:
    "Chapter → its notebooks in the order of their numbers. Raises ValueError for a notebook without a chapter."
    found = {title: [] for title in CHAPTERS.values()}
    for path in notebooks("nbs"):
        if path.name[0] not in CHAPTERS: raise ValueError(f"{path.name} belongs to no chapter: its name starts with a digit of CHAPTERS")
        found[CHAPTERS[path.name[0]]].append(path)
    return {title: paths for title, paths in found.items() if paths}


def title(path:Path) -> str:
    return re.search(r"^# (.+)$", prose(path), re.M)[1]


def experiments() -> list[Path]:
    "The quickstart, then by the paper's figures, then its tables, then what the paper does not draw."
    def place(path):
        shown = re.search(r"(Fig\.|Table) (\d+)(\w*)", title(path))
        return path.stem != "quickstart", *((shown[1] == "Table", int(shown[2]), shown[3]) if shown else (2, 0, "")), path.stem
    return sorted(notebooks("experiments"), key=place)


def executed(path:Path) -> list[Path]:
    "Executed copies of an experiment, the largest scale first."
    return [copy for scale in reversed(SCALES) if (copy := ROOT / "data" / "reports" / scale / path.name).is_file()]


def prose(path:Path) -> str:
    "A text, or the Markdown cells of a notebook, without code."
    if path.suffix != ".ipynb": text = path.read_text(encoding="utf-8")
    else: text = "\n\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def links(path:Path) -> list[str]:
    "Relative links of a text or notebook, without anchors."
    return [target.split("#")[0] for target in LINK.findall(prose(path)) if not re.match(r"[a-z]+:|#", target)]


def lay(path:Path, source:Path|None=None):
    "Copy a page to where its relative links hold, with the files it links to that are no pages."
    there = PAGES / path.relative_to(ROOT)
    there.parent.mkdir(parents=True, exist_ok=True)
    source = source or path
    there.write_text(source.read_text(encoding="utf-8") if path.suffix != ".ipynb" else shown(source), encoding="utf-8")
    for target in links(source):
        file = (path.parent / target).resolve()
        if file.is_file() and file.suffix not in (".md", ".ipynb") and file.is_relative_to(ROOT):
            (PAGES / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, PAGES / file.relative_to(ROOT))


def shown(path:Path) -> str:
    "A notebook without the lines that only nbdev reads."
    book = json.loads(path.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            cell["source"] = "\n".join([] if any(re.match(r"#\|\s*hide", line) for line in lines) else [line for line in lines if not line.startswith("#|")]).strip("\n")
    book["metadata"].setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
    book["cells"] = [cell for cell in book["cells"] if cell["cell_type"] != "code" or cell["source"] or cell["outputs"]]
    return json.dumps(book, ensure_ascii=False)


def plain(text:str) -> str:
    "A docstring's line as Markdown: what is in backticks stays code."
    return "".join(part if number % 2 else re.sub(r"([\\*_{}\[\]<>$|#~])", r"\\\1", part) for number, part in enumerate(re.split(r"(`[^`]*`)", text)))


def signature(node:ast.AST) -> str:
    if isinstance(node, ast.ClassDef): return node.name
    return f"{node.name}({ast.unparse(node.args)})"


def module_page(path:Path) -> list[str]:
    "The public names of an exported module: signature, first line of the docstring, and its notebook."
    text = path.read_text(encoding="utf-8")
    tree, room = ast.parse(text), re.search(r"File to edit: \S*?(nbs/\S+\.ipynb)", text)
    if not room: return []
    public = next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"), [])
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    lines = [f"## {name}", f"{plain((ast.get_docstring(tree) or '').splitlines()[0])} ([{Path(room[1]).stem}]({room[1]}))", ""]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            lines.append(f"* `{signature(node)}` {plain((ast.get_docstring(node) or '').split(chr(10))[0])}")
    return [*lines, ""]


def api() -> str:
    return "\n".join(["# Index of the package", "", "Every public function and class with the first line of its docstring; the notebook has the reason, a use and a test.", "", *(line for path in sorted((ROOT / "vtp").rglob("*.py")) for line in module_page(path))])


def ledger() -> str:
    import pandas as pd
    from vtp.ledger import markdown
    table = pd.read_csv(ROOT / "data" / "claims.csv", dtype=str).fillna("")
    return f"# Claims\n\nThe paper's statements, what was measured here, and the verdict that follows from the rows. Small scale is called small scale; [84b](nbs/84b_ledger.ipynb) says how a verdict is made.\n\n{markdown(table)}\n"


def reliability() -> str:
    from vtp.reliability import last_campaign, markdown, told
    about, rows = last_campaign()
    return f"# Faults that were tried\n\nThe last campaign (`make test-slow`); the promises are in [85](nbs/85_reliability.ipynb).\n\n{told(about, rows)}\n\n{markdown(rows)}\n"


def figures() -> str:
    "Every figure that experiments left in data/reports, by scale."
    lines = ["# Figures", "", "What the experiments drew from their rows, by scale. A figure that is not here has not been run at that scale."]
    for scale in SCALES:
        found = sorted((ROOT / "data" / "reports" / scale).glob("*.svg"))
        if found: lines += ["", f"## Scale {scale}"]
        for path in found:
            there = PAGES / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
            name = re.split(r"[.-]", path.stem)[0]
            lines += ["", f"[{path.stem}](experiments/{name}.ipynb)" if (ROOT / "experiments" / f"{name}.ipynb").is_file() else path.stem, "", f"![{path.stem} at {scale} scale]({path.relative_to(ROOT)})"]
    return "\n".join(lines) + "\n"


def contents(pages:dict[str, list[str]]) -> str:
    "Hidden tables of contents for the sidebar."
    return "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```\n" for title, names in pages.items())


def pages() -> dict[str, list[str]]:
    "Title in the sidebar → pages, all of them, in order."
    return {"Results": ["claims", "figures", "reliability", "benchmarks/README", "LOG"], "Experiments": [f"experiments/{path.stem}" for path in experiments()],
            **{title: [f"nbs/{path.stem}" for path in paths] for title, paths in chapters().items()}, "Project": ["package", "CONTRIBUTING", "CHANGELOG"]}


def stage():
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in [ROOT / name for name in TEXTS] + notebooks("nbs"): lay(path)
    for path in notebooks("experiments"): lay(path, next(iter(executed(path)), None))
    for name, make in (("claims", ledger), ("figures", figures), ("reliability", reliability), ("package", api)): (PAGES / f"{name}.md").write_text(make(), encoding="utf-8")
    readme = PAGES / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8") + contents(pages()), encoding="utf-8")


def main():
    "Any warning, such as a link to nowhere, fails the build."
    stage()
    shutil.rmtree(MADE, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-c", ROOT / "docs", "-d", ROOT / "build" / "doctrees", PAGES, MADE])
    if done.returncode: sys.exit(done.returncode)
    shutil.rmtree(SITE, ignore_errors=True)
    MADE.rename(SITE)
    shutil.copy(SITE / "README.html", SITE / "index.html")
    (SITE / ".nojekyll").touch()
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages: {SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__": main()
