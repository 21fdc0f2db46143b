# SPDX-License-Identifier: Apache-2.0
"""`vtprune report`: folders of results as one HTML file that needs nothing else."""
