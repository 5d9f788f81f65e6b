"""Random CNNs: programs of layers and idioms, drawn by hypothesis.

`networks()` draws a `Network`; its repr is the code, which a failing test prints and hypothesis makes small.
"""

from dataclasses import replace

from hypothesis import strategies as st

from tests.random_code import Code, Map, make_network

# Layers.


def conv(code, x, out=None, stride=1):
    out, kernel = out or x.channels, 3 if stride > 1 else code.pick(3, 1)
    groups = code.pick(1, 1, 2, out if out == x.channels else 4)
    child = code.add_child(f"nn.Conv{code.dims}d({x.channels}, {out}, {kernel}, {stride}, {kernel // 2}, 1, {groups})")
    return code.let(f"{child}({x.name})", x, channels=out, level=x.level + stride - 1)


def norm(code, x):
    kind = code.pick(f"nn.BatchNorm{code.dims}d", "", "nn.GroupNorm", f"nn.InstanceNorm{code.dims}d")
    if not kind:
        return x
    options = {"G": f"2, {x.channels}", "I": f"{x.channels}, affine=True"}.get(kind[3], f"{x.channels}")
    return code.let(f"{code.add_child(f'{kind}({options})', 'norm')}({x.name})", x)


def act(code, x):
    kind = code.pick(
        "", "F.relu({})", "self", "torch.tanh({})", "F.relu({}, inplace=True)", "{}.relu_()", "F.silu({})", "statement"
    )
    if kind == "self":
        child = code.add_child(code.pick("nn.ReLU(inplace=True)", "nn.ReLU()", "nn.GELU()"), "act")
        return code.let(f"{child}({x.name})", x)
    if kind == "statement":
        return code.do(f"{x.name}.relu_()", x)
    return code.let(kind.format(x.name), x) if kind else x


def branch(code, x, out=None, stride=1, write=None):
    """A few layers: in the owner's code, or in a child of its own."""
    out = out or x.channels
    if code.chance():
        y = act(code, norm(code, conv(code, x, out, stride)))
        return norm(code, conv(code, y)) if code.chance() else y
    if code.chance() and code.depth < 2:
        child, y = code.call_child(x, lambda c, m: act(c, norm(c, conv(c, step(c, m), out, stride))), may_stride=False)
        return code.let(f"{child}({x.name})", y)
    layers = f"nn.Conv{code.dims}d({x.channels}, {out}, 3, {stride}, 1), nn.BatchNorm{code.dims}d({out}), nn.ReLU(True)"
    layers += f", nn.Conv{code.dims}d({out}, {out}, 1)" if code.chance() else ""
    child = code.add_child(f"nn.Sequential({layers})", "branch")
    return code.let(f"{child}({x.name})", x, channels=out, level=x.level + stride - 1)


def scale(code, x):
    """What may follow a branch's last layer: layer scale, dropout, dropped paths."""
    kind = code.pick(
        "",
        "gamma",
        "{} * 0.5",
        "F.dropout({}, 0.3, self.training)",
        "drop_path({}, 0.3, self.training)",
        "child",
        "mul_",
    )
    if kind == "gamma":
        shape = (x.channels,) if x.is_last else (x.channels, *[1] * code.dims)
        return code.let(f"{x.name} * {code.add_child(f'nn.Parameter(torch.full({shape}, 0.5))', 'gamma')}", x)
    if kind == "child":
        child = code.add_child(code.pick("nn.Dropout(0.3)", "DropPath(0.3)", "nn.Identity()"), "drop")
        return code.let(f"{child}({x.name})", x)
    if kind == "mul_":
        return code.do(f"{x.name}.mul_(0.5)", x)
    return code.let(kind.format(x.name), x) if kind else x


def add(code, a, b):
    """A sum, in one of the ways in which people write it."""
    a, b = code.pick((a, b), (b, a))
    values = "{a} + {b}", "torch.add({a}, {b})", "{a}.add({b})", "torch.add({a}, other={b})", "sum([{a}, {b}])"
    form = code.pick(*values, "{a}.add_({b})", "{a}.add({b}, alpha=0.5)", "{a} += {b}", "{a}.add_({b}) #")
    line = form.format(a=a.name, b=b.name).removesuffix(" #")
    return code.do(line, a) if form[-1] == "#" or "+=" in form else code.let(line, a)


def cat(code, maps):
    names = ", ".join(m.name for m in maps)
    dim = -1 if maps[0].is_last else code.pick(1, 1, -1 - code.dims)
    form = code.pick(
        "torch.cat([{}], {})", "torch.cat(({}), dim={})", "torch.concat([{}], dim={})", "torch.cat([{}], axis={})"
    )
    joined = code.let(form.format(names, dim), maps[0], channels=sum(m.channels for m in maps))
    if joined.channels <= 32 or joined.is_last:
        return joined
    child = code.add_child(f"nn.Conv{code.dims}d({joined.channels}, 16, 1)")
    return code.let(f"{child}({joined.name})", joined, channels=16)


# Idioms: each is given a map and returns another.


def plain(code, x):
    return act(code, norm(code, conv(code, x, code.pick(None, 8, 16))))


def residual(code, x):
    return act(code, add(code, scale(code, branch(code, x)), x))


def projected(code, x):
    out, stride = code.pick(8, 16), code.pick(1, 2) if x.level < 2 and code.may_stride else 1
    child = code.add_child(f"nn.Conv{code.dims}d({x.channels}, {out}, 1, {stride})", "shortcut")
    shortcut = code.let(f"{child}({x.name})", x, channels=out, level=x.level + stride - 1)
    shortcut = norm(code, shortcut)
    return act(code, add(code, scale(code, branch(code, x, out, stride)), shortcut))


def three(code, x):
    maps = [branch(code, x) for _ in range(code.pick(2, 3))]
    if code.chance():
        return code.let(" + ".join(m.name for m in (x, *maps)), x)
    total = x
    for m in maps:
        total = add(code, total, m)
    return total


def inception(code, x):
    maps = [branch(code, x, code.pick(8, 4)) for _ in range(code.pick(2, 3))]
    if code.chance():
        maps.append(code.let(f"F.max_pool{code.dims}d({x.name}, 3, 1, 1)", x))
    return cat(code, maps)


def dense(code, x):
    if code.chance():
        features = [x]
        for _ in range(code.pick(1, 2)):
            y = cat(code, features) if len(features) > 1 else x
            features.append(act(code, conv(code, norm(code, y), 4)))
        return cat(code, features)
    layers = [f"nn.Conv{code.dims}d({x.channels + 4 * i}, 4, 3, 1, 1)" for i in range(2)]
    child = code.add_child(f"nn.ModuleList([{', '.join(layers)}])", "layers")
    code.lines += [f"features = [{x.name}]", f"for layer in {child}:"]
    code.lines.append("    features.append(F.relu(layer(torch.cat(features, 1))))")
    return code.let("torch.cat(features, 1)", x, channels=x.channels + 8)


def dense_list(code, x):
    """A dense layer that is handed the list of features, as in torchvision's DenseNet."""

    def write(c, m):
        joined = c.let("torch.cat(given, 1)", m, channels=x.channels + 4)
        return act(c, conv(c, norm(c, joined), 4))

    first = conv(code, x, 4)
    child, y = code.call_child(x, write, unpack="x = given[0]", hint="layer")
    new = code.let(f"{child}([{x.name}, {first.name}])", y)
    return cat(code, [x, first, new])


def split(code, x):
    half = x.channels // 2
    if half % 4:
        return plain(code, x)
    form = code.pick(
        "{x}.chunk(2, 1)", "torch.split({x}, {h}, 1)", "{x}[:, :{h}], {x}[:, {h}:]", "{x}.split([{h}, {h}], dim=1)"
    )
    left, right = (code.let(f"({form.format(x=x.name, h=half)})[{i}]", x, channels=half) for i in range(2))
    left, right = code.pick((left, right), (right, left))
    out = cat(code, [left, branch(code, right)])
    return code.let(f"shuffle({out.name})", out) if code.chance() else out


def nested(code, x):
    if code.depth > 1:
        return residual(code, x)
    child, y = code.call_child(x, lambda c, m: free(c, step(c, m)))
    out = code.let(f"{child}({x.name})", y)
    if code.chance() and (out.channels, out.level) == (x.channels, x.level):
        return add(code, out, x)
    return out


def twice(code, x):
    """One block that runs twice, under one name, under two, or twice in a Sequential."""
    child, y = again, _ = code.call_child(x, residual)
    kind = code.pick("twice", "alias", "sequential", "apart")
    if kind == "sequential":
        return code.let(f"{code.add_child(f'nn.Sequential({child}, {child})', 'blocks')}({x.name})", x)
    if kind == "alias":
        again = code.add_child(child, "again")
    middle = code.let(f"{child}({x.name})", x)
    return code.let(f"{again}({(conv(code, middle) if kind == 'apart' else middle).name})", y)


def unet(code, x):
    if x.level > 1:
        return residual(code, x)
    down = step(code, act(code, conv(code, x, 8, 2))) if code.depth < 2 else act(code, conv(code, x, 8, 2))
    up = code.let(f"F.interpolate({down.name}, size={x.name}.shape[2:])", down, level=x.level)
    if code.chance() and up.channels == x.channels:
        return add(code, up, x)
    return act(code, conv(code, cat(code, [x, up]), 8))


def exchange(code, x):
    """HRNet's stages: a list of maps goes in, its items are set anew, a list comes out."""
    other = conv(code, x)

    def write(c, m):
        second = c.let("given[1]", m)
        if c.chance():
            new = branch(c, m)
            c.lines.append(f"given[0] = {new.name}")
            first = c.let("given[0]", m)
        else:
            first = m
        total = add(c, first, branch(c, second))
        c.result = f"[{total.name}, {act(c, second).name}]"
        return total

    child, _ = code.call_child(x, write, unpack="x = given[0]", hint="stage")
    code.lines.append(f"maps = {child}([{x.name}, {other.name}])")
    left, right = (code.let(f"maps[{i}]", x) for i in range(2))
    return add(code, left, right) if code.chance() else cat(code, [left, right])


def mapping(code, x):
    """A child that is handed a dict, a tuple, a keyword or any number of maps, and may give a tuple."""
    other = branch(code, x)
    first, second, parameters, call = code.pick(
        ("given['a']", "given['b']", "", "{{'a': {}, 'b': {}}}"),
        ("given[0]", "given[1]", "", "({}, {})"),
        ("", "other", "x, other=None, *, scale=1.0", "{}, other={}"),
        ("", "others[0]", "x, *others", "{}, {}"),
    )

    def write(c, m):
        handed = c.let(second, m)
        out = add(c, m, branch(c, handed)) if c.chance() else cat(c, [m, act(c, handed)])
        c.result = f"({out.name}, {act(c, handed).name})" if c.chance() else ""
        return out

    child, y = code.call_child(x, write, parameters=parameters, unpack=first and f"x = {first}")
    called = f"{child}({call.format(x.name, other.name)})"
    return code.let(f"{called}[0]" if "return (" in code.classes[-1] else called, y)


def modes(code, x):
    y = branch(code, x)
    out = replace(x, name=f"v{len(code.maps)}")
    trained = code.pick("{x} + {y} * torch.rand(2, *[1] * DIMS)", "{x} + {y}", "{x} * 0.5 + {y}", "{x} + {y} + {y}")
    trained = trained.format(x=x.name, y=y.name).replace("DIMS", str(code.dims + 1))
    code.lines += ["if self.training:", f"    {out.name} = {trained}", "else:"]
    code.maps.append(out)
    return code.do(f"    {out.name} = {x.name} + {y.name}", out)


def attention(code, x):
    y = branch(code, x)
    fc = code.add_child(f"nn.Conv{code.dims}d({y.channels}, {y.channels}, 1)", "fc")
    dims = tuple(range(2, 2 + code.dims))
    y = code.let(f"{y.name} * torch.sigmoid({fc}({y.name}.mean({dims}, keepdim=True)))", y)
    return add(code, y, x)


def dual(code, x):
    """DPN: one part is added, the other is joined."""
    half = x.channels // 2
    if half % 4:
        return residual(code, x)
    y = branch(code, x)
    total = add(
        code, code.let(f"{x.name}[:, :{half}]", x, channels=half), code.let(f"{y.name}[:, :{half}]", y, channels=half)
    )
    rest = [code.let(f"{m.name}[:, {half}:]", m, channels=half) for m in (x, y)]
    return cat(code, [total, *rest])


def inception_residual(code, x):
    joined = inception(code, x)
    return act(code, add(code, scale(code, conv(code, joined, x.channels)), x))


def last(code, x):
    """ConvNeXt's block, or one whose maps are channels-last throughout."""
    order = [0, *range(2, 2 + code.dims), 1]
    back = [0, 1 + code.dims, *range(1, 1 + code.dims)]
    y = code.let(f"{x.name}.permute({order})", x, is_last=True)
    inner = conv(code, x) if code.chance() else code.let(f"{y.name}.permute({back})", x)
    z = code.let(f"{conv(code, inner).name}.permute({order})", y)
    z = code.let(f"{code.add_child(f'nn.LayerNorm({x.channels})', 'norm')}({z.name})", y)
    z = code.let(f"F.gelu({code.add_child(f'nn.Linear({x.channels}, {x.channels})', 'fc')}({z.name}))", y)
    z = add(code, scale(code, z), y) if code.chance() else cat(code, [y, z])
    return code.let(f"{z.name}.permute({back})", z, is_last=False)


def batchwise(code, x):
    """Two maps that go through one layer together, joined along the batch or the height."""
    other, dim = branch(code, x), code.pick(0, 2)
    child = code.add_child(f"nn.Conv{code.dims}d({x.channels}, {x.channels}, 3, 1, 1)")
    y = code.let(f"{child}(torch.cat([{x.name}, {other.name}], {dim})).chunk(2, {dim})[1]", x)
    return add(code, y, x)


def free(code, x):
    """Any statements over any maps: sums, joins, views, and operations in place."""
    for _ in range(code.pick(0, 1, 2, 3)):
        y = code.pick(*code.maps)
        kind = code.pick("layers", "sum", "join", "view", "clone", "scale", "act", "patch")
        if kind == "layers":
            y = branch(code, y) if not y.is_last else y
        elif kind == "sum":
            y = add(code, y, code.pick(*code.find_peers(y)))
        elif kind == "join":
            y = cat(code, [y, code.pick(*code.find_peers(y))])
        elif kind == "view":
            y = code.let(code.pick("{}.contiguous()", "{}[:]", "{}.view({}.shape)").replace("{}", y.name), y)
        elif kind == "clone":
            y = code.let(f"{y.name}.clone()", y)
        elif kind == "patch":  # only a part of the channels is written over
            code.do(f"{y.name}[..., :1].{code.pick('mul_(0.5)', 'add_(1)', 'relu_()')}", y)
        else:
            y = scale(code, y) if kind == "scale" else act(code, y)
        x = x if y.is_last else y
    return x


IDIOMS = (
    plain, residual, projected, three, inception, dense, dense_list, split, nested, twice, unet, exchange, mapping,
    modes, attention, dual, inception_residual, last, batchwise, free,
)  # fmt: skip


def step(code, x):
    return code.pick(*IDIOMS)(code, x)


@st.composite
def networks(draw):
    """Draw a network: a stem, some idioms (in the root, or each a child), and a head."""
    code = Code(draw, draw(st.sampled_from((2, 2, 2, 1, 3))), [], Map("x", 4))
    x = act(code, norm(code, conv(code, code.maps[0], code.pick(8, 16))))
    for _ in range(code.pick(1, 2, 3)):
        if code.chance():
            child, y = code.call_child(x, step, hint="stage")
            x = code.let(f"{child}({x.name})", y)
        else:
            x = step(code, x)
    if code.chance():
        x = free(code, x)
    fc, dims = code.add_child(f"nn.Linear({x.channels}, 5)", "head"), tuple(range(2, 2 + code.dims))
    if code.chance():
        code.finish("Net", "x", x, head=f"{fc}(x.mean({dims}))")
        return make_network(code)
    head = f"{fc}({x.name}.mean({dims}))"
    form = code.pick("{head}", "{x}", "[{x}, {y}]", "{{'out': {head}, 'map': {y}}}", "({x}, {head})")
    code.result = form.format(head=head, x=x.name, y=code.pick(*code.maps[1:]).name)
    code.finish("Net", "x", x)
    return make_network(code)
