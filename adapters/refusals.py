# SPDX-License-Identifier: Apache-2.0
"""Why the other multimodal classes of transformers are refused, and what would help.

An adapter goes first: who adds one deletes the model type's line here. A test fails for a class of transformers that
has neither an adapter nor a line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vtprune.transformers_private import is_language_model, is_remote_code, multimodal_classes

_OTHER_FAMILY = "take a family whose images are tokens of the prompt; `vtprune models` lists those that are supported"
_OWN_ADAPTER = 'write an adapter (CONTRIBUTING.md, "Add an adapter")'


class Reason(NamedTuple):
    """Why a kind of models cannot be pruned."""

    name: str
    """A title of a few words."""
    why: str
    """A clause about one such model."""
    helps: str
    """What a user can do."""


class Refusal(NamedTuple):
    """Why the models of one type cannot be pruned."""

    reason: Reason
    detail: str = ""
    """What is special about this type."""

    def message(self, name: str) -> str:
        """The refusal of a model of the class `name`."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"a {name} cannot be pruned: {self.reason.why}{detail}; {self.reason.helps}"


NO_ADAPTER = Reason(
    "no adapter yet",
    "its visual tokens could be pruned, but there is no adapter for it yet",
    f"{_OWN_ADAPTER}, try adapter='generic', or take a supported family (`vtprune models`)",
)
CROSS_ATTENTION = Reason(
    "cross-attention",
    "its image enters the language model by cross-attention, so the prompt has no visual tokens",
    _OTHER_FAMILY,
)
ENCODER_DECODER = Reason(
    "encoder-decoder",
    "its image is in an encoder, which the decoder reads by cross-attention, so no decoder reads visual tokens",
    _OTHER_FAMILY,
)
FEW_TOKENS = Reason(
    "few tokens",
    "a Q-Former already makes so few tokens of an image that little is left to prune",
    _OTHER_FAMILY,
)
NO_PLACEHOLDERS = Reason(
    "no placeholders",
    "no placeholder ids in the prompt say where its visual tokens are",
    _OTHER_FAMILY,
)
EARLY_FUSION = Reason(
    "early fusion",
    "it turns an image into codes of its vocabulary and embeds them like words, so there are no features of a vision "
    "encoder to choose by",
    _OTHER_FAMILY,
)
COLUMN_DISTANCES = Reason(
    "distances by column",
    "its attention counts how many columns lie between two tokens, and its convolutions read the columns before, so "
    "what is left would change as soon as a token between is gone",
    _OTHER_FAMILY,
)
BLOCKS_OF_COLUMNS = Reason(
    "blocks of columns",
    "its sparse attention chooses among blocks of columns and takes positions for columns, so that with tokens missing "
    "a position names a block that is not there",
    _OTHER_FAMILY,
)
RETRIEVAL = Reason(
    "retrieval",
    "the vectors of its tokens are its output, so that dropping tokens drops what a document is found by",
    "drop or pool the vectors that it puts out, where you store them",
)
BLOCK_DIFFUSION = Reason(
    "block diffusion",
    "it refines whole blocks of an answer over and over, and does not generate token by token behind a prefill",
    _OTHER_FAMILY,
)
AUDIO = Reason(
    "audio only",
    "it reads sound and no images, so it has no visual tokens",
    "for images and videos take a supported family (`vtprune models`)",
)
TEXT_ONLY = Reason(
    "text only",
    "it is a language model alone, which reads no images",
    "pass the whole vision-language model; `vtprune models` lists the supported families",
)
OTHER_PURPOSE = Reason(
    "other purpose",
    "it does not answer questions about images",
    "for images and videos take a supported family (`vtprune models`)",
)

_NEEDS: dict[str, str] = {}
"""Model type -> what an adapter must handle, of classes that could have one. Delete the line of a type with the commit
that adds its adapter."""

REFUSALS: dict[str, Refusal] = {
    "apertus1p5": Refusal(EARLY_FUSION),
    "blip": Refusal(CROSS_ATTENTION),
    "blip-2": Refusal(FEW_TOKENS, "32 an image"),
    "chameleon": Refusal(EARLY_FUSION),
    "colmodernvbert": Refusal(RETRIEVAL),
    "colpali": Refusal(RETRIEVAL, "its SigLIP tower alone can be, by methods such as `tome`"),
    "colqwen2": Refusal(RETRIEVAL),
    "diffusion_gemma": Refusal(BLOCK_DIFFUSION),
    "emu3": Refusal(EARLY_FUSION),
    "evolla": Refusal(OTHER_PURPOSE, "it reads proteins"),
    "florence2": Refusal(ENCODER_DECODER),
    "fun_asr_nano": Refusal(AUDIO),
    "git": Refusal(NO_PLACEHOLDERS, "they are put before the text inside the model"),
    "glmasr": Refusal(AUDIO),
    "granite_speech": Refusal(AUDIO),
    "granite_speech_plus": Refusal(AUDIO),
    "idefics": Refusal(CROSS_ATTENTION),
    "inkling2": Refusal(COLUMN_DISTANCES),
    "inkling2_loop": Refusal(COLUMN_DISTANCES),
    "inkling_mm_model": Refusal(COLUMN_DISTANCES),
    "instructblip": Refusal(FEW_TOKENS, "32 an image"),
    "instructblipvideo": Refusal(FEW_TOKENS, "32 a frame"),
    "kosmos-2": Refusal(NO_PLACEHOLDERS, "image_embeds_position_mask does; they are 64 an image"),
    "kosmos-2.5": Refusal(NO_PLACEHOLDERS, "image_embeds_position_mask does"),
    "kyutai_speech_to_text": Refusal(AUDIO),
    "minimax_m3_vl": Refusal(BLOCKS_OF_COLUMNS),
    "mistral4": Refusal(TEXT_ONLY),
    "mllama": Refusal(CROSS_ATTENTION),
    "moss_transcribe_diarize": Refusal(AUDIO),
    "nemo_speechlm": Refusal(AUDIO),
    "neomme": Refusal(RETRIEVAL),
    "omniasr": Refusal(AUDIO),
    "pi0": Refusal(OTHER_PURPOSE, "it steers a robot"),
    "pix2struct": Refusal(ENCODER_DECODER),
    "pp_formulanet": Refusal(ENCODER_DECODER),
    "qwen2_audio": Refusal(AUDIO),
    "qwen3_asr": Refusal(AUDIO),
    "t5gemma2": Refusal(ENCODER_DECODER),
    "udop": Refusal(ENCODER_DECODER),
    "vibevoice_asr": Refusal(AUDIO),
    "vision-encoder-decoder": Refusal(ENCODER_DECODER),
    "voxtral": Refusal(AUDIO),
    "voxtral_realtime": Refusal(AUDIO),
    **{model_type: Refusal(NO_ADAPTER, f"an adapter must handle {need}") for model_type, need in _NEEDS.items()},
}
"""Model type -> why its models are refused."""


def refusal(model: Any) -> str | None:
    """Why a model without an adapter cannot be pruned, and what would help; None if nothing is known of it."""
    if is_remote_code(model):
        return remote_code(model)
    name, model_type = type(model).__name__, _model_type(model)
    if model_type in REFUSALS:
        return REFUSALS[model_type].message(name)
    return Refusal(TEXT_ONLY).message(name) if is_language_model(model_type) else None


def remote_code(model: Any) -> str:
    """Why a model whose class comes from its checkpoint's repository cannot be pruned, and what would help."""
    why = f"a {type(model).__name__} cannot be pruned: its code comes from the checkpoint's repository (remote code)"
    own = multimodal_classes().get(_model_type(model))
    if own is None:
        return f"{why}; take a checkpoint that transformers loads without trust_remote_code, or {_OWN_ADAPTER}"
    known = REFUSALS.get(_model_type(model))
    if known is not None:
        return f"{why}; transformers has a class of its own for it, but {known.message(own)}"
    return f"{why}; take a checkpoint for {own} of transformers, and load it without trust_remote_code"


def _model_type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")
