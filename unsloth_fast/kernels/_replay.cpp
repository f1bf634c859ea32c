// Replays what `_replay.py` recorded: allocations, kernel launches and the autograd node around them, without Python.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The driver's functions, from the library that torch has loaded: to link against it, it would have to be there.
template <typename F>
F driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
  void* const found = library ? dlsym(library, name) : nullptr;
  TORCH_CHECK(found, "libcuda.so.1 has no ", name);
  return reinterpret_cast<F>(found);
}
#define DRIVER(name) ([] { static const auto function = driver<decltype(&name)>(#name); return function; }())

void check(CUresult result) {
  const char* text = "unknown error";
  if (result != CUDA_SUCCESS) DRIVER(cuGetErrorString)(result, &text);
  TORCH_CHECK(result == CUDA_SUCCESS, "launch of a recorded kernel: ", text);
}

// A thread that has not used the device yet, such as autograd's own, has no context to launch in.
void set_context(int device) {
  CUcontext context = nullptr;
  check(DRIVER(cuCtxGetCurrent)(&context));
  if (context) return;
  check(DRIVER(cuDevicePrimaryCtxRetain)(&context, device));
  check(DRIVER(cuCtxSetCurrent)(context));
}

struct Buffer {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

struct Parameter {
  int64_t slot;  // of the tensor whose address is meant, or -1
  uint64_t bits;  // the value, where it is not an address
};

struct Launch {
  CUfunction function;
  unsigned programs, threads, shared_memory;
  std::vector<Parameter> parameters;
};

// One pass. Its tensors are numbered: first those that it is given, then those that it allocates.
struct Program {
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
  std::vector<int64_t> results;  // by number; -1: None

  // From (buffers, launches, results): (sizes, strides, dtype) and (function, programs, threads, shared memory,
  // [(slot, bits)]) each.
  explicit Program(const py::tuple& parts) : results(parts[2].cast<std::vector<int64_t>>()) {
    for (const py::handle one : parts[0]) {
      const auto buffer = py::cast<py::tuple>(one);
      const auto dtype = reinterpret_cast<THPDtype*>(buffer[2].ptr())->scalar_type;
      buffers.push_back({buffer[0].cast<std::vector<int64_t>>(), buffer[1].cast<std::vector<int64_t>>(), dtype});
    }
    for (const py::handle one : parts[1]) {
      const auto launch = py::cast<py::tuple>(one);
      std::vector<Parameter> parameters;
      for (const auto& [slot, bits] : launch[4].cast<std::vector<std::pair<int64_t, uint64_t>>>())
        parameters.push_back({slot, bits});
      launches.push_back({reinterpret_cast<CUfunction>(launch[0].cast<uintptr_t>()), launch[1].cast<unsigned>(),
                          launch[2].cast<unsigned>(), launch[3].cast<unsigned>(), std::move(parameters)});
    }
  }

  // Allocate and launch, on the current stream; the allocated are appended to the tensors.
  void run(variable_list& tensors, at::Device device) const {
    const c10::cuda::CUDAGuard guard(device);
    for (const auto& [sizes, strides, dtype] : buffers)
      tensors.push_back(at::empty_strided(sizes, strides, at::TensorOptions(device).dtype(dtype)));
    if (launches.empty()) return;
    set_context(device.index());
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    for (const auto& launch : launches) {
      std::array<uint64_t, 64> values{};
      std::array<void*, 64> pointers{};
      TORCH_INTERNAL_ASSERT(launch.parameters.size() <= values.size());
      for (size_t i = 0; i < launch.parameters.size(); ++i) {
        const auto [slot, bits] = launch.parameters[i];
        values[i] = slot < 0 ? bits : reinterpret_cast<uint64_t>(tensors[slot].data_ptr());
        pointers[i] = &values[i];
      }
      check(DRIVER(cuLaunchKernel)(launch.function, launch.programs, 1, 1, launch.threads, 1, 1, launch.shared_memory,
                                   stream, pointers.data(), nullptr));
    }
  }
};

template <typename T>
void append(std::string& key, T value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// All that a recording depends on of its tensors: what each is like, and which of them begin at the same address.
void describe(std::string& key, const variable_list& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& tensor = tensors[i];
    if (!tensor.defined()) {
      key.push_back('-');
      continue;
    }
    const auto address = reinterpret_cast<uint64_t>(tensor.data_ptr());
    size_t same = 0;
    while (same < i && !(tensors[same].defined() && tensors[same].data_ptr() == tensor.data_ptr())) ++same;
    key.push_back(static_cast<char>(tensor.scalar_type()));
    key.push_back(static_cast<char>(tensor.dim() << 1 | tensor.requires_grad()));
    key.push_back(static_cast<char>(same << 1 | (address % 16 == 0)));
    for (const auto size : tensor.sizes()) append(key, size);
    for (const auto stride : tensor.strides()) append(key, stride);
  }
}

// A recorded call of an autograd.Function: the forward pass, and a backward pass for each kind of gradient that came.
struct Recording : torch::CustomClassHolder {
  Program forward;
  std::vector<int64_t> saved, kept, constant;  // by number; saved as they are (-1: None), kept for the first backward
  int64_t inputs;
  bool materialize, single;
  at::Device device;
  py::object python;  // the `Recording` of _replay.py
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<const Program>> backward;  // null: cannot be replayed

  Recording(py::object recorded, at::Device where)
      : forward(recorded.attr("program").cast<py::tuple>()),
        saved(recorded.attr("saved").cast<std::vector<int64_t>>()),
        kept(recorded.attr("kept").cast<std::vector<int64_t>>()),
        constant(recorded.attr("constant").cast<std::vector<int64_t>>()),
        inputs(recorded.attr("inputs").cast<int64_t>()),
        materialize(recorded.attr("materialize").cast<bool>()),
        single(recorded.attr("single").cast<bool>()),
        device(where),
        python(std::move(recorded)) {}

  ~Recording() override {
    if (Py_IsInitialized()) {
      const py::gil_scoped_acquire gil;
      python = py::object();
    } else {
      python.release();
    }
  }
};

variable_list pick(const variable_list& tensors, const std::vector<int64_t>& numbers) {
  variable_list picked;
  picked.reserve(numbers.size());
  for (const auto number : numbers) picked.push_back(number < 0 ? Tensor() : tensors[number]);
  return picked;
}

py::tuple wrap(const variable_list& tensors) {
  py::tuple wrapped(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    wrapped[i] = tensors[i].defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i])) : py::none();
  return wrapped;
}

variable_list unwrap(const py::handle tensors) {
  variable_list unwrapped;
  for (const py::handle one : tensors) unwrapped.push_back(one.is_none() ? Tensor() : THPVariable_Unpack(one.ptr()));
  return unwrapped;
}

// Call into Python from autograd's thread; what it raises reaches the caller of backward() as it is.
template <typename F>
auto with_python(F function) {
  const py::gil_scoped_acquire gil;
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
    python_error persistent;
    persistent.persist();
    throw persistent;
  }
}

struct Replay : torch::autograd::Function<Replay> {
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<Recording>& recording,
                               at::TensorList inputs) {
    variable_list tensors = inputs.vec();
    recording->forward.run(tensors, recording->device);
    ctx->save_for_backward(pick(tensors, recording->saved));
    ctx->saved_data["recording"] = c10::IValue::make_capsule(recording);
    if (!recording->kept.empty()) ctx->saved_data["kept"] = pick(tensors, recording->kept);
    ctx->set_materialize_grads(recording->materialize);
    if (!recording->constant.empty()) ctx->mark_non_differentiable(pick(tensors, recording->constant));
    return pick(tensors, recording->forward.results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto capsule = ctx->saved_data["recording"].toCapsule();
    auto& recording = static_cast<Recording&>(*capsule);
    const auto saved = ctx->get_saved_variables();
    const auto found = ctx->saved_data.find("kept");
    const auto kept = found == ctx->saved_data.end() ? variable_list() : found->second.toTensorVector();
    ctx->saved_data.erase("kept");  // handed out, they are the caller's

    std::string key;
    std::vector<bool> needs;
    for (int64_t i = 0; i < recording.inputs; ++i) {
      needs.push_back(ctx->needs_input_grad(i));
      key.push_back(needs.back() ? '1' : '0');
    }
    variable_list tensors = grad_outputs;
    tensors.insert(tensors.end(), saved.begin(), saved.end());
    tensors.insert(tensors.end(), kept.begin(), kept.end());
    const auto plain = [&](const char* method) {
      return recording.python.attr(method)(needs, wrap(grad_outputs), wrap(saved), wrap(kept));
    };
    variable_list grads(1);  // none for the recording
    const auto give = [&](const variable_list& given) {
      grads.insert(grads.end(), given.begin(), given.end());
      return grads;
    };
    if (at::GradMode::is_enabled())  // what backward computes is to be differentiated in turn
      return give(with_python([&] { return unwrap(plain("backward")); }));

    describe(key, tensors);
    std::unique_lock lock(recording.mutex);
    auto program = recording.backward.find(key);
    if (program == recording.backward.end()) {
      lock.unlock();
      auto recorded = with_python([&] {
        const py::object parts = plain("record_backward");
        return std::shared_ptr<const Program>(parts.is_none() ? nullptr : new Program(parts.cast<py::tuple>()));
      });
      lock.lock();
      program = recording.backward.emplace(key, std::move(recorded)).first;
    }
    const auto replayed = program->second;
    lock.unlock();
    if (!replayed) return give(with_python([&] { return unwrap(plain("backward")); }));
    replayed->run(tensors, recording.device);
    return give(pick(tensors, replayed->results));
  }
};

constexpr size_t MOST = 4096;  // recordings, of a few kilobytes each; batches of ever new shapes would fill the memory

py::handle record, plain;  // of _replay.py; held for ever, as are the recordings: a process ends in any order
std::unordered_map<std::string, c10::intrusive_ptr<Recording>>& recordings() {
  static auto* const all = new std::unordered_map<std::string, c10::intrusive_ptr<Recording>>();
  return *all;
}

bool ordinary(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet others({DispatchKey::Python, DispatchKey::FuncTorchBatched,
      DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize, DispatchKey::Conjugate, DispatchKey::Negative,
      DispatchKey::ZeroTensor});
  return tensor.is_cuda() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(others);
}

// Add the arguments of a call to its key and its tensors to the inputs; false: this cannot be replayed.
bool gather(PyObject* const* arguments, Py_ssize_t count, std::string& key, variable_list& inputs) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const one = arguments[i];
    if (THPVariable_CheckExact(one)) {
      const auto& tensor = THPVariable_Unpack(one);
      if (!ordinary(tensor) || (!inputs.empty() && tensor.device() != inputs[0].device())) return false;
      inputs.push_back(tensor);
      key.push_back('t');
    } else if (one == Py_None) {
      key.push_back('n');
    } else if (PyBool_Check(one)) {
      key.push_back(one == Py_True ? '1' : '0');
    } else if (PyLong_CheckExact(one)) {
      int overflow = 0;
      key.push_back('i');
      append(key, PyLong_AsLongLongAndOverflow(one, &overflow));
      if (overflow) return false;
    } else if (PyFloat_CheckExact(one)) {
      key.push_back('f');
      append(key, PyFloat_AS_DOUBLE(one));
    } else if (PyUnicode_CheckExact(one)) {
      Py_ssize_t length = 0;
      const char* const text = PyUnicode_AsUTF8AndSize(one, &length);
      if (!text) throw python_error();
      key.push_back('s');
      append(key, length);
      key.append(text, length);
    } else {
      return false;
    }
  }
  return !inputs.empty();
}

// apply(function, check, *arguments) of _replay.py, replayed where that is possible.
PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::string key;
  variable_list inputs;
  append(key, arguments[0]);
  key.push_back(at::GradMode::is_enabled());
  c10::intrusive_ptr<Recording> recording;
  if (gather(arguments + 2, count - 2, key, inputs)) {
    key.push_back(static_cast<char>(inputs[0].device().index()));
    describe(key, inputs);
    auto found = recordings().find(key);
    if (found == recordings().end()) {
      PyObject* const made = PyObject_Vectorcall(record.ptr(), arguments, count, nullptr);
      const auto recorded = py::reinterpret_steal<py::object>(made);
      if (!recorded) throw python_error();
      if (recordings().size() >= MOST) recordings().clear();
      Py_INCREF(arguments[0]);  // for ever: its address is in the key
      found = recordings().emplace(key, nullptr).first;
      if (!recorded.is_none()) found->second = c10::make_intrusive<Recording>(recorded, inputs[0].device());
    }
    recording = found->second;
  }
  if (!recording) return PyObject_Vectorcall(plain.ptr(), arguments, count, nullptr);
  variable_list results;
  {
    const py::gil_scoped_release no_gil;
    results = Replay::apply(recording, at::TensorList(inputs));
  }
  if (recording->single) return THPVariable_Wrap(std::move(results[0]));
  return wrap(results).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"apply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(apply)), METH_FASTCALL, nullptr}, {}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("set_python", [](py::object recorder, py::object fallback) {
    record = recorder.release();
    plain = fallback.release();
  });
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}
