# SPDX-License-Identifier: Apache-2.0
"""Trains the DigitScenes-Video checkpoint, on a CPU or a GPU.

    python scripts/train_digitscenes_video.py OUT            # start, or go on where a killed run stopped
    python scripts/train_digitscenes_video.py OUT --save-to eval/digitscenes/video_model

It starts from the image checkpoint, most of whose weights fit (`warm_start`). The stages are those of
`train_digitscenes.py`, each in its own file of OUT:

1. encoder: each patch of single frames names the digit it lies on, its colour and its centre, and draws its original.
2. captions: projector and decoder over cached features of frames. Lists: pairs of colour and digit, of digit and
   direction, of digit and third of the clip, and the digits in order of appearance. Visual tokens also get
   questions: the last layer names digit and colour, an early layer names column, row and time, and a middle layer names
   the way of the digit so far and how many others were seen before it.
3. questions: many questions share one clip in one sequence, under a block mask.
4. variable: like 3, but mostly with a part of the visual tokens or of the frames.
"""

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from digitscenes_data import PREFIX, Block, Data, Pack, diverse_tokens, model_input, random_tokens, strided_tokens
from digitscenes_video_data import (
    STORED,
    ClipData,
    clip_caption_blocks,
    clip_question_blocks,
    draw_frames,
    draw_training_clip,
)
from torch import nn
from train_digitscenes import Decoder, EncoderHeads, Stage, begin, chosen, train
from transformers import AutoModelForImageTextToText

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.video_model import (
    FRAME_GRID,
    FRAME_TOKENS,
    FRAMES,
    build_video_model,
    build_video_processor,
)

log = logging.getLogger("digitscenes")

QUESTIONS = dict(order=3, motion=4, mover=4, count=1, third=3)
"""Number of questions of a family that are drawn for a clip; equal questions are asked once."""


@torch.no_grad()
def warm_start(model, old, frames: torch.Tensor) -> None:
    """Copies what fits from the image model `old`: CLIP's layers, the projector, Llama's layers, the words.

    SigLIP has no norm before its layers, so CLIP's is folded into the patch and position embeddings, with the standard
    deviation that it has on average on `frames`, uint8 (frames, 3, height, width).
    """
    weights = old.model.state_dict()
    video_weights = model.model.state_dict()
    for name, value in video_weights.items():
        if name in weights and weights[name].shape == value.shape:
            value.copy_(weights[name])
        elif name.endswith("_proj.bias"):
            value.zero_()  # Llama has none
    words = weights["language_model.embed_tokens.weight"]
    video_weights["language_model.embed_tokens.weight"][: len(words)] = words

    tower, clip = model.model.vision_tower.embeddings, old.model.vision_tower
    norm, patch = clip.pre_layrnorm, clip.embeddings.patch_embedding.weight
    side = round((len(clip.embeddings.position_embedding.weight) - 1) ** 0.5)
    place = clip.embeddings.position_embedding.weight[1:].unflatten(0, (side, side))
    place = place[:FRAME_GRID, :FRAME_GRID].flatten(0, 1)
    before = F.conv2d(model_input(frames, patch.device), patch, stride=patch.shape[-1]).flatten(2).mT + place
    gain = norm.weight / before.std(-1, unbiased=False).mean()
    tower.patch_embedding.weight.copy_((patch - patch.mean(0)) * gain[:, None, None, None])
    tower.patch_embedding.bias.copy_(norm.bias)
    tower.position_embedding.weight.copy_((place - place.mean(-1, keepdim=True)) * gain)


class FrameHeads(EncoderHeads):
    """The questions to the SigLIP encoder, which has no CLS."""

    def loss(self, tower, data: Data, rows, kept, device):
        hidden = chosen(tower.embeddings(model_input(data.pixels[rows], device)), kept)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        losses, right = self.patch_losses(hidden, data, rows, kept)
        return sum(losses.values()), dict(right=right, **{name: value.item() for name, value in losses.items()})


@torch.no_grad()
def encode_frames(tower, frames: np.ndarray, device) -> torch.Tensor:
    """The features that the projector reads, (frames, 64, dim), of uint8 (frames, height, width, 3)."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    features = [tower(model_input(p, device), output_hidden_states=True).hidden_states[-1] for p in pixels.split(128)]
    return torch.cat(features)


class VideoDecoder(Decoder):
    """Projector and language model over cached features of frames.

    places, past: the questions after an early and after a middle layer; not part of the model.
    """

    PAST_LAYER = 5

    def __init__(self, model, device):
        super().__init__(model, device)
        dim = model.config.text_config.hidden_size
        self.places = nn.Linear(dim, 2 * FRAME_GRID + FRAMES, device=device)  # column, row, time
        self.past = nn.Linear(dim, 10, device=device)  # way, rank

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(clips, frames * 16 + 1, dim) from (clips, frames, 64, dim): pooled tokens and the newline."""
        clips, frames = features.shape[:2]
        tokens = self.model.model.apply_pooling(super().project(features.flatten(0, 1)))
        newline = self.model.model.image_newline.expand(clips, 1, -1)
        return torch.cat([tokens.reshape(clips, frames * FRAME_TOKENS, -1), newline], 1)

    def loss(self, features, labels, kept, pack: Pack, compact: bool, naming: float):
        """Like `Decoder.loss`; features (clips, frames, 64, dim), labels of all their tokens; the newline is kept."""
        before, count = len(PREFIX), kept.shape[1]
        visual = self.project(features.to(self.device).float())
        states = self.hidden(chosen(visual, kept), kept, pack, compact, total=visual.shape[1])
        loss, parts = self.answer_loss(states[-1][:, before + count :], pack)
        if naming:
            tokens = kept[:, :-1]
            digit, colour, time, rank, way = (
                t.gather(1, tokens).to(self.device)
                for t in (labels.digit, labels.colour, labels.time, labels.rank, labels.direction)
            )
            column, row = chosen(labels.centre, tokens).to(self.device).unbind(-1)
            on, covered = digit > 0, slice(before, before + count - 1)
            name = self.naming_loss(states[-1][:, covered], digit, colour)
            early, middle = (states[n][:, covered][on] for n in (self.PLACE_LAYER, self.PAST_LAYER))
            column_row_time = self.places(F.rms_norm(early, early.shape[-1:])).split(
                [FRAME_GRID, FRAME_GRID, FRAMES], -1
            )
            asked = (column, row) if compact else (column, row, time)  # renumbered positions say little about time
            place = sum(F.cross_entropy(p, t[on]) for p, t in zip(column_row_time, asked, strict=False)) / len(asked)
            ways, ranks = self.past(F.rms_norm(middle, middle.shape[-1:])).split(5, -1)
            way = F.cross_entropy(ways, way[on], ignore_index=-1)
            rank = F.cross_entropy(ranks, rank[on])
            parts |= dict(naming=name.item(), place=place.item(), way=way.item(), rank=rank.item())
            loss = loss + naming * (name + 2 * place + 2 * way + 2 * rank)
        return loss, parts


def some_tokens(rng, on_digit: torch.Tensor, frames: int) -> torch.Tensor:
    """A part of the visual tokens, ascending (clips, count): at random (with more or less of the digits), every n-th,
    or whole frames; then the newline. on_digit: (clips, tokens)."""
    clips, tokens = on_digit.shape
    count = int(np.exp(rng.uniform(np.log(8), np.log(tokens))))
    kind = rng.randint(4)
    if kind == 0:
        kept = strided_tokens(clips, count, rng.rand(), tokens)
    elif kind == 1:
        shown = torch.from_numpy(np.sort(rng.permutation(frames)[: max(2, count // FRAME_TOKENS)]))
        kept = (shown[:, None] * FRAME_TOKENS + torch.arange(FRAME_TOKENS)).flatten().expand(clips, -1)
    else:
        kept = random_tokens(rng, on_digit, count, bias=rng.choice([0.0, rng.uniform(0.2, 1.2)]))
    return with_newline(kept, tokens)


def with_newline(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """`kept`, (clips, count), and the newline, which follows the `tokens` of the frames."""
    return torch.cat([kept, torch.full((len(kept), 1), tokens)], 1)


def every_token(clips: int, frames: int) -> torch.Tensor:
    return torch.arange(frames * FRAME_TOKENS + 1).expand(clips, -1)


def sample(rng, frames: int) -> torch.Tensor:
    """Numbers of uniformly sampled frames among STORED, with a random small shift, as in real clips."""
    return (torch.arange(frames) * STORED // frames - int(rng.randint(2))).clamp(min=0)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints and the log.")],
    save_to: Annotated[Path | None, typer.Option(help="Where the model goes; default OUT/model.")] = None,
    clips: Annotated[int, typer.Option(help="Training clips; their features take 0.3 MB each.")] = 6000,
    frames: Annotated[int, typer.Option(help="Frames that the encoder is trained on.")] = 24000,
    encoder_steps: int = 3000,
    caption_steps: int = 500,
    question_steps: int = 800,
    variable_steps: int = 1150,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: int = 2,
    seed: int = 0,
) -> None:
    begin(out, threads, seed)
    model = build_video_model().to(device)
    single = draw_frames(frames, "train", seed + 100)
    log.info("frames drawn")
    image_model = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).to(device)
    warm_start(model, image_model, single.pixels[:500])
    tower = model.model.vision_tower
    heads = FrameHeads(model.config.vision_config.hidden_size).to(device)

    def encoder_loss(step: int):
        rng = np.random.RandomState([seed, 1, step])
        rows = torch.from_numpy(rng.randint(0, len(single.pixels), 64))
        on_digit = single.digit[rows] > 0
        tokens = max(28, int(on_digit.sum(1).max()))
        kept = random_tokens(rng, on_digit, tokens if step < 0.8 * encoder_steps else FRAME_GRID**2, bias=1.0)
        return heads.loss(tower, single, rows, kept, device)

    train(Stage("encoder", encoder_steps, 1.5e-3, encoder_loss), nn.ModuleDict(dict(tower=tower, heads=heads)), out)
    tower.requires_grad_(False).eval()

    def prepare(count: int, split: str, first_seed: int) -> tuple[ClipData, torch.Tensor]:
        drawn, features = [], []
        for number in range(count):
            drawn.append(draw_training_clip(first_seed, number, split))
            features.append(encode_frames(tower, drawn[-1].frames(STORED), device).half().cpu())
        return ClipData.of(drawn), torch.stack(features)

    data, features = prepare(clips, "train", seed)
    held_out, held_out_features = prepare(200, "validation", seed + 1)
    log.info("features cached")
    decoder = VideoDecoder(model, device)

    def decoder_loss(step: int, stage: int, captions: float, naming: float, whole: float, vary: float):
        """whole, vary: how often all visual tokens are shown, and a random part; else digits come first, for speed."""
        rng = np.random.RandomState([seed, stage, step])
        rows = torch.from_numpy(rng.randint(0, clips, 32))
        count = int(rng.choice([8, 12, 12, 12, 12, 12, 12, 16]))
        shown = sample(rng, count)
        labels = data.labels(rows, shown)
        cast = [data.actors[i] for i in rows]
        asked = [clip_question_blocks(rng, actors, QUESTIONS) for actors in cast]
        if rng.rand() < captions:
            for more, actors, first in zip(asked, cast, labels.first.tolist(), strict=True):
                more += clip_caption_blocks(rng, actors, first)
        on_digit, kind = labels.digit > 0, rng.rand()
        if kind < whole:
            kept = every_token(len(rows), count)
        elif kind < whole + vary:
            kept = some_tokens(rng, on_digit, count)
        else:
            tokens = int(on_digit.sum(1).float().quantile(rng.uniform(0.6, 1)))
            kept = with_newline(random_tokens(rng, on_digit, tokens, bias=1.0), on_digit.shape[1])
        return decoder.loss(features[rows][:, shown], labels, kept, Pack.of(asked), rng.rand() < 0.3, naming)

    blocks = [
        clip_question_blocks(np.random.RandomState(i), actors, QUESTIONS) for i, actors in enumerate(held_out.actors)
    ]

    def check():
        log_table(decoder, held_out_features[:, torch.arange(FRAMES) * STORED // FRAMES], blocks, (48,))

    trained = nn.ModuleList(
        [model.model.multi_modal_projector, model.model.language_model, decoder.places, decoder.past]
    )
    trained.register_parameter("newline", model.model.image_newline)
    for stage in (
        Stage("captions", caption_steps, 1e-3, lambda step: decoder_loss(step, 2, 1.0, 0.5, 0.0, 0.0), check, 100),
        Stage("questions", question_steps, 1e-3, lambda step: decoder_loss(step, 3, 0.6, 0.5, 0.2, 0.15), check, 200),
        Stage("variable", variable_steps, 8e-4, lambda step: decoder_loss(step, 4, 0.4, 0.4, 0.3, 0.5), check, 200),
    ):
        train(stage, trained, out)

    folder = save_to or out / "model"
    model.eval().save_pretrained(folder)
    build_video_processor().save_pretrained(folder)
    log.info("saved to %s; accuracy on the test set:", folder)
    test = digitscenes.video_examples()
    sampled = [e.frames()[np.arange(FRAMES) * e.clip.count // FRAMES] for e in test]  # as the processor does
    asked = [[Block.make(e.question, [e.answer], e.family)] for e in test]
    log_table(decoder, torch.stack([encode_frames(tower, f, device) for f in sampled]), asked, (96, 48, 24, 12))


@torch.no_grad()
def log_table(
    decoder: VideoDecoder, features: torch.Tensor, blocks: list[list[Block]], counts: tuple[int, ...]
) -> None:
    """Logs the accuracy per family with all visual tokens, with none, and with `counts` of them chosen simply."""
    clips = len(blocks)
    visual = torch.cat([decoder.project(part.to(decoder.device).float()).cpu() for part in features.split(32)])
    total = visual.shape[1]
    nothing = torch.zeros(clips, total, dtype=torch.bool)
    selections = {"full": every_token(clips, features.shape[1]), "zero": strided_tokens(clips, 0)}
    for count in counts:
        selections[f"random {count}"] = random_tokens(np.random.RandomState(0), nothing, count)
        selections[f"stride {count}"] = strided_tokens(clips, count, total=total)
        selections[f"diverse {count}"] = diverse_tokens(visual, count)
    for name, kept in selections.items():
        scores = decoder.accuracy(visual, blocks, kept)
        log.info("%-12s %s", name, "  ".join(f"{family} {value:.3f}" for family, value in scores.items()))


if __name__ == "__main__":
    typer.run(main)
