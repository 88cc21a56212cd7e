"""The tests' own instrument: otherwise those of the kernels show less than they say."""

import pytest
import torch
from guarded_memory import GuardedMemory


def test_sees_what_a_kernel_may_do_wrong():
    with GuardedMemory() as memory:
        like = torch.ones(3, 4)
        fresh = [torch.empty(3, 4), like.new_empty(3, 4), torch.empty_like(like)]
        assert all(tensor.isnan().all() for tensor in fresh)
        assert (torch.empty(2, dtype=torch.int32) < 0).all()
        memory.check()
        for place in (-1, 12):
            stray = fresh[0].as_strided((1,), (1,), fresh[0].storage_offset() + place)
            assert stray.isnan()
            stray.zero_()
            with pytest.raises(AssertionError, match="written outside"):
                memory.check()
            stray.fill_(torch.nan)
