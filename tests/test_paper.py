"""data/paper.csv holds the paper's tables and figures whole: each is written down a second time here, as printed, and compared number by number."""
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from vtp.paper import COLUMNS, compare, ends, load

XL = "gfid50k_xl_euler250_s0.075"

TABLE1 = """
CNN   389.4 70.3  30.63 59.53
ViT-B 87.7  171.2 30.72 58.40
ViT-L 311.1 607.2 31.28 53.51
"""

TABLE2_V1 = """
OpenCLIP   74.0 –    –    –
CLIP       75.5 –    –    –
SigLIP     80.5 –    –    –
MAE        –    85.9 –    –
DINOv2     –    86.7 –    –
SD-VAE     –    –    0.63 7.13
UniTok     70.8 –    0.41 –
VILA-U     73.3 –    1.80 –
VA-VAE-d32 –    –    0.28 4.29
VA-VAE-d64 –    –    0.15 –
RAE-d768   –    84.5 0.57 4.28
VTP-S-d64  66.7 77.5 0.98 5.46
VTP-B-d64  73.2 81.0 0.74 3.88
VTP-L-d64  78.2 85.7 0.36 2.81
"""

# model | size of the DiT | epochs | gFID/IS/precision/recall without | with guidance
TABLE2_V2 = """
UniTok | 1.4B | –    | 2.51/216.7/.82/.57 | 2.77/227.5/.81/.57
REPA   | 675M | 80   | 7.90/122.6/.70/.65 | –
DDT    | 675M | 80   | 6.62/135.2/.69/.67 | 1.52/263.7/.78/.63
VA-VAE | 675M | 80   | 4.29               | –
REPA-E | 675M | 80   | 3.46/159.8/.77/.63 | 1.67/266.3/.80/.63
RAE    | 675M | 80   | 4.28               | –
RAE    | 835M | 80   | 2.16/214.8/.82/.59 | –
VTP    | 675M | 80   | 2.62/197.8/.79/.62 | 1.44/238.2/.80/.63
VTP    | 1.0B | 80   | 2.03/219.4/.80/.62 | –
DiT    | 675M | 1400 | 9.62/121.5/.67/.67 | 2.27/278.2/.83/.57
SiT    | 675M | 1400 | 8.61/131.7/.68/.67 | 2.06/270.3/.82/.59
VA-VAE | 675M | 800  | 2.17/205.6/.77/.65 | 1.35/295.3/.79/.65
REPA   | 675M | 800  | 5.78/158.3/.70/.68 | 1.29/306.3/.79/.64
DDT    | 675M | 400  | 6.27/154.7/.68/.69 | 1.26/310.6/.79/.65
REPA-E | 675M | 800  | 1.70/217.3/.77/.66 | 1.15/304.0/.79/.66
RAE    | 676M | 800  | 1.87/209.7/.80/.63 | 1.41/309.4/.80/.63
RAE*   | 839M | 800  | 1.51/242.9/.79/.63 | 1.13/262.6/.78/.67
VTP    | 675M | 600  | 1.85/232.3/.79/.63 | 1.11/279.5/.79/.67
"""
TOKENIZERS_V2 = {"UniTok": .41, "REPA": .61, "DDT": .61, "VA-VAE": .28, "REPA-E": .28, "RAE": .57, "VTP": .36}

# x in 10⁹ training GFLOPs; the last point of each is a printed label
FIG7B = json.loads("""{
"VTP-L":{"x":[10.80,21.59,43.17,75.75,129.6,205.2,291.9,378.0,432.1],"y":[62.65,44.08,35.92,31.88,29.23,27.70,27.19,26.40,26.12]},
"VTP-B":{"x":[3.57,7.14,14.33,25.06,42.91,67.89,96.58,125.0,142.9],"y":[72.20,52.11,41.07,37.31,33.69,31.42,29.51,28.22,27.83]},
"VTP-S":{"x":[1.43,2.86,5.72,10.01,17.13,27.12,38.57,49.93,57.09],"y":[76.79,63.29,47.84,41.39,38.01,35.50,33.04,31.65,31.28]},
"AE-L":{"x":[5.52,11.06,22.12,38.6,66.26,104.8,149.2,193.1,220.7],"y":[55.04,55.88,55.96,56.38,57.12,57.77,58.14,58.56,57.87]},
"AE-B":{"x":[2.34,4.67,9.34,16.35,28.1,44.4,63.1,81.7,93.4],"y":[56.57,56.71,57.49,59.03,58.79,58.24,58.84,57.59,57.52]},
"AE-S":{"x":[1.39,2.78,5.57,9.74,16.73,26.47,37.52,48.75,55.72],"y":[54.34,55.50,56.20,57.54,57.92,58.65,57.54,57.35,57.42]}}""")
AE = [55.04, 55.89, 55.95, 56.37, 57.12, 57.77, 58.14, 58.56]
VTP = [81.26, 61.27, 41.79, 36.03, 31.87, 29.92, 27.90, 26.95]
AXES = {"readme": ([5.51, 11.03, 22.09, 38.63, 66.24, 105.0, 149.2, 193.3], [5.39, 10.79, 21.62, 37.80, 64.83, 102.8, 146.0, 189.1]),
        "fig1": ([4.44, 8.88, 17.8, 31.1, 53.3, 84.5, 120.1, 155.6], [4.19, 8.38, 16.8, 29.3, 50.3, 79.7, 113.2, 146.8])}
PRINTED = {55.04, 55.89, 58.56, 81.26, 61.27, 26.95}


def expected():
    "Every number again: (version, item, panel, series, x, metric) → (y, read off?)."
    found, nan = {}, math.nan

    def add(version, item, panel, series, x, metric, y, read=False):
        place = version, item, panel, series, x, metric
        assert place not in found, place
        found[place] = float(y), read

    for version in ("v1", "v2"):
        for line in TABLE1.split("\n")[1:-1]:
            series, gflops, params, psnr, gfid = line.split()
            for metric, y in (("gflops", gflops), ("params_m", params), ("rPSNR", psnr)): add(version, "table1", "", series, None, metric, y)
            add(version, "table1", "", series, 80, "gFID", gfid)
    for line in TABLE2_V1.split("\n")[1:-1]:
        series, *numbers = line.split()
        for metric, y in zip(("zero_shot", "probe", "rFID", "gFID"), numbers):
            if y != "–": add("v1", "table2", "", series, 80 if metric == "gFID" else None, metric, y)
    for line in TABLE2_V2.split("\n")[1:-1]:
        series, size, epochs, *columns = (part.strip() for part in line.split("|"))
        for panel, numbers in zip(("without guidance", "with guidance"), columns):
            if numbers == "–": continue
            for metric, y in zip(("gFID", "IS", "precision", "recall"), numbers.split("/")):
                add("v2", "table2", panel, f"{series} ({size})", None if epochs == "–" else int(epochs), metric, y)
    for series, y in TOKENIZERS_V2.items(): add("v2", "table2", "tokenizer", series, None, "rFID", y)
    for series, metric, y in (("UniTok", "zero_shot", 70.8), ("VTP", "zero_shot", 78.2), ("VTP", "probe", 85.7)): add("v2", "table2", "tokenizer", series, None, metric, y)
    for series, y in {"RAE-S": 3.50, "RAE-B": 4.28, "RAE-L": 6.09, "VTP-S": 5.46, "VTP-B": 3.88, "VTP-L": 2.81}.items(): add("v2", "table3", "", series, 80, "gFID", y)

    for item, axes in AXES.items():
        for series, x, ys in zip(("AE", "VTP"), axes, (AE, VTP)):
            for at, y in zip(x, ys): add("v1", item, "c", series, round(at * 1e9), "gFID", y, y not in PRINTED)
    for at, y in zip(AXES["readme"][0], AE): add("v1", "fig4", "gFID", "AE", round(at * 1e9), "gFID", y, y not in PRINTED)
    for at, y in zip(AXES["readme"][0][::7], (2.070, .510)): add("v1", "fig4", "rFID", "AE", round(at * 1e9), "rFID", y)
    add("v1", "fig6", "", "CLIP+SSL+AE", None, "gFID", 27.8)
    add("v1", "fig6", "", "CLIP+SSL+AE", None, "probe", 74.9)
    for series, ys in dict(AE=(58.37, 58.39, 57.23, 56.71), VTP=(47.59, 40.57, 30.98, 27.45)).items():
        for power, y in zip((5, 6, 7, 8), ys): add("v1", "fig7", "a", series, 10 ** power, "gFID", y)
    for series, run in FIG7B.items():
        for i, (at, y) in enumerate(zip(run["x"], run["y"])): add("v1", "fig7", "b", series, round(at * 1e9), "gFID", y, i < 8)
    for layers, y in ((4, 26.12), (24, 24.08)): add("v1", "fig7", "c", "VTP", layers, "gFID", y)
    for series, y in {"LDM": 7.13, "VA-VAE": 4.29, "VTP": 2.81}.items(): add("v1", "fig9", "", series, 80, "gFID", y)
    for series, y in {"VTP": 2.61, "VA-VAE": 4.29, "RAE": 4.28}.items(): add("v2", "fig9", "b", series, 80, "gFID", y)
    add("v2", "text", "", "VTP", 80, "gFID", 2.60)
    for item, panel, y in (("fig9", "", 4.1), ("abstract", "", 4.1), ("readme", "convergence", 3)): add("v1", item, panel, "VTP over VA-VAE", None, "convergence_speedup", y)
    add("v1", "abstract", "", "VTP", None, "gFID_reduction_percent", 65.8)
    add("v1", "text", "introduction", "VTP over AE", None, "flops_ratio", 10)
    add("v1", "readme", "Hugging Face", "VTP-L-d64", 80, "gFID", 2.81)
    return found


@pytest.fixture(scope="module")
def paper(): return load()


def test_every_number(paper):
    theirs = {(r.version, r.item, r.panel, r.series, None if pd.isna(r.x) else round(r.x), r.metric): (r.y, bool(r.digitised)) for r in paper.itertuples()}
    ours = expected()
    assert len(theirs) == len(paper)
    assert set(theirs) - set(ours) == set() and set(ours) - set(theirs) == set()
    assert {place: (theirs[place], ours[place]) for place in ours if theirs[place] != ours[place]} == {}


def test_counts(paper):
    found = Counter(zip(paper.version, paper["item"]))
    assert found == {("v1", "table1"): 12, ("v2", "table1"): 12, ("v1", "table2"): 29, ("v2", "table2"): 128, ("v2", "table3"): 6, ("v1", "fig1"): 16, ("v1", "fig4"): 10,
                     ("v1", "fig6"): 2, ("v1", "fig7"): 64, ("v1", "fig9"): 4, ("v2", "fig9"): 3, ("v1", "readme"): 18, ("v1", "abstract"): 2, ("v1", "text"): 1, ("v2", "text"): 1}
    assert sum(found.values()) == 308


def test_what_was_read_off_says_so(paper):
    assert tuple(paper.columns) == COLUMNS
    assert paper.digitised.sum() == 6 * 8 + 2 * 10 + 5 and paper.error.notna().equals(paper.digitised) and paper.error.dropna().eq(.1).all()
    assert paper.x_error.notna().equals(paper.x_unit == "training GFLOPs") and paper.x_error.dropna().eq(.005).all()
    assert (paper.source != "").all() and paper.source[paper.digitised].str.contains("read off").all()
    assert (paper.x_unit == "").equals(paper.x.isna())


def test_the_protocols_of_generation(paper):
    "The scaling studies judge by a DiT-B and 10,000 images, the tables by an XL and 50,000."
    made = paper[paper.metric == "gFID"]
    assert set(made[made["item"].isin(("table1", "fig1", "fig4", "fig6", "fig7"))].protocol) == {"gfid10k_b_dopri5"}
    assert set(made[made["item"].isin(("table3", "fig9", "text"))].protocol) == set(made[(made["item"] == "table2") & (made.version == "v1")].protocol) == {XL}


def test_what_the_paper_derives_from_its_numbers(paper):
    "65.8 % is the fall from the first point of Fig. 1c to Fig. 6's best; checkpoints lie at the same fractions of every run."
    first = ends("fig1", "c", ("VTP",))[0]
    best = paper[(paper["item"] == "fig6") & (paper.metric == "gFID")].y.item()
    said = paper[paper.metric == "gFID_reduction_percent"].y.item()
    assert round(100 * (1 - best / first), 1) == said
    fractions = np.array([.025, .05, .10, .175, .30, .475, .675, .875, 1.])
    for _, run in paper[(paper["item"] == "fig7") & (paper.panel == "b")].groupby("series"):
        assert np.abs(run.x.to_numpy() / run.x.max() / fractions - 1).max() < .01
    totals = paper[paper["item"] == "fig7"].groupby("series").x.max() / 1e9
    assert totals[["AE-L", "AE-B", "AE-S", "VTP-L", "VTP-B", "VTP-S"]].tolist() == [220.7, 93.4, 55.72, 432.1, 142.9, 57.09]


def test_ends_and_compare():
    assert ends("fig4", "rFID", ("AE",)) == (2.07, .51) and ends("fig4", "gFID", ("AE",)) == (55.04, 58.56)
    assert ends("fig7", "b", ("AE-S", "AE-L")) == (57.42, 57.87) and ends("table1", "", ("CNN",), "v2") != ends("fig7", "c", ("VTP",))
    ours = pd.DataFrame([dict(series="VTP-L-d64", metric="gFID", value=3., scale="paper")])
    assert compare(ours, "table2").paper.item() == 2.81
    for wrong in (dict(metric="gFD"), dict(series="VTP")):
        with pytest.raises(ValueError, match="unlike numbers"): compare(ours.assign(**wrong), "table2")
    with pytest.raises(ValueError, match="no item 'fig5'"): ends("fig5", "a", ("AE",))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "paper.csv").write_text("version,item\nv1,table1\n")
    with pytest.raises(ValueError, match="has columns"): load(tmp_path / "paper.csv")
    with pytest.raises(ValueError, match="work in a source checkout"): load(tmp_path / "none.csv")
