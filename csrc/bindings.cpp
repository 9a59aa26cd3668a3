// The module _C and the CUDA kernels of the operators `ling_ops::*`; the only unit that sees torch or pybind11.
//
// Operators go through PyTorch's stable ABI, so that one binary per Python version serves PyTorch 2.11 and later.
// Their schemas are defined in ling_ops/ops/_library.py; a function here must match its schema exactly:
// Tensor -> Tensor (by value), Tensor? -> std::optional<Tensor>, int -> int64_t, float -> double, bool -> bool,
// (Tensor, Tensor) -> std::tuple<Tensor, Tensor>.
//
// An operator does four things: check arguments, allocate outputs, fill the parameter struct, launch.
#include <pybind11/pybind11.h>

#include <optional>
#include <tuple>

#include "bindings_heads.h"
#include "bindings_routing.h"
#include "bindings_util.h"
#include "ling/add_activate.h"
#include "ling/common.h"
#include "ling/decode.h"
#include "ling/gemm.h"

namespace py = pybind11;

namespace ling::binding {
namespace {

// ---- grouped GEMM --------------------------------------------------------------------------------

// The sizes that rows and offsets share; checks offsets [E + 1] beside rows of 16-bit elements.
void check_grouped(const char* op, const char* label, const Tensor& rows, const Tensor& offsets) {
  Arg(op, label, rows).cuda().dtype({ScalarType::BFloat16, ScalarType::Half}).shape({-1, -1}).inner_contiguous();
  Arg(op, label, rows).aligned(16);
  expect(rows.stride(0) % 8 == 0 || rows.size(0) <= 1, op, label, " must have a row stride that is a multiple of 8");
  expect(rows.size(1) % 8 == 0, op, label, " must have a multiple of 8 columns; got ", Shape{rows});
  Arg(op, "offsets", offsets).with(rows).dtype({ScalarType::Int}).shape({-1}).contiguous();
  expect(offsets.size(0) >= 1, op, "offsets must have one element per expert and one more");
}

// The row stride of a matrix; that of a single row is of no account and may be anything.
int64_t row_stride(const Tensor& rows) { return rows.size(0) <= 1 ? rows.size(1) : rows.stride(0); }

// The counter of a product's tiles: zeroed by its launch, unless a caller has done so.
struct TileCounter {
  int32_t* value;
  bool is_zero;
};

Tensor row_product(Tensor a, Tensor b, Tensor offsets, TileCounter counter) {
  const char* op = "grouped_gemm";
  a = on_boundary(a);
  b = on_boundary(b);
  check_grouped(op, "a", a, offsets);
  const int64_t experts = offsets.size(0) - 1;
  Arg(op, "b", b).with(a).dtype({a.scalar_type()}).shape({experts, -1, a.size(1)}).aligned(16);
  const int64_t columns = b.size(1);
  const int64_t contraction = a.size(1);
  expect(columns % 8 == 0, op, "b must have a multiple of 8 columns; got ", Shape{b});
  const bool transposed = !b.is_contiguous();
  expect(!transposed ||
             (b.stride(1) == 1 && b.stride(2) == columns && (experts <= 1 || b.stride(0) == columns * contraction)),
         op, "b must be contiguous or the transpose of a contiguous tensor");
  Tensor out = empty(a, {a.size(0), columns}, a.scalar_type());
  const Launch launch(a);
  launch_grouped_gemm({.a = a.data_ptr(),
                       .b = b.data_ptr(),
                       .offsets = input<int32_t>(offsets),
                       .out = out.data_ptr(),
                       .counter = counter.value,
                       .rows = a.size(0),
                       .columns = columns,
                       .contraction = contraction,
                       .experts = experts,
                       .a_stride = row_stride(a),
                       .b_transposed = transposed,
                       .dtype = kernel_dtype(op, "a", a),
                       .counter_is_zero = counter.is_zero},
                      launch.stream());
  return out;
}

Tensor grouped_gemm(Tensor a, Tensor b, Tensor offsets) {
  Tensor counter = empty(a, {1}, ScalarType::Int);
  return row_product(a, b, offsets, {output<int32_t>(counter), false});
}

Tensor grouped_gemm_dw(Tensor dy, Tensor x, Tensor offsets) {
  const char* op = "grouped_gemm_dw";
  dy = on_boundary(dy);
  x = on_boundary(x);
  check_grouped(op, "dy", dy, offsets);
  check_grouped(op, "x", x, offsets);
  Arg(op, "x", x).with(dy).dtype({dy.scalar_type()}).shape({dy.size(0), -1});
  const int64_t experts = offsets.size(0) - 1;
  Tensor out = empty(dy, {experts, dy.size(1), x.size(1)}, dy.scalar_type());
  Tensor counter = empty(dy, {1}, ScalarType::Int);
  const Launch launch(dy);
  launch_grouped_weight_grad({.dy = dy.data_ptr(),
                              .x = x.data_ptr(),
                              .offsets = input<int32_t>(offsets),
                              .out = out.data_ptr(),
                              .counter = output<int32_t>(counter),
                              .rows = dy.size(0),
                              .columns = dy.size(1),
                              .contraction = x.size(1),
                              .experts = experts,
                              .dy_stride = row_stride(dy),
                              .x_stride = row_stride(x),
                              .dtype = kernel_dtype(op, "dy", dy)},
                             launch.stream());
  return out;
}

Activation activation_code(const char* op, int64_t code) {
  expect(code >= 0 && code <= static_cast<int64_t>(Activation::kRelu2), op, "unknown activation ", code);
  return static_cast<Activation>(code);
}

// Checks a table [tokens, columns] that is read through row_token, and row_token [rows].
void check_gathered(const char* op, const char* label, const Tensor& table, const Tensor& row_token,
                    const Tensor& offsets) {
  check_grouped(op, label, table, offsets);
  Arg(op, "row_token", row_token).with(table).dtype({ScalarType::Int}).shape({-1}).contiguous();
}

// dW with one operand gathered: added to `buffer`, or into a new tensor.
Tensor weight_grad(const char* op, Tensor dy, Tensor x, const Tensor& row_token, const Tensor& offsets, bool gather_x,
                   const std::optional<Tensor>& buffer) {
  dy = on_boundary(dy);
  x = on_boundary(x);
  check_grouped(op, "x", x, offsets);
  check_gathered(op, "dy", dy, row_token, offsets);
  Arg(op, "x", x).with(dy).dtype({dy.scalar_type()});
  const int64_t rows = row_token.size(0);
  Arg(op, gather_x ? "dy" : "x", gather_x ? dy : x).shape({rows, -1});
  const int64_t experts = offsets.size(0) - 1;
  Tensor out = buffer ? *buffer : empty(dy, {experts, dy.size(1), x.size(1)}, dy.scalar_type());
  if (buffer) {
    Arg(op, "buffer", out).with(dy).dtype({ScalarType::Float}).shape({experts, dy.size(1), x.size(1)}).contiguous();
    Arg(op, "buffer", out).aligned(16);
  }
  Tensor counter = empty(dy, {1}, ScalarType::Int);
  const Launch launch(dy);
  launch_moe_weight_grad({.dy = dy.data_ptr(),
                          .x = x.data_ptr(),
                          .row_token = input<int32_t>(row_token),
                          .offsets = input<int32_t>(offsets),
                          .out = out.data_ptr(),
                          .counter = output<int32_t>(counter),
                          .rows = rows,
                          .tokens = gather_x ? x.size(0) : dy.size(0),
                          .dy_columns = dy.size(1),
                          .x_columns = x.size(1),
                          .experts = experts,
                          .dy_stride = row_stride(dy),
                          .x_stride = row_stride(x),
                          .gather_x = gather_x,
                          .add = buffer.has_value(),
                          .dtype = kernel_dtype(op, "dy", dy)},
                         launch.stream());
  return out;
}

Tensor moe_dw(Tensor dy, Tensor x, Tensor row_token, Tensor offsets, bool gather_x) {
  return weight_grad("moe_dw", dy, x, row_token, offsets, gather_x, std::nullopt);
}

void moe_dw_add_(Tensor buffer, Tensor dy, Tensor x, Tensor row_token, Tensor offsets, bool gather_x) {
  weight_grad("moe_dw_add_", dy, x, row_token, offsets, gather_x, buffer);
}

std::tuple<Tensor, Tensor> up_product(Tensor x, Tensor weight, Tensor row_token, Tensor offsets, int64_t activation,
                                      double limit, bool write_h, TileCounter counter) {
  const char* op = "moe_up";
  x = on_boundary(x);
  weight = on_boundary(weight);
  check_gathered(op, "x", x, row_token, offsets);
  const Activation code = activation_code(op, activation);
  const int64_t parts = is_gated(code) ? 2 : 1;
  const int64_t experts = offsets.size(0) - 1;
  Arg(op, "weight", weight).with(x).dtype({x.scalar_type()}).shape({experts, -1, x.size(1)}).contiguous().aligned(16);
  const int64_t columns = weight.size(1) / parts;
  expect(columns * parts == weight.size(1) && columns % 8 == 0, op, "weight has a wrong shape ", Shape{weight});
  const int64_t rows = row_token.size(0);
  Tensor h = write_h ? empty(x, {rows, parts * columns}, x.scalar_type()) : empty(x, {0}, x.scalar_type());
  Tensor a = empty(x, {rows, columns}, x.scalar_type());
  const Launch launch(x);
  launch_moe_up({.x = x.data_ptr(),
                 .weight = weight.data_ptr(),
                 .row_token = input<int32_t>(row_token),
                 .offsets = input<int32_t>(offsets),
                 .h = write_h ? h.data_ptr() : nullptr,
                 .a = a.data_ptr(),
                 .counter = counter.value,
                 .rows = rows,
                 .columns = columns,
                 .contraction = x.size(1),
                 .experts = experts,
                 .tokens = x.size(0),
                 .x_stride = row_stride(x),
                 .activation = code,
                 .limit = static_cast<float>(limit),
                 .dtype = kernel_dtype(op, "x", x),
                 .counter_is_zero = counter.is_zero},
                launch.stream());
  return {h, a};
}

std::tuple<Tensor, Tensor> moe_up(Tensor x, Tensor weight, Tensor row_token, Tensor offsets, int64_t activation,
                                  double limit, bool write_h) {
  Tensor counter = empty(x, {1}, ScalarType::Int);
  return up_product(x, weight, row_token, offsets, activation, limit, write_h, {output<int32_t>(counter), false});
}

// Both counters are zeroed at once and in front, of the routing too where none is given, so that each kernel may start
// under the end of the one before.
Tensor moe_forward(Tensor x, Tensor proj, Tensor down_proj, Tensor weights, Tensor indices,
                   std::optional<Tensor> row_token, std::optional<Tensor> offsets, std::optional<Tensor> token_row,
                   int64_t activation, double limit) {
  expect(row_token.has_value() == offsets.has_value() && offsets.has_value() == token_row.has_value(), "moe_forward",
         "row_token, offsets and token_row must all be given, or none");
  down_proj = on_boundary(down_proj);  // a copy would stand between the products, of which the second asks for it early
  Tensor counters = empty(x, {2}, ScalarType::Int);
  auto* counter = output<int32_t>(counters);
  {
    const Launch launch(x);
    check(cudaMemsetAsync(counter, 0, 2 * sizeof(int32_t), launch.stream()), "zeroing the tile counters");
  }
  if (!offsets) {
    auto routing = route(indices, down_proj.size(0), std::nullopt, std::nullopt, std::nullopt, false);
    offsets = std::get<1>(routing);
    row_token = std::get<2>(routing);
    token_row = std::get<4>(routing);
  }
  auto [h, a] = up_product(x, proj, *row_token, *offsets, activation, limit, false, {counter, true});
  return combine(row_product(a, down_proj, *offsets, {counter + 1, true}), *token_row, weights, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> moe_dact(Tensor dout, Tensor weight, Tensor h, Tensor weights, Tensor row_token,
                                            Tensor row_pair, Tensor offsets, int64_t activation, double limit) {
  const char* op = "moe_dact";
  dout = on_boundary(dout);
  weight = on_boundary(weight);
  h = on_boundary(h);
  check_gathered(op, "dout", dout, row_token, offsets);
  const Activation code = activation_code(op, activation);
  const int64_t parts = is_gated(code) ? 2 : 1;
  const int64_t experts = offsets.size(0) - 1;
  const int64_t rows = row_token.size(0);
  Arg(op, "weight", weight).with(dout).dtype({dout.scalar_type()}).shape({experts, dout.size(1), -1}).contiguous();
  Arg(op, "weight", weight).aligned(16);
  const int64_t columns = weight.size(2);
  expect(columns % 8 == 0, op, "weight must have a multiple of 8 columns; got ", Shape{weight});
  Arg(op, "h", h).with(dout).dtype({dout.scalar_type()}).shape({rows, parts * columns}).contiguous().aligned(16);
  Arg(op, "weights", weights).with(dout).dtype({ScalarType::Float}).contiguous();
  Arg(op, "row_pair", row_pair).with(dout).dtype({ScalarType::Int}).shape({rows}).contiguous();
  Tensor dh = empty(dout, {rows, parts * columns}, dout.scalar_type());
  Tensor wa = empty(dout, {rows, columns}, dout.scalar_type());
  std::vector<int64_t> weights_shape;
  for (int64_t dim = 0; dim < weights.dim(); ++dim) weights_shape.push_back(weights.size(dim));
  Tensor grad_weights = empty(dout, weights_shape, ScalarType::Float);
  Tensor partial = empty(dout, {dact_partials(columns), rows}, ScalarType::Float);
  Tensor counter = empty(dout, {1}, ScalarType::Int);
  const Launch launch(dout);
  launch_moe_dact({.dout = dout.data_ptr(),
                   .weight = weight.data_ptr(),
                   .h = h.data_ptr(),
                   .weights = input<float>(weights),
                   .row_token = input<int32_t>(row_token),
                   .row_pair = input<int32_t>(row_pair),
                   .offsets = input<int32_t>(offsets),
                   .dh = dh.data_ptr(),
                   .wa = wa.data_ptr(),
                   .grad_weights = output<float>(grad_weights),
                   .partial = output<float>(partial),
                   .counter = output<int32_t>(counter),
                   .rows = rows,
                   .columns = columns,
                   .contraction = dout.size(1),
                   .experts = experts,
                   .tokens = dout.size(0),
                   .pairs = weights.numel(),
                   .dout_stride = row_stride(dout),
                   .activation = code,
                   .limit = static_cast<float>(limit),
                   .dtype = kernel_dtype(op, "dout", dout)},
                  launch.stream());
  return {dh, wa, grad_weights};
}

Tensor add_activate_(Tensor h, Tensor delta, int64_t activation, double limit) {
  const char* op = "add_activate_";
  const Activation code = activation_code(op, activation);
  const int64_t parts = is_gated(code) ? 2 : 1;
  Arg(op, "h", h).cuda().dtype({ScalarType::BFloat16, ScalarType::Half}).shape({-1, -1}).contiguous().aligned(16);
  delta = on_boundary(delta);
  Arg(op, "delta", delta).with(h).dtype({h.scalar_type()}).shape({h.size(0), h.size(1)}).contiguous();
  const int64_t columns = h.size(1) / parts;
  expect(h.size(1) % (8 * parts) == 0, op, "h has a wrong shape ", Shape{h});
  Tensor a = empty(h, {h.size(0), columns}, h.scalar_type());
  const Launch launch(h);
  launch_add_activate({.h = h.data_ptr(),
                       .delta = delta.data_ptr(),
                       .a = a.data_ptr(),
                       .rows = h.size(0),
                       .columns = columns,
                       .activation = code,
                       .limit = static_cast<float>(limit),
                       .dtype = kernel_dtype(op, "h", h)},
                      launch.stream());
  return a;
}

// ---- decode --------------------------------------------------------------------------------------

void check_bias(const char* label, const std::optional<Tensor>& bias, const Tensor& x, int64_t experts, int64_t width) {
  if (bias) Arg("moe_decode", label, *bias).with(x).dtype({x.scalar_type()}).shape({experts, width}).contiguous();
}

// Of how many slices of width `inner` the shared expert consists; 0 where there is none. Puts its weights on a
// boundary.
int64_t count_shared(const Tensor& x, int64_t inner, bool gated, std::optional<Tensor>& gate, std::optional<Tensor>& up,
                     std::optional<Tensor>& down) {
  const char* op = "moe_decode";
  expect(up.has_value() == down.has_value() && gate.has_value() == (gated && up.has_value()), op,
         "the shared expert's weights must all be given, or none");
  if (!up) return 0;
  const int64_t width = up->size(0);
  expect(width > 0 && inner > 0 && width % inner == 0, op, "shared_up must have a multiple of ", inner, " rows; got ",
         Shape{*up});
  for (auto [label, weight] : {std::pair{"shared_gate", &gate}, std::pair{"shared_up", &up}}) {
    if (!*weight) continue;
    **weight = on_boundary(**weight);
    Arg(op, label, **weight).with(x).dtype({x.scalar_type()}).shape({width, x.size(1)}).contiguous();
  }
  *down = on_boundary(*down);
  Arg(op, "shared_down", *down).with(x).dtype({x.scalar_type()}).shape({x.size(1), width}).contiguous();
  return width / inner;
}

Tensor moe_decode(Tensor x, Tensor proj, Tensor down_proj, Tensor weights, Tensor indices,
                  std::optional<Tensor> token_row, std::optional<Tensor> up_bias, std::optional<Tensor> down_bias,
                  std::optional<Tensor> shared_gate, std::optional<Tensor> shared_up, std::optional<Tensor> shared_down,
                  int64_t activation, double limit) {
  const char* op = "moe_decode";
  x = on_boundary(x);
  proj = on_boundary(proj);
  down_proj = on_boundary(down_proj);
  Arg(op, "x", x).cuda().dtype({ScalarType::BFloat16, ScalarType::Half}).shape({-1, -1}).contiguous();
  const int64_t tokens = x.size(0);
  const int64_t hidden = x.size(1);
  const Activation code = activation_code(op, activation);
  const int64_t parts = is_gated(code) ? 2 : 1;
  Arg(op, "down_proj", down_proj).with(x).dtype({x.scalar_type()}).shape({-1, hidden, -1}).contiguous();
  const int64_t experts = down_proj.size(0);
  const int64_t inner = down_proj.size(2);
  Arg(op, "proj", proj).with(x).dtype({x.scalar_type()}).shape({experts, parts * inner, hidden}).contiguous();
  expect(hidden % 8 == 0 && inner % 8 == 0, op, "down_proj must have multiples of 8; got ", Shape{down_proj});
  Arg(op, "indices", indices).with(x).dtype({ScalarType::Int, ScalarType::Long}).shape({tokens, -1}).contiguous();
  const int64_t choices = indices.size(1);
  Arg(op, "weights", weights).with(x).dtype({ScalarType::Float}).shape({tokens, choices}).contiguous();
  if (token_row) {
    Arg(op, "token_row", *token_row).with(x).dtype({ScalarType::Int}).shape({tokens, choices}).contiguous();
  }
  check_bias("up_bias", up_bias, x, experts, parts * inner);
  check_bias("down_bias", down_bias, x, experts, hidden);
  const int64_t shared = count_shared(x, inner, is_gated(code), shared_gate, shared_up, shared_down);
  expect(shared == 0 || (!up_bias && !down_bias), op, "takes no biases beside a shared expert");
  expect(choices > 0 && hidden > 0 && inner > 0, op, "needs at least one choice and no empty layer");
  const int64_t pairs = tokens * (choices + shared);
  expect(pairs <= kDecodeMaxPairs && experts + shared <= kDecodeMaxExperts, op, "takes at most ", kDecodeMaxPairs,
         " pairs and ", kDecodeMaxExperts, " experts; got ", pairs, " and ", experts + shared);
  Tensor a = empty(x, {pairs, inner}, x.scalar_type());
  Tensor out = empty(x, {tokens, hidden}, x.scalar_type());
  const Launch launch(x);
  launch_moe_decode({.x = x.data_ptr(),
                     .proj = proj.data_ptr(),
                     .down_proj = down_proj.data_ptr(),
                     .weights = input<float>(weights),
                     .indices = indices.data_ptr(),
                     .token_row = input<int32_t>(token_row),
                     .up_bias = up_bias ? up_bias->data_ptr() : nullptr,
                     .down_bias = down_bias ? down_bias->data_ptr() : nullptr,
                     .shared_gate = shared_gate ? shared_gate->data_ptr() : nullptr,
                     .shared_up = shared_up ? shared_up->data_ptr() : nullptr,
                     .shared_down = shared_down ? shared_down->data_ptr() : nullptr,
                     .a = a.data_ptr(),
                     .out = out.data_ptr(),
                     .hidden = hidden,
                     .inner = inner,
                     .tokens = static_cast<int>(tokens),
                     .choices = static_cast<int>(choices),
                     .experts = static_cast<int>(experts),
                     .shared = static_cast<int>(shared),
                     .long_ids = indices.scalar_type() == ScalarType::Long,
                     .activation = code,
                     .limit = static_cast<float>(limit),
                     .dtype = kernel_dtype(op, "x", x)},
                    launch.stream());
  return out;
}

// ---- module --------------------------------------------------------------------------------------

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// TORCH_ABI_VERSION's layout: major in the top byte, minor in the next.
std::string torch_version(uint64_t version) {
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff);
}

// What this binary was made of; keys are read by ling_ops/_extension.py.
py::dict build_facts() {
  py::dict facts;
  facts["version"] = LING_OPS_VERSION;
  facts["cuda"] = cuda_version(CUDART_VERSION);
  facts["archs"] = LING_OPS_ARCHS;
  facts["gemm_archs"] = LING_OPS_GEMM_ARCHS;
  facts["torch_built"] = torch_version(TORCH_ABI_VERSION);
  facts["torch_minimum"] = torch_version(TORCH_TARGET_VERSION);
  facts["cutlass"] = LING_OPS_CUTLASS_VERSION;
  return facts;
}

}  // namespace
}  // namespace ling::binding

STABLE_TORCH_LIBRARY_IMPL(ling_ops, CUDA, m) {
  using namespace ling::binding;
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("topk_gate_backward", TORCH_BOX(&topk_gate_backward));
  m.impl("gate_losses", TORCH_BOX(&gate_losses));
  m.impl("route", TORCH_BOX(&route));
  m.impl("reroute", TORCH_BOX(&reroute));
  m.impl("routing_stats", TORCH_BOX(&routing_stats));
  m.impl("dynamic_capacity", TORCH_BOX(&dynamic_capacity));
  m.impl("running_capacity", TORCH_BOX(&running_capacity));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_dw", TORCH_BOX(&grouped_gemm_dw));
  m.impl("moe_dw", TORCH_BOX(&moe_dw));
  m.impl("moe_dw_add_", TORCH_BOX(&moe_dw_add_));
  m.impl("moe_up", TORCH_BOX(&moe_up));
  m.impl("moe_forward", TORCH_BOX(&moe_forward));
  m.impl("moe_dact", TORCH_BOX(&moe_dact));
  m.impl("add_activate_", TORCH_BOX(&add_activate_));
  m.impl("moe_decode", TORCH_BOX(&moe_decode));
  m.impl("attention_heads_", TORCH_BOX(&attention_heads_));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of ling_ops";
  m.def("build_facts", &ling::binding::build_facts, "What this binary was built for, as a dict of strings.");
}
