"""The kinds of faults that are planted, and the tables of what is exchanged for what.

Each kind, and what it changes:

    mask-dropped         a load or store without its mask
    other-changed        another value for what a mask leaves out
    and-dropped          one side of `and`, `or`, `&`, `|` alone
    widened, narrowed    a bound that includes one more, or one less
    flipped              a comparison's opposite
    arithmetic           another operator, or a sign dropped
    minmax               the minimum for the maximum, and the other way round
    axis                 a reduction along another axis
    constant             a number one higher, a fraction one percent higher, the other of True and False
    cast-dropped         no conversion to another dtype, or no copy
    call-dropped         a call without a result left out: a store, a launch, a check, a barrier
    update-dropped       a variable that is not updated
    update-replaced      `=` for `+=`: the last term in place of the sum
    condition, branch    a condition's opposite, or one branch of a conditional expression always
    range                a loop that ends one step early
    scratch-halved       an allocation of half the size
    zeros-dropped        an allocation that is not set to zero
    exchanged            two neighbouring arguments of a launch, or two saved tensors, exchanged
    flag                 the opposite of a launch's flag
    option               half or twice a launch's tile, warps or other number
"""

import ast

OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}
# For each comparison: its opposite, and (kind, operator, offset of the bound) of the comparisons beside it.
COMPARISONS: dict[type[ast.cmpop], tuple[str, str, tuple[tuple[str, str, str], ...]]] = {
    ast.Lt: ("<", ">=", (("widened", "<=", ""), ("narrowed", "<", " - 1"))),
    ast.LtE: ("<=", ">", (("widened", "<=", " + 1"), ("narrowed", "<", ""))),
    ast.Gt: (">", "<=", (("widened", ">=", ""), ("narrowed", ">", " + 1"))),
    ast.GtE: (">=", "<", (("widened", ">=", " - 1"), ("narrowed", ">", ""))),
    ast.Eq: ("==", "!=", ()),
    ast.NotEq: ("!=", "==", ()),
    ast.Is: ("is", "is not", ()),
    ast.IsNot: ("is not", "is", ()),
    ast.In: ("in", "not in", ()),
    ast.NotIn: ("not in", "in", ()),
}
CONVERSIONS = ("to", "float", "double", "half", "bfloat16", "int", "long", "bool", "type_as", "contiguous", "clone")
REDUCTIONS = ("sum", "max", "min", "mean", "prod", "argmax", "argmin", "cumsum", "softmax", "logsumexp", "norm")
SWAPPED = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}
AXES = {"0": "1", "1": "0", "-1": "-2", "-2": "-1"}
ALLOCATIONS = ("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_full", "empty_like", "zeros_like")
TRITON_OPTIONS = ("num_warps", "num_stages", "num_ctas")
