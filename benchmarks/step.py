"""C5: what one training step costs: FLOPs, wall time by objective, memory; against three separate forwards.

    OMP_NUM_THREADS=1 python benchmarks/step.py
    OMP_NUM_THREADS=1 python benchmarks/step.py --captions '../shared/data/flickr128/flickr128-train-*.tar.gz'

Ours: one pass of the trunk for the images that contrast and reconstruction share, last blocks only for the tokens used, captions cut at the longest of a rank's batch.
Peer: the same model with three separate forwards, full last blocks and 77 text tokens. FLOPs are counted forward and backward, attention and LPIPS included, on the
meta device at 256/64/32 images and scaled to 16k/4k/2k: trunks S, B, L, a 4-layer ViT-L decoder, text 12 × 768. Times are medians of wall time on an idle machine;
memory is VmHWM of a fresh process that trains three steps. Prints Markdown. About two minutes on one free core.
"""
import argparse
import glob
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.data.pairs import Shards
from vtp.data.samples import Pair, mix
from vtp.data.shapes import Shapes
from vtp.dist import alone
from vtp.flops import count
from vtp.interfaces import Draw
from vtp.objectives.contrastive import Contrastive
from vtp.objectives.overall import Overall
from vtp.objectives.reconstruction import Reconstruction
from vtp.objectives.self_supervised import SelfSupervised
from vtp.optim import adamw, guarded_step
from vtp.perceptual import PerceptualConfig
from vtp.loop import DTYPES, to_device
from vtp.pretrain import Pretrain, train_step
from vtp.recipes import VTP, at
from vtp.text import TextConfig, bpe, cut
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import size

TARGET = dict(S=.75, B=.83, L=.89)
PAPER = dict(S=2.37, B=5.85, L=17.65)      # PFLOP of the peer, from a cost model
RANK = 2048                                # captions of a rank whose longest decides: 16k on eight
COLUMNS = 24                               # without --captions


def text_columns(pattern):
    "Columns that the text tower computes on average for a rank's batch of real captions, and the mean length of a caption."
    reader = Shards(tuple(sorted(glob.glob(pattern)))).open()
    first = np.arange(min(len(reader), 2 * RANK))
    pairs = reader.read(reader.order(0, first), mix(0, first))
    ids = bpe([pair.caption for pair in pairs if isinstance(pair, Pair) and pair.caption])
    batches = [part for part in ids.split(RANK) if len(part) == RANK] or [ids]
    return statistics.fmean(cut(part).shape[1] for part in batches), float((ids.argmax(-1) + 1.).mean())


def separate(model):
    "Make `model` the peer: three forwards, full last blocks."
    embed, text = model.tokenizer.embed, model.objectives["clip"].text

    def in_full(images, tap="trunk", only_cls=False, **options): return embed(images, tap, **options)

    def read(ids):
        tokens = text.token_embedding(ids) + text.positional_embedding[:ids.shape[1]]
        for block in text.transformer.resblocks: tokens = block(tokens)
        return text.ln_final(tokens)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)] @ text.text_projection

    model.shares, model.tokenizer.embed, text.forward = False, in_full, read
    return model


def full_context(views):
    "The same views, captions padded to 77 columns."
    ids = views["clip"]["ids"]
    return views | {"clip": views["clip"] | {"ids": F.pad(ids, (0, 77 - ids.shape[1]))}}


def blank_views(objectives, few):
    "The views of blank pairs, 1/few of each objective's batch, on the meta device."
    views = {}
    for o in objectives:
        n = o.batch // few
        pairs = [Pair(np.zeros((64, 64, 3), np.uint8), "a", 0, str(i)) for i in range(n)]
        views[o.name] = {"rows": torch.arange(n), **o.view(pairs, Draw(0, 0, np.arange(n, dtype=np.uint64), np.arange(n)))}
    return to_device(views, torch.device("meta"))


def flops_table(columns, few=64):
    "C5: PFLOP of a step, for both lengths of text."
    objectives = (Contrastive(), SelfSupervised(), Reconstruction())
    views = blank_views(objectives, few)

    def pflop(model, width):
        ids = torch.zeros(len(views["clip"]["image"]), width, dtype=torch.long, device="meta")
        batch = views | {"clip": views["clip"] | {"ids": ids}}
        with alone(): return count(lambda: sum(model(batch).values()).backward()).total * few / 1e15

    print(f"\n## C5: PFLOP of one step at 16k/4k/2k\n\n| trunk | three forwards, 77 tokens | (cost model) | ours, {columns} tokens | ratio | target | met | ours, 77 tokens | ratio |\n|---|" + "---|" * 8)
    for name, target in TARGET.items():
        with torch.device("meta"): model = Overall(ViTTokenizerConfig(trunk=size(name)).build(), objectives).train()
        assert model.shares
        ours, ours77, peer = pflop(model, columns), pflop(model, 77), pflop(separate(model), 77)
        print(f"| {name} | {peer:.2f} | {PAPER[name]} | {ours:.2f} | {ours / peer:.3f} | {target} | {'yes' if ours / peer <= target else 'no'} | {ours77:.2f} | {ours77 / peer:.3f} |", flush=True)


SETTINGS = {"cpu recipe": at(VTP, "cpu")}
_trunk = size("S", patch=8, layer_scale=.2)
SETTINGS["ViT-S, 64 px"] = Pretrain(
    ViTTokenizerConfig(64, _trunk, replace(_trunk, depth=4, norm="layernorm"), 64), Shapes(count=100_000, size=64, hard=True),
    (Contrastive(batch=8, text=TextConfig(384, 4, 6, dim=384), crop=CropConfig(64)),
     SelfSupervised(batch=2, patch=8, crop=CropConfig(64, (.32, 1.), flip=.5), local=CropConfig(32, (.05, .32), flip=.5), locals=4,
                    prototypes=2048, head_hidden=1024, drop=0.),
     Reconstruction(batch=2, weight=1., crop=CropConfig(64), perceptual=PerceptualConfig(kind="random_features"))), steps=100, dtype="fp32")


def views_of(job, step=0, dtype=None):
    "The job's batch of a step, as the training loop makes it."
    batch = Batches(job.pairs, job.objectives, job.seed, job.steps)[step]
    return to_device({name: batch[name] for name in job.weights}, torch.device("cpu"), dtype or DTYPES[job.dtype])


def gradients_table():
    "The gradient of Eq. 2 in fp32: ours against the peer's, on the `cpu` recipe."
    job = SETTINGS["cpu recipe"]
    views, found = views_of(job), []
    for model, batch in ((job.build().train(), views), (separate(job.build().train()), full_context(views))):
        sum(job.weights[k] * loss for k, loss in model(batch).items()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, peer = found
    assert ours.keys() == peer.keys()
    worst = {name: float((ours[name] - g).norm() / g.norm()) for name, g in peer.items() if g.any()}
    whole = sum((ours[n] - g).square().sum() for n, g in peer.items()).sqrt() / sum(g.square().sum() for g in peer.values()).sqrt()
    name = max(worst, key=worst.get)
    print(f"\n## C5: gradients, fp32, `cpu` recipe\n\n| relative difference (L2) of | | target |\n|---|---|---|\n| the whole gradient | {float(whole):.1e} | 1e-5 |\n"
          f"| the worst parameter (`{name}`) | {worst[name]:.1e} | 1e-5 |", flush=True)


def milliseconds(fn, repeats):
    "Median wall time of `fn(i)`, after one call to warm up."
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        fn(i)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def times_of(job, repeats):
    "Where a step's time goes: {part: ms}."
    batches = Batches(job.pairs, job.objectives, job.seed, job.steps)
    model, views = job.build().train(), views_of(job)
    opt, tokenizer = adamw(model, job.optim), model.tokenizer

    def both(batch): sum(job.weights[k] * loss for k, loss in model(batch).items()).backward()

    times = {name: milliseconds(lambda _: term(tokenizer, views[name]).backward(), repeats) for name, term in model.objectives.items()}
    times["all, as trained"] = milliseconds(lambda _: both(views), repeats)
    grads = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]

    def optimise(step):
        for p, g in grads: p.grad = g
        guarded_step(opt, job.optim.clip, 1e-5)
        model.after_step((step + 1) / job.steps)

    times["optimiser, teacher"] = milliseconds(optimise, repeats)
    times["loader"] = milliseconds(lambda step: batches[step], repeats)
    model = separate(model)
    longest = full_context(views)
    times["all, three forwards"] = milliseconds(lambda _: both(longest), repeats)
    return times


def times_table():
    "Wall times of both settings."
    rows = {name: times_of(job, repeats) for (name, job), repeats in zip(SETTINGS.items(), (15, 3))}
    parts = list(next(iter(rows.values())))
    print(f"\n## Wall time of a step, ms: forward and backward of each objective alone, and of all; {torch.get_num_threads()} thread(s), fp32\n\n| setting | batch (clip/ssl/rec) | "
          + " | ".join(parts) + " | step, loader included |\n|---|---|" + "---|" * (len(parts) + 1))
    for name, times in rows.items():
        step = times["all, as trained"] + times["optimiser, teacher"] + times["loader"]
        sizes = "/".join(str(o.batch) for o in SETTINGS[name].objectives)
        print(f"| {name} | {sizes} | " + " | ".join(f"{times[part]:.0f}" for part in parts) + f" | {step:.0f} |", flush=True)


def high_water():
    "VmHWM of this process in MB."
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def train_and_measure(name):
    "Print VmHWM before the model is built and after three steps."
    imported, job = high_water(), SETTINGS[name]
    model = job.build().train()
    opt = adamw(model, job.optim)
    for step in range(3): train_step(model, views_of(job, step), opt, job, step)
    print(imported, high_water(), sum(p.numel() for p in model.parameters()) / 1e6)


def memory_table():
    "Peak memory of a training process, each measured in a fresh one."
    print("\n## Peak memory of the training process, MB (VmHWM)\n\n| setting | libraries loaded | training | difference | parameters with teacher, millions |\n|---|---|---|---|---|")
    for name in SETTINGS:
        answer = subprocess.run([sys.executable, __file__, "--memory-of", name], check=True, capture_output=True, text=True).stdout
        imported, peak, millions = map(float, answer.split())
        print(f"| {name} | {imported:.0f} | {peak:.0f} | {peak - imported:.0f} | {millions:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", help=f"shards whose captions set the length of text; without, {COLUMNS} tokens")
    parser.add_argument("--memory-of", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of: return train_and_measure(args.memory_of)
    columns = COLUMNS
    if args.captions:
        mean, length = text_columns(args.captions)
        columns = round(mean)
        print(f"captions: {length:.1f} tokens on average; cut at the longest of {RANK}, {mean:.1f} columns")
    flops_table(columns)
    gradients_table()
    times_table()
    memory_table()


if __name__ == "__main__":
    main()
