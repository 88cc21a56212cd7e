"""`esft.weight_source`, against `from_pretrained`."""

from __future__ import annotations

import pytest
import torch

from esft.loading import auto_class, load_config
from esft.weight_source import WeightSource
from tests.models_of_ours.tiny_models import NAMES as OURS
from tests.models_of_ours.tiny_models import tiny as tiny_of_ours
from tests.test_families import COVERED, model_of


def saved(folder, family):
    model = tiny_of_ours(family) if family in OURS else model_of(family)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def plain(folder, dtype="auto"):
    config = load_config(folder)
    return auto_class(config).from_pretrained(folder, dtype=dtype).eval()


def check_same(found, expected):
    """Compare all tensors bit by bit, also buffers that no checkpoint stores."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(found, kind)(remove_duplicate=False))
        wanted = dict(getattr(expected, kind)(remove_duplicate=False))
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("family", [*COVERED, *OURS])
def test_every_tensor_is_what_from_pretrained_gives(tmp_path, family):
    folder = saved(tmp_path, family)
    source = WeightSource.open(folder)
    assert all(p.device.type == "meta" for p in source.model.parameters())
    source.fill(source.names)
    check_same(source.model, plain(folder))
