# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval`: the grid of cells, the run over them, and what it would cost."""
