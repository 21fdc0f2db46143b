# SPDX-License-Identifier: Apache-2.0
"""`vtprune tune`: a race of methods and budgets on a model and a task, which ends in one setting and says why."""
