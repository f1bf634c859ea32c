// Replays the calls that `_replay.py` recorded: their programs and an autograd node around them, without Python.

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "_replay_program.h"

using torch::autograd::AutogradContext;

namespace {

template <typename T>
void append(std::string& key, T value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// What a recording depends on: the metadata and alignment of each tensor, and which of them share an address.
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

// A recording or a backward pass takes a few kilobytes: without a limit, ever new signatures would fill the memory.
constexpr size_t MOST = 4096, MOST_BACKWARD = 64;

// A recorded call of an autograd.Function: the forward pass, and a backward pass per signature of its gradients.
struct Recording : torch::CustomClassHolder {
  Program forward;
  // Numbers of tensors: saved ones (-1: None), early gradients, which the first backward pass takes, and outputs
  // without a gradient.
  std::vector<int64_t> saved, kept, constant;
  int64_t inputs;
  bool materialize, single;
  at::Device device;
  py::object python;  // the `Recording` of _replay.py
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<const Program>> backward;  // null: cannot be replayed

  Recording(py::object recorded, at::Device where)
      : forward(recorded.attr("program").cast<py::tuple>()),
        saved(recorded.attr("saved").cast<std::vector<int64_t>>()),
        kept(recorded.attr("early_gradients").cast<std::vector<int64_t>>()),
        constant(recorded.attr("non_differentiable").cast<std::vector<int64_t>>()),
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

// Call into Python from autograd's thread; its exceptions reach the caller of backward() unchanged.
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

// Whether a tensor is plain memory on a CUDA device: no subclass, no transform, no conjugate or negative bit.
bool ordinary(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet others({DispatchKey::Python, DispatchKey::FuncTorchBatched,
      DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize, DispatchKey::Conjugate, DispatchKey::Negative,
      DispatchKey::ZeroTensor});
  return tensor.is_cuda() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(others);
}

// A recording to be replayed; or a new one, with the tensors that its call has already allocated.
struct Call {
  c10::intrusive_ptr<Recording> recording;
  std::optional<variable_list> made;
};

// The tensors that Python allocated, as if they had been allocated here: no views.
variable_list made(const py::handle tensors) {
  variable_list all = unwrap(tensors);
  for (auto& one : all) one = one.tensor_data();
  return all;
}

struct Replay : torch::autograd::Function<Replay> {
  static variable_list forward(AutogradContext* ctx, const Call& call, at::TensorList inputs) {
    const auto& [recording, made] = call;
    variable_list tensors = inputs.vec();
    if (made) tensors.insert(tensors.end(), made->begin(), made->end());
    else recording->forward.run(tensors, recording->device);
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
    ctx->saved_data.erase("kept");  // from here on the caller owns them

    std::string key;
    std::vector<bool> needs;
    for (int64_t i = 0; i < recording.inputs; ++i) {
      needs.push_back(ctx->needs_input_grad(i));
      key.push_back(needs.back() ? '1' : '0');
    }
    variable_list tensors = grad_outputs;
    tensors.insert(tensors.end(), saved.begin(), saved.end());
    tensors.insert(tensors.end(), kept.begin(), kept.end());
    const auto python = [&](const char* method) {
      return recording.python.attr(method)(needs, wrap(grad_outputs), wrap(saved), wrap(kept));
    };
    variable_list grads(1);  // none for the recording
    const auto give = [&](const variable_list& given) {
      grads.insert(grads.end(), given.begin(), given.end());
      return grads;
    };
    const auto by_python = [&] { return give(with_python([&] { return unwrap(python("backward")); })); };
    // Python, if the gradients are to be differentiated in turn, or if a mode is to see the ops.
    if (at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set()) return by_python();
    for (const auto& one : grad_outputs)
      if (one.defined() && !ordinary(one)) return by_python();

    describe(key, tensors);
    std::unique_lock lock(recording.mutex);
    const auto program = recording.backward.find(key);
    if (program != recording.backward.end()) {
      const auto replayed = program->second;
      lock.unlock();
      if (!replayed) return by_python();
      replayed->run(tensors, recording.device);
      return give(pick(tensors, replayed->results));
    }
    lock.unlock();
    std::shared_ptr<const Program> recorded;
    with_python([&] {
      const py::object found = python("record_backward");
      if (found.is_none()) return;
      const auto [parts, allocated] = found.cast<std::pair<py::tuple, py::object>>();
      recorded = std::make_shared<const Program>(parts);
      for (const auto& one : made(allocated)) tensors.push_back(one);
    });
    lock.lock();
    if (recording.backward.size() >= MOST_BACKWARD) recording.backward.clear();
    recording.backward[key] = recorded;
    lock.unlock();
    return recorded ? give(pick(tensors, recorded->results)) : by_python();
  }
};

// `record` and `call` of _replay.py; like the recordings, never released: at exit, objects are destroyed in any order.
py::handle record, plain;
std::unordered_map<std::string, c10::intrusive_ptr<Recording>>& recordings() {
  static auto* const all = new std::unordered_map<std::string, c10::intrusive_ptr<Recording>>();
  return *all;
}

// Append the arguments of a call to its key and its tensors to the inputs; false: this call cannot be replayed.
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

// call_recorded(function, check, *arguments) of _replay.py, replayed if possible.
PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::string key;
  variable_list inputs;
  append(key, arguments[0]);
  key.push_back(at::GradMode::is_enabled());
  Call call;
  if (gather(arguments + 2, count - 2, key, inputs)) {
    key.push_back(static_cast<char>(inputs[0].device().index()));
    describe(key, inputs);
    const auto found = recordings().find(key);
    if (found != recordings().end()) {
      call.recording = found->second;
    } else {
      PyObject* const recorded = PyObject_Vectorcall(record.ptr(), arguments, count, nullptr);
      if (!recorded) throw python_error();
      const auto python = py::reinterpret_steal<py::object>(recorded);
      if (!python.is_none()) {
        call.made = made(python.attr("allocated"));
        python.attr("allocated") = py::none();
        call.recording = c10::make_intrusive<Recording>(python, inputs[0].device());
      }
      if (recordings().size() >= MOST) recordings().clear();
      Py_INCREF(arguments[0]);  // never released: its address is in the key
      recordings()[key] = call.recording;  // null: calls with this signature cannot be replayed
    }
  }
  if (!call.recording) return PyObject_Vectorcall(plain.ptr(), arguments, count, nullptr);
  variable_list results;
  {
    const py::gil_scoped_release no_gil;
    results = Replay::apply(call, at::TensorList(inputs));
  }
  if (call.recording->single) return THPVariable_Wrap(std::move(results[0]));
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
  // The next call of each signature runs its Python again, for tools that watch it.
  module.def("forget", [] { recordings().clear(); });
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}
