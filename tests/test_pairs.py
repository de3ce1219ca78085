"""Pairs from shards: what no notebook cell can show: real data, many processes, damage at random."""
import io
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vtp.data.pairs import Shards
from vtp.data.samples import Bad, Pair, Reader, hash_key, mix, uniform
from vtp.data.shapes import Shapes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def real(shared, tmp_path_factory, monkeypatch):
    "The real images, with one cache of indexes for all tests."
    cache = tmp_path_factory.getbasetemp() / "real-cache"
    monkeypatch.setenv("VTP_CACHE", str(cache))
    return shared


def sample(i, size=(12, 10)):
    "One sample's members: an image of noise, two captions, a label."
    pixels = (uniform(i, np.arange(size[0] * size[1] * 3)) * 256).astype(np.uint8).reshape(*size, 3)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    captions = json.dumps({"captions": [f"noise {i}", f"no. {i}"]}).encode()
    return {"png": file.getvalue(), "txt": f"noise {i}".encode(), "json": captions, "cls": str(i % 3).encode()}


def write(path, samples, mode="w", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **settings) as tar:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def read_all(reader):
    return reader.read(np.arange(len(reader)), reader.keys)


def same(a, b):
    return (a == b) if isinstance(a, Bad) else ((a.image == b.image).all() and a[1:] == b[1:])


# ---------------------------------------------------------------- order

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(sum), st.integers(1, 4), st.integers(-5, 2**40), st.integers(0, 9))
def test_an_epoch_is_a_permutation_entered_anywhere(sizes, pool, seed, epoch):
    reader = Reader()
    reader.starts, reader.pool = np.cumsum([0, *sizes]), pool
    reader.keys = mix(np.arange(sum(sizes)))
    n = len(reader)
    dealt = reader.order(seed, epoch * n + np.arange(n))
    assert sorted(dealt) == list(range(n))
    shuffled = np.argsort(uniform(np.arange(n), 0))
    assert (reader.order(seed, epoch * n + shuffled) == dealt[shuffled]).all()
    blocks = np.searchsorted(reader.starts, dealt, side="right")       # at most `pool` shards are open at a time
    assert all(len(set(blocks[blocks == b])) == 1 for b in blocks)
    first, last = {}, {}
    for place, block in enumerate(blocks): first.setdefault(block, place), last.update({block: place})
    assert max(sum(first[b] <= place <= last[b] for b in first) for place in range(n)) <= pool


def test_order_does_not_depend_on_who_asks():
    config = Shapes(count=1000, size=8)
    whole = config.open().order(7, np.arange(3000))
    ranks = [config.open().order(7, np.arange(r, 3000, 4)) for r in range(4)]
    assert (np.stack(ranks, 1).ravel() == whole).all()
    assert (config.open().order(7, np.arange(1500, 3000)) == whole[1500:]).all()


def test_order_is_even():
    "Every sample is equally likely to come first."
    reader = Shapes(count=8, size=8).open()
    first = [reader.order(seed, [0])[0] for seed in range(4000)]
    assert np.abs(np.bincount(first) - 500).max() < 100


# ---------------------------------------------------------------- shards

def test_gzip_plain_pax_and_long_names_give_the_same(tmp_path):
    samples = {f"{'d' * 120}/é{i:03}": sample(i) for i in range(9)}
    paths = [write(tmp_path / "a.tar", samples), write(tmp_path / "b.tar.gz", samples, "w:gz"),
             write(tmp_path / "c.tar", samples, format=tarfile.GNU_FORMAT), write(tmp_path / "d.tgz", samples, "w:gz")]
    readers = [Shards(str(path)).open() for path in paths]
    for reader in readers:
        assert reader.digest == readers[0].digest or reader.lengths.tolist() != readers[0].lengths.tolist()
        assert (reader.keys == readers[0].keys).all() and not reader.bad
        assert all(map(same, read_all(reader), read_all(readers[0])))
    assert read_all(readers[0])[3].key == f"{'d' * 120}/é003" and hash_key(f"{'d' * 120}/é003") == readers[0].keys[3]


def test_labels_without_captions_and_captions_without_labels(tmp_path):
    bare = {f"{i}": {k: sample(i)[k] for k in ("png", "cls")} | {"json": b'{"width": 10}'} for i in range(4)}
    reader = Shards(str(write(tmp_path / "a.tar", bare))).open()
    assert reader.labelled and not reader.captioned and not reader.bad
    assert [(p.caption, p.label) for p in read_all(reader)] == [(None, i % 3) for i in range(4)]
    told = {f"{i}": {"png": sample(i)["png"], "json": b'{"caption": "a dog"}'} for i in range(4)}
    reader = Shards(str(write(tmp_path / "b.tar", told))).open()
    assert reader.captioned and not reader.labelled and {(p.caption, p.label) for p in read_all(reader)} == {("a dog", -1)}


def test_a_mixture_of_sets_has_no_labels(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": {"pets": ["dog", "cat", "cow"], "cars": ["bus", "cab", "van"]}, "templates": ["{c}"]}))
    pets = write(tmp_path / "pets" / "0.tar", {f"p{i}": sample(i) for i in range(4)})
    cars = write(tmp_path / "cars-0.tar", {f"c{i}": sample(i) for i in range(4)})
    assert Shards(str(pets)).open().classes == ("dog", "cat", "cow")
    assert Shards(str(cars), manifest=str(tmp_path / "manifest.json")).open().classes == ("bus", "cab", "van")
    both = Shards((str(pets), str(cars))).open()
    assert both.classes is None and not both.labelled and both.captioned and {p.label for p in read_all(both)} == {-1}


def test_splits_and_subsets_ignore_packing(tmp_path):
    samples = {f"{i:04}": sample(i, (4, 4)) for i in range(300)}
    one = Shards(str(write(tmp_path / "one.tar", samples)))
    for part in range(3): write(tmp_path / "three" / f"{part}.tar", {k: samples[k] for k in sorted(samples, reverse=True)[part::3]})
    for settings_ in (dict(subset=50), dict(split="val"), dict(split="train", subset=90), dict(split="val", held_out=3)):
        a = set(Shards(one.urls, **settings_).open().keys.tolist())
        assert a == set(Shards(str(tmp_path / "three/*.tar"), **settings_).open().keys.tolist())
    train, val = (set(Shards(one.urls, split=split).open().keys.tolist()) for split in ("train", "val"))
    assert not train & val and len(train | val) == 300 and 15 <= len(val) <= 48
    subsets = [set(Shards(one.urls, split="train", subset=n).open().keys.tolist()) for n in (10, 40, 160)]
    assert subsets[0] < subsets[1] < subsets[2] < train


# ---------------------------------------------------------------- damage

@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_cost_only_what_they_touch(tmp_path, seed):
    "Flip bytes anywhere in a shard: opening and reading never fail, and all that is read without a complaint was not touched."
    good = write(tmp_path / "good.tar", {f"{i:03}": sample(i) for i in range(30)}).read_bytes()
    clean = {p.key: p for p in read_all(Shards(str(tmp_path / "good.tar")).open())}
    for trial in range(6):
        data = bytearray(good)
        for at in (uniform(mix(seed, trial), np.arange(5)) * len(good)).astype(int): data[at] ^= 0x55
        path = tmp_path / f"damaged-{trial}.tar"
        path.write_bytes(data)
        try: reader = Shards(str(path)).open()
        except ValueError as error:
            assert "no usable sample" in str(error)
            continue
        samples = read_all(reader)
        whole = [p for p in samples if isinstance(p, Pair)]
        assert sum(p.key in clean and same(p, clean[p.key]) for p in whole) >= len(whole) - 5
        if not reader.bad: assert len(samples) >= 25


def test_torn_gzip_and_wrong_checksum(tmp_path):
    path = write(tmp_path / "a.tar.gz", {f"{i:03}": sample(i) for i in range(30)}, "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    reader = Shards(str(path)).open()
    assert len(reader.bad) == 1 and "torn" in reader.bad[0].reason and 10 <= len(reader) < 30
    assert [p.key for p in read_all(reader)] == [f"{i:03}" for i in range(len(reader))]
    path.write_bytes(data[:-8] + b"\0" * 8)
    reader = Shards(str(path)).open()
    assert len(reader.bad) == 1 and "CRC" in reader.bad[0].reason and len(reader) == 30      # which is damaged, if any, its decoder says
    path.write_bytes(data + b"behind the end")
    reader = Shards(str(path)).open()
    assert len(reader.bad) == 1 and len(reader) == 30
    path.write_bytes(b"these are no shards" * 100)
    with pytest.raises(ValueError, match="no usable sample"): Shards(str(path)).open()


def test_a_flipped_header_costs_one_sample(tmp_path):
    path = write(tmp_path / "a.tar", {f"{i:03}": sample(i) for i in range(30)})
    data = path.read_bytes()
    with tarfile.open(path) as tar: headers = [(m.offset, m.name[:3]) for m in tar]
    for at, key in headers[::3]:
        path.write_bytes(data[:at + 150] + b"!" + data[at + 151:])
        reader = Shards(str(path)).open()
        assert [b.key for b in reader.bad] == [key] and [p.key for p in read_all(reader)] == [f"{i:03}" for i in range(30) if f"{i:03}" != key]


def test_a_mac_s_shadow_files_between_members_are_nobody_s(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            for extension, content in sample(i).items():
                for name, data in ((f"._{i}.{extension}", b"shadow"), (f"{i}.{extension}", content)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    reader = Shards(str(path)).open()
    assert [(p.key, p.label) for p in read_all(reader)] == [("0", 0), ("1", 1), ("2", 2)] and not reader.bad


def test_a_shard_that_says_gz_and_is_none_and_the_other_way_round(tmp_path):
    samples = {f"{i:03}": sample(i) for i in range(4)}
    plain = write(tmp_path / "a.tar", samples)
    plain.rename(tmp_path / "plain.tar.gz"), write(tmp_path / "b.tar.gz", samples, "w:gz").rename(tmp_path / "zipped.tar")
    for name in ("plain.tar.gz", "zipped.tar"): assert [p.key for p in read_all(Shards(str(tmp_path / name)).open())] == list(samples)


def test_one_bad_shard_of_two(tmp_path):
    write(tmp_path / "0.tar", {f"{i}": sample(i) for i in range(4)})
    (tmp_path / "1.tar").write_bytes(b"<html>" * 500)
    reader = Shards(str(tmp_path / "*.tar")).open()
    assert len(reader) == 4 and reader.bad[0].key == "" and "not a tar" in reader.bad[0].reason and reader.bad[0].shard.endswith("1.tar")


def test_a_shard_that_changes_or_goes_is_noticed(tmp_path):
    path = write(tmp_path / "a.tar", {f"{i}": sample(i) for i in range(4)})
    reader = Shards(str(path)).open()
    write(path, {f"x{i}": sample(i) for i in range(4)})
    assert all(isinstance(b, Bad) and "changed" in b.reason for b in read_all(reader))
    path.write_bytes(path.read_bytes()[:1100])
    assert all(isinstance(b, Bad) and "changed" in b.reason for b in read_all(reader))
    path.unlink()
    assert all(isinstance(b, Bad) and "No such file" in b.reason for b in read_all(reader))


def test_a_decompression_bomb_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.samples.MAX_PIXELS", 100)
    found = read_all(Shards(str(write(tmp_path / "a.tar", {"bomb": sample(0), "small": sample(1, (5, 5))}))).open())
    assert "bomb" in found[0].reason.lower() and found[1].key == "small"


def test_refusals(tmp_path, monkeypatch):
    path = str(write(tmp_path / "a.tar", {"0": sample(0)}))
    with pytest.raises(IndexError): Shards(path).open().read([1], mix(np.arange(1)))
    with pytest.raises(FileNotFoundError, match="nothing.*relative paths start at"): Shards((path, "nothing/*.tar")).open()
    with pytest.raises(FileNotFoundError, match="no manifest"): Shards(path, manifest="nothing.json").open()
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json"): Shards(path).open()
    monkeypatch.setenv("VTP_CACHE", path)          # a file, not a folder
    with pytest.raises(OSError, match="VTP_CACHE"): Shards(path).open()


# ---------------------------------------------------------------- processes

def _open_and_read(config, barrier, answers):
    barrier.wait(60)
    reader = config.open()
    answers.put((reader.digest, [(p.key, p.image.sum(), p.caption) for p in read_all(reader)]))


def test_processes_index_the_same_shards_at_once(tmp_path):
    for s in range(3): write(tmp_path / f"{s}.tar.gz", {f"{s}{i:03}": sample(i) for i in range(40)}, "w:gz")
    context = multiprocessing.get_context("spawn")
    config, barrier, answers = Shards(str(tmp_path / "*.gz")), context.Barrier(3), context.Queue()
    workers = [context.Process(target=_open_and_read, args=(config, barrier, answers)) for _ in range(3)]
    for worker in workers: worker.start()
    results = [answers.get(timeout=120) for _ in workers]
    for worker in workers: worker.join(60)
    assert results[0] == results[1] == results[2] and len(results[0][1]) == 120
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_reader_goes_to_workers_as_it_is(tmp_path):
    reader = Shards(str(write(tmp_path / "a.tar", {f"{i}": sample(i) for i in range(20)}))).open()
    reader.order(0, np.arange(20))
    sent = pickle.dumps(reader)
    assert len(sent) < 4000 and all(map(same, read_all(pickle.loads(sent)), read_all(reader)))


# ---------------------------------------------------------------- real data

@pytest.mark.parametrize("name, split, size", [("flickr128", "train", 128), ("flickr128", "val", 128), ("tiny64", "train", 64), ("tiny64", "val", 64),
                                               ("cifar10", "test", 32), ("in1k256", "sample", 256)])
def test_real_shards_hold_what_their_manifest_says(real, name, split, size):
    manifest = json.loads((real / "manifest.json").read_text())
    reader = Shards(f"{real}/{name}/{name}-{split}-*.tar.gz").open()
    assert len(reader) == sum(shard["samples"] for shard in manifest["shards"][name][split]) and not reader.bad
    assert reader.captioned and len(np.unique(reader.keys)) == len(reader)
    names = manifest["classes"].get(name)
    assert reader.labelled == (names is not None) and reader.templates == tuple(manifest["templates"])
    chosen = reader.order(0, np.arange(64))
    for pair in reader.read(chosen, reader.keys[chosen]):
        assert isinstance(pair, Pair) and pair.image.shape == (size, size, 3)
        if names: assert reader.classes[pair.label] in pair.caption


def test_real_captions_differ_by_key(real):
    reader = Shards(f"{real}/flickr128/flickr128-val-*.tar.gz").open()
    captions = {reader.read([5], [key])[0].caption for key in mix(0, np.arange(60))}
    assert len(captions) == 5


def test_real_subsets_are_nested(real):
    url = f"{real}/tiny64/tiny64-train-*.tar.gz"
    small, large = (set(Shards(url, subset=n, split="train").open().keys.tolist()) for n in (1000, 10_000))
    assert small < large and len(small) == 1000 and not large & set(Shards(url, split="val").open().keys.tolist())


def test_webdataset_reads_the_same_samples(tmp_path):
    "The well-kept reader of this format is the referee: keys, captions and pixels agree, in the order of the shard."
    import webdataset
    from test_quarantine import shard

    path = shard(tmp_path / "pairs.tar", {}, count=12)
    theirs = list(webdataset.WebDataset(path, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "txt"))
    ours = Shards(path).open().read(np.arange(12), np.zeros(12, np.uint64))
    assert [(p.key, p.caption) for p in ours] == [(key, text) for key, _, text in theirs]
    assert all(np.array_equal(p.image, pixels) for p, (_, pixels, _) in zip(ours, theirs))
