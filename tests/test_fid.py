"""Fréchet distance, inception score, precision and recall: against torch-fidelity, scipy and closed forms, and over ranks."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.data.augment import RESIZE
from vtp.data.imagenet import ImageFolder
from vtp.data.shapes import Shapes
from vtp.dist import rank, world
from vtp.evaluation import fid
from vtp.evaluation.fid import Measured, Seen, Stats, bootstrap, frechet, inception_score, measure, originals, precision_recall, quantise, reference
from vtp.evaluation.generation import GenerationQuality
from vtp.evaluation.protocol import PROTOCOLS
from vtp.ranks import start


class Means(torch.nn.Module):
    "An extractor of twelve features: means of quarters of each channel."
    label, hash, official, dim = "means", "0123456789", False, 12

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1).float()


def features(n, dim, seed, decades=0.):
    "Correlated features of one law, with a spectrum over so many decades."
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)) / dim**.5 * torch.logspace(0, -decades, dim)
    return torch.randn(n, dim, generator=generator) @ mixing + .05 * seed


# torch-fidelity on the same features. Its inputs are (measured, reference).

@pytest.mark.parametrize("n,dim,decades", [(500, 16, 0.), (800, 256, 0.), (1000, 256, 2.), (150, 64, 1.)])
def test_distance_equals_torch_fidelity(n, dim, decades):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    fake, real = features(n, dim, 1, decades), features(n + 100, dim, 2, decades)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (fake, real)), verbose=False)[KEY_METRIC_FID]
    assert frechet(*(Stats(dim).update(f) for f in (fake, real))) == pytest.approx(theirs, rel=1e-6)


def test_score_equals_torch_fidelity():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    logits = 3 * features(1003, 40, 1)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx((theirs[KEY_METRIC_ISC_MEAN], theirs[KEY_METRIC_ISC_STD]), rel=1e-6)
    assert inception_score(logits.double().log_softmax(1)) == pytest.approx(inception_score(logits), rel=1e-12)


@pytest.mark.parametrize("n,m,dim,k", [(300, 200, 8, 3), (120, 500, 64, 5)])
def test_precision_and_recall_equal_torch_fidelity(n, m, dim, k, monkeypatch):
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    real, fake = features(n, dim, 1), .8 * features(m, dim, 4)
    theirs = calculate_precision_recall_full(fake.double(), real.double(), neighborhood=k)
    assert precision_recall(real, fake, k) == pytest.approx(theirs, rel=1e-6) and 0 < theirs[0] < 1 and 0 < theirs[1] < 1
    monkeypatch.setattr(fid, "_ENTRIES", 7 * n)
    assert precision_recall(real, fake, k) == pytest.approx(theirs, rel=1e-6)


# Against scipy and closed forms.

def test_distance_equals_sqrtm():
    import scipy.linalg
    a, b = (Stats(128).update(features(400, 128, seed, 1.)) for seed in (1, 2))
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
    theirs = ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()).item() - 2 * np.trace(root).real
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("n", [2, 20, 63, 64, 65, 1000])
def test_a_set_is_at_no_distance_from_itself(n):
    stats = Stats(64).update(features(n, 64, 0, 2.))
    assert abs(frechet(stats, stats)) < 1e-6 * stats.cov.trace()


def test_fewer_images_than_dimensions():
    "Also with dead features and with each image twice; the trace from the n × m matrix of products is exact."
    few, other = features(30, 200, 1).double(), features(50, 200, 2).double()
    few[:, :20] = 0
    for p, q in ((few, other), (few.repeat(2, 1), other), (few, features(3000, 200, 2).double())):
        a, b = Stats(200).update(p), Stats(200).update(q)
        overlap = torch.linalg.svdvals((p - p.mean(0)) @ (q - q.mean(0)).T).sum() / math.sqrt((len(p) - 1) * (len(q) - 1))
        true = ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * overlap).item()
        assert frechet(a, b) == pytest.approx(true, rel=1e-7) and frechet(b, a) == pytest.approx(true, rel=1e-7)


def test_two_gaussians():
    "Samples of two known laws approach the distance of the laws from above."
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, mean, spread: torch.randn(n, 10, generator=generator, dtype=torch.float64) * spread + mean
    true = 10 * (.5**2 + .3**2)
    found = [frechet(Stats(10).update(draw(n, 0, 1)), Stats(10).update(draw(n, .5, 1.3))) for n in (100, 100_000)]
    assert found[0] > found[1] == pytest.approx(true, rel=.02)


def test_a_mean_far_from_zero_costs_no_digits():
    x = features(2000, 32, 1).double()
    near, far = Stats(32), Stats(32)
    for part in x.split(64):
        near.update(part)
        far.update(part + 2.**20)
    assert torch.allclose(far.cov, near.cov, rtol=0, atol=1e-8 * near.cov.abs().max())


def test_not_finite_is_refused():
    bad = features(20, 4, 1)
    bad[3, 2] = math.inf
    with pytest.raises(ValueError, match="not finite"): frechet(Stats(4).update(bad), Stats(4).update(features(20, 4, 1)))
    with pytest.raises(ValueError, match="not finite"): quantise(bad, "round")
    with pytest.raises(ValueError, match="uint8"): Seen(Means()).add([0], torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="draws"): bootstrap(Stats(4).update(features(20, 4, 1)), features(20, 4, 1), draws=1)
    with pytest.raises(ValueError, match="at least 4"): bootstrap(Stats(4).update(features(20, 4, 1)), features(3, 4, 1))


def test_what_is_refused_changes_nothing():
    "Statistics of an unknown number of images can't be added to, nor added; nor those of another dimension."
    known, unknown = Stats(4).update(features(20, 4, 1)), Stats(4).update(features(20, 4, 2))
    unknown.n, unknown.scatter = None, unknown.cov
    for first, act in ((known, lambda: known.merge(unknown)), (unknown, lambda: unknown.merge(known)), (unknown, lambda: unknown.update(features(20, 4, 1))), (known, lambda: known.merge(Stats(1).update(features(20, 1, 1))))):
        before = first.digest
        with pytest.raises(ValueError, match="can't be added"): act()
        assert first.digest == before


# Intervals.

@pytest.mark.parametrize("n,dim", [(500, 256), (200, 256), (800, 64)])
def test_intervals_are_as_wide_as_sets_scatter(n, dim):
    "Of a distance to a reference, with a falling spectrum; redrawn with replacement, those of the first two would be over twice too wide."
    generator, scale = torch.Generator().manual_seed(0), torch.logspace(0, -1.5, dim, dtype=torch.float64)
    draw = lambda n: scale * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    real = Stats(dim).update(draw(8 * dim))
    sets = [1.15 * draw(n) + .05 for _ in range(50)]
    values = np.array([frechet(real, Stats(dim).update(s)) for s in sets])
    found = [bootstrap(real, s, draws=10, seed=i) for i, s in enumerate(sets[:20])]
    assert [f["value"] for f in found] == pytest.approx(values[:20], rel=1e-9)
    claimed = np.mean([f["high"] - f["value"] for f in found]) / 1.96
    assert .75 < claimed / values.std(ddof=1) < 1.6 and np.mean([f["low"] < values.mean() < f["high"] for f in found]) > .85
    if n < 2 * dim:
        picks = torch.randint(n, (10, n), generator=generator)
        assert np.std([frechet(real, Stats(dim).update(sets[0][p])) for p in picks], ddof=1) > 1.8 * values.std(ddof=1)


# Over ranks.

SOURCE = Shapes(count=130, size=16)


def whole(batch, uneven=False):
    "Measured on all ranks of the walk; if uneven, rank 0 sees everything and the others nothing."
    if not uneven: return summary(measure(originals(SOURCE.open(), None, 16, "center_crop", batch), Means(), keep=True))
    seen = Seen(Means(), keep=True)
    if rank() == 0:
        indices = SOURCE.open().order(0, np.arange(130))
        images = torch.from_numpy(np.stack([p.image for p in SOURCE.open().read(indices, indices)])).permute(0, 3, 1, 2)
        seen.add(np.arange(130), images)
    return summary(seen.reduced())


def summary(measured):
    return world(), measured.stats.n, measured.stats.mean, measured.stats.cov, measured.features


def referred(folder):
    "A reference made by all ranks, then found by all."
    import os
    os.environ["VTP_CACHE"] = folder
    made, found = (reference(SOURCE, Means(), 16, batch=9, keep=True) for _ in range(2))
    return made.stats.digest == found.stats.digest and torch.equal(made.features, found.features), made.name, made.stats.cov


def same(a, b):
    return a[1] == b[1] == 130 and torch.allclose(a[2], b[2], rtol=1e-13) and torch.allclose(a[3], b[3], rtol=1e-11, atol=1e-12 * a[3].max()) and torch.equal(a[4], b[4])


def test_batches_do_not_matter():
    assert same(whole(64), whole(1)) and same(whole(64), whole(7)) and same(whole(64), whole(130))


@pytest.mark.timeout(120)
def test_ranks_do_not_matter():
    one = whole(64)
    for batch, uneven in ((16, False), (1, True)):
        two = start(whole, batch, uneven, nproc=2)
        assert two[0] == 2 and same(one, two), (batch, uneven)


@pytest.mark.timeout(120)
def test_reference_over_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))     # put back afterwards
    equal, name, cov = start(referred, str(tmp_path), nproc=2)
    files = list((tmp_path / "statistics").iterdir())
    assert equal and len(files) == 1 and files[0].suffix == ".safetensors"
    equal, again, alone = referred(str(tmp_path / "other"))
    assert equal and again == name and torch.allclose(alone, cov, rtol=1e-11)


# References.

def folder(path, torn=0):
    "60 images of 24 × 40 pixels in files, of which `torn` can't be read."
    (path / "class").mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, 3, 5, 3), dtype=np.uint8)):
        Image.fromarray(image).resize((40, 24), Image.NEAREST).save(file := path / "class" / f"{i:03}.png")
        if i < torn: file.write_bytes(file.read_bytes()[:60])
    return ImageFolder(str(path))


def by_hand(path, resize, files=None):
    "Statistics of a folder's images, opened and brought to 16 pixels one by one."
    images = [np.asarray(Image.open(file)) for file in files or sorted(path.glob("*/*.png"))]
    return Stats(12).update(Means()(torch.cat([RESIZE[resize]([image], 16) for image in images])))


def test_references_are_resized_as_they_say(tmp_path, monkeypatch):
    "By `reference`, and by the evaluator of generated images, whose card says so; as many as they should be."
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    source, true = folder(tmp_path / "images"), {how: by_hand(tmp_path / "images", how) for how in RESIZE}
    assert frechet(*true.values()) > 1
    for how in RESIZE:
        assert frechet(reference(source, Means(), 16, resize=how).stats, true[how]) < 1e-6
        quality = GenerationQuality(reference=source, samples=20, resize=how)
        real, near = quality.references(Means(), 16, "cpu")
        assert frechet(real.stats, true[how]) < 1e-6 and real.stats.n == 60 and near.features.shape == (20, 12)
        first = source.open().order(0, np.arange(20))
        assert frechet(near.stats, by_hand(tmp_path / "images", how, [sorted((tmp_path / "images").glob("*/*.png"))[i] for i in first])) < 1e-6
    assert len({reference(source, Means(), 16, resize=how).name for how in RESIZE}) == len(RESIZE)


def test_a_reference_of_torn_images(tmp_path, monkeypatch):
    "Refused, and not kept, if more of them are missing than is agreed; otherwise under another name than the whole."
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    torn, whole = folder(tmp_path / "torn", torn=30), reference(folder(tmp_path / "whole"), Means(), 16)
    for _ in range(2):
        with pytest.raises(ValueError, match="30 of the reference's 60 images can't be read.*mend"): reference(torn, Means(), 16)
    monkeypatch.setattr(fid, "UNREADABLE", .5)
    less, again = (reference(torn, Means(), 16) for _ in range(2))
    assert less.stats.n == again.stats.n == 30 and whole.stats.n == 60 and less.name == again.name != whole.name
    monkeypatch.setattr(fid, "UNREADABLE", .01)     # what was kept under another rule is not served
    with pytest.raises(ValueError, match="30 of the reference's 60"): reference(torn, Means(), 16)


def test_statistics_of_ones_own_have_no_published_name(tmp_path):
    stats = Stats(12).update(features(50, 12, 1))
    stats.save(tmp_path / "VIRTUAL_imagenet256_labeled.safetensors")
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", mu=stats.mean.numpy(), sigma=stats.cov.numpy())
    own, adm = (reference(str(tmp_path / f"VIRTUAL_imagenet256_labeled.{kind}"), Means(), 256).name for kind in ("safetensors", "npz"))
    protocol = PROTOCOLS["gfid10k_b_dopri5"]
    card = protocol.fixed | {"metric": "gFID"}
    assert protocol.misses(card | {"reference": adm}) == [] and len(protocol.misses(card | {"reference": own})) == 1


def test_statistics_of_files(tmp_path):
    "ADM's .npz without unpickling; the wrong dimension and a missing file name the fix."
    stats = measure(originals(SOURCE.open(), None, 16, "center_crop", 64), Means()).stats
    np.savez(tmp_path / "adm.npz", mu=stats.mean.numpy(), sigma=stats.cov.numpy(), mu_s=np.zeros(3))
    found = reference(str(tmp_path / "adm.npz"), Means(), 16)
    assert isinstance(found, Measured) and frechet(found.stats, stats) == pytest.approx(0, abs=1e-6) and found.stats.n is None and found.features is None
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="another extractor"): reference(str(tmp_path / "other.npz"), Means(), 16)
    with pytest.raises(FileNotFoundError, match="curl -LO"): reference(str(tmp_path / "none.npz"), Means(), 16)
