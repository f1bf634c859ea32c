"""The seams of the judge: every name of another package that is private, undocumented or replaced here, and why.

A release that renames one of them must fail loudly: the judge would otherwise miss launches, leave a flag of the
process unread, or widen a tolerance. A test looks up every row of `SEAMS` in the installed releases, and searches this
package and the measurements of its power for private names that have no row. Kernels of other people are no rows: the
peers name them in `import_kernels`, which says which one is missing.
"""

from unsloth_fast.seams import Seam

SEAMS = (
    # python
    Seam("sys._getframe", "called: the functions of the caller of conformance.testing.judge; opcodes for coverage"),
    # torch
    Seam("torch.Tensor._version", "read: an input that was written over, even with the same bits, is a finding"),
    Seam("torch.Tensor._is_zerotensor", "called: a result must have its elements in memory"),
    Seam("torch.cuda._sleep", "called: keeps a stream busy, so that work on another one shows"),
    Seam("torch._C._autograd._top_saved_tensors_default_hooks", "called: a call must leave the hooks on saved tensors"),
    Seam("torch._C._len_torch_dispatch_stack", "called: a call must leave the stack of dispatch modes"),
    Seam("torch._C._len_torch_function_stack", "called: a call must leave the stack of function modes"),
    Seam("torch._C._is_multithreading_enabled", "called: a call must leave autograd's threads"),
    Seam("torch._C._set_grad_enabled", "called: sets the gradient mode back after a finding"),
    Seam("torch.library._impls", "read: a call must leave the operators of torch, which a library can replace"),
    Seam("torch._tensor_str.PRINT_OPTS", "read: a call must leave the print options"),
    Seam("torch.autograd.function._SingleLevelFunction.setup_context", "compared: whether forward gets the context"),
    Seam("torch.utils._python_dispatch.TorchDispatchMode", "subclassed: sees and changes the operators of a call"),
    Seam("torch.utils._pytree.tree_leaves", "called: the tensors in nested arguments and results"),
    Seam("torch.utils._pytree.tree_map", "called: the same, to replace them"),
    Seam("torch._ops.OpOverload._schema", "read: an operator's name, and whether its result is a view"),
    Seam("torch._decomp.decomposition_table", "read: the simpler operators that an operator consists of"),
    Seam("torch.ops.aten._to_copy", "recognised by name: a cast"),
    Seam("torch.ops.aten._softmax", "recognised by name: an exponential, a chain of simpler operators"),
    Seam("torch.ops.aten._softmax_backward_data", "recognised by name: a chain of simpler operators"),
    Seam("torch.ops.aten._log_softmax", "recognised by name: the same"),
    Seam("torch.ops.aten._log_softmax_backward_data", "recognised by name: the same"),
    Seam("torch.ops.aten._fused_rms_norm", "recognised by name: the same"),
    Seam("torch.ops.aten._fused_rms_norm_backward", "recognised by name: the same"),
    Seam("torch._dynamo.reset", "called: each graph is compiled afresh"),
    Seam("torch._dynamo.config.recompile_limit", "set: nearly every case needs a graph of its own"),
    Seam("torch._dynamo.config.automatic_dynamic_shapes", "set: a bench compiles every shape statically"),
    Seam("torch._dynamo.config.get_config_copy", "called: a peer's import must leave the compiler's settings"),
    Seam("torch._dynamo.config.load_config", "called: sets them back"),
    Seam("torch._inductor.config.get_config_copy", "called: the same"),
    Seam("torch._inductor.config.load_config", "called: the same"),
    Seam("torch._dynamo.eval_frame.OptimizedModule._orig_mod", "written in names of parameters: torch.compile adds it"),
    Seam("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", "set: tensors without elements have rows"),
    # triton
    Seam("triton.runtime.interpreter._patch_lang", "replaced: patches the language once per launch"),
    Seam("triton.runtime.interpreter._LangPatchScope", "called: the scope of a patch that is not repeated"),
    Seam("triton.runtime.interpreter._LangPatchScope.restore", "replaced on an instance: the end of a launch"),
    Seam("triton.runtime.interpreter._LangPatchScope._changes", "read: what is patched, to repeat it without a search"),
    Seam("triton.language.core.block_type.__init__", "replaced: equal types share their attributes"),
    Seam("triton.language.core.tensor.__init__", "replaced: tensors of a type share their shape"),
    Seam("triton.language.semantic.TritonSemantic.broadcast_impl_value", "replaced: operands of the same shape"),
    Seam("triton.language.semantic.TritonSemantic.binary_op_type_checking_impl", "replaced: operands of the same type"),
    Seam("triton.language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl", "replaced: only in debugging"),
    Seam("triton.runtime.interpreter._patch_attr", "replaced: calls functions directly, and operators of known types"),
    Seam("triton.runtime.interpreter.interpreter_builder", "read: whether overflows are looked for"),
    Seam("triton.runtime.interpreter.TensorHandle", "called: the results of operators"),
    Seam("triton.language.semantic.TritonSemantic.computation_type_impl", "called: the common type of two operands"),
    Seam("triton.language.semantic.TritonSemantic.to_tensor", "called: the type of a number"),
    Seam("triton.runtime.interpreter._patch_lang_tensor", "replaced: arrays of one number are integers"),
    Seam("triton.runtime.interpreter._get_np_dtype", "replaced: keeps its results"),
    Seam("triton.runtime.interpreter.GridExecutor.__call__", "replaced: counts kernels, and silences NumPy"),
    Seam("triton.runtime.interpreter.GridExecutor._init_args_hst", "replaced: sees the tensors of a launch"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_masked_load", "replaced: sees the addresses of loads"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_int_to_ptr", "replaced: sees addresses from elsewhere"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_exp2", "replaced: flushes as a GPU does"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_sqrt", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_rsqrt", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_extern_elementwise", "replaced: computes libdevice"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.binary_op", "replaced: numbers in bfloat16, not their bits"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.unary_op", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.ternary_op", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_fma", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.create_dot", "replaced: the same"),
    Seam("triton.runtime.interpreter.ReduceOps.apply", "replaced: the same"),
    Seam("triton.runtime.interpreter.ScanOps.apply", "replaced: the same"),
    Seam("triton.runtime.interpreter.InterpreterBuilder.cast_impl", "replaced: the same, of other dtypes"),
    Seam("triton.runtime.interpreter.interpreter_semantic", "passed: to the functions of libdevice"),
    Seam("triton.runtime.interpreter._implicit_cvt", "replaced: a float is a float32 scalar"),
    Seam("triton.language.core.constexpr.__mul__", "replaced, as all operators: with a tensor on the right, its own"),
    Seam("triton.language.extra.libdevice.tanh", "given other code, as all functions: calls CUDA's"),
    Seam("triton.language.extra.cuda.libdevice.tanh", "replaced, as all functions: bound to the interpreter"),
    Seam("triton.runtime.autotuner.Autotuner.prune_configs", "replaced: draws two configurations"),
    Seam("triton.runtime.autotuner.Autotuner.do_bench", "replaced: runs a kernel once, in no time"),
    Seam("triton.runtime.autotuner.Autotuner.run", "replaced: every target is tuned anew"),
    Seam("triton.runtime.autotuner.Autotuner.cache", "cleared: the same"),
    Seam("triton.runtime.interpreter.InterpretedFunction.run", "replaced: sees every launch in the interpreter"),
    Seam("triton.JITFunction.run", "replaced: sees every launch; or compiles for other targets instead"),
    Seam("triton.JITFunction.params", "read: which arguments Triton may assume to be aligned"),
    Seam("triton.JITFunction.arg_names", "read: names the arguments of a launch"),
    Seam("triton.JITFunction.fn", "read: the Python function, for the names of its constants"),
    Seam("triton.runtime.interpreter.InterpretedFunction.arg_names", "read: the same, in the interpreter"),
    Seam("triton.runtime.interpreter.InterpretedFunction.fn", "read: the same, in the interpreter"),
    Seam("triton.runtime.jit.KernelParam.do_not_specialize", "read: whether alignment is assumed"),
    Seam("triton.runtime.jit.KernelParam.do_not_specialize_on_alignment", "read: the same"),
    Seam("triton.compiler.compiler.CompiledKernel.__init__", "replaced: sees the code of every compiled kernel"),
    Seam("triton.compiler.compiler.CompiledKernel.asm", "read: the code of each stage"),
    Seam("triton.compiler.compiler.CompiledKernel.metadata", "read: the bytes of shared memory"),
    Seam("triton.runtime.driver.DriverConfig._active", "replaced: stands for a GPU that is not there"),
    Seam("triton.runtime.driver.DriverConfig.set_active", "called: the same, also to answer what kernels ask"),
    Seam("triton.backends.compiler.GPUTarget", "called: the architectures to compile for"),
    Seam("triton.knobs.nvidia_knobs.cuobjdump", "called: the registers and the stack of a kernel"),
    Seam("triton.knobs.compilation", "set: exact arithmetic"),
    Seam("torch.profiler.profile.profiler", "read: the dtypes of the operators of a call"),
    # transformers
    Seam(
        "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate",
        "named so on an object: the gate of the experts, which a peer passes in place of a module",
    ),
    # hypothesis
    Seam("hypothesis.internal.conjecture.providers._get_local_constants", "replaced: finds none"),
    Seam("hypothesis.internal.conjecture.providers.CONSTANTS_CACHE", "replaced: those that were found before"),
    Seam("hypothesis.internal.constants_ast.Constants", "called: none"),
    # pytest-benchmark
    Seam(
        "pytest_benchmark.plugin.pytest_benchmark_generate_machine_info", "called: its file", needs="pytest_benchmark"
    ),
    Seam("pytest_benchmark.utils.get_commit_info", "called: the same", needs="pytest_benchmark"),
    Seam("pytest_benchmark.stats.Stats", "called: the same", needs="pytest_benchmark"),
    # unsloth_fast, whose launches past Triton the judge must see
    Seam("unsloth_fast.kernels._launch._compiled", "replaced: reports what is launched from it"),
    Seam("unsloth_fast.kernels._launch._intercepted", "set: all launches go through Triton while none is executed"),
    Seam(
        "unsloth_fast.kernels._launch.launched_by_triton", "called: the same, where they are compiled for other targets"
    ),
    Seam("unsloth_fast.kernels._replay._library", "called, or replaced: recorded calls are dropped and seen again"),
)

# Of torch's C++ headers, used by memory.cpp, which is compiled against the installed torch: c10::Allocator and
# c10::GetAllocator; for CUDA c10::cuda::CUDACachingAllocator::allocator, its class CUDAAllocator, and
# torch/csrc/cuda/CUDAPluggableAllocator.h. If a release renames one, compilation fails, and the judge fences and
# poisons only what Python code allocates, with a warning.
