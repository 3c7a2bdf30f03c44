"""Imports torchvision beside any torch.

A torchvision wheel built for CUDA dies on import beside a CPU-only torch (`operator torchvision::nms does not exist`): its
compiled operators are not loaded, yet their meta kernels are registered.  Declaring the two schemas first makes data sets,
transforms and models work; `torchvision.ops.nms` itself then still raises.  Where torchvision imports normally, nothing is done.
"""

import importlib
import sys
from types import ModuleType

import torch

from deferral.errors import installing

__all__ = ["import_torchvision"]

_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The torchvision package.  Raises ImportError with what to install."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(f"image data needs torchvision: {installing('vision')}") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # the declarations live as long as this object
    return importlib.import_module("torchvision")
