# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf

import vtprune
from vtprune.signals import EncoderFeatures
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families
from vtprune.tokens import ModelShape

from .checks import check_pruned

NAME, QUERIES = "deepseek_ocr2", 144
pytestmark = pytest.mark.skipif(not hasattr(hf, "DeepseekOcr2Config"), reason="this release of transformers has none")


def views(*counts: int, side: int = 64) -> dict[str, torch.Tensor]:
    """Whole views, and so many tiles of each."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.randn(len(counts), 3, side, side, generator=generator)}
    inputs["num_local_patches"] = torch.tensor(counts)
    if sum(counts):
        inputs["pixel_values_local"] = torch.randn(sum(counts), 3, 32, 32, generator=generator)
    return inputs


@torch.no_grad()
def test_tiles_then_the_whole_view_then_a_separator():
    """Found by changing one picture at a time, in the model itself."""
    model = families.shared(NAME)
    adapter, inputs = vtprune.adapter_for(model), views(2, 0, 1)

    def features(**changed):
        return torch.cat(list(model.model.get_image_features(**inputs | changed, return_dict=True).pooler_output))

    before = features()
    media = adapter.media("image", inputs, before.split([QUERIES * n + 1 for n in (3, 1, 2)]))
    assert [len(medium) for medium in media] == [3 * QUERIES + 1, QUERIES + 1, 2 * QUERIES + 1]
    assert [medium.grids for medium in media] == [(None,) * 3, (None,), (None,) * 2]
    assert all((medium.lines == 0).all() for medium in media)
    claimed = torch.cat([torch.where(m.crops < 0, -1, m.crops + 10 * i) for i, m in enumerate(media)])
    # Whole views are the last crops; tiles come in the order of their images.
    for name, crops in (("pixel_values", (2, 10, 21)), ("pixel_values_local", (0, 1, 20))):
        for place, crop in enumerate(crops):
            pixels = inputs[name].clone()
            pixels[place] += 1
            moved = (features(**{name: pixels}) - before).abs().amax(-1) > 1e-3
            assert moved.equal(claimed == crop)
    assert before[claimed < 0].equal(model.model.view_separator.expand(3, -1))


@torch.no_grad()
@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0), (1,)])
def test_features_are_those_that_are_projected(counts):
    """The projector runs twice a call."""
    model, inputs = families.shared(NAME), views(*counts)
    recorder = EncoderRecorder(vtprune.adapter_for(model), [EncoderFeatures()], profile=False)
    handles = list(recorder.install())
    output = model.model.get_image_features(**inputs, return_dict=True)
    for handle in handles:
        handle.remove()
    features = recorder.projector_inputs([recorder.encoding("image", output)])
    projected, expected = model.model.multi_modal_projector(features), torch.cat(list(output.pooler_output))
    content = (expected != model.model.view_separator).any(-1)
    assert (~content).sum() == len(counts) and (features[~content] == 0).all()
    torch.testing.assert_close(projected[content], expected[content], atol=1e-5, rtol=1e-5)


def test_what_the_encoder_reads():
    adapter = vtprune.adapter_for(families.shared(NAME))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.encoder_sequences("image", views(2, 0)) == [16 + QUERIES] * 2 + [4 + QUERIES] * 2
    assert adapter.encoder_sequences("image", views(0)) == [16 + QUERIES]
    # From 13 x 13 patches on there are 256 queries.
    assert adapter.encoder_sequences("image", views(0, side=208)) == [13 * 13 + 256]
    (medium,) = adapter.media("image", views(1, side=208), [])
    assert medium.crops.tolist() == [*[0] * QUERIES, *[1] * 256, -1]
    assert len(adapter.media("image", views(0, side=192), [])[0]) == QUERIES + 1


def test_pixels_are_those_of_an_image_alone():
    adapter = vtprune.adapter_for(families.shared(NAME))
    inputs = views(2, 0, 1)
    whole, local = inputs["pixel_values"], inputs["pixel_values_local"]
    for image, own in enumerate((local[:2], local[:0], local[2:])):
        assert torch.equal(adapter.pixels("image", inputs)[image], torch.cat([whole[image].flatten(), own.flatten()]))
    assert [len(pixels) for pixels in adapter.pixels("image", views(0, 0))] == [3 * 64 * 64] * 2


def test_a_separator_is_no_content():
    """Images of one view; of two, and of one; of three. One more token of each stays as long as anything does."""
    for scope, counts in (("crop", [3 + 1, 6 + 1 + 3 + 1, 9 + 1]), ("image", [3 + 1, 3 + 1 + 3 + 1, 3 + 1])):
        report = check_pruned(NAME, "image", "divprune", keep_ratio=None, keep_tokens=3, scope=scope)
        assert report.counts[:, 0].tolist() == counts


def test_what_reads_the_encoder_is_refused():
    model = families.shared(NAME)
    for method, reason in (("fastervlm", "twice a call"), ("pool", "stand for no place")):
        with pytest.raises(vtprune.UnsupportedStageError, match=f"{method}.*{reason}"):
            vtprune.prune(model, method, keep_ratio=0.5)
