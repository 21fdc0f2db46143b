# SPDX-License-Identifier: Apache-2.0
from vtprune import HoloV
from vtprune.ops.run_budgets import run_shares, runs_of
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("holov_*")
def selection(v: Vector) -> None:
    """Kept sets; without anything lost in the reference, those without its quirks, too."""
    attention, crops = v["attention"], v["crops"]
    tokens = one_per_group(v["features"], v["k"], signals={EncoderSaliency(22): attention}, shape=SHAPE)
    runs = runs_of(tokens.valid, crops)
    for group in range(len(attention)):
        assert runs[group].bincount().tolist() == v["crop_sizes"].tolist()
    shares = run_shares(attention, tokens.valid, runs, crops, reference_quirks=True)[:, : v["crop_scores"].shape[1]]
    # Each score holds an epsilon in its variance term, which is left out here.
    close(shares, v["crop_scores"] / v["crop_scores"].sum(1, keepdim=True), rtol=2e-3)
    for quirks in (True, False):
        method = HoloV(keep_tokens=v["k"], parts_per_crop=crops, reference_quirks=quirks)
        keep = method.select(tokens).keep
        for group, positions in enumerate(v["positions"]):
            chosen = positions[positions >= 0].sort().values.tolist()
            kept = keep[group].nonzero()[:, 0].tolist()
            if quirks or v["padded"][group] == 0 and int(v["crop_sizes"].min()) > 1:
                assert kept == chosen
            else:
                assert len(kept) == v["k"]
