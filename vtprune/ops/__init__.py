# SPDX-License-Identifier: Apache-2.0
"""Operations: pure tensor functions, which know nothing of models. One operation a module.

Scores
    cls_attention: attention of the CLS token, summed over layers. VTC-CLS, MustDrop.
    attention: attention rows, and the attention that each token receives. Signals of the encoder and of the LLM; LTP.
    page_rank: PageRank over attention. AIM, Zero-TPrune.
    similarity: similarity of each token to one vector. GLSim, Recoverable Compression.
    token_transition: how much a decoder layer changes each token. TransPrune.
    text_raters: the text tokens that resemble the image most. SparseVLM.
    frame_uniqueness: how common a token is in its video and in its frame. VidCom2.
    outliers: local outlier factors and Tukey's fences. Recoverable Compression, Token correlation.

Choices
    selection: the best tokens of each group. All methods that give scores.
    coverage: greedy maximum coverage. MMTok, SCOPE.
    computed_covers: the table that coverage is chosen from, a few rows at a time. MMTok.
    diversity: greedy max-min diversity. DivPrune, FlashVID.
    token_pairs: cosines of all pairs of tokens. DivPrune, CDPruner, VisPruner, SCOPE, MMR, PruneSID, FlashVID.
    marginal_relevance: tokens that matter, and are unlike those chosen before. MMR.
    run_budgets: a budget spread over runs of tokens. HoloV.
    principal_groups: tokens grouped by principal components, without likes in a group. PruneSID.
    determinantal: greedy choice under a determinantal point process. CDPruner.
    duplicate_removal: the important tokens, and the least duplicated ones of the rest. VisPruner.
    pivot_tokens: the tokens least similar to pivot tokens. DART.
    redundancy: similarity to later tokens, and information density. TextMonkey, Token correlation.
    attention_threshold: tokens whose attention reaches a threshold. LTP.
    dual_attention: tokens that the text as a whole or one text token attends to. MustDrop.
    random_block: one rectangle of a grid. Block.
    seeded_random: uniform random numbers from a seed. Random, Random patches, Token correlation, Block.

Merges
    merging: the result of a merge. B-VLLM, AIM, MustDrop, Recoverable Compression, pooling.
    bipartite_merging: iterative bipartite merging. AIM, B-VLLM.
    window_merging: windows of the grid with similar tokens become one token each. MustDrop.
    contextual_merging: the tokens that are not dominant become contextual tokens. VisionZip.
    density_peaks: clusters around density peaks. HoliTom, FastVID, VisionZip, SparseVLM.
    outlier_merging: each kept token gathers those with similar keys, and one token the rest. PruMerge, PruMerge+.
    token_recycling: clusters of dropped tokens. SparseVLM.
    inner_llm_merging: each dropped token goes into the most similar kept token. HoliTom.
    recoverable_compression: tokens kept by two scores, and the rest merged. Recoverable Compression.
    pooling: averages over cells of the grid. Pool, Adaptive pooling, Progressive pooling.

Reductions between encoder layers
    token_reduction: the row that each token goes into, and its weight there. ToMe, MCTF, Zero-TPrune, TCA.
    soft_matching: the most similar pairs of an even and an odd token merge. ToMe.
    multi_criteria_fusion: similar, uninformative and small tokens merge. MCTF.
    weighted_page_rank: drops tokens that are unimportant or like important ones. Zero-TPrune.
    condensation: the best tokens stay, others become a few means and one sum. TCA.
    reservoir: what a stream of images leaves behind for the next ones. TCA.

Videos
    video_merging: merges a video over time and space. HoliTom.
    segmentation: cuts a video into segments with many still positions. HoliTom.
    scene_cuts: cuts a video into scenes. FastVID, FlashVID.
    temporal_change: tokens that change from frame to frame, and frames compared in fours. DTD, DyCoke.
    time_trees: trees over time of tokens that stay alike, and clusters of their roots. FlashVID.
    anchor_merging: salient tokens of each frame, and anchors of each scene. FastVID.
    frame_merging: merges similar frames. B-VLLM.
    frame_pooling: means of frames. FastVID, VidCom2.

Counts and text
    largest_remainder: divides a number of tokens among groups. Methods that divide a budget among crops or frames.
    keywords: the words of a question without stop words. MMTok.
"""
