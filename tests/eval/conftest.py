# SPDX-License-Identifier: Apache-2.0
"""With this file here, tests of the folders below can import the helper modules beside it, e.g. `tiny_eval`."""
