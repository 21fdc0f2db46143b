# SPDX-License-Identifier: Apache-2.0
"""Interception: one file a place on the path of a visual token. Hooks only; no modelling code is copied or replaced."""
