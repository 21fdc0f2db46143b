# SPDX-License-Identifier: Apache-2.0
"""Evaluation: runs grids of methods and budgets, and reports their cost and what accuracy remains.

`inputs` loads models and lays out prompts, `running` runs the grid, `results` reads, summarises and compares what runs
leave, `pages` draws it. `bench` measures time and memory, `lmms` is the plug-in for lmms-eval. `tasks`, `digitscenes`,
`presets` and `configs` hold tasks, the benchmark that comes with the library, published settings and ready files.
"""
