"""C6: the text tower on captions of real length against the same tower, and open_clip's, on 77 columns.

    python benchmarks/text.py
    python benchmarks/text.py --captions '../shared/data/flickr128/flickr128-train-*.tar.gz'

Prints one Markdown row per measurement: medians of alternated runs, the tower of the paper (12 × 768), random weights. Without --captions the lengths
follow a rounded log-normal with Flickr8k's median and spread (14 tokens, σ 0.28), which is what counts: ids do not change the time.
"""
import argparse
import glob
import json
import statistics
import tarfile
import time
import warnings

import torch

warnings.filterwarnings("ignore", message="IProgress")
from open_clip.transformer import TextTransformer  # noqa: E402

from vtp.text import TextConfig, TextEncoder, bpe, cut  # noqa: E402


def shard_captions(pattern, count):
    "The first `count` captions of the shards: the first of several where a sample has a .json, else its .txt."
    found = []
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.name.endswith(".json"): continue
                found.append(json.load(tar.extractfile(member))["captions"][0])
                if len(found) == count: return found
    raise SystemExit(f"{pattern} has {len(found)} captions, {count} are needed")


def drawn_ids(count):
    "Ids whose lengths are drawn."
    torch.manual_seed(0)
    lengths = torch.exp(torch.randn(count) * .28).mul(14).round().clamp(3, 77).long()
    ids = torch.randint(1, 49000, (count, 77)) * (torch.arange(77) < lengths[:, None] - 1)
    return ids.scatter(1, lengths[:, None] - 1, 49407)


def seconds(fn, batches):
    "Time of `fn` over the batches."
    start = time.perf_counter()
    for batch in batches: fn(batch)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs, repeats):
    "Median time of each run, alternated so that a busy machine hits all of them alike."
    for fn, batches in runs.values(): seconds(fn, batches[:1])
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (fn, batches) in runs.items(): times[name].append(seconds(fn, batches))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", help="shards with captions, a glob")
    parser.add_argument("--batch", type=int, default=64, help="captions of a forward pass; a quarter of it forward and backward")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="bf16 is autocast, as training runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours, peer = TextEncoder(TextConfig()).to(device), TextTransformer(width=768, heads=12, layers=12, output_dim=768).to(device)
    peer.load_state_dict(ours.state_dict())
    ids = bpe(shard_captions(options.captions, options.batch * options.batches)) if options.captions else drawn_ids(options.batch * options.batches)

    def forward(tower):
        def step(batch):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"): tower(batch)
        return step

    def train(tower):
        def step(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"): loss = tower(batch).float().square().sum()
            tower.zero_grad()
            loss.backward()
        return step

    source = "flickr-like lengths" if not options.captions else "real captions"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    print("| what | captions | batch | columns | 77 columns, ms | open_clip, 77, ms | cut, ms | speed-up | over open_clip | machine | dtype |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for what, mode, size in (("forward", forward, options.batch), ("forward + backward", train, max(1, options.batch // 4))):
        full = [batch.to(device) for batch in ids.split(size)[:options.batches]]
        short = [cut(batch.cpu()).to(device) for batch in full]
        time_of = medians({"full": (mode(ours), full), "peer": (mode(peer), full), "cut": (mode(ours), short)}, options.repeats)
        ms = {name: value * 1e3 / len(full) for name, value in time_of.items()}
        columns = ", ".join(str(batch.shape[1]) for batch in short)
        print(f"| {what} | {source} | {size} | {columns} | {ms['full']:.0f} | {ms['peer']:.0f} | {ms['cut']:.0f} | {ms['full'] / ms['cut']:.2f}× "
              f"| {ms['peer'] / ms['cut']:.2f}× | {where} | {options.dtype} |")


if __name__ == "__main__":
    main()
