#include "up.cuh"

template void ling::gemm::moe_up<cute::bfloat16_t>(const MoeUpParams&, cudaStream_t);
