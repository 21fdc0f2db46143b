# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.stages.encoder_call import EncoderCall

from .hand_made import encoding, row_of


def test_features_of_all_media_stand_one_after_another():
    separate = EncoderCall("image", {}, pooled=(torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 4], [5, 6]])))
    assert separate.features.tolist() == [[1, 2], [3, 4], [5, 6]]
    together = EncoderCall("image", {}, pooled=torch.arange(12.0).view(2, 3, 2))
    assert together.features.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    by_frame = EncoderCall("video", {}, pooled=(torch.arange(4.0).view(2, 1, 2), torch.arange(4.0, 6).view(1, 1, 2)))
    assert by_frame.features.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_tokens_are_those_of_all_media():
    assert encoding(row_of(3), row_of(2)).tokens == 5
    assert EncoderCall("image", {}).tokens == 0
