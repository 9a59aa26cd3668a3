// Shared by every kernel's interface: errors, element types and small helpers. No torch, no Python.
//
// A kernel's public face is one parameter struct and one launch function:
//
//     void launch_x(const XParams& params, cudaStream_t stream);
//
// Pointers are device pointers, sizes count elements, strides count elements. A launch function returns
// after enqueueing; it never synchronises, never allocates, and throws ling::Error when it cannot launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ling {

// A failure with the place that noticed it. Python sees a RuntimeError.
class Error : public std::runtime_error {
 public:
  Error(const std::string& message, const char* file, int line)
      : std::runtime_error(message + " (" + file + ":" + std::to_string(line) + ")") {}
};

// Throws unless the CUDA call succeeded. The defaults name the caller's file and line.
inline void check(cudaError_t status, const char* what = "CUDA call", const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next check_launch() would report this failure again
  throw Error(std::string(what) + " failed: " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status), file,
              line);
}

// Call right after a kernel launch; `kernel` names it in the message.
inline void check_launch(const char* kernel, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check(cudaGetLastError(), kernel, file, line);
}

// Throws unless `condition` holds: for limits that a launch function owns.
inline void require(bool condition, const char* subject, const char* problem = "", const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  if (!condition) throw Error(std::string(subject) + problem, file, line);
}

// Element type of a buffer whose type is chosen at run time.
enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt32, kInt64 };

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
  }
  return "unknown";
}

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kBFloat16: return 2;
    case DType::kFloat16: return 2;
    case DType::kInt32: return 4;
    case DType::kInt64: return 8;
  }
  return 0;
}

#ifdef __CUDACC__
#define LING_HOST_DEVICE __host__ __device__
#else
#define LING_HOST_DEVICE
#endif

template <typename T>
LING_HOST_DEVICE constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename T>
LING_HOST_DEVICE constexpr T round_up(T value, T multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Number of multiprocessors of the current device.
inline int sm_count() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

}  // namespace ling
