"""C8: the Fréchet distance of two sets of statistics, against scipy's matrix square root of their product.

    OMP_NUM_THREADS=1 python benchmarks/fid.py [--dims 64 2048] [--repeats 5] [--threads 1]

Both sides are alternated in one process on the same covariances (features with a spectrum that falls by four decades, as those of image networks do); medians of wall time. `memory` is
the growth of the process's peak while the side runs alone in a fresh process, in units of one d × d float64 matrix (Linux only).
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vtp.evaluation.fid import Stats, frechet


def pair(dim, seed=0):
    "Statistics of 3 · dim features of two laws with a falling spectrum."
    generator, found = torch.Generator().manual_seed(seed), []
    for shift in (0., .1):
        mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**.5 * torch.logspace(0, -2, dim, dtype=torch.float64)
        stats = Stats(dim)
        for _ in range(3): stats.update(torch.randn(dim, dim, generator=generator, dtype=torch.float64) @ mixing + shift)
        found.append(stats)
    return found


def by_sqrtm(a, b):
    "The usual way: Tr of scipy.linalg.sqrtm of the product."
    import scipy.linalg
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
    return ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()).item() - 2 * np.trace(root).real


SIDES = {"frechet": frechet, "sqrtm": by_sqrtm}


def timed(work):
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def memory(what):
    "Bytes of this process that Linux reports as VmRSS (now) or VmHWM (at most)."
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def peak(side, dim):
    "Growth of peak memory, in d × d float64 matrices, of one call in a fresh process."
    done = subprocess.run([sys.executable, __file__, "--peak", side, "--dims", str(dim)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        SIDES[options.peak](*pair(32))       # libraries are loaded before the count begins
        a, b = pair(options.dims[0])
        Path("/proc/self/clear_refs").write_text("5")       # forget the peak so far
        before = memory("VmRSS")
        SIDES[options.peak](a, b)
        print((memory("VmHWM") - before) / (8 * options.dims[0]**2))
        return
    print("| dims | frechet | sqrtm | ratio | relative difference | memory: frechet | memory: sqrtm |\n|---:|---:|---:|---:|---:|---:|---:|")
    for dim in options.dims:
        a, b = pair(dim)
        runs = [{name: timed(lambda: side(a, b)) for name, side in SIDES.items()} for _ in range(options.repeats + 1)][1:]     # the first warms up
        seconds = {name: statistics.median(run[name][0] for run in runs) for name in SIDES}
        ours, theirs = (runs[0][name][1] for name in SIDES)
        growth = [f"{peak(name, dim):.1f} d²" if dim >= 1024 else "–" for name in SIDES]
        print(f"| {dim} | {seconds['frechet'] * 1e3:,.1f} ms | {seconds['sqrtm'] * 1e3:,.1f} ms | {seconds['sqrtm'] / seconds['frechet']:.1f}× | {abs(ours / theirs - 1):.0e} | {' | '.join(growth)} |", flush=True)


if __name__ == "__main__":
    main()
