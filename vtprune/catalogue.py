# SPDX-License-Identifier: Apache-2.0
"""The list of the methods in the library. The registry, the exports and the tables follow it and its order.

The module of a method is imported when the method is first asked for, so that `import vtprune` does not wait for all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see of `vtprune.NAME`
    # isort: off
    from vtprune.methods.base import Method

    from vtprune.methods.vtc_cls import VTCCls as VTCCls
    from vtprune.methods.fastervlm import FasterVLM as FasterVLM
    from vtprune.methods.vispruner import VisPruner as VisPruner
    from vtprune.methods.transprune import TransPrune as TransPrune
    from vtprune.methods.mmtok import MMTok as MMTok
    from vtprune.methods.cdpruner import CDPruner as CDPruner
    from vtprune.methods.divprune import DivPrune as DivPrune
    from vtprune.methods.fastv import FastV as FastV
    from vtprune.methods.dart import DART as DART
    from vtprune.methods.holitom import HoliTom as HoliTom
    from vtprune.methods.vidcom2 import VidCom2 as VidCom2
    from vtprune.methods.fastvid import FastVID as FastVID
    from vtprune.methods.aim import AIM as AIM
    from vtprune.methods.mustdrop import MustDrop as MustDrop
    from vtprune.methods.tome import ToMe as ToMe
    from vtprune.methods.auroracap import AuroraCap as AuroraCap
    from vtprune.methods.tinychart import TinyChart as TinyChart
    from vtprune.methods.mctf import MCTF as MCTF
    from vtprune.methods.zero_tprune import ZeroTPrune as ZeroTPrune
    from vtprune.methods.tca import TCA as TCA
    from vtprune.methods.ltp import LTP as LTP
    from vtprune.methods.lazyllm import LazyLLM as LazyLLM
    from vtprune.methods.pdrop import PyramidDrop as PyramidDrop
    from vtprune.methods.sparsevlm import SparseVLM as SparseVLM
    from vtprune.methods.textmonkey import TextMonkey as TextMonkey
    from vtprune.methods.progressive_pooling import ProgressivePooling as ProgressivePooling
    from vtprune.methods.adaptive_pool import AdaptivePool as AdaptivePool
    from vtprune.methods.bvllm_merge import BVLLMMerge as BVLLMMerge
    from vtprune.methods.token_correlation import TokenCorrelation as TokenCorrelation
    from vtprune.methods.recoverable import Recoverable as Recoverable
    from vtprune.methods.glsim import GLSim as GLSim
    from vtprune.methods.glsim_patches import GLSimPatches as GLSimPatches
    from vtprune.methods.visionzip import VisionZip as VisionZip
    from vtprune.methods.scope import SCOPE as SCOPE
    from vtprune.methods.holov import HoloV as HoloV
    from vtprune.methods.prunesid import PruneSID as PruneSID
    from vtprune.methods.prumerge import PruMerge as PruMerge
    from vtprune.methods.prumerge_plus import PruMergePlus as PruMergePlus
    from vtprune.methods.flashvid import FlashVID as FlashVID
    from vtprune.methods.dtd import DTD as DTD
    from vtprune.methods.dycoke import DyCoke as DyCoke
    from vtprune.methods.mmr import MMR as MMR
    from vtprune.methods.random import Random as Random
    from vtprune.methods.uniform import Uniform as Uniform
    from vtprune.methods.random_patches import RandomPatches as RandomPatches
    from vtprune.methods.uniform_patches import UniformPatches as UniformPatches
    from vtprune.methods.uniform_frames import UniformFrames as UniformFrames
    from vtprune.methods.block import Block as Block
    from vtprune.methods.pool import Pool as Pool
    from vtprune.methods.zero import Zero as Zero

CLASSES = {
    "vtc_cls": "VTCCls",
    "fastervlm": "FasterVLM",
    "vispruner": "VisPruner",
    "transprune": "TransPrune",
    "mmtok": "MMTok",
    "cdpruner": "CDPruner",
    "divprune": "DivPrune",
    "fastv": "FastV",
    "dart": "DART",
    "holitom": "HoliTom",
    "vidcom2": "VidCom2",
    "fastvid": "FastVID",
    "aim": "AIM",
    "mustdrop": "MustDrop",
    "tome": "ToMe",
    "auroracap": "AuroraCap",
    "tinychart": "TinyChart",
    "mctf": "MCTF",
    "zero_tprune": "ZeroTPrune",
    "tca": "TCA",
    "ltp": "LTP",
    "lazyllm": "LazyLLM",
    "pdrop": "PyramidDrop",
    "sparsevlm": "SparseVLM",
    "textmonkey": "TextMonkey",
    "progressive_pooling": "ProgressivePooling",
    "adaptive_pool": "AdaptivePool",
    "bvllm_merge": "BVLLMMerge",
    "token_correlation": "TokenCorrelation",
    "recoverable": "Recoverable",
    "glsim": "GLSim",
    "glsim_patches": "GLSimPatches",
    "visionzip": "VisionZip",
    "scope": "SCOPE",
    "holov": "HoloV",
    "prunesid": "PruneSID",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMergePlus",
    "flashvid": "FlashVID",
    "dtd": "DTD",
    "dycoke": "DyCoke",
    "mmr": "MMR",
    "random": "Random",
    "uniform": "Uniform",
    "random_patches": "RandomPatches",
    "uniform_patches": "UniformPatches",
    "uniform_frames": "UniformFrames",
    "block": "Block",
    "pool": "Pool",
    "zero": "Zero",
}
"""Name of a method, which is that of its module, too -> name of its class."""


def load(name: str) -> type[Method]:
    """The class of a method of `CLASSES`."""
    return getattr(import_module(f"vtprune.methods.{name}"), CLASSES[name])


def exported(attribute: str, module: str) -> type[Method]:
    """The method of which `attribute` is the class's name, for `__getattr__` of `module`.

    Raises AttributeError if there is none.
    """
    for name, class_name in CLASSES.items():
        if class_name == attribute:
            return load(name)
    raise AttributeError(f"module {module!r} has no attribute {attribute!r}")
