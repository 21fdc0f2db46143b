# SPDX-License-Identifier: Apache-2.0
"""Visual token pruning for Hugging Face vision-language models."""
