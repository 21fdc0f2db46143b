# SPDX-License-Identifier: Apache-2.0
"""What the tables of `summary.md` show, in the words that stand above them."""

ON_ACCURACY = """\
Per cent of the answers that are right, with a 95 % bootstrap interval. Rows with several seeds show their
mean, ± their standard deviation, and the mean interval of one seed. """

ON_METRIC = """\
The metric of lmms-eval, {scored}, over the documents of the row, with a 95 % bootstrap interval over documents. A row
without an interval has a metric that cannot be computed on drawn documents. Rows with several seeds show their mean,
± their standard deviation, and the mean interval of one seed. """

ON_BASELINES = """\
`full` and `zero` have no budget and
stand in the first column: all visual tokens, and none (what the question alone gives away). So do rows whose budget
is a count of tokens or their own schedule."""

ON_FULL = """\
`full` has no budget and stands in the
first column. So do rows whose budget is a count of patches or their own schedule."""

ON_RETENTION = """\
Accuracy over that of the full model in per cent. The interval is a paired bootstrap over examples: both
models see the same drawn examples, so what makes all of them easy or hard cancels."""

OF_DOCUMENTS = """\
Of the scores of single documents, times 100, and not of the metric. """

ON_GAIN = """\
Accuracy less that of `downsample`, a smaller image (of a video, fewer frames) with as many measured tokens, in points.
Where the counts of both are within 2 %, the difference is paired question by question, with its 95 % bootstrap
interval. Between two smaller images that were measured, their accuracy is interpolated by tokens; these gains stand
behind ≈ and have no interval. Outside the range of the smaller images there is no gain."""

ON_HARD = """\
Accuracy in per cent on the questions that the full model gets right and the smaller image with the nearest number of
measured tokens gets wrong (the split of VTC-Bench, arXiv 2510.07143); in brackets how many these are. An answer is
right if its score is at least 0.5. By definition `full` gets all of them right and `downsample` all of them wrong, so
both are left out."""

ON_LOYALTY = """\
Share of the answers that are, word for word, the full model's, in per cent: right or wrong."""

ON_PER_CORRECT = """\
Tokens averaged over all layers, of all examples together, divided by the number of examples that are right. Less is
better."""

ON_TOKENS = """\
Visual tokens that enter the last decoder layer, averaged over examples; in brackets the visual tokens
averaged over all layers as a share of the unpruned model's. The columns are the budget *asked for*. A method
that prunes inside the language model keeps everything up to its first pruning layer: a budget it cannot meet
is shown as under its floor, with the floor in brackets. `downsample` can only make grids of whole patches, and of a
video whole frames."""

ON_COST = """\
FLOPs of the language model's prefill of one example, from the measured tokens of every layer, and their share
of the unpruned model's. Convention `exact` of `vtprune.cost`: two FLOPs per multiply-add, text included,
image encoder and selection not included (`downsample` makes the encoder cheaper as well, no method before the
LLM does). FLOPs are not seconds."""

ON_PATCHES = """\
Patches that are left behind the last layer of the encoder; in brackets the patches left behind a layer, averaged over
all layers, as a share of the unpruned model's. The columns are the budget *asked for*: the share of the patches left
behind the last layer."""

ON_ENCODER_COST = """\
FLOPs of the vision encoder for one image, from the measured tokens of every layer, and their share of the unpruned
model's: two FLOPs per multiply-add; the features of the classes, which are computed once, and what a method itself
computes are not included. FLOPs are not seconds."""

ON_LATENCY = """\
Milliseconds of one example at the batch size of this run: until the first token (encoder, selection and prefill) /
until the last one. Measured in this run, the median over the batches, mean over seeds, without what the processor does.
All rows, `full` too, run in a session. On a machine that was busy the numbers are larger, and not equally for all
rows."""

ON_SPEED = """\
Images in a second, and in brackets how many times those of `full`: measured in this run, the median over the batches,
mean over seeds. The time is that of the classifier on preprocessed pixels, with all that the method computes. All rows,
`full` too, run in a session. On a machine that was busy the numbers are smaller, and not equally for all rows."""

ON_ALL_TASKS = """\
Accuracy in per cent on every task. FLOPs and images in a second are those of one image, means over the tasks; in
brackets, times those of `full`."""

ON_PUBLISHED = """\
Ours beside what a paper prints for the setting. Its number is of its own benchmarks and model, so the difference says
something only where these are the same."""

ON_FAMILIES = "Per cent right of each {kind}, mean over seeds; rows without a budget are repeated for comparison."
