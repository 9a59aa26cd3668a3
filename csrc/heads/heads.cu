// Queries, keys and values from the projection to where attention reads them, in one pass over memory.
//
// A group of lanes takes an item: up to kHeads heads of one token, all queries, all keys or all values. A lane has the
// same 8 neighbouring elements (an octet) of each, so it computes their factors once. An element's partner in the
// rotation belongs to another lane; it is read again, out of the first-level cache, at the same time as the own one.
#include "ling/heads.h"

#include <type_traits>

#include "../combine/vector.cuh"
#include "ling/launch.h"

namespace ling {
namespace heads {
namespace {

constexpr int kThreads = 128;
constexpr int kOctet = 8;
constexpr int kBatch = 4;          // heads of an item where tokens fill the device
constexpr int kFewThreads = 2048;  // per multiprocessor: up to here, an item is one head
constexpr int kResident = 4;       // blocks per multiprocessor: registers enough to ask for everything at once
constexpr int64_t kMaxThreads = int64_t{1} << 31;

// ---- octets --------------------------------------------------------------------------------------

template <typename T>
struct Octet {
  static constexpr int kParts = sizeof(T) / 2;
  static constexpr int kWidth = kOctet / kParts;
  combine::Vector<T, kWidth> parts[kParts];  // 16 bytes each
};

template <typename T>
__device__ Octet<T> load(const T* address) {
  return *reinterpret_cast<const Octet<T>*>(address);
}

template <typename T>
__device__ void store(T* address, const Octet<T>& value) {
  *reinterpret_cast<Octet<T>*>(address) = value;
}

template <typename T>
__device__ void unpack(const Octet<T>& octet, float (&out)[kOctet]) {
  constexpr int width = Octet<T>::kWidth;
#pragma unroll
  for (int part = 0; part < Octet<T>::kParts; ++part) {
    float some[width];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < width; ++i) {  // two instructions a pair; the conversion of pairs takes three
        const uint32_t pair = octet.parts[part].words[i / 2];
        some[i] = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
      }
    } else {
      combine::unpack(octet.parts[part], some);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) out[part * width + i] = some[i];
  }
}

template <typename T>
__device__ Octet<T> pack(const float (&in)[kOctet]) {
  constexpr int width = Octet<T>::kWidth;
  Octet<T> octet;
#pragma unroll
  for (int part = 0; part < Octet<T>::kParts; ++part) {
    float some[width];
#pragma unroll
    for (int i = 0; i < width; ++i) some[i] = in[part * width + i];
    octet.parts[part] = combine::pack<T, width>(some);
  }
  return octet;
}

// ---- rotation ------------------------------------------------------------------------------------

// How the elements `first` + i of a head turn, i < kOctet. kWhole: half is a multiple of 8, so that an octet turns as
// a whole, and with one other octet.
template <bool kWhole>
struct Turn {
  int first;
  int half;  // 0: none turns

  __device__ bool turns(int i) const { return first + (kWhole ? 0 : i) < 2 * half; }
  __device__ bool leads(int i) const { return first + (kWhole ? 0 : i) < half; }
  __device__ int angle(int i) const { return leads(i) ? first + i : first + i - half; }
  __device__ int partner(int i) const { return leads(i) ? first + i + half : first + i - half; }
};

// base[index(i)] of the elements that turn, zero for the others.
template <typename T, bool kWhole, typename Index>
__device__ Octet<T> load_turning(const T* base, const Turn<kWhole>& turn, Index index) {
  if constexpr (kWhole) {
    return turn.turns(0) ? load(base + index(0)) : Octet<T>{};
  } else {
    float values[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] = turn.turns(i) ? combine::to_float(base[index(i)]) : 0.0f;
    return pack<T>(values);
  }
}

template <typename T, bool kWhole>
__device__ Octet<T> load_partners(const T* base, const Turn<kWhole>& turn) {
  return load_turning(base, turn, [&](int i) { return turn.partner(i); });
}

// What an octet of x is multiplied by: x * own + partner * cross, before the norm's scale.
struct Factors {
  float own[kOctet];
  float cross[kOctet];
};

template <typename W, bool kWhole>
__device__ void load_weights(const void* weights, const Turn<kWhole>& turn, Factors& factors) {
  const W* base = static_cast<const W*>(weights);
  unpack(load(base + turn.first), factors.own);
  unpack(load_partners(base, turn), factors.cross);
}

// ---- items ---------------------------------------------------------------------------------------

// Items of all tokens, each token's queries first, then its keys, then its values.
struct Grid {
  int group_bits;  // a group has 2^group_bits lanes, enough for a head
  unsigned queries;
  unsigned keys;   // as many of values
  unsigned items;  // of all tokens
  float share;     // 1 / head_dim
  __host__ __device__ unsigned per_token() const { return queries + 2 * keys; }
};

enum class Kind { kQuery, kKey, kValue };

struct Item {
  unsigned token;
  Kind kind;
  int head;   // the first, among those of its kind
  int count;  // of heads, at least one
};

template <int kHeads>
__device__ Item item_at(const HeadsParams& p, const Grid& grid, unsigned index) {
  const unsigned token = index / grid.per_token();
  unsigned part = index % grid.per_token();
  Kind kind = Kind::kQuery;
  if (part >= grid.queries) {
    part -= grid.queries;
    kind = part < grid.keys ? Kind::kKey : Kind::kValue;
    if (kind == Kind::kValue) part -= grid.keys;
  }
  const int heads = kind == Kind::kQuery ? p.query_heads : p.kv_heads;
  const int head = static_cast<int>(part) * kHeads;
  return {token, kind, head, min(kHeads, heads - head)};
}

// The item's first octet among those of `projected`.
__device__ inline int64_t source_of(const HeadsParams& p, const Item& item) {
  const int before = item.kind == Kind::kQuery ? 0 : p.query_heads + (item.kind == Kind::kKey ? 0 : p.kv_heads);
  const int64_t head = int64_t{item.token} * (p.query_heads + 2 * p.kv_heads) + before + item.head;
  return head * (p.head_dim / kOctet);
}

template <typename T>
__device__ T* target_of(const HeadsParams& p, const Item& item, int64_t row) {
  if (item.kind == Kind::kQuery) {
    return static_cast<T*>(p.query) + (static_cast<int64_t>(item.token) * p.query_heads + item.head) * p.head_dim;
  }
  T* cache = static_cast<T*>(item.kind == Kind::kKey ? p.key_cache : p.value_cache);
  return cache + (row * p.kv_heads + item.head) * p.head_dim;
}

// ---- kernel --------------------------------------------------------------------------------------

template <typename T, bool kWhole>
__device__ Factors factors_of(const HeadsParams& p, const void* weight, const Turn<kWhole>& turn, unsigned position) {
  const auto angle = [&](int i) { return turn.angle(i); };
  const int64_t at = static_cast<int64_t>(position) * p.half;
  const Octet<float> cosines = load_turning(p.cos + at, turn, angle);
  const Octet<float> sines = load_turning(p.sin + at, turn, angle);
  Factors factors;
  if (weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) factors.own[i] = factors.cross[i] = 1.0f;
  } else if (p.float_weights) {
    load_weights<float>(weight, turn, factors);
  } else {
    load_weights<T>(weight, turn, factors);
  }
  float c[kOctet];
  float s[kOctet];
  unpack(cosines, c);
  unpack(sines, s);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (turn.turns(i)) factors.own[i] *= c[i];
    factors.cross[i] *= turn.leads(i) ? -s[i] : s[i];  // sines are zero where nothing turns
  }
  return factors;
}

// 1 / sqrt(mean of the squares + eps) of each head, in every lane of the group.
template <typename T, int kHeads>
__device__ void norm_scales(const Octet<T> (&own)[kHeads], const HeadsParams& p, const Grid& grid, bool has_elements,
                            float (&scales)[kHeads]) {
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float x[kOctet];
    unpack(own[h], x);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum = fmaf(x[i], x[i], sum);
    scales[h] = has_elements ? sum : 0.0f;
  }
  for (int step = 1 << grid.group_bits >> 1; step > 0; step >>= 1) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) scales[h] += __shfl_xor_sync(~0u, scales[h], step);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) scales[h] = rsqrtf(fmaf(scales[h], grid.share, p.eps));
}

// Products and fused sums only: nothing is left for the compiler to contract in another way for another kHeads.
template <typename T>
__device__ Octet<T> turned(const Octet<T>& own, const Octet<T>& partner, const Factors& factors, float scale) {
  float x[kOctet];
  float y[kOctet];
  unpack(own, x);
  unpack(partner, y);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = scale * fmaf(y[i], factors.cross[i], x[i] * factors.own[i]);
  return pack<T>(x);
}

template <typename T, int kHeads, bool kWhole>
__global__ void __launch_bounds__(kThreads, kResident) heads_kernel(const HeadsParams p, const Grid grid) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned index = thread >> grid.group_bits;
  const int first = static_cast<int>(thread & ((1u << grid.group_bits) - 1)) * kOctet;
  const bool has_elements = first < p.head_dim;
  // a lane without work reads what others read, so that loads need no branches; it only writes nothing
  const Item item = item_at<kHeads>(p, grid, min(index, grid.items - 1));
  const bool works = has_elements && index < grid.items;
  const bool is_value = item.kind == Kind::kValue;
  const Turn<kWhole> turn = {has_elements ? first : 0, is_value ? 0 : p.half};
  wait_for_previous();

  const T* projected = static_cast<const T*>(p.projected);
  const int64_t source = source_of(p, item);
  Octet<T> own[kHeads];
  Octet<T> partner[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const T* head = projected + (source + min(h, item.count - 1) * p.head_dim / kOctet) * kOctet;
    own[h] = load(head + turn.first);
    partner[h] = load_partners(head, turn);
  }
  __syncwarp();  // keeps the compiler from waiting for the row before it asks for the rest
  const int64_t row = p.rows[item.token];

  const bool inside = row >= 0 && row < p.cache_rows;
  const unsigned position = inside ? static_cast<unsigned>(row) % static_cast<unsigned>(p.positions) : 0;
  const void* weight = item.kind == Kind::kQuery ? p.query_weight : is_value ? nullptr : p.key_weight;
  Factors factors = {};
  if (!is_value) factors = factors_of<T>(p, weight, turn, position);
  float scales[kHeads];
  norm_scales(own, p, grid, has_elements, scales);

  if (!works || (!inside && item.kind != Kind::kQuery)) return;
  T* target = target_of<T>(p, item, row) + turn.first;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= item.count) break;
    const float scale = weight == nullptr ? 1.0f : scales[h];
    store(target + h * p.head_dim, is_value ? own[h] : turned(own[h], partner[h], factors, scale));
  }
}

template <typename T, int kHeads, bool kWhole>
void run(const HeadsParams& p, int group_bits, cudaStream_t stream) {
  Grid grid = {group_bits, static_cast<unsigned>(ceil_div(p.query_heads, kHeads)),
               static_cast<unsigned>(ceil_div(p.kv_heads, kHeads)), 0, 1.0f / static_cast<float>(p.head_dim)};
  const int64_t items = p.tokens * grid.per_token();
  const int64_t threads = items << group_bits;
  require(threads <= kMaxThreads, "heads", ": too many tokens");
  grid.items = static_cast<unsigned>(items);
  const LaunchShape shape = {static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)), kThreads, 0, true};
  launch_kernel<heads_kernel<T, kHeads, kWhole>>("heads", shape, stream, p, grid);
}

template <typename T>
void choose(const HeadsParams& p, cudaStream_t stream) {
  int group_bits = 0;
  while (kOctet << group_bits < p.head_dim) ++group_bits;
  if (p.half % kOctet != 0) return run<T, 1, false>(p, group_bits, stream);
  const int64_t threads = p.tokens * (p.query_heads + 2 * p.kv_heads) << group_bits;
  if (threads <= int64_t{kFewThreads} * sm_count()) return run<T, 1, true>(p, group_bits, stream);
  run<T, kBatch, true>(p, group_bits, stream);
}

}  // namespace
}  // namespace heads

void launch_heads(const HeadsParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.head_dim == 0 || p.query_heads + p.kv_heads == 0) return;
  require(p.head_dim % heads::kOctet == 0 && p.head_dim <= kMaxHeadDim, "heads", ": unsupported head_dim");
  require(p.half >= 0 && 2 * p.half <= p.head_dim, "heads", ": unsupported half");
  require(p.cache_rows <= UINT32_MAX && p.positions >= 1 && p.positions <= UINT32_MAX, "heads",
          ": too many rows, or no position");
  switch (p.dtype) {
    case DType::kFloat32: return heads::choose<float>(p, stream);
    case DType::kBFloat16: return heads::choose<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return heads::choose<__half>(p, stream);
    default: require(false, "heads", ": dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace ling
