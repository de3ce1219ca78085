"""Frozen representations: timm's own features, any checkpoint of ours, exact statistics in any number of processes."""
import copy
import signal
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import HERE, job, rec
from torch import nn

import vtp.tokenizers.statistics as package
from vtp.config import dumps, loads
from vtp.data.samples import Bad
from vtp.data.shapes import Shapes
from vtp.finetune_decoder import FinetuneDecoder
from vtp.job import At, Machine, inputs, launch, run_of
from vtp.objectives.adversarial import Adversarial, PatchGAN
from vtp.tokenizers.representation import OwnTrunk, TimmRepresentation, TimmTrunk
from vtp.tokenizers.statistics import LatentStatistics


def weights(folder, name="test_vit", suffix=".safetensors", seed=0, wrap=lambda state: state, **options):
    "A file of random weights, and the network they are of."
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    file = folder / f"{name}{seed}{suffix}"
    save_file(network.state_dict(), file) if suffix == ".safetensors" else torch.save(wrap(network.state_dict()), file)
    return str(file), network


def first(**changes):
    return job((rec(mse=0.0),), **{**dict(steps=4, log_every=2, keep=(2,)), **changes})


@pytest.mark.parametrize("pixels", ["own", "signed"])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_features_are_timms(tmp_path, pixels, resize):
    file, network = weights(tmp_path)
    found = TimmRepresentation("test_vit", file, image_size=32, stride=8, resize=resize, pixels=pixels).build()
    image = torch.rand(2, 3, 32, 48)
    fed = nn.functional.interpolate(image, (64, 96), mode=resize, align_corners=False)
    mean, std = (torch.tensor(network.pretrained_cfg[k] if pixels == "own" else (0.5,) * 3).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((fed - mean) / std)
    tokens = found(image)
    assert torch.equal(tokens.cls, expected[:, 0]) and torch.equal(tokens.patches, expected[:, 1:]) and tokens.registers.shape == (2, 0, 64)
    assert found.grid == (4, 4) and torch.equal(found.patches(image)[1, :, 2, 5], expected[1, 1 + 2 * 6 + 5])


def test_registers_and_networks_without_class_token():
    for name, options, prefix in (("test_vit", dict(reg_tokens=3), 4), ("test_vit3", dict(reg_tokens=2), 2), ("test_vit3", dict(reg_tokens=0), 0)):
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options).eval()
        trunk = TimmTrunk(network)
        assert network.has_class_token == (name == "test_vit")
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            tokens, features = trunk(image), network.forward_features(image)
            assert torch.equal(tokens.patches, features[:, prefix:]) and tokens.registers.shape[1] == prefix - network.has_class_token
            assert torch.equal(tokens.cls, features[:, 0] if network.has_class_token else features[:, prefix:].mean(1))
            last = trunk.intermediate(image, 2)
            assert len(last) == 2 and all(torch.equal(a, b) for a, b in zip(last[-1], tokens))
    with pytest.raises(ValueError, match="n=10"):
        trunk.intermediate(image, 10)


def test_a_pickled_file_and_the_authors_wrapping(tmp_path):
    file, network = weights(tmp_path)
    other, _ = weights(tmp_path, suffix=".pth", wrap=lambda state: {"model": state | {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}})
    a, b = (TimmRepresentation("test_vit", f, image_size=32).build() for f in (file, other))
    assert a.hash == b.hash and a.hash != TimmRepresentation("test_vit", weights(tmp_path, seed=1)[0], image_size=32).build().hash


class Evil:
    def __reduce__(self):
        return print, ("code has run",)


def test_what_is_not_the_networks_is_refused(tmp_path, capsys):
    file, network = weights(tmp_path)
    good = TimmRepresentation("test_vit", file, image_size=32)
    state = network.state_dict()
    for broken, words in (({k: v for k, v in state.items() if k != "norm.weight"}, "norm.weight"), (state | {"more": torch.zeros(1)}, "more")):
        save_file(broken, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match=words):
            replace(good, weights=str(tmp_path / "broken.safetensors")).check()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        replace(good, weights=str(tmp_path / "list.pth")).check()
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="refused"):
        replace(good, weights=str(tmp_path / "evil.pth")).check()
    assert "code has run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="hf download timm/test_vit.r160_in1k model.safetensors"):
        replace(good, weights=str(tmp_path / "nowhere.safetensors")).check()
    for model, words in (("no_such_vit", "not a ViT"), ("resnet18", "not a ViT"), ("test_vit2", "only after pooling")):
        with pytest.raises(ValueError, match=words):
            replace(good, model=model).check()
    for changes, words in ((dict(image_size=30), "multiple of stride"), (dict(resize="nearest"), "resize"), (dict(pixels="raw"), "pixels")):
        with pytest.raises(ValueError, match=words):
            replace(good, **changes)
    with pytest.raises(ValueError, match="resize or crop to 32×32 or 48×48"):
        good.build()(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("suffix, wrap", [(".safetensors", None), (".pth", lambda state: {"model": state}), (".pth", lambda state: {"state_dict": state}), (".pth", lambda state: {f"visual.trunk.{k}": v for k, v in state.items()})])
@pytest.mark.parametrize("options, words", [(dict(img_size=96), r"pos_embed is \(1, 37, 64\), not \(1, 101, 64\): another grid"), (dict(patch_size=8, img_size=80), r"patch_embed.proj.weight is \(64, 3, 8, 8\), not \(64, 3, 16, 16\): another patch")])
def test_weights_of_another_grid_or_patch_are_not_resampled(tmp_path, suffix, wrap, options, words):
    other = weights(tmp_path, suffix=suffix, wrap=wrap, **options)[0]
    with pytest.raises(ValueError, match=words):
        TimmRepresentation("test_vit", other, image_size=32).check()
    own, network = weights(tmp_path, suffix=suffix, wrap=wrap, seed=1)
    found = TimmRepresentation("test_vit", own, image_size=32).build()
    assert torch.equal(found.trunk.network.pos_embed, network.pos_embed) and torch.equal(found.trunk.network.patch_embed.proj.weight, network.patch_embed.proj.weight)


def test_the_authors_dinov2_with_registers_has_one_position_more(tmp_path):
    "Theirs is that of the class token, which timm adds to the token."
    network = timm.create_model("vit_small_patch14_reg4_dinov2.lvd142m", num_classes=0)
    state = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in network.state_dict().items()} | {"mask_token": torch.zeros(1, 384), "pos_embed": torch.rand(1, 1370, 384)}
    torch.save(state, tmp_path / "dinov2.pth")
    found = TimmRepresentation("vit_small_patch14_reg4_dinov2.lvd142m", str(tmp_path / "dinov2.pth")).build().trunk.network
    assert torch.equal(found.pos_embed, state["pos_embed"][:, 1:]) and torch.equal(found.cls_token, network.cls_token + state["pos_embed"][:, :1])
    torch.save(state | {"pos_embed": torch.rand(1, 257, 384)}, tmp_path / "dinov2.pth")
    with pytest.raises(ValueError, match="another grid"):
        TimmRepresentation("vit_small_patch14_reg4_dinov2.lvd142m", str(tmp_path / "dinov2.pth")).check()


def test_offline_the_command_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download timm/vit_tiny_patch16_224.augreg_in21k model.safetensors --local-dir"):
        TimmRepresentation("vit_tiny_patch16_224.augreg_in21k").check()


@pytest.mark.parametrize("model, width, patch, registers", [("vit_large_patch14_dinov2.lvd142m", 1024, 14, 0), ("vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, 4), ("vit_large_patch16_224.mae", 1024, 16, 0)])
def test_shapes_alone_on_the_meta_device(model, width, patch, registers):
    with torch.device("meta"):
        found = TimmRepresentation(model).build()
        tokens = found(torch.empty(1, 3, 256, 256))
    assert (found.width, found.patch, found.grid) == (width, patch, (16, 16)) and all(p.is_meta for p in found.parameters())
    assert tokens.patches.shape == (1, 256, width) and tokens.registers.shape == (1, registers, width) and found.grid_of(512, 384) == (32, 24)


def test_the_trunk_of_any_checkpoint():
    pretrained = first()
    launch(pretrained, machine=HERE)
    image = torch.rand(3, 3, 16, 16)
    found = OwnTrunk(At(pretrained)).build()
    model = pretrained.load()
    with torch.no_grad():
        assert torch.equal(found(image).patches, model.tokenizer.embed(image).patches)
        assert all(torch.equal(a.cls, b.cls) for a, b in zip(found.intermediate(image, 2), model.tokenizer.intermediate(image, 2), strict=True))
    assert OwnTrunk(At(pretrained, 2)).build().hash != found.hash and found.grid == (4, 4) and found.width == 32
    tuned = FinetuneDecoder(At(pretrained), Shapes(count=64, size=16), rec(mse=0.0), steps=2, adversarial=Adversarial(PatchGAN(8, 1), start_generator=0.5), dtype="fp32")
    launch(tuned, machine=HERE)
    assert OwnTrunk(At(tuned)).build().hash == found.hash
    config = OwnTrunk(At(tuned), stride=8, affine=False)
    assert loads(dumps(config)) == config and inputs(config) == (tuned,) and config.spent()["decoder_samples"] == 16
    bare = config.build()(image).patches
    torch.testing.assert_close(bare.square().mean(-1), torch.ones(3, 4), rtol=1e-3, atol=1e-3)


def test_frozen_whatever_its_holder_does(tmp_path):
    found = TimmRepresentation("test_vit", weights(tmp_path)[0], image_size=32).build()
    holder = nn.ModuleDict({"representation": found}).train()
    before = found.hash
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    found(image).patches.square().sum().backward()
    assert image.grad.abs().sum() > 0 and not any(m.training for m in found.modules()) and all(p.grad is None and not p.requires_grad for p in holder.parameters())
    assert found.hash == before == copy.deepcopy(found).hash


def statistics(tmp_path, **changes):
    base = dict(representation=TimmRepresentation("test_vit", weights(tmp_path)[0], image_size=32, affine=False), data=Shapes(count=30, size=32), batch=4, slices=4)
    return LatentStatistics(**{**base, **changes})


def tensors_of(job):
    return (run_of(job).path / "statistics.safetensors").read_bytes()


def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    found = statistics(tmp_path)
    launch(found, machine=HERE)
    alone = tensors_of(found)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "two"))
    launch(found, machine=Machine(procs=2, workers=1, device="cpu"))
    assert tensors_of(found) == alone and found.load()["mean"].shape == (64, 2, 2)
    assert run_of(found).rows()[0]["images"] == 30


def test_statistics_continue_where_they_were_killed(tmp_path, monkeypatch):
    found, step, seen = statistics(tmp_path), package._slice, []

    def killed(*args, fail=False):
        seen.append(args)
        if fail and len(seen) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(package, "_slice", partial(killed, fail=True))
    with pytest.raises(KeyboardInterrupt):
        launch(found, machine=HERE)
    with pytest.raises(FileNotFoundError, match="launch the job first"):
        found.load()
    monkeypatch.setattr(package, "_slice", killed)
    launch(found, machine=HERE)
    assert len(seen) == 5                                              # two slices were kept
    whole = tensors_of(found)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "again"))
    launch(found, machine=HERE)
    assert tensors_of(found) == whole


def test_statistics_refuse_what_they_cannot_do(tmp_path):
    for changes, words in ((dict(resize="crop"), "resize"), (dict(dtype="fp16"), "dtype"), (dict(batch=0), "at least 1")):
        with pytest.raises(ValueError, match=words):
            statistics(tmp_path, **changes)
    with pytest.raises(ValueError, match="ask for 1 … 30"):
        launch(statistics(tmp_path, samples=31), machine=HERE)


def test_statistics_finish_their_slice_when_told_to_stop(tmp_path, monkeypatch):
    found, step, seen = statistics(tmp_path), package._slice, []

    def stopped(*args):
        seen.append(args)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(package, "_slice", stopped)
        with pytest.raises(InterruptedError, match="launch again to continue"):
            launch(found, machine=HERE)
        assert len(seen) == 2 and len(list((run_of(found).path / "slices").glob("*.safetensors"))) == 2
        launch(found, machine=HERE)
        assert len(seen) == 4
    whole = tensors_of(found)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "again"))
    launch(found, machine=HERE)
    assert tensors_of(found) == whole


def test_statistics_of_other_weights_are_refused(tmp_path):
    found = statistics(tmp_path)
    launch(found, machine=HERE)
    representation = found.representation.build()
    assert found.measured_with(representation).keys() == {"mean", "var"}
    other = TimmRepresentation("test_vit", weights(tmp_path, seed=1)[0], image_size=32, affine=False).build()
    with pytest.raises(ValueError, match=f"was measured with representation {representation.hash}, but here is {other.hash}"):
        found.measured_with(other)


@pytest.mark.parametrize("bad, passes", [(11, False), (10, True)])
def test_too_many_bad_images_are_an_error(tmp_path, monkeypatch, bad, passes):
    found, reader = statistics(tmp_path, bad_rate=0.0), type(Shapes(count=30, size=32).open())
    whole = reader.read
    monkeypatch.setattr(reader, "read", lambda self, indices, *rest: [Bad("", "", "torn") if i < bad else pair for i, pair in zip(indices, whole(self, indices, *rest), strict=True)])
    if not passes:
        with pytest.raises(RuntimeError, match="11 of 30 images were bad, more than bad_rate=0.0"):
            launch(found, machine=HERE)
        with pytest.raises(FileNotFoundError):
            found.load()
        return
    launch(found, machine=HERE)
    row, = run_of(found).rows()
    assert (row["images"], row["skipped"]) == (20, 10)
    mean = found.load()["mean"]
    monkeypatch.setattr(reader, "read", whole)
    images = torch.stack([torch.from_numpy(pair.image) for pair in found.data.open().read(range(10, 30), range(10, 30))]).movedim(-1, 1) / 255
    with torch.no_grad():
        torch.testing.assert_close(found.representation.build().patches(images).mean(0), mean, rtol=1e-4, atol=1e-5)


def test_a_source_that_lists_too_much_as_unusable_is_refused_at_once(tmp_path, monkeypatch):
    opened = Shapes.open

    def torn(self):
        reader = opened(self)
        reader.bad = [Bad("", "shard", "torn")] * 11
        return reader

    monkeypatch.setattr(Shapes, "open", torn)
    with pytest.raises(ValueError, match="11 of 41 samples can't be used"):
        launch(statistics(tmp_path), machine=HERE)


def test_a_pointer_or_an_error_page_is_no_file_of_weights(tmp_path):
    "What a careless download leaves behind is called what it is, not malicious."
    for name, content in (("a.pth", b"version https://git-lfs.github.com/spec/v1\n"), ("b.safetensors", b"<!DOCTYPE html><html></html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="Git LFS pointer or an error page"): TimmRepresentation("test_vit", str(tmp_path / name)).check()
    with pytest.raises(ValueError, match="not a plain ViT"): TimmRepresentation("swin_tiny_patch4_window7_224", str(tmp_path / "a.pth")).check()
