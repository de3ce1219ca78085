"""SD-VAE and VA-VAE from synthetic checkpoints made of the published key lists: read strictly, equal to diffusers, evaluated, cached and tuned."""
import json
from dataclasses import replace

import pytest
import torch
from formats import shapes, synthetic
from safetensors.torch import save_file
from tiny import HERE, rec

from vtp.config import dumps, loads
from vtp.data.shapes import Shapes
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.generation.latents import CacheLatents, open_latents
from vtp.job import At, launch, load, run_of
from vtp.perceptual import PerceptualConfig
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.released_cnn import LDMVAE, SDVAE, VAVAE, from_diffusers

CONFIG = dict(_class_name="AutoencoderKL", _diffusers_version="0.4.2", act_fn="silu", block_out_channels=[16, 32, 32], down_block_types=["DownEncoderBlock2D"] * 3,
              in_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=8, out_channels=3, sample_size=32, up_block_types=["UpDecoderBlock2D"] * 3)
VA = CNNConfig(image_size=32, latent=4, width=32, multipliers=(1, 2), blocks=1, attention=(16,))
SD = CNNConfig(image_size=32, latent=4, width=32, multipliers=(1, 2, 2), blocks=1, attention=())


def folder(path, size="tiny", **changes):
    "A folder as diffusers writes it."
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(synthetic("sd_vae", size), path / "diffusion_pytorch_model.safetensors")
    return str(path)


def write(path, tensors):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return str(path)


RELEASES = {
    "sd_vae": lambda path: SDVAE(folder(path / "sd")),
    "sd_vae before": lambda path: SDVAE(folder(path / "sd", "tiny before")),
    "va_vae .pt": lambda path: VAVAE(str(write(path / "va" / VAVAE.file, synthetic("va_vae")) and path / "va"), tokenizer=VA),
    "va_vae training": lambda path: VAVAE(write(path / "last.ckpt", {"epoch": 7, "state_dict": synthetic("va_vae", "tiny training")}), tokenizer=VA),
    "va_vae safetensors": lambda path: LDMVAE(write(path / "va.safetensors", synthetic("va_vae")), tokenizer=VA),
    "ldm_vae": lambda path: LDMVAE(write(path / "kl.ckpt", {"state_dict": synthetic("ldm_vae")}), tokenizer=SD),
    "ldm_vae training": lambda path: LDMVAE(write(path / "kl.ckpt", {"state_dict": synthetic("ldm_vae", "tiny training")}), tokenizer=SD),
}


@pytest.mark.parametrize("name", RELEASES)
def test_every_tensor_of_the_list_finds_its_place(name, tmp_path):
    release = RELEASES[name](tmp_path)
    model = load(At(release))
    state = model.tokenizer.state_dict()
    if isinstance(release, SDVAE):
        mapped = from_diffusers(synthetic("sd_vae", "tiny before" if "before" in name else "tiny"), 3)
    else:
        mapped = {k: v for k, v in synthetic(name.split()[0], "tiny training" if "training" in name else "tiny").items() if k in state}
    assert mapped.keys() == state.keys() and all(state[k].equal(mapped[k]) for k in state)
    assert not model.training and loads(dumps(release)) == release
    image = torch.rand(2, 3, 32, 48)
    again = release.tokenizer.build().eval()                          # the model itself, given the same numbers
    again.load_state_dict(mapped)
    with torch.no_grad():
        assert model.tokenizer(image).equal(again(image)) and model.tokenizer.encode(image).equal(again.posterior(image)[0])
    with pytest.raises(ValueError, match="multiples of the stride"):
        model.tokenizer.encode(torch.rand(1, 3, 31, 32))


@pytest.mark.parametrize("name", ["sd_vae before", "va_vae training"])
@pytest.mark.timeout(120)
def test_measured_and_cached(name, tmp_path):
    release = RELEASES[name](tmp_path)
    data = Shapes(count=12, size=32)
    measured = Evaluate(At(release), (ReconstructionQuality(data=data, batch=6, perceptual=PerceptualConfig(kind="random_features")),))
    cached = CacheLatents(of=At(release), data=data, batch=6, shard=12, dtype="fp32")
    launch(measured, cached, machine=HERE)
    assert {"rPSNR", "SSIM", "colour_shift"} <= {row["metric"] for row in run_of(measured).rows()}
    assert [row["file"] for row in run_of(release).rows()] == list(release.files)
    reader = open_latents(cached)
    z = reader.latents(range(12), [False] * 12)[0]
    assert z.shape[1:] == release.tokenizer.build().latent_shape and (reader.std > 0).all()
    assert torch.allclose(torch.as_tensor(reader.mean), z.double().mean((0, 2, 3)))


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("decoder.mid.attn_1.q.bias"), "1 missing: decoder.mid.attn_1.q.bias"),
    (lambda t: t.update({"encoder.more": torch.ones(2)}), "1 unexpected: encoder.more"),
    (lambda t: t.update({"quant_conv.bias": torch.ones(3)}), r"1 misshapen: quant_conv.bias \(3,\), not \(8,\)"),
    (lambda t: t.update({"step": 3}), "more than tensors: .'step'"),
])
def test_what_does_not_fit_is_listed(change, says, tmp_path):
    tensors = synthetic("va_vae")
    change(tensors)
    with pytest.raises(ValueError, match=says):
        LDMVAE(write(tmp_path / "x.pt", tensors), tokenizer=VA).load()


def test_diffusers_folders_that_do_not_fit(tmp_path):
    tensors = synthetic("sd_vae")
    release = SDVAE(folder(tmp_path / "sd"))
    file = tmp_path / "sd" / "diffusion_pytorch_model.safetensors"
    for changed, says in ((tensors | {"encoder.mid_block.attentions.0.query.bias": torch.ones(32)}, "mixes two generations"),
                          ({k: v for k, v in tensors.items() if k != "decoder.up_blocks.0.resnets.0.norm1.bias"}, "1 missing: decoder.up.2.block.0.norm1.bias")):
        save_file(changed, file)
        with pytest.raises(ValueError, match=says):
            release.load()
    for changes, says in ((dict(_class_name="AutoencoderTiny"), "AutoencoderTiny"), (dict(latent_channels=16, use_post_quant_conv=False), "use_post_quant_conv"), (dict(shift_factor=0.1), "shift_factor")):
        with pytest.raises(ValueError, match=says):
            SDVAE(folder(tmp_path / "other", **changes)).load()
    with pytest.raises(ValueError, match="does not fit"):
        SDVAE(folder(tmp_path / "wide", block_out_channels=[16, 32, 64])).load()
    with pytest.raises(FileNotFoundError, match="folder without"):
        (tmp_path / "wide" / "diffusion_pytorch_model.safetensors").unlink()
        SDVAE(str(tmp_path / "wide")).check()
    with pytest.raises(ValueError, match="an LDMVAE"):
        SDVAE(str(file)).load()
    for held, says in (("<html>", "config.json is not JSON"), ("[1]", "holds a list"), (json.dumps(CONFIG | {"block_out_channels": 16}), r"no block_out_channels \(list\)"), (json.dumps(CONFIG | {"sample_size": "big"}), r"no sample_size \(int\)")):
        (tmp_path / "sd" / "config.json").write_text(held)
        with pytest.raises(ValueError, match=says):
            release.load()
    for held, says in (({"state_dict": [1]}, "holds a list under state_dict"), ([1], "holds a list"), ):
        with pytest.raises(ValueError, match=says):
            LDMVAE(write(tmp_path / "odd.ckpt", held), tokenizer=SD).load()


def test_code_is_not_run(tmp_path):
    class Run:
        def __reduce__(self): return (open, (str(tmp_path / "was run"), "w"))
    path = write(tmp_path / "evil.ckpt", {"state_dict": synthetic("va_vae"), "callbacks": Run()})
    with pytest.raises(ValueError, match="it is refused"):
        VAVAE(path, tokenizer=VA).load()
    assert not (tmp_path / "was run").exists()


def test_the_scale_is_known_and_not_applied(tmp_path):
    ours, scaled = SDVAE(folder(tmp_path / "sd")), SDVAE(folder(tmp_path / "xl", scaling_factor=0.13025))
    assert (ours.scale, scaled.scale) == (0.18215, 0.13025)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert ours.load().tokenizer.encode(image).equal(scaled.load().tokenizer.encode(image))
    assert ours.tokenizer.image_size == 32 and replace(ours, image_size=64).build("meta").tokenizer.latent_shape == (4, 16, 16)


def test_published_sizes(tmp_path):
    "The lists at the published sizes, against the architectures that the adapters build by default."
    for release, name, levels in ((VAVAE(), "va_vae", None), (LDMVAE("x"), "ldm_vae", None), (None, "sd_vae", 4)):
        config = release.tokenizer if release else CNNConfig(latent=4, multipliers=(1, 2, 4, 4), attention=())
        with torch.device("meta"):
            own = {k: tuple(v.shape) for k, v in config.build().state_dict().items()}
            for size in ("published", "published before") if levels else ("published",):
                listed = {k: torch.empty(shape) for k, (shape, _) in shapes(name, size).items()}
                assert {k: tuple(v.shape) for k, v in (from_diffusers(listed, levels) if levels else listed).items()} == own
    assert VAVAE().build("meta").tokenizer.latent_shape == (32, 16, 16) and VAVAE().files == ("vavae-imagenet256-f16d32-dinov2.pt",)      # shapes ask for no file


@pytest.mark.timeout(120)
def test_the_decoder_of_a_release_can_be_tuned(tmp_path):
    from vtp.finetune_decoder import FinetuneDecoder
    from vtp.objectives.adversarial import Adversarial, PatchGAN
    from vtp.optim import OptimConfig
    release, tune = RELEASES["va_vae .pt"](tmp_path), OptimConfig(2e-3, (0.5, 0.9), 1e-8, 0.0, 2, 0.1, None)
    tuned = FinetuneDecoder(of=At(release), pairs=Shapes(count=32, size=32), rec=rec(batch=4, mse=0.0, crop=replace(rec().crop, size=32)), steps=2,
                            adversarial=Adversarial(PatchGAN(8, 1), start_generator=0.5, ramp=0.0), optim=tune, optim_discriminator=tune, ema=0.5, dtype="fp32", log_every=1)
    launch(tuned, machine=HERE)
    assert load(tuned).tokenizer.encoder_hash() == load(release).tokenizer.encoder_hash()
    assert not load(tuned).tokenizer.decoder.conv_out.weight.equal(load(release).tokenizer.decoder.conv_out.weight)


# numbers of the reference implementations on these synthetic weights: diffusers 0.42.1 and LightningDiT 2725fed, fp32, CPU; images as in `ramp`
GOLDEN = {"sd_vae": dict(z=[0.1050315, -0.2147953, -0.108187, 0.02737195, 0.08815175], pixels=[-0.6866646, -0.542284, -0.1167719, 0.01889253, 0.4546071]),
          "va_vae": dict(z=[-0.01127739, -0.009383731, -0.2993171, -0.08614899, 0.1353917], pixels=[0.04603738, -1.035162, -0.5020082, -0.01619686, 0.5100881])}


def ramp():
    "An image by formula: (1, 3, 32, 32) in [0, 1]."
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.stack([x / 31, y / 31, ((x + y) % 8) / 7])[None]


def digest(z, image):
    "A few numbers of each, and their root mean squares."
    return [*z[0, :, 3, 5].tolist(), z.square().mean().sqrt().item()], [*image[0, :, 10, 20].tolist(), image[0, :, 31, 0].mean().item(), image.square().mean().sqrt().item()]


@pytest.mark.parametrize("name", ["sd_vae", "va_vae .pt"])
def test_golden_numbers(name, tmp_path):
    tokenizer = load(RELEASES[name](tmp_path)).tokenizer
    with torch.no_grad():
        z = tokenizer.encode(ramp())
        found = digest(z, 2 * tokenizer.decode(z) - 1)
    for got, golden in zip(found, GOLDEN[name.split()[0]].values(), strict=True):
        assert got == pytest.approx(golden, rel=2e-5, abs=max(2e-6, 1e-5 * golden[-1]))       # beside the root mean square: CPUs that sum in another order were 5e-6 of it away


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers (pip install diffusers): its AutoencoderKL is what is compared with")


@pytest.mark.parametrize("size", ["tiny", "tiny before"])
def test_equal_to_diffusers(diffusers, size, tmp_path):
    theirs = diffusers.AutoencoderKL.from_pretrained(folder(tmp_path / "sd", size)).eval()
    ours = SDVAE(str(tmp_path / "sd")).load().tokenizer
    image = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        posterior = theirs.encode(2 * image - 1).latent_dist
        mean, logvar = ours.posterior(image)
        off = {"mean": (mean, posterior.mode()), "logvar": (logvar, posterior.logvar), "pixels": (2 * ours.decode(mean) - 1, theirs.decode(posterior.mode()).sample)}
    off = {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in off.items()}
    print({name: f"{value:.1e}" for name, value in off.items()})
    assert max(off.values()) <= 1e-5


def test_attention_in_the_levels_is_diffusers_too(diffusers, tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), block_out_channels=(16, 32),
                                     layers_per_block=2, latent_channels=4, norm_num_groups=8, sample_size=32).eval()
    theirs.save_pretrained(tmp_path / "attends")
    release = SDVAE(str(tmp_path / "attends"))
    assert release.tokenizer == CNNConfig(32, 4, 16, (1, 2), 2, (16,), 8)
    image, ours = torch.rand(1, 3, 32, 32), release.load().tokenizer
    with torch.no_grad():
        mode = theirs.encode(2 * image - 1).latent_dist.mode()
        assert (ours.encode(image) - mode).norm() / mode.norm() <= 1e-5
        assert torch.allclose(2 * ours.decode(mode) - 1, theirs.decode(mode).sample, rtol=1e-4, atol=1e-5)


def test_the_list_is_diffusers_list(diffusers):
    def listed(channels, layers, groups, size):
        with torch.device("meta"):
            vae = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels), block_out_channels=channels,
                                          layers_per_block=layers, latent_channels=4, norm_num_groups=groups, sample_size=size)
        return {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    for size, options in (("published", ((128, 256, 512, 512), 2, 32, 256)), ("tiny", ((16, 32, 32), 1, 8, 32))):
        assert {k: shape for k, (shape, _) in shapes("sd_vae", size).items()} == listed(*options)
