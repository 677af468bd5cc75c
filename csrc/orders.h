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

#include "kernels.h"

namespace onnx_quarot {

// What the kernels need to multiply by H_k, a Kronecker product of matrices that are no further products. A step of
// such an order k has
//   codes   of its matrix, as order_codes.h says
//   halved  set for Paley's second construction, of 2 x 2 cells: with P the symmetric matrix of the cells' first
//           entries, y[2 j] = (P s)[j] - 2 x[2 j + 1] and y[2 j + 1] = (P d)[j] - 2 x[2 j], where s and d are the sums
//           and differences of pairs of inputs. The codes are those of P, of order k / 2: half the work. One column is
//           two vectors then, and there are no codes for two columns.
struct Order {
  std::size_t k = 0;
  std::vector<std::size_t> factors;  // ascending; the first is the outermost
  std::vector<OrderStep> steps;      // of each factor, to multiply by H; none for a power of two
  std::vector<OrderStep> steps_transposed;
};

// k as the product of orders whose matrices make up H_k: {k} for an order constructed as a whole, empty if there is
// none.
std::vector<std::size_t> order_factors(std::size_t k);
// Whether H_k is available, k = 1, 2 or a multiple of 4.
inline bool order_exists(std::size_t k) { return !order_factors(k).empty(); }
// An available order, made at first use and kept. Thread-safe. Throws UnsupportedOrder.
const Order& order(std::size_t k);
// H_k, [k][k], row major, entries +1 and -1, of an available order. Throws UnsupportedOrder.
std::vector<std::int8_t> order_matrix(std::size_t k);

}  // namespace onnx_quarot

#endif
