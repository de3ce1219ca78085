"""Many ranks: samples/s, MFU and memory of the pre-training step under DDP and FSDP, eager and compiled, and how well it scales.

    torchrun --nproc-per-node 8 benchmarks/ranks.py --size L --batch 256                        # on GPUs, over NCCL: one row for each of DDP and FSDP, eager and compiled
    torchrun --nproc-per-node 1 benchmarks/ranks.py --size L --batch 256                        # one rank, for the efficiency: samples/s of N ranks over N times this
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ranks.py --size tiny --batch 16    # on a CPU, over gloo, to show that it works

The step is the package's own (`vtp.pretrain.train_step` on a model from `vtp.dist.wrap`); --batch is CLIP's share of a rank, with a quarter of it for SSL and an eighth for reconstruction. `loss` is the mean over ranks of the first step, the same in every row up to rounding:
sharding and compiling change nothing. Medians of the slowest rank, synchronised; the batch is the same in every step. Prints Markdown on rank 0.
"""
import argparse
import os
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.dist import is_main, rank, sum_ranks, world, wrap
from vtp.job import Machine
from vtp.loop import DTYPES, prepare, to_device
from vtp.optim import adamw
from vtp.pretrain import cost, freeze_unused, train_step
from vtp.recipes import VTP, at
from vtp.text import TextConfig
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig, size


def job_of(args):
    small, (clip, ssl, rec) = at(VTP, "mini"), VTP.objectives
    trunk = ViTConfig(width=64, depth=2, heads=2) if args.size == "tiny" else size(args.size)
    decoder = replace(trunk, depth=1, norm="layernorm") if args.size == "tiny" else size("L", depth=4, norm="layernorm")
    few = dict(prototypes=256, head_hidden=64, head_bottleneck=32) if args.size == "tiny" else {}
    text = TextConfig(64, 2, 2, dim=64) if args.size == "tiny" else TextConfig()
    batches = [world() * args.batch // share for share in (1, 4, 8)]
    return replace(VTP, tokenizer=ViTTokenizerConfig(args.image, trunk, decoder), pairs=replace(small.pairs, size=args.image), steps=10_000, dtype=args.dtype, objectives=(
        replace(clip, batch=batches[0], text=text, crop=CropConfig(args.image)),
        replace(ssl, batch=batches[1], crop=replace(ssl.crop, size=args.image), local=replace(ssl.local, size=min(96, args.image // 32 * 16)), drop=0., **few),
        replace(rec, batch=batches[2], crop=CropConfig(args.image), perceptual=small.objectives[-1].perceptual)))


def timed(args, job, batch, sharding, compiled, device):
    "(mean loss of the first step, median seconds of the slowest rank, peak GB of this rank)"
    torch.manual_seed(0)
    model = freeze_unused(job.build(device), job).train()
    prepare(model, Machine(compile=compiled, checkpointing=args.checkpointing, chunk=args.chunk))
    wrapped = wrap(model, sharding)
    opt, times = adamw(model, job.optim), []
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    for i in range(args.repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        loss = train_step(wrapped, batch, opt, job, 0)["loss"]
        if device.type == "cuda": torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - start], device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(taken.item())
        if i == 0: first = float(sum_ranks(loss.double()) / world())
    return first, statistics.median(times[2:]), torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "S", "B", "L"), default="L")
    parser.add_argument("--batch", type=int, default=64, help="pairs of CLIP on a rank")
    parser.add_argument("--image", type=int, help="side; 256, or 32 with --size tiny")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--chunk", type=int, help="the feature cache: samples of a rank at once")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--eager", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", type=float, default=790e12, help="FLOP/s of a large bf16 product on one device")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu: torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    args.image = args.image or (32 if args.size == "tiny" else 256)
    job = job_of(args)
    views = Batches(job.pairs, job.objectives, 0, 1, rank(), world())[0]
    batch, flops = to_device({name: views[name] for name in job.weights}, device, DTYPES[args.dtype]), cost(job).flops
    if is_main():
        print(f"{torch.cuda.get_device_name(device) if gpu else 'CPU'}, {world()} rank(s), VTP-{args.size} {args.image} px, global batches {'/'.join(str(o.batch) for o in job.objectives)}, {args.dtype}\n")
        print("| ranks share by | path | loss | samples/s | ms/step | MFU | peak GB |\n|---|---|---:|---:|---:|---:|---:|", flush=True)
    for sharding in ("ddp", "fsdp"):
        for compiled in (False,) if args.eager else (False, True):
            torch._dynamo.reset()
            loss, seconds, memory = timed(args, job, batch, sharding, compiled, device)
            used = f"{100 * flops / seconds / args.peak / world():.1f} %" if gpu else "–"
            if is_main(): print(f"| {sharding} | {'compiled' if compiled else 'eager'} | {loss:.4f} | {job.batch / seconds:.1f} | {1e3 * seconds:.1f} | {used} | {memory:.1f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__": main()
