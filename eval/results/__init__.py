# SPDX-License-Identifier: Apache-2.0
"""What runs leave on disk, read back, summarised and compared."""
