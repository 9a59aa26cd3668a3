// Tensor maps: what the copy engine knows of a matrix in global memory. Made on the host, passed by value.
//
// All boxes are 128 bytes (64 elements of 16 bits) wide and swizzled over 128 bytes, as the tensor cores read them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "ling/common.h"

namespace ling::gemm {

constexpr int kBoxColumns = 64;  // elements of 2 bytes in one swizzle row
constexpr int kRaggedRows = 64;  // rows of one box of a ragged map

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver is found at run time, so that the library links without libcuda.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
#endif
    require(found == cudaDriverEntryPointSuccess && entry != nullptr, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// Makes the current device's context that of this thread. The runtime's calls do so by themselves, the driver's do not.
inline void bind_context() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
}

// `sizes` and `box` count elements, innermost first; `strides` are those of the outer dimensions, in elements.
template <size_t kRank>
CUtensorMap make_map(DType dtype, const void* base, const std::array<int64_t, kRank>& sizes,
                     const std::array<int64_t, kRank - 1>& strides, const std::array<int, kRank>& box) {
  CUtensorMap map;
  cuuint64_t dims[kRank], pitches[kRank];
  cuuint32_t extents[kRank], steps[kRank];
  for (size_t i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    extents[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i + 1 < kRank) pitches[i] = static_cast<cuuint64_t>(strides[i] * size_of(dtype));
  }
  const auto type = dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto encode = [&] {
    return encode_tiled()(&map, type, kRank, const_cast<void*>(base), dims, pitches, extents, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {  // the first call of a thread, such as autograd's
    bind_context();
    status = encode();
  }
  if (status != CUDA_SUCCESS) {
    throw Error("cuTensorMapEncodeTiled refused a tensor of rank " + std::to_string(kRank) + " (CUresult " +
                    std::to_string(static_cast<int>(status)) + ")",
                __FILE__, __LINE__);
  }
  return map;
}

// A map of [rows, columns] whose boxes of up to 64 rows end at any row that the kernel names: a load fills the
// rest of the box with zeros and a store leaves the rest alone. Two dimensions run over the rows with one stride:
// coordinate (inner, outer) is row `inner + outer - 64`. Since `inner` is bounded by 64, a box that starts at
// inner = 64 - n, outer = row + n holds exactly the n rows from `row` on. See ragged_row in operands.cuh.
inline CUtensorMap make_ragged_map(DType dtype, const void* base, int64_t rows, int64_t columns, int64_t stride) {
  const auto* shifted = static_cast<const char*>(base) - kRaggedRows * stride * size_of(dtype);
  return make_map<3>(dtype, shifted, {columns, kRaggedRows, rows + 1}, {stride, stride}, {kBoxColumns, kRaggedRows, 1});
}

// The same for [rows, parts, columns] contiguous: coordinates (column, part, inner, outer).
inline CUtensorMap make_ragged_parts_map(DType dtype, const void* base, int64_t rows, int64_t parts, int64_t columns) {
  const int64_t stride = parts * columns;
  const auto* shifted = static_cast<const char*>(base) - kRaggedRows * stride * size_of(dtype);
  return make_map<4>(dtype, shifted, {columns, parts, kRaggedRows, rows + 1}, {columns, stride, stride},
                     {kBoxColumns, 1, kRaggedRows, 1});
}

// A map of [experts, outer, inner] contiguous, in boxes of `box_rows` x 128 bytes.
inline CUtensorMap make_weight_map(DType dtype, const void* base, int64_t experts, int64_t outer, int64_t inner,
                                   int box_rows) {
  const int box_columns = kBoxColumns * 2 / static_cast<int>(size_of(dtype));
  return make_map<3>(dtype, base, {inner, outer, experts}, {inner, outer * inner}, {box_columns, box_rows, 1});
}

// A map of [experts, parts, outer, inner] contiguous, in boxes of `box_rows` x 64 that stay within a part.
inline CUtensorMap make_weight_parts_map(DType dtype, const void* base, int64_t experts, int64_t parts, int64_t outer,
                                         int64_t inner, int box_rows) {
  return make_map<4>(dtype, base, {inner, outer, parts, experts}, {inner, outer * inner, parts * outer * inner},
                     {kBoxColumns, box_rows, 1, 1});
}

}  // namespace ling::gemm
