"""Rooms 43d and 43e against the code of UniTok and of VILA-U, when environment variables name checkouts of them.

    git clone https://github.com/FoundationVision/UniTok
    git clone https://github.com/mit-han-lab/vila-u
    UNITOK_REFERENCE=$PWD/UniTok VILAU_REFERENCE=$PWD/vila-u python -m pytest -s tests/test_reference_discrete.py

Compared with commits bb8012e of UniTok and 096623c of vila-u. Only the model files are loaded, so that none of their other dependencies has to be there.
Changes made to their text before it runs, none of which changes what is computed: UniTok's widths are made small, and two signatures take the arguments that
a newer timm than its own (1.0.8) passes; VILA-U's decoder, which casts to bf16 in three places, keeps the dtype that it is given.

DISCRETE_GOLDEN=1 also writes what the references computed into data/formats, which the tests without checkouts compare with.
"""
import contextlib
import importlib
import io
import json
import os
import re
import sys
import types
from pathlib import Path

import formats
import pytest
import torch
from torch import nn

from vtp.run import root
from vtp.text import bpe
from vtp.tokenizers import unitok, vila_u

UNITOK, VILAU = os.environ.get("UNITOK_REFERENCE"), os.environ.get("VILAU_REFERENCE")
needs_unitok = pytest.mark.skipif(not UNITOK, reason="UNITOK_REFERENCE does not name a checkout of FoundationVision/UniTok")
needs_vilau = pytest.mark.skipif(not VILAU, reason="VILAU_REFERENCE does not name a checkout of mit-han-lab/vila-u")
TEXTS = ["a photo of a dog", "two red birds on a tree, painted", "x"]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def image(batch=2, size=32):
    "Blocks of 8 pixels: tokens of noise alone are too much alike to choose different codes."
    return torch.rand(batch, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture
def modules():
    "Makes modules by name; afterwards whatever was imported under the same first names is as it was."
    names = "utils", "models", "open_clip", "transformers", "vila_u"
    ours = {name: found for name, found in sys.modules.items() if name.split(".")[0] in names}
    for name in ours: del sys.modules[name]

    def make(name, **holds):
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(holds)
        module.__path__ = []
        if "." in name and name.rpartition(".")[0] in sys.modules: setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        return module

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in names]: del sys.modules[name]
    sys.modules.update(ours)


def run_file(module, path, *changes):
    "Run a file's text in `module`, after (pattern, replacement) changes that must all be found."
    text = path.read_text()
    for old, new in changes:
        assert re.search(old, text), f"{path.name} no longer has {old}"
        text = re.sub(old, new, text)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def plain(tensor):
    "Nested lists, of whole numbers or with seven digits."
    return json.loads(re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.7g}", json.dumps(tensor.tolist())))


def write_golden(name, values):
    "The last entry of a format's file."
    if os.environ.get("DISCRETE_GOLDEN"):
        path, mark = root() / f"data/formats/{name}.json", ',\n "golden": '
        before, found, _ = path.read_text().partition(mark)
        path.write_text((before if found else before.rstrip().removesuffix("}")) + mark + json.dumps(values) + "}\n")


# ---- UniTok


def args(**changes):
    small = dict(num_query=0, model="vitamin_large", img_size=32, drop_path=0.1, quant_proj="attn", vocab_size=64, vocab_width=16, vq_beta=0.25, le=0.0, e_temp=0.01, num_codebooks=4, grad_ckpt=False)
    text = dict(text_width=32, text_heads=2, text_layers=2, text_vocab_size=49408, text_context_length=77, embed_dim=24)
    return types.SimpleNamespace(**small | text | changes)


@pytest.fixture
def reference_unitok(modules, monkeypatch):
    "UniTok's class, with small widths."
    bpe(["x"])                                          # ours, before its own copy of open_clip stands in the way
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]: del sys.modules[name]
    monkeypatch.syspath_prepend(UNITOK)
    modules("utils")
    modules("utils.dist", initialized=lambda: False)
    modules("utils.config", Args=object)
    modules("models")
    widths = [(re.escape("(160, 320, 1024)"), "(8, 16, 64)"), ("stem_width=160", "stem_width=8"), ("embed_dim=1024, depth=31, num_heads=16", "embed_dim=64, depth=3, num_heads=2"), (re.escape("(1024, 320, 160)"), "(64, 16, 8)")]
    newer = [(r"dynamic_img_pad=False,\n    \):", "dynamic_img_pad=False, device=None, dtype=None):"), (r"act_layer = None,\n        drop = 0.0,\n", "act_layer=None, drop=0.0, **more\n")]
    for name in ("vitamin", "quant", "vqvae", "unitok"):
        with contextlib.redirect_stdout(io.StringIO()): run_file(modules(f"models.{name}"), Path(UNITOK) / f"models/{name}.py", *(widths + newer if name == "vitamin" else ()))
    return sys.modules["models.unitok"].UniTok


@needs_unitok
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projection", ["attn", "linear"])
def test_unitok_computes_what_the_reference_computes(reference_unitok, monkeypatch, projection):
    monkeypatch.setitem(unitok.SIZES, "vitamin_large", dict(conv=8, width=64, depth=3, heads=2))
    said = args(quant_proj=projection)
    theirs = reference_unitok(said).eval()
    assert ({k: tuple(v.shape) for k, v in theirs.state_dict().items()} == {k: shape for k, (shape, _) in formats.shapes("unitok").items()}) == (projection == "attn")
    weights = formats.synthetic("unitok", std=0.2)
    for name, tensor in theirs.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape: weights[name] = 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    theirs.load_state_dict({k: weights[k] for k in theirs.state_dict()})
    config, head = unitok.configs(vars(said))
    ours = config.build().eval()
    clip = head.build(ours).eval()
    for part, own in zip((ours, clip), unitok.parted(theirs.state_dict())): part.load_state_dict(own)
    with torch.no_grad():
        for size in (32, 64):
            x = image(2, size)
            codes, z = theirs.img_to_idx(2 * x - 1), ours.encode(x)
            assert ours.codes(x).flatten(2).equal(codes) and codes.unique().numel() > 4
            expected = theirs.decoder(theirs.post_quant_proj(theirs.quantizer.idx_to_f(codes)))
            errors = dict(trunk=relative(ours.embed(x).patches, theirs.encoder(2 * x - 1)), z=relative(z.flatten(2).mT, theirs.quantizer.idx_to_f(codes)), decode=relative(2 * ours.decode(z) - 1, expected),
                          image=relative(clip.image_features(ours, x), theirs.encode_image(2 * x - 1, True)), text=relative(clip.text_features(clip.tokenise(TEXTS)), theirs.encode_text(bpe(TEXTS), True)))
            print(projection, size, {name: f"{error:.1e}" for name, error in errors.items()})
            assert max(errors.values()) < 1e-5
        assert importlib.import_module("open_clip.tokenizer").tokenize(TEXTS, context_length=77).equal(bpe(TEXTS))
        if projection == "attn":
            x = image()
            codes = theirs.img_to_idx(2 * x - 1)
            decoded = theirs.decoder(theirs.post_quant_proj(theirs.quantizer.idx_to_f(codes)))
            write_golden("unitok", dict(codes=plain(codes), decoded=plain(decoded[:, :, 3::8, 3::8]), image=plain(theirs.encode_image(2 * x - 1, True)), text=plain(theirs.encode_text(bpe(TEXTS), True))))


# ---- VILA-U


class Config:
    "What the files need of transformers' PretrainedConfig."

    def __init__(self, **values):
        self.__dict__.update(dict(output_attentions=False, output_hidden_states=False, use_return_dict=True), **values)

    @classmethod
    def from_pretrained(cls, path, **_):
        return cls(**json.loads((Path(path) / "config.json").read_text()))


class Pretrained(nn.Module):
    "What the files need of transformers' PreTrainedModel."

    def __init__(self, config, *_, **__):
        super().__init__()
        self.config = config

    def post_init(self): pass

    @classmethod
    def _from_config(cls, config): return cls(config)


@pytest.fixture
def reference_vilau(modules):
    "VILA-U's tower class; SigLIP included, its depth transformer left out."
    bare = lambda *_, **__: lambda thing: thing
    automatic = types.SimpleNamespace(register=lambda *_: None)
    modules("transformers", PreTrainedModel=Pretrained, PretrainedConfig=Config, AutoConfig=automatic, AutoModel=automatic)
    modules("transformers.activations", ACT2FN={"gelu_pytorch_tanh": nn.GELU(approximate="tanh")})
    modules("transformers.modeling_outputs", BaseModelOutput=dict, BaseModelOutputWithPooling=dict)
    modules("transformers.modeling_utils", PreTrainedModel=Pretrained)
    modules("transformers.configuration_utils", PretrainedConfig=Config)
    modules("transformers.utils", ModelOutput=dict, add_start_docstrings=bare, add_start_docstrings_to_model_forward=bare, replace_return_docstrings=bare, logging=types.SimpleNamespace(get_logger=lambda _: None))
    folder = Path(VILAU) / "vila_u/model/multimodal_encoder/rqvaesigliptransformer/rqvaesiglip"
    for name in ("vila_u", "vila_u.siglip"): modules(name)
    files = {"configuration_rqvaesiglip": (), "modules": ((r"\.to\(torch\.bfloat16\)", ""),), "quantizations": (), "siglip.configuration_siglip": (), "siglip.modeling_siglip": (), "modeling_rqvaesiglip": ((r"\.to\(torch\.bfloat16\)", ""),)}
    for name, changes in files.items():
        module = modules(f"vila_u.{name}")
        module.__package__ = f"vila_u.{name}".rpartition(".")[0]
        run_file(module, folder / f"{name.replace('.', '/')}.py", *changes)
        if name == "siglip.modeling_siglip": sys.modules["vila_u.siglip"].SiglipModel = module.SiglipModel
    return sys.modules["vila_u.modeling_rqvaesiglip"].RQVAESiglipModel, sys.modules["vila_u.configuration_rqvaesiglip"].RQVAESiglipConfig


@needs_vilau
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["tiny", "tiny_interpolated"])
def test_vilau_computes_what_the_reference_computes(reference_vilau, tmp_path, size):
    model, config = reference_vilau
    said = json.loads((root() / "data/formats/vila_u.json").read_text())["configs"][size]
    (tmp_path / "config.json").write_text(json.dumps(said["siglip"]))
    said["vision_tower"]["rqvaesiglip"]["pretrained_model"] = str(tmp_path)
    theirs = model(config(**said["vision_tower"]["rqvaesiglip"])).eval()
    weights = formats.synthetic("vila_u", size, std=0.15)
    left = theirs.load_state_dict({k.removeprefix("rqvaesiglip."): v for k, v in weights.items() if k.startswith("rqvaesiglip.")}, strict=False)
    assert not left.unexpected_keys and all(re.search(r"siglip_model\.logit|codebooks\.[12]\.", k) for k in left.missing_keys), left     # the same tensors under another name
    settings = vila_u.config_of(said["vision_tower"])
    ours = settings.build().eval()
    ours.load_state_dict(vila_u.kept(weights, settings))
    x = image(3)
    with torch.no_grad():
        codes, z = theirs.encode_image(2 * x - 1)
        assert ours.codes(x).movedim(1, -1).equal(codes) and codes.unique().numel() > 4
        decoded = theirs.decode(z)
        errors = dict(z=relative(ours.encode(x).movedim(1, -1), z), decode=relative(2 * ours.decode(ours.encode(x)) - 1, decoded))
        hidden = []
        theirs.siglip_model.vision_model.encoder.layers[1].register_forward_hook(lambda _, __, found: hidden.append(found[0]))
        theirs.encode_image(2 * x - 1)
        errors["trunk"] = relative(ours.embed(x).patches, hidden[0])
    print(size, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5
    golden = json.loads((root() / "data/formats/vila_u.json").read_text()).get("golden", {})
    write_golden("vila_u", golden | {size: dict(codes=plain(codes), decoded=plain(decoded[:, :, 3::8, 3::8]), trunk=plain(hidden[0][:, ::9, :4]))})
