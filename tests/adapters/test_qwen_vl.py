# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import vtprune
from vtprune.testing import families
from vtprune.testing.media import END, FIRST_WORD, IMAGE, MERGE, PATCH, VIDEO
from vtprune.testing.recompute import recompute
from vtprune.testing.tiny import FAMILIES
from vtprune.tokens import Grid
from vtprune.transformers_private import CACHE

from .checks import ATOL, NEW, check_frames_are_asked, check_pruned, check_untouched, every_cell

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CELL = MERGE * PATCH
"""Side, in pixels, of what one visual token shows."""

every_family = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", ["image", "video"])
both_positions = pytest.mark.parametrize("positions", ["original", "compact"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# -- layouts ----------------------------------------------------------------------------------------------------------


def blinkered(name: str):
    """A new model whose vision encoder has no attention between patches: a token depends only on its own pixels."""
    model = families.build(name)
    for block in model.model.visual.blocks:
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    return model


def processed(kind: str, media: list[Tensor]) -> dict[str, Tensor]:
    """What transformers' own processor makes of images (3, height, width) or videos (frames, 3, height, width)."""
    sizes = dict(patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, do_resize=False, return_tensors="pt")
    if kind == "image":
        return dict(Qwen2VLImageProcessor()(media, **sizes))
    return dict(Qwen2VLVideoProcessor()(media, do_sample_frames=False, **sizes))


def encode(model, kind: str, inputs: dict[str, Tensor]):
    """Features, one tensor a medium, and what the merger was called with."""
    seen = []
    handle = model.model.visual.merger.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = getattr(model.model, f"get_{kind}_features")(**inputs)
    handle.remove()
    return output.pooler_output, seen[0]


@every_kind
@every_family
def test_tokens_stand_for_the_pixels_that_they_show(name, kind):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    sizes = {"image": [(1, 3, 5), (1, 4, 3)], "video": [(6, 3, 5), (4, 4, 3)]}[kind]  # frames, rows, columns of tokens
    media = [torch.randint(0, 200, (f, 3, r * CELL, c * CELL), dtype=torch.uint8) for f, r, c in sizes]

    def look(changed: list[Tensor]):
        inputs = processed(kind, [m[0] for m in changed] if kind == "image" else changed)
        features, merged = encode(model, kind, inputs)
        return inputs, features, adapter.projector_inputs(kind, inputs, merged)

    inputs, before, encoder_before = look(media)
    layouts = adapter.media(kind, inputs, before)
    assert [len(layout) for layout in layouts] == list(map(len, before))
    assert all(layout.lines is None for layout in layouts)
    for number, (frames, rows, columns) in enumerate(sizes):
        steps = (frames + 1) // 2
        assert layouts[number].grids == (Grid(rows, columns),) * steps
        for frame, row, column in ((0, 0, 1), (frames - 1, rows - 1, 0), (frames // 2, 1, columns - 1)):
            changed = [m.clone() for m in media]
            top, left = row * CELL, column * CELL
            changed[number][frame, :, top : top + CELL, left : left + CELL] += 50
            _, after, encoder_after = look(changed)
            different = [(a != b).any(1).nonzero().flatten() for a, b in zip(before, after, strict=True)]
            assert sum(map(len, different)) == 1
            token = int(different[number])
            assert layouts[number].crops[token] == frame // 2
            in_crop = token - int((layouts[number].crops == frame // 2).int().argmax())
            assert in_crop == row * columns + column
            moved = (encoder_before != encoder_after).any(1).nonzero().flatten()
            assert moved.tolist() == [sum(map(len, before[:number])) + token]


@every_kind
@every_family
def test_encoder_features_stand_beside_what_is_made_of_them(name, kind):
    model = families.shared(name)
    adapter, inputs = vtprune.adapter_for(model), encoder_inputs(families.batch(name, model, media=kind).inputs, kind)
    features, states = encode(model, kind, inputs)
    features = torch.cat(features)
    merged = model.model.visual.merger(states)
    patches = states.unflatten(0, (-1, MERGE**2))
    found = torch.cdist(features, merged).argmin(1)
    assert torch.equal(merged[found], features) and sorted(found.tolist()) == list(range(len(features)))
    assert (name == "qwen2_5_vl") == (found.tolist() != list(range(len(features))))  # its windows reorder
    assert torch.equal(adapter.projector_inputs(kind, inputs, states), patches[found].mean(1))


@every_kind
@every_family
def test_media_of_a_call_are_told_apart(name, kind):
    model = families.shared(name)
    adapter, batch = vtprune.adapter_for(model), families.batch(name, model, media=kind)
    inputs = encoder_inputs(batch.inputs, kind)
    lengths = []
    handle = model.model.visual.blocks[1].register_forward_pre_hook(  # one of the layers that look beyond windows
        lambda module, args, given: lengths.extend(given["cu_seqlens"].diff().tolist()), with_kwargs=True
    )
    encode(model, kind, inputs)
    handle.remove()
    assert adapter.encoder_sequences(kind, inputs) == lengths
    pixels = list(adapter.pixels(kind, inputs))
    alone = [p for one in batch.singles for p in adapter.pixels(kind, encoder_inputs(one, kind))]
    assert len(pixels) == len(inputs[f"{kind}_grid_thw"]) == 4
    assert all(map(torch.equal, pixels, alone))


def encoder_inputs(inputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    return {key: inputs[key] for key in names}


@every_family
def test_what_methods_are_told_of_the_model(name):
    adapter = vtprune.adapter_for(families.shared(name))
    shape = adapter.shape
    assert (shape.encoder_layers, shape.feature_layer, shape.decoder_layers, shape.has_cls) == (4, 3, 8, False)
    assert adapter.visual_token_ids == {"image": IMAGE, "video": VIDEO}
    with pytest.raises(vtprune.UnsupportedStageError, match="CLS"):
        vtprune.prune(families.shared(name), "vtc_cls", keep_ratio=0.5)


@every_family
def test_every_frame_is_asked_what_follows_the_whole_video(name):
    # Qwen3-VL has time stamps between the frames. Neither they nor the marks around them are part of the question.
    check_frames_are_asked(name, END)


# -- generation -------------------------------------------------------------------------------------------------------


def generate(model, batch: families.Batch, **options):
    return model.generate(
        **batch.inputs,
        max_new_tokens=NEW,
        suppress_tokens=list(batch.visual_ids),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def assert_recomputed(model, batch, report, output, positions, merged=False, copies=1):
    """Every step's logits of a left-padded generation are what a recompute without cache gives."""
    logits = torch.stack(output.logits, 1)
    for row, generated in enumerate(output.sequences[:, -logits.shape[1] :]):
        sample = row // copies
        kept = [report.kept(sample, layer) - batch.first_column(sample) for layer in range(report.depth)]
        sources = report.sources(sample, 0) if merged else None
        expected = recompute(model, batch.singles[sample], generated[:-1], kept, positions, sources)
        torch.testing.assert_close(logits[row], expected[-len(generated) :], atol=ATOL, rtol=0)


def of_every_family(test):
    """Parametrises `name` beside the `every_cell` of one family: all three have the same media and methods."""
    return every_family(every_cell(NAMES[0], cls_token=False)(test))


@of_every_family
def test_generation_is_recomputed(name, media, method, attention, positions):
    check_pruned(name, media, method, attention, positions)


@both_positions
@pytest.mark.parametrize("method", ["random", "divprune", "mmtok"])
@every_family
def test_one_budget_for_all_frames_of_a_video(name, method, positions):
    report = check_pruned(name, "video", method, positions=positions, scope="image", keep_ratio=0.15)
    counts = [len(report.kept(sample)) for sample in range(3)]
    assert counts == [round(0.15 * 27), round(0.15 * 20) + round(0.15 * 24), round(0.15 * 45)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_keeping_everything_changes_nothing(name, attention):
    for media in families.MEDIA[name]:
        check_untouched(name, media, attention)


@pytest.mark.parametrize("media", ["image", "video", "mixed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "methods",
    [
        [{"name": "fastv", "layer": 1}],
        [{"name": "fastv", "layer": 2}],
        [{"name": "fastv", "layer": 3}],
        [{"name": "transprune", "layers": (1, 2, 3), "schedule": (0.8, 0.6, 0.2)}],
        [{"name": "divprune", "keep_ratio": 0.6}, {"name": "fastv", "layer": 2}],
        [{"name": "pool", "keep_ratio": 0.5}, {"name": "fastv", "layer": 1}],
        [{"name": "zero"}],
    ],
    ids=lambda methods: "+".join(f"{m['name']}{m.get('layer', '')}" for m in methods),
)
def test_deepstack_features_are_cut_and_merged_with_their_tokens(methods, attention, media):
    # DeepStack features are added after layers 0, 1 and 2, so these cuts are between them.
    positions = {"sdpa": "original", "eager": "compact"}[attention]
    model = families.shared("qwen3_vl", attention)
    batch = families.batch("qwen3_vl", model, media=media)
    with vtprune.prune(model, [method | {"positions": positions} for method in methods]) as session:
        output = generate(model, batch)
    assert session.report.keep_ratio < 0.8
    assert_recomputed(model, batch, session.report, output, positions, merged=methods[0]["name"] == "pool")


# -- ways to decode ---------------------------------------------------------------------------------------------------

every_stage = pytest.mark.parametrize("method", ["divprune", "fastv", "transprune"])


@both_positions
@every_stage
@every_family
def test_without_a_cache_with_beams_and_with_several_answers(name, method, positions):
    model = families.shared(name)
    batch = families.batch(name, model, media="mixed")
    with vtprune.prune(model, method, keep_ratio=0.4, positions=positions) as session:
        uncached = generate(model, batch, use_cache=False)
        assert_recomputed(model, batch, session.report, uncached, positions)
        torch.manual_seed(0)
        sampled = generate(model, batch, do_sample=True, num_return_sequences=2)
        assert_recomputed(model, batch, session.report, sampled, positions, copies=2)
        beams = generate(model, batch, num_beams=2, num_return_sequences=2, output_scores=True)
        report = session.report
    for row, generated in enumerate(beams.sequences[:, -NEW:]):
        kept = [report.kept(row // 2, layer) - batch.first_column(row // 2) for layer in range(report.depth)]
        logits = recompute(model, batch.singles[row // 2], generated[:-1], kept, positions)[-NEW:]
        score = logits.log_softmax(-1).gather(1, generated[:, None]).sum() / NEW
        torch.testing.assert_close(beams.sequences_scores[row], score, atol=ATOL, rtol=0)


@both_positions
@every_stage
@every_family
def test_a_loop_of_plain_calls(name, method, positions):
    model = families.shared(name)
    batch = families.batch(name, model, media="mixed")
    for inputs in batch.singles:
        inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        with vtprune.prune(model, method, keep_ratio=0.4, positions=positions) as session:
            output = model(**inputs, use_cache=True)
            logits, report, cache = [output.logits[0, -1]], session.report, output[CACHE]
            stored = report.counts[0] + report.text_tokens[0]
            assert [layer.keys.shape[-2] for layer in cache.layers] == stored.tolist()
            for _ in range(NEW - 1):
                token = logits[-1].argmax().view(1, 1)
                logits.append(model(input_ids=token, **{CACHE: cache}).logits[0, -1])
        generated = torch.stack(logits).argmax(-1)
        kept = [report.kept(0, layer) for layer in range(report.depth)]
        expected = recompute(model, inputs, generated[:-1], kept, positions)[-NEW:]
        torch.testing.assert_close(torch.stack(logits), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_plain_calls_after_a_video_that_runs_ahead_of_the_text(positions):
    # The last positions in time of a long video are above those of the text after it. Direct calls of the model go on
    # after the video's positions, `generate()` after those of the text.
    model = families.shared("qwen2_5_vl")
    inputs = families.batch("qwen2_5_vl", model, media="video").singles[2]
    del inputs["attention_mask"]
    received = []
    watch = model.model.language_model.register_forward_pre_hook

    def decode():
        handle = watch(lambda module, args, given: received.append(given["position_ids"]), with_kwargs=True)
        output = model(**inputs, use_cache=True)
        tokens = torch.randint(2, 100, (NEW,), generator=torch.Generator().manual_seed(0))
        logits = [model(input_ids=t.view(1, 1), **{CACHE: output[CACHE]}).logits[0, -1] for t in tokens]
        handle.remove()
        return tokens, torch.stack(logits)

    decode()
    assert received[0].max() > received[0][..., -1].max()
    assert received[1].unique().item() == received[0].max() + 1
    unpruned, received = received[1:], []
    with vtprune.prune(model, "divprune", keep_ratio=0.4, positions=positions) as session:
        tokens, logits = decode()
    if positions == "original":
        assert all(map(torch.equal, received[1:], unpruned))
    else:
        kept = [session.report.kept(0)] * session.report.depth
        expected = recompute(model, inputs, tokens, kept, positions)[-NEW:]
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


# -- conversations ----------------------------------------------------------------------------------------------------


class Conversation:
    """Prompts of one sample, each after the answer to the one before, and their images."""

    def __init__(self, name: str, model, seed: int = 0):
        self.name, self.model = name, model
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.tensor([1])
        self.images = []

    def words(self, count: int) -> None:
        words = torch.randint(FIRST_WORD, IMAGE, (count,), generator=self.generator)
        self.ids = torch.cat([self.ids, words])

    def image(self, *grid: int) -> None:
        self.images.append(FAMILIES[self.name].layouts["image"].make(self.model, (1, *grid), 1, self.generator))
        self.ids = torch.cat([self.ids, torch.tensor(self.images[-1].ids)])

    def inputs(self) -> dict[str, Tensor]:
        ids = self.ids[None]
        images = FAMILIES[self.name].layouts["image"].collate([self.images])
        return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()} | images


def turn(model, inputs, **options):
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        suppress_tokens=[IMAGE],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output, torch.cat(output.logits)


@both_positions
@every_stage
@every_family
def test_a_second_turn_of_text(name, method, positions):
    model = families.shared(name)
    talk = Conversation(name, model)
    talk.words(3), talk.image(3, 4), talk.words(4)
    with vtprune.prune(model, method, keep_ratio=0.4, positions=positions) as session:
        first, _ = turn(model, talk.inputs())
        kept = [session.report.kept(0, layer) for layer in range(session.report.depth)]
        talk.ids = first.sequences[0]
        talk.words(4)
        text = {key: talk.inputs()[key] for key in ("input_ids", "mm_token_type_ids")}
        second, logits = turn(model, text, **{CACHE: first[CACHE]})
    expected = recompute(model, talk.inputs(), second.sequences[0, -NEW:-1], kept, positions)[-NEW:]
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("encoded", ["by the caller", "within"])
@both_positions
@every_stage
@every_family
def test_a_second_turn_with_another_image(name, method, positions, encoded):
    # What plain transformers takes: the grids of all images with the new image's features or, since it cannot work out
    # the positions of a later image by itself otherwise, the new image's pixels with position ids.
    model = families.shared(name)
    talk = Conversation(name, model)
    talk.words(3), talk.image(3, 4), talk.words(4)
    with vtprune.prune(model, method, keep_ratio=0.4, positions=positions) as session:
        first, _ = turn(model, talk.inputs())
        before = [session.report.kept(0, layer) for layer in range(session.report.depth)]
        talk.ids = first.sequences[0]
        talk.words(2), talk.image(2, 5), talk.words(3)
        whole = talk.inputs()
        new = {"pixel_values": talk.images[1].pixels, "image_grid_thw": whole["image_grid_thw"][1:]}
        if encoded == "by the caller":
            features = model.get_image_features(**new, return_dict=True)
            del whole["pixel_values"]
            given = whole | {"mm_encoder_outputs": {"image": features}}
        else:
            grids = whole["image_grid_thw"]
            places, _ = model.model.get_rope_index(whole["input_ids"], whole["mm_token_type_ids"], grids)
            text = torch.arange(places.shape[-1]).view(1, 1, -1)
            given = whole | new | {"position_ids": torch.cat([text, places])}
        second, logits = turn(model, given, **{CACHE: first[CACHE]})
        after = [session.report.kept(0, layer) for layer in range(session.report.depth)]
    assert len(before[-1]) < 12 and len(after[-1]) < 10
    kept = list(map(torch.cat, zip(before, after, strict=True)))
    expected = recompute(model, talk.inputs(), second.sequences[0, -NEW:-1], kept, positions)[-NEW:]
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@every_family
def test_a_sample_that_loses_nothing_keeps_its_positions(name, method):
    """Together with a sample that is renumbered: alone, nothing would be pruned or renumbered."""
    model = families.shared(name)
    small, large = Conversation(name, model, 1), Conversation(name, model, 2)
    small.words(3), small.image(2, 3), small.words(4)
    large.words(3), large.image(3, 4), large.words(4)
    alone = small.inputs()
    padding = len(large.ids) - len(small.ids)
    small.ids = torch.cat([torch.zeros(padding, dtype=torch.long), small.ids])
    together = {key: torch.cat([small.inputs()[key], large.inputs()[key]]) for key in alone}
    together["attention_mask"] = torch.ones_like(together["input_ids"])
    together["attention_mask"][0, :padding] = 0
    with vtprune.prune(model, method, keep_tokens=6, positions="compact") as session:
        output, _ = turn(model, together)
    assert session.report.final_tokens[0] == 6 > session.report.final_tokens[1] - 1
    got = torch.stack(output.logits, 1)
    unpruned, expected = turn(model, alone)
    torch.testing.assert_close(got[0], expected, atol=ATOL, rtol=0)
    kept = [session.report.kept(1, layer) for layer in range(session.report.depth)]
    expected = recompute(model, large.inputs(), output.sequences[1, -NEW:-1], kept, "compact")[-NEW:]
    torch.testing.assert_close(got[1], expected, atol=ATOL, rtol=0)
