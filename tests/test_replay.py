from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_quarot.replay import Replay


def test_batches_of_a_generator_can_be_read_again(tmp_path: Path) -> None:
    def give():
        for i in range(3):
            yield {"x": np.full((2, i), i, np.float32), "cache": np.zeros((1, 0), ml_dtypes.bfloat16)}

    replay = Replay(give(), tmp_path)
    assert len(replay) == 3
    for _ in range(2):
        assert [batch["x"].shape for batch in replay] == [(2, 0), (2, 1), (2, 2)]
    assert replay[-1]["x"][0, 0] == 2
    assert replay[0]["cache"].dtype == ml_dtypes.bfloat16
    assert [b["x"].shape[1] for b in replay[1:]] == [1, 2]
    with pytest.raises(IndexError):
        replay[3]


def test_no_batch(tmp_path: Path) -> None:
    assert len(Replay(iter(()), tmp_path)) == 0
