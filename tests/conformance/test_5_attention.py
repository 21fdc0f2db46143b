# SPDX-License-Identifier: Apache-2.0
"""Promise 5: the model keeps its attention back end, and a method gets the rows it needs, not the square."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families

from . import matrix, methods, models, text_models
from .methods import every_method, spec
from .models import batch_of_three, prompts
from .reference import assert_recomputed, generate

PRODUCTS = {"aten.bmm", "aten.mm", "aten.baddbmm", "aten.addmm", "aten._softmax"}


class LargestSquare(TorchDispatchMode):
    """Records the smaller of the last two sides of every matrix product and softmax."""

    def __init__(self):
        super().__init__()
        self.squares = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if str(function.overloadpacket) in PRODUCTS and result.ndim >= 3:
            self.squares.append(min(result.shape[-2:]))
        return result


@pytest.mark.parametrize(
    "chosen",
    [spec(name) for name in ("vtc_cls", "fastv", "transprune-ttv", "transprune-iga", "transprune")]
    + [[{"name": "mustdrop", "similarity": None, "keep_ratio": 0.5}]],
)
def test_no_square_of_attention_is_computed(chosen):
    """With sdpa the model itself computes none, so whatever is seen is the method's."""
    model = models.shared("gqa", "sdpa")
    batch = prompts(model, "ttItt", "tIttt")  # few text rows against 25 visual tokens
    with LargestSquare() as eager, attention_of(model, "eager"):
        model(**batch.inputs())
    with LargestSquare() as pruned, vtprune.prune(model, chosen):
        model(**batch.inputs())
    n = models.tokens_per_image(model)
    assert max(eager.squares) > n, "the probe does not see eager attention"
    assert max(pruned.squares, default=0) < n // 2


@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "transprune", "lazyllm", "mustdrop"])
@pytest.mark.parametrize("name", [name for name in families.PRUNED_INSIDE if name not in families.ALWAYS_EAGER])
def test_no_square_of_attention_is_computed_on_any_family(name, method):
    model = families.shared(name)
    batch = families.batch(name, model, samples=1)
    (inputs,) = batch.singles
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(batch.visual_ids))
    text = len(visual) - 1 - int(visual.nonzero().max())
    parts = spec(method)
    if method == "mustdrop":
        parts[0]["similarity"] = None  # merging in the encoder compares patches of a window
    if (reason := matrix.refusal(model, parts)) is not None:
        assert methods.needs_cls(method) or methods.revives(method) or "cannot be recomputed" in reason
        return
    with LargestSquare() as unpatched:
        model(**inputs)
    if max(unpatched.squares, default=0) >= visual.sum() // 2 and not encoder_is_apart(model):
        pytest.skip("the model itself multiplies as large matrices (experts, keys by head), so nothing could be told")
    with LargestSquare() as eager, attention_of(model, "eager"):
        model(**inputs)
    with LargestSquare() as pruned, vtprune.prune(model, parts):
        model(**inputs)
    assert max(eager.squares) > visual.sum() > 2 * text
    rows = text if method in ("transprune", "mustdrop") else 1
    # Encoders whose attention is no back end's, and those that pool, do so without us.
    added = Counter(pruned.squares) - Counter(unpatched.squares)
    assert 0 < max(added) <= 2 * rows  # two queries share a key


def encoder_is_apart(model) -> bool:
    """Whether only the encoder multiplies large matrices, which are the same in a session."""
    adapter = vtprune.adapter_for(model)
    return bool(adapter.layers_unread or adapter.encoder_uncounted)


@contextlib.contextmanager
def attention_of(model, implementation):
    parts = [
        key
        for key in ("text_config", "vision_config", "perceiver_config", "qformer_config")
        if hasattr(model.config, key)
    ]
    before = {key: getattr(model.config, key)._attn_implementation for key in parts}
    before[""] = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    yield
    model.set_attn_implementation(before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_method()
def test_the_back_end_stays(name, attention):
    model = models.shared("gqa", attention)
    with vtprune.prune(model, spec(name)):
        generate(model, batch_of_three(model).inputs(), new_tokens=2)
        assert model.config._attn_implementation == attention
        assert model.config.text_config._attn_implementation == attention
        assert model.config.vision_config._attn_implementation == attention
        output = model(**batch_of_three(model).inputs())
    assert output.attentions is None


@pytest.mark.parametrize("name", ["vtc_cls", "fastv", "transprune"])
def test_both_back_ends_choose_the_same_tokens(name):
    reports = []
    for attention in ("sdpa", "eager"):
        model = models.shared("gqa", attention)
        with vtprune.prune(model, spec(name)) as session:
            generate(model, batch_of_three(model).inputs(), new_tokens=1)
        reports.append(session.report)
    for sample in range(3):
        for layer in range(6):
            assert reports[0].kept(sample, layer).tolist() == reports[1].kept(sample, layer).tolist()


# --- FlashAttention's contract, without its kernels ------------------------------------------------------------------


class FlashStandIn:
    """Computes attention as transformers' FlashAttention path does, on any device.

    The contract: the mask is None or (batch, keys) of ones and zeros over *physical* keys; causality is aligned to the
    last key; with batch size 1 and no mask, position ids that do not just count up are taken for several packed
    sequences, which then do not see each other.
    """

    def __init__(self):
        self.packed = 0
        self.masked = 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, is_causal=None, position_ids=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        queries, keys = query.shape[2], key.shape[2]
        causal = module.is_causal if is_causal is None else is_causal
        allowed = torch.ones(len(query), 1, queries, keys, dtype=torch.bool)
        if causal:
            allowed &= torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), keys), "FlashAttention takes a mask of the physical keys only"
            self.masked += 1
            allowed = allowed & attention_mask.bool()[:, None, None]
        elif causal and len(query) == 1 and position_ids is not None and queries > 1:
            starts = position_ids[0].diff(prepend=position_ids[0, :1]) != 1
            starts[0] = False
            if starts.any():
                self.packed += 1
                segment = starts.cumsum(0)
                allowed = allowed & (segment == segment[:, None])
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~allowed, float("-inf"))
        # rows of padding see nothing; flash returns zeros for them
        return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    name, stand_in = "flash_attention_2", FlashStandIn()
    before = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = stand_in
    yield stand_in
    del ALL_ATTENTION_FUNCTIONS[name]
    assert ALL_ATTENTION_FUNCTIONS[name] is before


def flash_model(model):
    """A model whose config says FlashAttention, past the check that the package is installed."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layouts", [("ttIttttt",), ("tItttt", "ttIttItttttt", "tttIttttttttt")], ids=["one", "batch"])
@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune-ttv", "vtc_cls+fastv"])
def test_flash_attention_path(flash, name, layouts, positions):
    assert "flash_attention_2" in ALL_MASK_ATTENTION_FUNCTIONS
    plain = models.shared("gqa")
    batch = prompts(plain, *layouts)
    model = flash_model(models.build("gqa"))
    with vtprune.prune(model, spec(name, positions=positions)) as session:
        output = generate(model, batch.inputs())
    assert flash.packed == 0, "gaps in the position ids were read as packed sequences"
    assert (flash.masked > 0) == (len(layouts) > 1)
    assert_recomputed(plain, batch, session.report, output, positions)


@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_flash_attention_and_layers_that_read_positions(flash, method):
    """Ministral 3 scales its queries by their positions, in which FlashAttention looks for packed sequences."""
    plain = models.with_text_tower(text_models.text_config("ministral3"))
    model = flash_model(models.with_text_tower(text_models.text_config("ministral3")))
    alone, batch = prompts(plain, "ttIttttt"), batch_of_three(plain)
    with vtprune.prune(model, method, keep_ratio=0.7, positions="original") as session:
        with pytest.raises(UnsupportedStageError, match="prune with positions='compact'"):
            generate(model, alone.inputs())
        output = generate(model, batch.inputs())  # a mask says what is whose
        assert_recomputed(plain, batch, session.report, output, "original")
    with vtprune.prune(model, method, keep_ratio=0.7, positions="compact") as session:
        output = generate(model, alone.inputs())
        assert_recomputed(plain, alone, session.report, output, "compact")
    assert flash.packed == 0


def test_flash_attention_path_in_the_encoder(flash):
    """Images of one call merge different numbers of windows behind the first layer, so that the others see padding."""
    plain, pruned = models.shared("gqa"), flash_model(models.build("gqa"))
    batch, method = (
        batch_of_three(plain),
        {"name": "mustdrop", "similarity": 0.271, "window": (2, 2), "keep_ratio": 0.5},
    )
    reports, projected = [], []
    for model in (plain, pruned):
        watch = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: projected.append(args[0]))
        with vtprune.prune(model, method) as session:
            generate(model, batch.inputs(), new_tokens=2)
        watch.remove()
        reports.append(session.report)
    assert len({lengths[1] for lengths in reports[0].encoder_sequences}) > 1, "nothing was padded"
    torch.testing.assert_close(*projected, atol=1e-5, rtol=1e-5)
    for sample in range(3):
        for layer in range(6):
            assert reports[0].kept(sample, layer).tolist() == reports[1].kept(sample, layer).tolist()
