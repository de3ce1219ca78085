"""C1–C4: encode and decode of one image by the ViT tokenizer, against a plain implementation of the same model.

    python benchmarks/vit.py                       # S and B, fp32 and bf16: two minutes of one CPU core
    python benchmarks/vit.py --sizes S B L --compiled --memory

Prints Markdown rows. The plain model has the same weights and does what straightforward code does: RoPE table rebuilt in every block, prefix cut off and put
back, norms out of single operations, weights cast on every autocast call. Ours is timed in its faithful (bf16 RoPE, as the peer) and its exact mode (fp32 RoPE), in bf16
with the linear layers' weights cast once. Runs are alternated in one process; the numbers are medians. `error` is that of z against fp64.
"""
import argparse
import copy
import math
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import RMSNorm, size


def config_of(name, rope="bf16"):
    "The released layout of one size."
    trunk = size(name, qk_norm=False, rope_dtype=rope)
    return ViTTokenizerConfig(image_size=256, trunk=trunk, decoder=replace(trunk, norm="layernorm"))


# The plain model: functions over our modules' weights

def plain_norm(norm, x):
    if not isinstance(norm, RMSNorm): return norm(x)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def plain_table(h, w, head, device):
    "Sine and cosine (h·w, d) in bf16."
    options = dict(device=device, dtype=torch.bfloat16)
    periods = 100. ** (2 * torch.arange(head // 4, **options) / (head // 2))
    rows, columns = torch.arange(.5, h, **options) / h, torch.arange(.5, w, **options) / w
    places = 2. * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1) - 1.
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
    return angles.sin(), angles.cos()


def plain_rotate(x, sin, cos):
    kind, prefix = x.dtype, x.shape[-2] - sin.shape[-2]
    x = x.to(sin.dtype)
    head, tail = x[:, :, :prefix], x[:, :, prefix:]
    a, b = tail.chunk(2, -1)
    return torch.cat([head, tail * cos + torch.cat([-b, a], -1) * sin], -2).to(kind)


def plain_stack(stack, x, grid):
    for block in stack.blocks:
        b, n, d = x.shape
        sin, cos = plain_table(*grid, d // stack.config.heads, x.device)
        q, k, v = block.attn.qkv(plain_norm(block.norm1, x)).reshape(b, n, 3, stack.config.heads, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(plain_rotate(q, sin, cos), plain_rotate(k, sin, cos), v)
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(b, n, d))
        y, mlp = plain_norm(block.norm2, x), block.mlp
        x = x + mlp.w3(F.silu(mlp.w1(y)) * mlp.w2(y))
    return plain_norm(stack.norm, x)


def plain_encode(tokenizer, image):
    encoder, (h, w) = tokenizer.encoder, [side // 16 for side in image.shape[-2:]]
    patches = encoder.trunk.patch_embed.proj((image - encoder.mean) / encoder.std).flatten(2).transpose(1, 2)
    tokens = torch.cat([encoder.trunk.cls_token.expand(len(image), -1, -1), patches], 1)
    patches = encoder.bottleneck(plain_stack(encoder.trunk, tokens, (h, w))[:, 1:])
    return patches.transpose(1, 2).reshape(len(image), -1, h, w)


def plain_decode(tokenizer, z):
    decoder, (b, _, h, w) = tokenizer.decoder, z.shape
    tokens = plain_stack(decoder, decoder.proj_in(z).flatten(2).transpose(1, 2), (h, w))
    patches = decoder.proj_out(tokens.transpose(1, 2).reshape(b, -1, h, w))
    return F.pixel_shuffle(patches, 16) * decoder.std + decoder.mean


# Measuring

class Calls(TorchDispatchMode):
    "Count the operators that compute: views, allocations and questions about dtypes are none."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        tensors = any(isinstance(r.type, torch.TensorType) for r in returns)
        self.count += tensors and not view and func._schema.name not in ("aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like")
        return func(*args, **(kwargs or {}))


def calls(fn):
    fn()
    with Calls() as counter: fn()
    return counter.count


def seconds(fn, device):
    "Wall time; CPU time on one thread, so that a busy machine's other processes do not enter."
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    fn()
    if device.type == "cuda": torch.cuda.synchronize()
    return clock() - start


def medians(runs, repeats, device):
    "Median time of each run in ms, alternated so that a busy machine hits all of them alike."
    for fn in runs.values(): fn()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, fn in runs.items(): times[name].append(seconds(fn, device))
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def cast_once(tokenizer):
    "Linear layers and convolutions in bf16: autocast has nothing left to cast, and computes the same."
    for layer in tokenizer.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)): layer.bfloat16()
    return tokenizer


def variants(name, dtype, device):
    "The models of one comparison: {label: (encode, decode)}, and the same weights in fp64."
    torch.manual_seed(0)
    plain = config_of(name).build().to(device).eval()
    faithful, exact = copy.deepcopy(plain), config_of(name, "fp32").build().to(device).eval()
    exact.load_state_dict(plain.state_dict())
    truth = copy.deepcopy(exact).double()
    if dtype == "bf16": cast_once(faithful), cast_once(exact)
    return {"plain": (lambda i: plain_encode(plain, i), lambda z: plain_decode(plain, z)), "faithful": (faithful.encode, faithful.decode),
            "exact": (exact.encode, exact.decode)}, truth


def compare(name, dtype, repeats, device, compiled):
    models, truth = variants(name, dtype, device)
    image = torch.rand(1, 3, 256, 256, device=device)
    z = truth.encode(image.double())
    with torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext():
        encoded = {label: encode(image) for label, (encode, _) in models.items()}
        pictures = {label: decode(z.float()).float() for label, (_, decode) in models.items()}
        for label in ("faithful", "exact"):        # the peer must be the same function, up to RoPE's and autocast's rounding
            torch.testing.assert_close(encoded[label].float(), encoded["plain"].float(), rtol=0, atol=.05 * z.abs().max().item())
            torch.testing.assert_close(pictures[label], pictures["plain"], rtol=0, atol=.05)
        error = {label: ((value - z).norm() / z.norm()).item() for label, value in encoded.items()}
        times = [medians({label: lambda fns=fns: fns[i](given) for label, fns in models.items()}, repeats, device) for i, given in ((0, image), (1, z.float()))]
        counts = {label: calls(lambda: encode(image)) for label, (encode, _) in models.items()}
        for label in models:
            cells = [f"{t[label]:.1f} | {t['plain'] / t[label]:.2f}×" for t in times]
            print(f"| {name} | {dtype} | {label} | {cells[0]} | {cells[1]} | {counts[label]} | {error[label]:.1e} |", flush=True)
        if compiled: print(f"| {name} | {dtype} | exact, compiled | {compile_row(models, image, repeats, device)} |", flush=True)


def compile_row(models, image, repeats, device):
    "Encode under torch.compile: time, speed-up, generated kernels and library calls."
    import torch._inductor.config as settings
    from torch._inductor import metrics
    settings.freezing = True
    metrics.reset()
    fast = torch.compile(models["exact"][0])
    t = medians({"plain": lambda: models["plain"][0](image), "compiled": lambda: fast(image)}, repeats, device)
    return f"{t['compiled']:.1f} | {t['plain'] / t['compiled']:.2f}× | | | {metrics.generated_kernel_count} generated | "


def peak(which, name):
    "Peak resident memory in GB of one bf16 encode + decode, and what the process held after its imports (this runs in a process of its own)."
    used = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6      # ru_maxrss begins at the parent's peak
    start = used()
    with torch.device("meta"): tokenizer = config_of(name).build()
    if which == "ours": cast_once(tokenizer)
    tokenizer = tokenizer.to_empty(device="cpu").eval()
    for tensor in [*tokenizer.parameters(), *tokenizer.buffers()]: tensor.fill_(.01)
    encode, decode = (tokenizer.encode, tokenizer.decode) if which == "ours" else (lambda i: plain_encode(tokenizer, i), lambda z: plain_decode(tokenizer, z))
    with torch.autocast("cpu", torch.bfloat16): decode(encode(torch.rand(1, 3, 256, 256)))
    print(f"{used():.2f} {start:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("S", "B", "L"), default=["S", "B"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, which takes minutes on a CPU")
    parser.add_argument("--memory", action="store_true", help="also C4: peak memory of VTP-L, bf16, one process for each model")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.peak: return peak(*options.peak)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {options.threads} threads'}, torch {torch.__version__}, batch 1, 256×256, medians of {options.repeats}\n")
    print("| size | dtype | model | encode, ms | against plain | decode, ms | against plain | compute calls of an encode | error of z |\n|---|---|---|---|---|---|---|---|---|")
    for name in options.sizes:
        for dtype in options.dtypes: compare(name, dtype, options.repeats, device, options.compiled)
    if options.memory:
        print("\n| VTP-L, bf16, encode + decode on the CPU | peak, GB | of it after the imports |\n|---|---|---|")
        for which in ("plain", "ours"):
            command = [sys.executable, __file__, "--peak", which, "L", "--threads", str(options.threads)]
            total, start = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            print(f"| {which} | {total} | {start} |", flush=True)


if __name__ == "__main__":
    main()
