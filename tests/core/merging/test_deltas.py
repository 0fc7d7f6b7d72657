import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.core.merging import deltas
from fusion_plugins.core.merging.deltas import (
    MEASURES,
    chunks,
    combine,
    compute_dtype,
    delta_sums,
    require_finite,
    require_weights,
)
from fusion_plugins.core.merging.sce import sce_merge
from fusion_plugins.core.merging.varm import varm_merge
from fusion_plugins.errors import MergeError


def random_tensors(count, shape=(6, 5), dtype=torch.float64, seed=0):
    """A base and tuned models that changed by about 1e-2."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = [base + 1e-2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [tensor.to(dtype) for tensor in tuned]


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), limit=st.integers(1, 30), whole_rows=st.booleans())
def test_chunks_hold_every_element_once_and_no_more_than_the_limit(rows, columns, limit, whole_rows):
    view = torch.arange(rows * columns).reshape(rows, columns).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltas, "CHUNK_ELEMENTS", limit)
        found = [(where, chunk) for where, (chunk,) in chunks([view], whole_rows=whole_rows)]
    elements = [element for _, chunk in found for element in chunk.flatten().tolist()]
    assert sorted(elements) == list(range(rows * columns))
    for where, chunk in found:
        assert torch.equal(view[where], chunk)
        assert chunk.numel() <= limit or (whole_rows and len(chunk) == 1)
        assert not whole_rows or chunk.shape[1] == columns


def test_chunks_of_all_views_have_one_place_and_the_dtype_of_the_computation(monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", 4)
    first, second = torch.arange(12).reshape(3, 4).bfloat16(), torch.arange(12).reshape(3, 4).float()
    for where, (one, two) in chunks([first, second]):
        assert one.dtype == two.dtype == torch.float32
        assert torch.equal(one, first[where].float())
        assert torch.equal(one, two)
    assert {one.dtype for _, (one,) in chunks([first], dtype=torch.float64)} == {torch.float64}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
)
def test_computations_are_in_float32_unless_an_input_is_float64(dtypes, expected):
    assert compute_dtype([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", MEASURES)
def test_delta_sums_are_the_sums_of_the_measure(measure, dtype):
    base, tuned = random_tensors(3, dtype=dtype)
    differences = [tensor.double() - base.double() for tensor in tuned]
    expected = torch.stack([(d**2 if measure == "square" else d.abs()).sum() for d in differences])
    sums = delta_sums(base, tuned, measure)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_float32_sums_of_a_million_elements_are_exact_to_six_digits():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1 << 20, generator=generator)
    tuned = base + 1e-3 * torch.randn(1 << 20, generator=generator)
    for measure in MEASURES:
        delta = tuned.double() - base.double()
        expected = (delta**2 if measure == "square" else delta.abs()).sum()
        torch.testing.assert_close(delta_sums(base, [tuned], measure)[0], expected, rtol=1e-6, atol=0)


def test_squares_that_float32_rounds_to_zero_are_summed():
    assert delta_sums(torch.zeros(100), [torch.full((100,), 1e-25)]).item() == pytest.approx(1e-48)


def test_sums_of_an_empty_tensor_are_zero():
    assert delta_sums(torch.zeros(0, 4), [torch.zeros(0, 4)] * 2).tolist() == [0, 0]


def test_combine_adds_up_the_weighted_differences():
    base, tuned = random_tensors(3)
    weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    expected = base + sum(weight * (tensor - base) for weight, tensor in zip(weights, tuned, strict=True))
    torch.testing.assert_close(combine(base, tuned, weights), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combine_is_exact_where_one_model_has_all_weight_and_where_none_changed(dtype):
    base, tuned = random_tensors(3, dtype=dtype)
    assert torch.equal(combine(base, tuned, torch.tensor([0.0, 1.0, 0.0])), tuned[1])
    assert torch.equal(combine(base, [base.clone()] * 3, torch.tensor([0.2, 0.3, 0.5])), base)


def test_combine_without_weights_returns_a_copy_of_the_base():
    base, tuned = random_tensors(2)
    merged = combine(base, tuned, torch.zeros(2))
    assert torch.equal(merged, base)
    assert merged.data_ptr() != base.data_ptr()


def test_combine_returns_the_dtype_that_is_asked_for_and_leaves_its_inputs_alone():
    base, tuned = random_tensors(2, dtype=torch.bfloat16)
    copies = [tensor.clone() for tensor in (base, *tuned)]
    weights = torch.tensor([0.25, 0.75])
    wide = combine(base.float(), [tensor.float() for tensor in tuned], weights)
    assert torch.equal(combine(base, tuned, weights, dtype=torch.float32), wide)
    assert torch.equal(combine(base, tuned, weights), wide.bfloat16())
    assert combine(base, tuned, torch.zeros(2), dtype=torch.float32).dtype == torch.float32
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, (base, *tuned), strict=True))


def test_tensors_of_several_chunks_give_what_one_chunk_gives(monkeypatch):
    base, tuned = random_tensors(2, shape=(4, 3, 5))
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    merged, sums = combine(base, tuned, weights), delta_sums(base, tuned)
    monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", 7)
    assert torch.equal(combine(base, tuned, weights), merged)
    torch.testing.assert_close(delta_sums(base, tuned), sums, rtol=1e-13, atol=0)


def test_finite_numbers_pass_without_a_look_at_the_inputs():
    require_finite(torch.ones(2), "w", {"base": torch.tensor([float("nan")])})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_first_model_that_has_them(bad):
    tensors = {"base": torch.zeros(3), "one": torch.tensor([0.0, bad, bad]), "two": torch.full((3,), bad)}
    with pytest.raises(MergeError, match="tensor 'w' of model 'one': expected finite values, .* in 2 of 3"):
        require_finite(torch.tensor([bad]), "w", tensors)


def test_differences_that_overflow_are_refused():
    base, tuned = torch.zeros(2), torch.full((2,), 1e30)
    with pytest.raises(
        MergeError, match="tensor 'w': expected differences .* whose measure is finite, got an overflow"
    ):
        require_finite(delta_sums(base, [tuned]), "w", {"base": base, "one": tuned})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_codes_are_refused_unless_they_are_the_same_everywhere(dtype):
    base, (one, two) = (torch.arange(6).to(dtype), [torch.arange(6).to(dtype) for _ in range(2)])
    require_weights("w", {"base": base, "one": one, "two": two})
    two = torch.ones(6).to(dtype)
    with pytest.raises(MergeError, match=r"tensor 'w' of model 'base': expected weights .* quantized checkpoint"):
        require_weights("w", {"base": base, "one": one, "two": two})
    with pytest.raises(MergeError, match=r"tensor 'w' of model 'two'"):
        require_weights("w", {"base": torch.zeros(6), "one": torch.zeros(6), "two": two})
    with pytest.raises(MergeError, match="expected weights"):
        varm_merge({"w": base}, [{"w": one}, {"w": two}])
    with pytest.raises(MergeError, match="expected weights"):
        sce_merge(base, [one, two])
