"""The CNN autoencoder of Table 1 and VA-VAE's loss in the engine: they train, resume to the bit, are tuned and cached, and two ranks train as one."""
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import HERE, TOKENIZER, clip, job, one_step, rec, stop_at, swapped

from vtp.config import dumps, loads
from vtp.data.augment import CropConfig
from vtp.data.shapes import Shapes
from vtp.ranks import start
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.latents import CacheLatents, open_latents
from vtp.hub import from_pretrained, save_pretrained
from vtp.job import At, inputs, launch, load, run_of
from vtp.loop import seed_step
from vtp.objectives.adversarial import Adversarial, PatchGAN
from vtp.objectives.distillation import Distillation, last_layer
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig
from vtp.pretrain import cost
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.representation import OwnTrunk

CNN = CNNConfig(image_size=16, latent=8, width=8, multipliers=(1, 2, 2), blocks=1, attention=(4,), groups=4)     # 4×4 latents, as tiny's ViT
TRUNK = job((clip(),), steps=2)


def distil(of=TRUNK, **changes):
    base = dict(batch=8, mse=2.0, crop=CropConfig(16), perceptual=PerceptualConfig(kind="random_features"), representation=OwnTrunk(At(of)), vf_weight=0.5)
    return Distillation(**{**base, **changes})


def cnn_job(objectives=None, **changes):
    return job(objectives or (rec(),), **{**dict(tokenizer=CNN, steps=6, log_every=3), **changes})


def left(run):
    last = run.at()
    return {group: last.tensors(group) for group in ("model", "optim")}, (run.path / "metrics.jsonl").read_bytes()


def same(a, b):
    assert a[1] == b[1]
    for group in a[0]:
        assert a[0][group].keys() == b[0][group].keys() and all(torch.equal(a[0][group][k], b[0][group][k]) for k in a[0][group]), group


@pytest.mark.timeout(180)
@pytest.mark.parametrize("objective", ["rec", "vavae"])
def test_training_resumes_to_the_bit(objective, tmp_path, monkeypatch):
    launch(TRUNK, machine=HERE)
    small = cnn_job((rec() if objective == "rec" else distil(),))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(InterruptedError):
            launch(small, machine=HERE)
        assert run_of(small).at().step == 3
        resumed = left(launch(small, machine=HERE)[0])
    for path in sorted(run_of(small).path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run_of(small).path.rmdir()
    same(left(launch(small, machine=HERE)[0]), resumed)
    row = run_of(small).rows()[-1]
    watched = {"rec_l1", "rec_perceptual", "rec_latent_std"} | ({"rec_vf", "rec_mcos", "rec_mdms", "rec_kl", "rec_adaptive"} if objective == "vavae" else set())
    assert watched <= row.keys() and row["rec_samples"] == 6 * 8 and all(row[k] >= 0 for k in watched)


@pytest.mark.timeout(120)
def test_the_loss_falls_and_the_latent_comes_to_resemble_the_representation():
    def rows(weight):
        small = cnn_job((distil(vf_weight=weight, cos_margin=0.0, distmat_margin=0.0),), steps=50, log_every=5, optim=OptimConfig(3e-3, warmup_steps=4))
        return launch(small, machine=HERE)[0].rows()

    pulled, loose = rows(2.0), rows(1e-4)
    for term in ("rec_mcos", "rec_mdms"):
        late = [sum(row[term] for row in found[-3:]) / 3 for found in (pulled, loose)]
        assert late[0] < 0.96 * late[1] and late[0] < 0.96 * pulled[0][term], (term, late, pulled[0][term])
    assert loose[-1]["rec_l1"] < 0.8 * loose[0]["rec_l1"]


@pytest.mark.timeout(120)
def test_tuned_cached_and_read_back():
    first = cnn_job(steps=3)
    tune = OptimConfig(2e-3, (0.5, 0.9), 1e-8, 0.0, 2, 0.1, None)
    tuned = FinetuneDecoder(of=At(first), pairs=Shapes(count=64, size=16), rec=rec(mse=0.0), steps=4, adversarial=Adversarial(PatchGAN(8, 1), start_generator=0.2, ramp=0.2),
                            optim=tune, optim_discriminator=tune, ema=0.5, dtype="fp32", log_every=2)
    cached = CacheLatents(of=At(tuned), data=Shapes(count=10, size=16), batch=5, shard=10, dtype="fp32", flips=False)
    launch(cached, machine=HERE)
    before, after = load(first).tokenizer, load(tuned).tokenizer
    changed = {name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert {"post_quant_conv.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"} <= changed and before.encoder_hash() == after.encoder_hash()
    reader = open_latents(cached)
    assert reader.latents([0, 9], [False, False])[0].shape == (2, 8, 4, 4) and reader.encoder == before.encoder_hash() and loads(dumps(tuned)) == tuned


def test_the_adaptive_weight_of_the_second_stage_looks_at_conv_out():
    from vtp.finetune_decoder import Decoder
    tokenizer = CNN.build()
    decoder = Decoder(tokenizer)
    assert decoder.last_layer() is tokenizer.decoder.conv_out.weight
    assert {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.requires_grad} == {"post_quant_conv", "decoder"}


def test_the_trunk_is_an_input_and_its_weights_are_needed_only_to_train():
    small = cnn_job((distil(),))
    assert inputs(small) == (TRUNK,)
    model = small.build()                                            # TRUNK has not been run
    assert [name for name in model.objectives.state_dict()] == ["rec.origin", "rec.proj.weight"] and not model.objectives["rec"].origin.any()
    counted, plain = cost(small), cost(cnn_job())
    assert "objectives.rec.proj.weight" in counted.trained and plain.trained == counted.trained - {"objectives.rec.proj.weight"}
    assert counted.flops > 1.2 * plain.flops                         # the trunk, the pairs of positions, and the two gradients at the last layer
    with pytest.raises(FileNotFoundError):
        model.objectives["rec"](model.tokenizer, {"image": torch.rand(2, 3, 16, 16)})


@pytest.mark.timeout(120)
def test_reading_the_representation_moves_no_random_number_and_the_frozen_network_stays():
    launch(TRUNK, machine=HERE)
    model, batch = cnn_job((distil(),)).build().train(), {"image": torch.rand(2, 3, 16, 16)}
    losses = []
    for _ in range(2):                                               # it is read in the first
        seed_step(0, 5)
        losses.append(model.objectives["rec"](model.tokenizer, batch))
    assert losses[0] == losses[1]
    losses[0].backward()
    network = model.objectives["rec"].frozen[0]
    assert all(p.grad is None for p in network.parameters()) and not network.training
    model.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in network.parameters())
    model.objectives["rec"](model.tokenizer, {"image": batch["image"].double()})


@pytest.mark.timeout(120)
def test_bf16_is_near_fp32_and_its_losses_are_wide():
    launch(TRUNK, machine=HERE)
    model, image = cnn_job((distil(),)).build().eval(), torch.rand(4, 3, 16, 16)
    rec_loss, values = model.objectives["rec"], []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = rec_loss(model.tokenizer, {"image": image})
        assert loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in rec_loss.monitor.values())
        values.append(torch.stack([loss, rec_loss.monitor["mcos"], rec_loss.monitor["mdms"], rec_loss.monitor["kl"]]).detach())
    assert torch.allclose(values[0], values[1], rtol=3e-2, atol=2e-3) and not torch.equal(*values)


def quiet_steps(texts):
    "`one_step` of each with all noise 0: samples differ between ranks, as they must, and would hide everything else."
    before, torch.randn_like = torch.randn_like, torch.zeros_like
    try:
        return [one_step(text) for text in texts]
    finally:
        torch.randn_like = before


@pytest.mark.timeout(300)
def test_two_ranks_equal_one():
    trunk = job((clip(),), steps=2, dtype="fp64")
    launch(trunk, machine=HERE)
    sides = {"cnn": (CNN, 1e-3), "vit": (TOKENIZER, 0.0)}
    texts = [dumps(job((distil(trunk, kl=kl, cos_margin=0.0, distmat_margin=0.0),), tokenizer=config, dtype="fp64")) for config, kl in sides.values()]
    for name, (losses, gradients, _), (losses2, gradients2, _) in zip(sides, quiet_steps(texts), start(quiet_steps, texts, nproc=2), strict=True):
        assert losses.keys() == losses2.keys() and gradients.keys() == gradients2.keys() and "objectives.rec.proj.weight" in gradients
        assert losses2["rec"] == pytest.approx(losses["rec"], rel=1e-10), name
        for key in gradients:
            assert torch.allclose(gradients2[key], gradients[key], rtol=1e-8, atol=1e-11), (name, key, (gradients2[key] - gradients[key]).abs().max())


@pytest.mark.timeout(60)
def test_both_sides_pull_as_configured():
    "At the encoder's last layer the gradient of the weighted resemblance has vf_weight times the length of the reconstruction's; the cap cuts it."
    launch(TRUNK, machine=HERE)
    image = torch.rand(4, 3, 16, 16)

    def lengths(tokenizer, **changes):
        torch.manual_seed(1)
        loss = distil(cos_margin=0.0, distmat_margin=0.0, vf_weight=0.3, **changes).build(tokenizer).eval()
        last = last_layer(tokenizer)
        whole = loss(tokenizer, {"image": image})
        z = tokenizer.posterior(image)[0] if hasattr(tokenizer, "posterior") else tokenizer.encode(image)
        both = torch.autograd.grad(loss.rec.total(loss.terms(tokenizer.decode(z), image)), last)[0]
        return ((torch.autograd.grad(whole, last)[0] - both).norm() / both.norm()).item(), loss.monitor["adaptive"].item()

    torch.manual_seed(0)
    for tokenizer, kl in ((CNN.build(), 0.0), (TOKENIZER.build(), 0.0)):
        ratio, alpha = lengths(tokenizer, kl=kl)
        assert ratio == pytest.approx(0.3, rel=1e-2) and alpha > 1
        assert lengths(tokenizer, kl=kl, cap=alpha / 2)[0] == pytest.approx(ratio / 2, rel=1e-3)


def test_a_wrong_grid_is_refused_before_training():
    small = cnn_job((distil(),), tokenizer=replace(CNN, multipliers=(1, 2), attention=(8,)), steps=2)
    with pytest.raises(ValueError, match="8×8 latents, but 4×4 tokens in the representation: set stride=2"):
        launch(small, machine=HERE)


@pytest.mark.timeout(180)
def test_another_representation_under_the_same_config_is_refused(tmp_path, monkeypatch):
    launch(TRUNK, replace(TRUNK, seed=1), replace(TRUNK, seed=2), machine=HERE)
    small = cnn_job((distil(),))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(InterruptedError):
            launch(small, machine=HERE)
    before = OwnTrunk(At(TRUNK)).build().hash
    swapped(TRUNK, replace(TRUNK, seed=1))
    with pytest.raises(ValueError, match=f"rec: this state was trained towards representation {before}, but here is .* launch again"):
        launch(small, machine=HERE)
    swapped(TRUNK, replace(TRUNK, seed=2))
    shutil.rmtree(run_of(small).path / "checkpoints")
    launch(small, machine=HERE)                                      # from nothing: these are its weights now
    shutil.rmtree(run_of(TRUNK).path)
    model = small.load()                                             # the tokenizer needs no representation
    with torch.no_grad():
        assert model.tokenizer(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    folder = save_pretrained(small, tmp_path / "tokenizer")
    whole = save_pretrained(small, tmp_path / "whole", objectives=("rec",))
    assert from_pretrained(str(folder)).tokenizer.encoder_hash() == model.tokenizer.encoder_hash()
    assert torch.equal(from_pretrained(str(whole)).objectives["rec"].origin, model.objectives["rec"].origin) and model.objectives["rec"].origin.any()


@pytest.mark.timeout(180)
def test_a_training_may_start_from_one_towards_another_representation():
    launch(TRUNK, machine=HERE)
    first = cnn_job((distil(),), steps=2, log_every=1)
    launch(first, machine=HERE)
    same, other = (cnn_job((distil(trunk),), steps=2, log_every=1, start=At(first), seed=3) for trunk in (TRUNK, replace(TRUNK, seed=1)))
    launch(same, other, machine=HERE)
    origins = [found.load().objectives["rec"].origin for found in (first, same, other)]
    assert torch.equal(origins[0], origins[1]) and not torch.equal(origins[0], origins[2])
