"""RAE: a decoder trained on a frozen representation, our own or published; the released format; both through every protocol they have parts for."""
import copy
import json
import shutil
import signal
from dataclasses import replace

import pytest
import rae_case
import timm
import torch
from formats import shapes, synthetic
from safetensors.torch import save_file
from tiny import HERE, job, rec, swapped

import vtp.finetune_decoder as package
from vtp.config import dumps, loads
from vtp.data.shapes import Shapes
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.latents import CacheLatents, open_latents
from vtp.job import At, Machine, inputs, launch, run_of
from vtp.objectives.adversarial import Adversarial, DiffAugment, PatchGAN
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig
from vtp.run import root
from vtp.tokenizers.frozen import DECODERS, FrozenConfig, FrozenTokenizer, RAEDecoder, RAEDecoderConfig, Untrained, positions, rae_decoder
from vtp.tokenizers.released_rae import RAERelease, decoder_names
from vtp.tokenizers.representation import OwnTrunk, TimmRepresentation
from vtp.tokenizers.statistics import LatentStatistics

DECODER = RAEDecoderConfig(32, 2, 2, 64, patch=4)
TUNE = OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 2, 0.1, None)
VAL = Shapes(count=40, size=16, split="val")


def pretrained(**changes):
    return job((rec(mse=0.0),), **{**dict(steps=4, log_every=2), **changes})


def frozen(of=None, **changes):
    return FrozenConfig(**{**dict(representation=OwnTrunk(At(of or pretrained()), affine=False), decoder=DECODER), **changes})


def tuned(config=None, **changes):
    gan = Adversarial(PatchGAN(8, 1), weight=0.75, eps=1e-6, start_discriminator=0.2, start_generator=0.4, ramp=0.0, augment=DiffAugment())
    base = dict(of=At(Untrained(config or frozen())), pairs=Shapes(count=400, size=16), rec=rec(mse=0.0, space="unit"), steps=10, adversarial=gan, optim=TUNE,
                optim_discriminator=TUNE, ema=0.8, dtype="fp32", log_every=2)
    return FinetuneDecoder(**{**base, **changes})


def measured(of, tmp_path):
    "Rows of reconstruction and probes, and cached latents, of a checkpoint of 16-pixel images."
    train = Shapes(count=60, size=16)
    evaluators = (ReconstructionQuality(data=VAL, batch=16, perceptual=PerceptualConfig(kind="random_features")), LinearProbe(train=train, val=VAL, steps=5, batch=16),
                  LinearProbe(train=train, val=VAL, tap="latent", pool="flat", steps=5, batch=16), LinearProbe(train=train, val=VAL, tap="trunk", pool="cls+mean", blocks=(1, 2), steps=5, batch=16))
    cached = CacheLatents(of, Shapes(count=12, size=16), batch=5, shard=6, dtype="fp32")
    run, _ = launch(Evaluate(of, evaluators), cached, machine=HERE)
    return run.rows(), open_latents(cached)


def test_a_decoder_is_trained_on_a_trunk_of_our_own_and_measured(tmp_path):
    training = tuned()
    rows, latents = measured(At(training), tmp_path)
    found = {row["metric"] for row in rows}
    assert {"rPSNR", "SSIM", "probe"} <= found and {row.get("tap") for row in rows if row["metric"] == "probe"} == {"latent", "trunk"}
    budget = training.spent()
    assert budget["samples"] == 4 * 8 and budget["decoder_samples"] == 10 * 8 and budget["flops"] > pretrained().spent()["flops"]      # the trunk's, too
    assert all(row["decoder_samples"] == 80 and row["flops"] == budget["flops"] for row in rows)
    tokenizer, images = training.load().tokenizer, torch.stack([torch.from_numpy(p.image) for p in VAL.open().read(range(3), range(3))]).movedim(-1, 1) / 255
    trunk = pretrained().load().tokenizer
    with torch.no_grad():
        z, tokens = tokenizer.encode(images), trunk.embed(images).patches / trunk.encoder.trunk.norm.weight
        torch.testing.assert_close(z, tokens.transpose(1, 2).reshape(3, 32, 4, 4), rtol=1e-5, atol=1e-5)
    assert latents.shape == (32, 4, 4) and latents.encoder == tokenizer.encoder_hash() and tokenizer.image_size == 16
    assert {g.stem for g in run_of(training).at().path.glob("*.safetensors")} == {"decoder", "ema", "discriminator", "optim", "optim_discriminator", "origin"}
    assert all(name.startswith("decoder.") for name in run_of(training).at().tensors("decoder"))         # the representation is not written again


@pytest.mark.timeout(120)
def test_the_decoder_learns():
    training = tuned(steps=100, log_every=50, ema=0.9, adversarial=Adversarial(PatchGAN(8, 1), start_generator=0.9))
    launch(training, machine=HERE)
    images = torch.stack([torch.from_numpy(p.image) for p in VAL.open().read(range(40), range(40))]).movedim(-1, 1) / 255
    with torch.no_grad():
        before, after = (float((found.load().tokenizer(images) - images).abs().mean()) for found in (training.of, training))
    assert after < 0.5 * before, (before, after)


def test_resume_is_bitwise_with_the_noise(tmp_path, monkeypatch):
    training = tuned(steps=6)
    states = []
    for folder, stops in (("straight", set()), ("stopped", {1, 4})):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / folder))
        step, left = package.finetune_step, set(stops)

        def interrupted(players, average, opts, batch, config, number):
            if number in left:
                left.remove(number)
                signal.raise_signal(signal.SIGTERM)
            return step(players, average, opts, batch, config, number)

        with monkeypatch.context() as patch:
            patch.setattr(package, "finetune_step", interrupted)
            for _ in stops:
                with pytest.raises(InterruptedError):
                    launch(training, machine=HERE)
            run, = launch(training, machine=HERE)
        last = run.at()
        states.append(({name: last.tensors(name) for name in ("decoder", "ema", "discriminator", "optim")}, (run.path / "metrics.jsonl").read_bytes()))
    (straight, rows), (resumed, again) = states
    assert rows == again
    for name in straight:
        assert straight[name].keys() == resumed[name].keys() and all(torch.equal(t, resumed[name][k]) for k, t in straight[name].items()), name
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "quiet"))
    run, = launch(tuned(frozen(noise=0.0), steps=6), machine=HERE)
    assert not torch.equal(run.at().tensors("decoder")["decoder.out.weight"], straight["decoder"]["decoder.out.weight"])       # the noise was felt


def test_other_weights_under_the_decoder_are_refused(tmp_path, monkeypatch):
    training = tuned(steps=3)
    launch(training, machine=HERE)
    launch(pretrained(seed=1), machine=HERE)
    swapped(pretrained(), pretrained(seed=1))
    with pytest.raises(ValueError, match="untrained-.* was made with encoder .* remove"):
        training.load()
    shutil.rmtree(run_of(training.of.job).path)                    # without that note the decoder's own is left
    with pytest.raises(ValueError, match="tuned the decoder of encoder"):
        training.load()


def test_another_encoder_than_the_run_wrote_down_is_refused(tmp_path):
    def written(seed):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")

    written(0)
    untrained = Untrained(FrozenConfig(TimmRepresentation("test_vit", str(tmp_path / "vit.safetensors"), image_size=32, stride=8), replace(DECODER, patch=8)))
    untrained.load()                                               # nothing is written down yet
    launch(untrained, machine=HERE)
    before = untrained.load().tokenizer.encoder_hash()
    written(1)
    with pytest.raises(ValueError, match=f"was made with encoder {before}, but here is"):
        untrained.load()
    written(0)
    assert untrained.load().tokenizer.encoder_hash() == before


def test_a_published_network_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    config = FrozenConfig(TimmRepresentation("test_vit", str(tmp_path / "vit.safetensors"), image_size=32, stride=8, resize="bicubic", affine=False), replace(DECODER, patch=8))
    untrained = Untrained(config)
    run, = launch(untrained, machine=HERE)
    tokenizer = untrained.load().tokenizer
    image = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(image), config.representation.build().patches(image))
        picture = tokenizer.decoder(tokenizer.encode(image)) * 0.5 + 0.5                     # timm's test networks: mean and std are one half
        assert torch.equal(tokenizer(image), picture) and picture.shape == image.shape
        assert all(torch.equal(a.cls, b.cls) for a, b in zip(tokenizer.intermediate(image, 3), config.representation.build().intermediate(image, 3), strict=True))
    assert run.rows() == [{"step": 0, "encoder": tokenizer.encoder_hash()}] and config.spent() == {} and tokenizer.width("trunk") == tokenizer.width("latent") == 64
    small = tuned(config, pairs=Shapes(count=40, size=32), rec=rec(mse=0.0, crop=replace(rec().crop, size=32)))
    assert "flops" not in small.spent() and small.spent()["decoder_flops"] > 0


def test_statistics_change_the_latents_and_not_the_image(tmp_path):
    plain = frozen()
    statistics = LatentStatistics(plain.representation, Shapes(count=30, size=16), batch=8, slices=2)
    config = replace(plain, statistics=statistics)
    assert inputs(config) == (pretrained(), statistics) and loads(dumps(config)) == config
    assert Untrained(config).build("meta").tokenizer.scale.shape == (32, 4, 4)               # before anything is measured
    launch(Untrained(config), machine=HERE)
    bare, normed = Untrained(plain).load().tokenizer, Untrained(config).load().tokenizer
    images = torch.stack([torch.from_numpy(p.image) for p in statistics.data.open().read(range(30), range(30))]).movedim(-1, 1) / 255
    with torch.no_grad():
        z = normed.encode(images)
        torch.testing.assert_close(normed(images), bare(images), rtol=1e-4, atol=1e-4)
        assert z.mean(0).abs().max() < 1e-3
        torch.testing.assert_close(z.var(0, correction=0), torch.ones(32, 4, 4), rtol=.05, atol=.05)
        torch.manual_seed(1)
        noisy = bare.perturb(bare.encode(images))
        torch.manual_seed(1)
        torch.testing.assert_close(normed.perturb(z), (noisy - normed.shift) / normed.scale, rtol=1e-3, atol=1e-3)
    assert normed.encoder_hash() != bare.encoder_hash() and normed.encoder_hash() == copy.deepcopy(normed).encoder_hash()
    with pytest.raises(ValueError, match="another representation"):
        replace(config, representation=OwnTrunk(At(pretrained()), affine=True))
    with pytest.raises(ValueError, match="another representation"):
        replace(config, statistics=pretrained())
    launch(pretrained(seed=1), machine=HERE)
    swapped(pretrained(), pretrained(seed=1))
    with pytest.raises(ValueError, match="was measured with representation .* launch again"):
        config.build()
    assert Untrained(config).build("meta").tokenizer.scale.shape == (32, 4, 4) and statistics.load()["var"].shape == (32, 4, 4)


def test_a_value_that_never_varies_is_divided_by_the_root_of_eps():
    with torch.device("meta"):
        representation = frozen().representation.build()
    tokenizer = FrozenTokenizer(representation, DECODER)
    for eps in (1e-5, 0.04):
        tokenizer.normalise(torch.zeros(32, 4, 4), torch.zeros(32, 4, 4), **({} if eps == 1e-5 else {"eps": eps}))
        torch.testing.assert_close(tokenizer.scale, torch.full((32, 4, 4), eps**0.5))


def test_other_sides(tmp_path):
    launch(pretrained(), machine=HERE)
    tokenizer = Untrained(frozen()).load().tokenizer
    for height, width in ((24, 32), (32, 32)):
        image = torch.rand(1, 3, height, width)
        assert tokenizer.encode(image).shape == (1, 32, height // 4, width // 4) and tokenizer(image).shape == image.shape
    with pytest.raises(ValueError, match="resize or crop to"):
        tokenizer.encode(torch.rand(1, 3, 18, 16))


def test_what_does_not_fit_is_refused():
    for changes, words in ((dict(noise=-1.0), "noise"), (dict(eps=0.0), "eps")):
        with pytest.raises(ValueError, match=words):
            frozen(**changes)
    with pytest.raises(ValueError, match="decoder.patch=8 must be the representation's stride, 4"):
        launch(Untrained(frozen(decoder=replace(DECODER, patch=8))), machine=HERE)
    for changes, words in ((dict(width=30), "multiple of heads"), (dict(depth=0), "depth")):
        with pytest.raises(ValueError, match=words):
            replace(DECODER, **changes)
    with pytest.raises(ValueError, match="must be one of trunk, latent"):
        Untrained(frozen()).build("meta").tokenizer.width("text")
    missing = FrozenConfig(TimmRepresentation("test_vit", "nowhere.safetensors", image_size=32, stride=8), replace(DECODER, patch=8))
    with pytest.raises(FileNotFoundError, match="hf download timm/test_vit.r160_in1k"):
        launch(tuned(missing, pairs=Shapes(count=40, size=32), rec=rec(mse=0.0, crop=replace(rec().crop, size=32))), machine=HERE)


def test_two_processes_train_the_same_decoder(tmp_path, monkeypatch):
    training = tuned(frozen(noise=0.0), steps=2)
    launch(training, machine=HERE)
    one = run_of(training).at().tensors("decoder")
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "two"))
    launch(training.of.job.tokenizer.representation.of.job, machine=HERE)
    launch(training, machine=Machine(procs=2, workers=0, device="cpu"))
    two = run_of(training).at().tensors("decoder")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("name, million", [("B", 86.2), ("L", 303.9), ("XL", 415.1)])
def test_published_sizes(name, million):
    with torch.device("meta"):
        decoder = RAEDecoder(rae_decoder(name), 768, (16, 16))
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == million
    listed = {key: shape for key, (shape, _) in shapes("rae_decoder", name).items()}
    assert {key: tuple(t.shape) for key, t in decoder_names(decoder).items()} == listed and rae_decoder(name).label == name and name in DECODERS


def release(folder, **changes):
    "A release in small, in the containers of the published one."
    (folder / "decoders/dinov2/tiny").mkdir(parents=True), (folder / "encoder").mkdir()
    found = synthetic("rae_statistics", seed=2)
    torch.save(synthetic("rae_decoder", seed=1), folder / "decoders/dinov2/tiny/model.pt")
    torch.save({"mean": found["mean"], "var": found["var"].square() + 0.5}, folder / "stat.pt")
    save_file(synthetic("dinov2_registers", seed=3), folder / "encoder/model.safetensors")
    (folder / "encoder/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}))
    (folder / "encoder/config.json").write_text(json.dumps(dict(
        model_type="dinov2_with_registers", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=7, image_size=42, num_register_tokens=4,
        layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True, use_swiglu_ffn=False)))
    return RAERelease(**{**dict(source=str(folder), decoder="decoders/dinov2/tiny/model.pt", statistics="stat.pt", encoder=str(folder / "encoder"), size=RAEDecoderConfig(24, 2, 2, 40, patch=4), image_size=16), **changes})


def test_a_release_through_every_protocol(tmp_path):
    found = release(tmp_path)
    rows, latents = measured(At(found), tmp_path)
    assert {"rPSNR", "SSIM", "probe"} <= {row["metric"] for row in rows} and not any("flops" in row for row in rows)
    tokenizer = found.load().tokenizer
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        parts = (tokenizer.representation.patches(images) - tokenizer.shift) / tokenizer.scale
        assert torch.equal(tokenizer.encode(images), parts)
        assert torch.equal(tokenizer(images), tokenizer.decoder(parts * tokenizer.scale + tokenizer.shift) * tokenizer.representation.std + tokenizer.representation.mean)
    assert latents.shape == (32, 4, 4) and latents.encoder == tokenizer.encoder_hash() and found.tokenizer.latent == 32 and loads(dumps(found)) == found
    decoder = synthetic("rae_decoder", seed=1)
    names = decoder_names(tokenizer.decoder)
    assert names.keys() == decoder.keys() and all(torch.equal(names[k], decoder[k]) for k in decoder)


def test_a_release_can_be_tuned_further(tmp_path):
    found = release(tmp_path, noise=0.8, statistics=None)
    training = tuned(steps=3, of=At(found))
    launch(training, machine=HERE)
    before, after = found.load().tokenizer, training.load().tokenizer
    assert before.encoder_hash() == after.encoder_hash() and not torch.equal(before.decoder.out.weight, after.decoder.out.weight)
    assert training.spent()["decoder_samples"] == 24 and "flops" not in training.spent()


def test_a_release_that_is_not_whole_is_refused(tmp_path):
    found = release(tmp_path)
    weights = tmp_path / "encoder/model.safetensors"
    whole = synthetic("dinov2_registers", seed=3)
    for broken, words in (({k: v for k, v in whole.items() if k != "layernorm.bias"}, "1 missing: layernorm.bias"), (whole | {"pooler.weight": torch.zeros(2)}, "1 unexpected: pooler.weight"),
                          (whole | {"embeddings.register_tokens": torch.zeros(1, 5, 32)}, r"1 misshapen: embeddings.register_tokens \(1, 5, 32\), not \(1, 4, 32\)")):
        save_file(broken, weights)
        with pytest.raises(ValueError, match=words):
            found.load()
    save_file(whole, weights)
    torch.save({"mean": torch.zeros(32, 4, 4)}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match="must hold mean and var"):
        found.load()
    (tmp_path / "decoders/dinov2/tiny/model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="folder without decoders/dinov2/tiny/model.pt"):
        found.check()
    for field, value, words in (("use_swiglu_ffn", True, "use_swiglu_ffn=True"), ("model_type", "dinov2", "model_type='dinov2'"), ("patch_size", None, "lacks patch_size")):
        config = json.loads((tmp_path / "encoder/config.json").read_text())
        described = config | {field: value} if value is not None else {k: v for k, v in config.items() if k != field}
        (tmp_path / "encoder/config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=words):
            found.build("meta")
        (tmp_path / "encoder/config.json").write_text(json.dumps(config))


SPOILED = {                                                         # part of a tokenizer → what stored numbers must notice
    "nothing": lambda t: None,
    "encoder: keys for queries": lambda t: [b.attn.qkv.weight.data.copy_(b.attn.qkv.weight.data.view(3, 32, 32)[[1, 0, 2]].flatten(0, 1)) for b in t.representation.trunk.network.blocks],
    "encoder: gain of the last norm": lambda t: t.representation.trunk.network.norm.weight.data.mul_(1.01),
    "encoder: shift of the last norm": lambda t: t.representation.trunk.network.norm.bias.data.add_(0.01),
    "encoder: norm's eps": lambda t: [setattr(b.norm1, "eps", 1e-5) for b in t.representation.trunk.network.blocks],
    "encoder: bilinear": lambda t: setattr(t.representation, "resize", "bilinear"),
    "encoder: ImageNet's mean of colours in another order": lambda t: t.representation.mean.copy_(t.representation.mean.flip(1)),
    "encoder: ImageNet's deviation": lambda t: t.representation.std.fill_(0.226),
    "statistics: no eps": lambda t: setattr(t, "scale", (t.scale**2 - 1e-5).sqrt()),
    "decoder: keys for queries": lambda t: [b.qkv.weight.data.copy_(b.qkv.weight.data.view(3, 24, 24)[[1, 0, 2]].flatten(0, 1)) for b in t.decoder.blocks],
    "decoder: norm's eps": lambda t: [setattr(b.norm1, "eps", 1e-6) for b in t.decoder.blocks],
    "decoder: rows before columns": lambda t: t.decoder.positions[1:].copy_(t.decoder.positions[1:].view(4, 4, 24).transpose(0, 1).flatten(0, 1)),
}


@pytest.mark.parametrize("part", SPOILED)
def test_it_is_what_the_public_code_computed(part, tmp_path):
    golden = {name: torch.tensor(value) for form in ("dinov2_registers", "rae_decoder") for name, value in json.loads((root() / f"data/formats/{form}.json").read_text())["golden"].items()}
    table, image = positions((4, 4), 24), rae_case.image()
    tokenizer = rae_case.write(tmp_path, table[None]).load().tokenizer
    SPOILED[part](tokenizer)
    with torch.no_grad():
        z = tokenizer.encode(image)
        found = rae_case.numbers(table, tokenizer.embed(image).patches, z, tokenizer.decode(z))
    off = {name: ((found[name] - wanted).abs().max() / wanted.abs().max()).item() for name, wanted in golden.items()}
    assert off.keys() == {"positions", "tokens", "z", "decoded"}
    assert max(off.values()) < 1e-5 if part == "nothing" else max(off.values()) > 1e-3, off


def test_the_encoder_says_which_field_its_folder_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = release(tmp_path, encoder="facebook/dinov2-with-registers-base")
    for ask in (found.check, lambda: found.tokenizer.latent, lambda: found.build("meta")):
        with pytest.raises(FileNotFoundError, match="hf download facebook/dinov2-with-registers-base config.json(.|\n)*as the field encoder") as error:
            ask()
        assert "the source" not in str(error.value)
    (tmp_path / "encoder/config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        replace(found, encoder=str(tmp_path / "encoder")).build("meta")


def test_the_published_release_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download (facebook/dinov2-with-registers-base|nyu-visionx/RAE-collections) "):
        launch(RAERelease(), machine=HERE)
    with pytest.raises(FileNotFoundError, match="hf download nyu-visionx/RAE-collections decoders/dinov2/wReg_base/ViTXL_n08/model.pt (.|\n)*as the source"):
        RAERelease().path(RAERelease().decoder)


def test_pretraining_a_frozen_encoder_is_refused():
    with pytest.raises(ValueError, match="frozen, and every checkpoint would hold it"):
        launch(job((rec(),), tokenizer=frozen(), steps=2), machine=HERE)
