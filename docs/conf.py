"""Settings of Sphinx for `docs/build.py`, which lays out what they speak of."""
import configparser
import re
import unicodedata
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).resolve().parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(HERE.parent / "settings.ini", encoding="utf-8")
about = ini["DEFAULT"]

project, author, copyright, release = about["title"], about["author"], about["copyright"], about["version"]
extensions, html_math_renderer = ["myst_nb"], "mathml"
root_doc, language = "README", "en"
html_theme, html_title, html_show_sourcelink, html_copy_source = "furo", about["title"], False, False
html_static_path, html_css_files, html_favicon = [str(HERE / "static")], ["site.css"], str(HERE / "static" / "icon.svg")

nb_execution_mode = "off"                          # what is shown is what was committed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "misc.highlighting_failure", "mystnb.unknown_mime_type"]      # a broken link is none of these

PLAINER = {r"\langle": "⟨", r"\rangle": "⟩", r"\arg": r"\operatorname{arg}"}      # what latex2mathml does not know behind \big or alone


ALPHABETS = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK", "bold": "BOLD"}


def letter(found:re.Match) -> str:
    "Browsers know no mathvariant but normal: the letter of that alphabet itself. A few of them stand outside of their Unicode block, under a shorter name."
    name = f"{ALPHABETS[found[1]]} {'CAPITAL' if found[2].isupper() else 'SMALL'} {found[2].upper()}"
    try: return f"<mi>{unicodedata.lookup(f'MATHEMATICAL {name}')}</mi>"
    except KeyError: return f"<mi>{unicodedata.lookup(name)}</mi>"


def mathml(text:str, display:str) -> str:
    "LaTeX → MathML, which a browser shows without scripts and without a network. Raises ValueError for a command that is not known."
    text, tag = re.sub(r"\\tag\{([^}]*)\}", "", text), re.search(r"\\tag\{([^}]*)\}", text)
    for command, plain in PLAINER.items(): text = re.sub(re.escape(command) + r"(?![A-Za-z])", lambda _: plain, text)
    found = convert(text, display=display)
    found = re.sub(rf'<mi mathvariant="({"|".join(ALPHABETS)})">([A-Za-z])</mi>', letter, found)
    if left := re.search(r"\\[A-Za-z]+", found): raise ValueError(f"{left[0]} has no MathML in {text!r}: write it otherwise, or add it to PLAINER in docs/conf.py")
    return found + (f'<span class="tag">({tag[1]})</span>' if tag else "")


def inline(self, node):
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(self, node):
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app): app.add_html_math_renderer("mathml", (inline, None), (block, None))
