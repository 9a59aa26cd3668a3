#include "rows.cuh"

template void ling::gemm::grouped_gemm<cute::half_t>(const GroupedGemmParams&, cudaStream_t);
