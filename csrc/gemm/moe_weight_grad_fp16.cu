#include "weight_grad.cuh"

template void ling::gemm::moe_weight_grad<cute::half_t>(const MoeWeightGradParams&, cudaStream_t);
