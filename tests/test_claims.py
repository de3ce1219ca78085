"""Verdicts follow the numbers: every claim of the ledger is fed results that show it, that show its opposite, and that show nothing."""
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from vtp.claims import CLAIMS, Claim, Part, paper_said
from vtp.laws import t_quantile
from vtp.ledger import COLUMNS, VERDICTS, answer, judged, ledger, markdown, write
from vtp.paper import load
from vtp.reports import keep, read, reports
from vtp.scaling import ONE_SEED, decided, gain

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 0, 1
NOISE = {0: .995, 1: 1.005}


def rows(series, values, metric="gFD", x="samples", xs=None, seeds=SEEDS, jitter=1., width=.02, **columns):
    "A row for each value and seed. The seeds move by 0.5 %, each series its own way; intervals are ± `width`."
    values, turn = list(values) if hasattr(values, "__len__") else [values], sum(map(ord, series + metric)) % 3 - 1
    found = []
    for seed in seeds:
        for i, value in enumerate(values):
            moved = value * NOISE.get(seed, 1.) ** (jitter * (turn + .3 * i))
            place = {x: xs[i] if xs else 100 * 10 ** i} if x else {}
            about = dict(dit_samples=1000, extractor="net:1") if metric == "gFD" else dict(extractor="net:1") if metric == "rFD" else dict(tap="latent", pool="mean") if metric == "probe" else {}
            found.append(dict(series=series, metric=metric, train_seed=seed, value=moved, low=moved - width * abs(moved), high=moved + width * abs(moved), hardware="CPU") | about | place | columns)
    return pd.DataFrame(found)


def world(sign, seeds=SEEDS):
    "{experiment: panels} where every claim is seen (+1), its opposite (-1), or nothing differs (0)."
    step = {1: 1.5, 0: 1., -1: 1 / 1.5}[sign]
    up = lambda start, **k: dict(values=(start, start * step), **k)                  # more is better
    down = lambda start, **k: dict(values=(start, start / step), **k)                # less is better
    R = lambda *a, **k: rows(*a, seeds=seeds, **k)
    def semantic(metric, base, better): return {name: base if name == "AE" else base * (step if better else 1 / step) * (1 if name != "VTP" else (step if better else 1 / step)) for name in ("AE", "CLIP+AE", "SSL+AE", "VTP")}
    both = [R(name, value, metric) for metric, base, better in (("probe", 20., True), ("gFD", 300., False)) for name, value in semantic(metric, base, better).items()]
    points = [R(f"s{i}", (value,), metric) for i in range(8) for metric, value in (("probe", 10. + i), ("gFD", (300 - 20 * i * sign) if sign else 200 + 17 * ((i * 5) % 8)))]
    ae = (300., 302.) if sign == 1 else (300., 299.) if sign == 0 else (300., 200.)
    epochs = [10, 20, 40, 80]
    slow, sooner = [400 * (n / 10) ** -.5 for n in epochs], [400 * (n * step ** 2 / 10) ** -.5 for n in epochs]
    return dict(
        scale_compute=dict(a=pd.concat([R("AE", **down(50.), metric="rFD"), R("AE", ae), R("VTP", {1: (400., 200.), 0: (301., 300.), -1: (200., 400.)}[sign])])),
        hybrid_objectives=dict(a=pd.concat(both[:3] + both[4:7])), joint_objectives=dict(a=pd.concat(both)), understanding_vs_generation=dict(a=pd.concat(points)),
        scale_data=dict(a=pd.concat([R("VTP", **down(300.), x="pairs"), R("AE", (300., 300.), x="pairs")])),
        scale_params=dict(b=pd.concat([R(f"{name}-{size}", (value,), recipe=name, encoder_m=m, x="") for name, (first, last) in dict(VTP=down(300.)["values"], AE=ae).items() for size, m, value in (("S", 1., first), ("L", 9., last))]),
                          c=pd.concat([R(f"VTP {d}", (value,), recipe="VTP", decoder_m=d, x="") for d, value in zip((4, 24), down(300.)["values"])])),
        table1_autoencoders=dict(a=pd.concat([R("CNN", 300.), R("ViT", {1: 270., 0: 300., -1: 450.}[sign]), R("CNN", 25., "rPSNR"), R("ViT", {1: 27., 0: 25., -1: 20.}[sign], "rPSNR"),
                                              *(rows(name, (g,), "gflops", seeds=(math.nan,), x="").drop(columns=["low", "high"]) for name, g in (("CNN", 4.), ("ViT", 4. / step)))])),
        convergence=dict(a=pd.concat([R("VA-VAE", slow, x="dit_samples", xs=epochs), R("VTP", sooner, x="dit_samples", xs=epochs)])),
        reconstructions=dict(a=pd.concat([R("RAE", 3., "colour_shift"), R("VTP", 3. / step, "colour_shift")])),
        reconstruction_weight=dict(a=R("VTP", (300., 300. * step), x="rec_weight", xs=(.1, 1.))))


def collected(of, experiments=None, scale="demo"):
    for experiment, panels in of.items():
        if experiments is None or experiment in experiments: keep(experiment, scale, **panels)
    return read()


def said(table): return table.set_index("number").verdict.to_dict()


def test_every_claim_is_seen_where_it_holds():
    table = ledger(collected(world(1)))
    assert said(table) == {claim.number: "same" for claim in CLAIMS}, table[table.verdict != "same"][["number", "ours", "notes"]].to_dict("records")
    assert table.seeds.eq("0, 1").all() and table.hardware.eq("CPU").all() and table.interval.str.contains("over 2 seeds|over 8 points").all()


def test_no_claim_is_seen_where_its_opposite_holds():
    table = ledger(collected(world(-1)))
    assert said(table) == {claim.number: "not seen" for claim in CLAIMS}, table[table.verdict != "not seen"][["number", "ours"]].to_dict("records")


def test_where_nothing_differs_only_what_claims_no_difference_is_seen():
    verdicts = said(ledger(collected(world(0))))
    assert verdicts[2] == "same" and all(verdicts[n] in ("trend", "not seen") for n in verdicts if n != 2), verdicts


def test_one_seed_is_a_trend_at_most():
    table = ledger(collected(world(1, seeds=(0,))))
    assert said(table) == {claim.number: "same" if claim.number == 6 else "trend" for claim in CLAIMS}          # a correlation is over points
    assert table.interval[table.number != 6].str.contains(ONE_SEED).all()
    assert set(said(ledger(collected(world(-1, seeds=(0,))))).values()) == {"not seen"}


def test_the_papers_own_numbers_show_its_claims():
    "Each number twice, as two seeds: what the paper prints of claims 1, 2, 7 to 11 and 14 is judged as it judges itself."
    paper = load()
    paper = paper[paper.version == "v1"].assign(value=paper.y, hardware="paper")
    def of(item, panel="", **columns):
        found = paper[(paper["item"] == item) & (paper.panel == panel)].drop(columns=["panel", "item", "version", "protocol"])
        found = found.assign(**{name: column(found) for name, column in columns.items()})
        return pd.concat([found.assign(train_seed=s) for s in SEEDS])
    keep("scale_compute", "paper", of("fig1", "c", samples=lambda t: t.groupby("series").cumcount()), of("fig4", "rFID", samples=lambda t: t.x))
    keep("scale_data", "paper", of("fig7", "a", pairs=lambda t: t.x))
    encoders = of("fig7", "b", recipe=lambda t: t.series.str[:-2], encoder_m=lambda t: t.series.str[-1].map(dict(S=22, B=86, L=304)))
    keep("scale_params", "paper", b=encoders.drop_duplicates(["series", "train_seed"], keep="last"), c=of("fig7", "c", decoder_m=lambda t: t.x))
    keep("table1_autoencoders", "paper", of("table1"))
    verdicts = said(ledger())
    assert {n: verdicts[n] for n in (1, 2, 7, 8, 9, 10, 14)} == dict.fromkeys((1, 2, 7, 8, 9, 10, 14), "same"), verdicts
    assert all(verdicts[n] == "not attempted" for n in (3, 4, 5, 6, 11, 12, 13))
    assert "gFID 81.26 → 26.95 (VTP)" in ledger().set_index("number").ours[14]


def test_what_has_no_rows_is_not_attempted():
    table = ledger(read())
    assert said(table) == {claim.number: "not attempted" for claim in CLAIMS} and tuple(table.columns) == COLUMNS and len(CLAIMS) >= 13
    table = ledger(collected(world(1), {"scale_data"}))
    assert {n for n, verdict in said(table).items() if verdict != "not attempted"} == {7}


def test_a_part_without_rows_leaves_a_trend():
    full = world(1)["hybrid_objectives"]["a"]
    keep("hybrid_objectives", "demo", full[full.metric != "probe"])
    table = ledger().set_index("number")
    assert table.verdict[3] == "trend" and "not attempted: no rows of probe" in table.notes[3]


def test_each_scale_and_data_has_its_line():
    for scale, data, sign in (("smoke", "", -1), ("mini", "", 1), ("mini", "tiny64", 0)): keep("scale_data", scale, *world(sign)["scale_data"].values(), data=data)
    table = ledger()
    lines = table[table.number == 7]
    assert list(zip(lines.scale, lines.data, lines.verdict)) == [("mini", "", "same"), ("mini", "tiny64", lines.verdict.iloc[1]), ("smoke", "", "not seen")] and lines.verdict.iloc[1] != "same"


def test_a_smaller_budget_that_says_the_opposite():
    part = Part("gFID", "VTP", rival="CLIP+AE")
    early, late = (pd.concat([rows("VTP", (v,)), rows("CLIP+AE", (300.,))]).assign(dit_samples=n, panel="") for n, v in ((1000, 400.), (5000, 200.)))
    early, late = (table.assign(who=table.series) for table in (early, late))
    assert judged(part, late).verdict == "same" and judged(part, early).verdict == "not seen"
    found = judged(part, pd.concat([early, late]))
    assert found.verdict == "trend" and "at 1,000 latents of the DiT the opposite" in found.notes[0]
    assert judged(part, pd.concat([early.assign(value=250., low=240, high=260).where(early.series == "VTP", early), late])).verdict == "same"


def test_each_feature_network_and_panel_is_asked():
    part = Part("gFID", "VTP", rival="CLIP+AE")
    good, bad = (pd.concat([rows("VTP", (v,)), rows("CLIP+AE", (300.,))]).assign(extractor=name, panel="") for name, v in (("net:1", 200.), ("mobilenet:2", 400.)))
    good, bad = (table.assign(who=table.series) for table in (good, bad))
    found = judged(part, pd.concat([good, bad]))
    assert found.verdict == "not seen" and "(mobilenet, net)" in found.ours and judged(part, good).verdict == "same"
    panels = pd.concat([good.assign(panel="d64"), bad.assign(panel="d256", extractor="net:1")])
    assert judged(part, panels).verdict == "not seen" and judged(replace(part, panel="d64"), panels).verdict == "same"


def pairs_of(small):
    "VTP generates better than AE, and an AE with a smaller latent generates like `small`."
    made = [rows(name, (v,), metric, x="samples") for name, rec, gen in (("AE", 50., 300.), ("AE-small", 120., small), ("VTP", 70., 220.), ("CLIP+AE", 60., 260.)) for metric, v in (("rFD", rec), ("gFD", gen))]
    return pd.concat(made).assign(panel="", who=lambda table: table.series)


def test_the_control_at_equal_reconstruction():
    part = Part("gFID", "VTP", rival="AE")
    kept, lost = judged(part, pairs_of(290.)), judged(part, pairs_of(60.))
    assert kept.verdict == "same" and "at equal rFD, gFD is 0.7" in kept.notes[1]
    assert lost.verdict == "trend" and "not better by its interval" in lost.notes[1]
    table = pairs_of(60.)
    outside = judged(part, table.assign(value=table.value.where((table.series != "VTP") | (table.metric != "rFD"), 20.)))
    assert outside.verdict == "same" and "no control at equal reconstruction: VTP reconstructs at 20" in outside.notes[1]
    assert judged(part, table[table.series != "AE-small"]).notes[1] == "no control at equal reconstruction was measured"
    staged = pd.concat([table.assign(decoder_samples=10), table[table.metric == "rFD"].assign(decoder_samples=math.nan, value=1.)])      # the first stage's rows beside the second's
    assert judged(part, staged).notes == lost.notes


def test_at_equal_compute():
    "VTP is better after equal samples; whether it is after equal FLOPs depends on what its steps cost."
    part = Part("gFID", "VTP", rival="AE")
    made = pd.concat([rows("AE", (300., 200.)), rows("VTP", (290., 150.))]).assign(panel="", who=lambda table: table.series)
    fair, dear = (judged(part, made.assign(flops=made.samples * made.series.map(dict(AE=1., VTP=cost)))) for cost in (1.1, 9.5))
    assert fair.verdict == "same" and "at 1e+03 FLOPs each, gFD is 0.77" in fair.notes[0]
    assert dear.verdict == "trend" and "not better by its interval" in dear.notes[0] and fair.ours == dear.ours
    assert "not compared at equal FLOPs: VTP was measured from 2e+03" in judged(part, made.assign(flops=made.samples * made.series.map(dict(AE=1., VTP=20.)))).notes[0]
    assert "no checkpoints along both" in judged(part, made).notes[0]


def test_systems_that_saw_unlike_samples():
    part = Part("gFID", "VTP", rival="VA-VAE")
    made = pd.concat([rows("VA-VAE", (300., 200.)), rows("VTP", (290., 150.), xs=(70, 700))]).assign(panel="", who=lambda table: table.series)
    found = judged(part, made)
    assert found.verdict == "trend" and found.notes[0] == "after unlike samples: VTP 700, VA-VAE 1,000" and "150 (VTP), 200 (VA-VAE)" in found.ours


def test_a_lead_over_any_rival_is_asked_again_at_equal_flops():
    "VTP leads at equal samples, having spent four times the FLOPs; at those of its rival it does not."
    at = lambda name, values, flops: rows(name, values).assign(flops=lambda table: table.samples * flops)
    made = pd.concat([at("SSL+AE", (300., 200.), 1.), at("VTP", (400., 100.), 4.)]).assign(panel="", who=lambda table: table.series)
    found = judged(Part("gFID", "VTP", rival="SSL+AE"), made)
    assert found.verdict == "trend" and "times SSL+AE's: not better by its interval" in found.notes[-1]
    alike = judged(Part("gFID", "VTP", rival="SSL+AE"), made.assign(flops=made.samples))
    assert alike.verdict == "same" and "times SSL+AE's" in alike.notes[-1] and "not better" not in alike.notes[-1]


def test_a_correlation_that_equal_samples_contradict_is_not_seen():
    "Both measures improve with compute alone; among systems after equal samples the better probe has the worse distance, or there is one system and nothing to ask."
    def made(systems, inside): return pd.concat([rows(f"s{i}", [start + sign * 5 * t + inside * sign * i for t in range(4)], metric) for i in range(systems) for metric, start, sign in (("probe", 10., 1), ("gFD", 300., -1))])
    part = next(claim.parts[0] for claim in CLAIMS if claim.number == 6)
    judge = lambda table: judged(part, table.assign(panel="", who=table.series))
    crossed = made(4, 0.)
    crossed.loc[crossed.metric == "probe", "value"] += crossed[crossed.metric == "probe"].series.str[1:].astype(int)
    crossed.loc[crossed.metric == "gFD", "value"] += crossed[crossed.metric == "gFD"].series.str[1:].astype(int)
    assert judge(made(4, 1.)).verdict == "same" and judge(crossed).verdict == "not seen" and "equal samples the rank correlation is +" in judge(crossed).notes[0]
    two = made(1, 1.)
    assert judge(pd.concat([two, two.assign(series="other", samples=two.samples + 1)])).verdict == "trend"


@pytest.mark.parametrize("sees, value, low, high, margin, verdict", [
    ("gains", .2, .1, .3, 0, "same"), ("gains", .2, -.1, .5, 0, "trend"), ("gains", -.1, -.5, .3, 0, "not seen"), ("gains", -.2, -.3, -.1, 0, "not seen"), ("gains", 0, 0, 0, 0, "not seen"),
    ("no gain", .05, .02, .08, .1, "same"), ("no gain", -.3, -.4, -.2, .1, "same"), ("no gain", .05, -.05, .15, .11, "trend"), ("no gain", .05, -.2, .3, .1, "not seen"), ("no gain", .2, .05, .4, .1, "not seen"),
    ("as good", -.05, -.08, .1, .1, "same"), ("as good", -.05, -.11, .1, .1, "trend"), ("as good", -.05, -.2, .1, .1, "not seen"), ("gains", .1, -.15, .35, 0, "not seen"), ("as good", -.2, -.3, 0, .1, "not seen"), ("as good", .5, .4, .6, .1, "same")])
def test_the_rules(sees, value, low, high, margin, verdict):
    assert decided(sees, value, low, high, margin)[0] == verdict
    assert decided(sees, value, low, high, margin, ONE_SEED)[0] == ("trend" if verdict == "same" else verdict)


def test_a_trend_is_a_standard_error():
    for seeds, edge in ((1, 1.96), (2, 12.706 / 1.84), (5, 2.776 / 1.142)):      # Student's quantiles at 95 % over those at 68.3 %
        assert decided("gains", 1., 1 - .98 * edge, 9., seeds=seeds)[0] == "trend" and decided("gains", 1., 1 - 1.02 * edge, 9., seeds=seeds)[0] == "not seen"
    assert decided("gains", 1., -math.inf, 9.)[0] == "not seen"


def test_opposites():
    assert decided("gains", -.2, -.3, -.1)[1] and not decided("gains", -.2, -.3, .1)[1]
    assert decided("no gain", .3, .2, .4, .1)[1] and not decided("no gain", .3, .05, .4, .1)[1]
    assert decided("as good", -.3, -.4, -.2, .1)[1] and not decided("as good", -.3, -.4, -.05, .1)[1]


def test_gains_by_hand():
    table = lambda values, width=1.: pd.DataFrame([dict(who="x", train_seed=s, value=v, low=v - width, high=v + width) for s, v in values.items()])
    value, low, high, seeds, over = gain([(1, table({0: 10., 1: 12., 2: 9.})), (-1, table({0: 8., 1: 9., 2: 8.5, 3: 1.}))], "probe")
    half = t_quantile(2) * pd.Series([2, 3, .5]).std() / math.sqrt(3)
    assert (value, seeds, over) == (pytest.approx(5.5 / 3), (0, 1, 2), "over 3 seeds") and (low, high) == (pytest.approx(5.5 / 3 - half), pytest.approx(5.5 / 3 + half))
    value, low, high, _, over = gain([(-1, table({0: 50.})), (1, table({0: 25.}))], "gFD")
    assert value == pytest.approx(math.log(2)) and high - value == pytest.approx(math.hypot(1 / 50, 1 / 25)) and over == ONE_SEED
    with pytest.raises(ValueError, match="several rows of gFD of x for seed 0: pool differ"): gain([(1, pd.concat([table({0: 1.}).assign(pool=p) for p in "ab"]))], "gFD")
    with pytest.raises(ValueError, match="without low and high"): gain([(1, table({0: 1.}).assign(low=math.nan))], "gFD")
    with pytest.raises(ValueError, match="no seed has all of"): gain([(1, table({0: 1.})), (-1, table({1: 1.}))], "gFD")


def test_unlike_cards_are_refused():
    table = world(1)["scale_data"]["a"]
    keep("scale_data", "demo", table.assign(images=[500, 2000] * (len(table) // 2)))
    keep("scale_compute", "demo", *world(1)["scale_compute"].values())
    found = ledger().set_index("number")
    assert found.verdict[7] == "not attempted" and found.notes[7].startswith("can't be judged: claim 7, scale_data: numbers with unlike cards can't be compared: images: 500")
    assert found.verdict[1] == "same" and not found.notes[8], "the other claims are judged all the same"


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="sees='better' must be one of"): Part("gFID", "VTP", "better")
    with pytest.raises(ValueError, match="along an axis, or over a rival"): Part("gFID", "VTP")
    with pytest.raises(ValueError, match="fig7 a has no gFID of RAE"): paper_said(Part("gFID", "RAE", rival="AE", theirs=("fig7", "a", "RAE")))


def test_the_claims_are_the_papers():
    numbers = [claim.number for claim in CLAIMS]
    assert numbers == list(range(1, len(CLAIMS) + 1)) and all(claim.parts and claim.experiments and claim.item for claim in CLAIMS)
    texts = {claim.number: [paper_said(part) for part in claim.parts] for claim in CLAIMS}
    assert texts[1] == ["rFID 2.07 → 0.51 (AE)"] and texts[2] == ["gFID 55.04 → 58.56 (AE)"] and texts[11] == ["4.1 times (VTP over VA-VAE)"] and texts[9] == ["gFID 26.12 → 24.08 (VTP)"]
    assert [claim.number for claim in CLAIMS if not any(map(paper_said, claim.parts))] == [3, 4, 6, 12, 13]         # drawn or said, but no number can be read


def test_markdown_and_file():
    table = ledger(collected(world(1), {"scale_data"}))
    text = markdown(table)
    assert text.count("\n") == len(table) + 1 and all(line.count(" | ") == 7 for line in text.split("\n")[2:]) and "**same**" in text
    assert all(line.count(" | ") == 6 for line in markdown(table, notes=False).split("\n")[2:])
    path = write()
    assert path == reports().parent / "claims.csv" and pd.read_csv(path, dtype=str).verdict.tolist() == table.verdict.tolist() and set(table.verdict) <= set(VERDICTS)


def test_command_line(tmp_path):
    keep("scale_data", "demo", *world(1)["scale_data"].values())
    done = subprocess.run([sys.executable, "-m", "vtp.ledger"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| 7 | VTP gains from more data" in done.stdout and (reports().parent / "claims.csv").read_text() == ledger().to_csv(index=False, lineterminator="\n")


def test_the_ledger_in_the_repository_is_that_of_its_reports():
    assert (ROOT / "data" / "claims.csv").read_text() == ledger(read(ROOT / "data" / "reports")).to_csv(index=False, lineterminator="\n"), "run `python -m vtp.ledger`"


def test_an_experiment_answers_before_another():
    claim = Claim(1, "x", "y", ("first", "second"), (Part("gFID", "VTP", along="pairs"),))
    for name, sign in (("first", -1), ("second", 1)): keep(name, "demo", *world(sign)["scale_data"].values())
    assert answer(claim, read())["experiment"] == "first" and answer(claim, read())["verdict"] == "not seen"
    assert answer(replace(claim, experiments=("none", "second")), read())["verdict"] == "same"


def test_reports_keep_other_seeds():
    table = rows("VTP", (1., 2.), seeds=(0,))
    keep("one", "demo", table)
    keep("one", "demo", table.assign(train_seed=1, value=5.))
    path = keep("one", "demo", table.assign(value=7.), data="")
    assert read().groupby("train_seed").value.unique().map(list).to_dict() == {0: [7.], 1: [5.]} and path == reports() / "demo" / "one.csv"
    assert keep("one", "demo", table, data="tiny64").name == "one.tiny64.csv" and set(read().data) == {"", "tiny64"}
    exact = table.assign(value=1 / 3)
    keep("one", "demo", exact)
    assert read()[read().data == ""].value.iloc[0] == 1 / 3                                     # nothing is rounded
    with pytest.raises(ValueError, match="no column metric, value"): keep("one", "demo", table.drop(columns=["metric", "value"]))
    (reports() / "demo" / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv is no report: it lacks experiment"): read()
    with pytest.raises(ValueError, match="no row to keep"): keep("one", "demo", table.assign(value=math.nan))
