"""What is published is what was trained: to the bit, without data, runs or network; a training goes on where it stood."""
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import HERE, PART, clip, job, rec, ssl, stop_at

import vtp.finetune_decoder as tuning
import vtp.training_state as state
from vtp.checkpoint import hash_file
from vtp.config import dumps, loads
from vtp.data.shapes import Shapes
from vtp.evaluation.generation import GenerationQuality
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.zero_shot import ZeroShot
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.dit import DiTConfig
from vtp.generation.latents import CacheLatents, read_statistics
from vtp.generation.train import TrainDiT
from vtp.hub import Parts, Published, from_pretrained, load_training, measurements, parts_of, push_to_hub, push_training, release, save_pretrained, save_training, tensors_of
from vtp.interfaces import Tokenizer
from vtp.job import At, launch, load, run_of
from vtp.objectives.adversarial import Adversarial, PatchGAN
from vtp.optim import OptimConfig
from vtp.run import locked, runs
from vtp.tokenizers.frozen import Alone, FrozenConfig, RAEDecoderConfig, Untrained
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.official import OfficialModel
from vtp.tokenizers.pretrained import Model
from vtp.tokenizers.released_cnn import SDVAE
from vtp.tokenizers.representation import OwnTrunk
from vtp.tokenizers.statistics import LatentStatistics
from vtp.tokenizers.vit import ViTTokenizerConfig

IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TUNE = OptimConfig(2e-3, (0.5, 0.9), 1e-8, 0.0, 2, 0.1, None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "A test that reaches for the network fails."
    def refuse(*_): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def short(objectives=None, **changes):
    return job(objectives, **{**dict(steps=4, log_every=2), **changes})


def second(of, **changes):
    base = dict(of=of, pairs=Shapes(count=64, size=16), rec=rec(mse=0.0), steps=6, adversarial=Adversarial(PatchGAN(8, 1), start_discriminator=0.2, start_generator=0.4, ramp=0.2),
                optim=TUNE, optim_discriminator=TUNE, ema=0.8, dtype="fp32", log_every=2)
    return FinetuneDecoder(**{**base, **changes})


def rae(of):
    "RAE over our own trunk, with statistics: its encoder is somebody's checkpoint."
    trunk = OwnTrunk(At(of))
    statistics = LatentStatistics(trunk, Shapes(count=64, size=16), slices=2)
    config = FrozenConfig(trunk, RAEDecoderConfig(width=32, depth=1, heads=2, hidden=64, patch=4), statistics=statistics)
    return second(At(Untrained(config)))


def alone(monkeypatch, tmp_path):
    "From here on there are no runs and no data."
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "elsewhere"))
    def refuse(*_): raise AssertionError("the data were asked")
    monkeypatch.setattr(Shapes, "open", refuse)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@torch.no_grad()
def answers(model, image=IMAGE):
    z = model.tokenizer.encode(image)
    found = {"z": z, "image": model.tokenizer.decode(z)}
    if "clip" in model.objectives:
        found |= {"clip": model.objectives["clip"].image_features(model.tokenizer, image), "text": model.objectives["clip"].text_features(torch.tensor([[49406, 320, 49407]]))}
    return found


@pytest.mark.parametrize("make", [lambda: short(), lambda: short((rec(),), dtype="fp64"), lambda: short((clip(loss="siglip"), rec()), dtype="bf16"), lambda: second(At(short())), lambda: rae(short((rec(),)))],
                         ids=["VTP", "AE, fp64", "SigLIP+AE, bf16", "tuned decoder", "RAE on our trunk"])
def test_round_trip_is_bitwise_and_needs_nothing_else(make, tmp_path, monkeypatch):
    trained = make()
    launch(trained, machine=HERE)
    model = load(trained)
    image = IMAGE.to(next(model.parameters()).dtype)
    kept, before = tensors_of(parts_of(model, None, trained)[1]), answers(model, image)
    folder = save_pretrained(trained, tmp_path / "model")
    alone(monkeypatch, tmp_path)
    again = from_pretrained(folder)
    assert equal(tensors_of(again), kept) and equal(answers(again, image), before) and not any(m.training for m in again.modules() if not list(m.children()))
    assert loads((folder / "training.json").read_text()) == At(trained)
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "training.json"}


def test_a_step_and_named_objectives(tmp_path):
    small = short(keep=(2,))
    launch(small, machine=HERE)
    early, late = (from_pretrained(save_pretrained(At(small, step), tmp_path / str(step), objectives=("clip", "ssl"))) for step in (2, None))
    for model, step in ((early, 2), (late, 4)):
        state = run_of(small).at(step).tensors("model")
        assert equal(model.state_dict(), {name: tensor for name, tensor in state.items() if not name.startswith("objectives.rec")})
    assert "after 2 steps" in (tmp_path / "2/README.md").read_text()
    with pytest.raises(ValueError, match="step 3 is not kept"): save_pretrained(At(small, 3), tmp_path / "3")
    with pytest.raises(ValueError, match="no weights of its own"): save_pretrained(small, tmp_path / "3", objectives=("rec",))
    assert not (tmp_path / "3").exists()


def test_a_model_alone(tmp_path, monkeypatch):
    model = short().build()
    folder = save_pretrained(model, tmp_path / "model")
    (folder / "README.md").read_text().index("How these weights were trained is not recorded here")
    again = from_pretrained(folder)
    assert equal(answers(again), answers(model.eval())) and not (folder / "training.json").exists()
    assert equal(tensors_of(from_pretrained(save_pretrained(again, tmp_path / "again"))), tensors_of(again))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with torch.no_grad(): model.tokenizer.encoder.bottleneck.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="tokenizer.encoder.bottleneck.weight is not finite"): save_pretrained(model, tmp_path / "broken")
    model.tokenizer.decoder.double()
    with pytest.raises(ValueError, match="not finite|cast the model"): save_pretrained(model, tmp_path / "broken")


def test_a_published_model_is_a_job(tmp_path):
    small = short()
    launch(small, machine=HERE)
    published = Published(str(save_pretrained(small, tmp_path / "model")))
    data = Shapes(count=64, size=16, split="val")
    measures = ReconstructionQuality(data=data, samples=32, perceptual=rec().perceptual), ZeroShot(data=data, samples=32)
    latents = [CacheLatents(At(one), Shapes(count=64, size=16), dtype="fp32") for one in (small, published)]
    tuned = second(At(published))
    *measured, _ = launch(*(Evaluate(At(one), measures) for one in (small, published)), *latents, tuned, machine=HERE)[:3]
    ours, theirs = ([(row["metric"], row["value"], row["low"], row["high"]) for row in run.rows()] for run in measured)
    assert ours == theirs
    assert read_statistics(latents[0])["mean"] == read_statistics(latents[1])["mean"]
    assert load(tuned).tokenizer.encoder_hash() == load(small).tokenizer.encoder_hash()


def test_the_official_format(tmp_path):
    half = replace(PART, patch=16)
    small = short((clip(crop=replace(clip().crop, size=32)), rec(crop=replace(rec().crop, size=32))), tokenizer=ViTTokenizerConfig(32, half, half, latent=8), pairs=Shapes(count=64, size=32))
    launch(small, machine=HERE)
    measured = launch(Evaluate(At(small), (ReconstructionQuality(data=Shapes(count=64, size=32, split="val"), samples=32, perceptual=rec().perceptual),)), machine=HERE)
    folder = save_pretrained(small, tmp_path / "official", measured, format="official")
    model, image = from_pretrained(folder), torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert isinstance(model, OfficialModel) and json.loads((folder / "config.json").read_text())["model_type"] == "vtp"
    text = (folder / "README.md").read_text()
    assert f"Encoder hash `{model.tokenizer.encoder_hash()}`" in text and "computes it in bf16" in text and "| rPSNR |" in text
    released = (save_pretrained(release(folder), tmp_path / "ours") / "README.md").read_text()
    assert "those of `official`, which was in a folder" in released and str(tmp_path) not in released and not (tmp_path / "ours/training.json").exists() and equal(answers(from_pretrained(tmp_path / "ours"), image), answers(model, image))
    for name, found in answers(load(small), image).items():
        assert torch.allclose(answers(model, image)[name], found, atol=0.05 * float(found.abs().max())), name      # their RoPE is bf16
    with torch.no_grad(): assert torch.equal(model.get_reconstruction_latents(model.tokenizer.encoder.normalise(image)), model.tokenizer.encode(image))
    with pytest.raises(ValueError, match="can't express"): save_pretrained(short((rec(),)).build(), tmp_path / "other", format="official")
    with pytest.raises(ValueError, match="'vtp' or 'official'"): save_pretrained(small, tmp_path / "other", format="onnx")


def test_formats_are_recognised(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="OpenCLIP and TimmModel"): release(folder)
    with pytest.raises(FileNotFoundError, match="hf download|neither a file nor a folder"): release("./nowhere")
    said = {"{": "is not JSON", '{"_class_name": "VQModel"}': "_class_name 'VQModel'", '{"architectures": ["X"]}': "architectures", '{"_type": "vtp.pretrain:Pretrain"}': "run's own folder", '{"size": 1}': "the keys"}
    for text, words in said.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words) as raised: release(folder)
        assert "VILAURelease" in str(raised.value)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert release(folder) == SDVAE(str(folder))
    with pytest.raises(ValueError, match="has no revisions"): release(folder, "v1")


def test_what_does_not_fit_is_listed(tmp_path):
    folder = save_pretrained(short().build(), tmp_path / "model")
    file, text = folder / "model.safetensors", (folder / "config.json").read_text()
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "bottleneck" not in name} | {"more": torch.zeros(2), "objectives.clip.logit_scale": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"1 unexpected: more; 1 missing: tokenizer.encoder.bottleneck.weight; 1 misshapen: objectives.clip.logit_scale \(3,\), not \(\)"): from_pretrained(folder)
    for name in ("objectives.clip.logit_scale", "tokenizer.encoder.bottleneck.weight"):
        save_file(tensors | {name: tensors[name].half()}, file)
        with pytest.raises(ValueError, match="holds parameters in torch.float16, torch.float32"): from_pretrained(folder)
    save_file(tensors | {"tokenizer.decoder.std": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="1 misshapen: tokenizer.decoder.std"): from_pretrained(folder)
    save_file(tensors, file)
    (folder / "config.json").write_text(text.replace('"width": 32', '"width": 3200000'))                 # 80 TB
    with pytest.raises(ValueError, match="misshapen"): from_pretrained(folder)
    for junk in ("[]", '"x"', "[" * 100_000, text.replace('"latent": 8', '"latent": "8"'), text.replace('"depth": 2', '"depth": null')):
        (folder / "config.json").write_text(junk)
        with pytest.raises(ValueError): from_pretrained(folder)
    (folder / "config.json").write_text(text)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"): from_pretrained(folder)
    save_file(tensors, file)
    (folder / "config.json").write_text(text.replace("vtp.tokenizers.vit:ViTTokenizerConfig", "subprocess:Popen"))
    with pytest.raises(ValueError, match="outside the packages"): from_pretrained(folder)
    (folder / "config.json").write_text(text.replace('"latent"', '"laten"'))
    with pytest.raises(ValueError, match="has no field laten"): from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="without config.json"): from_pretrained(folder)


def test_a_release_that_reads_its_own_files_is_refused(tmp_path):
    trained = Published(str(save_pretrained(short((rec(),)).build(), tmp_path / "trunk")))
    of = Untrained(FrozenConfig(OwnTrunk(At(trained)), RAEDecoderConfig(width=32, depth=1, heads=2, hidden=64, patch=4)))
    model = of.build()
    assert isinstance(model, Alone)
    with pytest.raises(ValueError, match="can't be published in our format"): parts_of(model, None, of)
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "config.json").write_text(dumps(Parts(of.tokenizer)))
    save_file(tensors_of(model), hostile / "model.safetensors")
    with pytest.raises(ValueError, match="can't be published in our format"): from_pretrained(hostile)
    for wrong in (dict(tokenizer=3), dict(tokenizer=short()), dict(tokenizer=of.tokenizer, objectives=of.tokenizer), dict(tokenizer=of.tokenizer, objectives=(PART,))):
        with pytest.raises(ValueError, match="tokenizer must be a tokenizer's config"): Parts(**wrong)


def test_any_tokenizer_with_a_config(tmp_path):
    tokenizer = CNNConfig(16, latent=4, width=8, multipliers=(1, 2, 2), blocks=1, attention=(), groups=4).build().eval()
    again = from_pretrained(save_pretrained(Model(tokenizer), tmp_path / "cnn"))
    assert equal(again.tokenizer.state_dict(), tokenizer.state_dict()) and equal(answers(again), answers(Model(tokenizer)))
    assert 'pipeline_tag: "image-feature-extraction"' in (tmp_path / "cnn/README.md").read_text()
    class Bare(Tokenizer): pass
    with pytest.raises(ValueError, match="no config to build tokenizer from"): save_pretrained(Model(Bare()), tmp_path / "bare")


def test_the_card(tmp_path):
    small = short()
    data = Shapes(count=64, size=16, split="val")
    measured = launch(Evaluate(At(small), (ReconstructionQuality(data=data, samples=32, perceptual=rec().perceptual), ZeroShot(data=data, samples=32))), machine=HERE)
    text = (save_pretrained(small, tmp_path / "model", measured, license="mit", name="someone/model") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == dict(library_name="vtp", license="mit", pipeline_tag="zero-shot-image-classification", tags=["vtp", "visual-tokenizer", "autoencoder", "f4d8"])
    assert 'from_pretrained("someone/model")' in body and "**Small scale:** 64 images of 16 pixels" in body and loads(body.split("```json\n")[1].split("```")[0]) == parts_of(load(small))[0]
    lines = body.split("## Measured\n\n")[1].split("\n\n")[0].split("\n")[2:]
    rows = measured[0].rows()
    assert len(lines) == len(rows) > 4
    for line, row in zip(lines, rows):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [row["metric"], f"{row['value']:.4g}", f"{row['low']:.4g} – {row['high']:.4g}", f"`{row['protocol']}`"]
        said = dict(part.split(": ", 1) for part in cells[4].split("; "))
        assert said.keys() == row.keys() - {"metric", "value", "low", "high", "protocol"} and said["reference"] == row["reference"] and int(said["samples"]) == row["samples"]
    for blocks in text.split("```python\n")[1:]: compile(blocks.split("```")[0], "card", "exec")


def test_only_numbers_of_the_published_checkpoint(tmp_path):
    small, other = short(keep=(2,)), short(seed=1)
    measure = (ReconstructionQuality(data=Shapes(count=64, size=16, split="val"), samples=32, perceptual=rec().perceptual),)
    right, early, foreign, training = launch(Evaluate(At(small), measure), Evaluate(At(small, 2), measure), Evaluate(At(other), measure), small, machine=HERE)
    for run, words in ((early, "another checkpoint"), (foreign, "another checkpoint"), (training, "no evaluation")):
        with pytest.raises(ValueError, match=words): save_pretrained(small, tmp_path / "model", [right, run])
    with pytest.raises(ValueError, match="another checkpoint"): save_pretrained(load(small), tmp_path / "model", [right])
    (right.path / "done").unlink()
    with pytest.raises(ValueError, match="not run to its end"): save_pretrained(small, tmp_path / "model", [right])
    assert not (tmp_path / "model").exists()
    assert save_pretrained(At(small, 2), tmp_path / "early", [early]).is_dir()


class FakeApi:
    "A Hub that is a folder; notes what it is asked to change."
    def __init__(self, calls, folder): self.calls, self.folder = calls, folder
    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        (self.folder / repo_id / ".gitattributes").touch()
    def repo_info(self, repo_id):
        root = self.folder / repo_id
        return SimpleNamespace(sha="head", siblings=[SimpleNamespace(rfilename=str(file.relative_to(root))) for file in root.rglob("*") if file.is_file()])
    def hf_hub_download(self, repo_id, filename, revision): return str(self.folder / repo_id / filename)
    def create_commit(self, repo_id, operations, commit_message, parent_commit):
        gone = []
        for operation in operations:
            file = self.folder / repo_id / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(operation, huggingface_hub.CommitOperationAdd): shutil.copy(operation.path_or_fileobj, file)
            else: gone.append(operation.path_in_repo); file.unlink()
        self.calls.append(("commit", repo_id, parent_commit, gone))
        return "the commit"


def test_a_push_is_one_commit_and_comes_back_from_the_cache(tmp_path, monkeypatch):
    small, calls = short(), []
    launch(small, machine=HERE)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeApi(calls, tmp_path))
    assert push_to_hub(small, "someone/model", license="mit") == "the commit" == push_training(small, "someone/training", private=False)
    assert calls == [("create", "someone/model", True, True), ("commit", "someone/model", "head", []), ("create", "someone/training", False, True), ("commit", "someone/training", "head", [])]
    folder = save_pretrained(small, tmp_path / "local", license="mit", name="someone/model")
    for file in folder.iterdir(): assert (tmp_path / "someone/model" / file.name).read_bytes() == file.read_bytes()

    asked, before = set(), run_of(small).at().tensors("model")
    def cached(repo_id, filename, revision=None, local_files_only=False):
        asked.add((repo_id, revision, local_files_only))
        return str(tmp_path / repo_id / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert equal(tensors_of(from_pretrained("someone/model", "v1")), tensors_of(from_pretrained(folder)))
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "elsewhere"))
    assert equal(load_training("someone/training", "v2").at().tensors("model"), before)
    assert asked == {("someone/model", "v1", True), ("someone/training", "v2", True)}       # what is cached asks no network


def test_a_push_leaves_what_is_not_ours(tmp_path, monkeypatch):
    small, calls = short(keep=(2,)), []
    launch(small, machine=HERE)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeApi(calls, tmp_path))
    for name, file in (("model", "notes.md"), ("training", "runs/tensorboard/events"), ("other", "config.json"), ("broken", "manifest.json")):
        (path := tmp_path / "someone" / name / file).parent.mkdir(parents=True)
        path.write_text('{"model_type": "vtp"}')
    for push, kind in ((push_to_hub, "model"), (push_training, "training")):
        for name in ("model", "training", "other", "broken"):
            with pytest.raises(ValueError, match=f"holds something else than an earlier {kind}"): push(small, f"someone/{name}")
    assert not any(call[0] == "commit" for call in calls)
    push_to_hub(small, "someone/model", overwrite=True), push_training(At(small, 2), "someone/training", overwrite=True)
    push_to_hub(small.build(), "someone/model"), push_training(small, "someone/training")
    changes = [call[3] for call in calls if call[0] == "commit"]
    assert changes[:3] == [[], [], ["training.json"]] and changes[3] and all("/step-000000002/" in name for name in changes[3])
    assert (tmp_path / "someone/model/notes.md").is_file() and (tmp_path / "someone/training/runs/tensorboard/events").is_file()
    with pytest.raises(ValueError, match="holds something else than an earlier training"): push_training(small, "someone/model")
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "elsewhere"))
    (tmp_path / "someone/training/runs/tensorboard/events").unlink()
    assert load_training(tmp_path / "someone/training").at().step == 4


def test_a_folder_that_holds_something_else_stays_as_it_is(tmp_path, monkeypatch):
    model = short().build()
    for name, content in (("config.json", "mine"), ("README.md", "mine"), ("config.json", '{"model_type": "vtp"}'), ("config.json", "[]")):
        (folder := tmp_path / "folder").mkdir(exist_ok=True)
        (folder / name).write_text(content)
        for format in ("vtp", "official"):
            with pytest.raises(ValueError, match="holds something else"): save_pretrained(model, folder, format=format)
        assert [file.name for file in folder.iterdir()] == [name] and (folder / name).read_text() == content
        shutil.rmtree(folder)
    save_pretrained(model, folder)
    (folder / "training.json").write_text("of an earlier one")
    (folder / "notes.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="can't express"): save_pretrained(short((rec(),)).build(), folder, format="official")
    with monkeypatch.context() as patched:
        patched.setattr("vtp.hub.save_file", lambda tensors, path, about: save_file({name: tensor + name.endswith("weight") for name, tensor in tensors.items()}, path, about))
        with pytest.raises(ValueError, match="does not give back"): save_pretrained(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and [path.name for path in tmp_path.iterdir()] == ["folder"]
    save_pretrained(short((rec(),)).build(), folder)
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "notes.md"} and list(from_pretrained(folder).objectives) == []
    with pytest.raises(ValueError, match="wrap a tokenizer"): save_pretrained(model.tokenizer, tmp_path / "bare")
    for license in ("MIT", "my own: x\ny", ""):
        with pytest.raises(ValueError, match="no id of the Hub's"): save_pretrained(model, tmp_path / "bare", license=license)


def test_a_generators_numbers_are_of_the_tokenizer_that_decodes():
    small = short((rec(),))
    tuned, other = second(At(small)), rae(small)
    def evaluation(of, *decoders, path=Path("evaluate")):
        generator = TrainDiT(CacheLatents(At(of), Shapes(count=64, size=16)), DiTConfig(width=32, depth=1, heads=2, channels=8 if of != other else 32), steps=2)
        evaluators = tuple(GenerationQuality(reference=Shapes(count=64, size=16, split="val"), samples=32, decoder=decoder) for decoder in decoders)
        job = SimpleNamespace(of=At(generator), evaluators=evaluators)
        return SimpleNamespace(job=job, path=path, done=True, rows=lambda: [dict(metric="gFD", value=1.0, protocol="x")])
    own, by_tuned = evaluation(small, None), evaluation(small, At(tuned))
    assert len(measurements(At(small), [own])) == 1 == len(measurements(At(tuned), [by_tuned])) == len(measurements(At(small, 4), [own]))
    for of, run in ((small, by_tuned), (tuned, own), (small, evaluation(tuned, None)), (small, evaluation(other, None)), (small, evaluation(small, None, At(tuned))), (tuned, evaluation(small, None, At(tuned)))):
        with pytest.raises(ValueError, match="another checkpoint"): measurements(At(of), [run])


def everything(run):
    last = run.at()
    groups = {file.stem: last.tensors(file.stem) for file in last.path.glob("*.safetensors")}
    return groups, (run.path / "metrics.jsonl").read_bytes(), (run.path / "quarantine.jsonl").read_bytes(), last.state


def same(a, b):
    assert a[0].keys() == b[0].keys() and a[1:] == b[1:]
    for group in a[0]: assert equal(a[0][group], b[0][group]), group


@pytest.mark.parametrize("objectives", [(clip(), ssl(), rec()), (ssl(centering="softmax"), rec())], ids=["VTP", "SSL+AE, softmax"])
def test_a_pretraining_goes_on_to_the_bit(objectives, tmp_path, monkeypatch):
    small = short(objectives, steps=8, keep=(2,))
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight = everything(launch(small, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "here"))
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        with pytest.raises(InterruptedError): launch(small, machine=HERE)
    published, early = save_training(small, tmp_path / "published"), save_training(At(small, 2), tmp_path / "early")
    shutil.rmtree(tmp_path / "here")
    for folder, step in ((early, 2), (published, 5)):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / f"there{step}"))
        run = load_training(folder)
        assert run.at().step == step and not run.done and run.rows()[-1]["step"] <= step
        same(straight, everything(launch(run.job, machine=HERE)[0]))


def test_a_second_stage_goes_on_to_the_bit_with_what_it_starts_from(tmp_path, monkeypatch):
    tuned = rae(short((rec(),), keep=(2,)))
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight = everything(launch(tuned, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "here"))
    step = tuning.finetune_step
    def interrupted(players, average, opts, batch, config, number):
        if number == 3: raise KeyboardInterrupt
        return step(players, average, opts, batch, config, number)
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "finetune_step", interrupted)
        with pytest.raises(KeyboardInterrupt): launch(replace(tuned, keep=(2,)), machine=HERE)
    kept = replace(tuned, keep=(2,))
    published = save_training(kept, tmp_path / "published")
    assert {p.name.split("-")[0] for p in (published / "runs").iterdir()} == {"pretrain", "statistics", "untrained", "finetune"}
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    trained = []
    monkeypatch.setattr("vtp.pretrain.train_step", lambda *_: trained.append(1))
    found = everything(launch(load_training(published).job, machine=HERE)[0])
    assert not trained and found[0].keys() == straight[0].keys()
    for group in found[0]: assert equal(found[0][group], straight[0][group]), group
    assert [row for row in map(json.loads, found[1].splitlines()) if row["step"] in (4, 6)] == [row for row in map(json.loads, straight[1].splitlines()) if row["step"] in (4, 6)]


def test_a_finished_training_is_finished(tmp_path, monkeypatch):
    small = short()
    before = everything(launch(small, machine=HERE)[0])
    published = save_training(small, tmp_path / "published")
    stray = published / "runs" / run_of(small).path.name / "stray.bin"
    stray.touch()                                                            # what is not listed is not taken
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    run = load_training(published)
    assert not (run.path / stray.name).exists() and run.done and run.path.name == run_of(small).path.name
    same(before, everything(run))
    monkeypatch.setattr("vtp.pretrain.train_step", lambda *_: pytest.fail("trained again"))
    assert launch(small, machine=HERE)[0].done and load_training(published).path == run.path
    assert save_pretrained(small, tmp_path / "model").is_dir()


def test_no_run_that_is_here_is_lost(tmp_path, monkeypatch, capsys):
    small = short(steps=8, keep=(2, 4))
    launch(small, machine=HERE)
    published, early = save_training(At(small, 4), tmp_path / "published"), save_training(At(small, 2), tmp_path / "early")
    assert load_training(published).at().step == 8                           # the same run, further along: kept
    run = run_of(small)
    shutil.rmtree(run.at(4).path)
    with pytest.raises(ValueError, match="is here already, done, and is not what was published"): load_training(published)
    assert run.at().step == 8
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    behind = load_training(early)
    (behind.path / "mine.txt").write_text("notes")
    assert load_training(published).at().step == 4 and "put aside as" in capsys.readouterr().out
    aside, = (path for path in runs().iterdir() if path.name.endswith(".aside1"))
    assert (aside / "mine.txt").read_text() == "notes" and run_of(small).at().step == 4
    with pytest.raises(ValueError, match="at step 4, and is not what was published"): load_training(early)
    shutil.rmtree(run_of(small).path)
    assert load_training(early).at().step == 2 and not list(runs().glob(".*"))


def test_every_byte_is_checked(tmp_path, monkeypatch):
    small = short()
    launch(small, machine=HERE)
    published = save_training(small, tmp_path / "published")
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    for name in ("optim.safetensors", "state.json", "metrics.jsonl", "config.json"):
        file = next((published / "runs").rglob(name))
        before = file.read_bytes()
        file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        with pytest.raises(ValueError, match=f"{name} is missing or has other bytes"): load_training(published)
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing or has other bytes"): load_training(published)
        file.write_bytes(before)
    listed = json.loads((published / "manifest.json").read_text())
    for name in ("../secret", "/etc/passwd", "runs/../../secret", "README.md"):
        (published / "manifest.json").write_text(json.dumps(listed | {"files": {name: [1, "0"]}}))
        with pytest.raises(ValueError, match="outside the runs of the training"): load_training(published)
    (published / "manifest.json").write_text(json.dumps(listed | {"run": "another"}))
    with pytest.raises(ValueError, match="does not hold the run it names"): load_training(published)
    with pytest.raises(ValueError, match="holds no training"): load_training(save_pretrained(short().build(), tmp_path / "model"))
    (published / "manifest.json").write_text('{"format": "vtp training 9"}')
    with pytest.raises(ValueError, match="format"): load_training(published)
    assert not runs().exists()


def test_what_can_not_be_continued_is_refused(tmp_path):
    small = short()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"): save_training(small, tmp_path / "published")
    launch(small, machine=HERE)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint of step 3"): save_training(At(small, 3), tmp_path / "published")
    latents = CacheLatents(At(small), Shapes(count=64, size=16))
    with pytest.raises(ValueError, match="CacheLatents trains no tokenizer"): save_training(latents, tmp_path / "published")
    (tmp_path / "full").mkdir()
    Path(tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="not empty"): save_training(small, tmp_path / "full")
    local = Published(str(save_pretrained(small, tmp_path / "release")))
    for of in (short(start=At(local)), second(At(local))):
        with pytest.raises(ValueError, match="starts from release, a release that is only on this machine: push it first") as raised: save_training(of, tmp_path / "published")
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(ValueError, match="Published trains no tokenizer"): save_training(local, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def relisted(folder, **changes):
    "The published training with a list that fits its files, whatever they are."
    listed = json.loads((folder / "manifest.json").read_text())
    files = {str(file.relative_to(folder)): (file.stat().st_size, hash_file(file)) for file in sorted((folder / "runs").rglob("*")) if file.is_file()}
    (folder / "manifest.json").write_text(json.dumps(listed | {"files": files} | changes))
    return folder


def resealed(checkpoint):
    "A checkpoint whose own manifest fits its files."
    (checkpoint / "manifest.json").write_text(json.dumps({f.name: (f.stat().st_size, hash_file(f)) for f in sorted(checkpoint.iterdir()) if f.name != "manifest.json"}))


def test_a_published_training_brings_only_what_it_needs(tmp_path, monkeypatch):
    small = short((rec(),), steps=6, keep=(2,))
    tuned = second(At(small, 2), keep=(2,))
    launch(tuned, machine=HERE)
    done, early = save_training(tuned, tmp_path / "done"), save_training(At(tuned, 2), tmp_path / "early")
    name, source, victim = run_of(tuned).path.name, run_of(small).path.name, short(seed=7)
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")

    def plant(folder): (folder / "runs/x").mkdir(); (folder / "runs/x/config.json").write_text(dumps(victim)); (folder / "runs/x/done").touch()
    def twice(folder): shutil.copytree(folder / "runs" / name, folder / "runs/zzz")
    def mark(folder): (folder / "runs" / name / "done").touch()
    def unmark(folder): (folder / "runs" / source / "done").unlink()
    def lock(folder): (folder / "runs" / name / "launch.json").touch()
    def empty(folder): shutil.rmtree(folder / "runs" / name / "checkpoints")
    def sourceless(folder): shutil.rmtree(folder / "runs" / source)
    def other_step(folder): (at := folder / "runs" / source / "checkpoints").joinpath("step-000000002").rename(at / "step-000000004")
    def beyond(folder): shutil.copytree((at := folder / "runs" / name / "checkpoints") / "step-000000002", at / "step-000000004")
    def empty_handed(folder):
        for file in (at := next((folder / "runs" / name).rglob("step-*"))).glob("*.safetensors"): file.unlink()
        resealed(at)
    def unsealed(folder): next((folder / "runs" / name).rglob("*.safetensors")).write_bytes(b"x")
    def told(**changes):
        def tell(folder):
            file = next((folder / "runs" / name).rglob("state.json"))
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
            resealed(file.parent)
        return tell
    def retyped(folder): (folder / "runs" / name / "config.json").write_text(dumps(CacheLatents(At(small), Shapes(count=64, size=16))))
    def junk(folder): (folder / "runs" / name / "config.json").write_text((folder / "runs" / name / "config.json").read_text().replace('"steps": 6', '"steps": "six"'))

    cases = [(plant, "nothing that the training"), (twice, "same run twice"), (mark, "marked as done, but is at step 2 of 6"), (unmark, "starts from, is not done"), (lock, "is no file of one"), (empty, "must hold the checkpoints"),
             (sourceless, "starts from a Pretrain"), (other_step, "must hold the checkpoints"), (beyond, "must hold the checkpoints"), (empty_handed, "not a whole checkpoint"), (unsealed, "not a whole checkpoint"), (told(step=4), "not that of its step and rows"),
             (told(offsets={str(secret): 0}), "not that of its step and rows"), (told(offsets={"metrics.jsonl": 10**9, "quarantine.jsonl": 0}), "not that of its step and rows"), (retyped, "CacheLatents trains no tokenizer"), (junk, "holds no config that can be built")]
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    for number, (change, words) in enumerate(cases):
        change(folder := shutil.copytree(early, tmp_path / f"case{number}"))
        with pytest.raises(ValueError, match=words): load_training(relisted(folder))
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="must hold the checkpoints of steps .6. and no other"): load_training(relisted(shutil.copytree(early, tmp_path / "step"), step=6))
    with monkeypatch.context() as patched:
        patched.setattr(state, "path_of", lambda job: runs() / ".." / "away" / "x")
        with pytest.raises(ValueError, match="lies outside"): load_training(early)
    assert not runs().exists() and secret.read_text() == "mine"
    assert load_training(relisted(early)).at().step == 2 and not run_of(tuned).done and run_of(small).at(2).step == 2
    assert load_training(done).done


def test_junk_lists_are_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    small = short()
    launch(small, machine=HERE)
    folder = save_training(small, tmp_path / "published")
    listed, asked = json.loads((folder / "manifest.json").read_text()), []
    def cached(repo_id, filename, revision=None, local_files_only=False): asked.append(filename); return str(folder / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    name = f"runs/{listed['run']}/config.json"
    texts = ["[]", "{", '"x"', "[" * 100_000, "{}", *(json.dumps(listed | change) for change in (
        {"run": 3}, {"step": "4"}, {"step": True}, {"files": []}, {"files": {name: 3}}, {"files": {name: ["1", "0"]}}, {"files": {name: [1]}}, {"files": {name + "/\0": [1, "0"]}}, {"files": {"runs/a/../../b": [1, "0"]}},
        {"files": {"runs//a/b": [1, "0"]}}, {"files": {"runs/a/.b": [1, "0"]}}, {"files": {"runs/a\\..\\b/c": [1, "0"]}}, {"files": {"runs/" + "a" * 400 + "/b": [1, "0"]}}, {"files": {f"runs/a/{i}": [1, "0"] for i in range(20_001)}}))]
    for text in texts:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError): load_training("someone/training")
    assert set(asked) == {"manifest.json"}


def test_a_run_that_is_being_written_or_is_not_done_is_left_alone(tmp_path, monkeypatch):
    small = short(steps=8, keep=(2, 4))
    launch(small, machine=HERE)
    whole, published, early = save_training(small, tmp_path / "whole"), save_training(At(small, 4), tmp_path / "published"), save_training(At(small, 2), tmp_path / "early")
    run = run_of(small)
    (run.path / "done").unlink()
    with pytest.raises(ValueError, match="at step 8, and is not what was published"): load_training(whole)      # the same checkpoints, but not the mark
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "there"))
    behind = load_training(early)
    with locked(behind), pytest.raises(RuntimeError, match="is being written by process"): load_training(published)
    assert run_of(small).at().step == 2 and [path.name for path in runs().iterdir()] == [behind.path.name]
    assert load_training(published).at().step == 4
