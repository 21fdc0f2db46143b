# SPDX-License-Identifier: Apache-2.0
"""The library's promises, checked from outside: public interface and `session.report` only."""
