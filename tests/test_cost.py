# SPDX-License-Identifier: Apache-2.0
"""vtprune.cost against torch's own counter and against the TFLOPs that papers print."""

import math

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import vtprune
from vtprune import cost
from vtprune.cost.layers import layer_shapes
from vtprune.errors import ConfigError
from vtprune.testing import families
from vtprune.transformers_private import CACHE

TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
TINY_VISION = dict(
    hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
)

QWEN2_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
)
VICUNA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
)


def solving(system: torch.Size, right: torch.Size, *args, **kwargs) -> int:
    """FLOPs of a triangular system, which torch does not count, as the product that kernels, and older releases of
    transformers, have in its place."""
    return 2 * math.prod(right) * system[-1]


def counted_flops(module: torch.nn.Module, *args, **kwargs) -> dict[str, int]:
    """FLOPs of one forward as torch counts them: name of a module below `module` ("" is itself) -> FLOPs.

    Eager attention, because its matrix products are counted on every device and for every mask.
    """
    module.eval().set_attn_implementation("eager") if hasattr(module, "set_attn_implementation") else module.eval()
    root = type(module).__name__
    solvers = {torch.ops.aten.linalg_solve_triangular: solving}
    with torch.no_grad(), FlopCounterMode(display=False, depth=None, custom_mapping=solvers) as counter:
        module(*args, **kwargs)
    return {
        name.removeprefix(root).removeprefix("."): sum(operators.values())
        for name, operators in counter.get_flop_counts().items()
        if name.startswith(root)
    }


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        pytest.param(LlamaModel, LlamaConfig(**TINY), id="llama-mha"),
        pytest.param(LlamaModel, LlamaConfig(**TINY, num_key_value_heads=2), id="llama-gqa"),
        pytest.param(LlamaModel, LlamaConfig(**TINY, num_key_value_heads=3, head_dim=20), id="llama-head-dim"),
        pytest.param(Qwen2Model, Qwen2Config(**TINY, num_key_value_heads=2), id="qwen2-bias"),
        pytest.param(Qwen3Model, Qwen3Config(**TINY, num_key_value_heads=2, head_dim=16), id="qwen3-qk-norm"),
    ],
)
@pytest.mark.parametrize(("visual", "text"), [(19, 7), (0, 11)])
def test_exact_prefill_is_what_torch_counts(model_class, config, visual, text):
    counted = counted_flops(model_class(config), inputs_embeds=torch.randn(1, visual + text, config.hidden_size))
    layers = [counted[f"layers.{i}"] for i in range(config.num_hidden_layers)]
    assert cost.llm_prefill_flops(config, [visual] * config.num_hidden_layers, text) == sum(layers)


EXPERTS = TINY | dict(num_key_value_heads=2, head_dim=16, num_experts_per_tok=2)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=12,
    linear_value_head_dim=20,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
ROPE = dict(
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], partial_rotary_factor=1.0)
)
CONVOLUTIONS = TINY | dict(num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"])
LATENT = TINY | dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=4,
    v_head_dim=10,
    n_routed_experts=5,
    num_experts_per_tok=2,
    n_shared_experts=2,
    moe_intermediate_size=24,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
STREAMS = dict(
    layer_types=["linear_attention", "indexed_attention", "linear_attention"],
    hc_count=2,
    hc_lowrank=12,
    indexer_n_heads=3,
    indexer_kv_heads=1,
    indexer_head_dim=20,
    indexer_compress_ratio=4,
    indexer_budget=16,
    ple_layer_ids=[3],
    ple_embed_dim=24,
    heads_per_ngram=2,
    ngram_vocab_size_base=64,
    split_ngram_parts=1,
    make_ngram_vocab_size_divisible_by=8,
    eos_token_id=2,
)
NEMOTRON = EXPERTS | dict(
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    ssm_state_size=12,
    mamba_num_heads=4,
    mamba_head_dim=20,
    n_groups=2,
    chunk_size=32,
    n_routed_experts=5,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=36,
)
GEMMA4 = TINY | dict(
    num_hidden_layers=6,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=24,
    layer_types=["sliding_attention", "full_attention"] * 3,
    hidden_size_per_layer_input=0,
)
PER_LAYER = dict(hidden_size_per_layer_input=12, vocab_size_per_layer_input=TINY["vocab_size"], num_kv_shared_layers=2)
NARROW = dict(moe_hidden_size=20, moe_intermediate_size=24, num_local_experts=5)
INDEXED = LATENT | dict(pad_token_id=0, index_topk=8, index_n_heads=3, index_head_dim=8)
del INDEXED["first_k_dense_replace"]
SHARED = dict(moe_intermediate_size=24, num_experts=5, shared_expert_intermediate_size=36)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("MixtralModel", lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=5)),
        ("GptOssModel", lambda: hf.GptOssConfig(**EXPERTS, num_local_experts=5)),
        (
            "Qwen3VLMoeTextModel",
            lambda: hf.Qwen3VLMoeTextConfig(**EXPERTS, moe_intermediate_size=24, num_experts=5, mlp_only_layers=[1]),
        ),
        (
            "Glm4vMoeTextModel",
            lambda: hf.Glm4vMoeTextConfig(
                **EXPERTS | ROPE, moe_intermediate_size=24, n_routed_experts=5, first_k_dense_replace=1
            ),
        ),
        (
            "Step3p7TextModel",
            lambda: hf.Step3p7TextConfig(
                **EXPERTS,
                num_sliding_attention_heads=4,
                sliding_window=200,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                mlp_layer_types=["dense", "sparse", "sparse"],
                n_routed_experts=5,
                moe_intermediate_size=24,
                share_expert_dim=20,
            ),
        ),
        ("Cosmos3EdgeTextModel", lambda: hf.Cosmos3EdgeTextConfig(**TINY | ROPE, num_key_value_heads=2, head_dim=16)),
        (
            "DeepseekOcr2TextModel",
            lambda: hf.DeepseekOcr2TextConfig(
                **TINY,
                num_experts_per_tok=2,
                n_routed_experts=5,
                n_shared_experts=2,
                moe_intermediate_size=24,
                mlp_layer_types=["dense", "sparse", "sparse"],
            ),
        ),
        ("Qwen3_5TextModel", lambda: hf.Qwen3_5TextConfig(**TINY | LINEAR, num_key_value_heads=2, head_dim=16)),
        ("DeepseekV3Model", lambda: hf.DeepseekV3Config(**LATENT, q_lora_rank=None)),
        (
            "MistralLarge4TextModel",
            lambda: hf.MistralLarge4TextConfig(
                **INDEXED,
                indexer_types=["full", "shared", "full"],
                no_rope_layers=[1, 0, 1],
                kv_source_layers=[0, 1, 0],
            ),
        ),
        (
            "Dots3NoteTextModel",
            lambda: hf.Dots3NoteTextConfig(
                **INDEXED,
                head_dim=16,
                q_lora_rank=28,
                shared_experts_intermediate_size=20,
                layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
            ),
        ),
        (
            "HYV4VLTextModel",
            lambda: hf.HYV4VLTextConfig(
                **INDEXED,
                q_lora_rank=28,
                hc_mult=3,
                indexer_types=["full", "shared", "full"],
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0]),
            ),
        ),
        (
            "Glm5NextTextModel",
            lambda: hf.Glm5NextTextConfig(
                **INDEXED | dict(qk_rope_head_dim=0),
                q_lora_rank=28,
                hc_mult=3,
                index_kpool=4,
                linear_num_heads=3,
                linear_head_dim=10,
                layer_types=["linear_attention", "indexed_attention", "indexed_attention"],
                indexer_types=["full", "full", "shared"],
                mlp_layer_types=["dense", "sparse", "sparse"],
            ),
        ),
        ("Mistral4Model", lambda: hf.Mistral4Config(**LATENT, q_lora_rank=28)),
        ("AriaTextModel", lambda: hf.AriaTextConfig(**TINY, num_key_value_heads=2, moe_num_experts=5)),
        ("Gemma4TextModel", lambda: hf.Gemma4TextConfig(**GEMMA4 | PER_LAYER, use_double_wide_mlp=True)),
        (
            "Gemma3nTextModel",
            lambda: hf.Gemma3nTextConfig(
                **GEMMA4 | PER_LAYER | dict(intermediate_size=[80, 80, 80, 80, 96, 96]),
                activation_sparsity_pattern=[0.9] * 2 + [0.0] * 4,
                altup_num_inputs=3,
                laurel_rank=7,
            ),
        ),
        (
            "Gemma4TextModel",
            lambda: hf.Gemma4TextConfig(
                **GEMMA4,
                attention_k_eq_v=True,
                num_global_key_value_heads=1,
                enable_moe_block=True,
                num_experts=5,
                top_k_experts=2,
                moe_intermediate_size=24,
            ),
        ),
        (
            "MuseGlimmerTextModel",
            lambda: hf.MuseGlimmerTextConfig(**TINY, num_key_value_heads=2, head_dim=16, sliding_window=512),
        ),
        (
            "MuseSparkTextModel",
            lambda: hf.MuseSparkTextConfig(
                **EXPERTS | NARROW, sliding_window=512, mlp_layer_types=["sparse", "dense", "sparse"]
            ),
        ),
        ("Qwen3_5MoeTextModel", lambda: hf.Qwen3_5MoeTextConfig(**EXPERTS | LINEAR | SHARED)),
        ("Qwen4ExpTextModel", lambda: hf.Qwen4ExpTextConfig(**EXPERTS | LINEAR | SHARED | STREAMS)),
        ("NemotronHModel", lambda: hf.NemotronHConfig(**NEMOTRON)),
        ("NemotronHModel", lambda: hf.NemotronHConfig(**NEMOTRON, moe_latent_size=20)),
        ("Lfm2Model", lambda: hf.Lfm2Config(**CONVOLUTIONS | dict(block_multiple_of=7))),
        ("Lfm3Model", lambda: hf.Lfm3Config(**CONVOLUTIONS, head_dim=16, pad_token_id=0)),
    ],
)
@pytest.mark.parametrize(("visual", "text"), [(19, 7), (60, 41)])
def test_experts_and_other_attention_are_what_torch_counts(model, config, visual, text):
    if not hasattr(hf, model):
        pytest.skip(f"this release of transformers has no {model}")
    config, tokens = config(), visual + text
    model = getattr(hf, model)(config)
    if any(shape.gates for shape in layer_shapes(config, config.num_hidden_layers)):
        model.set_experts_implementation("eager")  # others are not counted, or run tokens that nobody needs
    counted = counted_flops(model, input_ids=torch.arange(tokens)[None] % config.vocab_size)
    expected = sum(counted[f"layers.{i}"] for i in range(config.num_hidden_layers))
    for layer in model.layers:  # the convolution runs beyond the last token, and that is cut off
        convolutions = [module for module in layer.modules() if isinstance(module, torch.nn.Conv1d)]
        convolutions = [module for module in convolutions if module.padding[0]]
        for convolution in convolutions:
            kernel = convolution.kernel_size[0]
            expected -= 2 * convolution.out_channels * kernel * (kernel - 1)
        if hasattr(layer, "mixer") and hasattr(layer.mixer, "A_log"):  # here each chunk is passed the states of all
            chunks = math.ceil(tokens / config.chunk_size)
            state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
            expected -= 2 * state * ((chunks + 1) ** 2 - chunks)
        if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "forget_gate"):  # where kernels have a product
            chunks, heads = math.ceil(tokens / 64), layer.self_attn.num_heads
            expected += 2 * 2 * chunks * 64**2 * heads * layer.self_attn.head_dim  # keys and keys, queries and keys
    assert cost.llm_prefill_flops(config, [visual] * config.num_hidden_layers, text) == expected


def test_experts_of_llama4_are_those_that_the_router_chooses():
    """transformers runs all of them, most on zeros."""
    fields = EXPERTS | dict(num_experts_per_tok=1, num_local_experts=5, intermediate_size_mlp=56, moe_layers=[0, 2])
    config, tokens = hf.Llama4TextConfig(**fields), 26
    counted = counted_flops(hf.Llama4TextModel(config), inputs_embeds=torch.randn(1, tokens, config.hidden_size))
    experts = sum(counted[f"layers.{layer}.feed_forward.experts"] for layer in config.moe_layers)
    expected = sum(counted[f"layers.{layer}"] for layer in range(3)) - experts * 4 / 5
    assert cost.llm_prefill_flops(config, [19] * 3, 7) == expected


def test_linear_attention_holds_no_keys_and_has_no_published_formula():
    if not hasattr(hf, "Qwen3_5TextConfig"):
        pytest.skip("this release of transformers has no Qwen3.5")
    config = hf.Qwen3_5TextConfig(**TINY | LINEAR, num_key_value_heads=2, head_dim=16)
    assert cost.kv_bytes(config, [100, 7, 100]) == 7 * 2 * 2 * 16 * 2
    for convention in cost.CONVENTIONS.keys() - {"exact"}:
        with pytest.raises(ConfigError, match=f"'{convention}' knows plain attention only.*qwen3_5_text.*use 'exact'"):
            cost.llm_prefill_flops(config, [1] * 3, 1, convention)


def test_latent_attention_caches_a_short_vector_and_the_rotated_key():
    config = hf.DeepseekV3Config(**LATENT, q_lora_rank=None)
    cache = hf.DeepseekV3Model(config)(inputs_embeds=torch.randn(1, 9, config.hidden_size), use_cache=True)[CACHE]
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert cost.kv_bytes(config, [9] * 3, dtype_bytes=4) == sum(held) == 3 * 9 * (20 + 4) * 4


def test_exact_prefill_adds_layers_of_different_lengths():
    config = LlamaConfig(**TINY, num_key_value_heads=2)
    model, text, visual = LlamaModel(config), 5, [16, 9, 0]
    expected = 0
    for i, count in enumerate(visual):
        counted = counted_flops(model, inputs_embeds=torch.randn(1, count + text, config.hidden_size))
        expected += counted[f"layers.{i}"]
    assert cost.llm_prefill_flops(config, visual, text) == expected
    assert cost.llm_prefill_flops(config, torch.tensor(visual), text) == expected


def test_lm_head_is_what_torch_counts():
    config = LlamaConfig(**TINY)
    with FlopCounterMode(display=False) as counter:
        torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)(torch.randn(4, config.hidden_size))
    assert cost.lm_head_flops(config, 4) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        pytest.param(CLIPVisionModel, CLIPVisionConfig(**TINY_VISION), id="clip-cls"),
        pytest.param(SiglipVisionModel, SiglipVisionConfig(**TINY_VISION), id="siglip-pooling-head"),
        pytest.param(SiglipVisionModel, SiglipVisionConfig(**TINY_VISION, vision_use_head=False), id="siglip"),
        pytest.param(  # its `depth` is that of the projector
            hf.JanusVisionModel, hf.JanusVisionConfig(**TINY_VISION | {"mlp_ratio": 2.25, "depth": 2}), id="janus"
        ),
    ],
)
def test_encoder_is_what_torch_counts(model_class, config):
    counted = counted_flops(model_class(config), torch.randn(2, 3, config.image_size, config.image_size))
    patches = (config.image_size // config.patch_size) ** 2
    has_cls = config.model_type == "clip_vision_model"
    assert cost.encoder_flops(config, [patches] * 2, has_cls=has_cls, gated_mlp=False) == counted[""]


def test_keys_of_an_encoder_may_be_narrower():
    """Grouped-query attention, whose keys and values are half as wide."""
    config = hf.Qwen2_5_VLConfig(vision_config=dict(depth=3, hidden_size=32, num_heads=4)).vision_config
    whole = cost.encoder_flops(config, [16], has_cls=False, gated_mlp=True)
    config.num_key_value_heads = 2
    assert whole - cost.encoder_flops(config, [16], has_cls=False, gated_mlp=True) == 3 * 2 * 16 * 32 * 32


def test_an_mlp_may_run_on_fewer_tokens_than_its_attention():
    config = CLIPVisionConfig(**TINY_VISION)
    d, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    whole = cost.encoder_flops(config, [16], has_cls=True, gated_mlp=False)
    fewer = cost.encoder_flops(config, [((16, 12), *[12] * (layers - 1))], has_cls=True, gated_mlp=False)
    mlp = 2 * 4 * 2 * d * m
    attention = 2 * 4 * 4 * d * d + 4 * d * (17**2 - 13**2)
    assert whole - fewer == layers * mlp + (layers - 1) * attention


@pytest.mark.parametrize("name", [name for name in families.NAMES if families.is_available(name)])
def test_an_adapter_states_how_many_matrices_an_mlp_of_its_encoder_has(name):
    adapter = vtprune.adapter_for(families.shared(name))
    if adapter.encoder_uncounted:
        pytest.skip(f"not counted: {adapter.encoder_uncounted}")
    layer = adapter.encoder_layers()[0]
    attention = set(adapter.encoder_attention(layer).modules())
    matrices = [m for m in layer.modules() if isinstance(m, torch.nn.Linear) and m not in attention]
    assert len(matrices) == (3 if adapter.gated_encoder_mlp else 2)


@pytest.mark.parametrize("feature_layer", [-2, [-2, -1]])
def test_projector_is_what_torch_counts(feature_layer):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        text_config=LlamaConfig(**TINY),
        vision_feature_layer=feature_layer,
    )
    projector = LlavaMultiModalProjector(config)
    features = torch.randn(13, projector.linear_1.in_features)
    assert cost.projector_flops(config, 13) == counted_flops(projector, features)[""]


def test_kv_bytes():
    # 2 (keys and values) x 4 heads x 128 x 2 bytes = 2048 bytes a token and layer in Qwen2-7B
    assert cost.kv_bytes(QWEN2_7B, [100] * 28) == 28 * 100 * 2048
    assert cost.kv_bytes(QWEN2_7B, torch.tensor([100] * 18 + [50] * 10), dtype_bytes=4) == (1800 + 500) * 4096
    assert cost.kv_bytes(VICUNA_7B, [1] * 32) == 32 * 2 * 4096 * 2


# --- the papers' tables ----------------------------------------------------------------------------------------------


def teraflops(*args, **kwargs) -> float:
    return cost.llm_prefill_flops(*args, **kwargs) / 1e12


# HoliTom (arXiv 2505.21334), main table, LLaVA-OneVision-7B, 32 frames of 196 tokens:
# (method, TFLOPs, % of the full model, share kept before the LLM, (layer, share) of a cut inside the LLM).
# PDrop (10.5, 25.7 %) is not here: the table does not state the schedule that it was run with.
HOLITOM = [
    ("Vanilla", 40.8, 100.0, 1.00, None),
    ("FastV", 9.3, 22.8, 1.00, (2, 0.2)),
    ("DyCoke", 8.7, 21.3, 0.25, None),
    ("VisionZip", 8.7, 21.3, 0.25, None),
    ("PruneVid", 8.7, 21.3, 0.25, None),
    ("FastVID", 8.7, 21.3, 0.25, None),
    ("HoliTom w/o M", 8.7, 21.3, 0.25, None),
    ("HoliTom", 7.1, 17.4, 0.25, (18, 0.5)),
    ("VisionZip", 7.0, 17.2, 0.20, None),
    ("PruneVid", 7.0, 17.2, 0.20, None),
    ("FastVID", 7.0, 17.2, 0.20, None),
    ("HoliTom w/o M", 7.0, 17.2, 0.20, None),
    ("HoliTom", 5.8, 14.2, 0.20, (18, 0.5)),
    ("VisionZip", 5.2, 12.7, 0.15, None),
    ("PruneVid", 5.2, 12.7, 0.15, None),
    ("FastVID", 5.2, 12.7, 0.15, None),
    ("HoliTom w/o M", 5.2, 12.7, 0.15, None),
    ("HoliTom", 4.3, 10.5, 0.15, (18, 0.5)),
    ("VisionZip", 3.4, 8.3, 0.10, None),
    ("PruneVid", 3.4, 8.3, 0.10, None),
    ("FastVID", 3.4, 8.3, 0.10, None),
    ("HoliTom w/o M", 3.4, 8.3, 0.10, None),
    ("HoliTom", 2.8, 6.9, 0.10, (18, 0.5)),
]


@pytest.mark.parametrize(("method", "printed", "percent", "kept", "cut"), HOLITOM)
def test_visual_only_reproduces_the_column_of_holitom(method, printed, percent, kept, cut):
    full = [32 * 196] * 28
    entering = 32 * math.ceil(196 * kept)
    layer, share = cut or (28, 1.0)
    visual = [entering] * layer + [int(entering * share)] * (28 - layer)
    tflops = teraflops(QWEN2_7B, visual, 0, convention="visual_only")
    assert round(tflops, 1) == printed
    # The paper's percentages are quotients of its rounded TFLOPs (7.0 / 40.8 = 17.2 %, where 7.04 / 40.77 = 17.3 %).
    printed_full = round(teraflops(QWEN2_7B, full, 0, convention="visual_only"), 1)
    assert round(100 * round(tflops, 1) / printed_full, 1) == percent


@pytest.mark.parametrize(("tokens", "percent"), [(576, 40.8), (2880, 40.0)])
def test_visual_only_gated_reproduces_transprune(tokens, percent):
    """TransPrune (arXiv 2507.20630) on LLaVA-1.5-7B and LLaVA-1.6-7B: 87.5, 62.5, 12.5 % after layers 7, 9, 12."""
    visual = [tokens] * 7 + [int(tokens * 0.875)] * 2 + [int(tokens * 0.625)] * 3 + [int(tokens * 0.125)] * 20
    pruned = teraflops(VICUNA_7B, visual, 0, convention="visual_only_gated")
    full = teraflops(VICUNA_7B, [tokens] * 32, 0, convention="visual_only_gated")
    assert round(100 * pruned / full, 1) == percent


def aim_teraflops(config, visual: int, last_full: int, exhausted: int, text: int) -> float:
    """TFLOPs of AIM's linear schedule between two 1-based layers, cutting one layer earlier than its model code does,
    as its FLOPs tool counts them."""
    shares = [
        min(1.0, max(0.0, 1 - (layer - last_full) / (exhausted - last_full)))
        for layer in range(1, config.num_hidden_layers + 1)
    ]
    return teraflops(config, [visual * share for share in shares], text, convention="llm_viewer")


# AIM (arXiv 2412.03248): (config, visual tokens, last full layer, exhausted layer, text tokens, formula, printed).
# The formula leaves out LLM-Viewer's small operators, so the printed cells are up to 0.2 % higher.
QWEN_FULL, VICUNA_FULL = (28, 29), (32, 33)
AIM = [
    # merging alone: tokens a frame after each round
    (QWEN2_7B, 32 * 196, *QWEN_FULL, 100, 99.46, 99.63),
    (QWEN2_7B, 32 * 98, *QWEN_FULL, 100, 46.44, 46.48),
    (QWEN2_7B, 32 * 49, *QWEN_FULL, 100, 22.89, 22.90),
    (QWEN2_7B, 32 * 24, *QWEN_FULL, 100, 11.63, 11.64),
    (QWEN2_7B, 32 * 12, *QWEN_FULL, 100, 6.41, 6.41),
    (QWEN2_7B, 32 * 6, *QWEN_FULL, 100, 3.84, 3.85),
    (QWEN2_7B, 32 * 3, *QWEN_FULL, 100, 2.57, 2.57),
    # pruning schedules at 49 tokens a frame
    (QWEN2_7B, 32 * 49, 21, 29, 100, 20.14, 20.15),
    (QWEN2_7B, 32 * 49, 14, 29, 100, 17.40, 17.41),
    (QWEN2_7B, 32 * 49, 7, 29, 100, 14.66, 14.66),
    (QWEN2_7B, 32 * 49, 21, 22, 100, 17.49, 17.50),
    (QWEN2_7B, 32 * 49, 14, 22, 100, 14.75, 14.76),
    (QWEN2_7B, 32 * 49, 7, 22, 100, 12.01, 12.01),
    (QWEN2_7B, 32 * 49, 14, 15, 100, 12.10, 12.10),
    (QWEN2_7B, 32 * 49, 7, 15, 100, 9.35, 9.36),
    (QWEN2_7B, 32 * 49, 7, 8, 100, 6.70, 6.71),
    # images, LLaVA-1.5-7B
    (VICUNA_7B, 576, *VICUNA_FULL, 40, 8.18, 8.18),
    (VICUNA_7B, 252, 13, 21, 40, 2.22, 2.22),
    (VICUNA_7B, 72, 13, 21, 40, 1.00, 1.00),
]


@pytest.mark.parametrize(("config", "visual", "last_full", "exhausted", "text", "formula", "printed"), AIM)
def test_llm_viewer_reproduces_aim(config, visual, last_full, exhausted, text, formula, printed):
    tflops = aim_teraflops(config, visual, last_full, exhausted, text)
    assert round(tflops, 2) == formula
    assert tflops == pytest.approx(printed, rel=2e-3, abs=5e-3)


# Merging and pruning together "(14, 22)" at 24, 12, 6 and 3 tokens a frame: printed cells that do not follow from that
# schedule; listed so that nobody takes the difference for an error of the formula.
AIM_UNEXPLAINED = [(24, 7.75, 11.14), (12, 4.49, 6.17), (6, 2.89, 3.72), (3, 2.10, 2.51)]


@pytest.mark.parametrize(("per_frame", "formula", "printed"), AIM_UNEXPLAINED)
def test_cells_of_aim_that_do_not_follow_from_their_schedule(per_frame, formula, printed):
    tflops = aim_teraflops(QWEN2_7B, 32 * per_frame, 14, 22, 100)
    assert round(tflops, 2) == formula
    assert abs(tflops - printed) > 0.15 * printed


def test_conventions_differ_as_published():
    """HoliTom's and AIM's TFLOPs of one model and video are a factor of 2.44 apart."""
    visual = [32 * 196] * 28
    ratio = teraflops(QWEN2_7B, visual, 100, "llm_viewer") / teraflops(QWEN2_7B, visual, 100, "visual_only")
    assert round(ratio, 2) == 2.44


def test_only_conventions_without_text_ignore_it():
    visual = [64] * 28
    for convention in cost.CONVENTIONS:
        without, with_text = (teraflops(QWEN2_7B, visual, text, convention) for text in (0, 50))
        assert (with_text == without) == convention.startswith("visual_only"), convention


# --- what is refused -----------------------------------------------------------------------------------------------


def test_unknown_convention_names_the_known_ones():
    with pytest.raises(ConfigError, match="'flops'.*exact, visual_only, visual_only_gated, llm_viewer"):
        cost.llm_prefill_flops(QWEN2_7B, [1] * 28, 1, convention="flops")


@pytest.mark.parametrize("counts", [[576] * 27, [], [576] * 29])
def test_one_count_for_each_layer(counts):
    with pytest.raises(ConfigError, match=f"{len(counts)} counts.*28 layers"):
        cost.llm_prefill_flops(QWEN2_7B, counts, 1)
    with pytest.raises(ConfigError, match=f"{len(counts)} counts.*28 layers"):
        cost.kv_bytes(QWEN2_7B, counts)


def test_negative_counts_are_refused():
    with pytest.raises(ConfigError, match="visual_tokens"):
        cost.llm_prefill_flops(QWEN2_7B, [1] * 27 + [-1], 1)
    with pytest.raises(ConfigError, match="text_tokens"):
        cost.llm_prefill_flops(QWEN2_7B, [1] * 28, -1)


def test_layers_of_another_state_are_counted_as_attention():
    config = hf.LlamaConfig(num_hidden_layers=4)
    counts = [3, 5, 7, 9]
    expected = cost.llm_prefill_flops(config, counts, 11), cost.kv_bytes(config, counts)
    config.layer_types = ["linear_attention", "full_attention"] * 2
    assert (cost.llm_prefill_flops(config, counts, 11), cost.kv_bytes(config, counts)) == expected


def test_a_config_that_changes_is_read_again():
    config = hf.LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    before = cost.llm_prefill_flops(config, [3, 1], 4)
    assert cost.llm_prefill_flops(config, [3, 1], 4) == before
    config.intermediate_size = 32
    assert cost.llm_prefill_flops(config, [3, 1], 4) == before + 3 * 2 * 8 * 16 * ((3 + 4) + (1 + 4))
    config.layer_types = ["full_attention", "full_attention"]
    config.num_hidden_layers = 1
    assert cost.llm_prefill_flops(config, [3], 4) < before
