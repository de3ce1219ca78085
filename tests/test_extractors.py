"""The extractors: the shipped evaluator is the one that was trained, MobileNet gives the figures stated with its weights."""
import pytest
import torch

from vtp.data.pairs import Shards
from vtp.data.shapes import Shapes
from vtp.evaluation.extractors import Inception, MobileNet, ShapesEvaluator
from vtp.evaluation.fid import distance_name, frechet, measure, originals, quantise
from vtp.run import root

WEIGHTS = root().parent / "shared/weights/mobilenet_v1_to_pw12.safetensors"
SHAPES = "2b1faebf78"     # the evaluator's weights: other weights would give other distances under the same name


def test_the_shipped_evaluator():
    evaluator = ShapesEvaluator().build()
    assert evaluator.hash == SHAPES and evaluator.label == "shapes_cnn" and evaluator.dim == 64 and not evaluator.official
    assert (root() / "data/shapes_evaluator.safetensors").stat().st_size < 650_000
    assert distance_name("r", evaluator) == "rFD"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_distances_of_shapes(size):
    "Other images of the law are near, blurred ones far, noise farther."
    evaluator = ShapesEvaluator().build()
    change = {"others": None, "blur": lambda i: torch.nn.functional.avg_pool2d(i, size // 8).repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3), "noise": torch.rand_like}
    seen = lambda source, f=None: measure(((p, i if f is None else quantise(f(i / 255), "round")) for p, i in originals(source.open(), 1000, size, "center_crop", 250)), evaluator).stats
    real = seen(Shapes(count=1000, size=size))
    torch.manual_seed(0)
    distance = {name: frechet(real, seen(Shapes(count=1000, size=size, split="val"), f)) for name, f in change.items()}
    assert 0 < distance["others"] < 30 and distance["blur"] > 10 * distance["others"] and distance["noise"] > 2 * distance["blur"], distance


def test_it_takes_no_part_in_training():
    evaluator = ShapesEvaluator().build().train()
    assert not evaluator.training and not any(p.requires_grad for p in evaluator.parameters())
    assert all(not module.training for module in evaluator.modules())


def test_a_missing_file_names_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr("vtp.evaluation.extractors.root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="git checkout"): ShapesEvaluator().build()
    with pytest.raises(FileNotFoundError, match="curl -LO"): Inception(str(tmp_path / "none.pth")).build()


def test_mobilenet_on_photos(shared, monkeypatch, tmp_path):
    """The stated distances at 600 images: 15.5 to others, 36.3 to themselves with noise of 25/255.

    Which 600 is not stated, so they are met within a third."""
    if not WEIGHTS.exists(): pytest.skip("needs ../shared/weights, MobileNet's weights (never part of the repository)")
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    extractor, generator = MobileNet(str(WEIGHTS)).build(), torch.Generator().manual_seed(0)
    def seen(split, change=lambda images: images):
        reader = Shards(str(shared / f"flickr128/flickr128-{split}-000000.tar.gz")).open()
        return measure(((p, quantise(change(i / 255), "round")) for p, i in originals(reader, 600, 128, "center_crop", 50)), extractor).stats
    photos = seen("val")
    assert frechet(photos, seen("train")) == pytest.approx(15.5, rel=1 / 3)
    assert frechet(photos, seen("val", lambda images: images + 25 / 255 * torch.randn(images.shape, generator=generator))) == pytest.approx(36.3, rel=1 / 3)
