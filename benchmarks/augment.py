"""Cost of the self-supervised view (2 global crops of 256, 8 local ones of 96, masks) on one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/augment.py [--images 16]

Peers, on the same core and the same decoded images: torchvision's transforms one crop after the other on Pillow
images, as DINOv2 composes them, and a plain Python mask generator. Prints one markdown row. CPU time, best of five.
"""
import argparse
import math
import random
import time

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from vtp.data.augment import block_masks
from vtp.data.samples import Pair, mix
from vtp.interfaces import Draw
from vtp.objectives.self_supervised import SelfSupervised


def best(function, repeats=5):
    "Least CPU seconds of `function()`, after one warm-up."
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def picture(seed, height=384, width=512):
    "A smooth colourful image: what a decoder hands over."
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def composed():
    "DINOv2's crops as torchvision transforms: (transform, how many) for first global, second global and local crops."
    def crop(size, scale): return [T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip()]
    colour = [T.RandomApply([T.ColorJitter(.4, .4, .2, .1)], p=.8), T.RandomGrayscale(.2)]
    def blur(p): return [T.RandomApply([T.GaussianBlur(9, (.1, 2.))], p=p)]
    last = [T.PILToTensor()]
    return [(T.Compose(crop(256, (.32, 1.)) + colour + last), 1),
            (T.Compose(crop(256, (.32, 1.)) + colour + blur(.9) + [T.RandomSolarize(128, .2)] + last), 1),
            (T.Compose(crop(96, (.05, .32)) + colour + blur(.5) + last), 8)]


def one_mask(count, side=16):
    "One block mask, rectangle after rectangle."
    mask, failures = np.zeros((side, side), bool), 0
    while mask.sum() < count and failures < 10:
        most = min(count - mask.sum(), side * side / 2)
        area, aspect = random.uniform(4, most), math.exp(random.uniform(math.log(.3), -math.log(.3)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if rows >= side or columns >= side:
            continue
        top, left = random.randint(0, side - rows), random.randint(0, side - columns)
        gain = (~mask[top:top + rows, left:left + columns]).sum()
        if 0 < gain <= most:
            mask[top:top + rows, left:left + columns], failures = True, 0
    return mask


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images in a batch")
    n = parser.parse_args().images
    torch.set_num_threads(1)
    pairs = [Pair(picture(i), None, -1, str(i)) for i in range(n)]
    config = SelfSupervised(batch=n)
    draw = Draw(0, 0, mix(np.arange(n)), np.arange(n))
    view = best(lambda: config.view(pairs, draw)) / n
    pictures = [Image.fromarray(pair.image) for pair in pairs]
    peer = best(lambda: [transform(image) for image in pictures for transform, count in composed() for _ in range(count)]) / n
    masks = best(lambda: block_masks(mix(np.arange(8)), 128, (16, 16))) / (8 * 64)
    naive = best(lambda: [one_mask(25 + i % 103) for i in range(64)], 3) / 64
    print("| images | view, ms/image | torchvision, ms/image | masks, µs/mask | Python masks, µs/mask |")
    print("|---:|---:|---:|---:|---:|")
    print(f"| {n} | {view * 1e3:.1f} | {peer * 1e3:.1f} | {masks * 1e6:.0f} | {naive * 1e6:.0f} |")


if __name__ == "__main__":
    main()
