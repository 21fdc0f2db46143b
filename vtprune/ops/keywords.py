# SPDX-License-Identifier: Apache-2.0
"""MMTok's stop-word filter: the words of a question that say what to look for (arXiv 2508.18264)."""

import re

# fmt: off
_STOP_WORDS = frozenset((
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "do", "does", "did",
    "it", "they", "he", "she", "we", "you", "i", "what", "where", "when", "why", "how", "who", "which",
    "and", "or", "but", "so", "if", "then", "question", "answer",
    "to", "for", "with", "by", "from", "at", "into", "onto", "upon",
))
# fmt: on
_BENCHMARK_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def keywords(text: str) -> str:
    """The words of ``text`` without stop words and without the answer-format instructions of VQA benchmarks.

    Returns:
        Words joined by single spaces. If every word is a stop word: the text without the instructions.
    """
    for instruction in _BENCHMARK_INSTRUCTIONS:
        text = text.replace(instruction, "")
    return " ".join(word for word in re.findall(r"\b\w+\b", text) if word.lower() not in _STOP_WORDS) or text
