#include "convert.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kRows = 64, kColumns = 64;  // a block of a turned matrix: whole cache lines of both sides

std::ptrdiff_t offset(const MatrixView& m, std::size_t i, std::size_t j) {
  return static_cast<std::ptrdiff_t>(i) * m.row_stride + static_cast<std::ptrdiff_t>(j) * m.column_stride;
}

void* at(const MatrixView& m, std::size_t i, std::size_t j) {
  return static_cast<unsigned char*>(m.data) + offset(m, i, j) * static_cast<std::ptrdiff_t>(element_size(m.dtype));
}

// 16 bytes of elements: what every CPU interleaves in one instruction.
template <class T>
struct Turn {
  typedef T Vector __attribute__((vector_size(16)));
  typedef T VectorAnywhere __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
  static constexpr std::size_t kSide = 16 / sizeof(T);

  template <std::size_t... I>
  static Vector zip(Vector a, Vector b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, static_cast<int>(I / 2 + I % 2 * kSide)...);
  }
  template <std::size_t... I>
  static Vector zip_upper(Vector a, Vector b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, static_cast<int>((kSide + I) / 2 + I % 2 * kSide)...);
  }

  // A square of elements: to[j][i] = from[i][j]. Interleaving the halves of the rows log2(side) times turns it.
  static void square(const T* from, std::ptrdiff_t from_stride, T* to, std::ptrdiff_t to_stride) {
    constexpr std::make_index_sequence<kSide> lanes;
    Vector rows[kSide], next[kSide];
    for (std::size_t i = 0; i < kSide; ++i) {
      rows[i] = *reinterpret_cast<const VectorAnywhere*>(from + static_cast<std::ptrdiff_t>(i) * from_stride);
    }
    for (std::size_t stage = 1; stage < kSide; stage *= 2) {
      for (std::size_t i = 0; i < kSide / 2; ++i) {
        next[2 * i] = zip(rows[i], rows[i + kSide / 2], lanes);
        next[2 * i + 1] = zip_upper(rows[i], rows[i + kSide / 2], lanes);
      }
      std::copy(next, next + kSide, rows);
    }
    for (std::size_t i = 0; i < kSide; ++i) {
      *reinterpret_cast<VectorAnywhere*>(to + static_cast<std::ptrdiff_t>(i) * to_stride) = rows[i];
    }
  }
};

// Column by column: what is turned has adjacent rows on one side.
template <class T>
void copy_elements(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns) {
  for (std::size_t j = 0; j < columns; ++j) {
    const T* source = static_cast<const T*>(from.data) + offset(from, 0, j);
    T* target = static_cast<T*>(to.data) + offset(to, 0, j);
    for (std::size_t i = 0; i < rows; ++i, source += from.row_stride, target += to.row_stride) *target = *source;
  }
}

template <class T>
void copy(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns) {
  constexpr std::size_t side = Turn<T>::kSide;
  const bool reads_columns = from.row_stride == 1 && to.column_stride == 1;
  const bool squares = reads_columns || (from.column_stride == 1 && to.row_stride == 1);
  const std::size_t high = squares ? rows / side * side : 0, wide = squares ? columns / side * side : 0;
  for (std::size_t j = 0; j < wide; j += side) {
    for (std::size_t i = 0; i < high; i += side) {
      Turn<T>::square(static_cast<const T*>(at(from, i, j)), reads_columns ? from.column_stride : from.row_stride,
                      static_cast<T*>(at(to, i, j)), reads_columns ? to.row_stride : to.column_stride);
    }
  }
  const auto part = [](const MatrixView& m, std::size_t i, std::size_t j) {
    return MatrixView{at(m, i, j), m.dtype, m.row_stride, m.column_stride};
  };
  copy_elements<T>(part(from, high, 0), part(to, high, 0), rows - high, wide);
  copy_elements<T>(part(from, 0, wide), part(to, 0, wide), rows, columns - wide);
}

// Of one type.
void copy_block(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns) {
  switch (element_size(from.dtype)) {
    case 2:
      return copy<std::uint16_t>(from, to, rows, columns);
    case 4:
      return copy<std::uint32_t>(from, to, rows, columns);
    default:
      return copy<std::uint64_t>(from, to, rows, columns);
  }
}

MatrixView turned(const MatrixView& m) { return {m.data, m.dtype, m.column_stride, m.row_stride}; }

}  // namespace

void convert(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns,
             const std::string& isa) {
  const bool widens = to.dtype == DType::float64;
  if (!widens && from.dtype != DType::float64) throw std::invalid_argument("one of the two matrices must be float64");
  const Kernels& kernels = isa.empty() ? active_kernels() : find_kernels(isa.c_str());
  const TypeKernels& type = kernels.types[static_cast<std::size_t>(widens ? from.dtype : to.dtype)];
  const auto convert_row = [&](const void* source, void* target, std::size_t count) {
    widens ? type.widen(source, static_cast<double*>(target), count)
           : type.narrow(static_cast<const double*>(source), target, count);
  };
  if (from.column_stride == 1 && to.column_stride == 1) {
    for (std::size_t i = 0; i < rows; ++i) convert_row(at(from, i, 0), at(to, i, 0), columns);
    return;
  }
  if (from.row_stride == 1 && to.row_stride == 1) return convert(turned(from), turned(to), columns, rows, isa);
  // Rows are converted where they are adjacent, and turned in the type they have on the other side.
  alignas(64) std::uint64_t before[kRows * kColumns], after[kRows * kColumns];
  for (std::size_t i = 0; i < rows; i += kRows) {
    const std::size_t height = std::min(kRows, rows - i);
    for (std::size_t j = 0; j < columns; j += kColumns) {
      const std::size_t width = std::min(kColumns, columns - j);
      MatrixView source{at(from, i, j), from.dtype, from.row_stride, from.column_stride};
      MatrixView target{at(to, i, j), to.dtype, to.row_stride, to.column_stride};
      if (from.column_stride != 1) {
        const MatrixView block{before, from.dtype, kColumns, 1};
        copy_block(source, block, height, width);
        source = block;
      }
      if (to.column_stride != 1) target = {after, to.dtype, kColumns, 1};
      for (std::size_t k = 0; k < height; ++k) convert_row(at(source, k, 0), at(target, k, 0), width);
      if (to.column_stride != 1) {
        copy_block(target, {at(to, i, j), to.dtype, to.row_stride, to.column_stride}, height, width);
      }
    }
  }
}

}  // namespace onnx_quarot
