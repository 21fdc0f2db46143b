# SPDX-License-Identifier: Apache-2.0
"""A LLaVA of a few thousand random weights and a task of a dozen noise images, for tests of the evaluation.

As a script it is the `vtprune` command with that task registered: `python tiny_eval.py eval CONFIG`.
"""

import fcntl
import random
import re
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.eval.results.records import cell_records, members, read_results
from vtprune.eval.tasks import TASKS, ImageExample, Task

EXAMPLES = 10
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [*SPECIAL, "USER:", "ASSISTANT:", *(f"word{i}" for i in range(12))]


@dataclass(frozen=True)
class Example(ImageExample):
    image: Image.Image
    question: str
    answer: str
    family: str


def examples(limit):
    rng = np.random.RandomState(0)
    drawn = []
    for index in range(EXAMPLES):
        image = Image.fromarray(rng.randint(0, 256, (56, 56, 3), dtype=np.uint8))
        drawn.append(Example(image, " ".join(rng.choice(WORDS[7:], 2 + index % 3)), "one", f"family {index % 2}"))
    return drawn[:limit]


def score(prediction, example):
    """Any function of the prediction will do: random weights answer nothing right."""
    return zlib.crc32(f"{prediction} {example.answer}".encode()) % 5 / 4


def slow_score(prediction, example):
    time.sleep(0.02)  # so that a test finds the run unfinished
    return score(prediction, example)


def files(output: Path) -> dict[str, bytes]:
    """Name -> content of what a run leaves: its results and its cells."""
    cells = {path.name: path.read_bytes() for path in (output / "cells").iterdir()}
    return {"results.jsonl": (output / "results.jsonl").read_bytes(), **cells}


def run_killed_three_times(command: list[str], output: Path, cells: int, examples: int) -> list[dict]:
    """Runs a grid that is killed on the way; every cell and every example is there once. Returns its lines."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    moments = sorted(random.Random().sample(range(1, int(0.9 * cells * examples)), 3))
    for wanted in moments:
        process = subprocess.Popen(command, **streams)
        while examples_on_disk(output) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (moments, process.stderr.read().decode())
    done = subprocess.run(command, **streams)
    assert done.returncode == 0, (moments, done.stderr.decode())
    lines = read_results(output / "results.jsonl")
    assert len({line["cell"] for line in lines}) == len(lines) == cells
    assert {(line["status"], line["n"]) for line in lines} == {("ok", examples)}
    assert len(list((output / "cells").iterdir())) == cells
    for line in lines:
        assert [record["index"] for record in cell_records(output, line["cell"])] == list(range(examples)), moments
    return lines


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """A lock that another process seems to hold. lmms-eval lets all locks of one process be taken twice."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def examples_on_disk(output: Path) -> int:
    """Records of examples in whole batches, also while a run adds to them.

    Between the writing of a finished cell and the removal of its parts, its records are in both.
    """
    kinds = (re.match(r"(.+?)(?:\.jsonl\.gz|\.\w+\.batches)$", path.name) for path in output.glob("cells/*"))
    return len(
        {
            (kind[1], record["index"])
            for kind in kinds
            if kind
            for batch in members(output / "cells" / kind[0])
            for record in batch
            if "index" in record
        }
    )


TASKS["tiny"] = TASKS["tiny again"] = lambda: Task(examples, score, max_new_tokens=3)


def word_tokenizer(words: list[str], placeholders: list[str]) -> PreTrainedTokenizerFast:
    """A token a word, the special ones first."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=placeholders,
    )


def save_model(folder: Path, seed: int = 0) -> Path:
    """16 visual tokens, 3 encoder and 8 decoder layers with grouped queries."""
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=word_tokenizer(WORDS, ["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}USER: {% for part in m['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}ASSISTANT:",
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        ),
        image_token_id=WORDS.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    from vtprune.cli import app

    TASKS["tiny"] = lambda: Task(examples, slow_score, max_new_tokens=3)
    app()
