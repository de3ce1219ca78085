"""Images per second and core that the pair sources give: what a loader worker can do before augmentation.

    OMP_NUM_THREADS=1 python benchmarks/loader.py                                  # procedural images, and 256 px JPEG shards made here
    OMP_NUM_THREADS=1 python benchmarks/loader.py --pairs '../shared/data/flickr128/*.tar.gz'

One process, one thread; samples in the order of training; the files lie in the page cache (read once before). Each row is the median of `--repeats` passes over other
samples, by CPU time, so that neighbours on the machine count less. `decode` is Pillow alone on the same bytes: the floor; `overhead` is what reading adds to it.
"""
import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.data.pairs import Shards
from vtp.data.samples import Bad, decode_image, mix, uniform
from vtp.data.shapes import Shapes


def seconds(work, repeats):
    "Median CPU seconds of work(repeat)."
    times = []
    for repeat in range(repeats):
        start = time.process_time()
        work(repeat)
        times.append(time.process_time() - start)
    return statistics.median(times)


def write_shards(folder, shards=4, each=500, size=256):
    "JPEG shards of procedural images with some noise, quality 90: about 25 kB an image, as photographs of that size have."
    images = Shapes(size=size, hard=True)
    reader = images.open()
    for s in range(shards):
        with tarfile.open(folder / f"shapes-{s:05}.tar", "w") as tar:
            indices = np.arange(s * each, (s + 1) * each)
            for i, pair in zip(indices, reader.read(indices, reader.keys[indices])):
                noise = uniform(mix(1, i), np.arange(size * size)).reshape(size, size, 1) * 16
                Image.fromarray((pair.image * .9 + noise).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=90)
                for extension, content in (("jpg", file.getvalue()), ("txt", pair.caption.encode()), ("cls", str(pair.label).encode())):
                    member = tarfile.TarInfo(f"{i:09}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def measure(name, reader, batch, repeats):
    "One row of the table: how fast a reader reads."
    take = lambda repeat: reader.order(0, np.arange(repeat * batch, (repeat + 1) * batch))
    samples = reader.read(take(0), mix(0, np.arange(batch)))        # warms the page cache for the first pass
    size = "×".join(map(str, samples[0].image.shape[:2]))
    for repeat in range(1, repeats): reader.read(take(repeat), mix(0, np.arange(batch)))
    read = batch / seconds(lambda repeat: reader.read(take(repeat), mix(repeat, np.arange(batch))), repeats)
    bad = sum(isinstance(sample, Bad) for sample in samples)
    return name, size, read, decode_rate(reader, take(0), repeats), bad


def decode_rate(reader, indices, repeats):
    "Images per second of decoding alone; None for a source that decodes nothing."
    if not hasattr(reader, "tars"): return None
    shards = np.searchsorted(reader.starts, indices, side="right") - 1
    files = []
    for shard, i in zip(shards, indices):
        with open(reader.tars[shard], "rb") as file: run = os.pread(file.fileno(), int(reader.lengths[i]), int(reader.offsets[i]))
        with tarfile.open(fileobj=io.BytesIO(run)) as tar:
            files += [tar.extractfile(member).read() for member in tar if member.name.endswith((".jpg", ".png", ".webp", ".jpeg"))]
    return len(files) / seconds(lambda _: [decode_image(data) for data in files], repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", help="shards to read instead: paths, globs or brace patterns")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.pairs: rows += [measure(f"`{Path(url).parent.name}`", Shards(url).open(), options.batch, options.repeats) for url in options.pairs]
        else:
            os.environ["VTP_CACHE"] = f"{folder}/cache"
            for size in (16, 32, 64): rows.append(measure("shapes, drawn", Shapes(size=size, hard=size == 64).open(), options.batch, options.repeats))
            rows.append(measure("shapes, JPEG shards", Shards(write_shards(Path(folder))).open(), min(options.batch, 250), options.repeats))
    print("| source | pixels | images/s/core | decode alone | overhead | bad |\n|---|---:|---:|---:|---:|---:|")
    for name, size, read, decode, bad in rows:
        floor = f"{decode:,.0f} | {decode / read - 1:.0%}" if decode else "– | –"
        print(f"| {name} | {size} | {read:,.0f} | {floor} | {bad} |")


if __name__ == "__main__":
    main()
