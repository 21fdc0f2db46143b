# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: `adapters/` and `eval/` install below `vtprune`.

The remaining metadata (name, version, dependencies, extras, scripts) is in pyproject.toml.
"""

from setuptools import find_packages, setup

# import name -> top-level folder
PACKAGE_DIR = {"vtprune": "vtprune", "vtprune.adapters": "adapters", "vtprune.eval": "eval"}

packages = [
    package
    for root, folder in PACKAGE_DIR.items()
    for package in (root, *(f"{root}.{child}" for child in find_packages(folder)))
]

setup(
    package_dir=PACKAGE_DIR,
    packages=packages,
    package_data={
        "vtprune.eval": ["configs/*.yaml", "configs/lmms/*.yaml"],
        "vtprune.eval.digitscenes": ["model/*", "video_model/*"],
        "vtprune.eval.pages": ["templates/*.j2"],
        "vtprune.eval.presets": ["*.yaml"],
        "vtprune.eval.tasks": ["*.yaml", "*.jsonl"],
    },
)
