"""OpenCLIP, CLIP, SigLIP, MAE and DINOv2: published key lists are the libraries' own, and releases made from them are measured like any model."""
import json
import os
from dataclasses import replace

import pytest
import timm
import torch
from formats import shapes, synthetic
from safetensors.torch import save_file
from tiny import HERE

from vtp.config import digest, dumps, loads
from vtp.data.imagenet import openai_templates
from vtp.data.shapes import Shapes
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.trunk_probe import TrunkProbe
from vtp.evaluation.zero_shot import Retrieval, ZeroShot, text_classifier
from vtp.job import At, launch, run_of
from vtp.text import import_open_clip
from vtp.tokenizers.discriminative import DISCRIMINATIVE, OpenCLIP, TimmModel, release, words_hash

open_clip = import_open_clip()
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}, "text_cfg": TEXT}
SIGLIP = {"embed_dim": 96, "init_logit_bias": -10, "custom_text": True,
          "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
          "text_cfg": {"context_length": 64, "vocab_size": 512, "hf_tokenizer_name": "nobody/has-this", "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 32, "heads": 2,
                       "layers": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}}


def folder_of(folder, config, tensors, weights="open_clip_model.safetensors"):
    "A release as open_clip publishes it."
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}))
    save_file(tensors, folder / weights) if weights.endswith("safetensors") else torch.save(tensors, folder / weights)
    return OpenCLIP(str(folder), weights=weights)


def normed(images, mean=MEAN, std=STD):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "Runs of the test's own, and no network."
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("listed,name", [("open_clip", "ViT-B-16"), ("open_clip", "ViT-L-14"), ("open_clip", "ViT-H-14"),
                                         ("open_clip_siglip", "ViT-B-16-SigLIP"), ("open_clip_siglip", "ViT-L-16-SigLIP-256"), ("open_clip_siglip", "ViT-SO400M-14-SigLIP"),
                                         ("timm_vit", "vit_large_patch16_224.mae"), ("timm_vit", "vit_large_patch14_dinov2.lvd142m"), ("timm_vit", "vit_large_patch14_reg4_dinov2.lvd142m")])
def test_lists_are_the_libraries(listed, name):
    "Names, shapes and dtypes in data/formats are those of the class that the library builds at the published size."
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0) if listed == "timm_vit" else open_clip.create_model(name, load_weights=False, device="meta")
    assert shapes(listed, name) == {key: (tuple(t.shape), t.dtype) for key, t in network.state_dict().items()}


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_clip_is_measured_like_any_model(home, weights):
    "Strict from either container, bit-equal to open_clip's own loader, and through zero-shot, retrieval and both probes of the trunk as a job."
    released = folder_of(home / "tiny", CLIP, synthetic("open_clip"), weights)
    assert loads(dumps(released)) == released
    images, texts = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a striped star", "two dogs"]
    model = At(released).load()
    clip, tokenizer = model.objectives["clip"], model.tokenizer
    theirs = open_clip.create_model(f"local-dir:{home / 'tiny'}").eval()
    with torch.no_grad():
        assert clip.image_features(tokenizer, images).equal(theirs.encode_image(normed(images), normalize=True))
        assert clip.text_features(clip.tokenise(texts)).equal(theirs.encode_text(open_clip.tokenize(texts), normalize=True))
        ours = text_classifier(clip, ("ant", "bee", "dog"), openai_templates(), "cpu")
        words = open_clip.get_tokenizer("ViT-B-32")
        official = open_clip.build_zero_shot_classifier(theirs, words, ("ant", "bee", "dog"), [lambda c, t=t: t.replace("{a} {c}", ("an " if c == "ant" else "a ") + c).replace("{c}", c) for t in openai_templates()])
        assert torch.allclose(ours, official.T, atol=1e-6)
        read = tokenizer.intermediate(images, 2)
        last = theirs.forward_intermediates(normed(images), image_indices=2, normalize_intermediates=True, intermediates_only=True, image_output_fmt="NLC", image_output_extra_tokens=True)
        assert all(t.patches.equal(p) and t.cls.equal(c[:, 0]) and t.registers.shape == (3, 0, 32) for t, p, c in zip(read, last["image_intermediates"], last["image_intermediates_prefix"], strict=True))
    assert not tokenizer.any_size                           # one size, which a measurement must keep to
    train, val = Shapes(count=200, size=32, classes=8), Shapes(count=60, size=32, classes=8, split="val")
    job = Evaluate(At(released), (ZeroShot(data=val), Retrieval(data=val), LinearProbe(train=train, val=val, tap="trunk", pool="cls+mean", steps=5, batch=64, blocks=(1, 3)),
                                  TrunkProbe(train=train, val=val, epochs=1, epoch_steps=3, batch=32, blocks=(1, 3), size=32, resize=36, dtype="fp32")))
    run, = launch(job, machine=HERE)
    rows = run.rows()
    assert [row["metric"] for row in rows] == ["zero_shot", "zero_shot_top5", *(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)), *["probe"] * 4]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 100 for row in rows) and {row["size"] for row in rows} == {32}
    assert {row["file"] for row in run_of(released).rows()} == {"open_clip_config.json", weights}


def test_siglip_towers(home):
    "The sigmoid family's list loads strictly; features are open_clip's; scale and bias written as vectors are the same numbers."
    tensors = synthetic("open_clip_siglip")
    released = folder_of(home / "siglip", SIGLIP, tensors)
    vectors = folder_of(home / "vectors", SIGLIP, tensors | {k: tensors[k].reshape(1) for k in ("logit_scale", "logit_bias")})
    model, other = released.build(), vectors.build()
    images, ids = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)), torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1))
    theirs = open_clip.create_model(f"local-dir:{home / 'siglip'}").eval()
    model.eval(), other.eval()
    with torch.no_grad():
        seen = model.objectives["clip"].image_features(model.tokenizer, images)
        assert seen.equal(theirs.encode_image(normed(images), normalize=True)) and seen.equal(other.objectives["clip"].image_features(other.tokenizer, images))
        assert model.objectives["clip"].text_features(ids).equal(theirs.encode_text(ids, normalize=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    val = Shapes(count=20, size=32, classes=8, split="val")
    with pytest.raises(ValueError, match="no ViT trunk with a class token: nothing of it can be probed"):
        TrunkProbe(train=val, val=val, size=160, resize=160).check(released)


def test_siglip_words(home):
    "A vocabulary of transformers beside the weights: SigLIP's ids are open_clip's, and it is asked by text as a job."
    transformers = pytest.importorskip("transformers", reason="SigLIP's words need the package transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    listed = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "the", "red", "blue", "circle", "square", "star"]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    released = folder_of(home / "siglip", SIGLIP, synthetic("open_clip_siglip"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(home / "siglip")
    texts = ["A photo of the RED circle!", "a blue_star"]
    ids = released.build().objectives["clip"].tokenise(texts)
    assert ids.equal(open_clip.get_tokenizer(f"local-dir:{home / 'siglip'}")(texts)) and ids.shape == (2, 64) and ids[0, :6].tolist() == [3, 4, 5, 6, 7, 9]
    run, = launch(Evaluate(At(released), (ZeroShot(data=Shapes(count=20, size=32, classes=8, split="val")),)), machine=HERE)
    assert [row["metric"] for row in run.rows()] == ["zero_shot", "zero_shot_top5"] and run.rows()[0]["size"] == 160
    assert [row["file"] for row in run_of(released).rows()] == ["open_clip_config.json", "open_clip_model.safetensors", "words of nobody/has-this"]
    file = home / "siglip/tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"pink"'))                     # other words are another model
    with pytest.raises(ValueError, match="words of nobody/has-this changed since"):
        released.load()


@pytest.mark.parametrize("name", ["model.safetensors", "pretrain.pth"])
def test_timm_is_probed_like_any_model(home, name):
    "timm's layout and the authors' ({'model': …}): strict, bit-equal to timm's intermediate layers, and through both probes of the trunk as a job."
    tensors = synthetic("timm_vit")
    save_file(tensors, home / name) if name.endswith("safetensors") else torch.save({"model": tensors}, home / name)
    released = TimmModel(str(home / name), model="test_vit", image_size=160)
    own = timm.create_model("test_vit", num_classes=0).eval()
    own.load_state_dict(tensors)
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    mean, std = own.pretrained_cfg["mean"], own.pretrained_cfg["std"]
    model = At(released).load()
    with torch.no_grad():
        for ours, (patches, prefix) in zip(model.tokenizer.intermediate(images, 4), own.get_intermediate_layers(normed(images, mean, std), 4, return_prefix_tokens=True, norm=True), strict=True):
            assert ours.patches.equal(patches) and ours.cls.equal(prefix[:, 0]) and ours.registers.shape[1] == 0
    train, val = Shapes(count=40, size=32, classes=8), Shapes(count=24, size=32, classes=8, split="val")
    trunk = TrunkProbe(train=train, val=val, epochs=1, epoch_steps=2, batch=16, size=64, resize=64, dtype="fp32")
    run, = launch(Evaluate(At(released), (LinearProbe(train=train, val=val, tap="trunk", pool="cls+mean", steps=2, batch=16), trunk)), machine=HERE)
    assert [(row["metric"], row["tap"], row["size"]) for row in run.rows()] == [("probe", "trunk", 160)] * 2 + [("probe", "trunk", 64)] * 2
    assert {row["blocks"] for row in run.rows()} <= {1, 4}


def test_what_cannot_be_measured_is_said_first(home):
    "Features have no latent, MAE has no text tower, a CLIP has one size: refused by the check, before anything is computed."
    save_file(synthetic("timm_vit"), home / "model.safetensors")
    mae, clip = TimmModel(str(home), model="test_vit", image_size=160), folder_of(home / "tiny", CLIP, synthetic("open_clip"))
    data = Shapes(count=200, size=32, classes=8)
    probe = LinearProbe(train=data, val=data, steps=5, batch=64)
    trunk = TrunkProbe(train=data, val=data, blocks=(1, 3))
    for released, evaluator, said in ((mae, probe, "no latent"), (clip, probe, "no latent"), (mae, ZeroShot(data=data), "no text tower"), (clip, trunk, "sees 32×32"),
                                      (clip, replace(trunk, size=32, resize=32, blocks=(4,)), "3 blocks"), (mae, replace(trunk, size=160, resize=160, blocks=(7,)), "6 blocks")):
        with pytest.raises(ValueError, match=said):
            launch(Evaluate(At(released), (evaluator,)), machine=HERE)
    with pytest.raises(ValueError, match="no latent"):
        mae.build().tokenizer.encode(torch.rand(1, 3, 160, 160))


class Trap:
    "What a pickle would run when it is read."
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_files_that_do_not_fit(home, monkeypatch):
    "Missing, unexpected and misshapen keys are listed; code in a pickle is not run; bytes changed after the run are noticed."
    monkeypatch.chdir(home)
    tensors = synthetic("open_clip")
    for wrong, said in (({k: v for k, v in tensors.items() if k != "visual.ln_post.bias"}, r"1 missing: visual\.ln_post\.bias"), (tensors | {"visual.head": torch.zeros(2)}, r"1 unexpected: visual\.head"),
                        (tensors | {"text_projection": torch.zeros(32, 8)}, r"misshapen: text_projection \(32, 8\), not \(32, 16\)")):
        with pytest.raises(ValueError, match=said):
            folder_of(home / "wrong", CLIP, wrong).build()
    released = folder_of(home / "code", CLIP, tensors | {"trap": Trap()}, "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="would run code"):
        released.build()
    assert not (home / "trapped").exists()
    released = folder_of(home / "tiny", CLIP, tensors)
    launch(released, machine=HERE)
    folder_of(home / "tiny", CLIP, synthetic("open_clip", seed=1))
    with pytest.raises(ValueError, match="changed since"):
        released.load()


def test_releases_by_name(home):
    "open_clip's table gives source, architecture and normalisation; its traps are refused; what can't be fetched comes with the command."
    laion = release("ViT-L-14", "laion2b_s32b_b82k")
    assert laion == DISCRIMINATIVE["OpenCLIP"][0] and laion.described()[1]["mean"] == (0.5,) * 3
    assert (vitamin := release("ViTamin-S", "datacomp1b")).source == "jienengchen/ViTamin-S" and vitamin.files == ("pytorch_model.bin",)
    assert laion.build("meta").tokenizer.image_size == 224 and release("ViT-L-14", "laion400m_e32").described()[1]["mean"][0] != 0.5
    assert digest(laion) != digest(replace(laion, revision="0" * 40))
    for call, said in ((lambda: release("ViT-L-14", "openai"), "ViT-L-14-quickgelu"), (lambda: release("ViT-Z", "openai"), "no such model"), (lambda: OpenCLIP("x", model="ViT-L-14"), "give both"),
                       (lambda: release("coca_ViT-L-14", "laion2b_s13b_b90k").build("meta"), "captioner"), (lambda: release("roberta-ViT-B-32", "laion2b_s12b_b32k").build("meta"), "two towers")):
        with pytest.raises(ValueError, match=said):
            call()
    for name, (job, _) in DISCRIMINATIVE.items():
        with pytest.raises(FileNotFoundError, match=rf"hf download {job.source} {job.files[-1]}"):
            job.check()
    folder = folder_of(home / "siglip", SIGLIP, synthetic("open_clip_siglip"))
    with pytest.raises((ImportError, FileNotFoundError), match="pip install transformers|hf download nobody/has-this"):
        folder.check()


def test_a_vocabulary_has_a_hash_of_words_and_rules():
    class Known:
        def __init__(self, words, lower=True): self.tokenizer, self.words, self.lower = self, words, lower
        def get_vocab(self): return self.words
        def __call__(self, texts): return torch.tensor([[self.words.get(word, 0) for word in (text.lower() if self.lower else text).split()[:3]] for text in texts])
    words = {"a": 1, "photo": 2, "of": 3}
    found = [words_hash(Known(*each)) for each in ((words,), (dict(reversed(words.items())),), (words | {"dog": 4},), ({"a": 2, "photo": 1, "of": 3},), (words, False))]
    assert found[0] == found[1] and len(set(found)) == 4 and len(found[0]) == 64


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("text_cfg"), "open_clip_config.json of .*model_cfg lacks text_cfg"),
    (lambda c: c.update(vision_cfg=3), "lacks vision_cfg"),
    (lambda c: c.pop("embed_dim"), "lacks embed_dim"),
    (lambda c: c["vision_cfg"].update(bogus=1), "knows no vision_cfg.bogus"),
    (lambda c: c["text_cfg"].update(bogus=1), "knows no text_cfg.bogus"),
    (lambda c: c.update(bogus=1), "knows no model_cfg.bogus"),
    (lambda c: c["vision_cfg"].update(layers="three"), "can't build this model_cfg"),
])
def test_descriptions_that_open_clip_cannot_build(home, change, says):
    config = json.loads(json.dumps(CLIP))
    change(config)
    released = folder_of(home / "tiny", config, {"a": torch.zeros(2)})
    for call in (released.check, released.build):
        with pytest.raises(ValueError, match=says):
            call()


def test_descriptions_that_are_none(home):
    released = folder_of(home / "tiny", CLIP, {"a": torch.zeros(2)})
    for held, says in (("<html>", "is not JSON"), ("[1]", "holds a list"), ('{"model_cfg": 3}', "no model_cfg")):
        (home / "tiny/open_clip_config.json").write_text(held)
        with pytest.raises(ValueError, match=f"open_clip_config.json.*{says}"):
            released.build()
    save_file({"a": torch.zeros(2)}, home / "model.safetensors")
    for name, says in (("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"), ("resnet18", "is not a ViT")):
        with pytest.raises(ValueError, match=says):
            TimmModel(str(home), model=name).check()


def test_building_draws_no_random_numbers_and_downloads_nothing(home):
    "Random numbers of a job do not depend on what it reads; a config that asks timm for its own weights gets none."
    pretrained = SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_pretrained": True}}
    released = folder_of(home / "siglip", pretrained, synthetic("open_clip_siglip"))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    released.build()
    assert torch.rand(3).equal(expected)


def test_only_square_images(home):
    config = CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"image_size": [32, 48]}}
    with pytest.raises(ValueError, match="32×48: only square ones"):
        folder_of(home / "wide", config, {"a": torch.zeros(2)}).build("meta")


def test_one_token_for_each_patch():
    "DINOv2's patch of 14 makes 16 × 16 of 224 pixels, MAE's of 16 makes 14 × 14."
    grids = {name: DISCRIMINATIVE[name][0].build("meta").tokenizer.representation.grid for name in ("DINOv2", "MAE")}
    assert grids == {"DINOv2": (16, 16), "MAE": (14, 14)}
