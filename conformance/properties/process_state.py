"""Neither importing a backend nor calling it changes the process: no generator, flag, mode, device or torch function.

A user's next random number, their precision of products, their gradient mode and their timer are theirs.
"""

import gc
import locale
import logging
import os
import random
import signal
import sys
import time
import timeit
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.spec import Inputs
from conformance.tolerances.gates import Failure
from conformance.trial import Trial, as_leaves, bits

_torch: Any = torch  # with attributes that its types lack

# What benchmarks and judges rely on. A function that is replaced can report any time and any equality.
_OWNERS: tuple[Any, ...] = (
    *(time, timeit, torch, torch.testing, torch.autograd, torch.linalg, torch.nn.functional, torch.cuda),
    *(torch.cuda.Event, torch.Tensor),
)
# All that a class has or inherits, and the functions of a module.
_WATCHED: Mapping[Any, tuple[str, ...]] = {
    owner: tuple(dir(owner) if isinstance(owner, type) else (n for n, one in vars(owner).items() if callable(one)))
    for owner in _OWNERS
}
_ABSENT = object()
TIMERS = ("time.", "timeit.", "torch.cuda.", "Event.")  # the names of those that a bench relies on


def _functions() -> dict[str, Any]:
    """The functions as they are now; an attribute that a class only inherits counts as absent."""
    return {_path(owner, name): vars(owner).get(name, _ABSENT) for owner, names in _WATCHED.items() for name in names}


def _path(owner: Any, name: str) -> str:
    return f"{owner.__name__}.{name}"


# Each flag by the words with which a user sets it. Those that the judge sets for its own process are not among them.
_FLAGS: Mapping[str, Callable[[], Any]] = {
    "torch.get_default_dtype()": torch.get_default_dtype,
    "torch.get_default_device()": torch.get_default_device,
    "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision,
    "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled,
    "torch.is_deterministic_algorithms_warn_only_enabled()": torch.is_deterministic_algorithms_warn_only_enabled,
    "torch.utils.deterministic.fill_uninitialized_memory": lambda: _torch.utils.deterministic.fill_uninitialized_memory,
    "torch.backends.cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": lambda: (
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    ),
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": lambda: (
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    ),
    "torch.backends.cudnn.enabled": lambda: torch.backends.cudnn.enabled,
    "torch.backends.cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
    "torch.backends.cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    "torch.backends.cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "torch.backends.mkldnn.enabled": lambda: torch.backends.mkldnn.enabled,
    "scaled_dot_product_attention's backends": lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    ),
    "torch.is_warn_always_enabled()": torch.is_warn_always_enabled,
    "operators of torch that a library replaces": lambda: frozenset(
        name for name in _torch.library._impls if name.startswith("aten/") and not name.endswith("/Meta")
    ),
    "torch.is_grad_enabled()": torch.is_grad_enabled,
    "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled,
    "torch.is_anomaly_enabled()": torch.is_anomaly_enabled,
    "torch.is_autocast_enabled()": lambda: tuple(map(torch.is_autocast_enabled, ("cpu", "cuda"))),
    "autocast's dtypes": lambda: tuple(map(torch.get_autocast_dtype, ("cpu", "cuda"))),
    "hooks on saved tensors": lambda: _torch._C._autograd._top_saved_tensors_default_hooks(True),
    "the stack of dispatch modes": torch._C._len_torch_dispatch_stack,
    "the stack of function modes": torch._C._len_torch_function_stack,
    "torch's print options": lambda: dict(vars(_torch._tensor_str.PRINT_OPTS)),
    "torch's flushing of subnormal numbers": lambda: not float(torch.tensor(1e-40) * 1.0),
    "autograd's multithreading": torch._C._is_multithreading_enabled,
    "the collection of garbage": lambda: (gc.isenabled(), gc.get_threshold()),
    "the root logger": lambda: (logging.root.level, logging.root.manager.disable),
    "the locale": lambda: locale.setlocale(locale.LC_ALL),
    "the handler of SIGINT": lambda: signal.getsignal(signal.SIGINT),
    "the working directory": os.getcwd,
}


def _flags() -> dict[str, Any]:
    return {name: read() for name, read in _FLAGS.items()}


def _device_flags() -> dict[str, Any]:
    if not torch.cuda.is_initialized():
        return {}
    return {
        "torch.cuda.current_device()": torch.cuda.current_device(),
        "torch.cuda.current_stream()": torch.cuda.current_stream(),
        "torch.cuda.get_sync_debug_mode()": torch.cuda.get_sync_debug_mode(),
        "CUDA's random state": tuple(bits(torch.cuda.get_rng_state()).tolist()),
    }


def _state() -> dict[str, Any]:
    """Everything that a call must leave as it was."""
    flags = _flags()
    flags["torch.get_num_threads()"] = torch.get_num_threads()
    flags["torch's random state"] = hash(torch.get_rng_state().numpy().tobytes())
    flags["Python's random state"] = random.getstate()
    flags["the environment"] = dict(os.environ)
    flags["the filters of warnings"] = (*warnings.filters, warnings.showwarning)
    if numpy := sys.modules.get("numpy"):
        state = numpy.random.get_state()
        flags["numpy's random state"] = (state[0], state[1].tobytes(), *state[2:])
        flags["numpy's handling of errors"] = numpy.geterr()
    return flags | _device_flags()


# What the judge sets back after a finding, so that it is no finding of the next check too.
_WRITERS: Mapping[str, Callable[[Any], object]] = {
    "torch.get_default_dtype()": torch.set_default_dtype,
    "torch.get_float32_matmul_precision()": torch.set_float32_matmul_precision,
    "torch.is_grad_enabled()": torch._C._set_grad_enabled,
    "torch's flushing of subnormal numbers": torch.set_flush_denormal,
    "autograd's multithreading": torch.autograd.set_multithreading_enabled,
    "the collection of garbage": lambda value: (gc.enable if value[0] else gc.disable)() or gc.set_threshold(*value[1]),
    "torch.backends.cudnn.benchmark": lambda value: setattr(torch.backends.cudnn, "benchmark", value),
}


# Before any backend is imported: the judge imports its properties first.
_AT_IMPORT = _flags()
_ORIGINALS = _functions()


def check(trial: Trial, case: Case) -> None:
    """Compare with the process before the backend was imported, and before and after each kind of call."""
    demand_originals()
    _demand_same("importing the backend", _AT_IMPORT, _flags())
    inputs = trial.inputs(case)
    trial.run(case, inputs)  # what compiles may warn and import
    _infer(trial, case, inputs)
    demand_originals()
    _demand_same("a first call", _AT_IMPORT, _flags())
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, grads=()).outputs)
    leaves = as_leaves(inputs, trial.spec.grads)
    # A generator that is seeded again is in another state from here on.
    torch.rand(())
    random.random()
    if numpy := sys.modules.get("numpy"):
        numpy.random.random()
    before = _state()
    _infer(trial, case, inputs)
    _demand_same("a call under no_grad", before, _state())
    outputs = trial.call(leaves, trial.options(case))
    _demand_same("the forward pass", before, _state())
    trial.backward(outputs, leaves, trial.spec.grads, grad_outputs)
    _demand_same("the backward pass", before, _state())


def _infer(trial: Trial, case: Case, inputs: Inputs) -> None:
    with torch.no_grad():
        trial.call(inputs, trial.options(case))


def demand_originals(of: tuple[str, ...] = ("",)) -> None:
    """Raise Failure if a watched function, whose name starts with one of these, is not the one found at first."""
    for name, function in _functions().items():
        if name.startswith(of) and function is not _ORIGINALS[name] and not _by_torch(name, function):
            restore_functions()
            raise Failure(f"{name} was replaced by {function!r}")


def _by_torch(name: str, function: Any) -> bool:
    """Whether torch wraps a function of its own, as torch.manual_seed where it first compiles."""
    code = getattr(function, "__code__", None)
    own = code is not None and code.co_filename.startswith(os.path.dirname(torch.__file__))
    return own and name.endswith(f".{function.__name__}")


def restore_functions() -> None:
    """Set every watched function back to the one that the judge found."""
    for owner, names in _WATCHED.items():
        for name in names:
            original, now = _ORIGINALS[_path(owner, name)], vars(owner).get(name, _ABSENT)
            if original is _ABSENT and now is not _ABSENT:
                delattr(owner, name)
            elif original is not now:
                setattr(owner, name, original)


def _demand_same(who: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name, value in after.items():
        if name in before and before[name] != value:
            seen = _changed(before[name], value)
            if name in _WRITERS:
                _WRITERS[name](before[name])
            raise Failure(f"{who} changed {name}: {seen}")


def _changed(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        keys = sorted({*before, *after}, key=str)
        return ", ".join(f"{k}: {before.get(k)!r} to {after.get(k)!r}" for k in keys if before.get(k) != after.get(k))
    words = f"{before!r} to {after!r}"
    return words if len(words) < 200 else "its value"


PROPERTY = Property(*of_file(check), share=0.2)
