// Decode, second half: out[t] = sum over k of w (down_e a[pair] + bias). A block owns 16 columns of the output and
// walks all chosen experts, so the weighted sum needs no other kernel; each warp takes chunks of a product of its own.
#include "decode.h"
#include "slots.cuh"
#include "stream.cuh"

namespace ling::decode {
namespace {

constexpr int kColumns = 16;  // of the output, per block
constexpr int kBusyWarps = 8;

// Into how many chunks an expert's contraction is cut: enough to occupy the warps for a single token. It depends on
// the layer alone, so that a token's sums are cut alike in every batch and on every GPU.
__host__ __device__ inline int chunks_for(int64_t inner, int per_token) {
  const int steps = static_cast<int>(ceil_div<int64_t>(inner, kStepLength));
  const int wanted = kBusyWarps / per_token < 2 ? 2 : kBusyWarps / per_token;
  const int most = ceil_div(steps, kBatch);
  return wanted < most ? wanted : most;
}

template <typename Element, int kWarps>
class Down {
  static constexpr int kThreads = 32 * kWarps;

 public:
  // In shared memory: the routing weight of each pair, and y [pair][chunk][column].
  __device__ Down(const MoeDecodeParams& p, const Slots& slots, float* weights, float* y)
      : p_(p), slots_(slots), weights_(weights), y_(y) {
    chunks_ = chunks_for(p.inner, p.per_token());
    const int steps = ceil_div(static_cast<int>(p.inner), kStepLength);
    chunk_length_ = ceil_div(steps, chunks_) * kStepLength;
    batches_ = ceil_div(chunk_length_, kStepLength * kBatch);
  }

  __device__ void run() {
    const int units = slots_.count * chunks_;
    if (units > 0) {
      stream(*this, sums_, threadIdx.x / 32, units, kWarps, batches_);
    } else {
      ready();
    }
    __syncthreads();
    combine();
  }

  __device__ Strip<Element> locate(int unit) const {
    const int row = blockIdx.x * kColumns + threadIdx.x % 32 / 4;
    const int64_t expert = slots_.expert[unit / chunks_];
    const bool is_shared = expert >= p_.experts;
    const int64_t pitch = is_shared ? p_.shared * p_.inner : p_.inner;
    const Element* weights = is_shared ? static_cast<const Element*>(p_.shared_down) + (expert - p_.experts) * p_.inner
                                       : static_cast<const Element*>(p_.down_proj) + expert * p_.hidden * p_.inner;
    weights += row * pitch;
    return {weights, row + 8 < p_.hidden ? weights + 8 * pitch : nullptr, range_of(unit)};
  }

  // Weights, which no kernel writes, are on their way before the kernel in front has ended; a is read after that.
  __device__ void ready() const { wait_for_previous(); }

  __device__ Range range_of(int unit) const {
    const int begin = min(unit % chunks_ * chunk_length_, static_cast<int>(p_.inner));
    return {begin, min(begin + chunk_length_, static_cast<int>(p_.inner))};
  }

  __device__ void start(int unit) {
    const int slot = unit / chunks_;
    const int place = threadIdx.x % 32 / 4;
    sums_.vector = nullptr;
    if (place >= slots_.size[slot]) return;
    const int64_t pair = slots_.pairs[slots_.begin[slot] + place];
    sums_.vector = static_cast<const Element*>(p_.a) + pair * p_.inner;
  }

  __device__ void finish(int unit) const {
    const int slot = unit / chunks_;
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = threadIdx.x % 4 * 2 + i % 2;
      if (place >= slots_.size[slot]) continue;
      const int pair = slots_.pairs[slots_.begin[slot] + place];
      y_[(pair * chunks_ + unit % chunks_) * kColumns + row + i / 2 * 8] = sums_.value[i];
    }
  }

 private:
  // A thread per element. Its loads are independent of one another; the sum runs in order of k.
  __device__ void combine() const {
    constexpr int kPairs = 8;
    for (int index = threadIdx.x; index < p_.tokens * kColumns; index += kThreads) {
      const int token = index / kColumns;
      const int64_t column = blockIdx.x * kColumns + index % kColumns;
      if (column >= p_.hidden) continue;
      float sum = 0.0f;
      for (int first = 0; first < p_.per_token(); first += kPairs) {
        const int pair = token * p_.per_token() + first;
        const int count = min(kPairs, p_.per_token() - first);
        float rows[kPairs] = {};
        for (int chunk = 0; chunk < chunks_; ++chunk) {
#pragma unroll
          for (int k = 0; k < kPairs; ++k) {
            if (k < count) rows[k] += y_[((pair + k) * chunks_ + chunk) * kColumns + index % kColumns];
          }
        }
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const int expert = k < count ? slots_.expert_of[pair + k] : -1;
          if (p_.down_bias != nullptr && expert >= 0) {
            rows[k] += to_float(static_cast<const Element*>(p_.down_bias)[expert * p_.hidden + column]);
          }
          sum = expert < 0 ? sum : fmaf(weights_[pair + k], rows[k], sum);
        }
      }
      static_cast<Element*>(p_.out)[token * p_.hidden + column] = from_float<Element>(sum);
    }
  }

  const MoeDecodeParams& p_;
  const Slots& slots_;
  float* weights_;
  float* y_;
  Sums<Element> sums_;
  int chunks_;
  int chunk_length_;
  int batches_;
};

// The routing weights: asked for early, in registers, and kept in shared memory later, so that nothing waits for them.
template <int kThreads>
class RoutingWeights {
  static constexpr int kEach = ceil_div(kDecodeMaxPairs, kThreads);

 public:
  __device__ explicit RoutingWeights(const MoeDecodeParams& p) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int pair = threadIdx.x + i * kThreads;
      const int token = pair / p.per_token();
      const int k = pair - token * p.per_token();
      values_[i] = pair < p.pairs() && k < p.choices ? __ldcg(p.weights + token * p.choices + k) : 1.0f;
    }
  }

  __device__ void keep(const MoeDecodeParams& p, float* weights) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int pair = threadIdx.x + i * kThreads;
      if (pair < p.pairs()) weights[pair] = values_[i];
    }
  }

 private:
  float values_[kEach];
};

template <typename Element, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps) down_kernel(const __grid_constant__ MoeDecodeParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& slots = *reinterpret_cast<Slots*>(memory);
  int* demand = reinterpret_cast<int*>(&slots + 1);
  auto* weights = reinterpret_cast<float*>(demand + p.experts + p.shared);
  allow_next();
  const RoutingWeights<32 * kWarps> routing_weights(p);
  find_slots<32 * kWarps>(p, slots, demand);
  routing_weights.keep(p, weights);
  Down<Element, kWarps>(p, slots, weights, weights + p.pairs()).run();
}

template <typename Element, int kWarps>
void launch(const MoeDecodeParams& p, unsigned blocks, cudaStream_t stream) {
  const int floats = p.pairs() * (1 + kColumns * chunks_for(p.inner, p.per_token()));
  const size_t bytes = sizeof(Slots) + (p.experts + p.shared) * sizeof(int) + floats * sizeof(float);
  launch_kernel<down_kernel<Element, kWarps>>("moe_decode down", {blocks, 32 * kWarps, bytes, true}, stream, p);
}

}  // namespace

void launch_down(const MoeDecodeParams& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(p.hidden, kColumns));
  // Sixteen warps keep a multiprocessor's share of the memory busy: in one block where there is no second one for it.
  const bool single = blocks <= static_cast<unsigned>(sm_count());
  dispatch(p, [&]<typename Element>() {
    single ? launch<Element, 16>(p, blocks, stream) : launch<Element, 8>(p, blocks, stream);
  });
}

}  // namespace ling::decode
