"""C1, C2, C4 (H1, H2): encode and decode of one image by official VTP checkpoints, against the official code with the same random weights.

    VTP_REFERENCE=…/VTP OMP_NUM_THREADS=1 python benchmarks/official.py                   # S and B, fp32 and bf16: some minutes of one CPU core
    VTP_REFERENCE=…/VTP OMP_NUM_THREADS=1 python benchmarks/official.py --sizes S --compiled
    VTP_REFERENCE=…/VTP OMP_NUM_THREADS=1 python benchmarks/official.py --memory          # C4 alone, one process for each model
    VTP_REFERENCE=…/VTP python benchmarks/official.py --throughput --sizes L              # H1, H2, on a GPU; --sizes S --batch 2 --image 64 shows on a CPU that it works

VTP_REFERENCE names a checkout of MiniMax-AI/VTP; `transformers` is not needed. The official methods are called on both sides, with normalised images. Runs are
alternated in one process; numbers are medians of CPU time on one thread. `error` is that of latents and pixels against fp64. The row "products alone" is the sum
of the matrix products of all linear layers, each timed by itself: what no rearrangement of the rest can get below with these products.
bf16 rows (`vtp.inference`): "cast once" is bf16 autocast with the matrices cast beforehand, "widened" keeps matrices in bf16 and multiplies in fp32, "mapped" does that
with the matrices left in their file.
"""
import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]
SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def fields(name):
    width, depth, heads = SHAPES[name]
    return {f"{side}_{key}": value for side in ("vision", "decoder") for key, value in dict(embed_dim=width, depth=depth, num_heads=heads).items()} | dict(train_clip=False)


def official(name):
    "The official model with its own random weights."
    from test_reference_official import official_code
    code = official_code(os.environ["VTP_REFERENCE"])
    torch.manual_seed(0)
    return code.VTPModel(code.VTPConfig(**fields(name))).eval()


def ours(name, rope, tensors=None):
    from vtp.tokenizers.official import OfficialConfig, OfficialModel, loaded
    model = OfficialModel(OfficialConfig(**fields(name)), rope)
    return loaded(model, tensors, f"VTP-{name}") if tensors else model.eval()


def products(model, tokens):
    "A function that computes every linear layer of `model` on its own, on random tokens."
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    given = {(layer.in_features, layer.weight.dtype): torch.randn(tokens, layer.in_features).to(layer.weight.dtype) for layer in layers}
    return lambda: [layer(given[layer.in_features, layer.weight.dtype]) for layer in layers]


def medians(runs, repeats):
    "Median CPU time of each run in ms, alternated."
    for fn in runs.values(): fn()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, fn in runs.items():
            start = time.thread_time()
            fn()
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def compare(name, dtype, repeats, compiled):
    from vtp.inference import cast_once, widened
    peer = official(name)
    tensors = peer.state_dict()
    faithful, exact, auto = ours(name, "faithful", tensors), ours(name, "exact", tensors), lambda: torch.autocast("cpu", torch.bfloat16)
    truth = copy.deepcopy(exact).double()
    image, z = torch.randn(1, 3, 256, 256), torch.randn(1, 64, 16, 16)
    if dtype == "fp32": models = {"official": (peer, nullcontext), "faithful": (faithful, nullcontext), "exact": (exact, nullcontext)}
    else: models = {"official, autocast": (peer, auto), "faithful, cast once": (cast_once(copy.deepcopy(faithful)), auto), "exact, cast once": (cast_once(copy.deepcopy(exact)), auto), "exact, widened": (widened(copy.deepcopy(exact)), nullcontext)}
    rows = {}
    for step, (method, given) in {"encode": ("get_reconstruction_latents", image), "decode": ("get_latents_decoded_images", z)}.items():
        want, runs, error = getattr(truth, method)(given.double()), {}, {}
        def run(model, context):
            with context(): return getattr(model, method)(given)
        for label, (model, context) in models.items():
            runs[label] = lambda model=model, context=context: run(model, context)
            error[label] = ((runs[label]().double() - want).norm() / want.norm()).item()
        if compiled and dtype == "fp32":
            import torch._inductor.config as settings
            settings.freezing = True
            fast = torch.compile(getattr(exact, method))
            runs["exact, compiled"], error["exact, compiled"] = (lambda: fast(given)), ((fast(given).double() - want).norm() / want.norm()).item()
        part = (models["official" if dtype == "fp32" else "faithful, cast once"][0])
        part = {"encode": lambda: part.trunk if hasattr(part, "trunk") else part.tokenizer.encoder, "decode": lambda: part.pixel_decoder if hasattr(part, "pixel_decoder") else part.tokenizer.decoder}[step]()
        runs["products alone"] = products(part, 257 if step == "encode" else 256)
        found = medians(runs, repeats)
        first = next(iter(found))
        for label in found: rows.setdefault(label, []).append((found[label], found[first] / found[label], error.get(label)))
    for label, ((a, ra, ea), (b, rb, eb)) in rows.items():
        print(f"| {name} | {dtype} | {label} | {a:.0f} | {ra:.2f}× | {b:.0f} | {rb:.2f}× | {'' if ea is None else f'{ea:.1e}, {eb:.1e}'} |", flush=True)


def peak(which, name, file):
    "Peak resident memory in GB of one bf16 encode + decode, and what the process held after its imports (in a process of its own). `write` writes the file that `mapped` reads."
    used = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    from vtp.inference import cast_once, mapped, save_half, widened
    from vtp.tokenizers.official import _empty
    with torch.device("meta"): model = official(name) if which == "official" else ours(name, "exact")
    start = used()
    if which == "official":
        model = model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "periods"): module._init_weights()
    elif which == "cast once": model = _empty(cast_once(model))
    else: model = _empty(model)
    if which == "mapped": mapped(model, file)
    else:
        for parameter in model.parameters(): parameter.fill_(.01)
    if which == "write": return save_half(model, file)
    with nullcontext() if which == "mapped" else torch.autocast("cpu", torch.bfloat16): model.get_latents_decoded_images(model.get_reconstruction_latents(torch.rand(1, 3, 256, 256)))
    print(f"{used():.2f} {start:.2f}")


def throughput(name, batches, side, device, repeats, compiled):
    "H1, H2: encode at a large batch and at batch 1: the official code in fp32 and under autocast, ours cast once and (on a GPU) compiled."
    from vtp.inference import cast_once
    peer, auto = official(name).to(device), lambda: torch.autocast(device.type, torch.bfloat16)
    model = cast_once(ours(name, "exact", peer.state_dict())).to(device)
    quick = torch.compile(model.get_reconstruction_latents, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)
    runs = {"official, fp32": (peer.get_reconstruction_latents, nullcontext), "official, autocast": (peer.get_reconstruction_latents, auto), "ours, cast once": (model.get_reconstruction_latents, auto)}
    if compiled: runs["ours, cast once, compiled"] = (quick, auto)
    def wait(): return torch.cuda.synchronize() if device.type == "cuda" else None
    for batch in batches:
        image, times = torch.randn(batch, 3, side, side, device=device), {label: [] for label in runs}
        for turn in range(repeats + 2):
            for label, (fn, context) in runs.items():
                wait()
                start = time.perf_counter()
                with context(): fn(image)
                wait()
                if turn > 1: times[label].append(time.perf_counter() - start)
        found = {label: statistics.median(values) for label, values in times.items()}
        for label, seconds in found.items():
            print(f"| VTP-{name} | {batch} | {label} | {batch / seconds:.1f} | {1e3 * seconds:.2f} | {found['official, fp32'] / seconds:.2f}× | {found['official, autocast'] / seconds:.2f}× |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SHAPES), default=["S", "B"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="fp32: also torch.compile with frozen weights, which takes a minute a model")
    parser.add_argument("--memory", action="store_true", help="C4 instead: peak memory of VTP-L")
    parser.add_argument("--throughput", action="store_true", help="H1, H2 instead: images/s and latency of encode, on the GPU if there is one")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, default=256)
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "SIZE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "VTP_REFERENCE" not in os.environ: parser.error("set VTP_REFERENCE to a checkout of MiniMax-AI/VTP: it is the peer")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.peak: return peak(*options.peak)
    if options.throughput:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, one thread'}, torch {torch.__version__}, {options.image} px\n\n| model | batch | path | images/s | ms | against fp32 | against autocast |\n|---|---:|---|---:|---:|---:|---:|")
        for name in options.sizes: throughput(name, (options.batch, 1), options.image, device, options.repeats, options.compiled or device.type == "cuda")
        return
    if options.memory:
        print("| VTP-L, bf16, encode + decode on the CPU | peak, GB | of it before the weights |\n|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            for which in ("official", "cast once", "write", "mapped"):
                found = subprocess.run([sys.executable, __file__, "--peak", which, "L", f"{folder}/half.safetensors"], check=True, capture_output=True, text=True).stdout.split()
                if found: print(f"| {which} | {found[0]} | {found[1]} |", flush=True)
        return
    print(f"CPU, one thread, torch {torch.__version__}, batch 1, 256×256, medians of {options.repeats}\n")
    print("| size | dtype | model | encode, ms | | decode, ms | | error of latents, pixels |\n|---|---|---|---:|---:|---:|---:|---|")
    for name in options.sizes:
        for dtype in options.dtypes: compare(name, dtype, options.repeats, options.compiled)


if __name__ == "__main__": main()
