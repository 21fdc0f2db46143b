# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: `adapters/` and `eval/` install below `vtprune`.

The remaining metadata (name, version, dependencies, extras, scripts) is in pyproject.toml.

The links `vtprune/adapters`, `vtprune/eval` and `src/vtprune` make one package tree of the three folders. So an
editable install is one line in a .pth file that names `src`: type checkers and editors follow it, and Python takes what
it finds there before a folder that merely has the package's name. `python -m vtprune` in the checkout finds all of it.
"""

from pathlib import Path

from setuptools import find_packages, setup

# import name -> top-level folder
FOLDERS = {"vtprune": "vtprune", "vtprune.adapters": "adapters", "vtprune.eval": "eval"}

packages = [
    package
    for root, folder in FOLDERS.items()
    for package in (root, *(f"{root}.{child}" for child in find_packages(folder, exclude=["adapters*", "eval*"])))
]

setup(
    # Where git has no symbolic links (Windows), a wheel can be built all the same.
    package_dir={"": "src"} if Path("src/vtprune/adapters").is_dir() else FOLDERS,
    packages=packages,
    package_data={
        "vtprune": ["py.typed"],
        "vtprune.adapters": ["py.typed"],
        "vtprune.eval": ["py.typed", "configs/*.yaml", "configs/lmms/*.yaml"],
        "vtprune.eval.digitscenes": ["model/*", "video_model/*", "open_clip_model/*"],
        "vtprune.eval.pages": ["templates/*.j2"],
        "vtprune.eval.presets": ["*.yaml"],
        "vtprune.eval.tasks": ["*.yaml", "*.jsonl"],
    },
)
