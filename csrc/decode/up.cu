// Decode, first half: a[pair] = act(proj_e x[token] + bias). A block takes strips of weights in turn, the chosen
// experts' one after another; its warps share each strip's contraction.
#include <algorithm>

#include "../gemm/activation.cuh"
#include "decode.h"
#include "slots.cuh"
#include "stream.cuh"

namespace ling::decode {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

using Partial = float[kWarps][4][32];  // [warp][sum][lane]

struct UpShared {
  Slots slots;
  Partial partial[2];  // by parity of the strip
};

template <typename Element, bool kGated>
class Up {
  static constexpr int kColumns = kGated ? 8 : 16;  // of a, per strip
  static constexpr int kParts = kGated ? 2 : 1;

 public:
  __device__ Up(const MoeDecodeParams& p, UpShared& shared) : p_(p), shared_(shared) {
    const int steps = ceil_div(static_cast<int>(p.hidden), kStepLength);
    const int share = ceil_div(steps, kWarps) * kStepLength;
    range_.begin = min(static_cast<int>(threadIdx.x) / 32 * share, static_cast<int>(p.hidden));
    range_.end = min(range_.begin + share, static_cast<int>(p.hidden));
    batches_ = ceil_div(share, kStepLength * kBatch);  // the same for every warp
    strips_per_expert_ = ceil_div(static_cast<int>(p.inner), kColumns);
  }

  __device__ void run() {
    const int strips = shared_.slots.count * strips_per_expert_;
    if (static_cast<int>(blockIdx.x) < strips) stream(*this, sums_, blockIdx.x, strips, gridDim.x, batches_);
  }

  __device__ Strip<Element> locate(int strip) const {
    const Place place = place_of(strip);
    const int64_t expert = shared_.slots.expert[place.slot];
    const int column = place.column + threadIdx.x % 32 / 4;
    if (expert >= p_.experts) return locate_shared(expert - p_.experts, column);
    const Element* weights = static_cast<const Element*>(p_.proj) + (expert * kParts * p_.inner + column) * p_.hidden;
    if constexpr (kGated) return {weights, weights + p_.inner * p_.hidden, range_};
    return {weights, column + 8 < p_.inner ? weights + 8 * p_.hidden : nullptr, range_};
  }

  __device__ void ready() const {}

  __device__ Range range_of(int) const { return range_; }

  __device__ void start(int strip) {
    const int slot = place_of(strip).slot;
    const int place = threadIdx.x % 32 / 4;
    sums_.vector = nullptr;
    if (place >= shared_.slots.size[slot]) return;
    const int token = shared_.slots.pairs[shared_.slots.begin[slot] + place] / p_.per_token();
    sums_.vector = static_cast<const Element*>(p_.x) + token * p_.hidden;
  }

  // Adds up the warps' sums in order and writes a strip of a. One barrier: the buffers alternate.
  __device__ void finish(int strip) {
    Partial& partial = shared_.partial[round_++ % 2];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[threadIdx.x / 32][i][lane] = sums_.value[i];
    __syncthreads();
    const int source = threadIdx.x / 32;  // a warp per sum
    if (source >= kColumns / 4) return;
    const auto [slot, first_column] = place_of(strip);
    const int place = lane % 4 * 2 + source % 2;
    const int column = first_column + lane / 4 + source / 2 * 8;
    if (place >= shared_.slots.size[slot] || column >= p_.inner) return;
    const int pair = shared_.slots.pairs[shared_.slots.begin[slot] + place];
    float up = 0.0f;
    if constexpr (kGated) up = total(partial, source + 2);
    write(slot, pair, column, total(partial, source), up);
  }

 private:
  __device__ Strip<Element> locate_shared(int64_t part, int column) const {
    const int64_t at = (part * p_.inner + column) * p_.hidden;
    const Element* up = static_cast<const Element*>(p_.shared_up) + at;
    if constexpr (kGated) return {static_cast<const Element*>(p_.shared_gate) + at, up, range_};
    return {up, column + 8 < p_.inner ? up + 8 * p_.hidden : nullptr, range_};
  }

  struct Place {
    int slot;
    int column;
  };

  // The slots of one expert share its strips in turn, so that the second of them finds the weights in L2.
  __device__ Place place_of(int strip) const {
    const int slot = strip / strips_per_expert_;
    const int sharing = shared_.slots.group_size[slot];
    if (sharing == 1) return {slot, (strip - slot * strips_per_expert_) * kColumns};
    const int group = shared_.slots.group[slot];
    const int in_group = strip - group * strips_per_expert_;
    return {group + in_group % sharing, in_group / sharing * kColumns};
  }

  __device__ static float total(const Partial& partial, int source) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp][source][threadIdx.x % 32];
    return sum;
  }

  // `gate` is the whole pre-activation where there is no gate.
  __device__ void write(int slot, int pair, int column, float gate, float up) const {
    if (p_.up_bias != nullptr) {
      const Element* bias = static_cast<const Element*>(p_.up_bias) + shared_.slots.expert[slot] * kParts * p_.inner;
      gate += to_float(bias[column]);
      if constexpr (kGated) up += to_float(bias[p_.inner + column]);
    }
    float value = 0.0f;
    gemm::with_activation<kGated>(p_.activation, [&]<Activation kActivation>() {
      if constexpr (kGated) {
        value = gemm::activate_gated<kActivation>(gate, up, p_.limit).value;
      } else {
        value = gemm::activate<kActivation>(gate).value;
      }
    });
    static_cast<Element*>(p_.a)[pair * p_.inner + column] = from_float<Element>(value);
  }

  const MoeDecodeParams& p_;
  UpShared& shared_;
  Sums<Element> sums_;
  int round_ = 0;
  Range range_;
  int batches_;
  int strips_per_expert_;
};

// Asks for the ids and the tokens while the kernel in front still runs; whatever it writes of them goes to L2 as well.
template <typename Element>
__device__ inline void prefetch_inputs(const MoeDecodeParams& p) {
  constexpr int kLine = 128;
  const int64_t line = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pairs = int64_t{p.tokens} * p.choices;
  if (line * kLine < pairs * (p.long_ids ? 8 : 4)) prefetch(static_cast<const char*>(p.indices) + line * kLine);
  if (line * kLine < p.tokens * p.hidden * int64_t{sizeof(Element)})
    prefetch(static_cast<const char*>(p.x) + line * kLine);
}

template <typename Element, bool kGated>
__global__ void __launch_bounds__(kThreads, 4) up_kernel(const __grid_constant__ MoeDecodeParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<UpShared*>(memory);
  int* demand = reinterpret_cast<int*>(&shared + 1);
  prefetch_inputs<Element>(p);
  wait_for_previous();
  allow_next();
  find_slots<kThreads>(p, shared.slots, demand);
  Up<Element, kGated>(p, shared).run();
}

template <typename Element, bool kGated>
void launch(const MoeDecodeParams& p, cudaStream_t stream) {
  const int64_t strips = int64_t{1} * p.pairs() * ceil_div<int64_t>(p.inner, kGated ? 8 : 16);
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(4 * sm_count(), strips));
  const size_t bytes = sizeof(UpShared) + (p.experts + p.shared) * sizeof(int);
  launch_kernel<up_kernel<Element, kGated>>("moe_decode up", {blocks, kThreads, bytes, true}, stream, p);
}

}  // namespace

void launch_up(const MoeDecodeParams& p, cudaStream_t stream) {
  dispatch(p, [&]<typename Element>() {
    is_gated(p.activation) ? launch<Element, true>(p, stream) : launch<Element, false>(p, stream);
  });
}

}  // namespace ling::decode
