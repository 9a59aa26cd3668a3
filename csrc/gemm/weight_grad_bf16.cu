#include "weight_grad.cuh"

template void ling::gemm::grouped_weight_grad<cute::bfloat16_t>(const GroupedWeightGradParams&, cudaStream_t);
