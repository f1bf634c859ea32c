// One pass that `_replay.py` recorded: allocations and kernel launches.

#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>

namespace py = pybind11;
using at::Tensor;
using torch::autograd::variable_list;

namespace {

// The driver's functions, from the library that torch has loaded; linking would need it when this is compiled.
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
  int64_t number;  // of the tensor whose address is passed, or -1
  uint64_t bits;  // the value, if it is not an address
};

struct Launch {
  CUfunction function;
  unsigned programs, threads, shared_memory;
  std::vector<Parameter> parameters;
};

// One pass. Its tensors are numbered: first its inputs, then the tensors that it allocates.
struct Program {
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
  std::vector<int64_t> results;  // by number; -1: None

  // From (buffers, launches, results): (sizes, strides, dtype) and (function, programs, threads, shared memory,
  // [(number, bits)]) each.
  explicit Program(const py::tuple& parts) : results(parts[2].cast<std::vector<int64_t>>()) {
    for (const py::handle one : parts[0]) {
      const auto buffer = py::cast<py::tuple>(one);
      const auto dtype = reinterpret_cast<THPDtype*>(buffer[2].ptr())->scalar_type;
      buffers.push_back({buffer[0].cast<std::vector<int64_t>>(), buffer[1].cast<std::vector<int64_t>>(), dtype});
    }
    for (const py::handle one : parts[1]) {
      const auto launch = py::cast<py::tuple>(one);
      std::vector<Parameter> parameters;
      for (const auto& [number, bits] : launch[4].cast<std::vector<std::pair<int64_t, uint64_t>>>())
        parameters.push_back({number, bits});
      launches.push_back({reinterpret_cast<CUfunction>(launch[0].cast<uintptr_t>()), launch[1].cast<unsigned>(),
                          launch[2].cast<unsigned>(), launch[3].cast<unsigned>(), std::move(parameters)});
    }
  }

  // Allocate and launch on the current stream; the allocated tensors are appended to `tensors`.
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
        const auto [number, bits] = launch.parameters[i];
        values[i] = number < 0 ? bits : reinterpret_cast<uint64_t>(tensors[number].data_ptr());
        pointers[i] = &values[i];
      }
      check(DRIVER(cuLaunchKernel)(launch.function, launch.programs, 1, 1, launch.threads, 1, 1, launch.shared_memory,
                                   stream, pointers.data(), nullptr));
    }
  }
};

}  // namespace
