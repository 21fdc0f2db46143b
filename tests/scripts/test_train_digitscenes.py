# SPDX-License-Identifier: Apache-2.0
"""The training script: what it trains on is what a test prompt looks like, and a killed run loses nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.model import VISUAL_TOKENS, build_model, build_processor

SCRIPT = "train_digitscenes"


@torch.no_grad()
def test_packed_questions_see_what_a_prompt_sees(script):
    """Logits of three questions packed behind one image equal those of three prompts through the whole model."""
    torch.manual_seed(0)
    model, processor = build_model().eval(), build_processor()
    examples = digitscenes.examples(limit=3)
    image = examples[0].image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pack = script.Pack.of([[script.Block.make(e.question, [e.answer], e.family) for e in examples]])
    decoder = script.Decoder(model, "cpu")
    visual = decoder.project(script.encode(model.model.vision_tower, pixels, "cpu"))
    hidden = decoder.hidden(visual, script.strided_tokens(1, VISUAL_TOKENS), pack, compact=False)[-1]
    packed = model.lm_head(hidden[:, len(script.PREFIX) + VISUAL_TOKENS :])[pack.answers]

    texts = [f"USER: <image> {e.question} ASSISTANT:" for e in examples]
    alone = [model(**processor(images=image, text=t, return_tensors="pt")).logits[0, -1] for t in texts]
    torch.testing.assert_close(packed, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compact", [False, True])
@torch.no_grad()
def test_kept_tokens_take_their_positions(script, compact):
    """`compact` renumbers: a shifted choice of the same features then gives the same answer, otherwise another."""
    torch.manual_seed(0)
    decoder = script.Decoder(build_model().eval(), "cpu")
    pack = script.Pack.of([[script.Block.make("how many digits are there ?", ["2"], "count")]])
    visual = torch.randn(1, 4, 128)
    near, far = (
        decoder.hidden(visual, torch.tensor([kept]), pack, compact)[-1] for kept in ([0, 1, 2, 3], [0, 40, 80, 120])
    )
    assert torch.allclose(near, far, atol=1e-6) == compact


def test_interrupted_stage_ends_as_an_uninterrupted_one(script, tmp_path):
    def run(folder, stop):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(1)
        module = nn.Linear(3, 3)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(np.random.RandomState(step).rand(5, 3)).float()
            return (module(x) - x).square().mean(), {}

        script.train(script.Stage("toy", 250, 1e-2, loss), module, folder)
        return module

    whole = run(tmp_path / "whole", stop=None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=170)
    resumed = run(tmp_path / "parts", stop=None)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"toy.pt"}


def test_training_choices_of_tokens(script):
    rng = np.random.RandomState(0)
    on_digit = torch.zeros(2, VISUAL_TOKENS, dtype=torch.bool)
    on_digit[:, 7:12] = True
    for kept in (script.random_tokens(rng, on_digit, 20, bias=1.0), script.strided_tokens(2, 20)):
        assert kept.shape == (2, 20) and (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < VISUAL_TOKENS
    assert all(set(range(7, 12)) <= set(row.tolist()) for row in script.random_tokens(rng, on_digit, 5, bias=1.0))
    assert torch.equal(script.strided_tokens(1, VISUAL_TOKENS, 0.9)[0], torch.arange(VISUAL_TOKENS))
    features = torch.eye(4).repeat_interleave(3, 0)[None]  # four directions, three times each
    assert len({i // 3 for i in script.diverse_tokens(features, 4)[0].tolist()}) == 4
