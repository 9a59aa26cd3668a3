#include "weight_grad.cuh"

template void ling::gemm::moe_weight_grad<cute::bfloat16_t>(const MoeWeightGradParams&, cudaStream_t);
