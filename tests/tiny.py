"""The smallest real job with all three objectives: what the tests of the engine train, and ranks that start at once."""
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from unittest import mock

import vtp.pretrain as package
import vtp.ranks
from vtp.checkpoint import restate
from vtp.config import digest
from vtp.data.augment import CropConfig
from vtp.data.samples import mix
from vtp.data.shapes import Shapes
from vtp.dist import rank, sum_ranks, world, wrap
from vtp.data.batch_sampling import Batches
from vtp.job import Machine, run_of
from vtp.objectives.contrastive import Contrastive
from vtp.objectives.reconstruction import Reconstruction
from vtp.objectives.self_supervised import SelfSupervised
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig
from vtp.loop import DTYPES, to_device
from vtp.pretrain import Pretrain, freeze_unused
from vtp.text import TextConfig
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig

HERE = Machine(workers=0, device="cpu")
PART = ViTConfig(width=32, depth=2, heads=2, patch=4, layer_scale=0.2)
TOKENIZER = ViTTokenizerConfig(16, PART, PART, latent=8)


def clip(**changes):
    return Contrastive(**{**dict(batch=16, text=TextConfig(32, 1, 2, dim=32), crop=CropConfig(16)), **changes})


def ssl(**changes):
    base = dict(batch=8, patch=4, crop=CropConfig(16, (0.32, 1.0), flip=0.5), local=CropConfig(8, (0.05, 0.32), flip=0.5), locals=2,
                prototypes=32, head_hidden=32, head_bottleneck=16, drop=0.1)
    return SelfSupervised(**{**base, **changes})


def rec(**changes):
    base = dict(batch=8, weight=1.0, mse=2.0, crop=CropConfig(16), perceptual=PerceptualConfig(kind="random_features"))
    return Reconstruction(**{**base, **changes})


def job(objectives=None, **changes):
    base = dict(tokenizer=TOKENIZER, pairs=Shapes(count=64, size=16), objectives=objectives or (clip(), ssl(), rec()), steps=12,
                optim=OptimConfig(2e-3, warmup_steps=4), dtype="fp32", log_every=5)
    return Pretrain(**{**base, **changes})


def one_step(text, step=0):
    "In every rank: losses (means over ranks), gradients (averaged by DDP) and masked patches of this rank, of the first step of a job."
    from vtp.config import loads

    config = loads(text)
    where = DTYPES[config.dtype]
    batch = Batches(config.pairs, config.objectives, config.seed, config.steps, rank(), world())[step]
    model = freeze_unused(config.build(), config).train()
    views = to_device({name: batch[name] for name in config.weights}, "cpu", where)
    wrapped = wrap(model)
    losses = wrapped(views, int(mix(config.seed, 0)))
    sum(config.weights[name] * loss for name, loss in losses.items()).backward()
    masked = int(views["ssl"]["masked_weight"].gt(0).sum()) if "ssl" in views else 0
    return ({name: float(sum_ranks(loss) / world()) for name, loss in losses.items()},
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, masked)


IMPORTED = ["vtp.worker", "vtp.pretrain", "vtp.finetune_decoder", "vtp.generation.train", "vtp.evaluation.zero_shot", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.tensorboard"]


def _there(env, costs, fn, args):
    os.environ.update(env)
    count = package.cost
    package.cost = lambda job: costs[digest(job)] if digest(job) in costs else count(job)
    return fn(*args)


def ranks(fn, *args, jobs=(), **options):
    """`vtp.ranks.start`, whose processes are forked from one that has imported the package: importing is most of what starting ranks takes.

    `jobs`: what these cost is counted here, once, and not in every rank."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    if options.get("nproc", 1) == 1 and not options.get("restarts"):
        return fn(*args)
    with mock.patch.object(vtp.ranks, "LaunchConfig", partial(vtp.ranks.LaunchConfig, start_method="forkserver")):
        return vtp.ranks.start(_there, dict(os.environ), {digest(job): package.cost(job) for job in jobs}, fn, args, **options)


def stop_at(patch, *steps, order=None):
    "Make training raise SIGTERM in the middle of these steps, each once; `order` notes the pixels of every step."
    left, step = set(steps), package.train_step

    def interrupted(model, batch, opt, config, number):
        if order is not None:
            order.append((number, float(batch["rec"]["image"].double().sum())))
        if number in left:
            left.remove(number)
            signal.raise_signal(signal.SIGTERM)
        return step(model, batch, opt, config, number)

    patch.setattr(package, "train_step", interrupted)


def swapped(job, other):
    "The weights of another run in the place of a job's own, as if it had been trained again with another result."
    mine = run_of(job)
    shutil.rmtree(mine.path / "checkpoints")
    shutil.copytree(run_of(other).path / "checkpoints", mine.path / "checkpoints")
    for checkpoint in mine.checkpoints():
        restate(checkpoint.path, checkpoint.state | {"job": mine.digest}, checkpoint.manifest)


def wait_for(condition, seconds=120):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")
