import inspect

import pytest
import torch
from torch import nn

from se_inject import inject, optimize
from tests import nets


def source(module, example=(2, 16, 8, 8)):
    given = example if isinstance(example, tuple) and not isinstance(example[0], int) else torch.zeros(example)
    return inspect.getsource(type(inject(module, example=given)))


def test_the_code_reads_like_a_persons():
    assert (
        source(nets.ResidualInPlace())
        == '''\
class SEResidualInPlace(ResidualInPlace):
    """ResidualInPlace with squeeze-and-excitation: `se` gates bn2 at `out += x`."""

    def forward(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        out = F.relu(out, inplace=False)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.se(out, shortcut=x)
        return F.relu(out, inplace=True)
'''
    )


def test_branches_of_a_concatenation_keep_their_names():
    text = source(nets.Fire())
    assert "expand1x1 = F.relu(expand1x1, inplace=False)" in text
    assert "expand1x1, x = self.se(expand1x1, x)" in text
    assert "return torch.cat([expand1x1, x], 1)" in text


def test_layers_in_containers_are_indexed():
    assert "layers_0 = self.layers[0]([x])" in source(nets.Dense())


class Triple(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.layer(x), x * 2, x.mean()


@pytest.mark.parametrize(
    ("taken", "is_unpacked"),
    [
        ("a, b, c = self.triple(x)", True),
        ("a, b, _ = self.triple(x); c = 2", False),  # what is not used is not taken
        ("t = self.triple(x); a, b, c = t[0], t[1], t[2]", False),  # there may be more at another time
    ],
)
def test_what_the_code_takes_apart_is_taken_apart(taken, is_unpacked):
    names = {"nn": nn, "Triple": Triple}
    exec(
        "class Taking(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.triple, self.branch = Triple(), nn.Conv2d(16, 16, 1)\n"
        "    def forward(self, x):\n"
        f"        {taken}\n"
        "        return a * c + self.branch(b)\n",
        names,
    )
    [call] = [line for line in source(names["Taking"]()).splitlines() if "self.triple" in line]
    assert call.split("=")[0].count(",") == (2 if is_unpacked else 0)


def test_a_joint_block_is_written_as_before_when_it_is_optimized():
    model = inject(nets.Fire().eval(), example=torch.zeros(2, 16, 8, 8))
    fast = optimize(model, torch.zeros(2, 16, 8, 8))
    [unpacking] = [line for line in inspect.getsource(type(model)).splitlines() if "self.se(" in line]
    assert unpacking in inspect.getsource(type(fast)).splitlines()


def test_slices_are_written_as_slices():
    class Sliced(nets.Residual):
        def forward(self, x):
            return x[:, :8] + self.branch(x)[:, 8:, ::1]

    text = inspect.getsource(type(inject(Sliced(), r=8, example=torch.zeros(2, 16, 8, 8))))
    assert "= x[:, :8]" in text
    assert "[:, 8:, ::1]" in text


def test_two_modes_are_two_branches():
    text = source(nets.TrainBranch())
    assert "if self.training:" in text
    assert text.count("self.se(") == 2


def test_the_mode_is_asked_for_where_it_is_used():
    text = source(nets.Dropped())
    assert "self.training" in text
    assert "if self.training" not in text


def test_the_signature_is_kept_and_other_values_are_refused():
    model = inject(nets.Optional(), example=torch.zeros(2, 16, 8, 8))
    assert str(inspect.signature(model.forward)) == "(x, shortcut=None, *, children=None, scale=1.0)"
    x = torch.randn(2, 16, 8, 8)
    model(x, children=[x])  # never read, so of no consequence
    with pytest.raises(ValueError, match=r"the rewritten forward holds for scale=1\.0 alone"):
        model(x, scale=2.0)
    with pytest.raises(ValueError, match="the rewritten forward holds for shortcut=None alone"):
        model(x, x)


def test_sums_of_three_wait_for_both_branches():
    lines = [line.strip() for line in source(nets.SumOfThree()).splitlines()]
    assert lines[-4:] == ["b = self.b(x)", "a, b = self.se(a, b)", "a = x + a", "return a + b"]
