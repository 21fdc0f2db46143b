# SPDX-License-Identifier: Apache-2.0
"""Model families: the facts a method cannot know."""
