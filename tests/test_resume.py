"""k steps, stop, resume: bitwise the weights, teacher, moments, rows and sample order of an uninterrupted run."""
import pytest
import torch
from dataclasses import replace
from tiny import HERE, clip, job, rec, ssl, stop_at

from vtp.data.batch_sampling import Batches, loader
from vtp.data.shapes import Shapes
from vtp.job import launch, run_of


def state(run):
    "Everything a run leaves that must not depend on interruptions."
    last = run.at()
    return {group: last.tensors(group) for group in ("model", "optim")}, (run.path / "metrics.jsonl").read_bytes(), last.state


def same(a, b):
    for group in a[0]:
        assert a[0][group].keys() == b[0][group].keys()
        for name in a[0][group]:
            assert torch.equal(a[0][group][name], b[0][group][name]), (group, name)
    assert a[1:] == b[1:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("objectives", [(rec(),), (clip(), ssl(), rec()), (ssl(centering="softmax"), rec())], ids=["AE", "VTP", "SSL+AE, softmax"])
@pytest.mark.parametrize("stops,workers", [((3,), (0, 0)), ((5, 6), (0, 1, 2))], ids=["once", "twice in an epoch, other workers"])
def test_resume_is_bitwise(tmp_path, monkeypatch, objectives, stops, workers):
    small = job(objectives, pairs=Shapes(count=400, size=16))     # 12 steps of 16 lie within one epoch
    order, again = [], []
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    with monkeypatch.context() as patched:
        stop_at(patched, order=order)
        straight = state(launch(small, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "stopped"))
    stop_at(monkeypatch, *stops, order=again)
    for count, number in enumerate(stops):
        with pytest.raises(InterruptedError, match="launch again"):
            launch(small, machine=replace(HERE, workers=workers[count]))
        assert run_of(small).at().step == number + 1
    same(straight, state(launch(small, machine=replace(HERE, workers=workers[-1]))[0]))
    assert again == order


def test_a_torn_checkpoint_is_passed_over(tmp_path, monkeypatch, capsys):
    small = job(steps=8, log_every=2, keep=(2, 4))
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight = state(launch(small, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "torn"))
    stop_at(monkeypatch, 5)
    with pytest.raises(InterruptedError):
        launch(small, machine=HERE)
    run = run_of(small)
    newest = run.at(6).path / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    same(straight, state(launch(small, machine=HERE)[0]))
    assert "is torn" in capsys.readouterr().out


def test_workers_do_not_change_batches():
    small = job(steps=6)
    batches = Batches(small.pairs, small.objectives, small.seed, small.steps)
    for workers in (1, 3):
        for one, other in zip(loader(batches), loader(batches, workers=workers)):
            assert one["keys"] == other["keys"]
            for name in small.weights:
                assert all(torch.equal(one[name][k], other[name][k]) for k in one[name])


def test_ranks_do_not_change_the_global_batch():
    small = job()
    whole = Batches(small.pairs, small.objectives, small.seed, small.steps)[3]
    parts = [Batches(small.pairs, small.objectives, small.seed, small.steps, rank, 2)[3] for rank in range(2)]
    assert [key for part in parts for key in part["keys"]] == whole["keys"]
    assert torch.equal(torch.cat([p["clip"]["image"] for p in parts]), whole["clip"]["image"])
    assert torch.equal(torch.cat([p["rec"]["image"] for p in parts]), whole["rec"]["image"])
    crops = torch.cat([p["ssl"]["globals"].unflatten(0, (2, -1)) for p in parts], 1).flatten(0, 1)     # crop-major
    assert torch.equal(crops, whole["ssl"]["globals"])
    masks = torch.cat([p["ssl"]["mask"].unflatten(0, (2, -1)) for p in parts], 1).flatten(0, 1)
    assert torch.equal(masks, whole["ssl"]["mask"])
