# SPDX-License-Identifier: Apache-2.0
"""Trains the DigitScenes checkpoint, on a CPU or a GPU.

    python scripts/train_digitscenes.py OUT            # start, or go on where a killed run stopped
    python scripts/train_digitscenes.py OUT --save-to eval/digitscenes/model

Four stages, each in its own file of OUT (weights, optimiser, step; replaced atomically), so that one can be repeated by
deleting its file and those after it:

1. encoder: only the CLIP ViT. At the feature layer each patch on a digit names the digit, its colour and its centre,
   and draws its 8 x 8 original. CLS lists the digits and colours of the image, so that its attention gets a meaning.
   Most background patches are left out of the first 90 % of the steps, for speed.
2. captions: projector and decoder; the encoder is frozen and its features are cached. Lists of the scene's content:
   pairs of colour and digit (binding), digits in spatial order, colours in order of value. The language-model head also
   names the digit and colour under each visual token, and an early decoder layer names the place of that digit.
   Without this stage binding is not learned.
3. questions: many questions share one scene in one sequence. A block mask shows each question the prompt, the visual
   tokens and itself, so training sees exactly what a test prompt looks like.
4. variable: like 3, but mostly with a random part of the visual tokens, so that the model has seen pruned inputs.
"""

import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from digitscenes_data import (
    COLOUR_NAMES,
    IGNORE,
    PREFIX,
    WORD,
    Block,
    Data,
    Pack,
    caption_blocks,
    diverse_tokens,
    model_input,
    question_blocks,
    random_tokens,
    strided_tokens,
)
from torch import nn

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.model import GRID, VISUAL_TOKENS, build_model, build_processor
from vtprune.eval.digitscenes.questions import FAMILIES

log = logging.getLogger("digitscenes")


def chosen(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tokens `kept`, (rows, count), of (rows, tokens, dim)."""
    return tokens.gather(1, kept.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1]))


class EncoderHeads(nn.Module):
    """The questions to the encoder while it is trained; not part of the model."""

    def __init__(self, dim: int):
        super().__init__()
        self.digit, self.colour, self.centre = nn.Linear(dim, 11), nn.Linear(dim, 9), nn.Linear(dim, 2)
        self.shape, self.bag, self.bag_last = nn.Linear(dim, 64), nn.Linear(dim, 18), nn.Linear(dim, 18)

    def loss(self, tower, data: Data, rows, kept, device) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss on images `rows`, of which the encoder sees only the patches `kept` (rows, count)."""
        hidden = tower.pre_layrnorm(tower.embeddings(model_input(data.pixels[rows], device)))
        hidden = torch.cat([hidden[:, :1], chosen(hidden[:, 1:], kept)], 1)
        for layer in tower.encoder.layers:
            before, hidden = hidden, layer(hidden, None)
        losses, right = self.patch_losses(before[:, 1:], data, rows, kept)  # of the layer that the projector reads
        bag = data.bag[rows].to(device)
        losses |= dict(
            cls=F.binary_cross_entropy_with_logits(self.bag(before[:, 0]), bag),
            last=F.binary_cross_entropy_with_logits(self.bag_last(hidden[:, 0]), bag),
        )
        return sum(losses.values()), dict(right=right, **{name: value.item() for name, value in losses.items()})

    def patch_losses(self, patches, data: Data, rows, kept) -> tuple[dict[str, torch.Tensor], float]:
        """Losses of the hidden states of patches, (rows, count, dim), and how often they name the right digit."""
        device, kept = patches.device, kept.to(patches.device)

        def named(head: nn.Linear, target: torch.Tensor) -> torch.Tensor:
            weight = torch.ones(head.out_features, device=device)
            weight[0] = 0.3
            return F.cross_entropy(head(patches).flatten(0, 1), target.flatten(), weight=weight)

        digit, colour, source = (t[rows].to(device).gather(1, kept) for t in (data.digit, data.colour, data.source))
        on = digit > 0
        losses = dict(
            digit=2 * named(self.digit, digit),
            colour=named(self.colour, colour),
            centre=4 * F.mse_loss(self.centre(patches)[on], chosen(data.centre[rows].to(device), kept)[on]),
            shape=10 * F.mse_loss(self.shape(patches[on]), data.images.to(device)[source[on]]),
        )
        return losses, (self.digit(patches)[on].argmax(-1) == digit[on]).float().mean().item()


@dataclass
class Stage:
    """One stage of training: the loss for the number of a step, and the settings of the optimiser."""

    name: str
    steps: int
    rate: float
    loss: object
    check: object = None
    every: int = 300


def train(stage: Stage, module: nn.Module, out: Path) -> None:
    """Runs or resumes a stage. The number of the step seeds all random draws, so a resumed run has the same ones."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.03, betas=(0.9, 0.98))
    path, step = out / f"{stage.name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        step = state["step"]
        if step < stage.steps:
            optimiser.load_state_dict(state["optimiser"])
        log.info("%s: resumed at step %d of %d", stage.name, step, stage.steps)
    module.train()
    start, first = time.time(), step
    while step < stage.steps:
        warm = min(1, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = stage.rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        loss, parts = stage.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            log.info(
                "%s %d/%d %.2f s/step loss %.3f  %s",
                stage.name,
                step,
                stage.steps,
                (time.time() - start) / (step - first),
                loss.item(),
                shown,
            )
        if step % 100 == 0 or step == stage.steps:
            torch.save(dict(module=module.state_dict(), optimiser=optimiser.state_dict(), step=step), out / "new.pt")
            os.replace(out / "new.pt", path)
        if stage.check and (step % stage.every == 0 or step == stage.steps):
            stage.check()
            module.train()


@torch.no_grad()
def encode(tower, pixels: torch.Tensor, device) -> torch.Tensor:
    """The features that the projector reads, (images, 144, dim), without CLS, as in the model."""
    tower.eval()
    hidden = [tower(model_input(p, device), output_hidden_states=True).hidden_states[-2] for p in pixels.split(128)]
    return torch.cat([h[:, 1:] for h in hidden])


class Decoder:
    """Projector and language model over cached encoder features.

    places: the question after the first decoder layers in which row and column of the grid the digit under a visual
    token has its centre; not part of the model. Without it the outermost digit is not found (positions are then a small
    and smooth part of a token, over which attention does not learn to be sharp).
    """

    PLACE_LAYER = 3

    def __init__(self, model, device):
        self.model, self.device = model, device
        self.places = nn.Linear(model.config.text_config.hidden_size, 2 * GRID, device=device)
        self.digit_word = torch.tensor([0] + [WORD[str(k)] for k in range(10)], device=device)
        self.colour_word = torch.tensor([0] + [WORD[name] for name in COLOUR_NAMES], device=device)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.model.multi_modal_projector(features)

    def hidden(
        self, visual: torch.Tensor, kept: torch.Tensor, pack: Pack, compact: bool, total: int = VISUAL_TOKENS
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states of every layer, each (scenes, prefix + kept + text, dim), the last one normalised.

        visual: projected kept tokens, (scenes, kept, dim). kept: their indices among `total`.

        `compact` renumbers the positions of the kept tokens; else they keep theirs and text follows the full image.
        """
        scenes, count = visual.shape[:2]
        device, before = self.device, len(PREFIX)
        kept, ids, block, place = (t.to(device) for t in (kept, pack.ids, pack.block, pack.place))
        embed = self.model.get_input_embeddings()
        prefix = torch.tensor([WORD[w] for w in PREFIX], device=device).expand(scenes, -1)
        embeddings = torch.cat([embed(prefix), visual, embed(ids)], 1)
        if compact:
            kept = torch.arange(count, device=device).expand(scenes, -1)
        text = before + (count if compact else total) + place
        position = torch.cat([torch.arange(before, device=device).expand(scenes, -1), before + kept, text], 1)
        shared = torch.zeros(scenes, before + count, dtype=torch.long, device=device)
        block = torch.cat([shared, block.where(block > 0, -1)], 1)
        length = block.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = causal & ((block[:, None] == 0) | (block[:, None] == block[:, :, None]))
        return self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask[:, None],
            position_ids=position,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    def loss(self, features, data: Data, rows, kept, pack: Pack, compact: bool, naming: float):
        """Cross-entropy of the answers, plus `naming` times that of the digit and colour under each visual token and of
        the place of that digit."""
        before, count = len(PREFIX), kept.shape[1]
        states = self.hidden(self.project(chosen(features[rows], kept).to(self.device)), kept, pack, compact)
        loss, parts = self.answer_loss(states[-1][:, before + count :], pack)
        if naming:
            digit, colour = (t[rows].gather(1, kept).to(self.device) for t in (data.digit, data.colour))
            on = digit > 0
            name = self.naming_loss(states[-1][:, before : before + count], digit, colour)
            middle = states[self.PLACE_LAYER][:, before : before + count][on]
            logits = self.places(F.rms_norm(middle, middle.shape[-1:])).unflatten(-1, (2, GRID))
            centre = chosen(data.centre[rows], kept).to(self.device)[on]
            place = F.cross_entropy(logits.flatten(0, 1), (centre * GRID).long().flatten())
            parts |= dict(naming=name.item(), place=place.item())
            loss = loss + naming * (name + 2 * place)
        return loss, parts

    def answer_loss(self, text: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the answers (0.1 times it for "</s>") from states of the text, and its parts by family."""
        target = pack.target.to(self.device)
        wanted = target != IGNORE
        each = F.cross_entropy(self.model.lm_head(text[wanted]), target[wanted], reduction="none")
        answers = pack.answers.to(self.device)[wanted]
        values, families = each[answers].detach().cpu().numpy(), np.array(pack.families)
        parts = {family: values[families == family].mean() for family in sorted(set(pack.families))}
        return each[answers].mean() + 0.1 * each[~answers].mean(), parts

    def naming_loss(self, visual: torch.Tensor, digit: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the words for the digit and colour, (scenes, kept) with 0 for none, under visual tokens."""
        logs, on = self.model.lm_head(visual).log_softmax(-1), digit > 0
        words = self.digit_word[digit], self.colour_word[colour]
        said = -sum(logs.gather(-1, word[..., None]) for word in words)[..., 0] / 2
        return (said * on).sum() / on.sum().clamp(min=1) + 0.2 * (said * ~on).sum() / (~on).sum().clamp(min=1)

    @torch.no_grad()
    def accuracy(self, visual: torch.Tensor, blocks: list[list[Block]], kept: torch.Tensor) -> dict[str, float]:
        """Share of right answers over "all" and per family, from projected tokens (scenes, tokens, dim).

        blocks: one list a scene. kept: (scenes, count).
        """
        self.model.eval()
        right: dict[str, list[bool]] = {b.family: [] for of_scene in blocks for b in of_scene}
        for rows in torch.arange(len(blocks)).split(50):
            pack = Pack.of([blocks[i] for i in rows])
            seen = chosen(visual[rows], kept[rows]).to(self.device)
            hidden = self.hidden(seen, kept[rows], pack, compact=False, total=visual.shape[1])[-1]
            text = hidden[:, len(PREFIX) + kept.shape[1] :]
            said = self.model.lm_head(text[pack.answers.to(self.device)]).argmax(-1).cpu()
            for family, ok in zip(pack.families, (said == pack.target[pack.answers]).tolist(), strict=True):
                right[family].append(ok)
        return {"all": float(np.mean(sum(right.values(), []))), **{f: float(np.mean(v)) for f, v in right.items()}}


def begin(out: Path, threads: int, seed: int) -> None:
    """Starts a training run: its folder, the log there and on the terminal, threads and seed."""
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(out / "train.log")],
    )
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints and the log.")],
    save_to: Annotated[Path | None, typer.Option(help="Where the model goes; default OUT/model.")] = None,
    scenes: Annotated[int, typer.Option(help="Training scenes, kept in memory.")] = 16000,
    encoder_steps: int = 2000,
    caption_steps: int = 500,
    question_steps: int = 1200,
    variable_steps: int = 1250,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: int = 2,
    seed: int = 0,
) -> None:
    begin(out, threads, seed)
    model = build_model().to(device)
    data = Data.draw(scenes, "train", seed)
    log.info("%d scenes drawn", scenes)
    tower = model.model.vision_tower
    heads = EncoderHeads(model.config.vision_config.hidden_size).to(device)

    def encoder_loss(step: int):
        rng = np.random.RandomState([seed, 1, step])
        rows = torch.from_numpy(rng.randint(0, scenes, 64))
        on_digit = data.digit[rows] > 0
        tokens = max(48, int(on_digit.sum(1).max()))  # most background is left out at first, for speed
        kept = random_tokens(rng, on_digit, tokens if step < 0.9 * encoder_steps else VISUAL_TOKENS, bias=1.0)
        return heads.loss(tower, data, rows, kept, device)

    train(Stage("encoder", encoder_steps, 1.5e-3, encoder_loss), nn.ModuleDict(dict(tower=tower, heads=heads)), out)

    tower.requires_grad_(False).eval()
    features = encode(tower, data.pixels, device)
    log.info("features cached")
    decoder = Decoder(model, device)
    families = list(FAMILIES)

    def decoder_loss(step: int, stage: int, captions: float, naming: float, vary: float):
        rng = np.random.RandomState([seed, stage, step])
        rows = torch.from_numpy(rng.randint(0, scenes, 32))
        on_digit = data.digit[rows] > 0
        captioned = rng.rand() < captions
        if captioned:
            pack = Pack.of([caption_blocks(rng, data.digits[i]) for i in rows])
        else:
            pack = Pack.of([question_blocks(rng, data.digits[i], families * 2 + ["position"] * 3) for i in rows])
        if captioned and stage == 2:  # background is dropped for speed; digits are kept
            count = rng.randint(int(on_digit.sum(1).max()), VISUAL_TOKENS)
            kept = random_tokens(rng, on_digit, count, bias=1.0)
        elif rng.rand() < vary:
            count = int(np.exp(rng.uniform(np.log(5), np.log(VISUAL_TOKENS))))
            if rng.randint(4) == 0:
                kept = strided_tokens(len(rows), count, rng.rand())
            else:
                kept = random_tokens(rng, on_digit, count, bias=rng.choice([0.0, rng.uniform(0.2, 1.2)]))
        else:
            kept = strided_tokens(len(rows), VISUAL_TOKENS)
        return decoder.loss(features, data, rows, kept, pack, bool(rng.randint(2)), naming)

    validation = Data.draw(200, "validation", seed + 1)
    validation_features = encode(tower, validation.pixels, device)
    blocks = [question_blocks(np.random.RandomState(i), d, families) for i, d in enumerate(validation.digits)]

    def check():
        log_table(decoder, validation_features, blocks, (16,))

    stages = (
        Stage("captions", caption_steps, 1e-3, lambda step: decoder_loss(step, 2, 1.0, 0.5, 0.0)),
        Stage("questions", question_steps, 1e-3, lambda step: decoder_loss(step, 3, 0.15, 0.3, 0.4), check),
        Stage("variable", variable_steps, 8e-4, lambda step: decoder_loss(step, 4, 0.12, 0.3, 0.75), check),
    )
    for stage in stages:
        train(
            stage, nn.ModuleList([model.model.multi_modal_projector, model.model.language_model, decoder.places]), out
        )

    folder = save_to or out / "model"
    model.eval().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    log.info("saved to %s; accuracy on the test set:", folder)
    test = digitscenes.examples()
    pixels = torch.stack([torch.from_numpy(np.array(e.image)).permute(2, 0, 1) for e in test])
    questions = [[Block.make(e.question, [e.answer], e.family)] for e in test]
    log_table(decoder, encode(tower, pixels, device), questions, (72, 36, 16, 8))


def log_table(decoder: Decoder, features: torch.Tensor, blocks: list[list[Block]], counts: tuple[int, ...]) -> None:
    """Logs the accuracy per family with all visual tokens, with none, and with `counts` of them chosen simply."""
    scenes = len(blocks)
    nothing = torch.zeros(scenes, VISUAL_TOKENS, dtype=torch.bool)
    selections = {"full": strided_tokens(scenes, VISUAL_TOKENS), "zero": strided_tokens(scenes, 0)}
    with torch.no_grad():
        visual = torch.cat([decoder.project(f.to(decoder.device)).cpu() for f in features.split(128)])
    for count in counts:
        selections[f"random {count}"] = random_tokens(np.random.RandomState(0), nothing, count)
        selections[f"stride {count}"] = strided_tokens(scenes, count)
        selections[f"diverse {count}"] = diverse_tokens(visual, count)
    for name, kept in selections.items():
        scores = decoder.accuracy(visual, blocks, kept)
        log.info("%-12s %s", name, "  ".join(f"{family} {value:.3f}" for family, value in scores.items()))


if __name__ == "__main__":
    typer.run(main)
