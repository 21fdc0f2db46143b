# SPDX-License-Identifier: Apache-2.0
"""Trains the DigitScenes CLIP, on a CPU or a GPU.

    python scripts/train_digitscenes_clip.py OUT            # start, or go on where a killed run stopped
    python scripts/train_digitscenes_clip.py OUT --save-to eval/digitscenes/open_clip_model

The vision tower starts as the encoder of the trained DigitScenes LLaVA. Each step draws new images of one digit, bent a
little, and two captions for each: one names colour and digit, one names either. A caption describes several images of
a batch ("a red digit" all red ones), so the loss takes every pair that fits as right (as UniCL does, arXiv 2204.03610).
In the first 85 % of the steps only a part of the background patches is encoded, for speed.
"""

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from digitscenes_data import model_input, random_tokens
from digitscenes_video_data import bent
from safetensors.torch import save_file
from train_digitscenes import Stage, begin, chosen, train
from transformers import AutoModelForImageTextToText

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.corruptions import CORRUPTIONS
from vtprune.eval.digitscenes.labelled import CLASSES, TEMPLATES, draw_labelled, labelled_images
from vtprune.eval.digitscenes.model import GRID, PATCH_SIZE, VISUAL_TOKENS
from vtprune.eval.digitscenes.open_clip_model import (
    OPEN_CLIP_NAME,
    OPEN_CLIP_PATH,
    build_open_clip,
    build_open_clip_tokenizer,
)

log = logging.getLogger("digitscenes")

BOTH = ("a {} {}", "a photo of a {} {}", "an image of a {} {}")
"""Captions with colour and digit."""


@torch.no_grad()
def warm_start(visual, tower) -> None:
    """Copies the encoder of the LLaVA, transformers' CLIP, into open_clip's own vision tower.

    The last norm and the projection have no counterpart and stay random.
    """
    old, new = tower.state_dict(), {}
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for layer in range(len(visual.transformer.resblocks)):
        before, after = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            names |= {f"{before}.{part}.{kind}": f"{after}.{name}.{kind}" for part, name in parts.items()}
            rows = [old[f"{before}.self_attn.{row}_proj.{kind}"] for row in "qkv"]
            new[f"{after}.attn.in_proj_{kind}"] = torch.cat(rows)
    new |= {name: old[source] for source, name in names.items()}
    missing, unexpected = visual.load_state_dict(new, strict=False)
    if unexpected or set(missing) != {"ln_post.weight", "ln_post.bias", "proj"}:
        raise RuntimeError(f"the towers do not fit: {missing} were not given, {unexpected} are not there")


def draw_batch(rng, size: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int | None, str | None]], list[str]]:
    """Images, uint8 (size, 3, 168, 168); True where a patch may be on the digit, (size, 144); what each caption names,
    value and colour or None; and the captions, two an image in the order of the images."""
    pixels, boxes, names, captions = [], [], [], []
    for _ in range(size):
        image, value, colour, box = draw_labelled(rng, "train", bent)
        pixels.append(image.transpose(2, 0, 1))
        boxes.append(box)
        names.append((value, colour))
        captions.append(BOTH[rng.randint(len(BOTH))].format(colour, value))
        alone = ("digit", "colour")[rng.randint(2)]
        names.append((value, None) if alone == "digit" else (None, colour))
        template = TEMPLATES[alone][rng.randint(len(TEMPLATES[alone]))]
        captions.append(template.format(value if alone == "digit" else colour))
    x, y, side = np.array(boxes).T[..., None]
    edge = np.arange(GRID) * PATCH_SIZE
    column, row = ((edge < start + side) & (edge + PATCH_SIZE > start) for start in (x, y))
    on_digit = (row[:, :, None] & column[:, None]).reshape(size, VISUAL_TOKENS)
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(on_digit), names, captions


def fitting(names: list[tuple[int | None, str | None]]) -> torch.Tensor:
    """Which captions describe which images, True or False (images, 2 * images); names: as `draw_batch` gives them."""
    return torch.tensor(
        [[value in (None, v) and colour in (None, c) for value, colour in names] for v, c in names[::2]]
    )


def encode_part(visual, pixels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Image features, (images, dim), from the patches `kept`, (images, count), of pixel values."""
    patches = visual.conv1(pixels).flatten(2).mT + visual.positional_embedding[1:]
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(len(pixels), 1, -1)
    hidden = visual.transformer(visual.ln_pre(torch.cat([cls, chosen(patches, kept)], 1)))
    return visual.ln_post(hidden[:, 0]) @ visual.proj


def pair_loss(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in both directions; the target is uniform over what fits. logits, fits: (images, captions)."""
    target = fits.float()
    by_image = -(logits.log_softmax(1) * target).sum(1) / target.sum(1)
    by_caption = -(logits.log_softmax(0) * target).sum(0) / target.sum(0)
    return (by_image.mean() + by_caption.mean()) / 2


@torch.no_grad()
def accuracies(model, tokenize, images, device) -> dict[str, float]:
    """Share of right digits and colours, zero-shot, of `LabelledImage`s."""
    model.eval()
    pixels = torch.stack([torch.from_numpy(np.array(item.image)).permute(2, 0, 1) for item in images])
    features = torch.cat([model.encode_image(model_input(part, device), normalize=True) for part in pixels.split(100)])
    right = {}
    for task, classes in CLASSES.items():
        texts = [template.format(name) for name in classes for template in TEMPLATES[task]]
        of_class = model.encode_text(tokenize(texts), normalize=True).unflatten(0, (len(classes), -1)).mean(1)
        said = (features @ F.normalize(of_class, dim=-1).T).argmax(1).tolist()
        right[task] = float(np.mean([classes[i] == getattr(item, task) for i, item in zip(said, images, strict=True)]))
    return right


def main(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints and the log.")],
    save_to: Annotated[Path | None, typer.Option(help="Where weights and tokenizer go; default OUT/model.")] = None,
    steps: int = 800,
    batch: Annotated[int, typer.Option(help="Images a step; each has two captions.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: int = 2,
    seed: int = 0,
) -> None:
    begin(out, threads, seed)
    model, _ = build_open_clip()
    warm_start(model.visual, AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).model.vision_tower)
    model.to(device)
    tokenizer = build_open_clip_tokenizer()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(device)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.RandomState([seed, 5, step])
        pixels, on_digit, names, captions = draw_batch(rng, batch)
        count = max(48, int(on_digit.sum(1).max())) if step < 0.85 * steps else VISUAL_TOKENS
        kept = random_tokens(rng, on_digit, count, bias=1.0).to(device)
        images = F.normalize(encode_part(model.visual, model_input(pixels, device), kept), dim=-1)
        texts = model.encode_text(tokenize(captions), normalize=True)
        logits = model.logit_scale.clamp(max=np.log(100)).exp() * images @ texts.T
        value = pair_loss(logits, fitting(names).to(device))
        with torch.no_grad():  # among the captions with colour and digit
            pairs = logits[:, ::2].argmax(1)
            right = np.mean([names[2 * i] == names[2 * j] for i, j in enumerate(pairs.tolist())])
        return value, dict(right=float(right), scale=model.logit_scale.exp().item())

    validation = labelled_images("validation", 300, seed)

    def check() -> None:
        log_accuracies("validation", accuracies(model, tokenize, validation, device))

    train(Stage("clip", steps, 1e-3, loss, check, every=200), model, out)

    folder = save_to or out / "model"
    save(model, folder)
    log.info("saved to %s; accuracy on the test set:", folder)
    log_accuracies("clean", accuracies(model, tokenize, labelled_images(), device))
    for corruption in CORRUPTIONS:
        for severity in (1, 2, 3):
            images = labelled_images(corruption=corruption, severity=severity)
            log_accuracies(f"{corruption} {severity}", accuracies(model, tokenize, images, device))


def save(model, folder: Path) -> None:
    """Writes weights, tokenizer and configuration into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.logit_scale.clamp_(max=np.log(100))
    save_file(
        {name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    build_open_clip_tokenizer().save_pretrained(folder)
    config = f"{OPEN_CLIP_NAME}.json"
    (folder / config).write_text((OPEN_CLIP_PATH / config).read_text())


def log_accuracies(name: str, right: dict[str, float]) -> None:
    log.info("%-12s %s", name, "  ".join(f"{task} {value:.3f}" for task, value in right.items()))


if __name__ == "__main__":
    typer.run(main)
