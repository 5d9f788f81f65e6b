"""Functions: the names of torch's functions, by what they do to a map."""

from __future__ import annotations

ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
SUMS = ADDITIONS | {"iadd"}
"""As nodes of a graph, where an operator of Python goes by its own name."""
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
PRODUCTS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
CONVOLUTIONS = frozenset({f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)})
LINEARS = frozenset({"linear", "matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"})
NORMS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm", "local_response_norm"})
ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh softmax "
    "softplus prelu rrelu threshold clamp clamp_min relu_ leaky_relu_ elu_ selu_ celu_ hardtanh_ sigmoid_ tanh_ rrelu_ "
    "threshold_ clamp_ clamp_min_".split()
)
POOLINGS = frozenset(
    f"{kind}{d}d"
    for kind in ("max_pool", "avg_pool", "lp_pool", "fractional_max_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for d in (1, 2, 3)
)
SPLITS = frozenset({"split", "chunk", "tensor_split", "split_with_sizes"})
