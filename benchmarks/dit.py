"""H6, H7: samples/s of DiT training and of sampling.

    OMP_NUM_THREADS=1 python benchmarks/dit.py train                     # a small one on a CPU
    OMP_NUM_THREADS=1 python benchmarks/dit.py sample
    python benchmarks/dit.py train --size B/1 --batch 1024 --dtype bf16 --grid 16 --channels 64 --repeats 20                  # H6, on a GPU
    python benchmarks/dit.py sample --size B/1 --batch 512 --dtype bf16 --grid 16 --channels 64 --samples 10000 --tokenizer L # H7, on a GPU

`train` times the package's own step (noise, time, forward, backward, AdamW, average of the weights; latents lie on the device), eager and compiled, and as peer the same network
with the habits of the reference loop: time and noise from numpy and torch generators, the average in a Python loop, the loss read at every step. `sample` times noise → latent →
image for Euler with 250 points and for dopri5, from random weights whose last layer is not zero (dopri5's evaluations depend on the weights: a trained DiT needs others), and states
how long the named number of samples takes. Medians after warm-up, synchronised; MFU is FLOPs counted (attention included) over --peak. Prints Markdown.
"""
import argparse
import copy
import math
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from vtp.data.samples import mix
from vtp.data.shapes import Shapes
from vtp.generation.dit import SIZES, DiT, DiTConfig
from vtp.generation.flow import SamplerConfig, interpolate
from vtp.generation.latents import CacheLatents
from vtp.generation.sample import sample as draw
from vtp.generation.train import Generator, TrainDiT, cost, train_step
from vtp.job import At, Machine
from vtp.loop import DTYPES, prepare
from vtp.optim import adamw
from vtp.pretrain import Pretrain
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import size

TINY = dict(width=128, depth=4, heads=4)


def config_of(args):
    return DiTConfig(**(TINY if args.size == "tiny" else SIZES[args.size]), channels=args.channels, grid=args.grid)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternated(sides, device, repeats):
    "Medians of seconds of each side's call, in turn, after two rounds of warm-up."
    times = {name: [] for name in sides}
    for _ in range(repeats + 2):
        for name, side in sides.items():
            wait(device)
            start = time.perf_counter()
            side()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def hardware(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def job_of(args):
    tokenizer = Pretrain(ViTTokenizerConfig(), Shapes(), (), 1)         # stands in: latents are made up here
    return TrainDiT(CacheLatents(At(tokenizer), Shapes()), config_of(args), batch=args.batch, dtype=args.dtype)


def ours(job, z, labels, compiled):
    dit = job.build(z.device)
    ema, opt = copy.deepcopy(dit).requires_grad_(False), adamw(dit, job.optim)
    prepare(dit, Machine(compile=compiled))
    keys = mix(0, np.arange(len(z)))
    return lambda: train_step(dit, ema, z, labels, keys, opt, job, 0)


def habits(job, z, labels):
    "The same network under the reference's loop."
    dit = job.build(z.device)
    ema = copy.deepcopy(dit).requires_grad_(False)
    opt = torch.optim.AdamW(dit.parameters(), lr=job.optim.lr, betas=job.optim.betas, weight_decay=0.0)

    def step():
        t = torch.from_numpy(1 / (1 + np.exp(-np.random.standard_normal(len(z))))).to(z)
        x, velocity = interpolate(z, torch.randn_like(z), t)
        dropped = torch.where(torch.rand(len(z), device=z.device) < job.drop_labels, job.dit.classes, labels)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=job.dtype == "bf16"):
            predicted = dit(x, t, dropped)
            loss = (predicted - velocity).square().mean((1, 2, 3)) + (1 - F.cosine_similarity(predicted, velocity, dim=1)).mean((1, 2))
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), dit.parameters()):
                average.mul_(job.ema).add_(weight, alpha=1 - job.ema)
        return loss.mean().item()

    return step


def train(args, device):
    job = job_of(args)
    z = torch.randn(args.batch, args.channels, args.grid, args.grid, device=device, dtype=DTYPES[args.dtype])
    labels = torch.randint(0, job.dit.classes, (args.batch,), device=device)
    sides = {"reference's habits, eager": habits(job, z, labels), "ours, eager": ours(job, z, labels, False)}
    if args.compile:
        sides["ours, compiled"] = ours(job, z, labels, True)
    seconds = alternated(sides, device, args.repeats)
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB for all sides" if device.type == "cuda" else "not measured"
    print(f"{hardware(device)}; DiT {args.size}, {args.channels}×{args.grid}×{args.grid}, batch {args.batch}, {args.dtype}; {cost(job.dit) / 1e9:.2f} GFLOPs a sample; peak memory {memory}\n")
    print("| side | samples/s | ms/step | ratio | MFU | 80 epochs (1.02e8 samples) |\n|---|---:|---:|---:|---:|---:|")
    base = seconds["reference's habits, eager"]
    for name, s in seconds.items():
        mfu = f"{100 * cost(job.dit) * args.batch / s / args.peak:.1f} %" if device.type == "cuda" else "–"
        print(f"| {name} | {args.batch / s:,.1f} | {1e3 * s:.1f} | {base / s:.2f} | {mfu} | {102_400_000 / args.batch * s / 3600:,.1f} h |")
    if args.size == "B/1" and device.type == "cuda":
        best = max(args.batch / s for s in seconds.values())
        print(f"\nH6, ≥ 2,400 samples/s: {'met' if best >= 2400 else 'not met'}, {best:,.0f}")


def generator_of(args, device):
    torch.manual_seed(0)
    decoder = size("S", depth=1, norm="layernorm", qk_norm=False) if args.tokenizer == "small" else size("L", depth=4, norm="layernorm", qk_norm=False)
    tokenizer = ViTTokenizerConfig(16 * args.grid, size("S", depth=1, qk_norm=False), decoder, latent=args.channels).build()      # its encoder is not run
    dit = DiT(config_of(args))
    for layer in (*(block.adaLN_modulation[1] for block in dit.blocks), dit.final_layer.adaLN_modulation[1], dit.final_layer.linear):
        torch.nn.init.normal_(layer.weight, std=0.02)
    generator = Generator(tokenizer, dit, np.zeros(args.channels), np.ones(args.channels)).to(device).requires_grad_(False).eval()
    prepare(generator.dit, Machine(compile=args.compile))
    return generator


def sample(args, device):
    generator = generator_of(args, device)
    forward = cost(config_of(args)) / 3
    print(f"{hardware(device)}; DiT {args.size}, {args.channels}×{args.grid}×{args.grid}, batch {args.batch}, {args.dtype}, {'compiled' if args.compile else 'eager'}; decoder {args.tokenizer}\n")
    print(f"| sampler | evaluations | images/s | ms/image | MFU of the DiT | {args.samples:,} samples |\n|---|---:|---:|---:|---:|---:|")
    for name, config in {"Euler, 250 points": SamplerConfig(steps=args.points), "dopri5": SamplerConfig("dopri5")}.items():
        evaluations, place = [], 0

        def batch():
            nonlocal place
            indices = np.arange(place, place + args.batch)
            images, nfe = draw(generator, config, indices, total=10**9, dtype=args.dtype)
            evaluations.append(float(nfe.double().mean()))
            place += args.batch

        seconds = alternated({name: batch}, device, args.repeats)[name]
        nfe = statistics.mean(evaluations)
        mfu = f"{100 * forward * nfe * args.batch / seconds / args.peak:.1f} %" if device.type == "cuda" else "–"
        total = math.ceil(args.samples / args.batch) * seconds
        print(f"| {name.replace('250', str(args.points))} | {nfe:.0f} | {args.batch / seconds:,.2f} | {1e3 * seconds / args.batch:.1f} | {mfu} | {total / 60:,.1f} min |", flush=True)
        if args.size == "B/1" and device.type == "cuda" and config.method == "dopri5":
            print(f"\nH7, FID-10k ≤ 3 min: sampling takes {total / 60:.1f} min{'' if total < 180 else ', not met'}; Inception features of 10,000 images come on top", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "sample"))
    parser.add_argument("--size", choices=("tiny", *SIZES), default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--grid", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--tokenizer", choices=("small", "L"), default="small", help="decoder: one S layer, or the scaling studies' four L layers")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=250, help="of Euler's time grid")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--peak", type=float, default=790e12, help="FLOP/s of the device's bf16 matrix products: H200 790e12")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    {"train": train, "sample": sample}[args.what](args, device)
