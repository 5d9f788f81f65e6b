"""Code of random CNNs: what is drawn is written down as classes and executed.

Channels are multiples of four and sizes are not, so that an oracle can tell them apart in any layout.
"""

import hashlib
import linecache
import re
import sys
import types
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

SIZES = (6, 3, 2)
PRELUDE = """\
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn


def drop_path(x, p, training):
    if not training:
        return x
    return x * torch.bernoulli(torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 1 - p)) / (1 - p)


def shuffle(x):
    n, c = x.shape[:2]
    return x.view(n, 2, c // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
"""


@dataclass(frozen=True)
class Network:
    """A network's code; its class is `Net`."""

    source: str
    dims: int

    def build(self):
        torch.manual_seed(0)
        return vars(self._execute())["Net"]()

    def make_input(self, batch=2, size=SIZES[0]):
        return torch.randn(batch, 4, *[size] * self.dims, generator=torch.Generator().manual_seed(0))

    def _execute(self):
        name = f"tests.random_net_{hashlib.sha256(self.source.encode()).hexdigest()[:16]}"
        if name not in sys.modules:
            module = types.ModuleType(name)
            exec(compile(self.source, f"<{name}>", "exec"), vars(module))
            linecache.cache[f"<{name}>"] = (len(self.source), None, self.source.splitlines(keepends=True), name)
            sys.modules[name] = module  # pickle and inspect look there
        return sys.modules[name]

    def __repr__(self):
        return f"Network of {self.dims} dimensions\n{self.source.removeprefix(PRELUDE)}"

    def _repr_pretty_(self, printer, cycle):  # hypothesis has its own way with dataclasses
        for line in repr(self).splitlines():
            printer.text(line)
            printer.break_()


@dataclass(frozen=True)
class Map:
    """A variable of the code that holds a feature map; `level` counts the strides before it."""

    name: str
    channels: int
    level: int = 0
    is_last: bool = False


class Code:
    """A class that is being written: the lines of its forward so far, its children, and the maps that it may read."""

    def __init__(self, draw, dims, classes, x, *, depth=0, may_stride=True):
        self.draw, self.dims, self.classes, self.depth, self.may_stride = draw, dims, classes, depth, may_stride
        self.children, self.lines, self.maps, self.result = {}, [], [x], ""
        self.written = {}  # the line from which on a variable has its value

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def chance(self):
        return self.draw(st.booleans())

    def add_child(self, expression, hint="conv"):
        name = f"{hint}{len(self.children) + 1}"
        self.children[name] = expression
        return f"self.{name}"

    def let(self, expression, like, **changes):
        """Assign an expression to a new variable."""
        self.maps.append(replace(like, name=f"v{len(self.maps)}", **changes))
        return self.do(f"{self.maps[-1].name} = {expression}", self.maps[-1])

    def do(self, line, changed):
        """Write a statement that changes a variable, and return that variable."""
        self.lines.append(line)
        self.written[changed.name] = len(self.lines)
        return changed

    def is_read(self, x):
        rest = [*self.lines[self.written.get(x.name, 0) :], self.result]
        return any(re.search(rf"\b{x.name}\b", line) for line in rest)

    def find_peers(self, x):
        return [m for m in self.maps if (m.channels, m.level, m.is_last) == (x.channels, x.level, x.is_last)]

    def finish(self, name, parameters, out, *, head=""):
        """Write the class. What nobody has read goes into the result, so that gradients come from everywhere.

        With a `head`, an expression over what is given above it, the class has timm's `forward_features`.
        """
        unread = [m.name for m in self.maps if m.name != out.name and not self.is_read(m)]
        self.lines += [f"{out.name} = {out.name} + {name}.mean()" for name in unread]
        start = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        children = [f"        self.{k} = {v}" for k, v in self.children.items()]
        method = "forward_features" if head else "forward"
        body = [f"        {line}" for line in (*self.lines, f"return {self.result or out.name}")]
        lines = [*start, *children, "", f"    def {method}(self, {parameters}):", *body]
        if head:
            lines += ["", f"    def forward(self, {parameters}):", f"        x = self.forward_features({parameters})"]
            lines.append(f"        return {head}")
        self.classes.append("\n".join(lines))
        return name

    def call_child(self, x, write, *, parameters="x", unpack="", hint="block", may_stride=True):
        """Write a class of its own, in which `write` is given its code and its input.

        Returns:
            The child that holds it, and what `write` gave.
        """
        may_stride = may_stride and self.may_stride
        inner = replace(x, name="x")
        code = Code(self.draw, self.dims, self.classes, inner, depth=self.depth + 1, may_stride=may_stride)
        code.lines += [unpack] if unpack else []
        out = write(code, inner)
        name = code.finish(f"Block{len(self.classes) + 1}", "given" if unpack else parameters, out)
        return self.add_child(f"{name}()", hint), out


def make_network(code):
    return Network("\n\n\n".join([PRELUDE.rstrip(), *code.classes]) + "\n", code.dims)
