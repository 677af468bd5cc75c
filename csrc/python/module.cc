// The Python module _core: numpy arrays in, Transform::rows out. hadamard() is a plain C function because argument
// handling would otherwise cost more than a short transform.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bus_errors.h"
#include "convert.h"
#include "cpu.h"
#include "fwht.h"
#include "orders.h"
#include "quantize.h"
#include "workers.h"

namespace py = pybind11;

namespace onnx_quarot {
namespace {

// numpy's numbers of its own types; bfloat16 has one only once ml_dtypes is imported.
constexpr int kNumpyFloat32 = 11, kNumpyFloat64 = 12, kNumpyFloat16 = 23;

// Of a byte order spelled out: arrays mapped from files name theirs even where it is this machine's.
constexpr char kForeignOrder = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '>' : '<';

// Below this many elements a second thread costs more than it saves.
constexpr std::size_t kElementsPerThread = std::size_t{1} << 15;
// So many that a thread which is late, or slower, leaves the others little to wait for.
constexpr std::size_t kPartsPerThread = 8;

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }
std::string type_name(const py::handle& object) { return Py_TYPE(object.ptr())->tp_name; }

py::dtype dtype_of(const py::array& array) { return array.dtype(); }

DType dtype_from_numpy(const py::array& array, const char* argument) {
  const py::dtype dtype = dtype_of(array);
  if (dtype.byteorder() != kForeignOrder) {
    switch (dtype.num()) {
      case kNumpyFloat32:
        return DType::float32;
      case kNumpyFloat64:
        return DType::float64;
      case kNumpyFloat16:
        return DType::float16;
      default:
        // Numbers of types that others register are for good: one look at the name is enough. The interpreter lock is
        // held.
        static int bfloat16_number = -1;
        if (dtype.num() == bfloat16_number) return DType::bfloat16;
        if (dtype.itemsize() == 2 && text(dtype) == "bfloat16") {
          bfloat16_number = dtype.num();
          return DType::bfloat16;
        }
    }
  }
  throw py::type_error(std::string(argument) + " has dtype " + text(dtype) +
                       ": it must be float32, float64, float16 or bfloat16, in native byte order");
}

// An array as rows of its last axis.
struct Rows {
  void* data = nullptr;
  std::size_t count = 1;
  std::size_t size = 0;
  std::ptrdiff_t stride = 0;  // in elements
  bool uniform = false;       // aligned, elements of a row adjacent, rows at one distance: what the kernel takes
};

Rows rows_of(const py::array& array) {
  const auto* proxy = py::detail::array_proxy(array.ptr());
  const auto item = static_cast<py::ssize_t>(array.itemsize());
  const int last = proxy->nd - 1;
  Rows rows;
  rows.data = proxy->data;
  rows.size = static_cast<std::size_t>(proxy->dimensions[last]);
  rows.uniform =
      (proxy->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 && (rows.size <= 1 || proxy->strides[last] == item);
  py::ssize_t stride = static_cast<py::ssize_t>(rows.size) * item, expected = 0;
  for (int axis = last - 1; axis >= 0; --axis) {
    const py::ssize_t length = proxy->dimensions[axis];
    if (length != 1) {
      if (rows.count == 1) {
        stride = proxy->strides[axis];
      } else {
        rows.uniform = rows.uniform && proxy->strides[axis] == expected;
      }
      expected = proxy->strides[axis] * length;
    }
    rows.count *= static_cast<std::size_t>(length);
  }
  rows.uniform = rows.uniform && stride % item == 0;
  rows.stride = stride / item;
  return rows;
}

bool same_shape(const py::array& a, const py::array& b) {
  return a.ndim() == b.ndim() && std::equal(a.shape(), a.shape() + a.ndim(), b.shape());
}

std::string shape_text(const py::array& array) { return text(array.attr("shape")); }

// Signs as float, checked.
std::vector<float> read_signs(PyObject* object) {
  const auto array = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(object);
  if (!array || array.ndim() != 1) {
    PyErr_Clear();
    throw py::value_error("signs must be one-dimensional numbers, +1 or -1, got " +
                          (array ? "shape " + shape_text(array) : type_name(object)));
  }
  std::vector<float> signs(array.data(), array.data() + array.size());
  for (std::size_t i = 0; i < signs.size(); ++i) {
    if (std::fabs(signs[i]) != 1.0f) {
      throw py::value_error("signs[" + std::to_string(i) + "] is " + std::to_string(signs[i]) +
                            ": every sign must be +1 or -1");
    }
  }
  if (signs.empty()) throw py::value_error("signs is empty: it must have the length of a block or of the last axis");
  return signs;
}

std::size_t positive(PyObject* object, const char* argument) {
  const Py_ssize_t value = PyNumber_AsSsize_t(object, PyExc_OverflowError);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (value < 1)
    throw py::value_error(std::string(argument) + " is " + std::to_string(value) + ": it must be at least 1");
  return static_cast<std::size_t>(value);
}

void run_rows(const Transform& transform, const Rows& in, const Rows& out, const float* signs, std::size_t threads) {
  const std::size_t work = in.count * in.size, item = element_size(transform.dtype());
  const std::size_t together = std::min({threads, in.count, work / kElementsPerThread});
  if (together <= 1) return transform.rows(in.data, out.data, in.count, in.stride, out.stride, signs);
  const std::size_t parts = std::min(in.count, together * kPartsPerThread);
  run_parts(parts, together, [&](std::size_t index) {
    const std::size_t first = in.count * index / parts, end = in.count * (index + 1) / parts;
    const auto bytes = [&](std::ptrdiff_t stride) {
      return static_cast<std::ptrdiff_t>(first) * stride * static_cast<std::ptrdiff_t>(item);
    };
    transform.rows(static_cast<const char*>(in.data) + bytes(in.stride),
                   static_cast<char*>(out.data) + bytes(out.stride), end - first, in.stride, out.stride, signs);
  });
}

enum Argument { kX, kOut, kBlockSize, kSigns, kTranspose, kScale, kThreads, kIsa, kArgumentCount };
constexpr const char* kArgumentNames[] = {"x", "out", "block_size", "signs", "transpose", "scale", "threads", "isa"};
using Arguments = std::array<PyObject*, kArgumentCount>;

Arguments parse(PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  Arguments given{};
  if (positional > kArgumentCount) {
    throw py::type_error("hadamard() takes at most " + std::to_string(int{kArgumentCount}) + " arguments");
  }
  std::copy(values, values + positional, given.begin());
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    std::size_t slot = 0;
    while (slot < kArgumentCount && PyUnicode_CompareWithASCIIString(name, kArgumentNames[slot]) != 0) ++slot;
    if (slot == kArgumentCount) throw py::type_error("hadamard() has no argument '" + text(name) + "'");
    if (given[slot] != nullptr) throw py::type_error("hadamard() got '" + text(name) + "' twice");
    given[slot] = values[positional + i];
  }
  for (PyObject*& value : given) {
    if (value == Py_None) value = nullptr;
  }
  return given;
}

py::array as_array(PyObject* object, const char* argument) {
  if (object == nullptr || !py::detail::npy_api::get().PyArray_Check_(object)) {
    throw py::type_error(std::string(argument) + " is " + (object == nullptr ? "None" : type_name(object)) +
                         ": it must be a numpy array");
  }
  return py::reinterpret_borrow<py::array>(object);
}

// Whether an array may hold two elements in one place: whether, of its axes from the closest elements to the farthest,
// one steps into what those before it span.
bool overlaps_itself(const py::array& array) {
  if ((array.flags() & py::array::c_style) != 0 || array.size() == 0) return false;
  std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;  // distance and length
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    if (array.shape(axis) > 1) axes.emplace_back(std::abs(array.strides(axis)), array.shape(axis));
  }
  std::sort(axes.begin(), axes.end());
  py::ssize_t span = array.itemsize();
  for (const auto& [distance, length] : axes) {
    if (distance < span) return true;
    span += distance * (length - 1);
  }
  return false;
}

void check_out(const py::array& x, const py::array& out) {
  if (dtype_of(out).num() != dtype_of(x).num()) {
    throw py::type_error("out has dtype " + text(dtype_of(out)) + ": it must be that of x, " + text(dtype_of(x)));
  }
  if (!same_shape(x, out)) {
    throw py::value_error("out has shape " + shape_text(out) + ": it must be that of x, " + shape_text(x));
  }
  if (!out.writeable()) throw py::value_error("out is read-only: it must be writeable");
  if (overlaps_itself(out)) throw py::value_error("out has elements in one place: all of them must be apart");
}

// The bytes from an array's first element to its last, wherever it holds nothing between them.
struct Extent {
  std::uintptr_t begin, end;
};

Extent extent_of(const py::array& array) {
  const auto* proxy = py::detail::array_proxy(array.ptr());
  Extent extent{reinterpret_cast<std::uintptr_t>(proxy->data), reinterpret_cast<std::uintptr_t>(proxy->data)};
  for (int axis = 0; axis < proxy->nd; ++axis) {
    if (proxy->dimensions[axis] == 0) return {0, 0};
    const py::ssize_t reach = (proxy->dimensions[axis] - 1) * proxy->strides[axis];
    // Unsigned arithmetic wraps, so that a negative reach moves the beginning down.
    (reach < 0 ? extent.begin : extent.end) += static_cast<std::uintptr_t>(reach);
  }
  extent.end += static_cast<std::uintptr_t>(array.itemsize());
  return extent;
}

// Whether two arrays of one shape hold common elements without being the same rows.
bool overlap_partly(const py::array& x, const Rows& in, const py::array& out, const Rows& to) {
  if (in.data == to.data && std::equal(x.strides(), x.strides() + x.ndim(), out.strides())) return false;
  if (in.data == to.data && in.uniform && to.uniform && in.count == 1) return false;
  const Extent a = extent_of(x), b = extent_of(out);
  if (a.end <= b.begin || b.end <= a.begin) return false;
  return py::cast<bool>(py::module_::import("numpy").attr("shares_memory")(x, out));
}

// Made anew only if it is not that of the thread's last call: to look an order up takes as long as a short row.
Transform transform_for(const TransformSpec& spec) {
  const auto fields = [](const TransformSpec& s) {
    return std::tie(s.dtype, s.size, s.block_size, s.transpose, s.scale, s.signs_length, s.isa);
  };
  static thread_local std::optional<std::pair<TransformSpec, Transform>> last;
  if (!last.has_value() || fields(last->first) != fields(spec)) last.emplace(spec, Transform(spec));
  return last->second;
}

py::object hadamard(const Arguments& given) {
  py::array x = as_array(given[kX], "x");
  TransformSpec spec;
  spec.dtype = dtype_from_numpy(x, "x");
  if (x.ndim() == 0) throw py::value_error("x has no axis: the transform works along the last one");
  Rows in = rows_of(x);
  spec.size = in.size;
  if (given[kBlockSize] != nullptr) spec.block_size = positive(given[kBlockSize], "block_size");
  if (given[kTranspose] != nullptr) {
    const int truth = PyObject_IsTrue(given[kTranspose]);
    if (truth < 0) throw py::error_already_set();
    spec.transpose = truth != 0;
  }
  if (given[kScale] != nullptr) {
    const double scale = PyFloat_AsDouble(given[kScale]);
    if (scale == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    spec.scale = scale;
  }
  if (given[kIsa] != nullptr) spec.isa = text(given[kIsa]);
  const std::size_t threads = given[kThreads] == nullptr ? 1 : positive(given[kThreads], "threads");
  std::vector<float> signs;
  if (given[kSigns] != nullptr) signs = read_signs(given[kSigns]);
  spec.signs_length = signs.size();
  const Transform transform = transform_for(spec);

  py::array result;
  if (given[kOut] == nullptr) {
    result = py::array(dtype_of(x), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  } else {
    result = as_array(given[kOut], "out");
    check_out(x, result);
  }
  Rows out = rows_of(result);
  if (given[kOut] != nullptr && overlap_partly(x, in, result, out)) {
    throw py::value_error("out overlaps x in part: it must be x itself or share no memory with it");
  }
  if (!in.uniform) {
    x = py::array(x.attr("copy")("C"));
    in = rows_of(x);
  }
  py::array target = result;
  if (!out.uniform) {
    target = py::array(dtype_of(x), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
    out = rows_of(target);
  }
  const float* sign_values = signs.empty() ? nullptr : signs.data();
  {
    const py::gil_scoped_release unlocked;
    run_rows(transform, in, out, sign_values, threads);
  }
  if (!target.is(result)) py::module_::import("numpy").attr("copyto")(result, target);
  return std::move(result);
}

void set_order_error(const char* message) {
  PyObject* module = PyImport_ImportModule("onnx_quarot.errors");
  PyObject* type = module == nullptr ? nullptr : PyObject_GetAttrString(module, "OrderError");
  if (type != nullptr) PyErr_SetString(type, message);
  Py_XDECREF(type);
  Py_XDECREF(module);
}

PyObject* hadamard_entry(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  try {
    return hadamard(parse(values, positional, names)).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const UnsupportedOrder& error) {
    set_order_error(error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef hadamard_method = {
    "hadamard", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hadamard_entry)),
    METH_FASTCALL | METH_KEYWORDS,
    "hadamard(x, out=None, block_size=None, signs=None, transpose=False, scale=None, threads=1, isa=None)\n\n"
    "Walsh-Hadamard transform of the last axis; see onnx_quarot.hadamard. isa names a kernel, for tests."};

// A matrix as it lies in memory.
MatrixView view_of(const py::array& array, const char* argument) {
  if (array.ndim() != 2) {
    throw py::value_error(std::string(argument) + " has shape " + shape_text(array) + ": it must be two-dimensional");
  }
  const auto item = static_cast<py::ssize_t>(array.itemsize());
  const auto* proxy = py::detail::array_proxy(array.ptr());
  if ((proxy->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0 || array.strides(0) % item != 0 ||
      array.strides(1) % item != 0) {
    throw py::value_error(std::string(argument) + " is not aligned to its elements");
  }
  return {proxy->data, dtype_from_numpy(array, argument), array.strides(0) / item, array.strides(1) / item};
}

void convert_arrays(const py::array& from, const py::array& to, const std::string& isa) {
  const MatrixView a = view_of(from, "source"), b = view_of(to, "target");
  if (!same_shape(from, to)) {
    throw py::value_error("target has shape " + shape_text(to) + ": it must be that of source, " + shape_text(from));
  }
  if (!to.writeable()) throw py::value_error("target is read-only: it must be writeable");
  const auto rows = static_cast<std::size_t>(from.shape(0)), columns = static_cast<std::size_t>(from.shape(1));
  const py::gil_scoped_release unlocked;
  convert(a, b, rows, columns, isa);
}

py::array_t<std::int8_t> order_matrix_array(std::size_t k) {
  const std::vector<std::int8_t> values = order_matrix(k);
  py::array_t<std::int8_t> matrix({k, k});
  std::copy(values.begin(), values.end(), matrix.mutable_data());
  return matrix;
}

py::tuple factorize_tuple(std::size_t n) {
  const Factors factors = factorize(n);
  return py::make_tuple(factors.order, factors.log2_power);
}

}  // namespace
}  // namespace onnx_quarot

PYBIND11_MODULE(_core, module) {
  using namespace onnx_quarot;
  module.doc() = "Compiled kernels of onnx_quarot.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const UnsupportedOrder& error) {
      set_order_error(error.what());
    }
  });
  const py::object name = py::str("onnx_quarot._core");
  module.add_object("hadamard",
                    py::reinterpret_steal<py::object>(PyCFunction_NewEx(&hadamard_method, nullptr, name.ptr())));
  add_quantize(module);
  module.def(
      "convert", &convert_arrays, py::arg("source"), py::arg("target"), py::arg("isa") = std::string(),
      "target[:] = source, for matrices of any strides of which one is float64; rounds once. No common memory. isa "
      "names a kernel, for tests.");
  module.def("order_matrix", &order_matrix_array, py::arg("order"), "Hadamard matrix of a supported order, int8.");
  module.def("order_factors", &order_factors, py::arg("order"),
             "Orders whose matrices have H_order as their Kronecker product; empty if there is none.");
  module.def("factorize", &factorize_tuple, py::arg("n"), "(K, m) with n = K 2**m, as used for H_n.");
  module.def("has_order", &has_order, py::arg("n"), "Whether H_n is available.");
  module.def("isa", &active_isa, "Name of the kernel in use.");
  module.def("isas", &available_isas, "Names of the kernels this CPU can run, fastest first.");
  module.def("watch_bus_errors", &watch_bus_errors, py::arg("on"),
             "Replace pages of mapped files that cannot be read by zeros, and count them; or stop.");
  module.def("bus_errors", &bus_errors, "Pages replaced since watching began.");
  module.def(
      "has_vnni", [] { return detect_cpu().avx512vnni || detect_cpu().avxvnni; },
      "Whether this is an x86 CPU that sums products of bytes in 32 bits.");
}
