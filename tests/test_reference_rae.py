"""Rooms 40a, 42 and 43c against the code of RAE, when RAE_REFERENCE names a checkout of it.

    git clone https://github.com/bytetriper/RAE
    RAE_REFERENCE=$PWD/RAE python -m pytest -s tests/test_reference_rae.py

With RAE_GOLDEN=1 as well, and transformers installed, the numbers in data/formats that tests/test_rae.py compares with are written anew.

Compared with commit a4d18c4. Of the transformers library, which RAE needs, a stand-in of a dozen lines is enough for the decoder and for the
tokenizer around it; the encoder is compared with the real one (4.56.2, as RAE's requirements say) where it is installed. All weights are random.
"""
import dataclasses
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import rae_case
import torch
from checkouts import module, stub
from formats import shapes, synthetic
from torch import nn

from vtp.run import root
from vtp.tokenizers.frozen import FrozenTokenizer, RAEDecoder, RAEDecoderConfig, positions, rae_decoder
from vtp.tokenizers.released_rae import Layout, RAERelease, decoder_names, dinov2, fill_dinov2
from vtp.tokenizers.representation import Representation, TimmTrunk, without_affine
from vtp.tokenizers.vit import MEAN, STD
from vtp.weights import fill

RAE = os.environ.get("RAE_REFERENCE")
needs_rae = pytest.mark.skipif(not RAE, reason="RAE_REFERENCE does not name a checkout of bytetriper/RAE")
SMALL = RAEDecoderConfig(24, 3, 2, 40, patch=4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Settings:
    "transformers' PretrainedConfig: keyword arguments as attributes."

    def __init__(self, **options):
        self.__dict__.update(dict(chunk_size_feed_forward=0) | options)


class Encoder(nn.Module):
    "RAE's contract of an encoder: normalised images → tokens (B, N, C)."
    patch_size, hidden_size = 7, 32

    def __init__(self, network=None):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).patches


@pytest.fixture
def rae(monkeypatch):
    "RAE's stage 1 with stand-ins for transformers and for its own encoders, which download weights: `.decoder` and `.rae`, its modules."
    stub(monkeypatch, "transformers", AutoConfig=None, AutoImageProcessor=None)
    stub(monkeypatch, "transformers.configuration_utils", PretrainedConfig=Settings)
    stub(monkeypatch, "transformers.utils", ModelOutput=object)
    stub(monkeypatch, "transformers.activations", ACT2FN={"gelu": nn.functional.gelu})
    stub(monkeypatch, "transformers.modeling_outputs", BaseModelOutput=object)
    root = Path(RAE) / "src" / "stage1"
    stub(monkeypatch, "stage1"), stub(monkeypatch, "stage1.encoders", ARCHS={"Encoder": Encoder})
    decoders = stub(monkeypatch, "stage1.decoders")
    utils = module(monkeypatch, "stage1.decoders.utils", root / "decoders" / "utils.py")
    decoder = module(monkeypatch, "stage1.decoders.decoder", root / "decoders" / "decoder.py")
    decoders.GeneralDecoder = decoder.GeneralDecoder
    return types.SimpleNamespace(utils=utils, decoder=decoder, rae=module(monkeypatch, "stage1.rae", root / "rae.py"))


def settings(rae, name="ViTXL", size=None, latent=768):
    "The config of a decoder as RAE's constructor completes it, its sizes changed to ours."
    found = rae.utils.ViTMAEConfig(**json.loads((Path(RAE) / "configs" / "decoder" / name / "config.json").read_text()))
    found.hidden_size, found.patch_size, found.image_size = latent, 16, 256
    if size:
        found.decoder_hidden_size, found.decoder_num_hidden_layers, found.decoder_num_attention_heads, found.decoder_intermediate_size, found.patch_size = dataclasses.astuple(size)
        found.image_size = 4 * size.patch
    return found


def same(rae, size=SMALL, latent=32, grid=4):
    "Their decoder with random weights, and ours with the same."
    theirs = rae.decoder.GeneralDecoder(settings(rae, size=size, latent=latent), num_patches=grid**2).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad: parameter.data += 0.1 * torch.randn_like(parameter)
    ours = RAEDecoder(size, latent, (grid, grid)).eval()
    fill(Layout(decoder_names(ours)), theirs.state_dict(), "the reference")
    return theirs, ours


def largest(ours, theirs):
    "Largest difference relative to the largest value, for `pytest -s`."
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}: {difference:.1e}", end="")
    return difference


@needs_rae
@pytest.mark.parametrize("name, ours", [("ViTB", "B"), ("ViTL", "L"), ("ViTXL", "XL")])
def test_sizes_and_names(rae, name, ours):
    with torch.device("meta"):
        decoder = RAEDecoder(rae_decoder(ours), 768, (16, 16))
    with pytest.MonkeyPatch.context() as patch:       # numpy's positions can't be copied to the meta device: they have a test of their own
        patch.setattr(rae.decoder.GeneralDecoder, "initialize_weights", lambda self, patches: None)
        with torch.device("meta"):
            reference = rae.decoder.GeneralDecoder(settings(rae, name), 256)
    theirs = {key: tuple(t.shape) for key, t in reference.state_dict().items()}
    assert theirs == {key: tuple(t.shape) for key, t in decoder_names(decoder).items()} == {key: shape for key, (shape, _) in shapes("rae_decoder", ours).items()}
    trained = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (reference, decoder)]
    assert trained[0] == trained[1] and reference.decoder_layers[0].layernorm_before.eps == decoder.blocks[0].norm1.eps == decoder.norm.eps == reference.decoder_norm.eps
    assert reference.decoder_layers[0].attention.attention.num_attention_heads == decoder.blocks[0].heads


@needs_rae
@pytest.mark.parametrize("width, side", [(24, 4), (1152, 16), (768, 32)])
def test_positions(rae, width, side):
    theirs = torch.from_numpy(rae.decoder.get_2d_sincos_pos_embed(width, side, add_cls_token=True)).float()
    assert largest(positions((side, side), width), theirs) < 1e-6


@needs_rae
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_decoder(rae, dtype, tolerance):
    theirs, ours = (module.to(dtype) for module in same(rae))
    tokens = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    expected = theirs.unpatchify(theirs(tokens, drop_cls_token=False).logits)
    found = ours(tokens.transpose(1, 2).reshape(2, 32, 4, 4))
    assert largest(found, expected) < tolerance
    target = torch.randn_like(expected)
    wanted, = torch.autograd.grad((expected * target).sum(), theirs.decoder_pred.weight, retain_graph=True)
    got, = torch.autograd.grad((found * target).sum(), ours.out.weight, retain_graph=True)
    assert largest(got, wanted) < 10 * tolerance


@needs_rae
def test_the_published_size_computes_the_same(rae):
    theirs, ours = same(rae, dataclasses.replace(rae_decoder("XL"), depth=2), 768, 16)
    theirs.config.image_size = 256
    tokens = torch.randn(1, 256, 768)
    with torch.no_grad():
        assert largest(ours(tokens.transpose(1, 2).reshape(1, 768, 16, 16)), theirs.unpatchify(theirs(tokens).logits)) < 1e-5


@needs_rae
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_tokenizer_around_it(rae, monkeypatch, tmp_path, normalised, training):
    "RAE's own class with a small network in its place for DINOv2: resize, statistics, noise from the same seed, de-normalised pixels."
    network = dinov2(dict(model_type="dinov2_with_registers", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=7, image_size=42, num_register_tokens=4, layer_norm_eps=1e-6)).eval()
    without_affine(network.norm)
    representation = Representation(TimmTrunk(network), 32, 7, 4, 16, "bicubic", MEAN, STD)
    stats = {"mean": torch.randn(32, 4, 4), "var": torch.rand(32, 4, 4) + 0.1}
    torch.save(stats, tmp_path / "stat.pt")
    decoder = settings(rae, size=SMALL, latent=32)
    monkeypatch.setattr(rae.rae, "AutoConfig", types.SimpleNamespace(from_pretrained=lambda path: decoder), raising=False)
    monkeypatch.setattr(rae.rae, "AutoImageProcessor", types.SimpleNamespace(from_pretrained=lambda path: types.SimpleNamespace(image_mean=MEAN, image_std=STD)), raising=False)
    theirs = rae.rae.RAE("Encoder", encoder_input_size=28, encoder_params=dict(network=TimmTrunk(network)), decoder_patch_size=4, noise_tau=0.8, normalization_stat_path=str(tmp_path / "stat.pt") if normalised else None).eval()
    ours = FrozenTokenizer(representation, SMALL, noise=0.8).eval()
    for parameter in theirs.decoder.parameters():
        if parameter.requires_grad: parameter.data += 0.1 * torch.randn_like(parameter)
    fill(Layout(decoder_names(ours.decoder)), theirs.decoder.state_dict(), "the reference")
    if normalised: ours.normalise(**stats)
    theirs.training = training                          # only RAE itself: its encoder stays in evaluation mode
    image = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        torch.manual_seed(5)
        wanted = theirs.encode(image)
        torch.manual_seed(5)
        found = ours.perturb(ours.encode(image)) if training else ours.encode(image)
        assert largest(found, wanted) < 1e-5
        assert largest(ours.decode(wanted), theirs.decode(wanted)) < 1e-5


def test_the_encoder_is_that_of_transformers(tmp_path):
    "The layout of facebook/dinov2-with-registers-base, read by the class that RAE reads it with."
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: RAE's encoder can't be compared")
    if not hasattr(transformers, "Dinov2WithRegistersModel"): pytest.skip("another test has put a stand-in in the place of transformers")
    described = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=7, image_size=42, num_register_tokens=4)
    config = transformers.Dinov2WithRegistersConfig(**described)
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    tensors = synthetic("dinov2_registers", seed=3)
    assert {key: tuple(t.shape) for key, t in theirs.state_dict().items()} == {key: tuple(t.shape) for key, t in tensors.items()}
    theirs.load_state_dict(tensors)
    network = dinov2(json.loads(config.to_json_string())).eval()
    fill_dinov2(network, tensors, "the file")
    for height, width in ((28, 28), (42, 42), (28, 56)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            assert largest(network.forward_features(images), theirs(images).last_hidden_state) < 1e-5
    theirs.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    torch.save(synthetic("rae_decoder", seed=1), tmp_path / "model.pt")
    release = RAERelease(str(tmp_path), decoder="model.pt", statistics=None, encoder=str(tmp_path / "encoder"), size=RAEDecoderConfig(24, 2, 2, 40, patch=4), image_size=16)
    without_affine(network.norm)
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = Representation(TimmTrunk(network), 32, 7, 4, 16, "bicubic", MEAN, STD).patches(image)
        assert torch.equal(release.load().tokenizer.encode(image), expected)
    with torch.device("meta"):
        base = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14))
    assert {key: tuple(t.shape) for key, t in base.state_dict().items()} == {key: shape for key, (shape, _) in shapes("dinov2_registers", "base").items()}


def write_golden(name, values):
    "The last entry of a format's file: numbers with seven digits."
    path, mark = root() / f"data/formats/{name}.json", ',\n "golden": '
    before, found, _ = path.read_text().partition(mark)
    plain = {key: json.loads(re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.7g}", json.dumps(value.tolist()))) for key, value in values.items()}
    path.write_text((before if found else before.rstrip().removesuffix("}").rstrip()) + mark + json.dumps(plain) + "\n}\n")


@needs_rae
def test_the_whole_published_code(monkeypatch, tmp_path):
    "RAE's own class around transformers' own DINOv2, both reading the files of a release in small."
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: RAE's encoder can't be run")
    if not hasattr(transformers, "Dinov2WithRegistersModel"): pytest.skip("another test has put a stand-in in the place of transformers")
    monkeypatch.syspath_prepend(str(Path(RAE) / "src"))
    for name in ("stage1", "stage1.rae", "stage1.encoders", "stage1.decoders"): monkeypatch.delitem(sys.modules, name, raising=False)
    rae = importlib.import_module("stage1.rae")
    decoder = transformers.ViTMAEConfig(**json.loads((Path(RAE) / "configs/decoder/ViTXL/config.json").read_text()))
    decoder.decoder_hidden_size, decoder.decoder_num_hidden_layers, decoder.decoder_num_attention_heads, decoder.decoder_intermediate_size, _ = dataclasses.astuple(rae_case.SIZE)
    (tmp_path / "decoder").mkdir(), decoder.save_pretrained(tmp_path / "decoder")
    table = torch.from_numpy(importlib.import_module("stage1.decoders.decoder").get_2d_sincos_pos_embed(24, 4, add_cls_token=True)).float()
    release = rae_case.write(tmp_path, table[None])
    theirs = rae.RAE("Dinov2withNorm", str(tmp_path / "encoder"), 28, dict(dinov2_path=str(tmp_path / "encoder")), str(tmp_path / "decoder"), 4, str(tmp_path / "model.pt"), normalization_stat_path=str(tmp_path / "stat.pt")).eval()
    ours, image = release.load().tokenizer, rae_case.image()
    with torch.no_grad():
        theirs.do_normalization = False
        tokens = theirs.encode(image).flatten(2).mT
        theirs.do_normalization = True
        z = theirs.encode(image)
        wanted = rae_case.numbers(table, tokens, z, theirs.decode(z))
        found = rae_case.numbers(positions((4, 4), 24), ours.embed(image).patches, ours.encode(image), ours.decode(ours.encode(image)))
    if os.environ.get("RAE_GOLDEN"):
        write_golden("dinov2_registers", {name: wanted[name] for name in ("tokens", "z")})
        write_golden("rae_decoder", {name: wanted[name] for name in ("positions", "decoded")})
    assert all(largest(found[name], wanted[name]) < 1e-5 for name in wanted)
