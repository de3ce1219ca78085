"""The end of an experiment: rows kept with one sign give the opposite verdicts of rows kept with the other, and the text says no number but theirs and the paper's."""
import re

import pandas as pd
import pytest

from vtp.claims import CLAIMS
from vtp.ledger import ledger, verdicts
from vtp.reports import keep, read

MARKS = {100: 1e9, 400: 4e9, 1000: 1e10}                        # samples: FLOPs


def rows(series, metric, values, seeds=(0, 1), cost=1., budgets=(None,), width=.01):
    "Rows as scale_compute collects them: a value for each mark, moved by half a per cent with the seed."
    said = dict(extractor="net:1", hardware="CPU", run="evaluate-1", **{"job.kind": "evaluate"})
    return pd.DataFrame([dict(series=series, metric=metric, train_seed=seed, mark=samples, samples=samples, flops=cost * flops, dit_samples=budget, value=moved, low=moved * (1 - width), high=moved * (1 + width)) | said
                         for seed in seeds for budget in budgets for (samples, flops), value in zip(MARKS.items(), values) for moved in [value * (1 + .005 * (seed - .5))]])


FLAT, FALLS, RISES = (50., 50.5, 51.), (60., 45., 30.), (40., 50., 60.)


def study(ae=FLAT, vtp=FALLS, small=(48., 47., 46.), rebuilt=(9., 6., 4.), **settings):
    "What an experiment would have measured; VTP's step costs 1.5 times AE's."
    made = [rows(name, "gFD", values, cost=cost, budgets=(3000, 6000), **settings) for name, values, cost in (("AE", ae, 1.), ("AE-small", small, 1.), ("VTP", vtp, 1.5))]
    return made + [rows(name, "rFD", values, cost=cost, **settings) for name, values, cost in (("AE", rebuilt, 1.), ("AE-small", (14., 12., 10.), 1.), ("VTP", (11., 8., 6.), 1.5))]


def answers(text):
    "{claim: verdict} and {claim: its bullets} of the Markdown."
    found = [part.rstrip().split("\n") for part in re.split(r"(?m)^- ", text.split("\n\n")[0].rstrip())[1:]]
    heads = [re.match(r"\*\*(.+?)\*\* – claim (\d+) ", lines[0]) for lines in found]
    return {int(head[2]): head[1] for head in heads}, {int(head[2]): "\n".join(lines) for head, lines in zip(heads, found)}


def said(*tables, scale="smoke", data=""):
    keep("scale_compute", scale, *tables, data=data)
    return verdicts("scale_compute", scale, data)


def test_the_papers_pattern_is_seen():
    found, lines = answers(text := said(*study()))
    assert found == {1: "same", 2: "same", 14: "same"}
    assert "rFD 9 → 4 (AE): gain +55.6 %" in lines[1] and "gFD 50 → 51 (AE): gain -2 %" in lines[2] and "gFD 60 → 30 (VTP): gain +50 %" in lines[14]
    assert "paper: gFID 81.26 → 26.95 (VTP)" in lines[14] and "at 1e+10 FLOPs each, gFD is 0.7" in lines[14] and "at equal rFD, gFD is 0.6" in lines[14]
    assert "over 2 seeds (seeds 0, 1)" in lines[2] and "Scale `smoke`, seeds 0, 1 on CPU." in text and "Small scale is small scale" in text


def test_the_opposite_is_not():
    "AE's generation improves too, its reconstruction gets worse, and VTP gets worse."
    found, lines = answers(said(*study(ae=FALLS, vtp=RISES, rebuilt=(4., 6., 9.))))
    assert found == {1: "not seen", 2: "not seen", 14: "not seen"}
    assert "rFD 4 → 9 (AE): gain -125 %" in lines[1] and "gFD 60 → 30 (AE): gain +50 %" in lines[2] and "gFD 60 (VTP), 30 (AE): gain -100 %" in lines[14]


@pytest.mark.parametrize("ae, vtp, saturates, better", [(FLAT, FALLS, "same", "same"), (FLAT, RISES, "same", "not seen"), (FALLS, (60., 40., 20.), "not seen", "same"), (FALLS, (70., 60., 50.), "not seen", "not seen")])
def test_ae_and_vtp_each_have_their_verdict(ae, vtp, saturates, better):
    found, _ = answers(said(*study(ae=ae, vtp=vtp, small=(200., 200., 200.))))
    assert found == {1: "same", 2: saturates, 14: better}


def test_a_lead_of_little_detail_is_a_trend():
    "The smaller latent generates like VTP where it rebuilds like VTP; and at equal FLOPs AE may be ahead."
    found, lines = answers(said(*study(small=(20., 15., 10.))))
    assert found[14] == "trend" and "not better by its interval" in lines[14]
    late = [table.assign(flops=table.flops * 4.) if table.series.iloc[0] == "VTP" else table for table in study(vtp=(80., 70., 45.))]
    found, lines = answers(said(*late, data="dear"))
    assert found[14] == "trend" and re.search(r"at 1e\+10 FLOPs each, gFD is 1\.\d+ .* not better by its interval", lines[14])


def test_a_lead_that_a_short_dit_does_not_show_is_a_trend():
    made = study()
    turned = [table.assign(value=table.value.where(table.dit_samples != 3000, 90.), low=table.low.where(table.dit_samples != 3000, 89.), high=table.high.where(table.dit_samples != 3000, 91.)) if table.series.iloc[0] == "VTP" and table.metric.iloc[0] == "gFD" else table for table in made]
    found, lines = answers(said(*turned))
    assert found[14] == "trend" and "at 3,000 latents of the DiT the opposite" in lines[14]
    found, lines = answers(said(*study(vtp=RISES), data="both"))                     # both budgets say so: no budget is the opposite of the other
    assert found[14] == "not seen" and "the opposite" not in lines[14]


def test_one_seed_is_a_trend_and_says_so():
    found, lines = answers(text := said(*study(seeds=(0,))))
    assert set(found.values()) == {"trend"} and "one seed: over images or samples (seed 0)" in lines[2] and "One training each" in text
    assert "One training each" not in said(*study(seeds=(1,)))                       # kept beside seed 0: now there are two
    assert set(answers(verdicts("scale_compute", "smoke"))[0].values()) == {"same"}


def test_what_was_not_measured_is_not_attempted():
    found, lines = answers(said(*(table for table in study() if table.metric.iloc[0] == "gFD")))
    assert found == {1: "not attempted", 2: "same", 14: "same"} and lines[1].endswith("- why: no rows of rFID")
    found, lines = answers(said(*(table for table in study() if table.series.iloc[0] != "AE"), data="halves"))
    assert found == {1: "not attempted", 2: "not attempted", 14: "trend"} and "why: no rows of AE" in lines[2] and "not attempted: no rows of AE" in lines[14]
    one = [table[table.samples == 1000] for table in study()]
    found, lines = answers(said(*one, data="ends"))
    assert found == {1: "not attempted", 2: "not attempted", 14: "trend"} and "why: AE has not two places along samples" in lines[2]


def test_each_scale_and_data_speaks_for_itself():
    keep("scale_compute", "smoke", *study())
    keep("scale_compute", "mini", *study(ae=FALLS, vtp=RISES))
    keep("scale_compute", "mini", *study(), data="mine")
    keep("joint_objectives", "mini", *study(ae=RISES))
    first, second, third = (answers(verdicts("scale_compute", *of))[0] for of in (("smoke",), ("mini",), ("mini", "mine")))
    assert first == third == {1: "same", 2: "same", 14: "same"} and second == {1: "same", 2: "not seen", 14: "not seen"}
    assert "Scale `mini`, pairs of `mine`" in verdicts("scale_compute", "mini", "mine")
    keep("scale_compute", "paper", *study())
    assert "Small scale" not in verdicts("scale_compute", "paper")


def test_it_is_the_ledgers_verdict():
    keep("scale_compute", "smoke", *study(small=(20., 15., 10.)))
    table, (found, lines) = ledger(read()).set_index("number"), answers(verdicts("scale_compute", "smoke"))
    assert set(found) == {claim.number for claim in CLAIMS if "scale_compute" in claim.experiments} and found == table.verdict[list(found)].to_dict()
    for number, text in lines.items(): assert all(str(table.loc[number][column]) in text for column in ("paper", "ours", "interval", "notes", "seeds"))


def test_every_experiment_of_a_claim_can_ask():
    for experiment in sorted({name for claim in CLAIMS for name in claim.experiments}):
        keep(experiment, "smoke", pd.DataFrame([dict(series="VTP", metric="none", value=1.)]))
        found, lines = answers(text := verdicts(experiment, "smoke"))
        assert set(found) == {claim.number for claim in CLAIMS if experiment in claim.experiments} and set(found.values()) == {"not attempted"} and all("why: " in line for line in lines.values())
        assert "Scale `smoke`, seed not named." in text


def test_what_cant_be_asked_is_refused():
    with pytest.raises(ValueError, match="no claim names 'quickstart': choose from .*scale_compute"): verdicts("quickstart", "smoke")
    with pytest.raises(ValueError, match="scale_compute has no rows at scale 'smoke': keep them first"): verdicts("scale_compute", "smoke")
    keep("scale_compute", "smoke", *study())
    with pytest.raises(ValueError, match="no rows at scale 'smoke' of data 'mine'"): verdicts("scale_compute", "smoke", "mine")
    keep("scale_compute", "smoke", *(table.assign(size=[16, 32] * (len(table) // 2)) for table in study()))
    with pytest.raises(ValueError, match="claim 1, scale_compute: numbers with unlike cards"): verdicts("scale_compute", "smoke")
