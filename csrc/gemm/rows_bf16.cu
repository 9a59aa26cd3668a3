#include "rows.cuh"

template void ling::gemm::grouped_gemm<cute::bfloat16_t>(const GroupedGemmParams&, cudaStream_t);
