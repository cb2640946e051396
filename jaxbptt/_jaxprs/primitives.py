"""Which primitives of JAX are of which kind: every table of their names."""

# ------------------------------------------------------------ what a program is made of

# Primitives that only call a jaxpr, one to one in inputs and outputs. The calls
# that carry a derivative rule of their own are left whole, or they would lose it.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
# Those that carry one.
CALLS_WITH_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
# Their derivative is zero everywhere.
FLAT = frozenset("ceil floor round sign stop_gradient".split())
# More than elementwise work.
HEAVY = frozenset({"dot_general", "conv_general_dilated", "scan", "while", "cond", "scatter-add"})
# Elementwise, of a handful of instructions, or moving no data at all.
CHEAP = frozenset(
    "abs add add_any and broadcast_in_dim convert_element_type copy eq expand_dims ge gt "
    "integer_pow le lt max min mul name ne neg not one_minus_square or pvary reduce_precision "
    "reshape select_n sign square squeeze sub transpose xor".split()
)
# Pure, and with a rule for vmap.
MOVABLE = frozenset(
    "abs add add_any and argmax argmin asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil "
    "clamp concatenate conj convert_element_type copy cos cosh cumlogsumexp cummax cummin cumprod "
    "cumsum digamma div dot_general dynamic_slice eq erf erf_inv erfc exp exp2 expand_dims expm1 "
    "floor gather ge gt imag integer_pow iota is_finite le lgamma log log1p logistic lt max min "
    "mul name ne neg not one_minus_square or pad pow real reduce_and reduce_max reduce_min "
    "reduce_or reduce_prod reduce_sum rem reshape rev round rsqrt scatter-add select_n sign sin "
    "sinh slice sort split sqrt square squeeze stop_gradient sub tan tanh top_k transpose "
    "xor".split()
)
# The same numbers, of another type beside their dtype or laid out otherwise on a mesh.
RETYPES = frozenset("convert_element_type copy pcast pvary reshard sharding_constraint".split())
# ------------------------------------------------------------ linear in what

# Primitives linear in their first operand alone ...
LINEAR = frozenset(
    "broadcast_in_dim conj convert_element_type copy copy_p cumsum div dynamic_slice expand_dims "
    "fft gather imag name neg pvary real reduce_precision reduce_sum reduce_window_sum reshape rev "
    "select_and_scatter_add sharding_constraint slice split squeeze transpose".split()
)
# ... in each of two, or in this many of their first operands together.
BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
JOINT: dict[str, int | None] = {"complex": 2, "dynamic_update_slice": 2, "pad": 2, "sub": 2}
JOINT |= {"concatenate": None, "stack": None}

# In all operands: each output in its own, or in their sum.
IN_ALL = frozenset(
    "add add_any all_gather all_gather_invariant all_gather_reduced all_to_all "
    "optimization_barrier pcast pbroadcast ppermute psum psum2 psum_invariant psum_scatter "
    "reduce_scatter reduced_vary_cast reshard unreduced_psum unreduced_reduce_scatter "
    "vary_unreduced_cast".split()
)
# ------------------------------------------------------------ on the way from a product to a weight

# Linear in the one operand that varies with the lag ...
PASSES = frozenset(
    "broadcast_in_dim conj convert_element_type copy div dot_general dynamic_slice expand_dims "
    "gather imag mul neg pad psum psum2 psum_invariant real reduce_sum reshape "
    "rev sharding_constraint slice squeeze transpose".split()
)
# ... or in all operands together.
JOINT_PASSES = frozenset({"add", "add_any", "sub", "concatenate"})
# What leaves an array of zeros as it was.
MOVES_ZEROS = frozenset({"broadcast_in_dim", "pcast", "pvary", "reshape", "transpose"})
