# SPDX-License-Identifier: Apache-2.0
"""`vtprune bench`: what a method costs and saves in time and memory, beside what its FLOPs promise."""
