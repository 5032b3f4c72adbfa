// A CUDA device of which the memory and the arithmetic are the CPU's, for tests.
//
// Tensors on it are on "cuda:0" for all of torch: for dispatch, autocast, autograd and device checks.
// An operator that reaches the CUDA backend computes on CPU tensors over the same memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device GPU(DeviceType::CUDA, 0);
std::atomic<int64_t> live{0}, most{0}, limit{INT64_MAX};

// Memory. What an operator returns keeps the CPU storage that it is in, and is counted.

struct Block {
  c10::Storage storage;
  int64_t bytes;
};

void end_block(void* context) {
  auto* block = static_cast<Block*>(context);
  live -= block->bytes;
  delete block;
}

c10::DataPtr on_gpu(const c10::Storage& storage) {
  int64_t bytes = storage.nbytes();
  TORCH_CHECK_WITH(OutOfMemoryError, live + bytes <= limit,
                   "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
  live += bytes;
  most = std::max(most.load(), live.load());
  return {storage.mutable_data(), new Block{storage, bytes}, &end_block, GPU};
}

// Pinned memory is known by its address.

std::mutex pins_lock;
std::map<uintptr_t, size_t> pins;

void end_pin(void* data) {
  {
    std::lock_guard<std::mutex> held(pins_lock);
    pins.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> held(pins_lock);
    pins[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, data, &end_pin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &end_pin; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

bool is_pinned(const void* data) {
  auto address = reinterpret_cast<uintptr_t>(data);
  std::lock_guard<std::mutex> held(pins_lock);
  auto after = pins.upper_bound(address);
  if (after == pins.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + std::max<size_t>(block->second, 1);
}

// The device.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = GPU;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
};

}  // namespace

namespace at {  // where the registry looks for it

struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<::Generator>();
  }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator generator = getNewGenerator(0);
    return generator;
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace {

// Operators.

Tensor over(const c10::Storage& storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// An inference tensor where ``source`` is one, and only there.
Tensor view(const Tensor& source, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(source.storage()), source.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the GPU, and over the same memory on the CPU
  std::map<void*, c10::Storage> storages;
  std::vector<std::pair<at::Generator, at::Generator>> generators;
  bool large_on_cpu = false;

  Tensor to_cpu(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      large_on_cpu |= tensor.dim() > 0;
      return tensor;
    }
    const auto& storage = tensor.storage();
    auto [entry, is_new] = storages.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      entry->second = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
          c10::DataPtr(storage.mutable_data(), Device(DeviceType::CPU)),
          c10::GetAllocator(DeviceType::CPU), true);
    }
    pairs.emplace_back(tensor, over(entry->second, c10::DispatchKey::CPU, tensor));
    return pairs.back().second;
  }

  Tensor to_gpu(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [gpu, cpu] : pairs)
      if (cpu.is_same(tensor)) return gpu;  // in place
    for (auto& [gpu, cpu] : pairs)
      if (cpu.storage().is_alias_of(tensor.storage()))  // a view
        return view(gpu, tensor);
    c10::Storage storage = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(), on_gpu(tensor.storage()),
        nullptr, false);
    return over(storage, c10::DispatchKey::CUDA, tensor);
  }

  // What an operator has resized is elsewhere now.
  void take_over_resized() {
    for (auto& [gpu, cpu] : pairs) {
      if (cpu.storage().data() != gpu.storage().data()) {
        auto* storage = gpu.storage().unsafeGetStorageImpl();
        storage->set_data_ptr_noswap(on_gpu(cpu.storage()));
        storage->set_nbytes(cpu.storage().nbytes());
      }
      if (cpu.sizes() != gpu.sizes() || cpu.strides() != gpu.strides())
        gpu.unsafeGetTensorImpl()->set_sizes_and_strides(
            cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

// A copy may, and indices on the CPU may index what is on the GPU.
bool may_mix_devices(const std::string& name, bool is_first_on_gpu) {
  return name == "aten::copy_" ||
         (is_first_on_gpu &&
          (name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0));
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Call call;
  auto num = op.schema().arguments().size();
  bool is_first_on_gpu = false;
  if (num > 0) {
    const auto& first = torch::jit::last(*stack, num)[0];
    is_first_on_gpu = first.isTensor() && first.toTensor().is_cuda();
  }
  for (auto& value : torch::jit::last(*stack, num)) {
    auto& argument = const_cast<c10::IValue&>(value);
    if (argument.isTensor()) {
      argument = call.to_cpu(argument.toTensor());
    } else if (argument.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : argument.toTensorVector()) tensors.push_back(call.to_cpu(tensor));
      argument = tensors;
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (std::optional<Tensor> tensor : argument.toOptionalTensorVector())
        tensors.push_back(tensor ? std::optional(call.to_cpu(*tensor)) : tensor);
      argument = tensors;
    } else if (argument.isDevice() && argument.toDevice().is_cuda()) {
      argument = Device(DeviceType::CPU);
    } else if (argument.isGenerator() && argument.toGenerator().device().is_cuda()) {
      auto generator = argument.toGenerator(), on_cpu = at::detail::createCPUGenerator();
      on_cpu.set_state(generator.get_state());
      call.generators.emplace_back(generator, on_cpu);
      argument = on_cpu;
    }
  }
  const auto& name = op.schema().name();
  TORCH_CHECK(call.pairs.empty() || !call.large_on_cpu || may_mix_devices(name, is_first_on_gpu),
              name,
              ": expected all tensors to be on the same device, found cuda:0 and cpu");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [generator, on_cpu] : call.generators) generator.set_state(on_cpu.get_state());
  call.take_over_resized();
  for (auto& value : torch::jit::last(*stack, op.schema().returns().size())) {
    auto& result = const_cast<c10::IValue&>(value);
    if (result.isTensor()) {
      result = call.to_gpu(result.toTensor());
    } else if (result.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : result.toTensorVector()) tensors.push_back(call.to_gpu(tensor));
      result = tensors;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// These have kernels for every backend, which look for parts of CUDA that are not there.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"copy_", "convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

}  // namespace

extern "C" {
int64_t pretended_live_bytes() { return live; }
int64_t pretended_most_bytes() { return most; }
void pretended_reset_most() { most = live.load(); }
void pretended_set_limit(int64_t bytes) { limit = bytes; }
}
