"""Bad input gets a clear error before any training, and the error names the fix."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import HERE, TOKENIZER, clip, job, rec, ssl

from vtp.config import from_dict, to_dict
from vtp.data.augment import CropConfig
from vtp.data.pairs import Shards
from vtp.job import launch, run_of
from vtp.tokenizers.vit import ViTTokenizerConfig


def refuses(small, message, error=ValueError, machine=HERE):
    with pytest.raises(error, match=message):
        launch(small, machine=machine)
    run = run_of(small)
    assert not run.rows() and not run.checkpoints(), "it had begun to train"


def test_wrong_field():
    plain = to_dict(job())
    with pytest.raises(ValueError, match="no field stepz; it has"):
        from_dict({**plain, "stepz": 3})


def test_wrong_image_size():
    with pytest.raises(ValueError, match="image_size=70 must be a multiple of the patch, 4"):
        ViTTokenizerConfig(70, TOKENIZER.trunk, TOKENIZER.decoder)
    with pytest.raises(ValueError, match="multiples of the patch"):
        ViTTokenizerConfig(64, replace(TOKENIZER.trunk, patch=16), replace(TOKENIZER.decoder, patch=16)).build().encode(torch.zeros(1, 3, 70, 64))


def test_crop_that_does_not_fit_the_tokenizer():
    refuses(job((rec(crop=CropConfig(32)),)), "crop.size=32 must be the tokenizer's image_size, 16")
    refuses(job((clip(crop=CropConfig(20)), rec())), "image_size, 16")
    refuses(job((ssl(patch=8), rec())), "patch")


def test_missing_shard():
    refuses(job(pairs=Shards("no/such/shards-*.tar")), "no/such/shards", FileNotFoundError)


def test_captions_that_are_not_there(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "bare-0.tar", "w") as tar:
        for i in range(20):
            data = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(data, "PNG")
            for name, content in ((f"{i}.png", data.getvalue()), (f"{i}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = Shards(str(tmp_path / "bare-*.tar"))
    refuses(job(pairs=source), "no caption")
    launch(job((rec(),), pairs=source, steps=2), machine=HERE)      # without contrast nobody needs captions


def test_run_directory_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("VTP_RUNS", "/proc/vtp-runs")                # read-only for root too
    with pytest.raises(OSError, match="set VTP_RUNS to another folder"):
        launch(job(), machine=HERE)


def test_batches_that_ranks_cannot_share():
    refuses(job((clip(batch=15), rec(batch=5))), "use a number of processes that divides 5", Exception, replace(HERE, procs=2))


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refuses(job(), "there is no GPU", ValueError, replace(HERE, device="cuda"))


def test_two_objectives_of_one_name():
    refuses(job((rec(), rec(batch=4))), "each name once")


def test_lpips_without_its_weights(monkeypatch, tmp_path):
    from vtp.perceptual import PerceptualConfig

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = PerceptualConfig(weights=str(tmp_path / "vgg16.pth"))
    refuses(job((rec(perceptual=missing),)), "vgg16", Exception)


def test_a_run_in_use():
    from vtp.job import create, path_of
    from vtp.run import locked

    small = job()
    run = create(path_of(small), small, HERE)
    with locked(run):
        refuses(small, "is being written by process", RuntimeError)


def test_an_evaluation_that_cannot_work_is_refused_before_training():
    from vtp.data.shapes import Shapes
    from vtp.evaluation.protocol import Evaluate
    from vtp.evaluation.zero_shot import ZeroShot
    from vtp.job import At

    small = job((rec(),))
    with pytest.raises(ValueError, match="no text tower"):
        launch(Evaluate(At(small), (ZeroShot(data=Shapes(count=32, size=16, split="val")),)), machine=HERE)
    assert not run_of(small).path.exists()
    with pytest.raises(ValueError, match="step 3 is not kept"):
        Evaluate(At(small, 3), (ZeroShot(data=Shapes(count=32, size=16, split="val")),))


def test_a_run_that_is_not_done_is_not_collected_as_done(monkeypatch):
    import vtp.pretrain as package
    from vtp.results import collect

    small = job(steps=6, log_every=2, keep=(2,))
    step = package.train_step

    def broken(model, batch, opt, config, number):
        if number == 4:
            raise RuntimeError("the power went")
        return step(model, batch, opt, config, number)

    monkeypatch.setattr(package, "train_step", broken)
    with pytest.raises(RuntimeError, match="the power went"):
        launch(small, machine=HERE)
    with pytest.raises(FileNotFoundError, match="has not run to its end"):
        collect({"broken": small})
    assert len(collect({"broken": small}, partial=True)) == 2
    with pytest.raises(FileNotFoundError, match="no whole checkpoint of step 6"):
        small.load()
