# SPDX-License-Identifier: Apache-2.0
"""With this file here, tests of this folder can import `simulated`."""
