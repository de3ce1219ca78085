"""The second stage: the encoder stays as it is to the bit, the decoder improves, both players resume, stop and start together."""
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import HERE, TOKENIZER, job, rec

import vtp.finetune_decoder as package
from vtp.checkpoint import write_checkpoint
from vtp.config import dumps, loads
from vtp.data.augment import CropConfig
from vtp.data.shapes import Shapes
from vtp.finetune_decoder import FinetuneDecoder, cost
from vtp.job import At, inputs, launch, run_of
from vtp.objectives.adversarial import DINO, Adversarial, DiffAugment, FeatureGAN, PatchGAN, Trunk, draws
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig

GROUPS = ("decoder", "ema", "discriminator", "optim", "optim_discriminator")
TUNE = OptimConfig(2e-3, (0.5, 0.9), 1e-8, 0.0, 2, 0.1, None)


def first(**changes):
    return job((rec(mse=0.0),), **{**dict(steps=6, log_every=3), **changes})


def gan(discriminator=PatchGAN(8, 1), **changes):
    return Adversarial(**{**dict(discriminator=discriminator, start_discriminator=0.2, start_generator=0.4, ramp=0.2, augment=DiffAugment(cutout=0.2)), **changes})


def stage2(of=None, **changes):
    base = dict(of=At(of or first()), pairs=Shapes(count=400, size=16), rec=rec(mse=0.0), steps=10, adversarial=gan(), optim=TUNE, optim_discriminator=TUNE,
                ema=0.8, dtype="fp32", log_every=2)
    return FinetuneDecoder(**{**base, **changes})


def with_trunk(**changes):
    return gan(FeatureGAN(Trunk(At(first()), 2), kernel=3), **changes)


def everything(run):
    last = run.at()
    return {name: last.tensors(name) for name in GROUPS}, (run.path / "metrics.jsonl").read_bytes(), last.state


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watch(patch, see, before=lambda batch, step: None):
    "Call `before(batch, step)` and `see(players, average, step)` around every step."
    step = package.finetune_step

    def watched(players, average, opts, batch, config, number):
        before(batch, number)
        numbers = step(players, average, opts, batch, config, number)
        see(players, average, number)
        return numbers

    patch.setattr(package, "finetune_step", watched)


def test_the_encoder_is_the_same_to_the_bit(monkeypatch):
    small, hashes = stage2(), []
    watch(monkeypatch, lambda players, average, step: hashes.append((players.decoder.tokenizer.encoder_hash(), average.tokenizer.encoder_hash())))
    launch(small, machine=HERE)
    before, after = small.of.load(), small.load()
    image = torch.rand(5, 3, 16, 16)
    assert set(hashes) == {(before.tokenizer.encoder_hash(),) * 2} and before.tokenizer.encoder_hash() == after.tokenizer.encoder_hash()
    assert torch.equal(before.tokenizer.encode(image), after.tokenizer.encode(image))
    assert not torch.equal(before.tokenizer(image), after.tokenizer(image))
    assert type(after) is type(before) and after.objectives.keys() == {"rec"} and not after.training
    ema = run_of(small).at().tensors("ema")
    assert equal({k: v for k, v in after.tokenizer.state_dict().items() if k in ema}, ema)
    assert all(p.requires_grad == q.requires_grad for p, q in zip(before.parameters(), after.parameters()))


@pytest.mark.timeout(120)
def test_the_decoder_improves_on_images_it_has_not_seen():
    of = first(steps=80, pairs=Shapes(count=400, size=16), log_every=40)
    small = stage2(of, steps=120, ema=0.9, log_every=40, adversarial=gan(weight=0.25, augment=DiffAugment(colour=0.0)))
    launch(small, machine=HERE)
    pairs = Shapes(count=128, size=16, split="val").open().read(range(128), range(128))
    image = torch.stack([torch.from_numpy(p.image) for p in pairs]).permute(0, 3, 1, 2) / 255
    loss = small.rec.build(of.build().tokenizer)
    with torch.inference_mode():
        before, after = (loss.terms(model.tokenizer(image), image) for model in (of.load(), small.load()))
    print({k: (float(before[k]), float(after[k])) for k in before})
    assert after["perceptual"] < 0.95 * before["perceptual"] and after["l1"] < before["l1"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("adversarial", [gan, with_trunk], ids=["PatchGAN", "FeatureGAN"])
@pytest.mark.parametrize("stops,workers", [((3,), (0, 0)), ((1, 6), (0, 1, 2))], ids=["once", "twice, other workers"])
def test_resume_is_bitwise(tmp_path, monkeypatch, adversarial, stops, workers):
    small = stage2(adversarial=adversarial())
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight = everything(launch(small, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "stopped"))
    launch(small.of.job, machine=HERE)
    left = set(stops)

    def stop(batch, step):
        if step in left:
            left.remove(step)
            signal.raise_signal(signal.SIGTERM)

    watch(monkeypatch, lambda *_: None, stop)
    for count, number in enumerate(stops):
        with pytest.raises(InterruptedError, match="launch again"):
            launch(small, machine=replace(HERE, workers=workers[count]))
        assert run_of(small).at().step == number + 1
    resumed = everything(launch(small, machine=replace(HERE, workers=workers[-1]))[0])
    for name in GROUPS:
        assert equal(straight[0][name], resumed[0][name]), name
        assert straight[0][name], name
    assert straight[1:] == resumed[1:]
    buffers = [k for k in straight[0]["discriminator"] if k.endswith(("._u", "._v", "refused"))]
    assert len(buffers) == (1 if adversarial is gan else 1 + 2 * 3 * 2)          # u and v of three convolutions of two heads


def test_a_nan_calls_both_players_off(monkeypatch):
    small, states = stage2(adversarial=gan(start_discriminator=0.0, start_generator=0.0)), {}

    def spoil(batch, step):
        if step == 5:
            batch["rec"]["image"][2, 1, 3, 3] = torch.nan

    def note(players, average, step):
        states[step] = [{k: v.clone() for k, v in module.state_dict().items()} for module in (players.decoder, average, players.discriminator)]

    watch(monkeypatch, note, spoil)
    run, = launch(small, machine=HERE)
    for before, after, later in zip(states[4], states[5], states[6]):
        before.pop("refused", None), after.pop("refused", None)
        assert equal(before, after) and not all(torch.equal(before[k], later[k]) for k in before)
    called_off, = run.rows("quarantine")
    assert called_off["step"] == 6 and len(called_off["keys"]) == small.batch and "not finite" in called_off["reason"]
    assert run.rows()[-1]["skipped"] == 1 and run.rows()[-1]["refused"] == 1


def test_nothing_but_nan_stops_the_run(monkeypatch):
    small = stage2(skips=3, log_every=1)
    watch(monkeypatch, lambda *_: None, lambda batch, step: batch["rec"]["image"].fill_(torch.nan))
    with pytest.raises(RuntimeError, match="3 steps in a row had no finite gradient"):
        launch(small, machine=HERE)
    assert not run_of(small).checkpoints()


def test_an_adversarial_gradient_that_is_not_finite_counts_and_has_no_weight(monkeypatch):
    "The decoder then trains as if it had not been told: as in a run whose adversarial term starts later."
    broken, later = (stage2(adversarial=gan(start_discriminator=0.0, start_generator=start), keep=(8,)) for start in (0.0, 0.9))
    with monkeypatch.context() as patched:
        patched.setattr("vtp.objectives.adversarial.AdversarialLoss.generator", lambda self, fake, u: fake.mean() * torch.inf)
        run, = launch(broken, machine=HERE)
    assert [row["refused"] for row in run.rows()] == [2, 4, 6, 8, 10] and run.rows()[-1]["skipped"] == 0 and run.rows()[-1]["adaptive"] == 0
    assert all(row["loss"] == row["loss"] for row in run.rows())
    other, = launch(later, machine=HERE)
    assert equal(run.at(8).tensors("decoder"), other.at(8).tensors("decoder"))


def test_the_discriminator_learns_first():
    keep = tuple(range(1, 11))
    one, other = (stage2(keep=keep, log_every=1, adversarial=gan(weight=weight)) for weight in (0.5, 0.9))
    runs = launch(one, other, machine=HERE)
    nets = [runs[0].at(step).tensors("discriminator") for step in keep]
    moved = [not equal(a, b) for a, b in zip(nets, nets[1:])]                       # in steps 1 … 9
    assert one.adversarial.starts(10) == (2, 4) and moved == [False] + [True] * 8
    same = [equal(*(run.at(step).tensors("decoder") for run in runs)) for step in keep]
    assert same == [True] * 4 + [False] * 6                                          # w matters from step 4 (the fifth) on
    rows = runs[0].rows()
    assert ["discriminator" in row for row in rows] == [False] * 2 + [True] * 8
    assert ["adaptive" in row for row in rows] == [False] * 4 + [True] * 6
    for row in rows[4:]:
        assert {"l1", "perceptual", "generator", "logits_real", "logits_fake", "accuracy", "saturated", "lr", "grad_norm", "grad_norm_discriminator"} <= row.keys()
        assert 0 <= row["saturated"] <= 1 and row["adaptive"] > 0
    assert [one.adversarial.weight_at(s, 10) for s in range(3, 7)] == [0, 0.25, 0.5, 0.5]


def test_the_discriminators_schedule_begins_with_it(monkeypatch):
    seen, step = {}, package.guarded_step

    def noted(opt, clip, lr):
        seen.setdefault(id(opt), []).append(lr)
        return step(opt, clip, lr)

    monkeypatch.setattr(package, "guarded_step", noted)
    launch(stage2(), machine=HERE)
    decoder, discriminator = seen.values()                                           # in the order of their first steps
    law = lambda steps: [1e-3, 2e-3, *(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / (steps - 3))) / 2) for k in range(steps - 2))]
    assert decoder == pytest.approx(law(10)) and discriminator == pytest.approx(law(8))


def change(job, part):
    "Add to a weight of the tokenizer on disk, as another training would have."
    run = run_of(job)
    last = run.at()
    tensors = {group: last.tensors(group) for group in ("model", "optim")}
    name = next(n for n in tensors["model"] if n.startswith(f"tokenizer.{part}") and n.endswith("weight"))
    tensors["model"][name] += 0.1
    write_checkpoint(run.path / "checkpoints", last.step, tensors, last.state)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_decoder_of_another_encoder_is_refused(monkeypatch, dtype):
    small, refusal = stage2(keep=(4,), dtype=dtype), "tuned the decoder of encoder [0-9a-f]{10}, but here is [0-9a-f]{10}: .* remove .* launch again"
    run, = launch(small, machine=HERE)
    change(small.of.job, "decoder")
    small.load(), small.load(4)                                                      # it has a decoder of its own
    change(small.of.job, "encoder")
    assert launch(small, machine=HERE)[0].done
    for step in (None, 4):
        with pytest.raises(ValueError, match=refusal):
            At(small, step).load()
    (run.path / "done").unlink()
    with pytest.raises(ValueError, match=refusal):                                   # nor does it train on with the other half
        launch(small, machine=HERE)


def test_the_average_follows():
    small = stage2(keep=tuple(range(1, 11)))
    run, = launch(small, machine=HERE)
    start = small.of.load().tokenizer.state_dict()
    mean = {k: start[k].double() for k in run.at(1).tensors("ema")}
    for step in small.keep:
        now, kept = run.at(step).tensors("decoder"), run.at(step).tensors("ema")
        mean = {k: small.ema * mean[k] + (1 - small.ema) * now[k].double() for k in mean}
        assert all(torch.allclose(kept[k].double(), mean[k], rtol=1e-5, atol=1e-6) for k in mean), step
    assert not equal(kept, now)
    assert torch.equal(small.load(3).tokenizer.state_dict()["decoder.proj_out.weight"], run.at(3).tensors("ema")["decoder.proj_out.weight"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("adversarial", [gan, with_trunk], ids=["PatchGAN", "FeatureGAN"])
def test_two_ranks_train_the_same(tmp_path, monkeypatch, adversarial):
    small = stage2(steps=4, dtype="fp64", log_every=1, adversarial=adversarial(start_discriminator=0.0, start_generator=0.2, augment=DiffAugment(0.7, cutout=0.2)))
    runs = []
    for name, procs in (("one", 1), ("two", 2)):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / name))
        launch(*inputs(small), machine=HERE)
        runs += launch(small, machine=replace(HERE, procs=procs))
    for a, b in zip(runs[0].rows(), runs[1].rows()):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-8, abs=1e-10), (a["step"], key)
    assert runs[0].rows()[-1]["adaptive"] > 0
    for name in GROUPS[:3]:
        a, b = (run.at().tensors(name) for run in runs)
        worst = max((a[k] - b[k]).abs().max().item() for k in a)
        assert worst < 1e-8, (name, worst)


def test_activation_checkpoints_change_nothing(tmp_path, monkeypatch):
    rows = []
    for checkpointing in (False, True):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / str(checkpointing)))
        rows.append(launch(stage2(dtype="fp64", log_every=10), machine=replace(HERE, checkpointing=checkpointing))[0].rows()[-1])
    assert rows[1] == {k: pytest.approx(v, rel=1e-7) for k, v in rows[0].items()}


def test_an_evaluation_takes_it_for_a_model():
    from vtp.evaluation.protocol import Evaluate
    from vtp.evaluation.reconstruction import ReconstructionQuality

    quality = ReconstructionQuality(data=Shapes(count=32, size=16, split="val"), batch=16, perceptual=PerceptualConfig(kind="random_features"))
    before, after = launch(Evaluate(At(first()), (quality,)), Evaluate(At(stage2()), (quality,)), machine=HERE)
    assert [r["metric"] for r in before.rows()] == [r["metric"] for r in after.rows()] and before.rows() != after.rows()
    assert all(row["decoder_samples"] == 80 for row in after.rows())


def test_bf16_trains():
    run, = launch(stage2(dtype="bf16"), machine=HERE)
    wide, = launch(stage2(), machine=HERE)
    assert [r["l1"] for r in run.rows()] == pytest.approx([r["l1"] for r in wide.rows()], rel=0.1)
    assert run.rows()[-1]["skipped"] == 0


def test_what_it_costs():
    small = stage2()
    per_step, before = cost(small), small.of.spent()
    assert min(per_step.rec, per_step.discriminator, per_step.generator) > 0
    assert small.spent() == {**before, "decoder_samples": 80, "flops": before["flops"] + 10 * per_step.rec + 8 * per_step.discriminator + 6 * per_step.generator}
    assert small.spent(3) == {**before, "decoder_samples": 24, "flops": before["flops"] + 3 * per_step.rec + per_step.discriminator}
    assert cost(replace(small, rec=rec(mse=0.0, batch=16))).rec == 2 * per_step.rec
    run, = launch(small, machine=HERE)
    assert all(row[k] == v for row in run.rows() for k, v in small.spent(row["step"]).items())


def test_the_config_comes_back():
    for small in (stage2(), stage2(adversarial=with_trunk())):
        assert loads(dumps(small)) == small
    assert stage2().label() == "rec-32x2-d8-patchgan" and stage2().kind == "finetune"
    assert inputs(stage2()) == (first(),) and set(inputs(stage2(adversarial=with_trunk()))) == {first()}


def refuses(make, message, error=ValueError):
    with pytest.raises(error, match=message):
        launch(make(), machine=HERE)


def test_what_is_refused_before_training(tmp_path, monkeypatch):
    refuses(lambda: stage2(rec=rec(mse=0.0, crop=CropConfig(32))), "crop.size=32 must be the tokenizer's image_size, 16")
    refuses(lambda: stage2(adversarial=gan(PatchGAN())), r"PatchGAN\(layers=3\) needs images of at least 24 pixels, not 16: use fewer layers")
    refuses(lambda: stage2(of=first(), rec=rec(drop=0.1)), "rec.drop=0.1")
    refuses(lambda: stage2(steps=2, adversarial=gan(start_generator=0.9)), "would start in step 2 of 2")
    refuses(lambda: replace(stage2(), of=At(first(), 4)), "step 4 is not kept")
    refuses(lambda: stage2(rec=rec(mse=0.0, perceptual=PerceptualConfig(weights=str(tmp_path / "vgg16.pth")))), "vgg16", FileNotFoundError)
    refuses(lambda: stage2(adversarial=gan(FeatureGAN(Trunk(At(first()), 3)))), "taps=3 of a trunk with 2 blocks")
    refuses(lambda: stage2(adversarial=gan(FeatureGAN(DINO(weights=str(tmp_path / "dino.pth"))))), "curl -LO .*dino_deitsmall8_pretrain.pth", FileNotFoundError)
    assert not run_of(stage2()).path.exists() and not run_of(first()).path.exists()


def test_other_weights_than_the_network_are_refused(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "other.pth")
    refuses(lambda: stage2(adversarial=gan(FeatureGAN(DINO(weights=str(tmp_path / "other.pth"))))), "are not the weights of vit_small_patch8_224.dino")


@pytest.mark.parametrize("quantised", (False, True))
def test_the_discriminator_sees_clean_reconstructions_as_a_file_holds_them(quantised):
    "A decoder that is trained on perturbed latents is judged by what it makes of the latents themselves (RAE), in 256 levels if asked."
    torch.manual_seed(0)
    job = stage2(rec=rec(batch=4), adversarial=gan(augment=None, quantised=quantised))
    tokenizer = TOKENIZER.build()
    tokenizer.perturb = lambda z, seed=None: z + 1.
    players = package.Players(package.Decoder(tokenizer), job.adversarial.build(), job.rec.build(tokenizer))
    shown, judge = [], players.discriminator.forward
    players.discriminator.forward = lambda real, fake, *u: shown.append(fake) or judge(real, fake, *u)
    image = torch.rand(4, 3, 16, 16)
    with torch.no_grad(): clean = tokenizer(image)
    package.play(players, image, lambda use: draws(0, np.arange(4), use), job, 0., True)
    expected = (clean.clamp(0, 1) * 255).round() / 255 if quantised else clean
    assert torch.allclose(shown[0], expected, atol=1e-6) and not torch.allclose(clean, tokenizer.decode(tokenizer.encode(image) + 1.), atol=1e-2)
