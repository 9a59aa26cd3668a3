#include "dact.cuh"

template void ling::gemm::moe_dact<cute::half_t>(const MoeDactParams&, cudaStream_t);
