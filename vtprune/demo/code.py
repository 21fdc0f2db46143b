# SPDX-License-Identifier: Apache-2.0
"""An answer as Python and as YAML that give it again."""

from __future__ import annotations

import yaml

from vtprune.demo.comparison import Answer, Comparison, Outcome
from vtprune.demo.exactly import Exactly


def as_python(comparison: Comparison, outcome: Outcome, answer: Answer) -> str:
    """A script that prints the answer and the report; an uploaded file must lie beside it."""
    shown, spec, source = outcome.prompt.shown, answer.spec, comparison.source
    imports = {
        *shown.imports,
        "from vtprune.eval.inputs import answers, chat_inputs, load_model",
        *(["import vtprune"] if spec is not None else []),
        *(["from vtprune.demo.exactly import Exactly"] if isinstance(spec, Exactly) else []),
    }
    run = f"(answer,), _ = answers(model, processor, inputs, max_new_tokens={comparison.max_new_tokens})"
    lines = [
        *sorted(imports, key=lambda line: ("vtprune" in line, line.startswith("from"), line)),
        "",
        f"model, processor = load_model({source.model!r}, dtype={source.dtype!r}, device={source.device!r})",
        f"inputs = chat_inputs(processor, [{shown.code}], [{outcome.setting.question!r}], {shown.kind!r})",
    ]
    if spec is None:
        lines += [run, "print(answer)"]
    else:
        method = f"Exactly(tokens={spec.tokens}, of={spec.of})" if isinstance(spec, Exactly) else repr(spec)
        lines += [
            f"with vtprune.prune(model, {method}, strict=False) as session:",
            f"    {run}",
            "print(answer)",
            "print(session.report)",
        ]
    return "\n".join(lines) + "\n"


def as_yaml(answer: Answer) -> str:
    """A file that `vtprune.prune` and `vtprune run --method` take."""
    if answer.spec is None:
        return "# nothing is pruned\n"
    if isinstance(answer.spec, Exactly):
        return "# tokens that a person chose belong to one prompt: see the Python\n"
    return yaml.safe_dump(answer.spec, sort_keys=False)
