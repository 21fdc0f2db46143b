# SPDX-License-Identifier: Apache-2.0
"""The page: what a person sets, and a column for each answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo.code import as_python, as_yaml
from vtprune.demo.comparison import BY_HAND, Answer, Comparison, Outcome, Refused
from vtprune.demo.setting import LONGEST_QUESTION, MOST_METHODS, Setting
from vtprune.errors import VTPruneError

_COLUMNS = MOST_METHODS + 2
"""The full answer, the methods, and what a person chose."""
_HEADERS = ["", "tokens", "average", "GFLOPs", "KV MB", "ms"]
_LEGEND = (
    "Visual tokens in the last layer, and averaged over the layers; FLOPs of the language model's prefill; KV cache of "
    "the prompt; milliseconds until the first token, measured once."
)
_QUESTION = "How many digits are there?"
_EXPIRES = 3600
"""Seconds after which the server forgets what an idle page shows."""
_STYLE = ".vtprune-picture img { cursor: pointer }"
LOOK: dict[str, Any] = {
    # Fonts of the machine: others would come from the network.
    "theme": gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": _STYLE,
}
"""Arguments of `launch`."""


class _Column:
    """The components of one answer."""

    def __init__(self, number: int):
        with gr.Column(min_width=240, visible=False) as self.frame:
            self.title = gr.Markdown()
            # Nothing may lie on the picture: what is under it could not be clicked.
            self.picture = gr.Image(
                type="pil",
                format="png",
                interactive=False,
                show_label=False,
                buttons=[],
                elem_classes=["vtprune-picture"],
                elem_id=f"vtprune-picture-{number}",
            )
            self.text = gr.Textbox(label="answer", interactive=False, lines=2, elem_id=f"vtprune-answer-{number}")
            with gr.Accordion("Python and YAML", open=False):
                self.python = gr.Code(language="python", interactive=False, label="Python")
                self.yaml = gr.Code(language="yaml", interactive=False, label="YAML")
        self.components = [self.frame, self.title, self.picture, self.text, self.python, self.yaml]


def _column_values(comparison: Comparison, outcome: Outcome, answer: Answer | Refused | None) -> list[Any]:
    """Values for `_Column.components`."""
    if answer is None:
        return [gr.update(visible=False), "", None, "", "", ""]
    sheet, visible, title = outcome.prompt.sheet, gr.update(visible=True), f"**{_title(answer)}**"
    if isinstance(answer, Refused):
        return [visible, title, None, f"refused: {answer.why}", "", ""]
    drawn = None if sheet is None else sheet.draw(answer.kept)
    text = "\n".join([answer.text, *(f"note: {note}" for note in answer.notes)])
    return [visible, title, drawn, text, as_python(comparison, outcome, answer), as_yaml(answer)]


def _title(answer: Answer | Refused) -> str:
    """The name of an answer; for "auto" with the method behind it."""
    spec = answer.spec if isinstance(answer, Answer) else None
    chosen = spec["name"] if isinstance(spec, dict) else answer.name
    return answer.name if chosen == answer.name else f"{answer.name}: {chosen}"


def _rows(outcome: Outcome) -> list[list[str]]:
    """The numbers of the answers, under `_HEADERS`."""
    rows = []
    for answer in outcome.answers:
        if isinstance(answer, Answer):
            n = answer.numbers
            flops, kv = f"{n.prefill_flops / 1e9:.4g}", f"{n.kv_bytes / 1e6:.4g}"
            rows.append([_title(answer), str(n.tokens), f"{n.average:.1f}", flops, kv, f"{n.seconds * 1e3:.1f}"])
    return rows


def _in_columns(outcome: Outcome) -> list[int | None]:
    """For each column the answer's place in the outcome; the last column is for what a person chose."""
    places: list[int | None] = [i for i, answer in enumerate(outcome.answers) if answer.name != BY_HAND]
    by_hand = next((i for i, answer in enumerate(outcome.answers) if answer.name == BY_HAND), None)
    return [*places, *[None] * (_COLUMNS - 1 - len(places)), by_hand]


def build_page(comparison: Comparison) -> gr.Blocks:
    """The page of one model."""
    kinds = " or a clip" if "video" in comparison.kinds else ""
    media = [kind for kind in ("image", "video") if kind in comparison.kinds]
    with gr.Blocks(title="vtprune demo", fill_width=True, analytics_enabled=False) as page:
        outcome = gr.State(None, time_to_live=_EXPIRES)
        gr.Markdown("# vtprune\nWhat is left of a picture, and what the model answers then.")
        with gr.Row():
            with gr.Column(min_width=280):
                example = gr.Number(
                    0, label="number of a built-in example", precision=0, minimum=0, info="empty: what you upload"
                )
                upload = gr.File(label=f"an image{kinds} of yours", file_types=media, height=120)
            with gr.Column(min_width=280):
                question = gr.Textbox(_QUESTION, label="question", max_length=LONGEST_QUESTION)
                methods = gr.Dropdown(
                    comparison.methods(),
                    value=["auto"],
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    label=f"methods, at most {MOST_METHODS}",
                )
                ratio = gr.Slider(0.02, 1, 0.25, step=0.01, label="share of the visual tokens to keep")
                run = gr.Button("Answer", variant="primary", elem_id="vtprune-run")
        message = gr.Textbox(label="this cannot be done", visible=False, interactive=False, elem_id="vtprune-message")
        with gr.Row():
            columns = [_Column(number) for number in range(_COLUMNS)]
        gr.Markdown("Dark tokens are gone. Click on one, in any picture, to take it away or bring it back.")
        gr.Markdown(_LEGEND)
        numbers = gr.Dataframe(headers=_HEADERS, interactive=False, label="cost", elem_id="vtprune-cost")
        link = gr.Textbox(
            label="link to this setting", info="what you uploaded is not in it", interactive=False, buttons=["copy"]
        )
        chosen = gr.State(None)  # tokens of a link that waits for its upload

        shown = [outcome, message, numbers, link, *(c for column in columns for c in column.components)]

        def show(make: Callable[[], Outcome], address: str) -> list[Any]:
            """Values for `shown`; what the library refuses is a message, and all else stays."""
            try:
                found = make()
            except VTPruneError as error:
                return _complaint(str(error), len(shown))
            places = _in_columns(found)
            values = [
                value
                for place in places
                for value in _column_values(comparison, found, None if place is None else found.answers[place])
            ]
            target = f"{address}?{found.setting.query()}"
            return [found, gr.update(value="", visible=False), _rows(found), target, *values]

        def answer(
            file: str | None,
            number: float | None,
            text: str,
            names: list[str],
            share: float,
            tokens: tuple[int, ...] | None,
            request: gr.Request,
        ) -> list[Any]:
            def make() -> Outcome:
                place = None if number is None else int(number)
                setting = Setting(text, tuple(names), share, chosen=tokens, example=place)
                return comparison.compare(setting, None if file is None else Path(file))

            return [*show(make, _address(request)), None]

        def click(number: int) -> Callable[..., list[Any]]:
            def clicked(found: Outcome | None, event: gr.SelectData, request: gr.Request) -> list[Any]:
                place = None if found is None else _in_columns(found)[number]
                if found is None or place is None:
                    return [gr.skip()] * len(shown)
                return show(lambda: comparison.toggle(found, place, *event.index), _address(request))

            return clicked

        def restore(request: gr.Request) -> list[Any]:
            """What a link says, and its answers, if they need no upload."""
            query = str(request.query_params)
            nothing = [gr.skip()] * (len(inputs) - 1)
            if not query:
                return [*nothing, *[gr.skip()] * len(shown)]
            try:
                setting = Setting.of_query(query)
            except VTPruneError as error:
                return [*nothing, *_complaint(str(error), len(shown))]
            values = [setting.example, setting.question, list(setting.methods), setting.keep_ratio]
            if setting.example is None:
                wanted = _complaint("this link is about an upload: upload it, then press Answer", len(shown))
                return [*values, setting.chosen, *wanted]
            return [*values, None, *show(lambda: comparison.compare(setting), _address(request))]

        inputs = [upload, example, question, methods, ratio, chosen]
        run.click(answer, inputs, [*shown, chosen], api_name="answer", concurrency_id="model")
        for number, column in enumerate(columns):
            column.picture.select(
                click(number), outcome, shown, api_visibility="private", concurrency_id="model", trigger_mode="once"
            )
        upload.upload(lambda: None, None, example, api_visibility="private")
        page.load(restore, None, [*inputs[1:], *shown], api_visibility="private", concurrency_id="model")
    return page


def _complaint(why: str, length: int) -> list[Any]:
    """Values for the state, the message and the others, `length` in all: only the message changes."""
    return [gr.skip(), gr.update(value=why, visible=True), *[gr.skip()] * (length - 2)]


def _address(request: gr.Request) -> str:
    """Where the browser found the page."""
    return f"{request.request.url.scheme}://{request.headers['host']}/"
