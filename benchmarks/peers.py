"""H4, H5: one training step of CLIP alone, and of self-supervision alone, beside other people's code for it; both sides compiled, alternated in one process.

    python benchmarks/peers.py clip --size L --batch 256                           # H4, on a GPU: ViT-L/16 at 256 pixels against open_clip
    DINOV3_REFERENCE=…/dinov3 python benchmarks/peers.py ssl --size L --batch 64   # H5, on a GPU: two crops of 256 and eight of 96 pixels against a checkout of facebookresearch/dinov3
    python benchmarks/peers.py ssl --size L --batch 64                             # the same against the 159 images/s per H100 that are published for DINOv3
    OMP_NUM_THREADS=1 python benchmarks/peers.py clip --size tiny --batch 8        # on a CPU, to show that it works; `ssl` likewise; --eager compiles nothing

clip. Peer: the installed open_clip, its own model (`CLIP`, the trunk's widths and depth as here, 12 × 768 for texts), its loss and its optimiser's settings, the step of its training script: autocast, loss, backward, AdamW, logit scale kept below ln 100.
Captions have --columns tokens at most, uniform in length; the peer reads 77 columns as it always does, ours the batch's longest. Same images, same ids, same batch.
ssl. Peer: SSLMetaArch with the published ViT-L configuration on these crops and masks, its own losses, 65,536 prototypes, drop path 0.3, blocks compiled as its training does; on one device, so autocast stands in for the mixed precision of its FSDP. Its dependencies: omegaconf, termcolor,
torchmetrics, submitit, scikit-learn (any version). Both see the same crops. FLOPs are counted by vtp.flops, forward and backward, recomputation and drop path left out of account; MFU is over --peak. An image of `ssl` is one image with all its crops. Prints Markdown.
"""
import argparse
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import torch

from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.data.shapes import Shapes
from vtp.flops import count
from vtp.job import Machine
from vtp.loop import DTYPES, prepare, to_device
from vtp.objectives.contrastive import Contrastive
from vtp.objectives.self_supervised import SelfSupervised
from vtp.optim import adamw
from vtp.pretrain import Pretrain, cost, freeze_unused, train_step
from vtp.text import TextConfig, cut, import_open_clip
from vtp.tokenizers.vit import MEAN, STD, ViTTokenizerConfig
from vtp.vit import ViTConfig, size

PUBLISHED = 159          # images/s on one H100, DINOv3's ViT-L
TINY = ViTConfig(width=64, depth=2, heads=2)


def trunk(args):
    return TINY if args.size == "tiny" else size(args.size)


def job_of(args, objective):
    decoder = replace(trunk(args), depth=1)                  # never run: no objective asks for it
    return Pretrain(ViTTokenizerConfig(args.image, trunk(args), decoder), Shapes(count=100_000, size=args.image), (objective,), steps=10_000, dtype=args.dtype)


class Ours:
    "The package's own step: forward, backward, AdamW, what follows it."
    def __init__(self, args, device, objective, views=lambda views: views):
        self.job = job_of(args, objective)
        batch = Batches(self.job.pairs, self.job.objectives, 0, 1)[0]
        self.batch = to_device({objective.name: views(batch[objective.name])}, device, DTYPES[args.dtype])
        self.model = freeze_unused(self.job.build(device), self.job).train()
        prepare(self.model, Machine(compile=not args.eager))
        self.opt = adamw(self.model, self.job.optim)

    def step(self): return train_step(self.model, self.batch, self.opt, self.job, 0)["loss"]


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()


# ---------------------------------------------------------------- CLIP

def ids_of(args, generator):
    "Ids (B, 77) of captions of 3 … columns tokens, start and end included, the longest among them."
    lengths = torch.randint(3, args.columns + 1, (args.batch,), generator=generator)
    lengths[0], ids = args.columns, torch.zeros(args.batch, 77, dtype=torch.long)
    for row, length in zip(ids, lengths.tolist()):
        row[:length] = torch.randint(1, 49406, (length,), generator=generator)
        row[0], row[length - 1] = 49406, 49407
    return ids


class OpenCLIP:
    "open_clip's model and the step of its training script."
    def __init__(self, args, device, images, ids):
        open_clip, vit, self.args, self.device = import_open_clip(), trunk(args), args, device
        text = text_of(args)
        self.plain = lambda: open_clip.CLIP(embed_dim=text.dim, vision_cfg=dict(image_size=args.image, layers=vit.depth, width=vit.width, head_width=vit.width // vit.heads, patch_size=16),
                                            text_cfg=dict(context_length=77, vocab_size=text.vocab, width=text.width, heads=text.heads, layers=text.depth), output_dict=False)
        self.own = self.plain().to(device).train()
        self.model = self.own if args.eager else torch.compile(self.own)
        self.loss, self.images, self.ids = open_clip.ClipLoss(), images, ids
        decayed = [p.ndim >= 2 and "bn" not in n and "ln" not in n and "bias" not in n and "logit_scale" not in n for n, p in self.own.named_parameters()]
        groups = [{"params": [p for p, d in zip(self.own.parameters(), decayed) if d == which], "weight_decay": .2 * which} for which in (True, False)]
        self.opt = torch.optim.AdamW(groups, lr=5e-4, betas=(.9, .98), eps=1e-6)

    def step(self):
        self.opt.zero_grad()
        with autocast(self.args, self.device): loss = self.loss(*self.model(self.images, self.ids)[:3])
        loss.backward()
        self.opt.step()
        with torch.no_grad(): self.own.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    def flops(self):
        with torch.device("meta"): model, images, ids = self.plain().train(), torch.empty(self.images.shape), torch.zeros(self.ids.shape, dtype=torch.long)
        return count(lambda: self.loss(*model(images, ids)[:3]).backward()).total


def text_of(args):
    return TextConfig(64, 2, 2, dim=64) if args.size == "tiny" else TextConfig()


def normalised(pixels, mean, std):
    return (pixels.float() / (255 if pixels.dtype == torch.uint8 else 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def clip(args, device):
    ids = ids_of(args, torch.Generator().manual_seed(0))
    seen = {}
    def views(view):
        seen["image"] = view["image"]
        return view | {"ids": cut(ids)}
    ours = Ours(args, device, Contrastive(batch=args.batch, text=text_of(args), crop=CropConfig(args.image)), views)
    open_clip = import_open_clip()
    images = normalised(seen["image"], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD).to(device, torch.float64 if args.dtype == "fp64" else torch.float32)
    peer = OpenCLIP(args, device, images, ids.to(device))
    with torch.device("meta"):
        tokenizer = ours.job.tokenizer.build().train()
        objective = ours.job.objectives[0].build(tokenizer).train()
    blank = {"image": torch.empty(args.batch, 3, args.image, args.image, device="meta"), "ids": torch.zeros(cut(ids).shape, dtype=torch.long, device="meta")}
    mine = count(lambda: objective(tokenizer, blank).backward()).total
    report(args, device, {"vtp": (ours, mine), f"open_clip {open_clip.__version__}": (peer, peer.flops())}, 1.3, f"{args.columns} columns of text against 77")


# ---------------------------------------------------------------- self-supervision

class DINOv3:
    "A checkout's SSLMetaArch on one device, and the step of its training."
    def __init__(self, args, device, view, config):
        sys.path.insert(0, os.environ["DINOV3_REFERENCE"])
        from omegaconf import OmegaConf
        from dinov3.models import vision_transformer
        self.args, self.device, name = args, device, {"S": "vit_small", "B": "vit_base", "L": "vit_large", "tiny": "vit_tiny"}[args.size]
        vision_transformer.vit_tiny = lambda patch_size=16, **options: vision_transformer.DinoVisionTransformer(patch_size=patch_size, embed_dim=TINY.width, depth=TINY.depth, num_heads=TINY.heads, **options)
        cfg = OmegaConf.load(os.path.join(os.environ["DINOV3_REFERENCE"], "dinov3/configs/ssl_default_config.yaml"))
        cfg.student.arch, cfg.crops.global_crops_size, cfg.crops.local_crops_size, cfg.crops.local_crops_number = name, config.crop.size, config.local.size, config.locals
        for head in (cfg.dino, cfg.ibot): head.head_n_prototypes, head.head_hidden_dim, head.head_bottleneck_dim = config.prototypes, config.head_hidden, config.head_bottleneck
        if device.type == "cpu": torch.Tensor.cuda = lambda self, *_, **__: self              # its step moves its batch to "cuda"
        if not torch.distributed.is_initialized(): torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        from dinov3.train.ssl_meta_arch import SSLMetaArch
        with torch.device("meta"): self.model = SSLMetaArch(cfg)
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.model.train()
        if not args.eager:
            for part in (self.model.student, self.model.teacher):
                for block in part["backbone"].blocks: block.compile()
                for head in ("dino_head", "ibot_head"): part[head].compile()
        masks, hidden = view["mask"], view["mask"].flatten().nonzero().flatten()
        crops = {f"collated_{side}_crops": normalised(view[f"{side}s"], MEAN, STD).to(device) for side in ("global", "local")}
        weight = (1 / masks.sum(1).clamp(min=1).float())[:, None].expand_as(masks)[masks]
        self.data = crops | dict(collated_masks=masks.to(device), mask_indices_list=hidden.to(device), masks_weight=weight.to(device), upperbound=len(hidden), n_masked_patches=torch.tensor([len(hidden)], device=device), global_batch_size=args.batch)
        self.parameters = [p for p in self.model.student.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=.04, betas=(.9, .999))

    def step(self):
        self.opt.zero_grad(set_to_none=True)
        with autocast(self.args, self.device): loss, _ = self.model.forward_backward(self.data, teacher_temp=.07, iteration=0)
        for part in self.model.student.values(): torch.nn.utils.clip_grad_norm_(part.parameters(), 3.)
        self.opt.step()
        self.model.update_ema(.994)
        return loss.detach()


def ssl(args, device):
    small = dict(prototypes=256, head_hidden=64, head_bottleneck=32, locals=2, local=CropConfig(32, (.05, .32), flip=.5)) if args.size == "tiny" else {}
    config, seen = SelfSupervised(batch=args.batch, crop=CropConfig(args.image, (.32, 1.), flip=.5), **small), {}
    ours = Ours(args, device, config, lambda view: seen.setdefault("view", view))
    sides = {"vtp": (ours, cost(ours.job).flops)}
    if "DINOV3_REFERENCE" in os.environ: sides["dinov3"] = DINOv3(args, device, seen["view"], config), None
    report(args, device, sides, 1.5, f"2 × {args.image} px + {config.locals} × {config.local.size} px, {config.prototypes} prototypes", None if len(sides) > 1 else PUBLISHED)


# ---------------------------------------------------------------- times

def report(args, device, sides, target, about, published=None):
    "Alternate the sides, two steps of warm-up each; print a row for each, and the ratio."
    def wait():
        if device.type == "cuda": torch.cuda.synchronize()
    times = {name: [] for name in sides}
    for i in range(args.repeats + 2):
        for name, (side, _) in sides.items():
            wait()
            start = time.perf_counter()
            loss = side.step()
            wait()
            times[name].append(time.perf_counter() - start)
            if not loss.isfinite(): raise ArithmeticError(f"the loss of {name} is not finite in step {i}: nothing is measured")
    seconds = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{args.what}: {hardware}, ViT-{args.size}/16 at {args.image} px, batch {args.batch}, {args.dtype}, {'eager' if args.eager else 'compiled'}; {about}\n")
    print("| step | images/s | ms | TFLOP | MFU |\n|---|---:|---:|---:|---:|")
    for name, (_, flops) in sides.items():
        used = f"{100 * flops / seconds[name] / args.peak:.1f} %" if flops and device.type == "cuda" else "–"
        print(f"| {name} | {args.batch / seconds[name]:.1f} | {1e3 * seconds[name]:.1f} | {f'{flops / 1e12:.3g}' if flops else '–'} | {used} |")
    mine, *others = seconds.values()
    if published: print(f"| published, one H100 | {published} | | | |")
    if others: print(f"\nratio {others[0] / mine:.2f}, target {target}")
    elif "H100" in hardware: print(f"\nratio {args.batch / mine / published:.2f} to the published number, target {target}")
    else: print("\nno ratio: the published number is of an H100, and this is none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clip", "ssl"))
    parser.add_argument("--size", choices=("tiny", "S", "B", "L"), default="L")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, help="side; 256, or 64 with --size tiny")
    parser.add_argument("--columns", type=int, default=32, help="tokens of the longest caption, start and end included")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", type=float, default=790e12, help="FLOP/s of a large bf16 product on this device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.image = arguments.image or (64 if arguments.size == "tiny" else 256)
    torch.set_float32_matmul_precision("high")
    {"clip": clip, "ssl": ssl}[arguments.what](arguments, torch.device(arguments.device))
