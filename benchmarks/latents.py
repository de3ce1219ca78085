"""C7: images/s of latent extraction, against the structure of the official script; and what of it is reading, encoding and storing.

    OMP_NUM_THREADS=1 python benchmarks/latents.py                                             # procedural JPEGs made here, ViT-S
    OMP_NUM_THREADS=1 python benchmarks/latents.py --pairs '../shared/data/in1k256/*.tar.gz'
    python benchmarks/latents.py --pairs IMAGENET --size L --images 20000 --batch 256 --workers 12   # with a GPU, which is used if there is one

Peer: every image read and decoded once for itself and once more for its flip, cropped by ADM's recipe on whole images, the two encoded in separate fp32 batches, stored in fp32,
statistics from a random sample of the stored latents. Ours: read, decoded and cropped once, encoded with its flip in one batch, stored as asked with exact statistics; in fp32
and in bf16. Both give the encoder --batch rows a call. The tokenizer has random weights, the files lie in the page cache. Sides alternate; medians of `--repeats` passes, of CPU
time where nothing else is used. Prints Markdown.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from loader import write_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from vtp.data.batch_sampling import loader
from vtp.data.pairs import Shards
from vtp.data.shapes import Shapes
from vtp.generation.latents import CacheLatents, Crops, chosen, make_shard, write_shard
from vtp.job import At
from vtp.pretrain import Pretrain
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import size


clock = time.perf_counter


def adm_crop(image, side):
    "ADM's centre crop, step by step on the whole image."
    image = Image.fromarray(image)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = side / min(image.size)
    pixels = np.array(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top:top + side, left:left + side]


class One(Dataset):
    "The peer's data set: one image an item, decoded for this item, flipped or not."
    def __init__(self, reader, indices, side, flip):
        self.reader, self.indices, self.side, self.flip = reader, indices, side, flip

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i:i + 1]
        pair, = self.reader.read(index, self.reader.keys[index])
        pixels = adm_crop(pair.image, self.side)
        pixels = pixels[:, ::-1] if self.flip else pixels
        return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255), pair.label


def peer(tokenizer, reader, indices, args, folder):
    "The official script's structure; seconds of each part."
    where, seconds = next(tokenizer.parameters()).device, dict(reading=0.0, encoding=0.0, storing=0.0)
    loaders = [DataLoader(One(reader, indices, args.image, flip), args.batch, num_workers=args.workers) for flip in (False, True)]
    kept, tick = [], clock()

    def since(part):
        nonlocal tick
        now = clock()
        seconds[part] += now - tick
        tick = now

    with torch.no_grad():
        for (plain, labels), (flipped, _) in zip(*loaders):
            since("reading")
            kept.append((tokenizer.encode(plain.to(where)).cpu(), tokenizer.encode(flipped.to(where)).cpu(), labels))
            since("encoding")
    latents, flips, labels = (torch.cat(column).contiguous() for column in zip(*kept))
    save_file({"latents": latents, "latents_flip": flips, "labels": labels}, folder / "latents_rank00_shard000.safetensors")
    z = load_file(folder / "latents_rank00_shard000.safetensors")["latents"][torch.randperm(len(latents))[:10_000]]
    z.mean((0, 2, 3)), z.std((0, 2, 3))
    since("storing")
    return seconds


def ours(tokenizer, reader, indices, args, folder, dtype):
    "The job's own parts, with clocks between them; seconds of each part."
    job = CacheLatents(AT, None, batch=args.batch // 2, shard=len(indices), dtype=dtype)      # with the flips, as many rows a call as the peer's
    seconds = dict(reading=0.0, encoding=0.0, storing=0.0)

    def clocked(batches):
        while True:
            start = clock()
            batch = next(batches, None)
            seconds["reading"] += clock() - start
            if batch is None:
                return
            yield batch

    start = clock()
    batches = clocked(iter(loader(Crops(job, reader, [indices], args.image), workers=args.workers)))
    tensors, record = make_shard(job, tokenizer, batches, len(indices), SimpleNamespace(update=lambda n: None))
    seconds["encoding"] = clock() - start - seconds["reading"]
    start = clock()
    write_shard(folder, 0, tensors, record)
    seconds["storing"] = clock() - start
    return seconds


AT = At(Pretrain(ViTTokenizerConfig(), Shapes(), (), 1))      # stands in for a checkpoint: the tokenizer is given


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="shards to read: a path, glob or brace pattern; without, JPEGs are made")
    parser.add_argument("--size", choices=("S", "B", "L"), default="S")
    parser.add_argument("--image", type=int, default=256)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cpu" and not args.workers:
        global clock
        clock = time.process_time                               # neighbours on the machine count less
    torch.manual_seed(0)
    tokenizer = ViTTokenizerConfig(args.image, size(args.size, qk_norm=False), size("S", depth=1, norm="layernorm", qk_norm=False)).build().to(where).eval()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reader = Shards(args.pairs or write_shards(folder, shards=1, each=args.images, size=args.image)).open()
        indices = chosen(CacheLatents(AT, None, samples=min(args.images, len(reader)), shard=len(reader)), reader)[0]
        sides = {"peer, fp32": lambda: peer(tokenizer, reader, indices, args, folder)}
        for dtype in ("fp32", "bf16"):
            (folder / dtype).mkdir()
            sides[f"ours, {dtype}"] = lambda dtype=dtype: ours(tokenizer, reader, indices, args, folder / dtype, dtype)
        found = {name: [] for name in sides}
        for repeat in range(args.repeats + 1):                  # the first warms up
            for name, side in sides.items():
                found[name].append(side())
        report(found, len(indices), args, where)
        compare(folder)


def report(found, n, args, where):
    name_of = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name_of}; VTP-{args.size}, {args.image} px, {n} images and their flips, {args.batch} rows a call, {args.workers} workers; {'CPU' if clock is time.process_time else 'wall'} time\n")
    print("| side | images/s | ratio | target ≥ 1.8 | reading, ms/image | encoding | storing |\n|---|---:|---:|---|---:|---:|---:|")
    totals = {name: [sum(run.values()) for run in runs[1:]] for name, runs in found.items()}
    for name, runs in found.items():
        ratio = statistics.median(a / b for a, b in zip(totals["peer, fp32"], totals[name]))
        parts = " | ".join(f"{1e3 * statistics.median(run[part] for run in runs[1:]) / n:.2f}" for part in ("reading", "encoding", "storing"))
        verdict = "–" if name == "peer, fp32" else "met" if ratio >= 1.8 else "not met"
        print(f"| {name} | {n / statistics.median(totals[name]):.2f} | {ratio:.2f} | {verdict} | {parts} |")


def compare(folder):
    theirs = load_file(folder / "latents_rank00_shard000.safetensors")
    print("\n| latents | largest difference from the peer's | relative to their std |\n|---|---:|---:|")
    for dtype in ("fp32", "bf16"):
        mine = load_file(folder / dtype / "shard-00000.safetensors")
        assert torch.equal(mine["labels"], theirs["labels"])
        worst = max(float((mine[a].float() - theirs[b]).abs().max()) for a, b in (("z", "latents"), ("z_flipped", "latents_flip")))
        print(f"| {dtype} | {worst:.1e} | {worst / float(theirs['latents'].std()):.1e} |")


if __name__ == "__main__":
    main()
