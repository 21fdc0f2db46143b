# SPDX-License-Identifier: Apache-2.0
"""A LLaVA-OneVision of a few thousand random weights and a task of ten noise clips in real files.

Importing it registers the task `tiny_video`; `tests/eval/tiny_eval.py` is the same for images.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import transformers as hf
from tiny_eval import EXAMPLES, score, word_tokenizer

from vtprune.eval.tasks import TASKS, Task, VideoExample

SIZE = 64
"""Height and width of a frame in pixels, 8 x 8 patches, of which a video's tokens are 4 x 4."""
FRAMES = 6
"""Frames that the processor samples."""
TOKENS = FRAMES * 16 + 1
"""Visual tokens of a clip, with the newline token behind the last frame."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"]
WORDS = [*SPECIAL, "USER:", "ASSISTANT:", *(f"word{i}" for i in range(12))]


@dataclass(frozen=True)
class Example(VideoExample):
    path: Path
    question: str
    answer: str
    family: str

    def video_path(self):
        return self.path


def clip(index: int) -> np.ndarray:
    """Coarse noise, (frames, SIZE, SIZE, 3) uint8; 7, 8 or 9 frames, so that sampling differs between clips."""
    rng = np.random.RandomState(index)
    return rng.randint(0, 256, (7 + index % 3, 8, 8, 3), dtype=np.uint8).repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Nearly lossless."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


_FOLDER = tempfile.TemporaryDirectory()  # goes when the process ends


def examples(limit: int | None) -> list[Example]:
    drawn = []
    for index in range(EXAMPLES):
        words = " ".join(np.random.RandomState(index).choice(WORDS[8:], 2 + index % 3))
        path = Path(_FOLDER.name) / f"{index}.mp4"
        if not path.exists():
            write_clip(path, clip(index))
        drawn.append(Example(path, words, "one", f"family {index % 2}"))
    return drawn[:limit]


TASKS["tiny_video"] = lambda: Task(examples, score, max_new_tokens=3, kind="video")


def save_model(folder: Path) -> Path:
    """4 x 4 tokens a frame, 3 encoder and 8 decoder layers with grouped queries."""
    square = {"size": {"height": SIZE, "width": SIZE}}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=[[SIZE, SIZE]]),
        word_tokenizer(WORDS, ["<image>", "<video>"]),
        hf.LlavaOnevisionVideoProcessor(**square, do_sample_frames=True, num_frames=FRAMES),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template="{% for m in messages %}USER: {% for part in m['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }} {% endfor %}{% endfor %}ASSISTANT:",
    )
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **layers, num_hidden_layers=3, image_size=SIZE, patch_size=8, vision_use_head=False
        ),
        text_config=hf.Qwen2Config(
            **layers,
            vocab_size=len(WORDS),
            num_hidden_layers=8,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        ),
        image_token_id=WORDS.index("<image>"),
        video_token_id=WORDS.index("<video>"),
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    hf.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
