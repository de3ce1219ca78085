"""UniTok's released file, made small from its public key list: read strictly, measured by every protocol, equal to what the public code computed."""
import json

import formats
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import HERE

from vtp.data.shapes import Shapes
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.zero_shot import Retrieval, ZeroShot
from vtp.flops import params
from vtp.generation.latents import CacheLatents, open_latents
from vtp.job import At, launch, load, run_of
from vtp.perceptual import PerceptualConfig
from vtp.run import root
from vtp.tokenizers import unitok
from vtp.tokenizers.unitok import RELEASED, UniTokConfig, UniTokRelease

LISTED = json.loads((root() / "data/formats/unitok.json").read_text())
DIMS = LISTED["sizes"]["tiny"]
ARGS = RELEASED | dict(model="vitamin_tiny", img_size=32, vocab_width=DIMS["L"], num_codebooks=DIMS["codebooks"], vocab_size=DIMS["codebooks"] * DIMS["codes"],
                       embed_dim=DIMS["E"], text_width=DIMS["T"], text_heads=2, text_layers=DIMS["layers"])
VAL = Shapes(count=32, size=32, split="val")


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(unitok.SIZES, "vitamin_tiny", dict(conv=DIMS["C"], width=DIMS["D"], depth=DIMS["depth"], heads=2))


@pytest.fixture
def release(tmp_path):
    "A training checkpoint in the published container, optimiser and all."
    weights = formats.synthetic("unitok", std=0.2)
    trainer = {"config": {"dcrit": "hg", "bcr": 4.0}, "unitok": weights, "disc": {"w": torch.ones(2)}, "unitok_optim": {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.95)}]}}}
    torch.save({"args": ARGS | {"lr": 5e-4, "exp_name": "tiny", "dtype": torch.bfloat16, "train_data": None}, "epoch": 1, "iter": 0, "trainer": trainer}, tmp_path / "unitok_tokenizer.pth")
    return UniTokRelease(str(tmp_path))


def test_published_shapes_are_those_of_the_config():
    "UniTok-Large and the base model, tensor by tensor, against the list made from the public classes."
    for size, model in (("published", "vitamin_large"), ("base", "vitamin_base")):
        listed = {key: torch.empty(shape, device="meta") for key, (shape, _) in formats.shapes("unitok", size).items()}
        config, head = unitok.configs(RELEASED | dict(model=model))
        with torch.device("meta"): parts = (tokenizer := config.build()), head.build(tokenizer)
        for part, found in zip(parts, unitok.parted(listed)):
            assert {k: v.shape for k, v in part.state_dict().items()} == {k: v.shape for k, v in found.items()}
    assert config.latent == 64 and unitok.configs(RELEASED)[0] == UniTokConfig()
    assert unitok.configs(RELEASED | dict(text_width=96, text_layers=5, text_heads=3, text_context_length=9, text_vocab_size=50, embed_dim=7))[1].text == unitok.TextConfig(96, 5, 3, 9, 50, 7)


def test_it_is_what_the_public_code_computed(release):
    golden, model = LISTED["golden"], load(release)
    tokenizer, clip = model.tokenizer, model.objectives["clip"]
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        assert tokenizer.codes(image).flatten(2).tolist() == golden["codes"]
        close = dict(decoded=2 * tokenizer(image)[:, :, 3::8, 3::8] - 1, image=clip.image_features(tokenizer, image), text=clip.text_features(clip.tokenise(["a photo of a dog", "two red birds on a tree, painted", "x"])))
        for name, found in close.items():
            expected = torch.tensor(golden[name])
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_every_protocol_measures_it(release):
    train = Shapes(count=48, size=32)
    evaluators = (ReconstructionQuality(data=VAL, samples=16, batch=8, perceptual=PerceptualConfig(kind="random_features")), ZeroShot(data=VAL, samples=16), Retrieval(data=VAL, samples=16),
                  LinearProbe(train=train, val=VAL, steps=4, batch=8), LinearProbe(train=train, val=VAL, tap="trunk", pool="cls+mean", blocks=(1, 2), steps=4, batch=8))
    latents = CacheLatents(At(release), VAL, samples=16, dtype="fp32")
    measured = Evaluate(At(release), evaluators)
    launch(measured, latents, machine=HERE)
    rows = {row["metric"]: row for row in run_of(measured).rows()}
    assert {"rPSNR", "SSIM", "colour_shift", "zero_shot", "text_to_image_R@1", "probe"} <= set(rows) and "clip_samples" not in rows["zero_shot"]
    z, _ = open_latents(latents).latents(np.arange(16), np.arange(16) % 2 > 0)
    assert z.shape == (16, 16, 2, 2) and z.norm(dim=1).allclose(torch.full((16, 2, 2), DIMS["codebooks"] ** 0.5), atol=1e-5)     # four unit vectors: after quantisation


def test_a_converted_file_is_the_same_model(release, tmp_path):
    held = torch.load(tmp_path / "unitok_tokenizer.pth", weights_only=True)
    file = tmp_path / "unitok_tokenizer.safetensors"
    save_file(held["trainer"]["unitok"], file, {"args": json.dumps({k: v for k, v in held["args"].items() if not isinstance(v, torch.dtype)})})
    image = torch.rand(1, 3, 32, 48)
    converted = UniTokRelease(str(file))
    with torch.no_grad(): assert load(converted).tokenizer(image).equal(load(release).tokenizer(image))
    assert converted.tokenizer == release.tokenizer and converted.objectives == release.objectives
    save_file(held["trainer"]["unitok"], file)
    assert converted.tokenizer == UniTokConfig()          # without settings it is taken for UniTok-Large


def test_on_the_meta_device_there_are_shapes_alone(release):
    model = release.build("meta")
    assert all(p.is_meta for p in model.parameters()) and params(model) == params(release.build())


class Code:
    def __reduce__(self): return print, ("ran",)


@pytest.mark.parametrize("change, says", [
    (lambda held: held["trainer"]["unitok"].pop("encoder.norm.bias"), "missing: encoder.norm.bias"),
    (lambda held: held["trainer"]["unitok"].update({"text_encoder.extra": torch.ones(1)}), "unexpected: text.extra"),
    (lambda held: held["trainer"]["unitok"].update({"fc_norm.bias": torch.ones(1)}), r"misshapen: fc_norm.bias \(1,\), not \(64,\)"),
    (lambda held: held["args"].update(quant_proj="linear"), "quant_proj"),
    (lambda held: held["args"].update(num_query=4), "query tokens"),
    (lambda held: held["args"].pop("vocab_size"), "lack vocab_size"),
    (lambda held: held["args"].update(text_heads="12"), "{'text_heads': '12'}"),
    (lambda held: held["args"].update(num_codebooks=0), "{'num_codebooks': 0}"),
    (lambda held: held.update(args=[1]), "no checkpoint of UniTok's trainer"),
    (lambda held: held["trainer"].update(unitok=[1]), "holds a list under unitok"),
    (lambda held: held["trainer"]["unitok"].update(step=1), r"more than tensors: \['step'\]"),
    (lambda held: held.pop("args"), "no checkpoint of UniTok's trainer"),
    (lambda held: held["trainer"].pop("unitok"), "no checkpoint of UniTok's trainer"),
    (lambda held: held.update(args=Code()), "would run code: it is refused. .* safetensors"),
])
def test_what_does_not_fit_is_refused(release, tmp_path, capfd, change, says):
    held = torch.load(tmp_path / "unitok_tokenizer.pth", weights_only=True)
    change(held)
    torch.save(held, tmp_path / "unitok_tokenizer.pth")
    with pytest.raises(ValueError, match=says): release.build()
    assert "ran" not in capfd.readouterr().out


def test_without_the_file_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download FoundationVision/unitok_tokenizer unitok_tokenizer.pth"): UniTokRelease().check()
    with pytest.raises(FileNotFoundError, match="folder without unitok_tokenizer.pth"): UniTokRelease(str(tmp_path)).check()


@pytest.mark.parametrize("args, says", [("[1]", "header are a list"), ("{", "header are not JSON"), ("{}", "args lack"), (json.dumps(RELEASED | {"model": 3}), "{'model': 3}")])
def test_settings_of_a_converted_file(tmp_path, args, says):
    save_file({"a": torch.zeros(2)}, tmp_path / "u.safetensors", {"args": args})
    with pytest.raises(ValueError, match=says): UniTokRelease(str(tmp_path / "u.safetensors")).tokenizer


def test_codes_are_searched_in_fp32_under_autocast(release):
    quantiser = release.build().tokenizer.quantizer
    tokens = torch.randn(2, 2000, DIMS["L"], generator=torch.Generator().manual_seed(0))
    alone = quantiser.codes(tokens)
    with torch.autocast("cpu", torch.bfloat16): assert quantiser.codes(tokens).equal(alone)


def test_what_only_the_decoder_uses(release):
    "`decoding` names what decode uses and CLIP head and encoder do not: tuning it leaves latents and zero-shot alone."
    model, image = release.build(), torch.rand(1, 3, 32, 32)
    tokenizer, clip = model.tokenizer, model.objectives["clip"]
    used = {name for name, p in tokenizer.named_parameters() if p.requires_grad}
    tokenizer.decode(tokenizer.encode(image).detach()).sum().backward()
    drawn = {name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name in used if name.startswith(tokenizer.decoding)} == {name for name in drawn if not name.startswith("post_quant_proj.")}
    tokenizer.zero_grad()
    clip.image_features(tokenizer, image).square().sum().backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is not None and name.startswith(tokenizer.decoding)]


def test_taps_and_blocks(release):
    tokenizer, image = release.build().tokenizer, torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        z = tokenizer.encode(image)
        assert tokenizer.embed(image, "latent").patches.equal(z.flatten(2).mT) and tokenizer.embed(image).patches.shape[2] == tokenizer.width("trunk") != tokenizer.width("latent")
    for n in (0, DIMS["depth"] + 1):
        with pytest.raises(ValueError, match=f"the trunk has {DIMS['depth']} blocks, not {n}"): tokenizer.intermediate(image, n)


def test_the_head_norms_as_published(release):
    model = release.build()
    norm = model.objectives["clip"].fc_norm
    faint = 1e-3 * torch.randn(4, norm.normalized_shape[0], generator=torch.Generator().manual_seed(0))
    centred = faint - faint.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    assert torch.allclose(norm(faint), expected, atol=1e-4)
