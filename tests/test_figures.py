"""Figures: intervals against scipy, marks that survive black and white and stay with their series, pictures that are the same bytes again."""
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vtp.paper import load
from vtp.plots import DASHES, HATCHES, MARKERS, SYSTEMS, bars, beside, curve, over_seeds, scatter
from vtp.reports import keep, meet, picture, read, reports

SAID = dict(title="Generation", scale="smoke", hardware="CPU")


@pytest.fixture(autouse=True)
def own_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))


def rows(seeds=3, series=("AE", "VTP"), seed=0):
    "Rows of gFD at three places, with their own intervals."
    rng = np.random.default_rng(seed)
    made = [dict(series=name, train_seed=s, flops=x, metric="gFD", value=50 - 4 * i * k + rng.standard_normal())
            for k, name in enumerate(series) for s in range(seeds) for i, x in enumerate((1e12, 3e12, 1e13))]
    return pd.DataFrame(made).assign(low=lambda t: t.value - 2, high=lambda t: t.value + 3)


def theirs():
    return load().query("item == 'fig1' and panel == 'c'")


def lines(ax):
    "series -> (marker, dash, colour, x, y), without the caps of the intervals."
    return {line.get_label(): (line.get_marker(), repr(line._unscaled_dash_pattern), line.get_color(), line.get_xdata(), line.get_ydata()) for line in ax.lines if not line.get_label().startswith("_")}


def whiskers(ax, number):
    "Ends (n, 2) of the intervals of the number-th series, as drawn."
    return np.array([segment[:, 1] for segment in ax.containers[number].lines[2][0].get_segments()])


def test_intervals_are_students_over_seeds():
    table = rows(3).assign(low=lambda t: t.value - .01, high=lambda t: t.value + .01)
    ax = beside(table, theirs(), "flops", **SAID).axes[0]
    for number, name in enumerate(("AE", "VTP")):
        for x, y, drawn in zip(*lines(ax)[name][3:], whiskers(ax, number)):
            values = table[(table.series == name) & (table.flops == x)].value
            assert np.isclose(y, values.mean()) and np.allclose(drawn, stats.t.interval(.95, 2, values.mean(), stats.sem(values)))


def test_seeds_that_agree_have_the_noise_of_their_samples():
    table = rows(2).assign(value=45., low=43., high=47.)
    found = over_seeds(table, ("series", "flops"))
    assert np.allclose(found.high - found["mean"], 2 / np.sqrt(2)) and np.allclose(found["mean"] - found.low, 2 / np.sqrt(2))
    assert over_seeds(table.drop(columns=["low", "high"]), ("series", "flops")).low.eq(45).all()


def test_one_training_has_its_own_interval_and_curve_has_the_same():
    table = rows(1)
    ax = beside(table, theirs(), "flops", **SAID).axes[0]
    for number, name in enumerate(("AE", "VTP")): assert np.allclose(whiskers(ax, number), table[table.series == name][["low", "high"]])
    for seeds in (1, 3): assert np.allclose(whiskers(curve(rows(seeds), "flops", "value", "series", **SAID), 1), whiskers(beside(rows(seeds), theirs(), "flops", **SAID).axes[0], 1))


def test_seeds_that_lack_a_place_count_there():
    table = rows(3)
    table = table[(table.train_seed < 2) | (table.flops > 2e12)]
    assert over_seeds(table, ["series", "flops"]).set_index(["series", "flops"]).seeds.loc["VTP"].tolist() == [2, 3, 3]


def test_several_rows_of_one_training_at_one_place_are_refused():
    twice = pd.concat([rows().assign(dit_samples=n) for n in (1, 2)])
    for draw in (lambda: beside(twice, theirs(), "flops", **SAID), lambda: curve(twice, "flops", "value", "series", **SAID)):
        with pytest.raises(ValueError, match="choose one of dit_samples first"): draw()
    with pytest.raises(ValueError, match="leave 'x' out"): beside(rows().assign(flops=0), theirs(), "flops", **SAID)
    with pytest.raises(ValueError, match="no column flops"): beside(rows().drop(columns="flops"), theirs(), "flops", **SAID)


@pytest.mark.parametrize("series", [("AE", "VTP"), ("VTP", "AE"), ("VTP",), ("AE-small", "VTP"), ("other", "AE", "AE-small")])
def test_a_series_has_one_look_on_both_sides_and_in_every_figure(series):
    ours, paper = beside(rows(series=series), theirs(), "flops", **SAID).axes
    looks = {}
    for name, look in [*lines(ours).items(), *lines(paper).items()]: assert looks.setdefault(name, look[:3]) == look[:3], name
    assert looks["VTP"] == lines(curve(rows(series=("SSL+AE", "VTP")), "flops", "value", "series", **SAID))["VTP"][:3]
    assert set(looks) == {*series, "AE", "VTP"}
    for column in range(3): assert len({look[column] for look in looks.values()}) == len(looks)


def test_ten_series_are_told_apart_without_colour():
    names = [*SYSTEMS[:5], "AE-small", "AE-d8", "another", "VTP-S", "VTP-B"]
    looks = lines(beside(rows(series=names), theirs()[:0], "flops", **SAID).axes[0])
    assert len({look[0] for look in looks.values()}) == len({look[1] for look in looks.values()}) == len(MARKERS) == len(set(MARKERS)) == len(set(DASHES)) == len(set(HATCHES))
    bar = bars(rows(1, names)[::3].assign(place="end"), "place", "value", "series", **SAID)
    assert len({patch.get_hatch() for patch in bar.patches}) == 10
    points = scatter(rows(1, names), "flops", "value", "series", **SAID)
    assert len({c.get_paths()[0].vertices.tobytes() for c in points.collections}) == 10
    with pytest.raises(ValueError, match="at most 10"): beside(rows(series=[*names, "ninth"]), theirs()[:0], "flops", **SAID)


def test_titles_say_scale_and_hardware_and_the_papers_axis_is_its_own():
    ours, paper = beside(rows(), theirs(), "flops", **SAID, xlabel="training FLOPs").axes
    assert "smoke scale, CPU" in ours.get_title() and "the paper" in paper.get_title() and "smoke" not in paper.get_title()
    assert (ours.get_xlabel(), ours.get_ylabel(), paper.get_xlabel(), paper.get_ylabel()) == ("training FLOPs", "gFD", "training GFLOPs", "gFID")
    for name, look in lines(paper).items():
        assert np.allclose(look[3:], theirs()[theirs().series == name].sort_values("x")[["x", "y"]].T)


@pytest.mark.parametrize("log", ["x", "xy"])
def test_all_points_are_inside_however_wide_two_seeds_are(log):
    table = rows(2).assign(value=lambda t: t.value + 15 * t.train_seed)                    # Student's interval is 12.7 standard errors wide
    ax = beside(table, theirs(), "flops", **SAID, log=log).axes[0]
    low, high = ax.get_ylim()
    y = np.concatenate([look[4] for look in lines(ax).values()])
    assert low < y.min() and y.max() < high and (y.max() - y.min()) / (high - low) > .2 and (low > 0 or "y" not in log)


@pytest.mark.parametrize("x", [(1e12, 1.2e12, 1.5e12), (3.6e10, 7e10, 1.8e11), (2_000, 4_000, 8_000), (1e9, 1e12, 1e15), (41., 42., 43.)])
def test_labels_of_a_logarithmic_axis_are_few_and_apart(x):
    figure = beside(rows().assign(flops=lambda t: t.flops.map(dict(zip((1e12, 3e12, 1e13), x)))), theirs(), "flops", **SAID)
    figure.canvas.draw()
    for ax in figure.axes:
        labels = [label for label in ax.get_xticklabels(which="both") if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        assert 3 <= len(labels) <= 6 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_a_picture_drawn_again_is_the_same_file():
    def draw(table): return picture(beside(table, theirs(), "flops", **SAID), "scale_compute", "smoke", "generation", data="mine")
    path = reports() / "smoke" / "scale_compute.mine-generation.svg"
    assert draw(rows()).axes and path.is_file()
    first = path.read_bytes()
    draw(rows(seed=1))
    assert path.read_bytes() != first
    draw(rows())
    assert path.read_bytes() == first and b"dc:date" not in first and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="give .figure"): picture(curve(rows(), "flops", "value", "series", **SAID), "scale_compute", "smoke")


def test_what_two_experiments_keep_is_one_point():
    made = rows(2).assign(samples=lambda t: t.flops, run=lambda t: "g" + t.index.astype(str), extractor="shapes", dit_samples=100)
    probes = pd.concat([made.assign(metric="probe", tap=tap, pool="mean", value=value, run="p" + made.run, dit_samples=math.nan) for tap, value in (("latent", made.index), ("trunk", -1.))])
    for experiment in ("joint_objectives", "scale_compute"): keep(experiment, "smoke", made, probes)
    keep("hybrid_objectives", "smoke", d8=made.assign(run="8" + made.run), d16=probes)         # a panel without its probes
    met = meet(read(), tap="latent", pool="mean")
    assert len(met) == len(made) and np.allclose(met.sort_values("probe").value, made.value) and sorted(met.probe) == list(made.index)
    with pytest.raises(ValueError, match="several probes"): meet(read(), pool="mean")
