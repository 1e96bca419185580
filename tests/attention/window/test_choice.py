"""Which backend window attention takes, and what it says of those it does not."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from attention import oracles
from test_window import attend, random_inputs

from hybriddit.attention import aligned_window, neighborhood_attention, trial, window
from hybriddit.attention.window import WindowCase, choose_backend, dispatch, flex, natten, tiled
from hybriddit.attention.window.flex import best_layout, visited_blocks
from hybriddit.attention.window.text_mask import hide_padded_text

GPU = torch.device("cuda", 0)


def case(**changes):
    values = dict(device=GPU, dtype=torch.bfloat16, grid=(128, 128), heads=24, head_dim=128, window=(16, 16))
    return WindowCase(**values | dict(text_length=512) | changes)


@pytest.fixture(autouse=True)
def fresh():
    """No choice of another test is remembered."""
    for kept in (dispatch._taken, dispatch._trial_failure, trial.warn_once):
        kept.cache_clear()
    yield
    for kept in (dispatch._taken, dispatch._trial_failure, trial.warn_once):
        kept.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Makes up what is installed: natten (with kernels), triton, a C compiler."""

    def make(natten=True, triton=True, compiler=True):
        monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(HAS_LIBNATTEN=True) if natten else None)
        monkeypatch.setattr(trial.importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(trial.shutil, "which", lambda name: "/bin/cc" if compiler else None)
        monkeypatch.delenv("CC", raising=False)

    return make


def test_order_on_a_gpu(machine, monkeypatch):
    machine()
    assert choose_backend(case())[::2] == ("triton", ())
    monkeypatch.setitem(sys.modules, "hybriddit.attention.window.kernels", None)
    monkeypatch.delattr(window, "kernels", raising=False)
    choice = choose_backend(case())
    assert choice.backend == "flex" and choice.passed_over == (("triton", "it is not installed"),)
    monkeypatch.undo()
    for missing, words in ((dict(triton=False), "pip install triton"), (dict(compiler=False), "a C compiler")):
        machine(**missing)
        choice = choose_backend(case())
        passed_over = dict(choice.passed_over)
        assert choice.backend == "natten" and words in passed_over["flex"] and words in passed_over["triton"]
        machine(natten=False, **missing)
        assert choose_backend(case()).backend == "tiled"


@pytest.mark.parametrize(
    "change, backend, refused",
    [
        (dict(window=(1, 9)), "triton", {}),
        (dict(window=(1, 9), head_dim=288), "tiled", {"triton": "288", "flex": "head width 288", "natten": "no window of 1"}),
        (dict(dilation=(9, 1), head_dim=288), "tiled", {"natten": "exceeds the grid"}),
        (dict(dtype=torch.float64), "tiled", {"triton": "float64", "natten": "float64", "flex": "float64"}),
        (dict(device=torch.device("mps")), "tiled", {"triton": "on mps", "natten": "NVIDIA", "flex": "does not run on mps"}),
        (dict(grid=(16, 16), window=(15, 16)), "dense", {name: "dense attention's" for name in ("triton", "flex", "natten", "tiled")}),
        (dict(grid=(16, 16)), "dense", {}),
        (dict(device=torch.device("cpu"), dtype=torch.float32), "tiled", {"natten": "GPU", "flex": "not compiled"}),
        (dict(device=torch.device("cpu"), gradients=True), "tiled", {"flex": "no gradients on a CPU"}),
        (dict(device=torch.device("cpu"), grid=(18, 18)), "dense", {"tiled": "dense attention's"}),
    ],
)  # fmt: skip
def test_what_a_backend_cannot_do_goes_to_the_next(change, backend, refused, machine):
    machine()
    choice = choose_backend(case(**change))
    assert choice.backend == backend
    passed_over = dict(choice.passed_over)
    assert passed_over.keys() >= refused.keys()
    for name, words in refused.items():
        assert words in passed_over[name]


def test_no_large_mask_is_made_for_speed(machine):
    machine()
    assert choose_backend(case(grid=(256, 256), window=(250, 250))).backend == "triton"
    assert choose_backend(case(grid=(256, 256), window=(250, 250), device=torch.device("cpu"))).backend == "tiled"


def pretend_gpu(monkeypatch, attend):
    """Makes the CPU count as a GPU on which `attend` is the flex backend."""
    monkeypatch.setattr(WindowCase, "on_gpu", property(lambda case: True))
    row = dispatch.Backend(attend, lambda case: None, lambda case: None, tried=True)
    monkeypatch.setattr(dispatch, "BACKENDS", {"flex": row, **{n: dispatch.BACKENDS[n] for n in ("tiled", "dense")}})


def broken_compiler(*args):
    raise RuntimeError("no ptxas\nmore lines")


def wrong_output(*args):
    return tiled.attend(*args) * 1.1


def wrong_gradient(query, key, *args):
    return tiled.attend(query, key + (key - key.detach()), *args)


def lost_text(query, key, value, text_key, text_value, *args):
    return tiled.attend(query, key, value, text_key.detach(), text_value, *args)


@pytest.mark.parametrize(
    "attend_wrongly, gradients, cause",
    [
        (broken_compiler, False, "it failed with RuntimeError: no ptxas$"),
        (wrong_output, False, "its output is wrong"),
        (wrong_gradient, True, "its gradient is wrong"),
        (lost_text, True, "it failed with RuntimeError"),
    ],
)
def test_a_backend_that_fails_its_trial_is_not_used(attend_wrongly, gradients, cause, monkeypatch):
    pretend_gpu(monkeypatch, attend_wrongly)
    inputs, weight = random_inputs((24, 24), 3, 1, 32, 1, torch.float32)
    with pytest.warns(UserWarning, match=f"does not use flex: {cause}") as caught, torch.set_grad_enabled(gradients):
        out = attend(inputs, 5)
        attend(inputs, 5)
        attend(inputs, 6)
    assert len(caught) == 1
    expected = oracles.neighborhood(*inputs, (5, 5), (1, 1), (1, 1))
    assert (out - expected).norm() < 1e-5 * expected.norm()
    if gradients:
        torch.autograd.grad(out, inputs, weight)
    with (
        pytest.raises(
            ValueError, match=f'backend "flex" cannot run this: {cause.rstrip("$")}.*use backend "auto"'
        ) as error,
        torch.set_grad_enabled(gradients),
    ):
        attend(inputs, 5, backend="flex")
    assert "\n" not in str(error.value)


def test_a_wrong_gradient_matters_to_training_alone(monkeypatch):
    calls = []

    def attend_and_count(*args):
        calls.append(args[0].shape)
        return wrong_gradient(*args)

    pretend_gpu(monkeypatch, attend_and_count)
    inputs, _ = random_inputs((24, 24), 3, 1, 32, 1, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(inputs, 5)
        attend(inputs, 6)
    assert [shape[1] for shape in calls] == [20, 24, 24]  # tried once, used twice


def test_the_trial_runs_while_a_model_is_compiled(monkeypatch):
    """In torch.compile's tracing, in inference mode and under autocast; what it finds is part of the graph."""
    pretend_gpu(monkeypatch, wrong_output)
    inputs, _ = random_inputs((24, 24), 3, 1, 32, 1, torch.float32)
    compiled = torch.compile(lambda *x: attend(x, 5), backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="its output is wrong"), torch.autocast("cpu", torch.bfloat16):
        out = compiled(*inputs)
    assert (out - oracles.neighborhood(*inputs, (5, 5), (1, 1), (1, 1))).abs().max() < 0.05


def test_flex_is_tried_and_taken_while_a_model_is_compiled(monkeypatch):
    """One compilation within another's tracing; without gradients, which FlexAttention lacks on a CPU."""
    pretend_gpu(monkeypatch, flex.attend)
    inputs, _ = random_inputs((24, 24), 3, 1, 32, 1, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="window attention does not use flex")
        out = torch.compile(lambda *x: attend(x, 5), backend="aot_eager", fullgraph=True)(*inputs)
    expected = oracles.neighborhood(*inputs, (5, 5), (1, 1), (1, 1))
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert dispatch._trial_failure.cache_info().currsize == 1


def test_a_compiled_graph_serves_all_sizes():
    """The backend is chosen when it runs: dense where the window covers the grid, tiled elsewhere."""

    def function(*inputs, text_mask=None):
        out, lse = attend(inputs, (5, 4), (2, 1), text_mask=text_mask, return_lse=True)
        return out * 2, lse + 1

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for grid, text in [((24, 28), 3), ((30, 26), 7), ((5, 4), 2), ((3, 40), 5)]:
        inputs, _ = random_inputs(grid, text, 2, 32, 2, torch.float32)
        mask = torch.arange(text) < text - 1
        for text_mask in (None, mask.expand(2, text)):
            with torch.no_grad():
                found = compiled(*inputs, text_mask=text_mask)
            for x, expected in zip(found, function(*inputs, text_mask=text_mask), strict=True):
                torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert counters["unique_graphs"] == 2  # with a mask and without


def test_flex_passes_its_trial_without_gradients():
    assert dispatch._trial_failure("flex", torch.device("cpu"), torch.float32, 24, False) is None
    assert "no gradients" in str(flex.refusal(case(device=torch.device("cpu"), gradients=True)))


@pytest.mark.parametrize(
    "capability, dtype, width, gradients, padded",
    [
        ((9, 0), torch.bfloat16, 72, True, 128),
        ((9, 0), torch.float16, 64, True, 64),
        ((9, 0), torch.bfloat16, 144, False, 256),
        ((9, 0), torch.bfloat16, 144, True, 144),  # Hopper has no backward of 256
        ((9, 0), torch.bfloat16, 12, True, 16),  # to 32 would cost more than it gains
        ((9, 0), torch.float32, 72, True, 72),
        ((8, 0), torch.bfloat16, 72, True, 72),
        ((10, 0), torch.bfloat16, 70, True, 72),
    ],
)
def test_head_widths_for_natten(capability, dtype, width, gradients, padded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert natten.head_width(GPU, dtype, width, gradients) == padded


def test_what_natten_is_given(monkeypatch):
    """Its call, with a stand-in for its kernels: padded, contiguous, the scale of the true width."""
    calls = []

    def na2d(query, key, value, *, kernel_size, additional_keys, additional_values, return_lse, **settings):
        tensors = query, key, value, additional_keys, additional_values
        calls.append([x.shape[-1] for x in tensors] + [x.is_contiguous() for x in tensors])
        attend = tiled.attend_with_lse if return_lse else tiled.attend
        return attend(*tensors, kernel_size, *(settings[name] for name in ("stride", "dilation", "scale")))

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(HAS_LIBNATTEN=True, na2d=na2d))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    inputs, _ = random_inputs((12, 13), 4, 2, 72, 1, torch.bfloat16)
    inputs = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    out = natten.attend(*inputs, (3, 4), (1, 2), (1, 1), 72**-0.5)
    assert calls == [[128] * 5 + [True] * 5] and out.shape == inputs[0].shape
    expected = oracles.neighborhood(*inputs, (3, 4), (1, 2), (1, 1))
    assert (out - expected).norm() < 1.5e-2 * expected.norm()
    out, lse = natten.attend_with_lse(*inputs, (3, 4), (1, 2), (1, 1), 72**-0.5)
    assert (out - expected).norm() < 1.5e-2 * expected.norm() and lse.dtype == torch.float32
    expected = oracles.neighborhood_lse(inputs[0], inputs[1], inputs[3], (3, 4), (1, 2), (1, 1))
    assert (lse - expected).abs().max() < 0.05


def test_the_log_sum_exp_is_natten_s_unless_it_is_wrong_or_needs_gradients(machine, monkeypatch):
    """A trial of it says so once; then, as with gradients, one more key tells it."""
    machine()
    given, wrong = [], []

    def attend_with_lse(query, *arguments):
        given.append(query.shape[-1])
        out, lse = tiled.attend_with_lse(query, *arguments)
        return out, lse * (1.1 if wrong else 1)

    row = dispatch.BACKENDS["natten"]._replace(
        attend=tiled.attend, attend_with_lse=attend_with_lse, refusal=lambda case: None, slower=lambda case: None
    )
    monkeypatch.setattr(dispatch, "BACKENDS", {"natten": row, "tiled": dispatch.BACKENDS["tiled"]})
    monkeypatch.setattr(WindowCase, "on_gpu", True)
    inputs, _ = random_inputs((24, 30), 4, 2, 32, 1, torch.float32)
    settings = {"window": 5, "text_key": inputs[3], "text_value": inputs[4], "return_lse": True}
    expected = oracles.neighborhood_lse(inputs[0], inputs[1], inputs[3], (5, 5), (1, 1), (1, 1))
    neighborhood_attention(*inputs[:3], **settings)
    assert given == []
    with torch.no_grad():
        torch.testing.assert_close(
            neighborhood_attention(*inputs[:3], **settings)[1].double(), expected, rtol=0, atol=1e-4
        )
        assert given == [32, 32]
        dispatch._trial_failure.cache_clear()
        wrong.append(True)
        with pytest.warns(
            UserWarning, match="takes the log-sum-exp from one more key, not from natten: its output is wrong"
        ):
            _, found = neighborhood_attention(*inputs[:3], **settings)
    assert given == [32, 32, 32]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", [False, True])
def test_padded_text_is_masked_by_a_backend_that_can_or_else_hidden(wrong, monkeypatch):
    """Also where the backend's log-sum-exp fails its trial, so that one more key tells it."""
    masks = []

    def attend_with_lse(*arguments, text_mask=None):
        masks.append(text_mask)
        query, key, value, text_key, text_value, *settings = arguments
        if text_mask is not None:
            masked = hide_padded_text(query, key, value, text_key, text_value, text_mask, settings[-1])
            out, lse = tiled.attend_with_lse(*masked, *settings)
            return out[..., : query.shape[-1]], lse
        out, lse = tiled.attend_with_lse(*arguments)
        return out, lse * (1.1 if wrong else 1)

    row = dispatch.Backend(
        lambda *arguments, **mask: attend_with_lse(*arguments, **mask)[0],
        lambda case: None,
        lambda case: None,
        attend_with_lse,
        lse_gradients=True,
        masks_text=True,
        tried=True,
    )
    monkeypatch.setattr(dispatch, "BACKENDS", {"triton": row, "tiled": dispatch.BACKENDS["tiled"]})
    monkeypatch.setattr(WindowCase, "on_gpu", True)
    inputs, _ = random_inputs((24, 30), 4, 2, 32, 2, torch.float32)
    text_mask = torch.tensor([[True, False, True, True], [False] * 4])
    settings = {"window": 5, "text_key": inputs[3], "text_value": inputs[4], "text_mask": text_mask}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, lse = neighborhood_attention(*inputs[:3], **settings, return_lse=True)
        expected = neighborhood_attention(*inputs[:3], **settings, return_lse=True, backend="tiled")
        assert (sum(mask is not None for mask in masks) == 0) == wrong
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-4)
        neighborhood_attention(*inputs[:3], **settings)  # the output alone, whose trial passed
        assert masks[-1] is text_mask


@pytest.mark.parametrize("grid", [(32, 32), (64, 64), (48, 96), (128, 16), (8, 128), (15, 128)])
@pytest.mark.parametrize("cost", [0.0625, 0.2, 9 / 64, 0.5, 1])
def test_aligned_windows_mask_no_block(grid, cost):
    try:
        size, stride = aligned_window(grid, cost)
    except ValueError as error:
        assert "is below that of one tile" in str(error) and cost < 0.1
        return
    rows, columns = (oracles.axis_neighbors(*axis, 1) for axis in zip(grid, size, stride, strict=True))
    pairs = sum(map(len, rows)) * sum(map(len, columns))
    share = pairs / (grid[0] * grid[1]) ** 2
    assert share == size[0] * size[1] / (grid[0] * grid[1]) <= cost
    visited, whole = visited_blocks(best_layout(grid, size, stride, (1, 1), 256))
    assert visited == whole
    assert (visited - 2 * grid[0] * grid[1] // 128) * 128**2 == pairs  # and the text's two blocks


def test_aligned_window_by_hand():
    assert aligned_window((64, 64), 9 / 64, tile=(8, 8)) == ((24, 24), (8, 8))
    assert aligned_window((64, 64), 16 / 64, tile=(8, 8)) == ((32, 32), (16, 16))
    assert aligned_window((64, 64), 1)[0] == (64, 64)
    with pytest.raises(ValueError, match=r"no tile of 128 tokens \(as 8 x 16\) divides the grid \(85, 48\)"):
        aligned_window((85, 48), 0.2)
    with pytest.raises(ValueError, match="cost 0.01 is below that of one tile, 0.03125"):
        aligned_window((64, 64), 0.01)
    for cost in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="cost must be above 0 and at most 1"):
            aligned_window((64, 64), cost)
