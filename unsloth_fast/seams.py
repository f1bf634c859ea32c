"""The seams: every name of another library that is private, undocumented or overridden here, and why it is needed.

A release that renames one of them must fail loudly. `overrides` raises when a class is imported; a test looks up every
row of `SEAMS` in the installed releases, and searches this package for private names that have no row.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def overrides(base: type) -> Callable[[Method], Method]:
    """Mark a method that replaces a method of another library's class.

    Args:
        base: the class that must have a method of that name, with every parameter that ours names.

    Raises:
        ImportError: the base class lacks the method or a parameter. The installed release would then not call
            the method, or call it with other arguments, and training would change without an error.
    """

    def check(method: Method) -> Method:
        name, owner = method.__name__, f"{base.__module__}.{base.__qualname__}"
        original = getattr(base, name, None)
        if not callable(original):
            raise ImportError(
                f"{owner} of the installed release has no method {name!r}, which unsloth_fast overrides; install a "
                "release that pyproject.toml allows"
            )
        unknown = _named(method) - _named(original)
        if unknown and not _takes_any(original):
            raise ImportError(
                f"{owner}.{name} of the installed release takes no {', '.join(sorted(unknown))}, which unsloth_fast "
                "expects; install a release that pyproject.toml allows"
            )
        method.overrides = base  # type: ignore[attr-defined]  # a test reads it
        return method

    return check


def _named(function: Callable[..., Any]) -> set[str]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, entry in inspect.signature(function).parameters.items() if entry.kind not in several}


def _takes_any(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters)


class Seam(NamedTuple):
    """A name of another library.

    Attributes:
        path: where it is: module, class and name, with dots.
        why: what it is needed for.
        needs: without which the name does not exist: "CUDA", a module of an optional package, or a requirement such as
            "transformers>5.17".
    """

    path: str
    why: str
    needs: str = ""


SEAMS = (
    # transformers
    Seam("transformers.Trainer._get_num_items_in_batch", "overridden: the count that divides the loss is ours"),
    Seam("transformers.Trainer._init_training_state", "overridden: a stream resumes at the right batch"),
    Seam("transformers.Trainer._get_learning_rate", "overridden: the embeddings' rate is read before it changes"),
    Seam("transformers.Trainer._save_checkpoint", "overridden: the token count is in the state before it is written"),
    Seam("transformers.Trainer._tr_loss", "read and set: the device leaves out losses that are not finite"),
    Seam("transformers.Trainer._globalstep_last_logged", "read: the same"),
    Seam("transformers.Trainer._prepare_inputs", "called: moves a batch of an evaluation to the device"),
    Seam(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "replaced on an instance: offloads inputs",
    ),
    Seam(
        "transformers.PreTrainedModel._gradient_checkpointing_func",
        "replaced while layers are recorded: the state of the random numbers cannot be read then",
    ),
    Seam("transformers.PreTrainedModel._can_record_outputs", "read: a model that returns no router logits"),
    Seam(
        "transformers.utils.output_capturing._active_collector",
        "read: a model around the layers collects what they compute, which a replay does not hand over",
    ),
    Seam("transformers.PreTrainedModel._from_config", "called: a model without memory, whose mixers are recognised"),
    Seam(
        "transformers.integrations.moe.use_experts_implementation._is_expert_parallel",
        "read: experts of which this device has only some are left to transformers",
        needs="transformers>5.17",
    ),
    Seam("transformers.PreTrainedModel._is_stateful", "read: a model with recurrent state is not packed"),
    Seam("transformers.PreTrainedModel._keep_in_fp32_modules", "read: weights that stay in float32 when merged"),
    Seam("transformers.PreTrainedModel._keep_in_fp32_modules_strict", "read: the same"),
    Seam("transformers.PreTrainedConfig._attn_implementation", "read and set: sdpa and eager become ours"),
    Seam("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", "called: the mask that an implementation makes"),
    Seam("transformers.masking_utils.create_causal_mask", "recognised in forwards: it calls the mask function"),
    Seam("transformers.masking_utils.create_sliding_window_causal_mask", "recognised in forwards: the same"),
    Seam("transformers.PreTrainedConfig._name_or_path", "read: names the default output folder, as TRL does"),
    Seam(
        "transformers.models.llama.modeling_llama.eager_attention_forward",
        "called, in the module of each attention class: the attention of batches that are not packed",
    ),
    Seam("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "called: the same, where it is not eager"),
    Seam("transformers.utils.hub.cached_file", "called with its `_raise_exceptions_for_*`: a missing file is no error"),
    Seam("transformers.trainer_optimizer.is_optimizer_factory", "called: such an optimizer makes its own groups"),
    Seam(
        "transformers.PreTrainedTokenizerFast._tokenizer",
        "replaced on an instance: its end token has another spelling",
    ),
    # trl
    Seam("trl.SFTTrainer._prepare_dataset", "overridden: data sets are checked, and packed as a whole"),
    Seam("trl.SFTTrainer._metrics", "written: what TRL logs beside the loss"),
    Seam("trl.SFTTrainer.__init__", "replaced by compat.patch_trl: plain TRL scripts build our trainer"),
    Seam("trl.SFTConfig.__init__", "replaced by compat.patch_trl: it accepts the names of older releases"),
    Seam("transformers.TrainingArguments.__init__", "replaced by compat.patch_trl: the same"),
    Seam("trl.trainer.sft_trainer.DataCollatorForLanguageModeling", "subclassed: TRL checks for this class"),
    # peft
    Seam("peft.tuners.tuners_utils.BaseTunerLayer", "recognised: an adapter on the output head"),
    Seam("peft.tuners.lora.Linear", "recognised: its forward is ours; merges a dequantised layer"),
    Seam("peft.tuners.lora.bnb.Linear4bit", "recognised: its forward is ours"),
    Seam("peft.AutoPeftModelForCausalLM.from_pretrained", "replaced by models.auto: it takes load_in_4bit"),
    Seam("peft.tuners.lora.LoraLayer", "recognised: a layer that is merged"),
    Seam("peft.tuners.trainable_tokens.TrainableTokensLayer", "recognised: an embedding with trained rows"),
    Seam("peft.utils.ModulesToSaveWrapper", "recognised: a module trained in full, whose copy is saved"),
    Seam("peft.utils.TrainableTokensWrapper", "recognised: the wrapper of an embedding with trained rows"),
    Seam("peft.import_utils.is_bnb_4bit_available", "called: whether the class above can be imported"),
    # bitsandbytes
    Seam("bitsandbytes.functional.QuantState.state2", "read: scales of scales", needs="bitsandbytes"),
    # accelerate, datasets
    Seam("accelerate.state.GradientState.end_of_dataloader", "read: the last batch repeats documents"),
    Seam("accelerate.state.GradientState.remainder", "read: how many of its documents are new"),
    Seam("accelerate.hooks.add_hook_to_module._old_forward", "read: the forward that accelerate calls"),
    Seam("accelerate.hooks.add_hook_to_module._hf_hook", "read: whether accelerate replaced a module's forward"),
    Seam("datasets.Dataset._fingerprint", "read: a packed data set has a fingerprint of its own"),
    # argparse, in TRL's parser
    Seam("argparse.ArgumentParser._actions", "read: the options, to write their values as YAML's authors mean them"),
    Seam("argparse.ArgumentParser._option_string_actions", "read: a switch needs no value"),
    # torch
    Seam("torch.Tensor._version", "read: a tensor that was written over is not recomputed"),
    Seam(
        "torch.nn.Module._forward_hooks",
        "read: a layer with hooks keeps its own forward; emptied while a head is checked",
    ),
    Seam("torch.nn.Module._forward_pre_hooks", "read: the same"),
    Seam("torch.nn.Module._backward_hooks", "read: a layer with hooks keeps its own forward"),
    Seam("torch.nn.Module._backward_pre_hooks", "read: the same"),
    Seam("torch.nn.modules.module._has_any_global_hook", "called: whether all modules have hooks"),
    Seam("torch.nn.Module._modules", "read: all children of a module, duplicates included; replaced in a copy"),
    Seam("torch.nn.Module._parameters", "replaced in a copy of a module, which is checked with random weights"),
    Seam("torch.utils._python_dispatch.TorchDispatchMode", "subclassed: sees the operators of a call to be recorded"),
    Seam("torch._dynamo.eval_frame.OptimizedModule._orig_mod", "read in names of parameters: torch.compile adds it"),
    Seam("torch._C._storage_Use_Count", "called: whether somebody keeps a gradient that a replay would overwrite"),
    Seam("torch.UntypedStorage._cdata", "read: the same"),
    Seam("torch._C._autograd._top_saved_tensors_default_hooks", "called: whether a checkpoint or offloading is active"),
    Seam(
        "torch._C._cuda_getCurrentRawStream",
        "called: the stream of a launch; the public call is 2 us slower",
        needs="CUDA",
    ),
    Seam("torch._foreach_copy_", "called: rounds all adapters in one launch, copies the gradients of a recording"),
    Seam("torch._C._cuda_endAllocateToPool", "called: ends a recording that has failed", needs="CUDA"),
    Seam("torch._C._cuda_releasePool", "called: the same", needs="CUDA"),
    Seam("torch._C._len_torch_dispatch_stack", "called: whether a dispatch mode sees operations"),
    Seam("torch._C._are_functorch_transforms_active", "called: whether torch.func transforms the call"),
    Seam("torch._C._is_tracing", "called: whether torch.jit.trace records the call"),
    Seam("torch._C._current_graph_task_id", "called: whether a backward pass recomputes a shadowed call"),
    Seam("torch._dynamo.compiled_autograd.compiled_autograd_enabled", "read: whether compiled autograd is on"),
    # triton
    Seam("triton.JITFunction.params", "read: which arguments select other machine code"),
    Seam("triton.JITFunction.arg_names", "read: the constants of a kernel follow its arguments"),
    Seam("triton.JITFunction.fn", "read: the Python function, to build the kernel for unaligned arguments"),
    Seam("triton.compiler.CompiledKernel.run", "called: launches without Triton's own binding of arguments"),
    Seam("triton.compiler.CompiledKernel.function", "read: the handle that the driver launches"),
    Seam("triton.compiler.CompiledKernel.packed_metadata", "passed to run: warps, shared memory, clusters"),
    Seam("triton.compiler.CompiledKernel.metadata", "read: the same, for launches from C++"),
    Seam("triton.compiler.CompiledKernel.src", "read: the type of each parameter, for launches from C++"),
)

# Of torch's C++ headers, used by kernels/_replay.cpp and _replay_program.h, which torch.utils.cpp_extension compiles
# against the installed torch: torch::autograd::Function and AutogradContext, THPVariable_Wrap, THPVariable_Unpack,
# THPVariable_CheckExact, THPDtype, c10::impl::TorchDispatchModeTLS. If a release renames one, compilation fails, and
# Python makes the calls, with a warning.
