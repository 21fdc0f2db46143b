# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported beside a torch that is built for CPUs.

The torchvision that installers find is built for CUDA, and its operators do not load beside such a torch. Importing it
then fails where it describes one of them, `nms`, which no processor of images uses. `make test-vllm` copies this file
into the environment, with a .pth file that imports it in every process.
"""

import importlib.abc
import sys


class _Declares(importlib.abc.MetaPathFinder):
    """Declares the operators right before torchvision is imported, and then steps aside."""

    library = None

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declares())
