#include "up.cuh"

template void ling::gemm::moe_up<cute::half_t>(const MoeUpParams&, cudaStream_t);
