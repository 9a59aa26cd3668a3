// Capacity by probability: an expert keeps the pairs with its C largest weights, in pair order.
#pragma once

#include "ling/route.h"

namespace ling::route {

// `all_offsets` [E+1]: segments, before any drop, of the pair list that follows it in memory: experts in
// order, pairs ascending. p.expert_offsets holds the offsets after the drop.
void launch_keep_largest(const RouteParams& p, const int32_t* all_offsets, cudaStream_t stream);

}  // namespace ling::route
