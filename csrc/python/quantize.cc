#include "quantize.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "fwht.h"

namespace py = pybind11;

namespace onnx_quarot {
namespace {

// Taken as they are, never copied: adjacent elements of just this type.
template <class T>
using Adjacent = py::array_t<T, py::array::c_style>;

using Signs = std::optional<Adjacent<float>>;

struct Rows {
  std::size_t count, size;
};

Rows rows_of(const Adjacent<float>& x) {
  if (x.ndim() == 0) throw py::value_error("x has no axis: the transform works along the last one");
  const auto size = static_cast<std::size_t>(x.shape(x.ndim() - 1));
  return {size == 0 ? 0 : static_cast<std::size_t>(x.size()) / size, size};
}

template <class T>
T* target(Adjacent<T>& out, const char* name, const Adjacent<float>& x, bool one_a_row) {
  bool fits = out.ndim() == x.ndim() && out.writeable();
  for (py::ssize_t axis = 0; fits && axis < x.ndim(); ++axis) {
    fits = out.shape(axis) == (one_a_row && axis + 1 == x.ndim() ? 1 : x.shape(axis));
  }
  if (!fits) {
    throw py::value_error(std::string(name) + ": it must be writeable and of the shape of x" +
                          (one_a_row ? ", with a last axis of length 1" : ""));
  }
  return out.mutable_data();
}

TransformSpec spec_of(const Rows& rows, std::optional<std::size_t> block_size, const Signs& signs, bool transpose,
                      std::optional<double> scale, const std::optional<std::string>& isa) {
  TransformSpec spec;
  spec.size = rows.size;
  spec.block_size = block_size.value_or(0);
  spec.signs_length = signs.has_value() ? static_cast<std::size_t>(signs->size()) : 0;
  spec.transpose = transpose;
  spec.scale = scale;
  spec.isa = isa.value_or("");
  return spec;
}

const float* values_of(const Signs& signs) { return signs.has_value() ? signs->data() : nullptr; }

template <class T>
void quantize(const Adjacent<float>& x, Adjacent<T> out, double y_scale, T zero_point,
              std::optional<std::size_t> block_size, const Signs& signs, bool transpose, std::optional<double> scale,
              const std::optional<std::string>& isa) {
  const Rows rows = rows_of(x);
  T* bytes = target(out, "out", x, false);
  if (!(y_scale > 0) || std::isinf(y_scale)) {
    throw py::value_error("y_scale is " + std::to_string(y_scale) + ": it must be positive and finite");
  }
  TransformSpec spec = spec_of(rows, block_size, signs, transpose, scale, isa);
  const auto block = static_cast<double>(spec.block_size == 0 ? spec.size : spec.block_size);
  spec.scale = scale.value_or(1.0 / std::sqrt(std::max(block, 1.0))) / y_scale;
  const Transform transform(spec);
  const float* in = x.data();
  const py::gil_scoped_release unlocked;
  transform.quantize(in, bytes, 0, rows.count, values_of(signs),
                     std::is_signed_v<T> ? QuantizedType::int8 : QuantizedType::uint8, zero_point);
}

void quantize_dynamic(const Adjacent<float>& x, Adjacent<std::int8_t> out, Adjacent<float> scales,
                      std::optional<std::size_t> block_size, const Signs& signs, bool transpose,
                      std::optional<double> scale, const std::optional<std::string>& isa) {
  const Rows rows = rows_of(x);
  std::int8_t* bytes = target(out, "out", x, false);
  float* row_scales = target(scales, "scales", x, true);
  const Transform transform(spec_of(rows, block_size, signs, transpose, scale, isa));
  const float* in = x.data();
  const py::gil_scoped_release unlocked;
  transform.quantize_dynamic(in, bytes, row_scales, 0, rows.count, values_of(signs));
}

}  // namespace

void add_quantize(py::module_& module) {
  const auto add_static = [&](auto function) {
    module.def("hadamard_quantize", function, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("y_scale"),
               py::arg("zero_point") = 0, py::arg("block_size") = py::none(), py::arg("signs").noconvert() = py::none(),
               py::arg("transpose") = false, py::arg("scale") = py::none(), py::arg("isa") = py::none(),
               "The transform quantized into out, int8 or uint8; see onnx_quarot.hadamard_quantize.");
  };
  add_static(&quantize<std::int8_t>);
  add_static(&quantize<std::uint8_t>);
  module.def("hadamard_dynamic_quantize", &quantize_dynamic, py::arg("x").noconvert(), py::arg("out").noconvert(),
             py::arg("scales").noconvert(), py::arg("block_size") = py::none(),
             py::arg("signs").noconvert() = py::none(), py::arg("transpose") = false, py::arg("scale") = py::none(),
             py::arg("isa") = py::none(),
             "The transform quantized into out, int8, and scales; see onnx_quarot.hadamard_dynamic_quantize.");
}

}  // namespace onnx_quarot
