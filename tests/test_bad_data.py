"""Bad data: whatever a shard holds, good samples come out in order, bad ones are listed with a reason, and nothing crashes, hangs or allocates what a header claims."""
import gzip
import io
import itertools
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from tiny import HERE, clip, job, rec

from vtp.data.archives import Member, members
from vtp.data.augment import CropConfig, center_crop, random_crops, squash
from vtp.data.imagenet import Pictures
from vtp.data.index import shortened
from vtp.data.pairs import Shards
from vtp.data.samples import Bad, Pair, decode_image, mix, summary, uniform
from vtp.job import launch, run_of

ROOT = Path(__file__).resolve().parent.parent
PROMISE = "a bad sample is listed and costs nothing else"
LAX = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------- how to build what goes wrong

def encode(image, kind="PNG", **how):
    image.save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def noise(i, height=6, width=5):
    return Image.fromarray((uniform(i, np.arange(height * width * 3)) * 256).astype(np.uint8).reshape(height, width, 3))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    "A PNG that claims a size and holds no pixels."
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def claiming(data, marker, skip, fields):
    "An image file whose size, behind a marker, is overwritten."
    at = data.index(marker) + skip
    return data[:at] + fields + data[at + len(fields):]


JPEG = encode(noise(0, 24, 24), "JPEG")
UNPACKS = zlib.compress(b"a" * 2**24, 9)
SCANS = encode(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
BOMBS = {
    "png 60000": png(60_000, 60_000),
    "png 2^31": png(2**31 - 1, 2**31 - 1),
    "jpeg 60000": claiming(JPEG, b"\xff\xc0", 5, struct.pack(">HH", 60_000, 60_000)),
    "gif 60000": claiming(encode(noise(0), "GIF"), b"GIF8", 6, struct.pack("<HH", 60_000, 60_000)),
    "webp 2^24": claiming(encode(Image.new("RGBA", (9, 9), (1, 2, 3, 4)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (9, 9))]), b"VP8X", 12, b"\xfe\xff\xff" * 2),
    "bmp 60000": claiming(encode(noise(0), "BMP"), b"BM", 18, struct.pack("<ii", 60_000, 60_000)),
    "text": png(8, 8, (b"zTXt", b"k\0\0" + UNPACKS)),
    "international text": png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + UNPACKS)),
    "profile": png(8, 8, (b"iCCP", b"k\0\0" + UNPACKS)),
    "texts": png(8, 8, *[(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 10**6))] * 100),
    "scans": SCANS[:-2] + SCANS[SCANS.rindex(b"\xff\xda"):-2] * 2000 + b"\xff\xd9",
}
ANIMATED = [Image.new("RGB", (5, 6), c) for c in ("red", "blue", "green")]
LEVELS = (uniform(1, np.arange(30)) * 65536).astype(np.uint16).reshape(6, 5)
VALID = {    # extension → bytes, of pictures that are unusual and whole
    "1x1": ("png", encode(noise(0, 1, 1))),
    "3000x1": ("png", encode(noise(0, 1, 3000))),
    "1x3000": ("jpg", encode(noise(0, 3000, 1), "JPEG")),
    "grey": ("jpeg", encode(noise(0).convert("L"), "JPEG")),
    "cmyk": ("jpg", encode(noise(0).convert("CMYK"), "JPEG")),
    "16 bit": ("png", encode(Image.fromarray(LEVELS))),
    "palette": ("png", encode(noise(0).quantize(4))),
    "one bit": ("png", encode(noise(0).convert("1"))),
    "transparent": ("webp", encode(noise(0).convert("RGBA"), "WEBP")),
    "animated webp": ("webp", encode(ANIMATED[0], "WEBP", save_all=True, append_images=ANIMATED[1:])),
    "animated png": ("png", encode(ANIMATED[0], "PNG", save_all=True, append_images=ANIMATED[1:])),
    "animated gif called jpg": ("jpg", encode(ANIMATED[0], "GIF", save_all=True, append_images=ANIMATED[1:])),
    "png called jpg": ("jpg", encode(noise(0))),
    "jpeg called PNG": ("PNG", JPEG),
    "bmp called webp": ("webp", encode(noise(0), "BMP")),
    "bytes behind the end": ("jpg", JPEG + b"\0more" * 99),
    "disordered notes": ("jpg", encode(noise(0), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")),
}
WORDS = "a word " * 5000
CAPTIONS = {    # members that caption a sample → what may come out
    "txt": ({"txt": b" a dog\n"}, {"a dog"}),
    "byte order mark": ({"txt": b"\xef\xbb\xbfa dog"}, {"a dog"}),
    "ten thousand words": ({"txt": WORDS.encode()}, {WORDS.strip()}),
    "emoji": ({"txt": "\U0001f415 狗 é\u200d".encode()}, {"\U0001f415 狗 é\u200d"}),
    "json": ({"json": b'{"caption": "a dog", "width": 1e999}'}, {"a dog"}),
    "list": ({"json": b'{"captions": ["a dog", "a cat"]}', "txt": b"a cow"}, {"a dog", "a cat"}),
    "empty list": ({"json": b'{"captions": []}', "txt": b"a cow"}, {"a cow"}),
    "pair in utf-16 json": ({"json": '{"caption": "\\ud83d\\udc15"}'.encode("utf-16")}, {"\U0001f415"}),
}
BAD_IMAGES = {    # bytes of what is no image, None for no member → reason
    "none": (None, "no image"), "empty": (b"", "empty .png"), "html": (b"<html>404 not found</html>", "no known format"), "one byte": (b"\xff", "no known format"),
    "truncated png": (encode(noise(0, 40, 40))[:-2000], "image: "), "truncated jpeg": (JPEG[:-60], "truncated"), "flipped png": (claiming(encode(noise(0, 40, 40)), b"IDAT", 400, b"\x55" * 9), "image: "),
    "truncated webp": (encode(noise(0, 40, 40), "WEBP")[:-90], "image: "), "signature": (b"\x89PNG\r\n\x1a\n", "image: "), "nothing in it": (png(0, 0), "image: "),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no known format"), "tiff": (encode(noise(0), "TIFF"), "no known format"),
    **{f"bomb: {name}": (data, "image: ") for name, data in BOMBS.items()},
}
DEEP = b"[" * 200_000
BAD_TEXTS = {    # members in place of the caption → reason
    "invalid": ({"txt": b"\xff\xfe dog"}, "utf-8"), "cut character": ({"txt": "é".encode()[:1]}, "utf-8"), "latin-1": ({"txt": "café".encode("latin-1")}, "utf-8"), "NUL": ({"txt": b"a\0dog"}, "NUL"),
    "utf-16": ({"txt": "a dog".encode("utf-16-le")}, "NUL"), "empty": ({"txt": b""}, "empty .txt"), "blank": ({"txt": b" \n\t "}, "blank"), "none": ({}, "no caption"),
    "one word": ({"txt": b"x" * 100_000}, "word"), "signs": ({"txt": b"?!" * 50_000}, "word"), "too long": ({"txt": b"a dog " * 100_000}, "characters"), "5 MB": ({"txt": b"a dog " * 900_000}, "bytes, more than"),
    "no json": ({"json": b"{", "txt": b"a dog"}, "JSONDecodeError"), "json list": ({"json": b"[1]", "txt": b"a dog"}, "not an object"), "deep": ({"json": DEEP, "txt": b"a dog"}, "nested"), "deep alone": ({"json": DEEP}, "no caption"),
    "number": ({"json": b'{"captions": [3]}', "txt": b"a dog"}, "not text"), "null": ({"json": b'{"captions": [null]}', "txt": b"a dog"}, "no caption"), "dict": ({"json": b'{"captions": {"a": 1}}', "txt": b"a"}, "no list"),
    "half": ({"json": b'{"captions": ["a \\ud83d dog"]}', "txt": b"a dog"}, "half"), "endless number": ({"json": b'{"width": ' + b"9" * 9999 + b"}", "txt": b"a dog"}, "Exceeds|digits"), "json invalid": ({"json": b'{"a": "\xff"}', "txt": b"a"}, "utf-8"),
}
BAD_LABELS = {"tabby": b"tabby", "negative": b"-1", "huge": b"99999999999999999999", "endless": b"9" * 9999, "fraction": b"1.5", "power": "³".encode(), "blank": b" ", "two": b"1 2", "invalid": b"\xff", "hex": b"0x1"}
LINKS = {"symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "character device": tarfile.CHRTYPE, "block device": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE, "sparse file": tarfile.GNUTYPE_SPARSE, "member of type": b"Z"}
KEYS = ["{}", "../../{}", "/etc/{}", "new\nline {}", "é狗\U0001f415{}", "d" * 90 + "/{}", "d" * 400 + "/{}", "a.b/{}", "C:\\{}", "-rf {}", "~{}", "tab\t{}", "{} \u202egpj", "./{}"]


def member(name, content=b"", kind=tarfile.REGTYPE, dialect=tarfile.PAX_FORMAT):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE): info.linkname = "/etc/passwd"
    return info.tobuf(dialect) + content + bytes(-len(content) % 512)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1:]


class Case:
    "One sample of a shard as bytes, and what must become of it: captions (good) or a reason (bad)."
    def __init__(self, key, data, image=None, captions=None, reason=None):
        self.key, self.data, self.image, self.captions, self.reason = key, data, image, captions, reason

    def __repr__(self): return f"{self.key[-20:]!r}: {self.reason or 'good'}"


class Shard:
    "Samples and the bytes of the archive that holds them; a failing one is shown without its bytes."
    def __init__(self, listed, data): self.listed, self.data = listed, data
    def __repr__(self): return f"Shard({self.listed}, {len(self.data)} bytes)"


def sample(key, parts, dialect=tarfile.PAX_FORMAT):
    return b"".join(member(f"{key}.{extension}", content, dialect=dialect) for extension, content in parts)


NOBODY = [b"", member("README", b"hello"), member("folder/", kind=tarfile.DIRTYPE), member("notes.md", b"# notes"), member("._000.jpg", b"what macOS leaves"), member("x.npy", b"\x93NUMPY")]


@st.composite
def cases(draw, i, good=None):
    "The i-th sample of a shard: good, unusual or bad in one way."
    key, dialect = draw(st.sampled_from(KEYS)).format(f"{i:04}"), draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    extension, image = draw(st.one_of(st.just(("png", encode(noise(i)))), st.sampled_from(sorted(VALID)).map(VALID.get)))
    texts, captions = CAPTIONS[draw(st.sampled_from(sorted(CAPTIONS)))]
    parts = [(extension, image), *texts.items(), ("cls", str(i % 3).encode()), *draw(st.sampled_from([[], [("npy", b"\x93NUMPY")], [("seg.png", b"no image, and nobody looks")]]))]
    parts = draw(st.permutations(parts))
    name = re.sub(r"^(\./)+", "", key)
    fault = "good" if good else draw(st.sampled_from(["good"] * 4 + ["image", "text", "label", "link", "header"]))
    if fault == "good": return Case(name, sample(key, parts, dialect), image, captions)
    if fault == "header":          # a bit of a header flips, not in the name: whose it is can be read
        data, at = [member(f"{key}.{e}", c, dialect=dialect) for e, c in parts], draw(st.integers(0, len(parts) - 1))
        start = [m for m in members(lambda a, n: data[at][a:a + n], len(data[at])) if isinstance(m, Member)][0].start
        data[at] = flipped(data[at], start - 512 + draw(st.sampled_from([101, 125, 136, 148, 150, 330])))
        if start > 512: return Case("", b"".join(data), reason="header|no image|no caption")    # what is left has a shortened name
        return Case(name, b"".join(data), reason="damaged header")
    if fault == "link":
        what = draw(st.sampled_from(sorted(LINKS)))
        return Case(name, member(f"{key}.{extension}", kind=LINKS[what], dialect=tarfile.GNU_FORMAT) + sample(key, [p for p in parts if p[0] != extension], dialect), reason=what)
    table = dict(image=BAD_IMAGES, text=BAD_TEXTS, label={k: (v, "cls|utf-8") for k, v in BAD_LABELS.items()})[fault]
    instead, reason = table[draw(st.sampled_from(sorted(table)))]
    if fault == "image": parts = [p for p in parts if p[0] != extension] + ([("png", instead)] if instead is not None else [])
    if fault == "text": parts = [p for p in parts if p[0] not in ("txt", "json")] + list(instead.items())
    if fault == "label": parts = [p for p in parts if p[0] != "cls"] + [("cls", instead)]
    return Case(name, sample(key, parts, dialect), reason=reason)


@st.composite
def shards(draw, most=8):
    "(cases, bytes) of a shard with at least one good sample first: a caption makes a source one with captions."
    first = [draw(cases(0, good=True)), draw(cases(1, good=True))]
    listed = first + [draw(cases(i)) for i in range(2, draw(st.integers(2, most)))]
    return Shard(listed, b"".join(draw(st.sampled_from(NOBODY)) + case.data for case in listed) + bytes(draw(st.sampled_from([1024, 10240]))))


def check(reader, listed:list[Case]) -> int:
    "The good samples come out in order, exactly; each bad one is listed under its key with its reason, and no other."
    found = reader.read(np.arange(len(reader)), mix(7, np.arange(len(reader))))
    pairs, bad = [s for s in found if isinstance(s, Pair)], reader.bad + [s for s in found if isinstance(s, Bad)]
    good = [case for case in listed if not case.reason]
    assert [p.key for p in pairs] == [case.key for case in good], [b for b in bad]
    for pair, case in zip(pairs, good):
        assert pair.caption in case.captions and pair.label == int(case.key[case.key.index("0"):][:4]) % 3 and np.array_equal(pair.image, decode_image(case.image))
    named = {shortened(case.key): case.reason for case in listed if case.reason and case.key}
    assert named.keys() <= {b.key for b in bad}
    for b in bad:
        assert b.shard and b.reason and len(b.reason) <= 300
        if b.key in named: assert re.search(named[b.key], b.reason), (b.reason, named[b.key])
        else: assert any(not case.key for case in listed), b
    json.dumps([b._asdict() for b in bad])
    return len(bad)


# ---------------------------------------------------------------- shards of good and bad samples

counts, numbers = dict(shards=0, bad=0), itertools.count()


def tried(path, shard, pack=bytes):
    path.write_bytes(pack(shard.data))
    counts["bad"] += check(Shards(str(path)).open(), shard.listed)
    counts["shards"] += 1
    path.unlink()


def numbered(folder):
    "A new name each time: an index is kept by name, size and time."
    return folder / f"{next(numbers)}.tar"


@settings(max_examples=60, **LAX)
@given(shard=shards())
def test_good_samples_come_out_in_order_and_bad_ones_are_listed(tmp_path, shard):
    tried(numbered(tmp_path), shard)


@settings(max_examples=8, **LAX)
@given(shard=shards())
def test_gzip_changes_nothing(tmp_path, shard):
    tried(numbered(tmp_path), shard, lambda data: gzip.compress(data, 1))          # whatever it is called


@pytest.mark.slow
def test_five_hundred_bad_inputs(tmp_path, record):
    "Faults of every kind in one run: none crashes, no good sample is lost."
    counts.update(shards=0, bad=0)

    @settings(max_examples=600, **LAX)
    @given(shard=shards(most=12))
    def many(shard): tried(numbered(tmp_path), shard)

    many()
    assert counts["bad"] >= 500
    record(promise=PROMISE, fault="bad samples in generated shards", tried=counts["bad"], lost=0, skipped=counts["bad"])


TABLES = {**{f"image: {k}": ([("png", v)] if v is not None else [], r) for k, (v, r) in BAD_IMAGES.items()},
          **{f"label: {k}": ([("cls", v)], "cls|utf-8") for k, v in BAD_LABELS.items()}, **{f"text: {k}": (list(v.items()), r) for k, (v, r) in BAD_TEXTS.items()}}


def test_every_fault_once(tmp_path):
    "One shard with all of them between good samples."
    listed = []
    for i, (name, (parts, reason)) in enumerate(TABLES.items()):
        base = {"png": encode(noise(i)), "txt": b"a dog", "cls": str(i % 3).encode()}
        listed.append(Case(f"{i:04}", sample(f"{i:04}", base.items()), base["png"], {"a dog"}))
        kept = {k: v for k, v in base.items() if not (name.startswith("image") and k == "png" or name.startswith("text") and k == "txt" or k in dict(parts))}
        listed.append(Case(f"bad{i:04}", sample(f"bad{i:04}", [*kept.items(), *parts]), reason=reason))
    path = tmp_path / "all.tar"
    path.write_bytes(b"".join(case.data for case in listed) + bytes(1024))
    assert check(Shards(str(path)).open(), listed) == len(TABLES)


@pytest.mark.parametrize("name", sorted(VALID))
def test_unusual_images_are_images(name):
    "They decode, and what an objective makes of them has its size, without a resize of the whole."
    image = decode_image(VALID[name][1])
    assert image.dtype == np.uint8 and image.shape[2] == 3
    keys = mix(3, np.arange(4)[:, None])
    for views in (random_crops([image], keys, CropConfig(16, (.05, 1.))), center_crop([image], 16), squash([image], 16)): assert views.shape[1:] == (3, 16, 16)


def test_a_line_of_30000_pixels_is_cropped_in_little_memory():
    for size in ((30_000, 1), (1, 30_000)):
        line = decode_image(encode(Image.new("RGB", size, "red")))
        for views in (random_crops([line], mix(0, np.arange(1)), CropConfig(256)), center_crop([line], 256), squash([line], 256)):
            assert views.shape == (1, 3, 256, 256) and (views[:, 0] == 255).all() and (views[:, 1:] == 0).all()


# ---------------------------------------------------------------- damage to the shard itself

COUNT = 12
PARTS = [[("cls", str(i % 3).encode()), ("json", json.dumps({"caption": f"no. {i}"}).encode()), ("png", encode(noise(i, 20, 20))), ("txt", f"noise {i}".encode())] for i in range(COUNT)]
WHOLE = [sample(f"{i:04}", PARTS[i]) for i in range(COUNT)]
STARTS = np.cumsum([0, *map(len, WHOLE)])
TAR = b"".join(WHOLE) + bytes(10240)


@st.composite
def damages(draw):
    "What is done to the shard, as (kind, place, bytes); at most the last moves what lies behind it."
    steps = [(draw(st.sampled_from(["flip", "header", "page", "noise"])), draw(st.integers(0, STARTS[-1] - 1)), draw(st.integers(1, 3000))) for _ in range(draw(st.integers(0, 2)))]
    return steps + [(draw(st.sampled_from(["flip", "header", "cut", "junk", "tail"])), draw(st.integers(0, STARTS[-1] - 1)), draw(st.integers(1, 3000)))]


def random_bytes(at, n): return (uniform(at, np.arange(n)) * 256).astype(np.uint8).tobytes()


def inflict(steps):
    "(bytes of the damaged shard, which samples were touched); a step that would leave less than four samples is left out."
    data, touched = TAR, set()
    for kind, at, span in steps:
        at -= at % 512 if kind == "header" else 0                       # a header, or a block of content
        span = {"flip": 1, "header": 512, "tail": STARTS[-1] - at, "junk": 1}.get(kind, min(span, STARTS[-1] - at))
        first, last = np.searchsorted(STARTS, [at, at + span - 1], side="right") - 1
        if len(touched | {*range(first, last + 1)}) > COUNT - 4: continue
        if kind != "junk" or at not in STARTS: touched |= {*range(first, last + 1)}    # between two samples nobody is touched
        instead = {"flip": flipped(data, at)[at:at + 1], "page": bytes(span), "header": bytes(span), "noise": random_bytes(at, span), "junk": random_bytes(at, 700) + data[at:at + 1]}.get(kind, b"")
        data = data[:at] + instead + (b"" if kind == "tail" else data[at + span:])
    return data, touched


def damaged(path, steps):
    "Untouched samples come out as they were, in order; if a touched one doesn't, something is listed."
    data, touched = inflict(steps)
    path.write_bytes(data)
    reader = Shards(str(path)).open()
    found = reader.read(np.arange(len(reader)), mix(7, np.arange(len(reader))))
    pairs, bad = {s.key: s for s in found if isinstance(s, Pair)}, reader.bad + [s for s in found if isinstance(s, Bad)]
    good = [f"{i:04}" for i in range(COUNT) if i not in touched]
    assert [s.key for s in found if s.key in good and isinstance(s, Pair)] == good, (touched, bad)
    for i in set(range(COUNT)) - touched:
        pair = pairs[f"{i:04}"]
        assert pair.caption == f"noise {i}" and np.array_equal(pair.image, decode_image(dict(PARTS[i])["png"])) and pair.label in (i % 3, -1)
    if pairs.keys() != {f"{i:04}" for i in range(COUNT)}: assert bad
    assert all(b.reason and b.shard for b in bad) and not {b.key for b in bad} & set(good)
    path.unlink()
    return len(bad)


@settings(max_examples=150, **LAX)
@given(damage=damages())
def test_damage_costs_only_the_samples_it_touches(tmp_path, damage):
    damaged(numbered(tmp_path), damage)


@pytest.mark.slow
def test_five_hundred_damaged_shards(tmp_path, record):
    tries = dict(shards=0, bad=0)

    @settings(max_examples=1500, **LAX)
    @given(damage=damages())
    def many(damage):
        tries["bad"] += damaged(numbered(tmp_path), damage)
        tries["shards"] += 1

    many()
    assert tries["shards"] >= 500
    record(promise=PROMISE, fault="shards with flipped, missing, added or overwritten bytes", tried=tries["shards"], lost=0, skipped=tries["bad"])


@settings(max_examples=150, **LAX)
@given(st.binary(max_size=4000) | st.lists(st.sampled_from([WHOLE[0][:512], WHOLE[1], bytes(512), b"ustar\0", WHOLE[2][512:1024], b"\x1f\x8b\x08" + bytes(9)]), max_size=9).map(b"".join))
def test_any_bytes_are_walked_through(data):
    "Nothing is said about bytes that are not there; places only grow."
    at = 0
    for event in members(lambda a, n: data[a:a + n], len(data)):
        assert event.at >= at and event.at <= len(data)
        at = event.start + event.size if isinstance(event, Member) else event.end
        assert at <= len(data)


@pytest.mark.parametrize("kind", ["empty tar", "folders", "no tar", "no bytes", "zeros", "xz", "torn gzip", "only links", "a folder", "a link to nowhere", "a pipe"])
def test_a_shard_of_nothing_is_listed_and_the_others_are_read(tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(TAR)
    other = tmp_path / "1.tar"
    if kind == "a folder": other.mkdir()
    elif kind == "a link to nowhere": other.symlink_to(tmp_path / "gone.tar")
    elif kind == "a pipe": os.mkfifo(other)
    else:
        other.write_bytes({"empty tar": bytes(10240), "folders": member("a/", kind=tarfile.DIRTYPE) + member("a/b.c/", kind=tarfile.DIRTYPE) + bytes(1024), "no tar": b"<html>" * 999, "no bytes": b"",
                           "zeros": bytes(700), "xz": b"\xfd7zXZ\0" + bytes(range(256)) * 9, "torn gzip": gzip.compress(TAR)[:12], "only links": member("0.jpg", kind=tarfile.SYMTYPE) + bytes(1024)}[kind])
    reader = Shards(str(tmp_path / "?.tar")).open()
    assert len(reader) == COUNT and len({b.reason for b in reader.bad}) in (1, 2) and all(b.shard == str(other) and b.reason for b in reader.bad)
    assert reader.unusable == (COUNT if kind in ("no tar", "no bytes", "xz", "torn gzip", "a folder", "a link to nowhere", "a pipe") else len(reader.bad))
    with pytest.raises(ValueError, match="no usable sample"): Shards(str(other)).open()


def test_joined_archives_are_read_on(tmp_path):
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(WHOLE[:5]) + bytes(10240) + b"".join(WHOLE[5:]) + bytes(10240))
    reader = Shards(str(path)).open()
    assert [s.key for s in reader.read(np.arange(COUNT), reader.keys)] == [f"{i:04}" for i in range(COUNT)] and ["zeros" in b.reason for b in reader.bad] == [True]


def test_a_key_that_comes_again_is_a_sample_again(tmp_path):
    path = tmp_path / "twice.tar"
    path.write_bytes(WHOLE[0] + WHOLE[0] + WHOLE[1] + WHOLE[0] + bytes(1024))
    reader = Shards(str(path)).open()
    assert [s.key for s in reader.read(np.arange(4), reader.keys)] == ["0000", "0000", "0001", "0000"] and not reader.bad


def test_what_is_beside_the_shards_stays_as_it_is(tmp_path):
    "Members that name places outside, and links followed by members below them, write nothing anywhere."
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "shards").mkdir()
    evil = b"".join(member(f"{name}{i}.{e}", c) for i, name in enumerate(["../outside/x", f"{outside}/y", "link/z"]) for e, c in PARTS[i])
    path = tmp_path / "shards" / "evil.tar"
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    path.write_bytes(link.tobuf() + evil + bytes(1024))
    reader = Shards(str(path)).open()
    assert all(isinstance(s, Pair) for s in reader.read(np.arange(3), reader.keys))
    assert not list(outside.iterdir()) and [p.name for p in (tmp_path / "shards").iterdir()] == ["evil.tar"] and {p.suffix for p in (tmp_path / "cache").iterdir()} == {".npz"}


# ---------------------------------------------------------------- bombs

def limited(code, megabytes, folder):
    "Run code in a process that may not hold more memory, nor take more than a minute."
    def before(): resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20,) * 2)
    return subprocess.run([sys.executable, "-c", code], preexec_fn=before, timeout=120, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "VTP_CACHE": str(folder / "cache"), "OPENBLAS_NUM_THREADS": "1"})


def test_bombs_do_not_go_off(tmp_path):
    "Pictures, headers and gzip that claim gigabytes, read in a process that may have 400 MB in all."
    def claim(size, kind=b"0"):
        block = bytearray(tarfile.TarInfo("evil.png").tobuf()[:512])
        block[124:136], block[156:157] = size, kind
        block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
        return bytes(block)
    heads = [claim(b"77777777777\0"), claim(b"77777777777\0", b"L"), claim(b"77777777777\0", b"x"), claim(b"\x80" + b"\x7f" * 11), claim(b"\xff" * 12), claim(b"00000000000\0", b"S")]
    bombs = b"".join(sample(f"bomb{i}", [("png", data), ("txt", b"boom")]) for i, data in enumerate(BOMBS.values()))
    (tmp_path / "a.tar").write_bytes(b"".join(head + WHOLE[i] for i, head in enumerate(heads)) + bombs + bytes(1024))
    with gzip.open(tmp_path / "b.tar.gz", "wb", 9) as file:
        file.write(WHOLE[7])
        for _ in range(400): file.write(bytes(2**20))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(member("long.png", b"") + claim(b"00004000000\0", b"L") + b"n" * 2**20 + WHOLE[8]))
    code = f"""
import numpy as np
from vtp.data.samples import Pair, Bad, mix
from vtp.data.pairs import Shards
reader = Shards({str(tmp_path / '?.tar*')!r}).open()
found = reader.read(np.arange(len(reader)), mix(0, np.arange(len(reader))))
print(sorted(s.key for s in found if isinstance(s, Pair)))
print(len([s for s in found if isinstance(s, Bad)]), len(reader.bad))
"""
    done = limited(code, 400, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    keys, numbers = done.stdout.splitlines()
    assert set(eval(keys)) >= {f"{i:04}" for i in (*range(6), 7)} and int(numbers.split()[0]) == len(BOMBS)
    assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) < 80 * 2**20


@pytest.mark.slow
def test_mutated_images_never_crash_the_process(record):
    "Bytes of every kind of image changed at random, decoded: an image or a ValueError."
    tries = bad = 0
    for name, (_, data) in sorted(VALID.items()):
        for trial in range(300):
            spoiled = bytearray(data)
            for at, value in zip((uniform(mix(1, tries), np.arange(8)) * len(data)).astype(int), (uniform(mix(2, tries), np.arange(1 + trial % 8)) * 256).astype(int)): spoiled[at] = value
            try: assert decode_image(bytes(spoiled)).shape[2] == 3
            except ValueError as error: bad += str(error).startswith("image: ")
            tries += 1
    assert bad > 500
    record(promise=PROMISE, fault="image files with changed bytes", tried=tries, lost=0, skipped=bad)


# ---------------------------------------------------------------- folders

def test_folders_may_hold_anything_under_an_image_s_name(tmp_path):
    tables = {f"{i:02}.png": data for i, (data, _) in enumerate(BAD_IMAGES.values()) if data is not None}
    for name, data in tables.items(): (tmp_path / name).write_bytes(data)
    for i, (extension, data) in enumerate(VALID.values()): (tmp_path / f"good{i:02}.{extension}").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.png"), (tmp_path / "folder.png").mkdir(), (tmp_path / "link.png").symlink_to("nowhere"), (tmp_path / "zero.png").symlink_to("/dev/zero")
    reader = Pictures(str(tmp_path)).open()
    found = reader.read(np.arange(len(reader)), reader.keys)
    assert {s.key for s in found if isinstance(s, Bad)} == {*tables, "pipe.png", "folder.png", "link.png", "zero.png"} and all(s.reason for s in found if isinstance(s, Bad))
    assert sum(isinstance(s, Pair) for s in found) == len(VALID)


# ---------------------------------------------------------------- training on it

def test_training_on_every_fault_neither_crashes_nor_changes_what_else_is_seen(tmp_path, monkeypatch):
    "Bad samples are replaced in their places; at all other places the run sees what it would have seen had they been good."
    from vtp.data.batch_sampling import Batches

    def source(name, broken):
        listed = []
        for i, (fault, (parts, _)) in enumerate(TABLES.items()):
            for copy in range(4):
                base = {"png": encode(noise(4 * i + copy)), "txt": b"a dog", "cls": b"0"}
                if copy == 3 and broken and fault != "text: none":                    # what the index rejects is not dealt at all
                    base = {k: v for k, v in base.items() if not (fault.startswith("image") and k == "png" or fault.startswith("text") and k == "txt")} | dict(parts)
                listed.append(sample(f"{i:03}{copy}", base.items()))
        (tmp_path / name).write_bytes(b"".join(listed) + bytes(1024))
        return Shards(str(tmp_path / name))
    bad, good = source("bad.tar", True), source("good.tar", False)
    indexed = {b.key for b in bad.open().bad}
    assert indexed and len(bad.open()) + len(indexed) == len(good.open())

    objectives = (clip(batch=8), rec(batch=4))
    small = job(objectives, pairs=bad, steps=20, bad_rate=.6, log_every=5)
    run, = launch(small, machine=HERE)
    rows, listed = run.rows(), run.rows("quarantine")
    assert run.done and rows[-1]["bad"] == len(listed) and {r["key"] for r in listed if r["step"] == 0} == indexed
    assert all(r["key"].endswith("3") and r["shard"].endswith("bad.tar") and r["reason"] for r in listed) and all(np.isfinite(r["loss"]) for r in rows if "loss" in r)

    reader, sight = bad.open(), {p.key: p for p in good.open().read(np.arange(len(good.open())), good.open().keys)}
    spoiled, seen = {r["key"] for r in listed}, 0
    batches = Batches(bad, objectives, small.seed, small.steps)
    dealt = [sight[reader.read([i], [reader.keys[i]])[0].key] for i in reader.order(small.seed, np.arange(160))]
    for step in range(20):
        keys = batches[step]["keys"]
        for place, key in enumerate(keys):
            meant = dealt[8 * step + place].key
            assert key == meant if meant not in spoiled else key not in spoiled
            seen += key == meant
    assert seen > 100


def test_the_run_stops_and_says_what_was_bad(tmp_path):
    kinds = [{"png": b"<html>"}, {"png": encode(noise(1))[:60]}, {"txt": b"\xff"}]
    parts = [dict(png=encode(noise(i)), txt=b"a dog") | (kinds[i % 3] if i % 2 else {}) for i in range(80)]
    (tmp_path / "many.tar").write_bytes(b"".join(sample(f"{i:03}", p.items()) for i, p in enumerate(parts)) + bytes(1024))
    small = job((clip(),), pairs=Shards(str(tmp_path / "many.tar")), steps=10, bad_rate=.1)
    with pytest.raises(RuntimeError, match="more than bad_rate=0.1"): launch(small, machine=HERE)
    rows = [Bad(r["key"], r["shard"], r["reason"]) for r in run_of(small).rows("quarantine")]
    told = summary(rows)
    assert len(rows) > 10 and "many.tar" in told and re.search(r"\d+ × image: of no known format", told) and "UnicodeDecodeError" in told
