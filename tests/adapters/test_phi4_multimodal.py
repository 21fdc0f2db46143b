# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.batching import encode_all
from vtprune.testing.media import AUDIO
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered

NAME = "phi4_multimodal"
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release has no Phi-4-multimodal")


@torch.no_grad()
def test_mosaic_separator_whole_view():
    """Which crop and square of patches each token depends on, found by changing pixels."""
    model = blinkered(NAME)
    adapter = vtprune.adapter_for(model)
    inputs = families.batch(NAME, model, samples=1).inputs  # a row of two crops, of which three columns are no padding
    (encoded,) = encode_all(adapter, inputs)
    (medium,) = adapter.media("image", encoded.arguments, encoded.features)
    assert medium.grids == (Grid(2, 3), Grid(2, 2)) and len(medium) == len(encoded.rows)
    pixels = inputs["image_pixel_values"]
    stands_for = [None] * len(medium)
    for crop in range(3):
        for row in range(2):
            for column in range(2):
                changed = pixels.clone()
                changed[0, crop, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
                (after,) = encode_all(adapter, inputs | {"image_pixel_values": changed})
                for token in (after.rows != encoded.rows).any(-1).nonzero()[:, 0].tolist():
                    assert stands_for[token] is None
                    stands_for[token] = (crop, row, column)
    mosaic = [[(1, row, 0), (1, row, 1), (2, row, 0), None] for row in range(2)]
    whole = [[(0, row, 0), (0, row, 1), None] for row in range(2)]
    assert stands_for == [*mosaic[0], *mosaic[1], None, *whole[0], *whole[1]]
    assert medium.crops.tolist() == [-1 if place is None else int(place[0] == 0) for place in stands_for]
    assert medium.lines.tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 3 + [4] * 3
    assert [len(image) for image in adapter.pixels("image", encoded.arguments)] == [3]
    assert adapter.encoder_sequences("image", encoded.arguments) == [16] * 3
    assert adapter.shape == ModelShape(4, 8, 2, has_cls=False)


@torch.no_grad()
def test_the_prompt_is_embedded_as_the_model_does_it():
    model = families.shared(NAME)
    adapter, inputs = vtprune.adapter_for(model), families.batch(NAME, model).inputs
    ids = inputs["input_ids"]
    images = {name: value for name, value in inputs.items() if name.startswith("image_")}
    expected = model.model.embed_tokens_extend(ids, model.model.embed_tokens(ids), **images)
    done = adapter.embedded(dict(inputs))
    assert torch.equal(done["inputs_embeds"], expected) and done["input_ids"] is done["image_pixel_values"] is None
    assert torch.equal(model(**done).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
def test_sounds_are_heard_and_are_no_words(with_image):
    """Beside an image they pass another projection."""
    model = families.shared(NAME)
    (inputs,) = families.batch(NAME, model, samples=1).singles
    inputs = dict(inputs) if with_image else {"input_ids": inputs["input_ids"][:, :2]}
    sound = torch.randn(1, 64, 80, generator=torch.Generator().manual_seed(0))
    heard = 8
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, heard), AUDIO), torch.tensor([[5, 6]])], 1)
    inputs.pop("attention_mask", None)
    inputs |= {"audio_input_features": sound, "audio_embed_sizes": torch.tensor([heard])}
    done = vtprune.adapter_for(model).embedded(dict(inputs))
    torch.testing.assert_close(model(**done).logits, model(**inputs).logits, atol=0, rtol=0)
    with vtprune.prune(model, "divprune", keep_ratio=0.4) as session:
        model(**inputs)
    assert (session.report.counts[0, 0] > 0) == with_image
    images = torch.full_like(inputs["input_ids"], -1)
    found = vtprune.adapter_for(model).markers(inputs["input_ids"], images)
    assert torch.equal(found, inputs["input_ids"] == AUDIO)


@pytest.mark.parametrize("method", ["fastv", "transprune", "vtc_cls", "mmtok"])
def test_what_cannot_be_read_is_refused(method):
    with pytest.raises(UnsupportedStageError):
        vtprune.prune(families.shared(NAME), method, keep_ratio=0.5)
