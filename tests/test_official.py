"""Official VTP checkpoints: equal to the official code (stored numbers), strict, used by every evaluator, continued, written again."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from official_cases import CHANGES, checkpoint, inputs, outputs, write
from safetensors.torch import load_file, save_file
from test_reference_official import EXACT, GOLDEN, GOLDEN_SIZES, places
from tiny import HERE, clip, rec, ssl

from vtp.config import digest, dumps, loads
from vtp.data.augment import CropConfig
from vtp.data.shapes import Shapes
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.trunk_probe import TrunkProbe
from vtp.evaluation.zero_shot import ZeroShot
from vtp.generation.latents import CacheLatents, open_latents
from vtp.job import At, launch, load, run_of
from vtp.objectives.contrastive import Contrastive
from vtp.objectives.overall import Overall
from vtp.perceptual import PerceptualConfig
from vtp.pretrain import Pretrain
from vtp.text import bpe
from vtp.tokenizers.official import OfficialVTP, read_config, to_official
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig


@pytest.fixture
def released(tmp_path):
    return write(tmp_path / "VTP-Tiny", CHANGES["released"])


@pytest.mark.parametrize("rope", ["faithful", "exact"])
@pytest.mark.parametrize("case", CHANGES)
def test_golden(case, rope, tmp_path):
    "Values and lengths of the official code's outputs: in its bf16 RoPE to 5e-5, and in fp64 to 1e-6 (of the largest value, and of the length)."
    golden, change = json.loads(GOLDEN.read_text())["cases"][case], CHANGES[case]
    model, tolerance = OfficialVTP(str(write(tmp_path, change)), rope=rope).load(), 5e-5 if rope == "faithful" else EXACT.get(case, 1e-6)
    for size in GOLDEN_SIZES.get(case, ((48, 32),)):
        found = outputs(model, change, *size)
        for name, (length, values) in golden["×".join(map(str, size))][rope].items():
            scale = 1. if name == "logits" else found[name].abs().max().item()                        # logits: cosines times a scale of about 1
            far = (found[name].flatten()[places(found[name])].double() - torch.tensor(values, dtype=torch.float64)).abs().max().item() / scale
            assert far < tolerance, f"{name} {size}: {far:.1e}"
            assert abs(found[name].double().norm().item() - length) < tolerance * max(length, scale), f"{name} {size}"


def test_the_two_modes_differ(released):
    "The stored numbers tell one from the other: bf16 tables move features by more than either tolerance."
    faithful, exact = (outputs(OfficialVTP(str(released), rope=rope).load(), CHANGES["released"]) for rope in ("faithful", "exact"))
    for name, least in (("latents", 2e-5), ("cls", 1e-4), ("image", 1e-4), ("pixels", 1e-4)): assert (faithful[name] - exact[name]).norm() / exact[name].norm() > least
    assert torch.equal(faithful["text"], exact["text"])


def test_conventions(released):
    "Official methods take normalised images, ours take [0, 1]."
    model, (image, z, ids) = OfficialVTP(str(released)).load(), inputs(CHANGES["released"])
    encoder, clip = model.tokenizer.encoder, model.objectives["clip"]
    plain = image * encoder.std + encoder.mean
    with torch.no_grad():
        assert torch.allclose(model.tokenizer.encode(plain), model.get_reconstruction_latents(image), atol=2e-3)        # a last bit of a pixel may become one of bf16
        assert torch.allclose(model.tokenizer.decode(z), model.get_latents_decoded_images(z) * encoder.std + encoder.mean, atol=1e-6)
        assert torch.allclose(clip.image_features(model.tokenizer, plain), model.get_clip_image_feature(image), atol=2e-3)
        assert torch.allclose(clip.text_features(ids[:1, :16]), model.get_clip_text_feature(ids[:1]), atol=1e-6)          # cut or padded, the same
        scores = model.get_clip_logits(image, bpe(["a dog", "a cat", "a red square"]))[0]
    assert scores.shape == (2, 3) and model.config.text_context_length == 77


@pytest.mark.parametrize("size", [(40, 32), (32, 250), (15, 16)])
def test_sizes_that_do_not_fit_are_refused_with_the_fix(released, size):
    model, image = OfficialVTP(str(released)).load(), torch.zeros(1, 3, *size)
    for ask in (model.get_reconstruction_latents, model.get_clip_image_feature, model.get_last_layer_feature, model.get_intermediate_layers_feature):
        with pytest.raises(ValueError, match="multiples of the patch, 16; resize or crop to"): ask(image)
    assert model.get_latents_decoded_images(torch.zeros(1, 8, 3, 5)).shape == (1, 3, 48, 80)


def test_what_a_checkpoint_lacks(tmp_path):
    silent, blind = (OfficialVTP(str(write(tmp_path / name, CHANGES[name]))).load() for name in ("no_text", "no_decoder"))
    image, z, ids = inputs(CHANGES["no_text"])
    for ask in (lambda: silent.get_clip_image_feature(image), lambda: silent.get_clip_text_feature(ids)):
        with pytest.raises(RuntimeError, match="train_clip"): ask()
    with pytest.raises(RuntimeError, match="train_reconstruction"): blind.get_latents_decoded_images(z)
    with pytest.raises(ValueError, match="no pixel decoder"): blind.tokenizer.decode(z)


@pytest.mark.parametrize("change,says", [({"vision_registers": 4}, "vision_registers"), ({"model_type": "clip"}, "'clip'"), ({"vision_ffn_layer": "geglu"}, "vision_… of config.json: ffn='geglu'"), ({"decoder_num_heads": 3}, "decoder_… of config.json"),
                                         ({"text_embed_cls": True}, "text_embed_cls"), ({"vision_clip_feat": "mean"}, "vision_clip_feat"), ({"text_num_heads": 5}, "heads=5")])
def test_configs_that_are_refused(tmp_path, change, says):
    release = OfficialVTP(str(write(tmp_path, CHANGES["released"])))
    (tmp_path / "config.json").write_text(json.dumps(CHANGES["released"] | change))
    with pytest.raises(ValueError, match=says): release.load()


def test_strict(released):
    "Unexpected, missing and misshapen tensors are listed under their official names."
    tensors = checkpoint(CHANGES["released"])
    del tensors["trunk.blocks.0.mlp.w2.bias"], tensors["ln_final.weight"]
    tensors |= {"teacher_trunk.cls_token": torch.ones(1), "trunk.feature_bottleneck.weight": torch.ones(4, 64), "logit_scale": torch.ones(1)}
    save_file(tensors, released / "model.safetensors")
    with pytest.raises(ValueError) as error: OfficialVTP(str(released)).load()
    for said in ("1 unexpected: teacher_trunk.cls_token", "2 missing: ln_final.weight, trunk.blocks.0.mlp.w2.bias", "trunk.feature_bottleneck.weight (4, 64), not (8, 64)", "logit_scale (1,), not ()"): assert said in str(error.value), error.value
    tensors = checkpoint(CHANGES["released"])
    del tensors["trunk.mask_token"]
    save_file(tensors, released / "model.safetensors")
    with pytest.raises(ValueError, match="trunk.mask_token is missing"): OfficialVTP(str(released)).load()
    tensors = checkpoint(CHANGES["released"])
    tensors["trunk.rope_embed.periods"] = tensors["trunk.rope_embed.periods"] * 2
    save_file(tensors, released / "model.safetensors")
    with pytest.raises(ValueError, match="other RoPE periods"): OfficialVTP(str(released)).load()


@pytest.mark.parametrize("case", CHANGES)
def test_round_trip_to_the_bit(case, tmp_path):
    "Official file → model → official file; and the objects say where they came from."
    release = OfficialVTP(str(write(tmp_path / "first", CHANGES[case])), rope="exact")
    folder = to_official(release.load(), tmp_path / "second")
    first, second = (load_file(place / "model.safetensors") for place in (tmp_path / "first", folder))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert read_config(folder / "config.json") == read_config(tmp_path / "first/config.json")
    assert loads(dumps(release)) == release and loads(dumps(release.tokenizer)) == release.tokenizer and all(loads(dumps(o)) == o for o in release.objectives)
    assert set(release.build("meta").state_dict()) == set(release.load().state_dict())


OURS = ViTConfig(width=64, depth=2, heads=2, layer_scale=.2)
TOKENIZER = ViTTokenizerConfig(32, OURS, replace(OURS, norm="layernorm", ffn="mlp"), 8)
VIEW = dict(crop=CropConfig(32))
TERMS = clip(**VIEW), ssl(patch=16, crop=CropConfig(32, (.32, 1.), flip=.5), local=CropConfig(16, (.05, .32), flip=.5)), rec(**VIEW)


@pytest.mark.parametrize("terms", [TERMS, TERMS[::2], TERMS[2:], (replace(TERMS[0], loss="siglip", tap="latent"), TERMS[2])], ids=lambda terms: "+".join(o.name for o in terms))
def test_a_training_becomes_an_official_checkpoint(terms, tmp_path):
    "What is trained here computes the same when read from the official format."
    torch.manual_seed(0)
    model = Overall(TOKENIZER.build(), terms).eval()
    with torch.no_grad():
        for parameter in model.parameters(): parameter.add_(.02 * torch.randn_like(parameter))
    again, image = OfficialVTP(str(to_official(model, tmp_path)), rope="exact").load(), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again.tokenizer.encode(image), model.tokenizer.encode(image)) and torch.equal(again.tokenizer(image), model.tokenizer(image))
        for theirs, ours in zip(again.objectives.values(), [o for name, o in model.objectives.items() if name == "clip"], strict=True):
            ids = ours.tokenise(["a red square", "two circles"])
            assert torch.equal(theirs.image_features(again.tokenizer, image), ours.image_features(model.tokenizer, image)) and torch.equal(theirs.text_features(ids), ours.text_features(ids))
            assert theirs.config.loss == ours.config.loss and theirs.config.tap == ours.config.tap
    masks = [o.mask_token for name, o in model.objectives.items() if name == "ssl"] or [torch.zeros(64)]
    assert torch.equal(again.mask_token[0], masks[0])


@pytest.mark.parametrize("config,says", [(replace(TOKENIZER, trunk=replace(OURS, registers=1)), "trunk.registers=1"), (replace(TOKENIZER, trunk=replace(OURS, patch=8), decoder=replace(OURS, patch=8)), "decoder.patch=8"),
                                         (replace(TOKENIZER, latent=64), "latent=64"), (replace(TOKENIZER, decoder=replace(OURS, ffn_ratio=2.)), "decoder.ffn_ratio=2.0"), (replace(TOKENIZER, trunk=replace(OURS, rope_normalize="max")), "rope_normalize='max'")])
def test_what_the_official_class_cannot_express_is_refused(config, says, tmp_path):
    with pytest.raises(ValueError, match=says): to_official(Overall(config.build(), (rec(**VIEW),)), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="text.dim=16"): to_official(Overall(TOKENIZER.build(), (clip(**VIEW, text=replace(TERMS[0].text, dim=16)),)), tmp_path)
    with pytest.raises(ValueError, match="fp64"): to_official(Overall(TOKENIZER.build(), (rec(**VIEW),)).double(), tmp_path)


TRAIN, VAL = Shapes(count=64, size=32), Shapes(count=32, size=32, split="val")


def test_every_evaluator(released, monkeypatch, tmp_path):
    "A release stands where a training does: reconstruction, probes of latent and trunk, zero-shot, cached latents."
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))
    release = OfficialVTP(str(released))
    probe = dict(train=TRAIN, val=VAL, steps=5, batch=16)
    evaluators = (ReconstructionQuality(data=VAL, perceptual=PerceptualConfig(kind="random_features")), LinearProbe(**probe), LinearProbe(**probe, pool="flat"), LinearProbe(**probe, tap="trunk", pool="cls+mean", blocks=(1, 2)),
                  TrunkProbe(train=TRAIN, val=VAL, epochs=1, epoch_steps=2, batch=16, blocks=(1, 2), size=32, resize=36, dtype="fp32"), ZeroShot(data=VAL))
    evaluation = Evaluate(At(release), evaluators)
    launch(evaluation, machine=HERE)
    rows = run_of(evaluation).rows()
    assert {"rPSNR", "SSIM", "colour_shift", "probe", "zero_shot"} <= {row["metric"] for row in rows} and not any("samples" in row for row in rows)
    cached = CacheLatents(At(release), VAL, dtype="fp32", batch=8)
    launch(cached, machine=HERE)
    reader, tokenizer = open_latents(cached), load(At(release)).tokenizer
    image = torch.from_numpy(reader.read(np.array([3]), reader.keys[[3]])[0].image).movedim(-1, 0)[None] / 255
    with torch.no_grad(): assert torch.allclose(reader.latents([3], [False])[0], tokenizer.encode(image), atol=2e-3)
    assert [row["file"] for row in run_of(release).rows()] == ["config.json", "model.safetensors"]


def test_training_goes_on_from_a_release(released, monkeypatch, tmp_path):
    "The weights' names are those of Eq. 2, so a training starts from them: its first step is the release's, its teacher too."
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))
    release = OfficialVTP(str(released), rope="exact")
    state, (contrast,) = release.load().state_dict(), release.objectives
    assert type(release.tokenizer) is ViTTokenizerConfig and type(contrast) is Contrastive
    assert set(state) <= set(Overall(release.tokenizer.build(), (contrast, *TERMS[1:])).state_dict())
    job = Pretrain(release.tokenizer, TRAIN, (replace(contrast, batch=16), *TERMS[1:]), steps=2, dtype="fp32", log_every=1, start=At(release))
    job.check()
    model = job.build(start=state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    launch(job, machine=HERE)
    trained = load(At(job))
    moved = [name for name, value in trained.state_dict().items() if name in state and not torch.equal(value, state[name])]
    assert len(moved) > .9 * len(state)
    again = OfficialVTP(str(to_official(trained, tmp_path / "out")), rope="exact").load()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.tokenizer.encode(image), trained.tokenizer.encode(image)) and torch.equal(again.mask_token[0], trained.objectives["ssl"].mask_token)


def test_a_release_has_a_name_and_an_address(released, monkeypatch):
    release = OfficialVTP("MiniMaxAI/VTP-Large-f16d64", "main")
    assert release.label() == "VTP-Large-f16d64" and digest(release) == digest(OfficialVTP("MiniMaxAI/VTP-Large-f16d64", "main", "faithful"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download MiniMaxAI/VTP-Large-f16d64 config.json --revision main"): release.check()
    (released / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="folder without model.safetensors"): OfficialVTP(str(released)).check()


def test_light(released, tmp_path):
    "Matrices left in a bf16 file: the numbers of rounded weights, written once, read any number of times."
    release, file = OfficialVTP(str(released), rope="exact"), tmp_path / "half.safetensors"
    first, rounded = release.light(file), release.load()
    written = file.stat().st_mtime_ns
    second = release.light(file)
    for layer in rounded.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)): layer.weight.data = layer.weight.data.bfloat16().float()
    want = outputs(rounded, CHANGES["released"])
    for model in (first, second, second):
        found = outputs(model, CHANGES["released"])
        assert all(torch.allclose(found[name], want[name], atol=2e-6) for name in want)
    assert file.stat().st_mtime_ns == written and file.stat().st_size < (released / "model.safetensors").stat().st_size
