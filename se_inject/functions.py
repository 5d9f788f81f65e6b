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
HOMOGENEOUS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ prelu rrelu rrelu_ abs abs_ neg identity dropout dropout_ dropout1d dropout2d "
    "dropout3d feature_dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d interpolate pixel_shuffle pixel_unshuffle channel_shuffle mean sum reshape view permute "
    "transpose movedim flatten unflatten squeeze unsqueeze contiguous clone to type_as float half bfloat16 expand "
    "expand_as roll flip getitem".split()
)
"""f(2 y) = 2 f(y)"""
MIXING = frozenset(
    "neg pixel_shuffle pixel_unshuffle channel_shuffle mean sum reshape view permute transpose movedim flatten "
    "unflatten squeeze unsqueeze expand expand_as roll flip getitem".split()
)
"""Of these, those that need not keep each channel at its place."""
QUOTIENTS = frozenset({"div", "div_", "divide", "true_divide", "truediv", "itruediv", "__truediv__", "__itruediv__"})
READS = frozenset("size dim ndimension is_floating_point new_empty new_zeros new_ones new_full numel stride".split())
"""They ask for sizes and types, or make a tensor of their own: a factor in the map is nothing to them."""
