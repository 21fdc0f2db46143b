# SPDX-License-Identifier: Apache-2.0
"""An independent account of what pruned generation has to compute.

One sample at a time, without padding and without a cache: all layers run over the prompt and everything that was
generated, and the columns that `report.kept` calls dropped are taken out of the sequence where it says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .models import IMAGE_TOKEN, Prompts, tokens_per_image

ATOL = 1e-4


@torch.no_grad()
def recompute(
    model,
    ids: Tensor,
    images: Tensor,
    kept: list[Tensor],
    positions: str,
    sources: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Logits (tokens, vocabulary) of one sample; rows of dropped columns are NaN.

    Args:
        ids: (tokens,), the prompt, then what was generated.
        images: (images, 3, height, width).
        kept: one LongTensor a layer, the visual columns of `ids` alive in it.
        positions: "original" (a token's column), "compact" (its rank in the layer's sequence) or "compact once" (its
            rank in the first layer's sequence: a compact method before the LLM, then one that keeps positions).
        sources: (visual tokens,) where features were merged before the LLM: index in `kept[0]` that each visual token
            was averaged into.
        window: how many columns, its own included, a token looks back on; None for all.
    """
    language_model = model.model.language_model
    hidden = language_model.embed_tokens(ids)
    # A model may generate the image token, too: it is text then.
    n_visual = len(images) * tokens_per_image(model)
    visual = (ids == IMAGE_TOKEN).nonzero().flatten()[:n_visual]
    if len(images):
        features = torch.cat(list(model.get_image_features(images, return_dict=True).pooler_output))
        hidden[visual] = features
        if sources is not None:
            for index, column in enumerate(kept[0].tolist()):
                hidden[column] = features[sources == index].mean(0)
    columns = torch.arange(len(ids))
    text = columns[~torch.isin(columns, visual)]
    first = torch.cat([text, kept[0]]).sort().values
    for layer, alive in zip(language_model.layers, kept, strict=True):
        wanted = torch.cat([text, alive]).sort().values
        rows = torch.isin(columns, wanted)
        assert int(rows.sum()) == len(wanted), "a dropped token came back in a later layer"
        columns, hidden = columns[rows], hidden[rows]

        n = len(columns)
        ranks = torch.arange(n)
        place = {"original": columns, "compact": ranks, "compact once": torch.searchsorted(first, columns)}[positions]
        rotary = language_model.rotary_emb(hidden[None], place[None])
        causal = torch.zeros(1, 1, n, n, dtype=hidden.dtype).masked_fill(ranks > ranks[:, None], float("-inf"))
        if window is not None:
            causal = causal.masked_fill(ranks <= ranks[:, None] - window, float("-inf"))
        hidden = layer(hidden[None], attention_mask=causal, position_embeddings=rotary, position_ids=place[None])[0]

    logits = torch.full((len(ids), model.config.text_config.vocab_size), float("nan"), dtype=hidden.dtype)
    logits[columns] = model.lm_head(language_model.norm(hidden))
    return logits


def kept_columns(report, prompts: Prompts, sample: int, layers: int, padding_side: str = "left") -> list[Tensor]:
    """`report.kept` of one sample, as columns of its own unpadded ids."""
    first = prompts.first_column(sample, padding_side)
    return [report.kept(sample, layer) - first for layer in range(layers)]


def depth(model) -> int:
    return model.config.text_config.num_hidden_layers


def expected_steps(
    model, prompts: Prompts, report, sample: int, generated: Tensor, positions: str, *, merged=False, window=None
):
    """Recomputed logits (steps, vocabulary) of one sample of a left-padded generation."""
    ids = torch.cat([prompts.ids[sample], generated[:-1]])
    kept = kept_columns(report, prompts, sample, depth(model))
    sources = report.sources(sample, 0) if merged else None
    logits = recompute(model, ids, prompts.images[sample], kept, positions, sources, window)
    return logits[len(prompts.ids[sample]) - 1 :]


def assert_recomputed(
    model, prompts: Prompts, report, output, positions: str, *, merged: bool = False, window: int | None = None
) -> None:
    """Every step's logits, and the ids for greedy decoding, of a left-padded generation are the recomputed ones."""
    length = max(map(len, prompts.ids))
    got = torch.stack(output.logits, 1)
    for sample in range(len(prompts)):
        generated = output.sequences[sample, length:]
        expected = expected_steps(model, prompts, report, sample, generated, positions, merged=merged, window=window)
        torch.testing.assert_close(got[sample], expected, atol=ATOL, rtol=0, msg=lambda m, s=sample: f"sample {s}: {m}")
        allowed = expected.clone()
        allowed[:, IMAGE_TOKEN] = float("-inf")
        assert generated.tolist() == allowed.argmax(-1).tolist()


def generate(model, inputs: dict[str, Tensor], new_tokens: int = 8, **options):
    """Greedy unless said otherwise; logits kept; the image token, which has no meaning in an answer, suppressed."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN]} | options
    return model.generate(
        **inputs, max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True, **options
    )
