"""One process's part of an evaluation in a job of two, for test_evaluation.py; imports little, to start fast.

As a program: `python evaluation_share.py STORE` is the second process.
"""

import sys
from datetime import timedelta

import torch

from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.data.scenes import CLASSES, draw_scene
from routeseg.evaluation import Evaluation, evaluate
from routeseg.evaluation.test_time import MultiPass

PICTURES = 5


def evaluate_share(rank: int = 0, world: int = 1) -> Evaluation:
    """The pictures that fall to this process: every second one, of different sizes, and so of different costs."""
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(num_classes=len(CLASSES), depth=3, base_channels=8, stem_channels=8).eval()
    examples = []
    for index in range(rank, PICTURES, world):
        image, labels = draw_scene(0, index, (48 + 16 * index, 64), "mixed")
        examples.append(
            {
                "image": torch.from_numpy(image.transpose(2, 0, 1).copy())[None],
                "labels": torch.from_numpy(labels.astype("int64"))[None],
                "name": str(index),
                "skipped": 0,
            }
        )
    return evaluate(model, examples, MultiPass(SkipEngine(model), [0.75, 1.0]), boundary_width=0.02)


def evaluate_in_job(rank: int, store: str) -> Evaluation:
    """The result of this process of a job of two, which meet in the file `store`."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return evaluate_share(rank, 2)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate_in_job(1, sys.argv[1])
