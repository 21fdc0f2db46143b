# SPDX-License-Identifier: Apache-2.0
"""Measures a server of vLLM under load, with and without pruning, by vLLM's own benchmark client.

    python scripts/bench_serving.py [--method mmtok] [--keep-ratio 0.25] [--clients 1,4,16] [--requests 24]
    python scripts/bench_serving.py --model CHECKPOINT -- --max-model-len 4096     # options of the server behind --

One server answers both kinds of requests, which say what they want: so the two take turns, run by run, with the same
texts and images (`random-mm`, an image a request). The table holds medians of all rounds. Without `--model` it is a
LLaVA without weights of its own, 576 visual tokens, whose encoder has a tenth of the parameters of its language model.
Needs vLLM; reaches nothing but the loopback address.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

IMAGE_SIZE = 336
BLOCK = 32
OF_OURS = ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
OF_OURS += ["--max-model-len", "1024", "--max-num-seqs", "16", "--num-gpu-blocks-override", "161"]
"""How a server of the model without weights is started. Its cache holds eight requests that are not pruned."""
INTERVAL = 0.1
"""Seconds between two looks at the cache."""
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Run:
    """What one run of the client found."""

    requests_per_second: float
    first_token: float
    """Milliseconds until the first token, median."""
    prompt: float
    """Tokens of a prompt, mean."""
    blocks: int
    """Most blocks of the KV cache in use at a time."""
    blocks_each: float
    """Blocks that a running request holds, median over time."""
    cpu: float
    """Seconds of CPU time of the server's processes, a request."""


def write_model(folder: Path) -> Path:
    """A config and a processor of a LLaVA without weights. Returns the folder."""
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [*special, *(f"w{number}" for number in range(1000))]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": word for name, word in zip(("pad", "bos", "eos", "unk"), special, strict=False)},
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    text = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
    vision = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
    hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=IMAGE_SIZE, patch_size=14),
        text_config=hf.LlamaConfig(**text, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_index=special.index("<image>"),
        architectures=["LlavaForConditionalGeneration"],
    ).save_pretrained(folder)
    return folder


def formula(prompt: float, answer: int, block: int) -> tuple[int, int]:
    """Blocks of a request when its prompt is in the cache, and when its answer is."""
    # The last token of an answer is given back, and its keys and values are never made.
    return math.ceil(prompt / block), math.ceil((prompt + answer - 1) / block)


class Watch:
    """Looks at a server's cache while a block runs."""

    def __init__(self, server: Any):
        self.server, self.seen = server, list[tuple[float, float]]()
        """Share of the blocks in use, and requests that run."""
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._before = self.server.metrics(), self._cpu()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        after = self.server.metrics()
        self.cpu = self._cpu() - self._before[1]
        self.grown = {name: value - self._before[0].get(name, 0) for name, value in after.items()}

    def total(self, name: str) -> float:
        """How much a counter grew, over all labels."""
        return sum(value for key, value in self.grown.items() if key.split("{")[0] == name)

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.server.processes())

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running")
            used, running = (self.server.metric(name) for name in names)
            if running:
                self.seen.append((used, running))


def run(server: Any, model: str, extra: dict[str, Any], arguments: Sequence[str]) -> Run:
    """One run of vLLM's client. extra: fields of each request. Raises RuntimeError if a request fails."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    parsed = parser.parse_args(
        ["--base-url", server.address, "--model", model, "--extra-body", json.dumps(extra), *arguments]
    )
    said = io.StringIO()
    with Watch(server) as watch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = serve.main(parsed)
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed: {said.getvalue()[-2000:]}")
    size, _ = server.cache()
    count = found["completed"]
    return Run(
        found["request_throughput"],
        found["median_ttft_ms"],
        watch.total("vllm:prompt_tokens_total") / count,
        round(max(used for used, _ in watch.seen) * size),
        statistics.median(used * size / running for used, running in watch.seen),
        watch.cpu / count,
    )


def client(clients: int, requests: int, seed: int, image: str, text: int, answer: int) -> list[str]:
    """Arguments of vLLM's client."""
    width, height = map(int, image.split("x"))
    counts = ["--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"]
    sizes = ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    sizes += ["--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}"]
    lengths = ["--random-input-len", str(text), "--random-output-len", str(answer), "--ignore-eos"]
    asked = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--dataset-name", "random-mm"]
    load = ["--max-concurrency", str(clients), "--num-prompts", str(requests), "--seed", str(seed)]
    return [*asked, *counts, *sizes, *lengths, *load, "--disable-tqdm", "--ready-check-timeout-sec", "0"]


@contextlib.contextmanager
def started(model: str | None, options: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """A server, and the name or folder of its model."""
    from vtprune.testing.vllm_server import serving

    with tempfile.TemporaryDirectory() as folder:
        path = model or str(write_model(Path(folder, "model")))
        own = [*([] if model else OF_OURS), "--trust-request-mm-kwargs", *options]
        with serving(path, own, Path(folder, "log")) as server:
            yield server, path


def table(rows: Iterable[tuple[int, str, Run]], answer: int, block: int) -> str:
    """As Markdown. rows: clients, what is measured, and the medians."""
    names = (
        "clients",
        "tokens",
        "prompt",
        "requests/s",
        "TTFT ms",
        "most blocks",
        "a request",
        "formula",
        "CPU s each",
    )
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for clients, name, found in rows:
        low, high = formula(found.prompt, answer, block)
        blocks = (str(found.blocks), f"{found.blocks_each:.1f}", f"{low}" if low == high else f"{low} to {high}")
        speed = (f"{found.prompt:.0f}", f"{found.requests_per_second:.2f}", f"{found.first_token:.0f}")
        lines.append(f"| {' | '.join((str(clients), name, *speed, *blocks, f'{found.cpu:.2f}'))} |")
    return "\n".join(lines)


def median(runs: Sequence[Run]) -> Run:
    """Of each number by itself."""
    values = {name: statistics.median(getattr(found, name) for found in runs) for name in Run.__dataclass_fields__}
    return Run(**values)


def main(
    options: Annotated[list[str] | None, typer.Argument(help="Options of the server, behind `--`.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint; default a LLaVA without weights.")] = None,
    method: Annotated[str, typer.Option()] = "mmtok",
    keep_ratio: Annotated[float, typer.Option()] = 0.25,
    clients: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,16",
    requests: Annotated[int, typer.Option(min=1, help="In a run; with one client, a quarter of them.")] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    image: Annotated[str, typer.Option(help="Width and height of an image.")] = f"{IMAGE_SIZE}x{IMAGE_SIZE}",
    text: Annotated[int, typer.Option(min=1, help="Tokens of the text of a prompt.")] = 32,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    output: Annotated[Path | None, typer.Option(help="File for all runs as JSON.")] = None,
) -> None:
    """Prints the table."""
    kinds = {"all": None, f"{method} {keep_ratio}": {"name": method, "keep_ratio": keep_ratio}}
    loads = [int(load) for load in clients.split(",")]
    runs: dict[tuple[int, str], list[Run]] = {(load, name): [] for load in loads for name in kinds}
    with started(model, options or []) as (server, path):
        _, block = server.cache()
        for number in range(rounds + 1):  # the first one warms up
            for load in loads:
                count = max(load, requests if load > 1 else requests // 4)
                # Other images and texts each time: caches hold none of them.
                arguments = client(load, count if number else 1, 1000 * number + load, image, text, answer)
                for name, setting in kinds.items():
                    found = run(server, path, {"mm_processor_kwargs": {"vtprune": setting}}, arguments)
                    if number:
                        runs[load, name].append(found)
    rows = [(load, name, median(found)) for (load, name), found in runs.items()]
    typer.echo(table(rows, answer, block))
    if output is not None:
        kept = [{"clients": load, "tokens": name} | vars(one) for (load, name), found in runs.items() for one in found]
        output.write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    typer.run(main)
