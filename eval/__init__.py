# SPDX-License-Identifier: Apache-2.0
"""Evaluation: runs grids of methods and budgets and reports what they cost and keep."""
