#include "decode.h"

namespace ling {

void launch_moe_decode(const MoeDecodeParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  require(int64_t{p.tokens} * p.per_token() <= kDecodeMaxPairs, "moe_decode: too many pairs");
  require(p.experts <= kDecodeMaxExperts, "moe_decode: too many experts");
  decode::launch_up(p, stream);
  decode::launch_down(p, stream);
}

}  // namespace ling
