// An allocator over torch's own. While it is on, every block that torch, its operators or native code ask for is filled
// with poison, lies between two bands of canaries, and stays allocated until its bands have been inspected.
//
// Compiled for the CPU's memory, or with CONFORMANCE_CUDA for that of CUDA devices. Not fenced: blocks asked for by the
// raw interface of CUDA's allocator, which may be returned after this one is off.

#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>
#include <vector>

#ifdef CONFORMANCE_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>
#endif

namespace {

#ifdef CONFORMANCE_CUDA
using Base = c10::cuda::CUDACachingAllocator::CUDAAllocator;

// On the current stream, as every use of a new block.
void fill(char* start, int byte, size_t size) {
  C10_CUDA_CHECK(cudaMemsetAsync(start, byte, size, c10::cuda::getCurrentCUDAStream()));
}
void read(char* host, const char* start, size_t size) {
  C10_CUDA_CHECK(cudaMemcpy(host, start, size, cudaMemcpyDeviceToHost));
}
#else
using Base = c10::Allocator;

void fill(char* start, int byte, size_t size) { std::memset(start, byte, size); }
void read(char* host, const char* start, size_t size) { std::memcpy(host, start, size); }
#endif

struct Block {
  c10::DataPtr memory;  // from torch's own allocator
  size_t size, band;
  uint64_t session;
  bool freed;
};

// Never released: tensors may be freed at exit, after the objects of this file.
struct State {
  std::mutex mutex;
  std::unordered_map<void*, Block> blocks;  // by the address that the caller got
  Base* native = nullptr;
  uint64_t session = 0;
  bool on = false;
  int poison = 0, canary = 0;
};
State& state() {
  static auto* const all = new State();
  return *all;
}

// A band is as wide as its block, within limits: a block of half the needed size is overrun by no more than its size.
// A multiple of 512 keeps the alignment of torch's allocators.
size_t band_of(size_t size) {
  return std::clamp<size_t>((size + 511) / 512 * 512, 4096, 1 << 20);
}

void release(void* start) {
  c10::DataPtr gone;  // freed last, without the lock
  const std::lock_guard lock(state().mutex);
  const auto found = state().blocks.find(start);
  if (found == state().blocks.end()) return;
  if (state().on && found->second.session == state().session) {
    found->second.freed = true;
    return;
  }
  gone = std::move(found->second.memory);
  state().blocks.erase(found);
}

c10::DataPtr fenced(size_t size) {
  auto& all = state();
  if (!all.on || size == 0) return all.native->allocate(size);
  const size_t band = band_of(size);
  auto memory = all.native->allocate(size + 2 * band);
  const auto device = memory.device();
  auto* const before = static_cast<char*>(memory.get());
  auto* const start = before + band;
  fill(before, all.canary, size + 2 * band);
  fill(start, all.poison, size);
  const std::lock_guard lock(all.mutex);
  all.blocks.insert_or_assign(start, Block{std::move(memory), size, band, all.session, false});
  return {start, start, &release, device};
}

#ifdef CONFORMANCE_CUDA
using Pluggable = torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator;

struct Fenced final : Pluggable {
  Fenced() : Pluggable([](size_t, int, cudaStream_t) { return nullptr; }, [](void*, size_t, int, cudaStream_t) {}) {}

  c10::DataPtr allocate(size_t size) override { return fenced(size); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void recordStream(const c10::DataPtr& pointer, c10::cuda::CUDAStream stream) override {
    const std::lock_guard lock(state().mutex);
    const auto found = state().blocks.find(pointer.get());
    native().recordStream(found == state().blocks.end() ? pointer : found->second.memory, stream);
  }

  void* raw_alloc(size_t size) override { return native().raw_alloc(size); }
  void* raw_alloc_with_stream(size_t size, cudaStream_t stream) override {
    return native().raw_alloc_with_stream(size, stream);
  }
  void raw_delete(void* pointer) override { native().raw_delete(pointer); }
  bool initialized() override { return native().initialized(); }
  void emptyCache(c10::cuda::MempoolId_t pool) override { native().emptyCache(pool); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return native().getDeviceStats(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override { native().resetAccumulatedStats(device); }
  void resetPeakStats(c10::DeviceIndex device) override { native().resetPeakStats(device); }
  void beginAllocateToPool(
      c10::DeviceIndex device, c10::cuda::MempoolId_t pool, std::function<bool(cudaStream_t)> filter) override {
    native().beginAllocateToPool(device, pool, std::move(filter));
  }
  void endAllocateToPool(c10::DeviceIndex device, c10::cuda::MempoolId_t pool) override {
    native().endAllocateToPool(device, pool);
  }
  void releasePool(c10::DeviceIndex device, c10::cuda::MempoolId_t pool) override {
    native().releasePool(device, pool);
  }
  cudaError_t memcpyAsync(void* to, int to_device, const void* from, int from_device, size_t size, cudaStream_t stream,
                          bool peers) override {
    return native().memcpyAsync(to, to_device, from, from_device, size, stream, peers);
  }
  std::string name() override { return native().name(); }

 private:
  static Base& native() { return *state().native; }
};

constexpr auto DEVICE = c10::DeviceType::CUDA;
Base* current() { return c10::cuda::CUDACachingAllocator::get(); }
void install(Base* allocator) { c10::cuda::CUDACachingAllocator::allocator.store(allocator); }

void synchronize(const std::set<c10::DeviceIndex>& devices) {
  for (const auto device : devices) {
    const c10::cuda::CUDAGuard guard(device);
    C10_CUDA_CHECK(cudaDeviceSynchronize());
  }
}
#else
struct Fenced final : Base {
  c10::DataPtr allocate(size_t size) override { return fenced(size); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

constexpr auto DEVICE = c10::DeviceType::CPU;
Base* current() { return c10::GetAllocator(DEVICE); }
void install(Base*) {}
void synchronize(const std::set<c10::DeviceIndex>&) {}
#endif

// Bytes from a block to the closest byte that was written outside of it, negative if before it; 0 without one.
int64_t overrun(const Block& block, int canary) {
  const auto* const before = static_cast<const char*>(block.memory.get());
  const auto band = static_cast<int64_t>(block.band);
  std::vector<char> bytes(block.band);
  read(bytes.data(), before, block.band);
  for (int64_t i = band - 1; i >= 0; --i)
    if (bytes[i] != static_cast<char>(canary)) return i - band;
  read(bytes.data(), before + block.band + block.size, block.band);
  for (int64_t i = 0; i < band; ++i)
    if (bytes[i] != static_cast<char>(canary)) return i + 1;
  return 0;
}

int64_t inspect(int64_t* size, int64_t* count) {
  auto& all = state();
  std::vector<const Block*> blocks;
  std::set<c10::DeviceIndex> devices;
  for (const auto& [start, block] : all.blocks) {
    if (block.session != all.session) continue;
    blocks.push_back(&block);
    devices.insert(block.memory.device().index());
  }
  *count = static_cast<int64_t>(blocks.size());
  synchronize(devices);
  for (const auto* block : blocks) {
    *size = static_cast<int64_t>(block->size);
    if (const auto where = overrun(*block, all.canary)) return where;
  }
  return 0;
}

}  // namespace

extern "C" {

// From now on fence every block, with these bytes.
void conformance_fences_on(int poison, int canary) {
  static auto* const allocator = new Fenced();  // tensors keep a pointer to it
  auto& all = state();
  all.native = current();
  all.poison = poison, all.canary = canary, ++all.session;
  c10::SetAllocator(DEVICE, allocator, 255);
  install(allocator);
  all.on = true;
}

// Stop, and inspect the blocks. Sets how many there were, the overrun, and the size of the block that was overrun, in
// bytes. Returns whether they could be inspected: after an illegal access a device answers nothing more.
bool conformance_fences_off(int64_t* where, int64_t* size, int64_t* count) {
  auto& all = state();
  c10::SetAllocator(DEVICE, all.native, 255);
  install(all.native);
  std::vector<c10::DataPtr> gone;  // freed last, without the lock
  const std::lock_guard lock(all.mutex);
  all.on = false;
  try {
    *where = inspect(size, count);
  } catch (const c10::Error&) {
    return false;
  }
  for (auto block = all.blocks.begin(); block != all.blocks.end();) {
    if (block->second.freed) {
      gone.push_back(std::move(block->second.memory));
      block = all.blocks.erase(block);
    } else {
      ++block;
    }
  }
  return true;
}
}
