// A pretended CUDA device for CPU builds of torch. Its tensors say "cuda:N" and lie in host memory.
//
// An operation that would be a kernel on a GPU is computed by the CPU's kernel on the same memory, and counted.
// As on a GPU, operands on different devices are refused and memory is limited. Every transfer and every wait of the
// host is reported to a Python callback, which can look at the Python stack.
//
// torch registers no kernels for CUDA in a CPU build, so these are the only ones. Nothing here computes fast, and
// nothing here tells how fast a GPU is.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <atomic>
#include <map>
#include <mutex>
#include <set>

namespace {
using c10::Device; using c10::DeviceIndex; using c10::DeviceType; using c10::DispatchKey; using c10::DispatchKeySet;
using c10::Stream; using at::Tensor; using c10::IValue;

constexpr int MAX_DEVICES = 8;
std::atomic<int> devices{1};
thread_local DeviceIndex current = 0;
std::atomic<int64_t> limit{int64_t(1) << 40};
std::atomic<int64_t> held_bytes[MAX_DEVICES], peak_bytes[MAX_DEVICES], launches{0}, h2d{0}, d2h{0}, d2d{0}, waits{0}, items{0};
std::atomic<bool> by_name{false};
std::atomic<int> paused{0};
std::mutex lock;
std::map<std::string, int64_t> names;  // launches by operation
PyObject* listener = nullptr;  // callable(kind, bytes, blocking)

void report(const char* kind, int64_t bytes, bool blocking) {
  if (listener == nullptr) return;
  py::gil_scoped_acquire gil;
  py::reinterpret_borrow<py::object>(listener)(kind, bytes, blocking);
}

void hold(int device, int64_t n, bool refuse) {
  int64_t total = held_bytes[device] + n;
  if (refuse)
    TORCH_CHECK_WITH(OutOfMemoryError, total <= limit, "CUDA out of memory. Tried to allocate ", n, " bytes (pretended GPU ",
                     device, " of ", limit.load(), " bytes, ", held_bytes[device].load(), " in use)");
  held_bytes[device] += n;
  int64_t before = peak_bytes[device];
  while (total > before && !peak_bytes[device].compare_exchange_weak(before, total)) {}
}

// Device memory: `memory` is freed with it, or `borrowed` holds what a CPU kernel allocated.
struct Block { void* memory; c10::Storage borrowed; int64_t bytes; int device; };
void drop(void* ctx) {
  auto* block = static_cast<Block*>(ctx);
  held_bytes[block->device] -= block->bytes;
  if (block->memory) c10::free_cpu(block->memory);
  delete block;
}
int64_t rounded(int64_t n) { return (n + 511) / 512 * 512; }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    int device = current;
    hold(device, rounded(n), true);
    void* memory = n ? c10::alloc_cpu(n) : nullptr;
    // What a GPU hands out is not zero: an unwritten value must show.
    if (memory) memset(memory, 0xff, n);
    return {memory, new Block{memory, {}, rounded((int64_t)n), device}, &drop, Device(DeviceType::CUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
Allocator allocator;

// Page-locked memory is ordinary memory that is remembered: only copies from it can go on while the host does.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;
void unpin(void* memory) {
  { std::lock_guard<std::mutex> guard(pinned_lock); pinned.erase(static_cast<const char*>(memory)); }
  c10::free_cpu(memory);
}
bool in_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(pointer));
  if (after == pinned.begin()) return false;
  auto [start, size] = *--after;
  return static_cast<const char*>(pointer) < start + size;
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* memory = c10::alloc_cpu(std::max<size_t>(n, 1));
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<const char*>(memory)] = n;
    return {memory, memory, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { Device before = getDevice(); setDevice(d); return before; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < devices, "CUDA error: invalid device ordinal ", (int)d.index());
    if (d.index() >= 0) current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, d.index() < 0 ? current : d.index())); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return getStream(s.device()); }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { ++waits; }
  void synchronizeEvent(void*) const override { ++waits; }
  void synchronizeDevice(const DeviceIndex) const override { ++waits; }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex = -1) const override { return at::globalContext().defaultGenerator(at::kCPU); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override { return in_pinned(pointer); }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
};

// ---- tensors -------------------------------------------------------------------------------------------------------
Tensor as_host(const Tensor& x) {  // the same memory, as the CPU sees it
  if (!x.defined() || !x.is_cuda()) return x;
  auto storage = x.storage();
  auto held = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.mutable_data(), new c10::Storage(storage), [](void* s) { delete static_cast<c10::Storage*>(s); }, Device(DeviceType::CPU)),
      c10::GetCPUAllocator(), true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(held), DispatchKeySet(DispatchKey::CPU), x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.is_neg()) made._set_neg(true);
  if (x.is_conj()) made._set_conj(true);
  return made;
}

Tensor as_device(const Tensor& x, Device device) {  // takes over what a CPU kernel made
  auto storage = x.storage();
  int64_t bytes = rounded(storage.nbytes());
  hold(device.index(), bytes, true);
  auto held = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.mutable_data(), new Block{nullptr, storage, bytes, device.index()}, &drop, device), &allocator, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(held), DispatchKeySet(DispatchKey::CUDA), x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return made;
}

Device resolved(std::optional<Device> d) {
  Device device = d.value_or(Device(DeviceType::CUDA, current));
  device = Device(DeviceType::CUDA, device.index() < 0 ? current : device.index());
  TORCH_CHECK(device.index() < devices, "CUDA error: invalid device ordinal ", (int)device.index());
  return device;
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  DeviceIndex before = current;
  current = resolved(device).index();
  auto made = at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
  current = before;
  return made;
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  DeviceIndex before = current;
  current = resolved(device).index();
  auto made = at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
  current = before;
  return made;
}

const Tensor& resize_storage(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t need = (impl->storage_offset() + impl->numel()) * self.itemsize();
  if (self.storage().nbytes() < need) {
    DeviceIndex before = current;
    current = self.device().index();
    auto fresh = allocator.allocate(need);
    current = before;
    if (self.storage().nbytes()) memcpy(fresh.get(), self.storage().data(), self.storage().nbytes());
    self.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    self.storage().set_nbytes(need);
  }
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (strides.empty() && !size.empty()) {
    strides.resize(size.size(), 1);
    for (int64_t n = (int64_t)size.size() - 2; n >= 0; --n) strides[n] = strides[n + 1] * std::max<int64_t>(size[n + 1], 1);
  }
  impl->set_sizes_and_strides(size, strides, offset);
  return self;
}
Tensor& set_whole(Tensor& self, c10::Storage source) {
  int64_t n = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) { return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides()); }
Tensor& set_nothing(Tensor& self) { return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {1}); }

Tensor as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }
Tensor reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) { return at::native::_reshape_alias(self, size, stride); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(self, dim, size, step); }

Tensor& copy(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.unsafeGetTensorImpl() == from.unsafeGetTensorImpl() || !self.numel()) return self;
  TORCH_CHECK(self.defined() && from.defined(), "copy_ of nothing");
  int64_t bytes = from.nbytes();
  if (self.is_cuda() && from.is_cuda()) {
    if (!paused) ++d2d, ++launches;
    if (self.device() != from.device()) report("p2p", bytes, !non_blocking);
    if (by_name && !paused) { std::lock_guard<std::mutex> guard(lock); ++names["aten::copy_"]; }
  } else if (self.is_cuda()) {
    ++h2d;
    if (from.dtype() != self.dtype()) ++launches;  // converted on the device
    report("h2d", bytes, !(non_blocking && in_pinned(from.const_data_ptr())));
  } else {
    ++d2h;
    report("d2h", bytes, !non_blocking);
  }
  Tensor to = as_host(self);
  to.copy_(as_host(from), false);
  return self;
}
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) { Tensor to = dst; copy(to, self, non_blocking); return dst; }
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) { dst.resize_(self.sizes()); Tensor to = dst; copy(to, self, false); return dst; }

c10::Scalar local_scalar(const Tensor& self) {
  ++items;
  report("item", self.itemsize(), true);
  return at::_local_scalar_dense(as_host(self));
}
bool is_pinned(const Tensor&, std::optional<Device>) { return false; }
void record_stream(Tensor&, c10::Stream) {}

// ---- all other operations ------------------------------------------------------------------------------------------
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};
const std::set<std::string> STRICT = {  // kernels that take no CPU scalar beside CUDA tensors
    "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::index_select", "aten::gather", "aten::embedding",
    "aten::scatter", "aten::scatter_add", "aten::index_add", "aten::cat", "aten::index_copy"};
// Results whose size depends on values: a GPU's host waits for them.
const std::set<std::string> WAITING = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive",
                                       "aten::unique_dim", "aten::repeat_interleave", "aten::equal", "aten::is_nonzero"};

void visit(const IValue& v, const std::function<void(const Tensor&)>& f) {
  if (v.isTensor()) { if (v.toTensor().defined()) f(v.toTensor()); }
  else if (v.isTensorList()) { for (const Tensor& t : v.toTensorVector()) if (t.defined()) f(t); }
  else if (v.isList()) { for (const IValue& each : v.toListRef()) visit(each, f); }
}

void fallback(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  std::optional<Device> device;
  bool indexing = INDEXING.count(name) > 0;
  std::vector<Tensor> strangers;
  for (size_t n = begin; n < stack->size(); ++n) {
    const IValue& v = (*stack)[n];
    if (v.isDevice() && v.toDevice().is_cuda() && !device) device = resolved(v.toDevice());
    visit(v, [&](const Tensor& t) {
      if (t.is_cuda()) {
        TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                    *device, " and ", t.device(), "! (when checking ", name, ")");
        device = t.device();
      } else strangers.push_back(t);
    });
  }
  TORCH_CHECK(device, name, " reached the pretended GPU without a tensor of it");
  for (const Tensor& t : strangers) {
    if (indexing) { ++h2d; report("h2d", t.nbytes(), true); continue; }
    TORCH_CHECK(t.dim() == 0 && !STRICT.count(name), "Expected all tensors to be on the same device, but found at least two devices, ",
                *device, " and ", t.device(), "! (when checking ", name, ", a tensor of shape ", t.sizes(), ")");
  }
  if (!paused) ++launches;
  if (by_name && !paused) { std::lock_guard<std::mutex> guard(lock); ++names[name]; }
  if (WAITING.count(name)) { ++waits; report("wait", 0, true); }
  // A boolean index is turned into numbers first: its size is waited for.
  if (indexing)
    visit((*stack)[begin + 1], [&](const Tensor& t) { if (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) { ++waits; report("wait", 0, true); } });

  std::vector<std::pair<Tensor, Tensor>> aliases;  // on the device, on the host
  auto host = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || !t.is_cuda()) return t;
    for (auto& [device_side, host_side] : aliases) if (device_side.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return host_side;
    aliases.emplace_back(t, as_host(t));
    return aliases.back().second;
  };
  for (size_t n = begin; n < stack->size(); ++n) {
    IValue& v = (*stack)[n];
    if (v.isTensor()) v = host(v.toTensor());
    else if (v.isTensorList()) { std::vector<Tensor> made; for (const Tensor& t : v.toTensorVector()) made.push_back(host(t)); v = c10::List<Tensor>(made); }
    else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const IValue& each : v.toListRef()) made.push_back(each.isNone() ? std::optional<Tensor>() : std::optional<Tensor>(host(each.toTensor())));
      v = made;
    } else if (v.isDevice()) v = Device(DeviceType::CPU);
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (auto& [device_side, host_side] : aliases)  // `out=` that was resized
    if (device_side.sizes() != host_side.sizes() || host_side.storage().data() != device_side.storage().data()) {
      resize_storage(device_side, host_side.sizes(), std::nullopt);
      as_host(device_side).copy_(host_side);
    }
  auto back = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    for (auto& [device_side, host_side] : aliases) if (host_side.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return device_side;
    for (auto& [device_side, host_side] : aliases)
      TORCH_CHECK(!t.has_storage() || t.storage().unsafeGetStorageImpl() != host_side.storage().unsafeGetStorageImpl() || !t.nbytes(),
                  name, " gives a view, which the pretended GPU has no kernel for");
    return as_device(t, *device);
  };
  for (size_t n = first; n < stack->size(); ++n) {
    IValue& v = (*stack)[n];
    if (v.isTensor()) v = back(v.toTensor());
    else if (v.isTensorList()) { std::vector<Tensor> made; for (const Tensor& t : v.toTensorVector()) made.push_back(back(t)); v = c10::List<Tensor>(made); }
  }
}

void launched(const std::string& name) {
  if (paused) return;
  ++launches;
  if (by_name) { std::lock_guard<std::mutex> guard(lock); ++names[name]; }
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, c10::IntArrayRef, const std::optional<Tensor>& weight, std::optional<double> epsilon) {
  launched("aten::_fused_rms_norm");
  Tensor exact = as_host(x).to(at::kFloat), factor = exact.square().mean(-1, true).add(*epsilon).rsqrt();
  Tensor y = exact.mul(factor).mul(as_host(*weight).to(at::kFloat)).to(x.scalar_type());
  return {as_device(y, x.device()), as_device(factor, x.device())};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const Tensor& x, c10::IntArrayRef, const Tensor& factor,
                                             const std::optional<Tensor>& weight, std::array<bool, 2> wanted) {
  launched("aten::_fused_rms_norm_backward");
  TORCH_CHECK(!wanted[1], "the pretended GPU has no gradient of a norm's weight");
  Tensor f = as_host(factor), normed = as_host(x).to(at::kFloat).mul(f);
  Tensor pull = as_host(gradient).to(at::kFloat).mul(as_host(*weight).to(at::kFloat));
  Tensor result = pull.sub(normed.mul(pull.mul(normed).mean(-1, true))).mul(f).to(x.scalar_type());
  return {as_device(result, x.device()), Tensor()};
}

py::dict counts() {
  py::dict d;
  d["launches"] = launches.load(); d["h2d"] = h2d.load(); d["d2h"] = d2h.load(); d["d2d"] = d2d.load();
  d["items"] = items.load(); d["waits"] = waits.load();
  return d;
}
}  // namespace

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
// torch made its hooks while it was imported, before this was loaded: that object gets these functions.
const bool hooked = [] {
  static Hooks* ours = new Hooks(at::CUDAHooksArgs{});
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(theirs) = *reinterpret_cast<void**>(ours);
  return true;
}();

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("is_pinned", TORCH_FN(is_pinned));
  m.impl("record_stream", TORCH_FN(record_stream));
  // A build for CUDA has a kernel each of these; one for the CPU takes them apart.
  m.impl("_fused_rms_norm", TORCH_FN(rms_norm));
  m.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("counts", &counts);
  m.def("zero", [] { launches = h2d = d2h = d2d = waits = items = 0; std::lock_guard<std::mutex> guard(lock); names.clear(); });
  m.def("names", [] { std::lock_guard<std::mutex> guard(lock); return names; });
  m.def("by_name", [](bool on) { by_name = on; });
  m.def("set_limit", [](int64_t n) { limit = n; });
  m.def("limit", [] { return limit.load(); });
  m.def("set_devices", [](int n) { devices = n; });
  m.def("devices", [] { return devices.load(); });
  m.def("set_device", [](int n) { TORCH_CHECK(n < devices, "invalid device ordinal"); if (n >= 0) current = n; });
  m.def("device", [] { return (int)current; });
  m.def("held", [](int d) { return held_bytes[d].load(); });
  m.def("most_held", [](int d) { return peak_bytes[d].load(); });
  m.def("reset_peak", [](int d) { peak_bytes[d] = held_bytes[d].load(); });
  m.def("pause", [](bool on) { paused += on ? 1 : -1; });
  m.def("launched", [](const std::string& name, int n) { launches += n; if (by_name) { std::lock_guard<std::mutex> guard(lock); names[name] += n; } });
  m.def("waited", [] { ++waits; });
  m.def("on_transfer", [](py::object f) {
    Py_XDECREF(listener);
    listener = f.is_none() ? nullptr : f.inc_ref().ptr();
  });
}
