"""How tensors are laid out for a kernel: a last dimension without gaps, and strides in a unit that keeps loads wide."""

import pytest
import torch

from hybriddit.attention.launch import laid_out


def tokens(heads, width, length=5):
    return torch.randn(2, length, heads, width)


def test_strides_are_in_units_of_8_where_all_are_divisible():
    x, y = tokens(3, 16), tokens(3, 24)[:, 1:]
    (first, second), unit, strides = laid_out(x, y)
    assert unit == 8 and first is x and second is y
    assert strides == ((30, 6, 2), (45, 9, 3))
    _, unit, strides = laid_out(x, tokens(3, 12))
    assert unit == 1 and strides == ((240, 48, 16), (180, 36, 12))


def test_a_tensor_that_is_missing_has_strides_of_zero():
    tensors, _, strides = laid_out(None, tokens(1, 8), None)
    assert tensors[0] is None and strides == ((0, 0, 0), (5, 1, 1), (0, 0, 0))


def test_memory_that_does_not_begin_at_16_bytes_has_units_of_1():
    memory = torch.randn(2 * 5 * 3 * 16 + 1)
    _, unit, strides = laid_out(memory[1:].view(2, 5, 3, 16), tokens(3, 16))
    assert unit == 1 and strides[1] == (240, 48, 16)


@pytest.mark.parametrize(
    "x, largest",
    [(tokens(4, 32)[..., ::2], None), (tokens(16, 4).transpose(2, 3), None), (tokens(3, 16, 10)[:, ::2], 96)],
    ids=["gaps", "heads innermost", "rows too far apart"],
)
def test_other_layouts_are_copied(x, largest):
    beside = tokens(1, 8)
    (copied, kept), unit, strides = laid_out(x, beside, largest=largest)
    assert kept is beside and copied.is_contiguous() and copied.data_ptr() != x.data_ptr() and copied.equal(x)
    assert [n * unit for n in strides[0]] == list(copied.stride()[:-1])


def test_another_tensor_of_the_same_strides_is_looked_at_anew():
    aligned, memory = tokens(3, 16), torch.randn(2 * 5 * 3 * 16 + 1)
    assert [laid_out(x)[1] for x in (aligned, memory[1:].view(2, 5, 3, 16), aligned)] == [8, 1, 8]
