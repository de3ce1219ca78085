"""The README tells the truth: its Python blocks run, its shell blocks name what exists."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
PYTHON = "\n".join(text for language, text in BLOCKS if language == "python")
SHELL = [line for language, text in BLOCKS if language in ("sh", "bash") for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def test_the_head_of_the_ledger_is_the_ledger_s():
    from vtp.ledger import ledger, summary
    from vtp.reports import read

    assert summary(ledger(read(ROOT / "data" / "reports"))) in (ROOT / "README.md").read_text(), "put the first table that `python -m vtp.ledger` prints into README.md"


def test_readme_has_both_kinds():
    assert PYTHON and SHELL


@pytest.mark.timeout(400)
def test_python_blocks_run(tmp_path):
    env = dict(os.environ, VTP_RUNS=str(tmp_path / "runs"))
    done = subprocess.run([sys.executable, "-c", PYTHON], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", SHELL)
def test_shell_lines_name_what_exists(line):
    words = shlex.split(line.split("#")[0])
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0, line
    elif words[0] == "papermill":
        parameters = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", words[1]], cwd=ROOT, capture_output=True, text=True).stdout
        for name in (words[i + 1] for i, w in enumerate(words) if w == "-p"):
            assert re.search(rf"^\s+{name}:", parameters, re.M), f"{words[1]} has no parameter {name}"
    elif words[0] in ("git", "cd", "pip", "conda", "jupyter", "tensorboard"):
        for word in words[1:]:
            assert not word.endswith((".yml", ".ipynb")) or (ROOT / word).exists() or word.startswith("data/"), line
    else:
        raise AssertionError(f"teach this test to check: {line}")
