# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions: the arithmetic of the methods, without a model in sight. One concept a module."""
