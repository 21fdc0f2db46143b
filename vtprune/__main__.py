# SPDX-License-Identifier: Apache-2.0
"""`python -m vtprune`."""

from vtprune.cli import app

app()
