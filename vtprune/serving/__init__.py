# SPDX-License-Identifier: Apache-2.0
"""Pruning in servers: what is asked for, how many tokens that leaves, and which. `vllm/` plugs it into vLLM."""
