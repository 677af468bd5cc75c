// Hadamard matrices of order K = 4t: constructed, never stored.
//
// Sources: Paley (1933), constructions I and II over GF(q); Williamson (1944), four symmetric circulants; Goethals and
// Seidel (1967); Turyn (1974), T-sequences from Turyn-type sequences; Sylvester (1867), doubling. An order has one
// matrix here, for good: models are saved with rotations made from it.
#ifndef ONNX_QUAROT_ORDERS_H
#define ONNX_QUAROT_ORDERS_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace onnx_quarot {

// One order with what the kernels need to multiply by its matrix.
struct Order {
  std::size_t k;
  std::vector<std::int8_t> matrix; // [k][k], row major, entries +1 and -1
  // For output column b and group g of four inputs: 8 * bits, bit i set where input 4 g + i enters with +1.
  // [g][b]; codes multiplies by H, codes_transposed by H^T.
  std::vector<std::uint8_t> codes;
  std::vector<std::uint8_t> codes_transposed;
};

// Whether H_k is available, k = 1, 2 or a multiple of 4. Cheap.
bool order_exists(std::size_t k);
// The matrix of an available order, made at first use and kept. Thread-safe. Throws UnsupportedOrder.
const Order& order(std::size_t k);

}  // namespace onnx_quarot

#endif
