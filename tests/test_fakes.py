"""Networks over shapes alone: what the mode keeps is what torch's own gives."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from se_inject.fakes import FakeMode

F = torch.nn.functional
aten = torch.ops.aten


def describe(x, inputs):
    """Say all that a fake tensor shows, and which of the inputs it is or shares its storage with."""
    shares = [y is x or y.untyped_storage()._cdata == x.untyped_storage()._cdata for y in inputs]
    shown = x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad, x.is_inference()
    return shown, [y is x for y in inputs], shares, [y._version for y in inputs], type(x)


def run(mode, make, function, times):
    """Run a function of fresh fake tensors, in the same mode again and again, and describe the last results."""
    for _ in range(times):
        inputs = make(mode)
        with mode:
            made = function(*inputs)
        made = made if isinstance(made, tuple) else (made,)
    return [describe(x, inputs) for x in made]


def make_maps(dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
    def make(mode):
        with mode:
            x, y = (torch.empty(2, 6, 5, 4, dtype=dtype, device=device).contiguous(memory_format=layout) for _ in "xy")
            return x, y, torch.empty(6, 6, 3, 3, dtype=dtype, device=device), torch.empty(6, dtype=dtype, device=device)

    return make


OPERATORS = {
    "convolution": lambda x, y, w, b: F.conv2d(x, w, b, 2, 1),
    "convolution of one group each": lambda x, y, w, b: F.conv2d(x, w[:, :1], None, 1, 1, 1, 6),
    "batch norm": lambda x, y, w, b: aten.native_batch_norm(x, b, b, b, b, False, 0.1, 1e-5),
    "batch norm of the batch": lambda x, y, w, b: aten.native_batch_norm(x, b, b, b, b, True, 0.1, 1e-5),
    "relu": lambda x, y, w, b: x.relu(),
    "relu on the map": lambda x, y, w, b: x.relu_(),
    "relu on a part": lambda x, y, w, b: x[:, 1:3].relu_(),
    "sum": lambda x, y, w, b: x + y,
    "sum with a number": lambda x, y, w, b: x + 1.5,
    "sum of types": lambda x, y, w, b: x + y.double(),
    "sum on the map": lambda x, y, w, b: x.add_(y, alpha=2),
    "product": lambda x, y, w, b: x * b.view(1, 6, 1, 1),
    "sigmoid": lambda x, y, w, b: x.sigmoid(),
    "mean": lambda x, y, w, b: x.mean((2, 3)),
    "mean that keeps": lambda x, y, w, b: x.mean((-2, -1), keepdim=True),
    "mean in double precision": lambda x, y, w, b: x.mean((2, 3), dtype=torch.float64),
    "addcmul": lambda x, y, w, b: torch.addcmul(x, y, b.view(1, 6, 1, 1)),
    "detached": lambda x, y, w, b: x[:, 1:].detach(),
    "unsqueezed": lambda x, y, w, b: b[1:].unsqueeze(-1),
    "empty": lambda x, y, w, b: torch.empty(2, 3),
    "empty in half precision": lambda x, y, w, b: torch.empty(2, 3, dtype=torch.float16),
    "empty on another device": lambda x, y, w, b: torch.empty(2, 3, device="meta"),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_torchs_mode_gives(name, layout, dtype):
    make = make_maps(dtype, layout)
    expected = run(FakeTensorMode(), make, OPERATORS[name], times=1)
    assert run(FakeMode(), make, OPERATORS[name], times=1) == expected
    assert run(FakeMode(), make, OPERATORS[name], times=3) == expected


def test_one_operator_may_be_asked_for_other_things():
    ours, torchs = FakeMode(), FakeTensorMode()
    variants = [
        *(
            make_maps(dtype, layout)
            for dtype in (torch.float32, torch.float64)
            for layout in (torch.contiguous_format, torch.channels_last)
        ),
        make_maps(device="meta"),
    ]
    functions = [
        OPERATORS[n] for n in ("convolution", "batch norm", "sum", "mean", "mean that keeps", "sum with a number")
    ]
    functions += [lambda x, y, w, b: x + 1, lambda x, y, w, b: x + True, lambda x, y, w, b: F.conv2d(x, w, b, 1, 1)]
    for _ in range(2):
        for make in variants:
            for function in functions:
                assert run(ours, make, function, times=1) == run(torchs, make, function, times=1)


def test_the_default_type_and_inference_mode_are_not_kept():
    def make(mode):
        return ()

    ours = FakeMode()
    found = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            found.append(run(ours, make, lambda: torch.empty(2), times=1)[0][0][3])
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == [torch.float32, torch.float64, torch.float32]
    for is_inference in (False, True, False):
        with torch.inference_mode(is_inference):
            [(shown, *_)] = run(ours, make, lambda: torch.empty(2).relu(), times=1)
        assert shown[-1] == is_inference


def test_gradients_go_through_what_is_kept():
    mode = FakeMode()
    for _ in range(2):
        with mode:
            x, w = torch.empty(1, 3, 4, 4, requires_grad=True), torch.empty(3, 3, 1, 1, requires_grad=True)
            y = F.conv2d(x, w).relu() + x
            y.sum().backward()
        assert y.requires_grad
        assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)


def test_tensors_with_numbers_are_torchs_business():
    mode = FakeMode(allow_non_fake_inputs=True)
    with mode:
        number = torch.tensor(2.0)
        assert (number + number).item() == 4  # the fake tensor knows its number
        assert number.detach().item() == 2
        mixed = torch.ones(3) + mode.from_tensor(torch.ones(3))
    assert type(mixed) is FakeTensor
    with mode:
        assert type(torch.ones(2, 3).relu()) is FakeTensor


def test_errors_are_torchs_every_time():
    mode = FakeMode()
    with mode:
        x, w = torch.empty(1, 3, 4, 4), torch.empty(3, 4, 1, 1)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                F.conv2d(x, w)
            with pytest.raises(RuntimeError, match="broadcast"):
                x + torch.empty(1, 3, 5, 5)
