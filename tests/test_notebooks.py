"""Every notebook runs, is clean, and exports exactly the package; every experiment runs at its smallest."""
import ast
import fcntl
import os
import re
from functools import partial
from pathlib import Path

import nbformat
import papermill
import pytest
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.export import nb_export
from nbdev.test import test_nb as run_nb
from execnb.nbio import nb2str, read_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
COLLECTORS = "headline", "understanding_vs_generation"      # of rows that others have kept
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.ipynb"), key=lambda path: (path.stem in COLLECTORS, path))


@pytest.fixture(autouse=True)
def own_state():
    "A notebook in this process must not leave figures or environment variables to the next one."
    import matplotlib.pyplot as plt
    import torch

    before, dtype = dict(os.environ), torch.get_default_dtype()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_default_dtype(dtype)
    plt.close("all")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nbs(path):
    assert run_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)[0]


@pytest.fixture
def one_place(tmp_path_factory, monkeypatch):
    "One place for the runs of all experiments, one experiment at a time: what two figures need is trained once, as a user would have it."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "experiments"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("VTP_RUNS", str(folder))
    with open(folder / ".turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


SHORTER = {"hybrid_objectives": {"last": 1}}      # its other checkpoints are those of scale_compute and joint_objectives, at another latent


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments(path, tmp_path, one_place):
    execute = partial(papermill.execute_notebook, path, tmp_path / path.name, dict(scale="smoke", **SHORTER.get(path.stem, {})), kernel_name="python3", cwd=tmp_path, progress_bar=False)
    execute()
    runs = Path(os.environ["VTP_RUNS"])
    reports = runs.parent / "reports" / "smoke"
    if path.stem in COLLECTORS and (reports / "scale_compute.csv").exists(): assert list(reports.glob(f"{path.stem}*.svg")), "rows were kept, and nothing was drawn of them"
    if path.stem != "reconstruction_weight": return
    report = reports / f"{path.stem}.csv"
    started, kept = {file: file.stat().st_mtime_ns for file in runs.glob("*/launch.json")}, report.read_bytes()      # launch.json is written whenever a job starts
    execute()
    assert started and started == {file: file.stat().st_mtime_ns for file in runs.glob("*/launch.json")}, "executing an experiment again is plotting: nothing may start"
    assert kept == report.read_bytes()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_export_leaves_no_difference(path, tmp_path):
    copy = tmp_path / "vtp"                                 # nbdev makes imports of a folder of this name relative
    nb_export(path, lib_path=copy)
    exported = [p for p in copy.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    assert len(exported) == 1
    ours, theirs = ((folder / exported[0].relative_to(copy)).read_text() for folder in (copy, ROOT / "vtp"))
    assert re.sub(r"[./\w]*nbs/", "nbs/", ours) == re.sub(r"[./\w]*nbs/", "nbs/", theirs)      # the way to nbs/ depends on the folder


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXPERIMENTS], ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    cleaned = read_nb(path)
    clean_nb(cleaned, allowed_cell_metadata_keys=["tags"])
    assert nb2str(cleaned).strip() == path.read_text().strip()
    assert "site-packages" not in path.read_text() and str(ROOT) not in path.read_text(), "an output names a folder of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_title_and_subtitle(path):
    first = nbformat.read(path, as_version=4).cells[0]
    lines = first.source.splitlines()
    assert first.cell_type == "markdown" and lines[0].startswith("# ") and lines[2].startswith("> ")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_are_thin(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    tree = ast.parse("\n".join(c.source for c in code))
    assert len(code) <= 7
    assert "parameters" in code[0].metadata.get("tags", [])
    assert not any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)) for n in ast.walk(tree))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names] + [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not any(name.split(".")[0] == "torch" for name in names)
    assert not any(c.outputs for c in code), "experiments are committed without outputs; executed copies live in data/reports"
