"""The registry's torchvision beside a torch without CUDA: the Python of it, which cuts pictures.

Its compiled operators want CUDA's libraries, and it cannot be imported without two of them, which
nothing here calls: they are declared before.
"""

import importlib.abc
import importlib.machinery
import sys


class Declaring(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is asked for, where they do not load."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            declare(spec.submodule_search_locations[0])
        return spec


def declare(folder):
    import torch

    try:
        torch.ops.load_library(f"{folder}/_C.so")
    except OSError:
        boxes = "Tensor dets, Tensor scores, float iou_threshold"
        scale = "float dets_scale, float dets_zero_point"
        torch.library.define("torchvision::nms", f"({boxes}) -> Tensor")
        torch.library.define("torchvision::qnms", f"({boxes}, {scale}) -> Tensor")


sys.meta_path.insert(0, Declaring())
