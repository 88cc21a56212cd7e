"""What a batch waits with: where it lies, what stays where it is, what several batches share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from esft.streaming.state_file import StateFile
from esft.streaming.trees import UnsavableError, read_tree, write_tree
from esft.streaming.waiting import Shared, Waiting, digest

STATES = 4 * 10 * 8  # bytes of the tensors below


def states(seed: int) -> Tensor:
    return torch.randn(10, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    return StateFile(tmp_path / "states.bin", "what waits")


def test_what_does_not_fit_lies_in_the_file_and_is_the_same(file: StateFile) -> None:
    waiting = Waiting(Shared())
    tensors = [states(0), states(1), states(2)]
    before = [tensor.clone() for tensor in tensors]
    waiting.stop(tensors, 2 * STATES, file, {})
    assert waiting.in_memory == 2 * STATES
    assert file.written == STATES
    assert all(map(torch.equal, tensors, before))
    tensors[2].add_(1)  # models work in place; the file is not written
    assert torch.equal(tensors[2], before[2] + 1)
    again = file.map(0, STATES)
    assert torch.equal(torch.empty(0).set_(again, 0, (10, 8)), before[2])


def test_what_is_not_new_is_not_written_again(file: StateFile, tmp_path: Path) -> None:
    waiting = Waiting(Shared())
    kept, mapped = states(0), states(1)
    waiting.stop([kept, mapped], STATES, file, {})
    place = mapped.untyped_storage().data_ptr()
    second = StateFile(tmp_path / "second.bin", "what waits")
    new = states(2)
    waiting.stop([new, kept, mapped, mapped[2:]], STATES, second, {})
    assert second.written == STATES  # the new one: memory holds the first already
    assert mapped.untyped_storage().data_ptr() == place
    assert waiting.in_memory == STATES
    waiting.stop([new], STATES, second, {})
    assert waiting.in_memory == 0


def test_views_of_one_storage_move_together(file: StateFile) -> None:
    waiting = Waiting(Shared())
    whole = states(0)
    views = [whole, whole[3:], whole.T, whole[:1].expand(10, 8)]
    before = [view.clone() for view in views]
    waiting.stop(views, 0, file, {})
    assert file.written == STATES
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert all(map(torch.equal, views, before))


def test_what_the_file_has_already_is_not_written(file: StateFile) -> None:
    tensor = states(0)
    before, address = tensor.clone(), tensor.untyped_storage().data_ptr()
    place = file.append(tensor.untyped_storage())
    Waiting(Shared()).stop([tensor], 0, file, {address: place})
    assert file.written == STATES
    assert torch.equal(tensor, before)


def test_batches_share_equal_masks_but_not_states() -> None:
    shared = Shared()
    first, second = Waiting(shared), Waiting(shared)
    masks = [torch.ones(1, 1, 50, 50).tril().bool() for _ in range(2)]
    own = [states(0), states(0)]
    first.stop([own[0], masks[0]], 10**6, None, {})
    second.stop([own[1], masks[1]], 10**6, None, {})
    assert masks[0].untyped_storage().data_ptr() == masks[1].untyped_storage().data_ptr()
    assert own[0].untyped_storage().data_ptr() != own[1].untyped_storage().data_ptr()
    assert (first.in_memory, second.in_memory) == (STATES + 2500, STATES)
    second.stop([states(3), masks[1]], 10**6, None, {})
    assert second.in_memory == STATES


def test_masks_with_equal_sums_are_not_shared() -> None:
    shared = Shared()
    masks = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])]
    for mask in masks:
        Waiting(shared).stop([states(0), mask], 10**6, None, {})
    assert masks[0].tolist() == [1.0, 2.0]
    assert masks[1].tolist() == [2.0, 1.0]


def test_a_digest_tells_values_shapes_and_dtypes_apart() -> None:
    tensor = states(0)
    changed = tensor.clone()
    changed[9, 7] += 1e-7
    others = [changed, tensor.view(8, 10), tensor.double(), tensor[:9], tensor.view(torch.int32)]
    assert all(digest(other) != digest(tensor) for other in others)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    odd = torch.arange(7, dtype=torch.uint8)
    assert digest(odd[1:6])[-1] == 1 + (2 << 8) + (3 << 16) + (4 << 24) + 5
    assert digest(tensor[:, :1].expand(10, 10**9))[:2] == [[10, 10**9], "torch.float32"]


def test_in_place_changes_show_in_the_digests() -> None:
    waiting = Waiting(Shared())
    tensor = states(0)
    waiting.stop([tensor], 10**6, None, {})
    before = waiting.digests()
    tensor[0, 0] += 1
    waiting.stop([tensor], 10**6, None, {})
    assert waiting.digests() != before


def test_what_a_layer_returns_comes_back(file: StateFile) -> None:
    whole = states(0)
    empty = torch.empty(0, 3, dtype=torch.bfloat16)
    tree = (whole, None, [whole[2:].T, 3, True], {"a": empty, "b": ("text", 0.5)})
    described = write_tree(tree, file, {})
    assert file.written == STATES
    file.sync()
    with open(file.path, "rb") as raw:
        found = read_tree(described, raw.fileno(), torch.device("cpu"))
    assert type(found) is tuple
    assert torch.equal(found[0], whole)
    assert torch.equal(found[2][0], whole[2:].T)
    assert (found[1], found[2][1:], found[3]["b"]) == (None, [3, True], ("text", 0.5))
    assert (found[3]["a"].shape, found[3]["a"].dtype) == (empty.shape, empty.dtype)


def test_what_cannot_be_written_down_is_told(file: StateFile) -> None:
    with pytest.raises(UnsavableError, match="Path"):
        write_tree((states(0), Path()), file, {})
