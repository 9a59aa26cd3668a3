// Tensor helpers for bindings.cpp, on PyTorch's stable ABI only. Only bindings.cpp and its bindings_*.h include it.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ling/common.h"

namespace ling::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Stands for the shape of a tensor in a message: "[2, 3]".
struct Shape {
  const Tensor& tensor;
};

inline void append(std::string& message, const char* part) { message += part; }
inline void append(std::string& message, const std::string& part) { message += part; }
inline void append(std::string& message, int64_t part) { message += std::to_string(part); }
inline void append(std::string& message, const Shape& part) {
  message += '[';
  for (int64_t dim = 0; dim < part.tensor.dim(); ++dim) {
    message += dim ? ", " : "";
    message += std::to_string(part.tensor.size(dim));
  }
  message += ']';
}

// Throws a RuntimeError in Python; `parts` make up the message.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::string message = std::string("ling_ops::") + op + ": ";
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

// The message is put together only where the condition fails.
template <typename... Parts>
void expect(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

inline const char* name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// A named argument under check. Every method throws, naming the operator, the argument and what was found:
//     const Arg in{"route", "indices", indices};
//     in.cuda().dtype({ScalarType::Int, ScalarType::Long}).shape({-1, -1}).contiguous();
class Arg {
 public:
  Arg(const char* op, const char* label, const Tensor& tensor) : op_(op), label_(label), tensor_(tensor) {}

  const Arg& cuda() const {
    expect(tensor_.is_cuda(), op_, label_, " must be a CUDA tensor");
    return *this;
  }

  // On the same CUDA device as `other`.
  const Arg& with(const Tensor& other) const {
    cuda();
    expect(tensor_.get_device_index() == other.get_device_index(), op_, label_,
           " is on cuda:", tensor_.get_device_index(), ", other arguments on cuda:", other.get_device_index());
    return *this;
  }

  const Arg& dtype(std::initializer_list<ScalarType> allowed) const {
    for (ScalarType type : allowed) {
      if (tensor_.scalar_type() == type) return *this;
    }
    std::string wanted;
    for (ScalarType type : allowed) wanted += (wanted.empty() ? "" : ", ") + std::string(name(type));
    fail(op_, label_, " must be ", wanted, "; got ", name(tensor_.scalar_type()));
  }

  // Exact rank and sizes; -1 leaves a size open.
  const Arg& shape(std::initializer_list<int64_t> sizes) const {
    bool matches = tensor_.dim() == static_cast<int64_t>(sizes.size());
    int64_t dim = 0;
    for (int64_t size : sizes) {
      if (matches && size >= 0 && tensor_.size(dim) != size) matches = false;
      ++dim;
    }
    if (matches) return *this;
    std::string wanted;
    for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
    fail(op_, label_, " must have shape [", wanted, "]; got ", Shape{tensor_});
  }

  const Arg& contiguous() const {
    expect(tensor_.is_contiguous(), op_, label_, " must be contiguous");
    return *this;
  }

  // Neighbours in the last dimension are neighbours in memory.
  const Arg& inner_contiguous() const {
    const bool trivial = tensor_.dim() == 0 || tensor_.size(tensor_.dim() - 1) <= 1;
    expect(trivial || tensor_.stride(tensor_.dim() - 1) == 1, op_, label_, " must have inner stride 1");
    return *this;
  }

  // Start address divisible by `bytes`.
  const Arg& aligned(int64_t bytes) const {
    expect(reinterpret_cast<uintptr_t>(tensor_.data_ptr()) % bytes == 0, op_, label_, " must be aligned to ", bytes,
           " bytes");
    return *this;
  }

 private:
  const char* op_;
  const char* label_;
  const Tensor& tensor_;
};

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// nullptr where the argument was left out.
template <typename T>
const T* input(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : nullptr;
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline DType kernel_dtype(const char* op, const char* label, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: fail(op, label, " has unsupported dtype ", name(tensor.scalar_type()));
  }
}

// `tensor` itself if it starts on a 16-byte boundary, else a copy in the same layout.
inline Tensor on_boundary(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// New uninitialised contiguous tensor on the device of `like`, from PyTorch's allocator.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) {
    strides[dim - 1] = strides[dim] * (sizes[dim] > 0 ? sizes[dim] : 1);
  }
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype_code, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Makes the tensor's device current for a scope and yields PyTorch's current stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream_function()(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  using CurrentStream = AOTITorchError (*)(int32_t, void**);

  // libtorch_cuda is absent from a CPU build of PyTorch, beside which this module must still import.
  static CurrentStream current_stream_function() {
    static const CurrentStream function = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      if (!symbol) throw std::runtime_error("ling_ops: this PyTorch has no CUDA support");
      return reinterpret_cast<CurrentStream>(symbol);
    }();
    return function;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace ling::binding
