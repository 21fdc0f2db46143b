# SPDX-License-Identifier: Apache-2.0
"""Pictures inside a page: each is in the page once, as a data URI, and can be drawn several times."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from vtprune.errors import VTPruneError
from vtprune.eval.pages.kept import dropped_boxes
from vtprune.eval.pages.views import View, level, strip
from vtprune.eval.results.finished import Comparison
from vtprune.eval.tasks import AnyTask, Example, open_task, shown

_THUMBNAIL = {"image": 160, "video": 80}
"""Height in pixels of a small picture, or of each of the frames that stand for a video."""
_FRAMES = 4


class Picture:
    """One picture of an album."""

    def __init__(self, name: str, width: int, height: int):
        self.name, self.width, self.height = name, width, height

    def draw(self, title: str, over: Markup | str = "") -> Markup:
        """SVG of the picture. `title` describes it for readers who cannot see it; `over` is drawn on it."""
        shape = " wide" if self.width > 1.5 * self.height else ""
        return Markup(
            '<svg class="picture{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">'
            '<use href="#{}"/>{}</svg>'
        ).format(shape, self.width, self.height, self.width, self.height, title, self.name, over)


class Album:
    """The pictures of a page."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._definitions: list[Markup] = []

    def add(self, jpeg: bytes) -> Picture:
        """A picture that can be drawn; the same bytes give the same picture."""
        width, height = Image.open(io.BytesIO(jpeg)).size
        if jpeg not in self._names:
            self._names[jpeg] = name = f"picture-{len(self._names)}"
            uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
            image = Markup('<image id="{}" width="{}" height="{}" href="{}"/>').format(name, width, height, uri)
            self._definitions.append(image)
        return Picture(self._names[jpeg], width, height)

    @property
    def definitions(self) -> Markup:
        """The SVG that the page must contain before it draws pictures."""
        return Markup('<svg width="0" height="0" class="album"><defs>{}</defs></svg>').format(
            Markup("").join(self._definitions)
        )


def seams(view: View, picture: Picture) -> Markup:
    """Lines between the frames of a video, or the crops of an image."""
    lines = "".join(f"M{left} 0v{picture.height}" for left in accumulate(view.widths[:-1]))
    return Markup('<path class="seams" d="{}"/>').format(lines) if lines else Markup("")


def dimmed(view: View, kept: Iterable[int], picture: Picture) -> Markup:
    """A path over the places of the visual tokens that were dropped."""
    strokes = (
        f"M{left:.5g} {top:.5g}h{width:.5g}v{height:.5g}h{-width:.5g}z"
        for left, top, width, height in dropped_boxes(view, kept, picture.height)
    )
    return Markup('<path class="dropped" d="{}"/>').format("".join(strokes))


class Thumbnails:
    """Small pictures of a task's examples, as the data set has them.

    Args:
        comparison: the questions that the examples belong to.
        album: gets the pictures.
        last: index of the last example that may be asked for.
    """

    def __init__(self, comparison: Comparison, album: Album, last: int):
        self.missing: str | None = None
        """Why there are none, or not of all examples."""
        self._album = album
        self._made: dict[int, Picture | None] = {}
        self._examples: Sequence[Example] = ()
        self._comparison = comparison
        try:
            ran = comparison.full["config"]
            self._task: AnyTask = open_task(ran["task"], ran.get("include_path", ()))
            self._examples = self._task.examples(last + 1)
        except (OSError, ImportError, VTPruneError) as error:  # a data set that is not on this machine
            self.missing = f"the examples of {comparison.task} cannot be loaded here ({error})"
            return
        asked = [a.question for a in comparison.asked[: last + 1]]
        if [example.question for example in self._examples] != asked:
            self._examples, self.missing = (), self._changed

    def __getitem__(self, index: int) -> Picture | None:
        """The picture of an example, or None where there is none."""
        if not self._examples:
            return None
        if index not in self._made:
            try:
                self._made[index] = self._draw(index)
            except (OSError, ValueError, VTPruneError):  # the file is gone or damaged: the page has no picture of it
                self._made[index] = None
        return self._made[index]

    @property
    def _changed(self) -> str:
        return f"the examples of {self._comparison.task} are others than when it ran"

    def _draw(self, index: int) -> Picture | None:
        example, data = self._examples[index], self._comparison.asked[index].data
        if data is not None and (self._task.digest is None or self._task.digest(example) != data):
            self.missing = self._changed
            return None
        kind = self._task.kind
        media = shown(example.conversation(), kind)
        pictures = [frame for path in media for frame in _frames(Path(path))] if kind == "video" else media
        return self._album.add(strip(level([picture.convert("RGB") for picture in pictures], 0, _THUMBNAIL[kind])))


def _frames(path: Path) -> list[Image.Image]:
    """A few frames at even distances in a video."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [frames[round(i * (len(frames) - 1) / (_FRAMES - 1))] for i in range(_FRAMES)]
