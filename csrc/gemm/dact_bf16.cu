#include "dact.cuh"

template void ling::gemm::moe_dact<cute::bfloat16_t>(const MoeDactParams&, cudaStream_t);
