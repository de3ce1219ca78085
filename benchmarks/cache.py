"""H8: what a training step in chunks costs in time and saves in memory, beside the plain step and activation checkpoints.

    OMP_NUM_THREADS=1 python benchmarks/cache.py                                            # a small one on a CPU: five minutes of one core
    python benchmarks/cache.py --size L --batch 128 --chunk 32 --dtype bf16 --compile --repeats 10     # H8, on a GPU: one rank's share of the paper's step

The step is the package's own (forward, backward, AdamW, teacher) on the paper's objectives in the proportion 8 : 2 : 1, trunk of --size, 4-layer decoder of size L (on a CPU: of the trunk's size), text 12 × 768 (on a CPU 4 × 384).
`feature cache`: images and captions of CLIP --chunk at a time, the other terms, whose share of a rank is a quarter and an eighth, in one piece where they are no larger.
`all in chunks`: the other terms too, each in as many chunks as CLIP. `checkpoints`: every block recomputed, the peer. Sides are alternated in one process; medians, synchronised; `target` is the ratio that H8 allows, `FLOPs` the ratio of those that are executed, counted on the meta device.
Memory: of tensors alive at the peak of a step less what is there before it (weights, moments), from the allocator on a GPU, else counted operation by operation. `gradient`: largest difference of the first step's gradient from the plain one, relative to the
largest gradient. Prints Markdown.
"""
import argparse
import copy
import statistics
import time
from dataclasses import replace

import torch

from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.dist import alone
from vtp.flops import count
from vtp.job import Machine
from vtp.loop import DTYPES, prepare, to_device
from vtp.memory import Live
from vtp.objectives.overall import Overall
from vtp.optim import adamw
from vtp.pretrain import _blank, freeze_unused, train_step
from vtp.recipes import VTP, at
from vtp.text import TextConfig
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig, size

TARGET = 1.18
TINY = ViTConfig(width=192, depth=12, heads=3)


def job_of(args, gpu):
    "The paper's objectives at the asked size; the offline perceptual term."
    small, (clip, ssl, rec) = at(VTP, "mini"), VTP.objectives
    trunk = TINY if args.size == "tiny" else size(args.size)
    decoder = size("L", depth=4, norm="layernorm") if gpu else replace(trunk, depth=4, norm="layernorm")
    text = TextConfig() if gpu else TextConfig(384, 4, 6, dim=384)
    prototypes = {} if gpu else dict(prototypes=4096, head_hidden=512, head_bottleneck=128)
    return replace(VTP, tokenizer=ViTTokenizerConfig(args.image, trunk, decoder), pairs=replace(small.pairs, size=args.image), steps=10_000, dtype=args.dtype, objectives=(
        replace(clip, batch=args.batch, crop=CropConfig(args.image), text=text, drop=args.drop),
        replace(ssl, batch=args.batch // 4, crop=replace(ssl.crop, size=args.image), local=replace(ssl.local, size=min(96, args.image // 32 * 16)), **prototypes),
        replace(rec, batch=args.batch // 8, crop=CropConfig(args.image), perceptual=small.objectives[-1].perceptual)))


def chunks_of(job, chunk):
    "{side: {objective: chunk}}"
    pieces = job.objectives[0].batch / chunk
    return {"plain": {}, "feature cache": {o.name: chunk for o in job.objectives}, "all in chunks": {o.name: max(1, round(o.batch / pieces)) for o in job.objectives}, "checkpoints": {}}


class Side:
    "A model with an optimiser, prepared in one way."
    def __init__(self, model, job, chunks, machine):
        self.model, self.job = model, job
        self.chunks = chunks
        prepare(model, machine)
        for name, objective in model.objectives.items():
            objective.chunk = chunks.get(name)
        self.opt = adamw(model, job.optim)

    def gradient(self, batch):
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.job.dtype == "bf16"):
            losses = self.model(batch, 1)
        sum(self.job.weights[name] * loss for name, loss in losses.items()).backward()
        found = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.opt.zero_grad()
        return found

    def step(self, batch):
        return train_step(self.model, batch, self.opt, self.job, 0)


def flops(job, chunks):
    "Executed in forward and backward, of a step in these chunks; without AdamW and the teacher's step, which no chunk changes."
    with alone(), torch.random.fork_rng(), torch.device("meta"):
        model = Overall(job.tokenizer.build(), job.objectives).train()
    views = {o.name: _blank(o, o.batch) for o in job.objectives}
    for name, objective in model.objectives.items():
        objective.chunk = chunks.get(name)
    return count(lambda: sum(model(views).values()).backward()).total


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(side, batch, device):
    "Bytes at the peak of a step beyond those before it."
    if device.type != "cuda":
        with Live() as watch:
            side.step(batch)
        return watch.peak
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.step(batch)
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="tiny, S, B or L")
    parser.add_argument("--image", type=int, help="side; 256 on a GPU, else 128")
    parser.add_argument("--batch", type=int, default=32, help="pairs of CLIP on this device; SSL gets a quarter, reconstruction an eighth")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--drop", type=float, default=0., help="stochastic depth of the CLIP branch; with it, CLIP and reconstruction share no pass")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    args.image = args.image or (256 if gpu else 128)
    job = job_of(args, gpu)
    views = Batches(job.pairs, job.objectives, 0, 1)[0]
    batch = to_device({name: views[name] for name in job.weights}, device, DTYPES[job.dtype])
    first = freeze_unused(job.build(device), job).train()
    sides = {name: Side(copy.deepcopy(first), job, chunks, Machine(compile=args.compile, checkpointing=name == "checkpoints")) for name, chunks in chunks_of(job, args.chunk).items()}
    for side in sides.values():
        side.model.objectives["ssl"].student = (side.model.tokenizer.encoder, side.model.objectives["ssl"].head)        # a tuple is no submodule: the copy's own
    plain = sides["plain"].gradient(batch)
    apart = {name: ((side.gradient(batch) - plain).abs().max() / plain.abs().max()).item() for name, side in sides.items()}
    for side in sides.values():                    # warm-up, and the moments
        side.step(batch)
    peaks = {name: memory(side, batch, device) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            wait(device)
            begin = time.perf_counter() if gpu else time.process_time()
            side.step(batch)
            wait(device)
            times[name].append((time.perf_counter() if gpu else time.process_time()) - begin)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    counted = {name: flops(job, side.chunks) for name, side in sides.items() if name != "checkpoints"}
    hardware = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} thread(s), CPU time"
    print(f"{hardware}; {args.size}, {args.image} px, batches {'/'.join(str(o.batch) for o in job.objectives)}, {args.dtype}{', compiled' if args.compile else ''}, drop {args.drop:g}\n")
    print("| step | chunks (clip/ssl/rec) | ms | ratio | FLOPs | target | peak beyond weights, MiB | share of plain | gradient |\n|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, side in sides.items():
        counts = "/".join(str(-(-o.batch // side.chunks.get(o.name, o.batch))) for o in job.objectives)
        target = f"{TARGET}" if name == "feature cache" else ""
        share = f"{counted[name] / counted['plain']:.3f}" if name in counted else ""
        print(f"| {name} | {counts} | {1e3 * seconds[name]:.0f} | {seconds[name] / seconds['plain']:.3f} | {share} | {target} | {peaks[name] / 2**20:.0f} | {100 * peaks[name] / peaks['plain']:.0f} % | {apart[name]:.0e} |")


if __name__ == "__main__":
    main()
