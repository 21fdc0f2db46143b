# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server: what its formula says, and its table. What it measures needs vLLM."""

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

SCRIPT = "bench_serving"


@pytest.mark.parametrize(
    ("prompt", "answer", "block", "blocks"),
    [(608, 16, 32, (19, 20)), (176, 16, 32, (6, 6)), (32, 1, 32, (1, 1)), (32, 2, 32, (1, 2)), (33, 1, 16, (3, 3))],
)
def test_blocks_of_a_request(script, prompt, answer, block, blocks):
    assert script.formula(prompt, answer, block) == blocks


def test_the_table_has_medians(script):
    runs = [
        script.Run(speed, 100 * speed, 608, blocks, 19.5, 4.0) for speed, blocks in ((1.0, 40), (3.0, 80), (2.0, 60))
    ]
    line = script.table([(4, "all", script.median(runs))], answer=16, block=32).splitlines()[-1]
    assert line == "| 4 | all | 608 | 2.00 | 200 | 60 | 19.5 | 19 to 20 | 4.00 |"


def test_the_model_has_the_tokens_that_its_processor_asks_for(script, tmp_path):
    folder = script.write_model(tmp_path)
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}
    text = processor.apply_chat_template([message])
    ids = processor(text=text, images=[Image.new("RGB", (50, 30))])["input_ids"][0]
    assert ids.count(config.image_token_id) == (script.IMAGE_SIZE // 14) ** 2 == 576
    assert len(ids) == 576 + 2 and max(ids) < config.text_config.vocab_size
