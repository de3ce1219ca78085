"""Each adapter returns what the model returns, and a real component of the library it is for accepts it."""
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import HERE, PART, clip, job, rec

import vtp.adapters as adapters
from vtp.adapters import Features, OpenClip, autoencoder_class, diffusers_vae
from vtp.data.imagenet import prompts
from vtp.data.shapes import Shapes, render
from vtp.evaluation.zero_shot import ZeroShot, text_classifier
from vtp.generation.latents import CacheLatents, read_statistics
from vtp.job import At, launch
from vtp.tokenizers.frozen import FrozenConfig, RAEDecoderConfig, Untrained
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.pretrained import Model
from vtp.tokenizers.representation import OwnTrunk
from vtp.tokenizers.vit import ViTTokenizerConfig

torch.manual_seed(0)
IMAGES = torch.from_numpy(render(Shapes(size=16), range(4))).permute(0, 3, 1, 2) / 255
WIDE = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def model(objectives=(clip(), rec()), **changes):
    part = replace(PART, registers=2)
    return job(objectives, tokenizer=ViTTokenizerConfig(16, part, part, latent=8), **changes).build().eval().requires_grad_(False)


def cnn():
    torch.manual_seed(0)
    return CNNConfig(16, latent=4, width=8, multipliers=(1, 2, 2), blocks=1, attention=(), groups=4).build().eval().requires_grad_(False)


# diffusers

@pytest.mark.parametrize("images", [IMAGES, WIDE], ids=["square", "wide and larger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_vae_is_the_tokenizer(images, dtype):
    tokenizer = model().tokenizer.to(dtype)
    vae, x = diffusers_vae(tokenizer), 2 * images.to(dtype) - 1
    with torch.no_grad():
        z = tokenizer.encode((x + 1) / 2)
        out = vae.encode(x)
        assert vae.model is tokenizer and vae.dtype == dtype and out.latent.dtype == dtype
        for found in (out.latent, out[0], out.latent_dist.mode(), out.latent_dist.sample(), vae.encode(x, return_dict=False)[0]): assert torch.equal(found, z)
        decoded = 2 * tokenizer.decode(z) - 1
        for found in (vae.decode(z).sample, vae.decode(z, return_dict=False)[0], vae(x).sample): assert torch.equal(found, decoded)


def test_latents_are_normalised_with_measured_statistics():
    small = job((rec(),), steps=2)
    latents = CacheLatents(At(small), Shapes(count=64, size=16), dtype="fp32", flips=False)
    launch(latents, machine=HERE)
    found, tokenizer = read_statistics(latents), small.load().tokenizer
    vae = diffusers_vae(tokenizer, found["mean"], found["std"])
    x = torch.from_numpy(render(Shapes(count=64, size=16), range(64))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent
        assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
        mean, std = (torch.tensor(found[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std"))
        assert torch.equal(z, (tokenizer.encode((x + 1) / 2) - mean) / std) and torch.equal(vae.decode(z).sample, 2 * tokenizer.decode(z * std + mean) - 1)
    assert vae.config.inside_mean == found["mean"] and vae.config.scaling_factor == 1 and vae.config.latents_mean is vae.config.latents_std is None
    theirs = diffusers_vae(tokenizer, found["mean"], found["std"], normalise="pipeline")       # what pipelines do that read the config
    assert theirs.config.latents_mean == found["mean"] and theirs.config.latents_std == found["std"] and theirs.config.inside_mean is None
    with torch.no_grad():
        assert torch.equal((theirs.encode(x).latent - mean) / std, z) and torch.equal(theirs.decode(z * std / theirs.config.scaling_factor + mean).sample, vae.decode(z).sample)
    with pytest.raises(ValueError, match="normalise='both' must be"): diffusers_vae(tokenizer, found["mean"], found["std"], normalise="both")
    for wrong in ((found["mean"], None), (None, found["std"]), (found["mean"][:2], found["std"][:2]), (found["mean"], [0.0] * 8)):
        with pytest.raises(ValueError, match="latents_mean and latents_std"): diffusers_vae(tokenizer, *wrong)


def test_a_posterior_keeps_its_spread():
    tokenizer, x = cnn(), 2 * IMAGES - 1
    mean, logvar = tokenizer.posterior((x + 1) / 2)
    drawn = diffusers_vae(tokenizer).encode(x)
    assert torch.equal(drawn.latent, mean) and torch.equal(drawn.latent_dist.mode(), mean) and torch.equal(drawn.latent, tokenizer.encode((x + 1) / 2))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(drawn.latent_dist.sample(torch.Generator().manual_seed(1)), mean + (0.5 * logvar).exp() * noise, atol=1e-6)
    shift, scale = torch.arange(4.0), torch.arange(1.0, 5.0)
    normal = diffusers_vae(tokenizer, shift, scale).encode(x).latent_dist.sample(torch.Generator().manual_seed(1))
    expected = (mean + (0.5 * logvar).exp() * noise - shift.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1)
    assert torch.allclose(normal, expected, atol=1e-5)


def test_the_image_processor_and_a_pipeline():
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
    from diffusers.image_processor import VaeImageProcessor
    tokenizer = model().tokenizer
    vae = diffusers_vae(tokenizer)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert factor == 4 and vae.config.latent_channels == 8
    processor, picture = VaeImageProcessor(vae_scale_factor=factor), Image.fromarray(render(Shapes(size=16), [5])[0])
    x = processor.preprocess(picture)
    with torch.no_grad():
        back = processor.postprocess(vae.decode(vae.encode(x).latent).sample)[0]
        own = tokenizer((x + 1) / 2).clamp(0, 1)[0].permute(1, 2, 0)
    assert back.size == (16, 16) and np.abs(np.asarray(back).astype(int) - (own * 255).round().numpy()).max() <= 1
    torch.manual_seed(0)
    unet = UNet2DModel(4, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).eval()
    pipeline = LDMPipeline(vae, unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_the_contract_of_diffusers_vaes():
    import inspect
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import AutoencoderMixin
    tokenizer, x = cnn(), 2 * IMAGES - 1
    vae = diffusers_vae(tokenizer)
    assert isinstance(vae, AutoencoderMixin) and not vae.training and (vae.config.force_upcast, vae.config.in_channels, vae.config.out_channels) == (False, 3, 3)
    assert list(inspect.signature(vae.forward).parameters) == list(inspect.signature(AutoencoderKL.forward).parameters)[1:]
    noise = lambda: torch.Generator().manual_seed(3)
    drawn = vae(x, sample_posterior=True, generator=noise()).sample
    assert torch.equal(drawn, vae.decode(vae.encode(x).latent_dist.sample(noise())).sample) and not torch.equal(drawn, vae(x).sample) and torch.equal(vae(x, False, False)[0], vae(x).sample)
    sizes, whole = [], (vae.encode(x).latent, vae(x).sample)
    counted = {name: getattr(tokenizer, name) for name in ("posterior", "decode")}
    for name, call in counted.items(): setattr(tokenizer, name, lambda images, call=call: (sizes.append(len(images)), call(images))[1])
    vae.enable_slicing()
    sliced = vae.encode(x).latent, vae(x).sample
    assert sizes == [1] * 12 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(sliced, whole))
    vae.disable_slicing()
    vae.encode(x)
    assert sizes[12:] == [4]
    with pytest.raises(NotImplementedError): vae.enable_tiling()
    far = 50 * whole[0]
    for name in counted: delattr(tokenizer, name)
    assert vae.decode(far).sample.abs().max() > 1 and torch.equal(vae.decode(far).sample, 2 * tokenizer.decode(far) - 1)      # not clamped


@pytest.mark.parametrize("kind", ["VTP", "CNN", "RAE"])
def test_a_saved_vae_needs_no_run(kind, tmp_path, monkeypatch):
    if kind == "RAE":
        small = job((rec(),), steps=2)
        launch(small, machine=HERE)
        tokenizer = Untrained(FrozenConfig(OwnTrunk(At(small)), RAEDecoderConfig(width=32, depth=1, heads=2, hidden=64, patch=4))).load().tokenizer
    else: tokenizer = cnn() if kind == "CNN" else model().tokenizer
    vae, x = diffusers_vae(tokenizer), 2 * IMAGES - 1
    own = set(tokenizer.state_dict())
    vae.save_pretrained(tmp_path / "vae")
    assert set(tokenizer.state_dict()) == own                                      # what it shares is as it was
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "elsewhere"))
    with torch.no_grad():
        again = autoencoder_class().from_pretrained(tmp_path / "vae")
        assert not again.training and not again.model.training and torch.equal(again.encode(x).latent, vae.encode(x).latent) and torch.equal(again(x).sample, vae(x).sample)
        bare = autoencoder_class().from_config(autoencoder_class().load_config(tmp_path / "vae"))
        assert all(p.is_meta for p in bare.parameters())                           # no weights, no numbers
        bare.load_state_dict(vae.state_dict())
        assert torch.equal(bare(x).sample, vae(x).sample)
        half = autoencoder_class().from_pretrained(tmp_path / "vae", dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and (half(x.bfloat16()).sample.float() - vae(x).sample).abs().max() < 0.1
    tensors = vae.state_dict()
    with pytest.raises(RuntimeError, match="(?i)missing"): bare.load_state_dict(dict(list(tensors.items())[:-1]))


def test_diffusers_saves_and_loads_it(tmp_path):
    vae = diffusers_vae(model(), [0.5] * 8, [2.0] * 8)
    vae.save_pretrained(tmp_path / "vae")
    again = autoencoder_class().from_pretrained(tmp_path / "vae")
    x = 2 * IMAGES - 1
    with torch.no_grad(): assert torch.equal(again.encode(x).latent, vae.encode(x).latent) and torch.equal(again(x).sample, vae(x).sample)
    half = autoencoder_class().from_pretrained(tmp_path / "vae", dtype=torch.float16)
    assert half.dtype == torch.float16
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"tokenizer": {"_type": "subprocess:Popen", "args": "true"}}))
    with pytest.raises(ValueError, match="outside the packages"): autoencoder_class().from_pretrained(tmp_path / "vae")


def test_without_diffusers_the_way_out_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    autoencoder_class.cache_clear()
    try:
        with pytest.raises(ImportError, match="pip install diffusers"): diffusers_vae(model())
    finally: autoencoder_class.cache_clear()


def test_a_size_that_pipelines_can_not_reckon_with_is_refused():
    part = ViTTokenizerConfig(18, *[type(PART)(width=32, depth=1, heads=2, patch=6)] * 2, latent=4)
    with pytest.raises(ValueError, match="shrinks by 6"): diffusers_vae(part.build())
    bare = cnn()
    del bare.config
    with pytest.raises(ValueError, match="keeps no config"): diffusers_vae(bare)
    with pytest.raises(AttributeError, match="no attribute 'Autoencoder'"): adapters.Autoencoder


# open_clip

@pytest.mark.parametrize("tap", ["trunk", "latent"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_open_clips_names(loss, tap):
    whole = model((clip(loss=loss, tap=tap), rec()))
    found, objective, ids = OpenClip(whole), whole.objectives["clip"], torch.tensor([[49406, 320, 1000, 49407, 0], [49406, 7, 49407, 0, 0]])
    for images in (IMAGES, WIDE):
        assert torch.equal(found.encode_image(images, normalize=True), objective.image_features(whole.tokenizer, images))
        assert torch.equal(found.encode_image(images), objective.visual_proj(whole.tokenizer.embed(images, tap, only_cls=True).cls))
    assert torch.equal(found.encode_text(ids), objective.text(ids)) and torch.equal(found.encode_text(ids, normalize=True), objective.text_features(ids))
    assert found.logit_scale is objective.logit_scale and (found.logit_bias is None) == (loss == "clip")
    out = found(IMAGES, ids)
    assert len(out) == (3 if loss == "clip" else 4) and torch.equal(out[2], objective.logit_scale.exp())
    alone, words = found(IMAGES), found(text=ids)
    assert alone[1] is words[0] is None and torch.equal(alone[0], out[0]) and torch.equal(words[1], out[1])
    assert {id(p) for p in found.parameters()} == {id(p) for p in whole.parameters()}


def test_the_zero_shot_classifier_of_open_clip_finds_what_our_evaluator_finds():
    import open_clip
    small = job((clip(), rec()), steps=30, pairs=Shapes(count=512, size=16))
    launch(small, machine=HERE)
    whole, data = small.load(), Shapes(count=400, size=16, split="val")
    reader, found = data.open(), OpenClip(whole)
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(found, found.tokenizer, reader.classes, [lambda name, template=t: prompts((name,), (template,))[0][0] for t in reader.templates])
        pairs = reader.read(np.arange(400), np.arange(400, dtype=np.uint64))
        images = torch.stack([found.preprocess(Image.fromarray(pair.image)) for pair in pairs])
        named = (found.encode_image(images, normalize=True) @ classifier).argmax(1)
    right = 100 * float((named == torch.tensor([pair.label for pair in pairs])).float().mean())
    row = next(ZeroShot(data=data).rows(whole, torch.device("cpu")))
    assert row["metric"] == "zero_shot" and abs(row["value"] - right) < 0.3                        # ties are shared there
    assert torch.allclose(classifier.T, text_classifier(whole.objectives["clip"], reader.classes, reader.templates, "cpu"), atol=1e-6)


def test_preprocessing_and_words_are_open_clips():
    import open_clip
    found, picture = OpenClip(model()), Image.fromarray(render(Shapes(size=64), [3])[0]).crop((0, 0, 64, 40))
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(found)), is_train=False)
    assert torch.equal(found.preprocess(picture), transform(picture)) and torch.equal(found.preprocess(picture.convert("RGBA")), transform(picture))
    texts = ["a photo of a dog", "Zwei Bäume & ein Haus"]
    assert torch.equal(found.tokenizer(texts), open_clip.get_tokenizer("ViT-B-32")(texts)) and found.tokenizer("a", context_length=8).shape == (1, 8)
    with pytest.raises(ValueError, match=r"no text tower of ours in the model \(objectives: rec\)"): OpenClip(model((rec(),)))


# timm

def test_timms_names():
    import timm
    from timm.models._features import FeatureGetterNet
    whole = model()
    found, tokenizer = Features(whole).eval(), whole.tokenizer
    for images in (IMAGES, WIDE):
        tokens, h = tokenizer.embed(images), images.shape[-2] // 4
        assert torch.equal(found(images), tokens.cls) and torch.equal(found.forward_features(images), torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1))
        final, maps = found.forward_intermediates(images, [0, -1], norm=True)
        assert torch.equal(final, found.forward_features(images)) and maps[1].shape == (len(images), 32, h, images.shape[-1] // 4)
        assert torch.equal(maps[1].flatten(2).mT, tokens.patches) and torch.equal(maps[0].flatten(2).mT, tokenizer.intermediate(images, 2)[0].patches)
        raw = found.forward_intermediates(images, 2, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True)
        for (patches, prefix), normed in zip(raw, tokenizer.intermediate(images, 2)):
            assert torch.equal(tokenizer.encoder.trunk.norm(patches), normed.patches) and torch.equal(tokenizer.encoder.trunk.norm(prefix)[:, 0], normed.cls) and not torch.equal(patches, normed.patches)
        net = FeatureGetterNet(found, out_indices=(1,), norm=True, prune=False)
        assert torch.equal(net(images)[0], maps[1]) and net.feature_info.channels() == [32] and net.feature_info.reduction() == [4]
    config = timm.data.resolve_model_data_config(found)
    assert config == dict(input_size=(3, 16, 16), interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1, crop_mode="center")
    image = timm.data.create_transform(**config)(Image.fromarray(render(Shapes(size=48), [3])[0]))
    assert image.shape == (3, 16, 16) and 0 <= image.min() < image.max() <= 1
    same = timm.data.create_transform(**config)(Image.fromarray(render(Shapes(size=16), [3])[0]))
    assert torch.equal(same, IMAGES[3])                                            # nothing but [0, 1]
    assert (found.num_features, found.embed_dim, found.num_prefix_tokens, found.num_classes) == (32, 32, 3, 0)


def test_intermediates_are_as_timm_returns_them():
    import timm
    found = Features(model()).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    with torch.no_grad():
        for options in (dict(indices=[1, 0]), dict(indices=[0], stop_early=True), dict(indices=2, output_fmt="NLC"), dict(indices=[0], output_dict=True, return_prefix_tokens=True), dict(output_dict=True, intermediates_only=True), dict(intermediates_only=True, norm=True)):
            ours, timms = (part.forward_intermediates(x, **options) for part, x in ((found, IMAGES), (theirs, torch.rand(4, 3, 32, 32))))
            shapes = lambda value: {k: shapes(v) for k, v in value.items()} if isinstance(value, dict) else [shapes(v) for v in value] if isinstance(value, (list, tuple)) else value.ndim
            assert shapes(ours) == shapes(timms), options
        both = found.forward_intermediates(IMAGES, intermediates_only=True)
        for asked in ([1, 0], [-1, 0], [0, 1, 1]): assert all(torch.equal(a, b) for a, b in zip(found.forward_intermediates(IMAGES, asked, intermediates_only=True), both, strict=True))
        calls = []
        handle = found.model.encoder.trunk.blocks[1].register_forward_hook(lambda *_: calls.append(1))
        final, (first,) = found.forward_intermediates(IMAGES, [0], norm=True, stop_early=True, output_fmt="NLC")
        assert not calls and torch.equal(final[:, 3:], first)
        handle.remove()
        flat, square = (found.get_intermediate_layers(WIDE, reshape=reshape, norm=True)[0] for reshape in (False, True))
        assert flat.shape == (2, 60, 32) and square.shape == (2, 32, 6, 10) and torch.equal(square.flatten(2).mT, flat)


def test_a_classifier_trains_on_top():
    found = Features(model().requires_grad_(True), num_classes=3, global_pool="avg")
    assert torch.equal(found.forward_head(found.forward_features(WIDE), pre_logits=True), found.model.embed(WIDE).patches.mean(1))
    F.cross_entropy(found(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
    assert found.get_classifier().weight.grad.abs().sum() > 0 and found.model.encoder.trunk.cls_token.grad.abs().sum() > 0
    found.reset_classifier(0, "")
    assert found(IMAGES).shape == (4, 1 + 2 + 16, 32)
    with pytest.raises(ValueError, match="global_pool='map'"): found.reset_classifier(0, "map")


def test_other_taps_and_other_tokenizers():
    whole = model()
    latent = Features(whole, tap="latent")
    assert latent.num_features == 8 and torch.equal(latent.forward_features(IMAGES)[:, 3:].mT.unflatten(2, (4, 4)), whole.tokenizer.encode(IMAGES))
    with pytest.raises(ValueError, match="no blocks to look into"): latent.forward_intermediates(IMAGES)
    for wrong in (3, [2], 0, [-3]):
        with pytest.raises(ValueError, match="the trunk has 2 blocks"): Features(whole).forward_intermediates(IMAGES, wrong)
    with pytest.raises(ValueError, match="output_fmt='NHWC'"): Features(whole).forward_intermediates(IMAGES, output_fmt="NHWC")
    with pytest.raises(ValueError): Features(cnn())
    small = job((rec(),), steps=2)
    launch(small, machine=HERE)
    frozen = Untrained(FrozenConfig(OwnTrunk(At(small)), RAEDecoderConfig(width=32, depth=1, heads=2, hidden=64, patch=4))).load()
    assert torch.equal(Features(frozen)(IMAGES), frozen.tokenizer.embed(IMAGES).cls)


def test_sides_that_do_not_fit_are_refused_with_those_that_do():
    whole, odd = model(), torch.rand(1, 3, 18, 16)
    for call in (diffusers_vae(whole).encode, OpenClip(whole).encode_image, Features(whole)):
        with pytest.raises(ValueError, match="multiples of the patch, 4; resize or crop to 16×16 or 20×20"): call(odd)


def test_weights_are_shared_and_no_hook_stays():
    whole = model()
    parts = diffusers_vae(whole), OpenClip(whole), Features(Model(whole.tokenizer))
    parts[1].encode_image(IMAGES), parts[2].forward_intermediates(IMAGES)
    with pytest.raises(ValueError): parts[2].forward_intermediates(torch.rand(1, 3, 18, 16))
    assert not any(module._forward_hooks for module in whole.modules())
    own = {id(p) for p in whole.parameters()}
    for part in parts: assert {id(p) for p in part.parameters()} <= own
