"""What every test shares: small threads, an own place for runs and caches, the real data if they are there, and a record of what campaigns tried."""
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")      # tests compare bits, and compare them with the CPU's


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the campaigns as well: hundreds of faults, minutes each")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a campaign, run by `make test-slow`")
    config.addinivalue_line("markers", "records: counts what it tries (the fixture `record`); `make test-slow` runs these too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "record" in getattr(item, "fixturenames", ()): item.add_marker("records")
    items.sort(key=lambda item: "one_place" not in getattr(item, "fixturenames", ()))      # experiments take turns: begun first, they keep nobody waiting at the end
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="a campaign: run it with make test-slow"))


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    "Runs of a test never meet those of a user."
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def shared():
    "The folder of real images beside the repository."
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("needs ../shared/data, the real images (never part of the repository)")
    return folder


@pytest.fixture
def record(request):
    """`record(fault=…, promise=…, tried=…, lost=…, skipped=…)` appends a line to the file that VTP_RELIABILITY names; nothing without it.

    tried: faults made; lost: of them, those after which something was lost or wrong; skipped: samples, steps or attempts that were passed over as promised."""
    def write(*, fault, promise, tried, lost=0, skipped=0):
        where = os.environ.get("VTP_RELIABILITY")
        if not where: return
        row = dict(fault=fault, promise=promise, test=request.node.nodeid.removeprefix("tests/"), tried=tried, lost=lost, skipped=skipped)
        with open(where, "a") as file: file.write(json.dumps(row) + "\n")
    return write
