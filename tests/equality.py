"""Checks that a network and its injected version do the same, to the bit."""

import torch
from torch.utils._pytree import tree_leaves


def tensors_of(output):
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]


def assert_equal_outputs(left, right):
    left, right = tensors_of(left), tensors_of(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


def assert_same_network(original, injected, x):
    """Outputs in eval and train mode, batch-norm buffers after the train step, and that gradients reach the input."""
    with torch.no_grad():
        assert_equal_outputs(original.eval()(x), injected.eval()(x))
    gradients = []
    outputs = []
    for model in (original, injected):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        output = model.train()(given)
        sum(t.float().sum() for t in tensors_of(output)).backward()
        outputs.append(output)
        gradients.append(given.grad)
    assert_equal_outputs(*outputs)
    assert gradients[0].shape == gradients[1].shape == x.shape
    buffers = dict(injected.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
