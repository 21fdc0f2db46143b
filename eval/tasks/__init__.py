# SPDX-License-Identifier: Apache-2.0
"""Tasks: examples with images or a video, a question and an answer, and the function that scores a prediction.

A vision-language model answers the questions of a `Task`. A CLIP names the class of each image of a `Classification`.
`open_task` opens an entry of an evaluation file: the name of a task, or a `FileTask`, which says where own data are.
"""

from vtprune.eval.tasks.base import (
    AnyTask,
    Classification,
    Conversation,
    Example,
    ImageExample,
    Kind,
    Task,
    VideoExample,
    kinds_of,
    shown,
    user_turn,
)
from vtprune.eval.tasks.builtin import TASKS
from vtprune.eval.tasks.file_task import FileTask
from vtprune.eval.tasks.opening import GROUP, check_task_name, name_of, open_task, open_tasks, task_names

__all__ = [
    "GROUP",
    "TASKS",
    "AnyTask",
    "Classification",
    "Conversation",
    "Example",
    "FileTask",
    "ImageExample",
    "Kind",
    "Task",
    "VideoExample",
    "check_task_name",
    "kinds_of",
    "name_of",
    "open_task",
    "open_tasks",
    "shown",
    "task_names",
    "user_turn",
]
