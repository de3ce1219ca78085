"""Noise that a tokenizer draws in training belongs to the global batch: RAE's decoder and VA-VAE are the same models on any number of ranks."""

import pytest
import torch
from tiny import PART, ranks, rec

from vtp.config import dumps, loads
from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.data.shapes import Shapes
from vtp.dist import rank, world, wrap
from vtp.finetune_decoder import Decoder, FinetuneDecoder, Players, average_of, finetune_step
from vtp.job import At
from vtp.loop import averages, seed_step, to_device
from vtp.noise import drawn
from vtp.objectives.adversarial import Adversarial, PatchGAN
from vtp.objectives.distillation import Distillation
from vtp.optim import OptimConfig, adamw
from vtp.perceptual import PerceptualConfig
from vtp.pretrain import Pretrain, freeze_unused, train_step
from vtp.tokenizers.frozen import FrozenConfig, RAEDecoderConfig, Untrained
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.representation import OwnTrunk
from vtp.tokenizers.vit import ViTTokenizerConfig

DATA = Shapes(count=64, size=16)
TRUNK = OwnTrunk(At(Untrained(ViTTokenizerConfig(16, PART, PART, latent=8))))
OPTIM = OptimConfig(2e-3, warmup_steps=0)
VAVAE = Pretrain(CNNConfig(image_size=16, latent=6, width=8, multipliers=(1, 2, 2), blocks=1, attention=(4,), groups=4), DATA,
                 (Distillation(batch=8, crop=CropConfig(16), perceptual=PerceptualConfig(kind="random_features"), representation=TRUNK),), 4, OPTIM, dtype="fp64")
RAE = FinetuneDecoder(At(Untrained(FrozenConfig(TRUNK, RAEDecoderConfig(width=16, depth=2, heads=2, hidden=32, patch=4)))), DATA, rec(mse=0.0),
                      steps=4, adversarial=Adversarial(discriminator=PatchGAN(width=8, layers=1), start_discriminator=0.0, start_generator=0.25), optim=OPTIM, optim_discriminator=OPTIM, dtype="fp64")


def vavae(text, steps=3):
    "Steps of VA-VAE on this group: numbers (means over ranks), and the model's state."
    config = loads(text)
    batches = Batches(config.pairs, config.objectives, config.seed, config.steps, rank(), world())
    model = freeze_unused(config.build(), config).train()
    wrapped, opt, rows = wrap(model), adamw(model, config.optim), []
    for number in range(steps):
        seed_step(config.seed, number)
        batch = {name: batches[number][name] for name in config.weights}
        rows.append(averages(train_step(wrapped, to_device(batch, torch.device("cpu"), torch.float64), opt, config, number)))
    return rows, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rae(text, steps=3):
    "Steps of RAE's decoder and its discriminator."
    config = loads(text)
    batches = Batches(config.pairs, (config.rec,), config.seed, config.steps, rank(), world())
    tokenizer = config.of.job.build().tokenizer.double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminator = config.adversarial.build().double()
    decoder = Decoder(tokenizer)
    average, opts, rows = average_of(decoder), {"optim": adamw(decoder, config.optim), "optim_discriminator": adamw(discriminator, config.optim_discriminator)}, []
    players = Players(wrap(decoder), wrap(discriminator), config.rec.build(tokenizer).double())
    for number in range(steps):
        seed_step(config.seed, number)
        rows.append(averages(finetune_step(players, average, opts, to_device({"rec": batches[number]["rec"]}, torch.device("cpu"), torch.float64), config, number)))
    return rows, {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


TRAININGS = {"vavae": (vavae, dumps(VAVAE)), "rae": (rae, dumps(RAE))}


def trainings(names): return {name: TRAININGS[name][0](TRAININGS[name][1]) for name in names}


@pytest.fixture(scope="module")
def one(): return trainings(TRAININGS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("procs", [2, 4])
def test_any_number_of_ranks_trains_the_same_model(procs, one):
    for name, (rows, state) in ranks(trainings, list(TRAININGS), nproc=procs, jobs=[VAVAE]).items():
        for ours, theirs in zip(one[name][0], rows, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-10, abs=1e-12), name
        for key, tensor in one[name][1].items():
            assert torch.allclose(state[key].double(), tensor.double(), rtol=1e-8, atol=1e-10), (name, key)


@pytest.mark.parametrize("name", TRAININGS)
def test_the_noise_is_there(name, one, monkeypatch):
    "Other steps draw other numbers, and without noise it is another model."
    import vtp.objectives.distillation
    import vtp.tokenizers.frozen

    for room in (vtp.objectives.distillation, vtp.tokenizers.frozen):
        monkeypatch.setattr(room, "drawn", lambda draw, shape, like, *_: torch.zeros(shape, dtype=like.dtype))
    rows, _ = TRAININGS[name][0](TRAININGS[name][1], steps=1)
    assert rows[0]["loss"] != pytest.approx(one[name][0][0]["loss"], rel=1e-4)


def test_rank_by_rank(monkeypatch):
    "Each rank draws only its own rows of the global batch's noise."
    import vtp.noise

    like, calls = torch.zeros(()), []
    whole = drawn(torch.randn, (8, 5), like, "x", 3)
    for procs in (2, 4, 8):
        for number in range(procs):
            monkeypatch.setattr(vtp.noise, "rank", lambda: number)
            monkeypatch.setattr(vtp.noise, "world", lambda: procs)
            found = drawn(lambda *args, **kwargs: calls.append(args) or torch.randn(*args, **kwargs), (8 // procs, 5), like, "x", 3)
            assert torch.equal(found, whole[number * 8 // procs:(number + 1) * 8 // procs])
    assert len(calls) == 3 * 8
