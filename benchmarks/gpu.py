"""What needs a GPU, one command each; every one also runs on a CPU with --size S --batch 16 --image 64, to show that it works.

    python benchmarks/gpu.py encode      H1, H2: images/s of bf16 encode at a large batch, latency at batch 1; ours compiled and eager
    python benchmarks/gpu.py step        H3: samples/s and MFU of the pre-training step, ours compiled and eager against the legacy structure: three separate forwards, 77 columns of text, eager autocast
    python benchmarks/gpu.py parity      bf16 on this device against fp64 on the CPU: losses and gradients of one step, all objectives

Times are medians after warm-up, synchronised; MFU is FLOPs counted (attention included) over --peak. Prints Markdown.
"""
import argparse
import statistics
import time
from dataclasses import replace

import torch

from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.flops import count
from vtp.job import Machine
from vtp.optim import adamw
from vtp.loop import DTYPES, prepare, to_device
from vtp.pretrain import cost, freeze_unused, train_step
from vtp.recipes import VTP, at
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import size

from step import full_context, separate

def median(fn, device, repeats):
    "Median seconds of `fn()`, two calls of warm-up first."
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = []
    for i in range(repeats + 2):
        wait()
        start = time.perf_counter()
        fn()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def hardware(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def tokenizer(args):
    return ViTTokenizerConfig(args.image, size(args.size, qk_norm=False), size("L", depth=4, norm="layernorm", qk_norm=False))


@torch.inference_mode()
def encode(args, device):
    print("| hardware | model | batch | path | images/s | ms/batch | MFU |\n|---|---|---:|---|---:|---:|---:|")
    for compiled in (False, True):
        model = tokenizer(args).build().to(device).eval()
        prepare(model, Machine(compile=compiled))
        for batch in (args.batch, 1):
            images = torch.rand(batch, 3, args.image, args.image, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                seconds = median(lambda: model.encode(images), device, args.repeats)
            with torch.device("meta"):
                shapes = tokenizer(args).build()
            flops = count(lambda: shapes.encode(torch.empty(batch, 3, args.image, args.image, device="meta"))).total
            print(f"| {hardware(device)} | VTP-{args.size} | {batch} | {'compiled' if compiled else 'eager'}, bf16 | {batch / seconds:.1f} | {1e3 * seconds:.2f} | {100 * flops / seconds / args.peak:.1f} % |", flush=True)


def job_of(args):
    "VTP at the asked size: the paper's objectives in the proportion 8 : 2 : 1 of what fits one device; the offline perceptual term."
    small = at(VTP, "mini")
    clip, ssl, rec = VTP.objectives
    return replace(VTP, tokenizer=tokenizer(args), pairs=replace(small.pairs, size=args.image), steps=10_000, objectives=(
        replace(clip, batch=args.batch, crop=CropConfig(args.image)),
        replace(ssl, batch=args.batch // 4, crop=replace(ssl.crop, size=args.image), local=replace(ssl.local, size=min(96, args.image // 32 * 16))),
        replace(rec, batch=args.batch // 8, crop=CropConfig(args.image), perceptual=small.objectives[-1].perceptual)))


def step(args, device):
    job = job_of(args)
    print("| hardware | model | batches | path | samples/s | ms/step | ratio | MFU | peak GB |\n|---|---|---|---|---:|---:|---:|---:|---:|")
    batch = Batches(job.pairs, job.objectives, 0, 1)[0]
    batch = to_device({name: batch[name] for name in job.weights}, device)
    legacy = None
    for path in ("three forwards, eager", "eager", "compiled"):
        model = freeze_unused(job.build(device), job).train()
        prepare(model, Machine(compile=path == "compiled"))
        views = batch
        if path.startswith("three"): model, views = separate(model), full_context(batch)
        opt = adamw(model, job.optim)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median(lambda: train_step(model, views, opt, job, 0), device, args.repeats)
        legacy = seconds if path.startswith("three") else legacy
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
        sizes = "/".join(str(o.batch) for o in job.objectives)
        print(f"| {hardware(device)} | VTP-{args.size} {args.image} px | {sizes} | {path}, bf16 | {job.batch / seconds:.1f} | {1e3 * seconds:.1f} | {legacy / seconds:.2f} | {100 * cost(job).flops / seconds / args.peak:.1f} % | {memory:.1f} |", flush=True)


def parity(args, device):
    job = at(VTP, "smoke")
    job = replace(job, objectives=tuple(replace(o, drop=0.0) for o in job.objectives))
    gradients = {}
    for name, dtype, where in (("fp64", "fp64", torch.device("cpu")), ("fp32", "fp32", device), ("bf16", "bf16", device)):
        this = replace(job, dtype=dtype)
        model = freeze_unused(this.build(), this).to(where).train()
        batch = Batches(this.pairs, this.objectives, 0, 1)[0]
        batch = to_device({k: batch[k] for k in this.weights}, where, DTYPES[dtype])
        with torch.autocast(where.type, torch.bfloat16, enabled=dtype == "bf16"):
            losses = model(batch)
        sum(this.weights[k] * v for k, v in losses.items()).backward()
        flat = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
        gradients[name] = ({k: float(v.detach()) for k, v in losses.items()}, flat)
    print(f"| hardware | precision | {' | '.join(job.weights)} (relative error of the loss) | relative error of the gradient | cosine |\n|---|---|{'---:|' * (len(job.weights) + 2)}")
    truth, exact = gradients["fp64"]
    for name in ("fp32", "bf16"):
        losses, flat = gradients[name]
        errors = " | ".join(f"{abs(losses[k] - truth[k]) / abs(truth[k]):.1e}" for k in losses)
        print(f"| {hardware(device)} | {name} | {errors} | {(flat - exact).norm() / exact.norm():.1e} | {torch.cosine_similarity(flat, exact, dim=0):.6f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "step", "parity"))
    parser.add_argument("--size", choices=("S", "B", "L"), default="L")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peak", type=float, default=790e12, help="FLOP/s of a large bf16 product on this device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    {"encode": encode, "step": step, "parity": parity}[arguments.what](arguments, torch.device(arguments.device))
