"""The laws of ConvForm, each exact to the last bit: small integers in float64 and ``==``.

Every check compares three things: what torch's own layers compute, the form's ``apply``, and the sum in the
docstring of :mod:`passes.algebra.conv_form` written out index by index. A failing property prints :class:`Geometry`
values; pasting them into ``Geometry(...).form()`` rebuilds the same weights.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from passes.algebra import conv_form, grid, kernels
from passes.algebra.conv_form import ConvForm, Ints
from passes.refusal import Reason, RefusalError

CONV = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MODES = ("zeros", "reflect", "replicate", "circular")
Pairs = tuple[tuple[int, int], ...]

# ---------------------------------------------------------------- material


def integers(*shape: int, seed: int, low: int = -3, device: str = "cpu") -> Tensor:
    """Whole numbers from ``low`` to 3 in float64: every sum of products in these tests is exact."""
    numbers = torch.randint(low, 4, shape, generator=torch.Generator().manual_seed(seed))
    return numbers.double().to(device)


@dataclass(frozen=True)
class Geometry:
    """A convolution in numbers alone; the weights follow from the seed."""

    inp: int
    out: int
    groups: int
    kernel: Ints
    stride: Ints
    dilation: Ints
    padding: Pairs
    mode: str = "zeros"
    bias: bool = True
    seed: int = 0

    def form(self, device: str = "cpu") -> ConvForm:
        return ConvForm.conv(
            integers(self.out, self.inp // self.groups, *self.kernel, seed=self.seed, device=device),
            integers(self.out, seed=self.seed + 1, low=1, device=device) if self.bias else None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            mode=self.mode,
        )


def conv(inp: int, out: int, kernel: Ints, *, padding: int | tuple[int, int] = 0, **options: object) -> ConvForm:
    """A form written briefly, for the cases that are listed by hand."""
    n = len(kernel)
    pair = (padding, padding) if isinstance(padding, int) else padding
    defaults: dict = {"groups": 1, "stride": (1,) * n, "dilation": (1,) * n}
    return Geometry(inp, out, kernel=kernel, padding=(pair,) * n, **{**defaults, **options}).form()


def pad(x: Tensor, pairs: Pairs, mode: str = "zeros") -> Tensor:
    """Torch's padding, then a slice where a number is negative."""
    grow = [max(p, 0) for pair in reversed(pairs) for p in pair]
    x = F.pad(x, grow) if mode == "zeros" else F.pad(x, grow, mode=mode)
    for axis, (lead, trail) in enumerate(pairs, start=2):
        start = max(-lead, 0)
        x = x.narrow(axis, start, x.shape[axis] - start - max(-trail, 0))
    return x


def definition(form: ConvForm, x: Tensor) -> Tensor:
    """``bias + sum_k weight[:, :, k] x[o * stride + offset + dilation * k]``, index by index."""
    sizes = form.out_size(x.shape[2:])
    for i in reversed(range(form.n)):
        o, k = torch.arange(sizes[i])[:, None], torch.arange(form.kernel[i])
        at = (o * form.stride[i] + form.offset[i] + form.dilation[i] * k).flatten()
        size = (x.shape[2 + i] - 1) * form.up[i] + 1
        inside = (at >= 0) & (at < size) if form.mode == "zeros" else torch.ones_like(at, dtype=torch.bool)
        if form.mode == "reflect":
            at = at % (2 * size - 2)
            at = torch.minimum(at, 2 * size - 2 - at)
        elif form.mode == "circular":
            at = at % size
        at = at.clamp(0, size - 1)
        real = inside & (at % form.up[i] == 0)
        x = x.index_select(2 + i, at // form.up[i]) * real.double().reshape(-1, *(1,) * (form.n - 1 - i) * 2)
        x = x.unflatten(2 + i, (sizes[i], form.kernel[i]))
    taps_last = [2 + 2 * i for i in range(form.n)] + [3 + 2 * i for i in range(form.n)]
    windows = x.permute(0, 1, *taps_last).reshape(x.shape[0], form.groups, -1, math.prod(sizes), math.prod(form.kernel))
    weight = form.weight.reshape(form.groups, -1, form.weight.shape[1], math.prod(form.kernel))
    y = torch.einsum("bgipk,goik->bgop", windows, weight).reshape(x.shape[0], -1, *sizes)
    return y if form.bias is None else y + form.bias.reshape(-1, *(1,) * form.n)


def assert_computes(form: ConvForm, expected: Tensor, x: Tensor) -> None:
    """``form`` turns ``x`` into ``expected``: by its definition, by ``apply``, and in the size it announces."""
    assert form.out_size(x.shape[2:]) == tuple(expected.shape[2:]), f"announced size, {form}"
    for name, y in (("definition", definition(form, x)), ("apply", form.apply(x))):
        assert y.shape == expected.shape, f"{name} gives {tuple(y.shape)}, wanted {tuple(expected.shape)}"
        wrong = (y != expected).nonzero().tolist()
        assert not wrong, f"{name} differs in {len(wrong)} of {y.numel()} numbers, first at {wrong[0]}, {form}"


def outcome(law: Callable[[], ConvForm]) -> ConvForm | Reason:
    try:
        return law()
    except RefusalError as error:
        return error.refusal.reason


# ---------------------------------------------------------------- random geometry

seeds = st.integers(0, 999)
channels = st.sampled_from([2, 4, 6])
dimensions = st.integers(0, 3)
spatial = st.integers(1, 3)
any_pads = st.tuples(st.integers(-1, 2), st.integers(-1, 2))
crops = st.tuples(st.integers(-1, 0), st.integers(-1, 0))
any_mode = st.sampled_from(MODES)
any_kernel = st.integers(1, 3)
any_stride = st.sampled_from([1, 1, 2, 3])
flags = st.booleans()
thorough = settings(max_examples=200)


def per_dim(n: int, values: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(*[values] * n)


@st.composite
def geometries(
    draw: st.DrawFn,
    n: int,
    inp: int,
    out: int,
    *,
    kernels: st.SearchStrategy = any_kernel,
    strides: st.SearchStrategy = any_stride,
    pads: st.SearchStrategy = any_pads,
    modes: st.SearchStrategy = any_mode,
    bias: st.SearchStrategy = flags,
) -> Geometry:
    return Geometry(
        inp,
        out,
        draw(st.sampled_from([g for g in range(1, inp + 1) if inp % g == 0 and out % g == 0])),
        draw(per_dim(n, kernels)),
        draw(per_dim(n, strides)),
        draw(per_dim(n, st.integers(1, 2))),
        draw(per_dim(n, pads)),
        draw(modes),
        draw(bias),
        draw(seeds),
    )


@dataclass(frozen=True)
class Case:
    """One or two convolutions and the size of their input."""

    first: Geometry
    second: Geometry | None
    size: Ints

    def input(self) -> Tensor:
        return integers(2, self.first.inp, *self.size, seed=self.first.seed + 2)

    def forms(self, device: str = "cpu") -> tuple[ConvForm, ConvForm]:
        assert self.second is not None
        return self.first.form(device), self.second.form(device)


def sizes(draw: st.DrawFn, n: int, *chains: list[Geometry]) -> Ints:
    """A size large enough for each chain of convolutions, plus up to three pixels per dimension."""

    def fits(size: Ints, chain: list[Geometry]) -> bool:
        for g in chain:
            form = g.form("meta")
            if g.mode != "zeros" and any(max(a, b) >= s for (a, b), s in zip(g.padding, size, strict=True)):
                return False
            size = form.out_size(size)
            if any(s < 1 for s in size):
                return False
        return True

    least = next(s for s in range(3, 60) if all(fits((s,) * n, chain) for chain in chains))
    return tuple(least + more for more in draw(per_dim(n, st.integers(0, 3))))


@st.composite
def singles(draw: st.DrawFn, n: st.SearchStrategy = dimensions, **options: st.SearchStrategy) -> Case:
    dims = draw(n)
    g = draw(geometries(dims, draw(channels), draw(channels), **options))
    return Case(g, None, sizes(draw, dims, [g]))


@st.composite
def sequences(draw: st.DrawFn) -> Case:
    """Two convolutions, one after the other, with nothing done to make them combine."""
    n, middle = draw(dimensions), draw(channels)
    first = draw(geometries(n, draw(channels), middle))
    second = draw(geometries(n, middle, draw(channels)))
    return Case(first, second, sizes(draw, n, [first, second]))


@st.composite
def foldable_sequences(draw: st.DrawFn) -> Case:
    """Two convolutions that one convolution can replace exactly, in each of the ways that the law of then names."""
    n, middle = draw(dimensions), draw(channels)
    one, none, nothing = st.just(1), st.just(False), st.just((0, 0))
    first_options, second_options = draw(
        st.sampled_from(
            [
                ({}, {"pads": crops}),
                # one tap, no bias: what lies outside stays zero
                (
                    {"kernels": one, "bias": none, "modes": st.just("zeros"), "pads": st.just((0, 1))},
                    {"modes": st.just("zeros")},
                ),
                ({"kernels": one, "bias": none, "pads": nothing}, {"modes": st.just("zeros")}),
                # pointwise: commutes with every continuation
                (
                    {"kernels": one, "strides": one, "pads": nothing},
                    {"modes": st.sampled_from(MODES[1:]), "pads": st.just((2, 1))},
                ),
            ]
        )
    )
    first = draw(geometries(n, draw(channels), middle, **first_options))
    second = draw(geometries(n, middle, draw(channels), **second_options))
    return Case(first, second, sizes(draw, n, [first, second]))


@st.composite
def branches(draw: st.DrawFn, same_out: bool = True) -> Case:
    """Two convolutions over one input whose outputs have the same size, whatever their kernels."""
    n, inp, out = draw(dimensions), draw(channels), draw(channels)
    first = draw(geometries(n, inp, out))
    second = draw(geometries(n, inp, out if same_out else draw(channels)))
    extent = first.form("meta").extent
    padding = []
    for i, (lead, _) in enumerate(second.padding):
        span = second.dilation[i] * (second.kernel[i] - 1) + 1
        padding.append((lead, extent[i] + span - lead))
    second = replace(second, stride=first.stride, padding=tuple(padding))
    if all(g.form("meta").reads_outside for g in (first, second)):
        second = replace(second, mode=first.mode)
    return Case(first, second, sizes(draw, n, [first], [second]))


# ---------------------------------------------------------------- the canonical form


@thorough
@given(singles())
def test_conv_is_torchs_convolution(case: Case) -> None:
    g, x = case.first, case.input()
    form = g.form()
    if form.n == 0:
        dense = form.widen(1)
        expected = F.linear(x, dense.weight, dense.bias)
    else:
        padded = pad(x, g.padding, g.mode)
        expected = CONV[form.n](padded, form.weight, form.bias, g.stride, 0, g.dilation, g.groups)
    assert_computes(form, expected, x)


@dataclass(frozen=True)
class Transposed:
    """The arguments of a transposed convolution from 4 to 8 channels."""

    groups: int
    kernel: Ints
    stride: Ints
    padding: Ints
    output_padding: Ints
    dilation: Ints
    seed: int

    @staticmethod
    @st.composite
    def strategy(draw: st.DrawFn) -> Transposed:
        n = draw(spatial)
        stride, dilation = draw(per_dim(n, spatial)), draw(per_dim(n, st.integers(1, 2)))
        return Transposed(
            draw(st.sampled_from([1, 2, 4])),
            draw(per_dim(n, any_kernel)),
            stride,
            draw(per_dim(n, st.integers(0, 2))),
            tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
            dilation,
            draw(seeds),
        )


@thorough
@given(Transposed.strategy())
def test_transposed_is_torchs_transposed_convolution(case: Transposed) -> None:
    n = len(case.kernel)
    weight = integers(4, 8 // case.groups, *case.kernel, seed=case.seed)
    bias, x = integers(8, seed=case.seed + 1), integers(2, 4, *range(5, 5 + n), seed=case.seed + 2)
    options = {name: getattr(case, name) for name in ("groups", "stride", "padding", "output_padding", "dilation")}
    form = ConvForm.transposed(weight, bias, **options)
    expected = CONV_TRANSPOSE[n](x, weight, bias, **options)
    assert_computes(form, expected, x)

    scale, shift = integers(8, seed=case.seed + 3), integers(8, seed=case.seed + 4)
    view = (-1, *(1,) * n)
    assert_computes(form.affine(scale, shift), expected * scale.view(view) + shift.view(view), x)
    mixing = conv(8, 3, (1,) * n)
    assert_computes(form.then(mixing), mixing.apply(expected), x)
    before = conv(6, 4, (1,) * n, groups=2, bias=False, mode="circular")  # it reads nothing outside: no matter
    x = integers(2, 6, *range(5, 5 + n), seed=case.seed + 5)
    assert_computes(before.then(form), form.apply(before.apply(x)), x)


@pytest.mark.parametrize("kernel", [(4,), (2, 4), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_average_is_torchs_pooling(kernel: Ints, padding: int, stride: int) -> None:
    n, padding = len(kernel), min(padding, min(kernel) // 2)  # kernels of 2 and 4: 1 / k is exact
    x = integers(2, 3, *range(7, 7 + n), seed=1)
    form = ConvForm.average(3, kernel, (stride,) * n, (padding,) * n)
    assert_computes(form, AVG_POOL[n](x, kernel, stride, padding), x)


@pytest.mark.parametrize("n", [2, 3])
def test_average_with_a_divisor_of_its_own(n: int) -> None:
    x = integers(2, 3, *range(7, 7 + n), seed=1)
    form = ConvForm.average(3, (3,) * n, (2,) * n, (1,) * n, divisor=2)
    assert_computes(form, AVG_POOL[n](x, 3, 2, 1, divisor_override=2), x)


@given(spatial)
def test_identity_returns_its_input(n: int) -> None:
    x = integers(2, 4, *range(3, 3 + n), seed=1)
    form = ConvForm.identity(4, n)
    assert form.is_pointwise
    assert form.is_depthwise
    assert_computes(form, x, x)


def test_facts_of_a_convolution() -> None:
    form = conv(4, 8, (3, 2), groups=2, stride=(2, 1), dilation=(2, 1), padding=(1, 3))
    assert (form.n, form.kernel, form.in_channels, form.out_channels) == (2, (3, 2), 4, 8)
    assert (form.lead, form.trail) == ((1, 1), (3, 3))
    assert form.reads_outside
    assert not form.is_pointwise
    assert not form.is_depthwise
    assert form.numbers == 8 * 2 * 6 + 8
    assert form.multiply_adds == 8 * 2 * 6 / 2
    assert ConvForm.transposed(integers(4, 2, 3, seed=0), stride=2).rate == 2
    assert conv(4, 8, (3,)) not in [conv(4, 8, (3,))]  # a form is no value: compared by identity, never by ==
    assert not conv(4, 4, (1,), stride=(2,)).is_pointwise
    assert not conv(4, 4, (1,), padding=(-1, 0)).is_pointwise
    assert not conv(4, 4, (1,), padding=(0, -1)).is_pointwise


def test_apply_in_float32_stays_within_the_absolute_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64)
    form = ConvForm.conv(weight, torch.randn(8, generator=generator, dtype=torch.float64), padding=1)
    x = torch.randn(2, 4, 9, 9, generator=generator, dtype=torch.float64)
    error = (form.apply(x.float()).double() - form.apply(x)).abs()
    terms = form.weight[0].numel() + 1  # each product and each sum rounds once, inputs were rounded before
    assert bool((error <= (terms + 2) * torch.finfo(torch.float32).eps * form.apply(x, absolute=True)).all())


# ---------------------------------------------------------------- the laws


@thorough
@given(branches())
def test_sum(case: Case) -> None:
    (a, b), x = case.forms(), case.input()
    assert_computes(a + b, a.apply(x) + b.apply(x), x)


@thorough
@given(branches(same_out=False), st.randoms(use_true_random=False))
def test_concat_and_rows(case: Case, random) -> None:
    (a, b), x = case.forms(), case.input()
    both = ConvForm.concat([a, b, a])
    expected = torch.cat([a.apply(x), b.apply(x), a.apply(x)], 1)
    assert_computes(both, expected, x)
    order = [random.randrange(both.out_channels) for _ in range(5)]
    assert_computes(both.rows(order), expected[:, order], x)
    assert_computes(a.rows(range(a.out_channels)), a.apply(x), x)
    assert_computes(both.narrowed(), expected, x)


@thorough
@given(foldable_sequences())
def test_then(case: Case) -> None:
    (a, b), x = case.forms(), case.input()
    assert_computes(a.then(b), b.apply(a.apply(x)), x)


@settings(max_examples=300)
@given(sequences())
def test_then_is_exact_or_refused(case: Case) -> None:
    (a, b), x = case.forms(), case.input()
    folded = outcome(lambda: a.then(b))
    if isinstance(folded, ConvForm):
        assert_computes(folded, b.apply(a.apply(x)), x)
    else:
        assert folded in {Reason.BORDER, Reason.PAD_VALUE, Reason.PAD_MODE}
        assert b.reads_outside


@thorough
@given(singles(), st.data())
def test_pad_is_exact_or_refused(case: Case, data: st.DataObject) -> None:
    form, x = case.first.form(), case.input()
    pads = data.draw(per_dim(form.n, any_pads))
    lead, trail = tuple(a for a, _ in pads), tuple(b for _, b in pads)
    y = form.apply(x)
    if any(a + b + s < 1 for (a, b), s in zip(pads, y.shape[2:], strict=True)):
        return
    bias = torch.zeros(form.out_channels).double() if form.bias is None else form.bias
    column = bias.reshape(-1, *(1,) * form.n)
    for value, expected in ((0.0, pad(y, pads)), (bias, pad(y - column, pads) + column)):
        padded = outcome(lambda value=value: form.pad(lead, trail, value))
        if isinstance(padded, ConvForm):
            assert_computes(padded, expected, x)
        else:
            assert padded in {Reason.BORDER, Reason.PAD_VALUE, Reason.PAD_MODE}
            assert any(p > 0 for pair in pads for p in pair)
            exact = not (form.reads_outside and form.mode != "zeros") and form.kernel == (1,) * form.n
            if exact and all(p >= 0 for pair in case.first.padding for p in pair):
                assert padded is Reason.PAD_VALUE  # one tap, never cropped: only the value can be wrong
                assert value is not bias


@given(singles(modes=st.just("zeros"), bias=st.just(False)), st.data())
def test_border_is_refused_exactly_where_the_fold_would_be_wrong(case: Case, data: st.DataObject) -> None:
    form = case.first.form()
    form = replace(form, weight=form.weight.abs() + 1)
    pads = data.draw(per_dim(form.n, any_pads))
    lead, trail = tuple(a for a, _ in pads), tuple(b for _, b in pads)
    unchecked = replace(
        form,
        offset=tuple(o - p * s for o, p, s in zip(form.offset, lead, form.stride, strict=True)),
        extent=tuple(e + (a + b) * s for e, (a, b), s in zip(form.extent, pads, form.stride, strict=True)),
    )
    wrong = False
    for more in range(6, 12):  # every remainder of the strides, and room for the whole kernel
        x = torch.ones(1, form.in_channels, *(s + more for s in case.size)).double()
        wrong |= not torch.equal(unchecked.apply(x), pad(form.apply(x), pads))
    assert (outcome(lambda: form.pad(lead, trail)) is Reason.BORDER) == wrong


@thorough
@given(singles(n=spatial, kernels=st.just(1), strides=st.just(1), pads=st.just((0, 0))), st.sampled_from(MODES[1:]))
def test_pad_mode_and_crop(case: Case, mode: str) -> None:
    form, x = case.first.form(), case.input()
    n = form.n
    padded, expected = form.pad_mode((2,) * n, (1,) * n, mode), pad(form.apply(x), ((2, 1),) * n, mode)
    assert_computes(padded, expected, x)
    # the continuation is that of the whole input, also where the other end is cropped
    assert_computes(padded.pad((-3,) * n, (0,) * n), pad(expected, ((-3, 0),) * n), x)
    assert_computes(padded.pad((0,) * n, (-2,) * n), pad(expected, ((0, -2),) * n), x)


@given(singles())
def test_affine_and_negation(case: Case) -> None:
    form, x = case.first.form(), case.input()
    scale, shift = integers(form.out_channels, seed=3), integers(form.out_channels, seed=4)
    column = (-1, *(1,) * form.n)
    y = form.apply(x)
    assert_computes(form.affine(scale, None), y * scale.view(column), x)
    assert_computes(form.affine(None, shift), y + shift.view(column), x)
    assert_computes(form.affine(scale, shift), y * scale.view(column) + shift.view(column), x)
    assert_computes(-form, -y, x)


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]), dimensions)
def test_narrowed_finds_the_most_groups(first: int, second: int, n: int) -> None:
    a, b = (Geometry(12, 12, g, (2,) * n, (1,) * n, (1,) * n, ((0, 0),) * n).form() for g in (first, second))
    a, b = (replace(f, weight=f.weight.abs() + 1) for f in (a, b))  # no zeros but those between the blocks
    both = a + b
    assert both.groups == both.narrowed().groups == math.gcd(first, second)
    shuffled = ConvForm.concat([a.rows(range(6)), a.rows(range(6, 12))])
    assert shuffled.groups == 1
    assert shuffled.narrowed().groups == first
    assert torch.equal(shuffled.narrowed().weight, a.weight)
    assert (a + shuffled).narrowed().groups == (shuffled + a).narrowed().groups == first
    assert shuffled.then(ConvForm.identity(12, n)).narrowed().groups == first
    assert ConvForm.identity(12, n).then(shuffled).narrowed().groups == first


@settings(deadline=None)
@given(
    cuts=st.lists(st.sampled_from([3, 6, 9]), unique=True, max_size=3),
    inside=st.lists(st.sampled_from([1, 3]), min_size=4, max_size=4),
    front=st.sampled_from([1, 2, 3, 4, 6, 12]),
    behind=st.sampled_from([None, 1, 2, 3, 4, 6, 12]),
    shuffle=st.sampled_from([None, 2, 3, 4]),
    added=st.sampled_from([None, 1, 3, 12]),
)
def test_shapes_alone_bound_the_groups_that_zeros_show(
    cuts: list[int], inside: list[int], front: int, behind: int | None, shuffle: int | None, added: int | None
) -> None:
    """Split channels, a layer for each part, put together, shuffled, then another: what planning hopes for holds."""
    generator = torch.Generator().manual_seed(0)

    def layer(channels: int, groups: int) -> ConvForm:
        shape = (channels, channels // groups, 3)
        return ConvForm.conv(torch.rand(shape, generator=generator, dtype=torch.float64) + 1, groups=groups)

    whole = layer(12, front)
    edges = [0, *sorted(cuts), 12]
    parts = [
        replace(whole, bias=None)
        .rows(range(a, b))
        .then(ConvForm.conv(integers(b - a, (b - a) // g, 1, seed=g, low=1), groups=g))
        for a, b, g in zip(edges, edges[1:], inside, strict=False)
    ]
    form = ConvForm.concat(parts)
    if added is not None:
        form = form + layer(12, added)
    if shuffle is not None:
        form = form.rows([i + j * (12 // shuffle) for i in range(12 // shuffle) for j in range(shuffle)])
    if behind is not None:
        form = form.then(ConvForm.conv(integers(12, 12 // behind, 1, seed=5, low=1), groups=behind))
    planned = form.to("meta")
    assert form.narrowed().groups <= planned.most_groups
    if behind == 1:  # nothing comes back behind a layer that mixes all channels
        assert planned.most_groups == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_shuffle_and_back_is_the_identity_on_forms(groups: int) -> None:
    form = conv(4, 6, (3, 3), groups=groups, padding=1)
    order = [0, 3, 1, 4, 2, 5]
    back = form.rows(order).rows([order.index(i) for i in range(6)])
    assert torch.equal(back.weight, form.widen(1).weight)
    assert torch.equal(back.bias, form.bias)


def test_dilated_branch_meets_a_large_kernel_on_one_grid() -> None:
    """Dilated re-parameterisation: 5x5 plus a dilated 3x3 is a 5x5; three parallel sizes share the largest."""
    large, dilated = conv(4, 4, (5, 5), groups=4, padding=2), conv(4, 4, (3, 3), groups=4, dilation=(2, 2), padding=2)
    both = large + dilated
    assert (both.kernel, both.dilation, both.groups) == ((5, 5), (1, 1), 4)
    lone = dilated + ConvForm.identity(4, 2)
    assert (lone.kernel, lone.dilation) == ((3, 3), (2, 2))  # the centre lies on the dilated grid: nothing is stuffed


def test_pointwise_then_padded_with_its_bias_then_kernel() -> None:
    """F3 as the diverse branch block has it: 1x1 with bias, padded with that bias, then a 3x3 without padding."""
    one, three = conv(4, 6, (1, 1)), conv(6, 4, (3, 3))
    x = integers(2, 4, 7, 8, seed=5)
    column = one.bias.reshape(-1, 1, 1)
    expected = three.apply(F.pad(one.apply(x) - column, [1] * 4) + column)
    assert_computes(one.pad((1, 1), (1, 1), one.bias).then(three), expected, x)


@given(foldable_sequences(), seeds)
def test_sum_distributes_over_then(case: Case, number: int) -> None:
    """Before a common layer or after one: folding order does not matter."""
    (a, c), x = case.forms(), case.input()
    b = replace(case.first, seed=number).form()
    linear = replace(c, bias=None)
    assert_computes((a + b).then(linear), a.then(linear).apply(x) + b.then(linear).apply(x), x)


# ---------------------------------------------------------------- refusals

REFUSALS: dict[str, tuple[Reason, Callable[[], object]]] = {
    "sum, inputs differ": (Reason.CHANNELS, lambda: conv(4, 4, (3,)) + conv(2, 4, (3,))),
    "sum, outputs differ": (Reason.CHANNELS, lambda: conv(4, 4, (3,)) + conv(4, 2, (3,))),
    "then, channels differ": (Reason.CHANNELS, lambda: conv(4, 4, (3,)).then(conv(2, 4, (3,)))),
    "then, dimensions differ": (Reason.CHANNELS, lambda: conv(4, 4, (3,)).then(conv(4, 4, (3, 3)))),
    "concat, inputs differ": (Reason.CHANNELS, lambda: ConvForm.concat([conv(4, 4, (3,)), conv(2, 4, (3,))])),
    "sum, strides differ": (Reason.GEOMETRY, lambda: conv(4, 4, (3,), stride=(2,)) + conv(4, 4, (3,))),
    "sum, sizes differ": (Reason.GEOMETRY, lambda: conv(4, 4, (3,), padding=1) + conv(4, 4, (3,))),
    "sum, dimensions differ": (Reason.GEOMETRY, lambda: conv(4, 4, (3,)) + conv(4, 4, (3, 3))),
    "sum, one is transposed": (
        Reason.GEOMETRY,
        lambda: ConvForm.transposed(integers(4, 4, 1, seed=0), stride=2) + conv(4, 4, (1,)),
    ),
    "concat, sizes differ": (
        Reason.GEOMETRY,
        lambda: ConvForm.concat([conv(4, 4, (3,)), conv(4, 4, (2,))]),
    ),
    "sum, modes differ": (
        Reason.PAD_MODE,
        lambda: conv(4, 4, (3,), padding=1, mode="reflect") + conv(4, 4, (3,), padding=1),
    ),
    "pad, after another mode": (
        Reason.PAD_MODE,
        lambda: conv(4, 4, (3,), padding=1, mode="circular", bias=False).pad((1,), (1,)),
    ),
    "pad_mode, after a kernel": (Reason.PAD_MODE, lambda: conv(4, 4, (3,)).pad_mode((1,), (1,), "reflect")),
    "then, padding mode after a stride": (
        Reason.PAD_MODE,
        lambda: conv(4, 4, (1,), stride=(2,)).then(conv(4, 4, (3,), padding=1, mode="replicate")),
    ),
    "then, kernel after transposed": (
        Reason.TRANSPOSED,
        lambda: ConvForm.transposed(integers(4, 4, 3, seed=0), stride=2).then(conv(4, 4, (3,))),
    ),
    "then, transposed after kernel": (
        Reason.TRANSPOSED,
        lambda: conv(4, 4, (3,), bias=False).then(ConvForm.transposed(integers(4, 4, 3, seed=0), stride=2)),
    ),
    "then, transposed after bias": (
        Reason.TRANSPOSED,
        lambda: conv(4, 4, (1,)).then(ConvForm.transposed(integers(4, 4, 3, seed=0), stride=2)),
    ),
    "then, zero padding between two kernels": (
        Reason.BORDER,
        lambda: conv(4, 4, (3, 3), bias=False).then(conv(4, 4, (3, 3), padding=1)),
    ),
    "pad, a crop undone in front": (Reason.BORDER, lambda: conv(4, 4, (1,), padding=(-1, 0)).pad((1,), (0,))),
    "pad, a crop undone behind": (Reason.BORDER, lambda: conv(4, 4, (1,), padding=(0, -1)).pad((0,), (1,))),
    "then, zero padding after a bias": (
        Reason.PAD_VALUE,
        lambda: conv(4, 4, (1, 1)).then(conv(4, 4, (3, 3), padding=1)),
    ),
    "pad, one without a bias": (Reason.PAD_VALUE, lambda: conv(4, 4, (1,), bias=False).pad((1,), (1,), 1.0)),
    "pad, bias is not a number": (
        Reason.PAD_VALUE,
        lambda: conv(4, 4, (1,)).affine(None, torch.full((4,), math.nan).double()).pad((1,), (1,)),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    reason, law = REFUSALS[name]
    with pytest.raises(RefusalError) as caught:
        law()
    assert caught.value.refusal.reason is reason
    assert caught.value.refusal.message


def test_every_refusal_of_the_algebra_is_listed() -> None:
    source = "".join(map(inspect.getsource, (conv_form, grid, kernels)))
    written = set(re.findall(r"Reason\.([A-Z_]+)", source))
    assert written == {reason.name for reason, _ in REFUSALS.values()}


@pytest.mark.parametrize("bias", [False, True], ids=["kernel before the padding", "bias before the padding"])
def test_what_is_refused_would_be_wrong_at_the_border_only(bias: bool) -> None:
    """F7: the fold without the check agrees inside and differs at the border, so the refusal is deserved."""
    first = conv(4, 4, (1, 1) if bias else (3, 3), padding=0 if bias else 1, bias=bias)
    second, x = conv(4, 4, (3, 3), padding=1), integers(1, 4, 8, 8, seed=3)
    unchecked = replace(
        first, offset=tuple(o - 1 for o in first.offset), extent=tuple(e + 2 for e in first.extent)
    ).then(second._without_padding())
    difference = (unchecked.apply(x) - second.apply(first.apply(x))).abs().amax((0, 1))
    assert difference[1:-1, 1:-1].amax() == 0
    assert difference.amax() > 0


# ---------------------------------------------------------------- planning on shapes


def facts(result: ConvForm | Reason) -> object:
    """All of a form but its numbers."""
    if isinstance(result, Reason):
        return result
    names = ("stride", "dilation", "offset", "extent", "up", "groups", "mode", "widened")
    return (*(getattr(result, name) for name in names), tuple(result.weight.shape), result.bias is None)


def laws(case: Case, device: str) -> dict[str, ConvForm | Reason]:
    (a, b), n = case.forms(device), len(case.size)
    taps = ConvForm.average(a.out_channels, (2,) * n, (1,) * n, (0,) * n, like=a.weight)
    return {
        "sum": outcome(lambda: a + b),
        "concat": outcome(lambda: ConvForm.concat([a, b])),
        "then": outcome(lambda: a.then(b)),
        "pad": outcome(lambda: a.pad((1,) * n, (0,) * n)),
        "crop": outcome(lambda: a.pad((-1,) * n, (0,) * n)),
        "pad_mode": outcome(lambda: a.pad_mode((1,) * n, (2,) * n, "reflect")),
        "rows": outcome(lambda: a.rows([1, 0])),
        "average": outcome(lambda: a.then(taps)),
        "identity": outcome(lambda: a + ConvForm.identity(a.out_channels, n, like=a.weight)),
    }


@given(st.one_of(sequences(), branches(), foldable_sequences()))
def test_planning_on_meta_tensors_foretells_the_geometry(case: Case) -> None:
    planned, computed = laws(case, "meta"), laws(case, "cpu")
    for name, result in computed.items():
        if result is Reason.PAD_VALUE:
            continue  # the one refusal that needs numbers
        assert facts(planned[name]) == facts(result), name
        if isinstance(planned[name], ConvForm):
            assert planned[name].weight.device.type == "meta"
            assert planned[name].narrowed() is planned[name]


@pytest.mark.gpu
@settings(max_examples=30)
@given(st.one_of(sequences(), branches(), foldable_sequences()))
def test_the_algebra_on_a_gpu_gives_the_same_numbers(case: Case) -> None:
    for name, result in laws(case, "cuda").items():
        expected = laws(case, "cpu")[name]
        assert facts(result) == facts(expected), name
        if isinstance(result, ConvForm):
            assert result.weight.is_cuda
            assert torch.equal(result.weight.cpu(), expected.weight), name


# ---------------------------------------------------------------- gradients

Law = Callable[[ConvForm, ConvForm], ConvForm]
DIFFERENTIABLE: dict[str, tuple[Law, ConvForm, ConvForm]] = {
    "sum": (ConvForm.__add__, conv(2, 4, (3,), padding=1), conv(2, 4, (1,), groups=2)),
    "concat": (lambda a, b: ConvForm.concat([a, b]), conv(2, 4, (3,), padding=1), conv(2, 4, (1,), groups=2)),
    "then, kernels": (ConvForm.then, conv(2, 4, (3,), stride=(2,)), conv(4, 2, (2,), dilation=(2,))),
    "then, groups": (ConvForm.then, conv(4, 4, (2, 1), groups=2), conv(4, 8, (2, 3), groups=4)),
    "then, depthwise": (ConvForm.then, conv(4, 4, (2, 1), groups=4), conv(4, 2, (1, 3), groups=2)),
    "then, linear": (ConvForm.then, conv(2, 4, ()), conv(4, 3, ())),
    "pad": (
        lambda a, b: a.pad((1,), (2,), a.bias).then(b),
        conv(2, 4, (1,)),
        conv(4, 3, (3,)),
    ),
    "pad_mode": (ConvForm.then, conv(2, 4, (1,)), conv(4, 3, (3,), padding=1, mode="reflect")),
    "affine": (lambda a, b: a.affine(b.bias, b.bias) + b, conv(2, 4, (2,)), conv(2, 4, (2,))),
    "narrowed": (lambda a, b: ConvForm.concat([a, b]).rows([0, 1, 4, 5]).narrowed(), *[conv(2, 4, (2,))] * 2),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_equivalent_kernel_is_differentiable(name: str) -> None:
    """Autograd agrees with finite differences through every law: what online re-parameterisation trains with."""
    law, first, second = DIFFERENTIABLE[name]
    leaves = [t.clone().requires_grad_() for f in (first, second) for t in (f.weight, f.bias)]

    def kernel(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        w1, b1, w2, b2 = parameters
        folded = law(replace(first, weight=w1, bias=b1), replace(second, weight=w2, bias=b2))
        return folded.weight, folded.bias

    assert torch.autograd.gradcheck(kernel, leaves)


@settings(max_examples=30)
@given(st.one_of(branches().map(lambda c: ("sum", c)), foldable_sequences().map(lambda c: ("then", c))))
def test_gradients_through_the_kernel_are_those_of_the_branches(named: tuple[str, Case]) -> None:
    law, case = named
    (a, b), x = case.forms(), case.input()

    def gradients(folded: bool) -> list[Tensor]:
        leaves = [f.weight.clone().requires_grad_() for f in (a, b)]
        first, second = replace(a, weight=leaves[0]), replace(b, weight=leaves[1])
        if law == "sum":
            y = (first + second).apply(x) if folded else first.apply(x) + second.apply(x)
        else:
            y = first.then(second).apply(x) if folded else second.apply(first.apply(x))
        return list(torch.autograd.grad((y * integers(*y.shape, seed=9)).sum(), leaves))

    for through_kernel, through_branches in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(through_kernel, through_branches)


# ---------------------------------------------------------------- the checker itself


def _one_weight(form: ConvForm) -> ConvForm:
    weight = form.weight.clone()
    weight[-1, -1, -1, -1] += 1
    return replace(form, weight=weight)


DEFECTS: dict[str, Callable[[ConvForm], ConvForm]] = {
    "offset": lambda f: replace(f, offset=(f.offset[0] + 1, f.offset[1])),
    "extent": lambda f: replace(f, extent=(f.extent[0], f.extent[1] + 1)),
    "stride": lambda f: replace(f, stride=(f.stride[0] + 1, f.stride[1])),
    "dilation": lambda f: replace(f, dilation=(f.dilation[0], f.dilation[1] + 1)),
    "up": lambda f: replace(f, up=(2, 1)),
    "mode": lambda f: replace(f, mode="replicate"),
    "one weight": _one_weight,
    "no bias": lambda f: replace(f, bias=None),
    "one bias": lambda f: f.affine(None, torch.eye(f.out_channels).double()[0]),
    "swapped channels": lambda f: f.rows([1, 0, 2, 3]),
    "flipped kernel": lambda f: replace(f, weight=f.weight.flip(2)),
    "sign": lambda f: -f,
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_check_fails_on_a_planted_defect(name: str) -> None:
    form = conv(4, 4, (3, 3), groups=2, padding=1)
    x = integers(2, 4, 6, 7, seed=3)
    expected = F.conv2d(x, form.weight, form.bias, 1, 1, 1, 2)
    assert_computes(form, expected, x)
    with pytest.raises(AssertionError):
        assert_computes(DEFECTS[name](form), expected, x)


def test_the_check_fails_on_one_border_pixel() -> None:
    form, x = conv(4, 4, (3, 3), padding=1), integers(2, 4, 6, 7, seed=3)
    expected = form.apply(x)
    expected[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match=r"in 1 of 336 numbers, first at \[0, 0, 0, 0\]"):
        assert_computes(form, expected, x)


def test_the_check_fails_when_apply_and_definition_part(monkeypatch: pytest.MonkeyPatch) -> None:
    form, x = conv(4, 4, (3, 3), padding=1), integers(2, 4, 6, 7, seed=3)
    expected = form.apply(x)
    monkeypatch.setattr(ConvForm, "apply", lambda self, x: expected + 1)
    with pytest.raises(AssertionError, match="apply differs"):
        assert_computes(form, expected, x)
