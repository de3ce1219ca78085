"""VILA-U's vision tower, made small from the public classes' key lists: read strictly, measured, equal to what the public code computed; no zero-shot."""
import json
import shutil

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
from vtp.evaluation.zero_shot import ZeroShot
from vtp.generation.latents import CacheLatents, open_latents
from vtp.job import At, launch, load, run_of
from vtp.perceptual import PerceptualConfig
from vtp.run import root
from vtp.tokenizers.vila_u import SIGLIP, VILAURelease, siglip

LISTED = json.loads((root() / "data/formats/vila_u.json").read_text())
VAL = Shapes(count=32, size=32, split="val")


def write(folder, size="tiny", shards=1, change=lambda tensors, rq, siglip: None):
    "A VILA-U folder at a size of the list; with more than one shard, and with an index, as large models are saved."
    said, tensors = json.loads(json.dumps(LISTED["configs"][size])), formats.synthetic("vila_u", size, std=0.15)
    said["vision_tower"]["rqvaesiglip"]["pretrained_model"] = str(folder / "siglip")
    change(tensors, said["vision_tower"]["rqvaesiglip"], said["siglip"]["vision_config"])
    for name, config in said.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    parts = {name: {k: tensors[k] for k in sorted(tensors)[i::shards]} for i, name in enumerate(names)}
    for name, part in parts.items(): save_file(part, folder / "vision_tower" / name, {"format": "pt"})
    if shards > 1: (folder / "vision_tower/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {k: name for name, part in parts.items() for k in part}}))
    return VILAURelease(str(folder))


@pytest.mark.parametrize("size, shards", [("tiny", 1), ("tiny_interpolated", 3)])
def test_it_is_what_the_public_code_computed(tmp_path, size, shards):
    release, golden = write(tmp_path, size, shards), LISTED["golden"][size]
    assert len(release.files) == (2 if shards == 1 else 2 + shards)
    tokenizer = load(release).tokenizer
    image = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        assert tokenizer.codes(image).movedim(1, -1).tolist() == golden["codes"]
        for name, found in dict(decoded=2 * tokenizer(image)[:, :, 3::8, 3::8] - 1, trunk=tokenizer.embed(image).patches[:, ::9, :4]).items():
            expected = torch.tensor(golden[name])
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_it_is_measured_but_for_zero_shot(tmp_path):
    release, train = write(tmp_path), Shapes(count=48, size=32)
    evaluators = (ReconstructionQuality(data=VAL, samples=16, batch=8, perceptual=PerceptualConfig(kind="random_features")), LinearProbe(train=train, val=VAL, steps=4, batch=8),
                  LinearProbe(train=train, val=VAL, tap="trunk", pool="cls+mean", blocks=(1, 2), steps=4, batch=8))
    latents, measured = CacheLatents(At(release), VAL, samples=16, dtype="fp32"), Evaluate(At(release), evaluators)
    launch(measured, latents, machine=HERE)
    assert {"rPSNR", "SSIM", "probe"} <= {row["metric"] for row in run_of(measured).rows()}
    books = [formats.synthetic("vila_u", std=0.15)[f"rqvaesiglip.quantizer.codebooks.{i}.weight"][:-1] for i in range(3)]
    z, _ = open_latents(latents).latents(np.arange(16), np.arange(16) % 2 > 0)
    sums = (books[0][:, None, None] + books[1][None, :, None] + books[2]).flatten(0, 2)
    assert z.shape == (16, 32, 8, 8) and torch.cdist(z[:, :, 0].mT.flatten(0, 1), sums).min(1).values.max() < 1e-2 * sums.norm(dim=1).mean()     # each is a sum of three codes: after quantisation
    with pytest.raises(ValueError, match="no text tower"): launch(Evaluate(At(release), (ZeroShot(data=VAL),)), machine=HERE)


def test_copies_of_a_shared_codebook_are_taken_if_they_are_alike(tmp_path):
    def copies(tensors, rq, siglip):
        for i in (1, 2): tensors[f"rqvaesiglip.quantizer.codebooks.{i}.weight"] = tensors["rqvaesiglip.quantizer.codebooks.0.weight"].clone()
    def unlike(tensors, rq, siglip):
        copies(tensors, rq, siglip)
        tensors["rqvaesiglip.quantizer.codebooks.2.weight"][0] += 1
    once, often = (write(tmp_path / name, "tiny_interpolated", change=change).build() for name, change in (("once", lambda *_: None), ("often", copies)))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): assert once.tokenizer(image).equal(often.tokenizer(image))
    with pytest.raises(ValueError, match="codebooks of its steps differ"): write(tmp_path / "unlike", "tiny_interpolated", change=unlike).build()


def test_known_siglips_need_no_file_and_others_are_looked_up(tmp_path):
    assert siglip("google/siglip-large-patch16-256").grid == 16 and siglip("google/siglip-so400m-patch14-384").grid == 27 and len(SIGLIP) == 2
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 64, "model_type": "siglip_vision_model"}}))
    assert siglip(str(tmp_path)).image_size == 64 and siglip(str(tmp_path)).hidden_size == 768                    # what the file leaves out is SigLIP's default
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "quick_gelu"}}))
    with pytest.raises(ValueError, match="quick_gelu"): siglip(str(tmp_path))


@pytest.mark.parametrize("change, says", [
    (lambda tensors, rq, siglip: tensors.pop("rqvaesiglip.post_quant_conv.bias"), "missing: post_quant_conv.bias"),
    (lambda tensors, rq, siglip: tensors.update({"rqvaesiglip.extra": torch.ones(1)}), "unexpected: extra"),
    (lambda tensors, rq, siglip: tensors.update({"rqvaesiglip.decoder.conv_out.bias": torch.ones(4)}), "misshapen: decoder.conv_out.bias"),
    (lambda tensors, rq, siglip: rq.update(code_shape=[4, 4, 3]), "not one code for each"),
    (lambda tensors, rq, siglip: rq.update(decoder_latent_shape=[6, 6]), "would come back with 24"),
    (lambda tensors, rq, siglip: rq["ddconfig"].update(give_pre_end=True), "only LDM's decoder"),
    (lambda tensors, rq, siglip: rq.pop("n_embed"), "no 'n_embed'"),
    (lambda tensors, rq, siglip: siglip.update(num_hidden_layers=4), "not 4 blocks deep"),
])
def test_what_does_not_fit_is_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says): write(tmp_path, change=change).build()


def test_on_the_meta_device_there_are_shapes_alone(tmp_path):
    release = write(tmp_path)
    model = release.build("meta")
    assert all(p.is_meta for p in model.parameters()) and {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in release.build().state_dict().items()}


def test_without_the_file_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download mit-han-lab/vila-u-7b-256 vision_tower/config.json.*\n.*hf download mit-han-lab/vila-u-7b-256 vision_tower/model.safetensors"): VILAURelease().check()
    with pytest.raises(FileNotFoundError, match="folder without"): VILAURelease(str(tmp_path)).check()


@pytest.mark.parametrize("outside", ["../../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors", "..", "outside.bin", 3])
def test_an_index_names_files_beside_it_only(tmp_path, outside):
    release = write(tmp_path / "vila", shards=2)
    index = tmp_path / "vila/vision_tower/model.safetensors.index.json"
    shutil.copy(index.with_name("model-00001-of-00002.safetensors"), tmp_path / "outside.safetensors")
    said = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {k: outside if "00001" in name else name for k, name in said.items()}}))
    for call in (release.check, release.load):
        with pytest.raises(ValueError, match=r"index.json names \[.*beside their index"): call()
    for held in ({"metadata": {}}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(held))
        with pytest.raises(ValueError, match="index.json has no weight_map"): release.check()


def test_descriptions_of_another_kind_are_named(tmp_path):
    release, config = write(tmp_path / "vila"), tmp_path / "vila/vision_tower/config.json"
    for held, says in (("not json", "config.json is not JSON"), ("[1]", "config.json holds a list"), ("{}", "config.json has no 'rqvaesiglip'"), ('{"rqvaesiglip": [1]}', "not of VILA-U's form"), ('{"rqvaesiglip": {"ddconfig": 1, "code_shape": 3}}', "not of VILA-U's form")):
        config.write_text(held)
        with pytest.raises(ValueError, match=says): release.tokenizer
    with pytest.raises(ValueError, match="model.safetensors is not JSON"): VILAURelease(str(config.with_name("model.safetensors"))).tokenizer
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no vision_config"): siglip(str(tmp_path))


def test_it_sees_one_size(tmp_path):
    tokenizer = write(tmp_path).build().tokenizer
    assert not tokenizer.any_size                           # one size, which a measurement must keep to
    with pytest.raises(ValueError, match="fit 32×32 only"): tokenizer.encode(torch.rand(1, 3, 64, 64))


def test_codes_are_searched_in_fp32_under_autocast(tmp_path):
    quantiser = write(tmp_path).build().tokenizer.quantizer
    features = torch.randn(2, 2000, 32, generator=torch.Generator().manual_seed(0)) / 5
    alone = quantiser.codes(features)
    with torch.autocast("cpu", torch.bfloat16): assert quantiser.codes(features).equal(alone)


def test_what_only_the_decoder_uses(tmp_path):
    tokenizer = write(tmp_path).build().tokenizer
    tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 32, 32)).detach()).square().sum().backward()
    drawn = {name for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert drawn == {name for name, _ in tokenizer.named_parameters() if name.startswith(tokenizer.decoding)} and any(name.startswith("post_quant_conv.") for name in drawn)


def test_attention_at_sides_that_never_occur_is_none(tmp_path):
    def change(tensors, rq, siglip): rq["ddconfig"]["attn_resolutions"] = [*rq["ddconfig"]["attn_resolutions"], 3, 512]
    plain, odd = write(tmp_path / "plain"), write(tmp_path / "odd", change=change)
    assert odd.tokenizer.decoder == plain.tokenizer.decoder


def test_taps_and_blocks(tmp_path):
    tokenizer, image = write(tmp_path).build().tokenizer, torch.rand(1, 3, 32, 32)
    with torch.no_grad(): assert tokenizer.embed(image, "latent").patches.equal(tokenizer.encode(image).flatten(2).mT) and not tokenizer.embed(image).patches.equal(tokenizer.encode(image).flatten(2).mT)
    for n in (0, 9):
        with pytest.raises(ValueError, match=f"blocks, not {n}"): tokenizer.intermediate(image, n)


@pytest.mark.parametrize("change, says", [
    (lambda tensors, rq, siglip: rq["ddconfig"].update(resamp_with_conv=False), "only LDM's decoder"),
    (lambda tensors, rq, siglip: rq["ddconfig"].update(out_ch=4), "only LDM's decoder"),
    (lambda tensors, rq, siglip: rq.update(decoder_latent_shape=[8, 9]), "not square"),
    (lambda tensors, rq, siglip: rq.update(latent_shape=[8, 8, 16]), "not one code for each"),
    (lambda tensors, rq, siglip: rq.update(embed_dim=16), "not one code for each"),
])
def test_towers_of_another_form_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says): write(tmp_path, change=change).tokenizer


def test_running_statistics_are_left_behind_and_the_label_tells_codes(tmp_path):
    def change(tensors, rq, siglip):
        for i in range(3): tensors |= {f"rqvaesiglip.quantizer.codebooks.{i}.{name}": torch.ones(2) for name in ("cluster_size_ema", "embed_ema")}
    release = write(tmp_path, change=change)
    assert not [name for name in release.build().state_dict() if "ema" in name] and release.tokenizer.label == "vila-u-32-rq-d32-3x24"
