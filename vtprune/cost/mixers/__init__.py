# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer mixes tokens with, one kind a file: its FLOPs, and what its cache holds of a token."""
