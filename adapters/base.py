# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about a model family: where its parts are and how its visual tokens are laid out."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.pictures import Pictures
from vtprune.adapters.states import LayerStates
from vtprune.tokens import Grid, Medium, ModelShape
from vtprune.transformers_private import chosen_feature_layers, key_sources, rotary_embedding, rotation_kind, uses_mrope

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Kind of medium -> the argument that carries its pixels."""


class Adapter(LayerStates, Pictures, ABC):
    """Facts about one loaded model. One subclass a model family; it holds the model and changes nothing in it.

    A *kind* is "image" or "video". transformers encodes all media of a kind of a batch in one call (`encode_call`), of
    the base model's `get_image_features` or `get_video_features` in most families; the *inputs* below are that call's
    arguments by name. The defaults fit
    models with one tower (CLIP's or SigLIP's), whose tokens pass the projector one by one, one block an image.
    """

    model_types: ClassVar[tuple[str, ...]]
    """Values of `model.config.model_type` this adapter is for; "type/tower" with the vision config's model type for
    families that share a model class, before which an adapter for "type" stands back."""
    family: ClassVar[str]
    """What people call the family, for tables."""
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    """Kinds of media the family takes: "image", "video"."""
    layout: ClassVar[str]
    """The visual tokens of an image (and a video) in a few words, for tables."""
    cls_token: ClassVar[str] = "no"
    """Whether the encoder has a CLS token, for tables: "yes", "no", or when."""
    merges_in_encoder: ClassVar[bool] = True
    """Whether tokens can be merged between encoder layers: all patches of a crop see one another, without masks or
    rotary embeddings."""
    carries_state: ClassVar[bool] = False
    """Whether layers of the family's language model carry a state from token to token, or column numbers from layer to
    layer, so that no tokens can be dropped inside it; for tables. Of a model that is loaded, its config says so."""
    tiles_adjoin: ClassVar[bool] = False
    """Whether media that stand side by side in the prompt, without text between them, are tiles of one image."""
    images_joined: ClassVar[bool] = False
    """Whether the images of several prompts may come as one to an encode call; then a prompt has one image at most."""
    gated_encoder_mlp: ClassVar[bool] = False
    """Whether an MLP of the encoder has three matrices (gate, up, down) instead of two; for counting FLOPs."""
    unmerged: ClassVar[str] = ""
    """Why they cannot, as a clause; empty: for the reason in `layers_unread`, or else images are packed or masked."""
    layers_unread: ClassVar[str] = ""
    """Why nothing that the encoder's layers compute can be read as of a visual token, as a clause; empty: it can be."""
    features_unread: ClassVar[str] = ""
    """The same of what the projector reads."""
    gridless: ClassVar[str] = ""
    """Why visual tokens have no rows and columns, as a clause; empty: they have."""
    encoder_uncounted: ClassVar[str] = ""
    """Why FLOPs of the encoder are not counted, as a clause; empty: they are, as those of a ViT."""
    cls_is_last: ClassVar[bool] = False
    """Whether the encoder puts its CLS token behind the patches, not before them. What is recorded has it first."""
    decoder_mlp: ClassVar[str] = "mlp"
    """What the MLP, or the experts, of a decoder layer is called."""
    window_cuts_blocks: ClassVar[bool] = False
    """Whether a sliding window also limits what a token sees of its own block (see `blocks`)."""
    block_kinds: ClassVar[tuple[str, ...] | None] = None
    """Kinds of decoder layers in which a block's tokens all see one another (see `blocks`); None: in all."""
    marker_columns: ClassVar[tuple[int, int]] = (0, 0)
    """How many tokens the processor puts right before and right behind the tokens of an image. For families whose
    config does not say which these are: only a tokenizer could tell their ids."""

    def __init__(self, model: nn.Module):
        # What transformers' modules and configs hold, no type says; an adapter states it.
        self.model: Any = model
        self.config: Any = model.config

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        """Why a config of this family is not supported after all; None if it is."""
        return None

    @classmethod
    def why_unmerged(cls) -> str:
        """Why tokens cannot be merged between encoder layers where they cannot."""
        return cls.unmerged or cls.layers_unread or "packed or masked images"

    @classmethod
    def stages(cls) -> tuple[str, ...]:
        """Stages at which methods can act on the family."""
        inside = ("encoder",) if cls.merges_in_encoder else ()
        in_llm = () if cls.carries_state else ("in_llm", "decode")
        return (*inside, "before_llm", *in_llm)

    @classmethod
    def signals(cls) -> tuple[str, ...]:
        """What methods can ask of the family (`vtprune.signals`), in words."""
        cls_attention = {"yes": ("CLS attention",), "no": ()}.get(cls.cls_token, (f"CLS attention {cls.cls_token}",))
        layers = () if cls.layers_unread else (*cls_attention, "encoder attention")
        features = () if cls.features_unread else ("encoder features",)
        in_llm = () if cls.carries_state else ("LLM attention", "transition")
        return (*layers, *features, "text", *in_llm)

    # -- the language model -------------------------------------------------------------------------------------

    @property
    def base(self) -> Any:
        """The module whose forward takes `input_ids` and pixels and calls the language model."""
        return self.model.base_model

    @functools.cached_property
    def language_model(self) -> Any:
        """The decoder, called with `inputs_embeds`; has `layers` and `rotary_emb`. Steps ask for it often."""
        return self.model.get_decoder()

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers

    @functools.cached_property
    def key_sources(self) -> list[int]:
        """Of each decoder layer, the one whose keys and values it reads. Configs are slow to read, and calls many."""
        return key_sources(self.language_model.config, len(self.decoder_layers))

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def visual_token_ids(self) -> Mapping[str, int]:
        """Kind -> the placeholder id that stands for its visual tokens in `input_ids`."""
        return {kind: getattr(self.config, f"{kind}_token_id") for kind in self.kinds}

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        """Ids of tokens that are neither visual nor language, as far as the config has them: those around images, such
        as "start of image", and audio."""
        around = ("vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index")
        names = (*around, "audio_start_token_id", "audio_token_id", "audio_end_token_id")
        return tuple(value for name in names if (value := getattr(self.config, name, None)) is not None)

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        """(batch, length) bool: columns that a processor puts around and inside images, neither visual nor language.

        Those of `marker_token_ids`, those that `marker_columns` counts, and whatever stands inside an image or a video.

        ids: (batch, length) long; None if the prompt came as embeddings. images: (batch, length) long, the image or
        video of each visual column, -1 elsewhere.
        """
        visual = images >= 0
        length = images.shape[1]
        columns = torch.arange(length, device=images.device).expand_as(images)
        last = torch.where(visual, columns, -1).cummax(1).values
        following = torch.where(visual, columns, length).flip(1).cummin(1).values.flip(1)
        before, behind = self.marker_columns
        around = ((last >= 0) & (columns - last <= behind)) | ((following < length) & (following - columns <= before))
        own = images.gather(1, last.clamp(min=0)) == images.gather(1, following.clamp(max=length - 1))
        found = around | (own & (last >= 0) & (following < length))
        if ids is not None and self.marker_token_ids:
            found = found | torch.isin(ids, torch.tensor(self.marker_token_ids, device=ids.device)).to(found.device)
        return found & ~visual

    def rope(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """What a decoder layer is handed as `position_embeddings` at positions (..., batch, n).

        Usually cos and sin, (batch, n, rotary dim) each; None for a layer that rotates nothing.
        """
        # Of four rows the first one is for masks alone; the others are the axes of M-RoPE.
        has_text_row = positions.ndim == 3 and len(positions) == 4
        positions = positions[1:] if has_text_row else positions
        return rotary_embedding(self.language_model, self.rope_kinds[layer], hidden, positions)

    @functools.cached_property
    def rope_kinds(self) -> Sequence[Any]:
        """Of each decoder layer; those of one kind are handed the same rotations at the same positions."""
        return [rotation_kind(self.language_model.config, layer) for layer in range(len(self.decoder_layers))]

    @property
    def position_axes(self) -> int:
        """Axes of the language model's position ids: 1, or 3 with M-RoPE."""
        return 3 if uses_mrope(self.language_model.config) else 1

    def blocks(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(batch, tokens) long: the block of each token whose tokens all see one another, -1 for none.

        inputs: arguments of the base model's forward in a prefill. Tokens are counted from the start of the sequence,
        cached ones included, as transformers does. None: attention is causal throughout.
        """
        return None

    def has_blocks(self, kind: str) -> bool:
        """Whether the tokens of a block all see one another in decoder layers of a kind."""
        return self.block_kinds is None or kind in self.block_kinds

    def pixel_argument(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        """The pixels of a kind among the arguments of the base model's forward, or of an encode call; None if none."""
        return inputs.get(PIXELS[kind])

    # -- the vision encoder -------------------------------------------------------------------------------------

    def vision_tower(self, kind: str = "image") -> Any:
        """The vision encoder."""
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        """The encoder's transformer layers; with `self_attn.q_proj` and `.k_proj` if there is a CLS token."""
        return self.vision_tower(kind).encoder.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        """The attention module of an encoder layer."""
        return layer.self_attn

    @property
    def projector(self) -> Any:
        """Maps encoder features, its first argument, to the LLM's width; called once for all media of a call, or for
        some of them at a time."""
        return self.base.multi_modal_projector

    @property
    def vision_config(self) -> Any:
        return self.config.vision_config

    @property
    def encoder_mlp_width(self) -> int | None:
        """Width inside an MLP of the encoder, for counting FLOPs; None if it is the config's `intermediate_size`, or
        follows from its `mlp_ratio`."""
        return None

    @property
    def has_cls(self) -> bool:
        """Whether the encoder has a CLS token beside the patches."""
        return False

    @property
    def has_clip_tower(self) -> bool:
        """Whether the vision encoder is a CLIP's, whose features compare with those of the CLIP's text tower."""
        return self.vision_config.model_type == "clip_vision_model"

    @property
    def shape(self) -> ModelShape:
        """Depths, the deepest of `feature_layers`, and `has_cls`."""
        depth = len(self.encoder_layers())
        return ModelShape(depth, len(self.decoder_layers), max(*self.feature_layers, 0), self.has_cls)

    @property
    def feature_layers(self) -> list[int]:
        """0-based encoder layers whose outputs the projector reads: the config's `vision_feature_layer`, or the last.

        -1 is the embedding.
        """
        depth = len(self.encoder_layers())
        chosen = chosen_feature_layers(self.config)
        # Entry 0 of the hidden states is the embedding, so entry i is the output of layer i - 1.
        return [(layer if layer >= 0 else depth + 1 + layer) - 1 for layer in chosen]

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        """Length, in patches without CLS, of every sequence that the encoder ran for a call; for counting FLOPs.

        One number a layer where the encoder itself merges patches between its layers.
        """
        crops = inputs[PIXELS[kind]].flatten(0, -4)
        return [(crops.shape[-2] // self._patch) * (crops.shape[-1] // self._patch)] * len(crops)

    @property
    def _patch(self) -> int:
        return self.vision_config.patch_size

    @property
    def image_grid(self) -> Grid | None:
        """The one grid that every image, all of it, is laid out in; None where images differ or are cut into crops.

        With it, features that were encoded outside a session can be placed, too.
        """
        return None

    # -- what was encoded ---------------------------------------------------------------------------------------

    def features_of(self, output: Any) -> Tensor | Sequence[Tensor]:
        """The features that enter the language model, in what an encode call returned: tensors (tokens, dim), or one
        (images, tokens, dim)."""
        return output.pooler_output

    def embedded(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the language model with `inputs_embeds`, where it would embed the prompt itself."""
        return kwargs

    def encode_call(self, kind: str) -> tuple[Any, str]:
        """The module, and the name of its method, that encodes all media of a kind of a batch in one call."""
        return self.base, f"get_{kind}_features"

    def encode(self, kind: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Encode all media of a kind of a batch, outside of any call of the model.

        inputs: the model's arguments. Returns the arguments of the encode call, and what it returned.
        """
        module, name = self.encode_call(kind)
        method = getattr(module, name)
        arguments = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
        return arguments, method(**arguments, return_dict=True)

    @abstractmethod
    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        """Layouts of the images or videos that one call encoded, in order.

        inputs: the call's arguments. features: `features_of` what it returned.
        """

    def prompt_tokens(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        """(tokens,) bool: which of the tokens of a kind that are encoded the model puts into the prompt; None for all.

        inputs: arguments of the base model's forward. What the adapter says of an encode call is about all tokens.
        """
        return None

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        """The pixels of each medium of a call; all-zero padding makes no difference."""
        return inputs[PIXELS[kind]]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        """The projector's input as one row a visual token: (tokens of all media, dim), zeros for separators.

        Where several encoder tokens become one visual token, their mean. Inputs of several calls come as rows, one call
        after another.
        """
        return features.flatten(0, 1)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        """Values of the encoder's patches (crops, patches, dim) as one row a visual token, like `projector_inputs`.

        Patches are those the projector reads: without the CLS token if that is cut off.
        """
        return values.flatten(0, 1)

    def without_resizing(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of an encode call of images, changed so that the model resizes no features of theirs."""
        return inputs

    def cuts_cls(self, kind: str) -> bool:
        """Whether the CLS token, if there is one, is cut off before the projector."""
        return True


def stack_sizes(sizes: Any) -> list[tuple[int, int]]:
    """Heights and widths as processors give them, tensors or lists, as pairs of ints."""
    return [(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
