"""How quantised weights are stored: the format bit by bit, its size, cuts, and the way back."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from esft_kernels.quantised import KINDS, Quantised, quantise
from esft_kernels.quantised.packing import pack, unpack
from safetensors import safe_open
from safetensors.torch import save_file
from stored_layers import BITS, NF4, codes_of, weights_of
from torch import Tensor, nn

COLUMNS = (1, 7, 8, 9, 63, 64, 65, 200)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02 + 0.003).to(dtype)


def random_codes(stored: Quantised) -> Quantised:
    """Return it with every bit of its codes drawn: not only what a quantiser would choose."""
    generator = torch.Generator().manual_seed(1)
    low, high = (-127, 128) if stored.kind == "int8" else (0, 256)
    codes = torch.randint(low, high, stored.codes.shape, generator=generator)
    return replace(stored, codes=codes.to(stored.codes.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_weights_are_what_the_bits_say(kind, columns):
    stored = random_codes(quantise(drawn(2, 3, columns), kind))
    for dtype in FLOATS:
        assert torch.equal(stored.dequantise(dtype), weights_of(stored).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_long_weights_are_read_in_pieces(kind):
    stored = random_codes(quantise(drawn(3, 200, 1000), kind, block=24))
    assert torch.equal(stored.dequantise(), weights_of(stored))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_packs_what_it_unpacks(kind, columns):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2 ** BITS[kind], (5, columns), generator=generator)
    packed = pack(codes.to(torch.uint8), KINDS[kind])
    unit = 8 if kind == "int3" else 8 // BITS[kind]
    assert packed.shape[1] == -(-columns // unit) * unit * BITS[kind] // 8
    found = unpack(packed, KINDS[kind])
    assert torch.equal(found[:, :columns], codes.to(torch.int8))
    assert (found[:, columns:] == 0).all()


@pytest.mark.parametrize(
    ("kind", "codes", "expected"),
    [
        ("nf4", [1, 15, 2], [0x1F, 0x20]),
        ("int4", [1, 15, 2], [0x1F, 0x20]),
        ("int2", [3, 0, 1, 2, 1], [0b11000110, 0b01000000]),
        # low bits 1 2 3 0 | 1 2 3 1 | 2, then high bits 0 0 0 1 1 1 1 0 | 1
        (
            "int3",
            [1, 2, 3, 4, 5, 6, 7, 1, 6],
            [0b01101100, 0b01101101, 0b10000000, 0, 0b00011110, 0b10000000],
        ),
    ],
)
def test_bytes_as_the_page_on_the_format_says(kind, codes, expected):
    packed = pack(torch.tensor([codes], dtype=torch.uint8), KINDS[kind])
    assert packed.tolist() == [expected]


@pytest.mark.parametrize(
    ("kind", "bits"), [("int8", 8.25), ("nf4", 4.25), ("int4", 4.5), ("int3", 3.5), ("int2", 2.5)]
)
def test_bits_of_a_weight(kind, bits):
    assert KINDS[kind].bits_per_weight() == bits
    stored = quantise(drawn(4, 16, 128), kind)
    assert stored.nbytes * 8 == bits * 4 * 16 * 128
    assert stored.nbytes == sum(tensor.nbytes for tensor in stored.tensors().values())


def test_the_codebook_is_the_normal_float_s():
    """QLoRA's construction: quantiles of a normal's halves and zero, divided by the largest."""
    last = 1 - (1 / 30 + 1 / 32) / 2

    def half(count: int) -> list[float]:
        step = (last - 0.5) / (count - 1)
        return [NormalDist().inv_cdf(last - step * place) for place in range(count - 1)]

    values = torch.tensor([*(-v for v in half(8)), 0.0, *half(9)], dtype=torch.float64)
    expected = values.sort().values / values.max()
    book = torch.tensor(KINDS["nf4"].codebook, dtype=torch.float64)
    assert torch.equal(book.float(), torch.from_numpy(NF4))
    assert (book - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_cut_without_a_copy(kind):
    stored = quantise(drawn(5, 3, 40), kind, block=16)
    dense = stored.dequantise()
    assert (stored.shape, stored.dim(), stored.dtype) == ((5, 3, 40), 3, torch.float32)
    for rows in (2, slice(1, 4), slice(5, None), slice(None, None, 2)):
        part = stored[rows]
        assert torch.equal(part.dequantise(), dense[rows])
        for whole, cut in zip(stored.tensors().values(), part.tensors().values(), strict=True):
            assert whole.untyped_storage().data_ptr() == cut.untyped_storage().data_ptr()
    chosen = torch.tensor([4, 0])
    assert torch.equal(stored[chosen].dequantise(), dense[chosen])
    with pytest.raises(IndexError, match="single row"):
        stored[0][0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_by_safetensors(kind, tmp_path):
    stored = quantise(drawn(3, 4, 50, dtype=torch.bfloat16), kind, block=16)
    save_file(stored.tensors(), tmp_path / "bank.safetensors", stored.metadata())
    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        names, metadata = file.keys(), file.metadata()
        back = Quantised.restore({name: file.get_tensor(name) for name in names}, metadata)
        one = Quantised.restore({name: file.get_slice(name)[1:2] for name in names}, metadata)
    assert (back.kind, back.block, back.shape, back.dtype) == (kind, 16, (3, 4, 50), torch.bfloat16)
    assert torch.equal(back.dequantise(), stored.dequantise())
    assert torch.equal(one.dequantise(), stored[1:2].dequantise())


def test_lives_in_a_module_s_buffers():
    stored = quantise(drawn(3, 4, 50), "int3")
    module = nn.Module()
    for name, tensor in stored.tensors().items():
        module.register_buffer(name, tensor)
    fresh = nn.Module()
    for name, tensor in Quantised.empty((3, 4, 50), "int3", dtype=torch.float32).tensors().items():
        fresh.register_buffer(name, tensor)
    fresh.load_state_dict(module.state_dict())
    back = Quantised.restore(dict(fresh.named_buffers()), stored.metadata())
    assert torch.equal(back.dequantise(), stored.dequantise())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_is_filled_expert_by_expert(kind):
    weight = drawn(3, 4, 50)
    bank = Quantised.empty(weight.shape, kind, 16, dtype=torch.float32)
    for expert in range(3):
        bank[expert].copy_(quantise(weight[expert], kind, 16))
    assert torch.equal(bank.dequantise(), quantise(weight, kind, 16).dequantise())
    for other in (quantise(weight[0], kind, 24), quantise(weight[0, :, :49], kind, 16)):
        with pytest.raises(ValueError, match="other: expected"):
            bank[0].copy_(other)


def test_takes_no_memory_on_the_meta_device():
    large = Quantised.empty((512, 8192, 7168), "nf4", dtype=torch.bfloat16, device="meta")
    assert large.nbytes * 8 == 4.25 * 512 * 8192 * 7168
    assert large.dequantise().shape == large.shape
    assert quantise(torch.empty(2, 3, 64, device="meta"), "int4").to("meta").device.type == "meta"


def test_moves_and_changes_each_tensor():
    stored = quantise(drawn(2, 3, 40), "int4")
    seen = []
    same = stored.each(lambda tensor: seen.append(tensor.dtype) or tensor.clone())
    assert seen == [torch.uint8, torch.bfloat16, torch.bfloat16]
    assert torch.equal(same.dequantise(), stored.dequantise())
    assert stored.to("cpu").codes is stored.codes


@pytest.mark.parametrize("kind", KINDS)
def test_writes_into_a_buffer(kind):
    stored = quantise(drawn(4, 3, 40), kind)
    buffer = torch.full((9, 3, 40), torch.nan, dtype=torch.bfloat16)
    out = stored[1:3].dequantise(out=buffer[2:4])
    assert out.data_ptr() == buffer[2].data_ptr()
    assert torch.equal(out, stored.dequantise(torch.bfloat16)[1:3])
    assert buffer[[0, 1, 4, 5, 6, 7, 8]].isnan().all()
    for wrong in (buffer[:3], buffer[:4, :, ::2], buffer[:4].transpose(0, 1)):
        with pytest.raises(ValueError, match="out: expected contiguous"):
            stored.dequantise(out=wrong)
    with pytest.raises(ValueError, match="float32"):
        stored.dequantise(torch.float32, out=buffer[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_bank(kind):
    stored = quantise(torch.empty(0, 3, 40), kind)
    assert stored.dequantise().shape == (0, 3, 40)
    assert stored.nbytes == 0


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kind", "int5", "kind: expected one of int8, nf4, int4, int3, int2; got 'int5'"),
        ("columns", "51", "codes: expected"),
        ("columns", "many", "columns: expected a whole number, got 'many'"),
        ("block", "8", "scale: expected"),
        ("block", "12", "block: expected a multiple of 8, got 12"),
        ("dtype", "int64", "dtype: expected a float's name"),
        ("dtype", "nn", "dtype: expected a float's name"),
        ("kind", None, "metadata: kind missing"),
    ],
)
def test_refuses_what_does_not_fit_together(key, value, told):
    stored = quantise(drawn(3, 4, 50), "int4", block=16)
    metadata = stored.metadata() | {key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(ValueError, match=told):
        Quantised.restore(stored.tensors(), metadata)


def test_refuses_a_missing_tensor():
    stored = quantise(drawn(3, 4, 50), "int4")
    with pytest.raises(ValueError, match="tensors: offset missing"):
        Quantised.restore({"codes": stored.codes, "scale": stored.scale}, stored.metadata())


def test_codes_behind_the_last_column_are_zero():
    """So that equal weights are equal files."""
    for kind in BITS:
        stored = quantise(drawn(2, 9), kind)
        width = stored.codes.shape[-1] * 8 // BITS[kind]
        everything = codes_of(replace(stored, columns=width))
        assert (everything[:, 9:] == 0).all()
