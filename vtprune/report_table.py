# SPDX-License-Identifier: Apache-2.0
"""The short tables that reports print."""

HEADER = f"  {'':<24}{'unpruned':>12}{'pruned':>14}{'share':>10}"


def row(name: str, pruned: float, full: float) -> str:
    """A line of a table: a name of up to 24 characters, what it was unpruned and pruned, and the share that is left."""
    share = f"{pruned / full:.1%}" if full else "-"
    return f"  {name:<24}{full:>12,.4g}{pruned:>14,.4g}{share:>10}"
