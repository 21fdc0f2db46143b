# SPDX-License-Identifier: Apache-2.0
"""Checks of the library's promises, for tests, for `vtprune doctor`, and for adapters and methods of other packages.

`promises` holds the checks, `families` a tiny random-weight model of every family and batches for it, `recompute` what
pruned generation has to compute.
"""
