#include "decode.h"

namespace ling {

void launch_moe_decode(const MoeDecodeParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  require(p.tokens * int64_t{p.choices} <= kDecodeMaxPairs, "moe_decode: too many pairs");
  require(p.experts <= kDecodeMaxExperts, "moe_decode: too many experts");
  decode::launch_up(p, stream);
  decode::launch_down(p, stream);
}

}  // namespace ling
